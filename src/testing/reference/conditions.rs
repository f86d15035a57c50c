//! Conditions for the reference: builds the whole `context` as Cedar's JSON, and evaluates the expression on its own.
//!
//! `policy/condition.rs` takes another route to the same answer: it builds only the parts that an expression reads, without JSON,
//! and asks a policy set. Arguments that contain Cedar's escapes (`__entity`, `__extn`) are not supported here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::str::FromStr as _;

use cedar_policy::{Context, Entities, EntityUid, EvalResult, Expression, Request, eval_expression};
use serde_json::{Map, json};

use crate::model::json::{JsonObject, Value};
use crate::model::request::{DelegationSubject, ToolCall};
use crate::policy::document::Document;

/// Whether a condition holds; `None` if it cannot be evaluated.
pub(super) fn holds(text: &str, documents: &[Document], subject: &DelegationSubject, call: &ToolCall<'_>) -> Option<bool> {
    let context = Context::from_json_value(context(documents, subject, call)?, None).ok()?;
    let nobody = EntityUid::from_str(r#"T::"t""#).ok()?;
    let request = Request::new(nobody.clone(), nobody.clone(), nobody, context, None).ok()?;
    match eval_expression(&request, &Entities::empty(), &expression(text)?) {
        Ok(EvalResult::Bool(truth)) => Some(truth),
        _ => None,
    }
}

/// Parses each text once for each thread, because the cases are many and the texts few.
fn expression(text: &str) -> Option<Expression> {
    thread_local! {
        static READ: RefCell<HashMap<String, Expression>> = RefCell::default();
    }
    READ.with_borrow_mut(|read| {
        if !read.contains_key(text) {
            read.insert(text.to_owned(), Expression::from_str(text).ok()?);
        }
        read.get(text).cloned()
    })
}

fn context(documents: &[Document], subject: &DelegationSubject, call: &ToolCall<'_>) -> Option<serde_json::Value> {
    let groups: Vec<&str> = subject.groups.iter().map(|group| group.as_str()).collect();
    let chain: Vec<&str> = subject.agents.iter().map(|agent| agent.as_str()).collect();
    let (_, tool) = super::find_tool(documents, call.tool)?;
    let time = jiff::tz::Offset::UTC.to_datetime(jiff::Timestamp::from_second(call.unix_s).ok()?);
    Some(json!({
        "user": { "issuer": subject.user.issuer.as_str(), "sub": &*subject.user.subject, "groups": groups },
        "application": { "id": subject.application.as_str() },
        "agent": { "id": chain.last()?, "root": chain.first()?, "depth": chain.len() - 1, "chain": chain },
        "session": { "id": subject.session.as_str(), "task": subject.task.as_str() },
        "tool": { "name": call.tool, "server": call.tool.split('/').next()?, "risk": tool.risk.as_str() },
        "args": object(call.arguments)?,
        "time": {
            "unix_s": call.unix_s,
            "hour_utc": time.hour(),
            "minute_utc": time.minute(),
            "weekday_utc": time.weekday().to_monday_one_offset(),
            "date": format!("{:04}-{:02}-{:02}", time.year(), time.month(), time.day()),
        },
        "env": call.environment.map_or_else(|| Some(json!({})), object)?,
    }))
}

fn object(object: &JsonObject) -> Option<serde_json::Value> {
    let members = object.iter().filter(|(_, value)| !matches!(value, Value::Null));
    let members = members.map(|(name, value)| Some((name.to_owned(), json_of(value)?))).collect::<Option<Map<_, _>>>()?;
    Some(serde_json::Value::Object(members))
}

fn json_of(value: &Value) -> Option<serde_json::Value> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(truth) => json!(truth),
        Value::Number(number) if number.as_f64().fract() == 0.0 => json!(number.as_f64() as i64),
        Value::Number(number) => json!({ "__extn": { "fn": "decimal", "arg": format!("{}", number.as_f64()) } }),
        Value::String(text) => json!(text),
        Value::Array(items) => serde_json::Value::Array(items.iter().map(json_of).collect::<Option<_>>()?),
        Value::Object(members) => object(members)?,
    })
}
