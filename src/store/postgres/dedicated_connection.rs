//! A connection that is reserved for one kind of work, and the threads on which all of that work runs.
//!
//! The threads belong to the store, because several runtimes share a store and a connection must outlive each of them. A
//! connection runs one transaction at a time. After a failure a new connection is made, with increasing pauses. Look next at
//! `super::connection`.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::{PostgresConnection, QueryError, TransactionOptions, to_store_error};
use super::settings::{Durability, Settings};
use super::tls::PostgresTlsConnector;
use crate::model::runtime::build_runtime;
use crate::store::Error;

/// Work that may wait or run at one time.
const CONCURRENT_WORK_MAX: usize = 1024;
/// How long a rollback may take before the connection is dropped instead.
const ROLL_BACK_TIMEOUT: Duration = Duration::from_millis(200);
/// Minimum and maximum pause between attempts to connect, before the random part.
const BACKOFF_MS_MIN: u64 = 50;
const BACKOFF_MS_MAX: u64 = 400;
const WORKER_THREADS: usize = 2;
/// How long a COMMIT that may wait for a standby may take.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);

/// The store's own threads. Dropping it finishes the work that was marked for that, and drops everything else.
pub(super) struct StoreRuntime {
    handle: tokio::runtime::Handle,
    permits: Arc<Semaphore>,
    alive: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl StoreRuntime {
    pub(super) fn start() -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::Unavailable(format!("cannot start the threads of the store: {error}"));
        let runtime = build_runtime(
            tokio::runtime::Builder::new_multi_thread().worker_threads(WORKER_THREADS).thread_name("store-postgres"),
        )
        .map_err(failed)?;
        let handle = runtime.handle().clone();
        let (alive, mut work) = mpsc::channel::<()>(1);
        let body = move || {
            // Ends when the store, and all work that holds a sender, is gone.
            runtime.block_on(work.recv());
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("store-postgres".to_owned()).spawn(body).map_err(failed)?;
        Ok(Self { handle, permits: Arc::new(Semaphore::new(CONCURRENT_WORK_MAX)), alive: Some(alive), thread: Some(thread) })
    }

    /// Runs work to its end on these threads, even if the caller stops waiting. With `finish`, dropping the store waits for it
    /// too.
    pub(super) async fn run_to_end<T, F>(&self, finish: bool, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let stopped = || Error::Unavailable("the store has stopped: restart the program".to_owned());
        let lost = || match finish {
            true => {
                Error::OutcomeUnknown("the store stopped in the middle of it: it may or may not have been written".to_owned())
            }
            false => stopped(),
        };
        let permit: OwnedSemaphorePermit = self.permits.clone().acquire_owned().await.map_err(|_| stopped())?;
        let held = (permit, if finish { self.alive.clone() } else { None });
        let (reply, answer) = oneshot::channel();
        self.handle.spawn(async move {
            let outcome = work.await;
            drop(held);
            // The receiver may have stopped waiting.
            let _ = reply.send(outcome);
        });
        answer.await.map_err(|_| lost())?
    }

    /// A token that keeps the store's threads running while it is held.
    pub(super) fn keep_alive(&self) -> Option<mpsc::Sender<()>> {
        self.alive.clone()
    }

    /// Starts work that runs until the store is dropped.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.handle.spawn(work).abort_handle()
    }
}

impl Drop for StoreRuntime {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing left to finish.
            let _ = thread.join();
        }
    }
}

/// The limits of one transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransactionLimits {
    pub(super) begin: TransactionOptions,
    /// Waiting for the connection.
    pub(super) wait: Duration,
    /// Connecting to one host.
    pub(super) connect: Duration,
    /// From BEGIN to the answer to COMMIT.
    pub(super) work: Duration,
}

impl TransactionLimits {
    /// How long BEGIN may take. BEGIN does no work, so a server that does not answer it soon is gone, however long the work
    /// itself may take.
    fn begin_timeout(&self) -> Duration {
        self.work.min(self.connect)
    }
}

/// A connection for one kind of work.
pub(super) struct DedicatedConnection {
    settings: Arc<Settings>,
    connector: PostgresTlsConnector,
    slot: Mutex<DedicatedSlot>,
}

/// The kept connection, and where to connect next.
#[derive(Default)]
struct DedicatedSlot {
    connection: Option<Arc<PostgresConnection>>,
    /// The host to try first: the host that served last, or the next one if that host failed.
    host: usize,
    backoff: ReconnectBackoff,
}

impl DedicatedConnection {
    pub(super) fn new(settings: Arc<Settings>, connector: PostgresTlsConnector) -> Arc<Self> {
        Arc::new(Self { settings, connector, slot: Mutex::default() })
    }

    /// The connector for new connections.
    pub(super) fn connector(&self) -> PostgresTlsConnector {
        self.connector.clone()
    }

    /// Runs `work` between BEGIN and COMMIT, and rolls back if it fails.
    ///
    /// # Errors
    /// The errors of `work`; [`Error::OutcomeUnknown`] if a COMMIT that writes was sent and has no successful answer.
    pub(super) async fn transact<T, F, W>(self: Arc<Self>, limits: TransactionLimits, work: W) -> Result<T, Error>
    where
        F: Future<Output = Result<T, QueryError>>,
        W: FnOnce(Arc<PostgresConnection>) -> F,
    {
        let store_url = self.settings.redacted_url();
        let busy = |_| Error::Unavailable(format!("the store `{store_url}` is busy or does not answer: try again"));
        let mut slot = timeout(limits.wait, self.slot.lock()).await.map_err(busy)?;
        let (connection, until) = self.begin_transaction(&mut slot, limits).await?;
        let done = timeout_at(until, async {
            let value = work(connection.clone()).await?;
            // If nothing was written, COMMIT does no work either.
            let ending = if limits.begin.writes { COMMIT_TIMEOUT } else { limits.connect };
            timeout(ending, connection.commit(self.settings.durability == Durability::Synchronous))
                .await
                .map_err(|_| no_answer_error(store_url))??;
            Ok(value)
        });
        let outcome: Result<T, QueryError> = done.await.unwrap_or_else(|_| {
            let late = format!("the store `{store_url}` did not answer within {} ms", limits.work.as_millis());
            Err(Error::Unavailable(late).into())
        });
        match outcome {
            Ok(value) => {
                slot.connection = Some(connection);
                Ok(value)
            }
            Err(fault) if connection.is_committing() => {
                // A server that was replaced may accept connections and hang here. The next host may be the current primary.
                slot.host = connection.host.saturating_add(1);
                let why = to_store_error(store_url, fault);
                Err(Error::OutcomeUnknown(format!("{why}: it may or may not have been written")))
            }
            Err(fault) => {
                // A refused request leaves the connection usable. After any other error, a new connection is made.
                let refused = matches!(&fault, QueryError::Store(error) if is_request_error(error))
                    || matches!(fault, QueryError::HeadMoved);
                let refused = refused && connection.is_open();
                if refused && matches!(timeout(ROLL_BACK_TIMEOUT, connection.roll_back()).await, Ok(Ok(()))) {
                    slot.connection = Some(connection);
                } else {
                    slot.host = connection.host.saturating_add(1);
                }
                Err(to_store_error(store_url, fault))
            }
        }
    }

    /// Begins a transaction. Returns the connection and the deadline of the transaction.
    async fn begin_transaction(
        &self,
        slot: &mut DedicatedSlot,
        limits: TransactionLimits,
    ) -> Result<(Arc<PostgresConnection>, Instant), Error> {
        let store_url = self.settings.redacted_url();
        // Taken out of the slot: from here on, a connection in an unknown state is not kept.
        if let Some(connection) = slot.connection.take().filter(|connection| connection.is_open()) {
            let until = Instant::now() + limits.work;
            match timeout(limits.begin_timeout(), connection.begin(limits.begin)).await {
                Ok(Ok(())) => return Ok((connection, until)),
                // The server closed it in the meantime. Nothing was sent on it yet, so try a new connection.
                Ok(Err(_)) => {}
                Err(_) => {
                    slot.host = connection.host.saturating_add(1);
                    // The network to it may be broken: also try a new connection, unless no time is left.
                    if Instant::now() >= until {
                        return Err(no_answer_error(store_url));
                    }
                }
            }
        }
        slot.backoff.check_elapsed(store_url)?;
        let first = slot.host;
        let attempt = async {
            let connection = PostgresConnection::connect(&self.settings, &self.connector, first, limits.connect, None).await?;
            let until = Instant::now() + limits.work;
            let begun =
                timeout(limits.begin_timeout(), connection.begin(limits.begin)).await.map_err(|_| no_answer_error(store_url))?;
            begun.map_err(|fault| to_store_error(store_url, fault))?;
            Ok((Arc::new(connection), until))
        };
        let outcome = attempt.await;
        slot.backoff.record_attempt(outcome.as_ref().err());
        slot.host = outcome.as_ref().map_or(first.saturating_add(1), |(connection, _)| connection.host);
        outcome
    }
}

/// Whether the error is due to the request itself. Every other error may mean that the server was replaced by another, so its
/// connection is dropped and the next host is tried first.
fn is_request_error(error: &Error) -> bool {
    match error {
        Error::Conflict { .. }
        | Error::DocumentsChanged { .. }
        | Error::ActReplayed { .. }
        | Error::SignerRevoked { .. }
        | Error::NoSignerLeft
        | Error::Rejected(_)
        | Error::BelowFloor { .. } => true,
        Error::Missing(_)
        | Error::NotAStore(_)
        | Error::NewerVersion(_)
        | Error::Replaced(_)
        | Error::Unregistered { .. }
        | Error::Misconfigured(_)
        | Error::Corrupt(_)
        | Error::Unavailable(_)
        | Error::OutcomeUnknown(_) => false,
    }
}

fn no_answer_error(store_url: &str) -> Error {
    Error::Unavailable(format!("the store `{store_url}` does not answer"))
}

/// How long to leave a server alone after a failed attempt to connect.
#[derive(Default)]
pub(super) struct ReconnectBackoff {
    failures: u32,
    until: Option<Instant>,
    problem: Option<Error>,
}

impl ReconnectBackoff {
    /// Fails with the last error while the pause lasts.
    fn check_elapsed(&self, store_url: &str) -> Result<(), Error> {
        match (self.until.filter(|until| *until > Instant::now()), &self.problem) {
            (Some(_), Some(problem)) => Err(problem.clone()),
            (Some(_), None) => Err(Error::Unavailable(format!("the store `{store_url}` cannot be reached"))),
            _ => Ok(()),
        }
    }

    /// Records the result of an attempt to connect: `None` resets the pause, an error prolongs it.
    fn record_attempt(&mut self, problem: Option<&Error>) {
        match problem {
            None => *self = Self::default(),
            Some(problem) => {
                let pause = self.next_delay();
                self.until = Some(Instant::now() + pause);
                self.problem = Some(problem.clone());
            }
        }
    }

    /// The next pause. It doubles each time, and is chosen between half and all of that, so that a fleet does not reconnect all
    /// at once.
    pub(super) fn next_delay(&mut self) -> Duration {
        let doubled = BACKOFF_MS_MIN.saturating_mul(1 << self.failures.min(10)).min(BACKOFF_MS_MAX);
        self.failures = self.failures.saturating_add(1);
        let jitter = RandomState::new().hash_one(self.failures) % (doubled / 2 + 1);
        Duration::from_millis(doubled / 2 + jitter)
    }

    /// Resets the pauses after a success.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}
