//! The ledger of proofs and approvals: requests to use them, and to ask for approvals. Requests that wait together share a
//! transaction, and each gets its own answer.
//!
//! The ledger has a connection of its own, so that no revocation waits behind it. Its queue holds a bounded number of requests,
//! each for a bounded time. A request that finds no room, or waits too long, is refused and was not executed. Uses and requests
//! for approvals are separate transactions, because requests for approvals take turns across the fleet and uses do not.
//!
//! All code takes locks in the same order, which excludes deadlocks: the lock of approval requests, approvals by digest, proof
//! keys by their bytes. Look next at `super::approvals` and at [`crate::store::approval_rules`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_postgres::types::Type;

use super::approvals;
use super::connection::{PostgresConnection, QueryError};
use super::dedicated_connection::{DedicatedConnection, TransactionLimits};
use super::read::{self, ExpectedStore};
use super::write::expiry_cutoff;
use crate::model::approval::{
    ApprovalRow, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest, ProofUse,
};
use crate::model::limits::{LEDGER_QUEUE_MAX, LEDGER_TIMEOUT_MS};
use crate::store::Error;
use crate::store::approval_rules::{self, UseContext};

/// Requests that share a transaction.
const GROUP_REQUESTS_MAX: usize = 128;

/// A request to the ledger.
#[derive(Clone, Debug)]
pub(super) enum LedgerRequest {
    Spend(ProofUse),
    Use(ApprovalUseRequest),
    GiveBack(ApprovalUseRequest),
    Ask(ApprovalSubmission),
}

/// The answer to the [`LedgerRequest`] of the same name.
#[derive(Debug)]
pub(super) enum LedgerAnswer {
    Spend(bool),
    Use(ApprovalUseOutcome),
    GiveBack(bool),
    Ask(ApprovalSubmissionOutcome),
}

/// A request in the queue.
struct QueuedRequest {
    request: LedgerRequest,
    until: Instant,
    reply: oneshot::Sender<Result<LedgerAnswer, Error>>,
    /// Makes the store finish this request before it is dropped.
    _alive: Option<mpsc::Sender<()>>,
}

/// The sending end of the queue.
pub(super) struct LedgerQueue {
    sender: mpsc::Sender<QueuedRequest>,
    store_url: String,
}

/// Executes groups of requests.
pub(super) struct LedgerWorker {
    pub(super) connection: Arc<DedicatedConnection>,
    pub(super) limits: TransactionLimits,
    /// The values against which answers are checked at present.
    pub(super) expected: Arc<dyn Fn() -> Arc<ExpectedStore> + Send + Sync>,
    /// The time that a test sets.
    pub(super) unix_ms: Arc<dyn Fn() -> Option<i64> + Send + Sync>,
}

impl LedgerQueue {
    /// Creates a queue, and the future that serves it until the queue is dropped.
    pub(super) fn new(worker: LedgerWorker, store_url: &str) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, waiting) = mpsc::channel(LEDGER_QUEUE_MAX);
        (Self { sender, store_url: store_url.to_owned() }, run_queue(worker, waiting))
    }

    /// Submits a request and waits for its answer. `alive` keeps the store from ending before that.
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`] if it is unknown whether the request was executed; any other error if it was not.
    pub(super) async fn submit(&self, request: LedgerRequest, alive: Option<mpsc::Sender<()>>) -> Result<LedgerAnswer, Error> {
        let (reply, answer) = oneshot::channel();
        let until = Instant::now() + Duration::from_millis(LEDGER_TIMEOUT_MS);
        let waiting = QueuedRequest { request, until, reply, _alive: alive };
        self.sender.try_send(waiting).map_err(|_| {
            Error::Unavailable(format!(
                "{LEDGER_QUEUE_MAX} uses wait for the store `{}`, and that is the limit: try again",
                self.store_url
            ))
        })?;
        answer.await.map_err(|_| {
            Error::OutcomeUnknown(format!("the store `{}` stopped: it may or may not have been written", self.store_url))
        })?
    }
}

/// Takes groups of requests from the queue and executes them.
async fn run_queue(worker: LedgerWorker, mut queue: mpsc::Receiver<QueuedRequest>) {
    let mut group = Vec::with_capacity(GROUP_REQUESTS_MAX);
    while queue.recv_many(&mut group, GROUP_REQUESTS_MAX).await > 0 {
        let now = Instant::now();
        let (asks, uses): (Vec<_>, Vec<_>) = std::mem::take(&mut group)
            .into_iter()
            .filter_map(|waiting| waiting.refuse_if_late(now))
            .partition(|waiting| matches!(waiting.request, LedgerRequest::Ask(_)));
        worker.run_group(uses).await;
        worker.run_group(asks).await;
    }
}

impl QueuedRequest {
    /// Returns the request, or refuses it if it has waited too long.
    fn refuse_if_late(self, now: Instant) -> Option<Self> {
        if now < self.until {
            return Some(self);
        }
        self.send_answer(Err(Error::Unavailable(format!(
            "the store did not take a use within {LEDGER_TIMEOUT_MS} ms: try again"
        ))));
        None
    }

    fn send_answer(self, answer: Result<LedgerAnswer, Error>) {
        // The receiver may have stopped waiting.
        let _ = self.reply.send(answer);
    }
}

impl LedgerWorker {
    /// Executes a group in one transaction. If that fails with a known outcome, each request is executed by itself, so that one
    /// request does not fail the others.
    async fn run_group(&self, group: Vec<QueuedRequest>) {
        let requests: Vec<LedgerRequest> = group.iter().map(|waiting| waiting.request.clone()).collect();
        let outcome = match requests.len() {
            0 => return,
            _ => self.run_transaction(requests).await,
        };
        match outcome {
            Ok(answers) => group.into_iter().zip(answers).for_each(|(waiting, answer)| waiting.send_answer(Ok(answer))),
            Err(error) if group.len() == 1 || matches!(error, Error::OutcomeUnknown(_)) => {
                group.into_iter().for_each(|waiting| waiting.send_answer(Err(error.clone())));
            }
            Err(_) => {
                for waiting in group {
                    let Some(waiting) = waiting.refuse_if_late(Instant::now()) else { continue };
                    let alone = self.run_transaction(vec![waiting.request.clone()]).await;
                    waiting.send_answer(alone.and_then(|mut answers| answers.pop().ok_or_else(unanswered_error)));
                }
            }
        }
    }

    async fn run_transaction(&self, requests: Vec<LedgerRequest>) -> Result<Vec<LedgerAnswer>, Error> {
        let (expected, unix_ms) = ((self.expected)(), (self.unix_ms)());
        let work =
            |connection: Arc<PostgresConnection>| async move { execute_group(&connection, &expected, &requests, unix_ms).await };
        self.connection.clone().transact(self.limits, work).await
    }
}

/// Executes a group and returns the answers in its order. Either all of its requests ask for approvals, or none does.
async fn execute_group(
    connection: &PostgresConnection,
    expected: &ExpectedStore,
    requests: &[LedgerRequest],
    unix_ms: Option<i64>,
) -> Result<Vec<LedgerAnswer>, QueryError> {
    let head = read::read_head(connection, expected, false).await?;
    let unix_ms = unix_ms.unwrap_or(head.unix_ms);
    let asks = requests.iter().filter(|request| matches!(request, LedgerRequest::Ask(_))).count();
    if asks > 0 {
        approvals::lock_requests(connection, asks, unix_ms).await?;
    }
    let digests: BTreeSet<&str> = requests.iter().flat_map(LedgerRequest::digests).collect();
    let mut rows = approvals::lock_approvals(connection, &digests.into_iter().collect::<Vec<_>>()).await?;
    let mut keys = ProofKeys::insert_keys(connection, requests.iter().filter_map(LedgerRequest::proof)).await?;
    let mut changed = BTreeSet::new();
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        let is_new = |proof: &Option<ProofUse>| proof.as_ref().is_none_or(|proof| keys.is_new(proof));
        answers.push(match request {
            LedgerRequest::Spend(proof) => LedgerAnswer::Spend(keys.spend_proof(proof)),
            LedgerRequest::Use(uses) => {
                let moment = UseContext { head: &head.revision, proof_is_new: is_new(&uses.proof), unix_ms };
                let outcome = approval_rules::use_approvals(&mut rows, uses, moment);
                if approval_rules::outcome_changes_rows(&outcome) {
                    changed.extend(uses.digests());
                }
                if outcome == ApprovalUseOutcome::Used {
                    keys.spend_optional(&uses.proof);
                }
                LedgerAnswer::Use(outcome)
            }
            LedgerRequest::GiveBack(uses) => {
                let given = approval_rules::give_back_approvals(&mut rows, uses);
                if given {
                    changed.extend(uses.digests());
                }
                LedgerAnswer::GiveBack(given)
            }
            LedgerRequest::Ask(ask) if !is_new(&ask.proof) => LedgerAnswer::Ask(ApprovalSubmissionOutcome::Replayed),
            LedgerRequest::Ask(ask) => {
                let outcome = approvals::ask_approval(connection, &mut rows, ask, unix_ms).await?;
                if matches!(outcome, ApprovalSubmissionOutcome::Stored(_)) {
                    keys.spend_optional(&ask.proof);
                }
                LedgerAnswer::Ask(outcome)
            }
        });
    }
    let changed: Vec<&ApprovalRow> = changed.into_iter().filter_map(|digest| rows.get(digest)).collect();
    approvals::put_approvals(connection, &changed).await?;
    keys.remove_unspent(connection, unix_ms.div_euclid(1_000)).await?;
    Ok(answers)
}

impl LedgerRequest {
    fn digests(&self) -> BTreeSet<&str> {
        match self {
            LedgerRequest::Spend(_) => BTreeSet::new(),
            LedgerRequest::Use(uses) | LedgerRequest::GiveBack(uses) => uses.digests(),
            LedgerRequest::Ask(ask) => BTreeSet::from([ask.call.digest.as_str()]),
        }
    }

    /// The proof that the request may spend.
    fn proof(&self) -> Option<&ProofUse> {
        match self {
            LedgerRequest::Spend(proof) => Some(proof),
            LedgerRequest::Use(uses) => uses.proof.as_ref().filter(|_| !uses.lookup_only),
            LedgerRequest::GiveBack(_) => None,
            LedgerRequest::Ask(ask) => ask.proof.as_ref(),
        }
    }
}

/// The proof keys that a group may spend. All of them are inserted first, because the insertion shows which are new; those that
/// nobody spends are deleted again.
struct ProofKeys {
    /// The new keys, and whether a request of the group has spent them.
    added: HashMap<[u8; 32], bool>,
    /// Keys that expire no later than this may be among those that were forgotten.
    forgotten_unix_s: Option<i64>,
}

impl ProofKeys {
    /// Inserts the keys of all proofs, and reads the cutoff of forgotten keys.
    async fn insert_keys(connection: &PostgresConnection, proofs: impl Iterator<Item = &ProofUse>) -> Result<Self, QueryError> {
        let proofs: BTreeMap<&[u8], i64> = proofs.map(|proof| (proof.key.as_slice(), proof.expires_at_unix_s)).collect();
        if proofs.is_empty() {
            return Ok(Self { added: HashMap::new(), forgotten_unix_s: None });
        }
        let (keys, expiries): (Vec<&[u8]>, Vec<i64>) = proofs.into_iter().unzip();
        let added = connection
            .query_rows(
                "INSERT INTO portcullis.spent (key, expires_at_unix_s)
                 SELECT * FROM unnest($1, $2) AS wanted (key, expires_at_unix_s) ORDER BY key ON CONFLICT DO NOTHING RETURNING key",
                &[(&keys, Type::BYTEA_ARRAY), (&expiries, Type::INT8_ARRAY)],
            )
            .await?;
        // INVARIANT: read after the keys were inserted. A transaction that forgot one of these keys has committed before the key
        // could be inserted, so its cutoff is visible here.
        let row = connection.query_row("SELECT unix_s FROM portcullis.spent_forgotten", &[]).await?;
        let row = row.ok_or_else(|| read::corrupt_error("the row of forgotten keys is missing".to_owned()))?;
        let added = added.iter().map(|row| Ok((read::read_hash(row, 0)?, false))).collect::<Result<_, QueryError>>()?;
        Ok(Self { added, forgotten_unix_s: row.try_get(0)? })
    }

    fn is_new(&self, proof: &ProofUse) -> bool {
        let forgotten = self.forgotten_unix_s.is_some_and(|forgotten| proof.expires_at_unix_s <= forgotten);
        !forgotten && self.added.get(&proof.key) == Some(&false)
    }

    /// Spends a key. Returns `true` for the first request that does.
    fn spend_proof(&mut self, proof: &ProofUse) -> bool {
        let is_new = self.is_new(proof);
        if is_new {
            self.added.insert(proof.key, true);
        }
        is_new
    }

    /// Spends the key of a proof, if there is one.
    fn spend_optional(&mut self, proof: &Option<ProofUse>) {
        if let Some(proof) = proof {
            self.spend_proof(proof);
        }
    }

    /// Deletes the keys that nobody spent, and a bounded number of expired keys; see `super::write` for the cutoff.
    async fn remove_unspent(self, connection: &PostgresConnection, unix_s: i64) -> Result<(), QueryError> {
        let unspent: Vec<&[u8]> = self.added.iter().filter(|(_, spent)| !**spent).map(|(key, _)| key.as_slice()).collect();
        if !unspent.is_empty() {
            connection.execute("DELETE FROM portcullis.spent WHERE key = ANY ($1)", &[(&unspent, Type::BYTEA_ARRAY)]).await?;
        }
        if self.added.is_empty() {
            return Ok(());
        }
        let Some(newest) = expiry_cutoff(connection, "spent", unix_s, self.added.len()).await? else { return Ok(()) };
        // One transaction forgets keys at a time. The others go on, because a later one will forget them.
        if connection.query_row("SELECT 1 FROM portcullis.spent_forgotten FOR UPDATE SKIP LOCKED", &[]).await?.is_some() {
            connection.execute("DELETE FROM portcullis.spent WHERE expires_at_unix_s <= $1", &[(&newest, Type::INT8)]).await?;
            connection
                .execute("UPDATE portcullis.spent_forgotten SET unix_s = greatest(unix_s, $1)", &[(&newest, Type::INT8)])
                .await?;
        }
        Ok(())
    }
}

/// The error for an answer of another kind than the request, which cannot happen.
pub(super) fn unanswered_error() -> Error {
    Error::Corrupt("a use has no answer".to_owned())
}
