//! Many destructive calls at once on PostgreSQL. Each is permitted, or denied by a busy or a stale replica. Revocations go on
//! during them, and no denied call uses an approval.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::RevocationMeaning::Dead;
use portcullis::api::r#gen::approval_service_client::ApprovalServiceClient;
use portcullis::model::approval::ApprovalFilter;
use portcullis::store::Store as _;
use portcullis::store::postgres::{Durability, PostgresStore, Settings};
use portcullis::token::PrivateKey;

use crate::harness::{ISSUER, Server, World, authorization, binary, jwk, signed};
use crate::postgres;

const APPROVE: &str = "/portcullis.v1.ApprovalService/Approve";
/// Calls in flight at the same time.
const CALLERS: usize = 300;
const CALLS_EACH: usize = 4;
const APPROVED: u64 = 10;
const KILLS: usize = 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_destructive_calls_denies_for_no_other_reason() {
    let world = World::new();
    let olga = PrivateKey::generate().unwrap();
    let operator = format!(
        "---\n{{kind: operator, id: olga, keys: [{}], roles: [approve], groups: [leads], users: [{{issuer: {ISSUER}, sub: olga}}]}}\n",
        jwk(&olga)
    );
    world.write_policy(&format!("{}{operator}", world.policy()));
    let url = tokio::task::block_in_place(|| postgres::shared().database());
    let mut flags = binary();
    flags.arg("--policies").arg(world.policies()).args(["--store", "env:PORTCULLIS_STORE"]);
    flags.env("PORTCULLIS_STORE", &url).env("PORTCULLIS_STORE_DURABILITY", "single");
    let server = Server::start_with(&world, &flags);
    let local = server.operator().await;
    let chain = world.session("alpha", "s-1");

    // Ten refunds that a person has approved, made in the middle of the flood.
    let client = server.connect().await;
    for amount in 1..=APPROVED {
        let asked = world.call(&chain, "pay/refund", &format!("{{\"amount\":{amount}}}"));
        let digest = client.clone().check(asked).await.unwrap().into_inner().approval.unwrap().digest;
        let message = wire::ApproveRequest { digest, reason: String::new() };
        let by = authorization(&olga, &local.history, APPROVE, &message);
        ApprovalServiceClient::new(local.channel.clone()).approve(signed(message, &[by])).await.unwrap();
    }

    let over = Arc::new(AtomicBool::new(false));
    let kills = tokio::spawn({
        let over = over.clone();
        async move {
            let mut took = Vec::new();
            while took.len() < KILLS || !over.load(Ordering::SeqCst) && took.len() < 10 * KILLS {
                let begun = Instant::now();
                local.revoke("session", &[&format!("other-{}", took.len())], Dead).await;
                took.push(begun.elapsed());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            took
        }
    });
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..CALLERS {
        let calls: Vec<_> =
            (0..CALLS_EACH).map(|call| world.call(&chain, "crm/wipe", &format!("{{\"n\":{caller},\"m\":{call}}}"))).collect();
        let mut client = if caller % 50 == 0 { server.connect().await } else { client.clone() };
        callers.spawn(async move {
            let mut reasons = Vec::new();
            for call in calls {
                reasons.push(client.check(call).await.unwrap().into_inner().reason);
            }
            reasons
        });
    }
    let (mut permitted, mut refunds) = (0, Vec::new());
    for amount in 1..=APPROVED {
        let request = world.call(&chain, "pay/refund", &format!("{{\"amount\":{amount}}}"));
        let answer = client.clone().check(request).await.unwrap().into_inner();
        permitted += usize::from(answer.effect() == wire::Effect::Permit);
        refunds.push(answer.reason);
    }
    let mut reasons = std::collections::BTreeMap::<String, usize>::new();
    while let Some(told) = callers.join_next().await {
        for reason in told.unwrap() {
            *reasons.entry(reason).or_default() += 1;
        }
    }
    over.store(true, Ordering::SeqCst);
    let mut took = kills.await.unwrap();
    took.sort();
    println!("{reasons:?}; refunds {refunds:?}; kills p50 {:?} max {:?}", took[took.len() / 2], took[took.len() - 1]);

    // On a busy machine the follower may be late. Then the denial as stale is correct.
    let known = ["OK", "LEDGER_BUSY", "STALE"];
    assert!(reasons.keys().chain(&refunds).all(|reason| known.contains(&reason.as_str())), "{reasons:?} {refunds:?}");
    assert!(reasons["OK"] > 0, "{reasons:?}");
    let store = PostgresStore::open(Settings::parse(&url, Durability::Single).unwrap()).await.unwrap();
    let rows = store.approvals(ApprovalFilter::All, 1000).await.unwrap().rows;
    let used = rows.iter().filter(|row| row.used.is_some()).count();
    assert_eq!((used, rows.len()), (permitted, 10), "an approval was used by a call that was denied");
}
