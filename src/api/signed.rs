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

use super::deadline;
use super::message::{MessageLimits, admin_limits};
use super::status::{Refusal, invalid, refusal};
use super::unsigned_methods::is_unsigned;
use crate::model::connection::PeerInfo;
use crate::pap::{Admin, Authorized};

/// Metadata on the answer to an act that was carried out but is not in the audit log. Its value is [`UNRECORDED_VALUE`].
pub const UNRECORDED: &str = "portcullis-unrecorded";
/// Names the log that cannot be written.
pub const UNRECORDED_VALUE: &str = "audit-log";

/// A [`Layer`] that passes signed acts only. The handler finds [`crate::pap::Authorized`] in the extensions.
#[derive(Clone)]
pub struct SignedActs {
    admin: Arc<Admin>,
}

impl SignedActs {
    /// Verifies signatures with `admin`.
    pub fn new(admin: Arc<Admin>) -> Self {
        Self { admin }
    }
}

impl<S> Layer<S> for SignedActs {
    type Service = Signed<S>;

    fn layer(&self, inner: S) -> Signed<S> {
        Signed { admin: self.admin.clone(), inner }
    }
}

/// The service that [`SignedActs`] creates.
#[derive(Clone)]
pub struct Signed<S> {
    admin: Arc<Admin>,
    inner: S,
}

impl<S> Service<http::Request<Body>> for Signed<S>
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
        if is_unsigned(request.uri().path()) {
            return Box::pin(inner.call(request));
        }
        let admin = self.admin.clone();
        Box::pin(async move {
            match authorized(&admin, request).await {
                Ok((request, by)) => {
                    let mut response = inner.call(request).await?;
                    if by.is_unrecorded() {
                        response.headers_mut().insert(UNRECORDED, http::HeaderValue::from_static(UNRECORDED_VALUE));
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

async fn authorized(admin: &Admin, request: http::Request<Body>) -> Result<(http::Request<Body>, Authorized), Status> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let peer = super::decision::peer_text(&parts.extensions);
    let mut authorizations = Vec::new();
    for value in parts.headers.get_all(http::header::AUTHORIZATION) {
        authorizations.push(value.to_str().map_err(|_| invalid("authorization", "is not text"))?);
    }
    // The message is read only from a caller who signed this call. The signature's hash of the message is compared after reading.
    deadline::read(admin.check_signatures(&path, &authorizations, &peer)).await?;
    let frame = read(body, admin_limits(&path)).await?;
    let message = match frame.split_first_chunk::<FRAME_HEADER_BYTES>() {
        Some(([0, length @ ..], message)) if u32::from_be_bytes(*length) as usize == message.len() => message,
        _ => return Err(refusal(Refusal::NotOne)),
    };
    let by = deadline::read(admin.authorize(&path, message, &authorizations, &peer)).await?;
    if let Some(peer) = parts.extensions.get::<PeerInfo>() {
        peer.standing.prove();
    }
    parts.extensions.insert(by.clone());
    Ok((http::Request::from_parts(parts, Body::from(frame)), by))
}

/// Reads the whole body within its limits. Small parts are copied together, because each part would keep its whole receive buffer.
async fn read(body: Body, limits: MessageLimits) -> Result<Bytes, Status> {
    let MessageLimits { bytes_max, arrival, .. } = limits;
    let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| {
        if error.is::<LengthLimitError>() {
            return refusal(Refusal::TooLarge { bytes: bytes_max + 1, bytes_max });
        }
        Status::try_from_error(error).unwrap_or_else(|error| invalid("message", format!("could not be read: {error}")))
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
    tokio::time::timeout(arrival, reading).await.map_err(|_| refusal(Refusal::TooSlow { after_ms }))?
}
