//! The syntax tree of a document: scalars, lists and mappings, each with its position.
//!
//! A node is the common form of YAML in a folder and JSON in a store, before it becomes a
//! [`Document`](super::document::Document). It knows no key of the policy language. Look next at `yaml.rs`, which creates nodes,
//! and at `document/read.rs`, which reads them.

use crate::model::json::{Number, Object, Value};

use super::diagnostic::Position;

/// A value with its position.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// The position of its first character.
    pub(super) at: Position,
    /// The value.
    pub(super) kind: Kind,
}

/// The value of a node.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// A scalar.
    Scalar(Scalar),
    /// A list.
    Sequence(Vec<Node>),
    /// Members in the order of the text.
    Mapping(Vec<Member>),
}

/// A scalar: its text without quotes, and its value by the YAML core schema.
#[derive(Clone, Debug)]
pub(super) struct Scalar {
    /// The text.
    pub(super) text: String,
    /// The value.
    pub(super) meaning: Meaning,
}

/// The value of a scalar.
#[derive(Clone, Copy, Debug)]
pub(super) enum Meaning {
    /// No value.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A finite number.
    Number(Number),
    /// A string; its value is the text itself.
    String,
}

/// A member of a mapping.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// The key.
    pub(super) name: String,
    /// The position of the key.
    pub(super) at: Position,
    /// The value.
    pub(super) value: Node,
}

impl Node {
    /// Converts a JSON value. All of its nodes get the same position.
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

    /// Converts the node to a JSON value.
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

    /// The text of a string; `None` for every other value.
    pub(super) fn as_text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar(Scalar { text, meaning: Meaning::String }) => Some(text),
            _ => None,
        }
    }

    /// The members of a mapping; `None` for every other value.
    pub(super) fn as_mapping(&self) -> Option<&[Member]> {
        if let Kind::Mapping(members) = &self.kind { Some(members) } else { None }
    }

    /// The value of a member; `None` if the node is no mapping or lacks the member.
    pub(super) fn member(&self, name: &str) -> Option<&Node> {
        self.as_mapping()?.iter().find(|member| member.name == name).map(|member| &member.value)
    }

    /// The type of the value, for a message.
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
