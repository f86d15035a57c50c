//! Tells a file that holds a complete store of this program from any other file.
//!
//! Nothing is written here. Look next at `open.rs`, which opens a file only if it is such a store.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension};

use super::schema::SCHEMA_VERSION;
use super::store_fault::Fault;
use crate::store::Error;

/// `Ptcl`: marks a file as a store of this program.
pub(super) const APPLICATION_ID: i64 = 0x5074_636c;

/// Advice for a file that holds only the remains of a store.
const RESTORE: &str = "put a backup in its place (docs/OPERATIONS.md, `Back up and restore`), or name another file";

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
