//! The caller of a method, from what the transport and the headers say: its connection, its address, its trace.
//!
//! Nothing here comes from a message. Look next at `wires.rs`, whose handlers read it.

use std::sync::Arc;

use http::Extensions;
use tonic::metadata::MetadataMap;

use crate::model::connection::{PeerInfo, VerifiedSignatureFlag};
use crate::model::limits::TRACE_HEADER_BYTES_MAX;
use crate::service::request::{Caller, CheckAnswer, TraceHeaders};

/// The caller, as the transport identifies it.
pub(super) fn caller_of(extensions: &Extensions) -> Caller {
    match extensions.get::<PeerInfo>() {
        Some(peer) => Caller { connection_id: peer.connection_id, address: peer.address.clone(), is_loopback: peer.is_loopback },
        // Without a known peer the caller has no right to any audience, and no handle of another connection.
        None => Caller { connection_id: u64::MAX, address: "unknown".into(), is_loopback: false },
    }
}

/// The flag of the call's connection.
pub(super) fn verified_signature_flag(extensions: &Extensions) -> Option<Arc<VerifiedSignatureFlag>> {
    extensions.get::<PeerInfo>().map(|peer| peer.verified_signature.clone())
}

/// Marks the connection as proved once a caller on it proved to hold a chain in force. A full listener cuts connections without
/// that mark first.
pub(super) fn mark_connection_proved(verified_signature: Option<&VerifiedSignatureFlag>, answer: &CheckAnswer) {
    if let (Some(verified_signature), true) = (verified_signature, answer.shows_possession) {
        verified_signature.set();
    }
}

/// The peer's address for an audit line.
pub(super) fn peer_address(extensions: &Extensions) -> String {
    extensions.get::<PeerInfo>().map_or_else(|| "unknown".to_owned(), |peer| peer.address.to_string())
}

/// The trace context in the headers of a call.
pub(super) fn trace_headers(metadata: &MetadataMap) -> TraceHeaders {
    // A longer header is not copied: no valid `traceparent` is that long, and a longer `tracestate` would not be used.
    let fits = |text: &&str| text.len() <= TRACE_HEADER_BYTES_MAX;
    let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok()).filter(fits).map(Arc::from);
    TraceHeaders { parent: text("traceparent"), state: text("tracestate") }
}
