//! A set of tools as bits, one bit for each registered tool.
//!
//! The set does not know the meaning of its bits. Look next at `compile/permission_set.rs`.

/// A set of small numbers. All of them are below the size that the set was created with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct BitSet {
    blocks: Box<[u64]>,
}

impl BitSet {
    /// The empty set of numbers below `size`.
    pub(super) fn empty(size: usize) -> Self {
        Self { blocks: vec![0; size.div_ceil(64)].into_boxed_slice() }
    }

    /// All numbers below `size`.
    pub(super) fn full(size: usize) -> Self {
        let mut set = Self { blocks: vec![u64::MAX; size.div_ceil(64)].into_boxed_slice() };
        if let Some(last) = set.blocks.last_mut()
            && !size.is_multiple_of(64)
        {
            *last = (1 << (size % 64)) - 1;
        }
        set
    }

    /// The size on the heap in bytes.
    pub(super) fn heap_bytes(&self) -> usize {
        size_of_val(&*self.blocks)
    }

    /// Whether the set contains a number.
    pub(super) fn contains(&self, number: u32) -> bool {
        self.blocks.get(number as usize / 64).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// Adds a number. A number beyond the size is ignored.
    pub(super) fn insert(&mut self, number: u32) {
        if let Some(word) = self.blocks.get_mut(number as usize / 64) {
            *word |= 1 << (number % 64);
        }
    }

    /// Adds every number of `other`.
    pub(super) fn union_with(&mut self, other: &BitSet) {
        self.combine(other, |a, b| a | b);
    }

    /// Removes every number that `other` lacks.
    pub(super) fn intersect_with(&mut self, other: &BitSet) {
        self.combine(other, |a, b| a & b);
    }

    /// Removes every number of `other`.
    pub(super) fn subtract(&mut self, other: &BitSet) {
        self.combine(other, |a, b| a & !b);
    }

    /// Whether the set is empty.
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.iter().all(|word| *word == 0)
    }

    /// Whether `other` contains every number of this set.
    pub(super) fn is_subset(&self, other: &BitSet) -> bool {
        self.blocks.iter().zip(&other.blocks).all(|(a, b)| a & !b == 0)
    }

    /// Whether both sets share a number.
    pub(super) fn intersects(&self, other: &BitSet) -> bool {
        self.blocks.iter().zip(&other.blocks).any(|(a, b)| a & b != 0)
    }

    /// Whether the set contains no number except, perhaps, the given one.
    pub(super) fn is_subset_of_one(&self, number: u32) -> bool {
        let (index, bit) = (number as usize / 64, 1 << (number % 64));
        self.blocks.iter().enumerate().all(|(other, word)| *word == 0 || (other == index && *word == bit))
    }

    fn combine(&mut self, other: &BitSet, operation: fn(u64, u64) -> u64) {
        debug_assert_eq!(self.blocks.len(), other.blocks.len(), "sets of one tool table");
        for (word, other) in self.blocks.iter_mut().zip(&other.blocks) {
            *word = operation(*word, *other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets() {
        for size in [0, 1, 63, 64, 65, 130] {
            let full = BitSet::full(size);
            let mut counted = BitSet::empty(size);
            (0..u32::try_from(size).unwrap()).for_each(|number| counted.insert(number));
            assert_eq!(full, counted, "{size}");
            assert!(!full.contains(u32::try_from(size).unwrap()));
            let mut odd = BitSet::empty(size);
            (0..u32::try_from(size).unwrap()).step_by(2).for_each(|number| odd.insert(number));
            assert!(odd.is_subset(&full));
            assert_eq!(odd.is_subset_of_one(0), size < 3);
            assert!(!full.is_subset_of_one(1) || size == 0);
            let mut rest = full.clone();
            rest.subtract(&odd);
            assert_eq!(rest.contains(1), size > 1);
            assert!(!rest.contains(0));
            assert!(!rest.intersects(&odd));
            assert_eq!(rest.intersects(&full), size > 1);
            rest.union_with(&odd);
            assert_eq!(rest, full);
            rest.intersect_with(&odd);
            assert_eq!(rest, odd);
            assert_eq!(rest.is_empty(), size == 0);
            rest.subtract(&full);
            assert!(rest.is_empty());
        }
    }
}
