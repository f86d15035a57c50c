//! The facts of a request: the [`ToolCall`] and the [`DelegationSubject`] that it is made for. They do not say how the facts were established.
//!
//! `token` verifies a subject; `policy` evaluates a call for it.

use super::constraint::ConstraintMap;
use super::ids::{AgentId, ApplicationId, GroupId, SessionId, TaskId, UserId};
use super::json::JsonObject;
use super::sorted_map::SortedMap;

/// The identities of a delegation and the scope of each of its tokens.
///
/// Evaluation reads these facts. A `token::VerifiedChain` says that they are verified, and `pdp` accepts nothing else.
#[derive(Clone, Debug)]
pub struct DelegationSubject {
    /// The user who delegated.
    pub user: UserId,
    /// The user's groups that the issuer may vouch for and that some document names.
    pub groups: Vec<GroupId>,
    /// The application that the agent runs inside.
    pub application: ApplicationId,
    /// Every agent of the chain, root to leaf; never empty.
    pub agents: Vec<AgentId>,
    /// The scope of each token, root to leaf; one for each token.
    pub scopes: Vec<TokenScope>,
    /// The session.
    pub session: SessionId,
    /// The task.
    pub task: TaskId,
}

/// The tools that one token grants, each with constraints on its arguments.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenScope {
    /// By tool name.
    pub tools: SortedMap<ConstraintMap>,
}

impl TokenScope {
    /// Saves memory: names that `wider` has too become pointers to its strings.
    pub fn share_names(&mut self, wider: &TokenScope) {
        self.tools.share_names(&wider.tools);
        for (tool, map) in self.tools.iter_mut() {
            if let Some(wider) = wider.tools.get(tool) {
                map.named.share_names(&wider.named);
            }
        }
    }
}

/// One tool call. Its arguments are parsed and limited in size.
#[derive(Clone, Debug)]
pub struct ToolCall<'a> {
    /// `server/tool`.
    pub tool: &'a str,
    /// SHA-256 of the tool schema that the gateway saw, if the gateway sent it.
    pub tool_schema_sha256: Option<[u8; 32]>,
    /// The arguments. Every number in them is comparable.
    pub arguments: &'a JsonObject,
    /// The environment that the gateway reports. It is not verified, so only entries that restrict or that say `evidence: attested` may
    /// read it.
    pub environment: Option<&'a JsonObject>,
    /// The time that conditions read, in seconds since the Unix epoch.
    pub unix_s: i64,
}

impl<'a> ToolCall<'a> {
    /// A call without schema and environment, at Unix time 0.
    pub fn new(tool: &'a str, arguments: &'a JsonObject) -> Self {
        Self { tool, tool_schema_sha256: None, arguments, environment: None, unix_s: 0 }
    }
}
