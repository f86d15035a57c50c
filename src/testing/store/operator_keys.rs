//! The part of the suite for operators' keys: a revoked key signs nothing, and at least one operator who can sign is left.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a suite fails by panicking")]

use std::future::Future;
use std::sync::Arc;

use super::{act, kill, put, request, verify_change_log, write};
use crate::model::rows::{ActRow, DocumentKey, RevocationKind, RevocationRow, RevocationTarget, RowChange, StoreWrite};
use crate::model::time::ManualClock;
use crate::store::{CommitOutcome, CommitRequest, Error, Store};

/// Runs every case on a new store.
pub(super) async fn conformance<F: Future<Output = (Arc<dyn Store>, Arc<ManualClock>)>>(new: &impl Fn() -> F) {
    a_revoked_key_signs_nothing(&*new().await.0).await;
    a_first_half_dies_with_its_key(&*new().await.0).await;
    a_target_waits_for_its_own_second(&*new().await.0).await;
    somebody_is_left_who_can_sign(new().await.0).await;
    rows_are_found_by_name(&*new().await.0).await;
}

/// Revokes a key.
pub(super) fn revoke_key(key: &str) -> StoreWrite {
    StoreWrite::Revoke { target: RevocationTarget::Key(key.into()), kind: RevocationKind::Dead, reason: "stolen".into() }
}

fn signed_by(keys: &[&str], jti: &str, writes: Vec<StoreWrite>) -> CommitRequest {
    let keys = keys.iter().map(|key| (*key).to_owned()).collect();
    CommitRequest { act: Some(ActRow { keys, ..act(&[jti], 60) }), ..request(writes) }
}

async fn a_revoked_key_signs_nothing(store: &dyn Store) {
    store.commit(signed_by(&["a"], "1", vec![kill("t1")])).await.unwrap();
    // The act that revokes a key may be signed by that same key, which is valid until then.
    store.commit(signed_by(&["a"], "2", vec![revoke_key("a")])).await.unwrap();
    let before = verify_change_log(store).await;
    let writes = [
        vec![kill("t2")],
        vec![put("agent", "x", "{}")],
        vec![revoke_key("a")],
        vec![StoreWrite::Adopt { reason: String::new() }],
        vec![],
    ];
    for writes in writes {
        for keys in [&["a"][..], &["a", "b"], &["b", "a"]] {
            let refused = store.commit(signed_by(keys, "3", writes.clone())).await;
            assert_eq!(refused, Err(Error::SignerRevoked { thumbprint: "a".into() }), "{keys:?} {writes:?}");
            assert_eq!(verify_change_log(store).await, before);
        }
    }
    store.commit(signed_by(&["b"], "3", vec![kill("t2")])).await.unwrap();
    for long in [signed_by(&[""], "4", vec![kill("t")]), signed_by(&["a\0"], "4", vec![kill("t")])] {
        let refused = store.commit(long).await;
        assert!(matches!(refused, Err(Error::Rejected(_))), "{refused:?}");
    }
}

fn by_two(target: &RevocationTarget, operator: &str, key: &str) -> Vec<StoreWrite> {
    vec![StoreWrite::ReinstateByTwo {
        target: target.clone(),
        reason: "over".into(),
        operator: operator.into(),
        key: key.into(),
        administrators: vec!["ada".into(), "bob".into(), "cyd".into()],
    }]
}

fn suspend(target: &RevocationTarget) -> StoreWrite {
    StoreWrite::Revoke { target: target.clone(), kind: RevocationKind::Suspend, reason: "why".into() }
}

fn lifts(committed: &CommitOutcome) -> bool {
    matches!(committed.changes.as_slice(), [RowChange::Revocation(RevocationRow { suspended: false, .. })])
}

async fn a_first_half_dies_with_its_key(store: &dyn Store) {
    for target in [RevocationTarget::All, RevocationTarget::Agent("a".into())] {
        write(store, vec![suspend(&target)]).await.unwrap();
        assert!(!lifts(&write(store, by_two(&target, "ada", "a1")).await.unwrap()));
        write(store, vec![revoke_key("a1")]).await.unwrap();
        assert!(!lifts(&write(store, by_two(&target, "bob", "b")).await.unwrap()), "bob is the first now");
        assert!(lifts(&write(store, by_two(&target, "ada", "a2")).await.unwrap()), "ada has another key");
    }
}

async fn a_target_waits_for_its_own_second(store: &dyn Store) {
    let long = RevocationTarget::Delegation { issuer: "i".repeat(2_000), subject: "s".repeat(2_000), agent: "a".repeat(2_000) };
    let targets = [
        RevocationTarget::All,
        RevocationTarget::Agent("a".into()),
        RevocationTarget::Agent("b".into()),
        RevocationTarget::Tool("a".into()),
        long,
    ];
    for target in &targets {
        write(store, vec![suspend(target)]).await.unwrap();
        assert!(!lifts(&write(store, by_two(target, "ada", "a")).await.unwrap()), "{target}");
    }
    // The second call for one target does not complete the first call for another.
    write(store, vec![suspend(&targets[1])]).await.unwrap();
    assert!(!lifts(&write(store, by_two(&targets[1], "bob", "b")).await.unwrap()), "suspended again: decided anew");
    for target in targets.iter().filter(|target| **target != targets[1]) {
        assert!(lifts(&write(store, by_two(target, "bob", "b")).await.unwrap()), "{target}");
    }
    let refused = write(store, by_two(&targets[2], "cyd", "c")).await;
    assert!(matches!(refused, Err(Error::Rejected(_))), "there is nothing to reinstate: {refused:?}");
}

async fn somebody_is_left_who_can_sign(store: Arc<dyn Store>) {
    let left = |keys: &[&str], writes: Vec<StoreWrite>| CommitRequest {
        keep_one_unrevoked: keys.iter().map(|key| (*key).to_owned()).collect(),
        ..request(writes)
    };
    store.commit(left(&["a", "b"], vec![revoke_key("a")])).await.unwrap();
    let before = verify_change_log(&*store).await;
    let refused = store.commit(left(&["a", "b"], vec![revoke_key("b")])).await;
    assert_eq!(refused, Err(Error::NoSignerLeft));
    assert_eq!(verify_change_log(&*store).await, before);
    store.commit(left(&["a", "b"], vec![kill("t")])).await.unwrap();
    // However many acts race, one operator is left.
    let racers = ["c", "d", "e"].map(|key| {
        let store = Arc::clone(&store);
        let request = left(&["c", "d", "e"], vec![revoke_key(key)]);
        tokio::spawn(async move { store.commit(request).await.is_ok() })
    });
    let mut done = 0;
    for racer in racers {
        done += usize::from(racer.await.unwrap());
    }
    assert_eq!(done, 2);
}

async fn rows_are_found_by_name(store: &dyn Store) {
    let key = |kind: &str, id: &str| DocumentKey { kind: kind.into(), id: id.into() };
    write(store, vec![put("agent", "a", "{}"), put("agent", "b", "[]"), put("tool", "a", "{}")]).await.unwrap();
    write(store, vec![revoke_key("k"), kill("t")]).await.unwrap();
    let named = [key("tool", "a"), key("agent", "b"), key("agent", "b"), key("agent", "none")];
    let found = store.documents_by_key(&named).await.unwrap();
    let names: Vec<_> = found.documents.iter().map(|one| (one.row.key.clone(), one.revision)).collect();
    assert_eq!((found.revision.number, names), (2, vec![(key("agent", "b"), 1), (key("tool", "a"), 1)]));
    assert_eq!(store.documents_by_key(&[]).await.unwrap().documents, []);
    let targets = [
        RevocationTarget::Key("k".into()),
        RevocationTarget::Key("t".into()),
        RevocationTarget::Token("t".into()),
        RevocationTarget::All,
    ];
    let mut found: Vec<_> = store.revocations_of(&targets).await.unwrap().into_iter().map(|row| row.target).collect();
    found.sort();
    assert_eq!(found, [RevocationTarget::Key("k".into()), RevocationTarget::Token("t".into())]);
    assert_eq!(store.revocations_of(&[]).await, Ok(vec![]));
}
