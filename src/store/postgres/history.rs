//! The history of policy in a PostgreSQL store: the revisions that changed documents, and the documents at an earlier revision.
//!
//! Both read only the rows of the change log that change documents, through an index of those rows. Look next at
//! `store/document_history.rs`.

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::{PostgresConnection, QueryError};
use super::read::{self, ExpectedStore, corrupt_error, parse_commit_row, read_head, to_i64};
use crate::model::rows::ActRow;
use crate::store::document_history::{DocumentHistory, earlier_revision, verify_commit};
use crate::store::write_rules::{CHANGES_BYTES_MAX, HISTORY_LISTED_MAX};
use crate::store::{CommitRow, DocumentList, PolicyCommit};

/// Lists the newest revisions that changed documents.
pub(super) async fn list_policy_commits(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    limit: usize,
) -> Result<Vec<PolicyCommit>, QueryError> {
    read_head(connection, expected, false).await?;
    let sql = "SELECT number, previous_hash, hash, digest, unix_ms, changes, act FROM (
            SELECT *, octet_length(changes) AS bytes, sum(octet_length(changes)) OVER (ORDER BY number DESC) AS upto
            FROM (SELECT log.*, acts.act FROM portcullis.log LEFT JOIN portcullis.acts USING (number) WHERE of_documents
                  ORDER BY number DESC LIMIT $1) newest
        ) sized WHERE upto <= $2 OR upto = bytes ORDER BY number DESC";
    let (limit, bytes) = (to_i64(limit.min(HISTORY_LISTED_MAX))?, to_i64(CHANGES_BYTES_MAX)?);
    read::stream_rows(connection, sql, &[(&limit, Type::INT8), (&bytes, Type::INT8)], parse_policy_commit).await
}

/// Rebuilds the documents of an earlier revision.
pub(super) async fn documents_at(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    number: u64,
) -> Result<DocumentList, QueryError> {
    let head = read_head(connection, expected, false).await?;
    let revision = earlier_revision(head.revision, head.floor, number)?;
    let sql = "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM portcullis.log
         WHERE of_documents AND number <= $1 ORDER BY number";
    let commits =
        read::stream_rows(connection, sql, &[(&to_i64(number)?, Type::INT8)], |row| Ok(verify_commit(parse_commit_row(row)?.0)?))
            .await?;
    let mut replay = DocumentHistory::default();
    commits.into_iter().for_each(|commit| replay.apply_commit(commit));
    Ok(replay.into_documents(revision))
}

fn parse_policy_commit(row: &Row) -> Result<PolicyCommit, QueryError> {
    let CommitRow { number, unix_ms, changes, .. } = verify_commit(parse_commit_row(row)?.0)?;
    let parse = |text: String| -> Result<ActRow, QueryError> {
        serde_json::from_str(&text)
            .map_err(|error| corrupt_error(format!("the act of revision {number} cannot be understood: {error}")))
    };
    let act = row.try_get::<_, Option<String>>(6)?.map(parse).transpose()?;
    Ok(PolicyCommit { number, unix_ms, act, changes })
}
