//! The recorder of one runtime: a bounded buffer of records, and the write barrier of the runtime's sockets.
//!
//! Recording copies bytes and does no I/O. A socket calls the barrier before it lets bytes out. The barrier writes the whole
//! buffer with one `write`, so records are batched exactly as answers are.
//!
//! After a failed write, the begun line is removed from the output, and it stays in the buffer with the rest, in order. So the
//! output ends with a whole line, even if the process ends before a later attempt succeeds. Until then, the recorder takes no record
//! except those of acts that were carried out. A thread of the log measures the free disk space; the recorder consults the result
//! and gives up records of callers who proved nothing first, refused acts next, decisions and reads last.
//!
//! An output that is no longer found at its path counts as a failed write, because records in it may be lost. The timer then
//! continues in a new output, whose first line says so.
//!
//! Look next at `denial_merger.rs`, which counts these denials, at `log_file.rs`, the output, and at `log.rs`, which owns the timer and
//! the sync.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::disk::DiskSpaceLevel;
use crate::model::time::Clock;
use crate::model::write_barrier::WriteBarrier;

use super::denial_merger::{DenialMerger, MergeableRecord};
use super::disk_monitor::DiskMonitor;
use super::record::{ActRecord, DecisionRecord, write_gap_line};
use super::sink::AuditSink;
use super::{AuditUnavailable, Error};

/// Takes the records of one runtime. One thread at a time uses it, so its lock is free except while the timer runs.
pub struct AuditRecorder {
    node: Box<str>,
    clock: Arc<dyn Clock>,
    disk_monitor: Arc<DiskMonitor>,
    bytes_max: usize,
    output: Box<dyn AuditOutput>,
    buffer: Mutex<RecordBuffer>,
    /// Bytes in the buffer. Read without the lock, because most writes to a socket follow no record.
    pending_bytes: AtomicUsize,
    /// Whether something was written since the last sync.
    dirty: AtomicBool,
    /// Whether the last write and the last sync succeeded. Read without the lock, whose holder may wait for a disk.
    healthy: AtomicBool,
    /// Whether the timer shall continue in a new output.
    reopen_requested: AtomicBool,
    failures: AtomicU64,
    records: AtomicU64,
    merged: AtomicU64,
}

/// The destination of a recorder's bytes: a file, or in tests an output that fails.
pub(super) trait AuditOutput: Send + Sync {
    /// Writes some of the bytes, as `write(2)` does.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Makes the written bytes survive a power failure.
    fn sync(&self) -> io::Result<()>;
    /// Removes the last `bytes_count` bytes that were written.
    fn truncate_by(&self, bytes_count: usize) -> io::Result<()>;
    /// Fails unless everything that was written is found at the path of the output.
    fn check_path(&self) -> io::Result<()> {
        Ok(())
    }
    /// Whether nothing was written.
    fn is_empty(&self) -> bool {
        false
    }
    /// Creates the output that follows this one, unless it was created before. Takes milliseconds.
    fn prepare_next(&self) -> io::Result<()> {
        Ok(())
    }
    /// Continues in the output that was prepared.
    fn switch_to_next(&self) {}
}

/// Interval at which an output is compared with its path. Acts compare it always.
const PATH_CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// When an output is compared with its path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PathCheck {
    Always,
    /// If the last comparison is [`PATH_CHECK_INTERVAL`] ago.
    WhenDue,
}

/// Buffer of a recorder whose log cannot be opened; it lasts until the process ends.
const UNOPENED_BYTES_MAX: usize = 64 * 1024;

/// The buffered lines, and the state of the output.
struct RecordBuffer {
    bytes: Vec<u8>,
    /// Whether the bytes begin in the middle of a line, whose beginning is in the output.
    is_mid_line: bool,
    /// Whether the last write failed, or the output was lost.
    unwritable: bool,
    /// Why the output was lost; `None` if it was found at its path. Nothing is written to a lost output.
    loss: Option<String>,
    /// The last comparison of the output with its path, or the last attempt to create a new output.
    checked_at: Instant,
    /// Whether the last attempt to create a new output failed.
    reopen_fails: bool,
    /// Whether the last sync failed; the kernel may have dropped what it held.
    unsynced: bool,
    /// Increases with every attempt to write. With it, the timer skips bytes that a socket will soon flush.
    attempts: u64,
    /// The value of `attempts` when the timer last ran.
    attempts_at_last_tick: u64,
    /// Merges records of callers who proved nothing.
    unverified_callers: DenialMerger,
    /// Merges records of refused acts with a verified signature. It has its own budget, so that a flood of unverified callers
    /// cannot hide what an operator did.
    operators: DenialMerger,
}

/// The merger that counts a record.
#[derive(Clone, Copy)]
enum MergerKind {
    UnverifiedCallers,
    Operators,
}

impl RecordBuffer {
    fn merger(&mut self, kind: MergerKind) -> &mut DenialMerger {
        match kind {
            MergerKind::UnverifiedCallers => &mut self.unverified_callers,
            MergerKind::Operators => &mut self.operators,
        }
    }
}

impl AuditRecorder {
    pub(super) fn new(
        node: &str,
        clock: Arc<dyn Clock>,
        disk_monitor: Arc<DiskMonitor>,
        bytes_max: usize,
        output: Box<dyn AuditOutput>,
    ) -> Self {
        let buffer = RecordBuffer {
            bytes: Vec::new(),
            is_mid_line: false,
            unwritable: false,
            loss: None,
            checked_at: Instant::now(),
            reopen_fails: false,
            unsynced: false,
            attempts: 0,
            attempts_at_last_tick: 0,
            unverified_callers: DenialMerger::default(),
            operators: DenialMerger::default(),
        };
        Self {
            node: node.into(),
            clock,
            disk_monitor,
            bytes_max,
            output,
            buffer: Mutex::new(buffer),
            pending_bytes: AtomicUsize::new(0),
            dirty: AtomicBool::new(false),
            healthy: AtomicBool::new(true),
            reopen_requested: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            records: AtomicU64::new(0),
            merged: AtomicU64::new(0),
        }
    }

    /// Makes a recorder for a log that cannot be opened. It takes no record, and reports `why` to a caller of `flush`.
    pub fn unavailable(node: &str, clock: Arc<dyn Clock>, why: Error) -> Self {
        struct UnopenedOutput(Error);
        impl AuditOutput for UnopenedOutput {
            fn write(&self, _bytes: &[u8]) -> io::Result<usize> {
                Err(io::Error::other(self.0.to_string()))
            }
            fn sync(&self) -> io::Result<()> {
                Ok(())
            }
            fn truncate_by(&self, _bytes_count: usize) -> io::Result<()> {
                Ok(())
            }
        }
        Self::new(node, clock, Arc::new(DiskMonitor::unlimited()), UNOPENED_BYTES_MAX, Box::new(UnopenedOutput(why)))
    }

    /// Makes a recorder that discards its records.
    #[cfg(test)]
    pub(crate) fn discarding(node: &str) -> Self {
        struct DiscardingOutput;
        impl AuditOutput for DiscardingOutput {
            fn write(&self, bytes: &[u8]) -> io::Result<usize> {
                Ok(bytes.len())
            }
            fn sync(&self) -> io::Result<()> {
                Ok(())
            }
            fn truncate_by(&self, _bytes_count: usize) -> io::Result<()> {
                Ok(())
            }
        }
        let clock = Arc::new(crate::model::time::SystemClock);
        Self::new(node, clock, Arc::new(DiskMonitor::unlimited()), 1 << 20, Box::new(DiscardingOutput))
    }

    /// Records as [`AuditSink::record`] says.
    ///
    /// # Errors
    /// As [`AuditSink::record`].
    pub fn record(&self, record: &DecisionRecord<'_>) -> Result<(), AuditUnavailable> {
        if record.may_be_merged() {
            let mut buffer = self.lock_buffer();
            self.write_or_count(&mut buffer, MergerKind::UnverifiedCallers, record.as_mergeable(), |out| {
                record.write_line(&self.node, out)
            });
            return Ok(());
        }
        if self.disk_monitor.space_level() == DiskSpaceLevel::Exhausted {
            return Err(AuditUnavailable::DiskFull);
        }
        let mut buffer = self.lock_buffer();
        if buffer.unwritable || buffer.unsynced {
            return Err(AuditUnavailable::Unwritable);
        }
        self.append_line(&mut buffer, |out| record.write_line(&self.node, out)).map(drop)
    }

    /// Records as [`AuditSink::record_act`] says.
    ///
    /// # Errors
    /// As [`AuditSink::record_act`].
    pub fn record_act(&self, act: &ActRecord<'_>) -> Result<(), AuditUnavailable> {
        let mut buffer = self.lock_buffer();
        if act.is_unverified_refusal() {
            self.write_or_count(&mut buffer, MergerKind::UnverifiedCallers, act.as_mergeable(), |out| {
                act.write_line(&self.node, out)
            });
            if !buffer.bytes.is_empty() {
                // If this fails the line stays in the buffer, and a refusal may be answered without its record.
                let _ = self.flush_buffer(&mut buffer, PathCheck::WhenDue);
            }
            return Ok(());
        }
        // Acts are rare, so each is worth an attempt to write.
        let is_writable = !buffer.unwritable || self.flush_buffer(&mut buffer, PathCheck::Always).is_ok();
        if !is_writable && !act.may_have_changed_store() {
            return Err(AuditUnavailable::Unwritable);
        }
        if act.may_be_merged() {
            let has_line = self
                .write_or_count(&mut buffer, MergerKind::Operators, act.as_mergeable(), |out| act.write_line(&self.node, out));
            if !has_line {
                return if buffer.unsynced { Err(AuditUnavailable::Unwritable) } else { Ok(()) };
            }
        } else if !act.may_have_changed_store() && self.disk_monitor.space_level() == DiskSpaceLevel::Exhausted {
            // INVARIANT: only acts that were done, or may have been done, use the room that is kept for acts and the store.
            return Err(AuditUnavailable::DiskFull);
        } else {
            self.append_line(&mut buffer, |out| act.write_line(&self.node, out))?;
        }
        // An act whose answer says that it is recorded must be found in the log.
        if is_writable && self.flush_buffer(&mut buffer, PathCheck::Always).is_ok() && !buffer.unsynced {
            return Ok(());
        }
        Err(AuditUnavailable::Unwritable)
    }

    /// Flushes as [`AuditSink::flush`] says.
    ///
    /// # Errors
    /// As [`AuditSink::flush`].
    pub fn flush(&self) -> io::Result<()> {
        self.flush_buffer(&mut self.lock_buffer(), PathCheck::WhenDue)
    }

    /// Makes the timer continue in a new output, if this one is not empty.
    pub(super) fn request_reopen(&self) {
        self.reopen_requested.store(true, Ordering::Release);
    }

    /// Bytes that wait in the buffer.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes.load(Ordering::Acquire)
    }

    /// Number of lines taken since the start.
    pub fn records(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }

    /// Number of records since the start that were counted instead of being written one by one.
    pub fn merged(&self) -> u64 {
        self.merged.load(Ordering::Relaxed)
    }

    /// Number of records that are counted but not written yet.
    pub fn merged_waiting(&self) -> u64 {
        let buffer = self.lock_buffer();
        buffer.unverified_callers.waiting_denials().saturating_add(buffer.operators.waiting_denials())
    }

    /// Whether the last write and the last sync succeeded, and the output is where it belongs.
    pub fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::Acquire)
    }

    /// Runs as [`AuditSink::flush_tick`] says.
    pub(super) fn flush_tick(&self) {
        self.follow_path();
        let now = self.clock.now();
        let mut buffer = self.lock_buffer();
        if (buffer.unverified_callers.is_due(now) || buffer.operators.is_due(now)) && self.may_write_counts(&buffer) {
            self.write_counts(&mut buffer);
        }
        let idle = buffer.attempts == buffer.attempts_at_last_tick;
        if !buffer.bytes.is_empty() && (idle || buffer.unwritable) {
            // A failure is counted, and the next record reports it.
            let _ = self.flush_buffer(&mut buffer, PathCheck::WhenDue);
        }
        buffer.attempts_at_last_tick = buffer.attempts;
        let unsynced = buffer.unsynced;
        drop(buffer);
        if self.dirty.swap(false, Ordering::AcqRel) || unsynced {
            self.sync_output();
        }
    }

    /// Finishes as [`AuditSink::finish`] says.
    pub(super) fn finish(&self) -> io::Result<()> {
        let mut buffer = self.lock_buffer();
        // These are few lines, and this is the last chance to write the counts.
        self.write_counts(&mut buffer);
        // An output without a line has lost nothing, and is removed at the end.
        let written = if self.records() == 0 { Ok(()) } else { self.flush_buffer(&mut buffer, PathCheck::Always) };
        drop(buffer);
        self.dirty.store(false, Ordering::Release);
        self.sync_output();
        if self.lock_buffer().unsynced {
            return written.and(Err(io::Error::other("the last records may not outlast a loss of power")));
        }
        written
    }

    /// Appends the line of a record that may be merged if disk space, rate and budget permit; else counts the record. Returns
    /// whether it has a line.
    fn write_or_count(
        &self,
        buffer: &mut RecordBuffer,
        kind: MergerKind,
        record: MergeableRecord<'_>,
        write: impl FnOnce(&mut Vec<u8>),
    ) -> bool {
        let now = self.clock.now();
        let is_writable = !buffer.unwritable && !buffer.unsynced;
        if is_writable
            && self.disk_monitor.space_level() == DiskSpaceLevel::Ample
            && buffer.merger(kind).admits(&record.origin, now)
            && let Ok(bytes) = self.append_line(buffer, write)
        {
            buffer.merger(kind).spend_bytes(bytes, now);
            return true;
        }
        buffer.merger(kind).count_denial(record, now);
        self.merged.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// Whether lines of counts may be written now.
    fn may_write_counts(&self, buffer: &RecordBuffer) -> bool {
        !buffer.unwritable && !buffer.unsynced && self.disk_monitor.space_level() < DiskSpaceLevel::Critical
    }

    fn write_counts(&self, buffer: &mut RecordBuffer) {
        let RecordBuffer { bytes, unverified_callers, operators, .. } = buffer;
        let now = self.clock.now();
        let lines = operators.write_lines(&self.node, bytes, self.bytes_max, now)
            + unverified_callers.write_lines(&self.node, bytes, self.bytes_max, now);
        self.pending_bytes.store(bytes.len(), Ordering::Release);
        self.records.fetch_add(lines, Ordering::Relaxed);
    }

    /// Appends a whole line and returns its length, or appends nothing.
    fn append_line(&self, buffer: &mut RecordBuffer, write: impl FnOnce(&mut Vec<u8>)) -> Result<usize, AuditUnavailable> {
        let before = buffer.bytes.len();
        write(&mut buffer.bytes);
        if buffer.bytes.len() > self.bytes_max {
            buffer.bytes.truncate(before);
            return Err(AuditUnavailable::BufferFull);
        }
        self.pending_bytes.store(buffer.bytes.len(), Ordering::Release);
        self.records.fetch_add(1, Ordering::Relaxed);
        Ok(buffer.bytes.len() - before)
    }

    fn flush_buffer(&self, buffer: &mut RecordBuffer, check: PathCheck) -> io::Result<()> {
        buffer.attempts = buffer.attempts.wrapping_add(1);
        let (written, outcome) = match self.check_path(buffer, check) {
            Ok(()) => self.write_bytes(&buffer.bytes),
            Err(error) => (0, Err(error)),
        };
        if let Some(last) = buffer.bytes.get(..written).and_then(<[u8]>::last) {
            buffer.is_mid_line = *last != b'\n';
        }
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
        self.publish_health(buffer);
        outcome
    }

    /// Writes all bytes. Returns how many are in the output, which after a failure ends with a whole line if it can be cut.
    fn write_bytes(&self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        let outcome = loop {
            let rest = bytes.get(written..).unwrap_or_default();
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
        if outcome.is_err() {
            written -= self.remove_partial_line(bytes.get(..written).unwrap_or_default());
        }
        (written, outcome)
    }

    /// Compares the output with its path, if that is due. A loss counts as a failed write.
    fn check_path(&self, buffer: &mut RecordBuffer, check: PathCheck) -> io::Result<()> {
        if let Some(loss) = &buffer.loss {
            return Err(io::Error::other(loss.clone()));
        }
        if check == PathCheck::WhenDue && buffer.checked_at.elapsed() < PATH_CHECK_INTERVAL {
            return Ok(());
        }
        buffer.checked_at = Instant::now();
        let outcome = self.output.check_path();
        if let Err(error) = &outcome {
            buffer.loss = Some(error.to_string());
            buffer.unwritable = true;
            // INVARIANT: counted under the lock, and also while the log is unwritable, because records that were written may be lost.
            self.failures.fetch_add(1, Ordering::AcqRel);
            self.publish_health(buffer);
            tracing::error!(%error, "audit log: records may be lost, and everything is denied until a new file is written");
        }
        outcome
    }

    /// Compares the output with its path, and continues in a new output if this one is lost or if that was requested. Only the timer
    /// does so, because no request may wait for it.
    fn follow_path(&self) {
        let is_requested = self.reopen_requested.swap(false, Ordering::AcqRel);
        let mut buffer = self.lock_buffer();
        let is_found = self.check_path(&mut buffer, PathCheck::WhenDue).is_ok();
        let is_too_early = buffer.reopen_fails && buffer.checked_at.elapsed() < PATH_CHECK_INTERVAL;
        if is_found && (!is_requested || self.output.is_empty()) || is_too_early {
            return;
        }
        drop(buffer);
        let prepared = self.output.prepare_next();
        let mut buffer = self.lock_buffer();
        if let Err(error) = prepared {
            if !std::mem::replace(&mut buffer.reopen_fails, true) {
                tracing::error!(%error, "audit log: no new file can be made: repair the audit folder");
            }
            buffer.checked_at = Instant::now();
            return;
        }
        buffer.reopen_fails = false;
        // The former output ends with a whole line.
        if self.flush_buffer(&mut buffer, PathCheck::Always).is_err() && buffer.loss.is_none() {
            tracing::warn!("audit log: the files are not opened anew, because a file cannot be finished");
            return;
        }
        self.output.switch_to_next();
        self.dirty.store(true, Ordering::Release);
        buffer.checked_at = Instant::now();
        if let Some(loss) = buffer.loss.take() {
            self.begin_with_gap(&mut buffer, &loss);
            // A failure keeps the recorder unwritable, and the timer tries again.
            let _ = self.flush_buffer(&mut buffer, PathCheck::WhenDue);
        }
    }

    /// Puts the line before the buffered lines that says that records may be missing.
    fn begin_with_gap(&self, buffer: &mut RecordBuffer, loss: &str) {
        let mut bytes = Vec::with_capacity(buffer.bytes.len() + 512);
        write_gap_line(&self.node, self.clock.now().unix_ns, loss, &mut bytes);
        // The beginning of a begun line is in the lost output, so its rest is no record.
        let rest = match std::mem::take(&mut buffer.is_mid_line) {
            true => buffer.bytes.iter().position(|byte| *byte == b'\n').map_or(buffer.bytes.len(), |end| end + 1),
            false => 0,
        };
        bytes.extend_from_slice(buffer.bytes.get(rest..).unwrap_or_default());
        buffer.bytes = bytes;
        self.pending_bytes.store(buffer.bytes.len(), Ordering::Release);
        self.records.fetch_add(1, Ordering::Relaxed);
    }

    fn publish_health(&self, buffer: &RecordBuffer) {
        self.healthy.store(!buffer.unwritable && !buffer.unsynced, Ordering::Release);
    }

    /// Removes the line from the output that a failed attempt began, and returns the number of removed bytes. If the output cannot
    /// be cut, the next attempt continues the line.
    fn remove_partial_line(&self, written: &[u8]) -> usize {
        let whole = written.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let begun = written.len() - whole;
        if begun > 0 && self.output.truncate_by(begun).is_ok() { begun } else { 0 }
    }

    /// Syncs without the lock, because a sync takes milliseconds.
    fn sync_output(&self) {
        let outcome = self.output.sync();
        let mut buffer = self.lock_buffer();
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
        self.publish_health(&buffer);
    }

    fn lock_buffer(&self) -> MutexGuard<'_, RecordBuffer> {
        // No code leaves the buffer half changed under the lock.
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AuditSink for AuditRecorder {
    fn record(&self, record: &DecisionRecord<'_>) -> Result<(), AuditUnavailable> {
        AuditRecorder::record(self, record)
    }

    fn record_act(&self, act: &ActRecord<'_>) -> Result<(), AuditUnavailable> {
        AuditRecorder::record_act(self, act)
    }

    fn flush(&self) -> io::Result<()> {
        AuditRecorder::flush(self)
    }

    fn flush_tick(&self) {
        AuditRecorder::flush_tick(self);
    }

    fn finish(&self) -> io::Result<()> {
        AuditRecorder::finish(self)
    }
}

impl WriteBarrier for AuditRecorder {
    fn flush_before_write(&self) -> io::Result<()> {
        if self.pending_bytes() == 0 {
            return Ok(());
        }
        let mut buffer = self.lock_buffer();
        if buffer.unwritable {
            // The rest belongs to connections that `failures` closes; no record was taken since the failure.
            return Ok(());
        }
        self.flush_buffer(&mut buffer, PathCheck::WhenDue)
    }

    fn failure_count(&self) -> u64 {
        self.failures.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for AuditRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("pending_bytes", &self.pending_bytes()).field("records", &self.records()).finish()
    }
}
