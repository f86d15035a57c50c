//! How many random cases a property is tried with: a few in the test command, as many as one likes at night.

/// The number of cases of a property, times `PORTCULLIS_CASES_FACTOR` where that is set.
pub fn cases(usual: u32) -> u32 {
    let factor = std::env::var("PORTCULLIS_CASES_FACTOR").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
    usual.saturating_mul(factor)
}
