//! The tool registry of a policy, and the patterns that match its tools.
//!
//! Tools are numbered in the order of their names, so the literal start of a pattern selects a range of numbers. Patterns are
//! resolved when a policy is compiled, never during a request. This file does not know the decision layers. Look next at
//! `compile/permission_set.rs`.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::ids::ToolName;

use super::bit_set::BitSet;
use super::document::{Document, DocumentBody, ProofClass, ToolRisk, ToolSpec};

/// A registered tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// `server/tool`.
    pub name: ToolName,
    /// The risk of a call.
    pub risk: ToolRisk,
    /// When a call needs a proof of possession.
    pub proof: ProofClass,
    /// SHA-256 of the schema that the caller must have used; `None` if the registry pins none.
    pub schema_sha256: Option<[u8; 32]>,
    /// The kind of the document that registers the tool: `tool` or `server`.
    pub document_kind: &'static str,
    /// The id of that document.
    pub document_id: Arc<str>,
}

impl Tool {
    /// Whether a call may make changes that cannot be undone.
    pub fn is_destructive(&self) -> bool {
        self.risk == ToolRisk::Destructive
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
pub(super) enum MatchedTools {
    /// Exactly one tool, named without a wildcard.
    One(u32),
    /// Any number of tools.
    Many(Arc<BitSet>),
}

impl MatchedTools {
    /// Whether the pattern matches no tool.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, MatchedTools::Many(tools) if tools.is_empty())
    }

    /// Adds the matched tools to a set.
    pub(super) fn add_to(&self, set: &mut BitSet) {
        match self {
            MatchedTools::One(number) => set.insert(*number),
            MatchedTools::Many(tools) => set.union_with(tools),
        }
    }

    /// Whether a set contains some matched tool.
    pub(super) fn intersects(&self, set: &BitSet) -> bool {
        match self {
            MatchedTools::One(number) => set.contains(*number),
            MatchedTools::Many(tools) => tools.intersects(set),
        }
    }

    /// Whether `wider` contains every matched tool.
    pub(super) fn is_covered_by(&self, wider: &MatchedTools) -> bool {
        match (self, wider) {
            (MatchedTools::One(a), MatchedTools::One(b)) => a == b,
            (_, MatchedTools::Many(tools)) => self.is_subset_of(tools),
            (MatchedTools::Many(tools), MatchedTools::One(number)) => tools.is_subset_of_one(*number),
        }
    }

    /// Whether a set contains every matched tool.
    pub(super) fn is_subset_of(&self, set: &BitSet) -> bool {
        match self {
            MatchedTools::One(number) => set.contains(*number),
            MatchedTools::Many(tools) => tools.is_subset(set),
        }
    }
}

impl ToolTable {
    /// The tools of all documents. If two documents register one name, the first counts; validation reports that as an error.
    pub(super) fn new<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Self {
        let mut tools = Vec::new();
        for document in documents {
            match &document.body {
                DocumentBody::Tool(spec) => tools.push(build_tool(&document.key.id, spec, "tool", document)),
                DocumentBody::Server(server) => {
                    tools.extend(
                        server
                            .tools
                            .iter()
                            .map(|(name, spec)| build_tool(&format!("{}/{name}", server.id), spec, "server", document)),
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
    pub(super) fn match_pattern(&self, pattern: &str) -> MatchedTools {
        if pattern == "*" {
            return MatchedTools::Many(Arc::new(BitSet::full(self.len())));
        }
        let Some((beginning, _)) = pattern.split_once('*') else {
            return self
                .number(pattern)
                .map_or_else(|| MatchedTools::Many(Arc::new(BitSet::empty(self.len()))), MatchedTools::One);
        };
        let mut set = BitSet::empty(self.len());
        let first = self.tools.partition_point(|tool| tool.name.as_str() < beginning);
        for (tool, number) in self.tools.iter().zip(0..).skip(first) {
            if !tool.name.as_str().starts_with(beginning) {
                break;
            }
            if matches_pattern(pattern, tool.name.as_str()) {
                set.insert(number);
            }
        }
        MatchedTools::Many(Arc::new(set))
    }
}

/// A cache of resolved patterns. A pattern that many agents share, such as `crm/*`, is resolved once.
#[derive(Debug, Default)]
pub(super) struct PatternCache {
    resolved: HashMap<Arc<str>, MatchedTools>,
}

impl PatternCache {
    /// The tools that a pattern matches. All calls must pass the same table, because the cache does not distinguish tables.
    pub(super) fn resolve(&mut self, pattern: &Arc<str>, tools: &ToolTable) -> MatchedTools {
        if let Some(known) = self.resolved.get(pattern) {
            return known.clone();
        }
        let matching = tools.match_pattern(pattern);
        self.resolved.insert(pattern.clone(), matching.clone());
        matching
    }
}

fn build_tool(name: &str, spec: &ToolSpec, kind: &'static str, document: &Document) -> Tool {
    Tool {
        name: ToolName::new(name),
        risk: spec.risk,
        proof: spec.proof.unwrap_or_else(|| spec.risk.default_proof()),
        schema_sha256: spec.schema_sha256,
        document_kind: kind,
        document_id: document.key.id.as_str().into(),
    }
}

/// Whether a pattern matches a name. `*` stands for any characters except a slash, so both must have the same number of slashes.
fn matches_pattern(pattern: &str, name: &str) -> bool {
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
        let check =
            |pattern: &str, name: &str, expected: bool| assert_eq!(matches_pattern(pattern, name), expected, "{pattern} {name}");
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
