//! Who is at the other end of a connection, as far as the transport knows.
//!
//! `server` puts it into the extensions of every request; `api` and `service` read it there. It proves no identity. Look next
//! at `server/connection.rs`, which makes it.

use std::sync::Arc;

/// The peer of one accepted connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// Unique within the process, counted from 1.
    pub connection_id: u64,
    /// The peer's socket address, `HOST:PORT`.
    pub address: Arc<str>,
    /// Whether the peer is on this machine.
    pub is_loopback: bool,
}
