//! A runtime that serves connections: one OS thread, one current-thread tokio runtime, its own services and barrier.
//!
//! Nothing of a call crosses threads. The services are made on the thread itself, inside its runtime. Look next at
//! `connection.rs`, through which every byte goes, and at `http.rs` for the HTTP/1.1 listener.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::Stream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};
use tonic::transport::Server;

use super::connection::{Connection, Guards};
use super::listen::Accepted;
use super::phase::{Draining, Phase, Phases};
use super::settings::Settings;
use super::{Error, Finish, GrpcServices, RuntimeContext};

/// Time for blocking work that is still under way when its runtime ends.
const BLOCKING_GRACE: Duration = Duration::from_secs(1);

/// How long what calls have begun may take to its record, once they are answered or cut: longer than the store takes for a use.
pub(super) const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// A thread that was started, and how its owner hears of it.
pub(super) struct Worker {
    pub(super) name: String,
    /// Comes once the services are made.
    pub(super) started: oneshot::Receiver<()>,
    /// Comes, or is lost, when the runtime is gone.
    pub(super) ended: oneshot::Receiver<()>,
    pub(super) thread: JoinHandle<()>,
}

/// What a worker needs beside the work itself.
pub(super) struct Seat {
    pub(super) sockets: mpsc::Receiver<Accepted>,
    pub(super) context: RuntimeContext,
    pub(super) phases: Phases,
    pub(super) settings: Arc<Settings>,
}

/// Starts a thread called `name` (15 bytes are seen) that runs `work` on a runtime of its own until it ends or is cut, and then for so
/// long as `finish` takes, at most [`FINISH_TIMEOUT`].
pub(super) fn start<W, F>(name: String, mut cut: Phases, finish: Option<Finish>, work: W) -> Result<Worker, Error>
where
    W: FnOnce(oneshot::Sender<()>) -> F + Send + 'static,
    F: Future<Output = ()>,
{
    let (started_sender, started) = oneshot::channel();
    let (ended_sender, ended) = oneshot::channel();
    let failed = |source: io::Error| Error::Thread { name: name.clone(), source };
    let runtime = Builder::new_current_thread().enable_all().thread_name(&name).build().map_err(failed)?;
    let body = move || {
        run_until(&runtime, async { work(started_sender).await }, cut.reached(Phase::Cut));
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
    Ok(Worker { name, started, ended, thread })
}

fn run_until(runtime: &Runtime, work: impl Future<Output = ()>, cut: impl Future<Output = ()>) {
    runtime.block_on(async {
        tokio::select! {
            () = work => (),
            () = cut => (),
        }
    });
}

/// Serves gRPC on the sockets that arrive until the server drains and all connections are closed.
pub(super) async fn serve_grpc(seat: Seat, make: impl FnOnce(RuntimeContext) -> GrpcServices, started: oneshot::Sender<()>) {
    let Seat { sockets, context, mut phases, settings } = seat;
    let index = context.index;
    let GrpcServices { routes, barrier } = make(context);
    let incoming = Incoming { sockets, guards: Guards::new(barrier, &settings, true) };
    let router = grpc_server(&settings).add_routes(routes);
    let _ = started.send(());
    if let Err(error) = router.serve_with_incoming_shutdown(incoming, phases.reached(Phase::Draining)).await {
        tracing::error!(runtime = index, %error, "a runtime stopped serving");
    }
}

fn grpc_server(settings: &Settings) -> Server {
    Server::builder()
        .max_concurrent_streams(settings.streams_per_connection_max)
        .initial_stream_window_size(settings.window_bytes)
        .initial_connection_window_size(settings.window_bytes)
        .http2_max_header_list_size(settings.header_bytes_max)
        .http2_keepalive_interval(Some(Duration::from_millis(settings.keepalive_interval_ms)))
        .http2_keepalive_timeout(Some(Duration::from_millis(settings.keepalive_timeout_ms)))
}

/// The sockets handed to one runtime, as guarded connections.
pub(super) struct Incoming {
    pub(super) sockets: mpsc::Receiver<Accepted>,
    pub(super) guards: Guards,
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        match ready!(this.sockets.poll_recv(cx)) {
            Some(accepted) => Poll::Ready(Some(Connection::new(accepted, &this.guards))),
            None => Poll::Ready(None),
        }
    }
}

/// What a runtime's services are made with.
pub(super) fn context(index: usize, drained: &Phases) -> RuntimeContext {
    RuntimeContext { index, draining: Draining::new(drained.clone()) }
}
