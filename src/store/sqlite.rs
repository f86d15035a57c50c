//! The embedded store: one SQLite file that the server and the command line share.
//!
//! Four threads have a connection each: one writes, one answers polls, one reads lists and one loads full states. Therefore a
//! long `load` or a slow disk never delays a poll. Only `store` knows SQL.
//!
//! Look next at `sqlite/open.rs` (connections), `sqlite/files.rs` (detects a replaced file), `sqlite/read.rs` and
//! `sqlite/write.rs`.

mod approvals;
mod backup;
mod cache;
mod connection_settings;
mod create;
mod file_identity;
mod files;
mod fleet;
mod history;
mod lane;
mod lineage;
mod open;
mod pending;
mod read;
mod reader_thread;
mod schema;
mod spent_proofs;
mod store_fault;
mod whole;
mod write;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rusqlite::Connection;
use tokio::sync::{oneshot, watch};

pub use self::backup::{Backup, BackupError, Progress, back_up};
pub use self::cache::{CACHE_FILE, Cache};

use self::files::Files;
use self::fleet::Beats;
use self::lane::Lane;
use self::open::Db;
use self::reader_thread::Reader;
use self::write::{Checkpoints, Job, Reply, Until};
use super::{
    Changes, CommitRequest, Committed, Documents, Error, Heartbeat, Lineage, Merged, PolicyCommit, Registration, Replicas,
    Revocations, Settings, State, Store, approvals as steps, rules,
};
use crate::model::approval::{ApprovalFilter, Approvals, AskApproval, AskOutcome, ProofUse, UseApprovals, UseOutcome};
use crate::model::limits::LEDGER_WAIT_MS;
use crate::model::records::{DocumentKey, RevocationRow, Target};
use crate::model::revision::Revision;
use crate::model::time::Clock;

/// A store in one SQLite file.
///
/// The file has a write-ahead log and `synchronous=FULL`: an acknowledged commit survives a crash and a power failure. Any number
/// of processes on one machine may open the file; each sees the others' commits at its next read. A network file system is not
/// supported.
///
/// The store can be used from several runtimes at once. Dropping it finishes the pending writes and closes the file.
pub struct SqliteStore {
    poller: Reader,
    reader: Reader,
    loader: Reader,
    /// Dropped last: the connection that closes last removes the write-ahead log, which an interrupted connection does not.
    writer: Lane<Job>,
    wake: watch::Receiver<u64>,
    files: Arc<Files>,
    clock: Arc<dyn Clock>,
    beats: Beats,
}

impl SqliteStore {
    /// Opens the store in a file. Creates it with the default settings if the file does not exist.
    ///
    /// A new file has mode 0600, a new folder 0700. The call blocks the thread for some milliseconds, or for seconds if another
    /// process holds the file.
    ///
    /// # Errors
    /// As [`SqliteStore::open_existing`], but [`Error::Missing`] only for an empty file or a shell; [`Error::Unavailable`] if the
    /// file cannot be created.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        Self::open_with(path, clock, Settings::default())
    }

    /// Opens as [`SqliteStore::open`]. A store that is created now gets `settings`; an existing store keeps its own.
    ///
    /// # Errors
    /// As [`SqliteStore::open`], and [`Error::Rejected`] for settings out of range.
    pub fn open_with(path: &Path, clock: Arc<dyn Clock>, settings: Settings) -> Result<Self, Error> {
        rules::check_settings(settings)?;
        if std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            create::make(path, settings, clock.now().unix_ms())?;
        }
        Self::open_existing(path, clock)
    }

    /// Opens the store in a file, and never creates one. Blocks as [`SqliteStore::open`] does.
    ///
    /// # Errors
    /// - [`Error::Missing`] if there is no store, or only the remains of one;
    /// - [`Error::NotOurs`] if the file is something else;
    /// - [`Error::NewerVersion`] if a newer version created the store;
    /// - [`Error::Misconfigured`] if this user may not write to the file;
    /// - [`Error::Corrupt`] if the store is inconsistent;
    /// - [`Error::Unavailable`] if the file cannot be used.
    pub fn open_existing(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let mut writing = Db::open(&file_identity::find(path)?)?;
        let (polling, reading, loading) = (writing.sibling()?, writing.sibling()?, writing.sibling()?);
        let files = writing.files().clone();
        let (sender, wake) = watch::channel(writing.number()?);
        let poller = Reader::start("store-poll", polling)?;
        let reader = Reader::start("store-read", reading)?;
        let loader = Reader::start("store-load", loading)?;
        let checkpoints = Checkpoints::new(loader.handle(), clock.now());
        let dates = clock.clone();
        let writer = Lane::start("store-write", None, move |jobs| write::serve(writing, jobs, dates, sender, checkpoints))?;
        Ok(Self { writer, poller, reader, loader, wake, files, clock, beats: Beats::default() })
    }

    /// Queues a heartbeat for writing if one is due. The caller does not wait, because a slow disk must not make a replica look
    /// stale to itself.
    fn beat_where_due(&self, heartbeat: &Heartbeat) {
        if self.beats.due(heartbeat, self.clock.now()) && !self.writer.offer(Job::Beat(heartbeat.clone())) {
            self.beats.forget();
        }
    }

    async fn write<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.writer.send(job(reply)).await?;
        answer.await.map_err(|_| stopped())?
    }

    /// Submits as [`SqliteStore::write`], for jobs that wait behind commits. A job is refused if too many wait, or if it waits
    /// too long.
    async fn ledger<T>(&self, job: impl FnOnce(Until, Reply<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let until = Instant::now() + Duration::from_millis(LEDGER_WAIT_MS);
        self.writer.queue(job(until, reply))?;
        answer.await.map_err(|_| stopped())?
    }
}

fn stopped() -> Error {
    Error::Unknown("the store stopped while writing: it may or may not have been written".to_owned())
}

#[async_trait]
impl Store for SqliteStore {
    async fn load(&self) -> Result<State, Error> {
        self.loader.run(read::load).await.inspect(|state| self.files.saw(state.revision.number, state.hash))
    }

    async fn changes(&self, after: u64) -> Result<Changes, Error> {
        let changes = self.poller.run(move |connection| read::changes(connection, after)).await;
        changes.inspect(|changes| self.files.saw(changes.head, changes.head_hash))
    }

    async fn revision(&self) -> Result<Revision, Error> {
        self.poller.run(read::revision).await
    }

    async fn documents(&self, kind: Option<&str>) -> Result<Documents, Error> {
        let kind = kind.map(str::to_owned);
        self.reader.run(move |connection| read::documents(connection, kind.as_deref())).await
    }

    async fn documents_named(&self, keys: &[DocumentKey]) -> Result<Documents, Error> {
        let keys = keys.to_vec();
        self.reader.run(move |connection| read::documents_named(connection, &keys)).await
    }

    async fn revocations_of(&self, targets: &[Target]) -> Result<Vec<RevocationRow>, Error> {
        let targets = targets.to_vec();
        self.reader.run(move |connection| read::revocations_of(connection, &targets)).await
    }

    async fn revocations(&self, limit: usize) -> Result<Revocations, Error> {
        self.reader.run(move |connection| read::revocations(connection, limit)).await
    }

    async fn commit(&self, request: CommitRequest) -> Result<Committed, Error> {
        rules::check_request(&request)?;
        self.write(|reply| Job::Commit(request, reply)).await
    }

    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error> {
        self.ledger(|until, reply| Job::Spend(ProofUse { key, expires_at_unix_s }, until, reply)).await
    }

    async fn ask_approval(&self, request: AskApproval) -> Result<AskOutcome, Error> {
        steps::check_ask(&request)?;
        self.ledger(|until, reply| Job::Ask(request, until, reply)).await
    }

    async fn use_approvals(&self, request: UseApprovals) -> Result<UseOutcome, Error> {
        steps::check_use(&request)?;
        self.ledger(|until, reply| Job::Use(request, until, reply)).await
    }

    async fn give_back_approvals(&self, request: UseApprovals) -> Result<bool, Error> {
        steps::check_use(&request)?;
        self.write(|reply| Job::GiveBack(request, reply)).await
    }

    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<Approvals, Error> {
        let unix_ms = self.clock.now().unix_ms();
        self.reader.run(move |connection| approvals::list(connection, &filter, limit, unix_ms)).await
    }

    async fn history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        self.reader.run(move |connection| history::history(connection, limit)).await
    }

    async fn documents_at(&self, number: u64) -> Result<Documents, Error> {
        self.reader.run(move |connection| history::documents_at(connection, number)).await
    }

    async fn register(&self, registration: &Registration) -> Result<(), Error> {
        super::fleet::check_registration(registration)?;
        self.beats.forget();
        let registration = registration.clone();
        self.write(|reply| Job::Register(registration, reply)).await
    }

    async fn load_as(&self, heartbeat: &Heartbeat) -> Result<State, Error> {
        let incarnation = heartbeat.incarnation.clone();
        let known = move |connection: &Connection| {
            fleet::known(connection, &incarnation)?;
            read::load(connection)
        };
        let state = self.reader.run(known).await?;
        self.files.saw(state.revision.number, state.hash);
        self.beat_where_due(heartbeat);
        Ok(state)
    }

    async fn poll(&self, heartbeat: &Heartbeat) -> Result<Changes, Error> {
        let (incarnation, after) = (heartbeat.incarnation.clone(), heartbeat.applied_number);
        let known = move |connection: &Connection| {
            fleet::known(connection, &incarnation)?;
            read::changes(connection, after)
        };
        let changes = self.poller.run(known).await?;
        self.files.saw(changes.head, changes.head_hash);
        self.beat_where_due(heartbeat);
        Ok(changes)
    }

    async fn beat(&self, heartbeat: &Heartbeat) -> Result<(), Error> {
        let incarnation = heartbeat.incarnation.clone();
        self.poller.run(move |connection| fleet::known(connection, &incarnation)).await?;
        self.beat_where_due(heartbeat);
        Ok(())
    }

    async fn replicas(&self) -> Result<Replicas, Error> {
        let now = self.clock.now();
        self.reader.run(move |connection| fleet::replicas(connection, now)).await
    }

    async fn lineage(&self, at: u64) -> Result<Lineage, Error> {
        self.poller.run(move |connection| lineage::lineage(connection, at)).await
    }

    async fn merges(&self) -> Result<Vec<Merged>, Error> {
        self.reader.run(lineage::merges).await
    }

    fn follow_history(&self, _revision: &Revision) {
        // The history in the file is trusted as long as it is the same file.
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        None
    }

    async fn close(&self) -> Result<(), Error> {
        for reader in [&self.poller, &self.reader, &self.loader] {
            reader.close().await?;
        }
        // The writer closes last, because the connection that closes last removes the write-ahead log.
        self.write(Job::Close).await
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.wake.clone()
    }
}

#[cfg(test)]
mod tests;
