//! Maps errors to gRPC status, all in this file: a code, one line, and `google.rpc.ErrorInfo{reason, domain: "portcullis"}`.
//!
//! The reason is stable: `cli/act_outcome.rs` derives the outcome of an act from it. Look next at `pap.rs`, whose errors are mapped
//! here.

use std::collections::HashMap;

use axum::body::Body;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::pap;
use crate::service::ServiceUnavailable;

const ERROR_DOMAIN: &str = "portcullis";

/// A status with a machine-readable reason.
pub(super) fn status_with_reason(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// The status for a malformed field of a request.
pub(super) fn invalid_argument(field: &str, message: impl std::fmt::Display) -> Status {
    let mut details = ErrorDetails::with_error_info("INVALID_ARGUMENT", ERROR_DOMAIN, HashMap::new());
    details.add_bad_request_violation(field, message.to_string());
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {message}"), details)
}

/// The status for a value over its limit.
pub(super) fn limit_exceeded(field: &str, bytes: usize, bytes_max: usize) -> Status {
    status_with_reason(Code::ResourceExhausted, "LIMIT_EXCEEDED", format!("{field}: {bytes} is over the limit of {bytes_max}"))
}

/// Why the transport refused a call before its handler saw the whole message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallRefusal {
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
    NotOneMessage,
    /// The request ends before its message does.
    IncompleteMessage,
    /// The deadline of the caller has passed.
    DeadlineExceeded,
    /// The call has more headers than one call may have.
    TooManyHeaders {
        /// The number of headers.
        count: usize,
        /// The limit.
        count_max: usize,
    },
    /// The connection has as many idle streams without a credential as one connection may have.
    IdleStreams,
    /// The waiting calls of this connection hold as many bytes as one connection may.
    ConnectionBudgetExceeded,
    /// The waiting calls of the listener hold as many bytes as all of them may.
    ListenerBudgetExceeded,
}

/// The status that tells the caller of a refusal.
pub fn refusal_status(refusal: CallRefusal) -> Status {
    match refusal {
        CallRefusal::TooLarge { bytes, bytes_max } => limit_exceeded("message", bytes, bytes_max),
        CallRefusal::TooSlow { after_ms } => {
            let message = format!("message: it did not arrive whole within {after_ms} ms");
            status_with_reason(Code::DeadlineExceeded, "MESSAGE_INCOMPLETE", message)
        }
        CallRefusal::NotOneMessage => invalid_argument("message", "one uncompressed message is expected"),
        CallRefusal::IncompleteMessage => invalid_argument("message", "the request ends before it does"),
        CallRefusal::DeadlineExceeded => {
            status_with_reason(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "the caller's own deadline has passed")
        }
        CallRefusal::TooManyHeaders { count, count_max } => limit_exceeded("headers", count, count_max),
        CallRefusal::IdleStreams => {
            let message =
                "this connection has too many streams that wait without a credential: end one, or use another connection";
            status_with_reason(Code::ResourceExhausted, "LIMIT_EXCEEDED", message)
        }
        CallRefusal::ConnectionBudgetExceeded => {
            let message = "the calls of this connection that wait hold too many bytes: finish them, or use another connection";
            status_with_reason(Code::ResourceExhausted, "LIMIT_EXCEEDED", message)
        }
        CallRefusal::ListenerBudgetExceeded => {
            let message = "the calls that wait here hold too many bytes: try again, or ask another replica";
            status_with_reason(Code::ResourceExhausted, "LIMIT_EXCEEDED", message)
        }
    }
}

/// Gives a refusal by the transport library the same form as every other error: a code with a reason of this API.
pub fn normalize_refusal(response: http::Response<Body>) -> http::Response<Body> {
    // Only a refusal has `grpc-status` in its headers; an answer has it in the trailers, after its message.
    let refused = response.headers().get("grpc-status").and_then(|_| Status::from_header_map(response.headers()));
    match refused.as_ref().and_then(decode_failure_status) {
        Some(explained) => explained.into_http::<tonic::body::Body>().map(Body::new),
        None => response,
    }
}

/// The status for a message that is too large or cannot be decoded; `None` for every other fault.
pub(super) fn decode_failure_status(fault: &Status) -> Option<Status> {
    match fault.code() {
        Code::OutOfRange => {
            Some(status_with_reason(Code::ResourceExhausted, "LIMIT_EXCEEDED", format!("message: {}", fault.message())))
        }
        Code::Internal if fault.message().starts_with("failed to decode Protobuf message") => {
            Some(invalid_argument("message", fault.message()))
        }
        _ => None,
    }
}

impl From<ServiceUnavailable> for Status {
    fn from(undecided: ServiceUnavailable) -> Self {
        let reason = match undecided {
            ServiceUnavailable::NotReady => "NOT_READY",
            ServiceUnavailable::Draining => "DRAINING",
        };
        status_with_reason(Code::Unavailable, reason, undecided.to_string())
    }
}

impl From<pap::Error> for Status {
    fn from(error: pap::Error) -> Self {
        let message = error.to_string();
        let (error, suffix) = match error {
            pap::Error::Unrecorded { cause } => (*cause, pap::Error::UNRECORDED),
            error => (error, ""),
        };
        match error {
            pap::Error::Unauthenticated(_) => status_with_reason(Code::Unauthenticated, "UNAUTHENTICATED", message),
            pap::Error::KeyRevoked(_) => status_with_reason(Code::Unauthenticated, "REVOKED_KEY", message),
            pap::Error::PermissionDenied(_) => status_with_reason(Code::PermissionDenied, "PERMISSION_DENIED", message),
            pap::Error::InvalidArgument { field, message } => invalid_argument(field, format!("{message}{suffix}")),
            pap::Error::InvalidPolicy(_) => status_with_reason(Code::InvalidArgument, "POLICY_INVALID", message),
            pap::Error::TestsFailed { .. } => status_with_reason(Code::InvalidArgument, "POLICY_TESTS_FAILED", message),
            pap::Error::NotFound { .. } => status_with_reason(Code::NotFound, "NOT_FOUND", message),
            pap::Error::CannotAnswer(_) => status_with_reason(Code::FailedPrecondition, "NOT_SAID", message),
            pap::Error::AuditUnavailable | pap::Error::Unrecorded { .. } => {
                status_with_reason(Code::Unavailable, "AUDIT_UNAVAILABLE", message)
            }
            pap::Error::Store(_) => match error.store_fault() {
                pap::StoreFault::Conflict => status_with_reason(Code::Aborted, "CONFLICT", message),
                pap::StoreFault::Rejected => status_with_reason(Code::FailedPrecondition, "REJECTED", message),
                pap::StoreFault::Unavailable => status_with_reason(Code::Unavailable, "STORE_UNAVAILABLE", message),
                pap::StoreFault::Unknown => status_with_reason(Code::Unknown, "COMMIT_UNKNOWN", message),
            },
        }
    }
}
