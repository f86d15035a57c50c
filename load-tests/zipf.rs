//! The choice of the token for each call: a few tokens are used often, most of them seldom (Zipf's law, exponent 1).

use std::sync::Arc;

#[derive(Clone, Debug)]
pub(crate) struct ZipfDistribution {
    cumulative: Arc<[f64]>,
}

/// Draws token numbers with a generator of its own, the same in each run.
#[derive(Debug)]
pub(crate) struct ZipfSampler {
    cumulative: Arc<[f64]>,
    state: u64,
}

impl ZipfDistribution {
    pub(crate) fn new(tokens: usize) -> Self {
        let mut sum = 0.0;
        let cumulative: Vec<f64> = (1..=tokens)
            .map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            })
            .collect();
        Self { cumulative: cumulative.into() }
    }

    pub(crate) fn drawer(&self, seed: u64) -> ZipfSampler {
        ZipfSampler { cumulative: self.cumulative.clone(), state: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1 }
    }
}

impl ZipfSampler {
    /// The next token's number (xorshift, then a binary search).
    pub(crate) fn next(&mut self) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let unit = (self.state >> 11) as f64 / (1u64 << 53) as f64;
        let sum = self.cumulative.last().copied().unwrap_or(0.0);
        self.cumulative.partition_point(|bound| *bound < unit * sum).min(self.cumulative.len().saturating_sub(1))
    }
}
