//! The handle through which other modules see the follower: its state, its progress, its counters, and waiting for a revision.
//!
//! The handle is cheap to clone. It never shows a revision before decisions read that revision. Look next at `follower_loop.rs`, which updates it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

pub mod revocation_feed;

use revocation_feed::RevocationFeed;

use super::follower::{FollowerState, HistoryPosition};
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::ClockReading;

/// Limit of the recorded revocation commits that are not acknowledged yet.
const PENDING_REVOCATIONS_MAX: usize = 1024;
/// The timeout of [`FollowerHandle::wait_for_revision`] if the caller sets none.
pub const WAIT_MS_DEFAULT: u64 = 300;

/// The reason, in one line, why this replica does not serve a revision.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevisionUnavailable {
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
    NotApplied {
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
pub struct FollowerCounts {
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
pub struct FollowerHandle {
    progress: watch::Receiver<FollowerProgress>,
    shared: Arc<SharedStatus>,
}

impl FollowerHandle {
    /// The state of the follower.
    pub fn state(&self) -> FollowerState {
        self.progress.borrow().state
    }

    /// Whether the replica is quarantined, so that every call is denied.
    pub fn is_quarantined(&self) -> bool {
        self.state() == FollowerState::Quarantined
    }

    /// The number of the last applied revision; 0 before the first.
    pub fn applied_number(&self) -> u64 {
        self.progress.borrow().applied_number()
    }

    /// The number of the revision whose policy is in force. It is below [`FollowerHandle::applied_number`] if a newer policy
    /// could not be built.
    pub fn policy_number(&self) -> u64 {
        self.progress.borrow().policy_number
    }

    /// The followed history; `None` before the first full state.
    pub fn history(&self) -> Option<HistoryId> {
        self.progress.borrow().revision.as_ref().map(|revision| revision.history.clone())
    }

    /// The proof of the published state: the time at which its poll was sent. `None` before the first full state.
    pub fn freshness_proof(&self) -> Option<ClockReading> {
        self.progress.borrow().proof
    }

    /// The newest problem in one line; `None` if there is none.
    pub fn problem(&self) -> Option<String> {
        self.progress.borrow().problem.clone()
    }

    /// The position of the published state; `None` before the first full state and in quarantine.
    pub fn position(&self) -> Option<HistoryPosition> {
        self.progress.borrow().position.clone()
    }

    /// The commit time, by the store's clock, of the oldest known commit that is not in effect; `None` if all are in effect.
    pub fn behind_since_unix_ms(&self) -> Option<i64> {
        self.progress.borrow().behind_since_unix_ms
    }

    /// The feed of applied revisions, for readers of revocations.
    pub fn revocation_feed(&self) -> &RevocationFeed {
        &self.shared.revocation_feed
    }

    /// Returns a receiver that reports each change of the state, the revision or the policy in force.
    pub fn subscribe(&self) -> ProgressReceiver {
        let mut progress = self.progress.clone();
        // The caller reads the current value itself, so only later changes count.
        progress.mark_unchanged();
        ProgressReceiver(progress)
    }

    /// Takes the commit times of the revocation commits up to a number. Each commit time is returned once.
    pub(super) fn take_revocation_times(&self, number: u64) -> Vec<i64> {
        let mut pending_revocations = self.shared.unacknowledged_revocations.lock().unwrap_or_else(PoisonError::into_inner);
        let count = pending_revocations.partition_point(|(of, _)| *of <= number);
        pending_revocations.drain(..count).map(|(_, unix_ms)| unix_ms).collect()
    }

    /// The counters since the start of the process.
    pub fn counts(&self) -> FollowerCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        FollowerCounts {
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
    pub fn request_caller_poll(&self) {
        self.shared.caller_poll_request.notify_one();
    }

    /// Requests a poll at once. Any number of requests cause one poll. The pause after a failure still applies.
    pub fn request_poll(&self) {
        self.shared.poll_request.notify_one();
    }

    /// Waits until a full snapshot is published and returns `true`. Returns `false` if the follower ends or is quarantined before.
    pub async fn wait_until_ready(&self) -> bool {
        let mut progress = self.progress.clone();
        let decided =
            progress.wait_for(|progress| progress.revision.is_some() || progress.state == FollowerState::Quarantined).await;
        decided.is_ok_and(|progress| progress.revision.is_some())
    }

    /// Waits until a store is followed, also after a quarantine, and returns `true`. Returns `false` if the follower ends before.
    pub async fn wait_until_following(&self) -> bool {
        let mut progress = self.progress.clone();
        let decided =
            progress.wait_for(|progress| progress.revision.is_some() && progress.state != FollowerState::Quarantined).await;
        decided.is_ok()
    }

    /// Waits until a revision is applied, even if its policy cannot be built.
    #[cfg(test)]
    pub(super) async fn wait_until_applied(&mut self, number: u64) {
        self.progress.wait_for(|progress| progress.applied_number() >= number).await.unwrap();
    }

    /// Waits until decisions read a revision, its policy included. Requests a poll if they do not read it yet.
    ///
    /// # Errors
    /// [`RevisionUnavailable`] if the revision is not served within `timeout`, or can never be. [`WAIT_MS_DEFAULT`] is the usual timeout.
    pub async fn wait_for_revision(&self, asked: &Revision, timeout: Duration) -> Result<(), RevisionUnavailable> {
        let mut progress = self.progress.clone();
        if let Some(answer) = progress.borrow_and_update().wait_result(asked) {
            return answer;
        }
        self.request_caller_poll();
        let waited = tokio::time::timeout(timeout, progress.wait_for(|progress| progress.wait_result(asked).is_some())).await;
        match waited {
            Ok(Ok(progress)) => progress.wait_result(asked).unwrap_or_else(|| Err(progress.unavailable_error(asked))),
            Ok(Err(_)) | Err(_) => Err(self.progress.borrow().unavailable_error(asked)),
        }
    }
}

/// Reports each change of a follower's progress.
#[derive(Clone, Debug)]
pub struct ProgressReceiver(watch::Receiver<FollowerProgress>);

impl ProgressReceiver {
    /// Waits for the next change.
    ///
    /// # Errors
    /// [`FollowerEnded`] if the follower has ended, so that no further change comes.
    pub async fn changed(&mut self) -> Result<(), FollowerEnded> {
        self.0.changed().await.map_err(|_| FollowerEnded)
    }
}

/// The follower has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this replica follows the store no longer")]
pub struct FollowerEnded;

/// The writing end of a [`FollowerHandle`].
#[derive(Debug)]
pub(super) struct ProgressReporter {
    progress: watch::Sender<FollowerProgress>,
    shared: Arc<SharedStatus>,
}

impl ProgressReporter {
    /// Creates a reporter and the handle that reads it.
    pub(super) fn new() -> (Self, FollowerHandle) {
        let (sender, progress) = watch::channel(FollowerProgress::default());
        let shared = Arc::new(SharedStatus::default());
        (Self { progress: sender, shared: shared.clone() }, FollowerHandle { progress, shared })
    }

    /// Shows the progress of the follower. It wakes waiters only if a value that they wait for has changed.
    pub(super) fn report_progress(&self, next: FollowerProgress) {
        let history = |progress: &FollowerProgress| progress.revision.as_ref().map(|revision| revision.history.clone());
        if history(&next) != history(&self.progress.borrow()) {
            // The recorded numbers belong to another history.
            self.shared.unacknowledged_revocations.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        self.progress.send_if_modified(|progress| {
            let FollowerProgress { proof, problem, behind_since_unix_ms, .. } = progress.clone();
            let is_unobserved = FollowerProgress { proof, problem, behind_since_unix_ms, ..next.clone() } == *progress;
            *progress = next;
            !is_unobserved
        });
    }

    /// The feed of applied revisions.
    pub(super) fn revocation_feed(&self) -> &RevocationFeed {
        &self.shared.revocation_feed
    }

    /// Records the commit time of an applied commit that revokes something.
    pub(super) fn record_revocation_commit(&self, number: u64, unix_ms: i64) {
        let mut pending_revocations = self.shared.unacknowledged_revocations.lock().unwrap_or_else(PoisonError::into_inner);
        if pending_revocations.len() < PENDING_REVOCATIONS_MAX {
            pending_revocations.push_back((number, unix_ms));
        }
    }

    /// Adds to a counter.
    pub(super) fn add_count(&self, counter: fn(&FollowerCounters) -> &AtomicU64, by: u64) {
        counter(&self.shared.counters).fetch_add(by, Ordering::Relaxed);
    }

    /// Waits until a poll is requested.
    pub(super) async fn poll_requested(&self) {
        self.shared.poll_request.notified().await;
    }

    /// Waits until a caller requests a poll.
    pub(super) async fn caller_poll_requested(&self) {
        self.shared.caller_poll_request.notified().await;
    }
}

/// The progress of the follower.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FollowerProgress {
    pub(super) state: FollowerState,
    pub(super) revision: Option<Revision>,
    pub(super) policy_number: u64,
    pub(super) proof: Option<ClockReading>,
    pub(super) problem: Option<String>,
    pub(super) position: Option<HistoryPosition>,
    pub(super) behind_since_unix_ms: Option<i64>,
}

impl FollowerProgress {
    fn applied_number(&self) -> u64 {
        self.revision.as_ref().map_or(0, |revision| revision.number)
    }

    /// The answer to a waiter, if waiting longer cannot improve it; otherwise `None`.
    fn wait_result(&self, asked: &Revision) -> Option<Result<(), RevisionUnavailable>> {
        let applied = self.revision.as_ref()?;
        if self.state == FollowerState::Quarantined || applied.history != asked.history {
            return Some(Err(self.unavailable_error(asked)));
        }
        (applied.number >= asked.number && self.policy_number >= asked.number).then_some(Ok(()))
    }

    fn unavailable_error(&self, asked: &Revision) -> RevisionUnavailable {
        let asked = asked.clone();
        match &self.revision {
            _ if self.state == FollowerState::Quarantined => {
                RevisionUnavailable::Quarantined { reason: self.problem.clone().unwrap_or_default() }
            }
            None => RevisionUnavailable::NotReady,
            Some(applied) if applied.history != asked.history => {
                RevisionUnavailable::OtherHistory { asked, history: applied.history.clone() }
            }
            Some(applied) => RevisionUnavailable::NotApplied { asked, applied: applied.number, policy: self.policy_number },
        }
    }
}

/// The state that all clones of the handle share with the reporter.
#[derive(Debug, Default)]
struct SharedStatus {
    poll_request: Notify,
    caller_poll_request: Notify,
    revocation_feed: RevocationFeed,
    unacknowledged_revocations: Mutex<VecDeque<(u64, i64)>>,
    counters: FollowerCounters,
}

/// The atomic counters behind [`FollowerCounts`].
#[derive(Debug, Default)]
pub(super) struct FollowerCounters {
    pub(super) polls: AtomicU64,
    pub(super) poll_failures: AtomicU64,
    pub(super) loads: AtomicU64,
    pub(super) load_failures: AtomicU64,
    pub(super) commits: AtomicU64,
    pub(super) resyncs: AtomicU64,
    pub(super) build_failures: AtomicU64,
    pub(super) quarantines: AtomicU64,
}
