//! The cache of a replica: its own copy of the store that it followed, in a small SQLite file. It holds the documents, the
//! revocations and the position to which they belong.
//!
//! The cache denies but never permits, and a file that is inconsistent is set aside. It serves when the store is unreachable or
//! lost: a replica starts from it and denies, and a restored store learns from it what was revoked after the backup. It holds
//! policy and the ids of revoked subjects, but no token and no private key. Look next at `sync/cache_writer.rs`, which writes it.

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Transaction};

use super::error::SqliteError;
use super::read::encode_target;
use super::read::{self, read_u64, to_i64};
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationRow, RowChange};
use crate::store::{CommitRow, Error, Settings, StoreState};

/// The name of the file in a data folder.
pub const CACHE_FILE: &str = "cache.db";
/// `PtcC`: marks a file as a cache of this program.
const APPLICATION_ID: i64 = 0x5074_6343;
const CACHE_VERSION: i64 = 1;
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
const WAL_BYTES_KEPT: i64 = 16 * 1024 * 1024;
const CACHE_SCHEMA: &str = "
CREATE TABLE place (
    id INTEGER PRIMARY KEY CHECK (id = 1), history TEXT NOT NULL, number INTEGER NOT NULL, hash BLOB NOT NULL, digest TEXT NOT NULL,
    iat_skew_s INTEGER NOT NULL, freshness_bound_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, json TEXT NOT NULL, path TEXT NOT NULL, line INTEGER NOT NULL,
    origin TEXT NOT NULL, revision INTEGER NOT NULL, PRIMARY KEY (kind, id)
) STRICT;
CREATE TABLE revocations (
    target TEXT PRIMARY KEY, dead INTEGER NOT NULL, suspended INTEGER NOT NULL, watermark_unix_s INTEGER,
    expires_at_unix_s INTEGER, reason TEXT NOT NULL, revision INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

/// An open cache.
pub struct ReplicaCache {
    connection: Connection,
    path: PathBuf,
}

impl ReplicaCache {
    /// Opens the cache of a data folder. Creates it with mode 0600 if there is none. A file that is no cache, or is of another
    /// version, is set aside as `cache.db.broken`, with a warning.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the file cannot be created or used.
    pub fn open(data: &Path) -> Result<Self, Error> {
        let path = data.join(CACHE_FILE);
        match Self::open_file(&path) {
            Ok(connection) => Ok(Self { connection, path }),
            Err(fault) if is_busy(&fault) => Err(unusable_error(&path, &error_text(&fault))),
            Err(fault) => {
                move_aside(&path, &error_text(&fault))?;
                let connection = Self::open_file(&path).map_err(|fault| unusable_error(&path, &error_text(&fault)))?;
                Ok(Self { connection, path })
            }
        }
    }

    fn open_file(path: &Path) -> Result<Connection, SqliteError> {
        let unusable = |error: io::Error| SqliteError::from(unusable_error(path, &error.to_string()));
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        made.map(drop)
            .or_else(|error| if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(unusable(error)) })?;
        let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        let number = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let found = (number("application_id")?, number("user_version")?);
        // A power failure may lose the newest rows, which are then read from the store again. The remaining rows are consistent.
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "journal_size_limit", WAL_BYTES_KEPT)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        let table: Option<String> =
            connection.query_row("SELECT name FROM sqlite_schema LIMIT 1", (), |row| row.get(0)).optional()?;
        match found {
            (APPLICATION_ID, CACHE_VERSION) => Ok(connection),
            (0, 0) if table.is_none() => {
                let transaction = connection.unchecked_transaction()?;
                transaction.execute_batch(CACHE_SCHEMA)?;
                transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
                transaction.pragma_update(None, "user_version", CACHE_VERSION)?;
                transaction.commit()?;
                Ok(connection)
            }
            (_, version) => {
                Err(read::corrupt_error(format!("it is of version {version}, and this program's is {CACHE_VERSION}")))
            }
        }
    }

    /// The position to which the rows belong, with the hash of that revision in the change log; `None` if the cache is empty.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn position(&self) -> Result<Option<(Revision, [u8; 32])>, Error> {
        let position = read_position(&self.connection).map_err(|fault| self.to_store_error(fault))?;
        Ok(position.map(|state| (state.revision, state.hash)))
    }

    /// Reads the whole cache, if its rows have the digest that is stored with them. Returns `None` if the cache is empty, or if
    /// it was set aside.
    ///
    /// # Errors
    /// If a new file cannot be created.
    pub fn load_state(&mut self) -> Result<Option<StoreState>, Error> {
        match read_state(&self.connection) {
            Ok(state) => Ok(state),
            Err(fault) if is_busy(&fault) => Err(self.to_store_error(fault)),
            Err(fault) => {
                self.recreate(&error_text(&fault))?;
                Ok(None)
            }
        }
    }

    /// Replaces the content with a full state.
    ///
    /// # Errors
    /// If it cannot be written; the previous content then remains.
    pub fn replace_state(&mut self, state: &StoreState) -> Result<(), Error> {
        let write = |connection: &mut Connection| -> Result<(), SqliteError> {
            let transaction = connection.transaction()?;
            transaction.execute_batch("DELETE FROM place; DELETE FROM documents; DELETE FROM revocations")?;
            for document in &state.documents {
                put_document(&transaction, &document.row, document.revision)?;
            }
            for row in &state.revocations {
                put_revocation(&transaction, row)?;
            }
            put_position(&transaction, state)?;
            Ok(transaction.commit()?)
        };
        write(&mut self.connection).map_err(|fault| self.abort_write(fault))
    }

    /// Applies commits that follow the stored position, in one transaction with the new position. Commits that the cache already
    /// holds are skipped. Returns `false`, and stores nothing, if the commits do not follow the position.
    ///
    /// # Errors
    /// If they cannot be written; the previous content then remains.
    pub fn apply_commits(&mut self, history: &HistoryId, commits: &[CommitRow]) -> Result<bool, Error> {
        let write = |connection: &mut Connection| -> Result<bool, SqliteError> {
            let transaction = connection.transaction()?;
            let Some(mut at) = read_position(&transaction)?.filter(|at| at.revision.history == *history) else {
                return Ok(false);
            };
            for commit in commits.iter().filter(|commit| commit.number > at.revision.number).collect::<Vec<_>>() {
                if commit.number != at.revision.number.saturating_add(1) || commit.previous_hash != at.hash {
                    return Ok(false);
                }
                for change in &commit.changes {
                    apply_change(&transaction, change, commit.number)?;
                }
                (at.revision.number, at.hash, at.digest) = (commit.number, commit.hash, commit.digest);
            }
            put_position(&transaction, &at)?;
            transaction.commit()?;
            Ok(true)
        };
        write(&mut self.connection).map_err(|fault| self.abort_write(fault))
    }

    /// Frees the space that an unfinished write took in the write-ahead log.
    fn abort_write(&self, fault: SqliteError) -> Error {
        // If this fails too, the next write restarts the log.
        let _ = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", (), |_| Ok(()));
        self.to_store_error(fault)
    }

    fn to_store_error(&self, fault: SqliteError) -> Error {
        unusable_error(&self.path, &error_text(&fault))
    }

    fn recreate(&mut self, why: &str) -> Result<(), Error> {
        // Closed first, because a file that is renamed under an open connection would still be written to.
        self.connection = Connection::open_in_memory().map_err(|error| self.to_store_error(error.into()))?;
        move_aside(&self.path, why)?;
        self.connection = Self::open_file(&self.path).map_err(|fault| unusable_error(&self.path, &error_text(&fault)))?;
        Ok(())
    }
}

/// Reads the position only: a state without rows.
fn read_position(connection: &Connection) -> Result<Option<StoreState>, SqliteError> {
    let mut statement =
        connection.prepare_cached("SELECT history, number, hash, digest, iat_skew_s, freshness_bound_ms FROM place")?;
    let row = |row: &rusqlite::Row<'_>| {
        let revision = Revision { history: HistoryId::new(row.get::<_, String>(0)?), number: read_u64(row, 1)? };
        let settings = Settings { iat_skew_s: row.get(4)?, freshness_bound_ms: read_u64(row, 5)? };
        Ok((revision, row.get(2)?, row.get::<_, String>(3)?, settings))
    };
    let Some((revision, hash, digest, settings)) = statement.query_one((), row).optional()? else { return Ok(None) };
    let digest = read::parse_digest(&digest)?;
    Ok(Some(StoreState { revision, hash, digest, settings, documents: vec![], revocations: vec![] }))
}

fn read_state(connection: &Connection) -> Result<Option<StoreState>, SqliteError> {
    let transaction = connection.unchecked_transaction()?;
    let Some(at) = read_position(&transaction)? else { return Ok(None) };
    let mut statement =
        transaction.prepare("SELECT kind, id, json, path, line, origin, revision FROM documents ORDER BY kind, id")?;
    let documents = read::collect_rows(&mut statement, (), read::parse_document_row)?;
    let mut statement = transaction
        .prepare("SELECT target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision FROM revocations")?;
    let revocations = read::collect_rows(&mut statement, (), read::parse_revocation_row)?;
    let state = StoreState { documents, revocations, ..at };
    if !state.digest_matches() {
        return Err(read::corrupt_error(format!("its rows do not have the digest of revision {}", state.revision.number)));
    }
    Ok(Some(state))
}

fn apply_change(transaction: &Transaction<'_>, change: &RowChange, number: u64) -> Result<(), SqliteError> {
    match change {
        RowChange::Document(row) => put_document(transaction, row, number),
        RowChange::DocumentRemoved(DocumentKey { kind, id }) => {
            transaction.prepare_cached("DELETE FROM documents WHERE kind = ?1 AND id = ?2")?.execute((kind, id))?;
            Ok(())
        }
        RowChange::Revocation(row) => put_revocation(transaction, row),
        RowChange::RevocationRemoved(target) => {
            transaction.prepare_cached("DELETE FROM revocations WHERE target = ?1")?.execute([encode_target(target)?])?;
            Ok(())
        }
    }
}

fn put_document(transaction: &Transaction<'_>, row: &DocumentRow, revision: u64) -> Result<(), SqliteError> {
    let origin = match row.origin {
        DocumentOrigin::Folder => "folder",
        DocumentOrigin::Api => "api",
    };
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO documents (kind, id, json, path, line, origin, revision) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute((&row.key.kind, &row.key.id, &row.json, &row.path, row.line, origin, to_i64(revision)?))?;
    Ok(())
}

fn put_revocation(transaction: &Transaction<'_>, row: &RevocationRow) -> Result<(), SqliteError> {
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO revocations (target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute((
            encode_target(&row.target)?,
            row.dead,
            row.suspended,
            row.watermark_unix_s,
            row.expires_at_unix_s,
            &row.reason,
            to_i64(row.revision)?,
        ))?;
    Ok(())
}

fn put_position(transaction: &Transaction<'_>, at: &StoreState) -> Result<(), SqliteError> {
    let StoreState { revision, hash, digest, settings, .. } = at;
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO place (id, history, number, hash, digest, iat_skew_s, freshness_bound_ms)
             VALUES (1, ?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute((
            revision.history.as_str(),
            to_i64(revision.number)?,
            hash,
            digest.to_hex(),
            settings.iat_skew_s,
            to_i64(settings.freshness_bound_ms)?,
        ))?;
    Ok(())
}

/// Renames a file that cannot be used.
fn move_aside(path: &Path, why: &str) -> Result<(), Error> {
    let aside = path.with_extension("db.broken");
    tracing::warn!(path = %path.display(), aside = %aside.display(), why, "the cache cannot be used and is set aside");
    for of_it in ["db-wal", "db-shm"] {
        // They may not exist.
        let _ = std::fs::remove_file(path.with_extension(of_it));
    }
    std::fs::rename(path, &aside).map_err(|error| unusable_error(path, &error.to_string()))
}

fn unusable_error(path: &Path, why: &str) -> Error {
    Error::Unavailable(format!("the cache `{}` cannot be used: {why}", path.display()))
}

/// Whether the error comes from another process or the disk, and not from the file.
fn is_busy(fault: &SqliteError) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, SystemIoFailure};
    let SqliteError::Sql(error) = fault else { return false };
    let busy = [DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, SystemIoFailure];
    error.sqlite_error_code().is_some_and(|code| busy.contains(&code))
}

fn error_text(fault: &SqliteError) -> String {
    match fault {
        SqliteError::Sql(error) => error.to_string(),
        SqliteError::Store(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
