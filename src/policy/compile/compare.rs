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

use super::super::diff::{Direction, Span};
use super::super::document::{List, Names};
use super::super::tools::Tool;
use super::evaluate::best_and_worst;
use super::set::{Chances, PermissionSet, SetEntry};
use super::{Agent, Compiled, Profile};

/// Agents whose access changes in the same way for the same tools.
#[derive(Debug)]
pub(in crate::policy) struct Cohort {
    /// The agents, sorted by id.
    pub(in crate::policy) agents: Vec<AgentId>,
    /// The changes, sorted by tool.
    pub(in crate::policy) tools: Vec<ToolChange>,
}

/// The change of one tool for a cohort.
#[derive(Clone, Debug)]
pub(in crate::policy) struct ToolChange {
    pub(in crate::policy) tool: Arc<str>,
    pub(in crate::policy) before: Span,
    pub(in crate::policy) after: Span,
    pub(in crate::policy) direction: Direction,
}

/// The possible directions of a change. Neither flag means no change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Shift {
    widens: bool,
    narrows: bool,
}

impl Shift {
    const WIDENS: Self = Self { widens: true, narrows: false };
    const NARROWS: Self = Self { widens: false, narrows: true };
    const BOTH: Self = Self { widens: true, narrows: true };

    fn is_none(self) -> bool {
        self == Self::default()
    }

    /// An added name widens, and a removed name narrows.
    fn of_names(added: bool, removed: bool) -> Self {
        Self { widens: added, narrows: removed }
    }
}

impl BitOrAssign for Shift {
    fn bitor_assign(&mut self, other: Self) {
        self.widens |= other.widens;
        self.narrows |= other.narrows;
    }
}

/// A value of the old policy and of the new one.
#[derive(Clone, Copy, Debug)]
struct Sides<T> {
    before: T,
    after: T,
}

/// An agent in both policies. Equal agents of one policy share their parts.
type Parts<'a> = Sides<Option<&'a Agent>>;

/// Agents that share their parts in both policies.
struct Group<'a> {
    parts: Parts<'a>,
    agents: Vec<AgentId>,
    /// Whether the parts are equal in both policies.
    is_unchanged: bool,
    tools: Vec<ToolChange>,
}

impl Compiled {
    /// Compares the access of all agents between this policy and `after`.
    pub(in crate::policy) fn compare(&self, after: &Compiled) -> Vec<Cohort> {
        let policies = Sides { before: self, after };
        let mut groups = groups(policies);
        let changed = Changed::new(policies);
        let names = self.base.tools.iter().chain(after.base.tools.iter()).map(|tool| tool.name.as_str());
        for name in names.collect::<BTreeSet<&str>>() {
            // Only one tool at a time is held in memory, not the answers of all groups and applications for all tools.
            let standing = Standing::new(name, policies, &changed);
            for group in groups.iter_mut().filter(|group| !group.is_unchanged || standing.changes) {
                group.tools.extend(standing.change_for(group.parts));
            }
        }
        let found = groups.into_iter().filter(|group| !group.tools.is_empty());
        found.map(|group| Cohort { agents: group.agents, tools: group.tools }).collect()
    }
}

/// Groups the agents of both policies by their shared parts.
fn groups(policies: Sides<&Compiled>) -> Vec<Group<'_>> {
    let Sides { before, after } = policies;
    let mut same_sets: HashMap<[usize; 2], bool> = HashMap::new();
    let mut same_profiles: HashMap<[usize; 2], bool> = HashMap::new();
    let mut places: HashMap<[usize; 4], usize> = HashMap::new();
    let mut groups: Vec<Group<'_>> = Vec::new();
    for id in before.agents.keys().chain(after.agents.keys()).collect::<BTreeSet<&AgentId>>() {
        let parts = Sides {
            before: before.agents.get(id.as_str()).map(|agent| &**agent),
            after: after.agents.get(id.as_str()).map(|agent| &**agent),
        };
        let profiles = [parts.before, parts.after].map(|agent| address(agent.map(|agent| &*agent.profile)));
        let sets = [parts.before, parts.after].map(|agent| address(agent.map(|agent| &*agent.permissions)));
        let place = *places.entry([profiles[0], profiles[1], sets[0], sets[1]]).or_insert_with(|| {
            let is_unchanged = match (parts.before, parts.after) {
                (Some(old), Some(new)) => {
                    *same_profiles.entry(profiles).or_insert_with(|| old.profile == new.profile)
                        && *same_sets.entry(sets).or_insert_with(|| old.permissions.says_the_same(&new.permissions))
                }
                _ => false,
            };
            groups.push(Group { parts, agents: Vec::new(), is_unchanged, tools: Vec::new() });
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(place) {
            group.agents.push(id.clone());
        }
    }
    groups
}

/// The ids of groups and applications whose entries differ between the policies.
struct Changed<'a> {
    groups: BTreeSet<&'a str>,
    applications: BTreeSet<&'a str>,
}

impl<'a> Changed<'a> {
    fn new(policies: Sides<&'a Compiled>) -> Self {
        let Sides { before, after } = policies;
        Self {
            groups: changed(&before.base.groups, &after.base.groups),
            applications: changed(&before.base.applications, &after.base.applications),
        }
    }
}

/// Permission sets by the id of their document.
type Sets = HashMap<Arc<str>, Arc<PermissionSet>>;

fn changed<'a>(before: &'a Sets, after: &'a Sets) -> BTreeSet<&'a str> {
    let differs = |id: &&'a Arc<str>| match (before.get(*id), after.get(*id)) {
        (Some(old), Some(new)) => !old.says_the_same(new),
        _ => true,
    };
    before.keys().chain(after.keys()).filter(differs).map(|id| &**id).collect()
}

/// The address of a part. Equal parts of one policy share one address.
fn address<T>(part: Option<&T>) -> usize {
    part.map_or(0, |part| std::ptr::from_ref(part) as usize)
}

/// The answers of all layers except the agents for one tool.
struct Standing<'a> {
    name: Arc<str>,
    number: Sides<Option<u32>>,
    /// The change of the tool itself, of guardrails and of groups, which concern every agent.
    shift: Shift,
    guarded: Sides<bool>,
    users: Sides<Users<'a>>,
    applications: HashMap<&'a str, Ceiling>,
    /// The union over all applications.
    any_application: Ceiling,
    /// Whether any of these layers changes.
    changes: bool,
}

/// The answers of groups for a tool.
#[derive(Default)]
struct Users<'a> {
    by_group: HashMap<&'a str, Chances>,
    any_allows: bool,
    any_approves: bool,
    any_denies: bool,
}

/// The answer of an application for a tool.
#[derive(Clone, Copy)]
struct Ceiling {
    span: Sides<Span>,
    shift: Shift,
}

impl<'a> Standing<'a> {
    fn new(name: &str, policies: Sides<&'a Compiled>, changed: &Changed<'a>) -> Self {
        let Sides { before, after } = policies;
        let number = Sides { before: before.base.tools.number(name), after: after.base.tools.number(name) };
        let registered = |policy: &'a Compiled, number: Option<u32>| number.and_then(|number| policy.base.tools.tool(number));
        let mut shift = tool_shift(registered(before, number.before), registered(after, number.after));
        let (rails_before, rails_after) = (before.guardrails_of(number.before), after.guardrails_of(number.after));
        shift |= Shift {
            widens: rails_before.iter().any(|text| !rails_after.contains(text)),
            narrows: rails_after.iter().any(|text| !rails_before.contains(text)),
        };
        let guarded = Sides { before: !rails_before.is_empty(), after: !rails_after.is_empty() };
        for id in &changed.groups {
            let sets = (before.base.groups.get(*id), after.base.groups.get(*id));
            shift |= entries_shift(&entries(sets.0, number.before), &entries(sets.1, number.after));
        }
        let users = Sides { before: Users::new(before, number.before), after: Users::new(after, number.after) };
        let mut applications: HashMap<&str, Ceiling> = HashMap::new();
        for id in before.base.applications.keys().chain(after.base.applications.keys()) {
            applications.entry(id).or_insert_with(|| {
                let sets = (before.base.applications.get(id), after.base.applications.get(id));
                let span = Sides { before: span_of(sets.0, number.before), after: span_of(sets.1, number.after) };
                let shift = match changed.applications.contains(&**id) {
                    true => entries_shift(&entries(sets.0, number.before), &entries(sets.1, number.after)),
                    false => Shift::default(),
                };
                Ceiling { span, shift }
            });
        }
        let any_application = applications.values().copied().reduce(Ceiling::or).unwrap_or(Ceiling::NONE);
        let changes = !shift.is_none() || !any_application.shift.is_none();
        Self { name: name.into(), number, shift, guarded, users, applications, any_application, changes }
    }

    /// The change of the tool for an agent; `None` if nothing changes.
    fn change_for(&self, parts: Parts<'_>) -> Option<ToolChange> {
        let span = Sides {
            before: self
                .span(parts.before, self.number.before, self.guarded.before, &self.users.before, |ceiling| ceiling.span.before),
            after: self.span(parts.after, self.number.after, self.guarded.after, &self.users.after, |ceiling| ceiling.span.after),
        };
        // INVARIANT: `best` is an upper bound, so a tool that is denied on both sides does not change.
        if span.before.best == Effect::Deny && span.after.best == Effect::Deny {
            return None;
        }
        let shift = self.shift_for(parts);
        let rises = span.after.best > span.before.best || span.after.worst > span.before.worst;
        let falls = span.after.best < span.before.best || span.after.worst < span.before.worst;
        let direction = match shift {
            Shift { widens: false, narrows: false } => return None,
            Shift { widens: false, narrows: true } => Direction::Narrower,
            Shift { widens: true, narrows: false } => Direction::Wider,
            _ if rises && !falls => Direction::Wider,
            _ => Direction::Changed,
        };
        Some(ToolChange { tool: self.name.clone(), before: span.before, after: span.after, direction })
    }

    /// The change of all layers for an agent. An agent on only one side is a change of names.
    fn shift_for(&self, parts: Parts<'_>) -> Shift {
        let (Some(before), Some(after)) = (parts.before, parts.after) else {
            return Shift::of_names(parts.before.is_none(), parts.after.is_none());
        };
        let mut shift = self.shift;
        shift |= profile_shift(&before.profile, &after.profile);
        shift |= self.applications_shift(&before.profile.applications, &after.profile.applications);
        let sets = Sides { before: Some(&before.permissions), after: Some(&after.permissions) };
        shift |= entries_shift(&entries(sets.before, self.number.before), &entries(sets.after, self.number.after));
        shift
    }

    /// The change from the applications that an agent runs in. An application on only one side counts if it permits anything
    /// there.
    fn applications_shift(&self, before: &Names<ApplicationId>, after: &Names<ApplicationId>) -> Shift {
        let of = |id: &ApplicationId| self.applications.get(id.as_str()).copied().unwrap_or(Ceiling::NONE);
        let all = || self.applications.keys().map(|id| ApplicationId::from(*id)).collect::<Vec<_>>();
        let (only_before, only_after, both) = match (before, after) {
            (Names::All, Names::All) => return self.any_application.shift,
            (Names::All, Names::Some(after)) => (lacking(&all(), after), Vec::new(), after.clone()),
            (Names::Some(before), Names::All) => (Vec::new(), lacking(&all(), before), before.clone()),
            (Names::Some(before), Names::Some(after)) => {
                let both = before.iter().filter(|id| after.binary_search(id).is_ok()).cloned().collect();
                (lacking(before, after), lacking(after, before), both)
            }
        };
        let mut shift = Shift::of_names(
            only_after.iter().any(|id| of(id).span.after.best > Effect::Deny),
            only_before.iter().any(|id| of(id).span.before.best > Effect::Deny),
        );
        both.iter().for_each(|id| shift |= of(id).shift);
        shift
    }

    /// The best and the worst effect for a call by an agent, over all users and applications.
    fn span(
        &self,
        agent: Option<&Agent>,
        number: Option<u32>,
        guarded: bool,
        users: &Users<'_>,
        of: impl Fn(&Ceiling) -> Span,
    ) -> Span {
        let (Some(agent), Some(number)) = (agent, number) else {
            return Span::DENY;
        };
        let mut span = span_of(Some(&agent.permissions), Some(number));
        span = span.least(users.span(&agent.profile.acts_for));
        let ceilings = match &agent.profile.applications {
            Names::All => Some(of(&self.any_application)),
            Names::Some(ids) => {
                let known = ids.iter().map(|id| self.applications.get(id.as_str()).map_or(Span::DENY, &of));
                known.reduce(Span::either)
            }
        };
        span = span.least(ceilings.unwrap_or(Span::DENY));
        if guarded { Span { worst: Effect::Deny, ..span } } else { span }
    }
}

impl Ceiling {
    const NONE: Self =
        Self { span: Sides { before: Span::DENY, after: Span::DENY }, shift: Shift { widens: false, narrows: false } };

    fn or(self, other: Self) -> Self {
        let mut shift = self.shift;
        shift |= other.shift;
        let (ours, theirs) = (self.span, other.span);
        Self { span: Sides { before: ours.before.either(theirs.before), after: ours.after.either(theirs.after) }, shift }
    }
}

impl<'a> Users<'a> {
    fn new(policy: &'a Compiled, number: Option<u32>) -> Self {
        let mut users = Self::default();
        let Some(number) = number else { return users };
        for (id, set) in &policy.base.groups {
            let mut chances = Chances::default();
            set.add_chances(number, &mut chances);
            let ([deny_sure, approve_sure, _], [deny, approve, allow]) = (chances.sure, chances.possible);
            users.any_allows |= allow && !deny_sure && !approve_sure;
            users.any_approves |= approve && !deny_sure;
            users.any_denies |= deny || chances.may_fail;
            users.by_group.insert(id, chances);
        }
        users
    }

    /// The range for users of the given groups. Such a user may also be in any other group, and the entries of all groups of a
    /// user count together.
    fn span(&self, acts_for: &Names<GroupId>) -> Span {
        let silent = Chances::default();
        let with = |chances: &Chances| self.with(chances);
        let spans = match acts_for {
            Names::All => self.by_group.values().map(with).reduce(Span::either),
            Names::Some(groups) => {
                groups.iter().map(|group| with(self.by_group.get(group.as_str()).unwrap_or(&silent))).reduce(Span::either)
            }
        };
        spans.unwrap_or(Span::DENY)
    }

    /// The range for users in one group who may also be in others.
    fn with(&self, chances: &Chances) -> Span {
        let ([deny_sure, approve_sure, allow_sure], [_, approve, allow]) = (chances.sure, chances.possible);
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
        Span { best, worst }
    }
}

impl Compiled {
    /// The conditions of the guardrails of a tool.
    fn guardrails_of(&self, number: Option<u32>) -> BTreeSet<&str> {
        let Some(number) = number else { return BTreeSet::new() };
        let of_tool = self.base.guardrails.iter().filter(|guardrail| guardrail.tools.contains(number));
        of_tool.map(|guardrail| guardrail.forbid_when.text()).collect()
    }
}

/// The range of a permission set for a tool. A missing set or tool denies.
fn span_of(set: Option<&Arc<PermissionSet>>, number: Option<u32>) -> Span {
    match (set, number) {
        (Some(set), Some(number)) => {
            let (best, worst) = best_and_worst(number, std::iter::once(&**set));
            Span { best, worst }
        }
        _ => Span::DENY,
    }
}

fn entries(set: Option<&Arc<PermissionSet>>, number: Option<u32>) -> Vec<&SetEntry> {
    match (set, number) {
        (Some(set), Some(number)) => set.speaking_of(number).map(|(_, entry)| entry).collect(),
        _ => Vec::new(),
    }
}

/// The change of a tool's registration.
fn tool_shift(before: Option<&Tool>, after: Option<&Tool>) -> Shift {
    match (before, after) {
        (None, None) => Shift::default(),
        (None, Some(_)) => Shift::WIDENS,
        (Some(_), None) => Shift::NARROWS,
        // Conditions can read the risk, and both values decide about proofs and freshness, so the change may go either way.
        (Some(before), Some(after)) if (before.risk, before.proof) != (after.risk, after.proof) => Shift::BOTH,
        (Some(before), Some(after)) => match (before.schema_sha256, after.schema_sha256) {
            (before, after) if before == after => Shift::default(),
            (None, Some(_)) => Shift::NARROWS,
            (Some(_), None) => Shift::WIDENS,
            _ => Shift::BOTH,
        },
    }
}

/// The change of the users, the delegations and the limits of an agent. Applications are compared for each tool instead.
fn profile_shift(before: &Profile, after: &Profile) -> Shift {
    let mut shift = match (&before.acts_for, &after.acts_for) {
        (Names::All, Names::All) => Shift::default(),
        (Names::All, Names::Some(_)) => Shift::NARROWS,
        (Names::Some(_), Names::All) => Shift::WIDENS,
        (Names::Some(before), Names::Some(after)) => lists_shift(before, after),
    };
    shift |= lists_shift(&before.delegates_to, &after.delegates_to);
    let ends = |profile: &Profile| (profile.limits.hops_max, profile.limits.lifetime_max_s.unwrap_or(i64::MAX));
    let ((hops_before, life_before), (hops_after, life_after)) = (ends(before), ends(after));
    shift |= Shift::of_names(
        hops_after > hops_before || life_after > life_before,
        hops_after < hops_before || life_after < life_before,
    );
    shift
}

/// The names in one sorted list that another one lacks.
fn lacking<T: Ord + Clone>(list: &[T], other: &[T]) -> Vec<T> {
    list.iter().filter(|name| other.binary_search(name).is_err()).cloned().collect()
}

/// The change of a sorted list of names.
fn lists_shift<T: Ord>(before: &[T], after: &[T]) -> Shift {
    let lacks = |list: &[T], name: &T| list.binary_search(name).is_err();
    Shift::of_names(after.iter().any(|name| lacks(before, name)), before.iter().any(|name| lacks(after, name)))
}

/// The possible effect of changed entries on the answers of a layer.
///
/// A deny can only narrow, even if its condition fails. An allow without a condition can only widen. An allow with a condition
/// can do both, because a failed condition denies the layer. An approval permits some calls and restricts others.
fn entries_shift(before: &[&SetEntry], after: &[&SetEntry]) -> Shift {
    let lacks = |entries: &[&SetEntry], entry: &SetEntry| !entries.iter().any(|other| other.says_the_same(entry));
    let mut shift = Shift::default();
    for (these, others, gives) in [(after, before, true), (before, after, false)] {
        for entry in these.iter().filter(|entry| lacks(others, entry)) {
            let more = Shift::of_names(gives, !gives);
            shift |= match entry.list {
                List::Deny if others.iter().any(|other| other.list == List::Deny && other.is_unconditional()) => Shift::default(),
                List::Deny => Shift::of_names(!gives, gives),
                List::Approve => Shift::BOTH,
                List::Allow if entry.has_condition() => Shift::BOTH,
                List::Allow if others.iter().any(|other| other.covers(entry)) => Shift::default(),
                List::Allow => more,
            };
        }
    }
    shift
}
