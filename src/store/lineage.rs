//! The lineage of a store: its adoptions after a restore, and the merge of revocations that replicas of an earlier history know.
//!
//! ```text
//! history A  1 ─ 2 ─ 3 ─ 4 ─ 5        the replica's position was A.5; the backup was made at A.3
//!                     └─ 4 ─ 5 ─ …    history B, adopted from A.3: B.4 is the adoption, B.5 merges what the replica knew of A.4 and A.5
//! ```
//!
//! Pure code: no engine and no clock. Look next at [`super::write_rules`], and at `sync/follower.rs`, which follows an adopted
//! store only if the store covers what the follower knew.

use std::collections::HashMap;

use super::request_checks::{check_at_most, check_no_nul, check_not_empty, check_target};
use super::{Error, expiry};
use crate::model::limits::ID_BYTES_MAX;
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{RevocationMerge, RevocationRow, RevocationTarget};

/// Rows that one commit may merge.
pub const MERGED_ROWS_MAX: usize = 4096;
/// Adoptions that a store lists: the newest.
pub const ADOPTIONS_LISTED_MAX: usize = 1000;

/// The adoption of a restored store: the point at which one history ends in this store and the next begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreAdoption {
    /// The new history. Its first number is the one after `from`.
    pub history: HistoryId,
    /// The last revision of the previous history that the store holds.
    pub from: Revision,
    /// Hash of that revision's row in the change log.
    pub from_hash: [u8; 32],
    /// Time of the adoption, by the store's clock.
    pub unix_ms: i64,
}

/// The newest revision of a store and the adoptions that led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreLineage {
    /// The history and the newest number.
    pub revision: Revision,
    /// Hash of the row with the requested number; `None` if the log does not hold that row.
    pub hash_at: Option<[u8; 32]>,
    /// The adoptions, oldest first.
    pub adoptions: Vec<StoreAdoption>,
}

/// How a store relates to a replica that followed another history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineageRelation {
    /// The store was not adopted from the history that the replica followed.
    Unrelated,
    /// The store was adopted from that history and contains the replica's position, so it holds everything that the replica knew
    /// there.
    Contains,
    /// The store was adopted from that history, but may lack what the replica knows.
    MayLack,
}

impl StoreLineage {
    /// Determines how the store relates to a replica whose last position is `last_position` and `hash`. The lineage must have
    /// been requested for the number of that position.
    pub fn relation_to(&self, last_position: &Revision, hash: &[u8; 32]) -> LineageRelation {
        let mut history = &self.revision.history;
        if *history == last_position.history {
            return LineageRelation::Unrelated;
        }
        for adoption in self.adoptions.iter().rev() {
            if adoption.history != *history {
                return LineageRelation::Unrelated;
            }
            history = &adoption.from.history;
            if *history == last_position.history {
                let held = last_position.number <= adoption.from.number && self.hash_at.as_ref() == Some(hash);
                return if held { LineageRelation::Contains } else { LineageRelation::MayLack };
            }
        }
        LineageRelation::Unrelated
    }
}

/// How many rows a replica merged into the present history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaMerge {
    /// Its incarnation.
    pub incarnation: String,
    /// Its name and listening address.
    pub address: String,
    /// Rows that became stronger by the merge.
    pub rows: u64,
    /// Time of its last merge, by the store's clock.
    pub unix_ms: i64,
}

/// Whether the row revokes anything. A row whose revocation was lifted revokes nothing.
pub fn is_in_force(row: &RevocationRow) -> bool {
    row.dead || row.suspended || row.watermark_unix_s.is_some()
}

/// Whether `row` revokes everything that `known` revokes, at least as strongly and for at least as long.
pub fn is_covered(row: Option<&RevocationRow>, known: &RevocationRow) -> bool {
    let Some(row) = row else { return !is_in_force(known) };
    let as_strong =
        (row.dead || !known.dead) && (row.suspended || !known.suspended) && row.watermark_unix_s >= known.watermark_unix_s;
    let as_long = match (row.expires_at_unix_s, known.expires_at_unix_s) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(row), Some(known)) => row >= known,
    };
    !is_in_force(known) || (as_strong && as_long)
}

/// The rows of `known` that `rows` does not cover.
pub fn uncovered_rows<'a>(known: &'a [RevocationRow], rows: &[RevocationRow]) -> Vec<&'a RevocationRow> {
    let held: HashMap<&RevocationTarget, &RevocationRow> = rows.iter().map(|row| (&row.target, row)).collect();
    known.iter().filter(|row| !is_covered(held.get(&row.target).copied(), row)).collect()
}

/// Merges the row that a replica knows into the current row: the result is the stronger of both in every field. Returns the
/// current row unchanged if it already covers the known row.
pub fn merge_rows(current: Option<RevocationRow>, known: &RevocationRow, number: u64) -> RevocationRow {
    let Some(before) = current else { return RevocationRow { revision: number, ..known.clone() } };
    if is_covered(Some(&before), known) {
        return before;
    }
    let after = RevocationRow {
        target: before.target,
        dead: before.dead || known.dead,
        suspended: before.suspended || known.suspended,
        watermark_unix_s: before.watermark_unix_s.max(known.watermark_unix_s),
        expires_at_unix_s: before.expires_at_unix_s.zip(known.expires_at_unix_s).map(|(ours, theirs)| ours.max(theirs)),
        reason: known.reason.clone(),
        revision: number,
    };
    // A row that must stay for good never expires, whatever either row said.
    let stays = expiry::expires_at(&after, i64::MIN).is_none();
    RevocationRow { expires_at_unix_s: after.expires_at_unix_s.filter(|_| !stays), ..after }
}

/// Checks the parts of a merge that need no stored row. Returns the size of the merge in bytes.
pub(super) fn check_merge(merge: &RevocationMerge) -> Result<usize, Error> {
    check_at_most("revocations merged by one commit", merge.rows.len(), MERGED_ROWS_MAX)?;
    check_not_empty("a replica's incarnation", &merge.incarnation)?;
    for (what, text) in [("a replica's incarnation", &merge.incarnation), ("a replica's address", &merge.address)] {
        check_no_nul(what, text)?;
        check_at_most(&format!("bytes in {what}"), text.len(), ID_BYTES_MAX)?;
    }
    let mut bytes = 0usize;
    for row in &merge.rows {
        let target = &row.target;
        let wrong = (row.dead && target.can_suspend())
            || (row.suspended && !target.can_suspend())
            || (row.watermark_unix_s.is_some() && !target.can_watermark() && *target != RevocationTarget::All);
        if wrong || !is_in_force(row) {
            return Err(Error::Rejected(format!("`{target}` cannot be revoked as a replica says it was: it is not merged")));
        }
        bytes = bytes.saturating_add(check_target(target, &row.reason)?);
    }
    Ok(bytes)
}

/// Checks that a merge is meant for the history of this store.
pub(super) fn check_merge_history(merge: &RevocationMerge, store: &HistoryId) -> Result<(), Error> {
    if merge.history == *store {
        return Ok(());
    }
    Err(Error::Rejected(format!("the store is of history `{store}` and the merge of `{}`: look again", merge.history)))
}

#[cfg(test)]
mod tests;
