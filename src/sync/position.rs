//! Records the last position that this replica followed in a file of the data folder, so that it survives a restart.
//!
//! After a restart, the replica refuses a store that is behind that position or has another history. Otherwise, restoring an old
//! store file could bring a revoked token back.
//!
//! The file guards against mistakes. It does not guard against a person who may write to the data folder. Without the file, a
//! replica follows the store that it finds. If the store lies in the data folder too, one restored disk snapshot may contain
//! both, and they agree. A second file at another path detects that case.
//!
//! The recorded position proves no freshness and permits nothing. Look next at `follower.rs`.

use std::fs::{File, OpenOptions};
use std::io::{Error, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::follower::HistoryPosition;
use super::status::FollowerHandle;
use crate::model::mutant::{Mutant, is_active};
use crate::model::revision::{HistoryId, Revision};

const FILE_NAME: &str = "place.json";
/// The limit when reading. A file that this module writes is far smaller.
const FILE_BYTES_MAX: u64 = 4 * 1024;

/// A durable storage of the position. It writes the position whole or not at all.
#[async_trait]
pub trait PositionStore: Send + Sync {
    /// Saves a position. After a crash during this call, the storage holds either this position or the one before.
    ///
    /// # Errors
    /// If the position could not be made durable.
    async fn save(&self, position: &HistoryPosition) -> Result<(), Error>;
}

/// One file that records the position.
#[derive(Clone, Debug)]
pub struct PositionFile(PathBuf);

/// All files that record the position of this replica: the one in the data folder and, if configured, a second one at another path.
#[derive(Clone, Debug)]
pub struct PositionFiles(Vec<PositionFile>);

impl PositionFiles {
    /// Uses the file in the data folder, and the file `second_file` if it is given.
    ///
    /// # Errors
    /// If the folder of `second_file` does not exist, because nothing could be saved there.
    pub fn new(data: &Path, second_file: Option<&Path>) -> Result<Self, String> {
        let mut position_files = vec![PositionFile::in_data_folder(data)];
        if let Some(file) = second_file {
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !folder.is_dir() || file.is_dir() {
                let file = file.display();
                return Err(format!(
                    "`place`: `{file}` is to be a file in a folder that is there: make its folder, or name another file"
                ));
            }
            position_files.push(PositionFile(file.to_owned()));
        }
        Ok(Self(position_files))
    }

    /// The path of the file in a data folder.
    pub fn file_of(data: &Path) -> PathBuf {
        PositionFile::in_data_folder(data).0
    }

    /// The paths of the files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(PositionFile::path)
    }

    /// Reads every file. Returns each recorded position with the path of its file.
    ///
    /// # Errors
    /// As [`PositionFile::read`].
    pub fn read_all(&self) -> Result<Vec<(HistoryPosition, PathBuf)>, String> {
        let read = |file: &PositionFile| Ok(file.read()?.map(|at| (at, file.0.clone())));
        Ok(self.0.iter().map(read).collect::<Result<Vec<_>, String>>()?.into_iter().flatten().collect())
    }
}

#[async_trait]
impl PositionStore for PositionFiles {
    /// Saves a position to every file, even if one of them fails. Returns an error if any file failed.
    async fn save(&self, position: &HistoryPosition) -> Result<(), Error> {
        let mut kept = Ok(());
        for file in &self.0 {
            if let Err(error) = file.save(position).await {
                kept = Err(Error::new(error.kind(), format!("`{}`: {error}", file.0.display())));
            }
        }
        kept
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredPosition {
    history: String,
    number: u64,
    hash: String,
}

impl PositionFile {
    /// The file in a data folder.
    pub fn in_data_folder(data: &Path) -> Self {
        Self(data.join(FILE_NAME))
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Reads the recorded position; `None` if the file does not exist.
    ///
    /// # Errors
    /// If the file exists but cannot be parsed: the last position is unknown then. A file is written whole or not at all, so a
    /// crash never causes this.
    pub fn read(&self) -> Result<Option<HistoryPosition>, String> {
        let failed = |why: &dyn std::fmt::Display| {
            let path = self.0.display();
            format!(
                "`{path}` says up to where this replica followed its store, and cannot be read: {why}; make sure that the \
                store is the newest, then remove the file"
            )
        };
        let mut text = Vec::new();
        match File::open(&self.0) {
            Ok(file) => file.take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(|error| failed(&error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&error)),
        };
        let stored: StoredPosition = serde_json::from_slice(&text).map_err(|error| failed(&error))?;
        let hash = hash_from_hex(&stored.hash).ok_or_else(|| failed(&"`hash` is not 64 hexadecimal digits"))?;
        Ok(Some(HistoryPosition { revision: Revision { history: HistoryId::new(stored.history), number: stored.number }, hash }))
    }

    /// Writes a position, whole or not at all. Blocks.
    fn write(&self, position: &HistoryPosition) -> Result<(), Error> {
        let Revision { history, number } = &position.revision;
        let stored = StoredPosition { history: history.to_string(), number: *number, hash: hash_to_hex(&position.hash) };
        let text = serde_json::to_vec(&stored).map_err(Error::other)?;
        let unfinished = self.0.with_extension("json.new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.write_all(&text)?;
        file.sync_data()?;
        std::fs::rename(&unfinished, &self.0)?;
        match self.0.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl PositionStore for PositionFile {
    async fn save(&self, position: &HistoryPosition) -> Result<(), Error> {
        let (writer, position) = (self.clone(), position.clone());
        tokio::task::spawn_blocking(move || writer.write(&position)).await.map_err(Error::other)?
    }
}

/// Saves each new position of the follower, until `shutdown` turns true or the follower ends. Saving never delays the follower,
/// so the file may be a moment behind the published state.
pub async fn persist_position(status: FollowerHandle, position_store: impl PositionStore, mut shutdown: watch::Receiver<bool>) {
    let keep = async {
        let mut changes = status.subscribe();
        let mut kept = None;
        loop {
            let now = status.position();
            if let Some(now) = now.filter(|now| kept.as_ref() != Some(now)) {
                if let Err(error) = position_store.save(&now).await {
                    tracing::warn!(%error, "the place in the history could not be kept: a restart might not notice an older store");
                }
                kept = Some(now);
                if is_active(Mutant::PositionWrittenOnce) {
                    return;
                }
                continue;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = shutdown.wait_for(|stop| *stop) => {}
        () = keep => {}
    }
}

fn hash_to_hex(hash: &[u8; 32]) -> String {
    use std::fmt::Write as _;
    hash.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn hash_from_hex(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text.chars().map(|digit| digit.to_digit(16)?.try_into().ok()).collect::<Option<_>>()?;
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high * 16 + low).collect();
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_kept_and_a_broken_one_is_no_place() {
        let folder = tempfile::tempdir().unwrap();
        let position_file = PositionFile::in_data_folder(folder.path());
        assert_eq!(position_file.read(), Ok(None));
        for number in [7, 8] {
            let hash = std::array::from_fn(|index| index as u8 * 8);
            let position = HistoryPosition { revision: Revision { history: HistoryId::new("h"), number }, hash };
            position_file.write(&position).unwrap();
            assert_eq!(position_file.read(), Ok(Some(position)));
        }
        let whole = std::fs::read_to_string(position_file.path()).unwrap();
        for broken in
            ["", "{}", whole.strip_suffix("}").unwrap(), &whole.replace("\"hash\":\"00", "\"hash\":\"0g"), &format!("{whole}1")]
        {
            std::fs::write(position_file.path(), broken).unwrap();
            assert!(position_file.read().is_err_and(|why| why.contains("place.json")), "{broken}");
        }
    }
}
