//! Validates a policy as a whole: unknown names, security holes, contradictions and entries without effect.
//!
//! Each document is already well formed by itself. An error means that the policy would not mean what its author wrote; a warning
//! means that it probably does not. Validation changes nothing. Look next at `validate/entries.rs`, then at
//! [`compile`](super::compile), which validates before it compiles.

use std::collections::{HashMap, HashSet};

use crate::model::constraint::abridged;
use crate::model::ids::{AgentId, Thumbprint};
use crate::model::limits::ROOT_LIFETIME_S_BOUND;
use crate::model::reason::Reason;

use super::diagnostic::{Diagnostic, Severity, arranged, suggestion};
use super::document::{
    AgentSpec, Body, Document, GuardrailSpec, IssuerSpec, Names, OperatorSpec, Role, TestSpec, in_force, would_be,
};
use super::tools::{Patterns, ToolTable};

mod ceilings;
mod chains;
mod circles;
mod entries;
mod reach;

use entries::check_entries;

/// Returns all mistakes of the documents together, sorted by position. An error among them refuses the policy.
///
/// Documents without effect are reported only for a policy without errors, because a typo makes many documents look unreachable.
/// Only documents in force are checked for that.
pub fn check(documents: &[Document]) -> Vec<Diagnostic> {
    let (tools, mut patterns) = (ToolTable::new(documents), Patterns::default());
    let mut out = check_with(documents, &tools, &mut patterns);
    if !out.iter().any(Diagnostic::is_error) {
        reach::lint_sets(documents, &mut out);
        let documents = in_force(documents);
        reach::lint(&documents, &mut out);
        let reaches = ceilings::lint(&documents, &tools, &mut patterns, &mut out);
        chains::lint(&documents, &reaches, &mut out);
    }
    arranged(out)
}

/// As [`check`], with a tool table and a pattern cache that the caller uses again.
pub(super) fn check_with(documents: &[Document], tools: &ToolTable, patterns: &mut Patterns) -> Vec<Diagnostic> {
    let index = Index::new(&in_force(documents), tools);
    // A shadow document is checked against the policy that would be in force with it.
    let would_be = would_be(documents).map(|documents| Index::new(&documents, tools));
    let mut out = Vec::new();
    check_unique(documents, &mut out);
    check_keys(documents, &mut out);
    check_cycles(&index, &mut out);
    if let Some(would_be) = &would_be {
        check_cycles(would_be, &mut out);
    }
    for document in documents {
        let known = would_be.as_ref().filter(|_| document.is_shadow()).unwrap_or(&index);
        check_document(document, known, patterns, &mut out);
    }
    arranged(out)
}

/// As [`check_with`], for documents without agents and without shadow documents.
pub(super) fn check_base(documents: &[&Document], tools: &ToolTable, patterns: &mut Patterns) -> Vec<Diagnostic> {
    let index = Index::new(documents, tools);
    let mut out = Vec::new();
    check_unique(documents.iter().copied(), &mut out);
    check_keys(documents.iter().copied(), &mut out);
    check_cycles(&index, &mut out);
    documents.iter().for_each(|document| check_document(document, &index, patterns, &mut out));
    arranged(out)
}

/// Looks up names, either in the documents of a folder, or in a compiled policy when a few agents change.
pub(super) trait Known {
    /// The tool registry.
    fn tools(&self) -> &ToolTable;
    /// Whether a document exists.
    fn has(&self, kind: &str, id: &str) -> bool;
    /// All ids of a kind, for a suggestion.
    fn ids(&self, kind: &str) -> Vec<&str>;
    /// Whether any operator is in a group.
    fn has_operators(&self, group: &str) -> bool;
}

/// Checks one document against the known names.
pub(super) fn check_document(document: &Document, known: &dyn Known, patterns: &mut Patterns, out: &mut Vec<Diagnostic>) {
    let mut checker = Checker { document, known, out };
    match &document.body {
        Body::Issuer(issuer) => checker.issuer(issuer),
        Body::Agent(agent) => checker.agent(agent),
        Body::Operator(operator) => checker.operator(operator),
        Body::Guardrail(guardrail) => checker.guardrail(guardrail, patterns),
        Body::Test(test) => checker.test(test),
        _ => {}
    }
    if let Some(permissions) = document.permissions() {
        checker.all_known("permission_set", "include", permissions.include.iter().map(|set| &**set));
        check_entries(&mut checker, permissions, patterns);
    }
}

/// Documents by kind and id.
struct Index<'a> {
    tools: &'a ToolTable,
    by_kind: HashMap<&'a str, HashMap<&'a str, &'a Document>>,
    operator_groups: HashSet<&'a str>,
}

impl<'a> Index<'a> {
    fn new(documents: &[&'a Document], tools: &'a ToolTable) -> Self {
        let mut by_kind: HashMap<&str, HashMap<&str, &Document>> = HashMap::new();
        let mut operator_groups = HashSet::new();
        for document in documents {
            by_kind.entry(document.body.kind()).or_default().entry(&document.key.id).or_insert(document);
            if let Body::Operator(operator) = &document.body {
                operator_groups.extend(operator.groups.iter().map(|group| group.as_str()));
            }
        }
        Self { tools, by_kind, operator_groups }
    }
}

impl Known for Index<'_> {
    fn tools(&self) -> &ToolTable {
        self.tools
    }

    fn has(&self, kind: &str, id: &str) -> bool {
        self.by_kind.get(kind).is_some_and(|ids| ids.contains_key(id))
    }

    fn ids(&self, kind: &str) -> Vec<&str> {
        self.by_kind.get(kind).map(|ids| ids.keys().copied().collect()).unwrap_or_default()
    }

    fn has_operators(&self, group: &str) -> bool {
        self.operator_groups.contains(group)
    }
}

/// Checks one document and reports its mistakes at their positions.
struct Checker<'a> {
    document: &'a Document,
    known: &'a dyn Known,
    out: &'a mut Vec<Diagnostic>,
}

impl Checker<'_> {
    fn issuer(&mut self, issuer: &IssuerSpec) {
        if issuer.lifetime_max_s > ROOT_LIFETIME_S_BOUND {
            let message = "`lifetime_max` above `24h` counts as `24h`: no root lives longer".to_owned();
            self.warn("lifetime_max", 0, message);
        }
        self.names_known("group", "groups", &issuer.groups, |group| group.as_str());
        self.names_known("application", "applications", &issuer.applications, |application| application.as_str());
    }

    fn agent(&mut self, agent: &AgentSpec) {
        self.names_known("application", "applications", &agent.applications, |application| application.as_str());
        self.names_known("group", "acts_for", &agent.acts_for, |group| group.as_str());
        self.all_known("agent", "delegates_to", agent.delegates_to.iter().map(AgentId::as_str));
        if agent.session_hops_max == Some(0) && !agent.delegates_to.is_empty() {
            self.warn("delegates_to", 0, "`delegates_to` has no effect: `hops_max` is 0".to_owned());
        }
    }

    fn operator(&mut self, operator: &OperatorSpec) {
        self.all_known("issuer", "users", operator.users.iter().map(|user| user.issuer.as_str()));
        if operator.roles.contains(&Role::Approve) && operator.users.is_empty() {
            let message = "an operator who approves has no `users`: their own calls cannot be told from others'".to_owned();
            self.warn("id", 0, message);
        }
    }

    fn guardrail(&mut self, guardrail: &GuardrailSpec, patterns: &mut Patterns) {
        for (index, pattern) in guardrail.tools.iter().enumerate() {
            if &**pattern == "*" || !patterns.resolve(pattern, self.known.tools()).is_empty() {
                continue;
            }
            if pattern.contains('*') {
                let message = format!("pattern `{}` matches no registered tool", abridged(pattern));
                self.error("tools", index, message, Some("a guardrail that guards nothing is a hole".to_owned()));
            } else {
                self.unknown_tool("tools", index, pattern);
            }
        }
    }

    fn test(&mut self, test: &TestSpec) {
        self.all_known("agent", "agents", test.agents.iter().map(AgentId::as_str));
        self.all_known("issuer", "user", std::iter::once(test.user.issuer.as_str()));
        for (index, expectation) in test.expect.iter().enumerate() {
            let wants_unknown = expectation.reason == Some(Reason::ToolUnknown);
            if !wants_unknown && self.known.tools().number(&expectation.tool).is_none() {
                self.unknown_tool("expect", index, &expectation.tool);
            }
        }
    }

    fn unknown_tool(&mut self, field: &'static str, index: usize, name: &str) {
        let help = suggestion(name, self.known.tools().iter().map(|tool| tool.name.as_str()));
        self.error(field, index, format!("unknown tool `{}`", abridged(name)), help);
    }

    fn names_known<T>(&mut self, kind: &str, field: &'static str, names: &Names<T>, as_text: fn(&T) -> &str) {
        if let Names::Some(names) = names {
            self.all_known(kind, field, names.iter().map(as_text));
        }
    }

    /// Reports every id without a document.
    fn all_known<'n>(&mut self, kind: &str, field: &'static str, ids: impl Iterator<Item = &'n str>) {
        for (index, id) in ids.enumerate() {
            if !self.known.has(kind, id) {
                let help = suggestion(id, self.known.ids(kind));
                let message = format!("unknown {} `{}`", kind.replace('_', " "), abridged(id));
                self.out.push(self.document.diagnostic(Severity::Error, field, index, message).with_help(help));
            }
        }
    }

    fn error(&mut self, field: &'static str, index: usize, message: String, help: Option<String>) {
        self.out.push(self.document.diagnostic(Severity::Error, field, index, message).with_help(help));
    }

    fn warn(&mut self, field: &'static str, index: usize, message: String) {
        self.out.push(self.document.diagnostic(Severity::Warning, field, index, message));
    }
}

/// Each kind and id may have one document, and each tool one registration.
fn check_unique<'a>(documents: impl IntoIterator<Item = &'a Document>, out: &mut Vec<Diagnostic>) {
    let mut seen: HashMap<(&str, &str), &Document> = HashMap::new();
    let mut tools: HashMap<String, &Document> = HashMap::new();
    for document in documents {
        if let Some(first) = seen.get(&(document.key.kind.as_str(), document.key.id.as_str())) {
            let kind = document.key.kind.replace('_', " ");
            let message = format!("{kind} `{}` is defined twice: first {}", abridged(&document.key.id), place(first));
            out.push(document.diagnostic(Severity::Error, "id", 0, message));
            continue;
        }
        seen.insert((&document.key.kind, &document.key.id), document);
        let names: Vec<(&'static str, usize, String)> = match &document.body {
            Body::Tool(_) => vec![("id", 0, document.key.id.clone())],
            Body::Server(server) => {
                server.tools.keys().enumerate().map(|(index, name)| ("tools", index, format!("{}/{name}", server.id))).collect()
            }
            _ => continue,
        };
        for (field, index, name) in names {
            if let Some(first) = tools.get(&name) {
                let message = format!("tool `{}` is defined twice: first {}", abridged(&name), place(first));
                out.push(document.diagnostic(Severity::Error, field, index, message));
            } else {
                tools.insert(name, document);
            }
        }
    }
}

/// A key must belong to one agent, or to one operator, because a two-person act needs two keys. An operator's key must not belong
/// to an agent or issuer. Otherwise the holder could approve a call that it signed itself.
fn check_keys<'a>(documents: impl IntoIterator<Item = &'a Document>, out: &mut Vec<Diagnostic>) {
    let documents: Vec<&Document> = documents.into_iter().filter(|document| !document.is_shadow()).collect();
    let mut holders: HashMap<(&str, &Thumbprint), &Document> = HashMap::new();
    let mut others: HashMap<&Thumbprint, &Document> = HashMap::new();
    for document in documents.iter().copied() {
        match &document.body {
            Body::Agent(agent) => others.extend(agent.keys.iter().map(|key| (key, document))),
            Body::Issuer(issuer) => others.extend(issuer.keys.iter().map(|named| (named.key.thumbprint(), document))),
            _ => {}
        }
    }
    for document in documents {
        let keys: Vec<&Thumbprint> = match &document.body {
            Body::Agent(agent) => agent.keys.iter().collect(),
            Body::Operator(operator) => operator.keys.iter().map(|key| key.thumbprint()).collect(),
            _ => continue,
        };
        for (index, key) in keys.into_iter().enumerate() {
            if let (Body::Operator(_), Some(other)) = (&document.body, others.get(key)) {
                let (kind, id) = (&other.key.kind, abridged(&other.key.id));
                let message = format!("key `{key}` is also one of {kind} `{id}` {}", place(other));
                let help = Some("make a key for the operator alone: `portcullis token keygen`".to_owned());
                out.push(document.diagnostic(Severity::Error, "keys", index, message).with_help(help));
            }
            match holders.get(&(document.key.kind.as_str(), key)) {
                None => {
                    holders.insert((&document.key.kind, key), document);
                }
                Some(first) => {
                    let message = format!("key `{key}` is listed twice: first by `{}` {}", abridged(&first.key.id), place(first));
                    out.push(document.diagnostic(Severity::Error, "keys", index, message));
                }
            }
        }
    }
}

/// Reports permission sets that include themselves, directly or through others.
fn check_cycles(index: &Index<'_>, out: &mut Vec<Diagnostic>) {
    let mut sets: Vec<&Document> = index.by_kind.get("permission_set").into_iter().flat_map(HashMap::values).copied().collect();
    sets.sort_unstable_by_key(|set| &set.key.id);
    let number = |id: &str| sets.binary_search_by_key(&id, |set| &set.key.id).ok();
    let included = |set: &Document| set.permissions().map(|permissions| permissions.include.clone()).unwrap_or_default();
    let edges = sets.iter().map(|set| included(set).iter().map(|id| number(id)).collect());
    for circle in circles::find(&edges.collect::<Vec<_>>()) {
        let named: Vec<String> =
            circle.named(16).filter_map(|set| sets.get(set)).map(|set| format!("`{}`", abridged(&set.key.id))).collect();
        if let Some(document) = sets.get(circle.at) {
            let message = format!("permission sets include each other: {}", named.join(" includes "));
            out.push(document.diagnostic(Severity::Error, "include", circle.edge, message));
        }
    }
}

fn place(document: &Document) -> String {
    if document.path.is_empty() { "in the store".to_owned() } else { format!("in {}:{}", document.path, document.line) }
}
