//! Tests of long listings: other calls run in between, and the newest view decides.

use super::*;
use crate::model::limits::LIST_SLICE_TOOLS;
use crate::service::request::{LIST_TOOLS, TraceHeaders};

/// A listing of as many names as fit into four slices; the first one is [`TOOL`].
fn listing(world: &ServiceFixture) -> ListToolsRequest {
    let arguments = JsonObject::default();
    let call = ProofCall { tool: LIST_TOOLS, arguments: &arguments, audience: Some(AUDIENCE) };
    let proof = issue::sign_proof(&world.agent, &world.tokens, &call, None, world.clock.now()).unwrap();
    let others = (1..4 * LIST_SLICE_TOOLS).map(|index| format!("no/such-{index}"));
    ListToolsRequest {
        request_id: String::new(),
        credential: AgentCredential::Chain(world.tokens.clone()),
        proof: Some(proof.into()),
        tools: std::iter::once(TOOL.to_owned()).chain(others).collect(),
        audience: Some(AUDIENCE.to_owned()),
        trace: TraceHeaders::default(),
    }
}

/// The answer to a listing while which `meanwhile` runs, and whether it ran before the listing ended.
async fn listed(world: &ServiceFixture, meanwhile: impl FnOnce(&ServiceFixture)) -> (ListToolsAnswer, bool) {
    let (request, caller) = (listing(world), caller());
    let ended = AtomicBool::new(false);
    let list = async {
        let answer = world.service.list_tools(&request, &caller).await.unwrap();
        ended.store(true, Ordering::SeqCst);
        answer
    };
    let other = async {
        meanwhile(world);
        !ended.load(Ordering::SeqCst)
    };
    let (answer, ran_between) = futures_util::future::join(list, other).await;
    let names: Vec<&String> = answer.tools.iter().map(|tool| &tool.tool).collect();
    assert_eq!(names, request.tools.iter().collect::<Vec<_>>(), "each name once, in order");
    (answer, ran_between)
}

fn first(answer: &ListToolsAnswer) -> (Reason, Effect, Reason) {
    (answer.reason, answer.tools[0].effect, answer.tools[0].reason)
}

#[tokio::test]
async fn a_long_listing_lets_other_calls_run() {
    let world = world();
    let (answer, ran_between) = listed(&world, |_| {}).await;
    assert!(ran_between);
    assert_eq!(first(&answer), (Reason::Ok, Effect::Permit, Reason::Ok));
    assert!(answer.tools.iter().skip(1).all(|tool| tool.reason == Reason::ToolUnknown), "{answer:?}");
}

#[tokio::test]
async fn the_newest_view_decides_a_long_listing() {
    let world = world();
    let revoke = |world: &ServiceFixture| {
        let changes = [RowChange::Revocation(session_killed())];
        drop(world.builder.lock().unwrap().apply_changes(2, StateDigest::default(), changes.iter()).unwrap());
    };
    let (answer, _) = listed(&world, revoke).await;
    assert_eq!(first(&answer), (Reason::RevokedSession, Effect::Deny, Reason::RevokedSession));

    let world = self::world();
    let removed = |world: &ServiceFixture| {
        let proof = world.cell.load().unwrap().proof;
        let changes = [RowChange::DocumentRemoved(DocumentKey { kind: "tool".into(), id: TOOL.into() })];
        let snapshot = world.builder.lock().unwrap().apply_changes(2, StateDigest::default(), changes.iter()).unwrap();
        world.cell.publish(SnapshotView { snapshot, proof });
    };
    let (answer, _) = listed(&world, removed).await;
    assert_eq!(first(&answer), (Reason::Ok, Effect::Deny, Reason::ToolUnknown));
    assert_eq!(answer.revision.map(|revision| revision.number), Some(2));

    let world = self::world();
    let (answer, _) = listed(&world, |world| world.clock.advance_ms(1_500)).await;
    assert_eq!(first(&answer), (Reason::Ok, Effect::Deny, Reason::Stale), "a destructive tool");

    let world = self::world();
    let (answer, _) = listed(&world, |world| {
        world.clock.advance_ms(700_000);
        world.cell.renew_proof(FreshnessProof::SentAt(world.clock.now()));
    })
    .await;
    assert_eq!(first(&answer), (Reason::TokenExpired, Effect::Deny, Reason::TokenExpired));
}

/// A proof makes one listing, whoever sends it again.
#[tokio::test]
async fn the_proof_of_a_listing_is_spent() {
    let world = world();
    let request = listing(&world);
    for (connection_id, reason) in [(1, Reason::Ok), (1, Reason::ProofReplayed), (2, Reason::ProofReplayed)] {
        let answer = world.service.list_tools(&request, &Caller { connection_id, ..caller() }).await.unwrap();
        assert_eq!(answer.reason, reason);
    }
}
