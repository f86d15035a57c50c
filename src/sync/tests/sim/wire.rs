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

use super::host::{Host, Tasks};
use crate::model::revision::{HistoryId, Revision};
use crate::service::{Answer, CheckRequest};
use crate::store::{Changes, CommitRequest, Error, Heartbeat, Registration, Replicas, State};

const PORT: u16 = 7;

/// A question.
pub(super) enum Call {
    /// With the history that the heartbeat counts for. The same holds for `Poll`.
    Load(Heartbeat, Option<HistoryId>),
    Poll(Heartbeat, Option<HistoryId>),
    Beat(Heartbeat),
    Register(Registration),
    Changes(u64),
    Revision,
    Replicas,
    Commit(CommitRequest),
    Spend([u8; 32]),
    Check(Box<CheckRequest>),
}

/// An answer.
pub(super) enum Reply {
    Load(Box<State>),
    Changes(Changes),
    Revision(Revision),
    Replicas(Replicas),
    Done,
    Failed(Error),
    /// The tree index of the commit, if it was made.
    Commit(Result<usize, Error>),
    Spend(bool),
    NotReady,
    Check(Box<Checked>),
}

/// The answer of a replica, with facts that only the simulation may know.
pub(super) struct Checked {
    pub(super) answer: Answer,
    /// The commit whose snapshot decided, if it is the one that the answer names.
    pub(super) commit: Option<usize>,
    /// The commit whose policy was in force with it.
    pub(super) policy: Option<usize>,
    /// The time at which the answer left its handler.
    pub(super) answered_ns: i64,
    pub(super) incarnation: u32,
}

enum Parcel {
    Call(Call),
    Reply(Reply),
}

/// The messages in transit, by number.
#[derive(Default)]
pub(super) struct Post(Mutex<(u64, BTreeMap<u64, Parcel>)>);

impl Post {
    fn put(&self, parcel: Parcel) -> u64 {
        let (number, parcels) = &mut *self.0.lock().unwrap();
        *number += 1;
        parcels.insert(*number, parcel);
        *number
    }

    fn take(&self, number: u64) -> Parcel {
        self.0.lock().unwrap().1.remove(&number).expect("a number comes once")
    }
}

/// A client with one connection.
pub(super) struct Peer {
    post: Arc<Post>,
    open: tokio::sync::Mutex<Option<(String, TcpStream)>>,
}

impl Peer {
    pub(super) fn new(post: Arc<Post>) -> Self {
        Self { post, open: tokio::sync::Mutex::new(None) }
    }

    /// Asks a question. If it fails or is dropped before its end, it closes the connection.
    pub(super) async fn ask(&self, to: &str, call: Call) -> io::Result<Reply> {
        let mut open = self.open.lock().await;
        let mut stream = match open.take() {
            Some((name, stream)) if name == to => stream,
            _ => TcpStream::connect((to, PORT)).await?,
        };
        stream.write_u64(self.post.put(Parcel::Call(call))).await?;
        let number = stream.read_u64().await?;
        *open = Some((to.to_owned(), stream));
        match self.post.take(number) {
            Parcel::Reply(reply) => Ok(reply),
            Parcel::Call(_) => panic!("a server answers"),
        }
    }
}

/// Serves until the machine dies. If `answer` never returns, the client gets no answer.
pub(super) async fn serve<A, F>(post: Arc<Post>, host: Arc<Host>, tasks: Tasks, answer: A) -> turmoil::Result
where
    A: Fn(Call) -> F + Clone + 'static,
    F: Future<Output = Reply> + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await?;
    loop {
        let (mut stream, _) = listener.accept().await?;
        let (post, answer, machine) = (post.clone(), answer.clone(), host.clone());
        tasks.spawn(host.run(async move {
            while let Ok(number) = stream.read_u64().await {
                let Parcel::Call(call) = post.take(number) else { panic!("a client asks") };
                let reply = answer(call).await;
                // The process may have been stopped in the middle of a decision.
                machine.running().await;
                if stream.write_u64(post.put(Parcel::Reply(reply))).await.is_err() {
                    return;
                }
            }
        }));
    }
}
