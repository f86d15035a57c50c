//! Acts that wait for a second operator in a PostgreSQL store: one row per act, under the lock on the head.
//! [`crate::store::two_person`] holds the rules.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;

use super::connection::{PostgresConnection, QueryError};
use super::read;
use crate::model::rows::PendingTwoPersonRow;

/// Reads the named acts that wait.
pub(super) async fn read_pending_acts(
    connection: &PostgresConnection,
    acts: &[String],
) -> Result<BTreeMap<String, PendingTwoPersonRow>, QueryError> {
    if acts.is_empty() {
        return Ok(BTreeMap::new());
    }
    let sql = "SELECT act, operator, key, expires_unix_ms FROM portcullis.pending_acts WHERE act = ANY ($1)";
    let found = connection.query_rows(sql, &[(&acts, Type::TEXT_ARRAY)]).await?;
    let row = |row: &tokio_postgres::Row| {
        let pending =
            PendingTwoPersonRow { operator: row.try_get(1)?, key: row.try_get(2)?, expires_at_unix_ms: row.try_get(3)? };
        Ok((read::read_text(row, 0)?.to_owned(), pending))
    };
    found.iter().map(row).collect()
}

/// Writes or deletes the row of an act. Expired rows are deleted too, so that they do not accumulate.
pub(super) async fn put_pending_act(
    connection: &PostgresConnection,
    act: &str,
    row: Option<&PendingTwoPersonRow>,
    unix_ms: i64,
) -> Result<(), QueryError> {
    connection
        .execute(
            "DELETE FROM portcullis.pending_acts WHERE act = $1 OR expires_unix_ms <= $2",
            &[(&act, Type::TEXT), (&unix_ms, Type::INT8)],
        )
        .await?;
    let Some(row) = row else { return Ok(()) };
    connection
        .execute(
            "INSERT INTO portcullis.pending_acts (act, operator, key, expires_unix_ms) VALUES ($1, $2, $3, $4)",
            &[(&act, Type::TEXT), (&row.operator, Type::TEXT), (&row.key, Type::TEXT), (&row.expires_at_unix_ms, Type::INT8)],
        )
        .await?;
    Ok(())
}
