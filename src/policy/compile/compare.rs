//! Compares two policies: the agents and tools whose access changes, and the direction of the change.
//!
//! INVARIANT: no widening is missed. A call gets a better answer only if one of its layers answers better. So every change of a
//! layer that is not provably equal or narrower counts as widening. Layers are compared by their entries. Agents with equal parts
//! are compared once, because a fleet of a million agents shares a few thousand permission sets. Look next at
//! [`diff`](super::super::diff), which shows the result.

use std::collections::{BTreeSet, HashMap};
use std::ops::BitOrAssign;
use std::sync::Arc;

use crate::model::decision::Effect;
use crate::model::ids::{AgentId, ApplicationId, GroupId};

use super::super::diff::{ChangeDirection, EffectRange};
use super::super::document::{ListKind, NameSelection};
use super::super::tools::Tool;
use super::evaluate::effect_bounds;
use super::permission_set::{CompiledEntry, PermissionSet, PossibleAnswers};
use super::{CompiledAgent, CompiledPolicy, DelegationRules};

/// Agents whose access changes in the same way for the same tools.
#[derive(Debug)]
pub(in crate::policy) struct AgentCohort {
    /// The agents, sorted by id.
    pub(in crate::policy) agents: Vec<AgentId>,
    /// The changes, sorted by tool.
    pub(in crate::policy) tools: Vec<ToolChange>,
}

/// The change of one tool for a cohort.
#[derive(Clone, Debug)]
pub(in crate::policy) struct ToolChange {
    pub(in crate::policy) tool: Arc<str>,
    pub(in crate::policy) before: EffectRange,
    pub(in crate::policy) after: EffectRange,
    pub(in crate::policy) direction: ChangeDirection,
}

/// The possible directions of a change. Neither flag means no change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct AccessShift {
    widens: bool,
    narrows: bool,
}

impl AccessShift {
    const WIDENS: Self = Self { widens: true, narrows: false };
    const NARROWS: Self = Self { widens: false, narrows: true };
    const BOTH: Self = Self { widens: true, narrows: true };

    fn is_none(self) -> bool {
        self == Self::default()
    }

    /// An added name widens, and a removed name narrows.
    fn from_change(added: bool, removed: bool) -> Self {
        Self { widens: added, narrows: removed }
    }
}

impl BitOrAssign for AccessShift {
    fn bitor_assign(&mut self, other: Self) {
        self.widens |= other.widens;
        self.narrows |= other.narrows;
    }
}

/// A value of the old policy and of the new one.
#[derive(Clone, Copy, Debug)]
struct BeforeAfter<T> {
    before: T,
    after: T,
}

/// An agent in both policies. Equal agents of one policy share their parts.
type AgentSides<'a> = BeforeAfter<Option<&'a CompiledAgent>>;

/// Agents that share their parts in both policies.
struct AgentClass<'a> {
    sides: AgentSides<'a>,
    agents: Vec<AgentId>,
    /// Whether the parts are equal in both policies.
    is_unchanged: bool,
    tools: Vec<ToolChange>,
}

impl CompiledPolicy {
    /// Compares the access of all agents between this policy and `after`.
    pub(in crate::policy) fn compare_access(&self, after: &CompiledPolicy) -> Vec<AgentCohort> {
        let policies = BeforeAfter { before: self, after };
        let mut groups = classify_agents(policies);
        let changed = ChangedCeilings::new(policies);
        let names = self.base.tools.iter().chain(after.base.tools.iter()).map(|tool| tool.name.as_str());
        for name in names.collect::<BTreeSet<&str>>() {
            // Only one tool at a time is held in memory, not the answers of all groups and applications for all tools.
            let standing = ToolCeilings::new(name, policies, &changed);
            for group in groups.iter_mut().filter(|group| !group.is_unchanged || standing.changes) {
                group.tools.extend(standing.change_for(group.sides));
            }
        }
        let found = groups.into_iter().filter(|group| !group.tools.is_empty());
        found.map(|group| AgentCohort { agents: group.agents, tools: group.tools }).collect()
    }
}

/// Groups the agents of both policies by their shared parts.
fn classify_agents(policies: BeforeAfter<&CompiledPolicy>) -> Vec<AgentClass<'_>> {
    let BeforeAfter { before, after } = policies;
    let mut same_sets: HashMap<[usize; 2], bool> = HashMap::new();
    let mut same_profiles: HashMap<[usize; 2], bool> = HashMap::new();
    let mut places: HashMap<[usize; 4], usize> = HashMap::new();
    let mut groups: Vec<AgentClass<'_>> = Vec::new();
    for id in before.agents.keys().chain(after.agents.keys()).collect::<BTreeSet<&AgentId>>() {
        let parts = BeforeAfter {
            before: before.agents.get(id.as_str()).map(|agent| &**agent),
            after: after.agents.get(id.as_str()).map(|agent| &**agent),
        };
        let profiles = [parts.before, parts.after].map(|agent| pointer_address(agent.map(|agent| &*agent.rules)));
        let sets = [parts.before, parts.after].map(|agent| pointer_address(agent.map(|agent| &*agent.permissions)));
        let index = *places.entry([profiles[0], profiles[1], sets[0], sets[1]]).or_insert_with(|| {
            let is_unchanged = match (parts.before, parts.after) {
                (Some(old), Some(new)) => {
                    *same_profiles.entry(profiles).or_insert_with(|| old.rules == new.rules)
                        && *same_sets.entry(sets).or_insert_with(|| old.permissions.has_same_entries(&new.permissions))
                }
                _ => false,
            };
            groups.push(AgentClass { sides: parts, agents: Vec::new(), is_unchanged, tools: Vec::new() });
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(index) {
            group.agents.push(id.clone());
        }
    }
    groups
}

/// The ids of groups and applications whose entries differ between the policies.
struct ChangedCeilings<'a> {
    groups: BTreeSet<&'a str>,
    applications: BTreeSet<&'a str>,
}

impl<'a> ChangedCeilings<'a> {
    fn new(policies: BeforeAfter<&'a CompiledPolicy>) -> Self {
        let BeforeAfter { before, after } = policies;
        Self {
            groups: changed_set_ids(&before.base.groups, &after.base.groups),
            applications: changed_set_ids(&before.base.applications, &after.base.applications),
        }
    }
}

/// Permission sets by the id of their document.
type SetsById = HashMap<Arc<str>, Arc<PermissionSet>>;

fn changed_set_ids<'a>(before: &'a SetsById, after: &'a SetsById) -> BTreeSet<&'a str> {
    let differs = |id: &&'a Arc<str>| match (before.get(*id), after.get(*id)) {
        (Some(old), Some(new)) => !old.has_same_entries(new),
        _ => true,
    };
    before.keys().chain(after.keys()).filter(differs).map(|id| &**id).collect()
}

/// The address of a part. Equal parts of one policy share one address.
fn pointer_address<T>(part: Option<&T>) -> usize {
    part.map_or(0, |part| std::ptr::from_ref(part) as usize)
}

/// The answers of all layers except the agents for one tool.
struct ToolCeilings<'a> {
    name: Arc<str>,
    number: BeforeAfter<Option<u32>>,
    /// The change of the tool itself, of guardrails and of groups, which concern every agent.
    shift: AccessShift,
    guarded: BeforeAfter<bool>,
    groups: BeforeAfter<GroupCeilings<'a>>,
    applications: HashMap<&'a str, ApplicationCeiling>,
    /// The union over all applications.
    any_application: ApplicationCeiling,
    /// Whether any of these layers changes.
    changes: bool,
}

/// The answers of groups for a tool.
#[derive(Default)]
struct GroupCeilings<'a> {
    by_group: HashMap<&'a str, PossibleAnswers>,
    any_allows: bool,
    any_approves: bool,
    any_denies: bool,
}

/// The answer of an application for a tool.
#[derive(Clone, Copy)]
struct ApplicationCeiling {
    span: BeforeAfter<EffectRange>,
    shift: AccessShift,
}

impl<'a> ToolCeilings<'a> {
    fn new(name: &str, policies: BeforeAfter<&'a CompiledPolicy>, changed: &ChangedCeilings<'a>) -> Self {
        let BeforeAfter { before, after } = policies;
        let number = BeforeAfter { before: before.base.tools.number(name), after: after.base.tools.number(name) };
        let registered =
            |policy: &'a CompiledPolicy, number: Option<u32>| number.and_then(|number| policy.base.tools.tool(number));
        let mut shift = tool_shift(registered(before, number.before), registered(after, number.after));
        let (guardrails_before, guardrails_after) =
            (before.guardrail_conditions(number.before), after.guardrail_conditions(number.after));
        shift |= AccessShift {
            widens: guardrails_before.iter().any(|text| !guardrails_after.contains(text)),
            narrows: guardrails_after.iter().any(|text| !guardrails_before.contains(text)),
        };
        let guarded = BeforeAfter { before: !guardrails_before.is_empty(), after: !guardrails_after.is_empty() };
        for id in &changed.groups {
            let sets = (before.base.groups.get(*id), after.base.groups.get(*id));
            shift |= entries_shift(&tool_entries(sets.0, number.before), &tool_entries(sets.1, number.after));
        }
        let users =
            BeforeAfter { before: GroupCeilings::new(before, number.before), after: GroupCeilings::new(after, number.after) };
        let mut applications: HashMap<&str, ApplicationCeiling> = HashMap::new();
        for id in before.base.applications.keys().chain(after.base.applications.keys()) {
            applications.entry(id).or_insert_with(|| {
                let sets = (before.base.applications.get(id), after.base.applications.get(id));
                let span = BeforeAfter { before: set_span(sets.0, number.before), after: set_span(sets.1, number.after) };
                let shift = match changed.applications.contains(&**id) {
                    true => entries_shift(&tool_entries(sets.0, number.before), &tool_entries(sets.1, number.after)),
                    false => AccessShift::default(),
                };
                ApplicationCeiling { span, shift }
            });
        }
        let any_application =
            applications.values().copied().reduce(ApplicationCeiling::union).unwrap_or(ApplicationCeiling::NONE);
        let changes = !shift.is_none() || !any_application.shift.is_none();
        Self { name: name.into(), number, shift, guarded, groups: users, applications, any_application, changes }
    }

    /// The change of the tool for an agent; `None` if nothing changes.
    fn change_for(&self, parts: AgentSides<'_>) -> Option<ToolChange> {
        let span = BeforeAfter {
            before: self
                .span(parts.before, self.number.before, self.guarded.before, &self.groups.before, |ceiling| ceiling.span.before),
            after: self
                .span(parts.after, self.number.after, self.guarded.after, &self.groups.after, |ceiling| ceiling.span.after),
        };
        // INVARIANT: `best` is an upper bound, so a tool that is denied on both sides does not change.
        if span.before.best == Effect::Deny && span.after.best == Effect::Deny {
            return None;
        }
        let shift = self.shift_for(parts);
        let rises = span.after.best > span.before.best || span.after.worst > span.before.worst;
        let falls = span.after.best < span.before.best || span.after.worst < span.before.worst;
        let direction = match shift {
            AccessShift { widens: false, narrows: false } => return None,
            AccessShift { widens: false, narrows: true } => ChangeDirection::Narrower,
            AccessShift { widens: true, narrows: false } => ChangeDirection::Wider,
            _ if rises && !falls => ChangeDirection::Wider,
            _ => ChangeDirection::Changed,
        };
        Some(ToolChange { tool: self.name.clone(), before: span.before, after: span.after, direction })
    }

    /// The change of all layers for an agent. An agent on only one side is a change of names.
    fn shift_for(&self, parts: AgentSides<'_>) -> AccessShift {
        let (Some(before), Some(after)) = (parts.before, parts.after) else {
            return AccessShift::from_change(parts.before.is_none(), parts.after.is_none());
        };
        let mut shift = self.shift;
        shift |= rules_shift(&before.rules, &after.rules);
        shift |= self.applications_shift(&before.rules.applications, &after.rules.applications);
        let sets = BeforeAfter { before: Some(&before.permissions), after: Some(&after.permissions) };
        shift |= entries_shift(&tool_entries(sets.before, self.number.before), &tool_entries(sets.after, self.number.after));
        shift
    }

    /// The change from the applications that an agent runs in. An application on only one side counts if it permits anything
    /// there.
    fn applications_shift(&self, before: &NameSelection<ApplicationId>, after: &NameSelection<ApplicationId>) -> AccessShift {
        let of = |id: &ApplicationId| self.applications.get(id.as_str()).copied().unwrap_or(ApplicationCeiling::NONE);
        let all = || self.applications.keys().map(|id| ApplicationId::from(*id)).collect::<Vec<_>>();
        let (only_before, only_after, both) = match (before, after) {
            (NameSelection::All, NameSelection::All) => return self.any_application.shift,
            (NameSelection::All, NameSelection::Listed(after)) => (difference(&all(), after), Vec::new(), after.clone()),
            (NameSelection::Listed(before), NameSelection::All) => (Vec::new(), difference(&all(), before), before.clone()),
            (NameSelection::Listed(before), NameSelection::Listed(after)) => {
                let both = before.iter().filter(|id| after.binary_search(id).is_ok()).cloned().collect();
                (difference(before, after), difference(after, before), both)
            }
        };
        let mut shift = AccessShift::from_change(
            only_after.iter().any(|id| of(id).span.after.best > Effect::Deny),
            only_before.iter().any(|id| of(id).span.before.best > Effect::Deny),
        );
        both.iter().for_each(|id| shift |= of(id).shift);
        shift
    }

    /// The best and the worst effect for a call by an agent, over all users and applications.
    fn span(
        &self,
        agent: Option<&CompiledAgent>,
        number: Option<u32>,
        guarded: bool,
        users: &GroupCeilings<'_>,
        of: impl Fn(&ApplicationCeiling) -> EffectRange,
    ) -> EffectRange {
        let (Some(agent), Some(number)) = (agent, number) else {
            return EffectRange::DENY;
        };
        let mut span = set_span(Some(&agent.permissions), Some(number));
        span = span.intersect(users.span(&agent.rules.acts_for));
        let ceilings = match &agent.rules.applications {
            NameSelection::All => Some(of(&self.any_application)),
            NameSelection::Listed(ids) => {
                let known = ids.iter().map(|id| self.applications.get(id.as_str()).map_or(EffectRange::DENY, &of));
                known.reduce(EffectRange::union)
            }
        };
        span = span.intersect(ceilings.unwrap_or(EffectRange::DENY));
        if guarded { EffectRange { worst: Effect::Deny, ..span } } else { span }
    }
}

impl ApplicationCeiling {
    const NONE: Self = Self {
        span: BeforeAfter { before: EffectRange::DENY, after: EffectRange::DENY },
        shift: AccessShift { widens: false, narrows: false },
    };

    fn union(self, other: Self) -> Self {
        let mut shift = self.shift;
        shift |= other.shift;
        let (ours, theirs) = (self.span, other.span);
        Self { span: BeforeAfter { before: ours.before.union(theirs.before), after: ours.after.union(theirs.after) }, shift }
    }
}

impl<'a> GroupCeilings<'a> {
    fn new(policy: &'a CompiledPolicy, number: Option<u32>) -> Self {
        let mut users = Self::default();
        let Some(number) = number else { return users };
        for (id, set) in &policy.base.groups {
            let mut possible_answers = PossibleAnswers::default();
            set.add_possible_answers(number, &mut possible_answers);
            let ([deny_sure, approve_sure, _], [deny, approve, allow]) = (possible_answers.certain, possible_answers.possible);
            users.any_allows |= allow && !deny_sure && !approve_sure;
            users.any_approves |= approve && !deny_sure;
            users.any_denies |= deny || possible_answers.may_fail;
            users.by_group.insert(id, possible_answers);
        }
        users
    }

    /// The range for users of the given groups. Such a user may also be in any other group, and the entries of all groups of a
    /// user count together.
    fn span(&self, acts_for: &NameSelection<GroupId>) -> EffectRange {
        let silent = PossibleAnswers::default();
        let with = |possible_answers: &PossibleAnswers| self.group_span(possible_answers);
        let spans = match acts_for {
            NameSelection::All => self.by_group.values().map(with).reduce(EffectRange::union),
            NameSelection::Listed(groups) => {
                groups.iter().map(|group| with(self.by_group.get(group.as_str()).unwrap_or(&silent))).reduce(EffectRange::union)
            }
        };
        spans.unwrap_or(EffectRange::DENY)
    }

    /// The range for users in one group who may also be in others.
    fn group_span(&self, possible_answers: &PossibleAnswers) -> EffectRange {
        let ([deny_sure, approve_sure, allow_sure], [_, approve, allow]) = (possible_answers.certain, possible_answers.possible);
        let best = match () {
            () if deny_sure => Effect::Deny,
            () if approve_sure => Effect::NeedsApproval,
            () if allow || self.any_allows => Effect::Permit,
            () if approve || self.any_approves => Effect::NeedsApproval,
            () => Effect::Deny,
        };
        let worst = match () {
            () if self.any_denies => Effect::Deny,
            () if approve_sure || (allow_sure && self.any_approves) => Effect::NeedsApproval,
            () if allow_sure => Effect::Permit,
            () => Effect::Deny,
        };
        EffectRange { best, worst }
    }
}

impl CompiledPolicy {
    /// The conditions of the guardrails of a tool.
    fn guardrail_conditions(&self, number: Option<u32>) -> BTreeSet<&str> {
        let Some(number) = number else { return BTreeSet::new() };
        let of_tool = self.base.guardrails.iter().filter(|guardrail| guardrail.tools.contains(number));
        of_tool.map(|guardrail| guardrail.forbid_when.text()).collect()
    }
}

/// The range of a permission set for a tool. A missing set or tool denies.
fn set_span(set: Option<&Arc<PermissionSet>>, number: Option<u32>) -> EffectRange {
    match (set, number) {
        (Some(set), Some(number)) => {
            let (best, worst) = effect_bounds(number, std::iter::once(&**set));
            EffectRange { best, worst }
        }
        _ => EffectRange::DENY,
    }
}

fn tool_entries(set: Option<&Arc<PermissionSet>>, number: Option<u32>) -> Vec<&CompiledEntry> {
    match (set, number) {
        (Some(set), Some(number)) => set.entries_for_tool(number).map(|(_, entry)| entry).collect(),
        _ => Vec::new(),
    }
}

/// The change of a tool's registration.
fn tool_shift(before: Option<&Tool>, after: Option<&Tool>) -> AccessShift {
    match (before, after) {
        (None, None) => AccessShift::default(),
        (None, Some(_)) => AccessShift::WIDENS,
        (Some(_), None) => AccessShift::NARROWS,
        // Conditions can read the risk, and both values decide about proofs and freshness, so the change may go either way.
        (Some(before), Some(after)) if (before.risk, before.proof) != (after.risk, after.proof) => AccessShift::BOTH,
        (Some(before), Some(after)) => match (before.schema_sha256, after.schema_sha256) {
            (before, after) if before == after => AccessShift::default(),
            (None, Some(_)) => AccessShift::NARROWS,
            (Some(_), None) => AccessShift::WIDENS,
            _ => AccessShift::BOTH,
        },
    }
}

/// The change of the users, the delegations and the limits of an agent. Applications are compared for each tool instead.
fn rules_shift(before: &DelegationRules, after: &DelegationRules) -> AccessShift {
    let mut shift = match (&before.acts_for, &after.acts_for) {
        (NameSelection::All, NameSelection::All) => AccessShift::default(),
        (NameSelection::All, NameSelection::Listed(_)) => AccessShift::NARROWS,
        (NameSelection::Listed(_), NameSelection::All) => AccessShift::WIDENS,
        (NameSelection::Listed(before), NameSelection::Listed(after)) => lists_shift(before, after),
    };
    shift |= lists_shift(&before.delegates_to, &after.delegates_to);
    let ends = |profile: &DelegationRules| (profile.limits.hops_max, profile.limits.lifetime_max_s.unwrap_or(i64::MAX));
    let ((hops_before, lifetime_before), (hops_after, lifetime_after)) = (ends(before), ends(after));
    shift |= AccessShift::from_change(
        hops_after > hops_before || lifetime_after > lifetime_before,
        hops_after < hops_before || lifetime_after < lifetime_before,
    );
    shift
}

/// The names in one sorted list that another one lacks.
fn difference<T: Ord + Clone>(list: &[T], other: &[T]) -> Vec<T> {
    list.iter().filter(|name| other.binary_search(name).is_err()).cloned().collect()
}

/// The change of a sorted list of names.
fn lists_shift<T: Ord>(before: &[T], after: &[T]) -> AccessShift {
    let lacks = |list: &[T], name: &T| list.binary_search(name).is_err();
    AccessShift::from_change(after.iter().any(|name| lacks(before, name)), before.iter().any(|name| lacks(after, name)))
}

/// The possible effect of changed entries on the answers of a layer.
///
/// A deny can only narrow, even if its condition fails. An allow without a condition can only widen. An allow with a condition
/// can do both, because a failed condition denies the layer. An approval permits some calls and restricts others.
fn entries_shift(before: &[&CompiledEntry], after: &[&CompiledEntry]) -> AccessShift {
    let lacks = |entries: &[&CompiledEntry], entry: &CompiledEntry| !entries.iter().any(|other| other.is_same_entry(entry));
    let mut shift = AccessShift::default();
    for (these, others, gives) in [(after, before, true), (before, after, false)] {
        for entry in these.iter().filter(|entry| lacks(others, entry)) {
            let more = AccessShift::from_change(gives, !gives);
            shift |= match entry.list {
                ListKind::Deny if others.iter().any(|other| other.list == ListKind::Deny && other.is_unconditional()) => {
                    AccessShift::default()
                }
                ListKind::Deny => AccessShift::from_change(!gives, gives),
                ListKind::Approve => AccessShift::BOTH,
                ListKind::Allow if entry.has_condition() => AccessShift::BOTH,
                ListKind::Allow if others.iter().any(|other| other.covers(entry)) => AccessShift::default(),
                ListKind::Allow => more,
            };
        }
    }
    shift
}
