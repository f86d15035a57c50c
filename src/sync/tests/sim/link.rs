//! A store as one process of the simulation reaches it: the `Store` trait over a network that loses, delays and cuts.
//!
//! Look next at `wire.rs`, its protocol, and at `store.rs`, the model behind it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::store::Durability;
use super::wire::{Call, Peer, Post, Reply};
use crate::model::approval::{ApprovalFilter, Approvals, AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::records::{DocumentKey, RevocationRow, Target};
use crate::model::revision::{HistoryId, Revision};
use crate::store::{
    Changes, CommitRequest, Committed, Documents, Error, Heartbeat, Lineage, Merged, PolicyCommit, Registration, Replicas,
    Revocations, State, Store,
};

/// Timeout of a query that has no other limit.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The connection to the copy of the store that a process believes to be the store.
pub(super) struct Link {
    /// Polls and loads use the first connection, and everything else uses the second.
    poller: Peer,
    reader: Peer,
    copy: Arc<Mutex<usize>>,
    durability: Durability,
    /// The history of the first answer. A heartbeat counts for this history only.
    history: Mutex<Option<HistoryId>>,
    /// Kept open. This network never sends the store's hint.
    wake: watch::Sender<u64>,
}

impl Link {
    pub(super) fn new(post: &Arc<Post>, copy: Arc<Mutex<usize>>, durability: Durability) -> Self {
        let (poller, reader) = (Peer::new(post.clone()), Peer::new(post.clone()));
        Self { poller, reader, copy, durability, history: Mutex::default(), wake: watch::channel(0).0 }
    }

    async fn ask(&self, peer: &Peer, call: Call) -> Result<Reply, Error> {
        let store = format!("store-{}", *self.copy.lock().unwrap());
        match peer.ask(&store, call).await {
            Ok(Reply::Failed(error)) => Err(error),
            Ok(reply) => Ok(reply),
            Err(error) => Err(Error::Unavailable(error.to_string())),
        }
    }

    async fn read(&self, call: Call) -> Result<Reply, Error> {
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

fn unasked<T>() -> Result<T, Error> {
    Err(Error::Unavailable("nobody in the simulation asks this".to_owned()))
}

#[async_trait]
impl Store for Link {
    async fn load_as(&self, heartbeat: &Heartbeat) -> Result<State, Error> {
        match self.ask(&self.poller, Call::Load(heartbeat.clone(), self.followed())).await? {
            Reply::Load(state) => {
                self.met(&state.revision.history);
                Ok(*state)
            }
            _ => panic!("a load is answered by a state"),
        }
    }

    async fn poll(&self, heartbeat: &Heartbeat) -> Result<Changes, Error> {
        match self.ask(&self.poller, Call::Poll(heartbeat.clone(), self.followed())).await? {
            Reply::Changes(changes) => Ok(changes),
            _ => panic!("a poll is answered by changes"),
        }
    }

    async fn changes(&self, after: u64) -> Result<Changes, Error> {
        match self.read(Call::Changes(after)).await? {
            Reply::Changes(changes) => Ok(changes),
            _ => panic!("so is a look at the log"),
        }
    }

    async fn revision(&self) -> Result<Revision, Error> {
        match self.read(Call::Revision).await? {
            Reply::Revision(revision) => Ok(revision),
            _ => panic!("a revision was asked for"),
        }
    }

    async fn register(&self, registration: &Registration) -> Result<(), Error> {
        self.read(Call::Register(registration.clone())).await.map(drop)
    }

    async fn beat(&self, heartbeat: &Heartbeat) -> Result<(), Error> {
        self.read(Call::Beat(heartbeat.clone())).await.map(drop)
    }

    async fn replicas(&self) -> Result<Replicas, Error> {
        match self.read(Call::Replicas).await? {
            Reply::Replicas(replicas) => Ok(replicas),
            _ => panic!("the fleet was asked for"),
        }
    }

    async fn spend(&self, key: [u8; 32], _expires_at_unix_s: i64) -> Result<bool, Error> {
        match self.ask(&self.reader, Call::Spend(key)).await? {
            Reply::Spend(first) => Ok(first),
            _ => panic!("a use is answered so"),
        }
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        (self.durability == Durability::Asynchronous).then_some("asynchronous")
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }

    async fn lineage(&self, _at: u64) -> Result<Lineage, Error> {
        // No store is adopted here, so a quarantined replica stays quarantined.
        unasked()
    }

    async fn merges(&self) -> Result<Vec<Merged>, Error> {
        unasked()
    }

    fn follow_history(&self, _revision: &Revision) {}

    async fn load(&self) -> Result<State, Error> {
        unasked()
    }

    async fn documents(&self, _kind: Option<&str>) -> Result<Documents, Error> {
        unasked()
    }

    async fn documents_named(&self, _keys: &[DocumentKey]) -> Result<Documents, Error> {
        unasked()
    }

    async fn revocations_of(&self, _targets: &[Target]) -> Result<Vec<RevocationRow>, Error> {
        unasked()
    }

    async fn revocations(&self, _limit: usize) -> Result<Revocations, Error> {
        unasked()
    }

    async fn commit(&self, _request: CommitRequest) -> Result<Committed, Error> {
        unasked()
    }

    async fn ask_approval(&self, _request: AskApproval) -> Result<AskOutcome, Error> {
        unasked()
    }

    async fn use_approvals(&self, _request: UseApprovals) -> Result<UseOutcome, Error> {
        unasked()
    }

    async fn give_back_approvals(&self, _request: UseApprovals) -> Result<bool, Error> {
        unasked()
    }

    async fn approvals(&self, _filter: ApprovalFilter, _limit: usize) -> Result<Approvals, Error> {
        unasked()
    }

    async fn history(&self, _limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        unasked()
    }

    async fn documents_at(&self, _number: u64) -> Result<Documents, Error> {
        unasked()
    }
}
