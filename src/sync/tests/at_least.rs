//! Tests promise 4 with the real parts: a call with `at_least` is never answered from an older snapshot.
//!
//! A SQLite file has its follower on a thread of its own and the service on two serving threads. A writer alternately permits and
//! denies an agent, by revocation and by policy in turn. All callers request a revision as soon as the store has acknowledged it
//! to the writer, so before or while the follower applies it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use futures_util::future::join_all;
use tokio::sync::watch;

use super::super::{CellPublisher, FleetMember, FollowerLoop, Settings};
use super::sim::{AlternatingPolicy, NoApprovals, START_UNIX_S};
use crate::app::wiring::{FollowerCatchUp, StoreProofLedger};
use crate::audit::AuditRecorder;
use crate::model::decision::Effect;
use crate::model::mutant::{self, Mutant};
use crate::model::reason::Reason;
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::{Clock, ClockReading, SystemClock};
use crate::revocation::RevocationIndex;
use crate::service::{PdpService, ServiceParts, request::Caller};
use crate::snapshot::SnapshotCell;
use crate::store::sqlite::SqliteStore;
use crate::store::{CommitRequest, ReplicaRegistration, Store};
use crate::telemetry::{Metrics, SpanRecorder};
use crate::testing::case_count::case_count;

/// Answers in the ordinary run.
const ANSWERS: u32 = 10_000;
const SERVING_THREADS: usize = 2;
/// Concurrent calls of one serving thread.
const CALLS: usize = 16;

/// The machine's clock, shifted to the time at which the credentials are valid.
struct OffsetClock {
    began: ClockReading,
}

impl Clock for OffsetClock {
    fn now(&self) -> ClockReading {
        let now = SystemClock.now();
        let run_ns = now.boot_ns - self.began.boot_ns;
        ClockReading { unix_ns: START_UNIX_S * 1_000_000_000 + run_ns, boot_ns: now.boot_ns }
    }
}

/// The writer's results, stored before any caller can read the revision.
struct SharedWriterState {
    history: HistoryId,
    /// Whether the call is permitted, by revision number.
    permitted: RwLock<Vec<bool>>,
    /// The newest number that the store has acknowledged.
    acknowledged: watch::Sender<u64>,
}

/// The results of the callers.
#[derive(Default)]
struct CallerResults {
    answered: AtomicU64,
    unavailable: AtomicU64,
    wrong: RwLock<Vec<String>>,
}

fn on_its_own_runtime<F: Future<Output = ()>>(task: F) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(task);
}

/// Commits until no caller is left.
async fn write(store: Arc<dyn Store>, written: Arc<SharedWriterState>) {
    for number in 2.. {
        let (writes, permitted) = AlternatingPolicy::turn(number);
        written.permitted.write().unwrap().push(permitted);
        let committed = store.commit(CommitRequest { writes, ..CommitRequest::default() }).await.unwrap();
        assert_eq!(committed.revision.number, number);
        if written.acknowledged.send(number).is_err() {
            return;
        }
    }
}

/// Calls until there are enough answers.
async fn call(service: Arc<PdpService>, written: Arc<SharedWriterState>, told: Arc<CallerResults>, answers: u64) {
    let recorder = Arc::new(AuditRecorder::discarding("at_least"));
    let runtime_service = service.runtime_service(recorder.clone());
    let caller = Caller { connection_id: 1, address: "gateway".into(), is_loopback: true };
    let one = async || {
        let mut acknowledged = written.acknowledged.subscribe();
        while told.answered.load(Ordering::Relaxed) < answers && told.wrong.read().unwrap().is_empty() {
            acknowledged.changed().await.unwrap();
            let asked = *acknowledged.borrow_and_update();
            let at_least = Revision { history: written.history.clone(), number: asked };
            let answer = runtime_service.check(&AlternatingPolicy::request(at_least), &caller).await.unwrap();
            recorder.flush().unwrap();
            if answer.decision.reason == Reason::RevisionUnavailable {
                told.unavailable.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            told.answered.fetch_add(1, Ordering::Relaxed);
            let number = answer.revision.unwrap().number;
            let permits = answer.decision.effect == Effect::Permit;
            let expected = written.permitted.read().unwrap()[usize::try_from(number).unwrap()];
            if number < asked || permits && !expected {
                let what =
                    format!("{asked} was asked for: {:?} from {number}, where {expected} is right", answer.decision.reason);
                told.wrong.write().unwrap().push(what);
            }
        }
    };
    join_all((0..CALLS).map(|_| one())).await;
}

/// Runs until there are enough answers, with a mutant if one is given. Returns the number of unavailable answers and the wrong ones.
fn run(answers: u64, mutant: Option<Mutant>) -> (u64, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(OffsetClock { began: SystemClock.now() });
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&folder.path().join("s"), clock.clone()).unwrap());
    let first = CommitRequest { writes: AlternatingPolicy::policy(), ..CommitRequest::default() };
    let mut history = None;
    on_its_own_runtime(async { history = Some(store.commit(first).await.unwrap().revision.history) });
    let written = Arc::new(SharedWriterState {
        history: history.unwrap(),
        permitted: RwLock::new(vec![false, true]),
        acknowledged: watch::channel(1).0,
    });
    let cell = Arc::new(SnapshotCell::default());
    let publisher = CellPublisher::new(cell.clone(), Arc::new(RevocationIndex::new()));
    let registration = ReplicaRegistration {
        incarnation: "one".to_owned(),
        address: "node".to_owned(),
        version: "1".to_owned(),
        started_unix_ms: 0,
    };
    let member = FleetMember::new(store.clone(), registration);
    let (follow, status) = FollowerLoop::new(member, publisher, clock.clone(), Settings::default(), None);
    let parts = ServiceParts {
        snapshot_cell: cell.clone(),
        ledger: Arc::new(StoreProofLedger(store.clone())),
        approvals: Arc::new(NoApprovals),
        catch_up: Arc::new(FollowerCatchUp { status: status.clone(), cell }),
        metrics: Metrics::unexported(),
        spans: SpanRecorder::disabled(),
        clock,
        spawn: Arc::new(|work| drop(tokio::spawn(work))),
    };
    let service = Arc::new(PdpService::new(parts, crate::service::Settings::default()));
    let (stop, stopped) = watch::channel(false);
    let told = Arc::new(CallerResults::default());
    std::thread::scope(|scope| {
        scope.spawn(|| on_its_own_runtime(follow.run(stopped)));
        on_its_own_runtime(async { assert!(status.wait_until_ready().await) });
        service.mark_ready();
        let serving = || {
            mutant::run_with_mutant(mutant, || on_its_own_runtime(call(service.clone(), written.clone(), told.clone(), answers)))
        };
        let serving: Vec<_> = (0..SERVING_THREADS).map(|_| scope.spawn(serving)).collect();
        while written.acknowledged.receiver_count() < SERVING_THREADS * CALLS && !serving[0].is_finished() {
            std::thread::yield_now();
        }
        on_its_own_runtime(write(store.clone(), written.clone()));
        let ended: Vec<_> = serving.into_iter().map(|thread| thread.join()).collect();
        stop.send_replace(true);
        ended.into_iter().for_each(|ended| ended.unwrap());
    });
    let wrong = std::mem::take(&mut *told.wrong.write().unwrap());
    println!(
        "{} answers to `at_least` over {} revisions, {} refusals, {} wrong",
        told.answered.load(Ordering::Relaxed),
        *written.acknowledged.borrow(),
        told.unavailable.load(Ordering::Relaxed),
        wrong.len()
    );
    (told.unavailable.load(Ordering::Relaxed), wrong)
}

/// `PORTCULLIS_CASES_FACTOR=100` runs a million of them.
#[test]
fn it_is_never_answered_from_an_older_snapshot() {
    let answers = u64::from(case_count(ANSWERS));
    let (unavailable, wrong) = run(answers, None);
    assert_eq!(wrong, Vec::<String>::new());
    assert!(unavailable < answers / 10, "{unavailable} calls got no answer");
    for mutant in [Mutant::AtLeastIgnored, Mutant::AtLeastOldView] {
        assert_ne!(run(u64::from(ANSWERS), Some(mutant)).1, Vec::<String>::new(), "{mutant:?} is not seen");
    }
}
