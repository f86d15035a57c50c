//! The numbers behind the metrics: counters and histograms in shards, and the metrics that other modules keep.
//!
//! Every number exists before the first call, by effect and reason, so that counting is one addition. Each thread adds to a
//! shard, so that two runtimes do not contend for a cache line. Look next at `metrics.rs`, which counts, and at `metrics_page.rs`, which
//! renders the numbers.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::decision::Effect;
use crate::model::reason::Reason;

/// Upper bounds of the buckets of [`super::names::CHECK_DURATION`], in nanoseconds. One more bucket holds the rest.
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
pub(super) type GaugeReader = Arc<dyn Fn() -> f64 + Send + Sync>;

/// A metric that another module keeps.
pub(super) struct MetricFamily {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: MetricKind,
}

/// The kind of a metric, with the closure that reads it.
pub(super) enum MetricKind {
    Gauge(GaugeReader),
    Counter(Arc<dyn Fn() -> u64 + Send + Sync>),
    State(&'static [&'static str], Arc<dyn Fn() -> usize + Send + Sync>),
    Labelled(&'static [&'static str], Arc<dyn Fn() -> Vec<LabelledCount> + Send + Sync>),
}

/// The numbers, which all clones share.
pub(super) struct SharedMetrics {
    shards: [MetricShard; SHARDS],
    families: Mutex<Vec<MetricFamily>>,
}

/// The numbers to which some threads add. The alignment keeps two shards out of one cache line.
#[repr(align(128))]
pub(super) struct MetricShard {
    /// Indexed by effect, then reason.
    pub(super) decisions: Box<[AtomicU64]>,
    /// Indexed by effect.
    pub(super) durations: [DurationHistogram; 3],
    pub(super) kill_propagation: DurationHistogram,
    pub(super) chain_cache_hits: AtomicU64,
    pub(super) chain_cache_misses: AtomicU64,
    pub(super) cold_verifications: AtomicU64,
}

/// A histogram of durations.
#[derive(Default)]
pub(super) struct DurationHistogram {
    /// One bucket per bound, and one for the rest.
    buckets: [AtomicU64; DURATION_BOUNDS_NS.len() + 1],
    sum_ns: AtomicU64,
}

/// The durations of all shards together.
#[derive(Default)]
pub(super) struct DurationTotals {
    pub(super) buckets: [u64; DURATION_BOUNDS_NS.len() + 1],
    pub(super) sum_ns: u64,
}

impl Default for SharedMetrics {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| MetricShard::new()), families: Mutex::default() }
    }
}

impl std::fmt::Debug for SharedMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("families", &self.families().len()).finish_non_exhaustive()
    }
}

impl SharedMetrics {
    /// The decisions that occurred, by effect and reason.
    pub(super) fn decisions(&self) -> impl Iterator<Item = (Effect, Reason, u64)> + '_ {
        let places = EFFECTS.iter().flat_map(|effect| Reason::ALL.iter().map(move |reason| (*effect, *reason)));
        places.enumerate().filter_map(|(index, (effect, reason))| {
            let count = self.sum(|shard| shard.decisions.get(index).map_or(0, load_relaxed));
            (count > 0).then_some((effect, reason, count))
        })
    }

    /// The durations of all decisions with this effect.
    pub(super) fn durations(&self, effect: Effect) -> DurationTotals {
        self.distribution(|shard| shard.durations.get(effect as usize))
    }

    pub(super) fn kill_propagation(&self) -> DurationTotals {
        self.distribution(|shard| Some(&shard.kill_propagation))
    }

    pub(super) fn chain_cache(&self) -> [(&'static str, u64); 2] {
        [
            ("hit", self.sum(|shard| load_relaxed(&shard.chain_cache_hits))),
            ("miss", self.sum(|shard| load_relaxed(&shard.chain_cache_misses))),
        ]
    }

    pub(super) fn cold_verifications(&self) -> u64 {
        self.sum(|shard| load_relaxed(&shard.cold_verifications))
    }

    pub(super) fn families(&self) -> MutexGuard<'_, Vec<MetricFamily>> {
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a metric. A name that is registered again replaces its predecessor, so that a page never holds a name twice.
    pub(super) fn register_family(&self, family: MetricFamily) {
        let mut families = self.families();
        families.retain(|other| other.name != family.name);
        families.push(family);
    }

    pub(super) fn thread_shard(&self) -> &MetricShard {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static INDEX: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        let [first, ..] = &self.shards;
        self.shards.get(INDEX.get()).unwrap_or(first)
    }

    fn sum(&self, count: impl Fn(&MetricShard) -> u64) -> u64 {
        self.shards.iter().map(count).fold(0, u64::wrapping_add)
    }

    fn distribution(&self, of: impl Fn(&MetricShard) -> Option<&DurationHistogram>) -> DurationTotals {
        let mut total = DurationTotals::default();
        for durations in self.shards.iter().filter_map(of) {
            for (sum, bucket) in total.buckets.iter_mut().zip(&durations.buckets) {
                *sum = sum.wrapping_add(load_relaxed(bucket));
            }
            total.sum_ns = total.sum_ns.wrapping_add(load_relaxed(&durations.sum_ns));
        }
        total
    }
}

impl MetricShard {
    fn new() -> Self {
        Self {
            decisions: (0..EFFECTS.len() * Reason::ALL.len()).map(|_| AtomicU64::new(0)).collect(),
            durations: Default::default(),
            kill_propagation: DurationHistogram::default(),
            chain_cache_hits: AtomicU64::new(0),
            chain_cache_misses: AtomicU64::new(0),
            cold_verifications: AtomicU64::new(0),
        }
    }
}

impl DurationHistogram {
    pub(super) fn record(&self, ns: u64) {
        // Nearly every decision falls into the first bucket, so a linear search from the front is the fastest.
        let bucket = DURATION_BOUNDS_NS.iter().position(|bound| ns <= *bound).unwrap_or(DURATION_BOUNDS_NS.len());
        if let Some(count) = self.buckets.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

pub(super) fn ns_to_seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

pub(super) fn bool_to_f64(holds: bool) -> f64 {
    if holds { 1.0 } else { 0.0 }
}

fn load_relaxed(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}
