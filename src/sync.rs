//! Following the store: bootstrap, poll, verify, publish, resync, quarantine.
//!
//! [`follower::Follower`] decides and does nothing; [`Follow`] does what it says, with a clock, a store and a [`Publisher`].
//! Nothing here reads policy or tokens, and nothing a store pushes counts as proof of freshness: only a poll this replica sent.
//! Look next at `sync/follower.rs`, then at `sync/run.rs`; [`status::Status`] is what others see of it.

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

/// The state of this replica: what its follower does, and how old the proof is of what decisions read.
pub fn condition(status: &status::Status, cell: &SnapshotCell, now: Now) -> Condition {
    let freshness = cell.load().map(|view| view.freshness(now));
    match (status.state(), freshness) {
        (status::State::Quarantined, _) => Condition::Quarantined,
        (_, None) => Condition::Bootstrapping,
        (_, Some(Freshness::Closed)) => Condition::Closed,
        (status::State::Resync, _) => Condition::Resync,
        (_, Some(Freshness::Stale)) => Condition::Stale,
        (_, Some(Freshness::Fresh)) => Condition::Fresh,
    }
}

/// What a follower feeds: snapshots, their proof of freshness, and the revocation index.
///
/// Calls come one at a time and in order. When one returns, what it published is what decisions read.
pub trait Publisher: Send {
    /// Publishes a full state, proved at `sent_at`. One of another history than was published shares nothing with that.
    ///
    /// # Errors
    /// If its policy cannot be built. Revocations were applied; the state was published with the last good policy, or not at all
    /// where there was none before.
    fn replace(&mut self, state: store::State, sent_at: Now) -> Result<(), String>;

    /// Publishes what this machine kept of an earlier time, without a proof: everything is denied by it, and commits may follow.
    ///
    /// # Errors
    /// If its policy cannot be built, or this publisher has no use for it; nothing was published.
    fn restore(&mut self, _state: store::State) -> Result<(), String> {
        Err("nothing is published without a proof here".to_owned())
    }

    /// Publishes commits that follow what was published, in order and without a hole. `sent_at` is the proof that now holds; it
    /// has not moved where there is more to come.
    ///
    /// # Errors
    /// If their policy cannot be built: revocations, and the revision, were published all the same.
    fn apply(&mut self, commits: &[store::CommitRow], sent_at: Now) -> Result<(), String>;

    /// Nothing is new: what is published is proved at `sent_at`.
    fn refresh(&mut self, sent_at: Now);

    /// From now on everything is denied.
    fn quarantine(&mut self, reason: &str);
}
