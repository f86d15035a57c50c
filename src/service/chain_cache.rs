//! The cache of verified chains, so that a later call need not verify them again. It holds facts, never a decision and never a failure.
//!
//! A keyed hash finds an entry, and equality of all bytes confirms it. Only verified chains are inserted, so a peer that sends
//! garbage evicts nothing. Every call checks times, revocation, trust and policy again; look next at `service/judgement.rs` and `pdp.rs`.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;

use bytes::Bytes;
use moka::sync::Cache;

use super::request::ChainIdentities;
use crate::audit::{ChainFacts, ChainFragment, PrincipalFacts, TokenFacts};
use crate::model::decision::Evidence;
use crate::model::heap_size::arc_bytes;
use crate::model::limits::CHAIN_BYTES_MAX;
use crate::model::time::ClockReading;
use crate::pdp::PreparedChain;
use crate::token::VerifiedChain;

/// A verified chain, prepared for decisions.
#[derive(Debug)]
pub(super) struct CachedChain {
    /// The exact tokens that were verified.
    pub(super) tokens: Arc<[Bytes]>,
    /// The chain as prepared by a snapshot.
    pub(super) prepared: PreparedChain,
    /// The identities of the chain as text.
    pub(super) identities: Arc<ChainIdentities>,
    /// The part of each audit record that is the same for this chain.
    pub(super) fragment: ChainFragment,
    weight_bytes: u32,
}

/// Memory that the cache itself uses per entry: slots of its table and of its lists of recent uses.
const ENTRY_OVERHEAD_BYTES: usize = 300;

impl CachedChain {
    pub(super) fn new(
        tokens: Arc<[Bytes]>,
        prepared: PreparedChain,
        identities: Arc<ChainIdentities>,
        fragment: ChainFragment,
    ) -> Self {
        let tokens_bytes = arc_bytes::<()>() + size_of_val(&*tokens) + tokens.iter().map(Bytes::len).sum::<usize>();
        let identities_bytes = arc_bytes::<ChainIdentities>() + identities.user.len();
        let bytes = ENTRY_OVERHEAD_BYTES
            + arc_bytes::<Self>()
            + tokens_bytes
            + prepared.heap_bytes()
            + identities_bytes
            + fragment.heap_bytes();
        Self { tokens, prepared, identities, fragment, weight_bytes: u32::try_from(bytes).unwrap_or(u32::MAX) }
    }

    /// The remaining lifetime of the chain in milliseconds.
    pub(super) fn remaining_ms(&self, now: ClockReading) -> u64 {
        let left_ms = self.prepared.chain().expires_at_s().saturating_mul(1000).saturating_sub(now.unix_ms());
        u64::try_from(left_ms).unwrap_or(0)
    }

    /// The memory of the chain in bytes, the cache's own part included. It equals the allocated bytes within a tenth.
    pub(super) fn weight_bytes(&self) -> u32 {
        self.weight_bytes
    }
}

/// The part of each audit record that is the same for a chain, serialized once.
pub(super) fn audit_fragment(prepared: &PreparedChain, identities: &ChainIdentities) -> ChainFragment {
    let verified = |id| PrincipalFacts { id, evidence: Evidence::Verified };
    let agents: Vec<PrincipalFacts<'_>> = identities.subject.agents.iter().map(|agent| verified(agent.as_str())).collect();
    let chain = prepared.chain();
    let issuers: Vec<String> = (0..chain.tokens().len()).map(|hop| chain.token_issuer(hop)).collect();
    let levels: Vec<TokenFacts<'_>> = chain
        .tokens()
        .iter()
        .zip(&issuers)
        .map(|(level, issuer)| TokenFacts {
            jti: &level.jti,
            hop_hash: level.signing_input_sha256(),
            holder_thumbprint: level.holder.thumbprint().as_str(),
            issuer,
            expires_at_unix_s: level.exp_s,
        })
        .collect();
    ChainFragment::new(&ChainFacts {
        user: Some(verified(&identities.user)),
        application: Some(verified(identities.subject.application.as_str())),
        agents: &agents,
        session: Some(verified(identities.subject.session.as_str())),
        task: Some(verified(identities.subject.task.as_str())),
        tokens: &levels,
    })
}

/// The cache of [`CachedChain`]s of one process.
#[derive(Debug)]
pub(super) struct ChainCache {
    hasher: RandomState,
    entries: Cache<u64, Arc<CachedChain>>,
}

impl ChainCache {
    pub(super) fn new(bytes_max: u64) -> Self {
        let weigh = |_: &u64, known: &Arc<CachedChain>| known.weight_bytes();
        Self { hasher: RandomState::new(), entries: Cache::builder().weigher(weigh).max_capacity(bytes_max).build() }
    }

    /// Finds the verified chain of exactly these tokens.
    pub(super) fn find(&self, tokens: &[Bytes]) -> Option<Arc<CachedChain>> {
        // Tokens over the size limit are not even hashed.
        if tokens.iter().map(Bytes::len).sum::<usize>() > CHAIN_BYTES_MAX {
            return None;
        }
        self.entries.get(&self.hash(tokens)).filter(|known| *known.tokens == *tokens)
    }

    /// Inserts a verified chain. It replaces any other chain with the same hash.
    pub(super) fn insert(&self, known: Arc<CachedChain>) {
        self.entries.insert(self.hash(&known.tokens), known);
    }

    /// Visits at most `chains_max` cached chains. Returns false if there are more.
    pub(super) fn visit_chains(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool {
        let mut known = self.entries.iter();
        known.by_ref().take(chains_max).for_each(|(_, known)| visit(known.prepared.chain()));
        known.next().is_none()
    }

    /// The approximate number of cached chains.
    pub(super) fn len(&self) -> u64 {
        self.entries.entry_count()
    }

    /// The memory of all cached chains in bytes, after pending insertions are counted.
    pub(super) fn bytes(&self) -> u64 {
        self.entries.run_pending_tasks();
        self.entries.weighted_size()
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
