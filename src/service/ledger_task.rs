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
    lane: RuntimeService,
    request: DecisionRequest,
    caller: Caller,
    view: SnapshotView,
    judged: Judgement,
    started: ClockReading,
}

impl RuntimeService {
    /// Uses the ledgers that a call needs, and answers. The answer is confirmed when this function returns.
    pub(super) async fn run_ledger_task(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        view: SnapshotView,
        mut judged: Judgement,
        started: ClockReading,
    ) -> (CheckAnswer, PendingAnswer) {
        let number = view.snapshot.revision().number;
        // What is not denied has a chain.
        let holder = judged.chain.as_ref().map(|chain| self.service.replay_cache.proof_holder(chain.prepared.subject()));
        let permit = match holder.map_or(Err(LedgerFull::Runtime), |holder| self.ledger_quota.try_acquire(holder)) {
            Ok(permit) => permit,
            Err(full) => {
                judged.decision = Decision::deny(Reason::LedgerBusy, number);
                judged.message = Some(full.message().to_owned());
                return self.record_and_answer(request, caller, view, judged, started);
            }
        };
        let (lane, kept) = (self.clone(), view.clone());
        let settlement = LedgerTask { lane, request: request.clone(), caller: caller.clone(), view, judged, started };
        let (reply, answered) = oneshot::channel();
        (self.service.parts.spawn)(Box::pin(async move {
            let answered = settlement.run().await;
            drop(permit);
            // The caller may have stopped waiting. The decision is recorded all the same.
            let _ = reply.send(answered);
        }));
        match answered.await {
            // Time has passed between the two tasks. A barrier that passed since then must leave no answer from before it.
            Ok((answer, held)) => self.confirm_pending(request, caller, answer, held),
            Err(_) => {
                let lost = Judgement::from_denial(Decision::deny(Reason::LedgerUnknown, number));
                self.record_and_answer(request, caller, kept, lost, started)
            }
        }
    }
}

impl RuntimeService {
    /// Waits until every call of this runtime that uses a ledger has its audit record. It admits no new such call meanwhile.
    pub async fn wait_for_ledger_tasks(&self) {
        self.ledger_quota.drained().await;
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
        let Self { lane, request, caller, view, judged, started } = self;
        let service = &lane.service;
        // The effect by policy alone. An approval may change it, and shadow documents are compared with policy only.
        let by_policy = judged.decision.effect;
        let mut call = LedgerCall { service, request: &request, caller: &caller, view, judged };
        let used = call.use_ledgers().await;
        let LedgerCall { view, judged, .. } = call;
        let (answer, mut held) = lane.record_and_answer(&request, &caller, view, judged, started);
        if answer.decision.shadow_decision.is_some() {
            service.count_shadow_decision(&request.tool, by_policy, &answer);
        }
        match used {
            Some(used) if answer.decision.effect == Effect::Deny => service.give_back_approvals(used).await,
            used => held.used_approvals = used,
        }
        (answer, held)
    }
}

impl PdpService {
    /// Spends a proof on this replica alone. Returns a denial if it cannot be spent.
    pub(super) fn spend_locally(&self, judged: &mut Judgement, view: &SnapshotView) -> Option<Decision> {
        let proof = judged.single_use_proof.as_ref()?;
        let number = view.snapshot.revision().number;
        if self.ready_at.get().is_none_or(|ready_at| proof.iat_s() <= ready_at.unix_s()) {
            judged.message = Some("the proof was made before this replica was ready: make a new one".to_owned());
            return Some(Decision::deny(Reason::ProofStale, number));
        }
        let holder = self.replay_cache.proof_holder(judged.chain.as_ref()?.prepared.subject());
        match self.replay_cache.spend(&proof.replay_key(), holder, self.parts.clock.now()) {
            SpendOutcome::First => None,
            SpendOutcome::Replayed => Some(Decision::deny(Reason::ProofReplayed, number)),
            SpendOutcome::ShareFull => {
                let why = "this agent has too many proofs in use on this replica, for this user or in all, and nothing was used: ask \
                           another replica, or again in a minute";
                judged.message = Some(why.to_owned());
                Some(Decision::deny(Reason::LedgerBusy, number))
            }
        }
    }

    pub(super) fn unspend_locally(&self, judged: &Judgement) {
        if let (Some(proof), Some(chain)) = (&judged.single_use_proof, &judged.chain) {
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
        let mut wanted = self.wanted(&decision_id);
        self.judged.approval_digest = wanted.as_ref().map(|wanted| wanted.digest().to_owned());
        // INVARIANT: a call that would be denied in the end uses nothing.
        if is_too_old(&self.view, &self.request.tool, self.service.parts.clock.now()) {
            self.judged.decision = Decision::deny(Reason::Stale, self.number());
            return None;
        }
        if self.deny_unprepared() {
            return None;
        }
        if let Some(denial) = self.service.spend_locally(&mut self.judged, &self.view) {
            self.repeat_or_deny(wanted, denial).await;
            return None;
        }
        for _ in 0..ATTEMPTS_MAX {
            let proof = ledger_proof_use(&self.judged);
            let head = match &mut wanted {
                None => {
                    let proof = proof?;
                    match self.service.parts.ledger.spend(proof.key, proof.expires_at_unix_s).await {
                        Ok(true) => self.rejudge_by_newest_view(),
                        Ok(false) => self.judged.decision = Decision::deny(Reason::ProofReplayed, self.number()),
                        Err(error) => self.deny_ledger_error(&error),
                    }
                    return None;
                }
                Some(wanted) => {
                    wanted.uses.proof = proof;
                    wanted.uses.expected_revision = Some(self.view.snapshot.revision().clone());
                    match self.service.parts.approvals.use_approvals(wanted.uses.clone()).await {
                        Ok(ApprovalUseOutcome::RevisionMismatch { head }) => head,
                        Ok(ApprovalUseOutcome::Used) => {
                            self.judged.decision_id = Some(wanted.uses.decision_id.clone());
                            self.permit_approved(wanted);
                            return Some(wanted.uses.clone());
                        }
                        outcome => {
                            self.resolve_unused(wanted, outcome).await;
                            return None;
                        }
                    }
                }
            };
            if !self.catch_up_and_rejudge(&head).await {
                return None;
            }
            wanted = self.wanted(&decision_id);
        }
        self.deny_ledger_error(&LedgerError::Busy("the store is written to all the time".to_owned()));
        None
    }

    /// The approvals that the call must use, by the view that judged it and the current time.
    fn wanted(&self, decision_id: &str) -> Option<ApprovalRequirement> {
        let by = (&self.view.snapshot, self.service.parts.clock.now());
        ApprovalRequirement::for_judgement(&self.judged, self.request, self.caller, decision_id, by)
    }

    /// Denies the call if a call that must have been prepared is no longer permitted. Returns whether it did.
    fn deny_unprepared(&mut self) -> bool {
        let denial = find_denied_prepared_call(&self.judged, self.request, &self.view.snapshot, self.service.parts.clock.now());
        let is_denied = denial.is_some();
        if let Some((denial, message)) = denial {
            (self.judged.decision, self.judged.message) = (denial, Some(message));
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
        if self.judged.decision.effect == Effect::Deny || self.deny_unprepared() {
            self.service.unspend_locally(&self.judged);
            return false;
        }
        true
    }

    /// Decides a call for which the ledger used nothing, by the outcome of the ledger.
    async fn resolve_unused(&mut self, wanted: &ApprovalRequirement, outcome: Result<ApprovalUseOutcome, LedgerError>) {
        match outcome {
            Ok(ApprovalUseOutcome::Repeated { decision_id }) => self.repeat_permit(wanted, decision_id),
            Ok(ApprovalUseOutcome::Unusable { prepared, cause: lack }) => self.ask_or_deny(wanted, prepared, lack).await,
            Ok(ApprovalUseOutcome::Replayed | ApprovalUseOutcome::Used | ApprovalUseOutcome::RevisionMismatch { .. }) => {
                self.judged.decision = Decision::deny(Reason::ProofReplayed, self.number());
            }
            Err(error) => self.deny_ledger_error(&error),
        }
    }

    /// Answers a gateway that lost its answer and repeats the request. The first call has spent the proof.
    async fn repeat_or_deny(&mut self, wanted: Option<ApprovalRequirement>, denial: Decision) {
        let of_proof = matches!(denial.reason, Reason::ProofReplayed | Reason::ProofStale);
        if let Some(wanted) = wanted.filter(|wanted| of_proof && wanted.uses.fingerprint.is_some()) {
            let uses = ApprovalUseRequest { lookup_only: true, proof: None, expected_revision: None, ..wanted.uses.clone() };
            if let Ok(ApprovalUseOutcome::Repeated { decision_id }) = self.service.parts.approvals.use_approvals(uses).await {
                self.judged.message = None;
                return self.repeat_permit(&wanted, decision_id);
            }
        }
        self.judged.decision = denial;
    }
}

/// The proof as the store spends it; `None` if the store need not spend it.
fn ledger_proof_use(judged: &Judgement) -> Option<ProofUse> {
    let proof = judged.single_use_proof.as_ref().filter(|_| judged.is_destructive)?;
    Some(ProofUse { key: proof.replay_key(), expires_at_unix_s: proof.iat_s().saturating_add(2 * PROOF_WINDOW_S) })
}
