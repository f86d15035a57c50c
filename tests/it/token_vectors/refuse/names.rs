//! Vectors with tokens that are not valid yet by `nbf`, and with names that contain control characters.

use serde_json::{Value, json};

use super::super::builder::*;
use super::spoiled;

pub(super) fn vectors() -> Vec<TokenVector> {
    let mut vectors = not_before();
    vectors.extend(control_characters());
    vectors
}

fn not_before() -> Vec<TokenVector> {
    let item = "`nbf` ahead";
    let mut vectors = Vec::new();
    for at in [0, 2] {
        for (id, ahead_s) in [("just", 31), ("far", 1800)] {
            let title = format!("`nbf` {ahead_s} s ahead, token {at}");
            let vector = spoiled(&format!("nbf-{id}-{at}"), &title, at, |draft| draft.set("/nbf", (NOW + ahead_s).into()));
            vectors.push(vector.item(item).denied("TOKEN_NOT_YET_VALID", at));
        }
        for (id, value) in [("text", json!(NOW.to_string())), ("null", Value::Null), ("list", json!([NOW]))] {
            let title = format!("`nbf` is {value}, token {at}");
            let vector = spoiled(&format!("nbf-{id}-{at}"), &title, at, |draft| draft.set("/nbf", value.clone()));
            vectors.push(vector.denied("TOKEN_MALFORMED", at));
        }
        for (id, text) in [("fraction", "1704067200.5"), ("exponent", "1.7e9")] {
            let vector = spoiled(&format!("nbf-{id}-{at}"), &format!("`nbf` {text}, token {at}"), at, |draft| {
                draft.set("/nbf", "HERE".into());
                draft.replace("\"HERE\"", text);
            });
            vectors.push(vector.item("fractional dates").denied("TOKEN_MALFORMED", at));
        }
    }
    let leaf = HOLDERS[2];
    for (id, title, value, reason) in [
        ("proof-nbf", "a proof whose `nbf` is 31 s ahead", json!(NOW + 31), "PROOF_STALE"),
        ("proof-nbf-text", "a proof whose `nbf` is a string", json!(NOW.to_string()), "PROOF_INVALID"),
    ] {
        let chain = chain(3, |_, _| {});
        let proof = proof(&chain, leaf, TOOL, &json!({"region": "north"}), |draft| draft.set("/nbf", value.clone()));
        vectors.push(TokenVector::new(id, title, chain).with(|vector| vector.proof = Some(proof)).denied(reason, None));
    }
    vectors
}

fn control_characters() -> Vec<TokenVector> {
    let item = "control character in an id";
    let mut vectors = Vec::new();
    for (name, what, character) in [("nul", "NUL", '\0'), ("newline", "a line feed", '\n'), ("delete", "DEL", '\u{7f}')] {
        let spoil = |value: &Value| Value::String(format!("{}{character}x", value.as_str().unwrap()));
        for (claim, at) in [
            ("/jti", 0),
            ("/jti", 2),
            ("/sub", 0),
            ("/client_id", 0),
            ("/sid", 0),
            ("/txn", 0),
            ("/acr", 0),
            ("/aud", 0),
            ("/aud", 1),
            ("/act/sub", 1),
            ("/groups/0", 0),
        ] {
            let place = claim.trim_start_matches('/').replace('/', "-");
            let title = format!("{what} in `{}`, token {at}", place.replace('-', "."));
            let vector = spoiled(&format!("control-{name}-{place}-{at}"), &title, at, |draft| {
                let spoiled = spoil(draft.claims.pointer(claim).unwrap_or(&json!(GATEWAY)));
                match draft.claims.pointer_mut(claim) {
                    Some(value) => *value = spoiled,
                    None => draft.set(claim, spoiled),
                }
            });
            vectors.push(vector.item(item).denied("TOKEN_MALFORMED", at));
        }
        let tool = format!("{TOOL}{character}");
        let vector = spoiled(&format!("control-{name}-tool"), &format!("{what} in the name of a tool"), 0, |draft| {
            draft.tools(json!({TOOL: {}, tool.as_str(): {}}));
        });
        vectors.push(vector.item(item).denied("TOKEN_MALFORMED", 0));
    }
    vectors
}
