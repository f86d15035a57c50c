//! The budget for the costs of all conditions of one call.
//!
//! Operators write policy, and agents choose the arguments. So the cost of a call can be many conditions times large arguments.
//! The cost is counted and never timed, so that every machine and every replay reaches the same decision. Look next at
//! `evaluation_cost.rs`, which computes a cost.

use std::cell::Cell;

use crate::model::limits::CONDITION_WORK_MAX;

use super::ConditionError;

/// The remaining work budget for the conditions of one call. One unit is roughly one byte that a short condition reads.
#[derive(Debug)]
pub struct WorkBudget {
    remaining: Cell<u64>,
}

impl Default for WorkBudget {
    fn default() -> Self {
        Self { remaining: Cell::new(CONDITION_WORK_MAX) }
    }
}

impl WorkBudget {
    /// The remaining budget.
    pub(super) fn remaining(&self) -> u64 {
        self.remaining.get()
    }

    /// Spends the cost of a condition.
    ///
    /// # Errors
    /// [`ConditionError`] if the budget is smaller than the cost. The budget is then zero, so every later condition of the call fails
    /// too.
    pub(super) fn spend(&self, cost: u64) -> Result<(), ConditionError> {
        let left = self.remaining.get().checked_sub(cost);
        self.remaining.set(left.unwrap_or(0));
        left.map(drop).ok_or(ConditionError)
    }
}
