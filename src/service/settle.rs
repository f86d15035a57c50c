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
use super::ports::LedgerError;
use super::proofs::Use;
use super::request::{Answer, Caller, CheckRequest};
use super::{Held, Lane, Service, decision_id, is_too_old};
use crate::model::approval::{ProofUse, UseApprovals, UseOutcome};
use crate::model::decision::{Decision, Effect};
use crate::model::limits::{LEDGER_USES_MAX, PROOF_WINDOW_S};
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
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            judged.decision = Decision::deny(Reason::LedgerBusy, number);
            judged.message = Some(format!("{LEDGER_USES_MAX} calls wait for the store here and nothing was used: ask again"));
            return self.answer(request, caller, view, judged, started);
        };
        let (lane, kept) = (self.clone(), view.clone());
        let settlement = Settlement { lane, request: request.clone(), caller: caller.clone(), view, judged, started };
        let (reply, answered) = oneshot::channel();
        (self.service.parts.spawn)(Box::pin(async move {
            let answered = settlement.run().await;
            drop(place);
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
        // The semaphore is never closed.
        let _ = self.places.acquire_many(u32::try_from(LEDGER_USES_MAX).unwrap_or(u32::MAX)).await;
    }
}

impl Settlement {
    /// Uses the ledgers, records the decision, and gives the approvals back if the call is denied.
    async fn run(self) -> (Answer, Held) {
        let Self { lane, request, caller, mut view, mut judged, started } = self;
        let service = &lane.service;
        // The effect by policy alone. An approval may change it, and shadow documents are compared with policy only.
        let by_policy = judged.decision.effect;
        let used = service.use_up(&mut judged, &request, &caller, &mut view).await;
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

    /// Uses the ledgers that the call needs. Returns the used approvals, so that they can be given back if the call is denied.
    pub(super) async fn use_up(
        &self,
        judged: &mut Judged,
        request: &CheckRequest,
        caller: &Caller,
        view: &mut View,
    ) -> Option<UseApprovals> {
        let decision_id = decision_id::new(self.parts.clock.now());
        let by = |view: &View| (view.snapshot.clone(), self.parts.clock.now());
        let (snapshot, now) = by(view);
        let mut wanted = Wanted::of(judged, request, caller, &decision_id, (&snapshot, now));
        judged.approval_digest = wanted.as_ref().map(|wanted| wanted.digest().to_owned());
        // INVARIANT: a call that would be denied in the end uses nothing.
        if is_too_old(view, &request.tool, self.parts.clock.now()) {
            judged.decision = Decision::deny(Reason::Stale, view.snapshot.revision().number);
            return None;
        }
        if let Some((denial, message)) = unpermitted(judged, request, &snapshot, now) {
            (judged.decision, judged.message) = (denial, Some(message));
            return None;
        }
        if let Some(denial) = self.spend_here(judged, view) {
            self.look_again(judged, request, caller, view, wanted, denial).await;
            return None;
        }
        for _ in 0..ATTEMPTS_MAX {
            let proof = proof_use(judged);
            let head = match &mut wanted {
                None => {
                    let proof = proof?;
                    let number = view.snapshot.revision().number;
                    match self.parts.ledger.spend(proof.key, proof.expires_at_unix_s).await {
                        Ok(true) => self.judge_anew(judged, request, caller, view),
                        Ok(false) => judged.decision = Decision::deny(Reason::ProofReplayed, number),
                        Err(error) => self.not_taken(judged, view, &error),
                    }
                    return None;
                }
                Some(wanted) => {
                    wanted.uses.proof = proof;
                    wanted.uses.seen = Some(view.snapshot.revision().clone());
                    match self.parts.approvals.use_once(wanted.uses.clone()).await {
                        Ok(UseOutcome::Unseen { head }) => head,
                        Ok(UseOutcome::Used) => {
                            judged.decision_id = Some(wanted.uses.decision_id.clone());
                            self.permit(judged, request, caller, view, wanted);
                            return Some(wanted.uses.clone());
                        }
                        outcome => {
                            self.not_used(judged, request, caller, view, wanted, outcome).await;
                            return None;
                        }
                    }
                }
            };
            if !self.catch_up(judged, request, caller, view, &head).await {
                return None;
            }
            let (snapshot, now) = by(view);
            wanted = Wanted::of(judged, request, caller, &decision_id, (&snapshot, now));
        }
        self.not_taken(judged, view, &LedgerError::Busy("the store is written to all the time".to_owned()));
        None
    }

    /// Catches up after the store was written to, because a revocation must be seen before anything is used. Returns whether the
    /// call goes on.
    async fn catch_up(
        &self,
        judged: &mut Judged,
        request: &CheckRequest,
        caller: &Caller,
        view: &mut View,
        head: &Revision,
    ) -> bool {
        if !self.parts.catch_up.reach(head).await {
            self.not_taken(judged, view, &LedgerError::Busy("this replica is behind the store".to_owned()));
            return false;
        }
        self.judge_anew(judged, request, caller, view);
        if judged.decision.effect != Effect::Deny
            && let Some((denial, message)) = unpermitted(judged, request, &view.snapshot, self.parts.clock.now())
        {
            (judged.decision, judged.message) = (denial, Some(message));
        }
        if judged.decision.effect == Effect::Deny {
            self.unspend_here(judged);
            return false;
        }
        true
    }

    /// Decides a call for which the ledger used nothing, by the outcome of the ledger.
    async fn not_used(
        &self,
        judged: &mut Judged,
        request: &CheckRequest,
        caller: &Caller,
        view: &mut View,
        wanted: &Wanted,
        outcome: Result<UseOutcome, LedgerError>,
    ) {
        let number = view.snapshot.revision().number;
        match outcome {
            Ok(UseOutcome::Repeated { decision_id }) => self.permit_again(judged, request, caller, view, wanted, decision_id),
            Ok(UseOutcome::Lacking { prepared, lack }) => {
                self.lacking(judged, request, caller, view, wanted, (prepared, lack)).await;
            }
            Ok(UseOutcome::Replayed | UseOutcome::Used | UseOutcome::Unseen { .. }) => {
                judged.decision = Decision::deny(Reason::ProofReplayed, number);
            }
            Err(error) => self.not_taken(judged, view, &error),
        }
    }

    /// Answers a gateway that lost its answer and repeats the request. The first call has spent the proof.
    async fn look_again(
        &self,
        judged: &mut Judged,
        request: &CheckRequest,
        caller: &Caller,
        view: &mut View,
        wanted: Option<Wanted>,
        denial: Decision,
    ) {
        let of_proof = matches!(denial.reason, Reason::ProofReplayed | Reason::ProofStale);
        if let Some(wanted) = wanted.filter(|wanted| of_proof && wanted.uses.fingerprint.is_some()) {
            let uses = UseApprovals { only_again: true, proof: None, seen: None, ..wanted.uses.clone() };
            if let Ok(UseOutcome::Repeated { decision_id }) = self.parts.approvals.use_once(uses).await {
                judged.message = None;
                return self.permit_again(judged, request, caller, view, &wanted, decision_id);
            }
        }
        judged.decision = denial;
    }

    /// Judges the call again by the newest view, at the current time.
    pub(super) fn judge_anew(&self, judged: &mut Judged, request: &CheckRequest, caller: &Caller, view: &mut View) {
        // A view existed before, and a view is never removed.
        if let Ok(newest) = self.view() {
            #[cfg(test)]
            let newest = match active(Mutant::RecheckNewerProof) {
                true => View { snapshot: view.snapshot.clone(), ..newest },
                false => newest,
            };
            *view = newest;
        }
        let before = (judged.destructive, judged.single_use_proof.is_some());
        let digest = judged.approval_digest.take();
        *judged = self.judge_again(judged, request, caller, view, self.parts.clock.now());
        judged.approval_digest = digest;
        if request.at_least.as_ref().is_some_and(|at_least| !has_reached(view, at_least)) {
            judged.decision = Decision::deny(Reason::RevisionUnavailable, view.snapshot.revision().number);
        }
        let demands_more = judged.destructive && !before.0 || judged.single_use_proof.is_some() && !before.1;
        if judged.decision.effect != Effect::Deny && demands_more {
            judged.message = Some("the tool's registration changed while the call waited: ask again".to_owned());
            judged.decision = Decision::deny(Reason::LedgerBusy, view.snapshot.revision().number);
        }
    }

    /// Denies a call because of a ledger error. If nothing was written, the proof can be used again.
    pub(super) fn not_taken(&self, judged: &mut Judged, view: &View, error: &LedgerError) {
        tracing::warn!(%error, "the store did not take the use of a proof or approval");
        let number = view.snapshot.revision().number;
        let (reason, message) = match error {
            LedgerError::Busy(_) => {
                self.unspend_here(judged);
                (Reason::LedgerBusy, "the store did not take the use in time and nothing was used: ask again")
            }
            LedgerError::Unknown(_) => (
                Reason::LedgerUnknown,
                "the store did not say whether it took the use: send the very same request again, and where that does not do a new proof",
            ),
        };
        judged.message = Some(message.to_owned());
        judged.decision = Decision::deny(reason, number);
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
