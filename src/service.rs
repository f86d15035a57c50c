//! The service: the only module that calls `pdp`. It judges a call by one view: it verifies the credential, decides,
//! re-checks, records and measures.
//!
//! It holds all that surrounds a decision and nothing of the decision itself. A warm call never awaits: its chain is
//! cached, it uses no ledger, and it waits for no revision. This module must not know protobuf, SQL or sockets.
//!
//! Look next at [`RuntimeService::check`], then at `service/judgement.rs`.

mod approval;
mod chain_cache;
mod decision_id;
mod explain;
mod handle_cache;
mod judgement;
mod ledger_call;
mod ledger_quota;
mod ledger_task;
mod listing;
mod ports;
mod record;
mod replay_cache;
pub mod request;
mod shadow;
#[cfg(test)]
mod tests;
mod warning_throttle;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

pub use explain::{DocumentLocations, Explanation, LayerExplanation, RemedyStep};
pub use ports::{ApprovalLedger, FleetDirectory, LedgerError, ProofLedger, RevisionCatchUp, TaskSpawner};
pub use request::{AgentCredential, CheckAnswer, DecisionRequest, ListToolsAnswer, ListToolsRequest, ServiceUnavailable};
pub use shadow::{DecisionFlip, ShadowMetric, ShadowReport, ShadowSeries};

use chain_cache::{CachedChain, ChainCache};
use handle_cache::ChainHandleCache;
use judgement::Judgement;
use ledger_quota::LedgerQuota;
use record::CallTiming;
use replay_cache::ProofReplayCache;
use request::Caller;
use shadow::ShadowStats;
use warning_throttle::WarningThrottle;

use crate::audit::AuditRecorder;
use crate::model::approval::ApprovalUseRequest;
use crate::model::decision::{Decision, Effect};
use crate::model::limits::{CHAIN_CACHE_BYTES_MAX, LEDGER_USES_IN_FLIGHT_MAX};
use crate::model::mutant::{Mutant, is_active};
use crate::model::reason::Reason;
use crate::model::revision::Revision;
use crate::model::time::{Clock, ClockReading};
use crate::pdp;
use crate::snapshot::{Freshness, SnapshotCell, SnapshotView};
use crate::telemetry::{Metrics, SpanRecorder};
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
    /// How many calls of one serving runtime may wait for a ledger, to spend a proof or to use an approval.
    pub ledger_uses_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            audiences: Vec::new(),
            require_chain_audience: true,
            require_proof_audience: true,
            chains_bytes_max: CHAIN_CACHE_BYTES_MAX,
            ledger_uses_max: LEDGER_USES_IN_FLIGHT_MAX,
        }
    }
}

/// The parts that `app` binds to the service.
pub struct ServiceParts {
    /// The cell that holds the current view.
    pub snapshot_cell: Arc<SnapshotCell>,
    /// The ledger that spends each proof of a destructive call once across the fleet.
    pub ledger: Arc<dyn ProofLedger>,
    /// The ledger that asks for approvals and uses each of them once across the fleet.
    pub approvals: Arc<dyn ApprovalLedger>,
    /// Waits until this replica has applied a revision.
    pub catch_up: Arc<dyn RevisionCatchUp>,
    /// The metrics of decisions.
    pub metrics: Metrics,
    /// The exporter of spans.
    pub spans: SpanRecorder,
    /// The clock of the service.
    pub clock: Arc<dyn Clock>,
    /// Runs a task to its end, so that a call always reaches its audit record.
    pub spawn: TaskSpawner,
}

/// The state that all serving runtimes of a process share.
pub struct PdpService {
    parts: ServiceParts,
    settings: Settings,
    chain_cache: ChainCache,
    handle_cache: ChainHandleCache,
    replay_cache: ProofReplayCache,
    shadow_stats: ShadowStats,
    ledger_uses: Arc<AtomicUsize>,
    ledger_warnings: WarningThrottle,
    ready_at: OnceLock<ClockReading>,
    draining: watch::Sender<bool>,
}

/// The service of one serving runtime. Before the sockets of that runtime send an answer, they wait for the buffer of its recorder.
#[derive(Clone)]
pub struct RuntimeService {
    service: Arc<PdpService>,
    recorder: Arc<AuditRecorder>,
    /// Bounds how many calls of this runtime use a ledger at one time.
    ledger_quota: Arc<LedgerQuota>,
}

/// The evidence behind an answer that is not sent yet, so that the answer can be confirmed before it is sent.
#[derive(Debug)]
pub struct PendingAnswer {
    view: SnapshotView,
    judgement: Judgement,
    started: ClockReading,
    /// The approvals that the call used. They are given back if the call is denied in the end.
    used_approvals: Option<ApprovalUseRequest>,
}

impl PdpService {
    /// Makes a service that is not ready until the cell holds a view.
    pub fn new(parts: ServiceParts, settings: Settings) -> Self {
        let replay_cache = ProofReplayCache::new(parts.clock.now());
        let shadow_stats = ShadowStats::new(parts.clock.now());
        Self {
            chain_cache: ChainCache::new(settings.chains_bytes_max),
            handle_cache: ChainHandleCache::new(),
            replay_cache,
            shadow_stats,
            ledger_uses: Arc::default(),
            ledger_warnings: WarningThrottle::default(),
            ready_at: OnceLock::new(),
            draining: watch::Sender::new(false),
            parts,
            settings,
        }
    }

    /// Makes the service of one serving runtime.
    pub fn runtime_service(self: &Arc<Self>, recorder: Arc<AuditRecorder>) -> RuntimeService {
        let ledger_quota = LedgerQuota::new(self.settings.ledger_uses_max, self.ledger_uses.clone());
        RuntimeService { service: self.clone(), recorder, ledger_quota }
    }

    /// Marks the first full snapshot as published. From now on, the service refuses proofs that were made before this moment.
    pub fn mark_ready(&self) {
        self.ready_at.get_or_init(|| self.parts.clock.now());
    }

    /// Whether this replica can permit a call: its first snapshot was published, it is not draining, and its freshness proof is not too
    /// old.
    pub fn is_ready(&self) -> bool {
        let may_answer = |view: SnapshotView| view.freshness(self.parts.clock.now()) != Freshness::Closed;
        self.ready_at.get().is_some() && !*self.draining.borrow() && self.parts.snapshot_cell.load().is_some_and(may_answer)
    }

    /// Starts draining: streams end themselves, and further calls are still answered.
    pub fn start_drain(&self) {
        self.draining.send_replace(true);
    }

    /// The approximate number of cached chains.
    pub fn cached_chain_count(&self) -> u64 {
        self.chain_cache.len()
    }

    /// The number of calls that wait for a ledger.
    pub fn ledger_uses(&self) -> usize {
        self.ledger_uses.load(Ordering::Relaxed)
    }

    /// Visits at most `chains_max` cached chains. Returns false if there are more. Use it to look up names, never for a decision.
    pub fn visit_cached_chains(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool {
        self.chain_cache.visit_chains(chains_max, visit)
    }

    /// Whether decisions cover a revision, after a short wait if need be.
    ///
    /// Only a caller with a valid credential may wait and cause a poll of the store. Any other caller gets the answer at once.
    async fn catch_up_to(
        &self,
        revision: &Revision,
        credential: &AgentCredential,
        caller: &Caller,
        view: &SnapshotView,
        now: ClockReading,
    ) -> bool {
        if view.snapshot.includes_revision(revision) {
            return true;
        }
        let options = self.verifier_options(&view.snapshot);
        let may_wait = match self.verify_credential(credential, caller, &view.snapshot, &options, now) {
            Ok(_) => true,
            Err(rejection) => judgement::newer_policy_may_accept(&rejection),
        };
        may_wait && self.parts.catch_up.catch_up_to(revision).await
    }

    /// The memory of the cached chains in bytes, by their weight.
    pub fn cached_chain_bytes(&self) -> u64 {
        self.chain_cache.bytes()
    }

    fn current_view(&self) -> Result<SnapshotView, ServiceUnavailable> {
        if self.ready_at.get().is_none() {
            return Err(ServiceUnavailable::NotReady);
        }
        self.parts.snapshot_cell.load().ok_or(ServiceUnavailable::NotReady)
    }
}

impl RuntimeService {
    /// Returns once the process starts draining.
    pub async fn wait_for_drain(&self) {
        // An error is impossible: `self.service` keeps the sender alive.
        let _ = self.service.draining.subscribe().wait_for(|draining| *draining).await;
    }

    /// Decides one call. A denial is an answer, not an error.
    ///
    /// # Errors
    /// Only if nothing can be decided: before the first snapshot, and while draining.
    pub async fn check(&self, request: &DecisionRequest, caller: &Caller) -> Result<CheckAnswer, ServiceUnavailable> {
        Ok(self.check_pending(request, caller).await?.0)
    }

    /// Records that a proof was presented by a call that cannot be decided, because its message is malformed. Somebody may
    /// have read the proof on its way, so no later call can get a proved handle with it.
    pub fn record_undecided_proof(&self, credential: &AgentCredential, proof: Option<&[u8]>, caller: &Caller) {
        if let Ok(view) = self.service.current_view() {
            self.service.record_unjudged_proof(credential, proof, caller, &view, self.service.parts.clock.now());
        }
    }

    /// As [`RuntimeService::check`], for an answer that is not sent at once. The caller must pass it to [`RuntimeService::confirm_answer`] before it sends it.
    ///
    /// # Errors
    /// As [`RuntimeService::check`].
    pub async fn check_pending(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
    ) -> Result<(CheckAnswer, PendingAnswer), ServiceUnavailable> {
        let service = &*self.service;
        let mut started = service.parts.clock.now();
        let mut view = service.current_view()?;
        if let Some(at_least) = &request.at_least {
            let is_caught_up = is_active(Mutant::AtLeastIgnored)
                || service.catch_up_to(at_least, &request.credential, caller, &view, started).await;
            if !is_caught_up {
                service.record_unjudged_proof(&request.credential, request.proof.as_deref(), caller, &view, started);
                let denied_judgement =
                    Judgement::from_denial(Decision::deny(Reason::RevisionUnavailable, view.snapshot.revision().number));
                return Ok(self.record_and_answer(request, caller, view, denied_judgement, started));
            }
            // The wait took time, so the chain is judged at the current time.
            if !is_active(Mutant::AtLeastOldView) {
                view = service.current_view()?;
            }
            started = service.parts.clock.now();
        }
        let mut judgement = service.judge_call(request, caller, &view, started);
        let policy_effect = judgement.decision.effect;
        // A warm permit never awaits.
        if policy_effect != Effect::Deny && judgement.needs_ledger() {
            return Ok(self.run_ledger_task(request, caller, view, judgement, started).await);
        }
        if policy_effect != Effect::Deny
            && let Some(denial) = service.spend_locally(&mut judgement, &view)
        {
            judgement.decision = denial;
        }
        let answer_and_pending = self.record_and_answer(request, caller, view, judgement, started);
        if answer_and_pending.0.decision.shadow_decision.is_some() {
            service.count_shadow_decision(&request.tool, policy_effect, &answer_and_pending.0);
        }
        Ok(answer_and_pending)
    }

    /// Confirms an answer just before it is sent. If a revocation or the age of the view denies the call by now, the answer
    /// becomes a denial. Does not await. The caller must not await either before it sends the answer.
    pub fn confirm_answer(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        answer: CheckAnswer,
        pending: PendingAnswer,
    ) -> CheckAnswer {
        self.confirm_pending(request, caller, answer, pending).0
    }

    /// As [`RuntimeService::confirm_answer`], and keeps the evidence for another confirmation.
    fn confirm_pending(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        answer: CheckAnswer,
        pending: PendingAnswer,
    ) -> (CheckAnswer, PendingAnswer) {
        let PendingAnswer { view, mut judgement, started, used_approvals: used } = pending;
        let now = self.service.parts.clock.now();
        let snapshot = &view.snapshot;
        let still_valid =
            snapshot.revocations().generation() == judgement.revocation_generation && !is_too_old(&view, &request.tool, now);
        if answer.decision.effect == Effect::Deny || still_valid {
            return (answer, PendingAnswer { view, judgement, started, used_approvals: used });
        }
        // An answer that is no denial has both.
        let current_decision = match (&judgement.chain, &judgement.arguments) {
            (Some(chain), Some(arguments)) => {
                pdp::decide(&chain.prepared, &judgement::pdp_call(request, arguments, now), snapshot, now)
            }
            _ => Decision::deny(Reason::Stale, snapshot.revision().number),
        };
        if current_decision.effect == Effect::Deny {
            judgement.decision = current_decision;
        } else if !is_too_old(&view, &request.tool, now) {
            return (answer, PendingAnswer { view, judgement, started, used_approvals: used });
        }
        if let Some(used) = used {
            // At most one such task per pending answer, and no answer waits for it.
            let (service, permit) = (self.service.clone(), self.ledger_quota.try_reserve());
            (self.service.parts.spawn)(Box::pin(async move {
                service.give_back_approvals(used).await;
                drop(permit);
            }));
        }
        (judgement.decision_id, judgement.approval, judgement.message) = (None, None, None);
        self.record_and_answer(request, caller, view, judgement, started)
    }

    /// Re-checks freshness on the same view, records the decision, and only then returns the answer. Does not await.
    fn record_and_answer(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        view: SnapshotView,
        mut judgement: Judgement,
        started: ClockReading,
    ) -> (CheckAnswer, PendingAnswer) {
        let service = &*self.service;
        let now = service.parts.clock.now();
        let snapshot = &view.snapshot;
        let is_stale = is_too_old(&view, &request.tool, now) && !is_active(Mutant::SkipRecheck);
        if judgement.decision.effect != Effect::Deny && is_stale {
            judgement.decision = Decision::deny(Reason::Stale, snapshot.revision().number);
        }
        let handle = match (&judgement.chain, judgement.proves_new_handle()) {
            (Some(chain), Some(proved)) if request.want_handle && judgement.decision.effect != Effect::Deny => {
                service.handle_cache.issue(chain.clone(), proved, caller.connection_id, now)
            }
            _ => None,
        };
        let mut answer = self.build_answer(request, &view, &judgement, now);
        answer.handle = handle;
        let timing = CallTiming { started, now };
        if self.record_decision(request, caller, &view, &judgement, &answer, timing).is_err() {
            // A decision that cannot be recorded is denied.
            judgement.decision = Decision::deny(Reason::AuditUnavailable, snapshot.revision().number);
            judgement.message = None;
            answer = self.build_answer(request, &view, &judgement, now);
        }
        service.record_telemetry(request, &judgement, &answer, timing);
        (answer, PendingAnswer { view, judgement, started, used_approvals: None })
    }

    fn build_answer(
        &self,
        request: &DecisionRequest,
        view: &SnapshotView,
        judgement: &Judgement,
        now: ClockReading,
    ) -> CheckAnswer {
        let snapshot = &view.snapshot;
        let decision = &judgement.decision;
        let chain_remaining_ms = judgement.chain.as_ref().map(|chain| chain.remaining_ms(now));
        let mut revision = snapshot.revision().clone();
        revision.number = decision.revision;
        CheckAnswer {
            decision_id: judgement.decision_id.clone().unwrap_or_else(|| decision_id::new(now)),
            decision: decision.clone(),
            message: judgement.message.clone().unwrap_or_else(|| decision.reason.message().to_owned()),
            identities: judgement.chain.as_ref().map(|chain| chain.identities.clone()),
            tool_is_registered: snapshot.tool(&request.tool).is_some(),
            revision: Some(revision),
            snapshot_age_ms: view.age_ms(now).unwrap_or(u64::MAX),
            valid_for_ms: view.valid_for_ms(now).min(chain_remaining_ms.unwrap_or(u64::MAX)),
            approval: judgement.approval.clone().filter(|_| decision.effect == Effect::NeedsApproval),
            handle: None,
            shows_possession: judgement.uses_chain_in_force(),
        }
    }
}

/// Whether the view is too old to permit a call of the tool.
fn is_too_old(view: &SnapshotView, tool: &str, now: ClockReading) -> bool {
    match view.freshness(now) {
        Freshness::Fresh => false,
        Freshness::Stale => view.snapshot.tool(tool).is_none_or(|tool| tool.is_destructive()),
        Freshness::Closed => true,
    }
}
