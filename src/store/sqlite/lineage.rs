//! Adoptions and merges in a SQLite store: the rows from which [`crate::store::lineage`] derives where its history comes from.

use rusqlite::Connection;

use super::error::SqliteError;
use super::read::{self, SqliteHead, read_u64, to_i64};
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{RevocationMerge, RowChange};
use crate::model::time::ClockReading;
use crate::store::lineage::{ADOPTIONS_LISTED_MAX, ReplicaMerge, StoreAdoption, StoreLineage};

/// Reads the newest revision and the adoptions, whatever the history.
pub(super) fn read_lineage(connection: &Connection, at: u64) -> Result<StoreLineage, SqliteError> {
    let mut statement = connection.prepare_cached(
        "SELECT number, history, from_history, from_hash, unix_ms FROM adoptions ORDER BY number DESC LIMIT ?1",
    )?;
    let adoption = |row: &rusqlite::Row<'_>| {
        let from = Revision { history: HistoryId::new(row.get::<_, String>(2)?), number: read_u64(row, 0)?.saturating_sub(1) };
        let history = HistoryId::new(row.get::<_, String>(1)?);
        Ok(StoreAdoption { history, from, from_hash: row.get(3)?, unix_ms: row.get(4)? })
    };
    let mut adoptions = statement
        .query_map([to_i64(ADOPTIONS_LISTED_MAX)?], adoption)?
        .collect::<Result<Vec<StoreAdoption>, rusqlite::Error>>()?;
    adoptions.reverse();
    let revision = read::read_revision(connection)?;
    // The log of a store holds no revision beyond its newest.
    let hash_at = if at <= revision.number { read::read_log_hash(connection, at)? } else { None };
    Ok(StoreLineage { revision, hash_at, adoptions })
}

/// Lists how many rows each replica merged into the present history.
pub(super) fn list_merges(connection: &Connection) -> Result<Vec<ReplicaMerge>, SqliteError> {
    let mut statement = connection.prepare_cached(
        "SELECT incarnation, address, rows, merges.unix_ms FROM merges JOIN meta USING (history) ORDER BY incarnation",
    )?;
    let merged = |row: &rusqlite::Row<'_>| {
        Ok(ReplicaMerge { incarnation: row.get(0)?, address: row.get(1)?, rows: read_u64(row, 2)?, unix_ms: row.get(3)? })
    };
    Ok(statement.query_map((), merged)?.collect::<Result<_, rusqlite::Error>>()?)
}

/// Begins a new history with a revision. Rows that belong only to the old history are deleted, and every replica must show again
/// that it follows the new history.
pub(super) fn begin_history(
    connection: &Connection,
    before: &SqliteHead,
    number: u64,
    now: ClockReading,
) -> Result<Revision, SqliteError> {
    let history = uuid::Uuid::now_v7().to_string();
    connection
        .prepare_cached("INSERT INTO adoptions (number, history, from_history, from_hash, unix_ms) VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute((to_i64(number)?, &history, before.revision.history.as_str(), before.hash, now.unix_ms()))?;
    connection.execute("UPDATE meta SET history = ?1", [&history])?;
    // INVARIANT: an approval that was used after the backup looks unused in the restored store, so all approvals are deleted.
    connection.execute("DELETE FROM approvals", ())?;
    connection.execute("DELETE FROM pending_acts", ())?;
    connection.execute("UPDATE replicas SET applied_number = 0, acked_number = 0, acked_unix_ms = 0, state = 'starting'", ())?;
    Ok(Revision { history: HistoryId::new(history), number })
}

/// Counts the rows that a replica merged.
pub(super) fn record_merge(
    connection: &Connection,
    merge: &RevocationMerge,
    changes: &[RowChange],
    now: ClockReading,
) -> Result<(), SqliteError> {
    connection
        .prepare_cached(
            "INSERT INTO merges (history, incarnation, address, rows, unix_ms) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (history, incarnation) DO UPDATE SET rows = rows + excluded.rows, unix_ms = excluded.unix_ms",
        )?
        .execute((merge.history.as_str(), &merge.incarnation, &merge.address, to_i64(changes.len())?, now.unix_ms()))?;
    Ok(())
}
