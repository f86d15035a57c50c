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
                let counts = [generation.by_agent.get_mut(&holder.agent), generation.by_user.get_mut(&holder.user)];
                for count in counts.into_iter().flatten() {
                    *count = count.saturating_sub(1);
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
mod tests;
