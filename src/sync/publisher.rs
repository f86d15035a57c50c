//! Builds a snapshot from each state that the follower has read, and publishes it with its proof in the cell that decisions read.
//!
//! It must not read a clock or the store: the follower supplies both the state and its proof. Look next at `snapshot.rs`.

use std::sync::{Arc, Weak};

use super::SnapshotPublisher;
use crate::model::mutant::{Mutant, is_active};
use crate::model::time::ClockReading;
use crate::revocation::RevocationIndex;
use crate::snapshot::{FreshnessProof, FullState, Snapshot, SnapshotBuilder, SnapshotCell, SnapshotView};
use crate::store;

/// A [`SnapshotPublisher`] that uses the snapshot builder and the snapshot cell of this process.
#[derive(Debug)]
pub struct CellPublisher {
    builder: SnapshotBuilder,
    cell: Arc<SnapshotCell>,
    /// The published snapshots that a reader may still hold, by their number.
    published_snapshots: Vec<(u64, Weak<Snapshot>)>,
}

impl CellPublisher {
    /// Publishes into `cell`. All snapshots share the index `revocations`.
    pub fn new(cell: Arc<SnapshotCell>, revocations: Arc<RevocationIndex>) -> Self {
        Self { builder: SnapshotBuilder::new(revocations), cell, published_snapshots: Vec::new() }
    }

    fn build_snapshot(&mut self, state: store::StoreState) -> Result<Arc<Snapshot>, String> {
        let state = FullState {
            revision: state.revision,
            digest: state.digest,
            iat_skew_s: state.settings.iat_skew_s,
            freshness_bound_ms: state.settings.freshness_bound_ms,
            documents: state.documents.into_iter().map(|stored| stored.row).collect(),
            revocations: state.revocations,
        };
        self.builder.replace_all(state).map_err(|error| error.to_string())
    }

    fn publish(&mut self, snapshot: Arc<Snapshot>, proof: FreshnessProof) -> Result<(), String> {
        self.published_snapshots.push((snapshot.revision().number, Arc::downgrade(&snapshot)));
        self.cell.publish(SnapshotView { snapshot, proof });
        self.forget_unseen_removals();
        self.builder.policy_error().map_or(Ok(()), |problem| Err(problem.to_owned()))
    }

    /// Frees the removed index entries that no remaining snapshot can see.
    fn forget_unseen_removals(&mut self) {
        self.published_snapshots.retain(|(_, snapshot)| snapshot.strong_count() > 0);
        let numbers = self.published_snapshots.iter().map(|(number, _)| *number);
        if let Some(oldest) = if is_active(Mutant::PruneVisibleEntry) { numbers.max() } else { numbers.min() } {
            self.builder.prune_lifted(oldest);
        }
    }
}

impl SnapshotPublisher for CellPublisher {
    fn publish_state(&mut self, state: store::StoreState, sent_at: ClockReading) -> Result<(), String> {
        let published = self.cell.load().map(|view| view.snapshot.revision().history.clone());
        if published.is_some_and(|history| history != state.revision.history) {
            // INVARIANT: numbers of different histories cannot be compared, and the index uses numbers to decide what older
            // snapshots still see. So a new history gets a new index. The follower waits until the proof of the old snapshot is
            // too old to permit a call.
            let mut begun = Self::new(self.cell.clone(), Arc::new(RevocationIndex::new()));
            let snapshot = begun.build_snapshot(state)?;
            *self = begun;
            return self.publish(snapshot, FreshnessProof::SentAt(sent_at));
        }
        let snapshot = self.build_snapshot(state)?;
        self.publish(snapshot, FreshnessProof::SentAt(sent_at))
    }

    fn publish_cached_state(&mut self, state: store::StoreState) -> Result<(), String> {
        let snapshot = self.build_snapshot(state)?;
        self.publish(snapshot, FreshnessProof::Missing)
    }

    fn publish_commits(&mut self, commits: &[store::CommitRow], sent_at: ClockReading) -> Result<(), String> {
        // Apply all commits together and publish only the last, so that no revocation waits for the policy of an earlier commit.
        let Some(newest) = commits.last() else { return Ok(()) };
        let left_out = usize::from(is_active(Mutant::DropCommit) && commits.len() > 1);
        let changes = commits.iter().skip(left_out).flat_map(|commit| &commit.changes);
        let snapshot = self.builder.apply_changes(newest.number, newest.digest, changes).map_err(|error| error.to_string())?;
        self.publish(snapshot, FreshnessProof::SentAt(sent_at))
    }

    fn renew_proof(&mut self, sent_at: ClockReading) {
        self.cell.renew_proof(FreshnessProof::SentAt(sent_at));
        self.forget_unseen_removals();
    }

    fn quarantine(&mut self, _reason: &str) {
        if !is_active(Mutant::ProofSurvivesQuarantine) {
            self.cell.renew_proof(FreshnessProof::Quarantined);
        }
    }
}
