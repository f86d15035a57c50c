//! Counts the decisions that documents in shadow would change: by agent and tool.
//!
//! A decision is counted only if there are documents in shadow. The table is bounded, and a decision that finds no row is still counted
//! in a total. Look next at `docs/adr/0011-ids-as-labels-of-shadow-metrics.md`, which explains why these metrics have ids as labels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::request::CheckAnswer;
use super::{PdpService, RuntimeService};
use crate::model::decision::{Effect, ShadowDecision};
use crate::model::reason::Reason;
use crate::model::time::ClockReading;

/// Limit of the rows in the table.
const ROWS_MAX: usize = 10_000;
/// Most series of one metric. The series labelled `other` come on top.
const SERIES_MAX: usize = 200;
/// The label of decisions without a series of their own.
const OTHER: &str = "other";

/// One kind of decision that the documents in shadow would change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecisionFlip {
    /// The leaf agent.
    pub agent: Arc<str>,
    /// The tool as `server/tool`.
    pub tool: Arc<str>,
    /// The effect that policy decided.
    pub effect: Effect,
    /// The effect that the documents in shadow would have decided.
    pub would_be: Effect,
    /// The reason of that effect in the latest decision.
    pub would_be_reason: Reason,
    /// The number of these decisions.
    pub count: u64,
    /// The id of the latest of these decisions.
    pub last_decision_id: String,
}

/// The counts since the service started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowReport {
    /// The changed decisions, most frequent first.
    pub flips: Vec<DecisionFlip>,
    /// The start of the count.
    pub since_unix_ms: i64,
    /// The number of decisions that were also evaluated with the documents in shadow.
    pub decisions: u64,
    /// The number of changed decisions that found no row in the table.
    pub flips_uncounted: u64,
}

/// The count that a metric shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowMetric {
    /// Every decision that was also evaluated with the documents in shadow.
    Decisions,
    /// Only the decisions that the documents in shadow would change.
    Flips,
}

/// A series of a metric: agent, tool, effect, would-be effect, count.
pub type ShadowSeries = ([Arc<str>; 4], u64);

/// The shadow counts of one process.
#[derive(Debug)]
pub(super) struct ShadowStats {
    since: ClockReading,
    rows_max: usize,
    counters: Mutex<ShadowCounters>,
}

/// The counters behind the lock.
#[derive(Debug, Default)]
struct ShadowCounters {
    /// In the order of their first decision, so that the rows that have a metric series of their own stay the same.
    rows: Vec<DecisionFlip>,
    row_index: HashMap<(Arc<str>, Arc<str>, Effect, Effect), usize>,
    decisions: u64,
    overflow: HashMap<(Effect, Effect), u64>,
}

impl ShadowStats {
    pub(super) fn new(now: ClockReading) -> Self {
        Self::with_rows_max(now, ROWS_MAX)
    }

    fn with_rows_max(since: ClockReading, rows_max: usize) -> Self {
        Self { since, rows_max, counters: Mutex::default() }
    }

    /// Counts one decision. `names` is the leaf agent and the tool, if both are registered.
    fn count_decision(&self, names: Option<(&str, &str)>, effect: Effect, would_be: &ShadowDecision, decision_id: &str) {
        let mut counted = self.lock_counters();
        counted.decisions += 1;
        let index = names.and_then(|(agent, tool)| {
            let key = (Arc::from(agent), Arc::from(tool), effect, would_be.effect);
            if let Some(index) = counted.row_index.get(&key) {
                return Some(*index);
            }
            if counted.rows.len() >= self.rows_max {
                return None;
            }
            let (agent, tool, _, _) = key.clone();
            let row = DecisionFlip {
                agent,
                tool,
                effect,
                would_be: would_be.effect,
                would_be_reason: would_be.reason,
                count: 0,
                last_decision_id: String::new(),
            };
            counted.rows.push(row);
            let index = counted.rows.len() - 1;
            counted.row_index.insert(key, index);
            Some(index)
        });
        match index.and_then(|index| counted.rows.get_mut(index)) {
            Some(row) => {
                row.count += 1;
                row.would_be_reason = would_be.reason;
                decision_id.clone_into(&mut row.last_decision_id);
            }
            None => *counted.overflow.entry((effect, would_be.effect)).or_default() += 1,
        }
    }

    fn report(&self) -> ShadowReport {
        let counted = self.lock_counters();
        let mut flips: Vec<DecisionFlip> = counted.rows.iter().filter(|row| row.effect != row.would_be).cloned().collect();
        flips.sort_by(|a, b| (b.count, &a.agent, &a.tool).cmp(&(a.count, &b.agent, &b.tool)));
        let uncounted = counted.overflow.iter().filter(|((effect, would_be), _)| effect != would_be);
        ShadowReport {
            flips,
            since_unix_ms: self.since.unix_ms(),
            decisions: counted.decisions,
            flips_uncounted: uncounted.map(|(_, count)| count).sum(),
        }
    }

    fn series(&self, of: ShadowMetric) -> Vec<ShadowSeries> {
        let counted = self.lock_counters();
        let is_counted = |effect: Effect, would_be: Effect| of == ShadowMetric::Decisions || effect != would_be;
        let mut series = Vec::new();
        let mut others: HashMap<(Effect, Effect), u64> = counted
            .overflow
            .iter()
            .filter(|((effect, would_be), _)| is_counted(*effect, *would_be))
            .map(|(k, v)| (*k, *v))
            .collect();
        for row in counted.rows.iter().filter(|row| is_counted(row.effect, row.would_be)) {
            if series.len() < SERIES_MAX {
                let effects = [row.effect, row.would_be].map(|effect| Arc::from(effect.as_str()));
                let [effect, would_be] = effects;
                series.push(([row.agent.clone(), row.tool.clone(), effect, would_be], row.count));
            } else {
                *others.entry((row.effect, row.would_be)).or_default() += row.count;
            }
        }
        let other = |effect: Effect| Arc::from(effect.as_str());
        let mut rest: Vec<ShadowSeries> = others
            .into_iter()
            .map(|((effect, would_be), count)| ([OTHER.into(), OTHER.into(), other(effect), other(would_be)], count))
            .collect();
        rest.sort();
        series.extend(rest);
        series
    }

    fn lock_counters(&self) -> MutexGuard<'_, ShadowCounters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PdpService {
    /// Counts a decision that was also evaluated with documents in shadow. `effect` is that of policy, before approvals and proofs.
    pub(super) fn count_shadow_decision(&self, tool: &str, effect: Effect, answer: &CheckAnswer) {
        let Some(would_be) = &answer.decision.shadow_decision else { return };
        let leaf = answer.identities.as_ref().and_then(|identities| identities.subject.agents.last());
        // Only registered names become rows, so that no caller can fill the table or a metric with invented names.
        let names = leaf.filter(|_| answer.tool_is_registered).map(|leaf| (leaf.as_str(), tool));
        self.shadow_stats.count_decision(names, effect, would_be, &answer.decision_id);
    }

    /// The series of a metric: at most 200, and the rest as `other`.
    pub fn shadow_series(&self, of: ShadowMetric) -> Vec<ShadowSeries> {
        self.shadow_stats.series(of)
    }
}

impl RuntimeService {
    /// Reports the decisions that the documents in shadow would change, as this process has counted them.
    pub fn shadow_report(&self) -> ShadowReport {
        self.service.shadow_stats.report()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::{Clock as _, ManualClock};

    fn would_be(effect: Effect) -> ShadowDecision {
        ShadowDecision { effect, reason: Reason::GuardrailDenies, layer: None, matched: None }
    }

    #[test]
    fn flips_are_counted_within_limits() {
        let shadows = ShadowStats::with_rows_max(ManualClock::at_unix_s(1_000).now(), 3);
        let count =
            |agent: &str, would: Effect| shadows.count_decision(Some((agent, "t/x")), Effect::Permit, &would_be(would), agent);
        count("a", Effect::Permit);
        count("a", Effect::Deny);
        count("b", Effect::Deny);
        count("b", Effect::Deny);
        count("c", Effect::Deny);
        shadows.count_decision(None, Effect::Permit, &would_be(Effect::Deny), "nobody");
        let report = shadows.report();
        let told: Vec<_> = report.flips.iter().map(|flip| (&*flip.agent, flip.count, flip.last_decision_id.as_str())).collect();
        assert_eq!(told, [("b", 2, "b"), ("a", 1, "a")]);
        assert_eq!((report.decisions, report.flips_uncounted, report.since_unix_ms), (6, 2, 1_000_000));
        let text = |of| -> Vec<String> {
            shadows
                .series(of)
                .iter()
                .map(|([agent, _, effect, would], count)| format!("{agent} {effect} {would} {count}"))
                .collect()
        };
        assert_eq!(text(ShadowMetric::Flips), ["a PERMIT DENY 1", "b PERMIT DENY 2", "other PERMIT DENY 2"]);
        assert_eq!(text(ShadowMetric::Decisions).len(), 4);
    }

    #[test]
    fn a_metric_has_a_bounded_number_of_series() {
        let shadows = ShadowStats::new(ManualClock::at_unix_s(1_000).now());
        for n in 0..1_000 {
            shadows.count_decision(Some((&format!("a{n}"), "t/x")), Effect::Permit, &would_be(Effect::Deny), "d");
        }
        let series = shadows.series(ShadowMetric::Flips);
        assert_eq!(series.len(), SERIES_MAX + 1);
        assert_eq!(series.iter().map(|(_, count)| count).sum::<u64>(), 1_000);
        assert_eq!(series.last().map(|(labels, count)| (&*labels[0], *count)), Some((OTHER, 800)));
    }
}
