//! Stages the long parts of a commit before the commit locks the head, so that a client that stops while sending blocks nobody.
//!
//! The rows of the table `staged` belong to one transaction and never outlive it. Under the lock, short statements move them to
//! their tables within the server. Look next at `super::write`.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;

use super::commit_rows::{CommitRowSet, TouchedRows};
use super::connection::{IDLE_IN_TRANSACTION_MS, PostgresConnection, QueryError};
use super::pending_acts;
use super::read::{self, ExpectedStore, PostgresHead, to_i64};
use super::row_keys::{document_key, encode_target};
use crate::model::rows::{DocumentOrigin, PendingTwoPersonRow, RevocationRow, RevocationTarget, RowChange, StoreWrite};
use crate::store::hash_chain::encode_changes;
use crate::store::{CommitRequest, Error, StoredDocument, commit_rows, signers, two_person};

/// The staged parts of a commit, and its documents as they were before the head was locked.
pub(super) struct StagedCommit {
    id: String,
    /// The documents that the request touches.
    pub(super) documents: Vec<StoredDocument>,
    documents_number: u64,
    /// The targets of the revocations that a prune would delete.
    pub(super) expiring: Vec<RevocationTarget>,
    /// The encoded changes if they are long. They are those of the next revision, provided that no other commit comes first.
    changes: Option<Vec<u8>>,
    /// The whole commit as prepared for the next revision, if no part of it depends on the clock.
    prepared: Option<PreparedCommit>,
    head_hash: [u8; 32],
}

/// A commit that was prepared before the head was locked.
pub(super) struct PreparedCommit {
    pub(super) rows: CommitRowSet,
    pub(super) changes: Vec<RowChange>,
    pub(super) stored: Vec<u8>,
}

/// Changes up to this length are sent under the lock, because one write to the socket delivers them.
const INLINE_CHANGES_BYTES_MAX: usize = 16 * 1024;
/// How long the server waits for a commit that is being prepared, before the head is locked.
const PREPARE_TIMEOUT_MS: u64 = 30_000;
/// Revocations that one statement under the lock reads or writes.
pub(super) const ROWS_PER_STATEMENT: usize = 16;

/// The targets of the revocations that a prune of the request would delete.
async fn expired_targets(
    connection: &PostgresConnection,
    request: &CommitRequest,
    unix_ms: i64,
) -> Result<Vec<RevocationTarget>, QueryError> {
    let mut found = Vec::new();
    for write in &request.writes {
        if let StoreWrite::Prune { before_unix_s, rows_max } = write {
            let before_unix_s = (*before_unix_s).min(unix_ms.div_euclid(1_000));
            found
                .extend(read::expired_revocations(connection, before_unix_s, *rows_max).await?.into_iter().map(|row| row.target));
        }
    }
    Ok(found)
}

/// Reads the revocations that a request writes or depends on, and the pending acts for its targets. They are read in small
/// portions, so that no answer is long.
pub(super) async fn read_revocations(
    connection: &PostgresConnection,
    request: &CommitRequest,
    expiring: &[RevocationTarget],
) -> Result<(Vec<RevocationRow>, BTreeMap<String, PendingTwoPersonRow>), QueryError> {
    let mut targets: Vec<RevocationTarget> = expiring.to_vec();
    targets.extend(signers::required_keys(request).into_iter().map(signers::key_target));
    let mut acts = Vec::new();
    for write in &request.writes {
        match write {
            StoreWrite::Revoke { target, .. }
            | StoreWrite::Reinstate { target, .. }
            | StoreWrite::ReinstateByTwo { target, .. } => {
                targets.push(target.clone());
                if target.can_suspend() {
                    acts.push(two_person::pending_act_key(target)?);
                }
            }
            // An adoption deletes the pending acts by itself.
            StoreWrite::Adopt { .. } => targets.push(RevocationTarget::All),
            StoreWrite::Merge(merge) => targets.extend(merge.rows.iter().map(|row| row.target.clone())),
            _ => {}
        }
    }
    let pending = pending_acts::read_pending_acts(connection, &acts).await?;
    targets.extend(pending.values().map(|row| signers::key_target(&row.key)));
    let sql = format!("SELECT {} FROM portcullis.revocations WHERE key = ANY ($1)", read::REVOCATION_COLUMNS);
    let mut found = Vec::new();
    for targets in targets.chunks(ROWS_PER_STATEMENT) {
        let keys = targets.iter().map(|target| Ok(encode_target(target)?.0)).collect::<Result<Vec<_>, Error>>()?;
        found.extend(read::stream_rows(connection, &sql, &[(&keys, Type::BYTEA_ARRAY)], read::parse_revocation_row).await?);
    }
    Ok((found, pending))
}

impl StagedCommit {
    /// Stages the long parts of a request. Returns `None` if the request is short and touches no document.
    pub(super) async fn stage_request(
        connection: &PostgresConnection,
        expected: &ExpectedStore,
        request: &CommitRequest,
        unix_ms: Option<i64>,
    ) -> Result<Option<Self>, QueryError> {
        let mut keys: Vec<Vec<u8>> = request.expected.iter().map(|(key, _)| document_key(key)).collect();
        keys.extend(request.writes.iter().filter_map(|write| match write {
            StoreWrite::PutDocument(row) => Some(document_key(&row.key)),
            StoreWrite::RemoveDocument(key) => Some(document_key(key)),
            _ => None,
        }));
        let many = |write: &StoreWrite| matches!(write, StoreWrite::Prune { .. } | StoreWrite::Merge(_));
        if keys.is_empty() && request.writes.len() <= ROWS_PER_STATEMENT && !request.writes.iter().any(many) {
            return Ok(None);
        }
        // No lock is held yet, so there is time to prepare the commit.
        connection.run_sql(&format!("SET LOCAL idle_in_transaction_session_timeout = {PREPARE_TIMEOUT_MS}")).await?;
        let head = read::read_head(connection, expected, false).await?;
        let unix_ms = unix_ms.unwrap_or(head.unix_ms);
        let documents = match keys.as_slice() {
            [] => vec![],
            keys => {
                let sql = format!("SELECT {} FROM portcullis.documents WHERE key = ANY ($1)", read::DOCUMENT_COLUMNS);
                read::stream_rows(connection, &sql, &[(&keys, Type::BYTEA_ARRAY)], read::parse_document_row).await?
            }
        };
        let expiring = expired_targets(connection, request, unix_ms).await?;
        let (revocations, pending) = read_revocations(connection, request, &expiring).await?;
        let found = TouchedRows { documents: documents.clone(), revocations, pending, ..TouchedRows::default() };
        let mut rows = CommitRowSet::new(&head, head.revision.number.saturating_add(1), unix_ms, found);
        // Errors are reported here, and checked again under the lock.
        rows.check_expectations(request, &head)?;
        let mut changes = Vec::new();
        for write in &request.writes {
            match write {
                StoreWrite::Prune { before_unix_s, .. } => {
                    changes.extend(rows.prune((*before_unix_s).min(unix_ms.div_euclid(1_000)))?);
                }
                StoreWrite::Merge(merge) => changes.extend(commit_rows::merge(&mut rows, merge, &head.revision.history)?),
                StoreWrite::Adopt { reason } => changes.push(commit_rows::void_roots(&mut rows, reason)?),
                // An answer changes an approval, which is locked before the head; it makes no change in the log.
                StoreWrite::Approve { .. } | StoreWrite::Refuse { .. } => {}
                write => changes.extend(commit_rows::apply_write(&mut rows, write)?),
            }
        }
        let stored = encode_changes(&changes)?;
        let id = uuid::Uuid::new_v4().to_string();
        let long = Some(stored.clone()).filter(|stored| stored.len() > INLINE_CHANGES_BYTES_MAX);
        let (documents_number, head_hash) = (head.documents_number, head.hash);
        let mut staged = Self { id, documents, documents_number, expiring, changes: long, prepared: None, head_hash };
        staged.send_rows(connection, &rows).await?;
        // A revocation depends on the clock under the lock, and an adoption or a merge writes more than these rows.
        connection.run_sql(&format!("SET LOCAL idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}")).await?;
        let timeless = |write: &StoreWrite| write.writes_document() || matches!(write, StoreWrite::Prune { .. });
        staged.prepared = request.writes.iter().all(timeless).then_some(PreparedCommit { rows, changes, stored });
        Ok(Some(staged))
    }

    /// Inserts the long parts into the table `staged`.
    async fn send_rows(&self, connection: &PostgresConnection, rows: &CommitRowSet) -> Result<(), QueryError> {
        if let Some(changes) = &self.changes {
            let sql = "INSERT INTO portcullis.staged (stage, changes) VALUES ($1, $2)";
            connection.execute(sql, &[(&self.id, Type::TEXT), (changes, Type::BYTEA)]).await?;
        }
        let (put, remove) = rows.documents_to_store();
        if put.is_empty() && remove.is_empty() {
            return Ok(());
        }
        let mut keys: Vec<_> = put.iter().map(|one| document_key(&one.row.key)).collect();
        keys.extend(remove.iter().map(|key| document_key(key)));
        let of = |text: fn(&StoredDocument) -> &str| -> Vec<Option<&str>> {
            put.iter().map(|one| Some(text(one))).chain(remove.iter().map(|_| None)).collect()
        };
        let (kinds, ids) = (of(|one| &one.row.key.kind), of(|one| &one.row.key.id));
        let (jsons, paths) = (of(|one| &one.row.json), of(|one| &one.row.path));
        let origins = of(|one| match one.row.origin {
            DocumentOrigin::Folder => "folder",
            DocumentOrigin::Api => "api",
        });
        let lines: Vec<i64> = put.iter().map(|one| i64::from(one.row.line)).chain(remove.iter().map(|_| 0)).collect();
        connection
            .execute(
                "INSERT INTO portcullis.staged (stage, key, kind, id, json, path, line, origin)
             SELECT $1, * FROM unnest($2, $3, $4, $5, $6, $7, $8)",
                &[
                    (&self.id, Type::TEXT),
                    (&keys, Type::BYTEA_ARRAY),
                    (&kinds, Type::TEXT_ARRAY),
                    (&ids, Type::TEXT_ARRAY),
                    (&jsons, Type::TEXT_ARRAY),
                    (&paths, Type::TEXT_ARRAY),
                    (&lines, Type::INT8_ARRAY),
                    (&origins, Type::TEXT_ARRAY),
                ],
            )
            .await?;
        Ok(())
    }

    /// Takes the prepared commit, if no other commit came first.
    pub(super) fn take_prepared(&mut self, head: &PostgresHead) -> Option<PreparedCommit> {
        self.prepared.take().filter(|_| self.head_hash == head.hash)
    }

    /// Whether the documents are the same under the lock as before it.
    pub(super) fn documents_unchanged(&self, head: &PostgresHead) -> bool {
        head.documents_number == self.documents_number
    }

    /// Whether the staged changes are those of the commit. True if no changes are staged.
    pub(super) fn changes_match(&self, stored: &[u8]) -> bool {
        self.changes.as_deref().is_none_or(|changes| changes == stored)
    }

    /// Whether the changes are staged.
    pub(super) fn has_changes(&self) -> bool {
        self.changes.is_some()
    }

    /// Moves the documents to their table.
    pub(super) async fn move_documents(&self, connection: &PostgresConnection, number: u64) -> Result<(), QueryError> {
        let (id, number) = (&self.id, to_i64(number)?);
        connection
            .execute(
                "DELETE FROM portcullis.documents USING portcullis.staged
             WHERE stage = $1 AND documents.key = staged.key AND staged.kind IS NULL",
                &[(id, Type::TEXT)],
            )
            .await?;
        connection
            .execute(
                "INSERT INTO portcullis.documents (key, kind, id, json, path, line, origin, revision)
             SELECT key, kind, id, json, path, line, origin, $2 FROM portcullis.staged WHERE stage = $1 AND kind IS NOT NULL
             ON CONFLICT (key) DO UPDATE SET json = excluded.json, path = excluded.path, line = excluded.line,
             origin = excluded.origin, revision = excluded.revision",
                &[(id, Type::TEXT), (&number, Type::INT8)],
            )
            .await?;
        Ok(())
    }

    /// The id of the staged rows.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Deletes the staged rows before the commit.
    pub(super) async fn delete_staged_rows(&self, connection: &PostgresConnection) -> Result<(), QueryError> {
        connection.execute("DELETE FROM portcullis.staged WHERE stage = $1", &[(&self.id, Type::TEXT)]).await?;
        Ok(())
    }
}
