//! The loop that drives the follower: it queries the store, hands each answer to the follower, and carries out the resulting action.
//!
//! The loop runs on the control runtime, and it is the only task that publishes. `follower.rs` decides how to react to an answer.
//! `status.rs` shows the progress to other modules. Look next at those two files.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Publisher;
use super::backoff::Backoff;
use super::cache::Keeper;
use super::follower::{Action, Adopted, Event, Follower, Position, Request, State};
use super::status::{Counters, Progress, Reporter, Status};
use crate::model::mutant::{Mutant, active};
use crate::model::records::Change;
use crate::model::revision::Revision;
use crate::model::time::{Clock, Now};
use crate::store::{self, Changes, CommitRow};

/// The store as a follower uses it. [`super::Member`] implements it: its answers prove that they were current when the query was sent.
#[async_trait]
pub trait Source: Send + Sync {
    /// Loads the full state. See [`store::Store::load_as`].
    ///
    /// # Errors
    /// As [`store::Store::load_as`].
    async fn load(&self) -> Result<store::State, store::Error>;

    /// Polls for the changes after a number. See [`store::Store::poll`].
    ///
    /// # Errors
    /// As [`store::Store::poll`].
    async fn changes(&self, after: u64) -> Result<Changes, store::Error>;

    /// Asks whether the store was adopted from the history of `stood`, the last position of this replica. If so, it first merges
    /// the revocations that this replica knew. Returns `None` if the store was not adopted from that history.
    ///
    /// # Errors
    /// If the store cannot answer, or if the known revocations cannot be merged.
    async fn adoption(&self, _stood: &Position) -> Result<Option<Adopted>, store::Error> {
        Ok(None)
    }

    /// Returns the store's hint of new commits. See [`store::Store::wake`].
    fn wake(&self) -> watch::Receiver<u64>;
}

/// Intervals and timeouts of the follower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Pause between polls while there is no failure.
    pub poll_interval_ms: u64,
    /// Time after which a poll has failed.
    pub poll_timeout_ms: u64,
    /// Time after which a load has failed.
    pub load_timeout_ms: u64,
    /// Pause after the first failure. Each further failure doubles it.
    pub backoff_ms_min: u64,
    /// Longest pause after failures.
    pub backoff_ms_max: u64,
    /// Longest pause before a resync begins. The actual pause is random.
    pub resync_jitter_ms_max: u64,
    /// Seed of the jitter; `None`: a random seed.
    pub seed: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            poll_interval_ms: 20,
            poll_timeout_ms: 1_000,
            load_timeout_ms: 60_000,
            backoff_ms_min: 50,
            backoff_ms_max: 500,
            resync_jitter_ms_max: 200,
            seed: None,
        }
    }
}

/// A follower with its store, publisher and clock, ready to run.
pub struct Follow<P> {
    source: Box<dyn Source>,
    publisher: P,
    clock: Arc<dyn Clock>,
    settings: Settings,
    follower: Follower,
    reporter: Reporter,
    backoff: Backoff,
    /// Whether the last event was a failure.
    failed: bool,
    behind_since_unix_ms: Option<i64>,
    keeper: Option<Arc<Keeper>>,
    /// The last problem of the store server's configuration that was logged.
    said: Option<String>,
}

/// Shortest pause between two checks whether the store was adopted. An operator makes an adoption, and the whole fleet asks for it.
const ADOPTION_PAUSE_MS_MIN: u64 = 600;
const ADOPTION_JITTER_MS_MAX: u64 = 600;
/// Upper limit of the distance that a caller's poll keeps from the poll before it. Below it, the distance is a quarter of the
/// poll interval.
const CALLERS_DISTANCE_MS_MAX: u64 = 25;

impl<P: Publisher> Follow<P> {
    /// Creates a follower, and the handle through which other modules see it. `known` is as in [`Follower::new`].
    pub fn new(
        source: impl Source + 'static,
        publisher: P,
        clock: Arc<dyn Clock>,
        settings: Settings,
        known: Option<Position>,
    ) -> (Self, Status) {
        let (reporter, status) = Reporter::new();
        let seed = settings.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        let backoff = Backoff::new(settings.backoff_ms_min, settings.backoff_ms_max, seed);
        let follower = Follower::new(known.filter(|_| !active(Mutant::ForgetKnown)));
        (
            Self {
                source: Box::new(source),
                publisher,
                clock,
                settings,
                follower,
                reporter,
                backoff,
                failed: false,
                behind_since_unix_ms: None,
                keeper: None,
                said: None,
            },
            status,
        )
    }

    /// Writes each published state to the disk cache as well.
    #[must_use]
    pub fn keeping(self, keeper: Arc<Keeper>) -> Self {
        Self { keeper: Some(keeper), ..self }
    }

    /// Publishes the state of the disk cache, which denies every call until the store is reached. `known` is as in [`Follower::new`].
    ///
    /// # Errors
    /// If the policy of the cached state cannot be built. Nothing is published then.
    pub fn from_cache(mut self, cached: store::State, known: Option<Position>) -> Result<Self, String> {
        let position = Position { revision: cached.revision.clone(), hash: cached.hash };
        self.publisher.restore(cached)?;
        self.follower = Follower::from_cache(position, known);
        Ok(self)
    }

    /// Starts in quarantine. It follows nothing until the store is adopted from the history of `stood`.
    #[must_use]
    pub fn in_quarantine(mut self, stood: Position, reason: String) -> Self {
        self.follower = Follower::in_quarantine(stood, reason);
        self.show();
        self
    }

    /// Follows the store until `shutdown` turns true or its sender is dropped. The published state then stays and ages.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut stop = std::pin::pin!(async move {
            // An error means that the sender is dropped, so nothing could stop this loop later.
            let _ = shutdown.wait_for(|stop| *stop).await;
        });
        let mut wake = Wake::new(self.source.wake());
        loop {
            let asked = match self.follower.request() {
                Request::Load => Asked::Load,
                Request::Poll { after, .. } => Asked::Poll(after),
                Request::Adoption => Asked::Adoption,
                Request::Nothing => {
                    // Quarantined before anything was followed: there is nothing to wait for, but the status must stay readable.
                    stop.await;
                    return;
                }
            };
            // Mark the hint as seen before the query is sent, so that a later commit wakes this loop again.
            wake.mark();
            let sent = Instant::now();
            let event = tokio::select! {
                () = &mut stop => return,
                event = self.ask(asked) => event,
            };
            self.take(event);
            tokio::select! {
                () = &mut stop => return,
                () = self.pause(&mut wake, sent) => {}
            }
        }
    }

    /// Sends a query to the store and returns the answer as an event.
    async fn ask(&self, asked: Asked) -> Event {
        let sent_at = self.clock.now();
        match asked {
            Asked::Load => match within(self.settings.load_timeout_ms, self.source.load()).await {
                Ok(state) => Event::Loaded { sent_at: self.proof_of(sent_at), state: Box::new(state) },
                Err(error) => Event::LoadFailed(error),
            },
            Asked::Poll(after) => match within(self.settings.poll_timeout_ms, self.source.changes(after)).await {
                Ok(changes) => Event::Changes { sent_at: self.proof_of(sent_at), changes },
                Err(error) => Event::PollFailed(error),
            },
            Asked::Adoption => {
                let asked = async {
                    match self.follower.stood() {
                        Some(stood) => self.source.adoption(stood).await,
                        None => Ok(None),
                    }
                };
                match within(self.settings.load_timeout_ms, asked).await {
                    Ok(adopted) => Event::Adoption { sent_at: self.proof_of(sent_at), adopted: adopted.map(Box::new) },
                    Err(error) => Event::AdoptionFailed(error),
                }
            }
        }
    }

    /// The time that an answer proves: the time at which its query was sent, not the time of its arrival.
    fn proof_of(&self, sent_at: Now) -> Now {
        if active(Mutant::ArrivalTime) { self.clock.now() } else { sent_at }
    }

    /// Hands an event to the follower, carries out the action, and reports the progress.
    fn take(&mut self, event: Event) {
        self.reporter.count(counter_of(&event), 1);
        let before = self.follower.state();
        let failures = self.follower.failures();
        let failed = match &event {
            Event::PollFailed(error) | Event::LoadFailed(error) => Some(error.clone()),
            _ => None,
        };
        if active(Mutant::RenewOnFailure) && matches!(event, Event::PollFailed(_)) {
            self.publisher.refresh(self.clock.now());
        }
        match self.follower.on(event) {
            None => {}
            Some(Action::Replace { state, proof }) => {
                let revision = state.revision.clone();
                let (documents, revocations, read_at) = (state.documents.len(), state.revocations.len(), self.clock.now());
                let at = Position { revision: revision.clone(), hash: state.hash };
                let result = self.publisher.replace(*state, proof);
                let (read_ms, build_ms) = (read_at.ms_since(proof), self.clock.now().ms_since(read_at));
                tracing::info!(%revision, documents, revocations, read_ms, build_ms, "the full state was read");
                self.published(result);
                if self.follower.published() == Some(&revision) {
                    self.reporter.feed().replace(revision);
                    self.keeper.iter().for_each(|keeper| keeper.replace(at.clone()));
                }
            }
            Some(Action::Apply { commits, proof }) => {
                self.reporter.count(|counters| &counters.commits, commits.len() as u64);
                let result = self.publisher.apply(&commits, proof);
                self.published(result);
                self.tell(&commits);
                if let Some((keeper, stood)) = self.keeper.as_ref().zip(self.follower.stood()) {
                    keeper.apply(stood.clone(), commits);
                }
            }
            Some(Action::Refresh { proof }) => {
                self.publisher.refresh(proof);
                self.tell(&[]);
            }
            Some(Action::Quarantine { reason }) => {
                self.publisher.quarantine(&reason);
                self.reporter.count(|counters| &counters.quarantines, 1);
                tracing::error!(
                    reason,
                    "quarantined: everything is denied until this replica is restarted on the right store, or the store is adopted"
                );
            }
        }
        self.failed = self.follower.failures() > failures;
        if before == State::Quarantined && self.follower.state() != before {
            let revision = self.follower.published().map(ToString::to_string).unwrap_or_default();
            tracing::warn!(revision, "the store was adopted: what was known here is in it, and it is followed");
        }
        let (state, problem) = (self.follower.state(), self.follower.problem().unwrap_or_default());
        if state == State::Resync && before != State::Resync {
            self.reporter.count(|counters| &counters.resyncs, 1);
            tracing::warn!(problem, "out of step with the store: the full state is loaded again");
        } else if matches!(failed, Some(store::Error::Misconfigured(_))) && self.said.as_deref() != Some(problem) {
            tracing::error!(problem, "the store is not followed before its server is set up as it must be");
            self.said = Some(problem.to_owned());
        } else if self.follower.failures() == 1 && failures == 0 {
            tracing::warn!(problem, "the store is not followed; trying again");
        }
        self.show();
    }

    fn published(&mut self, result: Result<(), String>) {
        if let Err(problem) = &result {
            self.reporter.count(|counters| &counters.build_failures, 1);
            tracing::error!(problem, "the policy cannot be built; revocations go on being applied");
        }
        // `Published` never returns an action; it only changes the next request.
        let _ = self.follower.on(Event::Published(result));
    }

    /// Passes the applied commits to the readers of the feed.
    fn tell(&mut self, commits: &[CommitRow]) {
        let Some(now) = self.follower.published() else { return };
        if self.reporter.feed().newest().is_none() {
            // The first proved state, on top of a cached one. Its changes are not known row by row.
            return self.reporter.feed().replace(now.clone());
        }
        let history = now.history.clone();
        for commit in commits {
            if commit.changes.iter().any(|change| matches!(change, Change::Revocation(_))) {
                self.reporter.killed(commit.number, commit.unix_ms);
            }
            let revision = Revision { history: history.clone(), number: commit.number };
            self.reporter.feed().push(revision, commit.unix_ms, &commit.changes);
        }
        let oldest = commits.first().map(|commit| commit.unix_ms);
        self.behind_since_unix_ms = self.behind_since_unix_ms.or(oldest);
    }

    /// Reports the follower's progress through the status handle.
    fn show(&mut self) {
        if !self.follower.is_behind() {
            self.behind_since_unix_ms = None;
        }
        self.reporter.show(Progress {
            state: self.follower.state(),
            revision: self.follower.published().cloned(),
            policy: self.follower.policy(),
            proof: self.follower.proof(),
            problem: self.follower.problem().map(str::to_owned),
            place: self.follower.place().cloned(),
            behind_since_unix_ms: self.behind_since_unix_ms,
        });
    }

    /// Pauses until the next request. The pause is short while there is no failure, and a hint or a caller can end it early.
    async fn pause(&mut self, wake: &mut Wake, sent: Instant) {
        if self.follower.request() == Request::Adoption {
            let jitter = self.backoff.jitter(ADOPTION_JITTER_MS_MAX);
            return tokio::time::sleep(Duration::from_millis(ADOPTION_PAUSE_MS_MIN) + jitter).await;
        }
        if self.failed || active(Mutant::PauseAfterSuccess) && self.follower.failures() > 0 {
            // Nothing ends this pause early, because a failing store needs rest. A success between two failures is not delayed.
            return tokio::time::sleep(self.backoff.pause(self.follower.failures())).await;
        }
        match self.follower.request() {
            Request::Nothing | Request::Adoption | Request::Poll { at_once: true, .. } => {}
            Request::Load => tokio::time::sleep(self.backoff.jitter(self.settings.resync_jitter_ms_max)).await,
            Request::Poll { .. } => {
                let for_caller = async {
                    tokio::time::sleep_until(sent + self.callers_distance()).await;
                    // Await the caller's request last: this future may be dropped before, and the request must not be lost then.
                    self.reporter.polled_for_caller().await;
                };
                // The order matters: the first branch takes a request that comes just now, so it causes no second poll.
                tokio::select! {
                    biased;
                    () = self.reporter.polled() => {}
                    () = wake.woken() => {}
                    () = for_caller => {}
                    () = tokio::time::sleep(Duration::from_millis(self.settings.poll_interval_ms)) => {}
                }
            }
        }
    }
}

impl<P> Follow<P> {
    /// The distance that a poll caused by a caller keeps from the poll before it.
    fn callers_distance(&self) -> Duration {
        Duration::from_millis((self.settings.poll_interval_ms / 4).clamp(1, CALLERS_DISTANCE_MS_MAX))
    }
}

/// A query to the store.
#[derive(Clone, Copy)]
enum Asked {
    Load,
    Poll(u64),
    Adoption,
}

/// The store's hint of new commits. If its sender is dropped, it never fires again.
struct Wake(watch::Receiver<u64>);

impl Wake {
    fn new(receiver: watch::Receiver<u64>) -> Self {
        Self(receiver)
    }

    fn mark(&mut self) {
        self.0.mark_unchanged();
    }

    async fn woken(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn within<T>(timeout_ms: u64, answer: impl Future<Output = Result<T, store::Error>>) -> Result<T, store::Error> {
    tokio::time::timeout(Duration::from_millis(timeout_ms), answer)
        .await
        .unwrap_or_else(|_| Err(store::Error::Unavailable(format!("the store did not answer within {timeout_ms} ms"))))
}

fn counter_of(event: &Event) -> fn(&Counters) -> &std::sync::atomic::AtomicU64 {
    match event {
        Event::Loaded { .. } => |counters| &counters.loads,
        Event::LoadFailed(_) => |counters| &counters.load_failures,
        Event::Changes { .. } | Event::Published(_) | Event::Adoption { .. } => |counters| &counters.polls,
        Event::PollFailed(_) | Event::AdoptionFailed(_) => |counters| &counters.poll_failures,
    }
}
