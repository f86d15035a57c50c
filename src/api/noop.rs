//! A call that does nothing. Load tests measure a decision against it.
//!
//! The server offers the call only with `--noop`. Look next at `load-tests/driver.rs`, which makes the calls.

use std::pin::Pin;

use futures_util::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::r#gen::noop_service_server::NoopService;
use super::r#gen::{CheckRequest, CheckResponse, Principal, Principals};
use super::message_limits::MessageLimits;
use super::wires::portcullis_v1::message_shapes::CHECK_REQUEST_SHAPE;
use crate::model::limits::CHECK_MESSAGE_BYTES_MAX;

/// The limits of a method of this service; `None` for another method.
pub(super) fn message_limits(path: &str) -> Option<MessageLimits> {
    let check = MessageLimits::unary(CHECK_MESSAGE_BYTES_MAX, &CHECK_REQUEST_SHAPE);
    match path {
        "/portcullis.v1.NoopService/Noop" => Some(check),
        "/portcullis.v1.NoopService/NoopStream" => Some(MessageLimits { is_stream: true, ..check }),
        _ => None,
    }
}

/// Answers every call with the same message, about as large as a usual permit.
#[derive(Clone, Debug)]
pub struct NoopApi {
    answer: CheckResponse,
}

impl Default for NoopApi {
    fn default() -> Self {
        let principal = |id: &str| Some(Principal { id: id.to_owned(), evidence: 1 });
        let answer = CheckResponse {
            request_id: "r-00000000".to_owned(),
            effect: 1,
            reason: "OK".to_owned(),
            message: "permitted".to_owned(),
            decision_id: "00000000-0000-7000-8000-000000000000".to_owned(),
            principals: Some(Principals {
                user: principal("[\"https://login.acme.example\",\"ana\"]"),
                application: principal("crm-portal"),
                agents: principal("spiffe://acme.example/agent/sales-assistant").into_iter().collect(),
                tool: principal("crm/leads.read"),
                session: principal("session-00000000"),
                task: principal("task-00000000"),
            }),
            revision: "00000000-0000-7000-8000-000000000000.12".to_owned(),
            snapshot_age_ms: 12,
            valid_for_ms: 4988,
            ..Default::default()
        };
        Self { answer }
    }
}

#[tonic::async_trait]
impl NoopService for NoopApi {
    async fn noop(&self, _request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        Ok(Response::new(self.answer.clone()))
    }

    type NoopStreamStream = Pin<Box<dyn Stream<Item = Result<CheckResponse, Status>> + Send>>;

    async fn noop_stream(&self, request: Request<Streaming<CheckRequest>>) -> Result<Response<Self::NoopStreamStream>, Status> {
        let answer = self.answer.clone();
        Ok(Response::new(Box::pin(request.into_inner().map(move |request| request.map(|_| answer.clone())))))
    }
}
