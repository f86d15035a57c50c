//! `ListTools`: the decision that [`RuntimeService::check`] would make on each tool before the arguments are known.
//!
//! A listing must not show more of policy than its caller has proved. A long one lets the other calls of its runtime run in between, and
//! begins anew if the view changed meanwhile. Look next at `pdp::evaluate_reach`, which decides one tool.

use std::sync::Arc;

use super::record::{CallTiming, ListingCredential};
use super::replay_cache::SpendOutcome;
use super::request::{Caller, LIST_TOOLS, ListToolsAnswer, ListToolsRequest, ToolDecision};
use super::{CachedChain, PdpService, RuntimeService, ServiceUnavailable};
use crate::model::decision::{Decision, Effect};
use crate::model::json::JsonObject;
use crate::model::limits::{LIST_RESTARTS_MAX, LIST_SLICE_TOOLS};
use crate::model::reason::Reason;
use crate::model::request::TokenScope;
use crate::model::revision::Revision;
use crate::model::time::ClockReading;
use crate::pdp;
use crate::snapshot::{Freshness, SnapshotView};
use crate::token::{ProofCall, Rejection};

/// One attempt at a listing: the view, the credential as verified on that view, and the decision for the listing as a whole.
struct ListingPass {
    view: SnapshotView,
    listed: Result<ListingCredential, Rejection>,
    decision: Decision,
    freshness: Freshness,
    /// The generation of the revocation index, read before the pass began.
    generation: u64,
    now: ClockReading,
}

impl RuntimeService {
    /// Lists the tools that a chain may call. If the chain does not verify, every tool is denied with the reason.
    ///
    /// Without a proof, the answer holds only the tool names of the chain's scope. A chain is not secret, so a thief of a chain
    /// must learn nothing of policy from it. A proof counts once.
    ///
    /// # Errors
    /// As [`RuntimeService::check`].
    pub async fn list_tools(&self, request: &ListToolsRequest, caller: &Caller) -> Result<ListToolsAnswer, ServiceUnavailable> {
        let service = &*self.service;
        let started = service.parts.clock.now();
        let view = service.current_view()?;
        let generation = view.snapshot.revocations().generation();
        let listed = service.verify_listing(request, caller, &view, started);
        let mut pass = ListingPass::new(view, generation, listed, service.parts.clock.now());
        let mut restarts = 0;
        let mut tools = Vec::new();
        let mut names = pass.names(request).into_iter();
        while let Some(tool) = names.next() {
            if !tools.is_empty() && tools.len() % LIST_SLICE_TOOLS == 0 && restarts < LIST_RESTARTS_MAX {
                tokio::task::yield_now().await;
                // INVARIANT: nothing awaits after the last look, and a pass decides all tools by one snapshot.
                if service.must_restart(&mut pass, request, caller)? {
                    restarts += 1;
                    tools.clear();
                    names = pass.names(request).into_iter();
                    continue;
                }
            }
            tools.push(pass.decide(tool));
        }
        let mut answer = pass.answer(tools);
        let timing = CallTiming { started, now: pass.now };
        if self
            .record_listing((request, caller), &pass.view, (&pass.decision, pass.listed.as_ref().ok()), &answer, timing)
            .is_err()
        {
            // A listing that cannot be recorded is not shown.
            (answer.reason, answer.message) = (Reason::AuditUnavailable, Reason::AuditUnavailable.message().to_owned());
            for tool in &mut answer.tools {
                (tool.effect, tool.reason, tool.maybe) = (Effect::Deny, answer.reason, false);
            }
        }
        Ok(answer)
    }

    /// The current revision; `None` before the first snapshot.
    pub fn current_revision(&self) -> Option<Revision> {
        self.service.current_view().ok().map(|view| view.snapshot.revision().clone())
    }
}

impl PdpService {
    /// Verifies the credential, the audience and the proof of a listing, and spends the proof.
    fn verify_listing(
        &self,
        request: &ListToolsRequest,
        caller: &Caller,
        view: &SnapshotView,
        now: ClockReading,
    ) -> Result<ListingCredential, Rejection> {
        let options = self.verifier_options(&view.snapshot);
        let verified = self.verify_credential(&request.credential, caller, &view.snapshot, &options, now)?;
        let chain = &verified.chain.prepared;
        let signed = self.present_proof(request.proof.as_deref(), chain, &options, now);
        let audience = self.resolve_audience(request.audience.as_deref(), caller, &view.snapshot)?;
        chain.chain().check_audience(audience.as_deref(), &options)?;
        let proof_call = ProofCall { tool: LIST_TOOLS, arguments: &JsonObject::default(), audience: audience.as_deref() };
        let proof =
            signed.map(|signed| signed.and_then(|(signed, _)| signed.verify_call(&proof_call, &options, now))).transpose()?;
        if let Some(proof) = &proof {
            let refused = |reason: Reason, message: &str| Err(Rejection { reason, hop: None, message: message.to_owned() });
            match self.replay_cache.spend(&proof.replay_key(), self.replay_cache.proof_holder(chain.subject()), now) {
                SpendOutcome::First => {}
                SpendOutcome::Replayed => return refused(Reason::ProofReplayed, Reason::ProofReplayed.message()),
                SpendOutcome::ShareFull => {
                    return refused(
                        Reason::LedgerBusy,
                        "this agent has too many proofs in use on this replica: list without one",
                    );
                }
            }
        }
        Ok(ListingCredential {
            proved: proof.is_some() || verified.proved,
            proof_jti: proof.map(|proof| proof.jti().to_owned()),
            chain: verified.chain,
        })
    }

    /// Looks at the newest view after a wait. Returns whether the pass must begin anew, and prepares it for that.
    fn must_restart(
        &self,
        pass: &mut ListingPass,
        request: &ListToolsRequest,
        caller: &Caller,
    ) -> Result<bool, ServiceUnavailable> {
        let view = self.current_view()?;
        let now = self.parts.clock.now();
        let generation = view.snapshot.revocations().generation();
        let has_expired = pass.listed.as_ref().is_ok_and(|listed| listed.chain.remaining_ms(now) == 0);
        let is_same = Arc::ptr_eq(&view.snapshot, &pass.view.snapshot)
            && generation == pass.generation
            && view.freshness(now) == pass.freshness
            && (!has_expired || pass.decision.effect == Effect::Deny);
        if is_same {
            // The proof of freshness may be newer.
            (pass.view, pass.now) = (view, now);
            return Ok(false);
        }
        let listed = pass.listed.clone().and_then(|listed| {
            let options = self.verifier_options(&view.snapshot);
            let chain = self.refresh_chain(&listed.chain, &view.snapshot, &options, now)?;
            let audience = self.resolve_audience(request.audience.as_deref(), caller, &view.snapshot)?;
            chain.prepared.chain().check_audience(audience.as_deref(), &options)?;
            Ok(ListingCredential { chain, ..listed })
        });
        *pass = ListingPass::new(view, generation, listed, now);
        Ok(true)
    }
}

impl ListingPass {
    fn new(view: SnapshotView, generation: u64, listed: Result<ListingCredential, Rejection>, now: ClockReading) -> Self {
        let number = view.snapshot.revision().number;
        let freshness = view.freshness(now);
        let decision = match &listed {
            _ if freshness == Freshness::Closed => Decision::deny(Reason::Stale, number),
            Ok(ListingCredential { chain, proved, .. }) => {
                let bar = if *proved { pdp::deny_all_tools } else { pdp::deny_void_chain };
                bar(&chain.prepared, &view.snapshot, now).unwrap_or_else(|| Decision::permit(number))
            }
            Err(rejection) => Decision::deny(rejection.reason, number).with_hop(rejection.hop),
        };
        Self { view, listed, decision, freshness, generation, now }
    }

    /// The names of the tools to decide.
    fn names(&self, request: &ListToolsRequest) -> Vec<String> {
        match &self.listed {
            _ if !request.tools.is_empty() => request.tools.clone(),
            Ok(ListingCredential { proved: true, .. }) => {
                self.view.snapshot.policy().tools().map(|tool| tool.name.to_string()).collect()
            }
            Ok(ListingCredential { chain, .. }) => {
                leaf_scope(chain).map(|scope| scope.tools.keys().map(ToString::to_string).collect()).unwrap_or_default()
            }
            Err(_) => Vec::new(),
        }
    }

    /// Decides one tool.
    fn decide(&self, tool: String) -> ToolDecision {
        let denied = |tool, reason| ToolDecision { tool, effect: Effect::Deny, reason, maybe: false };
        match &self.listed {
            _ if self.decision.effect == Effect::Deny => denied(tool, self.decision.reason),
            Err(_) => denied(tool, Reason::TokenMalformed),
            Ok(ListingCredential { chain, proved: false, .. }) => {
                match leaf_scope(chain).is_some_and(|scope| scope.tools.contains_key(&tool)) {
                    true => ToolDecision { tool, effect: Effect::Permit, reason: Reason::Ok, maybe: true },
                    false => denied(tool, Reason::ToolNotGranted),
                }
            }
            Ok(ListingCredential { chain, .. }) => {
                let reach = pdp::evaluate_reach(&chain.prepared, &tool, &self.view.snapshot, self.now);
                let destructive = self.view.snapshot.tool(&tool).is_none_or(|tool| tool.is_destructive());
                if reach.effect != Effect::Deny && self.freshness == Freshness::Stale && destructive {
                    return denied(tool, Reason::Stale);
                }
                ToolDecision { tool, effect: reach.effect, reason: reach.reason, maybe: reach.depends_on_arguments }
            }
        }
    }

    fn answer(&self, tools: Vec<ToolDecision>) -> ListToolsAnswer {
        let (view, now) = (&self.view, self.now);
        let listed = self.listed.as_ref().ok();
        ListToolsAnswer {
            decision_id: super::decision_id::new(now),
            tools,
            revision: Some(view.snapshot.revision().clone()),
            snapshot_age_ms: view.age_ms(now).unwrap_or(u64::MAX),
            valid_for_ms: listed.map_or(u64::MAX, |listed| listed.chain.remaining_ms(now)).min(view.valid_for_ms(now)),
            reason: self.decision.reason,
            message: match &self.listed {
                Err(rejection) if rejection.reason == self.decision.reason => rejection.message.clone(),
                _ => self.decision.reason.message().to_owned(),
            },
            names_only: listed.is_some_and(|listed| !listed.proved),
        }
    }
}

/// The scope of the leaf token. It grants no more than any token above it.
fn leaf_scope(chain: &CachedChain) -> Option<&TokenScope> {
    chain.prepared.subject().scopes.last()
}
