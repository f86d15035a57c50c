//! Acts that wait for a second operator in a SQLite store: one row per act. [`crate::store::two_person`] holds the rules.

use rusqlite::{Connection, OptionalExtension};

use super::error::SqliteError;
use crate::model::rows::PendingTwoPersonRow;

/// Reads the row of an act that waits.
pub(super) fn read_pending_act(connection: &Connection, act: &str) -> Result<Option<PendingTwoPersonRow>, SqliteError> {
    let mut statement = connection.prepare_cached("SELECT operator, key, expires_unix_ms FROM pending_acts WHERE act = ?1")?;
    let row = |row: &rusqlite::Row<'_>| {
        Ok(PendingTwoPersonRow { operator: row.get(0)?, key: row.get(1)?, expires_at_unix_ms: row.get(2)? })
    };
    Ok(statement.query_one([act], row).optional()?)
}

/// Writes a row, and deletes expired rows, so that they do not accumulate.
pub(super) fn put_pending_act(
    connection: &Connection,
    act: &str,
    row: &PendingTwoPersonRow,
    unix_ms: i64,
) -> Result<(), SqliteError> {
    connection.prepare_cached("DELETE FROM pending_acts WHERE expires_unix_ms <= ?1")?.execute([unix_ms])?;
    connection
        .prepare_cached(
            "INSERT INTO pending_acts (act, operator, key, expires_unix_ms) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (act) DO UPDATE SET operator = excluded.operator, key = excluded.key,
             expires_unix_ms = excluded.expires_unix_ms",
        )?
        .execute((act, &row.operator, &row.key, row.expires_at_unix_ms))?;
    Ok(())
}

/// Deletes the row of an act.
pub(super) fn remove_pending_act(connection: &Connection, act: &str) -> Result<(), SqliteError> {
    connection.prepare_cached("DELETE FROM pending_acts WHERE act = ?1")?.execute([act])?;
    Ok(())
}
