//! The methods of administration that need no signature.
//!
//! Look next at `signature_layer.rs`, which verifies the signature of every other method, and at `message_limits.rs`, which limits their messages.

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
