//! Tests of the JSON Schema for editors: it knows the same keys as the reader, accepts valid documents and refuses invalid ones.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde_json::{Map, Value, json};

use super::super::condition::CONDITION_BYTES_MAX;
use super::super::diagnostic::SourcePosition;
use super::super::document::{DOCUMENT_KINDS, KeyFiles, read_document};
use super::super::node::SourceNode;
use super::super::{SCHEMA, yaml};
use super::examples::{FOLDERS, folder};
use super::lint::sound_cases;
use crate::model::json;
use crate::model::limits::{ID_BYTES_MAX, TOOL_NAME_BYTES_MAX};
use crate::model::reason::{DecisionLayer, Reason};

/// Validates with the keywords of draft 2020-12 that the schema uses. Any other keyword fails the test.
struct SchemaValidator {
    root: Value,
    patterns: BTreeMap<String, Regex>,
}

impl SchemaValidator {
    fn new() -> Self {
        let root: Value = serde_json::from_str(SCHEMA).unwrap();
        let mut validator = Self { root, patterns: BTreeMap::new() };
        let root = validator.root.clone();
        validator.add_schema(&root);
        validator
    }

    fn add_schema(&mut self, schema: &Value) {
        if let Some(pattern) = schema.get("pattern").and_then(Value::as_str) {
            self.patterns.insert(pattern.to_owned(), Regex::new(pattern).unwrap());
        }
        match schema {
            Value::Object(members) => {
                members.iter().filter(|(name, _)| *name != "examples").for_each(|(_, value)| self.add_schema(value))
            }
            Value::Array(items) => items.iter().for_each(|item| self.add_schema(item)),
            _ => {}
        }
    }

    fn accepts(&self, value: &Value) -> bool {
        self.fits(&self.root, value)
    }

    fn fits(&self, schema: &Value, value: &Value) -> bool {
        let Value::Object(schema) = schema else {
            return schema == &Value::Bool(true);
        };
        schema.iter().all(|(keyword, expected)| self.keyword(schema, keyword, expected, value))
    }

    fn keyword(&self, schema: &Map<String, Value>, keyword: &str, expected: &Value, value: &Value) -> bool {
        let count = |count: usize| count as u64;
        let limit = || expected.as_u64().unwrap();
        let list = || expected.as_array().unwrap().iter();
        let number = || value.as_f64().zip(expected.as_f64());
        match keyword {
            "$schema" | "$defs" | "title" | "description" | "default" | "examples" | "then" => true,
            "$ref" => {
                let name = expected.as_str().unwrap().strip_prefix("#/$defs/").unwrap();
                self.fits(&self.root["$defs"][name], value)
            }
            "type" => match expected {
                Value::Array(types) => types.iter().any(|name| is_of_type(value, name.as_str().unwrap())),
                name => is_of_type(value, name.as_str().unwrap()),
            },
            "const" => value == expected,
            "enum" => list().any(|one| one == value),
            "minLength" => value.as_str().is_none_or(|text| count(text.chars().count()) >= limit()),
            "maxLength" => value.as_str().is_none_or(|text| count(text.chars().count()) <= limit()),
            "pattern" => value.as_str().is_none_or(|text| self.patterns[expected.as_str().unwrap()].is_match(text)),
            "minimum" => number().is_none_or(|(value, least)| value >= least),
            "maximum" => number().is_none_or(|(value, most)| value <= most),
            "minItems" => value.as_array().is_none_or(|items| count(items.len()) >= limit()),
            "maxItems" => value.as_array().is_none_or(|items| count(items.len()) <= limit()),
            "items" => value.as_array().is_none_or(|items| items.iter().all(|item| self.fits(expected, item))),
            "minProperties" => value.as_object().is_none_or(|members| count(members.len()) >= limit()),
            "maxProperties" => value.as_object().is_none_or(|members| count(members.len()) <= limit()),
            "required" => value.as_object().is_none_or(|members| list().all(|name| members.contains_key(name.as_str().unwrap()))),
            "properties" => value.as_object().is_none_or(|members| {
                members.iter().all(|(name, value)| expected.get(name).is_none_or(|schema| self.fits(schema, value)))
            }),
            "additionalProperties" => value.as_object().is_none_or(|members| {
                let named = |name: &str| schema.get("properties").is_some_and(|properties| properties.get(name).is_some());
                members.iter().all(|(name, value)| named(name) || self.fits(expected, value))
            }),
            "propertyNames" => {
                value.as_object().is_none_or(|members| members.keys().all(|name| self.fits(expected, &json!(name))))
            }
            "not" => !self.fits(expected, value),
            "allOf" => list().all(|one| self.fits(one, value)),
            "anyOf" => list().any(|one| self.fits(one, value)),
            "oneOf" => list().filter(|one| self.fits(one, value)).count() == 1,
            "if" => !self.fits(expected, value) || self.fits(&schema["then"], value),
            other => panic!("a keyword that this test does not know: {other}"),
        }
    }
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("no type: {other}"),
    }
}

/// The documents of a YAML text.
fn values(text: &str) -> Vec<Value> {
    let nodes = yaml::parse_documents(text.as_bytes(), "p.yaml", &mut Vec::new());
    nodes.iter().map(|node| serde_json::from_str(&node.to_json().to_jcs()).unwrap()).collect()
}

#[test]
fn what_is_good_fits() {
    let validator = SchemaValidator::new();
    for name in FOLDERS {
        for file in folder(name).iter().filter(|file| file.path.ends_with(".yaml")) {
            for (index, value) in values(std::str::from_utf8(&file.content).unwrap()).iter().enumerate() {
                assert!(validator.accepts(value), "{name}/{} document {index}: {value}", file.path);
            }
        }
    }
    for text in sound_cases() {
        for value in values(&text) {
            assert!(validator.accepts(&value), "{value}");
        }
    }
    let definitions = validator.root["$defs"].as_object().unwrap();
    for (name, definition) in definitions {
        for example in definition.get("examples").and_then(Value::as_array).into_iter().flatten() {
            assert!(validator.fits(definition, example), "{name}: {example}");
        }
    }
}

#[test]
fn what_is_bad_does_not() {
    let validator = SchemaValidator::new();
    let agent = "kind: agent\nid: spiffe://t/a\n";
    for text in [
        "- kind: group",
        "id: g",
        "kind: gruop\nid: g",
        "kind: group",
        "kind: group\nid: ''",
        "kind: group\nid: 12",
        "kind: group\nid: g\naloww: [crm/*]",
        "kind: group\nid: g\nallow: crm/*",
        "kind: group\nid: g\nallow: [crm]",
        "kind: group\nid: g\nallow: [crm/]",
        "kind: group\nid: g\nallow:\n- crm/*\n- crm/read: {}\n  crm/write: {}",
        "kind: group\nid: g\nallow: [crm/read: {by: [x]}]",
        "kind: group\nid: g\nallow: [crm/read: {only: 'yes'}]",
        "kind: group\nid: g\nallow: [crm/read: {args: {'*': 1}}]",
        "kind: group\nid: g\nallow: [crm/read: {args: {a: []}}]",
        "kind: group\nid: g\nallow: [crm/read: {args: {a: {}}}]",
        "kind: group\nid: g\nallow: [crm/read: {args: {a: {mx: 1}}}]",
        "kind: group\nid: g\nallow: [crm/read: {args: {a: {max: '5'}}}]",
        "kind: group\nid: g\nallow: [crm/read: {args: {a: {constraint_type: regex}}}]",
        "kind: group\nid: g\nallow: [crm/read: {args: {a: {constraint_type: any, constraints: []}}}]",
        "kind: group\nid: g\nallow: [crm/read: {when: [x]}]",
        "kind: group\nid: g\nallow: [crm/read: {evidence: verified}]",
        "kind: group\nid: g\nallow: [crm/read: {prepared: crm}]",
        "kind: group\nid: g\ndeny: [crm/read: {only: true}]",
        "kind: group\nid: g\ndeny: [crm/read: {evidence: attested}]",
        "kind: group\nid: g\napprove: [crm/wipe]",
        "kind: group\nid: g\napprove: [crm/wipe: {by: []}]",
        "kind: group\nid: g\napprove: [crm/wipe: {by: [x], expires_in: 10}]",
        "kind: group\nid: g\nmode: dark",
        "kind: agent\nid: a",
        &format!("{agent}keys: [short]"),
        &format!("{agent}applications: portal"),
        &format!("{agent}session: {{hops: 1}}"),
        &format!("{agent}session: {{hops_max: 9}}"),
        &format!("{agent}session: {{lifetime_max: 8}}"),
        &format!("{agent}delegates_to: ['*']"),
        "kind: tool\nid: crm",
        "kind: tool\nid: crm/*",
        "kind: tool\nid: crm/read\nrisk: high",
        "kind: tool\nid: crm/read\nmode: shadow",
        "kind: tool\nid: crm/read\nschema_sha256: abc",
        "kind: server\nid: crm",
        "kind: server\nid: a/b\ntools: {}",
        "kind: server\nid: crm\ntools: {read: {rsk: read}}",
        "kind: issuer\nid: https://i",
        "kind: issuer\nid: https://i\nkeys: {}",
        "kind: issuer\nid: https://i\nkeys: {file: k.json, jwks: {keys: []}}",
        "kind: operator\nid: ada",
        "kind: operator\nid: ada\nkeys: []\nroles: [audit]",
        "kind: guardrail\nid: g\ntools: []\nforbid_when: 'true'",
        "kind: guardrail\nid: g\ntools: ['*']",
        "kind: test\nagent: spiffe://t/a\nagents: [spiffe://t/a]\nuser: {issuer: i, sub: s}\napplication: p\nexpect: []",
        "kind: test\nuser: {issuer: i, sub: s}\napplication: p\nexpect: []",
        "kind: test\nagent: spiffe://t/a\nuser: {issuer: i, sub: s}\napplication: p\nexpect: [{tool: a/b, want: MAYBE}]",
        "kind: test\nagent: spiffe://t/a\nuser: {issuer: i, sub: s}\napplication: p\nexpect: [{tool: a/b, want: DENY, reason: NO}]",
    ] {
        let values = values(text);
        assert_eq!(values.len(), 1, "{text}");
        assert!(!validator.accepts(&values[0]), "{text}");
        assert!(!sound(&values[0]), "the reader takes it: {text}");
    }
}

/// Whether the reader accepts a document.
fn sound(value: &Value) -> bool {
    read_value(value).is_empty()
}

/// The diagnostics of the reader for a document.
fn read_value(value: &Value) -> Vec<String> {
    let value = json::parse(value.to_string().as_bytes()).unwrap();
    let node = SourceNode::from_json(&value, SourcePosition::START);
    let mut out = Vec::new();
    read_document(&node, "p.yaml", &KeyFiles::empty(), &mut out);
    out.iter().map(|diagnostic| diagnostic.message.clone()).collect()
}

/// Every name in the source of the reader or in the schema that may be a key.
fn candidates(schema: &Value) -> BTreeSet<String> {
    let asked = Regex::new(r#"(?:take\(|require\(|names\(fields, |lifetime\()"([a-z_0-9]+)""#).unwrap();
    let sources =
        [include_str!("../document/read.rs"), include_str!("../document/entry.rs"), include_str!("../document/test_case.rs")];
    let mut names: BTreeSet<String> =
        sources.iter().flat_map(|source| asked.captures_iter(source)).map(|found| found[1].to_owned()).collect();
    assert!(names.len() > 30, "{names:?}");
    // The reader takes the names of the permission lists from a function.
    names.extend(["allow", "approve", "deny"].map(str::to_owned));
    collect(schema, &mut names);
    names
}

fn collect(schema: &Value, names: &mut BTreeSet<String>) {
    match schema {
        Value::Object(members) => {
            for (keyword, value) in members {
                if let ("properties", Some(properties)) = (keyword.as_str(), value.as_object()) {
                    names.extend(properties.keys().cloned());
                }
                collect(value, names);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, names)),
        _ => {}
    }
}

/// The schema of a part of a document, and a function that builds a document around a value of that part.
type SchemaLocation<'a> = (String, &'a Value, Box<dyn Fn(Value) -> Value>);

#[test]
fn the_keys_are_the_readers() {
    let validator = SchemaValidator::new();
    let definitions = &validator.root["$defs"];
    let mut places: Vec<SchemaLocation<'_>> = Vec::new();
    for kind in DOCUMENT_KINDS {
        let wrap = move |inner: Value| {
            let mut document = json!({ "kind": kind, "id": if *kind == "agent" { "spiffe://t/a" } else { "a/b" } });
            document.as_object_mut().unwrap().extend(inner.as_object().unwrap().clone());
            document
        };
        places.push(((*kind).to_owned(), &definitions[kind], Box::new(wrap)));
    }
    let entry = |list: &'static str| move |inner: Value| json!({ "kind": "group", "id": "g", list: [{ "a/b": inner }] });
    let entry_schema = |list: &str| &definitions[list]["items"]["anyOf"][1]["additionalProperties"];
    places.push(("allow".to_owned(), entry_schema("allow"), Box::new(entry("allow"))));
    places.push(("deny".to_owned(), entry_schema("deny"), Box::new(entry("deny"))));
    places.push(("approve".to_owned(), &definitions["approve"]["items"]["additionalProperties"], Box::new(entry("approve"))));
    let session = |inner: Value| json!({ "kind": "agent", "id": "spiffe://t/a", "session": inner });
    places.push(("session".to_owned(), &definitions["agent"]["properties"]["session"], Box::new(session)));
    let tools = |inner: Value| json!({ "kind": "server", "id": "s", "tools": { "t": inner } });
    places.push((
        "a server's tool".to_owned(),
        &definitions["server"]["properties"]["tools"]["additionalProperties"],
        Box::new(tools),
    ));
    let users = |inner: Value| json!({ "kind": "operator", "id": "o", "keys": [], "roles": [], "users": [inner] });
    places.push(("users".to_owned(), &definitions["operator"]["properties"]["users"]["items"], Box::new(users)));
    let user = |inner: Value| json!({ "kind": "test", "application": "p", "user": inner });
    places.push(("user".to_owned(), &definitions["test"]["properties"]["user"], Box::new(user)));
    let expect = |inner: Value| json!({ "kind": "test", "application": "p", "expect": [inner] });
    places.push(("expect".to_owned(), &definitions["test"]["properties"]["expect"]["items"], Box::new(expect)));

    let names = candidates(&validator.root);
    for (place, schema, wrap) in places {
        let properties = schema["properties"].as_object().unwrap_or_else(|| panic!("{place}: {schema}"));
        assert_eq!(schema["additionalProperties"], json!(false), "{place}");
        for name in &names {
            let said = read_value(&wrap(json!({ name: null })));
            // A key that the reader refuses in a list by a message of its own counts as unknown there.
            let known = !said.iter().any(|line| {
                line == &format!("unknown key `{name}`")
                    || line.starts_with(&format!("`{name}` means nothing in a deny"))
                    || line.starts_with(&format!("`{name}` has no meaning in a document of kind"))
            });
            assert_eq!(properties.contains_key(name), known, "`{name}` in {place}: {said:?}");
        }
    }
}

#[test]
fn the_names_and_limits_are_the_readers() {
    let validator = SchemaValidator::new();
    let expectation = &validator.root["$defs"]["test"]["properties"]["expect"]["items"]["properties"];
    let reasons: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(expectation["reason"]["enum"], json!(reasons));
    let layers: Vec<&str> = DecisionLayer::ALL.iter().map(|layer| layer.as_str()).collect();
    assert_eq!(expectation["layer"]["enum"], json!(layers));
    assert_eq!(validator.root["properties"]["kind"]["enum"], json!(DOCUMENT_KINDS));
    let limits = [("text", ID_BYTES_MAX), ("tool_name", TOOL_NAME_BYTES_MAX), ("condition", CONDITION_BYTES_MAX)];
    for (name, limit) in limits {
        assert_eq!(validator.root["$defs"][name]["maxLength"], json!(limit), "{name}");
    }
}
