//! The composition root: connects every module to the others. Only this module spawns long-lived tasks.
//!
//! ```text
//! control runtime: follower, store, telemetry      server threads: accept, decision runtimes, administration, health
//! ```
//!
//! Look next at [`App::start`], which shows the order of a start, then at `app/wiring.rs` for the ports of the service.

pub(crate) mod follower_runtime;
mod gauge_registration;
pub(crate) mod in_process_admin;
mod process_limits;
pub(crate) mod wiring;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tonic::service::Routes;
use tower::util::MapResponseLayer;

use follower_runtime::{FollowerRuntime, FollowerSetup, StartPoint, open_store_and_start_point};
pub use in_process_admin::{InProcessAdmin, StoreFollowers};

use crate::api::admin::AdminApi;
use crate::api::admin_methods::admin_limits;
use crate::api::r#gen as wire;
use crate::api::noop::NoopApi;
use crate::api::revocation_feed::{GatewayApi, GatewayApiState};
use crate::api::wires::{add_wires, decision_limits, wire_services};
use crate::api::{SignedActLayer, normalize_refusal};
use crate::audit;
use crate::config::{self, Settings};
use crate::model::limits::{CHECK_MESSAGE_BYTES_MAX, LEDGER_QUEUE_MAX, LEDGER_USES_IN_FLIGHT_MAX, POLICY_MESSAGE_BYTES_MAX};
use crate::model::runtime::build_runtime;
use crate::model::time::{Clock, SystemClock};
use crate::pap::AdministrationPoint;
use crate::policy::source::read_folder;
use crate::server::{self, BoundListeners, GrpcServices, HttpServices, NoWriteBarrier, RuntimeContext, Server, ServiceFactories};
use crate::service::{self, PdpService, RuntimeService};
use crate::store::{self, ReplicaState};
use crate::sync::status::FollowerHandle;
use crate::sync::{CacheWriter, PositionFiles, RevocationPruner};
use crate::telemetry::{self, Telemetry};
use wire::approval_service_server::ApprovalServiceServer;
use wire::fleet_service_server::FleetServiceServer;
use wire::noop_service_server::NoopServiceServer;
use wire::operator_service_server::OperatorServiceServer;
use wire::policy_service_server::PolicyServiceServer;
use wire::revocation_service_server::RevocationServiceServer;

/// Longest wait for the first full snapshot at a start.
const FIRST_SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest wait for the store to close at the end of the program.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the program could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings, the policy folder, the store's URL or the key cannot be used.
    #[error("{0}")]
    Configuration(String),
    /// A listener or a runtime failed.
    #[error(transparent)]
    Server(server::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The audit log failed.
    #[error(transparent)]
    Audit(#[from] audit::Error),
    /// Traces or metrics failed.
    #[error(transparent)]
    Telemetry(#[from] telemetry::Error),
    /// The system refused a thread, a runtime or a signal handler.
    #[error("the system refused {0}")]
    System(String),
    /// The store was opened but gave no snapshot.
    #[error("the store gave no full snapshot in time: {0}")]
    NoSnapshot(String),
}

impl From<server::Error> for Error {
    fn from(error: server::Error) -> Self {
        match error {
            server::Error::NotLoopback { .. } | server::Error::Setting { .. } => Self::Configuration(error.to_string()),
            other => Self::Server(other),
        }
    }
}

impl From<config::Error> for Error {
    fn from(error: config::Error) -> Self {
        Self::Configuration(error.to_string())
    }
}

/// Runs until SIGTERM or SIGINT, then drains. SIGHUP makes it continue in new audit files. `ready` receives the line with the bound
/// addresses.
///
/// # Errors
/// See [`Error`].
pub fn serve(settings: Settings, ready: impl FnOnce(&str)) -> Result<(), Error> {
    let app = App::start(settings)?;
    let stopped = {
        let _entered = app.control.enter();
        // The handlers are in place before the ready line is printed, because its reader may send a signal at once.
        listen_for_termination(app.audit.clone()).map_err(|error| Error::System(format!("signal handling: {error}")))?
    };
    ready(&app.ready_line());
    app.control.block_on(stopped);
    app.stop()
}

/// Installs the signal handlers; the future ends with the first signal that asks for an end. Until then, SIGHUP makes the audit log
/// continue in new files.
fn listen_for_termination(log: Arc<audit::AuditLog>) -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        let reopening = async {
            while hangup.recv().await.is_some() {
                tracing::info!("SIGHUP: the audit files are opened anew; no setting and no policy is read again");
                log.reopen_files();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = reopening => {}
        }
        tracing::info!("asked to stop: draining");
    })
}

/// A running policy decision point.
pub struct App {
    control: Runtime,
    server: Server,
    service: Arc<PdpService>,
    follower: FollowerRuntime,
    telemetry: Telemetry,
    audit: Arc<audit::AuditLog>,
}

impl App {
    /// Starts every part. When it returns, decisions are given.
    ///
    /// # Errors
    /// See [`Error`]. After an error nothing is left running.
    pub fn start(settings: Settings) -> Result<Self, Error> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let (chosen, may_create, data) = (settings.store()?, settings.may_create_store(), &settings.data);
        wiring::check_store_exists(&chosen, settings.store_data_dir(), may_create)?;
        // The listeners are bound first, so that a port in use is reported before anything is written.
        let (listening, limits_message) = server_settings(&settings)?;
        let listeners = BoundListeners::bind(listening)?;
        let control = control_runtime()?;
        let telemetry = control.block_on(async { prepare_process(&settings, limits_message) })?;
        wiring::create_private_dir(data)?;
        let log = audit::AuditLog::open(&data.join("audit"), &settings.node, clock.clone())?;
        let store_disk = wiring::watch_store_disk(&chosen, &log);
        let cache_writer = CacheWriter::new(data);
        let position_files = PositionFiles::new(data, settings.place.as_deref()).map_err(Error::Configuration)?;
        let begun = open_store_and_start_point(&chosen, may_create, data, &position_files, &cache_writer, clock.clone());
        let (store, start) = control.block_on(begun)?;
        let is_cached = matches!(start, StartPoint::FromCache { .. });
        let followed = FollowerSetup {
            store: store.clone(),
            registration: wiring::replica_registration(&settings, listeners.addresses().decisions, &*clock),
            settings: wiring::follow_settings(&chosen),
            position_files,
            cache_writer,
            start,
        };
        let following = control.block_on(FollowerRuntime::start(followed, clock.clone(), log.clone(), &telemetry))?;
        let (cell, status) = (following.cell.clone(), following.status.clone());
        control.spawn(RevocationPruner::new(store.clone(), clock.clone()).run(following.stop.subscribe()));
        let admin = Arc::new(AdministrationPoint::new(store.clone(), clock.clone(), log.open_recorder("admin")?));
        admin.set_record_directory(&data.join("audit"));
        match &settings.policies {
            Some(folder) if is_cached => {
                control.spawn(apply_folder_when_followed(status.clone(), admin.clone(), folder.clone(), data.clone()));
            }
            Some(folder) => {
                let revision = control.block_on(wiring::apply_policy_folder(&admin, folder, data))?;
                let applied = control.block_on(status.wait_for_revision(&revision, FIRST_SNAPSHOT_TIMEOUT));
                applied.map_err(|behind| Error::NoSnapshot(behind.to_string()))?;
            }
            None => {}
        }
        let directory = Arc::new(follower_runtime::CachedFleetDirectory::new(store.clone(), clock.clone()));
        let parts = service::ServiceParts {
            snapshot_cell: cell.clone(),
            ledger: Arc::new(wiring::StoreProofLedger(store.clone())),
            approvals: Arc::new(wiring::StoreApprovalLedger(store)),
            catch_up: Arc::new(wiring::FollowerCatchUp { status: status.clone(), cell: cell.clone() }),
            metrics: telemetry.metrics(),
            spans: telemetry.spans(),
            clock: clock.clone(),
            // The task runs on the runtime of the call, because that runtime's sockets wait for the record.
            spawn: Arc::new(|work| drop(tokio::spawn(work))),
        };
        let service = Arc::new(PdpService::new(parts, service_settings(&settings)));
        let follower = wiring::FollowerCatchUp { status: status.clone(), cell: cell.clone() };
        admin.set_names_source(Arc::new(wiring::LiveNamesSource { follower, service: service.clone() }));
        gauge_registration::register_gauges(&telemetry, &following, &clock, &service);
        gauge_registration::register_disk_gauges(&telemetry, &following.cache_writer, &log, store_disk);
        service.mark_ready();
        following.member.set_state(ReplicaState::Serving);

        let gateways = GatewayApiState::new(status, directory);
        let made = FactoryInputs { service: &service, follower: &following, gateway_state: gateways, admin, clock };
        let factories = make_factories(&settings, made, &telemetry, &log)?;
        let server = control.block_on(listeners.serve(factories))?;
        gauge_registration::register_listener_metrics(&telemetry, &server.stats());
        let app = Self { control, server, service, follower: following, telemetry, audit: log };
        tracing::info!("{}", app.ready_line());
        Ok(app)
    }

    /// `ready decisions=HOST:PORT http=HOST:PORT admin=HOST:PORT`
    pub fn ready_line(&self) -> String {
        let at = self.server.addresses();
        format!("ready decisions={} http={} admin={}", at.decisions, at.http, at.admin)
    }

    /// The bound addresses.
    pub fn addresses(&self) -> server::ListenerAddresses {
        self.server.addresses()
    }

    /// Drains and ends: answers the calls in flight, then writes all records and spans.
    ///
    /// # Errors
    /// [`Error::Audit`] if the audit log lacks its last records.
    pub fn stop(self) -> Result<(), Error> {
        let Self { control, server, service, follower: following, telemetry, audit } = self;
        service.start_drain();
        following.member.set_state(ReplicaState::Draining);
        let drained = control.block_on(server.drain());
        if drained.connections_cut > 0 {
            tracing::warn!(
                connections_cut = drained.connections_cut,
                "calls were still in flight at the end of the drain timeout"
            );
        }
        // The follower may have ended already, which is what the signal asks for.
        let _ = following.stop.send(true);
        control.block_on(async {
            following.cache_writer.flush_before_exit(&*following.store).await;
            match tokio::time::timeout(CLOSE_TIMEOUT, following.store.close()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the store was not closed well"),
                Err(_) => {
                    tracing::warn!("the store was not closed in time: nothing is lost, but a copy of its file alone is not whole")
                }
            }
        });
        if let Err(error) = telemetry.shutdown() {
            tracing::warn!(%error, "telemetry ended badly");
        }
        let ended = audit.shutdown();
        if let Err(error) = &ended {
            tracing::error!(%error, "the audit log ended badly: its last records are missing");
        }
        control.shutdown_timeout(Duration::from_secs(1));
        ended.map_err(Error::Audit)
    }
}

/// The runtime of the follower, the store and telemetry.
fn control_runtime() -> Result<Runtime, Error> {
    build_runtime(tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("pdp-control"))
        .map_err(|error| Error::System(format!("a runtime: {error}")))
}

/// Applies a policy folder once the store is followed.
async fn apply_folder_when_followed(status: FollowerHandle, admin: Arc<AdministrationPoint>, folder: PathBuf, data: PathBuf) {
    tracing::warn!(folder = %folder.display(), "--policies: the folder is put in force once the store is reached");
    if !status.wait_until_following().await {
        return;
    }
    if let Err(error) = wiring::apply_policy_folder(&admin, &folder, &data).await {
        tracing::error!(%error, "--policies: what the store holds stays in force; see to it and restart");
    }
}

/// The parts that the service factories need.
struct FactoryInputs<'a> {
    service: &'a Arc<PdpService>,
    follower: &'a FollowerRuntime,
    gateway_state: Arc<GatewayApiState>,
    admin: Arc<AdministrationPoint>,
    clock: Arc<dyn Clock>,
}

/// Makes the factories for each runtime's services. Every runtime records into its own buffer, and its sockets wait for that buffer
/// only.
fn make_factories(
    settings: &Settings,
    made: FactoryInputs<'_>,
    telemetry: &Telemetry,
    log: &Arc<audit::AuditLog>,
) -> Result<ServiceFactories, Error> {
    let FactoryInputs { service, follower: following, gateway_state: gateways, admin, clock } = made;
    let recorders =
        (0..settings.runtimes).map(|index| log.open_recorder(&format!("lane{index}"))).collect::<Result<Vec<_>, _>>()?;
    let runtime_services: Vec<RuntimeService> =
        recorders.iter().map(|recorder| service.runtime_service(recorder.clone())).collect();
    let (finishing, explaining, noop) = (runtime_services.clone(), service.clone(), settings.noop);
    let (runtimes, is_serving) = (following.serving_runtimes.clone(), following.is_serving.clone());
    let make_decisions =
        move |context: RuntimeContext| match recorders.get(context.index).zip(runtime_services.get(context.index)) {
            Some((recorder, runtime_service)) => {
                // The runtime joins before it serves, so that no revision is acknowledged while a runtime outside the barrier
                // answers decisions.
                runtimes.register_current();
                let routes = decision_routes(runtime_service.clone(), gateways.clone(), is_serving.clone(), noop);
                GrpcServices { routes, barrier: recorder.clone(), limits: decision_limits }
            }
            // There is a recorder for each runtime. Without one the runtime serves nothing.
            None => GrpcServices { routes: Routes::default(), barrier: Arc::new(NoWriteBarrier), limits: decision_limits },
        };
    let make_admin = move |_: RuntimeContext| {
        let runtime_service = explaining.runtime_service(admin.recorder());
        admin_services(admin, Some(runtime_service))
    };
    let (service, metrics) = (service.clone(), telemetry.metrics());
    let (status, cell, log) = (following.status.clone(), following.cell.clone(), log.clone());
    let make_http = move |context: RuntimeContext| HttpServices {
        ready: Arc::new(move || match (context.drain_signal.is_draining(), service.is_ready()) {
            (true, _) => Err("draining".to_owned()),
            // If a proof arrived between the two checks, the state is ready and the reason is empty: then the replica is draining.
            (_, false) => {
                Err(follower_runtime::readiness(&status, &cell, clock.now()).err().unwrap_or_else(|| "draining".to_owned()))
            }
            _ => follower_runtime::readiness(&status, &cell, clock.now())
                .and_then(|state| follower_runtime::readiness_with_audit(state, &log)),
        }),
        metrics: Arc::new(move || metrics.render_page()),
        routes: axum::Router::new(),
        barrier: Arc::new(NoWriteBarrier),
    };
    let finish = Arc::new(move |index: usize| -> BoxFuture<'static, ()> {
        let runtime_service = finishing.get(index).cloned();
        Box::pin(async move {
            if let Some(runtime_service) = runtime_service {
                runtime_service.wait_for_ledger_tasks().await;
            }
        })
    });
    Ok(ServiceFactories { decisions: Arc::new(make_decisions), finish, admin: Box::new(make_admin), http: Box::new(make_http) })
}

fn decision_routes(
    runtime_service: RuntimeService,
    gateways: Arc<GatewayApiState>,
    is_serving: watch::Receiver<bool>,
    noop: bool,
) -> Routes {
    let gateway = GatewayApi::new(runtime_service.clone(), gateways);
    let names: Vec<_> = std::iter::once("").chain(wire_services()).collect();
    let mut routes = add_wires(Routes::default(), &runtime_service)
        .add_service(FleetServiceServer::new(gateway.clone()))
        .add_service(RevocationServiceServer::new(gateway).max_decoding_message_size(CHECK_MESSAGE_BYTES_MAX));
    if noop {
        routes =
            routes.add_service(NoopServiceServer::new(NoopApi::default()).max_decoding_message_size(CHECK_MESSAGE_BYTES_MAX));
    }
    let routes = add_standard_services(routes, &names, Some(is_serving));
    Routes::from(routes.into_axum_router().layer(MapResponseLayer::new(normalize_refusal)))
}

/// The administration services. Their sockets do not wait for records. An act is recorded before its answer, or the answer says
/// that the record is missing; a read is refused without its record. A full disk therefore never suppresses the answer to a
/// revocation.
pub(crate) fn admin_services(admin: Arc<AdministrationPoint>, runtime_service: Option<RuntimeService>) -> GrpcServices {
    GrpcServices { routes: admin_routes(admin, runtime_service), barrier: Arc::new(NoWriteBarrier), limits: admin_limits }
}

fn admin_routes(admin: Arc<AdministrationPoint>, runtime_service: Option<RuntimeService>) -> Routes {
    let api = AdminApi::new(admin.clone(), runtime_service);
    let routes = Routes::new(RevocationServiceServer::new(api.clone()))
        .add_service(PolicyServiceServer::new(api.clone()).max_decoding_message_size(POLICY_MESSAGE_BYTES_MAX))
        .add_service(ApprovalServiceServer::new(api.clone()))
        .add_service(OperatorServiceServer::new(api.clone()))
        .add_service(FleetServiceServer::new(api));
    let names = [
        "portcullis.v1.RevocationService",
        "portcullis.v1.PolicyService",
        "portcullis.v1.ApprovalService",
        "portcullis.v1.OperatorService",
    ];
    let routes = add_standard_services(routes, &names, None);
    Routes::from(routes.into_axum_router().layer(MapResponseLayer::new(normalize_refusal)).layer(SignedActLayer::new(admin)))
}

/// Adds health and reflection, which every listener serves unsigned. The health of `names` follows `is_serving`, where there is one: a
/// replica that can only deny reports `NotServing`.
fn add_standard_services(routes: Routes, names: &[&'static str], is_serving: Option<watch::Receiver<bool>>) -> Routes {
    use tonic_health::ServingStatus::{NotServing, Serving};
    let (reporter, health) = tonic_health::server::health_reporter();
    let names: Vec<&'static str> = names.to_vec();
    // A drain needs no report here, because it closes the connections.
    let reported = async move {
        let Some(mut is_serving) = is_serving else {
            for name in names {
                reporter.set_service_status(name, Serving).await;
            }
            return;
        };
        loop {
            let status = if *is_serving.borrow_and_update() { Serving } else { NotServing };
            for name in &names {
                reporter.set_service_status(*name, status).await;
            }
            if is_serving.changed().await.is_err() {
                return;
            }
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

/// The server's settings, lowered to the file descriptors that this process may open, and a message if anything was lowered.
fn server_settings(settings: &Settings) -> Result<(server::Settings, Option<String>), Error> {
    let mut listening = server::Settings {
        decisions_address: settings.listen,
        http_address: settings.http_listen,
        admin_address: settings.admin_listen,
        decision_runtimes: settings.runtimes,
        drain_timeout_ms: settings.drain_timeout_ms,
        ..settings.limits.clone()
    };
    let limits_message = process_limits::fit_connection_limits(&mut listening, process_limits::raise_file_limits())?;
    Ok((listening, limits_message))
}

/// Makes the process survive file-size signals and SIGHUP, starts its logs and metrics, and logs what was lowered.
fn prepare_process(settings: &Settings, limits_message: Option<String>) -> Result<Telemetry, Error> {
    let caught = process_limits::ignore_file_size_signal().and_then(|()| process_limits::catch_hangup_signal());
    caught.map_err(|error| Error::System(format!("signal handling: {error}")))?;
    let telemetry = start_telemetry(settings)?;
    if let Some(limits_message) = limits_message {
        tracing::warn!("{limits_message}");
    }
    Ok(telemetry)
}

fn service_settings(settings: &Settings) -> service::Settings {
    service::Settings {
        audiences: settings.audiences.clone(),
        require_chain_audience: settings.require_chain_audience,
        require_proof_audience: settings.require_proof_audience,
        // All runtimes share the queue of the store: one agent's calls, at most a half of each, cannot fill it.
        ledger_uses_max: LEDGER_USES_IN_FLIGHT_MAX
            .min(u32::try_from(LEDGER_QUEUE_MAX / settings.runtimes.max(1)).unwrap_or(u32::MAX)),
        ..service::Settings::default()
    }
}

fn start_telemetry(settings: &Settings) -> Result<Telemetry, telemetry::Error> {
    let observed = telemetry::Settings {
        otlp_endpoint: settings.otlp_endpoint.clone(),
        permit_span_ratio: settings.trace_ratio,
        log_filter: settings.log.clone(),
        log_format: if settings.log_json { telemetry::LogFormat::Json } else { telemetry::LogFormat::Human },
        node: settings.node.clone(),
        ..telemetry::Settings::default()
    };
    if settings.logs { telemetry::init(&observed) } else { Telemetry::start(&observed) }
}

/// Reads the files of a policy folder. Errors name the flag.
fn read_policy_files(folder: &Path) -> Result<Vec<crate::policy::source::SourceFile>, Error> {
    read_folder(folder).map_err(|error| Error::Configuration(format!("--policies: {error}")))
}
