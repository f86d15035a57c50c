//! Counts and durations, kept in plain atomics and read on demand.
//!
//! Every number exists before the first call, by effect and reason, so that counting is one addition. Each thread adds to a
//! shard, so that two runtimes do not contend for a cache line. No identity is a label, except in a `labelled_counter`. Other
//! modules keep their own counts, which `app` registers here as closures. Look next at `page.rs`, which renders the numbers.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Histogram, Meter};

use crate::model::decision::Effect;
use crate::model::reason::Reason;

use super::{names, page};

/// Upper bounds of the buckets of [`names::CHECK_DURATION`], in nanoseconds. One more bucket holds the rest.
pub(super) const DURATION_BOUNDS_NS: [u64; 16] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
];

/// Every effect, in the order in which the tables hold them.
pub(super) const EFFECTS: [Effect; 3] = [Effect::Deny, Effect::NeedsApproval, Effect::Permit];

const SHARDS: usize = 8;

/// The metrics of the process. A clone counts into the same numbers.
#[derive(Clone, Debug)]
pub struct Metrics {
    shared: Arc<Shared>,
    export: Option<Export>,
}

/// The instruments that export to OTLP.
#[derive(Clone, Debug)]
struct Export {
    meter: Meter,
    check_duration: Histogram<f64>,
    kill_propagation: Histogram<f64>,
    /// One attribute for each of [`EFFECTS`], created once.
    effects: Arc<[[KeyValue; 1]; 3]>,
}

impl Metrics {
    /// Creates metrics for the Prometheus page, and for OTLP if there is a meter.
    pub(super) fn new(meter: Option<Meter>) -> Self {
        let shared = Arc::new(Shared::default());
        let export = meter.map(|meter| Export::new(meter, &shared));
        Self { shared, export }
    }

    /// Creates metrics for the Prometheus page alone, for tests and for tools that export nothing.
    pub fn unexported() -> Self {
        Self::new(None)
    }

    /// Counts a decision, and how long it took since the call arrived.
    pub fn decision(&self, effect: Effect, reason: Reason, latency_ns: u64) {
        let shard = self.shared.shard();
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
            export.check_duration.record(seconds(latency_ns), attributes);
        }
    }

    /// Counts a lookup of a verified chain.
    pub fn chain_cache(&self, hit: bool) {
        let shard = self.shared.shard();
        let count = if hit { &shard.chain_cache_hits } else { &shard.chain_cache_misses };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a chain whose signatures were verified.
    pub fn cold_verification(&self) {
        self.shared.shard().cold_verifications.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a revocation that took effect here, and the time since its commit.
    pub fn kill_propagation(&self, latency_ns: u64) {
        self.shared.shard().kill_propagation.record(latency_ns);
        if let Some(export) = &self.export {
            export.kill_propagation.record(seconds(latency_ns), &[]);
        }
    }

    /// Registers a value that another module keeps. `name` is one of `names`, and the value has the unit of [`names::unit`].
    ///
    /// The closure is called each time the metrics are read. It must neither block nor call back into the metrics.
    pub fn gauge(&self, name: &'static str, help: &'static str, read: impl Fn() -> f64 + Send + Sync + 'static) {
        let read: Read = Arc::new(read);
        if let Some(Export { meter, .. }) = &self.export {
            let read = Arc::clone(&read);
            let builder = meter.f64_observable_gauge(name).with_description(help).with_unit(otlp_unit(name));
            builder.with_callback(move |observer| observer.observe(read(), &[])).build();
        }
        self.shared.register(Family { name, help, kind: Kind::Gauge(read) });
    }

    /// Registers a count that another module keeps and that never decreases.
    pub fn counter(&self, name: &'static str, help: &'static str, read: impl Fn() -> u64 + Send + Sync + 'static) {
        let read: Arc<dyn Fn() -> u64 + Send + Sync> = Arc::new(read);
        if let Some(Export { meter, .. }) = &self.export {
            let read = Arc::clone(&read);
            let builder = meter.u64_observable_counter(name).with_description(help);
            builder.with_callback(move |observer| observer.observe(read(), &[])).build();
        }
        self.shared.register(Family { name, help, kind: Kind::Counter(read) });
    }

    /// Registers counts that another module keeps, one for each combination of labels. They never decrease.
    ///
    /// The other module bounds their number, so a label must not hold names that callers choose freely.
    pub fn labelled_counter(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
        read: impl Fn() -> Vec<LabelledCount> + Send + Sync + 'static,
    ) {
        let read: Arc<dyn Fn() -> Vec<LabelledCount> + Send + Sync> = Arc::new(read);
        if let Some(Export { meter, .. }) = &self.export {
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
        self.shared.register(Family { name, help, kind: Kind::Labelled(labels, read) });
    }

    /// Registers a state: 1 for the one of `states` at the index that `current` returns, 0 for the others.
    pub fn state(
        &self,
        name: &'static str,
        help: &'static str,
        states: &'static [&'static str],
        current: impl Fn() -> usize + Send + Sync + 'static,
    ) {
        let current: Arc<dyn Fn() -> usize + Send + Sync> = Arc::new(current);
        if let Some(Export { meter, .. }) = &self.export {
            let current = Arc::clone(&current);
            let builder = meter.f64_observable_gauge(name).with_description(help);
            let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<f64>| {
                let current = current();
                for (index, state) in states.iter().enumerate() {
                    observer.observe(one_if(index == current), &[KeyValue::new(names::STATE, *state)]);
                }
            };
            builder.with_callback(observe).build();
        }
        self.shared.register(Family { name, help, kind: Kind::State(states, current) });
    }

    /// Renders the Prometheus page, in the format of [`super::CONTENT_TYPE`].
    pub fn render(&self) -> String {
        page::render(&self.shared)
    }
}

impl Export {
    fn new(meter: Meter, shared: &Arc<Shared>) -> Self {
        let bounds: Vec<f64> = DURATION_BOUNDS_NS.iter().map(|bound| seconds(*bound)).collect();
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

/// The help text of each metric that is counted here.
pub(super) mod help {
    pub(in super::super) const CHECK_DURATION: &str = "How long a decision took in the service.";
    pub(in super::super) const CHECK_DECISIONS: &str = "Decisions.";
    pub(in super::super) const CHAIN_CACHE: &str = "Lookups of a verified chain.";
    pub(in super::super) const COLD_VERIFICATIONS: &str = "Chains whose signatures were verified.";
    pub(in super::super) const KILL_PROPAGATION: &str = "From the commit of a revocation to its effect here.";
}

/// The values of a counter's labels, in the order of the labels, and the count.
pub type LabelledCount = (Vec<Arc<str>>, u64);

/// Reads the present value of a gauge.
pub(super) type Read = Arc<dyn Fn() -> f64 + Send + Sync>;

/// A metric that another module keeps.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: Kind,
}

/// The kind of a metric, with the closure that reads it.
pub(super) enum Kind {
    Gauge(Read),
    Counter(Arc<dyn Fn() -> u64 + Send + Sync>),
    State(&'static [&'static str], Arc<dyn Fn() -> usize + Send + Sync>),
    Labelled(&'static [&'static str], Arc<dyn Fn() -> Vec<LabelledCount> + Send + Sync>),
}

/// The numbers, which all clones share.
pub(super) struct Shared {
    shards: [Shard; SHARDS],
    families: Mutex<Vec<Family>>,
}

/// The numbers to which some threads add. The alignment keeps two shards out of one cache line.
#[repr(align(128))]
struct Shard {
    /// Indexed by effect, then reason.
    decisions: Box<[AtomicU64]>,
    /// Indexed by effect.
    durations: [Durations; 3],
    kill_propagation: Durations,
    chain_cache_hits: AtomicU64,
    chain_cache_misses: AtomicU64,
    cold_verifications: AtomicU64,
}

/// A histogram of durations.
#[derive(Default)]
struct Durations {
    /// One bucket per bound, and one for the rest.
    buckets: [AtomicU64; DURATION_BOUNDS_NS.len() + 1],
    sum_ns: AtomicU64,
}

/// The durations of all shards together.
#[derive(Default)]
pub(super) struct Distribution {
    pub(super) buckets: [u64; DURATION_BOUNDS_NS.len() + 1],
    pub(super) sum_ns: u64,
}

impl Default for Shared {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Shard::new()), families: Mutex::default() }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("families", &self.families().len()).finish_non_exhaustive()
    }
}

impl Shared {
    /// The decisions that occurred, by effect and reason.
    pub(super) fn decisions(&self) -> impl Iterator<Item = (Effect, Reason, u64)> + '_ {
        let places = EFFECTS.iter().flat_map(|effect| Reason::ALL.iter().map(move |reason| (*effect, *reason)));
        places.enumerate().filter_map(|(index, (effect, reason))| {
            let count = self.sum(|shard| shard.decisions.get(index).map_or(0, load));
            (count > 0).then_some((effect, reason, count))
        })
    }

    /// The durations of the decisions with an effect.
    pub(super) fn durations(&self, effect: Effect) -> Distribution {
        self.distribution(|shard| shard.durations.get(effect as usize))
    }

    pub(super) fn kill_propagation(&self) -> Distribution {
        self.distribution(|shard| Some(&shard.kill_propagation))
    }

    pub(super) fn chain_cache(&self) -> [(&'static str, u64); 2] {
        [("hit", self.sum(|shard| load(&shard.chain_cache_hits))), ("miss", self.sum(|shard| load(&shard.chain_cache_misses)))]
    }

    pub(super) fn cold_verifications(&self) -> u64 {
        self.sum(|shard| load(&shard.cold_verifications))
    }

    pub(super) fn families(&self) -> MutexGuard<'_, Vec<Family>> {
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a metric. A name that is registered again replaces its predecessor, so that a page never holds a name twice.
    fn register(&self, family: Family) {
        let mut families = self.families();
        families.retain(|other| other.name != family.name);
        families.push(family);
    }

    fn shard(&self) -> &Shard {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static INDEX: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        let [first, ..] = &self.shards;
        self.shards.get(INDEX.get()).unwrap_or(first)
    }

    fn sum(&self, count: impl Fn(&Shard) -> u64) -> u64 {
        self.shards.iter().map(count).fold(0, u64::wrapping_add)
    }

    fn distribution(&self, of: impl Fn(&Shard) -> Option<&Durations>) -> Distribution {
        let mut total = Distribution::default();
        for durations in self.shards.iter().filter_map(of) {
            for (sum, bucket) in total.buckets.iter_mut().zip(&durations.buckets) {
                *sum = sum.wrapping_add(load(bucket));
            }
            total.sum_ns = total.sum_ns.wrapping_add(load(&durations.sum_ns));
        }
        total
    }
}

impl Shard {
    fn new() -> Self {
        Self {
            decisions: (0..EFFECTS.len() * Reason::ALL.len()).map(|_| AtomicU64::new(0)).collect(),
            durations: Default::default(),
            kill_propagation: Durations::default(),
            chain_cache_hits: AtomicU64::new(0),
            chain_cache_misses: AtomicU64::new(0),
            cold_verifications: AtomicU64::new(0),
        }
    }
}

impl Durations {
    fn record(&self, ns: u64) {
        // Nearly every decision falls into the first bucket, so a linear search from the front is the fastest.
        let bucket = DURATION_BOUNDS_NS.iter().position(|bound| ns <= *bound).unwrap_or(DURATION_BOUNDS_NS.len());
        if let Some(count) = self.buckets.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

pub(super) fn one_if(holds: bool) -> f64 {
    if holds { 1.0 } else { 0.0 }
}

fn load(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

/// The unit of a metric in the notation of OTLP (UCUM).
fn otlp_unit(name: &str) -> &'static str {
    match names::unit(name) {
        Some("seconds") => "s",
        Some("bytes") => "By",
        _ => "",
    }
}
