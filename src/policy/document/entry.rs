//! Entries of a permission list: a tool pattern, constraints on the arguments, and the approvers.
//!
//! This file expands the short forms of constraints to the constraint type of `model`. It does not match patterns with tools.
//! Look next at `compile/set.rs`, which does.

use std::sync::Arc;

use crate::model::constraint::{ArgumentMap, Constraint, Error, abridged};
use crate::model::ids::GroupId;
use crate::model::json::{Object, Value};

use super::super::condition::Condition;
use super::super::diagnostic::{Position, suggestion};
use super::super::node::{Kind, Member, Node};
use super::Permissions;
use super::fields::{Fields, Reader};
use super::stored_json::{arguments_value, duration_text, object, put, text, texts};

/// The time from the request to the use of an approval, if the entry states none.
const APPROVAL_EXPIRES_IN_MS: u64 = 600_000;

/// The maximum length of a message about a condition. Cedar may list everything that it expected.
const MESSAGE_CHARS_MAX: usize = 300;

/// One entry of `allow`, `approve` or `deny`.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The tools: a name, a pattern, or `*` for every tool.
    pub pattern: Arc<str>,
    /// The constraints on the arguments. Further arguments are allowed unless the entry states `only: true`.
    pub arguments: ArgumentMap,
    /// A further condition. It is evaluated only if the arguments match.
    pub when: Option<Condition>,
    /// The tool that must have been prepared: the call needs an unused approval of a call of that tool with equal arguments.
    pub prepared: Option<Arc<str>>,
    /// Whether a statement of the gateway is enough: for identities (`AttestedSubject`), and for `context.env` in `when`.
    pub attested: bool,
    /// The approvers of an `approve` entry; `None` in the other lists.
    pub approval: Option<Approval>,
    text: Arc<str>,
}

/// All parts of an entry except its pattern. The default adds no restriction, so the entry always applies.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// See [`Entry::arguments`].
    pub arguments: ArgumentMap,
    /// See [`Entry::when`].
    pub when: Option<Condition>,
    /// See [`Entry::prepared`].
    pub prepared: Option<Arc<str>>,
    /// See [`Entry::attested`].
    pub attested: bool,
    /// See [`Entry::approval`].
    pub approval: Option<Approval>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { arguments: ArgumentMap::unconstrained(), when: None, prepared: None, attested: false, approval: None }
    }
}

/// The approvers of a call, and the time in which the approval must be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    /// The operator groups that may approve.
    pub by: Vec<GroupId>,
    /// The time from the request to the use of the approval.
    pub expires_in_ms: u64,
}

/// The list that an entry is in, ordered by precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::policy) enum List {
    Deny,
    Approve,
    Allow,
}

impl List {
    /// Every list, the one with the highest precedence first.
    pub(in crate::policy) const ALL: [List; 3] = [List::Deny, List::Approve, List::Allow];

    /// The key in documents.
    pub(in crate::policy) fn as_str(self) -> &'static str {
        match self {
            List::Deny => "deny",
            List::Approve => "approve",
            List::Allow => "allow",
        }
    }
}

impl Permissions {
    /// The entries of one list.
    pub(in crate::policy) fn list(&self, list: List) -> &[Entry] {
        match list {
            List::Deny => &self.deny,
            List::Approve => &self.approve,
            List::Allow => &self.allow,
        }
    }
}

impl Entry {
    /// Creates an entry.
    pub fn new(pattern: &str, terms: Terms) -> Self {
        let Terms { arguments, when, prepared, attested, approval } = terms;
        let mut entry = Self { pattern: pattern.into(), arguments, when, prepared, attested, approval, text: pattern.into() };
        if entry.says_more() {
            entry.text = entry_value(&entry).to_jcs().into();
        }
        entry
    }

    /// Whether the entry has any part besides its pattern.
    pub(in crate::policy) fn says_more(&self) -> bool {
        self.approval.is_some() || self.attested || !self.is_unconditional()
    }

    /// The text that identifies the entry to a reader: its pattern, or its canonical JSON if it has further parts. Equal entries
    /// have equal texts.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Whether the entry applies to every call of its tools and demands no preparation.
    pub fn is_unconditional(&self) -> bool {
        self.arguments.named.is_empty() && self.arguments.open && self.when.is_none() && self.prepared.is_none()
    }
}

/// An entry as JSON: its pattern, or a mapping if it has further parts.
pub(super) fn entry_value(entry: &Entry) -> Value {
    if !entry.says_more() {
        return text(&entry.pattern);
    }
    let mut members = Vec::new();
    if !entry.arguments.named.is_empty() {
        put(&mut members, "args", arguments_value(&entry.arguments));
    }
    if !entry.arguments.open {
        put(&mut members, "only", Value::Bool(true));
    }
    if let Some(when) = &entry.when {
        put(&mut members, "when", text(when.text()));
    }
    if let Some(prepared) = &entry.prepared {
        put(&mut members, "prepared", text(prepared));
    }
    if entry.attested {
        put(&mut members, "evidence", text("attested"));
    }
    if let Some(approval) = &entry.approval {
        put(&mut members, "by", texts(approval.by.iter().map(|group| group.as_str())));
        put(&mut members, "expires_in", Value::String(duration_text(approval.expires_in_ms)));
    }
    object(vec![(entry.pattern.to_string(), object(members))])
}

/// Reads `allow`, `approve`, `deny` and `include`.
pub(super) fn read_permissions(fields: &mut Fields<'_>, reader: &mut Reader<'_>) -> Permissions {
    let mut list = |list: List| match fields.take(list.as_str()) {
        Some(node) => read_list(node, list, reader),
        None => Vec::new(),
    };
    let (allow, approve, deny) = (list(List::Allow), list(List::Approve), list(List::Deny));
    let include = fields.take("include").map(|node| reader.strings(node, "include")).unwrap_or_default();
    Permissions { allow, approve, deny, include: include.into_iter().map(Arc::from).collect() }
}

fn read_list(node: &Node, list: List, reader: &mut Reader<'_>) -> Vec<Entry> {
    let Kind::Sequence(items) = &node.kind else {
        reader.wrong(node, &format!("`{}` must be a list of entries", list.as_str()));
        return Vec::new();
    };
    let mut entries = Vec::with_capacity(items.len());
    for item in items {
        let at = item.as_mapping().and_then(|members| members.first()).map_or(item.at, |member| member.at);
        if let Some(entry) = read_entry(item, list, reader) {
            reader.positions.put(list.as_str(), entries.len(), at);
            entries.push(entry);
        }
    }
    entries
}

/// `PATTERN`, or `PATTERN: {args, only, by, expires_in}`.
fn read_entry(item: &Node, list: List, reader: &mut Reader<'_>) -> Option<Entry> {
    let (pattern, at, said) = match &item.kind {
        Kind::Mapping(members) => match members.as_slice() {
            [Member { name, at, value }] => (name.as_str(), *at, Some(value)),
            _ => {
                reader.error(item.at, "an entry is a tool pattern, or one pattern with a mapping: `crm/*: {args: {…}}`");
                return None;
            }
        },
        _ => (reader.text(item, "a tool pattern")?, item.at, None),
    };
    if let Some(problem) = pattern_error(pattern) {
        reader.error(at, format!("tool pattern `{}` {problem}", abridged(pattern)));
        return None;
    }
    let mut terms = Terms::default();
    let sound = match said {
        Some(node) => {
            let before = reader.error_count();
            let mut fields = Fields::new(node, &format!("the entry `{}`", abridged(pattern)), reader)?;
            terms = read_terms(&mut fields, list, at, reader);
            fields.finish(reader);
            reader.error_count() == before
        }
        None if list == List::Approve => {
            reader.error(at, format!("the entry `{}` has no `by`: say which groups of operators approve", abridged(pattern)));
            false
        }
        None => true,
    };
    sound.then(|| Entry::new(pattern, terms))
}

/// Reads all fields of an entry. Some fields have no meaning in a deny and are errors there.
fn read_terms(fields: &mut Fields<'_>, list: List, at: Position, reader: &mut Reader<'_>) -> Terms {
    let arguments = read_arguments(fields, list, reader);
    let when = fields.take("when");
    let condition = when.and_then(|node| read_condition(node, "`when`", reader));
    let attested = match fields.take("evidence") {
        None => false,
        Some(node) if list == List::Deny => {
            reader.error(node.at, "`evidence` means nothing in a deny: it may look at `context.env` as it is");
            false
        }
        Some(node) => reader.choice(node, "evidence", &["attested"], |name| name).is_some(),
    };
    if let Some(node) = when.filter(|_| list != List::Deny && !attested)
        && condition.as_ref().is_some_and(Condition::asks_environment)
    {
        let message = "`context.env` is the gateway's word and this entry would permit by it";
        reader.error_with_help(node.at, message, Some("say `evidence: attested` if that is meant".to_owned()));
    }
    let prepared = match fields.take("prepared") {
        None => None,
        Some(node) if list == List::Deny => {
            reader.error(node.at, "`prepared` means nothing in a deny");
            None
        }
        Some(node) => read_prepared(node, reader),
    };
    let approval = if list == List::Approve { read_approval(fields, at, reader) } else { None };
    Terms { arguments, when: condition, prepared, attested, approval }
}

/// Reads the tool that must have been prepared: one tool, by name.
fn read_prepared(node: &Node, reader: &mut Reader<'_>) -> Option<Arc<str>> {
    let tool = reader.text(node, "`prepared`")?;
    let problem = match pattern_error(tool) {
        None if tool.contains('*') => "must name one tool, not a pattern",
        None => return Some(tool.into()),
        Some(problem) => problem,
    };
    reader.error(node.at, format!("`prepared`: `{}` {problem}", abridged(tool)));
    None
}

/// Reads a Cedar expression over `context`.
pub(super) fn read_condition(node: &Node, what: &str, reader: &mut Reader<'_>) -> Option<Condition> {
    let Kind::Scalar(scalar) = &node.kind else {
        reader.wrong(node, &format!("{what} must be a condition, a string"));
        return None;
    };
    // `true` and `false` are conditions too, with or without quotes.
    match Condition::parse(&scalar.text) {
        Ok(condition) => Some(condition),
        Err(problem) => {
            reader.error(node.at, format!("{what}: {}", problem.chars().take(MESSAGE_CHARS_MAX).collect::<String>()));
            None
        }
    }
}

/// Reads `args` and `only`.
fn read_arguments(fields: &mut Fields<'_>, list: List, reader: &mut Reader<'_>) -> ArgumentMap {
    let mut arguments = ArgumentMap::unconstrained();
    if let Some(node) = fields.take("args") {
        match &node.kind {
            Kind::Mapping(members) => {
                for member in members {
                    read_argument(member, list, &mut arguments, reader);
                }
            }
            _ => reader.wrong(node, "`args` must be a mapping of argument names"),
        }
    }
    if let Some(node) = fields.take("only") {
        if list == List::Deny {
            reader.error(node.at, "`only` means nothing in a deny: it fires whatever else is there");
        } else {
            arguments.open = !reader.truth(node, "`only`").unwrap_or(true);
        }
    }
    arguments
}

/// Reads `NAME: scalar`, `NAME: [list]`, `NAME: {min, max}`, or the long form of a constraint.
fn read_argument(member: &Member, list: List, arguments: &mut ArgumentMap, reader: &mut Reader<'_>) {
    let name = member.name.as_str();
    if name == "*" || name.is_empty() {
        reader.error(member.at, "an argument must be named; others pass unless the entry says `only: true`");
        return;
    }
    let Some(long) = long_form(&member.value, reader) else {
        return;
    };
    let named = Value::Object(Object::from_members([(name.to_owned(), long)]));
    match ArgumentMap::parse(&named) {
        Ok(parsed) => {
            if list == List::Deny && member.value.member("optional").is_some() {
                reader.error(member.at, "`optional` means nothing in a deny: leaving the argument out is no escape");
            }
            arguments.named.extend(parsed.named);
        }
        Err(error @ Error::TooNested) => reader.error(member.value.at, format!("argument `{}`: {error}", abridged(name))),
        Err(Error::Malformed(problem)) => reader.error(member.value.at, problem),
    }
}

/// Returns the long form of a constraint that may be written in a short form.
fn long_form(node: &Node, reader: &mut Reader<'_>) -> Option<Value> {
    let constraint = |kind: &str, member: &str, value: Value| {
        let kind = ("constraint_type".to_owned(), Value::String(kind.to_owned()));
        Value::Object(Object::from_members([kind, (member.to_owned(), value)]))
    };
    match &node.kind {
        Kind::Scalar(_) => Some(constraint("exact", "value", node.to_value())),
        Kind::Sequence(_) => Some(constraint("one_of", "values", node.to_value())),
        Kind::Mapping(_) if node.member("constraint_type").is_some() => Some(node.to_value()),
        Kind::Mapping(members) => {
            if let Some(unknown) = members.iter().find(|member| !matches!(member.name.as_str(), "min" | "max")) {
                let help = suggestion(&unknown.name, ["min", "max", "constraint_type"]).unwrap_or_else(|| {
                    "write `min` and `max`, a value, a list, or a constraint with `constraint_type`".to_owned()
                });
                reader.error_with_help(unknown.at, format!("unknown key `{}`", abridged(&unknown.name)), Some(help));
                return None;
            }
            if members.is_empty() {
                reader.error(node.at, "a range needs `min` or `max`");
                return None;
            }
            let kind = ("constraint_type".to_owned(), Value::String("range".to_owned()));
            let bounds = members.iter().map(|member| (member.name.clone(), member.value.to_value()));
            Some(Value::Object(Object::from_members(std::iter::once(kind).chain(bounds))))
        }
    }
}

/// Reads `by` and `expires_in` of an approve entry.
fn read_approval(fields: &mut Fields<'_>, at: Position, reader: &mut Reader<'_>) -> Option<Approval> {
    let by: Vec<GroupId> = match fields.take("by") {
        Some(node) => reader.strings(node, "by").iter().map(|group| GroupId::from(group.as_str())).collect(),
        None => Vec::new(),
    };
    let expires_in_ms = fields
        .take("expires_in")
        .map_or(Some(APPROVAL_EXPIRES_IN_MS), |node| reader.duration_ms(node, "`expires_in`"))
        .unwrap_or(APPROVAL_EXPIRES_IN_MS);
    if by.is_empty() {
        reader.error(at, "the entry has no `by`: say which groups of operators approve");
    }
    if expires_in_ms == 0 {
        reader.error(at, "`expires_in` must be longer than nothing");
    }
    Some(Approval { by, expires_in_ms })
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
                min.at.as_f64() > max.at.as_f64() || (min.at == max.at && !(min.inclusive && max.inclusive))
            }
            _ => false,
        },
        Constraint::All(clauses) => clauses.iter().any(is_unsatisfiable),
        Constraint::Any(clauses) => clauses.iter().all(is_unsatisfiable),
        _ => false,
    }
}
