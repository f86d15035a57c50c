//! One accepted socket, as the HTTP stack sees it: behind the write barrier, a handshake timeout and a stall timeout.
//!
//! INVARIANT: bytes leave only through [`GuardedConnection::pass_barrier`]. Once the barrier has failed, nothing leaves on that connection
//! again. The file parses nothing and blocks on nothing but the barrier. Look next at `model/write_barrier.rs`.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::acceptor::{AcceptedSocket, OpenConnectionCount};
use super::connection_registry::{ConnectionSlot, TrackedConnection};
use super::counters::CutCause;
use super::frames::FrameMeter;
use super::settings::Settings;
use crate::model::connection::PeerInfo;
use crate::model::write_barrier::WriteBarrier;

/// Length of the client's HTTP/2 preface, which ends the handshake (RFC 9113, 3.4).
const PREFACE_BYTES: usize = 24;

/// The barrier and the timeouts that guard every connection of a runtime.
#[derive(Clone)]
pub(super) struct ConnectionGuards {
    pub(super) barrier: Arc<dyn WriteBarrier>,
    /// Time until the preface has been read. `None` for HTTP/1.1, which has its own timeout for headers.
    pub(super) handshake_timeout: Option<Duration>,
    pub(super) write_stall_timeout: Duration,
}

impl ConnectionGuards {
    /// The guards for HTTP/2 if `preface` is set, otherwise for HTTP/1.1.
    pub(super) fn new(barrier: Arc<dyn WriteBarrier>, settings: &Settings, preface: bool) -> Self {
        Self {
            barrier,
            handshake_timeout: preface.then(|| Duration::from_millis(settings.handshake_timeout_ms)),
            write_stall_timeout: Duration::from_millis(settings.write_stall_timeout_ms),
        }
    }
}

/// A served connection.
pub(super) struct GuardedConnection {
    socket: TcpStream,
    barrier: Arc<dyn WriteBarrier>,
    /// The barrier's failures when the connection opened. An answer whose record was lost since then may still wait here.
    failures_at_open: u64,
    handshake: Option<HandshakeTimer>,
    /// `None` for HTTP/1.1, in which all bytes belong to a request.
    frames: Option<FrameMeter>,
    write_stall_timeout: Duration,
    stall_timer: Option<Pin<Box<Sleep>>>,
    is_cut: bool,
    peer: PeerInfo,
    admitted: ConnectionSlot,
    _open_count: OpenConnectionCount,
}

struct HandshakeTimer {
    timeout: Pin<Box<Sleep>>,
    bytes_left: usize,
}

impl GuardedConnection {
    /// Registers the socket with the current runtime.
    pub(super) fn new(accepted: AcceptedSocket, guards: &ConnectionGuards) -> io::Result<Self> {
        Ok(Self {
            socket: TcpStream::from_std(accepted.socket)?,
            failures_at_open: guards.barrier.failure_count(),
            barrier: Arc::clone(&guards.barrier),
            handshake: guards
                .handshake_timeout
                .map(|timeout| HandshakeTimer { timeout: Box::pin(tokio::time::sleep(timeout)), bytes_left: PREFACE_BYTES }),
            frames: guards.handshake_timeout.map(|_| FrameMeter::new(PREFACE_BYTES)),
            write_stall_timeout: guards.write_stall_timeout,
            stall_timer: None,
            is_cut: false,
            peer: accepted.peer,
            admitted: accepted.admitted,
            _open_count: accepted.open_count,
        })
    }

    pub(super) fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    /// The state of this connection that the registry sees.
    pub(super) fn tracked(&self) -> &Arc<TrackedConnection> {
        &self.admitted.connection
    }

    fn count_cut(&self, cause: CutCause) {
        self.admitted.connection.counters.count_cut(cause);
    }

    /// Lets bytes out only once every record so far is in the kernel.
    fn pass_barrier(&mut self) -> io::Result<()> {
        if self.is_cut {
            return Err(connection_cut_error());
        }
        let passed = self.barrier.flush_before_write().and_then(|()| match self.barrier.failure_count() {
            failures if failures == self.failures_at_open => Ok(()),
            _ => Err(io::Error::other("records failed to reach the kernel while this connection was open")),
        });
        if let Err(error) = passed {
            self.is_cut = true;
            self.count_cut(CutCause::Barrier);
            tracing::error!(connection = self.peer.connection_id, %error, "connection cut: the write barrier failed");
            return Err(connection_cut_error());
        }
        Ok(())
    }

    /// Cuts a connection whose peer takes no bytes.
    fn watch_stall(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(sent) = &written {
            if let (Some(frames), Ok(bytes)) = (&mut self.frames, sent) {
                frames.note_sent(*bytes);
            }
            self.stall_timer = None;
            return written;
        }
        let timeout = self.write_stall_timeout;
        let stalled = self.stall_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        if stalled.as_mut().poll(cx).is_ready() {
            self.is_cut = true;
            self.count_cut(CutCause::WriteStall);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes no bytes")));
        }
        Poll::Pending
    }
}

impl AsyncRead for GuardedConnection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_cut {
            return Poll::Ready(Err(connection_cut_error()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.socket).poll_read(cx, buffer);
        let arrived = buffer.filled().get(before..).unwrap_or_default();
        if this.frames.as_mut().is_some_and(|frames| !frames.read(arrived)) {
            this.is_cut = true;
            this.count_cut(CutCause::Frames);
            return Poll::Ready(Err(connection_cut_error()));
        }
        if let Some(handshake) = &mut this.handshake {
            handshake.bytes_left = handshake.bytes_left.saturating_sub(buffer.filled().len().saturating_sub(before));
            if handshake.bytes_left == 0 {
                this.handshake = None;
            } else if handshake.timeout.as_mut().poll(cx).is_ready() {
                this.count_cut(CutCause::Handshake);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer sent no HTTP/2 preface")));
            }
        }
        read
    }
}

impl AsyncWrite for GuardedConnection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.pass_barrier()?;
        let written = Pin::new(&mut this.socket).poll_write(cx, bytes);
        this.watch_stall(cx, written)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.pass_barrier()?;
        let written = Pin::new(&mut this.socket).poll_write_vectored(cx, parts);
        this.watch_stall(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}

fn connection_cut_error() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was cut")
}
