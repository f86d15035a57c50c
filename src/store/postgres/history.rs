//! The history of policy in a PostgreSQL store: the revisions that changed documents, and the documents at an earlier revision.
//!
//! Both read only the rows of the change log that change documents, through an index of those rows. Look next at
//! `store/replay.rs`.

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::link::{Fault, Link};
use super::read::{self, Expected, commit_row, corrupt, head, signed};
use crate::model::records::ActRow;
use crate::store::replay::{Replay, earlier, whole};
use crate::store::rules::{CHANGES_BYTES_MAX, HISTORY_LISTED_MAX};
use crate::store::{CommitRow, Documents, PolicyCommit};

/// Lists the newest revisions that changed documents.
pub(super) async fn history(link: &Link, expected: &Expected, limit: usize) -> Result<Vec<PolicyCommit>, Fault> {
    head(link, expected, false).await?;
    let sql = "SELECT number, previous_hash, hash, digest, unix_ms, changes, act FROM (
            SELECT *, octet_length(changes) AS bytes, sum(octet_length(changes)) OVER (ORDER BY number DESC) AS upto
            FROM (SELECT log.*, acts.act FROM portcullis.log LEFT JOIN portcullis.acts USING (number) WHERE of_documents
                  ORDER BY number DESC LIMIT $1) newest
        ) sized WHERE upto <= $2 OR upto = bytes ORDER BY number DESC";
    let (limit, bytes) = (signed(limit.min(HISTORY_LISTED_MAX))?, signed(CHANGES_BYTES_MAX)?);
    read::stream(link, sql, &[(&limit, Type::INT8), (&bytes, Type::INT8)], policy_commit).await
}

/// Rebuilds the documents of an earlier revision.
pub(super) async fn documents_at(link: &Link, expected: &Expected, number: u64) -> Result<Documents, Fault> {
    let head = head(link, expected, false).await?;
    let revision = earlier(head.revision, head.floor, number)?;
    let sql = "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM portcullis.log
         WHERE of_documents AND number <= $1 ORDER BY number";
    let commits = read::stream(link, sql, &[(&signed(number)?, Type::INT8)], |row| Ok(whole(commit_row(row)?.0)?)).await?;
    let mut replay = Replay::default();
    commits.into_iter().for_each(|commit| replay.put(commit));
    Ok(replay.documents(revision))
}

fn policy_commit(row: &Row) -> Result<PolicyCommit, Fault> {
    let CommitRow { number, unix_ms, changes, .. } = whole(commit_row(row)?.0)?;
    let parse = |text: String| -> Result<ActRow, Fault> {
        serde_json::from_str(&text)
            .map_err(|error| corrupt(format!("the act of revision {number} cannot be understood: {error}")))
    };
    let act = row.try_get::<_, Option<String>>(6)?.map(parse).transpose()?;
    Ok(PolicyCommit { number, unix_ms, act, changes })
}
