//! Who is at the other end of a connection, as far as the transport knows.
//!
//! `server` puts it into the extensions of every request; `api` and `service` read it there. It proves no identity. Look next
//! at `server/connection.rs`, which makes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The peer of one accepted connection.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Unique within the process, counted from 1.
    pub connection_id: u64,
    /// The peer's socket address, `HOST:PORT`.
    pub address: Arc<str>,
    /// Whether the peer is on this machine.
    pub is_loopback: bool,
    /// What the connection has shown so far.
    pub standing: Arc<Standing>,
}

/// Whether a connection has shown a signature of somebody who is known here. Where too many are open, the others go first.
#[derive(Debug, Default)]
pub struct Standing {
    has_proved: AtomicBool,
}

impl Standing {
    /// Notes that a signature was verified: an operator's act, or the chain of a call.
    pub fn prove(&self) {
        // Every decision comes by here: the cache line is written only where somebody has looked since.
        if !self.has_proved.load(Ordering::Relaxed) {
            self.has_proved.store(true, Ordering::Relaxed);
        }
    }

    /// Whether one was verified since [`Standing::take_proved`].
    pub fn has_proved(&self) -> bool {
        self.has_proved.load(Ordering::Relaxed)
    }

    /// The same, and begins anew.
    pub fn take_proved(&self) -> bool {
        self.has_proved.swap(false, Ordering::Relaxed)
    }
}
