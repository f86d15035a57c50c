//! The failure of a step on a SQLite store, and the error that it becomes once the file is named.

use std::path::Path;

use rusqlite::ErrorCode;

use crate::model::disk::{DiskSpaceSource as _, PathDiskSpace};
use crate::store::Error;

/// The beginning of the message for a store whose disk is full.
pub const NO_SPACE: &str = "no space is left for the store";
/// With less free space, SQLite cannot make its `-shm` file (32 KiB), and reports an I/O error instead of a full disk.
const FREE_BYTES_MIN: u64 = 64 * 1024;

/// Why a step failed, before the error message names the file.
pub(super) enum SqliteError {
    Sql(rusqlite::Error),
    Store(Error),
}

impl From<rusqlite::Error> for SqliteError {
    fn from(error: rusqlite::Error) -> Self {
        SqliteError::Sql(error)
    }
}

impl From<Error> for SqliteError {
    fn from(error: Error) -> Self {
        SqliteError::Store(error)
    }
}

/// Converts the failure of a step, so that its message names the file.
pub(super) fn to_store_error(path: &Path, fault: SqliteError) -> Error {
    let error = match fault {
        SqliteError::Store(error) => return error,
        SqliteError::Sql(error) => error,
    };
    let file = path;
    let path = file.display();
    let corrupt = |what: &dyn std::fmt::Display| Error::Corrupt(format!("the store `{path}` does not hold together: {what}"));
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => {
            Error::NotAStore(format!("`{path}` is not a SQLite database: name another file for the store"))
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::Unknown)
        | None => corrupt(&error),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            Error::Unavailable(format!("the store `{path}` is busy, another process holds it: try again"))
        }
        Some(ErrorCode::DiskFull) => Error::Unavailable(format!("{NO_SPACE} `{path}`, so nothing was written: make room")),
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) if is_disk_full(file) => {
            Error::Unavailable(format!("{NO_SPACE} `{path}` ({error}): make room"))
        }
        Some(_) => Error::Unavailable(format!("the store `{path}` cannot be used: {error}")),
    }
}

/// Whether the disk of a file is full. A disk that cannot be asked, or that has no limit, is not.
fn is_disk_full(path: &Path) -> bool {
    let space = PathDiskSpace(path.to_owned()).read();
    space.is_ok_and(|space| space.total_bytes > 0 && space.free_bytes < FREE_BYTES_MIN)
}
