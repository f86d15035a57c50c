//! The tables of a SQLite store, as a sequence of upgrade steps. A new file is created by the same steps that upgrade an old one.
//!
//! A step never changes once it is released; every further change is a new step. Look next at `super::connection`, which runs the
//! steps.

use rusqlite::Connection;

use super::error::SqliteError;
use crate::model::rows::RowChange;
use crate::store::Error;

/// The version that this program writes: the number of steps.
pub(super) const SCHEMA_VERSION: i64 = 6;

const VERSION_1: &str = "
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1), history TEXT NOT NULL, made_unix_ms INTEGER NOT NULL,
    iat_skew_s INTEGER NOT NULL, freshness_bound_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE head (
    id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL, hash BLOB NOT NULL, digest TEXT NOT NULL,
    floor INTEGER NOT NULL, revocations INTEGER NOT NULL, documents_number INTEGER NOT NULL, jtis_forgotten_unix_s INTEGER, spent_forgotten_unix_s INTEGER
) STRICT;
CREATE TABLE documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, json TEXT NOT NULL, path TEXT NOT NULL, line INTEGER NOT NULL,
    origin TEXT NOT NULL CHECK (origin IN ('folder', 'api')), revision INTEGER NOT NULL, PRIMARY KEY (kind, id)
) STRICT;
CREATE TABLE revocations (
    target TEXT PRIMARY KEY, dead INTEGER NOT NULL, suspended INTEGER NOT NULL, watermark_unix_s INTEGER,
    expires_at_unix_s INTEGER, reason TEXT NOT NULL, revision INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX revocations_by_revision ON revocations (revision);
CREATE TABLE log (
    number INTEGER PRIMARY KEY, previous_hash BLOB NOT NULL, hash BLOB NOT NULL, digest TEXT NOT NULL,
    unix_ms INTEGER NOT NULL, changes BLOB NOT NULL
) STRICT;
CREATE TABLE acts (number INTEGER PRIMARY KEY, unix_ms INTEGER NOT NULL, act TEXT NOT NULL) STRICT;
CREATE TABLE act_jtis (jti TEXT PRIMARY KEY, expires_at_unix_s INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX act_jtis_by_expiry ON act_jtis (expires_at_unix_s);
CREATE TABLE spent (key BLOB PRIMARY KEY, expires_at_unix_s INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX spent_by_expiry ON spent (expires_at_unix_s);
";

/// Approvals; replicas; and a mark on the rows of the log that change documents, so that the history of policy reads no
/// revocations.
const VERSION_2: &str = "
CREATE TABLE approvals (
    digest TEXT PRIMARY KEY, leaf TEXT NOT NULL, waiting INTEGER NOT NULL, asked_unix_ms INTEGER NOT NULL,
    expires_unix_ms INTEGER NOT NULL, forget_unix_ms INTEGER NOT NULL, approval TEXT NOT NULL
) STRICT;
CREATE INDEX approvals_by_asking ON approvals (asked_unix_ms, digest);
CREATE INDEX approvals_by_forgetting ON approvals (forget_unix_ms);
CREATE INDEX approvals_waiting ON approvals (leaf, expires_unix_ms) WHERE waiting = 1;
ALTER TABLE log ADD COLUMN of_documents INTEGER NOT NULL DEFAULT 0;
CREATE INDEX log_of_documents ON log (number) WHERE of_documents = 1;
CREATE TABLE replicas (
    incarnation TEXT PRIMARY KEY, address TEXT NOT NULL, version TEXT NOT NULL, started_unix_ms INTEGER NOT NULL,
    applied_number INTEGER NOT NULL, acked_number INTEGER NOT NULL, state TEXT NOT NULL, seen_unix_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

/// When a replica acknowledged last; acts that wait for a second operator; revocations by expiry.
const VERSION_3: &str = "
ALTER TABLE replicas ADD COLUMN acked_unix_ms INTEGER NOT NULL DEFAULT 0;
CREATE TABLE pending_acts (act TEXT PRIMARY KEY, operator TEXT NOT NULL, expires_unix_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX revocations_by_expiry ON revocations (expires_at_unix_s) WHERE expires_at_unix_s IS NOT NULL;
";

/// The adoptions that led to the present history, and the merges of replicas.
const VERSION_4: &str = "
CREATE TABLE adoptions (
    number INTEGER PRIMARY KEY, history TEXT NOT NULL, from_history TEXT NOT NULL, from_hash BLOB NOT NULL, unix_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE merges (
    history TEXT NOT NULL, incarnation TEXT NOT NULL, address TEXT NOT NULL, rows INTEGER NOT NULL, unix_ms INTEGER NOT NULL,
    PRIMARY KEY (history, incarnation)
) STRICT, WITHOUT ROWID;
";

/// The key that signed the first half of an act for two operators.
const VERSION_5: &str = "
ALTER TABLE pending_acts ADD COLUMN key TEXT NOT NULL DEFAULT '';
";

/// The user of a waiting call, so that quotas apply to each user too.
const VERSION_6: &str = "ALTER TABLE approvals ADD COLUMN asker TEXT NOT NULL DEFAULT '';";

/// Upgrades the tables from version `from`, 0 for none, to [`SCHEMA_VERSION`], within the caller's transaction.
pub(super) fn upgrade_schema(connection: &Connection, from: i64) -> Result<(), SqliteError> {
    if from < 1 {
        connection.execute_batch(VERSION_1)?;
    }
    if from < 2 {
        connection.execute_batch(VERSION_2)?;
        mark_document_commits(connection)?;
    }
    if from < 3 {
        connection.execute_batch(VERSION_3)?;
    }
    if from < 4 {
        connection.execute_batch(VERSION_4)?;
    }
    if from < 5 {
        connection.execute_batch(VERSION_5)?;
    }
    if from < 6 {
        connection.execute_batch(VERSION_6)?;
    }
    connection.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    Ok(())
}

/// Marks the rows of the log that change a document.
fn mark_document_commits(connection: &Connection) -> Result<(), SqliteError> {
    // Most rows are revocations. SQLite selects the rows that may change a document, and only those are decoded.
    let mut statement =
        connection.prepare("SELECT number, changes FROM log WHERE instr(changes, CAST('\"document' AS BLOB)) > 0")?;
    let mut mark = connection.prepare("UPDATE log SET of_documents = 1 WHERE number = ?1")?;
    let mut numbers: Vec<i64> = Vec::new();
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let number: i64 = row.get(0)?;
        let changes = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?;
        let changes: Vec<RowChange> = serde_json::from_slice(changes)
            .map_err(|error| Error::Corrupt(format!("revision {number} of the change log cannot be understood: {error}")))?;
        if changes.iter().any(RowChange::changes_document) {
            numbers.push(number);
        }
    }
    for number in numbers {
        mark.execute([number])?;
    }
    Ok(())
}
