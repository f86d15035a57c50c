//! The embedded store: one SQLite file that the server and the command line share.
//!
//! Four threads have a connection each: one writes, one answers polls, one reads lists and one loads full states. Therefore a
//! long `load` or a slow disk never delays a poll. The writer has a second connection, which finds each commit again before it is
//! acknowledged. Only `store` knows SQL.
//!
//! Look next at `sqlite/connection.rs` (connections), `sqlite/file_watch.rs` (detects a replaced file), `sqlite/read.rs` and
//! `sqlite/write.rs`.

mod approvals;
mod backup;
mod connection;
mod connection_settings;
mod create;
mod error;
mod file_identity;
mod file_watch;
mod fleet;
mod header;
mod history;
mod integrity;
mod lineage;
mod pending_acts;
mod read;
mod reader_thread;
mod replica_cache;
mod schema;
mod spent_proofs;
mod store_thread;
mod write;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rusqlite::Connection;
use tokio::sync::{oneshot, watch};

pub use self::backup::{BackupError, BackupProgress, BackupSummary, back_up};
pub use self::error::NO_SPACE;
pub use self::replica_cache::{CACHE_FILE, ReplicaCache};

use self::connection::SqliteConnection;
use self::file_watch::StoreFiles;
use self::fleet::HeartbeatThrottle;
use self::reader_thread::ReadWorker;
use self::store_thread::StoreThread;
use self::write::{CheckpointSchedule, JobDeadline, ReplySender, WriteJob};
use super::{
    ChangeLogPage, CommitOutcome, CommitRequest, DocumentList, Error, PolicyCommit, ReplicaHeartbeat, ReplicaList, ReplicaMerge,
    ReplicaRegistration, RevocationPage, Settings, Store, StoreLineage, StoreState, approval_rules, write_rules,
};
use crate::model::approval::{
    ApprovalFilter, ApprovalPage, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest, ProofUse,
};
use crate::model::limits::LEDGER_TIMEOUT_MS;
use crate::model::revision::Revision;
use crate::model::rows::{DocumentKey, RevocationRow, RevocationTarget};
use crate::model::time::Clock;

/// A store in one SQLite file.
///
/// The file has a write-ahead log and `synchronous=FULL`: an acknowledged commit survives a crash and a power failure. Any number
/// of processes on one machine may open the file; each sees the others' commits at its next read. A network file system is not
/// supported.
///
/// The store can be used from several runtimes at once. Dropping it finishes the pending writes and closes the file.
pub struct SqliteStore {
    poll_worker: ReadWorker,
    read_worker: ReadWorker,
    load_worker: ReadWorker,
    /// Dropped last: the connection that closes last removes the write-ahead log, which an interrupted connection does not.
    write_worker: StoreThread<WriteJob>,
    commit_watch: watch::Receiver<u64>,
    files: Arc<StoreFiles>,
    clock: Arc<dyn Clock>,
    heartbeats: HeartbeatThrottle,
}

impl SqliteStore {
    /// Opens the store in a file. Creates it with the default settings if the file does not exist.
    ///
    /// A new file has mode 0600, a new folder 0700. The call blocks the thread for some milliseconds, or for seconds if another
    /// process holds the file.
    ///
    /// # Errors
    /// As [`SqliteStore::open_existing`], but [`Error::Missing`] only for an empty file or a shell; [`Error::AuditUnavailable`] if the
    /// file cannot be created.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        Self::open_with(path, clock, Settings::default())
    }

    /// Opens as [`SqliteStore::open`]. A store that is created now gets `settings`; an existing store keeps its own.
    ///
    /// # Errors
    /// As [`SqliteStore::open`], and [`Error::Rejected`] for settings out of range.
    pub fn open_with(path: &Path, clock: Arc<dyn Clock>, settings: Settings) -> Result<Self, Error> {
        write_rules::check_settings(settings)?;
        if std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            create::create_store(path, settings, clock.now().unix_ms())?;
        }
        Self::open_existing(path, clock)
    }

    /// Opens the store in a file, and never creates one. Blocks as [`SqliteStore::open`] does.
    ///
    /// # Errors
    /// - [`Error::Missing`] if there is no store, or only the remains of one;
    /// - [`Error::NotAStore`] if the file is something else;
    /// - [`Error::NewerVersion`] if a newer version created the store;
    /// - [`Error::Misconfigured`] if this user may not write to the file;
    /// - [`Error::Corrupt`] if the store is inconsistent;
    /// - [`Error::AuditUnavailable`] if the file cannot be used.
    pub fn open_existing(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let mut writing = SqliteConnection::open(&file_identity::find_store(path)?)?;
        let (polling, reading, loading) = (writing.open_sibling()?, writing.open_sibling()?, writing.open_sibling()?);
        let witness = writing.open_sibling()?;
        let files = writing.files().clone();
        let (sender, wake) = watch::channel(writing.newest_number()?);
        let poller = ReadWorker::start("store-poll", polling)?;
        let reader = ReadWorker::start("store-read", reading)?;
        let loader = ReadWorker::start("store-load", loading)?;
        let checkpoints = CheckpointSchedule::new(loader.weak_sender(), clock.now());
        let dates = clock.clone();
        let writer = StoreThread::start("store-write", None, move |jobs| {
            write::run_writer(writing, jobs, dates, sender, checkpoints, witness)
        })?;
        Ok(Self {
            write_worker: writer,
            poll_worker: poller,
            read_worker: reader,
            load_worker: loader,
            commit_watch: wake,
            files,
            clock,
            heartbeats: HeartbeatThrottle::default(),
        })
    }

    /// Queues a heartbeat for writing if one is due. The caller does not wait, because a slow disk must not make a replica look
    /// stale to itself.
    fn send_due_heartbeat(&self, heartbeat: &ReplicaHeartbeat) {
        if self.heartbeats.take_due(heartbeat, self.clock.now())
            && !self.write_worker.try_send_urgent(WriteJob::Heartbeat(heartbeat.clone()))
        {
            self.heartbeats.reset();
        }
    }

    async fn submit_write<T>(&self, job: impl FnOnce(ReplySender<T>) -> WriteJob) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.write_worker.send_urgent(job(reply)).await?;
        answer.await.map_err(|_| stopped_error())?
    }

    /// Submits as [`SqliteStore::submit_write`], for jobs that wait behind commits. A job is refused if too many wait, or if it
    /// waits too long.
    async fn submit_use<T>(&self, job: impl FnOnce(JobDeadline, ReplySender<T>) -> WriteJob) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let until = Instant::now() + Duration::from_millis(LEDGER_TIMEOUT_MS);
        self.write_worker.try_send_deferrable(job(until, reply))?;
        answer.await.map_err(|_| stopped_error())?
    }
}

fn stopped_error() -> Error {
    Error::OutcomeUnknown("the store stopped while writing: it may or may not have been written".to_owned())
}

#[async_trait]
impl Store for SqliteStore {
    async fn load(&self) -> Result<StoreState, Error> {
        self.load_worker
            .run_read(read::load_state)
            .await
            .inspect(|state| self.files.record_commit(state.revision.number, state.hash))
    }

    async fn changes(&self, after: u64) -> Result<ChangeLogPage, Error> {
        let changes = self.poll_worker.run_read(move |connection| read::read_changes(connection, after)).await;
        changes.inspect(|changes| self.files.record_commit(changes.head, changes.head_hash))
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.poll_worker.run_read(read::read_revision).await
    }

    async fn documents(&self, kind: Option<&str>) -> Result<DocumentList, Error> {
        let kind = kind.map(str::to_owned);
        self.read_worker.run_read(move |connection| read::list_documents(connection, kind.as_deref())).await
    }

    async fn documents_by_key(&self, keys: &[DocumentKey]) -> Result<DocumentList, Error> {
        let keys = keys.to_vec();
        self.read_worker.run_read(move |connection| read::documents_by_key(connection, &keys)).await
    }

    async fn revocations_of(&self, targets: &[RevocationTarget]) -> Result<Vec<RevocationRow>, Error> {
        let targets = targets.to_vec();
        self.read_worker.run_read(move |connection| read::revocations_by_target(connection, &targets)).await
    }

    async fn revocations(&self, limit: usize) -> Result<RevocationPage, Error> {
        self.read_worker.run_read(move |connection| read::list_revocations(connection, limit)).await
    }

    async fn commit(&self, request: CommitRequest) -> Result<CommitOutcome, Error> {
        write_rules::check_request(&request)?;
        self.submit_write(|reply| WriteJob::Commit(request, reply)).await
    }

    async fn spend_proof(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error> {
        self.submit_use(|until, reply| WriteJob::Spend(ProofUse { key, expires_at_unix_s }, until, reply)).await
    }

    async fn ask_approval(&self, request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, Error> {
        approval_rules::check_ask(&request)?;
        self.submit_use(|until, reply| WriteJob::Ask(request, until, reply)).await
    }

    async fn use_approvals(&self, request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, Error> {
        approval_rules::check_use(&request)?;
        self.submit_use(|until, reply| WriteJob::Use(request, until, reply)).await
    }

    async fn give_back_approvals(&self, request: ApprovalUseRequest) -> Result<bool, Error> {
        approval_rules::check_use(&request)?;
        self.submit_write(|reply| WriteJob::GiveBack(request, reply)).await
    }

    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<ApprovalPage, Error> {
        let unix_ms = self.clock.now().unix_ms();
        self.read_worker.run_read(move |connection| approvals::list_approvals(connection, &filter, limit, unix_ms)).await
    }

    async fn policy_history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        self.read_worker.run_read(move |connection| history::list_policy_commits(connection, limit)).await
    }

    async fn documents_at(&self, number: u64) -> Result<DocumentList, Error> {
        self.read_worker.run_read(move |connection| history::documents_at(connection, number)).await
    }

    async fn register_replica(&self, registration: &ReplicaRegistration) -> Result<(), Error> {
        super::fleet::check_registration(registration)?;
        self.heartbeats.reset();
        let registration = registration.clone();
        self.submit_write(|reply| WriteJob::Register(registration, reply)).await
    }

    async fn load_for_replica(&self, heartbeat: &ReplicaHeartbeat) -> Result<StoreState, Error> {
        let incarnation = heartbeat.incarnation.clone();
        let known = move |connection: &Connection| {
            fleet::check_registered(connection, &incarnation)?;
            read::load_state(connection)
        };
        let state = self.read_worker.run_read(known).await?;
        self.files.record_commit(state.revision.number, state.hash);
        self.send_due_heartbeat(heartbeat);
        Ok(state)
    }

    async fn poll_changes(&self, heartbeat: &ReplicaHeartbeat) -> Result<ChangeLogPage, Error> {
        let (incarnation, after) = (heartbeat.incarnation.clone(), heartbeat.applied_number);
        let known = move |connection: &Connection| {
            fleet::check_registered(connection, &incarnation)?;
            read::read_changes(connection, after)
        };
        let changes = self.poll_worker.run_read(known).await?;
        self.files.record_commit(changes.head, changes.head_hash);
        self.send_due_heartbeat(heartbeat);
        Ok(changes)
    }

    async fn write_heartbeat(&self, heartbeat: &ReplicaHeartbeat) -> Result<(), Error> {
        let incarnation = heartbeat.incarnation.clone();
        self.poll_worker.run_read(move |connection| fleet::check_registered(connection, &incarnation)).await?;
        self.send_due_heartbeat(heartbeat);
        Ok(())
    }

    async fn replicas(&self) -> Result<ReplicaList, Error> {
        let now = self.clock.now();
        self.read_worker.run_read(move |connection| fleet::list_replicas(connection, now)).await
    }

    async fn lineage(&self, at: u64) -> Result<StoreLineage, Error> {
        self.poll_worker.run_read(move |connection| lineage::read_lineage(connection, at)).await
    }

    async fn merges(&self) -> Result<Vec<ReplicaMerge>, Error> {
        self.read_worker.run_read(lineage::list_merges).await
    }

    fn expect_history(&self, _revision: &Revision) {
        // The history in the file is trusted as long as it is the same file.
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        None
    }

    async fn close(&self) -> Result<(), Error> {
        for reader in [&self.poll_worker, &self.read_worker, &self.load_worker] {
            reader.close().await?;
        }
        // The writer closes last, because the connection that closes last removes the write-ahead log.
        self.submit_write(WriteJob::Close).await
    }

    fn subscribe_commits(&self) -> watch::Receiver<u64> {
        self.commit_watch.clone()
    }
}

#[cfg(test)]
mod tests;
