//! Telemetry: logs, metrics and spans that show what the program does. The proof of what it did is the audit log, never
//! telemetry.
//!
//! Recording a value takes a few atomic operations; recording a span without a collector takes one branch. Spans are built after
//! the decision, so that telemetry can neither delay nor change a decision. No identity is a label of a metric, and telemetry
//! never contains a token, an argument or a key. Look next at `names.rs`, then at `metrics.rs` and `spans.rs`.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::MeterProvider as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, TracerProviderBuilder};

mod exporter_health;
mod log_writer;
mod logs;
mod metric_values;
mod metrics;
mod metrics_page;
pub mod names;
mod spans;
#[cfg(test)]
mod tests;
mod trace_context;

pub use log_writer::LogFormat;
pub use metric_values::LabelledCount;
pub use metrics::Metrics;
pub use metrics_page::CONTENT_TYPE;
pub use spans::{SpanFacts, SpanRecorder};
pub use trace_context::TraceContext;

/// What is observed, and where it is sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// A filter as in `info,portcullis=debug`, usually from [`names::LOG_VARIABLE`].
    pub log_filter: String,
    /// Format of a line of the log.
    pub log_format: LogFormat,
    /// Address at which an OTLP collector listens for gRPC, `http://HOST:PORT`, usually from [`names::OTLP_ENDPOINT_VARIABLE`];
    /// `None` turns export off.
    pub otlp_endpoint: Option<String>,
    /// Name of this replica among the instances of the service.
    pub node: String,
    /// Interval at which metrics are pushed.
    pub metrics_interval_ms: u64,
    /// Share of the permits without a trace context of their caller that get a span: 0 to 1.
    pub permit_span_ratio: f64,
    /// Maximum number of permit spans in one second, for all callers together.
    pub permit_spans_per_s_max: u32,
    /// Maximum number of spans in one second for denials and for calls that need an approval.
    pub denial_spans_per_s_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            log_filter: "info".to_owned(),
            log_format: LogFormat::Human,
            otlp_endpoint: None,
            node: String::new(),
            metrics_interval_ms: 10_000,
            permit_span_ratio: 0.01,
            permit_spans_per_s_max: 200,
            denial_spans_per_s_max: 100,
        }
    }
}

/// Why telemetry cannot be started or stopped. One line, with what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log filter is invalid.
    #[error("the log filter `{filter}` is not one: {problem}: write it as in `info,portcullis=debug`")]
    Filter {
        /// The given filter.
        filter: String,
        /// The problem with it.
        problem: String,
    },
    /// Another subscriber already receives the logs of this process.
    #[error("logs are set up already: set them up once, at the start")]
    LogsTwice,
    /// The ratio is not between 0 and 1.
    #[error("the ratio of sampled permits is {0}: it must be from 0 to 1")]
    Ratio(f64),
    /// The collector's address cannot be used.
    #[error("the OTLP endpoint `{endpoint}` cannot be used: {problem}: write it as `http://HOST:PORT`")]
    Endpoint {
        /// The given endpoint.
        endpoint: String,
        /// The problem with it.
        problem: String,
    },
    /// Export needs a tokio runtime for its connection.
    #[error("OTLP export must be started inside a tokio runtime")]
    NoRuntime,
    /// The last telemetry was not exported.
    #[error("the last telemetry was not exported: {0}: check that the collector answers")]
    Shutdown(String),
}

/// Sets up the logs of the process, and starts everything else as [`Telemetry::start`] does.
///
/// # Errors
/// [`Error::Filter`], [`Error::LogsTwice`], and as [`Telemetry::start`].
pub fn init(settings: &Settings) -> Result<Telemetry, Error> {
    logs::init_logs(settings)?;
    Telemetry::start(settings)
}

/// The metrics and spans of the process, and their export.
#[derive(Debug)]
pub struct Telemetry {
    metrics: Metrics,
    spans: SpanRecorder,
    export: Option<(SdkTracerProvider, SdkMeterProvider)>,
}

impl Telemetry {
    /// Starts metrics and spans, and their export if an endpoint is set. Does not touch the logs of the process.
    ///
    /// A collector that does not answer delays nothing: telemetry that cannot be sent in time is dropped, and the log reports
    /// that once.
    ///
    /// # Errors
    /// [`Error::Ratio`], [`Error::Endpoint`], and [`Error::NoRuntime`] if an endpoint is set outside of a runtime.
    pub fn start(settings: &Settings) -> Result<Self, Error> {
        if !(0.0..=1.0).contains(&settings.permit_span_ratio) {
            return Err(Error::Ratio(settings.permit_span_ratio));
        }
        let Some(endpoint) = settings.otlp_endpoint.as_deref() else {
            return Ok(Self { metrics: Metrics::new(None), spans: SpanRecorder::disabled(), export: None });
        };
        tokio::runtime::Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let unusable = |problem: String| Error::Endpoint { endpoint: endpoint.to_owned(), problem };
        let resource = Resource::builder()
            .with_service_name(names::SERVICE)
            .with_attribute(KeyValue::new(names::SERVICE_INSTANCE_ID, settings.node.clone()))
            .with_attribute(KeyValue::new(names::SERVICE_VERSION, env!("CARGO_PKG_VERSION")))
            .build();
        let timeout = Duration::from_secs(5);
        let spans = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(timeout);
        let spans = spans.build().map_err(|error| unusable(error.to_string()))?;
        let metrics = opentelemetry_otlp::MetricExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(timeout);
        let metrics = metrics.build().map_err(|error| unusable(error.to_string()))?;
        let tracers = tracer_builder()
            .with_resource(resource.clone())
            .with_batch_exporter(exporter_health::MonitoredExporter::new("spans", spans))
            .build();
        let interval = Duration::from_millis(settings.metrics_interval_ms.max(100));
        let reader =
            PeriodicReader::builder(exporter_health::MonitoredExporter::new("metrics", metrics)).with_interval(interval).build();
        let meters = SdkMeterProvider::builder().with_resource(resource).with_reader(reader).build();
        Ok(Self {
            metrics: Metrics::new(Some(meters.meter(names::SERVICE))),
            spans: SpanRecorder::new(tracers.tracer(names::SERVICE), settings),
            export: Some((tracers, meters)),
        })
    }

    /// The metrics of the process. A clone counts into the same numbers.
    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// The recorder of decision spans. A clone shares the limits.
    pub fn spans(&self) -> SpanRecorder {
        self.spans.clone()
    }

    /// Sends the rest and ends the export. Blocks for some seconds at most: call it from a thread that no runtime needs
    /// (`spawn_blocking`), while the runtime in which the export was started still runs.
    ///
    /// # Errors
    /// [`Error::Shutdown`] if the collector did not accept the rest.
    pub fn shutdown(&self) -> Result<(), Error> {
        let Some((tracers, meters)) = &self.export else {
            return Ok(());
        };
        let timeout = Duration::from_secs(3);
        let (spans, metrics) = (tracers.shutdown_with_timeout(timeout), meters.shutdown_with_timeout(timeout));
        spans.and(metrics).map_err(|error| Error::Shutdown(error.to_string()))
    }
}

/// Makes the SDK keep every span that it is given. By default, it would drop the span of a denial if the caller does not sample
/// its trace.
fn tracer_builder() -> TracerProviderBuilder {
    SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOn)
}
