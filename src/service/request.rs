//! The requests of `api` to the service, and the answers: plain types without protobuf and without policy.
//!
//! Look next at `service.rs`, which answers them.

use std::sync::Arc;

use bytes::Bytes;

use crate::model::decision::{Decision, Effect, Obligation};
use crate::model::ids::{GroupId, UserId};
use crate::model::json::JsonObject;
use crate::model::reason::Reason;
use crate::model::request::DelegationSubject;
use crate::model::revision::Revision;

/// The caller as the transport knows it. Nothing in it comes from the request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The id of the connection, unique within the process.
    pub connection_id: u64,
    /// The address of the peer, for the audit log.
    pub address: Arc<str>,
    /// Whether the peer is on this machine.
    pub is_loopback: bool,
}

impl Caller {
    /// The name of the gateway. A repeated request must come from the same gateway.
    ///
    /// It is the address without the port. Without TLS, two gateways on one address look the same, and a gateway that lost its
    /// connection returns from another port.
    pub fn gateway_host(&self) -> &str {
        match self.address.rsplit_once(':') {
            Some((host, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => host,
            _ => &self.address,
        }
    }
}

/// The W3C trace context of the caller, as sent in its headers.
#[derive(Clone, Debug, Default)]
pub struct TraceHeaders {
    /// The header `traceparent`.
    pub parent: Option<Arc<str>>,
    /// The header `tracestate`. The calls of a batch share it.
    pub state: Option<Arc<str>>,
}

/// The credential of the agent.
#[derive(Clone, Debug)]
pub enum AgentCredential {
    /// A delegation chain, root first.
    Chain(Vec<Bytes>),
    /// A handle that an earlier answer issued on this connection.
    Handle([u8; 16]),
}

/// A call to decide. `api` checks sizes and forms. A fault of the agent is not checked there, because it is a denial.
#[derive(Clone, Debug)]
pub struct DecisionRequest {
    /// The caller's id of the request.
    pub request_id: String,
    /// The credential of the agent.
    pub credential: AgentCredential,
    /// The proof of possession for this call.
    pub proof: Option<Bytes>,
    /// The tool as `server/tool`.
    pub tool: String,
    /// The SHA-256 of the tool's schema.
    pub tool_schema_sha256: Option<[u8; 32]>,
    /// The arguments as JSON; empty means `{}`.
    pub arguments_json: Bytes,
    /// The environment for conditions. It is unverified: the caller states it.
    pub environment: Option<JsonObject>,
    /// The claimed audience; `None`: the only audience that the caller may claim.
    pub audience: Option<String>,
    /// The answer must not come from a revision before this one.
    pub at_least: Option<Revision>,
    /// Whether the caller wants a handle.
    pub want_handle: bool,
    /// The trace context of the request.
    pub trace: TraceHeaders,
}

impl DecisionRequest {
    /// A call of a tool without a proof, arguments or any other optional part.
    pub fn new(credential: AgentCredential, tool: &str) -> Self {
        Self {
            request_id: String::new(),
            credential,
            proof: None,
            tool: tool.to_owned(),
            tool_schema_sha256: None,
            arguments_json: Bytes::new(),
            environment: None,
            audience: None,
            at_least: None,
            want_handle: false,
            trace: TraceHeaders::default(),
        }
    }
}

/// The answer of a replica to a [`DecisionRequest`].
#[derive(Clone, Debug)]
pub struct CheckAnswer {
    /// The id of the decision (UUIDv7), as in the audit record.
    pub decision_id: String,
    /// The decision.
    pub decision: Decision,
    /// A message for people.
    pub message: String,
    /// The verified identities of the chain; `None` if nothing was verified.
    pub identities: Option<Arc<ChainIdentities>>,
    /// Whether the tool is registered, so that its name is verified evidence.
    pub tool_is_registered: bool,
    /// The revision that decided; `None` before the first snapshot.
    pub revision: Option<Revision>,
    /// The age of the proof of freshness at the time of the answer.
    pub snapshot_age_ms: u64,
    /// The time for which the caller may use the answer, from the moment at which the caller sent the request.
    pub valid_for_ms: u64,
    /// The approval to ask for, if the effect is `NEEDS_APPROVAL`.
    pub approval: Option<ApprovalRequest>,
    /// A handle that stands for the chain on this connection from now on.
    pub handle: Option<[u8; 16]>,
    /// Whether the call proved that its caller holds the chain, and the chain is in force.
    pub shows_possession: bool,
}

impl CheckAnswer {
    /// The obligations of the caller that come with the answer.
    pub fn obligations(&self) -> &[Obligation] {
        &self.decision.obligations
    }
}

/// The verified identities of a chain as an answer reports them. They are made once per chain.
#[derive(Clone, Debug)]
pub struct ChainIdentities {
    /// The user as `["iss","sub"]`.
    pub user: Box<str>,
    /// The verified subject of the chain, which holds the other identities.
    pub subject: Arc<DelegationSubject>,
}

impl ChainIdentities {
    /// The identities of a subject.
    pub fn of_subject(subject: &Arc<DelegationSubject>) -> Self {
        Self { user: UserId::to_string(&subject.user).into(), subject: subject.clone() }
    }
}

/// The approval that an operator must give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalRequest {
    /// The hex SHA-256 that binds the approval to exactly this call.
    pub digest: String,
    /// The operator groups that may approve.
    pub approvers: Vec<GroupId>,
    /// The time after which the call must ask again.
    pub expires_at_unix_ms: i64,
}

/// The `aat_tool` of a proof for a listing. No document may register a tool of this server name.
pub const LIST_TOOLS: &str = "portcullis/list_tools";

/// A request to list the tools that a chain may call.
#[derive(Clone, Debug)]
pub struct ListToolsRequest {
    /// The caller's id of the request.
    pub request_id: String,
    /// The credential of the agent.
    pub credential: AgentCredential,
    /// The proof of possession for a listing: a call of [`LIST_TOOLS`] without arguments.
    pub proof: Option<Bytes>,
    /// The tools to list. Empty means every registered tool, or without a proof every tool that the chain's scope names.
    pub tools: Vec<String>,
    /// The claimed audience.
    pub audience: Option<String>,
    /// The trace context of the request.
    pub trace: TraceHeaders,
}

/// The answer to a [`ListToolsRequest`].
#[derive(Clone, Debug)]
pub struct ListToolsAnswer {
    /// The id of the decision (UUIDv7), as in the audit record.
    pub decision_id: String,
    /// One decision for each requested tool, in the order of the request. A listing of all tools is ordered by name.
    pub tools: Vec<ToolDecision>,
    /// The revision that decided.
    pub revision: Option<Revision>,
    /// The age of the proof of freshness.
    pub snapshot_age_ms: u64,
    /// The time for which the caller may use the answer.
    pub valid_for_ms: u64,
    /// `OK`, or the reason why the chain may call no tool at all.
    pub reason: Reason,
    /// A message for people.
    pub message: String,
    /// Whether the request had no proof. The tools are then those that the chain's scope names, and nothing of policy is shown.
    pub names_only: bool,
}

/// The decision on one tool of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolDecision {
    /// The tool as `server/tool`.
    pub tool: String,
    /// The effect. With `maybe`, it is the best effect that any arguments can reach.
    pub effect: Effect,
    /// The reason of the effect.
    pub reason: Reason,
    /// Whether the arguments decide.
    pub maybe: bool,
}

/// The reason why a call could not be decided at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceUnavailable {
    /// There is no full snapshot yet.
    #[error("this replica is not ready yet: ask another one, or again in a moment")]
    NotReady,
    /// The replica is draining.
    #[error("this replica is draining: ask another one")]
    Draining,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_is_its_address_without_the_port() {
        let check = |address: &str, expected: &str| {
            assert_eq!(Caller { connection_id: 1, address: address.into(), is_loopback: true }.gateway_host(), expected);
        };
        check("127.0.0.1:1234", "127.0.0.1");
        check("[::1]:1234", "[::1]");
        check("unknown", "unknown");
        check("host:", "host:");
    }
}
