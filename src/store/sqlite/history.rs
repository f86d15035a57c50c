//! The history of policy in a SQLite store: the revisions that changed documents, and the documents at an earlier revision.
//!
//! Both read only the rows of the change log that change documents, through an index of those rows. Look next at
//! `store/document_history.rs`.

use rusqlite::{Connection, OptionalExtension};

use super::error::SqliteError;
use super::read::{corrupt_error, parse_commit_row, read_head, to_i64};
use crate::model::rows::ActRow;
use crate::store::document_history::{DocumentHistory, earlier_revision, verify_commit};
use crate::store::write_rules::{CHANGES_BYTES_MAX, HISTORY_LISTED_MAX};
use crate::store::{CommitRow, DocumentList, PolicyCommit};

/// Lists the newest revisions that changed documents.
pub(super) fn list_policy_commits(connection: &Connection, limit: usize) -> Result<Vec<PolicyCommit>, SqliteError> {
    let mut statement = connection.prepare_cached(
        "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM log WHERE of_documents = 1
         ORDER BY number DESC LIMIT ?1",
    )?;
    let mut rows = statement.query([to_i64(limit.min(HISTORY_LISTED_MAX))?])?;
    let (mut commits, mut bytes) = (Vec::new(), 0usize);
    while let Some(row) = rows.next()? {
        let (commit, size) = parse_commit_row(row)?;
        bytes = bytes.saturating_add(size);
        if bytes > CHANGES_BYTES_MAX && !commits.is_empty() {
            break;
        }
        let CommitRow { number, unix_ms, changes, .. } = verify_commit(commit)?;
        commits.push(PolicyCommit { number, unix_ms, act: read_act(connection, number)?, changes });
    }
    Ok(commits)
}

/// Rebuilds the documents of an earlier revision.
pub(super) fn documents_at(connection: &Connection, number: u64) -> Result<DocumentList, SqliteError> {
    let head = read_head(connection)?;
    let revision = earlier_revision(head.revision, head.floor, number)?;
    let mut statement = connection.prepare_cached(
        "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM log WHERE of_documents = 1 AND number <= ?1
         ORDER BY number",
    )?;
    let mut replay = DocumentHistory::default();
    let mut rows = statement.query([to_i64(number)?])?;
    while let Some(row) = rows.next()? {
        replay.apply_commit(verify_commit(parse_commit_row(row)?.0)?);
    }
    Ok(replay.into_documents(revision))
}

fn read_act(connection: &Connection, number: u64) -> Result<Option<ActRow>, SqliteError> {
    let mut statement = connection.prepare_cached("SELECT act FROM acts WHERE number = ?1")?;
    let text: Option<String> = statement.query_one([to_i64(number)?], |row| row.get(0)).optional()?;
    let parse = |text: String| {
        serde_json::from_str(&text)
            .map_err(|error| corrupt_error(format!("the act of revision {number} cannot be understood: {error}")))
    };
    text.map(parse).transpose()
}
