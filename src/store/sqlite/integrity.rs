//! Integrity checks of a SQLite store: its pages, its rows and their digest, its head and its change log.
//!
//! The checks read everything within the caller's transaction and keep only sums, so a store of millions of rows takes time but
//! no memory. Look next at `super::file_watch`, which checks a store that was overwritten, and at `super::backup`, which checks a
//! copy.

use rusqlite::Connection;

use super::error::SqliteError;
use super::read::{self, SqliteHead, corrupt_error};
use crate::model::revision::StateDigest;
use crate::store::hash_chain::{document_sha256, revocation_sha256};

/// Checks the structure of the file with SQLite's own check. `with_indexes` checks the indexes too, which takes longer.
pub(super) fn check_pages(connection: &Connection, with_indexes: bool) -> Result<(), SqliteError> {
    let pragma = if with_indexes { "PRAGMA integrity_check(1)" } else { "PRAGMA quick_check(1)" };
    let found: String = connection.query_row(pragma, (), |row| row.get(0))?;
    if found == "ok" { Ok(()) } else { Err(corrupt_error(format!("its pages do not fit: {}", found.replace('\n', " ")))) }
}

/// Checks that the rows have the stored digest, and that the head names the newest commit of the log. Calls `on_row` for every
/// row.
pub(super) fn check_rows(connection: &Connection, on_row: &mut dyn FnMut(u64)) -> Result<SqliteHead, SqliteError> {
    let head = read::read_head(connection)?;
    let number = head.revision.number;
    if read::read_log_hash(connection, number)? != Some(head.hash) {
        return Err(corrupt_error(format!("revision {number} of the change log is not the one that the head names")));
    }
    let mut digest = StateDigest::default();
    let mut statement = connection.prepare("SELECT kind, id, json, path, line, origin, revision FROM documents")?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let document = read::parse_document_row(row)?;
        digest.add(&document_sha256(&document.row, document.revision));
        on_row(1);
    }
    let mut statement = connection
        .prepare("SELECT target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision FROM revocations")?;
    let (mut rows, mut count) = (statement.query(())?, 0u64);
    while let Some(row) = rows.next()? {
        digest.add(&revocation_sha256(&read::parse_revocation_row(row)?));
        count = count.saturating_add(1);
        on_row(1);
    }
    if digest != head.digest || count != head.revocations {
        return Err(corrupt_error(format!("its rows do not have the digest of revision {number}")));
    }
    Ok(head)
}

/// Checks that the change log contains a commit.
pub(super) fn check_contains_commit(
    connection: &Connection,
    head: &SqliteHead,
    number: u64,
    hash: &[u8; 32],
) -> Result<(), SqliteError> {
    let at = head.revision.number;
    if at < number {
        return Err(corrupt_error(format!("it is at revision {at}, and was at {number}")));
    }
    match read::read_log_hash(connection, number)? {
        Some(found) if found == *hash => Ok(()),
        // If the log was cut below that commit, the head alone decides.
        None if number <= head.floor && at > number => Ok(()),
        _ => Err(corrupt_error(format!("it holds another revision {number} than before"))),
    }
}

/// Checks that each row of the change log follows the row before it, up to the head. Calls `on_row` for every row; returns their
/// number.
pub(super) fn check_chain(connection: &Connection, head: &SqliteHead, on_row: &mut dyn FnMut(u64)) -> Result<u64, SqliteError> {
    let mut statement =
        connection.prepare("SELECT number, previous_hash, hash, digest, unix_ms, changes FROM log ORDER BY number")?;
    let (mut rows, mut previous, mut count) = (statement.query(())?, None, 0u64);
    while let Some(row) = rows.next()? {
        let (commit, _) = read::parse_commit_row(row)?;
        let (number, hash) = previous.unwrap_or((commit.number.saturating_sub(1), commit.previous_hash));
        commit.verify_after(number, &hash)?;
        if count == 0 && commit.number > head.floor.max(1) {
            return Err(corrupt_error(format!("the change log begins at {}, and its floor is {}", commit.number, head.floor)));
        }
        previous = Some((commit.number, commit.hash));
        count = count.saturating_add(1);
        on_row(1);
    }
    let (number, hash) = (head.revision.number, head.hash);
    match previous {
        Some(last) if last == (number, hash) => Ok(count),
        None if number == 0 => Ok(0),
        _ => Err(corrupt_error(format!("the change log does not end at revision {number}"))),
    }
}
