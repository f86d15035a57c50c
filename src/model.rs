//! The types that all other modules share: identities, calls, decisions, reasons, stored rows and time.
//!
//! This module has no policy and no cryptographic protocol, and imports nothing else of this crate. Its only I/O is reading the clocks and
//! the free space of a disk. Look next at [`decision`], then at `pdp.rs`, which makes decisions.

pub mod approval;
pub mod connection;
pub mod constraint;
pub mod decision;
pub mod disk;
pub mod duration;
pub mod heap_size;
pub mod ids;
pub mod json;
pub mod jwk;
pub mod limits;
pub(crate) mod mutant;
pub(crate) mod parallel;
pub mod reason;
pub mod replica;
pub mod request;
pub mod revision;
pub mod rows;
pub(crate) mod runtime;
pub(crate) mod sharded_map;
pub mod sorted_map;
pub(crate) mod sync_primitives;
pub mod time;
pub mod write_barrier;
