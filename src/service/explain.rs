//! `Explain`: reports why a call is decided as it is, layer by layer, and the smallest change that would turn a denial into a permit.
//!
//! It changes nothing: it spends no proof, and it neither requests, uses nor looks up an approval.
//!
//! A gateway sees reasons and layers. Only an administrator sees documents, their locations and their entries. A gateway without a
//! proof of the call sees the answer that `Check` would give, and only those layers that do not judge the arguments. A chain is not
//! secret, and a thief of a chain must not find its limits by asking with one value after the other.
//!
//! Look next at `explain/remedy_text.rs` for the text of the changes, then at `pdp/explain.rs` for the layers.

mod remedy_text;

use std::collections::BTreeSet;
use std::sync::Arc;

pub use remedy_text::DocumentLocations;

use super::chain_cache::CachedChain;
use super::judgement::{self, Judgement, VerifiedCredential};
use super::record::CallTiming;
use super::replay_cache::ProofPresentation;
use super::request::{Caller, ChainIdentities, DecisionRequest};
use super::{PdpService, RuntimeService, ServiceUnavailable, is_too_old};
use crate::model::decision::{Decision, Effect, PolicyEntryRef};
use crate::model::ids::GroupId;
use crate::model::json::JsonObject;
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::revision::Revision;
use crate::model::rows::DocumentKey;
use crate::model::time::ClockReading;
use crate::pdp::{self, FindingRemedy, LayerAnswer, LayerFinding};
use crate::snapshot::SnapshotView;
use crate::token::{ProofCall, Rejection};

/// The answer to an `Explain` request.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The id of the decision (UUIDv7), as in the audit record.
    pub decision_id: String,
    /// The effect that `Check` would answer now.
    pub effect: Effect,
    /// The reason of the effect.
    pub reason: Reason,
    /// The layer that decided; `None` on a permit.
    pub layer: Option<DecisionLayer>,
    /// The index of the token or agent that decided, root 0.
    hop: Option<usize>,
    /// A message for people.
    pub message: String,
    /// The chain as a sentence; empty if none was verified.
    pub chain: String,
    /// The verified identities of the chain.
    pub identities: Option<Arc<ChainIdentities>>,
    /// Whether the tool is registered, so that its name is verified evidence.
    pub tool_is_registered: bool,
    /// The revision that answers.
    pub revision: Revision,
    /// The age of the proof of freshness.
    pub snapshot_age_ms: u64,
    findings: Vec<LayerFinding>,
    facts: remedy_text::RemedyFacts,
    /// Whether the caller has proved that it holds the chain, by a proof of the call, or by a proved handle if the tool needs no other.
    proved: bool,
}

/// The answer of one layer alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerExplanation {
    /// The layer.
    pub layer: DecisionLayer,
    /// The index of the agent or token, root 0; `None` if the layer has only one.
    pub hop: Option<usize>,
    /// The effect of this layer.
    pub effect: Effect,
    /// The reason of the effect; `OK` on a permit.
    pub reason: Reason,
    /// The id of the agent or application. Empty for other layers, and for a gateway without a proof.
    pub subject: String,
    /// The policy entry that decided. A gateway never sees it.
    pub matched: Option<PolicyEntryRef>,
    /// The groups that may approve, if the layer asks for an approval. Empty for a gateway without a proof.
    pub approvers: Vec<GroupId>,
}

/// One step of the smallest change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemedyStep {
    /// The layer whose effect the step changes.
    pub layer: DecisionLayer,
    /// The change as a sentence.
    pub text: String,
}

impl Explanation {
    /// Every layer's answer. Among equal answers, the first in this order is reported. `locations` is as in
    /// [`Explanation::remedy_steps`].
    ///
    /// INVARIANT: a gateway without a proof of the call learns nothing that depends on the arguments, except the answer that `Check`
    /// gives it too. `Check` gives one only for a tool that needs no proof. For any other tool it denies with `PROOF_MISSING`.
    pub fn layers(&self, locations: Option<&DocumentLocations>) -> impl Iterator<Item = LayerExplanation> + '_ {
        let (names, documents) = (self.may_disclose(locations), locations.is_some());
        let decides =
            move |answer: &LayerAnswer| (Some(answer.layer), answer.hop, answer.reason) == (self.layer, self.hop, self.reason);
        let is_disclosed =
            move |finding: &&LayerFinding| names || !finding.answer.layer.judges_arguments() || decides(&finding.answer);
        self.findings.iter().filter(is_disclosed).map(move |LayerFinding { answer, .. }| LayerExplanation {
            layer: answer.layer,
            hop: answer.hop,
            effect: answer.effect,
            reason: answer.reason,
            subject: if names { self.facts.layer_subject(answer.layer, answer.hop) } else { String::new() },
            matched: answer.matched.clone().filter(|_| documents),
            approvers: answer.approval.as_ref().filter(|_| names).map(|need| need.approver_groups.clone()).unwrap_or_default(),
        })
    }

    /// Whether no change of policy or credential can turn the denial. It is false for a gateway without a proof, which must not learn it.
    pub fn has_no_remedy(&self, locations: Option<&DocumentLocations>) -> bool {
        self.may_disclose(locations) && self.findings.iter().any(|finding| finding.remedy == Some(FindingRemedy::Irrevocable))
    }

    /// The steps of the smallest change: one for each layer that denies. If no layer denies, one for each layer that asks for an approval.
    ///
    /// With `locations`, the steps name documents and entries; pass it for an administrator only. A gateway without a proof of the
    /// call gets no steps.
    pub fn remedy_steps(&self, locations: Option<&DocumentLocations>) -> Vec<RemedyStep> {
        if self.has_no_remedy(locations) || self.effect == Effect::Permit || !self.may_disclose(locations) {
            return Vec::new();
        }
        let wanted = self.findings.iter().filter(|finding| finding.answer.effect == self.effect);
        let mut changes: Vec<RemedyStep> = Vec::new();
        for finding in wanted {
            let change = RemedyStep { layer: finding.answer.layer, text: self.facts.describe_remedy(finding, locations) };
            if !changes.contains(&change) {
                changes.push(change);
            }
        }
        changes
    }

    fn may_disclose(&self, locations: Option<&DocumentLocations>) -> bool {
        self.proved || locations.is_some()
    }

    /// The documents that [`Explanation::remedy_steps`] and [`Explanation::layers`] mention, so that their locations can be
    /// looked up.
    pub fn mentioned_documents(&self) -> BTreeSet<DocumentKey> {
        self.findings.iter().flat_map(|finding| self.facts.finding_documents(finding)).collect()
    }
}

/// The findings on a call whose credential is verified.
#[derive(Default)]
struct CallFindings {
    findings: Vec<LayerFinding>,
    /// Messages by reason. The first message for the deciding reason is shown.
    messages: Vec<(Reason, String)>,
    arguments: Option<JsonObject>,
    proof_jti: Option<String>,
    /// Whether the caller has proved that it holds the chain.
    proved: bool,
    /// Whether the call's proof was presented before, and whether the handle in the request was issued for a proof: for the record.
    evidence: (Option<ProofPresentation>, bool),
}

impl RuntimeService {
    /// Explains a call. It takes the request of [`RuntimeService::check`] and writes an audit record with the method `Explain`.
    ///
    /// # Errors
    /// As [`RuntimeService::check`].
    pub async fn explain(&self, request: &DecisionRequest, caller: &Caller) -> Result<Explanation, ServiceUnavailable> {
        let service = &*self.service;
        let mut view = service.current_view()?;
        let mut is_caught_up = true;
        let mut now = service.parts.clock.now();
        if let Some(at_least) = &request.at_least {
            is_caught_up = service.catch_up_to(at_least, &request.credential, caller, &view, now).await;
            view = service.current_view()?;
            now = service.parts.clock.now();
        }
        let options = service.verifier_options(&view.snapshot);
        let verified = match is_caught_up {
            true => {
                service.verify_credential(&request.credential, caller, &view.snapshot, &options, now).map_err(rejection_finding)
            }
            false => {
                service.record_unjudged_proof(&request.credential, request.proof.as_deref(), caller, &view, now);
                Err((
                    LayerFinding::denial(DecisionLayer::Freshness, None, Reason::RevisionUnavailable, FindingRemedy::Wait),
                    None,
                ))
            }
        };
        let (chain, found) = match verified {
            Ok(verified) => {
                let found = service.collect_findings(request, caller, &view, &verified, now);
                (Some(verified.chain), found)
            }
            Err((finding, message)) => {
                let messages = message.map(|message| (finding.answer.reason, message)).into_iter().collect();
                (None, CallFindings { findings: vec![finding], messages, ..CallFindings::default() })
            }
        };
        Ok(self.build_explanation(request, caller, &view, chain, found, now))
    }

    /// Records the explanation and builds the answer.
    fn build_explanation(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        view: &SnapshotView,
        chain: Option<Arc<CachedChain>>,
        found: CallFindings,
        now: ClockReading,
    ) -> Explanation {
        let CallFindings { mut findings, messages, arguments, proof_jti, proved, evidence } = found;
        let number = view.snapshot.revision().number;
        let decision = decide_by_findings(&findings, number);
        let mut judgement = Judgement::from_denial(decision);
        (judgement.chain, judgement.arguments, judgement.proof_jti) = (chain.clone(), arguments, proof_jti);
        (judgement.proof_presentation, judgement.handle_is_proved) = evidence;
        judgement.message =
            messages.into_iter().find(|(reason, _)| *reason == judgement.decision.reason).map(|(_, message)| message);
        let mut answer = self.build_answer(request, view, &judgement, now);
        let timing = CallTiming { started: now, now: self.service.parts.clock.now() };
        if self.record_decision_as("Explain", (request, caller), view, &judgement, &answer, timing).is_err() {
            // An explanation that cannot be recorded is not shown.
            findings = vec![LayerFinding::denial(DecisionLayer::Audit, None, Reason::AuditUnavailable, FindingRemedy::Wait)];
            judgement.decision = Decision::deny(Reason::AuditUnavailable, number);
            judgement.message = None;
            answer = self.build_answer(request, view, &judgement, now);
        }
        let subject = chain.as_ref().map(|chain| chain.prepared.subject().clone());
        let schema = view.snapshot.tool(&request.tool).map(|tool| (tool.document_kind, tool.document_id.to_string()));
        Explanation {
            effect: answer.decision.effect,
            reason: answer.decision.reason,
            layer: answer.decision.layer,
            hop: answer.decision.hop,
            message: answer.message,
            chain: chain.as_ref().map(|chain| chain.prepared.chain().describe()).unwrap_or_default(),
            identities: answer.identities,
            tool_is_registered: answer.tool_is_registered,
            revision: view.snapshot.revision().clone(),
            snapshot_age_ms: answer.snapshot_age_ms,
            decision_id: answer.decision_id,
            facts: remedy_text::RemedyFacts::new(request, subject, schema),
            findings,
            proved,
        }
    }
}

impl PdpService {
    /// Collects the findings of all checks in the order of `Check`: those that come before policy, policy itself, and those that
    /// follow policy.
    fn collect_findings(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        view: &SnapshotView,
        verified: &VerifiedCredential,
        now: ClockReading,
    ) -> CallFindings {
        let snapshot = &*view.snapshot;
        let options = self.verifier_options(snapshot);
        let chain = verified.chain.prepared.chain();
        let mut found = CallFindings::default();
        let signed = self.present_proof(request.proof.as_deref(), &verified.chain.prepared, &options, now);
        let presentation = signed.as_ref().and_then(|signed| signed.as_ref().ok()?.1);
        found.evidence = (presentation, verified.proved);
        let audience = self.resolve_audience(request.audience.as_deref(), caller, snapshot);
        let audience = audience.and_then(|audience| chain.check_audience(audience.as_deref(), &options).map(|()| audience));
        let audience = audience.map_err(|rejection| found.add_rejection(rejection)).ok();
        match judgement::parse_arguments(&request.arguments_json) {
            Ok(arguments) => found.arguments = Some(arguments),
            Err(message) => {
                found.findings.push(LayerFinding::denial(
                    DecisionLayer::Tool,
                    None,
                    Reason::ArgumentRefused,
                    FindingRemedy::Credential,
                ));
                found.messages.push((Reason::ArgumentRefused, message));
            }
        }
        let mut spent = None;
        if let (Some(audience), Some(arguments)) = (&audience, &found.arguments) {
            let tool = snapshot.tool(&request.tool);
            let per_call = tool.is_none_or(|tool| tool.needs_proof_per_call());
            let per_handle = tool.is_some_and(|tool| tool.needs_proof_per_handle());
            let proof_call = ProofCall { tool: &request.tool, arguments, audience: audience.as_deref() };
            match signed.map(|signed| signed.and_then(|(signed, _)| signed.verify_call(&proof_call, &options, now))) {
                Some(Ok(proof)) => {
                    found.proof_jti = Some(proof.jti().to_owned());
                    let is_single_use = per_call || (request.want_handle && self.may_prove_handle(&proof, presentation));
                    let early = self.ready_at.get().is_none_or(|ready_at| proof.iat_s() <= ready_at.unix_s());
                    spent = match is_single_use {
                        true if early => Some(Reason::ProofStale),
                        true if self.replay_cache.was_used(&proof.replay_key()) => Some(Reason::ProofReplayed),
                        _ => None,
                    };
                    // The sender of a proof that was used before may have overheard it.
                    found.proved = spent.is_none();
                }
                Some(Err(rejection)) => found.add_rejection(rejection),
                None if per_call || (per_handle && !verified.proved) => found.add_rejection(Rejection {
                    reason: Reason::ProofMissing,
                    hop: None,
                    message: Reason::ProofMissing.message().to_owned(),
                }),
                None => found.proved = verified.proved,
            }
        }
        if found.findings.iter().all(|finding| finding.answer.layer != DecisionLayer::Identity) && spent.is_none() {
            found.findings.insert(0, LayerFinding::permit(DecisionLayer::Identity));
        }
        self.add_layer_findings(&mut found, request, view, verified, spent, now);
        found
    }

    /// Adds the findings of policy, of the proof's use and of freshness.
    fn add_layer_findings(
        &self,
        found: &mut CallFindings,
        request: &DecisionRequest,
        view: &SnapshotView,
        verified: &VerifiedCredential,
        spent: Option<Reason>,
        now: ClockReading,
    ) {
        let snapshot = &*view.snapshot;
        // Without readable arguments the layers that depend on them cannot answer.
        let nothing = JsonObject::default();
        let arguments = found.arguments.as_ref();
        let asked = pdp::explain(
            &verified.chain.prepared,
            &judgement::pdp_call(request, arguments.unwrap_or(&nothing), now),
            snapshot,
            now,
        );
        let known = |finding: &LayerFinding| {
            arguments.is_some() || matches!(finding.answer.layer, DecisionLayer::Identity | DecisionLayer::Revocation)
        };
        found.findings.extend(asked.into_iter().filter(known));
        found
            .findings
            .extend(spent.map(|reason| LayerFinding::denial(DecisionLayer::Identity, None, reason, FindingRemedy::Credential)));
        found.findings.push(match is_too_old(view, &request.tool, now) {
            true => LayerFinding::denial(DecisionLayer::Freshness, None, Reason::Stale, FindingRemedy::Wait),
            false => LayerFinding::permit(DecisionLayer::Freshness),
        });
        let denies_by_identity =
            |finding: &LayerFinding| finding.answer.layer == DecisionLayer::Identity && finding.answer.effect == Effect::Deny;
        if found.findings.iter().any(denies_by_identity) {
            found.findings.retain(|finding| *finding != LayerFinding::permit(DecisionLayer::Identity));
        }
    }
}

impl CallFindings {
    fn add_rejection(&mut self, rejection: Rejection) {
        let (finding, message) = rejection_finding(rejection);
        self.messages.extend(message.map(|message| (finding.answer.reason, message)));
        self.findings.push(finding);
    }
}

/// Turns a rejected credential into a finding and its message.
fn rejection_finding(rejection: Rejection) -> (LayerFinding, Option<String>) {
    let layer = rejection.reason.layer().unwrap_or(DecisionLayer::Identity);
    (LayerFinding::denial(layer, rejection.hop, rejection.reason, FindingRemedy::Credential), Some(rejection.message))
}

/// The decision that `Check` would make: the first denial. A missing preparation counts only if no other layer denies.
fn decide_by_findings(findings: &[LayerFinding], number: u64) -> Decision {
    let denies = |finding: &&LayerFinding| finding.answer.effect == Effect::Deny;
    let decisive = findings
        .iter()
        .filter(denies)
        .find(|finding| finding.remedy != Some(FindingRemedy::Prepare))
        .or_else(|| findings.iter().find(denies))
        .or_else(|| findings.iter().find(|finding| finding.answer.effect == Effect::NeedsApproval));
    match decisive {
        None => Decision::permit(number),
        Some(LayerFinding { answer, .. }) => Decision {
            effect: answer.effect,
            layer: Some(answer.layer),
            matched: answer.matched.clone().map(Arc::new),
            ..Decision::deny(answer.reason, number)
        }
        .with_hop(answer.hop),
    }
}
