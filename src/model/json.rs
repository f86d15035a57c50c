//! A strict JSON parser with limits, and the canonical form (RFC 8785, JCS).
//!
//! It is stricter than most parsers. It refuses duplicate members, because two readers must never see two different calls in the same
//! bytes. It distinguishes integers from fractions and exponents, because a date written as `1.7e9` must be refused.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::limits::JSON_NESTING_MAX;

/// The largest integer that every JSON reader holds exactly: 2^53 - 1 (RFC 7493, section 2.2).
pub const SAFE_INTEGER_MAX: f64 = 9_007_199_254_740_991.0;

/// Why the bytes are not the expected JSON. One line, with line and column if the parser knows them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    /// Whether the value was refused because of its nesting, which exceeds a limit and is not a fault of form.
    pub fn is_too_nested(&self) -> bool {
        self.0.starts_with(TOO_NESTED_PREFIX)
    }
}

/// Prefix of messages about nesting. No other message of this module or of the parser begins with it.
const TOO_NESTED_PREFIX: &str = "nested deeper than";

/// A JSON value without duplicate members.
#[derive(Clone, Debug)]
pub enum Value {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A finite number.
    Number(JsonNumber),
    /// A string.
    String(String),
    /// A list.
    Array(Vec<Value>),
    /// An object.
    Object(JsonObject),
}

/// A finite number, with the form in which it was written.
#[derive(Clone, Copy, Debug)]
pub struct JsonNumber {
    value: f64,
    form: NumberForm,
}

/// The form in which a number was written.
#[derive(Clone, Copy, Debug)]
enum NumberForm {
    /// No fraction and no exponent, and it fits.
    Integer(i64),
    /// Any other form that a double keeps.
    Decimal,
    /// A decimal that differs from the shortest decimal of its double, so that two readers may read different numbers.
    Rounded,
}

impl JsonNumber {
    /// The number that a decimal text writes, whose nearest double is `value`.
    pub fn from_decimal(text: &str, value: f64) -> Self {
        Self { value, form: if round_trips(text, value) { NumberForm::Decimal } else { NumberForm::Rounded } }
    }

    /// The value as a double.
    pub fn as_f64(self) -> f64 {
        self.value
    }

    /// The value, if it was written as an integer (no fraction, no exponent) and fits.
    pub fn as_i64(self) -> Option<i64> {
        if let NumberForm::Integer(integer) = self.form { Some(integer) } else { None }
    }

    /// Whether the number can be compared without loss: its magnitude is at most 2^53 - 1, and a double keeps every digit.
    ///
    /// Every larger double is an integer, so the first rule refuses exactly the integers that two readers may read differently. The second
    /// rule refuses decimals such as `15.0000000000000001`: it is 15 for a reader of doubles, and more than 15 for a reader of decimals.
    pub fn is_comparable(self) -> bool {
        self.value.abs() <= SAFE_INTEGER_MAX && !matches!(self.form, NumberForm::Rounded)
    }
}

impl From<f64> for JsonNumber {
    fn from(value: f64) -> Self {
        Self { value, form: NumberForm::Decimal }
    }
}

impl From<i64> for JsonNumber {
    fn from(integer: i64) -> Self {
        Self { value: integer as f64, form: NumberForm::Integer(integer) }
    }
}

/// Numbers compare by value: 100.0 equals 100, and -0 equals 0.
impl PartialEq for JsonNumber {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

/// The members of an object, in the order written. Equality ignores the order.
#[derive(Clone, Debug, Default)]
pub struct JsonObject {
    members: Vec<(String, Value)>,
}

impl JsonObject {
    /// An object of these members. A later member of the same name is dropped.
    pub fn from_members(members: impl IntoIterator<Item = (String, Value)>) -> Self {
        let mut object = Self::default();
        for (name, value) in members {
            if object.member(&name).is_none() {
                object.members.push((name, value));
            }
        }
        object
    }

    /// The value of a member.
    pub fn member(&self, name: &str) -> Option<&Value> {
        self.members.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Bytes on the heap. `of` gives the size of each value.
    pub(crate) fn heap_bytes(&self, of: impl Fn(&Value) -> usize) -> usize {
        let members = self.members.iter().map(|(name, value)| name.capacity() + of(value));
        self.members.capacity() * size_of::<(String, Value)>() + members.sum::<usize>()
    }

    /// The members, in the order written.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.members.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// The number of members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

impl PartialEq for JsonObject {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().all(|(name, value)| other.member(name) == Some(value))
    }
}

/// Two values are equal if their canonical forms are equal.
impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Value::Null, Value::Null) => true,
            (Value::Bool(a), Value::Bool(b)) => a == b,
            (Value::Number(a), Value::Number(b)) => a == b,
            (Value::String(a), Value::String(b)) => a == b,
            (Value::Array(a), Value::Array(b)) => a == b,
            (Value::Object(a), Value::Object(b)) => a == b,
            _ => false,
        }
    }
}

impl Value {
    /// The string; `None` for another type.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(text) = self { Some(text) } else { None }
    }

    /// The integer; `None` for another type and for a number that was not written as an integer.
    pub fn as_i64(&self) -> Option<i64> {
        if let Value::Number(number) = self { number.as_i64() } else { None }
    }

    /// The truth value; `None` for another type.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(value) = self { Some(*value) } else { None }
    }

    /// The object; `None` for another type.
    pub fn as_object(&self) -> Option<&JsonObject> {
        if let Value::Object(object) = self { Some(object) } else { None }
    }

    /// The list; `None` for another type.
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Value::Array(items) = self { Some(items) } else { None }
    }

    /// Whether it is a string, a number, a truth value or null.
    pub fn is_scalar(&self) -> bool {
        !matches!(self, Value::Array(_) | Value::Object(_))
    }

    /// Whether every number in the value can be compared without loss ([`JsonNumber::is_comparable`]).
    pub fn is_comparable(&self) -> bool {
        match self {
            Value::Number(number) => number.is_comparable(),
            Value::Array(items) => items.iter().all(Value::is_comparable),
            Value::Object(object) => object.iter().all(|(_, value)| value.is_comparable()),
            _ => true,
        }
    }

    /// The canonical form (RFC 8785).
    pub fn to_jcs(&self) -> String {
        let mut out = String::new();
        self.write_jcs(&mut out);
        out
    }

    /// Appends the canonical form.
    pub fn write_jcs(&self, out: &mut String) {
        match self {
            Value::Null => out.push_str("null"),
            Value::Bool(true) => out.push_str("true"),
            Value::Bool(false) => out.push_str("false"),
            Value::Number(number) => out.push_str(ryu_js::Buffer::new().format(number.value)),
            Value::String(text) => write_string(text, out),
            Value::Array(items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    item.write_jcs(out);
                }
                out.push(']');
            }
            Value::Object(object) => object.write_jcs(out),
        }
    }
}

impl JsonObject {
    /// Appends the canonical form: members sorted by their UTF-16 code units.
    pub fn write_jcs(&self, out: &mut String) {
        let mut members: Vec<_> = self.iter().collect();
        members.sort_by(|(a, _), (b, _)| a.encode_utf16().cmp(b.encode_utf16()));
        out.push('{');
        for (index, (name, value)) in members.into_iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            write_string(name, out);
            out.push(':');
            value.write_jcs(out);
        }
        out.push('}');
    }
}

/// Appends a string as JSON with the escapes of RFC 8785, section 3.2.2.2.
pub fn write_string(text: &str, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\u{c}' => out.push_str("\\f"),
            '\r' => out.push_str("\\r"),
            control if control < ' ' => {
                out.push_str("\\u00");
                for nibble in [control as u32 >> 4, control as u32 & 15] {
                    out.push(char::from_digit(nibble, 16).unwrap_or('0'));
                }
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

/// Parses exactly one JSON value.
///
/// # Errors
/// Refuses bytes that are not JSON in UTF-8, duplicate members at any depth, numbers beyond a double, and nesting deeper than
/// [`JSON_NESTING_MAX`]. The caller limits the size.
pub fn parse(bytes: &[u8]) -> Result<Value, Error> {
    let decimals = Cell::new(false);
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let seed = ValueSeed { depth: 0, decimals: &decimals };
    let mut value = seed.deserialize(&mut reader).map_err(|error| Error(error.to_string()))?;
    reader.end().map_err(|error| Error(error.to_string()))?;
    if decimals.get() {
        mark_rounded(&mut value, &mut NumberTexts { rest: bytes });
    }
    Ok(value)
}

/// Marks the decimals that a double does not keep. `texts` yields the text of each number, in the order of the numbers in the value.
fn mark_rounded(value: &mut Value, texts: &mut NumberTexts<'_>) {
    match value {
        Value::Number(number) => {
            if let Some(text) = texts.next()
                && matches!(number.form, NumberForm::Decimal)
            {
                *number = JsonNumber::from_decimal(text, number.value);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| mark_rounded(item, texts)),
        Value::Object(object) => object.members.iter_mut().for_each(|(_, value)| mark_rounded(value, texts)),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// The texts of the numbers in valid JSON, in order.
struct NumberTexts<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for NumberTexts<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        loop {
            let (first, rest) = self.rest.split_first()?;
            match first {
                b'"' => self.rest = after_string(rest),
                b'-' | b'0'..=b'9' => {
                    let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
                    let end = self.rest.iter().position(|byte| !is_part(byte)).unwrap_or(self.rest.len());
                    let (number, rest) = self.rest.split_at(end);
                    self.rest = rest;
                    return std::str::from_utf8(number).ok();
                }
                _ => self.rest = rest,
            }
        }
    }
}

/// The bytes after the closing quote of a string.
fn after_string(mut rest: &[u8]) -> &[u8] {
    while let Some((byte, after)) = rest.split_first() {
        match byte {
            b'"' => return after,
            b'\\' => rest = after.get(1..).unwrap_or_default(),
            _ => rest = after,
        }
    }
    rest
}

/// Whether a decimal text denotes exactly the shortest decimal of its nearest double.
fn round_trips(text: &str, value: f64) -> bool {
    /// The number of significant digits that every double keeps, and an exponent that is within the range of all normal doubles.
    const DIGITS_KEPT: usize = 15;
    const EXPONENT_KEPT: i64 = 290;
    let written = Decimal::of(text);
    let is_surely_kept = written.digits <= DIGITS_KEPT && written.exponent.abs() <= EXPONENT_KEPT;
    is_surely_kept || written.is_equal(&Decimal::of(ryu_js::Buffer::new().format(value)))
}

/// The magnitude of a decimal text: its significant digits, and the power of ten of the point before them.
struct Decimal<'a> {
    mantissa: &'a str,
    /// Zeros before the significant digits.
    zeros: usize,
    /// Number of significant digits; 0 for zero.
    digits: usize,
    exponent: i64,
}

impl<'a> Decimal<'a> {
    fn of(text: &'a str) -> Self {
        let text = text.trim_start_matches(['+', '-']);
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        // An exponent that does not fit is farther away than any double.
        let far = if exponent.starts_with('-') { i64::MIN / 2 } else { i64::MAX / 2 };
        let exponent = exponent.parse::<i64>().unwrap_or(far).clamp(i64::MIN / 2, i64::MAX / 2);
        let whole = mantissa.find('.').unwrap_or(mantissa.len());
        let digits = || mantissa.bytes().filter(|byte| *byte != b'.');
        let zeros = digits().take_while(|digit| *digit == b'0').count();
        let trailing = digits().rev().take_while(|digit| *digit == b'0').count();
        let digits = digits().count().saturating_sub(zeros).saturating_sub(trailing);
        let point = i64::try_from(whole).unwrap_or(i64::MAX / 4) - i64::try_from(zeros).unwrap_or(i64::MAX / 4);
        let exponent = if digits == 0 { 0 } else { exponent.saturating_add(point) };
        Self { mantissa, zeros, digits, exponent }
    }

    fn is_equal(&self, other: &Decimal<'_>) -> bool {
        self.exponent == other.exponent && self.significant().eq(other.significant())
    }

    fn significant(&self) -> impl Iterator<Item = u8> {
        self.mantissa.bytes().filter(|byte| *byte != b'.').skip(self.zeros).take(self.digits)
    }
}

/// Parses exactly one JSON object.
///
/// # Errors
/// As [`parse`], and for any other JSON value.
pub fn parse_object(bytes: &[u8]) -> Result<JsonObject, Error> {
    match parse(bytes)? {
        Value::Object(object) => Ok(object),
        _ => Err(Error("expected one JSON object".to_owned())),
    }
}

#[derive(Clone, Copy)]
struct ValueSeed<'a> {
    depth: usize,
    /// Set if a number was written with a fraction or an exponent.
    decimals: &'a Cell<bool>,
}

impl ValueSeed<'_> {
    fn descend<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth >= JSON_NESTING_MAX {
            return Err(E::custom(format_args!("{TOO_NESTED_PREFIX} {JSON_NESTING_MAX}")));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(i64::try_from(value).map_or_else(|_| (value as f64).into(), JsonNumber::from)))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        self.decimals.set(true);
        if value.is_finite() { Ok(Value::Number(value.into())) } else { Err(E::custom("a number is not finite")) }
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let seed = self.descend()?;
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(seed)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        const SCAN_MEMBERS_MAX: usize = 16;
        let seed = self.descend()?;
        let mut object = JsonObject::default();
        let mut seen: HashSet<String> = HashSet::new();
        while let Some(name) = access.next_key::<String>()? {
            // Up to 16 members are scanned. More members, which only an attacker sends, are hashed, because scanning them would take
            // quadratic time.
            if object.len() == SCAN_MEMBERS_MAX {
                seen = object.iter().map(|(name, _)| name.to_owned()).collect();
            }
            let duplicate =
                if object.len() < SCAN_MEMBERS_MAX { object.member(&name).is_some() } else { !seen.insert(name.clone()) };
            if duplicate {
                return Err(A::Error::custom(format_args!("duplicate member `{name}`")));
            }
            let value = access.next_value_seed(seed)?;
            object.members.push((name, value));
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jcs(text: &str) -> String {
        parse(text.as_bytes()).unwrap().to_jcs()
    }

    #[test]
    fn canonical_form() {
        for (text, expected) in [
            (r#" { "b" : 1.0 , "a" : [ true , null , "x" ] } "#, r#"{"a":[true,null,"x"],"b":1}"#),
            ("[1e2,-0,-0.0,0.1,1e21,1e-7,333333333.33333329,4.50,2e-3]", "[100,0,0,0.1,1e+21,1e-7,333333333.3333333,4.5,0.002]"),
            (r#""\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"\/""#, "\"€$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\""),
            // RFC 8785, section 3.2.3: order by UTF-16 code units.
            (
                r#"{"\u20ac":"Euro Sign","\r":"Carriage Return","\ufb33":"Hebrew","1":"One","\ud83d\ude00":"Emoji","\u0080":"Control","\u00f6":"o"}"#,
                "{\"\\r\":\"Carriage Return\",\"1\":\"One\",\"\u{80}\":\"Control\",\"ö\":\"o\",\"€\":\"Euro Sign\",\"😀\":\"Emoji\",\"\u{fb33}\":\"Hebrew\"}",
            ),
        ] {
            assert_eq!(jcs(text), expected, "{text}");
        }
    }

    #[test]
    fn refused() {
        let deep = "[".repeat(JSON_NESTING_MAX + 1) + &"]".repeat(JSON_NESTING_MAX + 1);
        let wide = format!("{{{},\"k3\":0}}", (0..40).map(|n| format!("\"k{n}\":0")).collect::<Vec<_>>().join(","));
        for text in [
            "",
            "{",
            "{} {}",
            "{\"a\":1,\"a\":1}",
            "{\"a\":{\"b\":1,\"\\u0062\":2}}",
            "1e400",
            "NaN",
            "[1,]",
            "'a'",
            "\"\\ud800\"",
            &deep,
            &wide,
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(parse(deep.as_bytes()).is_err_and(|error| error.is_too_nested()));
        assert!(parse(b"{\"nested deeper than\":1,\"nested deeper than\":1}").is_err_and(|error| !error.is_too_nested()));
        assert!(parse(b"\"\xff\"").is_err());
        assert!(parse_object(b"[]").is_err());
    }

    #[test]
    fn numbers() {
        let number = |text: &str| match parse(text.as_bytes()).unwrap() {
            Value::Number(number) => number,
            other => panic!("{other:?}"),
        };
        assert_eq!(number("100.0"), number("100"));
        assert_eq!((number("100").as_i64(), number("100.0").as_i64(), number("1e2").as_i64()), (Some(100), None, None));
        let kept = ["0.30000000000000004", "5e-324", "2.2250738585072014e-308"];
        let zeros = ["0", "-0", "0.000", "-0.0e-999999999999999999999", "0e99999999999999999999"];
        let usual = ["9007199254740991", "-9007199254740991.0", "0.5", "15.0", "1.50e1", "0.015e+3", "1500e-2", "0.1"];
        for text in usual.into_iter().chain(kept).chain(zeros) {
            assert!(number(text).is_comparable(), "{text}");
        }
        let large = ["9007199254740992", "9007199254740993", "-9007199254740992.0", "1e16", "18446744073709551615", "1e300"];
        let rounded = [
            "15.0000000000000001",
            "14.99999999999999999",
            "-1e-400",
            "1e-99999999999999999999",
            "0.10000000000000001",
            "150000000000000001e-16",
            "4.9406564584124654e-324",
            "3e-324",
        ];
        for text in large.into_iter().chain(rounded) {
            assert!(!number(text).is_comparable(), "{text}");
        }
    }

    /// Each number is compared with its own text, wherever it stands and whatever strings stand around it.
    #[test]
    fn a_rounded_number_is_found_where_it_stands() {
        let check = |text: &str, expected: &[bool]| {
            let Value::Object(object) = parse(text.as_bytes()).unwrap() else { panic!("{text}") };
            assert_eq!(object.iter().map(|(_, value)| value.is_comparable()).collect::<Vec<_>>(), expected, "{text}");
        };
        check(r#"{"a":15.0000000000000001,"b":15}"#, &[false, true]);
        check(r#"{"a":[1,2.5,{"c":15.0000000000000001}],"b":2.5}"#, &[false, true]);
        check(r#"{"1.0000000000000000001":0.5,"\"2\\":"3.0000000000000000001","c":0.10000000000000001}"#, &[true, true, false]);
        check(r#"{"a":1.5,"b":null,"c":true,"d":-15.0000000000000001,"e":"\\","f":7}"#, &[true, true, true, false, true, true]);
    }
}
