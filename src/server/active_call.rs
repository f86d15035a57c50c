//! One call, from its headers to the end of its reply: counted on its connection, charged while it waits, and ended at its
//! deadline.
//!
//! A call that is answered on its first poll is not charged and starts no timer. Look next at `request_body.rs`, which reads its request,
//! and at `worker.rs`, which serves connections.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use tonic::service::Routes;
use tower::Service as _;

use super::byte_budget::BudgetCharge;
use super::connection_registry::TrackedConnection;
use super::request_body::RequestBody;
use crate::api::message_limits::MessageLimits;
use crate::api::{CallRefusal, refusal_status};
use crate::model::connection::PeerInfo;
use crate::model::limits::WAITING_CALL_OVERHEAD_BYTES;

/// Most bytes of a reply that are handed to the transport at once. The transport would hold bytes that the peer does not take.
const REPLY_PART_BYTES_MAX: usize = 16 * 1024;
/// The caller's deadline (gRPC over HTTP/2).
const TIMEOUT_HEADER: &str = "grpc-timeout";

/// Counts a call on its connection until it is dropped.
pub(super) struct ActiveCall {
    connection: Arc<TrackedConnection>,
    /// Created when the call first waits.
    charge: Option<BudgetCharge>,
}

impl ActiveCall {
    pub(super) fn begin(tracked: &Arc<TrackedConnection>) -> Self {
        tracked.begin_call();
        Self { connection: Arc::clone(tracked), charge: None }
    }

    /// Charges a waiting call, including the messages that it has read so far.
    fn charge_wait(&mut self) -> Result<(), Status> {
        let read = self.connection.take_read_bytes();
        let account = &self.connection.budget;
        let charge = self.charge.get_or_insert_with(|| BudgetCharge::new(account));
        charge.grow_to(WAITING_CALL_OVERHEAD_BYTES.saturating_add(read)).map_err(|refused| {
            self.connection.counters.count_refusal(refused);
            refusal_status(refused)
        })
    }
}

impl Drop for ActiveCall {
    fn drop(&mut self) {
        self.connection.end_call();
    }
}

/// Answers a gRPC request.
pub(super) async fn answer_call<B>(
    mut routes: Routes,
    mut request: Request<B>,
    limits: fn(&str) -> MessageLimits,
    peer: PeerInfo,
    tracked: Arc<TrackedConnection>,
) -> Result<Response<ReplyBody<tonic::body::Body>>, Infallible>
where
    B: Body<Data = Bytes> + Unpin + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut call = ActiveCall::begin(&tracked);
    let limits = limits(request.uri().path());
    request.extensions_mut().insert(peer);
    let mut timeout = grpc_timeout(request.headers()).map(|timeout| Box::pin(tokio::time::sleep(timeout)));
    let answered = {
        let mut answering = pin!(routes.call(request.map(|body| RequestBody::new(body, limits, tracked))));
        poll_fn(|context| {
            call.connection.take_read_bytes();
            if let Poll::Ready(answered) = answering.as_mut().poll(context) {
                return Poll::Ready(answered.map_err(|never| match never {}));
            }
            if timeout.as_mut().is_some_and(|timeout| timeout.as_mut().poll(context).is_ready()) {
                return Poll::Ready(Err(refusal_status(CallRefusal::DeadlineExceeded)));
            }
            call.charge_wait().map_or_else(|refused| Poll::Ready(Err(refused)), |()| Poll::Pending)
        })
        .await
    };
    let response = answered.unwrap_or_else(|refused: Status| refused.into_http());
    Ok(response.map(|body| ReplyBody::new(body, call)))
}

/// The body of an answer. It is sent in parts, and the sweeper of the connection registry sees how long each part waits for the
/// peer.
pub(super) struct ReplyBody<B> {
    body: B,
    call: ActiveCall,
    /// The period in which the last part began to wait for the peer.
    wait_period: Option<usize>,
    unsent: Bytes,
    is_over: bool,
}

impl<B> ReplyBody<B> {
    pub(super) fn new(body: B, call: ActiveCall) -> Self {
        let waiting = Some(call.connection.begin_reply_wait());
        Self { body, call, wait_period: waiting, unsent: Bytes::new(), is_over: false }
    }

    fn end_wait(&mut self) {
        if let Some(period) = self.wait_period.take() {
            self.call.connection.end_reply_wait(period);
        }
    }

    /// Sends the next part of bytes that the inner body has already produced.
    fn next_part(&mut self, mut bytes: Bytes) -> Frame<Bytes> {
        self.wait_period = Some(self.call.connection.begin_reply_wait());
        if bytes.len() > REPLY_PART_BYTES_MAX {
            self.unsent = bytes.split_off(REPLY_PART_BYTES_MAX);
        }
        Frame::data(bytes)
    }
}

impl<B> Body for ReplyBody<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        this.end_wait();
        if !this.unsent.is_empty() {
            let rest = std::mem::take(&mut this.unsent);
            return Poll::Ready(Some(Ok(this.next_part(rest))));
        }
        if this.is_over {
            return Poll::Ready(None);
        }
        this.call.connection.take_read_bytes();
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(Ok(match frame.into_data() {
                Ok(data) => this.next_part(data),
                Err(trailers) => trailers,
            }))),
            Poll::Pending => match this.call.charge_wait() {
                Ok(()) => Poll::Pending,
                Err(refused) => {
                    this.is_over = true;
                    let mut trailers = HeaderMap::new();
                    // This fails only for bytes that no header can hold. The stream then ends without a status.
                    let _ = refused.add_header(&mut trailers);
                    Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                }
            },
            ended => ended,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.unsent.is_empty() && (self.is_over || self.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match self.unsent.is_empty() {
            true => self.body.size_hint(),
            false => SizeHint::default(),
        }
    }
}

impl<B> Drop for ReplyBody<B> {
    fn drop(&mut self) {
        self.end_wait();
    }
}

/// The caller's timeout, if it sends one: at most eight digits and a unit.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let (unit, number) = headers.get(TIMEOUT_HEADER)?.as_bytes().split_last()?;
    let number = std::str::from_utf8(number).ok().filter(|number| number.len() <= 8)?.parse::<u64>().ok()?;
    match unit {
        b'H' => Some(Duration::from_secs(number * 3600)),
        b'M' => Some(Duration::from_secs(number * 60)),
        b'S' => Some(Duration::from_secs(number)),
        b'm' => Some(Duration::from_millis(number)),
        b'u' => Some(Duration::from_micros(number)),
        b'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_of_callers() {
        let check = |header: &str, expected| {
            let headers = HeaderMap::from_iter([(http::HeaderName::from_static(TIMEOUT_HEADER), header.parse().unwrap())]);
            assert_eq!(grpc_timeout(&headers), expected, "{header}");
        };
        check("3H", Some(Duration::from_secs(10_800)));
        check("2M", Some(Duration::from_secs(120)));
        check("7S", Some(Duration::from_secs(7)));
        check("99999999m", Some(Duration::from_millis(99_999_999)));
        check("1u", Some(Duration::from_micros(1)));
        check("1n", Some(Duration::from_nanos(1)));
        for none in ["", "1", "m", "100000000m", "-1m", "+1x"] {
            check(none, None);
        }
        assert_eq!(grpc_timeout(&HeaderMap::new()), None);
    }
}
