//! The store of a fleet: one PostgreSQL database that replicas on many machines follow.
//!
//! Every commit locks the row of the head, so that revision numbers have no gap. A follower's poll writes a heartbeat, because a
//! server that was replaced by another can still be read, but cannot commit. Only `store` knows SQL.
//!
//! Each kind of work has a connection of its own, made when it is first needed: revocations, other commits, uses of proofs and
//! approvals, polls, lists, and full states. One more connection listens for notifications, on which nothing relies.
//!
//! Look next at `postgres/settings.rs` (durability), `postgres/link.rs` (transactions), `postgres/read.rs` and
//! `postgres/write.rs`.

mod apply;
mod approvals;
mod blocked;
mod fleet;
mod history;
mod lane;
mod lineage;
mod link;
mod listen;
mod pending;
mod read;
mod row_keys;
mod schema;
mod server_checks;
mod settings;
mod staged;
mod tls;
mod uses;
mod write;

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Mutex, watch};

pub use self::settings::{Durability, Settings, Tls};

use self::lane::{Lane, Limits, Workers};
use self::link::{Begin, Fault, Link, MOVED, raise};
use self::read::Expected;
use self::tls::Connector;
use self::uses::{Answer, Queue, Request};
use super::{
    Changes, CommitRequest, Committed, Documents, Error, Heartbeat, Lineage, Merged, PolicyCommit, Registration, Replicas,
    Revocations, State, Store, approvals as steps, rules,
};
use crate::model::approval::{ApprovalFilter, Approvals, AskApproval, AskOutcome, ProofUse, UseApprovals, UseOutcome};
use crate::model::records::{DocumentKey, RevocationRow, Target, Write};
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::Clock;

/// Creating the tables may wait for another replica that creates them.
const OPEN: Limits = limits(Begin { one_view: false, writes: true, lock_timeout_ms: 10_000 }, 5_000, 2_000, 20_000);
/// A commit waits for other commits, and for a standby.
const COMMIT: Limits = limits(Begin { one_view: false, writes: true, lock_timeout_ms: 5_000 }, 5_000, 2_000, 10_000);
/// A use that is late is a denial. Other uses hold a row or a key for some milliseconds only.
const USE: Limits = limits(Begin { one_view: false, writes: true, lock_timeout_ms: 500 }, 1_000, 1_000, 2_000);
/// A poll that takes longer loses its connection.
const POLL: Limits = limits(Begin { one_view: false, writes: true, lock_timeout_ms: 200 }, 300, 1_000, 300);
/// Reads the commits after a poll has found that there are any.
const LOG: Limits = limits(Begin { one_view: false, writes: false, lock_timeout_ms: 200 }, 300, 1_000, 60_000);
/// Registers a replica.
const REGISTER: Limits = limits(Begin { one_view: false, writes: true, lock_timeout_ms: 2_000 }, 5_000, 1_000, 3_000);
/// Loads a full state for a replica, with its heartbeat.
const LOAD_AS: Limits = limits(Begin { one_view: true, writes: true, lock_timeout_ms: 200 }, 5_000, 2_000, 60_000);
/// Loads a full state.
const LOAD: Limits = limits(Begin { one_view: true, writes: false, lock_timeout_ms: 200 }, 30_000, 2_000, 60_000);
/// Reads a list.
const READ: Limits = limits(Begin { one_view: true, writes: false, lock_timeout_ms: 200 }, 5_000, 2_000, 30_000);

/// Attempts at a commit while other commits come first.
const COMMIT_ATTEMPTS_MAX: u32 = 8;
/// A commit that takes longer than this is probably blocked by another session.
const BLOCKED_AFTER: Duration = Duration::from_millis(1_000);

/// Builds limits from milliseconds: for waiting, for connecting to one host, and for the work.
const fn limits(begin: Begin, wait_ms: u64, connect_ms: u64, work_ms: u64) -> Limits {
    let (wait, connect, work) =
        (Duration::from_millis(wait_ms), Duration::from_millis(connect_ms), Duration::from_millis(work_ms));
    Limits { begin, wait, connect, work }
}

/// A store in one PostgreSQL database.
///
/// Any number of processes may open the database. [`Durability`] says what an acknowledged commit survives. The store can be used
/// from several runtimes at once. Dropping it finishes the pending writes.
pub struct PostgresStore {
    workers: Workers,
    /// Opened at the start and reserved for revocations, so that no revocation waits behind other work of this process.
    killer: Arc<Lane>,
    writer: Arc<Lane>,
    uses: Queue,
    poller: Arc<Lane>,
    reader: Arc<Lane>,
    loader: Arc<Lane>,
    expected: Arc<RwLock<Arc<Expected>>>,
    notify: bool,
    wake: watch::Sender<u64>,
    /// Replaces the server's clock. Only tests set it.
    clock: Option<Arc<dyn Clock>>,
    /// Whether the server and its tables were checked.
    checked: Mutex<bool>,
}

fn warn_of_asynchronous() {
    tracing::warn!("`store_durability: asynchronous`: a failover may lose acknowledged writes, revocations among them");
}

impl PostgresStore {
    /// Opens the store in a database. Creates its tables with the default settings if there are none.
    ///
    /// # Errors
    /// - [`Error::Misconfigured`] if the server does not provide the claimed [`Durability`];
    /// - [`Error::NotOurs`] if the schema `portcullis` belongs to another program;
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
        rules::check_settings(of_store)?;
        let connector = Connector::new(&settings.tls)?;
        let settings = Arc::new(settings);
        let workers = Workers::start()?;
        let (shown, durability) = (settings.shown().to_owned(), settings.durability);
        let unix_ms = clock.as_ref().map(|clock| clock.now().unix_ms());
        let expected = Expected { history: None, durability, shown: shown.clone() };
        let lane = || Lane::new(settings.clone(), connector.clone());
        let (killer, opening) = (lane(), expected.clone());
        let opener = killer.clone();
        let revision = workers.run(true, async move {
            let open = |link: Arc<Link>| async move {
                server_checks::check_server(&link, durability, &shown).await?;
                schema::prepare(&link, of_store, unix_ms, &shown).await?;
                Ok(read::head(&link, &opening, false).await?.revision)
            };
            opener.transact(OPEN, open).await
        });
        let revision = revision.await?;
        if durability == Durability::Asynchronous {
            warn_of_asynchronous();
        }
        let expected = Expected { history: Some(revision.history), ..expected };
        Ok(Self::assemble(workers, killer, &lane, (expected, revision.number), &settings, clock, true))
    }

    /// Opens a store that was followed before but could not be reached when the program started. The store must be of that
    /// history; otherwise it is not used. The first call that reaches the server makes the checks of [`PostgresStore::open`]. No
    /// table is created in an empty database.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the resources for its connections cannot be acquired.
    pub fn open_later(settings: Settings, history: HistoryId) -> Result<Self, Error> {
        let connector = Connector::new(&settings.tls)?;
        let settings = Arc::new(settings);
        let workers = Workers::start()?;
        let lane = || Lane::new(settings.clone(), connector.clone());
        let expected = Expected { history: Some(history), durability: settings.durability, shown: settings.shown().to_owned() };
        Ok(Self::assemble(workers, lane(), &lane, (expected, 0), &settings, None, false))
    }

    /// Assembles a store from its parts, and starts its ledger and its listener.
    fn assemble(
        workers: Workers,
        killer: Arc<Lane>,
        lane: &dyn Fn() -> Arc<Lane>,
        (expected, number): (Expected, u64),
        settings: &Arc<Settings>,
        clock: Option<Arc<dyn Clock>>,
        checked: bool,
    ) -> Self {
        let wake = watch::Sender::new(number);
        if settings.notify {
            let listener = lane();
            workers.spawn(listen::listen(settings.clone(), listener.connector(), wake.clone()));
        }
        let expected = Arc::new(RwLock::new(Arc::new(expected)));
        let (held, dates) = (expected.clone(), clock.clone());
        let worker = uses::Worker {
            lane: lane(),
            limits: USE,
            expected: Arc::new(move || held.read().unwrap_or_else(PoisonError::into_inner).clone()),
            unix_ms: Arc::new(move || dates.as_ref().map(|clock| clock.now().unix_ms())),
        };
        let (uses, work) = Queue::new(worker, settings.shown());
        workers.spawn(work);
        let (writer, poller, reader, loader) = (lane(), lane(), lane(), lane());
        let (notify, checked) = (settings.notify, Mutex::new(checked));
        Self { workers, killer, writer, uses, poller, reader, loader, expected, notify, wake, clock, checked }
    }

    /// Checks the server and its tables once, if that was impossible at the start.
    async fn check_once(&self) -> Result<(), Error> {
        let mut checked = self.checked.lock().await;
        if *checked {
            return Ok(());
        }
        let (lane, expected) = (self.killer.clone(), self.expected());
        let check = lane.transact(OPEN, |link| async move {
            server_checks::check_server(&link, expected.durability, &expected.shown).await?;
            schema::bring_up(&link, &expected.shown).await
        });
        self.workers.run(true, check).await?;
        *checked = true;
        if self.expected().durability == Durability::Asynchronous {
            warn_of_asynchronous();
        }
        Ok(())
    }

    /// Runs a transaction to its end on a connection, even if the caller stops waiting.
    async fn on<T, F, W>(&self, lane: &Arc<Lane>, limits: Limits, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
        W: FnOnce(Arc<Link>, Arc<Expected>) -> F + Send + 'static,
    {
        self.check_once().await?;
        let (lane, expected) = (lane.clone(), self.expected());
        let finish = limits.begin.writes && !limits.begin.one_view;
        self.workers.run(finish, lane.transact(limits, move |link| work(link, expected))).await
    }

    /// Awaits a commit. If the commit has to wait, the log and the error name the session that blocks it.
    async fn named<T>(&self, commit: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let (reader, blocker) = (self.reader.clone(), Arc::new(std::sync::Mutex::new(None)));
        let found = blocker.clone();
        // Runs on the store's own threads, because the caller's runtime may have no timer.
        let watch = self.workers.spawn(async move {
            tokio::time::sleep(BLOCKED_AFTER).await;
            // The commit may be over before the query runs; then nobody blocks it.
            if let Ok(Some(blocker)) = reader.transact(READ, |link| async move { blocked::blocker(&link).await }).await {
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
    async fn ledger(&self, request: Request) -> Result<Answer, Error> {
        self.check_once().await?;
        self.uses.ask(request, self.workers.alive()).await
    }

    /// The values against which every answer is checked at present.
    fn expected(&self) -> Arc<Expected> {
        self.expected.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The time that a test sets.
    fn unix_ms(&self) -> Option<i64> {
        self.clock.as_ref().map(|clock| clock.now().unix_ms())
    }

    /// Reads the commits after a number, up to a head. They are read in a later transaction than the head; that does not matter,
    /// because they are checked against the hash of the head.
    async fn since(&self, after: u64, head: read::Head) -> Result<Changes, Error> {
        let (history, number, head_hash) = (head.revision.history.clone(), head.revision.number, head.hash);
        let commits = if number > after {
            self.on(&self.poller, LOG, move |link, _| async move { read::log(&link, after, &head).await }).await?
        } else {
            vec![]
        };
        Ok(Changes { history, head: number, head_hash, commits })
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn load(&self) -> Result<State, Error> {
        self.on(&self.loader, LOAD, |link, expected| async move { read::load(&link, &expected).await }).await
    }

    async fn changes(&self, after: u64) -> Result<Changes, Error> {
        let begun = Limits { begin: Begin { writes: false, ..POLL.begin }, ..POLL };
        let head =
            self.on(&self.poller, begun, |link, expected| async move { read::head(&link, &expected, false).await }).await?;
        self.since(after, head).await
    }

    async fn revision(&self) -> Result<Revision, Error> {
        let head = self.on(&self.reader, READ, |link, expected| async move { read::head(&link, &expected, false).await });
        Ok(head.await?.revision)
    }

    async fn documents(&self, kind: Option<&str>) -> Result<Documents, Error> {
        let kind = kind.map(str::to_owned);
        self.on(&self.reader, READ, |link, expected| async move { read::documents(&link, &expected, kind.as_deref()).await })
            .await
    }

    async fn documents_named(&self, keys: &[DocumentKey]) -> Result<Documents, Error> {
        let keys = keys.to_vec();
        self.on(&self.reader, READ, move |link, expected| async move { read::documents_named(&link, &expected, &keys).await })
            .await
    }

    async fn revocations_of(&self, targets: &[Target]) -> Result<Vec<RevocationRow>, Error> {
        let targets = targets.to_vec();
        self.on(&self.reader, READ, move |link, expected| async move {
            // Reading the head checks that this is the store that is followed.
            read::head(&link, &expected, false).await?;
            read::revocations_of(&link, &targets).await
        })
        .await
    }

    async fn revocations(&self, limit: usize) -> Result<Revocations, Error> {
        self.on(&self.reader, READ, move |link, expected| async move { read::revocations(&link, &expected, limit).await }).await
    }

    async fn commit(&self, request: CommitRequest) -> Result<Committed, Error> {
        rules::check_request(&request)?;
        let (unix_ms, notify) = (self.unix_ms(), self.notify);
        let is_kill = request.writes.iter().any(|write| matches!(write, Write::Revoke { .. }))
            && !request.writes.iter().any(Write::is_of_document);
        let lane = if is_kill { &self.killer } else { &self.writer };
        let request = Arc::new(request);
        let mut attempt = 0;
        let done = loop {
            attempt += 1;
            let request = request.clone();
            let work = move |link: Arc<Link>, expected: Arc<Expected>| async move {
                write::commit(&link, &expected, &request, unix_ms, notify).await
            };
            match self.named(self.on(lane, COMMIT, work)).await {
                Err(Error::Unavailable(why)) if why == MOVED && attempt < COMMIT_ATTEMPTS_MAX => {}
                done => break done?,
            }
        };
        if self.expected().history.as_ref().is_some_and(|history| *history != done.revision.history) {
            self.follow_history(&done.revision);
        }
        raise(&self.wake, done.revision.number);
        Ok(done)
    }

    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error> {
        match self.ledger(Request::Spend(ProofUse { key, expires_at_unix_s })).await? {
            Answer::Spend(first) => Ok(first),
            _ => Err(uses::unanswered()),
        }
    }

    async fn ask_approval(&self, request: AskApproval) -> Result<AskOutcome, Error> {
        steps::check_ask(&request)?;
        match self.ledger(Request::Ask(request)).await? {
            Answer::Ask(outcome) => Ok(outcome),
            _ => Err(uses::unanswered()),
        }
    }

    async fn use_approvals(&self, request: UseApprovals) -> Result<UseOutcome, Error> {
        steps::check_use(&request)?;
        match self.ledger(Request::Use(request)).await? {
            Answer::Use(outcome) => Ok(outcome),
            _ => Err(uses::unanswered()),
        }
    }

    async fn give_back_approvals(&self, request: UseApprovals) -> Result<bool, Error> {
        steps::check_use(&request)?;
        match self.ledger(Request::GiveBack(request)).await? {
            Answer::GiveBack(given) => Ok(given),
            _ => Err(uses::unanswered()),
        }
    }

    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<Approvals, Error> {
        let unix_ms = self.unix_ms();
        self.on(&self.reader, READ, move |link, expected| async move {
            approvals::list(&link, &expected, &filter, limit, unix_ms).await
        })
        .await
    }

    async fn history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error> {
        self.on(&self.reader, READ, move |link, expected| async move { history::history(&link, &expected, limit).await }).await
    }

    async fn documents_at(&self, number: u64) -> Result<Documents, Error> {
        self.on(&self.reader, READ, move |link, expected| async move { history::documents_at(&link, &expected, number).await })
            .await
    }

    async fn register(&self, registration: &Registration) -> Result<(), Error> {
        super::fleet::check_registration(registration)?;
        let (registration, unix_ms) = (registration.clone(), self.unix_ms());
        self.on(&self.writer, REGISTER, move |link, _| async move { fleet::register(&link, &registration, unix_ms).await }).await
    }

    async fn load_as(&self, heartbeat: &Heartbeat) -> Result<State, Error> {
        let (heartbeat, unix_ms) = (heartbeat.clone(), self.unix_ms());
        self.on(&self.poller, LOAD_AS, move |link, expected| async move {
            fleet::beat(&link, &heartbeat, unix_ms).await?;
            read::load(&link, &expected).await
        })
        .await
    }

    async fn poll(&self, heartbeat: &Heartbeat) -> Result<Changes, Error> {
        let after = heartbeat.applied_number;
        let (heartbeat, unix_ms) = (heartbeat.clone(), self.unix_ms());
        let head = self.on(&self.poller, POLL, move |link, expected| async move {
            fleet::beat(&link, &heartbeat, unix_ms).await?;
            read::head(&link, &expected, false).await
        });
        self.since(after, head.await?).await
    }

    async fn beat(&self, heartbeat: &Heartbeat) -> Result<(), Error> {
        let (heartbeat, unix_ms) = (heartbeat.clone(), self.unix_ms());
        self.on(&self.poller, POLL, move |link, _| async move { fleet::beat(&link, &heartbeat, unix_ms).await }).await
    }

    async fn replicas(&self) -> Result<Replicas, Error> {
        let unix_ms = self.unix_ms();
        self.on(&self.reader, READ, move |link, _| async move { fleet::replicas(&link, unix_ms).await }).await
    }

    async fn lineage(&self, at: u64) -> Result<Lineage, Error> {
        self.on(&self.reader, READ, move |link, expected| async move { lineage::lineage(&link, &expected, at).await }).await
    }

    async fn merges(&self) -> Result<Vec<Merged>, Error> {
        self.on(&self.reader, READ, |link, _| async move { lineage::merges(&link).await }).await
    }

    fn follow_history(&self, revision: &Revision) {
        let mut expected = self.expected.write().unwrap_or_else(PoisonError::into_inner);
        *expected = Arc::new(Expected { history: Some(revision.history.clone()), ..Expected::clone(&expected) });
        // A restored store continues from a lower number, so its number counts as news even if it is not higher.
        self.wake.send_replace(revision.number);
    }

    fn may_lose_commits(&self) -> Option<&'static str> {
        (self.expected().durability == Durability::Asynchronous).then_some("store_durability: asynchronous")
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }
}

#[cfg(test)]
mod tests;
