//! Approvals in a PostgreSQL store: one row each, whole as JSON, beside what it is found by.
//!
//! What a step does to a row is said by [`crate::store::approvals`]. Here rows are locked before they are read: in the order of their
//! digests, so that nobody waits for who waits for him, and askings of one leaf agent one after the other, so that its quota holds
//! and two replicas make one row of one call.

use std::collections::{BTreeMap, BTreeSet};

use ring::digest::{SHA256, digest};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::link::{Fault, Link, Parameter};
use super::read::{self, Expected, corrupt, signed, text, unsigned};
use crate::model::approval::{ApprovalFilter, ApprovalRow, Approvals, AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::limits::{APPROVALS_LISTED_MAX, APPROVALS_WAITING_MAX};
use crate::model::records::Target;
use crate::store::approvals::{self, Asking};
use crate::store::{Error, signers};

/// Rows that one asking forgets; more than it adds, so that they cannot pile up.
const FORGOTTEN_MAX: i64 = 64;
/// The class of the locks on leaf agents: `Ptla`.
const LEAF_LOCKS: i32 = 0x5074_6c61;

/// Stores that a call asks.
pub(super) async fn ask(
    link: &Link,
    expected: &Expected,
    request: &AskApproval,
    unix_ms: Option<i64>,
) -> Result<AskOutcome, Fault> {
    let head = read::head(link, expected, false).await?;
    let unix_ms = unix_ms.unwrap_or(head.unix_ms);
    let leaf = leaf_key(request.call.agents.last().map_or("", String::as_str));
    let lock = i32::from_be_bytes(leaf.first_chunk().copied().unwrap_or_default());
    link.execute("SELECT pg_advisory_xact_lock($1, $2)", &[(&LEAF_LOCKS, Type::INT4), (&lock, Type::INT4)]).await?;
    forget(link, unix_ms).await?;
    let mut current = read_locked(link, &[request.call.digest.as_str()]).await?;
    let taken_back = take_back(link, current.values_mut()).await?;
    let row = match approvals::ask(current.pop_first().map(|(_, row)| row), request, unix_ms) {
        // It is listed among those that wait again.
        Asking::Same(row) if taken_back => {
            put(link, &row).await?;
            row
        }
        Asking::Same(row) => row,
        Asking::Put { row, is_new } => {
            if is_new && waiting_of(link, &leaf, unix_ms).await? >= APPROVALS_WAITING_MAX {
                return Ok(AskOutcome::OverQuota);
            }
            put(link, &row).await?;
            row
        }
    };
    Ok(AskOutcome::Stands(Box::new(row)))
}

/// Uses all that a request names, or nothing.
pub(super) async fn use_once(
    link: &Link,
    expected: &Expected,
    request: &UseApprovals,
    unix_ms: Option<i64>,
) -> Result<UseOutcome, Fault> {
    let head = read::head(link, expected, false).await?;
    let digests: Vec<&str> = request.digests().into_iter().collect();
    let mut rows = locked(link, &digests).await?;
    let outcome = approvals::use_once(&mut rows, request, unix_ms.unwrap_or(head.unix_ms));
    if outcome == UseOutcome::Used {
        for row in rows.values() {
            put(link, row).await?;
        }
    }
    Ok(outcome)
}

/// Lists rows, the oldest first.
pub(super) async fn list(
    link: &Link,
    expected: &Expected,
    filter: &ApprovalFilter,
    limit: usize,
    unix_ms: Option<i64>,
) -> Result<Approvals, Fault> {
    let head = read::head(link, expected, false).await?;
    let unix_ms = unix_ms.unwrap_or(head.unix_ms);
    let (condition, digest) = match filter {
        ApprovalFilter::Waiting => ("waiting AND expires_unix_ms > $2 AND $1 = ''", ""),
        ApprovalFilter::All => ("$1 = '' AND $2 IS NOT NULL", ""),
        ApprovalFilter::Digest(digest) => ("digest = $1 AND $2 IS NOT NULL", digest.as_str()),
    };
    // A digest is hexadecimal: what no engine keeps as text names none.
    let digest = if digest.contains('\0') { "-" } else { digest };
    let mut parameters: Vec<Parameter<'_>> = vec![(&digest, Type::TEXT), (&unix_ms, Type::INT8)];
    let counted = link.row(&format!("SELECT count(*) FROM portcullis.approvals WHERE {condition}"), &parameters).await?;
    let total = counted.map_or(Ok(0), |row| unsigned(&row, 0))?;
    let sql = format!("SELECT approval FROM portcullis.approvals WHERE {condition} ORDER BY asked_unix_ms, digest LIMIT $3");
    let limit = signed(limit.min(APPROVALS_LISTED_MAX))?;
    parameters.push((&limit, Type::INT8));
    let mut rows = read::stream(link, &sql, &parameters, |row| approval(row, 0)).await?;
    take_back(link, rows.iter_mut()).await?;
    Ok(Approvals { rows, total, unix_ms })
}

/// The rows of digests that are there, as they count: without what was approved with a key that was revoked since. Kept from everybody
/// else until the transaction ends.
pub(super) async fn locked(link: &Link, digests: &[&str]) -> Result<BTreeMap<String, ApprovalRow>, Fault> {
    let mut rows = read_locked(link, digests).await?;
    take_back(link, rows.values_mut()).await?;
    Ok(rows)
}

/// Takes back what was approved with a key that was revoked since; whether there was any.
async fn take_back<'a>(link: &Link, rows: impl Iterator<Item = &'a mut ApprovalRow>) -> Result<bool, Fault> {
    let rows: Vec<&mut ApprovalRow> = rows.collect();
    let keys: BTreeSet<&str> = rows.iter().flat_map(|row| approvals::keys_of(row)).collect();
    let targets: Vec<Target> = keys.into_iter().map(signers::target).collect();
    let revoked = read::revocations_of(link, &targets).await?;
    let revoked: BTreeSet<Target> =
        revoked.into_iter().filter(|row| signers::is_revoked(Some(row))).map(|row| row.target).collect();
    let is_revoked = |key: &str| revoked.contains(&signers::target(key));
    Ok(rows.into_iter().fold(false, |taken, row| approvals::take_back(row, is_revoked) || taken))
}

async fn read_locked(link: &Link, digests: &[&str]) -> Result<BTreeMap<String, ApprovalRow>, Fault> {
    if digests.is_empty() {
        return Ok(BTreeMap::new());
    }
    let sql = "SELECT digest, approval FROM portcullis.approvals WHERE digest = ANY ($1) ORDER BY digest FOR UPDATE";
    let rows =
        read::stream(link, sql, &[(&digests, Type::TEXT_ARRAY)], |row| Ok((text(row, 0)?.to_owned(), approval(row, 1)?))).await?;
    Ok(rows.into_iter().collect())
}

/// Puts a row in place of what stands under its digest.
pub(super) async fn put(link: &Link, row: &ApprovalRow) -> Result<(), Fault> {
    let json = serde_json::to_string(row).map_err(|error| Error::Rejected(format!("the approval cannot be stored: {error}")))?;
    let leaf = leaf_key(row.call.agents.last().map_or("", String::as_str));
    link.execute(
        "INSERT INTO portcullis.approvals (digest, leaf, waiting, asked_unix_ms, expires_unix_ms, forget_unix_ms, approval)
         VALUES ($1, $2, $3, $4, $5, $6, $7)
         ON CONFLICT (digest) DO UPDATE SET leaf = excluded.leaf, waiting = excluded.waiting,
         asked_unix_ms = excluded.asked_unix_ms, expires_unix_ms = excluded.expires_unix_ms,
         forget_unix_ms = excluded.forget_unix_ms, approval = excluded.approval",
        &[
            (&row.call.digest, Type::TEXT),
            (&leaf, Type::BYTEA),
            (&approvals::is_waiting(row), Type::BOOL),
            (&row.asked_at_unix_ms, Type::INT8),
            (&row.expires_at_unix_ms(), Type::INT8),
            (&approvals::kept_until_unix_ms(row), Type::INT8),
            (&json, Type::TEXT),
        ],
    )
    .await?;
    Ok(())
}

fn approval(row: &Row, column: usize) -> Result<ApprovalRow, Fault> {
    serde_json::from_str(text(row, column)?).map_err(|error| corrupt(format!("an approval cannot be understood: {error}")))
}

/// A leaf agent as it is found by: names may be longer than what an index takes.
fn leaf_key(leaf: &str) -> Vec<u8> {
    digest(&SHA256, leaf.as_bytes()).as_ref().to_vec()
}

async fn waiting_of(link: &Link, leaf: &[u8], unix_ms: i64) -> Result<u64, Fault> {
    let sql = "SELECT count(*) FROM portcullis.approvals WHERE leaf = $1 AND waiting AND expires_unix_ms > $2";
    let row = link.row(sql, &[(&leaf, Type::BYTEA), (&unix_ms, Type::INT8)]).await?;
    row.map_or(Ok(0), |row| unsigned(&row, 0))
}

/// Takes out what may be forgotten, a bounded number of rows; what somebody holds is not waited for.
async fn forget(link: &Link, unix_ms: i64) -> Result<(), Fault> {
    link.execute(
        "DELETE FROM portcullis.approvals WHERE digest IN (
             SELECT digest FROM portcullis.approvals WHERE forget_unix_ms <= $1 ORDER BY forget_unix_ms LIMIT $2
             FOR UPDATE SKIP LOCKED)",
        &[(&unix_ms, Type::INT8), (&FORGOTTEN_MAX, Type::INT8)],
    )
    .await?;
    Ok(())
}
