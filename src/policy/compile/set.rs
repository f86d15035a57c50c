//! Permission sets: the entries of a document with all it includes, resolved to tools and sorted by strength.
//!
//! One answers for one owner; uniting and narrowing is `evaluate.rs`'s and `resolve.rs`'s business. Equal sets are one.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::constraint::{Argument, ArgumentMap};
use crate::model::json::Object;

use super::super::bits::BitSet;
use super::super::condition::{Condition, Facts, Failed};
use super::super::document::{Approval, Entry, List, Permissions};
use super::super::tools::{Matching, Patterns, ToolTable};

/// What a document permits.
#[derive(Debug)]
pub(super) struct PermissionSet {
    /// What it was made of, to be made anew where what it includes or the tools change.
    pub(super) source: Permissions,
    /// The strongest first: of those that apply to a call, the first decides.
    entries: Box<[SetEntry]>,
    /// Tool and index of entries that name one tool, sorted.
    exact: Box<[(u32, u32)]>,
    /// Tools and index of entries with a pattern.
    wild: Box<[(Arc<BitSet>, u32)]>,
    /// Tools that some allow permits whatever the arguments are.
    pub(super) allowed: BitSet,
    /// Tools that some deny or approve speaks of.
    pub(super) taken: BitSet,
    /// Whether some condition looks at the agent, and so must be asked for each.
    pub(super) asks_agent: bool,
}

/// An entry, and where it is from.
#[derive(Debug)]
pub(super) struct SetEntry {
    pub(super) list: List,
    /// The permission set it was included from; `None` if the owner wrote it.
    pub(super) origin: Option<Arc<str>>,
    pub(super) text: Arc<str>,
    pub(super) approval: Option<Approval>,
    /// The tool that must have been prepared.
    pub(super) prepared: Option<Arc<str>>,
    arguments: ArgumentMap,
    when: Option<Condition>,
    attested: bool,
    unconditional: bool,
}

/// What the entries of a set come to for a call.
#[derive(Clone, Copy)]
pub(super) enum Heard<'a> {
    /// None applies.
    Nothing,
    /// Of those that apply, the first.
    Entry(&'a SetEntry),
    /// A condition could not be evaluated; what the others say does not matter.
    Failed(&'a SetEntry),
}

/// What a set can answer for a tool while the arguments are not known, list by list: whether some entry surely applies, and
/// whether some entry may.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chances {
    pub(super) sure: [bool; 3],
    pub(super) possible: [bool; 3],
    /// Whether a condition is asked, which may fail.
    pub(super) may_fail: bool,
}

impl PermissionSet {
    /// The set of some permissions. `sources` are the permission sets that can be included.
    pub(super) fn new(
        permissions: &Permissions,
        sources: &HashMap<Arc<str>, Permissions>,
        tools: &ToolTable,
        patterns: &mut Patterns,
    ) -> Self {
        let mut found = Vec::new();
        for (origin, permissions) in with_included(permissions, sources) {
            for list in List::ALL {
                found.extend(permissions.list(list).iter().map(|entry| (list, origin.clone(), entry)));
            }
        }
        // Of entries of one list those that ask for nothing come first: what one permits outright needs no preparing.
        let strength = |found: &(List, Option<Arc<str>>, &Entry)| (found.0, found.2.prepared.is_some());
        found.sort_by(|a, b| (strength(a), &a.1, a.2.text()).cmp(&(strength(b), &b.1, b.2.text())));
        found.dedup_by(|a, b| (a.0, &a.1, a.2.text()) == (b.0, &b.1, b.2.text()));
        let empty = || BitSet::empty(tools.len());
        let (mut allowed, mut taken) = (empty(), empty());
        let (mut exact, mut wild, mut entries) = (Vec::new(), Vec::new(), Vec::with_capacity(found.len()));
        for ((list, origin, entry), index) in found.into_iter().zip(0..) {
            let matching = patterns.resolve(&entry.pattern, tools);
            let unconditional = entry.is_unconditional();
            if entry.when.is_some() {
                // It may fail, and then it denies, whatever else the set says.
                matching.unite_into(&mut taken);
            }
            match list {
                List::Deny | List::Approve => matching.unite_into(&mut taken),
                List::Allow if unconditional => matching.unite_into(&mut allowed),
                List::Allow => {}
            }
            match matching {
                Matching::One(tool) => exact.push((tool, index)),
                Matching::Many(tools) => wild.push((tools, index)),
            }
            entries.push(SetEntry::new(list, origin, entry, unconditional));
        }
        exact.sort_unstable();
        Self {
            source: permissions.clone(),
            asks_agent: entries.iter().any(|entry| entry.when.as_ref().is_some_and(Condition::asks_agent)),
            entries: entries.into_boxed_slice(),
            exact: exact.into_boxed_slice(),
            wild: wild.into_boxed_slice(),
            allowed,
            taken,
        }
    }

    /// What the entries come to: of those that apply, the first decides, unless a condition fails.
    pub(super) fn decisive(&self, tool: u32, facts: &Facts<'_>) -> Heard<'_> {
        let mut first: Option<(u32, &SetEntry)> = None;
        let mut failed: Option<(u32, &SetEntry)> = None;
        for (index, entry) in self.speaking_of(tool) {
            let place = match entry.applies(facts) {
                Ok(false) => continue,
                Ok(true) => &mut first,
                Err(Failed) => &mut failed,
            };
            if place.is_none_or(|(other, _)| index < other) {
                *place = Some((index, entry));
            }
        }
        match (failed, first) {
            (Some((_, entry)), _) => Heard::Failed(entry),
            (None, Some((_, entry))) => Heard::Entry(entry),
            (None, None) => Heard::Nothing,
        }
    }

    /// Every `approve` entry that applies.
    pub(super) fn approving<'a>(&'a self, tool: u32, facts: &'a Facts<'_>) -> impl Iterator<Item = &'a Approval> {
        let approving = self.speaking_of(tool).filter(|(_, entry)| entry.list == List::Approve);
        approving.filter(|(_, entry)| entry.applies(facts) == Ok(true)).filter_map(|(_, entry)| entry.approval.as_ref())
    }

    /// Adds what the set can answer for a tool.
    pub(super) fn add_chances(&self, tool: u32, chances: &mut Chances) {
        for (_, entry) in self.speaking_of(tool) {
            let place = entry.list as usize;
            if let (Some(sure), Some(possible)) = (chances.sure.get_mut(place), chances.possible.get_mut(place)) {
                *sure |= entry.unconditional;
                *possible = true;
            }
            chances.may_fail |= entry.when.is_some();
        }
    }

    /// Whether both hold the same entries, wherever they come from.
    pub(super) fn says_the_same(&self, other: &PermissionSet) -> bool {
        let texts = |set: &PermissionSet| -> BTreeSet<(List, Arc<str>)> {
            set.entries.iter().map(|entry| (entry.list, entry.text.clone())).collect()
        };
        texts(self) == texts(other)
    }

    /// Entries that match a tool, whatever the arguments are, with their places; in no order.
    pub(super) fn speaking_of(&self, tool: u32) -> impl Iterator<Item = (u32, &SetEntry)> {
        let first = self.exact.partition_point(|(number, _)| *number < tool);
        let exact = self.exact.iter().skip(first).take_while(move |(number, _)| *number == tool).map(|(_, index)| *index);
        let wild = self.wild.iter().filter(move |(tools, _)| tools.contains(tool)).map(|(_, index)| *index);
        exact.chain(wild).filter_map(|index| self.entries.get(index as usize).map(|entry| (index, entry)))
    }
}

impl SetEntry {
    fn new(list: List, origin: Option<Arc<str>>, entry: &Entry, unconditional: bool) -> Self {
        Self {
            list,
            origin,
            text: entry.text().clone(),
            approval: entry.approval.clone(),
            prepared: entry.prepared.clone(),
            arguments: entry.arguments.clone(),
            when: entry.when.clone(),
            attested: entry.attested,
            unconditional,
        }
    }

    /// Whether both entries say the same in the same list.
    pub(super) fn says_the_same(&self, other: &SetEntry) -> bool {
        self.list == other.list && self.text == other.text
    }

    /// Whether it applies whatever the call is.
    pub(super) fn is_unconditional(&self) -> bool {
        self.unconditional
    }

    /// Whether it asks a condition, which may fail.
    pub(super) fn has_condition(&self) -> bool {
        self.when.is_some()
    }

    /// Its condition.
    pub(super) fn condition(&self) -> Option<&Condition> {
        self.when.as_ref()
    }

    /// What the arguments lack for an allow or approve to speak of them, in words.
    pub(super) fn lacks(&self, arguments: &Object) -> Option<String> {
        self.arguments.lacks(arguments)
    }

    /// Whether two allows without a condition differ in their arguments alone, and this one applies to all that the other does.
    pub(super) fn covers(&self, other: &SetEntry) -> bool {
        let terms = |entry: &SetEntry| (entry.list, entry.prepared.clone(), entry.attested, entry.when.is_none());
        terms(self) == terms(other) && self.when.is_none() && other.arguments.attenuates(&self.arguments).is_ok()
    }

    /// Whether the entry applies to a call of a tool that it matches: its arguments, and then its condition.
    pub(super) fn applies(&self, facts: &Facts<'_>) -> Result<bool, Failed> {
        match &self.when {
            _ if !self.matches(facts.call.arguments) => Ok(false),
            Some(when) => when.holds(facts),
            None => Ok(true),
        }
    }

    /// Whether the arguments are those that the entry speaks of.
    ///
    /// An allow or approve applies if every argument it names is there and matches. A deny applies unless some argument it
    /// names is there, of the type its constraint speaks of, and does not match: leaving one out is no escape.
    fn matches(&self, arguments: &Object) -> bool {
        if self.unconditional {
            return true;
        }
        let escapes = |(name, argument): (&Arc<str>, &Argument)| {
            arguments.member(name).is_some_and(|value| argument.constraint.speaks_of(value) && !argument.constraint.holds(value))
        };
        match self.list {
            List::Deny => !self.arguments.named.iter().any(escapes),
            List::Approve | List::Allow => {
                self.arguments.named.iter().all(|(name, argument)| match arguments.member(name) {
                    Some(value) => argument.constraint.holds(value),
                    None => argument.optional,
                }) && (self.arguments.open || arguments.iter().all(|(name, _)| self.arguments.named.contains_key(name)))
            }
        }
    }
}

/// What was written, in one order: equal for permissions that say the same.
pub(super) fn canonical(permissions: &Permissions) -> Arc<str> {
    let mut parts: BTreeSet<(&str, &str)> = permissions.include.iter().map(|set| ("include", &**set)).collect();
    for list in List::ALL {
        parts.extend(permissions.list(list).iter().map(|entry| (list.as_str(), &**entry.text())));
    }
    let mut key = String::new();
    for (list, text) in parts {
        // No text holds a line feed: patterns are visible ASCII, ids have no control characters, JSON escapes them.
        key.push_str(list);
        key.push(' ');
        key.push_str(text);
        key.push('\n');
    }
    key.into()
}

/// The permissions, then each set they include, directly or through others, once.
fn with_included<'a>(
    permissions: &'a Permissions,
    sources: &'a HashMap<Arc<str>, Permissions>,
) -> Vec<(Option<Arc<str>>, &'a Permissions)> {
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
