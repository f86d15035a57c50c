//! Renders the metrics as a text page for Prometheus, in the OpenMetrics format.
//!
//! A page is rendered on request from the current numbers, and nothing is kept between two pages. Names are those of `names.rs`
//! with underscores, plus the unit and the suffix that the format requires. Look next at `metric_values.rs`.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::metric_values::{
    DURATION_BOUNDS_NS, DurationTotals, EFFECTS, MetricKind, SharedMetrics, bool_to_f64, help, ns_to_seconds,
};
use super::names;

/// The page's media type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Renders the page.
pub(super) fn render_page(shared: &Arc<SharedMetrics>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(MetricsPage(Arc::clone(shared))));
    let mut page = String::with_capacity(8 * 1024);
    // Writing to a string cannot fail.
    let _ = text::encode(&mut page, &registry);
    page
}

/// Encodes the numbers as a Prometheus collector.
#[derive(Debug)]
struct MetricsPage(Arc<SharedMetrics>);

impl Collector for MetricsPage {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(shared) = self;
        let encoder = &mut encoder;
        encode_metric(encoder, names::CHECK_DURATION, help::CHECK_DURATION, MetricType::Histogram, |metric| {
            EFFECTS.iter().try_for_each(|effect| {
                let labels = [(prometheus_name(names::EFFECT), effect.as_str())];
                encode_histogram_value(&mut metric.encode_family(&labels)?, &shared.durations(*effect))
            })
        })?;
        encode_metric(encoder, names::CHECK_DECISIONS, help::CHECK_DECISIONS, MetricType::Counter, |metric| {
            shared.decisions().try_for_each(|(effect, reason, count)| {
                let labels =
                    [(prometheus_name(names::EFFECT), effect.as_str()), (prometheus_name(names::REASON), reason.as_str())];
                encode_counter_value(metric, &labels, count)
            })
        })?;
        encode_metric(encoder, names::CHAIN_CACHE, help::CHAIN_CACHE, MetricType::Counter, |metric| {
            let label = prometheus_name(names::RESULT);
            shared
                .chain_cache()
                .iter()
                .try_for_each(|(result, count)| encode_counter_value(metric, &[(label.clone(), *result)], *count))
        })?;
        encode_metric(encoder, names::COLD_VERIFICATIONS, help::COLD_VERIFICATIONS, MetricType::Counter, |metric| {
            metric.encode_counter::<NoLabelSet, _, u64>(&shared.cold_verifications(), None)
        })?;
        encode_metric(encoder, names::KILL_PROPAGATION, help::KILL_PROPAGATION, MetricType::Histogram, |metric| {
            encode_histogram_value(metric, &shared.kill_propagation())
        })?;
        for family in shared.families().iter() {
            match &family.kind {
                MetricKind::Gauge(read) => {
                    encode_metric(encoder, family.name, family.help, MetricType::Gauge, |metric| metric.encode_gauge(&read()))
                }
                MetricKind::Counter(read) => encode_metric(encoder, family.name, family.help, MetricType::Counter, |metric| {
                    metric.encode_counter::<NoLabelSet, _, u64>(&read(), None)
                }),
                MetricKind::Labelled(labels, read) => {
                    encode_metric(encoder, family.name, family.help, MetricType::Counter, |metric| {
                        read().into_iter().try_for_each(|(values, count)| {
                            let pairs = labels.iter().zip(&values).map(|(label, value)| (prometheus_name(label), &**value));
                            encode_counter_value(metric, &pairs.collect::<Vec<_>>().as_slice(), count)
                        })
                    })
                }
                MetricKind::State(states, current) => {
                    encode_metric(encoder, family.name, family.help, MetricType::Gauge, |metric| {
                        let (label, current) = (prometheus_name(names::STATE), current());
                        states.iter().enumerate().try_for_each(|(index, state)| {
                            metric.encode_family(&[(label.clone(), *state)])?.encode_gauge(&bool_to_f64(index == current))
                        })
                    })
                }
            }?;
        }
        Ok(())
    }
}

fn encode_metric(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    kind: MetricType,
    write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    let unit = names::unit(name).map(|unit| Unit::Other(unit.to_owned()));
    let name = prometheus_name(name);
    write(&mut encoder.encode_descriptor(&name, help, unit.as_ref(), kind)?)
}

fn encode_counter_value(metric: &mut MetricEncoder<'_>, labels: &impl EncodeLabelSet, count: u64) -> fmt::Result {
    metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)
}

fn encode_histogram_value(metric: &mut MetricEncoder<'_>, durations: &DurationTotals) -> fmt::Result {
    let bounds = DURATION_BOUNDS_NS.iter().map(|bound| ns_to_seconds(*bound)).chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(durations.buckets).collect();
    let count = durations.buckets.iter().sum();
    metric.encode_histogram::<NoLabelSet>(ns_to_seconds(durations.sum_ns), count, &buckets, None)
}

fn prometheus_name(name: &str) -> String {
    name.replace('.', "_")
}
