//! One runtime's records on their way to a file: a bounded buffer, and the barrier before the runtime's sockets.
//!
//! Recording copies bytes and does no I/O. Whoever lets bytes out on a socket first calls the barrier, which writes the
//! whole buffer with one `write`, so records are batched exactly as answers are. A write that fails keeps what is left,
//! in order; until a later attempt succeeds nothing more is taken. Look next at `log.rs`, which owns the timer and the sync.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::barrier::WriteBarrier;

use super::Unavailable;
use super::record::{Act, Record};

/// Takes the records of one runtime; one thread at a time uses it, so its lock is free but for the timer's visits.
pub struct Recorder {
    node: Box<str>,
    bytes_max: usize,
    sink: Box<dyn Sink>,
    buffer: Mutex<Buffer>,
    /// Bytes in the buffer: read without the lock, since most writes of a socket follow no record.
    pending_bytes: AtomicUsize,
    /// Whether something was written since the last sync.
    dirty: AtomicBool,
    failures: AtomicU64,
    records: AtomicU64,
}

/// Where a recorder's bytes go: a file, or in a test something that fails.
pub(super) trait Sink: Send + Sync {
    /// Hands over some bytes, as `write(2)`.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Makes what was written outlast a loss of power.
    fn sync(&self) -> io::Result<()>;
}

/// What a recorder keeps for a log that cannot be opened, until its process ends.
const UNOPENED_BYTES_MAX: usize = 64 * 1024;

struct Buffer {
    bytes: Vec<u8>,
    /// The last write failed.
    unwritable: bool,
    /// The last sync failed: the kernel may have dropped what it held.
    unsynced: bool,
    /// Goes up with every attempt to write; lets the timer leave alone what a socket will soon flush.
    attempts: u64,
    /// `attempts` at the timer's last visit.
    attempts_seen: u64,
}

impl Recorder {
    pub(super) fn new(node: &str, bytes_max: usize, sink: Box<dyn Sink>) -> Self {
        let buffer = Buffer { bytes: Vec::new(), unwritable: false, unsynced: false, attempts: 0, attempts_seen: 0 };
        Self {
            node: node.into(),
            bytes_max,
            sink,
            buffer: Mutex::new(buffer),
            pending_bytes: AtomicUsize::new(0),
            dirty: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            records: AtomicU64::new(0),
        }
    }

    /// A recorder for where the log cannot be opened: it takes no record, and says why to whoever flushes it.
    pub fn unavailable(node: &str, why: super::Error) -> Self {
        struct Unopened(super::Error);
        impl Sink for Unopened {
            fn write(&self, _bytes: &[u8]) -> io::Result<usize> {
                Err(io::Error::other(self.0.to_string()))
            }
            fn sync(&self) -> io::Result<()> {
                Ok(())
            }
        }
        Self::new(node, UNOPENED_BYTES_MAX, Box::new(Unopened(why)))
    }

    /// A recorder whose records go nowhere.
    #[cfg(test)]
    pub(crate) fn discarding(node: &str) -> Self {
        struct Nowhere;
        impl Sink for Nowhere {
            fn write(&self, bytes: &[u8]) -> io::Result<usize> {
                Ok(bytes.len())
            }
            fn sync(&self) -> io::Result<()> {
                Ok(())
            }
        }
        Self::new(node, 1 << 20, Box::new(Nowhere))
    }

    /// Takes the record of a decision; it is in the kernel before any later byte leaves through the barrier.
    ///
    /// # Errors
    /// [`Unavailable`] where it was not taken; then the decision must be a denial.
    pub fn record(&self, record: &Record<'_>) -> Result<(), Unavailable> {
        self.append(|out| record.write(&self.node, out))
    }

    /// Takes the record of an administrative act, which is in the kernel when this returns.
    ///
    /// # Errors
    /// [`Unavailable`] where it is not. The line of an act that changed the store, or may have, is kept all the same, as far as there
    /// is room, and written with the next attempt that succeeds. Any other one is lost, and who asked must not be told.
    pub fn record_act(&self, act: &Act<'_>) -> Result<(), Unavailable> {
        let mut buffer = self.lock();
        // Acts are rare, and each is worth an attempt of its own.
        let is_writable = !buffer.unwritable || self.write_out(&mut buffer).is_ok();
        if !is_writable && !act.may_have_changed_the_store() {
            return Err(Unavailable::Unwritable);
        }
        self.append_to(&mut buffer, |out| act.write(&self.node, out))?;
        if is_writable && self.write_out(&mut buffer).is_ok() && !buffer.unsynced {
            return Ok(());
        }
        Err(Unavailable::Unwritable)
    }

    /// Writes what is buffered. On a failure what is left stays, in order, for the next attempt.
    ///
    /// # Errors
    /// As the file says.
    pub fn flush(&self) -> io::Result<()> {
        self.write_out(&mut self.lock())
    }

    /// Bytes that wait in the buffer.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes.load(Ordering::Acquire)
    }

    /// Records taken since the start.
    pub fn records(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }

    /// Whether the last attempts to write and to sync succeeded.
    pub fn is_healthy(&self) -> bool {
        let buffer = self.lock();
        !buffer.unwritable && !buffer.unsynced
    }

    /// The timer's visit: writes records that no socket write followed, tries again what failed, syncs.
    pub(super) fn tend(&self) {
        let mut buffer = self.lock();
        let idle = buffer.attempts == buffer.attempts_seen;
        if !buffer.bytes.is_empty() && (idle || buffer.unwritable) {
            // A failure is counted and the next record learns of it.
            let _ = self.write_out(&mut buffer);
        }
        buffer.attempts_seen = buffer.attempts;
        let unsynced = buffer.unsynced;
        drop(buffer);
        if self.dirty.swap(false, Ordering::AcqRel) || unsynced {
            self.sync();
        }
    }

    /// Writes and syncs everything, for the end of the process.
    pub(super) fn finish(&self) -> io::Result<()> {
        let written = self.flush();
        self.dirty.store(false, Ordering::Release);
        self.sync();
        if self.lock().unsynced {
            return written.and(Err(io::Error::other("the last records may not outlast a loss of power")));
        }
        written
    }

    fn append(&self, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), Unavailable> {
        let mut buffer = self.lock();
        if buffer.unwritable || buffer.unsynced {
            return Err(Unavailable::Unwritable);
        }
        self.append_to(&mut buffer, write)
    }

    /// Takes a whole line, or nothing of it.
    fn append_to(&self, buffer: &mut Buffer, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), Unavailable> {
        let before = buffer.bytes.len();
        write(&mut buffer.bytes);
        if buffer.bytes.len() > self.bytes_max {
            buffer.bytes.truncate(before);
            return Err(Unavailable::Full);
        }
        self.pending_bytes.store(buffer.bytes.len(), Ordering::Release);
        self.records.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn write_out(&self, buffer: &mut Buffer) -> io::Result<()> {
        buffer.attempts = buffer.attempts.wrapping_add(1);
        let mut written = 0;
        let outcome = loop {
            let rest = buffer.bytes.get(written..).unwrap_or_default();
            if rest.is_empty() {
                break Ok(());
            }
            match self.sink.write(rest) {
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
                // INVARIANT: counted under the lock, so that who comes to the barrier next already sees it.
                self.failures.fetch_add(1, Ordering::AcqRel);
                tracing::error!(%error, "audit log: cannot write, so everything is denied: make room or repair the disk");
            }
            _ => {}
        }
        outcome
    }

    /// Syncs without holding the lock, for it takes milliseconds.
    fn sync(&self) {
        let outcome = self.sink.sync();
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
        // No code under the lock leaves the buffer half changed.
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WriteBarrier for Recorder {
    fn before_write(&self) -> io::Result<()> {
        if self.pending_bytes() == 0 {
            return Ok(());
        }
        let mut buffer = self.lock();
        if buffer.unwritable {
            // What is left belongs to connections that `failures` cuts; nothing was recorded since.
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
