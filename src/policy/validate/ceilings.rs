//! Warns about entries that never count because of other documents: an included permission set, or a ceiling above an agent.
//!
//! The analysis uses sets of tools and ignores arguments. It reports an entry only if the entry has no effect for any arguments.
//! Results are shared by permission set and by the list of ceilings, because a fleet uses few of them. Look next at `chains.rs`.

use std::collections::{HashMap, HashSet};

use crate::model::constraint::abridged;

use super::super::bits::BitSet;
use super::super::diagnostic::{Diagnostic, Severity};
use super::super::document::{AgentSpec, Body, Document, Entry, List, Names, Permissions};
use super::super::tools::{Matching, Patterns, ToolTable};

/// The maximum number of tools that one warning names.
const NAMED_MAX: usize = 3;

/// The tools that permissions and their includes reach, for all arguments.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// The tools that some allow permits for all arguments.
    allowed: BitSet,
    /// The tools that some approve covers for all arguments.
    approved: BitSet,
    /// The tools that some deny covers for all arguments.
    denied: BitSet,
    /// The tools that some allow or approve matches.
    reachable: BitSet,
    /// Whether a bare `*` allows every tool.
    star: bool,
}

/// The tools that an agent may reach, by the index of its document.
pub(super) type Reaches = HashMap<usize, BitSet>;

/// Warns about entries that never count. Returns the reachable tools of all agents that delegate or are delegated to.
pub(super) fn lint(documents: &[&Document], tools: &ToolTable, patterns: &mut Patterns, out: &mut Vec<Diagnostic>) -> Reaches {
    let mut linter = Linter::new(documents, tools, patterns, out);
    let mut reaches = Reaches::new();
    let linked = linked(documents);
    for (index, document) in documents.iter().copied().enumerate() {
        let Some(permissions) = document.permissions() else {
            continue;
        };
        let own = linter.own(permissions);
        linter.included(document, permissions, &own);
        if let Body::Agent(agent) = &document.body {
            let mut reach = own.clone();
            linter.add_included(permissions, &mut reach);
            linter.agent(document, agent, &own, &reach);
            if linked.contains(agent.id.as_str()) {
                reaches.insert(index, reach.open());
            }
        }
    }
    reaches
}

/// The agents that delegate or are delegated to.
fn linked<'a>(documents: &[&'a Document]) -> HashSet<&'a str> {
    let agents =
        documents.iter().copied().filter_map(|document| if let Body::Agent(agent) = &document.body { Some(agent) } else { None });
    let handing_on = agents.filter(|agent| !agent.delegates_to.is_empty());
    handing_on.flat_map(|agent| agent.delegates_to.iter().chain([&agent.id])).map(|id| id.as_str()).collect()
}

impl Reach {
    fn empty(size: usize) -> Self {
        let [allowed, approved, denied, reachable] = [(); 4].map(|()| BitSet::empty(size));
        Self { allowed, approved, denied, reachable, star: false }
    }

    fn unite(&mut self, other: &Reach) {
        self.allowed.unite(&other.allowed);
        self.approved.unite(&other.approved);
        self.denied.unite(&other.denied);
        self.reachable.unite(&other.reachable);
        self.star |= other.star;
    }

    /// The tools that are permitted for some arguments, with or without approval.
    fn open(&self) -> BitSet {
        let mut open = self.reachable.clone();
        open.subtract(&self.denied);
        open
    }
}

/// The union of the applications, or of the groups, that an agent names.
struct Ceiling {
    open: BitSet,
    /// The subject and verb of a warning, such as "group `x` allows none of".
    nobody: String,
}

/// The reach of all permission sets, applications and groups, and the warnings so far.
struct Linter<'a> {
    tools: &'a ToolTable,
    patterns: &'a mut Patterns,
    out: &'a mut Vec<Diagnostic>,
    destructive: BitSet,
    sets: HashMap<&'a str, Reach>,
    /// The tools that each application or group permits, by kind and id.
    owners: HashMap<(&'static str, &'a str), BitSet>,
    ceilings: HashMap<String, Ceiling>,
}

impl<'a> Linter<'a> {
    fn new(documents: &[&'a Document], tools: &'a ToolTable, patterns: &'a mut Patterns, out: &'a mut Vec<Diagnostic>) -> Self {
        let mut destructive = BitSet::empty(tools.len());
        tools.iter().zip(0..).filter(|(tool, _)| tool.is_destructive()).for_each(|(_, number)| destructive.insert(number));
        let (sets, owners, ceilings) = (HashMap::new(), HashMap::new(), HashMap::new());
        let mut linter = Self { tools, patterns, out, destructive, sets, owners, ceilings };
        linter.resolve_sets(documents);
        for document in documents.iter().copied() {
            if let Body::Application(permissions) | Body::Group(permissions) = &document.body {
                let mut reach = linter.own(permissions);
                linter.add_included(permissions, &mut reach);
                linter.owners.insert((document.body.kind(), &document.key.id), reach.open());
            }
        }
        linter
    }

    /// Computes the reach of every permission set, its includes first. The loop does not recurse, because a chain of includes may
    /// be long.
    fn resolve_sets(&mut self, documents: &[&'a Document]) {
        let permissions: HashMap<&str, &Permissions> = documents
            .iter()
            .copied()
            .filter_map(|document| match &document.body {
                Body::PermissionSet(permissions) => Some((document.key.id.as_str(), permissions)),
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
                    let mut reach = self.own(own);
                    self.add_included(own, &mut reach);
                    self.sets.insert(id, reach);
                    pending.pop();
                }
            }
        }
    }

    /// The reach of a document's own entries.
    fn own(&mut self, permissions: &Permissions) -> Reach {
        let mut reach = Reach::empty(self.tools.len());
        for list in List::ALL {
            for entry in permissions.list(list) {
                let matching = self.patterns.resolve(&entry.pattern, self.tools);
                if list != List::Deny {
                    matching.unite_into(&mut reach.reachable);
                }
                if entry.is_unconditional() {
                    reach.star |= list == List::Allow && is_every_tool(entry);
                    matching.unite_into(match list {
                        List::Deny => &mut reach.denied,
                        List::Approve => &mut reach.approved,
                        List::Allow => &mut reach.allowed,
                    });
                }
            }
        }
        reach
    }

    fn add_included(&self, permissions: &Permissions, reach: &mut Reach) {
        permissions.include.iter().filter_map(|set| self.sets.get(&**set)).for_each(|set| reach.unite(set));
    }

    /// Compares a document's entries with those of the sets that it includes.
    fn included(&mut self, document: &Document, permissions: &Permissions, own: &Reach) {
        for (list, index, entry) in entries(permissions) {
            let matching = self.patterns.resolve(&entry.pattern, self.tools);
            let sets = permissions.include.iter().filter_map(|id| self.sets.get(&**id).map(|set| (id, set)));
            let found = sets.filter(|_| !matching.is_empty()).find_map(|(id, set)| Some((taken_by(list, &matching, set)?, id)));
            if let Some((taken, id)) = found {
                let (pattern, id) = (abridged(&entry.pattern), abridged(id));
                let message = match taken {
                    Taken::By(list) => {
                        format!("`{pattern}` never counts: `{}` of permission set `{id}` takes all it matches", list.as_str())
                    }
                    Taken::Covered => format!("`{pattern}` adds nothing: permission set `{id}` covers it"),
                };
                self.warn(document, list.as_str(), index, message);
            }
        }
        for (index, id) in permissions.include.iter().enumerate() {
            let is_denied = |set: &Reach| !set.reachable.is_empty() && set.reachable.is_subset(&own.denied);
            if self.sets.get(&**id).is_some_and(is_denied) {
                let message =
                    format!("permission set `{}` never counts: `deny` of this document takes all it allows", abridged(id));
                self.warn(document, "include", index, message);
            }
        }
    }

    /// Compares an agent's entries with the ceilings of its applications and groups.
    fn agent(&mut self, document: &Document, agent: &AgentSpec, own: &Reach, reach: &Reach) {
        let applications = self.ceiling("application", &agent.applications, |id| id.as_str());
        let groups = self.ceiling("group", &agent.acts_for, |id| id.as_str());
        let (Some(applications), Some(groups)) = (applications, groups) else {
            return;
        };
        for (list, index, entry) in entries(&agent.permissions) {
            let matching = self.patterns.resolve(&entry.pattern, self.tools);
            if list == List::Deny || matching.is_empty() || matching.is_within(&own.denied) {
                continue;
            }
            let closed = [&applications, &groups].into_iter().find_map(|key| self.closes(key, |open| matching.meets(open)));
            if let Some(nobody) = closed {
                let message = format!("`{}` never counts: {nobody} what it matches", abridged(&entry.pattern));
                self.warn(document, list.as_str(), index, message);
            }
        }
        for (index, id) in agent.permissions.include.iter().enumerate() {
            let Some(set) = self.sets.get(&**id).map(Reach::open).filter(|open| !open.is_empty()) else {
                continue;
            };
            let closed = [&applications, &groups].into_iter().find_map(|key| self.closes(key, |open| set.meets(open)));
            if let Some(nobody) = closed {
                let message = format!("permission set `{}` never counts: {nobody} what it allows", abridged(id));
                self.warn(document, "include", index, message);
            }
        }
        if reach.star {
            self.destructive(document, agent, reach, &[&applications, &groups]);
        }
    }

    /// Warns if a bare `*` permits an agent destructive tools without an approval.
    fn destructive(&mut self, document: &Document, agent: &AgentSpec, reach: &Reach, ceilings: &[&String]) {
        let mut open = self.destructive.clone();
        open.subtract(&reach.denied);
        open.subtract(&reach.approved);
        for ceiling in ceilings {
            if let Some(ceiling) = self.ceilings.get(*ceiling) {
                open.intersect(&ceiling.open);
            }
        }
        if open.is_empty() {
            return;
        }
        let names: Vec<&str> =
            self.tools.iter().zip(0..).filter(|(_, number)| open.contains(*number)).map(|(tool, _)| tool.name.as_str()).collect();
        let mut said = names.iter().take(NAMED_MAX).map(|name| format!("`{}`", abridged(name))).collect::<Vec<_>>().join(", ");
        if names.len() > NAMED_MAX {
            said.push_str(&format!(" and {} more", names.len() - NAMED_MAX));
        }
        let permissions = &agent.permissions;
        let own = permissions.allow.iter().position(|entry| entry.is_unconditional() && is_every_tool(entry));
        let place = match own {
            Some(index) => Some(("allow", index, "`*` allows".to_owned())),
            None => permissions
                .include
                .iter()
                .position(|set| self.sets.get(&**set).is_some_and(|set| set.star))
                .and_then(|index| Some(("include", index, permissions.include.get(index)?)))
                .map(|(field, index, set)| (field, index, format!("`*` of permission set `{}` allows", abridged(set)))),
        };
        if let Some((field, index, who)) = place {
            let help = "name the tools it needs, or move these to `approve` or `deny`".to_owned();
            let finding = document.diagnostic(Severity::Warning, field, index, format!("{who} what cannot be undone: {said}"));
            self.out.push(finding.with_help(Some(help)));
        }
    }

    /// The key of the union of the named applications or groups; `None` if no name is given.
    fn ceiling<T>(&mut self, kind: &'static str, names: &Names<T>, as_text: fn(&T) -> &str) -> Option<String> {
        let mut ids: Vec<&str> = match names {
            Names::All => vec!["*"],
            Names::Some(names) => names.iter().map(as_text).collect(),
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
                self.owners.iter().filter(|((owner, _), _)| *owner == kind).for_each(|(_, owner)| open.unite(owner));
            } else {
                ids.iter().filter_map(|id| self.owners.get(&(kind, *id))).for_each(|owner| open.unite(owner));
            }
            let nobody = match ids.as_slice() {
                [one] if *one != "*" => format!("{kind} `{}` allows none of", abridged(one)),
                _ if kind == "group" => "no group of `acts_for` allows any of".to_owned(),
                _ => "no application of `applications` allows any of".to_owned(),
            };
            self.ceilings.insert(key.clone(), Ceiling { open, nobody });
        }
        Some(key)
    }

    fn closes(&self, key: &String, meets: impl Fn(&BitSet) -> bool) -> Option<String> {
        self.ceilings.get(key).filter(|ceiling| !meets(&ceiling.open)).map(|ceiling| ceiling.nobody.clone())
    }

    fn warn(&mut self, document: &Document, field: &'static str, index: usize, message: String) {
        self.out.push(document.diagnostic(Severity::Warning, field, index, message));
    }
}

/// The effect of a permission set on an entry beside it.
enum Taken {
    By(List),
    Covered,
}

/// The effect of a permission set on an entry of `list` beside it; `None` if the entry still counts.
fn taken_by(list: List, matching: &Matching, set: &Reach) -> Option<Taken> {
    match list {
        List::Deny => matching.is_within(&set.denied).then_some(Taken::Covered),
        _ if matching.is_within(&set.denied) => Some(Taken::By(List::Deny)),
        List::Allow if matching.is_within(&set.approved) => Some(Taken::By(List::Approve)),
        List::Allow => matching.is_within(&set.allowed).then_some(Taken::Covered),
        List::Approve => None,
    }
}

fn is_every_tool(entry: &Entry) -> bool {
    matches!(&*entry.pattern, "*" | "*/*")
}

fn entries(permissions: &Permissions) -> impl Iterator<Item = (List, usize, &Entry)> {
    List::ALL
        .into_iter()
        .flat_map(|list| permissions.list(list).iter().enumerate().map(move |(index, entry)| (list, index, entry)))
}
