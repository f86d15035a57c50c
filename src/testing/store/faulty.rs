//! A store whose commits fail as a test demands. Every other call goes to an inner store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::model::approval::{ApprovalFilter, Approvals, AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::records::{DocumentKey, RevocationRow, Target};
use crate::model::revision::Revision;
use crate::store::{
    Changes, CommitRequest, Committed, Documents, Error, Heartbeat, Lineage, Merged, PolicyCommit, Registration, Replicas,
    Revocations, State, Store,
};

/// The wrapper around the inner store.
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    fault: Mutex<Option<Error>>,
    loads: AtomicU64,
}

impl FaultyStore {
    /// Wraps `inner`, without a fault.
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, fault: Mutex::default(), loads: AtomicU64::new(0) }
    }

    /// How often the full state was loaded.
    pub fn loads(&self) -> u64 {
        self.loads.load(Ordering::SeqCst)
    }

    /// Sets the error of later commits; `None` passes them to the inner store.
    pub fn set_fault(&self, fault: Option<Error>) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }
}

#[async_trait]
impl Store for FaultyStore {
    async fn commit(&self, request: CommitRequest) -> Result<Committed, Error> {
        let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match fault {
            Some(error) => Err(error),
            None => self.inner.commit(request).await,
        }
    }

    async fn load(&self) -> Result<State, Error> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        self.inner.load().await
    }

    async fn changes(&self, after: u64) -> Result<Changes, Error> {
        self.inner.changes(after).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.inner.revision().await
    }

    async fn documents(&self, kind: Option<&str>) -> Result<Documents, Error> {
        self.inner.documents(kind).await
    }

    async fn documents_named(&self, keys: &[DocumentKey]) -> Result<Documents, Error> {
        self.inner.documents_named(keys).await
    }

    async fn revocations_of(&self, targets: &[Target]) -> Result<Vec<RevocationRow>, Error> {
        self.inner.revocations_of(targets).await
    }

    async fn revocations(&self, limit: usize) -> Result<Revocations, Error> {
        self.inner.revocations(limit).await
    }

    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error> {
        self.inner.spend(key, expires_at_unix_s).await
    }

    async fn ask_approval(&self, request: AskApproval) -> Result<AskOutcome, Error> {
        self.inner.ask_approval(request).await
    }

    async fn use_approvals(&self, request: UseApprovals) -> Result<UseOutcome, Error> {
        self.inner.use_approvals(request).await
    }

    async fn give_back_approvals(&self, request: UseApprovals) -> Result<bool, Error> {
        self.inner.give_back_approvals(request).await
    }

    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<Approvals, Error> {
        self.inner.approvals(filter, limit).await
    }

    async fn history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        self.inner.history(limit).await
    }

    async fn documents_at(&self, number: u64) -> Result<Documents, Error> {
        self.inner.documents_at(number).await
    }

    async fn register(&self, registration: &Registration) -> Result<(), Error> {
        self.inner.register(registration).await
    }

    async fn load_as(&self, heartbeat: &Heartbeat) -> Result<State, Error> {
        self.inner.load_as(heartbeat).await
    }

    async fn poll(&self, heartbeat: &Heartbeat) -> Result<Changes, Error> {
        self.inner.poll(heartbeat).await
    }

    async fn beat(&self, heartbeat: &Heartbeat) -> Result<(), Error> {
        self.inner.beat(heartbeat).await
    }

    async fn replicas(&self) -> Result<Replicas, Error> {
        self.inner.replicas().await
    }

    async fn lineage(&self, at: u64) -> Result<Lineage, Error> {
        self.inner.lineage(at).await
    }

    async fn merges(&self) -> Result<Vec<Merged>, Error> {
        self.inner.merges().await
    }

    fn follow_history(&self, revision: &Revision) {
        self.inner.follow_history(revision);
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        self.inner.may_lose_commits()
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.inner.wake()
    }
}
