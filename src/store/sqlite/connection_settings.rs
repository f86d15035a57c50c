//! The settings that every connection to a SQLite store has.
//!
//! Look next at `connection.rs`, which makes the connections of a store, and at `file_watch.rs`, which makes one to read a file again.

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode};

use super::error::SqliteError;
use crate::store::Error;

/// How long a connection waits for another process that writes.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two attempts at an operation for which SQLite does not wait by itself.
const BUSY_RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Size to which SQLite truncates the write-ahead log when it restarts the log.
pub(super) const WAL_BYTES_KEPT: i64 = 64 * 1024 * 1024;

/// Configures a new connection.
pub(super) fn configure_connection(connection: &Connection, path: &Path) -> Result<(), SqliteError> {
    let mode = enable_wal(connection)?;
    if mode != "wal" {
        let path = path.display();
        let why = format!("the store `{path}` cannot keep a write-ahead log where it is: move it to a local file system");
        return Err(Error::Unavailable(why).into());
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", WAL_BYTES_KEPT)?;
    // Only `StoreFiles::checkpoint` runs checkpoints, because the check of the files must know of them.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)?;
    Ok(())
}

/// Switches the journal to a write-ahead log, if it is not one already. Returns the resulting journal mode.
///
/// SQLite does not wait for this lock as it does for others, so this function retries.
fn enable_wal(connection: &Connection) -> rusqlite::Result<String> {
    let change = || connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0));
    for _ in 0..BUSY_TIMEOUT.as_millis() / BUSY_RETRY_PAUSE.as_millis() {
        match change() {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => std::thread::sleep(BUSY_RETRY_PAUSE),
            answer => return answer,
        }
    }
    change()
}

/// Makes SQLite leave the files as they are when the connection is closed.
pub(super) fn disable_checkpoint_on_close(connection: &Connection) {
    // This fails for no open connection.
    let _ = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
}
