//! Constraints on the arguments of a call. This is the only constraint type in the program: tokens, policies and approvals use it.
//!
//! Types and attenuation follow draft-niyikiza-oauth-attenuating-agent-tokens-02. An argument map is closed: an argument that it does not
//! name is refused, unless the map has `"*"`. Unknown input is always refused.

mod display;

pub use display::escape_unprintable;

use std::collections::HashSet;

use super::json::{JsonNumber, JsonObject, Value};
use super::limits::CONSTRAINT_NESTING_MAX;
use super::sorted_map::SortedMap;

/// Why a constraint or a map of constraints is refused. One line, with user input in backticks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An unknown type, an unknown or missing member, an empty `all` or `any`, or a number that cannot be compared.
    #[error("{0}")]
    Malformed(String),
    /// Nested deeper than [`CONSTRAINT_NESTING_MAX`].
    #[error("constraints are nested deeper than {CONSTRAINT_NESTING_MAX}")]
    TooNested,
}

/// A condition on one value.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// Equal to this scalar.
    Exact(Value),
    /// A number within bounds.
    Range(NumberRange),
    /// One of these values; the list is not empty.
    OneOf(Vec<Value>),
    /// None of these values.
    NotOneOf(Vec<Value>),
    /// A list that contains all of these values.
    Contains(Vec<Value>),
    /// A list that contains only these values.
    Subset(Vec<Value>),
    /// Every clause holds.
    All(Vec<Constraint>),
    /// At least one clause holds.
    Any(Vec<Constraint>),
    /// Any value.
    Wildcard,
}

/// Bounds of a number. Each bound may be absent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NumberRange {
    /// The lower bound.
    pub min: Option<RangeBound>,
    /// The upper bound.
    pub max: Option<RangeBound>,
}

/// One end of a [`NumberRange`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RangeBound {
    /// The number.
    pub value: JsonNumber,
    /// Whether the number itself lies within the range.
    pub inclusive: bool,
}

/// The constraint of one argument.
#[derive(Clone, Debug, PartialEq)]
pub struct ArgumentConstraint {
    /// The constraint on the value.
    pub constraint: Constraint,
    /// Whether the argument may be absent.
    pub optional: bool,
}

/// The constraints on the arguments of a tool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConstraintMap {
    /// The named arguments.
    pub named: SortedMap<ArgumentConstraint>,
    /// Whether arguments that are not named are accepted. It is set if the map has `"*"`.
    pub allows_unnamed: bool,
}

impl Constraint {
    /// Reads the long form: an object with `constraint_type` and exactly the members of that type.
    ///
    /// # Errors
    /// See [`Error`]. No unknown member is ignored.
    pub fn parse(value: &Value) -> Result<Self, Error> {
        Self::parse_members(value, 1, false).map(|(constraint, _)| constraint)
    }

    /// Whether a value satisfies the constraint. Values are compared in canonical form.
    pub fn matches(&self, value: &Value) -> bool {
        match self {
            Constraint::Exact(expected) => expected == value,
            Constraint::Range(range) => matches!(value, Value::Number(number) if range.contains(*number)),
            Constraint::OneOf(values) => values.contains(value),
            Constraint::NotOneOf(excluded) => !excluded.contains(value),
            Constraint::Contains(required) => value.as_array().is_some_and(|items| is_subset(required, items)),
            Constraint::Subset(allowed) => value.as_array().is_some_and(|items| is_subset(items, allowed)),
            Constraint::All(clauses) => clauses.iter().all(|clause| clause.matches(value)),
            Constraint::Any(clauses) => clauses.iter().any(|clause| clause.matches(value)),
            Constraint::Wildcard => true,
        }
    }

    /// Whether this constraint is at least as tight as `parent`, by the table of type pairs. Every pair outside of the table is refused.
    ///
    /// A refusal does not mean that the child is wider: `all[range]` under `range` may be tighter and is still refused.
    pub fn attenuates(&self, parent: &Constraint) -> bool {
        match (parent, self) {
            (Constraint::Wildcard, _) => true,
            (Constraint::Exact(parent), Constraint::Exact(child)) => parent == child,
            (Constraint::Range(parent), Constraint::Range(child)) => child.is_within(parent),
            (Constraint::Range(parent), Constraint::Exact(Value::Number(child))) => parent.contains(*child),
            (Constraint::OneOf(parent), Constraint::OneOf(child)) => is_subset(child, parent),
            (Constraint::OneOf(parent), Constraint::Exact(child)) => parent.contains(child),
            (Constraint::NotOneOf(parent), Constraint::NotOneOf(child)) => is_subset(parent, child),
            (Constraint::Contains(parent), Constraint::Contains(child)) => is_subset(parent, child),
            (Constraint::Subset(parent), Constraint::Subset(child)) => is_subset(child, parent),
            (Constraint::All(parent), Constraint::All(child)) => {
                parent.iter().all(|clause| child.iter().any(|narrower| narrower.attenuates(clause)))
            }
            (Constraint::Any(parent), Constraint::Any(child)) => {
                child.iter().all(|clause| parent.iter().any(|wider| clause.attenuates(wider)))
            }
            _ => false,
        }
    }

    /// Whether the value has a type that the constraint can match.
    ///
    /// If it does not, a deny entry of a policy still applies to the value. So a caller cannot escape a deny by sending a number as text.
    pub fn applies_to_type_of(&self, value: &Value) -> bool {
        let same_type = |other: &Value| std::mem::discriminant(other) == std::mem::discriminant(value);
        match self {
            Constraint::Exact(expected) => same_type(expected),
            Constraint::Range(_) => matches!(value, Value::Number(_)),
            Constraint::OneOf(values) => values.iter().any(same_type),
            Constraint::NotOneOf(excluded) => excluded.is_empty() || excluded.iter().any(same_type),
            Constraint::Contains(_) | Constraint::Subset(_) => matches!(value, Value::Array(_)),
            Constraint::All(clauses) | Constraint::Any(clauses) => clauses.iter().all(|clause| clause.applies_to_type_of(value)),
            Constraint::Wildcard => true,
        }
    }

    /// Reads a constraint and, on the outermost level only, `optional`.
    fn parse_members(value: &Value, nesting: usize, outermost: bool) -> Result<(Self, bool), Error> {
        if nesting > CONSTRAINT_NESTING_MAX {
            return Err(Error::TooNested);
        }
        let Some(object) = value.as_object() else {
            return Err(malformed_error("a constraint must be an object with `constraint_type`"));
        };
        let Some(kind) = object.member("constraint_type").and_then(Value::as_str) else {
            return Err(malformed_error("a constraint has no `constraint_type`"));
        };
        let allowed: &[&str] = match kind {
            "exact" => &["value"],
            "range" => &["min", "max", "min_inclusive", "max_inclusive"],
            "one_of" => &["values"],
            "not_one_of" => &["excluded"],
            "contains" => &["required"],
            "subset" => &["allowed"],
            "all" | "any" => &["constraints"],
            "wildcard" => &[],
            unknown => return Err(malformed_error(format!("unknown constraint_type `{}`", abbreviate(unknown)))),
        };
        let mut optional = false;
        for (name, member) in object.iter() {
            if name == "optional" && outermost {
                optional = member.as_bool().ok_or_else(|| malformed_error("`optional` must be true or false"))?;
            } else if name != "constraint_type" && !allowed.contains(&name) {
                return Err(malformed_error(format!("constraint `{kind}` has an unknown member `{}`", abbreviate(name))));
            }
        }
        let constraint = match kind {
            "exact" => match object.member("value") {
                Some(value) if value.is_scalar() => Constraint::Exact(require_comparable(value)?),
                _ => return Err(malformed_error("constraint `exact` needs `value`, a string, number, truth value or null")),
            },
            "range" => Constraint::Range(NumberRange {
                min: parse_bound(object, "min", "min_inclusive")?,
                max: parse_bound(object, "max", "max_inclusive")?,
            }),
            "one_of" => Constraint::OneOf(parse_values(object, kind, "values", true)?),
            "not_one_of" => Constraint::NotOneOf(parse_values(object, kind, "excluded", false)?),
            "contains" => Constraint::Contains(parse_values(object, kind, "required", false)?),
            "subset" => Constraint::Subset(parse_values(object, kind, "allowed", false)?),
            "all" => Constraint::All(parse_clauses(object, kind, nesting)?),
            "any" => Constraint::Any(parse_clauses(object, kind, nesting)?),
            _ => Constraint::Wildcard,
        };
        Ok((constraint, optional))
    }
}

impl NumberRange {
    /// Whether a number lies within the bounds.
    pub fn contains(&self, number: JsonNumber) -> bool {
        let value = number.as_f64();
        let above = self.min.is_none_or(|min| value > min.value.as_f64() || (min.inclusive && number == min.value));
        let below = self.max.is_none_or(|max| value < max.value.as_f64() || (max.inclusive && number == max.value));
        above && below
    }

    fn is_within(&self, parent: &NumberRange) -> bool {
        let min = parent.min.is_none_or(|wider| {
            self.min.is_some_and(|own| {
                own.value.as_f64() > wider.value.as_f64() || (own.value == wider.value && (wider.inclusive || !own.inclusive))
            })
        });
        let max = parent.max.is_none_or(|wider| {
            self.max.is_some_and(|own| {
                own.value.as_f64() < wider.value.as_f64() || (own.value == wider.value && (wider.inclusive || !own.inclusive))
            })
        });
        min && max
    }
}

impl ConstraintMap {
    /// A map that accepts every argument, which is the meaning of `{}`.
    pub fn unconstrained() -> Self {
        Self { named: SortedMap::default(), allows_unnamed: true }
    }

    /// Reads the argument map of a token. `{}` means `{"*": wildcard}`, and `"*"` must be a plain wildcard.
    ///
    /// # Errors
    /// As [`Constraint::parse`], with the name of the argument.
    pub fn parse(value: &Value) -> Result<Self, Error> {
        let Some(object) = value.as_object() else {
            return Err(malformed_error("the constraints of a tool must be an object"));
        };
        if object.is_empty() {
            return Ok(Self::unconstrained());
        }
        let mut open = false;
        let mut named = Vec::with_capacity(object.len());
        for (name, value) in object.iter() {
            let (constraint, optional) = Constraint::parse_members(value, 1, true).map_err(|error| match error {
                Error::Malformed(message) => malformed_error(format!("argument `{}`: {message}", abbreviate(name))),
                Error::TooNested => Error::TooNested,
            })?;
            if name != "*" {
                named.push((name.into(), ArgumentConstraint { constraint, optional }));
            } else if constraint == Constraint::Wildcard && !optional {
                open = true;
            } else {
                return Err(malformed_error("`*` must be a plain wildcard"));
            }
        }
        Ok(Self { named: named.into_iter().collect(), allows_unnamed: open })
    }

    /// Checks that the arguments of a call satisfy the map.
    ///
    /// # Errors
    /// One line that names the first argument at fault.
    pub fn check_arguments(&self, arguments: &JsonObject) -> Result<(), String> {
        for (name, argument) in self.named.iter() {
            match arguments.member(name) {
                Some(value) if argument.constraint.matches(value) => {}
                Some(_) => return Err(format!("argument `{}` does not satisfy its constraint", abbreviate(name))),
                None if argument.optional => {}
                None => return Err(format!("argument `{}` is required", abbreviate(name))),
            }
        }
        match arguments.iter().find(|(name, _)| !self.allows_unnamed && !self.named.contains_key(name)) {
            Some((name, _)) => Err(format!("argument `{}` is not granted", abbreviate(name))),
            None => Ok(()),
        }
    }

    /// Checks that this map grants nothing that `parent` does not grant.
    ///
    /// # Errors
    /// One line that names the first argument that is wider.
    pub fn check_attenuation(&self, parent: &ConstraintMap) -> Result<(), String> {
        if self.allows_unnamed && !parent.allows_unnamed {
            return Err("`*` is added".to_owned());
        }
        for (name, child) in self.named.iter() {
            match parent.named.get(name) {
                Some(wider) if child.optional && !wider.optional => {
                    return Err(format!("required argument `{}` is made optional", abbreviate(name)));
                }
                Some(wider) if !child.constraint.attenuates(&wider.constraint) => {
                    return Err(format!("the constraint of argument `{}` is not as tight as the parent's", abbreviate(name)));
                }
                None if !parent.allows_unnamed => return Err(format!("argument `{}` is added", abbreviate(name))),
                _ => {}
            }
        }
        for (name, wider) in parent.named.iter() {
            if !self.named.contains_key(name) && (!wider.optional || self.allows_unnamed) {
                return Err(format!("the constraint of argument `{}` is dropped", abbreviate(name)));
            }
        }
        Ok(())
    }
}

/// Shortens user input for a message: at most 64 characters, with control characters escaped.
pub fn abbreviate(text: &str) -> String {
    let mut short: String = text.chars().take(64).flat_map(char::escape_debug).collect();
    if text.chars().nth(64).is_some() {
        short.push('…');
    }
    short
}

fn malformed_error(message: impl Into<String>) -> Error {
    Error::Malformed(message.into())
}

fn require_comparable(value: &Value) -> Result<Value, Error> {
    let refused =
        || malformed_error("a number is beyond ±(2^53-1), or has more digits than a double keeps, and cannot be compared");
    value.is_comparable().then(|| value.clone()).ok_or_else(refused)
}

fn parse_values(object: &JsonObject, kind: &str, name: &str, not_empty: bool) -> Result<Vec<Value>, Error> {
    match object.member(name).and_then(Value::as_array) {
        Some([]) if not_empty => Err(malformed_error(format!("constraint `{kind}` has no `{name}`"))),
        Some(values) => values.iter().map(require_comparable).collect(),
        None => Err(malformed_error(format!("constraint `{kind}` needs `{name}`, a list"))),
    }
}

fn parse_clauses(object: &JsonObject, kind: &str, nesting: usize) -> Result<Vec<Constraint>, Error> {
    match object.member("constraints").and_then(Value::as_array) {
        None | Some([]) => Err(malformed_error(format!("constraint `{kind}` needs `constraints`, a list that is not empty"))),
        Some(clauses) => {
            clauses.iter().map(|clause| Constraint::parse_members(clause, nesting + 1, false).map(|(clause, _)| clause)).collect()
        }
    }
}

fn parse_bound(object: &JsonObject, name: &str, inclusive_name: &str) -> Result<Option<RangeBound>, Error> {
    let inclusive = match object.member(inclusive_name) {
        None => true,
        Some(value) => value.as_bool().ok_or_else(|| malformed_error(format!("`{inclusive_name}` must be true or false")))?,
    };
    match object.member(name) {
        None => Ok(None),
        Some(Value::Number(at)) if at.is_comparable() => Ok(Some(RangeBound { value: *at, inclusive })),
        Some(_) => Err(malformed_error(format!(
            "`{name}` of a range must be a number within ±(2^53-1), of no more digits than a double keeps"
        ))),
    }
}

/// Whether every value of `inner` is in `outer`. Large lists are hashed, because scanning an 8 KiB token could take milliseconds.
fn is_subset(inner: &[Value], outer: &[Value]) -> bool {
    const SCAN_PAIRS_MAX: usize = 1024;
    if inner.len().saturating_mul(outer.len()) <= SCAN_PAIRS_MAX {
        return inner.iter().all(|value| outer.contains(value));
    }
    let outer: HashSet<String> = outer.iter().map(Value::to_jcs).collect();
    inner.iter().all(|value| outer.contains(&value.to_jcs()))
}

#[cfg(test)]
mod tests {
    use super::super::json;
    use super::*;

    fn constraint(text: &str) -> Constraint {
        Constraint::parse(&json::parse(text.as_bytes()).unwrap()).unwrap()
    }

    fn map(text: &str) -> Result<ConstraintMap, Error> {
        ConstraintMap::parse(&json::parse(text.as_bytes()).unwrap())
    }

    #[test]
    fn what_holds() {
        for (text, good, bad) in [
            (r#"{"constraint_type":"exact","value":100}"#, &["100", "1e2", "100.0"][..], &["\"100\"", "101", "[100]"][..]),
            (r#"{"constraint_type":"exact","value":null}"#, &["null"], &["false", "0", "\"\""]),
            (
                r#"{"constraint_type":"range","min":1,"max":5,"max_inclusive":false}"#,
                &["1", "4.999"],
                &["5", "0.9", "\"3\"", "null"],
            ),
            (r#"{"constraint_type":"range"}"#, &["-1e9", "7"], &["\"7\"", "true"]),
            (
                r#"{"constraint_type":"one_of","values":["a",["b"],{"x":1,"y":2}]}"#,
                &["\"a\"", "[\"b\"]", r#"{"y":2,"x":1.0}"#],
                &["\"b\"", "[]"],
            ),
            (r#"{"constraint_type":"not_one_of","excluded":["a"]}"#, &["\"b\"", "1", "[]"], &["\"a\""]),
            (r#"{"constraint_type":"contains","required":["a","b"]}"#, &[r#"["b","c","a"]"#], &[r#"["a"]"#, "\"ab\"", "[]"]),
            (
                r#"{"constraint_type":"subset","allowed":["a","b"]}"#,
                &["[]", r#"["a"]"#, r#"["a","a"]"#],
                &[r#"["a","c"]"#, "\"a\""],
            ),
            (
                r#"{"constraint_type":"any","constraints":[{"constraint_type":"exact","value":1},{"constraint_type":"all","constraints":[{"constraint_type":"wildcard"}]}]}"#,
                &["1", "[]"],
                &[],
            ),
        ] {
            let constraint = constraint(text);
            for value in good {
                assert!(constraint.matches(&json::parse(value.as_bytes()).unwrap()), "{text} {value}");
            }
            for value in bad {
                assert!(!constraint.matches(&json::parse(value.as_bytes()).unwrap()), "{text} {value}");
            }
        }
    }

    #[test]
    fn refused_maps() {
        let nested = |depth: usize| {
            let open = r#"{"constraint_type":"all","constraints":["#.repeat(depth - 1);
            format!(r#"{{"a":{open}{{"constraint_type":"wildcard"}}{}}}"#, "]}".repeat(depth - 1))
        };
        assert!(map(&nested(CONSTRAINT_NESTING_MAX)).is_ok());
        assert_eq!(map(&nested(CONSTRAINT_NESTING_MAX + 1)), Err(Error::TooNested));
        for text in [
            r#"[]"#,
            r#"{"a":"x"}"#,
            r#"{"a":{}}"#,
            r#"{"a":{"constraint_type":"regex","pattern":"."}}"#,
            r#"{"a":{"constraint_type":"Exact","value":1}}"#,
            r#"{"a":{"constraint_type":"exact"}}"#,
            r#"{"a":{"constraint_type":"exact","value":[1]}}"#,
            r#"{"a":{"constraint_type":"exact","value":9007199254740993}}"#,
            r#"{"a":{"constraint_type":"exact","value":1,"note":2}}"#,
            r#"{"a":{"constraint_type":"exact","value":1,"optional":1}}"#,
            r#"{"a":{"constraint_type":"one_of","values":[]}}"#,
            r#"{"a":{"constraint_type":"range","min":"1"}}"#,
            r#"{"a":{"constraint_type":"range","min":1,"min_inclusive":1}}"#,
            r#"{"a":{"constraint_type":"range","max":9007199254740993}}"#,
            r#"{"a":{"constraint_type":"all","constraints":[]}}"#,
            r#"{"a":{"constraint_type":"all","constraints":[{"constraint_type":"wildcard","optional":true}]}}"#,
            r#"{"*":{"constraint_type":"exact","value":1}}"#,
            r#"{"*":{"constraint_type":"wildcard","optional":true}}"#,
        ] {
            assert!(map(text).is_err(), "{text}");
        }
    }

    #[test]
    fn maps_are_closed_and_only_narrow() {
        let exact = |n: u32| format!(r#"{{"constraint_type":"exact","value":{n}}}"#);
        let wild = r#"{"constraint_type":"wildcard"}"#;
        let wild_optional = r#"{"constraint_type":"wildcard","optional":true}"#;
        for (parent, child, narrows) in [
            ("{}".to_owned(), format!(r#"{{"a":{}}}"#, exact(1)), true),
            (format!(r#"{{"a":{wild}}}"#), "{}".to_owned(), false),
            (format!(r#"{{"a":{wild}}}"#), format!(r#"{{"a":{wild_optional}}}"#), false),
            (format!(r#"{{"a":{wild_optional}}}"#), format!(r#"{{"a":{wild}}}"#), true),
            (format!(r#"{{"a":{wild},"b":{wild_optional}}}"#), format!(r#"{{"a":{}}}"#, exact(1)), true),
            (format!(r#"{{"a":{wild},"b":{wild}}}"#), format!(r#"{{"a":{wild}}}"#), false),
            (format!(r#"{{"a":{wild},"b":{wild_optional},"*":{wild}}}"#), format!(r#"{{"a":{wild},"*":{wild}}}"#), false),
            (format!(r#"{{"a":{wild}}}"#), format!(r#"{{"a":{wild},"b":{wild}}}"#), false),
        ] {
            assert_eq!(map(&child).unwrap().check_attenuation(&map(&parent).unwrap()).is_ok(), narrows, "{parent} > {child}");
        }
        let closed = map(&format!(r#"{{"a":{},"b":{wild_optional}}}"#, exact(1))).unwrap();
        for (arguments, admitted) in
            [(r#"{"a":1}"#, true), (r#"{"a":1,"b":[]}"#, true), (r#"{"a":1,"c":0}"#, false), ("{}", false), (r#"{"a":2}"#, false)]
        {
            assert_eq!(
                closed.check_arguments(&json::parse_object(arguments.as_bytes()).unwrap()).is_ok(),
                admitted,
                "{arguments}"
            );
        }
    }

    /// Each end of a range by itself, the lower one and, mirrored, the upper one: `i` includes its number, `x` does not.
    #[test]
    fn the_ends_of_ranges() {
        for (end, sign) in [("min", 1), ("max", -1)] {
            let range = |bound: &str| {
                let members = bound.split_at_checked(1).map_or(String::new(), |(kind, number)| {
                    let number = number.parse::<i64>().unwrap() * sign;
                    format!(r#","{end}":{number},"{end}_inclusive":{}"#, kind == "i")
                });
                constraint(&format!(r#"{{"constraint_type":"range"{members}}}"#))
            };
            for (bound, number, holds) in [("i5", 4, false), ("i5", 5, true), ("i5", 6, true), ("x5", 5, false), ("x5", 6, true)]
            {
                assert_eq!(
                    range(bound).matches(&Value::Number(JsonNumber::from(number * sign))),
                    holds,
                    "{end} {bound}: {number}"
                );
            }
            for (parent, child, narrows) in [
                ("", "", true),
                ("", "i5", true),
                ("i5", "", false),
                ("i5", "i4", false),
                ("i5", "x4", false),
                ("i5", "i5", true),
                ("i5", "x5", true),
                ("i5", "i6", true),
                ("x5", "i5", false),
                ("x5", "x5", true),
                ("x5", "i6", true),
            ] {
                assert_eq!(range(child).attenuates(&range(parent)), narrows, "{end} {parent} > {child}");
            }
        }
        let range = |min: i64, max: i64| constraint(&format!(r#"{{"constraint_type":"range","min":{min},"max":{max}}}"#));
        for (child, narrows) in [(range(1, 9), true), (range(-1, 9), false), (range(1, 11), false)] {
            assert_eq!(child.attenuates(&range(0, 10)), narrows, "{child:?}");
        }
        assert!(
            !range(0, 10).matches(&Value::Number(JsonNumber::from(11)))
                && !range(0, 10).matches(&Value::Number(JsonNumber::from(-1)))
        );
    }

    /// The table of pairs: each with a child that narrows and one that does not.
    #[test]
    fn which_pairs_narrow() {
        let of = |kind: &str, member: &str, values: &str| {
            constraint(&format!(r#"{{"constraint_type":"{kind}","{member}":{values}}}"#))
        };
        let below = |max: u32| format!(r#"{{"constraint_type":"range","max":{max}}}"#);
        let clauses = |kind: &str, clauses: &[u32]| {
            let clauses: Vec<String> = clauses.iter().map(|max| below(*max)).collect();
            of(kind, "constraints", &format!("[{}]", clauses.join(",")))
        };
        let one_of = of("one_of", "values", "[1,2]");
        for (parent, tighter, wider) in [
            (&of("exact", "value", "1"), of("exact", "value", "1"), of("exact", "value", "2")),
            (&constraint(&below(5)), of("exact", "value", "5"), of("exact", "value", "6")),
            (&constraint(&below(5)), constraint(&below(4)), of("one_of", "values", "[1]")),
            (&one_of, of("one_of", "values", "[2]"), of("one_of", "values", "[2,3]")),
            (&one_of, of("exact", "value", "2"), of("exact", "value", "3")),
            (&of("not_one_of", "excluded", "[1]"), of("not_one_of", "excluded", "[2,1]"), of("not_one_of", "excluded", "[2]")),
            (&of("contains", "required", "[1]"), of("contains", "required", "[2,1]"), of("contains", "required", "[2]")),
            (&of("subset", "allowed", "[1,2]"), of("subset", "allowed", "[2]"), of("subset", "allowed", "[3]")),
            (&clauses("all", &[5]), clauses("all", &[9, 4]), clauses("all", &[9])),
            (&clauses("any", &[5, 9]), clauses("any", &[8]), clauses("any", &[8, 10])),
            (&Constraint::Wildcard, Constraint::Wildcard, Constraint::Wildcard),
        ] {
            assert!(tighter.attenuates(parent), "{parent:?} > {tighter:?}");
            assert_eq!(wider.attenuates(parent), *parent == Constraint::Wildcard, "{parent:?} > {wider:?}");
        }
    }

    /// A deny fires on a value of another type than its constraint is about.
    #[test]
    fn of_which_values_a_constraint_speaks() {
        let all = &["null", "true", "1", "\"b\"", "[]", "{}"][..];
        for (text, spoken_of) in [
            (r#"{"constraint_type":"exact","value":"a"}"#, &["\"b\""][..]),
            (r#"{"constraint_type":"range"}"#, &["1"]),
            (r#"{"constraint_type":"one_of","values":["a",2]}"#, &["1", "\"b\""]),
            (r#"{"constraint_type":"not_one_of","excluded":["a",2]}"#, &["1", "\"b\""]),
            (r#"{"constraint_type":"not_one_of","excluded":[]}"#, all),
            (r#"{"constraint_type":"contains","required":["a"]}"#, &["[]"]),
            (r#"{"constraint_type":"subset","allowed":["a"]}"#, &["[]"]),
            (r#"{"constraint_type":"all","constraints":[{"constraint_type":"wildcard"},{"constraint_type":"range"}]}"#, &["1"]),
            (r#"{"constraint_type":"any","constraints":[{"constraint_type":"wildcard"},{"constraint_type":"range"}]}"#, &["1"]),
            (r#"{"constraint_type":"wildcard"}"#, all),
        ] {
            let constraint = constraint(text);
            let found: Vec<&str> = all
                .iter()
                .copied()
                .filter(|value| constraint.applies_to_type_of(&json::parse(value.as_bytes()).unwrap()))
                .collect();
            assert_eq!(found, spoken_of, "{text}");
        }
    }

    #[test]
    fn user_input_in_a_message_is_short_and_prints() {
        let long = "ä".repeat(64);
        for (text, expected) in [
            ("crm/read", "crm/read".to_owned()),
            ("a\u{1b}[2J\nb", r"a\u{1b}[2J\nb".to_owned()),
            (&long, long.clone()),
            (&format!("{long}b"), format!("{long}…")),
        ] {
            assert_eq!(abbreviate(text), expected);
        }
    }

    #[test]
    fn large_sets_compare_as_small_ones_do() {
        let many: Vec<Value> = (0..200).map(|n| Value::Number(JsonNumber::from(n as f64))).collect();
        let few: Vec<Value> = (0..50).map(|n| Value::Number(JsonNumber::from(i64::from(n)))).collect();
        assert!(is_subset(&few, &many) && !is_subset(&many, &few));
    }
}
