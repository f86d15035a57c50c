//! An exporter that logs when exporting begins to fail, and when it succeeds again.
//!
//! Without it, a collector could disappear unnoticed. The exporter changes nothing in the exported data. Look next at
//! `telemetry.rs`.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

/// An exporter whose failures and recoveries are logged. `what` names the exported data.
pub(super) struct MonitoredExporter<E> {
    what: &'static str,
    exporter: E,
    failing: AtomicBool,
}

impl<E> MonitoredExporter<E> {
    pub(super) fn new(what: &'static str, exporter: E) -> Self {
        Self { what, exporter, failing: AtomicBool::new(false) }
    }

    /// Logs the change between failure and success.
    fn log_transition(&self, outcome: OTelSdkResult) -> OTelSdkResult {
        let fails = outcome.is_err();
        if self.failing.swap(fails, Ordering::Relaxed) != fails {
            match &outcome {
                Ok(()) => tracing::info!(what = self.what, "telemetry is exported again"),
                Err(error) => tracing::warn!(what = self.what, %error, "telemetry is not exported: check the collector"),
            }
        }
        outcome
    }
}

impl<E> fmt::Debug for MonitoredExporter<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("what", &self.what).field("failing", &self.failing).finish()
    }
}

impl<E: SpanExporter> SpanExporter for MonitoredExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.log_transition(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for MonitoredExporter<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.log_transition(self.exporter.export(metrics).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}
