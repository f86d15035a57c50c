//! A persistent hash map in shards. Cloning the map costs a few reference counts, and a change copies one shard.
//!
//! So a change to one agent of a million is cheap while older snapshots keep their own content. A name is hashed once, with a seed of this
//! process, for the shard and for the slot inside of it.

use std::borrow::Borrow;
use std::fmt;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};

/// Number of shards: with a million agents, each holds a thousand.
const SHARD_COUNT: usize = 1024;

type MapShard<K, V> = Arc<HashTable<(K, V)>>;

/// A persistent map. Clones share all shards that none of them has changed.
pub(crate) struct ShardedMap<K, V> {
    hasher: DefaultHashBuilder,
    shards: Arc<[MapShard<K, V>]>,
    count: usize,
}

impl<K, V> Clone for ShardedMap<K, V> {
    fn clone(&self) -> Self {
        Self { hasher: self.hasher.clone(), shards: self.shards.clone(), count: self.count }
    }
}

impl<K, V> Default for ShardedMap<K, V> {
    fn default() -> Self {
        let empty: MapShard<K, V> = Arc::default();
        Self { hasher: DefaultHashBuilder::default(), shards: (0..SHARD_COUNT).map(|_| Arc::clone(&empty)).collect(), count: 0 }
    }
}

impl<K, V> fmt::Debug for ShardedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shards").field("count", &self.count).finish_non_exhaustive()
    }
}

impl<K: Borrow<str> + Clone, V: Clone> ShardedMap<K, V> {
    /// The value of a name.
    pub(crate) fn get(&self, name: &str) -> Option<&V> {
        let hash = self.hash(name);
        self.shards.get(shard_index(hash))?.find(hash, has_name(name)).map(|(_, value)| value)
    }

    /// Inserts a value, or replaces the value of the same name.
    pub(crate) fn insert(&mut self, name: K, value: V) {
        let hash = self.hash(name.borrow());
        let Some(shard) = Arc::make_mut(&mut self.shards).get_mut(shard_index(hash)) else { return };
        let shard = Arc::make_mut(shard);
        if let Some((_, old)) = shard.find_mut(hash, has_name(name.borrow())) {
            *old = value;
        } else {
            let hasher = &self.hasher;
            shard.insert_unique(hash, (name, value), |(name, _)| hasher.hash_one(name.borrow()));
            self.count += 1;
        }
    }

    /// Removes a name and returns its value.
    pub(crate) fn remove(&mut self, name: &str) -> Option<V> {
        let hash = self.hash(name);
        // The name is looked up first, so that a shard without it is not copied.
        self.shards.get(shard_index(hash))?.find(hash, has_name(name))?;
        let shard = Arc::make_mut(Arc::make_mut(&mut self.shards).get_mut(shard_index(hash))?);
        let entry = shard.find_entry(hash, has_name(name)).ok()?;
        self.count -= 1;
        let ((_, value), _) = entry.remove();
        Some(value)
    }

    /// Removes every value for which `keep` returns false, in the shard of `name` only.
    pub(crate) fn retain_in_shard_of(&mut self, name: &str, keep: impl Fn(&V) -> bool) {
        let index = shard_index(self.hash(name));
        let has_more = |shard: &MapShard<K, V>| shard.iter().any(|(_, value)| !keep(value));
        if !self.shards.get(index).is_some_and(has_more) {
            return;
        }
        if let Some(shard) = Arc::make_mut(&mut self.shards).get_mut(index) {
            let shard = Arc::make_mut(shard);
            let before = shard.len();
            shard.retain(|(_, value)| keep(value));
            self.count -= before - shard.len();
        }
    }

    /// The number of names.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// All entries, in no particular order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter().map(|(name, value)| (name, value)))
    }

    /// All names, in no particular order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(name, _)| name)
    }

    fn hash(&self, name: &str) -> u64 {
        self.hasher.hash_one(name)
    }
}

/// Uses bits of the hash that a table uses neither for its buckets nor for its tags.
fn shard_index(hash: u64) -> usize {
    usize::try_from(hash >> 40).unwrap_or_default() % SHARD_COUNT
}

fn has_name<K: Borrow<str>, V>(name: &str) -> impl Fn(&(K, V)) -> bool {
    move |(other, _)| other.borrow() == name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_is_independent_and_shares_the_rest() {
        let mut first: ShardedMap<Arc<str>, u32> = ShardedMap::default();
        for n in 0..5000 {
            first.insert(n.to_string().into(), n);
        }
        let mut second = first.clone();
        second.insert("7".into(), 70);
        second.remove("8");
        assert_eq!((first.get("7"), first.get("8"), first.len()), (Some(&7), Some(&8), 5000));
        assert_eq!((second.get("7"), second.get("8"), second.len()), (Some(&70), None, 4999));
        let shared = first.shards.iter().zip(&*second.shards).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert!((SHARD_COUNT - 2..SHARD_COUNT).contains(&shared), "{shared} are shared");
        let third = second.clone();
        assert_eq!(second.remove("8"), None);
        assert!(Arc::ptr_eq(&second.shards, &third.shards), "nothing was removed and something was copied");
        assert_eq!(second.iter().count(), 4999);
        second.retain_in_shard_of("7", |value| *value != 70);
        assert_eq!((second.get("7"), second.len(), third.get("7")), (None, 4998, Some(&70)));
    }

    #[test]
    fn names_spread_over_all_pieces() {
        let mut map: ShardedMap<Arc<str>, ()> = ShardedMap::default();
        for n in 0..100 * SHARD_COUNT {
            map.insert(format!("spiffe://fleet.example/agent/{n}").into(), ());
        }
        let (least, most) = (map.shards.iter().map(|shard| shard.len()).min(), map.shards.iter().map(|shard| shard.len()).max());
        assert!(least > Some(30) && most < Some(200), "{least:?} to {most:?} in a piece of a hundred");
    }
}
