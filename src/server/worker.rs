//! A runtime that serves connections: one OS thread and one current-thread tokio runtime, with its own services and barrier.
//!
//! A call never crosses threads. The services are made on the thread itself, inside its runtime. Look next at `connection.rs`,
//! through which every byte passes, and at `http.rs` for the HTTP/1.1 listener.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot, watch};
use tower::service_fn;

use super::acceptor::AcceptedSocket;
use super::active_call;
use super::connection::{ConnectionGuards, GuardedConnection};
use super::connection_registry::TrackedConnection;
use super::counters::CutCause;
use super::phase::{DrainSignal, PhaseReceiver, ServerPhase};
use super::settings::Settings;
use super::{Error, GrpcServices, ListenerRole, RuntimeContext, RuntimeShutdownFuture};
use crate::model::runtime::build_runtime;

/// Longest wait for blocking work that is still under way when its runtime ends.
const BLOCKING_GRACE: Duration = Duration::from_secs(1);
/// Longest wait for an idle connection to close after it was told to.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// The window that HTTP/2 begins with.
const STREAM_WINDOW_BYTES_MIN: u32 = 65_535;
/// The smallest maximum that HTTP/2 allows.
const FRAME_BYTES_MAX: u32 = 16 * 1024;
/// Most streams that the peer has reset before they were accepted.
const PENDING_RESETS_MAX: usize = 20;
/// Most streams that were reset for a peer's error, over the life of a connection.
const ERROR_RESETS_MAX: usize = 1024;
/// Most bytes of a reply that are buffered before the peer takes them.
const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Longest wait for calls to write their records once they are answered or cut. It is longer than the store takes for a use.
pub(super) const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// A started thread, with the signals that it gives its owner.
pub(super) struct WorkerThread {
    pub(super) name: String,
    /// Fires once the services are made.
    pub(super) started: oneshot::Receiver<()>,
    /// Fires, or is dropped, when the runtime is gone.
    pub(super) ended: oneshot::Receiver<()>,
    pub(super) thread: JoinHandle<()>,
}

/// The inputs that a worker needs besides its work.
pub(super) struct WorkerContext {
    pub(super) sockets: mpsc::Receiver<AcceptedSocket>,
    pub(super) context: RuntimeContext,
    pub(super) phases: PhaseReceiver,
    pub(super) settings: Arc<Settings>,
}

/// Starts a thread called `name` (15 bytes are visible) that runs `work` on its own runtime until it ends or is cut. The thread
/// then awaits `finish`, for at most [`FINISH_TIMEOUT`].
pub(super) fn start_worker<W, F>(
    name: String,
    mut cut: PhaseReceiver,
    finish: Option<RuntimeShutdownFuture>,
    work: W,
) -> Result<WorkerThread, Error>
where
    W: FnOnce(oneshot::Sender<()>) -> F + Send + 'static,
    F: Future<Output = ()>,
{
    let (started_sender, started) = oneshot::channel();
    let (ended_sender, ended) = oneshot::channel();
    let failed = |source: io::Error| Error::Thread { name: name.clone(), source };
    let runtime = build_runtime(Builder::new_current_thread().thread_name(&name)).map_err(failed)?;
    let body = move || {
        run_until(&runtime, async { work(started_sender).await }, cut.wait_until(ServerPhase::Cut));
        if let Some(finish) = finish {
            let finished = runtime.block_on(async { tokio::time::timeout(FINISH_TIMEOUT, finish).await });
            if finished.is_err() {
                tracing::error!("calls that use something up in the store did not end: their records are missing");
            }
        }
        runtime.shutdown_timeout(BLOCKING_GRACE);
        let _ = ended_sender.send(());
    };
    let thread = std::thread::Builder::new().name(name.clone()).spawn(body).map_err(failed)?;
    Ok(WorkerThread { name, started, ended, thread })
}

fn run_until(runtime: &Runtime, work: impl Future<Output = ()>, cut: impl Future<Output = ()>) {
    runtime.block_on(async {
        tokio::select! {
            () = work => (),
            () = cut => (),
        }
    });
}

/// Serves gRPC on arriving sockets until the server drains and all connections are closed.
pub(super) async fn serve_grpc(
    role: ListenerRole,
    worker: WorkerContext,
    make: impl FnOnce(RuntimeContext) -> GrpcServices,
    started: oneshot::Sender<()>,
) {
    let WorkerContext { sockets, context, mut phases, settings } = worker;
    let GrpcServices { routes, barrier, limits } = make(context);
    let routes = routes.prepare();
    let mut incoming = IncomingConnections { sockets, guards: ConnectionGuards::new(barrier, &settings, true) };
    // Every connection holds a receiver, so dropping the last one shows that all are closed.
    let (all_closed, alive) = watch::channel(());
    let _ = started.send(());
    let connection_phases = phases.clone();
    let accepting = async {
        while let Some(accepted) = incoming.next().await {
            let Ok(connection) = accepted else { continue };
            let (peer, tracked) = (connection.peer().clone(), Arc::clone(connection.tracked()));
            let (routes, calls) = (routes.clone(), Arc::clone(&tracked));
            let service = service_fn(move |request: http::Request<_>| {
                active_call::answer_call(routes.clone(), request, limits, peer.clone(), Arc::clone(&calls))
            });
            let server = grpc_server(&settings, role, tracked.window_bytes);
            let (phases, alive) = (connection_phases.clone(), alive.clone());
            tokio::spawn(async move {
                let served = server.serve_connection(TokioIo::new(connection), TowerToHyperService::new(service));
                if let Some(Err(error)) = serve_until_closed(served, &tracked, phases, |served| served.graceful_shutdown()).await
                {
                    tracing::debug!(%error, "a connection ended early");
                }
                drop(alive);
            });
        }
    };
    tokio::select! {
        () = accepting => (),
        () = phases.wait_until(ServerPhase::Draining) => (),
    }
    drop((alive, incoming));
    all_closed.closed().await;
}

/// Serves one connection until it is closed, drained or cut. `shut_down` stops it from taking more calls.
pub(super) async fn serve_until_closed<C: Future>(
    served: C,
    tracked: &TrackedConnection,
    mut phases: PhaseReceiver,
    shut_down: impl Fn(Pin<&mut C>),
) -> Option<C::Output> {
    let mut served = pin!(served);
    let mut is_draining = false;
    loop {
        tokio::select! {
            ended = served.as_mut() => return Some(ended),
            () = phases.wait_until(ServerPhase::Draining), if !is_draining => {
                is_draining = true;
                shut_down(served.as_mut());
            }
            cause = tracked.wait_until_cut() => {
                if cause == CutCause::Idle {
                    // A request that arrives in this moment is refused in a way that tells the client to retry.
                    shut_down(served.as_mut());
                    return tokio::time::timeout(CLOSE_GRACE, served).await.ok();
                }
                return None;
            }
        }
    }
}

/// Sets the limits of HTTP/2 explicitly, although the library has defaults, so that a change of the defaults has no effect here.
/// They bound streams reset before they are accepted (rapid reset), errors of streams, frames, headers with their continuations,
/// and the bytes that flow control lets a peer send ahead. The library answers one PING and one SETTINGS at a time, and small DATA
/// frames draw on a budget of their own. `frames.rs` bounds how many frames without a call may come.
fn grpc_server(settings: &Settings, role: ListenerRole, window_bytes: u32) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new()).http2_only();
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(settings.streams_max(role))
        .initial_connection_window_size(window_bytes)
        // A stream that nobody reads does not delay the others.
        .initial_stream_window_size((window_bytes / 4).max(STREAM_WINDOW_BYTES_MIN))
        .adaptive_window(false)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_header_list_size(settings.header_bytes_max)
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        .max_local_error_reset_streams(ERROR_RESETS_MAX)
        .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
        .keep_alive_interval(Duration::from_millis(settings.keepalive_interval_ms))
        .keep_alive_timeout(Duration::from_millis(settings.keepalive_timeout_ms));
    server
}

/// The sockets handed to one runtime, as guarded connections.
pub(super) struct IncomingConnections {
    pub(super) sockets: mpsc::Receiver<AcceptedSocket>,
    pub(super) guards: ConnectionGuards,
}

impl Stream for IncomingConnections {
    type Item = io::Result<GuardedConnection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        match ready!(this.sockets.poll_recv(cx)) {
            Some(accepted) => Poll::Ready(Some(GuardedConnection::new(accepted, &this.guards))),
            None => Poll::Ready(None),
        }
    }
}

/// The context in which a runtime's services are made.
pub(super) fn runtime_context(index: usize, drained: &PhaseReceiver) -> RuntimeContext {
    RuntimeContext { index, drain_signal: DrainSignal::new(drained.clone()) }
}
