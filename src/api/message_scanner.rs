//! Counts the fields of a protobuf message on the wire, before anything decodes it.
//!
//! A repeated message of two bytes takes hundreds of bytes once it is decoded, so counts are checked on the bytes as they arrive.
//! The scanner keeps no byte and allocates nothing. It refuses only messages that the decoder would refuse too, or could not afford
//! to decode. Look next at `wires/portcullis_v1/message_shapes.rs`, which says
//! what is counted in which message.

use tonic::Status;

use super::status::{invalid_argument, limit_exceeded};

/// Most nested messages that are scanned: a batch, a call, a presentation.
const DEPTH_MAX: usize = 3;
/// Number of counters for one message.
const COUNTERS_MAX: usize = 2;
/// Most bytes of a varint.
const VARINT_BYTES_MAX: u32 = 10;

/// The fields of a message that are counted or scanned.
#[derive(Debug)]
pub struct MessageShape {
    pub(super) fields: &'static [FieldRule],
}

/// A field that is counted, scanned, or both.
#[derive(Debug)]
pub(super) struct FieldRule {
    pub(super) number: u64,
    /// The limit on its occurrences.
    pub(super) limit: Option<FieldLimit>,
    /// The shape of the message that it holds, if that is scanned.
    pub(super) message_shape: Option<&'static MessageShape>,
    /// The counter that each occurrence resets to zero.
    pub(super) resets_counter: Option<usize>,
}

/// Limits the occurrences of a field.
#[derive(Clone, Copy, Debug)]
pub(super) struct FieldLimit {
    /// Index of the counter.
    pub(super) counter: usize,
    /// The field's name in a refusal.
    pub(super) name: &'static str,
    pub(super) count_max: usize,
    /// Bytes that the call makes for each occurrence, beyond those of the message.
    pub(super) each_bytes: usize,
}

/// A message that is being scanned; the outermost comes first.
#[derive(Clone, Copy, Debug)]
struct NestedMessage {
    shape: &'static MessageShape,
    /// Where it ends, as a position in the outermost message.
    end: usize,
}

#[derive(Clone, Copy, Debug)]
enum ScanState {
    Tag,
    /// The value of a varint field.
    Varint,
    /// The length of a length-delimited field.
    Length {
        field: Option<&'static FieldRule>,
    },
    /// The bytes of a field that is not scanned.
    Skip {
        left: usize,
    },
}

/// Scans one message of a known length, in parts of any size.
#[derive(Clone, Debug)]
pub struct MessageScanner {
    levels: [Option<NestedMessage>; DEPTH_MAX],
    depth: usize,
    counts: [usize; COUNTERS_MAX],
    made_bytes: usize,
    state: ScanState,
    varint: u64,
    varint_bytes: u32,
    position: usize,
}

impl MessageScanner {
    /// A scanner for a message of `bytes` bytes.
    pub fn new(shape: &'static MessageShape, bytes: usize) -> Self {
        let mut levels = [None; DEPTH_MAX];
        levels[0] = Some(NestedMessage { shape, end: bytes });
        Self {
            levels,
            depth: 0,
            counts: [0; COUNTERS_MAX],
            made_bytes: 0,
            state: ScanState::Tag,
            varint: 0,
            varint_bytes: 0,
            position: 0,
        }
    }

    /// Scans the next bytes of the message.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` for a count over its limit; `INVALID_ARGUMENT` for bytes that are not a protobuf message.
    pub fn read(&mut self, mut bytes: &[u8]) -> Result<(), Status> {
        while let Some((first, rest)) = bytes.split_first() {
            if let ScanState::Skip { left } = self.state {
                let taken = left.min(bytes.len());
                bytes = bytes.get(taken..).unwrap_or_default();
                self.position += taken;
                self.state = ScanState::Skip { left: left - taken };
                if left == taken {
                    self.end_field();
                }
                continue;
            }
            bytes = rest;
            self.position += 1;
            if self.position > self.message_end() {
                return Err(malformed("a field goes past the end of its message"));
            }
            let Some(value) = self.read_varint_byte(*first)? else { continue };
            self.handle_value(value)?;
        }
        Ok(())
    }

    /// Checks that the message is complete. Call it once all bytes were read.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` if the message ends within a field.
    pub fn finish(&self) -> Result<(), Status> {
        match (self.state, self.varint_bytes) {
            (ScanState::Tag, 0) => Ok(()),
            _ => Err(malformed("it ends within a field")),
        }
    }

    /// Bytes that the call makes for the counted fields, beyond those of the message.
    pub fn made_bytes(&self) -> usize {
        self.made_bytes
    }

    fn handle_value(&mut self, value: u64) -> Result<(), Status> {
        match self.state {
            ScanState::Tag => self.handle_tag(value),
            ScanState::Varint => {
                self.end_field();
                Ok(())
            }
            ScanState::Length { field } => self.handle_length(field, value),
            ScanState::Skip { .. } => Ok(()),
        }
    }

    fn handle_tag(&mut self, tag: u64) -> Result<(), Status> {
        let (number, kind) = (tag >> 3, tag & 7);
        if number == 0 || tag > u64::from(u32::MAX) {
            return Err(malformed("a field has no valid number"));
        }
        let shape = self.levels.get(self.depth).copied().flatten().map(|level| level.shape);
        let field = shape.and_then(|shape| shape.fields.iter().find(|field| field.number == number));
        match kind {
            0 => self.state = ScanState::Varint,
            1 => return self.skip_bytes(8),
            2 => self.state = ScanState::Length { field },
            5 => return self.skip_bytes(4),
            // Groups: no message of this API has any, and the fields in a group could not be counted.
            _ => return Err(malformed("a field has a type that no message here has")),
        }
        Ok(())
    }

    fn handle_length(&mut self, field: Option<&'static FieldRule>, length: u64) -> Result<(), Status> {
        let Some(field) = field else { return self.skip_bytes(length) };
        if let Some(counted) = field.limit
            && let Some(count) = self.counts.get_mut(counted.counter)
        {
            *count += 1;
            self.made_bytes = self.made_bytes.saturating_add(counted.each_bytes);
            if *count > counted.count_max {
                return Err(limit_exceeded(counted.name, *count, counted.count_max));
            }
        }
        if let Some(count) = field.resets_counter.and_then(|counter| self.counts.get_mut(counter)) {
            *count = 0;
        }
        match field.message_shape {
            Some(shape) => self.enter_message(shape, length),
            None => self.skip_bytes(length),
        }
    }

    fn enter_message(&mut self, shape: &'static MessageShape, length: u64) -> Result<(), Status> {
        let end = self.field_end(length)?;
        self.state = ScanState::Tag;
        self.depth += 1;
        match self.levels.get_mut(self.depth) {
            Some(level) => *level = Some(NestedMessage { shape, end }),
            None => return Err(malformed("it is nested too deep")),
        }
        self.leave_finished_messages();
        Ok(())
    }

    fn skip_bytes(&mut self, length: u64) -> Result<(), Status> {
        let end = self.field_end(length)?;
        match end - self.position {
            0 => self.end_field(),
            left => self.state = ScanState::Skip { left },
        }
        Ok(())
    }

    fn end_field(&mut self) {
        self.state = ScanState::Tag;
        self.leave_finished_messages();
    }

    fn leave_finished_messages(&mut self) {
        while self.depth > 0 && self.position == self.message_end() {
            self.depth -= 1;
        }
    }

    fn message_end(&self) -> usize {
        self.levels.get(self.depth).copied().flatten().map_or(0, |level| level.end)
    }

    fn field_end(&self, length: u64) -> Result<usize, Status> {
        let end = usize::try_from(length).ok().and_then(|length| self.position.checked_add(length));
        end.filter(|end| *end <= self.message_end()).ok_or_else(|| malformed("a field goes past the end of its message"))
    }

    /// Adds a byte to the current varint; returns the number if the byte was its last.
    fn read_varint_byte(&mut self, byte: u8) -> Result<Option<u64>, Status> {
        if self.varint_bytes == VARINT_BYTES_MAX {
            return Err(malformed("a number has more than ten bytes"));
        }
        self.varint |= u64::from(byte & 0x7f).checked_shl(7 * self.varint_bytes).unwrap_or(0);
        self.varint_bytes += 1;
        if byte & 0x80 != 0 {
            return Ok(None);
        }
        let value = std::mem::take(&mut self.varint);
        self.varint_bytes = 0;
        Ok(Some(value))
    }
}

fn malformed(what: &str) -> Status {
    invalid_argument("message", format!("is no protobuf message: {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;
    use tonic::Code;

    use super::super::r#gen as wire;
    use super::super::wires::portcullis_v1::message_shapes::{
        CHECK_BATCH_REQUEST_SHAPE, CHECK_REQUEST_SHAPE, LIST_TOOLS_REQUEST_SHAPE,
    };
    use super::*;

    fn scan(shape: &'static MessageShape, bytes: &[u8], part: usize) -> Result<(), Status> {
        let mut scanner = MessageScanner::new(shape, bytes.len());
        bytes.chunks(part.max(1)).try_for_each(|part| scanner.read(part))?;
        scanner.finish()
    }

    fn call(tokens: usize) -> wire::CheckRequest {
        let presentation =
            wire::Presentation { aat_chain: vec![vec![b'x'; 300].into(); tokens], aat_pop: vec![b'y'; 200].into() };
        wire::CheckRequest {
            request_id: "r".to_owned(),
            credential: Some(wire::check_request::Credential::Presentation(presentation)),
            tool: "crm/read".to_owned(),
            arguments_json: vec![b' '; 1000].into(),
            want_handle: true,
            ..Default::default()
        }
    }

    fn check(shape: &'static MessageShape, bytes: &[u8], expected: Option<(Code, &str)>) {
        for part in [1, 2, 7, 4096, usize::MAX] {
            let scanned = scan(shape, bytes, part).map_err(|status| (status.code(), status.message().to_owned()));
            match (&scanned, expected) {
                (Ok(()), None) => {}
                (Err((code, message)), Some((expected, says))) => {
                    assert_eq!(*code, expected, "{message}");
                    assert!(message.contains(says), "{message}");
                }
                _ => panic!("{scanned:?}, not {expected:?}, in parts of {part}"),
            }
        }
    }

    #[test]
    fn counts_are_checked_on_the_wire() {
        let over = |says| Some((Code::ResourceExhausted, says));
        check(&CHECK_REQUEST_SHAPE, &[], None);
        check(&CHECK_REQUEST_SHAPE, &call(1).encode_to_vec(), None);
        check(&CHECK_REQUEST_SHAPE, &call(72).encode_to_vec(), None);
        check(&CHECK_REQUEST_SHAPE, &call(73).encode_to_vec(), over("presentation.aat_chain: 73 is over the limit of 72"));
        let batch = |calls: usize, tokens| wire::CheckBatchRequest { requests: vec![call(tokens); calls] }.encode_to_vec();
        check(&CHECK_BATCH_REQUEST_SHAPE, &batch(128, 9), None);
        check(&CHECK_BATCH_REQUEST_SHAPE, &batch(3, 72), None);
        check(&CHECK_BATCH_REQUEST_SHAPE, &batch(1, 73), over("aat_chain"));
        check(&CHECK_BATCH_REQUEST_SHAPE, &batch(129, 0), over("requests: 129 is over the limit of 128"));
        check(&CHECK_BATCH_REQUEST_SHAPE, &[0x0a, 0].repeat(2_000_000), over("requests: 129 is over the limit of 128"));
        // A second presentation in one message adds to the counts of the first.
        check(&CHECK_REQUEST_SHAPE, &call(40).encode_to_vec().repeat(2), over("aat_chain"));
        let tools = |count| wire::ListToolsRequest { tools: vec![String::new(); count], ..Default::default() }.encode_to_vec();
        check(&LIST_TOOLS_REQUEST_SHAPE, &tools(10_000), None);
        check(&LIST_TOOLS_REQUEST_SHAPE, &tools(10_001), over("tools: 10001 is over the limit of 10000"));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let malformed = |says| Some((Code::InvalidArgument, says));
        check(&CHECK_REQUEST_SHAPE, &[0x0a], malformed("it ends within a field"));
        check(&CHECK_REQUEST_SHAPE, &[0x0a, 5, b'x'], malformed("past the end"));
        check(&CHECK_REQUEST_SHAPE, &[0x80], malformed("it ends within a field"));
        check(&CHECK_REQUEST_SHAPE, &[0x58], malformed("it ends within a field"));
        check(&CHECK_REQUEST_SHAPE, &[0xff; 11], malformed("more than ten bytes"));
        check(&CHECK_REQUEST_SHAPE, &[0x00, 0x00], malformed("no valid number"));
        check(&CHECK_REQUEST_SHAPE, &[0x0b, 0x0c], malformed("a type that no message here has"));
        // A presentation of three bytes that holds a token of four.
        check(&CHECK_REQUEST_SHAPE, &[0x12, 3, 0x0a, 4, b'x', b'x', b'x', b'x'], malformed("past the end"));
        // A presentation with a varint that continues past its end.
        check(&CHECK_REQUEST_SHAPE, &[0x12, 2, 0x18, 0x80, 0x00], malformed("past the end"));
    }

    proptest! {
        /// The scanner accepts each message that the decoder accepts, unless a count is over its limit or it holds a group.
        #[test]
        fn agrees_with_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..64), part in 1usize..9) {
            let decoded = wire::CheckRequest::decode(&bytes[..]);
            let scanned = scan(&CHECK_REQUEST_SHAPE, &bytes, part);
            if let (Ok(_), Err(status)) = (&decoded, &scanned) {
                prop_assert!(status.message().contains("a type that no message here has"), "{status:?}");
            }
        }

        /// The counts do not depend on how the message is split into parts.
        #[test]
        fn counts_what_is_decoded(tokens in 0usize..100, calls in 0usize..140, part in 1usize..5000) {
            let bytes = wire::CheckBatchRequest { requests: vec![call(tokens); calls] }.encode_to_vec();
            prop_assert_eq!(scan(&CHECK_BATCH_REQUEST_SHAPE, &bytes, part).is_ok(), calls <= 128 && (tokens <= 72 || calls == 0));
        }
    }
}
