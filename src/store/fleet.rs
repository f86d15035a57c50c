//! Who follows a store: one row a replica, which the replica keeps alive with its polls.
//!
//! What a row says is its replica's word; when it was last heard is the store's. Nothing here decides anything: `sync` beats,
//! and who waits for the fleet reads. Look next at [`super::Store::poll`].

use super::Error;
use super::rules::{at_most, filled, plain};
use crate::model::replica::{Condition, Fleet, Listed};
use crate::model::revision::{HistoryId, Revision};

/// The longest freshness bound that a store can have: after that long without a word a replica only denies, in milliseconds.
pub const SILENCE_MS_MAX: i64 = 60_000;
/// Replicas that are registered at one time.
pub const REPLICAS_MAX: usize = 1024;
/// Where the rows are only written now and then, they are this old at the most, in milliseconds.
pub const HEARTBEAT_INTERVAL_MS: u64 = 500;
/// A replica whose proof is younger than this is fresh, in milliseconds.
const FRESH_MS: u64 = 1_000;
/// The incarnation, address and version of a replica.
const TEXT_BYTES_MAX: usize = 256;

/// How a replica makes itself known, before it is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Random, new with each start: a restarted process is never taken for its paused predecessor.
    pub incarnation: String,
    /// Its name and where it listens, for people.
    pub address: String,
    /// The program's version.
    pub version: String,
    /// By the replica's clock.
    pub started_unix_ms: i64,
}

/// What a replica says of itself with each poll.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Of its registration.
    pub incarnation: String,
    /// Number of the last revision it applied, 0 before the first: it is told what came after.
    pub applied_number: u64,
    /// Number up to which no decision made before can still be answered.
    pub acked_number: u64,
    /// What it is about.
    pub state: ReplicaState,
}

/// What a replica is about, in its own words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplicaState {
    /// It has not decided yet.
    #[default]
    Starting,
    /// It decides.
    Serving,
    /// It decides by the old snapshot while it reads the full state again.
    Resync,
    /// It answers what it has begun, and ends.
    Draining,
    /// It denies everything.
    Quarantined,
}

impl ReplicaState {
    /// The name, as stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Resync => "resync",
            Self::Draining => "draining",
            Self::Quarantined => "quarantined",
        }
    }

    /// Reads a name.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for any other text.
    pub fn parse(name: &str) -> Result<Self, Error> {
        [Self::Starting, Self::Serving, Self::Resync, Self::Draining, Self::Quarantined]
            .into_iter()
            .find(|state| state.as_str() == name)
            .ok_or_else(|| Error::Corrupt(format!("the state `{name}` of a replica is none")))
    }
}

/// A replica as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// How it made itself known.
    pub registration: Registration,
    /// Number of the last revision that it said it applied.
    pub applied_number: u64,
    /// Number up to which it acknowledged.
    pub acked_number: u64,
    /// When that number last rose, by the store's clock.
    pub acked_unix_ms: i64,
    /// When the revision of that number was committed, by the store's clock; `None` where the log does not tell.
    pub acked_commit_unix_ms: Option<i64>,
    /// What it said it is about.
    pub state: ReplicaState,
    /// When it was last heard, by the store's clock.
    pub seen_unix_ms: i64,
}

impl Replica {
    /// Since it was last heard, when the store's clock reads `unix_ms`.
    pub fn age_ms(&self, unix_ms: i64) -> u64 {
        u64::try_from(unix_ms.saturating_sub(self.seen_unix_ms)).unwrap_or(0)
    }

    /// The state it is in when the store's clock reads `unix_ms`, by what it said last and how long ago.
    pub fn condition(&self, unix_ms: i64, freshness_bound_ms: u64) -> Condition {
        let age_ms = self.age_ms(unix_ms);
        match self.state {
            ReplicaState::Quarantined => Condition::Quarantined,
            _ if age_ms >= freshness_bound_ms => Condition::Closed,
            ReplicaState::Starting => Condition::Bootstrapping,
            ReplicaState::Resync => Condition::Resync,
            ReplicaState::Serving | ReplicaState::Draining if age_ms >= FRESH_MS => Condition::Stale,
            ReplicaState::Serving | ReplicaState::Draining => Condition::Fresh,
        }
    }

    /// As it is shown when the store's clock reads `unix_ms`.
    pub fn listed(&self, unix_ms: i64, freshness_bound_ms: u64) -> Listed {
        let kill_ms = self.acked_commit_unix_ms.map(|committed| self.acked_unix_ms.saturating_sub(committed).max(0));
        Listed {
            id: self.registration.incarnation.clone(),
            address: self.registration.address.clone(),
            version: self.registration.version.clone(),
            started_unix_ms: self.registration.started_unix_ms,
            condition: self.condition(unix_ms, freshness_bound_ms),
            draining: self.state == ReplicaState::Draining,
            applied_number: self.applied_number,
            acked_number: self.acked_number,
            age_ms: self.age_ms(unix_ms),
            kill_ms: kill_ms.and_then(|ms| u64::try_from(ms).ok()),
        }
    }
}

/// The replicas that were heard within [`SILENCE_MS_MAX`], by incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// The store's clock now.
    pub unix_ms: i64,
    /// History and newest number.
    pub revision: Revision,
    /// A replica without proof of freshness for this long only denies.
    pub freshness_bound_ms: u64,
    /// At most [`REPLICAS_MAX`].
    pub rows: Vec<Replica>,
}

impl Replicas {
    /// None of a history, yet.
    pub(super) fn none(history: HistoryId, number: u64, freshness_bound_ms: u64, unix_ms: i64) -> Self {
        Self { unix_ms, revision: Revision { history, number }, freshness_bound_ms, rows: Vec::new() }
    }

    /// As they are shown.
    pub fn fleet(&self) -> Fleet {
        Fleet {
            revision: self.revision.clone(),
            freshness_bound_ms: self.freshness_bound_ms,
            replicas: self.rows.iter().map(|row| row.listed(self.unix_ms, self.freshness_bound_ms)).collect(),
        }
    }
}

/// Checks what can be said of a registration without looking at the store.
///
/// # Errors
/// [`Error::Rejected`], naming what is empty, too long or holds a NUL.
pub fn check_registration(registration: &Registration) -> Result<(), Error> {
    let Registration { incarnation, address, version, started_unix_ms: _ } = registration;
    filled("a replica's incarnation", incarnation)?;
    for (what, text) in [("incarnation", incarnation), ("address", address), ("version", version)] {
        plain(&format!("a replica's {what}"), text)?;
        at_most(&format!("bytes in a replica's {what}"), text.len(), TEXT_BYTES_MAX)?;
    }
    Ok(())
}

/// The answer to one registration too many.
pub(super) fn full() -> Error {
    Error::Rejected(format!("{REPLICAS_MAX} replicas are registered, and that is the limit: stop some and wait a minute"))
}

/// The answer to a replica that is not registered, or not any more.
pub(super) fn unregistered(incarnation: &str) -> Error {
    Error::Unregistered { incarnation: incarnation.to_owned() }
}
