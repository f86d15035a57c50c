//! Prunes a store: removes revocations that can no longer match any credential.
//!
//! Every server prunes at random times. If two servers prune at once, the store lets only one of them find the rows. Each commit
//! is small and a pause follows it, so a revocation by an operator never waits for more than one pruning commit.
//!
//! It must not decide which rows are expired: [`crate::store::expiry`] does. Look next there.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::backoff::RetryBackoff;
use crate::model::rows::StoreWrite;
use crate::model::time::{Clock, ClockReading};
use crate::store::{CommitRequest, Error, Store};

/// Limit of the rows that one commit removes.
const ROWS_MAX: usize = 1_000;
/// Pause between commits while more rows are expired.
const COMMIT_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause between rounds. The shortest pause is half of it.
const ROUND_PAUSE_MS: u64 = 60_000;

/// The pruner of one store in one server.
pub struct RevocationPruner {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    started: ClockReading,
    backoff: RetryBackoff,
}

impl RevocationPruner {
    /// Makes the pruner of a store.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Self {
        let started = clock.now();
        Self { store, clock, started, backoff: RetryBackoff::new(ROUND_PAUSE_MS, ROUND_PAUSE_MS, RandomState::new().hash_one(0)) }
    }

    /// Prunes at intervals until `shutdown` turns true or its sender is dropped.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let rounds = async {
            loop {
                tokio::time::sleep(self.backoff.next_pause(1)).await;
                self.prune_expired().await;
            }
        };
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => {}
            () = rounds => {}
        }
    }

    /// Prunes until no expired row is left. Returns the number of removed rows.
    pub async fn prune_expired(&self) -> usize {
        let mut rows = 0usize;
        loop {
            let writes = vec![StoreWrite::Prune { before_unix_s: self.expiry_cutoff_unix_s(), rows_max: ROWS_MAX }];
            match self.store.commit(CommitRequest { writes, ..CommitRequest::default() }).await {
                Ok(committed) => {
                    rows = rows.saturating_add(committed.changes.len());
                    if committed.changes.len() < ROWS_MAX {
                        break;
                    }
                }
                Err(Error::Rejected(_)) => break,
                Err(error) => {
                    tracing::debug!(%error, "revocations are not pruned now");
                    break;
                }
            }
            tokio::time::sleep(COMMIT_PAUSE).await;
        }
        if rows > 0 {
            tracing::info!(rows, "revocations that can hit nothing any more were pruned");
        }
        rows
    }

    /// The earlier of two readings: the wall clock, and the start time plus the run time. So a wall clock that jumps ahead
    /// expires nothing too early.
    fn expiry_cutoff_unix_s(&self) -> i64 {
        let now = self.clock.now();
        let run_s = now.boot_ns.saturating_sub(self.started.boot_ns).div_euclid(1_000_000_000);
        now.unix_s().min(self.started.unix_s().saturating_add(run_s))
    }
}
