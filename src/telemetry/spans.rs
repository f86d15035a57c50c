//! Records one span per decision, after the decision, so that telemetry costs nothing before the answer is known.
//!
//! This file samples, not the SDK. Denials are always sampled, up to a limit, because operators look for them. A permit is
//! sampled if its caller samples the trace, or by ratio if there is no trace. Permits have a limit of their own, so that no
//! caller can flood the collector. Look next at `trace_context.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::SdkTracer;

use crate::model::decision::Effect;
use crate::model::ids::{AgentId, ApplicationId, SessionId, TaskId, UserId};
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::revision::HistoryId;

use super::{Settings, TraceContext, names};

/// The content of a span. An identity that was not established is absent.
#[derive(Clone, Copy, Debug)]
pub struct SpanFacts<'a> {
    /// The caller's trace context.
    pub parent: Option<&'a TraceContext>,
    /// The called method: `Check`, `ListTools` or `Explain`.
    pub method: &'static str,
    /// Time at which the call arrived.
    pub start_unix_ns: i64,
    /// Time of the decision.
    pub end_unix_ns: i64,
    /// The decision's id, as in the audit log.
    pub decision_id: &'a str,
    /// The effect that was answered.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Reason,
    /// The layer with the least effect, which decided.
    pub layer: Option<DecisionLayer>,
    /// The user who delegated.
    pub user: Option<&'a UserId>,
    /// The application in which the agent runs.
    pub application: Option<&'a ApplicationId>,
    /// Every agent, root to leaf.
    pub agents: &'a [AgentId],
    /// The requested tool.
    pub tool: Option<&'a str>,
    /// The session.
    pub session: Option<&'a SessionId>,
    /// The task.
    pub task: Option<&'a TaskId>,
    /// The history that the revision belongs to.
    pub history: &'a HistoryId,
    /// Number of the revision that decided.
    pub revision: u64,
}

/// Records spans of decisions. A clone shares the limits.
#[derive(Clone, Debug)]
pub struct SpanRecorder(Option<Arc<SampledSpanExporter>>);

/// Samples and exports spans.
#[derive(Debug)]
struct SampledSpanExporter {
    tracer: SdkTracer,
    /// The number of permits that are sampled out of 2^32 permits without a parent.
    permit_threshold: u64,
    permits_seen: AtomicU64,
    permits: SpanRateLimit,
    denials: SpanRateLimit,
    suppressed: AtomicU64,
}

impl SpanRecorder {
    /// A recorder that records nothing.
    pub fn disabled() -> Self {
        Self(None)
    }

    pub(super) fn new(tracer: SdkTracer, settings: &Settings) -> Self {
        Self(Some(Arc::new(SampledSpanExporter {
            tracer,
            permit_threshold: ratio_to_threshold(settings.permit_span_ratio),
            permits_seen: AtomicU64::new(0),
            permits: SpanRateLimit::new(settings.permit_spans_per_s_max),
            denials: SpanRateLimit::new(settings.denial_spans_per_s_max),
            suppressed: AtomicU64::new(0),
        })))
    }

    /// Whether spans are recorded. If not, callers need not gather facts that are costly.
    pub fn is_enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Records the span of a decision, if it is sampled. Never blocks: if the queue is full, the span is dropped.
    pub fn record(&self, facts: &SpanFacts<'_>) {
        if let Some(inner) = &self.0
            && inner.should_sample(facts)
        {
            inner.export(facts);
        }
    }

    /// Number of spans that a limit suppressed.
    pub fn suppressed(&self) -> u64 {
        self.0.as_ref().map_or(0, |inner| inner.suppressed.load(Ordering::Relaxed))
    }
}

impl SampledSpanExporter {
    /// Whether a decision gets a span: sampled, and within the limit.
    fn should_sample(&self, facts: &SpanFacts<'_>) -> bool {
        let cap = match (facts.effect, facts.parent) {
            (Effect::Deny | Effect::NeedsApproval, _) => &self.denials,
            (Effect::Permit, Some(parent)) if parent.is_sampled() => &self.permits,
            (Effect::Permit, None) if self.draws_permit() => &self.permits,
            (Effect::Permit, _) => return false,
        };
        let second = u64::try_from(facts.end_unix_ns / 1_000_000_000).unwrap_or(0);
        let admitted = cap.admits(second);
        if !admitted {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }

    /// Whether the next permit is sampled. The sampled permits are spread evenly, because multiples of the golden ratio fall into
    /// each interval in proportion to its length.
    fn draws_permit(&self) -> bool {
        let count = self.permits_seen.fetch_add(1, Ordering::Relaxed);
        count.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 < self.permit_threshold
    }

    fn export(&self, facts: &SpanFacts<'_>) {
        let parent = Context::new();
        let parent = match facts.parent {
            Some(context) => parent.with_remote_span_context(context.span_context().clone()),
            None => parent,
        };
        let mut span = SpanBuilder::from_name(names::CHECK_SPAN)
            .with_kind(SpanKind::Server)
            .with_start_time(to_system_time(facts.start_unix_ns))
            .with_attributes(span_attributes(facts))
            .start_with_context(&self.tracer, &parent);
        if is_error(facts.reason) {
            span.set_attribute(KeyValue::new(names::ERROR_TYPE, facts.reason.as_str()));
            span.set_status(Status::error(facts.reason.message()));
        }
        span.end_with_timestamp(to_system_time(facts.end_unix_ns.max(facts.start_unix_ns)));
    }
}

/// A limit on the spans in one second of the wall clock.
#[derive(Debug)]
struct SpanRateLimit {
    per_s_max: u32,
    /// The upper half holds the second, the lower half the number of spans admitted in it.
    admitted: AtomicU64,
}

impl SpanRateLimit {
    fn new(per_s_max: u32) -> Self {
        Self { per_s_max, admitted: AtomicU64::new(0) }
    }

    fn admits(&self, second: u64) -> bool {
        let second = second << 32;
        let update = |seen: u64| match seen {
            seen if seen >> 32 << 32 != second => (self.per_s_max > 0).then_some(second | 1),
            seen => ((seen & u64::from(u32::MAX)) < u64::from(self.per_s_max)).then_some(seen + 1),
        };
        self.admitted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).is_ok()
    }
}

fn span_attributes(facts: &SpanFacts<'_>) -> Vec<KeyValue> {
    let text = |text: &str| Value::String(StringValue::from(text.to_owned()));
    let optional = [
        (names::AGENT_ID, facts.agents.last().map(|agent| text(agent.as_str()))),
        (names::TOOL_NAME, facts.tool.map(text)),
        (names::USER_ID, facts.user.map(|user| text(&user.to_string()))),
        (names::SESSION_ID, facts.session.map(|session| text(session.as_str()))),
        (names::APPLICATION_ID, facts.application.map(|application| text(application.as_str()))),
        (names::TASK_ID, facts.task.map(|task| text(task.as_str()))),
        (names::LAYER, facts.layer.map(|layer| layer.as_str().into())),
        (names::AGENTS, (!facts.agents.is_empty()).then(|| agents_value(facts.agents))),
    ];
    let mut attributes = vec![
        KeyValue::new(names::OPERATION_NAME, names::EXECUTE_TOOL),
        KeyValue::new(names::METHOD, facts.method),
        KeyValue::new(names::DECISION_ID, text(facts.decision_id)),
        KeyValue::new(names::EFFECT, facts.effect.as_str()),
        KeyValue::new(names::REASON, facts.reason.as_str()),
        KeyValue::new(names::REVISION_TOKEN, format!("{}.{}", facts.history, facts.revision)),
    ];
    attributes.extend(optional.into_iter().filter_map(|(name, value)| value.map(|value| KeyValue::new(name, value))));
    attributes
}

fn agents_value(agents: &[AgentId]) -> Value {
    Value::Array(Array::String(agents.iter().map(|agent| StringValue::from(agent.as_str().to_owned())).collect()))
}

/// Whether the reason is an error of the replica. A denial by policy is no error, because denying is the program's purpose.
fn is_error(reason: Reason) -> bool {
    matches!(reason, Reason::AuditUnavailable | Reason::Stale | Reason::RevisionUnavailable | Reason::ConditionError)
}

fn to_system_time(unix_ns: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(unix_ns).unwrap_or(0))
}

fn ratio_to_threshold(ratio: f64) -> u64 {
    // A checked ratio from 0 to 1 times 2^32 fits exactly into 64 bits.
    (ratio * 4_294_967_296.0) as u64
}
