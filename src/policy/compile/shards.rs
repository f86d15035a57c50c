//! A hash map in shared pieces: a copy costs the number of pieces, a change the piece it falls in.
//!
//! That is what makes a change to one agent of a million cheap while older snapshots go on as they were. Look next at
//! `compile.rs`.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::{Arc, Weak};

/// Pieces: a thousand agents in each of a fleet of a million.
const SHARDS: usize = 1024;

/// A persistent map: clones share all that none of them has changed.
#[derive(Debug)]
pub(super) struct Shards<K, V> {
    shards: Vec<Arc<HashMap<K, V>>>,
    count: usize,
}

impl<K, V> Clone for Shards<K, V> {
    fn clone(&self) -> Self {
        Self { shards: self.shards.clone(), count: self.count }
    }
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        let empty = Arc::new(HashMap::new());
        Self { shards: vec![empty; SHARDS], count: 0 }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Shards<K, V> {
    pub(super) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards.get(shard_of(key))?.get(key)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        if let Some(shard) = self.shards.get_mut(shard_of(&key))
            && Arc::make_mut(shard).insert(key, value).is_none()
        {
            self.count += 1;
        }
    }

    pub(super) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let shard = self.shards.get_mut(shard_of(key)).filter(|shard| shard.contains_key(key))?;
        self.count -= 1;
        Arc::make_mut(shard).remove(key)
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &K> {
        self.shards.iter().flat_map(|shard| shard.keys())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }

    /// Keeps what `keep` says in the piece that `key` falls in.
    fn retain_near(&mut self, key: &K, keep: impl Fn(&V) -> bool) {
        let Some(shard) = self.shards.get_mut(shard_of(key)).filter(|shard| shard.values().any(|value| !keep(value))) else {
            return;
        };
        let shard = Arc::make_mut(shard);
        let before = shard.len();
        shard.retain(|_, value| keep(value));
        self.count -= before - shard.len();
    }
}

/// Values by what they were made of, so that equal ones are one; a value that nobody uses any more is forgotten.
#[derive(Debug)]
pub(super) struct Interner<T> {
    values: Shards<Arc<str>, Weak<T>>,
    sweeping: bool,
}

impl<T> Clone for Interner<T> {
    fn clone(&self) -> Self {
        Self { values: self.values.clone(), sweeping: self.sweeping }
    }
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { values: Shards::default(), sweeping: false }
    }
}

impl<T> Interner<T> {
    /// The value of a key, made only if there is none in use. Equal keys must mean equal values.
    pub(super) fn intern(&mut self, key: Arc<str>, make: impl FnOnce() -> T) -> Arc<T> {
        if let Some(value) = self.values.get(&key).and_then(Weak::upgrade) {
            return value;
        }
        let value = Arc::new(make());
        if self.sweeping {
            self.values.retain_near(&key, |value| value.strong_count() > 0);
        }
        self.values.insert(key, Arc::downgrade(&value));
        value
    }

    /// From now on each insertion also forgets what nobody uses near it: not worth it while a whole policy is compiled.
    pub(super) fn sweep(&mut self) {
        self.sweeping = true;
    }

    /// How many values are in use.
    pub(super) fn live_count(&self) -> usize {
        self.values.values().filter(|value| value.strong_count() > 0).count()
    }
}

fn shard_of<Q: Hash + ?Sized>(key: &Q) -> usize {
    (BuildHasherDefault::<DefaultHasher>::default().hash_one(key) % SHARDS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_unused_ones_are_forgotten() {
        let mut interner: Interner<u32> = Interner::default();
        let one = interner.intern("1".into(), || 1);
        assert!(Arc::ptr_eq(&one, &interner.intern("1".into(), || panic!("made twice"))));
        interner.sweep();
        for n in 0..10_000 {
            interner.intern(format!("n{n}").into(), || n);
        }
        assert_eq!(interner.live_count(), 1);
        assert!(interner.values.len() <= 1 + SHARDS, "{} are kept", interner.values.len());
    }

    #[test]
    fn a_clone_is_independent_and_shares_the_rest() {
        let mut first: Shards<Arc<str>, u32> = Shards::default();
        for n in 0..5000 {
            first.insert(n.to_string().into(), n);
        }
        let mut second = first.clone();
        second.insert("7".into(), 70);
        second.remove("8");
        assert_eq!((first.get("7"), first.get("8"), first.len()), (Some(&7), Some(&8), 5000));
        assert_eq!((second.get("7"), second.get("8"), second.len()), (Some(&70), None, 4999));
        let shared = first.shards.iter().zip(&second.shards).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert!(shared >= SHARDS - 2);
        assert_eq!(second.remove("8"), None);
        assert_eq!((second.keys().count(), second.values().count()), (4999, 4999));
        second.retain_near(&"7".into(), |value| *value != 70);
        assert_eq!((second.get("7"), second.len()), (None, 4998));
    }
}
