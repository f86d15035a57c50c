//! Many destructive calls at once on PostgreSQL: each is permitted, or denied by a busy replica or one that is stale, and each has one
//! record. Kills go on beside them, and no approval is used by a call that is denied.

use std::collections::{BTreeMap, BTreeSet};
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

use crate::harness::{ISSUER, ServerProcess, TestWorld, authorization, binary, jwk, signed};
use crate::postgres;

const APPROVE: &str = "/portcullis.v1.ApprovalService/Approve";
/// Calls in flight at the same time.
const CALLERS: usize = 300;
const CALLS_EACH: usize = 4;
const APPROVED: u64 = 10;
const KILLS: usize = 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_destructive_calls_denies_for_no_other_reason() {
    let world = TestWorld::new();
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
    let server = ServerProcess::start_with(&world, &flags);
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
            let mut answers = Vec::new();
            for call in calls {
                answers.push(client.check(call).await.unwrap().into_inner());
            }
            answers
        });
    }
    let mut refunds = Vec::new();
    for amount in 1..=APPROVED {
        let request = world.call(&chain, "pay/refund", &format!("{{\"amount\":{amount}}}"));
        refunds.push(client.clone().check(request).await.unwrap().into_inner());
    }
    let mut answers = refunds.clone();
    while let Some(told) = callers.join_next().await {
        answers.extend(told.unwrap());
    }
    over.store(true, Ordering::SeqCst);
    let mut took = kills.await.unwrap();
    took.sort();
    let mut reasons = BTreeMap::<&str, usize>::new();
    for answer in &answers {
        *reasons.entry(&answer.reason).or_default() += 1;
    }
    println!("{reasons:?}; kills p50 {:?} max {:?}", took[took.len() / 2], took[took.len() - 1]);

    assert_eq!(answers.len(), CALLERS * CALLS_EACH + refunds.len(), "each call is answered");
    for answer in &answers {
        match answer.reason.as_str() {
            "OK" => assert_eq!(answer.effect(), wire::Effect::Permit),
            "LEDGER_BUSY" => assert_eq!(answer.effect(), wire::Effect::Deny),
            // The follower may be late on a busy machine. Then the answer is true: the proof of freshness is a second old or older.
            "STALE" => assert!(answer.snapshot_age_ms >= 1_000, "stale after {} ms", answer.snapshot_age_ms),
            other => panic!("{other}: {}", answer.message),
        }
    }
    assert!(reasons["OK"] > 0, "{reasons:?}");
    // Each answer has exactly one record, which says what was answered.
    let lines = server.audit();
    let mut records = BTreeMap::<&str, Vec<&str>>::new();
    for line in lines.iter().filter(|line| line["kind"] == "decision") {
        records.entry(line["decision_id"].as_str().unwrap()).or_default().push(line["reason"].as_str().unwrap());
    }
    for answer in &answers {
        assert_eq!(records.get(answer.decision_id.as_str()), Some(&vec![answer.reason.as_str()]), "{}", answer.decision_id);
    }
    // An approval is used by the call that was permitted by it, and by no call that was denied.
    let store = PostgresStore::open(Settings::parse(&url, Durability::Single).unwrap()).await.unwrap();
    let rows = store.approvals(ApprovalFilter::All, 1000).await.unwrap().rows;
    let used: BTreeSet<&str> = rows.iter().filter_map(|row| Some(row.used.as_ref()?.decision_id.as_str())).collect();
    let permitted = refunds.iter().filter(|answer| answer.effect() == wire::Effect::Permit);
    let permitted: BTreeSet<&str> = permitted.map(|answer| answer.decision_id.as_str()).collect();
    assert_eq!(used, permitted);
    assert_eq!(rows.len(), refunds.len());
}
