//! How long a revoked session stays usable: from the acknowledged `Revoke` to the first denial that a client sees.
//!
//! The client checks the session in a tight loop on a connection of its own. The operator signs each act.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use hdrhistogram::Histogram;
use portcullis::api::r#gen as wire;
use tonic::transport::Channel;
use wire::decision_service_client::DecisionServiceClient;
use wire::fleet_service_client::FleetServiceClient;
use wire::revocation_service_client::RevocationServiceClient;

use super::calls::{request_by_chain, signed};
use super::client::histogram;
use super::server::ServerProcess;

/// A revocation that takes longer is an error, not a figure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct KillReport {
    /// From the answer to `Revoke`. An earlier denial counts as 0.
    pub(crate) from_answer_ns: Histogram<u64>,
    /// From the moment `Revoke` was sent.
    pub(crate) from_request_ns: Histogram<u64>,
    /// Denials that the client saw before the operator had the answer.
    pub(crate) before_answer: u64,
}

/// Revokes the session of each chain, one after the other.
pub(crate) fn run(server: &ServerProcess, chains: &[Vec<Bytes>], session: impl Fn(usize) -> String) -> Result<KillReport> {
    let (alive_out, alive) = sync_channel(1);
    let (denied_out, denied) = sync_channel(1);
    let (target, asked) = (server.decisions.clone(), chains.to_vec());
    let poller = std::thread::spawn(move || poll(&target, &asked, &alive_out, &denied_out));
    let outcome = kill_all(server, chains.len(), session, &alive, &denied);
    drop((alive, denied));
    let Ok(polled) = poller.join() else { bail!("the polling thread died") };
    // If the client ended early, its own error says more than the missing answer.
    match (polled, outcome) {
        (Err(error), _) => Err(error),
        (Ok(()), outcome) => outcome,
    }
}

fn kill_all(
    server: &ServerProcess,
    count: usize,
    session: impl Fn(usize) -> String,
    alive: &Receiver<()>,
    denied: &Receiver<Instant>,
) -> Result<KillReport> {
    let key = server.operator_key()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut kills = KillReport { from_answer_ns: histogram()?, from_request_ns: histogram()?, before_answer: 0 };
    let channel = runtime.block_on(async { anyhow::Ok(Channel::from_shared(server.admin.clone())?.connect().await?) })?;
    let info = runtime.block_on(FleetServiceClient::new(channel.clone()).info(wire::InfoRequest {}))?;
    let history = info.into_inner().history_id;
    for number in 0..count {
        alive.recv_timeout(PATIENCE).context("the client never saw the session alive")?;
        let request = signed(&key, &history, session(number))?;
        let sent = Instant::now();
        runtime.block_on(RevocationServiceClient::new(channel.clone()).revoke(request))?;
        let answered = Instant::now();
        let denied = denied.recv_timeout(PATIENCE).context("no denial came after a kill")?;
        let ns = |since: Instant| u64::try_from(denied.saturating_duration_since(since).as_nanos()).unwrap_or(u64::MAX);
        kills.before_answer += u64::from(denied < answered);
        kills.from_answer_ns.saturating_record(ns(answered));
        kills.from_request_ns.saturating_record(ns(sent));
    }
    Ok(kills)
}

/// Checks one session until it is denied, then the next.
fn poll(target: &str, chains: &[Vec<Bytes>], alive: &SyncSender<()>, denied: &SyncSender<Instant>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = DecisionServiceClient::connect(target.to_owned()).await?;
        for chain in chains {
            let request = request_by_chain(chain);
            let first = client.check(request.clone()).await?.into_inner();
            if first.effect() != wire::Effect::Permit {
                bail!("a session is dead before its kill: {}", first.reason);
            }
            alive.send(()).context("the operator is gone")?;
            let started = Instant::now();
            loop {
                let answer = client.check(request.clone()).await?.into_inner();
                match (answer.effect(), answer.reason.as_str()) {
                    (wire::Effect::Permit, _) if started.elapsed() < PATIENCE => {}
                    (wire::Effect::Deny, "REVOKED_SESSION") => break,
                    (_, reason) => bail!("not the denial that was asked for: {reason}"),
                }
            }
            denied.send(Instant::now()).context("the operator is gone")?;
        }
        Ok(())
    })
}
