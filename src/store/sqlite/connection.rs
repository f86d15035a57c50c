//! Opens connections to a SQLite store. The file must hold a complete store of this program.
//!
//! Nothing is created here; see `super::create`. Nothing is written to a file before it is known to be a store of this program.
//! Look next at `super::file_identity`, which examines the file, at `super::file_watch`, which checks that it remains the same
//! file, and at `super::read`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::connection_settings::{BUSY_TIMEOUT, configure_connection, disable_checkpoint_on_close};
use super::error::{SqliteError, to_store_error};
use super::file_identity::read_schema_version;
use super::file_watch::{KnownCommit, StoreFiles};
use super::header::nonempty_wal_path;
use super::schema::{self, SCHEMA_VERSION};
use crate::store::Error;

const STATEMENTS_CACHED: usize = 64;

/// A connection, and the files on which it was opened.
pub(super) struct SqliteConnection {
    pub(super) connection: Connection,
    path: PathBuf,
    files: Arc<StoreFiles>,
    is_closed: bool,
}

impl SqliteConnection {
    /// Opens the store at a path that `file_identity::find_store` returned, and upgrades it to the schema of this version.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, upgrade_store)
    }

    /// Opens the store at a path that `file_identity::find_store` returned, and leaves its schema as it is.
    pub(super) fn open_without_upgrade(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, |_, _| Ok(()))
    }

    fn open_with(path: &Path, bring_up: UpgradeFn) -> Result<Self, Error> {
        // A connection that fails may remove the log when it is closed.
        let log = nonempty_wal_path(path);
        let connection = open_connection(path, bring_up).map_err(|fault| match to_store_error(path, fault) {
            Error::Corrupt(why) if log.is_some() => Error::Corrupt(format!("{why}; {LOG_LEFT_BEHIND}")),
            error => error,
        })?;
        let files = Arc::new(StoreFiles::from_connection(&connection, path)?);
        Ok(Self { connection, path: path.to_owned(), files, is_closed: false })
    }

    /// Opens another connection on the same files.
    pub(super) fn open_sibling(&self) -> Result<Self, Error> {
        let connection = open_connection(&self.path, |_, _| Ok(())).map_err(|fault| self.to_store_error(fault))?;
        let sibling = Self { connection, path: self.path.clone(), files: self.files.clone(), is_closed: false };
        sibling.check_files()?;
        Ok(sibling)
    }

    /// The files, which all connections of a store share.
    pub(super) fn files(&self) -> &Arc<StoreFiles> {
        &self.files
    }

    /// The number of the newest commit. From now on, the files must contain that commit.
    pub(super) fn newest_number(&mut self) -> Result<u64, Error> {
        let head = super::read::read_head(&self.connection).map_err(|fault| self.to_store_error(fault))?;
        self.files.record_commit(head.revision.number, head.hash);
        Ok(head.revision.number)
    }

    /// Checks that the paths still lead to the files that were opened, and that only SQLite wrote to them.
    pub(super) fn check_files(&self) -> Result<(), Error> {
        if self.is_closed {
            return Err(Error::Unavailable(format!("the store `{}` was closed: start the program again", self.path.display())));
        }
        self.files.check_unchanged(&self.connection)
    }

    /// Checks the files, then, in a transaction of its own, that the store continues from a commit. Must not be called within a
    /// transaction.
    ///
    /// # Errors
    /// As [`SqliteConnection::check_files`], and [`Error::Replaced`] if the head does not continue from the commit.
    pub(super) fn check_continues(&self, known: Option<KnownCommit>) -> Result<(), Error> {
        self.check_files()?;
        let read = || -> Result<(), SqliteError> {
            let transaction = self.connection.unchecked_transaction()?;
            self.files.check_head(&transaction, known)
        };
        read().map_err(|fault| self.to_store_error(fault))
    }

    /// Copies committed pages from the write-ahead log to the database file, as far as readers permit.
    pub(super) fn checkpoint(&self) -> Result<(), Error> {
        // A checkpoint by an older state of the log would copy the wrong pages.
        self.check_continues(self.files.newest_commit())?;
        self.files.checkpoint(&self.connection).map_err(|fault| self.to_store_error(fault))
    }

    /// Closes the connection. The last connection that closes, of all processes, leaves one complete file.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        if self.is_closed {
            return Ok(());
        }
        self.protect_files_at_close();
        let nothing = Connection::open_in_memory().map_err(|error| self.to_store_error(error.into()))?;
        let connection = std::mem::replace(&mut self.connection, nothing);
        self.is_closed = true;
        connection.close().map_err(|(_, error)| self.to_store_error(error.into()))
    }

    /// Converts an error, so that its message names the file.
    pub(super) fn to_store_error(&self, fault: SqliteError) -> Error {
        to_store_error(&self.path, fault)
    }

    /// Keeps the last connection from writing to files that are not its own.
    ///
    /// INVARIANT: the connection that closes last copies its write-ahead log over the database and removes the log by its name.
    /// If the names lead to other files by now, that would undo commits that others made to those files.
    fn protect_files_at_close(&self) {
        if !self.is_closed && self.check_continues(self.files.newest_commit()).is_err() {
            disable_checkpoint_on_close(&self.connection);
        }
    }
}

impl Drop for SqliteConnection {
    fn drop(&mut self) {
        self.protect_files_at_close();
    }
}

/// What to do with a store that has an older schema.
type UpgradeFn = fn(&mut Connection, &Path) -> Result<(), SqliteError>;

fn open_connection(path: &Path, bring_up: UpgradeFn) -> Result<Connection, SqliteError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_CACHED);
    // One transaction for all checks, because another process may be upgrading the file at the same time.
    let found = read_schema_version(&*connection.unchecked_transaction()?, path)?;
    if connection.is_readonly("main")? {
        let path = path.display();
        let why = format!("the store `{path}` cannot be written to by this user: run as its owner, or give the right to write");
        return Err(Error::Misconfigured(why).into());
    }
    configure_connection(&connection, path)?;
    if found != SCHEMA_VERSION {
        bring_up(&mut connection, path)?;
    }
    // Only now has SQLite opened all of its files.
    let head = super::read::read_head(&connection)?;
    if super::read::read_log_hash(&connection, head.revision.number)? != Some(head.hash) {
        let number = head.revision.number;
        return Err(super::read::corrupt_error(format!(
            "revision {number} of the change log is not the one that the head names"
        )));
    }
    Ok(connection)
}

/// Upgrades a store of an older version in one transaction.
fn upgrade_store(connection: &mut Connection, path: &Path) -> Result<(), SqliteError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have upgraded it in the meantime.
    let found = read_schema_version(&transaction, path)?;
    if found == SCHEMA_VERSION {
        return Ok(());
    }
    schema::upgrade_schema(&transaction, found)?;
    Ok(transaction.commit()?)
}

/// Advice for an inconsistent store that had a write-ahead log beside it.
const LOG_LEFT_BEHIND: &str = "if a copy was just put back, the `-wal` and `-shm` of the store before it were left beside it: remove them, \
                               and put the copy back again (docs/OPERATIONS.md, `Back up and restore`)";
