//! What waits for a second operator in a PostgreSQL store: one row an act, under the lock on the head. What it means is said by
//! [`crate::store::second`].

use tokio_postgres::types::Type;

use super::link::{Fault, Link};
use crate::model::records::PendingRow;

pub(super) async fn row(link: &Link, act: &str) -> Result<Option<PendingRow>, Fault> {
    let sql = "SELECT operator, expires_unix_ms FROM portcullis.pending_acts WHERE act = $1";
    let Some(row) = link.row(sql, &[(&act, Type::TEXT)]).await? else { return Ok(None) };
    Ok(Some(PendingRow { operator: row.try_get(0)?, expires_at_unix_ms: row.try_get(1)? }))
}

/// Puts a row in place of what waits, or takes that away.
pub(super) async fn put(link: &Link, act: &str, row: Option<&PendingRow>) -> Result<(), Fault> {
    let Some(row) = row else {
        link.execute("DELETE FROM portcullis.pending_acts WHERE act = $1", &[(&act, Type::TEXT)]).await?;
        return Ok(());
    };
    link.execute(
        "INSERT INTO portcullis.pending_acts (act, operator, expires_unix_ms) VALUES ($1, $2, $3)
         ON CONFLICT (act) DO UPDATE SET operator = excluded.operator, expires_unix_ms = excluded.expires_unix_ms",
        &[(&act, Type::TEXT), (&row.operator, Type::TEXT), (&row.expires_at_unix_ms, Type::INT8)],
    )
    .await?;
    Ok(())
}
