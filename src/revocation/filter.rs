//! A bloom filter of atomic bits, one cache line a key: "surely not" at the price of one miss.
//!
//! A split block filter (Putze, Sanders, Singler, "Cache-, Hash- and Space-Efficient Bloom Filters", 2007): the high half of a
//! key chooses a block of 512 bits, the low half one bit in each of its eight words. Bits are set with `fetch_or` while others
//! read. It holds no keys and cannot forget one; `index.rs` makes a new one instead.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::key::Key;
use super::primitives::{AtomicU64, AtomicUsize, FILTER_WORDS as WORDS, OnceLock};

const BLOCK_BITS: u64 = 512;
/// About one false "maybe" in a thousand when full.
const BITS_PER_KEY: u64 = 16;
const LEVELS: usize = 9;
const GROWTH: u64 = 4;
/// Blocks looked at to estimate the rate of false "maybe".
const SAMPLE_BLOCKS: usize = 1024;

#[repr(align(64))]
#[derive(Default)]
struct Block([AtomicU64; WORDS]);

/// One filter of a fixed size.
pub(super) struct Filter {
    blocks: Box<[Block]>,
    /// Keys it is made for.
    capacity: u64,
}

impl Filter {
    /// An empty filter for so many keys.
    pub(super) fn new(capacity: u64) -> Self {
        let count = (capacity * BITS_PER_KEY).div_ceil(BLOCK_BITS).max(1);
        Self { blocks: (0..count).map(|_| Block::default()).collect(), capacity }
    }

    /// Sets the bits of a key.
    pub(super) fn insert(&self, key: Key) {
        let Some(Block(words)) = self.block(key) else { return };
        for (word, bit) in words.iter().zip(bits(key)) {
            // Most are set already in a filter that is being rebuilt: reading first leaves the line shared.
            if word.load(Ordering::Acquire) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// False: surely not inserted. True: maybe.
    pub(super) fn may_contain(&self, key: Key) -> bool {
        // Without a block nothing can be said, so: maybe. There is always one.
        self.block(key).is_none_or(|Block(words)| {
            words.iter().zip(bits(key)).fold(true, |all, (word, bit)| all & (word.load(Ordering::Acquire) & bit != 0))
        })
    }

    fn block(&self, key: Key) -> Option<&Block> {
        // Multiply and shift: an even spread over any number of blocks, without a division.
        let index = (u128::from(key.high) * self.blocks.len() as u128) >> 64;
        self.blocks.get(usize::try_from(index).ok()?)
    }

    /// Takes over the bits of a filter of the same size, word by word, while others read.
    fn overwrite(&self, fresh: &Filter) {
        for (Block(old), Block(new)) in self.blocks.iter().zip(&fresh.blocks) {
            for (old, new) in old.iter().zip(new) {
                old.store(new.load(Ordering::Acquire), Ordering::Release);
            }
        }
    }

    fn bits(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK_BITS
    }

    fn false_positive_rate(&self) -> f64 {
        let step = self.blocks.len().div_ceil(SAMPLE_BLOCKS).max(1);
        let rates = self.blocks.iter().step_by(step).map(|Block(words)| {
            words.iter().map(|word| f64::from(word.load(Ordering::Relaxed).count_ones()) / 64.0).product::<f64>()
        });
        let (sum, count) = rates.fold((0.0, 0.0), |(sum, count), rate| (sum + rate, count + 1.0));
        if count == 0.0 { 0.0 } else { sum / count }
    }
}

fn bits(key: Key) -> [u64; WORDS] {
    // 6 bits of the low half for each word; the exact set uses all of them too, but asks only after the filter said "maybe".
    std::array::from_fn(|word| 1 << ((key.low >> (6 * word)) & 63))
}

/// The filter in use, and room for larger ones: readers find it with two loads and no lock.
///
/// A filter that was outgrown is not freed, for a reader may still hold it; together they are a third of the last one's size.
pub(super) struct Filters {
    levels: [OnceLock<Arc<Filter>>; LEVELS],
    current: AtomicUsize,
    base: u64,
}

impl Filters {
    /// An empty filter for `base` keys.
    pub(super) fn new(base: u64) -> Self {
        let filters = Self { levels: Default::default(), current: AtomicUsize::new(0), base };
        filters.install(0, Arc::new(filters.fresh(0)));
        filters
    }

    /// False: surely not inserted.
    pub(super) fn may_contain(&self, key: Key) -> bool {
        self.filter().is_none_or(|filter| filter.may_contain(key))
    }

    /// Sets the bits of a key in the filter in use.
    pub(super) fn insert(&self, key: Key) {
        if let Some(filter) = self.filter() {
            filter.insert(key);
        }
    }

    /// An empty filter of a level.
    pub(super) fn fresh(&self, level: usize) -> Filter {
        Filter::new(self.capacity_of(level))
    }

    /// The smallest level from the one in use on that holds so many keys with a quarter to spare; the largest if none does.
    pub(super) fn level_for(&self, keys: u64) -> usize {
        let wanted = keys.saturating_add(keys / 4);
        let from = self.level();
        (from..LEVELS - 1).find(|level| self.capacity_of(*level) >= wanted).unwrap_or(LEVELS - 1)
    }

    /// The level in use.
    pub(super) fn level(&self) -> usize {
        self.current.load(Ordering::Acquire)
    }

    /// Keys that the filter in use is made for.
    pub(super) fn capacity(&self) -> u64 {
        self.filter().map_or(0, |filter| filter.capacity)
    }

    /// Puts a filter into use. The caller keeps writers out, and has put every present key into `filter`.
    pub(super) fn install(&self, level: usize, filter: Arc<Filter>) {
        let Some(slot) = self.levels.get(level) else { return };
        if let Err(fresh) = slot.set(filter)
            && let Some(old) = slot.get()
        {
            // INVARIANT: each present key has all its bits in both, so it has them at every moment in between.
            old.overwrite(&fresh);
        }
        self.current.store(level, Ordering::Release);
    }

    /// Size of the filter in use.
    pub(super) fn bits(&self) -> u64 {
        self.filter().map_or(0, Filter::bits)
    }

    /// The share of keys never inserted that get a "maybe", estimated from the bits that are set.
    pub(super) fn false_positive_rate(&self) -> f64 {
        self.filter().map_or(1.0, Filter::false_positive_rate)
    }

    fn filter(&self) -> Option<&Filter> {
        self.levels.get(self.level())?.get().map(Arc::as_ref)
    }

    fn capacity_of(&self, level: usize) -> u64 {
        self.base.saturating_mul(GROWTH.saturating_pow(u32::try_from(level).unwrap_or(u32::MAX)))
    }
}
