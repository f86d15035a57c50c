//! What lock-free hand-overs are built of, named in one place so that a test can put loom's models in their place.
//!
//! `snapshot/cell.rs`, `revocation/index.rs` and `revocation/filter.rs` take all of these from their parent module; tests compile
//! the same files a second time below a parent that hands out `primitives/loomed.rs` instead.

use std::io;

pub(crate) use dashmap::DashMap as Map;
pub(crate) use std::sync::atomic::{AtomicU64, AtomicUsize};
pub(crate) use std::sync::{Mutex, MutexGuard, OnceLock};
pub(crate) use std::thread_local as per_thread;

#[cfg(test)]
pub(crate) mod loomed;

/// Words of a block of the revocation filter: one cache line.
pub(crate) const FILTER_WORDS: usize = 8;

/// Runs something on a thread of its own, which nobody waits for.
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}
