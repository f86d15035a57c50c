//! Reads the wall clock and the boot clock. No other module reads them, so a decision can be replayed and a test can set the time.
//!
//! Two clocks are read together, because each of them fails in a different case: see [`ClockReading::elapsed_ms_since`].

use std::sync::atomic::{AtomicI64, Ordering};

use super::mutant::{Mutant, is_active};

/// One reading of the wall clock and the boot clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    /// Nanoseconds since the Unix epoch, by the wall clock.
    pub unix_ns: i64,
    /// Nanoseconds since an arbitrary start, by a clock that also counts suspended time (`CLOCK_BOOTTIME`).
    pub boot_ns: i64,
}

impl ClockReading {
    /// Whole seconds since the Unix epoch.
    pub fn unix_s(self) -> i64 {
        self.unix_ns.div_euclid(1_000_000_000)
    }

    /// Milliseconds since the Unix epoch.
    pub fn unix_ms(self) -> i64 {
        self.unix_ns.div_euclid(1_000_000)
    }

    /// Milliseconds since `earlier`: the larger advance of the two clocks, and never negative.
    ///
    /// A paused virtual machine stops one clock, and setting the wall clock back affects the other. So the larger advance is the safe one.
    pub fn elapsed_ms_since(self, earlier: ClockReading) -> u64 {
        let boot = self.boot_ns.saturating_sub(earlier.boot_ns);
        let wall = self.unix_ns.saturating_sub(earlier.unix_ns);
        let boot = if is_active(Mutant::WallClockOnly) { wall } else { boot };
        let wall = if is_active(Mutant::BootClockOnly) { boot } else { wall };
        u64::try_from(boot.max(wall).max(0) / 1_000_000).unwrap_or(0)
    }

    /// Milliseconds since `earlier` by the boot clock, which cannot be set. It never exceeds the time that has really passed, so it is the
    /// measure for a minimum wait.
    pub fn boot_elapsed_ms_since(self, earlier: ClockReading) -> u64 {
        if is_active(Mutant::WaitByWallClock) {
            return self.elapsed_ms_since(earlier);
        }
        u64::try_from(self.boot_ns.saturating_sub(earlier.boot_ns) / 1_000_000).unwrap_or(0)
    }
}

/// A source of the current time.
pub trait Clock: Send + Sync {
    /// Reads both clocks.
    fn now(&self) -> ClockReading;
}

/// The clocks of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> ClockReading {
        ClockReading { unix_ns: clock_ns(rustix::time::ClockId::Realtime), boot_ns: clock_ns(rustix::time::ClockId::Boottime) }
    }
}

fn clock_ns(clock: rustix::time::ClockId) -> i64 {
    let time = rustix::time::clock_gettime(clock);
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

/// A clock that stands still until a caller moves it, for tests, simulation and replay.
#[derive(Debug)]
pub struct ManualClock {
    unix_ns: AtomicI64,
    boot_ns: AtomicI64,
}

impl ManualClock {
    /// A clock at `unix_s` seconds since the Unix epoch.
    pub fn at_unix_s(unix_s: i64) -> Self {
        Self { unix_ns: AtomicI64::new(unix_s.saturating_mul(1_000_000_000)), boot_ns: AtomicI64::new(1_000_000_000) }
    }

    /// Advances both clocks.
    pub fn advance_ms(&self, ms: i64) {
        self.step_wall_ms(ms);
        self.boot_ns.fetch_add(ms.saturating_mul(1_000_000), Ordering::SeqCst);
    }

    /// Moves the wall clock forward or back, as an administrator or a time server does.
    pub fn step_wall_ms(&self, ms: i64) {
        self.unix_ns.fetch_add(ms.saturating_mul(1_000_000), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> ClockReading {
        ClockReading { unix_ns: self.unix_ns.load(Ordering::SeqCst), boot_ns: self.boot_ns.load(Ordering::SeqCst) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_is_the_larger_advance() {
        let clock = ManualClock::at_unix_s(1000);
        let start = clock.now();
        clock.advance_ms(500);
        assert_eq!(clock.now().elapsed_ms_since(start), 500);
        clock.step_wall_ms(-10_000);
        assert_eq!(clock.now().elapsed_ms_since(start), 500, "a clock set back does not make a proof fresh");
        let by_wall_clock =
            super::super::mutant::run_with_mutant(Some(Mutant::WallClockOnly), || clock.now().elapsed_ms_since(start));
        assert_eq!(by_wall_clock, 0, "the mutant is not seen");
        clock.step_wall_ms(30_000);
        assert_eq!(clock.now().elapsed_ms_since(start), 20_500);
        assert_eq!(clock.now().boot_elapsed_ms_since(start), 500, "a clock set on makes no waiting shorter");
        assert_eq!(start.elapsed_ms_since(clock.now()), 0);
    }
}
