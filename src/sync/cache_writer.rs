//! Writes the published state to the disk cache of this machine, commit by commit. A task of its own does it, so it never delays
//! the follower.
//!
//! ```text
//! follower ─▶ publish ─▶ queue (bounded) ─▶ cache.db: rows and position in one transaction
//! ```
//!
//! The follower never copies a full state into the queue: it queues only the position. The cache catches up to that position by
//! the change log, or else reads the full state from the store again. It does the same after the queue has overflowed because the
//! disk was too slow. Everything that it reads must continue the published state.
//!
//! The cache yields first when the disk runs full. It writes nothing while there is little free space, and it retries a failure after
//! a pause that doubles up to minutes. It does not read the full state again before the disk has space for the last one that it read.
//!
//! The cache must never permit a call. Look next at [`crate::store::sqlite::ReplicaCache`], the file, and at `fleet_member.rs`, which merges
//! the cached revocations into an adopted store.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, watch};

use super::follower::{HistoryPosition, KnownRevocations};
use super::position::PositionStore;
use crate::model::disk::{DiskSpaceLevel, DiskSpaceSource, PathDiskSpace};
use crate::model::revision::Revision;
use crate::store::sqlite::ReplicaCache;
use crate::store::{CommitRow, Error, Store, StoreState};

/// Limit of the rows of all queued commits together.
const ROWS_MAX: usize = 200_000;
/// Time during which commits are gathered into one batch.
const GATHER_INTERVAL: Duration = Duration::from_millis(20);
/// Time that the end of the process waits for the last write.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after the first failure of the store or the disk. Each further failure doubles it.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause after a failure of the store.
const STORE_PAUSE_MAX: Duration = Duration::from_secs(15);
/// Longest pause after a failure of the disk, or while it has no free space.
const DISK_PAUSE_MAX: Duration = Duration::from_secs(300);
/// Approximate size of a row beside its text.
const ROW_BYTES: u64 = 256;
/// Disk space of a full state while it is written, as a multiple of its rows: log, file and index.
const STATE_COPIES: u64 = 3;

/// The writer of this replica's disk cache.
pub struct CacheWriter {
    data: PathBuf,
    queue: Mutex<WriteQueue>,
    queue_changed: Notify,
    /// Lock order: this lock before the queue, so that a batch taken from the queue is written before anything reads the cache.
    cache: Mutex<Option<ReplicaCache>>,
    space: Arc<dyn DiskSpaceSource>,
    /// Free space that is needed, beyond the usual reserve, before a full state is read again: the space of the last one.
    state_bytes_needed: AtomicU64,
    failures: AtomicU64,
    /// Whether the last attempt failed. New commits are not queued then; the cache reads them from the store later.
    is_paused: AtomicBool,
}

/// Saves a position once the cache has written the commits that lead to it.
///
/// The cache gathers commits for some milliseconds. A position that is saved meanwhile would be ahead of the cache after a crash, and
/// the revocations in between could not be merged into an adopted store. A cache that cannot be written delays no position.
pub struct CacheFirstPositionStore<S> {
    cache_writer: Arc<CacheWriter>,
    inner: S,
}

impl<S> CacheFirstPositionStore<S> {
    /// Saves positions to `inner`, after the cache of `cache_writer`.
    pub fn new(cache_writer: Arc<CacheWriter>, inner: S) -> Self {
        Self { cache_writer, inner }
    }
}

#[async_trait]
impl<S: PositionStore> PositionStore for CacheFirstPositionStore<S> {
    async fn save(&self, position: &HistoryPosition) -> Result<(), std::io::Error> {
        self.cache_writer.write_queued().await;
        self.inner.save(position).await
    }
}

/// The reason why the cache does not catch up.
#[derive(Debug)]
enum CacheWriteError {
    Store(Error),
    Disk(Error),
}

/// The publications that are not written yet.
#[derive(Default)]
struct WriteQueue {
    /// The position that the cache must reach before the queued commits can follow.
    catch_up_target: Option<HistoryPosition>,
    pending_commits: Vec<(HistoryPosition, Vec<CommitRow>)>,
    pending_rows: usize,
}

impl CacheWriter {
    /// Makes the writer of the cache in a data folder. It opens no file yet.
    pub fn new(data: &Path) -> Arc<Self> {
        Self::with_free_space(data, Arc::new(PathDiskSpace(data.to_owned())))
    }

    /// As [`CacheWriter::new`], with another source of the disk's free space.
    pub(super) fn with_free_space(data: &Path, space: Arc<dyn DiskSpaceSource>) -> Arc<Self> {
        Arc::new(Self {
            data: data.to_owned(),
            queue: Mutex::default(),
            queue_changed: Notify::new(),
            cache: Mutex::default(),
            space,
            state_bytes_needed: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            is_paused: AtomicBool::new(false),
        })
    }

    /// The number of failed attempts since the start of the process.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Whether the writer waits to retry. The cache stays behind the published state meanwhile.
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    /// Queues a published full state: it replaces the whole cache.
    pub(super) fn enqueue_state(&self, at: HistoryPosition) {
        *self.lock_queue() = WriteQueue { catch_up_target: Some(at), ..WriteQueue::default() };
        self.queue_changed.notify_one();
    }

    /// Queues published commits that lead to a position.
    pub(super) fn enqueue_commits(&self, at: HistoryPosition, commits: Vec<CommitRow>) {
        let rows: usize = commits.iter().map(|commit| commit.changes.len().saturating_add(1)).sum();
        let mut queue = self.lock_queue();
        queue.pending_rows = queue.pending_rows.saturating_add(rows);
        if self.is_paused() {
            // Nothing accumulates while nothing is written.
            *queue = WriteQueue { catch_up_target: Some(at), ..WriteQueue::default() };
            // The pause may end at this very moment.
            self.queue_changed.notify_one();
            return;
        }
        if queue.pending_rows > ROWS_MAX {
            tracing::warn!(data = %self.data.display(), "the cache is too far behind what is published: it is to be read anew");
            *queue = WriteQueue { catch_up_target: Some(at), ..WriteQueue::default() };
        } else {
            queue.pending_commits.push((at, commits));
        }
        self.queue_changed.notify_one();
    }

    /// Writes the queue until `shutdown` turns true or its sender is dropped.
    pub async fn run(self: Arc<Self>, store: Arc<dyn Store>, mut shutdown: watch::Receiver<bool>) {
        let write_loop = async {
            let mut pause = PAUSE_MIN;
            loop {
                self.queue_changed.notified().await;
                tokio::time::sleep(GATHER_INTERVAL).await;
                let Err(error) = self.write_pending(&*store).await else {
                    if self.is_paused.swap(false, Ordering::Relaxed) {
                        tracing::info!(data = %self.data.display(), "the cache is written again");
                    }
                    pause = PAUSE_MIN;
                    continue;
                };
                self.pause_after_failure(&error, pause);
                tokio::time::sleep(pause).await;
                let pause_max = if matches!(error, CacheWriteError::Disk(_)) { DISK_PAUSE_MAX } else { STORE_PAUSE_MAX };
                pause = pause.saturating_mul(2).min(pause_max);
                self.queue_changed.notify_one();
            }
        };
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => {}
            () = write_loop => {}
        }
    }

    /// Writes the whole queue when the process ends. It gives up after a timeout, and the cache stays behind then.
    pub async fn flush_before_exit(self: &Arc<Self>, store: &dyn Store) {
        if !matches!(tokio::time::timeout(FINISH_TIMEOUT, self.write_pending(store)).await, Ok(Ok(()))) {
            tracing::warn!("the cache stays behind what was published");
        }
    }

    /// Pauses after a failure. It drops the queued commits, because the cache reads them from the store later.
    fn pause_after_failure(&self, error: &CacheWriteError, pause: Duration) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let is_new = !self.is_paused.swap(true, Ordering::Relaxed);
        let mut queue = self.lock_queue();
        let newest = queue.pending_commits.pop().map(|(at, _)| at).or_else(|| queue.catch_up_target.clone());
        *queue = WriteQueue { catch_up_target: newest, ..WriteQueue::default() };
        drop(queue);
        let (data, pause_s) = (self.data.display(), pause.as_secs());
        match error {
            CacheWriteError::Disk(error) if is_new => {
                tracing::warn!(%data, %error, pause_s, "the cache is not written for now: make room, or see to the disk");
            }
            CacheWriteError::Disk(error) | CacheWriteError::Store(error) => {
                tracing::debug!(%data, %error, pause_s, "the cache does not catch up yet");
            }
        }
    }

    async fn write_pending(self: &Arc<Self>, store: &dyn Store) -> Result<(), CacheWriteError> {
        self.check_free_space(0).await?;
        let wanted = self.lock_queue().catch_up_target.clone();
        if let Some(at) = wanted {
            self.catch_up(store, &at).await?;
            let mut queue = self.lock_queue();
            queue.catch_up_target = queue.catch_up_target.take().filter(|wanted| *wanted != at);
        }
        self.flush().await;
        Ok(())
    }

    /// Checks that the disk has this many bytes free beyond the reserve for other files.
    async fn check_free_space(&self, bytes: u64) -> Result<(), CacheWriteError> {
        let space = self.space.clone();
        let read = tokio::task::spawn_blocking(move || space.read()).await;
        let failed = |why: String| CacheWriteError::Disk(Error::Unavailable(why));
        let mut space = match read {
            Ok(Ok(space)) => space,
            Ok(Err(error)) => return Err(failed(format!("the room of the disk cannot be read: {error}"))),
            Err(error) => return Err(failed(format!("the room of the disk cannot be read: {error}"))),
        };
        space.free_bytes = space.free_bytes.saturating_sub(bytes);
        let before = if self.is_paused() { DiskSpaceLevel::Critical } else { DiskSpaceLevel::Ample };
        match DiskSpaceLevel::classify(space, before) {
            DiskSpaceLevel::Ample | DiskSpaceLevel::Low => Ok(()),
            DiskSpaceLevel::Critical | DiskSpaceLevel::Exhausted => {
                Err(failed(format!("the disk has only {} bytes to spare", space.free_bytes)))
            }
        }
    }

    /// Brings the cache to a published position or past it: by the change log if it reaches back far enough, else by a full state.
    async fn catch_up(self: &Arc<Self>, store: &dyn Store, at: &HistoryPosition) -> Result<(), CacheWriteError> {
        while let Some((revision, hash)) = self.with_cache(|cache| cache.position()).await.map_err(CacheWriteError::Disk)? {
            if revision == at.revision && hash == at.hash {
                return Ok(());
            }
            if revision.history != at.revision.history || revision.number >= at.revision.number {
                break;
            }
            let mut changes = match store.changes(revision.number).await {
                Ok(changes) => changes,
                Err(Error::BelowFloor { .. } | Error::Corrupt(_)) => break,
                // A store that cannot answer a small query is not asked for the full state.
                Err(error) => return Err(CacheWriteError::Store(error)),
            };
            changes.commits.retain(|commit| commit.number <= at.revision.number);
            let follows = changes.history == revision.history && !changes.commits.is_empty();
            let apply = move |cache: &mut ReplicaCache| cache.apply_commits(&changes.history, &changes.commits);
            if !follows || !self.with_cache(apply).await.map_err(CacheWriteError::Disk)? {
                break;
            }
        }
        self.check_free_space(self.state_bytes_needed.load(Ordering::Relaxed)).await?;
        let state = load_state_after(store, at).await.map_err(CacheWriteError::Store)?;
        let bytes = state_size_bytes(&state).saturating_mul(STATE_COPIES);
        self.state_bytes_needed.store(bytes, Ordering::Relaxed);
        self.check_free_space(bytes).await?;
        // Leave the runtime of the follower: hashing and freeing millions of rows takes seconds.
        let replaced = self
            .with_cache(move |cache| if state.digest_matches() { cache.replace_state(&state).map(|()| true) } else { Ok(false) })
            .await;
        match replaced {
            Ok(true) => Ok(()),
            Ok(false) => Err(CacheWriteError::Store(unrelated_state_error())),
            Err(error) => Err(CacheWriteError::Disk(error)),
        }
    }

    /// Writes the queued commits now, unless the writer waits after a failure.
    async fn write_queued(self: &Arc<Self>) {
        if !self.is_paused() {
            self.flush().await;
        }
    }

    /// Writes the queued commits.
    async fn flush(self: &Arc<Self>) {
        let cache_writer = self.clone();
        // `write_queue_blocking` logs its own failures.
        let _ = tokio::task::spawn_blocking(move || cache_writer.write_queue_blocking()).await;
    }

    /// First writes the queued commits, then returns the cached revocations at `last_position`, or at an earlier one if the cache
    /// is behind. Returns `None` if the cache holds nothing of that history.
    ///
    /// # Errors
    /// If the cache file cannot be used.
    pub async fn read_known_revocations(self: &Arc<Self>, last_position: &Revision) -> Result<Option<KnownRevocations>, Error> {
        let state = self.read_state().await?.filter(|state| state.revision.history == last_position.history);
        Ok(state.map(|state| KnownRevocations { number: state.revision.number, rows: state.revocations }))
    }

    /// Returns the whole cached state, verified.
    ///
    /// # Errors
    /// If the cache file cannot be used.
    pub async fn read_state(self: &Arc<Self>) -> Result<Option<StoreState>, Error> {
        self.flush().await;
        self.with_cache(ReplicaCache::load_state).await
    }

    /// Runs `act` on the open cache, on a thread that may block.
    async fn with_cache<T: Send + 'static>(
        self: &Arc<Self>,
        act: impl FnOnce(&mut ReplicaCache) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let cache_writer = self.clone();
        let acted = move || {
            let mut cache = cache_writer.lock_cache();
            act(cache_writer.open_cache(&mut cache)?)
        };
        let failed = |error| Error::Unavailable(format!("the cache cannot be used: {error}"));
        tokio::task::spawn_blocking(acted).await.map_err(failed)?
    }

    /// Writes the queued commits. Blocks.
    fn write_queue_blocking(&self) {
        let mut cache = self.lock_cache();
        let waiting = {
            let mut queue = self.lock_queue();
            if queue.catch_up_target.is_some() {
                return;
            }
            queue.pending_rows = 0;
            std::mem::take(&mut queue.pending_commits)
        };
        let Some((newest, _)) = waiting.last().cloned() else { return };
        let written = self.open_cache(&mut cache).and_then(|cache| {
            for (at, commits) in &waiting {
                if !cache.apply_commits(&at.revision.history, commits)? {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        if written != Ok(true) {
            let why = written.err().map_or_else(|| "a commit does not follow what is kept".to_owned(), |error| error.to_string());
            tracing::warn!(why, "what was published is not kept in the cache: it is to be read anew");
            let mut queue = self.lock_queue();
            let newest = queue.pending_commits.last().map_or(newest, |(at, _)| at.clone());
            *queue = WriteQueue { catch_up_target: Some(newest), ..WriteQueue::default() };
            self.queue_changed.notify_one();
        }
    }

    fn open_cache<'a>(&self, cache: &'a mut Option<ReplicaCache>) -> Result<&'a mut ReplicaCache, Error> {
        if cache.is_none() {
            *cache = Some(ReplicaCache::open(&self.data)?);
        }
        cache.as_mut().ok_or_else(|| Error::Unavailable("the cache is not open".to_owned()))
    }

    fn lock_queue(&self) -> MutexGuard<'_, WriteQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_cache(&self) -> MutexGuard<'_, Option<ReplicaCache>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Loads a full state that continues from a position.
async fn load_state_after(store: &dyn Store, at: &HistoryPosition) -> Result<StoreState, Error> {
    let state = store.load().await?;
    if state.revision.history != at.revision.history {
        return Err(unrelated_state_error());
    }
    let (mut number, mut hash) = (at.revision.number, at.hash);
    while number < state.revision.number {
        let commits = store.changes(number).await?.commits;
        if commits.is_empty() {
            return Err(unrelated_state_error());
        }
        for commit in commits.iter().filter(|commit| commit.number <= state.revision.number) {
            commit.verify_after(number, &hash)?;
            (number, hash) = (commit.number, commit.hash);
        }
    }
    if (number, hash) == (state.revision.number, state.hash) { Ok(state) } else { Err(unrelated_state_error()) }
}

/// The approximate size of a state's rows in bytes.
fn state_size_bytes(state: &StoreState) -> u64 {
    let documents = state.documents.iter().map(|stored| stored.row.json.len());
    let revocations = state.revocations.iter().map(|row| {
        let parts: usize = row.target.key_parts().iter().map(|part| part.len()).sum();
        parts.saturating_add(row.reason.len())
    });
    documents.chain(revocations).map(|bytes| (bytes as u64).saturating_add(ROW_BYTES)).fold(0, u64::saturating_add)
}

fn unrelated_state_error() -> Error {
    Error::Corrupt("what the store holds does not lead on from what was published".to_owned())
}

#[cfg(test)]
mod tests;
