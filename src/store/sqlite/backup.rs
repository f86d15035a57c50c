//! Backs up a SQLite store: SQLite copies it while others use it, and the copy is verified before it gets its final name.
//!
//! The copy is one consistent view of the store in one file. The backup opens the copy, checks its pages and indexes, compares
//! its rows with the digest of its head, and verifies its change log up to that head. Then it syncs and renames the copy.
//! Therefore a file with the final name is a complete backup. A backup does not know what was revoked after it was made. Look
//! next at `super::integrity`.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::{Connection, OpenFlags};

use super::connection::SqliteConnection;
use super::create::{create_private_file, remove_temporary, rename_if_free, temporary_path};
use super::error::{SqliteError, to_store_error};
use super::file_identity::{find_store, read_schema_version};
use super::header::{Header, companion_path};
use super::integrity;
use crate::model::revision::Revision;
use crate::store::Error;

/// The ends of the names of the files that SQLite keeps beside a database.
const PARTS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// Why no backup was made. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// The store cannot be read, or is inconsistent.
    #[error(transparent)]
    Store(#[from] Error),
    /// The name is taken, or cannot be used for a backup.
    #[error("{0}")]
    InvalidName(String),
    /// The copy cannot be written, or is not a complete store.
    #[error("{0}")]
    CopyFailed(String),
}

/// The content of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupSummary {
    /// Its newest revision.
    pub revision: Revision,
    /// Number of its documents and revocations.
    pub rows: u64,
    /// Rows of its change log. Each of them was verified.
    pub commits: u64,
    /// Size of the file.
    pub bytes: u64,
}

/// The progress of a backup, for a thread that watches it.
#[derive(Debug, Default)]
pub struct BackupProgress {
    copy: OnceLock<PathBuf>,
    copy_bytes: AtomicU64,
    verified_rows: AtomicU64,
    total_rows: AtomicU64,
}

impl BackupProgress {
    /// Bytes copied, and the approximate total; 0 of 0 before the copy begins.
    pub fn copied(&self) -> (u64, u64) {
        let done = self.copy.get().and_then(|path| std::fs::metadata(path).ok()).map_or(0, |metadata| metadata.len());
        let total = self.copy_bytes.load(Ordering::Relaxed);
        (done.min(total), total)
    }

    /// Rows verified, and their total; 0 of 0 before the verification begins.
    pub fn verified(&self) -> (u64, u64) {
        (self.verified_rows.load(Ordering::Relaxed), self.total_rows.load(Ordering::Relaxed))
    }
}

/// Makes a verified backup with mode 0600. Blocks, for seconds if the store holds millions of rows.
///
/// # Errors
/// As [`BackupError`] says. A file that had the name before is then unchanged.
pub fn back_up(store: &Path, to: &Path, may_overwrite: bool, progress: &BackupProgress) -> Result<BackupSummary, BackupError> {
    let store = find_store(store)?;
    check_backup_name(&store, to, may_overwrite)?;
    // The schema is not upgraded, because a backup is made before an upgrade.
    let db = SqliteConnection::open_without_upgrade(&store)?;
    let copy = temporary_path(to);
    let made = copy_store(&db, &copy, progress).and_then(|()| verify_copy(&db, &copy, progress));
    let named = made.and_then(|backup| publish_copy(&copy, to, may_overwrite).map(|()| backup));
    if named.is_err() {
        remove_temporary(&copy);
    }
    named
}

/// Checks that a name may be used. A store in use must not be overwritten, because SQLite would apply its log to the backup.
fn check_backup_name(store: &Path, to: &Path, may_overwrite: bool) -> Result<(), BackupError> {
    let display_path = to.display();
    if to.file_name().is_none() {
        return Err(BackupError::InvalidName(format!("`{display_path}` names no file: name the file of the backup")));
    }
    if PARTS.iter().any(|suffix| to.as_os_str().as_bytes().ends_with(suffix.as_bytes())) {
        return Err(BackupError::InvalidName(format!(
            "`{display_path}` has the name of a part of a store, for which SQLite would take it: name a file that does not end in `-wal`, `-shm` \
             or `-journal`"
        )));
    }
    let Ok(there) = to.symlink_metadata() else { return Ok(()) };
    let id = |path: &Path| path.metadata().map(|metadata| (metadata.dev(), metadata.ino())).ok();
    if id(to).is_some_and(|id_of_it| id(store) == Some(id_of_it)) {
        return Err(BackupError::InvalidName(format!("`{display_path}` is the store itself: name another file")));
    }
    if !there.is_file() {
        return Err(BackupError::InvalidName(format!("`{display_path}` is there and is no plain file: name another file")));
    }
    for suffix in PARTS {
        let companion_path = companion_path(to, suffix);
        if companion_path.symlink_metadata().is_ok() {
            return Err(BackupError::InvalidName(format!(
                "`{display_path}` is a store in use, for `{}` stands beside it: name another file",
                companion_path.display()
            )));
        }
    }
    if !may_overwrite {
        return Err(name_taken_error(to));
    }
    match Header::read(to) {
        Ok(Some(header)) if header.is_backup() => Ok(()),
        Ok(_) => Err(BackupError::InvalidName(format!(
            "`{display_path}` is no backup of a store, and --overwrite replaces nothing else: name another file"
        ))),
        Err(error) => {
            Err(BackupError::InvalidName(format!("`{display_path}` cannot be read to see whether it is a backup: {error}")))
        }
    }
}

fn name_taken_error(to: &Path) -> BackupError {
    BackupError::InvalidName(format!("`{}` is there already: name another file, or add --overwrite", to.display()))
}

fn copy_store(db: &SqliteConnection, copy: &Path, progress: &BackupProgress) -> Result<(), BackupError> {
    let failed = |error: &dyn std::fmt::Display| BackupError::CopyFailed(format!("cannot write `{}`: {error}", copy.display()));
    create_private_file(copy).map_err(|error| failed(&error))?;
    let sized = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size";
    let bytes: i64 = db.connection.query_row(sized, (), |row| row.get(0)).map_err(|error| db.to_store_error(error.into()))?;
    progress.copy_bytes.store(bytes.unsigned_abs(), Ordering::Relaxed);
    // Nobody else sets it.
    let _ = progress.copy.set(copy.to_owned());
    let name = copy.to_str().ok_or_else(|| BackupError::InvalidName("the name of a backup must be UTF-8".to_owned()))?;
    db.connection.execute("VACUUM INTO ?1", [name]).map_err(|error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => failed(&"no space is left for it"),
        Some(rusqlite::ErrorCode::SystemIoFailure | rusqlite::ErrorCode::CannotOpen) => failed(&error),
        _ => BackupError::Store(db.to_store_error(error.into())),
    })?;
    // The files may have been replaced while they were read.
    Ok(db.check_files()?)
}

/// Opens the copy as a restore does, and reads all of it.
fn verify_copy(db: &SqliteConnection, copy: &Path, progress: &BackupProgress) -> Result<BackupSummary, BackupError> {
    let read = || -> Result<BackupSummary, SqliteError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(copy, flags)?;
        let transaction = connection.unchecked_transaction()?;
        if read_schema_version(&transaction, copy)? != read_schema_version(&db.connection, copy)? {
            return Err(Error::Corrupt("it has another schema than the store".to_owned()).into());
        }
        let counted = "SELECT (SELECT count(*) FROM documents) + (SELECT count(*) FROM revocations), (SELECT count(*) FROM log)";
        let (rows, log): (i64, i64) = transaction.query_row(counted, (), |row| Ok((row.get(0)?, row.get(1)?)))?;
        progress.total_rows.store(rows.saturating_add(log).unsigned_abs(), Ordering::Relaxed);
        let mut on_row = |rows: u64| {
            progress.verified_rows.fetch_add(rows, Ordering::Relaxed);
        };
        integrity::check_pages(&transaction, true)?;
        let head = integrity::check_rows(&transaction, &mut on_row)?;
        let commits = integrity::check_chain(&transaction, &head, &mut on_row)?;
        let bytes = copy.metadata().map_or(0, |metadata| metadata.len());
        integrity::check_contains_commit(
            &db.connection,
            &super::read::read_head(&db.connection)?,
            head.revision.number,
            &head.hash,
        )?;
        Ok(BackupSummary { revision: head.revision, rows: rows.unsigned_abs(), commits, bytes })
    };
    read().map_err(|fault| {
        let why = to_store_error(copy, fault);
        BackupError::CopyFailed(format!("the copy is not a whole store, and was removed: {why}"))
    })
}

/// Makes the copy durable, then gives it its final name.
fn publish_copy(copy: &Path, to: &Path, may_overwrite: bool) -> Result<(), BackupError> {
    let named = || -> io::Result<bool> {
        File::open(copy)?.sync_all()?;
        if may_overwrite {
            std::fs::rename(copy, to)?;
        } else if !rename_if_free(copy, to)? {
            return Ok(false);
        }
        let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
        Ok(true)
    };
    match named() {
        Ok(true) => Ok(()),
        Ok(false) => Err(name_taken_error(to)),
        Err(error) => Err(BackupError::CopyFailed(format!("cannot give `{}` its name: {error}", to.display()))),
    }
}

#[cfg(test)]
mod tests;
