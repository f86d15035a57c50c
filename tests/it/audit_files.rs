//! The audit files of a running server are moved, removed, shortened and rotated, and their folder cannot be written.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use portcullis::api::r#gen::decision_service_client::DecisionServiceClient;
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::harness::{PATIENCE, ServerProcess, TestWorld, audit_lines, channel, request};

const CLIENTS: usize = 3;
/// Permits to wait for at each step.
const PERMITS_MIN: usize = 50;
const FAILURES: &str = "portcullis_audit_failures_total";
const UNWRITABLE: &str = "portcullis_audit_unwritable";

/// Clients that ask until they are told to stop, and connect again when they are cut.
struct Load {
    stopped: Arc<AtomicBool>,
    permitted: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    /// Starts the clients. Each has got a permit by the end.
    async fn start(server: &ServerProcess, world: &TestWorld) -> Self {
        let (stopped, permitted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = Vec::new();
        for client in 0..CLIENTS {
            let (address, call) = (server.decisions.clone(), look(world, &format!("s-{client}")));
            let mut connection = server.connect().await;
            let first = connection.check(call.clone()).await.unwrap().into_inner();
            assert_eq!(first.reason, "OK");
            let (stopped, permitted) = (stopped.clone(), permitted.clone());
            tasks.push(tokio::spawn(async move {
                let mut permits = vec![first.decision_id];
                while !stopped.load(Ordering::Acquire) {
                    let Ok(answer) = connection.check(call.clone()).await else {
                        connection = DecisionServiceClient::new(channel(&address).await);
                        continue;
                    };
                    let answer = answer.into_inner();
                    if answer.reason == "OK" {
                        permits.push(answer.decision_id);
                        permitted.fetch_add(1, Ordering::Relaxed);
                    } else {
                        assert_eq!(answer.reason, "AUDIT_UNAVAILABLE");
                    }
                }
                permits
            }));
        }
        Self { stopped, permitted, tasks }
    }

    /// Waits for further permits.
    async fn go_on(&self) {
        let enough = self.permitted.load(Ordering::Relaxed) + PERMITS_MIN;
        until("no permits come", || self.permitted.load(Ordering::Relaxed) >= enough).await;
    }

    /// The decision ids of all permits.
    async fn end(self) -> Vec<String> {
        self.stopped.store(true, Ordering::Release);
        let mut permits = Vec::new();
        for task in self.tasks {
            permits.extend(task.await.unwrap());
        }
        permits
    }
}

async fn until(problem: &str, reached: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < until, "{problem}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn look(world: &TestWorld, session: &str) -> portcullis::api::r#gen::CheckRequest {
    request(&world.session("alpha", session), Bytes::new(), "crm/look", "{}")
}

async fn wait_for_health(told: &mut tonic::Streaming<HealthCheckResponse>, expected: ServingStatus) {
    let reached = async { while told.message().await.unwrap().unwrap().status() != expected {} };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("health is not {expected:?}"));
}

/// The audit files of a data folder.
fn files_of(data: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(data.join("audit")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// The permits that no record in these data folders names.
fn unrecorded(permits: &[String], folders: &[&Path]) -> usize {
    let lines: Vec<_> = folders.iter().flat_map(|data| audit_lines(data)).collect();
    let recorded: std::collections::BTreeSet<&str> = lines.iter().filter_map(|line| line["decision_id"].as_str()).collect();
    permits.iter().filter(|id| !recorded.contains(id.as_str())).count()
}

/// Audit files that are taken away under load are a failure. The server continues in new files, in which later permits are found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_taken_away_are_a_failure_and_new_ones_follow() {
    type Harm = (&'static str, fn(&Path));
    let harms: [Harm; 4] = [
        ("files removed", |data| files_of(data).iter().for_each(|path| std::fs::remove_file(path).unwrap())),
        ("folder removed", |data| std::fs::remove_dir_all(data.join("audit")).unwrap()),
        ("folder moved", |data| {
            std::fs::create_dir(data.join("moved")).unwrap();
            std::fs::rename(data.join("audit"), data.join("moved/audit")).unwrap();
        }),
        ("files emptied", |data| {
            files_of(data).iter().for_each(|path| drop(File::options().write(true).truncate(true).open(path).unwrap()));
        }),
    ];
    for (name, harm) in harms {
        let world = TestWorld::new();
        let mut server = ServerProcess::start(&world);
        let load = Load::start(&server, &world).await;
        load.go_on().await;
        assert!(server.metric(FAILURES) == 0.0, "{name}");
        // A file that nothing was written to can be removed, but not emptied.
        let is_harmed = |path: &PathBuf| name != "files emptied" || std::fs::metadata(path).unwrap().len() > 0;
        let harmed = files_of(&server.data).iter().filter(|path| is_harmed(path)).count();
        harm(&server.data);
        let problem = format!("{name}: the loss of {harmed} files is not noticed");
        until(&problem, || server.metric(FAILURES) >= harmed as f64).await;
        until(&format!("{name}: it is never ready again"), || server.get("/readyz").0 == 200).await;
        load.go_on().await;
        let permits = load.end().await;
        if name == "folder moved" {
            let moved = server.data.join("moved");
            assert_eq!(unrecorded(&permits, &[server.data.as_path(), moved.as_path()]), 0, "{name}");
        }
        let answer = server.connect().await.check(look(&world, "after")).await.unwrap().into_inner();
        assert_eq!(answer.reason, "OK", "{name}");
        server.terminate();
        assert_eq!(server.wait().code(), Some(0), "{name}: {}", server.log());
        assert_eq!(unrecorded(&[answer.decision_id], &[server.data.as_path()]), 0, "{name}");
        assert!(server.audit().iter().any(|line| line["kind"] == "gap"), "{name}: no line says that records may be missing");
    }
}

/// While the audit log cannot be written, the server says that it is not ready. It recovers by itself.
#[tokio::test]
async fn a_server_without_an_audit_log_is_not_ready() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let folder = server.data.join("audit");
    let recorders = files_of(&server.data).len();
    std::fs::rename(&folder, server.data.join("moved")).unwrap();
    std::fs::write(&folder, "no folder").unwrap();
    let cause = "not ready: the audit log cannot be written";
    let is_unready = || matches!(server.get("/readyz"), (503, text) if text.contains(cause));
    until("`/readyz` is 200 while nothing can be recorded", is_unready).await;
    until("a recorder does not notice that its file is gone", || server.metric(FAILURES) >= recorders as f64).await;
    let mut health = HealthClient::new(channel(&server.decisions).await);
    let mut told = health.watch(HealthCheckRequest { service: String::new() }).await.unwrap().into_inner();
    wait_for_health(&mut told, ServingStatus::NotServing).await;
    let mut client = server.connect().await;
    let answer = client.check(look(&world, "s")).await.unwrap().into_inner();
    assert_eq!(answer.reason, "AUDIT_UNAVAILABLE");
    assert_eq!((server.metric(FAILURES), server.metric(UNWRITABLE)), (recorders as f64, 1.0), "one failure each, while it lasts");

    std::fs::remove_file(&folder).unwrap();
    until("it does not recover", || server.get("/readyz").0 == 200).await;
    wait_for_health(&mut told, ServingStatus::Serving).await;
    let answer = client.check(look(&world, "s")).await.unwrap().into_inner();
    assert_eq!((answer.reason.as_str(), server.metric(UNWRITABLE)), ("OK", 0.0));
    assert_eq!(unrecorded(&[answer.decision_id], &[server.data.as_path()]), 0);
}

/// SIGHUP ends nothing. The server continues in new audit files, and what it finished can be moved away: nothing is lost or denied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_rotates_the_audit_files_and_ends_nothing() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    server.signal(Signal::HUP);
    let load = Load::start(&server, &world).await;
    let archive = server.data.join("archive");
    std::fs::create_dir_all(archive.join("audit")).unwrap();
    for round in 0..3 {
        load.go_on().await;
        let finished = || {
            let is_finished = |path: &PathBuf| {
                let file = File::open(path).unwrap();
                file.metadata().unwrap().len() > 0 && file.try_lock().is_ok()
            };
            files_of(&server.data).into_iter().filter(is_finished).collect::<Vec<_>>()
        };
        server.signal(Signal::HUP);
        until(&format!("round {round}: no file is finished: {}", server.log()), || !finished().is_empty()).await;
        for path in finished() {
            std::fs::rename(&path, archive.join("audit").join(path.file_name().unwrap())).unwrap();
        }
    }
    load.go_on().await;
    let permits = load.end().await;
    assert!(server.metric(FAILURES) == 0.0 && server.get("/readyz").0 == 200, "{}", server.log());
    assert!(server.log().contains("SIGHUP: the audit files are opened anew"));
    server.terminate();
    assert_eq!(server.wait().code(), Some(0), "{}", server.log());
    assert_eq!(unrecorded(&permits, &[server.data.as_path(), archive.as_path()]), 0);
}
