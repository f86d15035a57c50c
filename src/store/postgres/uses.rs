//! The ledger of proofs and approvals: requests to use them, and to ask for approvals. Requests that wait together share a
//! transaction, and each gets its own answer.
//!
//! The ledger has a connection of its own, so that no revocation waits behind it. Its queue holds a bounded number of requests,
//! each for a bounded time. A request that finds no room, or waits too long, is refused and was not executed. Uses and requests
//! for approvals are separate transactions, because requests for approvals take turns across the fleet and uses do not.
//!
//! All code takes locks in the same order, which excludes deadlocks: the lock of approval requests, approvals by digest, proof
//! keys by their bytes. Look next at `super::approvals` and at [`crate::store::approvals`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_postgres::types::Type;

use super::approvals;
use super::lane::{Lane, Limits};
use super::link::{Fault, Link};
use super::read::{self, Expected};
use super::write::oldest_expired;
use crate::model::approval::{ApprovalRow, AskApproval, AskOutcome, ProofUse, UseApprovals, UseOutcome};
use crate::model::limits::{LEDGER_QUEUE_MAX, LEDGER_WAIT_MS};
use crate::store::Error;
use crate::store::approvals::{self as steps, Moment};

/// Requests that share a transaction.
const GROUP_MAX: usize = 128;

/// A request to the ledger.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Spend(ProofUse),
    Use(UseApprovals),
    GiveBack(UseApprovals),
    Ask(AskApproval),
}

/// The answer to the [`Request`] of the same name.
#[derive(Debug)]
pub(super) enum Answer {
    Spend(bool),
    Use(UseOutcome),
    GiveBack(bool),
    Ask(AskOutcome),
}

/// A request in the queue.
struct Waiting {
    request: Request,
    until: Instant,
    reply: oneshot::Sender<Result<Answer, Error>>,
    /// Makes the store finish this request before it is dropped.
    _alive: Option<mpsc::Sender<()>>,
}

/// The sending end of the queue.
pub(super) struct Queue {
    sender: mpsc::Sender<Waiting>,
    shown: String,
}

/// Executes groups of requests.
pub(super) struct Worker {
    pub(super) lane: Arc<Lane>,
    pub(super) limits: Limits,
    /// The values against which answers are checked at present.
    pub(super) expected: Arc<dyn Fn() -> Arc<Expected> + Send + Sync>,
    /// The time that a test sets.
    pub(super) unix_ms: Arc<dyn Fn() -> Option<i64> + Send + Sync>,
}

impl Queue {
    /// Creates a queue, and the future that serves it until the queue is dropped.
    pub(super) fn new(worker: Worker, shown: &str) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, waiting) = mpsc::channel(LEDGER_QUEUE_MAX);
        (Self { sender, shown: shown.to_owned() }, serve(worker, waiting))
    }

    /// Submits a request and waits for its answer. `alive` keeps the store from ending before that.
    ///
    /// # Errors
    /// [`Error::Unknown`] if it is unknown whether the request was executed; any other error if it was not.
    pub(super) async fn ask(&self, request: Request, alive: Option<mpsc::Sender<()>>) -> Result<Answer, Error> {
        let (reply, answer) = oneshot::channel();
        let until = Instant::now() + Duration::from_millis(LEDGER_WAIT_MS);
        let waiting = Waiting { request, until, reply, _alive: alive };
        self.sender.try_send(waiting).map_err(|_| {
            Error::Unavailable(format!(
                "{LEDGER_QUEUE_MAX} uses wait for the store `{}`, and that is the limit: try again",
                self.shown
            ))
        })?;
        answer
            .await
            .map_err(|_| Error::Unknown(format!("the store `{}` stopped: it may or may not have been written", self.shown)))?
    }
}

/// Takes groups of requests from the queue and executes them.
async fn serve(worker: Worker, mut queue: mpsc::Receiver<Waiting>) {
    let mut group = Vec::with_capacity(GROUP_MAX);
    while queue.recv_many(&mut group, GROUP_MAX).await > 0 {
        let now = Instant::now();
        let (asks, uses): (Vec<_>, Vec<_>) = std::mem::take(&mut group)
            .into_iter()
            .filter_map(|waiting| waiting.in_time(now))
            .partition(|waiting| matches!(waiting.request, Request::Ask(_)));
        worker.run(uses).await;
        worker.run(asks).await;
    }
}

impl Waiting {
    /// Returns the request, or refuses it if it has waited too long.
    fn in_time(self, now: Instant) -> Option<Self> {
        if now < self.until {
            return Some(self);
        }
        self.answer(Err(Error::Unavailable(format!("the store did not take a use within {LEDGER_WAIT_MS} ms: try again"))));
        None
    }

    fn answer(self, answer: Result<Answer, Error>) {
        // The receiver may have stopped waiting.
        let _ = self.reply.send(answer);
    }
}

impl Worker {
    /// Executes a group in one transaction. If that fails with a known outcome, each request is executed by itself, so that one
    /// request does not fail the others.
    async fn run(&self, group: Vec<Waiting>) {
        let requests: Vec<Request> = group.iter().map(|waiting| waiting.request.clone()).collect();
        let outcome = match requests.len() {
            0 => return,
            _ => self.transact(requests).await,
        };
        match outcome {
            Ok(answers) => group.into_iter().zip(answers).for_each(|(waiting, answer)| waiting.answer(Ok(answer))),
            Err(error) if group.len() == 1 || matches!(error, Error::Unknown(_)) => {
                group.into_iter().for_each(|waiting| waiting.answer(Err(error.clone())));
            }
            Err(_) => {
                for waiting in group {
                    let Some(waiting) = waiting.in_time(Instant::now()) else { continue };
                    let alone = self.transact(vec![waiting.request.clone()]).await;
                    waiting.answer(alone.and_then(|mut answers| answers.pop().ok_or_else(unanswered)));
                }
            }
        }
    }

    async fn transact(&self, requests: Vec<Request>) -> Result<Vec<Answer>, Error> {
        let (expected, unix_ms) = ((self.expected)(), (self.unix_ms)());
        let work = |link: Arc<Link>| async move { done(&link, &expected, &requests, unix_ms).await };
        self.lane.clone().transact(self.limits, work).await
    }
}

/// Executes a group and returns the answers in its order. Either all of its requests ask for approvals, or none does.
async fn done(link: &Link, expected: &Expected, requests: &[Request], unix_ms: Option<i64>) -> Result<Vec<Answer>, Fault> {
    let head = read::head(link, expected, false).await?;
    let unix_ms = unix_ms.unwrap_or(head.unix_ms);
    let asks = requests.iter().filter(|request| matches!(request, Request::Ask(_))).count();
    if asks > 0 {
        approvals::take_turn(link, asks, unix_ms).await?;
    }
    let digests: BTreeSet<&str> = requests.iter().flat_map(Request::digests).collect();
    let mut rows = approvals::locked(link, &digests.into_iter().collect::<Vec<_>>()).await?;
    let mut keys = Keys::add(link, requests.iter().filter_map(Request::proof)).await?;
    let mut changed = BTreeSet::new();
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        let is_new = |proof: &Option<ProofUse>| proof.as_ref().is_none_or(|proof| keys.is_new(proof));
        answers.push(match request {
            Request::Spend(proof) => Answer::Spend(keys.spend(proof)),
            Request::Use(uses) => {
                let moment = Moment { head: &head.revision, proof_is_new: is_new(&uses.proof), unix_ms };
                let outcome = steps::use_once(&mut rows, uses, moment);
                if steps::changes_rows(&outcome) {
                    changed.extend(uses.digests());
                }
                if outcome == UseOutcome::Used {
                    keys.spend_all(&uses.proof);
                }
                Answer::Use(outcome)
            }
            Request::GiveBack(uses) => {
                let given = steps::give_back(&mut rows, uses);
                if given {
                    changed.extend(uses.digests());
                }
                Answer::GiveBack(given)
            }
            Request::Ask(ask) if !is_new(&ask.proof) => Answer::Ask(AskOutcome::Replayed),
            Request::Ask(ask) => {
                let outcome = approvals::ask(link, &mut rows, ask, unix_ms).await?;
                if matches!(outcome, AskOutcome::Stands(_)) {
                    keys.spend_all(&ask.proof);
                }
                Answer::Ask(outcome)
            }
        });
    }
    let changed: Vec<&ApprovalRow> = changed.into_iter().filter_map(|digest| rows.get(digest)).collect();
    approvals::put(link, &changed).await?;
    keys.settle(link, unix_ms.div_euclid(1_000)).await?;
    Ok(answers)
}

impl Request {
    fn digests(&self) -> BTreeSet<&str> {
        match self {
            Request::Spend(_) => BTreeSet::new(),
            Request::Use(uses) | Request::GiveBack(uses) => uses.digests(),
            Request::Ask(ask) => BTreeSet::from([ask.call.digest.as_str()]),
        }
    }

    /// The proof that the request may spend.
    fn proof(&self) -> Option<&ProofUse> {
        match self {
            Request::Spend(proof) => Some(proof),
            Request::Use(uses) => uses.proof.as_ref().filter(|_| !uses.only_again),
            Request::GiveBack(_) => None,
            Request::Ask(ask) => ask.proof.as_ref(),
        }
    }
}

/// The proof keys that a group may spend. All of them are inserted first, because the insertion shows which are new; those that
/// nobody spends are deleted again.
struct Keys {
    /// The new keys, and whether a request of the group has spent them.
    added: HashMap<[u8; 32], bool>,
    /// Keys that expire no later than this may be among those that were forgotten.
    forgotten_unix_s: Option<i64>,
}

impl Keys {
    /// Inserts the keys of all proofs, and reads the cutoff of forgotten keys.
    async fn add(link: &Link, proofs: impl Iterator<Item = &ProofUse>) -> Result<Self, Fault> {
        let proofs: BTreeMap<&[u8], i64> = proofs.map(|proof| (proof.key.as_slice(), proof.expires_at_unix_s)).collect();
        if proofs.is_empty() {
            return Ok(Self { added: HashMap::new(), forgotten_unix_s: None });
        }
        let (keys, expiries): (Vec<&[u8]>, Vec<i64>) = proofs.into_iter().unzip();
        let added = link
            .rows(
                "INSERT INTO portcullis.spent (key, expires_at_unix_s)
                 SELECT * FROM unnest($1, $2) AS wanted (key, expires_at_unix_s) ORDER BY key ON CONFLICT DO NOTHING RETURNING key",
                &[(&keys, Type::BYTEA_ARRAY), (&expiries, Type::INT8_ARRAY)],
            )
            .await?;
        // INVARIANT: read after the keys were inserted. A transaction that forgot one of these keys has committed before the key
        // could be inserted, so its cutoff is visible here.
        let row = link.row("SELECT unix_s FROM portcullis.spent_forgotten", &[]).await?;
        let row = row.ok_or_else(|| read::corrupt("the row of forgotten keys is missing".to_owned()))?;
        let added = added.iter().map(|row| Ok((read::hash(row, 0)?, false))).collect::<Result<_, Fault>>()?;
        Ok(Self { added, forgotten_unix_s: row.try_get(0)? })
    }

    fn is_new(&self, proof: &ProofUse) -> bool {
        let forgotten = self.forgotten_unix_s.is_some_and(|forgotten| proof.expires_at_unix_s <= forgotten);
        !forgotten && self.added.get(&proof.key) == Some(&false)
    }

    /// Spends a key. Returns `true` for the first request that does.
    fn spend(&mut self, proof: &ProofUse) -> bool {
        let is_new = self.is_new(proof);
        if is_new {
            self.added.insert(proof.key, true);
        }
        is_new
    }

    /// Spends the key of a proof, if there is one.
    fn spend_all(&mut self, proof: &Option<ProofUse>) {
        if let Some(proof) = proof {
            self.spend(proof);
        }
    }

    /// Deletes the keys that nobody spent, and a bounded number of expired keys; see `super::write` for the cutoff.
    async fn settle(self, link: &Link, unix_s: i64) -> Result<(), Fault> {
        let unspent: Vec<&[u8]> = self.added.iter().filter(|(_, spent)| !**spent).map(|(key, _)| key.as_slice()).collect();
        if !unspent.is_empty() {
            link.execute("DELETE FROM portcullis.spent WHERE key = ANY ($1)", &[(&unspent, Type::BYTEA_ARRAY)]).await?;
        }
        if self.added.is_empty() {
            return Ok(());
        }
        let Some(newest) = oldest_expired(link, "spent", unix_s, self.added.len()).await? else { return Ok(()) };
        // One transaction forgets keys at a time. The others go on, because a later one will forget them.
        if link.row("SELECT 1 FROM portcullis.spent_forgotten FOR UPDATE SKIP LOCKED", &[]).await?.is_some() {
            link.execute("DELETE FROM portcullis.spent WHERE expires_at_unix_s <= $1", &[(&newest, Type::INT8)]).await?;
            link.execute("UPDATE portcullis.spent_forgotten SET unix_s = greatest(unix_s, $1)", &[(&newest, Type::INT8)]).await?;
        }
        Ok(())
    }
}

/// The error for an answer of another kind than the request, which cannot happen.
pub(super) fn unanswered() -> Error {
    Error::Corrupt("a use has no answer".to_owned())
}
