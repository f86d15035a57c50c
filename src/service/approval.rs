//! Approvals around a decision: what a call asks for is stored before it is answered so, and what was approved is used once.
//!
//! ```text
//! judged NEEDS_APPROVAL, or demands `prepared` ─▶ proof spent ─▶ used? ─yes─▶ decided again ─▶ PERMIT
//!                                                                 └──no──▶ asked ─▶ NEEDS_APPROVAL
//! ```
//!
//! INVARIANT: an approval lifts what layers ask for and nothing else; after its use the call is decided again and a denial wins.
//! Where a row goes from one state to the next is the store's business; this knows it through `ports::ApprovalLedger`.

use ring::digest::{Context, SHA256};

use super::judge::{self, Judged};
use super::request::{ApprovalRequest, Caller, CheckRequest};
use super::{Service, decision_id, is_too_old};
use crate::model::approval::{ApprovalCall, ApprovalRow, AskApproval, AskOutcome, Lack, OwnUse, UseApprovals, UseOutcome};
use crate::model::decision::{ApprovalNeed, Decision, Effect, PreparedNeed};
use crate::model::ids::GroupId;
use crate::model::json::{Object, Value};
use crate::model::limits::{APPROVAL_ARGUMENTS_BYTES_MAX, APPROVALS_WAITING_MAX};
use crate::model::reason::{Layer, Reason};
use crate::model::request::Subject;
use crate::pdp;
use crate::snapshot::View;

/// What a call must use before it is permitted.
#[derive(Debug)]
struct Wanted {
    call: ApprovalCall,
    uses: UseApprovals,
    /// One for each of `uses.prepared`.
    prepared: Vec<PreparedNeed>,
    /// The layer that asks for the call's own approval, the first of them.
    layer: Option<Layer>,
    hop: Option<usize>,
}

impl Service {
    /// Does for a call that was not denied what must be done in the store before it is answered: its proof is spent, what it asks
    /// for is stored, what was approved is used.
    pub(super) async fn settle(&self, judged: &mut Judged, request: &CheckRequest, caller: &Caller, view: &View) {
        let wanted = Wanted::of(judged, request, caller, decision_id::new(self.parts.clock.now()));
        if let Some(wanted) = &wanted {
            judged.approval_digest = Some(wanted.digest().to_owned());
            // What would be denied in the end must not use anything up.
            if is_too_old(view, &request.tool, self.parts.clock.now()) {
                judged.decision = Decision::deny(Reason::Stale, view.snapshot.revision().number);
                return;
            }
        }
        let denial = self.spend_proof(judged, request, view).await;
        match (denial, wanted) {
            (None, None) => {}
            (None, Some(wanted)) => self.lift(judged, request, view, &wanted).await,
            (Some(denial), wanted) => {
                let of_proof = matches!(denial.reason, Reason::ProofReplayed | Reason::ProofStale);
                if let (true, Some(wanted)) = (of_proof, &wanted)
                    && let Ok(Some(decision_id)) = self.parts.approvals.repeated(&wanted.uses).await
                {
                    // A gateway that lost its answer asks again: the proof was spent by the call that is answered again.
                    judged.message = None;
                    self.permit_again(judged, request, view, wanted, decision_id);
                } else {
                    judged.decision = denial;
                }
            }
        }
    }

    /// Uses what was approved, or asks.
    async fn lift(&self, judged: &mut Judged, request: &CheckRequest, view: &View, wanted: &Wanted) {
        let number = view.snapshot.revision().number;
        let (prepared, lack) = match self.parts.approvals.use_once(wanted.uses.clone()).await {
            Ok(UseOutcome::Used) => {
                judged.decision_id = Some(wanted.uses.decision_id.clone());
                return self.permit(judged, request, view, wanted);
            }
            Ok(UseOutcome::Repeated { decision_id }) => return self.permit_again(judged, request, view, wanted, decision_id),
            Ok(UseOutcome::Lacking { prepared, lack }) => (prepared, lack),
            Err(error) => {
                tracing::warn!(%error, "an approval could not be used in the store");
                judged.message = Some("the use of the approval could not be recorded in the store: ask again".to_owned());
                judged.decision = Decision::deny(Reason::Stale, number);
                return;
            }
        };
        match prepared {
            Some(index) => {
                let Some(need) = wanted.prepared.get(index) else {
                    judged.decision = Decision::deny(Reason::ApprovalRequired, number);
                    return;
                };
                let (reason, says) = unprepared(lack);
                judged.message = Some(format!("the call must be prepared: `{}` with the same arguments {says}", need.tool));
                judged.decision = denied_by(Decision::deny(reason, number), Some(need.layer), need.hop);
            }
            None => match lack {
                Lack::Used => judged.decision = wanted.denied(Reason::ApprovalUsed, number),
                Lack::Refused => judged.decision = wanted.denied(Reason::ApprovalRefused, number),
                Lack::Missing | Lack::Waiting | Lack::Expired => self.ask(judged, wanted, number).await,
            },
        }
    }

    /// Stores that the call asks; the decision stays what it is, or becomes a denial where that cannot be.
    async fn ask(&self, judged: &mut Judged, wanted: &Wanted, number: u64) {
        let arguments_bytes = wanted.call.arguments_json.len();
        if arguments_bytes > APPROVAL_ARGUMENTS_BYTES_MAX {
            judged.message = Some(format!(
                "this call needs an approval, and its arguments are {arguments_bytes} bytes: over {APPROVAL_ARGUMENTS_BYTES_MAX} \
                 cannot be shown to an approver"
            ));
            judged.decision = wanted.denied(Reason::ApprovalRequired, number);
            return;
        }
        let request = AskApproval { call: wanted.call.clone(), needs: judged.decision.approvals.clone() };
        match self.parts.approvals.ask(request).await {
            Ok(AskOutcome::Stands(row)) => judged.approval = Some(answered(&row, &judged.decision)),
            Ok(AskOutcome::OverQuota) => {
                judged.message = Some(format!(
                    "this call needs an approval, and {APPROVALS_WAITING_MAX} calls of this agent wait for one already: have some \
                     answered first"
                ));
                judged.decision = wanted.denied(Reason::ApprovalRequired, number);
            }
            Err(error) => {
                tracing::warn!(%error, "a request for an approval could not be stored");
                judged.message = Some("the request for an approval could not be recorded in the store: ask again".to_owned());
                judged.decision = Decision::deny(Reason::Stale, number);
            }
        }
    }

    /// The answer of before, if the call would still get it; a denial is another decision, with an id of its own.
    fn permit_again(&self, judged: &mut Judged, request: &CheckRequest, view: &View, wanted: &Wanted, decision_id: String) {
        self.permit(judged, request, view, wanted);
        if judged.decision.effect == Effect::Permit {
            judged.decision_id = Some(decision_id);
        }
    }

    /// Permits what was approved, unless the call decided again, on the same view at the time it is now, comes out worse.
    fn permit(&self, judged: &mut Judged, request: &CheckRequest, view: &View, wanted: &Wanted) {
        let (Some(chain), Some(arguments)) = (&judged.chain, &judged.arguments) else {
            return;
        };
        let now = self.parts.clock.now();
        let again = pdp::decide(&chain.prepared, &judge::call(request, arguments, now), &view.snapshot, now);
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
    /// What a judged call must use; `None` if it needs no approval of any kind.
    fn of(judged: &Judged, request: &CheckRequest, caller: &Caller, decision_id: String) -> Option<Self> {
        let decision = &judged.decision;
        if decision.effect != Effect::NeedsApproval && decision.prepared.is_empty() {
            return None;
        }
        let (chain, arguments) = (judged.chain.as_ref()?, judged.arguments.as_ref()?);
        let subject = chain.prepared.subject();
        let call = call(subject, &request.tool, arguments);
        let own = (decision.effect == Effect::NeedsApproval)
            .then(|| OwnUse { digest: call.digest.clone(), needs: decision.approvals.clone() });
        let prepared = decision.prepared.iter().map(|need| digest(subject, &need.tool, arguments)).collect();
        let fingerprint = fingerprint(caller.gateway(), request, &chain.tokens);
        Some(Self {
            call,
            uses: UseApprovals { own, prepared, decision_id, fingerprint },
            prepared: decision.prepared.clone(),
            layer: decision.layer,
            hop: decision.hop,
        })
    }

    /// The digest for the record: the call's own, or that of the first call that must have been prepared.
    fn digest(&self) -> &str {
        match (&self.uses.own, self.uses.prepared.first()) {
            (None, Some(prepared)) => prepared,
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

/// Whether all that a later decision asks for is what was used.
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

/// What the caller is told of a request that stands: who can still approve, and until when.
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

/// Hex SHA-256 of the JCS array `[iss, sub, client_id, [agent SPIFFE ids], sid, txn, tool, arguments]`.
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

/// Names the very request of the very gateway: SHA-256 over gateway, `request_id`, credential and proof, each with its length.
///
/// A request without an id is never the same as another. A handle counts as the tokens that it stands for.
fn fingerprint(gateway: &str, request: &CheckRequest, tokens: &[bytes::Bytes]) -> Option<String> {
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
