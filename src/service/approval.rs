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
//! Look next at `service/settle.rs`, which orders the steps.

use std::sync::Arc;

use ring::digest::{Context, SHA256};

use super::judge::Judged;
use super::request::{ApprovalRequest, Caller, CheckRequest};
use super::settle::LedgerCall;
use crate::model::approval::{
    ApprovalCall, ApprovalRow, Approvers, AskApproval, AskOutcome, Lack, OwnUse, PreparedUse, UseApprovals, WaitingShare,
};
use crate::model::decision::{ApprovalNeed, Decision, Effect, PreparedNeed};
use crate::model::ids::{GroupId, UserId};
use crate::model::json::{Object, Value};
use crate::model::limits::{
    APPROVAL_ARGUMENTS_BYTES_MAX, APPROVALS_WAITING_MAX, APPROVALS_WAITING_OF_AGENT_MAX, APPROVALS_WAITING_OF_USER_MAX,
    APPROVALS_WAITING_TOTAL_MAX,
};
use crate::model::reason::{Layer, Reason};
use crate::model::request::{Call, Subject};
use crate::model::time::Now;
use crate::pdp;
use crate::snapshot::Snapshot;

/// The approvals that a call must use before it is permitted.
#[derive(Debug)]
pub(super) struct Wanted {
    call: ApprovalCall,
    pub(super) uses: UseApprovals,
    /// One for each of `uses.prepared`.
    prepared: Vec<PreparedNeed>,
    /// The first layer that asks for the call's own approval.
    layer: Option<Layer>,
    hop: Option<usize>,
}

impl LedgerCall<'_> {
    /// Asks for the missing approval, or denies the call.
    pub(super) async fn lacking(&mut self, wanted: &Wanted, prepared: Option<usize>, lack: Lack) {
        let number = self.number();
        let judged = &mut self.judged;
        match (prepared, lack) {
            (Some(index), lack) => {
                let Some(need) = wanted.prepared.get(index) else {
                    judged.decision = Decision::deny(Reason::ApprovalRequired, number);
                    return;
                };
                let (reason, says) = unprepared(lack);
                judged.message = Some(format!("the call must be prepared: `{}` with the same arguments {says}", need.tool));
                judged.decision = denied_by(Decision::deny(reason, number), Some(need.layer), need.hop);
            }
            (None, Lack::Used) => judged.decision = wanted.denied(Reason::ApprovalUsed, number),
            (None, Lack::Refused) => judged.decision = wanted.denied(Reason::ApprovalRefused, number),
            (None, Lack::Missing | Lack::Waiting | Lack::Expired) => self.ask(wanted).await,
        }
    }

    /// Stores the approval request of a call. The decision stays as it is, or becomes a denial if the request cannot be stored.
    async fn ask(&mut self, wanted: &Wanted) {
        let number = self.number();
        let arguments_bytes = wanted.call.arguments_json.len();
        if arguments_bytes > APPROVAL_ARGUMENTS_BYTES_MAX {
            self.judged.message = Some(format!(
                "this call needs an approval, and its arguments are {arguments_bytes} bytes: over {APPROVAL_ARGUMENTS_BYTES_MAX} \
                 cannot be shown to an approver"
            ));
            self.judged.decision = wanted.denied(Reason::ApprovalRequired, number);
            return;
        }
        let needs = wanted.needs().to_vec();
        let (proof, approvers) = (wanted.uses.proof.clone(), wanted.uses.approvers.clone());
        let asked = AskApproval { call: wanted.call.clone(), needs, proof, approvers };
        match self.service.parts.approvals.ask(asked).await {
            Ok(AskOutcome::Stands(row)) => {
                let asked = self.judged.decision.clone();
                self.judge_anew();
                if self.judged.decision.effect != Effect::Deny {
                    self.judged.approval = Some(answered(&row, &asked));
                    self.judged.decision = Decision { revision: self.judged.decision.revision, ..asked };
                }
            }
            Ok(AskOutcome::Replayed) => self.judged.decision = Decision::deny(Reason::ProofReplayed, number),
            Ok(AskOutcome::OverQuota(share)) => {
                let waits = match share {
                    WaitingShare::UserAndAgent => format!("{APPROVALS_WAITING_MAX} calls of this user by this agent wait"),
                    WaitingShare::Agent => format!("{APPROVALS_WAITING_OF_AGENT_MAX} calls of this agent wait"),
                    WaitingShare::User => format!("{APPROVALS_WAITING_OF_USER_MAX} calls of this user wait"),
                    WaitingShare::Store => format!("{APPROVALS_WAITING_TOTAL_MAX} calls wait"),
                };
                self.judged.message =
                    Some(format!("this call needs an approval, and {waits} for one already: have some answered first"));
                self.judged.decision = wanted.denied(Reason::ApprovalRequired, number);
            }
            Err(error) => self.not_taken(&error),
        }
    }

    /// Repeats an earlier permit if the call would still get it. A denial is a new decision with an id of its own.
    pub(super) fn permit_again(&mut self, wanted: &Wanted, decision_id: String) {
        self.permit(wanted);
        self.judged.repeats = true;
        if self.judged.decision.effect == Effect::Permit {
            self.judged.decision_id = Some(decision_id);
        }
    }

    /// Permits an approved call, unless the newest view denies it at the current time or asks for another approval.
    pub(super) fn permit(&mut self, wanted: &Wanted) {
        let decision_id = self.judged.decision_id.take();
        self.judge_anew();
        let judged = &mut self.judged;
        judged.decision_id = decision_id;
        let again = std::mem::replace(&mut judged.decision, Decision::deny(Reason::ApprovalRequired, 0));
        judged.decision = match again.effect {
            Effect::Deny => again,
            _ if covers(wanted.needs(), &wanted.prepared, &again) => Decision {
                effect: Effect::Permit,
                reason: Reason::Ok,
                layer: None,
                hop: None,
                matched: None,
                approvals: Vec::new(),
                prepared: Vec::new(),
                ..again
            },
            _ => {
                judged.message = Some("what must be approved changed while the approval was used: ask again".to_owned());
                denied_by(Decision::deny(Reason::ApprovalRequired, again.revision), again.layer, again.hop)
            }
        };
    }
}

impl Wanted {
    /// The approvals that a judged call must use; `None` if it needs none.
    pub(super) fn of(
        judged: &Judged,
        request: &CheckRequest,
        caller: &Caller,
        decision_id: &str,
        (snapshot, now): (&Arc<Snapshot>, Now),
    ) -> Option<Self> {
        let decision = &judged.decision;
        if !judged.wants_approval() {
            return None;
        }
        let (chain, arguments) = (judged.chain.as_ref()?, judged.arguments.as_ref()?);
        let subject = chain.prepared.subject();
        let call = call(subject, &request.tool, arguments);
        let own = (decision.effect == Effect::NeedsApproval)
            .then(|| OwnUse { digest: call.digest.clone(), needs: decision.approvals.clone() });
        let prepared = decision.prepared.iter().map(|need| PreparedUse {
            digest: digest(subject, &need.tool, arguments),
            needs: prepared_now(judged, request, need, snapshot, now).map(|now| now.approvals).unwrap_or_default(),
        });
        let fingerprint = fingerprint(caller.gateway(), request, &chain.tokens);
        Some(Self {
            call,
            uses: UseApprovals {
                own,
                prepared: prepared.collect(),
                decision_id: decision_id.to_owned(),
                fingerprint,
                approvers: approvers(snapshot.clone()),
                ..UseApprovals::default()
            },
            prepared: decision.prepared.clone(),
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

    fn denied(&self, reason: Reason, number: u64) -> Decision {
        denied_by(Decision::deny(reason, number), self.layer, self.hop)
    }

    fn needs(&self) -> &[ApprovalNeed] {
        self.uses.own.as_ref().map(|own| own.needs.as_slice()).unwrap_or_default()
    }
}

/// A check of whose approvals still count, by the documents and the revocations of a snapshot.
fn approvers(snapshot: Arc<Snapshot>) -> Approvers {
    Approvers::new(move |call, layer| {
        let user = UserId::new(call.issuer.as_str(), call.subject.as_str());
        let operator = layer.approved_by.as_deref().unwrap_or_default();
        snapshot.may_approve(operator, layer.approved_key.as_deref(), &layer.by, &user)
    })
}

/// Decides the call that must have been prepared, by the current snapshot. Returns `None` if there is no chain to decide it for.
fn prepared_now(judged: &Judged, request: &CheckRequest, need: &PreparedNeed, snapshot: &Snapshot, now: Now) -> Option<Decision> {
    let (chain, arguments) = (judged.chain.as_ref()?, judged.arguments.as_ref()?);
    let call = Call {
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
pub(super) fn unpermitted(judged: &Judged, request: &CheckRequest, snapshot: &Snapshot, now: Now) -> Option<(Decision, String)> {
    judged.decision.prepared.iter().find_map(|need| {
        let decision = prepared_now(judged, request, need, snapshot, now).filter(|now| now.effect == Effect::Deny)?;
        Some((decision, format!("the call must be prepared, and `{}` is not permitted any more", need.tool)))
    })
}

/// Whether the used approvals cover every approval that the later decision asks for.
pub(super) fn covers(needs: &[ApprovalNeed], prepared: &[PreparedNeed], again: &Decision) -> bool {
    again.approvals.iter().all(|need| needs.contains(need)) && again.prepared.iter().all(|need| prepared.contains(need))
}

fn denied_by(decision: Decision, layer: Option<Layer>, hop: Option<usize>) -> Decision {
    Decision { layer, ..decision }.at_hop(hop)
}

fn unprepared(lack: Lack) -> (Reason, &'static str) {
    match lack {
        Lack::Missing => (Reason::ApprovalRequired, "was not asked for"),
        Lack::Waiting => (Reason::ApprovalRequired, "waits for its approval"),
        Lack::Expired => (Reason::ApprovalExpired, "was approved too long ago"),
        Lack::Used => (Reason::ApprovalUsed, "was used for another call"),
        Lack::Refused => (Reason::ApprovalRefused, "was refused"),
    }
}

/// The stored request as the caller sees it: the groups that can still approve, and the expiry.
fn answered(row: &ApprovalRow, decision: &Decision) -> ApprovalRequest {
    let waits = |need: &&ApprovalNeed| !row.layers.iter().any(|layer| layer.is_of(need) && layer.approved_by.is_some());
    let waiting = decision.approvals.iter().filter(waits);
    let mut approvers: Vec<GroupId> = waiting.flat_map(|need| need.by.iter().cloned()).collect();
    approvers.sort();
    approvers.dedup();
    ApprovalRequest { digest: row.call.digest.clone(), approvers, expires_at_unix_ms: row.expires_at_unix_ms() }
}

fn call(subject: &Subject, tool: &str, arguments: &Object) -> ApprovalCall {
    let mut arguments_json = String::new();
    arguments.write_jcs(&mut arguments_json);
    ApprovalCall {
        digest: digest(subject, tool, arguments),
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
fn digest(subject: &Subject, tool: &str, arguments: &Object) -> String {
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
    hex(ring::digest::digest(&SHA256, parts.to_jcs().as_bytes()))
}

/// The fingerprint of one request of one gateway: SHA-256 over gateway, `request_id`, credential and proof, each prefixed with its length.
///
/// A request without an id never equals another request. A handle counts as the tokens that it stands for.
pub(super) fn fingerprint(gateway: &str, request: &CheckRequest, tokens: &[bytes::Bytes]) -> Option<String> {
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
    Some(hex(context.finish()))
}

fn hex(digest: ring::digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
