//! Adopts a restored store, and waits until the replicas follow it.
//!
//! An adoption begins a new history and voids every root. The replicas of the old history notice it, merge the revocations that
//! they know into the store, and follow the new history. Look next at [`crate::store::lineage`], and at `sync/follower.rs`, which
//! decides when a replica follows.

use std::collections::BTreeMap;
use std::time::Duration;

use super::revoke::check_reason;
use super::{Admin, Authorized, Error};
use crate::model::records::{Change, Write};
use crate::model::replica::{Condition, Listed};
use crate::model::revision::Revision;
use crate::store::fleet::HEARTBEAT_INTERVAL_MS;
use crate::store::{Committed, Merged, Replicas};

/// The longest wait.
pub const WAIT_MS_MAX: u64 = 3_600_000;
/// The pause between two reads of the rows.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The shortest wait. The backup may lack some replicas, and these register again with their next heartbeat.
const LOOKED_MS_MIN: u64 = 4 * HEARTBEAT_INTERVAL_MS;

/// The result of an adoption.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// The first revision of the new history, durable.
    pub committed: Committed,
    /// The last revision of the previous history in this store.
    pub from: Revision,
    /// Roots issued at or before this time are void, in seconds since the Unix epoch.
    pub watermark_unix_s: i64,
}

/// A replica and its progress after an adoption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopting {
    /// The registration of the replica. If the replica is not registered any more, only the id and the address are set.
    pub replica: Listed,
    /// The number of revocations that it merged; `None` if it has not reported any.
    pub merged: Option<u64>,
    /// Whether it answers by the new history only.
    pub follows: bool,
    /// Whether it is registered and was heard within the freshness bound.
    pub registered: bool,
}

/// The result of a wait for an adoption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdoptionWaited {
    /// The replicas, sorted by id.
    pub replicas: Vec<Adopting>,
    /// Whether every registered replica follows.
    pub complete: bool,
    /// The duration of the wait.
    pub waited_ms: u64,
}

impl Admin {
    /// Adopts a restored store. The act is durable when this returns.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a reason that is too long, or if the store fails.
    pub async fn adopt(&self, by: &Authorized, reason: String) -> Result<Adopted, Error> {
        let checked = check_reason(&reason);
        self.or_record_refused(by, checked)?;
        let account = format!("adopt the store: {reason}");
        let committed = self.commit(by, vec![Write::Adopt { reason }], None, &account).await?;
        let watermark = committed.changes.iter().find_map(|change| match change {
            Change::Revocation(row) => row.watermark_unix_s,
            _ => None,
        });
        // The adoption is done, so a failing read must not turn it into an error.
        let adoptions = self.store.lineage(0).await.map(|lineage| lineage.adoptions).unwrap_or_default();
        let from = adoptions.into_iter().find(|adoption| adoption.history == committed.revision.history);
        let from = from.map_or_else(|| committed.revision.clone(), |adoption| adoption.from);
        Ok(Adopted { committed, from, watermark_unix_s: watermark.unwrap_or(0) })
    }

    /// Waits until every registered replica follows the history of an adoption, at most `wait_ms`, which is limited to
    /// [`WAIT_MS_MAX`].
    ///
    /// # Errors
    /// - [`Error::Invalid`] for a revision that is not of the store's history.
    /// - [`Error::NotSaid`] if too many callers wait.
    /// - An error of the store if it cannot be read.
    pub async fn wait_for_adoption(&self, by: &Authorized, revision: &Revision, wait_ms: u64) -> Result<AdoptionWaited, Error> {
        let Ok(_waiting) = self.waits.try_acquire() else {
            return Err(Error::NotSaid("others wait, and as many as may: ask again".to_owned()));
        };
        let (began, wait_ms) = (self.clock.now(), wait_ms.min(WAIT_MS_MAX));
        self.record_wait(by, revision, "wait for the replicas to follow the adopted store");
        loop {
            let (replicas, merges) = (self.store.replicas().await?, self.store.merges().await?);
            if replicas.revision.history != revision.history {
                let message = format!("`{revision}` is not of the store's history: it is at `{}`", replicas.revision);
                return Err(Error::Invalid { field: "revision", message });
            }
            let waited_ms = self.clock.now().ms_since(began);
            let seen = seen(&replicas, merges, revision.number);
            let complete = seen.iter().all(|one| one.follows || !one.registered);
            if waited_ms >= wait_ms || (complete && waited_ms >= LOOKED_MS_MIN) {
                return Ok(AdoptionWaited { replicas: seen, complete, waited_ms });
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// The registered replicas, and those that merged revocations.
fn seen(replicas: &Replicas, merges: Vec<Merged>, number: u64) -> Vec<Adopting> {
    let mut merges: BTreeMap<String, Merged> = merges.into_iter().map(|one| (one.incarnation.clone(), one)).collect();
    let registered = replicas.fleet().replicas.into_iter().map(|replica| {
        // A replica acknowledges revisions of the history that it follows. Only a replica that follows this history can report a
        // number here.
        let follows = replica.condition != Condition::Quarantined && replica.acked_number >= number;
        // The backup may list replicas that have ended since.
        let registered = follows || replica.age_ms < replicas.freshness_bound_ms.saturating_add(HEARTBEAT_INTERVAL_MS);
        Adopting { merged: merges.remove(&replica.id).map(|one| one.rows), follows, registered, replica }
    });
    let mut all: Vec<Adopting> = registered.collect();
    all.extend(merges.into_values().map(|one| {
        let replica = Listed {
            id: one.incarnation,
            address: one.address,
            version: String::new(),
            started_unix_ms: 0,
            condition: Condition::Closed,
            draining: false,
            applied_number: 0,
            acked_number: 0,
            age_ms: 0,
            kill_ms: None,
        };
        Adopting { replica, merged: Some(one.rows), follows: false, registered: false }
    }));
    all
}
