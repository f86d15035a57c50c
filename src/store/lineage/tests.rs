//! How a store relates to a replica of an earlier history, and merging: the stronger of both rows, in any order.
use proptest::prelude::*;

use super::*;

fn revision(history: &str, number: u64) -> Revision {
    Revision { history: HistoryId::new(history), number }
}

fn adoption(history: &str, from: &str, number: u64) -> Adoption {
    Adoption { history: HistoryId::new(history), from: revision(from, number), from_hash: [9; 32], unix_ms: 0 }
}

#[test]
fn only_a_store_adopted_from_it_is_kin() {
    let adoptions = [adoption("b", "a", 5), adoption("c", "b", 7)];
    let check = |adoptions: &[Adoption], now: &str, hash_at: Option<[u8; 32]>, stood: (&str, u64), expected: Kinship| {
        let lineage = Lineage { revision: revision(now, 8), hash_at, adoptions: adoptions.to_vec() };
        assert_eq!(lineage.kinship(&revision(stood.0, stood.1), &[1; 32]), expected, "{now} {hash_at:?} {stood:?}");
    };
    let held = Some([1; 32]);
    check(&adoptions, "c", held, ("b", 7), Kinship::Holds);
    check(&adoptions, "c", held, ("a", 5), Kinship::Holds);
    check(&adoptions, "c", held, ("a", 3), Kinship::Holds);
    // Ahead of the backup, of another past, or at a revision that the log no longer holds.
    check(&adoptions, "c", held, ("a", 6), Kinship::Lacks);
    check(&adoptions, "c", held, ("b", 8), Kinship::Lacks);
    check(&adoptions, "c", Some([2; 32]), ("a", 5), Kinship::Lacks);
    check(&adoptions, "c", None, ("a", 5), Kinship::Lacks);
    // No adoption, an unrelated history, or an adoption that does not lead to the store's history.
    check(&[], "c", held, ("a", 5), Kinship::Stranger);
    check(&adoptions, "c", held, ("x", 5), Kinship::Stranger);
    check(&adoptions, "d", held, ("a", 5), Kinship::Stranger);
    check(&adoptions[..1], "c", held, ("a", 5), Kinship::Stranger);
    check(&adoptions, "b", held, ("a", 5), Kinship::Stranger);
    // The replica follows the present history of the store.
    check(&adoptions, "c", held, ("c", 8), Kinship::Stranger);
}

fn rows() -> impl Strategy<Value = RevocationRow> {
    let second = || prop::option::of(0..4_i64);
    (any::<bool>(), second(), second(), 1..9_u64).prop_map(|(suspended, watermark_unix_s, expires_at_unix_s, revision)| {
        let row = RevocationRow {
            target: Target::Agent("a".to_owned()),
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
        let first = merge(current.clone(), &one, 10);
        for known in current.iter().filter(|row| revokes(row)).chain([&one].into_iter().filter(|row| revokes(row))) {
            prop_assert!(covers(Some(&first), known), "{known:?} in {first:?}");
        }
        prop_assert_eq!(merge(Some(first.clone()), &one, 11), first.clone());
        prop_assert!(first.expires_at_unix_s.is_none() || lapse::lapses_at(&first, 0).is_some(), "what stays for good does");
        if [&one, &other].into_iter().all(revokes) {
            let strength = |row: &RevocationRow| (row.dead, row.suspended, row.watermark_unix_s, row.expires_at_unix_s);
            let there = merge(Some(merge(current.clone(), &one, 10)), &other, 11);
            let back = merge(Some(merge(current.clone(), &other, 10)), &one, 11);
            prop_assert_eq!(strength(&there), strength(&back));
        }
        prop_assert_eq!(lacking(std::slice::from_ref(&one), &[]).is_empty(), !revokes(&one));
        prop_assert!(lacking(std::slice::from_ref(&one), std::slice::from_ref(&first)).is_empty());
    }
}

#[test]
fn a_merge_brings_only_what_can_be_revoked_so() {
    let row = |target: Target, dead: bool, suspended: bool, watermark_unix_s: Option<i64>| RevocationRow {
        target,
        dead,
        suspended,
        watermark_unix_s,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 1,
    };
    let merged = |rows: Vec<RevocationRow>| Merge {
        history: HistoryId::new("b"),
        incarnation: "i".to_owned(),
        address: "node".to_owned(),
        rows,
    };
    let check = |row: RevocationRow, good: bool| assert_eq!(super::check(&merged(vec![row.clone()])).is_ok(), good, "{row:?}");
    check(row(Target::Session("s".into()), true, false, None), true);
    check(row(Target::Agent("a".into()), false, true, Some(5)), true);
    check(row(Target::All, false, false, Some(5)), true);
    check(row(Target::Agent("a".into()), true, false, None), false);
    check(row(Target::Session("s".into()), false, true, None), false);
    check(row(Target::Tool("t".into()), false, true, Some(5)), false);
    check(row(Target::Agent("a".into()), false, false, None), false);
    check(row(Target::Session(String::new()), true, false, None), false);
    let many = |count: usize| merged(vec![row(Target::Session("s".into()), true, false, None); count]);
    assert!(super::check(&many(MERGED_ROWS_MAX)).is_ok() && super::check(&many(MERGED_ROWS_MAX + 1)).is_err());
    assert!(super::check(&Merge { incarnation: String::new(), ..many(0) }).is_err());
    assert!(check_history(&many(0), &HistoryId::new("b")).is_ok() && check_history(&many(0), &HistoryId::new("a")).is_err());
}
