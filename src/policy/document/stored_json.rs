//! The parts of the stored form that entries and whole documents share: members, texts, durations and constraints.
//!
//! Look next at `entry.rs` and at `write.rs`, which build entries and documents of them.

use crate::model::constraint::{ArgumentMap, Bound, Constraint};
use crate::model::duration;
use crate::model::json::{Object, Value};

/// The members of a JSON object, in the order of writing.
pub(super) type Members = Vec<(String, Value)>;

pub(super) fn arguments_value(arguments: &ArgumentMap) -> Value {
    let named = arguments.named.iter().map(|(name, argument)| {
        let mut members = constraint_members(&argument.constraint);
        if argument.optional {
            put(&mut members, "optional", Value::Bool(true));
        }
        (name.to_string(), object(members))
    });
    object(named.collect())
}

/// The long form of a constraint.
fn constraint_members(constraint: &Constraint) -> Members {
    let list = |values: &Vec<Value>| Value::Array(values.clone());
    let clauses =
        |clauses: &Vec<Constraint>| Value::Array(clauses.iter().map(|clause| object(constraint_members(clause))).collect());
    let (kind, member) = match constraint {
        Constraint::Exact(value) => ("exact", Some(("value", value.clone()))),
        Constraint::Range(range) => {
            let mut members = Vec::new();
            put(&mut members, "constraint_type", text("range"));
            put_bound(&mut members, "min", "min_inclusive", range.min);
            put_bound(&mut members, "max", "max_inclusive", range.max);
            return members;
        }
        Constraint::OneOf(values) => ("one_of", Some(("values", list(values)))),
        Constraint::NotOneOf(values) => ("not_one_of", Some(("excluded", list(values)))),
        Constraint::Contains(values) => ("contains", Some(("required", list(values)))),
        Constraint::Subset(values) => ("subset", Some(("allowed", list(values)))),
        Constraint::All(all) => ("all", Some(("constraints", clauses(all)))),
        Constraint::Any(any) => ("any", Some(("constraints", clauses(any)))),
        Constraint::Wildcard => ("wildcard", None),
    };
    let mut members = Vec::new();
    put(&mut members, "constraint_type", text(kind));
    if let Some((name, value)) = member {
        put(&mut members, name, value);
    }
    members
}

fn put_bound(members: &mut Members, name: &str, inclusive_name: &str, bound: Option<Bound>) {
    if let Some(bound) = bound {
        put(members, name, Value::Number(bound.at));
        if !bound.inclusive {
            put(members, inclusive_name, Value::Bool(false));
        }
    }
}

/// Adds a list unless it is empty.
pub(super) fn put_list<'a>(members: &mut Members, name: &str, items: impl Iterator<Item = &'a str>) {
    let mut items = items.peekable();
    if items.peek().is_some() {
        put(members, name, texts(items));
    }
}

pub(super) fn put(members: &mut Members, name: &str, value: Value) {
    members.push((name.to_owned(), value));
}

pub(super) fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

pub(super) fn texts<'a>(items: impl IntoIterator<Item = &'a str>) -> Value {
    Value::Array(items.into_iter().map(text).collect())
}

pub(super) fn object(members: Members) -> Value {
    Value::Object(Object::from_members(members))
}

/// Formats a duration for a document, in the largest unit that gives a whole number.
pub(super) fn duration_text(ms: u64) -> String {
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
    let (unit, unit_ms) = units.into_iter().find(|(_, unit_ms)| ms.is_multiple_of(*unit_ms)).unwrap_or(("ms", 1));
    debug_assert_eq!(duration::parse_ms(&format!("{}{unit}", ms / unit_ms)), Ok(ms));
    format!("{}{unit}", ms / unit_ms)
}
