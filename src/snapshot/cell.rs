//! The cell that publishes views: one follower writes it, and every serving runtime reads it.
//!
//! A mutex guards the view. Each reader thread keeps a copy, and an atomic generation tells it whether that copy is still the newest. So a
//! read normally costs one load, and no shared counter is written.

use std::cell::RefCell;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::sync_primitives::{AtomicU64, Mutex, MutexGuard, per_thread};
use super::{FreshnessProof, SnapshotView};
use crate::model::mutant::{Mutant, is_active};

/// A counter of cell ids. It needs no model under loom.
static NEXT_CELL_ID: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

per_thread! {
    static CACHED_VIEW: RefCell<Option<CachedView>> = const { RefCell::new(None) };
}

struct CachedView {
    cell: u64,
    generation: u64,
    view: Option<SnapshotView>,
}

/// Holds the current [`SnapshotView`]; empty until the first full snapshot.
#[derive(Debug)]
pub struct SnapshotCell {
    id: u64,
    generation: AtomicU64,
    view: Mutex<Option<SnapshotView>>,
}

impl Default for SnapshotCell {
    fn default() -> Self {
        Self { id: NEXT_CELL_ID.fetch_add(1, Ordering::Relaxed), generation: AtomicU64::new(0), view: Mutex::new(None) }
    }
}

impl SnapshotCell {
    /// Replaces the current view.
    pub fn publish(&self, view: SnapshotView) {
        let mut current = self.lock();
        *current = Some(view);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Replaces the proof of the current view and keeps its snapshot.
    pub fn renew_proof(&self, proof: FreshnessProof) {
        let mut current = self.lock();
        if let Some(view) = current.as_mut() {
            view.proof = proof;
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// Returns the current view; `None` before the first full snapshot.
    ///
    /// Each thread keeps a copy, and reads the shared view only after the generation has changed.
    pub fn load(&self) -> Option<SnapshotView> {
        // INVARIANT: the generation is read before the view, so a kept view is never older than its generation claims.
        let generation = self.generation.load(Ordering::Acquire);
        CACHED_VIEW.with(|kept| match &mut *kept.borrow_mut() {
            Some(kept) if kept.cell == self.id && kept.generation == generation => kept.view.clone(),
            kept => {
                let view = self.lock().clone();
                let late = is_active(Mutant::GenerationAfterView);
                let generation = if late { self.generation.load(Ordering::Acquire) } else { generation };
                *kept = Some(CachedView { cell: self.id, generation, view: view.clone() });
                view
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<SnapshotView>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
