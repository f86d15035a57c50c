//! One simulation: it builds the machines, carries out the plan of faults, and returns the history.
//!
//! Look next at `fault_plan.rs`, the faults, and at `checker.rs`, which judges the history.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::try_join_all;
use turmoil::Sim;

use super::checker::{self, FleetWait, RecordedStep, ReplicaEndState, RunHistory};
use super::clients;
use super::fault_plan::{FAULT_WINDOW_MS, SimFault, SimStoreKind, draw_plan};
use super::fixture::FIXTURE;
use super::host::{DRIFT_PPM_MAX, MS, SimHost, elapsed_ns, set_elapsed_outside};
use super::replica::{SimReplica, StallSettings};
use super::rng::Rng;
use super::store::{Durability, SharedCluster, StoreCluster};
use super::wire::MessageTable;
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::Clock as _;
use crate::store::{self, CommitRequest};
use crate::sync::Settings;

const TICK_MS: u64 = 5;
/// Largest latency of a message while no fault slows it.
pub(super) const LATENCY_MS_MAX: u64 = 12;
/// Promise 6: two seconds after the last fault, every replica must have recovered.
const RECOVERY_MS: i64 = 2_000;
const END_MS: i64 = FAULT_WINDOW_MS.1 + RECOVERY_MS + 1_300;
const CONNECTIONS: usize = 5;
const WRITERS: usize = 2;
const WAITERS: usize = 2;

/// The state that the machines of one simulation share.
pub(super) struct Simulation {
    pub(super) seed: u64,
    pub(super) kind: SimStoreKind,
    pub(super) store: SharedCluster,
    pub(super) replicas: Vec<Arc<SimReplica>>,
    /// The copy that the operators who wait for the fleet ask.
    pub(super) waiters_copy: Arc<Mutex<usize>>,
    pub(super) post: Arc<MessageTable>,
    /// Randomness during the run. Machines take turns in a fixed order, so a seed determines it as well.
    pub(super) rng: Mutex<Rng>,
    pub(super) steps: Mutex<Vec<RecordedStep>>,
    pub(super) calm_ns: i64,
    pub(super) end_ns: i64,
    answers: Mutex<Vec<checker::ObservedAnswer>>,
    waits: Mutex<Vec<FleetWait>>,
    trace: Option<Mutex<Vec<String>>>,
    bound_ms: u64,
}

/// The outcome of a simulation.
pub(super) struct RunOutcome {
    pub(super) history: RunHistory,
    pub(super) trace: Vec<String>,
}

impl Simulation {
    fn new(seed: u64, traced: bool) -> Self {
        let mut rng = Rng::new(seed, 1);
        let kind =
            [SimStoreKind::Single, SimStoreKind::Synchronous, SimStoreKind::Asynchronous, SimStoreKind::Restored][rng.below(4)];
        let bound_ms = [1_500, 2_000, 3_000][rng.below(3)];
        let page = [1, 2, 4][rng.below(3)];
        let persists = kind.may_quarantine() || rng.percent(50);
        let settings = store::Settings { freshness_bound_ms: bound_ms, ..store::Settings::default() };
        let stall_ns_max = (i64::try_from(bound_ms).unwrap() + 1_500) * MS;
        let count = 3 + Rng::new(seed, 2).below(8) / 5;
        let lazy = kind == SimStoreKind::Single && Rng::new(seed, 6).percent(50);
        let replica = |place: usize| {
            let follow = Settings {
                poll_interval_ms: [40, 60, 100][rng.below(3)],
                poll_timeout_ms: [300, 1_000][rng.below(2)],
                // A lost answer must not cost the minute that a large state may take.
                load_timeout_ms: 1_000,
                seed: Some(rng.next()),
                ..Settings::default()
            };
            let host = SimHost::new(drift(&mut rng), rng.range(-400, 400) * MS);
            // The last replica takes over from the first.
            let node = if place + 1 == count { 0 } else { place };
            SimReplica::new((place, node), host, follow, persists, StallSettings { stall: (1, stall_ns_max), stuck: (3, 1_100) })
        };
        let replicas = (0..count).map(replica).collect();
        Self {
            seed,
            kind,
            store: Mutex::new(StoreCluster::new(kind.durability(), page, lazy, settings, &FIXTURE)),
            replicas,
            waiters_copy: Arc::default(),
            post: Arc::default(),
            rng: Mutex::new(Rng::new(seed, 3)),
            steps: Mutex::default(),
            calm_ns: FAULT_WINDOW_MS.1 * MS,
            end_ns: END_MS * MS,
            answers: Mutex::default(),
            waits: Mutex::default(),
            trace: traced.then(Mutex::default),
            bound_ms,
        }
    }

    /// Adds a line to the trace, if the run is traced.
    pub(super) fn trace(&self, what: impl FnOnce() -> String) {
        if let Some(trace) = &self.trace {
            trace.lock().unwrap().push(format!("{:>9.3} {}", elapsed_ns() as f64 / 1e6, what()));
        }
    }

    pub(super) fn record(&self, answer: checker::ObservedAnswer, reason: impl Debug) {
        self.trace(|| format!("gateway {reason:?} {answer:?}"));
        self.answers.lock().unwrap().push(answer);
    }

    pub(super) fn wait_begins(&self, commit: usize) -> usize {
        let mut waits = self.waits.lock().unwrap();
        waits.push(FleetWait { commit, began_ns: elapsed_ns(), returned: None });
        waits.len() - 1
    }

    pub(super) fn wait_returns(&self, wait: usize, said: bool) {
        self.waits.lock().unwrap()[wait].returned = Some((elapsed_ns(), said));
    }

    fn history(&self) -> RunHistory {
        let store = self.store.lock().unwrap();
        let failed_over_ns = store.failed_over_ns.unwrap_or(i64::MAX);
        let commit = |node: &super::store::CommitNode| checker::CommitFacts {
            parent: node.parent,
            revisions: revisions(node),
            created_ns: node.created_ns,
            binds_ns: node
                .acknowledged_ns
                .map(|ns| if node.created_ns >= failed_over_ns { ns.max(store.settled_ns) } else { ns }),
            lost_ns: node.lost_ns,
            revoked: node.revoked.clone(),
            allowed: node.allowed.clone(),
            builds: node.builds,
            all: node.all.clone(),
            unix_ms: node.row.unix_ms,
        };
        let newest = store.copies[store.primary].head;
        let bound_ns = i64::try_from(self.bound_ms).unwrap() * MS;
        RunHistory {
            bound_ns,
            // Both clocks may drift, milliseconds are whole, and machines take turns tick by tick.
            slack_ns: bound_ns / 1_000_000 * 3 * DRIFT_PPM_MAX + 3 * MS + i64::try_from(TICK_MS).unwrap() * MS,
            commits: store.tree.iter().map(commit).collect(),
            answers: std::mem::take(&mut *self.answers.lock().unwrap()),
            steps: std::mem::take(&mut *self.steps.lock().unwrap()),
            waits: std::mem::take(&mut *self.waits.lock().unwrap()),
            end_ns: self.end_ns,
            ended: vec![],
            may_quarantine: self.kind.may_quarantine(),
            quiet_ns: (FAULT_WINDOW_MS.1 + RECOVERY_MS) * MS,
            newest,
        }
    }

    /// The current states of the replicas.
    fn ended(&self) -> Vec<ReplicaEndState> {
        let store = self.store.lock().unwrap();
        let head = store.copies[store.primary].head;
        let ended = |replica: &Arc<SimReplica>| {
            let (commit, quarantined) = replica.state();
            ReplicaEndState { replica: replica.place, quarantined, current: commit == Some(head) }
        };
        self.replicas.iter().map(ended).collect()
    }
}

fn drift(rng: &mut Rng) -> i64 {
    rng.range(-DRIFT_PPM_MAX, DRIFT_PPM_MAX)
}

fn revisions(node: &super::store::CommitNode) -> Vec<Revision> {
    node.histories.iter().map(|history| Revision { history: history.clone(), number: node.row.number }).collect()
}

/// The machines by the names that the plan uses.
struct SimMachines<'a> {
    sim: Sim<'a>,
    world: Arc<Simulation>,
    names: Vec<String>,
    stores: Vec<Arc<SimHost>>,
    gateway: Arc<SimHost>,
    waiter: Arc<SimHost>,
    /// The replicas whose boot clock does not count a suspend. Their wall clock is never set back.
    virtual_machines: Vec<bool>,
}

/// Runs the simulation of a seed to its end.
///
/// # Errors
/// If the software of a machine failed, which is a fault of the simulation.
pub(super) fn run(seed: u64, traced: bool) -> Result<RunOutcome, String> {
    set_elapsed_outside(0);
    let world = Arc::new(Simulation::new(seed, traced));
    let mut machines = SimMachines::new(world.clone());
    let mut plan = draw_plan(&mut Rng::new(seed, 5), world.kind, world.replicas.len()).into_iter().peekable();
    let mut quiet = None;
    for now_ms in (0..END_MS).step_by(usize::try_from(TICK_MS).unwrap()) {
        set_elapsed_outside(now_ms * MS);
        while let Some((_, fault)) = plan.next_if(|(at, _)| *at <= now_ms) {
            world.trace(|| format!("fault {fault:?}"));
            machines.apply_fault(&fault);
        }
        if now_ms == FAULT_WINDOW_MS.1 {
            world.trace(|| "calm".to_owned());
            machines.end_all_faults();
        }
        if now_ms >= FAULT_WINDOW_MS.1 {
            machines.repair_policy();
        }
        if now_ms == FAULT_WINDOW_MS.1 + RECOVERY_MS {
            quiet = Some(world.ended());
        }
        if now_ms % 150 == 0 {
            world.store.lock().unwrap().replicate(now_ms % 450 == 0);
        }
        machines.sim.step().map_err(|error| format!("seed {seed}: {error}"))?;
    }
    machines.all().try_for_each(|host| host.is_sound()).map_err(|error| format!("seed {seed}: {error}"))?;
    drop(machines);
    let mut history = world.history();
    history.ended = quiet.unwrap_or_default();
    let trace = world.trace.as_ref().map(|trace| std::mem::take(&mut *trace.lock().unwrap())).unwrap_or_default();
    Ok(RunOutcome { history, trace })
}

impl<'a> SimMachines<'a> {
    fn new(world: Arc<Simulation>) -> Self {
        let mut rng = Rng::new(world.seed, 4);
        let mut sim = turmoil::Builder::new()
            .rng_seed(world.seed)
            .epoch(std::time::UNIX_EPOCH)
            .tick_duration(Duration::from_millis(TICK_MS))
            .simulation_duration(Duration::from_secs(3_600))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(LATENCY_MS_MAX))
            .fail_rate(if rng.percent(25) { 0.002 } else { 0.0 })
            .repair_rate(0.3)
            .tcp_capacity(1_024)
            .build();
        let mut names = Vec::new();
        let mut named = |name: String| {
            names.push(name.clone());
            name
        };
        let copies = if world.kind.durability() == Durability::Single { 1 } else { 2 };
        let stores = (0..copies).map(|copy| {
            let host = SimHost::new(drift(&mut rng), 0);
            let (world, machine) = (world.clone(), host.clone());
            sim.host(named(format!("store-{copy}")), move || clients::store(world.clone(), machine.clone(), copy));
            host
        });
        let stores = stores.collect();
        for replica in &world.replicas {
            let (world, replica) = (world.clone(), replica.clone());
            sim.host(named(format!("replica-{}", replica.place)), move || replica.clone().run(world.clone()));
        }
        let gateway = SimHost::new(drift(&mut rng), 0);
        let (shared, machine) = (world.clone(), gateway.clone());
        sim.host(named("gateway".to_owned()), move || {
            let (world, machine) = (shared.clone(), machine.clone());
            async move {
                let one = |connection| clients::gateway(world.clone(), machine.clone(), connection);
                try_join_all((0..CONNECTIONS).map(one)).await.map(drop)
            }
        });
        let shared = world.clone();
        sim.host(named("writer".to_owned()), move || {
            let world = shared.clone();
            async move { try_join_all((0..WRITERS).map(|place| clients::writer(world.clone(), place))).await.map(drop) }
        });
        let waiter = SimHost::new(drift(&mut rng), 0);
        let (shared, machine) = (world.clone(), waiter.clone());
        sim.host(named("waiter".to_owned()), move || {
            let (world, machine) = (shared.clone(), machine.clone());
            async move {
                let one = |place| clients::waiter(world.clone(), machine.clone(), place);
                try_join_all((0..WAITERS).map(one)).await.map(drop)
            }
        });
        let virtual_machines = world.replicas.iter().map(|_| rng.percent(50)).collect();
        Self { sim, world, names, stores, gateway, waiter, virtual_machines }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<SimHost>> {
        self.stores.iter().chain([&self.gateway, &self.waiter]).chain(self.world.replicas.iter().map(|replica| &replica.host))
    }

    /// A machine, and whether its boot clock counts a suspend.
    fn machine(&self, name: &str) -> (Arc<SimHost>, bool) {
        let Some((kind, place)) = name.rsplit_once('-') else { return (self.waiter.clone(), true) };
        let place: usize = place.parse().unwrap();
        match kind {
            "replica" => (self.world.replicas[place].host.clone(), !self.virtual_machines[place]),
            "store" => (self.stores[place].clone(), true),
            _ => panic!("the plan leaves {name} alone"),
        }
    }

    fn apply_fault(&mut self, fault: &SimFault) {
        let store = || self.world.store.lock().unwrap();
        match fault {
            SimFault::Cut { from, to } => self.sim.partition_oneway(&**from, &**to),
            SimFault::Reconnect { from, to } => self.sim.repair_oneway(&**from, &**to),
            SimFault::Hold(a, b) => self.sim.hold(&**a, &**b),
            SimFault::Release(a, b) => self.sim.release(&**a, &**b),
            SimFault::Slow(a, b, ms) => self.sim.set_link_max_message_latency(&**a, &**b, Duration::from_millis(*ms)),
            SimFault::Stop { machine, for_ns } => self.machine(machine).0.stop(*for_ns),
            SimFault::Suspend { machine, for_ns } => {
                let (host, boot_counts) = self.machine(machine);
                host.suspend(*for_ns, boot_counts);
            }
            SimFault::StepWall { machine, by_ns } => {
                let (host, boot_counts) = self.machine(machine);
                // One of the two clocks must count the suspend, because the design relies on it.
                host.step_wall(if boot_counts { *by_ns } else { by_ns.abs() });
            }
            SimFault::Succeed { stopped, by, for_ns } => {
                self.world.replicas[*stopped].host.stop(*for_ns);
                let by = format!("replica-{by}");
                self.sim.crash(&*by);
                self.sim.bounce(&*by);
            }
            SimFault::Crash(machine) => {
                self.sim.crash(&**machine);
                if let Some(copy) = machine.strip_prefix("store-") {
                    store().crash(copy.parse().unwrap());
                }
            }
            SimFault::Start(machine) => self.start(machine),
            SimFault::Partition => store().joined = false,
            SimFault::Join => store().joined = true,
            SimFault::Tear => store().tear(),
            SimFault::FailOver => store().fail_over(),
            SimFault::Redirect(replica) => self.redirect(*replica),
            SimFault::StepDown => store().step_down(),
            SimFault::Restore { back, other_history } => {
                store().restore(*back, other_history.then(|| HistoryId::new("second")));
            }
        }
    }

    fn start(&mut self, machine: &str) {
        if !self.sim.is_host_running(machine) {
            self.sim.bounce(machine);
        }
    }

    fn redirect(&self, replica: usize) {
        let primary = self.world.store.lock().unwrap().primary;
        let copy = self.world.replicas.get(replica).map_or(&self.world.waiters_copy, |replica| &replica.store);
        *copy.lock().unwrap() = primary;
    }

    /// Repairs a policy that cannot be built.
    fn repair_policy(&self) {
        let mut store = self.world.store.lock().unwrap();
        let (primary, head) = (store.primary, store.copies[store.primary].head);
        if !store.tree[head].builds {
            let unix_ms = self.stores[primary].now().unix_ms();
            let request = CommitRequest { writes: FIXTURE.policy_repair(), ..CommitRequest::default() };
            store.commit(primary, &request, unix_ms, &FIXTURE).unwrap();
        }
    }

    /// Ends all faults.
    fn end_all_faults(&mut self) {
        let names = self.names.clone();
        self.sim.set_fail_rate(0.0);
        for (place, a) in names.iter().enumerate() {
            for b in &names[..place] {
                self.sim.release(&**a, &**b);
                self.sim.repair(&**a, &**b);
                self.sim.set_link_max_message_latency(&**a, &**b, Duration::from_millis(LATENCY_MS_MAX));
            }
        }
        for name in names.iter().filter(|name| name.starts_with("replica") || name.starts_with("store")) {
            self.start(name);
        }
        {
            let mut store = self.world.store.lock().unwrap();
            store.joined = true;
            store.step_down();
        }
        (0..=self.world.replicas.len()).for_each(|replica| self.redirect(replica));
    }
}
