//! Tests of the whole module: a change of any byte is refused, chains only narrow, and known signatures save work but skip no rule.

use bytes::Bytes;
use proptest::prelude::Rng as _;
use proptest::test_runner::{TestRng, TestRunner};
use serde_json::{Value, json};

use super::issue::{self, issue_root};
use super::trust::{AllowList, TrustTable, TrustedIssuer};
use super::*;
use crate::model::ids::AgentId;
use crate::model::json::{JsonObject, parse_object};
use crate::model::jwk::NamedKey;
use crate::model::time::ClockReading;

const START_S: i64 = 1_704_067_200;
const ISSUER: &str = "https://i.example";
const GATEWAY: &str = "https://g.example";
const ISSUER_KEY: u8 = 1;

fn key(seed: u8) -> PrivateKey {
    PrivateKey::from_seed([seed; 32]).unwrap()
}

fn at(unix_s: i64) -> ClockReading {
    ClockReading { unix_ns: unix_s * 1_000_000_000, boot_ns: 0 }
}

fn agent(level: u8) -> String {
    format!("spiffe://a.example/{level}")
}

fn trust() -> TrustTable {
    let mut trust = TrustTable::new();
    let keys = vec![NamedKey { key: key(ISSUER_KEY).public_key().clone(), kid: Some("k1".to_owned()) }];
    let issuer = TrustedIssuer {
        audiences: [GATEWAY.to_owned()].into(),
        applications: AllowList::All,
        groups: AllowList::All,
        ..TrustedIssuer::new(ISSUER.into(), keys)
    };
    trust.put_issuer(issuer).unwrap();
    for level in 0..9_u8 {
        trust.put_agent(AgentId::from(&*agent(level)), [key(10 + level).public_key().thumbprint().clone()]).unwrap();
    }
    trust.set_groups(["sales".into()]);
    trust
}

fn jwk(seed: u8) -> Value {
    serde_json::from_str(&key(seed).public_key().to_jwk()).unwrap()
}

/// A valid chain with one token for each tool map.
fn chain(tools: &[Value]) -> Vec<Bytes> {
    let mut chain: Vec<Bytes> = Vec::new();
    for (level, tools) in (0_u8..).zip(tools) {
        let mut claims = json!({
            "jti": format!("t{level}"), "exp": START_S + 3600 - i64::from(level), "del_max_depth": 8, "aud": GATEWAY,
            "cnf": {"jwk": jwk(10 + level)}, "act": {"sub": agent(level)},
            "authorization_details": [{"type": "attenuating_agent_token", "tools": tools}],
        });
        let token = if level == 0 {
            for (name, value) in
                [("iss", ISSUER), ("sub", "ana"), ("sub_profile", "user"), ("client_id", "crm"), ("sid", "s1"), ("txn", "k1")]
            {
                claims[name] = value.into();
            }
            claims["groups"] = json!(["sales", "chess", "sales"]);
            issue_root(&key(ISSUER_KEY), &claims.to_string(), at(START_S))
        } else {
            issue::issue_hop(&key(9 + level), &chain, &claims.to_string(), at(START_S + i64::from(level)))
        };
        chain.push(token.unwrap().into());
    }
    chain
}

fn good() -> Vec<Bytes> {
    let exact = json!({"x": {"n": {"constraint_type": "exact", "value": 1}}});
    chain(&[json!({"x": {"n": {"constraint_type": "range", "min": 0, "max": 9}}, "y": {}}), exact.clone(), exact])
}

fn object(value: &Value) -> JsonObject {
    parse_object(value.to_string().as_bytes()).unwrap()
}

fn reason<T>(verified: Result<T, Rejection>) -> Result<(), (Reason, Option<usize>)> {
    verified.map(|_| ()).map_err(|refused| (refused.reason, refused.hop))
}

#[test]
fn the_facts_of_a_chain() {
    let tokens = good();
    let chain = verify(&tokens, &trust(), &VerificationOptions::default(), at(START_S + 60)).unwrap();
    let subject = chain.subject().unwrap();
    assert_eq!(subject.user.to_string(), r#"["https://i.example","ana"]"#);
    assert_eq!((subject.application.as_str(), subject.session.as_str(), subject.task.as_str()), ("crm", "s1", "k1"));
    assert_eq!(subject.groups, vec!["sales".into()], "known groups, each once");
    assert_eq!(subject.agents, (0..3).map(|level| AgentId::from(&*agent(level))).collect::<Vec<_>>());
    assert_eq!((subject.scopes.len(), chain.scopes().len(), chain.tokens().len()), (3, 3, 3));
    assert_eq!((chain.issuer().as_str(), chain.issuer_kid(), chain.audience()), (ISSUER, Some("k1"), Some(GATEWAY)));
    assert_eq!(chain.issuer_key_thumbprint(), key(ISSUER_KEY).public_key().thumbprint().as_str());
    assert_eq!((chain.root_iat_s(), chain.expires_at_s()), (START_S, START_S + 3598));
    for (level, token) in chain.tokens().iter().zip(&tokens) {
        assert_eq!(level.hop_hash(), issue::token_hash(std::str::from_utf8(token).unwrap()));
    }
    for (hop, level) in chain.tokens().iter().enumerate() {
        assert_eq!(level.hop_hash(), super::jws::encode_base64url(level.signing_input_sha256()));
        let signer = hop.checked_sub(1).map(|parent| issue::thumbprint_urn(&chain.tokens()[parent].holder));
        assert_eq!(chain.token_issuer(hop), signer.unwrap_or(ISSUER.to_owned()));
    }
    let off = VerificationOptions { registry: RegistryMode::Off, ..VerificationOptions::default() };
    let off = verify(&tokens, &trust(), &off, at(START_S + 60)).unwrap();
    assert!(off.subject().is_none() && off.scopes().len() == 3);
}

#[test]
fn the_sentence() {
    let tokens = good();
    let expected = "user ana of https://i.example authorized agent spiffe://a.example/0, as application crm, for task k1 in session s1, \
                    with scope x(n >= 0 and <= 9), y, until 2024-01-01T01:00:00Z; \
                    spiffe://a.example/0 passed a part of it to spiffe://a.example/1: scope x(n = 1), until 2024-01-01T00:59:59Z; \
                    spiffe://a.example/1 passed a part of it to spiffe://a.example/2: scope x(n = 1), until 2024-01-01T00:59:58Z";
    let verified = verify(&tokens, &trust(), &VerificationOptions::default(), at(START_S + 60)).unwrap();
    assert_eq!(verified.describe(), expected);
    assert_eq!(UnverifiedChain::parse(&tokens).unwrap().describe(), expected);
    for (tools, expected) in [
        (json!({}), "with scope (nothing), until"),
        (json!({"x": {"*": {"constraint_type": "wildcard"}}}), "with scope x, until"),
        (
            json!({"x": {"n": {"constraint_type": "wildcard", "optional": true}, "*": {"constraint_type": "wildcard"}}}),
            "with scope x(n? anything; anything else), until",
        ),
    ] {
        let told = UnverifiedChain::parse(&chain(&[tools])).unwrap().describe();
        assert!(told.contains(expected), "{told}");
    }
    let claims = r#"{"iss":"https://i.example","sub":"a\u001b[2J\nuser eve"}"#;
    let forged = [Bytes::from(issue_root(&key(2), claims, at(START_S)).unwrap())];
    let told = UnverifiedChain::parse(&forged).unwrap().describe();
    assert!(told.starts_with(r"user a\u{1b}[2J\nuser eve of https://i.example authorized agent (not named)"), "{told}");
}

#[test]
fn a_cached_chain_ages_as_verification_says() {
    let tokens = good();
    let options = VerificationOptions::default();
    let chain = verify(&tokens, &trust(), &options, at(START_S + 60)).unwrap();
    for offset_s in [-40, -31, -30, -29, -28, -27, 0, 3596, 3597, 3598, 3599, 3600, 9999] {
        let now = at(START_S + offset_s);
        let expected = reason(verify(&tokens, &trust(), &options, now));
        assert_eq!(reason(chain.check_times(now, &options)), expected, "{offset_s} s after the root's `iat`");
    }
    assert_eq!(reason(chain.check_times(at(START_S - 29), &options)), Err((Reason::TokenNotYetValid, Some(2))));
    assert_eq!(reason(chain.check_times(at(START_S + 3598), &options)), Err((Reason::TokenExpired, Some(2))));
    for unix_ns in [i64::MIN, i64::MAX] {
        assert!(chain.check_times(ClockReading { unix_ns, boot_ns: 0 }, &options).is_err());
    }
}

/// A verified chain is checked against `nbf` at every later use too, because clocks can be set back.
#[test]
fn not_before_is_asked_on_every_use() {
    let claims = json!({
        "iss": ISSUER, "sub": "ana", "sub_profile": "user", "client_id": "crm", "sid": "s1", "txn": "k1", "aud": GATEWAY,
        "exp": START_S + 3600, "nbf": START_S + 600, "del_max_depth": 0, "cnf": {"jwk": jwk(10)}, "act": {"sub": agent(0)},
        "authorization_details": [{"type": "attenuating_agent_token", "tools": {}}],
    });
    let tokens: Vec<Bytes> = vec![issue_root(&key(ISSUER_KEY), &claims.to_string(), at(START_S)).unwrap().into()];
    let options = VerificationOptions::default();
    let chain = verify(&tokens, &trust(), &options, at(START_S + 570)).unwrap();
    for offset_s in [-31, 0, 569, 570, 600, 3599, 3600] {
        let now = at(START_S + offset_s);
        let expected = reason(verify(&tokens, &trust(), &options, now));
        assert_eq!(reason(chain.check_times(now, &options)), expected, "{offset_s} s after the root's `iat`");
        assert_eq!(reason(verify_with_known(&chain, &tokens, &trust(), &options, now)), expected, "{offset_s} s after, known");
    }
    assert_eq!(reason(chain.check_times(at(START_S + 569), &options)), Err((Reason::TokenNotYetValid, Some(0))));
}

#[test]
fn what_is_known_saves_signatures_and_no_rule() {
    let (tokens, now) = (good(), at(START_S + 60));
    let options = VerificationOptions::default();
    let known = verify(&tokens[..2], &trust(), &options, now).unwrap();
    let check = |chain: &[Bytes], trust: &TrustTable, now: ClockReading| {
        let anew = reason(verify(chain, trust, &options, now));
        assert_eq!(reason(verify_with_known(&known, chain, trust, &options, now)), anew);
        anew
    };
    assert_eq!(check(&tokens, &trust(), now), Ok(()));
    assert_eq!(check(&tokens[..1], &trust(), now), Ok(()));
    assert_eq!(check(&tokens, &trust(), at(START_S + 4000)), Err((Reason::TokenExpired, Some(0))));
    let mut without_agent = trust();
    without_agent.remove_agent(&agent(1));
    assert_eq!(check(&tokens, &without_agent, now), Err((Reason::AgentUnknown, Some(1))));
    let mut without_issuer = trust();
    without_issuer.remove_issuer(ISSUER);
    assert_eq!(check(&tokens, &without_issuer, now), Err((Reason::IssuerUnknown, Some(0))));
    let mut other_key = trust();
    let keys = vec![NamedKey { key: key(2).public_key().clone(), kid: Some("k1".to_owned()) }];
    other_key.put_issuer(TrustedIssuer { keys, ..trust().issuer(ISSUER).unwrap().clone() }).unwrap();
    assert_eq!(check(&tokens, &other_key, now), Err((Reason::TokenSignature, Some(0))));
    for token in 0..2 {
        let mut forged = tokens.clone();
        let last = forged[token].len() - 10;
        let mut bytes = forged[token].to_vec();
        bytes[last] = if bytes[last] == b'A' { b'B' } else { b'A' };
        forged[token] = bytes.into();
        assert_eq!(
            check(&forged, &trust(), now),
            Err((Reason::TokenSignature, Some(token))),
            "a known hash with another signature"
        );
    }
}

#[test]
fn audiences() {
    let chain = verify(&good(), &trust(), &VerificationOptions::default(), at(START_S + 60)).unwrap();
    let lifted = VerificationOptions { require_chain_audience: false, ..VerificationOptions::default() };
    for (claimed, expected) in [
        (Some(GATEWAY), Ok(())),
        (Some("https://other.example"), Err((Reason::AudienceMismatch, Some(0)))),
        (Some(""), Err((Reason::AudienceMismatch, Some(0)))),
        (None, Err((Reason::AudienceMismatch, Some(0)))),
    ] {
        for options in [&VerificationOptions::default(), &lifted] {
            assert_eq!(
                reason(chain.check_audience(claimed, options)),
                expected,
                "{claimed:?}: a named audience counts, required or not"
            );
        }
    }
}

/// What a root may say, at the limit and beyond, and under which options it may leave something out.
#[test]
fn claims_of_a_root() {
    let claims = json!({
        "iss": ISSUER, "sub": "ana", "sub_profile": "user", "client_id": "crm", "sid": "s1", "txn": "k1", "aud": GATEWAY,
        "exp": START_S + 3600, "del_max_depth": 0, "cnf": {"jwk": jwk(10)}, "act": {"sub": agent(0)},
        "authorization_details": [{"type": "attenuating_agent_token", "tools": {}}],
    });
    let anywhere = VerificationOptions { require_chain_audience: false, ..VerificationOptions::default() };
    let check = |name: &str, value: Option<Value>, options: &VerificationOptions, expected: Result<(), Reason>| {
        let mut claims = claims.clone();
        match &value {
            Some(value) => claims[name] = value.clone(),
            None => drop(claims.as_object_mut().unwrap().remove(name)),
        }
        let tokens = [Bytes::from(issue_root(&key(ISSUER_KEY), &claims.to_string(), at(START_S)).unwrap())];
        let verified = verify(&tokens, &trust(), options, at(START_S + 60)).map(drop).map_err(|refused| refused.reason);
        assert_eq!(verified, expected, "{name}");
    };
    let options = VerificationOptions::default();
    check("sub", Some("ana".into()), &options, Ok(()));
    check("sub", Some("x".repeat(2048).into()), &options, Ok(()));
    check("sub", Some("x".repeat(2049).into()), &options, Err(Reason::TokenTooLarge));
    check("auth_time", Some(START_S.into()), &options, Ok(()));
    check("auth_time", Some(json!(1.5)), &options, Err(Reason::TokenMalformed));
    check("nbf", Some((START_S + 90).into()), &options, Ok(()));
    check("nbf", Some((START_S + 91).into()), &options, Err(Reason::TokenNotYetValid));
    check("aud", None, &options, Err(Reason::AudienceMismatch));
    check("aud", None, &anywhere, Ok(()));
    check("aud", Some("https://other.example".into()), &anywhere, Err(Reason::AudienceMismatch));
}

/// The issuer's key is chosen by `kid` where the header has one.
#[test]
fn the_key_of_a_root() {
    let tokens = good();
    let root = super::jws::Jws::parse(&tokens[0]).unwrap();
    let mut claims = String::new();
    root.claims.write_jcs(&mut claims);
    for (kid, expected) in
        [(r#""k1""#, Ok(())), (r#""k2""#, Err((Reason::TokenSignature, Some(0)))), ("1", Err((Reason::TokenSignature, Some(0))))]
    {
        let header = issue::jws_header(TOKEN_TYPE).replacen('{', &format!(r#"{{"kid":{kid},"#), 1);
        let signed = [Bytes::from(issue::sign_jws(&key(ISSUER_KEY), &header, claims.as_bytes()))];
        assert_eq!(reason(verify(&signed, &trust(), &VerificationOptions::default(), at(START_S + 60))), expected, "{kid}");
    }
}

/// A proof's own times, and whether it must name an audience.
#[test]
fn claims_of_a_proof() {
    let (tokens, now) = (good(), at(START_S + 60));
    let chain = verify(&tokens, &trust(), &VerificationOptions::default(), now).unwrap();
    let arguments = object(&json!({"n": 1}));
    let call = ProofCall { tool: "x", arguments: &arguments, audience: Some(GATEWAY) };
    let proof = issue::sign_proof(&key(12), &tokens, &call, None, now).unwrap();
    let mut written = String::new();
    super::jws::Jws::parse(proof.as_bytes()).unwrap().claims.write_jcs(&mut written);
    let claims: Value = serde_json::from_str(&written).unwrap();
    let anywhere = VerificationOptions { require_proof_audience: false, ..VerificationOptions::default() };
    let check = |name: &str, value: Option<Value>, options: &VerificationOptions, expected: Result<(), Reason>| {
        let mut claims = claims.clone();
        match &value {
            Some(value) => claims[name] = value.clone(),
            None => drop(claims.as_object_mut().unwrap().remove(name)),
        }
        let proof = issue::sign_jws(&key(12), &issue::jws_header(PROOF_TYPE), claims.to_string().as_bytes());
        let verified = verify_proof(&chain, proof.as_bytes(), &call, options, now);
        assert_eq!(verified.map(drop).map_err(|refused| refused.reason), expected, "{name} {value:?}");
    };
    let (options, window_s) = (VerificationOptions::default(), VerificationOptions::default().proof_window_s);
    check("nbf", Some((START_S + 90).into()), &options, Ok(()));
    check("nbf", Some((START_S + 91).into()), &options, Err(Reason::ProofStale));
    for (iat_s, expected) in [
        (START_S + 60 - window_s, Ok(())),
        (START_S + 60 + window_s, Ok(())),
        (START_S + 59 - window_s, Err(Reason::ProofStale)),
        (START_S + 61 + window_s, Err(Reason::ProofStale)),
    ] {
        check("iat", Some(iat_s.into()), &options, expected);
    }
    check("iat", None, &options, Err(Reason::ProofInvalid));
    check("aat_aud", None, &options, Err(Reason::ProofInvalid));
    check("aat_aud", None, &anywhere, Ok(()));
    check("aat_aud", Some("https://other.example".into()), &anywhere, Err(Reason::ProofInvalid));
    check("aat_tool", Some("y".into()), &options, Err(Reason::ProofInvalid));
    check("hta", Some(json!({"n": 2})), &options, Err(Reason::ProofInvalid));
}

#[test]
fn no_byte_of_a_chain_or_proof_can_be_changed() {
    let (tokens, now) = (good(), at(START_S + 60));
    let (trust, options) = (trust(), VerificationOptions::default());
    let chain = verify(&tokens, &trust, &options, now).unwrap();
    for (hop, token) in tokens.iter().enumerate() {
        for (index, mask) in (0..token.len()).flat_map(|index| [1, 0x20, 0x80].map(|mask| (index, mask))) {
            let mut changed = tokens.clone();
            let mut bytes = token.to_vec();
            bytes[index] ^= mask;
            changed[hop] = bytes.into();
            assert!(verify(&changed, &trust, &options, now).is_err(), "token {hop}, byte {index} ^ {mask}");
            assert!(
                verify_with_known(&chain, &changed, &trust, &options, now).is_err(),
                "token {hop}, byte {index} ^ {mask}, known"
            );
        }
    }
    let arguments = object(&json!({"n": 1}));
    let call = ProofCall { tool: "x", arguments: &arguments, audience: Some(GATEWAY) };
    let proof = issue::sign_proof(&key(12), &tokens, &call, None, now).unwrap().into_bytes();
    assert!(verify_proof(&chain, &proof, &call, &options, now).is_ok());
    for (index, mask) in (0..proof.len()).flat_map(|index| [1, 0x20, 0x80].map(|mask| (index, mask))) {
        let mut changed = proof.clone();
        changed[index] ^= mask;
        assert!(verify_proof(&chain, &changed, &call, &options, now).is_err(), "byte {index} ^ {mask}");
    }
}

#[test]
fn a_proof_is_one_use_of_one_leaf() {
    let (tokens, now) = (good(), at(START_S + 60));
    let options = VerificationOptions { nonce: Some("n".to_owned()), ..VerificationOptions::default() };
    let arguments = object(&json!({"n": 1, "list": [1.0, "é"], "o": {"b": 1, "a": null}}));
    let call = ProofCall { tool: "x", arguments: &arguments, audience: Some(GATEWAY) };
    let use_of = |tokens: &[Bytes], holder: u8| {
        let chain = verify(tokens, &trust(), &options, now).unwrap();
        let proof = issue::sign_proof(&key(holder), tokens, &call, Some("n"), now).unwrap();
        let first = verify_proof(&chain, proof.as_bytes(), &call, &options, now).unwrap();
        let again = verify_proof(&chain, proof.as_bytes(), &call, &options, now).unwrap();
        assert_eq!(first, again);
        first.replay_key()
    };
    let keys = [use_of(&tokens, 12), use_of(&tokens, 12), use_of(&tokens[..2], 11)];
    assert!(keys[0] != keys[1] && keys[0] != keys[2]);
}

#[test]
fn debug_output_holds_no_token() {
    let tokens = good();
    let jws = super::jws::Jws::parse(&tokens[0]).unwrap();
    assert_eq!(format!("{jws:?}"), "Jws { .. }");
}

/// Checks, for random maps that verification accepts and for every small call, that a child permits a subset of its parent's calls.
#[test]
fn a_chain_only_narrows() {
    let mut runner = TestRunner::deterministic();
    let random = runner.rng();
    let options = VerificationOptions { registry: RegistryMode::Off, ..VerificationOptions::default() };
    let (calls, trust) = (small_calls(), trust());
    let (mut passed, mut narrower) = (0, 0);
    for _ in 0..1500 {
        let root = random_map(random);
        let hop = narrowed_map(random, &root);
        let leaf = narrowed_map(random, &hop);
        let tools = [json!({"t": root}), json!({"t": hop}), json!({"t": leaf})];
        let Ok(chain) = verify(&chain(&tools), &trust, &options, at(START_S + 60)) else { continue };
        passed += 1;
        for call in &calls {
            let admitted: Vec<bool> =
                chain.scopes().iter().map(|scope| scope.tools.get("t").unwrap().check_arguments(call).is_ok()).collect();
            assert!(admitted.is_sorted_by(|wider, tighter| *wider || !*tighter), "{admitted:?} {call:?} {tools:?}");
            assert_eq!(chain.check_call("t", call).is_ok(), admitted[2], "the leaf alone says what the chain grants: {tools:?}");
            narrower += usize::from(admitted[0] && !admitted[2]);
        }
    }
    assert!(
        passed > 150 && narrower > 1000,
        "{passed} chains passed, {narrower} calls were taken away: too few to mean anything"
    );
}

/// Every call with up to three arguments, from a few values of each type.
fn small_calls() -> Vec<JsonObject> {
    let values = || [None].into_iter().chain(pool().into_iter().chain([json!([]), json!([1]), json!(["x", 1])]).map(Some));
    let mut calls = Vec::new();
    for a in values() {
        for b in values() {
            for c in [None, Some(json!(1))] {
                let named = [("a", a.clone()), ("b", b.clone()), ("c", c)];
                let call: serde_json::Map<String, Value> =
                    named.into_iter().filter_map(|(name, value)| value.map(|value| (name.to_owned(), value))).collect();
                calls.push(object(&Value::Object(call)));
            }
        }
    }
    calls
}

fn pool() -> Vec<Value> {
    vec![json!(null), json!(true), json!(0), json!(1), json!(1.5), json!("x"), json!("1")]
}

fn below(random: &mut TestRng, bound: usize) -> usize {
    random.next_u32() as usize % bound
}

fn some(random: &mut TestRng, least: usize) -> Vec<Value> {
    (0..least + below(random, 3)).map(|_| pool()[below(random, pool().len())].clone()).collect()
}

fn random_constraint(random: &mut TestRng, nesting: usize) -> Value {
    let kinds = if nesting == 0 { 7 } else { 9 };
    match below(random, kinds) {
        0 => json!({"constraint_type": "exact", "value": pool()[below(random, pool().len())]}),
        1 => {
            let mut range = json!({"constraint_type": "range", "min_inclusive": below(random, 2) == 0});
            for name in ["min", "max"] {
                if below(random, 3) > 0 {
                    range[name] = below(random, 3).into();
                }
            }
            range
        }
        2 => json!({"constraint_type": "one_of", "values": some(random, 1)}),
        3 => json!({"constraint_type": "not_one_of", "excluded": some(random, 0)}),
        4 => json!({"constraint_type": "contains", "required": some(random, 0)}),
        5 => json!({"constraint_type": "subset", "allowed": some(random, 0)}),
        6 => json!({"constraint_type": "wildcard"}),
        kind => {
            let clauses: Vec<Value> = (0..1 + below(random, 3)).map(|_| random_constraint(random, nesting - 1)).collect();
            json!({"constraint_type": if kind == 7 { "all" } else { "any" }, "constraints": clauses})
        }
    }
}

fn random_map(random: &mut TestRng) -> Value {
    let mut map = json!({});
    for name in ["a", "b"] {
        if below(random, 4) > 0 {
            map[name] = random_constraint(random, 2);
            if below(random, 3) == 0 {
                map[name]["optional"] = true.into();
            }
        }
    }
    if below(random, 3) == 0 {
        map["*"] = json!({"constraint_type": "wildcard"});
    }
    map
}

/// A map similar to its parent: often tighter, sometimes wider.
fn narrowed_map(random: &mut TestRng, parent: &Value) -> Value {
    let mut map = if below(random, 8) == 0 { random_map(random) } else { parent.clone() };
    for name in ["a", "b"] {
        match below(random, 6) {
            0 if map[name].is_object() => {
                map[name].as_object_mut().unwrap().remove("optional");
            }
            1 => map[name] = json!({"constraint_type": "exact", "value": pool()[below(random, pool().len())]}),
            2 => map[name] = random_constraint(random, 1),
            3 => {
                for list in ["values", "allowed", "excluded", "required", "constraints"] {
                    if let Some(list) = map[name].get_mut(list).and_then(Value::as_array_mut).filter(|list| list.len() > 1) {
                        list.pop();
                    }
                }
            }
            4 => {
                map.as_object_mut().unwrap().remove(name);
            }
            _ => {}
        }
        if map[name].is_null() {
            map.as_object_mut().unwrap().remove(name);
        }
    }
    if below(random, 2) == 0 {
        map.as_object_mut().unwrap().remove("*");
    }
    map
}
