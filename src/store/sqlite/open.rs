//! Opens connections to a SQLite store. The file must hold a complete store of this program.
//!
//! Nothing is created here; see `super::create`. Nothing is written to a file before it is known to be a store of this program.
//! Look next at `super::file_identity`, which examines the file, at `super::files`, which checks that it remains the same file,
//! and at `super::read`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::connection_settings::{BUSY_TIMEOUT, keep_log_at_close, set_up};
use super::file_identity::identify;
use super::files::Files;
use super::schema::{self, SCHEMA_VERSION};
use super::store_fault::{Fault, explain};
use crate::store::Error;

const STATEMENTS_CACHED: usize = 64;

/// A connection, and the files on which it was opened.
pub(super) struct Db {
    pub(super) connection: Connection,
    path: PathBuf,
    files: Arc<Files>,
    is_closed: bool,
}

impl Db {
    /// Opens the store at a path that `file_identity::find` returned, and upgrades it to the schema of this version.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, bring_up)
    }

    /// Opens the store at a path that `file_identity::find` returned, and leaves its schema as it is.
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
