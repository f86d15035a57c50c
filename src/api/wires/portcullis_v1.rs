//! The wire `portcullis.v1`: validates the form of a message, calls the service and writes the answer.
//!
//! A message with a wrong form gets `INVALID_ARGUMENT`. A wrong credential or wrong arguments are no error here: the service
//! answers them with a denial. Look next at `service.rs`.

pub(in crate::api) mod explanation;
pub(in crate::api) mod message_shapes;

use std::collections::HashSet;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

use super::Wire;
use crate::api::caller::{caller_of, mark_connection_proved, trace_headers, verified_signature_flag};
use crate::api::r#gen as wire;
use crate::api::r#gen::decision_service_server::{DecisionService, DecisionServiceServer};
use crate::api::r#gen::{check_request, list_tools_request};
use crate::api::message_limits::MessageLimits;
use crate::api::status::{decode_failure_status, invalid_argument, limit_exceeded};
use crate::api::wire_values::{effect_to_wire, principals_to_wire};
use crate::model::connection::VerifiedSignatureFlag;
use crate::model::constraint::abbreviate;
use crate::model::ids::contains_control_character;
use crate::model::json;
use crate::model::limits::{
    BATCH_CALLS_MAX, BATCH_MESSAGE_BYTES_MAX, CHAIN_TOKENS_READ_MAX, CHECK_MESSAGE_BYTES_MAX, CONTEXT_BYTES_MAX, ID_BYTES_MAX,
    LIST_TOOLS_MAX, REQUEST_ID_BYTES_MAX, TOOL_NAME_BYTES_MAX,
};
use crate::model::revision::Revision;
use crate::service::request::{AgentCredential, Caller, CheckAnswer, DecisionRequest, ListToolsRequest, TraceHeaders};
use crate::service::{RuntimeService, ServiceUnavailable};

use explanation::explanation_to_wire;
use message_shapes::{CHECK_BATCH_REQUEST_SHAPE, CHECK_REQUEST_SHAPE, LIST_TOOLS_REQUEST_SHAPE};

/// This wire, as the list of wires names it.
pub(super) const WIRE: Wire = Wire {
    services: &["portcullis.v1.DecisionService"],
    add_services: |routes, service| {
        let decisions = DecisionServiceServer::new(DecisionApi::new(service.clone()));
        routes.add_service(decisions.max_decoding_message_size(BATCH_MESSAGE_BYTES_MAX))
    },
    message_limits,
};

fn message_limits(path: &str) -> Option<MessageLimits> {
    const CHECK: MessageLimits = MessageLimits::unary(CHECK_MESSAGE_BYTES_MAX, &CHECK_REQUEST_SHAPE);
    Some(match path {
        "/portcullis.v1.DecisionService/Check" | "/portcullis.v1.DecisionService/Explain" => CHECK,
        "/portcullis.v1.DecisionService/CheckBatch" => MessageLimits::unary(BATCH_MESSAGE_BYTES_MAX, &CHECK_BATCH_REQUEST_SHAPE),
        "/portcullis.v1.DecisionService/CheckStream" => MessageLimits { is_stream: true, ..CHECK },
        "/portcullis.v1.DecisionService/ListTools" => MessageLimits::unary(CHECK_MESSAGE_BYTES_MAX, &LIST_TOOLS_REQUEST_SHAPE),
        _ => return None,
    })
}

/// The decision service of one serving runtime.
#[derive(Clone)]
struct DecisionApi {
    runtime_service: RuntimeService,
}

impl DecisionApi {
    /// Answers calls with the service of one runtime.
    fn new(runtime_service: RuntimeService) -> Self {
        Self { runtime_service }
    }

    async fn decide(
        runtime_service: &RuntimeService,
        message: wire::CheckRequest,
        caller: &Caller,
        verified_signature: Option<&VerifiedSignatureFlag>,
        trace: TraceHeaders,
    ) -> Result<wire::CheckResponse, Status> {
        let request = check_request_from_wire(message, trace)
            .map_err(|malformed| malformed.into_status_recording_proof(runtime_service, caller))?;
        let answer = runtime_service.check(&request, caller).await?;
        mark_connection_proved(verified_signature, &answer);
        Ok(answer_to_wire(request.request_id, &request.tool, answer))
    }
}

#[tonic::async_trait]
impl DecisionService for DecisionApi {
    async fn check(&self, request: Request<wire::CheckRequest>) -> Result<Response<wire::CheckResponse>, Status> {
        let caller = caller_of(request.extensions());
        let verified_signature = verified_signature_flag(request.extensions());
        let trace = trace_headers(request.metadata());
        Ok(Response::new(
            Self::decide(&self.runtime_service, request.into_inner(), &caller, verified_signature.as_deref(), trace).await?,
        ))
    }

    async fn check_batch(&self, request: Request<wire::CheckBatchRequest>) -> Result<Response<wire::CheckBatchResponse>, Status> {
        let caller = caller_of(request.extensions());
        let verified_signature = verified_signature_flag(request.extensions());
        let trace = trace_headers(request.metadata());
        let requests = request.into_inner().requests;
        if requests.len() > BATCH_CALLS_MAX {
            return Err(limit_exceeded("requests", requests.len(), BATCH_CALLS_MAX));
        }
        // The form of every message is validated before the first decision, so a batch is decided as a whole or not at all.
        let mut formed = Vec::with_capacity(requests.len());
        let mut messages = requests.into_iter();
        while let Some(message) = messages.next() {
            match check_request_from_wire(message, trace.clone()) {
                Ok(request) => formed.push(request),
                Err(malformed) => {
                    let others = formed
                        .into_iter()
                        .map(Ok)
                        .chain(messages.map(|message| check_request_from_wire(message, TraceHeaders::default())));
                    return Err(self.refuse_batch(malformed, others, &caller).await);
                }
            }
        }
        let mut answers = Vec::with_capacity(formed.len());
        for request in formed {
            let (answer, held) = self.runtime_service.check_pending(&request, &caller).await?;
            mark_connection_proved(verified_signature.as_deref(), &answer);
            answers.push((request, answer, held));
            // Lets the other calls of this runtime run, because a batch of chains that are not cached takes long to verify.
            tokio::task::yield_now().await;
        }
        // INVARIANT: nothing awaits from here on. The first answers are as old as the batch; `confirm_answer` denies those whose chain was
        // revoked since.
        let confirmed = answers.into_iter().map(|(request, answer, held)| {
            let answer = self.runtime_service.confirm_answer(&request, &caller, answer, held);
            answer_to_wire(request.request_id, &request.tool, answer)
        });
        let responses = confirmed.collect();
        Ok(Response::new(wire::CheckBatchResponse { responses }))
    }

    type CheckStreamStream = Pin<Box<dyn Stream<Item = Result<wire::CheckResponse, Status>> + Send>>;

    async fn check_stream(
        &self,
        request: Request<Streaming<wire::CheckRequest>>,
    ) -> Result<Response<Self::CheckStreamStream>, Status> {
        let caller = caller_of(request.extensions());
        let verified_signature = verified_signature_flag(request.extensions());
        let trace = trace_headers(request.metadata());
        let open = Some((request.into_inner(), self.runtime_service.clone()));
        // Each message is decided when the transport polls for its answer, so that the answer's validity starts when it can be
        // sent.
        let answers = stream::unfold(open, move |open| {
            let (caller, verified_signature, trace) = (caller.clone(), verified_signature.clone(), trace.clone());
            async move {
                let (mut messages, runtime_service) = open?;
                let message = tokio::select! {
                    message = messages.next() => message?,
                    () = runtime_service.wait_for_drain() => return Some((Err(ServiceUnavailable::Draining.into()), None)),
                };
                match message {
                    Ok(message) => {
                        let answer = Self::decide(&runtime_service, message, &caller, verified_signature.as_deref(), trace).await;
                        Some((answer, Some((messages, runtime_service))))
                    }
                    Err(fault) => Some((Err(decode_failure_status(&fault).unwrap_or(fault)), None)),
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_tools(&self, request: Request<wire::ListToolsRequest>) -> Result<Response<wire::ListToolsResponse>, Status> {
        let caller = caller_of(request.extensions());
        let trace = trace_headers(request.metadata());
        let message = request.into_inner();
        let request = list_tools_request_from_wire(message, trace)
            .map_err(|malformed| malformed.into_status_recording_proof(&self.runtime_service, &caller))?;
        let answer = self.runtime_service.list_tools(&request, &caller).await?;
        let tools = answer.tools.into_iter().map(|tool| wire::ToolDecision {
            tool: tool.tool,
            effect: effect_to_wire(tool.effect).into(),
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
        let caller = caller_of(request.extensions());
        let trace = trace_headers(request.metadata());
        let request = check_request_from_wire(request.into_inner(), trace)
            .map_err(|malformed| malformed.into_status_recording_proof(&self.runtime_service, &caller))?;
        let explanation = self.runtime_service.explain(&request, &caller).await?;
        Ok(Response::new(explanation_to_wire(request.request_id, &request.tool, &explanation, None)))
    }
}

/// A malformed message.
pub(in crate::api) struct MalformedRequest {
    status: Status,
    /// The credential and the proof, as far as the message holds them.
    presented: Option<(AgentCredential, Option<Bytes>)>,
}

impl MalformedRequest {
    /// Returns the status, after the proof was noted as presented: whoever overheard the message must not use the proof for a handle.
    pub(in crate::api) fn into_status_recording_proof(self, runtime_service: &RuntimeService, caller: &Caller) -> Status {
        if let Some((credential, proof)) = &self.presented {
            runtime_service.record_undecided_proof(credential, proof.as_deref(), caller);
        }
        self.status
    }
}

impl DecisionApi {
    /// Refuses a batch with a malformed message, and notes the proofs of all its messages as presented.
    async fn refuse_batch(
        &self,
        malformed: MalformedRequest,
        others: impl Iterator<Item = Result<DecisionRequest, MalformedRequest>>,
        caller: &Caller,
    ) -> Status {
        for other in others {
            match other {
                Ok(request) => self.runtime_service.record_undecided_proof(&request.credential, request.proof.as_deref(), caller),
                Err(other) => drop(other.into_status_recording_proof(&self.runtime_service, caller)),
            }
            // As for a batch that is decided: the chains may take long to verify.
            tokio::task::yield_now().await;
        }
        malformed.into_status_recording_proof(&self.runtime_service, caller)
    }
}

/// The parts of a message besides its credential, as far as they need conversion.
struct CheckFields {
    tool_schema_sha256: Option<[u8; 32]>,
    environment: Option<json::JsonObject>,
    at_least: Option<Revision>,
}

pub(in crate::api) fn check_request_from_wire(
    mut message: wire::CheckRequest,
    trace: TraceHeaders,
) -> Result<DecisionRequest, MalformedRequest> {
    let fields = check_fields_from_wire(&message);
    let credential = match message.credential.take() {
        Some(check_request::Credential::Presentation(presentation)) => {
            presentation_from_wire(presentation.aat_chain, presentation.aat_pop, std::mem::take(&mut message.proof))
        }
        Some(check_request::Credential::Handle(handle)) => {
            handle_from_wire(&handle).map(|handle| (handle, not_empty(std::mem::take(&mut message.proof))))
        }
        None => Err(missing_credential_status()),
    };
    let (CheckFields { tool_schema_sha256, environment, at_least }, (credential, proof)) =
        combine_with_credential(fields, credential)?;
    Ok(DecisionRequest {
        request_id: message.request_id,
        credential,
        proof,
        tool: message.tool,
        tool_schema_sha256,
        arguments_json: message.arguments_json,
        environment,
        audience: not_empty_text(message.audience),
        at_least,
        want_handle: message.want_handle,
        trace,
    })
}

fn list_tools_request_from_wire(
    mut message: wire::ListToolsRequest,
    trace: TraceHeaders,
) -> Result<ListToolsRequest, MalformedRequest> {
    let fields = validate_list_tools(&message);
    let credential = match message.credential.take() {
        Some(list_tools_request::Credential::Presentation(presentation)) => {
            presentation_from_wire(presentation.aat_chain, presentation.aat_pop, std::mem::take(&mut message.proof))
        }
        Some(list_tools_request::Credential::Handle(handle)) => {
            handle_from_wire(&handle).map(|handle| (handle, not_empty(std::mem::take(&mut message.proof))))
        }
        None => Err(missing_credential_status()),
    };
    let ((), (credential, proof)) = combine_with_credential(fields, credential)?;
    Ok(ListToolsRequest {
        request_id: message.request_id,
        credential,
        proof,
        tools: message.tools,
        audience: not_empty_text(message.audience),
        trace,
    })
}

/// Combines the checked fields with the credential, or returns the first error, together with the credential if that one is well
/// formed.
fn combine_with_credential<T>(
    fields: Result<T, Status>,
    credential: Result<(AgentCredential, Option<Bytes>), Status>,
) -> Result<(T, (AgentCredential, Option<Bytes>)), MalformedRequest> {
    match (fields, credential) {
        (Ok(fields), Ok(credential)) => Ok((fields, credential)),
        (Err(status), credential) => Err(MalformedRequest { status, presented: credential.ok() }),
        (Ok(_), Err(status)) => Err(MalformedRequest { status, presented: None }),
    }
}

fn validate_list_tools(message: &wire::ListToolsRequest) -> Result<(), Status> {
    if message.tools.len() > LIST_TOOLS_MAX {
        return Err(limit_exceeded("tools", message.tools.len(), LIST_TOOLS_MAX));
    }
    let mut seen = HashSet::with_capacity(message.tools.len());
    for tool in &message.tools {
        validate_text("tools", tool, 1, TOOL_NAME_BYTES_MAX)?;
        if !seen.insert(tool.as_str()) {
            return Err(invalid_argument("tools", format!("`{}` stands twice", abbreviate(tool))));
        }
    }
    validate_text("request_id", &message.request_id, 0, REQUEST_ID_BYTES_MAX)?;
    validate_text("audience", &message.audience, 0, ID_BYTES_MAX)
}

fn check_fields_from_wire(message: &wire::CheckRequest) -> Result<CheckFields, Status> {
    validate_text("request_id", &message.request_id, 0, REQUEST_ID_BYTES_MAX)?;
    validate_text("tool", &message.tool, 1, TOOL_NAME_BYTES_MAX)?;
    let tool_schema_sha256 = match message.tool_schema_sha256.len() {
        0 => None,
        length => Some(<[u8; 32]>::try_from(&message.tool_schema_sha256[..]).map_err(|_| {
            invalid_argument("tool_schema_sha256", format!("{length} bytes: 32 raw bytes of SHA-256 are expected"))
        })?),
    };
    if message.context_json.len() > CONTEXT_BYTES_MAX {
        return Err(limit_exceeded("context_json", message.context_json.len(), CONTEXT_BYTES_MAX));
    }
    let environment = match message.context_json.is_empty() {
        true => None,
        false => Some(json::parse_object(&message.context_json).map_err(|error| invalid_argument("context_json", error))?),
    };
    validate_text("at_least", &message.at_least, 0, ID_BYTES_MAX)?;
    let at_least = match message.at_least.as_str() {
        "" => None,
        token => Some(token.parse::<Revision>().map_err(|error| invalid_argument("at_least", error))?),
    };
    validate_text("audience", &message.audience, 0, ID_BYTES_MAX)?;
    Ok(CheckFields { tool_schema_sha256, environment, at_least })
}

fn chain_from_wire(tokens: Vec<Bytes>) -> Result<AgentCredential, Status> {
    if tokens.len() > CHAIN_TOKENS_READ_MAX {
        return Err(limit_exceeded("presentation.aat_chain", tokens.len(), CHAIN_TOKENS_READ_MAX));
    }
    Ok(AgentCredential::Chain(tokens))
}

/// Reads a chain and its proof. The proof may stand in the presentation or in the request, but not in both.
fn presentation_from_wire(tokens: Vec<Bytes>, aat_pop: Bytes, proof: Bytes) -> Result<(AgentCredential, Option<Bytes>), Status> {
    match (not_empty(aat_pop), not_empty(proof)) {
        (Some(_), Some(_)) => Err(invalid_argument("proof", "stands beside `presentation.aat_pop`: send one proof")),
        (aat_pop, proof) => Ok((chain_from_wire(tokens)?, aat_pop.or(proof))),
    }
}

fn not_empty(bytes: Bytes) -> Option<Bytes> {
    Some(bytes).filter(|bytes| !bytes.is_empty())
}

fn handle_from_wire(handle: &Bytes) -> Result<AgentCredential, Status> {
    let handle = <[u8; 16]>::try_from(&handle[..]);
    handle.map(AgentCredential::Handle).map_err(|_| invalid_argument("handle", "16 bytes are expected, as an answer gave them"))
}

fn not_empty_text(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Validates a name from the caller: its length, and that no control character can forge a line where the name is shown.
fn validate_text(field: &str, text: &str, bytes_min: usize, bytes_max: usize) -> Result<(), Status> {
    if !(bytes_min..=bytes_max).contains(&text.len()) {
        return Err(invalid_argument(field, format!("{} bytes: {bytes_min} to {bytes_max} are expected", text.len())));
    }
    if contains_control_character(text) {
        return Err(invalid_argument(field, "holds a control character: percent-encode what such a name holds"));
    }
    Ok(())
}

fn missing_credential_status() -> Status {
    invalid_argument("credential", "is missing: send a presentation or a handle")
}

fn answer_to_wire(request_id: String, tool: &str, answer: CheckAnswer) -> wire::CheckResponse {
    let decision = &answer.decision;
    let obligations = answer.obligations().iter().map(|obligation| wire::Obligation {
        kind: obligation.kind.to_string(),
        parameters_json: Bytes::copy_from_slice(obligation.parameters_json.as_bytes()),
    });
    wire::CheckResponse {
        request_id,
        effect: effect_to_wire(decision.effect).into(),
        reason: decision.reason.as_str().to_owned(),
        obligations: obligations.collect(),
        principals: Some(principals_to_wire(tool, answer.identities.as_deref(), answer.tool_is_registered)),
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
