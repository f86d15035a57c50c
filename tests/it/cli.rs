//! A user's whole walkthrough by commands only, with every exit code on the way.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::external_suites;
use crate::harness::{AUDIENCE, CommandResult, ISSUER, PATIENCE, ServerProcess, TestWorld, agent_id, binary, jwk, run, run_with};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn keys_of(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// The binary with JSON output.
fn json_run(arguments: &[&str]) -> CommandResult {
    run_with(binary().arg("--json").args(arguments), "")
}

#[test]
fn a_key_is_private_and_never_overwritten() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.jwk");
    let made = run(&["token", "keygen", "--out", text(&path)]).ended(0).json();
    assert_eq!(keys_of(&made), ["jwk", "thumbprint"]);
    assert_eq!(keys_of(&made["jwk"]), ["crv", "kty", "x"]);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let content = std::fs::read_to_string(&path).unwrap();
    let again = run(&["token", "keygen", "--out", text(&path)]).ended(1);
    assert!(again.stderr.contains("--out") && again.stderr.contains("agent.jwk"), "{again:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    let private: Value = serde_json::from_str(&content).unwrap();
    assert_eq!(private["x"], made["jwk"]["x"]);
    assert!(!made.to_string().contains(private["d"].as_str().unwrap()));
}

/// A test world, with the files that the token commands made in it.
struct WalkthroughFixture {
    world: TestWorld,
    chain: String,
}

impl WalkthroughFixture {
    fn new() -> Self {
        let world = TestWorld::new();
        let issued = |claims: &Value| {
            let (key, claims) = (world.key_file("issuer"), claims.to_string());
            let arguments = ["token", "issue", "--key", text(&key), "--claims", &claims];
            run(&arguments).ended(0).stdout.trim().to_owned()
        };
        let root = issued(&world.root_claims("alpha"));
        let parent = world.folder.path().join("parent.txt");
        std::fs::write(&parent, &root).unwrap();
        let claims = world.folder.path().join("hop.json");
        std::fs::write(&claims, world.hop_claims("beta", &["crm/read", "crm/write"]).to_string()).unwrap();
        let key = world.key_file("alpha");
        let arguments = ["token", "delegate", "--key", text(&key), "--parent", text(&parent), "--claims", text(&claims)];
        let hop = run(&arguments).ended(0).stdout.trim().to_owned();
        let chain = json!({ "aat_chain": [root, hop] }).to_string();
        Self { world, chain }
    }

    /// The chain to beta with a proof for a call.
    fn presentation(&self, tool: &str, args: &str) -> String {
        let key = self.world.key_file("beta");
        let arguments = [
            "token",
            "prove",
            "--key",
            text(&key),
            "--chain",
            &self.chain,
            "--tool",
            tool,
            "--args",
            args,
            "--audience",
            AUDIENCE,
        ];
        let proof = run(&arguments).ended(0).stdout.trim().to_owned();
        let mut presentation: Value = serde_json::from_str(&self.chain).unwrap();
        presentation["aat_pop"] = json!(proof);
        presentation.to_string()
    }

    fn verify(&self, tool: &str, args: &str, presentation: &str) -> CommandResult {
        let trust = self.world.policies();
        let arguments = ["token", "verify", "--trust", text(&trust), "--audience", AUDIENCE, "--tool", tool, "--args", args];
        run(&[&arguments[..], &[presentation]].concat())
    }

    /// Runs `check`, and repeats it with a new proof if the proof came from the second in which the server became ready.
    fn check(&self, server: &ServerProcess, tool: &str, args: &str) -> CommandResult {
        let until = Instant::now() + PATIENCE;
        loop {
            let target = server.decisions_url();
            let presentation = self.presentation(tool, args);
            let arguments = [
                "check",
                "--presentation",
                &presentation,
                "--tool",
                tool,
                "--args",
                args,
                "--audience",
                AUDIENCE,
                "--target",
                &target,
            ];
            let ran = json_run(&arguments);
            if ran.json()["reason"] != "PROOF_STALE" {
                return ran;
            }
            assert!(Instant::now() < until, "{ran:?}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

#[test]
fn tokens_are_made_inspected_and_verified() {
    let walk = WalkthroughFixture::new();
    let issued = json_run(&[
        "token",
        "issue",
        "--key",
        text(&walk.world.key_file("issuer")),
        "--claims",
        &walk.world.root_claims("alpha").to_string(),
    ]);
    assert_eq!(keys_of(&issued.ended(0).json()), ["jws"]);
    let inspected = json_run(&["token", "inspect", &walk.chain]).ended(0).json();
    let sentence = inspected["sentence"].as_str().unwrap();
    for part in ["ana", &agent_id("alpha"), &agent_id("beta"), "portal"] {
        assert!(sentence.contains(part), "{sentence}");
    }
    assert_eq!((&inspected["verified"], &inspected["has_proof"]), (&json!(false), &json!(false)));
    let holder = walk.world.key("beta").public_key().thumbprint().to_string();
    assert_eq!(inspected["tokens"][1]["holder_thumbprint"], json!(holder));
    let shown = run(&["token", "inspect", &walk.chain]).ended(0).stdout;
    assert!(shown.contains("nothing of this was verified") && shown.contains(&holder), "{shown}");

    let presentation = walk.presentation("crm/read", r#"{"id":7}"#);
    let permit = walk.verify("crm/read", r#"{"id":7}"#, &presentation).ended(0).json();
    assert_eq!(keys_of(&permit), ["hop", "message", "reason", "verdict"]);
    assert_eq!((&permit["verdict"], &permit["reason"], &permit["hop"]), (&json!("PERMIT"), &json!("OK"), &Value::Null));
    for (tool, args, reason) in [("crm/read", r#"{"id":8}"#, "PROOF_INVALID"), ("crm/write", r#"{"id":7}"#, "PROOF_INVALID")] {
        let denied = walk.verify(tool, args, &presentation).ended(3).json();
        assert_eq!((&denied["verdict"], &denied["reason"]), (&json!("DENY"), &json!(reason)));
    }
    let not_granted = walk.presentation("crm/look", "{}");
    let denied = walk.verify("crm/look", "{}", &not_granted).ended(3).json();
    assert_eq!((&denied["reason"], &denied["hop"]), (&json!("TOOL_NOT_GRANTED"), &json!(1)));
    let malformed = walk.verify("crm/read", "{}", "{\"aat_chain\":17}").ended(3).json();
    assert_eq!(malformed["reason"], "TOKEN_MALFORMED");

    // The same from standard input, and from a file with one token a line.
    let trust = walk.world.policies();
    let arguments = ["token", "verify", "--trust", text(&trust), "--audience", AUDIENCE, "--tool", "crm/read"];
    let piped = run_with(binary().args(arguments).args(["--args", r#"{"id":7}"#, "-"]), &presentation).ended(0);
    assert_eq!(piped.json(), permit);
    let file = walk.world.folder.path().join("p.json");
    std::fs::write(&file, &presentation).unwrap();
    assert_eq!(walk.verify("crm/read", r#"{"id":7}"#, text(&file)).ended(0).json(), permit);
}

#[test]
fn the_whole_walk_by_commands() {
    let walk = WalkthroughFixture::new();
    let server = ServerProcess::start(&walk.world);
    let permit = walk.check(&server, "crm/read", r#"{"id":7}"#).ended(0).json();
    let names = "approval deciding_layer decision_id effect message obligations principals reason request_id revision \
                 snapshot_age_ms valid_for_ms";
    assert_eq!(keys_of(&permit).join(" "), names);
    assert_eq!((&permit["effect"], &permit["reason"], &permit["deciding_layer"]), (&json!("PERMIT"), &json!("OK"), &json!("")));
    let who = |id: &str| json!({ "id": id, "evidence": "VERIFIED" });
    assert_eq!(
        permit["principals"],
        json!({
            "user": who(&format!("[\"{ISSUER}\",\"ana\"]")), "application": who("portal"),
            "agents": [who(&agent_id("alpha")), who(&agent_id("beta"))],
            "tool": who("crm/read"), "session": who("s-1"), "task": who("t-1"),
        })
    );
    let written = walk.check(&server, "crm/write", "{}").ended(0).json();
    assert_eq!(written["effect"], "PERMIT");
    let denied = walk.check(&server, "pay/large", "{}").ended(3).json();
    assert_eq!((&denied["effect"], &denied["deciding_layer"]), (&json!("DENY"), &json!("agent")));
    let human = run(&[
        "check",
        "--presentation",
        &walk.presentation("crm/read", "{}"),
        "--tool",
        "crm/read",
        "--target",
        &server.decisions_url(),
    ]);
    assert!(human.ended(0).stdout.starts_with("PERMIT  OK"));

    let tools = |extra: &[&str]| {
        let target = server.decisions_url();
        json_run(&[&["tools", "--presentation", &walk.chain, "--target", &target][..], extra].concat()).ended(0).json()
    };
    let key = walk.world.key_file("beta");
    let all = tools(&["--key", text(&key)]);
    assert_eq!(all["tools"].as_array().unwrap().len(), 8);
    let one = tools(&["--key", text(&key), "--tool", "crm/read"]);
    assert_eq!(one["tools"], json!([{ "tool": "crm/read", "effect": "PERMIT", "reason": "OK", "maybe": false }]));
    let names = tools(&[]);
    let named = |tool: &str| json!({ "tool": tool, "effect": null, "reason": null, "maybe": true });
    assert_eq!((&names["tools"], &names["names_only"]), (&json!([named("crm/read"), named("crm/write")]), &json!(true)));
    // The presentation may hold a proof of the listing. A proof of another call is not sent.
    let target = server.decisions_url();
    for (tool, names_only) in [("portcullis/list_tools", false), ("crm/read", true)] {
        let presentation = walk.presentation(tool, "{}");
        let listed = json_run(&["tools", "--presentation", &presentation, "--target", &target]).ended(0).json();
        assert_eq!(listed["names_only"], json!(names_only), "{tool}");
    }
    // A key also makes the proof of a call.
    let written =
        json_run(&["check", "--presentation", &walk.chain, "--key", text(&key), "--tool", "crm/write", "--target", &target]);
    assert_eq!(written.ended(0).json()["effect"], "PERMIT");
}

#[test]
fn what_needs_an_approval_exits_4() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let chain = world.session("alpha", "s");
    let presentation = json!({
        "aat_chain": [std::str::from_utf8(&chain.tokens[0]).unwrap()],
        "aat_pop": std::str::from_utf8(&world.proof(&chain, "pay/refund", r#"{"amount":90}"#)).unwrap(),
    });
    let (presentation, target) = (presentation.to_string(), server.decisions_url());
    let arguments =
        ["check", "--presentation", &presentation, "--tool", "pay/refund", "--args", r#"{"amount":90}"#, "--target", &target];
    let asked = json_run(&arguments).ended(4).json();
    assert_eq!((&asked["effect"], &asked["reason"]), (&json!("NEEDS_APPROVAL"), &json!("APPROVAL_REQUIRED")));
    assert_eq!(keys_of(&asked["approval"]), ["approvers", "digest", "expires_at_unix_ms"]);
    assert_eq!(asked["approval"]["approvers"], json!(["leads"]));
    assert!(run(&arguments).ended(4).stdout.contains("approval"));
}

#[test]
fn the_kill_switch_by_commands() {
    let walk = WalkthroughFixture::new();
    let server = ServerProcess::start(&walk.world);
    let (data, url) = (walk.world.data(), server.admin_url());
    let admin = |arguments: &[&str]| json_run(&[arguments, &["--data", text(&data), "--target", &url]].concat());
    let reason = |expected: &str, code: i32| {
        let until = Instant::now() + PATIENCE;
        loop {
            let ran = walk.check(&server, "crm/read", "{}");
            if ran.json()["reason"] == expected {
                return assert_eq!(ran.code, code);
            }
            assert!(Instant::now() < until, "not {expected}: {ran:?}");
        }
    };
    reason("OK", 0);
    let revoked = admin(&["revoke", "agent", &agent_id("beta"), "--reason", "leaked"]).ended(0).json();
    assert_eq!(revoked["target"], json!({ "kind": "agent", "key": [agent_id("beta")] }));
    assert!(revoked["revision"].as_str().unwrap().contains('.') && revoked["committed_at_unix_ms"].as_i64().unwrap() > 0);
    reason("AGENT_SUSPENDED", 3);
    admin(&["reinstate", "agent", &agent_id("beta"), "--reason", "new key"]).ended(0);
    reason("OK", 0);
    admin(&["revoke", "all", "--reason", "drill"]).ended(0);
    reason("REVOKED_ALL", 3);
    admin(&["reinstate", "all"]).ended(0);
    reason("OK", 0);
    let inspected = json_run(&["token", "inspect", &walk.chain]).ended(0).json();
    let jti = inspected["tokens"][0]["claims"]["jti"].as_str().unwrap().to_owned();
    admin(&["revoke", "token", &jti]).ended(0);
    reason("REVOKED_TOKEN", 3);
    let dead = admin(&["reinstate", "token", &jti]).ended(64);
    assert!(dead.stderr.contains("dead"), "{dead:?}");
    admin(&["revoke", "session", "s-1"]).ended(0);
    let listed = admin(&["revocations"]).ended(0).json();
    assert_eq!(listed["total"], 4);
    assert_eq!(listed["revocations"][0]["target"], json!({ "kind": "session", "key": ["s-1"] }));
    let last = &listed["revocations"][3];
    let keys = ["committed_at_unix_ms", "dead", "operators", "reason", "revision", "suspended", "target", "watermark_unix_s"];
    assert_eq!(keys_of(last), keys);
    assert_eq!(last["operators"], json!(["local"]));
    let shown = run(&["revocations", "--data", text(&data), "--target", &url]).ended(0);
    assert!(shown.stdout.contains("4 of 4") && shown.stdout.contains("session"), "{shown:?}");
    let wrong = admin(&["revoke", "key", "short"]).ended(64);
    assert!(wrong.stderr.contains("token inspect"), "{wrong:?}");
    // The answer says until when roots are void, which is later than now by the accepted skew.
    let now_s = crate::harness::now(0).unix_s();
    let void = admin(&["revoke", "agent", &agent_id("beta"), "--watermark"]).ended(0).json();
    assert!(void["watermark_unix_s"].as_i64().unwrap() >= now_s, "{void}");
    assert_eq!(void["watermark_unix_s"], admin(&["revocations"]).ended(0).json()["revocations"][0]["watermark_unix_s"]);
    let shown =
        run(&["revoke", "agent", &agent_id("beta"), "--watermark", "--data", text(&data), "--target", &url]).ended(0).stdout;
    assert!(shown.contains("every root issued until ") && shown.contains(" is void"), "{shown}");
    for limit in ["0", "1001"] {
        admin(&["revocations", "--limit", limit]).ended(64);
        admin(&["approvals", "--limit", limit]).ended(64);
    }
}

/// The addresses of the ready line do as targets.
#[test]
fn a_target_needs_no_scheme() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let data = world.data();
    let of_admin = ["--data", text(&data), "--target", &server.admin];
    run(&[&["revocations"][..], &of_admin].concat()).ended(0);
    let killed = run(&[&["revoke", "agent", &agent_id("alpha"), "--wait", "fleet"][..], &of_admin].concat()).ended(0);
    assert!(killed.stdout.contains("1 of 1 replicas deny"), "{killed:?}");
    let chain = world.session("gamma", "s");
    let presentation = json!({ "aat_chain": [std::str::from_utf8(&chain.tokens[0]).unwrap()] }).to_string();
    let asked = ["check", "--presentation", &presentation, "--tool", "crm/look", "--target", &server.decisions];
    assert_eq!(json_run(&asked).ended(0).json()["reason"], "OK");
    run(&["tools", "--presentation", &presentation, "--target", &server.decisions]).ended(0);
}

#[test]
fn a_policy_is_checked_and_applied() {
    let world = TestWorld::new();
    let policies = world.policies();
    let server = ServerProcess::start(&world);
    let (data, url) = (world.data(), server.admin_url());
    let checked = json_run(&["policy", "check", text(&policies)]).ended(0).json();
    assert_eq!(keys_of(&checked), ["diagnostics", "documents", "errors", "warnings"]);
    assert_eq!(checked["errors"], 0);
    let apply = |json: bool, extra: &[&str]| {
        let fixed = ["policy", "apply", text(&policies), "--data", text(&data), "--target", &url];
        let arguments = [&fixed[..], extra].concat();
        if json { json_run(&arguments) } else { run(&arguments) }
    };
    assert_eq!(apply(true, &[]).ended(0).json()["changes"], json!([]));
    assert!(apply(false, &[]).ended(0).stdout.contains("nothing changes"));

    world.write_policy(&world.policy().replace("{kind: application, id: kiosk", "{kind: application, id: booth"));
    let dry = apply(true, &["--dry-run"]).ended(0).json();
    let expected = json!([
        { "change": "removed", "kind": "application", "id": "kiosk" },
        { "change": "added", "kind": "application", "id": "booth" },
    ]);
    assert_eq!((&dry["changes"], &dry["dry_run"]), (&expected, &json!(true)));
    let applied = apply(true, &[]).ended(0).json();
    assert_eq!(applied["changes"], expected);
    assert_ne!(applied["revision"], dry["revision"]);

    std::fs::write(policies.join("bad.yaml"), "kind: application\nid: x\nallow: [cmr/read]\nalow: []\n").unwrap();
    let bad = run(&["policy", "check", text(&policies)]).ended(1);
    let expected = "\
bad.yaml:4:1: error: unknown key `alow`
  |
4 | alow: []
  | ^^^^
  = help: did you mean `allow`?
";
    assert!(bad.stdout.contains(expected), "{bad:?}");
    let refused = apply(false, &[]).ended(1);
    assert!(refused.stderr.contains("nothing was applied") && refused.stderr.contains(expected.trim_end()), "{refused:?}");
    let bad = json_run(&["policy", "check", text(&policies)]).ended(1).json();
    assert_eq!(keys_of(&bad["diagnostics"][0]), ["column", "end_column", "help", "line", "message", "path", "severity"]);
    std::fs::remove_file(policies.join("bad.yaml")).unwrap();
    assert_eq!(apply(true, &[]).ended(0).json()["revision"], applied["revision"]);
}

#[test]
fn the_schema_is_printed_for_editors() {
    let schema = run(&["policy", "schema"]).ended(0).json();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(run(&["policy", "schema", "--json"]).ended(0).json(), schema);
}

/// Every example passes the check that a newcomer would run.
#[test]
fn the_examples_are_checked_without_a_word() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/policies");
    for name in ["coding-agents", "customer-support", "four-agents", "research-team"] {
        let checked = json_run(&["policy", "check", text(&folder.join(name))]).ended(0).json();
        assert_eq!(checked["diagnostics"], json!([]), "{name}");
    }
}

#[test]
fn an_act_of_two_people_takes_two_keys() {
    let world = TestWorld::new();
    let (second, data) = (world.key_file("stranger"), world.data());
    let admin = format!("---\n{{kind: operator, id: admin, keys: [{}], roles: [administer]}}\n", jwk(world.key("stranger")));
    world.write_policy(&(world.policy() + &admin));
    let server = ServerProcess::start(&world);
    let (url, policies, local) = (server.admin_url(), world.policies(), data.join("local.jwk"));
    let issuer = format!("---\n{{kind: issuer, id: \"https://new\", keys: {{jwks: {{keys: [{}]}}}}}}\n", jwk(world.key("gamma")));
    world.write_policy(&(world.policy() + &admin + &issuer));
    let apply = ["policy", "apply", text(&policies), "--target", &url];
    let alone = run(&[&apply[..], &["--data", text(&data)]].concat()).ended(1);
    assert!(alone.stderr.contains("--operator-key"), "{alone:?}");
    let both = ["--operator-key", text(&local), "--operator-key", text(&second)];
    let done = json_run(&[&apply[..], &both].concat()).ended(0).json();
    assert_eq!(done["changes"], json!([{ "change": "added", "kind": "issuer", "id": "https://new" }]));

    // A key from the environment; a key without the role; and an unknown key.
    let listed = |key: &Path| run_with(binary().args(["revocations", "--target", &url]).env("PORTCULLIS_OPERATOR_KEY", key), "");
    listed(&second).ended(0);
    let mut kill = binary();
    kill.args(["revoke", "all", "--target", &url]).env("PORTCULLIS_OPERATOR_KEY", &second);
    assert!(run_with(&mut kill, "").ended(1).stderr.contains("respond"));
    assert!(listed(&world.key_file("alpha")).ended(1).stderr.contains("no operator has the key"));
}

#[test]
fn the_store_is_administered_without_a_server() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    server.terminate();
    assert!(server.wait().success());
    let data = world.data();
    let store = format!("sqlite:{}", text(&data.join("store.db")));
    let admin = |arguments: &[&str]| json_run(&[arguments, &["--data", text(&data), "--store", &store]].concat());
    admin(&["revoke", "agent", &agent_id("alpha")]).ended(0);
    assert_eq!(admin(&["revocations"]).ended(0).json()["total"], 1);
    let policies = world.policies();
    assert_eq!(admin(&["policy", "apply", text(&policies)]).ended(0).json()["changes"], json!([]));
    let lines = crate::harness::audit_lines(&data);
    let act = lines.iter().find(|line| line["node"] == "command-line" && line["method"].as_str().unwrap().ends_with("/Revoke"));
    assert_eq!(act.unwrap()["operator"], "local");

    let server = ServerProcess::start(&world);
    let walk = world.session("alpha", "s");
    let presentation = json!({ "aat_chain": [std::str::from_utf8(&walk.tokens[0]).unwrap()] }).to_string();
    let target = server.decisions_url();
    let ran = json_run(&["check", "--presentation", &presentation, "--tool", "crm/look", "--target", &target]).ended(3);
    assert_eq!(ran.json()["reason"], "AGENT_SUSPENDED");
    // The running server sees a write that a command made to its store.
    admin(&["reinstate", "agent", &agent_id("alpha")]).ended(0);
    let until = Instant::now() + PATIENCE;
    while json_run(&["check", "--presentation", &presentation, "--tool", "crm/look", "--target", &target]).code != 0 {
        assert!(Instant::now() < until, "the server does not see what the command line wrote");
    }
}

/// The store keeps every act. A data folder that takes no records therefore does not prevent a revocation.
#[test]
fn a_kill_is_done_where_no_audit_log_can_be_written() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    server.terminate();
    assert!(server.wait().success());
    let data = world.data();
    let store = format!("sqlite:{}", text(&data.join("store.db")));
    let admin = |arguments: &[&str]| run(&[arguments, &["--data", text(&data), "--store", &store]].concat());
    let (folder, aside) = (data.join("audit"), data.join("audit.aside"));
    std::fs::rename(&folder, &aside).unwrap();
    std::fs::write(&folder, "no folder").unwrap();
    let killed = admin(&["revoke", "agent", &agent_id("alpha")]).ended(0);
    assert!(killed.stdout.starts_with("revoked agent "), "{killed:?}");
    assert!(killed.stderr.starts_with("warning: it was done, and the store keeps the signed act; but "), "{killed:?}");
    let again = admin(&["--json", "revoke", "agent", &agent_id("alpha")]).ended(0);
    assert_eq!(again.json()["recorded"], json!(false), "{again:?}");
    let read = admin(&["revocations"]).ended(69);
    assert!(read.stderr.contains("nothing was done or answered: make room"), "{read:?}");
    let refused = admin(&["reinstate", "agent", &agent_id("beta")]).ended(1);
    assert!(refused.stderr.starts_with("error: not done: "), "{refused:?}");
    assert!(refused.stderr.contains("; this answer is not in the audit log"), "{refused:?}");

    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&aside, &folder).unwrap();
    assert_eq!(admin(&["--json", "revoke", "agent", &agent_id("alpha")]).ended(0).json()["recorded"], json!(true));
    let listed = admin(&["revocations"]).ended(0);
    assert!(listed.stdout.contains("alpha") && listed.stdout.contains("1 of 1") && listed.stderr.is_empty(), "{listed:?}");
}

#[test]
fn misuse_exits_64_and_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let missing = text(&missing);
    for (arguments, says) in [
        (&["nonsense"][..], "unrecognized subcommand"),
        (&["check"], "--presentation"),
        (&["revoke", "agent"], "<ID>"),
        (&["revoke", "planet", "x"], "unrecognized subcommand"),
        (&["revoke", "agent", "x", "--suspend", "--watermark"], "cannot be used with"),
        (&["check", "--presentation", missing, "--tool", "a/b"], "cannot read"),
        (&["check", "--presentation", "{\"aat_chain\":[\"x\"]}", "--tool", "a/b", "--target", "not a url"], "--target"),
        (
            &["check", "--presentation", "{\"aat_chain\":[\"x\"]}", "--tool", "a/b", "--tool-schema-sha256", "ab"],
            "64 hexadecimal",
        ),
        (&["token", "issue", "--key", missing, "--claims", "{}"], "--key"),
        (&["token", "verify", "--trust", missing, "--tool", "a/b", "{}"], "missing"),
        (&["policy", "check", missing], "missing"),
        (&["revocations", "--data", missing], "--operator-key"),
        (&["serve", "--listen", "nowhere"], "--listen"),
    ] {
        let ran = run(arguments).ended(64);
        assert!(ran.stderr.contains(says), "{arguments:?}: {}", ran.stderr);
    }
    let world = TestWorld::new();
    let trust = world.policies();
    let args = run(&["token", "verify", "--trust", text(&trust), "--tool", "a/b", "--args", "[]", "{}"]).ended(64);
    assert!(args.stderr.contains("--args"), "{args:?}");
    let machine = json_run(&["policy", "check", missing]).ended(64);
    let error: Value = serde_json::from_str(machine.stderr.trim()).unwrap();
    assert_eq!(keys_of(&error), ["error"]);
    for help in [&["--help"][..], &["--version"], &["revoke", "--help"]] {
        run(help).ended(0);
    }
}

#[test]
fn nobody_there_exits_69_and_bad_settings_78() {
    let world = TestWorld::new();
    // A port that is bound but not listening for the whole test, so that no program listens on it.
    let held = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    held.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let target = format!("http://{}", held.local_addr().unwrap().as_socket().unwrap());
    let key = world.key_file("alpha");
    for arguments in [
        vec!["check", "--presentation", "{\"aat_chain\":[\"x\"]}", "--tool", "a/b", "--target", &target],
        vec!["tools", "--presentation", "{\"aat_chain\":[\"x\"]}", "--target", &target],
        vec!["revocations", "--operator-key", text(&key), "--target", &target],
        vec!["revoke", "all", "--operator-key", text(&key), "--target", &target],
    ] {
        let ran = run(&arguments).ended(69);
        assert!(ran.stderr.contains("portcullis serve") && ran.stderr.contains(&target), "{ran:?}");
    }
    let config = world.folder.path().join("config.yaml");
    std::fs::write(&config, "listen: 127.0.0.1:0\nlisen: 1\n").unwrap();
    let data = world.data();
    std::fs::create_dir(&data).unwrap();
    let free =
        ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data", text(&data)];
    for (flags, says) in [
        (&["--config", text(&config)][..], "config.yaml:2:1"),
        (&["--store", "mysql://x"], "sqlite:"),
        (&["--policies", "/no/such/folder"], "--policies"),
    ] {
        let ran = run(&[&["serve"][..], &free, flags].concat()).ended(78);
        assert!(ran.stderr.contains(says), "{flags:?}: {}", ran.stderr);
    }
}

#[test]
fn the_drafts_vectors_by_command() {
    let Some(folder) = external_suites::folder("vectors") else { return };
    let suite: Value = serde_json::from_slice(&std::fs::read(folder.join("aat/aat_vectors.json")).unwrap()).unwrap();
    let trust = tempfile::tempdir().unwrap();
    let params = &suite["params"];
    let documents = params["trust_anchors"].as_array().unwrap().iter().map(|anchor| {
        json!({
            "kind": "issuer", "id": anchor["iss"], "keys": { "jwks": { "keys": [anchor["jwk"]] } }, "applications": ["*"],
            "audiences": [params["audience"]], "lifetime_max": "90d", "hop_lifetime_max": "90d",
        })
        .to_string()
    });
    std::fs::write(trust.path().join("issuer.yaml"), documents.collect::<Vec<_>>().join("\n---\n")).unwrap();
    let vectors = suite["vectors"].as_array().unwrap();
    let verdict = |vector: &Value| {
        let mut command = binary();
        command.args(["token", "verify", "--registry", "off", "--audience", params["audience"].as_str().unwrap()]);
        command.arg("--trust").arg(trust.path()).arg("--now").arg(vector["now"].to_string());
        command.args(["--tool", vector["tool"].as_str().unwrap(), "--args", &vector["args"].to_string()]);
        let policy = &vector["policy"];
        if let Some(nonce) = policy["nonce"].as_str() {
            command.args(["--nonce", nonce]);
        }
        for (name, flag) in [("require_chain_aud", "--require-chain-audience"), ("require_pop_aud", "--require-proof-audience")] {
            if policy[name] == true {
                command.arg(flag);
            }
        }
        let ran = run_with(command.arg("-"), &json!({ "aat_chain": vector["chain"], "aat_pop": vector["pop"] }).to_string());
        let said = ran.json()["verdict"].as_str().unwrap().to_owned();
        assert_eq!(ran.code, if said == "PERMIT" { 0 } else { 3 }, "{ran:?}");
        (said != vector["expected"]["verdict"].as_str().unwrap()).then(|| format!("{}: {}", vector["id"], ran.stdout))
    };
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let halves =
            vectors.chunks(vectors.len().div_ceil(4)).map(|part| scope.spawn(|| part.iter().filter_map(verdict).collect()));
        let halves: Vec<std::thread::ScopedJoinHandle<'_, Vec<String>>> = halves.collect();
        halves.into_iter().flat_map(|half| half.join().unwrap()).collect()
    });
    assert_eq!((vectors.len(), wrong), (79, Vec::new()));
}

/// Keys, issuer document and chain as the documentation describes them for a newcomer: with commands and text files only.
#[test]
fn a_newcomers_keys_do() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let issuer = run(&["token", "keygen", "--out", text(&at("issuer.jwk"))]).ended(0).json();
    let agent = run(&["token", "keygen", "--out", text(&at("agent.jwk"))]).ended(0).json();
    let trust = format!(
        "kind: issuer\nid: {ISSUER}\nkeys: {{jwks: {{keys: [{}]}}}}\naudiences: [{AUDIENCE}]\napplications: [\"*\"]\n---\n\
         {{kind: agent, id: \"{}\", keys: [{}], applications: [\"*\"]}}\n---\n{{kind: tool, id: a/b, risk: read}}\n",
        issuer["jwk"],
        agent_id("new"),
        agent["thumbprint"].as_str().unwrap(),
    );
    std::fs::write(at("trust.yaml"), trust).unwrap();
    let world = TestWorld::new();
    let mut claims = world.root_claims("alpha");
    assert_ne!(jwk(world.key("alpha")), agent["jwk"]);
    claims["cnf"]["jwk"] = agent["jwk"].clone();
    claims["act"]["sub"] = json!(agent_id("new"));
    claims["authorization_details"][0]["tools"] = json!({ "a/b": {} });
    let root =
        run_with(binary().args(["token", "issue", "--key", text(&at("issuer.jwk")), "--claims", "-"]), &claims.to_string());
    std::fs::write(at("chain.txt"), root.ended(0).stdout).unwrap();
    let (key, chain) = (at("agent.jwk"), at("chain.txt"));
    let proof =
        run(&["token", "prove", "--key", text(&key), "--chain", text(&chain), "--tool", "a/b", "--audience", AUDIENCE]).ended(0);
    let chain = std::fs::read_to_string(chain).unwrap();
    let presentation = json!({ "aat_chain": [chain.trim()], "aat_pop": proof.stdout.trim() }).to_string();
    let trust = at("trust.yaml");
    let verified =
        run(&["token", "verify", "--trust", text(&trust), "--audience", AUDIENCE, "--tool", "a/b", &presentation]).ended(0);
    assert_eq!(verified.json()["verdict"], "PERMIT");
}
