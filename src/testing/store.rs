//! The conformance suite that every store must pass: numbers, hashes, digest, conflicts, single use, races, the rules of
//! revocation.
//!
//! It uses only the trait [`Store`] and knows no engine. A store's own tests call [`conformance`], and add the cases that only that
//! engine can get wrong.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a suite fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;

use crate::model::limits::REVOCATION_RETENTION_S;
use crate::model::replica::ReplicaCondition;
use crate::model::rows::{
    ActRow, DocumentKey, DocumentOrigin, DocumentRow, RevocationKind, RevocationRow, RevocationTarget, RowChange, StoreWrite,
};
use crate::model::time::{Clock as _, ManualClock};
use crate::store::fleet::{self, SILENCE_MS_MAX};
use crate::store::hash_chain::{GENESIS, document_sha256, revocation_sha256, state_digest};
use crate::store::{
    CommitMetadata, CommitOutcome, CommitRequest, CommitRow, Error, ReplicaHeartbeat, ReplicaRegistration, ReplicaState, Store,
    StoreState, StoredDocument, write_rules,
};

mod adoption;
mod approvals;
mod faulty_store;
mod kill;
mod operator_keys;

pub use faulty_store::FaultyStore;

/// The first reading of the clock of every store under test, in seconds.
pub const START_UNIX_S: i64 = 1_750_000_000;

/// Runs every case on a new store, made with the clock that the case uses.
///
/// # Panics
/// If the store fails a case.
pub async fn conformance<F: Future<Output = Arc<dyn Store>>>(make: impl Fn(Arc<ManualClock>) -> F) {
    let new = || async {
        let clock = Arc::new(ManualClock::at_unix_s(START_UNIX_S));
        (make(Arc::clone(&clock)).await, clock)
    };
    begins_empty(&*new().await.0).await;
    revisions_are_dense_and_chained(&*new().await.0).await;
    documents_are_put_and_removed(&*new().await.0).await;
    expectations_conflict(&*new().await.0).await;
    a_refused_commit_writes_nothing(&*new().await.0).await;
    revoking_and_reinstating(&*new().await.0).await;
    revoking_again_makes_a_revision(&*new().await.0).await;
    let (store, clock) = new().await;
    watermarks_never_fall(&*store, &clock).await;
    acts_are_used_once(&*new().await.0).await;
    let (store, clock) = new().await;
    forgotten_acts_stay_used(&*store, &clock).await;
    let (store, clock) = new().await;
    keys_are_spent_once(store, &clock).await;
    racing_writers_lose_nothing(new().await.0).await;
    only_one_of_the_racers_wins(new().await.0).await;
    changes_come_in_pages(&*new().await.0).await;
    lists_are_cut_at_the_limit(&*new().await.0).await;
    commits_wake(&*new().await.0).await;
    history_is_of_documents(&*new().await.0).await;
    documents_stand_as_they_stood(&*new().await.0).await;
    approvals::conformance(&new).await;
    kill::conformance(&new).await;
    operator_keys::conformance(&new).await;
    adoption::conformance(&new).await;
    text_that_no_engine_keeps_is_refused(&*new().await.0).await;
    let (store, clock) = new().await;
    replicas_are_known_while_they_are_heard(&*store, &clock).await;
    let (store, clock) = new().await;
    replicas_have_a_limit(&*store, &clock).await;
}

/// Replays the whole change log, checks its numbers, hashes and digests on the way, and compares the result with the full state.
/// Returns that state.
///
/// # Panics
/// If a check fails.
pub async fn verify_change_log(store: &dyn Store) -> StoreState {
    let state = store.load().await.unwrap();
    assert_eq!(state.digest, state_digest(&state.documents, &state.revocations), "the stored digest is that of the rows");
    let mut replica = ReplayedState::default();
    while replica.number < state.revision.number {
        let changes = store.changes(replica.number).await.unwrap();
        assert_eq!(changes.history, state.revision.history);
        assert!(changes.head >= state.revision.number && !changes.commits.is_empty());
        for commit in changes.commits.iter().filter(|commit| commit.number <= state.revision.number) {
            replica.apply(commit);
        }
    }
    assert_eq!((replica.number, replica.hash), (state.revision.number, state.hash));
    assert_eq!(replica.documents.into_values().collect::<Vec<_>>(), sorted(&state.documents, |one| one.row.key.clone()));
    assert_eq!(replica.revocations.into_values().collect::<Vec<_>>(), sorted(&state.revocations, |one| one.target.clone()));
    state
}

/// A follower in its simplest form.
#[derive(Default)]
struct ReplayedState {
    number: u64,
    hash: [u8; 32],
    digest: crate::model::revision::StateDigest,
    documents: BTreeMap<DocumentKey, StoredDocument>,
    revocations: BTreeMap<RevocationTarget, RevocationRow>,
}

impl ReplayedState {
    fn apply(&mut self, commit: &CommitRow) {
        commit.verify_after(self.number, &self.hash).unwrap();
        (self.number, self.hash) = (commit.number, commit.hash);
        for change in &commit.changes {
            match change {
                RowChange::Document(row) => {
                    self.digest.add(&document_sha256(row, commit.number));
                    let stored = StoredDocument { row: row.clone(), revision: commit.number };
                    let before = self.documents.insert(row.key.clone(), stored);
                    before.iter().for_each(|one| self.digest.remove(&document_sha256(&one.row, one.revision)));
                }
                RowChange::DocumentRemoved(key) => {
                    let before = self.documents.remove(key).unwrap();
                    self.digest.remove(&document_sha256(&before.row, before.revision));
                }
                RowChange::Revocation(row) => {
                    self.digest.add(&revocation_sha256(row));
                    let before = self.revocations.insert(row.target.clone(), row.clone());
                    before.iter().for_each(|one| self.digest.remove(&revocation_sha256(one)));
                }
                RowChange::RevocationRemoved(target) => {
                    self.digest.remove(&revocation_sha256(&self.revocations.remove(target).unwrap()));
                }
            }
        }
        assert_eq!(self.digest, commit.digest, "digest of revision {}", commit.number);
    }
}

async fn begins_empty(store: &dyn Store) {
    let state = verify_change_log(store).await;
    assert_eq!((state.revision.number, state.hash), (0, GENESIS));
    assert!(state.documents.is_empty() && state.revocations.is_empty());
    assert_eq!(store.revision().await, Ok(state.revision));
    assert_eq!(store.changes(0).await.unwrap().commits, []);
    let nothing = store.commit(CommitRequest::default()).await;
    assert!(matches!(nothing, Err(Error::Rejected(_))), "{nothing:?}");
}

async fn revisions_are_dense_and_chained(store: &dyn Store) {
    for number in 1..=20 {
        let committed = write(store, vec![put("agent", &format!("a{}", number % 3), "{}"), kill(&format!("t{number}"))]).await;
        let committed = committed.unwrap();
        assert_eq!((committed.revision.number, committed.changes.len()), (number, 2));
        assert_eq!(committed.unix_ms, START_UNIX_S * 1000);
        assert_eq!(store.revision().await, Ok(committed.revision));
    }
    let state = verify_change_log(store).await;
    assert_eq!((state.documents.len(), state.revocations.len()), (3, 20));
    let changes = store.changes(17).await.unwrap();
    assert_eq!(changes.commits.iter().map(|commit| commit.number).collect::<Vec<_>>(), [18, 19, 20]);
    let ahead = store.changes(21).await.unwrap();
    assert_eq!((ahead.head, ahead.commits.len()), (20, 0), "a reader ahead of the store sees that it is");
}

async fn documents_are_put_and_removed(store: &dyn Store) {
    let writes = vec![put("agent", "b", "{}"), put("agent", "a", "{\"x\":1}"), put("tool", "a", "{}")];
    write(store, writes).await.unwrap();
    write(store, vec![put("agent", "b", "[]"), remove("tool", "a")]).await.unwrap();
    let all = store.documents(None).await.unwrap();
    assert_eq!(all.revision.number, 2);
    let seen: Vec<_> = all.documents.iter().map(|one| (one.row.key.id.as_str(), one.row.json.as_str(), one.revision)).collect();
    assert_eq!(seen, [("a", "{\"x\":1}", 1), ("b", "[]", 2)]);
    assert_eq!(store.documents(Some("agent")).await.unwrap().documents, all.documents);
    assert_eq!(store.documents(Some("tool")).await.unwrap().documents, []);
    let again = write(store, vec![remove("tool", "a")]).await;
    assert!(matches!(again, Err(Error::Rejected(_))), "{again:?}");
    write(store, vec![put("tool", "a", "{}"), remove("tool", "a"), put("tool", "a", "[1]")]).await.unwrap();
    assert_eq!(verify_change_log(store).await.documents.len(), 3, "writes of one commit are made in order");
}

async fn expectations_conflict(store: &dyn Store) {
    let check = async |expected: Option<u64>, json: &str, good: bool| {
        let before = verify_change_log(store).await;
        let key = DocumentKey { kind: "agent".into(), id: "a".into() };
        let expected = vec![(key, expected)];
        let request = CommitRequest { expected, ..request(vec![put("agent", "a", json)]) };
        let conflict = Error::Conflict { kind: "agent".into(), id: "a".into() };
        match store.commit(request).await {
            Ok(_) => assert!(good),
            Err(error) => {
                assert!(!good && error == conflict, "{error}");
                assert_eq!(verify_change_log(store).await, before);
            }
        }
    };
    check(Some(1), "{}", false).await;
    check(None, "{}", true).await;
    check(None, "[]", false).await;
    write(store, vec![kill("t")]).await.unwrap();
    check(Some(2), "[]", false).await;
    check(Some(1), "[]", true).await;
    check(Some(1), "{}", false).await;
    check(Some(3), "{}", true).await;
    // A document that was added or removed in between is a conflict; a revocation is not.
    let whole = async |since: u64, good: bool| {
        let before = verify_change_log(store).await;
        let kill = vec![kill(&format!("since {since} of {}", before.revision.number))];
        let asked = CommitRequest { documents_unchanged_since: Some(since), ..request(kill) };
        match store.commit(asked).await {
            Ok(_) => assert!(good, "{since}"),
            Err(error) => {
                assert!(!good && matches!(error, Error::DocumentsChanged { .. }), "{error}");
                assert_eq!(verify_change_log(store).await, before);
            }
        }
    };
    let changed = verify_change_log(store).await.revision.number;
    whole(changed - 1, false).await;
    whole(changed, true).await;
    whole(changed, true).await;
    write(store, vec![remove("agent", "a")]).await.unwrap();
    whole(changed + 2, false).await;
    whole(changed + 3, true).await;
    write(store, vec![put("agent", "a", "{}")]).await.unwrap();
}

async fn a_refused_commit_writes_nothing(store: &dyn Store) {
    let first = CommitRequest { act: Some(act(&["j1"], 60)), ..request(vec![put("agent", "a", "{}"), kill("t0")]) };
    store.commit(first).await.unwrap();
    let before = verify_change_log(store).await;
    let bad = [
        StoreWrite::Reinstate { target: RevocationTarget::Agent("x".into()), reason: String::new() },
        StoreWrite::Revoke { target: RevocationTarget::All, kind: RevocationKind::Dead, reason: String::new() },
        remove("tool", "none"),
        kill(""),
        kill(&"x".repeat(crate::model::limits::ID_BYTES_MAX + 1)),
    ];
    for bad in bad {
        let writes = vec![put("agent", "a", "[]"), remove("agent", "a"), kill("t1"), bad.clone()];
        let refused = store.commit(CommitRequest { act: Some(act(&["j2"], 60)), ..request(writes) }).await;
        assert!(matches!(refused, Err(Error::Rejected(_))), "{bad:?}: {refused:?}");
        assert_eq!(verify_change_log(store).await, before);
    }
    let good = CommitRequest { act: Some(act(&["j2"], 60)), ..request(vec![kill("t1")]) };
    assert_eq!(store.commit(good).await.unwrap().revision.number, 2, "what was refused used up neither number nor signature");
}

async fn revoking_and_reinstating(store: &dyn Store) {
    let agent = RevocationTarget::Agent("a".into());
    let revoke = |meaning| StoreWrite::Revoke { target: agent.clone(), kind: meaning, reason: "why".into() };
    let reinstate = |target: &RevocationTarget| vec![StoreWrite::Reinstate { target: target.clone(), reason: "again".into() }];
    let refused = async |writes: Vec<StoreWrite>| {
        let answer = write(store, writes).await;
        assert!(matches!(answer, Err(Error::Rejected(_))), "{answer:?}");
    };
    refused(reinstate(&agent)).await;
    write(store, vec![revoke(RevocationKind::Suspend), revoke(RevocationKind::Watermark)]).await.unwrap();
    let row = verify_change_log(store).await.revocations.pop().unwrap();
    let watermark_unix_s = Some(START_UNIX_S + store.load().await.unwrap().settings.iat_skew_s);
    let expected = RevocationRow {
        target: agent.clone(),
        dead: false,
        suspended: true,
        watermark_unix_s,
        expires_at_unix_s: None,
        reason: "why".into(),
        revision: 1,
    };
    assert_eq!(row, expected);
    let back = write(store, reinstate(&agent)).await.unwrap();
    let expires_at_unix_s = watermark_unix_s.map(|second| second + REVOCATION_RETENTION_S);
    let expected = RevocationRow { suspended: false, reason: "again".into(), revision: 2, expires_at_unix_s, ..expected };
    assert_eq!(back.changes, [RowChange::Revocation(expected)], "the watermark stays");
    refused(reinstate(&agent)).await;
    write(store, vec![kill("t")]).await.unwrap();
    refused(reinstate(&RevocationTarget::Token("t".into()))).await;
    refused(reinstate(&RevocationTarget::Token("u".into()))).await;
    refused(vec![revoke(RevocationKind::Dead)]).await;
    verify_change_log(store).await;
}

async fn revoking_again_makes_a_revision(store: &dyn Store) {
    let first = write(store, vec![kill("t")]).await.unwrap();
    let second = write(store, vec![kill("t")]).await.unwrap();
    assert_eq!((first.revision.number, second.revision.number), (1, 2));
    assert_eq!(first.changes, second.changes, "the row stands as it was first written");
    assert_eq!(verify_change_log(store).await.revocations.len(), 1);
}

async fn watermarks_never_fall(store: &dyn Store, clock: &ManualClock) {
    let revoke = || {
        vec![StoreWrite::Revoke {
            target: RevocationTarget::Agent("a".into()),
            kind: RevocationKind::Watermark,
            reason: String::new(),
        }]
    };
    let skew_s = store.load().await.unwrap().settings.iat_skew_s;
    let check = async |step_ms: i64, expected: i64| {
        clock.step_wall_ms(step_ms);
        write(store, revoke()).await.unwrap();
        assert_eq!(verify_change_log(store).await.revocations[0].watermark_unix_s, Some(expected));
    };
    check(0, START_UNIX_S + skew_s).await;
    check(-100_000, START_UNIX_S + skew_s).await;
    check(105_000, START_UNIX_S + 5 + skew_s).await;
}

async fn acts_are_used_once(store: &dyn Store) {
    let commit = async |id: &str, jtis: &[&str], expected: Result<u64, &str>| {
        let before = verify_change_log(store).await;
        let answer = store.commit(CommitRequest { act: Some(act(jtis, 60)), ..request(vec![kill(id)]) }).await;
        let expected = expected.map_err(|jti| Error::ActReplayed { jti: jti.into() });
        assert_eq!(answer.map(|done| done.revision.number), expected);
        if expected.is_err() {
            assert_eq!(verify_change_log(store).await, before);
        }
    };
    commit("t1", &["j1"], Ok(1)).await;
    commit("t2", &["j1"], Err("j1")).await;
    commit("t2", &["j2", "j1"], Err("j1")).await;
    commit("t2", &["j3", "j3"], Err("j3")).await;
    commit("t2", &["j2", "j3"], Ok(2)).await;
    let alone = CommitRequest { act: Some(act(&["j4"], 60)), ..request(vec![]) };
    assert_eq!(store.commit(alone).await.unwrap().revision.number, 3, "an act that changes no row is recorded too");
}

async fn forgotten_acts_stay_used(store: &dyn Store, clock: &ManualClock) {
    let commit = async |jti: &str, life_s: i64| {
        let request = CommitRequest { act: Some(act(&[jti], life_s)), ..request(vec![kill(jti)]) };
        store.commit(request).await.map(|_| ()).map_err(|error| matches!(error, Error::ActReplayed { .. }))
    };
    assert_eq!(commit("j1", 60).await, Ok(()));
    clock.step_wall_ms(3_600_000);
    assert_eq!(commit("j2", 3_660).await, Ok(()));
    assert_eq!(commit("j1", 60).await, Err(true));
    clock.step_wall_ms(-3_600_000);
    assert_eq!(commit("j1", 60).await, Err(true), "a clock set back lets no signature in twice");
    assert_eq!(commit("j3", 120).await, Ok(()));
}

async fn keys_are_spent_once(store: Arc<dyn Store>, clock: &ManualClock) {
    let racers: Vec<_> = (0..64u8)
        .map(|racer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.spend_proof([racer % 2; 32], START_UNIX_S + 60).await.unwrap() })
        })
        .collect();
    let mut won = 0;
    for racer in racers {
        won += usize::from(racer.await.unwrap());
    }
    assert_eq!(won, 2, "one for each key");
    assert_eq!(store.revision().await.unwrap().number, 0, "a spent key is no revision");
    clock.step_wall_ms(3_600_000);
    assert_eq!(store.spend_proof([9; 32], START_UNIX_S + 3_660).await, Ok(true));
    clock.step_wall_ms(-3_600_000);
    assert_eq!(store.spend_proof([1; 32], START_UNIX_S + 60).await, Ok(false), "a clock set back gives no key back");
    assert_eq!(store.spend_proof([8; 32], START_UNIX_S + 61).await, Ok(true));
}

async fn racing_writers_lose_nothing(store: Arc<dyn Store>) {
    let racers: Vec<_> = (0..8)
        .map(|racer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut numbers = Vec::new();
                for turn in 0..25 {
                    let refused = write(&*store, vec![kill(&format!("never-{racer}-{turn}")), remove("agent", "none")]).await;
                    assert!(matches!(refused, Err(Error::Rejected(_))));
                    let done = write(&*store, vec![kill(&format!("t{racer}-{turn}"))]).await.unwrap();
                    numbers.push(done.revision.number);
                }
                numbers
            })
        })
        .collect();
    let mut numbers = BTreeSet::new();
    for racer in racers {
        let own = racer.await.unwrap();
        assert!(own.is_sorted());
        numbers.extend(own);
    }
    assert_eq!(numbers, (1..=200).collect());
    assert_eq!(verify_change_log(&*store).await.revocations.len(), 200);
}

async fn only_one_of_the_racers_wins(store: Arc<dyn Store>) {
    let racers: Vec<_> = (0..16)
        .map(|racer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let expected = vec![(DocumentKey { kind: "agent".into(), id: "a".into() }, None)];
                let writes = vec![put("agent", "a", &racer.to_string())];
                store.commit(CommitRequest { expected, act: Some(act(&["j"], 60)), ..request(writes) }).await
            })
        })
        .collect();
    let mut won = 0;
    for racer in racers {
        match racer.await.unwrap() {
            Ok(_) => won += 1,
            Err(Error::Conflict { .. } | Error::ActReplayed { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((won, verify_change_log(&*store).await.revision.number), (1, 1));
}

async fn changes_come_in_pages(store: &dyn Store) {
    let json = format!("\"{}\"", "x".repeat(write_rules::CHANGES_BYTES_MAX / 4));
    for number in 0..10 {
        write(store, vec![put("agent", &format!("a{number}"), &json)]).await.unwrap();
    }
    let page = store.changes(0).await.unwrap();
    assert!(page.head == 10 && (1..10).contains(&page.commits.len()), "{} commits in one answer", page.commits.len());
    assert_eq!(verify_change_log(store).await.documents.len(), 10);
}

async fn lists_are_cut_at_the_limit(store: &dyn Store) {
    for number in 1..=5 {
        write(store, vec![kill(&format!("t{number}"))]).await.unwrap();
    }
    write(store, vec![kill("t2")]).await.unwrap();
    let check = async |limit: usize, expected: &[u64]| {
        let list = store.revocations(limit).await.unwrap();
        assert_eq!((list.revision.number, list.total), (6, 5));
        assert_eq!(list.rows.iter().map(|row| row.revision).collect::<Vec<_>>(), expected);
    };
    check(0, &[]).await;
    check(2, &[5, 4]).await;
    check(usize::MAX, &[5, 4, 3, 2, 1]).await;
    let signed = CommitRequest { act: Some(act(&["j1"], 60)), ..request(vec![kill("t6")]) };
    let by_alice = store.commit(signed).await.unwrap();
    assert_eq!(by_alice.freshness_bound_ms, verify_change_log(store).await.settings.freshness_bound_ms);
    let by_nobody = write(store, vec![kill("t7"), kill("t8")]).await.unwrap();
    let committed = |done: &CommitOutcome, operators: &[&str]| {
        let operators = operators.iter().map(|id| (*id).to_owned()).collect();
        (done.revision.number, CommitMetadata { unix_ms: done.unix_ms, operators })
    };
    let listed = store.revocations(3).await.unwrap();
    assert_eq!(listed.rows.iter().map(|row| row.revision).collect::<Vec<_>>(), [8, 8, 7]);
    let expected = [committed(&by_alice, &["alice"]), committed(&by_nobody, &[])];
    assert_eq!(listed.commits.into_iter().collect::<Vec<_>>(), expected);
    assert_eq!(store.revocations(1).await.unwrap().commits.into_iter().collect::<Vec<_>>(), expected[1..]);
}

async fn commits_wake(store: &dyn Store) {
    let mut wake = store.subscribe_commits();
    assert!(!wake.has_changed().unwrap());
    let number = write(store, vec![kill("t")]).await.unwrap().revision.number;
    wake.changed().await.unwrap();
    assert_eq!(*wake.borrow_and_update(), number);
}

async fn history_is_of_documents(store: &dyn Store) {
    assert_eq!(store.policy_history(10).await, Ok(vec![]));
    let asked = CommitRequest { act: Some(act(&["j1"], 60)), ..request(vec![put("agent", "a", "{}"), kill("t0")]) };
    let first = store.commit(asked).await.unwrap();
    for number in 1..=20 {
        // A commit whose reason looks like a change of a document is not listed.
        let reason = "{\"document\":1}".to_owned();
        let target = RevocationTarget::Token(format!("t{number}"));
        write(store, vec![StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason }]).await.unwrap();
    }
    let second = write(store, vec![remove("agent", "a"), put("tool", "t", "{}")]).await.unwrap();
    write(store, vec![kill("last")]).await.unwrap();
    let commit = |done: &CommitOutcome, act| crate::store::PolicyCommit {
        number: done.revision.number,
        unix_ms: done.unix_ms,
        act,
        changes: done.changes.clone(),
    };
    let expected = [commit(&second, None), commit(&first, Some(act(&["j1"], 60)))];
    assert_eq!(store.policy_history(10).await.unwrap(), expected);
    assert_eq!(store.policy_history(1).await.unwrap(), expected[..1]);
    assert_eq!(store.policy_history(usize::MAX).await.unwrap().len(), 2);
    assert_eq!(store.policy_history(0).await.unwrap(), []);
}

async fn documents_stand_as_they_stood(store: &dyn Store) {
    let mut stood = vec![store.documents(None).await.unwrap()];
    let steps = [
        vec![put("tool", "b", "{}"), put("agent", "a", "{}")],
        vec![kill("t1")],
        vec![put("agent", "a", "[]")],
        vec![remove("agent", "a"), put("agent", "c", "{}"), remove("agent", "c")],
        vec![kill("t2")],
        vec![put("agent", "a", "{}")],
    ];
    for writes in steps {
        write(store, writes).await.unwrap();
        stood.push(store.documents(None).await.unwrap());
    }
    for (number, documents) in stood.into_iter().enumerate() {
        assert_eq!(store.documents_at(number as u64).await, Ok(documents));
    }
    let ahead = store.documents_at(7).await;
    assert!(matches!(ahead, Err(Error::Rejected(_))), "{ahead:?}");
}

async fn text_that_no_engine_keeps_is_refused(store: &dyn Store) {
    let refused = async |request: CommitRequest| {
        let answer = store.commit(request).await;
        assert!(matches!(answer, Err(Error::Rejected(_))), "{answer:?}");
    };
    refused(request(vec![put("agent", "a\0", "{}")])).await;
    refused(request(vec![put("agent\0", "a", "{}")])).await;
    refused(request(vec![put("agent", "a", "\0")])).await;
    let why = StoreWrite::Revoke { target: RevocationTarget::Token("t".into()), kind: RevocationKind::Dead, reason: "\0".into() };
    refused(request(vec![why])).await;
    refused(CommitRequest { act: Some(act(&["\0"], 60)), ..request(vec![kill("t")]) }).await;
    // A token may have any name. Whatever its name, even the longest, it can be revoked.
    let longest = "\u{1f480}".repeat(crate::model::limits::ID_BYTES_MAX / 4);
    let (issuer, subject, agent) = (longest.clone(), longest.clone(), longest.clone());
    let all = StoreWrite::Revoke {
        target: RevocationTarget::Delegation { issuer, subject, agent },
        kind: RevocationKind::Suspend,
        reason: "'; -- \u{fffd}\u{7f}\n\"\\".into(),
    };
    write(store, vec![kill("t\0t"), kill("'; DROP TABLE head; --"), all, put("agent", &longest, "{}")]).await.unwrap();
    let state = verify_change_log(store).await;
    assert!(state.revocations.iter().any(|row| row.target == RevocationTarget::Token("t\0t".into())));
    assert_eq!(store.documents(None).await.unwrap().documents[0].row.key.id, longest);
}

async fn replicas_are_known_while_they_are_heard(store: &dyn Store, clock: &ManualClock) {
    let beat = |of: &str, applied_number: u64, acked_number: u64| ReplicaHeartbeat {
        incarnation: of.into(),
        applied_number,
        acked_number,
        state: ReplicaState::Serving,
    };
    let unknown = async |heartbeat: &ReplicaHeartbeat| {
        let expected = Error::Unregistered { incarnation: heartbeat.incarnation.clone() };
        assert_eq!(store.poll_changes(heartbeat).await.unwrap_err(), expected);
        assert_eq!(store.load_for_replica(heartbeat).await.unwrap_err(), expected);
    };
    // A heartbeat is visible once a later request is answered.
    let shown = async || {
        store.spend_proof([0; 32], START_UNIX_S + 3_600).await.unwrap();
        let replicas = store.replicas().await.unwrap();
        assert_eq!(replicas.unix_ms, clock.now().unix_ms());
        let row = |one: fleet::ReplicaRow| {
            let silent_ms = replicas.unix_ms - one.seen_unix_ms;
            (one.registration.incarnation, one.applied_number, one.acked_number, one.state.as_str(), silent_ms)
        };
        replicas.rows.into_iter().map(row).collect::<Vec<_>>()
    };
    let row = |of: &str, applied: u64, acked: u64, state: &'static str, silent_ms: i64| {
        (of.to_owned(), applied, acked, state, silent_ms)
    };
    assert_eq!(shown().await, []);
    unknown(&beat("a", 0, 0)).await;
    store.register_replica(&registration("a")).await.unwrap();
    store.register_replica(&registration("b")).await.unwrap();
    assert_eq!(store.replicas().await.unwrap().rows[0].registration, registration("a"));
    assert_eq!(shown().await, [row("a", 0, 0, "starting", 0), row("b", 0, 0, "starting", 0)]);
    unknown(&beat("c", 0, 0)).await;

    write(store, vec![put("agent", "x", "{}")]).await.unwrap();
    assert_eq!(store.load_for_replica(&beat("a", 0, 0)).await, store.load().await, "a member reads what everybody reads");
    assert_eq!(store.poll_changes(&beat("a", 0, 0)).await, store.changes(0).await);
    assert_eq!(store.poll_changes(&beat("a", 1, 0)).await, store.changes(1).await);
    assert_eq!(shown().await[0].3, "serving");
    // An acknowledgement is visible at once, whenever the list was last read.
    store.poll_changes(&beat("a", 1, 1)).await.unwrap();
    assert_eq!(shown().await, [row("a", 1, 1, "serving", 0), row("b", 0, 0, "starting", 0)]);
    store.register_replica(&registration("a")).await.unwrap();
    assert_eq!(shown().await[0], row("a", 1, 1, "serving", 0), "registering again forgets nothing");
    acknowledgements_are_dated(store, clock).await;

    // A silent replica is listed up to its last millisecond, then forgotten, and must register again.
    clock.advance_ms(SILENCE_MS_MAX);
    store.poll_changes(&beat("b", 1, 0)).await.unwrap();
    assert_eq!(shown().await, [row("a", 1, 1, "serving", SILENCE_MS_MAX), row("b", 1, 0, "serving", 0)]);
    clock.advance_ms(1);
    assert_eq!(shown().await, [row("b", 1, 0, "serving", 1)]);
    store.register_replica(&registration("c")).await.unwrap();
    unknown(&beat("a", 1, 1)).await;
    store.register_replica(&registration("a")).await.unwrap();
    store.poll_changes(&beat("a", 1, 1)).await.unwrap();
    assert_eq!(shown().await.len(), 3);
    assert_eq!(verify_change_log(store).await.revision.number, 2, "who follows is no part of the history");
}

/// Continues from replica `a` at 1 of 1. The clock advances by half a second, and `a` sends a heartbeat at its end.
async fn acknowledgements_are_dated(store: &dyn Store, clock: &ManualClock) {
    let beat = |acked_number, state| ReplicaHeartbeat {
        incarnation: "a".into(),
        applied_number: if acked_number == 1 { 1 } else { 2 },
        acked_number,
        state,
    };
    let first = async || store.replicas().await.unwrap().to_fleet().replicas.remove(0);
    write(store, vec![put("agent", "x", "{\"a\":1}")]).await.unwrap();
    clock.advance_ms(84);
    store.poll_changes(&beat(2, ReplicaState::Serving)).await.unwrap();
    store.spend_proof([1; 32], START_UNIX_S + 3_600).await.unwrap();
    clock.advance_ms(416);
    let listed = first().await;
    assert_eq!((listed.acked_number, listed.kill_ms, listed.age_ms), (2, Some(84), 416));
    assert_eq!(listed.condition, ReplicaCondition::Fresh);
    // A heartbeat without a question follows. The same number is no new acknowledgement, and a replica without one has no date.
    for (acked, state, expected) in [
        (2, ReplicaState::Resync, (Some(84), ReplicaCondition::Resync)),
        (0, ReplicaState::Quarantined, (None, ReplicaCondition::Quarantined)),
        (1, ReplicaState::Serving, (Some(500), ReplicaCondition::Fresh)),
    ] {
        store.write_heartbeat(&beat(acked, state)).await.unwrap();
        store.spend_proof([2 + acked as u8; 32], START_UNIX_S + 3_600).await.unwrap();
        let listed = first().await;
        assert_eq!((listed.kill_ms, listed.condition), expected);
    }
    let fleet = store.replicas().await.unwrap();
    assert_eq!((fleet.revision.clone(), fleet.freshness_bound_ms), (store.revision().await.unwrap(), 5_000));
    let unknown = ReplicaHeartbeat { incarnation: "c".into(), ..beat(0, ReplicaState::Serving) };
    assert_eq!(store.write_heartbeat(&unknown).await.unwrap_err(), Error::Unregistered { incarnation: "c".into() });
}

async fn replicas_have_a_limit(store: &dyn Store, clock: &ManualClock) {
    let refused = async |bad: ReplicaRegistration| {
        let answer = store.register_replica(&bad).await;
        assert!(matches!(answer, Err(Error::Rejected(_))), "{bad:?}: {answer:?}");
    };
    refused(registration("")).await;
    refused(registration("a\0")).await;
    refused(ReplicaRegistration { address: "x".repeat(257), ..registration("a") }).await;
    refused(ReplicaRegistration { version: "x".repeat(257), ..registration("a") }).await;
    let all: Vec<_> = (0..fleet::REPLICAS_MAX).map(|index| registration(&format!("r{index}"))).collect();
    for some in all.chunks(64) {
        for answer in futures_util::future::join_all(some.iter().map(|one| store.register_replica(one))).await {
            answer.unwrap();
        }
    }
    refused(registration("one too many")).await;
    store.register_replica(&all[0]).await.unwrap();
    assert_eq!(store.replicas().await.unwrap().rows.len(), fleet::REPLICAS_MAX);
    clock.advance_ms(SILENCE_MS_MAX + 1);
    store.register_replica(&registration("one too many")).await.unwrap();
    assert_eq!(store.replicas().await.unwrap().rows.len(), 1);
}

fn registration(incarnation: &str) -> ReplicaRegistration {
    ReplicaRegistration {
        incarnation: incarnation.into(),
        address: "node-1 127.0.0.1:7700".into(),
        version: "0.1.0".into(),
        started_unix_ms: START_UNIX_S * 1000 - 5,
    }
}

async fn write(store: &dyn Store, writes: Vec<StoreWrite>) -> Result<CommitOutcome, Error> {
    store.commit(request(writes)).await
}

fn request(writes: Vec<StoreWrite>) -> CommitRequest {
    CommitRequest { writes, ..CommitRequest::default() }
}

fn kill(id: &str) -> StoreWrite {
    StoreWrite::Revoke { target: RevocationTarget::Token(id.into()), kind: RevocationKind::Dead, reason: "leaked".into() }
}

fn put(kind: &str, id: &str, json: &str) -> StoreWrite {
    let key = DocumentKey { kind: kind.into(), id: id.into() };
    StoreWrite::PutDocument(DocumentRow {
        key,
        json: json.into(),
        path: "p.yaml".into(),
        line: 3,
        origin: DocumentOrigin::Folder,
    })
}

fn remove(kind: &str, id: &str) -> StoreWrite {
    StoreWrite::RemoveDocument(DocumentKey { kind: kind.into(), id: id.into() })
}

fn act(jtis: &[&str], life_s: i64) -> ActRow {
    ActRow {
        operators: vec!["alice".into()],
        keys: vec!["key of alice".into()],
        method: "/portcullis.v1.Admin/Revoke".into(),
        signatures: vec!["e30.e30.c2ln".into()],
        jtis: jtis.iter().map(|jti| ((*jti).to_owned(), START_UNIX_S + life_s)).collect(),
        reason: "leaked".into(),
    }
}

fn sorted<T: Clone, K: Ord>(rows: &[T], key: fn(&T) -> K) -> Vec<T> {
    let mut rows = rows.to_vec();
    rows.sort_by_key(key);
    rows
}
