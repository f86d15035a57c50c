//! Tests of replayed proofs of possession: on another connection, under another request id, at any time while the proof is valid.

use super::*;
use crate::model::limits::PROOF_WINDOW_S;
use crate::model::time::ClockReading;

/// A destructive call whose proof was made by a clock that is as far ahead as allowed, so the proof is valid for longest. The
/// store's ledger accepts every key as new here, so the replica alone must detect the replay.
#[tokio::test]
async fn a_proof_is_permitted_once_for_as_long_as_it_verifies() {
    let world = world();
    let begin = world.clock.now();
    let ahead = ClockReading { unix_ns: begin.unix_ns + PROOF_WINDOW_S * 1_000_000_000, ..begin };
    let request = DecisionRequest { proof: Some(proof(&world, ahead)), ..asked(&world) };
    let check = async |request: &DecisionRequest, connection_id: u64| {
        world.cell.renew_proof(FreshnessProof::SentAt(world.clock.now()));
        let caller = Caller { connection_id, ..caller() };
        let answer = world.service.check(request, &caller).await.unwrap();
        (answer.decision.effect, answer.decision.reason)
    };
    // All at once, before any of them has spent the proof: one is permitted.
    let racers = futures_util::future::join_all((0..8).map(|connection| check(&request, connection))).await;
    let permits = racers.iter().filter(|(effect, _)| *effect == Effect::Permit).count();
    let replayed = racers.iter().filter(|answer| **answer == (Effect::Deny, Reason::ProofReplayed)).count();
    assert_eq!((permits, replayed), (1, 7), "{racers:?}");

    let named = DecisionRequest { request_id: "r".to_owned(), ..request.clone() };
    let (mut replayed_for_s, mut last) = (0, None);
    for second in 0..=2 * PROOF_WINDOW_S + 10 {
        for (request, connection) in [(&request, 0), (&request, 99), (&named, 0)] {
            let (effect, reason) = check(request, connection).await;
            assert_eq!(effect, Effect::Deny, "after {second} s: {reason:?}");
            last = Some(reason);
            if reason == Reason::ProofReplayed {
                replayed_for_s = second;
            }
        }
        // Other proofs fill and rotate the table meanwhile.
        let other = DecisionRequest { proof: Some(proof(&world, world.clock.now())), ..request.clone() };
        assert_eq!(check(&other, 0).await, (Effect::Permit, Reason::Ok), "after {second} s");
        world.clock.advance_ms(1_000);
    }
    assert_eq!(replayed_for_s, 2 * PROOF_WINDOW_S, "it was denied for being used to the last second of its life");
    assert_ne!(last, Some(Reason::ProofReplayed), "and then for its age");
}

fn proof(world: &ServiceFixture, at: ClockReading) -> Bytes {
    super::proof(&world.agent, &world.tokens, TOOL, &JsonObject::default(), at)
}
