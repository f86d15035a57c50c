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
use crate::model::limits::CHAIN_BYTES_MAX;
use crate::model::time::Now;
use crate::pdp::Prepared;
use crate::token::VerifiedChain;

/// A verified chain, ready to decide by.
#[derive(Debug)]
pub(super) struct KnownChain {
    /// The exact tokens that were verified.
    pub(super) tokens: Vec<Bytes>,
    /// The chain with what a snapshot makes of it.
    pub(super) prepared: Prepared,
    /// Its identities as text.
    pub(super) identities: Arc<Identities>,
    /// Its part of every audit record.
    pub(super) fragment: Fragment,
}

impl KnownChain {
    /// What is left of the chain's life.
    pub(super) fn left_ms(&self, now: Now) -> u64 {
        let left_ms = self.prepared.chain().expires_at_s().saturating_mul(1000).saturating_sub(now.unix_ms());
        u64::try_from(left_ms).unwrap_or(0)
    }

    /// About what the chain takes in memory: its bytes, what was parsed of them, and what every chain takes.
    pub(super) fn weight_bytes(&self) -> u32 {
        const OVERHEAD_BYTES: usize = 2048;
        let tokens_bytes: usize = self.tokens.iter().map(Bytes::len).sum();
        u32::try_from(OVERHEAD_BYTES + 4 * tokens_bytes).unwrap_or(u32::MAX)
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
        self.known.get(&self.hash(tokens)).filter(|known| known.tokens == tokens)
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

    fn hash(&self, tokens: &[Bytes]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        for token in tokens {
            hasher.write_usize(token.len());
            hasher.write(token);
        }
        hasher.finish()
    }
}
