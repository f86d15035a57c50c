//! Parses the caller's trace context strictly: the headers `traceparent` and `tracestate` of W3C Trace Context.
//!
//! A malformed header counts as absent, as the recommendation requires, because it may be an attack. The ids grant nothing; they
//! only say which trace a span joins. Look next at `spans.rs`.

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// Limit of a `tracestate`. A longer one is dropped, and the `traceparent` is kept.
const TRACESTATE_BYTES_MAX: usize = 512;
/// The recommendation's limit of list members.
const TRACESTATE_MEMBERS_MAX: usize = 32;

/// The span of the caller's trace from which a call comes (W3C Trace Context, level 1).
#[derive(Clone, Debug, PartialEq)]
pub struct TraceContext {
    span: SpanContext,
}

impl TraceContext {
    /// Parses the two headers. Returns `None` if `traceparent` is malformed; a malformed `tracestate` alone is dropped.
    pub fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let bytes = traceparent.as_bytes();
        let (version, rest) = bytes.split_at_checked(2)?;
        let version = u8::try_from(parse_hex(version)?).ok()?;
        let (trace_id, rest) = rest.strip_prefix(b"-")?.split_at_checked(32)?;
        let (span_id, rest) = rest.strip_prefix(b"-")?.split_at_checked(16)?;
        let (flags, rest) = rest.strip_prefix(b"-")?.split_at_checked(2)?;
        // Version 0 ends here. A later version may continue after another hyphen. Version 255 is forbidden.
        let ends = rest.is_empty() || (version > 0 && rest.first() == Some(&b'-'));
        if version == 0xff || !ends || rest.len() > TRACESTATE_BYTES_MAX {
            return None;
        }
        let (trace_id, span_id) = (parse_hex(trace_id)?, u64::try_from(parse_hex(span_id)?).ok()?);
        let flags = u8::try_from(parse_hex(flags)?).ok()?;
        if trace_id == 0 || span_id == 0 {
            return None;
        }
        let state = tracestate.and_then(parse_tracestate).unwrap_or_default();
        // Only the flag `sampled` has a meaning in this version.
        let flags = TraceFlags::new(flags & 1);
        Some(Self { span: SpanContext::new(TraceId::from(trace_id), SpanId::from(span_id), flags, true, state) })
    }

    /// The trace's id, for the audit record.
    pub fn trace_id(&self) -> [u8; 16] {
        self.span.trace_id().to_bytes()
    }

    /// Whether the caller samples this trace.
    pub fn is_sampled(&self) -> bool {
        self.span.is_sampled()
    }

    pub(super) fn span_context(&self) -> &SpanContext {
        &self.span
    }
}

/// Parses at most 32 lowercase hexadecimal digits.
fn parse_hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0_u128, |value, digit| match digit {
        b'0'..=b'9' => Some(value << 4 | u128::from(digit - b'0')),
        b'a'..=b'f' => Some(value << 4 | u128::from(digit - b'a' + 10)),
        _ => None,
    })
}

fn parse_tracestate(text: &str) -> Option<TraceState> {
    if text.len() > TRACESTATE_BYTES_MAX {
        return None;
    }
    let mut members: Vec<(&str, &str)> = Vec::new();
    for member in text.split(',').map(|member| member.trim_matches([' ', '\t'])).filter(|member| !member.is_empty()) {
        let (key, value) = member.split_once('=')?;
        let plain = |byte: u8| (0x20..=0x7e).contains(&byte);
        let twice = members.iter().any(|(other, _)| *other == key);
        if key.is_empty() || value.is_empty() || twice || !value.bytes().all(plain) || members.len() == TRACESTATE_MEMBERS_MAX {
            return None;
        }
        members.push((key, value));
    }
    TraceState::from_key_value(members).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn parents() {
        let check = |header: &str, expected: Option<bool>| {
            let context = TraceContext::parse(header, None);
            assert_eq!(context.as_ref().map(TraceContext::is_sampled), expected, "{header:?}");
            if let Some(context) = context {
                assert_eq!(context.span_context().trace_id().to_string(), TRACE);
                assert_eq!(context.span_context().span_id().to_string(), SPAN);
            }
        };
        check(&format!("00-{TRACE}-{SPAN}-01"), Some(true));
        check(&format!("00-{TRACE}-{SPAN}-00"), Some(false));
        check(&format!("00-{TRACE}-{SPAN}-fe"), Some(false));
        check(&format!("01-{TRACE}-{SPAN}-01"), Some(true));
        check(&format!("01-{TRACE}-{SPAN}-01-later"), Some(true));
        for bad in [
            String::new(),
            "00".to_owned(),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{TRACE}-{SPAN}-01-later"),
            format!("00-{TRACE}-{SPAN}-01 "),
            format!(" 00-{TRACE}-{SPAN}-01"),
            format!("01-{TRACE}-{SPAN}-01x"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("0g-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00_{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}{SPAN}-01"),
            format!("00-{}ü-{SPAN}-01", "a".repeat(30)),
            format!("01-{TRACE}-{SPAN}-01-{}", "x".repeat(600)),
        ] {
            check(&bad, None);
        }
    }

    #[test]
    fn states() {
        let check = |header: &str, expected: &str| {
            let context = TraceContext::parse(&format!("00-{TRACE}-{SPAN}-01"), Some(header)).unwrap();
            assert_eq!(context.span_context().trace_state().header(), expected, "{header:?}");
        };
        check("a=1", "a=1");
        check("a=1, b=2 ,,\tc@d=x", "a=1,b=2,c@d=x");
        let members = |count: usize| (0..count).map(|n| format!("k{n}=v")).collect::<Vec<_>>().join(",");
        check(&members(32), &members(32));
        for bad in ["", "a", "=1", "a=", "A=1", "a=1,a=2", "a=b=c", "a=\u{1}", &members(33), &format!("a={}", "x".repeat(600))] {
            check(bad, "");
        }
    }
}
