//! The gRPC edge: converts protobuf messages, calls `service` and `pap`, and maps their errors to status codes.
//!
//! This module decides nothing. It must not import the store, the policy, the tokens or `pdp`, so that no handler can bypass the
//! checks of `service` and `pap`. Look next at `api/wires.rs`, then at `service.rs`, which it calls.

pub mod admin;
pub mod admin_methods;
mod caller;
pub mod message_limits;
pub mod message_scanner;
pub mod noop;
mod operators;
pub mod revocation_feed;
mod signature_layer;
mod status;
mod store_timeout;
mod wire_values;
pub mod wires;

pub use signature_layer::{SignedActLayer, UNRECORDED_HEADER, UNRECORDED_VALUE};
pub use status::{CallRefusal, normalize_refusal, refusal_status};

/// Generated from `proto/`; written by the codegen test.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod r#gen {
    include!("api/gen/portcullis.v1.rs");

    /// The descriptors of every service, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!("api/gen/descriptors.bin");
}
