//! Conditions: one Cedar expression over `context`, checked when policy is read, asked when a call comes.
//!
//! Each is a Cedar policy set of its own with one policy, for Cedar scans every policy that it is given. Cedar would skip a
//! policy whose evaluation errs, a `forbid` too; here an error is an answer of its own, and whoever asks denies. Pure: the
//! time is a fact among others. Look next at `condition/check.rs` for what is refused, then at `condition/context.rs` for
//! what a condition sees.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use cedar_policy::{Authorizer, Decision, Entities, EntityUid, Expression, Policy, PolicyId, PolicySet, Request};

use crate::model::request::{Call, Subject};

mod check;
mod context;
mod shape;
mod work;

pub use context::Facts;
pub use work::Work;

/// The text of a condition.
pub const CONDITION_BYTES_MAX: usize = 4096;

/// A condition, ready to be asked. Equal if the text is.
#[derive(Clone)]
pub struct Condition {
    text: Arc<str>,
    program: Arc<Program>,
}

/// The expression did not come to a truth value: an argument it needs is missing or of another type, a number overflowed, or it would
/// take too much work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the condition could not be evaluated")]
pub struct Failed;

struct Program {
    policies: PolicySet,
    uses: Uses,
}

/// Which parts of `context` an expression looks at: only those are made for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Uses {
    parts: BTreeSet<Part>,
    /// Arguments by name; the whole of them where `args` stands by itself.
    arguments: BTreeSet<String>,
    all_arguments: bool,
}

/// A member of `context`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
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
    /// Reads and checks a condition.
    ///
    /// # Errors
    /// One line that says what is wrong: too long, not Cedar, a name that `context` does not have, an operator on what it has no
    /// meaning for.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > CONDITION_BYTES_MAX {
            return Err(format!("the condition is {} bytes: at most {CONDITION_BYTES_MAX}", text.len()));
        }
        shape::check(text)?;
        let syntax = |error: &dyn std::fmt::Display| format!("the condition is not a Cedar expression: {}", one_line(error));
        // By itself first, so that no text can end the expression and go on as another policy.
        text.parse::<Expression>().map_err(|error| syntax(&error))?;
        // The line feed ends a comment at the end of the text.
        let source = format!("permit (principal, action, resource) when {{ {text}\n}};");
        let policy = Policy::parse(Some(PolicyId::new("condition")), source).map_err(|error| syntax(&error))?;
        let tree = policy.to_json().map_err(|error| syntax(&error))?;
        let uses = check::check(&tree)?;
        let mut policies = PolicySet::new();
        policies.add(policy).map_err(|error| syntax(&error))?;
        Ok(Self { text: text.into(), program: Arc::new(Program { policies, uses }) })
    }

    /// The expression as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it looks at `context.env`, which is the caller's word.
    pub fn asks_environment(&self) -> bool {
        self.program.uses.parts.contains(&Part::Environment)
    }

    /// Whether it looks at `context.agent`, of which there is another for each hop.
    pub fn asks_agent(&self) -> bool {
        self.program.uses.parts.contains(&Part::Agent)
    }

    /// Whether it holds for a call.
    ///
    /// # Errors
    /// [`Failed`], also where the conditions of the call take more [`Work`] together than they may; the caller denies.
    pub fn holds(&self, facts: &Facts<'_>) -> Result<bool, Failed> {
        if facts.work.left() == 0 {
            // Nor is what it would cost counted out.
            return Err(Failed);
        }
        facts.work.spend(work::cost(&self.text, &self.program.uses, facts))?;
        let context = context::context(facts, &self.program.uses)?;
        let nobody = || NOBODY.clone().ok_or(Failed);
        let request = Request::new(nobody()?, nobody()?, nobody()?, context, None).map_err(|_| Failed)?;
        let response = AUTHORIZER.is_authorized(&request, &self.program.policies, &NO_ENTITIES);
        // INVARIANT: nothing is read from a response with an error in it; Cedar says `Deny` there for want of a policy.
        if response.diagnostics().errors().next().is_some() {
            return Err(Failed);
        }
        Ok(response.decision() == Decision::Allow)
    }
}

/// What stands for principal, action and resource, none of which a condition can name.
static NOBODY: LazyLock<Option<EntityUid>> = LazyLock::new(|| r#"Portcullis::"call""#.parse().ok());
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
