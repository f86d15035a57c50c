//! Uses the ledgers of the store for a call before it is answered: it spends the call's proof and uses its approvals.
//!
//! ```text
//! judged ─▶ ledger permit? ─▶ proof new here? ─▶ use the ledgers, at the judged revision ─▶ judge again ─▶ record
//!                 └─ LEDGER_BUSY     └─ PROOF_REPLAYED   └─ nothing used: LEDGER_BUSY, or ask     └─ denied: give back
//! ```
//!
//! INVARIANT: a call that writes to the store always reaches its audit record, even if its caller stops waiting. So it runs in a
//! task of its own, and the number of these tasks is bounded.
//!
//! INVARIANT: after the store has answered, the call is judged again by the newest view, that is, its snapshot and its proof of
//! freshness together. A view from before the wait decides nothing any more.
//!
//! Look next at `service/approval.rs`.

use tokio::sync::oneshot;

use super::approval::{ApprovalRequirement, find_denied_prepared_call};
use super::judgement::Judgement;
use super::ledger_call::LedgerCall;
use super::ledger_quota::LedgerFull;
use super::ports::LedgerError;
use super::replay_cache::SpendOutcome;
use super::request::{Caller, CheckAnswer, DecisionRequest};
use super::{PdpService, PendingAnswer, RuntimeService, decision_id, is_too_old};
use crate::model::approval::{ApprovalUseOutcome, ApprovalUseRequest, ProofUse};
use crate::model::decision::{Decision, Effect};
use crate::model::limits::PROOF_WINDOW_S;
use crate::model::reason::Reason;
use crate::model::revision::Revision;
use crate::model::time::ClockReading;
use crate::snapshot::SnapshotView;

/// Limit of the attempts to use a ledger while the store is at another revision than the judgement.
const ATTEMPTS_MAX: usize = 4;
/// Limit of the attempts to give approvals back.
const GIVE_BACK_ATTEMPTS_MAX: usize = 2;

/// A judged call on its way through the ledgers to its audit record.
struct LedgerTask {
    runtime_service: RuntimeService,
    request: DecisionRequest,
    caller: Caller,
    view: SnapshotView,
    judgement: Judgement,
    started: ClockReading,
}

impl RuntimeService {
    /// Uses the ledgers that a call needs, and answers. The answer is confirmed when this function returns.
    pub(super) async fn run_ledger_task(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        view: SnapshotView,
        mut judgement: Judgement,
        started: ClockReading,
    ) -> (CheckAnswer, PendingAnswer) {
        let number = view.snapshot.revision().number;
        // What is not denied has a chain.
        let holder = judgement.chain.as_ref().map(|chain| self.service.replay_cache.proof_holder(chain.prepared.subject()));
        let permit = match holder.map_or(Err(LedgerFull::Runtime), |holder| self.ledger_quota.try_acquire(holder)) {
            Ok(permit) => permit,
            Err(full) => {
                judgement.decision = Decision::deny(Reason::LedgerBusy, number);
                judgement.message = Some(full.message().to_owned());
                return self.record_and_answer(request, caller, view, judgement, started);
            }
        };
        let (runtime_service, original_view) = (self.clone(), view.clone());
        let task = LedgerTask { runtime_service, request: request.clone(), caller: caller.clone(), view, judgement, started };
        let (reply, answered) = oneshot::channel();
        (self.service.parts.spawn)(Box::pin(async move {
            let answered = task.run().await;
            drop(permit);
            // The caller may have stopped waiting. The decision is recorded all the same.
            let _ = reply.send(answered);
        }));
        match answered.await {
            // Time has passed between the two tasks. A barrier that passed since then must leave no answer from before it.
            Ok((answer, pending)) => self.confirm_pending(request, caller, answer, pending),
            Err(_) => {
                let lost = Judgement::from_denial(Decision::deny(Reason::LedgerUnknown, number));
                self.record_and_answer(request, caller, original_view, lost, started)
            }
        }
    }
}

impl RuntimeService {
    /// Waits until every call of this runtime that uses a ledger has its audit record. It admits no new such call meanwhile.
    pub async fn wait_for_ledger_tasks(&self) {
        self.ledger_quota.wait_until_idle().await;
    }
}

impl LedgerFull {
    fn message(self) -> &'static str {
        match self {
            Self::Runtime => "too many calls wait for the store here, and nothing was used: ask again",
            Self::Holder => {
                "this agent has too many calls that wait for the store here, for this user or in all, and nothing was used: ask again"
            }
        }
    }
}

impl LedgerTask {
    /// Uses the ledgers, records the decision, and gives the approvals back if the call is denied.
    async fn run(self) -> (CheckAnswer, PendingAnswer) {
        let Self { runtime_service, request, caller, view, judgement, started } = self;
        let service = &runtime_service.service;
        // The effect by policy alone. An approval may change it, and shadow documents are compared with policy only.
        let policy_effect = judgement.decision.effect;
        let mut call = LedgerCall { service, request: &request, caller: &caller, view, judgement };
        let used = call.use_ledgers().await;
        let LedgerCall { view, judgement, .. } = call;
        let (answer, mut pending) = runtime_service.record_and_answer(&request, &caller, view, judgement, started);
        if answer.decision.shadow_decision.is_some() {
            service.count_shadow_decision(&request.tool, policy_effect, &answer);
        }
        match used {
            Some(used) if answer.decision.effect == Effect::Deny => service.give_back_approvals(used).await,
            used => pending.used_approvals = used,
        }
        (answer, pending)
    }
}

impl PdpService {
    /// Spends a proof on this replica alone. Returns a denial if it cannot be spent.
    pub(super) fn spend_locally(&self, judgement: &mut Judgement, view: &SnapshotView) -> Option<Decision> {
        let proof = judgement.single_use_proof.as_ref()?;
        let number = view.snapshot.revision().number;
        if self.ready_at.get().is_none_or(|ready_at| proof.iat_s() <= ready_at.unix_s()) {
            judgement.message = Some("the proof was made before this replica was ready: make a new one".to_owned());
            return Some(Decision::deny(Reason::ProofStale, number));
        }
        let holder = self.replay_cache.proof_holder(judgement.chain.as_ref()?.prepared.subject());
        match self.replay_cache.spend(&proof.replay_key(), holder, self.parts.clock.now()) {
            SpendOutcome::First => None,
            SpendOutcome::Replayed => Some(Decision::deny(Reason::ProofReplayed, number)),
            SpendOutcome::ShareFull => {
                let why = "this agent has too many proofs in use on this replica, for this user or in all, and nothing was used: ask \
                           another replica, or again in a minute";
                judgement.message = Some(why.to_owned());
                Some(Decision::deny(Reason::LedgerBusy, number))
            }
        }
    }

    pub(super) fn unspend_locally(&self, judgement: &Judgement) {
        if let (Some(proof), Some(chain)) = (&judgement.single_use_proof, &judgement.chain) {
            self.replay_cache.unspend(&proof.replay_key(), self.replay_cache.proof_holder(chain.prepared.subject()));
        }
    }

    /// Gives back the approvals of a call that is denied in the end.
    pub(super) async fn give_back_approvals(&self, used: ApprovalUseRequest) {
        for _ in 0..GIVE_BACK_ATTEMPTS_MAX {
            match self.parts.approvals.give_back_approvals(used.clone()).await {
                Ok(true) => return,
                Ok(false) => {
                    tracing::info!(
                        decision = used.decision_id,
                        "an approval stays used: its decision was given again, or is over"
                    );
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, decision = used.decision_id, "an approval of a denied call could not be given back");
                }
            }
        }
    }
}

impl LedgerCall<'_> {
    /// Uses the ledgers that the call needs. Returns the used approvals, so that they can be given back if the call is denied.
    pub(super) async fn use_ledgers(&mut self) -> Option<ApprovalUseRequest> {
        let decision_id = decision_id::new(self.service.parts.clock.now());
        let mut requirement = self.approval_requirement(&decision_id);
        self.judgement.approval_digest = requirement.as_ref().map(|requirement| requirement.digest().to_owned());
        // INVARIANT: a call that would be denied in the end uses nothing.
        if is_too_old(&self.view, &self.request.tool, self.service.parts.clock.now()) {
            self.judgement.decision = Decision::deny(Reason::Stale, self.number());
            return None;
        }
        if self.deny_unprepared() {
            return None;
        }
        if let Some(denial) = self.service.spend_locally(&mut self.judgement, &self.view) {
            self.repeat_or_deny(requirement, denial).await;
            return None;
        }
        for _ in 0..ATTEMPTS_MAX {
            let proof = ledger_proof_use(&self.judgement);
            let head = match &mut requirement {
                None => {
                    let proof = proof?;
                    match self.service.parts.ledger.spend(proof.key, proof.expires_at_unix_s).await {
                        Ok(true) => self.rejudge_by_newest_view(),
                        Ok(false) => self.judgement.decision = Decision::deny(Reason::ProofReplayed, self.number()),
                        Err(error) => self.deny_ledger_error(&error),
                    }
                    return None;
                }
                Some(requirement) => {
                    requirement.uses.proof = proof;
                    requirement.uses.expected_revision = Some(self.view.snapshot.revision().clone());
                    match self.service.parts.approvals.use_approvals(requirement.uses.clone()).await {
                        Ok(ApprovalUseOutcome::RevisionMismatch { head }) => head,
                        Ok(ApprovalUseOutcome::Used) => {
                            self.judgement.decision_id = Some(requirement.uses.decision_id.clone());
                            self.permit_approved(requirement);
                            return Some(requirement.uses.clone());
                        }
                        outcome => {
                            self.resolve_unused(requirement, outcome).await;
                            return None;
                        }
                    }
                }
            };
            if !self.catch_up_and_rejudge(&head).await {
                return None;
            }
            requirement = self.approval_requirement(&decision_id);
        }
        self.deny_ledger_error(&LedgerError::Busy("the store is written to all the time".to_owned()));
        None
    }

    /// The approvals that the call must use, by the view that judged it and the current time.
    fn approval_requirement(&self, decision_id: &str) -> Option<ApprovalRequirement> {
        let by = (&self.view.snapshot, self.service.parts.clock.now());
        ApprovalRequirement::for_judgement(&self.judgement, self.request, self.caller, decision_id, by)
    }

    /// Denies the call if a call that must have been prepared is no longer permitted. Returns whether it did.
    fn deny_unprepared(&mut self) -> bool {
        let denial =
            find_denied_prepared_call(&self.judgement, self.request, &self.view.snapshot, self.service.parts.clock.now());
        let is_denied = denial.is_some();
        if let Some((denial, message)) = denial {
            (self.judgement.decision, self.judgement.message) = (denial, Some(message));
        }
        is_denied
    }

    /// Catches up after the store was written to, because a revocation must be seen before anything is used. Returns whether the
    /// call goes on.
    async fn catch_up_and_rejudge(&mut self, head: &Revision) -> bool {
        if !self.service.parts.catch_up.catch_up_to(head).await {
            self.deny_ledger_error(&LedgerError::Busy("this replica is behind the store".to_owned()));
            return false;
        }
        self.rejudge_by_newest_view();
        if self.judgement.decision.effect == Effect::Deny || self.deny_unprepared() {
            self.service.unspend_locally(&self.judgement);
            return false;
        }
        true
    }

    /// Decides a call for which the ledger used nothing, by the outcome of the ledger.
    async fn resolve_unused(&mut self, requirement: &ApprovalRequirement, outcome: Result<ApprovalUseOutcome, LedgerError>) {
        match outcome {
            Ok(ApprovalUseOutcome::Repeated { decision_id }) => self.repeat_permit(requirement, decision_id),
            Ok(ApprovalUseOutcome::Unusable { prepared, cause }) => self.ask_or_deny(requirement, prepared, cause).await,
            Ok(ApprovalUseOutcome::Replayed | ApprovalUseOutcome::Used | ApprovalUseOutcome::RevisionMismatch { .. }) => {
                self.judgement.decision = Decision::deny(Reason::ProofReplayed, self.number());
            }
            Err(error) => self.deny_ledger_error(&error),
        }
    }

    /// Answers a gateway that lost its answer and repeats the request. The first call has spent the proof.
    async fn repeat_or_deny(&mut self, requirement: Option<ApprovalRequirement>, denial: Decision) {
        let of_proof = matches!(denial.reason, Reason::ProofReplayed | Reason::ProofStale);
        if let Some(requirement) = requirement.filter(|requirement| of_proof && requirement.uses.fingerprint.is_some()) {
            let uses = ApprovalUseRequest { lookup_only: true, proof: None, expected_revision: None, ..requirement.uses.clone() };
            if let Ok(ApprovalUseOutcome::Repeated { decision_id }) = self.service.parts.approvals.use_approvals(uses).await {
                self.judgement.message = None;
                return self.repeat_permit(&requirement, decision_id);
            }
        }
        self.judgement.decision = denial;
    }
}

/// The proof as the store spends it; `None` if the store need not spend it.
fn ledger_proof_use(judgement: &Judgement) -> Option<ProofUse> {
    let proof = judgement.single_use_proof.as_ref().filter(|_| judgement.is_destructive)?;
    Some(ProofUse { key: proof.replay_key(), expires_at_unix_s: proof.iat_s().saturating_add(2 * PROOF_WINDOW_S) })
}
