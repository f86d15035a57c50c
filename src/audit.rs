//! The audit log: one JSON line per decision and per administrative act, which says who asked, what was answered and why.
//!
//! A record enters the buffer of its [`AuditRecorder`] before the answer is made. The buffer reaches the kernel before any byte leaves
//! on a socket, because a recorder is the [`WriteBarrier`](crate::model::write_barrier::WriteBarrier) of its runtime's connections.
//! Therefore no permit is visible outside without its record, and no request waits for a disk. A record that cannot be taken
//! fails with [`AuditUnavailable`], and its caller denies.
//!
//! A denial is recorded one by one up to a rate, and counted beyond it, if its caller did not prove that it holds a chain in force. The
//! same holds for refused acts. Thus nobody who can merely connect, or who overheard a chain or an act, can fill the disk. When the
//! disk runs full, these records are the first that are no longer written one by one.
//!
//! This module decides nothing and knows no socket. It never receives arguments, tokens or keys, only their digests.
//!
//! Look next at `sink.rs` (the interface), `record.rs` (the content of a line), `denial_merger.rs` (counted denials), `recorder.rs` (the
//! barrier), `log.rs` (the folder), `log_file.rs` (one file), `query.rs` (reading back), `tail.rs` (unfinished lines) and `search.rs`
//! (looking for a name).

use std::path::PathBuf;

mod denial_merger;
mod disk_monitor;
mod json_line;
mod log;
mod log_file;
pub mod query;
mod record;
mod recorder;
pub mod search;
mod sink;
mod tail;
#[cfg(test)]
mod tests;

pub use disk_monitor::DiskMonitor;
pub use log::{AuditLog, AuditStatus, Settings};
pub use record::{ActOutcome, ActRecord, ChainFacts, ChainFragment, DecisionRecord, PrincipalFacts, TokenFacts};
pub use recorder::AuditRecorder;
pub use sink::AuditSink;

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
    InvalidLine {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
        /// The problem with the line.
        problem: String,
    },
    /// The last line of a file has no end: the process died while writing it, or is still writing it.
    #[error("line {line} of `{path}` is not finished: it is being written, or its process was stopped in the middle")]
    UnfinishedLine {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
    },
}

/// Why a record was not taken. The caller must deny, because nothing may happen without a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuditUnavailable {
    /// The last attempt to write or sync failed, or the file is no longer at its path. Ends as soon as an attempt succeeds.
    #[error("the audit log cannot be written")]
    Unwritable,
    /// The remaining disk space is reserved for acts and for the store.
    #[error("the disk of the audit log is full but for what is kept for acts")]
    DiskFull,
    /// The buffer of the recorder has no room for the record.
    #[error("the audit buffer is full")]
    BufferFull,
}
