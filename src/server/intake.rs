//! The body of a request on its way to the decoder: measured, counted, charged and timed as it arrives.
//!
//! The body passes on whole messages only, so that the decoder reserves no memory for bytes that may never come. A message that has
//! arrived whole by the first poll is passed on as it is: no byte is copied, no timer starts, nothing is charged. Look next at
//! `api/message.rs`, which sets the limits, and at `budget.rs`.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Sleep;
use tonic::Status;

use super::budget::Charge;
use super::registry::Tracked;
use crate::api::message::MessageLimits;
use crate::api::scan::Scanner;
use crate::api::{Refusal, refusal};

/// One byte says whether the message is compressed, four give its length.
const FRAME_HEADER_BYTES: usize = 5;

/// A request's body, within the limits of its method.
pub(super) struct Intake<B> {
    body: B,
    limits: MessageLimits,
    tracked: Arc<Tracked>,
    header: [u8; FRAME_HEADER_BYTES],
    header_bytes: usize,
    message: Option<Message>,
    messages: u64,
    /// The bytes of an incomplete message so far, with its frame header.
    held: BytesMut,
    unfinished: Option<Box<Unfinished>>,
    is_over: bool,
}

/// The message that is arriving.
struct Message {
    bytes: usize,
    left: usize,
    scanner: Scanner,
}

/// The charge and the timer of a message that was not whole on the first poll.
struct Unfinished {
    arrival: Pin<Box<Sleep>>,
    charge: Charge,
}

impl<B> Intake<B> {
    pub(super) fn new(body: B, limits: MessageLimits, tracked: Arc<Tracked>) -> Self {
        Self {
            body,
            limits,
            tracked,
            header: [0; FRAME_HEADER_BYTES],
            header_bytes: 0,
            message: None,
            messages: 0,
            held: BytesMut::new(),
            unfinished: None,
            is_over: false,
        }
    }

    /// Takes bytes that arrived and returns those of whole messages.
    fn read(&mut self, mut data: Bytes) -> Result<Bytes, Status> {
        let whole = self.measure(&data)?;
        if whole == 0 {
            self.held.extend_from_slice(&data);
            return Ok(Bytes::new());
        }
        let rest = data.split_off(whole);
        let whole = match self.held.is_empty() {
            true => data,
            false => {
                self.held.extend_from_slice(&data);
                self.held.split().freeze()
            }
        };
        self.held.extend_from_slice(&rest);
        Ok(whole)
    }

    /// Follows frames and fields through arrived bytes; returns how many bytes belong to whole messages.
    fn measure(&mut self, data: &[u8]) -> Result<usize, Status> {
        let (mut bytes, mut whole) = (data, 0);
        while !bytes.is_empty() {
            match &mut self.message {
                None => bytes = self.read_header(bytes)?,
                Some(message) => {
                    let (part, rest) = bytes.split_at(message.left.min(bytes.len()));
                    message.scanner.read(part).inspect_err(|_| self.tracked.counters.count_malformed())?;
                    message.left -= part.len();
                    bytes = rest;
                }
            }
            if self.end_message()? {
                whole = data.len() - bytes.len();
            }
        }
        Ok(whole)
    }

    fn read_header<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], Status> {
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
        if compressed != 0 || (self.messages > 0 && !self.limits.is_stream) {
            return Err(self.refused(Refusal::NotOne));
        }
        if length > self.limits.bytes_max {
            return Err(self.refused(Refusal::TooLarge { bytes: length, bytes_max: self.limits.bytes_max }));
        }
        self.message = Some(Message { bytes: length, left: length, scanner: Scanner::new(self.limits.shape, length) });
        Ok(rest)
    }

    /// Whether the arriving message is whole now.
    fn end_message(&mut self) -> Result<bool, Status> {
        let Some(message) = self.message.take_if(|message| message.left == 0) else { return Ok(false) };
        message.scanner.finish().inspect_err(|_| self.tracked.counters.count_malformed())?;
        self.tracked.note_read(message.bytes);
        self.header_bytes = 0;
        self.messages += 1;
        if self.limits.is_stream {
            self.unfinished = None;
        }
        Ok(true)
    }

    /// Nothing more has arrived: charges the incomplete message and checks its timer.
    fn wait(&mut self, context: &mut Context<'_>) -> Result<(), Status> {
        let held = self.held.len();
        // A caller may take its time between the messages of a stream.
        if self.limits.is_stream && held == 0 {
            return Ok(());
        }
        let (arrival, account) = (self.limits.arrival, &self.tracked.account);
        let unfinished = self.unfinished.get_or_insert_with(|| {
            Box::new(Unfinished { arrival: Box::pin(tokio::time::sleep(arrival)), charge: Charge::new(account) })
        });
        let refused = match unfinished.charge.grow_to(held) {
            Err(refused) => refused,
            Ok(()) if unfinished.arrival.as_mut().poll(context).is_pending() => return Ok(()),
            Ok(()) => Refusal::TooSlow { after_ms: u64::try_from(arrival.as_millis()).unwrap_or(u64::MAX) },
        };
        Err(self.refused(refused))
    }

    fn refused(&self, refused: Refusal) -> Status {
        self.tracked.counters.count_refusal(refused);
        refusal(refused)
    }

    /// Releases everything, because nothing more will be read.
    fn end(&mut self) {
        self.is_over = true;
        self.unfinished = None;
        self.held = BytesMut::new();
    }
}

impl<B> Body for Intake<B>
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
                Poll::Pending => match this.wait(context) {
                    Ok(()) => return Poll::Pending,
                    Err(refused) => break refused,
                },
                Poll::Ready(Some(Ok(frame))) => match frame.into_data().map(|data| this.read(data)) {
                    Ok(Ok(whole)) if whole.is_empty() => {}
                    Ok(Ok(whole)) => return Poll::Ready(Some(Ok(Frame::data(whole)))),
                    Ok(Err(refused)) => break refused,
                    Err(trailers) if this.held.is_empty() => return Poll::Ready(Some(Ok(trailers))),
                    Err(_) => break this.refused(Refusal::NotWhole),
                },
                Poll::Ready(Some(Err(error))) => break Status::from_error(error.into()),
                Poll::Ready(None) if this.held.is_empty() => {
                    this.end();
                    return Poll::Ready(None);
                }
                Poll::Ready(None) => break this.refused(Refusal::NotWhole),
            }
        };
        this.end();
        Poll::Ready(Some(Err(refused)))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || (self.held.is_empty() && self.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
