//! The connections of one listener: which are admitted, which are cut when it is full, and which have been idle too long.
//!
//! A full listener cuts one connection for each new one, so that idle connections keep nobody out. It first cuts connections on
//! which no signature was ever verified, then idle ones before busy ones, and the oldest first. A request takes no lock and reads
//! no clock here: it only counts, and [`Registry::sweep`] reads the counts. Look next at `listen.rs`, which admits connections, and
//! at `call.rs`.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::budget::{Account, Pool};
use super::counters::{Counters, Cut};
use crate::model::connection::Standing;
use crate::model::limits::{SIGNED_LATELY_MS, WINDOWS_BYTES_MAX};

/// Most connections that are cut but still open. At this number nothing is admitted until one of them closes.
pub(super) const LEAVING_MAX: usize = 32;
/// Most connections that are compared to find an eviction candidate.
const COMPARED_MAX: usize = 256;
/// Number of periods in which a waiting reply is counted. The oldest one is over.
const PERIODS: usize = 4;
/// The smallest HTTP/2 flow-control window, with which every connection begins.
const WINDOW_BYTES_MIN: usize = 65_535;

/// The limits on the connections of a listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) connections_max: usize,
    /// Slots, out of all, that are reserved for connections on which a signature was verified recently.
    pub(super) kept_max: usize,
    /// A connection without a call for this long is closed.
    pub(super) idle: Duration,
    /// A connection without a verified signature for this long is cut, if the listener requires signatures.
    pub(super) unsigned: Option<Duration>,
    /// A connection that takes no part of a reply for this long is cut.
    pub(super) stall: Duration,
    pub(super) window_bytes_max: usize,
    pub(super) own_bytes: usize,
    pub(super) connection_bytes_max: usize,
    pub(super) pool_bytes_max: usize,
}

/// One connection, as all its users share it.
#[derive(Debug)]
pub(super) struct Tracked {
    id: u64,
    peer: IpAddr,
    pub(super) standing: Arc<Standing>,
    pub(super) account: Arc<Account>,
    pub(super) counters: Arc<Counters>,
    /// The bytes that the peer may send before they are read.
    pub(super) window_bytes: u32,
    opened_ms: u64,
    /// When a sweep last saw it with a call.
    active_ms: AtomicU64,
    /// When a sweep last saw a verified signature on it; 0 means never.
    proved_ms: AtomicU64,
    /// Calls under way, and calls ever.
    calls: AtomicU32,
    asked: AtomicU32,
    asked_seen: AtomicU32,
    /// Bytes of whole messages that were read since the last [`Self::take_read`].
    read_whole: AtomicUsize,
    /// Replies that wait for the peer, by the period in which the wait began.
    waiting: [AtomicU32; PERIODS],
    period: Arc<AtomicUsize>,
    cut: AtomicU8,
    cut_now: Notify,
}

impl Tracked {
    /// Counts the start of a call.
    pub(super) fn begin_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.asked.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the end of a call, once its reply is handed on.
    pub(super) fn end_call(&self) {
        self.calls.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts a reply that begins to wait for the peer. Pass the returned period to [`Self::end_wait`].
    pub(super) fn begin_wait(&self) -> usize {
        let period = self.period.load(Ordering::Relaxed) % PERIODS;
        if let Some(waiting) = self.waiting.get(period) {
            waiting.fetch_add(1, Ordering::Relaxed);
        }
        period
    }

    /// Counts the end of that wait.
    pub(super) fn end_wait(&self, period: usize) {
        if let Some(waiting) = self.waiting.get(period) {
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Counts a message that was read whole.
    pub(super) fn note_read(&self, bytes: usize) {
        self.read_whole.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes the bytes of whole messages read since the last call. They belong to the call that is being polled, because one thread
    /// serves the connection and polls one call at a time.
    pub(super) fn take_read(&self) -> usize {
        match self.read_whole.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.read_whole.swap(0, Ordering::Relaxed),
        }
    }

    /// Waits until the connection is to be closed; returns the cause.
    pub(super) async fn cut(&self) -> Cut {
        loop {
            if let Some(cause) = Cut::from_index(self.cut.load(Ordering::Acquire)) {
                return cause;
            }
            self.cut_now.notified().await;
        }
    }

    fn is_cut(&self) -> bool {
        Cut::from_index(self.cut.load(Ordering::Acquire)).is_some()
    }

    fn has_proved_lately(&self, now_ms: u64) -> bool {
        let proved_ms = self.proved_ms.load(Ordering::Relaxed);
        self.standing.has_proved() || (proved_ms != 0 && now_ms.saturating_sub(proved_ms) < SIGNED_LATELY_MS)
    }

    /// When a sweep last saw it in use.
    fn used_ms(&self) -> u64 {
        self.active_ms.load(Ordering::Relaxed)
    }

    fn is_busy(&self) -> bool {
        self.calls.load(Ordering::Relaxed) > 0
    }
}

#[derive(Debug, Default)]
struct Table {
    members: Vec<Arc<Tracked>>,
    places: HashMap<u64, usize>,
    by_peer: HashMap<IpAddr, usize>,
    /// Where the next comparison begins.
    cursor: usize,
    leaving: usize,
}

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct Registry {
    rules: Rules,
    counters: Arc<Counters>,
    pool: Arc<Pool>,
    period: Arc<AtomicUsize>,
    started: Instant,
    table: Mutex<Table>,
}

impl Registry {
    pub(super) fn new(rules: Rules, counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self {
            rules,
            counters,
            pool: Arc::new(Pool::new(rules.pool_bytes_max)),
            period: Arc::default(),
            started: Instant::now(),
            table: Mutex::default(),
        })
    }

    /// Bytes that waiting calls hold, beyond each connection's own share.
    pub(super) fn shared_bytes(&self) -> usize {
        self.pool.used()
    }

    /// Admits one more connection. If the listener is full, it cuts the eviction candidate.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn admit(self: &Arc<Self>, id: u64, peer: IpAddr) -> Result<Admitted, Full> {
        let now_ms = self.now_ms();
        let mut table = self.lock();
        if table.is_full(&self.rules, now_ms) {
            if table.leaving >= LEAVING_MAX {
                return Err(Full::Leaving);
            }
            let missed_least = table.missed_least(now_ms).ok_or(Full::Busy)?;
            self.cut(&mut table, &missed_least, Cut::Displaced);
        }
        let open = table.members.len().saturating_add(1);
        let window = (WINDOWS_BYTES_MAX / open).clamp(WINDOW_BYTES_MIN, self.rules.window_bytes_max.max(WINDOW_BYTES_MIN));
        let Rules { own_bytes, connection_bytes_max, .. } = self.rules;
        let tracked = Arc::new(Tracked {
            id,
            peer,
            standing: Arc::default(),
            account: Arc::new(Account::new(Arc::clone(&self.pool), own_bytes, connection_bytes_max)),
            counters: Arc::clone(&self.counters),
            window_bytes: u32::try_from(window).unwrap_or(u32::MAX),
            opened_ms: now_ms,
            active_ms: AtomicU64::new(now_ms),
            proved_ms: AtomicU64::new(0),
            calls: AtomicU32::new(0),
            asked: AtomicU32::new(0),
            asked_seen: AtomicU32::new(0),
            read_whole: AtomicUsize::new(0),
            waiting: Default::default(),
            period: Arc::clone(&self.period),
            cut: AtomicU8::new(Cut::NONE),
            cut_now: Notify::new(),
        });
        table.insert(&tracked);
        Ok(Admitted { registry: Arc::clone(self), tracked })
    }

    /// Sweeps all connections until it is dropped.
    pub(super) async fn sweep_forever(&self) {
        let Rules { idle, unsigned, stall, .. } = self.rules;
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
            next % PERIODS
        });
        let mut cut = Vec::new();
        for tracked in table.members.iter().filter(|tracked| !tracked.is_cut()) {
            if let Some(cause) = self.due(tracked, over, now_ms) {
                cut.push((Arc::clone(tracked), cause));
            }
        }
        for (tracked, cause) in cut {
            self.cut(&mut table, &tracked, cause);
        }
    }

    fn due(&self, tracked: &Tracked, over: Option<usize>, now_ms: u64) -> Option<Cut> {
        if tracked.standing.take_proved() {
            tracked.proved_ms.store(now_ms.max(1), Ordering::Relaxed);
        }
        let asked = tracked.asked.load(Ordering::Relaxed);
        if tracked.is_busy() || tracked.asked_seen.swap(asked, Ordering::Relaxed) != asked {
            tracked.active_ms.store(now_ms, Ordering::Relaxed);
        }
        let since = |then_ms: u64| Duration::from_millis(now_ms.saturating_sub(then_ms));
        let is_stalled = |period: usize| tracked.waiting.get(period).is_some_and(|waiting| waiting.load(Ordering::Relaxed) > 0);
        if over.is_some_and(is_stalled) {
            return Some(Cut::Stalled);
        }
        let proved_ms = tracked.proved_ms.load(Ordering::Relaxed);
        if let Some(unsigned) = self.rules.unsigned {
            // An act that takes long is not cut off.
            let is_acting = proved_ms != 0 && tracked.is_busy();
            if !is_acting && since(proved_ms.max(tracked.opened_ms)) >= unsigned {
                return Some(if proved_ms == 0 { Cut::Unsigned } else { Cut::Idle });
            }
        }
        (!tracked.is_busy() && since(tracked.used_ms()) >= self.rules.idle).then_some(Cut::Idle)
    }

    fn cut(&self, table: &mut Table, tracked: &Tracked, cause: Cut) {
        table.leaving += 1;
        tracked.cut.store(cause.index(), Ordering::Release);
        tracked.cut_now.notify_one();
        self.counters.count_cut(cause);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn is_full(&self, rules: &Rules, now_ms: u64) -> bool {
        let staying = self.members.len().saturating_sub(self.leaving);
        if staying >= rules.connections_max {
            return true;
        }
        let others_max = rules.connections_max.saturating_sub(rules.kept_max);
        rules.kept_max > 0 && staying >= others_max && {
            let others = self.members.iter().filter(|tracked| !tracked.is_cut() && !tracked.has_proved_lately(now_ms));
            others.count() >= others_max
        }
    }

    /// The connection to cut, among those compared. A busy connection with a recent signature is never chosen.
    fn missed_least(&mut self, now_ms: u64) -> Option<Arc<Tracked>> {
        let compared = self.members.len().min(COMPARED_MAX);
        let start = self.cursor;
        self.cursor = self.cursor.wrapping_add(compared);
        let candidates = (0..compared).filter_map(|step| self.members.get((start.wrapping_add(step)) % self.members.len()));
        let ranked = candidates.filter(|tracked| !tracked.is_cut()).filter_map(|tracked| {
            let rank = match (tracked.has_proved_lately(now_ms), tracked.is_busy()) {
                (false, false) => 0,
                (false, true) => 1,
                (true, false) => 2,
                (true, true) => return None,
            };
            // The peer with the most connections loses one first.
            let of_peer = self.by_peer.get(&tracked.peer).copied().unwrap_or_default();
            Some(((rank, Reverse(of_peer), tracked.used_ms(), tracked.id), tracked))
        });
        ranked.min_by_key(|(rank, _)| *rank).map(|(_, tracked)| Arc::clone(tracked))
    }

    fn insert(&mut self, tracked: &Arc<Tracked>) {
        self.places.insert(tracked.id, self.members.len());
        *self.by_peer.entry(tracked.peer).or_default() += 1;
        self.members.push(Arc::clone(tracked));
    }

    fn remove(&mut self, tracked: &Tracked) {
        let Some(place) = self.places.remove(&tracked.id) else { return };
        self.members.swap_remove(place);
        if let Some(moved) = self.members.get(place) {
            self.places.insert(moved.id, place);
        }
        if tracked.is_cut() {
            self.leaving = self.leaving.saturating_sub(1);
        }
        if let Some(count) = self.by_peer.get_mut(&tracked.peer) {
            *count -= 1;
            if *count == 0 {
                self.by_peer.remove(&tracked.peer);
            }
        }
    }
}

/// Why a connection is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// No connection can be cut.
    Busy,
    /// The connections that were cut are not closed yet.
    Leaving,
}

/// The slot of a connection on its listener, released on drop.
#[derive(Debug)]
pub(super) struct Admitted {
    registry: Arc<Registry>,
    pub(super) tracked: Arc<Tracked>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.tracked);
    }
}

#[cfg(test)]
pub(super) mod tests;
