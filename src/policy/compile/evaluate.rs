//! The evaluation: every layer answers a call, and the least answer is the decision.
//!
//! The layers are, in the order of reporting: tool, user, application, agents from the root, scopes from the root token,
//! guardrails. Of several equal answers the first is reported. An unconditional permit costs one lookup and one bit and allocates
//! nothing. Every other call goes through the layers one by one. This file is pure: it uses no clock and no state. Look next at
//! `set.rs` for the matching of entries.

use std::sync::Arc;

use crate::model::decision::{ApprovalNeed, Effect, EntryRef, Obligation, PreparedNeed};
use crate::model::ids::GroupId;
use crate::model::reason::{Layer, Reason};
use crate::model::request::{Call, Subject};

use super::super::condition::{Facts, Failed, Work};
use super::super::document::List;
use super::super::tools::Tool;
use super::Compiled;
use super::resolve::{Failure, Resolved, is_free};
use super::set::{Chances, Heard, PermissionSet, SetEntry};

/// The answer of the policy to one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The least effect of all layers.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Reason,
    /// The first layer that gave this effect; `None` on a permit.
    pub layer: Option<Layer>,
    /// The index of the deciding agent or token; the root is 0.
    pub hop: Option<usize>,
    /// The entry that decided; `None` on a permit, and if a token decided.
    pub matched: Option<Arc<EntryRef>>,
    /// The approvals that the call needs, one for each layer that demands one. Empty if a layer denies.
    pub approvals: Vec<ApprovalNeed>,
    /// The calls that must have been prepared, one for each layer that demands one. Empty if a layer denies.
    pub prepared: Vec<PreparedNeed>,
    /// The obligations of a permit.
    pub obligations: Vec<Obligation>,
}

/// The possible answers of the policy for a tool whose arguments are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The best effect that some arguments can reach. Each entry is judged by itself.
    pub effect: Effect,
    /// The reason why the effect is no better.
    pub reason: Reason,
    /// The first layer that limits the effect; `None` on a permit.
    pub layer: Option<Layer>,
    /// Whether the answer depends on the arguments.
    pub maybe: bool,
}

/// The answer of one layer, for an explanation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerAnswer {
    /// The layer.
    pub layer: Layer,
    /// The index of the agent or token; the root is 0.
    pub hop: Option<usize>,
    /// The effect.
    pub effect: Effect,
    /// The reason; `OK` on a permit.
    pub reason: Reason,
    /// The entry that decided in this layer. `None` for a token, an unknown document, and a user with no group or several.
    pub matched: Option<EntryRef>,
    /// The approval that the layer demands.
    pub approval: Option<ApprovalNeed>,
    /// The calls that must have been prepared.
    pub prepared: Vec<PreparedNeed>,
}

impl Compiled {
    /// Decides a call. A `resolved` of another policy is resolved again.
    pub fn evaluate(&self, resolved: &Resolved, subject: &Subject, call: &Call<'_>) -> Verdict {
        let fresh;
        let resolved = if resolved.serial == self.serial {
            resolved
        } else {
            // INVARIANT: the bits of another policy's tool table are never read.
            fresh = self.resolve(subject);
            &fresh
        };
        if let (None, Some(number)) = (resolved.failure, self.base.tools.number(call.tool))
            && resolved.permitted.contains(number)
            && self.base.tools.tool(number).is_some_and(|tool| has_schema(tool, call))
        {
            return Verdict::permit();
        }
        let mut verdict = Verdict::permit();
        self.ask_layers(resolved, subject, call, &mut |answer| {
            if answer.effect < verdict.effect {
                verdict.effect = answer.effect;
                verdict.reason = answer.reason;
                verdict.layer = Some(answer.layer);
                verdict.hop = answer.hop;
                verdict.matched = answer.matched.as_ref().map(|matched| Arc::new(matched.to_entry()));
            }
            verdict.approvals.extend(answer.approval);
            verdict.prepared.extend(answer.prepared);
            answer.effect != Effect::Deny
        });
        if verdict.effect == Effect::Deny {
            verdict.approvals.clear();
            verdict.prepared.clear();
        }
        verdict
    }

    /// The answers of all layers to a call, in the order of reporting. An unknown chain or tool gives a single answer.
    pub fn explain(&self, resolved: &Resolved, subject: &Subject, call: &Call<'_>) -> Vec<LayerAnswer> {
        let fresh;
        let resolved = if resolved.serial == self.serial {
            resolved
        } else {
            fresh = self.resolve(subject);
            &fresh
        };
        let mut answers = Vec::new();
        self.ask_layers(resolved, subject, call, &mut |answer| {
            let unknown = matches!(answer.layer, Layer::Identity) || answer.reason == Reason::ToolUnknown;
            answers.push(LayerAnswer {
                layer: answer.layer,
                hop: answer.hop,
                effect: answer.effect,
                reason: answer.reason,
                matched: answer.matched.as_ref().map(Matched::to_entry),
                approval: answer.approval,
                prepared: answer.prepared,
            });
            !unknown
        });
        answers
    }

    /// The possible answers for a tool over all arguments. A pinned schema is assumed to match.
    pub fn reach(&self, resolved: &Resolved, subject: &Subject, tool: &str) -> Reach {
        let fresh;
        let resolved = if resolved.serial == self.serial {
            resolved
        } else {
            fresh = self.resolve(subject);
            &fresh
        };
        let deny = |reason: Reason, layer| Reach { effect: Effect::Deny, reason, layer: Some(layer), maybe: false };
        if let Some(failure) = resolved.failure {
            return deny(failure.reason, failure.reason.layer().unwrap_or(Layer::Identity));
        }
        let Some(number) = self.base.tools.number(tool) else {
            return deny(Reason::ToolUnknown, Layer::Tool);
        };
        let mut best = Reach { effect: Effect::Permit, reason: Reason::Ok, layer: None, maybe: false };
        if resolved.permitted.contains(number) {
            return best;
        }
        let mut worst = Effect::Permit;
        let mut add = |layer: Layer, denial: Reason, layer_best: Effect, layer_worst: Effect| {
            worst = worst.min(layer_worst);
            if layer_best < best.effect {
                let reason = if layer_best == Effect::Deny { denial } else { Reason::ApprovalRequired };
                best = Reach { effect: layer_best, reason, layer: Some(layer), maybe: false };
            }
        };
        let (user_best, user_worst) = best_and_worst(number, resolved.groups.iter().map(|(_, set)| &**set));
        add(Layer::User, Reason::UserDenies, user_best, user_worst);
        let application = resolved.application.as_deref();
        let denial = if application.is_some() { Reason::ApplicationDenies } else { Reason::ApplicationUnknown };
        let (application_best, application_worst) = best_and_worst(number, application.into_iter());
        add(Layer::Application, denial, application_best, application_worst);
        for agent in &resolved.agents {
            match agent.refusal {
                Some((reason, _)) => add(Layer::Agent, reason, Effect::Deny, Effect::Deny),
                None => {
                    let (agent_best, agent_worst) = best_and_worst(number, std::iter::once(&*agent.permissions));
                    add(Layer::Agent, Reason::AgentDenies, agent_best, agent_worst);
                }
            }
        }
        for scope in &subject.scopes {
            match scope.tools.get(tool) {
                None => add(Layer::Hop, Reason::ToolNotGranted, Effect::Deny, Effect::Deny),
                Some(arguments) if is_free(arguments) => {}
                Some(_) => add(Layer::Hop, Reason::ArgumentRefused, Effect::Permit, Effect::Deny),
            }
        }
        if self.base.guardrails.iter().any(|guardrail| guardrail.tools.contains(number)) {
            add(Layer::Guardrail, Reason::GuardrailDenies, Effect::Permit, Effect::Deny);
        }
        best.maybe = worst != best.effect;
        best
    }

    /// Evaluates the layers in order until `take` returns `false`.
    fn ask_layers<'a>(
        &'a self,
        resolved: &'a Resolved,
        subject: &'a Subject,
        call: &Call<'_>,
        take: &mut dyn FnMut(Answer<'a>) -> bool,
    ) {
        if let Some(failure) = resolved.failure {
            take(Answer::failure(failure));
            return;
        }
        let Some((number, tool)) = self.base.tools.number(call.tool).and_then(|n| Some((n, self.base.tools.tool(n)?))) else {
            take(Answer::new(Layer::Tool, None, Err(Reason::ToolUnknown), None));
            return;
        };
        let registered = if has_schema(tool, call) { Ok(()) } else { Err(Reason::ToolChanged) };
        let document = Matched { kind: tool.kind, id: &tool.document, entry: "" };
        if !take(Answer::new(Layer::Tool, None, registered, Some(document))) {
            return;
        }
        let work = Work::default();
        let facts = Facts { subject, call, risk: tool.risk.as_str(), agents_seen: 1, work: &work };
        let groups = resolved.groups.iter().map(|(id, set)| Owner { kind: "group", id, set });
        if !take(ask_for_each_agent(Layer::User, Reason::UserDenies, groups, number, &facts)) {
            return;
        }
        let application = match &resolved.application {
            None => Answer::new(Layer::Application, None, Err(Reason::ApplicationUnknown), None),
            Some(set) => {
                let owner = Owner { kind: "application", id: subject.application.as_str(), set };
                ask_for_each_agent(Layer::Application, Reason::ApplicationDenies, std::iter::once(owner), number, &facts)
            }
        };
        if !take(application) {
            return;
        }
        for (hop, (agent, id)) in resolved.agents.iter().zip(&subject.agents).enumerate() {
            let owner = Owner { kind: "agent", id: id.as_str(), set: &agent.permissions };
            let facts = Facts { agents_seen: hop + 1, ..facts };
            let answer = match agent.refusal {
                Some((reason, key)) => {
                    let matched = Matched { kind: "agent", id: id.as_str(), entry: key };
                    Answer::new(Layer::Agent, Some(hop), Err(reason), Some(matched))
                }
                None => ask(Layer::Agent, Some(hop), Reason::AgentDenies, std::iter::once(owner), number, &facts),
            };
            if !take(answer) {
                return;
            }
        }
        for (hop, scope) in subject.scopes.iter().enumerate() {
            let granted = match scope.tools.get(call.tool) {
                None => Err(Reason::ToolNotGranted),
                Some(arguments) if is_free(arguments) || arguments.admits(call.arguments).is_ok() => Ok(()),
                Some(_) => Err(Reason::ArgumentRefused),
            };
            if !take(Answer::new(Layer::Hop, Some(hop), granted, None)) {
                return;
            }
        }
        take(self.ask_guardrails(number, &facts));
    }

    /// Evaluates the guardrails of a tool. A guardrail denies if it cannot be evaluated, or if it forbids any agent of the chain.
    fn ask_guardrails(&self, tool: u32, facts: &Facts<'_>) -> Answer<'_> {
        let mut forbidding = None;
        for guardrail in self.base.guardrails.iter().filter(|guardrail| guardrail.tools.contains(tool)) {
            let matched = || Matched { kind: "guardrail", id: &guardrail.id, entry: guardrail.forbid_when.text() };
            let agents = if guardrail.forbid_when.asks_agent() { facts.subject.agents.len() } else { 1 };
            for agents_seen in 1..=agents {
                match guardrail.forbid_when.holds(&Facts { agents_seen, ..*facts }) {
                    Ok(false) => {}
                    Ok(true) => drop(forbidding.get_or_insert_with(matched)),
                    Err(Failed) => return Answer::new(Layer::Guardrail, None, Err(Reason::ConditionError), Some(matched())),
                }
            }
        }
        match forbidding {
            Some(matched) => Answer::new(Layer::Guardrail, None, Err(Reason::GuardrailDenies), Some(matched)),
            None => Answer::new(Layer::Guardrail, None, Ok(()), None),
        }
    }
}

impl Verdict {
    fn permit() -> Self {
        Self {
            effect: Effect::Permit,
            reason: Reason::Ok,
            layer: None,
            hop: None,
            matched: None,
            approvals: Vec::new(),
            prepared: Vec::new(),
            obligations: Vec::new(),
        }
    }
}

/// A permission set with the document that it belongs to.
#[derive(Clone, Copy)]
struct Owner<'a> {
    kind: &'static str,
    id: &'a str,
    set: &'a PermissionSet,
}

/// An [`EntryRef`] that borrows its text.
struct Matched<'a> {
    kind: &'static str,
    id: &'a str,
    entry: &'a str,
}

impl Matched<'_> {
    fn to_entry(&self) -> EntryRef {
        EntryRef { kind: self.kind, id: self.id.into(), entry: self.entry.into() }
    }
}

/// The answer of a layer while it is computed. It becomes a [`LayerAnswer`] in an explanation.
struct Answer<'a> {
    layer: Layer,
    hop: Option<usize>,
    effect: Effect,
    reason: Reason,
    matched: Option<Matched<'a>>,
    approval: Option<ApprovalNeed>,
    prepared: Vec<PreparedNeed>,
}

impl<'a> Answer<'a> {
    fn new(layer: Layer, hop: Option<usize>, result: Result<(), Reason>, matched: Option<Matched<'a>>) -> Self {
        let (effect, reason) = match result {
            Ok(()) => (Effect::Permit, Reason::Ok),
            Err(reason) => (Effect::Deny, reason),
        };
        Self { layer, hop, effect, reason, matched, approval: None, prepared: Vec::new() }
    }

    /// Merges the demands of another answer of the same layer.
    fn also(&mut self, other: Self) {
        self.prepared.extend(other.prepared);
        self.prepared.sort();
        self.prepared.dedup();
        match (&mut self.approval, other.approval) {
            (Some(need), Some(more)) => {
                need.by.extend(more.by);
                need.by.sort();
                need.by.dedup();
                need.expires_in_ms = need.expires_in_ms.min(more.expires_in_ms);
            }
            (need @ None, more) => *need = more,
            (Some(_), None) => {}
        }
    }

    fn failure(failure: Failure) -> Self {
        Self::new(failure.reason.layer().unwrap_or(Layer::Identity), failure.hop, Err(failure.reason), None)
    }
}

/// The answer of a layer whose documents serve the whole chain. If its conditions read the agent, they are evaluated for each
/// agent, and the least answer counts. So delegating to another agent can never lift a denial.
fn ask_for_each_agent<'a>(
    layer: Layer,
    denial: Reason,
    owners: impl Iterator<Item = Owner<'a>> + Clone,
    tool: u32,
    facts: &Facts<'_>,
) -> Answer<'a> {
    let mut least = ask(layer, None, denial, owners.clone(), tool, facts);
    if facts.subject.agents.len() == 1 || !owners.clone().any(|owner| owner.set.asks_agent) {
        return least;
    }
    for agents_seen in 2..=facts.subject.agents.len() {
        let mut next = ask(layer, None, denial, owners.clone(), tool, &Facts { agents_seen, ..*facts });
        if next.effect < least.effect {
            std::mem::swap(&mut least, &mut next);
        }
        least.also(next);
    }
    least
}

/// The answer of a layer of permission sets. The sets are united; then deny takes precedence over approve, and approve over
/// allow. Without an applicable entry the layer denies.
fn ask<'a>(
    layer: Layer,
    hop: Option<usize>,
    denial: Reason,
    owners: impl Iterator<Item = Owner<'a>> + Clone,
    tool: u32,
    facts: &Facts<'_>,
) -> Answer<'a> {
    let mut decisive: Option<(Owner<'a>, &'a SetEntry)> = None;
    let strength = |entry: &SetEntry| (entry.list, entry.prepared.is_some());
    for owner in owners.clone() {
        match owner.set.decisive(tool, facts) {
            Heard::Nothing => {}
            Heard::Entry(entry) if decisive.is_some_and(|(_, other)| strength(other) <= strength(entry)) => {}
            Heard::Entry(entry) => decisive = Some((owner, entry)),
            // INVARIANT: no rule is ever skipped. A condition that cannot be evaluated denies.
            Heard::Failed(entry) => return Answer::new(layer, hop, Err(Reason::ConditionError), Some(matched(owner, entry))),
        }
    }
    let Some((owner, entry)) = decisive else {
        let mut owners = owners;
        let only = owners.next().filter(|_| owners.next().is_none());
        let matched = only.map(|owner| Matched { kind: owner.kind, id: owner.id, entry: "" });
        return Answer::new(layer, hop, Err(denial), matched);
    };
    let matched = Some(matched(owner, entry));
    let prepared: Vec<_> = entry.prepared.iter().map(|tool| PreparedNeed { layer, hop, tool: tool.clone() }).collect();
    match entry.list {
        List::Deny => Answer::new(layer, hop, Err(denial), matched),
        List::Allow => Answer { prepared, ..Answer::new(layer, hop, Ok(()), matched) },
        List::Approve => Answer {
            layer,
            hop,
            effect: Effect::NeedsApproval,
            reason: Reason::ApprovalRequired,
            matched,
            approval: Some(need(layer, hop, owners, tool, facts)),
            prepared,
        },
    }
}

fn matched<'a>(owner: Owner<'a>, entry: &'a SetEntry) -> Matched<'a> {
    match &entry.origin {
        Some(set) => Matched { kind: "permission_set", id: set, entry: &entry.text },
        None => Matched { kind: owner.kind, id: owner.id, entry: &entry.text },
    }
}

/// The approval that a layer demands. Every approver of an applicable entry may give it, and the shortest expiry applies.
fn need<'a>(
    layer: Layer,
    hop: Option<usize>,
    owners: impl Iterator<Item = Owner<'a>>,
    tool: u32,
    facts: &Facts<'_>,
) -> ApprovalNeed {
    // INVARIANT: an exhausted budget never drops an approver. Each condition was evaluated before, so all of them fit a new
    // budget.
    let work = Work::default();
    let facts = &Facts { work: &work, ..*facts };
    let mut by: Vec<GroupId> = Vec::new();
    let mut expires_in_ms = u64::MAX;
    for owner in owners {
        for approval in owner.set.approving(tool, facts) {
            by.extend(approval.by.iter().cloned());
            expires_in_ms = expires_in_ms.min(approval.expires_in_ms);
        }
    }
    by.sort();
    by.dedup();
    ApprovalNeed { layer, hop, by, expires_in_ms }
}

/// The best and the worst effect of a layer of permission sets.
pub(super) fn best_and_worst<'a>(tool: u32, sets: impl Iterator<Item = &'a PermissionSet>) -> (Effect, Effect) {
    let mut chances = Chances::default();
    sets.for_each(|set| set.add_chances(tool, &mut chances));
    let [deny_sure, approve_sure, allow_sure] = chances.sure;
    let [deny, approve, allow] = chances.possible;
    let best = match () {
        () if deny_sure => Effect::Deny,
        () if approve_sure => Effect::NeedsApproval,
        () if allow => Effect::Permit,
        () if approve => Effect::NeedsApproval,
        () => Effect::Deny,
    };
    let worst = match () {
        () if deny || chances.may_fail => Effect::Deny,
        () if approve_sure || (allow_sure && approve) => Effect::NeedsApproval,
        () if allow_sure => Effect::Permit,
        () => Effect::Deny,
    };
    (best, worst)
}

fn has_schema(tool: &Tool, call: &Call<'_>) -> bool {
    tool.schema_sha256.is_none() || tool.schema_sha256 == call.tool_schema_sha256
}
