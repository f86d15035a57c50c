//! The unsigned services for gateways on the decisions' listener: the feed of applied revocations, and the list of replicas.
//!
//! A caller needs no more rights here than for a decision. A watcher of revocations costs the server only its position in the feed;
//! a watcher that reads too slowly is ended, and its last message says where to resume. Look next at
//! `sync/status/revocation_feed.rs`.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::{Stream, stream};
use tonic::{Code, Request, Response, Status};

use super::caller::caller_of;
use super::r#gen as wire;
use super::r#gen::fleet_service_server::FleetService;
use super::r#gen::revocation_service_server::RevocationService;
use super::status::{invalid_argument, status_with_reason};
use crate::model::ids::UserId;
use crate::model::limits::{CONNECTION_WATCHERS_MAX, ID_BYTES_MAX, SHARED_WATCHERS_MAX};
use crate::model::replica::{FleetStatus, ReplicaSummary};
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{RevocationRow, RevocationTarget};
use crate::service::{FleetDirectory, RuntimeService, ServiceUnavailable};
use crate::sync::status as sync;
use crate::sync::status::revocation_feed::{AppliedRevision, FeedPage};

/// Most revisions that are taken from the ring at once.
const REVISIONS_TAKEN_MAX: usize = 64;
/// Most entries in one message. Each may hold a reason of one kilobyte.
const ENTRIES_PER_MESSAGE_MAX: usize = 256;

/// The gateway services of one serving runtime.
#[derive(Clone)]
pub struct GatewayApi {
    runtime_service: RuntimeService,
    shared: Arc<GatewayApiState>,
}

/// The state that all serving runtimes of a process share.
pub struct GatewayApiState {
    follower: sync::FollowerHandle,
    directory: Arc<dyn FleetDirectory>,
    watcher_limiter: Arc<WatcherLimiter>,
}

impl GatewayApiState {
    /// Reads applied revisions from `follower` and replicas from `directory`.
    pub fn new(follower: sync::FollowerHandle, directory: Arc<dyn FleetDirectory>) -> Arc<Self> {
        Arc::new(Self { follower, directory, watcher_limiter: Arc::default() })
    }
}

impl GatewayApi {
    /// The gateway services of one runtime, with the state that all runtimes share.
    pub fn new(runtime_service: RuntimeService, shared: Arc<GatewayApiState>) -> Self {
        Self { runtime_service, shared }
    }
}

type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::WatchRevocationsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl RevocationService for GatewayApi {
    async fn revoke(&self, _request: Request<wire::RevokeRequest>) -> Result<Response<wire::RevokeResponse>, Status> {
        Err(not_served_here_status())
    }

    async fn reinstate(&self, _request: Request<wire::ReinstateRequest>) -> Result<Response<wire::ReinstateResponse>, Status> {
        Err(not_served_here_status())
    }

    async fn list(
        &self,
        _request: Request<wire::ListRevocationsRequest>,
    ) -> Result<Response<wire::ListRevocationsResponse>, Status> {
        Err(not_served_here_status())
    }

    type WatchStream = WatchStream;

    async fn watch(&self, request: Request<wire::WatchRevocationsRequest>) -> Result<Response<WatchStream>, Status> {
        let connection_id = caller_of(request.extensions()).connection_id;
        let from = request.into_inner().from;
        if from.len() > ID_BYTES_MAX {
            return Err(invalid_argument("from", format!("{} bytes: at most {ID_BYTES_MAX} are expected", from.len())));
        }
        let from = match from.as_str() {
            "" => None,
            token => Some(token.parse::<Revision>().map_err(|error| invalid_argument("from", error))?),
        };
        let newest = self.shared.follower.revocation_feed().newest().ok_or(ServiceUnavailable::NotReady)?;
        let slot = self.shared.watcher_limiter.acquire(connection_id)?;
        let open = RevocationWatcher::new(from, newest, self.runtime_service.clone(), self.shared.clone(), slot);
        let messages = stream::unfold(Some(open), |open| async move {
            let mut open = open?;
            match open.next().await {
                Ok(message) => Some((Ok(message), Some(open))),
                Err(fault) => Some((Err(fault), None)),
            }
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

#[tonic::async_trait]
impl FleetService for GatewayApi {
    async fn info(&self, _request: Request<wire::InfoRequest>) -> Result<Response<wire::InfoResponse>, Status> {
        let revision = self.runtime_service.current_revision().ok_or(ServiceUnavailable::NotReady)?;
        Ok(Response::new(info_to_wire(&revision)))
    }

    async fn list_replicas(
        &self,
        _request: Request<wire::ListReplicasRequest>,
    ) -> Result<Response<wire::ListReplicasResponse>, Status> {
        let fleet = self.shared.directory.read_fleet().await;
        let fleet = fleet.map_err(|error| status_with_reason(Code::Unavailable, "STORE_UNAVAILABLE", error))?;
        Ok(Response::new(fleet_to_wire(&fleet)))
    }

    async fn wait_for(
        &self,
        _request: Request<wire::WaitForFleetRequest>,
    ) -> Result<Response<wire::WaitForFleetResponse>, Status> {
        Err(not_served_here_status())
    }

    async fn adopt(&self, _request: Request<wire::AdoptRequest>) -> Result<Response<wire::AdoptResponse>, Status> {
        Err(not_served_here_status())
    }

    async fn wait_for_adoption(
        &self,
        _request: Request<wire::WaitForAdoptionRequest>,
    ) -> Result<Response<wire::WaitForAdoptionResponse>, Status> {
        Err(not_served_here_status())
    }
}

/// Limits the watchers of revocations. Each connection has one slot of its own that no other connection can take. Its further
/// watchers come from a shared pool, up to a limit for each connection.
#[derive(Debug, Default)]
struct WatcherLimiter {
    counts: Mutex<WatcherCounts>,
}

#[derive(Debug, Default)]
struct WatcherCounts {
    by_connection: HashMap<u64, usize>,
    shared: usize,
}

impl WatcherLimiter {
    fn acquire(self: &Arc<Self>, connection_id: u64) -> Result<WatcherSlot, Status> {
        let mut counts = self.lock();
        let own = counts.by_connection.get(&connection_id).copied().unwrap_or_default();
        if own >= CONNECTION_WATCHERS_MAX {
            let message = format!("this connection has {own} readers of revocations, and that is the limit: end one");
            return Err(status_with_reason(Code::ResourceExhausted, "LIMIT_EXCEEDED", message));
        }
        if own > 0 {
            if counts.shared >= SHARED_WATCHERS_MAX {
                let message = "too many connections read revocations more than once: read them once, or ask another replica";
                return Err(status_with_reason(Code::ResourceExhausted, "LIMIT_EXCEEDED", message));
            }
            counts.shared += 1;
        }
        counts.by_connection.insert(connection_id, own + 1);
        Ok(WatcherSlot { watcher_limiter: Arc::clone(self), connection_id })
    }

    fn lock(&self) -> MutexGuard<'_, WatcherCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The slot of one watcher, released on drop.
#[derive(Debug)]
struct WatcherSlot {
    watcher_limiter: Arc<WatcherLimiter>,
    connection_id: u64,
}

impl Drop for WatcherSlot {
    fn drop(&mut self) {
        let mut counts = self.watcher_limiter.lock();
        match counts.by_connection.get(&self.connection_id).copied() {
            Some(own) if own > 1 => {
                counts.by_connection.insert(self.connection_id, own - 1);
                counts.shared = counts.shared.saturating_sub(1);
            }
            _ => {
                counts.by_connection.remove(&self.connection_id);
            }
        }
    }
}

/// One watcher of revocations.
struct RevocationWatcher {
    /// The last revision that was sent or is queued in `pending_messages`.
    last_read: Revision,
    pending_messages: VecDeque<wire::WatchRevocationsResponse>,
    changes: sync::ProgressReceiver,
    runtime_service: RuntimeService,
    shared: Arc<GatewayApiState>,
    _slot: WatcherSlot,
}

impl RevocationWatcher {
    fn new(
        from: Option<Revision>,
        newest: Revision,
        runtime_service: RuntimeService,
        shared: Arc<GatewayApiState>,
        slot: WatcherSlot,
    ) -> Self {
        let changes = shared.follower.subscribe();
        let mut waiting = VecDeque::new();
        let read = match from {
            // The first message names the revision at which the stream begins, so that the watcher can resume from there.
            None => {
                waiting.push_back(wire::WatchRevocationsResponse { revision: newest.to_string(), ..Default::default() });
                newest
            }
            Some(from) if from.history != newest.history || is_before_feed(&shared, &from) => {
                waiting.push_back(revoke_everything_message(&newest));
                newest
            }
            Some(from) => from,
        };
        Self { last_read: read, pending_messages: waiting, changes, runtime_service, shared, _slot: slot }
    }

    /// Returns the next message. An error ends the stream.
    async fn next(&mut self) -> Result<wire::WatchRevocationsResponse, Status> {
        loop {
            if let Some(message) = self.pending_messages.pop_front() {
                return Ok(message);
            }
            match self.shared.follower.revocation_feed().read_after(self.last_read.number, REVISIONS_TAKEN_MAX) {
                FeedPage::Lagged(_) => {
                    let message = format!("revocations are read too slowly: resume from `{}`", self.last_read);
                    return Err(status_with_reason(Code::ResourceExhausted, "TOO_SLOW", message));
                }
                FeedPage::Revisions(applied) if !applied.is_empty() => {
                    for one in applied {
                        self.last_read = one.revision.clone();
                        self.pending_messages.extend(revision_messages(&one));
                    }
                }
                FeedPage::Revisions(_) if self.shared.follower.is_quarantined() => {
                    let message = "this replica is quarantined and denies everything: end what it let go on, ask another one";
                    return Err(status_with_reason(Code::Unavailable, "QUARANTINED", message));
                }
                FeedPage::Revisions(_) => tokio::select! {
                    changed = self.changes.changed() => changed.map_err(|_| Status::from(ServiceUnavailable::Draining))?,
                    () = self.runtime_service.wait_for_drain() => return Err(ServiceUnavailable::Draining.into()),
                },
            }
        }
    }
}

fn is_before_feed(shared: &GatewayApiState, from: &Revision) -> bool {
    matches!(shared.follower.revocation_feed().read_after(from.number, 0), FeedPage::Lagged(_))
}

fn revoke_everything_message(at: &Revision) -> wire::WatchRevocationsResponse {
    wire::WatchRevocationsResponse { revision: at.to_string(), everything: true, ..Default::default() }
}

/// Splits a revision into messages of a bounded size, at least one.
fn revision_messages(applied: &AppliedRevision) -> Vec<wire::WatchRevocationsResponse> {
    let message = |rows: &[crate::model::rows::RevocationRow]| wire::WatchRevocationsResponse {
        revision: applied.revision.to_string(),
        committed_at_unix_ms: applied.unix_ms,
        entries: rows.iter().map(|row| watched_revocation_to_wire(row, &applied.revision.history)).collect(),
        everything: applied.entries_omitted,
        more: true,
    };
    let mut messages: Vec<_> = applied.entries.chunks(ENTRIES_PER_MESSAGE_MAX).map(message).collect();
    if messages.is_empty() {
        messages.push(message(&[]));
    }
    if let Some(last) = messages.last_mut() {
        last.more = false;
    }
    messages
}

/// Converts a revocation to the least that a gateway needs to end the calls it let through. Anyone who may connect may watch, so
/// the reason is left out. A user gets an opaque name that only a caller who already knows that user can recompute.
fn watched_revocation_to_wire(row: &RevocationRow, history: &HistoryId) -> wire::Revocation {
    let opaque = |issuer: &str, subject: &str| UserId::new(issuer, subject).pseudonym(history.as_str());
    let key = match &row.target {
        RevocationTarget::User { issuer, subject } => vec![opaque(issuer, subject)],
        RevocationTarget::Delegation { issuer, subject, agent } => vec![opaque(issuer, subject), agent.clone()],
        // INVARIANT: an id names no person.
        other => other.id().map(str::to_owned).into_iter().collect(),
    };
    wire::Revocation {
        target: Some(wire::RevocationTarget { kind: row.target.kind().to_owned(), key }),
        dead: row.dead,
        suspended: row.suspended,
        watermark_unix_s: row.watermark_unix_s.unwrap_or(0),
        revision: Revision { history: history.clone(), number: row.revision }.to_string(),
        ..Default::default()
    }
}

/// The server's version and revision, the same on both listeners.
pub(super) fn info_to_wire(revision: &Revision) -> wire::InfoResponse {
    wire::InfoResponse {
        history_id: revision.history.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: revision.to_string(),
    }
}

/// Converts the replicas of a store.
pub(super) fn fleet_to_wire(fleet: &FleetStatus) -> wire::ListReplicasResponse {
    wire::ListReplicasResponse {
        replicas: fleet.replicas.iter().map(|replica| replica_to_wire(replica, &fleet.revision)).collect(),
        revision: fleet.revision.to_string(),
        freshness_bound_ms: fleet.freshness_bound_ms,
    }
}

/// Converts a replica. `of` provides the history of its revisions.
pub(super) fn replica_to_wire(replica: &ReplicaSummary, of: &Revision) -> wire::Replica {
    let revision = |number: u64| match number {
        0 => String::new(),
        number => Revision { history: of.history.clone(), number }.to_string(),
    };
    wire::Replica {
        id: replica.id.clone(),
        address: replica.address.clone(),
        state: replica.condition.as_str().to_owned(),
        revision: revision(replica.applied_number),
        acked_revision: revision(replica.acked_number),
        age_ms: replica.age_ms,
        last_kill_ms: replica.kill_ms,
        version: replica.version.clone(),
        started_at_unix_ms: replica.started_unix_ms,
        draining: replica.draining,
    }
}

fn not_served_here_status() -> Status {
    let message = "this call is an act: send it, signed, to the administration listener";
    status_with_reason(Code::Unimplemented, "NOT_SERVED_HERE", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_watches_learns_targets_and_no_more() {
        let history = HistoryId::new("h");
        let ana = UserId::new("https://i", "ana").pseudonym("h");
        let check = |target: RevocationTarget, expected: &[&str]| {
            let row = RevocationRow {
                target,
                dead: false,
                suspended: true,
                watermark_unix_s: Some(7),
                expires_at_unix_s: None,
                reason: "ana's laptop was stolen".to_owned(),
                revision: 3,
            };
            let out = watched_revocation_to_wire(&row, &history);
            assert_eq!(out.target.as_ref().unwrap().key, expected);
            assert_eq!((out.suspended, out.watermark_unix_s, out.revision.as_str()), (true, 7, "h.3"));
            assert!(!format!("{out:?}").contains("ana"), "{out:?}");
        };
        let (issuer, subject, agent) = ("https://i".to_owned(), "ana".to_owned(), "spiffe://a/b".to_owned());
        check(RevocationTarget::User { issuer: issuer.clone(), subject: subject.clone() }, &[&ana]);
        check(RevocationTarget::Delegation { issuer, subject, agent }, &[&ana, "spiffe://a/b"]);
        check(RevocationTarget::Session("s-1".to_owned()), &["s-1"]);
        check(RevocationTarget::All, &[]);
    }

    #[test]
    fn every_connection_has_a_place_to_read_from() {
        let watchers = Arc::<WatcherLimiter>::default();
        let take = |connection| watchers.acquire(connection).map_err(|refused| refused.message().to_owned());
        let mut places = Vec::new();
        // Greedy connections that use up the shared pool, each with its own slot besides.
        let greedy = SHARED_WATCHERS_MAX.div_ceil(CONNECTION_WATCHERS_MAX - 1) as u64;
        for connection in 0..greedy {
            places.extend((0..2 * CONNECTION_WATCHERS_MAX).filter_map(|_| take(connection).ok()));
        }
        assert_eq!(places.len(), SHARED_WATCHERS_MAX + greedy as usize);
        assert!(take(0).unwrap_err().contains("this connection has 8 readers"));
        for connection in greedy..5000 {
            places.push(take(connection).unwrap());
            assert!(take(connection).unwrap_err().contains("more than once"));
        }
        places.truncate(1);
        assert_eq!(watchers.lock().shared, 0);
        assert!(take(1).is_ok());
        drop(places);
        let counts = watchers.lock();
        assert_eq!((counts.by_connection.len(), counts.shared), (0, 0));
    }

    #[test]
    fn a_large_revision_comes_in_parts() {
        let check = |count: usize, expected: &[(usize, bool)]| {
            let entries = (0..count).map(|index| RevocationRow {
                target: RevocationTarget::Token(format!("t{index}")),
                dead: true,
                suspended: false,
                watermark_unix_s: None,
                expires_at_unix_s: None,
                reason: String::new(),
                revision: 3,
            });
            let revision = Revision { history: HistoryId::new("h"), number: 3 };
            let applied = AppliedRevision { revision, unix_ms: 1, entries: entries.collect(), entries_omitted: false };
            let parts: Vec<_> = revision_messages(&applied).iter().map(|part| (part.entries.len(), part.more)).collect();
            assert_eq!(parts, expected, "{count}");
        };
        check(0, &[(0, false)]);
        check(1, &[(1, false)]);
        check(256, &[(256, false)]);
        check(513, &[(256, true), (256, true), (1, false)]);
    }
}
