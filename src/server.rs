//! Listeners, serving runtimes and the drain: how bytes reach the services and how answers leave.
//!
//! One acceptor thread hands sockets to current-thread runtimes and spreads them evenly. Each runtime has its own OS thread:
//! several serve decisions, one administration and one HTTP, so that a flood of checks delays neither a revocation nor a health
//! probe. Every byte that leaves passes the [`WriteBarrier`] of its runtime. The caller provides factories for the services, so
//! this module knows no message and decides nothing. Look next at `server/worker.rs`, `server/acceptor.rs` and
//! `server/connection.rs`.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tonic::service::Routes;

use crate::api::message_limits::MessageLimits;
use crate::model::write_barrier::WriteBarrier;

mod acceptor;
mod active_call;
mod byte_budget;
mod connection;
mod connection_registry;
mod counters;
mod frames;
mod http;
mod phase;
mod request_body;
mod settings;
mod worker;

pub use acceptor::ListenerRole;
pub use phase::DrainSignal;
pub use settings::Settings;

use acceptor::{Acceptor, HANDOVER_SOCKETS_MAX};
use connection_registry::ConnectionRegistry;
use counters::ListenerCounters;
use phase::{PhaseReceiver, ServerPhase};
use worker::{WorkerContext, WorkerThread};

/// Longest wait for a thread to end after the cut, in addition to the time for finishing its calls.
const JOIN_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for HTTP connections to close, once all other connections are closed.
const HTTP_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The three listeners, bound but not yet served.
#[derive(Debug)]
pub struct BoundListeners {
    settings: Arc<Settings>,
    addresses: ListenerAddresses,
    decisions: TcpListener,
    http: TcpListener,
    admin: TcpListener,
}

impl BoundListeners {
    /// Validates the settings and binds all three listeners. The kernel queues connections from here on.
    ///
    /// # Errors
    /// [`Error::Setting`], or the reason that an address cannot be bound.
    pub fn bind(settings: Settings) -> Result<Self, Error> {
        settings.validate()?;
        let (decisions, decisions_address) = bind_listener(ListenerRole::Decisions, settings.decisions_address)?;
        let (http, http_address) = bind_listener(ListenerRole::Http, settings.http_address)?;
        let (admin, admin_address) = bind_listener(ListenerRole::Admin, settings.admin_address)?;
        let addresses = ListenerAddresses { decisions: decisions_address, http: http_address, admin: admin_address };
        Ok(Self { settings: Arc::new(settings), addresses, decisions, http, admin })
    }

    /// The bound addresses, with the ports that the system chose.
    pub fn addresses(&self) -> ListenerAddresses {
        self.addresses
    }

    /// Starts the threads, makes every runtime's services on its own thread, then accepts connections.
    ///
    /// # Errors
    /// [`Error::Thread`] if a thread or runtime cannot be started; [`Error::Start`] if a factory did not return.
    pub async fn serve(self, factories: ServiceFactories) -> Result<Server, Error> {
        let Self { settings, addresses, decisions, http, admin } = self;
        let ServiceFactories { decisions: make_decisions, finish: finish_decisions, admin: make_admin, http: make_http } =
            factories;
        let (grpc_phase_sender, grpc_phases) = PhaseReceiver::new();
        let (http_phase_sender, http_phases) = PhaseReceiver::new();
        let mut server = Server::new(addresses, &settings, grpc_phase_sender, http_phase_sender);
        let new_worker_context = |sockets, index, phases: &PhaseReceiver| WorkerContext {
            sockets,
            context: worker::runtime_context(index, &grpc_phases),
            phases: phases.clone(),
            settings: Arc::clone(&settings),
        };

        let mut decision_queues = Vec::with_capacity(settings.decision_runtimes);
        for index in 0..settings.decision_runtimes {
            let (queue, sockets) = mpsc::channel(HANDOVER_SOCKETS_MAX);
            let worker_context = new_worker_context(sockets, index, &grpc_phases);
            let make_services = Arc::clone(&make_decisions);
            let serve = move |started| {
                worker::serve_grpc(ListenerRole::Decisions, worker_context, move |context| make_services(context), started)
            };
            let finish = Some(finish_decisions(index));
            server.grpc_workers.push(worker::start_worker(format!("pdp-decide-{index}"), grpc_phases.clone(), finish, serve)?);
            decision_queues.push(queue);
        }
        let (admin_queue, sockets) = mpsc::channel(HANDOVER_SOCKETS_MAX);
        let admin_context = new_worker_context(sockets, 0, &grpc_phases);
        let serve = move |started| worker::serve_grpc(ListenerRole::Admin, admin_context, make_admin, started);
        server.grpc_workers.push(worker::start_worker("pdp-admin".to_owned(), grpc_phases.clone(), None, serve)?);
        let (http_queue, sockets) = mpsc::channel(HANDOVER_SOCKETS_MAX);
        let http_context = new_worker_context(sockets, 0, &http_phases);
        let serve = move |started| http::serve_http(http_context, make_http, started);
        server.http_workers.push(worker::start_worker("pdp-http".to_owned(), http_phases.clone(), None, serve)?);
        server.wait_until_started().await?;

        let acceptors = [
            server.new_acceptor(ListenerRole::Decisions, decisions, decision_queues, &grpc_phases),
            server.new_acceptor(ListenerRole::Admin, admin, vec![admin_queue], &grpc_phases),
            server.new_acceptor(ListenerRole::Http, http, vec![http_queue], &http_phases),
        ];
        server
            .http_workers
            .push(worker::start_worker("pdp-accept".to_owned(), http_phases, None, |started| accept_all(acceptors, started))?);
        server.wait_until_started().await?;
        Ok(server)
    }
}

/// The bound address of each listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerAddresses {
    /// Decisions, gRPC.
    pub decisions: SocketAddr,
    /// Health and metrics, HTTP/1.1.
    pub http: SocketAddr,
    /// Administration, gRPC.
    pub admin: SocketAddr,
}

/// Makes the services of each runtime. Each factory is called on the runtime's own thread, inside the runtime, before the first
/// connection is accepted.
pub struct ServiceFactories {
    /// Called once for each decision runtime.
    pub decisions: Arc<dyn Fn(RuntimeContext) -> GrpcServices + Send + Sync>,
    /// For each decision runtime, by its number: the future that the runtime awaits before it ends, so that every call it began is
    /// recorded.
    pub finish: Arc<dyn Fn(usize) -> RuntimeShutdownFuture + Send + Sync>,
    /// Called once.
    pub admin: Box<dyn FnOnce(RuntimeContext) -> GrpcServices + Send>,
    /// Called once.
    pub http: Box<dyn FnOnce(RuntimeContext) -> HttpServices + Send>,
}

/// A future that a runtime awaits before it ends.
pub type RuntimeShutdownFuture = BoxFuture<'static, ()>;

/// The runtime whose services are being made.
#[derive(Clone, Debug)]
pub struct RuntimeContext {
    /// The runtime's number within its listener, from 0.
    pub index: usize,
    /// Signals that the server drains.
    pub drain_signal: DrainSignal,
}

/// The services of a gRPC runtime. `Routes::from` turns a layered `axum::Router` into [`Routes`].
pub struct GrpcServices {
    /// The services. Handlers find [`crate::model::connection::PeerInfo`] in the extensions of each request.
    pub routes: Routes,
    /// Called on this runtime's thread before bytes leave on any of its connections.
    pub barrier: Arc<dyn WriteBarrier>,
    /// The limits on messages to the method of a path.
    pub limits: fn(&str) -> MessageLimits,
}

/// The services of the HTTP listener.
pub struct HttpServices {
    /// For `/readyz`: the state of this replica, or one line that says why it is not ready. It must not block.
    pub ready: Arc<dyn Fn() -> Result<&'static str, String> + Send + Sync>,
    /// For `/metrics`: the metrics as OpenMetrics text. It must not block.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// Further routes. `/livez`, `/readyz`, `/metrics` and the fallback are already taken.
    pub routes: axum::Router,
    /// Called before bytes leave on any connection, as for gRPC: HTTP routes may answer decisions too, so their audit records
    /// must be written first.
    pub barrier: Arc<dyn WriteBarrier>,
}

/// A barrier that delays nothing, for a listener that never carries a permit.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWriteBarrier;

impl WriteBarrier for NoWriteBarrier {
    fn flush_before_write(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The counts of one listener since its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerStats {
    /// The listener.
    pub role: ListenerRole,
    /// Connections accepted.
    pub accepted_total: u64,
    /// Connections closed at once, because too many were open and none could be cut for them.
    pub refused_total: u64,
    /// Connections cut, by cause.
    pub cuts_total: Vec<(&'static str, u64)>,
    /// Calls refused while their message arrived, or because waiting calls hold too many bytes, by cause.
    pub refusals_total: Vec<(&'static str, u64)>,
    /// Bytes that waiting calls hold, beyond each connection's own share.
    pub waiting_bytes: usize,
    /// Open connections of each runtime.
    pub open_connections: Vec<usize>,
}

/// The outcome of a drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainOutcome {
    /// gRPC connections that were still open at the end of the drain timeout and were cut.
    pub connections_cut: usize,
    /// Threads that did not end after the cut, because a handler blocks them. They end with the process.
    pub unfinished_threads: Vec<String>,
}

/// Reads a server's [`ListenerStats`] for metrics, and does not keep the server alive.
#[derive(Clone, Debug)]
pub struct ListenerStatsReader(Arc<[ListenerEntry]>);

/// The counters and connections of one listener.
type ListenerEntry = (ListenerRole, Arc<ListenerCounters>, Arc<ConnectionRegistry>);

impl ListenerStatsReader {
    /// The counts of each listener.
    pub fn read(&self) -> Vec<ListenerStats> {
        let read_entry = |(role, counters, registry): &ListenerEntry| ListenerStats {
            role: *role,
            accepted_total: counters.accepted.load(Ordering::Relaxed),
            refused_total: counters.refused.load(Ordering::Relaxed),
            cuts_total: counters.cuts(),
            refusals_total: counters.refusals(),
            waiting_bytes: registry.shared_bytes(),
            open_connections: counters.open_per_runtime(),
        };
        self.0.iter().map(read_entry).collect()
    }
}

/// A running server. Dropping it stops it without waiting for calls in flight.
pub struct Server {
    addresses: ListenerAddresses,
    settings: Arc<Settings>,
    stats: ListenerStatsReader,
    next_connection_id: Arc<AtomicU64>,
    grpc_phase_sender: watch::Sender<ServerPhase>,
    http_phase_sender: watch::Sender<ServerPhase>,
    grpc_workers: Vec<WorkerThread>,
    http_workers: Vec<WorkerThread>,
}

impl Server {
    /// The bound addresses.
    pub fn addresses(&self) -> ListenerAddresses {
        self.addresses
    }

    /// Reads the counts of the listeners. The reader may outlive the server.
    pub fn stats(&self) -> ListenerStatsReader {
        self.stats.clone()
    }

    /// Drains: stops accepting, lets calls in flight end within the drain timeout, then cuts the rest. HTTP stops last.
    pub async fn drain(self) -> DrainOutcome {
        let Self { settings, stats, grpc_phase_sender, http_phase_sender, mut grpc_workers, mut http_workers, .. } = self;
        tracing::info!(drain_timeout_ms = settings.drain_timeout_ms, "draining");
        grpc_phase_sender.send_replace(ServerPhase::Draining);
        let mut connections_cut = 0;
        let drain_result =
            tokio::time::timeout(Duration::from_millis(settings.drain_timeout_ms), wait_until_ended(&mut grpc_workers)).await;
        if drain_result.is_err() {
            let open_grpc_connections =
                |stats: ListenerStats| if stats.role == ListenerRole::Http { 0 } else { stats.open_connections.iter().sum() };
            connections_cut = stats.read().into_iter().map(open_grpc_connections).sum::<usize>();
            tracing::warn!(connections_cut, "connections cut at the end of the drain timeout");
        }
        grpc_phase_sender.send_replace(ServerPhase::Cut);
        let mut unfinished_threads = join_workers(grpc_workers).await;
        http_phase_sender.send_replace(ServerPhase::Draining);
        let _ = tokio::time::timeout(HTTP_DRAIN_TIMEOUT, wait_until_ended(&mut http_workers)).await;
        http_phase_sender.send_replace(ServerPhase::Cut);
        unfinished_threads.extend(join_workers(http_workers).await);
        DrainOutcome { connections_cut, unfinished_threads }
    }

    fn new(
        addresses: ListenerAddresses,
        settings: &Arc<Settings>,
        grpc_phase_sender: watch::Sender<ServerPhase>,
        http_phase_sender: watch::Sender<ServerPhase>,
    ) -> Self {
        let listeners =
            [(ListenerRole::Decisions, settings.decision_runtimes), (ListenerRole::Http, 1), (ListenerRole::Admin, 1)];
        let stats = listeners.map(|(role, runtimes)| {
            let counters = Arc::new(ListenerCounters::new(runtimes));
            let registry = ConnectionRegistry::new(settings.connection_limits(role), Arc::clone(&counters));
            (role, counters, registry)
        });
        Self {
            addresses,
            settings: Arc::clone(settings),
            stats: ListenerStatsReader(Arc::new(stats)),
            next_connection_id: Arc::new(AtomicU64::new(1)),
            grpc_phase_sender,
            http_phase_sender,
            grpc_workers: Vec::new(),
            http_workers: Vec::new(),
        }
    }

    fn new_acceptor(
        &self,
        role: ListenerRole,
        listener: TcpListener,
        runtimes: Vec<mpsc::Sender<acceptor::AcceptedSocket>>,
        phases: &PhaseReceiver,
    ) -> Option<Acceptor> {
        let (_, counters, registry) = self.stats.0.iter().find(|(entry_role, ..)| *entry_role == role)?;
        Some(Acceptor {
            role,
            listener,
            runtimes,
            counters: Arc::clone(counters),
            registry: Arc::clone(registry),
            next_connection_id: Arc::clone(&self.next_connection_id),
            phases: phases.clone(),
        })
    }

    /// Waits until every thread so far has made its services.
    async fn wait_until_started(&mut self) -> Result<(), Error> {
        for worker in self.grpc_workers.iter_mut().chain(&mut self.http_workers).filter(|worker| !worker.started.is_terminated())
        {
            (&mut worker.started).await.map_err(|_| Error::Start { name: worker.name.clone() })?;
        }
        Ok(())
    }
}

/// Why a server could not be started: one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process, or another listener of this process, uses the address.
    #[error("`{flag} {address}` is in use: stop what listens there, or choose another address or port 0")]
    AddressInUse {
        /// The flag that sets the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// The system forbids the address, as for ports below 1024.
    #[error("`{flag} {address}` may not be bound by this user: choose a port from 1024")]
    AddressForbidden {
        /// The flag that sets the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// The address is not a loopback address. Without TLS only this machine may connect.
    #[error("`{flag} {address}` is not a loopback address: TLS is not available in this version, use 127.0.0.1 or [::1]")]
    NotLoopback {
        /// The flag that sets the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// Any other refusal of the system.
    #[error("`{flag} {address}` cannot be bound: {source}")]
    Bind {
        /// The flag that sets the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// A setting is out of bounds.
    #[error("server setting `{name}` is {value}: it must be from {min} to {max}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// The value that was given.
        value: u64,
        /// The least value.
        min: u64,
        /// The greatest value.
        max: u64,
    },
    /// A thread or its runtime could not be started.
    #[error("thread `{name}` cannot be started: {source}")]
    Thread {
        /// The thread's name.
        name: String,
        /// The system's error.
        source: io::Error,
    },
    /// A thread ended before it served.
    #[error("thread `{name}` ended before it served: see the log")]
    Start {
        /// The thread's name.
        name: String,
    },
}

fn bind_listener(role: ListenerRole, address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let listener = acceptor::bind(role, address)?;
    let bound = listener.local_addr().map_err(|source| Error::Bind { flag: role.flag(), address, source })?;
    Ok((listener, bound))
}

async fn accept_all(acceptors: [Option<Acceptor>; 3], started: tokio::sync::oneshot::Sender<()>) {
    let _ = started.send(());
    futures_util::future::join_all(acceptors.into_iter().flatten().map(Acceptor::run)).await;
}

async fn wait_until_ended(workers: &mut [WorkerThread]) {
    for worker in workers.iter_mut().filter(|worker| !worker.ended.is_terminated()) {
        let _ = (&mut worker.ended).await;
    }
}

/// Joins the threads of cut workers and names those that do not end.
async fn join_workers(mut workers: Vec<WorkerThread>) -> Vec<String> {
    let _ = tokio::time::timeout(JOIN_TIMEOUT + worker::FINISH_TIMEOUT, wait_until_ended(&mut workers)).await;
    let mut unfinished = Vec::new();
    for WorkerThread { name, ended, thread, .. } in workers {
        // A worker that sent its end signal has nothing left to do, so the join returns at once.
        if !ended.is_terminated() || thread.join().is_err() {
            tracing::error!(thread = name, "a thread did not end well");
            unfinished.push(name);
        }
    }
    unfinished
}

#[cfg(test)]
mod tests;
