//! The revocation index: an exact set of revoked targets behind a bloom filter. All snapshots share it, and readers never wait.
//!
//! The filter may only answer "surely not revoked". On "maybe" the exact set decides. An addition is visible in every snapshot at once and
//! can only deny. A removal is visible only to snapshots from the lifting revision on.
//!
//! This module reads no clock and no store, and makes no decision: `pdp` queries it, and `sync` updates it through `snapshot`. Look next at
//! [`RevocationIndex`], then at `filter.rs` and `entry.rs`.

mod entry;
mod filter;
mod index;
mod key;
#[cfg(test)]
mod tests;

use crate::model::sync_primitives;

pub use index::RevocationIndex;
pub use key::{RevocationKey, TargetRef};

/// A revocation found in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevocationHit {
    /// The effect of the revocation.
    pub effect: RevocationEffect,
    /// Number of the revision that last changed the entry. It may be higher than the number of the querying snapshot.
    pub revision: u64,
}

/// The effect of a revocation that was found. If several effects apply, the first in this order is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RevocationEffect {
    /// Denied for good.
    Dead,
    /// Denied until reinstated.
    Suspended,
    /// The chain's root was issued at or before the watermark.
    Watermark,
}
