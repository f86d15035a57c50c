//! Vectors that must be refused: every item of the design's list, then every other reason for which a chain can be refused.

mod names;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portcullis::token::issue;
use serde_json::{Value, json};

use super::builder::*;

pub(super) fn vectors() -> Vec<TokenVector> {
    let parts = [headers(), encodings(), types(), claims(), links(), attenuation(), identities(), proofs(), limits(), calls()];
    parts.into_iter().flatten().chain(names::vectors()).collect()
}

/// A vector whose chain differs from the valid one in one token.
fn spoiled(id: &str, title: &str, at: usize, edit: impl Fn(&mut TokenDraft)) -> TokenVector {
    let edited = chain(3, |level, draft| {
        if level == at {
            edit(draft);
        }
    });
    TokenVector::new(id, title, edited)
}

fn headers() -> Vec<TokenVector> {
    let mut vectors = Vec::new();
    for alg in ["none", "None", "NONE", "nOnE"] {
        for at in [0, 2] {
            let mut chain = chain(3, |level, draft| {
                if level == at {
                    draft.header["alg"] = alg.into();
                }
            });
            chain[at] = with_part(&chain[at], 2, |_| String::new());
            let vector = TokenVector::new(format!("alg-{alg}-{at}"), format!("`alg` `{alg}`, no signature, token {at}"), chain);
            vectors.push(vector.item("`none` in any case").denied("TOKEN_ALG", at));
        }
    }
    let mut chain = chain(1, |_, draft| draft.header["alg"] = "HS256".into());
    let signing_input = chain[0].rsplit_once('.').unwrap().0.to_owned();
    let secret = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key(ISSUER_KEY).public_key().as_bytes());
    let tag = URL_SAFE_NO_PAD.encode(ring::hmac::sign(&secret, signing_input.as_bytes()));
    chain[0] = format!("{signing_input}.{tag}");
    let vector = TokenVector::new("alg-hs256-public-key", "HMAC keyed with the issuer's public key", chain);
    vectors.push(vector.item("HS256 keyed with a public key").denied("TOKEN_ALG", 0));
    for alg in [json!("EdDSA"), json!("ES256"), json!("RS256"), json!("ed25519"), json!(["Ed25519"]), Value::Null] {
        for at in [0, 1] {
            let vector = spoiled(&format!("alg-{alg}-{at}"), &format!("`alg` {alg}, token {at}"), at, |draft| {
                draft.header["alg"] = alg.clone()
            });
            vectors.push(vector.item("`alg` not the key's").denied("TOKEN_ALG", at));
        }
    }
    let own: Value = serde_json::from_str(&key(ISSUER_KEY).public_key().to_jwk()).unwrap();
    for (name, value) in [
        ("jwk", own),
        ("jku", json!("https://evil.example/jwks.json")),
        ("x5u", json!("https://evil.example/cert.pem")),
        ("x5c", json!(["MIIB"])),
    ] {
        for at in [0, 1] {
            let vector = spoiled(&format!("header-{name}-{at}"), &format!("`{name}` in the header, token {at}"), at, |draft| {
                draft.header[name] = value.clone();
            });
            vectors.push(vector.item("key material or URLs in the header").denied("TOKEN_MALFORMED", at));
        }
    }
    for (index, kid) in
        [json!("k2"), json!("k9"), json!(""), json!("../../dev/null"), json!("k1' OR '1'='1"), json!(1), Value::Null]
            .iter()
            .enumerate()
    {
        let title = format!("root by key `k1` with `kid` {kid}");
        let vector = spoiled(&format!("kid-{index}"), &title, 0, |draft| draft.header["kid"] = kid.clone());
        vectors.push(vector.item("foreign or injected `kid`").denied("TOKEN_SIGNATURE", 0));
    }
    let vector = spoiled("kid-foreign-key", "root by another issuer's key with a `kid` of this one", 0, |draft| {
        draft.header["kid"] = "k1".into();
        draft.signer = OTHER_ISSUER_KEY;
    });
    vectors.push(vector.item("foreign or injected `kid`").denied("TOKEN_SIGNATURE", 0));
    for (index, crit) in [json!(["exp"]), json!(["b64"]), json!([]), json!("x")].iter().enumerate() {
        let vector = spoiled(&format!("crit-{index}"), &format!("`crit` {crit}"), index % 2, |draft| {
            draft.header["crit"] = crit.clone();
            draft.header["b64"] = true.into();
        });
        vectors.push(vector.item("unknown `crit`").denied("TOKEN_MALFORMED", index % 2));
    }
    vectors
}

fn encodings() -> Vec<TokenVector> {
    let good = || chain(3, |_, _| {});
    let changed = |at: usize, change: &dyn Fn(&str) -> String| {
        let mut chain = good();
        chain[at] = change(&chain[at]);
        chain
    };
    let malformed = |id: &str, title: &str, item, at: usize, change: &dyn Fn(&str) -> String| {
        TokenVector::new(id, title, changed(at, change)).item(item).denied("TOKEN_MALFORMED", at)
    };
    let duplicate = |id: &str, title: &str, at, from: &str, to: &str| {
        spoiled(id, title, at, |draft| draft.replace(from, to)).item("duplicate members").denied("TOKEN_MALFORMED", at)
    };
    let flattened = |jws: &str| {
        let parts: Vec<&str> = jws.split('.').collect();
        json!({"protected": parts[0], "payload": parts[1], "signature": parts[2]}).to_string()
    };
    let general = |jws: &str| {
        let parts: Vec<&str> = jws.split('.').collect();
        json!({"payload": parts[1], "signatures": [{"protected": parts[0], "signature": parts[2]}]}).to_string()
    };
    let not_utf_8 = |jws: &str| {
        let mut payload = URL_SAFE_NO_PAD.decode(jws.split('.').nth(1).unwrap()).unwrap();
        let at = payload.windows(3).position(|window| window == b"ana").unwrap();
        payload[at] = 0xff;
        issue::sign_jws(&key(ISSUER_KEY), r#"{"alg":"Ed25519","typ":"aat+jwt"}"#, &payload)
    };
    let padded = |part: &str| part.to_owned() + &"=".repeat((4 - part.len() % 4) % 4);
    let item = "padded base64";
    vec![
        malformed("json-flattened", "flattened JSON serialization", "JSON serialization", 0, &flattened),
        malformed("json-general", "general JSON serialization, token 1", "JSON serialization", 1, &general),
        malformed("jwe", "five parts", "JWE", 0, &|jws| format!("{jws}.AAAA.AAAA")),
        malformed("two-parts", "two parts", "JWE", 1, &|jws| jws.rsplit_once('.').unwrap().0.to_owned()),
        duplicate("duplicate-header", "`alg` twice in the header", 0, r#""alg":"#, r#""alg":"none","alg":"#),
        duplicate("duplicate-claim", "`sub` twice", 0, r#""sub":"#, r#""sub":"root","sub":"#),
        duplicate("duplicate-escaped", "`exp` twice, once escaped", 1, r#""exp":"#, r#""\u0065xp":9999999999,"exp":"#),
        duplicate(
            "duplicate-nested",
            "a tool's argument twice",
            2,
            r#""region":"#,
            r#""region":{"constraint_type":"wildcard"},"region":"#,
        ),
        malformed("non-utf-8", "a byte that is not UTF-8 in `sub`", "non-UTF-8", 0, &not_utf_8),
        malformed("padded-header", "padding after the header", item, 0, &|jws| with_part(jws, 0, |part| part.to_owned() + "=")),
        malformed("padded-payload", "padding after the payload", item, 1, &|jws| with_part(jws, 1, |part| part.to_owned() + "=")),
        malformed("padded-signature", "padded signature", item, 0, &|jws| with_part(jws, 2, padded)),
        malformed("base64-bits", "signature with stray bits in its last character", item, 2, &|jws| {
            with_part(jws, 2, |part| {
                let last = part.chars().last().unwrap();
                let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
                let next = alphabet.chars().nth(alphabet.find(last).unwrap() + 1).unwrap();
                format!("{}{next}", part.strip_suffix(last).unwrap())
            })
        }),
        malformed("base64-newline", "a line break inside the payload", item, 0, &|jws| {
            with_part(jws, 1, |part| part.replacen('e', "e\n", 1))
        }),
        malformed("not-json", "a payload that is no JSON", item, 0, &|jws| with_part(jws, 1, |_| URL_SAFE_NO_PAD.encode("x"))),
        malformed("not-an-object", "a payload that is no object", item, 0, &|jws| {
            with_part(jws, 1, |_| URL_SAFE_NO_PAD.encode("[]"))
        }),
        malformed("empty-token", "an empty token", item, 1, &|_| String::new()),
        TokenVector::new("empty-chain", "no token at all", Vec::new()).denied("TOKEN_MALFORMED", None),
    ]
}

fn types() -> Vec<TokenVector> {
    let mut vectors = Vec::new();
    for (index, typ) in
        [json!("JWT"), json!("AAT+JWT"), json!("application/aat+jwt"), json!("at+jwt"), json!("aat-pop+jwt"), json!(1)]
            .iter()
            .enumerate()
    {
        for at in [0, 1] {
            let vector = spoiled(&format!("typ-{index}-{at}"), &format!("`typ` {typ}, token {at}"), at, |draft| {
                draft.header["typ"] = typ.clone()
            });
            vectors.push(vector.item("wrong or missing `typ`").denied("TOKEN_TYPE", at));
        }
    }
    let vector = spoiled("typ-missing", "no `typ`", 0, |draft| draft.header = json!({"alg": "Ed25519"}));
    vectors.push(vector.item("wrong or missing `typ`").denied("TOKEN_TYPE", 0));
    let vector = spoiled("typ-not-the-issuers", "`typ` that this issuer's document does not list", 0, |draft| {
        draft.set("/iss", "https://login.access.example".into());
        draft.signer = 4;
    });
    vectors.push(vector.denied("TOKEN_TYPE", 0));
    let good = chain(3, |_, _| {});
    let a_proof = proof(&good, HOLDERS[2], TOOL, &json!({"region": "north"}), |_| {});
    for at in [0, 2] {
        let mut chain = good.clone();
        chain[at] = a_proof.clone();
        let vector = TokenVector::new(format!("proof-as-token-{at}"), format!("a proof as token {at}"), good.clone());
        vectors.push(vector.with(|vector| vector.chain = chain).item("proof presented as token").denied("TOKEN_TYPE", at));
    }
    let vector = TokenVector::new("token-as-proof", "the leaf as its own proof", good.clone());
    let vector = vector.with(|vector| vector.proof = good.last().cloned());
    vectors.push(vector.item("token presented as proof").denied("PROOF_INVALID", None));
    vectors
}

fn claims() -> Vec<TokenVector> {
    let holder = key(HOLDERS[0]);
    let secret: Value = serde_json::from_str(&holder.to_jwk()).unwrap();
    let cnf = |id: &str, title: &str, value: Value| {
        spoiled(id, title, 0, |draft| draft.claims["cnf"] = value.clone()).denied("TOKEN_MALFORMED", 0)
    };
    let x = |bytes: [u8; 32]| json!({"jwk": {"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(bytes)}});
    let mut above_prime = [0xff; 32];
    above_prime[0] = 0xee;
    above_prime[31] = 0x7f;
    let mut vectors = vec![
        spoiled("aud-missing", "no `aud` in the root", 0, |draft| draft.remove("aud"))
            .item("missing `aud`")
            .denied("AUDIENCE_MISMATCH", 0),
        spoiled("aud-foreign", "`aud` that the issuer's document does not list", 0, |draft| {
            draft.set("/aud", "https://evil.example".into())
        })
        .item("foreign `aud`")
        .denied("AUDIENCE_MISMATCH", 0),
        spoiled(
            "aud-not-the-issuers",
            "an audience that the caller claims and the issuer's document does not list",
            0,
            |draft| {
                draft.set("/aud", "https://evil.example".into());
            },
        )
        .with(|vector| vector.audience = Some("https://evil.example"))
        .item("foreign `aud`")
        .denied("AUDIENCE_MISMATCH", 0),
        spoiled("aud-another-gateway", "`aud` of another gateway", 0, |draft| {
            draft.set("/aud", "https://batch.acme.example".into())
        })
        .item("foreign `aud`")
        .denied("AUDIENCE_MISMATCH", 0),
        spoiled("aud-foreign-in-hop", "a hop for another gateway", 2, |draft| {
            draft.set("/aud", "https://batch.acme.example".into())
        })
        .item("foreign `aud`")
        .denied("AUDIENCE_MISMATCH", 2),
        spoiled("aud-unclaimed", "the caller claims no audience", 0, |_| {})
            .with(|vector| vector.audience = None)
            .item("foreign `aud`")
            .denied("AUDIENCE_MISMATCH", 0),
        spoiled("aud-array", "`aud` is a list", 0, |draft| draft.set("/aud", json!([GATEWAY])))
            .item("array `aud`")
            .denied("AUDIENCE_MISMATCH", 0),
        spoiled("aud-array-in-hop", "`aud` of a hop is a list", 1, |draft| draft.set("/aud", json!([GATEWAY])))
            .item("array `aud`")
            .denied("AUDIENCE_MISMATCH", 1),
        spoiled("aud-null", "`aud` is null", 0, |draft| draft.set("/aud", Value::Null))
            .item("array `aud`")
            .denied("AUDIENCE_MISMATCH", 0),
        cnf("cnf-private", "the holder's private key in `cnf`", json!({"jwk": secret})).item("private members in `cnf`"),
        spoiled("cnf-private-in-hop", "`d` in a hop's `cnf`", 1, |draft| draft.set("/cnf/jwk/d", "AAAA".into()))
            .item("private members in `cnf`")
            .denied("TOKEN_MALFORMED", 1),
        spoiled("cnf-symmetric", "`k` in `cnf`", 0, |draft| draft.set("/cnf/jwk/k", "AAAA".into()))
            .item("private members in `cnf`")
            .denied("TOKEN_MALFORMED", 0),
        cnf("cnf-missing", "no key in `cnf`", json!({})),
        cnf("cnf-small-order", "a point of small order", x([0; 32])),
        cnf("cnf-not-canonical", "`x` above the field's prime", x(above_prime)),
        spoiled("iat-ahead", "`iat` 31 s ahead", 0, |draft| draft.set("/iat", (NOW + 31).into()))
            .item("`iat` ahead")
            .denied("TOKEN_NOT_YET_VALID", 0),
        spoiled("iat-ahead-in-hop", "`iat` of a hop 31 s ahead", 2, |draft| draft.set("/iat", (NOW + 31).into()))
            .item("`iat` ahead")
            .denied("TOKEN_NOT_YET_VALID", 2),
        spoiled("exp-is-iat", "`exp` equal to `iat`", 0, |draft| draft.set("/exp", (NOW - 300).into()))
            .item("`exp` at or before `iat`")
            .denied("TOKEN_MALFORMED", 0),
        spoiled("exp-before-iat", "`exp` before `iat`", 1, |draft| draft.set("/exp", (NOW - 201).into()))
            .item("`exp` at or before `iat`")
            .denied("TOKEN_MALFORMED", 1),
        spoiled("expired-root", "`exp` is now", 0, |draft| draft.set("/exp", NOW.into())).denied("TOKEN_EXPIRED", 0),
        spoiled("expired-hop", "`exp` of a hop has passed", 2, |draft| draft.set("/exp", (NOW - 1).into()))
            .denied("TOKEN_EXPIRED", 2),
        spoiled("lifetime-root", "a root of eight hours and a second", 0, |draft| draft.set("/exp", (NOW - 300 + 28801).into()))
            .denied("TOKEN_LIFETIME", 0),
        spoiled("lifetime-forever", "`exp` at the end of time", 0, |draft| draft.set("/exp", i64::MAX.into()))
            .denied("TOKEN_LIFETIME", 0),
        spoiled("lifetime-hop", "a hop of an hour and a second", 1, |draft| {
            draft.set("/iat", (NOW - 300).into());
            draft.set("/exp", (NOW - 300 + 3601).into());
        })
        .denied("TOKEN_LIFETIME", 1),
    ];
    for (index, (name, date)) in [
        ("iat", "1704067200.5"),
        ("iat", "1704067200.0"),
        ("exp", "1.7040708e9"),
        ("exp", "\"1704070800\""),
        ("exp", "99999999999999999999"),
        ("auth_time", "1704067100.25"),
        ("iat", "-0"),
    ]
    .iter()
    .enumerate()
    {
        let vector = spoiled(&format!("date-{index}"), &format!("`{name}` written {date}"), 0, |draft| {
            draft.set(&format!("/{name}"), "HERE".into());
            draft.replace("\"HERE\"", date);
        });
        vectors.push(vector.item("fractional dates").denied("TOKEN_MALFORMED", 0));
    }
    for name in ["jti", "iat", "exp", "cnf", "del_depth", "del_max_depth", "authorization_details"] {
        for at in [0, 1] {
            let vector =
                spoiled(&format!("missing-{name}-{at}"), &format!("no `{name}` in token {at}"), at, |draft| draft.remove(name));
            vectors.push(vector.denied("TOKEN_MALFORMED", at));
        }
    }
    for (id, value) in [
        ("details-none", json!([])),
        (
            "details-two",
            json!([{"type": "attenuating_agent_token", "tools": {}}, {"type": "attenuating_agent_token", "tools": {}}]),
        ),
        ("details-other-type", json!([{"type": "payment", "tools": {}}])),
        ("details-no-tools", json!([{"type": "attenuating_agent_token"}])),
    ] {
        let vector = spoiled(id, "bad `authorization_details`", 0, |draft| draft.set("/authorization_details", value.clone()));
        vectors.push(vector.denied("TOKEN_MALFORMED", 0));
    }
    for (index, depth) in [json!(-1), json!(0.5), json!("0")].iter().enumerate() {
        let vector = spoiled(&format!("depth-{index}"), &format!("`del_depth` {depth}"), 0, |draft| {
            draft.set("/del_depth", depth.clone())
        });
        vectors.push(vector.denied("TOKEN_MALFORMED", 0));
    }
    vectors
}

fn links() -> Vec<TokenVector> {
    let good = chain(3, |_, _| {});
    let other_root = chain(3, |level, draft| {
        if level == 0 {
            draft.set("/jti", "018cc251-f400-7000-8000-00000000000f".into());
        }
    });
    let reassembled = |id: &str, title: &str, chain: Vec<String>| TokenVector::new(id, title, chain);
    let at = |id: &str, title: &str, level: usize, edit: &dyn Fn(&mut TokenDraft)| spoiled(id, title, level, edit);
    vec![
        reassembled(
            "spliced",
            "a hop under another root of the same holder",
            vec![other_root[0].clone(), good[1].clone(), good[2].clone()],
        )
        .item("spliced parent held by the same key")
        .denied("CHAIN_BROKEN", 1),
        reassembled("truncated-head", "without its root", good[1..].to_vec()).item("truncated chain").denied("ISSUER_UNKNOWN", 0),
        reassembled("truncated-middle", "without its first hop", vec![good[0].clone(), good[2].clone()])
            .item("truncated chain")
            .denied("TOKEN_SIGNATURE", 1),
        reassembled("truncated-tail", "without its leaf, proved by the leaf's holder", good[..2].to_vec())
            .with(|vector| vector.proof = Some(proof(&good, HOLDERS[2], TOOL, &vector.arguments, |_| {})))
            .item("truncated chain")
            .denied("PROOF_INVALID", None),
        reassembled("reordered", "the hops exchanged", vec![good[0].clone(), good[2].clone(), good[1].clone()])
            .item("reordered chain")
            .denied("TOKEN_SIGNATURE", 1),
        reassembled("reordered-leaf-first", "leaf first", good.iter().rev().cloned().collect())
            .item("reordered chain")
            .denied("ISSUER_UNKNOWN", 0),
        reassembled("repeated", "a hop twice", vec![good[0].clone(), good[1].clone(), good[1].clone()])
            .item("repeated chain")
            .denied("CHAIN_REPLAYED_TOKEN", 2),
        reassembled("repeated-root", "the root twice", vec![good[0].clone(), good[0].clone(), good[1].clone()])
            .item("repeated chain")
            .denied("CHAIN_REPLAYED_TOKEN", 1),
        at("repeated-jti", "a hop with the root's `jti`", 2, &|draft| {
            draft.set("/jti", "018cc251-f400-7000-8000-000000000000".into())
        })
        .item("repeated chain")
        .denied("CHAIN_REPLAYED_TOKEN", 2),
        at("depth-jump", "`del_depth` 2 under 0", 1, &|draft| draft.set("/del_depth", 2.into()))
            .item("depth jump")
            .denied("CHAIN_BROKEN", 1),
        at("depth-same", "`del_depth` 1 under 1", 2, &|draft| draft.set("/del_depth", 1.into()))
            .item("depth jump")
            .denied("CHAIN_BROKEN", 2),
        at("depth-root", "a root of `del_depth` 1", 0, &|draft| draft.set("/del_depth", 1.into()))
            .item("depth jump")
            .denied("CHAIN_BROKEN", 0),
        at("root-par-hash", "a root with `par_hash`", 0, &|draft| draft.set("/par_hash", "AAAA".into()))
            .denied("CHAIN_BROKEN", 0),
        at("par-hash-missing", "a hop without `par_hash`", 1, &|draft| draft.remove("par_hash")).denied("CHAIN_BROKEN", 1),
        at("par-hash-padded", "`par_hash` with padding", 1, &|draft| {
            let padded = format!("{}=", draft.claims["par_hash"].as_str().unwrap());
            draft.set("/par_hash", padded.into());
        })
        .denied("CHAIN_BROKEN", 1),
        at("iss-not-the-holder", "a hop whose `iss` is another key's URN", 1, &|draft| {
            draft.set("/iss", issue::thumbprint_urn(key(STRANGER_KEY).public_key()).into());
        })
        .denied("CHAIN_BROKEN", 1),
        at("iss-without-urn", "a hop whose `iss` is the bare thumbprint", 1, &|draft| {
            draft.set("/iss", key(HOLDERS[0]).public_key().thumbprint().as_str().into());
        })
        .denied("CHAIN_BROKEN", 1),
        at("iat-before-parent", "a hop older than its parent", 1, &|draft| draft.set("/iat", (NOW - 301).into()))
            .denied("CHAIN_BROKEN", 1),
        at("own-key", "a hop to the parent's own key", 1, &|draft| draft.hand_to(HOLDERS[0])).denied("CHAIN_BROKEN", 1),
        at("signed-by-stranger", "a hop signed by a key that does not hold the parent", 1, &|draft| draft.signer = STRANGER_KEY)
            .denied("TOKEN_SIGNATURE", 1),
        at("root-by-stranger", "a root signed by a key that is not the issuer's", 0, &|draft| draft.signer = STRANGER_KEY)
            .denied("TOKEN_SIGNATURE", 0),
        reassembled("signature-flipped", "one bit of a signature", {
            let mut chain = good.clone();
            chain[1] = with_part(&chain[1], 2, |part| {
                let mut bytes = URL_SAFE_NO_PAD.decode(part).unwrap();
                bytes[0] ^= 1;
                URL_SAFE_NO_PAD.encode(bytes)
            });
            chain
        })
        .denied("TOKEN_SIGNATURE", 1),
        reassembled("signature-short", "a signature of 63 bytes", {
            let mut chain = good.clone();
            chain[2] = with_part(&chain[2], 2, |part| URL_SAFE_NO_PAD.encode(&URL_SAFE_NO_PAD.decode(part).unwrap()[..63]));
            chain
        })
        .denied("TOKEN_SIGNATURE", 2),
        at("issuer-unknown", "an issuer that nobody trusts", 0, &|draft| draft.set("/iss", "https://login.evil.example".into()))
            .denied("ISSUER_UNKNOWN", 0),
        at("issuer-other", "a root that names the other issuer", 0, &|draft| draft.set("/iss", OTHER_ISSUER.into()))
            .denied("TOKEN_SIGNATURE", 0),
        at("issuer-missing", "a root without `iss`", 0, &|draft| draft.remove("iss")).denied("TOKEN_MALFORMED", 0),
    ]
}

fn attenuation() -> Vec<TokenVector> {
    let region = |constraint: Value| json!({"crm/leads.read": {"region": constraint}});
    let exact = || json!({"constraint_type": "exact", "value": "north"});
    let limit = |parent: Value, child: Value| {
        chain(2, |level, draft| {
            let constraint = if level == 0 { &parent } else { &child };
            draft.tools(json!({"crm/leads.read": {"limit": constraint}}));
        })
    };
    let widened = |id: &str, title: &str, item, edit: &dyn Fn(&mut TokenDraft)| {
        spoiled(id, title, 1, edit).item(item).denied("CHAIN_WIDENED", 1)
    };
    let mut vectors = vec![
        widened("max-depth-raised", "`del_max_depth` 4 under 3", "raised `del_max_depth`", &|draft| {
            draft.set("/del_max_depth", 4.into())
        }),
        widened("max-depth-raised-over-limit", "`del_max_depth` 9 under 3", "raised `del_max_depth`", &|draft| {
            draft.set("/del_max_depth", 9.into());
        }),
        widened("outlives", "a hop that ends a second after its parent", "child outliving parent", &|draft| {
            draft.set("/iat", (NOW - 10).into());
            draft.set("/exp", (NOW + 3301).into());
        }),
        widened("tool-added", "a tool that the parent lacks", "added tool", &|draft| {
            draft.tools(json!({"crm/leads.read": {"region": exact()}, "crm/leads.delete": {}}));
        }),
        widened("tool-case", "the same tool in capitals", "added tool", &|draft| {
            draft.tools(json!({"CRM/leads.read": {"region": exact()}}))
        }),
        widened("constraint-dropped", "a required argument no longer named", "dropped constraint", &|draft| {
            draft.tools(json!({"crm/leads.read": {"limit": {"constraint_type": "range", "min": 1, "max": 100}}}));
        }),
        widened("constraint-emptied", "`{}` under a constraint", "dropped constraint", &|draft| {
            draft.tools(json!({"crm/leads.read": {}}))
        }),
        widened("star-added", "`*` under a closed map", "added `*`", &|draft| {
            draft.tools(json!({"crm/leads.read": {"region": exact(), "*": {"constraint_type": "wildcard"}}}));
        }),
        widened("argument-added", "an argument that the parent does not name", "added `*`", &|draft| {
            draft.tools(json!({"crm/leads.read": {"region": exact(), "page": exact()}}));
        }),
        widened("made-optional", "a required argument made optional", "required made optional", &|draft| {
            draft.tools(region(json!({"constraint_type": "exact", "value": "north", "optional": true})));
        }),
        widened("one-of-widened", "a value that the parent's list lacks", "cross-type pairs", &|draft| {
            draft.tools(region(json!({"constraint_type": "one_of", "values": ["north", "east"]})));
        }),
        widened("wildcard-under-one-of", "a wildcard under a list", "cross-type pairs", &|draft| {
            draft.tools(region(json!({"constraint_type": "wildcard"})));
        }),
        widened("all-of-one-of", "`all` around what would be tighter", "cross-type pairs", &|draft| {
            draft.tools(region(json!({"constraint_type": "all", "constraints": [exact()]})));
        }),
        widened("any-of-exact", "`any` around what would be tighter", "cross-type pairs", &|draft| {
            draft.tools(region(json!({"constraint_type": "any", "constraints": [exact()]})));
        }),
    ];
    let range = json!({"constraint_type": "range", "min": 0, "max": 10});
    let of = |kind: &str, name: &str, values: Value| json!({"constraint_type": kind, name: values});
    for (id, parent, child) in [
        ("range-max", range.clone(), json!({"constraint_type": "range", "min": 0, "max": 11})),
        ("range-open-end", range.clone(), json!({"constraint_type": "range", "min": 0})),
        (
            "range-inclusive",
            json!({"constraint_type": "range", "max": 10, "max_inclusive": false}),
            json!({"constraint_type": "range", "max": 10}),
        ),
        ("range-exact-outside", range.clone(), of("exact", "value", json!(11))),
        ("range-one-of", range.clone(), of("one_of", "values", json!([1, 2]))),
        ("range-all", range.clone(), json!({"constraint_type": "all", "constraints": [range]})),
        ("exact-other", of("exact", "value", json!(1)), of("exact", "value", json!("1"))),
        ("exact-one-of", of("exact", "value", json!(1)), of("one_of", "values", json!([1]))),
        ("exact-range", of("exact", "value", json!(1)), json!({"constraint_type": "range", "min": 1, "max": 1})),
        ("one-of-range", of("one_of", "values", json!([1, 2])), json!({"constraint_type": "range", "min": 1, "max": 1})),
        ("not-one-of-dropped", of("not_one_of", "excluded", json!([1, 2])), of("not_one_of", "excluded", json!([1]))),
        ("not-one-of-exact", of("not_one_of", "excluded", json!([1])), of("exact", "value", json!(2))),
        ("contains-dropped", of("contains", "required", json!([1, 2])), of("contains", "required", json!([1]))),
        ("contains-subset", of("contains", "required", json!([1])), of("subset", "allowed", json!([1]))),
        ("subset-added", of("subset", "allowed", json!([1])), of("subset", "allowed", json!([1, 2]))),
        ("subset-contains", of("subset", "allowed", json!([1])), of("contains", "required", json!([1]))),
        (
            "all-dropped",
            of("all", "constraints", json!([range, of("exact", "value", json!(1))])),
            of("all", "constraints", json!([range])),
        ),
        ("all-flattened", of("all", "constraints", json!([range])), range.clone()),
        (
            "any-added",
            of("any", "constraints", json!([range])),
            of("any", "constraints", json!([range, of("exact", "value", json!(99))])),
        ),
        ("any-all", of("any", "constraints", json!([range])), of("all", "constraints", json!([range]))),
        ("any-flattened", of("any", "constraints", json!([range])), range.clone()),
    ] {
        let vector = TokenVector::new(format!("pair-{id}"), format!("{child} under {parent}"), limit(parent, child));
        vectors.push(vector.item("cross-type pairs").denied("CHAIN_WIDENED", 1));
    }
    for (id, constraint) in [
        ("unknown-type", json!({"constraint_type": "regex", "pattern": ".*"})),
        ("no-type", json!({"value": 1})),
        ("unknown-member", json!({"constraint_type": "exact", "value": 1, "note": 2})),
        ("empty-all", json!({"constraint_type": "all", "constraints": []})),
        ("empty-any", json!({"constraint_type": "any", "constraints": []})),
        ("empty-one-of", json!({"constraint_type": "one_of", "values": []})),
        ("exact-list", json!({"constraint_type": "exact", "value": [1]})),
        ("not-comparable", json!({"constraint_type": "exact", "value": 9_007_199_254_740_993_u64})),
        ("inner-optional", json!({"constraint_type": "all", "constraints": [{"constraint_type": "wildcard", "optional": true}]})),
    ] {
        let vector = TokenVector::new(
            format!("constraint-{id}"),
            format!("the constraint {constraint}"),
            limit(constraint.clone(), constraint),
        );
        vectors.push(vector.denied("TOKEN_MALFORMED", 0));
    }
    let vector = spoiled("star-not-plain", "`*` that is no plain wildcard", 0, |draft| {
        draft.tools(json!({"crm/leads.read": {"*": exact()}}))
    });
    vectors.push(vector.denied("TOKEN_MALFORMED", 0));
    vectors
}

fn identities() -> Vec<TokenVector> {
    let mut vectors = Vec::new();
    for (name, value) in [
        ("sub", json!("eve")),
        ("sub_iss", json!(OTHER_ISSUER)),
        ("sub_profile", json!("user")),
        ("client_id", json!("crm-portal")),
        ("sid", json!("session-1")),
        ("txn", json!("task-1")),
        ("acr", json!("high")),
        ("auth_time", json!(NOW - 400)),
        ("groups", json!(["sales"])),
        ("status", json!({})),
        ("sub", Value::Null),
        ("sub_iss", Value::Null),
    ] {
        let id = format!("hop-{name}{}", if value.is_null() { "-null" } else { "" });
        let vector = spoiled(&id, &format!("`{name}` in a hop"), 1, |draft| draft.set(&format!("/{name}"), value.clone()));
        vectors.push(vector.item("hop asserting user, application or session").denied("IDENTITY_IN_HOP", 1));
    }
    for at in [0, 2] {
        let vector = spoiled(&format!("nested-act-{at}"), &format!("an `act` in `act`, token {at}"), at, |draft| {
            draft.set("/act/act", json!({"sub": agent(HOLDERS[0])}));
        });
        vectors.push(vector.item("hop asserting user, application or session").denied("IDENTITY_IN_HOP", at));
        let vector = spoiled(&format!("no-act-{at}"), &format!("no `act`, token {at}"), at, |draft| draft.remove("act"));
        vectors.push(vector.denied("IDENTITY_MISSING", at));
    }
    for name in ["sub", "sub_profile", "client_id", "sid", "txn"] {
        let vector = spoiled(&format!("no-{name}"), &format!("no `{name}` in the root"), 0, |draft| draft.remove(name));
        vectors.push(vector.denied("IDENTITY_MISSING", 0));
        let vector = spoiled(&format!("empty-{name}"), &format!("an empty `{name}`"), 0, |draft| {
            draft.set(&format!("/{name}"), "".into())
        });
        vectors.push(vector.denied("IDENTITY_MISSING", 0));
    }
    let at = |id: &str, title: &str, level: usize, edit: &dyn Fn(&mut TokenDraft)| spoiled(id, title, level, edit);
    vectors.extend([
        at("sub-profile-service", "a root without a user", 0, &|draft| draft.set("/sub_profile", "service".into()))
            .denied("IDENTITY_MISSING", 0),
        at("sub-number", "`sub` is a number", 0, &|draft| draft.set("/sub", 7.into())).denied("TOKEN_MALFORMED", 0),
        at("groups-text", "`groups` is a string", 0, &|draft| draft.set("/groups", "sales".into())).denied("TOKEN_MALFORMED", 0),
        at("application-foreign", "an application that the issuer may not speak for", 0, &|draft| {
            draft.set("/client_id", "helpdesk".into())
        })
        .denied("ISSUER_NOT_ENTITLED", 0),
        at("application-foreign-registry-off", "the same with the registry off", 0, &|draft| {
            draft.set("/client_id", "helpdesk".into())
        })
        .with(|vector| vector.options = json!({"registry": "off"}))
        .denied("ISSUER_NOT_ENTITLED", 0),
        at("group-foreign", "a group that the issuer may not vouch for", 0, &|draft| {
            draft.set("/groups", json!(["sales", "support"]))
        })
        .denied("ISSUER_NOT_ENTITLED", 0),
        at("agent-unknown", "neither agent nor key registered", 2, &|draft| draft.hand_to(STRANGER_KEY))
            .call(TOOL, json!({"region": "north"}), STRANGER_KEY)
            .denied("AGENT_UNKNOWN", 2),
        at("agent-of-another-key", "an agent's name with another agent's key", 2, &|draft| {
            draft.set("/act/sub", agent(HOLDERS[1]).into())
        })
        .denied("AGENT_KEY_UNKNOWN", 2),
        at("agent-key-unregistered", "a registered agent with an unregistered key", 2, &|draft| {
            draft.hand_to(STRANGER_KEY);
            draft.set("/act/sub", agent(HOLDERS[2]).into());
        })
        .denied("AGENT_KEY_UNKNOWN", 2),
        at("agent-keyless", "a registered agent without a key", 2, &|draft| {
            draft.hand_to(STRANGER_KEY);
            draft.set("/act/sub", "spiffe://acme.example/agent/keyless".into());
        })
        .denied("AGENT_KEY_UNKNOWN", 2),
        at("agent-name-unknown", "a registered key with an unknown name", 0, &|draft| {
            draft.set("/act/sub", "spiffe://acme.example/agent/nobody".into())
        })
        .denied("AGENT_KEY_UNKNOWN", 0),
    ]);
    vectors
}

fn proofs() -> Vec<TokenVector> {
    let good = || chain(3, |_, _| {});
    let arguments = json!({"region": "north"});
    let leaf = HOLDERS[2];
    let proved = |id: &str, title: &str, holder: u8, edit: &dyn Fn(&mut TokenDraft)| {
        let chain = good();
        let proof = proof(&chain, holder, TOOL, &arguments, edit);
        TokenVector::new(id, title, chain).with(|vector| vector.proof = Some(proof)).denied("PROOF_INVALID", None)
    };
    let parent = good()[..2].to_vec();
    let by_child = proof(&parent, leaf, TOOL, &arguments, |_| {});
    let mut vectors = vec![
        TokenVector::new("parent-replayed", "the parent's chain, proved by the child's holder", parent.clone())
            .with(|vector| vector.proof = Some(by_child))
            .item("parent token replayed by the child's holder")
            .denied("PROOF_INVALID", None),
        TokenVector::new("proof-replayed", "a proof that was used", good())
            .with(|vector| vector.proofs_used = vector.proof.clone().into_iter().collect())
            .item("proof replayed")
            .denied("PROOF_REPLAYED", None),
        TokenVector::new("proof-replayed-resigned", "another proof with the `jti` of a used one", good())
            .with(|vector| {
                let resigned = proof(&vector.chain, leaf, TOOL, &arguments, |draft| draft.set("/iat", (NOW - 1).into()));
                vector.proofs_used = vec![resigned];
            })
            .item("proof replayed")
            .denied("PROOF_REPLAYED", None),
        proved("proof-tool", "a proof of another tool", leaf, &|draft| draft.set("/aat_tool", "proposals/draft.create".into()))
            .item("proof for another tool"),
        proved("proof-arguments", "a proof of other arguments", leaf, &|draft| draft.set("/hta", json!({"region": "south"})))
            .item("proof for other arguments"),
        proved("proof-arguments-type", "a proof of `\"1\"` for `1`", leaf, &|draft| {
            draft.set("/hta", json!({"region": ["north"]}))
        })
        .item("proof for other arguments"),
        proved("proof-arguments-more", "a proof of one argument more", leaf, &|draft| draft.set("/hta/limit", 1.into()))
            .item("proof for other arguments"),
        proved("proof-arguments-missing", "a proof without `hta`", leaf, &|draft| draft.remove("hta"))
            .item("proof for other arguments"),
        proved("proof-leaf-id", "a proof with another `aat_id`", leaf, &|draft| {
            draft.set("/aat_id", "018cc251-f400-7000-8000-000000000001".into())
        })
        .item("proof for another leaf"),
        proved("proof-leaf-hash", "a proof of a leaf with the same `jti`", leaf, &|draft| {
            draft.set("/aat_hash", issue::token_hash(&parent[1]).into())
        })
        .item("proof for another leaf"),
        proved("proof-old", "`iat` 31 s ago", leaf, &|draft| draft.set("/iat", (NOW - 31).into()))
            .item("stale proof")
            .denied("PROOF_STALE", None),
        proved("proof-early", "`iat` 31 s ahead", leaf, &|draft| draft.set("/iat", (NOW + 31).into()))
            .item("stale proof")
            .denied("PROOF_STALE", None),
        proved("proof-end-of-time", "`iat` at the beginning of time", leaf, &|draft| draft.set("/iat", i64::MIN.into()))
            .item("stale proof")
            .denied("PROOF_STALE", None),
        TokenVector::new("proof-missing", "no proof", good()).with(|vector| vector.proof = None).denied("PROOF_MISSING", None),
        proved("proof-stranger", "signed by a stranger", STRANGER_KEY, &|_| {}),
        proved("proof-parent", "signed by the parent's holder", HOLDERS[1], &|_| {}),
        proved("proof-alg", "`alg` `EdDSA`", leaf, &|draft| draft.header["alg"] = "EdDSA".into()),
        proved("proof-crit", "`crit` in the header", leaf, &|draft| draft.header["crit"] = json!(["x"])),
        proved("proof-jwk", "a key in the header", leaf, &|draft| draft.header["jwk"] = json!({})),
        proved("proof-typ", "no `typ`", leaf, &|draft| draft.header = json!({"alg": "Ed25519"})),
        proved("proof-jti", "no `jti`", leaf, &|draft| draft.remove("jti")),
        proved("proof-jti-empty", "an empty `jti`", leaf, &|draft| draft.set("/jti", "".into())),
        proved("proof-iat", "no `iat`", leaf, &|draft| draft.remove("iat")),
        proved("proof-iat-fraction", "a fraction in `iat`", leaf, &|draft| draft.set("/iat", json!(1_704_067_500.5))),
        proved("proof-duplicate", "`hta` twice", leaf, &|draft| draft.replace("\"hta\":", "\"hta\":{},\"hta\":")),
        proved("proof-aud-missing", "no `aat_aud`", leaf, &|draft| draft.remove("aat_aud")),
        proved("proof-aud-foreign", "`aat_aud` of another gateway", leaf, &|draft| {
            draft.set("/aat_aud", "https://batch.acme.example".into())
        }),
        proved("proof-aud-array", "`aat_aud` is a list", leaf, &|draft| draft.set("/aat_aud", json!([GATEWAY]))),
        proved("proof-aud-foreign-not-required", "a foreign `aat_aud` where none is required", leaf, &|draft| {
            draft.set("/aat_aud", "https://batch.acme.example".into());
        })
        .with(|vector| vector.options = json!({"require_proof_audience": false})),
        proved("proof-nonce-missing", "no `nonce` where one was asked for", leaf, &|_| {})
            .with(|vector| vector.options = json!({"nonce": "n-1"})),
        proved("proof-nonce-other", "another `nonce`", leaf, &|draft| draft.set("/nonce", "n-2".into()))
            .with(|vector| vector.options = json!({"nonce": "n-1"})),
    ];
    let many = json!({"region": "north", "note": "x".repeat(56 * 1024)});
    let vector = TokenVector::new("proof-oversized", "a proof over 72 KiB", good());
    vectors.push(vector.call(TOOL, many, leaf).item("oversized").denied("PROOF_INVALID", None));
    vectors
}

fn limits() -> Vec<TokenVector> {
    let pad = |bytes: usize| move |draft: &mut TokenDraft| draft.set("/pad", "x".repeat(bytes).into());
    let nested = |depth: usize| {
        let inner = json!({"constraint_type": "wildcard"});
        (1..depth).fold(inner, |inner, _| json!({"constraint_type": "all", "constraints": [inner]}))
    };
    let long = long_chain(10, |_, _| {});
    vec![
        spoiled("token-oversized", "a token over 8 KiB", 1, pad(6000)).item("oversized").denied("TOKEN_TOO_LARGE", 1),
        TokenVector::new("chain-oversized", "tokens of 32 KiB together", long_chain(6, |_, draft| pad(4200)(draft)))
            .call(TOOL, json!({"region": "north"}), 15)
            .item("oversized")
            .denied("TOKEN_TOO_LARGE", 4),
        TokenVector::new("chain-too-long", "ten tokens", long)
            .call(TOOL, json!({"region": "north"}), 19)
            .item("too deep")
            .denied("CHAIN_TOO_DEEP", 9),
        spoiled("max-depth-over-limit", "`del_max_depth` 9 in the root", 0, |draft| draft.set("/del_max_depth", 9.into()))
            .item("too deep")
            .denied("CHAIN_TOO_DEEP", 0),
        TokenVector::new(
            "below-terminal",
            "a hop below a token that may not be handed on",
            chain(3, |level, draft| {
                if level < 2 {
                    draft.set("/del_max_depth", 1.into());
                }
            }),
        )
        .item("too deep")
        .denied("CHAIN_TOO_DEEP", 2),
        spoiled("depth-over-own-limit", "`del_depth` over its own `del_max_depth`", 2, |draft| {
            draft.set("/del_max_depth", 1.into())
        })
        .item("too deep")
        .denied("CHAIN_TOO_DEEP", 2),
        spoiled("constraint-nested", "constraints 33 deep", 0, |draft| draft.tools(json!({TOOL: {"region": nested(33)}})))
            .item("too nested")
            .denied("TOKEN_TOO_LARGE", 0),
        spoiled("constraint-nested-far", "constraints 60 deep", 1, |draft| draft.tools(json!({TOOL: {"region": nested(60)}})))
            .item("too nested")
            .denied("TOKEN_TOO_LARGE", 1),
        spoiled("json-nested", "a list 200 deep", 0, |draft| {
            draft.set("/pad", "HERE".into());
            draft.replace("\"HERE\"", &("[".repeat(200) + &"]".repeat(200)));
        })
        .item("too nested")
        .denied("TOKEN_TOO_LARGE", 0),
        spoiled("sub-oversized", "a `sub` of more than 2048 bytes", 0, |draft| draft.set("/sub", "x".repeat(2049).into()))
            .denied("TOKEN_TOO_LARGE", 0),
    ]
}

/// Calls that the chain does not grant. The answer names the first token from the root that refuses.
fn calls() -> Vec<TokenVector> {
    let good = || chain(3, |_, _| {});
    let leaf = HOLDERS[2];
    vec![
        TokenVector::new("tool-never-granted", "a tool that the root lacks", good())
            .call("crm/leads.delete", json!({}), leaf)
            .denied("TOOL_NOT_GRANTED", 0),
        TokenVector::new("tool-dropped", "a tool that the first hop dropped", good())
            .call("proposals/draft.create", json!({}), leaf)
            .denied("TOOL_NOT_GRANTED", 1),
        TokenVector::new("argument-refused-by-root", "a region that the root excludes", good())
            .call(TOOL, json!({"region": "east"}), leaf)
            .denied("ARGUMENT_REFUSED", 0),
        TokenVector::new("argument-refused-by-hop", "a region that the first hop excludes", good())
            .call(TOOL, json!({"region": "south"}), leaf)
            .denied("ARGUMENT_REFUSED", 1),
        TokenVector::new("argument-dropped-optional", "an optional argument that the first hop dropped", good())
            .call(TOOL, json!({"region": "north", "limit": 5}), leaf)
            .denied("ARGUMENT_REFUSED", 1),
        TokenVector::new("argument-missing", "a required argument left out", good())
            .call(TOOL, json!({}), leaf)
            .denied("ARGUMENT_REFUSED", 0),
        TokenVector::new("argument-not-named", "an argument that nobody named", good())
            .call(TOOL, json!({"region": "north", "page": 1}), leaf)
            .denied("ARGUMENT_REFUSED", 0),
        TokenVector::new("argument-type", "a list for a string", good())
            .call(TOOL, json!({"region": ["north"]}), leaf)
            .denied("ARGUMENT_REFUSED", 0),
    ]
}
