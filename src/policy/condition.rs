//! Conditions: Cedar expressions over `context`. A condition is checked when the policy is read and evaluated for each call.
//!
//! Every condition is a Cedar policy set with a single policy, because Cedar scans all policies of a set. Cedar skips a policy
//! whose evaluation fails, even a `forbid`. Here a failed evaluation is a separate result, and the caller denies. Evaluation is
//! pure; the time is one of the facts. Look next at `condition/type_check.rs` for the checks, then at `condition/context.rs` for the
//! facts that a condition can read.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use cedar_policy::{Authorizer, Decision, Entities, EntityUid, Expression, Policy, PolicyId, PolicySet, Request};

use crate::model::request::{DelegationSubject, ToolCall};

mod context;
mod evaluation_cost;
mod nesting;
mod type_check;
mod work_budget;

pub use context::CallFacts;
pub use work_budget::WorkBudget;

/// The maximum length of a condition.
pub const CONDITION_BYTES_MAX: usize = 4096;

/// A parsed and checked condition. Conditions are equal if their texts are equal.
#[derive(Clone)]
pub struct Condition {
    text: Arc<str>,
    program: Arc<ConditionProgram>,
}

/// The evaluation of a condition failed. An argument is missing or has another type, a number overflowed, or the work budget is
/// exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the condition could not be evaluated")]
pub struct ConditionError;

/// The Cedar policy of a condition, and the parts of the context that it reads.
struct ConditionProgram {
    policies: PolicySet,
    uses: ContextUses,
}

/// The parts of `context` that an expression reads. Only these parts are built for its evaluation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ContextUses {
    parts: BTreeSet<ContextPart>,
    /// The names of the arguments. Not complete if `all_arguments` is set, because the expression reads `args` as a whole.
    arguments: BTreeSet<String>,
    all_arguments: bool,
}

/// A member of `context`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ContextPart {
    User,
    Application,
    Agent,
    Session,
    Tool,
    Arguments,
    Time,
    Environment,
}

impl Condition {
    /// Parses and checks a condition.
    ///
    /// # Errors
    /// One line with the mistake: the text is too long or not Cedar, it reads a member that `context` lacks, or it applies an
    /// operator to values of the wrong type.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > CONDITION_BYTES_MAX {
            return Err(format!("the condition is {} bytes: at most {CONDITION_BYTES_MAX}", text.len()));
        }
        nesting::check_nesting(text)?;
        let syntax = |error: &dyn std::fmt::Display| format!("the condition is not a Cedar expression: {}", one_line(error));
        // The expression is parsed by itself first, so that no text can close the braces and append another policy.
        text.parse::<Expression>().map_err(|error| syntax(&error))?;
        // The line feed ends a comment at the end of the text.
        let source = format!("permit (principal, action, resource) when {{ {text}\n}};");
        let policy = Policy::parse(Some(PolicyId::new("condition")), source).map_err(|error| syntax(&error))?;
        let tree = policy.to_json().map_err(|error| syntax(&error))?;
        let uses = type_check::check_condition(&tree)?;
        let mut policies = PolicySet::new();
        policies.add(policy).map_err(|error| syntax(&error))?;
        Ok(Self { text: text.into(), program: Arc::new(ConditionProgram { policies, uses }) })
    }

    /// The expression as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it reads `context.env`, which only the caller vouches for.
    pub fn reads_environment(&self) -> bool {
        self.program.uses.parts.contains(&ContextPart::Environment)
    }

    /// Whether it reads `context.agent`, which differs for each hop.
    pub fn reads_agent(&self) -> bool {
        self.program.uses.parts.contains(&ContextPart::Agent)
    }

    /// Whether the condition holds for a call.
    ///
    /// # Errors
    /// [`ConditionError`], also if the conditions of the call exhaust their [`WorkBudget`] budget together. The caller must deny.
    pub fn holds(&self, facts: &CallFacts<'_>) -> Result<bool, ConditionError> {
        if facts.work.remaining() == 0 {
            // With an exhausted budget, even the cost is not computed.
            return Err(ConditionError);
        }
        facts.work.spend(evaluation_cost::condition_cost(&self.text, &self.program.uses, facts))?;
        let context = context::build_context(facts, &self.program.uses)?;
        let nobody = || PLACEHOLDER_ENTITY.clone().ok_or(ConditionError);
        let request = Request::new(nobody()?, nobody()?, nobody()?, context, None).map_err(|_| ConditionError)?;
        let response = AUTHORIZER.is_authorized(&request, &self.program.policies, &NO_ENTITIES);
        // INVARIANT: the decision of a response with errors is never read. Cedar answers `Deny` there only because no policy
        // applies.
        if response.diagnostics().errors().next().is_some() {
            return Err(ConditionError);
        }
        Ok(response.decision() == Decision::Allow)
    }
}

/// The entity used as principal, action and resource. A condition cannot refer to any of these.
static PLACEHOLDER_ENTITY: LazyLock<Option<EntityUid>> = LazyLock::new(|| r#"Portcullis::"call""#.parse().ok());
static AUTHORIZER: LazyLock<Authorizer> = LazyLock::new(Authorizer::new);
static NO_ENTITIES: LazyLock<Entities> = LazyLock::new(Entities::empty);

impl PartialEq for Condition {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl std::fmt::Debug for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Condition({:?})", self.text)
    }
}

fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
