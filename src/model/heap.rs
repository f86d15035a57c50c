//! What values hold on the heap: what a cache weighs its entries by.
//!
//! Counts what was asked of the allocator, which `tests/memory.rs` compares with what it gave. What several values share counts for
//! the one that holds it anyway: a name of a wider scope for that scope, an agent's id for the registry.

use std::sync::Arc;

use super::constraint::{ArgumentMap, Constraint};
use super::json::{Object, Value};
use super::request::{Scope, Subject};
use super::sorted::SortedMap;

/// The two counters before what an [`Arc`] holds.
const COUNTERS_BYTES: usize = 2 * size_of::<usize>();

/// What an [`Arc`] of bytes or text takes: counters, content, and what alignment adds.
pub fn shared_bytes(content: impl AsRef<[u8]>) -> usize {
    (COUNTERS_BYTES + content.as_ref().len()).next_multiple_of(align_of::<usize>())
}

/// What an [`Arc`] takes for its content, without what that points to.
pub fn arc_bytes<T>() -> usize {
    COUNTERS_BYTES + size_of::<T>()
}

/// What a vector takes for its items, without what they point to.
pub fn vec_bytes<T>(items: &Vec<T>) -> usize {
    items.capacity() * size_of::<T>()
}

/// What an object takes.
pub fn object_bytes(object: &Object) -> usize {
    object.heap_bytes(value_bytes)
}

fn value_bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.capacity(),
        Value::Array(items) => values_bytes(items),
        Value::Object(object) => object_bytes(object),
    }
}

fn values_bytes(items: &Vec<Value>) -> usize {
    vec_bytes(items) + items.iter().map(value_bytes).sum::<usize>()
}

impl Constraint {
    fn heap_bytes(&self) -> usize {
        match self {
            Constraint::Exact(value) => value_bytes(value),
            Constraint::OneOf(values)
            | Constraint::NotOneOf(values)
            | Constraint::Contains(values)
            | Constraint::Subset(values) => values_bytes(values),
            Constraint::All(clauses) | Constraint::Any(clauses) => {
                vec_bytes(clauses) + clauses.iter().map(Constraint::heap_bytes).sum::<usize>()
            }
            Constraint::Range(_) | Constraint::Wildcard => 0,
        }
    }
}

/// Slice and names of a map, without names that a wider map holds, and without what its values point to.
fn map_bytes<V>(map: &SortedMap<V>, wider: Option<&SortedMap<V>>) -> usize {
    let is_shared = |name: &Arc<str>| wider.and_then(|wider| wider.key(name)).is_some_and(|theirs| Arc::ptr_eq(theirs, name));
    map.slice_bytes() + map.keys().filter(|name| !is_shared(name)).map(|name| shared_bytes(&**name)).sum::<usize>()
}

impl ArgumentMap {
    fn heap_bytes(&self, wider: Option<&ArgumentMap>) -> usize {
        let constraints = self.named.iter().map(|(_, argument)| argument.constraint.heap_bytes()).sum::<usize>();
        map_bytes(&self.named, wider.map(|wider| &wider.named)) + constraints
    }
}

impl Scope {
    /// Bytes on the heap; names that a wider scope holds are that scope's.
    pub fn heap_bytes(&self, wider: Option<&Scope>) -> usize {
        let maps = self.tools.iter().map(|(tool, map)| map.heap_bytes(wider.and_then(|wider| wider.tools.get(tool))));
        map_bytes(&self.tools, wider.map(|wider| &wider.tools)) + maps.sum::<usize>()
    }
}

impl Subject {
    /// Bytes on the heap: agents and the user's issuer are the registry's.
    pub fn heap_bytes(&self) -> usize {
        let texts = [&*self.user.subject, self.application.as_str(), self.session.as_str(), self.task.as_str()];
        let texts = texts.into_iter().chain(self.groups.iter().map(|group| group.as_str())).map(shared_bytes);
        let wider = std::iter::once(None).chain(self.scopes.iter().map(Some));
        let scopes = self.scopes.iter().zip(wider).map(|(scope, wider)| scope.heap_bytes(wider));
        let lists = vec_bytes(&self.groups) + vec_bytes(&self.agents) + vec_bytes(&self.scopes);
        texts.sum::<usize>() + scopes.sum::<usize>() + lists
    }
}
