//! Checks the entries of a permission list: unknown tools, denies that match nothing, and entries that never count.
//!
//! This file compares only the document's own entries with each other. `ceilings.rs` compares them with included sets.

use crate::model::constraint::abridged;

use super::super::bits::BitSet;
use super::super::document::{Entry, List, Permissions, is_unsatisfiable};
use super::super::tools::{Matching, Patterns};
use super::Checker;

/// The maximum number of entries of a list that are compared with each other. Longer lists come from programs, and nobody reads
/// warnings about them.
const PAIRS_MAX: usize = 256;

/// Checks `allow`, `approve` and `deny` of a document.
pub(super) fn check_entries(checker: &mut Checker<'_>, permissions: &Permissions, patterns: &mut Patterns) {
    let resolved = List::ALL.map(|list| {
        let entries = permissions.list(list).iter();
        (list, entries.map(|entry| (entry, patterns.resolve(&entry.pattern, checker.known.tools()))).collect::<Vec<_>>())
    });
    let size = checker.known.tools().len();
    // The tools that lists of higher precedence cover for all arguments.
    let (mut denied, mut approved) = (BitSet::empty(size), BitSet::empty(size));
    for (list, entries) in &resolved {
        for (index, (entry, matching)) in entries.iter().enumerate() {
            check_entry(checker, *list, index, entry, matching);
            if matching.is_empty() {
                continue;
            }
            let taken = match list {
                List::Deny => None,
                List::Approve | List::Allow if matching.is_within(&denied) => Some("`deny`"),
                List::Allow if matching.is_within(&approved) => Some("`approve`"),
                _ => None,
            };
            if let Some(by) = taken {
                let message = format!("`{}` never counts: {by} of this document takes all it matches", abridged(&entry.pattern));
                checker.warn(list.as_str(), index, message);
            } else if *list != List::Approve {
                check_shadowed(checker, *list, index, entries);
            }
        }
        for (_, matching) in entries.iter().filter(|(entry, _)| entry.is_unconditional()) {
            match list {
                List::Deny => matching.unite_into(&mut denied),
                List::Approve => matching.unite_into(&mut approved),
                List::Allow => {}
            }
        }
    }
}

/// Checks one entry by itself: its tools, its constraints, its preparation and its approvers.
fn check_entry(checker: &mut Checker<'_>, list: List, index: usize, entry: &Entry, matching: &Matching) {
    let field = list.as_str();
    let pattern = &entry.pattern;
    if matching.is_empty() && !pattern.contains('*') {
        checker.unknown_tool(field, index, pattern);
    } else if matching.is_empty() && &**pattern != "*" {
        let message = format!("pattern `{}` matches no registered tool", abridged(pattern));
        if list == List::Deny {
            let help = Some("a deny that matches nothing is a hole".to_owned());
            checker.error(field, index, message, help);
        } else {
            checker.warn(field, index, message);
        }
    }
    if list != List::Deny {
        for (name, argument) in entry.arguments.named.iter() {
            if is_unsatisfiable(&argument.constraint) && !argument.optional {
                let message =
                    format!("`{}` never counts: no value of argument `{}` can satisfy it", abridged(pattern), abridged(name));
                checker.warn(field, index, message);
            }
        }
    }
    if let Some(prepared) = entry.prepared.as_ref().filter(|prepared| checker.known.tools().number(prepared).is_none()) {
        checker.unknown_tool(field, index, prepared);
    }
    for group in entry.approval.iter().flat_map(|approval| &approval.by) {
        if !checker.known.has_operators(group.as_str()) {
            let message =
                format!("nobody can approve `{}`: no operator is in group `{}`", abridged(pattern), abridged(group.as_str()));
            checker.warn(field, index, message);
        }
    }
}

/// Warns about an entry if another entry of its list covers its tools for all arguments.
fn check_shadowed(checker: &mut Checker<'_>, list: List, index: usize, entries: &[(&Entry, Matching)]) {
    let Some((entry, matching)) = entries.get(index).filter(|_| entries.len() <= PAIRS_MAX) else {
        return;
    };
    let shadow = entries.iter().enumerate().find(|(other_index, (other, wider))| {
        // Of two equal entries, the later one is redundant.
        let same = || entry.is_unconditional() && wider.is_covered_by(matching);
        *other_index != index && other.is_unconditional() && matching.is_covered_by(wider) && (*other_index < index || !same())
    });
    if let Some((_, (other, _))) = shadow {
        let message = format!("`{}` adds nothing: `{}` covers it", abridged(&entry.pattern), abridged(&other.pattern));
        checker.warn(list.as_str(), index, message);
    }
}
