//! The cache of verified chains, so that a later call need not verify them again. It holds facts, never a decision and never a failure.
//!
//! A keyed hash finds an entry, and equality of all bytes confirms it. Only verified chains are inserted, so a peer that sends
//! garbage evicts nothing. Every call checks times, revocation, trust and policy again; look next at `service/judge.rs` and `pdp.rs`.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;

use bytes::Bytes;
use moka::sync::Cache;

use super::request::Identities;
use crate::audit::{ChainFacts, Fragment, Level, Principal};
use crate::model::decision::Evidence;
use crate::model::heap::arc_bytes;
use crate::model::limits::CHAIN_BYTES_MAX;
use crate::model::time::Now;
use crate::pdp::Prepared;
use crate::token::VerifiedChain;

/// A verified chain, prepared for decisions.
#[derive(Debug)]
pub(super) struct KnownChain {
    /// The exact tokens that were verified.
    pub(super) tokens: Arc<[Bytes]>,
    /// The chain as prepared by a snapshot.
    pub(super) prepared: Prepared,
    /// The identities of the chain as text.
    pub(super) identities: Arc<Identities>,
    /// The part of each audit record that is the same for this chain.
    pub(super) fragment: Fragment,
    weight_bytes: u32,
}

/// Memory that the cache itself uses per entry: slots of its table and of its lists of recent uses.
const ENTRY_BYTES: usize = 300;

impl KnownChain {
    pub(super) fn new(tokens: Arc<[Bytes]>, prepared: Prepared, identities: Arc<Identities>, fragment: Fragment) -> Self {
        let tokens_bytes = arc_bytes::<()>() + size_of_val(&*tokens) + tokens.iter().map(Bytes::len).sum::<usize>();
        let identities_bytes = arc_bytes::<Identities>() + identities.user.len();
        let bytes =
            ENTRY_BYTES + arc_bytes::<Self>() + tokens_bytes + prepared.heap_bytes() + identities_bytes + fragment.heap_bytes();
        Self { tokens, prepared, identities, fragment, weight_bytes: u32::try_from(bytes).unwrap_or(u32::MAX) }
    }

    /// The remaining lifetime of the chain in milliseconds.
    pub(super) fn left_ms(&self, now: Now) -> u64 {
        let left_ms = self.prepared.chain().expires_at_s().saturating_mul(1000).saturating_sub(now.unix_ms());
        u64::try_from(left_ms).unwrap_or(0)
    }

    /// The memory of the chain in bytes, the cache's own part included. It equals the allocated bytes within a tenth.
    pub(super) fn weight_bytes(&self) -> u32 {
        self.weight_bytes
    }
}

/// The part of each audit record that is the same for a chain, serialized once.
pub(super) fn fragment(prepared: &Prepared, identities: &Identities) -> Fragment {
    let verified = |id| Principal { id, evidence: Evidence::Verified };
    let agents: Vec<Principal<'_>> = identities.subject.agents.iter().map(|agent| verified(agent.as_str())).collect();
    let chain = prepared.chain();
    let issuers: Vec<String> = (0..chain.levels().len()).map(|hop| chain.issuer_of(hop)).collect();
    let levels: Vec<Level<'_>> = chain
        .levels()
        .iter()
        .zip(&issuers)
        .map(|(level, issuer)| Level {
            jti: &level.jti,
            hop_hash: level.signing_input_sha256(),
            holder_thumbprint: level.holder.thumbprint().as_str(),
            issuer,
            expires_at_unix_s: level.exp_s,
        })
        .collect();
    Fragment::new(&ChainFacts {
        user: Some(verified(&identities.user)),
        application: Some(verified(identities.subject.application.as_str())),
        agents: &agents,
        session: Some(verified(identities.subject.session.as_str())),
        task: Some(verified(identities.subject.task.as_str())),
        levels: &levels,
    })
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

    /// Finds the verified chain of exactly these tokens.
    pub(super) fn find(&self, tokens: &[Bytes]) -> Option<Arc<KnownChain>> {
        // Tokens over the size limit are not even hashed.
        if tokens.iter().map(Bytes::len).sum::<usize>() > CHAIN_BYTES_MAX {
            return None;
        }
        self.known.get(&self.hash(tokens)).filter(|known| *known.tokens == *tokens)
    }

    /// Inserts a verified chain. It replaces any other chain with the same hash.
    pub(super) fn keep(&self, known: Arc<KnownChain>) {
        self.known.insert(self.hash(&known.tokens), known);
    }

    /// Visits at most `chains_max` cached chains. Returns false if there are more.
    pub(super) fn visit(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool {
        let mut known = self.known.iter();
        known.by_ref().take(chains_max).for_each(|(_, known)| visit(known.prepared.chain()));
        known.next().is_none()
    }

    /// The approximate number of cached chains.
    pub(super) fn len(&self) -> u64 {
        self.known.entry_count()
    }

    /// The memory of all cached chains in bytes, after pending insertions are counted.
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
