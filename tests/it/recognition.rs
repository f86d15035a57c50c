//! Revocations of unknown names: a name that no document, chain or record has is revoked all the same, and the caller is warned.

use std::time::Instant;

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use portcullis::model::ids::UserId;
use serde_json::{Value, json};

use crate::harness::{
    CommandResult, ISSUER, ServerProcess, TestChain, TestWorld, agent_id, binary, channel, jwk, request, run, run_with, target,
};

/// Names in the form that identity providers use, so that a typing error resembles one name and no other.
const SESSION: &str = "session-4711-aaaa";
const TASK: &str = "task-0815-bbbb";

/// A server that saw one chain: alpha's root and beta's hop.
struct RecognitionFixture {
    world: TestWorld,
    server: ServerProcess,
    chain: TestChain,
}

impl RecognitionFixture {
    async fn new() -> Self {
        let world = TestWorld::new();
        let server = ServerProcess::start(&world);
        let root = world.root("alpha", |claims| (claims["sid"], claims["txn"]) = (json!(SESSION), json!(TASK)));
        let chain = world.hop(&root, "beta", &["crm/look"], |_| {});
        let asked = request(&chain, Bytes::new(), "crm/look", "{}");
        let answer = server.connect().await.check(asked).await.unwrap().into_inner();
        assert_eq!(answer.reason, "OK");
        Self { world, server, chain }
    }

    fn admin(&self, arguments: &[&str]) -> CommandResult {
        let mut command = binary();
        command.arg("--json").args(arguments).arg("--data").arg(self.world.data());
        run_with(command.arg("--target").arg(self.server.admin_url()), "")
    }

    /// The same command without a server, on its store.
    fn stored(&self, arguments: &[&str]) -> CommandResult {
        let store = format!("sqlite:{}", self.world.data().join("store.db").display());
        let mut command = binary();
        command.arg("--json").args(arguments).arg("--data").arg(self.world.data());
        let mut ran = run_with(command.args(["--store", &store]), "");
        // The server has ended. An act says so once its last heartbeat is old.
        let (doubts, rest): (Vec<&str>, Vec<&str>) =
            ran.stderr.lines().partition(|line| line.starts_with("warning: no server was heard to follow the store"));
        assert!(doubts.len() <= 1, "{ran:?}");
        ran.stderr = rest.join("\n");
        ran
    }

    /// `jti` and hop hash of the hop.
    fn hop(&self) -> [String; 2] {
        let tokens: Vec<&str> = self.chain.tokens.iter().map(|token| std::str::from_utf8(token).unwrap()).collect();
        let inspected = run(&["--json", "token", "inspect", &json!({ "aat_chain": tokens }).to_string()]).ended(0).json();
        let token = &inspected["tokens"][1];
        [&token["claims"]["jti"], &token["hop_hash"]].map(|value| value.as_str().unwrap_or_else(|| panic!("{token}")).to_owned())
    }

    fn thumbprint(&self, name: &str) -> String {
        self.world.key(name).public_key().thumbprint().to_string()
    }
}

/// The name with two different neighboring characters in its middle swapped.
fn slipped(name: &str) -> String {
    let mut bytes = name.as_bytes().to_vec();
    let at = (bytes.len() / 2..bytes.len() - 1).find(|at| bytes[*at] != bytes[at + 1]).unwrap();
    bytes.swap(at, at + 1);
    String::from_utf8(bytes).unwrap()
}

/// The expected report of one revocation: exit code, `known`, the nearest name, and a part of the note.
struct RecognitionCase {
    target: Vec<String>,
    nearest: Option<Vec<String>>,
    says: &'static str,
}

fn known(target: &[&str], says: &'static str) -> RecognitionCase {
    RecognitionCase { target: owned(target), nearest: None, says }
}

fn unknown(target: &[&str], nearest: &[&str], says: &'static str) -> RecognitionCase {
    RecognitionCase { target: owned(target), nearest: Some(owned(nearest)), says }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Every kind of target, with the known name and with a typing error in each of its parts.
fn cases(seen: &RecognitionFixture) -> Vec<RecognitionCase> {
    let (alpha, beta, [jti, hop]) = (agent_id("alpha"), agent_id("beta"), seen.hop());
    let (beta_key, issuer_key, nobody) = (seen.thumbprint("beta"), seen.thumbprint("issuer"), seen.thumbprint("stranger"));
    let (alhpa, wrong_issuer) = (slipped(&alpha), "https://login.tset.example");
    vec![
        known(&["agent", &alpha], ""),
        unknown(&["agent", &alhpa], &["agent", &alpha], "no document names agent"),
        unknown(&["agent", "spiffe://other.example/x"], &[], "no document names agent"),
        known(&["application", "portal"], ""),
        unknown(&["application", "protal"], &["application", "portal"], "no document names application"),
        unknown(&["application", &alpha], &["agent", &alpha], "of kind `agent`"),
        known(&["tool", "crm/read"], ""),
        known(&["tool", "lab/probe"], ""),
        unknown(&["tool", "crm/raed"], &["tool", "crm/read"], "no document names tool"),
        known(&["user", ISSUER, "ana"], ""),
        unknown(&["user", ISSUER, "anna"], &["user", ISSUER, "ana"], "no user"),
        unknown(&["user", "ana", ISSUER], &["user", ISSUER, "ana"], "the issuer comes first"),
        unknown(&["user", wrong_issuer, "ana"], &["user", ISSUER, "ana"], "no document names issuer"),
        known(&["delegation", ISSUER, "ana", &beta], ""),
        unknown(&["delegation", ISSUER, "ana", &slipped(&beta)], &["delegation", ISSUER, "ana", &beta], "names agent"),
        unknown(&["delegation", ISSUER, "anna", &beta], &["delegation", ISSUER, "ana", &beta], "no user"),
        unknown(&["delegation", wrong_issuer, "ana", &beta], &["delegation", ISSUER, "ana", &beta], "names issuer"),
        unknown(&["delegation", "ana", ISSUER, &beta], &["delegation", ISSUER, "ana", &beta], "the issuer comes first"),
        known(&["session", SESSION], ""),
        unknown(&["session", &slipped(SESSION)], &["session", SESSION], "1 chain in this server's memory"),
        unknown(&["session", TASK], &["task", TASK], "name of a task"),
        known(&["task", TASK], ""),
        unknown(&["task", &slipped(TASK)], &["task", TASK], "all records here"),
        known(&["token", &jti], ""),
        unknown(&["token", &slipped(&jti)], &["token", &jti], "no token"),
        unknown(&["token", SESSION], &["session", SESSION], "name of a session"),
        known(&["hop", &hop], ""),
        unknown(&["hop", &slipped(&hop)], &["hop", &hop], "no hop"),
        unknown(&["hop", &beta_key], &["key", &beta_key], "name of a key"),
        known(&["key", &beta_key], "it is a key of agent"),
        known(&["key", &seen.thumbprint("gamma")], "it is a key of agent"),
        known(&["key", &issuer_key], "it is a key of issuer"),
        unknown(&["key", &nobody], &[], "no document of an agent, issuer or operator lists key"),
        unknown(&["key", &slipped(&beta_key)], &["key", &beta_key], "lists key"),
        known(&["all"], ""),
    ]
}

fn as_json(words: &[String]) -> Value {
    words.split_first().map_or(Value::Null, |(kind, key)| json!({ "kind": kind, "key": key }))
}

fn check(case: &RecognitionCase, ran: CommandResult) {
    let RecognitionCase { target, nearest, says } = case;
    let ran = ran.ended(if nearest.is_some() { 2 } else { 0 });
    let said = ran.json();
    assert!(said["revision"].is_string(), "it is written all the same: {said}");
    let name = &said["name"];
    assert_eq!(name["known"], nearest.is_none(), "{target:?}: {said}");
    assert_eq!(name["nearest"], nearest.as_deref().map_or(Value::Null, as_json), "{target:?}: {said}");
    assert!(name["note"].as_str().unwrap().contains(says), "{target:?}: {said}");
    // The warning is on standard error, also for scripts, and nothing else is.
    match nearest {
        None => assert_eq!(ran.stderr, "", "{target:?}"),
        Some(nearest) => {
            let warning: Value = serde_json::from_str(ran.stderr.trim()).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
            let warning = warning["warning"].as_str().unwrap();
            assert!(warning.contains("NOTHING HAS THAT NAME") && warning.contains(says), "{warning}");
            assert_eq!(warning.contains("did you mean"), !nearest.is_empty(), "{warning}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_of_nobody_is_written_and_told() {
    let seen = RecognitionFixture::new().await;
    let cases = cases(&seen);
    for case in &cases {
        let words: Vec<&str> = ["revoke"].into_iter().chain(case.target.iter().map(String::as_str)).collect();
        check(case, seen.admin(&words));
    }
    let listed = seen.admin(&["revocations", "--limit", "1000"]).ended(0).json();
    let unknown = cases.iter().filter(|case| case.nearest.is_some());
    for case in unknown {
        let rows = listed["revocations"].as_array().unwrap();
        assert!(rows.iter().any(|row| row["target"] == as_json(&case.target)), "{:?} is written", case.target);
    }

    // The name is meant for later; this is the output for people.
    let later = ["revoke", "agent", "spiffe://test.example/agent/next", "--unknown-ok"];
    assert_eq!(seen.admin(&later).ended(0).json()["name"]["known"], false);
    let mut command = binary();
    command.args(["revoke", "tool", "crm/raed", "--reason", "INC-1", "--wait", "fleet"]);
    let shown = run_with(command.arg("--data").arg(seen.world.data()).arg("--target").arg(seen.server.admin_url()), "").ended(2);
    assert!(shown.stderr.contains("NOTHING HAS THAT NAME: no document names tool `crm/raed`"), "{shown:?}");
    let meant = "did you mean:  portcullis revoke tool crm/read --reason INC-1 --wait fleet --data ";
    assert!(shown.stderr.contains(meant), "{shown:?}");
    assert!(shown.stdout.contains("1 of 1 replicas would deny it, and nothing bears that name"), "{shown:?}");
    assert!(!shown.stdout.contains("replicas deny"), "{shown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_names_are_looked_up_in_store_and_records() {
    let mut seen = RecognitionFixture::new().await;
    let cases = cases(&seen);
    seen.server.terminate();
    assert!(seen.server.wait().success());
    // The audit records contain the names that otherwise only the server's memory would know.
    for case in cases.iter().filter(|case| case.says != "1 chain in this server's memory") {
        let words: Vec<&str> = ["revoke"].into_iter().chain(case.target.iter().map(String::as_str)).collect();
        check(case, seen.stored(&words));
    }
    // Without records nobody can know the name. The command says so, and the revocation succeeds.
    std::fs::remove_dir_all(seen.world.data().join("audit")).unwrap();
    let ran = seen.stored(&["revoke", "session", "session-9999-zzzz"]).ended(0);
    assert_eq!(ran.json()["name"]["known"], Value::Null);
    assert!(ran.stderr.contains("nobody can say") && ran.json()["revision"].is_string(), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_name_is_refused() {
    let seen = RecognitionFixture::new().await;
    let before = seen.admin(&["revocations"]).ended(0).json();
    for (words, says) in [
        (&["tool", "crm/*"][..], "`crm/*` has a `*`"),
        (&["tool", "*"], "`revoke all`"),
        (&["tool", "crm"], "is not `server/tool`"),
        (&["tool", "crm.read"], "did you mean `tool crm/read`?"),
        (&["tool", "crm/"], "is not `server/tool`"),
        (&["agent", "*"], "spiffe://"),
        (&["agent", "spiffe://test.example/agent/*"], "has a character outside"),
        (&["application", "*"], "is a pattern"),
        (&["application", "port*"], "is a pattern"),
        (&["session", "*"], "is a pattern"),
        (&["task", "*"], "is a pattern"),
        (&["token", "*"], "is a pattern"),
        (&["user", ISSUER, "*"], "is a pattern"),
        (&["user", "*", "ana"], "is a pattern"),
        (&["delegation", ISSUER, "ana", "*"], "is a pattern"),
        (&["delegation", &agent_id("alpha"), ISSUER, "ana"], "a delegation is ISS SUB AGENT"),
        (&["key", "*"], "43 characters"),
        (&["hop", "*"], "43 characters"),
        (&["issuer-key", ISSUER, "mian"], "did you mean `main`?"),
        (&["issuer-key", "main", ISSUER], "the issuer comes first"),
        (&["issuer-key", "https://login.tset.example", "main"], "did you mean `https://login.test.example`?"),
    ] {
        let ran = seen.admin(&[&["revoke"], words].concat()).ended(64);
        let error: Value = serde_json::from_str(ran.stderr.trim()).unwrap();
        assert!(error["error"].as_str().unwrap().contains(says), "{words:?}: {error}");
    }
    assert_eq!(seen.admin(&["revocations"]).ended(0).json(), before, "nothing was written");
    // A session may have any name. One with a star in it can be revoked.
    seen.admin(&["revoke", "session", "a*b", "--unknown-ok"]).ended(0);
    seen.admin(&["revoke", "issuer-key", ISSUER, "main"]).ended(0);
}

/// One base64url text in 64 begins with a hyphen, and so may a subject or a session.
#[tokio::test(flavor = "multi_thread")]
async fn ids_may_begin_with_a_hyphen() {
    let seen = RecognitionFixture::new().await;
    let (agent, digest) = (agent_id("alpha"), format!("-{}", "A".repeat(42)));
    let twice = format!("--{}", "b".repeat(41));
    // The target, the result of revoking it, and the text when it is reinstated.
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (vec!["session", "-Xy12"], 2, "dead"),
        (vec!["session", "--xy=12"], 2, "dead"),
        (vec!["session", "-json"], 2, "dead"),
        (vec!["task", "-Xy12"], 2, "dead"),
        (vec!["token", "-Xy12"], 2, "dead"),
        (vec!["hop", &digest], 2, "dead"),
        (vec!["key", &digest], 2, "dead"),
        (vec!["key", &twice], 2, "dead"),
        (vec!["application", "-app"], 2, ""),
        (vec!["user", ISSUER, "-ana"], 2, ""),
        (vec!["user", "-iss", "-ana"], 2, ""),
        (vec!["delegation", ISSUER, "-ana", &agent], 2, ""),
        (vec!["tool", "-crm/read"], 2, ""),
        (vec!["agent", "-spiffe://a/b"], 64, "does not begin with `spiffe://`"),
        (vec!["issuer-key", ISSUER, "-main"], 64, "no key with kid"),
    ];
    for (words, code, reinstating) in &cases {
        // Options after, before and between the arguments.
        let behind = [&["revoke"], &words[..], &["--reason", "x"]].concat();
        let before = [&["revoke", "--reason", "x"], &words[..]].concat();
        let between = [&["revoke", words[0], "--reason", "x"], &words[1..]].concat();
        for line in [behind, before, between] {
            let ran = seen.admin(&line).ended(*code);
            assert!(!ran.stderr.contains("unexpected argument"), "{line:?}: {ran:?}");
            if *code == 2 {
                let expected: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
                assert_eq!(ran.json()["target"], as_json(&expected), "{line:?}");
            }
        }
        let ran = seen.admin(&[&["reinstate"], &words[..], &["--reason", "x"]].concat());
        assert!(!ran.stderr.contains("unexpected argument"), "{words:?}: {ran:?}");
        let expected = if reinstating.is_empty() { 0 } else { 64 };
        assert!(ran.ended(expected).stderr.contains(reinstating), "{words:?}");
    }
    // The help flags stay flags, although an argument may begin with a hyphen.
    for flag in ["--help", "-h"] {
        assert!(run(&["revoke", "session", flag]).ended(0).stdout.contains("Usage"), "{flag}");
    }
    for command in [&["approve", "-Xy12"][..], &["refuse", "-Xy12"], &["approvals", "-Xy12"]] {
        assert!(seen.admin(command).ended(64).stderr.contains("is no digest"), "{command:?}");
    }
    // A nonce is base64url too.
    let key = seen.world.key_file("alpha");
    let tokens: Vec<&str> = seen.chain.tokens.iter().take(1).map(|token| std::str::from_utf8(token).unwrap()).collect();
    let chain = json!({ "aat_chain": tokens }).to_string();
    let prove = ["token", "prove", "--key", key.to_str().unwrap(), "--chain", &chain, "--tool", "a/b", "--nonce", "-Xy12"];
    run(&prove).ended(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn reinstating_what_is_not_revoked_says_so() {
    let seen = RecognitionFixture::new().await;
    let (alpha, beta) = (agent_id("alpha"), agent_id("beta"));
    seen.admin(&["revoke", "agent", &alpha]).ended(0);
    seen.admin(&["revoke", "user", ISSUER, "ana"]).ended(0);
    for (words, says) in [
        (&["agent", &slipped(&alpha)][..], format!("did you mean `agent {alpha}`, which is suspended?")),
        (&["agent", "spiffe://other.example/x"], "nothing bears that name: no document names agent".to_owned()),
        (&["agent", &beta], "is not suspended".to_owned()),
        (&["user", ISSUER, "anna"], format!("did you mean `user {ISSUER} ana`, which is suspended?")),
        (&["application", "portal"], "is not suspended".to_owned()),
    ] {
        let ran = seen.admin(&[&["reinstate"], words].concat()).ended(1);
        assert!(ran.stderr.contains(&says), "{words:?}: {ran:?}");
    }
    let ran = seen.admin(&["reinstate", "agent", &beta]).ended(1);
    assert!(!ran.stderr.contains("did you mean") && !ran.stderr.contains("nothing bears"), "{ran:?}");
    seen.admin(&["reinstate", "agent", &alpha]).ended(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_digest_that_was_meant_is_named() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let chain = world.session("alpha", "s");
    let asked = world.call(&chain, "pay/refund", r#"{"amount":90}"#);
    let until = Instant::now() + crate::harness::PATIENCE;
    let digest = loop {
        let answer = server.connect().await.check(asked.clone()).await.unwrap().into_inner();
        match answer.approval {
            Some(approval) => break approval.digest,
            None => assert!(Instant::now() < until, "{}", answer.reason),
        }
    };
    let policy = format!(
        "{}---\n{{kind: operator, id: lead, keys: [{}], roles: [approve], groups: [leads], users: [{{issuer: \"{ISSUER}\", sub: lead}}]}}\n",
        world.policy(),
        jwk(world.key("stranger")),
    );
    world.write_policy(&policy);
    let (url, data, key) = (server.admin_url(), world.data(), world.key_file("stranger"));
    let policies = world.policies();
    let mut apply = binary();
    apply.args(["policy", "apply"]).arg(&policies).arg("--data").arg(&data).args(["--target", &url]);
    run_with(&mut apply, "").ended(0);
    let answer = |digest: &str, command: &str| {
        let mut answer = binary();
        run_with(answer.args([command, digest, "--target", &url, "--operator-key"]).arg(&key), "").ended(1).stderr
    };
    let wrong = slipped(&digest);
    for command in ["approve", "refuse"] {
        assert!(answer(&wrong, command).contains(&format!("did you mean `{digest}`?")), "{}", answer(&wrong, command));
        let (prefix, meant) = (slipped(&digest[..12]), &digest[..12]);
        assert!(answer(&prefix, command).contains(&format!("did you mean `{meant}`?")), "{}", answer(&prefix, command));
        assert!(!answer(&"0".repeat(64), command).contains("did you mean"));
    }
}

/// Anyone who may connect may watch. The feed ends the right calls, and reveals no user's name and no operator's text.
#[tokio::test(flavor = "multi_thread")]
async fn who_watches_learns_no_reason_and_no_user() {
    let seen = RecognitionFixture::new().await;
    let mut client = RevocationServiceClient::new(channel(&seen.server.decisions).await);
    let mut watched = client.watch(wire::WatchRevocationsRequest::default()).await.unwrap().into_inner();
    let history = watched.message().await.unwrap().unwrap().revision.rsplit_once('.').unwrap().0.to_owned();
    let (beta, ana) = (agent_id("beta"), UserId::new(ISSUER, "ana").pseudonym(&history));
    for (words, key) in [
        (&["user", ISSUER, "ana"][..], vec![ana.as_str()]),
        (&["delegation", ISSUER, "ana", &beta], vec![&ana, &beta]),
        (&["session", SESSION], vec![SESSION]),
        (&["agent", &beta], vec![&beta]),
    ] {
        let line = [&["revoke"], words, &["--reason", "ana told the secret word xyzzy"]].concat();
        tokio::task::block_in_place(|| seen.admin(&line).ended(0));
        let message = loop {
            let message = watched.message().await.unwrap().unwrap();
            if !message.entries.is_empty() {
                break message;
            }
        };
        assert_eq!(message.entries[0].target, Some(target(words[0], &key)));
        let shown = format!("{message:?}");
        assert!(!shown.contains("\"ana\"") && !shown.contains("xyzzy") && !shown.contains("local"), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_says_who_when_and_why() {
    let seen = RecognitionFixture::new().await;
    seen.admin(&["revoke", "agent", &agent_id("alpha"), "--reason", "INC-7 \u{1b}[2Kgone", "--watermark"]).ended(0);
    let revoked = seen.admin(&["revoke", "session", SESSION, "--reason", "INC-8"]).ended(0).json();
    let listed = seen.admin(&["revocations"]).ended(0).json();
    let newest = &listed["revocations"][0];
    assert_eq!(newest["committed_at_unix_ms"], revoked["committed_at_unix_ms"]);
    assert_eq!((&newest["operators"], &newest["reason"]), (&json!(["local"]), &json!("INC-8")));
    let list = |limit: &str| {
        let mut command = binary();
        command.args(["revocations", "--limit", limit, "--target"]).arg(seen.server.admin_url());
        run_with(command.arg("--data").arg(seen.world.data()), "").ended(0).stdout
    };
    let shown = list("100");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!((lines.len(), lines[3]), (4, "2 of 2"), "{shown}");
    for part in [" UTC", " local ", "session", SESSION, "dead", "INC-8"] {
        assert!(lines[1].contains(part), "{part}: {shown}");
    }
    assert!(lines[2].contains("void") && lines[2].contains(r"INC-7 \u{1b}[2Kgone"), "{shown}");
    // The table is aligned: the entries of a column begin at the same position.
    let at = |line: &str, word: &str| line.find(word).map(|index| line[..index].chars().count());
    assert_eq!(at(lines[0], "WHO"), at(lines[1], "local"), "{shown}");
    assert_eq!(at(lines[0], "REASON"), at(lines[1], "INC-8"), "{shown}");
    assert!(list("1").contains("1 of 2, the newest; --limit 1000"), "{}", list("1"));
    // A blank at the end of a name is seen.
    let mut command = binary();
    command.args(["revoke", "session", &format!("{SESSION} "), "--target"]).arg(seen.server.admin_url());
    let shown = run_with(command.arg("--data").arg(seen.world.data()), "").ended(2);
    assert!(shown.stdout.contains(&format!("revoked session '{SESSION} '")), "{shown:?}");
    assert!(shown.stderr.contains("by blanks alone"), "{shown:?}");
    assert!(list("1").contains(&format!("'{SESSION} '")), "{}", list("1"));
}
