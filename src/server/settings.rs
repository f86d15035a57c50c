//! What an operator can set about listeners, connections and draining, and how far each may go.
//!
//! Values are checked in [`Settings::validate`], before anything is bound: the HTTP libraries below panic on some of them.
//! Look next at `listen.rs`, which binds.

use std::net::{Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::model::limits::{CONNECTIONS_MAX, STREAMS_PER_CONNECTION_MAX};

/// Addresses, limits and timeouts of the listeners.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where decisions are asked for (gRPC). Port 0: any free one.
    pub decisions_address: SocketAddr,
    /// Where health and metrics are read (HTTP/1.1).
    pub http_address: SocketAddr,
    /// Where the server is administered (gRPC).
    pub admin_address: SocketAddr,
    /// Runtimes, each one thread, that answer decisions; 1 to 64.
    pub decision_runtimes: usize,
    /// Connections that the decisions' listener keeps open; one more is closed at once.
    pub connections_max: usize,
    /// The same for each of the other two listeners.
    pub control_connections_max: usize,
    /// Calls in flight on one connection.
    pub streams_per_connection_max: u32,
    /// HTTP/2 flow-control window of a stream and of a connection.
    pub window_bytes: u32,
    /// Headers of one request, all together.
    pub header_bytes_max: u32,
    /// Body of one HTTP/1.1 request.
    pub http_body_bytes_max: usize,
    /// Time for the first bytes of a connection (HTTP/2 preface), and for the headers of an HTTP/1.1 request.
    pub handshake_timeout_ms: u64,
    /// Time for one HTTP/1.1 request from its headers to the head of its response.
    pub http_request_timeout_ms: u64,
    /// A connection whose peer takes no bytes for this long is cut.
    pub write_stall_timeout_ms: u64,
    /// An HTTP/2 connection is pinged this often.
    pub keepalive_interval_ms: u64,
    /// An HTTP/2 connection that does not answer a ping within this time is cut.
    pub keepalive_timeout_ms: u64,
    /// Time for calls in flight once the server drains; then their connections are cut.
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
            control_connections_max: 256,
            streams_per_connection_max: STREAMS_PER_CONNECTION_MAX,
            window_bytes: 1024 * 1024,
            header_bytes_max: 16 * 1024,
            http_body_bytes_max: 1024 * 1024,
            handshake_timeout_ms: 10_000,
            http_request_timeout_ms: 10_000,
            write_stall_timeout_ms: 20_000,
            keepalive_interval_ms: 20_000,
            keepalive_timeout_ms: 10_000,
            drain_timeout_ms: 10_000,
        }
    }
}

impl Settings {
    /// Checks every number against what the server can work with.
    ///
    /// # Errors
    /// [`Error::Setting`], for the first one out of bounds.
    pub fn validate(&self) -> Result<(), Error> {
        const HOUR_MS: u64 = 3_600_000;
        let wide = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        for (name, value, least, most) in [
            ("decision_runtimes", wide(self.decision_runtimes), 1, 64),
            ("connections_max", wide(self.connections_max), 1, 1_000_000),
            ("control_connections_max", wide(self.control_connections_max), 1, 1_000_000),
            ("streams_per_connection_max", u64::from(self.streams_per_connection_max), 1, 10_000),
            ("window_bytes", u64::from(self.window_bytes), 65_535, 64 * 1024 * 1024),
            ("header_bytes_max", u64::from(self.header_bytes_max), 8192, 1024 * 1024),
            ("http_body_bytes_max", wide(self.http_body_bytes_max), 1, 64 * 1024 * 1024),
            ("handshake_timeout_ms", self.handshake_timeout_ms, 1, HOUR_MS),
            ("http_request_timeout_ms", self.http_request_timeout_ms, 1, HOUR_MS),
            ("write_stall_timeout_ms", self.write_stall_timeout_ms, 1, HOUR_MS),
            ("keepalive_interval_ms", self.keepalive_interval_ms, 100, HOUR_MS),
            ("keepalive_timeout_ms", self.keepalive_timeout_ms, 100, HOUR_MS),
            ("drain_timeout_ms", self.drain_timeout_ms, 0, HOUR_MS),
        ] {
            if !(least..=most).contains(&value) {
                return Err(Error::Setting { name, value, least, most });
            }
        }
        Ok(())
    }
}
