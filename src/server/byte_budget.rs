//! Limits the bytes that waiting calls may hold. Each connection has a small share of its own; the rest is shared by all.
//!
//! A call is never charged if its whole message has arrived and it is answered at once. No other connection can use up a
//! connection's own share, so a flood of unfinished messages refuses no ordinary call. Half of what is shared is reserved for
//! connections that carried a verified signature recently. `request_body.rs` and `active_call.rs` charge the calls; look there next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::api::CallRefusal;
use crate::model::connection::VerifiedSignatureFlag;

/// The bytes that all connections of a listener share.
#[derive(Debug)]
pub(super) struct SharedBudget {
    bytes_max: usize,
    used: AtomicUsize,
}

impl SharedBudget {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, used: AtomicUsize::new(0) }
    }

    /// The bytes in use.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize, has_proved: bool) -> bool {
        if bytes == 0 {
            return true;
        }
        let bytes_max = if has_proved { self.bytes_max } else { self.bytes_max / 2 };
        let taken = self.used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= bytes_max;
        if !taken {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        taken
    }
}

/// The bytes that one connection holds.
#[derive(Debug)]
pub(super) struct ConnectionBudget {
    shared: Arc<SharedBudget>,
    own_bytes: usize,
    bytes_max: usize,
    used: AtomicUsize,
    verified_signature: Arc<VerifiedSignatureFlag>,
    /// Whether a sweep found that the connection carried a verified signature recently.
    has_recent_signature: AtomicBool,
}

impl ConnectionBudget {
    /// A connection may hold `bytes_max` bytes. Those beyond `own_bytes` come from `pool`.
    pub(super) fn new(
        pool: Arc<SharedBudget>,
        own_bytes: usize,
        bytes_max: usize,
        verified_signature: Arc<VerifiedSignatureFlag>,
    ) -> Self {
        let (used, has_recent_signature) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { shared: pool, own_bytes, bytes_max, used, verified_signature, has_recent_signature }
    }

    /// Notes whether the connection carried a verified signature recently.
    pub(super) fn note_proved(&self, lately: bool) {
        self.has_recent_signature.store(lately, Ordering::Relaxed);
    }

    fn has_proved(&self) -> bool {
        self.has_recent_signature.load(Ordering::Relaxed) || self.verified_signature.is_set()
    }

    /// Raises a charge of `held` bytes to at least `bytes`. Return it with [`Self::release`].
    ///
    /// # Errors
    /// The budget that is exhausted. The earlier charge stays.
    pub(super) fn raise(&self, held: &mut usize, bytes: usize) -> Result<(), CallRefusal> {
        let more = bytes.saturating_sub(*held);
        if more > 0 {
            self.reserve(more)?;
            *held = bytes;
        }
        Ok(())
    }

    fn reserve(&self, bytes: usize) -> Result<(), CallRefusal> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        let taken = if before.saturating_add(bytes) > self.bytes_max {
            Err(CallRefusal::ConnectionBudgetExceeded)
        } else if self.shared.take(self.shared_part(before, bytes), self.has_proved()) {
            Ok(())
        } else {
            Err(CallRefusal::ListenerBudgetExceeded)
        };
        if taken.is_err() {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        taken
    }

    /// Returns charged bytes.
    pub(super) fn release(&self, bytes: usize) {
        let before = self.used.fetch_sub(bytes, Ordering::Relaxed).saturating_sub(bytes);
        let shared = self.shared_part(before, bytes);
        if shared > 0 {
            self.shared.used.fetch_sub(shared, Ordering::Relaxed);
        }
    }

    /// How many of `bytes` on top of `before` exceed the connection's own share. One thread serves the connection, so the amounts
    /// that are taken and returned agree.
    fn shared_part(&self, before: usize, bytes: usize) -> usize {
        before.saturating_add(bytes).saturating_sub(self.own_bytes) - before.saturating_sub(self.own_bytes)
    }
}

/// Bytes charged to an account, returned on drop.
#[derive(Debug)]
pub(super) struct BudgetCharge {
    budget: Arc<ConnectionBudget>,
    bytes: usize,
}

impl BudgetCharge {
    /// A charge of no bytes.
    pub(super) fn new(account: &Arc<ConnectionBudget>) -> Self {
        Self { budget: Arc::clone(account), bytes: 0 }
    }

    /// Raises the charge to at least `bytes`.
    ///
    /// # Errors
    /// The budget that is exhausted. The earlier charge stays.
    pub(super) fn grow_to(&mut self, bytes: usize) -> Result<(), CallRefusal> {
        self.budget.raise(&mut self.bytes, bytes)
    }
}

impl Drop for BudgetCharge {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_has_its_own_and_shares_the_rest() {
        let pool = Arc::new(SharedBudget::new(100));
        let account = || {
            let account = ConnectionBudget::new(Arc::clone(&pool), 10, 80, Arc::default());
            account.verified_signature.set();
            Arc::new(account)
        };
        let (greedy, other, late) = (account(), account(), account());
        let mut first = BudgetCharge::new(&greedy);
        first.grow_to(80).unwrap();
        assert_eq!(pool.used(), 70);
        assert_eq!(first.grow_to(81), Err(CallRefusal::ConnectionBudgetExceeded));
        first.grow_to(1).unwrap();
        let mut second = BudgetCharge::new(&other);
        second.grow_to(40).unwrap();
        assert_eq!(pool.used(), 100);
        let mut third = BudgetCharge::new(&late);
        third.grow_to(10).unwrap();
        assert_eq!(third.grow_to(11), Err(CallRefusal::ListenerBudgetExceeded), "its own is all that is left");
        let mut fourth = BudgetCharge::new(&late);
        assert_eq!(fourth.grow_to(1), Err(CallRefusal::ListenerBudgetExceeded));
        drop(first);
        assert_eq!(pool.used(), 30);
        fourth.grow_to(70).unwrap();
        assert_eq!(pool.used(), 100);
        drop((second, third, fourth));
        assert_eq!([pool.used(), greedy.used.load(Ordering::Relaxed), late.used.load(Ordering::Relaxed)], [0; 3]);
    }

    #[test]
    fn half_of_what_is_shared_is_for_who_proved_something() {
        let pool = Arc::new(SharedBudget::new(100));
        let account = || Arc::new(ConnectionBudget::new(Arc::clone(&pool), 10, 80, Arc::default()));
        let (strangers, signer, late) = (account(), account(), account());
        let mut taken = BudgetCharge::new(&strangers);
        assert_eq!(taken.grow_to(61), Err(CallRefusal::ListenerBudgetExceeded));
        taken.grow_to(60).unwrap();
        let mut other = BudgetCharge::new(&late);
        assert_eq!(other.grow_to(11), Err(CallRefusal::ListenerBudgetExceeded), "its own is all that a stranger gets");
        signer.verified_signature.set();
        let mut act = BudgetCharge::new(&signer);
        act.grow_to(60).unwrap();
        assert_eq!(pool.used(), 100);
        drop(act);
        // A sweep takes the mark of the signature and remembers it.
        late.note_proved(true);
        other.grow_to(60).unwrap();
    }
}
