//! Builds the Cedar `context` of a call, with only the parts that a condition reads.
//!
//! JSON and Cedar differ. A member that is `null` is left out. A number with a fraction becomes a decimal if it has at most four
//! decimal places. A value that Cedar cannot express fails the evaluation. Look next at `condition.rs`.

use cedar_policy::{Context, RestrictedExpression};

use crate::model::json::{Number, Object, Value};

use super::{Call, Failed, Part, Subject, Uses, Work};

/// The facts of one call.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The subject of the call.
    pub subject: &'a Subject,
    /// The call and its time.
    pub call: &'a Call<'a>,
    /// The registered risk of the tool: `read`, `write`, `destructive`.
    pub risk: &'static str,
    /// The number of agents that the condition sees, counted from the root. The last of them is `context.agent`.
    ///
    /// INVARIANT: a condition never sees later agents, so delegating to another agent cannot lift a denial by a condition.
    pub agents_seen: usize,
    /// The remaining budget for the conditions of the call, shared by all layers.
    pub work: &'a Work,
}

/// The seconds of a day.
const DAY_S: i64 = 86_400;

/// Builds the parts of the context that an expression reads.
pub(super) fn context(facts: &Facts<'_>, uses: &Uses) -> Result<Context, Failed> {
    let mut members = Vec::with_capacity(uses.parts.len());
    for part in &uses.parts {
        members.push(match part {
            Part::User => ("user".to_owned(), user(facts.subject)?),
            Part::Application => ("application".to_owned(), record([("id", text(facts.subject.application.as_str()))])?),
            Part::Agent => ("agent".to_owned(), agent(facts)?),
            Part::Session => ("session".to_owned(), session(facts.subject)?),
            Part::Tool => ("tool".to_owned(), tool(facts)?),
            Part::Arguments => ("args".to_owned(), arguments(facts.call.arguments, uses)?),
            Part::Time => ("time".to_owned(), time(facts.call.unix_s)?),
            Part::Environment => match facts.call.environment {
                Some(environment) => ("env".to_owned(), object(environment)?),
                None => ("env".to_owned(), record([])?),
            },
        });
    }
    Context::from_pairs(members).map_err(|_| Failed)
}

fn user(subject: &Subject) -> Result<RestrictedExpression, Failed> {
    let groups = RestrictedExpression::new_set(subject.groups.iter().map(|group| text(group.as_str())));
    record([("issuer", text(subject.user.issuer.as_str())), ("sub", text(&subject.user.subject)), ("groups", groups)])
}

fn agent(facts: &Facts<'_>) -> Result<RestrictedExpression, Failed> {
    let seen = facts.subject.agents.get(..facts.agents_seen).unwrap_or_default();
    let (Some(root), Some(last)) = (seen.first(), seen.last()) else {
        return Err(Failed);
    };
    let depth = i64::try_from(seen.len() - 1).map_err(|_| Failed)?;
    let chain = RestrictedExpression::new_set(seen.iter().map(|agent| text(agent.as_str())));
    record([
        ("id", text(last.as_str())),
        ("root", text(root.as_str())),
        ("depth", RestrictedExpression::new_long(depth)),
        ("chain", chain),
    ])
}

fn session(subject: &Subject) -> Result<RestrictedExpression, Failed> {
    record([("id", text(subject.session.as_str())), ("task", text(subject.task.as_str()))])
}

fn tool(facts: &Facts<'_>) -> Result<RestrictedExpression, Failed> {
    let server = facts.call.tool.split_once('/').map_or("", |(server, _)| server);
    record([("name", text(facts.call.tool)), ("server", text(server)), ("risk", text(facts.risk))])
}

fn arguments(arguments: &Object, uses: &Uses) -> Result<RestrictedExpression, Failed> {
    if uses.all_arguments {
        return object(arguments);
    }
    let named = uses.arguments.iter().filter_map(|name| Some((name.clone(), arguments.member(name)?)));
    members(named)
}

/// The parts of a time in UTC. Weekdays follow ISO 8601, with Monday as 1.
fn time(unix_s: i64) -> Result<RestrictedExpression, Failed> {
    let long = RestrictedExpression::new_long;
    let (day, second) = (unix_s.div_euclid(DAY_S), unix_s.rem_euclid(DAY_S));
    // 1 January 1970 was a Thursday.
    let weekday = (day + 3).rem_euclid(7) + 1;
    let moment = jiff::Timestamp::from_second(unix_s).map_err(|_| Failed)?;
    let date = jiff::tz::Offset::UTC.to_datetime(moment).date();
    record([
        ("unix_s", long(unix_s)),
        ("hour_utc", long(second / 3600)),
        ("minute_utc", long(second / 60 % 60)),
        ("weekday_utc", long(weekday)),
        ("date", text(&date.to_string())),
    ])
}

fn record<const N: usize>(members: [(&str, RestrictedExpression); N]) -> Result<RestrictedExpression, Failed> {
    let members = members.into_iter().map(|(name, value)| (name.to_owned(), value));
    RestrictedExpression::new_record(members).map_err(|_| Failed)
}

fn text(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

fn object(object: &Object) -> Result<RestrictedExpression, Failed> {
    members(object.iter().map(|(name, value)| (name.to_owned(), value)))
}

fn members<'a>(members: impl Iterator<Item = (String, &'a Value)>) -> Result<RestrictedExpression, Failed> {
    let present = members.filter(|(_, value)| !matches!(value, Value::Null));
    let converted = present.map(|(name, value)| Ok((name, expression(value)?))).collect::<Result<Vec<_>, Failed>>()?;
    RestrictedExpression::new_record(converted).map_err(|_| Failed)
}

fn expression(value: &Value) -> Result<RestrictedExpression, Failed> {
    Ok(match value {
        // A `null` cannot be left out of a list, because that would change the list.
        Value::Null => return Err(Failed),
        Value::Bool(truth) => RestrictedExpression::new_bool(*truth),
        Value::Number(number) => number_expression(*number)?,
        Value::String(text) => RestrictedExpression::new_string(text.clone()),
        Value::Array(items) => RestrictedExpression::new_set(items.iter().map(expression).collect::<Result<Vec<_>, Failed>>()?),
        Value::Object(members) => object(members)?,
    })
}

/// Converts a number: a whole number to a long, a fraction of at most four digits to a decimal.
fn number_expression(number: Number) -> Result<RestrictedExpression, Failed> {
    if !number.is_comparable() {
        return Err(Failed);
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
        _ => Err(Failed),
    }
}
