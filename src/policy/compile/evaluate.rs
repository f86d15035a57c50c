//! The evaluation: every layer answers a call, and the least answer is the decision.
//!
//! The layers are, in the order of reporting: tool, user, application, agents from the root, scopes from the root token,
//! guardrails. Of several equal answers the first is reported. An unconditional permit costs one lookup and one bit and allocates
//! nothing. Every other call goes through the layers one by one. This file is pure: it uses no clock and no state. Look next at
//! `permission_set.rs` for the matching of entries.

use std::sync::Arc;

use crate::model::decision::{ApprovalNeed, Effect, Obligation, PolicyEntryRef, PreparationNeed};
use crate::model::ids::GroupId;
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::{DelegationSubject, ToolCall};

use super::super::condition::{CallFacts, ConditionError, WorkBudget};
use super::super::document::ListKind;
use super::super::tools::Tool;
use super::CompiledPolicy;
use super::permission_set::{CompiledEntry, EntryOutcome, PermissionSet, PossibleAnswers};
use super::resolve::{ChainFailure, ResolvedSubject, is_unconstrained};

/// The answer of the policy to one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyVerdict {
    /// The least effect of all layers.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Reason,
    /// The first layer that gave this effect; `None` on a permit.
    pub layer: Option<DecisionLayer>,
    /// The index of the deciding agent or token; the root is 0.
    pub hop: Option<usize>,
    /// The entry that decided; `None` on a permit, and if a token decided.
    pub matched: Option<Arc<PolicyEntryRef>>,
    /// The approvals that the call needs, one for each layer that demands one. Empty if a layer denies.
    pub approvals: Vec<ApprovalNeed>,
    /// The calls that must have been prepared, one for each layer that demands one. Empty if a layer denies.
    pub prepared: Vec<PreparationNeed>,
    /// The obligations of a permit.
    pub obligations: Vec<Obligation>,
}

/// The possible answers of the policy for a tool whose arguments are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyReach {
    /// The best effect that some arguments can reach. Each entry is judged by itself.
    pub effect: Effect,
    /// The reason why the effect is no better.
    pub reason: Reason,
    /// The first layer that limits the effect; `None` on a permit.
    pub layer: Option<DecisionLayer>,
    /// Whether the answer depends on the arguments.
    pub depends_on_arguments: bool,
}

/// The answer of one layer, for an explanation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerAnswer {
    /// The layer.
    pub layer: DecisionLayer,
    /// The index of the agent or token; the root is 0.
    pub hop: Option<usize>,
    /// The effect.
    pub effect: Effect,
    /// The reason; `OK` on a permit.
    pub reason: Reason,
    /// The entry that decided in this layer. `None` for a token, an unknown document, and a user with no group or several.
    pub matched: Option<PolicyEntryRef>,
    /// The approval that the layer demands.
    pub approval: Option<ApprovalNeed>,
    /// The calls that must have been prepared.
    pub prepared: Vec<PreparationNeed>,
}

impl CompiledPolicy {
    /// Decides a call. A `resolved` of another policy is resolved again.
    pub fn evaluate(&self, resolved: &ResolvedSubject, subject: &DelegationSubject, call: &ToolCall<'_>) -> PolicyVerdict {
        let fresh;
        let resolved = if resolved.serial == self.serial {
            resolved
        } else {
            // INVARIANT: the bits of another policy's tool table are never read.
            fresh = self.resolve(subject);
            &fresh
        };
        if let (None, Some(number)) = (resolved.failure, self.base.tools.number(call.tool))
            && resolved.permitted_tools.contains(number)
            && self.base.tools.tool(number).is_some_and(|tool| matches_schema(tool, call))
        {
            return PolicyVerdict::permit();
        }
        let mut verdict = PolicyVerdict::permit();
        self.evaluate_layers(resolved, subject, call, &mut |answer| {
            if answer.effect < verdict.effect {
                verdict.effect = answer.effect;
                verdict.reason = answer.reason;
                verdict.layer = Some(answer.layer);
                verdict.hop = answer.hop;
                verdict.matched = answer.matched.as_ref().map(|matched| Arc::new(matched.to_entry_ref()));
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
    pub fn explain(&self, resolved: &ResolvedSubject, subject: &DelegationSubject, call: &ToolCall<'_>) -> Vec<LayerAnswer> {
        let fresh;
        let resolved = if resolved.serial == self.serial {
            resolved
        } else {
            fresh = self.resolve(subject);
            &fresh
        };
        let mut answers = Vec::new();
        self.evaluate_layers(resolved, subject, call, &mut |answer| {
            let unknown = matches!(answer.layer, DecisionLayer::Identity) || answer.reason == Reason::ToolUnknown;
            answers.push(LayerAnswer {
                layer: answer.layer,
                hop: answer.hop,
                effect: answer.effect,
                reason: answer.reason,
                matched: answer.matched.as_ref().map(EntryRefView::to_entry_ref),
                approval: answer.approval,
                prepared: answer.prepared,
            });
            !unknown
        });
        answers
    }

    /// The possible answers for a tool over all arguments. A pinned schema is assumed to match.
    pub fn tool_reach(&self, resolved: &ResolvedSubject, subject: &DelegationSubject, tool: &str) -> PolicyReach {
        let fresh;
        let resolved = if resolved.serial == self.serial {
            resolved
        } else {
            fresh = self.resolve(subject);
            &fresh
        };
        let deny =
            |reason: Reason, layer| PolicyReach { effect: Effect::Deny, reason, layer: Some(layer), depends_on_arguments: false };
        if let Some(failure) = resolved.failure {
            return deny(failure.reason, failure.reason.layer().unwrap_or(DecisionLayer::Identity));
        }
        let Some(number) = self.base.tools.number(tool) else {
            return deny(Reason::ToolUnknown, DecisionLayer::Tool);
        };
        let mut best = PolicyReach { effect: Effect::Permit, reason: Reason::Ok, layer: None, depends_on_arguments: false };
        if resolved.permitted_tools.contains(number) {
            return best;
        }
        let mut worst = Effect::Permit;
        let mut add = |layer: DecisionLayer, denial: Reason, layer_best: Effect, layer_worst: Effect| {
            worst = worst.min(layer_worst);
            if layer_best < best.effect {
                let reason = if layer_best == Effect::Deny { denial } else { Reason::ApprovalRequired };
                best = PolicyReach { effect: layer_best, reason, layer: Some(layer), depends_on_arguments: false };
            }
        };
        let (user_best, user_worst) = effect_bounds(number, resolved.groups.iter().map(|(_, set)| &**set));
        add(DecisionLayer::User, Reason::UserDenies, user_best, user_worst);
        let application = resolved.application.as_deref();
        let denial = if application.is_some() { Reason::ApplicationDenies } else { Reason::ApplicationUnknown };
        let (application_best, application_worst) = effect_bounds(number, application.into_iter());
        add(DecisionLayer::Application, denial, application_best, application_worst);
        for agent in &resolved.agents {
            match agent.refusal {
                Some((reason, _)) => add(DecisionLayer::Agent, reason, Effect::Deny, Effect::Deny),
                None => {
                    let (agent_best, agent_worst) = effect_bounds(number, std::iter::once(&*agent.permissions));
                    add(DecisionLayer::Agent, Reason::AgentDenies, agent_best, agent_worst);
                }
            }
        }
        for scope in &subject.scopes {
            match scope.tools.get(tool) {
                None => add(DecisionLayer::Hop, Reason::ToolNotGranted, Effect::Deny, Effect::Deny),
                Some(arguments) if is_unconstrained(arguments) => {}
                Some(_) => add(DecisionLayer::Hop, Reason::ArgumentRefused, Effect::Permit, Effect::Deny),
            }
        }
        if self.base.guardrails.iter().any(|guardrail| guardrail.tools.contains(number)) {
            add(DecisionLayer::Guardrail, Reason::GuardrailDenies, Effect::Permit, Effect::Deny);
        }
        best.depends_on_arguments = worst != best.effect;
        best
    }

    /// Evaluates the layers in order until `take` returns `false`.
    fn evaluate_layers<'a>(
        &'a self,
        resolved: &'a ResolvedSubject,
        subject: &'a DelegationSubject,
        call: &ToolCall<'_>,
        take: &mut dyn FnMut(BorrowedLayerAnswer<'a>) -> bool,
    ) {
        if let Some(failure) = resolved.failure {
            take(BorrowedLayerAnswer::from_chain_failure(failure));
            return;
        }
        let Some((number, tool)) = self.base.tools.number(call.tool).and_then(|n| Some((n, self.base.tools.tool(n)?))) else {
            take(BorrowedLayerAnswer::new(DecisionLayer::Tool, None, Err(Reason::ToolUnknown), None));
            return;
        };
        let registered = if matches_schema(tool, call) { Ok(()) } else { Err(Reason::ToolChanged) };
        let document = EntryRefView { kind: tool.document_kind, id: &tool.document_id, entry: "" };
        if !take(BorrowedLayerAnswer::new(DecisionLayer::Tool, None, registered, Some(document))) {
            return;
        }
        let work = WorkBudget::default();
        let facts = CallFacts { subject, call, risk: tool.risk.as_str(), visible_agent_count: 1, work: &work };
        let groups = resolved.groups.iter().map(|(id, set)| OwnedPermissionSet { kind: "group", id, set });
        if !take(evaluate_per_agent(DecisionLayer::User, Reason::UserDenies, groups, number, &facts)) {
            return;
        }
        let application = match &resolved.application {
            None => BorrowedLayerAnswer::new(DecisionLayer::Application, None, Err(Reason::ApplicationUnknown), None),
            Some(set) => {
                let owner = OwnedPermissionSet { kind: "application", id: subject.application.as_str(), set };
                evaluate_per_agent(DecisionLayer::Application, Reason::ApplicationDenies, std::iter::once(owner), number, &facts)
            }
        };
        if !take(application) {
            return;
        }
        for (hop, (agent, id)) in resolved.agents.iter().zip(&subject.agents).enumerate() {
            let owner = OwnedPermissionSet { kind: "agent", id: id.as_str(), set: &agent.permissions };
            let facts = CallFacts { visible_agent_count: hop + 1, ..facts };
            let answer = match agent.refusal {
                Some((reason, key)) => {
                    let matched = EntryRefView { kind: "agent", id: id.as_str(), entry: key };
                    BorrowedLayerAnswer::new(DecisionLayer::Agent, Some(hop), Err(reason), Some(matched))
                }
                None => {
                    evaluate_sets(DecisionLayer::Agent, Some(hop), Reason::AgentDenies, std::iter::once(owner), number, &facts)
                }
            };
            if !take(answer) {
                return;
            }
        }
        for (hop, scope) in subject.scopes.iter().enumerate() {
            let granted = match scope.tools.get(call.tool) {
                None => Err(Reason::ToolNotGranted),
                Some(arguments) if is_unconstrained(arguments) || arguments.check_arguments(call.arguments).is_ok() => Ok(()),
                Some(_) => Err(Reason::ArgumentRefused),
            };
            if !take(BorrowedLayerAnswer::new(DecisionLayer::Hop, Some(hop), granted, None)) {
                return;
            }
        }
        take(self.evaluate_guardrails(number, &facts));
    }

    /// Evaluates the guardrails of a tool. A guardrail denies if it cannot be evaluated, or if it forbids any agent of the chain.
    fn evaluate_guardrails(&self, tool: u32, facts: &CallFacts<'_>) -> BorrowedLayerAnswer<'_> {
        let mut forbidding = None;
        for guardrail in self.base.guardrails.iter().filter(|guardrail| guardrail.tools.contains(tool)) {
            let matched = || EntryRefView { kind: "guardrail", id: &guardrail.id, entry: guardrail.forbid_when.text() };
            let agents = if guardrail.forbid_when.reads_agent() { facts.subject.agents.len() } else { 1 };
            for agents_seen in 1..=agents {
                match guardrail.forbid_when.holds(&CallFacts { visible_agent_count: agents_seen, ..*facts }) {
                    Ok(false) => {}
                    Ok(true) => drop(forbidding.get_or_insert_with(matched)),
                    Err(ConditionError) => {
                        return BorrowedLayerAnswer::new(
                            DecisionLayer::Guardrail,
                            None,
                            Err(Reason::ConditionError),
                            Some(matched()),
                        );
                    }
                }
            }
        }
        match forbidding {
            Some(matched) => {
                BorrowedLayerAnswer::new(DecisionLayer::Guardrail, None, Err(Reason::GuardrailDenies), Some(matched))
            }
            None => BorrowedLayerAnswer::new(DecisionLayer::Guardrail, None, Ok(()), None),
        }
    }
}

impl PolicyVerdict {
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
struct OwnedPermissionSet<'a> {
    kind: &'static str,
    id: &'a str,
    set: &'a PermissionSet,
}

/// An [`PolicyEntryRef`] that borrows its text.
struct EntryRefView<'a> {
    kind: &'static str,
    id: &'a str,
    entry: &'a str,
}

impl EntryRefView<'_> {
    fn to_entry_ref(&self) -> PolicyEntryRef {
        PolicyEntryRef { kind: self.kind, id: self.id.into(), entry: self.entry.into() }
    }
}

/// The answer of a layer while it is computed. It becomes a [`LayerAnswer`] in an explanation.
struct BorrowedLayerAnswer<'a> {
    layer: DecisionLayer,
    hop: Option<usize>,
    effect: Effect,
    reason: Reason,
    matched: Option<EntryRefView<'a>>,
    approval: Option<ApprovalNeed>,
    prepared: Vec<PreparationNeed>,
}

impl<'a> BorrowedLayerAnswer<'a> {
    fn new(layer: DecisionLayer, hop: Option<usize>, result: Result<(), Reason>, matched: Option<EntryRefView<'a>>) -> Self {
        let (effect, reason) = match result {
            Ok(()) => (Effect::Permit, Reason::Ok),
            Err(reason) => (Effect::Deny, reason),
        };
        Self { layer, hop, effect, reason, matched, approval: None, prepared: Vec::new() }
    }

    /// Merges the demands of another answer of the same layer.
    fn merge_requirements(&mut self, other: Self) {
        self.prepared.extend(other.prepared);
        self.prepared.sort();
        self.prepared.dedup();
        match (&mut self.approval, other.approval) {
            (Some(need), Some(more)) => {
                need.approver_groups.extend(more.approver_groups);
                need.approver_groups.sort();
                need.approver_groups.dedup();
                need.expires_in_ms = need.expires_in_ms.min(more.expires_in_ms);
            }
            (need @ None, more) => *need = more,
            (Some(_), None) => {}
        }
    }

    fn from_chain_failure(failure: ChainFailure) -> Self {
        Self::new(failure.reason.layer().unwrap_or(DecisionLayer::Identity), failure.hop, Err(failure.reason), None)
    }
}

/// The answer of a layer whose documents serve the whole chain. If its conditions read the agent, they are evaluated for each
/// agent, and the least answer counts. So delegating to another agent can never lift a denial.
fn evaluate_per_agent<'a>(
    layer: DecisionLayer,
    denial: Reason,
    owners: impl Iterator<Item = OwnedPermissionSet<'a>> + Clone,
    tool: u32,
    facts: &CallFacts<'_>,
) -> BorrowedLayerAnswer<'a> {
    let mut least = evaluate_sets(layer, None, denial, owners.clone(), tool, facts);
    if facts.subject.agents.len() == 1 || !owners.clone().any(|owner| owner.set.depends_on_agent) {
        return least;
    }
    for agents_seen in 2..=facts.subject.agents.len() {
        let mut next =
            evaluate_sets(layer, None, denial, owners.clone(), tool, &CallFacts { visible_agent_count: agents_seen, ..*facts });
        if next.effect < least.effect {
            std::mem::swap(&mut least, &mut next);
        }
        least.merge_requirements(next);
    }
    least
}

/// The answer of a layer of permission sets. The sets are united; then deny takes precedence over approve, and approve over
/// allow. Without an applicable entry the layer denies.
fn evaluate_sets<'a>(
    layer: DecisionLayer,
    hop: Option<usize>,
    denial: Reason,
    owners: impl Iterator<Item = OwnedPermissionSet<'a>> + Clone,
    tool: u32,
    facts: &CallFacts<'_>,
) -> BorrowedLayerAnswer<'a> {
    let mut decisive: Option<(OwnedPermissionSet<'a>, &'a CompiledEntry)> = None;
    let strength = |entry: &CompiledEntry| (entry.list, entry.prepared.is_some());
    for owner in owners.clone() {
        match owner.set.decisive_entry(tool, facts) {
            EntryOutcome::NoMatch => {}
            EntryOutcome::Decided(entry) if decisive.is_some_and(|(_, other)| strength(other) <= strength(entry)) => {}
            EntryOutcome::Decided(entry) => decisive = Some((owner, entry)),
            // INVARIANT: no rule is ever skipped. A condition that cannot be evaluated denies.
            EntryOutcome::ConditionFailed(entry) => {
                return BorrowedLayerAnswer::new(layer, hop, Err(Reason::ConditionError), Some(entry_ref_view(owner, entry)));
            }
        }
    }
    let Some((owner, entry)) = decisive else {
        let mut owners = owners;
        let only = owners.next().filter(|_| owners.next().is_none());
        let matched = only.map(|owner| EntryRefView { kind: owner.kind, id: owner.id, entry: "" });
        return BorrowedLayerAnswer::new(layer, hop, Err(denial), matched);
    };
    let matched = Some(entry_ref_view(owner, entry));
    let prepared: Vec<_> = entry.prepared.iter().map(|tool| PreparationNeed { layer, hop, tool: tool.clone() }).collect();
    match entry.list {
        ListKind::Deny => BorrowedLayerAnswer::new(layer, hop, Err(denial), matched),
        ListKind::Allow => BorrowedLayerAnswer { prepared, ..BorrowedLayerAnswer::new(layer, hop, Ok(()), matched) },
        ListKind::Approve => BorrowedLayerAnswer {
            layer,
            hop,
            effect: Effect::NeedsApproval,
            reason: Reason::ApprovalRequired,
            matched,
            approval: Some(approval_need(layer, hop, owners, tool, facts)),
            prepared,
        },
    }
}

fn entry_ref_view<'a>(owner: OwnedPermissionSet<'a>, entry: &'a CompiledEntry) -> EntryRefView<'a> {
    match &entry.included_from {
        Some(set) => EntryRefView { kind: "permission_set", id: set, entry: &entry.text },
        None => EntryRefView { kind: owner.kind, id: owner.id, entry: &entry.text },
    }
}

/// The approval that a layer demands. Every approver of an applicable entry may give it, and the shortest expiry applies.
fn approval_need<'a>(
    layer: DecisionLayer,
    hop: Option<usize>,
    owners: impl Iterator<Item = OwnedPermissionSet<'a>>,
    tool: u32,
    facts: &CallFacts<'_>,
) -> ApprovalNeed {
    // INVARIANT: an exhausted budget never drops an approver. Each condition was evaluated before, so all of them fit a new
    // budget.
    let work = WorkBudget::default();
    let facts = &CallFacts { work: &work, ..*facts };
    let mut by: Vec<GroupId> = Vec::new();
    let mut expires_in_ms = u64::MAX;
    for owner in owners {
        for approval in owner.set.applicable_approvals(tool, facts) {
            by.extend(approval.by.iter().cloned());
            expires_in_ms = expires_in_ms.min(approval.expires_in_ms);
        }
    }
    by.sort();
    by.dedup();
    ApprovalNeed { layer, hop, approver_groups: by, expires_in_ms }
}

/// The best and the worst effect of a layer of permission sets.
pub(super) fn effect_bounds<'a>(tool: u32, sets: impl Iterator<Item = &'a PermissionSet>) -> (Effect, Effect) {
    let mut possible_answers = PossibleAnswers::default();
    sets.for_each(|set| set.add_possible_answers(tool, &mut possible_answers));
    let [deny_sure, approve_sure, allow_sure] = possible_answers.certain;
    let [deny, approve, allow] = possible_answers.possible;
    let best = match () {
        () if deny_sure => Effect::Deny,
        () if approve_sure => Effect::NeedsApproval,
        () if allow => Effect::Permit,
        () if approve => Effect::NeedsApproval,
        () => Effect::Deny,
    };
    let worst = match () {
        () if deny || possible_answers.may_fail => Effect::Deny,
        () if approve_sure || (allow_sure && approve) => Effect::NeedsApproval,
        () if allow_sure => Effect::Permit,
        () => Effect::Deny,
    };
    (best, worst)
}

fn matches_schema(tool: &Tool, call: &ToolCall<'_>) -> bool {
    tool.schema_sha256.is_none() || tool.schema_sha256 == call.tool_schema_sha256
}
