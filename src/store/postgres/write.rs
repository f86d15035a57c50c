//! Commits to a PostgreSQL store, one revision after the other through a lock on the row of the head.
//!
//! Look next at `super::commit_rows`, which computes how a request changes its rows, and at `super::ledger` for requests that
//! make no revision.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;

use super::approvals;
use super::commit_rows::{CommitRowSet, TouchedRows};
use super::connection::{NOTIFY_CHANNEL, PostgresConnection, QueryError};
use super::lineage;
use super::pending_acts;
use super::read::{self, ExpectedStore, PostgresHead, to_i64};
use super::row_keys::encode_target;
use super::staging::{self, PreparedCommit, ROWS_PER_STATEMENT, StagedCommit};
use crate::model::approval::ApprovalRow;
use crate::model::revision::Revision;
use crate::model::rows::{ActRow, RevocationRow, RowChange, StoreWrite};
use crate::store::hash_chain::{commit_hash, encode_changes};
use crate::store::{CommitOutcome, CommitRequest, Error, commit_rows};

/// Expired keys that one request removes. It is more than a request adds, so that expired keys do not accumulate.
const FORGOTTEN_KEYS_MAX: i64 = 64;

/// Commits a request. Returns [`QueryError::HeadMoved`] if the request must be tried again because its staged commit no longer fits.
///
/// INVARIANT: while the head is locked, nothing long is sent or received. Therefore a client that stops is silent, and the server
/// ends the transaction of a silent client. Approvals are locked before the head, so that nobody waits for an approval while
/// holding the head.
pub(super) async fn commit_request(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    request: &CommitRequest,
    unix_ms: Option<i64>,
    notify: bool,
) -> Result<CommitOutcome, QueryError> {
    let mut staged = StagedCommit::stage_request(connection, expected, request, unix_ms).await?;
    let approved = answered_digests(request);
    let approvals = approvals::lock_approvals(connection, &approved).await?;
    let head = read::read_head(connection, expected, true).await?;
    let unix_ms = unix_ms.unwrap_or(head.unix_ms);
    if staged.as_ref().is_some_and(|staged| !staged.documents_unchanged(&head)) {
        return Err(QueryError::HeadMoved);
    }
    let number = head.revision.number.checked_add(1).ok_or_else(|| Error::Rejected("no revision number is left".to_owned()))?;
    let ready = staged.as_mut().and_then(|staged| staged.take_prepared(&head));
    let mut rows = match &ready {
        Some(_) => None,
        None => Some(read_touched_rows(connection, request, staged.as_ref(), approvals, (&head, number, unix_ms)).await?),
    };
    if let Some(rows) = &rows {
        rows.check_expectations(request, &head)?;
    }
    let forgotten = match &request.act {
        Some(act) => record_act(connection, act, number, &head, unix_ms).await?,
        None => head.jtis_forgotten_unix_s,
    };
    let (rows, changes, stored, revision) = match (ready, rows.take()) {
        (Some(PreparedCommit { rows, changes, stored }), _) => {
            (rows, changes, stored, Revision { number, ..head.revision.clone() })
        }
        (None, Some(mut rows)) => {
            let (changes, revision) = apply_writes(connection, request, &head, &mut rows, unix_ms).await?;
            let stored = encode_changes(&changes)?;
            (rows, changes, stored, revision)
        }
        (None, None) => return Err(QueryError::HeadMoved),
    };
    rows.check_signer_left(request)?;
    if staged.as_ref().is_some_and(|staged| !staged.changes_match(&stored)) {
        return Err(QueryError::HeadMoved);
    }
    if let Some(staged) = &staged {
        staged.move_documents(connection, number).await?;
    }
    store_revocations(connection, &rows).await?;
    for (act, row) in rows.pending_to_store() {
        pending_acts::put_pending_act(connection, act, row, unix_ms).await?;
    }
    approvals::put_approvals(connection, &rows.approvals_to_store()).await?;
    let made = NewRevision {
        head: &head,
        revision: &revision,
        of_documents: changes.iter().any(RowChange::changes_document),
        stored: &stored,
        digest: rows.sums.digest.to_hex(),
        revocations_total: rows.sums.revocations_total,
        jtis_forgotten_unix_s: forgotten,
        unix_ms,
    };
    move_head(connection, &made, staged.as_ref()).await?;
    if notify {
        connection
            .execute("SELECT pg_notify($1, $2)", &[(&NOTIFY_CHANNEL, Type::TEXT), (&number.to_string(), Type::TEXT)])
            .await?;
    }
    Ok(CommitOutcome { revision, unix_ms, changes, freshness_bound_ms: head.settings.freshness_bound_ms })
}

/// A revision that is computed but not in the log yet.
struct NewRevision<'a> {
    head: &'a PostgresHead,
    revision: &'a Revision,
    of_documents: bool,
    stored: &'a [u8],
    digest: String,
    revocations_total: u64,
    jtis_forgotten_unix_s: Option<i64>,
    unix_ms: i64,
}

/// Appends a revision to the log and moves the head to it.
async fn move_head(
    connection: &PostgresConnection,
    made: &NewRevision<'_>,
    staged: Option<&StagedCommit>,
) -> Result<(), QueryError> {
    let NewRevision { head, revision, of_documents, stored, digest, revocations_total, jtis_forgotten_unix_s, unix_ms } = made;
    let hash = commit_hash(&head.hash, revision.number, stored);
    let number = to_i64(revision.number)?;
    let documents_number = if *of_documents { revision.number } else { head.documents_number };
    let (staged_id, sent) = match staged.filter(|staged| staged.has_changes()) {
        Some(staged) => (Some(staged.id()), None),
        None => (None, Some(*stored)),
    };
    connection
        .execute(
            "INSERT INTO portcullis.log (number, previous_hash, hash, digest, unix_ms, changes, of_documents)
         SELECT $1, $2, $3, $4, $5,
             coalesce($6, (SELECT changes FROM portcullis.staged WHERE stage = $8 AND changes IS NOT NULL)), $7",
            &[
                (&number, Type::INT8),
                (&head.hash.as_slice(), Type::BYTEA),
                (&hash.as_slice(), Type::BYTEA),
                (digest, Type::TEXT),
                (unix_ms, Type::INT8),
                (&sent, Type::BYTEA),
                (of_documents, Type::BOOL),
                (&staged_id, Type::TEXT),
            ],
        )
        .await?;
    if let Some(staged) = staged {
        staged.delete_staged_rows(connection).await?;
    }
    let moved = connection
        .execute(
            "UPDATE portcullis.head SET number = $1, hash = $2, digest = $3, revocations = $4, documents_number = $5,
                 jtis_forgotten_unix_s = $6 WHERE number = $1 - 1 AND (SELECT history FROM portcullis.meta) = $7",
            &[
                (&number, Type::INT8),
                (&hash.as_slice(), Type::BYTEA),
                (digest, Type::TEXT),
                (&to_i64(*revocations_total)?, Type::INT8),
                (&to_i64(documents_number)?, Type::INT8),
                (jtis_forgotten_unix_s, Type::INT8),
                (&revision.history.as_str(), Type::TEXT),
            ],
        )
        .await?;
    // A commit that waited for the lock on the head may have read the history from before an adoption.
    match moved {
        1 => Ok(()),
        _ => Err(Error::Unavailable("the store was adopted meanwhile, nothing was written: ask again".to_owned()).into()),
    }
}

/// Applies the writes in order. Returns the changes and the new revision.
async fn apply_writes(
    connection: &PostgresConnection,
    request: &CommitRequest,
    head: &PostgresHead,
    rows: &mut CommitRowSet,
    unix_ms: i64,
) -> Result<(Vec<RowChange>, Revision), QueryError> {
    let mut revision = Revision { number: head.revision.number.saturating_add(1), ..head.revision.clone() };
    let mut changes = Vec::with_capacity(request.writes.len());
    for write in &request.writes {
        match write {
            StoreWrite::Prune { before_unix_s, .. } => {
                changes.extend(rows.prune((*before_unix_s).min(unix_ms.div_euclid(1_000)))?)
            }
            StoreWrite::Merge(merge) => {
                changes.extend(commit_rows::merge(rows, merge, &head.revision.history)?);
                lineage::record_merge(connection, merge, &changes, unix_ms).await?;
            }
            StoreWrite::Adopt { reason } => {
                changes.push(commit_rows::void_roots(rows, reason)?);
                revision = lineage::begin_history(connection, head, revision.number, unix_ms).await?;
            }
            write => changes.extend(commit_rows::apply_write(rows, write)?),
        }
    }
    Ok((changes, revision))
}

/// The digests of the approvals that a request answers.
fn answered_digests(request: &CommitRequest) -> Vec<&str> {
    let mut digests = Vec::new();
    for write in &request.writes {
        if let StoreWrite::Approve { digest, .. } | StoreWrite::Refuse { digest, .. } = write {
            digests.push(digest.as_str());
        }
    }
    digests
}

/// Reads every row that the request writes, or has an expectation of. The documents were read before the lock, and are unchanged.
async fn read_touched_rows(
    connection: &PostgresConnection,
    request: &CommitRequest,
    staged: Option<&StagedCommit>,
    approvals: BTreeMap<String, ApprovalRow>,
    (head, number, unix_ms): (&PostgresHead, u64, i64),
) -> Result<CommitRowSet, QueryError> {
    let expiring = staged.map(|staged| staged.expiring.as_slice()).unwrap_or_default();
    let (revocations, pending) = staging::read_revocations(connection, request, expiring).await?;
    let documents = staged.map(|staged| staged.documents.clone()).unwrap_or_default();
    Ok(CommitRowSet::new(head, number, unix_ms, TouchedRows { documents, revocations, approvals, pending }))
}

/// Writes and deletes the revocations that the commit changed.
async fn store_revocations(connection: &PostgresConnection, rows: &CommitRowSet) -> Result<(), QueryError> {
    let remove = rows.revocations_to_remove();
    for remove in remove.chunks(ROWS_PER_STATEMENT) {
        let keys = remove.iter().map(|target| Ok(encode_target(target)?.0)).collect::<Result<Vec<_>, Error>>()?;
        connection.execute("DELETE FROM portcullis.revocations WHERE key = ANY ($1)", &[(&keys, Type::BYTEA_ARRAY)]).await?;
    }
    for put in rows.revocations_to_store().chunks(ROWS_PER_STATEMENT) {
        put_revocations(connection, put).await?;
    }
    Ok(())
}

async fn put_revocations(connection: &PostgresConnection, put: &[&RevocationRow]) -> Result<(), QueryError> {
    let names = put.iter().map(|row| encode_target(&row.target)).collect::<Result<Vec<_>, _>>()?;
    let (keys, targets): (Vec<_>, Vec<_>) = names.into_iter().unzip();
    let dead: Vec<_> = put.iter().map(|row| row.dead).collect();
    let suspended: Vec<_> = put.iter().map(|row| row.suspended).collect();
    let watermarks: Vec<_> = put.iter().map(|row| row.watermark_unix_s).collect();
    let expiries: Vec<_> = put.iter().map(|row| row.expires_at_unix_s).collect();
    let reasons: Vec<_> = put.iter().map(|row| row.reason.as_str()).collect();
    let revisions = put.iter().map(|row| to_i64(row.revision)).collect::<Result<Vec<_>, _>>()?;
    connection.execute(
        "INSERT INTO portcullis.revocations (key, target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision)
         SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8)
         ON CONFLICT (key) DO UPDATE SET dead = excluded.dead, suspended = excluded.suspended,
         watermark_unix_s = excluded.watermark_unix_s, expires_at_unix_s = excluded.expires_at_unix_s, reason = excluded.reason,
         revision = excluded.revision",
        &[
            (&keys, Type::BYTEA_ARRAY),
            (&targets, Type::TEXT_ARRAY),
            (&dead, Type::BOOL_ARRAY),
            (&suspended, Type::BOOL_ARRAY),
            (&watermarks, Type::INT8_ARRAY),
            (&expiries, Type::INT8_ARRAY),
            (&reasons, Type::TEXT_ARRAY),
            (&revisions, Type::INT8_ARRAY),
        ],
    )
    .await?;
    Ok(())
}

/// Stores an act, and each of its signatures once. Returns the cutoff: every forgotten signature expired by then.
///
/// The cutoff is an expiry that was stored, not the clock. Every signature that expires up to the cutoff counts as used.
/// Therefore a clock that jumps ahead and back admits no signature twice. The lock on the head excludes all other commits.
async fn record_act(
    connection: &PostgresConnection,
    act: &ActRow,
    number: u64,
    head: &PostgresHead,
    unix_ms: i64,
) -> Result<Option<i64>, QueryError> {
    let jtis: Vec<&str> = act.jtis.iter().map(|(jti, _)| jti.as_str()).collect();
    let expiries: Vec<i64> = act.jtis.iter().map(|(_, expires_at_unix_s)| *expires_at_unix_s).collect();
    let used =
        connection.query_rows("SELECT jti FROM portcullis.act_jtis WHERE jti = ANY ($1)", &[(&jtis, Type::TEXT_ARRAY)]).await?;
    let used = used.iter().map(|row| read::read_text(row, 0)).collect::<Result<Vec<_>, _>>()?;
    for (index, (jti, expires_at_unix_s)) in act.jtis.iter().enumerate() {
        let forgotten = head.jtis_forgotten_unix_s.is_some_and(|forgotten| *expires_at_unix_s <= forgotten);
        let twice = jtis.iter().take(index).any(|before| before == jti);
        if forgotten || twice || used.contains(&jti.as_str()) {
            return Err(Error::ActReplayed { jti: jti.clone() }.into());
        }
    }
    connection
        .execute(
            "INSERT INTO portcullis.act_jtis (jti, expires_at_unix_s) SELECT * FROM unnest($1, $2)",
            &[(&jtis, Type::TEXT_ARRAY), (&expiries, Type::INT8_ARRAY)],
        )
        .await?;
    let text = serde_json::to_string(act).map_err(|error| Error::Rejected(format!("the act cannot be stored: {error}")))?;
    connection
        .execute(
            "INSERT INTO portcullis.acts (number, unix_ms, act) VALUES ($1, $2, $3)",
            &[(&to_i64(number)?, Type::INT8), (&unix_ms, Type::INT8), (&text, Type::TEXT)],
        )
        .await?;
    let newest = expiry_cutoff(connection, "act_jtis", unix_ms.div_euclid(1_000), 1).await?;
    if let Some(newest) = newest {
        connection.execute("DELETE FROM portcullis.act_jtis WHERE expires_at_unix_s <= $1", &[(&newest, Type::INT8)]).await?;
    }
    Ok(newest.max(head.jtis_forgotten_unix_s))
}

/// Returns an expiry up to which keys of a table may be removed; `None` if no key has expired. The number of these keys is
/// bounded, but large enough that the table does not grow by the `added` keys.
pub(super) async fn expiry_cutoff(
    connection: &PostgresConnection,
    table: &str,
    unix_s: i64,
    added: usize,
) -> Result<Option<i64>, QueryError> {
    let sql = format!(
        "SELECT max(expires_at_unix_s) FROM (SELECT expires_at_unix_s FROM portcullis.{table} WHERE expires_at_unix_s < $1
             ORDER BY expires_at_unix_s LIMIT $2) expired"
    );
    let limit = FORGOTTEN_KEYS_MAX.saturating_mul(to_i64(added.max(1))?);
    let row = connection.query_row(&sql, &[(&unix_s, Type::INT8), (&limit, Type::INT8)]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?.flatten())
}
