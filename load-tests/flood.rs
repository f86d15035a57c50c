//! A flood of revocations during checks: its effect on the checks, and how soon all of it is in effect.
//!
//! An operator's act revokes one target, so the flood has two forms: directly to the store in the largest commits, as an import
//! does; and as signed acts, several at a time.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::model::rows::{RevocationKind, RevocationTarget, StoreWrite};
use portcullis::model::time::SystemClock;
use portcullis::store::postgres::{Durability, PostgresStore, Settings};
use portcullis::store::sqlite::SqliteStore;
use portcullis::store::{CommitRequest, Store};
use portcullis::token::PrivateKey;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use wire::decision_service_client::DecisionServiceClient;
use wire::fleet_service_client::FleetServiceClient;
use wire::revocation_service_client::RevocationServiceClient;

use super::calls::{request_by_chain, signed};
use super::client::{CallKind, CallTally, LoadClient};
use super::server::ServerProcess;
use super::zipf::ZipfDistribution;

/// How long checks are measured without load, before and after.
const PEACE: Duration = Duration::from_secs(4);
/// Length of the intervals in which checks are measured during the flood.
const PIECE: Duration = Duration::from_millis(250);
/// Acts in flight at the same time.
const ACTS_IN_FLIGHT: usize = 16;
/// A flood that takes longer than this to come into effect is an error, not a figure.
const PATIENCE: Duration = Duration::from_secs(300);

/// The results of a flood.
pub(crate) struct FloodReport {
    pub(crate) revocations: usize,
    /// From the first request to the acknowledgement of the last revocation.
    pub(crate) acknowledged: Duration,
    /// From that acknowledgement to the denial of the last one at the last replica.
    pub(crate) effective: Duration,
    pub(crate) before: CallTally,
    pub(crate) during: CallTally,
    pub(crate) after: CallTally,
}

/// The form of a flood.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FloodSource {
    /// Directly to the store, with this many revocations in a commit.
    Commits(usize),
    /// One signed act for each revocation.
    Acts,
}

/// The servers, the chains, and the rate of the checks.
pub(crate) struct CheckLoad<'a> {
    pub(crate) servers: &'a [ServerProcess],
    pub(crate) chains: &'a [Vec<Bytes>],
    pub(crate) rate: u64,
}

/// Revokes this many sessions, the session of `doomed` last, while the first replica checks other sessions at a steady rate.
pub(crate) fn run(
    load: &CheckLoad<'_>,
    store: &str,
    way: FloodSource,
    count: usize,
    doomed: (&[Bytes], String),
) -> Result<FloodReport> {
    let (chain, last) = doomed;
    let client = LoadClient::open(&load.servers.first().context("no replica")?.decisions, load.chains, 2)?;
    let zipf = ZipfDistribution::new(load.chains.len());
    let measure = |length| client.open_loop(CallKind::CheckByChain, load.rate, length, &zipf);
    let names = |from: usize, to: usize| {
        let last = last.clone();
        (from..to).map(move |number| if number + 1 == count { last.clone() } else { format!("flood-{number}") })
    };
    let before = measure(PEACE)?;
    let (mut during, began) = (CallTally::new()?, Instant::now());
    let (acknowledged, effective) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| last_denial(load.servers, chain));
        let flooding = scope.spawn(|| {
            match way {
                FloodSource::Commits(size) => commits(store, count, size, names),
                FloodSource::Acts => acts(load.servers, names(0, count).collect()),
            }
            .map(|()| Instant::now())
        });
        while !(flooding.is_finished() && watching.is_finished()) {
            during.add(&measure(PIECE)?)?;
            if flooding.is_finished() && began.elapsed() > PATIENCE {
                bail!("the flood is not in effect");
            }
        }
        Ok((joined(flooding)?, joined(watching)?))
    })?;
    let after = measure(PEACE)?;
    Ok(FloodReport {
        revocations: count,
        acknowledged: acknowledged.saturating_duration_since(began),
        effective: effective.saturating_duration_since(acknowledged),
        before,
        during,
        after,
    })
}

fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| bail!("a thread died"))
}

fn commits<I: Iterator<Item = String>>(store: &str, count: usize, size: usize, names: impl Fn(usize, usize) -> I) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let store: Arc<dyn Store> = match store.strip_prefix("sqlite:") {
        Some(path) => Arc::new(SqliteStore::open(Path::new(path), Arc::new(SystemClock))?),
        None => {
            let settings = Settings::parse(store, Durability::Single).map_err(anyhow::Error::msg)?;
            Arc::new(runtime.block_on(PostgresStore::open(settings))?)
        }
    };
    for from in (0..count).step_by(size.max(1)) {
        let kill = |name| StoreWrite::Revoke {
            target: RevocationTarget::Session(name),
            kind: RevocationKind::Dead,
            reason: "flood".to_owned(),
        };
        let writes = names(from, count.min(from + size)).map(kill).collect();
        runtime.block_on(store.commit(CommitRequest { writes, ..Default::default() }))?;
    }
    Ok(())
}

/// Sends acts to every replica in turn; the last one after all others are acknowledged.
fn acts(servers: &[ServerProcess], mut names: Vec<String>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let key = Arc::new(servers.first().context("no replica")?.operator_key()?);
        let mut admins = Vec::new();
        for server in servers {
            admins.push(Channel::from_shared(server.admin.clone())?.connect().await?);
        }
        let one = admins.first().cloned().context("no replica")?;
        let history = FleetServiceClient::new(one).info(wire::InfoRequest {}).await?.into_inner().history_id;
        let last = names.pop().context("nothing to revoke")?;
        let (names, next) = (Arc::new(names), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        for number in 0..ACTS_IN_FLIGHT {
            let admin = admins.get(number % admins.len()).cloned().context("no replica")?;
            let (key, history, names, next) = (key.clone(), history.clone(), names.clone(), next.clone());
            tasks.spawn(async move {
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    act(&admin, &key, &history, name).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        act(admins.first().context("no replica")?, &key, &history, &last).await
    })
}

async fn act(admin: &Channel, key: &PrivateKey, history: &str, session: &str) -> Result<()> {
    RevocationServiceClient::new(admin.clone()).revoke(signed(key, history, session.to_owned())?).await?;
    Ok(())
}

/// When the last replica denied.
fn last_denial(servers: &[ServerProcess], chain: &[Bytes]) -> Result<Instant> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let began = Instant::now();
        let mut last = began;
        for server in servers {
            let mut client = DecisionServiceClient::connect(server.decisions.clone()).await?;
            while client.check(request_by_chain(chain)).await?.into_inner().reason != "REVOKED_SESSION" {
                if began.elapsed() > PATIENCE {
                    bail!("a replica does not deny");
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            last = Instant::now();
        }
        Ok(last)
    })
}
