//! What the service needs of the store, as small traits that `app` binds: a request reads the store nowhere else.

use async_trait::async_trait;

use crate::model::approval::{AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::replica::Fleet;
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

/// Approvals: asked for before a call is answered so, used once across the fleet.
#[async_trait]
pub trait ApprovalLedger: Send + Sync {
    /// Stores that a call asks.
    ///
    /// # Errors
    /// If that could not be made durable; the call is denied.
    async fn ask(&self, request: AskApproval) -> Result<AskOutcome, String>;

    /// Uses all that a call needs, or nothing.
    ///
    /// # Errors
    /// If that could not be made durable; the call is denied.
    async fn use_once(&self, request: UseApprovals) -> Result<UseOutcome, String>;

    /// The decision that this very request was given a moment ago; uses nothing.
    ///
    /// # Errors
    /// If it cannot be read; the call is denied.
    async fn repeated(&self, request: &UseApprovals) -> Result<Option<String>, String>;
}

/// Who follows the store. No decision asks for it.
#[async_trait]
pub trait FleetDirectory: Send + Sync {
    /// The replicas, as of a moment ago.
    ///
    /// # Errors
    /// If the store cannot be read.
    async fn fleet(&self) -> Result<Fleet, String>;
}

/// Brings the replica up to a revision that a caller has seen.
#[async_trait]
pub trait CatchUp: Send + Sync {
    /// Whether the revision is applied, policy and revocations both; polls at once and waits up to 300 ms.
    async fn reach(&self, revision: &Revision) -> bool;
}
