//! Vectors that must pass: near misses of the refused ones, and every narrowing that the table of constraint pairs allows.

use serde_json::{Value, json};

use super::builder::*;

pub(super) fn vectors() -> Vec<TokenVector> {
    let mut vectors = chains();
    vectors.extend(narrowings());
    vectors.extend(proofs());
    vectors
}

fn edited(id: &str, title: &str, at: usize, edit: impl Fn(&mut TokenDraft)) -> TokenVector {
    let edited = chain(3, |level, draft| {
        if level == at {
            edit(draft);
        }
    });
    TokenVector::new(format!("ok-{id}"), title, edited)
}

fn chains() -> Vec<TokenVector> {
    let nested = (1..32).fold(
        json!({"constraint_type": "exact", "value": "north"}),
        |inner, _| json!({"constraint_type": "all", "constraints": [inner]}),
    );
    let back = {
        let mut chain = chain(2, |_, _| {});
        let last = hop(&chain[1], HOLDERS[1], 2, HOLDERS[0]).sign();
        chain.push(last);
        chain
    };
    vec![
        TokenVector::new("ok-one", "a root alone", chain(1, |_, _| {})),
        TokenVector::new("ok-two", "a root and a hop", chain(2, |_, _| {})),
        TokenVector::new("ok-three", "a root and two hops", chain(3, |_, _| {})),
        TokenVector::new("ok-nine", "nine tokens", long_chain(9, |_, _| {})).call(TOOL, json!({"region": "north"}), 18),
        TokenVector::new("ok-back", "handed back to the first agent", back).call(TOOL, json!({"region": "north"}), HOLDERS[0]),
        edited("kid", "`kid` of the key that signed", 0, |draft| draft.header["kid"] = "k1".into()),
        edited("second-key", "signed by the issuer's second key, no `kid`", 0, |draft| draft.signer = ISSUER_KEY_2),
        edited("second-key-kid", "signed by the issuer's second key, named", 0, |draft| {
            draft.signer = ISSUER_KEY_2;
            draft.header["kid"] = "k2".into();
        }),
        edited("hop-kid", "any `kid` in a hop selects nothing", 1, |draft| draft.header["kid"] = "../../dev/null".into()),
        edited("header-unknown", "a header parameter that nobody knows", 0, |draft| draft.header["x-note"] = json!({"a": 1})),
        edited("header-x5t", "a certificate's thumbprint brings no key", 1, |draft| draft.header["x5t#S256"] = "AAAA".into()),
        edited("claim-unknown", "a claim that nobody knows", 1, |draft| draft.set("/note", json!([1.5]))),
        edited("details-unknown", "an unknown member of the entry", 0, |draft| {
            draft.set("/authorization_details/0/locations", json!([]))
        }),
        edited("cnf-unknown", "an unknown member of `cnf`", 0, |draft| draft.set("/cnf/jkt", "AAAA".into())),
        edited("jwk-alg", "`alg` and `use` in the holder's JWK", 0, |draft| {
            draft.set("/cnf/jwk/alg", "Ed25519".into());
            draft.set("/cnf/jwk/use", "sig".into());
        }),
        edited("jti-text", "a `jti` that is no UUID", 1, |draft| draft.set("/jti", "hop one".into())),
        edited("nbf-past", "`nbf` that has passed, token 0", 0, |draft| draft.set("/nbf", (NOW - 10).into())),
        edited("nbf-skew-root", "`nbf` 30 s ahead, token 0", 0, |draft| draft.set("/nbf", (NOW + 30).into())),
        edited("nbf-skew-hop", "`nbf` 30 s ahead, token 2", 2, |draft| draft.set("/nbf", (NOW + 30).into())),
        edited("nbf-long-ago", "`nbf` before the epoch", 1, |draft| draft.set("/nbf", (-1).into())),
        edited("iat-skew", "`iat` 30 s ahead", 2, |draft| draft.set("/iat", (NOW + 30).into())),
        edited("iat-of-parent", "a hop as old as its parent", 1, |draft| draft.set("/iat", (NOW - 300).into())),
        edited("last-second", "a leaf in its last second", 2, |draft| draft.set("/exp", (NOW + 1).into())),
        edited("lifetime", "a root of eight hours", 0, |draft| draft.set("/exp", (NOW - 300 + 28800).into())),
        edited("lifetime-hop", "a hop of an hour, as long as its parent", 1, |draft| {
            draft.set("/iat", (NOW - 300).into());
            draft.set("/exp", (NOW + 3300).into());
        }),
        edited("max-depth", "`del_max_depth` 8 in the root", 0, |draft| draft.set("/del_max_depth", 8.into())),
        edited("terminal", "a leaf that may not be handed on", 2, |draft| draft.set("/del_max_depth", 2.into())),
        edited("hop-aud", "`aud` repeated in a hop", 1, |draft| draft.set("/aud", GATEWAY.into())),
        edited("aud-lifted", "no `aud` where none is required", 0, |draft| draft.remove("aud"))
            .with(|vector| vector.options = json!({"require_chain_audience": false})),
        edited("group-unknown", "a group that no document knows is ignored", 0, |draft| {
            draft.set("/groups", json!(["sales", "chess"]))
        }),
        edited("groups-none", "no groups", 0, |draft| draft.remove("groups")),
        edited("act-iss", "`act.iss` is not checked", 1, |draft| draft.set("/act/iss", 7.into())),
        edited("act-iss-none", "no `act.iss`", 0, |draft| draft.set("/act", json!({"sub": agent(HOLDERS[0])}))),
        edited("optional-claims", "`auth_time`, `acr`, `status`", 0, |draft| {
            draft.set("/auth_time", (NOW - 4000).into());
            draft.set("/acr", "phr".into());
            draft.set("/status", json!({"status_list": {"idx": 1, "uri": "https://s.example"}}));
        }),
        edited("nested", "constraints 32 deep", 0, |draft| {
            draft.tools(json!({TOOL: {"region": nested, "limit": {"constraint_type": "wildcard", "optional": true}}}));
        })
        .with(|vector| vector.chain.truncate(1))
        .call(TOOL, json!({"region": "north"}), HOLDERS[0]),
        edited("large", "a token just under 8 KiB", 0, |draft| draft.set("/pad", "x".repeat(4900).into())),
        edited("unicode", "names beyond ASCII", 0, |draft| draft.set("/sub", "Zoë 🦀".into())),
        TokenVector::new(
            "ok-registry-off",
            "no identities, registry off",
            chain(3, |level, draft| {
                draft.remove("act");
                for name in ["sub", "sub_profile", "client_id", "sid", "txn", "groups"].iter().filter(|_| level == 0) {
                    draft.remove(name);
                }
            }),
        )
        .with(|vector| vector.options = json!({"registry": "off"})),
        TokenVector::new(
            "ok-other-issuer",
            "another issuer, for any application and group",
            chain(1, |_, draft| {
                draft.set("/iss", OTHER_ISSUER.into());
                draft.set("/client_id", "helpdesk".into());
                draft.set("/groups", json!(["support"]));
                draft.set("/exp", (NOW + 300).into());
                draft.signer = OTHER_ISSUER_KEY;
            }),
        ),
    ]
}

fn narrowings() -> Vec<TokenVector> {
    let of = |kind: &str, name: &str, values: Value| json!({"constraint_type": kind, name: values});
    let range = |min: i64, max: i64| json!({"constraint_type": "range", "min": min, "max": max});
    let exact = |value: Value| of("exact", "value", value);
    let wildcard = || json!({"constraint_type": "wildcard"});
    let optional = |mut constraint: Value| {
        constraint["optional"] = true.into();
        constraint
    };
    let mut vectors = Vec::new();
    for (id, parent, child, value) in [
        ("exact", exact(json!(100)), exact(json!(100.0)), json!(1e2)),
        ("range", range(0, 10), json!({"constraint_type": "range", "min": 0, "min_inclusive": false, "max": 9.5}), json!(9.5)),
        ("range-exact", range(0, 10), exact(json!(10)), json!(10)),
        ("range-bound", json!({"constraint_type": "range"}), range(0, 1), json!(0)),
        ("one-of", of("one_of", "values", json!([1, "a", null])), of("one_of", "values", json!([null, 1])), Value::Null),
        ("one-of-exact", of("one_of", "values", json!([1, "a"])), exact(json!("a")), json!("a")),
        ("not-one-of", of("not_one_of", "excluded", json!([1])), of("not_one_of", "excluded", json!([2, 1])), json!(3)),
        (
            "contains",
            of("contains", "required", json!(["a"])),
            of("contains", "required", json!(["b", "a"])),
            json!(["a", "b", "c"]),
        ),
        ("subset", of("subset", "allowed", json!(["a", "b"])), of("subset", "allowed", json!(["b"])), json!(["b"])),
        (
            "all",
            of("all", "constraints", json!([range(0, 10)])),
            of("all", "constraints", json!([exact(json!(5)), wildcard()])),
            json!(5),
        ),
        (
            "any",
            of("any", "constraints", json!([range(0, 10), exact(json!("x"))])),
            of("any", "constraints", json!([exact(json!(5))])),
            json!(5),
        ),
        ("wildcard", wildcard(), of("any", "constraints", json!([exact(json!("x"))])), json!("x")),
        ("required", optional(wildcard()), exact(json!(1)), json!(1)),
        ("optional", optional(range(0, 10)), optional(range(1, 9)), json!(2)),
    ] {
        let chain = chain(2, |level, draft| draft.tools(json!({TOOL: {"value": if level == 0 { &parent } else { &child }}})));
        let vector = TokenVector::new(format!("ok-pair-{id}"), format!("{child} under {parent}"), chain);
        vectors.push(vector.call(TOOL, json!({"value": value}), HOLDERS[1]));
    }
    let maps = [
        ("closed-under-open", json!({}), json!({"a": exact(json!(1))}), json!({"a": 1})),
        (
            "named-under-star",
            json!({"a": wildcard(), "*": wildcard()}),
            json!({"a": wildcard(), "b": wildcard()}),
            json!({"a": 1, "b": 2}),
        ),
        ("star-kept", json!({"*": wildcard()}), json!({"*": wildcard()}), json!({"anything": [1, {"x": null}]})),
        ("optional-dropped", json!({"a": wildcard(), "b": optional(wildcard())}), json!({"a": wildcard()}), json!({"a": 1})),
        ("optional-absent", json!({"a": optional(exact(json!(1)))}), json!({"a": optional(exact(json!(1)))}), json!({})),
        ("no-arguments", json!({"a": optional(wildcard())}), json!({"a": optional(wildcard())}), json!({})),
    ];
    for (id, parent, child, arguments) in maps {
        let chain = chain(2, |level, draft| draft.tools(json!({TOOL: if level == 0 { &parent } else { &child }})));
        let vector = TokenVector::new(format!("ok-map-{id}"), format!("{child} under {parent}"), chain);
        vectors.push(vector.call(TOOL, arguments, HOLDERS[1]));
    }
    vectors
}

fn proofs() -> Vec<TokenVector> {
    let leaf = HOLDERS[2];
    let arguments = json!({"region": "north"});
    let proved = |id: &str, title: &str, edit: &dyn Fn(&mut TokenDraft)| {
        let chain = chain(3, |_, _| {});
        let proof = proof(&chain, leaf, TOOL, &arguments, edit);
        TokenVector::new(format!("ok-proof-{id}"), title, chain).with(|vector| vector.proof = Some(proof))
    };
    vec![
        proved("oldest", "`iat` 30 s ago", &|draft| draft.set("/iat", (NOW - 30).into())),
        proved("earliest", "`iat` 30 s ahead", &|draft| draft.set("/iat", (NOW + 30).into())),
        proved("nbf", "`nbf` 30 s ahead", &|draft| draft.set("/nbf", (NOW + 30).into())),
        proved("kid", "`kid` selects nothing", &|draft| draft.header["kid"] = "x".into()),
        proved("unknown", "a claim that nobody knows", &|draft| draft.set("/note", 1.into())),
        proved("nonce", "the `nonce` that was asked for", &|draft| draft.set("/nonce", "n-1".into()))
            .with(|vector| vector.options = json!({"nonce": "n-1"})),
        proved("nonce-unasked", "a `nonce` that nobody asked for", &|draft| draft.set("/nonce", "n-1".into())),
        proved("aud-lifted", "no `aat_aud` where none is required", &|draft| draft.remove("aat_aud"))
            .with(|vector| vector.options = json!({"require_proof_audience": false})),
        proved("spaced", "`hta` written with other spaces and escapes", &|draft| {
            draft.replace(r#"{"region":"north"}"#, r#"{ "region" : "\u006eorth" }"#);
        }),
        proved("used-another", "another proof was used before", &|_| {}).with(|vector| {
            let other = |draft: &mut TokenDraft| draft.set("/jti", "018cc251-f400-7000-9000-000000000002".into());
            vector.proofs_used = vec![proof(&vector.chain, leaf, TOOL, &arguments, other)];
        }),
    ]
}
