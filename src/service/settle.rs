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

use super::approval::{Wanted, unpermitted};
use super::judge::Judged;
use super::ledger_quota::LedgerFull;
use super::ports::LedgerError;
use super::proofs::Use;
use super::request::{Answer, Caller, CheckRequest};
use super::{Held, Lane, Service, decision_id, is_too_old};
use crate::model::approval::{ProofUse, UseApprovals, UseOutcome};
use crate::model::decision::{Decision, Effect};
use crate::model::limits::PROOF_WINDOW_S;
#[cfg(test)]
use crate::model::mutant::{Mutant, active};
use crate::model::reason::Reason;
use crate::model::revision::Revision;
use crate::model::time::Now;
use crate::snapshot::View;

/// Limit of the attempts to use a ledger while the store is at another revision than the judgement.
const ATTEMPTS_MAX: usize = 4;
/// Limit of the attempts to give approvals back.
const GIVE_BACK_ATTEMPTS_MAX: usize = 2;

/// A judged call on its way through the ledgers to its audit record.
struct Settlement {
    lane: Lane,
    request: CheckRequest,
    caller: Caller,
    view: View,
    judged: Judged,
    started: Now,
}

impl Lane {
    /// Uses the ledgers that a call needs, and answers. The answer is confirmed when this function returns.
    pub(super) async fn settle(
        &self,
        request: &CheckRequest,
        caller: &Caller,
        view: View,
        mut judged: Judged,
        started: Now,
    ) -> (Answer, Held) {
        let number = view.snapshot.revision().number;
        // What is not denied has a chain.
        let holder = judged.chain.as_ref().map(|chain| self.service.proofs.holder(chain.prepared.subject()));
        let permit = match holder.map_or(Err(LedgerFull::Runtime), |holder| self.ledger_quota.try_acquire(holder)) {
            Ok(permit) => permit,
            Err(full) => {
                judged.decision = Decision::deny(Reason::LedgerBusy, number);
                judged.message = Some(full.message().to_owned());
                return self.answer(request, caller, view, judged, started);
            }
        };
        let (lane, kept) = (self.clone(), view.clone());
        let settlement = Settlement { lane, request: request.clone(), caller: caller.clone(), view, judged, started };
        let (reply, answered) = oneshot::channel();
        (self.service.parts.spawn)(Box::pin(async move {
            let answered = settlement.run().await;
            drop(permit);
            // The caller may have stopped waiting. The decision is recorded all the same.
            let _ = reply.send(answered);
        }));
        match answered.await {
            // Time has passed between the two tasks. A barrier that passed since then must leave no answer from before it.
            Ok((answer, held)) => self.confirm_held(request, caller, answer, held),
            Err(_) => {
                let lost = Judged::denied(Decision::deny(Reason::LedgerUnknown, number));
                self.answer(request, caller, kept, lost, started)
            }
        }
    }
}

impl Lane {
    /// Waits until every call of this runtime that uses a ledger has its audit record. It admits no new such call meanwhile.
    pub async fn settled(&self) {
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

impl Settlement {
    /// Uses the ledgers, records the decision, and gives the approvals back if the call is denied.
    async fn run(self) -> (Answer, Held) {
        let Self { lane, request, caller, view, judged, started } = self;
        let service = &lane.service;
        // The effect by policy alone. An approval may change it, and shadow documents are compared with policy only.
        let by_policy = judged.decision.effect;
        let mut call = LedgerCall { service, request: &request, caller: &caller, view, judged };
        let used = call.use_up().await;
        let LedgerCall { view, judged, .. } = call;
        let (answer, mut held) = lane.answer(&request, &caller, view, judged, started);
        if answer.decision.would_be.is_some() {
            service.count_shadow(&request.tool, by_policy, &answer);
        }
        match used {
            Some(used) if answer.decision.effect == Effect::Deny => service.give_back(used).await,
            used => held.used = used,
        }
        (answer, held)
    }
}

impl Service {
    /// Spends a proof on this replica alone. Returns a denial if it cannot be spent.
    pub(super) fn spend_here(&self, judged: &mut Judged, view: &View) -> Option<Decision> {
        let proof = judged.single_use_proof.as_ref()?;
        let number = view.snapshot.revision().number;
        if self.ready_at.get().is_none_or(|ready_at| proof.iat_s() <= ready_at.unix_s()) {
            judged.message = Some("the proof was made before this replica was ready: make a new one".to_owned());
            return Some(Decision::deny(Reason::ProofStale, number));
        }
        let holder = self.proofs.holder(judged.chain.as_ref()?.prepared.subject());
        match self.proofs.spend(&proof.replay_key(), holder, self.parts.clock.now()) {
            Use::First => None,
            Use::Replayed => Some(Decision::deny(Reason::ProofReplayed, number)),
            Use::Full => {
                let why = "this agent has too many proofs in use on this replica, for this user or in all, and nothing was used: ask \
                           another replica, or again in a minute";
                judged.message = Some(why.to_owned());
                Some(Decision::deny(Reason::LedgerBusy, number))
            }
        }
    }

    fn unspend_here(&self, judged: &Judged) {
        if let (Some(proof), Some(chain)) = (&judged.single_use_proof, &judged.chain) {
            self.proofs.unspend(&proof.replay_key(), self.proofs.holder(chain.prepared.subject()));
        }
    }

    /// Gives back the approvals of a call that is denied in the end.
    pub(super) async fn give_back(&self, used: UseApprovals) {
        for _ in 0..GIVE_BACK_ATTEMPTS_MAX {
            match self.parts.approvals.give_back(used.clone()).await {
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

/// A call that uses a ledger, with its newest judgement.
pub(super) struct LedgerCall<'a> {
    pub(super) service: &'a Service,
    pub(super) request: &'a CheckRequest,
    pub(super) caller: &'a Caller,
    /// The view that judged the call.
    pub(super) view: View,
    pub(super) judged: Judged,
}

impl LedgerCall<'_> {
    /// Uses the ledgers that the call needs. Returns the used approvals, so that they can be given back if the call is denied.
    pub(super) async fn use_up(&mut self) -> Option<UseApprovals> {
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
        if let Some(denial) = self.service.spend_here(&mut self.judged, &self.view) {
            self.look_again(wanted, denial).await;
            return None;
        }
        for _ in 0..ATTEMPTS_MAX {
            let proof = proof_use(&self.judged);
            let head = match &mut wanted {
                None => {
                    let proof = proof?;
                    match self.service.parts.ledger.spend(proof.key, proof.expires_at_unix_s).await {
                        Ok(true) => self.judge_anew(),
                        Ok(false) => self.judged.decision = Decision::deny(Reason::ProofReplayed, self.number()),
                        Err(error) => self.not_taken(&error),
                    }
                    return None;
                }
                Some(wanted) => {
                    wanted.uses.proof = proof;
                    wanted.uses.seen = Some(self.view.snapshot.revision().clone());
                    match self.service.parts.approvals.use_once(wanted.uses.clone()).await {
                        Ok(UseOutcome::Unseen { head }) => head,
                        Ok(UseOutcome::Used) => {
                            self.judged.decision_id = Some(wanted.uses.decision_id.clone());
                            self.permit(wanted);
                            return Some(wanted.uses.clone());
                        }
                        outcome => {
                            self.not_used(wanted, outcome).await;
                            return None;
                        }
                    }
                }
            };
            if !self.catch_up(&head).await {
                return None;
            }
            wanted = self.wanted(&decision_id);
        }
        self.not_taken(&LedgerError::Busy("the store is written to all the time".to_owned()));
        None
    }

    /// The approvals that the call must use, by the view that judged it and the current time.
    fn wanted(&self, decision_id: &str) -> Option<Wanted> {
        let by = (&self.view.snapshot, self.service.parts.clock.now());
        Wanted::of(&self.judged, self.request, self.caller, decision_id, by)
    }

    /// The number of the revision that the call was judged by.
    pub(super) fn number(&self) -> u64 {
        self.view.snapshot.revision().number
    }

    /// Denies the call if a call that must have been prepared is no longer permitted. Returns whether it did.
    fn deny_unprepared(&mut self) -> bool {
        let denial = unpermitted(&self.judged, self.request, &self.view.snapshot, self.service.parts.clock.now());
        let is_denied = denial.is_some();
        if let Some((denial, message)) = denial {
            (self.judged.decision, self.judged.message) = (denial, Some(message));
        }
        is_denied
    }

    /// Catches up after the store was written to, because a revocation must be seen before anything is used. Returns whether the
    /// call goes on.
    async fn catch_up(&mut self, head: &Revision) -> bool {
        if !self.service.parts.catch_up.reach(head).await {
            self.not_taken(&LedgerError::Busy("this replica is behind the store".to_owned()));
            return false;
        }
        self.judge_anew();
        if self.judged.decision.effect == Effect::Deny || self.deny_unprepared() {
            self.service.unspend_here(&self.judged);
            return false;
        }
        true
    }

    /// Decides a call for which the ledger used nothing, by the outcome of the ledger.
    async fn not_used(&mut self, wanted: &Wanted, outcome: Result<UseOutcome, LedgerError>) {
        match outcome {
            Ok(UseOutcome::Repeated { decision_id }) => self.permit_again(wanted, decision_id),
            Ok(UseOutcome::Lacking { prepared, lack }) => self.lacking(wanted, prepared, lack).await,
            Ok(UseOutcome::Replayed | UseOutcome::Used | UseOutcome::Unseen { .. }) => {
                self.judged.decision = Decision::deny(Reason::ProofReplayed, self.number());
            }
            Err(error) => self.not_taken(&error),
        }
    }

    /// Answers a gateway that lost its answer and repeats the request. The first call has spent the proof.
    async fn look_again(&mut self, wanted: Option<Wanted>, denial: Decision) {
        let of_proof = matches!(denial.reason, Reason::ProofReplayed | Reason::ProofStale);
        if let Some(wanted) = wanted.filter(|wanted| of_proof && wanted.uses.fingerprint.is_some()) {
            let uses = UseApprovals { only_again: true, proof: None, seen: None, ..wanted.uses.clone() };
            if let Ok(UseOutcome::Repeated { decision_id }) = self.service.parts.approvals.use_once(uses).await {
                self.judged.message = None;
                return self.permit_again(&wanted, decision_id);
            }
        }
        self.judged.decision = denial;
    }

    /// Judges the call again by the newest view, at the current time.
    pub(super) fn judge_anew(&mut self) {
        // A view existed before, and a view is never removed.
        if let Ok(newest) = self.service.view() {
            #[cfg(test)]
            let newest = match active(Mutant::RecheckNewerProof) {
                true => View { snapshot: self.view.snapshot.clone(), ..newest },
                false => newest,
            };
            self.view = newest;
        }
        let before = (self.judged.destructive, self.judged.single_use_proof.is_some());
        let digest = self.judged.approval_digest.take();
        let now = self.service.parts.clock.now();
        self.judged = self.service.judge_again(&self.judged, self.request, self.caller, &self.view, now);
        self.judged.approval_digest = digest;
        if self.request.at_least.as_ref().is_some_and(|at_least| !has_reached(&self.view, at_least)) {
            self.judged.decision = Decision::deny(Reason::RevisionUnavailable, self.number());
        }
        let demands_more = self.judged.destructive && !before.0 || self.judged.single_use_proof.is_some() && !before.1;
        if self.judged.decision.effect != Effect::Deny && demands_more {
            self.judged.message = Some("the tool's registration changed while the call waited: ask again".to_owned());
            self.judged.decision = Decision::deny(Reason::LedgerBusy, self.number());
        }
    }

    /// Denies a call because of a ledger error. If nothing was written, the proof can be used again.
    pub(super) fn not_taken(&mut self, error: &LedgerError) {
        tracing::warn!(%error, "the store did not take the use of a proof or approval");
        let (reason, message) = match error {
            LedgerError::Busy(_) => {
                self.service.unspend_here(&self.judged);
                (Reason::LedgerBusy, "the store did not take the use in time and nothing was used: ask again")
            }
            LedgerError::Unknown(_) => (
                Reason::LedgerUnknown,
                "the store did not say whether it took the use: send the very same request again, and where that does not do a new proof",
            ),
        };
        self.judged.message = Some(message.to_owned());
        self.judged.decision = Decision::deny(reason, self.number());
    }
}

/// The proof as the store spends it; `None` if the store need not spend it.
fn proof_use(judged: &Judged) -> Option<ProofUse> {
    let proof = judged.single_use_proof.as_ref().filter(|_| judged.destructive)?;
    Some(ProofUse { key: proof.replay_key(), expires_at_unix_s: proof.iat_s().saturating_add(2 * PROOF_WINDOW_S) })
}

/// Whether a view covers a revision that the caller has seen, in policy and in revocations.
fn has_reached(view: &View, at_least: &Revision) -> bool {
    let at = view.snapshot.revision();
    at.history == at_least.history && at.number >= at_least.number && view.snapshot.policy_number() >= at_least.number
}
