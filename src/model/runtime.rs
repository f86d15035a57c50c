//! Tokio runtimes whose blocking work never ends the process.
//!
//! Tokio starts a thread for blocking work (`spawn_blocking`, look-ups of host names) when none is idle, and ends idle threads after a
//! while. If the system refuses a new thread and none is left, tokio panics. A limit on threads is shared with other programs of the
//! same user, so this may happen at any time. A runtime that is made here keeps its first blocking thread for its whole life. If the
//! system refuses more threads, work waits for that one.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// The longest time for which a blocking thread stays without work: longer than any process lives.
const BLOCKING_THREAD_LIFE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Builds a runtime with I/O and timers, and starts its first blocking thread.
///
/// # Errors
/// If the system refuses a thread or the event queue.
pub(crate) fn build_runtime(builder: &mut Builder) -> io::Result<Runtime> {
    // Where the system refuses a thread, this is an error, and `spawn_blocking` below would panic.
    let probe = std::thread::Builder::new().name("pdp-probe".to_owned()).spawn(|| ())?;
    let _ = probe.join();
    let runtime = builder.enable_all().thread_keep_alive(BLOCKING_THREAD_LIFE).build()?;
    drop(runtime.spawn_blocking(|| ()));
    Ok(runtime)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The attack: a neighbour takes the last threads of the user while no blocking work runs, and then somebody revokes.
    #[test]
    fn the_first_blocking_thread_stays() {
        let runtime = build_runtime(Builder::new_current_thread().thread_keep_alive(Duration::from_millis(1))).unwrap();
        let run = || runtime.block_on(runtime.spawn_blocking(|| std::thread::current().id())).unwrap();
        let first = run();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(run(), first);
    }
}
