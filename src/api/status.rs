//! Maps errors to gRPC status, all in this file: a code, one line, and `google.rpc.ErrorInfo{reason, domain: "portcullis"}`.
//!
//! The reason is stable: `cli/outcome.rs` derives the outcome of an act from it. Look next at `pap.rs`, whose errors are mapped
//! here.

use std::collections::HashMap;

use axum::body::Body;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::pap;
use crate::service::Undecided;

const DOMAIN: &str = "portcullis";

/// A status with a machine-readable reason.
pub(super) fn status(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// The status for a malformed field of a request.
pub(super) fn invalid(field: &str, message: impl std::fmt::Display) -> Status {
    let mut details = ErrorDetails::with_error_info("INVALID_ARGUMENT", DOMAIN, HashMap::new());
    details.add_bad_request_violation(field, message.to_string());
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {message}"), details)
}

/// The status for a value over its limit.
pub(super) fn too_large(field: &str, bytes: usize, bytes_max: usize) -> Status {
    status(Code::ResourceExhausted, "LIMIT_EXCEEDED", format!("{field}: {bytes} is over the limit of {bytes_max}"))
}

/// Why the transport refused a call before its handler saw the whole message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A message is longer than its method allows.
    TooLarge {
        /// The length that its frame header gives.
        bytes: usize,
        /// The limit of the method.
        bytes_max: usize,
    },
    /// The message did not arrive in time.
    TooSlow {
        /// The time limit.
        after_ms: u64,
    },
    /// The message is compressed, or a second message follows where the method takes one.
    NotOne,
    /// The request ends before its message does.
    NotWhole,
    /// The deadline of the caller has passed.
    PastDeadline,
    /// The waiting calls of this connection hold as many bytes as one connection may.
    ConnectionBudget,
    /// The waiting calls of the listener hold as many bytes as all of them may.
    ListenerBudget,
}

/// The status that tells the caller of a refusal.
pub fn refusal(refusal: Refusal) -> Status {
    match refusal {
        Refusal::TooLarge { bytes, bytes_max } => too_large("message", bytes, bytes_max),
        Refusal::TooSlow { after_ms } => {
            let message = format!("message: it did not arrive whole within {after_ms} ms");
            status(Code::DeadlineExceeded, "MESSAGE_INCOMPLETE", message)
        }
        Refusal::NotOne => invalid("message", "one uncompressed message is expected"),
        Refusal::NotWhole => invalid("message", "the request ends before it does"),
        Refusal::PastDeadline => status(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "the caller's own deadline has passed"),
        Refusal::ConnectionBudget => {
            let message = "the calls of this connection that wait hold too many bytes: finish them, or use another connection";
            status(Code::ResourceExhausted, "LIMIT_EXCEEDED", message)
        }
        Refusal::ListenerBudget => {
            let message = "the calls that wait here hold too many bytes: try again, or ask another replica";
            status(Code::ResourceExhausted, "LIMIT_EXCEEDED", message)
        }
    }
}

/// Gives a refusal by the transport library the same form as every other error: a code with a reason of this API.
pub fn explain_refused(response: http::Response<Body>) -> http::Response<Body> {
    // Only a refusal has `grpc-status` in its headers; an answer has it in the trailers, after its message.
    let refused = response.headers().get("grpc-status").and_then(|_| Status::from_header_map(response.headers()));
    match refused.as_ref().and_then(undecodable) {
        Some(explained) => explained.into_http::<tonic::body::Body>().map(Body::new),
        None => response,
    }
}

/// The status for a message that is too large or cannot be decoded; `None` for every other fault.
pub(super) fn undecodable(fault: &Status) -> Option<Status> {
    match fault.code() {
        Code::OutOfRange => Some(status(Code::ResourceExhausted, "LIMIT_EXCEEDED", format!("message: {}", fault.message()))),
        Code::Internal if fault.message().starts_with("failed to decode Protobuf message") => {
            Some(invalid("message", fault.message()))
        }
        _ => None,
    }
}

impl From<Undecided> for Status {
    fn from(undecided: Undecided) -> Self {
        let reason = match undecided {
            Undecided::NotReady => "NOT_READY",
            Undecided::Draining => "DRAINING",
        };
        status(Code::Unavailable, reason, undecided.to_string())
    }
}

impl From<pap::Error> for Status {
    fn from(error: pap::Error) -> Self {
        let message = error.to_string();
        let (error, beside) = match error {
            pap::Error::Unrecorded { cause } => (*cause, pap::Error::UNRECORDED),
            error => (error, ""),
        };
        match error {
            pap::Error::Unauthenticated(_) => status(Code::Unauthenticated, "UNAUTHENTICATED", message),
            pap::Error::KeyRevoked(_) => status(Code::Unauthenticated, "REVOKED_KEY", message),
            pap::Error::PermissionDenied(_) => status(Code::PermissionDenied, "PERMISSION_DENIED", message),
            pap::Error::Invalid { field, message } => invalid(field, format!("{message}{beside}")),
            pap::Error::Policy(_) => status(Code::InvalidArgument, "POLICY_INVALID", message),
            pap::Error::Tests { .. } => status(Code::InvalidArgument, "POLICY_TESTS_FAILED", message),
            pap::Error::NotFound { .. } => status(Code::NotFound, "NOT_FOUND", message),
            pap::Error::NotSaid(_) => status(Code::FailedPrecondition, "NOT_SAID", message),
            pap::Error::AuditUnavailable | pap::Error::Unrecorded { .. } => {
                status(Code::Unavailable, "AUDIT_UNAVAILABLE", message)
            }
            pap::Error::Store(_) => match error.store_fault() {
                pap::StoreFault::Conflict => status(Code::Aborted, "CONFLICT", message),
                pap::StoreFault::Rejected => status(Code::FailedPrecondition, "REJECTED", message),
                pap::StoreFault::Unavailable => status(Code::Unavailable, "STORE_UNAVAILABLE", message),
                pap::StoreFault::Unknown => status(Code::Unknown, "COMMIT_UNKNOWN", message),
            },
        }
    }
}
