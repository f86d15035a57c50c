//! Lists the replicas of a store, and waits until no replica answers from before a revision any more.
//!
//! The wait for a replica ends in one of three cases: it acknowledges the revision, it is in quarantine and denies everything, or
//! its proof of freshness expires. A proof from after the commit would have brought the commit with it. So a replica without the
//! commit can only have an older proof, which expires after the freshness bound. Therefore no wait is longer than the bound.
//!
//! A replica that this process has not heard for longer than the bound is not waited for at all. Silence is measured by the clock
//! of this process, because the store's clock may be set. Look next at `sync/acknowledger.rs`, which decides when a replica
//! acknowledges.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::{AdministrationPoint, AuthorizedAct, Error};
use crate::model::ids::Thumbprint;
use crate::model::mutant::{Mutant, is_active};
use crate::model::replica::{FleetStatus, ReplicaSummary, ReplicaWaitOutcome};
use crate::model::revision::Revision;
use crate::model::time::ClockReading;
use crate::store::fleet::{HEARTBEAT_INTERVAL_MS, ReplicaList};
use crate::store::{self, ReplicaState};

/// The maximum number of concurrent waits.
const WAITS_MAX: usize = 16;
/// The pause between two reads of the rows.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The slots of concurrent waits. A key may hold at most as many slots as are free, so that no key can keep all others from
/// waiting.
#[derive(Debug, Default)]
pub(super) struct WaitSlots {
    /// The signing key of each wait; `None` for a wait without a signature.
    taken: Mutex<Vec<Option<Thumbprint>>>,
}

/// The slot of one wait, released on drop.
#[derive(Debug)]
pub(super) struct WaitSlot<'a> {
    slots: &'a WaitSlots,
    key: Option<Thumbprint>,
}

impl WaitSlots {
    /// Takes a slot. `None` if the share of the signing key is full.
    pub(super) fn acquire(&self, by: &AuthorizedAct) -> Option<WaitSlot<'_>> {
        self.acquire_for_key(by.keys().first().cloned())
    }

    fn acquire_for_key(&self, key: Option<Thumbprint>) -> Option<WaitSlot<'_>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.iter().filter(|other| **other == key).count();
        if own >= WAITS_MAX.saturating_sub(taken.len()) {
            return None;
        }
        taken.push(key.clone());
        Some(WaitSlot { slots: self, key })
    }
}

impl Drop for WaitSlot<'_> {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = taken.iter().position(|other| *other == self.key) {
            taken.swap_remove(index);
        }
    }
}

/// The result of a wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetWaitReport {
    /// The revision that the wait was for.
    pub revision: Revision,
    /// The freshness bound of the store. A replica that is not heard denies after this time.
    pub freshness_bound_ms: u64,
    /// The duration of the wait.
    pub waited_ms: u64,
    /// Every replica that was registered when the wait began, sorted by id.
    pub replicas: Vec<(ReplicaSummary, ReplicaWaitOutcome)>,
}

impl AdministrationPoint {
    /// The replicas that follow the store.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn replicas(&self, by: &AuthorizedAct) -> Result<FleetStatus, Error> {
        let fleet = self.store.replicas().await?.to_fleet();
        self.record_act(by, None, "read")?;
        Ok(fleet)
    }

    /// Waits until no replica answers from before a revision any more, at most for the store's freshness bound.
    ///
    /// `committed_unix_ms` is the commit time that the commit returned. It serves only to compute how long each replica took.
    ///
    /// # Errors
    /// - [`Error::CannotAnswer`] if the store may lose the commit, or if too many callers wait.
    /// - [`Error::InvalidArgument`] for a revision that the store does not hold.
    /// - An error of the store if it cannot be read even once.
    pub async fn wait_for_fleet(
        &self,
        by: &AuthorizedAct,
        revision: &Revision,
        committed_unix_ms: i64,
    ) -> Result<FleetWaitReport, Error> {
        if let Some(why) = self.store.may_lose_commits() {
            return Err(Error::CannotAnswer(format!(
                "`{why}`: a failover may lose the revision after every replica acknowledged it, so nobody can say what the fleet \
                 answers; it is written all the same"
            )));
        }
        let Some(_waiting) = self.wait_slots.acquire(by) else {
            return Err(Error::CannotAnswer(
                "others wait for the fleet, or this key does, and as many as may: ask again".to_owned(),
            ));
        };
        let began = self.clock.now();
        let first = self.store.replicas().await?;
        let newest = &first.revision;
        if newest.history != revision.history || newest.number < revision.number {
            let message = format!("`{revision}` is not committed: the store is at `{newest}`");
            return Err(Error::InvalidArgument { field: "revision", message });
        }
        self.record_wait(by, revision, "wait");
        let bound_ms = first.freshness_bound_ms;
        let mut wait = FleetWaitProgress::new(revision.number, committed_unix_ms, &first);
        wait.observe(&first, &self.silent_replicas(&first, began));
        loop {
            let waited_ms = self.clock.now().boot_elapsed_ms_since(began);
            if let Some(replicas) = wait.finished_outcomes(waited_ms) {
                let revision = revision.clone();
                return Ok(FleetWaitReport { revision, freshness_bound_ms: bound_ms, waited_ms, replicas });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
            // If the store can no longer be read, the proofs of the replicas still expire at the same time.
            let left = Duration::from_millis(bound_ms.saturating_sub(self.clock.now().boot_elapsed_ms_since(began)));
            let asked = self.clock.now();
            if let Ok(Ok(replicas)) = tokio::time::timeout(left, self.store.replicas()).await {
                wait.observe(&replicas, &self.silent_replicas(&replicas, asked));
            }
        }
    }

    fn silent_replicas(&self, rows: &ReplicaList, asked: ClockReading) -> BTreeSet<String> {
        self.silence_tracker.lock().unwrap_or_else(PoisonError::into_inner).observe(rows, asked, self.clock.now())
    }
}

/// The start of each replica's silence, as far as this process has seen it.
#[derive(Debug, Default)]
pub(super) struct SilenceTracker(BTreeMap<String, (HeartbeatMark, ClockReading)>);

/// The values of a row that change with each heartbeat.
type HeartbeatMark = (i64, u64, u64);

impl SilenceTracker {
    /// Observes the rows and returns the replicas whose proof has expired. Silence counts from the end of one read to the start
    /// of a later one.
    fn observe(&mut self, rows: &ReplicaList, asked: ClockReading, answered: ClockReading) -> BTreeSet<String> {
        let known = std::mem::take(&mut self.0);
        let bound_ms = if is_active(Mutant::SilentRanOut) { 0 } else { rows.freshness_bound_ms };
        // If a read of the store is a proof, the newest proof may be younger than the newest heartbeat by up to one heartbeat
        // interval.
        let bound_ms = bound_ms.saturating_add(HEARTBEAT_INTERVAL_MS);
        let mut silent = BTreeSet::new();
        for row in &rows.rows {
            let (name, mark) = (&row.registration.incarnation, (row.seen_unix_ms, row.applied_number, row.acked_number));
            let since = known.get(name).filter(|(before, _)| *before == mark).map_or(answered, |(_, since)| *since);
            if asked.boot_elapsed_ms_since(since) >= bound_ms {
                silent.insert(name.clone());
            }
            self.0.insert(name.clone(), (mark, since));
        }
        silent
    }
}

/// The progress of the replicas in a wait.
#[derive(Debug)]
struct FleetWaitProgress {
    number: u64,
    committed_unix_ms: i64,
    bound_ms: u64,
    replicas: BTreeMap<String, ReplicaProgress>,
}

/// A replica in a wait; `outcome` is set once the wait for it has ended.
#[derive(Debug)]
struct ReplicaProgress {
    listed: ReplicaSummary,
    outcome: Option<ReplicaWaitOutcome>,
}

impl FleetWaitProgress {
    fn new(number: u64, committed_unix_ms: i64, first: &ReplicaList) -> Self {
        let bound_ms = first.freshness_bound_ms;
        let seen = first.rows.iter().map(|row| {
            let listed = row.to_summary(first.unix_ms, bound_ms);
            (listed.id.clone(), ReplicaProgress { listed, outcome: None })
        });
        Self { number, committed_unix_ms, bound_ms, replicas: seen.collect() }
    }

    /// Observes the rows. The proofs of the `silent` replicas have expired. A replica that registers later, or is heard again,
    /// loads a state that holds the revision.
    fn observe(&mut self, now: &ReplicaList, silent: &BTreeSet<String>) {
        for row in &now.rows {
            let Some(seen) = self.replicas.get_mut(&row.registration.incarnation) else { continue };
            if seen.outcome.is_some() {
                continue;
            }
            seen.listed = row.to_summary(now.unix_ms, self.bound_ms);
            seen.outcome = if row.state == ReplicaState::Quarantined {
                Some(ReplicaWaitOutcome::Quarantined)
            } else if row.acked_number >= self.number {
                Some(ReplicaWaitOutcome::Acknowledged {
                    after_ms: acknowledged_after_ms(row, self.number, self.committed_unix_ms),
                })
            } else {
                silent.contains(&row.registration.incarnation).then_some(ReplicaWaitOutcome::RanOut)
            };
        }
    }

    /// The outcomes, once every replica has one.
    fn finished_outcomes(&self, waited_ms: u64) -> Option<Vec<(ReplicaSummary, ReplicaWaitOutcome)>> {
        let outcome = |seen: &ReplicaProgress| {
            let ran_out = waited_ms >= self.bound_ms;
            seen.outcome.or(ran_out.then_some(ReplicaWaitOutcome::RanOut)).map(|outcome| (seen.listed.clone(), outcome))
        };
        self.replicas.values().map(outcome).collect()
    }
}

/// The time from the commit to the acknowledgement, by the store's clock. If the replica acknowledged a later revision, this is
/// an upper bound.
fn acknowledged_after_ms(row: &store::ReplicaRow, number: u64, committed_unix_ms: i64) -> Option<u64> {
    let committed = row.acked_commit_unix_ms.filter(|_| row.acked_number == number).unwrap_or(committed_unix_ms);
    if committed == 0 {
        return None;
    }
    u64::try_from(row.acked_unix_ms.saturating_sub(committed).max(0)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::revision::HistoryId;
    use crate::model::time::{Clock as _, ManualClock};
    use crate::store::{ReplicaRegistration, ReplicaRow};

    const BOUND_MS: u64 = 5_000;

    #[test]
    fn no_key_takes_every_place_to_wait() {
        let slots = WaitSlots::default();
        let key = |seed| {
            let key = crate::token::PrivateKey::from_seed([seed; 32]).unwrap();
            Some(key.public_key().thumbprint().clone())
        };
        let flood =
            |key: Option<Thumbprint>| std::iter::from_fn(|| slots.acquire_for_key(key.clone())).take(99).collect::<Vec<_>>();
        let first = flood(key(1));
        let second = flood(key(2));
        assert_eq!((first.len(), second.len()), (8, 4), "each takes a half of what is free");
        assert!(slots.acquire_for_key(key(3)).is_some());
        drop(first);
        assert_eq!(flood(key(1)).len(), 6);
        drop(second);
        assert_eq!(slots.taken.lock().unwrap().len(), 0);
    }

    fn row(name: &str, acked_number: u64, silent_ms: i64, state: ReplicaState) -> ReplicaRow {
        let registration = ReplicaRegistration {
            incarnation: name.to_owned(),
            address: "node".to_owned(),
            version: "1".to_owned(),
            started_unix_ms: 0,
        };
        let acked_commit_unix_ms = (acked_number == 9).then_some(99_000);
        ReplicaRow {
            registration,
            applied_number: 9,
            acked_number,
            acked_unix_ms: 99_084,
            acked_commit_unix_ms,
            state,
            seen_unix_ms: 100_000 - silent_ms,
        }
    }

    fn rows(rows: Vec<ReplicaRow>) -> ReplicaList {
        let revision = Revision { history: HistoryId::new("h"), number: 9 };
        ReplicaList { unix_ms: 100_000, revision, freshness_bound_ms: BOUND_MS, rows }
    }

    fn wait(first: Vec<ReplicaRow>, silent: &[&str]) -> FleetWaitProgress {
        let first = rows(first);
        let mut wait = FleetWaitProgress::new(9, 99_000, &first);
        wait.observe(&first, &silent.iter().map(|name| (*name).to_owned()).collect());
        wait
    }

    fn outcomes(wait: &FleetWaitProgress, waited_ms: u64) -> Option<Vec<ReplicaWaitOutcome>> {
        Some(wait.finished_outcomes(waited_ms)?.into_iter().map(|(_, outcome)| outcome).collect())
    }

    #[test]
    fn each_replica_is_waited_for_until_it_can_only_deny() {
        use ReplicaState::{Serving, Starting};
        use ReplicaWaitOutcome::{Acknowledged, Quarantined, RanOut};
        let check = |row: ReplicaRow, over_at_ms: u64, expected: ReplicaWaitOutcome| {
            let wait = wait(vec![row.clone()], &[]);
            if let Some(before) = over_at_ms.checked_sub(1) {
                assert_eq!(outcomes(&wait, before), None, "{row:?}");
            }
            assert_eq!(outcomes(&wait, over_at_ms), Some(vec![expected]), "{row:?}");
        };
        check(row("a", 9, 0, Serving), 0, Acknowledged { after_ms: Some(84) });
        check(row("a", 10, 0, Serving), 0, Acknowledged { after_ms: Some(84) });
        check(row("a", 8, 0, Serving), BOUND_MS, RanOut);
        check(row("a", 8, 0, Starting), BOUND_MS, RanOut);
        check(row("a", 0, 0, ReplicaState::Quarantined), 0, Quarantined);
        // Silence by the store's clock proves nothing, because that clock may just have been set.
        check(row("a", 8, 59_000, Serving), BOUND_MS, RanOut);
        assert_eq!(outcomes(&wait(vec![row("a", 8, 0, Serving)], &["a"]), 0), Some(vec![RanOut]));
        assert_eq!(outcomes(&wait(vec![], &[]), 0), Some(vec![]));
    }

    #[test]
    fn what_is_heard_meanwhile_counts() {
        use ReplicaState::Serving;
        let mut wait = wait(vec![row("a", 8, 9_000, Serving), row("b", 9, 0, Serving)], &[]);
        // A replica that registers now is not waited for.
        wait.observe(&rows(vec![row("a", 8, 0, Serving), row("c", 0, 0, Serving)]), &BTreeSet::new());
        assert_eq!(outcomes(&wait, BOUND_MS - 1), None);
        wait.observe(&rows(vec![row("a", 9, 0, Serving)]), &BTreeSet::new());
        let acknowledged = ReplicaWaitOutcome::Acknowledged { after_ms: Some(84) };
        assert_eq!(outcomes(&wait, 1), Some(vec![acknowledged, acknowledged]));
    }

    #[test]
    fn silence_is_what_this_process_saw_of_it() {
        use ReplicaState::Serving;
        let clock = ManualClock::at_unix_s(1_000);
        let mut silences = SilenceTracker::default();
        let mut look = |silent_ms: i64, after_ms: i64, asked_for_ms: i64, expected: bool| {
            clock.advance_ms(after_ms);
            let asked = clock.now();
            clock.advance_ms(asked_for_ms);
            let silent = silences.observe(&rows(vec![row("a", 8, silent_ms, Serving)]), asked, clock.now());
            assert_eq!(silent.contains("a"), expected, "{silent_ms} {after_ms}");
        };
        look(59_000, 0, 100, false);
        // A heartbeat may be half a second older than the newest proof.
        look(59_000, 5_499, 100, false);
        look(59_000, 0, 100, true);
        look(59_000, 0, 0, true);
        look(0, 0, 0, false);
        look(0, 5_500, 0, true);
        clock.step_wall_ms(-90_000);
        look(0, 0, 0, true);
        look(1, 0, 0, false);
        clock.step_wall_ms(90_000);
        look(1, 0, 0, false);
    }
}
