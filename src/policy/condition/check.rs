//! Checks a condition: it may read only members that `context` has, and apply operators only to values of a fitting type.
//!
//! The check works on Cedar's JSON form of a parsed policy, so the text is not parsed twice. The types of arguments are not known
//! before a call. They may be of any type, and a wrong type fails the evaluation. Look next at `context.rs`.

use serde_json::{Value, json};

use super::super::diagnostic::suggestion;
use super::{Part, Uses};

/// The type of an expression. `Any` is a type that only the call determines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Any,
    Bool,
    Long,
    Text,
    Set,
    Record,
    Decimal,
    Ip,
    DateTime,
    Duration,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Any => "anything",
            Kind::Bool => "a truth value",
            Kind::Long => "a whole number",
            Kind::Text => "a string",
            Kind::Set => "a set",
            Kind::Record => "a record",
            Kind::Decimal => "a decimal",
            Kind::Ip => "an IP address",
            Kind::DateTime => "a time",
            Kind::Duration => "a duration",
        }
    }

    fn fits(self, expected: Kind) -> bool {
        self == expected || self == Kind::Any || expected == Kind::Any
    }
}

/// The members of `context` and the types of their members. `None`: only the call determines them.
type Members = &'static [(&'static str, Kind)];
const CONTEXT: &[(&str, Part, Option<Members>)] = &[
    ("user", Part::User, Some(&[("issuer", Kind::Text), ("sub", Kind::Text), ("groups", Kind::Set)])),
    ("application", Part::Application, Some(&[("id", Kind::Text)])),
    ("agent", Part::Agent, Some(&[("id", Kind::Text), ("root", Kind::Text), ("depth", Kind::Long), ("chain", Kind::Set)])),
    ("session", Part::Session, Some(&[("id", Kind::Text), ("task", Kind::Text)])),
    ("tool", Part::Tool, Some(&[("name", Kind::Text), ("server", Kind::Text), ("risk", Kind::Text)])),
    ("args", Part::Arguments, None),
    (
        "time",
        Part::Time,
        Some(&[
            ("unix_s", Kind::Long),
            ("hour_utc", Kind::Long),
            ("minute_utc", Kind::Long),
            ("weekday_utc", Kind::Long),
            ("date", Kind::Text),
        ]),
    ),
    ("env", Part::Environment, None),
];

/// The functions and methods of Cedar's extensions, with the types of their operands and of their result.
const FUNCTIONS: &[(&str, &[Kind], Kind)] = &[
    ("decimal", &[Kind::Text], Kind::Decimal),
    ("lessThan", &[Kind::Decimal, Kind::Decimal], Kind::Bool),
    ("lessThanOrEqual", &[Kind::Decimal, Kind::Decimal], Kind::Bool),
    ("greaterThan", &[Kind::Decimal, Kind::Decimal], Kind::Bool),
    ("greaterThanOrEqual", &[Kind::Decimal, Kind::Decimal], Kind::Bool),
    ("ip", &[Kind::Text], Kind::Ip),
    ("isIpv4", &[Kind::Ip], Kind::Bool),
    ("isIpv6", &[Kind::Ip], Kind::Bool),
    ("isLoopback", &[Kind::Ip], Kind::Bool),
    ("isMulticast", &[Kind::Ip], Kind::Bool),
    ("isInRange", &[Kind::Ip, Kind::Ip], Kind::Bool),
    ("datetime", &[Kind::Text], Kind::DateTime),
    ("duration", &[Kind::Text], Kind::Duration),
    ("offset", &[Kind::DateTime, Kind::Duration], Kind::DateTime),
    ("durationSince", &[Kind::DateTime, Kind::DateTime], Kind::Duration),
    ("toDate", &[Kind::DateTime], Kind::DateTime),
    ("toTime", &[Kind::DateTime], Kind::Duration),
    ("toMilliseconds", &[Kind::Duration], Kind::Long),
    ("toSeconds", &[Kind::Duration], Kind::Long),
    ("toMinutes", &[Kind::Duration], Kind::Long),
    ("toHours", &[Kind::Duration], Kind::Long),
    ("toDays", &[Kind::Duration], Kind::Long),
];

/// Checks a policy with one `when` clause, in Cedar's JSON form, and returns the parts of `context` that it reads.
pub(super) fn check(policy: &Value) -> Result<Uses, String> {
    let conditions = policy.get("conditions").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let [clause] = conditions else {
        return Err("the condition is not one expression".to_owned());
    };
    let mut checker = Checker { uses: Uses::default() };
    let kind = checker.kind(clause.get("body").unwrap_or(&Value::Null))?;
    expect(kind, Kind::Bool, "a condition")?;
    Ok(checker.uses)
}

/// Infers types, and collects the parts of the context that the expression reads.
struct Checker {
    uses: Uses,
}

impl Checker {
    /// Infers the type of an expression. An operator on a wrong type is an error.
    fn kind(&mut self, expression: &Value) -> Result<Kind, String> {
        let Some((operator, operands)) = expression.as_object().and_then(|node| node.iter().next()) else {
            return Err(unreadable());
        };
        let side = |name: &str| operands.get(name).unwrap_or(&Value::Null);
        match operator.as_str() {
            "Value" => literal(operands),
            "Var" if operands == "context" => {
                Err("`context` by itself is no value: name a member of it, such as `context.args`".to_owned())
            }
            "Var" => {
                let name = operands.as_str().unwrap_or_default();
                Err(format!("`{name}` has no meaning here: a condition looks at `context` alone"))
            }
            "!" => self.operand(side("arg"), Kind::Bool, "!").map(|()| Kind::Bool),
            "neg" => self.operand(side("arg"), Kind::Long, "-").map(|()| Kind::Long),
            "isEmpty" => self.operand(side("arg"), Kind::Set, "isEmpty").map(|()| Kind::Bool),
            "==" | "!=" => {
                let (left, right) = (self.kind(side("left"))?, self.kind(side("right"))?);
                if !left.fits(right) {
                    let (left, right) = (left.name(), right.name());
                    return Err(format!("`{operator}` compares {left} with {right}, which are never equal"));
                }
                Ok(Kind::Bool)
            }
            "<" | "<=" | ">" | ">=" => self.ordered(operator, side("left"), side("right")),
            "&&" | "||" => self.both(operator, side("left"), side("right"), Kind::Bool),
            "+" | "-" | "*" => self.both(operator, side("left"), side("right"), Kind::Long),
            "contains" => {
                self.operand(side("left"), Kind::Set, operator)?;
                self.kind(side("right")).map(|_| Kind::Bool)
            }
            "containsAll" | "containsAny" => self.both(operator, side("left"), side("right"), Kind::Set).map(|_| Kind::Bool),
            "like" => self.operand(side("left"), Kind::Text, "like").map(|()| Kind::Bool),
            "." => match side("attr").as_str() {
                Some(attr) => self.member(side("left"), attr, true),
                None => Err(unreadable()),
            },
            "has" => self.has(side("left"), side("attr")),
            "if-then-else" => self.choice(side("if"), side("then"), side("else")),
            "Set" => {
                operands.as_array().into_iter().flatten().try_for_each(|item| self.kind(item).map(drop))?;
                Ok(Kind::Set)
            }
            "Record" => {
                let members = operands.as_object().into_iter().flatten();
                members.map(|(_, value)| value).try_for_each(|value| self.kind(value).map(drop))?;
                Ok(Kind::Record)
            }
            "in" | "is" | "getTag" | "hasTag" | "Slot" => {
                Err(format!("`{operator}` has no meaning here: there are no entities, only `context`"))
            }
            function => self.function(function, operands),
        }
    }

    fn operand(&mut self, expression: &Value, expected: Kind, operator: &str) -> Result<(), String> {
        let kind = self.kind(expression)?;
        expect(kind, expected, &format!("`{operator}`"))
    }

    fn both(&mut self, operator: &str, left: &Value, right: &Value, expected: Kind) -> Result<Kind, String> {
        self.operand(left, expected, operator)?;
        self.operand(right, expected, operator)?;
        Ok(expected)
    }

    /// Checks `<`, `<=`, `>` and `>=`, which Cedar defines for whole numbers, times and durations.
    fn ordered(&mut self, operator: &str, left: &Value, right: &Value) -> Result<Kind, String> {
        let (left, right) = (self.kind(left)?, self.kind(right)?);
        for kind in [left, right] {
            if kind == Kind::Decimal {
                return Err(format!("`{operator}` does not compare decimals: use `.lessThan()` or `.greaterThan()`"));
            }
            if ![Kind::Any, Kind::Long, Kind::DateTime, Kind::Duration].contains(&kind) {
                return Err(format!("`{operator}` needs whole numbers, found {}", kind.name()));
            }
        }
        if !left.fits(right) {
            return Err(format!("`{operator}` compares {} with {}", left.name(), right.name()));
        }
        Ok(Kind::Bool)
    }

    fn choice(&mut self, condition: &Value, yes: &Value, no: &Value) -> Result<Kind, String> {
        self.operand(condition, Kind::Bool, "if")?;
        let (yes, no) = (self.kind(yes)?, self.kind(no)?);
        Ok(if yes == no { yes } else { Kind::Any })
    }

    /// Infers the type of `left.attr`. If `read` is false, the expression only tests whether the member exists.
    fn member(&mut self, left: &Value, attr: &str, read: bool) -> Result<Kind, String> {
        if left.get("Var").is_some_and(|name| name == "context") {
            let (_, part, known) = context_member(attr)?;
            self.uses.parts.insert(*part);
            if *part == Part::Arguments {
                // An access to a single argument resets this flag.
                self.uses.all_arguments = true;
            }
            return Ok(if known.is_some() { Kind::Record } else { Kind::Any });
        }
        if let Some(part) = part_of(left) {
            let (name, part, known) = context_member(part)?;
            if *part == Part::Arguments {
                let others = self.uses.all_arguments;
                self.kind(left)?;
                self.uses.all_arguments = others;
                self.uses.arguments.insert(attr.to_owned());
                return Ok(Kind::Any);
            }
            self.kind(left)?;
            let Some(known) = known else {
                return Ok(Kind::Any);
            };
            let Some((_, kind)) = known.iter().find(|(member, _)| *member == attr) else {
                let help = suggestion(attr, known.iter().map(|(member, _)| *member));
                let members: Vec<String> = known.iter().map(|(member, _)| format!("`{member}`")).collect();
                let help = help.unwrap_or_else(|| format!("it has {}", members.join(", ")));
                return Err(format!("`context.{name}` has no member `{attr}`: {help}"));
            };
            return Ok(*kind);
        }
        let kind = self.kind(left)?;
        let verb = if read { "." } else { "has" };
        expect(kind, Kind::Record, &format!("`{verb} {attr}`"))?;
        Ok(Kind::Any)
    }

    /// Checks `left has a` or `left has a.b.c`, whose names form a list.
    fn has(&mut self, left: &Value, attrs: &Value) -> Result<Kind, String> {
        let one = std::slice::from_ref(attrs);
        let mut left = left.clone();
        for attr in attrs.as_array().map_or(one, Vec::as_slice) {
            let attr = attr.as_str().ok_or_else(unreadable)?;
            self.member(&left, attr, false)?;
            left = json!({ ".": { "left": left, "attr": attr } });
        }
        Ok(Kind::Bool)
    }

    /// Checks the operands of an extension function and returns the type of its result.
    fn function(&mut self, name: &str, operands: &Value) -> Result<Kind, String> {
        let Some((_, takes, gives)) = FUNCTIONS.iter().find(|(known, ..)| *known == name) else {
            return Err(format!("`{name}` is not supported in a condition"));
        };
        let operands = operands.as_array().map(Vec::as_slice).unwrap_or_default();
        if operands.len() != takes.len() {
            return Err(format!("`{name}` takes {} value(s), found {}", takes.len(), operands.len()));
        }
        for (operand, expected) in operands.iter().zip(*takes) {
            self.operand(operand, *expected, name)?;
        }
        Ok(*gives)
    }
}

fn unreadable() -> String {
    "the condition holds something that is not an expression".to_owned()
}

/// A member of `context`: its name, its part, and the types of its members.
type ContextMember = (&'static str, Part, Option<Members>);

fn context_member(name: &str) -> Result<&'static ContextMember, String> {
    CONTEXT.iter().find(|(known, ..)| *known == name).ok_or_else(|| {
        let names: Vec<String> = CONTEXT.iter().map(|(known, ..)| format!("`{known}`")).collect();
        let help = suggestion(name, CONTEXT.iter().map(|(known, ..)| *known));
        format!("`context` has no member `{name}`: {}", help.unwrap_or_else(|| format!("it has {}", names.join(", "))))
    })
}

/// The name in an expression of the form `context.NAME`; `None` for other expressions.
fn part_of(expression: &Value) -> Option<&str> {
    let access = expression.get(".")?;
    let of_context = access.get("left")?.get("Var")? == "context";
    access.get("attr")?.as_str().filter(|_| of_context)
}

fn literal(value: &Value) -> Result<Kind, String> {
    Ok(match value {
        Value::Bool(_) => Kind::Bool,
        Value::Number(_) => Kind::Long,
        Value::String(_) => Kind::Text,
        Value::Array(_) => Kind::Set,
        Value::Object(members) if members.contains_key("__entity") => {
            return Err("there are no entities in a condition: compare with a string".to_owned());
        }
        Value::Object(members) if members.contains_key("__extn") => Kind::Any,
        _ => Kind::Record,
    })
}

fn expect(kind: Kind, expected: Kind, what: &str) -> Result<(), String> {
    if kind.fits(expected) { Ok(()) } else { Err(format!("{what} needs {}, found {}", expected.name(), kind.name())) }
}
