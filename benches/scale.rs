//! A fleet of a million agents: how long its policy takes to build, its memory, and the cost of one changed agent.
//!
//! Each figure is a single measurement in this process, so it shows factors, not percents. The rows are those that a store would
//! return, so building them is all that a cold start does after reading. `cargo bench --bench scale -- 100000 1000000` runs a
//! smaller fleet: agents, then revocations.

#![allow(clippy::print_stdout, reason = "the figures are the output")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use portcullis::model::constraint::ConstraintMap;
use portcullis::model::ids::{AgentId, ApplicationId, GroupId, SessionId, TaskId, UserId};
use portcullis::model::json::JsonObject;
use portcullis::model::request::{DelegationSubject, TokenScope, ToolCall};
use portcullis::model::revision::{HistoryId, Revision, StateDigest};
use portcullis::model::rows::{DocumentRow, RevocationRow, RowChange};
use portcullis::revocation::{RevocationIndex, TargetRef};
use portcullis::snapshot::{FullState, Snapshot, SnapshotBuilder};

use rows::{SERVERS, SETS, TOOLS_A_SERVER, agent, agent_id, application, base, group, revocation};

#[path = "../load-tests/rows.rs"]
mod rows;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Agents changed one by one, for the median.
const CHANGES: usize = 51;
/// Decisions timed together.
const DECISIONS: usize = 200_000;

fn main() -> Result<()> {
    let mut sizes = std::env::args().skip(1).filter_map(|argument| argument.parse::<usize>().ok());
    let agents = sizes.next().unwrap_or(1_000_000);
    let revocations = sizes.next().unwrap_or(10_000_000);
    println!("{agents} agents in {SETS} sets, {} tools, {revocations} revocations", SERVERS * TOOLS_A_SERVER);

    let small = ScaleFixture::build(1_000.min(agents), 0)?;
    let small_ns = small.decision_ns()?;
    drop(small);
    let mut fleet = ScaleFixture::build(agents, revocations)?;
    let large_ns = fleet.decision_ns()?;
    row(
        "one decision, resolved: small fleet, this one",
        format!("{small_ns:.0} ns, {large_ns:.0} ns, × {:.2}", large_ns / small_ns),
    );
    row("resolving a chain (once per chain and snapshot)", format!("{:?}", fleet.resolve_duration()?));
    lookups(&RevocationIndex::new(), 0);
    let part = RevocationIndex::new();
    part.replace_all(&(0..revocations / 10).map(revocation).collect::<Vec<_>>(), 1);
    lookups(&part, revocations / 10);
    drop(part);
    lookups(fleet.snapshot.revocations(), revocations);
    fleet.change_one()?;
    fleet.flood()?;
    Ok(())
}

/// The cost of a look-up of a target that is not revoked, and of one that is.
fn lookups(index: &RevocationIndex, revocations: usize) {
    let each_ns = |keys: &[portcullis::revocation::RevocationKey]| {
        let since = Instant::now();
        for key in keys {
            black_box(index.find_hit(black_box(*key), 0, 1));
        }
        since.elapsed().as_nanos() as f64 / keys.len().max(1) as f64
    };
    let clean: Vec<_> = (0..DECISIONS).map(|number| index.key(TargetRef::Session(&format!("alive-{number}")))).collect();
    let dead: Vec<_> = (0..DECISIONS.min(revocations))
        .map(|number| index.key(TargetRef::from(&revocation(number * (revocations / DECISIONS).max(1)).target)))
        .collect();
    let (miss_ns, hit_ns) = (each_ns(&clean), each_ns(&dead));
    row(&format!("one of {revocations} looked up: what is not there, what is"), format!("{miss_ns:.0} ns, {hit_ns:.0} ns"));
}

struct ScaleFixture {
    agents: usize,
    builder: SnapshotBuilder,
    snapshot: Arc<Snapshot>,
}

impl ScaleFixture {
    fn build(agents: usize, revocations: usize) -> Result<Self> {
        let before_kib = resident_kib()?;
        let documents: Vec<DocumentRow> = base().into_iter().chain((0..agents).map(|number| agent(number, 0))).collect();
        let rows_kib = resident_kib()? - before_kib;
        let revoked: Vec<RevocationRow> = (0..revocations).map(revocation).collect();
        let state = FullState {
            revision: Revision { history: HistoryId::new("00000000-0000-7000-8000-000000000000"), number: 1 },
            digest: StateDigest::default(),
            iat_skew_s: 30,
            freshness_bound_ms: 5_000,
            documents,
            revocations: revoked,
        };
        let mut builder = SnapshotBuilder::new(Arc::new(RevocationIndex::new()));
        let since = Instant::now();
        let snapshot = builder.replace_all(state)?;
        let built = since.elapsed();
        let kib = resident_kib()? - before_kib;
        row(&format!("building {agents} agents, {revocations} revocations from rows"), format!("{built:.2?}"));
        row(
            "resident afterwards (the rows alone while they were there)",
            format!("{} MiB ({} MiB)", kib / 1024, rows_kib / 1024),
        );
        row("permission sets in memory", snapshot.policy().permission_set_count().to_string());
        Ok(Self { agents, builder, snapshot })
    }

    fn subject(&self) -> DelegationSubject {
        let number = self.agents / 2;
        let tools =
            (0..TOOLS_A_SERVER).map(|tool| (tool_name(number % SERVERS, tool).into(), ConstraintMap::unconstrained())).collect();
        DelegationSubject {
            user: UserId::new("https://issuer.example", "ana"),
            groups: vec![GroupId::from(group(number).as_str())],
            application: ApplicationId::from(application(number).as_str()),
            agents: vec![AgentId::from(agent_id(number).as_str())],
            scopes: vec![TokenScope { tools }],
            session: SessionId::from("s"),
            task: TaskId::from("t"),
        }
    }

    fn decision_ns(&self) -> Result<f64> {
        let subject = self.subject();
        let policy = self.snapshot.policy();
        let resolved = policy.resolve(&subject);
        let (tool, arguments) = (tool_name(self.agents / 2 % SERVERS, 3), JsonObject::default());
        let call = ToolCall::new(&tool, &arguments);
        let verdict = policy.evaluate(&resolved, &subject, &call);
        if verdict.reason.as_str() != "OK" {
            bail!("no permit but {verdict:?}");
        }
        let index = self.snapshot.revocations();
        let key = index.key(TargetRef::Session("alive"));
        let since = Instant::now();
        for _ in 0..DECISIONS {
            black_box(index.find_hit(black_box(key), 0, 1));
            black_box(policy.evaluate(black_box(&resolved), &subject, &call));
        }
        Ok(since.elapsed().as_nanos() as f64 / DECISIONS as f64)
    }

    fn resolve_duration(&self) -> Result<Duration> {
        let subject = self.subject();
        let since = Instant::now();
        for _ in 0..100 {
            black_box(self.snapshot.policy().resolve(black_box(&subject)));
        }
        Ok(since.elapsed() / 100)
    }

    /// From the changes of a commit to a snapshot that decides by them.
    fn change_one(&mut self) -> Result<()> {
        let sets = self.snapshot.policy().permission_set_count();
        let mut times = Vec::with_capacity(CHANGES);
        for turn in 0..CHANGES {
            let change = [RowChange::Document(agent(turn * 7919 % self.agents, 1 + turn))];
            let since = Instant::now();
            self.snapshot = self.builder.apply_changes(2 + turn as u64, StateDigest::default(), change.iter())?;
            times.push(since.elapsed());
        }
        if let Some(problem) = self.builder.policy_error() {
            bail!("{problem}");
        }
        times.sort();
        let (median, slowest) = (times.get(CHANGES / 2).context("no time")?, times.last().context("no time")?);
        row("one agent changed, effective after", format!("{median:.2?} (slowest of {CHANGES}: {slowest:.2?})"));
        row(
            "permission sets in memory after that",
            format!("{} (before: {sets})", self.snapshot.policy().permission_set_count()),
        );
        Ok(())
    }

    /// Adds a hundred thousand revocations.
    fn flood(&self) -> Result<()> {
        let index = self.snapshot.revocations();
        let rows: Vec<RevocationRow> = (0..100_000).map(|number| revocation(usize::MAX / 2 + number)).collect();
        let since = Instant::now();
        rows.iter().for_each(|row| index.apply(row));
        let each = since.elapsed() / 100_000;
        row("one revocation more, effective after", format!("{each:.2?} (mean of 100,000)"));
        let missing = rows.iter().filter(|row| index.find_hit(index.key(TargetRef::from(&row.target)), 0, 100).is_none()).count();
        if missing > 0 {
            bail!("{missing} revocations have no effect");
        }
        Ok(())
    }
}

fn tool_name(server: usize, tool: usize) -> String {
    format!("s{server}/t{tool}.read")
}

fn resident_kib() -> Result<i64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    line.trim().trim_end_matches(" kB").parse().context("VmRSS is no number")
}

fn row(what: &str, figure: String) {
    println!("{what:<62} {figure}");
}
