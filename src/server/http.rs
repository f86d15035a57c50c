//! The HTTP/1.1 listener: liveness, readiness, metrics, and the routes that the caller adds.
//!
//! The listener answers during the drain, so that a load balancer sees that the replica is not ready, and it stops last. Look next at
//! `worker.rs`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::StreamExt;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::sync::{oneshot, watch};
use tower::{ServiceExt, service_fn};

use super::active_call::{ActiveCall, ReplyBody};
use super::connection::{ConnectionGuards, GuardedConnection};
use super::phase::{DrainSignal, PhaseReceiver, ServerPhase};
use super::settings::Settings;
use super::worker::{IncomingConnections, WorkerContext, serve_until_closed};
use super::{HttpServices, RuntimeContext};

/// The content type of what `prometheus-client` writes.
const OPENMETRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const NOT_FOUND: &str = "not found: try /livez, /readyz or /metrics\n";
const METHOD_NOT_ALLOWED: &str = "method not allowed: use GET\n";
/// Most headers of one request.
const HEADERS_MAX: usize = 64;

/// Serves HTTP/1.1 on arriving sockets until the phase is `Draining` and all connections are closed.
pub(super) async fn serve_http(
    worker: WorkerContext,
    make: impl FnOnce(RuntimeContext) -> HttpServices,
    started: oneshot::Sender<()>,
) {
    let WorkerContext { sockets, context, mut phases, settings } = worker;
    let draining = context.drain_signal.clone();
    let services = make(context);
    let mut incoming =
        IncomingConnections { sockets, guards: ConnectionGuards::new(Arc::clone(&services.barrier), &settings, false) };
    let router = build_router(services, draining, &settings);
    let server = http_server(&settings);
    // Every connection holds a receiver, so dropping the last one shows that all are closed.
    let (all_closed, alive) = watch::channel(());
    let _ = started.send(());
    let connection_phases = phases.clone();
    let accepting = async {
        while let Some(accepted) = incoming.next().await {
            let Ok(connection) = accepted else { continue };
            let served = serve_connection(connection, server.clone(), router.clone(), connection_phases.clone());
            let alive = alive.clone();
            tokio::spawn(async move {
                served.await;
                drop(alive);
            });
        }
    };
    tokio::select! {
        () = accepting => (),
        () = phases.wait_until(ServerPhase::Draining) => (),
    }
    drop(alive);
    all_closed.closed().await;
}

fn http_server(settings: &Settings) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(settings.handshake_timeout_ms))
        .max_buf_size(usize::try_from(settings.header_bytes_max).unwrap_or(usize::MAX))
        .max_headers(HEADERS_MAX);
    server
}

async fn serve_connection(
    connection: GuardedConnection,
    server: auto::Builder<TokioExecutor>,
    router: Router,
    phases: PhaseReceiver,
) {
    let (peer, tracked) = (connection.peer().clone(), Arc::clone(connection.tracked()));
    let calls = Arc::clone(&tracked);
    let service = service_fn(move |mut request: http::Request<_>| {
        let call = ActiveCall::begin(&calls);
        request.extensions_mut().insert(peer.clone());
        let router = router.clone();
        async move {
            let response: Response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
            Ok::<_, Infallible>(response.map(|body| ReplyBody::new(body, call)))
        }
    });
    let served = server.serve_connection(TokioIo::new(connection), TowerToHyperService::new(service));
    if let Some(Err(error)) = serve_until_closed(served, &tracked, phases, |served| served.graceful_shutdown()).await {
        tracing::debug!(%error, "an http connection ended early");
    }
}

fn build_router(services: HttpServices, draining: DrainSignal, settings: &Settings) -> Router {
    let HttpServices { ready, metrics, routes, barrier: _ } = services;
    let timeout = Duration::from_millis(settings.http_request_timeout_ms);
    let readiness = move || async move {
        if draining.is_draining() {
            return (StatusCode::SERVICE_UNAVAILABLE, "not ready: draining\n".to_owned());
        }
        match ready() {
            Ok(state) => (StatusCode::OK, format!("ready: {state}\n")),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        }
    };
    Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readiness))
        .route("/metrics", get(move || async move { ([(header::CONTENT_TYPE, OPENMETRICS_CONTENT_TYPE)], metrics()) }))
        .merge(routes)
        .fallback(|| async { (StatusCode::NOT_FOUND, NOT_FOUND) })
        .method_not_allowed_fallback(|| async { (StatusCode::METHOD_NOT_ALLOWED, METHOD_NOT_ALLOWED) })
        .layer(DefaultBodyLimit::max(settings.http_body_bytes_max))
        .layer(middleware::from_fn(move |request, next| with_timeout(timeout, request, next)))
}

async fn with_timeout(timeout: Duration, request: Request<Body>, next: Next) -> Response {
    match tokio::time::timeout(timeout, next.run(request)).await {
        Ok(response) => response,
        Err(_) => (StatusCode::REQUEST_TIMEOUT, "request took too long\n").into_response(),
    }
}
