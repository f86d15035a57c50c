//! Tests the cell under loom: the same source file over modelled primitives, in every order that the memory model allows.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::model::mutant::Mutant;
use crate::model::sync_primitives::loom_model as sync_primitives;
use crate::model::time::ClockReading;
use crate::snapshot::FreshnessProof;

#[allow(unreachable_pub, reason = "it is public in its own place")]
#[allow(clippy::duplicate_mod, reason = "the very same source, with loom\'s primitives")]
#[path = "../cell.rs"]
mod cell;

/// A small stand-in for a view: a number and a proof.
#[derive(Clone, Debug)]
pub(super) struct SnapshotView {
    number: u64,
    proof: FreshnessProof,
}

fn proof(at: i64) -> FreshnessProof {
    FreshnessProof::SentAt(ClockReading { unix_ns: at, boot_ns: at })
}

fn age(view: &SnapshotView) -> (u64, i64) {
    let FreshnessProof::SentAt(at) = view.proof else { panic!("nobody quarantines here") };
    (view.number, at.boot_ns)
}

/// A writer publishes and renews, and announces each step. A reader must never read an older value.
fn a_reader_keeps_up() {
    sync_primitives::check_model(|| {
        let (cell, done) = (Arc::new(cell::SnapshotCell::default()), Arc::new(AtomicU64::new(0)));
        let steps = [(1, 1), (1, 2), (2, 3)];
        let reader = {
            let (cell, done) = (cell.clone(), done.clone());
            thread::spawn(move || {
                let mut last = (0, 0);
                for _ in 0..3 {
                    let finished = done.load(Ordering::Acquire);
                    let seen = cell.load().as_ref().map_or((0, 0), age);
                    assert!(seen >= last, "from {last:?} back to {seen:?}");
                    let promised = finished.checked_sub(1).map_or((0, 0), |step| steps[step as usize]);
                    assert!(seen >= promised, "{promised:?} was published before, {seen:?} was read");
                    last = seen;
                }
            })
        };
        for (step, (number, at)) in (1..).zip(steps) {
            if at == 2 {
                cell.renew_proof(proof(at));
            } else {
                cell.publish(SnapshotView { number, proof: proof(at) });
            }
            done.store(step, Ordering::Release);
        }
        reader.join().unwrap();
        assert_eq!(cell.load().as_ref().map(age), Some((2, 3)));
    });
}

#[test]
fn loom_a_reader_never_goes_back_and_sees_what_was_published() {
    a_reader_keeps_up();
    sync_primitives::assert_mutant_is_caught(Mutant::GenerationAfterView, a_reader_keeps_up);
}
