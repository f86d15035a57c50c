//! The limits of the process: raises its file limits before it serves, and makes it survive SIGHUP and file-size signals.
//!
//! The listeners get the descriptors that the store, the audit log and the runtimes do not need. Look next at `server/connection_registry.rs`,
//! which enforces the connection limits set here.

use std::io;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use super::Error;
use crate::server;

/// Descriptors that are reserved for the process: the store and its cache, the audit log, telemetry, the listeners, and connections
/// that are closing.
const RESERVED_DESCRIPTORS: u64 = 192;
/// Descriptors that are reserved for each runtime: its poller and its audit file.
const RUNTIME_DESCRIPTORS: u64 = 8;
/// Fewest connections of each listener with which the server starts.
const CONNECTIONS_MIN: u64 = 16;

/// Raises the limits on open files and on file size as far as this process may. Returns how many files it may open.
pub(super) fn raise_file_limits() -> u64 {
    for resource in [Resource::Nofile, Resource::Fsize] {
        let limit = getrlimit(resource);
        // If the system refuses, the old limit stays and counts.
        let _ = setrlimit(resource, Rlimit { current: limit.maximum, ..limit });
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Makes a write beyond the file-size limit fail like a full disk, instead of ending the process. The standard library already does
/// so for a closed pipe. Call it within a runtime.
pub(super) fn ignore_file_size_signal() -> io::Result<()> {
    // The handler stays installed after its listener is dropped.
    signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).map(drop)
}

/// Keeps SIGHUP from ending the process, from now on. Call it within a runtime.
pub(super) fn catch_hangup_signal() -> io::Result<()> {
    // The handler stays installed after its listener is dropped.
    signal(SignalKind::hangup()).map(drop)
}

/// Lowers the listeners' connection limits to fit `descriptors`. Returns a message if it lowered any.
pub(super) fn fit_connection_limits(settings: &mut server::Settings, descriptors: u64) -> Result<Option<String>, Error> {
    let to_u64 = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
    let kept = RESERVED_DESCRIPTORS + RUNTIME_DESCRIPTORS.saturating_mul(to_u64(settings.decision_runtimes));
    let (decisions, control) = (to_u64(settings.connections_max), to_u64(settings.control_connections_max));
    let wanted = kept.saturating_add(decisions).saturating_add(control.saturating_mul(2));
    if descriptors >= wanted {
        return Ok(None);
    }
    let least = kept + 3 * CONNECTIONS_MIN;
    let Some(left) = descriptors.checked_sub(kept).filter(|left| *left >= 3 * CONNECTIONS_MIN) else {
        return Err(Error::Configuration(format!(
            "this process may open {descriptors} files, and needs {least} at least and {wanted} for all connections: raise the limit \
             (ulimit -n, LimitNOFILE)"
        )));
    };
    let control = control.min((left / 8).max(CONNECTIONS_MIN));
    let decisions = decisions.min(left - 2 * control);
    let to_usize = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    (settings.connections_max, settings.control_connections_max) = (to_usize(decisions), to_usize(control));
    Ok(Some(format!(
        "this process may open {descriptors} files: {decisions} connections for decisions and {control} on each other listener; \
         {wanted} files would do for all"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_fit_the_descriptors() {
        let check = |descriptors: u64, expected: Option<(usize, usize)>| {
            let mut settings = server::Settings::default();
            let said = fit_connection_limits(&mut settings, descriptors);
            match expected {
                Some(limits) => {
                    assert_eq!((settings.connections_max, settings.control_connections_max), limits, "{descriptors}");
                    assert_eq!(said.unwrap().is_some(), limits != (4096, 256), "{descriptors}");
                    assert!((limits.0 + 2 * limits.1) as u64 <= descriptors - 208);
                    settings.validate().unwrap();
                }
                None => assert!(said.unwrap_err().to_string().contains("raise the limit"), "{descriptors}"),
            }
        };
        check(u64::MAX, Some((4096, 256)));
        check(4816, Some((4096, 256)));
        check(4815, Some((4095, 256)));
        check(1024, Some((612, 102)));
        check(256, Some((16, 16)));
        check(255, None);
        check(0, None);
    }
}
