//! How many calls of one serving runtime may use the store at one time, and who may make them.
//!
//! The number is bounded, and no agent can take all of it. A leaf agent holds no more slots than are free, and one of its users holds
//! no more than the agent may still take. `service/replay_cache.rs` shares its tables by the same rule. A call that gets no slot is denied
//! with `LEDGER_BUSY` before it uses anything. Must not know what a call uses. Look next at `service/ledger_task.rs`, which asks for slots.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::replay_cache::{HolderShare, ProofHolder};

/// The slots of one serving runtime.
#[derive(Debug)]
pub(super) struct LedgerQuota {
    permits: Arc<Semaphore>,
    permits_max: u32,
    /// Slots that each share holds; a share without one has no entry.
    held: Mutex<HashMap<HolderShare, usize>>,
    /// Slots that are held of all runtimes, for the metric.
    uses: Arc<AtomicUsize>,
}

/// The right to use the store for one call, until it is dropped.
#[derive(Debug)]
pub(super) struct LedgerPermit {
    quota: Arc<LedgerQuota>,
    shares: [HolderShare; 2],
    permit: Option<OwnedSemaphorePermit>,
}

/// Whose permits are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LedgerFull {
    /// Those of the runtime.
    Runtime,
    /// The share of the agent, or of the agent for this user.
    Holder,
}

impl LedgerQuota {
    /// A quota with no permit taken. `uses` counts the taken permits of all runtimes.
    pub(super) fn new(permits_max: u32, uses: Arc<AtomicUsize>) -> Arc<Self> {
        let permits = Arc::new(Semaphore::new(usize::try_from(permits_max).unwrap_or(usize::MAX)));
        Arc::new(Self { permits, permits_max, held: Mutex::default(), uses })
    }

    /// A permit for a call of `holder`.
    ///
    /// # Errors
    /// [`LedgerFull`]. The call waits for nothing.
    pub(super) fn try_acquire(self: &Arc<Self>, holder: ProofHolder) -> Result<LedgerPermit, LedgerFull> {
        let mut held = self.held();
        let shares @ [agent, user] = holder.shares();
        let of = |share| held.get(&share).copied().unwrap_or_default();
        let free = self.permits.available_permits();
        if free > 0 && (of(agent) >= free || of(user) >= free - of(agent)) {
            return Err(LedgerFull::Holder);
        }
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| LedgerFull::Runtime)?;
        for share in shares {
            *held.entry(share).or_default() += 1;
        }
        self.uses.fetch_add(1, Ordering::Relaxed);
        Ok(LedgerPermit { quota: Arc::clone(self), shares, permit: Some(permit) })
    }

    /// Takes a permit that counts for no holder, for work that gives approvals back; `None` if none is free.
    pub(super) fn try_reserve(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).try_acquire_owned().ok()
    }

    /// Waits until every permit is returned. No new permit is granted in the meantime.
    pub(super) async fn wait_until_idle(&self) {
        // The semaphore is never closed.
        let _ = self.permits.acquire_many(self.permits_max).await;
    }

    fn held(&self) -> MutexGuard<'_, HashMap<HolderShare, usize>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LedgerPermit {
    fn drop(&mut self) {
        self.quota.uses.fetch_sub(1, Ordering::Relaxed);
        let mut held = self.quota.held();
        for share in self.shares {
            if let Some(count) = held.get_mut(&share) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    held.remove(&share);
                }
            }
        }
        // Within the lock: what is free and what is held agree for whoever asks next.
        drop(self.permit.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERMITS_MAX: usize = 512;

    fn quota() -> Arc<LedgerQuota> {
        LedgerQuota::new(512, Arc::default())
    }

    fn fill(quota: &Arc<LedgerQuota>, holder: ProofHolder) -> Vec<LedgerPermit> {
        std::iter::from_fn(|| quota.try_acquire(holder).ok()).collect()
    }

    #[test]
    fn no_agent_and_no_user_takes_all_permits() {
        let quota = quota();
        let holder = |agent, user| ProofHolder { agent, user };
        // A user of an agent gets a third, and all users of an agent get a half.
        let first = fill(&quota, holder(1, 11));
        assert_eq!(first.len(), PERMITS_MAX / 3 + 1);
        assert_eq!(quota.try_acquire(holder(1, 11)).unwrap_err(), LedgerFull::Holder);
        let others: Vec<_> = (12..1000).flat_map(|user| fill(&quota, holder(1, user))).collect();
        assert_eq!(first.len() + others.len(), PERMITS_MAX / 2);
        // Another agent still gets permits, and so does one after it.
        let mut kept = Vec::new();
        for agent in 2..8 {
            let permits = fill(&quota, holder(agent, 10 * agent));
            assert!(!permits.is_empty(), "agent {agent}");
            kept.extend(permits);
        }
        drop((first, others));
        assert!(fill(&quota, holder(1, 11)).len() > 50, "what was dropped is free again");
        assert_eq!(quota.held().len(), 2 * 6, "who holds nothing has no entry");
    }

    #[tokio::test]
    async fn a_drain_gives_no_permit() {
        let quota = quota();
        let permit = quota.try_acquire(ProofHolder { agent: 1, user: 2 }).unwrap();
        let drained = quota.wait_until_idle();
        let mut drained = std::pin::pin!(drained);
        assert!(futures_util::poll!(drained.as_mut()).is_pending());
        assert_eq!(quota.try_acquire(ProofHolder { agent: 3, user: 4 }).unwrap_err(), LedgerFull::Runtime);
        assert!(quota.try_reserve().is_none());
        drop(permit);
        drained.await;
        assert!(quota.try_acquire(ProofHolder { agent: 3, user: 4 }).is_ok());
    }
}
