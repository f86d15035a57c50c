//! A store whose commits fail as a test demands. Every other call goes to an inner store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::model::approval::{
    ApprovalFilter, ApprovalPage, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest,
};
use crate::model::revision::Revision;
use crate::model::rows::{DocumentKey, RevocationRow, RevocationTarget};
use crate::store::{
    ChangeLogPage, CommitOutcome, CommitRequest, DocumentList, Error, PolicyCommit, ReplicaHeartbeat, ReplicaList, ReplicaMerge,
    ReplicaRegistration, RevocationPage, Store, StoreLineage, StoreState,
};

/// The wrapper around the inner store.
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    fault: Mutex<Option<Error>>,
    loads: AtomicU64,
    reads: AtomicU64,
}

impl FaultyStore {
    /// Wraps `inner`, without a fault.
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, fault: Mutex::default(), loads: AtomicU64::new(0), reads: AtomicU64::new(0) }
    }

    /// How often the full state was loaded.
    pub fn load_count(&self) -> u64 {
        self.loads.load(Ordering::SeqCst)
    }

    /// How often documents, revocations or the revision were read.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::SeqCst)
    }

    /// Sets the error of later commits; `None` passes them to the inner store.
    pub fn set_fault(&self, fault: Option<Error>) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }
}

#[async_trait]
impl Store for FaultyStore {
    async fn commit(&self, request: CommitRequest) -> Result<CommitOutcome, Error> {
        let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match fault {
            Some(error) => Err(error),
            None => self.inner.commit(request).await,
        }
    }

    async fn load(&self) -> Result<StoreState, Error> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        self.inner.load().await
    }

    async fn changes(&self, after: u64) -> Result<ChangeLogPage, Error> {
        self.inner.changes(after).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.revision().await
    }

    async fn documents(&self, kind: Option<&str>) -> Result<DocumentList, Error> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.documents(kind).await
    }

    async fn documents_by_key(&self, keys: &[DocumentKey]) -> Result<DocumentList, Error> {
        self.inner.documents_by_key(keys).await
    }

    async fn revocations_of(&self, targets: &[RevocationTarget]) -> Result<Vec<RevocationRow>, Error> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.revocations_of(targets).await
    }

    async fn revocations(&self, limit: usize) -> Result<RevocationPage, Error> {
        self.inner.revocations(limit).await
    }

    async fn spend_proof(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error> {
        self.inner.spend_proof(key, expires_at_unix_s).await
    }

    async fn ask_approval(&self, request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, Error> {
        self.inner.ask_approval(request).await
    }

    async fn use_approvals(&self, request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, Error> {
        self.inner.use_approvals(request).await
    }

    async fn give_back_approvals(&self, request: ApprovalUseRequest) -> Result<bool, Error> {
        self.inner.give_back_approvals(request).await
    }

    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<ApprovalPage, Error> {
        self.inner.approvals(filter, limit).await
    }

    async fn policy_history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        self.inner.policy_history(limit).await
    }

    async fn documents_at(&self, number: u64) -> Result<DocumentList, Error> {
        self.inner.documents_at(number).await
    }

    async fn register_replica(&self, registration: &ReplicaRegistration) -> Result<(), Error> {
        self.inner.register_replica(registration).await
    }

    async fn load_for_replica(&self, heartbeat: &ReplicaHeartbeat) -> Result<StoreState, Error> {
        self.inner.load_for_replica(heartbeat).await
    }

    async fn poll_changes(&self, heartbeat: &ReplicaHeartbeat) -> Result<ChangeLogPage, Error> {
        self.inner.poll_changes(heartbeat).await
    }

    async fn write_heartbeat(&self, heartbeat: &ReplicaHeartbeat) -> Result<(), Error> {
        self.inner.write_heartbeat(heartbeat).await
    }

    async fn replicas(&self) -> Result<ReplicaList, Error> {
        self.inner.replicas().await
    }

    async fn lineage(&self, at: u64) -> Result<StoreLineage, Error> {
        self.inner.lineage(at).await
    }

    async fn merges(&self) -> Result<Vec<ReplicaMerge>, Error> {
        self.inner.merges().await
    }

    fn expect_history(&self, revision: &Revision) {
        self.inner.expect_history(revision);
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        self.inner.may_lose_commits()
    }

    fn subscribe_commits(&self) -> watch::Receiver<u64> {
        self.inner.subscribe_commits()
    }
}
