//! The interface of the audit log for its callers: they hand over facts, and the implementation decides how to store them.
//!
//! A record format is an implementation of [`AuditSink`]. The tests use this trait to check what every format must guarantee: which
//! facts are recorded, which are counted instead, and which a full disk still takes. Look next at `recorder.rs`, the
//! implementation in JSON lines.

use std::io;

use super::{ActRecord, AuditUnavailable, DecisionRecord};

/// Takes audit records.
pub trait AuditSink: Send + Sync {
    /// Takes the record of a decision. The record is in the kernel before any later byte leaves through the barrier of the same
    /// runtime.
    ///
    /// A record that permits nothing, and whose caller did not prove that it holds a chain in force, may be counted instead, in a line
    /// that states how many there were. That line is written after about a second. Such a record is always taken. No other record is
    /// ever counted instead.
    ///
    /// # Errors
    /// [`AuditUnavailable`] if the record was not taken. The decision must then be a denial.
    fn record(&self, record: &DecisionRecord<'_>) -> Result<(), AuditUnavailable>;

    /// Takes the record of an administrative act. The record is in the kernel when this method returns. A refused act may be counted
    /// instead.
    ///
    /// # Errors
    /// [`AuditUnavailable`] if the record is not in the kernel. If the act changed the store, or may have changed it, the line is kept
    /// as far as the buffer has room, and is written with the next successful attempt. Any other line is lost, and the caller
    /// must not get an answer.
    fn record_act(&self, act: &ActRecord<'_>) -> Result<(), AuditUnavailable>;

    /// Writes the buffer. After a failure the rest stays, in order, for the next attempt.
    ///
    /// # Errors
    /// The error of the file.
    fn flush(&self) -> io::Result<()>;

    /// Runs some times a second on the timer. It writes the counts of denials whose second is over, writes bytes that no socket
    /// write flushed, repeats failed writes, continues in a new file if the old one is gone, and syncs.
    fn flush_tick(&self);

    /// Writes and syncs everything at the end of the process, counts included.
    ///
    /// # Errors
    /// The error of the file.
    fn finish(&self) -> io::Result<()>;
}

#[cfg(test)]
mod tests;
