//! Durations in the form of policy documents: `30s`, `10m`, `8h`, `90d`, `250ms`.
//!
//! Documents and settings use this form. Elsewhere a duration is an integer whose name ends with its unit.

/// Reads a duration in milliseconds: a whole number and one unit of `ms s m h d`.
///
/// # Errors
/// One line that says what is expected, if the text has another form or the value is too large.
pub fn parse_ms(text: &str) -> Result<u64, String> {
    let expected = || format!("`{text}` is not a duration: write a whole number and a unit, such as `30s`, `10m`, `8h` or `90d`");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits).ok_or_else(expected)?;
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(expected()),
    };
    let number: u64 = number.parse().map_err(|_| expected())?;
    number
        .checked_mul(unit_ms)
        .filter(|ms| *ms <= i64::MAX as u64 / 1_000_000)
        .ok_or_else(|| format!("`{text}` is too long a time"))
}

#[cfg(test)]
mod tests {
    use super::parse_ms;

    #[test]
    fn durations() {
        for (text, ms) in
            [("0s", 0), ("250ms", 250), ("30s", 30_000), ("10m", 600_000), ("8h", 28_800_000), ("90d", 7_776_000_000)]
        {
            assert_eq!(parse_ms(text), Ok(ms), "{text}");
        }
        for text in ["", "s", "10", "-1s", "1.5h", "10 m", "1w", "99999999999999999999s", "999999999999d", "1h30m"] {
            assert!(parse_ms(text).is_err(), "{text}");
        }
    }
}
