//! A bloom filter of atomic bits with one cache line per key. A "surely not" costs at most one cache miss.
//!
//! It is a split block filter (Putze, Sanders, Singler, "Cache-, Hash- and Space-Efficient Bloom Filters", 2007). The high half of a key
//! selects a block of 512 bits; the low half selects one bit in each of the block's eight words. Writers set bits with `fetch_or` while
//! readers read. The filter stores no keys and cannot delete one; `index.rs` builds a new filter instead.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::key::RevocationKey;
use super::sync_primitives::{AtomicU64, AtomicUsize, FILTER_WORDS as WORDS, OnceLock};

const BLOCK_BITS: u64 = 512;
/// At full capacity, about one absent key in a thousand gets a "maybe".
const BITS_PER_KEY: u64 = 16;
const LEVEL_COUNT: usize = 9;
const LEVEL_GROWTH_FACTOR: u64 = 4;
/// Number of blocks that are sampled to estimate the rate of a false "maybe".
const SAMPLE_BLOCKS: usize = 1024;

#[repr(align(64))]
#[derive(Default)]
struct FilterBlock([AtomicU64; WORDS]);

/// One filter of fixed size.
pub(super) struct BloomFilter {
    blocks: Box<[FilterBlock]>,
    /// Number of keys that the filter is sized for.
    capacity: u64,
}

impl BloomFilter {
    /// An empty filter for `capacity` keys.
    pub(super) fn new(capacity: u64) -> Self {
        let count = (capacity * BITS_PER_KEY).div_ceil(BLOCK_BITS).max(1);
        Self { blocks: (0..count).map(|_| FilterBlock::default()).collect(), capacity }
    }

    /// Sets the bits of a key.
    pub(super) fn insert(&self, key: RevocationKey) {
        let Some(FilterBlock(words)) = self.block(key) else { return };
        for (word, bit) in words.iter().zip(key_bits(key)) {
            // During a rebuild most bits are set already. Reading first keeps the cache line in shared state.
            if word.load(Ordering::Acquire) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// Returns false if the key was surely not inserted, and true if it may have been.
    pub(super) fn may_contain(&self, key: RevocationKey) -> bool {
        // Without a block the answer must be "maybe". There is always a block.
        self.block(key).is_none_or(|FilterBlock(words)| {
            words.iter().zip(key_bits(key)).fold(true, |all, (word, bit)| all & (word.load(Ordering::Acquire) & bit != 0))
        })
    }

    fn block(&self, key: RevocationKey) -> Option<&FilterBlock> {
        // Multiply and shift: this spreads keys evenly over any number of blocks without a division.
        let index = (u128::from(key.high) * self.blocks.len() as u128) >> 64;
        self.blocks.get(usize::try_from(index).ok()?)
    }

    /// Replaces all bits by those of a filter of the same size, word by word, while readers read.
    fn overwrite_from(&self, fresh: &BloomFilter) {
        for (FilterBlock(old), FilterBlock(new)) in self.blocks.iter().zip(&fresh.blocks) {
            for (old, new) in old.iter().zip(new) {
                old.store(new.load(Ordering::Acquire), Ordering::Release);
            }
        }
    }

    fn size_bits(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK_BITS
    }

    fn false_positive_rate(&self) -> f64 {
        let step = self.blocks.len().div_ceil(SAMPLE_BLOCKS).max(1);
        let rates = self.blocks.iter().step_by(step).map(|FilterBlock(words)| {
            words.iter().map(|word| f64::from(word.load(Ordering::Relaxed).count_ones()) / 64.0).product::<f64>()
        });
        let (sum, count) = rates.fold((0.0, 0.0), |(sum, count), rate| (sum + rate, count + 1.0));
        if count == 0.0 { 0.0 } else { sum / count }
    }
}

fn key_bits(key: RevocationKey) -> [u64; WORDS] {
    // Six bits of the low half select the bit of each word. The exact set hashes by the same half, but is read only after a "maybe".
    std::array::from_fn(|word| 1 << ((key.low >> (6 * word)) & 63))
}

/// The filter in use, and slots for larger ones. Readers reach the filter with two loads and no lock.
///
/// A filter that was outgrown is not freed, because a reader may still use it. All outgrown filters together are a third of the size of the
/// last one.
pub(super) struct FilterLevels {
    levels: [OnceLock<Arc<BloomFilter>>; LEVEL_COUNT],
    current: AtomicUsize,
    base_capacity: u64,
}

impl FilterLevels {
    /// Holds one empty filter for `base` keys.
    pub(super) fn new(base: u64) -> Self {
        let filters = Self { levels: Default::default(), current: AtomicUsize::new(0), base_capacity: base };
        filters.install(0, Arc::new(filters.new_filter(0)));
        filters
    }

    /// Returns false if the key was surely not inserted.
    pub(super) fn may_contain(&self, key: RevocationKey) -> bool {
        self.current_filter().is_none_or(|filter| filter.may_contain(key))
    }

    /// Sets the bits of a key in the filter in use.
    pub(super) fn insert(&self, key: RevocationKey) {
        if let Some(filter) = self.current_filter() {
            filter.insert(key);
        }
    }

    /// An empty filter of the size of a level.
    pub(super) fn new_filter(&self, level: usize) -> BloomFilter {
        BloomFilter::new(self.level_capacity(level))
    }

    /// Returns the smallest level, from the current one up, that holds `keys` keys with a quarter to spare; the largest level if none does.
    pub(super) fn level_for(&self, keys: u64) -> usize {
        let wanted = keys.saturating_add(keys / 4);
        let from = self.level();
        (from..LEVEL_COUNT - 1).find(|level| self.level_capacity(*level) >= wanted).unwrap_or(LEVEL_COUNT - 1)
    }

    /// The current level.
    pub(super) fn level(&self) -> usize {
        self.current.load(Ordering::Acquire)
    }

    /// Number of keys that the current filter is sized for.
    pub(super) fn capacity(&self) -> u64 {
        self.current_filter().map_or(0, |filter| filter.capacity)
    }

    /// Makes `filter` the current filter. The caller holds the writer lock and has inserted every present key into `filter`.
    pub(super) fn install(&self, level: usize, filter: Arc<BloomFilter>) {
        let Some(slot) = self.levels.get(level) else { return };
        if let Err(fresh) = slot.set(filter)
            && let Some(old) = slot.get()
        {
            // INVARIANT: both filters hold all bits of each present key, so every intermediate state holds them too.
            old.overwrite_from(&fresh);
        }
        self.current.store(level, Ordering::Release);
    }

    /// Size of the current filter in bits.
    pub(super) fn size_bits(&self) -> u64 {
        self.current_filter().map_or(0, BloomFilter::size_bits)
    }

    /// Estimates, from the bits that are set, the share of absent keys that get a "maybe".
    pub(super) fn false_positive_rate(&self) -> f64 {
        self.current_filter().map_or(1.0, BloomFilter::false_positive_rate)
    }

    fn current_filter(&self) -> Option<&BloomFilter> {
        self.levels.get(self.level())?.get().map(Arc::as_ref)
    }

    fn level_capacity(&self, level: usize) -> u64 {
        self.base_capacity.saturating_mul(LEVEL_GROWTH_FACTOR.saturating_pow(u32::try_from(level).unwrap_or(u32::MAX)))
    }
}
