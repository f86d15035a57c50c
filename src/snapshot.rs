//! One immutable view of what the store holds, and the cell that hands it out with its proof of freshness as one value.
//!
//! A decision reads exactly one [`View`]. The revocation index is shared by all snapshots: an addition shows at once in every
//! one and can only deny, a removal shows only with a snapshot of its own revision. Must not read the store: `sync` feeds it.
//! Look next at [`builder`], then at `pdp.rs`.

mod builder;
mod cell;
#[cfg(test)]
mod tests;
mod trust;

use std::sync::Arc;

pub use builder::{Builder, Error, FullState};
pub use cell::SnapshotCell;
pub use trust::trust_of;

use crate::model::ids::{AgentId, UserId};
use crate::model::jwk::PublicKey;
use crate::model::mutant::{Mutant, active};
use crate::model::primitives;
use crate::model::revision::{Revision, StateDigest};
use crate::model::time::Now;
use crate::policy::compile::{Compiled, Tool};
use crate::policy::document::Role;
use crate::revocation::{Index, TargetRef};
use crate::token::trust::Trust;

/// A replica whose proof is younger than this is fresh.
pub const FRESH_AGE_MS: u64 = 1_000;

/// Everything a decision may look at, as of one revision.
#[derive(Debug)]
pub struct Snapshot {
    revision: Revision,
    policy_number: u64,
    digest: StateDigest,
    digest_hex: String,
    iat_skew_s: i64,
    freshness_bound_ms: u64,
    policy: Arc<Compiled>,
    trust: Arc<Trust>,
    revocations: Arc<Index>,
}

impl Snapshot {
    /// The revision that is applied in full, save for policy that could not be built ([`Snapshot::policy_number`]).
    pub fn revision(&self) -> &Revision {
        &self.revision
    }

    /// Number of the revision whose policy decides; lags behind where a newer one cannot be built.
    pub fn policy_number(&self) -> u64 {
        self.policy_number
    }

    /// Whether decisions by this snapshot are no older than a revision, policy and revocations both.
    pub fn covers(&self, revision: &Revision) -> bool {
        let number = self.revision.number.min(self.policy_number);
        self.revision.history == revision.history && number >= revision.number
    }

    /// The digest of the store's rows; equal on every replica at the same revision.
    pub fn digest(&self) -> StateDigest {
        self.digest
    }

    /// [`Snapshot::digest`] in hexadecimal, made once.
    pub fn digest_hex(&self) -> &str {
        &self.digest_hex
    }

    /// How far ahead of our clock an `iat` may be.
    pub fn iat_skew_s(&self) -> i64 {
        self.iat_skew_s
    }

    /// A replica without proof of freshness for this long only denies.
    pub fn freshness_bound_ms(&self) -> u64 {
        self.freshness_bound_ms
    }

    /// The compiled policy.
    pub fn policy(&self) -> &Arc<Compiled> {
        &self.policy
    }

    /// Whom to believe.
    pub fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// What is revoked, shared by all snapshots.
    pub fn revocations(&self) -> &Arc<Index> {
        &self.revocations
    }

    /// A registered tool.
    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.policy.tool(name)
    }

    /// Whether an operator may approve now for who names one of these groups, a call of this user: an operator still, with the role and
    /// in a group, none of whose users it is, and with a key that is not revoked. `key`: the one that they approved with, where that
    /// is known.
    pub fn may_approve(&self, operator: &str, key: Option<&str>, by: &[String], user: &UserId) -> bool {
        let Some(operator) = self.policy.operator(operator) else { return false };
        let index = &self.revocations;
        let good = |listed: &PublicKey| {
            let thumbprint = listed.thumbprint().as_str();
            let hit = index.hit(index.key(TargetRef::Key(thumbprint)), 0, self.revision.number);
            key.is_none_or(|key| key == thumbprint) && hit.is_none()
        };
        operator.roles.contains(&Role::Approve)
            && operator.groups.iter().any(|group| by.iter().any(|one| one == group.as_str()))
            && !operator.users.is_empty()
            && !operator.users.contains(user)
            && operator.keys.iter().any(good)
    }

    /// The longest life that an agent's document gives the root of its sessions.
    pub fn session_lifetime_s_max(&self, agent: &AgentId) -> Option<i64> {
        self.policy.agent_limits(agent).and_then(|limits| limits.lifetime_max_s)
    }
}

/// A snapshot and the proof that it is current: one value, read once for a decision.
#[derive(Clone, Debug)]
pub struct View {
    /// What to decide by.
    pub snapshot: Arc<Snapshot>,
    /// How we know that it is current.
    pub proof: Proof,
}

/// A proof of freshness: a round trip that this replica started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// When the poll was sent whose answer is fully applied.
    SentAt(Now),
    /// The store is not the one we followed: deny until an operator has acted.
    Quarantined,
    /// It comes from this machine's own cache, and no store was reached since: deny.
    Missing,
}

/// What a replica may answer at an age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Everything.
    Fresh,
    /// Everything but destructive tools.
    Stale,
    /// Denials only.
    Closed,
}

impl View {
    /// Milliseconds since the proof; `None` where there is none, as in quarantine.
    pub fn age_ms(&self, now: Now) -> Option<u64> {
        match self.proof {
            Proof::SentAt(sent_at) => Some(now.ms_since(sent_at)),
            Proof::Quarantined | Proof::Missing => None,
        }
    }

    /// What may be answered now.
    pub fn freshness(&self, now: Now) -> Freshness {
        match self.age_ms(now) {
            Some(age_ms) if age_ms >= self.snapshot.freshness_bound_ms => Freshness::Closed,
            Some(age_ms) if age_ms < FRESH_AGE_MS => Freshness::Fresh,
            Some(_) => Freshness::Stale,
            None => Freshness::Closed,
        }
    }

    /// What is left of the bound.
    pub fn valid_for_ms(&self, now: Now) -> u64 {
        if active(Mutant::ValidForBound) {
            return self.snapshot.freshness_bound_ms;
        }
        self.age_ms(now).map_or(0, |age_ms| self.snapshot.freshness_bound_ms.saturating_sub(age_ms))
    }
}
