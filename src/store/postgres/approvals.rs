//! Approvals in a PostgreSQL store: one row each, stored as JSON beside the columns by which it is found.
//!
//! [`crate::store::approvals`] holds the rules for a row. Here, rows are locked before they are read, in the order of their
//! digests, which excludes deadlocks. Requests for approvals take turns across the fleet, so that quotas hold and two replicas
//! never insert two rows for one call. Look next at `super::uses`, which runs many requests in one transaction.

use std::collections::{BTreeMap, BTreeSet};

use ring::digest::{SHA256, digest};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::link::{Fault, Link, Parameter};
use super::read::{self, Expected, corrupt, signed, text, unsigned};
use crate::model::approval::{ApprovalFilter, ApprovalRow, Approvals, AskApproval, AskOutcome, Waiting};
use crate::model::limits::APPROVALS_LISTED_MAX;
use crate::model::records::Target;
use crate::store::approvals::{self, Asking};
use crate::store::{Error, signers};

/// Rows that one request for an approval removes. It is more than a request adds, so that old rows do not accumulate.
const FORGOTTEN_MAX: i64 = 64;
/// The advisory lock of requests for approvals: `Ptap`.
const TURN_LOCK: i64 = 0x5074_6170;

/// Waits for the lock of requests for approvals, and deletes rows that may be forgotten: more than the requests add.
pub(super) async fn take_turn(link: &Link, requests: usize, unix_ms: i64) -> Result<(), Fault> {
    link.execute("SELECT pg_advisory_xact_lock($1)", &[(&TURN_LOCK, Type::INT8)]).await?;
    forget(link, unix_ms, FORGOTTEN_MAX.saturating_mul(signed(requests)?)).await
}

/// Stores that a call asks for an approval. The caller must hold the lock of requests; `rows` holds the existing row of the call.
pub(super) async fn ask(
    link: &Link,
    rows: &mut BTreeMap<String, ApprovalRow>,
    request: &AskApproval,
    unix_ms: i64,
) -> Result<AskOutcome, Fault> {
    let row = match approvals::ask(rows.get(&request.call.digest).cloned(), request, unix_ms) {
        Asking::Same(row) => {
            // An approval whose key was revoked waits again, so the row is written back.
            put(link, &[&row]).await?;
            row
        }
        Asking::Put { row, is_new } => {
            if is_new && let Some(share) = waiting_beside(link, &row, unix_ms).await?.used_up() {
                return Ok(AskOutcome::OverQuota(share));
            }
            put(link, &[&row]).await?;
            rows.insert(request.call.digest.clone(), row.clone());
            row
        }
    };
    Ok(AskOutcome::Stands(Box::new(row)))
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
    // A digest is hexadecimal, so a text that the engine cannot store names no approval.
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

/// Locks and reads the existing rows of these digests, without the approvals whose key was revoked in the meantime. The locks
/// last until the transaction ends.
pub(super) async fn locked(link: &Link, digests: &[&str]) -> Result<BTreeMap<String, ApprovalRow>, Fault> {
    let mut rows = read_locked(link, digests).await?;
    take_back(link, rows.values_mut()).await?;
    Ok(rows)
}

/// Withdraws approvals whose key was revoked in the meantime. Returns whether there were any.
async fn take_back<'a>(link: &Link, rows: impl Iterator<Item = &'a mut ApprovalRow>) -> Result<bool, Fault> {
    let rows: Vec<&mut ApprovalRow> = rows.collect();
    let keys: BTreeSet<&str> = rows.iter().flat_map(|row| approvals::keys_of(row)).collect();
    let targets: Vec<Target> = keys.into_iter().map(signers::target).collect();
    let revoked = read::revocations_of(link, &targets).await?;
    let revoked: BTreeSet<Target> =
        revoked.into_iter().filter(|row| signers::is_revoked(Some(row))).map(|row| row.target).collect();
    let is_revoked = |key: &str| revoked.contains(&signers::target(key));
    let mut taken = false;
    for row in rows {
        taken |= approvals::take_back(row, is_revoked);
    }
    Ok(taken)
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

/// Writes rows, replacing those with the same digests.
pub(super) async fn put(link: &Link, rows: &[&ApprovalRow]) -> Result<(), Fault> {
    if rows.is_empty() {
        return Ok(());
    }
    let json = |row: &&ApprovalRow| serde_json::to_string(row);
    let jsons = rows.iter().map(json).collect::<Result<Vec<_>, _>>();
    let jsons = jsons.map_err(|error| Error::Rejected(format!("the approval cannot be stored: {error}")))?;
    let digests: Vec<&str> = rows.iter().map(|row| row.call.digest.as_str()).collect();
    let leaves: Vec<Vec<u8>> = rows.iter().map(|row| leaf_key(row.call.agents.last().map_or("", String::as_str))).collect();
    let askers: Vec<Vec<u8>> = rows.iter().map(|row| user_key(row)).collect();
    let waiting: Vec<bool> = rows.iter().map(|row| approvals::is_waiting(row)).collect();
    let asked: Vec<i64> = rows.iter().map(|row| row.asked_at_unix_ms).collect();
    let expire: Vec<i64> = rows.iter().map(|row| row.expires_at_unix_ms()).collect();
    let forget: Vec<i64> = rows.iter().map(|row| approvals::kept_until_unix_ms(row)).collect();
    link.execute(
        "INSERT INTO portcullis.approvals (digest, leaf, asker, waiting, asked_unix_ms, expires_unix_ms, forget_unix_ms, approval)
         SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8)
         ON CONFLICT (digest) DO UPDATE SET leaf = excluded.leaf, asker = excluded.asker, waiting = excluded.waiting,
         asked_unix_ms = excluded.asked_unix_ms, expires_unix_ms = excluded.expires_unix_ms,
         forget_unix_ms = excluded.forget_unix_ms, approval = excluded.approval",
        &[
            (&digests, Type::TEXT_ARRAY),
            (&leaves, Type::BYTEA_ARRAY),
            (&askers, Type::BYTEA_ARRAY),
            (&waiting, Type::BOOL_ARRAY),
            (&asked, Type::INT8_ARRAY),
            (&expire, Type::INT8_ARRAY),
            (&forget, Type::INT8_ARRAY),
            (&jsons, Type::TEXT_ARRAY),
        ],
    )
    .await?;
    Ok(())
}

fn approval(row: &Row, column: usize) -> Result<ApprovalRow, Fault> {
    serde_json::from_str(text(row, column)?).map_err(|error| corrupt(format!("an approval cannot be understood: {error}")))
}

/// The key by which the rows of a leaf agent are found. It is a hash, because names may be longer than an index permits.
fn leaf_key(leaf: &str) -> Vec<u8> {
    digest(&SHA256, leaf.as_bytes()).as_ref().to_vec()
}

/// The key by which the rows of a user are found.
fn user_key(row: &ApprovalRow) -> Vec<u8> {
    digest(&SHA256, format!("{}\0{}", row.call.issuer, row.call.subject).as_bytes()).as_ref().to_vec()
}

/// Counts the calls that wait beside a new one.
async fn waiting_beside(link: &Link, row: &ApprovalRow, unix_ms: i64) -> Result<Waiting, Fault> {
    let sql = "SELECT count(*) FILTER (WHERE leaf = $1 AND asker = $2), count(*) FILTER (WHERE leaf = $1),
             count(*) FILTER (WHERE asker = $2), count(*)
         FROM portcullis.approvals WHERE waiting AND expires_unix_ms > $3";
    let leaf = leaf_key(row.call.agents.last().map_or("", String::as_str));
    let parameters: [Parameter<'_>; 3] = [(&leaf, Type::BYTEA), (&user_key(row), Type::BYTEA), (&unix_ms, Type::INT8)];
    let Some(row) = link.row(sql, &parameters).await? else { return Ok(Waiting::default()) };
    let count = |column| unsigned(&row, column);
    Ok(Waiting { of_both: count(0)?, of_agent: count(1)?, of_user: count(2)?, total: count(3)? })
}

/// Deletes a bounded number of rows that may be forgotten. Locked rows are skipped.
async fn forget(link: &Link, unix_ms: i64, rows_max: i64) -> Result<(), Fault> {
    link.execute(
        "DELETE FROM portcullis.approvals WHERE digest IN (
             SELECT digest FROM portcullis.approvals WHERE forget_unix_ms <= $1 ORDER BY forget_unix_ms LIMIT $2
             FOR UPDATE SKIP LOCKED)",
        &[(&unix_ms, Type::INT8), (&rows_max, Type::INT8)],
    )
    .await?;
    Ok(())
}
