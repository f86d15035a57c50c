//! A store that was lost and restored, and a store that cannot be reached: the drill of OPERATIONS with the real program, on both
//! engines.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use serde_json::json;

use crate::harness::{CommandResult, PATIENCE, ServerProcess, TestChain, TestWorld, agent_id, binary, request, run_with};
use crate::postgres;

async fn look(server: &ServerProcess, chain: &TestChain) -> wire::CheckResponse {
    let asked = request(chain, Bytes::new(), "crm/look", "{}");
    server.connect().await.check(asked).await.unwrap().into_inner()
}

async fn reason(server: &ServerProcess, chain: &TestChain) -> String {
    let answer = look(server, chain).await;
    assert_eq!(answer.effect() == wire::Effect::Permit, answer.reason == "OK", "{answer:?}");
    answer.reason
}

/// Returns the reason once it is none of `passing`.
async fn settled(server: &ServerProcess, chain: &TestChain, passing: &[&str]) -> String {
    let until = Instant::now() + PATIENCE;
    loop {
        let reason = reason(server, chain).await;
        if !passing.contains(&reason.as_str()) {
            return reason;
        }
        assert!(Instant::now() < until, "still {reason}: {}", server.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A root issued after the watermark, so that the watermark does not void it. It lies some seconds ahead of the clock.
fn fresh(world: &TestWorld, agent: &'static str, session: &str, watermark_unix_s: i64) -> TestChain {
    world.root(agent, |claims| {
        claims["sid"] = json!(session);
        claims["iat"] = json!(watermark_unix_s + 1);
    })
}

const AHEAD: &[&str] = &["TOKEN_TIMES", "TOKEN_NOT_YET_VALID", "TOKEN_ISSUED_AHEAD", "TOKEN_FUTURE"];

fn serve(flags: &Command, data: &Path) -> Command {
    let mut command = binary();
    command.arg("serve").args(flags.get_args());
    for (name, value) in flags.get_envs() {
        command.env(name, value.unwrap());
    }
    command.args(["--listen", "--http-listen", "--admin-listen"].iter().flat_map(|flag| [*flag, "127.0.0.1:0"]));
    command.arg("--data").arg(data);
    command
}

/// Waits until the data folder holds this revision.
async fn kept(data: &Path, revision: &str) {
    let number = revision.rsplit('.').next().unwrap().to_owned();
    let until = Instant::now() + PATIENCE;
    while !std::fs::read_to_string(data.join("place.json")).unwrap_or_default().contains(&format!("\"number\":{number},")) {
        assert!(Instant::now() < until, "{revision} is not kept");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn copy_store(from: &Path, to: &Path) {
    for name in ["store.db", "store.db-wal", "store.db-shm"] {
        let _ = std::fs::remove_file(to.join(name));
        if from.join(name).exists() && name != "store.db-shm" {
            std::fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

fn adopt(store: &str, data: &Path, more: &[&str]) -> CommandResult {
    let mut command = binary();
    command.args(["--json", "store", "adopt", "--reason", "drill", "--store", store]).args(more).arg("--data").arg(data);
    if store.starts_with("postgres") {
        command.env("PORTCULLIS_STORE_DURABILITY", "single");
    }
    run_with(&mut command, "")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_file_brings_no_killed_session_back() {
    let world = TestWorld::new();
    let backup = world.folder.path().join("backup");
    std::fs::create_dir(&backup).unwrap();
    let store = format!("sqlite:{}", world.data().join("store.db").display());
    let mut server = ServerProcess::start(&world);
    let chains = ["late", "other"].map(|session| world.session("alpha", session));
    assert_eq!(reason(&server, &chains[0]).await, "OK");
    server.terminate();
    assert!(server.wait().success());
    copy_store(&world.data(), &backup);

    // The backup does not contain these revocations.
    let mut server = ServerProcess::start_with(&world, &binary());
    let operator = server.operator().await;
    operator.revoke("session", &["late"], wire::RevocationMeaning::Dead).await;
    let revision = operator.revoke("agent", &[&agent_id("beta")], wire::RevocationMeaning::Suspend).await;
    kept(&world.data(), &revision).await;
    server.terminate();
    assert!(server.wait().success());
    copy_store(&backup, &world.data());
    let refused = run_with(&mut serve(&binary(), &world.data()), "").ended(78);
    assert!(refused.stderr.contains("portcullis store adopt") && refused.stderr.contains("place.json"), "{refused:?}");

    // A stranger cannot adopt.
    let mut stranger = binary();
    stranger.args(["store", "adopt", "--store", &store, "--data"]).arg(world.data());
    stranger.arg("--operator-key").arg(world.key_file("stranger"));
    assert!(run_with(&mut stranger, "").ended(1).stderr.contains("no operator has the key"));
    run_with(&mut serve(&binary(), &world.data()), "").ended(78);

    let said = adopt(&store, &world.data(), &[]).ended(0).json();
    assert_ne!(said["revision"], said["adopted_from"]);
    let watermark = said["watermark_unix_s"].as_i64().unwrap();
    let server = ServerProcess::start_with(&world, &binary());
    // Every answer denies, from the first one on.
    for chain in &chains {
        assert_eq!(reason(&server, chain).await, "REVOKED_ALL", "a root from before");
    }
    let of_late = fresh(&world, "alpha", "late", watermark);
    assert_eq!(settled(&server, &of_late, AHEAD).await, "REVOKED_SESSION", "it was merged");
    assert_eq!(settled(&server, &fresh(&world, "beta", "b", watermark), AHEAD).await, "AGENT_SUSPENDED");
    let chain = fresh(&world, "alpha", "other", watermark);
    assert_eq!(settled(&server, &chain, AHEAD).await, "OK");
    assert!(server.log().contains("was merged into the adopted store"), "{}", server.log());
    // The adopted store works fully: a revocation, its acknowledgement, another start.
    let mut kill = binary();
    kill.args(["--json", "revoke", "session", "other", "--wait", "fleet", "--target"]).arg(server.admin_url());
    let killed = run_with(kill.arg("--data").arg(world.data()), "").ended(0).json();
    let replicas = killed["fleet"]["replicas"].as_array().unwrap();
    assert!(replicas.iter().any(|one| one["outcome"] == "acknowledged"), "{killed}");
    assert_eq!(reason(&server, &chain).await, "REVOKED_SESSION");
    let listed =
        binary().args(["--json", "revocations", "--target"]).arg(server.admin_url()).arg("--data").arg(world.data()).output();
    let listed: serde_json::Value = serde_json::from_slice(&listed.unwrap().stdout).unwrap();
    assert_eq!(listed["total"], 4, "{listed}");
    let mut server = server;
    server.terminate();
    assert!(server.wait().success());
    let server = ServerProcess::start_with(&world, &binary());
    assert_eq!(reason(&server, &of_late).await, "REVOKED_SESSION");
    // A running server adopts nothing, and the audit log names the operator who adopted.
    let acts = server.audit();
    assert!(acts.iter().any(|line| line["method"] == "/portcullis.v1.FleetService/Adopt" && line["effect"] == "ACCEPTED"));
    drop(server);

    // The same backup is restored again. The history followed last is none that this store was adopted from.
    copy_store(&backup, &world.data());
    adopt(&store, &world.data(), &[]).ended(0);
    let refused = run_with(&mut serve(&binary(), &world.data()), "").ended(78);
    assert!(refused.stderr.contains("place.json"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_a_cache_follows_an_adopted_store_and_warns() {
    let world = TestWorld::new();
    let store = format!("sqlite:{}", world.data().join("store.db").display());
    let mut server = ServerProcess::start(&world);
    let revision = server.operator().await.revoke("session", &["s"], wire::RevocationMeaning::Dead).await;
    kept(&world.data(), &revision).await;
    server.terminate();
    assert!(server.wait().success());
    let backup = world.folder.path().join("backup");
    std::fs::create_dir(&backup).unwrap();
    copy_store(&world.data(), &backup);
    let mut server = ServerProcess::start_with(&world, &binary());
    let revision = server.operator().await.revoke("session", &["late"], wire::RevocationMeaning::Dead).await;
    kept(&world.data(), &revision).await;
    server.terminate();
    assert!(server.wait().success());
    copy_store(&backup, &world.data());
    for name in ["cache.db", "cache.db-wal", "cache.db-shm"] {
        let _ = std::fs::remove_file(world.data().join(name));
    }
    let watermark = adopt(&store, &world.data(), &[]).ended(0).json()["watermark_unix_s"].as_i64().unwrap();
    let server = ServerProcess::start_with(&world, &binary());
    assert!(server.log().contains("kept nothing to merge"), "{}", server.log());
    assert_eq!(reason(&server, &world.session("alpha", "late")).await, "REVOKED_ALL");
    assert_eq!(settled(&server, &fresh(&world, "alpha", "s", watermark), AHEAD).await, "REVOKED_SESSION");
}

/// A database of the shared server, with its backup.
struct RestorableDatabase {
    name: String,
    url: String,
}

impl RestorableDatabase {
    fn new() -> Self {
        let url = postgres::shared().database();
        let name = url.split('/').nth(3).unwrap().split('?').next().unwrap().to_owned();
        Self { name, url }
    }

    fn sql(sql: &str) {
        postgres::shared().sql("postgres", sql);
    }

    /// Makes the database unreachable for everyone.
    fn close(&self) {
        let name = &self.name;
        Self::sql(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"));
        let mut left = String::from("1");
        while left != "0" {
            Self::sql(&format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'"));
            left = postgres::shared().sql("postgres", &format!("SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"));
        }
    }

    fn open(&self) {
        Self::sql(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", self.name));
    }

    fn back_up(&self) {
        self.close();
        Self::sql(&format!("CREATE DATABASE {0}_backup TEMPLATE {0}", self.name));
        self.open();
    }

    fn restore(&self) {
        self.close();
        Self::sql(&format!("DROP DATABASE {}", self.name));
        Self::sql(&format!("CREATE DATABASE {0} TEMPLATE {0}_backup", self.name));
    }

    fn flags(&self) -> Command {
        let mut command = binary();
        command.env("PORTCULLIS_STORE", &self.url).env("PORTCULLIS_STORE_DURABILITY", "single");
        command
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_fleet_leaves_quarantine_when_its_restored_store_is_adopted() {
    let world = TestWorld::new();
    let database = RestorableDatabase::new();
    let data = ["one", "two", "three"].map(|name| world.folder.path().join(name));
    let mut first = database.flags();
    first.arg("--policies").arg(world.policies());
    let mut servers = vec![ServerProcess::start_at(&world, &first, &data[0])];
    servers.extend(data[1..].iter().map(|data| ServerProcess::start_at(&world, &database.flags(), data)));
    let (alpha, beta) = (world.session("alpha", "a"), world.session("beta", "b"));
    for server in &servers {
        assert_eq!([reason(server, &alpha).await, reason(server, &beta).await], ["OK", "OK"]);
    }
    tokio::task::block_in_place(|| database.back_up());
    for server in &servers {
        assert_eq!(settled(server, &alpha, &["STALE"]).await, "OK", "the store was away for a moment");
    }
    // These revocations follow the backup, no watermark covers them, and every replica knows them.
    let operator = servers[0].operator().await;
    operator.revoke("session", &["dead"], wire::RevocationMeaning::Dead).await;
    let revision = operator.revoke("agent", &[&agent_id("beta")], wire::RevocationMeaning::Suspend).await;
    for (server, data) in servers.iter().zip(&data) {
        assert_eq!(settled(server, &beta, &["OK"]).await, "AGENT_SUSPENDED");
        kept(data, &revision).await;
    }
    // One replica is stopped when the store is lost.
    let mut third = servers.pop().unwrap();
    third.terminate();
    assert!(third.wait().success());

    tokio::task::block_in_place(|| database.restore());
    for server in &servers {
        assert_eq!(settled(server, &alpha, &["OK"]).await, "STALE");
        let until = Instant::now() + PATIENCE;
        while !server.get("/readyz").1.contains("quarantined") {
            assert!(Instant::now() < until, "{:?}", server.get("/readyz"));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(server.get("/readyz").1.contains("adopt"), "{:?}", server.get("/readyz"));
    }
    let mut refused = serve(&database.flags(), &data[2]);
    assert!(run_with(&mut refused, "").ended(78).stderr.contains("portcullis store adopt"));

    let began = Instant::now();
    let adopted = tokio::task::block_in_place(|| adopt(&database.url, &data[0], &["--wait", "60"])).ended(0).json();
    let took = began.elapsed();
    let fleet = &adopted["fleet"];
    assert_eq!(fleet["complete"], true, "{adopted}");
    let replicas: Vec<_> = fleet["replicas"].as_array().unwrap().iter().filter(|one| one["follows"] == true).collect();
    assert_eq!(replicas.len(), 2, "{adopted}");
    assert_eq!(replicas.iter().map(|one| one["merged"].as_u64().unwrap()).sum::<u64>(), 2, "{adopted}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    let watermark = adopted["watermark_unix_s"].as_i64().unwrap();
    // The replica that was stopped merges its revocations when it starts.
    servers.push(ServerProcess::start_at(&world, &database.flags(), &data[2]));
    let (late, dead) = (fresh(&world, "beta", "b2", watermark), fresh(&world, "alpha", "dead", watermark));
    let good = fresh(&world, "alpha", "a2", watermark);
    for server in &servers {
        let until = Instant::now() + PATIENCE;
        while server.get("/readyz").0 != 200 {
            assert!(Instant::now() < until, "{:?}", server.get("/readyz"));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(reason(server, &alpha).await, "REVOKED_ALL", "a root from before");
        assert_eq!(settled(server, &late, AHEAD).await, "AGENT_SUSPENDED");
        assert_eq!(settled(server, &dead, AHEAD).await, "REVOKED_SESSION");
        assert_eq!(settled(server, &good, AHEAD).await, "OK");
    }
    // The kill switch works as before, on all replicas at once.
    let mut kill = binary();
    kill.args(["--json", "revoke", "session", "a2", "--wait", "fleet", "--target"]).arg(servers[1].admin_url());
    let killed = run_with(kill.arg("--data").arg(&data[0]), "").ended(0).json();
    let outcomes: Vec<_> =
        killed["fleet"]["replicas"].as_array().unwrap().iter().filter(|one| one["outcome"] == "acknowledged").collect();
    assert_eq!(outcomes.len(), 3, "{killed}");
    for server in &servers {
        assert_eq!(reason(server, &good).await, "REVOKED_SESSION");
    }
}

/// A replica's data folder that is restored together with the database agrees with it. Another replica was not restored; it knows
/// better and reports that.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replica_that_was_put_back_with_its_store_does_not_start() {
    let world = TestWorld::new();
    let database = RestorableDatabase::new();
    let data = ["one", "two"].map(|name| world.folder.path().join(name));
    let mut first = database.flags();
    first.arg("--policies").arg(world.policies());
    let mut servers = vec![ServerProcess::start_at(&world, &first, &data[0])];
    servers.push(ServerProcess::start_at(&world, &database.flags(), &data[1]));
    let alpha = world.session("alpha", "dead");
    let mut second = servers.pop().unwrap();
    assert_eq!(reason(&second, &alpha).await, "OK");
    second.terminate();
    assert!(second.wait().success());
    let place = std::fs::read(data[1].join("place.json")).unwrap();
    tokio::task::block_in_place(|| database.back_up());
    assert_eq!(settled(&servers[0], &alpha, &["STALE"]).await, "OK");
    let revision = servers[0].operator().await.revoke("session", &["dead"], wire::RevocationMeaning::Dead).await;
    kept(&data[0], &revision).await;
    tokio::task::block_in_place(|| database.restore());
    let until = Instant::now() + PATIENCE;
    let says_so = "SELECT count(*) FROM portcullis.replicas WHERE state = 'quarantined'";
    while tokio::task::block_in_place(|| postgres::shared().sql(&database.name, says_so)) != "1" {
        assert!(Instant::now() < until, "{:?}", servers[0].get("/readyz"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(std::fs::read(data[1].join("place.json")).unwrap(), place, "it agrees with the store");
    let refused = tokio::task::block_in_place(|| run_with(&mut serve(&database.flags(), &data[1]), "")).ended(78);
    assert!(refused.stderr.contains("is quarantined") && refused.stderr.contains("store adopt"), "{refused:?}");
    let adopted = tokio::task::block_in_place(|| adopt(&database.url, &data[0], &["--wait", "60"])).ended(0).json();
    assert_eq!(adopted["fleet"]["complete"], true, "{adopted}");
    let watermark = adopted["watermark_unix_s"].as_i64().unwrap();
    let second = ServerProcess::start_at(&world, &database.flags(), &data[1]);
    assert_eq!(reason(&second, &alpha).await, "REVOKED_ALL");
    assert_eq!(settled(&second, &fresh(&world, "alpha", "dead", watermark), AHEAD).await, "REVOKED_SESSION");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replica_starts_from_its_cache_and_permits_nothing_by_it() {
    let world = TestWorld::new();
    let database = RestorableDatabase::new();
    let data = world.data();
    let mut flags = database.flags();
    flags.arg("--policies").arg(world.policies());
    let mut server = ServerProcess::start_at(&world, &flags, &data);
    let (alpha, beta) = (world.session("alpha", "a"), world.session("beta", "b"));
    assert_eq!([reason(&server, &alpha).await, reason(&server, &beta).await], ["OK", "OK"]);
    let revision = server.operator().await.revoke("session", &["s"], wire::RevocationMeaning::Dead).await;
    kept(&data, &revision).await;
    server.terminate();
    assert!(server.wait().success());
    // An agent is revoked while the replica is down; then the store is made unreachable.
    let mut kill = database.flags();
    kill.args(["revoke", "agent", &agent_id("beta"), "--store", "env:PORTCULLIS_STORE", "--data"]).arg(&data);
    run_with(&mut kill, "").ended(0);
    tokio::task::block_in_place(|| database.close());

    let server = ServerProcess::start_at(&world, &database.flags(), &data);
    for _ in 0..20 {
        assert_eq!([reason(&server, &alpha).await, reason(&server, &beta).await], ["STALE", "STALE"]);
        assert_eq!(
            reason(&server, &world.session("alpha", "s")).await,
            "REVOKED_SESSION",
            "what was kept denies by its own reason"
        );
    }
    let (code, said) = server.get("/readyz");
    assert!(code == 503 && said.contains("closed") && said.contains("runs from its cache of revision"), "{code} {said}");
    database.open();
    let until = Instant::now() + PATIENCE;
    loop {
        // The agent that was revoked in the meantime is never permitted, whichever comes first.
        let of_beta = reason(&server, &beta).await;
        assert!(["STALE", "AGENT_SUSPENDED"].contains(&of_beta.as_str()), "{of_beta}");
        if reason(&server, &alpha).await == "OK" {
            break;
        }
        assert!(Instant::now() < until, "still {:?}: {}", server.get("/readyz"), server.log());
    }
    assert_eq!(reason(&server, &beta).await, "AGENT_SUSPENDED");
    assert_eq!(server.get("/readyz").0, 200);
    drop(server);

    // The server of the store is not configured as claimed. The replica is never fresh, and says why.
    tokio::task::block_in_place(|| database.close());
    let mut claimed = database.flags();
    claimed.env("PORTCULLIS_STORE_DURABILITY", "synchronous");
    let server = ServerProcess::start_at(&world, &claimed, &data);
    database.open();
    let until = Instant::now() + PATIENCE;
    while !server.get("/readyz").1.contains("synchronous_standby_names") {
        assert!(Instant::now() < until, "{:?}", server.get("/readyz"));
        assert_eq!(reason(&server, &alpha).await, "STALE");
    }
    assert_eq!(reason(&server, &alpha).await, "STALE");
    assert!(server.log().contains("set up as it must be"), "{}", server.log());
    drop(server);

    // A replica does not start from a damaged cache, or without one.
    tokio::task::block_in_place(|| database.close());
    std::fs::write(data.join("cache.db"), "no cache").unwrap();
    for _ in 0..2 {
        let ran = run_with(&mut serve(&database.flags(), &data), "").ended(69);
        assert!(ran.stderr.contains("cannot be reached"), "{ran:?}");
    }
    assert!(data.join("cache.db.broken").exists());
}

/// A backup lists an operator who was retired later. The replicas merge that the key is dead.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_retired_after_the_backup_stays_dead() {
    let world = TestWorld::new();
    let backup = world.folder.path().join("backup");
    std::fs::create_dir(&backup).unwrap();
    let store = format!("sqlite:{}", world.data().join("store.db").display());
    let (local, ada) = (world.data().join("local.jwk"), world.folder.path().join("ada.jwk"));
    let act = |server: &ServerProcess, keys: &[&Path], arguments: &[&str]| {
        let mut command = binary();
        command.arg("--json").args(arguments).arg("--target").arg(server.admin_url()).arg("--data").arg(world.data());
        command.args(keys.iter().flat_map(|key| [Path::new("--operator-key"), key]));
        run_with(&mut command, "")
    };
    let mut server = ServerProcess::start(&world);
    let roles = ["--role", "administer", "--role", "respond"];
    act(&server, &[&local], &[&["operator", "add", "ada", "--out", ada.to_str().unwrap()], &roles[..]].concat()).ended(0);
    server.terminate();
    assert!(server.wait().success());
    copy_store(&world.data(), &backup);

    let mut server = ServerProcess::start_with(&world, &binary());
    let retired = act(&server, &[&local, &ada], &["operator", "retire", "local"]).ended(0).json();
    kept(&world.data(), retired["revision"].as_str().unwrap()).await;
    server.terminate();
    assert!(server.wait().success());
    copy_store(&backup, &world.data());
    adopt(&store, &world.data(), &["--operator-key", ada.to_str().unwrap()]).ended(0);

    let server = ServerProcess::start_with(&world, &binary());
    let until = Instant::now() + PATIENCE;
    loop {
        let ran = act(&server, &[&local], &["revocations"]);
        if ran.code == 1 && ran.stderr.contains("of operator `local` is revoked") {
            break;
        }
        assert!(Instant::now() < until, "{ran:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let listed = act(&server, &[&ada], &["operator", "list"]).ended(0).json();
    let states: Vec<_> = listed["operators"].as_array().unwrap().iter().map(|one| one["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["active", "revoked"], "{listed}");
}
