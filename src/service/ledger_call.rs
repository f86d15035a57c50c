//! A call that uses a ledger, and how it is judged again after each wait for the store.
//!
//! The approvals (`service/approval.rs`) and the task (`service/ledger_task.rs`) both work on it. It must not wait for the store itself.

use super::PdpService;
use super::judgement::Judgement;
use super::ports::LedgerError;
use super::request::{Caller, DecisionRequest};
use crate::model::decision::{Decision, Effect};
#[cfg(test)]
use crate::model::mutant::{Mutant, is_active};
use crate::model::reason::Reason;
use crate::model::revision::Revision;
use crate::snapshot::SnapshotView;

/// A call that uses a ledger, with its newest judgement.
pub(super) struct LedgerCall<'a> {
    pub(super) service: &'a PdpService,
    pub(super) request: &'a DecisionRequest,
    pub(super) caller: &'a Caller,
    /// The view that judged the call.
    pub(super) view: SnapshotView,
    pub(super) judgement: Judgement,
}

impl LedgerCall<'_> {
    /// The number of the revision that the call was judged by.
    pub(super) fn number(&self) -> u64 {
        self.view.snapshot.revision().number
    }

    /// Judges the call again by the newest view, at the current time.
    pub(super) fn rejudge_by_newest_view(&mut self) {
        // A view existed before, and a view is never removed.
        if let Ok(newest) = self.service.current_view() {
            #[cfg(test)]
            let newest = match is_active(Mutant::RecheckNewerProof) {
                true => SnapshotView { snapshot: self.view.snapshot.clone(), ..newest },
                false => newest,
            };
            self.view = newest;
        }
        let before = (self.judgement.is_destructive, self.judgement.single_use_proof.is_some());
        let digest = self.judgement.approval_digest.take();
        let now = self.service.parts.clock.now();
        self.judgement = self.service.rejudge(&self.judgement, self.request, self.caller, &self.view, now);
        self.judgement.approval_digest = digest;
        if self.request.at_least.as_ref().is_some_and(|at_least| !view_covers(&self.view, at_least)) {
            self.judgement.decision = Decision::deny(Reason::RevisionUnavailable, self.number());
        }
        let demands_more = self.judgement.is_destructive && !before.0 || self.judgement.single_use_proof.is_some() && !before.1;
        if self.judgement.decision.effect != Effect::Deny && demands_more {
            self.judgement.message = Some("the tool's registration changed while the call waited: ask again".to_owned());
            self.judgement.decision = Decision::deny(Reason::LedgerBusy, self.number());
        }
    }

    /// Denies a call because of a ledger error. If nothing was written, the proof can be used again.
    pub(super) fn deny_ledger_error(&mut self, error: &LedgerError) {
        // Callers decide how often this happens, and the log may be on the disk of the store.
        if let Some(left_out) = self.service.ledger_warnings.admit(self.service.parts.clock.now()) {
            tracing::warn!(%error, left_out, "the store did not take the use of a proof or approval");
        }
        let (reason, message) = match error {
            LedgerError::Busy(_) => {
                self.service.unspend_locally(&self.judgement);
                (Reason::LedgerBusy, "the store did not take the use in time and nothing was used: ask again")
            }
            LedgerError::OutcomeUnknown(_) => (
                Reason::LedgerUnknown,
                "the store did not say whether it took the use: send the very same request again, and where that does not do a new proof",
            ),
        };
        self.judgement.message = Some(message.to_owned());
        self.judgement.decision = Decision::deny(reason, self.number());
    }
}

/// Whether a view covers a revision that the caller has seen, in policy and in revocations.
fn view_covers(view: &SnapshotView, at_least: &Revision) -> bool {
    let at = view.snapshot.revision();
    at.history == at_least.history && at.number >= at_least.number && view.snapshot.policy_number() >= at_least.number
}
