//! Tests of the follower against a hostile store, and of its loop against a store that fails.

mod adoption;
mod at_least;
mod lapse;
mod model;
mod sim;

mod acknowledge;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use proptest::prelude::*;
use tokio::sync::watch;

use self::model::{Model, commit_row};
use super::follower::{Action, Event, Follower, Request, State};
use super::status::Behind;
use super::{Follow, Publisher, Settings, Source};
use crate::model::revision::Revision;
use crate::model::time::{Now, SystemClock};
use crate::store::{self, Changes, CommitRow};

/// A fault that the store or the network injects into one answer.
#[derive(Clone, Debug)]
enum Fault {
    None,
    Fail,
    Drop(usize),
    Repeat(usize),
    Forge(usize),
    Cut(usize),
    BelowFloor,
}

#[derive(Clone, Debug)]
enum Step {
    Commit(usize),
    Ask(Fault, bool),
    /// Rolls back to a number, then adds that many commits with other content.
    Fork(usize, usize),
    OtherHistory,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fault = prop_oneof![
        6 => Just(Fault::None),
        1 => Just(Fault::Fail),
        1 => (0..4_usize).prop_map(Fault::Drop),
        1 => (0..4_usize).prop_map(Fault::Repeat),
        1 => (0..4_usize).prop_map(Fault::Forge),
        2 => (0..4_usize).prop_map(Fault::Cut),
        1 => Just(Fault::BelowFloor),
    ];
    let step = prop_oneof![
        8 => (1..5_usize).prop_map(Step::Commit),
        16 => (fault, prop::bool::weighted(0.8)).prop_map(|(fault, builds)| Step::Ask(fault, builds)),
        1 => (0..30_usize, 0..4_usize).prop_map(|(to, more)| Step::Fork(to, more)),
        1 => Just(Step::OtherHistory),
    ];
    prop::collection::vec(step, 1..60)
}

/// A follower, the store that it follows, and the invariants between them.
struct World {
    store: Model,
    follower: Follower,
    published: Vec<[u8; 32]>,
    /// The time at which the last full state was requested, and its number.
    loaded: (Option<Now>, usize),
    clock: i64,
    frozen: bool,
}

fn now(second: i64) -> Now {
    Now { unix_ns: second * 1_000_000_000, boot_ns: second * 1_000_000_000 }
}

impl World {
    fn new() -> Self {
        Self {
            store: Model::new("first"),
            follower: Follower::new(None),
            published: Vec::new(),
            loaded: (None, 0),
            clock: 0,
            frozen: false,
        }
    }

    /// Makes one query and handles its answer. The clock advances before and after.
    fn ask(&mut self, fault: &Fault, builds: bool) -> Result<(), TestCaseError> {
        self.clock += 1;
        let sent_at = now(self.clock);
        let before = (self.published.len(), self.follower.proof());
        let event = match self.follower.request() {
            Request::Nothing | Request::Adoption => return Ok(()),
            Request::Load => match fault {
                Fault::None => {
                    self.loaded = (Some(sent_at), self.store.commits.len());
                    Event::Loaded { sent_at, state: Box::new(self.store.state()) }
                }
                Fault::Forge(_) => {
                    let mut state = self.store.state();
                    state.digest.add(&[1; 32]);
                    Event::Loaded { sent_at, state: Box::new(state) }
                }
                _ => Event::LoadFailed(store::Error::Unavailable("down".into())),
            },
            Request::Poll { after, .. } => self.answer(after, fault, sent_at),
        };
        self.clock += 1;
        let action = self.follower.on(event);
        self.check(action, sent_at, builds)?;
        let proof = self.follower.proof();
        prop_assert!(self.published.len() >= before.0, "the applied number fell");
        if proof != before.1 {
            let asked = [(Some(sent_at), self.store.commits.len()), self.loaded];
            prop_assert!(asked.contains(&(proof, self.published.len())), "a proof is when something was asked that is all here");
        }
        if self.frozen {
            prop_assert!(proof == before.1 || self.follower.state() == State::Following, "a proof moved while out of step");
        }
        self.frozen = self.follower.state() == State::Resync;
        Ok(())
    }

    fn answer(&self, after: u64, fault: &Fault, sent_at: Now) -> Event {
        let mut changes = self.store.changes(after);
        let count = changes.commits.len();
        match *fault {
            Fault::Fail => return Event::PollFailed(store::Error::Unavailable("down".into())),
            Fault::BelowFloor => return Event::PollFailed(store::Error::BelowFloor { floor: after + 1 }),
            Fault::Drop(place) if place < count => drop(changes.commits.remove(place)),
            Fault::Repeat(place) if place < count => changes.commits.insert(place, changes.commits[place].clone()),
            Fault::Forge(place) if place < count => changes.commits[place].hash[0] ^= 1,
            Fault::Cut(length) => changes.commits.truncate(length),
            _ => {}
        }
        Event::Changes { sent_at, changes }
    }

    fn check(&mut self, action: Option<Action>, sent_at: Now, builds: bool) -> Result<(), TestCaseError> {
        let result = if builds { Ok(()) } else { Err("does not build".to_owned()) };
        match action {
            None | Some(Action::Quarantine { .. }) => return Ok(()),
            Some(Action::Refresh { proof }) => {
                prop_assert_eq!(proof, sent_at);
                return Ok(());
            }
            Some(Action::Replace { state, .. }) => {
                prop_assert_eq!(state.revision.number, self.loaded.1 as u64);
                if builds || self.follower.proof().is_some() {
                    self.published = self.store.commits[..self.loaded.1].iter().map(|commit| commit.hash).collect();
                }
            }
            Some(Action::Apply { commits, proof }) => {
                prop_assert!(!commits.is_empty());
                prop_assert!(proof.boot_ns <= sent_at.boot_ns);
                for commit in commits {
                    prop_assert_eq!(commit.number, self.published.len() as u64 + 1, "a hole was published");
                    prop_assert_eq!(commit.previous_hash, self.published.last().copied().unwrap_or_default());
                    self.published.push(commit.hash);
                }
            }
        }
        let failed_full = !builds && self.follower.published().is_none();
        self.follower.on(Event::Published(result));
        if !failed_full && builds {
            prop_assert_eq!(self.follower.policy(), self.published.len() as u64);
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
        let mut world = World::new();
        for step in steps {
            match step {
                Step::Commit(count) => (0..count).for_each(|_| world.store.commit("main")),
                Step::Ask(fault, builds) => world.ask(&fault, builds)?,
                // A fork shows as a mismatch in the next read of the log. In a resync only a full state is read.
                Step::Fork(to, more) if world.follower.state() == State::Following => {
                    world.store.fork(to, more);
                    world.store.commit("fork");
                    world.ask(&Fault::None, true)?;
                    prop_assert_eq!(world.follower.state() == State::Following, world.is_in_store());
                }
                Step::OtherHistory if world.follower.published().is_some() => {
                    world.store = Model { commits: world.store.commits.clone(), ..Model::new("second") };
                    world.ask(&Fault::None, true)?;
                    prop_assert_eq!(world.follower.state(), State::Quarantined);
                }
                Step::Fork(..) | Step::OtherHistory => {}
            }
        }
        // Without faults, the follower catches up.
        (0..3).try_for_each(|_| world.ask(&Fault::None, true))?;
        if world.follower.state() != State::Quarantined {
            prop_assert_eq!(world.follower.state(), State::Following);
            prop_assert_eq!(world.published.len(), world.store.commits.len());
            prop_assert!(world.is_in_store());
        } else {
            prop_assert_eq!(world.follower.request(), Request::Adoption);
        }
    }
}

/// The effect of each answer to a poll on a follower at revision 3.
#[test]
fn answers_to_a_poll() {
    let check = |what: &str, break_it: &dyn Fn(&mut Changes), expected: State| {
        let mut world = World::new();
        (0..3).for_each(|_| world.store.commit("main"));
        world.ask(&Fault::None, true).unwrap();
        (0..3).for_each(|_| world.store.commit("main"));
        let mut changes = world.store.changes(3);
        break_it(&mut changes);
        if let Some(Action::Apply { .. }) = world.follower.on(Event::Changes { sent_at: now(9), changes }) {
            world.follower.on(Event::Published(Ok(())));
        }
        assert_eq!(world.follower.state(), expected, "{what}: {:?}", world.follower.problem());
        let moved = world.follower.proof() == Some(now(9));
        assert_eq!(moved, what == "whole" || what == "nothing new", "{what}: proof");
    };
    check("whole", &|_| {}, State::Following);
    let nothing_new = |changes: &mut Changes| {
        (changes.head, changes.head_hash) = (3, changes.commits[0].previous_hash);
        changes.commits.clear();
    };
    check("nothing new", &nothing_new, State::Following);
    let forked = |changes: &mut Changes| (changes.head, changes.head_hash, changes.commits) = (3, [7; 32], vec![]);
    check("another at the same number", &forked, State::Quarantined);
    check("another head", &|changes| changes.head_hash = [7; 32], State::Resync);
    check("a part", &|changes| changes.commits.truncate(1), State::Following);
    check("a hole at the front", &|changes| drop(changes.commits.remove(0)), State::Resync);
    check("a hole", &|changes| drop(changes.commits.remove(1)), State::Resync);
    check("twice the same", &|changes| changes.commits.insert(1, changes.commits[0].clone()), State::Resync);
    check("nothing where there is more", &|changes| changes.commits.clear(), State::Resync);
    check("past the head", &|changes| changes.head = 5, State::Resync);
    check("forged changes", &|changes| changes.commits[1].changes.clear(), State::Resync);
    check("a forged hash", &|changes| changes.commits[2].hash = [7; 32], State::Resync);
    check("another past", &|changes| changes.commits[0] = commit_row(4, [7; 32], "x"), State::Quarantined);
    check("a lower head", &|changes| (changes.head, changes.commits) = (2, vec![]), State::Quarantined);
    check("another history", &|changes| changes.history = Model::new("other").history, State::Quarantined);
}

#[test]
fn a_known_place_is_kept_across_restarts() {
    let mut world = World::new();
    (0..3).for_each(|_| world.store.commit("main"));
    let check = |number: usize, hash: [u8; 32], expected: State| {
        let revision = Revision { history: world.store.history.clone(), number: number as u64 };
        let mut follower = Follower::new(Some(super::follower::Position { revision, hash }));
        assert_eq!((follower.published(), follower.request()), (None, Request::Load));
        follower.on(Event::Loaded { sent_at: now(1), state: Box::new(world.store.state()) });
        // If the store is ahead, its log must show that it continues from the known position.
        if let Request::Poll { after, .. } = follower.request() {
            assert_eq!((after, follower.published()), (number as u64, None));
            follower.on(Event::Changes { sent_at: now(2), changes: world.store.changes(after) });
        }
        follower.on(Event::Published(Ok(())));
        assert_eq!(follower.state(), expected, "known: {number}");
        assert!(follower.proof().is_none_or(|proof| proof == now(1)), "the log proves where it leads, not that it is new");
    };
    check(3, world.store.commits[2].hash, State::Following);
    check(2, world.store.commits[1].hash, State::Following);
    check(3, [7; 32], State::Quarantined);
    check(2, [7; 32], State::Quarantined);
    check(4, [7; 32], State::Quarantined);
}

/// A full state ahead of the known position is traced by the change log.
#[test]
fn a_loaded_state_is_traced_to_the_known_place() {
    let check = |what: &str, event: &dyn Fn(&mut World) -> Event, expected: (State, Request)| {
        let mut world = World::new();
        (0..5).for_each(|_| world.store.commit("main"));
        let revision = Revision { history: world.store.history.clone(), number: 1 };
        let known = super::follower::Position { revision, hash: world.store.commits[0].hash };
        let mut follower = Follower::new(Some(known));
        follower.on(Event::Loaded { sent_at: now(1), state: Box::new(world.store.state()) });
        if let Some(Action::Replace { .. }) = follower.on(event(&mut world)) {
            follower.on(Event::Published(Ok(())));
        }
        assert_eq!((follower.state(), follower.request()), expected, "{what}: {:?}", follower.problem());
    };
    let changes = |break_it: fn(&mut Changes)| {
        move |world: &mut World| {
            let mut changes = world.store.changes(1);
            break_it(&mut changes);
            Event::Changes { sent_at: now(2), changes }
        }
    };
    let poll = |after| Request::Poll { after, at_once: true };
    let followed = (State::Following, Request::Poll { after: 5, at_once: false });
    check("it leads there", &changes(|_| {}), followed);
    check("a part of it", &changes(|changes| changes.commits.truncate(2)), (State::Bootstrapping, poll(3)));
    check("a hole", &changes(|changes| drop(changes.commits.remove(1))), followed);
    let lost_end = |world: &mut World| {
        world.store.commit("main");
        world.store.lost = Some(5);
        Event::Changes { sent_at: now(2), changes: world.store.changes(1) }
    };
    check("a hole at its end", &lost_end, followed);
    check("a cut log", &|_| Event::PollFailed(store::Error::BelowFloor { floor: 3 }), followed);
    check("no answer", &|_| Event::PollFailed(store::Error::Unavailable("down".into())), (State::Bootstrapping, poll(1)));
    let another_past = |changes: &mut Changes| changes.commits[0] = commit_row(2, [7; 32], "fork");
    check("another past", &changes(another_past), (State::Quarantined, Request::Adoption));
    check("another history", &changes(|it| it.history = Model::new("x").history), (State::Quarantined, Request::Adoption));
    check("it fell", &changes(|changes| changes.head = 0), (State::Quarantined, Request::Adoption));
    check("it fell meanwhile", &changes(|changes| changes.head = 4), (State::Bootstrapping, Request::Load));
    let forked_since = |world: &mut World| {
        world.store.fork(3, 2);
        Event::Changes { sent_at: now(2), changes: world.store.changes(1) }
    };
    check("another end", &forked_since, (State::Bootstrapping, Request::Load));
}

/// A model store that can be down. The test shares it with the loop.
#[derive(Clone)]
struct Shared(Arc<Mutex<(Model, bool)>>, watch::Sender<u64>);

#[async_trait]
impl Source for Shared {
    async fn load(&self) -> Result<store::State, store::Error> {
        let (model, down) = &*self.0.lock().unwrap();
        if *down { Err(store::Error::Unavailable("down".into())) } else { Ok(model.state()) }
    }

    async fn changes(&self, after: u64) -> Result<Changes, store::Error> {
        let (model, down) = &*self.0.lock().unwrap();
        if *down { Err(store::Error::Unavailable("down".into())) } else { Ok(model.changes(after)) }
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.1.subscribe()
    }
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut (Model, bool)) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    fn revision(&self) -> Revision {
        self.with(|(model, _)| model.state().revision)
    }
}

/// The published number and the reason of the quarantine. Commits named "bad" do not build.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<(u64, Option<String>)>>);

impl Publisher for Recorder {
    fn replace(&mut self, state: store::State, _: Now) -> Result<(), String> {
        self.0.lock().unwrap().0 = state.revision.number;
        Ok(())
    }

    fn apply(&mut self, commits: &[CommitRow], _: Now) -> Result<(), String> {
        self.0.lock().unwrap().0 = commits.last().unwrap().number;
        let bad = commits.iter().any(|commit| format!("{:?}", commit.changes).contains("bad"));
        if bad { Err("a bad policy".into()) } else { Ok(()) }
    }

    fn refresh(&mut self, _: Now) {}

    fn quarantine(&mut self, reason: &str) {
        self.0.lock().unwrap().1 = Some(reason.to_owned());
    }
}

const LONG: Duration = Duration::from_secs(30);

#[tokio::test]
async fn the_loop_from_start_to_quarantine() {
    let store = Shared(Arc::new(Mutex::new((Model::new("first"), true))), watch::channel(0).0);
    let recorder = Recorder::default();
    // The poll interval is an hour, so every poll below is requested or hinted.
    let settings = Settings { poll_interval_ms: 3_600_000, backoff_ms_min: 1, backoff_ms_max: 2, ..Settings::default() };
    let (follow, status) = Follow::new(store.clone(), recorder.clone(), Arc::new(SystemClock), settings, None);
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(follow.run(stopped));

    // While the store is down, the replica is not ready. Once it is up, the replica is.
    assert_eq!(status.wait_for(&store.revision(), Duration::ZERO).await, Err(Behind::NotReady));
    store.with(|(model, down)| (model.commit("main"), *down = false));
    assert!(status.ready().await);
    assert_eq!((status.applied(), status.state(), status.history()), (1, State::Following, Some(store.revision().history)));

    // A poll follows a request, and then the store's hint.
    store.with(|(model, _)| model.commit("main"));
    status.wait_for(&store.revision(), LONG).await.unwrap();
    assert_eq!(recorder.0.lock().unwrap().0, 2, "published before it is shown");
    store.with(|(model, _)| model.commit("main"));
    store.1.send_replace(3);
    let mut shown = status.clone();
    shown.reached(3).await;

    // A policy that cannot be built: revocations are still applied, but `at_least` is not served until a policy builds.
    store.with(|(model, _)| model.commit("bad"));
    let bad = store.revision();
    status.poll_now();
    shown.reached(4).await;
    let behind = status.wait_for(&bad, Duration::ZERO).await;
    assert_eq!(behind, Err(Behind::NotYet { asked: bad.clone(), applied: 4, policy: 3 }));
    store.with(|(model, _)| model.commit("main"));
    status.wait_for(&store.revision(), LONG).await.unwrap();
    assert_eq!((status.applied(), status.policy(), status.problem()), (5, 5, None));

    // A revision of another history is requested, and then the store has another history.
    let other = Revision { history: Model::new("second").history, number: 1 };
    assert!(matches!(status.wait_for(&other, LONG).await, Err(Behind::OtherHistory { .. })));
    store.with(|(model, _)| model.history = other.history.clone());
    let next = Revision { number: 6, history: bad.history };
    assert!(matches!(status.wait_for(&next, LONG).await, Err(Behind::Quarantined { .. })));
    assert!(recorder.0.lock().unwrap().1.as_ref().is_some_and(|reason| reason.contains("second")));
    let counts = status.counts();
    assert_eq!((counts.loads, counts.commits, counts.build_failures, counts.quarantines), (1, 4, 1, 1));
    assert!(counts.load_failures >= 1);

    stop.send_replace(true);
    task.await.unwrap();
}

#[tokio::test]
async fn the_loop_falls_out_of_step_and_back() {
    let store = Shared(Arc::new(Mutex::new((Model::new("first"), false))), watch::channel(0).0);
    let settings = Settings { poll_interval_ms: 1, resync_jitter_ms_max: 1, ..Settings::default() };
    let (follow, status) = Follow::new(store.clone(), Recorder::default(), Arc::new(SystemClock), settings, None);
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(follow.run(stopped));
    assert!(status.ready().await);
    store.with(|(model, _)| {
        (0..3).for_each(|_| model.commit("main"));
        model.lost = Some(2);
    });
    status.wait_for(&store.revision(), LONG).await.unwrap();
    assert_eq!((status.counts().resyncs, status.counts().loads, status.state()), (1, 2, State::Following));
    // The sender of the stop signal is dropped, so the loop ends.
    drop(stop);
    task.await.unwrap();
    assert!(!matches!(status.wait_for(&Revision { number: 9, ..store.revision() }, LONG).await, Ok(())));
}

/// Callers that wait for an impossible revision cannot make a replica poll more often than the distance allows.
#[tokio::test]
async fn polls_that_callers_cause_keep_their_distance() {
    let store = Shared(Arc::new(Mutex::new((Model::new("first"), false))), watch::channel(0).0);
    // The poll interval is an hour.
    let settings = Settings { poll_interval_ms: 3_600_000, ..Settings::default() };
    let (follow, status) = Follow::new(store.clone(), Recorder::default(), Arc::new(SystemClock), settings, None);
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(follow.run(stopped));
    assert!(status.ready().await);
    let (began, polls_before) = (std::time::Instant::now(), status.counts().polls);
    let never = Revision { number: 99, ..store.revision() };
    for _ in 0..200 {
        let waited = status.wait_for(&never, Duration::from_millis(1)).await;
        assert!(matches!(waited, Err(Behind::NotYet { .. })), "{waited:?}");
    }
    // No sleep ends too early, so this holds on a slow machine as well.
    let (elapsed_ms, polls) = (began.elapsed().as_millis() as u64, status.counts().polls - polls_before);
    assert!((1..=elapsed_ms / 25 + 2).contains(&polls), "{polls} polls in {elapsed_ms} ms");
    // A caller that waits is still served.
    store.with(|(model, _)| model.commit("main"));
    status.wait_for(&store.revision(), LONG).await.unwrap();
    stop.send_replace(true);
    task.await.unwrap();
}
