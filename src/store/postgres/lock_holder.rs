//! Finds the session that blocks a commit: the holder of the lock for which others wait, as the server reports it.

use super::connection::{PostgresConnection, QueryError};
use super::read::read_text;

/// Returns the session that blocks the waiting commits and has the oldest transaction; `None` if no commit waits.
pub(super) async fn find_lock_holder(connection: &PostgresConnection) -> Result<Option<String>, QueryError> {
    let sql = "SELECT holder.pid::text, coalesce(holder.application_name, ''),
             coalesce(host(holder.client_addr), 'a socket of the server''s machine'), coalesce(holder.state, 'unknown'),
             coalesce(extract(epoch FROM clock_timestamp() - holder.xact_start)::int8, 0)::text
         FROM pg_stat_activity waiting CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocking (pid)
             JOIN pg_stat_activity holder ON holder.pid = blocking.pid
         WHERE waiting.datname = current_database() AND waiting.wait_event_type = 'Lock' AND waiting.query LIKE '%portcullis.head%'
         ORDER BY holder.xact_start LIMIT 1";
    let Some(row) = connection.query_row(sql, &[]).await? else { return Ok(None) };
    // A program chooses its own name, and this text goes to logs and terminals.
    let name: String = read_text(&row, 1)?.chars().filter(|character| !character.is_control()).take(64).collect();
    let (pid, address, state, age_s) = (read_text(&row, 0)?, read_text(&row, 2)?, read_text(&row, 3)?, read_text(&row, 4)?);
    Ok(Some(format!("process {pid} of the server, application `{name}` on {address}, {state} in a transaction of {age_s} s")))
}
