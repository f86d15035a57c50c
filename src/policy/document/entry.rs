//! Entries of a permission list: a tool pattern, constraints on the arguments, and the approvers.
//!
//! This file expands the short forms of constraints to the constraint type of `model`. It does not match patterns with tools.
//! Look next at `compile/permission_set.rs`, which does.

use std::sync::Arc;

use crate::model::constraint::{Constraint, ConstraintMap, Error, abbreviate};
use crate::model::ids::GroupId;
use crate::model::json::{JsonObject, Value};

use super::super::condition::Condition;
use super::super::diagnostic::{SourcePosition, suggest_name};
use super::super::node::{MappingMember, NodeKind, SourceNode};
use super::PermissionLists;
use super::field_reader::{DocumentReader, MappingFields};
use super::stored_json::{arguments_to_json, format_duration, object_value, put, string_array, string_value};

/// The time from the request to the use of an approval, if the entry states none.
const APPROVAL_EXPIRES_IN_MS: u64 = 600_000;

/// The maximum length of a message about a condition. Cedar may list everything that it expected.
const MESSAGE_CHARS_MAX: usize = 300;

/// One entry of `allow`, `approve` or `deny`.
#[derive(Clone, Debug, PartialEq)]
pub struct PermissionEntry {
    /// The tools: a name, a pattern, or `*` for every tool.
    pub pattern: Arc<str>,
    /// The constraints on the arguments. Further arguments are allowed unless the entry states `only: true`.
    pub arguments: ConstraintMap,
    /// A further condition. It is evaluated only if the arguments match.
    pub when: Option<Condition>,
    /// The tool that must have been prepared: the call needs an unused approval of a call of that tool with equal arguments.
    pub prepared: Option<Arc<str>>,
    /// Whether `when` may read `context.env`, which only the gateway states.
    pub attested: bool,
    /// The approvers of an `approve` entry; `None` in the other lists.
    pub approval: Option<ApprovalRule>,
    text: Arc<str>,
}

/// All parts of an entry except its pattern. The default adds no restriction, so the entry always applies.
#[derive(Clone, Debug, PartialEq)]
pub struct EntryTerms {
    /// See [`PermissionEntry::arguments`].
    pub arguments: ConstraintMap,
    /// See [`PermissionEntry::when`].
    pub when: Option<Condition>,
    /// See [`PermissionEntry::prepared`].
    pub prepared: Option<Arc<str>>,
    /// See [`PermissionEntry::attested`].
    pub attested: bool,
    /// See [`PermissionEntry::approval`].
    pub approval: Option<ApprovalRule>,
}

impl Default for EntryTerms {
    fn default() -> Self {
        Self { arguments: ConstraintMap::unconstrained(), when: None, prepared: None, attested: false, approval: None }
    }
}

/// The approvers of a call, and the time in which the approval must be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalRule {
    /// The operator groups that may approve.
    pub by: Vec<GroupId>,
    /// The time from the request to the use of the approval.
    pub expires_in_ms: u64,
}

/// The list that an entry is in, ordered by precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::policy) enum ListKind {
    Deny,
    Approve,
    Allow,
}

impl ListKind {
    /// Every list, the one with the highest precedence first.
    pub(in crate::policy) const ALL: [ListKind; 3] = [ListKind::Deny, ListKind::Approve, ListKind::Allow];

    /// The key in documents.
    pub(in crate::policy) fn as_str(self) -> &'static str {
        match self {
            ListKind::Deny => "deny",
            ListKind::Approve => "approve",
            ListKind::Allow => "allow",
        }
    }
}

impl PermissionLists {
    /// The entries of one list.
    pub(in crate::policy) fn entries(&self, list: ListKind) -> &[PermissionEntry] {
        match list {
            ListKind::Deny => &self.deny,
            ListKind::Approve => &self.approve,
            ListKind::Allow => &self.allow,
        }
    }
}

impl PermissionEntry {
    /// Creates an entry.
    pub fn new(pattern: &str, terms: EntryTerms) -> Self {
        let EntryTerms { arguments, when, prepared, attested, approval } = terms;
        let mut entry = Self { pattern: pattern.into(), arguments, when, prepared, attested, approval, text: pattern.into() };
        if entry.has_terms() {
            entry.text = entry_to_json(&entry).to_jcs().into();
        }
        entry
    }

    /// Whether the entry has any part besides its pattern.
    pub(in crate::policy) fn has_terms(&self) -> bool {
        self.approval.is_some() || self.attested || !self.is_unconditional()
    }

    /// The text that identifies the entry to a reader: its pattern, or its canonical JSON if it has further parts. Equal entries
    /// have equal texts.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Whether the entry applies to every call of its tools and demands no preparation.
    pub fn is_unconditional(&self) -> bool {
        self.arguments.named.is_empty() && self.arguments.allows_unnamed && self.when.is_none() && self.prepared.is_none()
    }
}

/// An entry as JSON: its pattern, or a mapping if it has further parts.
pub(super) fn entry_to_json(entry: &PermissionEntry) -> Value {
    if !entry.has_terms() {
        return string_value(&entry.pattern);
    }
    let mut members = Vec::new();
    if !entry.arguments.named.is_empty() {
        put(&mut members, "args", arguments_to_json(&entry.arguments));
    }
    if !entry.arguments.allows_unnamed {
        put(&mut members, "only", Value::Bool(true));
    }
    if let Some(when) = &entry.when {
        put(&mut members, "when", string_value(when.text()));
    }
    if let Some(prepared) = &entry.prepared {
        put(&mut members, "prepared", string_value(prepared));
    }
    if entry.attested {
        put(&mut members, "evidence", string_value("attested"));
    }
    if let Some(approval) = &entry.approval {
        put(&mut members, "by", string_array(approval.by.iter().map(|group| group.as_str())));
        put(&mut members, "expires_in", Value::String(format_duration(approval.expires_in_ms)));
    }
    object_value(vec![(entry.pattern.to_string(), object_value(members))])
}

/// Reads `allow`, `approve`, `deny` and `include`.
pub(super) fn read_permissions(fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> PermissionLists {
    let mut list = |list: ListKind| match fields.take(list.as_str()) {
        Some(node) => read_entries(node, list, reader),
        None => Vec::new(),
    };
    let (allow, approve, deny) = (list(ListKind::Allow), list(ListKind::Approve), list(ListKind::Deny));
    let include = fields.take("include").map(|node| reader.read_strings(node, "include")).unwrap_or_default();
    PermissionLists { allow, approve, deny, include: include.into_iter().map(Arc::from).collect() }
}

fn read_entries(node: &SourceNode, list: ListKind, reader: &mut DocumentReader<'_>) -> Vec<PermissionEntry> {
    let NodeKind::Sequence(items) = &node.kind else {
        reader.report_wrong_type(node, &format!("`{}` must be a list of entries", list.as_str()));
        return Vec::new();
    };
    let mut entries = Vec::with_capacity(items.len());
    for item in items {
        let at = item.as_mapping().and_then(|members| members.first()).map_or(item.at, |member| member.at);
        if let Some(entry) = read_entry(item, list, reader) {
            reader.positions.insert(list.as_str(), entries.len(), at);
            entries.push(entry);
        }
    }
    entries
}

/// `PATTERN`, or `PATTERN: {args, only, by, expires_in}`.
fn read_entry(item: &SourceNode, list: ListKind, reader: &mut DocumentReader<'_>) -> Option<PermissionEntry> {
    let (pattern, at, value) = match &item.kind {
        NodeKind::Mapping(members) => match members.as_slice() {
            [MappingMember { name, at, value }] => (name.as_str(), *at, Some(value)),
            _ => {
                reader.report_error(item.at, "an entry is a tool pattern, or one pattern with a mapping: `crm/*: {args: {…}}`");
                return None;
            }
        },
        _ => (reader.read_text(item, "a tool pattern")?, item.at, None),
    };
    if let Some(problem) = pattern_error(pattern) {
        reader.report_error(at, format!("tool pattern `{}` {problem}", abbreviate(pattern)));
        return None;
    }
    let mut terms = EntryTerms::default();
    let is_valid = match value {
        Some(node) => {
            let before = reader.error_count();
            let mut fields = MappingFields::new(node, &format!("the entry `{}`", abbreviate(pattern)), reader)?;
            terms = read_terms(&mut fields, list, at, reader);
            fields.reject_unknown_fields(reader);
            reader.error_count() == before
        }
        None if list == ListKind::Approve => {
            reader.report_error(
                at,
                format!("the entry `{}` has no `by`: say which groups of operators approve", abbreviate(pattern)),
            );
            false
        }
        None => true,
    };
    is_valid.then(|| PermissionEntry::new(pattern, terms))
}

/// Reads all fields of an entry. Some fields have no meaning in a deny and are errors there.
fn read_terms(fields: &mut MappingFields<'_>, list: ListKind, at: SourcePosition, reader: &mut DocumentReader<'_>) -> EntryTerms {
    let arguments = read_arguments(fields, list, reader);
    let when = fields.take("when");
    let condition = when.and_then(|node| read_condition(node, "`when`", reader));
    let attested = match fields.take("evidence") {
        None => false,
        Some(node) if list == ListKind::Deny => {
            reader.report_error(node.at, "`evidence` means nothing in a deny: it may look at `context.env` as it is");
            false
        }
        Some(node) => reader.read_choice(node, "evidence", &["attested"], |name| name).is_some(),
    };
    if let Some(node) = when.filter(|_| list != ListKind::Deny && !attested)
        && condition.as_ref().is_some_and(Condition::reads_environment)
    {
        let message = "`context.env` is the gateway's word and this entry would permit by it";
        reader.report_error_with_help(node.at, message, Some("say `evidence: attested` if that is meant".to_owned()));
    }
    let prepared = match fields.take("prepared") {
        None => None,
        Some(node) if list == ListKind::Deny => {
            reader.report_error(node.at, "`prepared` means nothing in a deny");
            None
        }
        Some(node) => read_prepared(node, reader),
    };
    let approval = if list == ListKind::Approve { read_approval(fields, at, reader) } else { None };
    EntryTerms { arguments, when: condition, prepared, attested, approval }
}

/// Reads the tool that must have been prepared: one tool, by name.
fn read_prepared(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Option<Arc<str>> {
    let tool = reader.read_text(node, "`prepared`")?;
    let problem = match pattern_error(tool) {
        None if tool.contains('*') => "must name one tool, not a pattern",
        None => return Some(tool.into()),
        Some(problem) => problem,
    };
    reader.report_error(node.at, format!("`prepared`: `{}` {problem}", abbreviate(tool)));
    None
}

/// Reads a Cedar expression over `context`.
pub(super) fn read_condition(node: &SourceNode, what: &str, reader: &mut DocumentReader<'_>) -> Option<Condition> {
    let NodeKind::Scalar(scalar) = &node.kind else {
        reader.report_wrong_type(node, &format!("{what} must be a condition, a string"));
        return None;
    };
    // `true` and `false` are conditions too, with or without quotes.
    match Condition::parse(&scalar.text) {
        Ok(condition) => Some(condition),
        Err(problem) => {
            reader.report_error(node.at, format!("{what}: {}", problem.chars().take(MESSAGE_CHARS_MAX).collect::<String>()));
            None
        }
    }
}

/// Reads `args` and `only`.
fn read_arguments(fields: &mut MappingFields<'_>, list: ListKind, reader: &mut DocumentReader<'_>) -> ConstraintMap {
    let mut arguments = ConstraintMap::unconstrained();
    if let Some(node) = fields.take("args") {
        match &node.kind {
            NodeKind::Mapping(members) => {
                for member in members {
                    read_argument(member, list, &mut arguments, reader);
                }
            }
            _ => reader.report_wrong_type(node, "`args` must be a mapping of argument names"),
        }
    }
    if let Some(node) = fields.take("only") {
        if list == ListKind::Deny {
            reader.report_error(node.at, "`only` means nothing in a deny: it fires whatever else is there");
        } else {
            arguments.allows_unnamed = !reader.read_bool(node, "`only`").unwrap_or(true);
        }
    }
    arguments
}

/// Reads `NAME: scalar`, `NAME: [list]`, `NAME: {min, max}`, or the long form of a constraint.
fn read_argument(member: &MappingMember, list: ListKind, arguments: &mut ConstraintMap, reader: &mut DocumentReader<'_>) {
    let name = member.name.as_str();
    if name == "*" || name.is_empty() {
        reader.report_error(member.at, "an argument must be named; others pass unless the entry says `only: true`");
        return;
    }
    let Some(long) = expand_constraint(&member.value, reader) else {
        return;
    };
    let named = Value::Object(JsonObject::from_members([(name.to_owned(), long)]));
    match ConstraintMap::parse(&named) {
        Ok(parsed) => {
            if list == ListKind::Deny && member.value.member("optional").is_some() {
                reader.report_error(member.at, "`optional` means nothing in a deny: leaving the argument out is no escape");
            }
            arguments.named.extend(parsed.named);
        }
        Err(error @ Error::TooNested) => {
            reader.report_error(member.value.at, format!("argument `{}`: {error}", abbreviate(name)))
        }
        Err(Error::Malformed(problem)) => reader.report_error(member.value.at, problem),
    }
}

/// Returns the long form of a constraint that may be written in a short form.
fn expand_constraint(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Option<Value> {
    let constraint = |kind: &str, member: &str, value: Value| {
        let kind = ("constraint_type".to_owned(), Value::String(kind.to_owned()));
        Value::Object(JsonObject::from_members([kind, (member.to_owned(), value)]))
    };
    match &node.kind {
        NodeKind::Scalar(_) => Some(constraint("exact", "value", node.to_json())),
        NodeKind::Sequence(_) => Some(constraint("one_of", "values", node.to_json())),
        NodeKind::Mapping(_) if node.member("constraint_type").is_some() => Some(node.to_json()),
        NodeKind::Mapping(members) => {
            if let Some(unknown) = members.iter().find(|member| !matches!(member.name.as_str(), "min" | "max")) {
                let help = suggest_name(&unknown.name, ["min", "max", "constraint_type"]).unwrap_or_else(|| {
                    "write `min` and `max`, a value, a list, or a constraint with `constraint_type`".to_owned()
                });
                reader.report_error_with_help(unknown.at, format!("unknown key `{}`", abbreviate(&unknown.name)), Some(help));
                return None;
            }
            if members.is_empty() {
                reader.report_error(node.at, "a range needs `min` or `max`");
                return None;
            }
            let kind = ("constraint_type".to_owned(), Value::String("range".to_owned()));
            let bounds = members.iter().map(|member| (member.name.clone(), member.value.to_json()));
            Some(Value::Object(JsonObject::from_members(std::iter::once(kind).chain(bounds))))
        }
    }
}

/// Reads `by` and `expires_in` of an approve entry.
fn read_approval(fields: &mut MappingFields<'_>, at: SourcePosition, reader: &mut DocumentReader<'_>) -> Option<ApprovalRule> {
    let by: Vec<GroupId> = match fields.take("by") {
        Some(node) => reader.read_strings(node, "by").iter().map(|group| GroupId::from(group.as_str())).collect(),
        None => Vec::new(),
    };
    let expires_in_ms = fields
        .take("expires_in")
        .map_or(Some(APPROVAL_EXPIRES_IN_MS), |node| reader.read_duration_ms(node, "`expires_in`"))
        .unwrap_or(APPROVAL_EXPIRES_IN_MS);
    if by.is_empty() {
        reader.report_error(at, "the entry has no `by`: say which groups of operators approve");
    }
    if expires_in_ms == 0 {
        reader.report_error(at, "`expires_in` must be longer than nothing");
    }
    Some(ApprovalRule { by, expires_in_ms })
}

/// Returns the mistake in a pattern, as far as the pattern alone shows it; `None` if there is none.
pub(super) fn pattern_error(pattern: &str) -> Option<&'static str> {
    match pattern {
        "" => Some("is empty"),
        "*" => None,
        _ if pattern.len() > crate::model::limits::TOOL_NAME_BYTES_MAX => Some("is longer than 256 bytes"),
        _ if !pattern.bytes().all(|byte| byte.is_ascii_graphic()) => Some("has a space or a character outside visible ASCII"),
        _ => match pattern.split_once('/') {
            Some(("", _) | (_, "")) => Some("lacks a server or a tool: write `server/tool`"),
            Some(_) => None,
            None => Some("has no slash, so it matches no tool: write `server/tool`, or `*` alone for every tool"),
        },
    }
}

/// Whether no value can satisfy a constraint. Only the obvious cases are recognized.
pub(in crate::policy) fn is_unsatisfiable(constraint: &Constraint) -> bool {
    match constraint {
        Constraint::Range(range) => match (range.min, range.max) {
            (Some(min), Some(max)) => {
                min.value.as_f64() > max.value.as_f64() || (min.value == max.value && !(min.inclusive && max.inclusive))
            }
            _ => false,
        },
        Constraint::All(clauses) => clauses.iter().any(is_unsatisfiable),
        Constraint::Any(clauses) => clauses.iter().all(is_unsatisfiable),
        _ => false,
    }
}
