//! The history of policy in a SQLite store: the revisions that changed documents, and the documents at an earlier revision.
//!
//! Both read only the rows of the change log that change documents, through an index of those rows. Look next at
//! `store/replay.rs`.

use rusqlite::{Connection, OptionalExtension};

use super::read::{commit_row, corrupt, head, signed};
use super::store_fault::Fault;
use crate::model::records::ActRow;
use crate::store::replay::{Replay, earlier, whole};
use crate::store::rules::{CHANGES_BYTES_MAX, HISTORY_LISTED_MAX};
use crate::store::{CommitRow, Documents, PolicyCommit};

/// Lists the newest revisions that changed documents.
pub(super) fn history(connection: &Connection, limit: usize) -> Result<Vec<PolicyCommit>, Fault> {
    let mut statement = connection.prepare_cached(
        "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM log WHERE of_documents = 1
         ORDER BY number DESC LIMIT ?1",
    )?;
    let mut rows = statement.query([signed(limit.min(HISTORY_LISTED_MAX))?])?;
    let (mut commits, mut bytes) = (Vec::new(), 0usize);
    while let Some(row) = rows.next()? {
        let (commit, size) = commit_row(row)?;
        bytes = bytes.saturating_add(size);
        if bytes > CHANGES_BYTES_MAX && !commits.is_empty() {
            break;
        }
        let CommitRow { number, unix_ms, changes, .. } = whole(commit)?;
        commits.push(PolicyCommit { number, unix_ms, act: act(connection, number)?, changes });
    }
    Ok(commits)
}

/// Rebuilds the documents of an earlier revision.
pub(super) fn documents_at(connection: &Connection, number: u64) -> Result<Documents, Fault> {
    let head = head(connection)?;
    let revision = earlier(head.revision, head.floor, number)?;
    let mut statement = connection.prepare_cached(
        "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM log WHERE of_documents = 1 AND number <= ?1
         ORDER BY number",
    )?;
    let mut replay = Replay::default();
    let mut rows = statement.query([signed(number)?])?;
    while let Some(row) = rows.next()? {
        replay.put(whole(commit_row(row)?.0)?);
    }
    Ok(replay.documents(revision))
}

fn act(connection: &Connection, number: u64) -> Result<Option<ActRow>, Fault> {
    let mut statement = connection.prepare_cached("SELECT act FROM acts WHERE number = ?1")?;
    let text: Option<String> = statement.query_one([signed(number)?], |row| row.get(0)).optional()?;
    let parse = |text: String| {
        serde_json::from_str(&text)
            .map_err(|error| corrupt(format!("the act of revision {number} cannot be understood: {error}")))
    };
    text.map(parse).transpose()
}
