//! The HTTP listener: liveness, readiness, metrics. Nothing that decides.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch;

use super::{Error, Listener};

/// What the pages show; bound by `app`.
pub struct HttpPages {
    /// Whether decisions are given, and why not.
    pub ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// The metrics in Prometheus' text form.
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
}

/// Serves `/livez`, `/readyz` and `/metrics` until `stop` says so.
///
/// # Errors
/// If the listener cannot be used on this runtime.
pub async fn serve_http(listener: Listener, pages: HttpPages, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
    let failed = |error: std::io::Error| Error::Lane(error.to_string());
    let listener = tokio::net::TcpListener::from_std(listener.socket).map_err(failed)?;
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    axum::serve(listener, router(pages)).with_graceful_shutdown(stopped).await.map_err(failed)
}

fn router(pages: HttpPages) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there are /livez, /readyz and /metrics here\n") })
        .with_state(Arc::new(pages))
}

async fn ready(State(pages): State<Arc<HttpPages>>) -> Response {
    match (pages.ready)() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics(State(pages): State<Arc<HttpPages>>) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (kind, (pages.metrics)()).into_response()
}
