//! The part of the suite for restored stores: adopting a store, and merging the replicas' revocations into it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a suite fails by panicking")]

use std::future::Future;
use std::sync::Arc;

use super::{START_UNIX_S, act, kill, put, registration, request, verify_change_log, write};
use crate::model::limits::REVOCATION_RETENTION_S;
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{RevocationKind, RevocationMerge, RevocationRow, RevocationTarget, RowChange, StoreWrite};
use crate::model::time::ManualClock;
use crate::store::lineage::MERGED_ROWS_MAX;
use crate::store::{CommitOutcome, CommitRequest, Error, LineageRelation, ReplicaHeartbeat, ReplicaState, Store};

/// Runs every case on a new store.
pub(super) async fn conformance<F: Future<Output = (Arc<dyn Store>, Arc<ManualClock>)>>(new: &impl Fn() -> F) {
    a_new_history_goes_on_from_the_old(&*new().await.0).await;
    adoptions_follow_each_other(&*new().await.0).await;
    an_adoption_stands_alone_and_is_signed(&*new().await.0).await;
    what_belonged_to_the_old_history_is_gone(&*new().await.0).await;
    merging_makes_stronger_and_never_weaker(&*new().await.0).await;
    a_merge_is_of_the_present_history(&*new().await.0).await;
    let (store, clock) = new().await;
    what_a_watermark_on_all_killed_is_pruned(&*store, &clock).await;
    racing_replicas_merge_once(new().await.0).await;
}

async fn adopt(store: &dyn Store, jti: &str) -> CommitOutcome {
    let writes = vec![StoreWrite::Adopt { reason: "restored".into() }];
    store.commit(CommitRequest { act: Some(act(&[jti], 60)), ..request(writes) }).await.unwrap()
}

fn merge(of: &Revision, incarnation: &str, rows: Vec<RevocationRow>) -> Vec<StoreWrite> {
    vec![StoreWrite::Merge(RevocationMerge {
        history: of.history.clone(),
        incarnation: incarnation.into(),
        address: "node-1".into(),
        rows,
    })]
}

fn row(target: RevocationTarget, dead: bool, suspended: bool, watermark_unix_s: Option<i64>) -> RevocationRow {
    RevocationRow { target, dead, suspended, watermark_unix_s, expires_at_unix_s: None, reason: "known".into(), revision: 77 }
}

async fn refused(store: &dyn Store, asked: CommitRequest) {
    let before = verify_change_log(store).await;
    let answer = store.commit(asked.clone()).await;
    assert!(matches!(answer, Err(Error::Rejected(_))), "{asked:?}: {answer:?}");
    assert_eq!(verify_change_log(store).await, before, "what was refused wrote nothing");
}

async fn a_new_history_goes_on_from_the_old(store: &dyn Store) {
    write(store, vec![put("agent", "a", "{}"), kill("t")]).await.unwrap();
    let before = write(store, vec![kill("u")]).await.unwrap().revision;
    let stood = verify_change_log(store).await;
    assert_eq!(store.lineage(2).await.unwrap().adoptions, []);
    let adopted = adopt(store, "j").await;
    assert_ne!(adopted.revision.history, before.history);
    assert_eq!((adopted.revision.number, adopted.changes.len()), (3, 1), "dense, and every root is void");
    let state = verify_change_log(store).await;
    assert_eq!(state.revision, adopted.revision);
    assert_eq!(state.documents, stood.documents);
    let all = state.revocations.iter().find(|row| row.target == RevocationTarget::All).unwrap();
    assert_eq!(all.watermark_unix_s, Some(START_UNIX_S + state.settings.iat_skew_s));
    assert!(!all.suspended && !all.dead);
    // The log's answer to the position of a replica.
    let check = async |number: u64, hash: [u8; 32], expected: LineageRelation| {
        let lineage = store.lineage(number).await.unwrap();
        assert_eq!(lineage.revision, adopted.revision);
        let stood = Revision { number, ..before.clone() };
        assert_eq!(lineage.relation_to(&stood, &hash), expected, "{number}");
    };
    let first = store.changes(0).await.unwrap().commits[0].hash;
    check(2, stood.hash, LineageRelation::Contains).await;
    check(1, first, LineageRelation::Contains).await;
    check(0, [0; 32], LineageRelation::Contains).await;
    check(1, stood.hash, LineageRelation::MayLack).await;
    check(3, state.hash, LineageRelation::MayLack).await;
    check(99, [1; 32], LineageRelation::MayLack).await;
    write(store, vec![kill("v")]).await.unwrap();
    assert_eq!(verify_change_log(store).await.revision, Revision { number: 4, ..adopted.revision });
}

async fn adoptions_follow_each_other(store: &dyn Store) {
    let first = write(store, vec![kill("t")]).await.unwrap().revision;
    let hash = store.load().await.unwrap().hash;
    let mut histories = vec![first.history.clone()];
    for jti in ["j1", "j2", "j3"] {
        histories.push(adopt(store, jti).await.revision.history);
    }
    let lineage = store.lineage(1).await.unwrap();
    let said: Vec<_> =
        lineage.adoptions.iter().map(|one| (one.from.history.clone(), one.history.clone(), one.from.number)).collect();
    let expected = (0..3).map(|index| (histories[index].clone(), histories[index + 1].clone(), index as u64 + 1));
    assert_eq!(said, expected.collect::<Vec<_>>());
    assert_eq!(lineage.relation_to(&first, &hash), LineageRelation::Contains);
    let second = Revision { history: histories[1].clone(), number: 9 };
    assert_eq!(store.lineage(9).await.unwrap().relation_to(&second, &hash), LineageRelation::MayLack);
    assert_eq!(lineage.relation_to(&Revision { history: HistoryId::new("x"), number: 1 }, &hash), LineageRelation::Unrelated);
}

async fn an_adoption_stands_alone_and_is_signed(store: &dyn Store) {
    write(store, vec![kill("t")]).await.unwrap();
    let adoption = || StoreWrite::Adopt { reason: "restored".into() };
    refused(store, request(vec![adoption()])).await;
    refused(store, CommitRequest { act: Some(act(&["j"], 60)), ..request(vec![adoption(), kill("u")]) }).await;
    refused(store, CommitRequest { act: Some(act(&["j"], 60)), ..request(vec![adoption(), adoption()]) }).await;
    let long = StoreWrite::Adopt { reason: "x".repeat(crate::model::limits::ACT_REASON_BYTES_MAX + 1) };
    refused(store, CommitRequest { act: Some(act(&["j"], 60)), ..request(vec![long]) }).await;
    let adopted = adopt(store, "j").await;
    // The signature counts as used in the new history too.
    let again = CommitRequest { act: Some(act(&["j"], 60)), ..request(vec![adoption()]) };
    assert_eq!(store.commit(again).await, Err(Error::ActReplayed { jti: "j".into() }));
    assert_eq!(store.revision().await, Ok(adopted.revision));
}

async fn what_belonged_to_the_old_history_is_gone(store: &dyn Store) {
    let shut = StoreWrite::Revoke { target: RevocationTarget::All, kind: RevocationKind::Suspend, reason: "why".into() };
    write(store, vec![shut]).await.unwrap();
    let half = |operator: &str| {
        let administrators = vec!["ada".into(), "bob".into()];
        let (target, key) = (RevocationTarget::All, format!("key of {operator}"));
        vec![StoreWrite::ReinstateByTwo { target, reason: "over".into(), operator: operator.into(), key, administrators }]
    };
    write(store, half("ada")).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    let beat = ReplicaHeartbeat { incarnation: "a".into(), applied_number: 2, acked_number: 2, state: ReplicaState::Serving };
    store.write_heartbeat(&beat).await.unwrap();
    adopt(store, "j").await;
    // An acknowledgement for the old history means nothing in the new one.
    let replicas = store.replicas().await.unwrap().rows;
    let said: Vec<_> = replicas.iter().map(|one| (one.applied_number, one.acked_number, one.state)).collect();
    assert_eq!(said, [(0, 0, ReplicaState::Starting)]);
    // The first of two signatures, from before the adoption, finds no second one.
    let waits = write(store, half("bob")).await.unwrap();
    assert_eq!(waits.changes, [], "bob is the first now");
    let all = verify_change_log(store).await.revocations.into_iter().find(|row| row.target == RevocationTarget::All).unwrap();
    assert!(all.suspended && all.watermark_unix_s.is_some(), "an adoption lifts nothing");
}

async fn merging_makes_stronger_and_never_weaker(store: &dyn Store) {
    let agent = |id: &str| RevocationTarget::Agent(id.into());
    let session = RevocationTarget::Session("s".into());
    let suspend = |id: &str| StoreWrite::Revoke { target: agent(id), kind: RevocationKind::Suspend, reason: "held".into() };
    let mark = |id: &str| StoreWrite::Revoke { target: agent(id), kind: RevocationKind::Watermark, reason: "held".into() };
    write(store, vec![suspend("both"), mark("older"), suspend("here"), mark("newer")]).await.unwrap();
    let of = adopt(store, "j").await.revision;
    let held = verify_change_log(store).await;
    let marked = held.revocations.iter().find(|row| row.target == agent("older")).unwrap().watermark_unix_s.unwrap();
    let known = vec![
        row(session.clone(), true, false, None),
        row(agent("both"), false, true, Some(5)),
        row(agent("older"), false, false, Some(marked - 9)),
        RevocationRow {
            expires_at_unix_s: Some(marked + REVOCATION_RETENTION_S),
            ..row(agent("newer"), false, false, Some(marked + 9))
        },
    ];
    let done = write(store, merge(&of, "one", known.clone())).await.unwrap();
    assert_eq!(done.revision, Revision { number: 3, ..of.clone() });
    let state = verify_change_log(store).await;
    let is = |target: &RevocationTarget| {
        let row = state.revocations.iter().find(|row| row.target == *target).unwrap();
        (row.dead, row.suspended, row.watermark_unix_s, row.expires_at_unix_s, row.reason.as_str(), row.revision)
    };
    assert_eq!(is(&session), (true, false, None, None, "known", 3));
    assert_eq!(is(&agent("both")), (false, true, Some(5), None, "known", 3));
    assert_eq!(is(&agent("here")), (false, true, None, None, "held", 1));
    // The watermark stays, and the row that never expires is the stronger of both.
    assert_eq!(is(&agent("older")), (false, false, Some(marked), None, "known", 3));
    assert_eq!(is(&agent("newer")).2, Some(marked + 9));
    assert!(state.revocations.iter().all(|row| {
        held.revocations.iter().all(|was| was.target != row.target || crate::store::lineage::is_covered(Some(row), was))
    }));
    // A repeated merge, and one by another replica, is recorded but changes nothing.
    for (incarnation, rows) in [("one", known.clone()), ("two", known[..1].to_vec()), ("three", vec![])] {
        assert_eq!(write(store, merge(&of, incarnation, rows)).await.unwrap().changes, []);
    }
    assert_eq!(verify_change_log(store).await.revocations, state.revocations);
    let merged: Vec<_> = store.merges().await.unwrap().into_iter().map(|one| (one.incarnation, one.address, one.rows)).collect();
    let said = |name: &str, rows: u64| (name.to_owned(), "node-1".to_owned(), rows);
    assert_eq!(merged, [said("one", 4), said("three", 0), said("two", 0)]);
    adopt(store, "j2").await;
    assert_eq!(store.merges().await, Ok(vec![]), "of the present history");
}

async fn a_merge_is_of_the_present_history(store: &dyn Store) {
    let old = write(store, vec![kill("t")]).await.unwrap().revision;
    let of = adopt(store, "j").await.revision;
    let known = || vec![row(RevocationTarget::Session("s".into()), true, false, None)];
    refused(store, request(merge(&old, "one", known()))).await;
    refused(store, request([merge(&of, "one", known()), vec![kill("u")]].concat())).await;
    refused(store, request(merge(&of, "", known()))).await;
    refused(store, request(merge(&of, "one", vec![row(RevocationTarget::Agent("a".into()), true, false, None)]))).await;
    refused(store, request(merge(&of, "one", vec![row(RevocationTarget::Agent("a".into()), false, false, None)]))).await;
    let many =
        |count: usize| (0..count).map(|index| row(RevocationTarget::Session(format!("s{index}")), true, false, None)).collect();
    refused(store, request(merge(&of, "one", many(MERGED_ROWS_MAX + 1)))).await;
    let done = write(store, merge(&of, "one", many(MERGED_ROWS_MAX))).await.unwrap();
    assert!(done.changes.iter().all(|change| matches!(change, RowChange::Revocation(row) if row.revision == 3)));
    assert_eq!(verify_change_log(store).await.revocations.len(), MERGED_ROWS_MAX + 2);
}

async fn what_a_watermark_on_all_killed_is_pruned(store: &dyn Store, clock: &ManualClock) {
    adopt(store, "j").await;
    let skew_s = store.load().await.unwrap().settings.iat_skew_s;
    let prune = || vec![StoreWrite::Prune { before_unix_s: i64::MAX, rows_max: 9 }];
    clock.advance_ms((skew_s + REVOCATION_RETENTION_S) * 1000);
    refused(store, request(prune())).await;
    clock.advance_ms(1_000);
    assert_eq!(write(store, prune()).await.unwrap().changes, [RowChange::RevocationRemoved(RevocationTarget::All)]);
}

async fn racing_replicas_merge_once(store: Arc<dyn Store>) {
    write(&*store, vec![kill("t")]).await.unwrap();
    let of = adopt(&*store, "j").await.revision;
    let racers: Vec<_> = (0..8)
        .map(|racer| {
            let (store, of) = (store.clone(), of.clone());
            tokio::spawn(async move {
                let known = (0..20).map(|index| row(RevocationTarget::Session(format!("s{index}")), true, false, None)).collect();
                write(&*store, merge(&of, &format!("r{racer}"), known)).await.unwrap().changes.len()
            })
        })
        .collect();
    let mut changed = Vec::new();
    for racer in racers {
        changed.push(racer.await.unwrap());
    }
    changed.sort_unstable();
    assert_eq!(changed, [0, 0, 0, 0, 0, 0, 0, 20]);
    assert_eq!(store.merges().await.unwrap().iter().map(|one| one.rows).sum::<u64>(), 20);
    assert_eq!(verify_change_log(&*store).await.revision.number, 10);
}
