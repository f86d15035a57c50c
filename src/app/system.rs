//! What the process asks of the system before it serves: as many descriptors as it may have, and errors instead of signals.
//!
//! The listeners get the descriptors that the store, the audit log and the runtimes leave. Look next at `server/registry.rs`, which
//! keeps within what they got.

use std::io;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use super::Error;
use crate::server;

/// Descriptors that are not for callers: the store and its cache, the audit log, telemetry, listeners, and connections on their way
/// out.
const KEPT_DESCRIPTORS: u64 = 192;
/// The same for each runtime: its poller, and the audit file of its lane.
const RUNTIME_DESCRIPTORS: u64 = 8;
/// Connections of each listener without which nothing is served.
const CONNECTIONS_MIN: u64 = 16;

/// Raises the limits on open files and on the size of a file as far as this process may. Gives how many files it may open.
pub(super) fn raise_limits() -> u64 {
    for resource in [Resource::Nofile, Resource::Fsize] {
        let limit = getrlimit(resource);
        // Refused it stays as it is, and what it is counts.
        let _ = setrlimit(resource, Rlimit { current: limit.maximum, ..limit });
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Has a write past the limit on the size of a file fail, as on a full disk, instead of ending the process. Writing to a closed pipe
/// fails already: the standard library sees to that. To be called within a runtime.
pub(super) fn survive_file_limits() -> io::Result<()> {
    // The handler stays when what listens to it is dropped.
    signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).map(drop)
}

/// Lowers the listeners' limits to what `descriptors` allow; says so if it had to.
pub(super) fn fit(settings: &mut server::Settings, descriptors: u64) -> Result<Option<String>, Error> {
    let wide = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
    let kept = KEPT_DESCRIPTORS + RUNTIME_DESCRIPTORS.saturating_mul(wide(settings.decision_runtimes));
    let (decisions, control) = (wide(settings.connections_max), wide(settings.control_connections_max));
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
    let narrow = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    (settings.connections_max, settings.control_connections_max) = (narrow(decisions), narrow(control));
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
            let said = fit(&mut settings, descriptors);
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
