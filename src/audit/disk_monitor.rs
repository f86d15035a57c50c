//! Monitors the free space of a disk on the audit log's own thread, so that no request waits for the measurement.
//!
//! Look next at `model/disk.rs`, which defines how much room is ample, low, critical or exhausted, and at `log.rs`, which runs
//! the thread.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::model::disk::{DiskSpace, DiskSpaceLevel, DiskSpaceSource};

/// The free space of a disk at the last measurement.
pub struct DiskMonitor {
    /// A path on the disk, for log messages.
    path: PathBuf,
    space: Box<dyn DiskSpaceSource>,
    space_level: AtomicU8,
    free_bytes: AtomicU64,
    /// Whether the last measurement failed.
    is_failing: AtomicBool,
}

impl DiskMonitor {
    /// Monitors the disk that holds `path`, and measures it once.
    pub fn new(path: &Path, space: Box<dyn DiskSpaceSource>) -> Self {
        let watch = Self {
            path: path.to_owned(),
            space,
            space_level: AtomicU8::new(0),
            free_bytes: AtomicU64::new(0),
            is_failing: AtomicBool::new(false),
        };
        watch.refresh();
        watch
    }

    /// Monitors no disk, and always reports ample space.
    pub(super) fn unlimited() -> Self {
        struct UnlimitedDisk;
        impl DiskSpaceSource for UnlimitedDisk {
            fn read(&self) -> io::Result<DiskSpace> {
                Ok(DiskSpace { free_bytes: u64::MAX, total_bytes: 0 })
            }
        }
        Self::new(Path::new(""), Box::new(UnlimitedDisk))
    }

    /// The level of free space at the last measurement.
    pub fn space_level(&self) -> DiskSpaceLevel {
        match self.space_level.load(Ordering::Relaxed) {
            0 => DiskSpaceLevel::Ample,
            1 => DiskSpaceLevel::Low,
            2 => DiskSpaceLevel::Critical,
            _ => DiskSpaceLevel::Exhausted,
        }
    }

    /// Free bytes at the last measurement.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// Measures the free space. Blocks for as long as the disk does. A failed measurement leaves the last result.
    pub fn refresh(&self) {
        let space = match self.space.read() {
            Ok(space) => space,
            Err(error) => {
                if !self.is_failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        path = %self.path.display(), %error,
                        "the free space of a disk cannot be read: the last known value is used"
                    );
                }
                return;
            }
        };
        self.is_failing.store(false, Ordering::Relaxed);
        self.free_bytes.store(space.free_bytes, Ordering::Relaxed);
        let before = self.space_level();
        let space_level = DiskSpaceLevel::classify(space, before);
        if space_level == before {
            return;
        }
        self.space_level.store(space_level as u8, Ordering::Relaxed);
        let (path, free_bytes, total_bytes) = (self.path.display(), space.free_bytes, space.total_bytes);
        let (from, to) = (before.as_str(), space_level.as_str());
        match space_level {
            DiskSpaceLevel::Ample => tracing::info!(%path, free_bytes, from, to, "the disk has room again"),
            DiskSpaceLevel::Low | DiskSpaceLevel::Critical if space_level < before => {
                tracing::info!(%path, free_bytes, total_bytes, from, to, "the disk has more room, and not enough");
            }
            DiskSpaceLevel::Low => tracing::warn!(%path, free_bytes, total_bytes, from, to, "the disk runs full: make room"),
            DiskSpaceLevel::Critical => {
                tracing::error!(%path, free_bytes, total_bytes, from, to, "the disk is nearly full: make room before it is full");
            }
            DiskSpaceLevel::Exhausted => {
                tracing::error!(%path, free_bytes, total_bytes, from, to, "the disk is full but for what is kept for acts: make room");
            }
        }
    }
}

impl std::fmt::Debug for DiskMonitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RoomWatch").field("path", &self.path).field("room", &self.space_level()).finish_non_exhaustive()
    }
}
