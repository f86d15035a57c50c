//! Binds the listeners, accepts sockets and hands them evenly to the runtimes that serve them.
//!
//! A socket goes to the runtime with the fewest open connections, so that long-lived connections stay spread. Nothing is read here,
//! and every queue has a limit. When the listener is full, the registry cuts another connection or the new one is closed at once.
//! Look next at `connection_registry.rs`, which chooses the connection to cut, and at `worker.rs`, which serves the sockets.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::Error;
use super::connection_registry::{AdmissionError, ConnectionRegistry, ConnectionSlot};
use super::counters::ListenerCounters;
use super::phase::{PhaseReceiver, ServerPhase};
use crate::model::connection::{PeerInfo, VerifiedSignatureFlag};

/// Connections that the kernel queues until they are accepted.
const BACKLOG: i32 = 1024;
/// Most accepted sockets that wait for one runtime.
pub(super) const HANDOVER_SOCKETS_MAX: usize = 64;
/// Pause after an error that the next accept would meet again, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Pause between attempts while cut connections have not closed yet, and the longest wait for them.
const CUT_PENDING_WAIT: Duration = Duration::from_millis(1);
const LEAVING_WAIT_MAX: Duration = Duration::from_millis(200);
/// Pause between attempts while every connection that could be cut is new. The kernel queues further ones.
const NEW_WAIT: Duration = Duration::from_millis(5);

/// A listener, and the flag that sets its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerRole {
    /// Decisions, gRPC.
    Decisions,
    /// Health and metrics, HTTP/1.1.
    Http,
    /// Administration, gRPC.
    Admin,
}

impl ListenerRole {
    /// The command-line flag that sets this listener's address.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Decisions => "--listen",
            Self::Http => "--http-listen",
            Self::Admin => "--admin-listen",
        }
    }

    /// The listener's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decisions => "decisions",
            Self::Http => "http",
            Self::Admin => "admin",
        }
    }
}

/// Binds `address` for `role`.
pub(super) fn bind(role: ListenerRole, address: SocketAddr) -> Result<TcpListener, Error> {
    let flag = role.flag();
    if !address.ip().to_canonical().is_loopback() {
        return Err(Error::NotLoopback { flag, address });
    }
    try_bind(address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Error::AddressInUse { flag, address },
        io::ErrorKind::PermissionDenied => Error::AddressForbidden { flag, address },
        _ => Error::Bind { flag, address, source: error },
    })
}

fn try_bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // After a restart the old connections are in TIME_WAIT. Linux still refuses a second live listener on the address.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The peer at `address`, on connection `connection_id`.
pub(super) fn peer_info(connection_id: u64, address: SocketAddr, verified_signature: Arc<VerifiedSignatureFlag>) -> PeerInfo {
    let is_loopback = address.ip().to_canonical().is_loopback();
    PeerInfo { connection_id, address: address.to_string().into(), is_loopback, verified_signature }
}

/// Counts one open connection of a runtime until it is dropped.
pub(super) struct OpenConnectionCount {
    counters: Arc<ListenerCounters>,
    runtime: usize,
}

impl OpenConnectionCount {
    fn new(counters: &Arc<ListenerCounters>, runtime: usize) -> Self {
        if let Some(open) = counters.open.get(runtime) {
            open.fetch_add(1, Ordering::Relaxed);
        }
        Self { counters: Arc::clone(counters), runtime }
    }
}

impl Drop for OpenConnectionCount {
    fn drop(&mut self) {
        if let Some(open) = self.counters.open.get(self.runtime) {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A socket on its way to a runtime; no runtime has registered it yet.
pub(super) struct AcceptedSocket {
    pub(super) socket: TcpStream,
    pub(super) peer: PeerInfo,
    pub(super) admitted: ConnectionSlot,
    pub(super) open_count: OpenConnectionCount,
}

/// Accepts connections for one listener until the server drains.
pub(super) struct Acceptor {
    pub(super) role: ListenerRole,
    pub(super) listener: TcpListener,
    pub(super) runtimes: Vec<mpsc::Sender<AcceptedSocket>>,
    pub(super) counters: Arc<ListenerCounters>,
    pub(super) registry: Arc<ConnectionRegistry>,
    pub(super) next_connection_id: Arc<AtomicU64>,
    pub(super) phases: PhaseReceiver,
}

impl Acceptor {
    pub(super) async fn run(self) {
        let Self { role, listener, runtimes, counters, registry, next_connection_id, mut phases } = self;
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(listener = role.name(), %error, "cannot accept connections");
                return;
            }
        };
        let sweeping = Arc::clone(&registry);
        let hands = SocketDispatcher { role, runtimes, counters, registry, next_connection_id };
        let accepting = hands.accept_all(&listener);
        tokio::select! {
            () = accepting => (),
            () = sweeping.run_sweeper() => (),
            () = phases.wait_until(ServerPhase::Draining) => (),
        }
    }
}

struct SocketDispatcher {
    role: ListenerRole,
    runtimes: Vec<mpsc::Sender<AcceptedSocket>>,
    counters: Arc<ListenerCounters>,
    registry: Arc<ConnectionRegistry>,
    next_connection_id: Arc<AtomicU64>,
}

impl SocketDispatcher {
    async fn accept_all(&self, listener: &tokio::net::TcpListener) {
        let mut turn = 0_usize;
        let mut is_full = false;
        loop {
            let (socket, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    if !is_connection_error(&error) {
                        tracing::warn!(listener = self.role.name(), %error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                    continue;
                }
            };
            let id = self.next_connection_id.fetch_add(1, Ordering::Relaxed);
            let Ok(admitted) = self.admit(id, address.ip().to_canonical()).await else {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                // Logs once each time the limit is reached, so that a flood does not fill the log.
                if !is_full {
                    tracing::warn!(
                        listener = self.role.name(),
                        "connections refused: too many are open, and those that were cut have not closed yet"
                    );
                }
                is_full = true;
                continue;
            };
            is_full = false;
            turn = turn.wrapping_add(1);
            let peer = peer_info(id, address, Arc::clone(&admitted.connection.verified_signature));
            // A socket that cannot be prepared has already been closed by its peer.
            if let Ok(socket) = prepare_socket(socket) {
                let order = runtimes_by_load(&self.counters.open_per_runtime(), turn);
                self.dispatch(socket, peer, admitted, order).await;
            }
        }
    }

    /// Admits a connection; waits a little for cut connections to close, and for the grace of new ones to end.
    async fn admit(&self, id: u64, peer: IpAddr) -> Result<ConnectionSlot, AdmissionError> {
        let mut leaving_until = tokio::time::Instant::now() + LEAVING_WAIT_MAX;
        loop {
            match self.registry.admit(id, peer) {
                Err(AdmissionError::CutPending) if tokio::time::Instant::now() < leaving_until => {
                    tokio::time::sleep(CUT_PENDING_WAIT).await
                }
                // The grace of the oldest new connection ends soon.
                Err(AdmissionError::New) => {
                    tokio::time::sleep(NEW_WAIT).await;
                    leaving_until = tokio::time::Instant::now() + LEAVING_WAIT_MAX;
                }
                admitted => return admitted,
            }
        }
    }

    /// Hands a socket to the first runtime of `order` with room. If none has room, it waits for the first one and the kernel
    /// queues.
    async fn dispatch(&self, socket: TcpStream, peer: PeerInfo, admitted: ConnectionSlot, order: Vec<usize>) {
        self.counters.accepted.fetch_add(1, Ordering::Relaxed);
        let Some(first) = order.first().copied() else { return };
        let mut accepted = AcceptedSocket { socket, peer, admitted, open_count: OpenConnectionCount::new(&self.counters, first) };
        for runtime in order {
            let Some(sender) = self.runtimes.get(runtime) else { continue };
            accepted.open_count = OpenConnectionCount::new(&self.counters, runtime);
            match sender.try_send(accepted) {
                Ok(()) => return,
                Err(TrySendError::Full(back) | TrySendError::Closed(back)) => accepted = back,
            }
        }
        accepted.open_count = OpenConnectionCount::new(&self.counters, first);
        if let Some(sender) = self.runtimes.get(first) {
            // The channel is closed only while the server stops. The socket then closes unread, so its client may safely try
            // another replica.
            let _ = sender.send(accepted).await;
        }
    }
}

/// Sets the TCP options here, because `serve_with_incoming` ignores those of the HTTP stack.
fn prepare_socket(socket: tokio::net::TcpStream) -> io::Result<TcpStream> {
    socket.set_nodelay(true)?;
    socket.into_std()
}

/// The runtimes with the fewest open connections first. Among equals `turn` decides the order.
fn runtimes_by_load(open: &[usize], turn: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..open.len()).collect();
    if !order.is_empty() {
        order.rotate_left(turn % open.len());
    }
    order.sort_by_key(|runtime| open.get(*runtime).copied().unwrap_or(usize::MAX));
    order
}

/// Errors that concern only the connection that was just lost, not the listener.
fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted | WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_go_where_fewest_are_open() {
        let check =
            |open: &[usize], turn, expected: &[usize]| assert_eq!(runtimes_by_load(open, turn), expected, "{open:?} {turn}");
        check(&[], 3, &[]);
        check(&[9], 7, &[0]);
        check(&[0, 0], 0, &[0, 1]);
        check(&[0, 0], 1, &[1, 0]);
        check(&[3, 1], 0, &[1, 0]);
        check(&[3, 1], 1, &[1, 0]);
        check(&[2, 0, 2], 2, &[1, 2, 0]);
    }

    #[test]
    fn errors_of_one_connection_do_not_pause_the_listener() {
        let check = |kind, expected| assert_eq!(is_connection_error(&io::Error::from(kind)), expected, "{kind}");
        check(io::ErrorKind::ConnectionAborted, true);
        check(io::ErrorKind::ConnectionReset, true);
        check(io::ErrorKind::Other, false);
        check(io::ErrorKind::OutOfMemory, false);
    }
}
