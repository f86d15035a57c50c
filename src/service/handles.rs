//! Handles: 16 random bytes that stand for a chain which this replica has verified, on one connection, for a minute.

use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;
use ring::rand::{SecureRandom as _, SystemRandom};

use super::chains::KnownChain;
use crate::model::limits::{HANDLE_LIFETIME_MS, HANDLES_BYTES_MAX};
use crate::model::time::Now;

/// What a handle stands for.
#[derive(Clone, Debug)]
pub(super) struct Held {
    /// The chain; replaced when a new snapshot made it be prepared anew.
    pub(super) chain: Arc<KnownChain>,
    /// Whether a proof of possession made the handle.
    pub(super) proved: bool,
    connection_id: u64,
    made_at: Now,
}

/// The handles of one process.
#[derive(Debug)]
pub(super) struct Handles {
    held: Cache<[u8; 16], Held>,
    random: SystemRandom,
}

impl Handles {
    pub(super) fn new() -> Self {
        let lifetime = Duration::from_millis(HANDLE_LIFETIME_MS.unsigned_abs());
        // Each is weighed as if the chain were its own, as it is where the cache of chains has let it go: many handles of few chains
        // are fewer, none is free.
        let own_bytes = u32::try_from(size_of::<Held>()).unwrap_or(u32::MAX);
        let weigh = move |_: &[u8; 16], held: &Held| held.chain.weight_bytes().saturating_add(own_bytes);
        let held = Cache::builder().weigher(weigh).max_capacity(HANDLES_BYTES_MAX).time_to_live(lifetime).build();
        Self { held, random: SystemRandom::new() }
    }

    /// Makes a handle that is good on one connection; `None` if the system gives no randomness.
    pub(super) fn make(&self, chain: Arc<KnownChain>, proved: bool, connection_id: u64, now: Now) -> Option<[u8; 16]> {
        let mut handle = [0; 16];
        self.random.fill(&mut handle).ok()?;
        self.held.insert(handle, Held { chain, proved, connection_id, made_at: now });
        Some(handle)
    }

    /// What a handle stands for, if it was made on this connection and is not too old.
    pub(super) fn find(&self, handle: &[u8; 16], connection_id: u64, now: Now) -> Option<Held> {
        let held = self.held.get(handle)?;
        let young = now.ms_since(held.made_at) < HANDLE_LIFETIME_MS.unsigned_abs();
        (young && held.connection_id == connection_id).then_some(held)
    }

    /// Lets a handle stand for the same chain prepared anew.
    pub(super) fn replace(&self, handle: [u8; 16], held: Held, chain: Arc<KnownChain>) {
        self.held.insert(handle, Held { chain, ..held });
    }
}
