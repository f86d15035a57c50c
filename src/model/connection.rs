//! The peer of a connection, as far as the transport knows it.
//!
//! `server` puts [`PeerInfo`] into the extensions of every request; `api` and `service` read it there. It proves no identity. Look next at
//! `server/connection.rs`, which makes it.

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
    /// Whether the connection has carried a verified signature.
    pub verified_signature: Arc<VerifiedSignatureFlag>,
}

/// Whether a connection has carried a verified signature of a known key. A delegation chain without a proof of possession does not
/// count, because chains are not secret.
///
/// If too many connections are open, the server first closes those without a verified signature.
#[derive(Debug, Default)]
pub struct VerifiedSignatureFlag {
    is_set: AtomicBool,
}

impl VerifiedSignatureFlag {
    /// Records that a signature was verified: that of an operator's act, or the proof of possession of a chain in force.
    pub fn set(&self) {
        // Every decision runs this code. The cache line is written only if the flag was cleared since.
        if !self.is_set.load(Ordering::Relaxed) {
            self.is_set.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a signature was verified since the last [`VerifiedSignatureFlag::take`].
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    /// Returns whether a signature was verified since the last call, and clears the flag.
    pub fn take(&self) -> bool {
        self.is_set.swap(false, Ordering::Relaxed)
    }
}
