//! The limits on a message of each method: its bytes, the counts of its repeated fields, and the time that it may take to arrive.
//!
//! The server applies these limits while a message arrives, before it is decoded. A method that is not listed here gets the
//! smallest limits. Look next at `message_scanner.rs`, which counts fields, and at `server/request_body.rs`, which reads the messages.

use std::time::Duration;

use super::message_scanner::{FieldLimit, FieldRule, MessageShape};
use super::unsigned_methods::is_unsigned_method;
use crate::model::limits::{
    BATCH_CALL_BYTES, BATCH_CALLS_MAX, BATCH_MESSAGE_BYTES_MAX, CHAIN_TOKENS_READ_MAX, CHECK_MESSAGE_BYTES_MAX, LIST_TOOLS_MAX,
    LISTED_TOOL_BYTES, MESSAGE_READ_TIMEOUT_MS, POLICY_MESSAGE_BYTES_MAX, POLICY_READ_TIMEOUT_MS, REFLECTION_BYTES,
    SIGNED_MESSAGE_BYTES_MAX, SMALL_MESSAGE_BYTES_MAX,
};

/// The limits of one method.
#[derive(Clone, Copy, Debug)]
pub struct MessageLimits {
    /// Largest message, in bytes without its frame header.
    pub bytes_max: usize,
    /// Whether more than one message may come. Otherwise the request must end after its one message.
    pub is_stream: bool,
    /// Longest time to arrive. For one message it runs from the headers to the end of the request; in a stream, from the first byte
    /// of each message to its last.
    pub arrival: Duration,
    /// The fields that are counted before decoding.
    pub shape: &'static MessageShape,
    /// Whether the method opens a stream that needs no credential and may stay idle.
    pub is_idle: bool,
    /// Bytes that an open stream may hold for an answer that is not taken. A unary answer is charged by its size.
    pub held_bytes: usize,
}

/// The limits of a method on the decisions' listener.
pub fn decision_limits(path: &str) -> MessageLimits {
    const CHECK: MessageLimits = limits(CHECK_MESSAGE_BYTES_MAX, &CHECK_REQUEST_SHAPE);
    match path {
        "/portcullis.v1.DecisionService/Check" | "/portcullis.v1.DecisionService/Explain" => CHECK,
        "/portcullis.v1.DecisionService/CheckBatch" => limits(BATCH_MESSAGE_BYTES_MAX, &CHECK_BATCH_REQUEST_SHAPE),
        "/portcullis.v1.DecisionService/CheckStream" => MessageLimits { is_stream: true, ..CHECK },
        "/portcullis.v1.DecisionService/ListTools" => limits(CHECK_MESSAGE_BYTES_MAX, &LIST_TOOLS_REQUEST_SHAPE),
        "/portcullis.v1.NoopService/Noop" => CHECK,
        "/portcullis.v1.NoopService/NoopStream" => MessageLimits { is_stream: true, ..CHECK },
        _ => small_message_limits(path),
    }
}

/// The limits of a method on the administration's listener.
pub fn admin_limits(path: &str) -> MessageLimits {
    let policy = MessageLimits {
        arrival: Duration::from_millis(POLICY_READ_TIMEOUT_MS),
        ..limits(POLICY_MESSAGE_BYTES_MAX, &UNCOUNTED_SHAPE)
    };
    match path {
        "/portcullis.v1.PolicyService/Apply" | "/portcullis.v1.PolicyService/Check" | "/portcullis.v1.PolicyService/Diff" => {
            policy
        }
        "/portcullis.v1.PolicyService/Explain" => limits(CHECK_MESSAGE_BYTES_MAX, &CHECK_REQUEST_SHAPE),
        _ if is_unsigned_method(path) => small_message_limits(path),
        _ => limits(SIGNED_MESSAGE_BYTES_MAX, &UNCOUNTED_SHAPE),
    }
}

fn small_message_limits(path: &str) -> MessageLimits {
    let is_stream = path.starts_with("/grpc.reflection.");
    let is_idle = is_stream || path == "/grpc.health.v1.Health/Watch";
    let held_bytes = if is_stream { REFLECTION_BYTES } else { 0 };
    MessageLimits { is_stream, is_idle, held_bytes, ..limits(SMALL_MESSAGE_BYTES_MAX, &UNCOUNTED_SHAPE) }
}

const fn limits(bytes_max: usize, shape: &'static MessageShape) -> MessageLimits {
    let arrival = Duration::from_millis(MESSAGE_READ_TIMEOUT_MS);
    MessageLimits { bytes_max, is_stream: false, arrival, shape, is_idle: false, held_bytes: 0 }
}

/// A shape in which no field is counted.
static UNCOUNTED_SHAPE: MessageShape = MessageShape { fields: &[] };

static PRESENTATION_SHAPE: MessageShape = MessageShape {
    fields: &[FieldRule {
        number: 1,
        limit: Some(FieldLimit { counter: 0, name: "presentation.aat_chain", count_max: CHAIN_TOKENS_READ_MAX, each_bytes: 0 }),
        message_shape: None,
        resets_counter: None,
    }],
};

/// `DecisionRequest`.
pub(super) static CHECK_REQUEST_SHAPE: MessageShape = MessageShape {
    fields: &[FieldRule { number: 2, limit: None, message_shape: Some(&PRESENTATION_SHAPE), resets_counter: None }],
};

/// `CheckBatchRequest`.
pub(super) static CHECK_BATCH_REQUEST_SHAPE: MessageShape = MessageShape {
    fields: &[FieldRule {
        number: 1,
        limit: Some(FieldLimit { counter: 1, name: "requests", count_max: BATCH_CALLS_MAX, each_bytes: BATCH_CALL_BYTES }),
        message_shape: Some(&CHECK_REQUEST_SHAPE),
        resets_counter: Some(0),
    }],
};

/// `ListToolsRequest`.
pub(super) static LIST_TOOLS_REQUEST_SHAPE: MessageShape = MessageShape {
    fields: &[
        FieldRule { number: 1, limit: None, message_shape: Some(&PRESENTATION_SHAPE), resets_counter: None },
        FieldRule {
            number: 3,
            limit: Some(FieldLimit { counter: 1, name: "tools", count_max: LIST_TOOLS_MAX, each_bytes: LISTED_TOOL_BYTES }),
            message_shape: None,
            resets_counter: None,
        },
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_limits() {
        const KIB: usize = 1024;
        let check = |limits: MessageLimits, bytes_max: usize, is_stream: bool, arrival_s: u64| {
            assert_eq!((limits.bytes_max, limits.is_stream, limits.arrival.as_secs()), (bytes_max, is_stream, arrival_s));
        };
        check(decision_limits("/portcullis.v1.DecisionService/Check"), 256 * KIB, false, 5);
        check(decision_limits("/portcullis.v1.DecisionService/Explain"), 256 * KIB, false, 5);
        check(decision_limits("/portcullis.v1.DecisionService/ListTools"), 256 * KIB, false, 5);
        check(decision_limits("/portcullis.v1.DecisionService/CheckBatch"), 4096 * KIB, false, 5);
        check(decision_limits("/portcullis.v1.DecisionService/CheckStream"), 256 * KIB, true, 5);
        check(decision_limits("/portcullis.v1.RevocationService/Watch"), 8 * KIB, false, 5);
        check(decision_limits("/portcullis.v1.PolicyService/Apply"), 8 * KIB, false, 5);
        check(decision_limits("/grpc.health.v1.Health/Check"), 8 * KIB, false, 5);
        check(decision_limits("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), 8 * KIB, true, 5);
        check(decision_limits(""), 8 * KIB, false, 5);
        check(admin_limits("/portcullis.v1.PolicyService/Apply"), 33 * 1024 * KIB, false, 30);
        check(admin_limits("/portcullis.v1.PolicyService/Explain"), 256 * KIB, false, 5);
        check(admin_limits("/portcullis.v1.RevocationService/Revoke"), 64 * KIB, false, 5);
        check(admin_limits("/portcullis.v1.FleetService/Info"), 8 * KIB, false, 5);
        check(admin_limits("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), 8 * KIB, true, 5);
    }
}
