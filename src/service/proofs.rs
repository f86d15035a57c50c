//! Proofs of possession that were used: none is used twice within its window on this replica.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use crate::model::limits::{PROOF_WINDOW_S, PROOFS_REMEMBERED_MAX};
use crate::model::time::Now;

/// Longest time for which a proof can be presented after it was first seen: its `iat` may lie ahead by the window.
const REMEMBERED_MS: u64 = (2 * PROOF_WINDOW_S as u64 + 1) * 1000;

/// Remembers used proofs for as long as they could be presented again. Bounded; a full table denies.
#[derive(Debug)]
pub(super) struct UsedProofs {
    generations: Mutex<Generations>,
    entries_max: usize,
}

/// Two sets that take turns: an entry lives for at least one whole turn and no entry has a timer.
#[derive(Debug)]
struct Generations {
    current: HashSet<[u8; 32]>,
    previous: HashSet<[u8; 32]>,
    began_at: Now,
}

/// What became of a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It had not been used before and is now.
    First,
    /// It was used before.
    Replayed,
    /// The table is full: nobody can say.
    Full,
}

impl UsedProofs {
    /// An empty table.
    pub(super) fn new(now: Now) -> Self {
        Self::with_entries_max(now, PROOFS_REMEMBERED_MAX)
    }

    fn with_entries_max(now: Now, entries_max: usize) -> Self {
        let generations = Generations { current: HashSet::new(), previous: HashSet::new(), began_at: now };
        Self { generations: Mutex::new(generations), entries_max }
    }

    /// Whether a proof was used, without using it.
    pub(super) fn was_used(&self, replay_key: &[u8; 32]) -> bool {
        let generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        generations.current.contains(replay_key) || generations.previous.contains(replay_key)
    }

    /// Takes back that a proof was used, where nothing came of it.
    pub(super) fn unspend(&self, replay_key: &[u8; 32]) {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        generations.current.remove(replay_key);
        generations.previous.remove(replay_key);
    }

    /// Uses a proof, known by its replay key.
    pub(super) fn spend(&self, replay_key: [u8; 32], now: Now) -> Use {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        if now.ms_since(generations.began_at) >= REMEMBERED_MS {
            generations.previous = std::mem::take(&mut generations.current);
            generations.began_at = now;
        }
        if generations.current.contains(&replay_key) || generations.previous.contains(&replay_key) {
            return Use::Replayed;
        }
        if generations.current.len() + generations.previous.len() >= self.entries_max {
            return Use::Full;
        }
        generations.current.insert(replay_key);
        Use::First
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::{Clock as _, ManualClock};

    #[test]
    fn a_proof_is_used_once_while_it_could_come_again() {
        let clock = ManualClock::at_unix_s(1_000);
        let used = UsedProofs::new(clock.now());
        assert_eq!(used.spend([1; 32], clock.now()), Use::First);
        for _ in 0..6 {
            clock.advance_ms(10_000);
            assert_eq!(used.spend([1; 32], clock.now()), Use::Replayed);
        }
        assert_eq!(used.spend([2; 32], clock.now()), Use::First);
        clock.advance_ms(1_000);
        assert_eq!(used.spend([2; 32], clock.now()), Use::Replayed, "kept over the turn");
        for _ in 0..3 {
            clock.advance_ms(61_000);
            used.spend([3; 32], clock.now());
        }
        assert_eq!(used.spend([1; 32], clock.now()), Use::First, "forgotten when it could not be presented any more");
    }

    #[test]
    fn a_full_table_denies() {
        let clock = ManualClock::at_unix_s(1_000);
        let used = UsedProofs::with_entries_max(clock.now(), 2);
        assert_eq!((used.spend([1; 32], clock.now()), used.spend([2; 32], clock.now())), (Use::First, Use::First));
        assert_eq!(used.spend([3; 32], clock.now()), Use::Full);
        assert_eq!(used.spend([1; 32], clock.now()), Use::Replayed);
    }
}
