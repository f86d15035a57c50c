//! The counts of a listener: its connections and calls, and why some were cut or refused.
//!
//! The counts are read with relaxed loads. Look next at `connection_registry.rs`, which cuts connections, and at `request_body.rs`, which refuses calls.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::api::CallRefusal;

/// Why a connection was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutCause {
    /// It had no call for too long.
    Idle,
    /// No act was signed on it in time.
    Unsigned,
    /// The listener was full, and this connection was the eviction candidate.
    Displaced,
    /// Its peer took no part of a reply for too long.
    Stalled,
    /// Its handshake took too long.
    Handshake,
    /// Its peer took no bytes for too long.
    WriteStall,
    /// A record could not be written.
    Barrier,
    /// Its peer sent too many frames that carry no call.
    Frames,
}

impl CutCause {
    const ALL: [Self; 8] = [
        Self::Idle,
        Self::Unsigned,
        Self::Displaced,
        Self::Stalled,
        Self::Handshake,
        Self::WriteStall,
        Self::Barrier,
        Self::Frames,
    ];
    /// The index of a connection that is not cut.
    pub(super) const NONE: u8 = u8::MAX;

    pub(super) fn index(self) -> u8 {
        self as u8
    }

    pub(super) fn from_index(index: u8) -> Option<Self> {
        Self::ALL.get(usize::from(index)).copied()
    }

    /// The cause's name in metrics.
    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Unsigned => "unsigned",
            Self::Displaced => "displaced",
            Self::Stalled => "stalled",
            Self::Handshake => "handshake",
            Self::WriteStall => "write_stall",
            Self::Barrier => "barrier",
            Self::Frames => "frames",
        }
    }
}

/// The names of the refusal causes in metrics.
const REFUSAL_CAUSES: [&str; 6] = ["too_large", "too_slow", "malformed", "connection_budget", "listener_budget", "idle_streams"];

/// The counts of one listener.
#[derive(Debug, Default)]
pub(super) struct ListenerCounters {
    pub(super) accepted: AtomicU64,
    pub(super) refused: AtomicU64,
    cuts: [AtomicU64; CutCause::ALL.len()],
    refusals: [AtomicU64; REFUSAL_CAUSES.len()],
    /// Open connections of each runtime.
    pub(super) open: Vec<AtomicUsize>,
}

impl ListenerCounters {
    pub(super) fn new(runtimes: usize) -> Self {
        Self { open: (0..runtimes).map(|_| AtomicUsize::new(0)).collect(), ..Self::default() }
    }

    pub(super) fn open_per_runtime(&self) -> Vec<usize> {
        self.open.iter().map(|open| open.load(Ordering::Relaxed)).collect()
    }

    pub(super) fn count_cut(&self, cause: CutCause) {
        if let Some(count) = self.cuts.get(usize::from(cause.index())) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn count_refusal(&self, refusal: CallRefusal) {
        let index = match refusal {
            CallRefusal::TooLarge { .. } | CallRefusal::TooManyHeaders { .. } => 0,
            CallRefusal::TooSlow { .. } | CallRefusal::DeadlineExceeded => 1,
            CallRefusal::NotOneMessage | CallRefusal::IncompleteMessage => 2,
            CallRefusal::ConnectionBudgetExceeded => 3,
            CallRefusal::ListenerBudgetExceeded => 4,
            CallRefusal::IdleStreams => 5,
        };
        self.count_refusal_cause(index);
    }

    /// Counts a message that a field limit or its form refused.
    pub(super) fn count_malformed(&self) {
        self.count_refusal_cause(2);
    }

    fn count_refusal_cause(&self, index: usize) {
        if let Some(count) = self.refusals.get(index) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Connections cut, by cause.
    pub(super) fn cuts(&self) -> Vec<(&'static str, u64)> {
        CutCause::ALL.iter().zip(&self.cuts).map(|(cause, count)| (cause.name(), count.load(Ordering::Relaxed))).collect()
    }

    /// Calls refused, by cause.
    pub(super) fn refusals(&self) -> Vec<(&'static str, u64)> {
        REFUSAL_CAUSES.iter().zip(&self.refusals).map(|(cause, count)| (*cause, count.load(Ordering::Relaxed))).collect()
    }
}
