//! Converts protobuf, calls `service` and `pap`, maps errors to status. Decides nothing.

/// Generated from `proto/`; written by the codegen test.
#[allow(missing_docs, clippy::all)]
pub mod r#gen {
    include!("api/gen/portcullis.v1.rs");

    /// The descriptors of every service, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!("api/gen/descriptors.bin");
}
