//! Keeps what was published on this machine's disk, commit by commit, by a task of its own: never in the follower's way.
//!
//! ```text
//! follower ─▶ publish ─▶ queue (bounded) ─▶ cache.db: rows and place in one transaction
//! ```
//!
//! Nothing is copied of a full state. The cache catches up with it by the change log, or reads it again from the store, at leisure; so it
//! does where the disk was too far behind and the queue was given up. What it reads must lead on from what was published. Look next at
//! [`crate::store::sqlite::Cache`], and at `member.rs`, which merges it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::follower::{Known, Position};
use crate::model::revision::Revision;
use crate::store::sqlite::Cache;
use crate::store::{CommitRow, Error, State, Store};

/// Rows that wait to be written, of all commits together.
const ROWS_MAX: usize = 200_000;
/// Commits that are written in one transaction are gathered for so long.
const GATHER: Duration = Duration::from_millis(20);
/// What the end of the program waits for it.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a store, or a disk, that failed.
const RETRY: Duration = Duration::from_secs(1);

/// The cache of this replica.
pub struct Keeper {
    data: PathBuf,
    queue: Mutex<Queue>,
    more: Notify,
    /// Taken before the queue: what is taken out of the queue is written before anybody reads.
    cache: Mutex<Option<Cache>>,
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
        Arc::new(Self { data: data.to_owned(), queue: Mutex::default(), more: Notify::new(), cache: Mutex::default() })
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
            loop {
                self.more.notified().await;
                tokio::time::sleep(GATHER).await;
                if let Err(error) = self.write_all(&*store).await {
                    tracing::debug!(%error, "the cache does not catch up yet");
                    tokio::time::sleep(RETRY).await;
                    self.more.notify_one();
                }
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

    async fn write_all(self: &Arc<Self>, store: &dyn Store) -> Result<(), Error> {
        let wanted = self.queue().wanted.clone();
        if let Some(at) = wanted {
            self.catch_up(store, &at).await?;
            let mut queue = self.queue();
            queue.wanted = queue.wanted.take().filter(|wanted| *wanted != at);
        }
        self.flush().await;
        Ok(())
    }

    /// Brings the cache to a place that was published, or past it: by the log where it reaches back so far, else by a full state.
    async fn catch_up(self: &Arc<Self>, store: &dyn Store, at: &Position) -> Result<(), Error> {
        while let Some((revision, hash)) = self.on_cache(|cache| cache.place()).await? {
            if revision == at.revision && hash == at.hash {
                return Ok(());
            }
            if revision.history != at.revision.history || revision.number >= at.revision.number {
                break;
            }
            let Ok(mut changes) = store.changes(revision.number).await else { break };
            changes.commits.retain(|commit| commit.number <= at.revision.number);
            let follows = changes.history == revision.history && !changes.commits.is_empty();
            if !follows || !self.on_cache(move |cache| cache.apply(&changes.history, &changes.commits)).await? {
                break;
            }
        }
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
        if (number, hash) != (state.revision.number, state.hash) {
            return Err(foreign());
        }
        // Away from the runtime that follows the store: of millions of rows, hashing and freeing take seconds too.
        self.on_cache(move |cache| if state.has_its_digest() { cache.replace(&state) } else { Err(foreign()) }).await
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

fn foreign() -> Error {
    Error::Corrupt("what the store holds does not lead on from what was published".to_owned())
}
