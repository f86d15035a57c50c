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
//! Look next at `fleet_member.rs`, which sends the number, and at `pap/fleet.rs`, which waits for it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::FleetMember;
use super::follower::FollowerState;
use super::status::{FollowerEnded, FollowerHandle, ProgressReceiver};
use crate::model::mutant::{Mutant, is_active};
use crate::model::time::Clock;
use crate::telemetry::Metrics;

/// Interval of the heartbeats of a quarantined replica.
const QUARANTINE_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

/// The runtimes that answer decisions. `app` provides them.
#[async_trait]
pub trait RuntimeBarrier: Send + Sync {
    /// Returns once every serving runtime has run one task since the call. A handler that ran at the time of the call has awaited
    /// or ended by then. Never returns while a runtime is stuck.
    async fn pass(&self);
}

/// The task that acknowledges applied revisions, ready to run.
pub struct RevisionAcknowledger {
    status: FollowerHandle,
    member: Arc<FleetMember>,
    barrier: Arc<dyn RuntimeBarrier>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
}

impl RevisionAcknowledger {
    /// Acknowledges, for `member`, the revisions that `status` shows as applied.
    pub fn new(
        status: FollowerHandle,
        member: Arc<FleetMember>,
        barrier: Arc<dyn RuntimeBarrier>,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
    ) -> Self {
        Self { status, member, barrier, clock, metrics }
    }

    /// Runs until `shutdown` turns true, its sender is dropped, or the follower ends.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => {}
            _ = self.acknowledge() => {}
        }
    }

    async fn acknowledge(&mut self) -> Result<(), FollowerEnded> {
        let mut changes = self.status.subscribe();
        let mut acknowledged = None;
        loop {
            self.member.set_resync(self.status.state() == FollowerState::Resync);
            if self.status.state() == FollowerState::Quarantined {
                self.heartbeat_until_followed(&mut changes).await?;
                acknowledged = None;
                continue;
            }
            // INVARIANT: this number is read before the barrier begins and acknowledged after it has passed. The barrier does not cover
            // a later revision. Policy may lag behind, because an acknowledgement only promises that no revoked call is permitted.
            let number = self.status.applied_number();
            if self.status.history().is_some() && acknowledged != Some(number) {
                if !is_active(Mutant::AcknowledgeBeforeBarrier) {
                    self.barrier.pass().await;
                }
                if self.status.state() == FollowerState::Quarantined {
                    continue;
                }
                let number = if is_active(Mutant::AcknowledgeNewest) { self.status.applied_number() } else { number };
                self.member.acknowledge(number);
                acknowledged = Some(number);
                let now_ms = self.clock.now().unix_ms();
                for committed_ms in self.status.take_revocation_times(number) {
                    let took_ms = u64::try_from(now_ms.saturating_sub(committed_ms)).unwrap_or(0);
                    self.metrics.record_kill_propagation(took_ms.saturating_mul(1_000_000));
                }
                // A wait for the fleet waits for this heartbeat.
                self.status.request_poll();
                continue;
            }
            changes.changed().await?;
        }
    }

    /// Waits until this replica denies every call, then reports that with heartbeats until it follows a store again.
    async fn heartbeat_until_followed(&self, changes: &mut ProgressReceiver) -> Result<(), FollowerEnded> {
        self.barrier.pass().await;
        self.member.enter_quarantine();
        while self.status.state() == FollowerState::Quarantined {
            if let Err(error) = self.member.send_heartbeat().await {
                tracing::debug!(%error, "the store could not be told that this replica is quarantined");
            }
            // Wait for the interval, or less if the quarantine ends.
            tokio::time::timeout(QUARANTINE_HEARTBEAT_INTERVAL, changes.changed()).await.unwrap_or(Ok(()))?;
        }
        self.member.leave_quarantine();
        Ok(())
    }
}
