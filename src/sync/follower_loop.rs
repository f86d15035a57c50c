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

use super::SnapshotPublisher;
use super::backoff::RetryBackoff;
use super::cache_writer::CacheWriter;
use super::follower::{AdoptedStore, Follower, FollowerAction, FollowerEvent, FollowerRequest, FollowerState, HistoryPosition};
use super::status::{FollowerCounters, FollowerHandle, FollowerProgress, ProgressReporter};
use crate::model::mutant::{Mutant, is_active};
use crate::model::revision::Revision;
use crate::model::rows::RowChange;
use crate::model::time::{Clock, ClockReading};
use crate::store::{self, ChangeLogPage, CommitRow};

/// The store as a follower uses it. [`super::FleetMember`] implements it: its answers prove that they were current when the query
/// was sent.
#[async_trait]
pub trait ChangeSource: Send + Sync {
    /// Loads the full state. See [`store::Store::load_for_replica`].
    ///
    /// # Errors
    /// As [`store::Store::load_for_replica`].
    async fn load(&self) -> Result<store::StoreState, store::Error>;

    /// Polls for the changes after a number. See [`store::Store::poll_changes`].
    ///
    /// # Errors
    /// As [`store::Store::poll_changes`].
    async fn changes(&self, after: u64) -> Result<ChangeLogPage, store::Error>;

    /// Asks whether the store was adopted from the history of `last_position`. If so, it first merges the revocations that this
    /// replica knew. Returns `None` if the store was not adopted from that history.
    ///
    /// # Errors
    /// If the store cannot answer, or if the known revocations cannot be merged.
    async fn find_adoption(&self, _last_position: &HistoryPosition) -> Result<Option<AdoptedStore>, store::Error> {
        Ok(None)
    }

    /// Returns the store's hint of new commits. See [`store::Store::subscribe_commits`].
    fn subscribe_commits(&self) -> watch::Receiver<u64>;
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
pub struct FollowerLoop<P> {
    source: Box<dyn ChangeSource>,
    publisher: P,
    clock: Arc<dyn Clock>,
    settings: Settings,
    follower: Follower,
    reporter: ProgressReporter,
    backoff: RetryBackoff,
    /// Whether the last event was a failure.
    last_event_failed: bool,
    behind_since_unix_ms: Option<i64>,
    cache_writer: Option<Arc<CacheWriter>>,
    /// The last problem of the store server's configuration that was logged.
    last_logged_problem: Option<String>,
}

/// Shortest pause between two checks whether the store was adopted. An operator makes an adoption, and the whole fleet asks for it.
const ADOPTION_PAUSE_MS_MIN: u64 = 600;
const ADOPTION_JITTER_MS_MAX: u64 = 600;
/// Upper limit of the shortest interval between a poll for a caller and the poll before it. Below it, that interval is a quarter
/// of the poll interval.
const CALLER_POLL_MIN_INTERVAL_MS_MAX: u64 = 25;

impl<P: SnapshotPublisher> FollowerLoop<P> {
    /// Creates a follower, and the handle through which other modules see it. `recorded_position` is as in [`Follower::new`].
    pub fn new(
        source: impl ChangeSource + 'static,
        publisher: P,
        clock: Arc<dyn Clock>,
        settings: Settings,
        recorded_position: Option<HistoryPosition>,
    ) -> (Self, FollowerHandle) {
        let (reporter, status) = ProgressReporter::new();
        let seed = settings.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        let backoff = RetryBackoff::new(settings.backoff_ms_min, settings.backoff_ms_max, seed);
        let follower = Follower::new(recorded_position.filter(|_| !is_active(Mutant::ForgetKnownPosition)));
        (
            Self {
                source: Box::new(source),
                publisher,
                clock,
                settings,
                follower,
                reporter,
                backoff,
                last_event_failed: false,
                behind_since_unix_ms: None,
                cache_writer: None,
                last_logged_problem: None,
            },
            status,
        )
    }

    /// Writes each published state to the disk cache as well.
    #[must_use]
    pub fn with_cache_writer(self, cache_writer: Arc<CacheWriter>) -> Self {
        Self { cache_writer: Some(cache_writer), ..self }
    }

    /// Publishes the state of the disk cache, which denies every call until the store is reached. `recorded_position` is as in
    /// [`Follower::new`].
    ///
    /// # Errors
    /// If the policy of the cached state cannot be built. Nothing is published then.
    pub fn start_from_cache(
        mut self,
        cached: store::StoreState,
        recorded_position: Option<HistoryPosition>,
    ) -> Result<Self, String> {
        let position = HistoryPosition { revision: cached.revision.clone(), hash: cached.hash };
        self.publisher.publish_cached_state(cached)?;
        self.follower = Follower::from_cache(position, recorded_position);
        Ok(self)
    }

    /// Starts in quarantine. It follows nothing until the store is adopted from the history of `last_position`.
    #[must_use]
    pub fn start_in_quarantine(mut self, last_position: HistoryPosition, reason: String) -> Self {
        self.follower = Follower::in_quarantine(last_position, reason);
        self.report_progress();
        self
    }

    /// Follows the store until `shutdown` turns true or its sender is dropped. The published state then stays and ages.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut stop = std::pin::pin!(async move {
            // An error means that the sender is dropped, so nothing could stop this loop later.
            let _ = shutdown.wait_for(|stop| *stop).await;
        });
        let mut wake = WakeHint::new(self.source.subscribe_commits());
        loop {
            let asked = match self.follower.next_request() {
                FollowerRequest::Load => StoreQuery::Load,
                FollowerRequest::Poll { after, .. } => StoreQuery::Poll(after),
                FollowerRequest::Adoption => StoreQuery::Adoption,
                FollowerRequest::Nothing => {
                    // Quarantined before anything was followed: there is nothing to wait for, but the status must stay readable.
                    stop.await;
                    return;
                }
            };
            // Mark the hint as seen before the query is sent, so that a later commit wakes this loop again.
            wake.mark_seen();
            let sent = Instant::now();
            let event = tokio::select! {
                () = &mut stop => return,
                event = self.query_store(asked) => event,
            };
            self.handle_event(event);
            tokio::select! {
                () = &mut stop => return,
                () = self.pause_before_request(&mut wake, sent) => {}
            }
        }
    }

    /// Sends a query to the store and returns the answer as an event.
    async fn query_store(&self, asked: StoreQuery) -> FollowerEvent {
        let sent_at = self.clock.now();
        match asked {
            StoreQuery::Load => match with_timeout(self.settings.load_timeout_ms, self.source.load()).await {
                Ok(state) => FollowerEvent::Loaded { sent_at: self.proof_of_answer(sent_at), state: Box::new(state) },
                Err(error) => FollowerEvent::LoadFailed(error),
            },
            StoreQuery::Poll(after) => match with_timeout(self.settings.poll_timeout_ms, self.source.changes(after)).await {
                Ok(changes) => FollowerEvent::Changes { sent_at: self.proof_of_answer(sent_at), changes },
                Err(error) => FollowerEvent::PollFailed(error),
            },
            StoreQuery::Adoption => {
                let asked = async {
                    match self.follower.last_position() {
                        Some(last_position) => self.source.find_adoption(last_position).await,
                        None => Ok(None),
                    }
                };
                match with_timeout(self.settings.load_timeout_ms, asked).await {
                    Ok(adopted) => {
                        FollowerEvent::Adoption { sent_at: self.proof_of_answer(sent_at), adopted: adopted.map(Box::new) }
                    }
                    Err(error) => FollowerEvent::AdoptionFailed(error),
                }
            }
        }
    }

    /// The time that an answer proves: the time at which its query was sent, not the time of its arrival.
    fn proof_of_answer(&self, sent_at: ClockReading) -> ClockReading {
        if is_active(Mutant::ArrivalTime) { self.clock.now() } else { sent_at }
    }

    /// Hands an event to the follower, carries out the action, and reports the progress.
    fn handle_event(&mut self, event: FollowerEvent) {
        self.reporter.add_count(event_counter(&event), 1);
        let before = self.follower.state();
        let failures = self.follower.consecutive_failures();
        let failed = match &event {
            FollowerEvent::PollFailed(error) | FollowerEvent::LoadFailed(error) => Some(error.clone()),
            _ => None,
        };
        if is_active(Mutant::RenewOnFailure) && matches!(event, FollowerEvent::PollFailed(_)) {
            self.publisher.renew_proof(self.clock.now());
        }
        match self.follower.handle_event(event) {
            None => {}
            Some(FollowerAction::PublishFullState { state, proof }) => {
                let revision = state.revision.clone();
                let (documents, revocations, read_at) = (state.documents.len(), state.revocations.len(), self.clock.now());
                let at = HistoryPosition { revision: revision.clone(), hash: state.hash };
                let result = self.publisher.publish_state(*state, proof);
                let (read_ms, build_ms) = (read_at.elapsed_ms_since(proof), self.clock.now().elapsed_ms_since(read_at));
                tracing::info!(%revision, documents, revocations, read_ms, build_ms, "the full state was read");
                self.record_published(result);
                if self.follower.published_revision() == Some(&revision) {
                    self.reporter.revocation_feed().replace(revision);
                    self.cache_writer.iter().for_each(|cache_writer| cache_writer.enqueue_state(at.clone()));
                }
            }
            Some(FollowerAction::Apply { commits, proof }) => {
                self.reporter.add_count(|counters| &counters.commits, commits.len() as u64);
                let result = self.publisher.publish_commits(&commits, proof);
                self.record_published(result);
                self.feed_applied_commits(&commits);
                if let Some((cache_writer, last_position)) = self.cache_writer.as_ref().zip(self.follower.last_position()) {
                    cache_writer.enqueue_commits(last_position.clone(), commits);
                }
            }
            Some(FollowerAction::Refresh { proof }) => {
                self.publisher.renew_proof(proof);
                self.feed_applied_commits(&[]);
            }
            Some(FollowerAction::Quarantine { reason }) => {
                self.publisher.quarantine(&reason);
                self.reporter.add_count(|counters| &counters.quarantines, 1);
                tracing::error!(
                    reason,
                    "quarantined: everything is denied until this replica is restarted on the right store, or the store is adopted"
                );
            }
        }
        self.last_event_failed = self.follower.consecutive_failures() > failures;
        if before == FollowerState::Quarantined && self.follower.state() != before {
            let revision = self.follower.published_revision().map(ToString::to_string).unwrap_or_default();
            tracing::warn!(revision, "the store was adopted: what was known here is in it, and it is followed");
        }
        let (state, problem) = (self.follower.state(), self.follower.problem().unwrap_or_default());
        if state == FollowerState::Resync && before != FollowerState::Resync {
            self.reporter.add_count(|counters| &counters.resyncs, 1);
            tracing::warn!(problem, "out of step with the store: the full state is loaded again");
        } else if matches!(failed, Some(store::Error::Misconfigured(_))) && self.last_logged_problem.as_deref() != Some(problem) {
            tracing::error!(problem, "the store is not followed before its server is set up as it must be");
            self.last_logged_problem = Some(problem.to_owned());
        } else if self.follower.consecutive_failures() == 1 && failures == 0 {
            tracing::warn!(problem, "the store is not followed; trying again");
        }
        self.report_progress();
    }

    fn record_published(&mut self, result: Result<(), String>) {
        if let Err(problem) = &result {
            self.reporter.add_count(|counters| &counters.build_failures, 1);
            tracing::error!(problem, "the policy cannot be built; revocations go on being applied");
        }
        // `Published` never returns an action; it only changes the next request.
        let _ = self.follower.handle_event(FollowerEvent::Published(result));
    }

    /// Passes the applied commits to the readers of the feed.
    fn feed_applied_commits(&mut self, commits: &[CommitRow]) {
        let Some(now) = self.follower.published_revision() else { return };
        if self.reporter.revocation_feed().newest().is_none() {
            // The first proved state, on top of a cached one. Its changes are not known row by row.
            return self.reporter.revocation_feed().replace(now.clone());
        }
        let history = now.history.clone();
        for commit in commits {
            if commit.changes.iter().any(|change| matches!(change, RowChange::Revocation(_))) {
                self.reporter.record_revocation_commit(commit.number, commit.unix_ms);
            }
            let revision = Revision { history: history.clone(), number: commit.number };
            self.reporter.revocation_feed().push(revision, commit.unix_ms, &commit.changes);
        }
        let oldest = commits.first().map(|commit| commit.unix_ms);
        self.behind_since_unix_ms = self.behind_since_unix_ms.or(oldest);
    }

    /// Reports the follower's progress through the status handle.
    fn report_progress(&mut self) {
        if !self.follower.is_behind() {
            self.behind_since_unix_ms = None;
        }
        self.reporter.report_progress(FollowerProgress {
            state: self.follower.state(),
            revision: self.follower.published_revision().cloned(),
            policy_number: self.follower.policy_number(),
            proof: self.follower.freshness_proof(),
            problem: self.follower.problem().map(str::to_owned),
            position: self.follower.followed_position().cloned(),
            behind_since_unix_ms: self.behind_since_unix_ms,
        });
    }

    /// Pauses until the next request. The pause is short while there is no failure, and a hint or a caller can end it early.
    async fn pause_before_request(&mut self, wake: &mut WakeHint, sent: Instant) {
        if self.follower.next_request() == FollowerRequest::Adoption {
            let jitter = self.backoff.jitter(ADOPTION_JITTER_MS_MAX);
            return tokio::time::sleep(Duration::from_millis(ADOPTION_PAUSE_MS_MIN) + jitter).await;
        }
        if self.last_event_failed || is_active(Mutant::PauseAfterSuccess) && self.follower.consecutive_failures() > 0 {
            // Nothing ends this pause early, because a failing store needs rest. A success between two failures is not delayed.
            return tokio::time::sleep(self.backoff.next_pause(self.follower.consecutive_failures())).await;
        }
        match self.follower.next_request() {
            FollowerRequest::Nothing | FollowerRequest::Adoption | FollowerRequest::Poll { at_once: true, .. } => {}
            FollowerRequest::Load => tokio::time::sleep(self.backoff.jitter(self.settings.resync_jitter_ms_max)).await,
            FollowerRequest::Poll { .. } => {
                let for_caller = async {
                    tokio::time::sleep_until(sent + self.caller_poll_min_interval()).await;
                    // Await the caller's request last: this future may be dropped before, and the request must not be lost then.
                    self.reporter.caller_poll_requested().await;
                };
                // The order matters: the first branch takes a request that comes just now, so it causes no second poll.
                tokio::select! {
                    biased;
                    () = self.reporter.poll_requested() => {}
                    () = wake.wait_for_wake() => {}
                    () = for_caller => {}
                    () = tokio::time::sleep(Duration::from_millis(self.settings.poll_interval_ms)) => {}
                }
            }
        }
    }
}

impl<P> FollowerLoop<P> {
    /// The shortest interval between a poll for a caller and the poll before it.
    fn caller_poll_min_interval(&self) -> Duration {
        Duration::from_millis((self.settings.poll_interval_ms / 4).clamp(1, CALLER_POLL_MIN_INTERVAL_MS_MAX))
    }
}

/// A query to the store.
#[derive(Clone, Copy)]
enum StoreQuery {
    Load,
    Poll(u64),
    Adoption,
}

/// The store's hint of new commits. If its sender is dropped, it never fires again.
struct WakeHint(watch::Receiver<u64>);

impl WakeHint {
    fn new(receiver: watch::Receiver<u64>) -> Self {
        Self(receiver)
    }

    fn mark_seen(&mut self) {
        self.0.mark_unchanged();
    }

    async fn wait_for_wake(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn with_timeout<T>(timeout_ms: u64, answer: impl Future<Output = Result<T, store::Error>>) -> Result<T, store::Error> {
    tokio::time::timeout(Duration::from_millis(timeout_ms), answer)
        .await
        .unwrap_or_else(|_| Err(store::Error::Unavailable(format!("the store did not answer within {timeout_ms} ms"))))
}

fn event_counter(event: &FollowerEvent) -> fn(&FollowerCounters) -> &std::sync::atomic::AtomicU64 {
    match event {
        FollowerEvent::Loaded { .. } => |counters| &counters.loads,
        FollowerEvent::LoadFailed(_) => |counters| &counters.load_failures,
        FollowerEvent::Changes { .. } | FollowerEvent::Published(_) | FollowerEvent::Adoption { .. } => {
            |counters| &counters.polls
        }
        FollowerEvent::PollFailed(_) | FollowerEvent::AdoptionFailed(_) => |counters| &counters.poll_failures,
    }
}
