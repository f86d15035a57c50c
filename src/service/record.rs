//! Records a decision: the audit record, which must be written before the answer is sent, then the metrics and a span.
//!
//! It must not decide anything. Look next at `audit.rs`, which writes the records.

use std::sync::Arc;

use super::judgement::{Judgement, revokes_chain};
use super::request::{Caller, CheckAnswer, DecisionRequest, ListToolsAnswer, ListToolsRequest, TraceHeaders};
use super::{CachedChain, PdpService, RuntimeService};
use crate::audit::{AuditUnavailable, ChainFragment, DecisionRecord, PrincipalFacts};
use crate::model::decision::{Decision, Evidence};
use crate::model::json::JsonObject;
use crate::model::time::ClockReading;
use crate::snapshot::SnapshotView;
use crate::telemetry::{SpanFacts, TraceContext};

/// The verified credential of a listing.
#[derive(Clone)]
pub(super) struct ListingCredential {
    pub(super) chain: Arc<CachedChain>,
    /// Whether the caller has proved that it holds the chain, by a proof in the request or by a proved handle.
    pub(super) proved: bool,
    pub(super) proof_jti: Option<String>,
}

impl RuntimeService {
    /// Puts the audit record of a decision into this runtime's buffer. The record is in the kernel before the bytes of the answer leave.
    pub(super) fn record_decision(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        view: &SnapshotView,
        judgement: &Judgement,
        answer: &CheckAnswer,
        timing: CallTiming,
    ) -> Result<(), AuditUnavailable> {
        self.record_decision_as("Check", (request, caller), view, judgement, answer, timing)
    }

    /// As `record`, for a call of another method that takes the same request.
    pub(super) fn record_decision_as(
        &self,
        method: &'static str,
        (request, caller): (&DecisionRequest, &Caller),
        view: &SnapshotView,
        judgement: &Judgement,
        answer: &CheckAnswer,
        timing: CallTiming,
    ) -> Result<(), AuditUnavailable> {
        let nobody = ChainFragment::default();
        let arguments_sha256 = judgement.arguments.as_ref().map(hash_arguments);
        let tool_evidence = if answer.tool_is_registered { Evidence::Verified } else { Evidence::Attested };
        self.recorder.record(&DecisionRecord {
            time_unix_ns: timing.now.unix_ns,
            method,
            decision_id: &answer.decision_id,
            request_id: &request.request_id,
            trace_id: parse_trace_id(&request.trace),
            effect: judgement.decision.effect,
            reason: judgement.decision.reason,
            deciding_layer: judgement.decision.layer,
            hop: judgement.decision.hop,
            matched: judgement.decision.matched.as_deref(),
            would_be: judgement.decision.shadow_decision.as_deref(),
            chain: judgement.chain.as_ref().map_or(&nobody, |chain| &chain.fragment),
            proved: judgement.proves_possession(),
            agent: judgement.chain.as_deref().and_then(leaf_agent),
            tool: Some(PrincipalFacts { id: &request.tool, evidence: tool_evidence }),
            arguments_sha256: arguments_sha256.as_ref(),
            proof_jti: judgement.proof_jti.as_deref(),
            approval_digest: judgement.approval_digest.as_deref(),
            obligations: &judgement.decision.obligations,
            gateway: &caller.address,
            history: &view.snapshot.revision().history,
            revision: judgement.decision.revision,
            snapshot_digest: view.snapshot.digest_hex(),
            snapshot_age_ms: answer.snapshot_age_ms,
            latency_ns: timing.latency_ns(),
        })
    }

    /// Puts the audit record of a listing into this runtime's buffer. The record does not list the tools, because they may be many.
    pub(super) fn record_listing(
        &self,
        (request, caller): (&ListToolsRequest, &Caller),
        view: &SnapshotView,
        (decision, listed): (&Decision, Option<&ListingCredential>),
        answer: &ListToolsAnswer,
        timing: CallTiming,
    ) -> Result<(), AuditUnavailable> {
        let nobody = ChainFragment::default();
        let chain = listed.map(|listed| &*listed.chain);
        self.recorder.record(&DecisionRecord {
            time_unix_ns: timing.now.unix_ns,
            method: "ListTools",
            decision_id: &answer.decision_id,
            request_id: &request.request_id,
            trace_id: parse_trace_id(&request.trace),
            effect: decision.effect,
            reason: decision.reason,
            deciding_layer: decision.layer,
            hop: decision.hop,
            matched: None,
            would_be: None,
            chain: chain.map_or(&nobody, |chain| &chain.fragment),
            proved: listed.is_some_and(|listed| listed.proved) && !revokes_chain(decision),
            agent: chain.and_then(leaf_agent),
            tool: None,
            arguments_sha256: None,
            proof_jti: listed.and_then(|listed| listed.proof_jti.as_deref()),
            approval_digest: None,
            obligations: &[],
            gateway: &caller.address,
            history: &view.snapshot.revision().history,
            revision: decision.revision,
            snapshot_digest: view.snapshot.digest_hex(),
            snapshot_age_ms: answer.snapshot_age_ms,
            latency_ns: timing.latency_ns(),
        })
    }
}

/// The leaf agent of a chain.
fn leaf_agent(chain: &CachedChain) -> Option<&str> {
    chain.prepared.subject().agents.last().map(|agent| agent.as_str())
}

/// The times at which a call arrived and was decided.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallTiming {
    pub(super) started: ClockReading,
    pub(super) now: ClockReading,
}

impl CallTiming {
    fn latency_ns(self) -> u64 {
        u64::try_from(self.now.boot_ns.saturating_sub(self.started.boot_ns)).unwrap_or(0)
    }
}

impl PdpService {
    /// Counts a decision in the metrics and, if it is sampled, exports its span.
    pub(super) fn record_telemetry(
        &self,
        request: &DecisionRequest,
        judgement: &Judgement,
        answer: &CheckAnswer,
        timing: CallTiming,
    ) {
        let metrics = &self.parts.metrics;
        metrics.record_decision(judgement.decision.effect, judgement.decision.reason, timing.latency_ns());
        if let Some(cached) = judgement.cache_hit {
            metrics.record_chain_lookup(cached);
        }
        if judgement.cache_hit == Some(false) {
            metrics.record_cold_verification();
        }
        let (true, Some(revision)) = (self.parts.spans.is_enabled(), &answer.revision) else {
            return;
        };
        let subject = judgement.chain.as_ref().map(|chain| &**chain.prepared.subject());
        self.parts.spans.record(&SpanFacts {
            parent: parse_trace_context(&request.trace).as_ref(),
            method: "Check",
            start_unix_ns: timing.started.unix_ns,
            end_unix_ns: timing.now.unix_ns,
            decision_id: &answer.decision_id,
            effect: judgement.decision.effect,
            reason: judgement.decision.reason,
            layer: judgement.decision.layer,
            user: subject.map(|subject| &subject.user),
            application: subject.map(|subject| &subject.application),
            agents: subject.map(|subject| subject.agents.as_slice()).unwrap_or_default(),
            tool: Some(&request.tool),
            session: subject.map(|subject| &subject.session),
            task: subject.map(|subject| &subject.task),
            history: &revision.history,
            revision: revision.number,
        });
    }
}

fn hash_arguments(arguments: &JsonObject) -> [u8; 32] {
    let mut canonical = String::new();
    arguments.write_jcs(&mut canonical);
    let digest = ring::digest::digest(&ring::digest::SHA256, canonical.as_bytes());
    digest.as_ref().try_into().unwrap_or_default()
}

/// The trace id of a valid trace context.
fn parse_trace_id(trace: &TraceHeaders) -> Option<[u8; 16]> {
    parse_trace_context(trace).map(|context| context.trace_id())
}

fn parse_trace_context(trace: &TraceHeaders) -> Option<TraceContext> {
    TraceContext::parse(trace.parent.as_deref()?, trace.state.as_deref())
}
