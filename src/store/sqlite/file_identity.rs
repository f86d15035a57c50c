//! Tells a file that holds a complete store of this program from any other file.
//!
//! Nothing is written here. Look next at `connection.rs`, which opens a file only if it is such a store.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension};

use super::error::SqliteError;
use super::header::{APPLICATION_ID, check_wal_belongs_to_file};
use super::schema::SCHEMA_VERSION;
use crate::store::Error;

/// Advice for a file that holds only the remains of a store.
const RESTORE_HINT: &str = "put a backup in its place (docs/OPERATIONS.md, `Back up and restore`), or name another file";

/// Returns the absolute path of an existing store.
///
/// # Errors
/// [`Error::Missing`] if there is nothing or an empty file, [`Error::NotAStore`] if the path is no file, or a backup beside the log of
/// another store.
pub(super) fn find_store(path: &Path) -> Result<PathBuf, Error> {
    let display_path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let display_path = display_path.display();
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Error::Missing(format!("there is no store at `{display_path}`"))
        }
        _ => Error::Unavailable(format!("cannot see the store `{display_path}`: {error}")),
    })?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a folder" } else { "no plain file" };
        return Err(Error::NotAStore(format!("`{display_path}` is {what}, not a store: name the store's file")));
    }
    if metadata.len() == 0 {
        return Err(Error::Missing(format!("`{display_path}` is empty (0 bytes), which no store ever is: {RESTORE_HINT}")));
    }
    let name = path.file_name().ok_or_else(|| Error::NotAStore(format!("`{display_path}` names no file")))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let unseen = |error: std::io::Error| Error::Unavailable(format!("cannot see the store `{display_path}`: {error}"));
    let path = folder.canonicalize().map_err(unseen)?.join(name);
    check_wal_belongs_to_file(&path)?;
    Ok(path)
}

/// Returns the schema version of the store in the file. Fails if the version is unknown, or if the store is incomplete.
pub(super) fn read_schema_version(connection: &Connection, path: &Path) -> Result<i64, SqliteError> {
    let path = path.display();
    let application: i64 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if application == APPLICATION_ID {
        let heads = "SELECT (SELECT count(*) FROM head) + (SELECT count(*) FROM meta)";
        return match version {
            1..=SCHEMA_VERSION => match connection.query_row(heads, (), |row| row.get::<_, i64>(0)) {
                Ok(2) => Ok(version),
                Ok(_) => Err(Error::Missing(format!("`{path}` has the tables of a store and no head: {RESTORE_HINT}")).into()),
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
             empty store: {RESTORE_HINT}"
        ))
        .into());
    }
    Err(Error::NotAStore(format!("`{path}` is a SQLite database of another program: name another file for the store")).into())
}
