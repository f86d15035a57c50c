//! The part of the suite for the kill switch: acts that need two operators, and revocations that expire.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a suite fails by panicking")]

use std::future::Future;
use std::sync::Arc;

use super::{START_UNIX_S, act, kill, put, request, verify_change_log, write};
use crate::model::limits::{REVOCATION_RETENTION_S, TWO_PERSON_WINDOW_MS};
use crate::model::rows::{RevocationKind, RevocationTarget, RowChange, StoreWrite};
use crate::model::time::ManualClock;
use crate::store::expiry::PRUNED_ROWS_MAX;
use crate::store::{CommitOutcome, CommitRequest, Error, Store};

/// Runs every case on a new store.
pub(super) async fn conformance<F: Future<Output = (Arc<dyn Store>, Arc<ManualClock>)>>(new: &impl Fn() -> F) {
    let (store, clock) = new().await;
    everything_is_reinstated_by_two(&*store, &clock).await;
    what_waits_does_not_outlive_another_act(&*new().await.0).await;
    what_waits_counts_for_who_administers(&*new().await.0).await;
    one_racer_is_the_second(new().await.0).await;
    let (store, clock) = new().await;
    what_expired_is_pruned(&*store, &clock).await;
    let (store, clock) = new().await;
    what_must_stay_is_not_pruned(&*store, &clock).await;
    let (store, clock) = new().await;
    one_racer_prunes(store, &clock).await;
}

fn revoke(target: RevocationTarget, meaning: RevocationKind) -> StoreWrite {
    StoreWrite::Revoke { target, kind: meaning, reason: "why".into() }
}

fn revoke_everything() -> Vec<StoreWrite> {
    vec![revoke(RevocationTarget::All, RevocationKind::Suspend)]
}

fn reinstate(operator: &str) -> Vec<StoreWrite> {
    let administrators = vec!["ada".into(), "bob".into(), "cyd".into()];
    vec![StoreWrite::ReinstateByTwo {
        target: RevocationTarget::All,
        reason: "over".into(),
        operator: operator.into(),
        key: key_of(operator),
        administrators,
    }]
}

fn prune(before_unix_s: i64, rows_max: usize) -> Vec<StoreWrite> {
    vec![StoreWrite::Prune { before_unix_s, rows_max }]
}

fn key_of(operator: &str) -> String {
    format!("key of {operator}")
}

async fn is_everything_revoked(store: &dyn Store) -> bool {
    verify_change_log(store).await.revocations.iter().any(|row| row.target == RevocationTarget::All && row.suspended)
}

async fn refused(store: &dyn Store, writes: Vec<StoreWrite>) {
    let before = store.revision().await.unwrap();
    let answer = write(store, writes).await;
    assert!(matches!(answer, Err(Error::Rejected(_))), "{answer:?}");
    assert_eq!(store.revision().await.unwrap(), before, "what was refused made no revision");
}

async fn everything_is_reinstated_by_two(store: &dyn Store, clock: &ManualClock) {
    refused(store, reinstate("ada")).await;
    write(store, revoke_everything()).await.unwrap();
    let first = CommitRequest { act: Some(act(&["j1"], 60)), ..request(reinstate("ada")) };
    let waits = store.commit(first.clone()).await.unwrap();
    assert_eq!((waits.revision.number, waits.changes.as_slice()), (2, &[][..]), "a revision that changes nothing");
    assert!(is_everything_revoked(store).await);
    // None of these is a second operator: the same operator, the same signature, an operator who may not administer.
    refused(store, reinstate("ada")).await;
    assert!(matches!(store.commit(first).await, Err(Error::ActReplayed { .. })));
    refused(store, reinstate("eve")).await;
    clock.advance_ms(TWO_PERSON_WINDOW_MS - 1);
    let done = write(store, reinstate("bob")).await.unwrap();
    assert!(matches!(done.changes.as_slice(), [RowChange::Revocation(row)] if !row.suspended && row.reason == "over"));
    assert!(!is_everything_revoked(store).await);
    refused(store, reinstate("cyd")).await;

    // It comes too late, so it counts as a first call, whoever makes it.
    write(store, revoke_everything()).await.unwrap();
    write(store, reinstate("ada")).await.unwrap();
    clock.advance_ms(TWO_PERSON_WINDOW_MS);
    assert_eq!(write(store, reinstate("bob")).await.unwrap().changes, []);
    assert!(is_everything_revoked(store).await);
    // A clock that jumped back does not prolong the wait.
    clock.step_wall_ms(-1);
    assert_eq!(write(store, reinstate("ada")).await.unwrap().changes, []);
    clock.step_wall_ms(1);
    assert_eq!(write(store, reinstate("bob")).await.unwrap().changes.len(), 1);
    assert!(!is_everything_revoked(store).await);
}

async fn what_waits_does_not_outlive_another_act(store: &dyn Store) {
    // An operator revoked everything again in the meantime, whether or not it was lifted in between.
    let lift = || vec![StoreWrite::Reinstate { target: RevocationTarget::All, reason: "two signed".into() }];
    for between in [vec![revoke_everything()], vec![lift(), revoke_everything()]] {
        write(store, revoke_everything()).await.unwrap();
        write(store, reinstate("ada")).await.unwrap();
        for writes in between {
            write(store, writes).await.unwrap();
        }
        assert_eq!(write(store, reinstate("bob")).await.unwrap().changes, [], "bob is the first now");
        assert!(is_everything_revoked(store).await);
        assert_eq!(write(store, reinstate("ada")).await.unwrap().changes.len(), 1);
    }
    // Other acts have no effect.
    write(store, revoke_everything()).await.unwrap();
    write(store, reinstate("ada")).await.unwrap();
    write(store, vec![kill("t"), put("agent", "a", "{}")]).await.unwrap();
    assert_eq!(write(store, reinstate("bob")).await.unwrap().changes.len(), 1);
}

async fn what_waits_counts_for_who_administers(store: &dyn Store) {
    write(store, revoke_everything()).await.unwrap();
    write(store, reinstate("ada")).await.unwrap();
    let write_of_bob = StoreWrite::ReinstateByTwo {
        target: RevocationTarget::All,
        reason: String::new(),
        operator: "bob".into(),
        key: key_of("bob"),
        administrators: vec!["bob".into(), "cyd".into()],
    };
    assert_eq!(write(store, vec![write_of_bob]).await.unwrap().changes, [], "ada administers no more");
    assert!(is_everything_revoked(store).await);
}

async fn one_racer_is_the_second(store: Arc<dyn Store>) {
    write(&*store, revoke_everything()).await.unwrap();
    let racers: Vec<_> = ["ada", "bob", "cyd"]
        .map(|operator| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { write(&*store, reinstate(operator)).await })
        })
        .into();
    let mut outcomes: Vec<Result<usize, ()>> = Vec::new();
    for racer in racers {
        outcomes.push(racer.await.unwrap().map(|done| done.changes.len()).map_err(|_| ()));
    }
    outcomes.sort();
    assert_eq!(outcomes, [Ok(0), Ok(1), Err(())], "one waits, one carries out, one finds nothing to reinstate");
    assert!(!is_everything_revoked(&*store).await);
}

fn removed(committed: &CommitOutcome) -> usize {
    committed.changes.iter().filter(|change| matches!(change, RowChange::RevocationRemoved(_))).count()
}

async fn what_expired_is_pruned(store: &dyn Store, clock: &ManualClock) {
    let skew_s = store.load().await.unwrap().settings.iat_skew_s;
    for id in 0..5 {
        write(store, vec![kill(&format!("t{id}"))]).await.unwrap();
        clock.advance_ms(1000);
    }
    // The first row expires a moment after this, the four others a second later each.
    clock.advance_ms((REVOCATION_RETENTION_S + skew_s - 5) * 1000);
    let now = || START_UNIX_S + REVOCATION_RETENTION_S + skew_s;
    refused(store, prune(i64::MAX, 10)).await;
    clock.advance_ms(1000);
    refused(store, prune(now(), 10)).await;
    let first = write(store, prune(i64::MAX, 10)).await.unwrap();
    assert_eq!(first.changes, [RowChange::RevocationRemoved(RevocationTarget::Token("t0".into()))]);
    let state = verify_change_log(store).await;
    assert_eq!((state.revocations.len(), store.revocations(100).await.unwrap().total), (4, 4));
    clock.advance_ms(10_000);
    assert_eq!(removed(&write(store, prune(i64::MAX, 3)).await.unwrap()), 3, "at most so many, the oldest first");
    assert_eq!(verify_change_log(store).await.revocations[0].target, RevocationTarget::Token("t4".into()));
    // A pruned row can be revoked again.
    write(store, vec![kill("t0")]).await.unwrap();
    assert_eq!(verify_change_log(store).await.revocations.len(), 2);
    refused(store, prune(i64::MAX, PRUNED_ROWS_MAX + 1)).await;
    refused(store, [prune(i64::MAX, 1), vec![kill("u")]].concat()).await;
}

async fn what_must_stay_is_not_pruned(store: &dyn Store, clock: &ManualClock) {
    let agent = |id: &str| RevocationTarget::Agent(id.into());
    let writes = vec![
        revoke(RevocationTarget::Session("s".into()), RevocationKind::Dead),
        revoke(RevocationTarget::Task("t".into()), RevocationKind::Dead),
        revoke(RevocationTarget::Key("k".repeat(43)), RevocationKind::Dead),
        revoke(agent("suspended"), RevocationKind::Watermark),
        revoke(agent("suspended"), RevocationKind::Suspend),
        revoke(agent("marked"), RevocationKind::Watermark),
        revoke(agent("back"), RevocationKind::Suspend),
        StoreWrite::Reinstate { target: agent("back"), reason: String::new() },
        revoke(RevocationTarget::Hop("h".repeat(43)), RevocationKind::Dead),
        revoke(RevocationTarget::All, RevocationKind::Suspend),
    ];
    write(store, writes).await.unwrap();
    clock.advance_ms(REVOCATION_RETENTION_S * 1000 * 2);
    let mut gone = write(store, prune(i64::MAX, 100)).await.unwrap().changes;
    gone.sort_by_key(|change| format!("{change:?}"));
    let mut expected = [agent("back"), agent("marked"), RevocationTarget::Hop("h".repeat(43))].map(RowChange::RevocationRemoved);
    expected.sort_by_key(|change| format!("{change:?}"));
    assert_eq!(gone, expected);
    assert_eq!(verify_change_log(store).await.revocations.len(), 5);
    // The time of a row begins once its suspension is lifted.
    write(store, vec![StoreWrite::Reinstate { target: agent("suspended"), reason: String::new() }]).await.unwrap();
    refused(store, prune(i64::MAX, 100)).await;
    clock.advance_ms((REVOCATION_RETENTION_S + 301) * 1000);
    assert_eq!(write(store, prune(i64::MAX, 100)).await.unwrap().changes, [RowChange::RevocationRemoved(agent("suspended"))]);
    // A row that is suspended again stays.
    write(store, vec![revoke(agent("again"), RevocationKind::Watermark)]).await.unwrap();
    write(store, vec![revoke(agent("again"), RevocationKind::Suspend)]).await.unwrap();
    clock.advance_ms(REVOCATION_RETENTION_S * 1000 * 2);
    refused(store, prune(i64::MAX, 100)).await;
}

async fn one_racer_prunes(store: Arc<dyn Store>, clock: &ManualClock) {
    write(&*store, (0..100).map(|id| kill(&format!("t{id}"))).collect()).await.unwrap();
    clock.advance_ms(REVOCATION_RETENTION_S * 1000 * 2);
    let racers: Vec<_> = (0..4)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { write(&*store, prune(i64::MAX, 1000)).await })
        })
        .collect();
    let mut rows = Vec::new();
    for racer in racers {
        rows.extend(racer.await.unwrap().map(|done| removed(&done)));
    }
    assert_eq!(rows, [100]);
    assert_eq!(store.revision().await.unwrap().number, 2);
    verify_change_log(&*store).await;
}
