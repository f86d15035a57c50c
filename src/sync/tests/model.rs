//! A naive model of a store: a list of commits with real hashes. It can fork and lose a row.

use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{RevocationRow, RevocationTarget, RowChange};
use crate::store::hash_chain::{commit_hash, encode_changes, state_digest};
use crate::store::{ChangeLogPage, CommitRow, Settings, StoreState};

/// A commit that revokes a token of that name.
pub(super) fn commit_row(number: u64, previous_hash: [u8; 32], name: &str) -> CommitRow {
    let changes = vec![RowChange::Revocation(RevocationRow {
        target: RevocationTarget::Token(format!("{name}-{number}")),
        dead: true,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: number,
    })];
    let hash = commit_hash(&previous_hash, number, &encode_changes(&changes).unwrap());
    CommitRow { number, previous_hash, hash, digest: StateDigest::default(), unix_ms: 0, changes }
}

/// The model of a store.
pub(super) struct StoreModel {
    pub(super) history: HistoryId,
    pub(super) commits: Vec<CommitRow>,
    /// The number of a row that the log has lost.
    pub(super) lost: Option<u64>,
}

impl StoreModel {
    pub(super) fn new(history: &str) -> Self {
        Self { history: HistoryId::new(history), commits: Vec::new(), lost: None }
    }

    pub(super) fn commit(&mut self, name: &str) {
        let previous_hash = self.commits.last().map_or([0; 32], |commit| commit.hash);
        self.commits.push(commit_row(self.commits.len() as u64 + 1, previous_hash, name));
    }

    /// Rolls back to a number and adds other commits from there.
    pub(super) fn fork(&mut self, to: usize, more: usize) {
        self.commits.truncate(to);
        (0..more).for_each(|_| self.commit("fork"));
    }

    pub(super) fn state(&self) -> StoreState {
        let revocations: Vec<_> = self
            .commits
            .iter()
            .flat_map(|commit| &commit.changes)
            .filter_map(|change| match change {
                RowChange::Revocation(row) => Some(row.clone()),
                _ => None,
            })
            .collect();
        StoreState {
            revision: Revision { history: self.history.clone(), number: self.commits.len() as u64 },
            hash: self.commits.last().map_or([0; 32], |commit| commit.hash),
            digest: state_digest(&[], &revocations),
            settings: Settings::default(),
            documents: Vec::new(),
            revocations,
        }
    }

    pub(super) fn changes(&self, after: u64) -> ChangeLogPage {
        let follows = |commit: &&CommitRow| commit.number > after && Some(commit.number) != self.lost;
        ChangeLogPage {
            history: self.history.clone(),
            head: self.commits.len() as u64,
            head_hash: self.commits.last().map_or([0; 32], |commit| commit.hash),
            commits: self.commits.iter().filter(follows).cloned().collect(),
        }
    }
}
