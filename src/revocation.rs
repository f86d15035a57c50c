//! What is revoked, in memory: an exact set behind a bloom filter, shared by every snapshot and read without waiting.
//!
//! The filter may only say "surely not revoked"; "maybe" goes to the exact set. An addition shows at once in every snapshot and
//! can only deny; a removal shows only to snapshots from the lifting revision on. This module reads no clock and no store, and
//! decides nothing: `pdp` asks, `sync` feeds through `snapshot`. Look next at [`Index`], then at `filter.rs` and `entry.rs`.

mod entry;
mod filter;
mod index;
mod key;
#[cfg(test)]
mod tests;

use crate::model::primitives;

pub use index::Index;
pub use key::{Key, TargetRef};

/// That something is revoked, and by which revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// What the revocation does.
    pub meaning: HitMeaning,
    /// Number of the revision that last changed the entry that hits; it may be above that of the asking snapshot.
    pub revision: u64,
}

/// What a revocation that hits does. Where several hold, the first of these is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HitMeaning {
    /// Denied for good.
    Dead,
    /// Denied until reinstated.
    Suspended,
    /// The chain's root is too old.
    Watermark,
}
