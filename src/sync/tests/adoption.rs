//! Tests of the way out of quarantine and of a start from the cache: which events lead there, and that no other event does.

use super::*;
use crate::model::revision::HistoryId;
use crate::model::rows::RevocationRow;
use crate::store::hash_chain::state_digest;
use crate::store::{StoreAdoption, StoreLineage};
use crate::sync::follower::{AdoptedStore, HistoryPosition, KnownRevocations};

const BOUND_MS: i64 = 5_000;

fn at_ms(ms: i64) -> ClockReading {
    ClockReading { unix_ns: ms * 1_000_000, boot_ns: ms * 1_000_000 }
}

/// A quarantined follower that was at revision 3 of `first`, proved at second 1, with the store that it followed.
fn quarantined() -> (Follower, StoreModel) {
    let mut store = StoreModel::new("first");
    (0..3).for_each(|_| store.commit("main"));
    let mut follower = Follower::new(None);
    follower.handle_event(FollowerEvent::Loaded { sent_at: at_ms(1_000), state: Box::new(store.state()) });
    follower.handle_event(FollowerEvent::Published(Ok(())));
    let other = ChangeLogPage { history: HistoryId::new("second"), ..store.changes(3) };
    assert!(matches!(
        follower.handle_event(FollowerEvent::Changes { sent_at: at_ms(2_000), changes: other }),
        Some(FollowerAction::Quarantine { .. })
    ));
    (follower, store)
}

fn rows(of: &StoreModel) -> Vec<RevocationRow> {
    of.state().revocations
}

/// The backup at revision 1 of `first`, adopted as `second`, with the merged rows.
fn adopted(of: &StoreModel, merged: Vec<RevocationRow>) -> AdoptedStore {
    let mut backup = StoreModel::new("first");
    backup.commits = of.commits[..1].to_vec();
    let from = backup.state();
    let adoption =
        StoreAdoption { history: HistoryId::new("second"), from: from.revision.clone(), from_hash: from.hash, unix_ms: 0 };
    let revocations: Vec<_> = from.revocations.iter().cloned().chain(merged).collect();
    let revision = Revision { history: adoption.history.clone(), number: 2 };
    let digest = state_digest(&[], &revocations);
    let state = store::StoreState { revision: revision.clone(), digest, hash: [9; 32], revocations, ..from };
    let lineage = StoreLineage { revision, hash_at: None, adoptions: vec![adoption] };
    AdoptedStore { lineage, state, known: Some(KnownRevocations { number: 3, rows: rows(of) }) }
}

fn whole(of: &StoreModel) -> AdoptedStore {
    adopted(of, rows(of)[1..].to_vec())
}

#[test]
fn only_an_adopted_store_that_covers_leads_out_of_quarantine() {
    let later = 1_000 + BOUND_MS;
    let check = |what: &str, ms: i64, change: &dyn Fn(&mut AdoptedStore), said: Option<&str>| {
        let (mut follower, store) = quarantined();
        let mut adopted = whole(&store);
        change(&mut adopted);
        let action = follower.handle_event(FollowerEvent::Adoption { sent_at: at_ms(ms), adopted: Some(Box::new(adopted)) });
        assert_eq!(
            (follower.state(), follower.next_request()),
            (FollowerState::Quarantined, FollowerRequest::Adoption),
            "{what}: not yet"
        );
        let Some(said) = said else {
            assert!(
                matches!(action, Some(FollowerAction::PublishFullState { proof, .. }) if proof == at_ms(ms)),
                "{what}: {action:?}"
            );
            follower.handle_event(FollowerEvent::Published(Ok(())));
            assert_eq!(follower.state(), FollowerState::Following, "{what}");
            assert_eq!(follower.published_revision().unwrap().history.as_str(), "second", "{what}");
            assert_eq!((follower.freshness_proof(), follower.problem()), (Some(at_ms(ms)), None), "{what}");
            return;
        };
        assert_eq!(action, None, "{what}");
        // A later event does not publish it either.
        assert_eq!(follower.handle_event(FollowerEvent::Published(Ok(()))), None);
        assert_eq!((follower.state(), follower.freshness_proof()), (FollowerState::Quarantined, Some(at_ms(1_000))), "{what}");
        let problem = follower.problem().unwrap_or_default();
        assert!(problem.contains("second") && problem.contains(said), "{what}: {problem}");
    };
    check("all is there", later, &|_| {}, None);
    check("more is there", later, &|it| it.known = Some(KnownRevocations { number: 3, rows: vec![] }), None);
    // A store without an adoption record, or with a record of an unrelated history, is foreign whatever it holds.
    check("no record", later, &|it| it.lineage.adoptions.clear(), Some("history"));
    let foreign = |it: &mut AdoptedStore| it.lineage.adoptions[0].from.history = HistoryId::new("third");
    check("another family", later, &foreign, Some("history"));
    check("a state of another history", later, &|it| it.state.revision.history = HistoryId::new("third"), Some("history"));
    // The adopted store lacks a known revocation.
    check("a kill is missing", later, &|it| drop(it.state.revocations.pop()), Some("digest"));
    let without_last = |it: &mut AdoptedStore| {
        it.state.revocations.pop();
        it.state.digest = state_digest(&[], &it.state.revocations);
    };
    check("a kill is missing and the digest is right", later, &without_last, Some("`token main-3` first"));
    let weaker = |it: &mut AdoptedStore| {
        it.state.revocations[2].dead = false;
        it.state.digest = state_digest(&[], &it.state.revocations);
    };
    check("a kill is weaker", later, &weaker, Some("1 of what is revoked"));
    // The cache does not hold all that the replica knew.
    check("no cache", later, &|it| it.known = None, Some("restart it"));
    check("a cache that stayed behind", later, &|it| it.known.as_mut().unwrap().number = 2, Some("restart it"));
    // The last proof is not older than the bound.
    check("too early", later - 1, &|_| {}, Some("history"));
    // A store that contains the followed position lacks nothing. A revocation that was lifted since stays lifted.
    let holds = |it: &mut AdoptedStore| {
        it.lineage.adoptions[0].from.number = 3;
        it.lineage.hash_at = Some(quarantined().1.commits[2].hash);
        it.known = None;
        it.state.revocations.clear();
        it.state.digest = state_digest(&[], &[]);
    };
    check("the place is a part of it", later, &holds, None);
    let another_past = |it: &mut AdoptedStore| {
        holds(it);
        it.lineage.hash_at = Some([7; 32]);
    };
    check("another past", later, &another_past, Some("restart it"));
}

#[test]
fn an_adopted_state_that_cannot_be_published_changes_nothing() {
    let (mut follower, store) = quarantined();
    let asked = |follower: &mut Follower| {
        follower.handle_event(FollowerEvent::Adoption { sent_at: at_ms(9_000), adopted: Some(Box::new(whole(&store))) })
    };
    assert!(asked(&mut follower).is_some());
    follower.handle_event(FollowerEvent::Published(Err("does not build".into())));
    assert_eq!((follower.state(), follower.next_request()), (FollowerState::Quarantined, FollowerRequest::Adoption));
    assert!(follower.problem().unwrap().contains("does not build"));
    follower.handle_event(FollowerEvent::AdoptionFailed(store::Error::Unavailable("down".into())));
    assert!(follower.problem().unwrap().contains("down"));
    // The follower asks again, and then follows the store.
    assert_eq!(follower.handle_event(FollowerEvent::Adoption { sent_at: at_ms(9_000), adopted: None }), None);
    assert!(asked(&mut follower).is_some());
    follower.handle_event(FollowerEvent::Published(Ok(())));
    assert_eq!(follower.next_request(), FollowerRequest::Poll { after: 2, at_once: false });
}

#[test]
fn a_restart_merges_what_its_cache_holds() {
    let (_, store) = quarantined();
    let stood = HistoryPosition { revision: store.state().revision, hash: store.state().hash };
    let check = |known: Option<KnownRevocations>, rows_there: usize, expected: bool| {
        let mut follower = Follower::in_quarantine(stood.clone(), "it is adopted".into());
        assert_eq!((follower.next_request(), follower.published_revision()), (FollowerRequest::Adoption, None));
        let merged = rows(&store)[1..rows_there].to_vec();
        let adopted = AdoptedStore { known, ..adopted(&store, merged) };
        let action = follower.handle_event(FollowerEvent::Adoption { sent_at: at_ms(1), adopted: Some(Box::new(adopted)) });
        assert_eq!(action.is_some(), expected, "{:?}", follower.problem());
    };
    let known = |number: u64| Some(KnownRevocations { number, rows: rows(&store)[..number as usize].to_vec() });
    check(known(3), 3, true);
    check(known(3), 2, false);
    // A cache that stayed behind, and no cache: whatever exists is merged.
    check(known(2), 2, true);
    check(None, 1, true);
}

/// One step: an answer about the store, and the result of the publisher.
#[derive(Clone, Debug)]
enum AdoptionStep {
    Adoption { ms: i64, record: bool, family: bool, merged: usize, known: Option<u64>, builds: bool },
    Loaded,
    Changes,
    Published,
    Failed,
}

fn told() -> impl Strategy<Value = AdoptionStep> {
    let known = prop::option::weighted(0.8, 0..4_u64);
    let adoption = (0..12_000_i64, prop::bool::weighted(0.8), prop::bool::weighted(0.8), 0..3_usize, known, any::<bool>());
    prop_oneof![
        8 => adoption.prop_map(|(ms, record, family, merged, known, builds)| {
            AdoptionStep::Adoption { ms, record, family, merged, known, builds }
        }),
        1 => Just(AdoptionStep::Loaded),
        1 => Just(AdoptionStep::Changes),
        1 => Just(AdoptionStep::Published),
        1 => Just(AdoptionStep::Failed),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// For any order of answers, the follower leaves quarantine only with a record, full coverage and an old proof.
    #[test]
    fn quarantine_is_left_by_the_one_way(steps in prop::collection::vec(told(), 1..20)) {
        let (mut follower, store) = quarantined();
        for step in steps {
            let event = match &step {
                AdoptionStep::Adoption { ms, record, family, merged, known, .. } => {
                    let mut adopted = adopted(&store, rows(&store)[1..=*merged].to_vec());
                    if !record {
                        adopted.lineage.adoptions.clear();
                    }
                    if !family {
                        adopted.lineage.adoptions.iter_mut().for_each(|one| one.from.history = HistoryId::new("third"));
                    }
                    adopted.known = known.map(|number| KnownRevocations { number, rows: rows(&store)[..number as usize].to_vec() });
                    FollowerEvent::Adoption { sent_at: at_ms(*ms), adopted: Some(Box::new(adopted)) }
                }
                AdoptionStep::Loaded => FollowerEvent::Loaded { sent_at: at_ms(9_000), state: Box::new(store.state()) },
                AdoptionStep::Changes => FollowerEvent::Changes { sent_at: at_ms(9_000), changes: store.changes(3) },
                AdoptionStep::Published => FollowerEvent::Published(Ok(())),
                AdoptionStep::Failed => FollowerEvent::AdoptionFailed(store::Error::Unavailable("down".into())),
            };
            let action = follower.handle_event(event);
            let AdoptionStep::Adoption { ms, record, family, merged, known, builds } = step else {
                prop_assert_eq!((action, follower.state()), (None, FollowerState::Quarantined));
                continue;
            };
            let may = record && family && ms >= 1_000 + BOUND_MS && known == Some(3) && merged == 2;
            prop_assert_eq!(action.is_some(), may);
            follower.handle_event(FollowerEvent::Published(if builds { Ok(()) } else { Err("does not build".into()) }));
            prop_assert_eq!(follower.state() == FollowerState::Following, may && builds);
            if follower.state() == FollowerState::Following {
                break;
            }
        }
    }
}

/// A start from a cache at revision 2 while the recorded position is 4. Nothing is proved before the head is reached. A store
/// that does not continue from both positions is not followed.
#[test]
fn a_cached_start_is_unproved_until_the_head_is_reached() {
    let mut model = StoreModel::new("first");
    (0..6).for_each(|_| model.commit("main"));
    let place = |number: usize| HistoryPosition {
        revision: Revision { history: model.history.clone(), number: number as u64 },
        hash: model.commits[number - 1].hash,
    };
    let start = || Follower::from_cache(place(2), Some(place(4)));
    let mut follower = start();
    assert_eq!((follower.next_request(), follower.freshness_proof()), (FollowerRequest::Poll { after: 2, at_once: false }, None));
    assert_eq!((follower.published_revision(), follower.followed_position()), (None, None), "it is no place to remember");
    // A page that does not reach the head proves nothing. Its rows are still applied.
    let mut page = model.changes(2);
    page.commits.truncate(2);
    let action = follower.handle_event(FollowerEvent::Changes { sent_at: at_ms(5), changes: page });
    let Some(FollowerAction::Apply { commits, proof }) = action else { panic!("{action:?}") };
    assert_eq!((commits.len(), at_ms(1_000_000).elapsed_ms_since(proof) > 60_000), (2, true));
    follower.handle_event(FollowerEvent::Published(Ok(())));
    assert_eq!((follower.freshness_proof(), follower.next_request()), (None, FollowerRequest::Poll { after: 4, at_once: true }));
    follower.handle_event(FollowerEvent::Changes { sent_at: at_ms(7), changes: model.changes(4) });
    follower.handle_event(FollowerEvent::Published(Ok(())));
    assert_eq!((follower.state(), follower.freshness_proof()), (FollowerState::Following, Some(at_ms(7))));

    let check = |what: &str, event: FollowerEvent, expected: (FollowerState, FollowerRequest)| {
        let mut follower = start();
        if let Some(FollowerAction::Apply { .. } | FollowerAction::PublishFullState { .. }) = follower.handle_event(event) {
            follower.handle_event(FollowerEvent::Published(Ok(())));
        }
        assert_eq!((follower.state(), follower.next_request()), expected, "{what}: {:?}", follower.problem());
        assert_eq!(follower.freshness_proof().is_some(), follower.state() == FollowerState::Following, "{what}");
    };
    let quarantine = (FollowerState::Quarantined, FollowerRequest::Adoption);
    let told = |changes: ChangeLogPage| FollowerEvent::Changes { sent_at: at_ms(9), changes };
    check("it goes on", told(model.changes(2)), (FollowerState::Following, FollowerRequest::Poll { after: 6, at_once: false }));
    check(
        "no answer",
        FollowerEvent::PollFailed(store::Error::Unavailable("down".into())),
        (FollowerState::Bootstrapping, start().next_request()),
    );
    check(
        "a cut log",
        FollowerEvent::PollFailed(store::Error::BelowFloor { floor: 3 }),
        (FollowerState::Resync, FollowerRequest::Load),
    );
    // The store is at or ahead of the cached position, and behind the recorded one.
    let mut older = StoreModel::new("first");
    older.commits = model.commits[..2].to_vec();
    check("an older store", told(older.changes(2)), quarantine);
    older.commits = model.commits[..3].to_vec();
    check("an older store that is ahead of the cache", told(older.changes(2)), quarantine);
    let mut fork = StoreModel::new("first");
    fork.commits = model.commits[..3].to_vec();
    (0..5).for_each(|_| fork.commit("fork"));
    check("a fork after the cached place", told(fork.changes(2)), quarantine);
    check("another history", told(ChangeLogPage { history: HistoryId::new("x"), ..model.changes(2) }), quarantine);
    // The same with a full load, because the log was cut.
    let mut follower = start();
    follower.handle_event(FollowerEvent::PollFailed(store::Error::BelowFloor { floor: 3 }));
    follower.handle_event(FollowerEvent::Loaded { sent_at: at_ms(9), state: Box::new(older.state()) });
    assert_eq!(follower.state(), FollowerState::Quarantined);
}
