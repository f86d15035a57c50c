//! The store of policy, revocations and administrative acts: one trait, `Store`, and one conformance suite for every
//! implementation.
//!
//! A store keeps rows and revision numbers. It interprets neither policy nor tokens.
//!
//! Look next at the rules that every store shares: [`write_rules`] (how a write changes a row), [`approval_rules`] (how an
//! approval changes), [`hash_chain`] (hashes and the digest), [`fleet`] (the replicas that follow a store), [`lineage`] (restored
//! stores), [`expiry`] (expiry of revocations), [`two_person`] (acts that need two operators) and [`signers`] (revoked keys sign
//! nothing). Then look at the implementations `sqlite.rs` and `postgres.rs`, and at `sync`, which follows a store.

pub mod approval_rules;
mod commit_rows;
mod document_history;
pub mod expiry;
pub mod fleet;
pub mod hash_chain;
pub mod lineage;
pub mod postgres;
mod request_checks;
pub mod signers;
pub mod sqlite;
pub mod two_person;
pub mod write_rules;

use std::collections::BTreeMap;

use async_trait::async_trait;
use tokio::sync::watch;

pub use fleet::{ReplicaHeartbeat, ReplicaList, ReplicaRegistration, ReplicaRow, ReplicaState};
pub use lineage::{LineageRelation, ReplicaMerge, StoreAdoption, StoreLineage};

use crate::model::approval::{
    ApprovalFilter, ApprovalPage, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest,
};
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{ActRow, DocumentKey, DocumentRow, RevocationRow, RevocationTarget, RowChange, StoreWrite};

/// A store of one history, whose revisions are numbered without a gap.
#[async_trait]
pub trait Store: Send + Sync {
    /// Loads the full state at one revision.
    ///
    /// The store does not check that the rows have the stored digest. The caller checks it with [`StoreState::digest_matches`],
    /// because the caller may have more cores to spare.
    ///
    /// # Errors
    /// If the store cannot be read, or is not the store that was opened.
    async fn load(&self) -> Result<StoreState, Error>;

    /// Reads the commits after `after`, in order, at most a few thousand at once. The list is empty when there is none.
    ///
    /// `history` and `head` are read in the same transaction, so that a caller detects a store that was restored or cut: its
    /// `head` is below `after`. The call is cheap when there is nothing new, because a follower makes it many times a second.
    ///
    /// # Errors
    /// [`Error::BelowFloor`] if the log no longer reaches back to `after`, [`Error::Corrupt`] if numbers or hashes do not follow
    /// each other, and as [`Store::load`].
    async fn changes(&self, after: u64) -> Result<ChangeLogPage, Error>;

    /// Reads the newest revision only.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn revision(&self) -> Result<Revision, Error>;

    /// Lists all documents, or those of one kind, ordered by kind and id.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn documents(&self, kind: Option<&str>) -> Result<DocumentList, Error>;

    /// Reads the documents with these keys, ordered by kind and id. Keys without a document are left out. The cost does not
    /// depend on how many documents the store holds.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn documents_by_key(&self, keys: &[DocumentKey]) -> Result<DocumentList, Error>;

    /// Reads the revocations of these targets, in no order. Targets without a revocation are left out. The cost does not depend
    /// on how many revocations the store holds.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn revocations_of(&self, targets: &[RevocationTarget]) -> Result<Vec<RevocationRow>, Error>;

    /// Lists the revocations that changed last, newest first: at most `limit` and never more than
    /// [`write_rules::REVOCATIONS_LISTED_MAX`].
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn revocations(&self, limit: usize) -> Result<RevocationPage, Error>;

    /// Makes a whole request durable as the next revision, or nothing of it.
    ///
    /// Revoking a target that is already revoked makes a revision too, so that the caller has a revision to wait for. Dropping
    /// the future does not undo a commit: once submitted, a request is either committed or refused.
    ///
    /// # Errors
    /// If nothing was written:
    ///
    /// - [`Error::Conflict`] if a document is not at its expected revision;
    /// - [`Error::ActReplayed`] if a signature was used before;
    /// - [`Error::SignerRevoked`] if a key that signed is revoked;
    /// - [`Error::NoSignerLeft`] if no key of [`CommitRequest::keep_one_unrevoked`] would remain;
    /// - [`Error::Rejected`] if a write does not fit the stored rows or exceeds a limit of [`write_rules`].
    ///
    /// [`Error::OutcomeUnknown`] if the store cannot tell whether the request was written.
    async fn commit(&self, request: CommitRequest) -> Result<CommitOutcome, Error>;

    /// Spends a key once across the fleet: `true` for the first caller, `false` for every other caller.
    ///
    /// The expiry says how long the store must remember the key. The store has forgotten keys up to some expiry; a key that
    /// expires no later may be one of them, so it gets `false` too, whatever the clock says.
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`] if the store cannot tell whether the key was spent; any other error if it was not. The caller denies.
    async fn spend_proof(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error>;

    /// Stores the approval request of a call before the call is answered. See [`approval_rules::ask_approval`] for how the row
    /// changes.
    ///
    /// Times are those of the store's clock. Approvals belong to no revision: asking makes no revision, and no digest or snapshot
    /// holds an approval. The same transaction removes a bounded number of rows that may be forgotten
    /// ([`approval_rules::kept_until_unix_ms`]). A new row counts against the quota of the leaf agent: at most
    /// [`APPROVALS_WAITING_MAX`](crate::model::limits::APPROVALS_WAITING_MAX) rows wait ([`approval_rules::is_waiting`]) and are
    /// not expired.
    ///
    /// # Errors
    /// [`Error::Rejected`] for a request that [`approval_rules::check_ask`] rejects; [`Error::OutcomeUnknown`] if the store
    /// cannot tell whether the row was stored; any other error if it was not. The caller denies.
    async fn ask_approval(&self, request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, Error>;

    /// Uses approvals once across the fleet: all that the request names, or none. See [`approval_rules::use_approvals`].
    ///
    /// A use is a compare-and-set: if several callers use one approval at once, one of them gets [`ApprovalUseOutcome::Used`] and the
    /// others learn that it was used. The proof that comes with the call is spent in the same transaction. A use makes no
    /// revision.
    ///
    /// # Errors
    /// [`Error::Rejected`] for a request that [`approval_rules::check_use`] rejects; [`Error::OutcomeUnknown`] if the store
    /// cannot tell whether the approvals were used, and then the same request repeated finds out; any other error if nothing was
    /// used. The caller denies.
    async fn use_approvals(&self, request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, Error>;

    /// Gives back the approvals that a decision used before it was denied after all; see [`approval_rules::give_back_approvals`].
    /// The proof stays spent. Returns whether anything was given back.
    ///
    /// # Errors
    /// As [`Store::use_approvals`]; the approvals then stay used.
    async fn give_back_approvals(&self, request: ApprovalUseRequest) -> Result<bool, Error>;

    /// Lists approvals in the order in which they were asked for, and by digest within the same millisecond: at most `limit` and
    /// never more than [`APPROVALS_LISTED_MAX`](crate::model::limits::APPROVALS_LISTED_MAX).
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<ApprovalPage, Error>;

    /// Lists the revisions that changed a document, newest first: at most `limit` and never more than
    /// [`write_rules::HISTORY_LISTED_MAX`].
    ///
    /// The list is shorter if the changes together exceed [`write_rules::CHANGES_BYTES_MAX`], but it holds at least one revision. The
    /// cost does not depend on how many revocations lie between these revisions.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn policy_history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error>;

    /// Rebuilds the documents of an earlier revision from the change log, ordered by kind and id.
    ///
    /// # Errors
    /// [`Error::BelowFloor`] if the log no longer reaches back to its beginning, [`Error::Rejected`] if the revision does not
    /// exist yet, and as [`Store::load`].
    async fn documents_at(&self, number: u64) -> Result<DocumentList, Error>;

    /// Registers a replica, or registers it again. Replicas that have been silent for longer than [`fleet::SILENCE_MS_MAX`] are
    /// removed in the same transaction.
    ///
    /// # Errors
    /// [`Error::Rejected`] if a text is too long or [`fleet::REPLICAS_MAX`] replicas are registered, and as [`Store::load`].
    async fn register_replica(&self, registration: &ReplicaRegistration) -> Result<(), Error>;

    /// Loads as [`Store::load`], for a replica that follows the store. The answer proves that the state was current when the call
    /// was made.
    ///
    /// If the store is replicated, the proof needs a write: the replica's heartbeat, in the transaction that reads. A server that
    /// was replaced by another cannot commit that write. If the store is one file, reading is proof enough, and the heartbeat is
    /// written only now and then.
    ///
    /// # Errors
    /// [`Error::Unregistered`] for a replica that was forgotten, and as [`Store::load`]. After an error nothing is proved.
    async fn load_for_replica(&self, heartbeat: &ReplicaHeartbeat) -> Result<StoreState, Error>;

    /// Reads as [`Store::changes`] after the revision that the heartbeat reports as applied, for a replica that follows the
    /// store. The answer is a proof as with [`Store::load_for_replica`].
    ///
    /// # Errors
    /// As [`Store::changes`] and [`Store::load_for_replica`].
    async fn poll_changes(&self, heartbeat: &ReplicaHeartbeat) -> Result<ChangeLogPage, Error>;

    /// Writes a heartbeat and reads nothing, for a replica that reports that it no longer follows the store. Proves nothing.
    ///
    /// # Errors
    /// As [`Store::load_for_replica`].
    async fn write_heartbeat(&self, heartbeat: &ReplicaHeartbeat) -> Result<(), Error>;

    /// Lists the replicas that follow the store. A row may lag behind its replica by [`fleet::HEARTBEAT_INTERVAL_MS`]; an
    /// acknowledgement never lags.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn replicas(&self) -> Result<ReplicaList, Error>;

    /// Reads the newest revision and the adoptions that led to it, whatever history the caller followed. The answer also holds
    /// the hash of the row `at` of the change log.
    ///
    /// # Errors
    /// As [`Store::load`], but a different history is no error.
    async fn lineage(&self, at: u64) -> Result<StoreLineage, Error>;

    /// Lists, by incarnation, how many rows each replica merged into the present history.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn merges(&self) -> Result<Vec<ReplicaMerge>, Error>;

    /// Expects the history of `revision` from now on. The caller has verified that this history was adopted from the one before.
    fn expect_history(&self, revision: &Revision);

    /// Says why the store may lose acknowledged commits even without a disaster; `None` if it may not.
    fn may_lose_commits(&self) -> Option<&'static str>;

    /// Closes the store after the pending requests and leaves its files, if it has any, complete. Later requests fail.
    ///
    /// # Errors
    /// If the files could not be left complete. No acknowledged commit is lost by that.
    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Returns a watch that wakes a follower after a commit of this process. It is only a hint; a follower relies on its polls.
    fn subscribe_commits(&self) -> watch::Receiver<u64>;
}

/// The content of a store at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreState {
    /// The history and the number.
    pub revision: Revision,
    /// Hash of the newest row of the change log.
    pub hash: [u8; 32],
    /// The digest of the rows, as the newest commit stored it.
    pub digest: StateDigest,
    /// The settings that all replicas share.
    pub settings: Settings,
    /// Every document.
    pub documents: Vec<StoredDocument>,
    /// Every revocation.
    pub revocations: Vec<RevocationRow>,
}

/// A document, and the number of the revision that last wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDocument {
    /// The document.
    pub row: DocumentRow,
    /// Number of the revision that last wrote it.
    pub revision: u64,
}

/// Documents at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentList {
    /// The history and the number.
    pub revision: Revision,
    /// Ordered by kind and id.
    pub documents: Vec<StoredDocument>,
}

/// The newest revocations at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevocationPage {
    /// The history and the number.
    pub revision: Revision,
    /// Newest first.
    pub rows: Vec<RevocationRow>,
    /// Number of all revocations in the store.
    pub total: u64,
    /// Time and operators of the commits of these rows' revisions, as far as the store still knows them.
    pub commits: BTreeMap<u64, CommitMetadata>,
}

/// The time of a commit, and its operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitMetadata {
    /// Time of the commit, by the store's clock.
    pub unix_ms: i64,
    /// The operators' ids. Empty if a replica merged its revocations, or if the store's own maintenance committed.
    pub operators: Vec<String>,
}

/// Settings that are written once, when the store is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How far in the future an `iat` may be. A watermark lies this far ahead of the store's clock.
    pub iat_skew_s: i64,
    /// A replica without a proof of freshness for this long only denies.
    pub freshness_bound_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { iat_skew_s: crate::model::limits::IAT_SKEW_S, freshness_bound_ms: 5_000 }
    }
}

/// A page of the change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeLogPage {
    /// The store's history.
    pub history: HistoryId,
    /// Number of its newest commit.
    pub head: u64,
    /// Hash of its newest commit, zeros before the first. A reader that has all commits checks with it that they are still the
    /// same.
    pub head_hash: [u8; 32],
    /// Commits in order, without a gap.
    pub commits: Vec<CommitRow>,
}

/// One row of the change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitRow {
    /// Without a gap, from 1.
    pub number: u64,
    /// Hash of the previous row; zeros before the first.
    pub previous_hash: [u8; 32],
    /// SHA-256(previous hash ‖ number as u64 big endian ‖ encoded changes); see [`hash_chain::commit_hash`].
    pub hash: [u8; 32],
    /// Digest of all rows of the store after this commit.
    pub digest: StateDigest,
    /// Time of the commit, by the store's clock.
    pub unix_ms: i64,
    /// The rows that changed.
    pub changes: Vec<RowChange>,
}

/// A revision that changed documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyCommit {
    /// The revision's number.
    pub number: u64,
    /// Time of the commit, by the store's clock.
    pub unix_ms: i64,
    /// The act that made the revision; absent for the store's own maintenance.
    pub act: Option<ActRow>,
    /// The rows that changed.
    pub changes: Vec<RowChange>,
}

/// The writes that one revision makes, and the conditions for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitRequest {
    /// Applied in this order.
    pub writes: Vec<StoreWrite>,
    /// The revision at which each named document must be; `None`: the document must not exist. A revocation has no expectation.
    pub expected: Vec<(DocumentKey, Option<u64>)>,
    /// If set, no document may have changed, appeared or disappeared since this revision, because a request that was validated
    /// against those documents may not fit others.
    pub documents_unchanged_since: Option<u64>,
    /// Thumbprints of keys of which at least one must not be revoked after the commit, so that the holder of that key can undo
    /// it. If the list is empty, any key may be revoked.
    pub keep_one_unrevoked: Vec<String>,
    /// The act that asks for it; absent only for the store's own maintenance.
    pub act: Option<ActRow>,
}

/// The result of a commit that is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitOutcome {
    /// The new revision.
    pub revision: Revision,
    /// Time of the commit, by the store's clock.
    pub unix_ms: i64,
    /// The rows that changed. Approvals are not among them.
    pub changes: Vec<RowChange>,
    /// [`Settings::freshness_bound_ms`]: for this long, replicas may still answer by an earlier revision.
    pub freshness_bound_ms: u64,
}

/// Why a store refused a request. The message is one line; it says what to do if there is something to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Another writer changed a document in the meantime.
    #[error("document `{kind} {id}` was changed meanwhile: read it again and repeat")]
    Conflict {
        /// The document's kind.
        kind: String,
        /// The document's id.
        id: String,
    },
    /// Another writer changed some document in the meantime.
    #[error("the policy was changed meanwhile, by revision {revision}: read it again and repeat")]
    DocumentsChanged {
        /// The newest revision that changed a document.
        revision: u64,
    },
    /// A signature with this `jti` was used before.
    #[error("the signed act `{jti}` was used before: sign a new one")]
    ActReplayed {
        /// The `jti`.
        jti: String,
    },
    /// A key that signed the act is revoked.
    #[error("the operator's key `{thumbprint}` is revoked: it signs nothing any more")]
    SignerRevoked {
        /// The key's thumbprint.
        thumbprint: String,
    },
    /// After the commit, no unrevoked key could sign the acts that must remain possible.
    #[error("nobody who administers would be left with a key that is not revoked")]
    NoSignerLeft,
    /// A write does not fit the stored rows, or exceeds a limit. Nothing was written.
    #[error("{0}")]
    Rejected(String),
    /// The change log begins after the requested revision.
    #[error("the change log begins at {floor}: load the full state")]
    BelowFloor {
        /// The oldest revision whose successors the log still holds.
        floor: u64,
    },
    /// The file or database does not belong to this program.
    #[error("{0}")]
    NotAStore(String),
    /// The path holds no store, or only the remains of one. An empty file is never taken for an empty store.
    #[error("{0}")]
    Missing(String),
    /// A newer version of this program created the store.
    #[error("{0}")]
    NewerVersion(String),
    /// The store is not the one that was opened: its file or database was replaced.
    #[error("{0}")]
    Replaced(String),
    /// The replica was never registered, or was silent for so long that the store forgot it.
    #[error("the replica `{incarnation}` is not registered with the store: register it, then ask again")]
    Unregistered {
        /// Its incarnation.
        incarnation: String,
    },
    /// The server behind the store is not configured as required, or not as its operator claimed.
    #[error("{0}")]
    Misconfigured(String),
    /// The data that was read is inconsistent.
    #[error("{0}")]
    Corrupt(String),
    /// The store cannot be reached or is busy. Nothing was written.
    #[error("{0}")]
    Unavailable(String),
    /// The connection broke during the commit. The request may or may not have been written.
    #[error("{0}")]
    OutcomeUnknown(String),
}
