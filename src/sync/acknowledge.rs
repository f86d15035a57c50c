//! Acknowledging what was applied: only when no decision begun before it can still be answered here.
//!
//! ```text
//! follower publishes N ─▶ barrier runs once through every serving runtime ─▶ N is acknowledged ─▶ the next heartbeat says so
//! ```
//!
//! A decision is *answered* when it has left its handler, as an answer that the transport may send: from its last look at what is
//! revoked to that moment it does not await, so a runtime that has run the barrier holds none from before. What the transport
//! still holds then is on its way, and good for no longer than its `valid_for_ms`, which counts from the caller's own request.
//!
//! A runtime that is stuck is never passed, so nothing is acknowledged; in quarantine nothing is either. Look next at
//! `member.rs`, which carries the number, and at `pap/fleet.rs`, which waits for it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::Member;
use super::status::{Changes, Ended, State, Status};
use crate::model::mutant::{Mutant, active};
use crate::model::time::Clock;
use crate::telemetry::Metrics;

/// How often a replica that is quarantined says so.
const QUARANTINE_BEAT: Duration = Duration::from_millis(500);

/// The runtimes that answer decisions; bound by `app`.
#[async_trait]
pub trait Barrier: Send + Sync {
    /// Returns once every runtime that serves has come round once since the call: no handler that ran then runs on without
    /// having awaited. Never returns while one is stuck.
    async fn pass(&self);
}

/// What acknowledges, ready to run.
pub struct Acknowledge {
    status: Status,
    member: Arc<Member>,
    barrier: Arc<dyn Barrier>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
}

impl Acknowledge {
    /// Acknowledges for `member` what `status` shows as applied.
    pub fn new(status: Status, member: Arc<Member>, barrier: Arc<dyn Barrier>, clock: Arc<dyn Clock>, metrics: Metrics) -> Self {
        Self { status, member, barrier, clock, metrics }
    }

    /// Runs until `shutdown` turns true or its sender, or the follower, is gone.
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
            // INVARIANT: read before the barrier begins, and acknowledged once it has passed: what is applied meanwhile is not
            // covered by it. Policy may lag behind: what is acknowledged is that nothing revoked passes.
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
                // Whoever waits for the fleet waits for the heartbeat.
                self.status.poll_now();
                continue;
            }
            changes.changed().await?;
        }
    }

    /// Goes on saying that this replica denies everything, once that is so, until it follows again.
    async fn quarantined(&self, changes: &mut Changes) -> Result<(), Ended> {
        self.barrier.pass().await;
        self.member.quarantine();
        while self.status.state() == State::Quarantined {
            if let Err(error) = self.member.beat().await {
                tracing::debug!(%error, "the store could not be told that this replica is quarantined");
            }
            // In time, or sooner where it is over.
            tokio::time::timeout(QUARANTINE_BEAT, changes.changed()).await.unwrap_or(Ok(()))?;
        }
        self.member.leave_quarantine();
        Ok(())
    }
}
