//! Computes the cost of a condition before its evaluation, from the sizes of the values that the condition reads.
//!
//! The order of evaluation must not matter; a permit has evaluated all conditions. Look next at `work.rs`, the budget for the
//! costs.

use crate::model::json::{Object, Value};

use super::{Facts, Part, Uses};

/// Each such length of text adds one to the weight of every byte read, because a condition may compare every byte with a pattern.
const TEXT_BYTES_PER_WEIGHT: u64 = 64;
/// The cost of any condition, and of any value that a condition reads.
const CONDITION: u64 = 256;
const VALUE: u64 = 16;

/// The cost of evaluating a condition, from its text and the parts of the call that it reads.
pub(super) fn cost(text: &str, uses: &Uses, facts: &Facts<'_>) -> u64 {
    let of_part = |part: &Part| match part {
        Part::User => {
            let groups = facts.subject.groups.iter().map(|group| of_text(group.as_str()));
            groups.sum::<u64>() + of_text(&facts.subject.user.subject)
        }
        Part::Agent => facts.subject.agents.iter().take(facts.agents_seen).map(|agent| of_text(agent.as_str())).sum(),
        Part::Arguments if uses.all_arguments => of_object(facts.call.arguments),
        // Each name is searched for among the arguments.
        Part::Arguments => uses.arguments.iter().map(|name| of_argument(facts.call.arguments, name)).sum(),
        Part::Environment => facts.call.environment.map_or(0, of_object),
        Part::Application | Part::Session | Part::Tool | Part::Time => VALUE,
    };
    let looked_at = CONDITION + uses.parts.iter().map(of_part).sum::<u64>();
    looked_at.saturating_mul(1 + text.len() as u64 / TEXT_BYTES_PER_WEIGHT)
}

fn of_argument(arguments: &Object, name: &str) -> u64 {
    arguments.len() as u64 + arguments.member(name).map_or(0, of_value)
}

fn of_value(value: &Value) -> u64 {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => VALUE,
        Value::String(text) => of_text(text),
        Value::Array(items) => VALUE + items.iter().map(of_value).sum::<u64>(),
        Value::Object(members) => of_object(members),
    }
}

fn of_object(object: &Object) -> u64 {
    VALUE + object.iter().map(|(name, value)| of_text(name) + of_value(value)).sum::<u64>()
}

fn of_text(text: &str) -> u64 {
    VALUE + text.len() as u64
}
