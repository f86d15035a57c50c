//! Limits the bytes that waiting calls may hold. Each connection has a small share of its own; the rest is shared by all.
//!
//! A call is never charged if its whole message has arrived and it is answered at once. No other connection can use up a
//! connection's own share, so a flood of unfinished messages refuses no ordinary call. `intake.rs` and `call.rs` charge the calls;
//! look there next.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::api::Refusal;

/// The bytes that all connections of a listener share.
#[derive(Debug)]
pub(super) struct Pool {
    bytes_max: usize,
    used: AtomicUsize,
}

impl Pool {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, used: AtomicUsize::new(0) }
    }

    /// The bytes in use.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let taken = self.used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= self.bytes_max;
        if !taken {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        taken
    }
}

/// The bytes that one connection holds.
#[derive(Debug)]
pub(super) struct Account {
    pool: Arc<Pool>,
    own_bytes: usize,
    bytes_max: usize,
    used: AtomicUsize,
}

impl Account {
    /// A connection may hold `bytes_max` bytes. Those beyond `own_bytes` come from `pool`.
    pub(super) fn new(pool: Arc<Pool>, own_bytes: usize, bytes_max: usize) -> Self {
        Self { pool, own_bytes, bytes_max, used: AtomicUsize::new(0) }
    }

    fn take(&self, bytes: usize) -> Result<(), Refusal> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        let taken = if before.saturating_add(bytes) > self.bytes_max {
            Err(Refusal::ConnectionBudget)
        } else if self.pool.take(self.shared(before, bytes)) {
            Ok(())
        } else {
            Err(Refusal::ListenerBudget)
        };
        if taken.is_err() {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        taken
    }

    fn give_back(&self, bytes: usize) {
        let before = self.used.fetch_sub(bytes, Ordering::Relaxed).saturating_sub(bytes);
        self.pool.used.fetch_sub(self.shared(before, bytes), Ordering::Relaxed);
    }

    /// How many of `bytes` on top of `before` exceed the connection's own share. One thread serves the connection, so the amounts
    /// that are taken and returned agree.
    fn shared(&self, before: usize, bytes: usize) -> usize {
        before.saturating_add(bytes).saturating_sub(self.own_bytes) - before.saturating_sub(self.own_bytes)
    }
}

/// Bytes charged to an account, returned on drop.
#[derive(Debug)]
pub(super) struct Charge {
    account: Arc<Account>,
    bytes: usize,
}

impl Charge {
    /// A charge of no bytes.
    pub(super) fn new(account: &Arc<Account>) -> Self {
        Self { account: Arc::clone(account), bytes: 0 }
    }

    /// Raises the charge to at least `bytes`.
    ///
    /// # Errors
    /// The budget that is exhausted. The earlier charge stays.
    pub(super) fn grow_to(&mut self, bytes: usize) -> Result<(), Refusal> {
        let more = bytes.saturating_sub(self.bytes);
        if more > 0 {
            self.account.take(more)?;
            self.bytes = bytes;
        }
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_has_its_own_and_shares_the_rest() {
        let pool = Arc::new(Pool::new(100));
        let account = || Arc::new(Account::new(Arc::clone(&pool), 10, 80));
        let (greedy, other, late) = (account(), account(), account());
        let mut first = Charge::new(&greedy);
        first.grow_to(80).unwrap();
        assert_eq!(pool.used(), 70);
        assert_eq!(first.grow_to(81), Err(Refusal::ConnectionBudget));
        first.grow_to(1).unwrap();
        let mut second = Charge::new(&other);
        second.grow_to(40).unwrap();
        assert_eq!(pool.used(), 100);
        let mut third = Charge::new(&late);
        third.grow_to(10).unwrap();
        assert_eq!(third.grow_to(11), Err(Refusal::ListenerBudget), "its own is all that is left");
        let mut fourth = Charge::new(&late);
        assert_eq!(fourth.grow_to(1), Err(Refusal::ListenerBudget));
        drop(first);
        assert_eq!(pool.used(), 30);
        fourth.grow_to(70).unwrap();
        assert_eq!(pool.used(), 100);
        drop((second, third, fourth));
        assert_eq!([pool.used(), greedy.used.load(Ordering::Relaxed), late.used.load(Ordering::Relaxed)], [0; 3]);
    }
}
