//! A fleet of real processes on a real store, what is done to it, and what its clients then see: shared by the load driver, which
//! measures, and by the integration tests, which run the decisive cases.
//!
//! `scenario.rs` is the table of faults and what is done in each; `rig.rs` has the processes; `checker.rs` asks, remembers every
//! answer and judges them afterwards. The proxy between replicas and store is `src/testing/proxy.rs`.
#![allow(dead_code, reason = "the tests use a part of what the driver reports")]

pub(crate) mod checker;
pub(crate) mod rig;
pub(crate) mod scenario;
