//! What others may know of the follower: its state, how far it is, its counters, and how to wait for a revision.
//!
//! A handle that is cheap to clone. It never shows a revision before decisions read it. Look next at `run.rs`, which feeds it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

pub mod feed;

use feed::Feed;

use super::follower::Position;
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::Now;

/// Commits of revocations whose acknowledgement is still to come, at most.
const KILLS_MAX: usize = 1024;
/// How long [`Status::wait_for`] waits unless told otherwise.
pub const WAIT_MS_DEFAULT: u64 = 300;

/// What a replica does about its store. How old its proof is stands beside the snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Nothing was published yet.
    #[default]
    Bootstrapping,
    /// What is published follows the store.
    Following,
    /// What is published stays, its proof frozen, until a full state replaces it.
    Resync,
    /// The store is not the one that was followed: deny only.
    Quarantined,
}

impl State {
    /// The name, as in status and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Bootstrapping => "bootstrapping",
            State::Following => "following",
            State::Resync => "resync",
            State::Quarantined => "quarantined",
        }
    }
}

/// Why a revision is not served here. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Behind {
    /// No full state was published yet.
    #[error("this replica has no snapshot yet: ask again")]
    NotReady,
    /// The revision belongs to a history that this replica does not follow.
    #[error("revision `{asked}` is of another history than `{history}`, which this replica follows")]
    OtherHistory {
        /// What was asked for.
        asked: Revision,
        /// What is followed.
        history: HistoryId,
    },
    /// It was not applied in time.
    #[error("revision `{asked}` is not applied here: revocations stand at {applied}, policy at {policy}")]
    NotYet {
        /// What was asked for.
        asked: Revision,
        /// Applied number.
        applied: u64,
        /// Number whose policy is in force.
        policy: u64,
    },
    /// The replica is quarantined.
    #[error("this replica is quarantined: {reason}")]
    Quarantined {
        /// Why.
        reason: String,
    },
}

/// Counters since the start, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Polls that were answered.
    pub polls: u64,
    /// Polls that failed or took too long.
    pub poll_failures: u64,
    /// Full states that were read.
    pub loads: u64,
    /// Loads that failed, took too long or did not hold together.
    pub load_failures: u64,
    /// Commits applied.
    pub commits: u64,
    /// Times the follower fell out of step with the log.
    pub resyncs: u64,
    /// Revisions whose policy could not be built.
    pub build_failures: u64,
    /// 1 once quarantined.
    pub quarantines: u64,
}

/// A handle on the follower.
#[derive(Clone, Debug)]
pub struct Status {
    progress: watch::Receiver<Progress>,
    shared: Arc<Shared>,
}

impl Status {
    /// What the follower does.
    pub fn state(&self) -> State {
        self.progress.borrow().state
    }

    /// Number of the last revision applied; 0 before the first.
    pub fn applied(&self) -> u64 {
        self.progress.borrow().number()
    }

    /// Number of the revision whose policy is in force: below [`Status::applied`] where a newer one could not be built.
    pub fn policy(&self) -> u64 {
        self.progress.borrow().policy
    }

    /// The history that is followed; `None` before the first full state.
    pub fn history(&self) -> Option<HistoryId> {
        self.progress.borrow().revision.as_ref().map(|revision| revision.history.clone())
    }

    /// When the poll was sent that proves what is published; `None` before the first full state.
    pub fn proof(&self) -> Option<Now> {
        self.progress.borrow().proof
    }

    /// The newest trouble, in one line; `None` while all is well.
    pub fn problem(&self) -> Option<String> {
        self.progress.borrow().problem.clone()
    }

    /// The place in the history that is published; `None` before the first full state, and in quarantine.
    pub fn place(&self) -> Option<Position> {
        self.progress.borrow().place.clone()
    }

    /// When the oldest commit was made, by the store's clock, that is known and not in effect; `None` while all are.
    pub fn behind_since_unix_ms(&self) -> Option<i64> {
        self.progress.borrow().behind_since_unix_ms
    }

    /// What was applied, for whoever wants to hear of revocations.
    pub fn feed(&self) -> &Feed {
        &self.shared.feed
    }

    /// Turns up whenever the state, the revision or the policy in force changes.
    pub fn changes(&self) -> Changes {
        let mut progress = self.progress.clone();
        // What is there now counts as seen by who asks after it now.
        progress.mark_unchanged();
        Changes(progress)
    }

    /// Commit times of the revocations up to a number that were not taken yet.
    pub(super) fn take_kills(&self, number: u64) -> Vec<i64> {
        let mut kills = self.shared.kills.lock().unwrap_or_else(PoisonError::into_inner);
        let count = kills.partition_point(|(of, _)| *of <= number);
        kills.drain(..count).map(|(_, unix_ms)| unix_ms).collect()
    }

    /// Counters since the start.
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

    /// Has the store polled soon, because a caller waits; any number of callers cost one poll. Such polls keep a distance from the poll
    /// before, so that no caller can make a replica ask its store without pause.
    pub fn poll_for_caller(&self) {
        self.shared.poll_for_caller.notify_one();
    }

    /// Has the store polled at once; any number of callers cost one poll. A failing store is left its pause all the same.
    pub fn poll_now(&self) {
        self.shared.poll.notify_one();
    }

    /// Returns `true` once a full snapshot is published, `false` if the follower ended or was quarantined before.
    pub async fn ready(&self) -> bool {
        let mut progress = self.progress.clone();
        let decided = progress.wait_for(|progress| progress.revision.is_some() || progress.state == State::Quarantined).await;
        decided.is_ok_and(|progress| progress.revision.is_some())
    }

    /// Returns `true` once a store is followed, also out of quarantine; `false` if the follower ended before.
    pub async fn followed(&self) -> bool {
        let mut progress = self.progress.clone();
        let decided = progress.wait_for(|progress| progress.revision.is_some() && progress.state != State::Quarantined).await;
        decided.is_ok()
    }

    /// Returns once that many revisions are applied, whatever became of their policy.
    #[cfg(test)]
    pub(super) async fn reached(&mut self, number: u64) {
        self.progress.wait_for(|progress| progress.number() >= number).await.unwrap();
    }

    /// Waits until a revision, its policy included, is what decisions read; has the store polled if it is not.
    ///
    /// # Errors
    /// [`Behind`] if it is not within `timeout` ([`WAIT_MS_DEFAULT`] where the caller has no wish), or cannot be.
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

/// Says when there is something new to see of a follower.
#[derive(Clone, Debug)]
pub struct Changes(watch::Receiver<Progress>);

impl Changes {
    /// Returns after the next change.
    ///
    /// # Errors
    /// [`Ended`]: there will be none.
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
    /// A reporter and the handle that reads it.
    pub(super) fn new() -> (Self, Status) {
        let (sender, progress) = watch::channel(Progress::default());
        let shared = Arc::new(Shared::default());
        (Self { progress: sender, shared: shared.clone() }, Status { progress, shared })
    }

    /// Shows where the follower is; wakes waiters only if that changed for them.
    pub(super) fn show(&self, next: Progress) {
        let history = |progress: &Progress| progress.revision.as_ref().map(|revision| revision.history.clone());
        if history(&next) != history(&self.progress.borrow()) {
            // Numbers of another history.
            self.shared.kills.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        self.progress.send_if_modified(|progress| {
            let Progress { proof, problem, behind_since_unix_ms, .. } = progress.clone();
            let quiet = Progress { proof, problem, behind_since_unix_ms, ..next.clone() } == *progress;
            *progress = next;
            !quiet
        });
    }

    /// What was applied, for readers.
    pub(super) fn feed(&self) -> &Feed {
        &self.shared.feed
    }

    /// A commit that revokes was applied.
    pub(super) fn killed(&self, number: u64, unix_ms: i64) {
        let mut kills = self.shared.kills.lock().unwrap_or_else(PoisonError::into_inner);
        if kills.len() < KILLS_MAX {
            kills.push_back((number, unix_ms));
        }
    }

    /// Counts one.
    pub(super) fn count(&self, counter: fn(&Counters) -> &AtomicU64, by: u64) {
        counter(&self.shared.counters).fetch_add(by, Ordering::Relaxed);
    }

    /// Resolves when somebody wants a poll at once.
    pub(super) async fn polled(&self) {
        self.shared.poll.notified().await;
    }

    /// Resolves when a caller waits for a poll.
    pub(super) async fn polled_for_caller(&self) {
        self.shared.poll_for_caller.notified().await;
    }
}

/// Where the follower is.
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

    /// The answer, where waiting cannot change it for the better.
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

#[derive(Debug, Default)]
struct Shared {
    poll: Notify,
    poll_for_caller: Notify,
    feed: Feed,
    kills: Mutex<VecDeque<(u64, i64)>>,
    counters: Counters,
}

/// The counters behind [`Counts`].
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
