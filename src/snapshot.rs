//! An immutable view of the store at one revision, and the cell that publishes it together with its proof of freshness as one value.
//!
//! A decision reads exactly one [`SnapshotView`]. All snapshots share the revocation index. An addition is visible in every snapshot at once and can
//! only deny. A removal is visible only from the snapshot of its own revision on. This module must not read the store; `sync` supplies the
//! rows. Look next at [`builder`], then at `pdp.rs`.

mod builder;
mod cell;
#[cfg(test)]
mod tests;
mod trust_builder;

use std::sync::Arc;

pub use builder::{Error, FullState, SnapshotBuilder};
pub use cell::SnapshotCell;
pub use trust_builder::build_trust_table;

use crate::model::ids::{AgentId, UserId};
use crate::model::jwk::PublicKey;
use crate::model::mutant::{Mutant, is_active};
use crate::model::revision::{Revision, StateDigest};
use crate::model::sync_primitives;
use crate::model::time::ClockReading;
use crate::policy::compile::{CompiledPolicy, Tool};
use crate::policy::document::OperatorRole;
use crate::revocation::{RevocationIndex, TargetRef};
use crate::token::trust::TrustTable;

/// A replica whose proof of freshness is younger than this is fresh.
pub const FRESH_AGE_MS: u64 = 1_000;

/// All data that a decision may read, as of one revision.
#[derive(Debug)]
pub struct Snapshot {
    revision: Revision,
    policy_number: u64,
    digest: StateDigest,
    digest_hex: String,
    iat_skew_s: i64,
    freshness_bound_ms: u64,
    policy: Arc<CompiledPolicy>,
    trust: Arc<TrustTable>,
    revocations: Arc<RevocationIndex>,
}

impl Snapshot {
    /// The revision of the snapshot. It is applied in full, except for a policy that could not be built ([`Snapshot::policy_number`]).
    pub fn revision(&self) -> &Revision {
        &self.revision
    }

    /// Number of the revision whose policy is in force. It is lower than the snapshot's number while a newer policy cannot be built.
    pub fn policy_number(&self) -> u64 {
        self.policy_number
    }

    /// Whether both policy and revocations of this snapshot are at least as new as `revision`.
    pub fn includes_revision(&self, revision: &Revision) -> bool {
        let number = self.revision.number.min(self.policy_number);
        self.revision.history == revision.history && number >= revision.number
    }

    /// The digest of the store's rows. It is equal on every replica at the same revision.
    pub fn digest(&self) -> StateDigest {
        self.digest
    }

    /// [`Snapshot::digest`] in hexadecimal, computed once.
    pub fn digest_hex(&self) -> &str {
        &self.digest_hex
    }

    /// How far in the future an `iat` may lie, by our clock.
    pub fn iat_skew_s(&self) -> i64 {
        self.iat_skew_s
    }

    /// The freshness bound: a replica whose proof of freshness is this old only denies.
    pub fn freshness_bound_ms(&self) -> u64 {
        self.freshness_bound_ms
    }

    /// The compiled policy.
    pub fn policy(&self) -> &Arc<CompiledPolicy> {
        &self.policy
    }

    /// The trusted issuers and registered agents.
    pub fn trust(&self) -> &Arc<TrustTable> {
        &self.trust
    }

    /// The revocation index, shared by all snapshots.
    pub fn revocations(&self) -> &Arc<RevocationIndex> {
        &self.revocations
    }

    /// The registered tool of this name.
    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.policy.tool(name)
    }

    /// Whether an operator may approve a call of `user`, for a layer whose approvers are the groups `by`.
    ///
    /// The operator must still exist, have the role `approve`, and be a member of one of the groups. The operator's document must list the
    /// operator's own user identities, and `user` must not be one of them: nobody approves their own call. One of the operator's keys must
    /// not be revoked. `key` is the thumbprint of the key that signed the approval, if it is known; then only that key counts.
    pub fn may_approve(&self, operator: &str, key: Option<&str>, by: &[String], user: &UserId) -> bool {
        let Some(operator) = self.policy.operator(operator) else { return false };
        let index = &self.revocations;
        let good = |listed: &PublicKey| {
            let thumbprint = listed.thumbprint().as_str();
            let hit = index.find_hit(index.key(TargetRef::Key(thumbprint)), 0, self.revision.number);
            key.is_none_or(|key| key == thumbprint) && hit.is_none()
        };
        operator.roles.contains(&OperatorRole::Approve)
            && operator.groups.iter().any(|group| by.iter().any(|one| one == group.as_str()))
            && !operator.users.is_empty()
            && !operator.users.contains(user)
            && operator.keys.iter().any(good)
    }

    /// The longest root lifetime that the agent's document allows for its sessions.
    pub fn session_lifetime_s_max(&self, agent: &AgentId) -> Option<i64> {
        self.policy.agent_limits(agent).and_then(|limits| limits.lifetime_max_s)
    }
}

/// A snapshot and its proof of freshness: one value, read once per decision.
#[derive(Clone, Debug)]
pub struct SnapshotView {
    /// The snapshot to decide by.
    pub snapshot: Arc<Snapshot>,
    /// The proof that the snapshot is current.
    pub proof: FreshnessProof,
}

/// A proof of freshness: a round trip to the store that this replica started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreshnessProof {
    /// The time at which the poll was sent whose answer is completely applied.
    SentAt(ClockReading),
    /// The store is not the one that the replica followed. The replica denies until an operator has acted.
    Quarantined,
    /// The snapshot comes from the cache on this machine, and no store was reached since. The replica denies.
    Missing,
}

/// The answers that a replica may give, by the age of its proof of freshness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Everything.
    Fresh,
    /// Everything but destructive tools.
    Stale,
    /// Denials only.
    Closed,
}

impl SnapshotView {
    /// Milliseconds since the proof; `None` if there is no proof, as in quarantine.
    pub fn age_ms(&self, now: ClockReading) -> Option<u64> {
        match self.proof {
            FreshnessProof::SentAt(sent_at) => Some(now.elapsed_ms_since(sent_at)),
            FreshnessProof::Quarantined | FreshnessProof::Missing => None,
        }
    }

    /// The freshness of this view at `now`.
    pub fn freshness(&self, now: ClockReading) -> Freshness {
        match self.age_ms(now) {
            Some(age_ms) if age_ms >= self.snapshot.freshness_bound_ms => Freshness::Closed,
            Some(age_ms) if age_ms < FRESH_AGE_MS => Freshness::Fresh,
            Some(_) => Freshness::Stale,
            None => Freshness::Closed,
        }
    }

    /// Milliseconds until the freshness bound is reached.
    pub fn valid_for_ms(&self, now: ClockReading) -> u64 {
        if is_active(Mutant::ValidForBound) {
            return self.snapshot.freshness_bound_ms;
        }
        self.age_ms(now).map_or(0, |age_ms| self.snapshot.freshness_bound_ms.saturating_sub(age_ms))
    }
}
