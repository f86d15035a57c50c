//! Tests the index against a naive model, under concurrency, and while its filter grows.

mod loom_tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use proptest::prelude::*;

use super::filter::FilterLevels;
use super::*;
use crate::model::rows::{RevocationRow, RevocationTarget};

fn row(target: RevocationTarget, revision: u64) -> RevocationRow {
    RevocationRow {
        target,
        dead: false,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision,
    }
}

fn dead(id: usize, revision: u64) -> RevocationRow {
    RevocationRow { dead: true, ..row(RevocationTarget::Token(format!("jti-{id}")), revision) }
}

fn key_of(index: &RevocationIndex, target: &RevocationTarget) -> RevocationKey {
    index.key(TargetRef::from(target))
}

/// Every row that each target ever had, with the number of the first snapshot that no longer sees the effects that the row left out.
#[derive(Default)]
struct NaiveIndex(Vec<(RevocationRow, u64)>);

impl NaiveIndex {
    fn replace(&mut self, rows: &[RevocationRow], number: u64) {
        let gone: Vec<RevocationTarget> = self.0.iter().map(|(row, _)| row.target.clone()).collect();
        for target in gone.into_iter().filter(|target| rows.iter().all(|row| row.target != *target)) {
            self.0.push((row(target, number), number));
        }
        self.0.extend(rows.iter().map(|row| (row.clone(), number)));
    }

    /// Returns the effect, and its revision if the newest row still has the effect.
    fn hit(&self, target: &RevocationTarget, root_iat_s: i64, number: u64) -> Option<(RevocationEffect, Option<u64>)> {
        let rows: Vec<_> = self.0.iter().filter(|(row, _)| row.target == *target).collect();
        let effect = |says: &dyn Fn(&RevocationRow) -> bool| {
            let last_on = rows.iter().rposition(|(row, _)| says(row))?;
            match rows.get(last_on + 1) {
                None => Some(Some(rows[last_on].0.revision)),
                Some((_, lifted_at)) => (number < *lifted_at).then_some(None),
            }
        };
        let highest = rows.iter().filter_map(|(row, _)| row.watermark_unix_s).max();
        let watermark = || effect(&|row| row.watermark_unix_s.is_some()).filter(|_| highest >= Some(root_iat_s));
        effect(&|row| row.dead)
            .map(|revision| (RevocationEffect::Dead, revision))
            .or_else(|| effect(&|row| row.suspended).map(|revision| (RevocationEffect::Suspended, revision)))
            .or_else(|| watermark().map(|revision| (RevocationEffect::Watermark, revision)))
    }
}

#[derive(Clone, Debug)]
enum IndexStep {
    Apply { id: usize, dead: bool, suspended: bool, watermark: bool },
    Replace(Vec<(usize, u8)>),
    Forget,
}

const IDS: usize = 16;

fn target(id: usize) -> RevocationTarget {
    let name = format!("x{id}");
    match id % 4 {
        0 => RevocationTarget::Agent(name),
        1 => RevocationTarget::Token(name),
        2 => RevocationTarget::User { issuer: "i".into(), subject: name },
        _ => RevocationTarget::Delegation { issuer: "i".into(), subject: "s".into(), agent: name },
    }
}

fn row_of(id: usize, dead: bool, suspended: bool, watermark: bool, number: u64) -> RevocationRow {
    // Watermarks rise with the revisions, as in a store.
    let watermark_unix_s = watermark.then_some(i64::try_from(number).unwrap() * 10);
    RevocationRow { dead, suspended, watermark_unix_s, ..row(target(id), number) }
}

fn step() -> impl Strategy<Value = IndexStep> {
    let apply = (0..IDS, prop::bool::weighted(0.3), any::<bool>(), any::<bool>());
    prop_oneof![
        12 => apply.prop_map(|(id, dead, suspended, watermark)| IndexStep::Apply { id, dead, suspended, watermark }),
        2 => prop::collection::btree_map(0..IDS, 0..8_u8, 0..IDS).prop_map(|rows| IndexStep::Replace(rows.into_iter().collect())),
        1 => Just(IndexStep::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn agrees_with_a_list_of_rows(steps in prop::collection::vec(step(), 1..60)) {
        let index = RevocationIndex::with_first_capacity(4);
        let mut naive = NaiveIndex::default();
        let mut oldest = 0;
        for (number, step) in (1..).zip(steps) {
            let generation = index.generation();
            let before: Vec<_> = (0..IDS).map(|id| naive.hit(&target(id), 0, u64::MAX).map(|hit| hit.0)).collect();
            match step {
                IndexStep::Apply { id, dead, suspended, watermark } => {
                    let row = row_of(id, dead, suspended, watermark, number);
                    index.apply(&row);
                    naive.0.push((row, number));
                }
                IndexStep::Replace(rows) => {
                    let bit = |bits: u8, bit: u8| bits & (1 << bit) != 0;
                    let rows: Vec<_> =
                        rows.into_iter().map(|(id, b)| row_of(id, bit(b, 0), bit(b, 1), bit(b, 2), number)).collect();
                    index.replace_all(&rows, number);
                    naive.replace(&rows, number);
                }
                IndexStep::Forget => {
                    index.prune_lifted(number);
                    oldest = number;
                }
            }
            for (id, before) in before.into_iter().enumerate() {
                let target = target(id);
                let now = naive.hit(&target, 0, u64::MAX).map(|hit| hit.0);
                if before.is_none() && now.is_some() {
                    prop_assert!(index.generation() > generation, "{target} was added in silence at {number}");
                }
                for snapshot in [oldest, oldest.midpoint(number), number.saturating_sub(1).max(oldest), number] {
                    for iat in [0, i64::try_from(snapshot).unwrap() * 10, i64::MAX] {
                        let hit = index.find_hit(key_of(&index, &target), iat, snapshot);
                        let expected = naive.hit(&target, iat, snapshot);
                        prop_assert_eq!(hit.map(|hit| hit.effect), expected.map(|hit| hit.0), "{} {} {}", &target, iat, snapshot);
                        if let (Some(hit), Some((_, Some(revision)))) = (hit, expected) {
                            prop_assert_eq!(hit.revision, revision);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn additions_show_at_once_and_removals_from_their_revision_on() {
    let index = RevocationIndex::new();
    let agent = RevocationTarget::Agent("spiffe://a/b".into());
    let key = key_of(&index, &agent);
    let suspended = |revision| RevocationRow { suspended: true, ..row(agent.clone(), revision) };
    let check = |snapshot, expected: Option<(RevocationEffect, u64)>| {
        let expected = expected.map(|(effect, revision)| RevocationHit { effect, revision });
        assert_eq!(index.find_hit(key, 100, snapshot), expected, "snapshot {snapshot}");
    };
    check(1, None);
    index.apply(&suspended(5));
    check(1, Some((RevocationEffect::Suspended, 5)));
    index.apply(&row(agent.clone(), 9));
    check(8, Some((RevocationEffect::Suspended, 5)));
    check(9, None);
    index.apply(&suspended(12));
    check(9, Some((RevocationEffect::Suspended, 12)));
    index.apply(&RevocationRow { watermark_unix_s: Some(100), ..row(agent.clone(), 14) });
    check(14, Some((RevocationEffect::Watermark, 14)));
    check(13, Some((RevocationEffect::Suspended, 12)));
    index.apply(&RevocationRow { watermark_unix_s: Some(50), ..row(agent.clone(), 15) });
    check(15, Some((RevocationEffect::Watermark, 15)));
    assert_eq!(index.find_hit(key, 101, 15), None, "a younger root");
    index.replace_all(&[], 20);
    check(19, Some((RevocationEffect::Watermark, 15)));
    check(20, None);
    assert_eq!(index.len(), 1);
    index.prune_lifted(20);
    assert!(index.is_empty());
}

/// The generation moves with every addition, and with nothing else: a chain that was found clean is checked again after it moved.
#[test]
fn the_generation_moves_with_additions_alone() {
    let index = RevocationIndex::new();
    let agent = RevocationTarget::Agent("spiffe://a/b".into());
    let at = |second| RevocationRow { watermark_unix_s: Some(second), ..row(agent.clone(), 1) };
    let applied = |row: RevocationRow, moves: bool| {
        let before = index.generation();
        index.apply(&row);
        assert_eq!(index.generation() > before, moves, "{row:?}");
    };
    applied(row(agent.clone(), 1), false);
    applied(at(100), true);
    applied(at(200), true);
    assert!(index.find_hit(key_of(&index, &agent), 150, 1).is_some(), "the raised watermark");
    applied(at(200), false);
    applied(at(150), false);
    applied(RevocationRow { suspended: true, ..at(200) }, true);
    applied(at(200), false);
    applied(RevocationRow { dead: true, ..at(200) }, true);
    applied(dead(1, 2), true);
    applied(dead(1, 3), false);
    let replaced = |rows: &[RevocationRow], moves: bool| {
        let before = index.generation();
        index.replace_all(rows, 4);
        assert_eq!(index.generation() > before, moves, "{rows:?}");
    };
    replaced(&[dead(1, 2), dead(2, 4)], true);
    replaced(&[dead(1, 2), dead(2, 4)], false);
    replaced(&[], false);
}

/// A full state may hold many more rows than the filter was made for, and some of them are known already.
#[test]
fn a_full_state_outgrows_the_filter() {
    let index = RevocationIndex::with_first_capacity(4);
    assert_eq!(index.false_positive_rate(), 0.0);
    let rows: Vec<_> = (0..400).map(|id| dead(id, 1)).collect();
    rows[..3].iter().for_each(|row| index.apply(row));
    assert!(index.false_positive_rate() > 0.0);
    index.replace_all(&rows, 2);
    assert!(rows.iter().all(|row| index.find_hit(key_of(&index, &row.target), 0, 2).is_some()));
    assert!(format!("{index:?}").starts_with("Index { len: 400, generation: "), "{index:?}");
}

#[test]
fn what_is_lifted_at_the_last_number_is_lifted() {
    let index = RevocationIndex::new();
    index.apply(&dead(1, 1));
    index.remove(&dead(1, 1).target, u64::MAX);
    index.prune_lifted(u64::MAX);
    assert!(index.is_empty());
}

#[test]
fn targets_do_not_run_together() {
    let index = RevocationIndex::new();
    let targets = [
        TargetRef::All,
        TargetRef::Agent("a"),
        TargetRef::Session("a"),
        TargetRef::Task("a"),
        TargetRef::Application("a"),
        TargetRef::Key("a"),
        TargetRef::Tool("a"),
        TargetRef::Hop("a"),
        TargetRef::Token("a"),
        TargetRef::User { issuer: "a", subject: "" },
        TargetRef::User { issuer: "", subject: "a" },
        TargetRef::User { issuer: "ab", subject: "c" },
        TargetRef::User { issuer: "a", subject: "bc" },
        TargetRef::Delegation { issuer: "a", subject: "b", agent: "c" },
        TargetRef::Delegation { issuer: "ab", subject: "", agent: "c" },
    ];
    let keys: std::collections::HashSet<_> = targets.iter().map(|target| index.key(*target)).collect();
    assert_eq!(keys.len(), targets.len());
    assert_ne!(RevocationIndex::new().key(TargetRef::All), index.key(TargetRef::All), "each index has keys of its own");
}

#[test]
fn the_filter_grows_and_stays_sharp() {
    let index = RevocationIndex::with_first_capacity(64);
    let bits = index.filter_bits();
    let rows: Vec<_> = (0..20_000).map(|id| dead(id, 1)).collect();
    for row in &rows {
        index.apply(row);
    }
    // This waits for a rebuild on another thread by running the same rebuild here, whether one is due or not.
    while index.filter_bits() == bits || index.false_positive_rate() > 0.005 {
        index.prune_lifted(0);
        std::thread::yield_now();
    }
    for row in &rows {
        assert!(index.find_hit(key_of(&index, &row.target), 0, 2).is_some(), "{}", row.target);
    }
    let maybe = |id: &usize| index.may_contain(key_of(&index, &dead(*id, 1).target));
    let false_maybes = (1_000_000..1_020_000).filter(maybe).count();
    assert!(false_maybes < 200, "{false_maybes} of 20000");
}

/// A quarter of room is left, so that a filter is not outgrown while it is made; it never shrinks.
#[test]
fn the_smallest_filter_with_room_is_chosen() {
    let filters = FilterLevels::new(1024);
    for (keys, level) in [(0, 0), (819, 0), (820, 1), (3_277, 1), (3_278, 2), (200_000_000, 8), (u64::MAX, 8)] {
        assert_eq!(filters.level_for(keys), level, "{keys} keys");
    }
    assert_eq!((filters.level(), filters.capacity(), filters.size_bits()), (0, 1_024, 16_384));
    filters.install(2, Arc::new(filters.new_filter(2)));
    assert_eq!((filters.level(), filters.capacity(), filters.size_bits()), (2, 16_384, 262_144));
    assert_eq!(filters.level_for(0), 2);
}

/// The estimate is what keys that were never inserted meet, in an empty filter, a full one and one that was outgrown.
#[test]
fn the_rate_of_false_maybes_is_estimated() {
    let index = RevocationIndex::new();
    let key = |id: usize| key_of(&index, &dead(id, 1).target);
    for (inserted, within) in [(0, 0.0), (65_536, 0.001), (262_144, 0.02)] {
        let filters = FilterLevels::new(65_536);
        (0..inserted).for_each(|id| filters.insert(key(id)));
        let maybes = (1_000_000..1_020_000).filter(|id| filters.may_contain(key(*id))).count();
        let (measured, estimated) = (maybes as f64 / 20_000.0, filters.false_positive_rate());
        assert!((measured - estimated).abs() <= within, "{inserted} keys: {measured} measured, {estimated} estimated");
    }
}

#[test]
fn what_was_forgotten_leaves_the_filter() {
    let index = RevocationIndex::with_first_capacity(1024);
    let bits = index.filter_bits();
    for round in 0..20 {
        let rows: Vec<_> = (0..250).map(|id| dead(round * 1_000 + id, 1)).collect();
        index.replace_all(&rows, round as u64 + 1);
        index.prune_lifted(round as u64 + 1);
    }
    assert_eq!((index.len(), index.filter_bits()), (250, bits), "five thousand went through, 250 are held");
    assert!(index.false_positive_rate() < 0.01, "{}", index.false_positive_rate());
    assert!((19_000..19_250).all(|id| index.find_hit(key_of(&index, &dead(id, 1).target), 0, 20).is_some()));
}

#[test]
fn readers_never_miss_what_was_applied() {
    const ROWS: usize = 10_000;
    let index = RevocationIndex::with_first_capacity(16);
    let rows: Vec<_> = (0..ROWS).map(|id| dead(id, id as u64 + 1)).collect();
    let keys: Vec<_> = rows.iter().map(|row| key_of(&index, &row.target)).collect();
    let (applied, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for reader in 1..=2 {
            let (index, keys, applied, ended) = (&index, &keys, &applied, &ended);
            scope.spawn(move || {
                let mut place = reader;
                while !ended.load(Ordering::Acquire) {
                    let count = applied.load(Ordering::Acquire);
                    for _ in 0..64.min(count) {
                        place = (place * 25_214_903_917 + 11) % count;
                        assert!(index.find_hit(keys[place], 0, u64::MAX - 1).is_some(), "{place} of {count}");
                    }
                    if let Some(newest) = count.checked_sub(1) {
                        assert!(index.find_hit(keys[newest], 0, 0).is_some(), "the newest of {count}");
                    }
                }
            });
        }
        for (count, row) in rows.iter().enumerate() {
            index.apply(row);
            applied.store(count + 1, Ordering::Release);
            if count % 2_500 == 2_499 {
                // A resync in between, to a state with the same rows.
                index.replace_all(&rows[..=count], count as u64 + 1);
            }
        }
        ended.store(true, Ordering::Release);
    });
    assert_eq!(index.len(), ROWS as u64);
}
