//! The audit log: who asked for what, what was answered and why, one JSON line a decision and one an administrative act.
//!
//! A record is put into its [`Recorder`]'s buffer before the answer is made; the buffer reaches the kernel before any byte
//! leaves on a socket, because a recorder is the [`WriteBarrier`](crate::model::barrier::WriteBarrier) of its runtime's
//! connections. So no permit is seen outside without its record, and no request waits for a disk. What cannot be recorded
//! is refused with [`Unavailable`], and whoever asked to record it denies.
//!
//! Denials of callers of whom nothing was verified are recorded one by one up to a rate and counted beyond it, so that whoever can
//! connect cannot fill the disk; and they are the first that a disk without room takes no more.
//!
//! This module decides nothing, knows no socket, and never sees arguments, tokens or keys, only their digests. Look next at
//! `sink.rs` for what others know of it, at `record.rs` for what a line says, at `merge.rs` for what is counted instead, at
//! `recorder.rs` for the barrier, at `log.rs` for the files, at `query.rs` to read back, at `search.rs` to look for a name.

use std::path::PathBuf;

mod line;
mod log;
mod merge;
pub mod query;
mod record;
mod recorder;
mod room;
pub mod search;
mod sink;
#[cfg(test)]
mod tests;

pub use log::{Log, Settings, Status};
pub use record::{Act, ActOutcome, ChainFacts, Fragment, Level, Principal, Record};
pub use recorder::Recorder;
pub use room::RoomWatch;
pub use sink::Sink;

/// Why the log could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder or a file in it cannot be used.
    #[error("cannot {action} `{path}`: {source}: check that the data folder exists, is writable and has room")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The background thread could not be started.
    #[error("cannot start the audit thread: {0}: check the limit on threads")]
    Thread(std::io::Error),
    /// A line is not one JSON object.
    #[error("line {line} of `{path}` is not an audit record: {problem}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The last line of a file has no end: the process died while writing it, or is writing it now.
    #[error("line {line} of `{path}` is not finished: it is being written, or its process was stopped in the middle")]
    Unfinished {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
    },
}

/// The record was not taken: deny, for nothing may happen that is not recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The last attempt to write or sync failed; lifts by itself when one succeeds.
    #[error("the audit log cannot be written")]
    Unwritable,
    /// What is left of the disk is kept for acts and for the store.
    #[error("the disk of the audit log is full but for what is kept for acts")]
    NoRoom,
    /// The buffer has no room for the record.
    #[error("the audit buffer is full")]
    Full,
}
