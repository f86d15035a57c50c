//! The two calls that all load tests make: a check of a chain, and an operator's signed revocation of a session.

use anyhow::Result;
use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::model::time::{Clock as _, SystemClock};
use portcullis::token::PrivateKey;
use portcullis::token::operator_act::{self, AdminCall};
use prost::Message as _;
use tonic::metadata::MetadataValue;
use wire::check_request::Credential;

use super::fixture::{ARGUMENTS, AUDIENCE, TOOL};

/// A check of a read, with the chain in the request.
pub(crate) fn request_by_chain(chain: &[Bytes]) -> wire::CheckRequest {
    wire::CheckRequest {
        request_id: "r-00000000".to_owned(),
        credential: Some(Credential::Presentation(wire::Presentation { aat_chain: chain.to_vec(), aat_pop: Bytes::new() })),
        tool: TOOL.to_owned(),
        arguments_json: Bytes::from_static(ARGUMENTS.as_bytes()),
        audience: AUDIENCE.to_owned(),
        ..Default::default()
    }
}

/// A revocation of a session, signed for the history that the server follows.
pub(crate) fn signed(key: &PrivateKey, history: &str, session: String) -> Result<tonic::Request<wire::RevokeRequest>> {
    let target = wire::RevocationTarget { kind: "session".to_owned(), key: vec![session] };
    let message = wire::RevokeRequest { target: Some(target), reason: "load test".to_owned(), ..Default::default() };
    let bytes = message.encode_to_vec();
    let expected = AdminCall { audience: history, method: "/portcullis.v1.RevocationService/Revoke", message: &bytes };
    let authorization = format!("Operator {}", operator_act::sign_act(key, &expected, SystemClock.now()));
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("authorization", MetadataValue::try_from(authorization)?);
    Ok(request)
}
