//! The follower: a pure state machine, events in, actions out. No clock, no I/O, no randomness.
//!
//! It publishes only what follows what it published, number by number and hash by hash, and renews a proof only to the time
//! at which a poll was *sent* whose answer it has applied to the end. The driver does the actions in order before the next
//! event. Out of quarantine leads one way: the store was adopted from the history that was followed, and holds all that was known
//! to be revoked. Look next at `run.rs`, the driver, and at `sync/tests.rs`, which sets a hostile store on it.

pub use super::status::State;
use crate::model::mutant::{Mutant, active};
use crate::model::records::RevocationRow;
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::Now;
use crate::store::{self, Changes, CommitRow, Kinship, Lineage, lineage};

/// The longest freshness bound that a store can have: what holds while none is known.
const BOUND_MS_MAX: u64 = 60_000;

/// A place in a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// History and number.
    pub revision: Revision,
    /// Hash of the row of the change log with that number.
    pub hash: [u8; 32],
}

/// The proof of what nothing proves: older than any bound.
const UNPROVED: Now = Now { unix_ns: i64::MIN, boot_ns: i64::MIN };

/// What this replica knew to be revoked, as it was kept on its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Up to which number of the history that was followed.
    pub number: u64,
    /// All of it.
    pub rows: Vec<RevocationRow>,
}

/// A store that was adopted, read after what this replica knew was merged into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Where it comes from, asked at the number that this replica stood at.
    pub lineage: Lineage,
    /// The full state.
    pub state: store::State,
    /// What was merged; `None` where nothing was kept.
    pub known: Option<Known>,
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
    /// It was asked whether the store was adopted from the history that was followed.
    Adoption {
        /// When it was asked.
        sent_at: Now,
        /// The answer; `None`: it was not.
        adopted: Option<Box<Adopted>>,
    },
    /// That could not be said, or what is known could not be merged.
    AdoptionFailed(store::Error),
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
    /// Whether it was adopted from the history that was followed; slowly, for it is an operator who adopts.
    Adoption,
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
    /// What is published, and `position`, are this machine's own cache's: nothing proves them yet.
    cached: bool,
    /// A place ahead of a cached one that this replica was at too.
    ahead: Option<Position>,
    /// Why it is in quarantine.
    reason: Option<String>,
    /// How long what is published may be answered by without a new proof.
    bound_ms: u64,
}

#[derive(Clone, Debug)]
struct Pending {
    position: Position,
    full: bool,
    /// `None`: nothing proves it yet.
    proof: Option<Now>,
    bound_ms: u64,
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
            cached: false,
            ahead: None,
            reason: None,
            bound_ms: BOUND_MS_MAX,
        }
    }

    /// A follower whose cache is published, without a proof: it goes on from the cached place. `known` as in [`Follower::new`].
    pub fn from_cache(cached: Position, known: Option<Position>) -> Self {
        let number = cached.revision.number;
        let ahead = known.filter(|known| known.revision.number > number);
        Self { cached: true, ahead, policy: number, ..Self::new(Some(cached)) }
    }

    /// A follower that follows nothing until the store is seen to be adopted from the history of that place.
    pub fn in_quarantine(stood: Position, reason: String) -> Self {
        let problem = Some(reason.clone());
        Self { state: State::Quarantined, reason: Some(reason), problem, ..Self::new(Some(stood)) }
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

    /// Where it stood when it was quarantined, or stands.
    pub fn stood(&self) -> Option<&Position> {
        self.position.as_ref()
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
            (State::Quarantined, Some(_)) => Request::Adoption,
            (State::Quarantined, None) => Request::Nothing,
            (State::Bootstrapping, Some(position)) if self.cached => {
                Request::Poll { after: position.revision.number, at_once: self.behind_head }
            }
            (State::Following, Some(position)) => Request::Poll { after: position.revision.number, at_once: self.behind_head },
            _ => Request::Load,
        }
    }

    /// Takes an event in.
    pub fn on(&mut self, event: Event) -> Option<Action> {
        match event {
            event if self.state != State::Quarantined => self.on_followed(event),
            Event::Adoption { sent_at, adopted: Some(adopted) } => self.on_adopted(sent_at, *adopted),
            Event::AdoptionFailed(error) => {
                self.stay(&error.to_string());
                None
            }
            Event::Published(result) => {
                self.on_adopted_published(result);
                None
            }
            _ => None,
        }
    }

    fn on_followed(&mut self, event: Event) -> Option<Action> {
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
            Event::Adoption { .. } | Event::AdoptionFailed(_) => None,
        }
    }

    /// INVARIANT: nothing else leads out of quarantine. An operator's record says that the store comes from what was followed, all that
    /// was known to be revoked is revoked in it, and what was answered before is older than the bound.
    fn on_adopted(&mut self, sent_at: Now, adopted: Adopted) -> Option<Action> {
        let Adopted { lineage, state, known } = adopted;
        let stood = self.position.clone()?;
        let kinship = lineage.kinship(&stood.revision, &stood.hash);
        if kinship == Kinship::Stranger || state.revision.history != lineage.revision.history {
            return None;
        }
        // A decision that began before may still look at what is published, and must not see its proof hold.
        if self.proof.is_some_and(|proof| sent_at.ms_since(proof) < self.bound_ms) {
            return None;
        }
        if !state.has_its_digest() {
            self.stay("the rows of the adopted store do not have the digest that was stored with them");
            return None;
        }
        if kinship == Kinship::Lacks {
            let is_whole = |known: &Known| known.number >= stood.revision.number;
            // After a restart there is no more than was kept.
            if self.proof.is_some() && !known.as_ref().is_some_and(is_whole) {
                self.stay(
                    "the cache does not hold all that this replica knew: restart it, to merge and follow with what it holds",
                );
                return None;
            }
            let known = known.map(|known| known.rows).unwrap_or_default();
            let missing = lineage::lacking(&known, &state.revocations);
            if let Some(first) = missing.first() {
                let target = &first.target;
                self.stay(&format!("{} of what is revoked here is not in the adopted store, `{target}` first", missing.len()));
                return None;
            }
        }
        self.replace(sent_at, Box::new(state))
    }

    fn on_adopted_published(&mut self, result: Result<(), String>) {
        match (self.pending.take(), result) {
            (Some(pending), Ok(())) => {
                self.reason = None;
                self.pending = Some(pending);
                self.on_published(Ok(()));
            }
            // Nothing of the new history was published.
            (_, Err(problem)) => self.stay(&problem),
            (None, Ok(())) => {}
        }
    }

    /// What keeps it in quarantine although the store may have been adopted.
    fn stay(&mut self, why: &str) {
        self.problem = Some(match &self.reason {
            Some(reason) => format!("{reason}; {why}"),
            None => why.to_owned(),
        });
    }

    fn on_loaded(&mut self, sent_at: Now, state: Box<store::State>) -> Option<Action> {
        let position = Position { revision: state.revision.clone(), hash: state.hash };
        let number = position.revision.number;
        if let Some(contradicted) = self.against_ahead(number, &[(number, position.hash)]) {
            return Some(contradicted);
        }
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
        self.pending = Some(Pending { position, full: true, proof: Some(proof), bound_ms: state.settings.freshness_bound_ms });
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
        if let Some(contradicted) = self.against_ahead(changes.head, &hashes(changes)) {
            return Some(contradicted);
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
        let follows = self.state == State::Following || self.cached;
        let ours = self.position.as_ref().filter(|_| follows)?;
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
        if let Some(contradicted) = self.against_ahead(changes.head, &hashes(&changes)) {
            return Some(contradicted);
        }
        let ours = self.position.as_ref()?;
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
        let proof = if frozen { self.proof } else { Some(self.later(sent_at)) };
        if changes.commits.is_empty() {
            self.proof = proof;
            self.settled();
            if self.policy == last.revision.number {
                self.problem = None;
            }
            return Some(Action::Refresh { proof: proof.unwrap_or(UNPROVED) });
        }
        self.pending = Some(Pending { position: last, full: false, proof, bound_ms: self.bound_ms });
        Some(Action::Apply { commits: changes.commits, proof: proof.unwrap_or(UNPROVED) })
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
        self.failures = 0;
        self.bound_ms = pending.bound_ms;
        self.position = Some(pending.position);
        self.proof = pending.proof;
        // A cache that has not reached the head of the store yet stays unproved.
        if self.proof.is_some() {
            self.settled();
        }
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
            store::Error::BelowFloor { .. } | store::Error::Corrupt(_) if self.state == State::Following || self.cached => {
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

    fn settled(&mut self) {
        self.state = State::Following;
        self.cached = false;
        let number = self.position.as_ref().map_or(0, |position| position.revision.number);
        self.ahead = self.ahead.take().filter(|ahead| ahead.revision.number > number);
    }

    /// The place ahead of a cached one: a store that does not reach it, or holds another revision of its number, is not followed.
    fn against_ahead(&mut self, head: u64, rows: &[(u64, [u8; 32])]) -> Option<Action> {
        let ahead = self.ahead.as_ref()?;
        let number = ahead.revision.number;
        let another = rows.iter().any(|(of, hash)| *of == number && *hash != ahead.hash);
        match head < number {
            true => self.fell(head),
            false if another => self.forked(number),
            false => None,
        }
    }

    /// The proof stays where it is until a full state is published.
    fn out_of_step(&mut self, problem: String) {
        self.state = State::Resync;
        self.cached = false;
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
        self.reason = Some(reason.clone());
        Some(Action::Quarantine { reason })
    }

    /// A proof never falls, should answers overtake each other.
    fn later(&self, sent_at: Now) -> Now {
        self.proof.filter(|proof| proof.boot_ns > sent_at.boot_ns).unwrap_or(sent_at)
    }
}

/// Numbers and hashes of the rows of an answer.
fn hashes(changes: &Changes) -> Vec<(u64, [u8; 32])> {
    let head = (changes.head, changes.head_hash);
    changes.commits.iter().map(|commit| (commit.number, commit.hash)).chain([head]).collect()
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
