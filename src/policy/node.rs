//! A document as it was written: scalars, lists and mappings, each with its place.
//!
//! The one form between a text and a [`Document`](super::document::Document), whether the text was YAML in a folder or JSON in a
//! store. It knows no key of the language. Look next at `yaml.rs`, which makes it, and at `document/read.rs`, which reads it.

use crate::model::json::{Number, Object, Value};

use super::diagnostic::Position;

/// A value with its place.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Where it begins.
    pub(super) at: Position,
    /// What it is.
    pub(super) kind: Kind,
}

/// What a node is.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Text, and what it means.
    Scalar(Scalar),
    /// A list.
    Sequence(Vec<Node>),
    /// Members in the order written.
    Mapping(Vec<Member>),
}

/// A scalar: its text as written (without quotes), and what the schema makes of it.
#[derive(Clone, Debug)]
pub(super) struct Scalar {
    /// The text.
    pub(super) text: String,
    /// Its meaning.
    pub(super) meaning: Meaning,
}

/// What a scalar means.
#[derive(Clone, Copy, Debug)]
pub(super) enum Meaning {
    /// No value.
    Null,
    /// A truth value.
    Bool(bool),
    /// A finite number.
    Number(Number),
    /// The text itself.
    String,
}

/// A member of a mapping.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// The key.
    pub(super) name: String,
    /// Where the key stands.
    pub(super) at: Position,
    /// The value.
    pub(super) value: Node,
}

impl Node {
    /// A JSON value as a node; all of it stands at one place.
    pub(super) fn from_value(value: &Value, at: Position) -> Self {
        let scalar = |text: &str, meaning| Kind::Scalar(Scalar { text: text.to_owned(), meaning });
        let kind = match value {
            Value::Null => scalar("null", Meaning::Null),
            Value::Bool(truth) => scalar(if *truth { "true" } else { "false" }, Meaning::Bool(*truth)),
            Value::Number(number) => scalar(&value.to_jcs(), Meaning::Number(*number)),
            Value::String(text) => scalar(text, Meaning::String),
            Value::Array(items) => Kind::Sequence(items.iter().map(|item| Self::from_value(item, at)).collect()),
            Value::Object(object) => Kind::Mapping(
                object
                    .iter()
                    .map(|(name, value)| Member { name: name.to_owned(), at, value: Self::from_value(value, at) })
                    .collect(),
            ),
        };
        Self { at, kind }
    }

    /// The node as a JSON value.
    pub(super) fn to_value(&self) -> Value {
        match &self.kind {
            Kind::Scalar(scalar) => match scalar.meaning {
                Meaning::Null => Value::Null,
                Meaning::Bool(truth) => Value::Bool(truth),
                Meaning::Number(number) => Value::Number(number),
                Meaning::String => Value::String(scalar.text.clone()),
            },
            Kind::Sequence(items) => Value::Array(items.iter().map(Self::to_value).collect()),
            Kind::Mapping(members) => {
                Value::Object(Object::from_members(members.iter().map(|member| (member.name.clone(), member.value.to_value()))))
            }
        }
    }

    /// The text, if it is a string.
    pub(super) fn as_text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar(Scalar { text, meaning: Meaning::String }) => Some(text),
            _ => None,
        }
    }

    /// The members, if it is a mapping.
    pub(super) fn as_mapping(&self) -> Option<&[Member]> {
        if let Kind::Mapping(members) = &self.kind { Some(members) } else { None }
    }

    /// The value of a member, if it is a mapping that has it.
    pub(super) fn member(&self, name: &str) -> Option<&Node> {
        self.as_mapping()?.iter().find(|member| member.name == name).map(|member| &member.value)
    }

    /// What it is, for a message.
    pub(super) fn description(&self) -> &'static str {
        match &self.kind {
            Kind::Scalar(scalar) => match scalar.meaning {
                Meaning::Null => "nothing",
                Meaning::Bool(_) => "a truth value",
                Meaning::Number(_) => "a number",
                Meaning::String => "a string",
            },
            Kind::Sequence(_) => "a list",
            Kind::Mapping(_) => "a mapping",
        }
    }
}
