//! Registers the metrics that are computed when metrics are read: of the replica, of the disks and of the listeners.
//!
//! Look next at `telemetry/names.rs`, which names the metrics.

use std::sync::Arc;

use super::follower_runtime::FollowerRuntime;
use crate::audit::{self, DiskMonitor};
use crate::model::disk::DiskSpaceLevel;
use crate::model::replica::ReplicaCondition;
use crate::model::time::Clock;
use crate::server::{ListenerStats, ListenerStatsReader};
use crate::service::{PdpService, ShadowMetric};
use crate::sync::{self, CacheWriter};
use crate::telemetry::{Telemetry, names};

/// Registers the gauges that are computed when metrics are read.
pub(super) fn register_gauges(
    telemetry: &Telemetry,
    following: &FollowerRuntime,
    clock: &Arc<dyn Clock>,
    service: &Arc<PdpService>,
) {
    let FollowerRuntime { cell, status, .. } = following;
    let metrics = telemetry.metrics();
    let spans = telemetry.spans();
    metrics.register_counter(names::SPANS_SUPPRESSED, "Spans left out by the caps.", move || spans.suppressed());
    let of_view = |read: fn(&crate::snapshot::SnapshotView, crate::model::time::ClockReading) -> f64| {
        let (cell, clock) = (cell.clone(), clock.clone());
        move || cell.load().map_or(0.0, |view| read(&view, clock.now()))
    };
    let age_s = of_view(|view, now| view.age_ms(now).map_or(f64::INFINITY, |age_ms| age_ms as f64 / 1000.0));
    metrics.register_gauge(names::SNAPSHOT_AGE, "Seconds since the proof that the snapshot is current.", age_s);
    let revision = of_view(|view, _| view.snapshot.revision().number as f64);
    metrics.register_gauge(names::REVISION, "Number of the revision that decides.", revision);
    let revocations = of_view(|view, _| view.snapshot.revocations().len() as f64);
    metrics.register_gauge(names::REVOCATIONS, "Revocations in memory.", revocations);
    let false_positives = of_view(|view, _| view.snapshot.revocations().false_positive_rate());
    metrics.register_gauge(
        names::FALSE_POSITIVE_RATE,
        "Estimated part of lookups that the filter lets through for nothing.",
        false_positives,
    );
    let (of, read, dates) = (status.clone(), cell.clone(), clock.clone());
    let condition = move || sync::replica_condition(&of, &read, dates.now()) as usize;
    metrics.register_state(names::REPLICA_STATE, "The state that this replica is in.", ReplicaCondition::NAMES, condition);
    let (of, dates) = (status.clone(), clock.clone());
    let lag_s = move || of.behind_since_unix_ms().map_or(0.0, |since| (dates.now().unix_ms() - since).max(0) as f64 / 1000.0);
    metrics.register_gauge(names::SYNC_LAG, "Age of the oldest commit that is known and not in effect, in seconds.", lag_s);
    let chains = service.clone();
    metrics.register_gauge(names::CHAINS_KEPT, "Verified chains kept.", move || chains.cached_chain_count() as f64);
    let chains = service.clone();
    metrics.register_gauge(names::CHAINS_BYTES, "Bytes that the kept chains take.", move || chains.cached_chain_bytes() as f64);
    let ledger = service.clone();
    let uses = move || ledger.ledger_uses() as f64;
    metrics.register_gauge(names::LEDGER_USES, "Calls that wait for the store to use a proof or an approval up.", uses);
    let labels = &[names::AGENT_ID, names::TOOL_NAME, names::EFFECT, names::WOULD_BE];
    for (name, help, of) in [
        (names::SHADOW_DECISIONS, "Decisions also evaluated with documents in shadow.", ShadowMetric::Decisions),
        (names::SHADOW_FLIPS, "Decisions that documents in shadow would have made otherwise.", ShadowMetric::Flips),
    ] {
        let shadows = service.clone();
        let read = move || shadows.shadow_series(of).into_iter().map(|(labels, count)| (labels.to_vec(), count)).collect();
        metrics.register_labelled_counter(name, help, labels, read);
    }
}

/// Registers the gauges of the disks that this process writes to.
pub(super) fn register_disk_gauges(
    telemetry: &Telemetry,
    cache_writer: &Arc<CacheWriter>,
    log: &Arc<audit::AuditLog>,
    store: Option<Arc<DiskMonitor>>,
) {
    let metrics = telemetry.metrics();
    let of_log = |read: fn(&audit::AuditStatus) -> u64| {
        let log = log.clone();
        move || read(&log.status())
    };
    metrics.register_counter(names::AUDIT_RECORDS, "Audit records taken.", of_log(|status| status.records));
    let help = "Times that an audit recorder could no longer write, or lost its file.";
    metrics.register_counter(names::AUDIT_FAILURES, help, of_log(|status| status.failures));
    let unwritable = of_log(|status| u64::from(!status.healthy));
    metrics.register_gauge(names::AUDIT_UNWRITABLE, "1 while an audit recorder cannot write.", move || unwritable() as f64);
    metrics.register_counter(
        names::AUDIT_MERGED,
        "Denials of callers who proved nothing, and refused acts, that are counted in merged records.",
        of_log(|status| status.merged),
    );
    let waiting = of_log(|status| status.merged_waiting);
    metrics.register_gauge(names::AUDIT_MERGED_WAITING, "Those of them that are not written yet.", move || waiting() as f64);
    let pending = of_log(|status| status.pending_bytes as u64);
    metrics
        .register_gauge(names::AUDIT_PENDING, "Bytes of audit records that wait for a socket write.", move || pending() as f64);
    let free = of_log(|status| status.free_bytes);
    metrics.register_gauge(names::AUDIT_DISK_FREE, "Bytes free on the disk of the audit log.", move || free() as f64);
    let log_space = log.clone();
    metrics.register_state(names::AUDIT_ROOM, "What the disk of the audit log has room for.", DiskSpaceLevel::NAMES, move || {
        log_space.status().space_level as usize
    });
    if let Some(store) = store {
        let (free, level) = (store.clone(), store);
        metrics.register_gauge(names::STORE_DISK_FREE, "Bytes free on the disk of the store.", move || free.free_bytes() as f64);
        metrics.register_state(names::STORE_ROOM, "What the disk of the store has room for.", DiskSpaceLevel::NAMES, move || {
            level.space_level() as usize
        });
    }
    // The gauges outlive the server. They must not keep the cache open, because its file is complete only once it is closed.
    let (failures, paused) = (Arc::downgrade(cache_writer), Arc::downgrade(cache_writer));
    let failures = move || failures.upgrade().map_or(0, |cache_writer| cache_writer.failures());
    metrics.register_counter(names::CACHE_FAILURES, "Attempts to write the cache that failed.", failures);
    let paused = move || paused.upgrade().map_or(0.0, |cache_writer| f64::from(u8::from(cache_writer.is_paused())));
    metrics.register_gauge(names::CACHE_PAUSED, "1 while the cache is not written.", paused);
}

/// Registers the counts of the listeners.
pub(super) fn register_listener_metrics(telemetry: &Telemetry, stats: &ListenerStatsReader) {
    let metrics = telemetry.metrics();
    let by_cause = |of: fn(ListenerStats) -> Vec<(&'static str, u64)>| {
        let stats = stats.clone();
        move || {
            let listeners = stats.read().into_iter();
            let counts = listeners.flat_map(|stats| of(stats.clone()).into_iter().map(move |count| (stats.role.name(), count)));
            counts.map(|(listener, (cause, count))| (vec![listener.into(), cause.into()], count)).collect()
        }
    };
    let labels = &[names::LISTENER, names::CAUSE];
    metrics.register_labelled_counter(
        names::CONNECTIONS_CUT,
        "Connections cut, by cause.",
        labels,
        by_cause(|stats| stats.cuts_total),
    );
    metrics.register_labelled_counter(
        names::CALLS_REFUSED,
        "Calls refused before they were decoded, by cause.",
        labels,
        by_cause(|stats| stats.refusals_total),
    );
    let refused = stats.clone();
    let refused = move || refused.read().into_iter().map(|stats| (vec![stats.role.name().into()], stats.refused_total)).collect();
    let help = "Connections closed at once, because too many were open and none could be spared.";
    metrics.register_labelled_counter(names::CONNECTIONS_REFUSED, help, &[names::LISTENER], refused);
    let open = stats.clone();
    let open = move || open.read().into_iter().flat_map(|stats| stats.open_connections).sum::<usize>() as f64;
    metrics.register_gauge(names::CONNECTIONS, "Open connections of all listeners.", open);
    let waiting = stats.clone();
    let waiting = move || waiting.read().into_iter().map(|stats| stats.waiting_bytes).sum::<usize>() as f64;
    metrics.register_gauge(
        names::WAITING_BYTES,
        "Bytes that calls which wait hold, beyond what is each connection's own.",
        waiting,
    );
}
