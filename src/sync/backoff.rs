//! Pauses after failures. They double up to a maximum, with jitter, so that the replicas of a fleet do not all return at once.
//!
//! The randomness comes from a seed, so that a simulation can repeat it. Look next at `follower_loop.rs`, which pauses by it.

use std::time::Duration;

/// The pauses between attempts.
#[derive(Debug)]
pub(super) struct RetryBackoff {
    min_ms: u64,
    max_ms: u64,
    rng_state: u64,
}

impl RetryBackoff {
    /// Makes pauses from `min_ms` to `max_ms`.
    pub(super) fn new(min_ms: u64, max_ms: u64, seed: u64) -> Self {
        Self { min_ms, max_ms: max_ms.max(min_ms), rng_state: seed }
    }

    /// The pause after that many consecutive failures: random between half of the doubled minimum and all of it, at most the maximum.
    pub(super) fn next_pause(&mut self, failures: u32) -> Duration {
        let doubled = self.min_ms.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(self.max_ms);
        Duration::from_millis(doubled / 2 + self.random_up_to(doubled - doubled / 2))
    }

    /// A random pause of at most `max_ms`.
    pub(super) fn jitter(&mut self, max_ms: u64) -> Duration {
        Duration::from_millis(self.random_up_to(max_ms))
    }

    /// A random number from 0 to `max`, both included.
    fn random_up_to(&mut self, max: u64) -> u64 {
        let product = u128::from(self.next_random()) * (u128::from(max) + 1);
        u64::try_from(product >> 64).unwrap_or(max)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014). It only spreads the pauses of a fleet; no security depends on it.
    fn next_random(&mut self) -> u64 {
        self.rng_state = self.rng_state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.rng_state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_maximum() {
        let mut backoff = RetryBackoff::new(50, 500, 7);
        for (failures, range) in [(1, 25..=50), (2, 50..=100), (3, 100..=200), (5, 250..=500), (u32::MAX, 250..=500)] {
            for _ in 0..100 {
                let pause = backoff.next_pause(failures).as_millis();
                assert!(range.contains(&pause), "{failures} failures: {pause} ms");
            }
        }
        let jitters: Vec<_> = (0..100).map(|_| backoff.jitter(200)).collect();
        assert!(jitters.iter().all(|pause| pause.as_millis() <= 200));
        assert!(jitters.iter().any(|pause| pause != &jitters[0]), "no jitter");
    }
}
