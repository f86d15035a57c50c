//! The index: the exact set, the filter before it, the generation after it. One writer at a time, readers never wait for it.
//!
//! Dead entries, nearly all of them, cost 24 bytes each in a set of their own; the others carry what they need to be lifted.
//! Nothing here expires by the clock. Look next at `filter.rs` for the filter and `entry.rs` for lifting.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::entry::Entry;
use super::filter::{Filter, Filters};
use super::key::{Identity, Key, Keyed, TargetRef};
use super::primitives::{AtomicU64, Map, Mutex, MutexGuard, spawn};
use super::{Hit, HitMeaning};
use crate::model::mutant::{Mutant, active};
use crate::model::records::{RevocationRow, Target};

/// Keys that the first filter is made for: 128 KiB.
const FIRST_CAPACITY: u64 = 1 << 16;
/// A shard that grows shuts its readers out meanwhile: at ten million entries each holds forty thousand, a millisecond's work.
const SHARDS: usize = 256;

/// What is revoked, shared by all snapshots.
///
/// A collision of two keys (128 bits, keyed per process) could only make one target share the other's fate.
pub struct Index(Arc<Inner>);

impl Default for Index {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Index");
        out.field("len", &self.len()).field("generation", &self.generation()).field("filter_bits", &self.filter_bits());
        out.finish_non_exhaustive()
    }
}

impl Index {
    /// An empty index with fresh random keys.
    pub fn new() -> Self {
        Self::with_first_capacity(FIRST_CAPACITY)
    }

    pub(super) fn with_first_capacity(capacity: u64) -> Self {
        Self(Arc::new(Inner {
            keyed: Keyed::new(),
            dead: Map::with_capacity_and_hasher_and_shard_amount(0, Identity::default(), SHARDS),
            others: Map::with_capacity_and_hasher_and_shard_amount(0, Identity::default(), SHARDS),
            filters: Filters::new(capacity),
            generation: AtomicU64::new(0),
            held: AtomicU64::new(0),
            writer: Mutex::new(Writer::default()),
        }))
    }

    /// What the filter alone says.
    #[cfg(test)]
    pub(super) fn may_contain(&self, key: Key) -> bool {
        self.0.filters.may_contain(key)
    }

    /// Hashes a target, to be asked for many times. Allocates nothing.
    pub fn key(&self, target: TargetRef<'_>) -> Key {
        self.0.keyed.key(target)
    }

    /// Grows with every addition. To call something clean as of a generation, read the generation first and ask then.
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Takes over the state of one target after a commit, in the order of the commits.
    ///
    /// When it returns, every reader sees what it adds; what it lifts, snapshots from the row's revision on no longer see.
    pub fn apply(&self, row: &RevocationRow) {
        let mut writer = self.0.lock();
        if active(Mutant::GenerationFirst) {
            self.0.generation.fetch_add(1, Ordering::AcqRel);
        }
        if self.0.upsert(&mut writer, row, row.revision) && !active(Mutant::GenerationFirst) {
            self.0.generation.fetch_add(1, Ordering::AcqRel);
        }
        let due = self.0.rebuild_level(&writer).is_some();
        drop(writer);
        if due {
            // Short-lived, one at a time. Where no thread can be had the filter is only less sharp, and the next row asks again.
            let inner = self.0.clone();
            if let Err(error) = spawn("revocation-filter", move || inner.rebuild()) {
                tracing::warn!(%error, "the revocation filter is not rebuilt now");
            }
        }
    }

    /// Lifts all that is revoked of a target for snapshots from `number` on: its row is gone. [`Index::forget_lifted`] frees it.
    pub fn remove(&self, target: &Target, number: u64) {
        let _writer = self.0.lock();
        self.0.lift(self.key(TargetRef::from(target)), number);
    }

    /// Takes over every row of a full state at revision `number`.
    ///
    /// What is revoked before and after never disappears in between; what `rows` no longer holds is lifted for snapshots from
    /// `number` on.
    pub fn replace(&self, rows: &[RevocationRow], number: u64) {
        let mut writer = self.0.lock();
        let was_empty = self.is_empty();
        if was_empty && writer.building.is_none() {
            let level = self.0.filters.level_for(rows.len() as u64);
            if level > self.0.filters.level() {
                self.0.filters.install(level, Arc::new(self.0.filters.fresh(level)));
            }
        }
        let mut added = false;
        for row in rows {
            added |= self.0.upsert(&mut writer, row, number);
        }
        if !was_empty {
            let mut present: Vec<Key> = rows.iter().map(|row| self.key(TargetRef::from(&row.target))).collect();
            present.sort_unstable();
            self.0.lift_absent(&present, number);
        }
        if added {
            self.0.generation.fetch_add(1, Ordering::AcqRel);
        }
        drop(writer);
        self.0.rebuild();
    }

    /// Forgets what is lifted for every snapshot numbered `oldest_snapshot` or above; no older one may still be in use.
    pub fn forget_lifted(&self, oldest_snapshot: u64) {
        let mut writer = self.0.lock();
        let mut forgotten = 0_u64;
        self.0.others.retain(|_, entry| {
            let over = entry.is_over(oldest_snapshot);
            forgotten += u64::from(over);
            !over
        });
        self.0.held.fetch_sub(forgotten, Ordering::AcqRel);
        writer.stale += forgotten;
        drop(writer);
        self.0.rebuild();
    }

    /// Whether a target is revoked for a chain whose root was issued at `root_iat_s` (Unix seconds), as seen by the snapshot
    /// of that number.
    pub fn hit(&self, key: Key, root_iat_s: i64, snapshot_number: u64) -> Option<Hit> {
        if !self.0.filters.may_contain(key) {
            return None;
        }
        // INVARIANT: dead first. What leaves that set was put into the other one before.
        if let Some(revision) = self.0.dead.get(&key) {
            return Some(Hit { meaning: HitMeaning::Dead, revision: *revision });
        }
        self.0.others.get(&key)?.hit(root_iat_s, snapshot_number)
    }

    /// Entries held, those included that are lifted and not forgotten.
    pub fn len(&self) -> u64 {
        self.0.held.load(Ordering::Acquire)
    }

    /// Whether no entry is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size of the filter in use.
    pub fn filter_bits(&self) -> u64 {
        self.0.filters.bits()
    }

    /// The share of clean keys that the filter sends to the exact set, estimated from a sample of its bits.
    pub fn false_positive_rate(&self) -> f64 {
        self.0.filters.false_positive_rate()
    }
}

struct Inner {
    keyed: Keyed,
    /// Dead for every snapshot; the value is the revision.
    dead: Map<Key, u64, Identity>,
    others: Map<Key, Entry, Identity>,
    filters: Filters,
    generation: AtomicU64,
    held: AtomicU64,
    writer: Mutex<Writer>,
}

/// What only a writer knows.
#[derive(Default)]
struct Writer {
    /// The filter under construction: inserts go to it as well.
    building: Option<Arc<Filter>>,
    /// Keys forgotten whose bits are still set.
    stale: u64,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Writer> {
        // A writer that died left at most an entry without its bits in the filter; the process does not outlive a panic.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if something was added, so that the generation must move.
    fn upsert(&self, writer: &mut Writer, row: &RevocationRow, lifted_at: u64) -> bool {
        let key = self.keyed.key(TargetRef::from(&row.target));
        if let Some(mut entry) = self.others.get_mut(&key) {
            return entry.update(row, lifted_at);
        }
        if row.dead {
            if self.dead.insert(key, row.revision).is_some() {
                return false;
            }
        } else {
            let known_dead = self.dead.get(&key).map(|revision| *revision);
            if let Some(revision) = known_dead {
                let mut entry = Entry::dead(revision);
                let added = entry.update(row, lifted_at);
                self.others.insert(key, entry);
                self.dead.remove(&key);
                return added;
            }
            let mut entry = Entry::new();
            if !entry.update(row, lifted_at) {
                return false;
            }
            self.others.insert(key, entry);
        }
        // INVARIANT: exact set, filter, generation, in this order: whoever sees the later sees the earlier.
        self.held.fetch_add(1, Ordering::AcqRel);
        if !active(Mutant::LostInsert) {
            self.filters.insert(key);
        }
        if let Some(building) = &writer.building
            && !active(Mutant::LostWhileBuilding)
        {
            building.insert(key);
        }
        true
    }

    fn lift(&self, key: Key, number: u64) {
        if let Some(mut entry) = self.others.get_mut(&key) {
            entry.lift(number);
            return;
        }
        let known_dead = self.dead.get(&key).map(|revision| *revision);
        if let Some(revision) = known_dead {
            let mut entry = Entry::dead(revision);
            entry.lift(number);
            // INVARIANT: there before it is gone here, for older snapshots still see it.
            self.others.insert(key, entry);
            self.dead.remove(&key);
        }
    }

    fn lift_absent(&self, present: &[Key], number: u64) {
        let is_absent = |key: &Key| present.binary_search(key).is_err();
        // Collected first: an entry must not be inserted while an iterator holds its shard.
        let dead: Vec<Key> = self.dead.iter().filter(|entry| is_absent(entry.key())).map(|entry| *entry.key()).collect();
        dead.into_iter().for_each(|key| self.lift(key, number));
        for mut entry in self.others.iter_mut().filter(|entry| is_absent(entry.key())) {
            entry.lift(number);
        }
    }

    /// The level to rebuild the filter at; `None` while it is good, or being rebuilt already.
    fn rebuild_level(&self, writer: &Writer) -> Option<usize> {
        let held = self.held.load(Ordering::Acquire);
        let capacity = self.filters.capacity();
        if writer.building.is_some() || held.saturating_add(writer.stale) <= capacity {
            return None;
        }
        let level = self.filters.level_for(held);
        // At the same size only what was forgotten makes a rebuild worth its while.
        (level > self.filters.level() || writer.stale > capacity / 8).then_some(level)
    }

    /// Makes a new filter as long as one is due. Writers go on meanwhile, except at the two ends.
    fn rebuild(&self) {
        loop {
            let mut writer = self.lock();
            let Some(level) = self.rebuild_level(&writer) else { return };
            let stale = writer.stale;
            let filter = Arc::new(self.filters.fresh(level));
            writer.building = Some(filter.clone());
            drop(writer);

            // INVARIANT: in the order in which entries move, so that one that moves meanwhile is met on one side at least.
            self.dead.iter().for_each(|entry| filter.insert(*entry.key()));
            self.others.iter().for_each(|entry| filter.insert(*entry.key()));

            let mut writer = self.lock();
            writer.building = None;
            writer.stale = writer.stale.saturating_sub(stale);
            self.filters.install(level, filter);
        }
    }
}
