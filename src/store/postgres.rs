//! The store of a fleet: one PostgreSQL database that replicas on many machines follow.
//!
//! Every commit locks the row of the head, so that revision numbers have no gap. A follower's poll writes a heartbeat, because a
//! server that was replaced by another can still be read, but cannot commit. Only `store` knows SQL.
//!
//! Each kind of work has a connection of its own, made when it is first needed: revocations, other commits, uses of proofs and
//! approvals, polls, lists, and full states. One more connection listens for notifications, on which nothing relies.
//!
//! Look next at `postgres/settings.rs` (durability), `postgres/connection.rs` (transactions), `postgres/read.rs` and
//! `postgres/write.rs`.

mod approvals;
mod commit_rows;
mod connection;
mod dedicated_connection;
mod fleet;
mod history;
mod ledger;
mod lineage;
mod lock_holder;
mod notifications;
mod pending_acts;
mod read;
mod row_keys;
mod schema;
mod server_checks;
mod settings;
mod staging;
mod tls;
mod write;

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Mutex, watch};

pub use self::settings::{Durability, Settings, TlsMode};

use self::connection::{HEAD_MOVED, PostgresConnection, QueryError, TransactionOptions, notify_if_newer};
use self::dedicated_connection::{DedicatedConnection, StoreRuntime, TransactionLimits};
use self::ledger::{LedgerAnswer, LedgerQueue, LedgerRequest};
use self::read::ExpectedStore;
use self::tls::PostgresTlsConnector;
use super::{
    ChangeLogPage, CommitOutcome, CommitRequest, DocumentList, Error, PolicyCommit, ReplicaHeartbeat, ReplicaList, ReplicaMerge,
    ReplicaRegistration, RevocationPage, Store, StoreLineage, StoreState, approval_rules, write_rules,
};
use crate::model::approval::{
    ApprovalFilter, ApprovalPage, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest, ProofUse,
};
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{DocumentKey, RevocationRow, RevocationTarget, StoreWrite};
use crate::model::time::Clock;

/// Creating the tables may wait for another replica that creates them.
const OPEN_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: false, writes: true, lock_timeout_ms: 10_000 }, 5_000, 2_000, 20_000);
/// A commit waits for other commits, and for a standby.
const COMMIT_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: false, writes: true, lock_timeout_ms: 5_000 }, 5_000, 2_000, 10_000);
/// A use that is late is a denial. Other uses hold a row or a key for some milliseconds only.
const USE_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: false, writes: true, lock_timeout_ms: 500 }, 1_000, 1_000, 2_000);
/// A poll that takes longer loses its connection.
const POLL_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: false, writes: true, lock_timeout_ms: 200 }, 300, 1_000, 300);
/// Reads the commits after a poll has found that there are any.
const LOG_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: false, writes: false, lock_timeout_ms: 200 }, 300, 1_000, 60_000);
/// Registers a replica.
const REGISTER_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: false, writes: true, lock_timeout_ms: 2_000 }, 5_000, 1_000, 3_000);
/// Loads a full state for a replica, with its heartbeat.
const LOAD_FOR_REPLICA_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: true, writes: true, lock_timeout_ms: 200 }, 5_000, 2_000, 60_000);
/// Loads a full state.
const LOAD_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: true, writes: false, lock_timeout_ms: 200 }, 30_000, 2_000, 60_000);
/// Reads a list.
const READ_LIMITS: TransactionLimits =
    transaction_limits(TransactionOptions { one_view: true, writes: false, lock_timeout_ms: 200 }, 5_000, 2_000, 30_000);

/// Attempts at a commit while other commits come first.
const COMMIT_ATTEMPTS_MAX: u32 = 8;
/// A commit that takes longer than this is probably blocked by another session.
const BLOCKED_AFTER: Duration = Duration::from_millis(1_000);

/// Builds limits from milliseconds: for waiting, for connecting to one host, and for the work.
const fn transaction_limits(begin: TransactionOptions, wait_ms: u64, connect_ms: u64, work_ms: u64) -> TransactionLimits {
    let (wait, connect, work) =
        (Duration::from_millis(wait_ms), Duration::from_millis(connect_ms), Duration::from_millis(work_ms));
    TransactionLimits { begin, wait, connect, work }
}

/// A store in one PostgreSQL database.
///
/// Any number of processes may open the database. [`Durability`] says what an acknowledged commit survives. The store can be used
/// from several runtimes at once. Dropping it finishes the pending writes.
pub struct PostgresStore {
    runtime: StoreRuntime,
    /// Opened at the start and reserved for revocations, so that no revocation waits behind other work of this process.
    revoker: Arc<DedicatedConnection>,
    writer: Arc<DedicatedConnection>,
    ledger: LedgerQueue,
    poller: Arc<DedicatedConnection>,
    reader: Arc<DedicatedConnection>,
    loader: Arc<DedicatedConnection>,
    expected: Arc<RwLock<Arc<ExpectedStore>>>,
    notify: bool,
    commit_watch: watch::Sender<u64>,
    /// Replaces the server's clock. Only tests set it.
    clock: Option<Arc<dyn Clock>>,
    /// Whether the server and its tables were checked.
    server_checked: Mutex<bool>,
}

fn warn_asynchronous_durability() {
    tracing::warn!("`store_durability: asynchronous`: a failover may lose acknowledged writes, revocations among them");
}

impl PostgresStore {
    /// Opens the store in a database. Creates its tables with the default settings if there are none.
    ///
    /// # Errors
    /// - [`Error::Misconfigured`] if the server does not provide the claimed [`Durability`];
    /// - [`Error::NotAStore`] if the schema `portcullis` belongs to another program;
    /// - [`Error::NewerVersion`] if a newer version created the store;
    /// - [`Error::Corrupt`] if the store is inconsistent;
    /// - [`Error::Unavailable`] if the server cannot be reached or used.
    pub async fn open(settings: Settings) -> Result<Self, Error> {
        Self::open_with(settings, super::Settings::default(), None).await
    }

    /// Opens as [`PostgresStore::open`]. A store that is created now gets `of_store`. `clock` replaces the server's clock in
    /// tests; all replicas must then use the same clock.
    ///
    /// # Errors
    /// As [`PostgresStore::open`], and [`Error::Rejected`] for settings out of range.
    pub async fn open_with(settings: Settings, of_store: super::Settings, clock: Option<Arc<dyn Clock>>) -> Result<Self, Error> {
        write_rules::check_settings(of_store)?;
        let connector = PostgresTlsConnector::new(&settings.tls)?;
        let settings = Arc::new(settings);
        let workers = StoreRuntime::start()?;
        let (store_url, durability) = (settings.redacted_url().to_owned(), settings.durability);
        let unix_ms = clock.as_ref().map(|clock| clock.now().unix_ms());
        let expected = ExpectedStore { history: None, durability, store_url: store_url.clone() };
        let new_connection = || DedicatedConnection::new(settings.clone(), connector.clone());
        let (revoker, opening) = (new_connection(), expected.clone());
        let opener = revoker.clone();
        let revision = workers.run_to_end(true, async move {
            let open = |connection: Arc<PostgresConnection>| async move {
                server_checks::check_server(&connection, durability, &store_url).await?;
                schema::create_or_upgrade(&connection, of_store, unix_ms, &store_url).await?;
                Ok(read::read_head(&connection, &opening, false).await?.revision)
            };
            opener.transact(OPEN_LIMITS, open).await
        });
        let revision = revision.await?;
        if durability == Durability::Asynchronous {
            warn_asynchronous_durability();
        }
        let expected = ExpectedStore { history: Some(revision.history), ..expected };
        Ok(Self::from_parts(workers, revoker, &new_connection, (expected, revision.number), &settings, clock, true))
    }

    /// Opens a store that was followed before but could not be reached when the program started. The store must be of that
    /// history; otherwise it is not used. The first call that reaches the server makes the checks of [`PostgresStore::open`]. No
    /// table is created in an empty database.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the resources for its connections cannot be acquired.
    pub fn open_lazily(settings: Settings, history: HistoryId) -> Result<Self, Error> {
        let connector = PostgresTlsConnector::new(&settings.tls)?;
        let settings = Arc::new(settings);
        let workers = StoreRuntime::start()?;
        let new_connection = || DedicatedConnection::new(settings.clone(), connector.clone());
        let expected = ExpectedStore {
            history: Some(history),
            durability: settings.durability,
            store_url: settings.redacted_url().to_owned(),
        };
        Ok(Self::from_parts(workers, new_connection(), &new_connection, (expected, 0), &settings, None, false))
    }

    /// Assembles a store from its parts, and starts its ledger and its listener.
    fn from_parts(
        workers: StoreRuntime,
        revoker: Arc<DedicatedConnection>,
        new_connection: &dyn Fn() -> Arc<DedicatedConnection>,
        (expected, number): (ExpectedStore, u64),
        settings: &Arc<Settings>,
        clock: Option<Arc<dyn Clock>>,
        checked: bool,
    ) -> Self {
        let wake = watch::Sender::new(number);
        if settings.notify {
            let listener = new_connection();
            workers.spawn(notifications::listen_for_commits(settings.clone(), listener.connector(), wake.clone()));
        }
        let expected = Arc::new(RwLock::new(Arc::new(expected)));
        let (held, dates) = (expected.clone(), clock.clone());
        let worker = ledger::LedgerWorker {
            connection: new_connection(),
            limits: USE_LIMITS,
            expected: Arc::new(move || held.read().unwrap_or_else(PoisonError::into_inner).clone()),
            unix_ms: Arc::new(move || dates.as_ref().map(|clock| clock.now().unix_ms())),
        };
        let (uses, work) = LedgerQueue::new(worker, settings.redacted_url());
        workers.spawn(work);
        let (writer, poller, reader, loader) = (new_connection(), new_connection(), new_connection(), new_connection());
        let (notify, checked) = (settings.notify, Mutex::new(checked));
        Self {
            runtime: workers,
            revoker,
            writer,
            ledger: uses,
            poller,
            reader,
            loader,
            expected,
            notify,
            commit_watch: wake,
            clock,
            server_checked: checked,
        }
    }

    /// Checks the server and its tables once, if that was impossible at the start.
    async fn check_server_once(&self) -> Result<(), Error> {
        let mut checked = self.server_checked.lock().await;
        if *checked {
            return Ok(());
        }
        let (revoker, expected) = (self.revoker.clone(), self.current_expectation());
        let check = revoker.transact(OPEN_LIMITS, |connection| async move {
            server_checks::check_server(&connection, expected.durability, &expected.store_url).await?;
            schema::upgrade_existing(&connection, &expected.store_url).await
        });
        self.runtime.run_to_end(true, check).await?;
        *checked = true;
        if self.current_expectation().durability == Durability::Asynchronous {
            warn_asynchronous_durability();
        }
        Ok(())
    }

    /// Runs a transaction to its end on a connection, even if the caller stops waiting.
    async fn run_transaction<T, F, W>(
        &self,
        dedicated: &Arc<DedicatedConnection>,
        limits: TransactionLimits,
        work: W,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, QueryError>> + Send + 'static,
        W: FnOnce(Arc<PostgresConnection>, Arc<ExpectedStore>) -> F + Send + 'static,
    {
        self.check_server_once().await?;
        let (dedicated, expected) = (dedicated.clone(), self.current_expectation());
        let finish = limits.begin.writes && !limits.begin.one_view;
        self.runtime.run_to_end(finish, dedicated.transact(limits, move |connection| work(connection, expected))).await
    }

    /// Awaits a commit. If the commit has to wait, the log and the error name the session that blocks it.
    async fn await_commit_naming_blocker<T>(&self, commit: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let (reader, blocker) = (self.reader.clone(), Arc::new(std::sync::Mutex::new(None)));
        let found = blocker.clone();
        // Runs on the store's own threads, because the caller's runtime may have no timer.
        let watch = self.runtime.spawn(async move {
            tokio::time::sleep(BLOCKED_AFTER).await;
            // The commit may be over before the query runs; then nobody blocks it.
            if let Ok(Some(blocker)) =
                reader.transact(READ_LIMITS, |connection| async move { lock_holder::find_lock_holder(&connection).await }).await
            {
                tracing::warn!("a commit waits, held up by {blocker}");
                *found.lock().unwrap_or_else(PoisonError::into_inner) = Some(blocker);
            }
        });
        let done = commit.await;
        watch.abort();
        let blocker = blocker.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (done, blocker) {
            (Err(Error::Unavailable(why)), Some(blocker)) => {
                Err(Error::Unavailable(format!("{why}; it was held up by {blocker}")))
            }
            (done, _) => done,
        }
    }

    /// Submits a request to the ledger, which groups requests that wait together.
    async fn submit_use(&self, request: LedgerRequest) -> Result<LedgerAnswer, Error> {
        self.check_server_once().await?;
        self.ledger.submit(request, self.runtime.keep_alive()).await
    }

    /// The values against which every answer is checked at present.
    fn current_expectation(&self) -> Arc<ExpectedStore> {
        self.expected.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The time that a test sets.
    fn clock_override_unix_ms(&self) -> Option<i64> {
        self.clock.as_ref().map(|clock| clock.now().unix_ms())
    }

    /// Reads the commits after a number, up to a head. They are read in a later transaction than the head; that does not matter,
    /// because they are checked against the hash of the head.
    async fn changes_since(&self, after: u64, head: read::PostgresHead) -> Result<ChangeLogPage, Error> {
        let (history, number, head_hash) = (head.revision.history.clone(), head.revision.number, head.hash);
        let commits = if number > after {
            self.run_transaction(&self.poller, LOG_LIMITS, move |connection, _| async move {
                read::read_log(&connection, after, &head).await
            })
            .await?
        } else {
            vec![]
        };
        Ok(ChangeLogPage { history, head: number, head_hash, commits })
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn load(&self) -> Result<StoreState, Error> {
        self.run_transaction(&self.loader, LOAD_LIMITS, |connection, expected| async move {
            read::load_state(&connection, &expected).await
        })
        .await
    }

    async fn changes(&self, after: u64) -> Result<ChangeLogPage, Error> {
        let begun = TransactionLimits { begin: TransactionOptions { writes: false, ..POLL_LIMITS.begin }, ..POLL_LIMITS };
        let head = self
            .run_transaction(&self.poller, begun, |connection, expected| async move {
                read::read_head(&connection, &expected, false).await
            })
            .await?;
        self.changes_since(after, head).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        let head = self.run_transaction(&self.reader, READ_LIMITS, |connection, expected| async move {
            read::read_head(&connection, &expected, false).await
        });
        Ok(head.await?.revision)
    }

    async fn documents(&self, kind: Option<&str>) -> Result<DocumentList, Error> {
        let kind = kind.map(str::to_owned);
        self.run_transaction(&self.reader, READ_LIMITS, |connection, expected| async move {
            read::list_documents(&connection, &expected, kind.as_deref()).await
        })
        .await
    }

    async fn documents_by_key(&self, keys: &[DocumentKey]) -> Result<DocumentList, Error> {
        let keys = keys.to_vec();
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, expected| async move {
            read::documents_by_key(&connection, &expected, &keys).await
        })
        .await
    }

    async fn revocations_of(&self, targets: &[RevocationTarget]) -> Result<Vec<RevocationRow>, Error> {
        let targets = targets.to_vec();
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, expected| async move {
            // Reading the head checks that this is the store that is followed.
            read::read_head(&connection, &expected, false).await?;
            read::revocations_by_target(&connection, &targets).await
        })
        .await
    }

    async fn revocations(&self, limit: usize) -> Result<RevocationPage, Error> {
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, expected| async move {
            read::list_revocations(&connection, &expected, limit).await
        })
        .await
    }

    async fn commit(&self, request: CommitRequest) -> Result<CommitOutcome, Error> {
        write_rules::check_request(&request)?;
        let (unix_ms, notify) = (self.clock_override_unix_ms(), self.notify);
        let is_kill = request.writes.iter().any(|write| matches!(write, StoreWrite::Revoke { .. }))
            && !request.writes.iter().any(StoreWrite::writes_document);
        let dedicated = if is_kill { &self.revoker } else { &self.writer };
        let request = Arc::new(request);
        let mut attempt = 0;
        let done = loop {
            attempt += 1;
            let request = request.clone();
            let work = move |connection: Arc<PostgresConnection>, expected: Arc<ExpectedStore>| async move {
                write::commit_request(&connection, &expected, &request, unix_ms, notify).await
            };
            match self.await_commit_naming_blocker(self.run_transaction(dedicated, COMMIT_LIMITS, work)).await {
                Err(Error::Unavailable(why)) if why == HEAD_MOVED && attempt < COMMIT_ATTEMPTS_MAX => {}
                done => break done?,
            }
        };
        if self.current_expectation().history.as_ref().is_some_and(|history| *history != done.revision.history) {
            self.expect_history(&done.revision);
        }
        notify_if_newer(&self.commit_watch, done.revision.number);
        Ok(done)
    }

    async fn spend_proof(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error> {
        match self.submit_use(LedgerRequest::Spend(ProofUse { key, expires_at_unix_s })).await? {
            LedgerAnswer::Spend(first) => Ok(first),
            _ => Err(ledger::unanswered_error()),
        }
    }

    async fn ask_approval(&self, request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, Error> {
        approval_rules::check_ask(&request)?;
        match self.submit_use(LedgerRequest::Ask(request)).await? {
            LedgerAnswer::Ask(outcome) => Ok(outcome),
            _ => Err(ledger::unanswered_error()),
        }
    }

    async fn use_approvals(&self, request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, Error> {
        approval_rules::check_use(&request)?;
        match self.submit_use(LedgerRequest::Use(request)).await? {
            LedgerAnswer::Use(outcome) => Ok(outcome),
            _ => Err(ledger::unanswered_error()),
        }
    }

    async fn give_back_approvals(&self, request: ApprovalUseRequest) -> Result<bool, Error> {
        approval_rules::check_use(&request)?;
        match self.submit_use(LedgerRequest::GiveBack(request)).await? {
            LedgerAnswer::GiveBack(given) => Ok(given),
            _ => Err(ledger::unanswered_error()),
        }
    }

    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<ApprovalPage, Error> {
        let unix_ms = self.clock_override_unix_ms();
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, expected| async move {
            approvals::list_approvals(&connection, &expected, &filter, limit, unix_ms).await
        })
        .await
    }

    async fn policy_history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, expected| async move {
            history::list_policy_commits(&connection, &expected, limit).await
        })
        .await
    }

    async fn documents_at(&self, number: u64) -> Result<DocumentList, Error> {
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, expected| async move {
            history::documents_at(&connection, &expected, number).await
        })
        .await
    }

    async fn register_replica(&self, registration: &ReplicaRegistration) -> Result<(), Error> {
        super::fleet::check_registration(registration)?;
        let (registration, unix_ms) = (registration.clone(), self.clock_override_unix_ms());
        self.run_transaction(&self.writer, REGISTER_LIMITS, move |connection, _| async move {
            fleet::register_replica(&connection, &registration, unix_ms).await
        })
        .await
    }

    async fn load_for_replica(&self, heartbeat: &ReplicaHeartbeat) -> Result<StoreState, Error> {
        let (heartbeat, unix_ms) = (heartbeat.clone(), self.clock_override_unix_ms());
        self.run_transaction(&self.poller, LOAD_FOR_REPLICA_LIMITS, move |connection, expected| async move {
            fleet::write_heartbeat(&connection, &heartbeat, unix_ms).await?;
            read::load_state(&connection, &expected).await
        })
        .await
    }

    async fn poll_changes(&self, heartbeat: &ReplicaHeartbeat) -> Result<ChangeLogPage, Error> {
        let after = heartbeat.applied_number;
        let (heartbeat, unix_ms) = (heartbeat.clone(), self.clock_override_unix_ms());
        let head = self.run_transaction(&self.poller, POLL_LIMITS, move |connection, expected| async move {
            fleet::write_heartbeat(&connection, &heartbeat, unix_ms).await?;
            read::read_head(&connection, &expected, false).await
        });
        self.changes_since(after, head.await?).await
    }

    async fn write_heartbeat(&self, heartbeat: &ReplicaHeartbeat) -> Result<(), Error> {
        let (heartbeat, unix_ms) = (heartbeat.clone(), self.clock_override_unix_ms());
        self.run_transaction(&self.poller, POLL_LIMITS, move |connection, _| async move {
            fleet::write_heartbeat(&connection, &heartbeat, unix_ms).await
        })
        .await
    }

    async fn replicas(&self) -> Result<ReplicaList, Error> {
        let unix_ms = self.clock_override_unix_ms();
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, _| async move {
            fleet::list_replicas(&connection, unix_ms).await
        })
        .await
    }

    async fn lineage(&self, at: u64) -> Result<StoreLineage, Error> {
        self.run_transaction(&self.reader, READ_LIMITS, move |connection, expected| async move {
            lineage::read_lineage(&connection, &expected, at).await
        })
        .await
    }

    async fn merges(&self) -> Result<Vec<ReplicaMerge>, Error> {
        self.run_transaction(&self.reader, READ_LIMITS, |connection, _| async move { lineage::list_merges(&connection).await })
            .await
    }

    fn expect_history(&self, revision: &Revision) {
        let mut expected = self.expected.write().unwrap_or_else(PoisonError::into_inner);
        *expected = Arc::new(ExpectedStore { history: Some(revision.history.clone()), ..ExpectedStore::clone(&expected) });
        // A restored store continues from a lower number, so its number counts as news even if it is not higher.
        self.commit_watch.send_replace(revision.number);
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        (self.current_expectation().durability == Durability::Asynchronous).then_some("store_durability: asynchronous")
    }

    fn subscribe_commits(&self) -> watch::Receiver<u64> {
        self.commit_watch.subscribe()
    }
}

#[cfg(test)]
mod tests;
