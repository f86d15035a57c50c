//! The header of a SQLite file, and the files that SQLite keeps beside it. They tell a backup from a store in use, without opening it.
//!
//! Nothing here uses SQLite, because SQLite may write to a file that it opens. Look next at `super::file_identity`.

use std::path::{Path, PathBuf};

use crate::store::Error;

/// `Ptcl`: marks a file as a store of this program.
pub(super) const APPLICATION_ID: i64 = 0x5074_636c;

/// Fails if a backup lies beside the write-ahead log of another store. SQLite would copy that log into the backup and destroy it.
///
/// INVARIANT: a backup has format version 1, and opening a store sets version 2 before its write-ahead log exists. So a log next
/// to a file of version 1 belongs to another file.
pub(super) fn check_wal_belongs_to_file(path: &Path) -> Result<(), Error> {
    let Some(log) = nonempty_wal_path(path) else { return Ok(()) };
    if !Header::read(path).is_ok_and(|header| header.is_some_and(|header| header.is_backup())) {
        return Ok(());
    }
    Err(Error::NotAStore(format!(
        "`{}` is a backup, and `{}` beside it is the write-ahead log of another store, which would destroy it: remove that file and the \
         one that ends in `-shm`, then repeat (docs/OPERATIONS.md, `Back up and restore`)",
        path.display(),
        log.display()
    )))
}

/// The write-ahead log beside a database, if there is one that holds anything.
pub(super) fn nonempty_wal_path(path: &Path) -> Option<PathBuf> {
    let log = companion_path(&path.canonicalize().ok()?, "-wal");
    log.metadata().is_ok_and(|metadata| metadata.len() > 0).then_some(log)
}

/// The path of a file that SQLite keeps beside a database.
pub(super) fn companion_path(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The header of a database file.
pub(super) struct Header([u8; 100]);

impl Header {
    /// Reads the header; `None` if the file is not a SQLite database. Closing a file drops the locks of this process on it, so a
    /// store that this process has open must not be read.
    pub(super) fn read(path: &Path) -> std::io::Result<Option<Self>> {
        use std::io::Read as _;
        let mut header = [0; 100];
        match std::fs::File::open(path)?.read_exact(&mut header) {
            Ok(()) => Ok(header.starts_with(b"SQLite format 3\0").then_some(Self(header))),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it is a backup of a store that was not opened since. `VACUUM INTO` writes format version 1; a store in use has
    /// version 2, for its write-ahead log.
    pub(super) fn is_backup(&self) -> bool {
        let [format, application] = [self.0.get(18..20), self.0.get(68..72)];
        format.is_some_and(|bytes| bytes == [1, 1])
            && application.and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes).map(i64::from) == Some(APPLICATION_ID)
    }
}
