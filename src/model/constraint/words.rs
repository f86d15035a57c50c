//! Formats constraints as text for people who review them.
//!
//! The values come from tokens and documents, so unprintable characters are escaped: a value cannot forge a line of output.

use super::{ArgumentMap, Bound, Constraint, Range, abridged};
use crate::model::json::{Object, Value};

impl Constraint {
    /// The condition on a value: `<= 500`, `one of ["EUR"]`, `= 3`, `anything`.
    pub fn describe(&self) -> String {
        match self {
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
}

impl ArgumentMap {
    /// Describes every argument at fault and its required value; `None` if the arguments satisfy the map.
    pub fn lacks(&self, arguments: &Object) -> Option<String> {
        let named = self.named.iter().filter_map(|(name, argument)| {
            let must = || format!("argument `{}` must be {}", abridged(name), argument.constraint.describe());
            match arguments.member(name) {
                Some(value) => (!argument.constraint.holds(value)).then(must),
                None => (!argument.optional).then(|| format!("{}, and is missing", must())),
            }
        });
        let stray = arguments.iter().filter(|(name, _)| !self.open && !self.named.contains_key(name));
        let stray = stray.map(|(name, _)| format!("argument `{}` must be left out", abridged(name)));
        let all: Vec<String> = named.chain(stray).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// Escapes the characters that do not print.
pub fn printable(text: &str) -> String {
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

fn clauses_text(clauses: &[Constraint], between: &str) -> String {
    let clauses: Vec<String> = clauses.iter().map(Constraint::describe).collect();
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
    printable(&value.to_jcs())
}
