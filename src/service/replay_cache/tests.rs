//! Tests of replayed proofs, and of agents that present or use very many proofs.

use super::*;
use crate::model::time::{Clock as _, ManualClock};

const TURN_MS: i64 = RETENTION_MS as i64;

fn key(number: u64) -> [u8; 32] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&number.to_be_bytes());
    key
}

fn holder(agent: u32, user: u32) -> ProofHolder {
    ProofHolder { agent, user: agent << 16 | user }
}

#[test]
fn a_proof_is_used_once_while_it_could_come_again() {
    let clock = ManualClock::at_unix_s(1_000);
    let proofs = ProofReplayCache::new(clock.now());
    let spend = |number: u64, clock: &ManualClock| proofs.spend(&key(number), holder(1, 1), clock.now());
    assert_eq!(spend(1, &clock), SpendOutcome::First);
    for _ in 0..6 {
        clock.advance_ms(10_000);
        assert_eq!(spend(1, &clock), SpendOutcome::Replayed);
    }
    assert_eq!(spend(2, &clock), SpendOutcome::First);
    clock.advance_ms(1_000);
    assert_eq!(spend(2, &clock), SpendOutcome::Replayed, "kept over the turn");
    assert!(proofs.was_used(&key(2)) && !proofs.was_used(&key(3)));
    clock.advance_ms(2 * TURN_MS);
    assert_eq!(spend(1, &clock), SpendOutcome::First, "forgotten when it could not be presented any more");
}

#[test]
fn a_full_share_uses_nothing() {
    let clock = ManualClock::at_unix_s(1_000);
    let proofs = ProofReplayCache::with_size(clock.now(), 1, 4);
    let spend = |number| proofs.spend(&key(number), holder(1, number as u32), clock.now());
    assert_eq!([spend(1), spend(2), spend(3)], [SpendOutcome::First, SpendOutcome::First, SpendOutcome::ShareFull]);
    assert_eq!(spend(1), SpendOutcome::Replayed);
    assert!(!proofs.was_used(&key(3)), "what was denied was not used");
}

/// A use that is undone frees its room, and the proof can be used again. It still counts as presented.
#[test]
fn a_use_that_came_to_nothing_is_taken_back() {
    let clock = ManualClock::at_unix_s(1_000);
    let proofs = ProofReplayCache::with_size(clock.now(), 1, 4);
    let spend = |number| proofs.spend(&key(number), holder(1, number as u32), clock.now());
    let show = |number| proofs.present(&key(number), holder(1, number as u32), clock.now());
    assert_eq!(
        (show(1), spend(1), spend(2), spend(3)),
        (ProofPresentation::First, SpendOutcome::First, SpendOutcome::First, SpendOutcome::ShareFull)
    );
    proofs.unspend(&key(1), holder(1, 1));
    proofs.unspend(&key(9), holder(1, 9));
    assert!(!proofs.was_used(&key(1)) && proofs.was_used(&key(2)));
    assert_eq!((spend(3), spend(1), show(1)), (SpendOutcome::First, SpendOutcome::ShareFull, ProofPresentation::Repeated));
}

/// A flooding agent gets denials of its own. Other agents go on, and the sum stays within the limit.
#[test]
fn a_flooding_agent_fills_its_own_share() {
    for flooders in [1_u32, 3, 9] {
        let clock = ManualClock::at_unix_s(1_000);
        let proofs = ProofReplayCache::with_size(clock.now(), 4, 2_500);
        let (mut next, mut kept) = (0, vec![0_u32; 1 + flooders as usize]);
        let mut spend = |agent: u32, user: u32| {
            next += 1;
            let used = proofs.spend(&key(next), holder(agent, user), clock.now());
            kept[agent as usize] += u32::from(used == SpendOutcome::First);
            used
        };
        for round in 0..20_000 {
            for agent in 1..=flooders {
                spend(agent, round % 100);
            }
            if round % 200 == 0 {
                assert_eq!(spend(0, 0), SpendOutcome::First, "{flooders}: a quiet agent is never denied");
            }
        }
        let sum: u32 = kept.iter().sum();
        assert!(sum <= 10_000, "{kept:?}");
        for (agent, kept) in kept.iter().enumerate().skip(1) {
            let part = 10_000 / (flooders + 1);
            assert!((part * 8 / 10..=part * 11 / 10).contains(kept), "{flooders}: agent {agent} keeps {kept} of {part}");
        }
    }
}

/// One user's sessions of an agent leave room for the other users of the same agent.
#[test]
fn a_flooding_user_leaves_its_agent_to_others() {
    let clock = ManualClock::at_unix_s(1_000);
    let proofs = ProofReplayCache::with_size(clock.now(), 4, 2_500);
    let spend = |number: u64, user: u32| proofs.spend(&key(number), holder(1, user), clock.now());
    let kept = (0..20_000).filter(|number| spend(*number, 1) == SpendOutcome::First).count();
    assert!((3_000..3_500).contains(&kept), "a third: {kept}");
    assert!((20_000..20_500).all(|number| spend(number, 2) == SpendOutcome::First), "another user of the agent");
}

#[test]
fn only_the_first_showing_is_the_first() {
    let clock = ManualClock::at_unix_s(1_000);
    let proofs = ProofReplayCache::new(clock.now());
    let show = |number| proofs.present(&key(number), holder(1, 1), clock.now());
    assert_eq!([show(1), show(1), show(2)], [ProofPresentation::First, ProofPresentation::Repeated, ProofPresentation::First]);
    assert_eq!(proofs.spend(&key(1), holder(1, 1), clock.now()), SpendOutcome::First, "shown is not used");
    assert_eq!(proofs.spend(&key(3), holder(1, 1), clock.now()), SpendOutcome::First);
}

/// A proof that did not fit in the table must not count as first presented once there is room again.
#[test]
fn a_proof_that_was_not_noted_never_counts_as_first_shown() {
    let clock = ManualClock::at_unix_s(1_000);
    let proofs = ProofReplayCache::with_size(clock.now(), 1, 40);
    let show = |number, agent| proofs.present(&key(number), holder(agent, number as u32), clock.now());
    assert!((0..20).all(|number| show(number, 1) == ProofPresentation::First));
    clock.advance_ms(TURN_MS);
    assert_eq!(show(20, 1), ProofPresentation::Unknown, "no room, so it is not noted");
    assert_eq!(show(21, 2), ProofPresentation::First, "another agent has lost nothing");
    clock.advance_ms(TURN_MS - 1);
    assert_eq!(show(22, 1), ProofPresentation::Unknown, "still no room");
    clock.advance_ms(1);
    assert_eq!(show(20, 1), ProofPresentation::Unknown, "there is room, and it was shown a minute ago");
    assert_eq!(show(23, 1), ProofPresentation::Unknown, "which proofs were not noted nobody knows");
    clock.advance_ms(TURN_MS);
    assert_eq!(show(24, 1), ProofPresentation::First, "what was not noted can come no more");
}

#[test]
fn very_many_full_shares_count_as_all() {
    let clock = ManualClock::at_unix_s(1_000);
    let proofs = ProofReplayCache::with_size(clock.now(), 1, 1);
    for agent in 0..=FULL_SHARES_MAX as u32 + 1 {
        proofs.present(&key(u64::from(agent)), holder(agent, 1), clock.now());
    }
    let mut shard = proofs.presented.shard(0);
    assert!(shard.current.all_shares_full && shard.is_share_full(holder(70_000, 1)));
    assert_eq!(shard.current.full_shares.len(), FULL_SHARES_MAX);
    shard.rotate_generations({
        clock.advance_ms(2 * TURN_MS);
        clock.now()
    });
    assert!(!shard.is_share_full(holder(1, 1)));
}
