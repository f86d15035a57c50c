//! Replicas that share a PostgreSQL store, as processes: one policy, one kill switch, and no password in any output.

use std::process::Command;
use std::time::Instant;

use portcullis::api::r#gen as wire;
use serde_json::json;

use crate::harness::{PATIENCE, ServerProcess, TestWorld, agent_id, binary, run_with};
use crate::postgres;

const CANARY: &str = "s3cr3t-canary";

/// The URL of a new database, with a password that the server does not require.
fn database() -> String {
    let server = postgres::shared();
    server.database().replacen(server.superuser(), &format!("{}:{CANARY}", server.superuser()), 1)
}

/// A command whose environment names the store.
fn with_store(url: &str) -> Command {
    let mut command = binary();
    command.env("PORTCULLIS_STORE", url).env("PORTCULLIS_STORE_DURABILITY", "single");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_on_one_replica_holds_on_all() {
    let world = TestWorld::new();
    let url = database();
    let talkative = ["--log", "trace"];
    let first = ServerProcess::start_with(&world, with_store(&url).arg("--policies").arg(world.policies()).args(talkative));
    let other_data = world.folder.path().join("other");
    let second = ServerProcess::start_at(&world, with_store(&url).args(talkative), &other_data);
    let chain = world.session("alpha", "s");
    for server in [&first, &second] {
        let answer = server.connect().await.check(world.call(&chain, "crm/wipe", "{}")).await.unwrap().into_inner();
        assert_eq!(answer.effect(), wire::Effect::Permit, "{}", answer.reason);
    }
    // The proof of a destructive call is valid once, whichever replica receives it.
    let call = world.call(&chain, "crm/wipe", "{}");
    let mut effects = Vec::new();
    for server in [&first, &second] {
        effects.push(server.connect().await.check(call.clone()).await.unwrap().into_inner().reason);
    }
    assert_eq!(effects, ["OK", "PROOF_REPLAYED"]);

    let at_least = first.operator().await.revoke("agent", &[&agent_id("alpha")], wire::RevocationMeaning::Suspend).await;
    let asked = wire::CheckRequest { at_least, ..world.call(&chain, "crm/look", "{}") };
    let mut client = second.connect().await;
    let until = Instant::now() + PATIENCE;
    let answer = loop {
        let answer = client.check(asked.clone()).await.unwrap().into_inner();
        assert_eq!(answer.effect(), wire::Effect::Deny);
        if answer.reason != "REVISION_UNAVAILABLE" {
            break answer;
        }
        assert!(Instant::now() < until, "the revocation does not reach the other replica");
    };
    assert_eq!(answer.reason, "AGENT_SUSPENDED");

    // The command line opens the store itself, and both replicas see its write.
    let admin = |arguments: &[&str]| {
        let mut command = with_store(&url);
        command.arg("--json").args(arguments).args(["--store", "env:PORTCULLIS_STORE", "--data"]).arg(&first.data);
        run_with(&mut command, "")
    };
    let listed = admin(&["revocations"]).ended(0);
    assert_eq!(listed.json()["total"], 1);
    let back = admin(&["reinstate", "agent", &agent_id("alpha")]).ended(0);
    for server in [&first, &second] {
        let mut client = server.connect().await;
        let until = Instant::now() + PATIENCE;
        while client.check(world.call(&chain, "crm/look", "{}")).await.unwrap().into_inner().reason != "OK" {
            assert!(Instant::now() < until, "a replica does not see what the command line wrote");
        }
    }
    let said = [first.log(), second.log(), format!("{listed:?}{back:?}")].concat();
    let audit = [first.audit(), second.audit()].concat();
    assert!(said.contains("TRACE"), "the logs are at their most talkative");
    assert!(!said.contains(CANARY) && !json!(audit).to_string().contains(CANARY), "the password was said");
    let known = postgres::shared().sql(&url, "SELECT count(*) FROM portcullis.replicas WHERE state = 'serving'");
    assert_eq!(known, "2");
}

#[test]
fn a_store_that_cannot_be_used_is_explained_without_its_password() {
    let url = database();
    let folder = tempfile::tempdir().unwrap();
    let check = |url: &str, durability: &str, code: i32, part: &str| {
        let mut serve = binary();
        serve.arg("serve").args(["--listen", "--http-listen", "--admin-listen"].iter().flat_map(|flag| [*flag, "127.0.0.1:0"]));
        serve.arg("--data").arg(folder.path().join("data")).args(["--log", "trace"]).env("PORTCULLIS_STORE", url);
        if !durability.is_empty() {
            serve.args(["--store-durability", durability]);
        }
        let ran = run_with(&mut serve, "").ended(code);
        assert!(ran.stderr.contains(part), "{durability}: {}", ran.stderr);
        assert!(!format!("{ran:?}").contains(CANARY), "{ran:?}");
    };
    check(&url, "", 78, "`store_durability` (`--store-durability`) is needed");
    check(&url, "synchronous", 78, "synchronous_standby_names");
    check(&url, "eventual", 64, "--store-durability");
    check(&format!("postgres://u:{CANARY}@db.example/d"), "single", 78, "sslmode=verify-full");
    check(&format!("postgre://u:{CANARY}@127.0.0.1/d"), "single", 78, "postgres://USER@HOST/DATABASE");
    check(&format!("postgres://u:{CANARY}@127.0.0.1:1/d"), "single", 69, "cannot be reached");
    check(&format!("postgres://u:x@{CANARY}@127.0.0.1/d"), "single", 78, "%40");
    // Help shows the values of the environment, and must not show this one.
    for command in ["serve", "revocations"] {
        let ran = run_with(with_store(&url).args([command, "--help"]), "").ended(0);
        assert!(ran.stdout.contains("--store") && !format!("{ran:?}").contains(CANARY), "{ran:?}");
    }
}
