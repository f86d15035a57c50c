//! `Explain`: reports why a call is decided as it is, layer by layer, and the smallest change that would turn a denial into a permit.
//!
//! It changes nothing: it spends no proof, and it neither requests, uses nor looks up an approval.
//!
//! A gateway sees reasons and layers. Only an administrator sees documents, their locations and their entries. A gateway without a
//! proof of the call sees the answer that `Check` would give, and only those layers that do not judge the arguments. A chain is not
//! secret, and a thief of a chain must not find its limits by asking with one value after the other.
//!
//! Look next at `explain/words.rs` for the text of the changes, then at `pdp/explain.rs` for the layers.

mod words;

use std::collections::BTreeSet;
use std::sync::Arc;

pub use words::Places;

use super::chains::KnownChain;
use super::judge::{self, Credited, Judged};
use super::record::Moment;
use super::request::{Caller, CheckRequest, Identities};
use super::{Lane, Service, Undecided, is_too_old};
use crate::model::decision::{Decision, Effect, EntryRef};
use crate::model::ids::GroupId;
use crate::model::json::Object;
use crate::model::reason::{Layer, Reason};
use crate::model::records::DocumentKey;
use crate::model::revision::Revision;
use crate::model::time::Now;
use crate::pdp::{self, Finding, LayerAnswer, Turn};
use crate::snapshot::View;
use crate::token::{ProofOf, Rejection};

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
    pub layer: Option<Layer>,
    /// The index of the token or agent that decided, root 0.
    hop: Option<usize>,
    /// A message for people.
    pub message: String,
    /// The chain as a sentence; empty if none was verified.
    pub chain: String,
    /// The verified identities of the chain.
    pub identities: Option<Arc<Identities>>,
    /// Whether the tool is registered, so that its name is verified evidence.
    pub tool_is_registered: bool,
    /// The revision that answers.
    pub revision: Revision,
    /// The age of the proof of freshness.
    pub snapshot_age_ms: u64,
    findings: Vec<Finding>,
    facts: words::Facts,
    /// Whether the caller has proved that it holds the chain, by a proof of the call, or by a proved handle if the tool needs no other.
    proved: bool,
}

/// The answer of one layer alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExplainedLayer {
    /// The layer.
    pub layer: Layer,
    /// The index of the agent or token, root 0; `None` if the layer has only one.
    pub hop: Option<usize>,
    /// The effect of this layer.
    pub effect: Effect,
    /// The reason of the effect; `OK` on a permit.
    pub reason: Reason,
    /// The id of the agent or application. Empty for other layers, and for a gateway without a proof.
    pub subject: String,
    /// The policy entry that decided. A gateway never sees it.
    pub matched: Option<EntryRef>,
    /// The groups that may approve, if the layer asks for an approval. Empty for a gateway without a proof.
    pub approvers: Vec<GroupId>,
}

/// One step of the smallest change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The layer whose effect the step changes.
    pub layer: Layer,
    /// The change as a sentence.
    pub what: String,
}

impl Explanation {
    /// Every layer's answer. Of equal answers, the first in this order is reported. `places` is as in [`Explanation::changes`].
    ///
    /// INVARIANT: a gateway without a proof of the call learns nothing that depends on the arguments, except the answer that `Check`
    /// gives it too. `Check` gives one only for a tool that needs no proof. For any other tool it denies with `PROOF_MISSING`.
    pub fn layers(&self, places: Option<&Places>) -> impl Iterator<Item = ExplainedLayer> + '_ {
        let (names, documents) = (self.may_tell(places), places.is_some());
        let decides =
            move |answer: &LayerAnswer| (Some(answer.layer), answer.hop, answer.reason) == (self.layer, self.hop, self.reason);
        let told = move |finding: &&Finding| names || !finding.answer.layer.judges_arguments() || decides(&finding.answer);
        self.findings.iter().filter(told).map(move |Finding { answer, .. }| ExplainedLayer {
            layer: answer.layer,
            hop: answer.hop,
            effect: answer.effect,
            reason: answer.reason,
            subject: if names { self.facts.name(answer.layer, answer.hop) } else { String::new() },
            matched: answer.matched.clone().filter(|_| documents),
            approvers: answer.approval.as_ref().filter(|_| names).map(|need| need.by.clone()).unwrap_or_default(),
        })
    }

    /// Whether no change of policy or credential can turn the denial. It is false for a gateway without a proof, which must not learn it.
    pub fn no_change_can(&self, places: Option<&Places>) -> bool {
        self.may_tell(places) && self.findings.iter().any(|finding| finding.turn == Some(Turn::Never))
    }

    /// The steps of the smallest change: one for each layer that denies. If no layer denies, one for each layer that asks for an approval.
    ///
    /// With `places`, the steps name documents and entries; pass it for an administrator only. A gateway without a proof of the
    /// call gets no steps.
    pub fn changes(&self, places: Option<&Places>) -> Vec<Change> {
        if self.no_change_can(places) || self.effect == Effect::Permit || !self.may_tell(places) {
            return Vec::new();
        }
        let wanted = self.findings.iter().filter(|finding| finding.answer.effect == self.effect);
        let mut changes: Vec<Change> = Vec::new();
        for finding in wanted {
            let change = Change { layer: finding.answer.layer, what: self.facts.step(finding, places) };
            if !changes.contains(&change) {
                changes.push(change);
            }
        }
        changes
    }

    fn may_tell(&self, places: Option<&Places>) -> bool {
        self.proved || places.is_some()
    }

    /// The documents that [`Explanation::changes`] and [`Explanation::layers`] mention, so that their locations can be looked up.
    pub fn documents(&self) -> BTreeSet<DocumentKey> {
        self.findings.iter().flat_map(|finding| self.facts.documents(finding)).collect()
    }
}

/// The findings on a call whose credential is verified.
struct Found {
    findings: Vec<Finding>,
    /// Messages by reason. The first message for the deciding reason is shown.
    messages: Vec<(Reason, String)>,
    arguments: Option<Object>,
    proof_jti: Option<String>,
    /// Whether the caller has proved that it holds the chain.
    proved: bool,
}

impl Lane {
    /// Explains a call. It takes the request of [`Lane::check`] and writes an audit record with the method `Explain`.
    ///
    /// # Errors
    /// As [`Lane::check`].
    pub async fn explain(&self, request: &CheckRequest, caller: &Caller) -> Result<Explanation, Undecided> {
        let service = &*self.service;
        let mut view = service.view()?;
        let mut reached = true;
        let mut now = service.parts.clock.now();
        if let Some(at_least) = &request.at_least {
            reached = service.reaches(at_least, &request.credential, caller, &view, now).await;
            view = service.view()?;
            now = service.parts.clock.now();
        }
        let options = service.options(&view.snapshot);
        let credited = match reached {
            true => service.credit(&request.credential, caller, &view.snapshot, &options, now).map_err(refused),
            false => Err((Finding::denial(Layer::Freshness, None, Reason::RevisionUnavailable, Turn::Wait), None)),
        };
        let (chain, found) = match credited {
            Ok(credited) => {
                let found = service.found(request, caller, &view, &credited, now);
                (Some(credited.chain), found)
            }
            Err((finding, message)) => {
                let messages = message.map(|message| (finding.answer.reason, message)).into_iter().collect();
                (None, Found { findings: vec![finding], messages, arguments: None, proof_jti: None, proved: false })
            }
        };
        Ok(self.explained(request, caller, &view, chain, found, now))
    }

    /// Records the explanation and builds the answer.
    fn explained(
        &self,
        request: &CheckRequest,
        caller: &Caller,
        view: &View,
        chain: Option<Arc<KnownChain>>,
        found: Found,
        now: Now,
    ) -> Explanation {
        let Found { mut findings, messages, arguments, proof_jti, proved } = found;
        let number = view.snapshot.revision().number;
        let decision = decided(&findings, number);
        let mut judged = Judged::denied(decision);
        (judged.chain, judged.arguments, judged.proof_jti) = (chain.clone(), arguments, proof_jti);
        judged.message = messages.into_iter().find(|(reason, _)| *reason == judged.decision.reason).map(|(_, message)| message);
        let mut answer = self.compose(request, view, &judged, now);
        let moment = Moment { started: now, now: self.service.parts.clock.now() };
        if self.record_as("Explain", (request, caller), view, &judged, &answer, moment).is_err() {
            // An explanation that cannot be recorded is not shown.
            findings = vec![Finding::denial(Layer::Audit, None, Reason::AuditUnavailable, Turn::Wait)];
            judged.decision = Decision::deny(Reason::AuditUnavailable, number);
            judged.message = None;
            answer = self.compose(request, view, &judged, now);
        }
        let subject = chain.as_ref().map(|chain| chain.prepared.subject().clone());
        let schema = view.snapshot.tool(&request.tool).map(|tool| (tool.kind, tool.document.to_string()));
        Explanation {
            effect: answer.decision.effect,
            reason: answer.decision.reason,
            layer: answer.decision.layer,
            hop: answer.decision.hop,
            message: answer.message,
            chain: chain.as_ref().map(|chain| chain.prepared.chain().sentence()).unwrap_or_default(),
            identities: answer.identities,
            tool_is_registered: answer.tool_is_registered,
            revision: view.snapshot.revision().clone(),
            snapshot_age_ms: answer.snapshot_age_ms,
            decision_id: answer.decision_id,
            facts: words::Facts::new(request, subject, schema),
            findings,
            proved,
        }
    }
}

impl Service {
    /// Collects the findings before policy, of policy and after policy, in the order in which `Check` asks.
    fn found(&self, request: &CheckRequest, caller: &Caller, view: &View, credited: &Credited, now: Now) -> Found {
        let snapshot = &*view.snapshot;
        let options = self.options(snapshot);
        let chain = credited.chain.prepared.chain();
        let mut found = Found { findings: Vec::new(), messages: Vec::new(), arguments: None, proof_jti: None, proved: false };
        let signed = self.show(request.proof.as_deref(), &credited.chain.prepared, &options, now);
        let audience = self.audience(request.audience.as_deref(), caller, snapshot);
        let audience = audience.and_then(|audience| chain.check_audience(audience.as_deref(), &options).map(|()| audience));
        let audience = audience.map_err(|rejection| found.refuse(rejection)).ok();
        match judge::arguments(&request.arguments_json) {
            Ok(arguments) => found.arguments = Some(arguments),
            Err(message) => {
                found.findings.push(Finding::denial(Layer::Tool, None, Reason::ArgumentRefused, Turn::Credential));
                found.messages.push((Reason::ArgumentRefused, message));
            }
        }
        let mut spent = None;
        if let (Some(audience), Some(arguments)) = (&audience, &found.arguments) {
            let tool = snapshot.tool(&request.tool);
            let per_call = tool.is_none_or(|tool| tool.needs_proof_per_call());
            let per_handle = tool.is_some_and(|tool| tool.needs_proof_per_handle());
            let expected = ProofOf { tool: &request.tool, arguments, audience: audience.as_deref() };
            let showing = signed.as_ref().and_then(|signed| signed.as_ref().ok()?.1);
            match signed.map(|signed| signed.and_then(|(signed, _)| signed.check(&expected, &options, now))) {
                Some(Ok(proof)) => {
                    found.proof_jti = Some(proof.jti().to_owned());
                    let counts_once = per_call || (request.want_handle && self.may_prove_handle(&proof, showing));
                    let early = self.ready_at.get().is_none_or(|ready_at| proof.iat_s() <= ready_at.unix_s());
                    spent = match counts_once {
                        true if early => Some(Reason::ProofStale),
                        true if self.proofs.was_used(&proof.replay_key()) => Some(Reason::ProofReplayed),
                        _ => None,
                    };
                    // The sender of a proof that was used before may have overheard it.
                    found.proved = spent.is_none();
                }
                Some(Err(rejection)) => found.refuse(rejection),
                None if per_call || (per_handle && !credited.proved) => found.refuse(Rejection {
                    reason: Reason::ProofMissing,
                    hop: None,
                    message: Reason::ProofMissing.message().to_owned(),
                }),
                None => found.proved = credited.proved,
            }
        }
        if found.findings.iter().all(|finding| finding.answer.layer != Layer::Identity) && spent.is_none() {
            found.findings.insert(0, Finding::permit(Layer::Identity));
        }
        // Without readable arguments the layers that depend on them cannot answer.
        let nothing = Object::default();
        let arguments = found.arguments.as_ref();
        let asked =
            pdp::explain(&credited.chain.prepared, &judge::call(request, arguments.unwrap_or(&nothing), now), snapshot, now);
        let known =
            |finding: &Finding| arguments.is_some() || matches!(finding.answer.layer, Layer::Identity | Layer::Revocation);
        found.findings.extend(asked.into_iter().filter(known));
        found.findings.extend(spent.map(|reason| Finding::denial(Layer::Identity, None, reason, Turn::Credential)));
        found.findings.push(match is_too_old(view, &request.tool, now) {
            true => Finding::denial(Layer::Freshness, None, Reason::Stale, Turn::Wait),
            false => Finding::permit(Layer::Freshness),
        });
        let denies_by_identity =
            |finding: &Finding| finding.answer.layer == Layer::Identity && finding.answer.effect == Effect::Deny;
        if found.findings.iter().any(denies_by_identity) {
            found.findings.retain(|finding| *finding != Finding::permit(Layer::Identity));
        }
        found
    }
}

impl Found {
    fn refuse(&mut self, rejection: Rejection) {
        let (finding, message) = refused(rejection);
        self.messages.extend(message.map(|message| (finding.answer.reason, message)));
        self.findings.push(finding);
    }
}

/// Turns a rejected credential into a finding and its message.
fn refused(rejection: Rejection) -> (Finding, Option<String>) {
    let layer = rejection.reason.layer().unwrap_or(Layer::Identity);
    (Finding::denial(layer, rejection.hop, rejection.reason, Turn::Credential), Some(rejection.message))
}

/// The decision that `Check` would make: the first denial. A missing preparation counts only if no other layer denies.
fn decided(findings: &[Finding], number: u64) -> Decision {
    let denies = |finding: &&Finding| finding.answer.effect == Effect::Deny;
    let decisive = findings
        .iter()
        .filter(denies)
        .find(|finding| finding.turn != Some(Turn::Prepare))
        .or_else(|| findings.iter().find(denies))
        .or_else(|| findings.iter().find(|finding| finding.answer.effect == Effect::NeedsApproval));
    match decisive {
        None => Decision::permit(number),
        Some(Finding { answer, .. }) => Decision {
            effect: answer.effect,
            layer: Some(answer.layer),
            matched: answer.matched.clone().map(Arc::new),
            ..Decision::deny(answer.reason, number)
        }
        .at_hop(answer.hop),
    }
}
