//! How long a revoked session stays usable in a fleet: from the acknowledged `Revoke` to the first denial of the *last* replica.
//!
//! Every replica gets checks of the session at a steady rate, which is the load. `Revoke` goes to each replica in turn. After its
//! first denial a replica must not permit again. PostgreSQL runs as a server of its own in `/tmp`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use hdrhistogram::Histogram;
use portcullis::api::r#gen as wire;
use portcullis::model::time::SystemClock;
use portcullis::store::sqlite::SqliteStore;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tonic::transport::Channel;
use wire::decision_service_client::DecisionServiceClient;
use wire::fleet_service_client::FleetServiceClient;
use wire::revocation_service_client::RevocationServiceClient;

use super::calls::{request_by_chain, signed};
use super::client::histogram;
use super::kill::PATIENCE;
use super::server::ServerProcess;

/// The freshness bound of a new store. No replica may permit after it.
const BOUND: Duration = Duration::from_secs(5);

/// The results of a run.
pub(crate) struct FleetKillReport {
    pub(crate) first_ns: Histogram<u64>,
    pub(crate) last_ns: Histogram<u64>,
    pub(crate) checks: u64,
    /// Permits of calls that began after the acknowledgement and the bound.
    pub(crate) late_permits: u64,
    /// Permits of a replica that had denied before.
    pub(crate) back: u64,
}

/// Starts replicas on a store. The first one applies the policy.
pub(crate) fn start(binary: &Path, policy: &str, store: &str, replicas: usize) -> Result<Vec<ServerProcess>> {
    let environment = [("PORTCULLIS_STORE", store), ("PORTCULLIS_STORE_DURABILITY", "single")];
    let environment = if store.starts_with("sqlite:") { environment.get(..1) } else { environment.get(..) };
    let environment = environment.unwrap_or_default();
    if let Some(path) = store.strip_prefix("sqlite:") {
        drop(SqliteStore::open(Path::new(path), Arc::new(SystemClock))?);
    }
    (0..replicas).map(|number| ServerProcess::start_with(binary, (number == 0).then_some(policy), environment)).collect()
}

/// Revokes the session of each chain, one after the other, with `rate` checks a second over all replicas.
pub(crate) fn run(
    servers: &[ServerProcess],
    chains: &[Vec<Bytes>],
    session: impl Fn(usize) -> String,
    rate: u64,
) -> Result<FleetKillReport> {
    let key = servers.first().context("no replica")?.operator_key()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let (mut decisions, mut admins) = (Vec::new(), Vec::new());
        for server in servers {
            decisions.push(DecisionServiceClient::connect(server.decisions.clone()).await?);
            admins.push(Channel::from_shared(server.admin.clone())?.connect().await?);
        }
        let one = admins.first().cloned().context("no replica")?;
        let history = FleetServiceClient::new(one).info(wire::InfoRequest {}).await?.into_inner().history_id;
        let every = Duration::from_micros(1_000_000 * servers.len() as u64 / rate.max(1));
        let mut fleet = FleetKillReport { first_ns: histogram()?, last_ns: histogram()?, checks: 0, late_permits: 0, back: 0 };
        for (number, chain) in chains.iter().enumerate() {
            let (answered_out, answered) = watch::channel(None);
            let (alive_out, mut alive) = tokio::sync::mpsc::channel(servers.len());
            let mut watchers = JoinSet::new();
            for client in &decisions {
                watchers.spawn(watch_one(client.clone(), chain.clone(), every, answered.clone(), alive_out.clone()));
            }
            drop(alive_out);
            for _ in servers {
                alive.recv().await.context("a replica never saw the session alive")?;
            }
            let request = signed(&key, &history, session(number))?;
            let admin = admins.get(number % admins.len()).cloned().context("no replica")?;
            RevocationServiceClient::new(admin).revoke(request).await?;
            let acknowledged = Instant::now();
            answered_out.send_replace(Some(acknowledged));
            let (mut first, mut last) = (Duration::MAX, Duration::ZERO);
            while let Some(seen) = watchers.join_next().await {
                let seen = seen??;
                let took = seen.denied.saturating_duration_since(acknowledged);
                (first, last) = (first.min(took), last.max(took));
                fleet.checks += seen.checks;
                fleet.late_permits += seen.late_permits;
                fleet.back += seen.back;
            }
            fleet.first_ns.saturating_record(u64::try_from(first.as_nanos())?);
            fleet.last_ns.saturating_record(u64::try_from(last.as_nanos())?);
        }
        Ok(fleet)
    })
}

struct ReplicaObservation {
    denied: Instant,
    checks: u64,
    late_permits: u64,
    back: u64,
}

/// Checks a session at one replica until it has been denied for a while.
async fn watch_one(
    mut client: DecisionServiceClient<Channel>,
    chain: Vec<Bytes>,
    every: Duration,
    answered: watch::Receiver<Option<Instant>>,
    alive: tokio::sync::mpsc::Sender<()>,
) -> Result<ReplicaObservation> {
    const DENIALS: u64 = 20;
    let request = request_by_chain(&chain);
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut denied, mut denials, mut checks, mut late_permits, mut back) = (None, 0, 0, 0, 0);
    let began = Instant::now();
    while denials < DENIALS || answered.borrow().is_none() {
        ticks.tick().await;
        let asked = Instant::now();
        let answer = client.check(request.clone()).await?.into_inner();
        checks += 1;
        match (answer.effect(), answer.reason.as_str()) {
            (wire::Effect::Permit, _) => {
                back += u64::from(denied.is_some());
                late_permits += u64::from(answered.borrow().is_some_and(|at| asked > at + BOUND));
                if checks == 1 {
                    alive.send(()).await.context("the operator is gone")?;
                }
            }
            (wire::Effect::Deny, "REVOKED_SESSION") if checks > 1 => {
                denied.get_or_insert_with(Instant::now);
                denials += 1;
            }
            (_, reason) => bail!("not the denial that was asked for: {reason}"),
        }
        if began.elapsed() > PATIENCE {
            bail!("no denial came after a kill");
        }
    }
    Ok(ReplicaObservation { denied: denied.context("no denial")?, checks, late_permits, back })
}
