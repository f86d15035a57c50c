//! The tool registry of a policy, and the patterns that match its tools.
//!
//! Tools are numbered in the order of their names, so the literal start of a pattern selects a range of numbers. Patterns are
//! resolved when a policy is compiled, never during a request. This file knows no layer. Look next at `compile/set.rs`.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::ids::ToolName;

use super::bits::BitSet;
use super::document::{Body, Document, ProofClass, Risk, ToolSpec};

/// A registered tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// `server/tool`.
    pub name: ToolName,
    /// The risk of a call.
    pub risk: Risk,
    /// When a call needs a proof of possession.
    pub proof: ProofClass,
    /// SHA-256 of the schema that the caller must have used; `None` if the registry pins none.
    pub schema_sha256: Option<[u8; 32]>,
    /// The kind of the document that registers the tool: `tool` or `server`.
    pub kind: &'static str,
    /// The id of that document.
    pub document: Arc<str>,
}

impl Tool {
    /// Whether a call may make changes that cannot be undone.
    pub fn is_destructive(&self) -> bool {
        self.risk == Risk::Destructive
    }

    /// Whether each call needs its own proof of possession.
    pub fn needs_proof_per_call(&self) -> bool {
        self.proof == ProofClass::PerCall
    }

    /// Whether a call needs a proof of possession unless its handle was created with one.
    pub fn needs_proof_per_handle(&self) -> bool {
        self.proof == ProofClass::PerHandle
    }
}

/// All tools, sorted by name. The number of a tool is its index.
#[derive(Debug, Default)]
pub(super) struct ToolTable {
    tools: Vec<Tool>,
    numbers: HashMap<Arc<str>, u32>,
}

/// The tools that a pattern matches.
#[derive(Clone, Debug)]
pub(super) enum Matching {
    /// Exactly one tool, named without a wildcard.
    One(u32),
    /// Any number of tools.
    Many(Arc<BitSet>),
}

impl Matching {
    /// Whether the pattern matches no tool.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Matching::Many(tools) if tools.is_empty())
    }

    /// Adds the matched tools to a set.
    pub(super) fn unite_into(&self, set: &mut BitSet) {
        match self {
            Matching::One(number) => set.insert(*number),
            Matching::Many(tools) => set.unite(tools),
        }
    }

    /// Whether a set contains some matched tool.
    pub(super) fn meets(&self, set: &BitSet) -> bool {
        match self {
            Matching::One(number) => set.contains(*number),
            Matching::Many(tools) => tools.meets(set),
        }
    }

    /// Whether `wider` contains every matched tool.
    pub(super) fn is_covered_by(&self, wider: &Matching) -> bool {
        match (self, wider) {
            (Matching::One(a), Matching::One(b)) => a == b,
            (_, Matching::Many(tools)) => self.is_within(tools),
            (Matching::Many(tools), Matching::One(number)) => tools.is_within_one(*number),
        }
    }

    /// Whether a set contains every matched tool.
    pub(super) fn is_within(&self, set: &BitSet) -> bool {
        match self {
            Matching::One(number) => set.contains(*number),
            Matching::Many(tools) => tools.is_subset(set),
        }
    }
}

impl ToolTable {
    /// The tools of all documents. If two documents register one name, the first counts; validation reports that as an error.
    pub(super) fn new<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Self {
        let mut tools = Vec::new();
        for document in documents {
            match &document.body {
                Body::Tool(spec) => tools.push(tool(&document.key.id, spec, "tool", document)),
                Body::Server(server) => {
                    tools.extend(
                        server.tools.iter().map(|(name, spec)| tool(&format!("{}/{name}", server.id), spec, "server", document)),
                    );
                }
                _ => {}
            }
        }
        tools.sort_by(|a, b| a.name.cmp(&b.name));
        tools.dedup_by(|later, first| later.name == first.name);
        let numbers = tools.iter().zip(0..).map(|(tool, number)| (Arc::from(tool.name.as_str()), number)).collect();
        Self { tools, numbers }
    }

    /// The number of tools.
    pub(super) fn len(&self) -> usize {
        self.tools.len()
    }

    /// The number of a tool.
    pub(super) fn number(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    /// The tool with a number.
    pub(super) fn tool(&self, number: u32) -> Option<&Tool> {
        self.tools.get(number as usize)
    }

    /// Every tool, by name.
    pub(super) fn iter(&self) -> std::slice::Iter<'_, Tool> {
        self.tools.iter()
    }

    /// The tools that a pattern matches.
    pub(super) fn matching(&self, pattern: &str) -> Matching {
        if pattern == "*" {
            return Matching::Many(Arc::new(BitSet::full(self.len())));
        }
        let Some((beginning, _)) = pattern.split_once('*') else {
            return self.number(pattern).map_or_else(|| Matching::Many(Arc::new(BitSet::empty(self.len()))), Matching::One);
        };
        let mut set = BitSet::empty(self.len());
        let first = self.tools.partition_point(|tool| tool.name.as_str() < beginning);
        for (tool, number) in self.tools.iter().zip(0..).skip(first) {
            if !tool.name.as_str().starts_with(beginning) {
                break;
            }
            if matches(pattern, tool.name.as_str()) {
                set.insert(number);
            }
        }
        Matching::Many(Arc::new(set))
    }
}

/// A cache of resolved patterns. A pattern that many agents share, such as `crm/*`, is resolved once.
#[derive(Debug, Default)]
pub(super) struct Patterns {
    resolved: HashMap<Arc<str>, Matching>,
}

impl Patterns {
    /// The tools that a pattern matches. All calls must pass the same table, because the cache does not distinguish tables.
    pub(super) fn resolve(&mut self, pattern: &Arc<str>, tools: &ToolTable) -> Matching {
        if let Some(known) = self.resolved.get(pattern) {
            return known.clone();
        }
        let matching = tools.matching(pattern);
        self.resolved.insert(pattern.clone(), matching.clone());
        matching
    }
}

fn tool(name: &str, spec: &ToolSpec, kind: &'static str, document: &Document) -> Tool {
    Tool {
        name: ToolName::new(name),
        risk: spec.risk,
        proof: spec.proof.unwrap_or_else(|| spec.risk.default_proof()),
        schema_sha256: spec.schema_sha256,
        kind,
        document: document.key.id.as_str().into(),
    }
}

/// Whether a pattern matches a name. `*` stands for any characters except a slash, so both must have the same number of slashes.
fn matches(pattern: &str, name: &str) -> bool {
    let (mut patterns, mut names) = (pattern.split('/'), name.split('/'));
    loop {
        match (patterns.next(), names.next()) {
            (None, None) => return true,
            (Some(pattern), Some(name)) if matches_segment(pattern, name) => {}
            _ => return false,
        }
    }
}

/// Whether a pattern matches one segment. The literals between the stars are matched leftmost, which leaves the most text for the
/// next.
fn matches_segment(pattern: &str, name: &str) -> bool {
    let Some((beginning, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(mut left) = name.strip_prefix(beginning) else {
        return false;
    };
    let (middle, end) = rest.rsplit_once('*').map_or((None, rest), |(middle, end)| (Some(middle), end));
    for piece in middle.into_iter().flat_map(|middle| middle.split('*')) {
        match left.split_once(piece) {
            Some((_, after)) => left = after,
            None => return false,
        }
    }
    left.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let check = |pattern: &str, name: &str, expected: bool| assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        for (pattern, name) in [
            ("crm/*", "crm/leads.read"),
            ("crm/*", "crm/"),
            ("crm/*.read", "crm/leads.read"),
            ("*/read", "crm/read"),
            ("*/*", "a/b"),
            ("c*m/*a*b*", "cm/xaybz"),
            ("a/*b*b", "a/bb"),
            ("a/*ab*", "a/aab"),
            ("a/**", "a/x"),
            ("a/*/c", "a/b/c"),
            ("a/b", "a/b"),
            ("a/*x*x", "a/xyx"),
            ("a/*aa*a", "a/aaa"),
        ] {
            check(pattern, name, true);
        }
        for (pattern, name) in [
            ("crm/*", "crm/a/b"),
            ("crm/*", "crmx/a"),
            ("crm*", "crm/a"),
            ("*", "a/b"),
            ("crm/*.read", "crm/read"),
            ("a/*b*b", "a/b"),
            ("a/b", "a/bc"),
            ("a/*/c", "a/c"),
            ("A/*", "a/b"),
            ("a/*aa*a", "a/aa"),
            ("a/?", "a/b"),
        ] {
            check(pattern, name, false);
        }
    }
}
