//! Computes the cost of a condition before its evaluation.
//!
//! Operators write policy, and agents choose the arguments. So the cost of a call can be many conditions times large arguments.
//! The cost is counted and never timed, so that every machine and every replay reaches the same decision. The order of evaluation
//! must not matter; a permit has evaluated all conditions.

use std::cell::Cell;

use crate::model::json::{Object, Value};
use crate::model::limits::CONDITION_WORK_MAX;

use super::{Facts, Failed, Part, Uses};

/// The remaining work budget for the conditions of one call. One unit is roughly one byte that a short condition reads.
#[derive(Debug)]
pub struct Work {
    left: Cell<u64>,
}

impl Default for Work {
    fn default() -> Self {
        Self { left: Cell::new(CONDITION_WORK_MAX) }
    }
}

impl Work {
    /// The remaining budget.
    pub(super) fn left(&self) -> u64 {
        self.left.get()
    }

    /// Spends the cost of a condition.
    ///
    /// # Errors
    /// [`Failed`] if the budget is smaller than the cost. The budget is then zero, so every later condition of the call fails
    /// too.
    pub(super) fn spend(&self, cost: u64) -> Result<(), Failed> {
        let left = self.left.get().checked_sub(cost);
        self.left.set(left.unwrap_or(0));
        left.map(drop).ok_or(Failed)
    }
}

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
