//! Faults on a fleet of real processes with a real store, and what the clients of the fleet then see.
//!
//! The load driver measures all of them; the integration tests run the decisive cases. `scenario.rs` has the table of faults and
//! their steps, `rig.rs` the processes, and `checker.rs` the clients and the judgement of their answers. The proxy between the
//! replicas and the store is `src/testing/proxy.rs`.
#![allow(dead_code, reason = "the tests use a part of what the driver reports")]

pub(crate) mod checker;
pub(crate) mod rig;
pub(crate) mod scenario;
