//! A replica as a member of the fleet. It registers before it loads, sends a heartbeat with every poll, and has its own incarnation.
//!
//! It adapts a store to the follower. The follower knows nothing of fleets, and the store gives a proof of freshness to members only.
//!
//! If the store was adopted from the followed history, the member merges the revocations that its disk cache knows into that
//! store. It must not decide whether to follow the store; `follower.rs` does. Look next at [`store::Store::poll_changes`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::ChangeSource;
use super::cache_writer::CacheWriter;
use super::follower::{AdoptedStore, HistoryPosition};
use crate::model::mutant::{Mutant, is_active};
use crate::model::revision::HistoryId;
use crate::model::rows::{RevocationMerge, RevocationRow, StoreWrite};
use crate::store::{
    self, ChangeLogPage, CommitRequest, Error, LineageRelation, ReplicaHeartbeat, ReplicaRegistration, ReplicaState, Store,
    lineage,
};

/// A store as one replica follows it. Cheap to share; one per process.
pub struct FleetMember {
    store: Arc<dyn Store>,
    registration: ReplicaRegistration,
    registered: AtomicBool,
    applied: AtomicU64,
    acknowledged: AtomicU64,
    state: AtomicU8,
    resync: AtomicBool,
    quarantined: AtomicBool,
    cache_writer: Option<Arc<CacheWriter>>,
    /// The adopted history that already records this replica's merge.
    merged_history: Mutex<Option<HistoryId>>,
}

/// Pause between the commits of a merge.
const MERGE_PAUSE: Duration = Duration::from_millis(20);
/// Limit of the rows in one commit of a merge. A revocation by an operator never waits for more than one such commit.
const MERGE_ROWS_MAX: usize = 1_000;

/// Makes the incarnation by which a store knows a process. It is random, because no other process may ever share it, even on the
/// same node.
pub fn new_incarnation_id(node: &str, random: String) -> String {
    if is_active(Mutant::OneIncarnation) { node.to_owned() } else { random }
}

const REPLICA_STATES: [ReplicaState; 3] = [ReplicaState::Starting, ReplicaState::Serving, ReplicaState::Draining];

impl FleetMember {
    /// Makes a member that is not registered yet. Its first load registers it.
    pub fn new(store: Arc<dyn Store>, registration: ReplicaRegistration) -> Arc<Self> {
        Self::with_cache(store, registration, None)
    }

    /// As [`FleetMember::new`], with the cache whose revocations it merges into an adopted store.
    pub fn with_cache(
        store: Arc<dyn Store>,
        registration: ReplicaRegistration,
        cache_writer: Option<Arc<CacheWriter>>,
    ) -> Arc<Self> {
        let (applied, acked) = (AtomicU64::new(0), AtomicU64::new(0));
        let [registered, resync, quarantined] = [false; 3].map(AtomicBool::new);
        Arc::new(Self {
            store,
            registration,
            registered,
            applied,
            acknowledged: acked,
            state: AtomicU8::new(0),
            resync,
            quarantined,
            cache_writer,
            merged_history: Mutex::default(),
        })
    }

    /// The registration of this member.
    pub fn registration(&self) -> &ReplicaRegistration {
        &self.registration
    }

    /// Acknowledges a revision with the next heartbeat: this replica can no longer answer a decision made before it. The number
    /// never falls within a history.
    pub fn acknowledge(&self, number: u64) {
        self.acknowledged.fetch_max(number, Ordering::SeqCst);
    }

    /// Reports with the next heartbeat whether this replica reads the full state again.
    pub fn set_resync(&self, resync: bool) {
        self.resync.store(resync, Ordering::SeqCst);
    }

    /// Reports with every heartbeat from now on that this replica denies every call and acknowledges nothing. It clears the
    /// acknowledged number, because the store may no longer hold the followed history.
    pub fn enter_quarantine(&self) {
        self.quarantined.store(true, Ordering::SeqCst);
        self.applied.store(0, Ordering::SeqCst);
        self.acknowledged.store(0, Ordering::SeqCst);
    }

    /// Ends the quarantine. Later acknowledgements belong to the history that this replica follows now.
    pub fn leave_quarantine(&self) {
        self.quarantined.store(false, Ordering::SeqCst);
    }

    /// Sends a heartbeat without a poll.
    ///
    /// # Errors
    /// As [`Store::write_heartbeat`].
    pub async fn send_heartbeat(&self) -> Result<(), Error> {
        self.ensure_registered().await?;
        self.note_unregistered(self.store.write_heartbeat(&self.heartbeat()).await)
    }

    /// Sets the state that the next heartbeat reports: starting, serving or draining.
    pub fn set_state(&self, state: ReplicaState) {
        let index = REPLICA_STATES.iter().position(|known| *known == state).unwrap_or_default();
        self.state.store(u8::try_from(index).unwrap_or_default(), Ordering::SeqCst);
    }

    fn heartbeat(&self) -> ReplicaHeartbeat {
        let incarnation = self.registration.incarnation.clone();
        if self.quarantined.load(Ordering::SeqCst) {
            let applied_number = self.applied.load(Ordering::SeqCst);
            return ReplicaHeartbeat { incarnation, applied_number, acked_number: 0, state: ReplicaState::Quarantined };
        }
        let state = match REPLICA_STATES.get(usize::from(self.state.load(Ordering::SeqCst))).copied().unwrap_or_default() {
            ReplicaState::Serving if self.resync.load(Ordering::SeqCst) => ReplicaState::Resync,
            state => state,
        };
        ReplicaHeartbeat {
            incarnation,
            applied_number: self.applied.load(Ordering::SeqCst),
            acked_number: self.acknowledged.load(Ordering::SeqCst),
            state,
        }
    }

    /// Merges the known revocations that the store lacks, commit by commit, and records the merge once. Returns the full state after it.
    async fn merge_revocations(&self, history: &HistoryId, known: &[RevocationRow]) -> Result<store::StoreState, Error> {
        let state = self.load().await?;
        let lacking = lineage::uncovered_rows(known, &state.revocations);
        let recorded = self.merged_history.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(history);
        if recorded && lacking.is_empty() {
            return Ok(state);
        }
        let (count, mut left) = (lacking.len(), lacking.into_iter().cloned().collect::<Vec<_>>());
        loop {
            let rows = left.split_off(left.len().saturating_sub(MERGE_ROWS_MAX));
            let ReplicaRegistration { incarnation, address, .. } = self.registration.clone();
            let merge = RevocationMerge { history: history.clone(), incarnation, address, rows };
            self.store.commit(CommitRequest { writes: vec![StoreWrite::Merge(merge)], ..CommitRequest::default() }).await?;
            if left.is_empty() {
                break;
            }
            tokio::time::sleep(MERGE_PAUSE).await;
        }
        *self.merged_history.lock().unwrap_or_else(PoisonError::into_inner) = Some(history.clone());
        tracing::warn!(%history, count, "what this replica knew to be revoked was merged into the adopted store");
        self.load().await
    }

    async fn load(&self) -> Result<store::StoreState, Error> {
        self.ensure_registered().await?;
        self.note_unregistered(self.store.load_for_replica(&self.heartbeat()).await)
    }

    /// Registers this replica with the store, unless it is registered.
    async fn ensure_registered(&self) -> Result<(), Error> {
        if !self.registered.load(Ordering::SeqCst) {
            self.store.register_replica(&self.registration).await?;
            self.registered.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Notes that the store has forgotten this member, so that the next query registers it again.
    fn note_unregistered<T>(&self, answer: Result<T, Error>) -> Result<T, Error> {
        if matches!(answer, Err(Error::Unregistered { .. })) {
            self.registered.store(false, Ordering::SeqCst);
        }
        answer
    }
}

#[async_trait]
impl ChangeSource for Arc<FleetMember> {
    async fn load(&self) -> Result<store::StoreState, Error> {
        FleetMember::load(self).await
    }

    async fn changes(&self, after: u64) -> Result<ChangeLogPage, Error> {
        self.ensure_registered().await?;
        // The follower polls after the revision that decisions already read.
        self.applied.store(after, Ordering::SeqCst);
        let changes = self.note_unregistered(self.store.poll_changes(&self.heartbeat()).await)?;
        if is_active(Mutant::AcknowledgeReceived) {
            self.acknowledge(changes.head);
        }
        Ok(changes)
    }

    async fn find_adoption(&self, last_position: &HistoryPosition) -> Result<Option<AdoptedStore>, Error> {
        let lineage = self.store.lineage(last_position.revision.number).await?;
        let relation = lineage.relation_to(&last_position.revision, &last_position.hash);
        if relation == LineageRelation::Unrelated {
            return Ok(None);
        }
        let history = lineage.revision.history.clone();
        self.store.expect_history(&lineage.revision);
        let known = match (&self.cache_writer, relation) {
            (Some(cache_writer), LineageRelation::MayLack) => {
                cache_writer.read_known_revocations(&last_position.revision).await?
            }
            _ => None,
        };
        let nothing = Vec::new();
        let rows = known.as_ref().map_or(&nothing, |known| &known.rows);
        let state = match relation == LineageRelation::MayLack && known.is_none() {
            true => FleetMember::load(self).await?,
            false => self.merge_revocations(&history, rows).await?,
        };
        Ok(Some(AdoptedStore { lineage, state, known }))
    }

    fn subscribe_commits(&self) -> watch::Receiver<u64> {
        self.store.subscribe_commits()
    }
}
