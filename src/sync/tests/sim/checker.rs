//! The promises that must hold of every history. Pure: it takes a history and returns the first broken promise.
//!
//! A history is the tree of all commits, with the calls that each of them permits. It also holds the observations of gateways,
//! replicas and the end of the run. Its times are real simulated times, not those of a machine's clock.
//!
//! Look next at `checker/tests.rs`, which breaks every rule with a small history.

use std::collections::BTreeMap;
use std::fmt;

use super::store::RevokeAllChange;
use crate::model::decision::Effect;
use crate::model::limits::TWO_PERSON_WINDOW_MS;
use crate::model::revision::Revision;

/// A commit as the store had it.
#[derive(Clone, Debug)]
pub(super) struct CommitFacts {
    pub(super) parent: Option<usize>,
    /// The commit's revisions: first in the history that made it, then in the histories that share it.
    pub(super) revisions: Vec<Revision>,
    pub(super) created_ns: i64,
    /// The time at which its writer learned of it. In an asynchronous pair, a commit that the new primary acknowledged binds only
    /// from the moment at which the old primary fell silent. That is the weaker promise of this durability.
    pub(super) binds_ns: Option<i64>,
    /// The time at which the store lost it.
    pub(super) lost_ns: Option<i64>,
    /// For each pair of chain and tool: whether a revocation denies it.
    pub(super) revoked: Vec<bool>,
    /// For each pair: whether policy allows it.
    pub(super) allowed: Vec<bool>,
    /// Whether its policy can be built. If not, the last good policy stays in force.
    pub(super) builds: bool,
    /// Its changes to the revocation of everything, in order.
    pub(super) all: Vec<RevokeAllChange>,
    /// The commit time by the store's clock.
    pub(super) unix_ms: i64,
}

impl CommitFacts {
    fn permits(&self, pair: usize) -> bool {
        self.allowed[pair] && !self.revoked[pair]
    }

    /// Whether a pair may be permitted: by this policy, or by an older one if this policy cannot be built.
    fn may_permit(&self, pair: usize) -> bool {
        !self.revoked[pair] && (self.allowed[pair] || !self.builds)
    }
}

/// An answer as the gateway received it.
#[derive(Clone, Debug)]
pub(super) struct ObservedAnswer {
    pub(super) replica: usize,
    pub(super) incarnation: u32,
    /// The index of chain and tool in [`CommitFacts::revoked`] and [`CommitFacts::allowed`].
    pub(super) pair: usize,
    pub(super) destructive: bool,
    /// The commit that the answer had to cover.
    pub(super) at_least: Option<usize>,
    pub(super) effect: Effect,
    /// Whether the replica did not reach `at_least`.
    pub(super) unavailable: bool,
    pub(super) revision: Revision,
    /// The commit that decided, if it is known. It is always known for a permit.
    pub(super) commit: Option<usize>,
    /// The commit whose policy decided, if it is known.
    pub(super) policy: Option<usize>,
    pub(super) sent_ns: i64,
    /// The time at which the answer left its handler.
    pub(super) answered_ns: i64,
    pub(super) received_ns: i64,
    /// The time until which the gateway may use the answer: its own sending time plus `valid_for_ms`.
    pub(super) usable_until_ns: i64,
    pub(super) age_ms: u64,
    pub(super) valid_for_ms: u64,
}

/// A step of a replica.
#[derive(Clone, Debug)]
pub(super) enum ReplicaStep {
    /// The replica published a snapshot. `commit` is `None` if no commit matches it.
    Published {
        revision: Revision,
        commit: Option<usize>,
        /// The commit whose policy is in force.
        policy: Option<usize>,
    },
    /// The replica recorded its position at this commit on disk, so a restart knows it.
    Kept(usize),
    Quarantined,
}

/// A step of a replica, with its time and process.
#[derive(Clone, Debug)]
pub(super) struct RecordedStep {
    pub(super) replica: usize,
    pub(super) incarnation: u32,
    pub(super) at_ns: i64,
    pub(super) step: ReplicaStep,
}

/// A revocation whose writer waited for the fleet.
#[derive(Clone, Debug)]
pub(super) struct FleetWait {
    /// The commit that the wait is for.
    pub(super) commit: usize,
    pub(super) began_ns: i64,
    /// The time at which the wait returned, and whether it reported that no replica answers from before any more.
    pub(super) returned: Option<(i64, bool)>,
}

/// A replica some time after the last fault.
#[derive(Clone, Debug)]
pub(super) struct ReplicaEndState {
    pub(super) replica: usize,
    pub(super) quarantined: bool,
    /// Whether it is fresh and at the store's newest commit.
    pub(super) current: bool,
}

/// The whole history of a run.
#[derive(Clone, Debug, Default)]
pub(super) struct RunHistory {
    pub(super) bound_ns: i64,
    /// Tolerance for clock drift and for the granularity of simulated time.
    pub(super) slack_ns: i64,
    pub(super) commits: Vec<CommitFacts>,
    pub(super) answers: Vec<ObservedAnswer>,
    pub(super) steps: Vec<RecordedStep>,
    pub(super) waits: Vec<FleetWait>,
    /// The time by which the last wait must have returned.
    pub(super) end_ns: i64,
    pub(super) ended: Vec<ReplicaEndState>,
    /// Whether a replica may have met another store than the one it followed.
    pub(super) may_quarantine: bool,
    /// From this time on, every answer must match the newest commit.
    pub(super) quiet_ns: i64,
    pub(super) newest: usize,
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Violation {
    pub(super) promise: Promise,
    pub(super) what: String,
}

/// The promises, by their number in the design or by the table of replica states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    /// 2: no permit is usable later than the acknowledgement plus the bound.
    Bound,
    /// 3: a wait for the fleet returns in time, and no later decision permits the revoked call.
    Fleet,
    /// A permit matches the revision that it names.
    Revision,
    /// A policy that cannot be built leaves the last good policy in force, and no other.
    LastGood,
    /// Reinstating everything takes two operators.
    TwoOperators,
    /// 4: no answer comes from before the revision that the caller has seen.
    AtLeast,
    /// 5: a replica continues from its last position, in one history.
    Forward,
    /// A revision has one digest.
    Digest,
    /// Each replica state answers only as its table allows.
    States,
    /// 6: after the last fault, a replica becomes fresh again and answers correctly.
    Recovery,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.promise, self.what)
    }
}

fn broken_promise(promise: Promise, what: String) -> Result<(), Violation> {
    Err(Violation { promise, what })
}

/// The time beyond the bound that a wait for the fleet may take.
const WAIT_MARGIN_NS: i64 = 200_000_000;
/// After this number of steps, a replica must have recorded the first of them.
const KEPT_AFTER_STEPS: usize = 20;
/// The age at which destructive tools are denied.
const FRESH_AGE_MS: u64 = 1_000;

/// Checks all promises.
///
/// # Errors
/// The first promise that does not hold.
pub(super) fn check(history: &RunHistory) -> Result<(), Violation> {
    replicas_go_forward(history)?;
    two_operators(history)?;
    for answer in history.answers.iter().filter(|answer| answer.effect != Effect::Deny) {
        of_its_revision(history, answer)?;
        as_its_state_may(history, answer)?;
    }
    quarantine_denies(history)?;
    history.answers.iter().try_for_each(|answer| at_least(history, answer))?;
    within_the_bound(history)?;
    history.waits.iter().try_for_each(|wait| check_fleet_wait(history, wait))?;
    all_recover(history)
}

/// The last observation of a replica: its commit, its process, and the commit of the policy in force.
#[derive(Clone, Copy)]
struct LastSeen<'a> {
    incarnation: u32,
    commit: usize,
    revision: &'a Revision,
    policy: usize,
}

fn replicas_go_forward(history: &RunHistory) -> Result<(), Violation> {
    let mut last: BTreeMap<usize, LastSeen<'_>> = BTreeMap::new();
    let mut kept: BTreeMap<usize, usize> = BTreeMap::new();
    let mut lately: BTreeMap<(usize, u32), Vec<usize>> = BTreeMap::new();
    for RecordedStep { replica, incarnation, at_ns, step } in &history.steps {
        let who = || format!("replica {replica}.{incarnation} at {at_ns}");
        let (revision, commit, policy) = match step {
            ReplicaStep::Published { revision, commit, policy } => (revision, *commit, *policy),
            ReplicaStep::Kept(commit) => {
                kept.insert(*replica, *commit);
                continue;
            }
            ReplicaStep::Quarantined => continue,
        };
        let (Some(commit), Some(policy)) = (commit, policy) else {
            return broken_promise(Promise::Digest, format!("{}: no commit is like {revision}", who()));
        };
        if !history.commits[commit].revisions.contains(revision) {
            return broken_promise(Promise::Digest, format!("{}: {revision} is not commit {commit}", who()));
        }
        let before = last.insert(*replica, LastSeen { incarnation: *incarnation, commit, revision, policy });
        let same = before.filter(|before| before.incarnation == *incarnation);
        if policy != if history.commits[commit].builds { commit } else { same.map_or(usize::MAX, |same| same.policy) } {
            return broken_promise(
                Promise::LastGood,
                format!("{}: the policy of commit {policy} is in force at {commit}", who()),
            );
        }
        // A restart knows the recorded position. If the store cannot roll back, the replica continues from its last position anyway.
        let strict = before.filter(|_| same.is_some() || !history.may_quarantine);
        let goes_on =
            |before: LastSeen<'_>| before.revision.history == revision.history && history.contains(commit, before.commit);
        let knows = kept.get(replica).is_none_or(|kept| history.contains(commit, *kept));
        if !strict.is_none_or(goes_on) || !knows {
            let before = before.map(|before| (before.incarnation, before.commit, before.revision));
            let what = format!("{}: from {before:?}, kept {:?}, to {revision} (commit {commit})", who(), kept.get(replica));
            return broken_promise(Promise::Forward, what);
        }
        // After so many steps, the replica must have recorded the earliest of them.
        let lately = lately.entry((*replica, *incarnation)).or_default();
        lately.push(commit);
        if let Some(before) = lately.len().checked_sub(KEPT_AFTER_STEPS).map(|place| lately[place]) {
            let kept = kept.entry(*replica).or_insert(before);
            *kept = before.max(*kept);
        }
    }
    Ok(())
}

/// The operator who lifts the revocation of everything differs from the one who asked for it. The request is recent and follows
/// the last revocation of everything.
fn two_operators(history: &RunHistory) -> Result<(), Violation> {
    for (place, commit) in history.commits.iter().enumerate() {
        for (act, of_all) in commit.all.iter().enumerate() {
            let RevokeAllChange::Lifted(second) = of_all else { continue };
            let mut before = commit.all[..act].iter().rev().map(|act| (act, commit.unix_ms)).collect::<Vec<_>>();
            let path = std::iter::successors(commit.parent, |place| history.commits[*place].parent);
            let earlier = path.map(|place| &history.commits[place]);
            before.extend(earlier.flat_map(|commit| commit.all.iter().rev().map(|act| (act, commit.unix_ms))));
            let asked = before.iter().take_while(|(act, _)| matches!(act, RevokeAllChange::Asked(_))).any(|(act, unix_ms)| {
                let age_ms = commit.unix_ms - unix_ms;
                **act != RevokeAllChange::Asked(second.clone()) && age_ms < TWO_PERSON_WINDOW_MS
            });
            if !asked {
                return broken_promise(Promise::TwoOperators, format!("commit {place} lets everything in by {second} alone"));
            }
        }
    }
    Ok(())
}

fn of_its_revision(history: &RunHistory, answer: &ObservedAnswer) -> Result<(), Violation> {
    let (Some(commit), Some(policy)) = (answer.commit, answer.policy) else {
        return broken_promise(Promise::Digest, format!("a permit by a snapshot that no commit is like: {answer:?}"));
    };
    if history.commits[commit].revoked[answer.pair] || !history.commits[policy].allowed[answer.pair] {
        return broken_promise(Promise::Revision, format!("commit {commit} with policy {policy} does not permit it: {answer:?}"));
    }
    Ok(())
}

fn as_its_state_may(history: &RunHistory, answer: &ObservedAnswer) -> Result<(), Violation> {
    let bound_ms = u64::try_from(history.bound_ns / 1_000_000).unwrap();
    let limit_ms = if answer.destructive { FRESH_AGE_MS.min(bound_ms) } else { bound_ms };
    if answer.age_ms >= limit_ms {
        return broken_promise(Promise::States, format!("a permit at an age of {limit_ms} ms or more: {answer:?}"));
    }
    if answer.valid_for_ms + answer.age_ms > bound_ms {
        return broken_promise(Promise::States, format!("a permit valid past the bound: {answer:?}"));
    }
    Ok(())
}

fn quarantine_denies(history: &RunHistory) -> Result<(), Violation> {
    for stepped in history.steps.iter().filter(|stepped| matches!(stepped.step, ReplicaStep::Quarantined)) {
        let same = |answer: &&ObservedAnswer| (answer.replica, answer.incarnation) == (stepped.replica, stepped.incarnation);
        let after = |answer: &&ObservedAnswer| answer.sent_ns > stepped.at_ns + history.slack_ns && answer.effect != Effect::Deny;
        if let Some(answer) = history.answers.iter().filter(same).find(after) {
            return broken_promise(Promise::States, format!("a permit in quarantine since {}: {answer:?}", stepped.at_ns));
        }
    }
    Ok(())
}

fn at_least(history: &RunHistory, answer: &ObservedAnswer) -> Result<(), Violation> {
    let Some(asked) = answer.at_least.filter(|_| !answer.unavailable) else { return Ok(()) };
    let seen = &history.commits[asked];
    let number = seen.revisions[0].number;
    // A denial may name the revision of a later revocation. After a lost commit, commits can be compared by number alone.
    let holds = match answer.commit {
        Some(commit) if seen.lost_ns.is_none() && history.commits[commit].lost_ns.is_none() => history.contains(commit, asked),
        _ => answer.revision.number >= number,
    };
    let policy_holds = answer.policy.is_none_or(|policy| history.commits[policy].revisions[0].number >= number);
    if holds && policy_holds {
        return Ok(());
    }
    broken_promise(Promise::AtLeast, format!("commit {asked}, number {number}, was asked for: {answer:?}"))
}

/// Promise 2: no permit is usable at a moment at which its call has been denied, and known to be, for longer than the bound.
fn within_the_bound(history: &RunHistory) -> Result<(), Violation> {
    let pairs = history.commits.first().map_or(0, |commit| commit.revoked.len());
    for pair in 0..pairs {
        let mut denied: Vec<(usize, i64, i64)> = Vec::new();
        for (place, commit) in history.commits.iter().enumerate() {
            let Some(binds_ns) = commit.binds_ns.filter(|_| !commit.may_permit(pair)) else { continue };
            let from_ns = binds_ns + history.bound_ns + history.slack_ns;
            let until_ns = history.until_ns(place, |later| later.may_permit(pair));
            denied.push((place, from_ns, until_ns));
        }
        for answer in history.answers.iter().filter(|answer| answer.pair == pair && answer.effect != Effect::Deny) {
            let usable = |(_, from_ns, until_ns): &&(usize, i64, i64)| {
                answer.received_ns.max(*from_ns) < answer.usable_until_ns.min(*until_ns)
            };
            if let Some((commit, from_ns, until_ns)) = denied.iter().find(usable) {
                let what = format!("denied by commit {commit}, so not usable from {from_ns} until {until_ns}: {answer:?}");
                return broken_promise(Promise::Bound, what);
            }
        }
    }
    Ok(())
}

/// Promise 3. An answer that left its handler before the wait returned may arrive later. An answer that has expired on arrival is
/// no permit.
fn check_fleet_wait(history: &RunHistory, wait: &FleetWait) -> Result<(), Violation> {
    let due_ns = wait.began_ns + history.bound_ns + WAIT_MARGIN_NS + history.slack_ns;
    let Some((returned_ns, said)) = wait.returned.filter(|(returned_ns, _)| *returned_ns <= due_ns) else {
        if wait.returned.is_none() && due_ns > history.end_ns {
            return Ok(());
        }
        return broken_promise(Promise::Fleet, format!("not back by {due_ns}: {wait:?}"));
    };
    for pair in (0..history.commits[wait.commit].revoked.len()).filter(|pair| said && history.commits[wait.commit].revoked[*pair])
    {
        let until_ns = history.until_ns(wait.commit, |later| !later.revoked[pair]);
        let after = |at_ns: i64| at_ns > returned_ns + history.slack_ns;
        let wrong = |answer: &&ObservedAnswer| {
            let usable = answer.received_ns < answer.usable_until_ns && after(answer.answered_ns);
            answer.pair == pair
                && answer.effect != Effect::Deny
                && answer.answered_ns < until_ns
                && (usable || after(answer.sent_ns))
        };
        if let Some(answer) = history.answers.iter().find(wrong) {
            return broken_promise(Promise::Fleet, format!("permitted after {wait:?} and before {until_ns}: {answer:?}"));
        }
    }
    Ok(())
}

fn all_recover(history: &RunHistory) -> Result<(), Violation> {
    for ended in &history.ended {
        if ended.quarantined && !history.may_quarantine {
            return broken_promise(Promise::Recovery, format!("quarantined by the store that it followed: {ended:?}"));
        }
        if !ended.quarantined && !ended.current {
            return broken_promise(Promise::Recovery, format!("not fresh again: {ended:?}"));
        }
    }
    let newest = &history.commits.get(history.newest);
    for answer in history.answers.iter().filter(|answer| answer.sent_ns >= history.quiet_ns) {
        let quarantined = history.ended.iter().any(|ended| ended.replica == answer.replica && ended.quarantined);
        let expected = newest.is_some_and(|newest| newest.permits(answer.pair)) && !quarantined;
        if answer.effect != Effect::Deny && !expected || expected && answer.effect == Effect::Deny && !answer.destructive {
            return broken_promise(Promise::Recovery, format!("long after the last fault, {expected} was expected: {answer:?}"));
        }
    }
    Ok(())
}

impl RunHistory {
    /// The time until which a commit's statement holds: a later commit undoes it, or the store loses the commit.
    fn until_ns(&self, place: usize, undoes: impl Fn(&CommitFacts) -> bool) -> i64 {
        let later = self.commits.iter().enumerate().skip(place);
        let undone = later.filter(|(_, later)| undoes(later)).find(|(later, _)| self.contains(*later, place));
        let until_ns = undone.map_or(i64::MAX, |(_, later)| later.created_ns);
        until_ns.min(self.commits[place].lost_ns.unwrap_or(i64::MAX)).saturating_sub(self.slack_ns)
    }

    /// Whether a commit is the other one or a descendant of it.
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
