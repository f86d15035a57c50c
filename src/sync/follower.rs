//! The follower: a pure state machine, events in, actions out. No clock, no I/O, no randomness.
//!
//! It publishes only what follows what it published, number by number and hash by hash, and renews a proof only to the time
//! at which a poll was *sent* whose answer it has applied to the end. The driver does the actions in order before the next
//! event. Look next at `run.rs`, the driver, and at `sync/tests.rs`, which sets a hostile store on it.

pub use super::status::State;
use crate::model::mutant::{Mutant, active};
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::Now;
use crate::store::{self, Changes, CommitRow};

/// A place in a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// History and number.
    pub revision: Revision,
    /// Hash of the row of the change log with that number.
    pub hash: [u8; 32],
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A load was answered.
    Loaded {
        /// When it was sent.
        sent_at: Now,
        /// The answer.
        state: Box<store::State>,
    },
    /// A load failed.
    LoadFailed(store::Error),
    /// A poll was answered.
    Changes {
        /// When it was sent.
        sent_at: Now,
        /// The answer.
        changes: Changes,
    },
    /// A poll failed.
    PollFailed(store::Error),
    /// The publisher did what the last [`Action::Replace`] or [`Action::Apply`] said, as its answer tells.
    Published(Result<(), String>),
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Publish a full state, and tell with [`Event::Published`].
    Replace {
        /// What.
        state: Box<store::State>,
        /// Its proof.
        proof: Now,
    },
    /// Publish commits, and tell with [`Event::Published`].
    Apply {
        /// What: at least one.
        commits: Vec<CommitRow>,
        /// The proof that then holds.
        proof: Now,
    },
    /// Renew the proof of what is published.
    Refresh {
        /// The proof that now holds.
        proof: Now,
    },
    /// Deny only.
    Quarantine {
        /// Why, in one line, with what to do.
        reason: String,
    },
}

/// What to ask the store next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The full state.
    Load,
    /// The changes after a number.
    Poll {
        /// The number.
        after: u64,
        /// Whether more is known to be there: ask without a pause.
        at_once: bool,
    },
    /// Nothing, for good.
    Nothing,
}

/// The state machine.
#[derive(Debug)]
pub struct Follower {
    state: State,
    position: Option<Position>,
    /// A full state that is ahead of `position`, until the log has shown that it goes on from there.
    loaded: Option<Loaded>,
    /// What is being published, until [`Event::Published`].
    pending: Option<Pending>,
    proof: Option<Now>,
    policy: u64,
    behind_head: bool,
    failures: u32,
    problem: Option<String>,
}

#[derive(Clone, Debug)]
struct Pending {
    position: Position,
    full: bool,
    proof: Now,
}

#[derive(Debug)]
struct Loaded {
    sent_at: Now,
    state: Box<store::State>,
    /// How far the log was followed from where we were.
    at: Position,
}

impl Follower {
    /// A follower with nothing published. `known` is the last place that this replica is known to have been at: a store that
    /// is behind it, or of another history, is not followed.
    pub fn new(known: Option<Position>) -> Self {
        Self {
            state: State::Bootstrapping,
            position: known,
            loaded: None,
            pending: None,
            proof: None,
            policy: 0,
            behind_head: false,
            failures: 0,
            problem: None,
        }
    }

    /// What the follower is about.
    pub fn state(&self) -> State {
        self.state
    }

    /// What is published; `None` while bootstrapping.
    pub fn published(&self) -> Option<&Revision> {
        self.proof.and(self.position.as_ref()).map(|position| &position.revision)
    }

    /// The place of what is published; `None` while bootstrapping and in quarantine.
    pub fn place(&self) -> Option<&Position> {
        self.proof.and(self.position.as_ref()).filter(|_| self.state != State::Quarantined)
    }

    /// Whether a commit is known to be there that is not in effect in full.
    pub fn is_behind(&self) -> bool {
        self.behind_head || self.published().is_some_and(|revision| self.policy < revision.number)
    }

    /// Number of the revision whose policy is in force.
    pub fn policy(&self) -> u64 {
        self.policy
    }

    /// The proof that holds for what is published.
    pub fn proof(&self) -> Option<Now> {
        self.proof
    }

    /// Failures since something was last published or found to be current, for the pause after one.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The newest trouble; `None` while all is well.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// What to ask the store next.
    pub fn request(&self) -> Request {
        if let (Some(loaded), State::Bootstrapping | State::Resync) = (&self.loaded, self.state) {
            return Request::Poll { after: loaded.at.revision.number, at_once: true };
        }
        match (self.state, &self.position) {
            (State::Quarantined, _) => Request::Nothing,
            (State::Following, Some(position)) => Request::Poll { after: position.revision.number, at_once: self.behind_head },
            _ => Request::Load,
        }
    }

    /// Takes an event in.
    pub fn on(&mut self, event: Event) -> Option<Action> {
        if self.state == State::Quarantined {
            return None;
        }
        match event {
            Event::Loaded { sent_at, state } => self.on_loaded(sent_at, state),
            Event::Changes { sent_at, changes } => match self.loaded.take() {
                Some(loaded) => self.on_traced(loaded, &changes),
                None => self.on_changes(sent_at, changes),
            },
            Event::LoadFailed(error) | Event::PollFailed(error) => self.on_failed(&error),
            Event::Published(result) => {
                self.on_published(result);
                None
            }
        }
    }

    fn on_loaded(&mut self, sent_at: Now, state: Box<store::State>) -> Option<Action> {
        let position = Position { revision: state.revision.clone(), hash: state.hash };
        if let Some(ours) = &self.position {
            let (number, theirs) = (ours.revision.number, position.revision.number);
            if ours.revision.history != position.revision.history && !active(Mutant::IgnoreHistory) {
                return self.other_history(&position.revision.history);
            }
            if theirs < number && !active(Mutant::IgnoreFall) {
                return self.fell(theirs);
            }
            if theirs == number && ours.hash != position.hash && !active(Mutant::IgnoreFork) {
                return self.forked(number);
            }
        }
        if !state.has_its_digest() {
            self.fail(format!("the rows of revision {} do not have the digest that was stored with it", state.revision.number));
            return None;
        }
        match &self.position {
            // Equal numbers had to have equal hashes; ahead of ours it may be of another past, which a load cannot tell.
            Some(ours) if ours.revision.number < position.revision.number => {
                self.loaded = Some(Loaded { sent_at, state, at: ours.clone() });
                None
            }
            _ => self.replace(sent_at, state),
        }
    }

    fn replace(&mut self, sent_at: Now, state: Box<store::State>) -> Option<Action> {
        let position = Position { revision: state.revision.clone(), hash: state.hash };
        let proof = self.later(sent_at);
        self.pending = Some(Pending { position, full: true, proof });
        Some(Action::Replace { state, proof })
    }

    /// Follows the log from where we were to the state that was loaded. It contradicts that state, or leads to it; a log that
    /// can do neither, for it is cut or holed, is what a full state is loaded for.
    fn on_traced(&mut self, mut loaded: Loaded, changes: &Changes) -> Option<Action> {
        let (ours, target) = (self.position.clone()?, loaded.state.revision.number);
        if changes.history != ours.revision.history {
            return self.other_history(&changes.history);
        }
        if changes.head < ours.revision.number {
            return self.fell(changes.head);
        }
        if changes.head < target {
            self.fail(format!("the store fell from revision {target} to {} while it was loaded", changes.head));
            return None;
        }
        let first =
            changes.commits.first().filter(|commit| loaded.at == ours && commit.number == ours.revision.number.saturating_add(1));
        if first.is_some_and(|commit| commit.previous_hash != ours.hash) && !active(Mutant::IgnoreFork) {
            return self.forked(ours.revision.number);
        }
        for commit in &changes.commits {
            if loaded.at.revision.number == target {
                break;
            }
            if commit.verify_after(loaded.at.revision.number, &loaded.at.hash).is_err() {
                return self.replace(loaded.sent_at, loaded.state);
            }
            loaded.at.revision.number = commit.number;
            loaded.at.hash = commit.hash;
        }
        if loaded.at.revision.number < target && !changes.commits.is_empty() {
            self.loaded = Some(loaded);
            return None;
        }
        if loaded.at.revision.number == target && loaded.at.hash != loaded.state.hash {
            self.fail(format!("the change log does not lead to the revision {target} that was loaded"));
            return None;
        }
        self.replace(loaded.sent_at, loaded.state)
    }

    fn on_changes(&mut self, sent_at: Now, changes: Changes) -> Option<Action> {
        let (State::Following, Some(ours)) = (self.state, &self.position) else { return None };
        let number = ours.revision.number;
        if changes.history != ours.revision.history && !active(Mutant::IgnoreHistory) {
            return self.other_history(&changes.history);
        }
        if changes.head < number {
            if active(Mutant::IgnoreFall) {
                self.state = State::Resync;
                return None;
            }
            return self.fell(changes.head);
        }
        if changes.head == number && changes.head_hash != ours.hash && !active(Mutant::IgnoreFork) {
            return self.forked(number);
        }
        // The row after ours names the row before it: another hash there means that ours is not in this log.
        let follows_another = |next: &CommitRow| next.number == number.saturating_add(1) && next.previous_hash != ours.hash;
        if changes.commits.first().is_some_and(follows_another) && !active(Mutant::IgnoreFork) {
            return self.forked(number);
        }
        let last = match follow(ours, &changes) {
            Ok(last) => last,
            Err(problem) => {
                self.out_of_step(problem);
                return active(Mutant::RenewInResync).then_some(Action::Refresh { proof: sent_at });
            }
        };
        self.failures = 0;
        self.behind_head = last.revision.number < changes.head;
        // INVARIANT: no proof from an answer that does not reach the head: what is missing may be a revocation.
        let frozen = self.behind_head && !active(Mutant::RenewWithoutHead);
        let proof = if frozen { self.proof.unwrap_or(sent_at) } else { self.later(sent_at) };
        if changes.commits.is_empty() {
            self.proof = Some(proof);
            if self.policy == last.revision.number {
                self.problem = None;
            }
            return Some(Action::Refresh { proof });
        }
        self.pending = Some(Pending { position: last, full: false, proof });
        Some(Action::Apply { commits: changes.commits, proof })
    }

    fn on_published(&mut self, result: Result<(), String>) {
        let Some(pending) = self.pending.take() else { return };
        match result {
            Ok(()) => {
                self.policy = pending.position.revision.number;
                self.problem = None;
            }
            // Nothing to decide by was published: load again, for a commit may mend it.
            Err(problem) if pending.full && self.proof.is_none() => {
                // The log has led there from the known place: it need not be followed again.
                self.position = self.position.is_some().then_some(pending.position);
                self.fail(problem);
                return;
            }
            Err(problem) => self.problem = Some(problem),
        }
        self.state = State::Following;
        self.failures = 0;
        self.position = Some(pending.position);
        self.proof = Some(pending.proof);
    }

    fn on_failed(&mut self, error: &store::Error) -> Option<Action> {
        match error {
            store::Error::Replaced(_) | store::Error::NotOurs(_) => self.quarantine(format!(
                "the store is not the one that was followed ({error}): put the right one back, or have this one adopted"
            )),
            store::Error::BelowFloor { .. } | store::Error::Corrupt(_) if self.loaded.is_some() => {
                // The log cannot contradict what was loaded.
                let loaded = self.loaded.take()?;
                self.replace(loaded.sent_at, loaded.state)
            }
            store::Error::BelowFloor { .. } | store::Error::Corrupt(_) if self.state == State::Following => {
                self.out_of_step(error.to_string());
                None
            }
            _ => {
                self.fail(error.to_string());
                None
            }
        }
    }

    fn fail(&mut self, problem: String) {
        self.failures = self.failures.saturating_add(1);
        self.problem = Some(problem);
    }

    /// The proof stays where it is until a full state is published.
    fn out_of_step(&mut self, problem: String) {
        self.state = State::Resync;
        self.behind_head = false;
        self.problem = Some(problem);
    }

    fn other_history(&mut self, theirs: &HistoryId) -> Option<Action> {
        self.quarantine(format!("the store is now of history `{theirs}`: put the right one back, or have this one adopted"))
    }

    fn fell(&mut self, theirs: u64) -> Option<Action> {
        let ours = self.position.as_ref().map_or(0, |position| position.revision.number);
        self.quarantine(format!(
            "the store fell from revision {ours} to {theirs}: put the right one back, or have this one adopted"
        ))
    }

    fn forked(&mut self, number: u64) -> Option<Action> {
        self.quarantine(format!(
            "the store holds another revision {number} than was followed: put the right one back, or have this one adopted"
        ))
    }

    fn quarantine(&mut self, reason: String) -> Option<Action> {
        self.state = State::Quarantined;
        self.pending = None;
        self.loaded = None;
        self.problem = Some(reason.clone());
        Some(Action::Quarantine { reason })
    }

    /// A proof never falls, should answers overtake each other.
    fn later(&self, sent_at: Now) -> Now {
        self.proof.filter(|proof| proof.boot_ns > sent_at.boot_ns).unwrap_or(sent_at)
    }
}

/// The place after the commits, if they are dense, reach no further than the head, and each follows the one before it.
fn follow(ours: &Position, changes: &Changes) -> Result<Position, String> {
    let mut last = ours.clone();
    for commit in &changes.commits {
        let number = last.revision.number;
        if Some(commit.number) != number.checked_add(1) || commit.number > changes.head {
            return Err(format!("the change log goes from {number} to {}, its head is {}", commit.number, changes.head));
        }
        if !active(Mutant::IgnoreFork) {
            commit.verify_after(number, &last.hash).map_err(|error| error.to_string())?;
        }
        last.revision.number = commit.number;
        last.hash = commit.hash;
    }
    if changes.commits.is_empty() && changes.head > last.revision.number {
        return Err(format!("the store is at {} but has no changes after {}", changes.head, last.revision.number));
    }
    if last.revision.number == changes.head && last.hash != changes.head_hash && !active(Mutant::IgnoreFork) {
        return Err(format!("the commits up to revision {} do not lead to the head of the store", changes.head));
    }
    Ok(last)
}
