//! Tests the index under loom. The same source files are compiled over modelled primitives, and every order that the memory model allows is
//! tried.
//!
//! Only the keys differ: they are not random, because loom needs the same result in every run.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::{RevocationEffect, RevocationHit, RevocationRow, dead, row};
use crate::model::mutant::Mutant;
use crate::model::sync_primitives::loom_model as sync_primitives;
use crate::revocation::entry;

#[allow(dead_code, reason = "the parts that only others use")]
#[allow(clippy::duplicate_mod, reason = "the very same source, with loom\'s primitives")]
#[path = "../filter.rs"]
mod filter;
#[allow(dead_code, unreachable_pub, reason = "the parts that only others use")]
#[allow(clippy::duplicate_mod, reason = "the very same source, with loom\'s primitives")]
#[path = "../index.rs"]
mod index;

mod key {
    pub(super) use crate::revocation::key::{IdentityHasher, RevocationKey, TargetRef};

    /// Makes a key from the last digit of a name. No two digits share a bit.
    pub(super) struct KeyHasher;

    impl KeyHasher {
        pub(super) fn new() -> Self {
            Self
        }

        pub(super) fn key(&self, target: TargetRef<'_>) -> RevocationKey {
            let TargetRef::Token(name) = target else { panic!("tokens only") };
            let place = u64::from(name.as_bytes().last().unwrap() % 16);
            RevocationKey { low: place * 0b1_000_001, high: place }
        }
    }
}

use index::RevocationIndex;

fn key_of(index: &RevocationIndex, row: &RevocationRow) -> key::RevocationKey {
    index.key(key::TargetRef::from(&row.target))
}

/// Checks what every reader may rely on while a writer applies rows and announces each of them.
fn readers_miss_nothing(capacity: u64, before: usize, rows: usize, rounds: usize) {
    sync_primitives::check_model(move || {
        let (index, applied) = (Arc::new(RevocationIndex::with_first_capacity(capacity)), Arc::new(AtomicUsize::new(before)));
        (0..before).for_each(|id| index.apply(&dead(id, id as u64 + 1)));
        let reader = {
            let (index, applied) = (index.clone(), applied.clone());
            thread::spawn(move || {
                let newest = dead(rows - 1, rows as u64);
                // As in `pdp`: read the generation, then look up. A clean result stays valid as long as that generation.
                let generation = index.generation();
                let clean = index.find_hit(key_of(&index, &newest), 0, 0).is_none();
                for _ in 0..rounds {
                    let count = applied.load(Ordering::Acquire);
                    if count == rows {
                        assert!(!clean || index.generation() != generation, "called clean after it was applied");
                    }
                    if let Some(last) = count.checked_sub(1) {
                        assert!(
                            index.find_hit(key_of(&index, &dead(last, 1)), 0, 0).is_some(),
                            "row {last} of {count} is missed"
                        );
                        assert!(index.find_hit(key_of(&index, &dead(0, 1)), 0, 0).is_some(), "the first row is missed");
                    }
                }
            })
        };
        for id in before..rows {
            index.apply(&dead(id, id as u64 + 1));
            applied.store(id + 1, Ordering::Release);
        }
        reader.join().unwrap();
    });
}

#[test]
fn loom_what_was_applied_is_hit_and_never_called_clean() {
    let run = || readers_miss_nothing(4, 0, 1, 2);
    run();
    sync_primitives::assert_mutant_is_caught(Mutant::GenerationFirst, run);
    sync_primitives::assert_mutant_is_caught(Mutant::LostInsert, run);
}

/// The filter has room for one key. The second row makes a larger filter due, and a thread builds it while a reader looks up.
#[test]
fn loom_nothing_is_missed_while_the_filter_is_replaced() {
    readers_miss_nothing(1, 1, 2, 1);
}

/// A row that is applied while a filter is built is in the new filter too.
#[test]
fn loom_nothing_is_lost_by_the_filter_that_is_built() {
    let run = || {
        // One row starts the build, one arrives meanwhile, and one finishes it.
        sync_primitives::check_model_with_preemptions(3, || {
            let index = RevocationIndex::with_first_capacity(1);
            (0..3).for_each(|id| index.apply(&dead(id, id as u64 + 1)));
            (0..3).for_each(|id| assert!(index.find_hit(key_of(&index, &dead(id, 1)), 0, 0).is_some(), "row {id} is missed"));
        });
    };
    run();
    sync_primitives::assert_mutant_is_caught(Mutant::LostWhileBuilding, run);
}

/// A target that dies, is lifted and dies again moves between the sets. A snapshot that sees it dead must see it dead throughout.
#[test]
fn loom_an_older_snapshot_never_sees_it_lifted() {
    sync_primitives::check_model(|| {
        let index = Arc::new(RevocationIndex::with_first_capacity(4));
        index.apply(&dead(1, 1));
        let reader = {
            let index = index.clone();
            thread::spawn(move || {
                let hit = index.find_hit(key_of(&index, &dead(1, 1)), 0, 1);
                assert_eq!(hit.map(|hit: RevocationHit| hit.effect), Some(RevocationEffect::Dead));
            })
        };
        index.apply(&row(dead(1, 1).target, 2));
        reader.join().unwrap();
        assert_eq!(index.find_hit(key_of(&index, &dead(1, 1)), 0, 2), None);
    });
}

/// Once enough entries were freed, a new filter of the same size replaces the old one word by word.
#[test]
fn loom_a_filter_is_overwritten_under_its_readers() {
    sync_primitives::check_model(|| {
        let index = Arc::new(RevocationIndex::with_first_capacity(4));
        (0..4).for_each(|id| index.apply(&dead(id, 1)));
        index.replace_all(&[dead(3, 1)], 2);
        index.prune_lifted(2);
        let reader = {
            let index = index.clone();
            thread::spawn(move || {
                assert!(index.find_hit(key_of(&index, &dead(3, 1)), 0, 2).is_some(), "it was there all the time")
            })
        };
        // The filter is sized for four; with two entries held and three freed, it is rebuilt.
        index.apply(&dead(4, 3));
        reader.join().unwrap();
        assert!(index.find_hit(key_of(&index, &dead(4, 3)), 0, 3).is_some());
    });
}
