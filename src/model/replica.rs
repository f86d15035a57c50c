//! A replica as people and gateways see it: what state it is in, how far it is, when it was last heard.
//!
//! What a replica says of itself and what the store knows of it are put together in [`crate::store::fleet`].

use super::revision::Revision;

/// The state of a replica. The order is that of the metric's states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It has no snapshot yet: calls are not answered.
    Bootstrapping,
    /// It answers everything.
    Fresh,
    /// Its proof of freshness is a second old or more: it answers everything but destructive tools, marked.
    Stale,
    /// Its proof of freshness is as old as the bound: it only denies.
    Closed,
    /// It fell out of step with the store: the old snapshot and every revocation that arrives, until a full state replaces it.
    Resync,
    /// The store is not the one it followed: it only denies.
    Quarantined,
}

impl Condition {
    /// The names, in order.
    pub const NAMES: &[&str] = &["bootstrapping", "fresh", "stale", "closed", "resync", "quarantined"];

    /// The name, as shown.
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

    /// Whether calls may be permitted.
    pub fn is_serving(self) -> bool {
        matches!(self, Self::Fresh | Self::Stale | Self::Resync)
    }
}

/// A replica in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its incarnation: random, new with each start.
    pub id: String,
    /// Its name and where it listens.
    pub address: String,
    /// The program's version.
    pub version: String,
    /// When it started, by its own clock.
    pub started_unix_ms: i64,
    /// By what it said last and how long ago that was heard.
    pub condition: Condition,
    /// It answers what it has begun, and ends.
    pub draining: bool,
    /// Number of the last revision that it applied; 0: none.
    pub applied_number: u64,
    /// Number up to which it acknowledged; 0: nothing.
    pub acked_number: u64,
    /// Since it was last heard, by the store's clock.
    pub age_ms: u64,
    /// From the commit of `acked_number` to its acknowledgement, by the store's clock; `None` where that is not known.
    pub kill_ms: Option<u64>,
}

/// The replicas of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    /// History and newest number.
    pub revision: Revision,
    /// A replica without a proof of freshness for this long only denies.
    pub freshness_bound_ms: u64,
    /// By id.
    pub replicas: Vec<Listed>,
}

/// What became of a replica while the fleet was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answers nothing any more from before the revision.
    Acknowledged {
        /// From the commit to the acknowledgement, by the store's clock; `None` where the commit's time is not known.
        after_ms: Option<u64>,
    },
    /// It was not heard, and what it could still have answered by is as old as the bound: it only denies until it has caught up.
    RanOut,
    /// It denies everything.
    Quarantined,
}

impl Outcome {
    /// The name, as shown.
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
        use Condition::{Bootstrapping, Closed, Fresh, Quarantined, Resync, Stale};
        for condition in [Bootstrapping, Fresh, Stale, Closed, Resync, Quarantined] {
            assert_eq!(Condition::NAMES[condition as usize], condition.as_str());
        }
    }
}
