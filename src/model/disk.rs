//! The free space of a disk, and what may still be written to it.
//!
//! The space is read in the background, never while a request waits. Look next at `audit/disk_monitor.rs`, which watches the disk of the audit log,
//! and at `sync/cache_writer.rs`, which stops writing first.

use std::io;
use std::path::PathBuf;

use super::limits::{DISK_CRITICAL_BYTES, DISK_EXHAUSTED_BYTES, DISK_LOW_BYTES};

/// The space of one file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that this process may still write.
    pub free_bytes: u64,
    /// Size of the file system in bytes; 0 if it has no limit of its own.
    pub total_bytes: u64,
}

/// A source that reads the space of one file system.
pub trait DiskSpaceSource: Send + Sync {
    /// Reads the space now. The call may block as long as the disk does.
    ///
    /// # Errors
    /// The error of the operating system.
    fn read(&self) -> io::Result<DiskSpace>;
}

/// The file system of a path, read by `statvfs(3)`.
#[derive(Clone, Debug)]
pub struct PathDiskSpace(pub PathBuf);

impl DiskSpaceSource for PathDiskSpace {
    fn read(&self) -> io::Result<DiskSpace> {
        let stat = rustix::fs::statvfs(&self.0)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok(DiskSpace { free_bytes: bytes(stat.f_bavail), total_bytes: bytes(stat.f_blocks) })
    }
}

/// The level of free space, from everything to nearly nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskSpaceLevel {
    /// Everything is written.
    #[default]
    Ample,
    /// No record that may be merged gets a line of its own.
    Low,
    /// Records that may be merged are only counted, and no cache is written.
    Critical,
    /// No decision and no administrative read is recorded any more, so every call is denied. The remaining space is for acts that were
    /// done, and for the store.
    Exhausted,
}

impl DiskSpaceLevel {
    /// The names of all levels, from [`DiskSpaceLevel::Ample`] on.
    pub const NAMES: &'static [&'static str] = &["ample", "low", "critical", "exhausted"];

    /// The name, as in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            DiskSpaceLevel::Ample => "ample",
            DiskSpaceLevel::Low => "low",
            DiskSpaceLevel::Critical => "critical",
            DiskSpaceLevel::Exhausted => "exhausted",
        }
    }

    /// Returns the level for `space` after the level `before`.
    ///
    /// A limit counts as passed upwards only once the free space exceeds it by a tenth, so that the level does not oscillate.
    pub fn classify(space: DiskSpace, before: DiskSpaceLevel) -> DiskSpaceLevel {
        let limits = [
            (DiskSpaceLevel::Exhausted, DISK_EXHAUSTED_BYTES, 32),
            (DiskSpaceLevel::Critical, DISK_CRITICAL_BYTES, 10),
            (DiskSpaceLevel::Low, DISK_LOW_BYTES, 5),
        ];
        let is_short = |level: DiskSpaceLevel, bytes: u64, part: u64| {
            let limit = bytes.min(space.total_bytes / part);
            let limit = if before >= level { limit.saturating_add(limit / 10) } else { limit };
            space.free_bytes < limit
        };
        let short = limits.into_iter().find(|(level, bytes, part)| is_short(*level, *bytes, *part));
        short.map_or(DiskSpaceLevel::Ample, |(level, ..)| level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn room_is_a_share_of_a_small_disk_and_a_fixed_part_of_a_large_one() {
        let check = |free_bytes: u64, total_bytes: u64, before: DiskSpaceLevel, expected: DiskSpaceLevel| {
            assert_eq!(
                DiskSpaceLevel::classify(DiskSpace { free_bytes, total_bytes }, before),
                expected,
                "{free_bytes} of {total_bytes}"
            );
        };
        let large = 1_000_000 * MIB;
        check(512 * MIB, large, DiskSpaceLevel::Ample, DiskSpaceLevel::Ample);
        check(512 * MIB - 1, large, DiskSpaceLevel::Ample, DiskSpaceLevel::Low);
        check(256 * MIB - 1, large, DiskSpaceLevel::Ample, DiskSpaceLevel::Critical);
        check(64 * MIB - 1, large, DiskSpaceLevel::Ample, DiskSpaceLevel::Exhausted);
        check(0, large, DiskSpaceLevel::Ample, DiskSpaceLevel::Exhausted);
        check(200, 1000, DiskSpaceLevel::Ample, DiskSpaceLevel::Ample);
        check(199, 1000, DiskSpaceLevel::Ample, DiskSpaceLevel::Low);
        check(99, 1000, DiskSpaceLevel::Ample, DiskSpaceLevel::Critical);
        check(30, 1000, DiskSpaceLevel::Ample, DiskSpaceLevel::Exhausted);
        check(0, 0, DiskSpaceLevel::Ample, DiskSpaceLevel::Ample);
        // To return to a higher level, a tenth more is required.
        check(219, 1000, DiskSpaceLevel::Low, DiskSpaceLevel::Low);
        check(220, 1000, DiskSpaceLevel::Low, DiskSpaceLevel::Ample);
        check(109, 1000, DiskSpaceLevel::Critical, DiskSpaceLevel::Critical);
        check(110, 1000, DiskSpaceLevel::Critical, DiskSpaceLevel::Low);
        check(33, 1000, DiskSpaceLevel::Exhausted, DiskSpaceLevel::Exhausted);
        check(34, 1000, DiskSpaceLevel::Exhausted, DiskSpaceLevel::Critical);
    }

    #[test]
    fn the_system_says_how_much_room_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let space = PathDiskSpace(folder.path().to_owned()).read().unwrap();
        assert!(space.free_bytes <= space.total_bytes || space.total_bytes == 0, "{space:?}");
        assert!(PathDiskSpace(folder.path().join("absent")).read().is_err());
    }
}
