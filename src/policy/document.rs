//! Documents, the units of a policy. Each `kind` of document has its own type.
//!
//! A [`Document`] is well formed by itself. [`validate`](super::validate) checks that the names in it exist. A document comes
//! from YAML ([`source`](super::source)) or from a stored row, and one reader serves both. It is stored as canonical JSON. Look
//! next at `document/entry.rs` for entries and their arguments, then at `document/read.rs`.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use crate::model::constraint::abbreviate;
use crate::model::ids::{AgentId, ApplicationId, GroupId, IssuerUri, OperatorId, Thumbprint, UserId};
use crate::model::json;
use crate::model::jwk::{NamedKey, PublicKey};
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow};

use super::Error;
use super::condition::Condition;
use super::diagnostic::{Diagnostic, Severity, SourcePosition};
use super::node::SourceNode;

mod entry;
mod field_reader;
mod read;
mod stored_json;
mod test_case;
mod write;

pub use entry::{ApprovalRule, EntryTerms, PermissionEntry};
pub(super) use entry::{ListKind, is_unsatisfiable};
#[cfg(test)]
pub(super) use read::DOCUMENT_KINDS;
pub use read::tool_name_error;
pub(super) use read::{KeyFiles, key_file_reference, read_document, resolve_relative_path};
pub use test_case::{ExpectedCall, TestSpec};

/// The suffix that `mode: shadow` adds to the kind in a document's key. With it, a shadow document can exist beside the enforced
/// one.
pub const SHADOW_KIND_SUFFIX: &str = ".shadow";

/// The kinds that allow `mode: shadow`: kinds that permit or restrict calls. Kinds that establish an identity do not allow it.
pub const SHADOW_KINDS: &[&str] = &["application", "group", "agent", "permission_set", "guardrail"];

/// The kinds that allow `two_person`: a document of such a kind names something that can be suspended and reinstated by itself.
pub const TWO_PERSON_KINDS: &[&str] = &["agent", "application", "tool", "server"];

/// The maximum number of keys of one agent. It is larger than the limit of an issuer, because each copy of an agent may hold its
/// own key.
pub const AGENT_KEYS_MAX: usize = 64;

/// One document of a policy.
#[derive(Clone, Debug)]
pub struct Document {
    /// The kind and the id.
    pub key: DocumentKey,
    /// The content.
    pub body: DocumentBody,
    /// Whether two operators are needed to reinstate the target of this document after a suspension. For a server this holds for
    /// each of its tools.
    pub two_person: bool,
    /// The file that holds the document, relative to the policy folder. Empty if the document has no file.
    pub path: String,
    /// The first line of the document, 1-based; 0 if the document has no file.
    pub line: u32,
    /// The positions of its fields in the file. Empty for a stored document.
    pub(super) positions: FieldPositions,
}

/// The positions of a document's fields: by field name, and for a list by field name and index.
#[derive(Clone, Debug, Default)]
pub(super) struct FieldPositions(BTreeMap<(&'static str, usize), SourcePosition>);

/// The content of a document, by kind.
#[derive(Clone, Debug, PartialEq)]
pub enum DocumentBody {
    /// An issuer that may sign the first token of a chain.
    Issuer(IssuerSpec),
    /// The ceiling of an application.
    Application(PermissionLists),
    /// The ceiling of the users in a group.
    Group(PermissionLists),
    /// A tool.
    Tool(ToolSpec),
    /// The tools of one MCP server.
    Server(ServerSpec),
    /// An agent.
    Agent(AgentSpec),
    /// Permissions that other documents include.
    PermissionSet(PermissionLists),
    /// A person or a pipeline with administrative roles.
    Operator(OperatorSpec),
    /// A condition that forbids calls and never permits one.
    Guardrail(GuardrailSpec),
    /// Expected answers for calls. Tests run before a policy is applied, and they are never stored.
    Test(Box<TestSpec>),
}

/// A selection of names: the listed ones, or all.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NameSelection<T> {
    /// Every name, written `["*"]`.
    All,
    /// The listed names. An empty list selects no name.
    Listed(Vec<T>),
}

impl<T> Default for NameSelection<T> {
    fn default() -> Self {
        NameSelection::Listed(Vec::new())
    }
}

impl<T: PartialEq> NameSelection<T> {
    /// Whether the selection contains a name.
    pub fn contains(&self, name: &T) -> bool {
        match self {
            NameSelection::All => true,
            NameSelection::Listed(names) => names.contains(name),
        }
    }
}

/// An issuer of roots: its keys, and the limits of what its roots may claim.
#[derive(Clone, Debug, PartialEq)]
pub struct IssuerSpec {
    /// The `iss` of its roots.
    pub id: IssuerUri,
    /// Its keys, 1 to [`KEYS_MAX`](crate::model::limits::KEYS_MAX).
    pub keys: Vec<NamedKey>,
    /// The values that its roots may carry as `aud`.
    pub audiences: Vec<Arc<str>>,
    /// The groups that its roots may put a user in.
    pub groups: NameSelection<GroupId>,
    /// The types of its tokens: `aat+jwt`, `at+jwt`.
    pub typ: Vec<TokenType>,
    /// The longest lifetime of its roots, `exp - iat`, in seconds.
    pub lifetime_max_s: i64,
    /// The longest lifetime of a hop under its roots, in seconds.
    pub hop_lifetime_max_s: i64,
    /// The applications that its roots may name.
    pub applications: NameSelection<ApplicationId>,
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

    /// The value of the `typ` header.
    pub fn as_str(self) -> &'static str {
        match self {
            TokenType::Attenuating => "aat+jwt",
            TokenType::Access => "at+jwt",
        }
    }
}

/// Three lists of entries: calls that are allowed, calls that need an approval, and calls that are denied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PermissionLists {
    /// Entries that permit a call.
    pub allow: Vec<PermissionEntry>,
    /// Entries that permit a call after an operator approved exactly this call. They take precedence over `allow`.
    pub approve: Vec<PermissionEntry>,
    /// Entries that deny a call. They take precedence over `allow` and `approve`.
    pub deny: Vec<PermissionEntry>,
    /// Permission sets whose entries count as if they were written here.
    pub include: Vec<Arc<str>>,
}

/// An agent.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentSpec {
    /// Its SPIFFE ID.
    pub id: AgentId,
    /// The person or team that is responsible for the agent.
    pub owner: Option<Arc<str>>,
    /// The thumbprints of its holder keys.
    pub keys: Vec<Thumbprint>,
    /// The applications that the agent may run in.
    pub applications: NameSelection<ApplicationId>,
    /// The groups whose users the agent may act for.
    pub acts_for: NameSelection<GroupId>,
    /// The agents that this agent may delegate to. Every agent must be named; there is no wildcard.
    pub delegates_to: Vec<AgentId>,
    /// The longest lifetime of a root that names this agent first, in seconds. `None`: the limit of the issuer applies.
    pub session_lifetime_max_s: Option<i64>,
    /// The number of hops that may follow this agent. `None`: the general limit of a chain applies.
    pub session_hops_max: Option<u64>,
    /// The permissions of the agent.
    pub permissions: PermissionLists,
}

/// The harm that a call of a tool can do, ordered from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ToolRisk {
    /// The call only reads.
    Read,
    /// The call makes changes that can be undone.
    Write,
    /// The call makes changes that cannot be undone.
    Destructive,
}

impl ToolRisk {
    /// Every risk.
    pub const ALL: &'static [ToolRisk] = &[ToolRisk::Read, ToolRisk::Write, ToolRisk::Destructive];

    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            ToolRisk::Read => "read",
            ToolRisk::Write => "write",
            ToolRisk::Destructive => "destructive",
        }
    }

    /// The proof class of a tool whose document names none.
    pub fn default_proof(self) -> ProofClass {
        match self {
            ToolRisk::Read => ProofClass::PerHandle,
            ToolRisk::Write | ToolRisk::Destructive => ProofClass::PerCall,
        }
    }
}

/// When a call needs a proof of possession.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProofClass {
    /// For every call.
    PerCall,
    /// Once, when the handle is created.
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
    /// The risk of a call; `destructive` unless the document states less.
    pub risk: ToolRisk,
    /// When a call needs a proof of possession. `None`: the default of the risk applies.
    pub proof: Option<ProofClass>,
    /// SHA-256 of the schema that the caller must have used. `None`: the schema is not checked.
    pub schema_sha256: Option<[u8; 32]>,
}

/// The tools of one server.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSpec {
    /// The part of a tool's name before the first slash.
    pub id: Arc<str>,
    /// The tools, by the part of the name after the first slash.
    pub tools: BTreeMap<Arc<str>, ToolSpec>,
}

/// A person or a pipeline that may administer.
#[derive(Clone, Debug, PartialEq)]
pub struct OperatorSpec {
    /// The id of the operator.
    pub id: OperatorId,
    /// Its public keys, 1 to [`KEYS_MAX`](crate::model::limits::KEYS_MAX).
    pub keys: Vec<PublicKey>,
    /// The roles of the operator.
    pub roles: Vec<OperatorRole>,
    /// The operator groups that it belongs to. `by` of an `approve` entry names such groups.
    pub groups: Vec<GroupId>,
    /// The users that are the same person as this operator. The operator can never approve their calls.
    pub users: Vec<UserId>,
}

/// A condition that forbids calls of some tools, for every caller.
#[derive(Clone, Debug, PartialEq)]
pub struct GuardrailSpec {
    /// Names and patterns of the guarded tools; never empty.
    pub tools: Vec<Arc<str>>,
    /// The condition. A call is forbidden if the condition holds or cannot be evaluated.
    pub forbid_when: Condition,
}

/// A role of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OperatorRole {
    /// Revoke, and list revocations.
    Respond,
    /// Change policy and agents, and reinstate revoked targets.
    Administer,
    /// Approve calls.
    Approve,
    /// Read the audit log.
    Audit,
}

impl OperatorRole {
    /// Every role.
    pub const ALL: &'static [OperatorRole] =
        &[OperatorRole::Respond, OperatorRole::Administer, OperatorRole::Approve, OperatorRole::Audit];

    /// The name in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            OperatorRole::Respond => "respond",
            OperatorRole::Administer => "administer",
            OperatorRole::Approve => "approve",
            OperatorRole::Audit => "audit",
        }
    }
}

/// Documents are equal if their content is equal. Their files and positions do not count.
impl PartialEq for Document {
    fn eq(&self, other: &Self) -> bool {
        (&self.key, &self.body, self.two_person) == (&other.key, &other.body, other.two_person)
    }
}

impl Document {
    /// Creates a document without a file.
    pub fn new(body: DocumentBody, id: &str) -> Self {
        let key = DocumentKey { kind: body.kind().to_owned(), id: id.to_owned() };
        Self { key, body, two_person: false, path: String::new(), line: 0, positions: FieldPositions::default() }
    }

    /// Whether the document is in `mode: shadow`. The effect of such a document is recorded but never enforced.
    pub fn is_shadow(&self) -> bool {
        self.key.kind.ends_with(SHADOW_KIND_SUFFIX)
    }

    /// The same document in `mode: shadow`.
    pub fn into_shadow(mut self) -> Self {
        self.key.kind = format!("{}{SHADOW_KIND_SUFFIX}", self.body.kind());
        self
    }

    /// The row for the store: canonical JSON (RFC 8785). It holds the keys themselves in place of the name of a key file.
    pub fn to_row(&self, origin: DocumentOrigin) -> DocumentRow {
        DocumentRow {
            key: self.key.clone(),
            json: write::document_to_json(self).to_jcs(),
            path: self.path.clone(),
            line: self.line,
            origin,
        }
    }

    /// Reads a stored row. `from_row(to_row(d)) == d`.
    ///
    /// # Errors
    /// [`Error::UnreadableStored`] if the row is no valid document, or its key names another document.
    pub fn from_row(row: &DocumentRow) -> Result<Self, Error> {
        let stored = |problem: String| Error::UnreadableStored { kind: row.key.kind.clone(), id: row.key.id.clone(), problem };
        let value = json::parse(row.json.as_bytes()).map_err(|error| stored(error.to_string()))?;
        let at = SourcePosition { line: row.line.max(1), column: 1 };
        let mut out = Vec::new();
        let document = read_document(&SourceNode::from_json(&value, at), &row.path, &KeyFiles::empty(), &mut out);
        match (document, out.iter().find(|diagnostic| diagnostic.is_error())) {
            (_, Some(error)) => Err(stored(error.message.clone())),
            (Some(Self { body: DocumentBody::Test(_), .. }), None) => {
                Err(stored("a test is run where it is written, not stored".to_owned()))
            }
            (Some(document), None) if document.key == row.key => {
                Ok(Self { line: row.line, positions: FieldPositions::default(), ..document })
            }
            _ => Err(stored("it is another document".to_owned())),
        }
    }

    /// The permissions of the document; `None` for a kind that has none.
    pub fn permissions(&self) -> Option<&PermissionLists> {
        match &self.body {
            DocumentBody::Application(permissions)
            | DocumentBody::Group(permissions)
            | DocumentBody::PermissionSet(permissions) => Some(permissions),
            DocumentBody::Agent(agent) => Some(&agent.permissions),
            _ => None,
        }
    }

    /// The position of a field, or the start of the document if the field has none.
    pub(super) fn field_position(&self, field: &'static str, index: usize) -> SourcePosition {
        let start = || SourcePosition { line: self.line.max(1), column: 1 };
        self.positions.0.get(&(field, index)).copied().unwrap_or_else(start)
    }

    /// A diagnostic at the position of a field. A document without a file is named instead.
    pub(super) fn field_diagnostic(&self, severity: Severity, field: &'static str, index: usize, message: String) -> Diagnostic {
        if self.path.is_empty() {
            let (kind, id) = (self.body.kind().replace('_', " "), abbreviate(&self.key.id));
            return Diagnostic::for_folder(severity, format!("{kind} `{id}`, which is in no file: {message}"));
        }
        Diagnostic::new(severity, &self.path, self.field_position(field, index), message)
    }
}

impl Document {
    /// What to do about an operator in no file that names something unknown; `None` for other documents.
    pub(super) fn stored_help(&self) -> Option<String> {
        let is_by_command = self.path.is_empty() && matches!(self.body, DocumentBody::Operator(_));
        is_by_command.then(|| {
            let id = abbreviate(&self.key.id);
            format!("keep what the operator names in the folder, or retire the operator: `portcullis operator retire {id}`")
        })
    }
}

impl FieldPositions {
    fn insert(&mut self, field: &'static str, index: usize, at: SourcePosition) {
        self.0.insert((field, index), at);
    }
}

impl DocumentBody {
    /// The `kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            DocumentBody::Issuer(_) => "issuer",
            DocumentBody::Application(_) => "application",
            DocumentBody::Group(_) => "group",
            DocumentBody::Tool(_) => "tool",
            DocumentBody::Server(_) => "server",
            DocumentBody::Agent(_) => "agent",
            DocumentBody::PermissionSet(_) => "permission_set",
            DocumentBody::Operator(_) => "operator",
            DocumentBody::Guardrail(_) => "guardrail",
            DocumentBody::Test(_) => "test",
        }
    }
}

/// The documents that take part in decisions: no tests and no shadow documents.
pub(in crate::policy) fn enforced_documents<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Vec<&'a Document> {
    documents.into_iter().filter(|document| !document.is_shadow() && !matches!(document.body, DocumentBody::Test(_))).collect()
}

/// The documents of the policy with all shadow documents enforced; `None` if there are no shadow documents.
pub fn documents_with_shadows_enforced<'a>(
    documents: impl IntoIterator<Item = &'a Document> + Clone,
) -> Option<Vec<&'a Document>> {
    let shadows: Vec<&Document> = documents.clone().into_iter().filter(|document| document.is_shadow()).collect();
    if shadows.is_empty() {
        return None;
    }
    let replaced: HashSet<(&str, &str)> =
        shadows.iter().map(|document| (document.body.kind(), document.key.id.as_str())).collect();
    let mut all = enforced_documents(documents);
    all.retain(|document| !replaced.contains(&(document.body.kind(), document.key.id.as_str())));
    all.extend(shadows);
    Some(all)
}
