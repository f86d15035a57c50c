//! What `api` asks the service and what it gets back: plain types, no protobuf, no policy.

use std::sync::Arc;

use bytes::Bytes;

use crate::model::decision::{Decision, Effect, Obligation};
use crate::model::ids::{GroupId, UserId};
use crate::model::json::Object;
use crate::model::reason::Reason;
use crate::model::request::Subject;
use crate::model::revision::Revision;

/// Who asks: what the transport knows, nothing that the request says.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The connection, unique within the process.
    pub connection_id: u64,
    /// The peer's address, for the audit log.
    pub address: Arc<str>,
    /// Whether the peer is on this machine.
    pub is_loopback: bool,
}

impl Caller {
    /// Which gateway it is, as far as a request that is repeated must come from the same one.
    ///
    /// Without TLS nothing tells two gateways on one address apart, and a gateway that lost its connection comes back from another
    /// port: it is the address alone.
    pub fn gateway(&self) -> &str {
        match self.address.rsplit_once(':') {
            Some((host, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => host,
            _ => &self.address,
        }
    }
}

/// The caller's W3C trace context, as its headers had it.
#[derive(Clone, Debug, Default)]
pub struct TraceHeaders {
    /// `traceparent`
    pub parent: Option<String>,
    /// `tracestate`
    pub state: Option<String>,
}

/// What speaks for the agent.
#[derive(Clone, Debug)]
pub enum Credential {
    /// A delegation chain, root first.
    Chain(Vec<Bytes>),
    /// A handle that an earlier answer gave on this connection.
    Handle([u8; 16]),
}

/// One call to decide. Sizes and forms are checked by `api`, except what is the agent's fault and so a denial.
#[derive(Clone, Debug)]
pub struct CheckRequest {
    /// The caller's name for the request.
    pub request_id: String,
    /// What speaks for the agent.
    pub credential: Credential,
    /// Proof of possession for this call.
    pub proof: Option<Bytes>,
    /// `server/tool`
    pub tool: String,
    /// SHA-256 of the tool's schema.
    pub tool_schema_sha256: Option<[u8; 32]>,
    /// The arguments as JSON; empty means `{}`.
    pub arguments_json: Bytes,
    /// The environment for conditions: the caller's word.
    pub environment: Option<Object>,
    /// The audience claimed; `None`: the caller's only one.
    pub audience: Option<String>,
    /// The answer must not be older than this.
    pub at_least: Option<Revision>,
    /// Whether a handle is wanted.
    pub want_handle: bool,
    /// Trace context.
    pub trace: TraceHeaders,
}

/// What a replica answers to a [`CheckRequest`].
#[derive(Clone, Debug)]
pub struct Answer {
    /// UUIDv7, in the audit record too.
    pub decision_id: String,
    /// The decision.
    pub decision: Decision,
    /// For people.
    pub message: String,
    /// Whom the chain verifiably speaks for; absent where nothing was verified.
    pub identities: Option<Arc<Identities>>,
    /// Whether the tool is registered, so that its name is evidence.
    pub tool_is_registered: bool,
    /// The revision that decided; `None` before the first snapshot.
    pub revision: Option<Revision>,
    /// Age of the proof of freshness when the answer was given.
    pub snapshot_age_ms: u64,
    /// How long the answer may be used, from the moment the caller sent the request.
    pub valid_for_ms: u64,
    /// What must be approved, where the effect is `NEEDS_APPROVAL`.
    pub approval: Option<ApprovalRequest>,
    /// Stands for the chain on this connection from now on.
    pub handle: Option<[u8; 16]>,
}

impl Answer {
    /// Duties that come with the answer.
    pub fn obligations(&self) -> &[Obligation] {
        &self.decision.obligations
    }
}

/// The verified identities of a chain, as they are told: made once for each chain.
#[derive(Clone, Debug)]
pub struct Identities {
    /// `["iss","sub"]`
    pub user: Box<str>,
    /// The others.
    pub subject: Arc<Subject>,
}

impl Identities {
    /// The identities of a subject.
    pub fn of(subject: &Arc<Subject>) -> Self {
        Self { user: UserId::to_string(&subject.user).into(), subject: subject.clone() }
    }
}

/// What an operator must approve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalRequest {
    /// Hex SHA-256 that binds the approval to exactly this call.
    pub digest: String,
    /// Groups of operators who may approve.
    pub approvers: Vec<GroupId>,
    /// When asking anew becomes necessary.
    pub expires_at_unix_ms: i64,
}

/// `aat_tool` of a proof for a listing. No document may register a tool of this server.
pub const LIST_TOOLS: &str = "portcullis/list_tools";

/// Which tools a chain may call.
#[derive(Clone, Debug)]
pub struct ListToolsRequest {
    /// The caller's name for the request.
    pub request_id: String,
    /// What speaks for the agent.
    pub credential: Credential,
    /// Proof of possession for a listing, a call of [`LIST_TOOLS`] without arguments.
    pub proof: Option<Bytes>,
    /// Tools to answer for; empty: every registered tool, or without a proof every tool that the chain's scope names.
    pub tools: Vec<String>,
    /// The audience claimed.
    pub audience: Option<String>,
    /// Trace context.
    pub trace: TraceHeaders,
}

/// The answer to a [`ListToolsRequest`].
#[derive(Clone, Debug)]
pub struct ListToolsAnswer {
    /// UUIDv7, in the audit record too.
    pub decision_id: String,
    /// One for each tool asked for, in that order; of all tools, by name.
    pub tools: Vec<ToolDecision>,
    /// The revision that decided.
    pub revision: Option<Revision>,
    /// Age of the proof of freshness.
    pub snapshot_age_ms: u64,
    /// How long the answer may be used.
    pub valid_for_ms: u64,
    /// `OK`, or why the chain may call nothing at all.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// No proof came: the tools are those that the chain's scope names, and nothing of policy is told.
    pub names_only: bool,
}

/// What a chain can reach of one tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolDecision {
    /// `server/tool`
    pub tool: String,
    /// With `maybe`: the best that arguments can reach.
    pub effect: Effect,
    /// Why.
    pub reason: Reason,
    /// Arguments decide.
    pub maybe: bool,
}

/// Why a call could not be decided at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Undecided {
    /// No full snapshot yet.
    #[error("this replica is not ready yet: ask another one, or again in a moment")]
    NotReady,
    /// Shutting down.
    #[error("this replica is draining: ask another one")]
    Draining,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_is_its_address_without_the_port() {
        let check = |address: &str, expected: &str| {
            assert_eq!(Caller { connection_id: 1, address: address.into(), is_loopback: true }.gateway(), expected);
        };
        check("127.0.0.1:1234", "127.0.0.1");
        check("[::1]:1234", "[::1]");
        check("unknown", "unknown");
        check("host:", "host:");
    }
}
