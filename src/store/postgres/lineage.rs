//! Adoptions and merges in a PostgreSQL store, written under the lock on the head. [`crate::store::lineage`] holds the rules.

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::{PostgresConnection, QueryError};
use super::read::{self, ExpectedStore, PostgresHead, read_text, read_u64, to_i64};
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{RevocationMerge, RowChange};
use crate::store::lineage::{ADOPTIONS_LISTED_MAX, ReplicaMerge, StoreAdoption, StoreLineage};

/// Reads the newest revision and the adoptions, whatever the history.
pub(super) async fn read_lineage(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    at: u64,
) -> Result<StoreLineage, QueryError> {
    let whichever = ExpectedStore { history: None, ..expected.clone() };
    let revision = read::read_head(connection, &whichever, false).await?.revision;
    let hash_at = if at <= revision.number { read::read_log_hash(connection, at).await? } else { None };
    let sql = "SELECT number, history, from_history, from_hash, unix_ms FROM portcullis.adoptions ORDER BY number DESC LIMIT $1";
    let found = connection.query_rows(sql, &[(&to_i64(ADOPTIONS_LISTED_MAX)?, Type::INT8)]).await?;
    let adoptions = found.iter().rev().map(parse_adoption).collect::<Result<_, QueryError>>()?;
    Ok(StoreLineage { revision, hash_at, adoptions })
}

fn parse_adoption(row: &Row) -> Result<StoreAdoption, QueryError> {
    let from = Revision { history: HistoryId::new(read_text(row, 2)?), number: read_u64(row, 0)?.saturating_sub(1) };
    Ok(StoreAdoption {
        history: HistoryId::new(read_text(row, 1)?),
        from,
        from_hash: read::read_hash(row, 3)?,
        unix_ms: row.try_get(4)?,
    })
}

/// Lists how many rows each replica merged into the present history.
pub(super) async fn list_merges(connection: &PostgresConnection) -> Result<Vec<ReplicaMerge>, QueryError> {
    let sql = "SELECT incarnation, address, rows, m.unix_ms FROM portcullis.merges m JOIN portcullis.meta USING (history)
        ORDER BY incarnation";
    let found = connection.query_rows(sql, &[]).await?;
    let merged = |row: &Row| {
        Ok(ReplicaMerge {
            incarnation: row.try_get(0)?,
            address: row.try_get(1)?,
            rows: read_u64(row, 2)?,
            unix_ms: row.try_get(3)?,
        })
    };
    found.iter().map(merged).collect()
}

/// Begins a new history with a revision. Rows that belong only to the old history are deleted, and every replica must show again
/// that it follows the new history.
pub(super) async fn begin_history(
    connection: &PostgresConnection,
    head: &PostgresHead,
    number: u64,
    unix_ms: i64,
) -> Result<Revision, QueryError> {
    let history = uuid::Uuid::now_v7().to_string();
    connection
        .execute(
            "INSERT INTO portcullis.adoptions (number, history, from_history, from_hash, unix_ms) VALUES ($1, $2, $3, $4, $5)",
            &[
                (&to_i64(number)?, Type::INT8),
                (&history, Type::TEXT),
                (&head.revision.history.as_str(), Type::TEXT),
                (&head.hash.as_slice(), Type::BYTEA),
                (&unix_ms, Type::INT8),
            ],
        )
        .await?;
    connection.execute("UPDATE portcullis.meta SET history = $1", &[(&history, Type::TEXT)]).await?;
    // INVARIANT: an approval that was used after the backup looks unused in the restored store, so all approvals are deleted.
    connection.execute("DELETE FROM portcullis.approvals", &[]).await?;
    connection.execute("DELETE FROM portcullis.pending_acts", &[]).await?;
    let unheard = "UPDATE portcullis.replicas SET applied_number = 0, acked_number = 0, acked_unix_ms = 0, state = 'starting'";
    connection.execute(unheard, &[]).await?;
    Ok(Revision { history: HistoryId::new(history), number })
}

/// Counts the rows that a replica merged.
pub(super) async fn record_merge(
    connection: &PostgresConnection,
    merge: &RevocationMerge,
    changes: &[RowChange],
    unix_ms: i64,
) -> Result<(), QueryError> {
    connection
        .execute(
            "INSERT INTO portcullis.merges AS m (history, incarnation, address, rows, unix_ms) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (history, incarnation) DO UPDATE SET rows = m.rows + excluded.rows, unix_ms = excluded.unix_ms",
            &[
                (&merge.history.as_str(), Type::TEXT),
                (&merge.incarnation, Type::TEXT),
                (&merge.address, Type::TEXT),
                (&to_i64(changes.len())?, Type::INT8),
                (&unix_ms, Type::INT8),
            ],
        )
        .await?;
    Ok(())
}
