//! Connects the parts: the service's ports over the store and the follower, the store itself, and the first operator.
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

use super::{Error, read_policy_files};
use crate::api::r#gen as wire;
use crate::audit::{self, DiskMonitor};
use crate::config::{self, Settings};
use crate::model::approval::{ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest};
use crate::model::disk::PathDiskSpace;
use crate::model::revision::{HistoryId, Revision};
use crate::model::time::{Clock, SystemClock};
use crate::pap::{self, AdministrationPoint, DocumentNames, KnownNamesSource};
use crate::service::{ApprovalLedger, LedgerError, PdpService, ProofLedger, RevisionCatchUp};
use crate::snapshot::{Snapshot, SnapshotCell};
use crate::store::postgres::{self, PostgresStore};
use crate::store::sqlite::{CACHE_FILE, SqliteStore};
use crate::store::{self, ReplicaRegistration, Store};
use crate::sync;
use crate::sync::status::FollowerHandle;
use crate::token::operator_act::{self, AdminCall};
use crate::token::trust::TrustedIssuer;
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

/// The way to apply a policy folder that the key in the data folder may not apply.
const SIGNED_BY_LOCAL: &str = "\n--policies is signed with the key `local.jwk` of the data folder alone: start without --policies, which \
                               leaves the stored policy in force, then run `portcullis policy apply DIR` with --operator-key for each \
                               operator who must sign";

/// Spends the proofs of destructive calls in the store.
pub(crate) struct StoreProofLedger(pub(crate) Arc<dyn Store>);

/// Maps a store error to the outcome of a use.
fn ledger_error(error: store::Error) -> LedgerError {
    match error {
        store::Error::OutcomeUnknown(why) => LedgerError::OutcomeUnknown(why),
        // INVARIANT: every other store error says that nothing was written.
        other => LedgerError::Busy(other.to_string()),
    }
}

#[async_trait]
impl ProofLedger for StoreProofLedger {
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, LedgerError> {
        self.0.spend_proof(key, expires_at_unix_s).await.map_err(ledger_error)
    }
}

/// Keeps approvals in the store.
pub(crate) struct StoreApprovalLedger(pub(crate) Arc<dyn Store>);

#[async_trait]
impl ApprovalLedger for StoreApprovalLedger {
    async fn ask_approval(&self, request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, LedgerError> {
        self.0.ask_approval(request).await.map_err(ledger_error)
    }

    async fn use_approvals(&self, request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, LedgerError> {
        self.0.use_approvals(request).await.map_err(ledger_error)
    }

    async fn give_back_approvals(&self, request: ApprovalUseRequest) -> Result<bool, LedgerError> {
        self.0.give_back_approvals(request).await.map_err(ledger_error)
    }
}

/// Waits for `at_least` until the follower has applied both the revocations and the policy of that revision.
pub(crate) struct FollowerCatchUp {
    pub(crate) status: FollowerHandle,
    pub(crate) cell: Arc<SnapshotCell>,
}

#[async_trait]
impl RevisionCatchUp for FollowerCatchUp {
    async fn catch_up_to(&self, revision: &Revision) -> bool {
        let reached = |cell: &SnapshotCell| cell.load().is_some_and(|view| view.snapshot.includes_revision(revision));
        if reached(&self.cell) {
            return true;
        }
        self.status.wait_for_revision(revision, CATCH_UP_TIMEOUT).await.is_ok() && reached(&self.cell)
    }
}

/// Finds names in the documents and the cached chains of this server, for [`KnownNamesSource`].
pub(super) struct LiveNamesSource {
    pub(super) follower: FollowerCatchUp,
    pub(super) service: Arc<PdpService>,
}

#[async_trait]
impl KnownNamesSource for LiveNamesSource {
    async fn documents(&self, at_least: Option<&Revision>) -> Result<Arc<dyn DocumentNames>, String> {
        if let Some(revision) = at_least
            && !self.follower.catch_up_to(revision).await
        {
            return Err(format!("this server has not applied revision `{revision}` yet, and its documents may be older"));
        }
        let view = self.follower.cell.load().ok_or("no snapshot was read yet")?;
        Ok(Arc::new(SnapshotNames(view.snapshot)))
    }

    fn chains(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool {
        self.service.visit_cached_chains(chains_max, visit)
    }
}

/// The names in the documents of one snapshot.
struct SnapshotNames(Arc<Snapshot>);

impl DocumentNames for SnapshotNames {
    fn has_document(&self, kind: &str, id: &str) -> bool {
        self.0.policy().has_name(kind, id)
    }

    fn ids_of_kind(&self, kind: &str, ids_max: usize) -> Vec<String> {
        self.0.policy().names_of(kind, ids_max)
    }

    fn key_holder(&self, thumbprint: &str) -> Option<(&'static str, String)> {
        let trust = self.0.trust();
        let holds = |issuer: &&TrustedIssuer| issuer.keys.iter().any(|named| named.key.thumbprint().as_str() == thumbprint);
        let agent = trust.agent_for_key(thumbprint).map(|agent| ("agent", agent.to_string()));
        agent.or_else(|| trust.issuers().find(holds).map(|issuer| ("issuer", issuer.id.to_string())))
    }
}

/// Creates a folder that only its owner can read.
pub(super) fn create_private_dir(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::Configuration(format!("--data: the folder `{}` cannot be made: {error}", path.display())))
}

/// The registration of this process with its store. Its incarnation is random, so no other process ever has it.
pub(super) fn replica_registration(settings: &Settings, decisions: SocketAddr, clock: &dyn Clock) -> ReplicaRegistration {
    ReplicaRegistration {
        incarnation: sync::new_incarnation_id(&settings.node, uuid::Uuid::new_v4().to_string()),
        address: format!("{} {decisions}", settings.node),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started_unix_ms: clock.now().unix_ms(),
    }
}

/// How often the store is polled. A file is polled often, because a poll is cheap. A database is polled less often, because each
/// poll writes there, and it limits the time of a poll itself.
pub(super) fn follow_settings(store: &config::StoreLocation) -> sync::Settings {
    match store {
        config::StoreLocation::Sqlite(_) => sync::Settings::default(),
        config::StoreLocation::Postgres(_) => {
            sync::Settings { poll_interval_ms: 100, poll_timeout_ms: 65_000, ..sync::Settings::default() }
        }
    }
}

/// Opens a store that exists.
pub(super) async fn open_store(store: &config::StoreLocation, clock: Arc<dyn Clock>) -> Result<Arc<dyn Store>, Error> {
    match store {
        config::StoreLocation::Sqlite(path) => match SqliteStore::open_existing(path, clock) {
            Err(store::Error::Missing(_)) if is_missing(path) => Err(missing_store_error(store, None, path)),
            opened => Ok(Arc::new(opened?)),
        },
        config::StoreLocation::Postgres(settings) => match PostgresStore::open(settings.as_ref().clone()).await {
            Ok(store) => Ok(Arc::new(store)),
            Err(store::Error::Misconfigured(why)) => Err(Error::Configuration(why)),
            Err(error) => Err(error.into()),
        },
    }
}

/// Creates a SQLite store where none exists. It is refused if this data folder shows that a replica followed a store there.
pub(super) fn create_store_if_missing(
    store: &config::StoreLocation,
    data: &Path,
    position_files: &sync::PositionFiles,
    clock: Arc<dyn Clock>,
) -> Result<(), Error> {
    let config::StoreLocation::Sqlite(path) = store else { return Ok(()) };
    if !is_missing(path) {
        return Ok(());
    }
    let cache = data.join(CACHE_FILE);
    for left in position_files.paths().chain([cache.as_path()]) {
        if !is_missing(left) {
            return Err(Error::Configuration(format!(
                "there is no store at `{}`, and `{}` says that this replica followed one: an empty store would let in again what was \
                 revoked; put the store or a backup of it back (OPERATIONS, back up and restore), or begin anew with another --data and --create",
                path.display(),
                left.display()
            )));
        }
    }
    drop(SqliteStore::open(path, clock)?);
    tracing::warn!(
        store = %store.absolute(),
        "made a new, empty store, in which nothing is revoked: if a server ran before, stop this one and name its --data or --store"
    );
    Ok(())
}

/// Fails if a named SQLite store does not exist and may not be created. It runs before anything is written. `data` is the data folder
/// that names the store, if no URL does.
pub(super) fn check_store_exists(store: &config::StoreLocation, data: Option<&Path>, may_create: bool) -> Result<(), Error> {
    match store {
        config::StoreLocation::Sqlite(path) if !may_create && is_missing(path) => Err(missing_store_error(store, data, path)),
        _ => Ok(()),
    }
}

fn missing_store_error(store: &config::StoreLocation, data: Option<&Path>, path: &Path) -> Error {
    let display_path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let display_path = display_path.display();
    let flag = data.map_or_else(|| format!("--store {store}"), |data| format!("--data {}", data.display()));
    Error::Store(store::Error::Missing(format!(
        "there is no store at `{display_path}`: check the path; to make a new store there: `portcullis serve {flag} --create`"
    )))
}

/// Whether no file has that name.
fn is_missing(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Opens a store that cannot be reached yet. The connection is made later, and the store is then compared with that history.
pub(super) fn open_store_lazily(settings: &postgres::Settings, history: HistoryId) -> Result<Arc<dyn Store>, Error> {
    Ok(Arc::new(PostgresStore::open_lazily(settings.clone(), history)?))
}

/// Creates the operator `local` of an empty store. Its key lies in the data folder, and only its owner can read it.
pub(super) async fn ensure_first_operator(store: &dyn Store, data: &Path) -> Result<(), Error> {
    if store.revision().await?.number > 0 {
        return Ok(());
    }
    let path = data.join(LOCAL_KEY_FILE);
    let key = if path.exists() { read_local_key(&path)? } else { create_local_key(&path)? };
    match pap::create_first_operator(store, LOCAL_OPERATOR, key.public_key()).await {
        Ok(Some(_)) => tracing::info!(key = %path.display(), "made the first operator `{LOCAL_OPERATOR}`"),
        Ok(None) => {}
        Err(error) => return Err(Error::Configuration(error.to_string())),
    }
    Ok(())
}

/// Applies a policy folder as an act that the local operator signs.
pub(super) async fn apply_policy_folder(admin: &AdministrationPoint, folder: &Path, data: &Path) -> Result<Revision, Error> {
    const METHOD: &str = "/portcullis.v1.PolicyService/Apply";
    let files = read_policy_files(folder)?;
    let key = read_local_key(&data.join(LOCAL_KEY_FILE))?;
    let wire_files = files.iter().map(|file| wire::PolicyFile { path: file.path.clone(), content: file.content.clone().into() });
    let message = wire::ApplyPolicyRequest { files: wire_files.collect(), dry_run: false }.encode_to_vec();
    let refused = |error: pap::Error| match error {
        pap::Error::InvalidPolicy(diagnostics) => {
            let lines: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
            Error::Configuration(format!("--policies: nothing of `{}` was applied:\n{}", folder.display(), lines.join("\n")))
        }
        pap::Error::TestsFailed { failures, .. } => Error::Configuration(format!(
            "--policies: nothing of `{}` was applied, its tests fail:\n{}",
            folder.display(),
            failures.join("\n")
        )),
        other => Error::Configuration(format!(
            "--policies: `{}` was not applied: {other}{}",
            folder.display(),
            match &other {
                pap::Error::Unauthenticated(_) | pap::Error::KeyRevoked(_) | pap::Error::PermissionDenied(_) => SIGNED_BY_LOCAL,
                _ => "",
            }
        )),
    };
    let history = admin.revision().await.map_err(refused)?.history;
    let expected = AdminCall { audience: history.as_str(), method: METHOD, message: &message };
    let authorization = format!("Operator {}", operator_act::sign_act(&key, &expected, SystemClock.now()));
    let by = admin.authorize(METHOD, &message, &[&authorization], "start").await.map_err(refused)?;
    let outcome = admin.apply(&by, files, false).await.map_err(refused)?;
    for warning in &outcome.warnings {
        tracing::warn!("{warning}");
    }
    tracing::info!(revision = %outcome.revision, changes = outcome.changes.len(), "the policy folder is in force");
    Ok(outcome.revision)
}

/// Watches the disk of a store that is a file.
pub(super) fn watch_store_disk(store: &config::StoreLocation, log: &audit::AuditLog) -> Option<Arc<DiskMonitor>> {
    let config::StoreLocation::Sqlite(path) = store else { return None };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let disk_monitor = Arc::new(DiskMonitor::new(folder, Box::new(PathDiskSpace(folder.to_owned()))));
    log.watch_disk(disk_monitor.clone());
    Some(disk_monitor)
}

fn read_local_key(path: &Path) -> Result<PrivateKey, Error> {
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

fn create_local_key(path: &Path) -> Result<PrivateKey, Error> {
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
