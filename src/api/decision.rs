//! The decision service over gRPC: validates the form of a message, calls the service and writes the answer.
//!
//! A message with a wrong form gets `INVALID_ARGUMENT`. A wrong credential or wrong arguments are no error here: the service
//! answers them with a denial.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::Extensions;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::explain::explain_out;
use super::r#gen as wire;
use super::r#gen::decision_service_server::DecisionService;
use super::r#gen::{check_request, list_tools_request};
use super::status::{invalid, too_large, undecodable};
use super::wire_values::{effect_out, principals_of};
use crate::model::connection::{PeerInfo, Standing};
use crate::model::ids::holds_control_character;
use crate::model::json;
use crate::model::limits::{
    BATCH_CALLS_MAX, CHAIN_TOKENS_READ_MAX, CONTEXT_BYTES_MAX, ID_BYTES_MAX, LIST_TOOLS_MAX, REQUEST_ID_BYTES_MAX,
    TOOL_NAME_BYTES_MAX,
};
use crate::model::revision::Revision;
use crate::service::request::{Answer, Caller, CheckRequest, Credential, ListToolsRequest, TraceHeaders};
use crate::service::{Lane, Undecided};

/// The decision service of one serving runtime.
#[derive(Clone)]
pub struct DecisionApi {
    lane: Lane,
}

impl DecisionApi {
    /// Answers calls with the service of one runtime.
    pub fn new(lane: Lane) -> Self {
        Self { lane }
    }

    async fn decide(
        lane: &Lane,
        message: wire::CheckRequest,
        caller: &Caller,
        standing: Option<&Standing>,
        trace: TraceHeaders,
    ) -> Result<wire::CheckResponse, Status> {
        let request = check_in(message, trace)?;
        let answer = lane.check(&request, caller).await?;
        note_proof(standing, &answer);
        Ok(answer_out(request.request_id, &request.tool, answer))
    }
}

#[tonic::async_trait]
impl DecisionService for DecisionApi {
    async fn check(&self, request: Request<wire::CheckRequest>) -> Result<Response<wire::CheckResponse>, Status> {
        let caller = caller(request.extensions());
        let standing = standing(request.extensions());
        let trace = trace_headers(request.metadata());
        Ok(Response::new(Self::decide(&self.lane, request.into_inner(), &caller, standing.as_deref(), trace).await?))
    }

    async fn check_batch(&self, request: Request<wire::CheckBatchRequest>) -> Result<Response<wire::CheckBatchResponse>, Status> {
        let caller = caller(request.extensions());
        let standing = standing(request.extensions());
        let trace = trace_headers(request.metadata());
        let requests = request.into_inner().requests;
        if requests.len() > BATCH_CALLS_MAX {
            return Err(too_large("requests", requests.len(), BATCH_CALLS_MAX));
        }
        // The form of every message is validated before the first decision, so a batch is decided as a whole or not at all.
        let requests = requests.into_iter().map(|message| check_in(message, trace.clone())).collect::<Result<Vec<_>, _>>()?;
        let mut answers = Vec::with_capacity(requests.len());
        for request in requests {
            let (answer, held) = self.lane.check_held(&request, &caller).await?;
            note_proof(standing.as_deref(), &answer);
            answers.push((request, answer, held));
            // Lets the other calls of this runtime run, because a batch of chains that are not cached takes long to verify.
            tokio::task::yield_now().await;
        }
        // INVARIANT: nothing awaits from here on. The first answers are as old as the batch; `confirm` denies those whose chain was
        // revoked since.
        let confirmed = answers.into_iter().map(|(request, answer, held)| {
            let answer = self.lane.confirm(&request, &caller, answer, held);
            answer_out(request.request_id, &request.tool, answer)
        });
        let responses = confirmed.collect();
        Ok(Response::new(wire::CheckBatchResponse { responses }))
    }

    type CheckStreamStream = Pin<Box<dyn Stream<Item = Result<wire::CheckResponse, Status>> + Send>>;

    async fn check_stream(
        &self,
        request: Request<Streaming<wire::CheckRequest>>,
    ) -> Result<Response<Self::CheckStreamStream>, Status> {
        let caller = caller(request.extensions());
        let standing = standing(request.extensions());
        let trace = trace_headers(request.metadata());
        let open = Some((request.into_inner(), self.lane.clone()));
        // Each message is decided when the transport polls for its answer, so that the answer's validity starts when it can be
        // sent.
        let answers = stream::unfold(open, move |open| {
            let (caller, standing, trace) = (caller.clone(), standing.clone(), trace.clone());
            async move {
                let (mut messages, lane) = open?;
                let message = tokio::select! {
                    message = messages.next() => message?,
                    () = lane.drained() => return Some((Err(Undecided::Draining.into()), None)),
                };
                match message {
                    Ok(message) => {
                        let answer = Self::decide(&lane, message, &caller, standing.as_deref(), trace).await;
                        Some((answer, Some((messages, lane))))
                    }
                    Err(fault) => Some((Err(undecodable(&fault).unwrap_or(fault)), None)),
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_tools(&self, request: Request<wire::ListToolsRequest>) -> Result<Response<wire::ListToolsResponse>, Status> {
        let caller = caller(request.extensions());
        let trace = trace_headers(request.metadata());
        let message = request.into_inner();
        if message.tools.len() > LIST_TOOLS_MAX {
            return Err(too_large("tools", message.tools.len(), LIST_TOOLS_MAX));
        }
        for tool in &message.tools {
            check_text("tools", tool, 1, TOOL_NAME_BYTES_MAX)?;
        }
        check_text("request_id", &message.request_id, 0, REQUEST_ID_BYTES_MAX)?;
        let (credential, proof) = match message.credential {
            Some(list_tools_request::Credential::Presentation(presentation)) => {
                presented(presentation.aat_chain, presentation.aat_pop, message.proof)?
            }
            Some(list_tools_request::Credential::Handle(handle)) => (handle_in(&handle)?, not_empty(message.proof)),
            None => return Err(no_credential()),
        };
        let request = ListToolsRequest {
            request_id: message.request_id,
            credential,
            proof,
            tools: message.tools,
            audience: audience_in(message.audience)?,
            trace,
        };
        let answer = self.lane.list_tools(&request, &caller).await?;
        let tools = answer.tools.into_iter().map(|tool| wire::ToolDecision {
            tool: tool.tool,
            effect: effect_out(tool.effect).into(),
            reason: tool.reason.as_str().to_owned(),
            maybe: tool.maybe,
        });
        Ok(Response::new(wire::ListToolsResponse {
            tools: tools.collect(),
            decision_id: answer.decision_id,
            revision: answer.revision.map(|revision| revision.to_string()).unwrap_or_default(),
            snapshot_age_ms: answer.snapshot_age_ms,
            valid_for_ms: answer.valid_for_ms,
            reason: answer.reason.as_str().to_owned(),
            message: answer.message,
            names_only: answer.names_only,
        }))
    }

    async fn explain(&self, request: Request<wire::CheckRequest>) -> Result<Response<wire::ExplainResponse>, Status> {
        let caller = caller(request.extensions());
        let trace = trace_headers(request.metadata());
        let request = check_in(request.into_inner(), trace)?;
        let told = self.lane.explain(&request, &caller).await?;
        Ok(Response::new(explain_out(request.request_id, &request.tool, &told, None)))
    }
}

/// The caller, as the transport identifies it.
pub(super) fn caller(extensions: &Extensions) -> Caller {
    match extensions.get::<PeerInfo>() {
        Some(peer) => Caller { connection_id: peer.connection_id, address: peer.address.clone(), is_loopback: peer.is_loopback },
        // Without a known peer the caller has no right to any audience, and no handle of another connection.
        None => Caller { connection_id: u64::MAX, address: "unknown".into(), is_loopback: false },
    }
}

/// The standing of the call's connection.
fn standing(extensions: &Extensions) -> Option<Arc<Standing>> {
    extensions.get::<PeerInfo>().map(|peer| peer.standing.clone())
}

/// Marks the connection as proved once a chain was verified on it. A full listener cuts connections without that mark first.
fn note_proof(standing: Option<&Standing>, answer: &Answer) {
    if let (Some(standing), Some(_)) = (standing, &answer.identities) {
        standing.prove();
    }
}

/// The peer's address for an audit line.
pub(super) fn peer_text(extensions: &Extensions) -> String {
    extensions.get::<PeerInfo>().map_or_else(|| "unknown".to_owned(), |peer| peer.address.to_string())
}

pub(super) fn trace_headers(metadata: &MetadataMap) -> TraceHeaders {
    let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    TraceHeaders { parent: text("traceparent"), state: text("tracestate") }
}

pub(super) fn check_in(message: wire::CheckRequest, trace: TraceHeaders) -> Result<CheckRequest, Status> {
    check_text("request_id", &message.request_id, 0, REQUEST_ID_BYTES_MAX)?;
    check_text("tool", &message.tool, 1, TOOL_NAME_BYTES_MAX)?;
    let (credential, proof) = match message.credential {
        Some(check_request::Credential::Presentation(presentation)) => {
            presented(presentation.aat_chain, presentation.aat_pop, message.proof)?
        }
        Some(check_request::Credential::Handle(handle)) => (handle_in(&handle)?, not_empty(message.proof)),
        None => return Err(no_credential()),
    };
    let tool_schema_sha256 = match message.tool_schema_sha256.len() {
        0 => None,
        length => Some(
            <[u8; 32]>::try_from(&message.tool_schema_sha256[..])
                .map_err(|_| invalid("tool_schema_sha256", format!("{length} bytes: 32 raw bytes of SHA-256 are expected")))?,
        ),
    };
    if message.context_json.len() > CONTEXT_BYTES_MAX {
        return Err(too_large("context_json", message.context_json.len(), CONTEXT_BYTES_MAX));
    }
    let environment = match message.context_json.is_empty() {
        true => None,
        false => Some(json::parse_object(&message.context_json).map_err(|error| invalid("context_json", error))?),
    };
    check_text("at_least", &message.at_least, 0, ID_BYTES_MAX)?;
    let at_least = match message.at_least.as_str() {
        "" => None,
        token => Some(token.parse::<Revision>().map_err(|error| invalid("at_least", error))?),
    };
    Ok(CheckRequest {
        request_id: message.request_id,
        credential,
        proof,
        tool: message.tool,
        tool_schema_sha256,
        arguments_json: message.arguments_json,
        environment,
        audience: audience_in(message.audience)?,
        at_least,
        want_handle: message.want_handle,
        trace,
    })
}

fn chain_in(tokens: Vec<Bytes>) -> Result<Credential, Status> {
    if tokens.len() > CHAIN_TOKENS_READ_MAX {
        return Err(too_large("presentation.aat_chain", tokens.len(), CHAIN_TOKENS_READ_MAX));
    }
    Ok(Credential::Chain(tokens))
}

/// Reads a chain and its proof. The proof may stand in the presentation or in the request, but not in both.
fn presented(tokens: Vec<Bytes>, aat_pop: Bytes, proof: Bytes) -> Result<(Credential, Option<Bytes>), Status> {
    match (not_empty(aat_pop), not_empty(proof)) {
        (Some(_), Some(_)) => Err(invalid("proof", "stands beside `presentation.aat_pop`: send one proof")),
        (aat_pop, proof) => Ok((chain_in(tokens)?, aat_pop.or(proof))),
    }
}

fn not_empty(bytes: Bytes) -> Option<Bytes> {
    Some(bytes).filter(|bytes| !bytes.is_empty())
}

fn handle_in(handle: &Bytes) -> Result<Credential, Status> {
    let handle = <[u8; 16]>::try_from(&handle[..]);
    handle.map(Credential::Handle).map_err(|_| invalid("handle", "16 bytes are expected, as an answer gave them"))
}

fn audience_in(audience: String) -> Result<Option<String>, Status> {
    check_text("audience", &audience, 0, ID_BYTES_MAX)?;
    Ok(Some(audience).filter(|audience| !audience.is_empty()))
}

/// Validates a name from the caller: its length, and that no control character can forge a line where the name is shown.
fn check_text(field: &str, text: &str, bytes_min: usize, bytes_max: usize) -> Result<(), Status> {
    if !(bytes_min..=bytes_max).contains(&text.len()) {
        return Err(invalid(field, format!("{} bytes: {bytes_min} to {bytes_max} are expected", text.len())));
    }
    if holds_control_character(text) {
        return Err(invalid(field, "holds a control character: percent-encode what such a name holds"));
    }
    Ok(())
}

fn no_credential() -> Status {
    invalid("credential", "is missing: send a presentation or a handle")
}

fn answer_out(request_id: String, tool: &str, answer: Answer) -> wire::CheckResponse {
    let decision = &answer.decision;
    let obligations = answer.obligations().iter().map(|obligation| wire::Obligation {
        kind: obligation.kind.to_string(),
        parameters_json: Bytes::copy_from_slice(obligation.parameters_json.as_bytes()),
    });
    wire::CheckResponse {
        request_id,
        effect: effect_out(decision.effect).into(),
        reason: decision.reason.as_str().to_owned(),
        obligations: obligations.collect(),
        principals: Some(principals_of(tool, answer.identities.as_deref(), answer.tool_is_registered)),
        deciding_layer: decision.layer.map(|layer| layer.as_str().to_owned()).unwrap_or_default(),
        message: answer.message,
        decision_id: answer.decision_id,
        revision: answer.revision.map(|revision| revision.to_string()).unwrap_or_default(),
        snapshot_age_ms: answer.snapshot_age_ms,
        valid_for_ms: answer.valid_for_ms,
        approval: answer.approval.map(|approval| wire::Approval {
            digest: approval.digest,
            approvers: approval.approvers.iter().map(ToString::to_string).collect(),
            expires_at_unix_ms: approval.expires_at_unix_ms,
        }),
        handle: answer.handle.map(|handle| Bytes::copy_from_slice(&handle)).unwrap_or_default(),
    }
}
