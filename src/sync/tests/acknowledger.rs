//! Tests of acknowledgement: with the barrier, with a policy that cannot be built, and in quarantine.

use tokio::sync::Semaphore;

use super::super::{FleetMember, RevisionAcknowledger, RuntimeBarrier};
use super::*;
use crate::model::mutant::{self, Mutant};
use crate::store::sqlite::SqliteStore;
use crate::store::{ReplicaRegistration, ReplicaRow, ReplicaState, Store};
use crate::telemetry::Metrics;

/// A barrier that passes as often as the test permits. It counts how often it was begun and has passed.
struct GatedBarrier {
    begun: watch::Sender<u64>,
    passed: watch::Sender<u64>,
    passes: Semaphore,
}

#[async_trait]
impl RuntimeBarrier for GatedBarrier {
    async fn pass(&self) {
        self.begun.send_modify(|begun| *begun += 1);
        self.passes.acquire().await.unwrap().forget();
        self.passed.send_modify(|passed| *passed += 1);
    }
}

impl GatedBarrier {
    async fn begun(&self, count: u64) {
        self.begun.subscribe().wait_for(|begun| *begun >= count).await.unwrap();
    }

    /// Waits until the barrier has passed that often. The revisions applied at its begin are acknowledged by then.
    async fn passed(&self, count: u64) {
        self.passed.subscribe().wait_for(|passed| *passed >= count).await.unwrap();
    }
}

struct AcknowledgerFixture {
    model: SharedModel,
    status: crate::sync::status::FollowerHandle,
    store: Arc<dyn Store>,
    member: Arc<FleetMember>,
    gate: Arc<GatedBarrier>,
    metrics: Metrics,
    _stop: watch::Sender<bool>,
    _folder: tempfile::TempDir,
}

/// Builds a follower of a model whose member sends heartbeats to a store of its own.
async fn bench() -> AcknowledgerFixture {
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&folder.path().join("s.db"), Arc::new(SystemClock)).unwrap());
    let registration = ReplicaRegistration {
        incarnation: "one".to_owned(),
        address: "node".to_owned(),
        version: "1".to_owned(),
        started_unix_ms: 0,
    };
    let member = FleetMember::new(store.clone(), registration);
    let model = SharedModel(Arc::new(Mutex::new((StoreModel::new("first"), false))), watch::channel(0).0);
    let settings = Settings { poll_interval_ms: 1, ..Settings::default() };
    let clock: Arc<SystemClock> = Arc::new(SystemClock);
    let (follow, status) = FollowerLoop::new(model.clone(), RecordingPublisher::default(), clock.clone(), settings, None);
    let gate = Arc::new(GatedBarrier { begun: watch::channel(0).0, passed: watch::channel(0).0, passes: Semaphore::new(0) });
    let metrics = Metrics::unexported();
    let (stop, stopped) = watch::channel(false);
    let acknowledge = RevisionAcknowledger::new(status.clone(), member.clone(), gate.clone(), clock, metrics.clone());
    tokio::spawn(follow.run(stopped.clone()));
    tokio::spawn(acknowledge.run(stopped));
    assert!(status.wait_until_ready().await);
    AcknowledgerFixture { model, status, store, member, gate, metrics, _stop: stop, _folder: folder }
}

impl AcknowledgerFixture {
    /// Waits until the row of the replica is as expected.
    async fn row(&self, expected: impl Fn(&ReplicaRow) -> bool) -> ReplicaRow {
        let found = async {
            loop {
                self.member.send_heartbeat().await.unwrap();
                let row = self.store.replicas().await.unwrap().rows.remove(0);
                if expected(&row) {
                    return row;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WAIT_MAX, found).await.unwrap()
    }

    async fn acked_now(&self) -> u64 {
        self.row(|_| true).await.acked_number
    }
}

#[tokio::test]
async fn nothing_is_acknowledged_before_the_barrier_has_passed() {
    let bench = bench().await;
    bench.gate.begun(1).await;
    bench.gate.passes.add_permits(1);
    for number in 1..=2 {
        bench.model.with(|(model, _)| model.commit("main"));
        bench.status.wait_for_revision(&bench.model.revision(), WAIT_MAX).await.unwrap();
        bench.gate.begun(number + 1).await;
        // The revision is applied, but a runtime may still hold an earlier decision.
        assert_eq!((bench.status.applied_number(), bench.acked_now().await), (number, number - 1));
        if number == 1 {
            bench.gate.passes.add_permits(1);
            bench.row(|row| row.acked_number == 1).await;
        }
    }
    // The running barrier does not cover the revisions that are applied meanwhile.
    bench.model.with(|(model, _)| model.commit("main"));
    bench.status.wait_for_revision(&bench.model.revision(), WAIT_MAX).await.unwrap();
    bench.gate.passes.add_permits(1);
    bench.row(|row| row.acked_number == 2).await;
    bench.gate.begun(4).await;
    assert_eq!(bench.acked_now().await, 2);
    // A policy that cannot be built delays no acknowledgement of revocations.
    bench.model.with(|(model, _)| model.commit("bad"));
    bench.status.clone().wait_until_applied(4).await;
    bench.gate.passes.add_permits(2);
    bench.row(|row| row.acked_number == 4).await;
    assert_eq!(bench.status.policy_number(), 3);
    assert!(bench.metrics.render_page().contains("portcullis_kill_propagation_seconds_count 4"));
}

/// A handler that the barrier has already passed may decide before a revision that is applied while the barrier runs.
#[test]
fn what_is_applied_while_the_barrier_runs_waits_for_the_next() {
    let acknowledged = |mutant: Option<Mutant>| {
        let run = async {
            let bench = bench().await;
            bench.gate.begun(1).await;
            bench.gate.passes.add_permits(1);
            // Otherwise the first commit could be applied earlier, and a mutant would acknowledge it with this barrier.
            bench.gate.passed(1).await;
            for _ in 0..2 {
                bench.model.with(|(model, _)| model.commit("main"));
                bench.status.wait_for_revision(&bench.model.revision(), WAIT_MAX).await.unwrap();
                bench.gate.begun(2).await;
            }
            bench.gate.passes.add_permits(1);
            bench.row(|row| row.acked_number > 0).await.acked_number
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        mutant::run_with_mutant(mutant, || runtime.block_on(run))
    };
    assert_eq!(acknowledged(None), 1);
    assert_eq!(acknowledged(Some(Mutant::AcknowledgeNewest)), 2, "the mutant is not seen");
}

#[tokio::test]
async fn a_quarantined_replica_acknowledges_nothing_and_says_so() {
    let bench = bench().await;
    bench.gate.begun(1).await;
    bench.gate.passes.add_permits(1);
    bench.model.with(|(model, _)| model.commit("main"));
    bench.gate.begun(2).await;
    bench.gate.passes.add_permits(1);
    bench.row(|row| row.acked_number == 1).await;
    // The revision is applied and not acknowledged yet when the store turns out to be another one.
    bench.model.with(|(model, _)| model.commit("main"));
    bench.gate.begun(3).await;
    bench.model.with(|(model, _)| model.history = StoreModel::new("second").history);
    let quarantined = async {
        while bench.status.state() != FollowerState::Quarantined {
            bench.status.request_poll();
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(WAIT_MAX, quarantined).await.unwrap();
    bench.gate.passes.add_permits(1);
    bench.gate.begun(4).await;
    assert_eq!(bench.acked_now().await, 1, "what it followed need not be what the store holds");
    bench.gate.passes.add_permits(1);
    let row = bench.row(|row| row.state == ReplicaState::Quarantined).await;
    assert_eq!((row.applied_number, row.acked_number), (0, 0));
}
