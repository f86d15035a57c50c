//! The composition root: binds every part to every other and is the only place that spawns long-lived tasks.
//!
//! ```text
//! control runtime: follower, acceptors, administration, health page      lanes: one thread and runtime each
//! ```
//!
//! Look next at [`App::start`], which is the order of a start, then at `app/bind.rs` for the ports.

mod bind;
mod local;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::watch;
use tonic::service::Routes;

pub use local::LocalAdmin;

use crate::api::admin::AdminApi;
use crate::api::decision::DecisionApi;
use crate::api::noop::NoopApi;
use crate::api::r#gen as wire;
use crate::api::SignedActs;
use crate::audit;
use crate::config::{self, Settings};
use crate::model::limits::{BATCH_MESSAGE_BYTES_MAX, CHECK_MESSAGE_BYTES_MAX};
use crate::model::time::{Clock, SystemClock};
use crate::pap::Admin;
use crate::policy::source::read_folder;
use crate::revocation::Index;
use crate::server::{self, HttpPages, Listener};
use crate::service::{self, Lane, Service};
use crate::snapshot::SnapshotCell;
use crate::store;
use crate::sync::{self, CellPublisher, Follow};
use crate::telemetry::{self, Telemetry};
use wire::decision_service_server::DecisionServiceServer;
use wire::fleet_service_server::FleetServiceServer;
use wire::noop_service_server::NoopServiceServer;
use wire::policy_service_server::PolicyServiceServer;
use wire::revocation_service_server::RevocationServiceServer;

/// How long a start waits for the first full snapshot.
const FIRST_SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);

/// Why the program could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings, the policy folder, the store's URL or the key do not do.
    #[error("{0}")]
    Configuration(String),
    /// A listener or a lane.
    #[error(transparent)]
    Server(#[from] server::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] audit::Error),
    /// Traces and metrics.
    #[error(transparent)]
    Telemetry(#[from] telemetry::Error),
    /// The system gave no thread, runtime or signal.
    #[error("the system refused {0}")]
    System(String),
    /// The store could be opened but gave no snapshot.
    #[error("no full snapshot of the store came within {} s: the log says why", FIRST_SNAPSHOT_TIMEOUT.as_secs())]
    NoSnapshot,
}

impl From<config::Error> for Error {
    fn from(error: config::Error) -> Self {
        Self::Configuration(error.to_string())
    }
}

/// Runs until SIGTERM or SIGINT, then drains. `ready` gets the one line that says where it listens.
///
/// # Errors
/// As [`Error`] says.
pub fn serve(settings: Settings, ready: impl FnOnce(&str)) -> Result<(), Error> {
    let app = App::start(settings)?;
    ready(&app.ready_line());
    app.control.block_on(terminated()).map_err(|error| Error::System(format!("signal handling: {error}")))?;
    app.stop();
    Ok(())
}

async fn terminated() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    tracing::info!("asked to stop: draining");
    Ok(())
}

/// A running policy decision point.
pub struct App {
    control: Runtime,
    service: Arc<Service>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    telemetry: Telemetry,
    audit: Arc<audit::Log>,
    decisions: SocketAddr,
    http: SocketAddr,
    admin: SocketAddr,
}

impl App {
    /// Starts everything; when this returns decisions are given.
    ///
    /// # Errors
    /// As [`Error`] says; nothing is left running.
    pub fn start(settings: Settings) -> Result<Self, Error> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let decisions = Listener::bind("--listen", settings.listen)?;
        let http = Listener::bind("--http-listen", settings.http_listen)?;
        let administration = Listener::bind("--admin-listen", settings.admin_listen)?;
        let control = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("portcullis-control")
            .enable_all()
            .build()
            .map_err(|error| Error::System(format!("a runtime: {error}")))?;
        let telemetry = control.block_on(async { start_telemetry(&settings) })?;
        bind::make_private_dir(&settings.data)?;
        let log = audit::Log::open(&settings.data.join("audit"), &settings.node, &*clock)?;
        let store = control.block_on(bind::open_store(&settings.store_url(), clock.clone()))?;
        control.block_on(bind::first_operator(&*store, &settings.data))?;

        let (stop, stopped) = watch::channel(false);
        let cell = Arc::new(SnapshotCell::default());
        let revocations = Arc::new(Index::new());
        let publisher = CellPublisher::new(cell.clone(), revocations);
        let (follow, status) = Follow::new(store.clone(), publisher, clock.clone(), sync::Settings::default(), None);
        control.spawn(follow.run(stopped.clone()));
        control.block_on(async { tokio::time::timeout(FIRST_SNAPSHOT_TIMEOUT, status.ready()).await }).map_err(|_| Error::NoSnapshot)?;

        let admin = Arc::new(Admin::new(store.clone(), clock.clone(), log.recorder("admin")?));
        if let Some(folder) = &settings.policies {
            let revision = control.block_on(bind::apply_folder(&admin, folder, &settings.data))?;
            control.block_on(status.wait_for(&revision, FIRST_SNAPSHOT_TIMEOUT)).map_err(|_| Error::NoSnapshot)?;
        }
        let parts = service::Parts {
            cell: cell.clone(),
            ledger: Arc::new(bind::StoreLedger(store)),
            catch_up: Arc::new(bind::FollowerCatchUp { status: status.clone(), cell: cell.clone() }),
            metrics: telemetry.metrics(),
            spans: telemetry.spans(),
            clock: clock.clone(),
        };
        let service = Arc::new(Service::new(parts, service_settings(&settings)));
        bind::register_gauges(&telemetry.metrics(), &cell, &clock, &service, &log);
        service.mark_ready();

        let mut app = Self {
            service,
            stop,
            threads: Vec::new(),
            telemetry,
            audit: log,
            decisions: decisions.address(),
            http: http.address(),
            admin: administration.address(),
            control,
        };
        app.serve_decisions(decisions, &settings, &stopped)?;
        app.serve_administration(administration, admin, &settings, &stopped)?;
        app.serve_pages(http, stopped);
        tracing::info!(decisions = %app.decisions, http = %app.http, admin = %app.admin, "ready");
        Ok(app)
    }

    /// `ready decisions=HOST:PORT http=HOST:PORT admin=HOST:PORT`
    pub fn ready_line(&self) -> String {
        format!("ready decisions={} http={} admin={}", self.decisions, self.http, self.admin)
    }

    /// Where decisions are given.
    pub fn decisions_address(&self) -> SocketAddr {
        self.decisions
    }

    /// Where health and metrics are shown.
    pub fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// Where it is administered.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// Drains and ends: calls in flight are answered, records and spans written.
    pub fn stop(mut self) {
        // Nobody may be listening any more, which is what is wanted.
        let _ = self.stop.send(true);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a serving runtime ended badly");
            }
        }
        self.service.drain();
        if let Err(error) = self.telemetry.shutdown() {
            tracing::warn!(%error, "telemetry ended badly");
        }
        if let Err(error) = self.audit.shutdown() {
            tracing::error!(%error, "the audit log ended badly");
        }
        self.control.shutdown_timeout(Duration::from_secs(1));
    }

    fn serve_decisions(&mut self, listener: Listener, settings: &Settings, stopped: &watch::Receiver<bool>) -> Result<(), Error> {
        let mut lanes = Vec::new();
        for index in 0..settings.runtimes {
            let recorder = self.audit.recorder(&format!("lane{index}"))?;
            let lane = self.service.lane(recorder.clone());
            let noop = settings.noop;
            let (outbox, inbox) = server::lane_channel();
            lanes.push(outbox);
            self.spawn_lane(&format!("portcullis-lane{index}"), inbox, move || decision_routes(lane, noop), recorder, settings, stopped)?;
        }
        self.control.spawn(accepting(listener, lanes, stopped.clone()));
        Ok(())
    }

    fn serve_administration(
        &mut self,
        listener: Listener,
        admin: Arc<Admin>,
        settings: &Settings,
        stopped: &watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let (outbox, inbox) = server::lane_channel();
        let barrier = admin.recorder();
        self.spawn_lane("portcullis-admin", inbox, move || admin_routes(admin), barrier, settings, stopped)?;
        self.control.spawn(accepting(listener, vec![outbox], stopped.clone()));
        Ok(())
    }

    fn serve_pages(&self, listener: Listener, stopped: watch::Receiver<bool>) {
        let (service, metrics) = (self.service.clone(), self.telemetry.metrics());
        let pages = HttpPages {
            ready: Box::new(move || if service.is_ready() { Ok(()) } else { Err("not ready".to_owned()) }),
            metrics: Box::new(move || metrics.render()),
        };
        self.control.spawn(async move {
            if let Err(error) = server::serve_http(listener, pages, stopped).await {
                tracing::error!(%error, "the health page ended");
            }
        });
    }

    fn spawn_lane(
        &mut self,
        name: &str,
        inbox: server::Inbox,
        routes: impl FnOnce() -> Routes + Send + 'static,
        barrier: Arc<audit::Recorder>,
        settings: &Settings,
        stopped: &watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let (stopped, drain) = (stopped.clone(), Duration::from_millis(settings.drain_timeout_ms));
        let run = move || {
            if let Err(error) = server::run_lane(inbox, routes, barrier, drain, stopped) {
                tracing::error!(%error, "a serving runtime ended");
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
        self.threads.push(thread.map_err(|error| Error::System(format!("a thread: {error}")))?);
        Ok(())
    }
}

async fn accepting(listener: Listener, lanes: Vec<server::Outbox>, stopped: watch::Receiver<bool>) {
    if let Err(error) = server::accept(listener, lanes, stopped).await {
        tracing::error!(%error, "a listener ended");
    }
}

fn decision_routes(lane: Lane, noop: bool) -> Routes {
    let api = DecisionApi::new(lane);
    let decisions = DecisionServiceServer::new(api.clone()).max_decoding_message_size(BATCH_MESSAGE_BYTES_MAX);
    let mut routes = Routes::new(decisions).add_service(FleetServiceServer::new(api));
    if noop {
        routes = routes.add_service(NoopServiceServer::new(NoopApi::default()).max_decoding_message_size(CHECK_MESSAGE_BYTES_MAX));
    }
    with_standard_services(routes, &["portcullis.v1.DecisionService"])
}

fn admin_routes(admin: Arc<Admin>) -> Routes {
    let api = AdminApi::new(admin.clone());
    let routes = Routes::new(RevocationServiceServer::new(api.clone()))
        .add_service(PolicyServiceServer::new(api.clone()).max_decoding_message_size(SignedActs::MESSAGE_BYTES_MAX))
        .add_service(FleetServiceServer::new(api));
    let routes = with_standard_services(routes, &["portcullis.v1.RevocationService", "portcullis.v1.PolicyService"]);
    Routes::from(routes.into_axum_router().layer(SignedActs::new(admin)))
}

/// Health and reflection, which every listener has and nobody signs.
fn with_standard_services(routes: Routes, names: &[&'static str]) -> Routes {
    let (reporter, health) = tonic_health::server::health_reporter();
    let names: Vec<&'static str> = names.to_vec();
    // Nothing is served before the first snapshot, so what is served is serving; draining closes the connections.
    let reported = async move {
        for name in names {
            reporter.set_service_status(name, tonic_health::ServingStatus::Serving).await;
        }
    };
    if let Ok(handle) = tokio::runtime::Handle::try_current() {
        handle.spawn(reported);
    }
    let mut routes = routes.add_service(health);
    let reflection = || tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(wire::DESCRIPTORS);
    if let Ok(v1) = reflection().build_v1() {
        routes = routes.add_service(v1);
    }
    if let Ok(v1alpha) = reflection().build_v1alpha() {
        routes = routes.add_service(v1alpha);
    }
    routes
}

fn service_settings(settings: &Settings) -> service::Settings {
    service::Settings {
        audiences: settings.audiences.clone(),
        require_chain_audience: settings.require_chain_audience,
        require_proof_audience: settings.require_proof_audience,
        ..service::Settings::default()
    }
}

fn start_telemetry(settings: &Settings) -> Result<Telemetry, telemetry::Error> {
    let observed = telemetry_settings(settings);
    if settings.logs { telemetry::init(&observed) } else { Telemetry::start(&observed) }
}

fn telemetry_settings(settings: &Settings) -> telemetry::Settings {
    telemetry::Settings {
        otlp_endpoint: settings.otlp_endpoint.clone(),
        permit_span_ratio: settings.trace_ratio,
        log_filter: settings.log.clone(),
        log_format: if settings.log_json { telemetry::LogFormat::Json } else { telemetry::LogFormat::Human },
        node: settings.node.clone(),
        ..telemetry::Settings::default()
    }
}

/// Reads the files of a policy folder, the error naming the flag.
fn policy_files(folder: &Path) -> Result<Vec<crate::policy::source::SourceFile>, Error> {
    read_folder(folder).map_err(|error| Error::Configuration(format!("--policies: {error}")))
}
