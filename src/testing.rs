//! Test support for this program and for programs that embed it: a reference evaluator, the suite that every store passes, a
//! PostgreSQL server and a proxy.
//!
//! It is compiled for tests, and with the feature `testing`. No other module of the program may depend on it. Look next at
//! [`reference`], which evaluates policy in the simplest way, and at [`store`], the suite. [`postgres`] starts a server for it, and
//! [`proxy`] simulates a bad network.

pub mod case_count;
pub mod postgres;
pub mod proxy;
pub mod reference;
pub mod store;
