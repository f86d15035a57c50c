//! A replica as a member of the fleet: registered before it loads, heard with every poll, known by an incarnation of its own.
//!
//! Where the store was adopted from the history that it followed, it merges what its cache knows to be revoked.
//!
//! The adapter between the follower, which knows nothing of fleets, and a store, which gives proof of freshness to members only.
//! Look next at [`store::Store::poll`].

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

/// A store as one replica follows it. Cheap to share; one a process.
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
    /// The adopted history that was told what this replica merged.
    merged_into: Mutex<Option<HistoryId>>,
}

/// Pause between commits of a merge.
const MERGE_PAUSE: Duration = Duration::from_millis(20);
/// Rows of a merge that go into one commit: a kill never waits for more than one of them.
const MERGED_ROWS: usize = 1_000;

/// By what a process is known to its store: something random, for no other one may ever have it, of the same node neither.
pub fn incarnation(node: &str, random: String) -> String {
    if active(Mutant::OneIncarnation) { node.to_owned() } else { random }
}

const STATES: [ReplicaState; 3] = [ReplicaState::Starting, ReplicaState::Serving, ReplicaState::Draining];

impl Member {
    /// A member that is not registered yet: the first load does that.
    pub fn new(store: Arc<dyn Store>, registration: Registration) -> Arc<Self> {
        Self::with_cache(store, registration, None)
    }

    /// As [`Member::new`], with what it merges into a store that was adopted.
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

    /// How it made itself known.
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Says with the next heartbeat that no decision made before that revision can still be answered here. Never falls in a history.
    pub fn acknowledge(&self, number: u64) {
        self.acked.fetch_max(number, Ordering::SeqCst);
    }

    /// Says with the next heartbeat whether the full state is being read again.
    pub fn set_resync(&self, resync: bool) {
        self.resync.store(resync, Ordering::SeqCst);
    }

    /// Says with every heartbeat from now on that this replica denies everything, and acknowledges nothing: what it followed need
    /// not be what the store holds now.
    pub fn quarantine(&self) {
        self.quarantined.store(true, Ordering::SeqCst);
        self.applied.store(0, Ordering::SeqCst);
        self.acked.store(0, Ordering::SeqCst);
    }

    /// It follows again; what it acknowledges is of the history that it follows now.
    pub fn leave_quarantine(&self) {
        self.quarantined.store(false, Ordering::SeqCst);
    }

    /// A heartbeat without a question.
    ///
    /// # Errors
    /// As [`Store::beat`].
    pub async fn beat(&self) -> Result<(), Error> {
        self.known().await?;
        self.noticed(self.store.beat(&self.heartbeat()).await)
    }

    /// Says with the next heartbeat what this replica is about: starting, serving or draining.
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

    /// The full state once all that is known is in it; commit by commit, and recorded once.
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

    async fn known(&self) -> Result<(), Error> {
        if !self.registered.load(Ordering::SeqCst) {
            self.store.register(&self.registration).await?;
            self.registered.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// A member that was forgotten registers again before it asks again.
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
        // What the follower asks after is what decisions read.
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
