//! Reads the fields of a node. Each value is checked for its type and its limits, each key must be known, and each error has a
//! position.
//!
//! This file serves `read.rs` and `entry.rs`. It names no key of the policy language.

use std::collections::BTreeMap;

use crate::model::constraint::abridged;
use crate::model::duration;
use crate::model::ids::holds_control_character;
use crate::model::limits::ID_BYTES_MAX;

use super::super::diagnostic::{Diagnostic, Position, Severity, suggestion};
use super::super::node::{Kind, Meaning, Member, Node, Scalar};
use super::Positions;

/// Collects errors and positions while one document is read.
pub(super) struct Reader<'a> {
    pub(super) path: &'a str,
    pub(super) positions: Positions,
    out: &'a mut Vec<Diagnostic>,
    errors: usize,
}

/// The fields of a mapping. The reader takes them by name, and [`Fields::finish`] reports all others as unknown.
pub(super) struct Fields<'n> {
    members: &'n [Member],
    pub(super) at: Position,
    asked: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    /// Creates a reader for one document of a file.
    pub(super) fn new(path: &'a str, out: &'a mut Vec<Diagnostic>) -> Self {
        Self { path, positions: Positions(BTreeMap::new()), out, errors: 0 }
    }

    /// The number of errors so far.
    pub(super) fn error_count(&self) -> usize {
        self.errors
    }

    /// Reports an error.
    pub(super) fn error(&mut self, at: Position, message: impl Into<String>) {
        self.error_with_help(at, message, None);
    }

    /// Reports an error with a suggestion.
    pub(super) fn error_with_help(&mut self, at: Position, message: impl Into<String>, help: Option<String>) {
        self.errors += 1;
        self.out.push(Diagnostic::new(Severity::Error, self.path, at, message).with_help(help));
    }

    /// Reports that a node is of the wrong type.
    pub(super) fn wrong(&mut self, node: &Node, expected: &str) {
        self.error(node.at, format!("{expected}, found {}", node.description()));
    }

    /// Reads a string: not empty, within the limit, without control characters or surrounding spaces.
    pub(super) fn text<'n>(&mut self, node: &'n Node, what: &str) -> Option<&'n str> {
        let Some(text) = node.as_text() else {
            let help = match &node.kind {
                Kind::Scalar(scalar) if !scalar.text.is_empty() => {
                    Some(format!("quote it if it is text: '{}'", abridged(&scalar.text)))
                }
                _ => None,
            };
            self.error_with_help(node.at, format!("{what} must be a string, found {}", node.description()), help);
            return None;
        };
        let problem = if text.is_empty() {
            "must not be empty".to_owned()
        } else if text.len() > ID_BYTES_MAX {
            format!("is longer than {ID_BYTES_MAX} bytes")
        } else if holds_control_character(text) {
            "holds a control character".to_owned()
        } else if text.trim() != text {
            "begins or ends with a space".to_owned()
        } else {
            return Some(text);
        };
        self.error(node.at, format!("{what} {problem}"));
        None
    }

    /// Reads a list of strings and keeps the position of each.
    pub(super) fn strings(&mut self, node: &Node, field: &'static str) -> Vec<String> {
        let Kind::Sequence(items) = &node.kind else {
            self.wrong(node, &format!("`{field}` must be a list of strings"));
            return Vec::new();
        };
        let mut texts = Vec::with_capacity(items.len());
        for item in items {
            if let Some(text) = self.text(item, &format!("an item of `{field}`")) {
                self.positions.put(field, texts.len(), item.at);
                texts.push(text.to_owned());
            }
        }
        texts
    }

    /// Reads a list of named values. It reports every item that is none of them.
    pub(super) fn chosen<T: Copy>(&mut self, node: &Node, field: &'static str, all: &[T], name: fn(T) -> &'static str) -> Vec<T> {
        let Kind::Sequence(items) = &node.kind else {
            self.wrong(node, &format!("`{field}` must be a list of strings"));
            return Vec::new();
        };
        items.iter().filter_map(|item| self.choice(item, field, all, name)).collect()
    }

    /// Reads one of several named values.
    pub(super) fn choice<T: Copy>(
        &mut self,
        node: &Node,
        field: &'static str,
        all: &[T],
        name: fn(T) -> &'static str,
    ) -> Option<T> {
        let text = self.text(node, &format!("`{field}`"))?;
        let found = all.iter().copied().find(|value| name(*value) == text);
        if found.is_none() {
            let names: Vec<String> = all.iter().map(|value| format!("`{}`", name(*value))).collect();
            let help = suggestion(text, all.iter().map(|value| name(*value)));
            let message = format!("`{}` is no value of `{field}`: expected {}", abridged(text), names.join(", "));
            self.error_with_help(node.at, message, help);
        }
        found
    }

    /// Reads `true` or `false`.
    pub(super) fn truth(&mut self, node: &Node, what: &str) -> Option<bool> {
        if let Kind::Scalar(Scalar { meaning: Meaning::Bool(truth), .. }) = &node.kind {
            return Some(*truth);
        }
        self.wrong(node, &format!("{what} must be true or false"));
        None
    }

    /// Reads a whole number from 0 to `max`.
    pub(super) fn number(&mut self, node: &Node, what: &str, max: u64) -> Option<u64> {
        let number = match &node.kind {
            Kind::Scalar(Scalar { meaning: Meaning::Number(number), .. }) => number.as_i64(),
            _ => None,
        };
        let number = number.and_then(|number| u64::try_from(number).ok()).filter(|number| *number <= max);
        if number.is_none() {
            self.error(node.at, format!("{what} must be a whole number from 0 to {max}"));
        }
        number
    }

    /// Reads a duration in milliseconds.
    pub(super) fn duration_ms(&mut self, node: &Node, what: &str) -> Option<u64> {
        let text = match &node.kind {
            Kind::Scalar(scalar) => scalar.text.as_str(),
            _ => {
                self.wrong(node, &format!("{what} must be a duration"));
                return None;
            }
        };
        match duration::parse_ms(&abridged(text)) {
            Ok(ms) => Some(ms),
            Err(problem) => {
                self.error(node.at, format!("{what}: {problem}"));
                None
            }
        }
    }

    /// Reads a duration of whole seconds, at least one.
    pub(super) fn duration_s(&mut self, node: &Node, what: &str) -> Option<i64> {
        let ms = self.duration_ms(node, what)?;
        if ms == 0 || ms % 1000 != 0 {
            self.error(node.at, format!("{what} must be one or more whole seconds"));
            return None;
        }
        i64::try_from(ms / 1000).ok()
    }
}

impl<'n> Fields<'n> {
    /// The fields of a node. A node that is not a mapping is an error.
    pub(super) fn new(node: &'n Node, what: &str, reader: &mut Reader<'_>) -> Option<Self> {
        match node.as_mapping() {
            Some(members) => Some(Self { members, at: node.at, asked: Vec::new() }),
            None => {
                reader.wrong(node, &format!("{what} must be a mapping"));
                None
            }
        }
    }

    /// The value of a field.
    pub(super) fn take(&mut self, name: &'static str) -> Option<&'n Node> {
        self.asked.push(name);
        self.members.iter().find(|member| member.name == name).map(|member| &member.value)
    }

    /// The value of a field. A missing field is an error.
    pub(super) fn require(&mut self, name: &'static str, reader: &mut Reader<'_>) -> Option<&'n Node> {
        let found = self.take(name);
        if found.is_none() {
            reader.error(self.at, format!("`{name}` is missing"));
        }
        found
    }

    /// Reports every field that was never taken.
    pub(super) fn finish(self, reader: &mut Reader<'_>) {
        for member in self.members {
            let name = member.name.as_str();
            if self.asked.contains(&name) {
                continue;
            }
            let help = suggestion(name, self.asked.iter().copied());
            reader.error_with_help(member.at, format!("unknown key `{}`", abridged(name)), help);
        }
    }
}
