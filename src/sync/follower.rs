//! The follower: a pure state machine that takes events and returns actions. It has no clock, no I/O and no randomness.
//!
//! The follower publishes a commit only if its number and hash continue the published state. It renews the proof of freshness
//! only after it has applied a whole answer, and only to the time at which it *sent* that poll. The driver carries out each
//! action before it delivers the next event.
//!
//! Only one event ends a quarantine: the store was adopted from the followed history, and it holds every revocation that this
//! replica knew.
//!
//! Look next at `follower_loop.rs`, the driver, and at `sync/tests.rs`, which runs the follower against a hostile store.

use crate::model::mutant::{Mutant, is_active};
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::RevocationRow;
use crate::model::time::ClockReading;
use crate::store::{self, ChangeLogPage, CommitRow, LineageRelation, StoreLineage, lineage};

/// The longest freshness bound that a store can set. The follower assumes this bound until it knows the store's own.
const BOUND_MS_MAX: u64 = 60_000;

/// A position in a history of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryPosition {
    /// The history and the number in it.
    pub revision: Revision,
    /// The hash of the change-log row with that number.
    pub hash: [u8; 32],
}

/// The state of the follower. The age of the proof is not part of it; the proof is published beside the snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FollowerState {
    /// No store has proved a state yet. A state from the disk cache may be published, and denies every call.
    #[default]
    Bootstrapping,
    /// The published state follows the store.
    Following,
    /// The published state stays, and its proof is not renewed, until a full state replaces it.
    Resync,
    /// The store is not the one that was followed, so every call is denied.
    Quarantined,
}

impl FollowerState {
    /// The name of the state, as in the status and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            FollowerState::Bootstrapping => "bootstrapping",
            FollowerState::Following => "following",
            FollowerState::Resync => "resync",
            FollowerState::Quarantined => "quarantined",
        }
    }
}

/// Stands for a missing proof: a time that is older than any bound, so every call is denied.
const UNPROVED: ClockReading = ClockReading { unix_ns: i64::MIN, boot_ns: i64::MIN };

/// The revocations that this replica knew, as its disk cache holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownRevocations {
    /// The number, in the followed history, up to which the cache is complete.
    pub number: u64,
    /// All revocations that the cache holds.
    pub rows: Vec<RevocationRow>,
}

/// An adopted store, read after this replica merged its known revocations into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdoptedStore {
    /// The lineage of the store, queried at the last number that this replica followed.
    pub lineage: StoreLineage,
    /// The full state of the store.
    pub state: store::StoreState,
    /// The merged revocations; `None` if the cache held none.
    pub known: Option<KnownRevocations>,
}

/// An event that the driver reports to the follower.
#[derive(Clone, Debug)]
pub enum FollowerEvent {
    /// The store answered a load.
    Loaded {
        /// The time at which the load was sent.
        sent_at: ClockReading,
        /// The full state.
        state: Box<store::StoreState>,
    },
    /// A load failed.
    LoadFailed(store::Error),
    /// The store answered a poll.
    Changes {
        /// The time at which the poll was sent.
        sent_at: ClockReading,
        /// The answer to the poll.
        changes: ChangeLogPage,
    },
    /// A poll failed.
    PollFailed(store::Error),
    /// The store answered whether it was adopted from the followed history.
    Adoption {
        /// The time at which the question was sent.
        sent_at: ClockReading,
        /// The adopted store; `None` if the store was not adopted.
        adopted: Option<Box<AdoptedStore>>,
    },
    /// The store could not answer that question, or the known revocations could not be merged.
    AdoptionFailed(store::Error),
    /// The publisher has finished the last [`FollowerAction::PublishFullState`] or [`FollowerAction::Apply`], with this result.
    Published(Result<(), String>),
}

/// An action that the driver must carry out now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FollowerAction {
    /// Publish a full state, then report [`FollowerEvent::Published`].
    PublishFullState {
        /// The full state.
        state: Box<store::StoreState>,
        /// The proof of the state.
        proof: ClockReading,
    },
    /// Publish commits, then report [`FollowerEvent::Published`].
    Apply {
        /// The commits: at least one.
        commits: Vec<CommitRow>,
        /// The proof that holds after these commits.
        proof: ClockReading,
    },
    /// Renew the proof of the published state.
    Refresh {
        /// The proof that now holds.
        proof: ClockReading,
    },
    /// Deny every call.
    Quarantine {
        /// The reason in one line, with the remedy.
        reason: String,
    },
}

/// The next question to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FollowerRequest {
    /// Load the full state.
    Load,
    /// Poll for the changes after a number.
    Poll {
        /// The number.
        after: u64,
        /// Whether the store is known to have more commits, so that the driver polls without a pause.
        at_once: bool,
    },
    /// Ask whether the store was adopted from the followed history. The driver asks seldom, because an operator makes an adoption.
    Adoption,
    /// Ask nothing any more.
    Nothing,
}

/// The state machine of a replica that follows a store. See the module documentation.
#[derive(Debug)]
pub struct Follower {
    state: FollowerState,
    position: Option<HistoryPosition>,
    /// A full state ahead of `position`. It waits until the change log shows that it continues from `position`.
    loaded: Option<LoadedState>,
    /// The publication that is in progress until [`FollowerEvent::Published`].
    pending: Option<PendingPublication>,
    proof: Option<ClockReading>,
    policy_number: u64,
    behind_head: bool,
    failures: u32,
    problem: Option<String>,
    /// Whether the published state and `position` come from the disk cache of this machine, so that nothing proves them yet.
    is_from_cache: bool,
    /// A recorded position ahead of the cached one. This replica was at both.
    recorded_ahead: Option<HistoryPosition>,
    /// The reason of the quarantine.
    quarantine_reason: Option<String>,
    /// The time, in milliseconds, for which the published state may answer calls without a new proof.
    bound_ms: u64,
}

/// A publication that the driver carries out at the moment.
#[derive(Clone, Debug)]
struct PendingPublication {
    position: HistoryPosition,
    is_full_state: bool,
    /// `None`: nothing proves the state yet.
    proof: Option<ClockReading>,
    bound_ms: u64,
}

/// A full state that is not published until the change log was followed from the own position to it.
#[derive(Debug)]
struct LoadedState {
    sent_at: ClockReading,
    state: Box<store::StoreState>,
    /// The position up to which the change log was traced.
    verified_up_to: HistoryPosition,
}

impl Follower {
    /// Makes a follower with nothing published. `recorded_position` is the last position that this replica has recorded. The
    /// follower quarantines a store that is behind that position or has another history.
    pub fn new(recorded_position: Option<HistoryPosition>) -> Self {
        Self {
            state: FollowerState::Bootstrapping,
            position: recorded_position,
            loaded: None,
            pending: None,
            proof: None,
            policy_number: 0,
            behind_head: false,
            failures: 0,
            problem: None,
            is_from_cache: false,
            recorded_ahead: None,
            quarantine_reason: None,
            bound_ms: BOUND_MS_MAX,
        }
    }

    /// Makes a follower whose cached state is published without a proof. It continues from the cached position.
    /// `recorded_position` is as in [`Follower::new`].
    pub fn from_cache(cached: HistoryPosition, recorded_position: Option<HistoryPosition>) -> Self {
        let number = cached.revision.number;
        let recorded_ahead = recorded_position.filter(|recorded_position| recorded_position.revision.number > number);
        Self { is_from_cache: true, recorded_ahead, policy_number: number, ..Self::new(Some(cached)) }
    }

    /// Makes a follower that starts in quarantine. It follows nothing until the store is adopted from the history of
    /// `last_position`.
    pub fn in_quarantine(last_position: HistoryPosition, reason: String) -> Self {
        let problem = Some(reason.clone());
        Self { state: FollowerState::Quarantined, quarantine_reason: Some(reason), problem, ..Self::new(Some(last_position)) }
    }

    /// The state of the follower.
    pub fn state(&self) -> FollowerState {
        self.state
    }

    /// The published revision, if a store has proved it; `None` for a state from the disk cache.
    pub fn published_revision(&self) -> Option<&Revision> {
        self.proof.and(self.position.as_ref()).map(|position| &position.revision)
    }

    /// The position of the published state; `None` while bootstrapping and in quarantine.
    pub fn followed_position(&self) -> Option<&HistoryPosition> {
        self.proof.and(self.position.as_ref()).filter(|_| self.state != FollowerState::Quarantined)
    }

    /// The last position, also in quarantine: there it is the position at which the quarantine began.
    pub fn last_position(&self) -> Option<&HistoryPosition> {
        self.position.as_ref()
    }

    /// Whether the store has a commit that is not fully in effect here, its policy included.
    pub fn is_behind(&self) -> bool {
        self.behind_head || self.published_revision().is_some_and(|revision| self.policy_number < revision.number)
    }

    /// The number of the revision whose policy is in force.
    pub fn policy_number(&self) -> u64 {
        self.policy_number
    }

    /// The proof of freshness of the published state.
    pub fn freshness_proof(&self) -> Option<ClockReading> {
        self.proof
    }

    /// The number of failures since the last successful publication or check. The pause after a failure depends on it.
    pub fn consecutive_failures(&self) -> u32 {
        self.failures
    }

    /// The newest problem in one line; `None` if there is none.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// The next question to the store.
    pub fn next_request(&self) -> FollowerRequest {
        if let (Some(loaded), FollowerState::Bootstrapping | FollowerState::Resync) = (&self.loaded, self.state) {
            return FollowerRequest::Poll { after: loaded.verified_up_to.revision.number, at_once: true };
        }
        match (self.state, &self.position) {
            (FollowerState::Quarantined, Some(_)) => FollowerRequest::Adoption,
            (FollowerState::Quarantined, None) => FollowerRequest::Nothing,
            (FollowerState::Bootstrapping, Some(position)) if self.is_from_cache => {
                FollowerRequest::Poll { after: position.revision.number, at_once: self.behind_head }
            }
            (FollowerState::Following, Some(position)) => {
                FollowerRequest::Poll { after: position.revision.number, at_once: self.behind_head }
            }
            _ => FollowerRequest::Load,
        }
    }

    /// Handles an event. Returns the action that the driver must carry out, if there is one.
    pub fn handle_event(&mut self, event: FollowerEvent) -> Option<FollowerAction> {
        match event {
            event if self.state != FollowerState::Quarantined => self.handle_unquarantined_event(event),
            FollowerEvent::Adoption { sent_at, adopted: Some(adopted) } => self.handle_adoption(sent_at, *adopted),
            FollowerEvent::AdoptionFailed(error) => {
                self.remain_quarantined(&error.to_string());
                None
            }
            FollowerEvent::Published(result) => {
                self.handle_adoption_published(result);
                None
            }
            _ => None,
        }
    }

    /// Handles an event outside of quarantine.
    fn handle_unquarantined_event(&mut self, event: FollowerEvent) -> Option<FollowerAction> {
        match event {
            FollowerEvent::Loaded { sent_at, state } => self.on_loaded(sent_at, state),
            FollowerEvent::Changes { sent_at, changes } => match self.loaded.take() {
                Some(loaded) => self.on_trace_changes(loaded, &changes),
                None => self.on_changes(sent_at, changes),
            },
            FollowerEvent::LoadFailed(error) | FollowerEvent::PollFailed(error) => self.on_failed(&error),
            FollowerEvent::Published(result) => {
                self.on_published(result);
                None
            }
            FollowerEvent::Adoption { .. } | FollowerEvent::AdoptionFailed(_) => None,
        }
    }

    /// Checks an adopted store and publishes its state.
    ///
    /// INVARIANT: only a store that passes here ends a quarantine. An operator recorded that it was adopted from the followed history.
    /// It holds every revocation that this replica knew. This replica's last proof is older than the bound.
    fn handle_adoption(&mut self, sent_at: ClockReading, adopted: AdoptedStore) -> Option<FollowerAction> {
        let AdoptedStore { lineage, state, known } = adopted;
        let last_position = self.position.clone()?;
        let relation = lineage.relation_to(&last_position.revision, &last_position.hash);
        if relation == LineageRelation::Unrelated || state.revision.history != lineage.revision.history {
            return None;
        }
        // A decision that began earlier may still read the published state, so that state's proof must have expired.
        if self.proof.is_some_and(|proof| sent_at.elapsed_ms_since(proof) < self.bound_ms) {
            return None;
        }
        if !state.digest_matches() {
            self.remain_quarantined("the rows of the adopted store do not have the digest that was stored with them");
            return None;
        }
        if relation == LineageRelation::MayLack {
            let is_complete = |known: &KnownRevocations| known.number >= last_position.revision.number;
            // After a restart the cache holds all that this replica still knows.
            if self.proof.is_some() && !known.as_ref().is_some_and(is_complete) {
                self.remain_quarantined(
                    "the cache does not hold all that this replica knew: restart it, to merge and follow with what it holds",
                );
                return None;
            }
            let known = known.map(|known| known.rows).unwrap_or_default();
            let missing = lineage::uncovered_rows(&known, &state.revocations);
            if let Some(first) = missing.first() {
                let target = &first.target;
                self.remain_quarantined(&format!(
                    "{} of what is revoked here is not in the adopted store, `{target}` first",
                    missing.len()
                ));
                return None;
            }
        }
        self.publish_full_state(sent_at, Box::new(state))
    }

    /// Ends the quarantine if the adopted state was published.
    fn handle_adoption_published(&mut self, result: Result<(), String>) {
        match (self.pending.take(), result) {
            (Some(pending), Ok(())) => {
                self.quarantine_reason = None;
                self.pending = Some(pending);
                self.on_published(Ok(()));
            }
            // Nothing of the new history was published.
            (_, Err(problem)) => self.remain_quarantined(&problem),
            (None, Ok(())) => {}
        }
    }

    /// Records why this replica stays in quarantine although the store may have been adopted.
    fn remain_quarantined(&mut self, detail: &str) {
        self.problem = Some(match &self.quarantine_reason {
            Some(reason) => format!("{reason}; {detail}"),
            None => detail.to_owned(),
        });
    }

    /// Compares a loaded state with our position: quarantines, publishes it, or traces the change log to it first.
    fn on_loaded(&mut self, sent_at: ClockReading, state: Box<store::StoreState>) -> Option<FollowerAction> {
        let position = HistoryPosition { revision: state.revision.clone(), hash: state.hash };
        let number = position.revision.number;
        if let Some(quarantine) = self.check_recorded_ahead(number, &[(number, position.hash)]) {
            return Some(quarantine);
        }
        if let Some(own_position) = &self.position {
            let (number, store_number) = (own_position.revision.number, position.revision.number);
            if own_position.revision.history != position.revision.history && !is_active(Mutant::IgnoreHistory) {
                return self.quarantine_other_history(&position.revision.history);
            }
            if store_number < number && !is_active(Mutant::IgnoreRollback) {
                return self.quarantine_rollback(store_number);
            }
            if store_number == number && own_position.hash != position.hash && !is_active(Mutant::IgnoreFork) {
                return self.quarantine_fork(number);
            }
        }
        if !state.digest_matches() {
            self.record_failure(format!(
                "the rows of revision {} do not have the digest that was stored with it",
                state.revision.number
            ));
            return None;
        }
        match &self.position {
            // Equal numbers have equal hashes here. A state ahead of ours may still have another past, which a load cannot show.
            Some(own_position) if own_position.revision.number < position.revision.number => {
                self.loaded = Some(LoadedState { sent_at, state, verified_up_to: own_position.clone() });
                None
            }
            _ => self.publish_full_state(sent_at, state),
        }
    }

    /// Publishes a full state.
    fn publish_full_state(&mut self, sent_at: ClockReading, state: Box<store::StoreState>) -> Option<FollowerAction> {
        let position = HistoryPosition { revision: state.revision.clone(), hash: state.hash };
        let proof = self.latest_proof(sent_at);
        self.pending = Some(PendingPublication {
            position,
            is_full_state: true,
            proof: Some(proof),
            bound_ms: state.settings.freshness_bound_ms,
        });
        Some(FollowerAction::PublishFullState { state, proof })
    }

    /// Traces the change log from the position of this replica to the loaded state. A complete log either leads to that state or
    /// contradicts it. A log that is cut or has gaps shows neither; such a log is why the full state was loaded, so the loaded
    /// state is then published.
    fn on_trace_changes(&mut self, mut loaded: LoadedState, changes: &ChangeLogPage) -> Option<FollowerAction> {
        let (own_position, target) = (self.position.clone()?, loaded.state.revision.number);
        if changes.history != own_position.revision.history {
            return self.quarantine_other_history(&changes.history);
        }
        if changes.head < own_position.revision.number {
            return self.quarantine_rollback(changes.head);
        }
        if changes.head < target {
            self.record_failure(format!("the store fell from revision {target} to {} while it was loaded", changes.head));
            return None;
        }
        let first = changes.commits.first().filter(|commit| {
            loaded.verified_up_to == own_position && commit.number == own_position.revision.number.saturating_add(1)
        });
        if first.is_some_and(|commit| commit.previous_hash != own_position.hash) && !is_active(Mutant::IgnoreFork) {
            return self.quarantine_fork(own_position.revision.number);
        }
        if let Some(quarantine) = self.check_recorded_ahead(changes.head, &commit_hashes(changes)) {
            return Some(quarantine);
        }
        for commit in &changes.commits {
            if loaded.verified_up_to.revision.number == target {
                break;
            }
            if commit.verify_after(loaded.verified_up_to.revision.number, &loaded.verified_up_to.hash).is_err() {
                return self.publish_full_state(loaded.sent_at, loaded.state);
            }
            loaded.verified_up_to.revision.number = commit.number;
            loaded.verified_up_to.hash = commit.hash;
        }
        if loaded.verified_up_to.revision.number < target && !changes.commits.is_empty() {
            self.loaded = Some(loaded);
            return None;
        }
        if loaded.verified_up_to.revision.number == target && loaded.verified_up_to.hash != loaded.state.hash {
            self.record_failure(format!("the change log does not lead to the revision {target} that was loaded"));
            return None;
        }
        self.publish_full_state(loaded.sent_at, loaded.state)
    }

    /// Verifies the answer to a poll: publishes its commits, renews the proof, starts a resync, or quarantines.
    fn on_changes(&mut self, sent_at: ClockReading, changes: ChangeLogPage) -> Option<FollowerAction> {
        let is_following = self.state == FollowerState::Following || self.is_from_cache;
        let own_position = self.position.as_ref().filter(|_| is_following)?;
        let number = own_position.revision.number;
        if changes.history != own_position.revision.history && !is_active(Mutant::IgnoreHistory) {
            return self.quarantine_other_history(&changes.history);
        }
        if changes.head < number {
            if is_active(Mutant::IgnoreRollback) {
                self.state = FollowerState::Resync;
                return None;
            }
            return self.quarantine_rollback(changes.head);
        }
        if changes.head == number && changes.head_hash != own_position.hash && !is_active(Mutant::IgnoreFork) {
            return self.quarantine_fork(number);
        }
        // The row after ours names the hash of its predecessor. A different hash means that our row is not in this log.
        let has_other_parent =
            |next: &CommitRow| next.number == number.saturating_add(1) && next.previous_hash != own_position.hash;
        if changes.commits.first().is_some_and(has_other_parent) && !is_active(Mutant::IgnoreFork) {
            return self.quarantine_fork(number);
        }
        if let Some(quarantine) = self.check_recorded_ahead(changes.head, &commit_hashes(&changes)) {
            return Some(quarantine);
        }
        let own_position = self.position.as_ref()?;
        let last = match verify_commits(own_position, &changes) {
            Ok(last) => last,
            Err(problem) => {
                self.start_resync(problem);
                return is_active(Mutant::RenewInResync).then_some(FollowerAction::Refresh { proof: sent_at });
            }
        };
        self.failures = 0;
        self.behind_head = last.revision.number < changes.head;
        // INVARIANT: an answer that does not reach the head renews no proof, because a missing commit may hold a revocation.
        let keeps_old_proof = self.behind_head && !is_active(Mutant::RenewWithoutHead);
        let proof = if keeps_old_proof { self.proof } else { Some(self.latest_proof(sent_at)) };
        if changes.commits.is_empty() {
            self.proof = proof;
            self.mark_following();
            if self.policy_number == last.revision.number {
                self.problem = None;
            }
            return Some(FollowerAction::Refresh { proof: proof.unwrap_or(UNPROVED) });
        }
        self.pending = Some(PendingPublication { position: last, is_full_state: false, proof, bound_ms: self.bound_ms });
        Some(FollowerAction::Apply { commits: changes.commits, proof: proof.unwrap_or(UNPROVED) })
    }

    /// Takes over the position and the proof of a publication. A state without its policy still counts as published.
    fn on_published(&mut self, result: Result<(), String>) {
        let Some(pending) = self.pending.take() else { return };
        match result {
            Ok(()) => {
                self.policy_number = pending.position.revision.number;
                self.problem = None;
            }
            // No usable state was published. Load again, because a later commit may repair the policy.
            Err(problem) if pending.is_full_state && self.proof.is_none() => {
                // The log was already traced to here from the known position, so it need not be traced again.
                self.position = self.position.is_some().then_some(pending.position);
                self.record_failure(problem);
                return;
            }
            Err(problem) => self.problem = Some(problem),
        }
        self.failures = 0;
        self.bound_ms = pending.bound_ms;
        self.position = Some(pending.position);
        self.proof = pending.proof;
        // A cached state stays unproved until the follower has reached the head of the store.
        if self.proof.is_some() {
            self.mark_following();
        }
    }

    /// Reacts to a failed load or poll: another store is a quarantine, a cut log is a resync, and other failures are retried.
    fn on_failed(&mut self, error: &store::Error) -> Option<FollowerAction> {
        match error {
            store::Error::Replaced(_) | store::Error::NotAStore(_) => self.quarantine(format!(
                "the store is not the one that was followed ({error}): put the right one back, or have this one adopted"
            )),
            store::Error::BelowFloor { .. } | store::Error::Corrupt(_) if self.loaded.is_some() => {
                // The log cannot contradict the loaded state.
                let loaded = self.loaded.take()?;
                self.publish_full_state(loaded.sent_at, loaded.state)
            }
            store::Error::BelowFloor { .. } | store::Error::Corrupt(_)
                if self.state == FollowerState::Following || self.is_from_cache =>
            {
                self.start_resync(error.to_string());
                None
            }
            _ => {
                self.record_failure(error.to_string());
                None
            }
        }
    }

    fn record_failure(&mut self, problem: String) {
        self.failures = self.failures.saturating_add(1);
        self.problem = Some(problem);
    }

    /// Marks the published state as followed and proved.
    fn mark_following(&mut self) {
        self.state = FollowerState::Following;
        self.is_from_cache = false;
        let number = self.position.as_ref().map_or(0, |position| position.revision.number);
        self.recorded_ahead = self.recorded_ahead.take().filter(|ahead| ahead.revision.number > number);
    }

    /// Quarantines if the store does not reach the recorded position ahead of the cached one, or holds another revision of its number.
    fn check_recorded_ahead(&mut self, head: u64, rows: &[(u64, [u8; 32])]) -> Option<FollowerAction> {
        let ahead = self.recorded_ahead.as_ref()?;
        let number = ahead.revision.number;
        let is_fork = rows.iter().any(|(row_number, hash)| *row_number == number && *hash != ahead.hash);
        match head < number {
            true => self.quarantine_rollback(head),
            false if is_fork => self.quarantine_fork(number),
            false => None,
        }
    }

    /// Starts a resync. The proof stays unchanged until a full state is published.
    fn start_resync(&mut self, problem: String) {
        self.state = FollowerState::Resync;
        self.is_from_cache = false;
        self.behind_head = false;
        self.problem = Some(problem);
    }

    fn quarantine_other_history(&mut self, store_history: &HistoryId) -> Option<FollowerAction> {
        self.quarantine(format!(
            "the store is now of history `{store_history}`: put the right one back, or have this one adopted"
        ))
    }

    fn quarantine_rollback(&mut self, store_number: u64) -> Option<FollowerAction> {
        let own_number = self.position.as_ref().map_or(0, |position| position.revision.number);
        self.quarantine(format!(
            "the store fell from revision {own_number} to {store_number}: put the right one back, or have this one adopted"
        ))
    }

    fn quarantine_fork(&mut self, number: u64) -> Option<FollowerAction> {
        self.quarantine(format!(
            "the store holds another revision {number} than was followed: put the right one back, or have this one adopted"
        ))
    }

    /// Enters quarantine. Only an adoption leads out of it.
    fn quarantine(&mut self, reason: String) -> Option<FollowerAction> {
        self.state = FollowerState::Quarantined;
        self.pending = None;
        self.loaded = None;
        self.problem = Some(reason.clone());
        self.quarantine_reason = Some(reason.clone());
        Some(FollowerAction::Quarantine { reason })
    }

    /// Returns the later of the current proof and `sent_at`. A proof never moves back, even if answers overtake each other.
    fn latest_proof(&self, sent_at: ClockReading) -> ClockReading {
        self.proof.filter(|proof| proof.boot_ns > sent_at.boot_ns).unwrap_or(sent_at)
    }
}

/// The numbers and hashes of the rows in an answer, the head included.
fn commit_hashes(changes: &ChangeLogPage) -> Vec<(u64, [u8; 32])> {
    let head = (changes.head, changes.head_hash);
    changes.commits.iter().map(|commit| (commit.number, commit.hash)).chain([head]).collect()
}

/// Returns the position after the commits. The commits must be dense, must each follow the one before, and must not pass the head.
fn verify_commits(own_position: &HistoryPosition, changes: &ChangeLogPage) -> Result<HistoryPosition, String> {
    let mut last = own_position.clone();
    for commit in &changes.commits {
        let number = last.revision.number;
        if Some(commit.number) != number.checked_add(1) || commit.number > changes.head {
            return Err(format!("the change log goes from {number} to {}, its head is {}", commit.number, changes.head));
        }
        if !is_active(Mutant::IgnoreFork) {
            commit.verify_after(number, &last.hash).map_err(|error| error.to_string())?;
        }
        last.revision.number = commit.number;
        last.hash = commit.hash;
    }
    if changes.commits.is_empty() && changes.head > last.revision.number {
        return Err(format!("the store is at {} but has no changes after {}", changes.head, last.revision.number));
    }
    if last.revision.number == changes.head && last.hash != changes.head_hash && !is_active(Mutant::IgnoreFork) {
        return Err(format!("the commits up to revision {} do not lead to the head of the store", changes.head));
    }
    Ok(last)
}
