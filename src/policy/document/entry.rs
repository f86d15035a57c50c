//! Entries of a permission list: a pattern, what must hold of the arguments, who approves.
//!
//! Short forms of constraints become the one constraint type of `model` here. Whether a pattern matches a tool is not asked
//! here. Look next at `compile/set.rs`.

use std::sync::Arc;

use crate::model::constraint::{ArgumentMap, Constraint, Error, abridged};
use crate::model::duration;
use crate::model::ids::GroupId;
use crate::model::json::{Object, Value};

use super::super::diagnostic::suggestion;
use super::super::node::{Kind, Member, Node};
use super::Permissions;
use super::fields::{Fields, Reader};
use super::write::entry_value;

/// From request to use of an approval, where the entry does not say.
const APPROVAL_EXPIRES_IN_MS: u64 = 600_000;

/// One entry of `allow`, `approve` or `deny`.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The tools: a name, a pattern, or `*` for every one.
    pub pattern: Arc<str>,
    /// What must hold of the arguments. Open, unless the entry says `only: true`.
    pub arguments: ArgumentMap,
    /// Of an `approve` entry: who approves.
    pub approval: Option<Approval>,
    text: Arc<str>,
}

/// Who approves a call, and how soon it must be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    /// Groups of operators.
    pub by: Vec<GroupId>,
    /// From request to use.
    pub expires_in_ms: u64,
}

/// Which list an entry stands in; the order is of strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::policy) enum List {
    Deny,
    Approve,
    Allow,
}

impl List {
    /// Every list, the strongest first.
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
    /// An entry.
    pub fn new(pattern: &str, arguments: ArgumentMap, approval: Option<Approval>) -> Self {
        let mut entry = Self { pattern: pattern.into(), arguments, approval, text: pattern.into() };
        if entry.approval.is_some() || !entry.is_unconditional() {
            entry.text = entry_value(&entry).to_jcs().into();
        }
        entry
    }

    /// The entry as a reader knows it: its pattern, or its canonical JSON where it says more. Equal entries have equal texts.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Whether it applies whatever the arguments are.
    pub fn is_unconditional(&self) -> bool {
        self.arguments.named.is_empty() && self.arguments.open
    }
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
    let mut arguments = ArgumentMap::unconstrained();
    let mut approval = None;
    let sound = match said {
        Some(node) => {
            let before = reader.error_count();
            let mut fields = Fields::new(node, &format!("the entry `{}`", abridged(pattern)), reader)?;
            arguments = read_condition(&mut fields, list, reader);
            approval = if list == List::Approve { read_approval(&mut fields, at, reader) } else { None };
            fields.finish(reader, &["when", "mode", "prepared", "evidence"]);
            reader.error_count() == before
        }
        None if list == List::Approve => {
            reader.error(at, format!("the entry `{}` has no `by`: say which groups of operators approve", abridged(pattern)));
            false
        }
        None => true,
    };
    sound.then(|| Entry::new(pattern, arguments, approval))
}

fn read_condition(fields: &mut Fields<'_>, list: List, reader: &mut Reader<'_>) -> ArgumentMap {
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

/// `NAME: scalar`, `NAME: [list]`, `NAME: {min, max}`, or the long form of a constraint.
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
        Ok(mut parsed) => {
            if list == List::Deny && member.value.member("optional").is_some() {
                reader.error(member.at, "`optional` means nothing in a deny: leaving the argument out is no escape");
            }
            arguments.named.append(&mut parsed.named);
        }
        Err(error @ Error::TooNested) => reader.error(member.value.at, format!("argument `{}`: {error}", abridged(name))),
        Err(Error::Malformed(problem)) => reader.error(member.value.at, problem),
    }
}

/// A constraint in its long form, from whichever form it was written in.
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

fn read_approval(fields: &mut Fields<'_>, at: super::super::diagnostic::Position, reader: &mut Reader<'_>) -> Option<Approval> {
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

/// Says what is wrong with a pattern by itself.
fn pattern_error(pattern: &str) -> Option<&'static str> {
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

/// A duration as documents write it, in the largest unit that holds it.
pub(super) fn duration_text(ms: u64) -> String {
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
    let (unit, unit_ms) = units.into_iter().find(|(_, unit_ms)| ms.is_multiple_of(*unit_ms)).unwrap_or(("ms", 1));
    debug_assert_eq!(duration::parse_ms(&format!("{}{unit}", ms / unit_ms)), Ok(ms));
    format!("{}{unit}", ms / unit_ms)
}

/// Whether a constraint can hold for no value at all, in the cases that are plain to see.
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
