//! Formats constraints as text for people who review them.
//!
//! The values come from tokens and documents, so unprintable characters are escaped: a value cannot forge a line of output.

use super::{Constraint, ConstraintMap, NumberRange, RangeBound, abbreviate};
use crate::model::json::{JsonObject, Value};

impl Constraint {
    /// The condition on a value: `<= 500`, `one of ["EUR"]`, `= 3`, `anything`.
    pub fn describe(&self) -> String {
        match self {
            Constraint::Exact(value) => format!("= {}", format_value(value)),
            Constraint::Range(range) => format_range(range),
            Constraint::OneOf(values) => format!("one of {}", format_list(values)),
            Constraint::NotOneOf(excluded) => format!("none of {}", format_list(excluded)),
            Constraint::Contains(required) => format!("with all of {}", format_list(required)),
            Constraint::Subset(allowed) => format!("only of {}", format_list(allowed)),
            Constraint::All(clauses) => format_clauses(clauses, " and "),
            Constraint::Any(clauses) => format_clauses(clauses, " or "),
            Constraint::Wildcard => "anything".to_owned(),
        }
    }
}

impl ConstraintMap {
    /// Describes every argument at fault and its required value; `None` if the arguments satisfy the map.
    pub fn describe_violations(&self, arguments: &JsonObject) -> Option<String> {
        let named = self.named.iter().filter_map(|(name, argument)| {
            let must = || format!("argument `{}` must be {}", abbreviate(name), argument.constraint.describe());
            match arguments.member(name) {
                Some(value) => (!argument.constraint.matches(value)).then(must),
                None => (!argument.optional).then(|| format!("{}, and is missing", must())),
            }
        });
        let unnamed_arguments = arguments.iter().filter(|(name, _)| !self.allows_unnamed && !self.named.contains_key(name));
        let unnamed_arguments = unnamed_arguments.map(|(name, _)| format!("argument `{}` must be left out", abbreviate(name)));
        let all: Vec<String> = named.chain(unnamed_arguments).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// Escapes the characters that do not print.
pub fn escape_unprintable(text: &str) -> String {
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

fn format_clauses(clauses: &[Constraint], between: &str) -> String {
    let clauses: Vec<String> = clauses.iter().map(Constraint::describe).collect();
    format!("({})", clauses.join(between))
}

fn format_range(range: &NumberRange) -> String {
    let end = |bound: &RangeBound, open: &str, closed: &str| {
        format!("{} {}", if bound.inclusive { closed } else { open }, Value::Number(bound.value).to_jcs())
    };
    let ends: Vec<String> =
        [range.min.as_ref().map(|min| end(min, ">", ">=")), range.max.as_ref().map(|max| end(max, "<", "<="))]
            .into_iter()
            .flatten()
            .collect();
    if ends.is_empty() { "any number".to_owned() } else { ends.join(" and ") }
}

fn format_list(values: &[Value]) -> String {
    format!("[{}]", values.iter().map(format_value).collect::<Vec<_>>().join(", "))
}

fn format_value(value: &Value) -> String {
    escape_unprintable(&value.to_jcs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::json;

    #[test]
    fn constraints_in_words() {
        for (text, words) in [
            (r#"{"constraint_type":"exact","value":"a\"\u202e"}"#, r#"= "a\"\u{202e}""#),
            (r#"{"constraint_type":"range"}"#, "any number"),
            (r#"{"constraint_type":"range","min":1,"min_inclusive":false,"max":5.5}"#, "> 1 and <= 5.5"),
            (r#"{"constraint_type":"range","min":1,"max":5,"max_inclusive":false}"#, ">= 1 and < 5"),
            (r#"{"constraint_type":"one_of","values":["a",1]}"#, r#"one of ["a", 1]"#),
            (r#"{"constraint_type":"not_one_of","excluded":["a",1]}"#, r#"none of ["a", 1]"#),
            (r#"{"constraint_type":"contains","required":["a",1]}"#, r#"with all of ["a", 1]"#),
            (r#"{"constraint_type":"subset","allowed":["a",1]}"#, r#"only of ["a", 1]"#),
            (
                r#"{"constraint_type":"all","constraints":[{"constraint_type":"range","max":5},{"constraint_type":"not_one_of","excluded":[3]}]}"#,
                "(<= 5 and none of [3])",
            ),
            (
                r#"{"constraint_type":"any","constraints":[{"constraint_type":"exact","value":1},{"constraint_type":"exact","value":2}]}"#,
                "(= 1 or = 2)",
            ),
            (r#"{"constraint_type":"wildcard"}"#, "anything"),
        ] {
            assert_eq!(Constraint::parse(&json::parse(text.as_bytes()).unwrap()).unwrap().describe(), words);
        }
    }

    /// Where the words say nothing, the map admits the call.
    #[test]
    fn what_arguments_lack() {
        let one = r#"{"constraint_type":"exact","value":1}"#;
        let closed = format!(r#"{{"a":{one},"b":{{"constraint_type":"range","max":5,"optional":true}}}}"#);
        let open = format!(r#"{{"a":{one},"*":{{"constraint_type":"wildcard"}}}}"#);
        for (map, arguments, expected) in [
            (&closed, r#"{"a":1}"#, None),
            (&closed, r#"{"a":1,"b":5}"#, None),
            (&closed, r#"{"a":1,"b":6}"#, Some("argument `b` must be <= 5")),
            (&closed, "{}", Some("argument `a` must be = 1, and is missing")),
            (&closed, r#"{"a":2,"c":0}"#, Some("argument `a` must be = 1; argument `c` must be left out")),
            (&open, r#"{"a":1,"c":0}"#, None),
            (&open, r#"{"a":2,"c":0}"#, Some("argument `a` must be = 1")),
        ] {
            let map = ConstraintMap::parse(&json::parse(map.as_bytes()).unwrap()).unwrap();
            let arguments = json::parse_object(arguments.as_bytes()).unwrap();
            let lacks = map.describe_violations(&arguments);
            assert_eq!(lacks.as_deref(), expected);
            assert_eq!(map.check_arguments(&arguments).is_ok(), lacks.is_none());
        }
    }
}
