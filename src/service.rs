//! The service: the only module that calls `pdp`. It loads the view once, verifies the credential, decides, re-checks, records
//! and measures.
//!
//! It holds all that surrounds a decision and nothing of the decision itself. A warm call (its chain is cached, and it uses no
//! ledger) never awaits. This module must not know protobuf, SQL or sockets.
//!
//! Look next at [`Lane::check`], then at `service/judge.rs`.

mod approval;
mod chains;
mod decision_id;
mod explain;
mod handles;
mod judge;
mod ledger_quota;
mod listing;
mod ports;
mod proofs;
mod record;
pub mod request;
mod settle;
mod shadow;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

pub use explain::{Change, ExplainedLayer, Explanation, Places};
pub use ports::{ApprovalLedger, CatchUp, FleetDirectory, LedgerError, ProofLedger, Spawn};
pub use request::{Answer, CheckRequest, Credential, ListToolsAnswer, ListToolsRequest, Undecided};
pub use shadow::{Flip, ShadowCount, ShadowReport, ShadowSeries};

use chains::{Chains, KnownChain};
use handles::Handles;
use judge::Judged;
use ledger_quota::LedgerQuota;
use proofs::Proofs;
use record::Moment;
use request::Caller;
use shadow::Shadows;

use crate::audit::Recorder;
use crate::model::approval::UseApprovals;
use crate::model::decision::{Decision, Effect};
use crate::model::limits::{CHAIN_CACHE_BYTES_MAX, LEDGER_USES_MAX};
use crate::model::mutant::{Mutant, active};
use crate::model::reason::Reason;
use crate::model::revision::Revision;
use crate::model::time::{Clock, Now};
use crate::pdp;
use crate::snapshot::{Freshness, SnapshotCell, View};
use crate::telemetry::{Metrics, Spans};
use crate::token::VerifiedChain;

/// Settings of the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Audiences that callers of this listener may claim. If empty, a loopback caller may claim any audience of an issuer document.
    pub audiences: Vec<String>,
    /// Whether the root token must carry `aud`.
    pub require_chain_audience: bool,
    /// Whether a proof of possession must carry `aat_aud`.
    pub require_proof_audience: bool,
    /// Limit of the chain cache in bytes, by the weight of its chains.
    pub chains_bytes_max: u64,
    /// Calls of one serving runtime that may wait for the store to use something up.
    pub ledger_uses_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            audiences: Vec::new(),
            require_chain_audience: true,
            require_proof_audience: true,
            chains_bytes_max: CHAIN_CACHE_BYTES_MAX,
            ledger_uses_max: LEDGER_USES_MAX,
        }
    }
}

/// The parts that `app` binds to the service.
pub struct Parts {
    /// The cell that holds the current view.
    pub cell: Arc<SnapshotCell>,
    /// The ledger that spends each proof of a destructive call once across the fleet.
    pub ledger: Arc<dyn ProofLedger>,
    /// The ledger that asks for approvals and uses each of them once across the fleet.
    pub approvals: Arc<dyn ApprovalLedger>,
    /// Waits until this replica has applied a revision.
    pub catch_up: Arc<dyn CatchUp>,
    /// The metrics of decisions.
    pub metrics: Metrics,
    /// The exporter of spans.
    pub spans: Spans,
    /// The clock of the service.
    pub clock: Arc<dyn Clock>,
    /// Runs a task to its end, so that a call always reaches its audit record.
    pub spawn: Spawn,
}

/// The state that all serving runtimes of a process share.
pub struct Service {
    parts: Parts,
    settings: Settings,
    chains: Chains,
    handles: Handles,
    proofs: Proofs,
    shadows: Shadows,
    ledger_uses: Arc<AtomicUsize>,
    ready_at: OnceLock<Now>,
    draining: watch::Sender<bool>,
}

/// The service of one serving runtime. Before the sockets of that runtime send an answer, they wait for the buffer of its recorder.
#[derive(Clone)]
pub struct Lane {
    service: Arc<Service>,
    recorder: Arc<Recorder>,
    /// Permits for calls that use a ledger. They bound the number of such calls.
    ledger_quota: Arc<LedgerQuota>,
}

/// The evidence behind an answer that is not sent yet, so that the answer can be confirmed before it is sent.
#[derive(Debug)]
pub struct Held {
    view: View,
    judged: Judged,
    started: Now,
    /// The approvals that the call used. They are given back if the call is denied in the end.
    used: Option<UseApprovals>,
}

impl Service {
    /// Makes a service that is not ready until the cell holds a view.
    pub fn new(parts: Parts, settings: Settings) -> Self {
        let proofs = Proofs::new(parts.clock.now());
        let shadows = Shadows::new(parts.clock.now());
        Self {
            chains: Chains::new(settings.chains_bytes_max),
            handles: Handles::new(),
            proofs,
            shadows,
            ledger_uses: Arc::default(),
            ready_at: OnceLock::new(),
            draining: watch::Sender::new(false),
            parts,
            settings,
        }
    }

    /// Makes the service of one serving runtime.
    pub fn lane(self: &Arc<Self>, recorder: Arc<Recorder>) -> Lane {
        let ledger_quota = LedgerQuota::new(self.settings.ledger_uses_max, self.ledger_uses.clone());
        Lane { service: self.clone(), recorder, ledger_quota }
    }

    /// Marks the first full snapshot as published. From now on, the service refuses proofs that were made before this moment.
    pub fn mark_ready(&self) {
        self.ready_at.get_or_init(|| self.parts.clock.now());
    }

    /// Whether this replica can permit a call: its first snapshot was published, it is not draining, and its proof is within the bound.
    pub fn is_ready(&self) -> bool {
        let open = |view: View| view.freshness(self.parts.clock.now()) != Freshness::Closed;
        self.ready_at.get().is_some() && !*self.draining.borrow() && self.parts.cell.load().is_some_and(open)
    }

    /// Starts draining: streams end themselves, and further calls are still answered.
    pub fn drain(&self) {
        self.draining.send_replace(true);
    }

    /// The approximate number of cached chains.
    pub fn chains_kept(&self) -> u64 {
        self.chains.len()
    }

    /// The number of calls that wait for a ledger.
    pub fn ledger_uses(&self) -> usize {
        self.ledger_uses.load(Ordering::Relaxed)
    }

    /// Visits at most `chains_max` cached chains. Returns false if there are more. Use it to look up names, never for a decision.
    pub fn visit_chains(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool {
        self.chains.visit(chains_max, visit)
    }

    /// Whether decisions cover a revision, after a short wait if need be.
    ///
    /// Only a caller with a valid credential may wait and cause a poll of the store. Any other caller gets the answer at once.
    async fn reaches(&self, revision: &Revision, credential: &Credential, caller: &Caller, view: &View, now: Now) -> bool {
        if view.snapshot.covers(revision) {
            return true;
        }
        let options = self.options(&view.snapshot);
        let may_wait = match self.credit(credential, caller, &view.snapshot, &options, now) {
            Ok(_) => true,
            Err(rejection) => judge::newer_policy_may_accept(&rejection),
        };
        may_wait && self.parts.catch_up.reach(revision).await
    }

    /// The memory of the cached chains in bytes, by their weight.
    pub fn chains_bytes(&self) -> u64 {
        self.chains.bytes()
    }

    fn view(&self) -> Result<View, Undecided> {
        if self.ready_at.get().is_none() {
            return Err(Undecided::NotReady);
        }
        self.parts.cell.load().ok_or(Undecided::NotReady)
    }
}

impl Lane {
    /// Returns once the process starts draining.
    pub async fn drained(&self) {
        // An error is impossible: `self.service` keeps the sender alive.
        let _ = self.service.draining.subscribe().wait_for(|draining| *draining).await;
    }

    /// Decides one call. A denial is an answer, not an error.
    ///
    /// # Errors
    /// Only if nothing can be decided: before the first snapshot, and while draining.
    pub async fn check(&self, request: &CheckRequest, caller: &Caller) -> Result<Answer, Undecided> {
        Ok(self.check_held(request, caller).await?.0)
    }

    /// As [`Lane::check`], for an answer that is not sent at once. The caller must pass it to [`Lane::confirm`] before it sends it.
    ///
    /// # Errors
    /// As [`Lane::check`].
    pub async fn check_held(&self, request: &CheckRequest, caller: &Caller) -> Result<(Answer, Held), Undecided> {
        let service = &*self.service;
        let mut started = service.parts.clock.now();
        let mut view = service.view()?;
        if let Some(at_least) = &request.at_least {
            let reached =
                active(Mutant::AtLeastIgnored) || service.reaches(at_least, &request.credential, caller, &view, started).await;
            if !reached {
                let denied = Judged::denied(Decision::deny(Reason::RevisionUnavailable, view.snapshot.revision().number));
                return Ok(self.answer(request, caller, view, denied, started));
            }
            // The wait took time, so the chain is judged at the current time.
            if !active(Mutant::AtLeastOldView) {
                view = service.view()?;
            }
            started = service.parts.clock.now();
        }
        let mut judged = service.judge(request, caller, &view, started);
        let by_policy = judged.decision.effect;
        // A warm permit never awaits.
        if by_policy != Effect::Deny && judged.needs_the_store() {
            return Ok(self.settle(request, caller, view, judged, started).await);
        }
        if by_policy != Effect::Deny
            && let Some(denial) = service.spend_here(&mut judged, &view)
        {
            judged.decision = denial;
        }
        let answered = self.answer(request, caller, view, judged, started);
        if answered.0.decision.would_be.is_some() {
            service.count_shadow(&request.tool, by_policy, &answered.0);
        }
        Ok(answered)
    }

    /// Confirms an answer just before it is sent. If a revocation or the age of the view denies the call by now, the answer
    /// becomes a denial. Does not await. The caller must not await either before it sends the answer.
    pub fn confirm(&self, request: &CheckRequest, caller: &Caller, answer: Answer, held: Held) -> Answer {
        self.confirm_held(request, caller, answer, held).0
    }

    /// As [`Lane::confirm`], and keeps the evidence for another confirmation.
    fn confirm_held(&self, request: &CheckRequest, caller: &Caller, answer: Answer, held: Held) -> (Answer, Held) {
        let Held { view, mut judged, started, used } = held;
        let now = self.service.parts.clock.now();
        let snapshot = &view.snapshot;
        let unchanged = snapshot.revocations().generation() == judged.generation && !is_too_old(&view, &request.tool, now);
        if answer.decision.effect == Effect::Deny || unchanged {
            return (answer, Held { view, judged, started, used });
        }
        // An answer that is no denial has both.
        let again = match (&judged.chain, &judged.arguments) {
            (Some(chain), Some(arguments)) => pdp::decide(&chain.prepared, &judge::call(request, arguments, now), snapshot, now),
            _ => Decision::deny(Reason::Stale, snapshot.revision().number),
        };
        if again.effect == Effect::Deny {
            judged.decision = again;
        } else if !is_too_old(&view, &request.tool, now) {
            return (answer, Held { view, judged, started, used });
        }
        if let Some(used) = used {
            // At most one such task per pending answer, and no answer waits for it.
            let (service, permit) = (self.service.clone(), self.ledger_quota.try_reserve());
            (self.service.parts.spawn)(Box::pin(async move {
                service.give_back(used).await;
                drop(permit);
            }));
        }
        (judged.decision_id, judged.approval, judged.message) = (None, None, None);
        self.answer(request, caller, view, judged, started)
    }

    /// Re-checks freshness on the same view, records the decision, and only then returns the answer. Does not await.
    fn answer(&self, request: &CheckRequest, caller: &Caller, view: View, mut judged: Judged, started: Now) -> (Answer, Held) {
        let service = &*self.service;
        let now = service.parts.clock.now();
        let snapshot = &view.snapshot;
        let too_old = is_too_old(&view, &request.tool, now) && !active(Mutant::SkipRecheck);
        if judged.decision.effect != Effect::Deny && too_old {
            judged.decision = Decision::deny(Reason::Stale, snapshot.revision().number);
        }
        let handle = match (&judged.chain, judged.proves_handle()) {
            (Some(chain), Some(proved)) if request.want_handle && judged.decision.effect != Effect::Deny => {
                service.handles.make(chain.clone(), proved, caller.connection_id, now)
            }
            _ => None,
        };
        let mut answer = self.compose(request, &view, &judged, now);
        answer.handle = handle;
        let moment = Moment { started, now };
        if self.record(request, caller, &view, &judged, &answer, moment).is_err() {
            // A decision that cannot be recorded is denied.
            judged.decision = Decision::deny(Reason::AuditUnavailable, snapshot.revision().number);
            judged.message = None;
            answer = self.compose(request, &view, &judged, now);
        }
        service.observe(request, &judged, &answer, moment);
        (answer, Held { view, judged, started, used: None })
    }

    fn compose(&self, request: &CheckRequest, view: &View, judged: &Judged, now: Now) -> Answer {
        let snapshot = &view.snapshot;
        let decision = &judged.decision;
        let chain_left_ms = judged.chain.as_ref().map(|chain| chain.left_ms(now));
        let mut revision = snapshot.revision().clone();
        revision.number = decision.revision;
        Answer {
            decision_id: judged.decision_id.clone().unwrap_or_else(|| decision_id::new(now)),
            decision: decision.clone(),
            message: judged.message.clone().unwrap_or_else(|| decision.reason.message().to_owned()),
            identities: judged.chain.as_ref().map(|chain| chain.identities.clone()),
            tool_is_registered: snapshot.tool(&request.tool).is_some(),
            revision: Some(revision),
            snapshot_age_ms: view.age_ms(now).unwrap_or(u64::MAX),
            valid_for_ms: view.valid_for_ms(now).min(chain_left_ms.unwrap_or(u64::MAX)),
            approval: judged.approval.clone().filter(|_| decision.effect == Effect::NeedsApproval),
            handle: None,
        }
    }
}

/// Whether the view is too old to permit a call of the tool.
fn is_too_old(view: &View, tool: &str, now: Now) -> bool {
    match view.freshness(now) {
        Freshness::Fresh => false,
        Freshness::Stale => view.snapshot.tool(tool).is_none_or(|tool| tool.is_destructive()),
        Freshness::Closed => true,
    }
}
