//! Backs up a SQLite store: SQLite copies it while others use it, and the copy is verified before it gets its final name.
//!
//! The copy is one consistent view of the store in one file. The backup opens the copy, checks its pages and indexes, compares
//! its rows with the digest of its head, and verifies its change log up to that head. Then it syncs and renames the copy.
//! Therefore a file with the final name is a complete backup. A backup does not know what was revoked after it was made. Look
//! next at `super::whole`.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::{Connection, OpenFlags};

use super::create::{make_private, remove, take_free_name, unfinished};
use super::file_identity::{find, identify};
use super::open::Db;
use super::store_fault::{Fault, explain};
use super::whole;
use crate::model::revision::Revision;
use crate::store::Error;

/// Why no backup was made. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// The store cannot be read, or is inconsistent.
    #[error(transparent)]
    Store(#[from] Error),
    /// The name is taken, or cannot be used for a backup.
    #[error("{0}")]
    Name(String),
    /// The copy cannot be written, or is not a complete store.
    #[error("{0}")]
    Copy(String),
}

/// The content of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
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
pub struct Progress {
    copy: OnceLock<PathBuf>,
    copy_bytes: AtomicU64,
    verified: AtomicU64,
    to_verify: AtomicU64,
}

impl Progress {
    /// Bytes copied, and the approximate total; 0 of 0 before the copy begins.
    pub fn copied(&self) -> (u64, u64) {
        let done = self.copy.get().and_then(|path| std::fs::metadata(path).ok()).map_or(0, |metadata| metadata.len());
        let total = self.copy_bytes.load(Ordering::Relaxed);
        (done.min(total), total)
    }

    /// Rows verified, and their total; 0 of 0 before the verification begins.
    pub fn verified(&self) -> (u64, u64) {
        (self.verified.load(Ordering::Relaxed), self.to_verify.load(Ordering::Relaxed))
    }
}

/// Makes a verified backup with mode 0600. Blocks, for seconds if the store holds millions of rows.
///
/// # Errors
/// As [`BackupError`] says. A file that had the name before is then unchanged.
pub fn back_up(store: &Path, to: &Path, may_overwrite: bool, progress: &Progress) -> Result<Backup, BackupError> {
    let store = find(store)?;
    check_name(&store, to, may_overwrite)?;
    // The schema is not upgraded, because a backup is made before an upgrade.
    let db = Db::open_as_it_is(&store)?;
    let copy = unfinished(to);
    let made = copy_to(&db, &copy, progress).and_then(|()| verify(&db, &copy, progress));
    let named = made.and_then(|backup| take_name(&copy, to, may_overwrite).map(|()| backup));
    if named.is_err() {
        remove(&copy);
    }
    named
}

/// Checks that a name may be used. A store in use must not be overwritten, because SQLite would apply its log to the backup.
fn check_name(store: &Path, to: &Path, may_overwrite: bool) -> Result<(), BackupError> {
    let shown = to.display();
    if to.file_name().is_none() {
        return Err(BackupError::Name(format!("`{shown}` names no file: name the file of the backup")));
    }
    let Ok(there) = to.symlink_metadata() else { return Ok(()) };
    let id = |path: &Path| path.metadata().map(|metadata| (metadata.dev(), metadata.ino())).ok();
    if id(to).is_some_and(|id_of_it| id(store) == Some(id_of_it)) {
        return Err(BackupError::Name(format!("`{shown}` is the store itself: name another file")));
    }
    if !there.is_file() {
        return Err(BackupError::Name(format!("`{shown}` is there and is no plain file: name another file")));
    }
    for suffix in ["-wal", "-shm", "-journal"] {
        let mut beside = to.as_os_str().to_owned();
        beside.push(suffix);
        if Path::new(&beside).symlink_metadata().is_ok() {
            return Err(BackupError::Name(format!(
                "`{shown}` is a store in use, for `{}` stands beside it: name another file",
                Path::new(&beside).display()
            )));
        }
    }
    if may_overwrite { Ok(()) } else { Err(taken(to)) }
}

fn taken(to: &Path) -> BackupError {
    BackupError::Name(format!("`{}` is there already: name another file, or add --overwrite", to.display()))
}

fn copy_to(db: &Db, copy: &Path, progress: &Progress) -> Result<(), BackupError> {
    let failed = |error: &dyn std::fmt::Display| BackupError::Copy(format!("cannot write `{}`: {error}", copy.display()));
    make_private(copy).map_err(|error| failed(&error))?;
    let sized = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size";
    let bytes: i64 = db.connection.query_row(sized, (), |row| row.get(0)).map_err(|error| db.explain(error.into()))?;
    progress.copy_bytes.store(bytes.unsigned_abs(), Ordering::Relaxed);
    // Nobody else sets it.
    let _ = progress.copy.set(copy.to_owned());
    let name = copy.to_str().ok_or_else(|| BackupError::Name("the name of a backup must be UTF-8".to_owned()))?;
    db.connection.execute("VACUUM INTO ?1", [name]).map_err(|error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => failed(&"no space is left for it"),
        Some(rusqlite::ErrorCode::SystemIoFailure | rusqlite::ErrorCode::CannotOpen) => failed(&error),
        _ => BackupError::Store(db.explain(error.into())),
    })?;
    // The files may have been replaced while they were read.
    Ok(db.check_same()?)
}

/// Opens the copy as a restore does, and reads all of it.
fn verify(db: &Db, copy: &Path, progress: &Progress) -> Result<Backup, BackupError> {
    let read = || -> Result<Backup, Fault> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(copy, flags)?;
        let transaction = connection.unchecked_transaction()?;
        if identify(&transaction, copy)? != identify(&db.connection, copy)? {
            return Err(Error::Corrupt("it has another schema than the store".to_owned()).into());
        }
        let counted = "SELECT (SELECT count(*) FROM documents) + (SELECT count(*) FROM revocations), (SELECT count(*) FROM log)";
        let (rows, log): (i64, i64) = transaction.query_row(counted, (), |row| Ok((row.get(0)?, row.get(1)?)))?;
        progress.to_verify.store(rows.saturating_add(log).unsigned_abs(), Ordering::Relaxed);
        let mut told = |rows: u64| {
            progress.verified.fetch_add(rows, Ordering::Relaxed);
        };
        whole::check_pages(&transaction, true)?;
        let head = whole::check_rows(&transaction, &mut told)?;
        let commits = whole::check_chain(&transaction, &head, &mut told)?;
        let bytes = copy.metadata().map_or(0, |metadata| metadata.len());
        whole::check_holds(&db.connection, &super::read::head(&db.connection)?, head.revision.number, &head.hash)?;
        Ok(Backup { revision: head.revision, rows: rows.unsigned_abs(), commits, bytes })
    };
    read().map_err(|fault| {
        let why = explain(copy, fault);
        BackupError::Copy(format!("the copy is not a whole store, and was removed: {why}"))
    })
}

/// Makes the copy durable, then gives it its final name.
fn take_name(copy: &Path, to: &Path, may_overwrite: bool) -> Result<(), BackupError> {
    let named = || -> io::Result<bool> {
        File::open(copy)?.sync_all()?;
        if may_overwrite {
            std::fs::rename(copy, to)?;
        } else if !take_free_name(copy, to)? {
            return Ok(false);
        }
        let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
        Ok(true)
    };
    match named() {
        Ok(true) => Ok(()),
        Ok(false) => Err(taken(to)),
        Err(error) => Err(BackupError::Copy(format!("cannot give `{}` its name: {error}", to.display()))),
    }
}

#[cfg(test)]
mod tests;
