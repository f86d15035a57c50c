//! What the service needs of the store, as small traits that `app` binds: a request reads the store nowhere else.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::model::approval::{AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::replica::Fleet;
use crate::model::revision::Revision;

/// Why a ledger has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// Nothing was written, because the store is away or too much waits for it.
    #[error("{0}")]
    Busy(String),
    /// It cannot be said whether it was written.
    #[error("{0}")]
    Unknown(String),
}

/// Uses of proofs of destructive calls: once across the fleet.
#[async_trait]
pub trait ProofLedger: Send + Sync {
    /// `true` for the first caller, `false` for every other one until the key expires.
    ///
    /// # Errors
    /// As [`LedgerError`] says; the call is denied.
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, LedgerError>;
}

/// Approvals: asked for before a call is answered so, used once across the fleet.
#[async_trait]
pub trait ApprovalLedger: Send + Sync {
    /// Stores that a call asks.
    ///
    /// # Errors
    /// As [`LedgerError`] says; the call is denied.
    async fn ask(&self, request: AskApproval) -> Result<AskOutcome, LedgerError>;

    /// Uses all that a call needs, or nothing.
    ///
    /// # Errors
    /// As [`LedgerError`] says; the call is denied.
    async fn use_once(&self, request: UseApprovals) -> Result<UseOutcome, LedgerError>;

    /// Gives back what a decision used that denied in the end. Whether there was something to give back.
    ///
    /// # Errors
    /// As [`LedgerError`] says; then it stays used.
    async fn give_back(&self, request: UseApprovals) -> Result<bool, LedgerError>;
}

/// Runs work to its end, whoever stops waiting for it.
pub type Spawn = Arc<dyn Fn(BoxFuture<'static, ()>) + Send + Sync>;

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
    /// Whether the revision is applied, policy and revocations both; polls soon and waits up to 300 ms. Polls that callers cause keep a
    /// distance from each other.
    async fn reach(&self, revision: &Revision) -> bool;
}
