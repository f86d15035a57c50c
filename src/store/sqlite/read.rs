//! Reads from a SQLite store: the head, the full state, the change log and lists. Each read is one transaction and is checked.
//!
//! No row is skipped: a row that cannot be decoded, a gap or a wrong hash fails the whole answer. Look next at `super::write`.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension, Row};

use super::error::SqliteError;
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{ActRow, DocumentKey, DocumentOrigin, DocumentRow, RevocationRow, RevocationTarget};
use crate::store::hash_chain::GENESIS;
use crate::store::write_rules::{self, CHANGES_BYTES_MAX, CHANGES_COMMITS_MAX, REVOCATIONS_LISTED_MAX};
use crate::store::{
    ChangeLogPage, CommitMetadata, CommitRow, DocumentList, Error, RevocationPage, Settings, StoreState, StoredDocument, signers,
};

/// The single rows of the tables `head` and `meta`.
pub(super) struct SqliteHead {
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
}

/// Reads the head.
pub(super) fn read_head(connection: &Connection) -> Result<SqliteHead, SqliteError> {
    let mut statement = connection.prepare_cached(
        "SELECT history, number, hash, digest, floor, revocations, iat_skew_s, freshness_bound_ms, jtis_forgotten_unix_s,
             documents_number
         FROM head JOIN meta USING (id)",
    )?;
    let (head, digest) = statement.query_one((), |row| {
        let revision = Revision { history: HistoryId::new(row.get::<_, String>(0)?), number: read_u64(row, 1)? };
        let settings = Settings { iat_skew_s: row.get(6)?, freshness_bound_ms: read_u64(row, 7)? };
        let head = SqliteHead {
            revision,
            hash: row.get(2)?,
            digest: StateDigest::default(),
            floor: read_u64(row, 4)?,
            revocations: read_u64(row, 5)?,
            settings,
            jtis_forgotten_unix_s: row.get(8)?,
            documents_number: read_u64(row, 9)?,
        };
        Ok((head, row.get::<_, String>(3)?))
    })?;
    Ok(SqliteHead { digest: parse_digest(&digest)?, ..head })
}

/// Reads the newest revision.
pub(super) fn read_revision(connection: &Connection) -> Result<Revision, SqliteError> {
    let mut statement = connection.prepare_cached("SELECT history, number FROM head JOIN meta USING (id)")?;
    Ok(statement
        .query_one((), |row| Ok(Revision { history: HistoryId::new(row.get::<_, String>(0)?), number: read_u64(row, 1)? }))?)
}

/// Reads the full state, and checks that the head names the newest commit of the log.
pub(super) fn load_state(connection: &Connection) -> Result<StoreState, SqliteError> {
    let head = read_head(connection)?;
    let newest: Option<[u8; 32]> = read_log_hash(connection, head.revision.number)?;
    if newest != Some(head.hash) {
        return Err(corrupt_error(format!(
            "revision {} of the change log is not the one that the head names",
            head.revision.number
        )));
    }
    let documents = list_documents(connection, None)?.documents;
    let mut statement = connection.prepare_cached(
        "SELECT target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision FROM revocations",
    )?;
    let revocations =
        collect_rows_into(write_rules::rows_with_capacity(head.revocations), &mut statement, (), parse_revocation_row)?;
    let SqliteHead { revision, hash, digest, settings, .. } = head;
    Ok(StoreState { revision, hash, digest, settings, documents, revocations })
}

/// Reads the commits after `after`, and checks that they follow each other.
pub(super) fn read_changes(connection: &Connection, after: u64) -> Result<ChangeLogPage, SqliteError> {
    let SqliteHead { revision: Revision { history, number }, hash: head_hash, floor, .. } = read_head(connection)?;
    if number <= after {
        return Ok(ChangeLogPage { history, head: number, head_hash, commits: vec![] });
    }
    if after < floor {
        return Err(Error::BelowFloor { floor }.into());
    }
    let missing = |number: u64| corrupt_error(format!("revision {number} is missing from the change log"));
    let mut previous = (after, read_log_hash(connection, after)?.ok_or_else(|| missing(after))?);
    let mut statement = connection.prepare_cached(
        "SELECT number, previous_hash, hash, digest, unix_ms, changes FROM log WHERE number > ?1 ORDER BY number LIMIT ?2",
    )?;
    let mut rows = statement.query((to_i64(after)?, to_i64(CHANGES_COMMITS_MAX)?))?;
    let (mut commits, mut bytes) = (Vec::new(), 0usize);
    while let Some(row) = rows.next()? {
        let (commit, size) = parse_commit_row(row)?;
        commit.verify_after(previous.0, &previous.1)?;
        previous = (commit.number, commit.hash);
        commits.push(commit);
        bytes = bytes.saturating_add(size);
        if bytes >= CHANGES_BYTES_MAX {
            break;
        }
    }
    let ended_early = bytes >= CHANGES_BYTES_MAX || commits.len() >= CHANGES_COMMITS_MAX;
    if previous.0 < number && !ended_early {
        return Err(missing(previous.0.saturating_add(1)));
    }
    Ok(ChangeLogPage { history, head: number, head_hash, commits })
}

/// Lists all documents, or those of one kind.
pub(super) fn list_documents(connection: &Connection, kind: Option<&str>) -> Result<DocumentList, SqliteError> {
    const COLUMNS: &str = "SELECT kind, id, json, path, line, origin, revision FROM documents";
    let revision = read_revision(connection)?;
    let documents = match kind {
        Some(kind) => {
            let mut statement = connection.prepare_cached(&format!("{COLUMNS} WHERE kind = ?1 ORDER BY id"))?;
            collect_rows(&mut statement, [kind], parse_document_row)?
        }
        None => {
            let mut statement = connection.prepare_cached(&format!("{COLUMNS} ORDER BY kind, id"))?;
            collect_rows(&mut statement, (), parse_document_row)?
        }
    };
    Ok(DocumentList { revision, documents })
}

/// Lists the revocations that changed last, newest first.
pub(super) fn list_revocations(connection: &Connection, limit: usize) -> Result<RevocationPage, SqliteError> {
    let head = read_head(connection)?;
    let mut statement = connection.prepare_cached(
        "SELECT target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision FROM revocations
         ORDER BY revision DESC, target LIMIT ?1",
    )?;
    let rows = collect_rows(&mut statement, [to_i64(limit.min(REVOCATIONS_LISTED_MAX))?], parse_revocation_row)?;
    let mut commits = BTreeMap::new();
    for number in rows.iter().map(|row| row.revision) {
        if let Entry::Vacant(vacant) = commits.entry(number)
            && let Some(committed) = read_commit_metadata(connection, number)?
        {
            vacant.insert(committed);
        }
    }
    Ok(RevocationPage { revision: head.revision, rows, total: head.revocations, commits })
}

/// Reads the time and the operators of a commit; `None` if the log no longer holds the revision.
fn read_commit_metadata(connection: &Connection, number: u64) -> Result<Option<CommitMetadata>, SqliteError> {
    let mut statement =
        connection.prepare_cached("SELECT log.unix_ms, acts.act FROM log LEFT JOIN acts USING (number) WHERE log.number = ?1")?;
    let found = statement.query_one([to_i64(number)?], |row| Ok((row.get(0)?, row.get::<_, Option<String>>(1)?))).optional()?;
    let Some((unix_ms, act)) = found else { return Ok(None) };
    let parse = |text: String| {
        serde_json::from_str::<ActRow>(&text)
            .map_err(|error| corrupt_error(format!("the act of revision {number} cannot be understood: {error}")))
    };
    let operators = act.map(parse).transpose()?.map(|act| act.operators).unwrap_or_default();
    Ok(Some(CommitMetadata { unix_ms, operators }))
}

/// The revocations that expire before a second, at most `limit`, the earliest expiry first.
pub(super) fn expired_revocations(
    connection: &Connection,
    before_unix_s: i64,
    limit: usize,
) -> Result<Vec<RevocationRow>, SqliteError> {
    let mut statement = connection.prepare_cached(
        "SELECT target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision FROM revocations
         WHERE expires_at_unix_s < ?1 ORDER BY expires_at_unix_s, target LIMIT ?2",
    )?;
    collect_rows(&mut statement, (before_unix_s, to_i64(limit)?), parse_revocation_row)
}

/// The existing documents under these keys.
pub(super) fn documents_by_key(connection: &Connection, keys: &[DocumentKey]) -> Result<DocumentList, SqliteError> {
    let revision = read_revision(connection)?;
    let found = keys.iter().collect::<BTreeSet<_>>().into_iter().map(|key| read_document(connection, key));
    let documents = found.filter_map(Result::transpose).collect::<Result<_, _>>()?;
    Ok(DocumentList { revision, documents })
}

/// The existing revocations of these targets.
pub(super) fn revocations_by_target(
    connection: &Connection,
    targets: &[RevocationTarget],
) -> Result<Vec<RevocationRow>, SqliteError> {
    let found = targets.iter().map(|target| read_revocation(connection, &encode_target(target)?));
    found.filter_map(Result::transpose).collect()
}

/// Whether a key is revoked.
pub(super) fn is_key_revoked(connection: &Connection, key: &str) -> Result<bool, SqliteError> {
    Ok(signers::is_key_revoked(read_revocation(connection, &encode_target(&signers::key_target(key))?)?.as_ref()))
}

/// Encodes a target as it is stored.
pub(super) fn encode_target(target: &RevocationTarget) -> Result<String, Error> {
    serde_json::to_string(target).map_err(|error| Error::Rejected(format!("the target `{target}` cannot be stored: {error}")))
}

/// The document under a key.
pub(super) fn read_document(connection: &Connection, key: &DocumentKey) -> Result<Option<StoredDocument>, SqliteError> {
    let mut statement = connection
        .prepare_cached("SELECT kind, id, json, path, line, origin, revision FROM documents WHERE kind = ?1 AND id = ?2")?;
    Ok(collect_rows(&mut statement, (&key.kind, &key.id), parse_document_row)?.pop())
}

/// The revocation of a target, by its encoded name.
pub(super) fn read_revocation(connection: &Connection, target: &str) -> Result<Option<RevocationRow>, SqliteError> {
    let mut statement = connection.prepare_cached(
        "SELECT target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision FROM revocations WHERE target = ?1",
    )?;
    Ok(collect_rows(&mut statement, [target], parse_revocation_row)?.pop())
}

/// Converts a number to the 63 bits that SQLite stores.
pub(super) fn to_i64(number: impl TryInto<i64>) -> Result<i64, SqliteError> {
    number.try_into().map_err(|_| Error::Rejected("a number is above 2^63 - 1".to_owned()).into())
}

/// Reads a number that is never negative.
pub(super) fn read_u64(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let stored: i64 = row.get(column)?;
    stored.try_into().map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, stored))
}

/// The hash of a revision in the change log; `None` if the log does not hold it.
pub(super) fn read_log_hash(connection: &Connection, number: u64) -> Result<Option<[u8; 32]>, SqliteError> {
    if number == 0 {
        return Ok(Some(GENESIS));
    }
    let mut statement = connection.prepare_cached("SELECT hash FROM log WHERE number = ?1")?;
    Ok(statement.query_one([to_i64(number)?], |row| row.get(0)).optional()?)
}

/// Parses all rows of a query.
pub(super) fn collect_rows<T>(
    statement: &mut rusqlite::Statement<'_>,
    parameters: impl rusqlite::Params,
    parse: fn(&Row<'_>) -> Result<T, SqliteError>,
) -> Result<Vec<T>, SqliteError> {
    collect_rows_into(Vec::new(), statement, parameters, parse)
}

fn collect_rows_into<T>(
    mut found: Vec<T>,
    statement: &mut rusqlite::Statement<'_>,
    parameters: impl rusqlite::Params,
    parse: fn(&Row<'_>) -> Result<T, SqliteError>,
) -> Result<Vec<T>, SqliteError> {
    let mut rows = statement.query(parameters)?;
    while let Some(row) = rows.next()? {
        found.push(parse(row)?);
    }
    Ok(found)
}

/// Parses a row of the table `documents`.
pub(super) fn parse_document_row(row: &Row<'_>) -> Result<StoredDocument, SqliteError> {
    let key = DocumentKey { kind: row.get(0)?, id: row.get(1)? };
    let origin = match row.get_ref(5)?.as_str().map_err(rusqlite::Error::from)? {
        "folder" => DocumentOrigin::Folder,
        "api" => DocumentOrigin::Api,
        other => return Err(corrupt_error(format!("the origin `{other}` of document `{} {}` is none", key.kind, key.id))),
    };
    let document = DocumentRow { key, json: row.get(2)?, path: row.get(3)?, line: row.get(4)?, origin };
    Ok(StoredDocument { row: document, revision: read_u64(row, 6)? })
}

/// Parses a row of the table `revocations`.
pub(super) fn parse_revocation_row(row: &Row<'_>) -> Result<RevocationRow, SqliteError> {
    let text = row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?;
    let target: RevocationTarget = serde_json::from_str(text)
        .map_err(|error| corrupt_error(format!("the target `{text}` of a revocation is none: {error}")))?;
    Ok(RevocationRow {
        target,
        dead: row.get(1)?,
        suspended: row.get(2)?,
        watermark_unix_s: row.get(3)?,
        expires_at_unix_s: row.get(4)?,
        reason: row.get(5)?,
        revision: read_u64(row, 6)?,
    })
}

/// Parses a row of the log. Returns it with the size of its stored changes.
pub(super) fn parse_commit_row(row: &Row<'_>) -> Result<(CommitRow, usize), SqliteError> {
    let number = read_u64(row, 0)?;
    let changes = row.get_ref(5)?.as_blob().map_err(rusqlite::Error::from)?;
    let size = changes.len();
    let changes = serde_json::from_slice(changes)
        .map_err(|error| corrupt_error(format!("revision {number} of the change log cannot be understood: {error}")))?;
    let digest = parse_digest(row.get_ref(3)?.as_str().map_err(rusqlite::Error::from)?)?;
    Ok((CommitRow { number, previous_hash: row.get(1)?, hash: row.get(2)?, digest, unix_ms: row.get(4)?, changes }, size))
}

pub(super) fn parse_digest(text: &str) -> Result<StateDigest, SqliteError> {
    StateDigest::from_hex(text).ok_or_else(|| corrupt_error(format!("`{text}` is not a digest")))
}

pub(super) fn corrupt_error(what: String) -> SqliteError {
    Error::Corrupt(what).into()
}
