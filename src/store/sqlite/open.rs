//! Opens a connection to a SQLite store and checks the file: it must belong to this program, have a known version and be
//! complete.
//!
//! Nothing is created here; see `super::create`. Nothing is written to a file before it is known to be a store of this program.
//! Look next at `super::files`, which checks that it remains the same file, and at `super::read`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior};

use super::files::Files;
use super::schema::{self, SCHEMA_VERSION};
use crate::store::Error;

/// `Ptcl`: marks a file as a store of this program.
pub(super) const APPLICATION_ID: i64 = 0x5074_636c;
/// How long a connection waits for another process that writes.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two attempts at an operation for which SQLite does not wait by itself.
const BUSY_STEP: Duration = Duration::from_millis(20);
/// Size to which SQLite truncates the write-ahead log when it restarts the log.
pub(super) const LOG_BYTES_KEPT: i64 = 64 * 1024 * 1024;
const STATEMENTS_CACHED: usize = 64;

/// A connection, and the files on which it was opened.
pub(super) struct Db {
    pub(super) connection: Connection,
    path: PathBuf,
    files: Arc<Files>,
    is_closed: bool,
}

/// Why a step failed, before the error message names the file.
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

/// Returns the absolute path of an existing store.
///
/// # Errors
/// [`Error::Missing`] if there is nothing or an empty file, [`Error::NotOurs`] if the path is no file.
pub(super) fn find(path: &Path) -> Result<PathBuf, Error> {
    let shown = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let shown = shown.display();
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Error::Missing(format!("there is no store at `{shown}`"))
        }
        _ => Error::Unavailable(format!("cannot see the store `{shown}`: {error}")),
    })?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a folder" } else { "no plain file" };
        return Err(Error::NotOurs(format!("`{shown}` is {what}, not a store: name the store's file")));
    }
    if metadata.len() == 0 {
        return Err(Error::Missing(format!("`{shown}` is empty (0 bytes), which no store ever is: {RESTORE}")));
    }
    let name = path.file_name().ok_or_else(|| Error::NotOurs(format!("`{shown}` names no file")))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let unseen = |error: std::io::Error| Error::Unavailable(format!("cannot see the store `{shown}`: {error}"));
    Ok(folder.canonicalize().map_err(unseen)?.join(name))
}

impl Db {
    /// Opens the store at a path that [`find`] returned, and upgrades it to the schema of this version.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, bring_up)
    }

    /// Opens the store at a path that [`find`] returned, and leaves its schema as it is.
    pub(super) fn open_as_it_is(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, |_, _| Ok(()))
    }

    fn open_with(path: &Path, bring_up: BringUp) -> Result<Self, Error> {
        let connection = connect(path, bring_up).map_err(|fault| explain(path, fault))?;
        let files = Arc::new(Files::of(&connection, path)?);
        Ok(Self { connection, path: path.to_owned(), files, is_closed: false })
    }

    /// Opens another connection on the same files.
    pub(super) fn sibling(&self) -> Result<Self, Error> {
        let connection = connect(&self.path, |_, _| Ok(())).map_err(|fault| self.explain(fault))?;
        let sibling = Self { connection, path: self.path.clone(), files: self.files.clone(), is_closed: false };
        sibling.check_same()?;
        Ok(sibling)
    }

    /// The files, which all connections of a store share.
    pub(super) fn files(&self) -> &Arc<Files> {
        &self.files
    }

    /// The number of the newest commit. From now on, the files must contain that commit.
    pub(super) fn number(&mut self) -> Result<u64, Error> {
        let head = super::read::head(&self.connection).map_err(|fault| self.explain(fault))?;
        self.files.saw(head.revision.number, head.hash);
        Ok(head.revision.number)
    }

    /// Checks that the paths still lead to the files that were opened, and that only SQLite wrote to them.
    pub(super) fn check_same(&self) -> Result<(), Error> {
        if self.is_closed {
            return Err(Error::Unavailable(format!("the store `{}` was closed: start the program again", self.path.display())));
        }
        self.files.check(&self.connection)
    }

    /// Copies committed pages from the write-ahead log to the database file, as far as readers permit.
    pub(super) fn checkpoint(&self) -> Result<(), Error> {
        self.files.checkpoint(&self.connection).map_err(|fault| self.explain(fault))
    }

    /// Closes the connection. The last connection that closes, of all processes, leaves one complete file.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        if self.is_closed {
            return Ok(());
        }
        self.guard_close();
        let nothing = Connection::open_in_memory().map_err(|error| self.explain(error.into()))?;
        let connection = std::mem::replace(&mut self.connection, nothing);
        self.is_closed = true;
        connection.close().map_err(|(_, error)| self.explain(error.into()))
    }

    /// Converts an error, so that its message names the file.
    pub(super) fn explain(&self, fault: Fault) -> Error {
        explain(&self.path, fault)
    }

    /// Keeps the last connection from writing to files that are not its own.
    ///
    /// INVARIANT: the connection that closes last copies its write-ahead log over the database and removes the log by its name.
    /// If the names lead to other files by now, that would undo commits that others made to those files.
    fn guard_close(&self) {
        if !self.is_closed && self.check_same().is_err() {
            keep_log_at_close(&self.connection);
        }
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        self.guard_close();
    }
}

/// Makes SQLite leave the files as they are when the connection is closed.
pub(super) fn keep_log_at_close(connection: &Connection) {
    // This fails for no open connection.
    let _ = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
}

/// What to do with a store that has an older schema.
type BringUp = fn(&mut Connection, &Path) -> Result<(), Fault>;

fn connect(path: &Path, bring_up: BringUp) -> Result<Connection, Fault> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_CACHED);
    // One transaction for all checks, because another process may be upgrading the file at the same time.
    let found = identify(&*connection.unchecked_transaction()?, path)?;
    if connection.is_readonly("main")? {
        let path = path.display();
        let why = format!("the store `{path}` cannot be written to by this user: run as its owner, or give the right to write");
        return Err(Error::Misconfigured(why).into());
    }
    set_up(&connection, path)?;
    if found != SCHEMA_VERSION {
        bring_up(&mut connection, path)?;
    }
    // Only now has SQLite opened all of its files.
    let head = super::read::head(&connection)?;
    if super::read::log_hash(&connection, head.revision.number)? != Some(head.hash) {
        let number = head.revision.number;
        return Err(super::read::corrupt(format!("revision {number} of the change log is not the one that the head names")));
    }
    Ok(connection)
}

/// Configures a new connection.
pub(super) fn set_up(connection: &Connection, path: &Path) -> Result<(), Fault> {
    let mode = keep_write_ahead_log(connection)?;
    if mode != "wal" {
        let path = path.display();
        let why = format!("the store `{path}` cannot keep a write-ahead log where it is: move it to a local file system");
        return Err(Error::Unavailable(why).into());
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", LOG_BYTES_KEPT)?;
    // Only `Files::checkpoint` runs checkpoints, because the check of the files must know of them.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)?;
    Ok(())
}

/// Switches the journal to a write-ahead log, if it is not one already. Returns the resulting journal mode.
///
/// SQLite does not wait for this lock as it does for others, so this function retries.
fn keep_write_ahead_log(connection: &Connection) -> rusqlite::Result<String> {
    let change = || connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0));
    for _ in 0..BUSY_TIMEOUT.as_millis() / BUSY_STEP.as_millis() {
        match change() {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => std::thread::sleep(BUSY_STEP),
            answer => return answer,
        }
    }
    change()
}

/// Upgrades a store of an older version in one transaction.
fn bring_up(connection: &mut Connection, path: &Path) -> Result<(), Fault> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have upgraded it in the meantime.
    let found = identify(&transaction, path)?;
    if found == SCHEMA_VERSION {
        return Ok(());
    }
    schema::upgrade(&transaction, found)?;
    Ok(transaction.commit()?)
}

/// Advice for a file that holds only the remains of a store.
const RESTORE: &str = "put a backup in its place (docs/OPERATIONS.md, `Back up and restore`), or name another file";

/// Returns the schema version of the store in the file. Fails if the version is unknown, or if the store is incomplete.
pub(super) fn identify(connection: &Connection, path: &Path) -> Result<i64, Fault> {
    let path = path.display();
    let application: i64 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if application == APPLICATION_ID {
        let heads = "SELECT (SELECT count(*) FROM head) + (SELECT count(*) FROM meta)";
        return match version {
            1..=SCHEMA_VERSION => match connection.query_row(heads, (), |row| row.get::<_, i64>(0)) {
                Ok(2) => Ok(version),
                Ok(_) => Err(Error::Missing(format!("`{path}` has the tables of a store and no head: {RESTORE}")).into()),
                Err(error) => Err(error.into()),
            },
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
        return Err(Error::Missing(format!(
            "`{path}` is the shell of a database: it holds no table, because it was copied without its `-wal` file or cut off; it is no \
             empty store: {RESTORE}"
        ))
        .into());
    }
    Err(Error::NotOurs(format!("`{path}` is a SQLite database of another program: name another file for the store")).into())
}

pub(super) fn explain(path: &Path, fault: Fault) -> Error {
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
