//! The vocabulary every other module speaks: identities, calls, decisions, reasons, stored rows, time.
//!
//! No I/O, no policy, no cryptography, and no import of anything else of this crate. Look next at [`decision`], then at
//! `pdp.rs`, which makes one.

pub mod approval;
pub mod barrier;
pub mod connection;
pub mod constraint;
pub mod decision;
pub mod disk;
pub mod duration;
pub mod heap;
pub mod ids;
pub mod json;
pub mod jwk;
pub mod limits;
pub(crate) mod mutant;
pub(crate) mod pieces;
pub(crate) mod primitives;
pub mod reason;
pub mod records;
pub mod replica;
pub mod request;
pub mod revision;
pub(crate) mod shards;
pub mod sorted;
pub mod time;
