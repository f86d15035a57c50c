//! Parses YAML to nodes: the subset of YAML 1.2 that means exactly what a reader sees on the page.
//!
//! Plain scalars follow the core schema (YAML 1.2.2, section 10.3), so `no` is a string. The parser refuses anchors, aliases,
//! tags, duplicate keys, keys that are not strings, infinities and deep nesting. Each of them can hide the meaning of a policy.
//! This file knows nothing of policy. Look next at `node.rs`.

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use crate::model::constraint::abbreviate;
use crate::model::json::JsonNumber;
use crate::model::limits::JSON_NESTING_MAX;

use super::diagnostic::{Diagnostic, Severity, SourcePosition};
use super::node::{MappingMember, NodeKind, ScalarNode, ScalarValue, SourceNode};

/// Parses the documents of a file. Empty documents are left out.
///
/// Errors are added to `out`. After a syntax error the rest of the file is not read.
pub(super) fn parse_documents(content: &[u8], path: &str, out: &mut Vec<Diagnostic>) -> Vec<SourceNode> {
    let Some(text) = decode_text(content, path, out) else {
        return Vec::new();
    };
    let mut builder = NodeBuilder { path, out, stack: Vec::new(), documents: Vec::new() };
    let mut parser = Parser::new_from_str(text);
    loop {
        match parser.next_event() {
            None | Some(Ok((Event::StreamEnd, _))) => break,
            Some(Ok((event, span))) => {
                if builder.handle_event(event, position(&span.start)).is_err() {
                    break;
                }
            }
            Some(Err(error)) => {
                builder.report_error(position(error.marker()), format!("not valid YAML: {}", abbreviate(error.info())));
                break;
            }
        }
    }
    builder.documents
}

/// One member of a flat configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigEntry {
    /// The key.
    pub name: String,
    /// The position of the key.
    pub at: SourcePosition,
    /// The scalar, or the items of the list, as written.
    pub values: Vec<String>,
    /// Whether the value was written as a list.
    pub is_list: bool,
}

/// Reads a configuration file: one document that maps keys to scalars or lists of scalars. A known key with a dot, as `section.key`, is a
/// key in the mapping of its section.
///
/// # Errors
/// All mistakes, with their positions.
pub fn parse_config(content: &[u8], path: &str, known: &[&str]) -> Result<Vec<ConfigEntry>, Vec<Diagnostic>> {
    let mut out = Vec::new();
    let documents = parse_documents(content, path, &mut out);
    let mut found = Vec::new();
    let mut error = |at: SourcePosition, message: String| out.push(Diagnostic::new(Severity::Error, path, at, message));
    for (index, document) in documents.iter().enumerate() {
        match document.as_mapping().filter(|_| index == 0) {
            Some(members) => flatten(members, "", known, &mut found, &mut error),
            None => error(document.at, "a file of settings is one mapping, `key: value`".to_owned()),
        }
    }
    if out.iter().any(Diagnostic::is_error) { Err(out) } else { Ok(found) }
}

/// Adds the members of a mapping to those that were found; `section` is empty, or the name of their section with a dot.
fn flatten(
    members: &[MappingMember],
    section: &str,
    known: &[&str],
    found: &mut Vec<ConfigEntry>,
    error: &mut impl FnMut(SourcePosition, String),
) {
    let here = || known.iter().filter_map(|key| key.strip_prefix(section));
    for member in members {
        let name = format!("{section}{}", member.name);
        let is_section = here().any(|key| key.split_once('.').is_some_and(|(section, _)| section == member.name));
        let values = match &member.value.kind {
            NodeKind::Scalar(scalar) => Some((vec![scalar.text.clone()], false)),
            NodeKind::Sequence(items) => items.iter().map(scalar_text).collect::<Option<_>>().map(|values| (values, true)),
            NodeKind::Mapping(_) => None,
        };
        match (&member.value.kind, values) {
            (NodeKind::Mapping(inner), _) if is_section => flatten(inner, &format!("{name}."), known, found, error),
            _ if is_section => error(member.at, format!("`{name}` must be a mapping of settings")),
            _ if member.name.contains('.') || !here().any(|key| key == member.name) => {
                let keys = here().filter(|key| !key.contains('.'));
                let hint =
                    super::diagnostic::suggest_name(&member.name, keys).map(|hint| format!(": {hint}")).unwrap_or_default();
                error(member.at, format!("unknown key `{}`{hint}", abbreviate(&name)));
            }
            (_, Some((values, is_list))) => found.push(ConfigEntry { name, at: member.at, values, is_list }),
            _ => error(member.at, format!("`{name}` must be a value or a list of values")),
        }
    }
}

fn scalar_text(node: &SourceNode) -> Option<String> {
    if let NodeKind::Scalar(scalar) = &node.kind { Some(scalar.text.clone()) } else { None }
}

/// Decodes a file: UTF-8 without NUL. A byte order mark is dropped.
fn decode_text<'a>(content: &'a [u8], path: &str, out: &mut Vec<Diagnostic>) -> Option<&'a str> {
    let (valid, problem) = match std::str::from_utf8(content) {
        Ok(text) => match text.split_once('\0') {
            None => return Some(text.strip_prefix('\u{feff}').unwrap_or(text)),
            Some((before, _)) => (before, "the file holds a NUL character"),
        },
        Err(error) => {
            let valid = content.get(..error.valid_up_to()).and_then(|bytes| std::str::from_utf8(bytes).ok());
            (valid.unwrap_or_default(), "the file is not UTF-8")
        }
    };
    let line = u32::try_from(valid.matches('\n').count() + 1).unwrap_or(u32::MAX);
    let column = valid.rsplit('\n').next().map_or(0, |last| last.chars().count());
    let at = SourcePosition { line, column: u32::try_from(column + 1).unwrap_or(u32::MAX) };
    out.push(Diagnostic::new(Severity::Error, path, at, problem));
    None
}

fn position(marker: &Marker) -> SourcePosition {
    let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    SourcePosition { line: small(marker.line().max(1)), column: small(marker.col().saturating_add(1)) }
}

/// A collection that is still open.
enum OpenCollection {
    Sequence { at: SourcePosition, items: Vec<SourceNode> },
    Mapping { at: SourcePosition, members: Vec<MappingMember>, key: Option<(String, SourcePosition)> },
}

/// The parser cannot continue.
struct ParseAborted;

/// Builds nodes from the events of the parser.
struct NodeBuilder<'a> {
    path: &'a str,
    out: &'a mut Vec<Diagnostic>,
    stack: Vec<OpenCollection>,
    documents: Vec<SourceNode>,
}

impl NodeBuilder<'_> {
    /// Handles one event. An error means that the rest of the file cannot be read.
    fn handle_event(&mut self, event: Event<'_>, at: SourcePosition) -> Result<(), ParseAborted> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_properties(at, anchor, tag.is_some());
                let plain = style == ScalarStyle::Plain;
                let scalar = self.resolve_scalar(text.into_owned(), plain, at);
                self.add_node(SourceNode { at, kind: NodeKind::Scalar(scalar) })
            }
            Event::SequenceStart(anchor, tag) => {
                self.refuse_properties(at, anchor, tag.is_some());
                self.open_collection(at, OpenCollection::Sequence { at, items: Vec::new() })
            }
            Event::MappingStart(anchor, tag) => {
                self.refuse_properties(at, anchor, tag.is_some());
                self.open_collection(at, OpenCollection::Mapping { at, members: Vec::new(), key: None })
            }
            Event::SequenceEnd | Event::MappingEnd => match self.stack.pop() {
                Some(OpenCollection::Sequence { at, items }) => self.add_node(SourceNode { at, kind: NodeKind::Sequence(items) }),
                Some(OpenCollection::Mapping { at, members, .. }) => {
                    self.refuse_duplicates(&members);
                    self.add_node(SourceNode { at, kind: NodeKind::Mapping(members) })
                }
                None => Err(ParseAborted),
            },
            Event::Alias(_) => {
                self.report_error(at, "aliases (`*name`) are not supported: write the value out");
                Err(ParseAborted)
            }
            _ => Ok(()),
        }
    }

    fn open_collection(&mut self, at: SourcePosition, collection: OpenCollection) -> Result<(), ParseAborted> {
        if self.stack.len() >= JSON_NESTING_MAX {
            self.report_error(at, format!("nested deeper than {JSON_NESTING_MAX}"));
            return Err(ParseAborted);
        }
        if let Some(OpenCollection::Mapping { key: None, .. }) = self.stack.last() {
            self.report_error(at, "a key must be a string");
            return Err(ParseAborted);
        }
        self.stack.push(collection);
        Ok(())
    }

    /// Adds a finished node to the innermost open collection.
    fn add_node(&mut self, node: SourceNode) -> Result<(), ParseAborted> {
        match self.stack.last_mut() {
            Some(OpenCollection::Sequence { items, .. }) => items.push(node),
            Some(OpenCollection::Mapping { members, key, .. }) => match key.take() {
                Some((name, at)) => members.push(MappingMember { name, at, value: node }),
                None => {
                    let NodeKind::Scalar(scalar) = node.kind else {
                        return Err(ParseAborted);
                    };
                    *key = Some((scalar.text.clone(), node.at));
                    if !matches!(scalar.value, ScalarValue::String) {
                        self.report_error(node.at, format!("a key must be a string: quote `{}`", abbreviate(&scalar.text)));
                    }
                }
            },
            None if matches!(&node.kind, NodeKind::Scalar(scalar) if matches!(scalar.value, ScalarValue::Null)) => {}
            None => self.documents.push(node),
        }
        Ok(())
    }

    fn resolve_scalar(&mut self, text: String, plain: bool, at: SourcePosition) -> ScalarNode {
        let meaning = match if plain { resolve_plain_scalar(&text) } else { Some(ScalarValue::String) } {
            Some(meaning) => meaning,
            None => {
                self.report_error(at, format!("`{}` is not a finite number: quote it if it is text", abbreviate(&text)));
                ScalarValue::Null
            }
        };
        ScalarNode { text, value: meaning }
    }

    /// Refuses an anchor or a tag of a node.
    fn refuse_properties(&mut self, at: SourcePosition, anchor: usize, tag: bool) {
        if anchor != 0 {
            self.report_error(at, "anchors (`&name`) are not supported: write the value out where it is needed");
        }
        if tag {
            self.report_error(at, "tags (`!name`) are not supported");
        }
    }

    /// Reports keys that a mapping contains twice.
    fn refuse_duplicates(&mut self, members: &[MappingMember]) {
        let mut sorted: Vec<&MappingMember> = members.iter().collect();
        sorted.sort_by(|a, b| (&a.name, a.at).cmp(&(&b.name, b.at)));
        for (first, second) in sorted.iter().zip(sorted.iter().skip(1)) {
            if first.name == second.name {
                let message =
                    format!("duplicate key `{}`: it stands on line {} already", abbreviate(&second.name), first.at.line);
                self.report_error(second.at, message);
            }
        }
    }

    fn report_error(&mut self, at: SourcePosition, message: impl Into<String>) {
        self.out.push(Diagnostic::new(Severity::Error, self.path, at, message));
    }
}

/// Resolves a plain scalar by the core schema. `None` for infinities, NaN and numbers out of range.
fn resolve_plain_scalar(text: &str) -> Option<ScalarValue> {
    Some(match text {
        "" | "~" | "null" | "Null" | "NULL" => ScalarValue::Null,
        "true" | "True" | "TRUE" => ScalarValue::Bool(true),
        "false" | "False" | "FALSE" => ScalarValue::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return None,
        _ => {
            let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
            if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
                return None;
            }
            if let Some(digits) = text.strip_prefix("0o").filter(|digits| !digits.is_empty()) {
                return if digits.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
                    parse_radix(digits, 8)
                } else {
                    Some(ScalarValue::String)
                };
            }
            if let Some(digits) = text.strip_prefix("0x").filter(|digits| !digits.is_empty()) {
                return if digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                    parse_radix(digits, 16)
                } else {
                    Some(ScalarValue::String)
                };
            }
            if !is_decimal(unsigned) {
                return Some(ScalarValue::String);
            }
            let integer = unsigned.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<i64>().ok()).flatten();
            match integer {
                Some(integer) => ScalarValue::Number(integer.into()),
                None => {
                    let value = text.parse::<f64>().ok().filter(|value| value.is_finite())?;
                    ScalarValue::Number(JsonNumber::from_decimal(text, value))
                }
            }
        }
    })
}

fn parse_radix(digits: &str, radix: u32) -> Option<ScalarValue> {
    i64::from_str_radix(digits, radix).ok().map(|integer| ScalarValue::Number(JsonNumber::from(integer)))
}

/// `( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?`
fn is_decimal(unsigned: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent.strip_prefix(['+', '-']).unwrap_or(exponent))),
        None => (unsigned, None),
    };
    let mantissa_fits = match mantissa.split_once('.') {
        Some((whole, fraction)) => digits(whole) && digits(fraction) && !(whole.is_empty() && fraction.is_empty()),
        None => !mantissa.is_empty() && digits(mantissa),
    };
    mantissa_fits && exponent.is_none_or(|exponent| !exponent.is_empty() && digits(exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> (Vec<String>, Vec<String>) {
        let mut out = Vec::new();
        let nodes = parse_documents(text, "f", &mut out);
        (nodes.iter().map(|node| node.to_json().to_jcs()).collect(), out.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_core_schema() {
        let check = |text: &str, expected: &str| {
            let (values, problems) = read(format!("v: {text}").as_bytes());
            assert_eq!((values, problems), (vec![format!(r#"{{"v":{expected}}}"#)], vec![]), "{text}");
        };
        for text in [
            "no",
            "yes",
            "on",
            "off",
            "y",
            "NO",
            "nULL",
            "tRUE",
            "1_000",
            "0b1",
            "1:30",
            "+",
            "0o8",
            "0xg",
            "1e",
            "e1",
            "2026-01-01",
            "-0x10",
            "1.2.3",
        ] {
            check(text, &format!("\"{text}\""));
        }
        for (text, value) in [
            ("", "null"),
            ("~", "null"),
            ("Null", "null"),
            ("TRUE", "true"),
            ("False", "false"),
            ("12", "12"),
            ("-3", "-3"),
            ("+3", "3"),
            ("0o17", "15"),
            ("0xfF", "255"),
            ("1.5", "1.5"),
            (".5", "0.5"),
            ("5.", "5"),
            ("1e3", "1000"),
            ("007", "7"),
            ("'12'", "\"12\""),
            ("\"true\"", "\"true\""),
            ("|\n  a\n  b\n", "\"a\\nb\\n\""),
            ("[a, 1]", "[\"a\",1]"),
        ] {
            check(text, value);
        }
    }

    #[test]
    fn documents_and_what_is_refused() {
        let check = |text: &[u8], values: &[&str], problems: &[&str]| {
            let (found, said) = read(text);
            assert_eq!(found, values, "{}", String::from_utf8_lossy(text));
            assert_eq!(said, problems, "{}", String::from_utf8_lossy(text));
        };
        check(b"", &[], &[]);
        check(b"# nothing\n---\n---\na: 1\n---\n", &[r#"{"a":1}"#], &[]);
        check("\u{feff}a: ü".as_bytes(), &[r#"{"a":"ü"}"#], &[]);
        check(b"a: \xff", &[], &["f:1:4: error: the file is not UTF-8"]);
        check(b"a: 1\nb: \0", &[], &["f:2:4: error: the file holds a NUL character"]);
        check(b"a: 1\nb: 2\na: 3", &[r#"{"a":1,"b":2}"#], &["f:3:1: error: duplicate key `a`: it stands on line 1 already"]);
        check(
            b"a: &x 1",
            &[r#"{"a":1}"#],
            &["f:1:4: error: anchors (`&name`) are not supported: write the value out where it is needed"],
        );
        check(b"a: !!str 1", &[r#"{"a":1}"#], &["f:1:4: error: tags (`!name`) are not supported"]);
        check(b"1: a", &[r#"{"1":"a"}"#], &["f:1:1: error: a key must be a string: quote `1`"]);
        check(b"? [a]\n: b", &[], &["f:1:3: error: a key must be a string"]);
        check(b"a: .inf", &[r#"{"a":null}"#], &["f:1:4: error: `.inf` is not a finite number: quote it if it is text"]);
        check(b"a: 1e999", &[r#"{"a":null}"#], &["f:1:4: error: `1e999` is not a finite number: quote it if it is text"]);
        let (_, said) = read(format!("a: {}1{}", "[".repeat(100), "]".repeat(100)).as_bytes());
        assert_eq!(said, ["f:1:99: error: nested deeper than 96"]);
        let (_, said) = read(b"a: *x");
        assert!(said[0].starts_with("f:1:"), "{said:?}");
        let (_, said) = read(b"a: [1, 2\nb: 3");
        assert!(said[0].starts_with("f:2:2: error: not valid YAML: "), "{said:?}");
    }
}
