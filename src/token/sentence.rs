//! A chain in words, for people who must judge it: *user U authorized agent A, as application P, …; A passed a part of it to B*.
//!
//! Texts come from tokens, so control characters are written as escapes: a claim cannot fake a line of output.

use std::fmt::Write as _;

use crate::model::constraint::{ArgumentMap, Bound, Constraint, Range};
use crate::model::json::Value;
use crate::model::request::Scope;

/// What there is to tell; what is absent is told as unknown.
pub(super) struct Story<'a> {
    pub(super) issuer: Option<&'a str>,
    pub(super) user: Option<&'a str>,
    pub(super) application: Option<&'a str>,
    pub(super) session: Option<&'a str>,
    pub(super) task: Option<&'a str>,
    pub(super) levels: Vec<Part<'a>>,
}

/// What there is to tell of one token.
pub(super) struct Part<'a> {
    pub(super) agent: Option<&'a str>,
    pub(super) scope: Option<&'a Scope>,
    pub(super) exp_s: Option<i64>,
}

/// The sentence, one line without a full stop.
pub(super) fn write(story: &Story<'_>) -> String {
    let mut out = String::new();
    let mut giver = None;
    for level in &story.levels {
        let agent = name(level.agent);
        let _ = match &giver {
            None => write!(
                out,
                "user {} of {} authorized agent {agent}, as application {}, for task {} in session {}, with scope {}, until {}",
                name(story.user),
                name(story.issuer),
                name(story.application),
                name(story.task),
                name(story.session),
                scope(level.scope),
                time(level.exp_s)
            ),
            Some(giver) => {
                write!(out, "; {giver} passed a part of it to {agent}: scope {}, until {}", scope(level.scope), time(level.exp_s))
            }
        };
        giver = Some(agent);
    }
    out
}

fn name(text: Option<&str>) -> String {
    text.map_or_else(|| "(not named)".to_owned(), plain)
}

/// Text with what does not print escaped.
fn plain(text: &str) -> String {
    let quotes = |character| matches!(character, '"' | '\'' | '\\');
    text.chars().fold(String::with_capacity(text.len()), |mut out, character| {
        if quotes(character) {
            out.push(character)
        } else {
            out.extend(character.escape_debug())
        }
        out
    })
}

fn time(unix_s: Option<i64>) -> String {
    let Some(unix_s) = unix_s else { return "(no end)".to_owned() };
    jiff::Timestamp::from_second(unix_s).map_or_else(|_| format!("second {unix_s}"), |time| time.to_string())
}

fn scope(scope: Option<&Scope>) -> String {
    match scope {
        None => "(not readable)".to_owned(),
        Some(scope) if scope.tools.is_empty() => "(nothing)".to_owned(),
        Some(scope) => {
            let tools: Vec<String> = scope.tools.iter().map(|(tool, map)| format!("{}{}", plain(tool), arguments(map))).collect();
            tools.join(", ")
        }
    }
}

fn arguments(map: &ArgumentMap) -> String {
    if map.named.is_empty() && map.open {
        return String::new();
    }
    let named = map.named.iter().map(|(name, argument)| {
        let optional = if argument.optional { "?" } else { "" };
        format!("{}{optional} {}", plain(name), constraint(&argument.constraint))
    });
    let parts: Vec<String> = named.chain(map.open.then(|| "anything else".to_owned())).collect();
    format!("({})", if parts.is_empty() { "no arguments".to_owned() } else { parts.join("; ") })
}

fn constraint(of: &Constraint) -> String {
    match of {
        Constraint::Exact(value) => format!("= {}", value_text(value)),
        Constraint::Range(range) => range_text(range),
        Constraint::OneOf(values) => format!("one of {}", list(values)),
        Constraint::NotOneOf(excluded) => format!("none of {}", list(excluded)),
        Constraint::Contains(required) => format!("with all of {}", list(required)),
        Constraint::Subset(allowed) => format!("only of {}", list(allowed)),
        Constraint::All(clauses) => clauses_text(clauses, " and "),
        Constraint::Any(clauses) => clauses_text(clauses, " or "),
        Constraint::Wildcard => "anything".to_owned(),
    }
}

fn clauses_text(clauses: &[Constraint], between: &str) -> String {
    let clauses: Vec<String> = clauses.iter().map(constraint).collect();
    format!("({})", clauses.join(between))
}

fn range_text(range: &Range) -> String {
    let end = |bound: &Bound, open: &str, closed: &str| {
        format!("{} {}", if bound.inclusive { closed } else { open }, Value::Number(bound.at).to_jcs())
    };
    let ends: Vec<String> =
        [range.min.as_ref().map(|min| end(min, ">", ">=")), range.max.as_ref().map(|max| end(max, "<", "<="))]
            .into_iter()
            .flatten()
            .collect();
    if ends.is_empty() { "any number".to_owned() } else { ends.join(" and ") }
}

fn list(values: &[Value]) -> String {
    format!("[{}]", values.iter().map(value_text).collect::<Vec<_>>().join(", "))
}

fn value_text(value: &Value) -> String {
    plain(&value.to_jcs())
}
