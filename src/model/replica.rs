//! The state of a replica as people and gateways see it: its condition, its revision, and the time since its last heartbeat.
//!
//! [`crate::store::fleet`] combines the replica's own report with the store's data.

use super::revision::Revision;

/// The condition of a replica, in the order of the metric's states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaCondition {
    /// The replica has no snapshot yet and answers no calls.
    Bootstrapping,
    /// The replica answers everything.
    Fresh,
    /// The proof of freshness is at least a second old. The replica answers everything except destructive tools, and marks its answers.
    Stale,
    /// The proof of freshness is as old as the bound. The replica only denies.
    Closed,
    /// The replica is out of step with the store. It keeps the old snapshot and applies new revocations until a full state replaces it.
    Resync,
    /// The store is not the one that the replica followed. The replica only denies.
    Quarantined,
}

impl ReplicaCondition {
    /// The names, in order.
    pub const NAMES: &[&str] = &["bootstrapping", "fresh", "stale", "closed", "resync", "quarantined"];

    /// The name as shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bootstrapping => "bootstrapping",
            Self::Fresh => "fresh",
            Self::Stale => "stale",
            Self::Closed => "closed",
            Self::Resync => "resync",
            Self::Quarantined => "quarantined",
        }
    }

    /// Whether the replica may permit calls.
    pub fn is_serving(self) -> bool {
        matches!(self, Self::Fresh | Self::Stale | Self::Resync)
    }
}

/// A replica as an entry of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaSummary {
    /// Its incarnation: a random id, new with each start.
    pub id: String,
    /// Its name and listening address.
    pub address: String,
    /// The program's version.
    pub version: String,
    /// Time of its start, by its own clock.
    pub started_unix_ms: i64,
    /// Its condition, from its last report and the age of that report.
    pub condition: ReplicaCondition,
    /// Whether it is shutting down: it finishes running calls and then ends.
    pub draining: bool,
    /// Number of the last applied revision; 0 if there is none.
    pub applied_number: u64,
    /// Number of the last acknowledged revision; 0 if there is none.
    pub acked_number: u64,
    /// Milliseconds since its last heartbeat, by the store's clock.
    pub age_ms: u64,
    /// Milliseconds from the commit of `acked_number` to its acknowledgement, by the store's clock; `None` if unknown.
    pub kill_ms: Option<u64>,
}

/// All replicas of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetStatus {
    /// The store's history and newest number.
    pub revision: Revision,
    /// The freshness bound: a replica whose proof of freshness is this old only denies.
    pub freshness_bound_ms: u64,
    /// The replicas, ordered by id.
    pub replicas: Vec<ReplicaSummary>,
}

/// The result for one replica after a wait for the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaWaitOutcome {
    /// The replica no longer gives any answer from before the revision.
    Acknowledged {
        /// Milliseconds from the commit to the acknowledgement, by the store's clock; `None` if the time of the commit is unknown.
        after_ms: Option<u64>,
    },
    /// The replica was not heard, and its last possible proof of freshness is as old as the bound. It only denies until it has caught up.
    RanOut,
    /// The replica denies everything.
    Quarantined,
}

impl ReplicaWaitOutcome {
    /// The name as shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Acknowledged { .. } => "acknowledged",
            Self::RanOut => "ran_out",
            Self::Quarantined => "quarantined",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_of_the_states() {
        use ReplicaCondition::{Bootstrapping, Closed, Fresh, Quarantined, Resync, Stale};
        for condition in [Bootstrapping, Fresh, Stale, Closed, Resync, Quarantined] {
            assert_eq!(ReplicaCondition::NAMES[condition as usize], condition.as_str());
        }
    }
}
