//! What asking a condition costs, counted before it is asked.
//!
//! Policy is written by operators and arguments are chosen by agents: many conditions times large arguments is what one call can cost.
//! It is counted and never timed, so that a decision is the same on every machine and every replay. Must not depend on the order
//! in which conditions are asked: whoever permits has asked them all.

use std::cell::Cell;

use crate::model::json::{Object, Value};
use crate::model::limits::CONDITION_WORK_MAX;

use super::{Facts, Failed, Part, Uses};

/// The work that one call's conditions may still take; the unit is about a byte of what a short condition looks at.
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
    /// What is left.
    pub(super) fn left(&self) -> u64 {
        self.left.get()
    }

    /// Takes what a condition will cost.
    ///
    /// # Errors
    /// [`Failed`] if less is left. What is left then is nothing, so every later condition of the call fails, too.
    pub(super) fn spend(&self, cost: u64) -> Result<(), Failed> {
        let left = self.left.get().checked_sub(cost);
        self.left.set(left.unwrap_or(0));
        left.map(drop).ok_or(Failed)
    }
}

/// What a condition does with a byte that it looks at grows with its text: a pattern is held against each.
const TEXT_BYTES_PER_WEIGHT: u64 = 64;
/// What any condition costs, and any value that one looks at.
const CONDITION: u64 = 256;
const VALUE: u64 = 16;

/// The cost of asking a condition of some text that looks at some parts of a call.
pub(super) fn cost(text: &str, uses: &Uses, facts: &Facts<'_>) -> u64 {
    let of_part = |part: &Part| match part {
        Part::User => {
            let groups = facts.subject.groups.iter().map(|group| of_text(group.as_str()));
            groups.sum::<u64>() + of_text(&facts.subject.user.subject)
        }
        Part::Agent => facts.subject.agents.iter().take(facts.agents_seen).map(|agent| of_text(agent.as_str())).sum(),
        Part::Arguments if uses.all_arguments => of_object(facts.call.arguments),
        // Each name is looked for among the arguments.
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
