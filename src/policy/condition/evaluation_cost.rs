//! Computes the cost of a condition before its evaluation, from the sizes of the values that the condition reads.
//!
//! The cost of all conditions is added up, whatever their order, because a permit evaluates every one. Look next at
//! `work_budget.rs`, which holds the budget.

use crate::model::json::{JsonObject, Value};

use super::{CallFacts, ContextPart, ContextUses};

/// Per this many bytes of the condition's text, the weight of every byte that the condition reads grows by one, because a
/// condition may compare every byte with a pattern.
const TEXT_BYTES_PER_WEIGHT: u64 = 64;
/// The cost of any condition, and of any value that a condition reads.
const CONDITION_COST: u64 = 256;
const VALUE_COST: u64 = 16;

/// The cost of evaluating a condition, from its text and the parts of the call that it reads.
pub(super) fn condition_cost(text: &str, uses: &ContextUses, facts: &CallFacts<'_>) -> u64 {
    let of_part = |part: &ContextPart| match part {
        ContextPart::User => {
            let groups = facts.subject.groups.iter().map(|group| text_cost(group.as_str()));
            groups.sum::<u64>() + text_cost(&facts.subject.user.subject)
        }
        ContextPart::Agent => {
            facts.subject.agents.iter().take(facts.visible_agent_count).map(|agent| text_cost(agent.as_str())).sum()
        }
        ContextPart::Arguments if uses.all_arguments => object_cost(facts.call.arguments),
        // Each name is searched for among the arguments.
        ContextPart::Arguments => uses.arguments.iter().map(|name| argument_cost(facts.call.arguments, name)).sum(),
        ContextPart::Environment => facts.call.environment.map_or(0, object_cost),
        ContextPart::Application | ContextPart::Session | ContextPart::Tool | ContextPart::Time => VALUE_COST,
    };
    let looked_at = CONDITION_COST + uses.parts.iter().map(of_part).sum::<u64>();
    looked_at.saturating_mul(1 + text.len() as u64 / TEXT_BYTES_PER_WEIGHT)
}

fn argument_cost(arguments: &JsonObject, name: &str) -> u64 {
    arguments.len() as u64 + arguments.member(name).map_or(0, value_cost)
}

fn value_cost(value: &Value) -> u64 {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => VALUE_COST,
        Value::String(text) => text_cost(text),
        Value::Array(items) => VALUE_COST + items.iter().map(value_cost).sum::<u64>(),
        Value::Object(members) => object_cost(members),
    }
}

fn object_cost(object: &JsonObject) -> u64 {
    VALUE_COST + object.iter().map(|(name, value)| text_cost(name) + value_cost(value)).sum::<u64>()
}

fn text_cost(text: &str) -> u64 {
    VALUE_COST + text.len() as u64
}
