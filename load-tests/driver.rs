//! The load driver: measures the cost of a decision against a call that does nothing, the throughput, and how soon a revocation
//! takes effect.
//!
//! `cargo build --release && cargo run --release --example load`. It starts the server itself, uses real chains, checks the status
//! and effect of every answer, and writes a table. Calls that are compared run in turns (A B B A) at the same rate. Look next at
//! `client.rs`, then at the README, which explains the table.

mod calls;
mod client;
mod cold;
mod faults;
mod fixture;
mod fleet;
mod flood;
mod hostile;
mod kill;
#[path = "../src/testing/postgres.rs"]
mod postgres;
#[path = "../src/testing/proxy.rs"]
mod proxy;
mod report;
mod rows;
mod server;
mod zipf;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::Parser;
use portcullis::model::time::{Clock as _, SystemClock};

use client::{CallKind, CallTally, LoadClient};
use faults::rig::{FaultPlan, ProgramPaths};
use faults::scenario::{self, FaultScenario};
use fixture::CompanyFixture;
use report::LoadReport;
use server::ServerProcess;
use zipf::ZipfDistribution;

/// Calls in flight while throughput is measured.
const IN_FLIGHT: u64 = 32;
/// Messages in flight on each of two streams.
const STREAM_IN_FLIGHT: usize = 128;
/// Client threads while throughput is measured.
const THREADS: u64 = 2;

/// The first argument that makes this program the proxy.
const AS_PROXY: &str = "proxy";

/// Load test of a Portcullis server that it starts itself
#[derive(Debug, Parser)]
struct Arguments {
    /// The program under test [default: in the folder of this one]
    #[arg(long, value_name = "FILE")]
    server: Option<PathBuf>,
    /// Calls a second while costs are compared
    #[arg(long, default_value_t = 4000)]
    rate: u64,
    /// Calls a second while latency is measured
    #[arg(long, default_value_t = 10_000)]
    latency_rate: u64,
    /// Length of one turn
    #[arg(long, default_value_t = 1200, value_name = "MS")]
    turn_ms: u64,
    /// Rounds of A B B A
    #[arg(long, default_value_t = 2)]
    rounds: u64,
    /// Different chains
    #[arg(long, default_value_t = 1000)]
    tokens: usize,
    /// Sessions to revoke
    #[arg(long, default_value_t = 200)]
    kills: usize,
    /// Measure revocations in a fleet of this size instead, on PostgreSQL with and without notifications and on one SQLite file
    #[arg(long, value_name = "N")]
    fleet: Option<usize>,
    /// Checks a second over the whole fleet
    #[arg(long, default_value_t = 2000)]
    fleet_rate: u64,
    /// Measure cold starts on a store with this many agents and revocations instead
    #[arg(long, num_args = 2, value_names = ["AGENTS", "REVOCATIONS"])]
    cold: Option<Vec<usize>>,
    /// Starts on the large store
    #[arg(long, default_value_t = 3)]
    starts: usize,
    /// Run every fault instead, on a fleet of `--fleet` replicas [default: 5]: no revoked session may be permitted
    #[arg(long)]
    faults: bool,
    /// Only faults, stores or attacks whose name contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// The freshness bound of the stores for the faults
    #[arg(long, default_value_t = 5000, value_name = "MS")]
    bound_ms: u64,
    /// Measure this many revocations during checks instead, on `--fleet` replicas [default: 2]; as acts a fiftieth of it
    #[arg(long, value_name = "N")]
    flood: Option<usize>,
    /// Revocations in one commit of a flood
    #[arg(long, default_value_t = portcullis::store::write_rules::WRITES_MAX, value_name = "N")]
    flood_commit: usize,
    /// Run the attacks of a stranger who may connect instead: memory, a good caller's latency, a revocation during each
    #[arg(long)]
    hostile: bool,
    /// Checks a second of the good caller while a stranger attacks
    #[arg(long, default_value_t = 1000, value_name = "RATE")]
    hostile_rate: u64,
    /// A file that also receives the table
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// The sum of all turns of one kind.
pub(crate) struct Measurement {
    pub(crate) tally: CallTally,
    pub(crate) cpu_ns: u64,
    pub(crate) elapsed: Duration,
}

impl Measurement {
    fn new() -> Result<Self> {
        Ok(Self { tally: CallTally::new()?, cpu_ns: 0, elapsed: Duration::ZERO })
    }

    pub(crate) fn cpu_us_per_call(&self) -> f64 {
        self.cpu_ns as f64 / 1000.0 / self.tally.permits.max(1) as f64
    }

    pub(crate) fn calls_per_s(&self) -> f64 {
        self.tally.permits as f64 / self.elapsed.as_secs_f64()
    }

    pub(crate) fn calls_per_cpu_s(&self) -> f64 {
        self.tally.permits as f64 / (self.cpu_ns as f64 / 1e9)
    }
}

fn main() -> Result<()> {
    // `--faults` starts the proxy as a process of its own, which can be stopped and killed.
    if std::env::args().nth(1).as_deref() == Some(AS_PROXY) {
        return Ok(proxy::serve()?);
    }
    // `--hostile` starts the attacker as a process of its own, which is not part of the measurement.
    if std::env::args().nth(1).as_deref() == Some(hostile::AS_ATTACKER) {
        return hostile::attack();
    }
    let arguments = Arguments::parse();
    let binary = match &arguments.server {
        Some(path) => path.clone(),
        None => {
            let own = std::env::current_exe()?;
            own.parent().and_then(|examples| examples.parent()).context("this program lies nowhere")?.join("portcullis")
        }
    };
    if arguments.faults {
        return break_things(&arguments, &binary);
    }
    let company = CompanyFixture::new()?;
    if arguments.hostile {
        return strangers(&arguments, &binary, &company);
    }
    if let Some(count) = arguments.flood {
        return floods(&arguments, &binary, &company, count);
    }
    let now = SystemClock.now();
    let chains = |from: usize, count: usize| -> Result<Vec<Vec<Bytes>>> {
        (from..from + count).map(|number| company.chain(number, 2, now)).collect()
    };
    if let Some([agents, revocations]) = arguments.cold.as_deref() {
        let folder = tempfile::tempdir()?;
        let cold = cold::run(&binary, &company, (*agents, *revocations), arguments.starts, folder.path())?;
        return arguments.publish(&report::cold(*agents, *revocations, &cold));
    }
    if let Some(replicas) = arguments.fleet {
        return fleet_kills(&arguments, &binary, &company, replicas);
    }
    arguments.check_length()?;
    let server = ServerProcess::start(&binary, &company.policy(0)?)?;
    let asked = chains(0, arguments.tokens)?;
    let mut report = LoadReport::new(&arguments.describe(), asked.first().map_or(0, |chain| chain.iter().map(Bytes::len).sum()));

    costs(&arguments, &server, &asked, &mut report)?;
    throughput(&arguments, &server, &asked, &mut report)?;
    let doomed = chains(arguments.tokens, arguments.kills)?;
    say("kills")?;
    report.kills(&kill::run(&server, &doomed, |number| fixture::session(arguments.tokens + number))?);
    report.resident_kib(server.resident_kib()?);

    arguments.publish(&report.render())
}

/// Measures revocations in a fleet, store by store.
fn fleet_kills(arguments: &Arguments, binary: &Path, company: &CompanyFixture, replicas: usize) -> Result<()> {
    let database = postgres::PostgresServer::start(&[]);
    let folder = tempfile::tempdir()?;
    let with_notify = database.database();
    let separator = |url: &str| if url.contains('?') { '&' } else { '?' };
    let without = database.database();
    let stores = [
        ("PostgreSQL, NOTIFY", with_notify),
        ("PostgreSQL, no NOTIFY", format!("{without}{}notify=off", separator(&without))),
        ("one SQLite file", format!("sqlite:{}", folder.path().join("store.db").display())),
    ];
    let mut table = report::FleetTable::new(replicas, arguments.kills, arguments.fleet_rate);
    for (name, store) in stores {
        say(name)?;
        let servers = fleet::start(binary, &company.policy(0)?, &store, replicas)?;
        let now = SystemClock.now();
        let doomed = (0..arguments.kills).map(|number| company.chain(number, 2, now)).collect::<Result<Vec<_>>>()?;
        table.row(name, &fleet::run(&servers, &doomed, fixture::session, arguments.fleet_rate)?);
    }
    arguments.publish(&table.render())
}

/// Runs every fault, one after the other.
fn break_things(arguments: &Arguments, binary: &Path) -> Result<()> {
    // A release build ends at a panic without drops. The store and the proxy end with their standard input; this hook kills the
    // replicas.
    let said = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        said(panic);
        faults::rig::kill_all();
    }));
    let programs = ProgramPaths { server: binary.to_owned(), proxy: as_proxy };
    let plan = FaultPlan {
        replicas: arguments.fleet.unwrap_or(5),
        rate: arguments.fleet_rate,
        bound: Duration::from_millis(arguments.bound_ms),
        margin: Duration::from_secs(1),
        patience: Duration::from_secs(90),
    };
    let mut table = report::FaultTable::new(plan);
    let chosen =
        |scenario: &FaultScenario| [scenario.name, scenario.kind.as_str()].iter().any(|name| name.contains(&arguments.only));
    for scenario in scenario::table().into_iter().filter(chosen) {
        say(&format!("{}, {}", scenario.name, scenario.kind.as_str()))?;
        let outcome = scenario::run(&programs, plan, &scenario);
        if let Err(error) = &outcome {
            say(&format!("{error:#}"))?;
        }
        table.row(&scenario, &outcome);
        // The table is published as it grows, because a run takes about ten minutes.
        if let Some(path) = &arguments.out {
            std::fs::write(path, table.render())?;
        }
    }
    arguments.publish(&table.render())?;
    if table.is_kept() { Ok(()) } else { bail!("a promise was not kept: see the table") }
}

/// The command that runs this program as the proxy.
fn as_proxy() -> Command {
    // If the program cannot be found, its start reports so.
    let mut command = Command::new(std::env::current_exe().unwrap_or_default());
    command.arg(AS_PROXY);
    command
}

/// Measures a flood in large commits and one in acts, store by store.
fn floods(arguments: &Arguments, binary: &Path, company: &CompanyFixture, count: usize) -> Result<()> {
    let database = postgres::PostgresServer::start(&[]);
    let folder = tempfile::tempdir()?;
    let stores = [
        ("PostgreSQL", database.database()),
        ("one SQLite file", format!("sqlite:{}", folder.path().join("store.db").display())),
    ];
    let replicas = arguments.fleet.unwrap_or(2);
    let mut table = report::FloodTable::new(replicas, arguments.fleet_rate);
    let ways = [(flood::FloodSource::Acts, count.div_ceil(50)), (flood::FloodSource::Commits(arguments.flood_commit), count)];
    for (name, store) in stores {
        let servers = fleet::start(binary, &company.policy(0)?, &store, replicas)?;
        let now = SystemClock.now();
        let chains = (0..arguments.tokens).map(|number| company.chain(number, 2, now)).collect::<Result<Vec<_>>>()?;
        let load = flood::CheckLoad { servers: &servers, chains: &chains, rate: arguments.fleet_rate };
        for (index, (way, count)) in ways.into_iter().enumerate() {
            say(&format!("{name}, {way:?}"))?;
            let number = arguments.tokens + index;
            let doomed = company.chain(number, 2, now)?;
            let outcome = flood::run(&load, &store, way, count, (&doomed, fixture::session(number)))?;
            let way = match way {
                flood::FloodSource::Commits(size) => format!("commits of {size}"),
                flood::FloodSource::Acts => "signed acts of one each".to_owned(),
            };
            table.row(name, &way, &outcome);
        }
    }
    arguments.publish(&table.render())
}

/// Runs every attack, one after the other.
fn strangers(arguments: &Arguments, binary: &Path, company: &CompanyFixture) -> Result<()> {
    let mut table = report::HostileTable::new(arguments.hostile_rate);
    for attack in hostile::table().into_iter().filter(|attack| attack.name.contains(&arguments.only)) {
        say(attack.name)?;
        let now = SystemClock.now();
        let chains = (0..arguments.tokens.min(200)).map(|number| company.chain(number, 2, now)).collect::<Result<Vec<_>>>()?;
        let doomed = company.chain(arguments.tokens, 2, now)?;
        let scene = hostile::AttackSetup {
            binary,
            policy: &company.policy(0)?,
            chains: &chains,
            doomed: (&doomed, fixture::session(arguments.tokens)),
            rate: arguments.hostile_rate,
        };
        table.row(attack.name, &hostile::run(&scene, attack));
        if let Some(path) = &arguments.out {
            std::fs::write(path, table.render())?;
        }
    }
    arguments.publish(&table.render())
}

impl Arguments {
    /// Prints a table, and writes it to the file if one is given.
    fn publish(&self, text: &str) -> Result<()> {
        writeln!(std::io::stdout(), "{text}")?;
        if let Some(path) = &self.out {
            std::fs::write(path, text)?;
        }
        Ok(())
    }

    /// Refuses a run that would outlive its chains, because every later call would be denied.
    fn check_length(&self) -> Result<()> {
        // The turns of a round: four kinds at two rates and five at full speed, each forwards and backwards.
        const TURNS: u64 = 2 * (2 * 4 + 5);
        let run_s = self.rounds.saturating_mul(TURNS).saturating_mul(self.turn_ms) / 1000;
        // Handle renewals and revocations take additional time.
        let limit_s = fixture::LIFE_S.unsigned_abs() * 9 / 10;
        if run_s > limit_s {
            bail!(
                "{} rounds of turns of {} ms take {run_s} s, and the chains asked about live {} s: at most {limit_s} s, \
                 so fewer rounds or shorter turns",
                self.rounds,
                self.turn_ms,
                fixture::LIFE_S
            );
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!(
            "{} chains of 2 tokens, Zipf; {} rounds of turns of {} ms; costs at {}/s, latency at {}/s, both open loop over 2 connections \
             from one thread; throughput with {IN_FLIGHT} calls in flight from {THREADS} threads, streams with {STREAM_IN_FLIGHT} \
             messages in flight each on {THREADS} streams",
            self.tokens, self.rounds, self.turn_ms, self.rate, self.latency_rate
        )
    }
}

/// Open loops: the four kinds in turns, forwards and backwards, at the rate for costs and at the rate for latency.
fn costs(arguments: &Arguments, server: &ServerProcess, chains: &[Vec<Bytes>], report: &mut LoadReport) -> Result<()> {
    const ORDER: [CallKind; 4] = [CallKind::CheckByHandle, CallKind::NoopByHandle, CallKind::NoopByChain, CallKind::CheckByChain];
    let mut client = LoadClient::open(&server.decisions, chains, 2)?;
    let zipf = ZipfDistribution::new(chains.len());
    let turn = Duration::from_millis(arguments.turn_ms);
    for rate in [arguments.rate, arguments.latency_rate] {
        say(&format!("open loop, {rate}/s"))?;
        let mut kinds = Vec::new();
        for kind in ORDER {
            kinds.push((kind, Measurement::new()?));
        }
        for _ in 0..arguments.rounds {
            for index in (0..ORDER.len()).chain((0..ORDER.len()).rev()) {
                let (kind, measured) = kinds.get_mut(index).context("no such kind")?;
                for part in client::parts(turn) {
                    client.renew(part)?;
                    measure(server, measured, || client.open_loop(*kind, rate, part, &zipf))?;
                }
            }
        }
        report.open_loop(rate, &kinds)?;
    }
    Ok(())
}

/// Closed loops: unary calls and streams at full speed.
fn throughput(arguments: &Arguments, server: &ServerProcess, chains: &[Vec<Bytes>], report: &mut LoadReport) -> Result<()> {
    type Run = fn(&LoadClient, CallKind, Duration, &ZipfDistribution) -> Result<CallTally>;
    const UNARY: Run = |client, kind, length, zipf| client.closed_loop(kind, IN_FLIGHT / THREADS, length, zipf);
    const STREAM: Run = |client, kind, length, zipf| client.stream(kind, STREAM_IN_FLIGHT, length, zipf);
    const ORDER: [(&str, CallKind, Run); 5] = [
        ("unary", CallKind::CheckByHandle, UNARY),
        ("unary", CallKind::NoopByHandle, UNARY),
        ("unary", CallKind::CheckByChain, UNARY),
        ("stream", CallKind::CheckByHandle, STREAM),
        ("stream", CallKind::NoopByHandle, STREAM),
    ];
    let mut clients = (0..THREADS).map(|_| LoadClient::open(&server.decisions, chains, 1)).collect::<Result<Vec<_>>>()?;
    let zipf = ZipfDistribution::new(chains.len());
    let turn = Duration::from_millis(arguments.turn_ms);
    say("closed loop")?;
    let mut sums = Vec::new();
    for (name, kind, run) in ORDER {
        sums.push((name, kind, run, Measurement::new()?));
    }
    for _ in 0..arguments.rounds {
        for index in (0..ORDER.len()).chain((0..ORDER.len()).rev()) {
            let (_, kind, run, measured) = sums.get_mut(index).context("no such kind")?;
            for part in client::parts(turn) {
                clients.iter_mut().try_for_each(|client| client.renew(part))?;
                measure(server, measured, || together(&clients, |client| run(client, *kind, part, &zipf)))?;
            }
        }
    }
    report.closed_loop(sums.iter().map(|(name, kind, _, measured)| (*name, *kind, measured)))
}

/// Runs all clients at the same time, one thread each.
fn together(clients: &[LoadClient], run: impl Fn(&LoadClient) -> Result<CallTally> + Sync) -> Result<CallTally> {
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = clients.iter().map(|client| scope.spawn(move || run(client))).collect();
        let mut sum = CallTally::new()?;
        for thread in threads {
            let Ok(tally) = thread.join() else { bail!("a client thread died") };
            sum.add(&tally?)?;
        }
        Ok(sum)
    })
}

/// Runs one turn and measures the server's CPU. An answer other than a permit ends the run, because the figure would mean something
/// else.
fn measure(server: &ServerProcess, sum: &mut Measurement, run: impl FnOnce() -> Result<CallTally>) -> Result<()> {
    let (cpu_ns, since) = (server.cpu_ns()?, Instant::now());
    let tally = run()?;
    sum.elapsed += since.elapsed();
    sum.cpu_ns += server.cpu_ns()?.saturating_sub(cpu_ns);
    if tally.failures > 0 {
        bail!("{} of {} calls were no permits", tally.failures, tally.failures + tally.permits);
    }
    sum.tally.add(&tally)
}

fn say(what: &str) -> Result<()> {
    Ok(writeln!(std::io::stderr(), "{what}")?)
}

fn say_out(what: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{what}")?)
}
