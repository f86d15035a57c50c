//! The limits on a message of each method: its bytes, the counts of its repeated fields, and the time that it may take to arrive.
//!
//! The server applies these limits while a message arrives, before it is decoded. `wires.rs` and `admin_methods.rs` name the limits of
//! their methods; any other method gets the smallest limits. Look next at `message_scanner.rs`, which counts fields, and at
//! `server/request_body.rs`, which reads the messages.

use std::time::Duration;

use super::message_scanner::MessageShape;
use crate::model::limits::{MESSAGE_READ_TIMEOUT_MS, REFLECTION_BYTES, SMALL_MESSAGE_BYTES_MAX};

/// The limits of one method.
#[derive(Clone, Copy, Debug)]
pub struct MessageLimits {
    /// Largest message, in bytes without its frame header.
    pub bytes_max: usize,
    /// Whether more than one message may come. Otherwise the request must end after its one message.
    pub is_stream: bool,
    /// Longest time to arrive. For one message it runs from the headers to the end of the request; in a stream, from the first byte
    /// of each message to its last.
    pub arrival: Duration,
    /// The fields that are counted before decoding.
    pub shape: &'static MessageShape,
    /// Whether the method opens a stream that needs no credential and may stay idle.
    pub is_idle: bool,
    /// Bytes that an open stream may hold for an answer that is not taken. A unary answer is charged by its size.
    pub held_bytes: usize,
}

impl MessageLimits {
    /// The limits of a method with one request message.
    pub(super) const fn unary(bytes_max: usize, shape: &'static MessageShape) -> Self {
        let arrival = Duration::from_millis(MESSAGE_READ_TIMEOUT_MS);
        Self { bytes_max, is_stream: false, arrival, shape, is_idle: false, held_bytes: 0 }
    }
}

/// The limits of a method that no wire names: health, server reflection, and whatever does not exist.
pub(super) fn small_message_limits(path: &str) -> MessageLimits {
    let is_stream = path.starts_with("/grpc.reflection.");
    let is_idle = is_stream || path == "/grpc.health.v1.Health/Watch";
    let held_bytes = if is_stream { REFLECTION_BYTES } else { 0 };
    MessageLimits { is_stream, is_idle, held_bytes, ..MessageLimits::unary(SMALL_MESSAGE_BYTES_MAX, &UNCOUNTED_SHAPE) }
}

/// A shape in which no field is counted.
pub(super) static UNCOUNTED_SHAPE: MessageShape = MessageShape { fields: &[] };
