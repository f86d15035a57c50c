//! Verified chains kept for their next call. Holds facts, never a decision and never a failure.
//!
//! A keyed hash finds an entry, equality of all bytes decides; only what verified is ever put in, so a peer that sends garbage
//! evicts nothing. Every use checks times, revocation, trust and policy again (`pdp`).

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;

use bytes::Bytes;
use moka::sync::Cache;

use super::request::Identities;
use crate::audit::Fragment;
use crate::model::heap::arc_bytes;
use crate::model::limits::CHAIN_BYTES_MAX;
use crate::model::time::Now;
use crate::pdp::Prepared;
use crate::token::VerifiedChain;

/// A verified chain, ready to decide by.
#[derive(Debug)]
pub(super) struct KnownChain {
    /// The exact tokens that were verified.
    pub(super) tokens: Arc<[Bytes]>,
    /// The chain with what a snapshot makes of it.
    pub(super) prepared: Prepared,
    /// Its identities as text.
    pub(super) identities: Arc<Identities>,
    /// Its part of every audit record.
    pub(super) fragment: Fragment,
    weight_bytes: u32,
}

/// What the cache itself keeps for an entry: places in its table and in its lists of what was used when.
const ENTRY_BYTES: usize = 300;

impl KnownChain {
    pub(super) fn new(tokens: Arc<[Bytes]>, prepared: Prepared, identities: Arc<Identities>, fragment: Fragment) -> Self {
        let tokens_bytes = arc_bytes::<()>() + size_of_val(&*tokens) + tokens.iter().map(Bytes::len).sum::<usize>();
        let identities_bytes = arc_bytes::<Identities>() + identities.user.len();
        let bytes =
            ENTRY_BYTES + arc_bytes::<Self>() + tokens_bytes + prepared.heap_bytes() + identities_bytes + fragment.heap_bytes();
        Self { tokens, prepared, identities, fragment, weight_bytes: u32::try_from(bytes).unwrap_or(u32::MAX) }
    }

    /// What is left of the chain's life.
    pub(super) fn left_ms(&self, now: Now) -> u64 {
        let left_ms = self.prepared.chain().expires_at_s().saturating_mul(1000).saturating_sub(now.unix_ms());
        u64::try_from(left_ms).unwrap_or(0)
    }

    /// What the chain takes in memory, the cache's own part included: what was asked of the allocator, within a tenth.
    pub(super) fn weight_bytes(&self) -> u32 {
        self.weight_bytes
    }
}

/// The cache of [`KnownChain`]s of one process.
#[derive(Debug)]
pub(super) struct Chains {
    hasher: RandomState,
    known: Cache<u64, Arc<KnownChain>>,
}

impl Chains {
    pub(super) fn new(bytes_max: u64) -> Self {
        let weigh = |_: &u64, known: &Arc<KnownChain>| known.weight_bytes();
        Self { hasher: RandomState::new(), known: Cache::builder().weigher(weigh).max_capacity(bytes_max).build() }
    }

    /// The verified chain of exactly these tokens.
    pub(super) fn find(&self, tokens: &[Bytes]) -> Option<Arc<KnownChain>> {
        // What no chain may be is not even hashed.
        if tokens.iter().map(Bytes::len).sum::<usize>() > CHAIN_BYTES_MAX {
            return None;
        }
        self.known.get(&self.hash(tokens)).filter(|known| *known.tokens == *tokens)
    }

    /// Keeps a verified chain in place of what stood under its hash.
    pub(super) fn keep(&self, known: Arc<KnownChain>) {
        self.known.insert(self.hash(&known.tokens), known);
    }

    /// Shows the chains that are kept, at most so many; false if there are more.
    pub(super) fn visit(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool {
        let mut known = self.known.iter();
        known.by_ref().take(chains_max).for_each(|(_, known)| visit(known.prepared.chain()));
        known.next().is_none()
    }

    /// How many chains are kept, about.
    pub(super) fn len(&self) -> u64 {
        self.known.entry_count()
    }

    /// What they take in memory together, once all that was kept is counted.
    pub(super) fn bytes(&self) -> u64 {
        self.known.run_pending_tasks();
        self.known.weighted_size()
    }

    fn hash(&self, tokens: &[Bytes]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        for token in tokens {
            hasher.write_usize(token.len());
            hasher.write(token);
        }
        hasher.finish()
    }
}
