//! Opening a SQLite file: is it ours, is it of this version, is it still the same file.
//!
//! Nothing is written to a file before it is known to be ours or empty. Look next at `super::read`.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior};

use super::schema::{self, SCHEMA_VERSION};
use crate::model::revision::StateDigest;
use crate::store::chain::GENESIS;
use crate::store::{Error, Settings};

/// `Ptcl`: marks a file as a store of this program.
const APPLICATION_ID: i64 = 0x5074_636c;
/// Stands for the version of a store that is not made yet.
const EMPTY: i64 = 0;
/// How long a connection waits for another process's write.
const BUSY_TIMEOUT_MS: u64 = 5_000;
/// How long it waits between two attempts where SQLite does not wait by itself.
const BUSY_STEP_MS: u64 = 20;
/// The write-ahead log is cut back to this after a checkpoint.
const WAL_BYTES_KEPT: i64 = 64 * 1024 * 1024;
const STATEMENTS_CACHED: usize = 64;

/// A connection and the file it was opened on.
pub(super) struct Db {
    pub(super) connection: Connection,
    path: PathBuf,
    file: FileId,
}

/// Which file stands at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

/// Why a step failed, before the file's name is put to it.
pub(super) enum Fault {
    Sql(rusqlite::Error),
    Store(Error),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Fault::Sql(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Store(error)
    }
}

/// Makes the folder and an empty file, both for the owner alone, unless they exist; answers the file's absolute path.
pub(super) fn prepare(path: &Path) -> Result<PathBuf, Error> {
    let failed = |error: io::Error| Error::Unavailable(format!("cannot make the store `{}`: {error}", path.display()));
    let name = path.file_name().ok_or_else(|| failed(io::Error::from(io::ErrorKind::InvalidFilename)))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let folder = folder.canonicalize().map_err(failed)?;
    let path = folder.join(name);
    // An existing file must not be opened here: closing it again would drop the locks that SQLite holds on it in this process.
    match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
        Ok(file) => {
            file.sync_all().map_err(failed)?;
            std::fs::File::open(&folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    Ok(path)
}

impl Db {
    /// Opens the file at an absolute path, and makes it a store with `settings` if it is empty.
    pub(super) fn open(path: &Path, settings: Settings, unix_ms: i64) -> Result<Self, Error> {
        let file = FileId::at(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let opened = Connection::open_with_flags(path, flags);
        let connection = opened.map_err(|error| explain(path, Fault::Sql(error)))?;
        let mut db = Self { connection, path: path.to_owned(), file };
        db.set_up(settings, unix_ms).map_err(|fault| db.explain(fault))?;
        db.check_same()?;
        Ok(db)
    }

    /// The number of the newest commit.
    pub(super) fn number(&mut self) -> Result<u64, Error> {
        super::read::revision(&self.connection).map(|revision| revision.number).map_err(|fault| self.explain(fault))
    }

    /// Checks that the path still leads to the file that was opened.
    pub(super) fn check_same(&self) -> Result<(), Error> {
        let replaced = || {
            let path = self.path.display();
            Error::Replaced(format!(
                "the store `{path}` was replaced or removed while it was open: restart the program to use what is there"
            ))
        };
        match FileId::at(&self.path) {
            Ok(now) if now == self.file => Ok(()),
            Ok(_) | Err(Error::Replaced(_)) => Err(replaced()),
            Err(error) => Err(error),
        }
    }

    /// Puts the file's name to a fault.
    pub(super) fn explain(&self, fault: Fault) -> Error {
        explain(&self.path, fault)
    }

    fn set_up(&mut self, settings: Settings, unix_ms: i64) -> Result<(), Fault> {
        let connection = &self.connection;
        connection.busy_timeout(Duration::from_millis(BUSY_TIMEOUT_MS))?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_CACHED);
        // One view for all that is looked at: another process may be making the store at this moment.
        let found = identify(&*connection.unchecked_transaction()?, &self.path)?;
        let mode = self.keep_write_ahead_log()?;
        if mode != "wal" {
            let path = self.path.display();
            let why = format!("the store `{path}` cannot keep a write-ahead log where it is: move it to a local file system");
            return Err(Error::Unavailable(why).into());
        }
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "journal_size_limit", WAL_BYTES_KEPT)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        match found {
            SCHEMA_VERSION => Ok(()),
            _ => self.bring_up(settings, unix_ms),
        }
    }

    /// Changes the journal, unless it is so already; answers what it is.
    ///
    /// SQLite does not wait for this lock as it does for others, so this does.
    fn keep_write_ahead_log(&self) -> rusqlite::Result<String> {
        let change = || self.connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0));
        for _ in 0..BUSY_TIMEOUT_MS / BUSY_STEP_MS {
            match change() {
                Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
                    std::thread::sleep(Duration::from_millis(BUSY_STEP_MS));
                }
                answer => return answer,
            }
        }
        change()
    }

    /// Makes the store in an empty file, or brings one of an older version up, in one transaction.
    fn bring_up(&mut self, settings: Settings, unix_ms: i64) -> Result<(), Fault> {
        let path = self.path.clone();
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Another process may have been quicker.
        let found = identify(&transaction, &path)?;
        if found == SCHEMA_VERSION {
            return Ok(());
        }
        schema::upgrade(&transaction, found)?;
        if found == EMPTY {
            transaction.execute(
                "INSERT INTO meta (id, history, made_unix_ms, iat_skew_s, freshness_bound_ms) VALUES (1, ?1, ?2, ?3, ?4)",
                (
                    uuid::Uuid::now_v7().to_string(),
                    unix_ms,
                    settings.iat_skew_s,
                    super::read::signed(settings.freshness_bound_ms)?,
                ),
            )?;
            transaction.execute(
                "INSERT INTO head (id, number, hash, digest, floor, revocations, documents_number) VALUES (1, 0, ?1, ?2, 0, 0, 0)",
                (GENESIS, StateDigest::default().to_hex()),
            )?;
            transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        }
        Ok(transaction.commit()?)
    }
}

impl FileId {
    fn at(path: &Path) -> Result<Self, Error> {
        match rustix::fs::stat(path) {
            Ok(stat) => Ok(Self { device: stat.st_dev, inode: stat.st_ino }),
            Err(rustix::io::Errno::NOENT) => Err(Error::Replaced(format!("there is no store at `{}`", path.display()))),
            Err(error) => Err(Error::Unavailable(format!("cannot see the store `{}`: {error}", path.display()))),
        }
    }
}

/// The version of the store in the file, [`EMPTY`] for an empty database; an error if it is neither that nor one that this program
/// knows.
fn identify(connection: &Connection, path: &Path) -> Result<i64, Fault> {
    let path = path.display();
    let application: i64 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if application == APPLICATION_ID {
        return match version {
            1..=SCHEMA_VERSION => Ok(version),
            newer if newer > SCHEMA_VERSION => Err(Error::NewerVersion(format!(
                "the store `{path}` has schema {newer} and this program knows {SCHEMA_VERSION}: use the version that made it, or a newer one"
            ))
            .into()),
            other => Err(Error::Corrupt(format!("the store `{path}` has schema {other}, which no version has written")).into()),
        };
    }
    let table: Option<String> =
        connection.query_row("SELECT name FROM sqlite_schema LIMIT 1", (), |row| row.get(0)).optional()?;
    if application == 0 && version == 0 && table.is_none() {
        return Ok(EMPTY);
    }
    Err(Error::NotOurs(format!("`{path}` is a SQLite database of another program: name another file for the store")).into())
}

fn explain(path: &Path, fault: Fault) -> Error {
    let error = match fault {
        Fault::Store(error) => return error,
        Fault::Sql(error) => error,
    };
    let path = path.display();
    let corrupt = |what: &dyn std::fmt::Display| Error::Corrupt(format!("the store `{path}` does not hold together: {what}"));
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => {
            Error::NotOurs(format!("`{path}` is not a SQLite database: name another file for the store"))
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::Unknown)
        | None => corrupt(&error),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            Error::Unavailable(format!("the store `{path}` is busy, another process holds it: try again"))
        }
        Some(ErrorCode::DiskFull) => {
            Error::Unavailable(format!("no space is left for the store `{path}`, so nothing was written: make room"))
        }
        Some(_) => Error::Unavailable(format!("the store `{path}` cannot be used: {error}")),
    }
}
