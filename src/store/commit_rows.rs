//! Carries out the writes of a commit over the rows that they touch: the same for every store.
//!
//! A store lends its rows as [`CommitRows`], within the transaction of the commit. `store/write_rules.rs` defines what a write
//! does to a single row. This file must not know an engine or read a clock. Look next at the implementations in `sqlite/write.rs`
//! and `postgres/commit_rows.rs`.

use super::hash_chain::revocation_sha256;
use super::two_person::{self, TwoPersonStep};
use super::{Error, approval_rules, lineage, write_rules};
use crate::model::approval::ApprovalRow;
use crate::model::revision::{HistoryId, StateDigest};
use crate::model::rows::{
    DocumentKey, DocumentRow, PendingTwoPersonRow, RevocationMerge, RevocationRow, RevocationTarget, RowChange, StoreWrite,
};

/// Number and times of a commit.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommitMoment {
    /// The number of the revision that it makes.
    pub(super) number: u64,
    /// The store's clock.
    pub(super) unix_ms: i64,
    /// The store's clock with the accepted skew: what a watermark is set to.
    pub(super) watermark_unix_s: i64,
}

/// Totals that a commit updates together with the rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommitSums {
    /// The digest of the whole state.
    pub(super) digest: StateDigest,
    /// How many revocations there are.
    pub(super) revocations_total: u64,
}

/// The rows that a commit touches, as its store keeps them.
pub(super) trait CommitRows {
    /// The error of the store's engine.
    type Error: From<Error>;

    fn moment(&self) -> CommitMoment;
    fn sums_mut(&mut self) -> &mut CommitSums;
    /// Inserts or replaces a document, and updates the digest.
    fn put_document(&mut self, row: &DocumentRow) -> Result<RowChange, Self::Error>;
    /// Removes a document, and updates the digest.
    fn remove_document(&mut self, key: &DocumentKey) -> Result<RowChange, Self::Error>;
    fn revocation(&self, target: &RevocationTarget) -> Result<Option<RevocationRow>, Self::Error>;
    fn put_revocation(&mut self, row: &RevocationRow) -> Result<(), Self::Error>;
    /// The pending first half of a two-person act, unless the key that signed it is revoked.
    fn pending(&self, act: &str) -> Result<Option<PendingTwoPersonRow>, Self::Error>;
    fn put_pending(&mut self, act: &str, row: PendingTwoPersonRow) -> Result<(), Self::Error>;
    fn remove_pending(&mut self, act: &str) -> Result<(), Self::Error>;
    fn approval(&self, digest: &str) -> Result<Option<ApprovalRow>, Self::Error>;
    fn put_approval(&mut self, row: ApprovalRow) -> Result<(), Self::Error>;
}

/// Applies one write; `None` if it changes nothing that followers hold. Prunes, adoptions and merges are handled elsewhere.
pub(super) fn apply_write<R: CommitRows>(rows: &mut R, write: &StoreWrite) -> Result<Option<RowChange>, R::Error> {
    let CommitMoment { number, unix_ms, watermark_unix_s } = rows.moment();
    match write {
        StoreWrite::PutDocument(row) => rows.put_document(row).map(Some),
        StoreWrite::RemoveDocument(key) => rows.remove_document(key).map(Some),
        StoreWrite::Revoke { target, kind, reason } => {
            cancel_pending(rows, target)?;
            let change = |row| write_rules::revoke_row(row, target, *kind, reason, number, watermark_unix_s);
            set_revocation(rows, target, change).map(Some)
        }
        StoreWrite::Reinstate { target, reason } => {
            cancel_pending(rows, target)?;
            reinstate(rows, target, reason).map(Some)
        }
        StoreWrite::ReinstateByTwo { target, reason, operator, key, administrators } => {
            reinstate_by_two(rows, target, reason, (operator, key), administrators)
        }
        StoreWrite::Prune { .. } | StoreWrite::Adopt { .. } | StoreWrite::Merge(_) => Ok(None),
        StoreWrite::Approve { digest, operator, key, groups } => {
            let row = rows.approval(digest)?;
            rows.put_approval(approval_rules::approve_row(row, digest, (operator, key), groups, unix_ms)?).map(|()| None)
        }
        StoreWrite::Refuse { digest, operator, groups } => {
            let row = rows.approval(digest)?;
            rows.put_approval(approval_rules::refuse_row(row, digest, operator, groups, unix_ms)?).map(|()| None)
        }
    }
}

/// Makes every root void that was issued until now.
pub(super) fn void_roots<R: CommitRows>(rows: &mut R, reason: &str) -> Result<RowChange, R::Error> {
    cancel_pending(rows, &RevocationTarget::All)?;
    let CommitMoment { number, watermark_unix_s, .. } = rows.moment();
    set_revocation(rows, &RevocationTarget::All, |row| Ok(write_rules::void_roots_row(row, reason, number, watermark_unix_s)))
}

/// Makes every row as strong as a replica knows it to be.
pub(super) fn merge<R: CommitRows>(
    rows: &mut R,
    merge: &RevocationMerge,
    history: &HistoryId,
) -> Result<Vec<RowChange>, R::Error> {
    lineage::check_merge_history(merge, history)?;
    let number = rows.moment().number;
    let mut changes = Vec::new();
    for known in &merge.rows {
        if !lineage::is_covered(rows.revocation(&known.target)?.as_ref(), known) {
            changes.push(set_revocation(rows, &known.target, |row| Ok(lineage::merge_rows(row, known, number)))?);
        }
    }
    Ok(changes)
}

fn reinstate<R: CommitRows>(rows: &mut R, target: &RevocationTarget, reason: &str) -> Result<RowChange, R::Error> {
    let CommitMoment { number, watermark_unix_s, .. } = rows.moment();
    set_revocation(rows, target, |row| write_rules::reinstate_row(row, target, reason, number, watermark_unix_s))
}

/// Waits for a second operator, or is the second.
fn reinstate_by_two<R: CommitRows>(
    rows: &mut R,
    target: &RevocationTarget,
    reason: &str,
    signer: (&str, &str),
    administrators: &[String],
) -> Result<Option<RowChange>, R::Error> {
    let act = two_person::pending_act_key(target)?;
    let CommitMoment { number, unix_ms, watermark_unix_s } = rows.moment();
    match two_person::next_step(rows.pending(&act)?.as_ref(), signer, administrators, unix_ms)? {
        TwoPersonStep::Proceed => {
            cancel_pending(rows, target)?;
            reinstate(rows, target, reason).map(Some)
        }
        TwoPersonStep::AwaitSecond(row) => {
            // What could not be lifted now is not waited for.
            write_rules::reinstate_row(rows.revocation(target)?, target, reason, number, watermark_unix_s)?;
            rows.put_pending(&act, row)?;
            Ok(None)
        }
    }
}

/// Whoever revokes or reinstates a target decides anew: what waited for a second operator before waits no more.
fn cancel_pending<R: CommitRows>(rows: &mut R, target: &RevocationTarget) -> Result<(), R::Error> {
    if target.can_suspend() { rows.remove_pending(&two_person::pending_act_key(target)?) } else { Ok(()) }
}

fn set_revocation<R: CommitRows>(
    rows: &mut R,
    target: &RevocationTarget,
    change: impl FnOnce(Option<RevocationRow>) -> Result<RevocationRow, Error>,
) -> Result<RowChange, R::Error> {
    let before = rows.revocation(target)?;
    let after = change(before.clone())?;
    let sums = rows.sums_mut();
    match &before {
        Some(before) => sums.digest.remove(&revocation_sha256(before)),
        None => sums.revocations_total = sums.revocations_total.saturating_add(1),
    }
    sums.digest.add(&revocation_sha256(&after));
    if before.as_ref() != Some(&after) {
        rows.put_revocation(&after)?;
    }
    Ok(RowChange::Revocation(after))
}
