//! Connects the parts: the service's ports over the store and the follower, the store itself, the first operator, and the gauges.
//!
//! Look next at `app.rs`, which calls these functions in the order of a start.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use prost::Message as _;
use zeroize::Zeroizing;

use super::fleet::Following;
use super::{Error, policy_files};
use crate::api::r#gen as wire;
use crate::audit::{self, RoomWatch};
use crate::config::{self, Settings};
use crate::model::approval::{AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::disk::{DiskOf, Room};
use crate::model::replica::Condition;
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::{Clock, SystemClock};
use crate::pap::{self, Admin, DocumentNames, Sightings};
use crate::server::{Stats, StatsReader};
use crate::service::{ApprovalLedger, CatchUp, LedgerError, ProofLedger, Service, ShadowCount};
use crate::snapshot::{Snapshot, SnapshotCell};
use crate::store::postgres::{self, PostgresStore};
use crate::store::sqlite::{CACHE_FILE, SqliteStore};
use crate::store::{self, Registration, Store};
use crate::sync::status::Status;
use crate::sync::{self, Keeper};
use crate::telemetry::Telemetry;
use crate::token::operator::{self, Expected};
use crate::token::trust::Issuer;
use crate::token::{PrivateKey, VerifiedChain};

/// Longest wait for the revision that a caller names with `at_least`.
const CATCH_UP_TIMEOUT: Duration = Duration::from_millis(300);
/// The key file of the first operator, in the data folder.
const LOCAL_KEY_FILE: &str = "local.jwk";
/// Most bytes of a key file. A private JWK is far smaller.
const KEY_FILE_BYTES_MAX: u64 = 16 * 1024;
/// `O_NOFOLLOW`, as `open(2)` takes it.
const NO_FOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
/// The id of the first operator.
const LOCAL_OPERATOR: &str = "local";

/// Spends the proofs of destructive calls in the store.
pub(crate) struct StoreLedger(pub(crate) Arc<dyn Store>);

/// Maps a store error to the outcome of a use.
fn of_use(error: store::Error) -> LedgerError {
    match error {
        store::Error::Unknown(why) => LedgerError::Unknown(why),
        // INVARIANT: every other store error says that nothing was written.
        other => LedgerError::Busy(other.to_string()),
    }
}

#[async_trait]
impl ProofLedger for StoreLedger {
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, LedgerError> {
        self.0.spend(key, expires_at_unix_s).await.map_err(of_use)
    }
}

/// Keeps approvals in the store.
pub(crate) struct StoreApprovals(pub(crate) Arc<dyn Store>);

#[async_trait]
impl ApprovalLedger for StoreApprovals {
    async fn ask(&self, request: AskApproval) -> Result<AskOutcome, LedgerError> {
        self.0.ask_approval(request).await.map_err(of_use)
    }

    async fn use_once(&self, request: UseApprovals) -> Result<UseOutcome, LedgerError> {
        self.0.use_approvals(request).await.map_err(of_use)
    }

    async fn give_back(&self, request: UseApprovals) -> Result<bool, LedgerError> {
        self.0.give_back_approvals(request).await.map_err(of_use)
    }
}

/// Waits for `at_least` until the follower has applied both the revocations and the policy of that revision.
pub(crate) struct FollowerCatchUp {
    pub(crate) status: Status,
    pub(crate) cell: Arc<SnapshotCell>,
}

#[async_trait]
impl CatchUp for FollowerCatchUp {
    async fn reach(&self, revision: &Revision) -> bool {
        let reached = |cell: &SnapshotCell| cell.load().is_some_and(|view| view.snapshot.covers(revision));
        if reached(&self.cell) {
            return true;
        }
        self.status.wait_for(revision, CATCH_UP_TIMEOUT).await.is_ok() && reached(&self.cell)
    }
}

/// Finds names in the documents and the cached chains of this server, for [`Sightings`].
pub(super) struct ServerSightings {
    pub(super) follower: FollowerCatchUp,
    pub(super) service: Arc<Service>,
}

#[async_trait]
impl Sightings for ServerSightings {
    async fn documents(&self, at_least: Option<&Revision>) -> Result<Arc<dyn DocumentNames>, String> {
        if let Some(revision) = at_least
            && !self.follower.reach(revision).await
        {
            return Err(format!("this server has not applied revision `{revision}` yet, and its documents may be older"));
        }
        let view = self.follower.cell.load().ok_or("no snapshot was read yet")?;
        Ok(Arc::new(InForce(view.snapshot)))
    }

    fn chains(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool {
        self.service.visit_chains(chains_max, visit)
    }
}

/// The names in the documents of one snapshot.
struct InForce(Arc<Snapshot>);

impl DocumentNames for InForce {
    fn has(&self, kind: &str, id: &str) -> bool {
        self.0.policy().names(kind, id)
    }

    fn ids(&self, kind: &str, ids_max: usize) -> Vec<String> {
        self.0.policy().names_of(kind, ids_max)
    }

    fn key_holder(&self, thumbprint: &str) -> Option<(&'static str, String)> {
        let trust = self.0.trust();
        let holds = |issuer: &&Issuer| issuer.keys.iter().any(|named| named.key.thumbprint().as_str() == thumbprint);
        let agent = trust.agent_of(thumbprint).map(|agent| ("agent", agent.to_string()));
        agent.or_else(|| trust.issuers().find(holds).map(|issuer| ("issuer", issuer.id.to_string())))
    }
}

/// Creates a folder that only its owner can read.
pub(super) fn make_private_dir(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::Configuration(format!("--data: the folder `{}` cannot be made: {error}", path.display())))
}

/// The registration of this process with its store. Its incarnation is random, so no other process ever has it.
pub(super) fn registration(settings: &Settings, decisions: SocketAddr, clock: &dyn Clock) -> Registration {
    Registration {
        incarnation: sync::incarnation(&settings.node, uuid::Uuid::new_v4().to_string()),
        address: format!("{} {decisions}", settings.node),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started_unix_ms: clock.now().unix_ms(),
    }
}

/// How often the store is polled. A file is polled often, because a poll is cheap. A database is polled less often, because each
/// poll writes there, and it limits the time of a poll itself.
pub(super) fn follow_settings(store: &config::Store) -> sync::Settings {
    match store {
        config::Store::Sqlite(_) => sync::Settings::default(),
        config::Store::Postgres(_) => {
            sync::Settings { poll_interval_ms: 100, poll_timeout_ms: 65_000, ..sync::Settings::default() }
        }
    }
}

/// Opens a store that exists.
pub(super) async fn open_store(store: &config::Store, clock: Arc<dyn Clock>) -> Result<Arc<dyn Store>, Error> {
    match store {
        config::Store::Sqlite(path) => match SqliteStore::open_existing(path, clock) {
            Err(store::Error::Missing(_)) if is_nowhere(path) => Err(nowhere(store, path)),
            opened => Ok(Arc::new(opened?)),
        },
        config::Store::Postgres(settings) => match PostgresStore::open(settings.as_ref().clone()).await {
            Ok(store) => Ok(Arc::new(store)),
            Err(store::Error::Misconfigured(why)) => Err(Error::Configuration(why)),
            Err(error) => Err(error.into()),
        },
    }
}

/// Creates a SQLite store where none exists. It is refused if this data folder shows that a replica followed a store there.
pub(super) fn make_store(store: &config::Store, data: &Path, places: &sync::Places, clock: Arc<dyn Clock>) -> Result<(), Error> {
    let config::Store::Sqlite(path) = store else { return Ok(()) };
    if !is_nowhere(path) {
        return Ok(());
    }
    let cache = data.join(CACHE_FILE);
    for left in places.paths().chain([cache.as_path()]) {
        if !is_nowhere(left) {
            return Err(Error::Configuration(format!(
                "there is no store at `{}`, and `{}` says that this replica followed one: an empty store would let in again what was \
                 revoked; put the store or a backup of it back (OPERATIONS, back up and restore), or begin anew with another --data",
                path.display(),
                left.display()
            )));
        }
    }
    drop(SqliteStore::open(path, clock)?);
    tracing::info!(store = %store, "made a new store");
    Ok(())
}

/// Fails if a named SQLite store does not exist and may not be created. It runs before anything is written.
pub(super) fn check_named(store: &config::Store, may_create: bool) -> Result<(), Error> {
    match store {
        config::Store::Sqlite(path) if !may_create && is_nowhere(path) => Err(nowhere(store, path)),
        _ => Ok(()),
    }
}

fn nowhere(store: &config::Store, path: &Path) -> Error {
    let shown = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let shown = shown.display();
    Error::Store(store::Error::Missing(format!(
        "there is no store at `{shown}`: check the path; to make a new store there: `portcullis serve --store {store} --create`"
    )))
}

/// Whether no file has that name.
fn is_nowhere(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Opens a store that cannot be reached yet. The connection is made later, and the store is then compared with that history.
pub(super) fn open_later(settings: &postgres::Settings, history: HistoryId) -> Result<Arc<dyn Store>, Error> {
    Ok(Arc::new(PostgresStore::open_later(settings.clone(), history)?))
}

/// Creates the operator `local` of an empty store. Its key lies in the data folder, and only its owner can read it.
pub(super) async fn first_operator(store: &dyn Store, data: &Path) -> Result<(), Error> {
    if store.revision().await?.number > 0 {
        return Ok(());
    }
    let path = data.join(LOCAL_KEY_FILE);
    let key = if path.exists() { read_key(&path)? } else { make_key(&path)? };
    match pap::make_first_operator(store, LOCAL_OPERATOR, key.public_key()).await {
        Ok(Some(_)) => tracing::info!(key = %path.display(), "made the first operator `{LOCAL_OPERATOR}`"),
        Ok(None) => {}
        Err(error) => return Err(Error::Configuration(error.to_string())),
    }
    Ok(())
}

/// Applies a policy folder as an act that the local operator signs.
pub(super) async fn apply_folder(admin: &Admin, folder: &Path, data: &Path) -> Result<Revision, Error> {
    const METHOD: &str = "/portcullis.v1.PolicyService/Apply";
    let files = policy_files(folder)?;
    let key = read_key(&data.join(LOCAL_KEY_FILE))?;
    let wire_files = files.iter().map(|file| wire::PolicyFile { path: file.path.clone(), content: file.content.clone().into() });
    let message = wire::ApplyPolicyRequest { files: wire_files.collect(), dry_run: false }.encode_to_vec();
    let refused = |error: pap::Error| match error {
        pap::Error::Policy(diagnostics) => {
            let lines: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
            Error::Configuration(format!("--policies: nothing of `{}` was applied:\n{}", folder.display(), lines.join("\n")))
        }
        pap::Error::Tests { failures, .. } => Error::Configuration(format!(
            "--policies: nothing of `{}` was applied, its tests fail:\n{}",
            folder.display(),
            failures.join("\n")
        )),
        other => Error::Configuration(format!("--policies: `{}` was not applied: {other}", folder.display())),
    };
    let history = admin.revision().await.map_err(refused)?.history;
    let expected = Expected { audience: history.as_str(), method: METHOD, message: &message };
    let authorization = format!("Operator {}", operator::sign(&key, &expected, SystemClock.now()));
    let by = admin.authorize(METHOD, &message, &[&authorization], "start").await.map_err(refused)?;
    let outcome = admin.apply(&by, files, false).await.map_err(refused)?;
    for warning in &outcome.warnings {
        tracing::warn!("{warning}");
    }
    tracing::info!(revision = %outcome.revision, changes = outcome.changes.len(), "the policy folder is in force");
    Ok(outcome.revision)
}

/// Registers the gauges that are computed when metrics are read.
pub(super) fn register_gauges(telemetry: &Telemetry, following: &Following, clock: &Arc<dyn Clock>, service: &Arc<Service>) {
    use crate::telemetry::names;
    let Following { cell, status, .. } = following;
    let metrics = telemetry.metrics();
    let spans = telemetry.spans();
    metrics.counter(names::SPANS_SUPPRESSED, "Spans left out by the caps.", move || spans.suppressed());
    let of_view = |read: fn(&crate::snapshot::View, crate::model::time::Now) -> f64| {
        let (cell, clock) = (cell.clone(), clock.clone());
        move || cell.load().map_or(0.0, |view| read(&view, clock.now()))
    };
    let age_s = of_view(|view, now| view.age_ms(now).map_or(f64::INFINITY, |age_ms| age_ms as f64 / 1000.0));
    metrics.gauge(names::SNAPSHOT_AGE, "Seconds since the proof that the snapshot is current.", age_s);
    let revision = of_view(|view, _| view.snapshot.revision().number as f64);
    metrics.gauge(names::REVISION, "Number of the revision that decides.", revision);
    let revocations = of_view(|view, _| view.snapshot.revocations().len() as f64);
    metrics.gauge(names::REVOCATIONS, "Revocations in memory.", revocations);
    let false_positives = of_view(|view, _| view.snapshot.revocations().false_positive_rate());
    metrics.gauge(
        names::FALSE_POSITIVE_RATE,
        "Estimated part of lookups that the filter lets through for nothing.",
        false_positives,
    );
    let (of, read, dates) = (status.clone(), cell.clone(), clock.clone());
    let condition = move || sync::condition(&of, &read, dates.now()) as usize;
    metrics.state(names::REPLICA_STATE, "The state that this replica is in.", Condition::NAMES, condition);
    let (of, dates) = (status.clone(), clock.clone());
    let lag_s = move || of.behind_since_unix_ms().map_or(0.0, |since| (dates.now().unix_ms() - since).max(0) as f64 / 1000.0);
    metrics.gauge(names::SYNC_LAG, "Age of the oldest commit that is known and not in effect, in seconds.", lag_s);
    let chains = service.clone();
    metrics.gauge(names::CHAINS_KEPT, "Verified chains kept.", move || chains.chains_kept() as f64);
    let chains = service.clone();
    metrics.gauge(names::CHAINS_BYTES, "Bytes that the kept chains take.", move || chains.chains_bytes() as f64);
    let ledger = service.clone();
    let uses = move || ledger.ledger_uses() as f64;
    metrics.gauge(names::LEDGER_USES, "Calls that wait for the store to use a proof or an approval up.", uses);
    let labels = &[names::AGENT_ID, names::TOOL_NAME, names::EFFECT, names::WOULD_BE];
    for (name, help, of) in [
        (names::SHADOW_DECISIONS, "Decisions also evaluated with documents in shadow.", ShadowCount::Decisions),
        (names::SHADOW_FLIPS, "Decisions that documents in shadow would have made otherwise.", ShadowCount::Flips),
    ] {
        let shadows = service.clone();
        let read = move || shadows.shadow_series(of).into_iter().map(|(labels, count)| (labels.to_vec(), count)).collect();
        metrics.labelled_counter(name, help, labels, read);
    }
}

/// Registers the gauges of the disks that this process writes to.
pub(super) fn register_disk_gauges(
    telemetry: &Telemetry,
    keeper: &Arc<Keeper>,
    log: &Arc<audit::Log>,
    store: Option<Arc<RoomWatch>>,
) {
    use crate::telemetry::names;
    let metrics = telemetry.metrics();
    let of_log = |read: fn(&audit::Status) -> u64| {
        let log = log.clone();
        move || read(&log.status())
    };
    metrics.counter(names::AUDIT_RECORDS, "Audit records taken.", of_log(|status| status.records));
    metrics.counter(names::AUDIT_FAILURES, "Writes of audit records that failed.", of_log(|status| status.failures));
    metrics.counter(
        names::AUDIT_MERGED,
        "Denials of callers of whom nothing was verified that are counted in merged records.",
        of_log(|status| status.merged),
    );
    let waiting = of_log(|status| status.merged_waiting);
    metrics.gauge(names::AUDIT_MERGED_WAITING, "Those of them that are not written yet.", move || waiting() as f64);
    let pending = of_log(|status| status.pending_bytes as u64);
    metrics.gauge(names::AUDIT_PENDING, "Bytes of audit records that wait for a socket write.", move || pending() as f64);
    let free = of_log(|status| status.free_bytes);
    metrics.gauge(names::AUDIT_DISK_FREE, "Bytes free on the disk of the audit log.", move || free() as f64);
    let room = log.clone();
    metrics.state(names::AUDIT_ROOM, "What the disk of the audit log has room for.", Room::NAMES, move || {
        room.status().room as usize
    });
    if let Some(store) = store {
        let (free, room) = (store.clone(), store);
        metrics.gauge(names::STORE_DISK_FREE, "Bytes free on the disk of the store.", move || free.free_bytes() as f64);
        metrics.state(names::STORE_ROOM, "What the disk of the store has room for.", Room::NAMES, move || room.room() as usize);
    }
    // The gauges outlive the server. They must not keep the cache open, because its file is complete only once it is closed.
    let (failures, paused) = (Arc::downgrade(keeper), Arc::downgrade(keeper));
    let failures = move || failures.upgrade().map_or(0, |keeper| keeper.failures());
    metrics.counter(names::CACHE_FAILURES, "Attempts to write the cache that failed.", failures);
    let paused = move || paused.upgrade().map_or(0.0, |keeper| f64::from(u8::from(keeper.is_paused())));
    metrics.gauge(names::CACHE_PAUSED, "1 while the cache is not written.", paused);
}

/// Watches the disk of a store that is a file.
pub(super) fn watch_store(store: &config::Store, log: &audit::Log) -> Option<Arc<RoomWatch>> {
    let config::Store::Sqlite(path) = store else { return None };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let room = Arc::new(RoomWatch::new(folder, Box::new(DiskOf(folder.to_owned()))));
    log.watch(room.clone());
    Some(room)
}

/// Registers the counts of the listeners.
pub(super) fn register_listeners(telemetry: &Telemetry, stats: &StatsReader) {
    use crate::telemetry::names;
    let metrics = telemetry.metrics();
    let by_cause = |of: fn(Stats) -> Vec<(&'static str, u64)>| {
        let stats = stats.clone();
        move || {
            let listeners = stats.read().into_iter();
            let counts = listeners.flat_map(|stats| of(stats.clone()).into_iter().map(move |count| (stats.role.name(), count)));
            counts.map(|(listener, (cause, count))| (vec![listener.into(), cause.into()], count)).collect()
        }
    };
    let labels = &[names::LISTENER, names::CAUSE];
    metrics.labelled_counter(names::CONNECTIONS_CUT, "Connections cut, by cause.", labels, by_cause(|stats| stats.cuts_total));
    metrics.labelled_counter(
        names::CALLS_REFUSED,
        "Calls refused before they were decoded, by cause.",
        labels,
        by_cause(|stats| stats.refusals_total),
    );
    let refused = stats.clone();
    let refused = move || refused.read().into_iter().map(|stats| (vec![stats.role.name().into()], stats.refused_total)).collect();
    let help = "Connections closed at once, because too many were open and none could be spared.";
    metrics.labelled_counter(names::CONNECTIONS_REFUSED, help, &[names::LISTENER], refused);
    let open = stats.clone();
    let open = move || open.read().into_iter().flat_map(|stats| stats.open).sum::<usize>() as f64;
    metrics.gauge(names::CONNECTIONS, "Open connections of all listeners.", open);
    let waiting = stats.clone();
    let waiting = move || waiting.read().into_iter().map(|stats| stats.waiting_bytes).sum::<usize>() as f64;
    metrics.gauge(names::WAITING_BYTES, "Bytes that calls which wait hold, beyond what is each connection's own.", waiting);
}

fn read_key(path: &Path) -> Result<PrivateKey, Error> {
    let failed = |error: &dyn std::fmt::Display| {
        let hint = "this store was made with another data folder: name that one with --data, or use an operator's own key";
        Error::Configuration(format!("the local operator's key `{}` cannot be used: {error}; {hint}", path.display()))
    };
    let read = || {
        // Another user's file, or one that others can read, holds no secret. A symbolic link could lead to such a file.
        let file = OpenOptions::new().read(true).custom_flags(NO_FOLLOW).open(path)?;
        let metadata = file.metadata()?;
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            return Err(std::io::Error::other("it must belong to this user and be readable by nobody else (chmod 600)"));
        }
        let mut content = Zeroizing::new(Vec::new());
        file.take(KEY_FILE_BYTES_MAX).read_to_end(&mut content)?;
        Ok(content)
    };
    let content = read().map_err(|error: std::io::Error| failed(&error))?;
    PrivateKey::from_jwk(&content).map_err(|error| failed(&error))
}

fn make_key(path: &Path) -> Result<PrivateKey, Error> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Configuration(format!("the local operator's key `{}` cannot be made: {error}", path.display()))
    };
    let key = PrivateKey::generate().map_err(|error| failed(&error))?;
    let write = || {
        // The key is renamed into place, so that an interrupted start leaves either no key or a whole one.
        let unfinished = path.with_extension(format!("{}.new", uuid::Uuid::new_v4()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        file.write_all(key.to_jwk().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&unfinished, path)
    };
    write().map_err(|error: std::io::Error| failed(&error))?;
    Ok(key)
}
