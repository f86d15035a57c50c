//! Documents: what a policy is made of, one type for each `kind`.
//!
//! A [`Document`] is well formed by itself; whether the names in it exist is said by [`validate`](super::validate). It comes from
//! YAML ([`source`](super::source)) or from a stored row, through one reader, and goes back to a row as canonical JSON. Look
//! next at `document/entry.rs` for entries and their arguments, then at `document/read.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::ids::{AgentId, ApplicationId, GroupId, IssuerUri, OperatorId, Thumbprint, UserId};
use crate::model::json;
use crate::model::jwk::{NamedKey, PublicKey};
use crate::model::records::{DocumentKey, DocumentRow, Origin};

use super::Error;
use super::condition::Condition;
use super::diagnostic::{Diagnostic, Position, Severity};
use super::node::Node;

mod case;
mod entry;
mod fields;
mod read;
mod write;

pub use case::{Expectation, TestSpec};
pub use entry::{Approval, Entry, Terms};
pub(super) use entry::{List, is_unsatisfiable};
#[cfg(test)]
pub(super) use read::KINDS;
pub use read::tool_name_error;
pub(super) use read::{KeyFiles, key_file_named, path_beside, read};

/// What the kind of a document in `mode: shadow` ends with in its key, so that it can stand beside the one that is in force.
pub const SHADOW_SUFFIX: &str = ".shadow";

/// Kinds that a document in `mode: shadow` may have: those that narrow or permit, not those that say who anybody is.
pub const SHADOW_KINDS: &[&str] = &["application", "group", "agent", "permission_set", "guardrail"];

/// Kinds that may say `two_person`: what can be suspended by itself, and let in again.
pub const TWO_PERSON_KINDS: &[&str] = &["agent", "application", "tool", "server"];

/// Keys of one agent: more than an issuer's, since each copy of an agent may hold its own.
pub const AGENT_KEYS_MAX: usize = 64;

/// One document of a policy.
#[derive(Clone, Debug)]
pub struct Document {
    /// Kind and id.
    pub key: DocumentKey,
    /// What it says.
    pub body: Body,
    /// Whether two people are needed to let in again what it names, once that was suspended; of a server each of its tools.
    pub two_person: bool,
    /// The file it was read from, relative to the policy folder; empty if there was none.
    pub path: String,
    /// The line it begins at, 1-based; 0 if there was no file.
    pub line: u32,
    /// Where its parts stand; empty for a stored document.
    pub(super) positions: Positions,
}

/// Where the parts of a document stand: by key, and for a list by key and index.
#[derive(Clone, Debug, Default)]
pub(super) struct Positions(BTreeMap<(&'static str, usize), Position>);

/// What a document says, by kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Whom we trust to start a chain.
    Issuer(IssuerSpec),
    /// An application's ceiling.
    Application(Permissions),
    /// The ceiling of users, by group.
    Group(Permissions),
    /// A tool.
    Tool(ToolSpec),
    /// The tools of one MCP server.
    Server(ServerSpec),
    /// An agent.
    Agent(AgentSpec),
    /// Permissions to be included elsewhere.
    PermissionSet(Permissions),
    /// A person or a pipeline that may administer.
    Operator(OperatorSpec),
    /// What can only take away.
    Guardrail(GuardrailSpec),
    /// What calls must come to; run before policy is applied, never stored.
    Test(Box<TestSpec>),
}

/// Some names, or all there are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Names<T> {
    /// `["*"]`
    All,
    /// These; none where the list is empty.
    Some(Vec<T>),
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Names::Some(Vec::new())
    }
}

impl<T: PartialEq> Names<T> {
    /// Whether a name is meant.
    pub fn contains(&self, name: &T) -> bool {
        match self {
            Names::All => true,
            Names::Some(names) => names.contains(name),
        }
    }
}

/// Whom we trust to sign roots, and for what.
#[derive(Clone, Debug, PartialEq)]
pub struct IssuerSpec {
    /// `iss` of its roots.
    pub id: IssuerUri,
    /// Its keys, 1 to [`KEYS_MAX`](crate::model::limits::KEYS_MAX).
    pub keys: Vec<NamedKey>,
    /// What its roots may carry as `aud`.
    pub audiences: Vec<Arc<str>>,
    /// Groups it may say a user is in.
    pub groups: Names<GroupId>,
    /// Types of its tokens: `aat+jwt`, `at+jwt`.
    pub typ: Vec<TokenType>,
    /// Life of its roots, `exp - iat`.
    pub lifetime_max_s: i64,
    /// Life of a hop under its roots.
    pub hop_lifetime_max_s: i64,
    /// Applications it may speak for.
    pub applications: Names<ApplicationId>,
}

/// The `typ` of a root token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenType {
    /// `aat+jwt`: an attenuating agent token.
    Attenuating,
    /// `at+jwt`: an RFC 9068 access token.
    Access,
}

impl TokenType {
    /// Every type.
    pub const ALL: &'static [TokenType] = &[TokenType::Attenuating, TokenType::Access];

    /// The value of the header.
    pub fn as_str(self) -> &'static str {
        match self {
            TokenType::Attenuating => "aat+jwt",
            TokenType::Access => "at+jwt",
        }
    }
}

/// What is allowed, with approval or without, and what is not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Permissions {
    /// Permits.
    pub allow: Vec<Entry>,
    /// Permits once an operator approved the very call; beats `allow`.
    pub approve: Vec<Entry>,
    /// Denies; beats both.
    pub deny: Vec<Entry>,
    /// Permission sets whose entries count as written here.
    pub include: Vec<Arc<str>>,
}

/// An agent.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentSpec {
    /// Its SPIFFE ID.
    pub id: AgentId,
    /// Who answers for it.
    pub owner: Option<Arc<str>>,
    /// Thumbprints of its holder keys.
    pub keys: Vec<Thumbprint>,
    /// Applications it may run inside.
    pub applications: Names<ApplicationId>,
    /// Groups whose users it may act for.
    pub acts_for: Names<GroupId>,
    /// Agents it may hand a part of its delegation to; there is no "all".
    pub delegates_to: Vec<AgentId>,
    /// Life of a root that names it first, if it is to be shorter than the issuer's.
    pub session_lifetime_max_s: Option<i64>,
    /// Hops that may follow it, if it is to be fewer than a chain can have.
    pub session_hops_max: Option<u64>,
    /// What it may do.
    pub permissions: Permissions,
}

/// What a call of a tool may do; the order is of growing harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Risk {
    /// Looks.
    Read,
    /// Changes what can be changed back.
    Write,
    /// Does what cannot be undone.
    Destructive,
}

impl Risk {
    /// Every risk.
    pub const ALL: &'static [Risk] = &[Risk::Read, Risk::Write, Risk::Destructive];

    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Risk::Read => "read",
            Risk::Write => "write",
            Risk::Destructive => "destructive",
        }
    }

    /// The proof class of a tool that names none.
    pub fn default_proof(self) -> ProofClass {
        match self {
            Risk::Read => ProofClass::PerHandle,
            Risk::Write | Risk::Destructive => ProofClass::PerCall,
        }
    }
}

/// When a call needs a proof of possession.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProofClass {
    /// Each call.
    PerCall,
    /// Once, when the handle is made.
    PerHandle,
    /// Never.
    None,
}

impl ProofClass {
    /// Every class.
    pub const ALL: &'static [ProofClass] = &[ProofClass::PerCall, ProofClass::PerHandle, ProofClass::None];

    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            ProofClass::PerCall => "per_call",
            ProofClass::PerHandle => "per_handle",
            ProofClass::None => "none",
        }
    }
}

/// A tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToolSpec {
    /// What a call may do; `destructive` unless the document says less.
    pub risk: Risk,
    /// When a call needs a proof, if the document says so.
    pub proof: Option<ProofClass>,
    /// SHA-256 of the schema a call must have been made against.
    pub schema_sha256: Option<[u8; 32]>,
}

/// The tools of one server.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSpec {
    /// The part of a tool's name before the first slash.
    pub id: Arc<str>,
    /// By the part of the name after it.
    pub tools: BTreeMap<Arc<str>, ToolSpec>,
}

/// Who may administer.
#[derive(Clone, Debug, PartialEq)]
pub struct OperatorSpec {
    /// Its name.
    pub id: OperatorId,
    /// Its public keys, 1 to [`KEYS_MAX`](crate::model::limits::KEYS_MAX).
    pub keys: Vec<PublicKey>,
    /// What it may do.
    pub roles: Vec<Role>,
    /// Groups of operators it is in, which `by` of an approval names.
    pub groups: Vec<GroupId>,
    /// The users this operator is; it never approves their calls.
    pub users: Vec<UserId>,
}

/// A condition under which calls of some tools are forbidden, whoever makes them.
#[derive(Clone, Debug, PartialEq)]
pub struct GuardrailSpec {
    /// Names and patterns of the tools; never empty.
    pub tools: Vec<Arc<str>>,
    /// Forbids the call where it holds, and where it cannot be evaluated.
    pub forbid_when: Condition,
}

/// What an operator may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Kill, and list what is killed.
    Respond,
    /// Policy, agents, reinstatement.
    Administer,
    /// Approve calls.
    Approve,
    /// Read the audit log.
    Audit,
}

impl Role {
    /// Every role.
    pub const ALL: &'static [Role] = &[Role::Respond, Role::Administer, Role::Approve, Role::Audit];

    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Respond => "respond",
            Role::Administer => "administer",
            Role::Approve => "approve",
            Role::Audit => "audit",
        }
    }
}

/// Two documents are equal if they say the same, wherever they stand.
impl PartialEq for Document {
    fn eq(&self, other: &Self) -> bool {
        (&self.key, &self.body, self.two_person) == (&other.key, &other.body, other.two_person)
    }
}

impl Document {
    /// A document that was made by the program; it has no file.
    pub fn new(body: Body, id: &str) -> Self {
        let key = DocumentKey { kind: body.kind().to_owned(), id: id.to_owned() };
        Self { key, body, two_person: false, path: String::new(), line: 0, positions: Positions::default() }
    }

    /// Whether the document is in `mode: shadow`: what it would change is recorded, nothing of it is enforced.
    pub fn is_shadow(&self) -> bool {
        self.key.kind.ends_with(SHADOW_SUFFIX)
    }

    /// The same document in `mode: shadow`.
    pub fn in_shadow(mut self) -> Self {
        self.key.kind = format!("{}{SHADOW_SUFFIX}", self.body.kind());
        self
    }

    /// The row that a store keeps: canonical JSON (RFC 8785), keys in place of the file that held them.
    pub fn to_row(&self, origin: Origin) -> DocumentRow {
        DocumentRow { key: self.key.clone(), json: write::value(self).to_jcs(), path: self.path.clone(), line: self.line, origin }
    }

    /// Reads a stored row. `from_row(to_row(d)) == d`.
    ///
    /// # Errors
    /// [`Error::Stored`] if the row is not such a document, or is under another key.
    pub fn from_row(row: &DocumentRow) -> Result<Self, Error> {
        let stored = |problem: String| Error::Stored { kind: row.key.kind.clone(), id: row.key.id.clone(), problem };
        let value = json::parse(row.json.as_bytes()).map_err(|error| stored(error.to_string()))?;
        let at = Position { line: row.line.max(1), column: 1 };
        let mut out = Vec::new();
        let document = read(&Node::from_value(&value, at), &row.path, &KeyFiles::none(), &mut out);
        match (document, out.iter().find(|diagnostic| diagnostic.is_error())) {
            (_, Some(error)) => Err(stored(error.message.clone())),
            (Some(Self { body: Body::Test(_), .. }), None) => {
                Err(stored("a test is run where it is written, not stored".to_owned()))
            }
            (Some(document), None) if document.key == row.key => {
                Ok(Self { line: row.line, positions: Positions::default(), ..document })
            }
            _ => Err(stored("it is another document".to_owned())),
        }
    }

    /// The permissions it holds, if it is of a kind that does.
    pub fn permissions(&self) -> Option<&Permissions> {
        match &self.body {
            Body::Application(permissions) | Body::Group(permissions) | Body::PermissionSet(permissions) => Some(permissions),
            Body::Agent(agent) => Some(&agent.permissions),
            _ => None,
        }
    }

    /// Where a part stands, or where the document begins.
    pub(super) fn position(&self, field: &'static str, index: usize) -> Position {
        let start = || Position { line: self.line.max(1), column: 1 };
        self.positions.0.get(&(field, index)).copied().unwrap_or_else(start)
    }

    /// A finding about a part.
    pub(super) fn diagnostic(&self, severity: Severity, field: &'static str, index: usize, message: String) -> Diagnostic {
        Diagnostic::new(severity, &self.path, self.position(field, index), message)
    }
}

impl Positions {
    fn put(&mut self, field: &'static str, index: usize, at: Position) {
        self.0.insert((field, index), at);
    }
}

impl Body {
    /// The `kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Body::Issuer(_) => "issuer",
            Body::Application(_) => "application",
            Body::Group(_) => "group",
            Body::Tool(_) => "tool",
            Body::Server(_) => "server",
            Body::Agent(_) => "agent",
            Body::PermissionSet(_) => "permission_set",
            Body::Operator(_) => "operator",
            Body::Guardrail(_) => "guardrail",
            Body::Test(_) => "test",
        }
    }
}
