//! The audit folder: one append-only file per recorder and process start, and the thread that syncs these files.
//!
//! A file has one writer, so lines of two runtimes or two processes never interleave. A file's name begins with the time of the
//! start, or of its own creation if it follows another file, so files sorted by name are in order of time.
//!
//! The thread does everything for which no request may wait. It syncs, writes counted denials and bytes that no socket write
//! flushed, repeats failed writes, continues in new files, and measures the free disk space. Look next at `recorder.rs`, then at
//! `log_file.rs`.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::model::disk::{DiskSpaceLevel, DiskSpaceSource, PathDiskSpace};
use crate::model::time::Clock;

use super::Error;
use super::disk_monitor::DiskMonitor;
use super::log_file::LogFile;
use super::recorder::AuditRecorder;
use super::tail;

/// The limits of buffering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of records that a recorder buffers before it refuses; the default holds about 5,000 records.
    pub buffer_bytes_max: usize,
    /// Interval of syncs. A power failure loses at most the records of one interval.
    pub sync_interval_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { buffer_bytes_max: 4 * 1024 * 1024, sync_interval_ms: 20 }
    }
}

/// The state of the log, from which `app` derives metrics and readiness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditStatus {
    /// Whether every recorder takes records.
    pub healthy: bool,
    /// Bytes that wait in the buffers of all recorders.
    pub pending_bytes: usize,
    /// Number of lines taken since the start.
    pub records: u64,
    /// Number of records since the start that were counted instead of being written one by one.
    pub merged: u64,
    /// Number of those records that are not written yet.
    pub merged_waiting: u64,
    /// Number of times that a recorder could no longer write, or lost its file. Repeated attempts that fail do not count.
    pub failures: u64,
    /// The free space on the disk of the folder.
    pub space_level: DiskSpaceLevel,
    /// Free bytes on that disk.
    pub free_bytes: u64,
}

/// An open audit folder. Dropping it writes and syncs the rest.
pub struct AuditLog {
    directory: PathBuf,
    node: Box<str>,
    clock: Arc<dyn Clock>,
    settings: Settings,
    started_unix_ms: i64,
    disk_monitor: Arc<DiskMonitor>,
    thread_state: Arc<ThreadState>,
    /// Dropped to stop the thread.
    stop: Mutex<Option<SyncSender<()>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The recorders and disks that the thread serves.
#[derive(Default)]
struct ThreadState {
    recorders: Mutex<Vec<RecorderFile>>,
    disks: Mutex<Vec<Arc<DiskMonitor>>>,
}

/// A recorder and its file.
#[derive(Clone)]
struct RecorderFile {
    recorder: Arc<AuditRecorder>,
    file: Arc<LogFile>,
}

/// Interval at which the free disk space is measured. In one interval, the highest rate of permits writes some MiB.
const DISK_CHECK_INTERVAL_MS: u64 = 200;

impl AuditLog {
    /// Opens `directory` for the records of `node`. Creates it with mode 0700 if it does not exist. Removes the unfinished last line
    /// of each file whose process has ended.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be created or its mode cannot be set, [`Error::Thread`] if the thread cannot be
    /// started.
    pub fn open(directory: &Path, node: &str, clock: Arc<dyn Clock>) -> Result<Arc<Self>, Error> {
        Self::open_with(directory, node, clock, Settings::default(), Box::new(PathDiskSpace(directory.to_owned())))
    }

    /// Opens as [`AuditLog::open`], with other limits and another source for the free disk space.
    ///
    /// # Errors
    /// As [`AuditLog::open`].
    pub fn open_with(
        directory: &Path,
        node: &str,
        clock: Arc<dyn Clock>,
        settings: Settings,
        space: Box<dyn DiskSpaceSource>,
    ) -> Result<Arc<Self>, Error> {
        let failed = |action| move |source| Error::Io { action, path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("make the folder"))?;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700)).map_err(failed("set the mode of"))?;
        tail::truncate_unfinished_lines(directory)?;
        let disk_monitor = Arc::new(DiskMonitor::new(directory, space));
        let thread_state = Arc::new(ThreadState::default());
        lock_mutex(&thread_state.disks).push(Arc::clone(&disk_monitor));
        let (stop, stopped) = sync_channel::<()>(0);
        let shared_state = Arc::clone(&thread_state);
        let interval_ms = settings.sync_interval_ms.max(1);
        let thread = std::thread::Builder::new()
            .name("portcullis-audit".to_owned())
            .spawn(move || {
                let mut since_look_ms = 0;
                while stopped.recv_timeout(Duration::from_millis(interval_ms)) == Err(RecvTimeoutError::Timeout) {
                    since_look_ms += interval_ms;
                    if since_look_ms >= DISK_CHECK_INTERVAL_MS {
                        since_look_ms = 0;
                        let disk_monitors: Vec<_> = lock_mutex(&shared_state.disks).clone();
                        disk_monitors.iter().for_each(|disk_monitor| disk_monitor.refresh());
                    }
                    let recorders: Vec<_> = lock_mutex(&shared_state.recorders)
                        .iter()
                        .map(|entry: &RecorderFile| Arc::clone(&entry.recorder))
                        .collect();
                    recorders.iter().for_each(|recorder| recorder.flush_tick());
                }
            })
            .map_err(Error::Thread)?;
        Ok(Arc::new(Self {
            directory: directory.to_owned(),
            node: node.into(),
            started_unix_ms: clock.now().unix_ms(),
            clock,
            settings,
            disk_monitor,
            thread_state,
            stop: Mutex::new(Some(stop)),
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Makes the thread watch another disk too.
    pub fn watch_disk(&self, disk_monitor: Arc<DiskMonitor>) {
        lock_mutex(&self.thread_state.disks).push(disk_monitor);
    }

    /// Creates a recorder with a file of its own, mode 0600: one for each serving runtime and one for administration.
    ///
    /// `name` becomes a part of the file's name. Each character that is not a letter, digit or hyphen is replaced by a hyphen.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be created.
    pub fn open_recorder(&self, name: &str) -> Result<Arc<AuditRecorder>, Error> {
        let created = LogFile::create(&self.directory, self.started_unix_ms, &self.node, name, Arc::clone(&self.clock))?;
        let file = Arc::new(created);
        let (clock, disk_monitor, output) =
            (Arc::clone(&self.clock), Arc::clone(&self.disk_monitor), Box::new(Arc::clone(&file)));
        let recorder = Arc::new(AuditRecorder::new(&self.node, clock, disk_monitor, self.settings.buffer_bytes_max, output));
        lock_mutex(&self.thread_state.recorders).push(RecorderFile { recorder: Arc::clone(&recorder), file });
        Ok(recorder)
    }

    /// Makes each recorder whose file holds records continue in a new file. The thread does so at its next interval. The former files
    /// are then complete, and nothing locks them.
    pub fn reopen_files(&self) {
        self.recorder_files().iter().for_each(|entry| entry.recorder.request_reopen());
    }

    /// Why calls are denied on account of this log; `None` if it takes records. Waits for no disk.
    pub fn denial_cause(&self) -> Option<&'static str> {
        if !self.recorder_files().iter().all(|entry| entry.recorder.is_healthy()) {
            return Some(
                "the audit log cannot be written, so calls are denied: make room, or repair the disk or the audit folder",
            );
        }
        (self.space_level() == DiskSpaceLevel::Exhausted)
            .then_some("the disk of the audit log is full but for what is kept for acts, so every call is denied: make room")
    }

    /// The free space on the disk of the folder, at the last measurement.
    pub fn space_level(&self) -> DiskSpaceLevel {
        self.disk_monitor.space_level()
    }

    /// The present state of the log.
    pub fn status(&self) -> AuditStatus {
        use crate::model::write_barrier::WriteBarrier as _;
        let (space_level, free_bytes) = (self.disk_monitor.space_level(), self.disk_monitor.free_bytes());
        let mut status = AuditStatus {
            healthy: true,
            pending_bytes: 0,
            records: 0,
            merged: 0,
            merged_waiting: 0,
            failures: 0,
            space_level,
            free_bytes,
        };
        for RecorderFile { recorder, .. } in self.recorder_files() {
            status.healthy &= recorder.is_healthy();
            status.pending_bytes += recorder.pending_bytes();
            status.records += recorder.records();
            status.merged += recorder.merged();
            status.merged_waiting += recorder.merged_waiting();
            status.failures += recorder.failure_count();
        }
        status
    }

    /// Writes and syncs everything and stops the thread. Removes files that stayed empty. The barrier still writes later records,
    /// but nothing syncs them.
    ///
    /// # Errors
    /// [`Error::Io`] for the first file that could not be finished.
    pub fn shutdown(&self) -> Result<(), Error> {
        drop(lock_mutex(&self.stop).take());
        if let Some(thread) = lock_mutex(&self.thread).take() {
            // The thread ends only by returning, so its result says nothing.
            let _ = thread.join();
        }
        let mut outcome = Ok(());
        for RecorderFile { recorder, file } in self.recorder_files() {
            if let Err(source) = recorder.finish() {
                outcome = outcome.and(Err(Error::Io { action: "finish", path: file.path(), source }));
            }
            if recorder.pending_bytes() == 0 {
                file.remove_if_empty();
            }
        }
        outcome
    }

    /// A copy of the list, because a recorder may wait for a disk while it is used.
    fn recorder_files(&self) -> Vec<RecorderFile> {
        lock_mutex(&self.thread_state.recorders).clone()
    }
}

impl Drop for AuditLog {
    fn drop(&mut self) {
        if let Err(error) = self.shutdown() {
            tracing::error!(%error, "audit log: not finished");
        }
    }
}

impl std::fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("directory", &self.directory).field("status", &self.status()).finish()
    }
}

fn lock_mutex<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
