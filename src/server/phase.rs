//! The one way in which a server's life goes: running, draining, cut.
//!
//! A phase never goes back, and a lost sender counts as the last one, so that a dropped server stops. Look next at `worker.rs`.

use tokio::sync::watch;

/// How far a server has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Running,
    /// Nothing new is accepted; what is in flight goes on.
    Draining,
    /// What is still in flight is dropped.
    Cut,
}

/// Sees the phases of a server.
#[derive(Clone, Debug)]
pub(super) struct Phases(watch::Receiver<Phase>);

impl Phases {
    pub(super) fn new() -> (watch::Sender<Phase>, Self) {
        let (sender, receiver) = watch::channel(Phase::Running);
        (sender, Self(receiver))
    }

    /// Waits until `phase` or a later one.
    pub(super) async fn reached(&mut self, phase: Phase) {
        // The error means that the server was dropped: then every phase is reached.
        let _ = self.0.wait_for(|now| *now >= phase).await;
    }

    fn is_running(&self) -> bool {
        *self.0.borrow() == Phase::Running && self.0.has_changed().is_ok()
    }
}

/// Tells handlers that the server drains: long streams end themselves with `UNAVAILABLE`, so that they need not be cut.
#[derive(Clone, Debug)]
pub struct Draining(Phases);

impl Draining {
    pub(super) fn new(phases: Phases) -> Self {
        Self(phases)
    }

    /// Whether the server drains or has stopped.
    pub fn is_draining(&self) -> bool {
        !self.0.is_running()
    }

    /// Returns once the server drains.
    pub async fn wait(&mut self) {
        self.0.reached(Phase::Draining).await;
    }
}
