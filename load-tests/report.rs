//! The report: ratios first, then the figures behind them, then machine, method and commit.

use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use portcullis::model::time::{Clock as _, SystemClock};

use super::Measurement;
use super::client::{CallKind, CallTally};
use super::cold::ColdStartReport;
use super::faults::checker::FaultVerdict;
use super::faults::rig::{DOOMED, FaultPlan};
use super::faults::scenario::FaultScenario;
use super::fleet::FleetKillReport;
use super::flood::FloodReport;
use super::hostile::AttackOutcome;
use super::kill::KillReport;

/// Longest time for a fleet to be fresh again once its store is back.
const FRESH_AGAIN: Duration = Duration::from_secs(2);

pub(crate) struct LoadReport {
    method: String,
    chain_bytes: usize,
    ratios: String,
    figures: String,
    kills: String,
    memory: String,
}

impl LoadReport {
    pub(crate) fn new(method: &str, chain_bytes: usize) -> Self {
        let empty = String::new;
        Self { method: method.to_owned(), chain_bytes, ratios: empty(), figures: empty(), kills: empty(), memory: empty() }
    }

    pub(crate) fn open_loop(&mut self, rate: u64, kinds: &[(CallKind, Measurement)]) -> Result<()> {
        let of = |kind: CallKind| {
            let found = kinds.iter().find(|(other, _)| *other == kind);
            found.map(|(_, measured)| measured).context("a kind was not measured")
        };
        let handle = of(CallKind::CheckByHandle)?.cpu_us_per_call() / of(CallKind::NoopByHandle)?.cpu_us_per_call();
        let chain = of(CallKind::CheckByChain)?.cpu_us_per_call() / of(CallKind::NoopByChain)?.cpu_us_per_call();
        self.ratio(&format!("server CPU, `Check` by handle ÷ `Noop` of the same bytes, {rate}/s"), handle, "≤ 1.15");
        self.ratio(&format!("server CPU, `Check` by chain ÷ `Noop` of the same bytes, {rate}/s"), chain, "≤ 1.40");
        for (kind, measured) in kinds {
            self.figure(&format!("open loop, {rate}/s"), *kind, measured);
        }
        Ok(())
    }

    pub(crate) fn closed_loop<'a>(&mut self, kinds: impl Iterator<Item = (&'a str, CallKind, &'a Measurement)>) -> Result<()> {
        let kinds: Vec<_> = kinds.collect();
        let of = |name: &str, kind: CallKind| {
            let found = kinds.iter().find(|(other, of, _)| *other == name && *of == kind);
            found.map(|(.., measured)| *measured).context("a kind was not measured")
        };
        let (check, noop) = (of("unary", CallKind::CheckByHandle)?, of("unary", CallKind::NoopByHandle)?);
        let stream = of("stream", CallKind::CheckByHandle)?;
        self.ratio(
            "calls a second, `Check` by handle ÷ `Noop`, as fast as it goes",
            check.calls_per_s() / noop.calls_per_s(),
            "",
        );
        let gain = stream.calls_per_cpu_s() / check.calls_per_cpu_s();
        self.ratio("checks per second of server CPU, `CheckStream` ÷ `Check`, both by handle", gain, "≥ 5");
        let bare = of("stream", CallKind::NoopByHandle)?.calls_per_cpu_s() / noop.calls_per_cpu_s();
        self.ratio("the same of `NoopStream` ÷ `Noop`: what streaming alone gains", bare, "");
        for (name, kind, measured) in kinds {
            self.figure(&format!("closed loop, {name}"), kind, measured);
        }
        Ok(())
    }

    pub(crate) fn kills(&mut self, kills: &KillReport) {
        let row = |name: &str, histogram: &Histogram<u64>| {
            let ms = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
            let max = histogram.max() as f64 / 1e6;
            format!("| {name} | {} | {:.2} | {:.2} | {:.2} | {max:.2} |\n", histogram.len(), ms(0.5), ms(0.9), ms(0.99))
        };
        self.kills.push_str(&row("from the answer to `Revoke` to the first denial", &kills.from_answer_ns));
        self.kills.push_str(&row("from sending `Revoke` to the first denial", &kills.from_request_ns));
        let _ = writeln!(self.kills, "\n{} denials came before the operator had the answer and count as 0.", kills.before_answer);
    }

    pub(crate) fn resident_kib(&mut self, kib: u64) {
        let _ = writeln!(self.memory, "Resident memory of the server at the end: {:.0} MiB.", kib as f64 / 1024.0);
    }

    pub(crate) fn render(&self) -> String {
        let Self { method, chain_bytes, ratios, figures, kills, memory } = self;
        format!(
            "# Load test\n\n| ratio | measured | to reach |\n|---|---|---|\n{ratios}\n\
             | load | call | calls | calls/s | server CPU µs/call | p50 ms | p90 ms | p99 ms | p99.9 ms | max ms |\n\
             |---|---|---|---|---|---|---|---|---|---|\n{figures}\n\
             | kill | kills | p50 ms | p90 ms | p99 ms | max ms |\n|---|---|---|---|---|---|\n{kills}\n{memory}\n\
             - **machine**: {}; client and server share it\n\
             - **method**: {method}; a chain has {chain_bytes} bytes; audit on, no OTLP; every answer's status and effect checked; \
             CPU from the scheduler's account of each server thread; latency from the intended time of sending\n\
             - **commit**: {}\n- **time**: {}\n",
            machine(),
            commit(),
            SystemClock.now().unix_s()
        )
    }

    fn ratio(&mut self, name: &str, value: f64, goal: &str) {
        let _ = writeln!(self.ratios, "| {name} | **{value:.2}** | {goal} |");
    }

    fn figure(&mut self, load: &str, kind: CallKind, measured: &Measurement) {
        let ms = |quantile: f64| measured.tally.latency_ns.value_at_quantile(quantile) as f64 / 1e6;
        let _ = writeln!(
            self.figures,
            "| {load} | {kind:?} | {} | {:.0} | {:.1} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
            measured.tally.permits,
            measured.calls_per_s(),
            measured.cpu_us_per_call(),
            ms(0.5),
            ms(0.9),
            ms(0.99),
            ms(0.999),
            measured.tally.latency_ns.max() as f64 / 1e6,
        );
    }
}

/// The revocations in a fleet, one row for each store.
pub(crate) struct FleetTable {
    method: String,
    rows: String,
}

impl FleetTable {
    pub(crate) fn new(replicas: usize, kills: usize, rate: u64) -> Self {
        let method = format!(
            "{replicas} replicas, each asked about the session that is killed at {} checks a second ({rate} over all, and none else); \
             {kills} sessions, one after the other, `Revoke` at each replica in turn; from its answer to the first denial that the \
             client has, so the pace of asking counts",
            rate / replicas.max(1) as u64
        );
        Self { method, rows: String::new() }
    }

    pub(crate) fn row(&mut self, name: &str, fleet: &FleetKillReport) {
        let ms = |histogram: &Histogram<u64>, quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
        let _ = writeln!(
            self.rows,
            "| {name} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {} | {} | {} |",
            fleet.last_ns.len(),
            ms(&fleet.first_ns, 0.5),
            ms(&fleet.last_ns, 0.5),
            ms(&fleet.last_ns, 0.99),
            fleet.last_ns.max() as f64 / 1e6,
            fleet.late_permits,
            fleet.back,
            fleet.checks,
        );
    }

    pub(crate) fn render(&self) -> String {
        format!(
            "# Kills in a fleet\n\n| store | kills | first replica p50 ms | last replica p50 ms | p99 ms | max ms | permits after \
             acknowledgement + bound | permits after a denial | checks |\n|---|---|---|---|---|---|---|---|---|\n{}\n{}",
            self.rows,
            origin("replicas, PostgreSQL and client share it", &self.method)
        )
    }
}

/// The table of cold starts.
pub(crate) fn cold(agents: usize, revocations: usize, cold: &ColdStartReport) -> String {
    let mut rows = String::new();
    let mut row = |what: &str, figure: String, goal: &str| {
        let _ = writeln!(rows, "| {what} | **{figure}** | {goal} |");
    };
    let mib = |kib: u64| format!("{} MiB", kib / 1024);
    let starts: Vec<String> = cold.starts.iter().map(|start| format!("{:.1} s", start.as_secs_f64())).collect();
    row("process started → first permit, each start", starts.join(", "), "≤ 20 s");
    let settled = format!("resident from {:.0} s after that on", cold.settled.as_secs_f64());
    row(&settled, mib(cold.resident_kib), "≤ 1536 MiB");
    row("resident at the most, while rows are read and the cache is written", mib(cold.peak_kib), "");
    for (what, histogram, goal) in [
        ("one agent's document committed by another process → first answer by it", &cold.changed_ns, "≤ 100 ms"),
        ("one session killed by another process → first denial", &cold.killed_ns, ""),
    ] {
        let ms = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
        let max = histogram.max() as f64 / 1e6;
        row(what, format!("p50 {:.1}, p99 {:.1}, max {max:.1} ms", ms(0.5), ms(0.99)), goal);
    }
    format!(
        "# Cold starts of a large fleet\n\n{agents} agents, {revocations} revocations, one SQLite file of {} MiB.\n\n\
         {}\n| | measured | to reach |\n|---|---|---|\n{rows}",
        cold.store_mib,
        origin(
            "server and client share it",
            "a store that is filled commit by commit, then the server started on it; two chains asked about"
        ),
    )
}

/// The table of faults, one row for each scenario.
pub(crate) struct FaultTable {
    method: String,
    rows: String,
    checks: u64,
    broken: u64,
    slow: u64,
    failed: u64,
}

impl FaultTable {
    pub(crate) fn new(plan: FaultPlan) -> Self {
        let method = format!(
            "{} replicas, each reached by its store through a route of its own through a proxy that is another process; each asked about \
             one session that lives and {DOOMED} that may be killed at {} checks a second ({} over all); freshness bound {} ms; a \
             session is killed at a replica, another one in the store right before the fault, others while it lasts by whatever way \
             leads to the store; the fault ends {} ms after bound and last acknowledgement; a new fleet for every row; a permit is late \
             where its call began after acknowledgement + bound, usable where the moment of asking + `valid_for_ms` lies beyond that; \
             fresh: a permit whose `valid_for_ms` says that its proof is younger than 1 s, from the moment that the fault was undone \
             (a killed replica: that it was started again); longest stale: between two fresh permits of one replica",
            plan.replicas,
            plan.rate / plan.replicas.max(1) as u64,
            plan.rate,
            plan.bound.as_millis(),
            plan.margin.as_millis(),
        );
        Self { method, rows: String::new(), checks: 0, broken: 0, slow: 0, failed: 0 }
    }

    pub(crate) fn row(&mut self, scenario: &FaultScenario, outcome: &Result<FaultVerdict>) {
        let (name, store) = (scenario.name, scenario.kind.as_str());
        let verdict = match outcome {
            Ok(verdict) => verdict,
            Err(error) => {
                self.failed += 1;
                let line = format!("{error:#}").lines().next().unwrap_or_default().replace('|', "/");
                let _ = writeln!(self.rows, "| {name} | {store} | **did not end**: {line} | | | | | | | | | |");
                return;
            }
        };
        self.checks += verdict.checks;
        self.broken += verdict.late + verdict.usable + verdict.back + verdict.others.len() as u64;
        self.slow += u64::from(verdict.fresh_again > FRESH_AGAIN);
        let s = |length: Duration| format!("{:.2}", length.as_secs_f64());
        let _ = writeln!(
            self.rows,
            "| {name} | {store} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            verdict.kills,
            verdict.checks,
            verdict.stale,
            verdict.failed,
            verdict.late,
            verdict.usable,
            verdict.back,
            s(verdict.latest_permit),
            s(verdict.longest_stale),
            s(verdict.fresh_again),
        );
        for other in &verdict.others {
            let _ = writeln!(self.rows, "| | | **not expected**: {other} | | | | | | | | | |");
        }
    }

    /// Whether every scenario ended and no call was permitted that must be denied.
    pub(crate) fn is_kept(&self) -> bool {
        self.broken == 0 && self.failed == 0
    }

    pub(crate) fn render(&self) -> String {
        format!(
            "# Faults\n\n{}\n| promise | measured | to reach |\n|---|---|---|\n\
             | permits late, usable beyond the bound, or after a denial | **{}** of {} checks | 0 |\n\
             | scenarios after which the fleet was not fresh again within 2 s | **{}** | 0 |\n\
             | scenarios that did not come to their end | **{}** | 0 |\n\n\
             | fault | store | kills | checks | denied as stale | no answer | late permits | usable beyond the bound | permits after a \
             denial | latest permit after an acknowledgement, s | longest stale, s | fresh again, s |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|\n{}",
            origin("replicas, store, proxy and clients share it", &self.method),
            self.broken,
            self.checks,
            self.slow,
            self.failed,
            self.rows
        )
    }
}

/// The table of floods, one row for each.
pub(crate) struct FloodTable {
    method: String,
    rows: String,
}

impl FloodTable {
    pub(crate) fn new(replicas: usize, rate: u64) -> Self {
        let method = format!(
            "{replicas} replicas, the first asked by chain at {rate} checks a second, open loop, 4 s before, throughout, and 4 s after; \
             in effect: the last revocation of the flood is denied by every replica (revisions are applied in order, so all others are \
             too), counted from its acknowledgement; an act revokes one target, so a flood in large commits goes straight to the store"
        );
        Self { method, rows: String::new() }
    }

    pub(crate) fn row(&mut self, store: &str, way: &str, flood: &FloodReport) {
        let ms = |tally: &CallTally| {
            let at = |quantile: f64| tally.latency_ns.value_at_quantile(quantile) as f64 / 1e6;
            format!("{:.2} / {:.2} / {:.1}", at(0.5), at(0.99), tally.latency_ns.max() as f64 / 1e6)
        };
        let _ = writeln!(
            self.rows,
            "| {store} | {way} | {} | {:.0} | {:.2} | {:.0} | {} | {} | {} | {} |",
            flood.revocations,
            flood.revocations as f64 / flood.acknowledged.as_secs_f64(),
            flood.acknowledged.as_secs_f64(),
            flood.effective.as_secs_f64() * 1e3,
            ms(&flood.before),
            ms(&flood.during),
            ms(&flood.after),
            flood.before.failures + flood.during.failures + flood.after.failures,
        );
    }

    pub(crate) fn render(&self) -> String {
        format!(
            "# A flood of revocations\n\n{}\n| store | way | revocations | revocations/s | acknowledged after s | in effect everywhere ms \
             later | checks before, p50 / p99 / max ms | during | after | no permits |\n|---|---|---|---|---|---|---|---|---|---|\n{}",
            origin("replicas, store and clients share it", &self.method),
            self.rows
        )
    }
}

/// The table of attacks and their effect on other callers.
pub(crate) struct HostileTable {
    method: String,
    rows: String,
}

impl HostileTable {
    pub(crate) fn new(rate: u64) -> Self {
        let method = format!(
            "one replica on SQLite for each attack; a good caller asks by chain at {rate} checks a second, open loop over 2 connections, \
             3 s before, 6 s during and 3 s after; the attacker is a process at nice 19 that comes back whenever it is cut off; a kill \
             counts from the operator's first packet on a new connection to the first denial on another new one; a probe is `/livez` on \
             a new connection, the slowest of all"
        );
        Self { method, rows: String::new() }
    }

    pub(crate) fn row(&mut self, attack: &str, outcome: &Result<AttackOutcome>) {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                let _ = writeln!(self.rows, "| {attack} | **failed**: {error:#} | | | | | | | | |");
                return;
            }
        };
        let ms = |tally: &CallTally| {
            let at = |quantile: f64| tally.latency_ns.value_at_quantile(quantile) as f64 / 1e6;
            format!("{:.2} / {:.2}", at(0.5), at(0.99))
        };
        let took = |took: &Result<Duration>| match took {
            Ok(took) => format!("{:.1}", took.as_secs_f64() * 1e3),
            Err(error) => format!("**{error:#}**"),
        };
        let _ = writeln!(
            self.rows,
            "| {attack} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.2} |",
            outcome.reached,
            outcome.resident_before_kib / 1024,
            outcome.resident_peak_kib / 1024,
            ms(&outcome.before),
            ms(&outcome.during),
            ms(&outcome.after),
            outcome.before.failures + outcome.during.failures + outcome.after.failures,
            took(&outcome.kill),
            took(&outcome.probe),
            outcome.audit_bytes_per_s as f64 / 1e6,
        );
    }

    pub(crate) fn render(&self) -> String {
        format!(
            "# A stranger who may connect\n\n{}\n| attack | reached | resident MiB before | peak | good caller before, p50 / p99 ms | \
             during | after | no permits | kill ms | probe ms | audit MB/s |\n|---|---|---|---|---|---|---|---|---|---|---|\n{}",
            origin("server, good caller and attacker share it", &self.method),
            self.rows
        )
    }
}

/// Machine, method, commit and time.
fn origin(shared: &str, method: &str) -> String {
    format!(
        "- **machine**: {}; {shared}\n- **method**: {method}\n- **commit**: {}\n- **time**: {}\n",
        machine(),
        commit(),
        SystemClock.now().unix_s()
    )
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease");
    format!(
        "{}, {cores} cores, Linux {}, load average at the end {load}",
        model.trim_start_matches([' ', '\t', ':']),
        kernel.trim()
    )
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| !changes.is_empty());
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    format!("{commit}{}", if changed { ", with changes" } else { "" })
}
