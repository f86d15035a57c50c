//! Computes what the writes of a commit change, between reading its rows and writing them back. It runs no statement itself, so that a
//! commit takes a handful of statements however many writes it holds.
//!
//! Writes of one commit are made in order, and each sees the result of the one before. Look next at `store/commit_rows.rs`.

use std::collections::{BTreeMap, BTreeSet};

use super::read::PostgresHead;
use crate::model::approval::ApprovalRow;
use crate::model::rows::{DocumentKey, DocumentRow, PendingTwoPersonRow, RevocationRow, RevocationTarget, RowChange};
use crate::store::commit_rows::{CommitMoment, CommitRows, CommitSums};
use crate::store::hash_chain::{document_sha256, revocation_sha256};
use crate::store::{CommitRequest, Error, StoredDocument, expiry, signers};

/// The rows that a request touches, with the digest and the counts that depend on them.
pub(super) struct CommitRowSet {
    moment: CommitMoment,
    pub(super) sums: CommitSums,
    documents: BTreeMap<DocumentKey, Option<StoredDocument>>,
    revocations: BTreeMap<RevocationTarget, Option<RevocationRow>>,
    touched_documents: BTreeSet<DocumentKey>,
    touched_revocations: BTreeSet<RevocationTarget>,
    pending: BTreeMap<String, PendingTwoPersonRow>,
    touched_pending: BTreeSet<String>,
    approvals: BTreeMap<String, ApprovalRow>,
    touched_approvals: BTreeSet<String>,
}

/// The existing rows that a request touches, as they were read.
#[derive(Default)]
pub(super) struct TouchedRows {
    pub(super) documents: Vec<StoredDocument>,
    pub(super) revocations: Vec<RevocationRow>,
    pub(super) approvals: BTreeMap<String, ApprovalRow>,
    /// Acts that wait for a second operator, by the key of the act.
    pub(super) pending: BTreeMap<String, PendingTwoPersonRow>,
}

impl CommitRowSet {
    /// Starts from the rows at a head, for the revision after that head.
    pub(super) fn new(head: &PostgresHead, number: u64, unix_ms: i64, found: TouchedRows) -> Self {
        let watermark_unix_s = unix_ms.div_euclid(1_000).saturating_add(head.settings.iat_skew_s);
        Self {
            moment: CommitMoment { number, unix_ms, watermark_unix_s },
            sums: CommitSums { digest: head.digest, revocations_total: head.revocations },
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
    pub(super) fn check_expectations(&self, request: &CommitRequest, head: &PostgresHead) -> Result<(), Error> {
        // INVARIANT: checked under the lock on the head, so that a caller who has not yet heard of a revocation learns of it
        // here.
        signers::check_signers(request, |key| self.is_key_revoked(key))?;
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
    pub(super) fn check_signer_left(&self, request: &CommitRequest) -> Result<(), Error> {
        signers::check_signer_left(request, |key| self.is_key_revoked(key))
    }

    fn is_key_revoked(&self, key: &str) -> bool {
        signers::is_key_revoked(self.revocations.get(&signers::key_target(key)).and_then(Option::as_ref))
    }

    /// Deletes all expired rows among those that were read, except the rows that must stay.
    pub(super) fn prune(&mut self, before_unix_s: i64) -> Result<Vec<RowChange>, Error> {
        let mut removed = Vec::new();
        for (target, row) in &mut self.revocations {
            let Some(before) = row.take_if(|row| expiry::has_expired(row, before_unix_s)) else { continue };
            self.sums.digest.remove(&revocation_sha256(&before));
            self.sums.revocations_total = self.sums.revocations_total.saturating_sub(1);
            self.touched_revocations.insert(target.clone());
            removed.push(RowChange::RevocationRemoved(target.clone()));
        }
        if removed.is_empty() { Err(expiry::nothing_expired_error()) } else { Ok(removed) }
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
    pub(super) fn revocations_to_remove(&self) -> Vec<&RevocationTarget> {
        self.touched_revocations.iter().filter(|target| self.revocations.get(*target).is_some_and(Option::is_none)).collect()
    }

    /// The pending acts that changed, by the key of the act; `None` for those to delete.
    pub(super) fn pending_to_store(&self) -> impl Iterator<Item = (&str, Option<&PendingTwoPersonRow>)> {
        self.touched_pending.iter().map(|act| (act.as_str(), self.pending.get(act)))
    }

    /// The approvals to write.
    pub(super) fn approvals_to_store(&self) -> Vec<&ApprovalRow> {
        self.touched_approvals.iter().filter_map(|digest| self.approvals.get(digest)).collect()
    }

    fn document(&self, key: &DocumentKey) -> Option<&StoredDocument> {
        self.documents.get(key)?.as_ref()
    }
}

impl CommitRows for CommitRowSet {
    type Error = Error;

    fn moment(&self) -> CommitMoment {
        self.moment
    }

    fn sums_mut(&mut self) -> &mut CommitSums {
        &mut self.sums
    }

    fn put_document(&mut self, row: &DocumentRow) -> Result<RowChange, Error> {
        let number = self.moment.number;
        if let Some(before) = self.document(&row.key) {
            let sha256 = document_sha256(&before.row, before.revision);
            self.sums.digest.remove(&sha256);
        }
        self.sums.digest.add(&document_sha256(row, number));
        self.documents.insert(row.key.clone(), Some(StoredDocument { row: row.clone(), revision: number }));
        self.touched_documents.insert(row.key.clone());
        Ok(RowChange::Document(row.clone()))
    }

    fn remove_document(&mut self, key: &DocumentKey) -> Result<RowChange, Error> {
        let Some(before) = self.documents.insert(key.clone(), None).flatten() else {
            return Err(Error::Rejected(format!("there is no document `{} {}` to remove", key.kind, key.id)));
        };
        self.sums.digest.remove(&document_sha256(&before.row, before.revision));
        self.touched_documents.insert(key.clone());
        Ok(RowChange::DocumentRemoved(key.clone()))
    }

    fn revocation(&self, target: &RevocationTarget) -> Result<Option<RevocationRow>, Error> {
        Ok(self.revocations.get(target).cloned().flatten())
    }

    fn put_revocation(&mut self, row: &RevocationRow) -> Result<(), Error> {
        self.revocations.insert(row.target.clone(), Some(row.clone()));
        self.touched_revocations.insert(row.target.clone());
        Ok(())
    }

    fn pending(&self, act: &str) -> Result<Option<PendingTwoPersonRow>, Error> {
        Ok(self.pending.get(act).filter(|row| !self.is_key_revoked(&row.key)).cloned())
    }

    fn put_pending(&mut self, act: &str, row: PendingTwoPersonRow) -> Result<(), Error> {
        self.pending.insert(act.to_owned(), row);
        self.touched_pending.insert(act.to_owned());
        Ok(())
    }

    fn remove_pending(&mut self, act: &str) -> Result<(), Error> {
        if self.pending.remove(act).is_some() {
            self.touched_pending.insert(act.to_owned());
        }
        Ok(())
    }

    fn approval(&self, digest: &str) -> Result<Option<ApprovalRow>, Error> {
        Ok(self.approvals.get(digest).cloned())
    }

    fn put_approval(&mut self, row: ApprovalRow) -> Result<(), Error> {
        self.touched_approvals.insert(row.call.digest.clone());
        self.approvals.insert(row.call.digest.clone(), row);
        Ok(())
    }
}
