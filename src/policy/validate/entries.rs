//! Checks the entries of a permission list: unknown tools, denies that match nothing, and entries that never count.
//!
//! This file compares only the document's own entries with each other. `ceilings.rs` compares them with included sets.

use crate::model::constraint::abbreviate;

use super::super::bit_set::BitSet;
use super::super::document::{ListKind, PermissionEntry, PermissionLists, is_unsatisfiable};
use super::super::tools::{MatchedTools, PatternCache};
use super::DocumentChecker;

/// The maximum number of entries of a list that are compared with each other. Longer lists come from programs, and nobody reads
/// warnings about them.
const COMPARED_ENTRIES_MAX: usize = 256;

/// Checks `allow`, `approve` and `deny` of a document.
pub(super) fn check_entries(checker: &mut DocumentChecker<'_>, permissions: &PermissionLists, patterns: &mut PatternCache) {
    let resolved = ListKind::ALL.map(|list| {
        let entries = permissions.entries(list).iter();
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
                ListKind::Deny => None,
                ListKind::Approve | ListKind::Allow if matching.is_subset_of(&denied) => Some("`deny`"),
                ListKind::Allow if matching.is_subset_of(&approved) => Some("`approve`"),
                _ => None,
            };
            if let Some(by) = taken {
                let message =
                    format!("`{}` never counts: {by} of this document takes all it matches", abbreviate(&entry.pattern));
                checker.report_warning(list.as_str(), index, message);
            } else if *list != ListKind::Approve {
                check_shadowed(checker, *list, index, entries);
            }
        }
        for (_, matching) in entries.iter().filter(|(entry, _)| entry.is_unconditional()) {
            match list {
                ListKind::Deny => matching.add_to(&mut denied),
                ListKind::Approve => matching.add_to(&mut approved),
                ListKind::Allow => {}
            }
        }
    }
}

/// Checks one entry by itself: its tools, its constraints, its preparation and its approvers.
fn check_entry(
    checker: &mut DocumentChecker<'_>,
    list: ListKind,
    index: usize,
    entry: &PermissionEntry,
    matching: &MatchedTools,
) {
    let field = list.as_str();
    let pattern = &entry.pattern;
    if matching.is_empty() && !pattern.contains('*') {
        checker.report_unknown_tool(field, index, pattern);
    } else if matching.is_empty() && &**pattern != "*" {
        let message = format!("pattern `{}` matches no registered tool", abbreviate(pattern));
        if list == ListKind::Deny {
            let help = Some("a deny that matches nothing is a hole".to_owned());
            checker.report_error(field, index, message, help);
        } else {
            checker.report_warning(field, index, message);
        }
    }
    if list != ListKind::Deny {
        for (name, argument) in entry.arguments.named.iter() {
            if is_unsatisfiable(&argument.constraint) && !argument.optional {
                let message =
                    format!("`{}` never counts: no value of argument `{}` can satisfy it", abbreviate(pattern), abbreviate(name));
                checker.report_warning(field, index, message);
            }
        }
    }
    if let Some(prepared) = entry.prepared.as_ref().filter(|prepared| checker.known.tools().number(prepared).is_none()) {
        checker.report_unknown_tool(field, index, prepared);
    }
    for group in entry.approval.iter().flat_map(|approval| &approval.by) {
        if !checker.known.group_has_operators(group.as_str()) {
            let message =
                format!("nobody can approve `{}`: no operator is in group `{}`", abbreviate(pattern), abbreviate(group.as_str()));
            checker.report_warning(field, index, message);
        }
    }
}

/// Warns about an entry if another entry of its list covers its tools for all arguments.
fn check_shadowed(checker: &mut DocumentChecker<'_>, list: ListKind, index: usize, entries: &[(&PermissionEntry, MatchedTools)]) {
    let Some((entry, matching)) = entries.get(index).filter(|_| entries.len() <= COMPARED_ENTRIES_MAX) else {
        return;
    };
    let shadow = entries.iter().enumerate().find(|(other_index, (other, wider))| {
        // Of two equal entries, the later one is redundant.
        let same = || entry.is_unconditional() && wider.is_covered_by(matching);
        *other_index != index && other.is_unconditional() && matching.is_covered_by(wider) && (*other_index < index || !same())
    });
    if let Some((_, (other, _))) = shadow {
        let message = format!("`{}` adds nothing: `{}` covers it", abbreviate(&entry.pattern), abbreviate(&other.pattern));
        checker.report_warning(list.as_str(), index, message);
    }
}
