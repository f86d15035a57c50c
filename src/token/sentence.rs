//! Describes a chain as text for people: *user U authorized agent A, as application P, …; A passed a part of it to B*.
//!
//! The names come from tokens, so control characters are escaped and a claim cannot forge a line of output.

use std::fmt::Write as _;

use crate::model::constraint::{ArgumentMap, printable};
use crate::model::request::Scope;

/// The facts of the description. An absent fact is described as not named.
pub(super) struct Story<'a> {
    pub(super) issuer: Option<&'a str>,
    pub(super) user: Option<&'a str>,
    pub(super) application: Option<&'a str>,
    pub(super) session: Option<&'a str>,
    pub(super) task: Option<&'a str>,
    pub(super) levels: Vec<Part<'a>>,
}

/// The facts about one token.
pub(super) struct Part<'a> {
    pub(super) agent: Option<&'a str>,
    pub(super) scope: Option<&'a Scope>,
    pub(super) exp_s: Option<i64>,
}

/// Writes the description, one line without a full stop.
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
    text.map_or_else(|| "(not named)".to_owned(), printable)
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
            let tools: Vec<String> =
                scope.tools.iter().map(|(tool, map)| format!("{}{}", printable(tool), arguments(map))).collect();
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
        format!("{}{optional} {}", printable(name), argument.constraint.describe())
    });
    let parts: Vec<String> = named.chain(map.open.then(|| "anything else".to_owned())).collect();
    format!("({})", if parts.is_empty() { "no arguments".to_owned() } else { parts.join("; ") })
}
