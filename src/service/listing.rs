//! `ListTools`: the decision that [`Lane::check`] would make on each tool before the arguments are known, in one pass.
//!
//! A listing must not show more of policy than its caller has proved. Look next at `pdp::reach`, which decides one tool.

use std::sync::Arc;

use super::record::Moment;
use super::request::{Caller, LIST_TOOLS, ListToolsAnswer, ListToolsRequest, ToolDecision};
use super::{KnownChain, Lane, Service, Undecided};
use crate::model::decision::{Decision, Effect};
use crate::model::json::Object;
use crate::model::reason::Reason;
use crate::model::request::Scope;
use crate::model::revision::Revision;
use crate::model::time::Now;
use crate::pdp;
use crate::snapshot::{Freshness, View};
use crate::token::{ProofOf, Rejection};

/// The verified credential of a listing.
struct Listed {
    chain: Arc<KnownChain>,
    /// Whether the caller has proved that it holds the chain, by a proof in the request or by a proved handle.
    proved: bool,
    proof_jti: Option<String>,
}

impl Lane {
    /// Lists the tools that a chain may call. If the chain does not verify, every tool is denied with the reason.
    ///
    /// Without a proof, the answer holds only the tool names of the chain's scope. A chain is not secret, so a thief of a chain
    /// must learn nothing of policy from it.
    ///
    /// # Errors
    /// As [`Lane::check`].
    pub async fn list_tools(&self, request: &ListToolsRequest, caller: &Caller) -> Result<ListToolsAnswer, Undecided> {
        let service = &*self.service;
        let started = service.parts.clock.now();
        let view = service.view()?;
        let snapshot = &*view.snapshot;
        let number = snapshot.revision().number;
        let listed = service.listed(request, caller, &view, started);
        let now = service.parts.clock.now();
        let freshness = view.freshness(now);
        let decision = match &listed {
            _ if freshness == Freshness::Closed => Decision::deny(Reason::Stale, number),
            Ok(Listed { chain, proved, .. }) => {
                let bar = if *proved { pdp::barred_from_all } else { pdp::voided };
                bar(&chain.prepared, snapshot, now).unwrap_or_else(|| Decision::permit(number))
            }
            Err(rejection) => Decision::deny(rejection.reason, number).at_hop(rejection.hop),
        };
        let message = match &listed {
            Err(rejection) if rejection.reason == decision.reason => rejection.message.clone(),
            _ => decision.reason.message().to_owned(),
        };
        let listed = listed.ok();
        let names = match &listed {
            _ if !request.tools.is_empty() => request.tools.clone(),
            Some(Listed { proved: true, .. }) => snapshot.policy().tools().map(|tool| tool.name.to_string()).collect(),
            Some(Listed { chain, .. }) => {
                scope(chain).map(|scope| scope.tools.keys().map(ToString::to_string).collect()).unwrap_or_default()
            }
            None => Vec::new(),
        };
        let chain = listed.as_ref().map(|listed| &*listed.chain);
        let mut answer = ListToolsAnswer {
            decision_id: super::decision_id::new(now),
            tools: names.into_iter().map(|tool| one(tool, &decision, listed.as_ref(), &view, freshness, now)).collect(),
            revision: Some(snapshot.revision().clone()),
            snapshot_age_ms: view.age_ms(now).unwrap_or(u64::MAX),
            valid_for_ms: chain.map_or(u64::MAX, |chain| chain.left_ms(now)).min(view.valid_for_ms(now)),
            reason: decision.reason,
            message,
            names_only: listed.as_ref().is_some_and(|listed| !listed.proved),
        };
        let moment = Moment { started, now };
        let proof_jti = listed.as_ref().and_then(|listed| listed.proof_jti.as_deref());
        if self.record_listing((request, caller), &view, (&decision, chain, proof_jti), &answer, moment).is_err() {
            // A listing that cannot be recorded is not shown.
            (answer.reason, answer.message) = (Reason::AuditUnavailable, Reason::AuditUnavailable.message().to_owned());
            for tool in &mut answer.tools {
                (tool.effect, tool.reason, tool.maybe) = (Effect::Deny, answer.reason, false);
            }
        }
        Ok(answer)
    }

    /// The current revision; `None` before the first snapshot.
    pub fn revision(&self) -> Option<Revision> {
        self.service.view().ok().map(|view| view.snapshot.revision().clone())
    }
}

impl Service {
    /// Verifies the credential, the audience and the proof of a listing.
    fn listed(&self, request: &ListToolsRequest, caller: &Caller, view: &View, now: Now) -> Result<Listed, Rejection> {
        let options = self.options(&view.snapshot);
        let credited = self.credit(&request.credential, caller, &view.snapshot, &options, now)?;
        let chain = &credited.chain.prepared;
        let signed = self.show(request.proof.as_deref(), chain, &options, now);
        let audience = self.audience(request.audience.as_deref(), caller, &view.snapshot)?;
        chain.chain().check_audience(audience.as_deref(), &options)?;
        let expected = ProofOf { tool: LIST_TOOLS, arguments: &Object::default(), audience: audience.as_deref() };
        let proof = signed.map(|signed| signed.and_then(|(signed, _)| signed.check(&expected, &options, now))).transpose()?;
        Ok(Listed {
            proved: proof.is_some() || credited.proved,
            proof_jti: proof.map(|proof| proof.jti().to_owned()),
            chain: credited.chain,
        })
    }
}

/// The scope of the leaf token. It grants no more than any token above it.
fn scope(chain: &KnownChain) -> Option<&Scope> {
    chain.prepared.subject().scopes.last()
}

/// Decides one tool of a listing.
fn one(tool: String, decision: &Decision, listed: Option<&Listed>, view: &View, freshness: Freshness, now: Now) -> ToolDecision {
    let denied = |tool, reason| ToolDecision { tool, effect: Effect::Deny, reason, maybe: false };
    match listed {
        _ if decision.effect == Effect::Deny => denied(tool, decision.reason),
        None => denied(tool, Reason::TokenMalformed),
        Some(Listed { chain, proved: false, .. }) => match scope(chain).is_some_and(|scope| scope.tools.contains_key(&tool)) {
            true => ToolDecision { tool, effect: Effect::Permit, reason: Reason::Ok, maybe: true },
            false => denied(tool, Reason::ToolNotGranted),
        },
        Some(Listed { chain, .. }) => {
            let reach = pdp::reach(&chain.prepared, &tool, &view.snapshot, now);
            let destructive = view.snapshot.tool(&tool).is_none_or(|tool| tool.is_destructive());
            if reach.effect != Effect::Deny && freshness == Freshness::Stale && destructive {
                return denied(tool, Reason::Stale);
            }
            ToolDecision { tool, effect: reach.effect, reason: reach.reason, maybe: reach.maybe }
        }
    }
}
