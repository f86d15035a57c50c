//! The interface of the audit log for its callers: they hand over facts, and the implementation decides how to store them.
//!
//! A record format is an implementation of [`Sink`]. The tests use this trait to check what every format must guarantee: which
//! facts are recorded, which are counted instead, and which a full disk still takes. Look next at `recorder.rs`, the
//! implementation in JSON lines.

use std::io;

use super::{Act, Record, Unavailable};

/// Takes audit records.
pub trait Sink: Send + Sync {
    /// Takes the record of a decision. The record is in the kernel before any later byte leaves through the barrier of the same
    /// runtime.
    ///
    /// A denial of an unverified caller may be counted instead, in a line that states the number of denials. That line is written
    /// after about a second. Such a denial is always taken. No other record is ever counted instead.
    ///
    /// # Errors
    /// [`Unavailable`] if the record was not taken. The decision must then be a denial.
    fn record(&self, record: &Record<'_>) -> Result<(), Unavailable>;

    /// Takes the record of an administrative act. The record is in the kernel when this method returns. A refused act without a
    /// verified signature may be counted instead.
    ///
    /// # Errors
    /// [`Unavailable`] if the record is not in the kernel. If the act changed the store, or may have changed it, the line is kept
    /// as far as the buffer has room, and is written with the next successful attempt. Any other line is lost, and the caller
    /// must not get an answer.
    fn record_act(&self, act: &Act<'_>) -> Result<(), Unavailable>;

    /// Writes the buffer. After a failure the rest stays, in order, for the next attempt.
    ///
    /// # Errors
    /// The error of the file.
    fn flush(&self) -> io::Result<()>;

    /// Runs some times a second on the timer. It writes the counts of denials whose second is over, writes bytes that no socket
    /// write flushed, repeats failed writes, and syncs.
    fn tend(&self);

    /// Writes and syncs everything at the end of the process, counts included.
    ///
    /// # Errors
    /// The error of the file.
    fn finish(&self) -> io::Result<()>;
}

#[cfg(test)]
mod tests;
