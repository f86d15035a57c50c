//! Describes a chain as text for people: *user U authorized agent A, as application P, …; A passed a part of it to B*.
//!
//! The names come from tokens, so control characters are escaped and a claim cannot forge a line of output.

use std::fmt::Write as _;

use crate::model::constraint::{ConstraintMap, escape_unprintable};
use crate::model::request::TokenScope;

/// The facts of the description. An absent fact is described as not named.
pub(super) struct ChainDescription<'a> {
    pub(super) issuer: Option<&'a str>,
    pub(super) user: Option<&'a str>,
    pub(super) application: Option<&'a str>,
    pub(super) session: Option<&'a str>,
    pub(super) task: Option<&'a str>,
    pub(super) levels: Vec<TokenDescription<'a>>,
}

/// The facts about one token.
pub(super) struct TokenDescription<'a> {
    pub(super) agent: Option<&'a str>,
    pub(super) scope: Option<&'a TokenScope>,
    pub(super) exp_s: Option<i64>,
}

/// Writes the description, one line without a full stop.
pub(super) fn write_description(description: &ChainDescription<'_>) -> String {
    let mut out = String::new();
    let mut delegator = None;
    for level in &description.levels {
        let agent = format_name(level.agent);
        let _ = match &delegator {
            None => write!(
                out,
                "user {} of {} authorized agent {agent}, as application {}, for task {} in session {}, with scope {}, until {}",
                format_name(description.user),
                format_name(description.issuer),
                format_name(description.application),
                format_name(description.task),
                format_name(description.session),
                format_scope(level.scope),
                format_time(level.exp_s)
            ),
            Some(delegator) => {
                write!(
                    out,
                    "; {delegator} passed a part of it to {agent}: scope {}, until {}",
                    format_scope(level.scope),
                    format_time(level.exp_s)
                )
            }
        };
        delegator = Some(agent);
    }
    out
}

fn format_name(text: Option<&str>) -> String {
    text.map_or_else(|| "(not named)".to_owned(), escape_unprintable)
}

fn format_time(unix_s: Option<i64>) -> String {
    let Some(unix_s) = unix_s else { return "(no end)".to_owned() };
    jiff::Timestamp::from_second(unix_s).map_or_else(|_| format!("second {unix_s}"), |time| time.to_string())
}

fn format_scope(scope: Option<&TokenScope>) -> String {
    match scope {
        None => "(not readable)".to_owned(),
        Some(scope) if scope.tools.is_empty() => "(nothing)".to_owned(),
        Some(scope) => {
            let tools: Vec<String> =
                scope.tools.iter().map(|(tool, map)| format!("{}{}", escape_unprintable(tool), format_arguments(map))).collect();
            tools.join(", ")
        }
    }
}

fn format_arguments(map: &ConstraintMap) -> String {
    if map.named.is_empty() && map.allows_unnamed {
        return String::new();
    }
    let named = map.named.iter().map(|(name, argument)| {
        let optional = if argument.optional { "?" } else { "" };
        format!("{}{optional} {}", escape_unprintable(name), argument.constraint.describe())
    });
    let parts: Vec<String> = named.chain(map.allows_unnamed.then(|| "anything else".to_owned())).collect();
    format!("({})", if parts.is_empty() { "no arguments".to_owned() } else { parts.join("; ") })
}
