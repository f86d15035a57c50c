//! Builds a snapshot from each state that the follower has read, and publishes it with its proof in the cell that decisions read.
//!
//! It must not read a clock or the store: the follower supplies both the state and its proof. Look next at `snapshot.rs`.

use std::sync::{Arc, Weak};

use super::Publisher;
use crate::model::mutant::{Mutant, active};
use crate::model::time::Now;
use crate::revocation::Index;
use crate::snapshot::{Builder, FullState, Proof, Snapshot, SnapshotCell, View};
use crate::store;

/// A [`Publisher`] that uses the snapshot builder and the snapshot cell of this process.
#[derive(Debug)]
pub struct CellPublisher {
    builder: Builder,
    cell: Arc<SnapshotCell>,
    /// The published snapshots that a reader may still hold, by their number.
    published: Vec<(u64, Weak<Snapshot>)>,
}

impl CellPublisher {
    /// Publishes into `cell`. All snapshots share the index `revocations`.
    pub fn new(cell: Arc<SnapshotCell>, revocations: Arc<Index>) -> Self {
        Self { builder: Builder::new(revocations), cell, published: Vec::new() }
    }

    fn built(&mut self, state: store::State) -> Result<Arc<Snapshot>, String> {
        let state = FullState {
            revision: state.revision,
            digest: state.digest,
            iat_skew_s: state.settings.iat_skew_s,
            freshness_bound_ms: state.settings.freshness_bound_ms,
            documents: state.documents.into_iter().map(|stored| stored.row).collect(),
            revocations: state.revocations,
        };
        self.builder.replace(state).map_err(|error| error.to_string())
    }

    fn publish(&mut self, snapshot: Arc<Snapshot>, proof: Proof) -> Result<(), String> {
        self.published.push((snapshot.revision().number, Arc::downgrade(&snapshot)));
        self.cell.publish(View { snapshot, proof });
        self.forget();
        self.builder.problem().map_or(Ok(()), |problem| Err(problem.to_owned()))
    }

    /// Frees the removed index entries that no remaining snapshot can see.
    fn forget(&mut self) {
        self.published.retain(|(_, snapshot)| snapshot.strong_count() > 0);
        let numbers = self.published.iter().map(|(number, _)| *number);
        if let Some(oldest) = if active(Mutant::ForgetHeld) { numbers.max() } else { numbers.min() } {
            self.builder.forget_lifted(oldest);
        }
    }
}

impl Publisher for CellPublisher {
    fn replace(&mut self, state: store::State, sent_at: Now) -> Result<(), String> {
        let published = self.cell.load().map(|view| view.snapshot.revision().history.clone());
        if published.is_some_and(|history| history != state.revision.history) {
            // INVARIANT: numbers of different histories cannot be compared, and the index uses numbers to decide what older
            // snapshots still see. So a new history gets a new index. The follower waits until the proof of the old snapshot is
            // too old to permit a call.
            let mut begun = Self::new(self.cell.clone(), Arc::new(Index::new()));
            let snapshot = begun.built(state)?;
            *self = begun;
            return self.publish(snapshot, Proof::SentAt(sent_at));
        }
        let snapshot = self.built(state)?;
        self.publish(snapshot, Proof::SentAt(sent_at))
    }

    fn restore(&mut self, state: store::State) -> Result<(), String> {
        let snapshot = self.built(state)?;
        self.publish(snapshot, Proof::Missing)
    }

    fn apply(&mut self, commits: &[store::CommitRow], sent_at: Now) -> Result<(), String> {
        // Apply all commits together and publish only the last, so that no revocation waits for the policy of an earlier commit.
        let Some(newest) = commits.last() else { return Ok(()) };
        let left_out = usize::from(active(Mutant::DropCommit) && commits.len() > 1);
        let changes = commits.iter().skip(left_out).flat_map(|commit| &commit.changes);
        let snapshot = self.builder.apply(newest.number, newest.digest, changes).map_err(|error| error.to_string())?;
        self.publish(snapshot, Proof::SentAt(sent_at))
    }

    fn refresh(&mut self, sent_at: Now) {
        self.cell.renew(Proof::SentAt(sent_at));
        self.forget();
    }

    fn quarantine(&mut self, _reason: &str) {
        if !active(Mutant::ProofSurvivesQuarantine) {
            self.cell.renew(Proof::Quarantined);
        }
    }
}
