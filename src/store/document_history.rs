//! The history of documents: rebuilds the documents of an earlier revision from the change log, in the same way for every store.
//!
//! Only the commits that change documents are needed. Pure functions over rows. Look next at `sqlite/history.rs`.

use std::collections::BTreeMap;

use super::{CommitRow, DocumentList, Error, StoredDocument};
use crate::model::revision::Revision;
use crate::model::rows::{DocumentKey, RowChange};

/// The documents after the commits that were applied so far.
#[derive(Default)]
pub(super) struct DocumentHistory(BTreeMap<DocumentKey, StoredDocument>);

impl DocumentHistory {
    /// Applies the next commit, in the order of the numbers. Commits that change no document may be left out.
    pub(super) fn apply_commit(&mut self, commit: CommitRow) {
        for change in commit.changes {
            match change {
                RowChange::Document(row) => {
                    self.0.insert(row.key.clone(), StoredDocument { row, revision: commit.number });
                }
                RowChange::DocumentRemoved(key) => {
                    self.0.remove(&key);
                }
                RowChange::Revocation(_) | RowChange::RevocationRemoved(_) => {}
            }
        }
    }

    /// Returns the documents at that revision.
    pub(super) fn into_documents(self, revision: Revision) -> DocumentList {
        DocumentList { revision, documents: self.0.into_values().collect() }
    }
}

/// Returns the earlier revision with that number, if the log still holds every commit that led to it.
///
/// # Errors
/// [`Error::BelowFloor`] if the log does not, [`Error::Rejected`] if the revision does not exist yet.
pub(super) fn earlier_revision(head: Revision, floor: u64, number: u64) -> Result<Revision, Error> {
    if floor > 0 {
        return Err(Error::BelowFloor { floor });
    }
    if number > head.number {
        return Err(Error::Rejected(format!("there is no revision {number} yet: the newest is {}", head.number)));
    }
    Ok(Revision { number, ..head })
}

/// Verifies a row of the log that was read without its predecessor: its hash must be the hash of its changes.
///
/// # Errors
/// [`Error::Corrupt`] if it is not.
pub(super) fn verify_commit(commit: CommitRow) -> Result<CommitRow, Error> {
    let before = commit.number.checked_sub(1);
    let before = before.ok_or_else(|| Error::Corrupt("revision 0 stands in the change log".to_owned()))?;
    let previous_hash = commit.previous_hash;
    commit.verify_after(before, &previous_hash)?;
    Ok(commit)
}
