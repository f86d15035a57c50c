//! What the transport knows about the other end of a connection; put there by `server`, read by `api`.

use std::sync::Arc;

/// The peer of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// Unique within the process, never used again.
    pub connection_id: u64,
    /// The address as text, for the audit log.
    pub address: Arc<str>,
    /// Whether the peer is on this machine.
    pub is_loopback: bool,
}
