//! The follower of this replica with everything around it, the barrier through the serving runtimes, and the replica's health.
//!
//! Look next at [`FollowerRuntime::start`], then at `sync/acknowledger.rs`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::{Error, FIRST_SNAPSHOT_TIMEOUT, wiring};
use crate::audit::AuditLog;
use crate::config;
use crate::model::disk::DiskSpaceLevel;
use crate::model::mutant::{Mutant, is_active};
use crate::model::replica::{FleetStatus, ReplicaCondition};
use crate::model::revision::Revision;
use crate::model::time::{Clock, ClockReading};
use crate::revocation::RevocationIndex;
use crate::service::FleetDirectory;
use crate::snapshot::{FreshnessProof, SnapshotCell};
use crate::store::{self, LineageRelation, ReplicaRegistration, ReplicaState, Store};
use crate::sync::follower::HistoryPosition;
use crate::sync::status::FollowerHandle;
use crate::sync::{
    self, CacheFirstPositionStore, CacheWriter, CellPublisher, FleetMember, FollowerLoop, PositionFiles, RevisionAcknowledger,
    RuntimeBarrier,
};
use crate::telemetry::Telemetry;

/// Pause before a start asks a busy store again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Interval at which the state of this replica is checked for health watchers, which receive changes only.
const CONDITION_INTERVAL: Duration = Duration::from_millis(50);
/// Largest age of a report by a quarantined replica. It reports twice a second, so an older report may come from one that has
/// ended.
const QUARANTINE_REPORT_AGE_MS_MAX: u64 = 5_000;
/// Longest wait for such a report to be repeated or to become too old. A store's clock that was set back makes no report too old.
const QUARANTINE_REPORT_WAIT_MAX: Duration = Duration::from_millis(QUARANTINE_REPORT_AGE_MS_MAX + 1_000);
/// Largest age of a cached replica list for unsigned callers.
const FLEET_CACHE_AGE_MS_MAX: u64 = 250;

/// The follower of a store, and the parts that it feeds.
pub(super) struct FollowerRuntime {
    pub(super) cell: Arc<SnapshotCell>,
    pub(super) status: FollowerHandle,
    pub(super) member: Arc<FleetMember>,
    pub(super) serving_runtimes: Arc<ServingRuntimes>,
    pub(super) cache_writer: Arc<CacheWriter>,
    pub(super) store: Arc<dyn Store>,
    /// Whether this replica may permit calls.
    pub(super) is_serving: watch::Receiver<bool>,
    /// Stops all of these tasks.
    pub(super) stop: watch::Sender<bool>,
}

/// The inputs of a follower: the store, and this replica's registration.
pub(super) struct FollowerSetup {
    pub(super) store: Arc<dyn Store>,
    pub(super) registration: ReplicaRegistration,
    pub(super) settings: sync::Settings,
    pub(super) position_files: PositionFiles,
    pub(super) cache_writer: Arc<CacheWriter>,
    pub(super) start: StartPoint,
}

/// The point from which a replica starts to follow.
pub(super) enum StartPoint {
    /// Nothing is recorded of an earlier run.
    New,
    /// The replica continues from its recorded position.
    Resumed(HistoryPosition),
    /// The store was adopted from the history of that position: this replica first merges the revocations that it knows.
    Adopted(HistoryPosition),
    /// The store cannot be reached. The replica denies by its cached state, and continues from its position once the store answers.
    FromCache {
        /// The cached state.
        state: Box<store::StoreState>,
        /// The recorded position.
        position: HistoryPosition,
    },
}

impl FollowerRuntime {
    /// Starts to follow, and waits for the first full snapshot unless it starts from the cache. Runs within the control runtime.
    pub(super) async fn start(
        followed: FollowerSetup,
        clock: Arc<dyn Clock>,
        log: Arc<AuditLog>,
        telemetry: &Telemetry,
    ) -> Result<Self, Error> {
        let FollowerSetup { store, registration, settings, position_files, cache_writer, start } = followed;
        let (stop, stopped) = watch::channel(false);
        let cell = Arc::new(SnapshotCell::default());
        let publisher = CellPublisher::new(cell.clone(), Arc::new(RevocationIndex::new()));
        let member = FleetMember::with_cache(store.clone(), registration, Some(cache_writer.clone()));
        let known = if let StartPoint::Resumed(known) = &start { Some(known.clone()) } else { None };
        let (follow, status) = FollowerLoop::new(member.clone(), publisher, clock.clone(), settings, known);
        let (follow, is_cached) = match start {
            StartPoint::New | StartPoint::Resumed(_) => (follow, false),
            StartPoint::Adopted(last_position) => {
                (follow.start_in_quarantine(last_position, "the store was adopted: merging what is known".to_owned()), false)
            }
            StartPoint::FromCache { state, position: known } => {
                (follow.start_from_cache(*state, Some(known)).map_err(Error::NoSnapshot)?, true)
            }
        };
        tokio::spawn(follow.with_cache_writer(cache_writer.clone()).run(stopped.clone()));
        tokio::spawn(cache_writer.clone().run(store.clone(), stopped.clone()));
        let runtimes = Arc::new(ServingRuntimes::default());
        let (barrier, metrics) = (runtimes.clone(), telemetry.metrics());
        let acknowledge = RevisionAcknowledger::new(status.clone(), member.clone(), barrier, clock.clone(), metrics);
        tokio::spawn(acknowledge.run(stopped.clone()));
        let first = async { is_cached || status.wait_until_following().await };
        if !tokio::time::timeout(FIRST_SNAPSHOT_TIMEOUT, first).await.unwrap_or(false) {
            return Err(Error::NoSnapshot(status.problem().unwrap_or_else(|| "the store does not answer".to_owned())));
        }
        // The position is recorded only from here on, because a state that was not published was not followed.
        let position_files = CacheFirstPositionStore::new(cache_writer.clone(), position_files);
        tokio::spawn(sync::persist_position(status.clone(), position_files, stopped.clone()));
        tokio::spawn(sync::log_applied_changes(status.clone(), store.clone(), stopped.clone()));
        let condition = sync::replica_condition(&status, &cell, clock.now());
        let (sender, is_serving) = watch::channel(condition.is_serving());
        tokio::spawn(watch_condition(status.clone(), cell.clone(), clock, log, condition, sender, stopped));
        Ok(Self { cell, status, member, serving_runtimes: runtimes, cache_writer, store, is_serving, stop })
    }
}

impl StartPoint {
    /// Returns the start point that demands more of the store.
    fn stricter(self, other: Self) -> Self {
        match (&self, &other) {
            (_, Self::New) | (Self::Adopted(_), _) => self,
            (Self::Resumed(ours), Self::Resumed(theirs)) if ours.revision.number >= theirs.revision.number => self,
            _ => other,
        }
    }
}

/// Opens the store and finds the start point. If `may_create`, it first creates a store where none exists.
pub(super) async fn open_store_and_start_point(
    chosen: &config::StoreLocation,
    may_create: bool,
    data: &Path,
    position_files: &PositionFiles,
    cache_writer: &Arc<CacheWriter>,
    clock: Arc<dyn Clock>,
) -> Result<(Arc<dyn Store>, StartPoint), Error> {
    if may_create {
        wiring::create_store_if_missing(chosen, data, position_files, clock.clone())?;
    }
    match wiring::open_store(chosen, clock).await {
        Ok(store) => {
            let start = retry_while_busy(async || find_start_point(&*store, position_files, cache_writer).await).await?;
            retry_while_busy(async || check_no_replica_is_ahead(&*store).await).await?;
            retry_while_busy(async || wiring::ensure_first_operator(&*store, data).await).await?;
            Ok((store, start))
        }
        Err(Error::Store(why @ store::Error::Unavailable(_))) => {
            start_from_cache(chosen, position_files, cache_writer, why).await
        }
        Err(error) => Err(error),
    }
}

/// Repeats a question to a store that is too busy to answer, for as long as the first snapshot may take. A start asks with the
/// deadline of a poll, and the follower repeats its polls in the same way.
async fn retry_while_busy<T>(ask: impl AsyncFn() -> Result<T, Error>) -> Result<T, Error> {
    let until = tokio::time::Instant::now() + FIRST_SNAPSHOT_TIMEOUT;
    loop {
        match ask().await {
            Err(Error::Store(store::Error::Unavailable(problem))) if tokio::time::Instant::now() < until => {
                tracing::warn!(problem, "the store does not answer in time: asking again");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

/// Finds the start point on a reachable store, which must contain every recorded position. Nothing is written before this check.
async fn find_start_point(
    store: &dyn Store,
    position_files: &PositionFiles,
    cache_writer: &Arc<CacheWriter>,
) -> Result<StartPoint, Error> {
    let mut start = StartPoint::New;
    for (known, path) in position_files.read_all().map_err(Error::Configuration)? {
        start = start.stricter(start_point_after(store, known, &path, cache_writer).await?);
    }
    Ok(start)
}

/// Fails if a running replica reports that it followed revisions that this store lacks. Then the store was restored from a backup,
/// and perhaps this data folder too, so its position proves nothing.
///
/// A report that does not become newer may come from a process that has ended, such as the predecessor of this process that was
/// killed while it merged. So a start waits until the report is repeated or too old.
async fn check_no_replica_is_ahead(store: &dyn Store) -> Result<(), Error> {
    let mut first_reports = None;
    let until = tokio::time::Instant::now() + QUARANTINE_REPORT_WAIT_MAX;
    loop {
        let replicas = store.replicas().await?;
        match judge_quarantine_reports(&replicas, &mut first_reports) {
            QuarantineVerdict::Clear => return Ok(()),
            QuarantineVerdict::Unclear(ahead) if tokio::time::Instant::now() < until => {
                tracing::info!(replica = %ahead.incarnation, "waiting to see whether a replica that reported a quarantine still runs");
            }
            QuarantineVerdict::Unclear(ahead) | QuarantineVerdict::Running(ahead) => {
                return Err(replica_ahead_error(ahead, &replicas.revision));
            }
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// What the reports of quarantined replicas say.
#[derive(Debug, PartialEq, Eq)]
enum QuarantineVerdict<'a> {
    /// No replica that may run is quarantined.
    Clear,
    /// This replica is quarantined and runs.
    Running(&'a ReplicaRegistration),
    /// This replica reported a quarantine a short time ago, and may have ended since.
    Unclear(&'a ReplicaRegistration),
}

/// When the store last heard each quarantined replica, by incarnation.
type QuarantineReports = BTreeMap<String, i64>;

/// Compares the reports of quarantined replicas with those of the first call, which sets `first_reports`.
fn judge_quarantine_reports<'a>(
    replicas: &'a store::ReplicaList,
    first_reports: &mut Option<QuarantineReports>,
) -> QuarantineVerdict<'a> {
    let is_young = |row: &&store::ReplicaRow| {
        row.state == ReplicaState::Quarantined && row.age_ms(replicas.unix_ms) < QUARANTINE_REPORT_AGE_MS_MAX
    };
    let young: Vec<&'a store::ReplicaRow> = replicas.rows.iter().filter(is_young).collect();
    let Some(one) = young.first() else { return QuarantineVerdict::Clear };
    let Some(first) = first_reports else {
        let reports = young.iter().map(|row| (row.registration.incarnation.clone(), row.seen_unix_ms));
        *first_reports = Some(reports.collect());
        return QuarantineVerdict::Unclear(&one.registration);
    };
    // A report that is not among the first ones was sent since then.
    match young.iter().find(|row| first.get(&row.registration.incarnation) != Some(&row.seen_unix_ms)) {
        Some(running) => QuarantineVerdict::Running(&running.registration),
        None => QuarantineVerdict::Unclear(&one.registration),
    }
}

/// The error of a start while a running replica reports that it followed what the store lacks.
fn replica_ahead_error(ahead: &ReplicaRegistration, store_revision: &Revision) -> Error {
    let ReplicaRegistration { incarnation, address, .. } = ahead;
    Error::Configuration(format!(
        "the replica `{incarnation}` ({address}) is quarantined: it followed what the store, at revision `{store_revision}`, does not \
         hold, so what was revoked meanwhile would be let in again; have the store adopted with `portcullis store adopt` (OPERATIONS, \
         back up and restore), or, if only that replica is wrong, stop it and start again"
    ))
}

async fn start_point_after(
    store: &dyn Store,
    known: HistoryPosition,
    path: &Path,
    cache_writer: &Arc<CacheWriter>,
) -> Result<StartPoint, Error> {
    match check_position(store, &known, path).await? {
        None => return Ok(StartPoint::Resumed(known)),
        Some(LineageRelation::MayLack) => warn_of_unmerged_revocations(cache_writer, &known).await?,
        Some(_) => {}
    }
    Ok(StartPoint::Adopted(known))
}

/// Fails unless the store continues from the recorded position, or was adopted. Returns the relation to an adopted store.
pub(super) async fn check_position(
    store: &dyn Store,
    known: &HistoryPosition,
    path: &Path,
) -> Result<Option<LineageRelation>, Error> {
    let (ours, lineage) = (&known.revision, store.lineage(known.revision.number).await?);
    if ours.history == lineage.revision.history {
        check_continues_position(store, known, path).await?;
        return Ok(None);
    }
    match lineage.relation_to(ours, &known.hash) {
        LineageRelation::Unrelated => {
            Err(refuse_to_follow(&format!("the store is at revision `{}`", lineage.revision), ours, path))
        }
        relation => Ok(Some(relation)),
    }
}

fn refuse_to_follow(why: &str, ours: &Revision, position_path: &Path) -> Error {
    Error::Configuration(format!(
        "{why}, and this replica followed its store up to `{ours}`: what was revoked meanwhile would be let in again; name or \
         restore the right store, or have this one adopted with `portcullis store adopt` (OPERATIONS, back up and restore); `{}` \
         keeps the place",
        position_path.display()
    ))
}

/// Fails unless the store continues from the recorded position.
pub(crate) async fn check_continues_position(store: &dyn Store, known: &HistoryPosition, path: &Path) -> Result<(), Error> {
    if is_active(Mutant::ForgetKnownPosition) {
        return Ok(());
    }
    let (ours, theirs) = (&known.revision, store.revision().await?);
    let refused = |why: String| refuse_to_follow(&why, ours, path);
    if ours.history != theirs.history || theirs.number < ours.number {
        return Err(refused(format!("the store is at revision `{theirs}`")));
    }
    match store.changes(ours.number).await {
        Ok(changes) => {
            let hash = changes.commits.first().map_or(changes.head_hash, |next| next.previous_hash);
            if hash != known.hash {
                return Err(refused(format!("the store holds another revision `{ours}`")));
            }
        }
        Err(error @ (store::Error::BelowFloor { .. } | store::Error::Corrupt(_))) => {
            tracing::warn!(%error, place = %ours, "the change log cannot say whether it goes on from the place of this replica: it is \
                believed");
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Warns of revocations that this replica cannot merge into an adopted store.
async fn warn_of_unmerged_revocations(cache_writer: &Arc<CacheWriter>, known: &HistoryPosition) -> Result<(), Error> {
    let (last_position, kept) = (&known.revision, cache_writer.read_known_revocations(&known.revision).await?);
    match kept {
        None => {
            tracing::warn!(stood = %last_position, "the store was adopted, and this replica kept nothing to merge: what stops what \
            was revoked since the backup are the operator's act and what other replicas merge")
        }
        Some(kept) if kept.number < last_position.number => {
            tracing::warn!(stood = %last_position, kept = kept.number, "the store was adopted, and the cache of \
            this replica stayed behind: what was revoked in between is not merged by it")
        }
        Some(_) => {}
    }
    Ok(())
}

/// Finds a start point without a store, from the cached state of the store that was followed. If the cache does not fit, the error
/// `why` that kept the store from being reached is returned.
async fn start_from_cache(
    chosen: &config::StoreLocation,
    position_files: &PositionFiles,
    cache_writer: &Arc<CacheWriter>,
    why: store::Error,
) -> Result<(Arc<dyn Store>, StartPoint), Error> {
    let config::StoreLocation::Postgres(settings) = chosen else { return Err(why.into()) };
    let kept = position_files.read_all().map_err(Error::Configuration)?;
    let Some((known, _)) = kept.iter().max_by_key(|(known, _)| known.revision.number).cloned() else { return Err(why.into()) };
    let is_of_it = |state: &store::StoreState| kept.iter().all(|(known, _)| state.revision.history == known.revision.history);
    let Some(state) = cache_writer.read_state().await?.filter(is_of_it) else { return Err(why.into()) };
    tracing::warn!(
        error = %why, cached = %state.revision, place = %known.revision,
        "the store cannot be reached: starting from the cache, which only denies, until it is"
    );
    let store = wiring::open_store_lazily(settings, known.revision.history.clone())?;
    Ok((store, StartPoint::FromCache { state: Box::new(state), position: known }))
}

/// Logs the state of this replica whenever it changes, and publishes whether the replica and its audit log permit calls.
async fn watch_condition(
    status: FollowerHandle,
    cell: Arc<SnapshotCell>,
    clock: Arc<dyn Clock>,
    log: Arc<AuditLog>,
    mut before: ReplicaCondition,
    serving_sender: watch::Sender<bool>,
    mut stopped: watch::Receiver<bool>,
) {
    let watching = async {
        loop {
            tokio::time::sleep(CONDITION_INTERVAL).await;
            let now = sync::replica_condition(&status, &cell, clock.now());
            if now != before {
                let problem = status.problem().unwrap_or_default();
                tracing::info!(from = before.as_str(), to = now.as_str(), problem, "the state of this replica changed");
                before = now;
            }
            let is_serving = now.is_serving() && log.denial_cause().is_none();
            serving_sender.send_if_modified(|published| std::mem::replace(published, is_serving) != is_serving);
        }
    };
    tokio::select! {
        _ = stopped.wait_for(|stop| *stop) => {}
        () = watching => {}
    }
}

/// The state of this replica, or the reason that it is not ready.
pub(super) fn readiness(status: &FollowerHandle, cell: &SnapshotCell, now: ClockReading) -> Result<&'static str, String> {
    let condition = sync::replica_condition(status, cell, now);
    if condition.is_serving() {
        return Ok(condition.as_str());
    }
    let cached = cell.load().filter(|view| view.proof == FreshnessProof::Missing).map(|view| view.snapshot.revision().clone());
    let why = match (condition, cached) {
        (ReplicaCondition::Closed, Some(revision)) => {
            format!("it runs from its cache of revision {revision} and waits for the store")
        }
        (ReplicaCondition::Bootstrapping, _) => "no snapshot was read yet".to_owned(),
        (ReplicaCondition::Closed, _) => "no proof that the snapshot is current".to_owned(),
        _ => "the store is not the one that was followed".to_owned(),
    };
    let problem = status.problem().map(|problem| format!(": {problem}")).unwrap_or_default();
    Err(format!("{}: {why}{problem}", condition.as_str()))
}

/// Combines the state of a serving replica with the state of its audit log and of the disk beneath it.
pub(super) fn readiness_with_audit(state: &'static str, log: &AuditLog) -> Result<&'static str, String> {
    if let Some(cause) = log.denial_cause() {
        return Err(cause.to_owned());
    }
    Ok(match log.space_level() {
        DiskSpaceLevel::Critical if state == ReplicaCondition::Fresh.as_str() => {
            "fresh; the disk of the audit log is nearly full: make room"
        }
        DiskSpaceLevel::Critical => "stale; the disk of the audit log is nearly full: make room",
        _ => state,
    })
}

/// The runtimes that answer decisions. Each registers on its own thread before it serves.
#[derive(Default)]
pub(crate) struct ServingRuntimes(Mutex<Vec<Handle>>);

impl ServingRuntimes {
    /// Registers the current runtime as one that answers decisions.
    pub(crate) fn register_current(&self) {
        if let Ok(handle) = Handle::try_current() {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
        }
    }
}

#[async_trait]
impl RuntimeBarrier for ServingRuntimes {
    async fn pass(&self) {
        // INVARIANT: each runtime has one thread, so its task runs between two polls of its handlers.
        let handles = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let tasks: Vec<_> = handles.iter().map(|runtime| runtime.spawn(async {})).collect();
        for task in tasks {
            // A task is dropped only together with its runtime and all of its handlers.
            let _ = task.await;
        }
    }
}

/// Lists the replicas. It reads the store at most a few times a second, however many callers ask.
pub(super) struct CachedFleetDirectory {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    cached: tokio::sync::Mutex<Option<(FleetStatus, ClockReading)>>,
}

impl CachedFleetDirectory {
    pub(super) fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Self {
        Self { store, clock, cached: tokio::sync::Mutex::default() }
    }
}

#[async_trait]
impl FleetDirectory for CachedFleetDirectory {
    async fn read_fleet(&self) -> Result<FleetStatus, String> {
        let mut kept = self.cached.lock().await;
        let now = self.clock.now();
        if let Some((fleet, read_at)) = &*kept
            && now.elapsed_ms_since(*read_at) < FLEET_CACHE_AGE_MS_MAX
        {
            return Ok(fleet.clone());
        }
        let fleet = self.store.replicas().await.map_err(|error| error.to_string())?.to_fleet();
        *kept = Some((fleet.clone(), now));
        Ok(fleet)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;
    use crate::model::revision::HistoryId;

    /// A busy store is asked again until it answers, for as long as a first snapshot may take. Any other error ends the start at once.
    #[tokio::test(start_paused = true)]
    async fn a_busy_store_is_asked_again() {
        fn busy<T>() -> Result<T, Error> {
            Err(Error::Store(store::Error::Unavailable("busy".to_owned())))
        }
        let asked = AtomicUsize::new(0);
        let ask = async || if asked.fetch_add(1, Ordering::SeqCst) < 2 { busy() } else { Ok(7) };
        assert_eq!((retry_while_busy(ask).await.unwrap(), asked.load(Ordering::SeqCst)), (7, 3));

        let begun = tokio::time::Instant::now();
        let error = retry_while_busy(async || -> Result<(), Error> { busy() }).await.unwrap_err();
        let took = begun.elapsed();
        assert!(matches!(&error, Error::Store(store::Error::Unavailable(problem)) if problem == "busy"), "{error:?}");
        assert!((FIRST_SNAPSHOT_TIMEOUT..=FIRST_SNAPSHOT_TIMEOUT + RETRY_PAUSE).contains(&took), "{took:?}");

        let asked = AtomicUsize::new(0);
        let ask = async || -> Result<(), Error> {
            asked.fetch_add(1, Ordering::SeqCst);
            Err(Error::Store(store::Error::Corrupt("torn".to_owned())))
        };
        assert!(matches!(retry_while_busy(ask).await, Err(Error::Store(store::Error::Corrupt(_)))));
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    /// Only a replica that reports its quarantine again keeps another one from its start, not a process that was killed.
    #[test]
    fn a_replica_that_ended_keeps_nobody_from_a_start() {
        let registration = |incarnation: &str| ReplicaRegistration {
            incarnation: incarnation.to_owned(),
            address: "node 127.0.0.1:7700".to_owned(),
            version: "1".to_owned(),
            started_unix_ms: 0,
        };
        let row = |incarnation: &str, state: ReplicaState, seen_unix_ms: i64| store::ReplicaRow {
            registration: registration(incarnation),
            applied_number: 0,
            acked_number: 0,
            acked_unix_ms: 0,
            acked_commit_unix_ms: None,
            state,
            seen_unix_ms,
        };
        let list = |unix_ms: i64, rows: Vec<store::ReplicaRow>| store::ReplicaList {
            unix_ms,
            revision: Revision { history: HistoryId::new("h".to_owned()), number: 3 },
            freshness_bound_ms: 5_000,
            rows,
        };
        let (dead, running, serving) = (registration("dead"), registration("running"), ReplicaState::Serving);
        let quarantined = ReplicaState::Quarantined;

        let mut first = None;
        let replicas = list(10_000, vec![row("dead", quarantined, 4_000), row("other", serving, 9_900)]);
        assert_eq!(judge_quarantine_reports(&replicas, &mut first), QuarantineVerdict::Clear);
        let replicas = list(10_000, vec![row("dead", quarantined, 9_000), row("other", serving, 9_900)]);
        assert_eq!(judge_quarantine_reports(&replicas, &mut first), QuarantineVerdict::Unclear(&dead));
        let replicas = list(13_999, vec![row("dead", quarantined, 9_000), row("other", serving, 13_900)]);
        assert_eq!(judge_quarantine_reports(&replicas, &mut first), QuarantineVerdict::Unclear(&dead));
        let replicas = list(14_000, vec![row("dead", quarantined, 9_000), row("other", serving, 13_900)]);
        assert_eq!(judge_quarantine_reports(&replicas, &mut first), QuarantineVerdict::Clear);

        let mut first = None;
        let replicas = list(10_000, vec![row("dead", quarantined, 9_000), row("running", quarantined, 9_500)]);
        assert_eq!(judge_quarantine_reports(&replicas, &mut first), QuarantineVerdict::Unclear(&dead));
        let replicas = list(10_200, vec![row("dead", quarantined, 9_000), row("running", quarantined, 10_000)]);
        assert_eq!(judge_quarantine_reports(&replicas, &mut first), QuarantineVerdict::Running(&running));
        let replicas = list(10_200, vec![row("running", quarantined, 10_100)]);
        assert_eq!(judge_quarantine_reports(&replicas, &mut Some(BTreeMap::new())), QuarantineVerdict::Running(&running));
    }

    /// A runtime of one thread, which serves spawned tasks until `end` fires.
    fn runtime(runtimes: &Arc<ServingRuntimes>) -> (Handle, tokio::sync::oneshot::Sender<()>) {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let runtimes = runtimes.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                runtimes.register_current();
                sender.send(Handle::current()).unwrap();
                let _ = ended.await;
            });
        });
        (receiver.recv().unwrap(), end)
    }

    /// The barrier waits for a handler that is between two awaits, and for a stuck one. It does not wait for a runtime that ended.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_barrier_passes_every_runtime() {
        let runtimes = Arc::new(ServingRuntimes::default());
        runtimes.pass().await;
        let (first, _first_lives) = runtime(&runtimes);
        let (_, second_ends) = runtime(&runtimes);
        runtimes.pass().await;
        let (entered, has_entered) = tokio::sync::oneshot::channel();
        let (release, released) = mpsc::sync_channel::<()>(1);
        let handler = first.spawn(async move {
            entered.send(()).unwrap();
            released.recv().unwrap();
        });
        has_entered.await.unwrap();
        let passing = tokio::spawn({
            let runtimes = runtimes.clone();
            async move { runtimes.pass().await }
        });
        // However often the barrier task is polled, it cannot pass before the handler is released.
        for _ in 0..1_000 {
            tokio::task::yield_now().await;
        }
        assert!(!passing.is_finished());
        release.send(()).unwrap();
        passing.await.unwrap();
        assert!(handler.is_finished());
        drop(second_ends);
        runtimes.pass().await;
    }
}
