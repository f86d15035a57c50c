//! The phases of a server, in their only order: running, draining, cut.
//!
//! A phase never goes back. A lost sender counts as the last phase, so that a dropped server stops. Look next at `worker.rs`.

use tokio::sync::watch;

/// The current phase of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ServerPhase {
    Running,
    /// Nothing new is accepted; calls in flight go on.
    Draining,
    /// Calls still in flight are dropped.
    Cut,
}

/// Receives the phases of a server.
#[derive(Clone, Debug)]
pub(super) struct PhaseReceiver(watch::Receiver<ServerPhase>);

impl PhaseReceiver {
    pub(super) fn new() -> (watch::Sender<ServerPhase>, Self) {
        let (sender, receiver) = watch::channel(ServerPhase::Running);
        (sender, Self(receiver))
    }

    /// Waits for `phase` or a later one.
    pub(super) async fn wait_until(&mut self, phase: ServerPhase) {
        // An error means that the server was dropped, which counts as every phase.
        let _ = self.0.wait_for(|now| *now >= phase).await;
    }

    fn is_running(&self) -> bool {
        *self.0.borrow() == ServerPhase::Running && self.0.has_changed().is_ok()
    }
}

/// Tells handlers that the server drains. Long streams then end with `UNAVAILABLE`, so that they need not be cut.
#[derive(Clone, Debug)]
pub struct DrainSignal(PhaseReceiver);

impl DrainSignal {
    pub(super) fn new(phases: PhaseReceiver) -> Self {
        Self(phases)
    }

    /// Whether the server drains or has stopped.
    pub fn is_draining(&self) -> bool {
        !self.0.is_running()
    }

    /// Returns once the server drains.
    pub async fn wait(&mut self) {
        self.0.wait_until(ServerPhase::Draining).await;
    }
}
