//! The rows of a store and of its change log: documents, revocations and administrative acts.
//!
//! A revocation has a small fixed form, so reading it cannot fail. A document is canonical JSON that only `policy` interprets; a store
//! interprets neither.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::revision::HistoryId;

/// The key of a document.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DocumentKey {
    /// `issuer`, `application`, `group`, `tool`, `server`, `agent`, `permission_set`, `operator`.
    pub kind: String,
    /// Unique within its kind.
    pub id: String,
}

/// The owner of a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DocumentOrigin {
    /// A policy folder. `apply` removes the document if the folder no longer has it.
    Folder,
    /// The program or the API. `apply` does not change the document.
    Api,
}

/// One stored document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentRow {
    /// Its key.
    pub key: DocumentKey,
    /// The document as canonical JSON (RFC 8785), including `kind` and `id`.
    pub json: String,
    /// Path of the source file, relative to the policy folder; empty if there is none.
    pub path: String,
    /// First line of the document in that file, 1-based; 0 if there is no file.
    pub line: u32,
    /// Its owner.
    pub origin: DocumentOrigin,
}

/// The target of a revocation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevocationTarget {
    /// An agent, by SPIFFE ID.
    Agent(String),
    /// A session, by `sid`.
    Session(String),
    /// A task, by `txn`.
    Task(String),
    /// The delegation from a user to an agent.
    Delegation {
        /// The user's issuer.
        issuer: String,
        /// The user's subject.
        subject: String,
        /// The agent's SPIFFE ID.
        agent: String,
    },
    /// An application, by client id.
    Application(String),
    /// A user.
    User {
        /// The user's issuer.
        issuer: String,
        /// The user's subject.
        subject: String,
    },
    /// A key of a holder, an issuer or an operator, by thumbprint.
    Key(String),
    /// A tool, `server/tool`.
    Tool(String),
    /// A hop and all hops below it, by base64url(SHA-256) of its signing input.
    Hop(String),
    /// A token and all tokens below it, by `jti`.
    Token(String),
    /// Everything.
    All,
}

impl RevocationTarget {
    /// The kind of target, as on the command line.
    pub fn kind(&self) -> &'static str {
        match self {
            RevocationTarget::Agent(_) => "agent",
            RevocationTarget::Session(_) => "session",
            RevocationTarget::Task(_) => "task",
            RevocationTarget::Delegation { .. } => "delegation",
            RevocationTarget::Application(_) => "application",
            RevocationTarget::User { .. } => "user",
            RevocationTarget::Key(_) => "key",
            RevocationTarget::Tool(_) => "tool",
            RevocationTarget::Hop(_) => "hop",
            RevocationTarget::Token(_) => "token",
            RevocationTarget::All => "all",
        }
    }

    /// The id of a target that has one part. INVARIANT: none of these ids names a person.
    pub fn id(&self) -> Option<&str> {
        match self {
            RevocationTarget::Agent(id)
            | RevocationTarget::Session(id)
            | RevocationTarget::Task(id)
            | RevocationTarget::Application(id)
            | RevocationTarget::Key(id)
            | RevocationTarget::Tool(id)
            | RevocationTarget::Hop(id)
            | RevocationTarget::Token(id) => Some(id),
            RevocationTarget::Delegation { .. } | RevocationTarget::User { .. } | RevocationTarget::All => None,
        }
    }

    /// The parts of the key, in the order of the command line.
    pub fn key_parts(&self) -> Vec<&str> {
        match self {
            RevocationTarget::Delegation { issuer, subject, agent } => vec![issuer, subject, agent],
            RevocationTarget::User { issuer, subject } => vec![issuer, subject],
            one => one.id().into_iter().collect(),
        }
    }

    /// Whether the target can be suspended and reinstated. Other targets can only be revoked for good.
    pub fn can_suspend(&self) -> bool {
        matches!(
            self,
            RevocationTarget::Agent(_)
                | RevocationTarget::Delegation { .. }
                | RevocationTarget::Application(_)
                | RevocationTarget::User { .. }
                | RevocationTarget::Tool(_)
                | RevocationTarget::All
        )
    }

    /// Whether the target can have a watermark on roots.
    pub fn can_watermark(&self) -> bool {
        matches!(
            self,
            RevocationTarget::Agent(_)
                | RevocationTarget::Delegation { .. }
                | RevocationTarget::Application(_)
                | RevocationTarget::User { .. }
        )
    }
}

impl fmt::Display for RevocationTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        self.key_parts().iter().try_for_each(|part| write!(f, " {part}"))
    }
}

/// The effect of a revocation on its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevocationKind {
    /// Denied until reinstated.
    Suspend,
    /// Roots issued at or before now (plus the accepted skew) are void for good.
    Watermark,
    /// Denied for good.
    Dead,
}

/// The complete state of one target after a commit. A reinstatement writes a new state; it does not delete the row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationRow {
    /// The target.
    pub target: RevocationTarget,
    /// Denied for good.
    pub dead: bool,
    /// Denied until reinstated.
    pub suspended: bool,
    /// Roots whose `iat` is at or before this second are void. The value never falls.
    pub watermark_unix_s: Option<i64>,
    /// From this second on, no credential that the revocation applies to can be valid. A later commit prunes the row; a replica never does
    /// so by itself.
    pub expires_at_unix_s: Option<i64>,
    /// The operator's reason.
    pub reason: String,
    /// Number of the revision that last changed the row.
    pub revision: u64,
}

/// One change that a writer requests from a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreWrite {
    /// Write a document and replace the one with the same key.
    PutDocument(DocumentRow),
    /// Remove a document.
    RemoveDocument(DocumentKey),
    /// Revoke a target. The time of a watermark comes from the store's clock.
    Revoke {
        /// The target.
        target: RevocationTarget,
        /// The effect.
        kind: RevocationKind,
        /// The operator's reason.
        reason: String,
    },
    /// Lift the suspension of a target.
    Reinstate {
        /// The target.
        target: RevocationTarget,
        /// The operator's reason.
        reason: String,
    },
    /// Lift a suspension that needs two operators. The first call is stored and makes no [`RowChange`]. A second call by another operator
    /// lifts the suspension, if it comes in time.
    ReinstateByTwo {
        /// The target.
        target: RevocationTarget,
        /// The operator's reason.
        reason: String,
        /// The operator.
        operator: String,
        /// Thumbprint of the key that signed. A first call does not count if its key was revoked since.
        key: String,
        /// The operators who may make either call. A first call does not count if its operator is no longer among them.
        administrators: Vec<String>,
    },
    /// Remove revocations that can no longer apply to any credential, oldest first. It is the only write of its commit.
    Prune {
        /// Only revocations that expire before this second and before the store's clock are removed.
        before_unix_s: i64,
        /// Maximum number of rows.
        rows_max: usize,
    },
    /// Adopt a restored store. A new history begins at the end of the old one, and every root issued until now is void. It is an act, and
    /// the only write of its commit.
    Adopt {
        /// The operator's reason.
        reason: String,
    },
    /// Merge the revocations that a replica knew in a history from which the store was adopted. Each row becomes at least as strong. It is
    /// the only write of its commit.
    Merge(RevocationMerge),
    /// Approve a waiting call, for every layer whose approvers include one of the groups. Makes no [`RowChange`].
    Approve {
        /// The digest of the call.
        digest: String,
        /// The operator.
        operator: String,
        /// Thumbprint of the key that signed. If it is revoked later, the approved layers wait again.
        key: String,
        /// The operator's groups.
        groups: Vec<String>,
    },
    /// Refuse a waiting call. Makes no [`RowChange`].
    Refuse {
        /// The digest of the call.
        digest: String,
        /// The operator.
        operator: String,
        /// The operator's groups.
        groups: Vec<String>,
    },
}

impl StoreWrite {
    /// Whether this write changes documents.
    pub fn writes_document(&self) -> bool {
        matches!(self, StoreWrite::PutDocument(_) | StoreWrite::RemoveDocument(_))
    }
}

/// The revocations that a replica brings into an adopted store. A merge never lifts or weakens a revocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevocationMerge {
    /// The history to merge into: the history that the adoption began, and no later one.
    pub history: HistoryId,
    /// The replica's incarnation.
    pub incarnation: String,
    /// The replica's name and address, for people.
    pub address: String,
    /// Revocations that the replica knows and the store may lack. An empty list says that the replica has nothing to merge.
    pub rows: Vec<RevocationRow>,
}

/// One change of a commit, with the row after the commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowChange {
    /// A document was written.
    Document(DocumentRow),
    /// A document was removed.
    DocumentRemoved(DocumentKey),
    /// The state of a target changed.
    Revocation(RevocationRow),
    /// The revocation of a target was pruned, because it can no longer apply to any credential.
    RevocationRemoved(RevocationTarget),
}

impl RowChange {
    /// Whether a document changed.
    pub fn changes_document(&self) -> bool {
        matches!(self, RowChange::Document(_) | RowChange::DocumentRemoved(_))
    }
}

/// The stored first half of an act that needs two operators. It belongs to no revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingTwoPersonRow {
    /// The operator who made the first call.
    pub operator: String,
    /// Thumbprint of the key that signed; empty in rows of older versions.
    pub key: String,
    /// Time from which it no longer counts, by the store's clock.
    pub expires_at_unix_ms: i64,
}

/// An administrative act with the signature that proves it. The row is written in the transaction of the act.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActRow {
    /// Ids of the operators: one, or two if the act needs two.
    pub operators: Vec<String>,
    /// Thumbprints of the signing keys. The store refuses the act if one of them is revoked. Rows of older versions have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// Full gRPC method path.
    pub method: String,
    /// The operators' compact JWS signatures over the request.
    pub signatures: Vec<String>,
    /// The `jti` of each signature with its `exp` in seconds. The store accepts each `jti` once.
    pub jtis: Vec<(String, i64)>,
    /// The operator's reason, or a short summary of the act.
    pub reason: String,
}
