//! The protocol between simulated machines. TCP of turmoil carries only numbers; each number stands for a message that is kept in memory.
//!
//! The network delays, drops, cuts and half-closes; encoding the messages would test nothing more. A connection carries one
//! question at a time. A client that gives up closes its connection, so a late answer reaches no client.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use turmoil::net::{TcpListener, TcpStream};

use super::host::{HostTasks, SimHost};
use crate::model::revision::{HistoryId, Revision};
use crate::service::{CheckAnswer, DecisionRequest};
use crate::store::{ChangeLogPage, CommitRequest, Error, ReplicaHeartbeat, ReplicaList, ReplicaRegistration, StoreState};

const PORT: u16 = 7;

/// A question.
pub(super) enum SimRequest {
    /// With the history that the heartbeat counts for. The same holds for `Poll`.
    Load(ReplicaHeartbeat, Option<HistoryId>),
    Poll(ReplicaHeartbeat, Option<HistoryId>),
    Beat(ReplicaHeartbeat),
    Register(ReplicaRegistration),
    Changes(u64),
    Revision,
    Replicas,
    Commit(CommitRequest),
    Spend([u8; 32]),
    Check(Box<DecisionRequest>),
}

/// An answer.
pub(super) enum SimReply {
    Load(Box<StoreState>),
    Changes(ChangeLogPage),
    Revision(Revision),
    Replicas(ReplicaList),
    Done,
    Failed(Error),
    /// The tree index of the commit, if it was made.
    Commit(Result<usize, Error>),
    Spend(bool),
    NotReady,
    Check(Box<CheckedReply>),
}

/// The answer of a replica, with facts that only the simulation may know.
pub(super) struct CheckedReply {
    pub(super) answer: CheckAnswer,
    /// The commit whose snapshot decided, if it is the one that the answer names.
    pub(super) commit: Option<usize>,
    /// The commit whose policy was in force with it.
    pub(super) policy: Option<usize>,
    /// The time at which the answer left its handler.
    pub(super) answered_ns: i64,
    pub(super) incarnation: u32,
}

enum SimMessage {
    Call(SimRequest),
    Reply(SimReply),
}

/// The messages in transit, by number.
#[derive(Default)]
pub(super) struct MessageTable(Mutex<(u64, BTreeMap<u64, SimMessage>)>);

impl MessageTable {
    fn put(&self, parcel: SimMessage) -> u64 {
        let (number, parcels) = &mut *self.0.lock().unwrap();
        *number += 1;
        parcels.insert(*number, parcel);
        *number
    }

    fn take(&self, number: u64) -> SimMessage {
        self.0.lock().unwrap().1.remove(&number).expect("a number comes once")
    }
}

/// A client with one connection.
pub(super) struct SimClient {
    post: Arc<MessageTable>,
    open: tokio::sync::Mutex<Option<(String, TcpStream)>>,
}

impl SimClient {
    pub(super) fn new(post: Arc<MessageTable>) -> Self {
        Self { post, open: tokio::sync::Mutex::new(None) }
    }

    /// Asks a question. If it fails or is dropped before its end, it closes the connection.
    pub(super) async fn ask(&self, to: &str, call: SimRequest) -> io::Result<SimReply> {
        let mut open = self.open.lock().await;
        let mut stream = match open.take() {
            Some((name, stream)) if name == to => stream,
            _ => TcpStream::connect((to, PORT)).await?,
        };
        stream.write_u64(self.post.put(SimMessage::Call(call))).await?;
        let number = stream.read_u64().await?;
        *open = Some((to.to_owned(), stream));
        match self.post.take(number) {
            SimMessage::Reply(reply) => Ok(reply),
            SimMessage::Call(_) => panic!("a server answers"),
        }
    }
}

/// Serves until the machine dies. If `answer` never returns, the client gets no answer.
pub(super) async fn serve<A, F>(post: Arc<MessageTable>, host: Arc<SimHost>, tasks: HostTasks, answer: A) -> turmoil::Result
where
    A: Fn(SimRequest) -> F + Clone + 'static,
    F: Future<Output = SimReply> + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await?;
    loop {
        let (mut stream, _) = listener.accept().await?;
        let (post, answer, machine) = (post.clone(), answer.clone(), host.clone());
        tasks.spawn(host.run(async move {
            while let Ok(number) = stream.read_u64().await {
                let SimMessage::Call(call) = post.take(number) else { panic!("a client asks") };
                let reply = answer(call).await;
                // The process may have been stopped in the middle of a decision.
                machine.wait_until_running().await;
                if stream.write_u64(post.put(SimMessage::Reply(reply))).await.is_err() {
                    return;
                }
            }
        }));
    }
}
