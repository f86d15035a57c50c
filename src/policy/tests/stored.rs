//! Tests of the stored form: the reader accepts exactly what the writer writes.

use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow};

use super::super::document::Document;
use super::{KEY_X, diagnostics, documents, file};

/// Every key of every kind.
fn everything() -> String {
    format!(
        r#"
{{kind: issuer, id: "https://i", keys: {{jwks: {{keys: [{{kty: OKP, crv: Ed25519, x: {KEY_X}, kid: k1}}]}}}}, audiences: [https://g],
  groups: [sales], typ: [aat+jwt, at+jwt], lifetime_max: 90m, hop_lifetime_max: 45s, applications: ['*']}}
---
{{kind: issuer, id: "https://plain", keys: {{jwks: {{keys: [{{kty: OKP, crv: Ed25519, x: {KEY_X}}}]}}}}}}
---
{{kind: application, id: "with \"quotes\" and ü", allow: ['*']}}
---
{{kind: group, id: sales, deny: [crm/x: {{args: {{a: {{constraint_type: not_one_of, excluded: []}}}}}}]}}
---
{{kind: tool, id: pay/out, risk: write, proof: none, schema_sha256: {digits}}}
---
{{kind: tool, id: pay/in}}
---
{{kind: server, id: crm, tools: {{x: {{risk: read}}, y/z: {{proof: per_handle}}}}}}
---
kind: agent
id: spiffe://t/a
owner: platform
keys: [kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k]
applications: [a b]
acts_for: ['*']
delegates_to: [spiffe://t/a]
session: {{lifetime_max: 8h, hops_max: 0}}
include: [set]
allow:
  - crm/*
  - pay/*: {{args: {{n: 1.50, s: '12', b: true, z: null, r: {{min: -3, max: 1e3}}, l: [1, two, [3], {{four: 5}}]}}, only: true}}
  - pay/in: {{args: {{v: {{constraint_type: all, optional: true, constraints: [{{constraint_type: range, min: 1, min_inclusive: false, max: 2, max_inclusive: false}},
      {{constraint_type: any, constraints: [{{constraint_type: wildcard}}, {{constraint_type: contains, required: [a]}}, {{constraint_type: subset, allowed: [b]}}]}}]}}}}}}
approve:
  - pay/out: {{by: [x, y], expires_in: 1500ms}}
  - pay/in: {{by: [x]}}
---
{{kind: permission_set, id: set, include: []}}
---
{{kind: operator, id: ada, keys: [{{kty: OKP, crv: Ed25519, x: PUAXw-hDiVqStwqnTRt-vJyYLM8uxJaMwM1V8Sr0Zgw, use: sig}}], roles: [respond, administer, approve, audit], groups: [x],
  users: [{{issuer: "https://i", sub: "a\nda"}}]}}
"#,
        digits = "12".repeat(32)
    )
    .replace("a\\nda", "ada")
}

#[test]
fn a_row_reads_back_as_the_same_document() {
    for document in documents(&everything()) {
        let row = document.to_row(DocumentOrigin::Folder);
        let back = Document::from_row(&row).unwrap();
        assert_eq!(back, document, "{}", row.json);
        assert_eq!((&back.path, back.line), (&document.path, document.line));
        assert_eq!(back.to_row(DocumentOrigin::Folder), row);
        assert_eq!(row.json, crate::model::json::parse(row.json.as_bytes()).unwrap().to_jcs());
        assert!(row.json.contains(&format!("\"kind\":\"{}\"", row.key.kind)));
    }
}

#[test]
fn the_stored_form_is_stable() {
    let check = |text: &str, expected: &str| assert_eq!(documents(text)[0].to_row(DocumentOrigin::Api).json, expected);
    check("{kind: tool, id: a/b}", r#"{"id":"a/b","kind":"tool","risk":"destructive"}"#);
    check(
        "{kind: group, id: g, allow: ['*', {a/b: {args: {n: {max: 15}}}}]}",
        r#"{"allow":["*",{"a/b":{"args":{"n":{"constraint_type":"range","max":15}}}}],"id":"g","kind":"group"}"#,
    );
    check(
        "{kind: agent, id: spiffe://t/a, session: {lifetime_max: 90m, hops_max: 2}, acts_for: '*'}",
        r#"{"acts_for":["*"],"id":"spiffe://t/a","kind":"agent","session":{"hops_max":2,"lifetime_max":"90m"}}"#,
    );
}

#[test]
fn rows_that_are_refused() {
    let check = |kind: &str, id: &str, json: &str, problem: &str| {
        let key = DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
        let row = DocumentRow { key, json: json.to_owned(), path: String::new(), line: 0, origin: DocumentOrigin::Api };
        let error = Document::from_row(&row).unwrap_err().to_string();
        assert!(error.starts_with(&format!("stored {kind} `{id}` cannot be read: ")) && error.contains(problem), "{error}");
    };
    check("tool", "a/b", r#"{"id":"a/b","kind":"tool""#, "EOF");
    check("tool", "a/b", r#"{"id":"a/c","kind":"tool"}"#, "another document");
    check("tool", "a/b", r#"{"id":"a/b","kind":"tool","later":1}"#, "unknown key `later`");
    check("tool", "a/b", r#"[]"#, "a document must be a mapping");
    check("issuer", "i", r#"{"id":"i","kind":"issuer","keys":{"file":"k.json"}}"#, "there is no file `k.json`");
    check("guardrail", "g", r#"{"id":"g","kind":"guardrail","tools":["*"]}"#, "`forbid_when` is missing");
    let test = r#"{"agent":"a","application":"p","expect":[],"id":"t","kind":"test","user":{"issuer":"i","sub":"s"}}"#;
    check("test", "t", test, "a test is run where it is written");
    // A shadow document and the enforced one with its id are two documents.
    check("group", "g", r#"{"id":"g","kind":"group","mode":"shadow"}"#, "another document");
    check("group.shadow", "g", r#"{"id":"g","kind":"group"}"#, "another document");
}

#[test]
fn everything_is_sound_but_for_its_names() {
    let said = diagnostics(&file(&everything()));
    assert!(said.iter().all(|line| line.contains(": unknown application `a b`") || line.contains(": warning: ")), "{said:#?}");
}
