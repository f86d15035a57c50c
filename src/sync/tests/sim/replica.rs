//! A replica: the follower, its driver, the publisher, the cell, the index and the service as in production, on a simulated
//! machine whose disk holds the last position.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::sync::watch;

use super::checker::{Step, Stepped};
use super::host::{Host, elapsed_ns};
use super::wire::{Call, Checked, Peer, Reply, serve};
use super::world::World;
use crate::app::bind::FollowerCatchUp;
use crate::audit::Recorder;
use crate::model::approval::{AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::time::{Clock as _, Now};
use crate::revocation::Index;
use crate::service::{ApprovalLedger, Lane, Parts, ProofLedger, Service, request::Caller};
use crate::snapshot::{Freshness, SnapshotCell};
use crate::store::{self, Changes, CommitRow};
use crate::sync::follower::Position;
use crate::sync::{CellPublisher, Follow, Publisher, Settings, Source};
use crate::telemetry::{Metrics, Spans};

/// What is known of a replica from outside.
pub(super) struct Replica {
    pub(super) place: usize,
    pub(super) host: Arc<Host>,
    /// Where it was last, if it writes that down.
    pub(super) disk: Mutex<Option<Position>>,
    pub(super) persists: bool,
    /// The copy of the store that it asks.
    pub(super) store: Mutex<usize>,
    pub(super) settings: Settings,
    /// How often a decision is stopped in its middle, in percent, and for how long at the most.
    pub(super) stall: (u64, i64),
    life: Mutex<Life>,
}

#[derive(Default)]
struct Life {
    incarnation: u32,
    cell: Arc<SnapshotCell>,
    quarantined: bool,
    /// What it published, by number; `None` where no commit is like it.
    published: BTreeMap<u64, Option<usize>>,
}

impl Replica {
    pub(super) fn new(place: usize, host: Arc<Host>, settings: Settings, persists: bool, stall: (u64, i64)) -> Arc<Self> {
        let (disk, store, life) = (Mutex::new(None), Mutex::new(0), Mutex::new(Life::default()));
        Arc::new(Self { place, host, disk, persists, store, settings, stall, life })
    }

    /// At which commit it is, if it is fresh; whether it is quarantined.
    pub(super) fn state(&self) -> (Option<usize>, bool) {
        let life = self.life.lock().unwrap();
        let fresh = life.cell.load().filter(|view| view.freshness(self.host.now()) == Freshness::Fresh);
        let number = fresh.map(|view| view.snapshot.revision().number);
        (number.and_then(|number| life.published.get(&number).copied().flatten()), life.quarantined)
    }

    /// One life of the process.
    pub(super) async fn run(self: Arc<Self>, world: Arc<World>) -> turmoil::Result {
        let (cell, index) = (Arc::new(SnapshotCell::default()), Arc::new(Index::new()));
        let incarnation = {
            let mut life = self.life.lock().unwrap();
            *life = Life { incarnation: life.incarnation + 1, cell: cell.clone(), ..Life::default() };
            life.incarnation
        };
        let known = self.disk.lock().unwrap().clone().filter(|_| self.persists);
        let publisher = Recorded { inner: CellPublisher::new(cell.clone(), index), replica: self.clone(), world: world.clone() };
        let link = Link { peer: Peer::new(world.post.clone()), replica: self.clone(), _wake: watch::channel(0).0 };
        let (follow, status) = Follow::new(link, publisher, self.host.clone(), self.settings.clone(), known);
        let parts = Parts {
            cell: cell.clone(),
            ledger: Arc::new(Ledger { peer: Peer::new(world.post.clone()), replica: self.clone() }),
            approvals: Arc::new(NoApprovals),
            catch_up: Arc::new(FollowerCatchUp { status: status.clone(), cell }),
            metrics: Metrics::unexported(),
            spans: Spans::off(),
            clock: self.host.clone(),
        };
        let service = Arc::new(Service::new(parts, crate::service::Settings::default()));
        let (stop, stopped) = watch::channel(false);
        tokio::task::spawn_local(self.host.run(follow.run(stopped)));
        let ready = service.clone();
        tokio::task::spawn_local(self.host.run(async move {
            if status.ready().await {
                ready.mark_ready();
            }
        }));
        let recorder = Arc::new(Recorder::discarding("sim"));
        let lane = service.lane(recorder.clone());
        let replica = self.clone();
        let served = serve(world.post.clone(), self.host.clone(), move |call| {
            let (replica, world, lane, recorder) = (replica.clone(), world.clone(), lane.clone(), recorder.clone());
            async move { replica.answer(&world, &lane, &recorder, call, incarnation).await }
        });
        let served = self.host.run(served).await;
        drop(stop);
        served
    }

    async fn answer(&self, world: &World, lane: &Lane, recorder: &Recorder, call: Call, incarnation: u32) -> Reply {
        let Call::Check(request) = call else { panic!("a replica decides") };
        let caller = Caller { connection_id: 1, address: "gateway".into(), is_loopback: true };
        // Only where it does not await: else it would be somebody else who is stopped.
        let (percent, ns_max) = self.stall;
        if request.proof.is_none() && request.at_least.is_none() {
            let mut rng = world.rng.lock().unwrap();
            let ns_max = ns_max.min(world.calm_ns - elapsed_ns());
            if rng.percent(percent) && ns_max > 0 {
                self.host.stall_at(2, rng.range(ns_max / 10, ns_max));
            }
        }
        let checked = lane.check(&request, &caller).await;
        self.host.no_stall();
        recorder.flush().unwrap();
        let Ok(answer) = checked else { return Reply::NotReady };
        let revision = answer.revision.clone().unwrap();
        let commit = self.life.lock().unwrap().published.get(&revision.number).copied().flatten();
        Reply::Check(Box::new(Checked { answer, commit, incarnation }))
    }
}

/// The publisher of production; what it published is written down, for the checker and on the disk.
struct Recorded {
    inner: CellPublisher,
    replica: Arc<Replica>,
    world: Arc<World>,
}

impl Recorded {
    fn step(&self, step: Step) {
        let (replica, incarnation) = (self.replica.place, self.replica.life.lock().unwrap().incarnation);
        self.world.trace(|| format!("replica {replica}.{incarnation} {step:?}"));
        self.world.steps.lock().unwrap().push(Stepped { replica, incarnation, at_ns: elapsed_ns(), step });
    }

    fn published(&self, hash: [u8; 32]) {
        let view = self.replica.life.lock().unwrap().cell.load().expect("something was published");
        let (revision, digest) = (view.snapshot.revision().clone(), view.snapshot.digest());
        *self.replica.disk.lock().unwrap() = Some(Position { revision: revision.clone(), hash });
        let commit = self.world.store.lock().unwrap().find(hash, &revision, digest);
        self.replica.life.lock().unwrap().published.insert(revision.number, commit);
        self.step(Step::Published { revision, commit });
    }
}

impl Publisher for Recorded {
    fn replace(&mut self, state: store::State, sent_at: Now) -> Result<(), String> {
        let hash = state.hash;
        self.inner.replace(state, sent_at)?;
        self.published(hash);
        Ok(())
    }

    fn apply(&mut self, commits: &[CommitRow], sent_at: Now) -> Result<(), String> {
        self.inner.apply(commits, sent_at)?;
        self.published(commits.last().unwrap().hash);
        Ok(())
    }

    fn refresh(&mut self, sent_at: Now) {
        self.inner.refresh(sent_at);
    }

    fn quarantine(&mut self, reason: &str) {
        self.inner.quarantine(reason);
        self.replica.life.lock().unwrap().quarantined = true;
        self.step(Step::Quarantined);
    }
}

/// The way to the store.
struct Link {
    peer: Peer,
    replica: Arc<Replica>,
    /// Kept open: the store's hint never comes over this network.
    _wake: watch::Sender<u64>,
}

impl Link {
    async fn ask(&self, call: Call) -> Result<Reply, store::Error> {
        let store = format!("store-{}", *self.replica.store.lock().unwrap());
        self.peer.ask(&store, call).await.map_err(|error| store::Error::Unavailable(error.to_string()))
    }
}

#[async_trait]
impl Source for Link {
    async fn load(&self) -> Result<store::State, store::Error> {
        match self.ask(Call::Load).await? {
            Reply::Load(state) => Ok(*state),
            _ => panic!("a load is answered by a state"),
        }
    }

    async fn changes(&self, after: u64) -> Result<Changes, store::Error> {
        match self.ask(Call::Changes(after)).await? {
            Reply::Changes(changes) => Ok(changes),
            _ => panic!("a poll is answered by changes"),
        }
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self._wake.subscribe()
    }
}

/// Proofs are spent in the store, as in production, over the same bad network.
struct Ledger {
    peer: Peer,
    replica: Arc<Replica>,
}

#[async_trait]
impl ProofLedger for Ledger {
    async fn spend(&self, key: [u8; 32], _expires_at_unix_s: i64) -> Result<bool, String> {
        let store = format!("store-{}", *self.replica.store.lock().unwrap());
        match self.peer.ask(&store, Call::Spend(key)).await.map_err(|error| error.to_string())? {
            Reply::Spend(first) => Ok(first),
            _ => panic!("a use is answered so"),
        }
    }
}

/// The policy of the simulation asks for none.
struct NoApprovals;

#[async_trait::async_trait]
impl ApprovalLedger for NoApprovals {
    async fn ask(&self, _request: AskApproval) -> Result<AskOutcome, String> {
        Err("no call of the simulation asks".to_owned())
    }

    async fn use_once(&self, _request: UseApprovals) -> Result<UseOutcome, String> {
        Err("no call of the simulation uses one".to_owned())
    }

    async fn repeated(&self, _request: &UseApprovals) -> Result<Option<String>, String> {
        Ok(None)
    }
}
