//! The replay cache of proofs of possession. It remembers which proofs were presented and which were used, as long as a proof can
//! be valid.
//!
//! *Used*: no proof is used twice on this replica, and a proof that cannot be remembered is not used. *Presented*: every proof
//! that came with any call is noted, so that a proof that another party may have seen never makes a proved handle.
//!
//! Both tables are bounded, and no holder can fill one. A leaf agent may hold only as many entries as are free. Within that limit,
//! a user may hold only as many entries as the agent may still add. So one flooding agent gets half of the table. Each of `n`
//! flooding agents gets one of `n + 1` parts, and one part stays free for the others. The source is Choudhury and Hahne, "Dynamic
//! queue length thresholds", 1998. A holder over its share bears the loss: its call is denied, or its handle is not proved.
//!
//! This module must not parse proofs: it knows only their replay keys. Look next at `service/ledger_task.rs`, which spends them.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::limits::{PROOF_WINDOW_S, PROOFS_REMEMBERED_MAX};
use crate::model::request::DelegationSubject;
use crate::model::time::ClockReading;

/// The longest time for which a proof can be presented after it was first seen. Its `iat` may lie ahead by the window.
const RETENTION_MS: u64 = (2 * PROOF_WINDOW_S as u64 + 1) * 1000;
/// Parts of a table, each with its own lock, so that one growing part does not block the others.
const SHARDS: usize = 16;
/// Limit of the shares in one part that are marked as full one by one. Beyond it, all shares count as full.
const FULL_SHARES_MAX: usize = 1024;

/// The proofs that one process remembers.
#[derive(Debug)]
pub(super) struct ProofReplayCache {
    used: ReplayTable,
    presented: ReplayTable,
    hasher: RandomState,
}

/// The holder of a proof, which owns a share of the tables: the leaf agent and that agent's user, as keyed hashes.
///
/// Two holders with the same hash share one share. That affects fairness, not safety.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProofHolder {
    pub(super) agent: u32,
    pub(super) user: u32,
}

/// Whose share it is: an agent's, or one of its users'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum HolderShare {
    Agent(u32),
    User(u32),
}

impl ProofHolder {
    /// The shares that it uses up: its agent's, and within that its user's.
    pub(super) fn shares(self) -> [HolderShare; 2] {
        [HolderShare::Agent(self.agent), HolderShare::User(self.user)]
    }
}

/// The outcome of spending a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpendOutcome {
    /// The proof was not used before, and is used now.
    First,
    /// The proof was used before.
    Replayed,
    /// The holder's share is full. The proof was not used.
    ShareFull,
}

/// Whether a proof was presented before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProofPresentation {
    /// Certainly not: this call is the first to present it on this replica.
    First,
    /// The proof was presented before.
    Repeated,
    /// Unknown, because the holder presented more proofs than its share of the table holds.
    Unknown,
}

impl ProofReplayCache {
    /// Makes two empty tables.
    pub(super) fn new(now: ClockReading) -> Self {
        Self::with_size(now, SHARDS, PROOFS_REMEMBERED_MAX / SHARDS)
    }

    fn with_size(now: ClockReading, shards: usize, entries_max: usize) -> Self {
        let table = || ReplayTable::new(now, shards, entries_max);
        Self { used: table(), presented: table(), hasher: RandomState::new() }
    }

    /// The holder whose share counts the proofs of a subject's leaf agent.
    pub(super) fn proof_holder(&self, subject: &DelegationSubject) -> ProofHolder {
        let agent = subject.agents.last();
        ProofHolder { agent: self.hash_u32(&agent), user: self.hash_u32(&(agent, &subject.user)) }
    }

    /// Records that a proof was presented. The replay key identifies the proof.
    pub(super) fn present(&self, replay_key: &[u8; 32], holder: ProofHolder, now: ClockReading) -> ProofPresentation {
        let mut shard = self.presented.shard(self.hasher.hash_one(replay_key));
        match shard.insert(truncate_key(replay_key), holder, now) {
            InsertOutcome::Present => ProofPresentation::Repeated,
            // INVARIANT: while a proof that was not noted could come again, no proof of its share counts as first presented.
            InsertOutcome::Added if shard.is_share_full(holder) => ProofPresentation::Unknown,
            InsertOutcome::Added => ProofPresentation::First,
            InsertOutcome::Full(share) => {
                shard.mark_share_full(share);
                ProofPresentation::Unknown
            }
        }
    }

    /// Spends a proof. The replay key identifies the proof.
    pub(super) fn spend(&self, replay_key: &[u8; 32], holder: ProofHolder, now: ClockReading) -> SpendOutcome {
        match self.used.shard(self.hasher.hash_one(replay_key)).insert(truncate_key(replay_key), holder, now) {
            InsertOutcome::Present => SpendOutcome::Replayed,
            InsertOutcome::Added => SpendOutcome::First,
            InsertOutcome::Full(_) => SpendOutcome::ShareFull,
        }
    }

    /// Whether a proof was used. Does not use it.
    pub(super) fn was_used(&self, replay_key: &[u8; 32]) -> bool {
        self.used.shard(self.hasher.hash_one(replay_key)).contains(&truncate_key(replay_key))
    }

    /// Undoes the use of a proof, because the call came to nothing.
    pub(super) fn unspend(&self, replay_key: &[u8; 32], holder: ProofHolder) {
        self.used.shard(self.hasher.hash_one(replay_key)).remove(&truncate_key(replay_key), holder);
    }

    fn hash_u32(&self, of: &impl Hash) -> u32 {
        u32::try_from(self.hasher.hash_one(of) >> 32).unwrap_or_default()
    }
}

/// Truncates a replay key to 128 bits. A second proof with the same 128 bits of SHA-256 cannot be found, and the table is half as large.
fn truncate_key(replay_key: &[u8; 32]) -> ReplayKey {
    let (half, _) = replay_key.split_at(16);
    half.try_into().unwrap_or_default()
}

type ReplayKey = [u8; 16];

/// A bounded table of replay keys, in parts with a lock each.
#[derive(Debug)]
struct ReplayTable {
    /// Never empty.
    shards: Box<[Mutex<ReplayShard>]>,
}

impl ReplayTable {
    fn new(now: ClockReading, shards: usize, entries_max: usize) -> Self {
        let shard = || ReplayShard {
            current: ReplayGeneration::default(),
            previous: ReplayGeneration::default(),
            began_at: now,
            entries_max,
        };
        Self { shards: (0..shards.max(1)).map(|_| Mutex::new(shard())).collect() }
    }

    #[allow(clippy::indexing_slicing, reason = "the index is below the length, which is not 0")]
    fn shard(&self, hash: u64) -> MutexGuard<'_, ReplayShard> {
        let index = usize::try_from(hash % self.shards.len() as u64).unwrap_or_default();
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Two generations that rotate. An entry lives for at least one whole rotation, and no entry has a timer.
#[derive(Debug)]
struct ReplayShard {
    current: ReplayGeneration,
    previous: ReplayGeneration,
    began_at: ClockReading,
    entries_max: usize,
}

/// The replay keys of one generation, and the number of entries of each agent and user.
#[derive(Debug, Default)]
struct ReplayGeneration {
    keys: HashSet<ReplayKey>,
    by_agent: HashMap<u32, u32>,
    by_user: HashMap<u32, u32>,
    /// The shares that had no room for a proof.
    full_shares: HashSet<HolderShare>,
    all_shares_full: bool,
}

enum InsertOutcome {
    Added,
    Present,
    Full(HolderShare),
}

impl ReplayShard {
    fn insert(&mut self, key: ReplayKey, holder: ProofHolder, now: ClockReading) -> InsertOutcome {
        self.rotate_generations(now);
        if self.contains(&key) {
            return InsertOutcome::Present;
        }
        let free = self.entries_max.saturating_sub(self.current.keys.len() + self.previous.keys.len());
        let of_agent = self.holder_count(holder.agent, |generation| &generation.by_agent);
        if of_agent >= free {
            return InsertOutcome::Full(HolderShare::Agent(holder.agent));
        }
        if self.holder_count(holder.user, |generation| &generation.by_user) >= free - of_agent {
            return InsertOutcome::Full(HolderShare::User(holder.user));
        }
        self.current.keys.insert(key);
        *self.current.by_agent.entry(holder.agent).or_default() += 1;
        *self.current.by_user.entry(holder.user).or_default() += 1;
        InsertOutcome::Added
    }

    /// Removes a key and frees its entry in the holder's share.
    fn remove(&mut self, key: &ReplayKey, holder: ProofHolder) {
        for generation in [&mut self.current, &mut self.previous] {
            if generation.keys.remove(key) {
                let counts = [generation.by_agent.get_mut(&holder.agent), generation.by_user.get_mut(&holder.user)];
                for count in counts.into_iter().flatten() {
                    *count = count.saturating_sub(1);
                }
            }
        }
    }

    /// Rotates the generations if the current one is complete.
    fn rotate_generations(&mut self, now: ClockReading) {
        let age_ms = now.elapsed_ms_since(self.began_at);
        if age_ms >= RETENTION_MS {
            let ended = std::mem::take(&mut self.current);
            // After two rotations even the youngest entry is older than one rotation.
            self.previous = if age_ms < 2 * RETENTION_MS { ended } else { ReplayGeneration::default() };
            self.began_at = now;
        }
    }

    fn contains(&self, key: &ReplayKey) -> bool {
        self.current.keys.contains(key) || self.previous.keys.contains(key)
    }

    fn holder_count(&self, name: u32, of: fn(&ReplayGeneration) -> &HashMap<u32, u32>) -> usize {
        let count = |generation| of(generation).get(&name).copied().unwrap_or_default() as usize;
        count(&self.current) + count(&self.previous)
    }

    /// Marks a share as one that had no room for a proof.
    fn mark_share_full(&mut self, share: HolderShare) {
        let ReplayGeneration { full_shares: full, all_shares_full: all_full, .. } = &mut self.current;
        if full.len() < FULL_SHARES_MAX {
            full.insert(share);
        } else {
            *all_full |= !full.contains(&share);
        }
    }

    /// Whether a proof of this holder may be missing in the table.
    fn is_share_full(&self, holder: ProofHolder) -> bool {
        let shares = holder.shares();
        let lost = |generation: &ReplayGeneration| {
            generation.all_shares_full || shares.iter().any(|share| generation.full_shares.contains(share))
        };
        lost(&self.current) || lost(&self.previous)
    }
}

#[cfg(test)]
mod tests;
