//! Counts and durations, kept in plain atomics and read on demand.
//!
//! No identity is a label, except in a `register_labelled_counter`. Other modules keep their own counts, which `app` registers here as
//! closures. Look next at `metric_values.rs`, which holds the numbers, and at `metrics_page.rs`, which renders them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Histogram, Meter};

use crate::model::decision::Effect;
use crate::model::reason::Reason;

use super::metric_values::{
    DURATION_BOUNDS_NS, EFFECTS, GaugeReader, LabelledCount, MetricFamily, MetricKind, SharedMetrics, bool_to_f64, help,
    ns_to_seconds,
};
use super::{metrics_page, names};

/// The metrics of the process. A clone counts into the same numbers.
#[derive(Clone, Debug)]
pub struct Metrics {
    shared: Arc<SharedMetrics>,
    export: Option<OtlpInstruments>,
}

/// The instruments that export to OTLP.
#[derive(Clone, Debug)]
struct OtlpInstruments {
    meter: Meter,
    check_duration: Histogram<f64>,
    kill_propagation: Histogram<f64>,
    /// One attribute for each of [`EFFECTS`], created once.
    effects: Arc<[[KeyValue; 1]; 3]>,
}

impl Metrics {
    /// Creates metrics for the Prometheus page, and for OTLP if there is a meter.
    pub(super) fn new(meter: Option<Meter>) -> Self {
        let shared = Arc::new(SharedMetrics::default());
        let export = meter.map(|meter| OtlpInstruments::new(meter, &shared));
        Self { shared, export }
    }

    /// Creates metrics for the Prometheus page alone, for tests and for tools that export nothing.
    pub fn unexported() -> Self {
        Self::new(None)
    }

    /// Counts a decision, and how long it took since the call arrived.
    pub fn record_decision(&self, effect: Effect, reason: Reason, latency_ns: u64) {
        let shard = self.shared.thread_shard();
        // The tables have the order of the enums. An index outside of a table is not counted.
        let (effect_index, reason_index) = (effect as usize, reason as usize);
        if let Some(count) = shard.decisions.get(effect_index * Reason::ALL.len() + reason_index) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(durations) = shard.durations.get(effect_index) {
            durations.record(latency_ns);
        }
        if let Some(export) = &self.export
            && let Some(attributes) = export.effects.get(effect_index)
        {
            export.check_duration.record(ns_to_seconds(latency_ns), attributes);
        }
    }

    /// Counts a lookup of a verified chain.
    pub fn record_chain_lookup(&self, hit: bool) {
        let shard = self.shared.thread_shard();
        let count = if hit { &shard.chain_cache_hits } else { &shard.chain_cache_misses };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a chain whose signatures were verified.
    pub fn record_cold_verification(&self) {
        self.shared.thread_shard().cold_verifications.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a revocation that took effect here, and the time since its commit.
    pub fn record_kill_propagation(&self, latency_ns: u64) {
        self.shared.thread_shard().kill_propagation.record(latency_ns);
        if let Some(export) = &self.export {
            export.kill_propagation.record(ns_to_seconds(latency_ns), &[]);
        }
    }

    /// Registers a value that another module keeps. `name` is one of `names`, and the value has the unit of [`names::unit`].
    ///
    /// The closure is called each time the metrics are read. It must neither block nor call back into the metrics.
    pub fn register_gauge(&self, name: &'static str, help: &'static str, read: impl Fn() -> f64 + Send + Sync + 'static) {
        let read: GaugeReader = Arc::new(read);
        if let Some(OtlpInstruments { meter, .. }) = &self.export {
            let read = Arc::clone(&read);
            let builder = meter.f64_observable_gauge(name).with_description(help).with_unit(otlp_unit(name));
            builder.with_callback(move |observer| observer.observe(read(), &[])).build();
        }
        self.shared.register_family(MetricFamily { name, help, kind: MetricKind::Gauge(read) });
    }

    /// Registers a count that another module keeps and that never decreases.
    pub fn register_counter(&self, name: &'static str, help: &'static str, read: impl Fn() -> u64 + Send + Sync + 'static) {
        let read: Arc<dyn Fn() -> u64 + Send + Sync> = Arc::new(read);
        if let Some(OtlpInstruments { meter, .. }) = &self.export {
            let read = Arc::clone(&read);
            let builder = meter.u64_observable_counter(name).with_description(help);
            builder.with_callback(move |observer| observer.observe(read(), &[])).build();
        }
        self.shared.register_family(MetricFamily { name, help, kind: MetricKind::Counter(read) });
    }

    /// Registers counts that another module keeps, one for each combination of labels. They never decrease.
    ///
    /// The other module bounds their number, so a label must not hold names that callers choose freely.
    pub fn register_labelled_counter(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
        read: impl Fn() -> Vec<LabelledCount> + Send + Sync + 'static,
    ) {
        let read: Arc<dyn Fn() -> Vec<LabelledCount> + Send + Sync> = Arc::new(read);
        if let Some(OtlpInstruments { meter, .. }) = &self.export {
            let read = Arc::clone(&read);
            let builder = meter.u64_observable_counter(name).with_description(help);
            let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
                for (values, count) in read() {
                    let pairs = labels.iter().zip(values).map(|(label, value)| KeyValue::new(*label, value));
                    observer.observe(count, &pairs.collect::<Vec<_>>());
                }
            };
            builder.with_callback(observe).build();
        }
        self.shared.register_family(MetricFamily { name, help, kind: MetricKind::Labelled(labels, read) });
    }

    /// Registers a state: 1 for the one of `states` at the index that `current` returns, 0 for the others.
    pub fn register_state(
        &self,
        name: &'static str,
        help: &'static str,
        states: &'static [&'static str],
        current: impl Fn() -> usize + Send + Sync + 'static,
    ) {
        let current: Arc<dyn Fn() -> usize + Send + Sync> = Arc::new(current);
        if let Some(OtlpInstruments { meter, .. }) = &self.export {
            let current = Arc::clone(&current);
            let builder = meter.f64_observable_gauge(name).with_description(help);
            let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<f64>| {
                let current = current();
                for (index, state) in states.iter().enumerate() {
                    observer.observe(bool_to_f64(index == current), &[KeyValue::new(names::STATE, *state)]);
                }
            };
            builder.with_callback(observe).build();
        }
        self.shared.register_family(MetricFamily { name, help, kind: MetricKind::State(states, current) });
    }

    /// Renders the Prometheus page, in the format of [`super::CONTENT_TYPE`].
    pub fn render_page(&self) -> String {
        metrics_page::render_page(&self.shared)
    }
}

impl OtlpInstruments {
    fn new(meter: Meter, shared: &Arc<SharedMetrics>) -> Self {
        let bounds: Vec<f64> = DURATION_BOUNDS_NS.iter().map(|bound| ns_to_seconds(*bound)).collect();
        let histogram = |name: &'static str, help: &'static str| {
            let builder = meter.f64_histogram(name).with_description(help).with_unit(otlp_unit(name));
            builder.with_boundaries(bounds.clone()).build()
        };
        let check_duration = histogram(names::CHECK_DURATION, help::CHECK_DURATION);
        let kill_propagation = histogram(names::KILL_PROPAGATION, help::KILL_PROPAGATION);
        let effects = EFFECTS.map(|effect| [KeyValue::new(names::EFFECT, effect.as_str())]);

        let from = Arc::clone(shared);
        let decisions = meter.u64_observable_counter(names::CHECK_DECISIONS).with_description(help::CHECK_DECISIONS);
        let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
            for (effect, reason, count) in from.decisions() {
                let effect = KeyValue::new(names::EFFECT, effect.as_str());
                observer.observe(count, &[effect, KeyValue::new(names::REASON, reason.as_str())]);
            }
        };
        decisions.with_callback(observe).build();

        let from = Arc::clone(shared);
        let lookups = meter.u64_observable_counter(names::CHAIN_CACHE).with_description(help::CHAIN_CACHE);
        let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
            for (result, count) in from.chain_cache() {
                observer.observe(count, &[KeyValue::new(names::RESULT, result)]);
            }
        };
        lookups.with_callback(observe).build();

        let from = Arc::clone(shared);
        let verifications = meter.u64_observable_counter(names::COLD_VERIFICATIONS);
        let verifications = verifications.with_description(help::COLD_VERIFICATIONS);
        verifications.with_callback(move |observer| observer.observe(from.cold_verifications(), &[])).build();
        Self { meter, check_duration, kill_propagation, effects: Arc::new(effects) }
    }
}

/// The unit of a metric in the notation of OTLP (UCUM).
fn otlp_unit(name: &str) -> &'static str {
    match names::unit(name) {
        Some("seconds") => "s",
        Some("bytes") => "By",
        _ => "",
    }
}
