//! Reads from a PostgreSQL store: the head, the full state, the change log and lists. Every answer is checked as it is read.
//!
//! No row is skipped: a row that cannot be decoded, a gap or a wrong hash fails the whole answer. Look next at `super::write`.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};

use super::connection::{PostgresConnection, QueryError, SqlParameter};
use super::row_keys::{document_key, encode_target};
use super::server_checks::DurabilitySettings;
use super::settings::Durability;
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{ActRow, DocumentKey, DocumentOrigin, DocumentRow, RevocationRow, RevocationTarget};
use crate::store::hash_chain::GENESIS;
use crate::store::write_rules::{self, CHANGES_BYTES_MAX, CHANGES_COMMITS_MAX, REVOCATIONS_LISTED_MAX};
use crate::store::{CommitMetadata, CommitRow, DocumentList, Error, RevocationPage, Settings, StoreState, StoredDocument};

/// How long the answer to a small query may take, and the first row of a query that sorts nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the next row may take. One row of the change log may be as large as a commit.
const ROW_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the first row of a full list may take, because the server may have to sort all rows first.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);

/// The values against which every answer is checked.
#[derive(Clone, Debug)]
pub(super) struct ExpectedStore {
    /// The history that was opened; `None` while the store is being opened.
    pub(super) history: Option<HistoryId>,
    pub(super) durability: Durability,
    pub(super) store_url: String,
}

/// The single rows of the tables `head` and `meta`, and the server's clock.
pub(super) struct PostgresHead {
    pub(super) revision: Revision,
    pub(super) hash: [u8; 32],
    pub(super) digest: StateDigest,
    pub(super) floor: u64,
    pub(super) revocations: u64,
    pub(super) settings: Settings,
    /// Number of the newest revision that changed a document.
    pub(super) documents_number: u64,
    /// Every `jti` that the store has forgotten had expired by then.
    pub(super) jtis_forgotten_unix_s: Option<i64>,
    /// The present time, by the server's clock.
    pub(super) unix_ms: i64,
}

/// Reads the head. With `locked`, it also locks the head until the transaction ends.
///
/// The clock is read after the lock is held, so that the times of commits are in their order.
pub(super) async fn read_head(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    locked: bool,
) -> Result<PostgresHead, QueryError> {
    let lock = if locked { "FOR UPDATE" } else { "" };
    let sql = format!(
        "WITH h AS MATERIALIZED (SELECT * FROM portcullis.head {lock})
         SELECT m.history, h.number, h.hash, h.digest, h.floor, h.revocations, m.iat_skew_s, m.freshness_bound_ms, h.documents_number,
             h.jtis_forgotten_unix_s, (extract(epoch FROM clock_timestamp()) * 1000)::int8, {}
         FROM h JOIN portcullis.meta m USING (id)",
        DurabilitySettings::COLUMNS
    );
    let row = connection.query_row(&sql, &[]).await?.ok_or_else(|| corrupt_error("the head is missing".to_owned()))?;
    parse_head_row(&row, expected)
}

/// Parses a row of the columns of `head`, and checks it against the expected store.
fn parse_head_row(row: &Row, expected: &ExpectedStore) -> Result<PostgresHead, QueryError> {
    // A server's settings can change while it runs, and a pooler may lead to a server with other settings.
    DurabilitySettings::from_row(row, 11)?.check_claim(expected.durability, &expected.store_url)?;
    let revision = Revision { history: HistoryId::new(read_text(row, 0)?), number: read_u64(row, 1)? };
    if expected.history.as_ref().is_some_and(|history| *history != revision.history) {
        return Err(Error::Replaced(format!(
            "the store `{}` is now of history `{}`: put the right one back, or have this one adopted",
            expected.store_url, revision.history
        ))
        .into());
    }
    Ok(PostgresHead {
        revision,
        hash: read_hash(row, 2)?,
        digest: parse_digest(read_text(row, 3)?)?,
        floor: read_u64(row, 4)?,
        revocations: read_u64(row, 5)?,
        settings: Settings { iat_skew_s: row.try_get(6)?, freshness_bound_ms: read_u64(row, 7)? },
        documents_number: read_u64(row, 8)?,
        jtis_forgotten_unix_s: row.try_get(9)?,
        unix_ms: row.try_get(10)?,
    })
}

/// Reads the full state. The transaction must have one view.
pub(super) async fn load_state(connection: &PostgresConnection, expected: &ExpectedStore) -> Result<StoreState, QueryError> {
    let head = with_timeout(ROW_TIMEOUT, read_head(connection, expected, false)).await?;
    let number = head.revision.number;
    if with_timeout(ROW_TIMEOUT, read_log_hash(connection, number)).await? != Some(head.hash) {
        return Err(corrupt_error(format!("revision {number} of the change log is not the one that the head names")));
    }
    let documents = read_documents(connection, None).await?;
    let sql = format!("SELECT {REVOCATION_COLUMNS} FROM portcullis.revocations");
    let revocations =
        stream_rows_into(write_rules::rows_with_capacity(head.revocations), connection, &sql, &[], parse_revocation_row).await?;
    let PostgresHead { revision, hash, digest, settings, .. } = head;
    Ok(StoreState { revision, hash, digest, settings, documents, revocations })
}

/// Reads the commits after `after`, up to a head that was read, and checks them against each other. The log only grows, so a
/// later read returns the same rows.
pub(super) async fn read_log(
    connection: &PostgresConnection,
    after: u64,
    head: &PostgresHead,
) -> Result<Vec<CommitRow>, QueryError> {
    let number = head.revision.number;
    if after < head.floor {
        return Err(Error::BelowFloor { floor: head.floor }.into());
    }
    let missing = |number: u64| corrupt_error(format!("revision {number} is missing from the change log"));
    let mut previous =
        (after, with_timeout(ANSWER_TIMEOUT, read_log_hash(connection, after)).await?.ok_or_else(|| missing(after))?);
    let sql = "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM (
            SELECT *, sum(octet_length(changes)) OVER (ORDER BY number) - octet_length(changes) AS before
            FROM (SELECT * FROM portcullis.log WHERE number > $1 AND number <= $2 ORDER BY number LIMIT $3) page
        ) sized WHERE before < $4 ORDER BY number";
    let parameters = [to_i64(after)?, to_i64(number)?, to_i64(CHANGES_COMMITS_MAX)?, to_i64(CHANGES_BYTES_MAX)?];
    let parameters: Vec<SqlParameter<'_>> = parameters.iter().map(|value| (value as _, Type::INT8)).collect();
    let mut rows = pin!(with_timeout(ANSWER_TIMEOUT, connection.query_stream(sql, &parameters)).await?);
    let (mut commits, mut bytes) = (Vec::new(), 0usize);
    while let Some(row) = with_timeout(ROW_TIMEOUT, rows.try_next()).await? {
        let (commit, size) = parse_commit_row(&row)?;
        commit.verify_after(previous.0, &previous.1)?;
        previous = (commit.number, commit.hash);
        commits.push(commit);
        bytes = bytes.saturating_add(size);
    }
    let ended_early = bytes >= CHANGES_BYTES_MAX || commits.len() >= CHANGES_COMMITS_MAX;
    if previous.0 < number && !ended_early {
        return Err(missing(previous.0.saturating_add(1)));
    }
    Ok(commits)
}

pub(super) async fn list_documents(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    kind: Option<&str>,
) -> Result<DocumentList, QueryError> {
    let revision = read_head(connection, expected, false).await?.revision;
    Ok(DocumentList { revision, documents: read_documents(connection, kind).await? })
}

/// Lists the revocations that changed last, newest first.
pub(super) async fn list_revocations(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    limit: usize,
) -> Result<RevocationPage, QueryError> {
    let head = read_head(connection, expected, false).await?;
    let sql = format!("SELECT {REVOCATION_COLUMNS} FROM portcullis.revocations ORDER BY revision DESC, target LIMIT $1");
    let limit = to_i64(limit.min(REVOCATIONS_LISTED_MAX))?;
    let rows = stream_rows(connection, &sql, &[(&limit, Type::INT8)], parse_revocation_row).await?;
    let sql = "SELECT log.number, log.unix_ms, acts.act FROM portcullis.log LEFT JOIN portcullis.acts USING (number) WHERE log.number IN (
            SELECT revision FROM portcullis.revocations ORDER BY revision DESC, target LIMIT $1)";
    let commits = stream_rows(connection, sql, &[(&limit, Type::INT8)], parse_commit_metadata).await?.into_iter().collect();
    Ok(RevocationPage { revision: head.revision, rows, total: head.revocations, commits })
}

/// Parses the time and the operators of a commit.
fn parse_commit_metadata(row: &Row) -> Result<(u64, CommitMetadata), QueryError> {
    let number = read_u64(row, 0)?;
    let parse = |text: &str| {
        serde_json::from_str::<ActRow>(text)
            .map_err(|error| corrupt_error(format!("the act of revision {number} cannot be understood: {error}")))
    };
    let operators = row.try_get::<_, Option<&str>>(2)?.map(parse).transpose()?.map(|act| act.operators).unwrap_or_default();
    Ok((number, CommitMetadata { unix_ms: row.try_get(1)?, operators }))
}

/// The existing documents under these keys.
pub(super) async fn documents_by_key(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    keys: &[DocumentKey],
) -> Result<DocumentList, QueryError> {
    let revision = read_head(connection, expected, false).await?.revision;
    let names: Vec<_> = keys.iter().map(document_key).collect();
    let sql = format!("SELECT {DOCUMENT_COLUMNS} FROM portcullis.documents WHERE key = ANY ($1) ORDER BY kind, id");
    Ok(DocumentList {
        revision,
        documents: stream_rows(connection, &sql, &[(&names, Type::BYTEA_ARRAY)], parse_document_row).await?,
    })
}

/// The existing revocations of these targets.
pub(super) async fn revocations_by_target(
    connection: &PostgresConnection,
    targets: &[RevocationTarget],
) -> Result<Vec<RevocationRow>, QueryError> {
    if targets.is_empty() {
        return Ok(vec![]);
    }
    let keys = targets.iter().map(|target| Ok(encode_target(target)?.0)).collect::<Result<Vec<_>, Error>>()?;
    let sql = format!("SELECT {REVOCATION_COLUMNS} FROM portcullis.revocations WHERE key = ANY ($1)");
    stream_rows(connection, &sql, &[(&keys, Type::BYTEA_ARRAY)], parse_revocation_row).await
}

/// The revocations that expire before a second, at most `limit`, the earliest expiry first.
pub(super) async fn expired_revocations(
    connection: &PostgresConnection,
    before_unix_s: i64,
    limit: usize,
) -> Result<Vec<RevocationRow>, QueryError> {
    let sql = format!(
        "SELECT {REVOCATION_COLUMNS} FROM portcullis.revocations WHERE expires_at_unix_s < $1 ORDER BY expires_at_unix_s, target LIMIT $2"
    );
    stream_rows(connection, &sql, &[(&before_unix_s, Type::INT8), (&to_i64(limit)?, Type::INT8)], parse_revocation_row).await
}

async fn read_documents(connection: &PostgresConnection, kind: Option<&str>) -> Result<Vec<StoredDocument>, QueryError> {
    let sql =
        format!("SELECT {DOCUMENT_COLUMNS} FROM portcullis.documents WHERE $1::text IS NULL OR kind = $1 ORDER BY kind, id");
    stream_rows(connection, &sql, &[(&kind, Type::TEXT)], parse_document_row).await
}

/// The columns of [`parse_document_row`].
pub(super) const DOCUMENT_COLUMNS: &str = "kind, id, json, path, line, origin, revision";
/// The columns of [`parse_revocation_row`].
pub(super) const REVOCATION_COLUMNS: &str = "target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision";

/// Reads all rows of a query and parses each as it comes.
pub(super) async fn stream_rows<T>(
    connection: &PostgresConnection,
    sql: &str,
    parameters: &[SqlParameter<'_>],
    parse: fn(&Row) -> Result<T, QueryError>,
) -> Result<Vec<T>, QueryError> {
    stream_rows_into(Vec::new(), connection, sql, parameters, parse).await
}

async fn stream_rows_into<T>(
    mut found: Vec<T>,
    connection: &PostgresConnection,
    sql: &str,
    parameters: &[SqlParameter<'_>],
    parse: fn(&Row) -> Result<T, QueryError>,
) -> Result<Vec<T>, QueryError> {
    let mut rows = pin!(with_timeout(LIST_TIMEOUT, connection.query_stream(sql, parameters)).await?);
    while let Some(row) = with_timeout(ROW_TIMEOUT, rows.try_next()).await? {
        found.push(parse(&row)?);
    }
    Ok(found)
}

/// Awaits one step of a long answer. A broken network is noticed after the limit of one step, which is much shorter than the
/// limit of the whole answer.
async fn with_timeout<T, E>(limit: Duration, step: impl Future<Output = Result<T, E>>) -> Result<T, QueryError>
where
    QueryError: From<E>,
{
    let late = |_| Error::Unavailable(format!("the store stopped in the middle of an answer, for {} ms", limit.as_millis()));
    Ok(tokio::time::timeout(limit, step).await.map_err(late)??)
}

pub(super) fn parse_document_row(row: &Row) -> Result<StoredDocument, QueryError> {
    let key = DocumentKey { kind: row.try_get(0)?, id: row.try_get(1)? };
    let origin = match read_text(row, 5)? {
        "folder" => DocumentOrigin::Folder,
        "api" => DocumentOrigin::Api,
        other => return Err(corrupt_error(format!("the origin `{other}` of document `{} {}` is none", key.kind, key.id))),
    };
    let line = u32::try_from(row.try_get::<_, i64>(4)?).map_err(|_| corrupt_error("a line is no line number".to_owned()))?;
    let document = DocumentRow { key, json: row.try_get(2)?, path: row.try_get(3)?, line, origin };
    Ok(StoredDocument { row: document, revision: read_u64(row, 6)? })
}

pub(super) fn parse_revocation_row(row: &Row) -> Result<RevocationRow, QueryError> {
    let name = read_text(row, 0)?;
    let target: RevocationTarget = serde_json::from_str(name)
        .map_err(|error| corrupt_error(format!("the target `{name}` of a revocation is none: {error}")))?;
    Ok(RevocationRow {
        target,
        dead: row.try_get(1)?,
        suspended: row.try_get(2)?,
        watermark_unix_s: row.try_get(3)?,
        expires_at_unix_s: row.try_get(4)?,
        reason: row.try_get(5)?,
        revision: read_u64(row, 6)?,
    })
}

/// Parses a row of the log. Returns it with the size of its stored changes.
pub(super) fn parse_commit_row(row: &Row) -> Result<(CommitRow, usize), QueryError> {
    let number = read_u64(row, 0)?;
    let changes: &[u8] = read_column(row, 5)?;
    let size = changes.len();
    let changes = serde_json::from_slice(changes)
        .map_err(|error| corrupt_error(format!("revision {number} of the change log cannot be understood: {error}")))?;
    let digest = parse_digest(read_text(row, 3)?)?;
    let (previous_hash, hash) = (read_hash(row, 1)?, read_hash(row, 2)?);
    Ok((CommitRow { number, previous_hash, hash, digest, unix_ms: row.try_get(4)?, changes }, size))
}

/// The hash of a revision in the change log; `None` if the log does not hold it.
pub(super) async fn read_log_hash(connection: &PostgresConnection, number: u64) -> Result<Option<[u8; 32]>, QueryError> {
    if number == 0 {
        return Ok(Some(GENESIS));
    }
    let row =
        connection.query_row("SELECT hash FROM portcullis.log WHERE number = $1", &[(&to_i64(number)?, Type::INT8)]).await?;
    row.map(|row| read_hash(&row, 0)).transpose()
}

/// Converts a number to the 63 bits that PostgreSQL stores.
pub(super) fn to_i64(number: impl TryInto<i64>) -> Result<i64, Error> {
    number.try_into().map_err(|_| Error::Rejected("a number is above 2^63 - 1".to_owned()))
}

pub(super) fn read_u64(row: &Row, column: usize) -> Result<u64, QueryError> {
    let stored: i64 = row.try_get(column)?;
    stored.try_into().map_err(|_| corrupt_error(format!("the number {stored} is below zero")))
}

pub(super) fn read_hash(row: &Row, column: usize) -> Result<[u8; 32], QueryError> {
    read_column::<&[u8]>(row, column)?.try_into().map_err(|_| corrupt_error("a hash has not 32 bytes".to_owned()))
}

pub(super) fn read_text(row: &Row, column: usize) -> Result<&str, QueryError> {
    read_column(row, column)
}

fn read_column<'a, T: FromSql<'a>>(row: &'a Row, column: usize) -> Result<T, QueryError> {
    Ok(row.try_get(column)?)
}

fn parse_digest(text: &str) -> Result<StateDigest, QueryError> {
    StateDigest::from_hex(text).ok_or_else(|| corrupt_error(format!("`{text}` is not a digest")))
}

pub(super) fn corrupt_error(what: String) -> QueryError {
    Error::Corrupt(what).into()
}
