//! The difference between two policies: changed documents, and for each agent and tool the change of access.
//!
//! This file is pure. A pair of agent and tool is compared for all users and applications, so that no widening is missed. A
//! change that is not known to be narrower is shown as wider or changed. Look next at `compile/compare.rs`, which compares.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use crate::model::decision::Effect;
use crate::model::ids::AgentId;
use crate::model::rows::DocumentKey;

use super::document::{Document, DocumentBody};
use super::{CompiledPolicy, Diagnostic, Severity};

/// The direction of a change of access, in the order of importance to a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChangeDirection {
    /// Some call may get a better answer, and no call is known to get a worse one.
    Wider,
    /// Some calls may get better and others worse answers, or the direction is not known.
    Changed,
    /// No call gets a better answer.
    Narrower,
}

impl ChangeDirection {
    /// Every direction, in order.
    pub const ALL: &'static [ChangeDirection] = &[ChangeDirection::Wider, ChangeDirection::Changed, ChangeDirection::Narrower];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ChangeDirection::Wider => "wider",
            ChangeDirection::Changed => "changed",
            ChangeDirection::Narrower => "narrower",
        }
    }
}

/// The best and the worst effect that calls can get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EffectRange {
    /// No call gets a better answer.
    pub best: Effect,
    /// No call gets a worse effect from the policy. A token may still grant less.
    pub worst: Effect,
}

impl EffectRange {
    /// Nothing is ever permitted.
    pub const DENY: Self = Self { best: Effect::Deny, worst: Effect::Deny };

    /// The range when both layers take part in the decision.
    pub(super) fn intersect(self, other: Self) -> Self {
        Self { best: self.best.min(other.best), worst: self.worst.min(other.worst) }
    }

    /// The range when either layer may take part in the decision.
    pub(super) fn union(self, other: Self) -> Self {
        Self { best: self.best.max(other.best), worst: self.worst.min(other.worst) }
    }
}

/// `PERMIT`, or `PERMIT?` if the answer depends on arguments, conditions or the user.
impl fmt::Display for EffectRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.best == self.worst { "" } else { "?" };
        write!(f, "{}{suffix}", self.best.as_str())
    }
}

/// The change of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentChange {
    /// `added`, `changed` or `removed`.
    pub change: &'static str,
    /// The kind and the id.
    pub key: DocumentKey,
}

/// The change of one agent's access to one tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentToolChange {
    /// SPIFFE ID.
    pub agent: AgentId,
    /// `server/tool`.
    pub tool: Arc<str>,
    /// The effects before the change.
    pub before: EffectRange,
    /// The effects after the change.
    pub after: EffectRange,
    /// The direction of the change.
    pub direction: ChangeDirection,
}

/// The changed pairs of agent and tool: widening ones first, then by agent and tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentToolChanges {
    /// The pairs, as many as the caller asked for.
    pub listed: Vec<AgentToolChange>,
    /// The number of all changed pairs.
    pub total: u64,
}

/// Compares documents by their content; files and positions do not count. Tests are ignored.
pub fn compare_documents(before: &[Document], after: &[Document]) -> Vec<DocumentChange> {
    let keyed = |documents: &'_ [Document]| -> BTreeMap<DocumentKey, usize> {
        let kept = documents.iter().enumerate().filter(|(_, document)| !matches!(document.body, DocumentBody::Test(_)));
        kept.map(|(index, document)| (document.key.clone(), index)).collect()
    };
    let (old, new) = (keyed(before), keyed(after));
    let keys: BTreeSet<&DocumentKey> = old.keys().chain(new.keys()).collect();
    let mut changes: Vec<DocumentChange> = keys
        .into_iter()
        .filter_map(|key| {
            let was = old.get(key).and_then(|index| before.get(*index));
            let is = new.get(key).and_then(|index| after.get(*index));
            let change = match (was, is) {
                (None, _) => "added",
                (_, None) => "removed",
                (Some(was), Some(is)) if was != is => "changed",
                _ => return None,
            };
            Some(DocumentChange { change, key: key.clone() })
        })
        .collect();
    changes.sort_by(|a, b| (a.change != "removed", &a.key).cmp(&(b.change != "removed", &b.key)));
    changes
}

/// Compares the access of agents and lists at most `pairs_max` pairs.
pub fn compare_access(before: &CompiledPolicy, after: &CompiledPolicy, pairs_max: usize) -> AgentToolChanges {
    let cohorts = before.compare_access(after);
    let mut pairs = AgentToolChanges::default();
    for cohort in &cohorts {
        pairs.total += cohort.agents.len() as u64 * cohort.tools.len() as u64;
    }
    for direction in ChangeDirection::ALL {
        let mut agents: Vec<(&AgentId, usize)> = Vec::new();
        for (index, cohort) in cohorts.iter().enumerate() {
            if cohort.tools.iter().any(|tool| tool.direction == *direction) {
                agents.extend(cohort.agents.iter().map(|agent| (agent, index)));
            }
        }
        agents.sort_unstable();
        for (agent, index) in agents {
            let tools = cohorts.get(index).map(|cohort| cohort.tools.as_slice()).unwrap_or_default();
            for tool in tools.iter().filter(|tool| tool.direction == *direction) {
                if pairs.listed.len() >= pairs_max {
                    return pairs;
                }
                let (agent, name) = (agent.clone(), tool.tool.clone());
                let (before, after) = (tool.before, tool.after);
                pairs.listed.push(AgentToolChange { agent, tool: name, before, after, direction: *direction });
            }
        }
    }
    pairs
}

/// The documents that lose `two_person` in a change. Such a change needs two operators; otherwise one operator could remove the
/// rule and then reinstate alone.
pub fn weakened_documents<'a>(before: &'a [Document], after: impl IntoIterator<Item = &'a Document>) -> Vec<&'a DocumentKey> {
    let two: BTreeSet<&DocumentKey> =
        after.into_iter().filter(|document| document.two_person).map(|document| &document.key).collect();
    let asked = before.iter().filter(|document| document.two_person && !document.is_shadow());
    asked.map(|document| &document.key).filter(|key| !two.contains(key)).collect()
}

/// Warnings about changes that no pair shows: issuers, keys of agents, operators, and the two-person rule.
pub fn other_change_warnings(before: &[Document], after: &[Document]) -> Vec<Diagnostic> {
    let changes = compare_documents(before, after);
    let find = |all: &'_ [Document], key: &DocumentKey| all.iter().position(|document| document.key == *key);
    let two = |all: &[Document], key: &DocumentKey| {
        find(all, key).and_then(|index| all.get(index)).is_some_and(|document| document.two_person && !document.is_shadow())
    };
    let two_person_changes = changes.iter().filter_map(|change| {
        let (kind, id) = (&change.key.kind, &change.key.id);
        match (two(before, &change.key), two(after, &change.key)) {
            (true, false) => {
                Some(format!("{kind} `{id}`: two people are no longer needed to reinstate it; this change needs two"))
            }
            (false, true) => Some(format!("{kind} `{id}`: from now on two people are needed to reinstate it")),
            _ => None,
        }
    });
    let two_person_changes: Vec<String> = two_person_changes.collect();
    let says = |change: &DocumentChange| {
        let (kind, id) = (change.key.kind.as_str(), &change.key.id);
        match (kind, change.change) {
            ("issuer", how) => Some(format!("issuer `{id}` is {how}: whose chains are believed changes, which no pair shows")),
            ("operator", how) => Some(format!("operator `{id}` is {how}: who administers or approves changes")),
            ("agent", "changed") => {
                let keys =
                    |all: &[Document]| match find(all, &change.key).and_then(|index| all.get(index)).map(|found| &found.body) {
                        Some(DocumentBody::Agent(agent)) => agent.keys.iter().cloned().collect::<BTreeSet<_>>(),
                        _ => BTreeSet::new(),
                    };
                (keys(before) != keys(after)).then(|| format!("agent `{id}`: its keys change, which no pair shows"))
            }
            _ if kind.ends_with(super::document::SHADOW_KIND_SUFFIX) => {
                Some(format!("{kind} `{id}` is {}: in shadow it decides nothing", change.change))
            }
            _ => None,
        }
    };
    changes
        .iter()
        .filter_map(says)
        .chain(two_person_changes)
        .map(|message| Diagnostic::for_folder(Severity::Warning, message))
        .collect()
}
