//! The types that all other modules share: identities, calls, decisions, reasons, stored rows and time.
//!
//! This module has no policy and no cryptographic protocol, and imports nothing else of this crate. Its only I/O is reading the clocks and
//! the free space of a disk. Look next at [`decision`], then at `pdp.rs`, which makes decisions.

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
