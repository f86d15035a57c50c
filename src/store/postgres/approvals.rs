//! Approvals in a PostgreSQL store: one row each, stored as JSON beside the columns by which it is found.
//!
//! [`crate::store::approval_rules`] holds the rules for a row. Here, rows are locked before they are read, in the order of their
//! digests, which excludes deadlocks. Requests for approvals take turns across the fleet, so that quotas hold and two replicas
//! never insert two rows for one call. Look next at `super::ledger`, which runs many requests in one transaction.

use std::collections::{BTreeMap, BTreeSet};

use ring::digest::{SHA256, digest};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::{PostgresConnection, QueryError, SqlParameter};
use super::read::{self, ExpectedStore, corrupt_error, read_text, read_u64, to_i64};
use crate::model::approval::{
    ApprovalFilter, ApprovalPage, ApprovalRow, ApprovalSubmission, ApprovalSubmissionOutcome, WaitingApprovalCounts,
};
use crate::model::limits::APPROVALS_LISTED_MAX;
use crate::model::rows::RevocationTarget;
use crate::store::approval_rules::{self, AskTransition};
use crate::store::{Error, signers};

/// Rows that one request for an approval removes. It is more than a request adds, so that old rows do not accumulate.
const FORGOTTEN_ROWS_MAX: i64 = 64;
/// The advisory lock of requests for approvals: `Ptap`.
const REQUEST_LOCK: i64 = 0x5074_6170;

/// Waits for the lock of requests for approvals, and deletes rows that may be forgotten: more than the requests add.
pub(super) async fn lock_requests(connection: &PostgresConnection, requests: usize, unix_ms: i64) -> Result<(), QueryError> {
    connection.execute("SELECT pg_advisory_xact_lock($1)", &[(&REQUEST_LOCK, Type::INT8)]).await?;
    forget_approvals(connection, unix_ms, FORGOTTEN_ROWS_MAX.saturating_mul(to_i64(requests)?)).await
}

/// Stores that a call asks for an approval. The caller must hold the lock of requests; `rows` holds the existing row of the call.
pub(super) async fn ask_approval(
    connection: &PostgresConnection,
    rows: &mut BTreeMap<String, ApprovalRow>,
    request: &ApprovalSubmission,
    unix_ms: i64,
) -> Result<ApprovalSubmissionOutcome, QueryError> {
    let row = match approval_rules::ask_approval(rows.get(&request.call.digest).cloned(), request, unix_ms) {
        AskTransition::Unchanged(row) => {
            // An approval whose key was revoked waits again, so the row is written back.
            put_approvals(connection, &[&row]).await?;
            row
        }
        AskTransition::Put { row, is_new } => {
            if is_new && let Some(share) = count_waiting(connection, &row, unix_ms).await?.exceeded_quota() {
                return Ok(ApprovalSubmissionOutcome::OverQuota(share));
            }
            put_approvals(connection, &[&row]).await?;
            rows.insert(request.call.digest.clone(), row.clone());
            row
        }
    };
    Ok(ApprovalSubmissionOutcome::Stored(Box::new(row)))
}

/// Lists rows, the oldest first.
pub(super) async fn list_approvals(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    filter: &ApprovalFilter,
    limit: usize,
    unix_ms: Option<i64>,
) -> Result<ApprovalPage, QueryError> {
    let head = read::read_head(connection, expected, false).await?;
    let unix_ms = unix_ms.unwrap_or(head.unix_ms);
    let (condition, digest) = match filter {
        ApprovalFilter::Waiting => ("waiting AND expires_unix_ms > $2 AND $1 = ''", ""),
        ApprovalFilter::All => ("$1 = '' AND $2 IS NOT NULL", ""),
        ApprovalFilter::Digest(digest) => ("digest = $1 AND $2 IS NOT NULL", digest.as_str()),
    };
    // A digest is hexadecimal, so a text that the engine cannot store names no approval.
    let digest = if digest.contains('\0') { "-" } else { digest };
    let mut parameters: Vec<SqlParameter<'_>> = vec![(&digest, Type::TEXT), (&unix_ms, Type::INT8)];
    let counted =
        connection.query_row(&format!("SELECT count(*) FROM portcullis.approvals WHERE {condition}"), &parameters).await?;
    let total = counted.map_or(Ok(0), |row| read_u64(&row, 0))?;
    let sql = format!("SELECT approval FROM portcullis.approvals WHERE {condition} ORDER BY asked_unix_ms, digest LIMIT $3");
    let limit = to_i64(limit.min(APPROVALS_LISTED_MAX))?;
    parameters.push((&limit, Type::INT8));
    let mut rows = read::stream_rows(connection, &sql, &parameters, |row| parse_approval(row, 0)).await?;
    withdraw_revoked(connection, rows.iter_mut()).await?;
    Ok(ApprovalPage { rows, total, read_at_unix_ms: unix_ms })
}

/// Locks and reads the existing rows of these digests, without the approvals whose key was revoked in the meantime. The locks
/// last until the transaction ends.
pub(super) async fn lock_approvals(
    connection: &PostgresConnection,
    digests: &[&str],
) -> Result<BTreeMap<String, ApprovalRow>, QueryError> {
    let mut rows = select_for_update(connection, digests).await?;
    withdraw_revoked(connection, rows.values_mut()).await?;
    Ok(rows)
}

/// Withdraws approvals whose key was revoked in the meantime. Returns whether there were any.
async fn withdraw_revoked<'a>(
    connection: &PostgresConnection,
    rows: impl Iterator<Item = &'a mut ApprovalRow>,
) -> Result<bool, QueryError> {
    let rows: Vec<&mut ApprovalRow> = rows.collect();
    let keys: BTreeSet<&str> = rows.iter().flat_map(|row| approval_rules::approver_keys(row)).collect();
    let targets: Vec<RevocationTarget> = keys.into_iter().map(signers::key_target).collect();
    let revoked = read::revocations_by_target(connection, &targets).await?;
    let revoked: BTreeSet<RevocationTarget> =
        revoked.into_iter().filter(|row| signers::is_key_revoked(Some(row))).map(|row| row.target).collect();
    let is_revoked = |key: &str| revoked.contains(&signers::key_target(key));
    let mut taken = false;
    for row in rows {
        taken |= approval_rules::withdraw_revoked(row, is_revoked);
    }
    Ok(taken)
}

async fn select_for_update(
    connection: &PostgresConnection,
    digests: &[&str],
) -> Result<BTreeMap<String, ApprovalRow>, QueryError> {
    if digests.is_empty() {
        return Ok(BTreeMap::new());
    }
    let sql = "SELECT digest, approval FROM portcullis.approvals WHERE digest = ANY ($1) ORDER BY digest FOR UPDATE";
    let rows = read::stream_rows(connection, sql, &[(&digests, Type::TEXT_ARRAY)], |row| {
        Ok((read_text(row, 0)?.to_owned(), parse_approval(row, 1)?))
    })
    .await?;
    Ok(rows.into_iter().collect())
}

/// Writes rows, replacing those with the same digests.
pub(super) async fn put_approvals(connection: &PostgresConnection, rows: &[&ApprovalRow]) -> Result<(), QueryError> {
    if rows.is_empty() {
        return Ok(());
    }
    let json = |row: &&ApprovalRow| serde_json::to_string(row);
    let jsons = rows.iter().map(json).collect::<Result<Vec<_>, _>>();
    let jsons = jsons.map_err(|error| Error::Rejected(format!("the approval cannot be stored: {error}")))?;
    let digests: Vec<&str> = rows.iter().map(|row| row.call.digest.as_str()).collect();
    let leaves: Vec<Vec<u8>> = rows.iter().map(|row| leaf_key(row.call.agents.last().map_or("", String::as_str))).collect();
    let askers: Vec<Vec<u8>> = rows.iter().map(|row| user_key(row)).collect();
    let waiting: Vec<bool> = rows.iter().map(|row| approval_rules::is_waiting(row)).collect();
    let asked: Vec<i64> = rows.iter().map(|row| row.asked_at_unix_ms).collect();
    let expire: Vec<i64> = rows.iter().map(|row| row.expires_at_unix_ms()).collect();
    let forget: Vec<i64> = rows.iter().map(|row| approval_rules::kept_until_unix_ms(row)).collect();
    connection.execute(
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

fn parse_approval(row: &Row, column: usize) -> Result<ApprovalRow, QueryError> {
    serde_json::from_str(read_text(row, column)?)
        .map_err(|error| corrupt_error(format!("an approval cannot be understood: {error}")))
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
async fn count_waiting(
    connection: &PostgresConnection,
    row: &ApprovalRow,
    unix_ms: i64,
) -> Result<WaitingApprovalCounts, QueryError> {
    let sql = "SELECT count(*) FILTER (WHERE leaf = $1 AND asker = $2), count(*) FILTER (WHERE leaf = $1),
             count(*) FILTER (WHERE asker = $2), count(*)
         FROM portcullis.approvals WHERE waiting AND expires_unix_ms > $3";
    let leaf = leaf_key(row.call.agents.last().map_or("", String::as_str));
    let parameters: [SqlParameter<'_>; 3] = [(&leaf, Type::BYTEA), (&user_key(row), Type::BYTEA), (&unix_ms, Type::INT8)];
    let Some(row) = connection.query_row(sql, &parameters).await? else { return Ok(WaitingApprovalCounts::default()) };
    let count = |column| read_u64(&row, column);
    Ok(WaitingApprovalCounts { of_user_and_agent: count(0)?, of_agent: count(1)?, of_user: count(2)?, total: count(3)? })
}

/// Deletes a bounded number of rows that may be forgotten. Locked rows are skipped.
async fn forget_approvals(connection: &PostgresConnection, unix_ms: i64, rows_max: i64) -> Result<(), QueryError> {
    connection
        .execute(
            "DELETE FROM portcullis.approvals WHERE digest IN (
             SELECT digest FROM portcullis.approvals WHERE forget_unix_ms <= $1 ORDER BY forget_unix_ms LIMIT $2
             FOR UPDATE SKIP LOCKED)",
            &[(&unix_ms, Type::INT8), (&rows_max, Type::INT8)],
        )
        .await?;
    Ok(())
}
