//! Computes how a request changes its rows. This is pure code between the read and the write-back of the rows, so that a commit
//! takes a handful of statements however many writes it holds.
//!
//! The writes of one commit are applied in order, each to the result of the one before. Look next at [`crate::store::rules`].

use std::collections::{BTreeMap, BTreeSet};

use super::read::Head;
use crate::model::approval::ApprovalRow;
use crate::model::records::{Change, DocumentKey, DocumentRow, Merge, PendingRow, RevocationRow, Target, Write};
use crate::model::revision::{HistoryId, StateDigest};
use crate::store::chain::{document_sha256, revocation_sha256};
use crate::store::second::{self, Half};
use crate::store::{CommitRequest, Error, StoredDocument, approvals, lapse, lineage, rules, signers};

/// The rows that a request touches, with the digest and the counts that depend on them.
pub(super) struct Rows {
    number: u64,
    unix_ms: i64,
    watermark_unix_s: i64,
    pub(super) digest: StateDigest,
    pub(super) revocations_total: u64,
    documents: BTreeMap<DocumentKey, Option<StoredDocument>>,
    revocations: BTreeMap<Target, Option<RevocationRow>>,
    touched_documents: BTreeSet<DocumentKey>,
    touched_revocations: BTreeSet<Target>,
    pending: BTreeMap<String, PendingRow>,
    touched_pending: BTreeSet<String>,
    approvals: BTreeMap<String, ApprovalRow>,
    touched_approvals: BTreeSet<String>,
}

/// The existing rows that a request touches, as they were read.
#[derive(Default)]
pub(super) struct Found {
    pub(super) documents: Vec<StoredDocument>,
    pub(super) revocations: Vec<RevocationRow>,
    pub(super) approvals: BTreeMap<String, ApprovalRow>,
    /// Acts that wait for a second operator, by the key of the act.
    pub(super) pending: BTreeMap<String, PendingRow>,
}

impl Rows {
    /// Starts from the rows at a head, for the revision after that head.
    pub(super) fn new(head: &Head, number: u64, unix_ms: i64, found: Found) -> Self {
        Self {
            number,
            unix_ms,
            watermark_unix_s: unix_ms.div_euclid(1_000).saturating_add(head.settings.iat_skew_s),
            digest: head.digest,
            revocations_total: head.revocations,
            documents: found.documents.into_iter().map(|one| (one.row.key.clone(), Some(one))).collect(),
            revocations: found.revocations.into_iter().map(|row| (row.target.clone(), Some(row))).collect(),
            touched_documents: BTreeSet::new(),
            touched_revocations: BTreeSet::new(),
            pending: found.pending,
            touched_pending: BTreeSet::new(),
            approvals: found.approvals,
            touched_approvals: BTreeSet::new(),
        }
    }

    /// Checks, before any write, the expectations of the request and the keys that signed it.
    pub(super) fn check(&self, request: &CommitRequest, head: &Head) -> Result<(), Error> {
        // INVARIANT: checked under the lock on the head, so that a caller who has not yet heard of a revocation learns of it
        // here.
        signers::check_signed(request, |key| self.is_revoked(key))?;
        for (key, expected) in &request.expected {
            if self.document(key).map(|document| document.revision) != *expected {
                return Err(Error::Conflict { kind: key.kind.clone(), id: key.id.clone() });
            }
        }
        if request.documents_unchanged_since.is_some_and(|since| head.documents_number > since) {
            return Err(Error::DocumentsChanged { revision: head.documents_number });
        }
        Ok(())
    }

    /// Checks, after all writes, that a key which can sign remains.
    pub(super) fn check_left(&self, request: &CommitRequest) -> Result<(), Error> {
        signers::check_left(request, |key| self.is_revoked(key))
    }

    fn is_revoked(&self, key: &str) -> bool {
        signers::is_revoked(self.revocations.get(&signers::target(key)).and_then(Option::as_ref))
    }

    /// Applies one write. Returns `None` if it changes nothing that followers hold.
    pub(super) fn write(&mut self, write: &Write) -> Result<Option<Change>, Error> {
        let unix_ms = self.unix_ms;
        match write {
            Write::PutDocument(row) => Ok(Some(self.put_document(row))),
            Write::RemoveDocument(key) => self.remove_document(key).map(Some),
            Write::Revoke { target, meaning, reason } => {
                self.forget_pending(target)?;
                let (number, watermark) = (self.number, self.watermark_unix_s);
                self.set_revocation(target, |row| rules::revoke(row, target, *meaning, reason, number, watermark)).map(Some)
            }
            Write::Reinstate { target, reason } => {
                self.forget_pending(target)?;
                self.reinstate(target, reason).map(Some)
            }
            Write::ReinstateByTwo { target, reason, operator, key, administrators } => {
                self.reinstate_by_two(target, reason, (operator, key), administrators)
            }
            Write::Prune { .. } | Write::Adopt { .. } | Write::Merge(_) => Ok(None),
            Write::Approve { digest, operator, key, groups } => {
                self.answer(digest, |row| approvals::approve(row, digest, (operator, key), groups, unix_ms)).map(|()| None)
            }
            Write::Refuse { digest, operator, groups } => {
                self.answer(digest, |row| approvals::refuse(row, digest, operator, groups, unix_ms)).map(|()| None)
            }
        }
    }

    /// Deletes all expired rows among those that were read, except the rows that must stay.
    pub(super) fn prune(&mut self, before_unix_s: i64) -> Result<Vec<Change>, Error> {
        let mut removed = Vec::new();
        for (target, row) in &mut self.revocations {
            let Some(before) = row.take_if(|row| lapse::has_lapsed(row, before_unix_s)) else { continue };
            self.digest.remove(&revocation_sha256(&before));
            self.revocations_total = self.revocations_total.saturating_sub(1);
            self.touched_revocations.insert(target.clone());
            removed.push(Change::RevocationRemoved(target.clone()));
        }
        if removed.is_empty() { Err(lapse::nothing()) } else { Ok(removed) }
    }

    /// Voids every root that was issued until now.
    pub(super) fn void_roots(&mut self, reason: &str) -> Result<Change, Error> {
        self.forget_pending(&Target::All)?;
        let (number, watermark) = (self.number, self.watermark_unix_s);
        self.set_revocation(&Target::All, |row| Ok(rules::void_roots(row, reason, number, watermark)))
    }

    /// Makes every row as strong as a replica knows it to be.
    pub(super) fn merge(&mut self, merge: &Merge, history: &HistoryId) -> Result<Vec<Change>, Error> {
        lineage::check_history(merge, history)?;
        let mut changes = Vec::new();
        for known in &merge.rows {
            let current = self.revocations.get(&known.target).and_then(Option::as_ref);
            if !lineage::covers(current, known) {
                let number = self.number;
                changes.push(self.set_revocation(&known.target, |row| Ok(lineage::merge(row, known, number)))?);
            }
        }
        Ok(changes)
    }

    /// The documents to write, and the keys of those to delete.
    pub(super) fn documents_to_store(&self) -> (Vec<&StoredDocument>, Vec<&DocumentKey>) {
        let (mut put, mut remove) = (Vec::new(), Vec::new());
        for key in &self.touched_documents {
            match self.document(key) {
                Some(document) => put.push(document),
                None => remove.push(key),
            }
        }
        (put, remove)
    }

    /// The revocations to write.
    pub(super) fn revocations_to_store(&self) -> Vec<&RevocationRow> {
        self.touched_revocations.iter().filter_map(|target| self.revocations.get(target)?.as_ref()).collect()
    }

    /// The revocations to delete.
    pub(super) fn revocations_to_remove(&self) -> Vec<&Target> {
        self.touched_revocations.iter().filter(|target| self.revocations.get(*target).is_some_and(Option::is_none)).collect()
    }

    /// The pending acts that changed, by the key of the act; `None` for those to delete.
    pub(super) fn pending_to_store(&self) -> impl Iterator<Item = (&str, Option<&PendingRow>)> {
        self.touched_pending.iter().map(|act| (act.as_str(), self.pending.get(act)))
    }

    /// The approvals to write.
    pub(super) fn approvals_to_store(&self) -> Vec<&ApprovalRow> {
        self.touched_approvals.iter().filter_map(|digest| self.approvals.get(digest)).collect()
    }

    fn reinstate(&mut self, target: &Target, reason: &str) -> Result<Change, Error> {
        let (number, watermark) = (self.number, self.watermark_unix_s);
        self.set_revocation(target, |row| rules::reinstate(row, target, reason, number, watermark))
    }

    /// Stores the act for a second operator, or carries it out if this is the second.
    fn reinstate_by_two(
        &mut self,
        target: &Target,
        reason: &str,
        signer: (&str, &str),
        administrators: &[String],
    ) -> Result<Option<Change>, Error> {
        let act = second::name(target)?;
        let pending = self.pending.get(&act).filter(|row| !self.is_revoked(&row.key));
        match second::half(pending, signer, administrators, self.unix_ms)? {
            Half::Second => {
                self.forget_pending(target)?;
                self.reinstate(target, reason).map(Some)
            }
            Half::First(row) => {
                // An act that could not be carried out now does not wait for a second operator.
                let current = self.revocations.get(target).cloned().flatten();
                rules::reinstate(current, target, reason, self.number, self.watermark_unix_s)?;
                self.pending.insert(act.clone(), row);
                self.touched_pending.insert(act);
                Ok(None)
            }
        }
    }

    /// Removes what waits for a second operator, because a new revocation or reinstatement of the target replaces it.
    fn forget_pending(&mut self, target: &Target) -> Result<(), Error> {
        if target.can_suspend() {
            let act = second::name(target)?;
            if self.pending.remove(&act).is_some() {
                self.touched_pending.insert(act);
            }
        }
        Ok(())
    }

    /// Applies an operator's answer to a row.
    fn answer(
        &mut self,
        digest: &str,
        change: impl FnOnce(Option<ApprovalRow>) -> Result<ApprovalRow, Error>,
    ) -> Result<(), Error> {
        let row = change(self.approvals.get(digest).cloned())?;
        self.approvals.insert(digest.to_owned(), row);
        self.touched_approvals.insert(digest.to_owned());
        Ok(())
    }

    fn document(&self, key: &DocumentKey) -> Option<&StoredDocument> {
        self.documents.get(key)?.as_ref()
    }

    fn put_document(&mut self, row: &DocumentRow) -> Change {
        if let Some(before) = self.document(&row.key) {
            let sha256 = document_sha256(&before.row, before.revision);
            self.digest.remove(&sha256);
        }
        self.digest.add(&document_sha256(row, self.number));
        self.documents.insert(row.key.clone(), Some(StoredDocument { row: row.clone(), revision: self.number }));
        self.touched_documents.insert(row.key.clone());
        Change::Document(row.clone())
    }

    fn remove_document(&mut self, key: &DocumentKey) -> Result<Change, Error> {
        let Some(before) = self.documents.insert(key.clone(), None).flatten() else {
            return Err(Error::Rejected(format!("there is no document `{} {}` to remove", key.kind, key.id)));
        };
        self.digest.remove(&document_sha256(&before.row, before.revision));
        self.touched_documents.insert(key.clone());
        Ok(Change::DocumentRemoved(key.clone()))
    }

    fn set_revocation(
        &mut self,
        target: &Target,
        change: impl FnOnce(Option<RevocationRow>) -> Result<RevocationRow, Error>,
    ) -> Result<Change, Error> {
        let before = self.revocations.get(target).cloned().flatten();
        let after = change(before.clone())?;
        match &before {
            Some(before) => self.digest.remove(&revocation_sha256(before)),
            None => self.revocations_total = self.revocations_total.saturating_add(1),
        }
        self.digest.add(&revocation_sha256(&after));
        if before.as_ref() != Some(&after) {
            self.revocations.insert(target.clone(), Some(after.clone()));
            self.touched_revocations.insert(target.clone());
        }
        Ok(Change::Revocation(after))
    }
}
