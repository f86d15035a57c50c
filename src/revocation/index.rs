//! The revocation index: the exact sets, the bloom filter that is read before them, and the generation that is advanced after them.
//!
//! There is one writer at a time, and readers never wait for it. Nearly all entries are dead; they cost 24 bytes each in a set of their
//! own. All other entries carry the data that is needed to lift them. Nothing here expires by the clock. Look next at `filter.rs` for the
//! filter and at `entry.rs` for lifting.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::entry::RevocationEntry;
use super::filter::{BloomFilter, FilterLevels};
use super::key::{IdentityHasher, KeyHasher, RevocationKey, TargetRef};
use super::sync_primitives::{AtomicU64, Map, Mutex, MutexGuard, spawn};
use super::{RevocationEffect, RevocationHit};
use crate::model::mutant::{Mutant, is_active};
use crate::model::rows::{RevocationRow, RevocationTarget};

/// Number of keys that the first filter is sized for; it takes 128 KiB.
const FIRST_CAPACITY: u64 = 1 << 16;
/// Number of shards of each set. A shard that grows blocks its readers. With ten million entries a shard holds forty thousand, and growing
/// it takes about a millisecond.
const SHARDS: usize = 256;

/// The set of revoked targets, shared by all snapshots.
///
/// Keys have 128 bits and are hashed with random keys of this process. If two targets collided, they would share one entry.
pub struct RevocationIndex(Arc<IndexState>);

impl Default for RevocationIndex {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RevocationIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Index");
        out.field("len", &self.len()).field("generation", &self.generation()).field("filter_bits", &self.filter_bits());
        out.finish_non_exhaustive()
    }
}

impl RevocationIndex {
    /// An empty index with fresh random hash keys.
    pub fn new() -> Self {
        Self::with_first_capacity(FIRST_CAPACITY)
    }

    pub(super) fn with_first_capacity(capacity: u64) -> Self {
        Self(Arc::new(IndexState {
            key_hasher: KeyHasher::new(),
            dead: Map::with_capacity_and_hasher_and_shard_amount(0, IdentityHasher::default(), SHARDS),
            liftable: Map::with_capacity_and_hasher_and_shard_amount(0, IdentityHasher::default(), SHARDS),
            filters: FilterLevels::new(capacity),
            generation: AtomicU64::new(0),
            entry_count: AtomicU64::new(0),
            writer: Mutex::new(IndexWriterState::default()),
        }))
    }

    /// The answer of the filter alone.
    #[cfg(test)]
    pub(super) fn may_contain(&self, key: RevocationKey) -> bool {
        self.0.filters.may_contain(key)
    }

    /// Hashes a target, so that it can be looked up many times. Allocates nothing.
    pub fn key(&self, target: TargetRef<'_>) -> RevocationKey {
        self.0.key_hasher.key(target)
    }

    /// A counter that advances after every addition.
    ///
    /// A caller that records a target as clean must read the generation first and look the target up second.
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Applies the new state of one target. Calls must follow the order of the commits.
    ///
    /// When it returns, every reader sees the added effects. Snapshots from the row's revision on no longer see the lifted effects.
    pub fn apply(&self, row: &RevocationRow) {
        let mut writer = self.0.lock_writer();
        if is_active(Mutant::GenerationFirst) {
            self.0.generation.fetch_add(1, Ordering::AcqRel);
        }
        if self.0.upsert(&mut writer, row, row.revision) && !is_active(Mutant::GenerationFirst) {
            self.0.generation.fetch_add(1, Ordering::AcqRel);
        }
        let due = self.0.due_rebuild_level(&writer).is_some();
        drop(writer);
        if due {
            // The thread is short-lived, and only one runs at a time. If no thread can be started, the filter stays less precise and the
            // next row tries again.
            let inner = self.0.clone();
            if let Err(error) = spawn("revocation-filter", move || inner.rebuild_filter()) {
                tracing::warn!(%error, "the revocation filter is not rebuilt now");
            }
        }
    }

    /// Lifts every effect on a target for snapshots from `number` on, because its row was pruned.
    /// [`RevocationIndex::prune_lifted`] frees the entry.
    pub fn remove(&self, target: &RevocationTarget, number: u64) {
        let _writer = self.0.lock_writer();
        self.0.lift(self.key(TargetRef::from(target)), number);
    }

    /// Applies every row of a full state at revision `number`.
    ///
    /// A target that is revoked both before and after never appears clean in between. A target that `rows` no longer holds is lifted for
    /// snapshots from `number` on.
    pub fn replace_all(&self, rows: &[RevocationRow], number: u64) {
        let mut writer = self.0.lock_writer();
        let was_empty = self.is_empty();
        if was_empty && writer.building.is_none() {
            let level = self.0.filters.level_for(rows.len() as u64);
            if level > self.0.filters.level() {
                self.0.filters.install(level, Arc::new(self.0.filters.new_filter(level)));
            }
        }
        let mut added = false;
        for row in rows {
            added |= self.0.upsert(&mut writer, row, number);
        }
        if !was_empty {
            let mut present: Vec<RevocationKey> = rows.iter().map(|row| self.key(TargetRef::from(&row.target))).collect();
            present.sort_unstable();
            self.0.lift_absent(&present, number);
        }
        if added {
            self.0.generation.fetch_add(1, Ordering::AcqRel);
        }
        drop(writer);
        self.0.rebuild_filter();
    }

    /// Frees the entries that are lifted for every snapshot numbered `oldest_snapshot` or above. No older snapshot may still be in use.
    pub fn prune_lifted(&self, oldest_snapshot: u64) {
        let mut writer = self.0.lock_writer();
        let mut forgotten = 0_u64;
        self.0.liftable.retain(|_, entry| {
            let over = entry.is_lifted_for_all(oldest_snapshot);
            forgotten += u64::from(over);
            !over
        });
        self.0.entry_count.fetch_sub(forgotten, Ordering::AcqRel);
        writer.stale_key_count += forgotten;
        drop(writer);
        self.0.rebuild_filter();
    }

    /// Looks up a revocation of `key` that applies to a chain whose root was issued at `root_iat_s` (Unix seconds), as seen by the snapshot
    /// numbered `snapshot_number`.
    pub fn find_hit(&self, key: RevocationKey, root_iat_s: i64, snapshot_number: u64) -> Option<RevocationHit> {
        if !self.0.filters.may_contain(key) {
            return None;
        }
        // INVARIANT: the dead set is read first. An entry that leaves the dead set was inserted into the other set before.
        if let Some(revision) = self.0.dead.get(&key) {
            return Some(RevocationHit { effect: RevocationEffect::Dead, revision: *revision });
        }
        self.0.liftable.get(&key)?.hit_for(root_iat_s, snapshot_number)
    }

    /// Number of entries, including those that are lifted and not freed yet.
    pub fn len(&self) -> u64 {
        self.0.entry_count.load(Ordering::Acquire)
    }

    /// Whether the index holds no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size of the current filter in bits.
    pub fn filter_bits(&self) -> u64 {
        self.0.filters.size_bits()
    }

    /// Estimates, from a sample of the bits, the share of clean keys for which the filter cannot exclude a revocation.
    pub fn false_positive_rate(&self) -> f64 {
        self.0.filters.false_positive_rate()
    }
}

struct IndexState {
    key_hasher: KeyHasher,
    /// Targets that are dead for every snapshot; the value is the revision.
    dead: Map<RevocationKey, u64, IdentityHasher>,
    liftable: Map<RevocationKey, RevocationEntry, IdentityHasher>,
    filters: FilterLevels,
    generation: AtomicU64,
    entry_count: AtomicU64,
    writer: Mutex<IndexWriterState>,
}

/// State that only a writer uses.
#[derive(Default)]
struct IndexWriterState {
    /// The filter under construction. Inserts go to it as well.
    building: Option<Arc<BloomFilter>>,
    /// Number of freed entries whose bits are still set in the filter.
    stale_key_count: u64,
}

impl IndexState {
    fn lock_writer(&self) -> MutexGuard<'_, IndexWriterState> {
        // A writer that panicked leaves at most one entry without its bits in the filter, and the process does not outlive a panic.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether an effect was added, so that the generation must advance.
    fn upsert(&self, writer: &mut IndexWriterState, row: &RevocationRow, lifted_at: u64) -> bool {
        let key = self.key_hasher.key(TargetRef::from(&row.target));
        if let Some(mut entry) = self.liftable.get_mut(&key) {
            return entry.update(row, lifted_at);
        }
        if row.dead {
            if self.dead.insert(key, row.revision).is_some() {
                return false;
            }
        } else {
            let known_dead = self.dead.get(&key).map(|revision| *revision);
            if let Some(revision) = known_dead {
                let mut entry = RevocationEntry::new_dead(revision);
                let added = entry.update(row, lifted_at);
                self.liftable.insert(key, entry);
                self.dead.remove(&key);
                return added;
            }
            let mut entry = RevocationEntry::new();
            if !entry.update(row, lifted_at) {
                return false;
            }
            self.liftable.insert(key, entry);
        }
        // INVARIANT: the order is exact set, filter, generation. A reader that sees a later step also sees the earlier ones.
        self.entry_count.fetch_add(1, Ordering::AcqRel);
        if !is_active(Mutant::LostInsert) {
            self.filters.insert(key);
        }
        if let Some(building) = &writer.building
            && !is_active(Mutant::LostWhileBuilding)
        {
            building.insert(key);
        }
        true
    }

    fn lift(&self, key: RevocationKey, number: u64) {
        if let Some(mut entry) = self.liftable.get_mut(&key) {
            entry.lift(number);
            return;
        }
        let known_dead = self.dead.get(&key).map(|revision| *revision);
        if let Some(revision) = known_dead {
            let mut entry = RevocationEntry::new_dead(revision);
            entry.lift(number);
            // INVARIANT: the entry is inserted here before it is removed there, because older snapshots still see it.
            self.liftable.insert(key, entry);
            self.dead.remove(&key);
        }
    }

    fn lift_absent(&self, present: &[RevocationKey], number: u64) {
        let is_absent = |key: &RevocationKey| present.binary_search(key).is_err();
        // The keys are collected first: an entry must not be inserted while an iterator holds its shard.
        let dead: Vec<RevocationKey> =
            self.dead.iter().filter(|entry| is_absent(entry.key())).map(|entry| *entry.key()).collect();
        dead.into_iter().for_each(|key| self.lift(key, number));
        for mut entry in self.liftable.iter_mut().filter(|entry| is_absent(entry.key())) {
            entry.lift(number);
        }
    }

    /// Returns the level to rebuild the filter at; `None` if no rebuild is due or one is running.
    fn due_rebuild_level(&self, writer: &IndexWriterState) -> Option<usize> {
        let held = self.entry_count.load(Ordering::Acquire);
        let capacity = self.filters.capacity();
        if writer.building.is_some() || held.saturating_add(writer.stale_key_count) <= capacity {
            return None;
        }
        let level = self.filters.level_for(held);
        // A rebuild at the same size pays only if enough entries were freed.
        (level > self.filters.level() || writer.stale_key_count > capacity / 8).then_some(level)
    }

    /// Rebuilds the filter as long as a rebuild is due. Writers continue meanwhile, except at its start and its end.
    fn rebuild_filter(&self) {
        loop {
            let mut writer = self.lock_writer();
            let Some(level) = self.due_rebuild_level(&writer) else { return };
            let stale = writer.stale_key_count;
            let filter = Arc::new(self.filters.new_filter(level));
            writer.building = Some(filter.clone());
            drop(writer);

            // INVARIANT: the sets are read in the order in which entries move, so an entry that moves meanwhile is found in at least one of
            // them.
            self.dead.iter().for_each(|entry| filter.insert(*entry.key()));
            self.liftable.iter().for_each(|entry| filter.insert(*entry.key()));

            let mut writer = self.lock_writer();
            writer.building = None;
            writer.stale_key_count = writer.stale_key_count.saturating_sub(stale);
            self.filters.install(level, filter);
        }
    }
}
