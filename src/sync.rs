//! Follows the store: loads the full state, polls for changes, verifies them and publishes them to decisions.
//!
//! [`follower::Follower`] is a pure state machine: it chooses the next action. [`FollowerLoop`] carries that action out, with a clock,
//! a store and a [`SnapshotPublisher`]. Other modules see the progress through [`status::FollowerHandle`].
//!
//! This module never evaluates policy and never verifies tokens. A message that the store pushes never proves freshness: only an
//! answer to a poll that this replica sent does.
//!
//! Look next at `sync/follower.rs`, then at `sync/follower_loop.rs`.

mod acknowledger;
mod applied_logger;
mod backoff;
mod cache_writer;
mod fleet_member;
pub mod follower;
mod follower_loop;
mod position;
mod pruner;
mod publisher;
pub mod status;
#[cfg(test)]
mod tests;

pub use acknowledger::{RevisionAcknowledger, RuntimeBarrier};
pub use applied_logger::log_applied_changes;
pub use cache_writer::{CacheFirstPositionStore, CacheWriter};
pub use fleet_member::{FleetMember, new_incarnation_id};
pub use follower_loop::{ChangeSource, FollowerLoop, Settings};
pub use position::{PositionFile, PositionFiles, PositionStore, persist_position};
pub use pruner::RevocationPruner;
pub use publisher::CellPublisher;

use crate::model::replica::ReplicaCondition;
use crate::model::time::ClockReading;
use crate::snapshot::{Freshness, SnapshotCell};
use crate::store;

/// Returns the condition of this replica. It combines the follower's state with the age of the published proof of freshness.
pub fn replica_condition(status: &status::FollowerHandle, cell: &SnapshotCell, now: ClockReading) -> ReplicaCondition {
    let freshness = cell.load().map(|view| view.freshness(now));
    match (status.state(), freshness) {
        (follower::FollowerState::Quarantined, _) => ReplicaCondition::Quarantined,
        (_, None) => ReplicaCondition::Bootstrapping,
        (_, Some(Freshness::Closed)) => ReplicaCondition::Closed,
        (follower::FollowerState::Resync, _) => ReplicaCondition::Resync,
        (_, Some(Freshness::Stale)) => ReplicaCondition::Stale,
        (_, Some(Freshness::Fresh)) => ReplicaCondition::Fresh,
    }
}

/// The target of a follower: it publishes snapshots and their proof of freshness, and it updates the revocation index.
///
/// The follower calls one method at a time, in order. When a method returns, decisions already read the published state.
pub trait SnapshotPublisher: Send {
    /// Publishes a full state, which a query sent at `sent_at` proves. A state of another history shares nothing with the published one.
    ///
    /// # Errors
    /// If the policy of the state cannot be built. The revocations are applied all the same. The state is published with the last
    /// good policy, or is not published at all if there is no such policy.
    fn publish_state(&mut self, state: store::StoreState, sent_at: ClockReading) -> Result<(), String>;

    /// Publishes the state that the disk cache of this machine holds. The state has no proof, so it denies every call. Commits may follow.
    ///
    /// # Errors
    /// If its policy cannot be built, or if this publisher does not support cached states. Nothing is published then.
    fn publish_cached_state(&mut self, _state: store::StoreState) -> Result<(), String> {
        Err("nothing is published without a proof here".to_owned())
    }

    /// Publishes commits that continue the published state, in order and without a gap. `sent_at` is the proof that then holds.
    /// It stays unchanged while the store has more commits.
    ///
    /// # Errors
    /// If their policy cannot be built. The revocations and the revision are published all the same.
    fn publish_commits(&mut self, commits: &[store::CommitRow], sent_at: ClockReading) -> Result<(), String>;

    /// Renews the proof of the published state to `sent_at`, because the store has no newer commit.
    fn renew_proof(&mut self, sent_at: ClockReading);

    /// Denies every call from now on.
    fn quarantine(&mut self, reason: &str);
}
