//! Approvals in a SQLite store: one row each, stored as JSON beside the columns by which it is found.
//!
//! [`crate::store::approvals`] holds the rules for a row. This file reads and writes the rows, inside the transaction of
//! `super::write`, which is the only writer of the file at that time.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension};

use super::read::{self, is_revoked, signed};
use super::spent_proofs;
use super::store_fault::Fault;
use crate::model::approval::{
    ApprovalFilter, ApprovalRow, Approvals, AskApproval, AskOutcome, ProofUse, UseApprovals, UseOutcome, Waiting,
};
use crate::model::limits::APPROVALS_LISTED_MAX;
use crate::model::time::Now;
use crate::store::Error;
use crate::store::approvals::{self, Asking, Moment};

/// Rows that one request for an approval removes. It is more than a request adds, so that old rows do not accumulate.
const FORGOTTEN_MAX: i64 = 64;

/// Stores that a call asks for an approval.
pub(super) fn ask(connection: &Connection, request: &AskApproval, now: Now) -> Result<AskOutcome, Fault> {
    let unix_ms = now.unix_ms();
    if !is_new(connection, request.proof.as_ref())? {
        return Ok(AskOutcome::Replayed);
    }
    forget(connection, unix_ms)?;
    let (current, taken_back) = row(connection, &request.call.digest)?;
    let row = match approvals::ask(current, request, unix_ms) {
        // An approval was withdrawn, so the row must be listed as waiting again.
        Asking::Same(row) if taken_back => {
            put(connection, &row)?;
            row
        }
        Asking::Same(row) => row,
        Asking::Put { row, is_new } => {
            if is_new && let Some(share) = waiting_beside(connection, &row, unix_ms)?.used_up() {
                return Ok(AskOutcome::OverQuota(share));
            }
            put(connection, &row)?;
            row
        }
    };
    if let Some(proof) = &request.proof {
        spent_proofs::spend(connection, proof, now)?;
    }
    Ok(AskOutcome::Stands(Box::new(row)))
}

/// Uses all approvals that a request names, or none.
pub(super) fn use_once(connection: &Connection, request: &UseApprovals, now: Now) -> Result<UseOutcome, Fault> {
    let mut rows = rows(connection, request)?;
    let (head, proof_is_new) = (read::head(connection)?.revision, is_new(connection, request.proof.as_ref())?);
    let outcome = approvals::use_once(&mut rows, request, Moment { head: &head, proof_is_new, unix_ms: now.unix_ms() });
    if approvals::changes_rows(&outcome) {
        rows.values().try_for_each(|row| put(connection, row))?;
    }
    if let (UseOutcome::Used, Some(proof)) = (&outcome, &request.proof) {
        spent_proofs::spend(connection, proof, now)?;
    }
    Ok(outcome)
}

/// Gives back the approvals that a decision used before it was denied.
pub(super) fn give_back(connection: &Connection, request: &UseApprovals) -> Result<bool, Fault> {
    let mut rows = rows(connection, request)?;
    let given = approvals::give_back(&mut rows, request);
    if given {
        rows.values().try_for_each(|row| put(connection, row))?;
    }
    Ok(given)
}

fn is_new(connection: &Connection, proof: Option<&ProofUse>) -> Result<bool, Fault> {
    proof.map_or(Ok(true), |proof| spent_proofs::is_new(connection, proof))
}

/// The existing rows of the approvals that a request names.
fn rows(connection: &Connection, request: &UseApprovals) -> Result<BTreeMap<String, ApprovalRow>, Fault> {
    let mut rows = BTreeMap::new();
    for digest in request.digests() {
        if let Some(row) = row(connection, digest)?.0 {
            rows.insert(digest.to_owned(), row);
        }
    }
    Ok(rows)
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

/// Reads a row without the approvals whose key was revoked in the meantime. The flag says whether there were any.
pub(super) fn row(connection: &Connection, digest: &str) -> Result<(Option<ApprovalRow>, bool), Fault> {
    let mut statement = connection.prepare_cached("SELECT approval FROM approvals WHERE digest = ?1")?;
    let text: Option<String> = statement.query_one([digest], |row| row.get(0)).optional()?;
    let Some(mut row) = text.as_deref().map(parse).transpose()? else { return Ok((None, false)) };
    let taken_back = take_back(connection, &mut row)?;
    Ok((Some(row), taken_back))
}

/// Withdraws approvals whose key was revoked in the meantime. Returns whether there were any.
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

pub(super) fn put(connection: &Connection, row: &ApprovalRow) -> Result<(), Fault> {
    let text = serde_json::to_string(row).map_err(|error| Error::Rejected(format!("the approval cannot be stored: {error}")))?;
    connection
        .prepare_cached(
            "INSERT INTO approvals (digest, leaf, asker, waiting, asked_unix_ms, expires_unix_ms, forget_unix_ms, approval)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT (digest) DO UPDATE SET leaf = excluded.leaf, asker = excluded.asker, waiting = excluded.waiting,
             asked_unix_ms = excluded.asked_unix_ms, expires_unix_ms = excluded.expires_unix_ms,
             forget_unix_ms = excluded.forget_unix_ms, approval = excluded.approval",
        )?
        .execute((
            &row.call.digest,
            leaf(row),
            asker(row),
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

/// The user of a call, as the column `asker` holds it.
fn asker(row: &ApprovalRow) -> String {
    format!("{}\n{}", row.call.issuer, row.call.subject)
}

/// Counts the calls that wait beside a new one.
fn waiting_beside(connection: &Connection, row: &ApprovalRow, unix_ms: i64) -> Result<Waiting, Fault> {
    let mut statement = connection.prepare_cached(
        "SELECT count(*) FILTER (WHERE leaf = ?1 AND asker = ?2), count(*) FILTER (WHERE leaf = ?1),
             count(*) FILTER (WHERE asker = ?2), count(*) FROM approvals WHERE waiting = 1 AND expires_unix_ms > ?3",
    )?;
    let counted = statement.query_one((leaf(row), asker(row), unix_ms), |row| {
        let count = |column: usize| row.get::<_, i64>(column).map(i64::unsigned_abs);
        Ok(Waiting { of_both: count(0)?, of_agent: count(1)?, of_user: count(2)?, total: count(3)? })
    })?;
    Ok(counted)
}

/// Deletes a bounded number of rows that may be forgotten.
fn forget(connection: &Connection, unix_ms: i64) -> Result<(), Fault> {
    connection
        .prepare_cached(
            "DELETE FROM approvals WHERE digest IN (
                SELECT digest FROM approvals WHERE forget_unix_ms <= ?1 ORDER BY forget_unix_ms LIMIT ?2)",
        )?
        .execute((unix_ms, FORGOTTEN_MAX))?;
    Ok(())
}
