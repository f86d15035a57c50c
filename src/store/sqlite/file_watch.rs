//! Detects that the files of an open store were replaced, or that a program other than SQLite wrote to them.
//!
//! If an open file is removed or replaced, the process goes on writing to the old file, and its commits are lost, because nobody
//! can find that file again. A store consists of three files: the database, its write-ahead log `-wal` and its shared memory
//! `-shm`. Before each read, and before and after each commit, the device and inode at the three paths are compared with those of
//! the opened files. SQLite keeps all three files open, so no inode number is reused in the meantime.
//!
//! A program can also overwrite a file in place (`cp`, `truncate`), which keeps the inode. In WAL mode only a checkpoint writes
//! to the database file. Therefore, if its size or modification time differs and no checkpoint explains the difference, the whole
//! store is read again through a new connection, whose cache is empty. It must be consistent and must contain the newest commit
//! that was known. Otherwise this process never uses the store again. The same check follows if the write-ahead log became
//! shorter.
//!
//! The content of `-shm` decides which part of `-wal` SQLite reads, and every commit changes it. So no check of the file can find
//! that an older copy was written over it. What shows it is the head, which then falls. Each transaction therefore checks that the
//! head continues from the newest commit that this process knew before. After each commit, a second connection, whose cache is
//! older, must find the commit.
//!
//! Three cases go unnoticed: a program that overwrites the database exactly during a checkpoint, one that overwrites `-wal` without
//! changing its length and without making the head fall, and one that overwrites `-shm` so that the newest head stays in place.
//! They are found when the store is opened next, because the digest of its rows or the replica's position contradicts it. Look next
//! at `super::integrity`.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::connection_settings::{BUSY_TIMEOUT, WAL_BYTES_KEPT, disable_checkpoint_on_close};
use super::error::{SqliteError, to_store_error};
use super::file_identity::read_schema_version;
use super::integrity;
use super::read;
use super::schema::SCHEMA_VERSION;
use crate::store::Error;

/// Number of times, and the pause between them, for which a changed file waits for a checkpoint of another process to explain it.
const EXPLAIN_ATTEMPTS_MAX: usize = 20;
const EXPLAIN_PAUSE: Duration = Duration::from_millis(10);

/// The files of one open store, which all of its connections share.
pub(super) struct StoreFiles {
    /// The path of the database as it was given, then the paths of the files that SQLite keeps beside it.
    paths: [PathBuf; 3],
    state: Mutex<FileState>,
}

/// The last known state of the files.
struct FileState {
    ids: [FileId; 3],
    database: FileStamp,
    log_bytes: u64,
    /// Frames of the write-ahead log that were copied to the database, as SQLite counts them.
    backfilled: i64,
    /// The newest commit that this process knows of.
    newest: Option<KnownCommit>,
    /// Checkpoints of this process that are writing to the database now.
    checkpoints: u32,
    /// Why this process never uses the files again.
    replaced: Option<Error>,
}

/// The number and the hash of a commit that the store is known to contain.
pub(super) type KnownCommit = (u64, [u8; 32]);

/// Identifies the file at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

/// Size and modification time, which change when a file is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

/// The files at the three paths.
type FoundFiles = [(FileId, FileStamp); 3];

impl StoreFiles {
    /// Records the files of a connection that has read once, because SQLite opens all three files at the first read.
    pub(super) fn from_connection(connection: &Connection, path: &Path) -> Result<Self, Error> {
        let real = path.canonicalize().map_err(|error| stat_error(path, &error))?;
        let companion_path = |suffix: &str| {
            let mut name = OsString::from(&real);
            name.push(suffix);
            PathBuf::from(name)
        };
        let paths = [path.to_owned(), companion_path("-wal"), companion_path("-shm")];
        let [database, log, memory] = stat_files(&paths)?;
        let state = FileState {
            ids: [database.0, log.0, memory.0],
            database: database.1,
            log_bytes: log.1.bytes,
            backfilled: backfilled_frames(connection).unwrap_or_default(),
            newest: None,
            checkpoints: 0,
            replaced: None,
        };
        Ok(Self { paths, state: Mutex::new(state) })
    }

    /// Bytes of the write-ahead log at the last check.
    pub(super) fn log_bytes(&self) -> u64 {
        self.lock_state().log_bytes
    }

    /// Records a commit that the store is known to contain. The recorded number never falls.
    pub(super) fn record_commit(&self, number: u64, hash: [u8; 32]) {
        let mut state = self.lock_state();
        if state.newest.is_none_or(|(newest, _)| number > newest) {
            state.newest = Some((number, hash));
        }
    }

    /// The newest recorded commit. Every transaction that begins after this call finds it in the store.
    pub(super) fn newest_commit(&self) -> Option<KnownCommit> {
        self.lock_state().newest
    }

    /// Checks within the caller's transaction that the head of the store continues from a commit that was known before the
    /// transaction began.
    ///
    /// Revisions are numbered without end: commits of other processes, prunes, merges and adoptions all make the number rise, and
    /// an adoption changes only the name of the history. So the number in open files never falls.
    ///
    /// # Errors
    /// [`Error::Replaced`] if the head does not continue from there, for every later check of these files too.
    pub(super) fn check_head(&self, connection: &Connection, known: Option<KnownCommit>) -> Result<(), SqliteError> {
        let head = read::read_head(connection)?;
        let Some((number, hash)) = known else { return Ok(()) };
        let found = head.revision.number;
        let is_fork = match found.cmp(&number) {
            Ordering::Less => return Err(self.refuse_head(&format!("fell from revision {number} to {found}")).into()),
            Ordering::Equal => head.hash != hash,
            // The log may have been cut above that commit.
            Ordering::Greater => read::read_log_hash(connection, number)?.is_some_and(|in_log| in_log != hash),
        };
        if is_fork {
            return Err(self.refuse_head(&format!("holds another revision {number} than before")).into());
        }
        Ok(())
    }

    /// Ends the use of the files because of their head. Returns the error of this and every later check.
    fn refuse_head(&self, seen: &str) -> Error {
        let [path, ..] = &self.paths;
        let error = Error::Replaced(format!(
            "the store `{}` {seen} while it was open, so an older state was written over one of its files (`-shm`, `-wal` or the \
             database): {REPLACED_HINT}",
            path.display()
        ));
        self.lock_state().replaced.get_or_insert(error).clone()
    }

    /// Checks that the files are those that were opened. Must not be called within a transaction.
    ///
    /// # Errors
    /// [`Error::Replaced`] if they are not, for this and every later call; [`Error::Unavailable`] if the check is impossible now.
    pub(super) fn check_unchanged(&self, connection: &Connection) -> Result<(), Error> {
        let mut state = self.lock_state();
        if let Some(replaced) = &state.replaced {
            return Err(replaced.clone());
        }
        let judged = stat_files(&self.paths).and_then(|found| self.compare_files(&mut state, &found, connection));
        if let Err(error @ Error::Replaced(_)) = &judged {
            state.replaced = Some(error.clone());
        }
        judged
    }

    /// Runs a checkpoint of this process, and accepts the writes that it makes.
    pub(super) fn checkpoint(&self, connection: &Connection) -> Result<(), SqliteError> {
        self.check_unchanged(connection)?;
        {
            let mut state = self.lock_state();
            state.checkpoints = state.checkpoints.saturating_add(1);
        }
        let done = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", (), |row| row.get::<_, i64>(0));
        let mut state = self.lock_state();
        state.checkpoints = state.checkpoints.saturating_sub(1);
        // A checkpoint that failed may have written something, so its writes are not accepted and the store is read again.
        if let (Ok(_), 0, Ok(found)) = (&done, state.checkpoints, stat_files(&self.paths)) {
            state.accept_found(&found, backfilled_frames(connection));
        }
        done.map(drop).map_err(SqliteError::from)
    }

    /// Compares the files that were found with the last known state.
    fn compare_files(&self, state: &mut FileState, found: &FoundFiles, connection: &Connection) -> Result<(), Error> {
        let [(_, database), (_, log), _] = found;
        for ((path, opened), (id, _)) in self.paths.iter().zip(&state.ids).zip(found) {
            if id != opened {
                return Err(replaced_error(path));
            }
        }
        // SQLite truncates a log that it restarts to this size.
        let is_cut = log.bytes < state.log_bytes.min(WAL_BYTES_KEPT.unsigned_abs());
        if (*database == state.database && !is_cut) || state.checkpoints > 0 {
            state.log_bytes = log.bytes;
            return Ok(());
        }
        for _ in 0..EXPLAIN_ATTEMPTS_MAX {
            let copied = backfilled_frames(connection);
            // A restarted log has no copied frames, so it explains nothing.
            if copied.is_some_and(|copied| copied > 0 && copied != state.backfilled) && !is_cut {
                state.accept_found(&stat_files(&self.paths)?, copied);
                return Ok(());
            }
            std::thread::sleep(EXPLAIN_PAUSE);
        }
        let [path, ..] = &self.paths;
        let found = stat_files(&self.paths)?;
        verify_store(path, state.newest)?;
        tracing::warn!(
            path = %path.display(),
            "the file of the store was written by another program; it was read again, and holds all that was known"
        );
        state.accept_found(&found, backfilled_frames(connection));
        Ok(())
    }

    /// Locks the last known state.
    fn lock_state(&self) -> MutexGuard<'_, FileState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileState {
    /// Accepts the files that were found as the known state.
    fn accept_found(&mut self, found: &FoundFiles, backfilled: Option<i64>) {
        let [(_, database), (_, log), _] = found;
        self.database = *database;
        self.log_bytes = log.bytes;
        self.backfilled = backfilled.unwrap_or_default();
    }
}

/// Reads the whole store again, past every cache of this process.
fn verify_store(path: &Path, newest: Option<KnownCommit>) -> Result<(), Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let read = || -> Result<(), SqliteError> {
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        disable_checkpoint_on_close(&connection);
        let transaction = connection.unchecked_transaction()?;
        let version = read_schema_version(&transaction, path)?;
        if version != SCHEMA_VERSION {
            return Err(Error::NewerVersion(format!("its schema is now {version}")).into());
        }
        integrity::check_pages(&transaction, false)?;
        let head = integrity::check_rows(&transaction, &mut |_| {})?;
        if let Some((number, hash)) = newest {
            integrity::check_contains_commit(&transaction, &head, number, &hash)?;
        }
        Ok(())
    };
    let Err(fault) = read() else { return Ok(()) };
    let is_passing = matches!(&fault, SqliteError::Sql(error) if matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::OutOfMemory | ErrorCode::CannotOpen)
    ));
    let error = to_store_error(path, fault);
    if is_passing {
        return Err(error);
    }
    Err(Error::Replaced(format!("the store `{}` was written over while it was open ({error}): {REPLACED_HINT}", path.display())))
}

/// Frames of the write-ahead log that were copied to the database; `None` if SQLite does not tell.
fn backfilled_frames(connection: &Connection) -> Option<i64> {
    connection.query_row("PRAGMA wal_checkpoint(NOOP)", (), |row| row.get(2)).ok()
}

const REPLACED_HINT: &str = "what is written now would be lost, so nothing is acknowledged; stop every program that has the store open, put the \
                  right files back, start again and repeat the act (docs/OPERATIONS.md, `The store cannot be followed`)";

/// The error for a file that was removed or replaced.
fn replaced_error(path: &Path) -> Error {
    Error::Replaced(format!("`{}` was removed or replaced while the store was open: {REPLACED_HINT}", path.display()))
}

/// The error for a file that cannot be examined.
fn stat_error(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::Unavailable(format!("cannot see the store's file `{}`: {error}", path.display()))
}

/// Examines the files at the three paths.
fn stat_files(paths: &[PathBuf; 3]) -> Result<FoundFiles, Error> {
    let [database, log, memory] = paths;
    Ok([stat_file(database)?, stat_file(log)?, stat_file(memory)?])
}

/// Examines the file at one path.
fn stat_file(path: &Path) -> Result<(FileId, FileStamp), Error> {
    match rustix::fs::stat(path) {
        Ok(stat) => {
            let bytes = u64::try_from(stat.st_size).unwrap_or_default();
            let content = FileStamp {
                bytes,
                modified_s: stat.st_mtime,
                modified_ns: i64::try_from(stat.st_mtime_nsec).unwrap_or_default(),
            };
            Ok((FileId { device: stat.st_dev, inode: stat.st_ino }, content))
        }
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Err(replaced_error(path)),
        Err(error) => Err(stat_error(path, &error)),
    }
}

#[cfg(test)]
mod tests;
