//! The table: ratios first, then the figures they come from, then machine, method and commit.

use std::fmt::Write as _;
use std::process::Command;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use portcullis::model::time::{Clock as _, SystemClock};

use super::Measured;
use super::client::Kind;
use super::cold::Cold;
use super::fleet::Fleet;
use super::kill::Kills;

pub(crate) struct Report {
    method: String,
    chain_bytes: usize,
    ratios: String,
    figures: String,
    kills: String,
    memory: String,
}

impl Report {
    pub(crate) fn new(method: &str, chain_bytes: usize) -> Self {
        let empty = String::new;
        Self { method: method.to_owned(), chain_bytes, ratios: empty(), figures: empty(), kills: empty(), memory: empty() }
    }

    pub(crate) fn open_loop(&mut self, rate: u64, kinds: &[(Kind, Measured)]) -> Result<()> {
        let of = |kind: Kind| {
            let found = kinds.iter().find(|(other, _)| *other == kind);
            found.map(|(_, measured)| measured).context("a kind was not measured")
        };
        let handle = of(Kind::CheckByHandle)?.cpu_us_per_call() / of(Kind::NoopByHandle)?.cpu_us_per_call();
        let chain = of(Kind::CheckByChain)?.cpu_us_per_call() / of(Kind::NoopByChain)?.cpu_us_per_call();
        self.ratio(&format!("server CPU, `Check` by handle ÷ `Noop` of the same bytes, {rate}/s"), handle, "≤ 1.15");
        self.ratio(&format!("server CPU, `Check` by chain ÷ `Noop` of the same bytes, {rate}/s"), chain, "≤ 1.40");
        for (kind, measured) in kinds {
            self.figure(&format!("open loop, {rate}/s"), *kind, measured);
        }
        Ok(())
    }

    pub(crate) fn closed_loop<'a>(&mut self, kinds: impl Iterator<Item = (&'a str, Kind, &'a Measured)>) -> Result<()> {
        let kinds: Vec<_> = kinds.collect();
        let of = |name: &str, kind: Kind| {
            let found = kinds.iter().find(|(other, of, _)| *other == name && *of == kind);
            found.map(|(.., measured)| *measured).context("a kind was not measured")
        };
        let (check, noop) = (of("unary", Kind::CheckByHandle)?, of("unary", Kind::NoopByHandle)?);
        let stream = of("stream", Kind::CheckByHandle)?;
        self.ratio(
            "calls a second, `Check` by handle ÷ `Noop`, as fast as it goes",
            check.calls_per_s() / noop.calls_per_s(),
            "",
        );
        let gain = stream.calls_per_cpu_s() / check.calls_per_cpu_s();
        self.ratio("checks per second of server CPU, `CheckStream` ÷ `Check`, both by handle", gain, "≥ 5");
        let bare = of("stream", Kind::NoopByHandle)?.calls_per_cpu_s() / noop.calls_per_cpu_s();
        self.ratio("the same of `NoopStream` ÷ `Noop`: what streaming alone gains", bare, "");
        for (name, kind, measured) in kinds {
            self.figure(&format!("closed loop, {name}"), kind, measured);
        }
        Ok(())
    }

    pub(crate) fn kills(&mut self, kills: &Kills) {
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

    fn figure(&mut self, load: &str, kind: Kind, measured: &Measured) {
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

/// The kills of a fleet, a row a store.
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

    pub(crate) fn row(&mut self, name: &str, fleet: &Fleet) {
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
             acknowledgement + bound | permits after a denial | checks |\n|---|---|---|---|---|---|---|---|---|\n{}\n\
             - **machine**: {}; replicas, PostgreSQL and client share it\n- **method**: {}\n- **commit**: {}\n- **time**: {}\n",
            self.rows,
            machine(),
            self.method,
            commit(),
            SystemClock.now().unix_s()
        )
    }
}

/// The table of cold starts.
pub(crate) fn cold(agents: usize, revocations: usize, cold: &Cold) -> String {
    let mut rows = String::new();
    let mut row = |what: &str, figure: String, goal: &str| {
        let _ = writeln!(rows, "| {what} | **{figure}** | {goal} |");
    };
    let mib = |kib: u64| format!("{} MiB", kib / 1024);
    let starts: Vec<String> = cold.starts.iter().map(|start| format!("{:.1} s", start.as_secs_f64())).collect();
    row("process started → first permit, each start", starts.join(", "), "≤ 20 s");
    row("resident, ten seconds later", mib(cold.resident_kib), "≤ 1536 MiB");
    row("resident at the most", mib(cold.peak_kib), "");
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
         | | measured | to reach |\n|---|---|---|\n{rows}\n- **machine**: {}\n- **commit**: {}\n- **time**: {}\n",
        cold.store_mib,
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
