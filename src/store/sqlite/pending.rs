//! What waits for a second operator in a SQLite store: one row an act. What it means is said by [`crate::store::second`].

use rusqlite::{Connection, OptionalExtension};

use super::open::Fault;
use crate::model::records::PendingRow;

pub(super) fn row(connection: &Connection, act: &str) -> Result<Option<PendingRow>, Fault> {
    let mut statement = connection.prepare_cached("SELECT operator, expires_unix_ms FROM pending_acts WHERE act = ?1")?;
    let row = |row: &rusqlite::Row<'_>| Ok(PendingRow { operator: row.get(0)?, expires_at_unix_ms: row.get(1)? });
    Ok(statement.query_one([act], row).optional()?)
}

pub(super) fn put(connection: &Connection, act: &str, row: &PendingRow) -> Result<(), Fault> {
    connection
        .prepare_cached(
            "INSERT INTO pending_acts (act, operator, expires_unix_ms) VALUES (?1, ?2, ?3)
             ON CONFLICT (act) DO UPDATE SET operator = excluded.operator, expires_unix_ms = excluded.expires_unix_ms",
        )?
        .execute((act, &row.operator, row.expires_at_unix_ms))?;
    Ok(())
}

pub(super) fn remove(connection: &Connection, act: &str) -> Result<(), Fault> {
    connection.prepare_cached("DELETE FROM pending_acts WHERE act = ?1")?.execute([act])?;
    Ok(())
}
