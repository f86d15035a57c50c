//! What must hold of a history, whatever happened in it. Pure: a history in, the first broken promise out.
//!
//! A history is the tree of all commits that ever were, with who was permitted what at each, and what gateways, replicas and
//! the end of the run saw. Times are true ones. Look next at
//! `checker/tests.rs`, where every rule meets a history that breaks it.

use std::collections::BTreeMap;
use std::fmt;

use crate::model::decision::Effect;
use crate::model::revision::Revision;

/// A commit, as the store had it.
#[derive(Clone, Debug)]
pub(super) struct Commit {
    pub(super) parent: Option<usize>,
    /// Under the history that it was made in first, others that share it after.
    pub(super) revisions: Vec<Revision>,
    pub(super) created_ns: i64,
    /// When its writer learned of it. What an asynchronous pair's new primary acknowledged binds no earlier than from when the
    /// old one fell silent: the weaker promise of that durability.
    pub(super) binds_ns: Option<i64>,
    /// When the store lost it.
    pub(super) lost_ns: Option<i64>,
    /// For each pair of chain and tool.
    pub(super) permitted: Vec<bool>,
}

/// An answer, as the gateway received it.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) replica: usize,
    pub(super) incarnation: u32,
    /// Place of chain and tool in [`Commit::permitted`].
    pub(super) pair: usize,
    pub(super) destructive: bool,
    /// The commit that had to be seen.
    pub(super) at_least: Option<usize>,
    pub(super) effect: Effect,
    /// That the replica did not get to `at_least`.
    pub(super) unavailable: bool,
    pub(super) revision: Revision,
    /// The commit that decided, if it is known; of a permit always.
    pub(super) commit: Option<usize>,
    pub(super) sent_ns: i64,
    pub(super) received_ns: i64,
    /// Sent, and the time the answer says it is valid by the gateway's clock.
    pub(super) usable_until_ns: i64,
    pub(super) age_ms: u64,
    pub(super) valid_for_ms: u64,
}

/// What a replica did.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// It published a snapshot; `None` where no commit is like it.
    Published {
        revision: Revision,
        commit: Option<usize>,
    },
    Quarantined,
}

/// A replica's step.
#[derive(Clone, Debug)]
pub(super) struct Stepped {
    pub(super) replica: usize,
    pub(super) incarnation: u32,
    pub(super) at_ns: i64,
    pub(super) step: Step,
}

/// A replica some time after the last fault.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) replica: usize,
    pub(super) quarantined: bool,
    /// Whether it is fresh, at the store's newest commit.
    pub(super) current: bool,
}

/// All that happened.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    pub(super) bound_ns: i64,
    /// What clocks may drift and simulated time is coarse.
    pub(super) slack_ns: i64,
    pub(super) commits: Vec<Commit>,
    pub(super) answers: Vec<Answer>,
    pub(super) steps: Vec<Stepped>,
    pub(super) ended: Vec<Ended>,
    /// Whether the store may have been another than was followed.
    pub(super) may_quarantine: bool,
    /// From this moment on every answer must be what the newest commit says.
    pub(super) quiet_ns: i64,
    pub(super) newest: usize,
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Violation {
    pub(super) promise: Promise,
    pub(super) what: String,
}

/// What is promised, by number in the design, or by the table of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    /// 2: no permit is usable later than acknowledgement and bound.
    Bound,
    /// A permit is what its own revision says.
    Revision,
    /// 4: never answered from before what the caller has seen.
    AtLeast,
    /// 5: a replica goes on from where it was, in one history.
    Forward,
    /// A revision has one digest.
    Digest,
    /// What each state may answer.
    States,
    /// 6: left in peace, a replica is fresh again, and right.
    Recovery,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.promise, self.what)
    }
}

fn broken(promise: Promise, what: String) -> Result<(), Violation> {
    Err(Violation { promise, what })
}

/// The age at which destructive tools are denied.
const FRESH_AGE_MS: u64 = 1_000;

/// Checks everything.
///
/// # Errors
/// The first promise that does not hold.
pub(super) fn check(history: &History) -> Result<(), Violation> {
    replicas_go_forward(history)?;
    for answer in history.answers.iter().filter(|answer| answer.effect != Effect::Deny) {
        of_its_revision(history, answer)?;
        as_its_state_may(history, answer)?;
    }
    quarantine_denies(history)?;
    history.answers.iter().try_for_each(|answer| at_least(history, answer))?;
    within_the_bound(history)?;
    all_recover(history)
}

fn replicas_go_forward(history: &History) -> Result<(), Violation> {
    let mut last: BTreeMap<usize, (usize, &Revision)> = BTreeMap::new();
    for Stepped { replica, incarnation, at_ns, step } in &history.steps {
        let Step::Published { revision, commit } = step else { continue };
        let Some(commit) = *commit else {
            return broken(Promise::Digest, format!("replica {replica}.{incarnation} at {at_ns}: no commit is like {revision}"));
        };
        if !history.commits[commit].revisions.contains(revision) {
            return broken(
                Promise::Digest,
                format!("replica {replica}.{incarnation} at {at_ns}: {revision} is not commit {commit}"),
            );
        }
        let goes_on = |(before, seen): (usize, &Revision)| seen.history == revision.history && history.contains(commit, before);
        let before = last.insert(*replica, (commit, revision));
        if !before.is_none_or(goes_on) {
            let what = format!("replica {replica}.{incarnation} at {at_ns}: from {before:?} to {revision} (commit {commit})");
            return broken(Promise::Forward, what);
        }
    }
    Ok(())
}

fn of_its_revision(history: &History, answer: &Answer) -> Result<(), Violation> {
    let Some(commit) = answer.commit else {
        return broken(Promise::Digest, format!("a permit by a snapshot that no commit is like: {answer:?}"));
    };
    if !history.commits[commit].permitted[answer.pair] {
        return broken(Promise::Revision, format!("commit {commit} does not permit it: {answer:?}"));
    }
    Ok(())
}

fn as_its_state_may(history: &History, answer: &Answer) -> Result<(), Violation> {
    let bound_ms = u64::try_from(history.bound_ns / 1_000_000).unwrap();
    let limit_ms = if answer.destructive { FRESH_AGE_MS.min(bound_ms) } else { bound_ms };
    if answer.age_ms >= limit_ms {
        return broken(Promise::States, format!("a permit at an age of {limit_ms} ms or more: {answer:?}"));
    }
    if answer.valid_for_ms + answer.age_ms > bound_ms {
        return broken(Promise::States, format!("a permit valid past the bound: {answer:?}"));
    }
    Ok(())
}

fn quarantine_denies(history: &History) -> Result<(), Violation> {
    for stepped in history.steps.iter().filter(|stepped| matches!(stepped.step, Step::Quarantined)) {
        let same = |answer: &&Answer| (answer.replica, answer.incarnation) == (stepped.replica, stepped.incarnation);
        let after = |answer: &&Answer| answer.sent_ns > stepped.at_ns + history.slack_ns && answer.effect != Effect::Deny;
        if let Some(answer) = history.answers.iter().filter(same).find(after) {
            return broken(Promise::States, format!("a permit in quarantine since {}: {answer:?}", stepped.at_ns));
        }
    }
    Ok(())
}

fn at_least(history: &History, answer: &Answer) -> Result<(), Violation> {
    let Some(asked) = answer.at_least.filter(|_| !answer.unavailable) else { return Ok(()) };
    let seen = &history.commits[asked];
    let number = seen.revisions[0].number;
    // A denial may name the revision of what denies. Who follows a commit that the store lost knows of others by number alone.
    let holds = match answer.commit {
        Some(commit) if seen.lost_ns.is_none() && history.commits[commit].lost_ns.is_none() => history.contains(commit, asked),
        _ => answer.revision.number >= number,
    };
    if holds { Ok(()) } else { broken(Promise::AtLeast, format!("commit {asked}, number {number}, was asked for: {answer:?}")) }
}

/// Promise 2: at no moment is a permit usable at which what it permits has been known to be denied for longer than the bound.
fn within_the_bound(history: &History) -> Result<(), Violation> {
    let pairs = history.commits.first().map_or(0, |commit| commit.permitted.len());
    for pair in 0..pairs {
        let mut denied: Vec<(usize, i64, i64)> = Vec::new();
        for (place, commit) in history.commits.iter().enumerate() {
            let Some(binds_ns) = commit.binds_ns.filter(|_| !commit.permitted[pair]) else { continue };
            let from_ns = binds_ns + history.bound_ns + history.slack_ns;
            let undone = |later: &(usize, &Commit)| later.1.permitted[pair] && history.contains(later.0, place);
            let until_ns = history.commits.iter().enumerate().skip(place).find(undone).map(|(_, later)| later.created_ns);
            let until_ns = until_ns.unwrap_or(i64::MAX).min(commit.lost_ns.unwrap_or(i64::MAX));
            denied.push((place, from_ns, until_ns.saturating_sub(history.slack_ns)));
        }
        for answer in history.answers.iter().filter(|answer| answer.pair == pair && answer.effect != Effect::Deny) {
            let usable = |(_, from_ns, until_ns): &&(usize, i64, i64)| {
                answer.received_ns.max(*from_ns) < answer.usable_until_ns.min(*until_ns)
            };
            if let Some((commit, from_ns, until_ns)) = denied.iter().find(usable) {
                let what = format!("denied by commit {commit}, so not usable from {from_ns} until {until_ns}: {answer:?}");
                return broken(Promise::Bound, what);
            }
        }
    }
    Ok(())
}

fn all_recover(history: &History) -> Result<(), Violation> {
    for ended in &history.ended {
        if ended.quarantined && !history.may_quarantine {
            return broken(Promise::Recovery, format!("quarantined by the store that it followed: {ended:?}"));
        }
        if !ended.quarantined && !ended.current {
            return broken(Promise::Recovery, format!("not fresh again: {ended:?}"));
        }
    }
    let newest = &history.commits.get(history.newest);
    for answer in history.answers.iter().filter(|answer| answer.sent_ns >= history.quiet_ns) {
        let quarantined = history.ended.iter().any(|ended| ended.replica == answer.replica && ended.quarantined);
        let expected = newest.is_some_and(|newest| newest.permitted[answer.pair]) && !quarantined;
        if answer.effect != Effect::Deny && !expected || expected && answer.effect == Effect::Deny && !answer.destructive {
            return broken(Promise::Recovery, format!("long after the last fault, {expected} was expected: {answer:?}"));
        }
    }
    Ok(())
}

impl History {
    /// Whether a commit is another one or comes after it.
    fn contains(&self, commit: usize, earlier: usize) -> bool {
        let mut place = Some(commit);
        while let Some(at) = place.filter(|at| *at >= earlier) {
            if at == earlier {
                return true;
            }
            place = self.commits[at].parent;
        }
        false
    }
}

#[cfg(test)]
mod tests;
