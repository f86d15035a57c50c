//! A tower layer in front of administration: it verifies a call's signature, then reads the message, then calls the handler.
//!
//! The signature names its key, store, method and time, so all of these are checked before a byte of the message is read. It also
//! covers the message's bytes as received, which are compared before they are decoded. Health, reflection and `FleetService.Info`
//! need no signature.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tonic::Status;
use tower::{Layer, Service};

use super::admin_methods::{admin_limits, is_unsigned_method};
use super::message_limits::MessageLimits;
use super::status::{CallRefusal, invalid_argument, refusal_status};
use super::store_timeout;
use crate::model::connection::PeerInfo;
use crate::pap::{AdministrationPoint, AuthorizedAct};

/// Metadata on the answer to an act that was carried out but is not in the audit log. Its value is [`UNRECORDED_VALUE`].
pub const UNRECORDED_HEADER: &str = "portcullis-unrecorded";
/// Names the log that cannot be written.
pub const UNRECORDED_VALUE: &str = "audit-log";

/// A [`Layer`] that passes signed acts only. The handler finds [`crate::pap::AuthorizedAct`] in the extensions.
#[derive(Clone)]
pub struct SignedActLayer {
    admin: Arc<AdministrationPoint>,
}

impl SignedActLayer {
    /// Verifies signatures with `admin`.
    pub fn new(admin: Arc<AdministrationPoint>) -> Self {
        Self { admin }
    }
}

impl<S> Layer<S> for SignedActLayer {
    type Service = SignedActService<S>;

    fn layer(&self, inner: S) -> SignedActService<S> {
        SignedActService { admin: self.admin.clone(), inner }
    }
}

/// The service that [`SignedActLayer`] creates.
#[derive(Clone)]
pub struct SignedActService<S> {
    admin: Arc<AdministrationPoint>,
    inner: S,
}

impl<S> Service<http::Request<Body>> for SignedActService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        if is_unsigned_method(request.uri().path()) {
            return Box::pin(inner.call(request));
        }
        let admin = self.admin.clone();
        Box::pin(async move {
            match authorize_request(&admin, request).await {
                Ok((request, by)) => {
                    let mut response = inner.call(request).await?;
                    if by.is_unrecorded() {
                        response.headers_mut().insert(UNRECORDED_HEADER, http::HeaderValue::from_static(UNRECORDED_VALUE));
                    }
                    Ok(response)
                }
                Err(status) => Ok(status.into_http::<tonic::body::Body>().map(Body::new)),
            }
        })
    }
}

/// One byte says whether the message is compressed, four give its length.
const FRAME_HEADER_BYTES: usize = 5;

async fn authorize_request(
    admin: &AdministrationPoint,
    request: http::Request<Body>,
) -> Result<(http::Request<Body>, AuthorizedAct), Status> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let peer = super::caller::peer_address(&parts.extensions);
    let mut authorizations = Vec::new();
    for value in parts.headers.get_all(http::header::AUTHORIZATION) {
        authorizations.push(value.to_str().map_err(|_| invalid_argument("authorization", "is not text"))?);
    }
    // The message is read only from a caller who signed this call. The signature's hash of the message is compared after reading.
    store_timeout::await_read(admin.check_signatures(&path, &authorizations, &peer)).await?;
    // Its connection keeps its place from here on, and may hold a policy folder.
    if let Some(peer) = parts.extensions.get::<PeerInfo>() {
        peer.verified_signature.set();
    }
    let frame = read_body(body, admin_limits(&path)).await?;
    let message = match frame.split_first_chunk::<FRAME_HEADER_BYTES>() {
        Some(([0, length @ ..], message)) if u32::from_be_bytes(*length) as usize == message.len() => message,
        _ => return Err(refusal_status(CallRefusal::NotOneMessage)),
    };
    let by = store_timeout::await_read(admin.authorize(&path, message, &authorizations, &peer)).await?;
    parts.extensions.insert(by.clone());
    Ok((http::Request::from_parts(parts, Body::from(frame)), by))
}

/// Reads the whole body within its limits. Small parts are copied together, because each part would keep its whole receive buffer.
async fn read_body(body: Body, limits: MessageLimits) -> Result<Bytes, Status> {
    let MessageLimits { bytes_max, arrival, .. } = limits;
    let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| {
        if error.is::<LengthLimitError>() {
            return refusal_status(CallRefusal::TooLarge { bytes: bytes_max + 1, bytes_max });
        }
        Status::try_from_error(error).unwrap_or_else(|error| invalid_argument("message", format!("could not be read: {error}")))
    };
    let reading = async {
        let mut body = Limited::new(body, bytes_max.saturating_add(FRAME_HEADER_BYTES));
        let mut frame = BytesMut::new();
        while let Some(part) = body.frame().await {
            if let Ok(data) = part.map_err(unreadable)?.into_data() {
                frame.extend_from_slice(&data);
            }
        }
        Ok::<_, Status>(frame.freeze())
    };
    let after_ms = u64::try_from(arrival.as_millis()).unwrap_or(u64::MAX);
    tokio::time::timeout(arrival, reading).await.map_err(|_| refusal_status(CallRefusal::TooSlow { after_ms }))?
}
