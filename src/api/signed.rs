//! The layer before administration: reads a call's message as it came, has its signature checked, and only then lets it on.
//!
//! The signature covers the message's bytes as received, so it is checked before they are decoded. Health, reflection and
//! `FleetService.Info` are unsigned.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use http_body_util::{BodyExt as _, Limited};
use tonic::Status;
use tower::{Layer, Service};

use super::status::{invalid, too_large};
use crate::model::limits::{CHECK_MESSAGE_BYTES_MAX, POLICY_BYTES_MAX};
use crate::pap::{Admin, Authorized};

/// The metadata of an answer to an act that was done and is not in the audit log; its value is [`UNRECORDED_VALUE`].
pub const UNRECORDED: &str = "portcullis-unrecorded";
/// What cannot be written.
pub const UNRECORDED_VALUE: &str = "audit-log";

/// Methods that need no signature.
const UNSIGNED: &[&str] = &[
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/portcullis.v1.FleetService/Info",
];

/// Methods whose message is a policy folder; every other one is small.
const LARGE: &[&str] =
    &["/portcullis.v1.PolicyService/Apply", "/portcullis.v1.PolicyService/Check", "/portcullis.v1.PolicyService/Diff"];

/// Methods whose message is a call with its chain.
const CALLS: &[&str] = &["/portcullis.v1.PolicyService/Explain"];

/// The message of any other act.
const SMALL_MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// How long a message may take to arrive.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(30);

/// A [`Layer`] that lets only signed acts through; the handler finds [`crate::pap::Authorized`] in the extensions.
#[derive(Clone)]
pub struct SignedActs {
    admin: Arc<Admin>,
}

impl SignedActs {
    /// Largest message of an act: a policy folder and its frame.
    pub const MESSAGE_BYTES_MAX: usize = POLICY_BYTES_MAX + 1024 * 1024;

    /// Has signatures checked by `admin`.
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

/// The service that [`SignedActs`] makes.
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
        if UNSIGNED.contains(&request.uri().path()) {
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

async fn authorized(admin: &Admin, request: http::Request<Body>) -> Result<(http::Request<Body>, Authorized), Status> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let peer = super::decision::peer_text(&parts.extensions);
    let mut authorizations = Vec::new();
    for value in parts.headers.get_all(http::header::AUTHORIZATION) {
        authorizations.push(value.to_str().map_err(|_| invalid("authorization", "is not text"))?);
    }
    // Nothing is read of a caller who cannot have signed.
    admin.check_signer(&path, &authorizations, &peer).await?;
    let bytes_max = match path.as_str() {
        path if LARGE.contains(&path) => SignedActs::MESSAGE_BYTES_MAX,
        path if CALLS.contains(&path) => CHECK_MESSAGE_BYTES_MAX,
        _ => SMALL_MESSAGE_BYTES_MAX,
    };
    let arriving = tokio::time::timeout(ARRIVAL_TIMEOUT, Limited::new(body, bytes_max).collect());
    let frame = match arriving.await.map_err(|_| invalid("message", "did not arrive in time"))? {
        Ok(collected) => collected.to_bytes(),
        Err(error) if error.downcast_ref::<http_body_util::LengthLimitError>().is_some() => {
            return Err(too_large("message", bytes_max + 1, bytes_max));
        }
        Err(error) => return Err(invalid("message", format!("could not be read: {error}"))),
    };
    // A gRPC frame: one byte that says compressed, four that say how long, the message.
    let message = match frame.split_first_chunk::<5>() {
        Some(([0, length @ ..], message)) if u32::from_be_bytes(*length) as usize == message.len() => message,
        _ => return Err(invalid("message", "one uncompressed message is expected")),
    };
    let by = admin.authorize(&path, message, &authorizations, &peer).await?;
    parts.extensions.insert(by.clone());
    Ok((http::Request::from_parts(parts, Body::from(frame)), by))
}
