//! Where a store's history comes from: the adoptions of restored stores, and what a replica of an earlier history makes of one.
//!
//! ```text
//! history A  1 ─ 2 ─ 3 ─ 4 ─ 5        the replica stood at A.5; the backup was made at A.3
//!                     └─ 4 ─ 5 ─ …    history B, adopted from A.3: 4 is the adoption, 5 what the replica knew of A.4 and A.5
//! ```
//!
//! Pure; no engine, no clock. Look next at [`super::rules`], and at `sync/follower.rs`, which follows nothing that does not cover what
//! it knew.

use std::collections::HashMap;

use super::rules::{at_most, check_target, filled, plain};
use super::{Error, lapse};
use crate::model::limits::ID_BYTES_MAX;
use crate::model::records::{Merge, RevocationRow, Target};
use crate::model::revision::{HistoryId, Revision};

/// Rows that one commit may merge.
pub const MERGED_ROWS_MAX: usize = 4096;
/// Adoptions that a store tells, the newest.
pub const ADOPTIONS_TOLD_MAX: usize = 1000;

/// That a restored store was taken over: where one history ends in this store and the next begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adoption {
    /// The history that began; its first number is the one after `from`.
    pub history: HistoryId,
    /// The last revision of the history before it that the store holds.
    pub from: Revision,
    /// Hash of that revision's row of the change log.
    pub from_hash: [u8; 32],
    /// By the store's clock.
    pub unix_ms: i64,
}

/// Where a store stands and how it came there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// History and newest number.
    pub revision: Revision,
    /// Hash of the row with the number that was asked for; `None` where the log does not hold it.
    pub hash_at: Option<[u8; 32]>,
    /// The adoptions, oldest first.
    pub adoptions: Vec<Adoption>,
}

/// What a store is to a replica that followed another history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinship {
    /// It was not adopted from the history that was followed.
    Stranger,
    /// It was adopted from it, and the place that the replica stood at is a part of it: all that was known there is known here.
    Holds,
    /// It was adopted from it, and may lack what the replica knows.
    Lacks,
}

impl Lineage {
    /// What the store is to a replica that stood at a place, whose number is the one that was asked for.
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

/// How much a replica merged into the present history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Its incarnation.
    pub incarnation: String,
    /// Its name and where it listens.
    pub address: String,
    /// Rows that were made stronger by what it knew.
    pub rows: u64,
    /// When it merged last, by the store's clock.
    pub unix_ms: i64,
}

/// Whether a row says that something is revoked; one that was lifted does not.
pub fn revokes(row: &RevocationRow) -> bool {
    row.dead || row.suspended || row.watermark_unix_s.is_some()
}

/// Whether all that `known` revokes is revoked by `row`, as strongly and for as long.
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

/// What of `known` is not covered by `rows`.
pub fn lacking<'a>(known: &'a [RevocationRow], rows: &[RevocationRow]) -> Vec<&'a RevocationRow> {
    let held: HashMap<&Target, &RevocationRow> = rows.iter().map(|row| (&row.target, row)).collect();
    known.iter().filter(|row| !covers(held.get(&row.target).copied(), row)).collect()
}

/// The row of a target once what a replica knew is merged into it: the stronger of both in everything. The row as it was where it
/// covers that already.
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
    // What must stay for good does, whatever either said.
    let stays = lapse::lapses_at(&after, i64::MIN).is_none();
    RevocationRow { expires_at_unix_s: after.expires_at_unix_s.filter(|_| !stays), ..after }
}

/// Checks what can be said of a merge without the store's rows; answers how many bytes it brings.
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

/// Checks that a merge is of the history that the store has.
pub(super) fn check_history(merge: &Merge, store: &HistoryId) -> Result<(), Error> {
    if merge.history == *store {
        return Ok(());
    }
    Err(Error::Rejected(format!("the store is of history `{store}` and the merge of `{}`: look again", merge.history)))
}

#[cfg(test)]
mod tests;
