//! The number of random cases for each property test: few by default, more in a nightly run.

/// The number of cases for a property, multiplied by `PORTCULLIS_CASES_FACTOR` if that is set.
pub fn case_count(usual: u32) -> u32 {
    let factor = std::env::var("PORTCULLIS_CASES_FACTOR").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
    usual.saturating_mul(factor)
}
