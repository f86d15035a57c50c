//! The file of one recorder: created with a lock, appended to, compared with its path, and replaced by a new file.
//!
//! A file that was moved, removed, replaced or shortened under its writer still takes writes, and nobody finds the records. So the
//! recorder compares the file with its path some times a second, and continues in a new file. This module knows no record: look next
//! at `recorder.rs`, which does, and at `log.rs`, which opens the files.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::time::Clock;

use super::Error;
use super::recorder::AuditOutput;

/// A file opened for appending, and the file that will follow it.
pub(super) struct LogFile {
    directory: PathBuf,
    /// The part of each file's name that names the node and the recorder.
    writer: String,
    clock: Arc<dyn Clock>,
    state: Mutex<LogFileState>,
}

struct LogFileState {
    current: OpenFile,
    /// The file that was created to follow `current`.
    next: Option<OpenFile>,
    /// The file before `current`, until it is synced.
    previous: Option<Arc<File>>,
    /// Whether the file was removed at the end, because it was empty. It takes no more writes.
    is_closed: bool,
}

struct OpenFile {
    file: Arc<File>,
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Bytes that were written, without those that were removed again.
    length_bytes: u64,
}

impl LogFile {
    /// Creates a file with mode 0600 in `directory`. Its name consists of `unix_ms`, the node and the recorder's name, in which each
    /// character that is not a letter, digit or hyphen is replaced by a hyphen.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be created.
    pub(super) fn create(directory: &Path, unix_ms: i64, node: &str, name: &str, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let plain = |text: &str| -> String {
            text.chars().take(64).map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).collect()
        };
        let writer = format!("{}-{}", plain(node), plain(name));
        let current = OpenFile::create(directory, unix_ms, &writer)?;
        let state = Mutex::new(LogFileState { current, next: None, previous: None, is_closed: false });
        Ok(Self { directory: directory.to_owned(), writer, clock, state })
    }

    /// The path of the file that takes the writes.
    pub(super) fn path(&self) -> PathBuf {
        self.lock_state().current.path.clone()
    }

    /// Removes the file if nothing was written to it, and a file that was created to follow it. An empty file that remains does no
    /// harm, so errors are ignored.
    pub(super) fn remove_if_empty(&self) {
        let is_in_place = self.compare_with_path().is_ok();
        let mut state = self.lock_state();
        if let Some(next) = state.next.take() {
            let _ = std::fs::remove_file(&next.path);
        }
        if state.current.length_bytes == 0 && is_in_place && !state.is_closed {
            state.is_closed = true;
            let _ = std::fs::remove_file(&state.current.path);
        }
    }

    /// Fails unless the open file is the file at its path and holds everything that was written.
    fn compare_with_path(&self) -> io::Result<()> {
        let state = self.lock_state();
        if state.is_closed {
            return Ok(());
        }
        let OpenFile { file, path, device, inode, length_bytes } = &state.current;
        let gone = |what: &str| Err(io::Error::other(format!("the audit file `{}` {what}", path.display())));
        match std::fs::metadata(path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                let is_linked = file.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
                gone(if is_linked { "was moved" } else { "was removed" })
            }
            Err(error) => gone(&format!("cannot be found: {error}")),
            Ok(found) if (found.dev(), found.ino()) != (*device, *inode) => gone("was replaced by another file"),
            Ok(found) if found.len() < *length_bytes => {
                gone(&format!("was shortened to {} bytes, and {length_bytes} were written", found.len()))
            }
            Ok(_) => Ok(()),
        }
    }

    fn lock_state(&self) -> MutexGuard<'_, LogFileState> {
        // No code leaves the state half changed under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenFile {
    fn create(directory: &Path, unix_ms: i64, writer: &str) -> Result<Self, Error> {
        let stem = format!("{unix_ms:015}-{writer}");
        let mut attempt = 0_u32;
        loop {
            // Two files in one millisecond, or a clock that was set back.
            let suffix = if attempt == 0 { String::new() } else { format!("-{attempt}") };
            let path = directory.join(format!("{stem}{suffix}.jsonl"));
            match OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => {
                    // A file that cannot be used is not left behind, because a failed creation is repeated.
                    return Self::lock_and_sync(file, directory, &path).inspect_err(|_| drop(std::fs::remove_file(&path)));
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < 1_000 => attempt += 1,
                Err(source) => return Err(Error::Io { action: "make the file", path, source }),
            }
        }
    }

    fn lock_and_sync(file: File, directory: &Path, path: &Path) -> Result<Self, Error> {
        let failed = |action| move |source| Error::Io { action, path: path.to_owned(), source };
        // INVARIANT: the lock lasts as long as the file is open. A start that finds it does not cut the file.
        file.try_lock().map_err(io::Error::from).map_err(failed("lock"))?;
        // The file's name must survive a power failure as its content does.
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(|source| Error::Io { action: "sync", path: directory.to_owned(), source })?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        let (device, inode) = (metadata.dev(), metadata.ino());
        Ok(Self { file: Arc::new(file), path: path.to_owned(), device, inode, length_bytes: 0 })
    }
}

impl AuditOutput for Arc<LogFile> {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.lock_state();
        if state.is_closed {
            return Err(io::Error::other("the audit log is closed"));
        }
        let mut file: &File = &state.current.file;
        let count = file.write(bytes)?;
        state.current.length_bytes += count as u64;
        Ok(count)
    }

    fn sync(&self) -> io::Result<()> {
        let (file, previous) = {
            let mut state = self.lock_state();
            (Arc::clone(&state.current.file), state.previous.take())
        };
        // Without the lock, because a sync takes milliseconds. Dropping the former file releases its lock.
        previous.map_or(Ok(()), |previous| sync_file(&previous))?;
        sync_file(&file)
    }

    fn truncate_by(&self, bytes_count: usize) -> io::Result<()> {
        let mut state = self.lock_state();
        let length = state.current.file.metadata()?.len();
        state.current.file.set_len(length.saturating_sub(bytes_count as u64))?;
        state.current.length_bytes = state.current.length_bytes.saturating_sub(bytes_count as u64);
        Ok(())
    }

    fn check_path(&self) -> io::Result<()> {
        self.compare_with_path()
    }

    fn is_empty(&self) -> bool {
        self.lock_state().current.length_bytes == 0
    }

    fn prepare_next(&self) -> io::Result<()> {
        if self.lock_state().next.is_some() {
            return Ok(());
        }
        if let Err(error) = DirBuilder::new().mode(0o700).create(&self.directory)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error);
        }
        let created = OpenFile::create(&self.directory, self.clock.now().unix_ms(), &self.writer);
        self.lock_state().next = Some(created.map_err(|error| io::Error::other(error.to_string()))?);
        Ok(())
    }

    fn switch_to_next(&self) {
        let mut state = self.lock_state();
        if let Some(next) = state.next.take() {
            let previous = std::mem::replace(&mut state.current, next);
            state.previous = Some(previous.file);
        }
    }
}

fn sync_file(file: &File) -> io::Result<()> {
    match file.sync_data() {
        // Some file systems have nothing to sync.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        outcome => outcome,
    }
}
