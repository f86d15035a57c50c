//! The lineage of a store: its adoptions after a restore, and the merge of revocations that replicas of an earlier history know.
//!
//! ```text
//! history A  1 ─ 2 ─ 3 ─ 4 ─ 5        the replica's position was A.5; the backup was made at A.3
//!                     └─ 4 ─ 5 ─ …    history B, adopted from A.3: B.4 is the adoption, B.5 merges what the replica knew of A.4 and A.5
//! ```
//!
//! Pure code: no engine and no clock. Look next at [`super::rules`], and at `sync/follower.rs`, which follows an adopted store
//! only if the store covers what the follower knew.

use std::collections::HashMap;

use super::request_checks::{at_most, check_target, filled, plain};
use super::{Error, lapse};
use crate::model::limits::ID_BYTES_MAX;
use crate::model::records::{Merge, RevocationRow, Target};
use crate::model::revision::{HistoryId, Revision};

/// Rows that one commit may merge.
pub const MERGED_ROWS_MAX: usize = 4096;
/// Adoptions that a store lists: the newest.
pub const ADOPTIONS_TOLD_MAX: usize = 1000;

/// The adoption of a restored store: the point at which one history ends in this store and the next begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adoption {
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
pub struct Lineage {
    /// The history and the newest number.
    pub revision: Revision,
    /// Hash of the row with the requested number; `None` if the log does not hold that row.
    pub hash_at: Option<[u8; 32]>,
    /// The adoptions, oldest first.
    pub adoptions: Vec<Adoption>,
}

/// How a store relates to a replica that followed another history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinship {
    /// The store was not adopted from the history that the replica followed.
    Stranger,
    /// The store was adopted from that history and contains the replica's position, so it holds everything that the replica knew
    /// there.
    Holds,
    /// The store was adopted from that history, but may lack what the replica knows.
    Lacks,
}

impl Lineage {
    /// Determines how the store relates to a replica whose position is `stood` and `hash`. The lineage must have been requested
    /// for the number of that position.
    pub fn kinship(&self, stood: &Revision, hash: &[u8; 32]) -> Kinship {
        let mut history = &self.revision.history;
        if *history == stood.history {
            return Kinship::Stranger;
        }
        for adoption in self.adoptions.iter().rev() {
            if adoption.history != *history {
                return Kinship::Stranger;
            }
            history = &adoption.from.history;
            if *history == stood.history {
                let held = stood.number <= adoption.from.number && self.hash_at.as_ref() == Some(hash);
                return if held { Kinship::Holds } else { Kinship::Lacks };
            }
        }
        Kinship::Stranger
    }
}

/// How many rows a replica merged into the present history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
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
pub fn revokes(row: &RevocationRow) -> bool {
    row.dead || row.suspended || row.watermark_unix_s.is_some()
}

/// Whether `row` revokes everything that `known` revokes, at least as strongly and for at least as long.
pub fn covers(row: Option<&RevocationRow>, known: &RevocationRow) -> bool {
    let Some(row) = row else { return !revokes(known) };
    let as_strong =
        (row.dead || !known.dead) && (row.suspended || !known.suspended) && row.watermark_unix_s >= known.watermark_unix_s;
    let as_long = match (row.expires_at_unix_s, known.expires_at_unix_s) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(row), Some(known)) => row >= known,
    };
    !revokes(known) || (as_strong && as_long)
}

/// The rows of `known` that `rows` does not cover.
pub fn lacking<'a>(known: &'a [RevocationRow], rows: &[RevocationRow]) -> Vec<&'a RevocationRow> {
    let held: HashMap<&Target, &RevocationRow> = rows.iter().map(|row| (&row.target, row)).collect();
    known.iter().filter(|row| !covers(held.get(&row.target).copied(), row)).collect()
}

/// Merges the row that a replica knows into the current row: the result is the stronger of both in every field. Returns the
/// current row unchanged if it already covers the known row.
pub fn merge(current: Option<RevocationRow>, known: &RevocationRow, number: u64) -> RevocationRow {
    let Some(before) = current else { return RevocationRow { revision: number, ..known.clone() } };
    if covers(Some(&before), known) {
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
    let stays = lapse::lapses_at(&after, i64::MIN).is_none();
    RevocationRow { expires_at_unix_s: after.expires_at_unix_s.filter(|_| !stays), ..after }
}

/// Checks the parts of a merge that need no stored row. Returns the size of the merge in bytes.
pub(super) fn check(merge: &Merge) -> Result<usize, Error> {
    at_most("revocations merged by one commit", merge.rows.len(), MERGED_ROWS_MAX)?;
    filled("a replica's incarnation", &merge.incarnation)?;
    for (what, text) in [("a replica's incarnation", &merge.incarnation), ("a replica's address", &merge.address)] {
        plain(what, text)?;
        at_most(&format!("bytes in {what}"), text.len(), ID_BYTES_MAX)?;
    }
    let mut bytes = 0usize;
    for row in &merge.rows {
        let target = &row.target;
        let wrong = (row.dead && target.can_suspend())
            || (row.suspended && !target.can_suspend())
            || (row.watermark_unix_s.is_some() && !target.can_watermark() && *target != Target::All);
        if wrong || !revokes(row) {
            return Err(Error::Rejected(format!("`{target}` cannot be revoked as a replica says it was: it is not merged")));
        }
        bytes = bytes.saturating_add(check_target(target, &row.reason)?);
    }
    Ok(bytes)
}

/// Checks that a merge is meant for the history of this store.
pub(super) fn check_history(merge: &Merge, store: &HistoryId) -> Result<(), Error> {
    if merge.history == *store {
        return Ok(());
    }
    Err(Error::Rejected(format!("the store is of history `{store}` and the merge of `{}`: look again", merge.history)))
}

#[cfg(test)]
mod tests;
