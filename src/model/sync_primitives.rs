//! The synchronization primitives of the lock-free data structures. Tests replace them by the models of loom.
//!
//! `snapshot/cell.rs`, `revocation/index.rs` and `revocation/filter.rs` import all of these names from their parent module. Tests compile
//! the same files a second time, below a parent that provides `sync_primitives/loom_model.rs` instead.

use std::io;

pub(crate) use dashmap::DashMap as Map;
pub(crate) use std::sync::atomic::{AtomicU64, AtomicUsize};
pub(crate) use std::sync::{Mutex, MutexGuard, OnceLock};
pub(crate) use std::thread_local as per_thread;

#[cfg(test)]
pub(crate) mod loom_model;

/// Number of words in a block of the revocation filter: one cache line.
pub(crate) const FILTER_WORDS: usize = 8;

/// Runs a function on a detached thread.
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}
