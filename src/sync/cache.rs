//! Keeps what was published on this machine's disk, commit by commit, by a task of its own: never in the follower's way.
//!
//! ```text
//! follower ─▶ publish ─▶ queue (bounded) ─▶ cache.db: rows and place in one transaction
//! ```
//!
//! Nothing is copied of a full state. The cache catches up with it by the change log, or reads it again from the store, at leisure; so it
//! does where the disk was too far behind and the queue was given up. What it reads must lead on from what was published.
//!
//! The cache is the first to give way on a disk that runs full: it is not written where there is little room, and what fails is tried
//! again after a pause that doubles up to minutes. The store is not read whole before the disk has room for what was read last. Look next
//! at [`crate::store::sqlite::Cache`], and at `member.rs`, which merges it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::follower::{Known, Position};
use crate::model::disk::{DiskOf, FreeSpace, Room};
use crate::model::revision::Revision;
use crate::store::sqlite::Cache;
use crate::store::{CommitRow, Error, State, Store};

/// Rows that wait to be written, of all commits together.
const ROWS_MAX: usize = 200_000;
/// Commits that are written in one transaction are gathered for so long.
const GATHER: Duration = Duration::from_millis(20);
/// What the end of the program waits for it.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a first failure of the store or the disk; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause after a store that failed.
const STORE_PAUSE_MAX: Duration = Duration::from_secs(15);
/// Longest pause after a disk that failed or has no room.
const DISK_PAUSE_MAX: Duration = Duration::from_secs(300);
/// What a row takes beside its text, about.
const ROW_BYTES: u64 = 256;
/// How often the bytes of its rows a full state takes while it is written: log, file and index.
const STATE_COPIES: u64 = 3;

/// The cache of this replica.
pub struct Keeper {
    data: PathBuf,
    queue: Mutex<Queue>,
    more: Notify,
    /// Taken before the queue: what is taken out of the queue is written before anybody reads.
    cache: Mutex<Option<Cache>>,
    space: Arc<dyn FreeSpace>,
    /// Bytes that must be free beyond the least before a full state is read again: what the last one would have taken.
    wanted_bytes: AtomicU64,
    failures: AtomicU64,
    /// The last attempt failed: what comes is not queued, but read again later.
    is_paused: AtomicBool,
}

/// Why the cache does not catch up.
#[derive(Debug)]
enum Trouble {
    Store(Error),
    Disk(Error),
}

#[derive(Default)]
struct Queue {
    /// The cache must be brought to this place before what waits can follow.
    wanted: Option<Position>,
    waiting: Vec<(Position, Vec<CommitRow>)>,
    rows: usize,
}

impl Keeper {
    /// The cache of a data folder; nothing is opened yet.
    pub fn new(data: &Path) -> Arc<Self> {
        Self::with_space(data, Arc::new(DiskOf(data.to_owned())))
    }

    /// As [`Keeper::new`], with another word for how much room the disk has.
    pub(super) fn with_space(data: &Path, space: Arc<dyn FreeSpace>) -> Arc<Self> {
        Arc::new(Self {
            data: data.to_owned(),
            queue: Mutex::default(),
            more: Notify::new(),
            cache: Mutex::default(),
            space,
            wanted_bytes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            is_paused: AtomicBool::new(false),
        })
    }

    /// How often it could not be written since the start.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Whether it waits to try again, and stays behind what is published meanwhile.
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    /// A full state was published: it is to be kept in place of everything.
    pub(super) fn replace(&self, at: Position) {
        *self.queue() = Queue { wanted: Some(at), ..Queue::default() };
        self.more.notify_one();
    }

    /// Commits that lead to a place were published: they are to be kept.
    pub(super) fn apply(&self, at: Position, commits: Vec<CommitRow>) {
        let rows: usize = commits.iter().map(|commit| commit.changes.len().saturating_add(1)).sum();
        let mut queue = self.queue();
        queue.rows = queue.rows.saturating_add(rows);
        if self.is_paused() {
            // Nothing piles up while nothing is written.
            *queue = Queue { wanted: Some(at), ..Queue::default() };
            // For the case that the pause ends in this moment.
            self.more.notify_one();
            return;
        }
        if queue.rows > ROWS_MAX {
            tracing::warn!(data = %self.data.display(), "the cache is too far behind what is published: it is to be read anew");
            *queue = Queue { wanted: Some(at), ..Queue::default() };
        } else {
            queue.waiting.push((at, commits));
        }
        self.more.notify_one();
    }

    /// Writes what comes, until `shutdown` turns true or its sender is gone.
    pub async fn run(self: Arc<Self>, store: Arc<dyn Store>, mut shutdown: watch::Receiver<bool>) {
        let keeping = async {
            let mut pause = PAUSE_MIN;
            loop {
                self.more.notified().await;
                tokio::time::sleep(GATHER).await;
                let Err(trouble) = self.write_all(&*store).await else {
                    if self.is_paused.swap(false, Ordering::Relaxed) {
                        tracing::info!(data = %self.data.display(), "the cache is written again");
                    }
                    pause = PAUSE_MIN;
                    continue;
                };
                self.failed(&trouble, pause);
                tokio::time::sleep(pause).await;
                let pause_max = if matches!(trouble, Trouble::Disk(_)) { DISK_PAUSE_MAX } else { STORE_PAUSE_MAX };
                pause = pause.saturating_mul(2).min(pause_max);
                self.more.notify_one();
            }
        };
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => {}
            () = keeping => {}
        }
    }

    /// Writes all that was published so far, at the end of the program; what takes too long is left out.
    pub async fn finish(self: &Arc<Self>, store: &dyn Store) {
        if !matches!(tokio::time::timeout(FINISH_TIMEOUT, self.write_all(store)).await, Ok(Ok(()))) {
            tracing::warn!("the cache stays behind what was published");
        }
    }

    fn failed(&self, trouble: &Trouble, pause: Duration) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let is_new = !self.is_paused.swap(true, Ordering::Relaxed);
        let mut queue = self.queue();
        let newest = queue.waiting.pop().map(|(at, _)| at).or_else(|| queue.wanted.clone());
        *queue = Queue { wanted: newest, ..Queue::default() };
        drop(queue);
        let (data, pause_s) = (self.data.display(), pause.as_secs());
        match trouble {
            Trouble::Disk(error) if is_new => {
                tracing::warn!(%data, %error, pause_s, "the cache is not written for now: make room, or see to the disk");
            }
            Trouble::Disk(error) | Trouble::Store(error) => {
                tracing::debug!(%data, %error, pause_s, "the cache does not catch up yet");
            }
        }
    }

    async fn write_all(self: &Arc<Self>, store: &dyn Store) -> Result<(), Trouble> {
        self.check_room(0).await?;
        let wanted = self.queue().wanted.clone();
        if let Some(at) = wanted {
            self.catch_up(store, &at).await?;
            let mut queue = self.queue();
            queue.wanted = queue.wanted.take().filter(|wanted| *wanted != at);
        }
        self.flush().await;
        Ok(())
    }

    /// Whether the disk has so many bytes beyond those that are left to others.
    async fn check_room(&self, bytes: u64) -> Result<(), Trouble> {
        let space = self.space.clone();
        let read = tokio::task::spawn_blocking(move || space.read()).await;
        let failed = |why: String| Trouble::Disk(Error::Unavailable(why));
        let mut space = match read {
            Ok(Ok(space)) => space,
            Ok(Err(error)) => return Err(failed(format!("the room of the disk cannot be read: {error}"))),
            Err(error) => return Err(failed(format!("the room of the disk cannot be read: {error}"))),
        };
        space.free_bytes = space.free_bytes.saturating_sub(bytes);
        let before = if self.is_paused() { Room::Critical } else { Room::Ample };
        match Room::of(space, before) {
            Room::Ample | Room::Low => Ok(()),
            Room::Critical | Room::Exhausted => Err(failed(format!("the disk has only {} bytes to spare", space.free_bytes))),
        }
    }

    /// Brings the cache to a place that was published, or past it: by the log where it reaches back so far, else by a full state.
    async fn catch_up(self: &Arc<Self>, store: &dyn Store, at: &Position) -> Result<(), Trouble> {
        while let Some((revision, hash)) = self.on_cache(|cache| cache.place()).await.map_err(Trouble::Disk)? {
            if revision == at.revision && hash == at.hash {
                return Ok(());
            }
            if revision.history != at.revision.history || revision.number >= at.revision.number {
                break;
            }
            let mut changes = match store.changes(revision.number).await {
                Ok(changes) => changes,
                Err(Error::BelowFloor { .. } | Error::Corrupt(_)) => break,
                // A store that cannot be asked for a little is not asked for everything.
                Err(error) => return Err(Trouble::Store(error)),
            };
            changes.commits.retain(|commit| commit.number <= at.revision.number);
            let follows = changes.history == revision.history && !changes.commits.is_empty();
            let apply = move |cache: &mut Cache| cache.apply(&changes.history, &changes.commits);
            if !follows || !self.on_cache(apply).await.map_err(Trouble::Disk)? {
                break;
            }
        }
        self.check_room(self.wanted_bytes.load(Ordering::Relaxed)).await?;
        let state = loaded(store, at).await.map_err(Trouble::Store)?;
        let bytes = bytes_of(&state).saturating_mul(STATE_COPIES);
        self.wanted_bytes.store(bytes, Ordering::Relaxed);
        self.check_room(bytes).await?;
        // Away from the runtime that follows the store: of millions of rows, hashing and freeing take seconds too.
        let replaced = self
            .on_cache(move |cache| if state.has_its_digest() { cache.replace(&state).map(|()| true) } else { Ok(false) })
            .await;
        match replaced {
            Ok(true) => Ok(()),
            Ok(false) => Err(Trouble::Store(foreign())),
            Err(error) => Err(Trouble::Disk(error)),
        }
    }

    /// Writes what waits.
    async fn flush(self: &Arc<Self>) {
        let keeper = self.clone();
        // It says itself what goes wrong.
        let _ = tokio::task::spawn_blocking(move || keeper.write()).await;
    }

    /// What was known at `stood`, or before it where the cache stayed behind; `None` where nothing of that history is kept. What was
    /// published before is written first.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub async fn known(self: &Arc<Self>, stood: &Revision) -> Result<Option<Known>, Error> {
        let state = self.state().await?.filter(|state| state.revision.history == stood.history);
        Ok(state.map(|state| Known { number: state.revision.number, rows: state.revocations }))
    }

    /// All that is kept, checked.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub async fn state(self: &Arc<Self>) -> Result<Option<State>, Error> {
        self.flush().await;
        self.on_cache(Cache::read).await
    }

    async fn on_cache<T: Send + 'static>(
        self: &Arc<Self>,
        act: impl FnOnce(&mut Cache) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let keeper = self.clone();
        let acted = move || {
            let mut cache = keeper.cache();
            act(keeper.opened(&mut cache)?)
        };
        let failed = |error| Error::Unavailable(format!("the cache cannot be used: {error}"));
        tokio::task::spawn_blocking(acted).await.map_err(failed)?
    }

    /// Writes what waits. Blocks.
    fn write(&self) {
        let mut cache = self.cache();
        let waiting = {
            let mut queue = self.queue();
            if queue.wanted.is_some() {
                return;
            }
            queue.rows = 0;
            std::mem::take(&mut queue.waiting)
        };
        let Some((newest, _)) = waiting.last().cloned() else { return };
        let written = self.opened(&mut cache).and_then(|cache| {
            for (at, commits) in &waiting {
                if !cache.apply(&at.revision.history, commits)? {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        if written != Ok(true) {
            let why = written.err().map_or_else(|| "a commit does not follow what is kept".to_owned(), |error| error.to_string());
            tracing::warn!(why, "what was published is not kept in the cache: it is to be read anew");
            let mut queue = self.queue();
            let newest = queue.waiting.last().map_or(newest, |(at, _)| at.clone());
            *queue = Queue { wanted: Some(newest), ..Queue::default() };
            self.more.notify_one();
        }
    }

    fn opened<'a>(&self, cache: &'a mut Option<Cache>) -> Result<&'a mut Cache, Error> {
        if cache.is_none() {
            *cache = Some(Cache::open(&self.data)?);
        }
        cache.as_mut().ok_or_else(|| Error::Unavailable("the cache is not open".to_owned()))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cache(&self) -> MutexGuard<'_, Option<Cache>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A full state that leads on from a place.
async fn loaded(store: &dyn Store, at: &Position) -> Result<State, Error> {
    let state = store.load().await?;
    if state.revision.history != at.revision.history {
        return Err(foreign());
    }
    let (mut number, mut hash) = (at.revision.number, at.hash);
    while number < state.revision.number {
        let commits = store.changes(number).await?.commits;
        if commits.is_empty() {
            return Err(foreign());
        }
        for commit in commits.iter().filter(|commit| commit.number <= state.revision.number) {
            commit.verify_after(number, &hash)?;
            (number, hash) = (commit.number, commit.hash);
        }
    }
    if (number, hash) == (state.revision.number, state.hash) { Ok(state) } else { Err(foreign()) }
}

/// The bytes of a state's rows, about.
fn bytes_of(state: &State) -> u64 {
    let documents = state.documents.iter().map(|stored| stored.row.json.len());
    let revocations = state.revocations.iter().map(|row| {
        let parts: usize = row.target.parts().iter().map(|part| part.len()).sum();
        parts.saturating_add(row.reason.len())
    });
    documents.chain(revocations).map(|bytes| (bytes as u64).saturating_add(ROW_BYTES)).fold(0, u64::saturating_add)
}

fn foreign() -> Error {
    Error::Corrupt("what the store holds does not lead on from what was published".to_owned())
}

#[cfg(test)]
mod tests;
