//! The recorder of one runtime: a bounded buffer of records, and the write barrier of the runtime's sockets.
//!
//! Recording copies bytes and does no I/O. A socket calls the barrier before it lets bytes out. The barrier writes the whole
//! buffer with one `write`, so records are batched exactly as answers are.
//!
//! After a failed write, the rest of the buffer stays in order. Until a later attempt succeeds, the recorder takes no record
//! except those of acts that were carried out. A thread of the log measures the free disk space; the recorder consults the result
//! and gives up records of unverified callers first.
//!
//! Look next at `merge.rs`, which counts these denials, and at `log.rs`, which owns the timer and the sync.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::barrier::WriteBarrier;
use crate::model::disk::Room;
use crate::model::time::Clock;

use super::merge::{Denial, Merger};
use super::record::{Act, Record};
use super::room::RoomWatch;
use super::sink::Sink;
use super::{Error, Unavailable};

/// Takes the records of one runtime. One thread at a time uses it, so its lock is free except while the timer runs.
pub struct Recorder {
    node: Box<str>,
    clock: Arc<dyn Clock>,
    room: Arc<RoomWatch>,
    bytes_max: usize,
    output: Box<dyn Output>,
    buffer: Mutex<Buffer>,
    /// Bytes in the buffer. Read without the lock, because most writes to a socket follow no record.
    pending_bytes: AtomicUsize,
    /// Whether something was written since the last sync.
    dirty: AtomicBool,
    failures: AtomicU64,
    records: AtomicU64,
    merged: AtomicU64,
}

/// The destination of a recorder's bytes: a file, or in tests an output that fails.
pub(super) trait Output: Send + Sync {
    /// Writes some of the bytes, as `write(2)` does.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Makes the written bytes survive a power failure.
    fn sync(&self) -> io::Result<()>;
}

/// Buffer of a recorder whose log cannot be opened; it lasts until the process ends.
const UNOPENED_BYTES_MAX: usize = 64 * 1024;

/// The buffered lines, and the state of the output.
struct Buffer {
    bytes: Vec<u8>,
    /// Whether the last write failed.
    unwritable: bool,
    /// Whether the last sync failed; the kernel may have dropped what it held.
    unsynced: bool,
    /// Increases with every attempt to write. With it, the timer skips bytes that a socket will soon flush.
    attempts: u64,
    /// The value of `attempts` when the timer last ran.
    attempts_seen: u64,
    merger: Merger,
}

impl Recorder {
    pub(super) fn new(
        node: &str,
        clock: Arc<dyn Clock>,
        room: Arc<RoomWatch>,
        bytes_max: usize,
        output: Box<dyn Output>,
    ) -> Self {
        let merger = Merger::default();
        let buffer = Buffer { bytes: Vec::new(), unwritable: false, unsynced: false, attempts: 0, attempts_seen: 0, merger };
        Self {
            node: node.into(),
            clock,
            room,
            bytes_max,
            output,
            buffer: Mutex::new(buffer),
            pending_bytes: AtomicUsize::new(0),
            dirty: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            records: AtomicU64::new(0),
            merged: AtomicU64::new(0),
        }
    }

    /// Makes a recorder for a log that cannot be opened. It takes no record, and reports `why` to a caller of `flush`.
    pub fn unavailable(node: &str, clock: Arc<dyn Clock>, why: Error) -> Self {
        struct Unopened(Error);
        impl Output for Unopened {
            fn write(&self, _bytes: &[u8]) -> io::Result<usize> {
                Err(io::Error::other(self.0.to_string()))
            }
            fn sync(&self) -> io::Result<()> {
                Ok(())
            }
        }
        Self::new(node, clock, Arc::new(RoomWatch::unlimited()), UNOPENED_BYTES_MAX, Box::new(Unopened(why)))
    }

    /// Makes a recorder that discards its records.
    #[cfg(test)]
    pub(crate) fn discarding(node: &str) -> Self {
        struct Nowhere;
        impl Output for Nowhere {
            fn write(&self, bytes: &[u8]) -> io::Result<usize> {
                Ok(bytes.len())
            }
            fn sync(&self) -> io::Result<()> {
                Ok(())
            }
        }
        let clock = Arc::new(crate::model::time::SystemClock);
        Self::new(node, clock, Arc::new(RoomWatch::unlimited()), 1 << 20, Box::new(Nowhere))
    }

    /// Records as [`Sink::record`] says.
    ///
    /// # Errors
    /// As [`Sink::record`].
    pub fn record(&self, record: &Record<'_>) -> Result<(), Unavailable> {
        if record.is_of_nobody() {
            self.record_of_nobody(record.denial(), |out| record.write(&self.node, out));
            return Ok(());
        }
        if self.room.room() == Room::Exhausted {
            return Err(Unavailable::NoRoom);
        }
        let mut buffer = self.lock();
        if buffer.unwritable || buffer.unsynced {
            return Err(Unavailable::Unwritable);
        }
        self.append(&mut buffer, |out| record.write(&self.node, out)).map(drop)
    }

    /// Records as [`Sink::record_act`] says.
    ///
    /// # Errors
    /// As [`Sink::record_act`].
    pub fn record_act(&self, act: &Act<'_>) -> Result<(), Unavailable> {
        if act.is_of_nobody() {
            self.record_of_nobody(act.denial(), |out| act.write(&self.node, out));
            if self.pending_bytes() > 0 {
                // If this fails the line stays in the buffer, and a refusal may be answered without its record.
                let _ = self.flush();
            }
            return Ok(());
        }
        let mut buffer = self.lock();
        // Acts are rare, so each is worth an attempt to write.
        let is_writable = !buffer.unwritable || self.write_out(&mut buffer).is_ok();
        if !is_writable && !act.may_have_changed_the_store() {
            return Err(Unavailable::Unwritable);
        }
        self.append(&mut buffer, |out| act.write(&self.node, out))?;
        if is_writable && self.write_out(&mut buffer).is_ok() && !buffer.unsynced {
            return Ok(());
        }
        Err(Unavailable::Unwritable)
    }

    /// Flushes as [`Sink::flush`] says.
    ///
    /// # Errors
    /// As [`Sink::flush`].
    pub fn flush(&self) -> io::Result<()> {
        self.write_out(&mut self.lock())
    }

    /// Bytes that wait in the buffer.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes.load(Ordering::Acquire)
    }

    /// Number of lines taken since the start.
    pub fn records(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }

    /// Number of denials since the start that were counted instead of being recorded one by one.
    pub fn merged(&self) -> u64 {
        self.merged.load(Ordering::Relaxed)
    }

    /// Number of denials that are counted but not written yet.
    pub fn merged_waiting(&self) -> u64 {
        self.lock().merger.waiting()
    }

    /// Whether the last write and the last sync succeeded.
    pub fn is_healthy(&self) -> bool {
        let buffer = self.lock();
        !buffer.unwritable && !buffer.unsynced
    }

    /// Runs as [`Sink::tend`] says.
    pub(super) fn tend(&self) {
        let now = self.clock.now();
        let mut buffer = self.lock();
        if buffer.merger.is_due(now) && self.takes_counts(&buffer) {
            self.write_counts(&mut buffer);
        }
        let idle = buffer.attempts == buffer.attempts_seen;
        if !buffer.bytes.is_empty() && (idle || buffer.unwritable) {
            // A failure is counted, and the next record reports it.
            let _ = self.write_out(&mut buffer);
        }
        buffer.attempts_seen = buffer.attempts;
        let unsynced = buffer.unsynced;
        drop(buffer);
        if self.dirty.swap(false, Ordering::AcqRel) || unsynced {
            self.sync();
        }
    }

    /// Finishes as [`Sink::finish`] says.
    pub(super) fn finish(&self) -> io::Result<()> {
        let mut buffer = self.lock();
        // These are few lines, and this is the last chance to write the counts.
        self.write_counts(&mut buffer);
        let written = self.write_out(&mut buffer);
        drop(buffer);
        self.dirty.store(false, Ordering::Release);
        self.sync();
        if self.lock().unsynced {
            return written.and(Err(io::Error::other("the last records may not outlast a loss of power")));
        }
        written
    }

    /// Records or counts a denial of an unverified caller: it gets its own line if disk space, rate and budget permit.
    fn record_of_nobody(&self, denial: Denial<'_>, write: impl FnOnce(&mut Vec<u8>)) {
        let now = self.clock.now();
        let mut buffer = self.lock();
        let is_writable = !buffer.unwritable && !buffer.unsynced;
        if is_writable
            && self.room.room() == Room::Ample
            && buffer.merger.admits(&denial.origin, now)
            && let Ok(bytes) = self.append(&mut buffer, write)
        {
            buffer.merger.spend(bytes, now);
            return;
        }
        buffer.merger.count(denial, now);
        self.merged.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether lines of counts may be written now.
    fn takes_counts(&self, buffer: &Buffer) -> bool {
        !buffer.unwritable && !buffer.unsynced && self.room.room() < Room::Critical
    }

    fn write_counts(&self, buffer: &mut Buffer) {
        let Buffer { bytes, merger, .. } = buffer;
        let lines = merger.write(&self.node, bytes, self.bytes_max, self.clock.now());
        self.pending_bytes.store(bytes.len(), Ordering::Release);
        self.records.fetch_add(lines, Ordering::Relaxed);
    }

    /// Appends a whole line and returns its length, or appends nothing.
    fn append(&self, buffer: &mut Buffer, write: impl FnOnce(&mut Vec<u8>)) -> Result<usize, Unavailable> {
        let before = buffer.bytes.len();
        write(&mut buffer.bytes);
        if buffer.bytes.len() > self.bytes_max {
            buffer.bytes.truncate(before);
            return Err(Unavailable::Full);
        }
        self.pending_bytes.store(buffer.bytes.len(), Ordering::Release);
        self.records.fetch_add(1, Ordering::Relaxed);
        Ok(buffer.bytes.len() - before)
    }

    fn write_out(&self, buffer: &mut Buffer) -> io::Result<()> {
        buffer.attempts = buffer.attempts.wrapping_add(1);
        let mut written = 0;
        let outcome = loop {
            let rest = buffer.bytes.get(written..).unwrap_or_default();
            if rest.is_empty() {
                break Ok(());
            }
            match self.output.write(rest) {
                Ok(0) => break Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        buffer.bytes.drain(..written.min(buffer.bytes.len()));
        self.pending_bytes.store(buffer.bytes.len(), Ordering::Release);
        if written > 0 {
            self.dirty.store(true, Ordering::Release);
        }
        match &outcome {
            Ok(()) if buffer.unwritable => {
                buffer.unwritable = false;
                tracing::info!("audit log: writable again");
            }
            Err(error) if !buffer.unwritable => {
                buffer.unwritable = true;
                // INVARIANT: counted under the lock, so that the next caller of the barrier sees the failure.
                self.failures.fetch_add(1, Ordering::AcqRel);
                tracing::error!(%error, "audit log: cannot write, so everything is denied: make room or repair the disk");
            }
            _ => {}
        }
        outcome
    }

    /// Syncs without the lock, because a sync takes milliseconds.
    fn sync(&self) {
        let outcome = self.output.sync();
        let mut buffer = self.lock();
        match outcome {
            Ok(()) if buffer.unsynced => {
                buffer.unsynced = false;
                tracing::info!("audit log: synced again");
            }
            Err(error) if !buffer.unsynced => {
                buffer.unsynced = true;
                tracing::error!(%error, "audit log: cannot sync, so everything is denied: repair the disk");
            }
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        // No code leaves the buffer half changed under the lock.
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Recorder {
    fn record(&self, record: &Record<'_>) -> Result<(), Unavailable> {
        Recorder::record(self, record)
    }

    fn record_act(&self, act: &Act<'_>) -> Result<(), Unavailable> {
        Recorder::record_act(self, act)
    }

    fn flush(&self) -> io::Result<()> {
        Recorder::flush(self)
    }

    fn tend(&self) {
        Recorder::tend(self);
    }

    fn finish(&self) -> io::Result<()> {
        Recorder::finish(self)
    }
}

impl WriteBarrier for Recorder {
    fn before_write(&self) -> io::Result<()> {
        if self.pending_bytes() == 0 {
            return Ok(());
        }
        let mut buffer = self.lock();
        if buffer.unwritable {
            // The rest belongs to connections that `failures` closes; no record was taken since the failure.
            return Ok(());
        }
        self.write_out(&mut buffer)
    }

    fn failures(&self) -> u64 {
        self.failures.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("pending_bytes", &self.pending_bytes()).field("records", &self.records()).finish()
    }
}
