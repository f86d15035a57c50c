//! The names of `sync_primitives.rs`, modelled by loom. Loom tries every order of their operations that the memory model allows.
//!
//! Primitives that loom lacks are built here from those that it has. Look next at `snapshot/tests/loom_tests.rs` and
//! `revocation/tests/loom_tests.rs`.

use std::collections::BTreeMap;
use std::io;
use std::ops::{Bound, Deref, DerefMut};

use loom::sync::atomic::{AtomicBool, Ordering};

use crate::model::mutant::{self, Mutant};

pub(crate) use loom::sync::atomic::{AtomicU64, AtomicUsize};
pub(crate) use loom::sync::{Mutex, MutexGuard};

macro_rules! thread_local_of_loom {
    (static $name:ident: $type:ty = const { $init:expr };) => {
        loom::thread_local! { static $name: $type = $init; }
    };
}
pub(crate) use thread_local_of_loom as per_thread;

/// Fewer words than in production, so that there are fewer orders to try.
pub(crate) const FILTER_WORDS: usize = 2;

pub(crate) fn spawn(_name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    loom::thread::spawn(run);
    Ok(())
}

/// Tries every order with at most two preemptions, or `LOOM_MAX_PREEMPTIONS` if that is more.
pub(crate) fn check_model(run: impl Fn() + Sync + Send + 'static) {
    check_model_with_preemptions(2, run);
}

/// Tries every order with at most `preemptions` preemptions, or `LOOM_MAX_PREEMPTIONS` if that is more.
pub(crate) fn check_model_with_preemptions(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.max(Some(preemptions));
    builder.check(run);
}

/// Asserts that the model fails with the mutant.
pub(crate) fn assert_mutant_is_caught(mutant: Mutant, model: fn()) {
    let ran = std::panic::catch_unwind(|| mutant::run_with_mutant(Some(mutant), model));
    assert!(ran.is_err(), "{mutant:?} is not seen");
}

/// A value that is set once. It has the one guarantee of the real type: a thread that sees it set also sees the value.
pub(crate) struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    is_set: AtomicBool,
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self { value: std::sync::OnceLock::new(), is_set: AtomicBool::new(false) }
    }
}

impl<T> OnceLock<T> {
    pub(crate) fn get(&self) -> Option<&T> {
        self.is_set.load(Ordering::Acquire).then(|| self.value.get()).flatten()
    }

    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        let set = self.value.set(value);
        self.is_set.store(true, Ordering::Release);
        set
    }
}

/// A map with a single shard that is locked for each step. Reads return copies.
pub(crate) struct Map<K, V, S>(Mutex<BTreeMap<K, V>>, S);

impl<K: Ord + Copy, V: Copy, S> Map<K, V, S> {
    pub(crate) fn with_capacity_and_hasher_and_shard_amount(_capacity: usize, hasher: S, _shards: usize) -> Self {
        Self(Mutex::new(BTreeMap::new()), hasher)
    }

    pub(crate) fn get(&self, key: &K) -> Option<MapEntryRef<K, V>> {
        self.lock().get(key).map(|value| MapEntryRef { key: *key, value: *value })
    }

    pub(crate) fn get_mut(&self, key: &K) -> Option<MapEntryRefMut<'_, K, V>> {
        let map = self.lock();
        map.contains_key(key).then_some(MapEntryRefMut { map, key: *key })
    }

    pub(crate) fn insert(&self, key: K, value: V) -> Option<V> {
        self.lock().insert(key, value)
    }

    pub(crate) fn remove(&self, key: &K) {
        self.lock().remove(key);
    }

    pub(crate) fn retain(&self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        self.lock().retain(|key, value| keep(key, value));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = MapEntryRef<K, V>> + '_ {
        self.keys().filter_map(|key| self.get(&key))
    }

    pub(crate) fn iter_mut(&self) -> impl Iterator<Item = MapEntryRefMut<'_, K, V>> {
        self.keys().filter_map(|key| self.get_mut(&key))
    }

    /// Iterates over the keys and releases the lock between them.
    fn keys(&self) -> impl Iterator<Item = K> + '_ {
        let next = |after: Bound<K>| self.lock().range((after, Bound::Unbounded)).next().map(|(key, _)| *key);
        std::iter::successors(next(Bound::Unbounded), move |key| next(Bound::Excluded(*key)))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<K, V>> {
        self.0.lock().unwrap()
    }
}

pub(crate) struct MapEntryRef<K, V> {
    key: K,
    value: V,
}

impl<K, V> MapEntryRef<K, V> {
    pub(crate) fn key(&self) -> &K {
        &self.key
    }
}

impl<K, V> Deref for MapEntryRef<K, V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.value
    }
}

pub(crate) struct MapEntryRefMut<'a, K, V> {
    map: MutexGuard<'a, BTreeMap<K, V>>,
    key: K,
}

impl<K, V> MapEntryRefMut<'_, K, V> {
    pub(crate) fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Ord, V> Deref for MapEntryRefMut<'_, K, V> {
    type Target = V;

    fn deref(&self) -> &V {
        self.map.get(&self.key).unwrap()
    }
}

impl<K: Ord, V> DerefMut for MapEntryRefMut<'_, K, V> {
    fn deref_mut(&mut self) -> &mut V {
        self.map.get_mut(&self.key).unwrap()
    }
}
