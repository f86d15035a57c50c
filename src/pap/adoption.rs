//! Adopts a restored store, and waits until the replicas follow it.
//!
//! An adoption begins a new history and voids every root. The replicas of the old history notice it, merge the revocations that
//! they know into the store, and follow the new history. Look next at [`crate::store::lineage`], and at `sync/follower.rs`, which
//! decides when a replica follows.

use std::collections::BTreeMap;
use std::time::Duration;

use super::revoke::check_reason;
use super::{AdministrationPoint, AuthorizedAct, Error};
use crate::model::replica::{ReplicaCondition, ReplicaSummary};
use crate::model::revision::Revision;
use crate::model::rows::{RowChange, StoreWrite};
use crate::store::fleet::HEARTBEAT_INTERVAL_MS;
use crate::store::{CommitOutcome, ReplicaList, ReplicaMerge};

/// The longest wait.
pub const ADOPTION_WAIT_MS_MAX: u64 = 3_600_000;
/// The pause between two reads of the rows.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The shortest wait. The backup may lack some replicas, and these register again with their next heartbeat.
const ADOPTION_WAIT_MS_MIN: u64 = 4 * HEARTBEAT_INTERVAL_MS;

/// The result of an adoption.
#[derive(Clone, Debug)]
pub struct StoreAdoptionOutcome {
    /// The first revision of the new history, durable.
    pub committed: CommitOutcome,
    /// The last revision of the previous history in this store.
    pub from: Revision,
    /// Roots issued at or before this time are void, in seconds since the Unix epoch.
    pub watermark_unix_s: i64,
}

/// A replica and its progress after an adoption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaAdoptionProgress {
    /// The registration of the replica. If the replica is not registered any more, only the id and the address are set.
    pub replica: ReplicaSummary,
    /// The number of revocations that it merged; `None` if it has not reported any.
    pub merged: Option<u64>,
    /// Whether it answers by the new history only.
    pub follows: bool,
    /// Whether it is registered and was heard within the freshness bound.
    pub registered: bool,
}

/// The result of a wait for an adoption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdoptionWaitOutcome {
    /// The replicas, sorted by id.
    pub replicas: Vec<ReplicaAdoptionProgress>,
    /// Whether every registered replica follows.
    pub complete: bool,
    /// The duration of the wait.
    pub waited_ms: u64,
}

impl AdministrationPoint {
    /// Adopts a restored store. The act is durable when this returns.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a reason that is too long, or if the store fails.
    pub async fn adopt(&self, by: &AuthorizedAct, reason: String) -> Result<StoreAdoptionOutcome, Error> {
        let checked = check_reason(&reason);
        self.or_record_refusal(by, checked)?;
        let description = format!("adopt the store: {reason}");
        let committed = self.commit(by, vec![StoreWrite::Adopt { reason }], None, &description).await?;
        let watermark = committed.changes.iter().find_map(|change| match change {
            RowChange::Revocation(row) => row.watermark_unix_s,
            _ => None,
        });
        // The adoption is done, so a failing read must not turn it into an error.
        let adoptions = self.store.lineage(0).await.map(|lineage| lineage.adoptions).unwrap_or_default();
        let from = adoptions.into_iter().find(|adoption| adoption.history == committed.revision.history);
        let from = from.map_or_else(|| committed.revision.clone(), |adoption| adoption.from);
        Ok(StoreAdoptionOutcome { committed, from, watermark_unix_s: watermark.unwrap_or(0) })
    }

    /// Waits until every registered replica follows the history of an adoption, at most `wait_ms`, which is limited to
    /// [`ADOPTION_WAIT_MS_MAX`].
    ///
    /// # Errors
    /// - [`Error::InvalidArgument`] for a revision that is not of the store's history.
    /// - [`Error::CannotAnswer`] if too many callers wait.
    /// - An error of the store if it cannot be read.
    pub async fn wait_for_adoption(
        &self,
        by: &AuthorizedAct,
        revision: &Revision,
        wait_ms: u64,
    ) -> Result<AdoptionWaitOutcome, Error> {
        let Some(_waiting) = self.wait_slots.acquire(by) else {
            return Err(Error::CannotAnswer("others wait, and as many as may: ask again".to_owned()));
        };
        let (began, wait_ms) = (self.clock.now(), wait_ms.min(ADOPTION_WAIT_MS_MAX));
        self.record_wait(by, revision, "wait for the replicas to follow the adopted store");
        loop {
            let (replicas, merges) = (self.store.replicas().await?, self.store.merges().await?);
            if replicas.revision.history != revision.history {
                let message = format!("`{revision}` is not of the store's history: it is at `{}`", replicas.revision);
                return Err(Error::InvalidArgument { field: "revision", message });
            }
            let waited_ms = self.clock.now().elapsed_ms_since(began);
            let seen = replica_adoptions(&replicas, merges, revision.number);
            let complete = seen.iter().all(|one| one.follows || !one.registered);
            if waited_ms >= wait_ms || (complete && waited_ms >= ADOPTION_WAIT_MS_MIN) {
                return Ok(AdoptionWaitOutcome { replicas: seen, complete, waited_ms });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// The registered replicas, and those that merged revocations.
fn replica_adoptions(replicas: &ReplicaList, merges: Vec<ReplicaMerge>, number: u64) -> Vec<ReplicaAdoptionProgress> {
    let mut merges: BTreeMap<String, ReplicaMerge> = merges.into_iter().map(|one| (one.incarnation.clone(), one)).collect();
    let registered = replicas.to_fleet().replicas.into_iter().map(|replica| {
        // A replica acknowledges revisions of the history that it follows. Only a replica that follows this history can report a
        // number here.
        let follows = replica.condition != ReplicaCondition::Quarantined && replica.acked_number >= number;
        // The backup may list replicas that have ended since.
        let registered = follows || replica.age_ms < replicas.freshness_bound_ms.saturating_add(HEARTBEAT_INTERVAL_MS);
        ReplicaAdoptionProgress { merged: merges.remove(&replica.id).map(|one| one.rows), follows, registered, replica }
    });
    let mut all: Vec<ReplicaAdoptionProgress> = registered.collect();
    all.extend(merges.into_values().map(|one| {
        let replica = ReplicaSummary {
            id: one.incarnation,
            address: one.address,
            version: String::new(),
            started_unix_ms: 0,
            condition: ReplicaCondition::Closed,
            draining: false,
            applied_number: 0,
            acked_number: 0,
            age_ms: 0,
            kill_ms: None,
        };
        ReplicaAdoptionProgress { replica, merged: Some(one.rows), follows: false, registered: false }
    }));
    all
}
