//! Proofs of possession, remembered for as long as they could be presented again: which were shown, and which were used.
//!
//! *Used*: none is used twice on this replica, and one that cannot be remembered is not used. *Shown*: every proof that came with
//! any call, so that none makes a proved handle that somebody may have seen before.
//!
//! Both tables are bounded, and no holder can fill one: a leaf agent holds no more entries than are free, and within that a user
//! no more than the agent may still take. So one flooding agent gets a half, each of `n` gets one of `n + 1` parts, and one part
//! stays free for those who do not flood (Choudhury and Hahne, "Dynamic queue length thresholds", 1998). What does not fit is the
//! holder's own loss: its call is denied, or its handle is not proved. Must not know what a proof says.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::limits::{PROOF_WINDOW_S, PROOFS_REMEMBERED_MAX};
use crate::model::request::Subject;
use crate::model::time::Now;

/// Longest time for which a proof can be presented after it was first seen: its `iat` may lie ahead by the window.
const REMEMBERED_MS: u64 = (2 * PROOF_WINDOW_S as u64 + 1) * 1000;
/// Parts of a table, each with a lock of its own, so that one that grows does not hold up the others.
const SHARDS: usize = 16;
/// Shares of one part that may be noted as full one by one; beyond that all count as full.
const FULL_SHARES_MAX: usize = 1024;

/// The proofs of one process.
#[derive(Debug)]
pub(super) struct Proofs {
    used: Table,
    shown: Table,
    hasher: RandomState,
}

/// Whose share of the tables a proof falls in: its leaf agent and that agent's user, as keyed hashes.
///
/// Two holders with one hash would have one share: that is a matter of fairness, not of safety.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    agent: u32,
    user: u32,
}

/// Whether a proof was used before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It had not been used before and is now.
    First,
    /// It was used before.
    Replayed,
    /// The holder's share is full: the proof was not used.
    Full,
}

/// Whether a proof was shown before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Showing {
    /// Surely not: the call that is judged is the first to show it on this replica.
    First,
    /// It was.
    Again,
    /// The holder showed more proofs than its share of the table holds: nobody can say.
    Unknown,
}

impl Proofs {
    /// Two empty tables.
    pub(super) fn new(now: Now) -> Self {
        Self::with_size(now, SHARDS, PROOFS_REMEMBERED_MAX / SHARDS)
    }

    fn with_size(now: Now, shards: usize, entries_max: usize) -> Self {
        let table = || Table::new(now, shards, entries_max);
        Self { used: table(), shown: table(), hasher: RandomState::new() }
    }

    /// Whose share the proofs of a subject's leaf fall in.
    pub(super) fn holder(&self, subject: &Subject) -> Holder {
        let agent = subject.agents.last();
        Holder { agent: self.narrow_hash(&agent), user: self.narrow_hash(&(agent, &subject.user)) }
    }

    /// Notes that a proof was shown, known by its replay key.
    pub(super) fn show(&self, replay_key: &[u8; 32], holder: Holder, now: Now) -> Showing {
        let mut shard = self.shown.shard(self.hasher.hash_one(replay_key));
        match shard.put(abridged(replay_key), holder, now) {
            Put::Present => Showing::Again,
            // INVARIANT: while a proof that was not noted could come again, no proof of its share counts as first shown.
            Put::Added if shard.has_lost(holder) => Showing::Unknown,
            Put::Added => Showing::First,
            Put::Full(share) => {
                shard.lose(share);
                Showing::Unknown
            }
        }
    }

    /// Uses a proof, known by its replay key.
    pub(super) fn spend(&self, replay_key: &[u8; 32], holder: Holder, now: Now) -> Use {
        match self.used.shard(self.hasher.hash_one(replay_key)).put(abridged(replay_key), holder, now) {
            Put::Present => Use::Replayed,
            Put::Added => Use::First,
            Put::Full(_) => Use::Full,
        }
    }

    /// Whether a proof was used, without using it.
    pub(super) fn was_used(&self, replay_key: &[u8; 32]) -> bool {
        self.used.shard(self.hasher.hash_one(replay_key)).contains(&abridged(replay_key))
    }

    /// Takes back that a proof was used, where nothing came of it.
    pub(super) fn unspend(&self, replay_key: &[u8; 32], holder: Holder) {
        self.used.shard(self.hasher.hash_one(replay_key)).take_back(&abridged(replay_key), holder);
    }

    fn narrow_hash(&self, of: &impl Hash) -> u32 {
        u32::try_from(self.hasher.hash_one(of) >> 32).unwrap_or_default()
    }
}

/// Half of a replay key: nobody finds a second proof for 128 bits of SHA-256, and a table of them is half as large.
fn abridged(replay_key: &[u8; 32]) -> Key {
    let (half, _) = replay_key.split_at(16);
    half.try_into().unwrap_or_default()
}

type Key = [u8; 16];

#[derive(Debug)]
struct Table {
    /// Never empty.
    shards: Box<[Mutex<Shard>]>,
}

impl Table {
    fn new(now: Now, shards: usize, entries_max: usize) -> Self {
        let shard = || Shard { current: Generation::default(), previous: Generation::default(), began_at: now, entries_max };
        Self { shards: (0..shards.max(1)).map(|_| Mutex::new(shard())).collect() }
    }

    #[allow(clippy::indexing_slicing, reason = "the index is below the length, which is not 0")]
    fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        let index = usize::try_from(hash % self.shards.len() as u64).unwrap_or_default();
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Two generations that take turns: an entry lives for at least one whole turn, and no entry has a timer.
#[derive(Debug)]
struct Shard {
    current: Generation,
    previous: Generation,
    began_at: Now,
    entries_max: usize,
}

#[derive(Debug, Default)]
struct Generation {
    keys: HashSet<Key>,
    by_agent: HashMap<u32, u32>,
    by_user: HashMap<u32, u32>,
    /// Shares that had no room for a proof.
    full: HashSet<Share>,
    all_full: bool,
}

/// The share of an agent, or of one of its users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Share {
    Agent(u32),
    User(u32),
}

enum Put {
    Added,
    Present,
    Full(Share),
}

impl Shard {
    fn put(&mut self, key: Key, holder: Holder, now: Now) -> Put {
        self.turn(now);
        if self.contains(&key) {
            return Put::Present;
        }
        let free = self.entries_max.saturating_sub(self.current.keys.len() + self.previous.keys.len());
        let of_agent = self.count(holder.agent, |generation| &generation.by_agent);
        if of_agent >= free {
            return Put::Full(Share::Agent(holder.agent));
        }
        if self.count(holder.user, |generation| &generation.by_user) >= free - of_agent {
            return Put::Full(Share::User(holder.user));
        }
        self.current.keys.insert(key);
        *self.current.by_agent.entry(holder.agent).or_default() += 1;
        *self.current.by_user.entry(holder.user).or_default() += 1;
        Put::Added
    }

    fn take_back(&mut self, key: &Key, holder: Holder) {
        for generation in [&mut self.current, &mut self.previous] {
            if generation.keys.remove(key) {
                for count in [generation.by_agent.get_mut(&holder.agent), generation.by_user.get_mut(&holder.user)] {
                    if let Some(count) = count {
                        *count = count.saturating_sub(1);
                    }
                }
            }
        }
    }

    fn turn(&mut self, now: Now) {
        let age_ms = now.ms_since(self.began_at);
        if age_ms >= REMEMBERED_MS {
            let ended = std::mem::take(&mut self.current);
            // After two turns the youngest entry is older than one.
            self.previous = if age_ms < 2 * REMEMBERED_MS { ended } else { Generation::default() };
            self.began_at = now;
        }
    }

    fn contains(&self, key: &Key) -> bool {
        self.current.keys.contains(key) || self.previous.keys.contains(key)
    }

    fn count(&self, name: u32, of: fn(&Generation) -> &HashMap<u32, u32>) -> usize {
        let count = |generation| of(generation).get(&name).copied().unwrap_or_default() as usize;
        count(&self.current) + count(&self.previous)
    }

    fn lose(&mut self, share: Share) {
        let Generation { full, all_full, .. } = &mut self.current;
        if full.len() < FULL_SHARES_MAX {
            full.insert(share);
        } else {
            *all_full |= !full.contains(&share);
        }
    }

    fn has_lost(&self, holder: Holder) -> bool {
        let shares = [Share::Agent(holder.agent), Share::User(holder.user)];
        let lost = |generation: &Generation| generation.all_full || shares.iter().any(|share| generation.full.contains(share));
        lost(&self.current) || lost(&self.previous)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::{Clock as _, ManualClock};

    const TURN_MS: i64 = REMEMBERED_MS as i64;

    fn key(number: u64) -> [u8; 32] {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        key
    }

    fn holder(agent: u32, user: u32) -> Holder {
        Holder { agent, user: agent << 16 | user }
    }

    #[test]
    fn a_proof_is_used_once_while_it_could_come_again() {
        let clock = ManualClock::at_unix_s(1_000);
        let proofs = Proofs::new(clock.now());
        let spend = |number: u64, clock: &ManualClock| proofs.spend(&key(number), holder(1, 1), clock.now());
        assert_eq!(spend(1, &clock), Use::First);
        for _ in 0..6 {
            clock.advance_ms(10_000);
            assert_eq!(spend(1, &clock), Use::Replayed);
        }
        assert_eq!(spend(2, &clock), Use::First);
        clock.advance_ms(1_000);
        assert_eq!(spend(2, &clock), Use::Replayed, "kept over the turn");
        assert!(proofs.was_used(&key(2)) && !proofs.was_used(&key(3)));
        clock.advance_ms(2 * TURN_MS);
        assert_eq!(spend(1, &clock), Use::First, "forgotten when it could not be presented any more");
    }

    #[test]
    fn a_full_share_uses_nothing() {
        let clock = ManualClock::at_unix_s(1_000);
        let proofs = Proofs::with_size(clock.now(), 1, 4);
        let spend = |number| proofs.spend(&key(number), holder(1, number as u32), clock.now());
        assert_eq!([spend(1), spend(2), spend(3)], [Use::First, Use::First, Use::Full]);
        assert_eq!(spend(1), Use::Replayed);
        assert!(!proofs.was_used(&key(3)), "what was denied was not used");
    }

    /// Whoever floods gets its own denials; whoever does not goes on, and the sum stays within the bound.
    #[test]
    fn a_flooding_agent_fills_its_own_share() {
        for flooders in [1_u32, 3, 9] {
            let clock = ManualClock::at_unix_s(1_000);
            let proofs = Proofs::with_size(clock.now(), 4, 2_500);
            let (mut next, mut kept) = (0, vec![0_u32; 1 + flooders as usize]);
            let mut spend = |agent: u32, user: u32| {
                next += 1;
                let used = proofs.spend(&key(next), holder(agent, user), clock.now());
                kept[agent as usize] += u32::from(used == Use::First);
                used
            };
            for round in 0..20_000 {
                for agent in 1..=flooders {
                    spend(agent, round % 100);
                }
                if round % 200 == 0 {
                    assert_eq!(spend(0, 0), Use::First, "{flooders}: a quiet agent is never denied");
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
        let proofs = Proofs::with_size(clock.now(), 4, 2_500);
        let spend = |number: u64, user: u32| proofs.spend(&key(number), holder(1, user), clock.now());
        let kept = (0..20_000).filter(|number| spend(*number, 1) == Use::First).count();
        assert!((3_000..3_500).contains(&kept), "a third: {kept}");
        assert!((20_000..20_500).all(|number| spend(number, 2) == Use::First), "another user of the agent");
    }

    #[test]
    fn only_the_first_showing_is_the_first() {
        let clock = ManualClock::at_unix_s(1_000);
        let proofs = Proofs::new(clock.now());
        let show = |number| proofs.show(&key(number), holder(1, 1), clock.now());
        assert_eq!([show(1), show(1), show(2)], [Showing::First, Showing::Again, Showing::First]);
        assert_eq!(proofs.spend(&key(1), holder(1, 1), clock.now()), Use::First, "shown is not used");
        assert_eq!(proofs.spend(&key(3), holder(1, 1), clock.now()), Use::First);
    }

    /// A proof that did not fit in the table must not count as never shown once there is room again.
    #[test]
    fn a_proof_that_was_not_noted_never_counts_as_first_shown() {
        let clock = ManualClock::at_unix_s(1_000);
        let proofs = Proofs::with_size(clock.now(), 1, 40);
        let show = |number, agent| proofs.show(&key(number), holder(agent, number as u32), clock.now());
        assert!((0..20).all(|number| show(number, 1) == Showing::First));
        clock.advance_ms(TURN_MS);
        assert_eq!(show(20, 1), Showing::Unknown, "no room, so it is not noted");
        assert_eq!(show(21, 2), Showing::First, "another agent has lost nothing");
        clock.advance_ms(TURN_MS - 1);
        assert_eq!(show(22, 1), Showing::Unknown, "still no room");
        clock.advance_ms(1);
        assert_eq!(show(20, 1), Showing::Unknown, "there is room, and it was shown a minute ago");
        assert_eq!(show(23, 1), Showing::Unknown, "which proofs were not noted nobody knows");
        clock.advance_ms(TURN_MS);
        assert_eq!(show(24, 1), Showing::First, "what was not noted can come no more");
    }

    #[test]
    fn very_many_full_shares_count_as_all() {
        let clock = ManualClock::at_unix_s(1_000);
        let proofs = Proofs::with_size(clock.now(), 1, 1);
        for agent in 0..=FULL_SHARES_MAX as u32 + 1 {
            proofs.show(&key(u64::from(agent)), holder(agent, 1), clock.now());
        }
        let mut shard = proofs.shown.shard(0);
        assert!(shard.current.all_full && shard.has_lost(holder(70_000, 1)));
        assert_eq!(shard.current.full.len(), FULL_SHARES_MAX);
        shard.turn({
            clock.advance_ms(2 * TURN_MS);
            clock.now()
        });
        assert!(!shard.has_lost(holder(1, 1)));
    }
}
