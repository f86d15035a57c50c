//! The section `limits` of the settings: how much the listeners take, and how long they wait.
//!
//! Each key sets one field of [`server::Settings`], whose bounds hold here too. Most servers need none of them. Limits on what one message
//! may hold are part of the interface and cannot be set: see `model/limits.rs`.

use crate::model::duration;
use crate::server;

/// Keys of the section.
pub(super) const KEYS: &[&str] = &[
    "limits.connections_max",
    "limits.control_connections_max",
    "limits.streams_per_connection_max",
    "limits.waiting_bytes_max",
    "limits.admin_waiting_bytes_max",
    "limits.connection_waiting_bytes_max",
    "limits.idle_timeout",
    "limits.unsigned_timeout",
    "limits.write_stall_timeout",
];

/// Limits of the listeners that an operator can set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections to the decisions' listener.
    pub connections_max: usize,
    /// Connections to each of the other two listeners.
    pub control_connections_max: usize,
    /// Calls in flight on one connection.
    pub streams_per_connection_max: u32,
    /// Bytes of the calls that wait on the decisions' listener, beyond each connection's own.
    pub waiting_bytes_max: usize,
    /// The same for the administration's listener.
    pub admin_waiting_bytes_max: usize,
    /// Bytes of the calls that wait on one connection to the decisions' listener.
    pub connection_waiting_bytes_max: usize,
    /// A connection without a call for so long is closed.
    pub idle_timeout_ms: u64,
    /// A connection to the administration's listener without a verified signature for so long is cut.
    pub unsigned_timeout_ms: u64,
    /// A connection whose peer takes no bytes of a reply for so long is cut.
    pub write_stall_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let server::Settings {
            connections_max,
            control_connections_max,
            streams_per_connection_max,
            waiting_bytes_max,
            admin_waiting_bytes_max,
            connection_waiting_bytes_max,
            idle_timeout_ms,
            unsigned_timeout_ms,
            write_stall_timeout_ms,
            ..
        } = server::Settings::default();
        Self {
            connections_max,
            control_connections_max,
            streams_per_connection_max,
            waiting_bytes_max,
            admin_waiting_bytes_max,
            connection_waiting_bytes_max,
            idle_timeout_ms,
            unsigned_timeout_ms,
            write_stall_timeout_ms,
        }
    }
}

impl Limits {
    /// These limits, with everything else of `settings`.
    pub fn within(&self, settings: server::Settings) -> server::Settings {
        let Self {
            connections_max,
            control_connections_max,
            streams_per_connection_max,
            waiting_bytes_max,
            admin_waiting_bytes_max,
            connection_waiting_bytes_max,
            idle_timeout_ms,
            unsigned_timeout_ms,
            write_stall_timeout_ms,
        } = *self;
        server::Settings {
            connections_max,
            control_connections_max,
            streams_per_connection_max,
            waiting_bytes_max,
            admin_waiting_bytes_max,
            connection_waiting_bytes_max,
            idle_timeout_ms,
            unsigned_timeout_ms,
            write_stall_timeout_ms,
            ..settings
        }
    }

    /// Sets the limit of a key, as in `limits.idle_timeout`.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "limits.connections_max" => self.connections_max = number(key, value)?,
            "limits.control_connections_max" => self.control_connections_max = number(key, value)?,
            "limits.streams_per_connection_max" => self.streams_per_connection_max = number(key, value)?,
            "limits.waiting_bytes_max" => self.waiting_bytes_max = number(key, value)?,
            "limits.admin_waiting_bytes_max" => self.admin_waiting_bytes_max = number(key, value)?,
            "limits.connection_waiting_bytes_max" => self.connection_waiting_bytes_max = number(key, value)?,
            "limits.idle_timeout" => self.idle_timeout_ms = duration(key, value)?,
            "limits.unsigned_timeout" => self.unsigned_timeout_ms = duration(key, value)?,
            "limits.write_stall_timeout" => self.write_stall_timeout_ms = duration(key, value)?,
            _ => return Err(format!("unknown key `{key}`")),
        }
        match self.within(server::Settings::default()).validate() {
            Err(server::Error::Setting { min, max, .. }) => {
                let unit = if key.ends_with("_timeout") { " ms" } else { "" };
                Err(format!("`{key}`: `{value}` is not from {min}{unit} to {max}{unit}"))
            }
            checked => checked.map_err(|error| error.to_string()),
        }
    }
}

fn number<N: std::str::FromStr>(key: &str, value: &str) -> Result<N, String> {
    value.parse().map_err(|_| format!("`{key}`: `{value}` is not a whole number that can be counted to"))
}

fn duration(key: &str, value: &str) -> Result<u64, String> {
    duration::parse_ms(value).map_err(|problem| format!("`{key}`: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_sets_its_limit_within_bounds() {
        let defaults = server::Settings::default();
        assert_eq!(Limits::default().within(server::Settings::default()), defaults);
        let bytes = 1024 * 1024;
        let expected = |key: &str| match key {
            "limits.connections_max" => server::Settings { connections_max: 17, ..defaults.clone() },
            "limits.control_connections_max" => server::Settings { control_connections_max: 17, ..defaults.clone() },
            "limits.streams_per_connection_max" => server::Settings { streams_per_connection_max: 17, ..defaults.clone() },
            "limits.waiting_bytes_max" => server::Settings { waiting_bytes_max: bytes, ..defaults.clone() },
            "limits.admin_waiting_bytes_max" => server::Settings { admin_waiting_bytes_max: bytes, ..defaults.clone() },
            "limits.connection_waiting_bytes_max" => server::Settings { connection_waiting_bytes_max: bytes, ..defaults.clone() },
            "limits.idle_timeout" => server::Settings { idle_timeout_ms: 90_000, ..defaults.clone() },
            "limits.unsigned_timeout" => server::Settings { unsigned_timeout_ms: 90_000, ..defaults.clone() },
            _ => server::Settings { write_stall_timeout_ms: 90_000, ..defaults.clone() },
        };
        for key in KEYS {
            let value = if key.ends_with("_timeout") {
                "90s".to_owned()
            } else if key.ends_with("_bytes_max") {
                bytes.to_string()
            } else {
                "17".to_owned()
            };
            let mut limits = Limits::default();
            limits.set(key, &value).unwrap();
            assert_eq!(limits.within(server::Settings::default()), expected(key), "{key}");
            for bad in ["-1", "many", "99999999999999999999", "0.5", "", "9999999999999"] {
                assert!(Limits::default().set(key, bad).unwrap_err().contains(*key), "{key}: {bad}");
            }
        }
        let refused = |key: &str, value: &str| Limits::default().set(key, value).unwrap_err();
        assert_eq!(refused("limits.connections_max", "0"), "`limits.connections_max`: `0` is not from 1 to 1000000");
        assert_eq!(refused("limits.idle_timeout", "25h"), "`limits.idle_timeout`: `25h` is not from 1 ms to 86400000 ms");
    }
}
