//! Sockets, runtimes and drain: one acceptor hands connections evenly to current-thread runtimes, each serving its own.
//!
//! Sharing a connection between cores costs more than a decision, so a connection stays on the runtime that got it. Bytes
//! leave only after that runtime's barrier was passed ([`crate::model::barrier`]). Decides nothing and spawns nothing: `app`
//! does. Look next at `server/io.rs`.

mod http;
mod io;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;

pub use http::{HttpPages, serve_http};

use crate::model::barrier::WriteBarrier;
use crate::model::connection::PeerInfo;
use crate::model::limits::{CONNECTIONS_MAX, STREAMS_PER_CONNECTION_MAX};
use io::Io;

/// Connections that wait for a runtime to take them.
const HANDED_OVER_MAX: usize = 128;
/// Connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 1024;
/// HTTP/2 window of a stream and of a connection.
const WINDOW_BYTES: u32 = 1024 * 1024;
/// All headers of a call.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// A peer that answers no ping for this long is gone.
const KEEPALIVE: Duration = Duration::from_secs(30);

static CONNECTIONS: AtomicU64 = AtomicU64::new(0);

/// Why a listener or a lane cannot serve. One line with what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else has the port.
    #[error("{flag}: {address} is in use: stop what listens there, or take another port ({flag} HOST:0 takes a free one)")]
    InUse {
        /// The flag that named it.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// Not loopback, and there is no TLS.
    #[error("{flag}: {address} is not a loopback address, and this version has no TLS: listen on 127.0.0.1 behind a proxy that has")]
    NotLoopback {
        /// The flag that named it.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// The system refused.
    #[error("{flag}: cannot listen on {address}: {source}")]
    Bind {
        /// The flag that named it.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The runtime of a lane could not be made, or its transport failed.
    #[error("a serving runtime failed: {0}")]
    Lane(String),
}

/// A bound listener; nothing is accepted yet.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds a loopback address; port 0 takes a free one.
    ///
    /// # Errors
    /// As [`Error`] says, naming the flag.
    pub fn bind(flag: &'static str, address: SocketAddr) -> Result<Self, Error> {
        if !address.ip().is_loopback() {
            return Err(Error::NotLoopback { flag, address });
        }
        let bind = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            // A restart need not wait for old connections to be forgotten; a port in use stays an error.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            let socket = TcpListener::from(socket);
            let address = socket.local_addr()?;
            Ok(Self { socket, address })
        };
        bind().map_err(|source: std::io::Error| match source.kind() {
            ErrorKind::AddrInUse => Error::InUse { flag, address },
            _ => Error::Bind { flag, address, source },
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The end of a lane at which connections arrive.
#[derive(Debug)]
pub struct Inbox(mpsc::Receiver<Accepted>);

/// The end at which the acceptor hands them over.
#[derive(Clone, Debug)]
pub struct Outbox(mpsc::Sender<Accepted>);

#[derive(Debug)]
struct Accepted {
    stream: TcpStream,
    peer: PeerInfo,
    permit: tokio::sync::OwnedSemaphorePermit,
}

/// A pair that joins the acceptor to one lane.
pub fn lane_channel() -> (Outbox, Inbox) {
    let (sender, receiver) = mpsc::channel(HANDED_OVER_MAX);
    (Outbox(sender), Inbox(receiver))
}

/// Accepts connections and hands them to the lanes in turn, until `stop` says so. Runs on the control runtime.
///
/// # Errors
/// If the listener cannot be used on this runtime.
pub async fn accept(listener: Listener, lanes: Vec<Outbox>, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
    let listener = tokio::net::TcpListener::from_std(listener.socket).map_err(|error| Error::Lane(error.to_string()))?;
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut turn = lanes.iter().cycle();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, or the peer left: others may still come.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            tracing::warn!(%address, limit = CONNECTIONS_MAX, "too many connections: one is refused");
            continue;
        };
        let peer = PeerInfo {
            connection_id: CONNECTIONS.fetch_add(1, Ordering::Relaxed),
            address: address.to_string().into(),
            is_loopback: address.ip().is_loopback(),
        };
        let handed = stream.into_std().map(|stream| Accepted { stream, peer, permit });
        if let (Some(lane), Ok(accepted)) = (turn.next(), handed) {
            // A lane that does not take connections holds up only new ones.
            if lane.0.send(accepted).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Serves the connections of one lane on a runtime of this thread, until `stop` says so and what is in flight has ended, or
/// the drain timeout has passed.
///
/// # Errors
/// [`Error::Lane`].
pub fn run_lane(
    inbox: Inbox,
    routes: impl FnOnce() -> Routes,
    barrier: Arc<dyn WriteBarrier>,
    drain_timeout: Duration,
    stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Lane(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| failed(&error))?;
    runtime.block_on(async {
        let connections = ReceiverStream::new(inbox.0).map(|accepted| {
            accepted.stream.set_nodelay(true)?;
            let stream = tokio::net::TcpStream::from_std(accepted.stream)?;
            Ok::<_, std::io::Error>(Io::new(stream, accepted.peer, barrier.clone(), accepted.permit))
        });
        let mut stopping = stop.clone();
        let stopped = async move {
            // A sender that is gone means the process is ending.
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        let mut overdue = stop;
        let deadline = async move {
            let _ = overdue.wait_for(|stop| *stop).await;
            tokio::time::sleep(drain_timeout).await;
        };
        let served = server().add_routes(routes()).serve_with_incoming_shutdown(connections, stopped);
        tokio::select! {
            served = served => served.map_err(|error| failed(&error)),
            () = deadline => {
                tracing::warn!("calls were still in flight when the drain timeout passed: their connections are cut");
                Ok(())
            }
        }
    })
}

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(4 * WINDOW_BYTES)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
}
