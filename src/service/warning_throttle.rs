//! Limits a warning that callers can repeat to one line a second, so that a full disk is not filled further by the log.
//!
//! It logs nothing itself. Look next at `service/ledger_call.rs`, which uses it.

use std::sync::{Mutex, PoisonError};

use crate::model::time::ClockReading;

/// Least time between two lines.
const INTERVAL_MS: u64 = 1_000;

/// Admits one warning a second and counts the others.
#[derive(Debug, Default)]
pub(super) struct WarningThrottle(Mutex<ThrottleState>);

#[derive(Debug, Default)]
struct ThrottleState {
    last: Option<ClockReading>,
    left_out: u64,
}

impl WarningThrottle {
    /// Whether a warning may be logged now: the number of warnings that were left out before it, or `None`.
    pub(super) fn admit(&self, now: ClockReading) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now.elapsed_ms_since(last) < INTERVAL_MS) {
            state.left_out = state.left_out.saturating_add(1);
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::{Clock as _, ManualClock};

    #[test]
    fn one_warning_a_second_says_how_many_were_left_out() {
        let (throttle, clock) = (WarningThrottle::default(), ManualClock::at_unix_s(1_700_000_000));
        for (after_ms, expected) in
            [(0, Some(0)), (0, None), (999, None), (1, Some(2)), (5_000, Some(0)), (10, None), (990, Some(1))]
        {
            clock.advance_ms(after_ms);
            assert_eq!(throttle.admit(clock.now()), expected, "after {after_ms} ms");
        }
    }
}
