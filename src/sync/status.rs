//! The handle through which other modules see the follower: its state, its progress, its counters, and waiting for a revision.
//!
//! The handle is cheap to clone. It never shows a revision before decisions read that revision. Look next at `run.rs`, which updates it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

pub mod feed;

use feed::Feed;

use super::follower::{Position, State};
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::Now;

/// Limit of the recorded revocation commits that are not acknowledged yet.
const KILLS_MAX: usize = 1024;
/// The timeout of [`Status::wait_for`] if the caller sets none.
pub const WAIT_MS_DEFAULT: u64 = 300;

/// The reason, in one line, why this replica does not serve a revision.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Behind {
    /// No full state was published yet.
    #[error("this replica has no snapshot yet: ask again")]
    NotReady,
    /// The revision belongs to a history that this replica does not follow.
    #[error("revision `{asked}` is of another history than `{history}`, which this replica follows")]
    OtherHistory {
        /// The requested revision.
        asked: Revision,
        /// The followed history.
        history: HistoryId,
    },
    /// The revision was not applied in time.
    #[error("revision `{asked}` is not applied here: revocations stand at {applied}, policy at {policy}")]
    NotYet {
        /// The requested revision.
        asked: Revision,
        /// The number of the last applied revision.
        applied: u64,
        /// The number of the revision whose policy is in force.
        policy: u64,
    },
    /// The replica is quarantined.
    #[error("this replica is quarantined: {reason}")]
    Quarantined {
        /// The reason of the quarantine.
        reason: String,
    },
}

/// Counters since the start of the process, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Polls that the store answered.
    pub polls: u64,
    /// Polls that failed or timed out.
    pub poll_failures: u64,
    /// Full states that were read.
    pub loads: u64,
    /// Loads that failed, timed out or were inconsistent.
    pub load_failures: u64,
    /// Commits that were applied.
    pub commits: u64,
    /// Resyncs: times that the follower could not continue from the change log.
    pub resyncs: u64,
    /// Revisions whose policy could not be built.
    pub build_failures: u64,
    /// Times that the replica was quarantined.
    pub quarantines: u64,
}

/// A handle of the follower. It is cheap to clone.
#[derive(Clone, Debug)]
pub struct Status {
    progress: watch::Receiver<Progress>,
    shared: Arc<Shared>,
}

impl Status {
    /// The state of the follower.
    pub fn state(&self) -> State {
        self.progress.borrow().state
    }

    /// Whether the replica is quarantined, so that every call is denied.
    pub fn is_quarantined(&self) -> bool {
        self.state() == State::Quarantined
    }

    /// The number of the last applied revision; 0 before the first.
    pub fn applied(&self) -> u64 {
        self.progress.borrow().number()
    }

    /// The number of the revision whose policy is in force. It is below [`Status::applied`] if a newer policy could not be built.
    pub fn policy(&self) -> u64 {
        self.progress.borrow().policy
    }

    /// The followed history; `None` before the first full state.
    pub fn history(&self) -> Option<HistoryId> {
        self.progress.borrow().revision.as_ref().map(|revision| revision.history.clone())
    }

    /// The proof of the published state: the time at which its poll was sent. `None` before the first full state.
    pub fn proof(&self) -> Option<Now> {
        self.progress.borrow().proof
    }

    /// The newest problem in one line; `None` if there is none.
    pub fn problem(&self) -> Option<String> {
        self.progress.borrow().problem.clone()
    }

    /// The position of the published state; `None` before the first full state and in quarantine.
    pub fn place(&self) -> Option<Position> {
        self.progress.borrow().place.clone()
    }

    /// The commit time, by the store's clock, of the oldest known commit that is not in effect; `None` if all are in effect.
    pub fn behind_since_unix_ms(&self) -> Option<i64> {
        self.progress.borrow().behind_since_unix_ms
    }

    /// The feed of applied revisions, for readers of revocations.
    pub fn feed(&self) -> &Feed {
        &self.shared.feed
    }

    /// Returns a receiver that reports each change of the state, the revision or the policy in force.
    pub fn changes(&self) -> Changes {
        let mut progress = self.progress.clone();
        // The caller reads the current value itself, so only later changes count.
        progress.mark_unchanged();
        Changes(progress)
    }

    /// Takes the commit times of the revocation commits up to a number. Each commit time is returned once.
    pub(super) fn take_kills(&self, number: u64) -> Vec<i64> {
        let mut kills = self.shared.kills.lock().unwrap_or_else(PoisonError::into_inner);
        let count = kills.partition_point(|(of, _)| *of <= number);
        kills.drain(..count).map(|(_, unix_ms)| unix_ms).collect()
    }

    /// The counters since the start of the process.
    pub fn counts(&self) -> Counts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        Counts {
            polls: load(&counters.polls),
            poll_failures: load(&counters.poll_failures),
            loads: load(&counters.loads),
            load_failures: load(&counters.load_failures),
            commits: load(&counters.commits),
            resyncs: load(&counters.resyncs),
            build_failures: load(&counters.build_failures),
            quarantines: load(&counters.quarantines),
        }
    }

    /// Requests a poll because a caller waits. Any number of callers cause one poll. These polls keep a distance from the poll
    /// before, so that callers cannot make a replica query its store without a pause.
    pub fn poll_for_caller(&self) {
        self.shared.poll_for_caller.notify_one();
    }

    /// Requests a poll at once. Any number of requests cause one poll. The pause after a failure still applies.
    pub fn poll_now(&self) {
        self.shared.poll.notify_one();
    }

    /// Waits until a full snapshot is published and returns `true`. Returns `false` if the follower ends or is quarantined before.
    pub async fn ready(&self) -> bool {
        let mut progress = self.progress.clone();
        let decided = progress.wait_for(|progress| progress.revision.is_some() || progress.state == State::Quarantined).await;
        decided.is_ok_and(|progress| progress.revision.is_some())
    }

    /// Waits until a store is followed, also after a quarantine, and returns `true`. Returns `false` if the follower ends before.
    pub async fn followed(&self) -> bool {
        let mut progress = self.progress.clone();
        let decided = progress.wait_for(|progress| progress.revision.is_some() && progress.state != State::Quarantined).await;
        decided.is_ok()
    }

    /// Waits until a revision is applied, even if its policy cannot be built.
    #[cfg(test)]
    pub(super) async fn reached(&mut self, number: u64) {
        self.progress.wait_for(|progress| progress.number() >= number).await.unwrap();
    }

    /// Waits until decisions read a revision, its policy included. Requests a poll if they do not read it yet.
    ///
    /// # Errors
    /// [`Behind`] if the revision is not served within `timeout`, or can never be. [`WAIT_MS_DEFAULT`] is the usual timeout.
    pub async fn wait_for(&self, asked: &Revision, timeout: Duration) -> Result<(), Behind> {
        let mut progress = self.progress.clone();
        if let Some(answer) = progress.borrow_and_update().served(asked) {
            return answer;
        }
        self.poll_for_caller();
        let waited = tokio::time::timeout(timeout, progress.wait_for(|progress| progress.served(asked).is_some())).await;
        match waited {
            Ok(Ok(progress)) => progress.served(asked).unwrap_or_else(|| Err(progress.behind(asked))),
            Ok(Err(_)) | Err(_) => Err(self.progress.borrow().behind(asked)),
        }
    }
}

/// Reports each change of a follower's progress.
#[derive(Clone, Debug)]
pub struct Changes(watch::Receiver<Progress>);

impl Changes {
    /// Waits for the next change.
    ///
    /// # Errors
    /// [`Ended`] if the follower has ended, so that no further change comes.
    pub async fn changed(&mut self) -> Result<(), Ended> {
        self.0.changed().await.map_err(|_| Ended)
    }
}

/// The follower has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this replica follows the store no longer")]
pub struct Ended;

/// The writing end of a [`Status`].
#[derive(Debug)]
pub(super) struct Reporter {
    progress: watch::Sender<Progress>,
    shared: Arc<Shared>,
}

impl Reporter {
    /// Creates a reporter and the handle that reads it.
    pub(super) fn new() -> (Self, Status) {
        let (sender, progress) = watch::channel(Progress::default());
        let shared = Arc::new(Shared::default());
        (Self { progress: sender, shared: shared.clone() }, Status { progress, shared })
    }

    /// Shows the progress of the follower. It wakes waiters only if a value that they wait for has changed.
    pub(super) fn show(&self, next: Progress) {
        let history = |progress: &Progress| progress.revision.as_ref().map(|revision| revision.history.clone());
        if history(&next) != history(&self.progress.borrow()) {
            // The recorded numbers belong to another history.
            self.shared.kills.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        self.progress.send_if_modified(|progress| {
            let Progress { proof, problem, behind_since_unix_ms, .. } = progress.clone();
            let quiet = Progress { proof, problem, behind_since_unix_ms, ..next.clone() } == *progress;
            *progress = next;
            !quiet
        });
    }

    /// The feed of applied revisions.
    pub(super) fn feed(&self) -> &Feed {
        &self.shared.feed
    }

    /// Records the commit time of an applied commit that revokes something.
    pub(super) fn killed(&self, number: u64, unix_ms: i64) {
        let mut kills = self.shared.kills.lock().unwrap_or_else(PoisonError::into_inner);
        if kills.len() < KILLS_MAX {
            kills.push_back((number, unix_ms));
        }
    }

    /// Adds to a counter.
    pub(super) fn count(&self, counter: fn(&Counters) -> &AtomicU64, by: u64) {
        counter(&self.shared.counters).fetch_add(by, Ordering::Relaxed);
    }

    /// Waits until a poll is requested.
    pub(super) async fn polled(&self) {
        self.shared.poll.notified().await;
    }

    /// Waits until a caller requests a poll.
    pub(super) async fn polled_for_caller(&self) {
        self.shared.poll_for_caller.notified().await;
    }
}

/// The progress of the follower.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) state: State,
    pub(super) revision: Option<Revision>,
    pub(super) policy: u64,
    pub(super) proof: Option<Now>,
    pub(super) problem: Option<String>,
    pub(super) place: Option<Position>,
    pub(super) behind_since_unix_ms: Option<i64>,
}

impl Progress {
    fn number(&self) -> u64 {
        self.revision.as_ref().map_or(0, |revision| revision.number)
    }

    /// The answer to a waiter, if waiting longer cannot improve it; otherwise `None`.
    fn served(&self, asked: &Revision) -> Option<Result<(), Behind>> {
        let applied = self.revision.as_ref()?;
        if self.state == State::Quarantined || applied.history != asked.history {
            return Some(Err(self.behind(asked)));
        }
        (applied.number >= asked.number && self.policy >= asked.number).then_some(Ok(()))
    }

    fn behind(&self, asked: &Revision) -> Behind {
        let asked = asked.clone();
        match &self.revision {
            _ if self.state == State::Quarantined => Behind::Quarantined { reason: self.problem.clone().unwrap_or_default() },
            None => Behind::NotReady,
            Some(applied) if applied.history != asked.history => Behind::OtherHistory { asked, history: applied.history.clone() },
            Some(applied) => Behind::NotYet { asked, applied: applied.number, policy: self.policy },
        }
    }
}

/// The state that all clones of the handle share with the reporter.
#[derive(Debug, Default)]
struct Shared {
    poll: Notify,
    poll_for_caller: Notify,
    feed: Feed,
    kills: Mutex<VecDeque<(u64, i64)>>,
    counters: Counters,
}

/// The atomic counters behind [`Counts`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) polls: AtomicU64,
    pub(super) poll_failures: AtomicU64,
    pub(super) loads: AtomicU64,
    pub(super) load_failures: AtomicU64,
    pub(super) commits: AtomicU64,
    pub(super) resyncs: AtomicU64,
    pub(super) build_failures: AtomicU64,
    pub(super) quarantines: AtomicU64,
}
