//! Records a decision: the audit record, which must be written before the answer is sent, then the metrics and a span.
//!
//! It must not decide anything. Look next at `audit.rs`, which writes the records.

use super::judge::Judged;
use super::request::{Answer, Caller, CheckRequest, ListToolsAnswer, ListToolsRequest, TraceHeaders};
use super::{KnownChain, Lane, Service};
use crate::audit::{Fragment, Principal, Record, Unavailable};
use crate::model::decision::{Decision, Evidence};
use crate::model::json::Object;
use crate::model::time::Now;
use crate::snapshot::View;
use crate::telemetry::{SpanFacts, TraceContext};

impl Lane {
    /// Puts the audit record of a decision into this runtime's buffer. The record is in the kernel before the bytes of the answer leave.
    pub(super) fn record(
        &self,
        request: &CheckRequest,
        caller: &Caller,
        view: &View,
        judged: &Judged,
        answer: &Answer,
        moment: Moment,
    ) -> Result<(), Unavailable> {
        self.record_as("Check", (request, caller), view, judged, answer, moment)
    }

    /// As `record`, for a call of another method that takes the same request.
    pub(super) fn record_as(
        &self,
        method: &'static str,
        (request, caller): (&CheckRequest, &Caller),
        view: &View,
        judged: &Judged,
        answer: &Answer,
        moment: Moment,
    ) -> Result<(), Unavailable> {
        let nobody = Fragment::default();
        let arguments_sha256 = judged.arguments.as_ref().map(sha256_of);
        let tool_evidence = if answer.tool_is_registered { Evidence::Verified } else { Evidence::Attested };
        self.recorder.record(&Record {
            time_unix_ns: moment.now.unix_ns,
            method,
            decision_id: &answer.decision_id,
            request_id: &request.request_id,
            trace_id: trace_id(&request.trace),
            effect: judged.decision.effect,
            reason: judged.decision.reason,
            deciding_layer: judged.decision.layer,
            hop: judged.decision.hop,
            matched: judged.decision.matched.as_deref(),
            would_be: judged.decision.would_be.as_deref(),
            chain: judged.chain.as_ref().map_or(&nobody, |chain| &chain.fragment),
            tool: Some(Principal { id: &request.tool, evidence: tool_evidence }),
            arguments_sha256: arguments_sha256.as_ref(),
            proof_jti: judged.proof_jti.as_deref(),
            approval_digest: judged.approval_digest.as_deref(),
            obligations: &judged.decision.obligations,
            gateway: &caller.address,
            history: &view.snapshot.revision().history,
            revision: judged.decision.revision,
            snapshot_digest: view.snapshot.digest_hex(),
            snapshot_age_ms: answer.snapshot_age_ms,
            latency_ns: moment.latency_ns(),
        })
    }

    /// Puts the audit record of a listing into this runtime's buffer. The record does not list the tools, because they may be many.
    pub(super) fn record_listing(
        &self,
        (request, caller): (&ListToolsRequest, &Caller),
        view: &View,
        (decision, chain, proof_jti): (&Decision, Option<&KnownChain>, Option<&str>),
        answer: &ListToolsAnswer,
        moment: Moment,
    ) -> Result<(), Unavailable> {
        let nobody = Fragment::default();
        self.recorder.record(&Record {
            time_unix_ns: moment.now.unix_ns,
            method: "ListTools",
            decision_id: &answer.decision_id,
            request_id: &request.request_id,
            trace_id: trace_id(&request.trace),
            effect: decision.effect,
            reason: decision.reason,
            deciding_layer: decision.layer,
            hop: decision.hop,
            matched: None,
            would_be: None,
            chain: chain.map_or(&nobody, |chain| &chain.fragment),
            tool: None,
            arguments_sha256: None,
            proof_jti,
            approval_digest: None,
            obligations: &[],
            gateway: &caller.address,
            history: &view.snapshot.revision().history,
            revision: decision.revision,
            snapshot_digest: view.snapshot.digest_hex(),
            snapshot_age_ms: answer.snapshot_age_ms,
            latency_ns: moment.latency_ns(),
        })
    }
}

/// The times at which a call arrived and was decided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) started: Now,
    pub(super) now: Now,
}

impl Moment {
    fn latency_ns(self) -> u64 {
        u64::try_from(self.now.boot_ns.saturating_sub(self.started.boot_ns)).unwrap_or(0)
    }
}

impl Service {
    /// Counts a decision in the metrics and, if it is sampled, exports its span.
    pub(super) fn observe(&self, request: &CheckRequest, judged: &Judged, answer: &Answer, moment: Moment) {
        let metrics = &self.parts.metrics;
        metrics.decision(judged.decision.effect, judged.decision.reason, moment.latency_ns());
        if let Some(cached) = judged.cached {
            metrics.chain_cache(cached);
        }
        if judged.cached == Some(false) {
            metrics.cold_verification();
        }
        let (true, Some(revision)) = (self.parts.spans.is_on(), &answer.revision) else {
            return;
        };
        let subject = judged.chain.as_ref().map(|chain| &**chain.prepared.subject());
        self.parts.spans.record(&SpanFacts {
            parent: trace_context(&request.trace).as_ref(),
            method: "Check",
            start_unix_ns: moment.started.unix_ns,
            end_unix_ns: moment.now.unix_ns,
            decision_id: &answer.decision_id,
            effect: judged.decision.effect,
            reason: judged.decision.reason,
            layer: judged.decision.layer,
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

fn sha256_of(arguments: &Object) -> [u8; 32] {
    let mut canonical = String::new();
    arguments.write_jcs(&mut canonical);
    let digest = ring::digest::digest(&ring::digest::SHA256, canonical.as_bytes());
    digest.as_ref().try_into().unwrap_or_default()
}

/// The trace id of a valid trace context.
fn trace_id(trace: &TraceHeaders) -> Option<[u8; 16]> {
    trace_context(trace).map(|context| context.trace_id())
}

fn trace_context(trace: &TraceHeaders) -> Option<TraceContext> {
    TraceContext::parse(trace.parent.as_deref()?, trace.state.as_deref())
}
