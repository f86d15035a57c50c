//! The cache of handles. A handle is 16 random bytes that stand for a verified chain, on one connection, for a minute.
//!
//! A handle alone proves no possession; an entry records whether a proof made it. Look next at `service/judge.rs`, which resolves handles.

use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;
use ring::rand::{SecureRandom as _, SystemRandom};

use super::chains::KnownChain;
use crate::model::limits::{HANDLE_LIFETIME_MS, HANDLES_BYTES_MAX};
use crate::model::time::Now;

/// The chain behind a handle.
#[derive(Clone, Debug)]
pub(super) struct Held {
    /// The chain. It is replaced when a new snapshot prepares it again.
    pub(super) chain: Arc<KnownChain>,
    /// Whether the handle was issued for a proof of possession.
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
        // Each handle weighs as much as its whole chain, which it may keep alive alone after the chain cache has evicted it. So
        // many handles of few chains count more than they use, and no handle is free.
        let own_bytes = u32::try_from(size_of::<Held>()).unwrap_or(u32::MAX);
        let weigh = move |_: &[u8; 16], held: &Held| held.chain.weight_bytes().saturating_add(own_bytes);
        let held = Cache::builder().weigher(weigh).max_capacity(HANDLES_BYTES_MAX).time_to_live(lifetime).build();
        Self { held, random: SystemRandom::new() }
    }

    /// Issues a handle that is valid on one connection. Returns `None` if the system gives no randomness.
    pub(super) fn make(&self, chain: Arc<KnownChain>, proved: bool, connection_id: u64, now: Now) -> Option<[u8; 16]> {
        let mut handle = [0; 16];
        self.random.fill(&mut handle).ok()?;
        self.held.insert(handle, Held { chain, proved, connection_id, made_at: now });
        Some(handle)
    }

    /// Finds the entry of a handle, if the handle was issued on this connection and has not expired.
    pub(super) fn find(&self, handle: &[u8; 16], connection_id: u64, now: Now) -> Option<Held> {
        let held = self.held.get(handle)?;
        let young = now.ms_since(held.made_at) < HANDLE_LIFETIME_MS.unsigned_abs();
        (young && held.connection_id == connection_id).then_some(held)
    }

    /// Replaces the chain of a handle with the same chain, prepared again.
    pub(super) fn replace(&self, handle: [u8; 16], held: Held, chain: Arc<KnownChain>) {
        self.held.insert(handle, Held { chain, ..held });
    }
}
