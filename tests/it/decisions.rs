//! Decisions over the wire: every reason that a call can cause, malformed messages, handles, batches, streams, freshness.

use std::collections::BTreeSet;

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::RevocationMeaning::{Dead, Suspend, Watermark};
use portcullis::api::r#gen::check_request::Credential;
use portcullis::api::r#gen::decision_service_client::DecisionServiceClient;
use portcullis::token::issue;
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{AUDIENCE, ISSUER, ServerProcess, TOOLS, TestChain, TestWorld, agent_id, now, request};

type DecisionClient = DecisionServiceClient<Channel>;

/// `aat_tool` of a proof for a listing.
const LIST_TOOLS: &str = portcullis::service::request::LIST_TOOLS;

/// One call, with its expected answer.
struct DecisionCase {
    name: &'static str,
    request: wire::CheckRequest,
    reason: &'static str,
    layer: &'static str,
    /// Whether the chain verified, so that the answer names its identities.
    identified: bool,
}

fn case(
    name: &'static str,
    request: wire::CheckRequest,
    (reason, layer): (&'static str, &'static str),
    identified: bool,
) -> DecisionCase {
    DecisionCase { name, request, reason, layer, identified }
}

fn effect_of(reason: &str) -> wire::Effect {
    match reason {
        "OK" => wire::Effect::Permit,
        "APPROVAL_REQUIRED" => wire::Effect::NeedsApproval,
        _ => wire::Effect::Deny,
    }
}

async fn check(client: &mut DecisionClient, request: wire::CheckRequest) -> wire::CheckResponse {
    client.check(request).await.unwrap().into_inner()
}

/// Makes all calls; returns the differences.
async fn differences(client: &mut DecisionClient, cases: Vec<DecisionCase>) -> Vec<String> {
    let mut wrong = Vec::new();
    for case in cases {
        let answer = check(client, case.request).await;
        let said = (answer.effect(), answer.reason.as_str(), answer.deciding_layer.as_str());
        if said != (effect_of(case.reason), case.reason, case.layer) {
            wrong.push(format!("{}: {said:?}: {}, not {} {}", case.name, answer.message, case.reason, case.layer));
        }
        let principals = answer.principals.clone().unwrap_or_default();
        let named = [&principals.user, &principals.application, &principals.session, &principals.task];
        let all = named.iter().all(|principal| principal.is_some()) && !principals.agents.is_empty();
        let none = named.iter().all(|principal| principal.is_none()) && principals.agents.is_empty();
        if (case.identified && !all) || (!case.identified && !none) {
            wrong.push(format!("{}: identified is not {}: {principals:?}", case.name, case.identified));
        }
        let verified = |principal: &Option<wire::Principal>| {
            principal
                .as_ref()
                .is_none_or(|principal| principal.evidence() == wire::Evidence::Verified && !principal.id.is_empty())
        };
        if !named.into_iter().all(verified) || principals.tool.is_none() {
            wrong.push(format!("{}: evidence: {principals:?}", case.name));
        }
        let complete = !answer.decision_id.is_empty() && answer.revision.contains('.') && !answer.message.is_empty();
        if !complete || answer.approval.is_some() != (case.reason == "APPROVAL_REQUIRED") {
            wrong.push(format!("{}: incomplete: {answer:?}", case.name));
        }
    }
    wrong
}

/// A chain of these tokens, as bytes, without a proof.
fn bare(tokens: Vec<Bytes>) -> wire::CheckRequest {
    request(&TestChain { tokens, holder: "alpha" }, Bytes::new(), "crm/look", "{}")
}

fn no_proof(chain: &TestChain) -> wire::CheckRequest {
    request(chain, Bytes::new(), "crm/look", "{}")
}

/// A root with another header, or signed with another key.
fn signed_otherwise(world: &TestWorld, signer: &str, header: &str) -> wire::CheckRequest {
    let mut claims = world.root_claims("alpha");
    (claims["iat"], claims["jti"], claims["del_depth"]) = (json!(now(0).unix_s()), json!("j"), json!(0));
    bare(vec![issue::sign_jws(world.key(signer), header, claims.to_string().as_bytes()).into()])
}

fn faults_of_tokens(world: &TestWorld) -> Vec<DecisionCase> {
    let root = |change: &dyn Fn(&mut Value)| no_proof(&world.root("alpha", change));
    let unix_s = now(0).unix_s();
    let identity = |reason: &'static str| (reason, "identity");
    let header = issue::jws_header("aat+jwt");
    vec![
        case("garbage", bare(vec!["garbage".into()]), identity("TOKEN_MALFORMED"), false),
        case("exp before iat", root(&|c| c["exp"] = json!(unix_s - 5)), identity("TOKEN_MALFORMED"), false),
        case("no cnf", root(&|c| c["cnf"] = json!({})), identity("TOKEN_MALFORMED"), false),
        case("EdDSA", signed_otherwise(world, "issuer", r#"{"alg":"EdDSA","typ":"aat+jwt"}"#), identity("TOKEN_ALG"), false),
        case("none", signed_otherwise(world, "issuer", r#"{"alg":"none","typ":"aat+jwt"}"#), identity("TOKEN_ALG"), false),
        case("typ", signed_otherwise(world, "issuer", &issue::jws_header("JWT")), identity("TOKEN_TYPE"), false),
        case("forged", signed_otherwise(world, "stranger", &header), identity("TOKEN_SIGNATURE"), false),
        case(
            "foreign kid",
            signed_otherwise(world, "issuer", r#"{"alg":"Ed25519","kid":"other","typ":"aat+jwt"}"#),
            identity("TOKEN_SIGNATURE"),
            false,
        ),
        case(
            "expired",
            root(&|c| (c["iat"], c["exp"]) = (json!(unix_s - 1000), json!(unix_s - 500))),
            identity("TOKEN_EXPIRED"),
            false,
        ),
        case("iat ahead", root(&|c| c["iat"] = json!(unix_s + 300)), identity("TOKEN_NOT_YET_VALID"), false),
        case("nbf ahead", root(&|c| c["nbf"] = json!(unix_s + 1800)), identity("TOKEN_NOT_YET_VALID"), false),
        case("nbf is text", root(&|c| c["nbf"] = json!("soon")), identity("TOKEN_MALFORMED"), false),
        case("NUL in an id", root(&|c| c["sid"] = json!("s-1\0")), identity("TOKEN_MALFORMED"), false),
        case("too long", root(&|c| c["exp"] = json!(unix_s + 9 * 3600)), identity("TOKEN_LIFETIME"), false),
        case("too large", root(&|c| c["acr"] = json!("x".repeat(9000))), identity("TOKEN_TOO_LARGE"), false),
        case("issuer", root(&|c| c["iss"] = json!("https://evil")), identity("ISSUER_UNKNOWN"), false),
        case("group", root(&|c| c["groups"] = json!(["visitors"])), identity("ISSUER_NOT_ENTITLED"), false),
        case("no act", root(&|c| drop(c.as_object_mut().unwrap().remove("act"))), identity("IDENTITY_MISSING"), false),
        case("nested act", root(&|c| c["act"]["act"] = json!({ "sub": "x" })), identity("IDENTITY_IN_HOP"), false),
        case("foreign aud", root(&|c| c["aud"] = json!("https://other")), identity("AUDIENCE_MISMATCH"), false),
        case("array aud", root(&|c| c["aud"] = json!([AUDIENCE])), identity("AUDIENCE_MISMATCH"), false),
        case("no aud", root(&|c| drop(c.as_object_mut().unwrap().remove("aud"))), identity("AUDIENCE_MISMATCH"), false),
        case("no agent", no_proof(&world.root("stranger", |_| {})), identity("AGENT_UNKNOWN"), false),
        case(
            "an agent's name with another key",
            no_proof(&world.root("stranger", |c| c["act"]["sub"] = json!(agent_id("alpha")))),
            identity("AGENT_KEY_UNKNOWN"),
            false,
        ),
    ]
}

fn faults_of_chains(world: &TestWorld) -> Vec<DecisionCase> {
    let root = world.session("alpha", "s-chain");
    let other = world.session("alpha", "s-other");
    let hop = |tools: &[&str], change: &dyn Fn(&mut Value)| no_proof(&world.hop(&root, "beta", tools, change));
    let identity = |reason: &'static str| (reason, "identity");
    let good = world.hop(&root, "beta", &["crm/look"], |_| {});
    let shallow = world.root("alpha", |c| c["del_max_depth"] = json!(0));
    let too_deep = world.hop(&shallow, "beta", &["crm/look"], |c| c["del_max_depth"] = json!(0));
    let narrowed = world.root("alpha", |c| c["authorization_details"][0]["tools"] = json!({ "crm/look": {} }));
    let unix_s = now(0).unix_s();
    vec![
        case("spliced parent", bare(vec![other.tokens[0].clone(), good.tokens[1].clone()]), identity("CHAIN_BROKEN"), false),
        case("hop before its parent", hop(&["crm/look"], &|c| c["iat"] = json!(unix_s - 100)), identity("CHAIN_BROKEN"), false),
        case("same token twice", bare(vec![root.tokens[0].clone(); 2]), identity("CHAIN_REPLAYED_TOKEN"), false),
        case("too deep", no_proof(&too_deep), identity("CHAIN_TOO_DEEP"), false),
        case(
            "added tool",
            no_proof(&world.hop(&narrowed, "beta", &["crm/look", "crm/write"], |_| {})),
            identity("CHAIN_WIDENED"),
            false,
        ),
        case("raised depth", hop(&["crm/look"], &|c| c["del_max_depth"] = json!(7)), identity("CHAIN_WIDENED"), false),
        case("a hop says who the user is", hop(&["crm/look"], &|c| c["sub"] = json!("eve")), identity("IDENTITY_IN_HOP"), false),
        case("a hop says the session", hop(&["crm/look"], &|c| c["sid"] = json!("s")), identity("IDENTITY_IN_HOP"), false),
        case(
            "a hop without act",
            hop(&["crm/look"], &|c| drop(c.as_object_mut().unwrap().remove("act"))),
            identity("IDENTITY_MISSING"),
            false,
        ),
        case("good", no_proof(&good), ("OK", ""), true),
        case(
            "not in the hop",
            request(&good, world.proof(&good, "crm/read", "{}"), "crm/read", "{}"),
            ("TOOL_NOT_GRANTED", "hop"),
            true,
        ),
        case(
            "not delegated to",
            no_proof(&world.hop(&root, "gamma", &["crm/look"], |_| {})),
            ("DELEGATION_NOT_ALLOWED", "agent"),
            true,
        ),
    ]
}

fn faults_of_calls(world: &TestWorld) -> Vec<DecisionCase> {
    let root = world.session("alpha", "s-calls");
    let with = |change: &dyn Fn(&mut Value)| no_proof(&world.root("alpha", change));
    let call = |tool: &str, args: &str| world.call(&root, tool, args);
    let schema =
        |bytes: &[u8]| wire::CheckRequest { tool_schema_sha256: Bytes::copy_from_slice(bytes), ..call("lab/probe", "{}") };
    let constrained = world.root("alpha", |c| {
        c["authorization_details"][0]["tools"] = json!({ "crm/look": { "n": { "constraint_type": "range", "max": 5 } } });
    });
    let proof_for = |tool: &str, args: &str, ahead: i64| world.proof_at(&root, tool, args, ahead);
    let read = |proof: Bytes| request(&root, proof, "crm/read", "{}");
    let stale = world.proof_at(&root, "crm/write", "{}", -20);
    let mut large = format!("{{\"a\":\"{}\"}}", "x".repeat(49 * 1024));
    let too_large = wire::CheckRequest { arguments_json: large.clone().into(), ..no_proof(&root) };
    large.clear();
    let args = |json: &'static str| wire::CheckRequest { arguments_json: json.into(), ..no_proof(&root) };
    let audience = |audience: &str| wire::CheckRequest { audience: audience.to_owned(), ..no_proof(&root) };
    let refused = ("ARGUMENT_REFUSED", "tool");
    vec![
        case("read", call("crm/read", "{}"), ("OK", ""), true),
        case("no proof needed", no_proof(&root), ("OK", ""), true),
        case("write", call("crm/write", r#"{"a":[1,2]}"#), ("OK", ""), true),
        case("destroy", call("crm/wipe", "{}"), ("OK", ""), true),
        case("audience named", audience(AUDIENCE), ("OK", ""), true),
        case("audience not ours to claim", audience("https://other"), ("AUDIENCE_MISMATCH", "identity"), true),
        case("no proof", read(Bytes::new()), ("PROOF_MISSING", "identity"), true),
        case("proof for another tool", read(proof_for("crm/look", "{}", 0)), ("PROOF_INVALID", "identity"), true),
        case("proof for other arguments", read(proof_for("crm/read", r#"{"a":1}"#, 0)), ("PROOF_INVALID", "identity"), true),
        case("garbage for a proof", read("garbage".into()), ("PROOF_INVALID", "identity"), true),
        case("a token for a proof", read(root.tokens[0].clone()), ("PROOF_INVALID", "identity"), true),
        case("an old proof", read(proof_for("crm/read", "{}", -60)), ("PROOF_STALE", "identity"), true),
        case("before ready", request(&root, stale, "crm/write", "{}"), ("PROOF_STALE", "identity"), true),
        case(
            "no such handle",
            wire::CheckRequest { credential: Some(Credential::Handle(vec![7; 16].into())), ..no_proof(&root) },
            ("HANDLE_UNKNOWN", "identity"),
            false,
        ),
        case("no such tool", call("gone/tool", "{}"), ("TOOL_UNKNOWN", "tool"), true),
        case("schema as registered", schema(&[1; 32]), ("OK", ""), true),
        case("schema changed", schema(&[2; 32]), ("TOOL_CHANGED", "tool"), true),
        case("schema not said", schema(&[]), ("TOOL_CHANGED", "tool"), true),
        case("no object", args("[]"), refused, true),
        case("a member twice", args(r#"{"a":1,"a":2}"#), refused, true),
        case("a number too large", args(r#"{"a":9007199254740993}"#), refused, true),
        case("arguments too large", too_large, refused, true),
        case(
            "outside the token's constraint",
            request(&constrained, Bytes::new(), "crm/look", r#"{"n":6}"#),
            ("ARGUMENT_REFUSED", "hop"),
            true,
        ),
        case("inside it", request(&constrained, Bytes::new(), "crm/look", r#"{"n":5}"#), ("OK", ""), true),
        case("the user may not", with(&|c| c["groups"] = json!(["readers"])), ("USER_DENIES", "user"), true),
        case("the application may not", with(&|c| c["client_id"] = json!("narrow")), ("APPLICATION_DENIES", "application"), true),
        case("unknown application", with(&|c| c["client_id"] = json!("ghost")), ("APPLICATION_UNKNOWN", "application"), true),
        case("application not served", with(&|c| c["client_id"] = json!("kiosk")), ("APPLICATION_NOT_SERVED", "agent"), true),
        case("user not served", with(&|c| c["groups"] = json!(["guests"])), ("USER_NOT_SERVED", "agent"), true),
        case("the agent may not", call("pay/large", "{}"), ("AGENT_DENIES", "agent"), true),
        case("the agent may not so much", call("lab/limited", r#"{"n":11}"#), ("AGENT_DENIES", "agent"), true),
        case("as much", call("lab/limited", r#"{"n":10}"#), ("OK", ""), true),
        case("a person is asked", call("pay/refund", r#"{"amount":500}"#), ("APPROVAL_REQUIRED", "agent"), true),
        case("no person can", call("pay/refund", r#"{"amount":501}"#), ("AGENT_DENIES", "agent"), true),
    ]
}

#[tokio::test]
async fn every_reason_that_a_call_can_reach() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let cases: Vec<DecisionCase> =
        [faults_of_tokens(&world), faults_of_chains(&world), faults_of_calls(&world)].into_iter().flatten().collect();
    let reached: BTreeSet<_> = cases.iter().map(|case| case.reason).collect();
    assert!(reached.len() >= 36, "{reached:?}");
    let wrong = differences(&mut client, cases).await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn a_proof_for_a_write_counts_once() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let (mut client, mut other) = (server.connect().await, server.connect().await);
    let root = world.session("alpha", "s");
    for tool in ["crm/write", "crm/wipe"] {
        let call = world.call(&root, tool, "{}");
        assert_eq!(check(&mut client, call.clone()).await.reason, "OK", "{tool}");
        for client in [&mut client, &mut other] {
            let again = check(client, call.clone()).await;
            assert_eq!((again.reason.as_str(), again.deciding_layer.as_str()), ("PROOF_REPLAYED", "identity"), "{tool}");
        }
    }
    let read = world.call(&root, "crm/read", "{}");
    assert_eq!(check(&mut client, read.clone()).await.reason, "OK");
    assert_eq!(check(&mut client, read).await.reason, "OK", "a read's proof may come again within its window");
    // A denied call does not use up its proof.
    let call = world.call(&root, "crm/write", "{}");
    let denied = wire::CheckRequest { audience: "https://other".to_owned(), ..call.clone() };
    assert_eq!(check(&mut client, denied).await.reason, "AUDIENCE_MISMATCH");
    assert_eq!(check(&mut client, call).await.reason, "OK");
}

/// Every target of the kill switch, with a cached chain and with a handle. The user's other agent goes on.
#[tokio::test]
async fn every_revocation_bites_a_warm_chain_and_a_handle() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let mut client = server.connect().await;
    let alpha = agent_id("alpha");
    let leaf_jti = |chain: &TestChain| claim(chain, "jti");
    let hop_hash = |chain: &TestChain| issue::token_hash(std::str::from_utf8(chain.tokens.last().unwrap()).unwrap());
    let spectator = world.root("gamma", |c| (c["sid"], c["txn"]) = (json!("s-gamma"), json!("t-gamma")));
    // Kind, key (from the chain), meaning, reason, whether it can be lifted, whether the spectator goes on.
    type Key<'a> = Box<dyn Fn(&TestChain) -> Vec<String> + 'a>;
    let fixed = |parts: &[&str]| -> Key<'_> {
        let parts: Vec<String> = parts.iter().map(|part| (*part).to_owned()).collect();
        Box::new(move |_| parts.clone())
    };
    let cases: Vec<(&str, Key<'_>, wire::RevocationMeaning, &str, bool, bool)> = vec![
        ("agent", fixed(&[&alpha]), Suspend, "AGENT_SUSPENDED", true, true),
        ("application", fixed(&["portal"]), Suspend, "APPLICATION_SUSPENDED", true, false),
        ("user", fixed(&[ISSUER, "ana"]), Suspend, "USER_SUSPENDED", true, false),
        ("delegation", fixed(&[ISSUER, "ana", &alpha]), Suspend, "REVOKED_DELEGATION", true, true),
        ("tool", fixed(&["crm/look"]), Suspend, "TOOL_SUSPENDED", true, false),
        ("all", fixed(&[]), Suspend, "REVOKED_ALL", true, false),
        ("token", Box::new(move |chain| vec![leaf_jti(chain)]), Dead, "REVOKED_TOKEN", false, true),
        ("hop", Box::new(move |chain| vec![hop_hash(chain)]), Dead, "REVOKED_TOKEN", false, true),
        ("session", Box::new(|chain| vec![claim(chain, "sid")]), Dead, "REVOKED_SESSION", false, true),
        ("task", Box::new(|chain| vec![claim(chain, "txn")]), Dead, "REVOKED_TASK", false, true),
        ("delegation", fixed(&[ISSUER, "ana", &alpha]), Watermark, "REVOKED_DELEGATION", false, true),
    ];
    for (count, (kind, key, meaning, reason, lifts, others)) in cases.into_iter().enumerate() {
        let chain = world.root("alpha", |c| (c["sid"], c["txn"]) = (json!(format!("s-{count}")), json!(format!("t-{count}"))));
        let what = format!("{kind} {meaning:?}");
        let first = check(&mut client, wire::CheckRequest { want_handle: true, ..no_proof(&chain) }).await;
        assert_eq!(first.reason, "OK", "{what}");
        let by_handle = wire::CheckRequest { credential: Some(Credential::Handle(first.handle)), ..no_proof(&chain) };
        assert_eq!(check(&mut client, by_handle.clone()).await.reason, "OK", "{what}");
        let key = key(&chain);
        let key: Vec<&str> = key.iter().map(String::as_str).collect();
        let at_least = operator.revoke(kind, &key, meaning).await;
        for call in [no_proof(&chain), by_handle.clone()] {
            let answer = check(&mut client, wire::CheckRequest { at_least: at_least.clone(), ..call }).await;
            assert_eq!((answer.effect(), answer.reason.as_str()), (wire::Effect::Deny, reason), "{what}");
            let layer = if reason == "TOOL_SUSPENDED" { ["revocation", "tool"].as_slice() } else { &["revocation"] };
            assert!(layer.contains(&answer.deciding_layer.as_str()), "{what}: {}", answer.deciding_layer);
            assert!(answer.handle.is_empty() && answer.principals.unwrap().user.is_some(), "{what}");
        }
        let other = check(&mut client, wire::CheckRequest { at_least, ..no_proof(&spectator) }).await;
        assert_eq!(other.effect() == wire::Effect::Permit, others, "{what}: the other agent: {}", other.reason);
        if lifts {
            let at_least = operator.reinstate(kind, &key).await;
            for call in [no_proof(&chain), by_handle] {
                let answer = check(&mut client, wire::CheckRequest { at_least: at_least.clone(), ..call }).await;
                assert_eq!(answer.reason, "OK", "{what} reinstated");
            }
        }
    }
}

fn claim(chain: &TestChain, name: &str) -> String {
    use base64::Engine as _;
    let text = std::str::from_utf8(chain.tokens.last().unwrap()).unwrap();
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text.split('.').nth(1).unwrap()).unwrap();
    serde_json::from_slice::<Value>(&payload).unwrap()[name].as_str().unwrap().to_owned()
}

/// Revocations that cannot be lifted and that hit more than one chain, each on a server of its own.
#[tokio::test]
async fn what_is_dead_stays_dead() {
    for (kind, meaning, reason, others) in [
        ("agent", Watermark, "REVOKED_AGENT", true),
        ("application", Watermark, "REVOKED_APPLICATION", false),
        ("user", Watermark, "REVOKED_USER", false),
        ("key", Dead, "REVOKED_KEY", true),
        ("issuer-key", Dead, "REVOKED_KEY", false),
    ] {
        let world = TestWorld::new();
        let server = ServerProcess::start(&world);
        let operator = server.operator().await;
        let mut client = server.connect().await;
        let (alpha, thumbprint) = (agent_id("alpha"), world.key("alpha").public_key().thumbprint().to_string());
        let key: &[&str] = match kind {
            "agent" => &[&alpha],
            "application" => &["portal"],
            "user" => &[ISSUER, "ana"],
            "key" => &[&thumbprint],
            _ => &[ISSUER, "main"],
        };
        let (chain, spectator) = (world.session("alpha", "s"), world.session("gamma", "s2"));
        assert_eq!(check(&mut client, no_proof(&chain)).await.reason, "OK");
        assert_eq!(check(&mut client, no_proof(&spectator)).await.reason, "OK");
        let at_least = operator.revoke(kind, key, meaning).await;
        let answer = check(&mut client, wire::CheckRequest { at_least: at_least.clone(), ..no_proof(&chain) }).await;
        assert_eq!((answer.reason.as_str(), answer.deciding_layer.as_str()), (reason, "revocation"), "{kind}");
        let other = check(&mut client, wire::CheckRequest { at_least, ..no_proof(&spectator) }).await;
        assert_eq!(other.effect() == wire::Effect::Permit, others, "{kind}: {}", other.reason);
        if meaning == Watermark {
            operator.revoke(kind, key, Suspend).await;
            let at_least = operator.reinstate(kind, key).await;
            let answer = check(&mut client, wire::CheckRequest { at_least, ..no_proof(&chain) }).await;
            assert_eq!(answer.reason, reason, "{kind}: a suspension is lifted, a watermark stays");
        }
    }
}

#[tokio::test]
async fn a_handle_is_good_on_its_connection_and_for_what_was_proved() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let (mut client, mut other) = (server.connect().await, server.connect().await);
    let root = world.session("alpha", "s");
    let handle_of = |answer: wire::CheckResponse| {
        assert_eq!((answer.reason.as_str(), answer.handle.len()), ("OK", 16));
        answer.handle
    };
    let by = |handle: &Bytes, tool: &str, proof: Bytes| wire::CheckRequest {
        credential: Some(Credential::Handle(handle.clone())),
        proof,
        ..request(&root, Bytes::new(), tool, "{}")
    };
    let reason = async |client: &mut DecisionClient, request: wire::CheckRequest| check(client, request).await.reason;
    let unproved = handle_of(check(&mut client, wire::CheckRequest { want_handle: true, ..no_proof(&root) }).await);
    assert_eq!(reason(&mut client, by(&unproved, "crm/look", Bytes::new())).await, "OK");
    assert_eq!(reason(&mut client, by(&unproved, "crm/read", Bytes::new())).await, "PROOF_MISSING", "nothing proved it");
    let proof = world.proof(&root, "crm/read", "{}");
    assert_eq!(reason(&mut client, by(&unproved, "crm/read", proof)).await, "OK", "a proof beside the handle");

    let call = wire::CheckRequest { want_handle: true, ..world.call(&root, "crm/read", "{}") };
    let proved = handle_of(check(&mut client, call.clone()).await);
    assert_ne!(proved, unproved);
    assert_eq!(reason(&mut client, call).await, "PROOF_REPLAYED", "a proof makes one handle");
    assert_eq!(reason(&mut client, by(&proved, "crm/read", Bytes::new())).await, "OK");
    assert_eq!(reason(&mut client, by(&proved, "crm/write", Bytes::new())).await, "PROOF_MISSING", "per call");
    let proof = world.proof(&root, "crm/write", "{}");
    assert_eq!(reason(&mut client, by(&proved, "crm/write", proof.clone())).await, "OK");
    assert_eq!(reason(&mut client, by(&proved, "crm/write", proof)).await, "PROOF_REPLAYED");
    for handle in [&proved, &unproved] {
        assert_eq!(reason(&mut other, by(handle, "crm/look", Bytes::new())).await, "HANDLE_UNKNOWN", "another connection");
    }
    let denied = wire::CheckRequest { want_handle: true, ..world.call(&root, "pay/large", "{}") };
    assert!(check(&mut client, denied).await.handle.is_empty(), "a denial makes no handle");
}

/// A proof that was overheard creates no proved handle on another connection, whatever the result of the call that showed it.
#[tokio::test]
async fn a_proof_that_was_shown_proves_no_handle() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let (mut client, mut thief) = (server.connect().await, server.connect().await);
    let root = world.session("alpha", "s");
    let first = check(&mut client, wire::CheckRequest { want_handle: true, ..no_proof(&root) }).await;
    let by_handle = Some(Credential::Handle(first.handle));
    type Shown<'a> = Box<dyn Fn(wire::CheckRequest) -> wire::CheckRequest + 'a>;
    let proof_of = |call: &wire::CheckRequest| match &call.credential {
        Some(Credential::Presentation(presentation)) => presentation.aat_pop.clone(),
        _ => Bytes::new(),
    };
    let cases: Vec<(&str, &str, &str, Shown<'_>)> = vec![
        ("a read", "crm/read", "OK", Box::new(|call| call)),
        (
            "beside a handle",
            "crm/read",
            "OK",
            Box::new(|call| wire::CheckRequest { proof: proof_of(&call), credential: by_handle.clone(), ..call }),
        ),
        ("no proof needed", "crm/look", "OK", Box::new(|call| call)),
        (
            "an audience refused",
            "crm/read",
            "AUDIENCE_MISMATCH",
            Box::new(|call| wire::CheckRequest { audience: "https://other".to_owned(), ..call }),
        ),
        (
            "a write refused",
            "crm/write",
            "AUDIENCE_MISMATCH",
            Box::new(|call| wire::CheckRequest { audience: "https://other".to_owned(), ..call }),
        ),
        (
            "arguments refused",
            "crm/read",
            "ARGUMENT_REFUSED",
            Box::new(|call| wire::CheckRequest { arguments_json: "[]".into(), ..call }),
        ),
        (
            "for another tool",
            "crm/read",
            "PROOF_INVALID",
            Box::new(|call| wire::CheckRequest { tool: "crm/wipe".to_owned(), ..call }),
        ),
    ];
    for (name, tool, reason, shown) in cases {
        let call = world.call(&root, tool, "{}");
        assert_eq!(check(&mut client, shown(call.clone())).await.reason, reason, "{name}");
        let stolen = check(&mut thief, wire::CheckRequest { want_handle: true, ..call }).await;
        assert_eq!((stolen.reason.as_str(), stolen.handle.len()), ("OK", 0), "{name}");
    }
    let call = world.call(&root, "crm/read", "{}");
    assert_eq!(client.explain(call.clone()).await.unwrap().into_inner().reason, "OK");
    let stolen = check(&mut thief, wire::CheckRequest { want_handle: true, ..call }).await;
    assert_eq!((stolen.reason.as_str(), stolen.handle.len()), ("OK", 0), "explained");
    // A call that ends before it is judged shows its proof too.
    let unreached = format!("{}.999999", stolen.revision.split('.').next().unwrap());
    let steal = async |thief: &mut DecisionClient, call: wire::CheckRequest, name: &str| {
        let stolen = check(thief, wire::CheckRequest { want_handle: true, ..call }).await;
        assert_eq!((stolen.reason.as_str(), stolen.handle.len()), ("OK", 0), "{name}");
    };
    let call = world.call(&root, "crm/read", "{}");
    let early = wire::CheckRequest { at_least: unreached, ..call.clone() };
    assert_eq!(check(&mut client, early.clone()).await.reason, "REVISION_UNAVAILABLE");
    steal(&mut thief, call, "a revision that is not there").await;
    let call = world.call(&root, "crm/read", "{}");
    let explained = client.explain(wire::CheckRequest { at_least: early.at_least, ..call.clone() }).await.unwrap().into_inner();
    assert_eq!(explained.reason, "REVISION_UNAVAILABLE");
    steal(&mut thief, call, "a revision that is not there, explained").await;
    let malformed = |call: &wire::CheckRequest| wire::CheckRequest { request_id: "x".repeat(129), ..call.clone() };
    let [call, explained, before, bad, after] = std::array::from_fn(|_| world.call(&root, "crm/read", "{}"));
    client.check(malformed(&call)).await.unwrap_err();
    client.explain(malformed(&explained)).await.unwrap_err();
    let requests = vec![before.clone(), malformed(&bad), after.clone(), malformed(&after)];
    client.check_batch(wire::CheckBatchRequest { requests }).await.unwrap_err();
    for (name, call) in
        [("malformed", call), ("explained", explained), ("before a malformed one", before), ("in a batch", bad), ("after", after)]
    {
        steal(&mut thief, call, name).await;
    }
    // In a batch, too, only the first call with a proof counts as the one that shows it.
    let call = world.call(&root, "crm/read", "{}");
    let requests = vec![call.clone(), wire::CheckRequest { want_handle: true, ..call }];
    let batch = client.check_batch(wire::CheckBatchRequest { requests }).await.unwrap().into_inner().responses;
    assert!(batch.iter().all(|answer| answer.reason == "OK" && answer.handle.is_empty()), "{batch:?}");
    // The agent itself makes a new proof.
    let fresh = check(&mut thief, wire::CheckRequest { want_handle: true, ..world.call(&root, "crm/read", "{}") }).await;
    assert_eq!((fresh.reason.as_str(), fresh.handle.len()), ("OK", 16));
}

#[tokio::test]
async fn batches_and_streams_keep_their_order() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let root = world.session("alpha", "s");
    let calls: Vec<wire::CheckRequest> = (0..64)
        .map(|number| {
            let tool = if number % 3 == 0 { "gone/tool" } else { "crm/read" };
            wire::CheckRequest { request_id: format!("r-{number}"), ..world.call(&root, tool, "{}") }
        })
        .collect();
    let fits = |answers: &[wire::CheckResponse]| {
        assert_eq!(answers.len(), calls.len());
        for (number, answer) in answers.iter().enumerate() {
            let reason = if number % 3 == 0 { "TOOL_UNKNOWN" } else { "OK" };
            assert_eq!((answer.request_id.as_str(), answer.reason.as_str()), (format!("r-{number}").as_str(), reason));
        }
        let ids: BTreeSet<_> = answers.iter().map(|answer| &answer.decision_id).collect();
        assert_eq!(ids.len(), calls.len(), "each decision has its own id");
    };
    let batch = client.check_batch(wire::CheckBatchRequest { requests: calls.clone() }).await.unwrap().into_inner();
    fits(&batch.responses);
    let mut stream = client.check_stream(tokio_stream::iter(calls.clone())).await.unwrap().into_inner();
    let mut answers = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        answers.push(answer);
    }
    fits(&answers);
    let recorded = server.audit().into_iter().filter(|line| line["kind"] == "decision").count();
    assert_eq!(recorded, 128);
}

#[tokio::test]
async fn no_answer_is_older_than_asked_for() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let mut client = server.connect().await;
    let root = world.session("alpha", "s");
    let asked = |at_least: String| wire::CheckRequest { at_least, ..no_proof(&root) };
    for at_least in [format!("{}.999999", operator.history), "0197aaaa-0000-7000-8000-000000000000.1".to_owned()] {
        let answer = check(&mut client, asked(at_least.clone())).await;
        let said = (answer.effect(), answer.reason.as_str(), answer.deciding_layer.as_str());
        assert_eq!(said, (wire::Effect::Deny, "REVISION_UNAVAILABLE", "freshness"), "{at_least}");
    }
    let number = |revision: &str| revision.rsplit('.').next().unwrap().parse::<u64>().unwrap();
    for turn in 0..20 {
        let session = format!("other-{turn}");
        let revision = operator.revoke("session", &[&session], Dead).await;
        let answer = check(&mut client, asked(revision.clone())).await;
        assert_eq!(answer.reason, "OK");
        assert!(number(&answer.revision) >= number(&revision), "{} is older than {revision}", answer.revision);
        let victim =
            check(&mut client, wire::CheckRequest { at_least: revision, ..no_proof(&world.session("alpha", &session)) }).await;
        assert_eq!(victim.reason, "REVOKED_SESSION");
    }
}

#[tokio::test]
async fn a_listing_says_what_a_check_says() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let root = world.session("alpha", "s");
    let narrow = world.root("alpha", |c| c["client_id"] = json!("narrow"));
    let hop = world.hop(&root, "beta", &["crm/read", "crm/look"], |_| {});
    for chain in [&root, &narrow, &hop] {
        let aat_pop = world.proof(chain, LIST_TOOLS, "{}");
        let presentation = wire::Presentation { aat_chain: chain.tokens.clone(), aat_pop };
        let credential = Some(wire::list_tools_request::Credential::Presentation(presentation));
        let tools = TOOLS.iter().map(|tool| (*tool).to_owned()).collect();
        let listed =
            client.list_tools(wire::ListToolsRequest { credential: credential.clone(), tools, ..Default::default() }).await;
        let listed = listed.unwrap().into_inner();
        assert_eq!(listed.tools.iter().map(|tool| tool.tool.as_str()).collect::<Vec<_>>(), TOOLS);
        for tool in &listed.tools {
            let args = if tool.tool == "pay/refund" { r#"{"amount":1}"# } else { r#"{"n":1}"# };
            let schema = if tool.tool == "lab/probe" { vec![1; 32] } else { vec![] };
            let call = wire::CheckRequest { tool_schema_sha256: schema.into(), ..world.call(chain, &tool.tool, args) };
            let answer = check(&mut client, call).await;
            assert_eq!((tool.effect(), &tool.reason), (answer.effect(), &answer.reason), "{}: {tool:?}", chain.holder);
            let maybe = chain.holder == "alpha" && ["pay/refund", "lab/limited", "lab/probe"].contains(&tool.tool.as_str());
            assert!(!tool.maybe || maybe, "{}: {tool:?}", chain.holder);
        }
        let again = client.list_tools(wire::ListToolsRequest { credential, ..Default::default() }).await.unwrap().into_inner();
        assert_eq!((again.reason.as_str(), again.tools.len()), ("PROOF_REPLAYED", 0), "a proof makes one listing");
        let aat_pop = world.proof(chain, LIST_TOOLS, "{}");
        let presentation = wire::Presentation { aat_chain: chain.tokens.clone(), aat_pop };
        let credential = Some(wire::list_tools_request::Credential::Presentation(presentation));
        let all = client.list_tools(wire::ListToolsRequest { credential, ..Default::default() }).await.unwrap().into_inner();
        assert_eq!(all.tools.len(), TOOLS.len() - 1, "every registered tool");
    }
    let credential = Some(wire::list_tools_request::Credential::Handle(vec![1; 16].into()));
    let tools = vec!["crm/read".to_owned(), "no/such".to_owned()];
    let asked = |tools| wire::ListToolsRequest { credential: credential.clone(), tools, ..Default::default() };
    let unknown = client.list_tools(asked(tools)).await.unwrap().into_inner();
    assert_eq!((unknown.reason.as_str(), unknown.tools.len()), ("HANDLE_UNKNOWN", 2));
    assert!(unknown.tools.iter().all(|tool| tool.reason == "HANDLE_UNKNOWN" && tool.effect() == wire::Effect::Deny));
    let unknown = client.list_tools(asked(vec![])).await.unwrap().into_inner();
    assert_eq!((unknown.reason.as_str(), unknown.tools.len()), ("HANDLE_UNKNOWN", 0), "a stranger is told no tool's name");
}

/// A caller with a chain but without its key learns from a listing only what the chain itself says, and nothing of policy.
#[tokio::test]
async fn a_listing_without_a_proof_tells_the_names_of_the_scope() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    // Of the tools in the scope, policy permits one, denies one, needs an approval for one, and does not know one.
    let scope = ["crm/read", "gone/tool", "lab/limited", "pay/large", "pay/refund"];
    let root = world.root("alpha", |c| {
        c["sid"] = json!("s-listed");
        c["authorization_details"][0]["tools"] = scope.iter().map(|tool| ((*tool).to_owned(), json!({}))).collect();
    });
    let by_chain = |aat_pop: Bytes| {
        let presentation = wire::Presentation { aat_chain: root.tokens.clone(), aat_pop };
        wire::ListToolsRequest {
            credential: Some(wire::list_tools_request::Credential::Presentation(presentation)),
            ..Default::default()
        }
    };
    let by_handle = |handle: Bytes, proof: Bytes| wire::ListToolsRequest {
        credential: Some(wire::list_tools_request::Credential::Handle(handle)),
        proof,
        ..Default::default()
    };
    let told = |answer: &wire::ListToolsResponse| -> Vec<(String, i32, String, bool)> {
        answer.tools.iter().map(|tool| (tool.tool.clone(), tool.effect, tool.reason.clone(), tool.maybe)).collect()
    };
    let permit = wire::Effect::Permit as i32;
    let names: Vec<_> = scope.iter().map(|tool| ((*tool).to_owned(), permit, "OK".to_owned(), true)).collect();
    let unproved =
        check(&mut client, wire::CheckRequest { want_handle: true, ..request(&root, Bytes::new(), "crm/read", "{}") }).await;
    assert_eq!((unproved.reason.as_str(), unproved.handle.len()), ("PROOF_MISSING", 0));
    let answer = client.list_tools(by_chain(Bytes::new())).await.unwrap().into_inner();
    assert_eq!((told(&answer), answer.names_only, answer.reason.as_str()), (names, true, "OK"));
    // A tool outside the scope gets the same answer whether it is registered or not.
    let tools = ["crm/write", "no/such", "pay/large"].map(str::to_owned).to_vec();
    let asked = wire::ListToolsRequest { tools, ..by_chain(Bytes::new()) };
    let answer = told(&client.list_tools(asked).await.unwrap().into_inner());
    let denied = |tool: &str| (tool.to_owned(), wire::Effect::Deny as i32, "TOOL_NOT_GRANTED".to_owned(), false);
    assert_eq!(answer, [denied("crm/write"), denied("no/such"), ("pay/large".to_owned(), permit, "OK".to_owned(), true)]);

    // With a proof, or with a handle that a proof created, policy answers.
    let proof = world.proof(&root, LIST_TOOLS, "{}");
    let all = client.list_tools(by_chain(proof.clone())).await.unwrap().into_inner();
    let reason = |answer: &wire::ListToolsResponse, name: &str| {
        answer.tools.iter().find(|tool| tool.tool == name).map(|tool| (tool.reason.clone(), tool.maybe))
    };
    assert_eq!((all.tools.len(), all.names_only), (TOOLS.len() - 1, false), "every registered tool");
    assert_eq!(reason(&all, "pay/large"), Some(("AGENT_DENIES".to_owned(), false)));
    assert_eq!(reason(&all, "pay/refund").map(|(reason, _)| reason).as_deref(), Some("APPROVAL_REQUIRED"));
    let call = wire::CheckRequest { want_handle: true, ..world.call(&root, "crm/read", "{}") };
    let proved = check(&mut client, call).await.handle;
    assert_eq!(told(&client.list_tools(by_handle(proved.clone(), Bytes::new())).await.unwrap().into_inner()), told(&all));
    let look = world.root("alpha", |_| {});
    let plain = check(&mut client, wire::CheckRequest { want_handle: true, ..no_proof(&look) }).await.handle;
    let answer = client.list_tools(by_handle(plain.clone(), Bytes::new())).await.unwrap().into_inner();
    assert!(answer.names_only && answer.tools.len() == TOOLS.len(), "a handle that no proof made: {answer:?}");
    let beside = world.proof(&look, LIST_TOOLS, "{}");
    assert!(!client.list_tools(by_handle(plain.clone(), beside)).await.unwrap().into_inner().names_only);
    // A proof that is sent is checked. A proof for a listing proves no later handle, and no call.
    let other = world.proof(&root, "crm/read", "{}");
    let answer = client.list_tools(by_chain(other)).await.unwrap().into_inner();
    assert_eq!((answer.reason.as_str(), answer.tools.len()), ("PROOF_INVALID", 0));
    let call = request(&root, proof, "crm/read", "{}");
    assert_eq!(check(&mut client, call).await.reason, "PROOF_INVALID");
    let twice = wire::ListToolsRequest { proof: "x".into(), ..by_chain("y".into()) };
    assert_eq!(client.list_tools(twice).await.unwrap_err().code(), Code::InvalidArgument);
    let twice = wire::ListToolsRequest { tools: ["crm/read"; 2].map(str::to_owned).to_vec(), ..by_chain(Bytes::new()) };
    assert!(client.list_tools(twice).await.unwrap_err().message().contains("`crm/read` stands twice"));
    let odd = wire::ListToolsRequest { tools: vec!["crm/\0read".to_owned()], ..by_chain(Bytes::new()) };
    assert_eq!(client.list_tools(odd).await.unwrap_err().code(), Code::InvalidArgument);
    // A revocation is no policy, so it shows with and without a proof.
    server.operator().await.revoke("session", &["s-listed"], Dead).await;
    let operator = server.operator().await;
    let at_least = operator.revoke("session", &["another"], Dead).await;
    check(&mut client, wire::CheckRequest { at_least, ..no_proof(&look) }).await;
    for aat_pop in [Bytes::new(), world.proof(&root, LIST_TOOLS, "{}")] {
        let answer = client.list_tools(by_chain(aat_pop)).await.unwrap().into_inner();
        assert_eq!(answer.reason, "REVOKED_SESSION");
        assert!(!answer.tools.is_empty() && answer.tools.iter().all(|tool| tool.reason == "REVOKED_SESSION"), "{answer:?}");
    }
    let lines = server.audit();
    let listings: Vec<_> = lines.iter().filter(|line| line["method"] == "ListTools").collect();
    assert!(listings.iter().any(|line| line["proof_jti"].is_string()) && listings.iter().any(|line| line["proof_jti"].is_null()));
}

fn info_of(status: &Status) -> (String, String) {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    (info.reason.clone(), info.domain.clone())
}

#[tokio::test]
async fn a_malformed_message_is_no_decision() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let root = world.session("alpha", "s");
    let good = || world.call(&root, "crm/read", "{}");
    let handle = |bytes: usize| wire::CheckRequest { credential: Some(Credential::Handle(vec![1; bytes].into())), ..good() };
    let invalid: Vec<(&str, wire::CheckRequest)> = vec![
        ("request_id", wire::CheckRequest { request_id: "x".repeat(129), ..good() }),
        ("credential", wire::CheckRequest { credential: None, ..good() }),
        ("handle", handle(0)),
        ("handle", handle(15)),
        ("handle", handle(17)),
        ("proof", wire::CheckRequest { proof: "x".into(), ..good() }),
        ("tool", wire::CheckRequest { tool: String::new(), ..good() }),
        ("tool", wire::CheckRequest { tool: format!("a/{}", "x".repeat(255)), ..good() }),
        ("tool_schema_sha256", wire::CheckRequest { tool_schema_sha256: vec![1; 31].into(), ..good() }),
        ("context_json", wire::CheckRequest { context_json: "[]".into(), ..good() }),
        ("context_json", wire::CheckRequest { context_json: r#"{"a":1,"a":1}"#.into(), ..good() }),
        ("audience", wire::CheckRequest { audience: "x".repeat(2049), ..good() }),
        ("request_id", wire::CheckRequest { request_id: "r\0".to_owned(), ..good() }),
        ("tool", wire::CheckRequest { tool: "crm/read\n".to_owned(), ..good() }),
        ("audience", wire::CheckRequest { audience: format!("{AUDIENCE}\u{7f}"), ..good() }),
        ("at_least", wire::CheckRequest { at_least: "0197aaaa-0000-7000-8000-000000000000.1\0".to_owned(), ..good() }),
        ("at_least", wire::CheckRequest { at_least: "nonsense".to_owned(), ..good() }),
        ("at_least", wire::CheckRequest { at_least: "x".repeat(2049), ..good() }),
        ("at_least", wire::CheckRequest { at_least: "0197aaaa-0000-7000-8000-000000000000.-1".to_owned(), ..good() }),
    ];
    for (field, call) in invalid {
        let status = client.check(call.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        assert_eq!(info_of(&status), ("INVALID_ARGUMENT".to_owned(), "portcullis".to_owned()));
        let violations = status.get_error_details().bad_request().unwrap().field_violations.clone();
        assert_eq!((violations.len(), violations[0].field.as_str()), (1, field), "{status:?}");
        // One malformed call spoils the whole batch: nothing is decided or recorded.
        let batch = wire::CheckBatchRequest { requests: vec![good(), call] };
        assert_eq!(client.check_batch(batch).await.unwrap_err().code(), Code::InvalidArgument, "{field}");
    }
    let context = format!("{{\"a\":\"{}\"}}", "x".repeat(17 * 1024));
    let tokens = vec![Bytes::from_static(b"x"); 100];
    for call in [wire::CheckRequest { context_json: context.into(), ..good() }, bare(tokens)] {
        let status = client.check(call).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert_eq!(info_of(&status), ("LIMIT_EXCEEDED".to_owned(), "portcullis".to_owned()));
    }
    let batch = wire::CheckBatchRequest { requests: vec![good(); 129] };
    let status = client.check_batch(batch).await.unwrap_err();
    assert_eq!((status.code(), info_of(&status).0.as_str()), (Code::ResourceExhausted, "LIMIT_EXCEEDED"));
    assert!(server.audit().iter().all(|line| line["kind"] != "decision"), "none of these was a decision");
    assert_eq!(check(&mut client, good()).await.reason, "OK", "the connection goes on");
}

/// A message over its limit is refused before it is read, with a reason like every other error.
#[tokio::test]
async fn an_oversized_message_is_refused() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let root = world.session("alpha", "s");
    let sized = |bytes: usize| wire::CheckRequest { arguments_json: vec![b' '; bytes].into(), ..no_proof(&root) };
    assert_eq!(check(&mut client, sized(100 * 1024)).await.reason, "ARGUMENT_REFUSED", "the agent's fault");
    let status = client.check(sized(5 * 1024 * 1024)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_eq!(info_of(&status), ("LIMIT_EXCEEDED".to_owned(), "portcullis".to_owned()));
    let mut stream = client.check_stream(tokio_stream::iter([sized(5 * 1024 * 1024)])).await.unwrap().into_inner();
    let status = stream.message().await.unwrap_err();
    assert_eq!((status.code(), info_of(&status).0.as_str()), (Code::ResourceExhausted, "LIMIT_EXCEEDED"));
    assert_eq!(check(&mut client, no_proof(&root)).await.reason, "OK");
}

/// Bytes that are not a message of the call's type.
#[tokio::test]
async fn bytes_that_are_no_message_are_refused() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let channel = crate::harness::channel(&server.decisions).await;
    let mut raw = tonic::client::Grpc::new(channel);
    raw.ready().await.unwrap();
    // This field number is a presentation, and one byte 255 is not a presentation.
    let garbage = wire::PolicyFile { path: String::new(), content: vec![255].into() };
    let codec = tonic_prost::ProstCodec::<wire::PolicyFile, wire::CheckResponse>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/portcullis.v1.DecisionService/Check");
    let status = raw.unary(tonic::Request::new(garbage), path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_eq!(info_of(&status), ("INVALID_ARGUMENT".to_owned(), "portcullis".to_owned()));
}
