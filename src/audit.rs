//! The audit log: one JSON line per decision and per administrative act, which says who asked, what was answered and why.
//!
//! A record enters the buffer of its [`Recorder`] before the answer is made. The buffer reaches the kernel before any byte leaves
//! on a socket, because a recorder is the [`WriteBarrier`](crate::model::barrier::WriteBarrier) of its runtime's connections.
//! Therefore no permit is visible outside without its record, and no request waits for a disk. A record that cannot be taken
//! fails with [`Unavailable`], and its caller denies.
//!
//! An unverified caller is a caller without any verified identity. Its denials are recorded one by one up to a rate and counted
//! beyond it, so that a client that can merely connect cannot fill the disk. When the disk runs full, these denials are the first
//! that are no longer recorded one by one.
//!
//! This module decides nothing and knows no socket. It never receives arguments, tokens or keys, only their digests.
//!
//! Look next at `sink.rs` (the interface), `record.rs` (the content of a line), `merge.rs` (counted denials), `recorder.rs` (the
//! barrier), `log.rs` (the files), `query.rs` (reading back) and `search.rs` (looking for a name).

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

/// Why the log cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder or a file in it cannot be used.
    #[error("cannot {action} `{path}`: {source}: check that the data folder exists, is writable and has room")]
    Io {
        /// The failed operation.
        action: &'static str,
        /// The path on which it failed.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The background thread could not be started.
    #[error("cannot start the audit thread: {0}: check the limit on threads")]
    Thread(std::io::Error),
    /// A line is not a JSON object.
    #[error("line {line} of `{path}` is not an audit record: {problem}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
        /// The problem with the line.
        problem: String,
    },
    /// The last line of a file has no end: the process died while writing it, or is still writing it.
    #[error("line {line} of `{path}` is not finished: it is being written, or its process was stopped in the middle")]
    Unfinished {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
    },
}

/// Why a record was not taken. The caller must deny, because nothing may happen without a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The last attempt to write or sync failed. Ends as soon as an attempt succeeds.
    #[error("the audit log cannot be written")]
    Unwritable,
    /// The remaining disk space is reserved for acts and for the store.
    #[error("the disk of the audit log is full but for what is kept for acts")]
    NoRoom,
    /// The buffer of the recorder has no room for the record.
    #[error("the audit buffer is full")]
    Full,
}
