//! A map by name that takes no more memory than its entries: one slice, sorted, searched by halves.
//!
//! For maps that are made once and kept by the hundred thousand, as the scopes of cached chains are. A tree would keep room for
//! eleven entries where there is one.

use std::sync::Arc;

/// A sorted map; putting one entry in costs a copy, so that many are collected at once.
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

    /// The map's own copy of a name.
    pub fn key(&self, name: &str) -> Option<&Arc<str>> {
        let index = self.entries.binary_search_by(|(other, _)| (**other).cmp(name)).ok()?;
        self.entries.get(index).map(|(name, _)| name)
    }

    /// Whether a name is in.
    pub fn contains_key(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Every entry, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Arc<str>, &V)> {
        self.entries.iter().map(|(name, value)| (name, value))
    }

    /// Every name, in order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &Arc<str>> {
        self.iter().map(|(name, _)| name)
    }

    /// Every entry, its value to be changed.
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = (&Arc<str>, &mut V)> {
        self.entries.iter_mut().map(|(name, value)| (&*name, value))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds entries; of one name the later counts.
    pub fn extend(&mut self, more: impl IntoIterator<Item = (Arc<str>, V)>) {
        let mut entries = std::mem::take(&mut self.entries).into_vec();
        entries.extend(more);
        // Sorted by name and, being stable, by time: of equal names the last one stays.
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

    /// Takes over the names that another map has as well, so that both keep one copy of each.
    pub fn share_names(&mut self, other: &SortedMap<V>) {
        for (name, _) in &mut self.entries {
            if let Some(theirs) = other.key(name) {
                *name = theirs.clone();
            }
        }
    }

    /// Bytes of the slice itself, without what names and values point to.
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
