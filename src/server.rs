//! Listeners, serving runtimes and the drain: how bytes reach the services and how answers leave.
//!
//! One acceptor thread hands sockets to current-thread runtimes and spreads them evenly. Each runtime has its own OS thread:
//! several serve decisions, one administration and one HTTP, so that a flood of checks delays neither a revocation nor a health
//! probe. Every byte that leaves passes the [`WriteBarrier`] of its runtime. The caller provides factories for the services, so
//! this module knows no message and decides nothing. Look next at `server/worker.rs`, `server/listen.rs` and
//! `server/connection.rs`.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tonic::service::Routes;

use crate::api::message::MessageLimits;
use crate::model::barrier::WriteBarrier;

mod budget;
mod call;
mod connection;
mod counters;
mod http;
mod intake;
mod listen;
mod phase;
mod registry;
mod settings;
mod worker;

pub use listen::Role;
pub use phase::Draining;
pub use settings::Settings;

use counters::Counters;
use listen::{Acceptor, HANDOVER_SOCKETS_MAX};
use phase::{Phase, Phases};
use registry::Registry;
use worker::{Seat, Worker};

/// Longest wait for a thread to end after the cut, in addition to the time for finishing its calls.
const END_GRACE: Duration = Duration::from_secs(3);
/// Longest wait for HTTP connections to close, once all other connections are closed.
const HTTP_DRAIN: Duration = Duration::from_secs(1);

/// The three listeners, bound but not yet served.
#[derive(Debug)]
pub struct Listeners {
    settings: Arc<Settings>,
    addresses: Addresses,
    decisions: TcpListener,
    http: TcpListener,
    admin: TcpListener,
}

impl Listeners {
    /// Validates the settings and binds all three listeners. The kernel queues connections from here on.
    ///
    /// # Errors
    /// [`Error::Setting`], or the reason that an address cannot be bound.
    pub fn bind(settings: Settings) -> Result<Self, Error> {
        settings.validate()?;
        let (decisions, decisions_address) = bind(Role::Decisions, settings.decisions_address)?;
        let (http, http_address) = bind(Role::Http, settings.http_address)?;
        let (admin, admin_address) = bind(Role::Admin, settings.admin_address)?;
        let addresses = Addresses { decisions: decisions_address, http: http_address, admin: admin_address };
        Ok(Self { settings: Arc::new(settings), addresses, decisions, http, admin })
    }

    /// The bound addresses, with the ports that the system chose.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Starts the threads, makes every runtime's services on its own thread, then accepts connections.
    ///
    /// # Errors
    /// [`Error::Thread`] if a thread or runtime cannot be started; [`Error::Start`] if a factory did not return.
    pub async fn serve(self, factories: Factories) -> Result<Server, Error> {
        let Self { settings, addresses, decisions, http, admin } = self;
        let Factories { decisions: make_decisions, finish: finish_decisions, admin: make_admin, http: make_http } = factories;
        let (calls_phase, calls) = Phases::new();
        let (http_phase, http_phases) = Phases::new();
        let mut server = Server::new(addresses, &settings, calls_phase, http_phase);
        let seat = |sockets, index, phases: &Phases| Seat {
            sockets,
            context: worker::context(index, &calls),
            phases: phases.clone(),
            settings: Arc::clone(&settings),
        };

        let mut decision_queues = Vec::with_capacity(settings.decision_runtimes);
        for index in 0..settings.decision_runtimes {
            let (queue, sockets) = mpsc::channel(HANDOVER_SOCKETS_MAX);
            let seat = seat(sockets, index, &calls);
            let make = Arc::clone(&make_decisions);
            let work = move |started| worker::serve_grpc(seat, move |context| make(context), started);
            let finish = Some(finish_decisions(index));
            server.calls.push(worker::start(format!("pdp-decide-{index}"), calls.clone(), finish, work)?);
            decision_queues.push(queue);
        }
        let (admin_queue, sockets) = mpsc::channel(HANDOVER_SOCKETS_MAX);
        let admin_seat = seat(sockets, 0, &calls);
        let work = move |started| worker::serve_grpc(admin_seat, make_admin, started);
        server.calls.push(worker::start("pdp-admin".to_owned(), calls.clone(), None, work)?);
        let (http_queue, sockets) = mpsc::channel(HANDOVER_SOCKETS_MAX);
        let http_seat = seat(sockets, 0, &http_phases);
        let work = move |started| http::serve_http(http_seat, make_http, started);
        server.http.push(worker::start("pdp-http".to_owned(), http_phases.clone(), None, work)?);
        server.started().await?;

        let acceptors = [
            server.acceptor(Role::Decisions, decisions, decision_queues, &calls),
            server.acceptor(Role::Admin, admin, vec![admin_queue], &calls),
            server.acceptor(Role::Http, http, vec![http_queue], &http_phases),
        ];
        server.http.push(worker::start("pdp-accept".to_owned(), http_phases, None, |started| accept_all(acceptors, started))?);
        server.started().await?;
        Ok(server)
    }
}

/// The bound address of each listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Decisions, gRPC.
    pub decisions: SocketAddr,
    /// Health and metrics, HTTP/1.1.
    pub http: SocketAddr,
    /// Administration, gRPC.
    pub admin: SocketAddr,
}

/// Makes the services of each runtime. Each factory is called on the runtime's own thread, inside the runtime, before the first
/// connection is accepted.
pub struct Factories {
    /// Called once for each decision runtime.
    pub decisions: Arc<dyn Fn(RuntimeContext) -> GrpcServices + Send + Sync>,
    /// For each decision runtime, by its number: the future that the runtime awaits before it ends, so that every call it began is
    /// recorded.
    pub finish: Arc<dyn Fn(usize) -> Finish + Send + Sync>,
    /// Called once.
    pub admin: Box<dyn FnOnce(RuntimeContext) -> GrpcServices + Send>,
    /// Called once.
    pub http: Box<dyn FnOnce(RuntimeContext) -> HttpServices + Send>,
}

/// A future that a runtime awaits before it ends.
pub type Finish = BoxFuture<'static, ()>;

/// The runtime whose services are being made.
#[derive(Clone, Debug)]
pub struct RuntimeContext {
    /// The runtime's number within its listener, from 0.
    pub index: usize,
    /// Signals that the server drains.
    pub draining: Draining,
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
    /// Called before bytes leave, as for gRPC, because routes may answer decisions too.
    pub barrier: Arc<dyn WriteBarrier>,
}

/// A barrier that delays nothing, for a listener that never carries a permit.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBarrier;

impl WriteBarrier for NoBarrier {
    fn before_write(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The counts of one listener since its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// The listener.
    pub role: Role,
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
    pub open: Vec<usize>,
}

/// The outcome of a drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drained {
    /// gRPC connections that were still open at the end of the drain timeout and were cut.
    pub connections_cut: usize,
    /// Threads that did not end after the cut, because a handler blocks them. They end with the process.
    pub threads_left: Vec<String>,
}

/// Reads a server's [`Stats`] for metrics, and does not keep the server alive.
#[derive(Clone, Debug)]
pub struct StatsReader(Arc<[Listening]>);

/// The counters and connections of one listener.
type Listening = (Role, Arc<Counters>, Arc<Registry>);

impl StatsReader {
    /// The counts of each listener.
    pub fn read(&self) -> Vec<Stats> {
        let read = |(role, counters, registry): &Listening| Stats {
            role: *role,
            accepted_total: counters.accepted.load(Ordering::Relaxed),
            refused_total: counters.refused.load(Ordering::Relaxed),
            cuts_total: counters.cuts(),
            refusals_total: counters.refusals(),
            waiting_bytes: registry.shared_bytes(),
            open: counters.open_per_runtime(),
        };
        self.0.iter().map(read).collect()
    }
}

/// A running server. Dropping it stops it without waiting for calls in flight.
pub struct Server {
    addresses: Addresses,
    settings: Arc<Settings>,
    stats: StatsReader,
    next_connection_id: Arc<AtomicU64>,
    calls_phase: watch::Sender<Phase>,
    http_phase: watch::Sender<Phase>,
    calls: Vec<Worker>,
    http: Vec<Worker>,
}

impl Server {
    /// The bound addresses.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Reads the counts of the listeners. The reader may outlive the server.
    pub fn stats(&self) -> StatsReader {
        self.stats.clone()
    }

    /// Drains: stops accepting, lets calls in flight end within the drain timeout, then cuts the rest. HTTP stops last.
    pub async fn drain(self) -> Drained {
        let Self { settings, stats, calls_phase, http_phase, mut calls, mut http, .. } = self;
        tracing::info!(drain_timeout_ms = settings.drain_timeout_ms, "draining");
        calls_phase.send_replace(Phase::Draining);
        let mut connections_cut = 0;
        let in_time = tokio::time::timeout(Duration::from_millis(settings.drain_timeout_ms), all_ended(&mut calls)).await;
        if in_time.is_err() {
            let open = |stats: Stats| if stats.role == Role::Http { 0 } else { stats.open.iter().sum() };
            connections_cut = stats.read().into_iter().map(open).sum::<usize>();
            tracing::warn!(connections_cut, "connections cut at the end of the drain timeout");
        }
        calls_phase.send_replace(Phase::Cut);
        let mut threads_left = end(calls).await;
        http_phase.send_replace(Phase::Draining);
        let _ = tokio::time::timeout(HTTP_DRAIN, all_ended(&mut http)).await;
        http_phase.send_replace(Phase::Cut);
        threads_left.extend(end(http).await);
        Drained { connections_cut, threads_left }
    }

    fn new(
        addresses: Addresses,
        settings: &Arc<Settings>,
        calls_phase: watch::Sender<Phase>,
        http_phase: watch::Sender<Phase>,
    ) -> Self {
        let listeners = [(Role::Decisions, settings.decision_runtimes), (Role::Http, 1), (Role::Admin, 1)];
        let stats = listeners.map(|(role, runtimes)| {
            let counters = Arc::new(Counters::new(runtimes));
            let registry = Registry::new(settings.rules(role), Arc::clone(&counters));
            (role, counters, registry)
        });
        Self {
            addresses,
            settings: Arc::clone(settings),
            stats: StatsReader(Arc::new(stats)),
            next_connection_id: Arc::new(AtomicU64::new(1)),
            calls_phase,
            http_phase,
            calls: Vec::new(),
            http: Vec::new(),
        }
    }

    fn acceptor(
        &self,
        role: Role,
        listener: TcpListener,
        runtimes: Vec<mpsc::Sender<listen::Accepted>>,
        phases: &Phases,
    ) -> Option<Acceptor> {
        let (_, counters, registry) = self.stats.0.iter().find(|(of, ..)| *of == role)?;
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
    async fn started(&mut self) -> Result<(), Error> {
        for worker in self.calls.iter_mut().chain(&mut self.http).filter(|worker| !worker.started.is_terminated()) {
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
    #[error("server setting `{name}` is {value}: it must be from {least} to {most}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// The value that was given.
        value: u64,
        /// The least value.
        least: u64,
        /// The greatest value.
        most: u64,
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

fn bind(role: Role, address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let listener = listen::bind(role, address)?;
    let bound = listener.local_addr().map_err(|source| Error::Bind { flag: role.flag(), address, source })?;
    Ok((listener, bound))
}

async fn accept_all(acceptors: [Option<Acceptor>; 3], started: tokio::sync::oneshot::Sender<()>) {
    let _ = started.send(());
    futures_util::future::join_all(acceptors.into_iter().flatten().map(Acceptor::run)).await;
}

async fn all_ended(workers: &mut [Worker]) {
    for worker in workers.iter_mut().filter(|worker| !worker.ended.is_terminated()) {
        let _ = (&mut worker.ended).await;
    }
}

/// Joins the threads of cut workers and names those that do not end.
async fn end(mut workers: Vec<Worker>) -> Vec<String> {
    let _ = tokio::time::timeout(END_GRACE + worker::FINISH_TIMEOUT, all_ended(&mut workers)).await;
    let mut left = Vec::new();
    for Worker { name, ended, thread, .. } in workers {
        // A worker that sent its end signal has nothing left to do, so the join returns at once.
        if !ended.is_terminated() || thread.join().is_err() {
            tracing::error!(thread = name, "a thread did not end well");
            left.push(name);
        }
    }
    left
}

#[cfg(test)]
mod tests;
