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

use super::metric_values::{DURATION_BOUNDS_NS, Distribution, EFFECTS, Kind, Shared, help, one_if, seconds};
use super::names;

/// The page's media type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Renders the page.
pub(super) fn render(shared: &Arc<Shared>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Page(Arc::clone(shared))));
    let mut page = String::with_capacity(8 * 1024);
    // Writing to a string cannot fail.
    let _ = text::encode(&mut page, &registry);
    page
}

/// Encodes the numbers as a Prometheus collector.
#[derive(Debug)]
struct Page(Arc<Shared>);

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(shared) = self;
        let encoder = &mut encoder;
        describe(encoder, names::CHECK_DURATION, help::CHECK_DURATION, MetricType::Histogram, |metric| {
            EFFECTS.iter().try_for_each(|effect| {
                let labels = [(underscored(names::EFFECT), effect.as_str())];
                histogram(&mut metric.encode_family(&labels)?, &shared.durations(*effect))
            })
        })?;
        describe(encoder, names::CHECK_DECISIONS, help::CHECK_DECISIONS, MetricType::Counter, |metric| {
            shared.decisions().try_for_each(|(effect, reason, count)| {
                let labels = [(underscored(names::EFFECT), effect.as_str()), (underscored(names::REASON), reason.as_str())];
                counter(metric, &labels, count)
            })
        })?;
        describe(encoder, names::CHAIN_CACHE, help::CHAIN_CACHE, MetricType::Counter, |metric| {
            let label = underscored(names::RESULT);
            shared.chain_cache().iter().try_for_each(|(result, count)| counter(metric, &[(label.clone(), *result)], *count))
        })?;
        describe(encoder, names::COLD_VERIFICATIONS, help::COLD_VERIFICATIONS, MetricType::Counter, |metric| {
            metric.encode_counter::<NoLabelSet, _, u64>(&shared.cold_verifications(), None)
        })?;
        describe(encoder, names::KILL_PROPAGATION, help::KILL_PROPAGATION, MetricType::Histogram, |metric| {
            histogram(metric, &shared.kill_propagation())
        })?;
        for family in shared.families().iter() {
            match &family.kind {
                Kind::Gauge(read) => {
                    describe(encoder, family.name, family.help, MetricType::Gauge, |metric| metric.encode_gauge(&read()))
                }
                Kind::Counter(read) => describe(encoder, family.name, family.help, MetricType::Counter, |metric| {
                    metric.encode_counter::<NoLabelSet, _, u64>(&read(), None)
                }),
                Kind::Labelled(labels, read) => describe(encoder, family.name, family.help, MetricType::Counter, |metric| {
                    read().into_iter().try_for_each(|(values, count)| {
                        let pairs = labels.iter().zip(&values).map(|(label, value)| (underscored(label), &**value));
                        counter(metric, &pairs.collect::<Vec<_>>().as_slice(), count)
                    })
                }),
                Kind::State(states, current) => describe(encoder, family.name, family.help, MetricType::Gauge, |metric| {
                    let (label, current) = (underscored(names::STATE), current());
                    states.iter().enumerate().try_for_each(|(index, state)| {
                        metric.encode_family(&[(label.clone(), *state)])?.encode_gauge(&one_if(index == current))
                    })
                }),
            }?;
        }
        Ok(())
    }
}

fn describe(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    kind: MetricType,
    write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    let unit = names::unit(name).map(|unit| Unit::Other(unit.to_owned()));
    let name = underscored(name);
    write(&mut encoder.encode_descriptor(&name, help, unit.as_ref(), kind)?)
}

fn counter(metric: &mut MetricEncoder<'_>, labels: &impl EncodeLabelSet, count: u64) -> fmt::Result {
    metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)
}

fn histogram(metric: &mut MetricEncoder<'_>, durations: &Distribution) -> fmt::Result {
    let bounds = DURATION_BOUNDS_NS.iter().map(|bound| seconds(*bound)).chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(durations.buckets).collect();
    let count = durations.buckets.iter().sum();
    metric.encode_histogram::<NoLabelSet>(seconds(durations.sum_ns), count, &buckets, None)
}

fn underscored(name: &str) -> String {
    name.replace('.', "_")
}
