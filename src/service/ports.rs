//! The traits through which the service uses the store. `app` binds them. A request never reads the store in any other way.
//!
//! Look next at `service/ledger_task.rs`, which calls the ledgers, and at `app/wiring.rs`, which implements them.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::model::approval::{ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest};
use crate::model::replica::FleetStatus;
use crate::model::revision::Revision;

/// The reason why a ledger has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// Nothing was written, because the store is unavailable or too many writes wait for it.
    #[error("{0}")]
    Busy(String),
    /// It is unknown whether the write was made.
    #[error("{0}")]
    OutcomeUnknown(String),
}

/// The ledger of spent proofs. It spends each proof of a destructive call once across the fleet.
#[async_trait]
pub trait ProofLedger: Send + Sync {
    /// Spends a key. Returns `true` for the first caller, and `false` for every other caller until the key expires.
    ///
    /// # Errors
    /// As [`LedgerError`] says. The call is denied.
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, LedgerError>;
}

/// The ledger of approvals. It stores a request before the call is answered with it, and uses an approval once across the fleet.
#[async_trait]
pub trait ApprovalLedger: Send + Sync {
    /// Stores the approval request of a call.
    ///
    /// # Errors
    /// As [`LedgerError`] says. The call is denied.
    async fn ask_approval(&self, request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, LedgerError>;

    /// Uses all approvals that a call needs, or none.
    ///
    /// # Errors
    /// As [`LedgerError`] says. The call is denied.
    async fn use_approvals(&self, request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, LedgerError>;

    /// Gives back the approvals that a denied call has used. Returns whether there were any to give back.
    ///
    /// # Errors
    /// As [`LedgerError`] says. The approvals stay used then.
    async fn give_back_approvals(&self, request: ApprovalUseRequest) -> Result<bool, LedgerError>;
}

/// Spawns a task that runs to its end, even if its caller stops waiting.
pub type TaskSpawner = Arc<dyn Fn(BoxFuture<'static, ()>) + Send + Sync>;

/// The directory of the replicas that follow the store. No decision reads it.
#[async_trait]
pub trait FleetDirectory: Send + Sync {
    /// Reads the replicas. The answer may be a moment old.
    ///
    /// # Errors
    /// If the store cannot be read.
    async fn read_fleet(&self) -> Result<FleetStatus, String>;
}

/// Brings this replica up to a revision that a caller has seen.
#[async_trait]
pub trait RevisionCatchUp: Send + Sync {
    /// Whether this replica has applied a revision, in policy and in revocations. Requests a poll and waits up to 300 ms. Polls
    /// that callers cause keep a distance from each other.
    async fn catch_up_to(&self, revision: &Revision) -> bool;
}
