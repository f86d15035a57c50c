//! A fleet as processes: revocations that wait for the fleet, replicas that are paused, killed and restarted, and watchers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::fleet_service_client::FleetServiceClient;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use portcullis::config;
use portcullis::model::time::SystemClock;
use portcullis::store;
use portcullis::store::postgres::{Durability, PostgresStore};
use portcullis::store::sqlite::SqliteStore;
use rustix::process::Signal;
use serde_json::Value;
use tonic::Code;

use crate::harness::{
    CommandResult, PATIENCE, ServerProcess, TestChain, TestWorld, agent_id, binary, channel, request, run_with,
};
use crate::postgres;

/// The shortest bound that several processes on a busy machine can keep.
const BOUND_MS: u64 = 2_000;
/// The allowance of a wait beyond the bound, and that of a busy machine.
const WAIT_MS_MAX: u64 = BOUND_MS + 200 + 3_000;

fn short_bound() -> store::Settings {
    store::Settings { freshness_bound_ms: BOUND_MS, ..store::Settings::default() }
}

struct ReplicaFleet {
    world: TestWorld,
    url: String,
    servers: Vec<ServerProcess>,
}

impl ReplicaFleet {
    fn start(world: TestWorld, url: String) -> Self {
        let mut fleet = Self { world, url, servers: Vec::new() };
        for index in 0..3 {
            fleet.add(index);
        }
        fleet
    }

    fn add(&mut self, index: usize) {
        let mut flags = self.with_store(&[]);
        if index == 0 {
            flags.arg("--policies").arg(self.world.policies());
        }
        self.servers.push(ServerProcess::start_at(&self.world, &flags, &self.data(index)));
    }

    fn data(&self, index: usize) -> PathBuf {
        self.world.folder.path().join(format!("data-{index}"))
    }

    fn with_store(&self, arguments: &[&str]) -> Command {
        let mut command = binary();
        command.args(arguments).env("PORTCULLIS_STORE", &self.url);
        if self.url.starts_with("postgres") {
            command.env("PORTCULLIS_STORE_DURABILITY", "single");
        }
        command
    }

    /// Runs a command of the first operator at a replica.
    fn run(&self, server: &ServerProcess, arguments: &[&str]) -> CommandResult {
        let mut command = binary();
        command.arg("--json").args(arguments).arg("--target").arg(server.admin_url()).arg("--data").arg(self.data(0));
        run_with(&mut command, "")
    }

    /// Revokes a session and waits for the fleet; returns each replica's outcome, in the order of the servers.
    fn kill(&self, session: &str) -> Vec<String> {
        let said = self.run(&self.servers[0], &["revoke", "session", session, "--wait", "fleet"]).ended(0).json();
        self.outcomes(&said)
    }

    fn outcomes(&self, said: &Value) -> Vec<String> {
        let fleet = &said["fleet"];
        assert!(fleet["waited_ms"].as_u64().unwrap() <= WAIT_MS_MAX, "{said}");
        assert_eq!(fleet["freshness_bound_ms"], BOUND_MS, "{said}");
        let answers = fleet["replicas"].as_array().unwrap();
        let outcome = |server: &ServerProcess| {
            let of = answers.iter().filter(|answer| answer["replica"]["address"].as_str().unwrap().ends_with(&server.decisions));
            let of: Vec<_> = of.collect();
            assert_eq!(of.len(), 1, "{}: {said}", server.decisions);
            if of[0]["outcome"] == "acknowledged" {
                assert!(of[0]["acknowledged_after_ms"].is_u64(), "{said}");
            }
            of[0]["outcome"].as_str().unwrap().to_owned()
        };
        self.servers.iter().map(outcome).collect()
    }

    async fn reason(&self, server: &ServerProcess, chain: &TestChain) -> String {
        look(server, chain).await.reason
    }

    fn states(&self, server: &ServerProcess) -> Vec<(String, String)> {
        let said = self.run(server, &["fleet", "status"]).ended(0).json();
        let replicas = said["replicas"].as_array().unwrap();
        let text = |replica: &Value, name: &str| replica[name].as_str().unwrap().to_owned();
        replicas.iter().map(|replica| (text(replica, "address"), text(replica, "state"))).collect()
    }
}

async fn look(server: &ServerProcess, chain: &TestChain) -> wire::CheckResponse {
    let asked = request(chain, Bytes::new(), "crm/look", "{}");
    server.connect().await.check(asked).await.unwrap().into_inner()
}

/// Clients that ask without pause. A permit that was requested after the wait ended is an error.
async fn no_permit_after(fleet: &ReplicaFleet, chain: &TestChain, wait: impl FnOnce() + Send) {
    let (ended, before, after) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut tasks = Vec::new();
    for server in &fleet.servers {
        let (mut client, asked) = (server.connect().await, request(chain, Bytes::new(), "crm/look", "{}"));
        let (ended, before, after) = (ended.clone(), before.clone(), after.clone());
        tasks.push(tokio::spawn(async move {
            let mut denials = 0;
            while denials < 100 {
                let late = ended.load(Ordering::SeqCst);
                let answer = client.check(asked.clone()).await.unwrap().into_inner();
                match answer.effect() {
                    wire::Effect::Permit if late => drop(after.fetch_add(1, Ordering::SeqCst)),
                    wire::Effect::Permit => drop(before.fetch_add(1, Ordering::SeqCst)),
                    _ if late => denials += 1,
                    _ => {}
                }
            }
        }));
    }
    let until = Instant::now() + PATIENCE;
    while before.load(Ordering::SeqCst) < 100 {
        assert!(Instant::now() < until, "no permits");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::task::block_in_place(wait);
    ended.store(true, Ordering::SeqCst);
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(after.load(Ordering::SeqCst), 0, "a permit after the wait");
}

async fn a_fleet_is_killed(url: impl FnOnce(&Path) -> String) {
    let world = TestWorld::new();
    let url = url(world.folder.path());
    let mut fleet = ReplicaFleet::start(world, url);
    let chains: Vec<TestChain> = (0..4).map(|index| fleet.world.session("alpha", &format!("s-{index}"))).collect();
    for (server, chain) in fleet.servers.iter().flat_map(|server| chains.iter().map(move |chain| (server, chain))) {
        assert_eq!(fleet.reason(server, chain).await, "OK");
    }
    let mut watched = watch(&fleet.servers[1], "").await;
    let begin = watched.message().await.unwrap().unwrap();
    assert!(!begin.everything && begin.entries.is_empty() && !begin.revision.is_empty(), "{begin:?}");

    // All replicas run, so all acknowledge.
    let mut outcomes = Vec::new();
    no_permit_after(&fleet, &chains[0], || outcomes = fleet.kill("s-0")).await;
    assert_eq!(outcomes, ["acknowledged"; 3]);
    let told = loop {
        let message = watched.message().await.unwrap().unwrap();
        if !message.entries.is_empty() {
            break message;
        }
    };
    assert_eq!(told.entries[0].target.as_ref().unwrap().key, ["s-0"]);
    let mut resumed = watch(&fleet.servers[2], &begin.revision).await;
    assert_eq!(resumed.message().await.unwrap().unwrap().entries, told.entries, "another replica goes on from there");

    // One replica is paused: it runs out. It denies the calls of that time when it continues.
    let until = Instant::now() + PATIENCE;
    let (said, late) = loop {
        let mut paused = fleet.servers[2].connect().await;
        fleet.servers[2].signal(Signal::STOP);
        let asked = request(&chains[1], Bytes::new(), "crm/look", "{}");
        let late = tokio::spawn(async move { paused.check(asked).await.unwrap().into_inner() });
        let kill = ["revoke", "session", "s-1", "--wait", "fleet"];
        let ran = tokio::task::block_in_place(|| fleet.run(&fleet.servers[0], &kill));
        if ran.code == 0 {
            break (ran.json(), late);
        }
        // A replica that is paused in the middle of a write holds the file's lock, so nobody can write. The test then tries another
        // moment.
        assert!(Instant::now() < until && fleet.url.starts_with("sqlite"), "{ran:?}");
        fleet.servers[2].signal(Signal::CONT);
        late.await.unwrap();
    };
    assert_eq!(fleet.outcomes(&said), ["acknowledged", "acknowledged", "ran_out"]);
    let states = tokio::task::block_in_place(|| fleet.states(&fleet.servers[0]));
    assert_eq!(states.iter().filter(|(_, state)| state == "fresh").count(), 2, "{states:?}");
    assert!(states.iter().any(|(_, state)| ["stale", "closed"].contains(&state.as_str())), "{states:?}");
    fleet.servers[2].signal(Signal::CONT);
    let late = late.await.unwrap();
    assert_eq!(late.effect(), wire::Effect::Deny, "{}", late.reason);
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = look(&fleet.servers[2], &chains[1]).await;
        assert_eq!(answer.effect(), wire::Effect::Deny);
        if answer.reason == "REVOKED_SESSION" {
            break;
        }
        assert!(Instant::now() < until, "still {}", answer.reason);
    }

    // One replica is killed: it runs out. Its successor is another replica, and knows all revocations.
    fleet.servers[1].kill();
    assert_eq!(tokio::task::block_in_place(|| fleet.kill("s-2")), ["acknowledged", "ran_out", "acknowledged"]);
    fleet.servers.remove(1);
    fleet.add(1);
    for server in &fleet.servers {
        assert_eq!(fleet.reason(server, &chains[2]).await, "REVOKED_SESSION");
        assert_eq!(fleet.reason(server, &chains[3]).await, "OK");
    }

    // The calls that need no signature, and one that does.
    let mut anybody = FleetServiceClient::new(channel(&fleet.servers[0].decisions).await);
    let listed = anybody.list_replicas(wire::ListReplicasRequest {}).await.unwrap().into_inner();
    assert!(listed.replicas.len() >= 3 && listed.freshness_bound_ms == BOUND_MS, "{listed:?}");
    assert!(listed.replicas.iter().any(|replica| replica.last_kill_ms.is_some() && replica.acked_revision == listed.revision));
    let refused = anybody.wait_for(wire::WaitForFleetRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);

    // An agent is suspended through a server and reinstated at the store itself.
    let mut direct = fleet.with_store(&["--json", "reinstate", "agent", &agent_id("alpha"), "--wait", "fleet"]);
    direct.args(["--store", "env:PORTCULLIS_STORE", "--data"]).arg(fleet.data(0));
    let suspended = fleet.run(&fleet.servers[0], &["revoke", "agent", &agent_id("alpha"), "--wait", "fleet"]).ended(0).json();
    assert!(suspended["fleet"]["replicas"].as_array().unwrap().iter().any(|answer| answer["outcome"] == "acknowledged"));
    let back = tokio::task::block_in_place(|| run_with(&mut direct, "")).ended(0).json();
    assert!(back["fleet"]["replicas"].as_array().unwrap().len() >= 3, "{back}");
    for server in &fleet.servers {
        assert_eq!(fleet.reason(server, &chains[3]).await, "OK", "who acknowledged a reinstatement knows it");
    }
}

async fn watch(server: &ServerProcess, from: &str) -> tonic::Streaming<wire::WatchRevocationsResponse> {
    let mut client = RevocationServiceClient::new(channel(&server.decisions).await);
    client.watch(wire::WatchRevocationsRequest { from: from.to_owned() }).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_fleet_on_one_file_is_killed() {
    a_fleet_is_killed(|folder| {
        let path = folder.join("shared.db");
        drop(SqliteStore::open_with(&path, Arc::new(SystemClock), short_bound()).unwrap());
        format!("sqlite:{}", path.display())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_fleet_on_postgres_is_killed() {
    let url = tokio::task::block_in_place(|| postgres::shared().database());
    let config::StoreLocation::Postgres(settings) =
        config::StoreLocation::new(&url.clone().into(), Some(Durability::Single)).unwrap()
    else {
        panic!("no database")
    };
    drop(PostgresStore::open_with(*settings, short_bound(), None).await.unwrap());
    a_fleet_is_killed(|_| url).await;
}

/// The outcome of a fleet is not known if its store may lose the revocation. The revocation is written all the same.
#[test]
fn a_store_that_may_lose_commits_promises_nothing() {
    let url = postgres::shared().database();
    let world = TestWorld::new();
    let mut flags = binary();
    flags.env("PORTCULLIS_STORE", &url).env("PORTCULLIS_STORE_DURABILITY", "asynchronous");
    let server = ServerProcess::start_with(&world, &flags);
    let mut command = binary();
    command.args(["--json", "revoke", "session", "s", "--wait", "fleet", "--target"]).arg(server.admin_url());
    let ran = run_with(command.arg("--data").arg(world.data()), "").ended(1);
    assert!(ran.stderr.contains("store_durability: asynchronous") && ran.stderr.contains("written, but"), "{ran:?}");
    assert!(ran.json()["revision"].is_string(), "{ran:?}");
}

/// A restart does not follow a store that is behind the recorded position.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_follows_no_older_store() {
    let world = TestWorld::new();
    let backup = world.folder.path().join("backup");
    std::fs::create_dir(&backup).unwrap();
    let copy = |from: &Path, to: &Path| {
        for name in ["store.db", "store.db-wal", "store.db-shm"] {
            let _ = std::fs::remove_file(to.join(name));
            if from.join(name).exists() && name != "store.db-shm" {
                std::fs::copy(from.join(name), to.join(name)).unwrap();
            }
        }
    };
    let start = || {
        let mut command = binary();
        command.arg("serve").args(["--listen", "--http-listen", "--admin-listen"].iter().flat_map(|flag| [*flag, "127.0.0.1:0"]));
        command.arg("--data").arg(world.data());
        command
    };
    let mut server = ServerProcess::start(&world);
    server.terminate();
    assert!(server.wait().success());
    copy(&world.data(), &backup);
    let mut server = ServerProcess::start_with(&world, &binary());
    let revision = server.operator().await.revoke("session", &["s"], wire::RevocationMeaning::Dead).await;
    let until = Instant::now() + PATIENCE;
    let kept = || std::fs::read_to_string(world.data().join("place.json")).unwrap_or_default();
    let number = revision.rsplit('.').next().unwrap().to_owned();
    while !kept().contains(&format!("\"number\":{number},")) {
        assert!(Instant::now() < until, "{} is not kept: {}", revision, kept());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.terminate();
    assert!(server.wait().success());
    // The backup replaces the store.
    copy(&backup, &world.data());
    let ran = run_with(&mut start(), "").ended(78);
    assert!(ran.stderr.contains(&revision) && ran.stderr.contains("place.json"), "{ran:?}");
    // It does not follow a store of another course either, however far that is ahead.
    let fork = |session: &str| {
        let store = format!("sqlite:{}", world.data().join("store.db").display());
        let mut command = binary();
        command.args(["revoke", "session", session, "--unknown-ok", "--store", &store, "--data"]).arg(world.data());
        run_with(&mut command, "").ended(0);
    };
    (0..3).for_each(|index| fork(&format!("other-{index}")));
    let ran = run_with(&mut start(), "").ended(78);
    assert!(ran.stderr.contains("another revision") && ran.stderr.contains(&revision), "{ran:?}");
    // An unreadable position file is no position to continue from.
    std::fs::write(world.data().join("place.json"), "{}").unwrap();
    let ran = run_with(&mut start(), "").ended(78);
    assert!(ran.stderr.contains("place.json"), "{ran:?}");
    // Only an operator's action starts the replica again.
    std::fs::remove_file(world.data().join("place.json")).unwrap();
    drop(ServerProcess::start_with(&world, &binary()));
}
