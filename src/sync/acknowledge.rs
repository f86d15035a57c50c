//! Acknowledges an applied revision to the fleet, once this replica can no longer answer a decision that began before that revision.
//!
//! ```text
//! follower publishes N ─▶ barrier runs once through every serving runtime ─▶ N is acknowledged ─▶ the next heartbeat says so
//! ```
//!
//! A decision is *answered* when it leaves its handler as an answer that the transport may send. A handler does not await between its
//! last check of the revocations and that moment, so a runtime that has run the barrier holds no earlier decision. An answer that the
//! transport still holds is already on its way. It is valid for at most its `valid_for_ms`, which counts from the caller's own request.
//!
//! The barrier never passes a runtime that is stuck, so nothing is acknowledged then. A replica in quarantine acknowledges nothing either.
//!
//! Look next at `member.rs`, which sends the number, and at `pap/fleet.rs`, which waits for it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::Member;
use super::follower::State;
use super::status::{Changes, Ended, Status};
use crate::model::mutant::{Mutant, active};
use crate::model::time::Clock;
use crate::telemetry::Metrics;

/// Interval of the heartbeats of a quarantined replica.
const QUARANTINE_BEAT: Duration = Duration::from_millis(500);

/// The runtimes that answer decisions. `app` provides them.
#[async_trait]
pub trait Barrier: Send + Sync {
    /// Returns once every serving runtime has run one task since the call. A handler that ran at the time of the call has awaited
    /// or ended by then. Never returns while a runtime is stuck.
    async fn pass(&self);
}

/// The task that acknowledges applied revisions, ready to run.
pub struct Acknowledge {
    status: Status,
    member: Arc<Member>,
    barrier: Arc<dyn Barrier>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
}

impl Acknowledge {
    /// Acknowledges, for `member`, the revisions that `status` shows as applied.
    pub fn new(status: Status, member: Arc<Member>, barrier: Arc<dyn Barrier>, clock: Arc<dyn Clock>, metrics: Metrics) -> Self {
        Self { status, member, barrier, clock, metrics }
    }

    /// Runs until `shutdown` turns true, its sender is dropped, or the follower ends.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => {}
            _ = self.acknowledge() => {}
        }
    }

    async fn acknowledge(&mut self) -> Result<(), Ended> {
        let mut changes = self.status.changes();
        let mut acknowledged = None;
        loop {
            self.member.set_resync(self.status.state() == State::Resync);
            if self.status.state() == State::Quarantined {
                self.quarantined(&mut changes).await?;
                acknowledged = None;
                continue;
            }
            // INVARIANT: this number is read before the barrier begins and acknowledged after it has passed. The barrier does not cover
            // a later revision. Policy may lag behind, because an acknowledgement only promises that no revoked call is permitted.
            let number = self.status.applied();
            if self.status.history().is_some() && acknowledged != Some(number) {
                if !active(Mutant::AcknowledgeBeforeBarrier) {
                    self.barrier.pass().await;
                }
                if self.status.state() == State::Quarantined {
                    continue;
                }
                let number = if active(Mutant::AcknowledgeNewest) { self.status.applied() } else { number };
                self.member.acknowledge(number);
                acknowledged = Some(number);
                let now_ms = self.clock.now().unix_ms();
                for committed_ms in self.status.take_kills(number) {
                    let took_ms = u64::try_from(now_ms.saturating_sub(committed_ms)).unwrap_or(0);
                    self.metrics.kill_propagation(took_ms.saturating_mul(1_000_000));
                }
                // A wait for the fleet waits for this heartbeat.
                self.status.poll_now();
                continue;
            }
            changes.changed().await?;
        }
    }

    /// Waits until this replica denies every call, then reports that with heartbeats until it follows a store again.
    async fn quarantined(&self, changes: &mut Changes) -> Result<(), Ended> {
        self.barrier.pass().await;
        self.member.quarantine();
        while self.status.state() == State::Quarantined {
            if let Err(error) = self.member.beat().await {
                tracing::debug!(%error, "the store could not be told that this replica is quarantined");
            }
            // Wait for the interval, or less if the quarantine ends.
            tokio::time::timeout(QUARANTINE_BEAT, changes.changed()).await.unwrap_or(Ok(()))?;
        }
        self.member.leave_quarantine();
        Ok(())
    }
}
