//! The syntax tree of a document: scalars, lists and mappings, each with its position.
//!
//! A node is the common form of YAML in a folder and JSON in a store, before it becomes a
//! [`Document`](super::document::Document). It knows no key of the policy language. Look next at `yaml.rs`, which creates nodes,
//! and at `document/read.rs`, which reads them.

use crate::model::json::{JsonNumber, JsonObject, Value};

use super::diagnostic::SourcePosition;

/// A value with its position.
#[derive(Clone, Debug)]
pub(super) struct SourceNode {
    /// The position of its first character.
    pub(super) at: SourcePosition,
    /// The value.
    pub(super) kind: NodeKind,
}

/// The value of a node.
#[derive(Clone, Debug)]
pub(super) enum NodeKind {
    /// A scalar.
    Scalar(ScalarNode),
    /// A list.
    Sequence(Vec<SourceNode>),
    /// Members in the order of the text.
    Mapping(Vec<MappingMember>),
}

/// A scalar: its text without quotes, and its value by the YAML core schema.
#[derive(Clone, Debug)]
pub(super) struct ScalarNode {
    /// The text.
    pub(super) text: String,
    /// The value.
    pub(super) value: ScalarValue,
}

/// The value of a scalar.
#[derive(Clone, Copy, Debug)]
pub(super) enum ScalarValue {
    /// No value.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A finite number.
    Number(JsonNumber),
    /// A string; its value is the text itself.
    String,
}

/// A member of a mapping.
#[derive(Clone, Debug)]
pub(super) struct MappingMember {
    /// The key.
    pub(super) name: String,
    /// The position of the key.
    pub(super) at: SourcePosition,
    /// The value.
    pub(super) value: SourceNode,
}

impl SourceNode {
    /// Converts a JSON value. All of its nodes get the same position.
    pub(super) fn from_json(value: &Value, at: SourcePosition) -> Self {
        let scalar = |text: &str, meaning| NodeKind::Scalar(ScalarNode { text: text.to_owned(), value: meaning });
        let kind = match value {
            Value::Null => scalar("null", ScalarValue::Null),
            Value::Bool(truth) => scalar(if *truth { "true" } else { "false" }, ScalarValue::Bool(*truth)),
            Value::Number(number) => scalar(&value.to_jcs(), ScalarValue::Number(*number)),
            Value::String(text) => scalar(text, ScalarValue::String),
            Value::Array(items) => NodeKind::Sequence(items.iter().map(|item| Self::from_json(item, at)).collect()),
            Value::Object(object) => NodeKind::Mapping(
                object
                    .iter()
                    .map(|(name, value)| MappingMember { name: name.to_owned(), at, value: Self::from_json(value, at) })
                    .collect(),
            ),
        };
        Self { at, kind }
    }

    /// Converts the node to a JSON value.
    pub(super) fn to_json(&self) -> Value {
        match &self.kind {
            NodeKind::Scalar(scalar) => match scalar.value {
                ScalarValue::Null => Value::Null,
                ScalarValue::Bool(truth) => Value::Bool(truth),
                ScalarValue::Number(number) => Value::Number(number),
                ScalarValue::String => Value::String(scalar.text.clone()),
            },
            NodeKind::Sequence(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            NodeKind::Mapping(members) => Value::Object(JsonObject::from_members(
                members.iter().map(|member| (member.name.clone(), member.value.to_json())),
            )),
        }
    }

    /// The text of a string; `None` for every other value.
    pub(super) fn as_str(&self) -> Option<&str> {
        match &self.kind {
            NodeKind::Scalar(ScalarNode { text, value: ScalarValue::String }) => Some(text),
            _ => None,
        }
    }

    /// The members of a mapping; `None` for every other value.
    pub(super) fn as_mapping(&self) -> Option<&[MappingMember]> {
        if let NodeKind::Mapping(members) = &self.kind { Some(members) } else { None }
    }

    /// The value of a member; `None` if the node is no mapping or lacks the member.
    pub(super) fn member(&self, name: &str) -> Option<&SourceNode> {
        self.as_mapping()?.iter().find(|member| member.name == name).map(|member| &member.value)
    }

    /// The type of the value, for a message.
    pub(super) fn type_description(&self) -> &'static str {
        match &self.kind {
            NodeKind::Scalar(scalar) => match scalar.value {
                ScalarValue::Null => "nothing",
                ScalarValue::Bool(_) => "a truth value",
                ScalarValue::Number(_) => "a number",
                ScalarValue::String => "a string",
            },
            NodeKind::Sequence(_) => "a list",
            NodeKind::Mapping(_) => "a mapping",
        }
    }
}
