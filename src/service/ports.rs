//! What the service needs of the store, as two small traits that `app` binds: a request reads the store nowhere else.

use async_trait::async_trait;

use crate::model::revision::Revision;

/// Uses of proofs of destructive calls: once across the fleet.
#[async_trait]
pub trait ProofLedger: Send + Sync {
    /// `true` for the first caller, `false` for every other one until the key expires.
    ///
    /// # Errors
    /// If that could not be made durable; the call is denied.
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, String>;
}

/// Brings the replica up to a revision that a caller has seen.
#[async_trait]
pub trait CatchUp: Send + Sync {
    /// Whether the revision is applied, policy and revocations both; polls at once and waits up to 300 ms.
    async fn reach(&self, revision: &Revision) -> bool;
}
