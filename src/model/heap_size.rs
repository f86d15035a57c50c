//! The heap size of values. Caches weigh their entries by it.
//!
//! It counts the bytes that were requested from the allocator; `tests/memory.rs` compares them with the bytes that the allocator
//! used. A part that several values share is counted once, with the value that always holds it: a name in a wider scope with that
//! scope, and the id of an agent with the registry.

use std::sync::Arc;

use super::constraint::{Constraint, ConstraintMap};
use super::json::{JsonObject, Value};
use super::request::{DelegationSubject, TokenScope};
use super::sorted_map::SortedMap;

/// The two reference counts before the content of an [`Arc`].
const ARC_COUNTERS_BYTES: usize = 2 * size_of::<usize>();

/// Size of an [`Arc`] of bytes or text: reference counts, content and alignment.
pub fn arc_slice_bytes(content: impl AsRef<[u8]>) -> usize {
    (ARC_COUNTERS_BYTES + content.as_ref().len()).next_multiple_of(align_of::<usize>())
}

/// Size of an [`Arc`] of a `T`, without the data that the `T` points to.
pub fn arc_bytes<T>() -> usize {
    ARC_COUNTERS_BYTES + size_of::<T>()
}

/// Size of the items of a vector, without the data that they point to.
pub fn vec_bytes<T>(items: &Vec<T>) -> usize {
    items.capacity() * size_of::<T>()
}

/// Size of a JSON object.
pub fn object_bytes(object: &JsonObject) -> usize {
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

/// Bytes of a map's slice and of its names. Names that are shared with a wider map, and the data behind pointers in the values,
/// are not counted.
fn map_bytes<V>(map: &SortedMap<V>, wider: Option<&SortedMap<V>>) -> usize {
    let is_shared = |name: &Arc<str>| wider.and_then(|wider| wider.key(name)).is_some_and(|theirs| Arc::ptr_eq(theirs, name));
    map.slice_bytes() + map.keys().filter(|name| !is_shared(name)).map(|name| arc_slice_bytes(&**name)).sum::<usize>()
}

impl ConstraintMap {
    fn heap_bytes(&self, wider: Option<&ConstraintMap>) -> usize {
        let constraints = self.named.iter().map(|(_, argument)| argument.constraint.heap_bytes()).sum::<usize>();
        map_bytes(&self.named, wider.map(|wider| &wider.named)) + constraints
    }
}

impl TokenScope {
    /// Bytes on the heap. Names that are shared with `wider` are counted there, not here.
    pub fn heap_bytes(&self, wider: Option<&TokenScope>) -> usize {
        let maps = self.tools.iter().map(|(tool, map)| map.heap_bytes(wider.and_then(|wider| wider.tools.get(tool))));
        map_bytes(&self.tools, wider.map(|wider| &wider.tools)) + maps.sum::<usize>()
    }
}

impl DelegationSubject {
    /// Bytes on the heap, without the agents' ids and the user's issuer, which are counted with the registry.
    pub fn heap_bytes(&self) -> usize {
        let texts = [&*self.user.subject, self.application.as_str(), self.session.as_str(), self.task.as_str()];
        let texts = texts.into_iter().chain(self.groups.iter().map(|group| group.as_str())).map(arc_slice_bytes);
        let wider = std::iter::once(None).chain(self.scopes.iter().map(Some));
        let scopes = self.scopes.iter().zip(wider).map(|(scope, wider)| scope.heap_bytes(wider));
        let lists = vec_bytes(&self.groups) + vec_bytes(&self.agents) + vec_bytes(&self.scopes);
        texts.sum::<usize>() + scopes.sum::<usize>() + lists
    }
}
