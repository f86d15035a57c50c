//! What tests of this program and of programs that embed it share: a reference evaluator, the suite that every store passes, and
//! more to come.
//!
//! Compiled for tests, and for others with the feature `testing`; nothing of the program may depend on it. Look next at
//! [`reference`], the algebra in its plainest words, and at [`store`]. [`postgres`] is a server to run it on, [`proxy`] a bad network
//! before it.

pub mod cases;
pub mod postgres;
pub mod proxy;
pub mod reference;
pub mod store;
