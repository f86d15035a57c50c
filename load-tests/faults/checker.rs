//! The clients of the fault tests: they check every replica at a steady rate, remember each answer, and judge all answers at the
//! end.
//!
//! Nothing here asks a replica or the store for its state, because only a gateway's view counts. Look next at [`FaultVerdict`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use portcullis::api::r#gen as wire;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tonic::transport::{Channel, Endpoint};
use wire::decision_service_client::DecisionServiceClient;

/// Most calls to one replica that wait for an answer. Beyond that no call is sent.
const IN_FLIGHT_MAX: usize = 256;
/// A replica with a younger proof calls itself fresh.
const FRESH: Duration = Duration::from_secs(1);
/// Expected reasons of denials. Other reasons for an alive session are counted too.
const REVOKED: &str = "REVOKED_SESSION";
const STALE: &str = "STALE";

/// The answer to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClientAnswer {
    /// A permit; usable for this long from the moment of asking.
    Permit(Duration),
    Revoked,
    Stale,
    /// A denial for another reason.
    Other(String),
    /// No decision, because the call failed.
    Failed,
}

/// One call, with its answer.
#[derive(Clone, Debug)]
pub(crate) struct ObservedCall {
    pub(crate) session: usize,
    pub(crate) asked: Instant,
    pub(crate) answered: Instant,
    pub(crate) answer: ClientAnswer,
}

/// An acknowledged revocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AcknowledgedKill {
    pub(crate) session: usize,
    pub(crate) acknowledged: Instant,
}

/// The clients of one replica. They stop on drop.
pub(crate) struct ReplicaClients {
    seen: Arc<Mutex<Vec<ObservedCall>>>,
    task: JoinHandle<()>,
}

impl ReplicaClients {
    /// Checks each session in turn at a fixed interval, at the replica's current address.
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

    /// The calls so far, in the order of their answers.
    pub(crate) fn seen(&self) -> Vec<ObservedCall> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first answer that was requested after a moment and is a fresh permit.
    pub(crate) fn fresh_after(&self, moment: Instant, bound: Duration) -> Option<Instant> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let late = seen.iter().rev().take_while(|one| one.answered >= moment);
        late.filter(|one| one.asked >= moment && is_fresh(one, bound)).map(|one| one.answered).min()
    }

    /// Whether the newest answer about a session that was requested after a moment is as expected.
    pub(crate) fn says(&self, session: usize, moment: Instant, should: impl Fn(&ClientAnswer) -> bool) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().rev().find(|one| one.session == session && one.asked >= moment).is_some_and(|one| should(&one.answer))
    }
}

impl Drop for ReplicaClients {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn is_fresh(seen: &ObservedCall, bound: Duration) -> bool {
    matches!(seen.answer, ClientAnswer::Permit(valid) if valid > bound.saturating_sub(FRESH))
}

async fn ask(
    mut address: watch::Receiver<Option<String>>,
    requests: Arc<Vec<wire::CheckRequest>>,
    every: Duration,
    seen: Arc<Mutex<Vec<ObservedCall>>>,
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
        // Enough calls wait already.
        let Ok(room) = room.clone().try_acquire_owned() else { continue };
        let seen = seen.clone();
        tokio::spawn(async move {
            let asked = Instant::now();
            let answer = client.check(request).await.map(|answer| read(&answer.into_inner())).unwrap_or(ClientAnswer::Failed);
            drop(room);
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(ObservedCall {
                session,
                asked,
                answered: Instant::now(),
                answer,
            });
        });
    }
}

fn connect(address: &str) -> Option<DecisionServiceClient<Channel>> {
    Endpoint::from_shared(address.to_owned()).ok().map(|endpoint| DecisionServiceClient::new(endpoint.connect_lazy()))
}

fn read(answer: &wire::CheckResponse) -> ClientAnswer {
    match (answer.effect(), answer.reason.as_str()) {
        (wire::Effect::Permit, _) => ClientAnswer::Permit(Duration::from_millis(answer.valid_for_ms)),
        (_, REVOKED) => ClientAnswer::Revoked,
        (_, STALE) => ClientAnswer::Stale,
        (_, reason) => ClientAnswer::Other(reason.to_owned()),
    }
}

/// The judgement of all answers of all replicas. [`FaultVerdict::is_kept`] alone is a promise; all else are figures.
#[derive(Clone, Debug, Default)]
pub(crate) struct FaultVerdict {
    pub(crate) kills: usize,
    pub(crate) checks: u64,
    pub(crate) permits: u64,
    pub(crate) stale: u64,
    /// Calls without a decision, by replicas that were killed.
    pub(crate) failed: u64,
    /// Permits of calls that began after the acknowledgement and the bound.
    pub(crate) late: u64,
    /// Permits that could be used after the acknowledgement and the bound, whenever they were requested.
    pub(crate) usable: u64,
    /// The latest use of those permits, counted from the bound.
    pub(crate) beyond: Duration,
    /// Permits of calls to a replica that had already denied the session as revoked.
    pub(crate) back: u64,
    /// From the acknowledgement of a revocation to the start of the last call that was permitted, over all revocations and
    /// replicas.
    pub(crate) latest_permit: Duration,
    /// The longest time without a fresh permit of a replica.
    pub(crate) longest_stale: Duration,
    /// From the end of the fault to a fresh permit of the last replica.
    pub(crate) fresh_again: Duration,
    /// Reasons of denials that should not occur here.
    pub(crate) others: Vec<String>,
}

impl FaultVerdict {
    /// Whether no call was permitted that must be denied.
    pub(crate) fn is_kept(&self) -> bool {
        self.late == 0 && self.usable == 0 && self.back == 0 && self.others.is_empty()
    }

    /// Adds the calls of one replica's clients.
    pub(crate) fn add(&mut self, seen: &[ObservedCall], kills: &[AcknowledgedKill], bound: Duration) {
        self.checks += seen.len() as u64;
        for one in seen {
            match &one.answer {
                ClientAnswer::Permit(_) => self.permits += 1,
                ClientAnswer::Stale => self.stale += 1,
                ClientAnswer::Failed => self.failed += 1,
                ClientAnswer::Other(reason) if !self.others.contains(reason) => self.others.push(reason.clone()),
                ClientAnswer::Revoked | ClientAnswer::Other(_) => {}
            }
            // A session that was never revoked.
            if one.answer == ClientAnswer::Revoked && !kills.iter().any(|kill| kill.session == one.session) {
                self.others.push(format!("session {} is revoked and was not killed", one.session));
            }
        }
        for kill in kills {
            self.judge(seen, *kill, bound);
        }
        self.longest_stale = self.longest_stale.max(longest_stale(seen, bound));
    }

    fn judge(&mut self, seen: &[ObservedCall], kill: AcknowledgedKill, bound: Duration) {
        let of = || seen.iter().filter(|one| one.session == kill.session);
        let until = kill.acknowledged + bound;
        let denied = of().filter(|one| one.answer == ClientAnswer::Revoked).map(|one| one.answered).min();
        for one in of() {
            let ClientAnswer::Permit(valid) = one.answer else { continue };
            self.late += u64::from(one.asked > until);
            let beyond = (one.asked + valid).saturating_duration_since(until);
            self.usable += u64::from(!beyond.is_zero());
            self.beyond = self.beyond.max(beyond);
            self.back += u64::from(denied.is_some_and(|denied| one.asked > denied));
            self.latest_permit = self.latest_permit.max(one.asked.saturating_duration_since(kill.acknowledged));
        }
    }
}

/// The longest time between two consecutive fresh permits.
fn longest_stale(seen: &[ObservedCall], bound: Duration) -> Duration {
    let mut fresh: Vec<Instant> = seen.iter().filter(|one| is_fresh(one, bound)).map(|one| one.answered).collect();
    fresh.sort_unstable();
    let pairs = fresh.iter().zip(fresh.iter().skip(1));
    pairs.map(|(earlier, later)| later.saturating_duration_since(*earlier)).max().unwrap_or_default()
}
