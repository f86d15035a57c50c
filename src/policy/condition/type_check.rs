//! Checks a condition: it may read only members that `context` has, and apply operators only to values of a fitting type.
//!
//! The check works on Cedar's JSON form of a parsed policy, so the text is not parsed twice. The types of arguments are not known
//! before a call. They may be of any type, and a wrong type fails the evaluation. Look next at `context.rs`.

use serde_json::{Value, json};

use super::super::diagnostic::suggest_name;
use super::{ContextPart, ContextUses};

/// The type of an expression. `Any` is a type that only the call determines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExpressionType {
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

impl ExpressionType {
    fn name(self) -> &'static str {
        match self {
            ExpressionType::Any => "anything",
            ExpressionType::Bool => "a truth value",
            ExpressionType::Long => "a whole number",
            ExpressionType::Text => "a string",
            ExpressionType::Set => "a set",
            ExpressionType::Record => "a record",
            ExpressionType::Decimal => "a decimal",
            ExpressionType::Ip => "an IP address",
            ExpressionType::DateTime => "a time",
            ExpressionType::Duration => "a duration",
        }
    }

    fn fits(self, expected: ExpressionType) -> bool {
        self == expected || self == ExpressionType::Any || expected == ExpressionType::Any
    }
}

/// The members of `context` and the types of their members. `None`: only the call determines them.
type MemberTypes = &'static [(&'static str, ExpressionType)];
const CONTEXT_MEMBERS: &[(&str, ContextPart, Option<MemberTypes>)] = &[
    (
        "user",
        ContextPart::User,
        Some(&[("issuer", ExpressionType::Text), ("sub", ExpressionType::Text), ("groups", ExpressionType::Set)]),
    ),
    ("application", ContextPart::Application, Some(&[("id", ExpressionType::Text)])),
    (
        "agent",
        ContextPart::Agent,
        Some(&[
            ("id", ExpressionType::Text),
            ("root", ExpressionType::Text),
            ("depth", ExpressionType::Long),
            ("chain", ExpressionType::Set),
        ]),
    ),
    ("session", ContextPart::Session, Some(&[("id", ExpressionType::Text), ("task", ExpressionType::Text)])),
    (
        "tool",
        ContextPart::Tool,
        Some(&[("name", ExpressionType::Text), ("server", ExpressionType::Text), ("risk", ExpressionType::Text)]),
    ),
    ("args", ContextPart::Arguments, None),
    (
        "time",
        ContextPart::Time,
        Some(&[
            ("unix_s", ExpressionType::Long),
            ("hour_utc", ExpressionType::Long),
            ("minute_utc", ExpressionType::Long),
            ("weekday_utc", ExpressionType::Long),
            ("date", ExpressionType::Text),
        ]),
    ),
    ("env", ContextPart::Environment, None),
];

/// The functions and methods of Cedar's extensions, with the types of their operands and of their result.
const FUNCTIONS: &[(&str, &[ExpressionType], ExpressionType)] = &[
    ("decimal", &[ExpressionType::Text], ExpressionType::Decimal),
    ("lessThan", &[ExpressionType::Decimal, ExpressionType::Decimal], ExpressionType::Bool),
    ("lessThanOrEqual", &[ExpressionType::Decimal, ExpressionType::Decimal], ExpressionType::Bool),
    ("greaterThan", &[ExpressionType::Decimal, ExpressionType::Decimal], ExpressionType::Bool),
    ("greaterThanOrEqual", &[ExpressionType::Decimal, ExpressionType::Decimal], ExpressionType::Bool),
    ("ip", &[ExpressionType::Text], ExpressionType::Ip),
    ("isIpv4", &[ExpressionType::Ip], ExpressionType::Bool),
    ("isIpv6", &[ExpressionType::Ip], ExpressionType::Bool),
    ("isLoopback", &[ExpressionType::Ip], ExpressionType::Bool),
    ("isMulticast", &[ExpressionType::Ip], ExpressionType::Bool),
    ("isInRange", &[ExpressionType::Ip, ExpressionType::Ip], ExpressionType::Bool),
    ("datetime", &[ExpressionType::Text], ExpressionType::DateTime),
    ("duration", &[ExpressionType::Text], ExpressionType::Duration),
    ("offset", &[ExpressionType::DateTime, ExpressionType::Duration], ExpressionType::DateTime),
    ("durationSince", &[ExpressionType::DateTime, ExpressionType::DateTime], ExpressionType::Duration),
    ("toDate", &[ExpressionType::DateTime], ExpressionType::DateTime),
    ("toTime", &[ExpressionType::DateTime], ExpressionType::Duration),
    ("toMilliseconds", &[ExpressionType::Duration], ExpressionType::Long),
    ("toSeconds", &[ExpressionType::Duration], ExpressionType::Long),
    ("toMinutes", &[ExpressionType::Duration], ExpressionType::Long),
    ("toHours", &[ExpressionType::Duration], ExpressionType::Long),
    ("toDays", &[ExpressionType::Duration], ExpressionType::Long),
];

/// Checks a policy with one `when` clause, in Cedar's JSON form, and returns the parts of `context` that it reads.
pub(super) fn check_condition(policy: &Value) -> Result<ContextUses, String> {
    let conditions = policy.get("conditions").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let [clause] = conditions else {
        return Err("the condition is not one expression".to_owned());
    };
    let mut checker = TypeChecker { uses: ContextUses::default() };
    let kind = checker.infer_type(clause.get("body").unwrap_or(&Value::Null))?;
    expect_type(kind, ExpressionType::Bool, "a condition")?;
    Ok(checker.uses)
}

/// Infers types, and collects the parts of the context that the expression reads.
struct TypeChecker {
    uses: ContextUses,
}

impl TypeChecker {
    /// Infers the type of an expression. An operator on a wrong type is an error.
    fn infer_type(&mut self, expression: &Value) -> Result<ExpressionType, String> {
        let Some((operator, operands)) = expression.as_object().and_then(|node| node.iter().next()) else {
            return Err(unreadable_error());
        };
        let side = |name: &str| operands.get(name).unwrap_or(&Value::Null);
        match operator.as_str() {
            "Value" => literal_type(operands),
            "Var" if operands == "context" => {
                Err("`context` by itself is no value: name a member of it, such as `context.args`".to_owned())
            }
            "Var" => {
                let name = operands.as_str().unwrap_or_default();
                Err(format!("`{name}` has no meaning here: a condition looks at `context` alone"))
            }
            "!" => self.check_operand(side("arg"), ExpressionType::Bool, "!").map(|()| ExpressionType::Bool),
            "neg" => self.check_operand(side("arg"), ExpressionType::Long, "-").map(|()| ExpressionType::Long),
            "isEmpty" => self.check_operand(side("arg"), ExpressionType::Set, "isEmpty").map(|()| ExpressionType::Bool),
            "==" | "!=" => {
                let (left, right) = (self.infer_type(side("left"))?, self.infer_type(side("right"))?);
                if !left.fits(right) {
                    let (left, right) = (left.name(), right.name());
                    return Err(format!("`{operator}` compares {left} with {right}, which are never equal"));
                }
                Ok(ExpressionType::Bool)
            }
            "<" | "<=" | ">" | ">=" => self.check_comparison(operator, side("left"), side("right")),
            "&&" | "||" => self.check_operands(operator, side("left"), side("right"), ExpressionType::Bool),
            "+" | "-" | "*" => self.check_operands(operator, side("left"), side("right"), ExpressionType::Long),
            "contains" => {
                self.check_operand(side("left"), ExpressionType::Set, operator)?;
                self.infer_type(side("right")).map(|_| ExpressionType::Bool)
            }
            "containsAll" | "containsAny" => {
                self.check_operands(operator, side("left"), side("right"), ExpressionType::Set).map(|_| ExpressionType::Bool)
            }
            "like" => self.check_operand(side("left"), ExpressionType::Text, "like").map(|()| ExpressionType::Bool),
            "." => match side("attr").as_str() {
                Some(attr) => self.infer_member(side("left"), attr, true),
                None => Err(unreadable_error()),
            },
            "has" => self.check_has(side("left"), side("attr")),
            "if-then-else" => self.infer_conditional(side("if"), side("then"), side("else")),
            "Set" => {
                operands.as_array().into_iter().flatten().try_for_each(|item| self.infer_type(item).map(drop))?;
                Ok(ExpressionType::Set)
            }
            "Record" => {
                let members = operands.as_object().into_iter().flatten();
                members.map(|(_, value)| value).try_for_each(|value| self.infer_type(value).map(drop))?;
                Ok(ExpressionType::Record)
            }
            "in" | "is" | "getTag" | "hasTag" | "Slot" => {
                Err(format!("`{operator}` has no meaning here: there are no entities, only `context`"))
            }
            function => self.infer_call(function, operands),
        }
    }

    fn check_operand(&mut self, expression: &Value, expected: ExpressionType, operator: &str) -> Result<(), String> {
        let kind = self.infer_type(expression)?;
        expect_type(kind, expected, &format!("`{operator}`"))
    }

    fn check_operands(
        &mut self,
        operator: &str,
        left: &Value,
        right: &Value,
        expected: ExpressionType,
    ) -> Result<ExpressionType, String> {
        self.check_operand(left, expected, operator)?;
        self.check_operand(right, expected, operator)?;
        Ok(expected)
    }

    /// Checks `<`, `<=`, `>` and `>=`, which Cedar defines for whole numbers, times and durations.
    fn check_comparison(&mut self, operator: &str, left: &Value, right: &Value) -> Result<ExpressionType, String> {
        let (left, right) = (self.infer_type(left)?, self.infer_type(right)?);
        for kind in [left, right] {
            if kind == ExpressionType::Decimal {
                return Err(format!("`{operator}` does not compare decimals: use `.lessThan()` or `.greaterThan()`"));
            }
            if ![ExpressionType::Any, ExpressionType::Long, ExpressionType::DateTime, ExpressionType::Duration].contains(&kind) {
                return Err(format!("`{operator}` needs whole numbers, found {}", kind.name()));
            }
        }
        if !left.fits(right) {
            return Err(format!("`{operator}` compares {} with {}", left.name(), right.name()));
        }
        Ok(ExpressionType::Bool)
    }

    fn infer_conditional(&mut self, condition: &Value, yes: &Value, no: &Value) -> Result<ExpressionType, String> {
        self.check_operand(condition, ExpressionType::Bool, "if")?;
        let (yes, no) = (self.infer_type(yes)?, self.infer_type(no)?);
        Ok(if yes == no { yes } else { ExpressionType::Any })
    }

    /// Infers the type of `left.attr`. If `read` is false, the expression only tests whether the member exists.
    fn infer_member(&mut self, left: &Value, attr: &str, read: bool) -> Result<ExpressionType, String> {
        if left.get("Var").is_some_and(|name| name == "context") {
            let (_, part, known) = context_member(attr)?;
            self.uses.parts.insert(*part);
            if *part == ContextPart::Arguments {
                // An access to a single argument resets this flag.
                self.uses.all_arguments = true;
            }
            return Ok(if known.is_some() { ExpressionType::Record } else { ExpressionType::Any });
        }
        if let Some(part) = context_member_name(left) {
            let (name, part, known) = context_member(part)?;
            if *part == ContextPart::Arguments {
                let others = self.uses.all_arguments;
                self.infer_type(left)?;
                self.uses.all_arguments = others;
                self.uses.arguments.insert(attr.to_owned());
                return Ok(ExpressionType::Any);
            }
            self.infer_type(left)?;
            let Some(known) = known else {
                return Ok(ExpressionType::Any);
            };
            let Some((_, kind)) = known.iter().find(|(member, _)| *member == attr) else {
                let help = suggest_name(attr, known.iter().map(|(member, _)| *member));
                let members: Vec<String> = known.iter().map(|(member, _)| format!("`{member}`")).collect();
                let help = help.unwrap_or_else(|| format!("it has {}", members.join(", ")));
                return Err(format!("`context.{name}` has no member `{attr}`: {help}"));
            };
            return Ok(*kind);
        }
        let kind = self.infer_type(left)?;
        let verb = if read { "." } else { "has" };
        expect_type(kind, ExpressionType::Record, &format!("`{verb} {attr}`"))?;
        Ok(ExpressionType::Any)
    }

    /// Checks `left has a` or `left has a.b.c`, whose names form a list.
    fn check_has(&mut self, left: &Value, attrs: &Value) -> Result<ExpressionType, String> {
        let one = std::slice::from_ref(attrs);
        let mut left = left.clone();
        for attr in attrs.as_array().map_or(one, Vec::as_slice) {
            let attr = attr.as_str().ok_or_else(unreadable_error)?;
            self.infer_member(&left, attr, false)?;
            left = json!({ ".": { "left": left, "attr": attr } });
        }
        Ok(ExpressionType::Bool)
    }

    /// Checks the operands of an extension function and returns the type of its result.
    fn infer_call(&mut self, name: &str, operands: &Value) -> Result<ExpressionType, String> {
        let Some((_, takes, gives)) = FUNCTIONS.iter().find(|(known, ..)| *known == name) else {
            return Err(format!("`{name}` is not supported in a condition"));
        };
        let operands = operands.as_array().map(Vec::as_slice).unwrap_or_default();
        if operands.len() != takes.len() {
            return Err(format!("`{name}` takes {} value(s), found {}", takes.len(), operands.len()));
        }
        for (operand, expected) in operands.iter().zip(*takes) {
            self.check_operand(operand, *expected, name)?;
        }
        Ok(*gives)
    }
}

fn unreadable_error() -> String {
    "the condition holds something that is not an expression".to_owned()
}

/// A member of `context`: its name, its part, and the types of its members.
type ContextMember = (&'static str, ContextPart, Option<MemberTypes>);

fn context_member(name: &str) -> Result<&'static ContextMember, String> {
    CONTEXT_MEMBERS.iter().find(|(known, ..)| *known == name).ok_or_else(|| {
        let names: Vec<String> = CONTEXT_MEMBERS.iter().map(|(known, ..)| format!("`{known}`")).collect();
        let help = suggest_name(name, CONTEXT_MEMBERS.iter().map(|(known, ..)| *known));
        format!("`context` has no member `{name}`: {}", help.unwrap_or_else(|| format!("it has {}", names.join(", "))))
    })
}

/// The name in an expression of the form `context.NAME`; `None` for other expressions.
fn context_member_name(expression: &Value) -> Option<&str> {
    let access = expression.get(".")?;
    let of_context = access.get("left")?.get("Var")? == "context";
    access.get("attr")?.as_str().filter(|_| of_context)
}

fn literal_type(value: &Value) -> Result<ExpressionType, String> {
    Ok(match value {
        Value::Bool(_) => ExpressionType::Bool,
        Value::Number(_) => ExpressionType::Long,
        Value::String(_) => ExpressionType::Text,
        Value::Array(_) => ExpressionType::Set,
        Value::Object(members) if members.contains_key("__entity") => {
            return Err("there are no entities in a condition: compare with a string".to_owned());
        }
        Value::Object(members) if members.contains_key("__extn") => ExpressionType::Any,
        _ => ExpressionType::Record,
    })
}

fn expect_type(kind: ExpressionType, expected: ExpressionType, what: &str) -> Result<(), String> {
    if kind.fits(expected) { Ok(()) } else { Err(format!("{what} needs {}, found {}", expected.name(), kind.name())) }
}
