//! How a store relates to a replica of an earlier history, and merging: the stronger of both rows, in any order.
use proptest::prelude::*;

use super::*;

fn revision(history: &str, number: u64) -> Revision {
    Revision { history: HistoryId::new(history), number }
}

fn adoption(history: &str, from: &str, number: u64) -> StoreAdoption {
    StoreAdoption { history: HistoryId::new(history), from: revision(from, number), from_hash: [9; 32], unix_ms: 0 }
}

#[test]
fn only_a_store_adopted_from_it_is_kin() {
    let adoptions = [adoption("b", "a", 5), adoption("c", "b", 7)];
    let check =
        |adoptions: &[StoreAdoption], now: &str, hash_at: Option<[u8; 32]>, stood: (&str, u64), expected: LineageRelation| {
            let lineage = StoreLineage { revision: revision(now, 8), hash_at, adoptions: adoptions.to_vec() };
            assert_eq!(lineage.relation_to(&revision(stood.0, stood.1), &[1; 32]), expected, "{now} {hash_at:?} {stood:?}");
        };
    let held = Some([1; 32]);
    check(&adoptions, "c", held, ("b", 7), LineageRelation::Contains);
    check(&adoptions, "c", held, ("a", 5), LineageRelation::Contains);
    check(&adoptions, "c", held, ("a", 3), LineageRelation::Contains);
    // Ahead of the backup, of another past, or at a revision that the log no longer holds.
    check(&adoptions, "c", held, ("a", 6), LineageRelation::MayLack);
    check(&adoptions, "c", held, ("b", 8), LineageRelation::MayLack);
    check(&adoptions, "c", Some([2; 32]), ("a", 5), LineageRelation::MayLack);
    check(&adoptions, "c", None, ("a", 5), LineageRelation::MayLack);
    // No adoption, an unrelated history, or an adoption that does not lead to the store's history.
    check(&[], "c", held, ("a", 5), LineageRelation::Unrelated);
    check(&adoptions, "c", held, ("x", 5), LineageRelation::Unrelated);
    check(&adoptions, "d", held, ("a", 5), LineageRelation::Unrelated);
    check(&adoptions[..1], "c", held, ("a", 5), LineageRelation::Unrelated);
    check(&adoptions, "b", held, ("a", 5), LineageRelation::Unrelated);
    // The replica follows the present history of the store.
    check(&adoptions, "c", held, ("c", 8), LineageRelation::Unrelated);
}

fn rows() -> impl Strategy<Value = RevocationRow> {
    let second = || prop::option::of(0..4_i64);
    (any::<bool>(), second(), second(), 1..9_u64).prop_map(|(suspended, watermark_unix_s, expires_at_unix_s, revision)| {
        let row = RevocationRow {
            target: RevocationTarget::Agent("a".to_owned()),
            dead: false,
            suspended,
            watermark_unix_s,
            expires_at_unix_s,
            reason: "r".to_owned(),
            revision,
        };
        // As the rules write them: a suspension stays for good.
        RevocationRow { expires_at_unix_s: expires_at_unix_s.filter(|_| !suspended), ..row }
    })
}

proptest! {
    /// Whatever the store holds and the replicas know, the merged row covers all of it, in any order, and merging again changes
    /// nothing.
    #[test]
    fn merging_weakens_nothing(current in prop::option::of(rows()), one in rows(), other in rows()) {
        let first = merge_rows(current.clone(), &one, 10);
        for known in current.iter().filter(|row| is_in_force(row)).chain([&one].into_iter().filter(|row| is_in_force(row))) {
            prop_assert!(is_covered(Some(&first), known), "{known:?} in {first:?}");
        }
        prop_assert_eq!(merge_rows(Some(first.clone()), &one, 11), first.clone());
        prop_assert!(first.expires_at_unix_s.is_none() || expiry::expires_at(&first, 0).is_some(), "what stays for good does");
        if [&one, &other].into_iter().all(is_in_force) {
            let strength = |row: &RevocationRow| (row.dead, row.suspended, row.watermark_unix_s, row.expires_at_unix_s);
            let there = merge_rows(Some(merge_rows(current.clone(), &one, 10)), &other, 11);
            let back = merge_rows(Some(merge_rows(current.clone(), &other, 10)), &one, 11);
            prop_assert_eq!(strength(&there), strength(&back));
        }
        prop_assert_eq!(uncovered_rows(std::slice::from_ref(&one), &[]).is_empty(), !is_in_force(&one));
        prop_assert!(uncovered_rows(std::slice::from_ref(&one), std::slice::from_ref(&first)).is_empty());
    }
}

#[test]
fn a_merge_brings_only_what_can_be_revoked_so() {
    let row = |target: RevocationTarget, dead: bool, suspended: bool, watermark_unix_s: Option<i64>| RevocationRow {
        target,
        dead,
        suspended,
        watermark_unix_s,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 1,
    };
    let merged = |rows: Vec<RevocationRow>| RevocationMerge {
        history: HistoryId::new("b"),
        incarnation: "i".to_owned(),
        address: "node".to_owned(),
        rows,
    };
    let check =
        |row: RevocationRow, good: bool| assert_eq!(super::check_merge(&merged(vec![row.clone()])).is_ok(), good, "{row:?}");
    check(row(RevocationTarget::Session("s".into()), true, false, None), true);
    check(row(RevocationTarget::Agent("a".into()), false, true, Some(5)), true);
    check(row(RevocationTarget::All, false, false, Some(5)), true);
    check(row(RevocationTarget::Agent("a".into()), true, false, None), false);
    check(row(RevocationTarget::Session("s".into()), false, true, None), false);
    check(row(RevocationTarget::Tool("t".into()), false, true, Some(5)), false);
    check(row(RevocationTarget::Agent("a".into()), false, false, None), false);
    check(row(RevocationTarget::Session(String::new()), true, false, None), false);
    let many = |count: usize| merged(vec![row(RevocationTarget::Session("s".into()), true, false, None); count]);
    assert!(super::check_merge(&many(MERGED_ROWS_MAX)).is_ok() && super::check_merge(&many(MERGED_ROWS_MAX + 1)).is_err());
    assert!(super::check_merge(&RevocationMerge { incarnation: String::new(), ..many(0) }).is_err());
    assert!(
        check_merge_history(&many(0), &HistoryId::new("b")).is_ok()
            && check_merge_history(&many(0), &HistoryId::new("a")).is_err()
    );
}
