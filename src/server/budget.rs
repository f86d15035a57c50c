//! How many bytes the calls that wait may hold: each connection has a little of its own and shares the rest with all others.
//!
//! A call whose message is there whole and that is answered at once is never charged. Nobody can take a connection's own bytes from
//! it, so a flood of unfinished messages on other connections refuses no ordinary call. Look next at `intake.rs` and `call.rs`, which
//! charge.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::api::Refusal;

/// What the connections of a listener share.
#[derive(Debug)]
pub(super) struct Pool {
    bytes_max: usize,
    used: AtomicUsize,
}

impl Pool {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, used: AtomicUsize::new(0) }
    }

    /// Bytes in use.
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

/// What one connection holds.
#[derive(Debug)]
pub(super) struct Account {
    pool: Arc<Pool>,
    own_bytes: usize,
    bytes_max: usize,
    used: AtomicUsize,
}

impl Account {
    /// A connection may hold `bytes_max`, of which what is beyond `own_bytes` comes from `pool`.
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

    /// How many of `bytes` on top of `before` are not the connection's own. One connection is served by one thread, so that what is
    /// taken and what is given back agree.
    fn shared(&self, before: usize, bytes: usize) -> usize {
        before.saturating_add(bytes).saturating_sub(self.own_bytes) - before.saturating_sub(self.own_bytes)
    }
}

/// Bytes on an account, until it is dropped.
#[derive(Debug)]
pub(super) struct Charge {
    account: Arc<Account>,
    bytes: usize,
}

impl Charge {
    /// Nothing yet.
    pub(super) fn new(account: &Arc<Account>) -> Self {
        Self { account: Arc::clone(account), bytes: 0 }
    }

    /// Makes it at least so many bytes.
    ///
    /// # Errors
    /// A budget's end; what was charged before stays.
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
