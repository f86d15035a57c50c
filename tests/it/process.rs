//! The process from the view of the system: killed, stopped, started with bad inputs, and observed.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::RevocationMeaning::{Dead, Suspend};
use portcullis::api::r#gen::check_request::Credential;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use serde_json::{Value, json};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{
    PATIENCE, ServerProcess, TestWorld, agent_id, audit_lines, binary, channel, request, run, run_with, signed, target,
};

const KILLS_UNDER_LOAD: usize = 10;
const CLIENTS: usize = 4;
/// Permits to wait for before a kill. More may come before it takes effect.
const PERMITS_MIN: usize = 100;
const KILLS_BETWEEN_REVOCATIONS: usize = 30;

/// The decision ids of the permits that clients saw until the server ended.
async fn permits_until_gone(server: &ServerProcess, world: &TestWorld, end: impl FnOnce() + Send) -> Vec<String> {
    let (count, mut tasks) = (Arc::new(std::sync::atomic::AtomicUsize::new(0)), Vec::new());
    for client in 0..CLIENTS {
        let chain = world.session("alpha", &format!("s-{client}"));
        let (mut connection, count) = (server.connect().await, count.clone());
        tasks.push(tokio::spawn(async move {
            let mut permits = Vec::new();
            while let Ok(answer) = connection.check(request(&chain, Bytes::new(), "crm/look", r#"{"id":1}"#)).await {
                let answer = answer.into_inner();
                assert_eq!(answer.reason, "OK");
                permits.push(answer.decision_id);
                count.fetch_add(1, Ordering::Relaxed);
            }
            permits
        }));
    }
    let until = Instant::now() + PATIENCE;
    while count.load(Ordering::Relaxed) < PERMITS_MIN {
        assert!(Instant::now() < until, "only {} permits", count.load(Ordering::Relaxed));
        tokio::task::yield_now().await;
    }
    end();
    let mut permits = Vec::new();
    for task in tasks {
        permits.extend(task.await.unwrap());
    }
    permits
}

fn recorded(lines: &[Value]) -> BTreeSet<&str> {
    lines.iter().filter(|line| line["kind"] == "decision").map(|line| line["decision_id"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_permit_outlives_its_record() {
    let world = TestWorld::new();
    let mut all = Vec::new();
    for round in 0..KILLS_UNDER_LOAD {
        let server = ServerProcess::start(&world);
        let id = server.id();
        let permits = permits_until_gone(&server, &world, || kill(id)).await;
        let lines = audit_lines(&world.data());
        let recorded = recorded(&lines);
        let lost: Vec<_> = permits.iter().filter(|id| !recorded.contains(id.as_str())).collect();
        assert!(lost.is_empty(), "round {round}: {} of {} permits have no record: {lost:?}", lost.len(), permits.len());
        all.extend(permits);
    }
    let lines = audit_lines(&world.data());
    let recorded = recorded(&lines);
    assert!(all.iter().all(|id| recorded.contains(id.as_str())), "a restart took records of before");
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "no decision id comes twice");
}

/// Sends SIGKILL while other tasks hold the server's handle.
fn kill(id: u32) {
    let id = rustix::process::Pid::from_raw(i32::try_from(id).unwrap()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_revocation_holds_after_a_kill() {
    const METHOD: &str = "/portcullis.v1.RevocationService/Revoke";
    let world = TestWorld::new();
    let mut acknowledged: Vec<String> = Vec::new();
    for round in 0..KILLS_BETWEEN_REVOCATIONS {
        let mut server = ServerProcess::start(&world);
        let operator = server.operator().await;
        let mut client = server.connect().await;
        // The revocations of the last round must hold now; all of them at the end.
        let asked = if round + 1 == KILLS_BETWEEN_REVOCATIONS { 0 } else { acknowledged.len().saturating_sub(20) };
        for session in &acknowledged[asked..] {
            let answer = client.check(request(&world.session("alpha", session), Bytes::new(), "crm/look", "{}")).await.unwrap();
            assert_eq!(answer.into_inner().reason, "REVOKED_SESSION", "round {round}: {session} was acknowledged");
        }
        let told = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = told.clone();
        let writer = tokio::spawn(async move {
            let mut done = Vec::new();
            for turn in 0.. {
                let session = format!("dead-{round}-{turn}");
                let message = wire::RevokeRequest { target: Some(target("session", &[&session])), ..Default::default() };
                let by = operator.authorization(METHOD, &message);
                if RevocationServiceClient::new(operator.channel.clone()).revoke(signed(message, &[by])).await.is_err() {
                    break;
                }
                done.push(session);
                counted.fetch_add(1, Ordering::Relaxed);
            }
            done
        });
        let until = Instant::now() + PATIENCE;
        while told.load(Ordering::Relaxed) < 1 + round % 4 {
            assert!(Instant::now() < until, "no revocation was acknowledged");
            tokio::task::yield_now().await;
        }
        server.kill();
        acknowledged.extend(writer.await.unwrap());
    }
    assert!(acknowledged.len() >= KILLS_BETWEEN_REVOCATIONS);
    let lines = audit_lines(&world.data());
    let acts: Vec<&str> = lines
        .iter()
        .filter(|line| line["kind"] == "act" && line["effect"] == "ACCEPTED" && line["method"] == METHOD)
        .map(|line| line["reason"].as_str().unwrap())
        .collect();
    for session in &acknowledged {
        let said = format!("session {session} ");
        assert!(acts.iter().any(|reason| reason.contains(&said)), "the act on {session} was acknowledged and not recorded");
    }
}

/// The proof of a destructive call is spent in the store, so a restart does not make it valid again.
#[tokio::test]
async fn a_spent_proof_stays_spent_after_a_kill() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    let chain = world.session("alpha", "s");
    let call = request(&chain, world.proof_at(&chain, "crm/wipe", "{}", 25), "crm/wipe", "{}");
    let answer = server.connect().await.check(call.clone()).await.unwrap().into_inner();
    assert_eq!(answer.reason, "OK");
    server.kill();
    let server = ServerProcess::start(&world);
    let answer = server.connect().await.check(call).await.unwrap().into_inner();
    assert!(["PROOF_REPLAYED", "PROOF_STALE"].contains(&answer.reason.as_str()), "{}", answer.reason);
    // A proof from before the start, by a correct clock, is refused for every tool.
    let early = request(&chain, world.proof_at(&chain, "crm/write", "{}", -10), "crm/write", "{}");
    let answer = server.connect().await.check(early).await.unwrap().into_inner();
    assert_eq!(answer.reason, "PROOF_STALE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_answers_what_is_in_flight() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    let (stopped, mut tasks) = (Arc::new(AtomicBool::new(false)), Vec::new());
    let answered = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for client in 0..CLIENTS {
        let chain = world.session("alpha", &format!("s-{client}"));
        let (mut connection, stopped, answered) = (server.connect().await, stopped.clone(), answered.clone());
        tasks.push(tokio::spawn(async move {
            let (mut ids, mut ended) = (Vec::new(), None);
            while ended.is_none() {
                match connection.check(request(&chain, Bytes::new(), "crm/look", "{}")).await {
                    Ok(answer) => ids.push(answer.into_inner().decision_id),
                    Err(status) => ended = Some((status, stopped.load(Ordering::Acquire))),
                }
                answered.fetch_add(1, Ordering::Relaxed);
            }
            (ids, ended.unwrap())
        }));
    }
    let until = Instant::now() + PATIENCE;
    while answered.load(Ordering::Relaxed) < PERMITS_MIN {
        assert!(Instant::now() < until);
        tokio::task::yield_now().await;
    }
    stopped.store(true, Ordering::Release);
    server.terminate();
    let mut ids = Vec::new();
    for task in tasks {
        let (seen, (status, was_stopped)) = task.await.unwrap();
        assert!(was_stopped, "no call failed before the server was told to stop: {status:?}");
        // A new call finds no listener, or a connection that closed before the call was sent. The decisions are compared below.
        let closing = format!("{status:?}").contains("NO_ERROR");
        assert!(matches!(status.code(), Code::Unavailable | Code::Cancelled) || closing, "{status:?}");
        ids.extend(seen);
    }
    let status = server.wait();
    assert_eq!(status.code(), Some(0), "{status:?}: {}", server.log());
    let lines = server.audit();
    let recorded = recorded(&lines);
    assert_eq!(
        ids.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        recorded,
        "what was decided was answered, and the other way"
    );
    let text = std::fs::read_dir(world.data().join("audit")).unwrap().map(|entry| entry.unwrap().path());
    for file in text.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl")) {
        assert!(std::fs::read_to_string(&file).unwrap().ends_with('\n'), "{} is whole", file.display());
    }
    // The server also starts again from this state.
    ServerProcess::start(&world);
}

/// Nobody reads standard output or standard error any more: the pipe is full first, then closed. The server goes on deciding, and says
/// afterwards what of its log was lost.
#[tokio::test]
async fn a_log_that_nobody_reads_holds_nobody_up_and_ends_nobody() {
    let world = TestWorld::new();
    let mut flags = binary();
    // Little until somebody connects, and more than 512 bytes for a call from then on.
    flags.arg("--policies").arg(world.policies()).env("PORTCULLIS_LOG", "info,h2=trace");
    let (mut server, mut errors) = ServerProcess::start_piped(&world, &flags);
    let (operator, mut client) = (server.operator().await, server.connect().await);
    let chain = world.session("alpha", "s");
    // A pipe holds 64 KiB.
    for _ in 0..400 {
        let asked = client.check(request(&chain, Bytes::new(), "crm/look", "{}"));
        let answer = tokio::time::timeout(PATIENCE, asked).await.expect("a full pipe holds a decision up").unwrap();
        assert_eq!(answer.into_inner().reason, "OK");
    }
    operator.revoke("session", &["another"], Dead).await;
    // It is read again, and says what was lost.
    let lost = "lines of the log were lost: standard error was not read in time";
    let reading = std::thread::spawn(move || {
        let (mut read, mut part) = (String::new(), [0; 64 * 1024]);
        while !read.contains(lost) {
            let count = std::io::Read::read(&mut errors, &mut part).unwrap();
            assert!(count > 0, "the log ended");
            read.push_str(&String::from_utf8_lossy(&part[..count]));
        }
        // And nobody reads it from here on: the pipe is closed.
        drop(errors);
    });
    let until = Instant::now() + PATIENCE;
    while !reading.is_finished() {
        assert!(Instant::now() < until, "nothing says what was lost");
        assert_eq!(client.check(request(&chain, Bytes::new(), "crm/look", "{}")).await.unwrap().into_inner().reason, "OK");
    }
    reading.join().unwrap();
    for session in ["a", "b"] {
        operator.revoke("session", &[session], Dead).await;
        assert_eq!(client.check(request(&chain, Bytes::new(), "crm/look", "{}")).await.unwrap().into_inner().reason, "OK");
    }
    server.terminate();
    assert_eq!(server.wait().code(), Some(0), "it ends as it is asked to, and not by a signal");
}

/// The section `limits` of the settings reaches the listeners.
#[test]
fn limits_are_settings() {
    let world = TestWorld::new();
    let config = world.folder.path().join("portcullis.yaml");
    std::fs::write(&config, "limits:\n  control_connections_max: 3\n").unwrap();
    let mut flags = binary();
    flags.arg("--config").arg(&config);
    let server = ServerProcess::start_with(&world, &flags);
    let idle: Vec<_> = (0..4).map(|_| std::net::TcpStream::connect(&server.http).unwrap()).collect();
    let displaced = "portcullis_server_connections_cut_total{listener=\"http\",cause=\"displaced\"}";
    assert!(server.metric(displaced) > 0.0, "a fourth connection takes the place of another");
    drop(idle);

    std::fs::write(&config, "limits:\n  control_connections_max: 0\n").unwrap();
    let ran = run_with(&mut serve(&world.data(), &["--config", config.to_str().unwrap()]), "").ended(78);
    assert!(ran.stderr.contains("portcullis.yaml:2:3") && ran.stderr.contains("is not from 1 to 1000000"), "{ran:?}");
}

/// A reader of the ready line may stop the server at once.
#[test]
fn sigterm_right_after_ready_is_a_clean_end() {
    let world = TestWorld::new();
    for round in 0..10 {
        let mut server = ServerProcess::start(&world);
        server.terminate();
        assert_eq!(server.wait().code(), Some(0), "round {round}: {}", server.log());
    }
}

fn serve(data: &Path, flags: &[&str]) -> Command {
    let mut command = binary();
    command.args(["serve", "--create", "--data"]).arg(data);
    for flag in ["--listen", "--http-listen", "--admin-listen"] {
        if !flags.contains(&flag) {
            command.args([flag, "127.0.0.1:0"]);
        }
    }
    command.args(flags);
    command
}

#[test]
fn what_it_cannot_start_on_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = held.local_addr().unwrap().to_string();
    for flag in ["--listen", "--http-listen", "--admin-listen"] {
        let data = folder.path().join("unused");
        let ran = run_with(&mut serve(&data, &[flag, &address]), "").ended(1);
        assert!(ran.stderr.contains(flag) && ran.stderr.contains("in use") && ran.stdout.is_empty(), "{ran:?}");
        assert!(!data.exists(), "nothing was written");
    }
    let ran = run_with(&mut serve(folder.path(), &["--listen", "0.0.0.0:0"]), "");
    assert!(ran.code != 0 && ran.stderr.contains("loopback"), "{ran:?}");

    let text = folder.path().join("notes.txt");
    std::fs::write(
        &text,
        "these are notes, not a database, and they are longer than any header of a database would be. ".repeat(20),
    )
    .unwrap();
    let other = folder.path().join("other.db");
    rusqlite::Connection::open(&other).unwrap().execute_batch("CREATE TABLE people (name TEXT)").unwrap();
    let newer = folder.path().join("newer.db");
    let store = |path: &Path| format!("sqlite:{}", path.display());
    let world = TestWorld::new();
    let mut server = ServerProcess::start_with(&world, binary().args(["--create", "--store", &store(&newer)]));
    server.terminate();
    assert!(server.wait().success());
    rusqlite::Connection::open(&newer).unwrap().pragma_update(None, "user_version", 999).unwrap();
    for (path, says) in
        [(&text, "is not a SQLite database"), (&other, "of another program"), (&newer, "use the version that made it")]
    {
        let before = std::fs::read(path).unwrap();
        let ran = run_with(&mut serve(&folder.path().join("data"), &["--store", &store(path)]), "");
        assert!(ran.code != 0 && ran.stderr.contains(says) && ran.stdout.is_empty(), "{ran:?}");
        assert!(ran.stderr.contains(path.to_str().unwrap()), "{ran:?}");
        assert_eq!(std::fs::read(path).unwrap(), before, "{} was not touched", path.display());
    }
}

#[tokio::test]
async fn a_folder_with_one_bad_file_applies_nothing() {
    let world = TestWorld::new();
    let bad = world.policies().join("zz-bad.yaml");
    std::fs::write(&bad, "kind: group\nid: late\nallow: [crm/read]\n---\nkind: group\nid: later\nalow: []\n").unwrap();
    let folder = world.policies();
    let flags = ["--policies", folder.to_str().unwrap()];
    let ran = run_with(&mut serve(&world.data(), &flags), "").ended(78);
    assert!(ran.stderr.contains("zz-bad.yaml:7:1") && ran.stderr.contains("alow") && ran.stdout.is_empty(), "{ran:?}");
    // The store holds the first operator and nothing of the folder.
    let server = ServerProcess::start_with(&world, &binary());
    let operator = server.operator().await;
    let message = wire::ListDocumentsRequest::default();
    let by = operator.authorization("/portcullis.v1.PolicyService/List", &message);
    let mut client = wire::policy_service_client::PolicyServiceClient::new(operator.channel.clone());
    let documents = client.list(signed(message, &[by])).await.unwrap().into_inner().documents;
    assert_eq!(documents, [wire::DocumentId { kind: "operator".to_owned(), id: "local".to_owned() }]);
}

#[tokio::test]
async fn health_and_metrics_are_served() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    for path in ["/livez", "/readyz"] {
        let (code, body) = server.get(path);
        assert_eq!(code, 200, "{path}: {body}");
    }
    assert_eq!(server.get("/nothing").0, 404);
    let mut client = server.connect().await;
    let chain = world.session("alpha", "secret-session");
    client.check(request(&chain, Bytes::new(), "crm/look", "{}")).await.unwrap();
    client.check(request(&chain, Bytes::new(), "crm/read", "{}")).await.unwrap();
    let (code, page) = server.get("/metrics");
    assert_eq!(code, 200);
    for name in [
        "portcullis_check_duration_seconds_bucket",
        "portcullis_check_decisions_total",
        "portcullis_chain_cache_lookups_total",
        "portcullis_chain_verifications_total",
        "portcullis_snapshot_age_seconds",
        "portcullis_revision",
        "portcullis_revocations",
        "portcullis_filter_false_positive_rate",
        "portcullis_replica_state",
        "portcullis_audit_records_total",
        "portcullis_ledger_uses",
    ] {
        assert!(page.lines().any(|line| line.starts_with(name)), "no {name} in:\n{page}");
    }
    let counted = |effect: &str, reason: &str| {
        page.lines()
            .any(|line| line.starts_with("portcullis_check_decisions_total{") && line.contains(effect) && line.contains(reason))
    };
    assert!(counted("PERMIT", "\"OK\"") && counted("DENY", "PROOF_MISSING"), "{page}");
    for id in ["secret-session", "spiffe://", "ana", "crm/look"] {
        assert!(!page.contains(id), "`{id}` is an id or a tool and no label");
    }
}

/// A replaced store is detected and not followed. Destructive tools are denied first, then all.
#[tokio::test]
async fn a_replica_without_its_store_closes() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let chain = world.session("alpha", "s");
    assert_eq!(client.check(request(&chain, Bytes::new(), "crm/look", "{}")).await.unwrap().into_inner().reason, "OK");
    for name in ["store.db", "store.db-wal", "store.db-shm"] {
        let path = world.data().join(name);
        if path.exists() {
            std::fs::rename(&path, world.data().join(format!("moved-{name}"))).unwrap();
        }
    }
    let until = Instant::now() + PATIENCE;
    for tool in ["crm/wipe", "crm/look"] {
        loop {
            let answer = client.check(world.call(&chain, tool, "{}")).await.unwrap().into_inner();
            if answer.reason == "STALE" {
                assert_eq!((answer.effect(), answer.deciding_layer.as_str()), (wire::Effect::Deny, "freshness"));
                break;
            }
            assert!(Instant::now() < until, "{tool} is still {}", answer.reason);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let (code, said) = server.get("/readyz");
    assert!(code == 503 && (said.contains("closed: ") || said.contains("quarantined: ")), "{code} {said}");
    let (_, page) = server.get("/metrics");
    let states = page.lines().filter(|line| line.starts_with("portcullis_replica_state{") && line.ends_with(" 1.0"));
    let states: Vec<_> = states.collect();
    assert!(states.len() == 1 && (states[0].contains("\"closed\"") || states[0].contains("\"quarantined\"")), "{states:?}");
    let mut health = HealthClient::new(channel(&server.decisions).await);
    for service in ["", "portcullis.v1.DecisionService"] {
        let mut told = health.watch(HealthCheckRequest { service: service.to_owned() }).await.unwrap().into_inner();
        let closed = async { while told.message().await.unwrap().unwrap().status() != ServingStatus::NotServing {} };
        tokio::time::timeout(PATIENCE, closed).await.unwrap_or_else(|_| panic!("`{service}` is still said to serve"));
    }
}

/// Runs every kind of call with the most detailed log. No credential, key or argument may appear in the log or in the audit.
#[tokio::test]
async fn no_secret_is_logged() {
    const CANARY: &str = "canary-in-the-arguments";
    let world = TestWorld::new();
    let server = ServerProcess::start_with(
        &world,
        binary().arg("--policies").arg(world.policies()).env("PORTCULLIS_LOG", "trace").env("RUST_LOG", "trace"),
    );
    let operator = server.operator().await;
    let mut client = server.connect().await;
    let mut secrets: Vec<String> = ["issuer", "alpha", "beta"].map(|name| world.key(name).to_jwk().to_string()).into();
    secrets.push(std::fs::read_to_string(world.data().join("local.jwk")).unwrap());
    secrets = secrets.iter().map(|jwk| serde_json::from_str::<Value>(jwk).unwrap()["d"].as_str().unwrap().to_owned()).collect();
    secrets.push(CANARY.to_owned());
    let mut keep = |token: &Bytes| {
        let text = String::from_utf8(token.to_vec()).unwrap();
        secrets.extend(text.split('.').skip(1).map(str::to_owned));
    };
    let args = format!("{{\"id\":\"{CANARY}\"}}");
    for session in ["a", "b"] {
        let root = world.session("alpha", session);
        let hop = world.hop(&root, "beta", &["crm/read", "crm/write"], |_| {});
        for (chain, tool) in
            [(&root, "crm/write"), (&hop, "crm/read"), (&hop, "crm/write"), (&root, "pay/refund"), (&root, "gone/tool")]
        {
            let call = wire::CheckRequest { want_handle: true, ..world.call(chain, tool, &args) };
            let Some(Credential::Presentation(presentation)) = &call.credential else { panic!() };
            presentation.aat_chain.iter().chain([&presentation.aat_pop]).for_each(&mut keep);
            client.check(call.clone()).await.unwrap();
            client.check(wire::CheckRequest { tool: "crm/look".to_owned(), ..call }).await.unwrap();
        }
        client.check(request(&root, "bad.proof.canary-proof".into(), "crm/read", &args)).await.unwrap();
        client.check(request(&root, Bytes::new(), "crm/look", &format!("{{\"{CANARY}\":1,\"{CANARY}\":1}}"))).await.unwrap();
        let presentation = wire::Presentation { aat_chain: root.tokens.clone(), aat_pop: Bytes::new() };
        let credential = Some(wire::list_tools_request::Credential::Presentation(presentation));
        client.list_tools(wire::ListToolsRequest { credential, ..Default::default() }).await.unwrap();
    }
    secrets.push("canary-proof".to_owned());
    operator.revoke("agent", &[&agent_id("alpha")], Suspend).await;
    operator.revoke("session", &["a"], Dead).await;
    let log = server.log();
    assert!(log.contains("TRACE") && log.contains("DEBUG"), "the log is at its most talkative: {}", &log[..log.len().min(500)]);
    let leaked: Vec<_> = secrets.iter().filter(|secret| log.contains(secret.as_str())).collect();
    assert!(leaked.is_empty(), "in the log: {leaked:?}\n{}", lines_with(&log, &leaked));
    let audit = server.audit().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let leaked: Vec<_> = secrets.iter().filter(|secret| audit.contains(secret.as_str())).collect();
    assert!(leaked.is_empty(), "in the audit: {leaked:?}\n{}", lines_with(&audit, &leaked));
}

/// The server's log reports each revocation and change of policy, with its operator, once the server decides by it.
#[tokio::test]
async fn kills_and_changes_of_policy_are_logged() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let forged = r#"s" now="reinstated"#;
    let revision = operator.revoke("session", &[forged], Dead).await;
    let lifted = operator.revoke("agent", &[&agent_id("beta")], Suspend).await;
    let policy = world.policy().replace("deny: [pay/large]", "deny: [pay/large, crm/wipe]");
    world.write_policy(&policy);
    let (url, key) = (server.admin_url(), server.data.join("local.jwk"));
    let (folder, key) = (world.policies(), key.to_str().unwrap().to_owned());
    let applied =
        ["--json", "policy", "apply", folder.to_str().unwrap(), "--target", url.as_str(), "--operator-key", key.as_str()];
    let applied = run(&applied).ended(0).json()["revision"].as_str().unwrap().to_owned();
    let until = std::time::Instant::now() + PATIENCE;
    let expected = [
        vec![revision.as_str(), "a revocation is in effect", r#"session s\" now=\"reinstated"#, "dead", "local"],
        vec![lifted.as_str(), "a revocation is in effect", "agent/beta", "suspended", "local"],
        vec![revision.as_str(), "an act was done", "local", "/portcullis.v1.RevocationService/Revoke"],
        vec![applied.as_str(), "a change of policy is in force", "local", "/portcullis.v1.PolicyService/Apply"],
    ];
    let missing = |log: &str| {
        let is_there = |words: &&Vec<&str>| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        expected.iter().find(|words| !is_there(words)).cloned()
    };
    while let Some(words) = missing(&server.log()) {
        assert!(std::time::Instant::now() < until, "no line with {words:?} in {}", server.log());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(!server.log().contains(forged), "a name breaks out of its member");
}

fn lines_with(text: &str, wanted: &[&String]) -> String {
    text.lines().filter(|line| wanted.iter().any(|secret| line.contains(secret.as_str()))).take(5).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn an_audit_line_says_what_the_answer_said() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let root = world.session("alpha", "s-audit");
    let hop = world.hop(&root, "beta", &["crm/write"], |_| {});
    let mut asked =
        tonic::Request::new(wire::CheckRequest { request_id: "r-1".to_owned(), ..world.call(&hop, "crm/write", r#"{"a":1}"#) });
    let trace = "0af7651916cd43dd8448eb211c80319c";
    asked.metadata_mut().insert("traceparent", format!("00-{trace}-b7ad6b7169203331-01").parse().unwrap());
    let answer = client.check(asked).await.unwrap().into_inner();
    let needs = client.check(world.call(&root, "pay/refund", r#"{"amount":1}"#)).await.unwrap().into_inner();
    let denied = client.check(request(&root, Bytes::new(), "pay/large", "{}")).await.unwrap().into_inner();
    let unknown = wire::Presentation { aat_chain: vec!["garbage".into()], aat_pop: Bytes::new() };
    let unknown =
        wire::CheckRequest { credential: Some(Credential::Presentation(unknown)), ..request(&root, Bytes::new(), "x/y", "{}") };
    let unknown = client.check(unknown).await.unwrap().into_inner();
    let lines = server.audit();
    let of = |id: &str| lines.iter().find(|line| line["decision_id"] == id).unwrap_or_else(|| panic!("no record of {id}"));
    let line = of(&answer.decision_id);
    for (member, expected) in [
        ("kind", json!("decision")),
        ("method", json!("Check")),
        ("request_id", json!("r-1")),
        ("trace_id", json!(trace)),
        ("effect", json!("PERMIT")),
        ("reason", json!("OK")),
        ("revision", json!(answer.revision)),
        ("node", json!("local")),
    ] {
        assert_eq!(line[member], expected, "{member}: {line}");
    }
    for member in ["arguments_sha256", "proof_jti", "gateway", "snapshot_digest"] {
        assert!(line[member].as_str().is_some_and(|text| !text.is_empty()), "{member}: {line}");
    }
    for member in ["time_unix_ns", "snapshot_age_ms", "latency_ns"] {
        assert!(line[member].is_i64(), "{member}: {line}");
    }
    let levels = line["chain"].as_array().unwrap();
    assert_eq!(levels.len(), 2);
    assert!(
        levels.iter().all(|level| level["jti"].is_string()
            && level["expires_at_unix_ms"].is_i64()
            && level.as_object().unwrap().len() == 5)
    );
    let who = |id: &str| json!({ "id": id, "evidence": "VERIFIED" });
    let principals = &line["principals"];
    assert_eq!(principals["agents"], json!([who(&agent_id("alpha")), who(&agent_id("beta"))]));
    assert_eq!((&principals["session"], &principals["tool"]), (&who("s-audit"), &who("crm/write")));
    assert!(principals["user"].is_object() && principals["application"].is_object() && principals["task"].is_object());

    let line = of(&needs.decision_id);
    assert_eq!((&line["effect"], &line["approval_digest"]), (&json!("NEEDS_APPROVAL"), &json!(needs.approval.unwrap().digest)));
    let line = of(&denied.decision_id);
    assert_eq!((&line["reason"], line["principals"]["user"].is_object()), (&json!(denied.reason), true));
    let line = of(&unknown.decision_id);
    assert_eq!(line["principals"], json!({ "tool": { "id": "x/y", "evidence": "ATTESTED" } }));
    assert!(line.get("chain").is_none(), "{line}");
}

/// The first command of the README.
#[test]
fn the_demo_does_what_it_says() {
    let ran = run(&["--json", "demo"]).ended(0);
    assert!(ran.json().is_object(), "{ran:?}");
}
