//! The rows of the replicas in a SQLite store, and the throttle of their heartbeats.
//!
//! A poll of one file proves freshness by reading. Heartbeats only inform operators and callers that wait for the fleet, so they
//! are few, and no replica waits for them. Look next at [`crate::store::fleet`].

use std::sync::{Mutex, PoisonError};

use rusqlite::{Connection, OptionalExtension};

use super::error::SqliteError;
use super::read::{self, read_u64, to_i64};
use crate::model::time::ClockReading;
use crate::store::fleet::{self, HEARTBEAT_INTERVAL_MS, REPLICAS_MAX, SILENCE_MS_MAX};
use crate::store::{ReplicaHeartbeat, ReplicaList, ReplicaRegistration, ReplicaRow, ReplicaState};

/// Remembers the newest heartbeat that was sent to be written.
#[derive(Default)]
pub(super) struct HeartbeatThrottle(Mutex<Option<(ReplicaHeartbeat, ClockReading)>>);

impl HeartbeatThrottle {
    /// Whether a heartbeat carries news, or the last one is old. If so, it counts as sent.
    pub(super) fn take_due(&self, heartbeat: &ReplicaHeartbeat, now: ClockReading) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = last.as_ref().is_some_and(|(before, sent_at)| {
            let reported = ReplicaHeartbeat { applied_number: before.applied_number, ..heartbeat.clone() };
            reported == *before && now.elapsed_ms_since(*sent_at) < HEARTBEAT_INTERVAL_MS
        });
        if !known {
            *last = Some((heartbeat.clone(), now));
        }
        !known
    }

    /// Makes the next heartbeat due.
    pub(super) fn reset(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Registers a replica, and deletes the rows of silent replicas.
pub(super) fn register_replica(
    connection: &Connection,
    registration: &ReplicaRegistration,
    now: ClockReading,
) -> Result<(), SqliteError> {
    let ReplicaRegistration { incarnation, address, version, started_unix_ms } = registration;
    let unix_ms = now.unix_ms();
    connection
        .prepare_cached("DELETE FROM replicas WHERE seen_unix_ms < ?1 AND incarnation <> ?2")?
        .execute((unix_ms.saturating_sub(SILENCE_MS_MAX), incarnation))?;
    let others: i64 = connection
        .prepare_cached("SELECT count(*) FROM replicas WHERE incarnation <> ?1")?
        .query_one([incarnation], |row| row.get(0))?;
    if others >= to_i64(REPLICAS_MAX)? {
        return Err(fleet::registration_limit_error().into());
    }
    connection
        .prepare_cached(
            "INSERT INTO replicas (incarnation, address, version, started_unix_ms, applied_number, acked_number, state, seen_unix_ms)
             VALUES (?1, ?2, ?3, ?4, 0, 0, ?5, ?6)
             ON CONFLICT (incarnation) DO UPDATE SET address = excluded.address, version = excluded.version,
             started_unix_ms = excluded.started_unix_ms, seen_unix_ms = excluded.seen_unix_ms",
        )?
        .execute((incarnation, address, version, started_unix_ms, ReplicaState::default().as_str(), unix_ms))?;
    Ok(())
}

/// Writes a heartbeat.
pub(super) fn write_heartbeat(
    connection: &Connection,
    heartbeat: &ReplicaHeartbeat,
    now: ClockReading,
) -> Result<(), SqliteError> {
    let ReplicaHeartbeat { incarnation, applied_number, acked_number, state } = heartbeat;
    connection
        .prepare_cached(
            "UPDATE replicas SET applied_number = ?2, acked_number = ?3, state = ?4, seen_unix_ms = ?5,
             acked_unix_ms = iif(?3 > acked_number, ?5, acked_unix_ms) WHERE incarnation = ?1",
        )?
        .execute((incarnation, to_i64(*applied_number)?, to_i64(*acked_number)?, state.as_str(), now.unix_ms()))?;
    Ok(())
}

/// Fails if a replica is not registered, or no longer registered.
pub(super) fn check_registered(connection: &Connection, incarnation: &str) -> Result<(), SqliteError> {
    let row = connection
        .prepare_cached("SELECT 1 FROM replicas WHERE incarnation = ?1")?
        .query_one([incarnation], |row| row.get::<_, i64>(0))
        .optional()?;
    row.map(drop).ok_or_else(|| fleet::unregistered_error(incarnation).into())
}

/// Lists the replicas that were heard recently.
pub(super) fn list_replicas(connection: &Connection, now: ClockReading) -> Result<ReplicaList, SqliteError> {
    let unix_ms = now.unix_ms();
    let head = read::read_head(connection)?;
    let (revision, bound_ms) = (head.revision, head.settings.freshness_bound_ms);
    let mut replicas = ReplicaList::empty(revision.history, revision.number, bound_ms, unix_ms);
    let mut statement = connection.prepare_cached(
        "SELECT incarnation, address, version, started_unix_ms, applied_number, acked_number, state, seen_unix_ms, acked_unix_ms,
             log.unix_ms
         FROM replicas LEFT JOIN log ON log.number = acked_number WHERE seen_unix_ms >= ?1 ORDER BY incarnation LIMIT ?2",
    )?;
    let mut found = statement.query((unix_ms.saturating_sub(SILENCE_MS_MAX), to_i64(REPLICAS_MAX)?))?;
    while let Some(row) = found.next()? {
        let registration = ReplicaRegistration {
            incarnation: row.get(0)?,
            address: row.get(1)?,
            version: row.get(2)?,
            started_unix_ms: row.get(3)?,
        };
        replicas.rows.push(ReplicaRow {
            registration,
            applied_number: read_u64(row, 4)?,
            acked_number: read_u64(row, 5)?,
            state: ReplicaState::parse(row.get_ref(6)?.as_str().map_err(rusqlite::Error::from)?)?,
            seen_unix_ms: row.get(7)?,
            acked_unix_ms: row.get(8)?,
            acked_commit_unix_ms: row.get(9)?,
        });
    }
    Ok(replicas)
}
