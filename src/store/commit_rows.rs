//! Carries out the writes of a commit over the rows that they touch: the same for every store.
//!
//! A store gives its rows as a [`CommitRows`], within the transaction of the commit. What a write does to a single row is said by
//! `store/rules.rs`. Must not know an engine or read a clock. Look next at `sqlite/write.rs` and `postgres/apply.rs`, whose rows they are.

use super::chain::revocation_sha256;
use super::second::{self, Half};
use super::{Error, approvals, lineage, rules};
use crate::model::approval::ApprovalRow;
use crate::model::records::{Change, DocumentKey, DocumentRow, Merge, PendingRow, RevocationRow, Target, Write};
use crate::model::revision::{HistoryId, StateDigest};

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

/// What is kept up with the rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommitSums {
    /// The digest of the whole state.
    pub(super) digest: StateDigest,
    /// How many revocations there are.
    pub(super) revocations_total: u64,
}

/// The rows that a commit touches, as its store keeps them.
pub(super) trait CommitRows {
    /// What the engine may say.
    type Error: From<Error>;

    fn moment(&self) -> CommitMoment;
    fn sums(&mut self) -> &mut CommitSums;
    /// Puts a document in place of the one of its key, and keeps the digest up.
    fn put_document(&mut self, row: &DocumentRow) -> Result<Change, Self::Error>;
    /// Takes a document away, and keeps the digest up.
    fn remove_document(&mut self, key: &DocumentKey) -> Result<Change, Self::Error>;
    fn revocation(&self, target: &Target) -> Result<Option<RevocationRow>, Self::Error>;
    fn put_revocation(&mut self, row: &RevocationRow) -> Result<(), Self::Error>;
    /// The first half of an act for two operators, unless the key that signed it is revoked.
    fn pending(&self, act: &str) -> Result<Option<PendingRow>, Self::Error>;
    fn put_pending(&mut self, act: &str, row: PendingRow) -> Result<(), Self::Error>;
    fn remove_pending(&mut self, act: &str) -> Result<(), Self::Error>;
    fn approval(&self, digest: &str) -> Result<Option<ApprovalRow>, Self::Error>;
    fn put_approval(&mut self, row: ApprovalRow) -> Result<(), Self::Error>;
}

/// Makes one write; `None` where it changes nothing that followers hold. A prune, an adoption and a merge are not made here.
pub(super) fn apply_write<R: CommitRows>(rows: &mut R, write: &Write) -> Result<Option<Change>, R::Error> {
    let CommitMoment { number, unix_ms, watermark_unix_s } = rows.moment();
    match write {
        Write::PutDocument(row) => rows.put_document(row).map(Some),
        Write::RemoveDocument(key) => rows.remove_document(key).map(Some),
        Write::Revoke { target, meaning, reason } => {
            forget_pending(rows, target)?;
            let change = |row| rules::revoke(row, target, *meaning, reason, number, watermark_unix_s);
            set_revocation(rows, target, change).map(Some)
        }
        Write::Reinstate { target, reason } => {
            forget_pending(rows, target)?;
            reinstate(rows, target, reason).map(Some)
        }
        Write::ReinstateByTwo { target, reason, operator, key, administrators } => {
            reinstate_by_two(rows, target, reason, (operator, key), administrators)
        }
        Write::Prune { .. } | Write::Adopt { .. } | Write::Merge(_) => Ok(None),
        Write::Approve { digest, operator, key, groups } => {
            let row = rows.approval(digest)?;
            rows.put_approval(approvals::approve(row, digest, (operator, key), groups, unix_ms)?).map(|()| None)
        }
        Write::Refuse { digest, operator, groups } => {
            let row = rows.approval(digest)?;
            rows.put_approval(approvals::refuse(row, digest, operator, groups, unix_ms)?).map(|()| None)
        }
    }
}

/// Makes every root void that was issued until now.
pub(super) fn void_roots<R: CommitRows>(rows: &mut R, reason: &str) -> Result<Change, R::Error> {
    forget_pending(rows, &Target::All)?;
    let CommitMoment { number, watermark_unix_s, .. } = rows.moment();
    set_revocation(rows, &Target::All, |row| Ok(rules::void_roots(row, reason, number, watermark_unix_s)))
}

/// Makes every row as strong as a replica knows it to be.
pub(super) fn merge<R: CommitRows>(rows: &mut R, merge: &Merge, history: &HistoryId) -> Result<Vec<Change>, R::Error> {
    lineage::check_history(merge, history)?;
    let number = rows.moment().number;
    let mut changes = Vec::new();
    for known in &merge.rows {
        if !lineage::covers(rows.revocation(&known.target)?.as_ref(), known) {
            changes.push(set_revocation(rows, &known.target, |row| Ok(lineage::merge(row, known, number)))?);
        }
    }
    Ok(changes)
}

fn reinstate<R: CommitRows>(rows: &mut R, target: &Target, reason: &str) -> Result<Change, R::Error> {
    let CommitMoment { number, watermark_unix_s, .. } = rows.moment();
    set_revocation(rows, target, |row| rules::reinstate(row, target, reason, number, watermark_unix_s))
}

/// Waits for a second operator, or is the second.
fn reinstate_by_two<R: CommitRows>(
    rows: &mut R,
    target: &Target,
    reason: &str,
    signer: (&str, &str),
    administrators: &[String],
) -> Result<Option<Change>, R::Error> {
    let act = second::name(target)?;
    let CommitMoment { number, unix_ms, watermark_unix_s } = rows.moment();
    match second::half(rows.pending(&act)?.as_ref(), signer, administrators, unix_ms)? {
        Half::Second => {
            forget_pending(rows, target)?;
            reinstate(rows, target, reason).map(Some)
        }
        Half::First(row) => {
            // What could not be lifted now is not waited for.
            rules::reinstate(rows.revocation(target)?, target, reason, number, watermark_unix_s)?;
            rows.put_pending(&act, row)?;
            Ok(None)
        }
    }
}

/// Whoever revokes or reinstates a target decides anew: what waited for a second operator before waits no more.
fn forget_pending<R: CommitRows>(rows: &mut R, target: &Target) -> Result<(), R::Error> {
    if target.can_suspend() { rows.remove_pending(&second::name(target)?) } else { Ok(()) }
}

fn set_revocation<R: CommitRows>(
    rows: &mut R,
    target: &Target,
    change: impl FnOnce(Option<RevocationRow>) -> Result<RevocationRow, Error>,
) -> Result<Change, R::Error> {
    let before = rows.revocation(target)?;
    let after = change(before.clone())?;
    let sums = rows.sums();
    match &before {
        Some(before) => sums.digest.remove(&revocation_sha256(before)),
        None => sums.revocations_total = sums.revocations_total.saturating_add(1),
    }
    sums.digest.add(&revocation_sha256(&after));
    if before.as_ref() != Some(&after) {
        rows.put_revocation(&after)?;
    }
    Ok(Change::Revocation(after))
}
