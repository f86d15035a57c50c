//! One call, from its headers to the end of its reply: counted on its connection, charged while it waits, and ended at its
//! deadline.
//!
//! A call that is answered on its first poll with a small reply is not charged and starts no timer. A larger reply is charged until
//! the peer has taken it. Look next at `request_body.rs`, which reads its request, and at `worker.rs`, which serves connections.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use tonic::service::Routes;
use tower::Service as _;

use super::connection_registry::TrackedConnection;
use super::request_body::RequestBody;
use crate::api::message_limits::MessageLimits;
use crate::api::{CallRefusal, refusal_status};
use crate::model::connection::PeerInfo;
use crate::model::limits::{CALL_HEADER_BYTES, CALL_HEADERS_MAX, HEADER_BYTES, WAITING_CALL_OVERHEAD_BYTES};

/// Most bytes of a reply that are handed to the transport at once. The transport would hold bytes that the peer does not take.
const REPLY_PART_BYTES_MAX: usize = 16 * 1024;
/// Largest reply that is not charged while it waits for the peer.
const REPLY_FREE_BYTES_MAX: usize = 4 * 1024;
/// The caller's deadline (gRPC over HTTP/2).
const TIMEOUT_HEADER: &str = "grpc-timeout";

/// Counts a call on its connection until it is dropped.
pub(super) struct ActiveCall {
    connection: Arc<TrackedConnection>,
    /// The charge of the call while it waits, without its messages.
    base_bytes: usize,
    charged_bytes: usize,
    /// Whether it counts among the idle streams of its connection.
    is_idle: bool,
}

impl ActiveCall {
    pub(super) fn begin(tracked: &Arc<TrackedConnection>) -> Self {
        tracked.begin_call();
        Self { connection: Arc::clone(tracked), base_bytes: WAITING_CALL_OVERHEAD_BYTES, charged_bytes: 0, is_idle: false }
    }

    /// Weighs the headers, and takes one of the connection's idle streams for a method that opens one.
    fn admit(&mut self, headers: &HeaderMap, limits: &MessageLimits) -> Result<(), Status> {
        let count = headers.len();
        if count > CALL_HEADERS_MAX {
            return Err(self.count_refusal(CallRefusal::TooManyHeaders { count, count_max: CALL_HEADERS_MAX }));
        }
        let header_bytes = headers.values().map(HeaderValue::len).sum::<usize>() + HEADER_BYTES * count;
        self.base_bytes = WAITING_CALL_OVERHEAD_BYTES + header_bytes.saturating_sub(CALL_HEADER_BYTES);
        if limits.is_idle {
            if !self.connection.begin_idle_stream() {
                return Err(self.count_refusal(CallRefusal::IdleStreams));
            }
            self.is_idle = true;
        }
        Ok(())
    }

    /// Charges a waiting call, including the messages that it has read so far.
    fn charge_wait(&mut self) -> Result<(), Status> {
        let read = self.connection.take_read_bytes();
        self.charge_held_bytes(read)
    }

    /// Charges a call that waits, and `bytes` that it holds.
    fn charge_held_bytes(&mut self, bytes: usize) -> Result<(), Status> {
        let bytes = self.base_bytes.saturating_add(bytes);
        let raised = self.connection.budget.raise(&mut self.charged_bytes, bytes);
        raised.map_err(|refusal| self.count_refusal(refusal))
    }

    fn count_refusal(&self, refusal: CallRefusal) -> Status {
        self.connection.counters.count_refusal(refusal);
        refusal_status(refusal)
    }
}

impl Drop for ActiveCall {
    fn drop(&mut self) {
        if self.charged_bytes > 0 {
            self.connection.budget.release(self.charged_bytes);
        }
        if self.is_idle {
            self.connection.end_idle_stream();
        }
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
    if let Err(refused) = call.admit(request.headers(), &limits) {
        return Ok(refused.into_http().map(|body| ReplyBody::new(body, call)));
    }
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
    let (head, mut body) = answered.unwrap_or_else(|refused: Status| refused.into_http()).into_parts();
    let prefetched = prefetch_first_frame(&mut body, &limits).await;
    let held = match &prefetched {
        Some(Some(Ok(frame))) => frame.data_ref().map_or(0, Bytes::len),
        _ => limits.held_bytes,
    };
    let charged = if held > REPLY_FREE_BYTES_MAX { call.charge_held_bytes(held) } else { Ok(()) };
    match charged {
        Ok(()) => {
            let mut reply = ReplyBody::new(body, call);
            reply.prefetched = prefetched;
            Ok(Response::from_parts(head, reply))
        }
        Err(refused) => Ok(refused.into_http().map(|body| ReplyBody::new(body, call))),
    }
}

/// Takes the first frame of a reply if it is ready, so that the reply is charged by its real size while the peer does not read.
/// Takes nothing from the reply to a stream of requests: each of its answers is made only when the transport polls for it.
async fn prefetch_first_frame<B: Body<Data = Bytes> + Unpin>(body: &mut B, limits: &MessageLimits) -> Option<PrefetchedFrame<B>> {
    if limits.is_stream || body.is_end_stream() {
        return None;
    }
    poll_fn(|context| match Pin::new(&mut *body).poll_frame(context) {
        Poll::Ready(frame) => Poll::Ready(Some(frame)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// What a body answered when it was asked for a frame; `None` at its end.
type PrefetchedFrame<B> = Option<Result<Frame<Bytes>, <B as Body>::Error>>;

/// The body of an answer. It is sent in parts, and the sweeper of the connection registry sees how long each part waits for the
/// peer.
pub(super) struct ReplyBody<B: Body<Data = Bytes>> {
    body: B,
    /// A frame that was taken from the body and not sent yet.
    prefetched: Option<PrefetchedFrame<B>>,
    call: ActiveCall,
    /// The period in which the last part began to wait for the peer.
    wait_period: Option<usize>,
    unsent: Bytes,
    is_over: bool,
}

impl<B: Body<Data = Bytes>> ReplyBody<B> {
    pub(super) fn new(body: B, call: ActiveCall) -> Self {
        let waiting = Some(call.connection.begin_reply_wait());
        Self { body, prefetched: None, call, wait_period: waiting, unsent: Bytes::new(), is_over: false }
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
    B::Error: Unpin,
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
        let polled = match this.prefetched.take() {
            Some(prefetched) => Poll::Ready(prefetched),
            None => Pin::new(&mut this.body).poll_frame(context),
        };
        match polled {
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
        self.unsent.is_empty() && self.prefetched.is_none() && (self.is_over || self.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match self.unsent.is_empty() && self.prefetched.is_none() {
            true => self.body.size_hint(),
            false => SizeHint::default(),
        }
    }
}

impl<B: Body<Data = Bytes>> Drop for ReplyBody<B> {
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
