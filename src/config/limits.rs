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

/// Sets the limit of a key, as in `limits.idle_timeout`.
///
/// # Errors
/// A message if the key is unknown, or if the value is no number or duration within its bounds. The limits may then have changed.
pub(super) fn set_limit(limits: &mut server::Settings, key: &str, value: &str) -> Result<(), String> {
    match key {
        "limits.connections_max" => limits.connections_max = number(key, value)?,
        "limits.control_connections_max" => limits.control_connections_max = number(key, value)?,
        "limits.streams_per_connection_max" => limits.streams_per_connection_max = number(key, value)?,
        "limits.waiting_bytes_max" => limits.waiting_bytes_max = number(key, value)?,
        "limits.admin_waiting_bytes_max" => limits.admin_waiting_bytes_max = number(key, value)?,
        "limits.connection_waiting_bytes_max" => limits.connection_waiting_bytes_max = number(key, value)?,
        "limits.idle_timeout" => limits.idle_timeout_ms = duration(key, value)?,
        "limits.unsigned_timeout" => limits.unsigned_timeout_ms = duration(key, value)?,
        "limits.write_stall_timeout" => limits.write_stall_timeout_ms = duration(key, value)?,
        _ => return Err(format!("unknown key `{key}`")),
    }
    match limits.validate() {
        Err(server::Error::Setting { min, max, .. }) => {
            let unit = if key.ends_with("_timeout") { " ms" } else { "" };
            Err(format!("`{key}`: `{value}` is not from {min}{unit} to {max}{unit}"))
        }
        checked => checked.map_err(|error| error.to_string()),
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
            let mut limits = defaults.clone();
            set_limit(&mut limits, key, &value).unwrap();
            assert_eq!(limits, expected(key), "{key}");
            for bad in ["-1", "many", "99999999999999999999", "0.5", "", "9999999999999"] {
                assert!(set_limit(&mut defaults.clone(), key, bad).unwrap_err().contains(*key), "{key}: {bad}");
            }
        }
        let refused = |key: &str, value: &str| set_limit(&mut defaults.clone(), key, value).unwrap_err();
        assert_eq!(refused("limits.connections_max", "0"), "`limits.connections_max`: `0` is not from 1 to 1000000");
        assert_eq!(refused("limits.idle_timeout", "25h"), "`limits.idle_timeout`: `25h` is not from 1 ms to 86400000 ms");
    }
}
