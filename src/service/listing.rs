//! `ListTools`: what [`Lane::check`] would say of each tool before the arguments are known, in one pass.

use std::sync::Arc;

use super::record::Moment;
use super::request::{Caller, ListToolsAnswer, ListToolsRequest, ToolDecision};
use super::{KnownChain, Lane, Undecided};
use crate::model::decision::{Decision, Effect};
use crate::model::reason::Reason;
use crate::model::revision::Revision;
use crate::model::time::Now;
use crate::pdp;
use crate::snapshot::{Freshness, View};
use crate::token::Rejection;

impl Lane {
    /// Lists what a chain may call; a chain that does not verify is denied every tool, with the reason.
    ///
    /// # Errors
    /// As [`Lane::check`].
    pub async fn list_tools(&self, request: &ListToolsRequest, caller: &Caller) -> Result<ListToolsAnswer, Undecided> {
        let service = &*self.service;
        let started = service.parts.clock.now();
        let view = service.view()?;
        let snapshot = &*view.snapshot;
        let number = snapshot.revision().number;
        let names: Vec<String> = if request.tools.is_empty() {
            snapshot.policy().tools().map(|tool| tool.name.to_string()).collect()
        } else {
            request.tools.clone()
        };
        let credited = self.credited(request, caller, &view, started);
        let now = service.parts.clock.now();
        let freshness = view.freshness(now);
        let (mut decision, chain) = match &credited {
            _ if freshness == Freshness::Closed => (Decision::deny(Reason::Stale, number), None),
            Ok(chain) => match pdp::barred_from_all(&chain.prepared, snapshot, now) {
                Some(denial) => (denial, Some(chain)),
                None => (Decision::permit(number), Some(chain)),
            },
            Err(rejection) => (Decision::deny(rejection.reason, number).at_hop(rejection.hop), None),
        };
        let mut answer = ListToolsAnswer {
            decision_id: super::decision_id::new(now),
            tools: names
                .into_iter()
                .map(|tool| one(tool, &decision, chain.map(|chain| &**chain), &view, freshness, now))
                .collect(),
            revision: Some(snapshot.revision().clone()),
            snapshot_age_ms: view.age_ms(now).unwrap_or(u64::MAX),
            valid_for_ms: chain.map_or(u64::MAX, |chain| chain.left_ms(now)).min(view.valid_for_ms(now)),
        };
        let moment = Moment { started, now };
        // Who asked is recorded also where the answer is the same for everybody.
        let known = credited.as_ref().ok().map(|chain| &**chain);
        if self.record_listing((request, caller), &view, (&decision, known), &answer, moment).is_err() {
            decision = Decision::deny(Reason::AuditUnavailable, number);
            for tool in &mut answer.tools {
                (tool.effect, tool.reason, tool.maybe) = (Effect::Deny, decision.reason, false);
            }
        }
        Ok(answer)
    }

    /// The revision that answers, once there is one.
    pub fn revision(&self) -> Option<Revision> {
        self.service.view().ok().map(|view| view.snapshot.revision().clone())
    }

    fn credited(&self, request: &ListToolsRequest, caller: &Caller, view: &View, now: Now) -> Result<Arc<KnownChain>, Rejection> {
        let service = &*self.service;
        let options = service.options(&view.snapshot);
        let chain = service.credit(&request.credential, caller, &view.snapshot, &options, now)?.chain;
        let audience = service.audience(request.audience.as_deref(), caller, &view.snapshot)?;
        chain.prepared.chain().check_audience(audience.as_deref(), &options)?;
        Ok(chain)
    }
}

fn one(
    tool: String,
    decision: &Decision,
    chain: Option<&KnownChain>,
    view: &View,
    freshness: Freshness,
    now: Now,
) -> ToolDecision {
    let Some(chain) = chain else {
        return ToolDecision { tool, effect: Effect::Deny, reason: decision.reason, maybe: false };
    };
    let reach = pdp::reach(&chain.prepared, &tool, &view.snapshot, now);
    let destructive = view.snapshot.tool(&tool).is_none_or(|tool| tool.is_destructive());
    if reach.effect != Effect::Deny && freshness == Freshness::Stale && destructive {
        return ToolDecision { tool, effect: Effect::Deny, reason: Reason::Stale, maybe: false };
    }
    ToolDecision { tool, effect: reach.effect, reason: reach.reason, maybe: reach.maybe }
}
