//! Taking a restored store over, and waiting until the replicas follow it.
//!
//! The act begins a new history and voids every root; replicas of the old one see it, merge what they know to be revoked, and follow.
//! Look next at [`crate::store::lineage`], and at `sync/follower.rs`, which says when a replica follows.

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
/// Pause between two looks at the rows.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A replica that the backup does not know registers with its next heartbeat: so long at the least is looked for those.
const LOOKED_MS_MIN: u64 = 4 * HEARTBEAT_INTERVAL_MS;

/// A store that was taken over.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// The first revision of the new history, durable.
    pub committed: Committed,
    /// The last revision of the history before it that the store holds.
    pub from: Revision,
    /// Roots issued at or before this second are void.
    pub watermark_unix_s: i64,
}

/// A replica and what it made of an adoption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopting {
    /// As it is registered; where it is not any more, its id and address alone.
    pub replica: Listed,
    /// Revocations that it brought; `None`: it has not said.
    pub merged: Option<u64>,
    /// It answers by the new history alone.
    pub follows: bool,
    /// It is registered, and was heard within the freshness bound.
    pub registered: bool,
}

/// How a wait for an adoption ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdoptionWaited {
    /// By id.
    pub replicas: Vec<Adopting>,
    /// Every replica that is registered follows.
    pub complete: bool,
    /// How long it took.
    pub waited_ms: u64,
}

impl Admin {
    /// Takes a restored store over; durable when this returns.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a reason that is too long, or as the store fails.
    pub async fn adopt(&self, by: &Authorized, reason: String) -> Result<Adopted, Error> {
        let checked = check_reason(&reason);
        self.or_record_refused(by, checked)?;
        let account = format!("adopt the store: {reason}");
        let committed = self.commit(by, vec![Write::Adopt { reason }], None, &account).await?;
        let watermark = committed.changes.iter().find_map(|change| match change {
            Change::Revocation(row) => row.watermark_unix_s,
            _ => None,
        });
        // It is done: a store that cannot be read now changes nothing of that.
        let adoptions = self.store.lineage(0).await.map(|lineage| lineage.adoptions).unwrap_or_default();
        let from = adoptions.into_iter().find(|adoption| adoption.history == committed.revision.history);
        let from = from.map_or_else(|| committed.revision.clone(), |adoption| adoption.from);
        Ok(Adopted { committed, from, watermark_unix_s: watermark.unwrap_or(0) })
    }

    /// Returns once every registered replica follows the history of an adoption, or after `wait_ms`, at most [`WAIT_MS_MAX`].
    ///
    /// # Errors
    /// [`Error::Invalid`] for a revision that is not of the store's history, [`Error::NotSaid`] where too many wait, or if the store
    /// cannot be read.
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

/// Who is registered, and who merged something.
fn seen(replicas: &Replicas, merges: Vec<Merged>, number: u64) -> Vec<Adopting> {
    let mut merges: BTreeMap<String, Merged> = merges.into_iter().map(|one| (one.incarnation.clone(), one)).collect();
    let registered = replicas.fleet().replicas.into_iter().map(|replica| {
        // What it acknowledges is of the history that it follows, and only who follows this one is heard with a number.
        let follows = replica.condition != Condition::Quarantined && replica.acked_number >= number;
        // The backup may name some that ended since.
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
