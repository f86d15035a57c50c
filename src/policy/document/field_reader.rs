//! Reads the fields of a node. Each value is checked for its type and its limits, each key must be known, and each error has a
//! position.
//!
//! This file serves `read.rs` and `entry.rs`. It names no key of the policy language.

use std::collections::BTreeMap;

use crate::model::constraint::abbreviate;
use crate::model::duration;
use crate::model::ids::contains_control_character;
use crate::model::limits::ID_BYTES_MAX;

use super::super::diagnostic::{Diagnostic, Severity, SourcePosition, suggest_name};
use super::super::node::{MappingMember, NodeKind, ScalarNode, ScalarValue, SourceNode};
use super::FieldPositions;

/// Collects errors and positions while one document is read.
pub(super) struct DocumentReader<'a> {
    pub(super) path: &'a str,
    pub(super) positions: FieldPositions,
    diagnostics: &'a mut Vec<Diagnostic>,
    errors: usize,
}

/// The fields of a mapping. The reader takes them by name, and [`MappingFields::reject_unknown_fields`] reports all others as unknown.
pub(super) struct MappingFields<'n> {
    members: &'n [MappingMember],
    pub(super) at: SourcePosition,
    requested: Vec<&'static str>,
}

impl<'a> DocumentReader<'a> {
    /// Creates a reader for one document of a file.
    pub(super) fn new(path: &'a str, out: &'a mut Vec<Diagnostic>) -> Self {
        Self { path, positions: FieldPositions(BTreeMap::new()), diagnostics: out, errors: 0 }
    }

    /// The number of errors so far.
    pub(super) fn error_count(&self) -> usize {
        self.errors
    }

    /// Reports an error.
    pub(super) fn report_error(&mut self, at: SourcePosition, message: impl Into<String>) {
        self.report_error_with_help(at, message, None);
    }

    /// Reports an error with a suggestion.
    pub(super) fn report_error_with_help(&mut self, at: SourcePosition, message: impl Into<String>, help: Option<String>) {
        self.errors += 1;
        self.diagnostics.push(Diagnostic::new(Severity::Error, self.path, at, message).with_help(help));
    }

    /// Reports that a node is of the wrong type.
    pub(super) fn report_wrong_type(&mut self, node: &SourceNode, expected: &str) {
        self.report_error(node.at, format!("{expected}, found {}", node.type_description()));
    }

    /// Reads a string: not empty, within the limit, without control characters or surrounding spaces.
    pub(super) fn read_text<'n>(&mut self, node: &'n SourceNode, what: &str) -> Option<&'n str> {
        let Some(text) = node.as_str() else {
            let help = match &node.kind {
                NodeKind::Scalar(scalar) if !scalar.text.is_empty() => {
                    Some(format!("quote it if it is text: '{}'", abbreviate(&scalar.text)))
                }
                _ => None,
            };
            self.report_error_with_help(node.at, format!("{what} must be a string, found {}", node.type_description()), help);
            return None;
        };
        let problem = if text.is_empty() {
            "must not be empty".to_owned()
        } else if text.len() > ID_BYTES_MAX {
            format!("is longer than {ID_BYTES_MAX} bytes")
        } else if contains_control_character(text) {
            "holds a control character".to_owned()
        } else if text.trim() != text {
            "begins or ends with a space".to_owned()
        } else {
            return Some(text);
        };
        self.report_error(node.at, format!("{what} {problem}"));
        None
    }

    /// Reads a list of strings and keeps the position of each.
    pub(super) fn read_strings(&mut self, node: &SourceNode, field: &'static str) -> Vec<String> {
        let NodeKind::Sequence(items) = &node.kind else {
            self.report_wrong_type(node, &format!("`{field}` must be a list of strings"));
            return Vec::new();
        };
        let mut texts = Vec::with_capacity(items.len());
        for item in items {
            if let Some(text) = self.read_text(item, &format!("an item of `{field}`")) {
                self.positions.insert(field, texts.len(), item.at);
                texts.push(text.to_owned());
            }
        }
        texts
    }

    /// Reads a list of named values. It reports every item that is none of them.
    pub(super) fn read_choices<T: Copy>(
        &mut self,
        node: &SourceNode,
        field: &'static str,
        all: &[T],
        name: fn(T) -> &'static str,
    ) -> Vec<T> {
        let NodeKind::Sequence(items) = &node.kind else {
            self.report_wrong_type(node, &format!("`{field}` must be a list of strings"));
            return Vec::new();
        };
        items.iter().filter_map(|item| self.read_choice(item, field, all, name)).collect()
    }

    /// Reads one of several named values.
    pub(super) fn read_choice<T: Copy>(
        &mut self,
        node: &SourceNode,
        field: &'static str,
        all: &[T],
        name: fn(T) -> &'static str,
    ) -> Option<T> {
        let text = self.read_text(node, &format!("`{field}`"))?;
        let found = all.iter().copied().find(|value| name(*value) == text);
        if found.is_none() {
            let names: Vec<String> = all.iter().map(|value| format!("`{}`", name(*value))).collect();
            let help = suggest_name(text, all.iter().map(|value| name(*value)));
            let message = format!("`{}` is no value of `{field}`: expected {}", abbreviate(text), names.join(", "));
            self.report_error_with_help(node.at, message, help);
        }
        found
    }

    /// Reads `true` or `false`.
    pub(super) fn read_bool(&mut self, node: &SourceNode, what: &str) -> Option<bool> {
        if let NodeKind::Scalar(ScalarNode { value: ScalarValue::Bool(truth), .. }) = &node.kind {
            return Some(*truth);
        }
        self.report_wrong_type(node, &format!("{what} must be true or false"));
        None
    }

    /// Reads a whole number from 0 to `max`.
    pub(super) fn read_number(&mut self, node: &SourceNode, what: &str, max: u64) -> Option<u64> {
        let number = match &node.kind {
            NodeKind::Scalar(ScalarNode { value: ScalarValue::Number(number), .. }) => number.as_i64(),
            _ => None,
        };
        let number = number.and_then(|number| u64::try_from(number).ok()).filter(|number| *number <= max);
        if number.is_none() {
            self.report_error(node.at, format!("{what} must be a whole number from 0 to {max}"));
        }
        number
    }

    /// Reads a duration in milliseconds.
    pub(super) fn read_duration_ms(&mut self, node: &SourceNode, what: &str) -> Option<u64> {
        let text = match &node.kind {
            NodeKind::Scalar(scalar) => scalar.text.as_str(),
            _ => {
                self.report_wrong_type(node, &format!("{what} must be a duration"));
                return None;
            }
        };
        match duration::parse_ms(&abbreviate(text)) {
            Ok(ms) => Some(ms),
            Err(problem) => {
                self.report_error(node.at, format!("{what}: {problem}"));
                None
            }
        }
    }

    /// Reads a duration of whole seconds, at least one.
    pub(super) fn read_duration_s(&mut self, node: &SourceNode, what: &str) -> Option<i64> {
        let ms = self.read_duration_ms(node, what)?;
        if ms == 0 || ms % 1000 != 0 {
            self.report_error(node.at, format!("{what} must be one or more whole seconds"));
            return None;
        }
        i64::try_from(ms / 1000).ok()
    }
}

impl<'n> MappingFields<'n> {
    /// The fields of a node. A node that is not a mapping is an error.
    pub(super) fn new(node: &'n SourceNode, what: &str, reader: &mut DocumentReader<'_>) -> Option<Self> {
        match node.as_mapping() {
            Some(members) => Some(Self { members, at: node.at, requested: Vec::new() }),
            None => {
                reader.report_wrong_type(node, &format!("{what} must be a mapping"));
                None
            }
        }
    }

    /// The value of a field.
    pub(super) fn take(&mut self, name: &'static str) -> Option<&'n SourceNode> {
        self.requested.push(name);
        self.members.iter().find(|member| member.name == name).map(|member| &member.value)
    }

    /// The value of a field. A missing field is an error.
    pub(super) fn require(&mut self, name: &'static str, reader: &mut DocumentReader<'_>) -> Option<&'n SourceNode> {
        let found = self.take(name);
        if found.is_none() {
            reader.report_error(self.at, format!("`{name}` is missing"));
        }
        found
    }

    /// Reports every field that was never taken.
    pub(super) fn reject_unknown_fields(self, reader: &mut DocumentReader<'_>) {
        for member in self.members {
            let name = member.name.as_str();
            if self.requested.contains(&name) {
                continue;
            }
            let help = suggest_name(name, self.requested.iter().copied());
            reader.report_error_with_help(member.at, format!("unknown key `{}`", abbreviate(name)), help);
        }
    }
}
