//! What tests of this program and of programs that embed it share: the suite that every store passes, and more to come.
//!
//! Compiled for tests, and for others with the feature `testing`; nothing of the program may depend on it. Look next at
//! [`store`].

pub mod store;
