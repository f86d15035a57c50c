//! What whoever records knows of the log: facts go in, and how they are kept is the other side's business.
//!
//! A format of records is an implementation of [`Sink`], and what must hold of every format is tested through it: what is recorded,
//! what is counted instead, what a full disk still takes. Look next at `recorder.rs`, the implementation in JSON lines.

use std::io;

use super::{Act, Record, Unavailable};

/// Takes records.
pub trait Sink: Send + Sync {
    /// Takes the record of a decision. It is in the kernel before any later byte leaves through the barrier of the same runtime.
    ///
    /// A denial of a caller of whom nothing was verified may be counted instead, in a line that names how many there were; then it
    /// is written within a second or so. Such a denial is always taken. No other record is ever counted instead.
    ///
    /// # Errors
    /// [`Unavailable`] where it was not taken; then the decision must be a denial.
    fn record(&self, record: &Record<'_>) -> Result<(), Unavailable>;

    /// Takes the record of an administrative act, which is in the kernel when this returns; one that was refused and that nobody's
    /// signature was verified of may be counted instead.
    ///
    /// # Errors
    /// [`Unavailable`] where it is not. The line of an act that changed the store, or may have, is kept all the same, as far as there
    /// is room, and written with the next attempt that succeeds. Any other one is lost, and who asked must not be told.
    fn record_act(&self, act: &Act<'_>) -> Result<(), Unavailable>;

    /// Writes what is buffered. On a failure what is left stays, in order, for the next attempt.
    ///
    /// # Errors
    /// As the file says.
    fn flush(&self) -> io::Result<()>;

    /// The timer's visit, some times a second: ends the counting of denials whose second is over, writes what no socket write
    /// followed, tries again what failed, syncs.
    fn tend(&self);

    /// Writes and syncs everything, counts too, for the end of the process.
    ///
    /// # Errors
    /// As the file says.
    fn finish(&self) -> io::Result<()>;
}

#[cfg(test)]
mod tests;
