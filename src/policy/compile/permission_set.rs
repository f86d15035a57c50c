//! Permission sets: the entries of a document and of its includes, resolved to tools and sorted by precedence.
//!
//! A set answers for one document, and equal sets are stored once. It does not combine the answers of several sets. Look next at
//! `evaluate.rs`, which unites the sets of a layer, then at `resolve.rs`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::constraint::{ArgumentConstraint, ConstraintMap};
use crate::model::json::JsonObject;

use super::super::bit_set::BitSet;
use super::super::condition::{CallFacts, Condition, ConditionError};
use super::super::document::{ApprovalRule, ListKind, PermissionEntry, PermissionLists};
use super::super::tools::{MatchedTools, PatternCache, ToolTable};

/// The compiled permissions of a document.
#[derive(Debug)]
pub(super) struct PermissionSet {
    /// The source, for compiling it again when its includes or the tools change.
    pub(super) source: PermissionLists,
    /// The entries, the highest precedence first. The first applicable entry decides a call.
    entries: Box<[CompiledEntry]>,
    /// For each entry that names one tool: the tool, and the index in `entries`; sorted.
    exact_entries: Box<[(u32, u32)]>,
    /// For each entry with a pattern: the tools that it matches, and its index in `entries`.
    pattern_entries: Box<[(Arc<BitSet>, u32)]>,
    /// The tools that some allow entry permits for all arguments.
    pub(super) allowed: BitSet,
    /// The tools that a deny or approve entry, or any condition, may restrict.
    pub(super) restricted: BitSet,
    /// Whether some condition reads the agent, so that it must be evaluated for each agent.
    pub(super) depends_on_agent: bool,
}

/// An entry and its origin.
#[derive(Debug)]
pub(super) struct CompiledEntry {
    pub(super) list: ListKind,
    /// The permission set that it was included from; `None` if it is the document's own entry.
    pub(super) included_from: Option<Arc<str>>,
    pub(super) text: Arc<str>,
    pub(super) approval: Option<ApprovalRule>,
    /// The tool that must have been prepared.
    pub(super) prepared: Option<Arc<str>>,
    arguments: ConstraintMap,
    when: Option<Condition>,
    attested: bool,
    unconditional: bool,
}

/// The result of all entries of a set for a call.
#[derive(Clone, Copy)]
pub(super) enum EntryOutcome<'a> {
    /// No entry applies.
    NoMatch,
    /// The first applicable entry.
    Decided(&'a CompiledEntry),
    /// A condition could not be evaluated. The other entries do not count.
    ConditionFailed(&'a CompiledEntry),
}

/// The possible answers of a set for a tool whose arguments are not known: for each list, whether an entry certainly applies, and
/// whether one may apply.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PossibleAnswers {
    pub(super) certain: [bool; 3],
    pub(super) possible: [bool; 3],
    /// Whether some condition is evaluated, which may fail.
    pub(super) may_fail: bool,
}

impl PermissionSet {
    /// Compiles permissions. `sources` holds the permission sets that may be included.
    pub(super) fn new(
        permissions: &PermissionLists,
        sources: &HashMap<Arc<str>, PermissionLists>,
        tools: &ToolTable,
        patterns: &mut PatternCache,
    ) -> Self {
        let mut found = Vec::new();
        for (origin, permissions) in expand_includes(permissions, sources) {
            for list in ListKind::ALL {
                found.extend(permissions.entries(list).iter().map(|entry| (list, origin.clone(), entry)));
            }
        }
        // In each list, entries without `prepared` come first, because a call that one of them permits needs no preparation.
        let strength = |found: &(ListKind, Option<Arc<str>>, &PermissionEntry)| (found.0, found.2.prepared.is_some());
        found.sort_by(|a, b| (strength(a), &a.1, a.2.text()).cmp(&(strength(b), &b.1, b.2.text())));
        found.dedup_by(|a, b| (a.0, &a.1, a.2.text()) == (b.0, &b.1, b.2.text()));
        let empty = || BitSet::empty(tools.len());
        let (mut allowed, mut taken) = (empty(), empty());
        let (mut exact, mut wild, mut entries) = (Vec::new(), Vec::new(), Vec::with_capacity(found.len()));
        for ((list, origin, entry), index) in found.into_iter().zip(0..) {
            let matching = patterns.resolve(&entry.pattern, tools);
            let unconditional = entry.is_unconditional();
            if entry.when.is_some() {
                // A condition may fail, and then the set denies whatever its other entries are.
                matching.add_to(&mut taken);
            }
            match list {
                ListKind::Deny | ListKind::Approve => matching.add_to(&mut taken),
                ListKind::Allow if unconditional => matching.add_to(&mut allowed),
                ListKind::Allow => {}
            }
            match matching {
                MatchedTools::One(tool) => exact.push((tool, index)),
                MatchedTools::Many(tools) => wild.push((tools, index)),
            }
            entries.push(CompiledEntry::new(list, origin, entry, unconditional));
        }
        exact.sort_unstable();
        Self {
            source: permissions.clone(),
            depends_on_agent: entries.iter().any(|entry| entry.when.as_ref().is_some_and(Condition::reads_agent)),
            entries: entries.into_boxed_slice(),
            exact_entries: exact.into_boxed_slice(),
            pattern_entries: wild.into_boxed_slice(),
            allowed,
            restricted: taken,
        }
    }

    /// The first applicable entry. A failed condition takes precedence over it.
    pub(super) fn decisive_entry(&self, tool: u32, facts: &CallFacts<'_>) -> EntryOutcome<'_> {
        let mut first: Option<(u32, &CompiledEntry)> = None;
        let mut failed: Option<(u32, &CompiledEntry)> = None;
        for (index, entry) in self.entries_for_tool(tool) {
            let earliest = match entry.applies(facts) {
                Ok(false) => continue,
                Ok(true) => &mut first,
                Err(ConditionError) => &mut failed,
            };
            if earliest.is_none_or(|(other, _)| index < other) {
                *earliest = Some((index, entry));
            }
        }
        match (failed, first) {
            (Some((_, entry)), _) => EntryOutcome::ConditionFailed(entry),
            (None, Some((_, entry))) => EntryOutcome::Decided(entry),
            (None, None) => EntryOutcome::NoMatch,
        }
    }

    /// The approvers of every applicable `approve` entry.
    pub(super) fn applicable_approvals<'a>(
        &'a self,
        tool: u32,
        facts: &'a CallFacts<'_>,
    ) -> impl Iterator<Item = &'a ApprovalRule> {
        let approving = self.entries_for_tool(tool).filter(|(_, entry)| entry.list == ListKind::Approve);
        approving.filter(|(_, entry)| entry.applies(facts) == Ok(true)).filter_map(|(_, entry)| entry.approval.as_ref())
    }

    /// Adds the possible answers of this set for a tool.
    pub(super) fn add_possible_answers(&self, tool: u32, possible_answers: &mut PossibleAnswers) {
        for (_, entry) in self.entries_for_tool(tool) {
            let index = entry.list as usize;
            if let (Some(sure), Some(possible)) =
                (possible_answers.certain.get_mut(index), possible_answers.possible.get_mut(index))
            {
                *sure |= entry.unconditional;
                *possible = true;
            }
            possible_answers.may_fail |= entry.when.is_some();
        }
    }

    /// Whether both sets hold the same entries, regardless of their origin.
    pub(super) fn has_same_entries(&self, other: &PermissionSet) -> bool {
        let texts = |set: &PermissionSet| -> BTreeSet<(ListKind, Arc<str>)> {
            set.entries.iter().map(|entry| (entry.list, entry.text.clone())).collect()
        };
        texts(self) == texts(other)
    }

    /// The entries whose pattern matches a tool, with their indexes, unsorted. Arguments are not checked.
    pub(super) fn entries_for_tool(&self, tool: u32) -> impl Iterator<Item = (u32, &CompiledEntry)> {
        let first = self.exact_entries.partition_point(|(number, _)| *number < tool);
        let exact = self.exact_entries.iter().skip(first).take_while(move |(number, _)| *number == tool).map(|(_, index)| *index);
        let wild = self.pattern_entries.iter().filter(move |(tools, _)| tools.contains(tool)).map(|(_, index)| *index);
        exact.chain(wild).filter_map(|index| self.entries.get(index as usize).map(|entry| (index, entry)))
    }
}

impl CompiledEntry {
    fn new(list: ListKind, origin: Option<Arc<str>>, entry: &PermissionEntry, unconditional: bool) -> Self {
        Self {
            list,
            included_from: origin,
            text: entry.text().clone(),
            approval: entry.approval.clone(),
            prepared: entry.prepared.clone(),
            arguments: entry.arguments.clone(),
            when: entry.when.clone(),
            attested: entry.attested,
            unconditional,
        }
    }

    /// Whether both entries are equal and in the same list.
    pub(super) fn is_same_entry(&self, other: &CompiledEntry) -> bool {
        self.list == other.list && self.text == other.text
    }

    /// Whether the entry applies to every call of its tools.
    pub(super) fn is_unconditional(&self) -> bool {
        self.unconditional
    }

    /// Whether the entry has a condition, which may fail.
    pub(super) fn has_condition(&self) -> bool {
        self.when.is_some()
    }

    /// The condition of the entry.
    pub(super) fn condition(&self) -> Option<&Condition> {
        self.when.as_ref()
    }

    /// Describes the arguments that the entry demands and the call lacks; `None` if the arguments match.
    pub(super) fn describe_argument_mismatch(&self, arguments: &JsonObject) -> Option<String> {
        self.arguments.describe_violations(arguments)
    }

    /// Whether both are allow entries without conditions that differ only in their arguments, and this one applies to every call
    /// that the other applies to.
    pub(super) fn covers(&self, other: &CompiledEntry) -> bool {
        let terms = |entry: &CompiledEntry| (entry.list, entry.prepared.clone(), entry.attested, entry.when.is_none());
        terms(self) == terms(other) && self.when.is_none() && other.arguments.check_attenuation(&self.arguments).is_ok()
    }

    /// Whether the entry applies to a call of a matching tool. The arguments are checked first, then the condition.
    pub(super) fn applies(&self, facts: &CallFacts<'_>) -> Result<bool, ConditionError> {
        match &self.when {
            _ if !self.matches_arguments(facts.call.arguments) => Ok(false),
            Some(when) => when.holds(facts),
            None => Ok(true),
        }
    }

    /// Whether the arguments match.
    ///
    /// An allow or approve entry matches if every argument that it names is present and satisfies its constraint. A deny entry
    /// matches unless a named argument is present, has the type of its constraint, and violates it. So a caller cannot evade a
    /// deny by leaving an argument out.
    fn matches_arguments(&self, arguments: &JsonObject) -> bool {
        if self.unconditional {
            return true;
        }
        let escapes = |(name, argument): (&Arc<str>, &ArgumentConstraint)| {
            arguments
                .member(name)
                .is_some_and(|value| argument.constraint.applies_to_type_of(value) && !argument.constraint.matches(value))
        };
        match self.list {
            ListKind::Deny => !self.arguments.named.iter().any(escapes),
            ListKind::Approve | ListKind::Allow => {
                self.arguments.named.iter().all(|(name, argument)| match arguments.member(name) {
                    Some(value) => argument.constraint.matches(value),
                    None => argument.optional,
                }) && (self.arguments.allows_unnamed || arguments.iter().all(|(name, _)| self.arguments.named.contains_key(name)))
            }
        }
    }
}

/// The text of permissions in a canonical order. Equal permissions have equal texts.
pub(super) fn canonical_text(permissions: &PermissionLists) -> Arc<str> {
    let mut parts: BTreeSet<(&str, &str)> = permissions.include.iter().map(|set| ("include", &**set)).collect();
    for list in ListKind::ALL {
        parts.extend(permissions.entries(list).iter().map(|entry| (list.as_str(), &**entry.text())));
    }
    let mut key = String::new();
    for (list, text) in parts {
        // No text contains a line feed: patterns are visible ASCII, ids have no control characters, and JSON escapes them.
        key.push_str(list);
        key.push(' ');
        key.push_str(text);
        key.push('\n');
    }
    key.into()
}

/// The permissions and each set that they include, directly or through others, once.
fn expand_includes<'a>(
    permissions: &'a PermissionLists,
    sources: &'a HashMap<Arc<str>, PermissionLists>,
) -> Vec<(Option<Arc<str>>, &'a PermissionLists)> {
    let mut found = vec![(None, permissions)];
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut pending: Vec<&Arc<str>> = permissions.include.iter().collect();
    while let Some(id) = pending.pop() {
        if let Some(set) = sources.get(id).filter(|_| seen.insert(id)) {
            found.push((Some(id.clone()), set));
            pending.extend(&set.include);
        }
    }
    found
}
