//! The policy tools from outside: tests before an apply, the effect of a change, rollback, the explanation of a decision, and
//! shadow documents.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::decision_service_client::DecisionServiceClient;
use portcullis::api::r#gen::policy_service_client::PolicyServiceClient;
use portcullis::model::json::parse_object;
use portcullis::token::{PrivateKey, ProofCall, issue};
use prost::Message;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Channel;

use crate::harness::{
    CommandResult, ISSUER, OperatorClient, ServerProcess, TOOLS, TestChain, TestWorld, agent_id, authorization, binary, jwk, now,
    request, run, run_with, signed,
};

const APPLY: &str = "/portcullis.v1.PolicyService/Apply";
const EXPLAIN: &str = "/portcullis.v1.PolicyService/Explain";
const ROLLBACK: &str = "/portcullis.v1.PolicyService/Rollback";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json_run(arguments: &[&str]) -> CommandResult {
    run_with(binary().arg("--json").args(arguments), "")
}

/// A folder with one file.
fn folder(policy: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("policy.yaml"), policy).unwrap();
    folder
}

/// A test document for alpha, with user ana of staff, in the portal.
fn case(expect: &str) -> String {
    format!(
        "---\nkind: test\nagent: {}\nuser: {{issuer: {ISSUER}, sub: ana, groups: [staff]}}\napplication: portal\nexpect:\n  - {expect}\n",
        agent_id("alpha")
    )
}

const PASSES: &str = "{tool: crm/read, want: PERMIT}";
const FAILS: &str = "{tool: pay/large, args: {amount: 9}, want: PERMIT}";

#[test]
fn tests_of_a_folder_run_without_a_server() {
    let world = TestWorld::new();
    let policy = world.policy();
    let passing = folder(&(policy.clone() + &case(PASSES)));
    let ran = json_run(&["policy", "test", text(passing.path())]).ended(0).json();
    assert_eq!((&ran["tests"], &ran["passed"], &ran["failed"]), (&json!(1), &json!(1), &json!(0)));
    assert!(ran["coverage"]["percent"].as_u64().unwrap() < 50, "{ran}");
    let place = &ran["coverage"]["unreached"][0];
    assert!(place["path"] == "policy.yaml" && place["line"].as_u64().unwrap() > 0, "{place}");
    run(&["policy", "test", text(passing.path()), "--coverage-min", "10"]).ended(0);
    let short = run(&["policy", "test", text(passing.path()), "--coverage-min", "90"]).ended(1);
    assert!(short.stdout.contains("1 passed, 0 failed") && short.stdout.contains("below --coverage-min 90"), "{short:?}");

    let failing = folder(&(policy.clone() + &case(PASSES) + &case(FAILS)));
    let ran = json_run(&["policy", "test", text(failing.path())]).ended(1).json();
    assert_eq!((&ran["passed"], &ran["failed"]), (&json!(1), &json!(1)));
    let failure = &ran["failures"][0];
    assert_eq!(failure["wanted"], json!({ "effect": "PERMIT", "reason": null, "layer": null }));
    assert_eq!(failure["got"], json!({ "effect": "DENY", "reason": "AGENT_DENIES", "layer": "agent" }));
    assert_eq!((&failure["decided_by"]["list"], &failure["decided_by"]["entry"]), (&json!("deny"), &json!("pay/large")));
    let human = run(&["policy", "test", text(failing.path())]).ended(1).stdout;
    for part in ["calls pay/large {\"amount\":9}", "wanted  PERMIT", "got     DENY AGENT_DENIES", "`deny: pay/large`", "1 failed"]
    {
        assert!(human.contains(part), "{part}: {human}");
    }
    let none = run(&["policy", "test", text(folder(&policy).path())]).ended(0);
    assert!(none.stderr.contains("no tests"), "{none:?}");
    let broken = run(&["policy", "test", text(folder("kind: agent\n").path())]).ended(1);
    assert!(broken.stdout.contains("policy.yaml:1") && broken.stdout.contains("no test was run"), "{broken:?}");
    run(&["policy", "test", "/nowhere"]).ended(64);
}

#[test]
fn a_policy_whose_tests_fail_is_not_applied() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let (target, data) = (server.admin_url(), server.data.clone());
    let apply = |policy: &str, more: &[&str]| {
        let folder = folder(policy);
        let arguments = [&["policy", "apply", text(folder.path()), "--target", &target, "--data", text(&data)], more].concat();
        json_run(&arguments)
    };
    let before = apply(&world.policy(), &[]).ended(0).json();
    let warned = |applied: &Value| {
        applied["warnings"].as_array().unwrap().iter().any(|warning| warning["message"].as_str().unwrap().contains("no tests"))
    };
    assert!(warned(&before), "{before}");
    let tightened = world.policy().replace("deny: [pay/large]", "deny: [pay/large, crm/wipe]");
    for more in [&[][..], &["--dry-run"]] {
        let refused = apply(&(tightened.clone() + &case(PASSES) + &case(FAILS)), more).ended(1);
        for part in ["tests fail", "pay/large", "got     DENY AGENT_DENIES"] {
            assert!(refused.stderr.contains(part), "{part}: {refused:?}");
        }
    }
    let same = apply(&world.policy(), &["--dry-run"]).ended(0).json();
    assert_eq!((&same["revision"], &same["changes"]), (&before["revision"], &json!([])), "nothing was written");
    let refusals = server.audit().into_iter().filter(|line| line["method"] == APPLY && line["effect"] == "REFUSED").count();
    assert_eq!(refusals, 2);
    let applied = apply(&(tightened + &case(PASSES)), &[]).ended(0).json();
    assert_eq!((applied["changes"].as_array().unwrap().len(), warned(&applied)), (1, false), "{applied}");

    // A server does not start with such a policy either.
    let other = TestWorld::new();
    other.write_policy(&(other.policy() + &case(FAILS)));
    let listeners = ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let mut serve = binary();
    serve.args(["serve", "--create", "--policies", text(&other.policies()), "--data", text(&other.data())]).args(listeners);
    let refused = run_with(&mut serve, "").ended(78);
    assert!(refused.stderr.contains("tests fail") && refused.stderr.contains("pay/large"), "{refused:?}");
}

#[test]
fn a_diff_shows_who_can_reach_more() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let wider = world
        .policy()
        .replace("deny: [pay/large]", "deny: []")
        .replace("approve: [{pay/refund", "allow: [crm/*, pay/large]\napprove: [{pay/refund");
    let wider = wider.replacen("allow: [crm/*, lab/probe, {lab/limited: {args: {n: {max: 10}}}}]\n", "", 1);
    let (new, old) = (folder(&wider), folder(&world.policy()));
    let (target, data) = (server.admin_url(), server.data.clone());
    let against_server =
        json_run(&["policy", "diff", text(new.path()), "--target", &target, "--data", text(&data)]).ended(0).json();
    let between = json_run(&["policy", "diff", text(new.path()), text(old.path())]).ended(0).json();
    assert_eq!(against_server["pairs"], between["pairs"]);
    assert_eq!(against_server["documents"], json!([{ "change": "changed", "kind": "agent", "id": agent_id("alpha") }]));
    let pairs: Vec<String> = between["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| {
            format!(
                "{} {} {} {}",
                pair["tool"].as_str().unwrap(),
                pair["before"].as_str().unwrap(),
                pair["after"].as_str().unwrap(),
                pair["direction"].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(pairs, ["pay/large DENY PERMIT? wider", "lab/limited PERMIT? DENY narrower", "lab/probe PERMIT? DENY narrower"]);
    let human = run(&["policy", "diff", text(new.path()), text(old.path()), "--exit-code"]).ended(1).stdout;
    assert!(human.contains("+") && human.contains("1 wider, 0 changed, 2 narrower"), "{human}");
    run(&["policy", "diff", text(old.path()), text(old.path()), "--exit-code"]).ended(0);
    let narrower = folder(&world.policy().replace("allow: [crm/*]", "allow: [crm/read]"));
    run(&["policy", "diff", text(narrower.path()), text(old.path()), "--exit-code"]).ended(0);
    let broken =
        run(&["policy", "diff", text(folder("kind: agent\n").path()), "--target", &target, "--data", text(&data)]).ended(1);
    assert!(broken.stderr.contains("policy has errors"), "{broken:?}");
}

#[tokio::test]
async fn an_earlier_policy_comes_back_as_a_new_revision() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let (target, data) = (server.admin_url(), server.data.clone());
    let command = |arguments: &[&str]| json_run(&[arguments, &["--target", &target, "--data", text(&data)]].concat());
    let history = || command(&["policy", "history"]).ended(0).json()["revisions"].as_array().unwrap().clone();
    let first = history()[0]["revision"].as_str().unwrap().to_owned();
    let changed = world
        .policy()
        .replace("deny: [pay/large]", "deny: [pay/large, crm/wipe]")
        .replace("{kind: application, id: kiosk, allow: [\"*\"]}\n---\n", "");
    command(&["policy", "apply", text(folder(&changed).path())]).ended(0);
    let newest = &history()[0];
    assert_eq!((&newest["operators"], &newest["method"]), (&json!(["local"]), &json!(APPLY)));
    assert_eq!(newest["put"], json!([{ "kind": "agent", "id": agent_id("alpha") }]));
    assert_eq!(newest["removed"], json!([{ "kind": "application", "id": "kiosk" }]));
    assert_eq!(command(&["policy", "history", "--limit", "1"]).ended(0).json()["revisions"].as_array().unwrap().len(), 1);

    let dry = command(&["policy", "rollback", &first, "--dry-run"]).ended(0).json();
    let changes = json!([
        { "change": "changed", "kind": "agent", "id": agent_id("alpha") },
        { "change": "added", "kind": "application", "id": "kiosk" },
    ]);
    assert_eq!(dry["changes"], changes);
    assert_eq!(history().len(), 3, "the first operator, two folders, and no rollback yet");
    let number = first.rsplit('.').next().unwrap();
    let back = command(&["policy", "rollback", number]).ended(0).json();
    assert_eq!((&back["changes"], &back["dry_run"]), (&changes, &json!(false)));
    let newest = &history()[0];
    assert_eq!((&newest["revision"], &newest["method"]), (&back["revision"], &json!(ROLLBACK)));
    assert!(newest["account"].as_str().unwrap().contains(&format!("back to revision {number}")), "{newest}");
    let again = run(&["policy", "rollback", number, "--target", &target, "--data", text(&data)]).ended(0);
    assert!(again.stdout.contains("nothing changes"), "{again:?}");
    assert_eq!(
        command(&["policy", "apply", text(folder(&world.policy()).path()), "--dry-run"]).ended(0).json()["changes"],
        json!([])
    );
    // The first revision made the operator who signs this act. The program made that operator, so no rollback removes it.
    let emptied = command(&["policy", "rollback", "1", "--dry-run"]).ended(0).json();
    assert!(
        emptied["changes"].as_array().unwrap().iter().all(|change| change["change"] == "removed" && change["kind"] != "operator"),
        "{emptied}"
    );

    for (revision, says) in [("999", "no revision 999"), ("elsewhere.1", "another store"), ("x", "policy history")] {
        let refused = command(&["policy", "rollback", revision]);
        assert!(refused.code != 0 && refused.stderr.contains(says), "{revision}: {refused:?}");
    }
}

#[tokio::test]
async fn a_rollback_of_operators_needs_two_people() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let local = server.operator().await;
    let second = PrivateKey::generate().unwrap();
    let with = world.policy() + &format!("---\n{{kind: operator, id: second, keys: [{}], roles: [administer]}}\n", jwk(&second));
    let mut client = PolicyServiceClient::new(local.channel.clone());
    let before = client
        .history(signed(
            wire::PolicyHistoryRequest { limit: 0 },
            &[by(&local, "/portcullis.v1.PolicyService/History", &wire::PolicyHistoryRequest { limit: 0 })],
        ))
        .await;
    let before = before.unwrap().into_inner().revisions[0].revision.clone();
    let files = vec![wire::PolicyFile { path: "policy.yaml".to_owned(), content: with.into_bytes().into() }];
    let apply = wire::ApplyPolicyRequest { files, dry_run: false };
    client.apply(signed(apply.clone(), &[by(&local, APPLY, &apply)])).await.unwrap();
    let rollback = wire::RollbackPolicyRequest { revision: before, dry_run: false };
    let alone = client.rollback(signed(rollback.clone(), &[by(&local, ROLLBACK, &rollback)])).await.unwrap_err();
    assert_eq!(alone.code(), Code::PermissionDenied, "{alone:?}");
    let both = [by(&local, ROLLBACK, &rollback), authorization(&second, &local.history, ROLLBACK, &rollback)];
    let done = client.rollback(signed(rollback, &both)).await.unwrap().into_inner();
    assert_eq!(done.changes.len(), 1);
}

fn by<M: Message>(operator: &OperatorClient, method: &str, message: &M) -> String {
    operator.authorization(method, message)
}

/// The explanation of administration.
async fn explained(operator: &OperatorClient, message: wire::CheckRequest) -> wire::ExplainResponse {
    let mut client = PolicyServiceClient::new(operator.channel.clone());
    let authorization = by(operator, EXPLAIN, &message);
    client.explain(signed(message, &[authorization])).await.unwrap().into_inner()
}

fn told(answer: &wire::ExplainResponse) -> (i32, &str, &str) {
    (answer.effect, &answer.reason, &answer.deciding_layer)
}

fn steps(answer: &wire::ExplainResponse) -> Vec<String> {
    answer.changes.iter().map(|change| format!("{}: {}", change.layer, change.what)).collect()
}

/// Every text that only a document of the world's policy contains. A gateway must not see any of it.
const SECRETS: &[&str] = &[
    "policy.yaml",
    "pay/large, ",
    "crm/*",
    "lab/limited\":",
    "max",
    "visitors",
    "readers",
    "office-hours",
    "hour_utc",
    "`deny",
    "acts_for",
    "staff",
];

#[tokio::test]
async fn what_is_explained_is_what_check_answers_and_reveals_no_document() {
    let world = TestWorld::new();
    let rail = "---\n{kind: guardrail, id: office-hours, tools: [crm/look], forbid_when: 'context.time.hour_utc < 24'}\n";
    world.write_policy(&(world.policy() + rail));
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let operator = server.operator().await;
    let alpha = world.root("alpha", |_| {});
    let beta = world.hop(&alpha, "beta", &["crm/read", "crm/write", "pay/refund"], |_| {});
    let stranger = world.root("alpha", |claims| claims["cnf"] = json!({ "jwk": jwk(world.key("stranger")) }));
    let expired = world.root("alpha", |claims| {
        claims["iat"] = json!(now(0).unix_s() - 4000);
        claims["exp"] = json!(now(0).unix_s() - 400);
    });
    let limited = world.root("alpha", |claims| {
        claims["authorization_details"][0]["tools"]["crm/read"] = json!({ "n": { "constraint_type": "range", "max": 5 } });
    });
    let reader = world.root("alpha", |claims| claims["groups"] = json!(["readers"]));
    let kiosk = world.root("alpha", |claims| claims["client_id"] = json!("kiosk"));
    let unheard = world.root("alpha", |claims| claims["client_id"] = json!("unheard-of"));
    let (alpha, beta): (&TestChain, &TestChain) = (&alpha, &beta);
    let without_proof = |tool: &str| request(alpha, Bytes::new(), tool, "{}");
    let mut calls: Vec<(&str, wire::CheckRequest)> =
        TOOLS.iter().map(|tool| ("every tool", world.call(alpha, tool, r#"{"amount":700,"n":70}"#))).collect();
    calls.extend(TOOLS.iter().map(|tool| ("within limits", world.call(alpha, tool, r#"{"amount":70,"n":7}"#))));
    calls.extend(TOOLS.iter().map(|tool| ("through beta", world.call(beta, tool, "{}"))));
    calls.extend([
        ("no proof", without_proof("crm/write")),
        ("no proof, and denied", without_proof("pay/large")),
        ("another call's proof", request(alpha, world.proof(alpha, "crm/read", "{}"), "crm/write", "{}")),
        ("no such key", world.call(&stranger, "crm/read", "{}")),
        ("expired", request(&expired, Bytes::new(), "crm/read", "{}")),
        ("granted less", world.call(&limited, "crm/read", r#"{"n":6}"#)),
        ("another group", world.call(&reader, "crm/write", "{}")),
        ("another application", world.call(&kiosk, "crm/read", "{}")),
        ("no application", world.call(&unheard, "crm/read", "{}")),
        ("no arguments", request(alpha, Bytes::new(), "crm/look", "[]")),
        ("another audience", wire::CheckRequest { audience: "https://elsewhere".to_owned(), ..without_proof("crm/look") }),
    ]);
    let unproved = [
        "no proof",
        "no proof, and denied",
        "another call's proof",
        "no such key",
        "expired",
        "no arguments",
        "another audience",
    ];
    for (name, call) in calls {
        // A proof counts once, and an explanation does not spend it: the same call is decided afterwards.
        let told_gateway = client.explain(call.clone()).await.unwrap().into_inner();
        let told_admin = explained(&operator, call.clone()).await;
        let check = client.check(call.clone()).await.unwrap().into_inner();
        let expected = (check.effect, check.reason.as_str(), check.deciding_layer.as_str());
        assert_eq!(told(&told_gateway), expected, "{name} {}: {told_gateway:?}", call.tool);
        assert_eq!(told(&told_admin), expected, "{name} {}: {told_admin:?}", call.tool);
        assert_eq!(told_gateway.message, check.message, "{name}");
        let least = told_gateway.layers.iter().map(|layer| layer.effect()).min_by_key(|effect| match effect {
            wire::Effect::Permit => 2,
            wire::Effect::NeedsApproval => 1,
            _ => 0,
        });
        assert_eq!(least, Some(check.effect()), "{name}");
        assert_eq!(told_admin.changes.is_empty(), check.effect() == wire::Effect::Permit, "{name} {told_admin:?}");
        let told_steps = if unproved.contains(&name) { 0 } else { told_admin.changes.len() };
        assert_eq!(told_gateway.changes.len(), told_steps, "{name} {told_gateway:?}");
        let seen = format!("{:?} {:?} {}", told_gateway.layers, told_gateway.changes, told_gateway.message);
        let leaked: Vec<_> = SECRETS.iter().filter(|secret| seen.contains(*secret)).collect();
        assert!(leaked.is_empty(), "{name}: {leaked:?} in {seen}");
        for layer in &told_gateway.layers {
            assert_eq!(
                (&*layer.document_kind, &*layer.document_id, &*layer.path, layer.line, &*layer.entry),
                ("", "", "", 0, "")
            );
        }
    }
    let lines = server.audit();
    let explained = lines.iter().filter(|line| line["method"] == "Explain").count();
    assert_eq!(explained, 2 * (3 * TOOLS.len() + 11), "one line each");
}

/// A call without a proof is explained as `Check` answers it: no layer that judges arguments, no limit, no approver, no step.
#[tokio::test]
async fn explaining_without_a_proof_tells_what_check_tells() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let (mut client, operator) = (server.connect().await, server.operator().await);
    let alpha = world.root("alpha", |_| {});
    let explain = async |client: &mut DecisionServiceClient<Channel>, call: wire::CheckRequest| {
        client.explain(call).await.unwrap().into_inner()
    };
    let names_only = |answer: &wire::ExplainResponse| {
        answer.changes.is_empty()
            && !answer.no_change_can
            && answer.layers.iter().all(|layer| layer.subject.is_empty() && layer.approvers.is_empty())
    };
    for (tool, args) in
        [("lab/limited", r#"{"n":11}"#), ("pay/refund", r#"{"amount":5}"#), ("pay/large", "{}"), ("gone/tool", "{}")]
    {
        let answer = explain(&mut client, request(&alpha, Bytes::new(), tool, args)).await;
        let layers: Vec<_> = answer.layers.iter().map(|layer| (layer.layer.as_str(), layer.reason.as_str())).collect();
        assert_eq!(layers, [("identity", "PROOF_MISSING"), ("revocation", "OK"), ("freshness", "OK")], "{tool}");
        assert!(names_only(&answer), "{tool}: {answer:?}");
        let proved = explain(&mut client, world.call(&alpha, tool, args)).await;
        assert!(!proved.changes.is_empty(), "{tool}: {proved:?}");
        let admin = explained(&operator, request(&alpha, Bytes::new(), tool, args)).await;
        assert!(
            !admin.changes.is_empty() && admin.layers.iter().any(|layer| !layer.document_id.is_empty() || tool == "gone/tool")
        );
    }
    let proved = explain(&mut client, world.call(&alpha, "pay/refund", r#"{"amount":5}"#)).await;
    assert!(proved.layers.iter().any(|layer| layer.approvers == ["leads"]), "{proved:?}");
    // A used proof may have been overheard.
    let used = world.call(&alpha, "crm/write", "{}");
    assert_eq!(client.check(used.clone()).await.unwrap().into_inner().reason, "OK");
    let answer = explain(&mut client, used).await;
    assert_eq!((told(&answer).1, names_only(&answer)), ("PROOF_REPLAYED", true));
    // A handle proves as much as it does for a check.
    let handle = async |client: &mut DecisionServiceClient<Channel>, call: wire::CheckRequest| {
        let answer = client.check(wire::CheckRequest { want_handle: true, ..call }).await.unwrap().into_inner();
        Some(wire::check_request::Credential::Handle(answer.handle))
    };
    let proved = handle(&mut client, world.call(&alpha, "crm/read", "{}")).await;
    let plain = handle(&mut client, request(&alpha, Bytes::new(), "crm/look", "{}")).await;
    let by = |credential: &Option<wire::check_request::Credential>, tool: &str| wire::CheckRequest {
        credential: credential.clone(),
        ..request(&alpha, Bytes::new(), tool, "{}")
    };
    assert!(!explain(&mut client, by(&proved, "pay/large")).await.changes.is_empty());
    assert!(names_only(&explain(&mut client, by(&proved, "crm/write")).await), "a write needs a proof of its own");
    assert!(names_only(&explain(&mut client, by(&plain, "pay/large")).await), "a handle that no proof made");
}

/// Whoever has stolen a chain asks with one value after the other, and learns nothing of the limits from the answers.
#[tokio::test]
async fn a_thief_of_a_chain_finds_no_limit_by_bisection() {
    let world = TestWorld::new();
    let deny = "deny: [pay/large]";
    world.write_policy(&world.policy().replace(deny, "deny: [pay/large, {crm/look: {args: {n: {min: 3}}}}]"));
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let stolen = world.root("alpha", |claims| {
        let tools = &mut claims["authorization_details"][0]["tools"];
        tools["lab/limited"] = json!({ "n": { "constraint_type": "range", "max": 7 } });
        tools["crm/look"] = json!({ "n": { "constraint_type": "range", "max": 5 } });
    });
    let mut learned = async |tool: &str, args: String| {
        let call = request(&stolen, Bytes::new(), tool, &args);
        let answer = client.explain(call.clone()).await.unwrap().into_inner();
        let check = client.check(call).await.unwrap().into_inner();
        assert_eq!(told(&answer), (check.effect, check.reason.as_str(), check.deciding_layer.as_str()), "{tool} {args}");
        wire::ExplainResponse { decision_id: String::new(), snapshot_age_ms: 0, ..answer }
    };
    // The tools need a proof. The scope ends at 7, the agent's limit is 10; refunds need an approval and end at 500.
    for (tool, argument, values) in [("lab/limited", "n", [6, 7, 8, 10, 11]), ("pay/refund", "amount", [1, 499, 500, 501, 9999])]
    {
        let first = learned(tool, "{}".to_owned()).await;
        assert_eq!(first.reason, "PROOF_MISSING");
        for value in values {
            assert_eq!(learned(tool, format!("{{\"{argument}\":{value}}}")).await, first, "{tool}: {argument} is {value}");
        }
    }
    // The tool needs no proof, so `Check` tells what decides. `Explain` tells no layer beside it: the scope's limit, 5, stays hidden.
    let denied = learned("crm/look", r#"{"n":3}"#.to_owned()).await;
    assert_eq!((denied.reason.as_str(), denied.deciding_layer.as_str()), ("AGENT_DENIES", "agent"));
    for n in 4..=8 {
        assert_eq!(learned("crm/look", format!("{{\"n\":{n}}}")).await, denied, "n is {n}");
    }
}

#[tokio::test]
async fn administration_hears_what_to_change_and_where() {
    let world = TestWorld::new();
    let rail = "---\n{kind: guardrail, id: office-hours, tools: [crm/look], forbid_when: 'context.time.hour_utc < 24'}\n";
    world.write_policy(&(world.policy() + rail));
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let line = |of: &str| {
        world.policies().join("policy.yaml").pipe(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            let at = text.lines().position(|line| line.contains(of)).unwrap();
            // A document begins after its separator line.
            at - text.lines().take(at).collect::<Vec<_>>().iter().rev().position(|line| *line == "---").unwrap() + 1
        })
    };
    let (alpha_line, beta_line, rail_line) =
        (line("agent/alpha\n".trim()), line("id: spiffe://test.example/agent/beta"), line("office-hours"));
    let (a, b) = (agent_id("alpha"), agent_id("beta"));
    let alpha = world.root("alpha", |_| {});
    let beta = world.hop(&alpha, "beta", TOOLS, |_| {});
    let kiosk = world.root("alpha", |claims| claims["client_id"] = json!("kiosk"));
    let reader = world.root("alpha", |claims| claims["groups"] = json!(["readers"]));
    let expect = |call: wire::CheckRequest, expected: Vec<String>| {
        let operator = &operator;
        async move {
            let answer = explained(operator, call).await;
            assert_eq!(steps(&answer), expected, "{answer:?}");
        }
    };
    expect(world.call(&alpha, "pay/large", "{}"), vec![format!("agent: remove or narrow `deny: pay/large` of agent {a} (policy.yaml:{alpha_line}); and add `- pay/large` to `allow` of agent {a} (policy.yaml:{alpha_line})")]).await;
    let answer = explained(&operator, world.call(&alpha, "lab/limited", r#"{"n":11}"#)).await;
    assert!(steps(&answer)[0].starts_with("agent: argument `n` must be <= 10 (entry `{\"lab/limited\":"), "{answer:?}");
    let by_alpha = format!("agent: add `- lab/probe` to `allow` of agent {b} (policy.yaml:{beta_line})");
    let schema = wire::CheckRequest { tool_schema_sha256: vec![1; 32].into(), ..world.call(&beta, "lab/probe", "{}") };
    expect(schema, vec![by_alpha]).await;
    expect(
        world.call(&kiosk, "crm/read", "{}"),
        vec![format!("agent: add `kiosk` to `applications` of agent {a} (policy.yaml:{alpha_line})")],
    )
    .await;
    let group = line("id: readers");
    expect(
        world.call(&reader, "crm/write", "{}"),
        vec![format!("user: add `- crm/write` to `allow` of group readers (policy.yaml:{group})")],
    )
    .await;
    let look = request(&alpha, Bytes::new(), "crm/look", "{}");
    expect(
        look,
        vec![format!(
            "guardrail: narrow or remove guardrail office-hours (policy.yaml:{rail_line}): `context.time.hour_utc < 24`"
        )],
    )
    .await;
    let approval = world.call(&alpha, "pay/refund", r#"{"amount":5}"#);
    expect(approval, vec!["agent: an operator in `leads` would have to approve this call".to_owned()]).await;
    expect(
        world.call(&alpha, "gone/tool", "{}"),
        vec!["tool: register the tool: add a document `kind: tool`, `id: gone/tool`".to_owned()],
    )
    .await;
    // Every layer that denies needs a change.
    let both = explained(&operator, request(&kiosk, Bytes::new(), "crm/write", "{}")).await;
    assert_eq!(both.changes.len(), 2, "{both:?}");
    let denied = both.layers.iter().find(|layer| layer.layer == "agent").unwrap();
    assert_eq!(
        (&*denied.document_kind, &denied.document_id, &*denied.path, &*denied.entry),
        ("agent", &a, "policy.yaml", "applications")
    );
    for part in ["ana", &a, "portal"] {
        assert!(explained(&operator, world.call(&alpha, "crm/read", "{}")).await.chain.contains(part));
    }
}

trait PipeExt: Sized {
    fn pipe<T>(self, f: impl FnOnce(Self) -> T) -> T {
        f(self)
    }
}

impl PipeExt for std::path::PathBuf {}

#[tokio::test]
async fn what_is_dead_no_change_brings_back() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let (mut client, operator) = (server.connect().await, server.operator().await);
    let chain = world.session("alpha", "s-7");
    let call = || world.call(&chain, "crm/look", "{}");
    let suspended = operator.revoke("agent", &[&agent_id("alpha")], wire::RevocationMeaning::Suspend).await;
    let answer = client.explain(wire::CheckRequest { at_least: suspended, ..call() }).await.unwrap().into_inner();
    assert_eq!((told(&answer).1, answer.no_change_can), ("AGENT_SUSPENDED", false));
    assert_eq!(steps(&answer), [format!("revocation: agent {} would have to be reinstated", agent_id("alpha"))]);
    let admin = explained(&operator, call()).await;
    assert_eq!(steps(&admin), [format!("revocation: reinstate it: `portcullis reinstate agent {}`", agent_id("alpha"))]);
    let lifted = operator.reinstate("agent", &[&agent_id("alpha")]).await;
    let answer = client.explain(wire::CheckRequest { at_least: lifted, ..call() }).await.unwrap().into_inner();
    assert_eq!((told(&answer).1, answer.changes.len()), ("OK", 0));
    let dead = operator.revoke("session", &["s-7"], wire::RevocationMeaning::Dead).await;
    let answer = client.explain(wire::CheckRequest { at_least: dead, ..call() }).await.unwrap().into_inner();
    assert_eq!((told(&answer).1, answer.no_change_can, answer.changes.len()), ("REVOKED_SESSION", true, 0));
    let other = world.session("alpha", "s-8");
    let void = operator.revoke("user", &[ISSUER, "ana"], wire::RevocationMeaning::Watermark).await;
    let later = wire::CheckRequest { at_least: void, ..world.call(&other, "crm/look", "{}") };
    let answer = client.explain(later).await.unwrap().into_inner();
    assert_eq!((told(&answer).1, answer.no_change_can), ("REVOKED_USER", false));
    assert!(steps(&answer)[0].contains("a new chain that begins after the revocation"), "{answer:?}");
}

#[tokio::test]
async fn the_command_explains_with_and_without_documents() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let chain = world.root("alpha", |_| {});
    let tokens: Vec<String> = chain.tokens.iter().map(|token| String::from_utf8(token.to_vec()).unwrap()).collect();
    let presentation = |tool: &str, args: &str| {
        let proof = String::from_utf8(world.proof(&chain, tool, args).to_vec()).unwrap();
        json!({ "aat_chain": tokens, "aat_pop": proof }).to_string()
    };
    let (decisions, admin, data) = (server.decisions_url(), server.admin_url(), server.data.clone());
    let explain = |tool: &str, args: &str, more: &[&str]| {
        let presentation = presentation(tool, args);
        let arguments = [&["explain", "--presentation", &presentation, "--tool", tool, "--args", args], more].concat();
        (json_run(&arguments), run(&arguments))
    };
    let (permit, _) = explain("crm/read", "{}", &["--target", &decisions]);
    assert_eq!(permit.ended(0).json()["changes"], json!([]));
    explain("pay/refund", r#"{"amount":5}"#, &["--target", &decisions]).0.ended(4);
    let (denied, human) = explain("pay/large", "{}", &["--target", &decisions]);
    let denied = denied.ended(3).json();
    assert_eq!((&denied["reason"], &denied["deciding_layer"]), (&json!("AGENT_DENIES"), &json!("agent")));
    assert!(!denied.to_string().contains("policy.yaml") && !human.stdout.contains("policy.yaml"), "{human:?}");
    for part in ["user ana of", "DENY", "LAYER", "what would have to change:", "would have to allow"] {
        assert!(human.stdout.contains(part), "{part}: {human:?}");
    }
    let (denied, human) = explain("pay/large", "{}", &["--documents", "--target", &admin, "--data", text(&data)]);
    let layers: Vec<Value> = denied.ended(3).json()["layers"].as_array().unwrap().clone();
    let agent = layers.iter().find(|layer| layer["layer"] == "agent").unwrap();
    assert_eq!(
        (&agent["document_kind"], &agent["path"], &agent["entry"]),
        (&json!("agent"), &json!("policy.yaml"), &json!("pay/large"))
    );
    assert!(human.stdout.contains("remove or narrow `deny: pay/large`") && human.stdout.contains("policy.yaml:"), "{human:?}");
    let nobody = explain("crm/read", "{}", &["--target", "http://127.0.0.1:1"]).0;
    nobody.ended(69);
    let wrong_port = explain("crm/read", "{}", &["--documents", "--target", &decisions, "--data", text(&data)]).0;
    assert_ne!(wrong_port.code, 0);
}

#[tokio::test]
async fn shadows_are_recorded_and_counted_and_decide_nothing() {
    let world = TestWorld::new();
    let shadows = format!(
        "---\n{{kind: guardrail, id: look, mode: shadow, tools: [crm/look], forbid_when: 'true'}}\n---\n{{kind: agent, id: {}, mode: shadow, applications: [portal], acts_for: [staff], allow: [crm/look]}}\n",
        agent_id("gamma")
    );
    world.write_policy(&(world.policy() + &shadows));
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let (alpha, gamma) = (world.root("alpha", |_| {}), world.root("gamma", |_| {}));
    for _ in 0..3 {
        let answer = client.check(request(&alpha, Bytes::new(), "crm/look", "{}")).await.unwrap().into_inner();
        assert_eq!(answer.effect(), wire::Effect::Permit, "{answer:?}");
    }
    let narrowed = client.check(world.call(&gamma, "crm/write", "{}")).await.unwrap().into_inner();
    assert_eq!(narrowed.effect(), wire::Effect::Permit, "{narrowed:?}");
    client.check(world.call(&alpha, "crm/write", "{}")).await.unwrap();
    client.check(request(&alpha, Bytes::new(), "no/such", "{}")).await.unwrap();
    let lines = server.audit();
    let recorded = lines.iter().find(|line| line["decision_id"] == json!(narrowed.decision_id)).unwrap();
    assert_eq!(recorded["effect"], "PERMIT");
    let would_be = &recorded["would_be"];
    assert_eq!(
        (&would_be["effect"], &would_be["reason"], &would_be["deciding_layer"]),
        (&json!("DENY"), &json!("AGENT_DENIES"), &json!("agent"))
    );
    assert_eq!(would_be["matched"]["id"], json!(agent_id("gamma")));

    let (target, data) = (server.admin_url(), server.data.clone());
    let report = json_run(&["policy", "shadow-report", "--target", &target, "--data", text(&data)]).ended(0).json();
    let flips: Vec<_> = report["flips"]
        .as_array()
        .unwrap()
        .iter()
        .map(|flip| {
            (
                flip["agent"].as_str().unwrap(),
                flip["tool"].as_str().unwrap(),
                flip["effect"].as_str().unwrap(),
                flip["would_be_effect"].as_str().unwrap(),
                flip["count"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        flips,
        [
            (agent_id("alpha").as_str(), "crm/look", "PERMIT", "DENY", 3),
            (agent_id("gamma").as_str(), "crm/write", "PERMIT", "DENY", 1)
        ]
    );
    assert_eq!(
        (&report["decisions"], &report["flips_uncounted"]),
        (&json!(5), &json!(0)),
        "the call without a proof never came to policy"
    );
    assert_eq!(report["flips"][1]["last_decision_id"], json!(narrowed.decision_id));
    let human = run(&["policy", "shadow-report", "--target", &target, "--data", text(&data)]).ended(0).stdout;
    assert!(human.contains("WOULD BE") && human.contains("GUARDRAIL_DENIES"), "{human}");
    let page = server.get("/metrics").1;
    let series =
        |name: &str, tool: &str| page.lines().find(|line| line.starts_with(name) && line.contains(tool)).map(str::to_owned);
    let flips = series("portcullis_shadow_flips_total{", "crm/look").unwrap_or_else(|| panic!("{page}"));
    assert!(flips.contains(&agent_id("alpha")) && flips.contains("would_be=\"DENY\"") && flips.ends_with(" 3"), "{flips}");
    assert!(series("portcullis_shadow_decisions_total{", "crm/write").is_some() && !page.contains("no/such"), "{page}");
}

#[test]
fn without_shadows_nothing_of_them_is_recorded() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = server.connect().await;
        client.check(world.call(&world.root("alpha", |_| {}), "crm/read", "{}")).await.unwrap();
    });
    assert!(server.audit().iter().all(|line| line.get("would_be").is_none()));
}

/// The example's agents with keys, and its issuer with a key that the test holds.
fn four_agents(issuer: &PrivateKey, agents: &BTreeMap<&'static str, PrivateKey>) -> TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/policies/four-agents");
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let mut text = std::fs::read_to_string(&path).unwrap();
        if path.ends_with("agents.yaml") {
            text = text.lines().filter(|line| !line.starts_with("keys:")).map(|line| format!("{line}\n")).collect();
            for (name, key) in agents {
                let id = format!("kind: agent\nid: spiffe://acme.example/agent/{name}\n");
                assert!(text.contains(&id), "{name}");
                text = text.replace(&id, &format!("{id}keys: [{}]\n", key.public_key().thumbprint()));
            }
        }
        if path.ends_with("identities.yaml") {
            let mut key = jwk(issuer);
            key["kid"] = json!("main");
            let (before, rest) = text.split_once("keys: {jwks:").unwrap();
            text = format!("{before}keys: {{jwks: {{keys: [{key}]}}}}{}", &rest[rest.find('\n').unwrap()..]);
        }
        std::fs::write(folder.path().join(path.file_name().unwrap()), text).unwrap();
    }
    folder
}

#[tokio::test]
async fn the_tools_listed_for_the_four_agents_are_those_that_check_permits() {
    let names = ["sales-assistant", "proposal-writer", "support", "devops", "finance", "scheduling-assistant"];
    let agents: BTreeMap<&'static str, PrivateKey> =
        names.into_iter().map(|name| (name, PrivateKey::generate().unwrap())).collect();
    let issuer = PrivateKey::generate().unwrap();
    let policies = four_agents(&issuer, &agents);
    let world = TestWorld::new();
    run(&["policy", "check", text(policies.path())]).ended(0);
    let server = ServerProcess::start_with(&world, binary().arg("--policies").arg(policies.path()));
    let mut client = server.connect().await;
    let listed = |agent: &str, tokens: &[Bytes]| {
        let nothing = parse_object(b"{}").unwrap();
        let call = ProofCall {
            tool: portcullis::service::request::LIST_TOOLS,
            arguments: &nothing,
            audience: Some("https://gateway.acme.example"),
        };
        let proof = issue::sign_proof(&agents[agent], tokens, &call, None, now(3)).unwrap();
        wire::ListToolsRequest {
            credential: Some(wire::list_tools_request::Credential::Presentation(wire::Presentation {
                aat_chain: tokens.to_vec(),
                aat_pop: proof.into(),
            })),
            ..Default::default()
        }
    };
    let claims = |agent: &str, user_groups: &[&str], application: &str, tools: &[String]| {
        let tools: serde_json::Map<String, Value> = tools.iter().map(|tool| (tool.clone(), json!({}))).collect();
        let id = format!("spiffe://acme.example/agent/{agent}");
        json!({
            "iss": "https://login.acme.example", "aud": "https://gateway.acme.example", "sub": "ana", "sub_profile": "user",
            "groups": user_groups, "client_id": application, "act": { "iss": "https://login.acme.example", "sub": id },
            "sid": "s", "txn": "t", "exp": now(0).unix_s() + 3600, "cnf": { "jwk": jwk(&agents[agent]) }, "del_max_depth": 4,
            "authorization_details": [{ "type": "attenuating_agent_token", "tools": tools }],
        })
    };
    let root = |agent: &str, group: &str, application: &str, tools: &[String]| -> Vec<Bytes> {
        let claims = claims(agent, &[group], application, tools).to_string();
        vec![issue::issue_root(&issuer, &claims, now(0)).unwrap().into()]
    };
    // Every registered tool is named. A chain that grants nothing gets a denial for each, with its name.
    let nothing = root("support", "support", "helpdesk", &["tickets/reply".to_owned()]);
    let all: Vec<String> = client
        .list_tools(listed("support", &nothing))
        .await
        .unwrap()
        .into_inner()
        .tools
        .into_iter()
        .map(|tool| tool.tool)
        .collect();
    assert!(all.len() > 20, "{all:?}");
    let mut chains: Vec<(&str, Vec<Bytes>)> = [
        ("sales-assistant", "sales", "crm-portal"),
        ("support", "support", "helpdesk"),
        ("devops", "devops", "ops-console"),
        ("finance", "ap", "erp"),
        ("scheduling-assistant", "ap", "calendar"),
        ("finance", "ap", "helpdesk"),
    ]
    .into_iter()
    .map(|(agent, group, application)| (agent, root(agent, group, application, &all)))
    .collect();
    let parent = chains[0].1.clone();
    let mut hop = claims("proposal-writer", &[], "", &all);
    for root_only in ["iss", "aud", "sub", "sub_profile", "groups", "client_id", "sid", "txn"] {
        hop.as_object_mut().unwrap().remove(root_only);
    }
    hop["exp"] = json!(now(0).unix_s() + 1800);
    hop["del_max_depth"] = json!(1);
    let hop = issue::issue_hop(&agents["sales-assistant"], &parent, &hop.to_string(), now(0)).unwrap();
    chains.push(("proposal-writer", parent.into_iter().chain([hop.into()]).collect()));
    let rank = |effect: wire::Effect| match effect {
        wire::Effect::Permit => 2,
        wire::Effect::NeedsApproval => 1,
        _ => 0,
    };
    let (mut sure, mut permitted) = (0, 0);
    for (agent, tokens) in &chains {
        for tool in client.list_tools(listed(agent, tokens)).await.unwrap().into_inner().tools {
            for args in ["{}", r#"{"amount":90,"currency":"EUR"}"#, r#"{"amount":700}"#, r#"{"discount":12}"#] {
                let arguments = parse_object(args.as_bytes()).unwrap();
                let call = ProofCall { tool: &tool.tool, arguments: &arguments, audience: Some("https://gateway.acme.example") };
                let proof = issue::sign_proof(&agents[agent], tokens, &call, None, now(3)).unwrap();
                let chain = TestChain { tokens: tokens.clone(), holder: agent };
                let answer = client.check(request(&chain, proof.into(), &tool.tool, args)).await.unwrap().into_inner();
                let (listed, got) = (tool.effect(), answer.effect());
                assert!(rank(got) <= rank(listed), "{agent} {} {args}: {tool:?} {answer:?}", tool.tool);
                assert!(tool.maybe || got == listed, "{agent} {} {args}: {tool:?} {answer:?}", tool.tool);
                sure += usize::from(!tool.maybe);
                permitted += usize::from(got == wire::Effect::Permit);
            }
        }
    }
    assert!(sure > 300 && permitted > 30, "{sure} {permitted}");
}
