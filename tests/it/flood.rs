//! A flood of unknown callers through the real server: its cost for the audit log is bounded, and no denial is missing from the
//! counts.

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::check_request::Credential;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use portcullis::model::limits::{UNVERIFIED_RECORDS_BURST, UNVERIFIED_RECORDS_PER_S};
use serde_json::Value;

use crate::harness::{ServerProcess, TestWorld, channel, request};

/// Far more calls than are recorded one by one, and enough for 12 MB if each were recorded.
const BATCHES: u64 = 200;
const CALLS: u64 = 128;
const LISTS: u64 = 400;
const ACTS: u64 = 400;
/// Longer than any line.
const LINE_BYTES_MAX: u64 = 2_048;
/// Recorders: the serving runtimes and administration, each with its own rate.
const RECORDERS: u64 = 3;

#[tokio::test]
async fn a_flood_of_strangers_costs_few_bytes_and_no_count() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    let mut client = server.connect().await;
    let stranger = wire::Presentation { aat_chain: vec!["garbage".into()], aat_pop: Bytes::new() };
    let root = world.session("alpha", "s");
    let garbage = wire::CheckRequest {
        credential: Some(Credential::Presentation(stranger.clone())),
        ..request(&root, Bytes::new(), "crm/read", "{}")
    };
    let batch = wire::CheckBatchRequest { requests: vec![garbage.clone(); CALLS as usize] };
    let mut permitted = Vec::new();
    for round in 0..BATCHES {
        let answers = client.check_batch(batch.clone()).await.unwrap().into_inner().responses;
        assert!(answers.len() as u64 == CALLS && answers.iter().all(|answer| answer.reason == "TOKEN_MALFORMED"));
        if round % 20 == 0 {
            let answer = client.check(world.call(&root, "crm/read", "{}")).await.unwrap().into_inner();
            assert_eq!(answer.reason, "OK");
            permitted.push(answer.decision_id);
        }
    }
    for _ in 0..LISTS {
        let credential = Some(wire::list_tools_request::Credential::Presentation(stranger.clone()));
        client.list_tools(wire::ListToolsRequest { credential, ..Default::default() }).await.unwrap();
        client.explain(garbage.clone()).await.unwrap();
    }
    let mut admin = RevocationServiceClient::new(channel(&server.admin).await);
    for _ in 0..ACTS {
        admin.revoke(wire::RevokeRequest::default()).await.unwrap_err();
    }
    let metrics = server.get("/metrics").1;
    assert!(metrics.contains("\nportcullis_audit_room{portcullis_state=\""), "{metrics}");
    let merged = metrics.lines().find_map(|line| line.strip_prefix("portcullis_audit_merged_total ")).unwrap();
    assert!(merged.parse::<u64>().unwrap() > BATCHES * CALLS / 2, "{merged}");
    server.terminate();
    assert!(server.wait().success());

    let lines = server.audit();
    let count = |method: &str| -> u64 {
        let of_method = |line: &&Value| line["method"].as_str().unwrap().ends_with(method) && line["effect"] != "PERMIT";
        lines.iter().filter(of_method).map(|line| line["count"].as_u64().unwrap_or(1)).sum()
    };
    assert_eq!((count("Check"), count("ListTools"), count("Explain")), (BATCHES * CALLS, LISTS, LISTS));
    assert_eq!(count("/Revoke"), ACTS);
    assert!(permitted.iter().all(|id| lines.iter().any(|line| line["decision_id"] == id.as_str())), "each permit has its record");

    // The limit is in bytes per second, so it holds for any duration of the flood.
    let times: Vec<i64> = lines.iter().map(|line| line["time_unix_ns"].as_i64().unwrap()).collect();
    let took_s = (times.iter().max().unwrap() - times.iter().min().unwrap()) as u64 / 1_000_000_000 + 2;
    let singles = lines.iter().filter(|line| line["kind"] != "merged" && line["effect"] != "PERMIT").count() as u64;
    assert!(singles <= RECORDERS * (UNVERIFIED_RECORDS_BURST + took_s * UNVERIFIED_RECORDS_PER_S), "{singles} in {took_s} s");
    let bytes: u64 =
        std::fs::read_dir(world.data().join("audit")).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    let others = lines.len() as u64 - singles;
    assert!(bytes <= (singles + others) * LINE_BYTES_MAX, "{bytes} bytes");
    println!(
        "{} denials and refusals in {took_s} s: {singles} lines of their own, {bytes} bytes",
        BATCHES * CALLS + 2 * LISTS + ACTS
    );
}

/// A thief has an agent's chain without its key, and an operator's signed act that was used. Both are verified, and neither fills the disk.
#[tokio::test]
async fn a_flood_with_an_overheard_chain_and_act_costs_few_bytes_and_no_count() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let mut client = server.connect().await;
    let root = world.session("alpha", "s");
    let stolen = request(&root, Bytes::new(), "crm/read", "{}");
    let batch = wire::CheckBatchRequest { requests: vec![stolen.clone(); CALLS as usize] };
    for _ in 0..BATCHES / 4 {
        let answers = client.check_batch(batch.clone()).await.unwrap().into_inner().responses;
        assert!(answers.iter().all(|answer| answer.reason == "PROOF_MISSING"));
    }
    let presentation = wire::Presentation { aat_chain: root.tokens.clone(), aat_pop: Bytes::new() };
    for _ in 0..LISTS {
        let credential = Some(wire::list_tools_request::Credential::Presentation(presentation.clone()));
        client.list_tools(wire::ListToolsRequest { credential, ..Default::default() }).await.unwrap();
        client.explain(stolen.clone()).await.unwrap();
    }
    let proved = client.check(world.call(&root, "pay/large", "{}")).await.unwrap().into_inner();
    assert_eq!(proved.reason, "AGENT_DENIES");
    let overheard = operator.authorization("/portcullis.v1.RevocationService/List", &wire::ListRevocationsRequest { limit: 1 });
    let mut admin = RevocationServiceClient::new(channel(&server.admin).await);
    for act in 0..=ACTS {
        let mut call = tonic::Request::new(wire::ListRevocationsRequest { limit: 1 });
        call.metadata_mut().insert("authorization", overheard.parse().unwrap());
        assert_eq!(admin.list(call).await.is_ok(), act == 0);
    }
    server.terminate();
    assert!(server.wait().success());

    let lines = server.audit();
    let count = |is_one: &dyn Fn(&Value) -> bool| -> u64 {
        lines.iter().filter(|line| is_one(line)).map(|line| line["count"].as_u64().unwrap_or(1)).sum()
    };
    assert_eq!(count(&|line| line["method"] == "Check" && line["reason"] == "PROOF_MISSING"), BATCHES / 4 * CALLS);
    assert_eq!(count(&|line| line["method"] == "ListTools"), LISTS);
    assert_eq!(count(&|line| line["method"] == "Explain"), LISTS);
    assert_eq!(count(&|line| line["effect"] == "REFUSED" && line["operator"] != Value::Null), ACTS);
    assert!(lines.iter().any(|line| line["decision_id"] == proved.decision_id.as_str()), "who proved possession has a record");
    let times: Vec<i64> = lines.iter().map(|line| line["time_unix_ns"].as_i64().unwrap()).collect();
    let took_s = (times.iter().max().unwrap() - times.iter().min().unwrap()) as u64 / 1_000_000_000 + 2;
    let singles = lines.iter().filter(|line| line["kind"] != "merged").count() as u64;
    assert!(singles <= RECORDERS * (UNVERIFIED_RECORDS_BURST + took_s * UNVERIFIED_RECORDS_PER_S), "{singles} in {took_s} s");
    println!(
        "{} records that permit nothing in {took_s} s: {singles} lines of their own",
        BATCHES / 4 * CALLS + 2 * LISTS + ACTS
    );
}
