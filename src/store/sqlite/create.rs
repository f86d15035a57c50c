//! Creates a SQLite store completely or not at all.
//!
//! The store is written under a temporary name, with its tables, settings and head in one transaction. It gets its final name
//! only then, and only if that name is still free. Therefore a store's path never holds an empty file that a process is about to
//! fill. Look next at `super::connection`.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::connection_settings::configure_connection;
use super::error::{SqliteError, to_store_error};
use super::header::APPLICATION_ID;
use super::read::to_i64;
use super::schema;
use crate::model::revision::StateDigest;
use crate::store::hash_chain::GENESIS;
use crate::store::{Error, Settings};

/// Creates a store with mode 0600, and its folder with mode 0700, unless the name is taken.
pub(super) fn create_store(path: &Path, settings: Settings, unix_ms: i64) -> Result<(), Error> {
    let failed = |error: io::Error| Error::Unavailable(format!("cannot make the store `{}`: {error}", path.display()));
    let name = path.file_name().ok_or_else(|| failed(io::Error::from(io::ErrorKind::InvalidFilename)))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let folder = folder.canonicalize().map_err(failed)?;
    let path = folder.join(name);
    let unfinished = temporary_path(&path);
    let made = write_empty_store(&unfinished, settings, unix_ms).map_err(|fault| to_store_error(&unfinished, fault));
    let named = made.and_then(|()| rename_if_free(&unfinished, &path).map_err(failed));
    // Another process may have created the store first; the caller then opens that one.
    if named != Ok(true) {
        remove_temporary(&unfinished);
    }
    named?;
    File::open(&folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

/// Returns a unique name beside a file.
pub(super) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", uuid::Uuid::new_v4()));
    path.with_file_name(name)
}

/// Creates an empty file that only its owner can read.
pub(super) fn create_private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Removes an unfinished file and the files that SQLite keeps beside it.
pub(super) fn remove_temporary(unfinished: &Path) {
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let mut name = unfinished.as_os_str().to_owned();
        name.push(suffix);
        // Most of them do not exist.
        let _ = std::fs::remove_file(PathBuf::from(name));
    }
}

fn write_empty_store(path: &Path, settings: Settings, unix_ms: i64) -> Result<(), SqliteError> {
    let failed = |error: io::Error| Error::Unavailable(format!("cannot make the store `{}`: {error}", path.display()));
    create_private_file(path).map_err(failed)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    configure_connection(&connection, path)?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    schema::upgrade_schema(&transaction, 0)?;
    transaction.execute(
        "INSERT INTO meta (id, history, made_unix_ms, iat_skew_s, freshness_bound_ms) VALUES (1, ?1, ?2, ?3, ?4)",
        (uuid::Uuid::now_v7().to_string(), unix_ms, settings.iat_skew_s, to_i64(settings.freshness_bound_ms)?),
    )?;
    transaction.execute(
        "INSERT INTO head (id, number, hash, digest, floor, revocations, documents_number) VALUES (1, 0, ?1, ?2, 0, 0, 0)",
        (GENESIS, StateDigest::default().to_hex()),
    )?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.commit()?;
    // No other connection is open, so closing leaves one complete file.
    connection.close().map_err(|(_, error)| error)?;
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| failed(error).into())
}

/// Renames a file to its final name. Returns `false`, and changes nothing, if that name is taken.
pub(super) fn rename_if_free(unfinished: &Path, path: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, unfinished, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(true),
        Err(Errno::EXIST) => return Ok(false),
        // Some file systems do not support this flag; all of those support hard links.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
        Err(error) => return Err(error.into()),
    }
    match std::fs::hard_link(unfinished, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        linked => linked?,
    }
    std::fs::remove_file(unfinished)?;
    Ok(true)
}
