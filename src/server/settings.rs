//! The settings of listeners, connections and the drain, and the bounds of each.
//!
//! [`Settings::validate`] checks the values before anything is bound, because the HTTP libraries panic on some of them. Look next
//! at `acceptor.rs`, which binds.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::connection_registry::ConnectionLimits;
use super::{Error, ListenerRole};
use crate::model::limits::{
    ADMIN_LISTENER_BYTES_MAX, ADMIN_STREAMS_PER_CONNECTION_MAX, CONNECTION_BYTES_MAX, CONNECTION_GRACE_MS,
    CONNECTION_RESERVED_BYTES, CONNECTIONS_MAX, CONTROL_CONNECTIONS_MAX, DECISION_LISTENER_BYTES_MAX, IDLE_CONNECTION_TIMEOUT_MS,
    SIGNED_CONNECTIONS_RESERVED, STREAMS_PER_CONNECTION_MAX, UNSIGNED_CONNECTION_TIMEOUT_MS,
};

/// Connections that a full listener admits in a second at least, if nobody on it has proved anything.
const ADMISSIONS_PER_S_MIN: u64 = 1_000;

/// Addresses, limits and timeouts of the listeners.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Address for decisions (gRPC). Port 0 takes any free port.
    pub decisions_address: SocketAddr,
    /// Address for health and metrics (HTTP/1.1).
    pub http_address: SocketAddr,
    /// Address for administration (gRPC).
    pub admin_address: SocketAddr,
    /// Runtimes that answer decisions, one thread each; 1 to 64.
    pub decision_runtimes: usize,
    /// Most open connections of the decisions' listener. For one more, another is cut.
    pub connections_max: usize,
    /// The same limit for each of the other two listeners.
    pub control_connections_max: usize,
    /// Slots of the administration's listener that are reserved for connections that signed an act recently; at most an eighth of
    /// all.
    pub signed_connections_kept: usize,
    /// A connection without a call for this long is closed.
    pub idle_timeout_ms: u64,
    /// A connection to the administration's listener that has signed nothing for this long is cut.
    pub unsigned_timeout_ms: u64,
    /// Bytes that waiting calls on the decisions' listener may hold, beyond each connection's own share.
    pub waiting_bytes_max: usize,
    /// The same limit for the administration's listener.
    pub admin_waiting_bytes_max: usize,
    /// Bytes that the calls of one connection to the decisions' listener may hold.
    pub connection_waiting_bytes_max: usize,
    /// Most calls in flight on one connection; at most [`ADMIN_STREAMS_PER_CONNECTION_MAX`] on the administration's listener.
    pub streams_per_connection_max: u32,
    /// HTTP/2 flow-control window of a stream and of a connection.
    pub window_bytes: u32,
    /// Largest headers of one request, all together.
    pub header_bytes_max: u32,
    /// Largest body of one HTTP/1.1 request.
    pub http_body_bytes_max: usize,
    /// Longest time for the first bytes of a connection (HTTP/2 preface), and for the headers of an HTTP/1.1 request.
    pub handshake_timeout_ms: u64,
    /// Longest time for one HTTP/1.1 request, from its headers to the head of its response.
    pub http_request_timeout_ms: u64,
    /// A connection whose peer takes no bytes for this long is cut.
    pub write_stall_timeout_ms: u64,
    /// Interval between pings of an HTTP/2 connection.
    pub keepalive_interval_ms: u64,
    /// An HTTP/2 connection that does not answer a ping within this time is cut.
    pub keepalive_timeout_ms: u64,
    /// Longest time for calls in flight once the server drains. Then their connections are cut.
    pub drain_timeout_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            decisions_address: loopback(7700),
            http_address: loopback(7701),
            admin_address: loopback(7702),
            decision_runtimes: 2,
            connections_max: CONNECTIONS_MAX,
            control_connections_max: CONTROL_CONNECTIONS_MAX,
            signed_connections_kept: SIGNED_CONNECTIONS_RESERVED,
            idle_timeout_ms: IDLE_CONNECTION_TIMEOUT_MS,
            unsigned_timeout_ms: UNSIGNED_CONNECTION_TIMEOUT_MS,
            waiting_bytes_max: DECISION_LISTENER_BYTES_MAX,
            admin_waiting_bytes_max: ADMIN_LISTENER_BYTES_MAX,
            connection_waiting_bytes_max: CONNECTION_BYTES_MAX,
            streams_per_connection_max: STREAMS_PER_CONNECTION_MAX,
            window_bytes: 1024 * 1024,
            header_bytes_max: 16 * 1024,
            http_body_bytes_max: 1024 * 1024,
            handshake_timeout_ms: 5_000,
            http_request_timeout_ms: 10_000,
            write_stall_timeout_ms: 20_000,
            keepalive_interval_ms: 20_000,
            keepalive_timeout_ms: 10_000,
            drain_timeout_ms: 10_000,
        }
    }
}

impl Settings {
    /// Checks that the server can work with every number.
    ///
    /// # Errors
    /// [`Error::Setting`], for the first number out of bounds.
    pub fn validate(&self) -> Result<(), Error> {
        const HOUR_MS: u64 = 3_600_000;
        const GIB: u64 = 1024 * 1024 * 1024;
        let to_u64 = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        for (name, value, min, max) in [
            ("decision_runtimes", to_u64(self.decision_runtimes), 1, 64),
            ("connections_max", to_u64(self.connections_max), 1, 1_000_000),
            ("control_connections_max", to_u64(self.control_connections_max), 1, 1_000_000),
            ("signed_connections_kept", to_u64(self.signed_connections_kept), 0, 1_000_000),
            ("idle_timeout_ms", self.idle_timeout_ms, 1, 24 * HOUR_MS),
            ("unsigned_timeout_ms", self.unsigned_timeout_ms, 1, 24 * HOUR_MS),
            ("waiting_bytes_max", to_u64(self.waiting_bytes_max), 0, 64 * GIB),
            ("admin_waiting_bytes_max", to_u64(self.admin_waiting_bytes_max), 0, 64 * GIB),
            (
                "connection_waiting_bytes_max",
                to_u64(self.connection_waiting_bytes_max),
                to_u64(CONNECTION_RESERVED_BYTES),
                64 * GIB,
            ),
            ("streams_per_connection_max", u64::from(self.streams_per_connection_max), 1, 10_000),
            ("window_bytes", u64::from(self.window_bytes), 65_535, 64 * 1024 * 1024),
            ("header_bytes_max", u64::from(self.header_bytes_max), 8192, 1024 * 1024),
            ("http_body_bytes_max", to_u64(self.http_body_bytes_max), 1, 64 * 1024 * 1024),
            ("handshake_timeout_ms", self.handshake_timeout_ms, 1, HOUR_MS),
            ("http_request_timeout_ms", self.http_request_timeout_ms, 1, HOUR_MS),
            ("write_stall_timeout_ms", self.write_stall_timeout_ms, 1, HOUR_MS),
            ("keepalive_interval_ms", self.keepalive_interval_ms, 100, HOUR_MS),
            ("keepalive_timeout_ms", self.keepalive_timeout_ms, 100, HOUR_MS),
            ("drain_timeout_ms", self.drain_timeout_ms, 0, HOUR_MS),
        ] {
            if !(min..=max).contains(&value) {
                return Err(Error::Setting { name, value, min, max });
            }
        }
        Ok(())
    }

    /// Most calls in flight on one connection of a listener.
    pub(super) fn streams_max(&self, role: ListenerRole) -> u32 {
        match role {
            ListenerRole::Admin => self.streams_per_connection_max.min(ADMIN_STREAMS_PER_CONNECTION_MAX),
            ListenerRole::Decisions | ListenerRole::Http => self.streams_per_connection_max,
        }
    }

    /// The limits on the connections of a listener.
    pub(super) fn connection_limits(&self, role: ListenerRole) -> ConnectionLimits {
        let is_admin = role == ListenerRole::Admin;
        let connections_max = if role == ListenerRole::Decisions { self.connections_max } else { self.control_connections_max };
        ConnectionLimits {
            connections_max,
            reserved_max: if is_admin { self.signed_connections_kept.min(connections_max / 8) } else { 0 },
            idle_timeout: Duration::from_millis(self.idle_timeout_ms),
            unsigned_timeout: is_admin.then(|| Duration::from_millis(self.unsigned_timeout_ms)),
            // Nothing is signed over HTTP/1.1, so there is nothing to wait for.
            grace: if role == ListenerRole::Http { Duration::ZERO } else { connection_grace(connections_max) },
            stall_timeout: Duration::from_millis(self.write_stall_timeout_ms),
            window_bytes_max: usize::try_from(self.window_bytes).unwrap_or(usize::MAX),
            own_bytes: CONNECTION_RESERVED_BYTES,
            // A signer may send a policy folder. No message is read from anyone else on that listener.
            connection_bytes_max: if is_admin { self.admin_waiting_bytes_max } else { self.connection_waiting_bytes_max },
            pool_bytes_max: if is_admin { self.admin_waiting_bytes_max } else { self.waiting_bytes_max },
        }
    }
}

/// The grace of a new connection on a listener with so many slots. Fewer slots have a shorter grace, so that a full listener still
/// admits [`ADMISSIONS_PER_S_MIN`] connections a second: otherwise an operator waits in the queue of the kernel behind a flood.
fn connection_grace(connections_max: usize) -> Duration {
    let slots = u64::try_from(connections_max).unwrap_or(u64::MAX);
    Duration::from_millis(CONNECTION_GRACE_MS.min(slots.saturating_mul(1000) / ADMISSIONS_PER_S_MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_slots_have_a_short_grace() {
        let check = |slots: usize, grace_ms: u64| assert_eq!(connection_grace(slots), Duration::from_millis(grace_ms), "{slots}");
        check(4096, CONNECTION_GRACE_MS);
        check(256, CONNECTION_GRACE_MS);
        check(100, 100);
        check(16, 16);
        check(1, 1);
    }
}
