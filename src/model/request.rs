//! What is asked (a [`Call`]) and for whom (a [`Subject`]): plain facts, however they were established.

use super::constraint::ArgumentMap;
use super::ids::{AgentId, ApplicationId, GroupId, SessionId, TaskId, UserId};
use super::json::Object;
use super::sorted::SortedMap;

/// The identities of a delegation and what each of its tokens grants.
///
/// Evaluation takes these facts; that they are *verified* is said by `token::VerifiedChain`, the only way into `pdp`.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Who delegated.
    pub user: UserId,
    /// The user's groups that the issuer may vouch for and some document knows.
    pub groups: Vec<GroupId>,
    /// Inside which application.
    pub application: ApplicationId,
    /// Every agent of the chain, root to leaf; never empty.
    pub agents: Vec<AgentId>,
    /// What each token grants, root to leaf; as many as there are tokens.
    pub scopes: Vec<Scope>,
    /// The session.
    pub session: SessionId,
    /// The task.
    pub task: TaskId,
}

/// What one token grants: tools, each with constraints on its arguments.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scope {
    /// By tool name.
    pub tools: SortedMap<ArgumentMap>,
}

impl Scope {
    /// Keeps one copy of each name that a wider scope has as well.
    pub fn share_names(&mut self, wider: &Scope) {
        self.tools.share_names(&wider.tools);
        for (tool, map) in self.tools.iter_mut() {
            if let Some(wider) = wider.tools.get(tool) {
                map.named.share_names(&wider.named);
            }
        }
    }
}

/// One tool call, its arguments parsed and bounded.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// `server/tool`.
    pub tool: &'a str,
    /// SHA-256 of the schema that the gateway saw, if it said so.
    pub tool_schema_sha256: Option<[u8; 32]>,
    /// The arguments; every number in them is comparable.
    pub arguments: &'a Object,
    /// The environment that the gateway told of; its word alone, so only what takes away or says `evidence: attested` may ask it.
    pub environment: Option<&'a Object>,
    /// The time that conditions see.
    pub unix_s: i64,
}

impl<'a> Call<'a> {
    /// A call without a schema or an environment, at the beginning of time.
    pub fn new(tool: &'a str, arguments: &'a Object) -> Self {
        Self { tool, tool_schema_sha256: None, arguments, environment: None, unix_s: 0 }
    }
}
