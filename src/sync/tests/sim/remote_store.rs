//! A store as one process of the simulation reaches it: the `Store` trait over a network that loses, delays and cuts.
//!
//! Look next at `wire.rs`, its protocol, and at `store.rs`, the model behind it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::store::Durability;
use super::wire::{MessageTable, SimClient, SimReply, SimRequest};
use crate::model::approval::{
    ApprovalFilter, ApprovalPage, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest,
};
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{DocumentKey, RevocationRow, RevocationTarget};
use crate::store::{
    ChangeLogPage, CommitOutcome, CommitRequest, DocumentList, Error, PolicyCommit, ReplicaHeartbeat, ReplicaList, ReplicaMerge,
    ReplicaRegistration, RevocationPage, Store, StoreLineage, StoreState,
};

/// Timeout of a query that has no other limit.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The connection to the copy of the store that a process believes to be the store.
pub(super) struct RemoteStore {
    /// Polls and loads use the first connection, and everything else uses the second.
    poller: SimClient,
    reader: SimClient,
    copy: Arc<Mutex<usize>>,
    durability: Durability,
    /// The history of the first answer. A heartbeat counts for this history only.
    history: Mutex<Option<HistoryId>>,
    /// Kept open. This network never sends the store's hint.
    wake: watch::Sender<u64>,
}

impl RemoteStore {
    pub(super) fn new(post: &Arc<MessageTable>, copy: Arc<Mutex<usize>>, durability: Durability) -> Self {
        let (poller, reader) = (SimClient::new(post.clone()), SimClient::new(post.clone()));
        Self { poller, reader, copy, durability, history: Mutex::default(), wake: watch::channel(0).0 }
    }

    async fn ask(&self, peer: &SimClient, call: SimRequest) -> Result<SimReply, Error> {
        let store = format!("store-{}", *self.copy.lock().unwrap());
        match peer.ask(&store, call).await {
            Ok(SimReply::Failed(error)) => Err(error),
            Ok(reply) => Ok(reply),
            Err(error) => Err(Error::Unavailable(error.to_string())),
        }
    }

    async fn read(&self, call: SimRequest) -> Result<SimReply, Error> {
        let late = |_| Err(Error::Unavailable("no answer".to_owned()));
        tokio::time::timeout(TIMEOUT, self.ask(&self.reader, call)).await.unwrap_or_else(late)
    }

    fn followed(&self) -> Option<HistoryId> {
        self.history.lock().unwrap().clone()
    }

    fn met(&self, history: &HistoryId) {
        self.history.lock().unwrap().get_or_insert_with(|| history.clone());
    }
}

fn unsupported<T>() -> Result<T, Error> {
    Err(Error::Unavailable("nobody in the simulation asks this".to_owned()))
}

#[async_trait]
impl Store for RemoteStore {
    async fn load_for_replica(&self, heartbeat: &ReplicaHeartbeat) -> Result<StoreState, Error> {
        match self.ask(&self.poller, SimRequest::Load(heartbeat.clone(), self.followed())).await? {
            SimReply::Load(state) => {
                self.met(&state.revision.history);
                Ok(*state)
            }
            _ => panic!("a load is answered by a state"),
        }
    }

    async fn poll_changes(&self, heartbeat: &ReplicaHeartbeat) -> Result<ChangeLogPage, Error> {
        match self.ask(&self.poller, SimRequest::Poll(heartbeat.clone(), self.followed())).await? {
            SimReply::Changes(changes) => Ok(changes),
            _ => panic!("a poll is answered by changes"),
        }
    }

    async fn changes(&self, after: u64) -> Result<ChangeLogPage, Error> {
        match self.read(SimRequest::Changes(after)).await? {
            SimReply::Changes(changes) => Ok(changes),
            _ => panic!("so is a look at the log"),
        }
    }

    async fn revision(&self) -> Result<Revision, Error> {
        match self.read(SimRequest::Revision).await? {
            SimReply::Revision(revision) => Ok(revision),
            _ => panic!("a revision was asked for"),
        }
    }

    async fn register_replica(&self, registration: &ReplicaRegistration) -> Result<(), Error> {
        self.read(SimRequest::Register(registration.clone())).await.map(drop)
    }

    async fn write_heartbeat(&self, heartbeat: &ReplicaHeartbeat) -> Result<(), Error> {
        self.read(SimRequest::Beat(heartbeat.clone())).await.map(drop)
    }

    async fn replicas(&self) -> Result<ReplicaList, Error> {
        match self.read(SimRequest::Replicas).await? {
            SimReply::Replicas(replicas) => Ok(replicas),
            _ => panic!("the fleet was asked for"),
        }
    }

    async fn spend_proof(&self, key: [u8; 32], _expires_at_unix_s: i64) -> Result<bool, Error> {
        match self.ask(&self.reader, SimRequest::Spend(key)).await? {
            SimReply::Spend(first) => Ok(first),
            _ => panic!("a use is answered so"),
        }
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        (self.durability == Durability::Asynchronous).then_some("asynchronous")
    }

    fn subscribe_commits(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }

    async fn lineage(&self, _at: u64) -> Result<StoreLineage, Error> {
        // No store is adopted here, so a quarantined replica stays quarantined.
        unsupported()
    }

    async fn merges(&self) -> Result<Vec<ReplicaMerge>, Error> {
        unsupported()
    }

    fn expect_history(&self, _revision: &Revision) {}

    async fn load(&self) -> Result<StoreState, Error> {
        unsupported()
    }

    async fn documents(&self, _kind: Option<&str>) -> Result<DocumentList, Error> {
        unsupported()
    }

    async fn documents_by_key(&self, _keys: &[DocumentKey]) -> Result<DocumentList, Error> {
        unsupported()
    }

    async fn revocations_of(&self, _targets: &[RevocationTarget]) -> Result<Vec<RevocationRow>, Error> {
        unsupported()
    }

    async fn revocations(&self, _limit: usize) -> Result<RevocationPage, Error> {
        unsupported()
    }

    async fn commit(&self, _request: CommitRequest) -> Result<CommitOutcome, Error> {
        unsupported()
    }

    async fn ask_approval(&self, _request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, Error> {
        unsupported()
    }

    async fn use_approvals(&self, _request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, Error> {
        unsupported()
    }

    async fn give_back_approvals(&self, _request: ApprovalUseRequest) -> Result<bool, Error> {
        unsupported()
    }

    async fn approvals(&self, _filter: ApprovalFilter, _limit: usize) -> Result<ApprovalPage, Error> {
        unsupported()
    }

    async fn policy_history(&self, _limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        unsupported()
    }

    async fn documents_at(&self, _number: u64) -> Result<DocumentList, Error> {
        unsupported()
    }
}
