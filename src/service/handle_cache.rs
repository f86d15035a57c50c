//! The cache of handles. A handle is 16 random bytes that stand for a verified chain, on one connection, for a minute.
//!
//! A handle alone proves no possession; an entry records whether a proof made it. Look next at `service/judgement.rs`, which resolves handles.

use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;
use ring::rand::{SecureRandom as _, SystemRandom};

use super::chain_cache::CachedChain;
use crate::model::limits::{HANDLE_CACHE_BYTES_MAX, HANDLE_LIFETIME_MS};
use crate::model::time::ClockReading;

/// The chain behind a handle.
#[derive(Clone, Debug)]
pub(super) struct HandleEntry {
    /// The chain. It is replaced when a new snapshot prepares it again.
    pub(super) chain: Arc<CachedChain>,
    /// Whether the handle was issued for a proof of possession.
    pub(super) proved: bool,
    connection_id: u64,
    issued_at: ClockReading,
}

/// The handles of one process.
#[derive(Debug)]
pub(super) struct ChainHandleCache {
    entries: Cache<[u8; 16], HandleEntry>,
    random: SystemRandom,
}

impl ChainHandleCache {
    pub(super) fn new() -> Self {
        let lifetime = Duration::from_millis(HANDLE_LIFETIME_MS.unsigned_abs());
        // Each handle weighs as much as its whole chain, which it may keep alive alone after the chain cache has evicted it. So
        // many handles of few chains count more than they use, and no handle is free.
        let own_bytes = u32::try_from(size_of::<HandleEntry>()).unwrap_or(u32::MAX);
        let weigh = move |_: &[u8; 16], held: &HandleEntry| held.chain.weight_bytes().saturating_add(own_bytes);
        let held = Cache::builder().weigher(weigh).max_capacity(HANDLE_CACHE_BYTES_MAX).time_to_live(lifetime).build();
        Self { entries: held, random: SystemRandom::new() }
    }

    /// Issues a handle that is valid on one connection. Returns `None` if the system gives no randomness.
    pub(super) fn issue(&self, chain: Arc<CachedChain>, proved: bool, connection_id: u64, now: ClockReading) -> Option<[u8; 16]> {
        let mut handle = [0; 16];
        self.random.fill(&mut handle).ok()?;
        self.entries.insert(handle, HandleEntry { chain, proved, connection_id, issued_at: now });
        Some(handle)
    }

    /// Finds the entry of a handle, if the handle was issued on this connection and has not expired.
    pub(super) fn find(&self, handle: &[u8; 16], connection_id: u64, now: ClockReading) -> Option<HandleEntry> {
        let held = self.entries.get(handle)?;
        let young = now.elapsed_ms_since(held.issued_at) < HANDLE_LIFETIME_MS.unsigned_abs();
        (young && held.connection_id == connection_id).then_some(held)
    }

    /// Replaces the chain of a handle with the same chain, prepared again.
    pub(super) fn replace_chain(&self, handle: [u8; 16], held: HandleEntry, chain: Arc<CachedChain>) {
        self.entries.insert(handle, HandleEntry { chain, ..held });
    }
}
