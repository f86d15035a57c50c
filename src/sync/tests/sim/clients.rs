//! The machines around the replicas: the copies of the store, the operators that commit, and the gateways that ask.
//!
//! Look next at `wire.rs`, the protocol between them.

use std::sync::Arc;
use std::time::Duration;

use super::checker;
use super::fixture::{CHAINS, DESTRUCTIVE, FIXTURE, SimFixture, request};
use super::host::{HostTasks, MS, SimHost, elapsed_ns};
use super::remote_store::RemoteStore;
use super::rng::Rng;
use super::simulation::Simulation;
use super::wire::{SimClient, SimReply, SimRequest, serve};
use crate::audit::AuditRecorder;
use crate::model::reason::Reason;
use crate::model::revision::Revision;
use crate::model::time::Clock as _;
use crate::pap::{AdministrationPoint, AuthorizedAct, Error, FleetWaitReport};
use crate::store::CommitRequest;

/// One copy of the store.
pub(super) async fn store(world: Arc<Simulation>, host: Arc<SimHost>, copy: usize) -> turmoil::Result {
    let (post, machine, tasks) = (world.post.clone(), host.clone(), HostTasks::default());
    let served = serve(post, host.clone(), tasks.clone(), move |call| {
        let (world, host) = (world.clone(), host.clone());
        async move { answer(&world, &host, copy, call).await }
    });
    machine.run(tasks.run(served)).await
}

async fn answer(world: &Simulation, host: &SimHost, copy: usize, call: SimRequest) -> SimReply {
    if let SimRequest::Commit(request) = &call {
        // The commit is on both copies before it is visible anywhere. Without the other copy, it waits.
        confirmed(world, copy).await;
        pause(world, 0, 20).await;
        confirmed(world, copy).await;
        let unix_ms = host.now().unix_ms();
        let committed = world.store.lock().unwrap().commit(copy, request, unix_ms, &FIXTURE);
        world.trace(|| format!("store {copy} commit {committed:?} {:?}", request.writes));
        return SimReply::Commit(committed);
    }
    pause(world, 0, 5).await;
    let reply = read(world, host, copy, &call);
    pause(world, 0, 5).await;
    if matches!(call, SimRequest::Changes(_) | SimRequest::Revision | SimRequest::Replicas) {
        return reply;
    }
    // A read counts only if the copy could still write after it: the heartbeat, in the same transaction.
    confirmed(world, copy).await;
    let mut store = world.store.lock().unwrap();
    let written = match &call {
        SimRequest::Beat(heartbeat) => store.beat(copy, heartbeat, host.now().unix_ms()),
        SimRequest::Load(heartbeat, followed) | SimRequest::Poll(heartbeat, followed) => {
            // A replica of another history is refused, or detects it by the answer. Nothing is written in either case.
            if followed.as_ref().is_some_and(|followed| *followed != store.copies[copy].history) {
                return reply;
            }
            store.beat(copy, heartbeat, host.now().unix_ms())
        }
        SimRequest::Register(registration) => {
            store.register(copy, registration, host.now().unix_ms());
            Ok(())
        }
        _ => Ok(()),
    };
    written.map_or_else(SimReply::Failed, |()| reply)
}

fn read(world: &Simulation, host: &SimHost, copy: usize, call: &SimRequest) -> SimReply {
    let mut store = world.store.lock().unwrap();
    match call {
        SimRequest::Load(..) => SimReply::Load(Box::new(store.load(copy))),
        SimRequest::Poll(heartbeat, _) => SimReply::Changes(store.changes(copy, heartbeat.applied_number)),
        SimRequest::Changes(after) => store.changes_read(copy, *after).map_or_else(SimReply::Failed, SimReply::Changes),
        SimRequest::Revision => SimReply::Revision(store.revision(copy)),
        SimRequest::Replicas => SimReply::Replicas(store.replicas(copy, host.now().unix_ms())),
        SimRequest::Spend(key) => SimReply::Spend(store.spend(*key)),
        SimRequest::Register(_) | SimRequest::Beat(_) => SimReply::Done,
        SimRequest::Commit(_) | SimRequest::Check(_) => panic!("not a reading"),
    }
}

async fn confirmed(world: &Simulation, copy: usize) {
    while !world.store.lock().unwrap().confirms(copy) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn pause(world: &Simulation, from_ms: i64, to_ms: i64) {
    let ms = world.rng.lock().unwrap().range(from_ms, to_ms);
    tokio::time::sleep(Duration::from_millis(ms.unsigned_abs())).await;
}

/// An operator that makes one act after another until the faults end.
pub(super) async fn writer(world: Arc<Simulation>, place: usize) -> turmoil::Result {
    let mut rng = Rng::new(world.seed, 200 + place as u64);
    let peer = SimClient::new(world.post.clone());
    for act in 0.. {
        let pause_ms = rng.range(40, 700);
        tokio::time::sleep(Duration::from_millis(pause_ms.unsigned_abs())).await;
        if elapsed_ns() > world.calm_ns {
            break;
        }
        let writes = FIXTURE.act(&mut rng, &format!("w{place}-{act}"));
        let to = format!("store-{}", world.store.lock().unwrap().primary);
        let asked = peer.ask(&to, SimRequest::Commit(CommitRequest { writes, ..CommitRequest::default() }));
        let answered = tokio::time::timeout(Duration::from_secs(2), asked).await;
        if let Ok(Ok(SimReply::Commit(Ok(commit)))) = answered {
            world.trace(|| format!("writer {place} acknowledged {commit}"));
            world.store.lock().unwrap().tree[commit].acknowledged_ns = Some(elapsed_ns());
        }
    }
    Ok(())
}

/// An operator that revokes and waits until no replica permits the call any more, as `revoke --wait fleet` does.
pub(super) async fn waiter(world: Arc<Simulation>, host: Arc<SimHost>, place: usize) -> turmoil::Result {
    let mut rng = Rng::new(world.seed, 400 + place as u64);
    let peer = SimClient::new(world.post.clone());
    let link = RemoteStore::new(&world.post, world.waiters_copy.clone(), world.kind.durability());
    let admin = AdministrationPoint::new(Arc::new(link), host, Arc::new(AuditRecorder::discarding("sim")));
    let by = AuthorizedAct::unsigned_for_tests("wait");
    for act in 0.. {
        tokio::time::sleep(Duration::from_millis(rng.range(50, 1_200).unsigned_abs())).await;
        if elapsed_ns() > world.calm_ns {
            break;
        }
        let writes = FIXTURE.kill(&mut rng, &format!("k{place}-{act}"));
        let to = format!("store-{}", *world.waiters_copy.lock().unwrap());
        let asked = peer.ask(&to, SimRequest::Commit(CommitRequest { writes, ..CommitRequest::default() }));
        let answered = tokio::time::timeout(Duration::from_secs(2), asked).await;
        let Ok(Ok(SimReply::Commit(Ok(commit)))) = answered else { continue };
        let (revision, unix_ms) = {
            let node = &mut world.store.lock().unwrap().tree[commit];
            node.acknowledged_ns = Some(elapsed_ns());
            (Revision { history: node.histories[0].clone(), number: node.row.number }, node.row.unix_ms)
        };
        let wait = world.wait_begins(commit);
        let waited = admin.wait_for_fleet(&by, &revision, unix_ms).await;
        world.wait_returns(wait, waited.is_ok());
        world.trace(|| format!("waiter {place} for {commit}: {}", shown(&waited)));
    }
    Ok(())
}

fn shown(waited: &Result<FleetWaitReport, Error>) -> String {
    match waited {
        Ok(waited) => {
            let replicas = waited.replicas.iter().map(|(listed, outcome)| format!(" {}: {}", listed.address, outcome.as_str()));
            format!("{} ms{}", waited.waited_ms, replicas.collect::<String>())
        }
        Err(error) => error.to_string(),
    }
}

/// One of a gateway's connections to each replica.
pub(super) async fn gateway(world: Arc<Simulation>, host: Arc<SimHost>, place: usize) -> turmoil::Result {
    let mut rng = Rng::new(world.seed, 300 + place as u64);
    let peers: Vec<_> = world.replicas.iter().map(|_| SimClient::new(world.post.clone())).collect();
    while elapsed_ns() < world.end_ns {
        let pause_ms = rng.range(10, 90);
        tokio::time::sleep(Duration::from_millis(pause_ms.unsigned_abs())).await;
        let (replica, chain) = (rng.below(world.replicas.len()), rng.below(CHAINS));
        let tool = usize::from(rng.percent(30));
        let at_least = rng.percent(15).then(|| seen(&world, &mut rng)).flatten();
        let patience = Duration::from_millis(if rng.percent(85) { 1_000 } else { 7_000 });
        let proof = (tool == DESTRUCTIVE).then(|| FIXTURE.proof(chain, tool, host.now()));
        let request = request(chain, tool, proof, at_least.as_ref().map(|(_, revision)| revision.clone()));
        let sent_ns = elapsed_ns();
        let to = format!("replica-{replica}");
        let asked = peers[replica].ask(&to, SimRequest::Check(Box::new(request)));
        let Ok(Ok(SimReply::Check(checked))) = tokio::time::timeout(patience, asked).await else { continue };
        let answer = checked.answer;
        let valid_ns = i64::try_from(answer.valid_for_ms).unwrap() * MS;
        world.record(
            checker::ObservedAnswer {
                replica,
                incarnation: checked.incarnation,
                pair: SimFixture::pair(chain, tool),
                destructive: tool == DESTRUCTIVE,
                at_least: at_least.map(|(commit, _)| commit),
                effect: answer.decision.effect,
                unavailable: answer.decision.reason == Reason::RevisionUnavailable,
                revision: answer.revision.unwrap(),
                commit: checked.commit,
                policy: checked.policy,
                sent_ns,
                answered_ns: checked.answered_ns,
                received_ns: elapsed_ns(),
                usable_until_ns: sent_ns + host.real_ns(valid_ns),
                age_ms: answer.snapshot_age_ms,
                valid_for_ms: answer.valid_for_ms,
            },
            answer.decision.reason,
        );
    }
    Ok(())
}

/// A recent revision that a writer has learned of.
fn seen(world: &Simulation, rng: &mut Rng) -> Option<(usize, Revision)> {
    let store = world.store.lock().unwrap();
    let mut told: Vec<_> = (1..store.tree.len()).filter(|place| store.tree[*place].acknowledged_ns.is_some()).collect();
    told.drain(..told.len().saturating_sub(3));
    let commit = *told.get(rng.below(told.len().max(1)))?;
    let node = &store.tree[commit];
    Some((commit, Revision { history: node.histories[0].clone(), number: node.row.number }))
}
