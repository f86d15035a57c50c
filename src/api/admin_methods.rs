//! The methods of the administration's listener: which of them need no signature, and the limits on their messages.
//!
//! Look next at `signature_layer.rs`, which verifies the signature of every other method.

use std::time::Duration;

use super::message_limits::{MessageLimits, UNCOUNTED_SHAPE, small_message_limits};
use super::wires::portcullis_v1::message_shapes::CHECK_REQUEST_SHAPE;
use crate::model::limits::{CHECK_MESSAGE_BYTES_MAX, POLICY_MESSAGE_BYTES_MAX, POLICY_READ_TIMEOUT_MS, SIGNED_MESSAGE_BYTES_MAX};

/// The methods that need no signature.
const UNSIGNED_METHODS: &[&str] = &[
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/portcullis.v1.FleetService/Info",
];

/// Whether a method needs no signature.
pub(super) fn is_unsigned_method(path: &str) -> bool {
    UNSIGNED_METHODS.contains(&path)
}

/// The limits of a method on the administration's listener.
pub fn admin_limits(path: &str) -> MessageLimits {
    match path {
        "/portcullis.v1.PolicyService/Apply" | "/portcullis.v1.PolicyService/Check" | "/portcullis.v1.PolicyService/Diff" => {
            let arrival = Duration::from_millis(POLICY_READ_TIMEOUT_MS);
            MessageLimits { arrival, ..MessageLimits::unary(POLICY_MESSAGE_BYTES_MAX, &UNCOUNTED_SHAPE) }
        }
        "/portcullis.v1.PolicyService/Explain" => MessageLimits::unary(CHECK_MESSAGE_BYTES_MAX, &CHECK_REQUEST_SHAPE),
        _ if is_unsigned_method(path) => small_message_limits(path),
        _ => MessageLimits::unary(SIGNED_MESSAGE_BYTES_MAX, &UNCOUNTED_SHAPE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_limits() {
        const KIB: usize = 1024;
        let check = |path: &str, bytes_max: usize, is_stream: bool, arrival_s: u64| {
            let limits = admin_limits(path);
            assert_eq!(
                (limits.bytes_max, limits.is_stream, limits.arrival.as_secs()),
                (bytes_max, is_stream, arrival_s),
                "{path}"
            );
        };
        check("/portcullis.v1.PolicyService/Apply", 33 * 1024 * KIB, false, 30);
        check("/portcullis.v1.PolicyService/Explain", 256 * KIB, false, 5);
        check("/portcullis.v1.RevocationService/Revoke", 64 * KIB, false, 5);
        check("/portcullis.v1.FleetService/Info", 8 * KIB, false, 5);
        check("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 8 * KIB, true, 5);
    }
}
