//! Builds the Cedar `build_context` of a call, with only the parts that a condition reads.
//!
//! JSON and Cedar differ. A member that is `null` is left out. A number with a fraction becomes a decimal if it has at most four
//! decimal places. A value that Cedar cannot express fails the evaluation. Look next at `condition.rs`.

use cedar_policy::{Context, RestrictedExpression};

use crate::model::json::{JsonNumber, JsonObject, Value};

use super::{ConditionError, ContextPart, ContextUses, DelegationSubject, ToolCall, WorkBudget};

/// The facts of one call.
#[derive(Clone, Copy, Debug)]
pub struct CallFacts<'a> {
    /// The subject of the call.
    pub subject: &'a DelegationSubject,
    /// The call and its time.
    pub call: &'a ToolCall<'a>,
    /// The registered risk of the tool: `read`, `write`, `destructive`.
    pub risk: &'static str,
    /// The number of agents that the condition sees, counted from the root. The last of them is `context.agent`.
    ///
    /// INVARIANT: a condition never sees later agents, so delegating to another agent cannot lift a denial by a condition.
    pub visible_agent_count: usize,
    /// The remaining budget for the conditions of the call, shared by all layers.
    pub work: &'a WorkBudget,
}

/// The seconds of a day.
const DAY_S: i64 = 86_400;

/// Builds the parts of the context that an expression reads.
pub(super) fn build_context(facts: &CallFacts<'_>, uses: &ContextUses) -> Result<Context, ConditionError> {
    let mut members = Vec::with_capacity(uses.parts.len());
    for part in &uses.parts {
        members.push(match part {
            ContextPart::User => ("user".to_owned(), user(facts.subject)?),
            ContextPart::Application => ("application".to_owned(), record([("id", text(facts.subject.application.as_str()))])?),
            ContextPart::Agent => ("agent".to_owned(), agent(facts)?),
            ContextPart::Session => ("session".to_owned(), session(facts.subject)?),
            ContextPart::Tool => ("tool".to_owned(), tool(facts)?),
            ContextPart::Arguments => ("args".to_owned(), arguments(facts.call.arguments, uses)?),
            ContextPart::Time => ("time".to_owned(), time(facts.call.unix_s)?),
            ContextPart::Environment => match facts.call.environment {
                Some(environment) => ("env".to_owned(), object_to_record(environment)?),
                None => ("env".to_owned(), record([])?),
            },
        });
    }
    Context::from_pairs(members).map_err(|_| ConditionError)
}

fn user(subject: &DelegationSubject) -> Result<RestrictedExpression, ConditionError> {
    let groups = RestrictedExpression::new_set(subject.groups.iter().map(|group| text(group.as_str())));
    record([("issuer", text(subject.user.issuer.as_str())), ("sub", text(&subject.user.subject)), ("groups", groups)])
}

fn agent(facts: &CallFacts<'_>) -> Result<RestrictedExpression, ConditionError> {
    let seen = facts.subject.agents.get(..facts.visible_agent_count).unwrap_or_default();
    let (Some(root), Some(last)) = (seen.first(), seen.last()) else {
        return Err(ConditionError);
    };
    let depth = i64::try_from(seen.len() - 1).map_err(|_| ConditionError)?;
    let chain = RestrictedExpression::new_set(seen.iter().map(|agent| text(agent.as_str())));
    record([
        ("id", text(last.as_str())),
        ("root", text(root.as_str())),
        ("depth", RestrictedExpression::new_long(depth)),
        ("chain", chain),
    ])
}

fn session(subject: &DelegationSubject) -> Result<RestrictedExpression, ConditionError> {
    record([("id", text(subject.session.as_str())), ("task", text(subject.task.as_str()))])
}

fn tool(facts: &CallFacts<'_>) -> Result<RestrictedExpression, ConditionError> {
    let server = facts.call.tool.split_once('/').map_or("", |(server, _)| server);
    record([("name", text(facts.call.tool)), ("server", text(server)), ("risk", text(facts.risk))])
}

fn arguments(arguments: &JsonObject, uses: &ContextUses) -> Result<RestrictedExpression, ConditionError> {
    if uses.all_arguments {
        return object_to_record(arguments);
    }
    let named = uses.arguments.iter().filter_map(|name| Some((name.clone(), arguments.member(name)?)));
    to_record(named)
}

/// The parts of a time in UTC. Weekdays follow ISO 8601, with Monday as 1.
fn time(unix_s: i64) -> Result<RestrictedExpression, ConditionError> {
    let long = RestrictedExpression::new_long;
    let (day, second) = (unix_s.div_euclid(DAY_S), unix_s.rem_euclid(DAY_S));
    // 1 January 1970 was a Thursday.
    let weekday = (day + 3).rem_euclid(7) + 1;
    let moment = jiff::Timestamp::from_second(unix_s).map_err(|_| ConditionError)?;
    let date = jiff::tz::Offset::UTC.to_datetime(moment).date();
    record([
        ("unix_s", long(unix_s)),
        ("hour_utc", long(second / 3600)),
        ("minute_utc", long(second / 60 % 60)),
        ("weekday_utc", long(weekday)),
        ("date", text(&date.to_string())),
    ])
}

fn record<const N: usize>(members: [(&str, RestrictedExpression); N]) -> Result<RestrictedExpression, ConditionError> {
    let members = members.into_iter().map(|(name, value)| (name.to_owned(), value));
    RestrictedExpression::new_record(members).map_err(|_| ConditionError)
}

fn text(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

fn object_to_record(object: &JsonObject) -> Result<RestrictedExpression, ConditionError> {
    to_record(object.iter().map(|(name, value)| (name.to_owned(), value)))
}

fn to_record<'a>(members: impl Iterator<Item = (String, &'a Value)>) -> Result<RestrictedExpression, ConditionError> {
    let present = members.filter(|(_, value)| !matches!(value, Value::Null));
    let converted = present.map(|(name, value)| Ok((name, to_expression(value)?))).collect::<Result<Vec<_>, ConditionError>>()?;
    RestrictedExpression::new_record(converted).map_err(|_| ConditionError)
}

fn to_expression(value: &Value) -> Result<RestrictedExpression, ConditionError> {
    Ok(match value {
        // A `null` cannot be left out of a list, because that would change the list.
        Value::Null => return Err(ConditionError),
        Value::Bool(truth) => RestrictedExpression::new_bool(*truth),
        Value::Number(number) => number_expression(*number)?,
        Value::String(text) => RestrictedExpression::new_string(text.clone()),
        Value::Array(items) => {
            RestrictedExpression::new_set(items.iter().map(to_expression).collect::<Result<Vec<_>, ConditionError>>()?)
        }
        Value::Object(members) => object_to_record(members)?,
    })
}

/// Converts a number: a whole number to a long, a fraction of at most four digits to a decimal.
fn number_expression(number: JsonNumber) -> Result<RestrictedExpression, ConditionError> {
    if !number.is_comparable() {
        return Err(ConditionError);
    }
    // 100.0 becomes 100. Every comparable number fits without loss.
    if number.as_f64().fract() == 0.0 {
        return Ok(RestrictedExpression::new_long(number.as_f64() as i64));
    }
    let text = Value::Number(number).to_jcs();
    match text.split_once('.') {
        Some((whole, digits)) if digits.len() <= 4 && whole.len() <= 15 && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            Ok(RestrictedExpression::new_decimal(text))
        }
        _ => Err(ConditionError),
    }
}
