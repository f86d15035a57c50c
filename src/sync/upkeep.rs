//! A store's upkeep: takes away, commit by commit, the revocations that can hit nothing any more.
//!
//! Every server does it now and then, at moments of its own; of two that come at once the store lets one find the rows. Small commits
//! with pauses, so that a kill never waits for more than one of them. What may go is said by [`crate::store::lapse`].

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::backoff::Backoff;
use crate::model::records::Write;
use crate::model::time::{Clock, Now};
use crate::store::{CommitRequest, Error, Store};

/// Rows that one commit takes away.
const ROWS_MAX: usize = 1_000;
/// Pause between commits while there is more.
const PAUSE: Duration = Duration::from_millis(250);
/// Pause between rounds, half of it at the least.
const ROUND_MS: u64 = 60_000;

/// The upkeep of one store by one server.
pub struct Upkeep {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    started: Now,
    pauses: Backoff,
}

impl Upkeep {
    /// Upkeep of a store.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Self {
        let started = clock.now();
        Self { store, clock, started, pauses: Backoff::new(ROUND_MS, ROUND_MS, RandomState::new().hash_one(0)) }
    }

    /// Goes on until `shutdown` turns true or its sender is gone.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let rounds = async {
            loop {
                tokio::time::sleep(self.pauses.pause(1)).await;
                self.round().await;
            }
        };
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => {}
            () = rounds => {}
        }
    }

    /// Prunes until nothing more has expired; answers how many rows went.
    pub async fn round(&self) -> usize {
        let mut rows = 0usize;
        loop {
            let writes = vec![Write::Prune { before_unix_s: self.before_unix_s(), rows_max: ROWS_MAX }];
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
            tokio::time::sleep(PAUSE).await;
        }
        if rows > 0 {
            tracing::info!(rows, "revocations that can hit nothing any more were pruned");
        }
        rows
    }

    /// The time as far as both clocks agree: a wall clock that jumps ahead makes nothing expire that cannot have.
    fn before_unix_s(&self) -> i64 {
        let now = self.clock.now();
        let run_s = now.boot_ns.saturating_sub(self.started.boot_ns).div_euclid(1_000_000_000);
        now.unix_s().min(self.started.unix_s().saturating_add(run_s))
    }
}
