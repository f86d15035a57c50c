//! Warns about permission entries that can never take effect, because an included permission set overrides or already covers
//! them, or because the groups and applications that limit an agent (its ceilings) permit none of their tools.
//!
//! The analysis uses sets of tools and ignores arguments. It reports an entry only if the entry has no effect for any arguments.
//! Results are shared by permission set and by the list of ceilings, because a fleet uses few of them. Look next at
//! `delegations.rs`.

use std::collections::{HashMap, HashSet};

use crate::model::constraint::abbreviate;

use super::super::bit_set::BitSet;
use super::super::diagnostic::{Diagnostic, Severity};
use super::super::document::{AgentSpec, Document, DocumentBody, ListKind, NameSelection, PermissionEntry, PermissionLists};
use super::super::tools::{MatchedTools, PatternCache, ToolTable};

/// The maximum number of tools that one warning names.
const NAMED_MAX: usize = 3;

/// The tools that permissions and their includes reach, for all arguments.
#[derive(Clone, Debug)]
pub(super) struct PermissionReach {
    /// The tools that some allow permits for all arguments.
    allowed: BitSet,
    /// The tools that some approve covers for all arguments.
    approved: BitSet,
    /// The tools that some deny covers for all arguments.
    denied: BitSet,
    /// The tools that some allow or approve matches.
    reachable: BitSet,
    /// Whether a bare `*` allows every tool.
    allows_every_tool: bool,
}

/// The tools that an agent may reach, by the index of its document.
pub(super) type ReachByAgent = HashMap<usize, BitSet>;

/// Warns about entries that never count. Returns the reachable tools of all agents that delegate or are delegated to.
pub(super) fn lint_ceilings(
    documents: &[&Document],
    tools: &ToolTable,
    patterns: &mut PatternCache,
    out: &mut Vec<Diagnostic>,
) -> ReachByAgent {
    let mut linter = CeilingLinter::new(documents, tools, patterns, out);
    let mut reaches = ReachByAgent::new();
    let linked = delegating_agent_ids(documents);
    for (index, document) in documents.iter().copied().enumerate() {
        let Some(permissions) = document.permissions() else {
            continue;
        };
        let own = linter.own_reach(permissions);
        linter.lint_included(document, permissions, &own);
        if let DocumentBody::Agent(agent) = &document.body {
            let mut reach = own.clone();
            linter.add_included(permissions, &mut reach);
            linter.lint_agent(document, agent, &own, &reach);
            if linked.contains(agent.id.as_str()) {
                reaches.insert(index, reach.open_tools());
            }
        }
    }
    reaches
}

/// The agents that delegate or are delegated to.
fn delegating_agent_ids<'a>(documents: &[&'a Document]) -> HashSet<&'a str> {
    let agents = documents
        .iter()
        .copied()
        .filter_map(|document| if let DocumentBody::Agent(agent) = &document.body { Some(agent) } else { None });
    let delegating = agents.filter(|agent| !agent.delegates_to.is_empty());
    delegating.flat_map(|agent| agent.delegates_to.iter().chain([&agent.id])).map(|id| id.as_str()).collect()
}

impl PermissionReach {
    fn empty(size: usize) -> Self {
        let [allowed, approved, denied, reachable] = [(); 4].map(|()| BitSet::empty(size));
        Self { allowed, approved, denied, reachable, allows_every_tool: false }
    }

    fn union_with(&mut self, other: &PermissionReach) {
        self.allowed.union_with(&other.allowed);
        self.approved.union_with(&other.approved);
        self.denied.union_with(&other.denied);
        self.reachable.union_with(&other.reachable);
        self.allows_every_tool |= other.allows_every_tool;
    }

    /// The tools that are permitted for some arguments, with or without approval.
    fn open_tools(&self) -> BitSet {
        let mut open = self.reachable.clone();
        open.subtract(&self.denied);
        open
    }
}

/// The union of the applications, or of the groups, that an agent names.
struct CeilingReach {
    open: BitSet,
    /// The subject and verb of a warning, such as "group `x` allows none of".
    denial_text: String,
}

/// The reach of all permission sets, applications and groups, and the warnings so far.
struct CeilingLinter<'a> {
    tools: &'a ToolTable,
    patterns: &'a mut PatternCache,
    out: &'a mut Vec<Diagnostic>,
    destructive: BitSet,
    sets: HashMap<&'a str, PermissionReach>,
    /// The tools that each application or group permits, by kind and id.
    owners: HashMap<(&'static str, &'a str), BitSet>,
    ceilings: HashMap<String, CeilingReach>,
}

impl<'a> CeilingLinter<'a> {
    fn new(
        documents: &[&'a Document],
        tools: &'a ToolTable,
        patterns: &'a mut PatternCache,
        out: &'a mut Vec<Diagnostic>,
    ) -> Self {
        let mut destructive = BitSet::empty(tools.len());
        tools.iter().zip(0..).filter(|(tool, _)| tool.is_destructive()).for_each(|(_, number)| destructive.insert(number));
        let (sets, owners, ceilings) = (HashMap::new(), HashMap::new(), HashMap::new());
        let mut linter = Self { tools, patterns, out, destructive, sets, owners, ceilings };
        linter.resolve_sets(documents);
        for document in documents.iter().copied() {
            if let DocumentBody::Application(permissions) | DocumentBody::Group(permissions) = &document.body {
                let mut reach = linter.own_reach(permissions);
                linter.add_included(permissions, &mut reach);
                linter.owners.insert((document.body.kind(), &document.key.id), reach.open_tools());
            }
        }
        linter
    }

    /// Computes the reach of every permission set, its includes first. The loop does not recurse, because a chain of includes may
    /// be long.
    fn resolve_sets(&mut self, documents: &[&'a Document]) {
        let permissions: HashMap<&str, &PermissionLists> = documents
            .iter()
            .copied()
            .filter_map(|document| match &document.body {
                DocumentBody::PermissionSet(permissions) => Some((document.key.id.as_str(), permissions)),
                _ => None,
            })
            .collect();
        for start in permissions.keys() {
            let mut pending = vec![*start];
            while let Some(id) = pending.last().copied() {
                let own = permissions.get(id).filter(|_| !self.sets.contains_key(id));
                let Some(own) = own else {
                    pending.pop();
                    continue;
                };
                let before = pending.len();
                pending.extend(own.include.iter().map(|set| &**set).filter(|set| !self.sets.contains_key(set)));
                if pending.len() == before {
                    let mut reach = self.own_reach(own);
                    self.add_included(own, &mut reach);
                    self.sets.insert(id, reach);
                    pending.pop();
                }
            }
        }
    }

    /// The reach of a document's own entries.
    fn own_reach(&mut self, permissions: &PermissionLists) -> PermissionReach {
        let mut reach = PermissionReach::empty(self.tools.len());
        for list in ListKind::ALL {
            for entry in permissions.entries(list) {
                let matching = self.patterns.resolve(&entry.pattern, self.tools);
                if list != ListKind::Deny {
                    matching.add_to(&mut reach.reachable);
                }
                if entry.is_unconditional() {
                    reach.allows_every_tool |= list == ListKind::Allow && is_every_tool(entry);
                    matching.add_to(match list {
                        ListKind::Deny => &mut reach.denied,
                        ListKind::Approve => &mut reach.approved,
                        ListKind::Allow => &mut reach.allowed,
                    });
                }
            }
        }
        reach
    }

    fn add_included(&self, permissions: &PermissionLists, reach: &mut PermissionReach) {
        permissions.include.iter().filter_map(|set| self.sets.get(&**set)).for_each(|set| reach.union_with(set));
    }

    /// Compares a document's entries with those of the sets that it includes.
    fn lint_included(&mut self, document: &Document, permissions: &PermissionLists, own: &PermissionReach) {
        for (list, index, entry) in entries(permissions) {
            let matching = self.patterns.resolve(&entry.pattern, self.tools);
            let sets = permissions.include.iter().filter_map(|id| self.sets.get(&**id).map(|set| (id, set)));
            let found =
                sets.filter(|_| !matching.is_empty()).find_map(|(id, set)| Some((entry_shadow(list, &matching, set)?, id)));
            if let Some((taken, id)) = found {
                let (pattern, id) = (abbreviate(&entry.pattern), abbreviate(id));
                let message = match taken {
                    EntryShadow::OverriddenBy(list) => {
                        format!("`{pattern}` never counts: `{}` of permission set `{id}` takes all it matches", list.as_str())
                    }
                    EntryShadow::Covered => format!("`{pattern}` adds nothing: permission set `{id}` covers it"),
                };
                self.warn(document, list.as_str(), index, message);
            }
        }
        for (index, id) in permissions.include.iter().enumerate() {
            let is_denied = |set: &PermissionReach| !set.reachable.is_empty() && set.reachable.is_subset(&own.denied);
            if self.sets.get(&**id).is_some_and(is_denied) {
                let message =
                    format!("permission set `{}` never counts: `deny` of this document takes all it allows", abbreviate(id));
                self.warn(document, "include", index, message);
            }
        }
    }

    /// Compares an agent's entries with the ceilings of its applications and groups.
    fn lint_agent(&mut self, document: &Document, agent: &AgentSpec, own: &PermissionReach, reach: &PermissionReach) {
        let applications = self.ceiling_key("application", &agent.applications, |id| id.as_str());
        let groups = self.ceiling_key("group", &agent.acts_for, |id| id.as_str());
        let (Some(applications), Some(groups)) = (applications, groups) else {
            return;
        };
        for (list, index, entry) in entries(&agent.permissions) {
            let matching = self.patterns.resolve(&entry.pattern, self.tools);
            if list == ListKind::Deny || matching.is_empty() || matching.is_subset_of(&own.denied) {
                continue;
            }
            let closed =
                [&applications, &groups].into_iter().find_map(|key| self.blocking_ceiling(key, |open| matching.intersects(open)));
            if let Some(nobody) = closed {
                let message = format!("`{}` never counts: {nobody} what it matches", abbreviate(&entry.pattern));
                self.warn(document, list.as_str(), index, message);
            }
        }
        for (index, id) in agent.permissions.include.iter().enumerate() {
            let Some(set) = self.sets.get(&**id).map(PermissionReach::open_tools).filter(|open| !open.is_empty()) else {
                continue;
            };
            let closed =
                [&applications, &groups].into_iter().find_map(|key| self.blocking_ceiling(key, |open| set.intersects(open)));
            if let Some(nobody) = closed {
                let message = format!("permission set `{}` never counts: {nobody} what it allows", abbreviate(id));
                self.warn(document, "include", index, message);
            }
        }
        if reach.allows_every_tool {
            self.lint_destructive(document, agent, reach, &[&applications, &groups]);
        }
    }

    /// Warns if a bare `*` permits an agent destructive tools without an approval.
    fn lint_destructive(&mut self, document: &Document, agent: &AgentSpec, reach: &PermissionReach, ceilings: &[&String]) {
        let mut open = self.destructive.clone();
        open.subtract(&reach.denied);
        open.subtract(&reach.approved);
        for ceiling in ceilings {
            if let Some(ceiling) = self.ceilings.get(*ceiling) {
                open.intersect_with(&ceiling.open);
            }
        }
        if open.is_empty() {
            return;
        }
        let names: Vec<&str> =
            self.tools.iter().zip(0..).filter(|(_, number)| open.contains(*number)).map(|(tool, _)| tool.name.as_str()).collect();
        let mut tool_names =
            names.iter().take(NAMED_MAX).map(|name| format!("`{}`", abbreviate(name))).collect::<Vec<_>>().join(", ");
        if names.len() > NAMED_MAX {
            tool_names.push_str(&format!(" and {} more", names.len() - NAMED_MAX));
        }
        let permissions = &agent.permissions;
        let own = permissions.allow.iter().position(|entry| entry.is_unconditional() && is_every_tool(entry));
        let location = match own {
            Some(index) => Some(("allow", index, "`*` allows".to_owned())),
            None => permissions
                .include
                .iter()
                .position(|set| self.sets.get(&**set).is_some_and(|set| set.allows_every_tool))
                .and_then(|index| Some(("include", index, permissions.include.get(index)?)))
                .map(|(field, index, set)| (field, index, format!("`*` of permission set `{}` allows", abbreviate(set)))),
        };
        if let Some((field, index, who)) = location {
            let help = "name the tools it needs, or move these to `approve` or `deny`".to_owned();
            let finding =
                document.field_diagnostic(Severity::Warning, field, index, format!("{who} what cannot be undone: {tool_names}"));
            self.out.push(finding.with_help(Some(help)));
        }
    }

    /// The key of the union of the named applications or groups; `None` if no name is given.
    fn ceiling_key<T>(&mut self, kind: &'static str, names: &NameSelection<T>, as_text: fn(&T) -> &str) -> Option<String> {
        let mut ids: Vec<&str> = match names {
            NameSelection::All => vec!["*"],
            NameSelection::Listed(names) => names.iter().map(as_text).collect(),
        };
        if ids.is_empty() {
            return None;
        }
        ids.sort_unstable();
        // No id contains a line feed.
        let key = format!("{kind}\n{}", ids.join("\n"));
        if !self.ceilings.contains_key(&key) {
            let mut open = BitSet::empty(self.tools.len());
            if ids == ["*"] {
                self.owners.iter().filter(|((owner, _), _)| *owner == kind).for_each(|(_, owner)| open.union_with(owner));
            } else {
                ids.iter().filter_map(|id| self.owners.get(&(kind, *id))).for_each(|owner| open.union_with(owner));
            }
            let nobody = match ids.as_slice() {
                [one] if *one != "*" => format!("{kind} `{}` allows none of", abbreviate(one)),
                _ if kind == "group" => "no group of `acts_for` allows any of".to_owned(),
                _ => "no application of `applications` allows any of".to_owned(),
            };
            self.ceilings.insert(key.clone(), CeilingReach { open, denial_text: nobody });
        }
        Some(key)
    }

    fn blocking_ceiling(&self, key: &String, meets: impl Fn(&BitSet) -> bool) -> Option<String> {
        self.ceilings.get(key).filter(|ceiling| !meets(&ceiling.open)).map(|ceiling| ceiling.denial_text.clone())
    }

    fn warn(&mut self, document: &Document, field: &'static str, index: usize, message: String) {
        self.out.push(document.field_diagnostic(Severity::Warning, field, index, message));
    }
}

/// The effect of a permission set on an entry beside it.
enum EntryShadow {
    OverriddenBy(ListKind),
    Covered,
}

/// The effect of a permission set on an entry of `list` beside it; `None` if the entry still counts.
fn entry_shadow(list: ListKind, matching: &MatchedTools, set: &PermissionReach) -> Option<EntryShadow> {
    match list {
        ListKind::Deny => matching.is_subset_of(&set.denied).then_some(EntryShadow::Covered),
        _ if matching.is_subset_of(&set.denied) => Some(EntryShadow::OverriddenBy(ListKind::Deny)),
        ListKind::Allow if matching.is_subset_of(&set.approved) => Some(EntryShadow::OverriddenBy(ListKind::Approve)),
        ListKind::Allow => matching.is_subset_of(&set.allowed).then_some(EntryShadow::Covered),
        ListKind::Approve => None,
    }
}

fn is_every_tool(entry: &PermissionEntry) -> bool {
    matches!(&*entry.pattern, "*" | "*/*")
}

fn entries(permissions: &PermissionLists) -> impl Iterator<Item = (ListKind, usize, &PermissionEntry)> {
    ListKind::ALL
        .into_iter()
        .flat_map(|list| permissions.entries(list).iter().enumerate().map(move |(index, entry)| (list, index, entry)))
}
