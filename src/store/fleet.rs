//! The replicas that follow a store: one row per replica, which the replica keeps alive by its polls.
//!
//! The content of a row is the replica's own report. Only the time at which the replica was last heard is the store's. Nothing in
//! this file takes a decision: `sync` writes heartbeats, and a caller that waits for the fleet reads the rows. Look next at
//! [`super::Store::poll_changes`].

use super::Error;
use super::request_checks::{check_at_most, check_no_nul, check_not_empty};
use crate::model::replica::{FleetStatus, ReplicaCondition, ReplicaSummary};
use crate::model::revision::{HistoryId, Revision};

/// The longest freshness bound that a store can have, in milliseconds. A replica that was silent for this long only denies.
pub const SILENCE_MS_MAX: i64 = 60_000;
/// Replicas that may be registered at one time.
pub const REPLICAS_MAX: usize = 1024;
/// Maximum age of a row in a store that writes heartbeats only now and then, in milliseconds.
pub const HEARTBEAT_INTERVAL_MS: u64 = 500;
/// A replica whose proof is younger than this is fresh, in milliseconds.
const FRESH_MS: u64 = 1_000;
/// Limit of the incarnation, address and version of a replica.
const TEXT_BYTES_MAX: usize = 256;

/// The registration of a replica, made before the replica is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaRegistration {
    /// Random, new with each start, so that a restarted process is never mistaken for its paused predecessor.
    pub incarnation: String,
    /// Its name and listening address, for people.
    pub address: String,
    /// Version of its program.
    pub version: String,
    /// Time of its start, by the replica's clock.
    pub started_unix_ms: i64,
}

/// The report that a replica sends with each poll.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaHeartbeat {
    /// The incarnation of its registration.
    pub incarnation: String,
    /// Number of the last revision that it applied, 0 before the first. The poll returns the commits after it.
    pub applied_number: u64,
    /// The acknowledged number: no decision made before this revision can still be answered.
    pub acked_number: u64,
    /// The state that it reports.
    pub state: ReplicaState,
}

/// The state of a replica, as it reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplicaState {
    /// It has not decided yet.
    #[default]
    Starting,
    /// It answers decisions.
    Serving,
    /// It decides by the old snapshot while it reads the full state again.
    Resync,
    /// It finishes the calls that it has begun, and stops.
    Draining,
    /// It denies everything.
    Quarantined,
}

impl ReplicaState {
    /// The name of the state, as it is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Resync => "resync",
            Self::Draining => "draining",
            Self::Quarantined => "quarantined",
        }
    }

    /// Parses a name.
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
pub struct ReplicaRow {
    /// Its registration.
    pub registration: ReplicaRegistration,
    /// Number of the last revision that it reported as applied.
    pub applied_number: u64,
    /// Number of the last revision that it acknowledged.
    pub acked_number: u64,
    /// When the acknowledged number last rose, by the store's clock.
    pub acked_unix_ms: i64,
    /// When the acknowledged revision was committed, by the store's clock; `None` if the log no longer holds it.
    pub acked_commit_unix_ms: Option<i64>,
    /// The state that it reported.
    pub state: ReplicaState,
    /// When it was last heard, by the store's clock.
    pub seen_unix_ms: i64,
}

impl ReplicaRow {
    /// Time since it was last heard, if the store's clock reads `unix_ms`.
    pub fn age_ms(&self, unix_ms: i64) -> u64 {
        u64::try_from(unix_ms.saturating_sub(self.seen_unix_ms)).unwrap_or(0)
    }

    /// The condition of the replica if the store's clock reads `unix_ms`, derived from its last report and the age of that
    /// report.
    pub fn condition(&self, unix_ms: i64, freshness_bound_ms: u64) -> ReplicaCondition {
        let age_ms = self.age_ms(unix_ms);
        match self.state {
            ReplicaState::Quarantined => ReplicaCondition::Quarantined,
            _ if age_ms >= freshness_bound_ms => ReplicaCondition::Closed,
            ReplicaState::Starting => ReplicaCondition::Bootstrapping,
            ReplicaState::Resync => ReplicaCondition::Resync,
            ReplicaState::Serving | ReplicaState::Draining if age_ms >= FRESH_MS => ReplicaCondition::Stale,
            ReplicaState::Serving | ReplicaState::Draining => ReplicaCondition::Fresh,
        }
    }

    /// The replica as it is shown to operators if the store's clock reads `unix_ms`.
    pub fn to_summary(&self, unix_ms: i64, freshness_bound_ms: u64) -> ReplicaSummary {
        let kill_ms = self.acked_commit_unix_ms.map(|committed| self.acked_unix_ms.saturating_sub(committed).max(0));
        ReplicaSummary {
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

/// The replicas that were heard within [`SILENCE_MS_MAX`], ordered by incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaList {
    /// The store's clock at the time of reading.
    pub unix_ms: i64,
    /// The history and the newest number.
    pub revision: Revision,
    /// A replica without proof of freshness for this long only denies.
    pub freshness_bound_ms: u64,
    /// At most [`REPLICAS_MAX`].
    pub rows: Vec<ReplicaRow>,
}

impl ReplicaList {
    /// An empty list of a history.
    pub(super) fn empty(history: HistoryId, number: u64, freshness_bound_ms: u64, unix_ms: i64) -> Self {
        Self { unix_ms, revision: Revision { history, number }, freshness_bound_ms, rows: Vec::new() }
    }

    /// The replicas as they are shown to operators.
    pub fn to_fleet(&self) -> FleetStatus {
        FleetStatus {
            revision: self.revision.clone(),
            freshness_bound_ms: self.freshness_bound_ms,
            replicas: self.rows.iter().map(|row| row.to_summary(self.unix_ms, self.freshness_bound_ms)).collect(),
        }
    }
}

/// Checks a registration without reading the store.
///
/// # Errors
/// [`Error::Rejected`], naming the text that is empty, too long or contains a NUL character.
pub fn check_registration(registration: &ReplicaRegistration) -> Result<(), Error> {
    let ReplicaRegistration { incarnation, address, version, started_unix_ms: _ } = registration;
    check_not_empty("a replica's incarnation", incarnation)?;
    for (what, text) in [("incarnation", incarnation), ("address", address), ("version", version)] {
        check_no_nul(&format!("a replica's {what}"), text)?;
        check_at_most(&format!("bytes in a replica's {what}"), text.len(), TEXT_BYTES_MAX)?;
    }
    Ok(())
}

/// The error for a registration beyond the limit.
pub(super) fn registration_limit_error() -> Error {
    Error::Rejected(format!("{REPLICAS_MAX} replicas are registered, and that is the limit: stop some and wait a minute"))
}

/// The error for a replica that is not registered, or no longer registered.
pub(super) fn unregistered_error(incarnation: &str) -> Error {
    Error::Unregistered { incarnation: incarnation.to_owned() }
}
