//! One connection with one transaction at a time: its deadlines, the server's warnings, and the outcome of a commit that broke
//! off.
//!
//! Nothing relies on the state of a session. Every transaction sets what it needs with `SET LOCAL`, and statements have no names,
//! so a pooler may put each transaction on a different connection. A deadline drops the connection and never cancels a statement,
//! because the server reports success for a cancelled wait for a standby. Look next at `super::dedicated_connection`, which keeps
//! connections.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::error::{DbError, Severity, SqlState};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, Row, RowStream};

use super::settings::Settings;
use super::tls::PostgresTlsConnector;
use crate::store::Error;

/// The channel of the notifications.
pub(super) const NOTIFY_CHANNEL: &str = "portcullis";
/// How long the server keeps a transaction open if its client is silent.
pub(super) const IDLE_IN_TRANSACTION_MS: u64 = 2_000;

/// A parameter and its type. With the type, no extra round trip to the server is needed.
pub(super) type SqlParameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// Why a step failed, before the error message names the store.
pub(super) enum QueryError {
    Sql(tokio_postgres::Error),
    /// The server sent a warning, and no warning is expected.
    ServerWarning(String),
    Store(Error),
    /// Other commits came first, so the prepared commit no longer fits.
    HeadMoved,
}

/// The message for [`QueryError::HeadMoved`].
pub(super) const HEAD_MOVED: &str = "others write to the store all the time and nothing was written: try again";

impl From<tokio_postgres::Error> for QueryError {
    fn from(error: tokio_postgres::Error) -> Self {
        QueryError::Sql(error)
    }
}

impl From<Error> for QueryError {
    fn from(error: Error) -> Self {
        QueryError::Store(error)
    }
}

/// The options of a transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransactionOptions {
    /// All reads see one view.
    pub(super) one_view: bool,
    /// The transaction writes, so the outcome of its commit matters.
    pub(super) writes: bool,
    /// How long it waits for a lock.
    pub(super) lock_timeout_ms: u64,
}

/// A connection. Dropping it closes the socket at once, whatever the server is doing.
pub(super) struct PostgresConnection {
    /// Index of the host to which it leads.
    pub(super) host: usize,
    client: Client,
    driver: JoinHandle<()>,
    warnings: Arc<ServerWarnings>,
    writes: AtomicBool,
    committing: AtomicBool,
}

/// The warnings that the server sent on a connection since its transaction began.
#[derive(Default)]
struct ServerWarnings {
    count: AtomicU64,
    last: Mutex<String>,
}

impl PostgresConnection {
    /// Connects to one of the hosts, trying the host with index `first` before the others. `notified` receives the numbers of
    /// notifications.
    pub(super) async fn connect(
        settings: &Settings,
        connector: &PostgresTlsConnector,
        first: usize,
        timeout: Duration,
        notified: Option<watch::Sender<u64>>,
    ) -> Result<Self, Error> {
        let mut problem = String::new();
        let all = settings.hosts.len();
        for (index, config) in settings.hosts.iter().enumerate().cycle().skip(first % all.max(1)).take(all) {
            match tokio::time::timeout(timeout, config.connect(connector.clone())).await {
                Ok(Ok((client, connection))) => {
                    let shared = Arc::new(ServerWarnings::default());
                    let driver = tokio::spawn(drive_connection(connection, shared.clone(), notified));
                    let (writes, committing) = (AtomicBool::new(false), AtomicBool::new(false));
                    return Ok(Self { host: index, client, driver, warnings: shared, writes, committing });
                }
                Ok(Err(error)) => problem = error_text(&error),
                Err(_) => problem = format!("no answer within {} ms", timeout.as_millis()),
            }
        }
        Err(Error::Unavailable(format!("the store `{}` cannot be reached: {problem}", settings.redacted_url())))
    }

    /// Whether the connection can still be used.
    pub(super) fn is_open(&self) -> bool {
        !self.client.is_closed()
    }

    /// Whether a COMMIT that writes was sent and has no successful answer. It may then have been executed.
    pub(super) fn is_committing(&self) -> bool {
        self.committing.load(Ordering::SeqCst)
    }

    /// Begins a transaction.
    pub(super) async fn begin(&self, begin: TransactionOptions) -> Result<(), QueryError> {
        let TransactionOptions { one_view, writes, lock_timeout_ms } = begin;
        self.warnings.count.store(0, Ordering::SeqCst);
        self.committing.store(false, Ordering::SeqCst);
        self.writes.store(writes, Ordering::SeqCst);
        let isolation = if one_view { "REPEATABLE READ" } else { "READ COMMITTED" };
        let access = if writes { "READ WRITE" } else { "READ ONLY" };
        self.client
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL {isolation} {access}; SET LOCAL lock_timeout = {lock_timeout_ms}; \
                 SET LOCAL idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}; SET LOCAL statement_timeout = 0; \
                 SET LOCAL search_path = pg_catalog"
            ))
            .await?;
        self.check_no_warning()
    }

    /// Commits. After an error the commit may or may not be done, unless nothing was written. With `on_standby`, a write counts
    /// only once a standby has it.
    pub(super) async fn commit(&self, on_standby: bool) -> Result<(), QueryError> {
        self.committing.store(self.writes.load(Ordering::SeqCst), Ordering::SeqCst);
        self.client.batch_execute("COMMIT").await?;
        // INVARIANT: a commit that returns with a warning proves nothing. `canceling wait for synchronous replication` means that
        // the commit is on this server alone, which may have been replaced by another.
        self.check_no_warning()?;
        // INVARIANT: a commit that was released from its wait proves nothing either. If the standbys are removed from a server's
        // settings, every commit that waits for them succeeds without a warning. The server makes a session reload its settings
        // before it releases the session, so they are read here.
        if on_standby && self.writes.load(Ordering::SeqCst) {
            let named = self.query_row("SELECT current_setting('synchronous_standby_names') <> ''", &[]).await?;
            if !named.is_some_and(|row| row.try_get(0).unwrap_or(false)) {
                return Err(QueryError::ServerWarning("its `synchronous_standby_names` names no standby any more".to_owned()));
            }
        }
        self.committing.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Rolls the transaction back.
    pub(super) async fn roll_back(&self) -> Result<(), QueryError> {
        Ok(self.client.batch_execute("ROLLBACK").await?)
    }

    /// Runs SQL without parameters.
    pub(super) async fn run_sql(&self, sql: &str) -> Result<(), QueryError> {
        Ok(self.client.batch_execute(sql).await?)
    }

    /// Runs a statement. Returns how many rows it affected.
    pub(super) async fn execute(&self, sql: &str, parameters: &[SqlParameter<'_>]) -> Result<u64, QueryError> {
        Ok(self.client.execute_typed(sql, parameters).await?)
    }

    /// Returns the rows of a query.
    pub(super) async fn query_rows(&self, sql: &str, parameters: &[SqlParameter<'_>]) -> Result<Vec<Row>, QueryError> {
        Ok(self.client.query_typed(sql, parameters).await?)
    }

    /// Returns the one row of a query, if there is one.
    pub(super) async fn query_row(&self, sql: &str, parameters: &[SqlParameter<'_>]) -> Result<Option<Row>, QueryError> {
        Ok(self.client.query_typed_opt(sql, parameters).await?)
    }

    /// Returns the rows of a query one by one, for results that are too large at once.
    pub(super) async fn query_stream(&self, sql: &str, parameters: &[SqlParameter<'_>]) -> Result<RowStream, QueryError> {
        let parameters = parameters.iter().map(|(value, kind)| (*value, kind.clone()));
        Ok(self.client.query_typed_raw(sql, parameters).await?)
    }

    /// Waits until the connection ends.
    pub(super) async fn wait_closed(&mut self) {
        // The caller does not need to know how it ended.
        let _ = (&mut self.driver).await;
    }

    /// Fails if the server sent a warning since the transaction began.
    fn check_no_warning(&self) -> Result<(), QueryError> {
        if self.warnings.count.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        Err(QueryError::ServerWarning(self.warnings.last.lock().unwrap_or_else(PoisonError::into_inner).clone()))
    }
}

impl Drop for PostgresConnection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Drives the connection. A warning is recorded before the answer that follows it is delivered.
async fn drive_connection<S, T>(
    mut connection: tokio_postgres::Connection<S, T>,
    shared: Arc<ServerWarnings>,
    notified: Option<watch::Sender<u64>>,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
        match message {
            AsyncMessage::Notice(notice) if is_warning(&notice) => {
                notice.message().clone_into(&mut shared.last.lock().unwrap_or_else(PoisonError::into_inner));
                shared.count.fetch_add(1, Ordering::SeqCst);
            }
            AsyncMessage::Notification(notification) if notification.channel() == NOTIFY_CHANNEL => {
                if let (Some(notified), Ok(number)) = (&notified, notification.payload().parse()) {
                    notify_if_newer(notified, number);
                }
            }
            _ => {}
        }
    }
}

/// Wakes the receivers if the number is higher than the known one.
pub(super) fn notify_if_newer(wake: &watch::Sender<u64>, number: u64) {
    wake.send_if_modified(|known| {
        let newer = number > *known;
        *known = number.max(*known);
        newer
    });
}

fn is_warning(notice: &DbError) -> bool {
    match notice.parsed_severity() {
        Some(severity) => !matches!(severity, Severity::Notice | Severity::Info | Severity::Log | Severity::Debug),
        // An old server does not send the severity in a fixed language. A needless warning is the safer choice.
        None => true,
    }
}

/// Converts an error of a transaction that was not committed, so that its message names the store.
pub(super) fn to_store_error(store_url: &str, fault: QueryError) -> Error {
    let error = match fault {
        QueryError::Store(error) => return error,
        QueryError::HeadMoved => return Error::Unavailable(HEAD_MOVED.to_owned()),
        QueryError::ServerWarning(warning) => {
            return Error::Unavailable(format!("the store `{store_url}` warned of something: {warning}; nothing counts as done"));
        }
        QueryError::Sql(error) => error,
    };
    let Some(code) = error.code() else {
        let cut = error.is_closed() || std::error::Error::source(&error).is_some_and(|source| source.is::<std::io::Error>());
        return if cut {
            Error::Unavailable(format!("the connection to the store `{store_url}` broke off: {}", error_text(&error)))
        } else {
            Error::Corrupt(format!("the store `{store_url}` does not hold together: {}", error_text(&error)))
        };
    };
    let message = error_text(&error);
    let gone =
        [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME, SqlState::UNDEFINED_COLUMN, SqlState::UNDEFINED_FUNCTION];
    if gone.contains(code) {
        return Error::Replaced(format!(
            "the store `{store_url}` lost its tables while it was open ({message}): put them back, or restart"
        ));
    }
    if *code == SqlState::READ_ONLY_SQL_TRANSACTION {
        return Error::Unavailable(format!("the server of the store `{store_url}` is a standby or read-only: name the primary"));
    }
    if *code == SqlState::LOCK_NOT_AVAILABLE {
        return Error::Unavailable(format!("the store `{store_url}` is busy, somebody else holds it: try again"));
    }
    if *code == SqlState::INSUFFICIENT_PRIVILEGE {
        return Error::Unavailable(format!(
            "the role of the store `{store_url}` lacks a right ({message}): see GRANT in docs/OPERATIONS.md"
        ));
    }
    if code.code().starts_with("XX") || code.code().starts_with("23") || code.code().starts_with("22") {
        return Error::Corrupt(format!("the store `{store_url}` does not hold together: {message}"));
    }
    Error::Unavailable(format!("the store `{store_url}` cannot be used: {message}"))
}

/// The message of the server or the system; it never contains a value that was sent or stored.
pub(super) fn error_text(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => format!("{} (SQLSTATE {})", error.message().replace('\n', " "), error.code().code()),
        None => {
            let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
            format!("{error}{}", if error.to_string().contains(source.trim_start_matches(": ")) { "" } else { &source })
        }
    }
}
