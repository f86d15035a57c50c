//! A proof of possession comes again: on another connection, under another name, at any time for which it would still verify.

use super::*;
use crate::model::limits::PROOF_WINDOW_S;
use crate::model::time::Now;

/// A destructive call whose proof was made by a clock that is ahead by as much as is allowed, so that it verifies for longest. The ledger
/// of the store calls every key new here: that a proof is not new is known without it.
#[tokio::test]
async fn a_proof_is_permitted_once_for_as_long_as_it_verifies() {
    let world = world();
    let begin = world.clock.now();
    let ahead = Now { unix_ns: begin.unix_ns + PROOF_WINDOW_S * 1_000_000_000, ..begin };
    let request = CheckRequest { proof: Some(proof(&world, ahead)), ..asked(&world) };
    let check = async |request: &CheckRequest, connection_id: u64| {
        world.cell.renew(Proof::SentAt(world.clock.now()));
        let caller = Caller { connection_id, ..caller() };
        let answer = world.lane.check(request, &caller).await.unwrap();
        (answer.decision.effect, answer.decision.reason)
    };
    // At once, before any of them has spent it: one wins.
    let racers = futures_util::future::join_all((0..8).map(|connection| check(&request, connection))).await;
    let permits = racers.iter().filter(|(effect, _)| *effect == Effect::Permit).count();
    let replayed = racers.iter().filter(|answer| **answer == (Effect::Deny, Reason::ProofReplayed)).count();
    assert_eq!((permits, replayed), (1, 7), "{racers:?}");

    let named = CheckRequest { request_id: "r".to_owned(), ..request.clone() };
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
        // Others fill and turn the table meanwhile.
        let other = CheckRequest { proof: Some(proof(&world, world.clock.now())), ..request.clone() };
        assert_eq!(check(&other, 0).await, (Effect::Permit, Reason::Ok), "after {second} s");
        world.clock.advance_ms(1_000);
    }
    assert_eq!(replayed_for_s, 2 * PROOF_WINDOW_S, "it was denied for being used to the last second of its life");
    assert_ne!(last, Some(Reason::ProofReplayed), "and then for its age");
}

fn proof(world: &World, at: Now) -> Bytes {
    let arguments = Object::default();
    let call = ProofOf { tool: TOOL, arguments: &arguments, audience: Some(AUDIENCE) };
    issue::prove(&world.agent, &world.tokens, &call, None, at).unwrap().into()
}
