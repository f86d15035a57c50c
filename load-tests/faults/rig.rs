//! The processes: replicas of the real binary, each with its own route through the proxy to PostgreSQL, or all on one SQLite file.
//!
//! All processes end when the rig is dropped, however a scenario ends. A revocation goes through a replica's administration, or
//! directly to the store past the proxy; a replica behind a broken route cannot learn of the latter. Look next at `scenario.rs`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use portcullis::api::r#gen as wire;
use portcullis::model::rows::{RevocationKind, RevocationTarget, StoreWrite};
use portcullis::model::time::{Clock as _, SystemClock};
use portcullis::store::postgres::{Durability, PostgresStore, Settings};
use portcullis::store::sqlite::SqliteStore;
use portcullis::store::{self, CommitRequest, Store};
use portcullis::token::PrivateKey;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tonic::transport::Endpoint;
use wire::revocation_service_client::RevocationServiceClient;

use super::checker::{AcknowledgedKill, ClientAnswer, FaultVerdict, ReplicaClients};
use crate::calls::{request_by_chain, signed};
use crate::fixture::{CompanyFixture, session};
use crate::postgres;
use crate::proxy::{ProxyProcess, RouteMode};

/// Sessions that can be revoked. One further session is never revoked.
pub(crate) const DOOMED: usize = 12;
/// Longest wait for an act to be acknowledged. The store itself gives up earlier.
const ACT_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for any step that has no promised time.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The process ids of running replicas, for a program that ends at a panic without drops.
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Kills every replica.
pub(crate) fn kill_all() {
    for id in RUNNING.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
            // A replica that has already ended needs no signal.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The programs to run.
pub(crate) struct ProgramPaths {
    /// The server under test.
    pub(crate) server: PathBuf,
    /// The command that runs this program as the proxy.
    pub(crate) proxy: fn() -> Command,
}

/// The size, the load and the time limits of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FaultPlan {
    pub(crate) replicas: usize,
    /// Checks a second over all replicas.
    pub(crate) rate: u64,
    /// The freshness bound of the store.
    pub(crate) bound: Duration,
    /// How long a fault continues after the last acknowledgement and the bound.
    pub(crate) margin: Duration,
    /// Longest time for the fleet to be fresh again. A longer time is an error, not a figure.
    pub(crate) patience: Duration,
}

/// The kind of store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreKind {
    /// Replicas are notified of commits.
    Notified,
    /// Replicas find commits when they poll.
    Polled,
    /// As `Polled`, with two standbys; one of them must have each commit.
    Replicated,
    Sqlite,
}

/// One replica: a process that can be stopped, killed and started again on its data.
pub(crate) struct ReplicaProcess {
    child: Option<Child>,
    command: Box<dyn Fn() -> Result<Command> + Send>,
    data: PathBuf,
    log: PathBuf,
    pub(crate) admin: String,
    address: watch::Sender<Option<String>>,
}

impl ReplicaProcess {
    /// Starts the replica, at first or again, and waits until it decides.
    pub(crate) fn start(&mut self, policies: Option<&Path>) -> Result<()> {
        let mut command = (self.command)()?;
        if let Some(policies) = policies {
            command.arg("--policies").arg(policies);
        }
        let child = self.child.insert(command.stdout(Stdio::piped()).spawn().context("the server does not start")?);
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).push(child.id());
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no standard output")?).read_line(&mut line)?;
        let address = |name: &str| {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            let said = || std::fs::read_to_string(&self.log).unwrap_or_default();
            found
                .map(|address| format!("http://{address}"))
                .with_context(|| format!("a replica is not ready: `{line}` {}", said()))
        };
        self.admin = address("admin=")?;
        self.address.send_replace(Some(address("decisions=")?));
        Ok(())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("the replica is killed")?;
        Ok(kill_process(Pid::from_child(child), signal)?)
    }

    /// Sends SIGKILL. The clients keep sending to its address.
    pub(crate) fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
            RUNNING.lock().unwrap_or_else(PoisonError::into_inner).retain(|id| *id != child.id());
        }
        Ok(())
    }
}

impl Drop for ReplicaProcess {
    fn drop(&mut self) {
        // A replica that has already ended needs no kill.
        let _ = self.kill();
    }
}

/// A fleet with its store and its clients. The fields are dropped in this order.
pub(crate) struct FaultRig {
    clients: Vec<ReplicaClients>,
    pub(crate) replicas: Vec<ReplicaProcess>,
    /// The store past the proxy; after a failover, the new one.
    store: Option<Arc<dyn Store>>,
    /// The connection that holds the file's write lock.
    holder: Option<rusqlite::Connection>,
    pub(crate) proxy: Option<ProxyProcess>,
    /// The primary, then its standbys.
    pub(crate) servers: Vec<postgres::PostgresServer>,
    database: String,
    kills: Vec<AcknowledgedKill>,
    next: usize,
    key: Option<PrivateKey>,
    history: String,
    pub(crate) plan: FaultPlan,
    runtime: Runtime,
    folder: TempDir,
}

impl FaultRig {
    /// Starts all processes and waits until every replica permits every session.
    pub(crate) fn start(programs: &ProgramPaths, plan: FaultPlan, kind: StoreKind) -> Result<Self> {
        let mut rig = Self {
            clients: Vec::new(),
            replicas: Vec::new(),
            store: None,
            holder: None,
            proxy: None,
            servers: Vec::new(),
            database: String::new(),
            kills: Vec::new(),
            next: 1,
            key: None,
            history: String::new(),
            plan,
            runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?,
            folder: tempfile::tempdir()?,
        };
        if kind == StoreKind::Sqlite {
            rig.open(None)?;
        } else {
            let server = postgres::PostgresServer::start(&[]);
            let url = server.database();
            rig.database = url.split(['?', '/']).nth(3).context("no database in the URL")?.to_owned();
            rig.servers.push(server);
            rig.proxy = Some(ProxyProcess::start(programs.proxy));
            if kind == StoreKind::Replicated {
                rig.add_standbys()?;
            }
            rig.open(Some((0, kind)))?;
        }
        let company = CompanyFixture::new()?;
        let policies = rig.folder.path().join("policies");
        std::fs::create_dir(&policies)?;
        std::fs::write(policies.join("company.yaml"), company.policy(0)?)?;
        for number in 0..plan.replicas {
            rig.add_replica(programs, kind, number, &policies)?;
        }
        let now = SystemClock.now();
        let requests =
            (0..=DOOMED).map(|number| Ok(request_by_chain(&company.chain(number, 1, now)?))).collect::<Result<Vec<_>>>()?;
        let requests = Arc::new(requests);
        let every = Duration::from_micros(1_000_000 * plan.replicas as u64 / plan.rate.max(1));
        for replica in &rig.replicas {
            let asked = ReplicaClients::start(rig.runtime.handle(), replica.address.subscribe(), requests.clone(), every);
            rig.clients.push(asked);
        }
        let began = Instant::now();
        rig.wait("no replica permits all that it should", START_TIMEOUT, |rig| {
            let alive = |clients: &ReplicaClients, session| {
                clients.says(session, began, |answer| matches!(answer, ClientAnswer::Permit(_)))
            };
            rig.clients.iter().all(|clients| (0..=DOOMED).all(|session| alive(clients, session)))
        })?;
        Ok(rig)
    }

    fn add_replica(&mut self, programs: &ProgramPaths, kind: StoreKind, number: usize, policies: &Path) -> Result<()> {
        let store = match kind {
            StoreKind::Sqlite => format!("sqlite:{}", self.file().display()),
            kind => {
                let upstream = self.upstream(0)?;
                let (route, address) = self.proxy()?.route(upstream);
                // A replica's route has the replica's number, after the routes of the standbys.
                debug_assert_eq!(route, self.route_of(number));
                self.url(address, kind)
            }
        };
        let (data, log) = (self.folder.path().join(format!("data-{number}")), self.folder.path().join(format!("log-{number}")));
        let (server, at, errors) = (programs.server.clone(), data.clone(), log.clone());
        let command = move || {
            let mut command = Command::new(&server);
            for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(&name.to_string_lossy())) {
                command.env_remove(name);
            }
            let errors: File = OpenOptions::new().create(true).append(true).open(&errors)?;
            command.env("PORTCULLIS_STORE", &store).stdin(Stdio::null()).stderr(errors);
            if kind != StoreKind::Sqlite {
                command.env("PORTCULLIS_STORE_DURABILITY", durability(kind).as_str());
            }
            command.args(["serve", "--log", "info", "--data"]).arg(&at);
            command.args(["--listen", "--http-listen", "--admin-listen"].iter().flat_map(|flag| [*flag, "127.0.0.1:0"]));
            Ok(command)
        };
        let mut replica = ReplicaProcess {
            child: None,
            command: Box::new(command),
            data,
            log,
            admin: String::new(),
            address: watch::Sender::new(None),
        };
        replica.start((number == 0).then_some(policies))?;
        if number == 0 {
            self.key = Some(PrivateKey::from_jwk(&std::fs::read(replica.data.join("local.jwk"))?)?);
        }
        self.replicas.push(replica);
        Ok(())
    }

    /// Starts two standbys, whose routes to the primary can be broken.
    fn add_standbys(&mut self) -> Result<()> {
        let upstream = self.upstream(0)?;
        let (_, address) = self.proxy()?.route(upstream);
        for name in STANDBYS {
            self.servers.push(postgres::PostgresServer::standby(name, address.port()));
        }
        self.server(0)?.change_setting(&format!("synchronous_standby_names = '{SYNCHRONOUS}'"));
        self.until_followed(0, 2)
    }

    /// Waits until a server has this many standbys, of which one must have each commit.
    pub(crate) fn until_followed(&self, server: usize, standbys: usize) -> Result<()> {
        const FOLLOWING: &str = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum' AND state = 'streaming'";
        let server = self.server(server)?;
        self.wait("a standby does not follow", START_TIMEOUT, |_| server.sql("postgres", FOLLOWING) == standbys.to_string())
    }

    /// Waits until a standby receives nothing more.
    pub(crate) fn until_detached(&self, standby: usize) -> Result<()> {
        let server = self.server(standby)?;
        server.change_setting("primary_conninfo = ''");
        self.wait("a standby goes on receiving", START_TIMEOUT, |_| {
            server.sql("postgres", "SELECT count(*) FROM pg_stat_wal_receiver") == "0"
        })
    }

    /// Opens the store past the proxy, and creates it with the plan's bound if it does not exist.
    fn open(&mut self, server: Option<(usize, StoreKind)>) -> Result<()> {
        let bound_ms = u64::try_from(self.plan.bound.as_millis())?;
        let settings = store::Settings { freshness_bound_ms: bound_ms, ..store::Settings::default() };
        self.store = None;
        let store: Arc<dyn Store> = match server {
            None => Arc::new(SqliteStore::open_with(&self.file(), Arc::new(SystemClock), settings)?),
            Some((server, kind)) => {
                let url = self.url(self.upstream(server)?, kind);
                let at = Settings::parse(&url, durability(kind)).map_err(anyhow::Error::msg)?;
                Arc::new(self.runtime.block_on(PostgresStore::open_with(at, settings, None))?)
            }
        };
        self.history = self.runtime.block_on(store.revision())?.history.to_string();
        self.store = Some(store);
        Ok(())
    }

    /// Sends later direct revocations to another server.
    pub(crate) fn reopen(&mut self, server: usize) -> Result<()> {
        self.open(Some((server, StoreKind::Replicated)))
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("shared.db")
    }

    fn url(&self, at: SocketAddr, kind: StoreKind) -> String {
        let notify = if kind == StoreKind::Notified { "on" } else { "off" };
        let user = self.servers.first().map_or("", postgres::PostgresServer::superuser);
        format!("postgres://{user}@{at}/{}?notify={notify}", self.database)
    }

    pub(crate) fn server(&self, number: usize) -> Result<&postgres::PostgresServer> {
        self.servers.get(number).context("there is no such server")
    }

    pub(crate) fn proxy(&mut self) -> Result<&mut ProxyProcess> {
        self.proxy.as_mut().context("there is no proxy")
    }

    pub(crate) fn replica(&mut self, number: usize) -> Result<&mut ReplicaProcess> {
        self.replicas.get_mut(number).context("there is no such replica")
    }

    /// The address of a server.
    pub(crate) fn upstream(&self, number: usize) -> Result<SocketAddr> {
        Ok((Ipv4Addr::LOCALHOST, self.server(number)?.port()).into())
    }

    /// The number of the route between a replica and its server.
    pub(crate) fn route_of(&self, replica: usize) -> usize {
        replica + usize::from(self.servers.len() > 1)
    }

    /// Sets the mode of these replicas' routes.
    pub(crate) fn set(&mut self, replicas: &[usize], mode: &RouteMode) -> Result<()> {
        for replica in replicas {
            let route = self.route_of(*replica);
            self.proxy()?.set_mode(route, mode);
        }
        Ok(())
    }

    /// Redirects a replica to another server, as a changed DNS name does: its connections are cut, and new ones go there.
    pub(crate) fn point(&mut self, replica: usize, server: usize) -> Result<()> {
        let (route, upstream) = (self.route_of(replica), self.upstream(server)?);
        self.proxy()?.set_upstream(route, upstream);
        self.set(&[replica], &RouteMode::Cut)?;
        self.set(&[replica], &RouteMode::Pass)
    }

    /// Revokes the next session directly in the store.
    pub(crate) fn kill_in_store(&mut self) -> Result<()> {
        let number = self.next()?;
        let store = self.store.clone().context("the store is not open")?;
        let target = RevocationTarget::Session(session(number));
        let write = StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: "load test".to_owned() };
        self.runtime.block_on(store.commit(CommitRequest { writes: vec![write], ..Default::default() }))?;
        self.kills.push(AcknowledgedKill { session: number, acknowledged: Instant::now() });
        Ok(())
    }

    /// Revokes the next session at a replica, as an operator does.
    pub(crate) fn kill_at(&mut self, replica: usize) -> Result<()> {
        let number = self.next()?;
        let until = Instant::now() + self.plan.patience;
        // A slow server may answer that the outcome is not known, or that the store did not answer in time and nothing was done. An
        // operator repeats the act until it is acknowledged.
        while let Err(error) = self.act(replica, number) {
            let code = error.downcast_ref::<tonic::Status>().map(tonic::Status::code);
            let may_repeat = matches!(code, Some(tonic::Code::Unknown | tonic::Code::Unavailable));
            if !may_repeat || Instant::now() > until {
                return Err(error);
            }
        }
        self.kills.push(AcknowledgedKill { session: number, acknowledged: Instant::now() });
        Ok(())
    }

    /// As [`FaultRig::kill_at`], but nothing may be acknowledged; returns the refusal.
    pub(crate) fn kill_refused(&mut self, replica: usize) -> Result<String> {
        let number = self.next()?;
        match self.act(replica, number) {
            Ok(()) => bail!("a kill was acknowledged by a server that was replaced"),
            Err(refused) => Ok(format!("{refused:#}")),
        }
    }

    fn next(&mut self) -> Result<usize> {
        let number = self.next;
        self.next += 1;
        if number > DOOMED { bail!("no session is left to kill") } else { Ok(number) }
    }

    fn act(&mut self, replica: usize, number: usize) -> Result<()> {
        let key = self.key.as_ref().context("no operator")?;
        let request = signed(key, &self.history, session(number))?;
        let admin = self.replicas.get(replica).context("no such replica")?.admin.clone();
        self.runtime.block_on(async {
            let channel = Endpoint::from_shared(admin)?.connect_lazy();
            let mut client = RevocationServiceClient::new(channel);
            tokio::time::timeout(ACT_TIMEOUT, client.revoke(request)).await.context("an act is not answered")??;
            Ok(())
        })
    }

    /// Takes the file's write lock, and holds it like a writer that stopped in the middle of a write.
    pub(crate) fn hold_file(&mut self) -> Result<()> {
        let holder = rusqlite::Connection::open(self.file())?;
        holder.busy_timeout(START_TIMEOUT)?;
        holder.execute_batch("BEGIN IMMEDIATE")?;
        self.holder = Some(holder);
        Ok(())
    }

    /// Releases the write lock.
    pub(crate) fn release_file(&mut self) {
        self.holder = None;
    }

    /// When the last revocation was acknowledged.
    pub(crate) fn last_kill(&self) -> Option<Instant> {
        self.kills.last().map(|kill| kill.acknowledged)
    }

    /// Waits until every replica gives fresh permits again; returns the time from `since` to the last of them.
    pub(crate) fn until_fresh(&self, replicas: &[usize], since: Instant) -> Result<Duration> {
        let bound = self.plan.bound;
        let of = |replica: &usize| self.clients.get(*replica)?.fresh_after(since, bound);
        self.wait("a replica does not become fresh again", self.plan.patience, |_| replicas.iter().all(|one| of(one).is_some()))?;
        let last = replicas.iter().filter_map(of).max().unwrap_or(since);
        Ok(last.saturating_duration_since(since))
    }

    /// Waits until every replica denies the revoked sessions, for that reason and no other.
    pub(crate) fn until_known(&self) -> Result<()> {
        let since = Instant::now();
        self.wait("a kill does not reach a replica", self.plan.patience, |rig| {
            let knows = |clients: &ReplicaClients, kill: &AcknowledgedKill| {
                clients.says(kill.session, since, |answer| *answer == ClientAnswer::Revoked)
            };
            rig.clients.iter().all(|clients| rig.kills.iter().all(|kill| knows(clients, kill)))
        })
    }

    /// Judges all answers.
    pub(crate) fn judge(&self) -> FaultVerdict {
        let mut verdict = FaultVerdict { kills: self.kills.len(), ..FaultVerdict::default() };
        for clients in &self.clients {
            verdict.add(&clients.seen(), &self.kills, self.plan.bound);
        }
        verdict
    }

    /// The logs of the replicas, for debugging.
    pub(crate) fn logs(&self) -> String {
        let read = |replica: &ReplicaProcess| std::fs::read_to_string(&replica.log).unwrap_or_default();
        self.replicas.iter().map(read).collect::<Vec<_>>().join("\n---\n")
    }

    fn wait(&self, what: &str, patience: Duration, holds: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + patience;
        while !holds(self) {
            if Instant::now() > until {
                bail!("{what} within {} s; the replicas said:\n{}", patience.as_secs(), self.logs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// The names of the standbys at their primary, and which of them must have a commit.
pub(crate) const STANDBYS: [&str; 2] = ["b", "c"];
pub(crate) const SYNCHRONOUS: &str = "ANY 1 (b, c)";

fn durability(kind: StoreKind) -> Durability {
    if kind == StoreKind::Replicated { Durability::Synchronous } else { Durability::Single }
}

fn is_ours(name: &str) -> bool {
    name.starts_with("PORTCULLIS_") || name.starts_with("OTEL_")
}
