//! The cell that publishes views: one follower writes it, and every serving runtime reads it.
//!
//! A mutex guards the view. Each reader thread keeps a copy, and an atomic generation tells it whether that copy is still the newest. So a
//! read normally costs one load, and no shared counter is written.

use std::cell::RefCell;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::primitives::{AtomicU64, Mutex, MutexGuard, per_thread};
use super::{Proof, View};
use crate::model::mutant::{Mutant, active};

/// A counter of cell ids. It needs no model under loom.
static CELLS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

per_thread! {
    static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
}

struct Kept {
    cell: u64,
    generation: u64,
    view: Option<View>,
}

/// Holds the current [`View`]; empty until the first full snapshot.
#[derive(Debug)]
pub struct SnapshotCell {
    id: u64,
    generation: AtomicU64,
    view: Mutex<Option<View>>,
}

impl Default for SnapshotCell {
    fn default() -> Self {
        Self { id: CELLS.fetch_add(1, Ordering::Relaxed), generation: AtomicU64::new(0), view: Mutex::new(None) }
    }
}

impl SnapshotCell {
    /// Replaces the current view.
    pub fn publish(&self, view: View) {
        let mut current = self.lock();
        *current = Some(view);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Replaces the proof of the current view and keeps its snapshot.
    pub fn renew(&self, proof: Proof) {
        let mut current = self.lock();
        if let Some(view) = current.as_mut() {
            view.proof = proof;
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// Returns the current view; `None` before the first full snapshot.
    ///
    /// Each thread keeps a copy, and reads the shared view only after the generation has changed.
    pub fn load(&self) -> Option<View> {
        // INVARIANT: the generation is read before the view, so a kept view is never older than its generation claims.
        let generation = self.generation.load(Ordering::Acquire);
        KEPT.with(|kept| match &mut *kept.borrow_mut() {
            Some(kept) if kept.cell == self.id && kept.generation == generation => kept.view.clone(),
            kept => {
                let view = self.lock().clone();
                let late = active(Mutant::GenerationAfterView);
                let generation = if late { self.generation.load(Ordering::Acquire) } else { generation };
                *kept = Some(Kept { cell: self.id, generation, view: view.clone() });
                view
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<View>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
