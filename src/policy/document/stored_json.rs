//! The parts of the stored form that entries and whole documents share: members, texts, durations and constraints.
//!
//! Look next at `entry.rs` and at `write.rs`, which build entries and documents of them.

use crate::model::constraint::{Constraint, ConstraintMap, RangeBound};
use crate::model::duration;
use crate::model::json::{JsonObject, Value};

/// The members of a JSON object, in the order of writing.
pub(super) type JsonMembers = Vec<(String, Value)>;

pub(super) fn arguments_to_json(arguments: &ConstraintMap) -> Value {
    let named = arguments.named.iter().map(|(name, argument)| {
        let mut members = constraint_members(&argument.constraint);
        if argument.optional {
            put(&mut members, "optional", Value::Bool(true));
        }
        (name.to_string(), object_value(members))
    });
    object_value(named.collect())
}

/// The long form of a constraint.
fn constraint_members(constraint: &Constraint) -> JsonMembers {
    let list = |values: &Vec<Value>| Value::Array(values.clone());
    let clauses =
        |clauses: &Vec<Constraint>| Value::Array(clauses.iter().map(|clause| object_value(constraint_members(clause))).collect());
    let (kind, member) = match constraint {
        Constraint::Exact(value) => ("exact", Some(("value", value.clone()))),
        Constraint::Range(range) => {
            let mut members = Vec::new();
            put(&mut members, "constraint_type", string_value("range"));
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
    put(&mut members, "constraint_type", string_value(kind));
    if let Some((name, value)) = member {
        put(&mut members, name, value);
    }
    members
}

fn put_bound(members: &mut JsonMembers, name: &str, inclusive_name: &str, bound: Option<RangeBound>) {
    if let Some(bound) = bound {
        put(members, name, Value::Number(bound.value));
        if !bound.inclusive {
            put(members, inclusive_name, Value::Bool(false));
        }
    }
}

/// Adds a list unless it is empty.
pub(super) fn put_list<'a>(members: &mut JsonMembers, name: &str, items: impl Iterator<Item = &'a str>) {
    let mut items = items.peekable();
    if items.peek().is_some() {
        put(members, name, string_array(items));
    }
}

pub(super) fn put(members: &mut JsonMembers, name: &str, value: Value) {
    members.push((name.to_owned(), value));
}

pub(super) fn string_value(text: &str) -> Value {
    Value::String(text.to_owned())
}

pub(super) fn string_array<'a>(items: impl IntoIterator<Item = &'a str>) -> Value {
    Value::Array(items.into_iter().map(string_value).collect())
}

pub(super) fn object_value(members: JsonMembers) -> Value {
    Value::Object(JsonObject::from_members(members))
}

/// Formats a duration for a document, in the largest unit that gives a whole number.
pub(super) fn format_duration(ms: u64) -> String {
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
    let (unit, unit_ms) = units.into_iter().find(|(_, unit_ms)| ms.is_multiple_of(*unit_ms)).unwrap_or(("ms", 1));
    debug_assert_eq!(duration::parse_ms(&format!("{}{unit}", ms / unit_ms)), Ok(ms));
    format!("{}{unit}", ms / unit_ms)
}
