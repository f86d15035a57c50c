//! Approvals in a SQLite store: one row each, stored as JSON beside the columns by which it is found.
//!
//! [`crate::store::approval_rules`] holds the rules for a row. This file reads and writes the rows, inside the transaction of
//! `super::write`, which is the only writer of the file at that time.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension};

use super::error::SqliteError;
use super::read::{self, is_key_revoked, to_i64};
use super::spent_proofs;
use crate::model::approval::{
    ApprovalFilter, ApprovalPage, ApprovalRow, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome,
    ApprovalUseRequest, ProofUse, WaitingApprovalCounts,
};
use crate::model::limits::APPROVALS_LISTED_MAX;
use crate::model::time::ClockReading;
use crate::store::Error;
use crate::store::approval_rules::{self, AskTransition, UseContext};

/// Rows that one request for an approval removes. It is more than a request adds, so that old rows do not accumulate.
const FORGOTTEN_ROWS_MAX: i64 = 64;

/// Stores that a call asks for an approval.
pub(super) fn ask_approval(
    connection: &Connection,
    request: &ApprovalSubmission,
    now: ClockReading,
) -> Result<ApprovalSubmissionOutcome, SqliteError> {
    let unix_ms = now.unix_ms();
    if !is_proof_new(connection, request.proof.as_ref())? {
        return Ok(ApprovalSubmissionOutcome::Replayed);
    }
    forget_approvals(connection, unix_ms)?;
    let (current, withdrawn) = read_approval(connection, &request.call.digest)?;
    let row = match approval_rules::ask_approval(current, request, unix_ms) {
        // An approval was withdrawn, so the row must be listed as waiting again.
        AskTransition::Unchanged(row) if withdrawn => {
            put_approval(connection, &row)?;
            row
        }
        AskTransition::Unchanged(row) => row,
        AskTransition::Put { row, is_new } => {
            if is_new && let Some(share) = count_waiting(connection, &row, unix_ms)?.exceeded_quota() {
                return Ok(ApprovalSubmissionOutcome::OverQuota(share));
            }
            put_approval(connection, &row)?;
            row
        }
    };
    if let Some(proof) = &request.proof {
        spent_proofs::spend_proof(connection, proof, now)?;
    }
    Ok(ApprovalSubmissionOutcome::Stored(Box::new(row)))
}

/// Uses all approvals that a request names, or none.
pub(super) fn use_approvals(
    connection: &Connection,
    request: &ApprovalUseRequest,
    now: ClockReading,
) -> Result<ApprovalUseOutcome, SqliteError> {
    let mut rows = read_approvals(connection, request)?;
    let (head, proof_is_new) = (read::read_head(connection)?.revision, is_proof_new(connection, request.proof.as_ref())?);
    let outcome =
        approval_rules::use_approvals(&mut rows, request, UseContext { head: &head, proof_is_new, unix_ms: now.unix_ms() });
    if approval_rules::outcome_changes_rows(&outcome) {
        rows.values().try_for_each(|row| put_approval(connection, row))?;
    }
    if let (ApprovalUseOutcome::Used, Some(proof)) = (&outcome, &request.proof) {
        spent_proofs::spend_proof(connection, proof, now)?;
    }
    Ok(outcome)
}

/// Gives back the approvals that a decision used before it was denied.
pub(super) fn give_back_approvals(connection: &Connection, request: &ApprovalUseRequest) -> Result<bool, SqliteError> {
    let mut rows = read_approvals(connection, request)?;
    let given = approval_rules::give_back_approvals(&mut rows, request);
    if given {
        rows.values().try_for_each(|row| put_approval(connection, row))?;
    }
    Ok(given)
}

fn is_proof_new(connection: &Connection, proof: Option<&ProofUse>) -> Result<bool, SqliteError> {
    proof.map_or(Ok(true), |proof| spent_proofs::is_proof_new(connection, proof))
}

/// The existing rows of the approvals that a request names.
fn read_approvals(connection: &Connection, request: &ApprovalUseRequest) -> Result<BTreeMap<String, ApprovalRow>, SqliteError> {
    let mut rows = BTreeMap::new();
    for digest in request.digests() {
        if let Some(row) = read_approval(connection, digest)?.0 {
            rows.insert(digest.to_owned(), row);
        }
    }
    Ok(rows)
}

/// Lists rows, the oldest first.
pub(super) fn list_approvals(
    connection: &Connection,
    filter: &ApprovalFilter,
    limit: usize,
    unix_ms: i64,
) -> Result<ApprovalPage, SqliteError> {
    let (condition, digest, after_ms) = match filter {
        ApprovalFilter::Waiting => ("waiting = 1 AND expires_unix_ms > ?2 AND ?1 = ''", "", unix_ms),
        ApprovalFilter::All => ("?1 = '' AND ?2 < 0", "", -1),
        ApprovalFilter::Digest(digest) => ("digest = ?1 AND ?2 < 0", digest.as_str(), -1),
    };
    let mut statement = connection.prepare_cached(&format!("SELECT count(*) FROM approvals WHERE {condition}"))?;
    let total: i64 = statement.query_one((digest, after_ms), |row| row.get(0))?;
    let mut statement = connection
        .prepare_cached(&format!("SELECT approval FROM approvals WHERE {condition} ORDER BY asked_unix_ms, digest LIMIT ?3"))?;
    let mut found = statement.query((digest, after_ms, to_i64(limit.min(APPROVALS_LISTED_MAX))?))?;
    let mut rows = Vec::new();
    while let Some(row) = found.next()? {
        rows.push(parse_approval(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?);
    }
    for row in &mut rows {
        withdraw_revoked(connection, row)?;
    }
    Ok(ApprovalPage { rows, total: total.unsigned_abs(), read_at_unix_ms: unix_ms })
}

/// Reads a row without the approvals whose key was revoked in the meantime. The flag says whether there were any.
pub(super) fn read_approval(connection: &Connection, digest: &str) -> Result<(Option<ApprovalRow>, bool), SqliteError> {
    let mut statement = connection.prepare_cached("SELECT approval FROM approvals WHERE digest = ?1")?;
    let text: Option<String> = statement.query_one([digest], |row| row.get(0)).optional()?;
    let Some(mut row) = text.as_deref().map(parse_approval).transpose()? else { return Ok((None, false)) };
    let withdrawn = withdraw_revoked(connection, &mut row)?;
    Ok((Some(row), withdrawn))
}

/// Withdraws approvals whose key was revoked in the meantime. Returns whether there were any.
fn withdraw_revoked(connection: &Connection, row: &mut ApprovalRow) -> Result<bool, SqliteError> {
    let mut revoked = BTreeSet::new();
    for key in approval_rules::approver_keys(row) {
        if is_key_revoked(connection, key)? {
            revoked.insert(key.to_owned());
        }
    }
    Ok(approval_rules::withdraw_revoked(row, |key| revoked.contains(key)))
}

fn parse_approval(text: &str) -> Result<ApprovalRow, SqliteError> {
    serde_json::from_str(text).map_err(|error| Error::Corrupt(format!("an approval cannot be understood: {error}")).into())
}

pub(super) fn put_approval(connection: &Connection, row: &ApprovalRow) -> Result<(), SqliteError> {
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
            leaf_agent(row),
            asker_key(row),
            approval_rules::is_waiting(row),
            row.asked_at_unix_ms,
            row.expires_at_unix_ms(),
            approval_rules::kept_until_unix_ms(row),
            text,
        ))?;
    Ok(())
}

fn leaf_agent(row: &ApprovalRow) -> &str {
    row.call.agents.last().map_or("", String::as_str)
}

/// The user of a call, as the column `asker` holds it.
fn asker_key(row: &ApprovalRow) -> String {
    format!("{}\n{}", row.call.issuer, row.call.subject)
}

/// Counts the calls that wait beside a new one.
fn count_waiting(connection: &Connection, row: &ApprovalRow, unix_ms: i64) -> Result<WaitingApprovalCounts, SqliteError> {
    let mut statement = connection.prepare_cached(
        "SELECT count(*) FILTER (WHERE leaf = ?1 AND asker = ?2), count(*) FILTER (WHERE leaf = ?1),
             count(*) FILTER (WHERE asker = ?2), count(*) FROM approvals WHERE waiting = 1 AND expires_unix_ms > ?3",
    )?;
    let counted = statement.query_one((leaf_agent(row), asker_key(row), unix_ms), |row| {
        let count = |column: usize| row.get::<_, i64>(column).map(i64::unsigned_abs);
        Ok(WaitingApprovalCounts { of_user_and_agent: count(0)?, of_agent: count(1)?, of_user: count(2)?, total: count(3)? })
    })?;
    Ok(counted)
}

/// Deletes a bounded number of rows that may be forgotten.
fn forget_approvals(connection: &Connection, unix_ms: i64) -> Result<(), SqliteError> {
    connection
        .prepare_cached(
            "DELETE FROM approvals WHERE digest IN (
                SELECT digest FROM approvals WHERE forget_unix_ms <= ?1 ORDER BY forget_unix_ms LIMIT ?2)",
        )?
        .execute((unix_ms, FORGOTTEN_ROWS_MAX))?;
    Ok(())
}
