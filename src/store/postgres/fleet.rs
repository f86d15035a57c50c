//! The rows of the replicas in a PostgreSQL store. The write of a heartbeat is what proves freshness.
//!
//! Look next at [`crate::store::fleet`].

use tokio_postgres::types::Type;

use super::connection::{PostgresConnection, QueryError};
use super::read::{read_text, read_u64, to_i64};
use crate::model::revision::HistoryId;
use crate::store::fleet::{self, REPLICAS_MAX, SILENCE_MS_MAX};
use crate::store::{Error, ReplicaHeartbeat, ReplicaList, ReplicaRegistration, ReplicaRow, ReplicaState};

/// The server's clock, or the time that a test passes in parameter `$1`.
const NOW_SQL: &str = "coalesce($1::int8, (extract(epoch FROM clock_timestamp()) * 1000)::int8)";

/// Registers a replica, and deletes the rows of silent replicas.
pub(super) async fn register_replica(
    connection: &PostgresConnection,
    registration: &ReplicaRegistration,
    unix_ms: Option<i64>,
) -> Result<(), QueryError> {
    let ReplicaRegistration { incarnation, address, version, started_unix_ms } = registration;
    // A replica that is writing its row at the moment is not silent, so a locked row is skipped.
    let forget = format!(
        "DELETE FROM portcullis.replicas WHERE incarnation IN (
             SELECT incarnation FROM portcullis.replicas WHERE seen_unix_ms < {NOW_SQL} - $2 AND incarnation <> $3 FOR UPDATE SKIP LOCKED)"
    );
    let (silence, max) = (SILENCE_MS_MAX, to_i64(REPLICAS_MAX)?);
    connection.execute(&forget, &[(&unix_ms, Type::INT8), (&silence, Type::INT8), (incarnation, Type::TEXT)]).await?;
    let add = format!(
        "INSERT INTO portcullis.replicas
             (incarnation, address, version, started_unix_ms, applied_number, acked_number, state, seen_unix_ms)
         SELECT $2, $3, $4, $5, 0, 0, $6, {NOW_SQL} WHERE (SELECT count(*) FROM portcullis.replicas WHERE incarnation <> $2) < $7
         ON CONFLICT (incarnation) DO UPDATE SET address = excluded.address, version = excluded.version,
         started_unix_ms = excluded.started_unix_ms, seen_unix_ms = excluded.seen_unix_ms"
    );
    let added = connection
        .execute(
            &add,
            &[
                (&unix_ms, Type::INT8),
                (incarnation, Type::TEXT),
                (address, Type::TEXT),
                (version, Type::TEXT),
                (started_unix_ms, Type::INT8),
                (&ReplicaState::default().as_str(), Type::TEXT),
                (&max, Type::INT8),
            ],
        )
        .await?;
    if added == 1 { Ok(()) } else { Err(fleet::registration_limit_error().into()) }
}

/// Writes a heartbeat. Without this write, no transaction of a follower proves anything.
pub(super) async fn write_heartbeat(
    connection: &PostgresConnection,
    heartbeat: &ReplicaHeartbeat,
    unix_ms: Option<i64>,
) -> Result<(), QueryError> {
    let ReplicaHeartbeat { incarnation, applied_number, acked_number, state } = heartbeat;
    let sql = format!(
        "UPDATE portcullis.replicas SET applied_number = $3, acked_number = $4, state = $5, seen_unix_ms = {NOW_SQL},
             acked_unix_ms = CASE WHEN $4 > acked_number THEN {NOW_SQL} ELSE acked_unix_ms END
         WHERE incarnation = $2"
    );
    let (applied, acked) = (to_i64(*applied_number)?, to_i64(*acked_number)?);
    let heard = connection
        .execute(
            &sql,
            &[
                (&unix_ms, Type::INT8),
                (incarnation, Type::TEXT),
                (&applied, Type::INT8),
                (&acked, Type::INT8),
                (&state.as_str(), Type::TEXT),
            ],
        )
        .await?;
    if heard == 1 { Ok(()) } else { Err(fleet::unregistered_error(incarnation).into()) }
}

/// Lists the replicas that were heard recently.
pub(super) async fn list_replicas(connection: &PostgresConnection, unix_ms: Option<i64>) -> Result<ReplicaList, QueryError> {
    let sql = format!(
        "WITH now AS MATERIALIZED (SELECT {NOW_SQL} AS unix_ms)
         SELECT now.unix_ms, incarnation, address, version, started_unix_ms, applied_number, acked_number, state, seen_unix_ms,
             acked_unix_ms, log.unix_ms, m.history, h.number, m.freshness_bound_ms
         FROM now CROSS JOIN portcullis.meta m JOIN portcullis.head h USING (id)
             LEFT JOIN portcullis.replicas ON seen_unix_ms >= now.unix_ms - $2
             LEFT JOIN portcullis.log ON log.number = acked_number
         ORDER BY incarnation LIMIT $3"
    );
    let (silence, max) = (SILENCE_MS_MAX, to_i64(REPLICAS_MAX)?);
    let found = connection.query_rows(&sql, &[(&unix_ms, Type::INT8), (&silence, Type::INT8), (&max, Type::INT8)]).await?;
    let first = found.first().ok_or_else(|| Error::Corrupt("the store has no head".to_owned()))?;
    let history = HistoryId::new(read_text(first, 11)?);
    let mut replicas = ReplicaList::empty(history, read_u64(first, 12)?, read_u64(first, 13)?, first.try_get(0)?);
    for row in &found {
        let Some(incarnation) = row.try_get::<_, Option<String>>(1)? else { continue };
        let registration = ReplicaRegistration {
            incarnation,
            address: row.try_get(2)?,
            version: row.try_get(3)?,
            started_unix_ms: row.try_get(4)?,
        };
        replicas.rows.push(ReplicaRow {
            registration,
            applied_number: read_u64(row, 5)?,
            acked_number: read_u64(row, 6)?,
            state: ReplicaState::parse(read_text(row, 7)?)?,
            seen_unix_ms: row.try_get(8)?,
            acked_unix_ms: row.try_get(9)?,
            acked_commit_unix_ms: row.try_get(10)?,
        });
    }
    Ok(replicas)
}
