//! The connections of one listener: which are admitted, which are cut when it is full, and which have been idle too long.
//!
//! A full listener cuts one connection for each new one, so that nobody shuts the others out. It first cuts connections on which no
//! signature was verified recently, idle ones before busy ones, and the oldest first. A new connection has a grace in which its first
//! call can be verified. A request takes no lock and reads no clock here: it only counts, and [`ConnectionRegistry::sweep`] reads the counts.
//! Look next at `acceptor.rs`, which admits connections, and at `active_call.rs`.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::byte_budget::{ConnectionBudget, SharedBudget};
use super::counters::{CutCause, ListenerCounters};
use crate::model::connection::VerifiedSignatureFlag;
use crate::model::limits::{FLOW_CONTROL_BYTES_MAX, IDLE_STREAMS_MAX, RECENT_SIGNATURE_MS};

/// Most connections that are cut but still open. At this number nothing is admitted until one of them closes.
pub(super) const CUT_PENDING_MAX: usize = 32;
/// Most connections that are compared to find an eviction candidate.
const CANDIDATES_MAX: usize = 256;
/// Number of periods in which a waiting reply is counted. The oldest one is over.
const WAIT_PERIODS: usize = 4;
/// The smallest HTTP/2 flow-control window, with which every connection begins.
const WINDOW_BYTES_MIN: usize = 65_535;

/// The limits on the connections of a listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConnectionLimits {
    pub(super) connections_max: usize,
    /// Slots, out of all, that are reserved for connections on which a signature was verified recently.
    pub(super) reserved_max: usize,
    /// A connection without a call for this long is closed.
    pub(super) idle_timeout: Duration,
    /// A connection without a verified signature for this long is cut, if the listener requires signatures.
    pub(super) unsigned_timeout: Option<Duration>,
    /// A connection that is younger than this is not cut for another one, unless it was verified and became idle.
    pub(super) grace: Duration,
    /// A connection that takes no part of a reply for this long is cut.
    pub(super) stall_timeout: Duration,
    pub(super) window_bytes_max: usize,
    pub(super) own_bytes: usize,
    pub(super) connection_bytes_max: usize,
    pub(super) pool_bytes_max: usize,
}

/// One connection, as all its users share it.
#[derive(Debug)]
pub(super) struct TrackedConnection {
    id: u64,
    peer: IpAddr,
    pub(super) verified_signature: Arc<VerifiedSignatureFlag>,
    pub(super) budget: Arc<ConnectionBudget>,
    pub(super) counters: Arc<ListenerCounters>,
    /// The bytes that the peer may send before they are read.
    pub(super) window_bytes: u32,
    opened_ms: u64,
    /// When a sweep last saw it with a call.
    last_active_ms: AtomicU64,
    /// When a sweep last saw a verified signature on it; 0 means never.
    last_proved_ms: AtomicU64,
    /// Calls under way, and calls ever.
    active_calls: AtomicU32,
    idle_streams: AtomicUsize,
    calls_total: AtomicU32,
    calls_total_seen: AtomicU32,
    /// Bytes of whole messages that were read since the last [`Self::take_read_bytes`].
    read_bytes: AtomicUsize,
    /// Replies that wait for the peer, by the period in which the wait began.
    waiting_replies: [AtomicU32; WAIT_PERIODS],
    period: Arc<AtomicUsize>,
    cut_cause: AtomicU8,
    cut_notify: Notify,
}

impl TrackedConnection {
    /// Counts the start of a call.
    pub(super) fn begin_call(&self) {
        self.active_calls.fetch_add(1, Ordering::Relaxed);
        self.calls_total.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the end of a call, once its reply is handed on.
    pub(super) fn end_call(&self) {
        self.active_calls.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts a stream that may stay idle. Returns `false` if the connection has too many of them.
    pub(super) fn begin_idle_stream(&self) -> bool {
        let begun = self.idle_streams.fetch_add(1, Ordering::Relaxed) < IDLE_STREAMS_MAX;
        if !begun {
            self.end_idle_stream();
        }
        begun
    }

    /// Counts the end of that stream.
    pub(super) fn end_idle_stream(&self) {
        self.idle_streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts a reply that begins to wait for the peer. Pass the returned period to [`Self::end_reply_wait`].
    pub(super) fn begin_reply_wait(&self) -> usize {
        let period = self.period.load(Ordering::Relaxed) % WAIT_PERIODS;
        if let Some(waiting) = self.waiting_replies.get(period) {
            waiting.fetch_add(1, Ordering::Relaxed);
        }
        period
    }

    /// Counts the end of that wait.
    pub(super) fn end_reply_wait(&self, period: usize) {
        if let Some(waiting) = self.waiting_replies.get(period) {
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Counts a message that was read whole.
    pub(super) fn add_read_bytes(&self, bytes: usize) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes the bytes of whole messages read since the last call. They belong to the call that is being polled, because one thread
    /// serves the connection and polls one call at a time.
    pub(super) fn take_read_bytes(&self) -> usize {
        match self.read_bytes.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.read_bytes.swap(0, Ordering::Relaxed),
        }
    }

    /// Waits until the connection is to be closed; returns the cause.
    pub(super) async fn wait_until_cut(&self) -> CutCause {
        loop {
            if let Some(cause) = CutCause::from_index(self.cut_cause.load(Ordering::Acquire)) {
                return cause;
            }
            self.cut_notify.notified().await;
        }
    }

    fn is_cut(&self) -> bool {
        CutCause::from_index(self.cut_cause.load(Ordering::Acquire)).is_some()
    }

    fn has_recent_signature(&self, now_ms: u64) -> bool {
        let proved_ms = self.last_proved_ms.load(Ordering::Relaxed);
        self.verified_signature.is_set() || is_recent(proved_ms, now_ms)
    }

    /// When a sweep last saw it in use.
    fn last_used_ms(&self) -> u64 {
        self.last_active_ms.load(Ordering::Relaxed)
    }

    /// The eviction rank: the class, then the time that orders connections of the same class whose peers have equally many
    /// connections. The connection with the lowest rank is cut first.
    fn eviction_rank(&self, rules: &ConnectionLimits, now_ms: u64) -> (EvictionClass, u64) {
        let is_busy = self.is_busy();
        if self.has_recent_signature(now_ms) {
            let class = if is_busy { EvictionClass::ProvedBusy } else { EvictionClass::ProvedIdle };
            // A signature that no sweep has seen yet is the newest. Calls without a signature prolong nothing.
            let proved_ms = if self.verified_signature.is_set() { now_ms } else { self.last_proved_ms.load(Ordering::Relaxed) };
            return (class, proved_ms);
        }
        if Duration::from_millis(now_ms.saturating_sub(self.opened_ms)) < rules.grace {
            return (EvictionClass::New, self.opened_ms);
        }
        // Where calls are signed, a stream that nobody signed is no use of the listener.
        match (rules.unsigned_timeout.is_some(), is_busy) {
            (true, _) => (EvictionClass::Idle, self.opened_ms),
            (false, false) => (EvictionClass::Idle, self.last_used_ms()),
            (false, true) => (EvictionClass::Busy, self.last_used_ms()),
        }
    }

    fn is_busy(&self) -> bool {
        self.active_calls.load(Ordering::Relaxed) > 0
    }
}

/// How a connection is used, in the order of eviction: the first class is evicted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum EvictionClass {
    Idle,
    Busy,
    /// It had no time yet to carry a signature.
    New,
    ProvedIdle,
    ProvedBusy,
}

fn is_recent(proved_ms: u64, now_ms: u64) -> bool {
    proved_ms != 0 && now_ms.saturating_sub(proved_ms) < RECENT_SIGNATURE_MS
}

#[derive(Debug, Default)]
struct ConnectionTable {
    connections: Vec<Arc<TrackedConnection>>,
    index_by_id: HashMap<u64, usize>,
    count_by_peer: HashMap<IpAddr, usize>,
    /// Where the next comparison begins.
    cursor: usize,
    cut_pending: usize,
}

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct ConnectionRegistry {
    rules: ConnectionLimits,
    counters: Arc<ListenerCounters>,
    shared_budget: Arc<SharedBudget>,
    period: Arc<AtomicUsize>,
    started: Instant,
    table: Mutex<ConnectionTable>,
}

impl ConnectionRegistry {
    pub(super) fn new(rules: ConnectionLimits, counters: Arc<ListenerCounters>) -> Arc<Self> {
        Arc::new(Self {
            rules,
            counters,
            shared_budget: Arc::new(SharedBudget::new(rules.pool_bytes_max)),
            period: Arc::default(),
            started: Instant::now(),
            table: Mutex::default(),
        })
    }

    /// Bytes that waiting calls hold, beyond each connection's own share.
    pub(super) fn shared_bytes(&self) -> usize {
        self.shared_budget.used()
    }

    /// Admits one more connection. If the listener is full, it cuts the eviction candidate.
    ///
    /// # Errors
    /// [`AdmissionError`].
    pub(super) fn admit(self: &Arc<Self>, id: u64, peer: IpAddr) -> Result<ConnectionSlot, AdmissionError> {
        let now_ms = self.now_ms();
        let mut table = self.lock();
        if table.is_full(&self.rules, now_ms) {
            if table.cut_pending >= CUT_PENDING_MAX {
                return Err(AdmissionError::CutPending);
            }
            let (class, evicted) = table.eviction_candidate(&self.rules, now_ms).ok_or(AdmissionError::CutPending)?;
            if class == EvictionClass::New {
                return Err(AdmissionError::New);
            }
            self.cut_connection(&mut table, &evicted, CutCause::Displaced);
        }
        let open = table.connections.len().saturating_add(1);
        let window = (FLOW_CONTROL_BYTES_MAX / open).clamp(WINDOW_BYTES_MIN, self.rules.window_bytes_max.max(WINDOW_BYTES_MIN));
        let ConnectionLimits { own_bytes, connection_bytes_max, .. } = self.rules;
        let verified_signature = Arc::new(VerifiedSignatureFlag::default());
        let account = ConnectionBudget::new(
            Arc::clone(&self.shared_budget),
            own_bytes,
            connection_bytes_max,
            Arc::clone(&verified_signature),
        );
        let tracked = Arc::new(TrackedConnection {
            id,
            peer,
            verified_signature,
            budget: Arc::new(account),
            counters: Arc::clone(&self.counters),
            window_bytes: u32::try_from(window).unwrap_or(u32::MAX),
            opened_ms: now_ms,
            last_active_ms: AtomicU64::new(now_ms),
            last_proved_ms: AtomicU64::new(0),
            active_calls: AtomicU32::new(0),
            idle_streams: AtomicUsize::new(0),
            calls_total: AtomicU32::new(0),
            calls_total_seen: AtomicU32::new(0),
            read_bytes: AtomicUsize::new(0),
            waiting_replies: Default::default(),
            period: Arc::clone(&self.period),
            cut_cause: AtomicU8::new(CutCause::NONE),
            cut_notify: Notify::new(),
        });
        table.insert(&tracked);
        Ok(ConnectionSlot { registry: Arc::clone(self), connection: tracked })
    }

    /// Sweeps all connections until it is dropped.
    pub(super) async fn run_sweeper(&self) {
        let ConnectionLimits { idle_timeout: idle, unsigned_timeout: unsigned, stall_timeout: stall, .. } = self.rules;
        let shortest = idle.min(unsigned.unwrap_or(idle)).min(stall);
        // A reply is cut once it has waited for three whole periods.
        let period = stall / 3;
        let interval = (shortest / 4).min(period).clamp(Duration::from_millis(5), Duration::from_secs(1));
        let mut period_began = Instant::now();
        loop {
            tokio::time::sleep(interval).await;
            let next_period = period_began.elapsed() >= period;
            if next_period {
                period_began = Instant::now();
            }
            self.sweep(next_period);
        }
    }

    fn sweep(&self, next_period: bool) {
        let now_ms = self.now_ms();
        let mut table = self.lock();
        let over = next_period.then(|| {
            // A reply that still waits since the period that is about to be reused has waited for at least three whole ones.
            let next = self.period.load(Ordering::Relaxed).wrapping_add(1);
            self.period.store(next, Ordering::Relaxed);
            next % WAIT_PERIODS
        });
        let mut cut = Vec::new();
        for tracked in table.connections.iter().filter(|tracked| !tracked.is_cut()) {
            if let Some(cause) = self.cut_cause_of(tracked, over, now_ms) {
                cut.push((Arc::clone(tracked), cause));
            }
        }
        for (tracked, cause) in cut {
            self.cut_connection(&mut table, &tracked, cause);
        }
    }

    fn cut_cause_of(&self, tracked: &TrackedConnection, over: Option<usize>, now_ms: u64) -> Option<CutCause> {
        if tracked.verified_signature.take() {
            tracked.last_proved_ms.store(now_ms.max(1), Ordering::Relaxed);
        }
        tracked.budget.note_proved(is_recent(tracked.last_proved_ms.load(Ordering::Relaxed), now_ms));
        let asked = tracked.calls_total.load(Ordering::Relaxed);
        if tracked.is_busy() || tracked.calls_total_seen.swap(asked, Ordering::Relaxed) != asked {
            tracked.last_active_ms.store(now_ms, Ordering::Relaxed);
        }
        let since = |then_ms: u64| Duration::from_millis(now_ms.saturating_sub(then_ms));
        let is_stalled =
            |period: usize| tracked.waiting_replies.get(period).is_some_and(|waiting| waiting.load(Ordering::Relaxed) > 0);
        if over.is_some_and(is_stalled) {
            return Some(CutCause::Stalled);
        }
        let proved_ms = tracked.last_proved_ms.load(Ordering::Relaxed);
        if let Some(unsigned) = self.rules.unsigned_timeout {
            // An act that takes long is not cut off.
            let is_acting = proved_ms != 0 && tracked.is_busy();
            if !is_acting && since(proved_ms.max(tracked.opened_ms)) >= unsigned {
                return Some(if proved_ms == 0 { CutCause::Unsigned } else { CutCause::Idle });
            }
        }
        (!tracked.is_busy() && since(tracked.last_used_ms()) >= self.rules.idle_timeout).then_some(CutCause::Idle)
    }

    fn cut_connection(&self, table: &mut ConnectionTable, tracked: &TrackedConnection, cause: CutCause) {
        table.cut_pending += 1;
        tracked.cut_cause.store(cause.index(), Ordering::Release);
        tracked.cut_notify.notify_one();
        self.counters.count_cut(cause);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, ConnectionTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionTable {
    fn is_full(&self, rules: &ConnectionLimits, now_ms: u64) -> bool {
        let staying = self.connections.len().saturating_sub(self.cut_pending);
        if staying >= rules.connections_max {
            return true;
        }
        let others_max = rules.connections_max.saturating_sub(rules.reserved_max);
        rules.reserved_max > 0 && staying >= others_max && {
            let others = self.connections.iter().filter(|tracked| !tracked.is_cut() && !tracked.has_recent_signature(now_ms));
            others.count() >= others_max
        }
    }

    /// The connection to cut, among those compared, and its class. Some connection is always chosen, because whoever holds a key
    /// could otherwise shut all others out.
    fn eviction_candidate(&mut self, rules: &ConnectionLimits, now_ms: u64) -> Option<(EvictionClass, Arc<TrackedConnection>)> {
        let compared = self.connections.len().min(CANDIDATES_MAX);
        let start = self.cursor;
        self.cursor = self.cursor.wrapping_add(compared);
        let candidates =
            (0..compared).filter_map(|step| self.connections.get((start.wrapping_add(step)) % self.connections.len()));
        let ranked = candidates.filter(|tracked| !tracked.is_cut()).map(|tracked| {
            let (class, since_ms) = tracked.eviction_rank(rules, now_ms);
            // The peer with the most connections loses one first.
            let of_peer = self.count_by_peer.get(&tracked.peer).copied().unwrap_or_default();
            ((class, Reverse(of_peer), since_ms, tracked.id), tracked)
        });
        ranked.min_by_key(|(rank, _)| *rank).map(|((class, ..), tracked)| (class, Arc::clone(tracked)))
    }

    fn insert(&mut self, tracked: &Arc<TrackedConnection>) {
        self.index_by_id.insert(tracked.id, self.connections.len());
        *self.count_by_peer.entry(tracked.peer).or_default() += 1;
        self.connections.push(Arc::clone(tracked));
    }

    fn remove(&mut self, tracked: &TrackedConnection) {
        let Some(index) = self.index_by_id.remove(&tracked.id) else { return };
        self.connections.swap_remove(index);
        if let Some(moved) = self.connections.get(index) {
            self.index_by_id.insert(moved.id, index);
        }
        if tracked.is_cut() {
            self.cut_pending = self.cut_pending.saturating_sub(1);
        }
        if let Some(count) = self.count_by_peer.get_mut(&tracked.peer) {
            *count -= 1;
            if *count == 0 {
                self.count_by_peer.remove(&tracked.peer);
            }
        }
    }
}

/// Why a connection is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdmissionError {
    /// Every connection that could be cut is new.
    New,
    /// The connections that were cut are not closed yet.
    CutPending,
}

/// The slot of a connection on its listener, released on drop.
#[derive(Debug)]
pub(super) struct ConnectionSlot {
    registry: Arc<ConnectionRegistry>,
    pub(super) connection: Arc<TrackedConnection>,
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.connection);
    }
}

#[cfg(test)]
pub(super) mod tests;
