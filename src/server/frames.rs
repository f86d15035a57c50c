//! Counts the HTTP/2 frames of a connection that carry no call, as its bytes are read.
//!
//! The HTTP/2 library bounds most of what a peer may send, but not how often it may send `SETTINGS`, `PING`, `PRIORITY`,
//! `WINDOW_UPDATE` or frames of unknown types. A peer that sends nothing else would keep a serving thread busy. Headers, messages
//! and answers allow such frames, and time allows some more. A good peer needs far fewer.
//!
//! Only frame headers are read here. Look next at `connection.rs`, which cuts a connection beyond its allowance.

use tokio::time::Instant;

use crate::model::limits::{CONTROL_FRAMES_BURST, CONTROL_FRAMES_PER_S};

/// Length, type, flags and stream of a frame (RFC 9113, 4.1).
const HEADER_BYTES: usize = 9;
/// The types of frames that carry a call (RFC 9113, 6.1 and 6.2).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
/// Control frames that a frame with headers allows: resets, priorities, and updates of windows for a small answer.
const FRAMES_PER_CALL: u64 = 8;
/// Control frames that a frame with data allows: updates of both windows and a ping for each answer in a stream.
const FRAMES_PER_DATA: u64 = 4;
/// Bytes sent to the peer that allow one control frame. An answer to a ping is shorter.
const SENT_BYTES_PER_FRAME: u64 = 64;
/// Payload of a control frame that weighs as much as a frame. A `SETTINGS` frame may hold thousands of settings.
const PAYLOAD_BYTES_PER_FRAME: u64 = 64;

/// Follows the frames of one connection.
#[derive(Debug)]
pub(super) struct FrameMeter {
    /// Bytes of the client's preface that are still expected.
    preface_bytes_left: usize,
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    payload_bytes_left: usize,
    /// Control frames so far, beyond those that were allowed.
    frames: u64,
    sent_bytes: u64,
    /// When time was last counted.
    counted_at: Instant,
}

impl FrameMeter {
    /// A meter for a connection that begins with a preface of `preface_bytes`.
    pub(super) fn new(preface_bytes: usize) -> Self {
        Self {
            preface_bytes_left: preface_bytes,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            payload_bytes_left: 0,
            frames: 0,
            sent_bytes: 0,
            counted_at: Instant::now(),
        }
    }

    /// Notes bytes that were sent to the peer.
    pub(super) fn note_sent(&mut self, bytes: usize) {
        self.sent_bytes = self.sent_bytes.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// Follows bytes that were read. Returns `false` if the peer sent more control frames than it may.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> bool {
        let preface = self.preface_bytes_left.min(bytes.len());
        self.preface_bytes_left -= preface;
        bytes = bytes.get(preface..).unwrap_or_default();
        while !bytes.is_empty() {
            if self.payload_bytes_left > 0 {
                let skipped = self.payload_bytes_left.min(bytes.len());
                self.payload_bytes_left -= skipped;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            let free = self.header.get_mut(self.header_bytes..).unwrap_or_default();
            let (part, rest) = bytes.split_at(free.len().min(bytes.len()));
            for (slot, byte) in free.iter_mut().zip(part) {
                *slot = *byte;
            }
            self.header_bytes += part.len();
            bytes = rest;
            if self.header_bytes == HEADER_BYTES {
                self.header_bytes = 0;
                self.begin_frame();
            }
        }
        self.frames <= CONTROL_FRAMES_BURST || self.deduct_allowance()
    }

    fn begin_frame(&mut self) {
        let [high, middle, low, kind, ..] = self.header;
        let length = u32::from_be_bytes([0, high, middle, low]);
        self.payload_bytes_left = usize::try_from(length).unwrap_or(usize::MAX);
        self.frames = match kind {
            HEADERS => self.frames.saturating_sub(FRAMES_PER_CALL),
            // Empty frames carry nothing.
            DATA if length > 0 => self.frames.saturating_sub(FRAMES_PER_DATA),
            _ => self.frames.saturating_add(1 + u64::from(length) / PAYLOAD_BYTES_PER_FRAME),
        };
    }

    /// Takes off what sent bytes and time allow. Returns whether the rest is within the burst.
    fn deduct_allowance(&mut self) -> bool {
        let now = Instant::now();
        let ms = u64::try_from(now.saturating_duration_since(self.counted_at).as_millis()).unwrap_or(u64::MAX);
        let by_time = ms.saturating_mul(CONTROL_FRAMES_PER_S) / 1_000;
        if by_time > 0 {
            // The rest of a frame's time stays.
            self.counted_at = now;
        }
        let by_sent = self.sent_bytes / SENT_BYTES_PER_FRAME;
        self.sent_bytes %= SENT_BYTES_PER_FRAME;
        self.frames = self.frames.saturating_sub(by_time).saturating_sub(by_sent);
        self.frames <= CONTROL_FRAMES_BURST
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PING: u8 = 6;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let mut frame = u32::try_from(payload).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend([kind, 0, 0, 0, 0, 1]);
        frame.resize(HEADER_BYTES + payload, 7);
        frame
    }

    fn meter() -> FrameMeter {
        let mut meter = FrameMeter::new(24);
        assert!(meter.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
        meter
    }

    fn burst() -> usize {
        usize::try_from(CONTROL_FRAMES_BURST).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn frames_without_a_call_have_a_burst_and_a_rate() {
        for kind in [2, 3, 4, PING, 7, 8, 9, 77] {
            let mut meter = meter();
            assert!(meter.read(&frame(kind, 5).repeat(burst())), "{kind}");
            assert!(!meter.read(&frame(kind, 5)), "{kind}");
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(meter.read(&frame(kind, 5).repeat(99)), "{kind}");
            assert!(!meter.read(&frame(kind, 5)), "{kind}");
        }
        let mut meter = meter();
        assert!(!meter.read(&frame(4, 16 * 1024).repeat(4)), "a frame of many settings weighs more");
    }

    /// However the bytes are cut, the same frames are counted.
    #[tokio::test(start_paused = true)]
    async fn frames_are_found_in_parts_of_any_size() {
        let flood = [frame(DATA, 300), frame(PING, 8).repeat(burst())].concat();
        for size in [1, 2, 8, 9, 10, 17, 1000] {
            let mut meter = meter();
            assert!(flood.chunks(size).all(|part| meter.read(part)), "{size}");
            assert_eq!(meter.frames, CONTROL_FRAMES_BURST, "{size}");
            assert!(!meter.read(&frame(PING, 8)), "{size}");
        }
    }

    /// Calls, messages and answers allow what a good peer sends with them, for as long as it likes.
    #[tokio::test(start_paused = true)]
    async fn who_calls_is_not_cut() {
        let unary = [frame(HEADERS, 50), frame(DATA, 900), frame(8, 4), frame(8, 4), frame(PING, 8), frame(3, 4), frame(2, 5)];
        let streamed = [frame(DATA, 900), frame(8, 4), frame(8, 4), frame(PING, 8)];
        let mut meter = meter();
        for _ in 0..10 * burst() {
            assert!(meter.read(&unary.concat()) && meter.read(&streamed.concat()));
        }
        // A watcher only reads.
        for _ in 0..10 * burst() {
            meter.note_sent(200);
            assert!(meter.read(&[frame(8, 4), frame(8, 4), frame(PING, 8)].concat()));
        }
        // The answer to a ping does not pay for the ping.
        let mut pings = 0;
        while meter.read(&frame(PING, 8)) {
            meter.note_sent(HEADER_BYTES + 8);
            pings += 1;
            assert!(pings < 2 * burst());
        }
    }
}
