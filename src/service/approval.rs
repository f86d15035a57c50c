//! The approvals of a decision. A request for an approval is stored before the call is answered with it, and an approval is used once.
//!
//! ```text
//! judged NEEDS_APPROVAL, or demands `prepared` ─▶ approved? ─yes─▶ use the approval, judge again ─▶ PERMIT
//!                                                     └──no──▶ store the request ────────────▶ NEEDS_APPROVAL
//! ```
//!
//! INVARIANT: an approval satisfies only the layers that ask for one. After its use the call is judged again, and a denial wins.
//!
//! This module must not know the states of an approval row. The store owns them, and this module uses `ports::ApprovalLedger`.
//! Look next at `service/ledger_task.rs`, which orders the steps.

use std::sync::Arc;

use ring::digest::{Context, SHA256};

use super::judgement::Judgement;
use super::ledger_call::LedgerCall;
use super::request::{ApprovalRequest, Caller, DecisionRequest};
use crate::model::approval::{
    ApprovalCall, ApprovalQuota, ApprovalRow, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseRequest, ApproverCheck,
    OwnApprovalUse, PreparationApprovalUse, UnusableCause,
};
use crate::model::decision::{ApprovalNeed, Decision, Effect, PreparationNeed};
use crate::model::ids::{GroupId, UserId};
use crate::model::json::{JsonObject, Value};
use crate::model::limits::{
    APPROVAL_ARGUMENTS_BYTES_MAX, APPROVALS_WAITING_MAX, APPROVALS_WAITING_OF_AGENT_MAX, APPROVALS_WAITING_OF_USER_MAX,
    APPROVALS_WAITING_TOTAL_MAX,
};
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::{DelegationSubject, ToolCall};
use crate::model::time::ClockReading;
use crate::pdp;
use crate::snapshot::Snapshot;

/// The approvals that a call must use before it is permitted.
#[derive(Debug)]
pub(super) struct ApprovalRequirement {
    call: ApprovalCall,
    pub(super) uses: ApprovalUseRequest,
    /// One for each of `uses.prepared`.
    prepared_needs: Vec<PreparationNeed>,
    /// The first layer that asks for the call's own approval.
    layer: Option<DecisionLayer>,
    hop: Option<usize>,
}

impl LedgerCall<'_> {
    /// Asks for the missing approval, or denies the call.
    pub(super) async fn ask_or_deny(&mut self, requirement: &ApprovalRequirement, prepared: Option<usize>, cause: UnusableCause) {
        let number = self.number();
        let judgement = &mut self.judgement;
        match (prepared, cause) {
            (Some(index), cause) => {
                let Some(need) = requirement.prepared_needs.get(index) else {
                    judgement.decision = Decision::deny(Reason::ApprovalRequired, number);
                    return;
                };
                let (reason, says) = unusable_reason(cause);
                judgement.message = Some(format!("the call must be prepared: `{}` with the same arguments {says}", need.tool));
                judgement.decision = with_layer(Decision::deny(reason, number), Some(need.layer), need.hop);
            }
            (None, UnusableCause::Used) => judgement.decision = requirement.denial(Reason::ApprovalUsed, number),
            (None, UnusableCause::Refused) => judgement.decision = requirement.denial(Reason::ApprovalRefused, number),
            (None, UnusableCause::Missing | UnusableCause::Waiting | UnusableCause::Expired) => {
                self.ask_approval(requirement).await
            }
        }
    }

    /// Stores the approval request of a call. The decision stays as it is, or becomes a denial if the request cannot be stored.
    async fn ask_approval(&mut self, requirement: &ApprovalRequirement) {
        let number = self.number();
        let arguments_bytes = requirement.call.arguments_json.len();
        if arguments_bytes > APPROVAL_ARGUMENTS_BYTES_MAX {
            self.judgement.message = Some(format!(
                "this call needs an approval, and its arguments are {arguments_bytes} bytes: over {APPROVAL_ARGUMENTS_BYTES_MAX} \
                 cannot be shown to an approver"
            ));
            self.judgement.decision = requirement.denial(Reason::ApprovalRequired, number);
            return;
        }
        let needs = requirement.own_needs().to_vec();
        let (proof, approvers) = (requirement.uses.proof.clone(), requirement.uses.approvers.clone());
        let asked = ApprovalSubmission { call: requirement.call.clone(), needs, proof, approvers };
        match self.service.parts.approvals.ask_approval(asked).await {
            Ok(ApprovalSubmissionOutcome::Stored(row)) => {
                let asked = self.judgement.decision.clone();
                self.rejudge_by_newest_view();
                if self.judgement.decision.effect != Effect::Deny {
                    self.judgement.approval = Some(approval_request(&row, &asked));
                    self.judgement.decision = Decision { revision: self.judgement.decision.revision, ..asked };
                }
            }
            Ok(ApprovalSubmissionOutcome::Replayed) => self.judgement.decision = Decision::deny(Reason::ProofReplayed, number),
            Ok(ApprovalSubmissionOutcome::OverQuota(share)) => {
                let waits = match share {
                    ApprovalQuota::UserAndAgent => format!("{APPROVALS_WAITING_MAX} calls of this user by this agent wait"),
                    ApprovalQuota::Agent => format!("{APPROVALS_WAITING_OF_AGENT_MAX} calls of this agent wait"),
                    ApprovalQuota::User => format!("{APPROVALS_WAITING_OF_USER_MAX} calls of this user wait"),
                    ApprovalQuota::Store => format!("{APPROVALS_WAITING_TOTAL_MAX} calls wait"),
                };
                self.judgement.message =
                    Some(format!("this call needs an approval, and {waits} for one already: have some answered first"));
                self.judgement.decision = requirement.denial(Reason::ApprovalRequired, number);
            }
            Err(error) => self.deny_ledger_error(&error),
        }
    }

    /// Repeats an earlier permit if the call would still get it. A denial is a new decision with an id of its own.
    pub(super) fn repeat_permit(&mut self, requirement: &ApprovalRequirement, decision_id: String) {
        self.permit_approved(requirement);
        self.judgement.is_repeat = true;
        if self.judgement.decision.effect == Effect::Permit {
            self.judgement.decision_id = Some(decision_id);
        }
    }

    /// Permits an approved call, unless the newest view denies it at the current time or asks for another approval.
    pub(super) fn permit_approved(&mut self, requirement: &ApprovalRequirement) {
        let decision_id = self.judgement.decision_id.take();
        self.rejudge_by_newest_view();
        let judgement = &mut self.judgement;
        judgement.decision_id = decision_id;
        let again = std::mem::replace(&mut judgement.decision, Decision::deny(Reason::ApprovalRequired, 0));
        judgement.decision = match again.effect {
            Effect::Deny => again,
            _ if covers_needs(requirement.own_needs(), &requirement.prepared_needs, &again) => Decision {
                effect: Effect::Permit,
                reason: Reason::Ok,
                layer: None,
                hop: None,
                matched: None,
                approvals: Vec::new(),
                prepared_needs: Vec::new(),
                ..again
            },
            _ => {
                judgement.message = Some("what must be approved changed while the approval was used: ask again".to_owned());
                with_layer(Decision::deny(Reason::ApprovalRequired, again.revision), again.layer, again.hop)
            }
        };
    }
}

impl ApprovalRequirement {
    /// The approvals that a judged call must use; `None` if it needs none.
    pub(super) fn for_judgement(
        judgement: &Judgement,
        request: &DecisionRequest,
        caller: &Caller,
        decision_id: &str,
        (snapshot, now): (&Arc<Snapshot>, ClockReading),
    ) -> Option<Self> {
        let decision = &judgement.decision;
        if !judgement.needs_approval() {
            return None;
        }
        let (chain, arguments) = (judgement.chain.as_ref()?, judgement.arguments.as_ref()?);
        let subject = chain.prepared.subject();
        let call = approval_call(subject, &request.tool, arguments);
        let own = (decision.effect == Effect::NeedsApproval)
            .then(|| OwnApprovalUse { digest: call.digest.clone(), needs: decision.approvals.clone() });
        let prepared = decision.prepared_needs.iter().map(|need| PreparationApprovalUse {
            digest: call_digest(subject, &need.tool, arguments),
            needs: decide_prepared_call(judgement, request, need, snapshot, now).map(|now| now.approvals).unwrap_or_default(),
        });
        let fingerprint = request_fingerprint(caller.gateway_host(), request, &chain.tokens);
        Some(Self {
            call,
            uses: ApprovalUseRequest {
                own,
                prepared: prepared.collect(),
                decision_id: decision_id.to_owned(),
                fingerprint,
                approvers: approver_check(snapshot.clone()),
                ..ApprovalUseRequest::default()
            },
            prepared_needs: decision.prepared_needs.clone(),
            layer: decision.layer,
            hop: decision.hop,
        })
    }

    /// The digest for the audit record: of the call itself, or of the first call that prepares it.
    pub(super) fn digest(&self) -> &str {
        match (&self.uses.own, self.uses.prepared.first()) {
            (None, Some(prepared)) => &prepared.digest,
            _ => &self.call.digest,
        }
    }

    fn denial(&self, reason: Reason, number: u64) -> Decision {
        with_layer(Decision::deny(reason, number), self.layer, self.hop)
    }

    fn own_needs(&self) -> &[ApprovalNeed] {
        self.uses.own.as_ref().map(|own| own.needs.as_slice()).unwrap_or_default()
    }
}

/// A check of whose approvals still count, by the documents and the revocations of a snapshot.
fn approver_check(snapshot: Arc<Snapshot>) -> ApproverCheck {
    ApproverCheck::new(move |call, layer| {
        let user = UserId::new(call.issuer.as_str(), call.subject.as_str());
        let operator = layer.approved_by.as_deref().unwrap_or_default();
        snapshot.may_approve(operator, layer.approved_key.as_deref(), &layer.by, &user)
    })
}

/// Decides the call that must have been prepared, by the current snapshot. Returns `None` if there is no chain to decide it for.
fn decide_prepared_call(
    judgement: &Judgement,
    request: &DecisionRequest,
    need: &PreparationNeed,
    snapshot: &Snapshot,
    now: ClockReading,
) -> Option<Decision> {
    let (chain, arguments) = (judgement.chain.as_ref()?, judgement.arguments.as_ref()?);
    let call = ToolCall {
        tool: &need.tool,
        // The schema of the earlier call is not recorded, so the registered schema is the closest check.
        tool_schema_sha256: snapshot.tool(&need.tool).and_then(|tool| tool.schema_sha256),
        arguments,
        environment: request.environment.as_ref(),
        unix_s: now.unix_s(),
    };
    Some(pdp::decide(&chain.prepared, &call, snapshot, now))
}

/// Finds a preparing call that is no longer permitted. Returns its denial and a message.
pub(super) fn find_denied_prepared_call(
    judgement: &Judgement,
    request: &DecisionRequest,
    snapshot: &Snapshot,
    now: ClockReading,
) -> Option<(Decision, String)> {
    judgement.decision.prepared_needs.iter().find_map(|need| {
        let decision = decide_prepared_call(judgement, request, need, snapshot, now).filter(|now| now.effect == Effect::Deny)?;
        Some((decision, format!("the call must be prepared, and `{}` is not permitted any more", need.tool)))
    })
}

/// Whether the used approvals cover every approval that the later decision asks for.
pub(super) fn covers_needs(needs: &[ApprovalNeed], prepared: &[PreparationNeed], again: &Decision) -> bool {
    again.approvals.iter().all(|need| needs.contains(need)) && again.prepared_needs.iter().all(|need| prepared.contains(need))
}

fn with_layer(decision: Decision, layer: Option<DecisionLayer>, hop: Option<usize>) -> Decision {
    Decision { layer, ..decision }.with_hop(hop)
}

fn unusable_reason(cause: UnusableCause) -> (Reason, &'static str) {
    match cause {
        UnusableCause::Missing => (Reason::ApprovalRequired, "was not asked for"),
        UnusableCause::Waiting => (Reason::ApprovalRequired, "waits for its approval"),
        UnusableCause::Expired => (Reason::ApprovalExpired, "was approved too long ago"),
        UnusableCause::Used => (Reason::ApprovalUsed, "was used for another call"),
        UnusableCause::Refused => (Reason::ApprovalRefused, "was refused"),
    }
}

/// The stored request as the caller sees it: the groups that can still approve, and the expiry.
fn approval_request(row: &ApprovalRow, decision: &Decision) -> ApprovalRequest {
    let waits = |need: &&ApprovalNeed| !row.layers.iter().any(|layer| layer.matches_need(need) && layer.approved_by.is_some());
    let waiting = decision.approvals.iter().filter(waits);
    let mut approvers: Vec<GroupId> = waiting.flat_map(|need| need.approver_groups.iter().cloned()).collect();
    approvers.sort();
    approvers.dedup();
    ApprovalRequest { digest: row.call.digest.clone(), approvers, expires_at_unix_ms: row.expires_at_unix_ms() }
}

fn approval_call(subject: &DelegationSubject, tool: &str, arguments: &JsonObject) -> ApprovalCall {
    let mut arguments_json = String::new();
    arguments.write_jcs(&mut arguments_json);
    ApprovalCall {
        digest: call_digest(subject, tool, arguments),
        issuer: subject.user.issuer.to_string(),
        subject: subject.user.subject.to_string(),
        application: subject.application.to_string(),
        agents: subject.agents.iter().map(ToString::to_string).collect(),
        session: subject.session.to_string(),
        task: subject.task.to_string(),
        tool: tool.to_owned(),
        arguments_json,
    }
}

/// The hex SHA-256 of the JCS array `[iss, sub, client_id, [agent SPIFFE ids], sid, txn, tool, arguments]`.
fn call_digest(subject: &DelegationSubject, tool: &str, arguments: &JsonObject) -> String {
    let text = |text: &str| Value::String(text.to_owned());
    let parts = Value::Array(vec![
        text(subject.user.issuer.as_str()),
        text(&subject.user.subject),
        text(subject.application.as_str()),
        Value::Array(subject.agents.iter().map(|agent| text(agent.as_str())).collect()),
        text(subject.session.as_str()),
        text(subject.task.as_str()),
        text(tool),
        Value::Object(arguments.clone()),
    ]);
    digest_to_hex(ring::digest::digest(&SHA256, parts.to_jcs().as_bytes()))
}

/// The fingerprint of one request of one gateway: SHA-256 over gateway, `request_id`, credential and proof, each prefixed with its length.
///
/// A request without an id never equals another request. A request with a handle equals a request with the tokens of the handle's
/// chain.
pub(super) fn request_fingerprint(gateway: &str, request: &DecisionRequest, tokens: &[bytes::Bytes]) -> Option<String> {
    if request.request_id.is_empty() {
        return None;
    }
    let proof = request.proof.as_deref().unwrap_or_default();
    let mut context = Context::new(&SHA256);
    let parts =
        [gateway.as_bytes(), request.request_id.as_bytes(), proof].into_iter().chain(tokens.iter().map(|token| &token[..]));
    for part in parts {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
    Some(digest_to_hex(context.finish()))
}

fn digest_to_hex(digest: ring::digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
