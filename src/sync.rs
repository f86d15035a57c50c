//! Follows the store: loads the full state, polls for changes, verifies them and publishes them to decisions.
//!
//! [`follower::Follower`] is a pure state machine: it chooses the next action. [`Follow`] carries that action out, with a clock,
//! a store and a [`Publisher`]. Other modules see the progress through [`status::Status`].
//!
//! This module never evaluates policy and never verifies tokens. A message that the store pushes never proves freshness: only an
//! answer to a poll that this replica sent does.
//!
//! Look next at `sync/follower.rs`, then at `sync/run.rs`.

mod acknowledge;
mod announce;
mod backoff;
mod cache;
pub mod follower;
mod member;
mod place;
mod publisher;
mod run;
pub mod status;
#[cfg(test)]
mod tests;
mod upkeep;

pub use acknowledge::{Acknowledge, Barrier};
pub use announce::announce;
pub use cache::Keeper;
pub use member::{Member, incarnation};
pub use place::{Keep, Place, Places, remember};
pub use publisher::CellPublisher;
pub use run::{Follow, Settings, Source};
pub use upkeep::Upkeep;

use crate::model::replica::Condition;
use crate::model::time::Now;
use crate::snapshot::{Freshness, SnapshotCell};
use crate::store;

/// Returns the condition of this replica. It combines the follower's state with the age of the published proof of freshness.
pub fn condition(status: &status::Status, cell: &SnapshotCell, now: Now) -> Condition {
    let freshness = cell.load().map(|view| view.freshness(now));
    match (status.state(), freshness) {
        (follower::State::Quarantined, _) => Condition::Quarantined,
        (_, None) => Condition::Bootstrapping,
        (_, Some(Freshness::Closed)) => Condition::Closed,
        (follower::State::Resync, _) => Condition::Resync,
        (_, Some(Freshness::Stale)) => Condition::Stale,
        (_, Some(Freshness::Fresh)) => Condition::Fresh,
    }
}

/// The target of a follower: it publishes snapshots and their proof of freshness, and it updates the revocation index.
///
/// The follower calls one method at a time, in order. When a method returns, decisions already read the published state.
pub trait Publisher: Send {
    /// Publishes a full state, which a query sent at `sent_at` proves. A state of another history shares nothing with the published one.
    ///
    /// # Errors
    /// If the policy of the state cannot be built. The revocations are applied all the same. The state is published with the last
    /// good policy, or is not published at all if there is no such policy.
    fn replace(&mut self, state: store::State, sent_at: Now) -> Result<(), String>;

    /// Publishes the state that the disk cache of this machine holds. The state has no proof, so it denies every call. Commits may follow.
    ///
    /// # Errors
    /// If its policy cannot be built, or if this publisher does not support cached states. Nothing is published then.
    fn restore(&mut self, _state: store::State) -> Result<(), String> {
        Err("nothing is published without a proof here".to_owned())
    }

    /// Publishes commits that continue the published state, in order and without a gap. `sent_at` is the proof that then holds.
    /// It stays unchanged while the store has more commits.
    ///
    /// # Errors
    /// If their policy cannot be built. The revocations and the revision are published all the same.
    fn apply(&mut self, commits: &[store::CommitRow], sent_at: Now) -> Result<(), String>;

    /// Renews the proof of the published state to `sent_at`, because the store has no newer commit.
    fn refresh(&mut self, sent_at: Now);

    /// Denies every call from now on.
    fn quarantine(&mut self, reason: &str);
}
