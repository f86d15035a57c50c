//! The body of a request on its way to the decoder: measured, counted, charged and timed as it arrives.
//!
//! The body passes on whole messages only, so that the decoder reserves no memory for bytes that may never come. A message that has
//! arrived whole by the first poll is passed on as it is: no byte is copied, no timer starts, nothing is charged. Look next at
//! `api/message_limits.rs`, which sets the limits, and at `byte_budget.rs`.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Sleep;
use tonic::Status;

use super::byte_budget::BudgetCharge;
use super::connection_registry::TrackedConnection;
use crate::api::message_limits::MessageLimits;
use crate::api::message_scanner::MessageScanner;
use crate::api::{CallRefusal, refusal_status};

/// One byte says whether the message is compressed, four give its length.
const FRAME_HEADER_BYTES: usize = 5;

/// A request's body, within the limits of its method.
pub(super) struct RequestBody<B> {
    body: B,
    limits: MessageLimits,
    connection: Arc<TrackedConnection>,
    header: [u8; FRAME_HEADER_BYTES],
    header_bytes: usize,
    message: Option<MessageProgress>,
    message_count: u64,
    /// The bytes of an incomplete message so far, with its frame header.
    buffered: BytesMut,
    unfinished: Option<Box<UnfinishedMessage>>,
    is_over: bool,
}

/// The message that is arriving.
struct MessageProgress {
    bytes: usize,
    left: usize,
    scanner: MessageScanner,
}

/// The charge and the timer of a message that was not whole on the first poll.
struct UnfinishedMessage {
    arrival: Pin<Box<Sleep>>,
    charge: BudgetCharge,
}

impl<B> RequestBody<B> {
    pub(super) fn new(body: B, limits: MessageLimits, tracked: Arc<TrackedConnection>) -> Self {
        Self {
            body,
            limits,
            connection: tracked,
            header: [0; FRAME_HEADER_BYTES],
            header_bytes: 0,
            message: None,
            message_count: 0,
            buffered: BytesMut::new(),
            unfinished: None,
            is_over: false,
        }
    }

    /// Takes bytes that arrived and returns those of whole messages.
    fn take_whole_messages(&mut self, mut data: Bytes) -> Result<Bytes, Status> {
        let whole = self.whole_message_bytes(&data)?;
        if whole == 0 {
            self.buffered.extend_from_slice(&data);
            return Ok(Bytes::new());
        }
        let rest = data.split_off(whole);
        let whole = match self.buffered.is_empty() {
            true => data,
            false => {
                self.buffered.extend_from_slice(&data);
                self.buffered.split().freeze()
            }
        };
        self.buffered.extend_from_slice(&rest);
        Ok(whole)
    }

    /// Follows frames and fields through arrived bytes; returns how many bytes belong to whole messages.
    fn whole_message_bytes(&mut self, data: &[u8]) -> Result<usize, Status> {
        let (mut bytes, mut whole) = (data, 0);
        while !bytes.is_empty() {
            match &mut self.message {
                None => bytes = self.read_frame_header(bytes)?,
                Some(message) => {
                    let (part, rest) = bytes.split_at(message.left.min(bytes.len()));
                    message.scanner.read(part).inspect_err(|_| self.connection.counters.count_malformed())?;
                    message.left -= part.len();
                    bytes = rest;
                }
            }
            if self.finish_message()? {
                whole = data.len() - bytes.len();
            }
        }
        Ok(whole)
    }

    fn read_frame_header<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], Status> {
        let free = self.header.get_mut(self.header_bytes..).unwrap_or_default();
        let (part, rest) = bytes.split_at(free.len().min(bytes.len()));
        for (slot, byte) in free.iter_mut().zip(part) {
            *slot = *byte;
        }
        self.header_bytes += part.len();
        if self.header_bytes < FRAME_HEADER_BYTES {
            return Ok(rest);
        }
        let [compressed, length @ ..] = self.header;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if compressed != 0 || (self.message_count > 0 && !self.limits.is_stream) {
            return Err(self.count_refusal(CallRefusal::NotOneMessage));
        }
        if length > self.limits.bytes_max {
            return Err(self.count_refusal(CallRefusal::TooLarge { bytes: length, bytes_max: self.limits.bytes_max }));
        }
        self.message =
            Some(MessageProgress { bytes: length, left: length, scanner: MessageScanner::new(self.limits.shape, length) });
        Ok(rest)
    }

    /// Whether the arriving message is whole now.
    fn finish_message(&mut self) -> Result<bool, Status> {
        let Some(message) = self.message.take_if(|message| message.left == 0) else { return Ok(false) };
        message.scanner.finish().inspect_err(|_| self.connection.counters.count_malformed())?;
        self.connection.add_read_bytes(message.bytes.saturating_add(message.scanner.made_bytes()));
        self.header_bytes = 0;
        self.message_count += 1;
        if self.limits.is_stream {
            self.unfinished = None;
        }
        Ok(true)
    }

    /// Nothing more has arrived: charges the incomplete message and checks its timer.
    fn charge_wait(&mut self, context: &mut Context<'_>) -> Result<(), Status> {
        let held = self.buffered.len();
        // A caller may take its time between the messages of a stream.
        if self.limits.is_stream && held == 0 {
            return Ok(());
        }
        let (arrival, account) = (self.limits.arrival, &self.connection.budget);
        let unfinished = self.unfinished.get_or_insert_with(|| {
            Box::new(UnfinishedMessage { arrival: Box::pin(tokio::time::sleep(arrival)), charge: BudgetCharge::new(account) })
        });
        let refused = match unfinished.charge.grow_to(held) {
            Err(refused) => refused,
            Ok(()) if unfinished.arrival.as_mut().poll(context).is_pending() => return Ok(()),
            Ok(()) => CallRefusal::TooSlow { after_ms: u64::try_from(arrival.as_millis()).unwrap_or(u64::MAX) },
        };
        Err(self.count_refusal(refused))
    }

    fn count_refusal(&self, refused: CallRefusal) -> Status {
        self.connection.counters.count_refusal(refused);
        refusal_status(refused)
    }

    /// Releases everything, because nothing more will be read.
    fn close(&mut self) {
        self.is_over = true;
        self.unfinished = None;
        self.buffered = BytesMut::new();
    }
}

impl<B> Body for RequestBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if this.is_over {
            return Poll::Ready(None);
        }
        let refused = loop {
            match Pin::new(&mut this.body).poll_frame(context) {
                Poll::Pending => match this.charge_wait(context) {
                    Ok(()) => return Poll::Pending,
                    Err(refused) => break refused,
                },
                Poll::Ready(Some(Ok(frame))) => match frame.into_data().map(|data| this.take_whole_messages(data)) {
                    Ok(Ok(whole)) if whole.is_empty() => {}
                    Ok(Ok(whole)) => return Poll::Ready(Some(Ok(Frame::data(whole)))),
                    Ok(Err(refused)) => break refused,
                    Err(trailers) if this.buffered.is_empty() => return Poll::Ready(Some(Ok(trailers))),
                    Err(_) => break this.count_refusal(CallRefusal::IncompleteMessage),
                },
                Poll::Ready(Some(Err(error))) => break Status::from_error(error.into()),
                Poll::Ready(None) if this.buffered.is_empty() => {
                    this.close();
                    return Poll::Ready(None);
                }
                Poll::Ready(None) => break this.count_refusal(CallRefusal::IncompleteMessage),
            }
        };
        this.close();
        Poll::Ready(Some(Err(refused)))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || (self.buffered.is_empty() && self.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
