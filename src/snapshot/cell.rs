//! The cell that hands out views: written by one follower, read by every serving runtime.
//!
//! A mutex guards the view; an atomic generation tells a reader whether the one it keeps is still the newest, so that a warm
//! read is one load and no shared counter moves.

use std::cell::RefCell;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::primitives::{AtomicU64, Mutex, MutexGuard, per_thread};
use super::{Proof, View};
use crate::model::mutant::{Mutant, active};

/// Only a count of names, and so never modelled.
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
    /// Puts a view in place of the current one.
    pub fn publish(&self, view: View) {
        let mut current = self.lock();
        *current = Some(view);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Puts another proof beside the current snapshot.
    pub fn renew(&self, proof: Proof) {
        let mut current = self.lock();
        if let Some(view) = current.as_mut() {
            view.proof = proof;
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// The current view; `None` before the first full snapshot.
    ///
    /// Each thread keeps a clone and reads the shared one only when the generation has moved.
    pub fn load(&self) -> Option<View> {
        // INVARIANT: the generation is read before the view, so a kept view is never newer than it says.
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
