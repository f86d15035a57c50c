//! A replica on a simulated machine with a disk. Member, follower, driver, publisher, cell, index, service, acknowledgement and
//! recorded position are the production code.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};

use super::checker::{Step, Stepped};
use super::host::{Host, MS, Tasks, elapsed_ns};
use super::link::Link;
use super::wire::{Call, Checked, Reply, serve};
use super::world::World;
use crate::app::bind::FollowerCatchUp;
use crate::app::fleet::{Runtimes, may_follow};
use crate::audit::Recorder;
use crate::model::approval::{AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::limits::LEDGER_QUEUE_MAX;
use crate::model::time::{Clock as _, Now};
use crate::revocation::Index;
use crate::service::{ApprovalLedger, Lane, LedgerError, Parts, ProofLedger, Service, Spawn, request::Caller};
use crate::snapshot::{Freshness, SnapshotCell};
use crate::store::{self, CommitRow, Registration, ReplicaState, Store};
use crate::sync::follower::Position;
use crate::sync::{self, Acknowledge, Barrier, CellPublisher, Follow, Keep, Member, Publisher, Settings};
use crate::telemetry::{Metrics, Spans};

/// The pause before a supervisor starts a process again.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

/// The state of a replica that the simulation sees.
pub(super) struct Replica {
    pub(super) place: usize,
    /// The node of its process. A process that takes over from another one has the other's node.
    pub(super) node: usize,
    pub(super) host: Arc<Host>,
    pub(super) disk: Arc<Disk>,
    pub(super) persists: bool,
    /// The copy of the store that it asks.
    pub(super) store: Arc<Mutex<usize>>,
    pub(super) settings: Settings,
    pub(super) troubles: Troubles,
    life: Mutex<Life>,
}

/// Faults inside the decisions of a process.
pub(super) struct Troubles {
    /// How often the process is stopped in the middle of a decision, in percent, and for how long at most.
    pub(super) stall: (u64, i64),
    /// How often the thread of a decision is stuck before it returns the answer, in percent, while all others go on. The second
    /// value is the longest time in milliseconds.
    pub(super) stuck: (u64, i64),
}

#[derive(Default)]
struct Life {
    incarnation: u32,
    cell: Arc<SnapshotCell>,
    /// Whether the process refuses its store, by quarantine or by not starting.
    refuses: bool,
    /// The published revisions by number: the matching commit, and the commit whose policy was in force. `None` if no commit matches.
    published: BTreeMap<u64, (Option<usize>, Option<usize>)>,
}

/// The disk of a replica's machine, which holds the recorded position.
#[derive(Default)]
pub(super) struct Disk(Mutex<(Option<Position>, Option<Position>)>);

impl Disk {
    /// Reads the position after a restart. After a crash of the machine, it may be the renamed but unsynced file or the one before.
    fn read(&self, keeps_unsynced: bool) -> Option<Position> {
        let (synced, unsynced) = &mut *self.0.lock().unwrap();
        if let Some(place) = unsynced.take().filter(|_| keeps_unsynced) {
            *synced = Some(place);
        }
        synced.clone()
    }
}

/// The recording of a replica's position on its disk.
struct Keeps {
    replica: Arc<Replica>,
    world: Arc<World>,
}

#[async_trait]
impl Keep for Keeps {
    async fn keep(&self, place: &Position) -> Result<(), std::io::Error> {
        let ms = self.world.rng.lock().unwrap().range(0, 60).unsigned_abs();
        tokio::time::sleep(Duration::from_millis(ms)).await;
        self.replica.disk.0.lock().unwrap().1 = Some(place.clone());
        tokio::time::sleep(Duration::from_millis(ms / 4)).await;
        *self.replica.disk.0.lock().unwrap() = (Some(place.clone()), None);
        let published = self.replica.life.lock().unwrap().published.get(&place.revision.number).copied();
        if let Some((Some(commit), _)) = published {
            self.replica.step(&self.world, Step::Kept(commit));
        }
        Ok(())
    }
}

/// The production barrier, behind decisions that are stuck in their handlers. Only the simulation knows those.
#[derive(Default)]
struct Serving {
    runtimes: Runtimes,
    held: watch::Sender<(u64, BTreeSet<u64>)>,
}

impl Serving {
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
impl Barrier for Serving {
    async fn pass(&self) {
        let newest = self.held.borrow().0;
        let passed = |(_, held): &(u64, BTreeSet<u64>)| held.range(..=newest).next().is_none();
        self.held.subscribe().wait_for(passed).await.unwrap();
        self.runtimes.pass().await;
    }
}

/// A process that serves.
#[derive(Clone)]
struct Process {
    replica: Arc<Replica>,
    world: Arc<World>,
    incarnation: u32,
    lane: Lane,
    recorder: Arc<Recorder>,
    serving: Arc<Serving>,
}

impl Replica {
    pub(super) fn new(
        (place, node): (usize, usize),
        host: Arc<Host>,
        settings: Settings,
        persists: bool,
        troubles: Troubles,
    ) -> Arc<Self> {
        let (disk, store, life) = (Arc::default(), Arc::default(), Mutex::new(Life::default()));
        Arc::new(Self { place, node, host, disk, persists, store, settings, troubles, life })
    }

    /// The commit of the replica if it is fresh, and whether it refuses its store.
    pub(super) fn state(&self) -> (Option<usize>, bool) {
        let life = self.life.lock().unwrap();
        let fresh = life.cell.load().filter(|view| view.freshness(self.host.now()) == Freshness::Fresh);
        let number = fresh.map(|view| view.snapshot.revision().number);
        (number.and_then(|number| life.published.get(&number).and_then(|(commit, _)| *commit)), life.refuses)
    }

    fn step(&self, world: &World, step: Step) {
        let (replica, incarnation) = (self.place, self.life.lock().unwrap().incarnation);
        world.trace(|| format!("replica {replica}.{incarnation} {step:?}"));
        world.steps.lock().unwrap().push(Stepped { replica, incarnation, at_ns: elapsed_ns(), step });
    }

    /// Runs the process once, until it ends.
    pub(super) async fn run(self: Arc<Self>, world: Arc<World>) -> turmoil::Result {
        let (host, tasks) = (self.host.clone(), Tasks::default());
        host.run(tasks.clone().run(self.live(world, tasks))).await
    }

    async fn live(self: Arc<Self>, world: Arc<World>, tasks: Tasks) -> turmoil::Result {
        let (cell, index) = (Arc::new(SnapshotCell::default()), Arc::new(Index::new()));
        let incarnation = {
            let mut life = self.life.lock().unwrap();
            *life = Life { incarnation: life.incarnation + 1, cell: cell.clone(), ..Life::default() };
            life.incarnation
        };
        let store: Arc<dyn Store> = Arc::new(Link::new(&world.post, self.store.clone(), world.kind.durability()));
        let known = self.clone().place(&world, &*store).await;
        let publisher = Recorded { inner: CellPublisher::new(cell.clone(), index), replica: self.clone(), world: world.clone() };
        let name = sync::incarnation(&format!("node-{}", self.node), format!("{}.{incarnation}", self.place));
        let registration = Registration {
            incarnation: name,
            address: format!("replica-{}.{incarnation}", self.place),
            version: "1".to_owned(),
            started_unix_ms: self.host.now().unix_ms(),
        };
        let member = Member::new(store.clone(), registration);
        let (follow, status) = Follow::new(member.clone(), publisher, self.host.clone(), self.settings.clone(), known);
        let parts = Parts {
            cell: cell.clone(),
            ledger: Arc::new(Ledger(store)),
            approvals: Arc::new(NoApprovals),
            catch_up: Arc::new(FollowerCatchUp { status: status.clone(), cell }),
            metrics: Metrics::unexported(),
            spans: Spans::off(),
            clock: self.host.clone(),
            spawn: self.spawn(&tasks),
        };
        let service = Arc::new(Service::new(parts, crate::service::Settings::default()));
        let (stop, stopped) = watch::channel(false);
        let serving = Arc::new(Serving::default());
        serving.runtimes.join();
        let (clock, metrics) = (self.host.clone(), Metrics::unexported());
        let acknowledge = Acknowledge::new(status.clone(), member.clone(), serving.clone(), clock, metrics);
        tasks.spawn(self.host.run(follow.run(stopped.clone())));
        tasks.spawn(self.host.run(acknowledge.run(stopped.clone())));
        let (ready, keeps) = (service.clone(), Keeps { replica: self.clone(), world: world.clone() });
        tasks.spawn(self.host.run(async move {
            if status.ready().await {
                ready.mark_ready();
                member.set_state(ReplicaState::Serving);
                // Record positions only from now on: a state that was not published was not followed.
                sync::remember(status, keeps, stopped).await;
            }
        }));
        let recorder = Arc::new(Recorder::discarding("sim"));
        let lane = service.lane(recorder.clone());
        let (post, host) = (world.post.clone(), self.host.clone());
        let process = Process { replica: self, world, incarnation, lane, recorder, serving };
        let served = serve(post, host, tasks, move |call| {
            let process = process.clone();
            async move { process.answer(call).await }
        });
        let served = served.await;
        drop(stop);
        served
    }

    /// The spawner of tasks that must reach their record. Each runs as a further task of the process.
    fn spawn(&self, tasks: &Tasks) -> Spawn {
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
    async fn place(self: Arc<Self>, world: &World, store: &dyn Store) -> Option<Position> {
        let keeps_unsynced = world.rng.lock().unwrap().percent(50);
        let known = self.disk.read(keeps_unsynced).filter(|_| self.persists)?;
        loop {
            let follows = may_follow(store, &known, Path::new("place.json")).await;
            self.life.lock().unwrap().refuses = matches!(follows, Err(crate::app::Error::Configuration(_)));
            match follows {
                Ok(()) => return Some(known),
                Err(error) => world.trace(|| format!("replica {} does not start: {error}", self.place)),
            }
            tokio::time::sleep(RESTART_PAUSE).await;
        }
    }
}

impl Process {
    async fn answer(&self, call: Call) -> Reply {
        let Call::Check(request) = call else { panic!("a replica decides") };
        let (replica, world) = (&*self.replica, &*self.world);
        let caller = Caller { connection_id: 1, address: "gateway".into(), is_loopback: true };
        // Only for a call that does not await; otherwise the stop would hit another task.
        let (percent, ns_max) = replica.troubles.stall;
        if request.proof.is_none() && request.at_least.is_none() {
            let mut rng = world.rng.lock().unwrap();
            let ns_max = ns_max.min(world.calm_ns - elapsed_ns());
            if rng.percent(percent) && ns_max > 0 {
                replica.host.stall_at(2, rng.range(ns_max / 10, ns_max));
            }
        }
        let checked = self.lane.check(&request, &caller).await;
        replica.host.no_stall();
        self.recorder.flush().unwrap();
        let Ok(answer) = checked else { return Reply::NotReady };
        // A handler does not await here, so a stuck thread delays its answer and the barrier.
        let ticket = self.serving.hold();
        let (percent, ms_max) = replica.troubles.stuck;
        let stuck_ms = {
            let mut rng = world.rng.lock().unwrap();
            let ms_max = ms_max.min((world.calm_ns - elapsed_ns()) / MS);
            if rng.percent(percent) && ms_max > 0 { rng.range(ms_max / 10, ms_max) } else { 0 }
        };
        let revision = answer.revision.clone().unwrap();
        let published = replica.life.lock().unwrap().published.get(&revision.number).copied();
        if stuck_ms > 0 {
            tokio::time::sleep(Duration::from_millis(stuck_ms.unsigned_abs())).await;
        }
        replica.host.running().await;
        self.serving.leave(ticket);
        let (commit, policy) = published.unwrap_or_default();
        let (incarnation, answered_ns) = (self.incarnation, elapsed_ns());
        Reply::Check(Box::new(Checked { answer, commit, policy, answered_ns, incarnation }))
    }
}

/// The production publisher. It also records each publication for the checker.
struct Recorded {
    inner: CellPublisher,
    replica: Arc<Replica>,
    world: Arc<World>,
}

impl Recorded {
    fn published(&self, hash: [u8; 32], result: Result<(), String>) -> Result<(), String> {
        let view = self.replica.life.lock().unwrap().cell.load();
        // If a policy cannot be built, the last good policy is published, if there is one.
        let Some(view) = view else { return result };
        let (revision, digest) = (view.snapshot.revision().clone(), view.snapshot.digest());
        let commit = self.world.store.lock().unwrap().find(hash, &revision, digest);
        let number = view.snapshot.policy_number();
        let policy = {
            let published = &mut self.replica.life.lock().unwrap().published;
            let policy = if number == revision.number { commit } else { published.get(&number).and_then(|(commit, _)| *commit) };
            published.insert(revision.number, (commit, policy));
            policy
        };
        self.replica.step(&self.world, Step::Published { revision, commit, policy });
        result
    }
}

impl Publisher for Recorded {
    fn replace(&mut self, state: store::State, sent_at: Now) -> Result<(), String> {
        let hash = state.hash;
        let result = self.inner.replace(state, sent_at);
        self.published(hash, result)
    }

    fn apply(&mut self, commits: &[CommitRow], sent_at: Now) -> Result<(), String> {
        let result = self.inner.apply(commits, sent_at);
        self.published(commits.last().unwrap().hash, result)
    }

    fn refresh(&mut self, sent_at: Now) {
        self.inner.refresh(sent_at);
    }

    fn quarantine(&mut self, reason: &str) {
        self.inner.quarantine(reason);
        self.replica.life.lock().unwrap().refuses = true;
        self.replica.step(&self.world, Step::Quarantined);
    }
}

/// Proofs are spent in the store over the same faulty network, as in production.
struct Ledger(Arc<dyn Store>);

#[async_trait]
impl ProofLedger for Ledger {
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, LedgerError> {
        self.0.spend(key, expires_at_unix_s).await.map_err(|error| LedgerError::Busy(error.to_string()))
    }
}

/// The policy of the simulation asks for no approval.
pub(in crate::sync::tests) struct NoApprovals;

#[async_trait::async_trait]
impl ApprovalLedger for NoApprovals {
    async fn ask(&self, _request: AskApproval) -> Result<AskOutcome, LedgerError> {
        Err(LedgerError::Busy("no call of the simulation asks".to_owned()))
    }

    async fn use_once(&self, _request: UseApprovals) -> Result<UseOutcome, LedgerError> {
        Err(LedgerError::Busy("no call of the simulation uses one".to_owned()))
    }

    async fn give_back(&self, _request: UseApprovals) -> Result<bool, LedgerError> {
        Ok(false)
    }
}
