//! A replica as a member of the fleet. It registers before it loads, sends a heartbeat with every poll, and has its own incarnation.
//!
//! It adapts a store to the follower. The follower knows nothing of fleets, and the store gives a proof of freshness to members only.
//!
//! If the store was adopted from the followed history, the member merges the revocations that its disk cache knows into that
//! store. It must not decide whether to follow the store; `follower.rs` does. Look next at [`store::Store::poll`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::Source;
use super::cache::Keeper;
use super::follower::{Adopted, Position};
use crate::model::mutant::{Mutant, active};
use crate::model::records::{Merge, RevocationRow, Write};
use crate::model::revision::HistoryId;
use crate::store::{self, Changes, CommitRequest, Error, Heartbeat, Kinship, Registration, ReplicaState, Store, lineage};

/// A store as one replica follows it. Cheap to share; one per process.
pub struct Member {
    store: Arc<dyn Store>,
    registration: Registration,
    registered: AtomicBool,
    applied: AtomicU64,
    acked: AtomicU64,
    state: AtomicU8,
    resync: AtomicBool,
    quarantined: AtomicBool,
    keeper: Option<Arc<Keeper>>,
    /// The adopted history that already records this replica's merge.
    merged_into: Mutex<Option<HistoryId>>,
}

/// Pause between the commits of a merge.
const MERGE_PAUSE: Duration = Duration::from_millis(20);
/// Limit of the rows in one commit of a merge. A revocation by an operator never waits for more than one such commit.
const MERGED_ROWS: usize = 1_000;

/// Makes the incarnation by which a store knows a process. It is random, because no other process may ever share it, even on the
/// same node.
pub fn incarnation(node: &str, random: String) -> String {
    if active(Mutant::OneIncarnation) { node.to_owned() } else { random }
}

const STATES: [ReplicaState; 3] = [ReplicaState::Starting, ReplicaState::Serving, ReplicaState::Draining];

impl Member {
    /// Makes a member that is not registered yet. Its first load registers it.
    pub fn new(store: Arc<dyn Store>, registration: Registration) -> Arc<Self> {
        Self::with_cache(store, registration, None)
    }

    /// As [`Member::new`], with the cache whose revocations it merges into an adopted store.
    pub fn with_cache(store: Arc<dyn Store>, registration: Registration, keeper: Option<Arc<Keeper>>) -> Arc<Self> {
        let (applied, acked) = (AtomicU64::new(0), AtomicU64::new(0));
        let [registered, resync, quarantined] = [false; 3].map(AtomicBool::new);
        Arc::new(Self {
            store,
            registration,
            registered,
            applied,
            acked,
            state: AtomicU8::new(0),
            resync,
            quarantined,
            keeper,
            merged_into: Mutex::default(),
        })
    }

    /// The registration of this member.
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Acknowledges a revision with the next heartbeat: this replica can no longer answer a decision made before it. The number
    /// never falls within a history.
    pub fn acknowledge(&self, number: u64) {
        self.acked.fetch_max(number, Ordering::SeqCst);
    }

    /// Reports with the next heartbeat whether this replica reads the full state again.
    pub fn set_resync(&self, resync: bool) {
        self.resync.store(resync, Ordering::SeqCst);
    }

    /// Reports with every heartbeat from now on that this replica denies every call and acknowledges nothing. It clears the
    /// acknowledged number, because the store may no longer hold the followed history.
    pub fn quarantine(&self) {
        self.quarantined.store(true, Ordering::SeqCst);
        self.applied.store(0, Ordering::SeqCst);
        self.acked.store(0, Ordering::SeqCst);
    }

    /// Ends the quarantine. Later acknowledgements belong to the history that this replica follows now.
    pub fn leave_quarantine(&self) {
        self.quarantined.store(false, Ordering::SeqCst);
    }

    /// Sends a heartbeat without a poll.
    ///
    /// # Errors
    /// As [`Store::beat`].
    pub async fn beat(&self) -> Result<(), Error> {
        self.known().await?;
        self.noticed(self.store.beat(&self.heartbeat()).await)
    }

    /// Sets the state that the next heartbeat reports: starting, serving or draining.
    pub fn set_state(&self, state: ReplicaState) {
        let index = STATES.iter().position(|known| *known == state).unwrap_or_default();
        self.state.store(u8::try_from(index).unwrap_or_default(), Ordering::SeqCst);
    }

    fn heartbeat(&self) -> Heartbeat {
        let incarnation = self.registration.incarnation.clone();
        if self.quarantined.load(Ordering::SeqCst) {
            let applied_number = self.applied.load(Ordering::SeqCst);
            return Heartbeat { incarnation, applied_number, acked_number: 0, state: ReplicaState::Quarantined };
        }
        let state = match STATES.get(usize::from(self.state.load(Ordering::SeqCst))).copied().unwrap_or_default() {
            ReplicaState::Serving if self.resync.load(Ordering::SeqCst) => ReplicaState::Resync,
            state => state,
        };
        Heartbeat {
            incarnation,
            applied_number: self.applied.load(Ordering::SeqCst),
            acked_number: self.acked.load(Ordering::SeqCst),
            state,
        }
    }

    /// Merges the known revocations that the store lacks, commit by commit, and records the merge once. Returns the full state after it.
    async fn merged(&self, history: &HistoryId, known: &[RevocationRow]) -> Result<store::State, Error> {
        let state = self.load().await?;
        let lacking = lineage::lacking(known, &state.revocations);
        let recorded = self.merged_into.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(history);
        if recorded && lacking.is_empty() {
            return Ok(state);
        }
        let (count, mut left) = (lacking.len(), lacking.into_iter().cloned().collect::<Vec<_>>());
        loop {
            let rows = left.split_off(left.len().saturating_sub(MERGED_ROWS));
            let Registration { incarnation, address, .. } = self.registration.clone();
            let merge = Merge { history: history.clone(), incarnation, address, rows };
            self.store.commit(CommitRequest { writes: vec![Write::Merge(merge)], ..CommitRequest::default() }).await?;
            if left.is_empty() {
                break;
            }
            tokio::time::sleep(MERGE_PAUSE).await;
        }
        *self.merged_into.lock().unwrap_or_else(PoisonError::into_inner) = Some(history.clone());
        tracing::warn!(%history, count, "what this replica knew to be revoked was merged into the adopted store");
        self.load().await
    }

    async fn load(&self) -> Result<store::State, Error> {
        self.known().await?;
        self.noticed(self.store.load_as(&self.heartbeat()).await)
    }

    /// Registers this replica with the store, unless it is registered.
    async fn known(&self) -> Result<(), Error> {
        if !self.registered.load(Ordering::SeqCst) {
            self.store.register(&self.registration).await?;
            self.registered.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Notes that the store has forgotten this member, so that the next query registers it again.
    fn noticed<T>(&self, answer: Result<T, Error>) -> Result<T, Error> {
        if matches!(answer, Err(Error::Unregistered { .. })) {
            self.registered.store(false, Ordering::SeqCst);
        }
        answer
    }
}

#[async_trait]
impl Source for Arc<Member> {
    async fn load(&self) -> Result<store::State, Error> {
        Member::load(self).await
    }

    async fn changes(&self, after: u64) -> Result<Changes, Error> {
        self.known().await?;
        // The follower polls after the revision that decisions already read.
        self.applied.store(after, Ordering::SeqCst);
        let changes = self.noticed(self.store.poll(&self.heartbeat()).await)?;
        if active(Mutant::AcknowledgeReceived) {
            self.acknowledge(changes.head);
        }
        Ok(changes)
    }

    async fn adoption(&self, stood: &Position) -> Result<Option<Adopted>, Error> {
        let lineage = self.store.lineage(stood.revision.number).await?;
        let kinship = lineage.kinship(&stood.revision, &stood.hash);
        if kinship == Kinship::Stranger {
            return Ok(None);
        }
        let history = lineage.revision.history.clone();
        self.store.follow_history(&lineage.revision);
        let known = match (&self.keeper, kinship) {
            (Some(keeper), Kinship::Lacks) => keeper.known(&stood.revision).await?,
            _ => None,
        };
        let nothing = Vec::new();
        let rows = known.as_ref().map_or(&nothing, |known| &known.rows);
        let state = match kinship == Kinship::Lacks && known.is_none() {
            true => Member::load(self).await?,
            false => self.merged(&history, rows).await?,
        };
        Ok(Some(Adopted { lineage, state, known }))
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.store.wake()
    }
}
