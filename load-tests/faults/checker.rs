//! The clients' side: asks every replica at a steady pace, remembers each answer, and judges all of them when it is over.
//!
//! Nothing here asks a replica or the store how it is: only what a gateway sees counts. Look next at [`Verdict`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use portcullis::api::r#gen as wire;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tonic::transport::{Channel, Endpoint};
use wire::decision_service_client::DecisionServiceClient;

/// Calls to one replica that wait for an answer; beyond that it is not asked.
const IN_FLIGHT_MAX: usize = 256;
/// A replica whose proof is younger calls itself fresh.
const FRESH: Duration = Duration::from_secs(1);
/// Denials that are no news: how often an alive session is denied for another reason is told all the same.
const REVOKED: &str = "REVOKED_SESSION";
const STALE: &str = "STALE";

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Usable for so long, from the moment of asking.
    Permit(Duration),
    Revoked,
    Stale,
    /// A denial for another reason.
    Other(String),
    /// No decision: the call failed.
    Failed,
}

/// One call.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) session: usize,
    pub(crate) asked: Instant,
    pub(crate) answered: Instant,
    pub(crate) answer: Answer,
}

/// A revocation that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kill {
    pub(crate) session: usize,
    pub(crate) acknowledged: Instant,
}

/// Clients of one replica; they stop when this is dropped.
pub(crate) struct Clients {
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Clients {
    /// Asks about each session in turn, one every so often, wherever the replica is by then.
    pub(crate) fn start(
        runtime: &Handle,
        address: watch::Receiver<Option<String>>,
        requests: Arc<Vec<wire::CheckRequest>>,
        every: Duration,
    ) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let task = runtime.spawn(ask(address, requests, every, seen.clone()));
        Self { seen, task }
    }

    /// What was seen so far, in the order of the answers.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// When the first answer came that was asked for after a moment and is a fresh permit.
    pub(crate) fn fresh_after(&self, moment: Instant, bound: Duration) -> Option<Instant> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let late = seen.iter().rev().take_while(|one| one.answered >= moment);
        late.filter(|one| one.asked >= moment && is_fresh(one, bound)).map(|one| one.answered).min()
    }

    /// Whether the newest answer about a session, asked for after a moment, is what it should be.
    pub(crate) fn says(&self, session: usize, moment: Instant, should: impl Fn(&Answer) -> bool) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().rev().find(|one| one.session == session && one.asked >= moment).is_some_and(|one| should(&one.answer))
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn is_fresh(seen: &Seen, bound: Duration) -> bool {
    matches!(seen.answer, Answer::Permit(valid) if valid > bound.saturating_sub(FRESH))
}

async fn ask(
    mut address: watch::Receiver<Option<String>>,
    requests: Arc<Vec<wire::CheckRequest>>,
    every: Duration,
    seen: Arc<Mutex<Vec<Seen>>>,
) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let room = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut client = None;
    address.mark_changed();
    for session in (0..requests.len()).cycle() {
        ticks.tick().await;
        if address.has_changed().unwrap_or(false) {
            client = address.borrow_and_update().clone().and_then(|address| connect(&address));
        }
        let (Some(client), Some(request)) = (&client, requests.get(session)) else { continue };
        let (mut client, request): (DecisionServiceClient<Channel>, _) = (client.clone(), request.clone());
        // Enough wait already.
        let Ok(room) = room.clone().try_acquire_owned() else { continue };
        let seen = seen.clone();
        tokio::spawn(async move {
            let asked = Instant::now();
            let answer = client.check(request).await.map(|answer| read(&answer.into_inner())).unwrap_or(Answer::Failed);
            drop(room);
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(Seen { session, asked, answered: Instant::now(), answer });
        });
    }
}

fn connect(address: &str) -> Option<DecisionServiceClient<Channel>> {
    Endpoint::from_shared(address.to_owned()).ok().map(|endpoint| DecisionServiceClient::new(endpoint.connect_lazy()))
}

fn read(answer: &wire::CheckResponse) -> Answer {
    match (answer.effect(), answer.reason.as_str()) {
        (wire::Effect::Permit, _) => Answer::Permit(Duration::from_millis(answer.valid_for_ms)),
        (_, REVOKED) => Answer::Revoked,
        (_, STALE) => Answer::Stale,
        (_, reason) => Answer::Other(reason.to_owned()),
    }
}

/// What all answers of all replicas come to. Only [`Verdict::is_kept`] is a promise without a figure.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) kills: usize,
    pub(crate) checks: u64,
    pub(crate) permits: u64,
    pub(crate) stale: u64,
    /// Calls without a decision, of replicas that were killed.
    pub(crate) failed: u64,
    /// Permits whose call began after the acknowledgement and the bound.
    pub(crate) late: u64,
    /// Permits that could be used beyond acknowledgement and bound, whenever they were asked for.
    pub(crate) usable: u64,
    /// How far the furthest of those reached beyond.
    pub(crate) beyond: Duration,
    /// Permits of a replica that had denied the session as revoked before they were asked for.
    pub(crate) back: u64,
    /// From the acknowledgement of a kill to the last call that was still permitted began, over all kills and replicas.
    pub(crate) latest_permit: Duration,
    /// The longest that a replica gave no fresh permit.
    pub(crate) longest_stale: Duration,
    /// From the end of the fault to a fresh permit of the last replica.
    pub(crate) fresh_again: Duration,
    /// Reasons of denials that have no place here.
    pub(crate) others: Vec<String>,
}

impl Verdict {
    /// Whether nothing was permitted that must not be.
    pub(crate) fn is_kept(&self) -> bool {
        self.late == 0 && self.usable == 0 && self.back == 0 && self.others.is_empty()
    }

    /// Adds what one replica's clients saw.
    pub(crate) fn add(&mut self, seen: &[Seen], kills: &[Kill], bound: Duration) {
        self.checks += seen.len() as u64;
        for one in seen {
            match &one.answer {
                Answer::Permit(_) => self.permits += 1,
                Answer::Stale => self.stale += 1,
                Answer::Failed => self.failed += 1,
                Answer::Other(reason) if !self.others.contains(reason) => self.others.push(reason.clone()),
                Answer::Revoked | Answer::Other(_) => {}
            }
            // A session that nobody killed.
            if one.answer == Answer::Revoked && !kills.iter().any(|kill| kill.session == one.session) {
                self.others.push(format!("session {} is revoked and was not killed", one.session));
            }
        }
        for kill in kills {
            self.judge(seen, *kill, bound);
        }
        self.longest_stale = self.longest_stale.max(longest_stale(seen, bound));
    }

    fn judge(&mut self, seen: &[Seen], kill: Kill, bound: Duration) {
        let of = || seen.iter().filter(|one| one.session == kill.session);
        let until = kill.acknowledged + bound;
        let denied = of().filter(|one| one.answer == Answer::Revoked).map(|one| one.answered).min();
        for one in of() {
            let Answer::Permit(valid) = one.answer else { continue };
            self.late += u64::from(one.asked > until);
            let beyond = (one.asked + valid).saturating_duration_since(until);
            self.usable += u64::from(!beyond.is_zero());
            self.beyond = self.beyond.max(beyond);
            self.back += u64::from(denied.is_some_and(|denied| one.asked > denied));
            self.latest_permit = self.latest_permit.max(one.asked.saturating_duration_since(kill.acknowledged));
        }
    }
}

/// The longest time between two fresh permits in a row.
fn longest_stale(seen: &[Seen], bound: Duration) -> Duration {
    let mut fresh: Vec<Instant> = seen.iter().filter(|one| is_fresh(one, bound)).map(|one| one.answered).collect();
    fresh.sort_unstable();
    let pairs = fresh.iter().zip(fresh.iter().skip(1));
    pairs.map(|(earlier, later)| later.saturating_duration_since(*earlier)).max().unwrap_or_default()
}
