//! Writes JSON directly into a byte buffer, because a record is made for every decision.
//!
//! Nothing here allocates beyond the given buffer. Text from outside cannot break out of its line: quotes, backslashes and all
//! control characters are escaped. Look next at `record.rs`, which defines the content.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Appends a string as JSON, in quotes.
pub(super) fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    // Without an early exit the compiler checks many bytes at once; nearly every string needs no escape.
    let special = text.bytes().fold(false, |found, byte| found | must_escape(byte));
    if special {
        write_escaped(out, text);
    } else {
        out.extend_from_slice(text.as_bytes());
    }
    out.push(b'"');
}

/// Appends `"name":`, after a comma unless it is the first member of its object. Names are the program's own and need no escape.
pub(super) fn write_name(out: &mut Vec<u8>, name: &str) {
    if !matches!(out.last(), Some(b'{' | b'[')) {
        out.push(b',');
    }
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

/// Appends a member whose value is a string.
pub(super) fn write_text_member(out: &mut Vec<u8>, member: &str, text: &str) {
    write_name(out, member);
    write_string(out, text);
}

/// Appends a member whose value is a string, if there is one.
pub(super) fn write_optional_member(out: &mut Vec<u8>, member: &str, text: Option<&str>) {
    if let Some(text) = text {
        write_text_member(out, member, text);
    }
}

/// The beginning of a text, at most `bytes_max` bytes.
pub(super) fn truncate_text(text: &str, bytes_max: usize) -> &str {
    text.get(..text.floor_char_boundary(bytes_max)).unwrap_or_default()
}

/// Appends a member whose value is a string, cut to at most `bytes_max` bytes. A cut string ends with `…`.
pub(super) fn write_truncated_member(out: &mut Vec<u8>, member: &str, text: &str, bytes_max: usize) {
    let kept = truncate_text(text, bytes_max);
    write_text_member(out, member, kept);
    if kept.len() < text.len() {
        // The ellipsis belongs inside the quotes.
        out.pop();
        out.extend_from_slice("…\"".as_bytes());
    }
}

/// Appends a member whose value is a whole number.
pub(super) fn write_number_member(out: &mut Vec<u8>, member: &str, value: impl Into<i128>) {
    write_name(out, member);
    write_number(out, value.into());
}

/// Appends a member whose value is a list of strings.
pub(super) fn write_list_member(out: &mut Vec<u8>, member: &str, items: &[String]) {
    write_name(out, member);
    out.push(b'[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_string(out, item);
    }
    out.push(b']');
}

/// Appends a whole number.
pub(super) fn write_number(out: &mut Vec<u8>, value: i128) {
    if value < 0 {
        out.push(b'-');
    }
    // Values come from 64-bit fields, so the cheaper 64-bit division suffices; a larger value would be capped.
    let mut rest = u64::try_from(value.unsigned_abs()).unwrap_or(u64::MAX);
    let mut digits = [b'0'; 20];
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        // The remainder of a division by ten fits into a byte.
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        used += 1;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(digits.len() - used..).unwrap_or_default());
}

/// Appends 32 bytes as base64url without padding, in quotes.
pub(super) fn write_digest(out: &mut Vec<u8>, bytes: &[u8; 32]) {
    let mut encoded = [0; 43];
    // INVARIANT: 32 bytes are 43 characters, so this cannot fail.
    let written = URL_SAFE_NO_PAD.encode_slice(bytes, &mut encoded).unwrap_or(0);
    out.push(b'"');
    out.extend_from_slice(encoded.get(..written).unwrap_or_default());
    out.push(b'"');
}

/// Appends bytes as lowercase hexadecimal digits, in quotes.
pub(super) fn write_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    for byte in bytes {
        out.push(hex_digit(byte >> 4));
        out.push(hex_digit(byte & 15));
    }
    out.push(b'"');
}

fn must_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\' || byte == 0x7f
}

fn write_escaped(out: &mut Vec<u8>, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            control if must_escape(control) => {
                out.extend_from_slice(b"\\u00");
                out.push(hex_digit(control >> 4));
                out.push(hex_digit(control & 15));
            }
            plain => out.push(plain),
        }
    }
}

fn hex_digit(value: u8) -> u8 {
    if value < 10 { b'0' + value } else { b'a' + (value - 10) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn strings_say_the_same_to_a_json_parser_and_stay_on_their_line() {
        let every_byte: String = (0..=0x7f_u8).map(char::from).collect();
        for text in ["", "plain", "a\"b\\c", "\n\r\t\u{0}\u{1f}\u{7f}", "ü\u{2028}𝕏\u{10ffff}", &every_byte] {
            let json = written(|out| write_string(out, text));
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
            assert!(!json.bytes().any(|byte| byte < 0x20 || byte == 0x7f), "{json:?}");
        }
    }

    #[test]
    fn numbers_are_whole_and_exact() {
        for value in [0, 7, 10, -1, i128::from(i64::MIN), i128::from(i64::MAX), i128::from(u64::MAX)] {
            assert_eq!(written(|out| write_number(out, value)), value.to_string());
        }
    }

    #[test]
    fn bytes_are_base64url_or_hexadecimal() {
        assert_eq!(written(|out| write_digest(out, &[0xff; 32])), format!("\"{}\"", URL_SAFE_NO_PAD.encode([0xff; 32])));
        assert_eq!(written(|out| write_hex(out, &[0x00, 0xab, 0x9f])), "\"00ab9f\"");
    }
}
