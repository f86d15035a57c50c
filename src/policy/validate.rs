//! Validates a policy as a whole: unknown names, security holes, contradictions and entries without effect.
//!
//! Each document is already well formed by itself. An error means that the policy would not mean what its author wrote; a warning
//! means that it probably does not. Validation changes nothing. Look next at `validate/entries.rs`, then at
//! [`compile`](super::compile), which validates before it compiles.

use std::collections::{HashMap, HashSet};

use crate::model::constraint::abbreviate;
use crate::model::ids::{AgentId, Thumbprint};
use crate::model::limits::ROOT_LIFETIME_S_HARD_MAX;
use crate::model::reason::Reason;

use super::diagnostic::{Diagnostic, Severity, sort_and_limit, suggest_name};
use super::document::{
    AgentSpec, Document, DocumentBody, GuardrailSpec, IssuerSpec, NameSelection, OperatorRole, OperatorSpec, TestSpec,
    documents_with_shadows_enforced, enforced_documents,
};
use super::tools::{PatternCache, ToolTable};

mod ceilings;
mod cycles;
mod delegations;
mod entries;
mod reachability;

use entries::check_entries;

/// Returns all mistakes of the documents together, sorted by position. An error among them refuses the policy.
///
/// Documents without effect are reported only for a policy without errors, because a typo makes many documents look unreachable.
/// Only documents in force are checked for that.
pub fn check_policy(documents: &[Document]) -> Vec<Diagnostic> {
    check_policy_with_existing(documents, &[])
}

/// As [`check_policy`], for documents that are in force beside others: the operators of those others may approve too.
pub fn check_policy_with_existing(documents: &[Document], existing: &[Document]) -> Vec<Diagnostic> {
    let (tools, mut patterns) = (ToolTable::new(documents), PatternCache::default());
    let mut out = check_all(documents, existing, &tools, &mut patterns);
    if !out.iter().any(Diagnostic::is_error) {
        reachability::lint_unused_sets(documents, &mut out);
        let documents = enforced_documents(documents);
        reachability::lint_reachability(&documents, &mut out);
        let reaches = ceilings::lint_ceilings(&documents, &tools, &mut patterns, &mut out);
        delegations::lint_delegations(&documents, &reaches, &mut out);
    }
    sort_and_limit(out)
}

/// As [`check_policy`], with a tool table and a pattern cache that the caller uses again.
pub(super) fn check_documents(documents: &[Document], tools: &ToolTable, patterns: &mut PatternCache) -> Vec<Diagnostic> {
    check_all(documents, &[], tools, patterns)
}

fn check_all(documents: &[Document], existing: &[Document], tools: &ToolTable, patterns: &mut PatternCache) -> Vec<Diagnostic> {
    let index = DocumentIndex::new(&enforced_documents(documents), tools).with_operator_groups_of(existing);
    // A shadow document is checked against the policy that would be in force with it.
    let would_be = documents_with_shadows_enforced(documents)
        .map(|documents| DocumentIndex::new(&documents, tools).with_operator_groups_of(existing));
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
    sort_and_limit(out)
}

/// As [`check_documents`], for documents without agents and without shadow documents.
pub(super) fn check_non_agent_documents(
    documents: &[&Document],
    tools: &ToolTable,
    patterns: &mut PatternCache,
) -> Vec<Diagnostic> {
    let index = DocumentIndex::new(documents, tools);
    let mut out = Vec::new();
    check_unique(documents.iter().copied(), &mut out);
    check_keys(documents.iter().copied(), &mut out);
    check_cycles(&index, &mut out);
    documents.iter().for_each(|document| check_document(document, &index, patterns, &mut out));
    sort_and_limit(out)
}

/// Looks up names, either in the documents of a folder, or in a compiled policy when a few agents change.
pub(super) trait NameLookup {
    /// The tool registry.
    fn tools(&self) -> &ToolTable;
    /// Whether a document exists.
    fn has_document(&self, kind: &str, id: &str) -> bool;
    /// All ids of a kind, for a suggestion.
    fn ids_of_kind(&self, kind: &str) -> Vec<&str>;
    /// Whether any operator is in a group.
    fn group_has_operators(&self, group: &str) -> bool;
}

/// Checks one document against the known names.
pub(super) fn check_document(
    document: &Document,
    known: &dyn NameLookup,
    patterns: &mut PatternCache,
    out: &mut Vec<Diagnostic>,
) {
    let mut checker = DocumentChecker { document, known, out };
    match &document.body {
        DocumentBody::Issuer(issuer) => checker.check_issuer(issuer),
        DocumentBody::Agent(agent) => checker.check_agent(agent),
        DocumentBody::Operator(operator) => checker.check_operator(operator),
        DocumentBody::Guardrail(guardrail) => checker.check_guardrail(guardrail, patterns),
        DocumentBody::Test(test) => checker.check_test(test),
        _ => {}
    }
    if let Some(permissions) = document.permissions() {
        checker.check_all_known("permission_set", "include", permissions.include.iter().map(|set| &**set));
        check_entries(&mut checker, permissions, patterns);
    }
}

/// Documents by kind and id.
struct DocumentIndex<'a> {
    tools: &'a ToolTable,
    by_kind: HashMap<&'a str, HashMap<&'a str, &'a Document>>,
    operator_groups: HashSet<&'a str>,
}

impl<'a> DocumentIndex<'a> {
    fn new(documents: &[&'a Document], tools: &'a ToolTable) -> Self {
        let mut by_kind: HashMap<&str, HashMap<&str, &Document>> = HashMap::new();
        let mut operator_groups = HashSet::new();
        for document in documents {
            by_kind.entry(document.body.kind()).or_default().entry(&document.key.id).or_insert(document);
            if let DocumentBody::Operator(operator) = &document.body {
                operator_groups.extend(operator.groups.iter().map(|group| group.as_str()));
            }
        }
        Self { tools, by_kind, operator_groups }
    }

    /// Adds the operator groups of documents that are in force but not checked here. An operator of this index takes precedence
    /// over one with the same id.
    fn with_operator_groups_of(mut self, documents: &'a [Document]) -> Self {
        for document in documents.iter().filter(|document| !document.is_shadow()) {
            if let DocumentBody::Operator(operator) = &document.body
                && !self.has_document("operator", &document.key.id)
            {
                self.operator_groups.extend(operator.groups.iter().map(|group| group.as_str()));
            }
        }
        self
    }
}

impl NameLookup for DocumentIndex<'_> {
    fn tools(&self) -> &ToolTable {
        self.tools
    }

    fn has_document(&self, kind: &str, id: &str) -> bool {
        self.by_kind.get(kind).is_some_and(|ids| ids.contains_key(id))
    }

    fn ids_of_kind(&self, kind: &str) -> Vec<&str> {
        self.by_kind.get(kind).map(|ids| ids.keys().copied().collect()).unwrap_or_default()
    }

    fn group_has_operators(&self, group: &str) -> bool {
        self.operator_groups.contains(group)
    }
}

/// Checks one document and reports its mistakes at their positions.
struct DocumentChecker<'a> {
    document: &'a Document,
    known: &'a dyn NameLookup,
    out: &'a mut Vec<Diagnostic>,
}

impl DocumentChecker<'_> {
    fn check_issuer(&mut self, issuer: &IssuerSpec) {
        if issuer.lifetime_max_s > ROOT_LIFETIME_S_HARD_MAX {
            let message = "`lifetime_max` above `24h` counts as `24h`: no root lives longer".to_owned();
            self.report_warning("lifetime_max", 0, message);
        }
        self.check_names_known("group", "groups", &issuer.groups, |group| group.as_str());
        self.check_names_known("application", "applications", &issuer.applications, |application| application.as_str());
    }

    fn check_agent(&mut self, agent: &AgentSpec) {
        self.check_names_known("application", "applications", &agent.applications, |application| application.as_str());
        self.check_names_known("group", "acts_for", &agent.acts_for, |group| group.as_str());
        self.check_all_known("agent", "delegates_to", agent.delegates_to.iter().map(AgentId::as_str));
        if agent.session_hops_max == Some(0) && !agent.delegates_to.is_empty() {
            self.report_warning("delegates_to", 0, "`delegates_to` has no effect: `hops_max` is 0".to_owned());
        }
    }

    fn check_operator(&mut self, operator: &OperatorSpec) {
        self.check_all_known("issuer", "users", operator.users.iter().map(|user| user.issuer.as_str()));
        if operator.roles.contains(&OperatorRole::Approve) && operator.users.is_empty() {
            let message = "an operator who approves has no `users`: their own calls cannot be told from others'".to_owned();
            self.report_warning("id", 0, message);
        }
    }

    fn check_guardrail(&mut self, guardrail: &GuardrailSpec, patterns: &mut PatternCache) {
        for (index, pattern) in guardrail.tools.iter().enumerate() {
            if &**pattern == "*" || !patterns.resolve(pattern, self.known.tools()).is_empty() {
                continue;
            }
            if pattern.contains('*') {
                let message = format!("pattern `{}` matches no registered tool", abbreviate(pattern));
                self.report_error("tools", index, message, Some("a guardrail that guards nothing is a hole".to_owned()));
            } else {
                self.report_unknown_tool("tools", index, pattern);
            }
        }
    }

    fn check_test(&mut self, test: &TestSpec) {
        self.check_all_known("agent", "agents", test.agents.iter().map(AgentId::as_str));
        self.check_all_known("issuer", "user", std::iter::once(test.user.issuer.as_str()));
        for (index, expectation) in test.expect.iter().enumerate() {
            let wants_unknown = expectation.reason == Some(Reason::ToolUnknown);
            if !wants_unknown && self.known.tools().number(&expectation.tool).is_none() {
                self.report_unknown_tool("expect", index, &expectation.tool);
            }
        }
    }

    fn report_unknown_tool(&mut self, field: &'static str, index: usize, name: &str) {
        let help = suggest_name(name, self.known.tools().iter().map(|tool| tool.name.as_str()));
        self.report_error(field, index, format!("unknown tool `{}`", abbreviate(name)), help);
    }

    fn check_names_known<T>(&mut self, kind: &str, field: &'static str, names: &NameSelection<T>, as_text: fn(&T) -> &str) {
        if let NameSelection::Listed(names) = names {
            self.check_all_known(kind, field, names.iter().map(as_text));
        }
    }

    /// Reports every id without a document.
    fn check_all_known<'n>(&mut self, kind: &str, field: &'static str, ids: impl Iterator<Item = &'n str>) {
        for (index, id) in ids.enumerate() {
            if !self.known.has_document(kind, id) {
                let help = suggest_name(id, self.known.ids_of_kind(kind)).or_else(|| self.document.stored_help());
                let message = format!("unknown {} `{}`", kind.replace('_', " "), abbreviate(id));
                self.out.push(self.document.field_diagnostic(Severity::Error, field, index, message).with_help(help));
            }
        }
    }

    fn report_error(&mut self, field: &'static str, index: usize, message: String, help: Option<String>) {
        self.out.push(self.document.field_diagnostic(Severity::Error, field, index, message).with_help(help));
    }

    fn report_warning(&mut self, field: &'static str, index: usize, message: String) {
        self.out.push(self.document.field_diagnostic(Severity::Warning, field, index, message));
    }
}

/// Each kind and id may have one document, and each tool one registration.
fn check_unique<'a>(documents: impl IntoIterator<Item = &'a Document>, out: &mut Vec<Diagnostic>) {
    let mut seen: HashMap<(&str, &str), &Document> = HashMap::new();
    let mut tools: HashMap<String, &Document> = HashMap::new();
    for document in documents {
        if let Some(first) = seen.get(&(document.key.kind.as_str(), document.key.id.as_str())) {
            let kind = document.key.kind.replace('_', " ");
            let message = format!("{kind} `{}` is defined twice: first {}", abbreviate(&document.key.id), location_text(first));
            out.push(document.field_diagnostic(Severity::Error, "id", 0, message));
            continue;
        }
        seen.insert((&document.key.kind, &document.key.id), document);
        let names: Vec<(&'static str, usize, String)> = match &document.body {
            DocumentBody::Tool(_) => vec![("id", 0, document.key.id.clone())],
            DocumentBody::Server(server) => {
                server.tools.keys().enumerate().map(|(index, name)| ("tools", index, format!("{}/{name}", server.id))).collect()
            }
            _ => continue,
        };
        for (field, index, name) in names {
            if let Some(first) = tools.get(&name) {
                let message = format!("tool `{}` is defined twice: first {}", abbreviate(&name), location_text(first));
                out.push(document.field_diagnostic(Severity::Error, field, index, message));
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
            DocumentBody::Agent(agent) => others.extend(agent.keys.iter().map(|key| (key, document))),
            DocumentBody::Issuer(issuer) => others.extend(issuer.keys.iter().map(|named| (named.key.thumbprint(), document))),
            _ => {}
        }
    }
    for document in documents {
        let keys: Vec<&Thumbprint> = match &document.body {
            DocumentBody::Agent(agent) => agent.keys.iter().collect(),
            DocumentBody::Operator(operator) => operator.keys.iter().map(|key| key.thumbprint()).collect(),
            _ => continue,
        };
        for (index, key) in keys.into_iter().enumerate() {
            if let (DocumentBody::Operator(_), Some(other)) = (&document.body, others.get(key)) {
                let (kind, id) = (&other.key.kind, abbreviate(&other.key.id));
                let message = format!("key `{key}` is also one of {kind} `{id}` {}", location_text(other));
                let help = Some("make a key for the operator alone: `portcullis token keygen`".to_owned());
                out.push(document.field_diagnostic(Severity::Error, "keys", index, message).with_help(help));
            }
            match holders.get(&(document.key.kind.as_str(), key)) {
                None => {
                    holders.insert((&document.key.kind, key), document);
                }
                Some(first) => {
                    let message =
                        format!("key `{key}` is listed twice: first by `{}` {}", abbreviate(&first.key.id), location_text(first));
                    out.push(document.field_diagnostic(Severity::Error, "keys", index, message));
                }
            }
        }
    }
}

/// Reports permission sets that include themselves, directly or through others.
fn check_cycles(index: &DocumentIndex<'_>, out: &mut Vec<Diagnostic>) {
    let mut sets: Vec<&Document> = index.by_kind.get("permission_set").into_iter().flat_map(HashMap::values).copied().collect();
    sets.sort_unstable_by_key(|set| &set.key.id);
    let number = |id: &str| sets.binary_search_by_key(&id, |set| &set.key.id).ok();
    let included = |set: &Document| set.permissions().map(|permissions| permissions.include.clone()).unwrap_or_default();
    let edges = sets.iter().map(|set| included(set).iter().map(|id| number(id)).collect());
    for cycle in cycles::find_cycles(&edges.collect::<Vec<_>>()) {
        let named: Vec<String> =
            cycle.first_nodes(16).filter_map(|set| sets.get(set)).map(|set| format!("`{}`", abbreviate(&set.key.id))).collect();
        if let Some(document) = sets.get(cycle.closing_node) {
            let message = format!("permission sets include each other: {}", named.join(" includes "));
            out.push(document.field_diagnostic(Severity::Error, "include", cycle.closing_edge, message));
        }
    }
}

fn location_text(document: &Document) -> String {
    if document.path.is_empty() { "in the store".to_owned() } else { format!("in {}:{}", document.path, document.line) }
}
