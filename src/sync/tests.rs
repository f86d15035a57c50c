//! Tests of the follower against a hostile store, and of its loop against a store that fails.

mod adoption;
mod at_least;
mod expiry;
mod model;
mod sim;

mod acknowledger;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use proptest::prelude::*;
use tokio::sync::watch;

use self::model::{StoreModel, commit_row};
use super::follower::{Follower, FollowerAction, FollowerEvent, FollowerRequest, FollowerState};
use super::status::RevisionUnavailable;
use super::{ChangeSource, FollowerLoop, Settings, SnapshotPublisher};
use crate::model::revision::Revision;
use crate::model::time::{ClockReading, SystemClock};
use crate::store::{self, ChangeLogPage, CommitRow};

/// A fault that the store or the network injects into one answer.
#[derive(Clone, Debug)]
enum AnswerFault {
    None,
    Fail,
    Drop(usize),
    Repeat(usize),
    Forge(usize),
    Cut(usize),
    BelowFloor,
}

#[derive(Clone, Debug)]
enum FollowerStep {
    Commit(usize),
    Ask(AnswerFault, bool),
    /// Rolls back to a number, then adds that many commits with other content.
    Fork(usize, usize),
    OtherHistory,
}

fn steps() -> impl Strategy<Value = Vec<FollowerStep>> {
    let fault = prop_oneof![
        6 => Just(AnswerFault::None),
        1 => Just(AnswerFault::Fail),
        1 => (0..4_usize).prop_map(AnswerFault::Drop),
        1 => (0..4_usize).prop_map(AnswerFault::Repeat),
        1 => (0..4_usize).prop_map(AnswerFault::Forge),
        2 => (0..4_usize).prop_map(AnswerFault::Cut),
        1 => Just(AnswerFault::BelowFloor),
    ];
    let step = prop_oneof![
        8 => (1..5_usize).prop_map(FollowerStep::Commit),
        16 => (fault, prop::bool::weighted(0.8)).prop_map(|(fault, builds)| FollowerStep::Ask(fault, builds)),
        1 => (0..30_usize, 0..4_usize).prop_map(|(to, more)| FollowerStep::Fork(to, more)),
        1 => Just(FollowerStep::OtherHistory),
    ];
    prop::collection::vec(step, 1..60)
}

/// A follower, the store that it follows, and the invariants between them.
struct FollowerWorld {
    store: StoreModel,
    follower: Follower,
    published: Vec<[u8; 32]>,
    /// The time at which the last full state was requested, and its number.
    loaded: (Option<ClockReading>, usize),
    clock: i64,
    frozen: bool,
}

fn now(second: i64) -> ClockReading {
    ClockReading { unix_ns: second * 1_000_000_000, boot_ns: second * 1_000_000_000 }
}

impl FollowerWorld {
    fn new() -> Self {
        Self {
            store: StoreModel::new("first"),
            follower: Follower::new(None),
            published: Vec::new(),
            loaded: (None, 0),
            clock: 0,
            frozen: false,
        }
    }

    /// Makes one query and handles its answer. The clock advances before and after.
    fn ask(&mut self, fault: &AnswerFault, builds: bool) -> Result<(), TestCaseError> {
        self.clock += 1;
        let sent_at = now(self.clock);
        let before = (self.published.len(), self.follower.freshness_proof());
        let event = match self.follower.next_request() {
            FollowerRequest::Nothing | FollowerRequest::Adoption => return Ok(()),
            FollowerRequest::Load => match fault {
                AnswerFault::None => {
                    self.loaded = (Some(sent_at), self.store.commits.len());
                    FollowerEvent::Loaded { sent_at, state: Box::new(self.store.state()) }
                }
                AnswerFault::Forge(_) => {
                    let mut state = self.store.state();
                    state.digest.add(&[1; 32]);
                    FollowerEvent::Loaded { sent_at, state: Box::new(state) }
                }
                _ => FollowerEvent::LoadFailed(store::Error::Unavailable("down".into())),
            },
            FollowerRequest::Poll { after, .. } => self.answer(after, fault, sent_at),
        };
        self.clock += 1;
        let action = self.follower.handle_event(event);
        self.check(action, sent_at, builds)?;
        let proof = self.follower.freshness_proof();
        prop_assert!(self.published.len() >= before.0, "the applied number fell");
        if proof != before.1 {
            let asked = [(Some(sent_at), self.store.commits.len()), self.loaded];
            prop_assert!(asked.contains(&(proof, self.published.len())), "a proof is when something was asked that is all here");
        }
        if self.frozen {
            prop_assert!(
                proof == before.1 || self.follower.state() == FollowerState::Following,
                "a proof moved while out of step"
            );
        }
        self.frozen = self.follower.state() == FollowerState::Resync;
        Ok(())
    }

    fn answer(&self, after: u64, fault: &AnswerFault, sent_at: ClockReading) -> FollowerEvent {
        let mut changes = self.store.changes(after);
        let count = changes.commits.len();
        match *fault {
            AnswerFault::Fail => return FollowerEvent::PollFailed(store::Error::Unavailable("down".into())),
            AnswerFault::BelowFloor => return FollowerEvent::PollFailed(store::Error::BelowFloor { floor: after + 1 }),
            AnswerFault::Drop(place) if place < count => drop(changes.commits.remove(place)),
            AnswerFault::Repeat(place) if place < count => changes.commits.insert(place, changes.commits[place].clone()),
            AnswerFault::Forge(place) if place < count => changes.commits[place].hash[0] ^= 1,
            AnswerFault::Cut(length) => changes.commits.truncate(length),
            _ => {}
        }
        FollowerEvent::Changes { sent_at, changes }
    }

    fn check(&mut self, action: Option<FollowerAction>, sent_at: ClockReading, builds: bool) -> Result<(), TestCaseError> {
        let result = if builds { Ok(()) } else { Err("does not build".to_owned()) };
        match action {
            None | Some(FollowerAction::Quarantine { .. }) => return Ok(()),
            Some(FollowerAction::Refresh { proof }) => {
                prop_assert_eq!(proof, sent_at);
                return Ok(());
            }
            Some(FollowerAction::PublishFullState { state, .. }) => {
                prop_assert_eq!(state.revision.number, self.loaded.1 as u64);
                if builds || self.follower.freshness_proof().is_some() {
                    self.published = self.store.commits[..self.loaded.1].iter().map(|commit| commit.hash).collect();
                }
            }
            Some(FollowerAction::Apply { commits, proof }) => {
                prop_assert!(!commits.is_empty());
                prop_assert!(proof.boot_ns <= sent_at.boot_ns);
                for commit in commits {
                    prop_assert_eq!(commit.number, self.published.len() as u64 + 1, "a hole was published");
                    prop_assert_eq!(commit.previous_hash, self.published.last().copied().unwrap_or_default());
                    self.published.push(commit.hash);
                }
            }
        }
        let failed_full = !builds && self.follower.published_revision().is_none();
        self.follower.handle_event(FollowerEvent::Published(result));
        if !failed_full && builds {
            prop_assert_eq!(self.follower.policy_number(), self.published.len() as u64);
        }
        Ok(())
    }

    fn is_in_store(&self) -> bool {
        self.store.commits.iter().map(|commit| commit.hash).take(self.published.len()).eq(self.published.iter().copied())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn follows_or_stops(steps in steps()) {
        let mut world = FollowerWorld::new();
        for step in steps {
            match step {
                FollowerStep::Commit(count) => (0..count).for_each(|_| world.store.commit("main")),
                FollowerStep::Ask(fault, builds) => world.ask(&fault, builds)?,
                // A fork shows as a mismatch in the next read of the log. In a resync only a full state is read.
                FollowerStep::Fork(to, more) if world.follower.state() == FollowerState::Following => {
                    world.store.fork(to, more);
                    world.store.commit("fork");
                    world.ask(&AnswerFault::None, true)?;
                    prop_assert_eq!(world.follower.state() == FollowerState::Following, world.is_in_store());
                }
                FollowerStep::OtherHistory if world.follower.published_revision().is_some() => {
                    world.store = StoreModel { commits: world.store.commits.clone(), ..StoreModel::new("second") };
                    world.ask(&AnswerFault::None, true)?;
                    prop_assert_eq!(world.follower.state(), FollowerState::Quarantined);
                }
                FollowerStep::Fork(..) | FollowerStep::OtherHistory => {}
            }
        }
        // Without faults, the follower catches up.
        (0..3).try_for_each(|_| world.ask(&AnswerFault::None, true))?;
        if world.follower.state() != FollowerState::Quarantined {
            prop_assert_eq!(world.follower.state(), FollowerState::Following);
            prop_assert_eq!(world.published.len(), world.store.commits.len());
            prop_assert!(world.is_in_store());
        } else {
            prop_assert_eq!(world.follower.next_request(), FollowerRequest::Adoption);
        }
    }
}

/// The effect of each answer to a poll on a follower at revision 3.
#[test]
fn answers_to_a_poll() {
    let check = |what: &str, break_it: &dyn Fn(&mut ChangeLogPage), expected: FollowerState| {
        let mut world = FollowerWorld::new();
        (0..3).for_each(|_| world.store.commit("main"));
        world.ask(&AnswerFault::None, true).unwrap();
        (0..3).for_each(|_| world.store.commit("main"));
        let mut changes = world.store.changes(3);
        break_it(&mut changes);
        if let Some(FollowerAction::Apply { .. }) =
            world.follower.handle_event(FollowerEvent::Changes { sent_at: now(9), changes })
        {
            world.follower.handle_event(FollowerEvent::Published(Ok(())));
        }
        assert_eq!(world.follower.state(), expected, "{what}: {:?}", world.follower.problem());
        let moved = world.follower.freshness_proof() == Some(now(9));
        assert_eq!(moved, what == "whole" || what == "nothing new", "{what}: proof");
    };
    check("whole", &|_| {}, FollowerState::Following);
    let nothing_new = |changes: &mut ChangeLogPage| {
        (changes.head, changes.head_hash) = (3, changes.commits[0].previous_hash);
        changes.commits.clear();
    };
    check("nothing new", &nothing_new, FollowerState::Following);
    let forked = |changes: &mut ChangeLogPage| (changes.head, changes.head_hash, changes.commits) = (3, [7; 32], vec![]);
    check("another at the same number", &forked, FollowerState::Quarantined);
    check("another head", &|changes| changes.head_hash = [7; 32], FollowerState::Resync);
    check("a part", &|changes| changes.commits.truncate(1), FollowerState::Following);
    check("a hole at the front", &|changes| drop(changes.commits.remove(0)), FollowerState::Resync);
    check("a hole", &|changes| drop(changes.commits.remove(1)), FollowerState::Resync);
    check("twice the same", &|changes| changes.commits.insert(1, changes.commits[0].clone()), FollowerState::Resync);
    check("nothing where there is more", &|changes| changes.commits.clear(), FollowerState::Resync);
    check("past the head", &|changes| changes.head = 5, FollowerState::Resync);
    check("forged changes", &|changes| changes.commits[1].changes.clear(), FollowerState::Resync);
    check("a forged hash", &|changes| changes.commits[2].hash = [7; 32], FollowerState::Resync);
    check("another past", &|changes| changes.commits[0] = commit_row(4, [7; 32], "x"), FollowerState::Quarantined);
    check("a lower head", &|changes| (changes.head, changes.commits) = (2, vec![]), FollowerState::Quarantined);
    check("another history", &|changes| changes.history = StoreModel::new("other").history, FollowerState::Quarantined);
}

#[test]
fn a_known_place_is_kept_across_restarts() {
    let mut world = FollowerWorld::new();
    (0..3).for_each(|_| world.store.commit("main"));
    let check = |number: usize, hash: [u8; 32], expected: FollowerState| {
        let revision = Revision { history: world.store.history.clone(), number: number as u64 };
        let mut follower = Follower::new(Some(super::follower::HistoryPosition { revision, hash }));
        assert_eq!((follower.published_revision(), follower.next_request()), (None, FollowerRequest::Load));
        follower.handle_event(FollowerEvent::Loaded { sent_at: now(1), state: Box::new(world.store.state()) });
        // If the store is ahead, its log must show that it continues from the known position.
        if let FollowerRequest::Poll { after, .. } = follower.next_request() {
            assert_eq!((after, follower.published_revision()), (number as u64, None));
            follower.handle_event(FollowerEvent::Changes { sent_at: now(2), changes: world.store.changes(after) });
        }
        follower.handle_event(FollowerEvent::Published(Ok(())));
        assert_eq!(follower.state(), expected, "known: {number}");
        assert!(
            follower.freshness_proof().is_none_or(|proof| proof == now(1)),
            "the log proves where it leads, not that it is new"
        );
    };
    check(3, world.store.commits[2].hash, FollowerState::Following);
    check(2, world.store.commits[1].hash, FollowerState::Following);
    check(3, [7; 32], FollowerState::Quarantined);
    check(2, [7; 32], FollowerState::Quarantined);
    check(4, [7; 32], FollowerState::Quarantined);
}

/// A full state ahead of the known position is traced by the change log.
#[test]
fn a_loaded_state_is_traced_to_the_known_place() {
    let check = |what: &str, event: &dyn Fn(&mut FollowerWorld) -> FollowerEvent, expected: (FollowerState, FollowerRequest)| {
        let mut world = FollowerWorld::new();
        (0..5).for_each(|_| world.store.commit("main"));
        let revision = Revision { history: world.store.history.clone(), number: 1 };
        let known = super::follower::HistoryPosition { revision, hash: world.store.commits[0].hash };
        let mut follower = Follower::new(Some(known));
        follower.handle_event(FollowerEvent::Loaded { sent_at: now(1), state: Box::new(world.store.state()) });
        if let Some(FollowerAction::PublishFullState { .. }) = follower.handle_event(event(&mut world)) {
            follower.handle_event(FollowerEvent::Published(Ok(())));
        }
        assert_eq!((follower.state(), follower.next_request()), expected, "{what}: {:?}", follower.problem());
    };
    let changes = |break_it: fn(&mut ChangeLogPage)| {
        move |world: &mut FollowerWorld| {
            let mut changes = world.store.changes(1);
            break_it(&mut changes);
            FollowerEvent::Changes { sent_at: now(2), changes }
        }
    };
    let poll = |after| FollowerRequest::Poll { after, at_once: true };
    let followed = (FollowerState::Following, FollowerRequest::Poll { after: 5, at_once: false });
    check("it leads there", &changes(|_| {}), followed);
    check("a part of it", &changes(|changes| changes.commits.truncate(2)), (FollowerState::Bootstrapping, poll(3)));
    check("a hole", &changes(|changes| drop(changes.commits.remove(1))), followed);
    let lost_end = |world: &mut FollowerWorld| {
        world.store.commit("main");
        world.store.lost = Some(5);
        FollowerEvent::Changes { sent_at: now(2), changes: world.store.changes(1) }
    };
    check("a hole at its end", &lost_end, followed);
    check("a cut log", &|_| FollowerEvent::PollFailed(store::Error::BelowFloor { floor: 3 }), followed);
    check(
        "no answer",
        &|_| FollowerEvent::PollFailed(store::Error::Unavailable("down".into())),
        (FollowerState::Bootstrapping, poll(1)),
    );
    let another_past = |changes: &mut ChangeLogPage| changes.commits[0] = commit_row(2, [7; 32], "fork");
    check("another past", &changes(another_past), (FollowerState::Quarantined, FollowerRequest::Adoption));
    check(
        "another history",
        &changes(|it| it.history = StoreModel::new("x").history),
        (FollowerState::Quarantined, FollowerRequest::Adoption),
    );
    check("it fell", &changes(|changes| changes.head = 0), (FollowerState::Quarantined, FollowerRequest::Adoption));
    check("it fell meanwhile", &changes(|changes| changes.head = 4), (FollowerState::Bootstrapping, FollowerRequest::Load));
    let forked_since = |world: &mut FollowerWorld| {
        world.store.fork(3, 2);
        FollowerEvent::Changes { sent_at: now(2), changes: world.store.changes(1) }
    };
    check("another end", &forked_since, (FollowerState::Bootstrapping, FollowerRequest::Load));
}

/// A model store that can be down. The test shares it with the loop.
#[derive(Clone)]
struct SharedModel(Arc<Mutex<(StoreModel, bool)>>, watch::Sender<u64>);

#[async_trait]
impl ChangeSource for SharedModel {
    async fn load(&self) -> Result<store::StoreState, store::Error> {
        let (model, down) = &*self.0.lock().unwrap();
        if *down { Err(store::Error::Unavailable("down".into())) } else { Ok(model.state()) }
    }

    async fn changes(&self, after: u64) -> Result<ChangeLogPage, store::Error> {
        let (model, down) = &*self.0.lock().unwrap();
        if *down { Err(store::Error::Unavailable("down".into())) } else { Ok(model.changes(after)) }
    }

    fn subscribe_commits(&self) -> watch::Receiver<u64> {
        self.1.subscribe()
    }
}

impl SharedModel {
    fn with<T>(&self, act: impl FnOnce(&mut (StoreModel, bool)) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    fn revision(&self) -> Revision {
        self.with(|(model, _)| model.state().revision)
    }
}

/// The published number and the reason of the quarantine. Commits named "bad" do not build.
#[derive(Clone, Default)]
struct RecordingPublisher(Arc<Mutex<(u64, Option<String>)>>);

impl SnapshotPublisher for RecordingPublisher {
    fn publish_state(&mut self, state: store::StoreState, _: ClockReading) -> Result<(), String> {
        self.0.lock().unwrap().0 = state.revision.number;
        Ok(())
    }

    fn publish_commits(&mut self, commits: &[CommitRow], _: ClockReading) -> Result<(), String> {
        self.0.lock().unwrap().0 = commits.last().unwrap().number;
        let bad = commits.iter().any(|commit| format!("{:?}", commit.changes).contains("bad"));
        if bad { Err("a bad policy".into()) } else { Ok(()) }
    }

    fn renew_proof(&mut self, _: ClockReading) {}

    fn quarantine(&mut self, reason: &str) {
        self.0.lock().unwrap().1 = Some(reason.to_owned());
    }
}

const WAIT_MAX: Duration = Duration::from_secs(30);

#[tokio::test]
async fn the_loop_from_start_to_quarantine() {
    let store = SharedModel(Arc::new(Mutex::new((StoreModel::new("first"), true))), watch::channel(0).0);
    let recorder = RecordingPublisher::default();
    // The poll interval is an hour, so every poll below is requested or hinted.
    let settings = Settings { poll_interval_ms: 3_600_000, backoff_ms_min: 1, backoff_ms_max: 2, ..Settings::default() };
    let (follow, status) = FollowerLoop::new(store.clone(), recorder.clone(), Arc::new(SystemClock), settings, None);
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(follow.run(stopped));

    // While the store is down, the replica is not ready. Once it is up, the replica is.
    assert_eq!(status.wait_for_revision(&store.revision(), Duration::ZERO).await, Err(RevisionUnavailable::NotReady));
    store.with(|(model, down)| (model.commit("main"), *down = false));
    assert!(status.wait_until_ready().await);
    assert_eq!(
        (status.applied_number(), status.state(), status.history()),
        (1, FollowerState::Following, Some(store.revision().history))
    );

    // A poll follows a request, and then the store's hint.
    store.with(|(model, _)| model.commit("main"));
    status.wait_for_revision(&store.revision(), WAIT_MAX).await.unwrap();
    assert_eq!(recorder.0.lock().unwrap().0, 2, "published before it is shown");
    store.with(|(model, _)| model.commit("main"));
    store.1.send_replace(3);
    let mut shown = status.clone();
    shown.wait_until_applied(3).await;

    // A policy that cannot be built: revocations are still applied, but `at_least` is not served until a policy builds.
    store.with(|(model, _)| model.commit("bad"));
    let bad = store.revision();
    status.request_poll();
    shown.wait_until_applied(4).await;
    let behind = status.wait_for_revision(&bad, Duration::ZERO).await;
    assert_eq!(behind, Err(RevisionUnavailable::NotApplied { asked: bad.clone(), applied: 4, policy: 3 }));
    store.with(|(model, _)| model.commit("main"));
    status.wait_for_revision(&store.revision(), WAIT_MAX).await.unwrap();
    assert_eq!((status.applied_number(), status.policy_number(), status.problem()), (5, 5, None));

    // A revision of another history is requested, and then the store has another history.
    let other = Revision { history: StoreModel::new("second").history, number: 1 };
    assert!(matches!(status.wait_for_revision(&other, WAIT_MAX).await, Err(RevisionUnavailable::OtherHistory { .. })));
    store.with(|(model, _)| model.history = other.history.clone());
    let next = Revision { number: 6, history: bad.history };
    assert!(matches!(status.wait_for_revision(&next, WAIT_MAX).await, Err(RevisionUnavailable::Quarantined { .. })));
    assert!(recorder.0.lock().unwrap().1.as_ref().is_some_and(|reason| reason.contains("second")));
    let counts = status.counts();
    assert_eq!((counts.loads, counts.commits, counts.build_failures, counts.quarantines), (1, 4, 1, 1));
    assert!(counts.load_failures >= 1);

    stop.send_replace(true);
    task.await.unwrap();
}

#[tokio::test]
async fn the_loop_falls_out_of_step_and_back() {
    let store = SharedModel(Arc::new(Mutex::new((StoreModel::new("first"), false))), watch::channel(0).0);
    let settings = Settings { poll_interval_ms: 1, resync_jitter_ms_max: 1, ..Settings::default() };
    let (follow, status) = FollowerLoop::new(store.clone(), RecordingPublisher::default(), Arc::new(SystemClock), settings, None);
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(follow.run(stopped));
    assert!(status.wait_until_ready().await);
    store.with(|(model, _)| {
        (0..3).for_each(|_| model.commit("main"));
        model.lost = Some(2);
    });
    status.wait_for_revision(&store.revision(), WAIT_MAX).await.unwrap();
    assert_eq!((status.counts().resyncs, status.counts().loads, status.state()), (1, 2, FollowerState::Following));
    // The sender of the stop signal is dropped, so the loop ends.
    drop(stop);
    task.await.unwrap();
    assert!(!matches!(status.wait_for_revision(&Revision { number: 9, ..store.revision() }, WAIT_MAX).await, Ok(())));
}

/// Callers that wait for an impossible revision cannot make a replica poll more often than the distance allows.
#[tokio::test]
async fn polls_that_callers_cause_keep_their_distance() {
    let store = SharedModel(Arc::new(Mutex::new((StoreModel::new("first"), false))), watch::channel(0).0);
    // The poll interval is an hour.
    let settings = Settings { poll_interval_ms: 3_600_000, ..Settings::default() };
    let (follow, status) = FollowerLoop::new(store.clone(), RecordingPublisher::default(), Arc::new(SystemClock), settings, None);
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(follow.run(stopped));
    assert!(status.wait_until_ready().await);
    let (began, polls_before) = (std::time::Instant::now(), status.counts().polls);
    let never = Revision { number: 99, ..store.revision() };
    for _ in 0..200 {
        let waited = status.wait_for_revision(&never, Duration::from_millis(1)).await;
        assert!(matches!(waited, Err(RevisionUnavailable::NotApplied { .. })), "{waited:?}");
    }
    // No sleep ends too early, so this holds on a slow machine as well.
    let (elapsed_ms, polls) = (began.elapsed().as_millis() as u64, status.counts().polls - polls_before);
    assert!((1..=elapsed_ms / 25 + 2).contains(&polls), "{polls} polls in {elapsed_ms} ms");
    // A caller that waits is still served.
    store.with(|(model, _)| model.commit("main"));
    status.wait_for_revision(&store.revision(), WAIT_MAX).await.unwrap();
    stop.send_replace(true);
    task.await.unwrap();
}
