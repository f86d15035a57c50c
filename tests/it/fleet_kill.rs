//! Revocations in a fleet of real processes on PostgreSQL. Every replica denies in the end; none permits after acknowledgement and
//! bound.
//!
//! This is the short form of `load-tests/fleet.rs`, which measures. No result depends on how long a step takes.

use std::process::Command;
use std::time::{Duration, Instant};

use portcullis::api::r#gen as wire;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::harness::{PATIENCE, ServerProcess, TestWorld, binary};
use crate::postgres;

const REPLICAS: usize = 3;
const KILLS: usize = 20;
/// The bound of a new store.
const BOUND: Duration = Duration::from_secs(5);
/// Consecutive denials after which a replica is believed.
const DENIALS: usize = 10;

fn with_store(url: &str) -> Command {
    let mut command = binary();
    command.env("PORTCULLIS_STORE", url).env("PORTCULLIS_STORE_DURABILITY", "single");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn no_replica_permits_what_was_killed() {
    let world = TestWorld::new();
    let url = postgres::shared().database();
    let mut servers = vec![ServerProcess::start_with(&world, with_store(&url).arg("--policies").arg(world.policies()))];
    for number in 1..REPLICAS {
        servers.push(ServerProcess::start_at(&world, &with_store(&url), &world.folder.path().join(format!("data{number}"))));
    }
    let operator = servers[0].operator().await;
    for number in 0..KILLS {
        let session = format!("doomed-{number}");
        let call = world.call(&world.session("alpha", &session), "crm/look", "{}");
        let (acknowledged_out, acknowledged) = watch::channel(None::<Instant>);
        let (alive_out, mut alive) = tokio::sync::mpsc::channel(REPLICAS);
        let mut watchers = JoinSet::new();
        for server in &servers {
            let (mut client, call) = (server.connect().await, call.clone());
            let (acknowledged, alive) = (acknowledged.clone(), alive_out.clone());
            watchers.spawn(async move {
                let mut denials = 0;
                let until = Instant::now() + PATIENCE;
                let mut is_first = true;
                while denials < DENIALS {
                    let asked = Instant::now();
                    let answer = client.check(call.clone()).await.unwrap().into_inner();
                    if answer.effect() == wire::Effect::Permit {
                        assert_eq!(denials, 0, "a replica permits what it has denied");
                        let late = acknowledged.borrow().is_some_and(|at| asked > at + BOUND);
                        assert!(!late, "a permit after acknowledgement and bound");
                        if std::mem::take(&mut is_first) {
                            alive.send(()).await.unwrap();
                        }
                    } else {
                        assert_eq!((is_first, answer.reason.as_str()), (false, "REVOKED_SESSION"));
                        denials += 1;
                    }
                    assert!(asked < until, "the revocation does not reach a replica");
                }
            });
        }
        drop(alive_out);
        for _ in 0..REPLICAS {
            alive.recv().await.expect("a replica never permitted");
        }
        operator.revoke("session", &[&session], wire::RevocationMeaning::Unspecified).await;
        acknowledged_out.send_replace(Some(Instant::now()));
        while let Some(watched) = watchers.join_next().await {
            watched.unwrap();
        }
    }
}
