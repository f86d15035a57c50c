//! Stores each value that many agents share exactly once.
//!
//! It is generic over the value. Look next at `compile.rs`, which interns permission sets and the rules of agents.

use std::sync::{Arc, Weak};

use crate::model::sharded_map::ShardedMap;

/// Shared values by the text that they were made from. Values that nobody uses any more are dropped.
#[derive(Debug)]
pub(super) struct Interner<T> {
    values: ShardedMap<Arc<str>, Weak<T>>,
    sweeps_on_insert: bool,
}

impl<T> Clone for Interner<T> {
    fn clone(&self) -> Self {
        Self { values: self.values.clone(), sweeps_on_insert: self.sweeps_on_insert }
    }
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { values: ShardedMap::default(), sweeps_on_insert: false }
    }
}

impl<T> Interner<T> {
    /// Returns the value of a key, and creates it only if none is in use. Equal keys must mean equal values.
    pub(super) fn intern(&mut self, key: Arc<str>, make: impl FnOnce() -> T) -> Arc<T> {
        if let Some(value) = self.values.get(&key).and_then(Weak::upgrade) {
            return value;
        }
        let value = Arc::new(make());
        if self.sweeps_on_insert {
            self.values.retain_in_shard_of(&key, |value| value.strong_count() > 0);
        }
        self.values.insert(key, Arc::downgrade(&value));
        value
    }

    /// From now on each insertion also drops unused values near it. That is not worth the cost while a whole policy is compiled.
    pub(super) fn enable_sweeping(&mut self) {
        self.sweeps_on_insert = true;
    }

    /// The number of values in use.
    pub(super) fn live_count(&self) -> usize {
        self.values.iter().filter(|(_, value)| value.strong_count() > 0).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_unused_ones_are_forgotten() {
        let mut interner: Interner<u32> = Interner::default();
        let one = interner.intern("1".into(), || 1);
        assert!(Arc::ptr_eq(&one, &interner.intern("1".into(), || panic!("made twice"))));
        interner.enable_sweeping();
        for n in 0..10_000 {
            interner.intern(format!("n{n}").into(), || n);
        }
        assert_eq!(interner.live_count(), 1);
        assert!(interner.values.len() <= 1 + 1024, "{} are kept", interner.values.len());
    }
}
