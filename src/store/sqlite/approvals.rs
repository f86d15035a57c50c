//! Approvals in a SQLite store: one row each, whole as JSON, beside what it is found by.
//!
//! What a step does to a row is said by [`crate::store::approvals`]; here rows are read and written around it, inside the
//! transaction of `super::write`, which is the only writer of the file at that time.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension};

use super::open::Fault;
use super::read::{is_revoked, signed};
use crate::model::approval::{ApprovalFilter, ApprovalRow, Approvals, AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::limits::{APPROVALS_LISTED_MAX, APPROVALS_WAITING_MAX};
use crate::model::time::Now;
use crate::store::Error;
use crate::store::approvals::{self, Asking};

/// Rows that one asking forgets; more than it adds, so that they cannot pile up.
const FORGOTTEN_MAX: i64 = 64;

/// Stores that a call asks.
pub(super) fn ask(connection: &Connection, request: &AskApproval, now: Now) -> Result<AskOutcome, Fault> {
    let unix_ms = now.unix_ms();
    forget(connection, unix_ms)?;
    let (current, taken_back) = row(connection, &request.call.digest)?;
    let row = match approvals::ask(current, request, unix_ms) {
        // It is listed among those that wait again.
        Asking::Same(row) if taken_back => {
            put(connection, &row)?;
            row
        }
        Asking::Same(row) => row,
        Asking::Put { row, is_new } => {
            if is_new && waiting_of(connection, leaf(&row), unix_ms)? >= APPROVALS_WAITING_MAX {
                return Ok(AskOutcome::OverQuota);
            }
            put(connection, &row)?;
            row
        }
    };
    Ok(AskOutcome::Stands(Box::new(row)))
}

/// Uses all that a request names, or nothing.
pub(super) fn use_once(connection: &Connection, request: &UseApprovals, now: Now) -> Result<UseOutcome, Fault> {
    let mut rows = BTreeMap::new();
    for digest in request.digests() {
        if let Some(row) = row(connection, digest)?.0 {
            rows.insert(digest.to_owned(), row);
        }
    }
    let outcome = approvals::use_once(&mut rows, request, now.unix_ms());
    if outcome == UseOutcome::Used {
        rows.values().try_for_each(|row| put(connection, row))?;
    }
    Ok(outcome)
}

/// Puts an operator's yes or no to a row.
pub(super) fn answer(
    connection: &Connection,
    digest: &str,
    change: impl FnOnce(Option<ApprovalRow>) -> Result<ApprovalRow, Error>,
) -> Result<(), Fault> {
    put(connection, &change(row(connection, digest)?.0)?)
}

/// Lists rows, the oldest first.
pub(super) fn list(connection: &Connection, filter: &ApprovalFilter, limit: usize, unix_ms: i64) -> Result<Approvals, Fault> {
    let (condition, digest, after_ms) = match filter {
        ApprovalFilter::Waiting => ("waiting = 1 AND expires_unix_ms > ?2 AND ?1 = ''", "", unix_ms),
        ApprovalFilter::All => ("?1 = '' AND ?2 < 0", "", -1),
        ApprovalFilter::Digest(digest) => ("digest = ?1 AND ?2 < 0", digest.as_str(), -1),
    };
    let mut statement = connection.prepare_cached(&format!("SELECT count(*) FROM approvals WHERE {condition}"))?;
    let total: i64 = statement.query_one((digest, after_ms), |row| row.get(0))?;
    let mut statement = connection
        .prepare_cached(&format!("SELECT approval FROM approvals WHERE {condition} ORDER BY asked_unix_ms, digest LIMIT ?3"))?;
    let mut found = statement.query((digest, after_ms, signed(limit.min(APPROVALS_LISTED_MAX))?))?;
    let mut rows = Vec::new();
    while let Some(row) = found.next()? {
        rows.push(parse(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?);
    }
    for row in &mut rows {
        take_back(connection, row)?;
    }
    Ok(Approvals { rows, total: total.unsigned_abs(), unix_ms })
}

/// The row as it counts: without what was approved with a key that was revoked since. And whether there was any of that.
fn row(connection: &Connection, digest: &str) -> Result<(Option<ApprovalRow>, bool), Fault> {
    let mut statement = connection.prepare_cached("SELECT approval FROM approvals WHERE digest = ?1")?;
    let text: Option<String> = statement.query_one([digest], |row| row.get(0)).optional()?;
    let Some(mut row) = text.as_deref().map(parse).transpose()? else { return Ok((None, false)) };
    let taken_back = take_back(connection, &mut row)?;
    Ok((Some(row), taken_back))
}

/// Takes back what was approved with a key that was revoked since; whether there was any.
fn take_back(connection: &Connection, row: &mut ApprovalRow) -> Result<bool, Fault> {
    let mut revoked = BTreeSet::new();
    for key in approvals::keys_of(row) {
        if is_revoked(connection, key)? {
            revoked.insert(key.to_owned());
        }
    }
    Ok(approvals::take_back(row, |key| revoked.contains(key)))
}

fn parse(text: &str) -> Result<ApprovalRow, Fault> {
    serde_json::from_str(text).map_err(|error| Error::Corrupt(format!("an approval cannot be understood: {error}")).into())
}

fn put(connection: &Connection, row: &ApprovalRow) -> Result<(), Fault> {
    let text = serde_json::to_string(row).map_err(|error| Error::Rejected(format!("the approval cannot be stored: {error}")))?;
    connection
        .prepare_cached(
            "INSERT INTO approvals (digest, leaf, waiting, asked_unix_ms, expires_unix_ms, forget_unix_ms, approval)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (digest) DO UPDATE SET leaf = excluded.leaf, waiting = excluded.waiting,
             asked_unix_ms = excluded.asked_unix_ms, expires_unix_ms = excluded.expires_unix_ms,
             forget_unix_ms = excluded.forget_unix_ms, approval = excluded.approval",
        )?
        .execute((
            &row.call.digest,
            leaf(row),
            approvals::is_waiting(row),
            row.asked_at_unix_ms,
            row.expires_at_unix_ms(),
            approvals::kept_until_unix_ms(row),
            text,
        ))?;
    Ok(())
}

fn leaf(row: &ApprovalRow) -> &str {
    row.call.agents.last().map_or("", String::as_str)
}

fn waiting_of(connection: &Connection, leaf: &str, unix_ms: i64) -> Result<u64, Fault> {
    let mut statement =
        connection.prepare_cached("SELECT count(*) FROM approvals WHERE leaf = ?1 AND waiting = 1 AND expires_unix_ms > ?2")?;
    let count: i64 = statement.query_one((leaf, unix_ms), |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// Takes out what may be forgotten, a bounded number of rows.
fn forget(connection: &Connection, unix_ms: i64) -> Result<(), Fault> {
    connection
        .prepare_cached(
            "DELETE FROM approvals WHERE digest IN (
                SELECT digest FROM approvals WHERE forget_unix_ms <= ?1 ORDER BY forget_unix_ms LIMIT ?2)",
        )?
        .execute((unix_ms, FORGOTTEN_MAX))?;
    Ok(())
}
