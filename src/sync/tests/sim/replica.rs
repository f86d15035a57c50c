//! A replica on a simulated machine with a disk. Member, follower, driver, publisher, cell, index, service, acknowledgement and
//! recorded position are the production code.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};

use super::checker::{RecordedStep, ReplicaStep};
use super::host::{HostTasks, MS, SimHost, elapsed_ns};
use super::remote_store::RemoteStore;
use super::simulation::Simulation;
use super::wire::{CheckedReply, SimReply, SimRequest, serve};
use crate::app::follower_runtime::{ServingRuntimes, check_continues_position};
use crate::app::wiring::FollowerCatchUp;
use crate::audit::AuditRecorder;
use crate::model::approval::{ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest};
use crate::model::limits::LEDGER_QUEUE_MAX;
use crate::model::time::{Clock as _, ClockReading};
use crate::revocation::RevocationIndex;
use crate::service::{
    ApprovalLedger, LedgerError, PdpService, ProofLedger, RuntimeService, ServiceParts, TaskSpawner, request::Caller,
};
use crate::snapshot::{Freshness, SnapshotCell};
use crate::store::{self, CommitRow, ReplicaRegistration, ReplicaState, Store};
use crate::sync::follower::HistoryPosition;
use crate::sync::{
    self, CellPublisher, FleetMember, FollowerLoop, PositionStore, RevisionAcknowledger, RuntimeBarrier, Settings,
    SnapshotPublisher,
};
use crate::telemetry::{Metrics, SpanRecorder};

/// The pause before a supervisor starts a process again.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

/// The state of a replica that the simulation sees.
pub(super) struct SimReplica {
    pub(super) place: usize,
    /// The node of its process. A process that takes over from another one has the other's node.
    pub(super) node: usize,
    pub(super) host: Arc<SimHost>,
    pub(super) disk: Arc<SimDisk>,
    pub(super) persists: bool,
    /// The copy of the store that it asks.
    pub(super) store: Arc<Mutex<usize>>,
    pub(super) settings: Settings,
    pub(super) stalls: StallSettings,
    process_state: Mutex<SimProcessState>,
}

/// Faults inside the decisions of a process.
pub(super) struct StallSettings {
    /// How often the process is stopped in the middle of a decision, in percent, and for how long at most.
    pub(super) stall: (u64, i64),
    /// How often the thread of a decision is stuck before it returns the answer, in percent, while all others go on. The second
    /// value is the longest time in milliseconds.
    pub(super) stuck: (u64, i64),
}

#[derive(Default)]
struct SimProcessState {
    incarnation: u32,
    cell: Arc<SnapshotCell>,
    /// Whether the process refuses its store, by quarantine or by not starting.
    refuses: bool,
    /// The published revisions by number: the matching commit, and the commit whose policy was in force. `None` if no commit matches.
    published: BTreeMap<u64, (Option<usize>, Option<usize>)>,
}

/// The disk of a replica's machine, which holds the recorded position.
#[derive(Default)]
pub(super) struct SimDisk(Mutex<(Option<HistoryPosition>, Option<HistoryPosition>)>);

impl SimDisk {
    /// Reads the position after a restart. After a crash of the machine, it may be the renamed but unsynced file or the one before.
    fn read(&self, keeps_unsynced: bool) -> Option<HistoryPosition> {
        let (synced, unsynced) = &mut *self.0.lock().unwrap();
        if let Some(place) = unsynced.take().filter(|_| keeps_unsynced) {
            *synced = Some(place);
        }
        synced.clone()
    }
}

/// The recording of a replica's position on its disk.
struct SimPositionStore {
    replica: Arc<SimReplica>,
    world: Arc<Simulation>,
}

#[async_trait]
impl PositionStore for SimPositionStore {
    async fn save(&self, place: &HistoryPosition) -> Result<(), std::io::Error> {
        let ms = self.world.rng.lock().unwrap().range(0, 60).unsigned_abs();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        self.replica.disk.0.lock().unwrap().1 = Some(place.clone());
        tokio::time::sleep(Duration::from_millis(ms / 4)).await;
        *self.replica.disk.0.lock().unwrap() = (Some(place.clone()), None);
        let published = self.replica.process_state.lock().unwrap().published.get(&place.revision.number).copied();
        if let Some((Some(commit), _)) = published {
            self.replica.step(&self.world, ReplicaStep::Kept(commit));
        }
        Ok(())
    }
}

/// The production barrier, behind decisions that are stuck in their handlers. Only the simulation knows those.
#[derive(Default)]
struct StallingBarrier {
    runtimes: ServingRuntimes,
    held: watch::Sender<(u64, BTreeSet<u64>)>,
}

impl StallingBarrier {
    fn hold(&self) -> u64 {
        let mut ticket = 0;
        self.held.send_modify(|(count, held)| {
            *count += 1;
            held.insert(*count);
            ticket = *count;
        });
        ticket
    }

    fn leave(&self, ticket: u64) {
        self.held.send_modify(|(_, held)| {
            held.remove(&ticket);
        });
    }
}

#[async_trait]
impl RuntimeBarrier for StallingBarrier {
    async fn pass(&self) {
        let newest = self.held.borrow().0;
        let passed = |(_, held): &(u64, BTreeSet<u64>)| held.range(..=newest).next().is_none();
        self.held.subscribe().wait_for(passed).await.unwrap();
        self.runtimes.pass().await;
    }
}

/// A process that serves.
#[derive(Clone)]
struct SimReplicaProcess {
    replica: Arc<SimReplica>,
    world: Arc<Simulation>,
    incarnation: u32,
    runtime_service: RuntimeService,
    recorder: Arc<AuditRecorder>,
    serving: Arc<StallingBarrier>,
}

impl SimReplica {
    pub(super) fn new(
        (place, node): (usize, usize),
        host: Arc<SimHost>,
        settings: Settings,
        persists: bool,
        troubles: StallSettings,
    ) -> Arc<Self> {
        let (disk, store, life) = (Arc::default(), Arc::default(), Mutex::new(SimProcessState::default()));
        Arc::new(Self { place, node, host, disk, persists, store, settings, stalls: troubles, process_state: life })
    }

    /// The commit of the replica if it is fresh, and whether it refuses its store.
    pub(super) fn state(&self) -> (Option<usize>, bool) {
        let life = self.process_state.lock().unwrap();
        let fresh = life.cell.load().filter(|view| view.freshness(self.host.now()) == Freshness::Fresh);
        let number = fresh.map(|view| view.snapshot.revision().number);
        (number.and_then(|number| life.published.get(&number).and_then(|(commit, _)| *commit)), life.refuses)
    }

    fn step(&self, world: &Simulation, step: ReplicaStep) {
        let (replica, incarnation) = (self.place, self.process_state.lock().unwrap().incarnation);
        world.trace(|| format!("replica {replica}.{incarnation} {step:?}"));
        world.steps.lock().unwrap().push(RecordedStep { replica, incarnation, at_ns: elapsed_ns(), step });
    }

    /// Runs the process once, until it ends.
    pub(super) async fn run(self: Arc<Self>, world: Arc<Simulation>) -> turmoil::Result {
        let (host, tasks) = (self.host.clone(), HostTasks::default());
        host.run(tasks.clone().run(self.live(world, tasks))).await
    }

    async fn live(self: Arc<Self>, world: Arc<Simulation>, tasks: HostTasks) -> turmoil::Result {
        let (cell, index) = (Arc::new(SnapshotCell::default()), Arc::new(RevocationIndex::new()));
        let incarnation = {
            let mut life = self.process_state.lock().unwrap();
            *life = SimProcessState { incarnation: life.incarnation + 1, cell: cell.clone(), ..SimProcessState::default() };
            life.incarnation
        };
        let store: Arc<dyn Store> = Arc::new(RemoteStore::new(&world.post, self.store.clone(), world.kind.durability()));
        let known = self.clone().read_position(&world, &*store).await;
        let publisher =
            TracedPublisher { inner: CellPublisher::new(cell.clone(), index), replica: self.clone(), world: world.clone() };
        let name = sync::new_incarnation_id(&format!("node-{}", self.node), format!("{}.{incarnation}", self.place));
        let registration = ReplicaRegistration {
            incarnation: name,
            address: format!("replica-{}.{incarnation}", self.place),
            version: "1".to_owned(),
            started_unix_ms: self.host.now().unix_ms(),
        };
        let member = FleetMember::new(store.clone(), registration);
        let (follow, status) = FollowerLoop::new(member.clone(), publisher, self.host.clone(), self.settings.clone(), known);
        let parts = ServiceParts {
            snapshot_cell: cell.clone(),
            ledger: Arc::new(SimProofLedger(store)),
            approvals: Arc::new(NoApprovals),
            catch_up: Arc::new(FollowerCatchUp { status: status.clone(), cell }),
            metrics: Metrics::unexported(),
            spans: SpanRecorder::disabled(),
            clock: self.host.clone(),
            spawn: self.spawn(&tasks),
        };
        let service = Arc::new(PdpService::new(parts, crate::service::Settings::default()));
        let (stop, stopped) = watch::channel(false);
        let serving = Arc::new(StallingBarrier::default());
        serving.runtimes.register_current();
        let (clock, metrics) = (self.host.clone(), Metrics::unexported());
        let acknowledge = RevisionAcknowledger::new(status.clone(), member.clone(), serving.clone(), clock, metrics);
        tasks.spawn(self.host.run(follow.run(stopped.clone())));
        tasks.spawn(self.host.run(acknowledge.run(stopped.clone())));
        let (ready, keeps) = (service.clone(), SimPositionStore { replica: self.clone(), world: world.clone() });
        tasks.spawn(self.host.run(async move {
            if status.wait_until_ready().await {
                ready.mark_ready();
                member.set_state(ReplicaState::Serving);
                // Record positions only from now on: a state that was not published was not followed.
                sync::persist_position(status, keeps, stopped).await;
            }
        }));
        let recorder = Arc::new(AuditRecorder::discarding("sim"));
        let runtime_service = service.runtime_service(recorder.clone());
        let (post, host) = (world.post.clone(), self.host.clone());
        let process = SimReplicaProcess { replica: self, world, incarnation, runtime_service, recorder, serving };
        let served = serve(post, host, tasks, move |call| {
            let process = process.clone();
            async move { process.answer(call).await }
        });
        let served = served.await;
        drop(stop);
        served
    }

    /// The spawner of tasks that must reach their record. Each runs as a further task of the process.
    fn spawn(&self, tasks: &HostTasks) -> TaskSpawner {
        let (sender, mut work) = mpsc::channel(LEDGER_QUEUE_MAX);
        let (beside, host) = (tasks.clone(), self.host.clone());
        tasks.spawn(async move {
            while let Some(one) = work.recv().await {
                beside.spawn(host.run(one));
            }
        });
        Arc::new(move |one| sender.try_send(one).unwrap())
    }

    /// Reads the recorded position and waits until the store may be followed from it. Until then the process would exit and restart.
    async fn read_position(self: Arc<Self>, world: &Simulation, store: &dyn Store) -> Option<HistoryPosition> {
        let keeps_unsynced = world.rng.lock().unwrap().percent(50);
        let known = self.disk.read(keeps_unsynced).filter(|_| self.persists)?;
        loop {
            let follows = check_continues_position(store, &known, Path::new("place.json")).await;
            self.process_state.lock().unwrap().refuses = matches!(follows, Err(crate::app::Error::Configuration(_)));
            match follows {
                Ok(()) => return Some(known),
                Err(error) => world.trace(|| format!("replica {} does not start: {error}", self.place)),
            }
            tokio::time::sleep(RESTART_PAUSE).await;
        }
    }
}

impl SimReplicaProcess {
    async fn answer(&self, call: SimRequest) -> SimReply {
        let SimRequest::Check(request) = call else { panic!("a replica decides") };
        let (replica, world) = (&*self.replica, &*self.world);
        let caller = Caller { connection_id: 1, address: "gateway".into(), is_loopback: true };
        // Only for a call that does not await; otherwise the stop would hit another task.
        let (percent, ns_max) = replica.stalls.stall;
        if request.proof.is_none() && request.at_least.is_none() {
            let mut rng = world.rng.lock().unwrap();
            let ns_max = ns_max.min(world.calm_ns - elapsed_ns());
            if rng.percent(percent) && ns_max > 0 {
                replica.host.stall_at(2, rng.range(ns_max / 10, ns_max));
            }
        }
        let checked = self.runtime_service.check(&request, &caller).await;
        replica.host.clear_stall();
        self.recorder.flush().unwrap();
        let Ok(answer) = checked else { return SimReply::NotReady };
        // A handler does not await here, so a stuck thread delays its answer and the barrier.
        let ticket = self.serving.hold();
        let (percent, ms_max) = replica.stalls.stuck;
        let stuck_ms = {
            let mut rng = world.rng.lock().unwrap();
            let ms_max = ms_max.min((world.calm_ns - elapsed_ns()) / MS);
            if rng.percent(percent) && ms_max > 0 { rng.range(ms_max / 10, ms_max) } else { 0 }
        };
        let revision = answer.revision.clone().unwrap();
        let published = replica.process_state.lock().unwrap().published.get(&revision.number).copied();
        if stuck_ms > 0 {
            tokio::time::sleep(Duration::from_millis(stuck_ms.unsigned_abs())).await;
        }
        replica.host.wait_until_running().await;
        self.serving.leave(ticket);
        let (commit, policy) = published.unwrap_or_default();
        let (incarnation, answered_ns) = (self.incarnation, elapsed_ns());
        SimReply::Check(Box::new(CheckedReply { answer, commit, policy, answered_ns, incarnation }))
    }
}

/// The production publisher. It also records each publication for the checker.
struct TracedPublisher {
    inner: CellPublisher,
    replica: Arc<SimReplica>,
    world: Arc<Simulation>,
}

impl TracedPublisher {
    fn published(&self, hash: [u8; 32], result: Result<(), String>) -> Result<(), String> {
        let view = self.replica.process_state.lock().unwrap().cell.load();
        // If a policy cannot be built, the last good policy is published, if there is one.
        let Some(view) = view else { return result };
        let (revision, digest) = (view.snapshot.revision().clone(), view.snapshot.digest());
        let commit = self.world.store.lock().unwrap().find(hash, &revision, digest);
        let number = view.snapshot.policy_number();
        let policy = {
            let published = &mut self.replica.process_state.lock().unwrap().published;
            let policy = if number == revision.number { commit } else { published.get(&number).and_then(|(commit, _)| *commit) };
            published.insert(revision.number, (commit, policy));
            policy
        };
        self.replica.step(&self.world, ReplicaStep::Published { revision, commit, policy });
        result
    }
}

impl SnapshotPublisher for TracedPublisher {
    fn publish_state(&mut self, state: store::StoreState, sent_at: ClockReading) -> Result<(), String> {
        let hash = state.hash;
        let result = self.inner.publish_state(state, sent_at);
        self.published(hash, result)
    }

    fn publish_commits(&mut self, commits: &[CommitRow], sent_at: ClockReading) -> Result<(), String> {
        let result = self.inner.publish_commits(commits, sent_at);
        self.published(commits.last().unwrap().hash, result)
    }

    fn renew_proof(&mut self, sent_at: ClockReading) {
        self.inner.renew_proof(sent_at);
    }

    fn quarantine(&mut self, reason: &str) {
        self.inner.quarantine(reason);
        self.replica.process_state.lock().unwrap().refuses = true;
        self.replica.step(&self.world, ReplicaStep::Quarantined);
    }
}

/// Proofs are spent in the store over the same faulty network, as in production.
struct SimProofLedger(Arc<dyn Store>);

#[async_trait]
impl ProofLedger for SimProofLedger {
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, LedgerError> {
        self.0.spend_proof(key, expires_at_unix_s).await.map_err(|error| LedgerError::Busy(error.to_string()))
    }
}

/// The policy of the simulation asks for no approval.
pub(in crate::sync::tests) struct NoApprovals;

#[async_trait::async_trait]
impl ApprovalLedger for NoApprovals {
    async fn ask_approval(&self, _request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, LedgerError> {
        Err(LedgerError::Busy("no call of the simulation asks".to_owned()))
    }

    async fn use_approvals(&self, _request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, LedgerError> {
        Err(LedgerError::Busy("no call of the simulation uses one".to_owned()))
    }

    async fn give_back_approvals(&self, _request: ApprovalUseRequest) -> Result<bool, LedgerError> {
        Ok(false)
    }
}
