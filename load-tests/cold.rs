//! Cold starts on a store with a large fleet: the time to the first permit, the memory after it, and how soon a change takes
//! effect.
//!
//! The store is one SQLite file, filled commit by commit as any store is. Filling takes minutes and is not measured. This process
//! commits the changes, and the server sees them at its next poll.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use portcullis::api::r#gen as wire;
use portcullis::model::rows::{DocumentKey, DocumentRow, RevocationKind, RevocationTarget, StoreWrite};
use portcullis::model::time::{Clock as _, SystemClock};
use portcullis::store::sqlite::SqliteStore;
use portcullis::store::write_rules::WRITES_MAX;
use portcullis::store::{CommitRequest, Store as _};
use tokio::runtime::Runtime;
use wire::decision_service_client::DecisionServiceClient;

use super::calls::request_by_chain;
use super::client::histogram;
use super::fixture::{self, CompanyFixture};
use super::kill::PATIENCE;
use super::rows;
use super::server::ServerProcess;

/// Sessions revoked and agents changed, one after the other.
const ROUNDS: usize = 50;
/// How long the memory must stay the same. A server writes its cache once it serves, and an allocator returns memory late.
const SETTLED: Duration = Duration::from_secs(60);
/// Longest wait for the memory to settle. After it the current value is taken.
const SETTLING_MAX: Duration = Duration::from_secs(240);

/// The results of a run.
pub(crate) struct ColdStartReport {
    pub(crate) store_mib: u64,
    /// From the start of the process to the first permit.
    pub(crate) starts: Vec<Duration>,
    pub(crate) peak_kib: u64,
    pub(crate) resident_kib: u64,
    /// From the first permit until the memory has settled.
    pub(crate) settled: Duration,
    /// From the commit of a revocation to the first denial.
    pub(crate) killed_ns: Histogram<u64>,
    /// From the commit of an agent's changed document to the first answer that uses it.
    pub(crate) changed_ns: Histogram<u64>,
}

/// Fills a store in `folder`, then starts servers on it, one after the other.
pub(crate) fn run(
    binary: &Path,
    company: &CompanyFixture,
    sizes: (usize, usize),
    starts: usize,
    folder: &Path,
) -> Result<ColdStartReport> {
    let (agents, revocations) = sizes;
    let file = folder.join("store.db");
    let url = format!("sqlite:{}", file.display());
    let environment = [("PORTCULLIS_STORE", url.as_str())];
    // A server applies the company's policy at its start, as usual.
    drop(ServerProcess::start_with(binary, Some(&company.policy(0)?), &environment)?);
    fill(&runtime()?, &file, agents, revocations)?;

    let mut cold = ColdStartReport {
        store_mib: std::fs::metadata(&file)?.len() >> 20,
        starts: Vec::new(),
        peak_kib: 0,
        resident_kib: 0,
        settled: Duration::ZERO,
        killed_ns: histogram()?,
        changed_ns: histogram()?,
    };
    for start in 0..starts {
        super::say(&format!("start {}", start + 1))?;
        let since = Instant::now();
        let server = ServerProcess::start_with(binary, None, &environment)?;
        // The connection is dropped before its server ends.
        let runtime = runtime()?;
        let mut asking =
            CallLoop { runtime: &runtime, client: runtime.block_on(DecisionServiceClient::connect(server.decisions.clone()))? };
        asking.until(&request_by_chain(&company.chain(0, 2, SystemClock.now())?), wire::Effect::Permit)?;
        cold.starts.push(since.elapsed());
        if start + 1 == starts {
            (cold.resident_kib, cold.settled) = settle(&server)?;
            cold.peak_kib = server.status_kib("VmHWM")?;
            // The old connection was silent for so long that the server closed it.
            asking.client = runtime.block_on(DecisionServiceClient::connect(server.decisions.clone()))?;
            changes(&mut cold, &mut asking, company, &file)?;
        }
    }
    Ok(cold)
}

/// The resident memory once it stays within one percent, and the time until then.
fn settle(server: &ServerProcess) -> Result<(u64, Duration)> {
    let began = Instant::now();
    let (mut kib, mut since) = (server.status_kib("VmRSS")?, began);
    while since.elapsed() < SETTLED && began.elapsed() < SETTLING_MAX {
        std::thread::sleep(Duration::from_millis(500));
        let now = server.status_kib("VmRSS")?;
        if now.abs_diff(kib) > kib / 100 {
            (kib, since) = (now, Instant::now());
        }
    }
    Ok((kib, since.duration_since(began)))
}

fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn fill(runtime: &Runtime, file: &Path, agents: usize, revocations: usize) -> Result<()> {
    let store = SqliteStore::open(file, Arc::new(SystemClock))?;
    let commit = |writes: Vec<StoreWrite>| runtime.block_on(store.commit(CommitRequest { writes, ..CommitRequest::default() }));
    super::say(&format!("{agents} agents, {revocations} revocations into a store"))?;
    commit(rows::base().into_iter().map(StoreWrite::PutDocument).collect())?;
    for from in (0..agents).step_by(WRITES_MAX) {
        let some = from..agents.min(from + WRITES_MAX);
        commit(some.map(|number| StoreWrite::PutDocument(rows::agent(number, 0))).collect())?;
    }
    for from in (0..revocations).step_by(WRITES_MAX) {
        let some = from..revocations.min(from + WRITES_MAX);
        let revoke = |number| StoreWrite::Revoke {
            target: rows::revocation(number).target,
            kind: RevocationKind::Dead,
            reason: String::new(),
        };
        commit(some.map(revoke).collect())?;
    }
    Ok(())
}

/// Revokes sessions and changes agents on top of the filled store, each until an answer shows the change.
fn changes(cold: &mut ColdStartReport, asking: &mut CallLoop<'_>, company: &CompanyFixture, file: &Path) -> Result<()> {
    let store = SqliteStore::open(file, Arc::new(SystemClock))?;
    let commit = |write: StoreWrite| -> Result<Instant> {
        asking.runtime.block_on(store.commit(CommitRequest { writes: vec![write], ..CommitRequest::default() }))?;
        Ok(Instant::now())
    };
    let ns = |since: Instant| u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let leaf = company.documents(0)?.into_iter().find(|document| document["id"] == fixture::agent_id(1)).context("no leaf")?;
    let row = |document: &serde_json::Value| {
        let key = DocumentKey { kind: "agent".to_owned(), id: fixture::agent_id(1) };
        DocumentRow { key, json: document.to_string(), ..rows::agent(0, 0) }
    };
    let mut barred = leaf.clone();
    fixture::merge(&mut barred, serde_json::json!({"deny": ["crm/*"]}));
    for round in 1..=ROUNDS {
        let call = request_by_chain(&company.chain(round, 2, SystemClock.now())?);
        asking.until(&call, wire::Effect::Permit)?;
        let since = commit(StoreWrite::PutDocument(row(&barred)))?;
        asking.until(&call, wire::Effect::Deny)?;
        cold.changed_ns.saturating_record(ns(since));
        commit(StoreWrite::PutDocument(row(&leaf)))?;
        asking.until(&call, wire::Effect::Permit)?;
        let target = RevocationTarget::Session(fixture::session(round));
        let since = commit(StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: "load test".to_owned() })?;
        asking.until(&call, wire::Effect::Deny)?;
        cold.killed_ns.saturating_record(ns(since));
    }
    Ok(())
}

struct CallLoop<'a> {
    runtime: &'a Runtime,
    client: DecisionServiceClient<tonic::transport::Channel>,
}

impl CallLoop<'_> {
    /// Repeats a call until its answer has this effect.
    fn until(&mut self, call: &wire::CheckRequest, effect: wire::Effect) -> Result<()> {
        let since = Instant::now();
        loop {
            let answer = self.runtime.block_on(self.client.check(call.clone()))?.into_inner();
            if answer.effect() == effect {
                return Ok(());
            }
            if since.elapsed() > PATIENCE {
                bail!("no {effect:?} came, but `{}`", answer.reason);
            }
        }
    }
}
