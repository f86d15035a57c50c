//! A map by name with minimal memory: one sorted slice with binary search.
//!
//! It is for maps that are built once and kept by the hundred thousand, such as the scopes of cached chains. A B-tree would reserve space
//! for eleven entries even for a single one.

use std::sync::Arc;

/// A sorted map. An insertion copies the slice, so entries should be inserted together.
#[derive(Clone, Debug, PartialEq)]
pub struct SortedMap<V> {
    entries: Box<[(Arc<str>, V)]>,
}

impl<V> Default for SortedMap<V> {
    fn default() -> Self {
        Self { entries: Box::default() }
    }
}

impl<V> SortedMap<V> {
    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<&V> {
        let index = self.entries.binary_search_by(|(other, _)| (**other).cmp(name)).ok()?;
        self.entries.get(index).map(|(_, value)| value)
    }

    /// The map's own shared string for a name.
    pub fn key(&self, name: &str) -> Option<&Arc<str>> {
        let index = self.entries.binary_search_by(|(other, _)| (**other).cmp(name)).ok()?;
        self.entries.get(index).map(|(name, _)| name)
    }

    /// Whether the map has a name.
    pub fn contains_key(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// All entries, ordered by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Arc<str>, &V)> {
        self.entries.iter().map(|(name, value)| (name, value))
    }

    /// All names, in order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &Arc<str>> {
        self.iter().map(|(name, _)| name)
    }

    /// All entries with mutable values, ordered by name.
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = (&Arc<str>, &mut V)> {
        self.entries.iter_mut().map(|(name, value)| (&*name, value))
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Inserts entries. Of several entries with the same name, the last one counts.
    pub fn extend(&mut self, more: impl IntoIterator<Item = (Arc<str>, V)>) {
        let mut entries = std::mem::take(&mut self.entries).into_vec();
        entries.extend(more);
        // The sort is stable, so entries of the same name stay in the order of insertion, and the last one is kept.
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        self.entries = entries.into_boxed_slice();
    }

    /// Replaces each name that `other` also has by the shared string of `other`, so that both maps hold one copy.
    pub fn share_names(&mut self, other: &SortedMap<V>) {
        for (name, _) in &mut self.entries {
            if let Some(theirs) = other.key(name) {
                *name = theirs.clone();
            }
        }
    }

    /// Size of the slice in bytes, without the data that names and values point to.
    pub fn slice_bytes(&self) -> usize {
        size_of_val(&*self.entries)
    }
}

impl<V> FromIterator<(Arc<str>, V)> for SortedMap<V> {
    fn from_iter<I: IntoIterator<Item = (Arc<str>, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        map.extend(entries);
        map
    }
}

impl<V, const N: usize> From<[(Arc<str>, V); N]> for SortedMap<V> {
    fn from(entries: [(Arc<str>, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<V> IntoIterator for SortedMap<V> {
    type Item = (Arc<str>, V);
    type IntoIter = std::vec::IntoIter<(Arc<str>, V)>;

    fn into_iter(self) -> Self::IntoIter {
        self.entries.into_vec().into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&str, u32)]) -> SortedMap<u32> {
        entries.iter().map(|(name, value)| (Arc::from(*name), *value)).collect()
    }

    #[test]
    fn it_is_a_map_whatever_the_order() {
        let mut first = map(&[("b", 2), ("a", 1), ("c", 3), ("a", 4)]);
        assert_eq!(first.iter().map(|(name, value)| (&**name, *value)).collect::<Vec<_>>(), [("a", 4), ("b", 2), ("c", 3)]);
        assert_eq!((first.get("a"), first.get("d"), first.len(), first.is_empty()), (Some(&4), None, 3, false));
        assert_eq!(first, map(&[("c", 3), ("b", 2), ("a", 4)]));
        first.extend(map(&[("b", 7), ("", 0)]));
        assert_eq!(first, map(&[("", 0), ("a", 4), ("b", 7), ("c", 3)]));
        assert!(first.contains_key("") && !map(&[]).contains_key(""));
    }

    #[test]
    fn names_are_shared() {
        let (first, mut second) = (map(&[("a", 1), ("b", 2)]), map(&[("b", 3), ("c", 4)]));
        second.share_names(&first);
        assert_eq!(second, map(&[("b", 3), ("c", 4)]));
        let of = |map: &SortedMap<u32>, wanted: &str| map.keys().find(|name| &***name == wanted).cloned().unwrap();
        assert!(Arc::ptr_eq(&of(&first, "b"), &of(&second, "b")));
    }
}
