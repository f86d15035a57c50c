//! Who follows the store, and waiting until none of them answers from before a revision any more.
//!
//! A replica is done with when it has acknowledged, when it denies everything, or when it has run out: what it could still permit
//! by was proved before the commit, for a later proof would have brought the commit with it, and a proof is good for the bound.
//! So nobody is waited for longer than the bound. Look next at `sync/acknowledge.rs`, which says when a replica acknowledges.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Admin, Authorized, Error};
use crate::model::replica::{Fleet, Listed, Outcome};
use crate::model::revision::Revision;
use crate::store::fleet::{HEARTBEAT_INTERVAL_MS, Replicas};
use crate::store::{self, ReplicaState};

/// Waits that go on at once.
pub(super) const WAITS_MAX: usize = 16;
/// Pause between two looks at the rows.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// A replica that the store's clock calls silent must be silent so long while it is looked at too, for clocks are set sometimes.
const SILENT_MS_MIN: u64 = 2 * HEARTBEAT_INTERVAL_MS;

/// How a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waited {
    /// The revision that was waited for.
    pub revision: Revision,
    /// What of the store makes replicas run out.
    pub freshness_bound_ms: u64,
    /// How long it took.
    pub waited_ms: u64,
    /// Every replica that was known when the wait began, by id.
    pub replicas: Vec<(Listed, Outcome)>,
}

impl Admin {
    /// Who follows the store.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn replicas(&self, by: &Authorized) -> Result<Fleet, Error> {
        let fleet = self.store.replicas().await?.fleet();
        self.record(by, None, "read")?;
        Ok(fleet)
    }

    /// Returns once no replica answers from before a revision any more, at the longest after the store's freshness bound.
    ///
    /// `committed_unix_ms` is when it was committed, as the commit said, and serves to say how long each replica took.
    ///
    /// # Errors
    /// [`Error::NotSaid`] where the store may lose the commit, [`Error::Invalid`] for a revision that the store does not hold, or
    /// if the store cannot be read even once.
    pub async fn wait_for_fleet(&self, by: &Authorized, revision: &Revision, committed_unix_ms: i64) -> Result<Waited, Error> {
        if let Some(why) = self.store.may_lose_commits() {
            return Err(Error::NotSaid(format!(
                "`{why}`: a failover may lose the revision after every replica acknowledged it, so nobody can say what the fleet \
                 answers; it is written all the same"
            )));
        }
        let Ok(_waiting) = self.waits.try_acquire() else {
            return Err(Error::NotSaid(format!("{WAITS_MAX} others wait for the fleet, and that is the limit: ask again")));
        };
        let began = self.clock.now();
        let first = self.store.replicas().await?;
        let newest = &first.revision;
        if newest.history != revision.history || newest.number < revision.number {
            let message = format!("`{revision}` is not committed: the store is at `{newest}`");
            return Err(Error::Invalid { field: "revision", message });
        }
        self.record(by, Some(revision), "wait")?;
        let bound_ms = first.freshness_bound_ms;
        let mut wait = Wait::new(revision.number, committed_unix_ms, &first);
        loop {
            let waited_ms = self.clock.now().ms_since(began);
            if let Some(replicas) = wait.over(waited_ms) {
                let revision = revision.clone();
                return Ok(Waited { revision, freshness_bound_ms: bound_ms, waited_ms, replicas });
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
            // A store that cannot be read any more changes nothing of when the replicas have run out.
            let left = Duration::from_millis(bound_ms.saturating_sub(self.clock.now().ms_since(began)));
            if let Ok(Ok(replicas)) = tokio::time::timeout(left, self.store.replicas()).await {
                wait.see(&replicas);
            }
        }
    }
}

/// What is known of the replicas that are waited for.
#[derive(Debug)]
struct Wait {
    number: u64,
    committed_unix_ms: i64,
    bound_ms: u64,
    replicas: BTreeMap<String, Seen>,
}

#[derive(Debug)]
struct Seen {
    listed: Listed,
    outcome: Option<Outcome>,
    seen_unix_ms: i64,
    /// Not heard for longer than the bound when the wait began, nor since.
    silent: bool,
}

impl Wait {
    fn new(number: u64, committed_unix_ms: i64, first: &Replicas) -> Self {
        let bound_ms = first.freshness_bound_ms;
        let seen = first.rows.iter().map(|row| {
            let listed = row.listed(first.unix_ms, bound_ms);
            // Where reading is proof, a proof is younger than the newest heartbeat by up to the pause between two.
            let silent = listed.age_ms >= bound_ms.saturating_add(HEARTBEAT_INTERVAL_MS);
            (listed.id.clone(), Seen { listed, outcome: None, seen_unix_ms: row.seen_unix_ms, silent })
        });
        let mut wait = Self { number, committed_unix_ms, bound_ms, replicas: seen.collect() };
        wait.see(first);
        wait
    }

    /// Takes a look at the rows. Who registers later loads a state that holds the revision.
    fn see(&mut self, now: &Replicas) {
        for row in &now.rows {
            let Some(seen) = self.replicas.get_mut(&row.registration.incarnation) else { continue };
            seen.silent &= row.seen_unix_ms == seen.seen_unix_ms;
            if seen.outcome.is_some() {
                continue;
            }
            seen.listed = row.listed(now.unix_ms, self.bound_ms);
            seen.outcome = if row.state == ReplicaState::Quarantined {
                Some(Outcome::Quarantined)
            } else if row.acked_number >= self.number {
                Some(Outcome::Acknowledged { after_ms: after_ms(row, self.number, self.committed_unix_ms) })
            } else {
                None
            };
        }
    }

    /// The outcomes, once there is one for each.
    fn over(&self, waited_ms: u64) -> Option<Vec<(Listed, Outcome)>> {
        let outcome = |seen: &Seen| {
            let ran_out = waited_ms >= self.bound_ms || (seen.silent && waited_ms >= SILENT_MS_MIN);
            seen.outcome.or(ran_out.then_some(Outcome::RanOut)).map(|outcome| (seen.listed.clone(), outcome))
        };
        self.replicas.values().map(outcome).collect()
    }
}

/// From the commit to the acknowledgement, by the store's clock; of a later revision it is at most that.
fn after_ms(row: &store::Replica, number: u64, committed_unix_ms: i64) -> Option<u64> {
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
    use crate::store::{Registration, Replica};

    const BOUND_MS: u64 = 5_000;

    fn row(name: &str, acked_number: u64, silent_ms: i64, state: ReplicaState) -> Replica {
        let registration = Registration {
            incarnation: name.to_owned(),
            address: "node".to_owned(),
            version: "1".to_owned(),
            started_unix_ms: 0,
        };
        let acked_commit_unix_ms = (acked_number == 9).then_some(99_000);
        Replica {
            registration,
            applied_number: 9,
            acked_number,
            acked_unix_ms: 99_084,
            acked_commit_unix_ms,
            state,
            seen_unix_ms: 100_000 - silent_ms,
        }
    }

    fn rows(rows: Vec<Replica>) -> Replicas {
        let revision = Revision { history: HistoryId::new("h"), number: 9 };
        Replicas { unix_ms: 100_000, revision, freshness_bound_ms: BOUND_MS, rows }
    }

    fn outcomes(wait: &Wait, waited_ms: u64) -> Option<Vec<Outcome>> {
        Some(wait.over(waited_ms)?.into_iter().map(|(_, outcome)| outcome).collect())
    }

    #[test]
    fn each_replica_is_waited_for_until_it_can_only_deny() {
        use Outcome::{Acknowledged, Quarantined, RanOut};
        use ReplicaState::{Serving, Starting};
        let check = |row: Replica, over_at_ms: u64, expected: Outcome| {
            let wait = Wait::new(9, 99_000, &rows(vec![row.clone()]));
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
        // A heartbeat may be half a second older than the newest proof; and a clock that was set calls nobody silent.
        check(row("a", 8, 5_499, Serving), BOUND_MS, RanOut);
        check(row("a", 8, 5_500, Serving), SILENT_MS_MIN, RanOut);
        assert_eq!(outcomes(&Wait::new(9, 0, &rows(vec![])), 0), Some(vec![]));
    }

    #[test]
    fn what_is_heard_meanwhile_counts() {
        use ReplicaState::Serving;
        let mut wait = Wait::new(9, 99_000, &rows(vec![row("a", 8, 9_000, Serving), row("b", 9, 0, Serving)]));
        // Heard again without an acknowledgement: it was the clock that made it silent. One that registers now is not waited for.
        wait.see(&rows(vec![row("a", 8, 0, Serving), row("c", 0, 0, Serving)]));
        assert_eq!(outcomes(&wait, SILENT_MS_MIN), None);
        wait.see(&rows(vec![row("a", 9, 0, Serving)]));
        let acknowledged = Outcome::Acknowledged { after_ms: Some(84) };
        assert_eq!(outcomes(&wait, 1), Some(vec![acknowledged, acknowledged]));
        // A row that is gone was silent for a minute: by then it has run out.
        let wait = Wait::new(9, 99_000, &rows(vec![row("a", 8, 0, Serving)]));
        assert_eq!(outcomes(&wait, BOUND_MS), Some(vec![Outcome::RanOut]));
    }
}
