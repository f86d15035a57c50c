//! The rows that a store keeps and that the change log carries: documents, revocations, administrative acts.
//!
//! Revocations have a small fixed form that cannot fail to be understood; documents are canonical JSON whose meaning is
//! `policy`'s business. A store reads neither.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::revision::HistoryId;

/// Names one document.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DocumentKey {
    /// `issuer`, `application`, `group`, `tool`, `server`, `agent`, `permission_set`, `operator`.
    pub kind: String,
    /// Unique within its kind.
    pub id: String,
}

/// Where a document comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// A policy folder: `apply` removes it when the folder no longer names it.
    Folder,
    /// Made by the program or through the API: `apply` leaves it alone.
    Api,
}

/// One stored document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentRow {
    /// Its name.
    pub key: DocumentKey,
    /// The document as canonical JSON (RFC 8785), `kind` and `id` included.
    pub json: String,
    /// The file it was read from, relative to the policy folder; empty if there was none.
    pub path: String,
    /// The line it begins at, 1-based; 0 if there was no file.
    pub line: u32,
    /// Who owns it.
    pub origin: Origin,
}

/// What can be revoked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// An agent, by SPIFFE ID.
    Agent(String),
    /// A session, by `sid`.
    Session(String),
    /// A task, by `txn`.
    Task(String),
    /// What a user delegated to an agent.
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
    /// A key, by thumbprint: a holder's, an issuer's or an operator's.
    Key(String),
    /// A tool, `server/tool`.
    Tool(String),
    /// A hop and all below it, by base64url(SHA-256) of its signing input.
    Hop(String),
    /// A token and all below it, by `jti`.
    Token(String),
    /// Everything.
    All,
}

impl Target {
    /// The name of the kind of target, as on the command line.
    pub fn kind(&self) -> &'static str {
        match self {
            Target::Agent(_) => "agent",
            Target::Session(_) => "session",
            Target::Task(_) => "task",
            Target::Delegation { .. } => "delegation",
            Target::Application(_) => "application",
            Target::User { .. } => "user",
            Target::Key(_) => "key",
            Target::Tool(_) => "tool",
            Target::Hop(_) => "hop",
            Target::Token(_) => "token",
            Target::All => "all",
        }
    }

    /// The parts of the key, in the order of the command line.
    pub fn parts(&self) -> Vec<&str> {
        match self {
            Target::Agent(id)
            | Target::Session(id)
            | Target::Task(id)
            | Target::Application(id)
            | Target::Key(id)
            | Target::Tool(id)
            | Target::Hop(id)
            | Target::Token(id) => vec![id],
            Target::Delegation { issuer, subject, agent } => vec![issuer, subject, agent],
            Target::User { issuer, subject } => vec![issuer, subject],
            Target::All => vec![],
        }
    }

    /// Whether the target can be suspended and let in again; the others can only die.
    pub fn can_suspend(&self) -> bool {
        matches!(
            self,
            Target::Agent(_)
                | Target::Delegation { .. }
                | Target::Application(_)
                | Target::User { .. }
                | Target::Tool(_)
                | Target::All
        )
    }

    /// Whether a watermark on roots has a meaning for the target.
    pub fn can_watermark(&self) -> bool {
        matches!(self, Target::Agent(_) | Target::Delegation { .. } | Target::Application(_) | Target::User { .. })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        self.parts().iter().try_for_each(|part| write!(f, " {part}"))
    }
}

/// What a revocation does to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Meaning {
    /// Denied until reinstated.
    Suspend,
    /// Roots issued at or before now (plus the accepted skew) are void, for good.
    Watermark,
    /// Denied for good.
    Dead,
}

/// The whole state of one target after a commit. Reinstating writes it anew, nothing is deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationRow {
    /// What is revoked.
    pub target: Target,
    /// For good.
    pub dead: bool,
    /// Until reinstated.
    pub suspended: bool,
    /// Roots whose `iat` is at or before this second are void. Never falls.
    pub watermark_unix_s: Option<i64>,
    /// When nothing that it could hit can still be valid; pruned by a commit after that, never by a replica's own idea.
    pub expires_at_unix_s: Option<i64>,
    /// The operator's words.
    pub reason: String,
    /// Number of the revision that last changed the row.
    pub revision: u64,
}

/// What a writer asks a store to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Put a document in place of what stands under its key.
    PutDocument(DocumentRow),
    /// Remove a document.
    RemoveDocument(DocumentKey),
    /// Revoke a target. The store's clock dates a watermark.
    Revoke {
        /// What.
        target: Target,
        /// How.
        meaning: Meaning,
        /// Why, in the operator's words.
        reason: String,
    },
    /// Lift the suspension of a target.
    Reinstate {
        /// What.
        target: Target,
        /// Why.
        reason: String,
    },
    /// Lift a suspension, which takes two operators: the first call is kept and makes no [`Change`], the second, by another operator
    /// and in time, lifts it.
    ReinstateByTwo {
        /// What.
        target: Target,
        /// Why.
        reason: String,
        /// Who.
        operator: String,
        /// Thumbprint of the key that the operator signed with: a first half whose key was revoked since does not count.
        key: String,
        /// Who may be the first or the second: whoever asked and is not one of them any more does not count.
        administrators: Vec<String>,
    },
    /// Take away revocations that can hit nothing any more, the oldest first; the only write of its commit.
    Prune {
        /// Those whose expiry is before this second and before the store's clock.
        before_unix_s: i64,
        /// At most so many.
        rows_max: usize,
    },
    /// Take a restored store over: a new history begins where the old one ends, and every root issued until now is void. The only
    /// write of its commit, and an act.
    Adopt {
        /// Why.
        reason: String,
    },
    /// What a replica knew to be revoked in a history that the store was adopted from: each row is made at least as strong. The only
    /// write of its commit.
    Merge(Merge),
    /// Approve a call that waits, for every layer whose approvers are one of the groups. Makes no [`Change`].
    Approve {
        /// The call.
        digest: String,
        /// Who.
        operator: String,
        /// Thumbprint of the key that the operator signed with: once it is revoked, what it approved waits again.
        key: String,
        /// The operator's groups.
        groups: Vec<String>,
    },
    /// Refuse a call that waits. Makes no [`Change`].
    Refuse {
        /// The call.
        digest: String,
        /// Who.
        operator: String,
        /// The operator's groups.
        groups: Vec<String>,
    },
}

impl Write {
    /// Whether it writes documents.
    pub fn is_of_document(&self) -> bool {
        matches!(self, Write::PutDocument(_) | Write::RemoveDocument(_))
    }
}

/// What a replica brings into a store that was adopted. Nothing is lifted or weakened by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The history that it goes into: that of the adoption, and of no later one.
    pub history: HistoryId,
    /// The replica's incarnation.
    pub incarnation: String,
    /// Its name and where it listens, for people.
    pub address: String,
    /// What it knows to be revoked and the store may lack. None: it says that it brings nothing.
    pub rows: Vec<RevocationRow>,
}

/// What a commit changed: the rows as they stand after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A document was put.
    Document(DocumentRow),
    /// A document was removed.
    DocumentRemoved(DocumentKey),
    /// A target's state is now this.
    Revocation(RevocationRow),
    /// What was revoked of a target can hit nothing any more, and is gone.
    RevocationRemoved(Target),
}

impl Change {
    /// Whether a document changed.
    pub fn is_of_document(&self) -> bool {
        matches!(self, Change::Document(_) | Change::DocumentRemoved(_))
    }
}

/// The first half of an act that takes two operators. Belongs to no revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingRow {
    /// Who asked.
    pub operator: String,
    /// Thumbprint of the key that they signed with; empty in a row of an older version.
    pub key: String,
    /// From then on it counts no more, by the store's clock.
    pub expires_at_unix_ms: i64,
}

/// Who did what, with the signature that proves it; a row of the transaction that did it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActRow {
    /// The operators' ids: one, or two where two are demanded.
    pub operators: Vec<String>,
    /// Thumbprints of the keys that signed: the store refuses the act where one of them is revoked. An older version wrote none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// Full gRPC method path.
    pub method: String,
    /// The operators' compact JWS over the request.
    pub signatures: Vec<String>,
    /// The `jti` of each signature with its `exp` in seconds: single use, enforced by the store.
    pub jtis: Vec<(String, i64)>,
    /// The reason that was given, or a short account of the act.
    pub reason: String,
}
