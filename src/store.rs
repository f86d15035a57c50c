//! Where policy, revocations and administrative acts last: one trait, one suite, existing engines.
//!
//! A store keeps rows and numbers; it reads neither policy nor tokens. Look next at [`rules`] (what a write does to a row),
//! [`approvals`] (the same for approvals), [`chain`] (hashes and the digest), [`fleet`] (who follows), [`lineage`] (where a restored
//! store comes from), [`lapse`], [`second`] and [`signers`] (what expires, what takes two, whose key is revoked), `sqlite.rs` and `postgres.rs`,
//! then at `sync`, which follows a store.

pub mod approvals;
pub mod chain;
pub mod fleet;
pub mod lapse;
pub mod lineage;
pub mod postgres;
mod replay;
pub mod rules;
pub mod second;
pub mod signers;
pub mod sqlite;

use std::collections::BTreeMap;

use async_trait::async_trait;
use tokio::sync::watch;

pub use fleet::{Heartbeat, Registration, Replica, ReplicaState, Replicas};
pub use lineage::{Adoption, Kinship, Lineage, Merged};

use crate::model::approval::{ApprovalFilter, Approvals, AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::records::{ActRow, Change, DocumentKey, DocumentRow, RevocationRow, Target, Write};
use crate::model::revision::{HistoryId, Revision, StateDigest};

/// A store of one history of dense revisions.
#[async_trait]
pub trait Store: Send + Sync {
    /// The full state at one revision, as it is stored: whether the rows have the digest that stands with them is for the reader to
    /// check ([`State::has_its_digest`]), who may have better cores for it.
    ///
    /// # Errors
    /// If the store cannot be read, or is not what it was when it was opened.
    async fn load(&self) -> Result<State, Error>;

    /// Every commit after `after`, in order, at most a few thousand at once; empty when there is none.
    ///
    /// `history` and `head` are read in the same transaction, so that a reader sees a restored or shortened store: `head` below
    /// `after` is such a one. Cheap when there is nothing new, for it is asked many times a second.
    ///
    /// # Errors
    /// [`Error::BelowFloor`] when the log no longer reaches back to `after`, [`Error::Corrupt`] where numbers or hashes do not
    /// follow each other, and as [`Store::load`].
    async fn changes(&self, after: u64) -> Result<Changes, Error>;

    /// The newest revision, and nothing else.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn revision(&self) -> Result<Revision, Error>;

    /// The documents of a kind, or all, by kind and id.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn documents(&self, kind: Option<&str>) -> Result<Documents, Error>;

    /// Those of the named documents that there are, by kind and id. Cheap however many documents there are.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn documents_named(&self, keys: &[DocumentKey]) -> Result<Documents, Error>;

    /// The revocations of these targets, of those that have one, in no order. Cheap however many revocations there are.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn revocations_of(&self, targets: &[Target]) -> Result<Vec<RevocationRow>, Error>;

    /// The revocations that changed last, newest first, at most `limit` and never more than [`rules::REVOCATIONS_LISTED_MAX`].
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn revocations(&self, limit: usize) -> Result<Revocations, Error>;

    /// Makes all of a request durable as the next revision, or nothing of it.
    ///
    /// Revoking what is revoked already makes a revision all the same, so that there is one to wait for. A caller that stops
    /// waiting does not undo it: once asked, it is done or refused.
    ///
    /// # Errors
    /// [`Error::Conflict`] where a document is not at its expected revision, [`Error::ActReplayed`] where a signature was used
    /// before, [`Error::SignerRevoked`] where a key that signed is revoked, [`Error::NobodyLeft`] where no key of
    /// [`CommitRequest::one_must_sign`] would be left, [`Error::Rejected`] where a write makes no sense for what is stored or passes a limit of [`rules`]; then nothing
    /// was written. [`Error::Unknown`] where it cannot be said whether it was.
    async fn commit(&self, request: CommitRequest) -> Result<Committed, Error>;

    /// Spends a key once across the fleet: `true` for the first caller, `false` for every other one.
    ///
    /// The expiry says how long the key must be remembered. A key that expires no later than one that was forgotten already
    /// may be one of those: it gets `false` too, whatever the clock says.
    ///
    /// # Errors
    /// [`Error::Unknown`] where it cannot be said whether it was spent; any other error where it was not. The caller denies.
    async fn spend(&self, key: [u8; 32], expires_at_unix_s: i64) -> Result<bool, Error>;

    /// Stores that a call asks for an approval, before it is answered so; see [`approvals::ask`] for what that does to a row.
    ///
    /// Times are the store's clock's. Approvals belong to no revision: asking makes none, and no digest or snapshot holds one.
    /// Rows that may be forgotten by then ([`approvals::kept_until_unix_ms`]) are, some at a time. A row that is new counts
    /// against the quota of the leaf agent, of which at most
    /// [`APPROVALS_WAITING_MAX`](crate::model::limits::APPROVALS_WAITING_MAX) wait ([`approvals::is_waiting`], not expired).
    ///
    /// # Errors
    /// [`Error::Rejected`] for what [`approvals::check_ask`] objects to; [`Error::Unknown`] where it cannot be said whether it was
    /// stored; any other error where it was not. The caller denies.
    async fn ask_approval(&self, request: AskApproval) -> Result<AskOutcome, Error>;

    /// Uses what was approved, once across the fleet: all that the request names or nothing; see [`approvals::use_once`].
    ///
    /// A compare-and-set: of any number of callers that use one approval at once, one gets [`UseOutcome::Used`], the others see
    /// that it was used. The proof that comes with the call is spent in the same transaction. Makes no revision.
    ///
    /// # Errors
    /// [`Error::Rejected`] for what [`approvals::check_use`] objects to; [`Error::Unknown`] where it cannot be said whether it was
    /// used, and then the very same request finds it; any other error where nothing was used. The caller denies.
    async fn use_approvals(&self, request: UseApprovals) -> Result<UseOutcome, Error>;

    /// Gives back what a decision used and then denied; see [`approvals::give_back`]. The proof stays spent. Whether there was
    /// something to give back.
    ///
    /// # Errors
    /// As [`Store::use_approvals`]; then it stays used.
    async fn give_back_approvals(&self, request: UseApprovals) -> Result<bool, Error>;

    /// Approvals in the order of asking (those of one moment by digest), at most `limit` and never more than
    /// [`APPROVALS_LISTED_MAX`](crate::model::limits::APPROVALS_LISTED_MAX).
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn approvals(&self, filter: ApprovalFilter, limit: usize) -> Result<Approvals, Error>;

    /// The revisions that changed a document, newest first, at most `limit` and never more than [`rules::HISTORY_LISTED_MAX`];
    /// fewer where what they changed is more than [`rules::CHANGES_BYTES_MAX`] together, but one at the least.
    ///
    /// Cheap however many revocations stand between them.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn history(&self, limit: usize) -> Result<Vec<PolicyCommit>, Error>;

    /// The documents as they stood at an earlier revision, rebuilt from the change log; by kind and id.
    ///
    /// # Errors
    /// [`Error::BelowFloor`] where the log no longer reaches back to its beginning, [`Error::Rejected`] for a revision that is
    /// not there yet, and as [`Store::load`].
    async fn documents_at(&self, number: u64) -> Result<Documents, Error>;

    /// Makes a replica known, or known again. Who has been silent for longer than [`fleet::SILENCE_MS_MAX`] is forgotten on the way.
    ///
    /// # Errors
    /// [`Error::Rejected`] where a text is too long or [`fleet::REPLICAS_MAX`] are registered, and as [`Store::load`].
    async fn register(&self, registration: &Registration) -> Result<(), Error>;

    /// As [`Store::load`], for a replica that follows: the answer proves that the state was current when it was asked for.
    ///
    /// Where the store is replicated that takes a write, the replica's heartbeat, in the transaction that reads: a server that
    /// another one has replaced cannot commit it. Where it is one file, reading is proof, and the heartbeat is written now and then.
    ///
    /// # Errors
    /// [`Error::Unregistered`] for a replica that was forgotten, and as [`Store::load`]. After any of them nothing is proved.
    async fn load_as(&self, heartbeat: &Heartbeat) -> Result<State, Error>;

    /// As [`Store::changes`] after what the heartbeat says is applied, for a replica that follows; proof as with [`Store::load_as`].
    ///
    /// # Errors
    /// As [`Store::changes`] and [`Store::load_as`].
    async fn poll(&self, heartbeat: &Heartbeat) -> Result<Changes, Error>;

    /// Writes a heartbeat and reads nothing: for a replica that does not follow any more, and says so. Proves nothing.
    ///
    /// # Errors
    /// As [`Store::load_as`].
    async fn beat(&self, heartbeat: &Heartbeat) -> Result<(), Error>;

    /// Who follows. A row may be [`fleet::HEARTBEAT_INTERVAL_MS`] behind its replica, save for what it acknowledged.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn replicas(&self) -> Result<Replicas, Error>;

    /// Where the store stands and how it came there, whatever history was followed before; with the hash of the row of the change
    /// log that has the number `at`.
    ///
    /// # Errors
    /// As [`Store::load`], but for another history.
    async fn lineage(&self, at: u64) -> Result<Lineage, Error>;

    /// Who merged how much into the present history, by incarnation.
    ///
    /// # Errors
    /// As [`Store::load`].
    async fn merges(&self) -> Result<Vec<Merged>, Error>;

    /// From now on the store is expected to be of the history of that revision: who asks has seen that it was adopted from the one
    /// before.
    fn follow_history(&self, revision: &Revision);

    /// Why what was acknowledged here may be lost all the same, without a disaster; `None` where it may not.
    fn may_lose_commits(&self) -> Option<&'static str>;

    /// Closes the store once what was asked for is done, and leaves its files whole where it has files. What is asked for later fails.
    ///
    /// # Errors
    /// Where the files could not be left whole; nothing that was acknowledged is lost by that.
    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Wakes a follower after a commit of this process; only a hint, what is relied on is the poll.
    fn wake(&self) -> watch::Receiver<u64>;
}

/// What a store holds at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// History and number.
    pub revision: Revision,
    /// Hash of the newest row of the change log.
    pub hash: [u8; 32],
    /// The digest of the rows, as the newest commit stored it.
    pub digest: StateDigest,
    /// What all replicas share.
    pub settings: Settings,
    /// Every document.
    pub documents: Vec<StoredDocument>,
    /// Every revocation.
    pub revocations: Vec<RevocationRow>,
}

/// A document and the number of the revision that last put it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDocument {
    /// The document.
    pub row: DocumentRow,
    /// Number of its last revision.
    pub revision: u64,
}

/// Documents at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents {
    /// History and number.
    pub revision: Revision,
    /// By kind and id.
    pub documents: Vec<StoredDocument>,
}

/// The newest revocations at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocations {
    /// History and number.
    pub revision: Revision,
    /// Newest first.
    pub rows: Vec<RevocationRow>,
    /// How many there are in all.
    pub total: u64,
    /// When the revisions of the rows were committed and by whom, as far as the store still knows.
    pub commits: BTreeMap<u64, CommittedBy>,
}

/// When a revision was committed, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedBy {
    /// By the store's clock.
    pub unix_ms: i64,
    /// The operators' ids; none where a replica merged what it knew, or for the store's own upkeep.
    pub operators: Vec<String>,
}

/// Written once, when the store is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How far ahead an `iat` may be; a watermark lies this far ahead of the store's clock.
    pub iat_skew_s: i64,
    /// A replica without proof of freshness for this long only denies.
    pub freshness_bound_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { iat_skew_s: crate::model::limits::IAT_SKEW_S, freshness_bound_ms: 5_000 }
    }
}

/// A part of the change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The store's history.
    pub history: HistoryId,
    /// Number of its newest commit.
    pub head: u64,
    /// Hash of its newest commit, zeros before the first: a reader that has all sees whether it is the same all.
    pub head_hash: [u8; 32],
    /// Commits in order, dense.
    pub commits: Vec<CommitRow>,
}

/// One row of the change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitRow {
    /// Dense, from 1.
    pub number: u64,
    /// Hash of the row before; zeros before the first.
    pub previous_hash: [u8; 32],
    /// SHA-256(previous hash ‖ number as u64 big endian ‖ the changes as stored); see [`chain::commit_hash`].
    pub hash: [u8; 32],
    /// Digest of all logical rows after this commit.
    pub digest: StateDigest,
    /// By the store's clock.
    pub unix_ms: i64,
    /// The rows that changed.
    pub changes: Vec<Change>,
}

/// A revision that changed documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyCommit {
    /// The revision's number.
    pub number: u64,
    /// By the store's clock.
    pub unix_ms: i64,
    /// Who did it; absent where the store's own upkeep did.
    pub act: Option<ActRow>,
    /// The rows that changed.
    pub changes: Vec<Change>,
}

/// What a writer wants done at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitRequest {
    /// In order.
    pub writes: Vec<Write>,
    /// The revision at which each named document must stand; `None`: it must not exist. A revocation expects nothing.
    pub expected: Vec<(DocumentKey, Option<u64>)>,
    /// No document may have changed, come or gone since this revision: what fits the documents of then need not fit others.
    pub documents_unchanged_since: Option<u64>,
    /// Thumbprints of keys of which at least one must not be revoked once this is done: whoever holds it can undo it. None: any may be.
    pub one_must_sign: Vec<String>,
    /// Who does it; absent only for what the store's own upkeep does.
    pub act: Option<ActRow>,
}

/// What was made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The new revision.
    pub revision: Revision,
    /// By the store's clock.
    pub unix_ms: i64,
    /// The rows that changed; an approval is none of them.
    pub changes: Vec<Change>,
    /// [`Settings::freshness_bound_ms`]: for so long answers from before may still be used.
    pub freshness_bound_ms: u64,
}

/// Why a store did not do it. One line, with what to do where there is something to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A document was changed by somebody else meanwhile.
    #[error("document `{kind} {id}` was changed meanwhile: read it again and repeat")]
    Conflict {
        /// The document's kind.
        kind: String,
        /// The document's id.
        id: String,
    },
    /// Some document was changed by somebody else meanwhile.
    #[error("the policy was changed meanwhile, by revision {revision}: read it again and repeat")]
    DocumentsChanged {
        /// The newest revision that changed a document.
        revision: u64,
    },
    /// A signature's `jti` was used before.
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
    /// No key would be left that can sign what must be signed.
    #[error("nobody who administers would be left with a key that is not revoked")]
    NobodyLeft,
    /// A write makes no sense for what is stored, or passes a limit; nothing was written.
    #[error("{0}")]
    Rejected(String),
    /// The change log begins after what was asked for.
    #[error("the change log begins at {floor}: load the full state")]
    BelowFloor {
        /// The oldest revision that changes can be asked after.
        floor: u64,
    },
    /// The file or database is not a store of this program.
    #[error("{0}")]
    NotOurs(String),
    /// There is no store where one was named, or only what is left of one: never an empty store.
    #[error("{0}")]
    Missing(String),
    /// The store was made by a newer version of this program.
    #[error("{0}")]
    NewerVersion(String),
    /// The store is not the one that was opened: its file was replaced.
    #[error("{0}")]
    Replaced(String),
    /// The replica was never registered, or was silent so long that it was forgotten.
    #[error("the replica `{incarnation}` is not registered with the store: register it, then ask again")]
    Unregistered {
        /// Its incarnation.
        incarnation: String,
    },
    /// The server behind the store is not set up as it must be, or as it was said to be.
    #[error("{0}")]
    Misconfigured(String),
    /// What was read does not hold together.
    #[error("{0}")]
    Corrupt(String),
    /// The store cannot be reached or is busy; nothing was written.
    #[error("{0}")]
    Unavailable(String),
    /// The connection broke while committing: it may or may not have been written.
    #[error("{0}")]
    Unknown(String),
}
