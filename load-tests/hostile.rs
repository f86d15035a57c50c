//! The effect of a stranger who may connect on all other callers: memory, a good caller's latency, and whether a revocation still
//! arrives.
//!
//! The attacker is a process of its own, `load attacker NAME`, at the lowest priority, so that it competes for the server's
//! resources and not for the processor. It stops when its standard input ends, or after a minute. Look next at
//! `hostile/attacks.rs`.

mod attacks;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use portcullis::api::r#gen as wire;
use tonic::transport::Channel;
use wire::decision_service_client::DecisionServiceClient;
use wire::fleet_service_client::FleetServiceClient;
use wire::revocation_service_client::RevocationServiceClient;

use super::calls::{request_by_chain, signed};
use super::client::{CallKind, CallTally, LoadClient};
use super::server::ServerProcess;
use super::zipf::ZipfDistribution;

pub(crate) use attacks::{AS_ATTACKER, Attack, attack, table};

/// How long the good caller is measured before and after.
const PEACE: Duration = Duration::from_secs(3);
/// How long the attack runs before the measurement begins.
const RUN_UP: Duration = Duration::from_secs(1);
/// Length of the intervals in which the good caller is measured during the attack.
const PIECE: Duration = Duration::from_millis(250);
/// Intervals before the revocation, and all of them.
const PIECES_BEFORE_KILL: usize = 8;
const PIECES: usize = 24;
/// A revocation that takes longer has failed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// A probe that takes longer has failed, as it would for a kubelet.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// Interval between readings of the resident memory.
const SAMPLE_EVERY: Duration = Duration::from_millis(10);

/// The results of an attack.
pub(crate) struct AttackOutcome {
    /// The attacker's report of its progress.
    pub(crate) reached: String,
    pub(crate) resident_before_kib: u64,
    pub(crate) resident_peak_kib: u64,
    pub(crate) before: CallTally,
    pub(crate) during: CallTally,
    pub(crate) after: CallTally,
    /// From the operator's first packet, on a new connection, to the first denial on another new connection.
    pub(crate) kill: Result<Duration>,
    /// The slowest answer of `/livez` during the attack.
    pub(crate) probe: Result<Duration>,
    /// Audit bytes a second during the attack.
    pub(crate) audit_bytes_per_s: u64,
}

/// The server under attack, and the callers during it.
pub(crate) struct AttackSetup<'a> {
    pub(crate) binary: &'a Path,
    pub(crate) policy: &'a str,
    pub(crate) chains: &'a [Vec<Bytes>],
    /// A chain whose session is revoked, and that session.
    pub(crate) doomed: (&'a [Bytes], String),
    pub(crate) rate: u64,
}

/// Runs one attack against a server of its own.
pub(crate) fn run(scene: &AttackSetup<'_>, attack: Attack) -> Result<AttackOutcome> {
    let server = ServerProcess::start(scene.binary, scene.policy)?;
    let client = LoadClient::open(&server.decisions, scene.chains, 2)?;
    let zipf = ZipfDistribution::new(scene.chains.len());
    let measure = |length| client.open_loop(CallKind::CheckByChain, scene.rate, length, &zipf);
    let before = measure(PEACE)?;
    let resident_before_kib = server.resident_kib()?;
    let (over, peak_kib) = (AtomicBool::new(false), AtomicU64::new(resident_before_kib));
    let (audit_before, began) = (server.audit_bytes()?, Instant::now());
    let mut attacker = AttackerProcess::start(attack, &server)?;
    let mut during = CallTally::new()?;
    let (kill, probe) = std::thread::scope(|scope| {
        let sampling = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                if let Ok(kib) = server.resident_kib() {
                    peak_kib.fetch_max(kib, Ordering::Relaxed);
                }
                std::thread::sleep(SAMPLE_EVERY);
            }
        });
        let probing = scope.spawn(|| probes(&server.http, &over));
        std::thread::sleep(RUN_UP);
        let mut killing = None;
        for piece in 0..PIECES {
            if piece == PIECES_BEFORE_KILL {
                killing = Some(scope.spawn(|| kill(&server, &scene.doomed)));
            }
            if let Ok(tally) = measure(PIECE) {
                during.add(&tally)?;
            }
        }
        let killed = killing.context("no kill was tried")?.join();
        over.store(true, Ordering::Relaxed);
        // The sampler returns nothing and the prober its figure. Either fails only by a panic.
        let _ = sampling.join();
        let probed = probing.join();
        let died = |_| anyhow::anyhow!("a thread died");
        anyhow::Ok((killed.map_err(died).and_then(|killed| killed), probed.map_err(died).and_then(|probed| probed)))
    })?;
    let elapsed_s = began.elapsed().as_secs().max(1);
    let audit_bytes_per_s = server.audit_bytes()?.saturating_sub(audit_before) / elapsed_s;
    let reached = attacker.stop();
    let after = measure(PEACE)?;
    let resident_peak_kib = peak_kib.load(Ordering::Relaxed);
    Ok(AttackOutcome { reached, resident_before_kib, resident_peak_kib, before, during, after, kill, probe, audit_bytes_per_s })
}

/// The attacking process; killed on drop.
struct AttackerProcess(Child);

impl AttackerProcess {
    fn start(attack: Attack, server: &ServerProcess) -> Result<Self> {
        let own = std::env::current_exe()?;
        let child = Command::new("nice")
            .args(["-n", "19"])
            .arg(own)
            .args([AS_ATTACKER, attack.name, &server.decisions, &server.admin])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("the attacker cannot be started: it needs `nice`")?;
        Ok(Self(child))
    }

    /// Ends the process and returns its report.
    fn stop(&mut self) -> String {
        drop(self.0.stdin.take());
        let mut said = String::new();
        if let Some(out) = self.0.stdout.as_mut() {
            // Without a report the progress is not known.
            let _ = out.read_to_string(&mut said);
        }
        let _ = self.0.wait();
        said.trim().to_owned()
    }
}

impl Drop for AttackerProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The operator's steps: a new connection, a signed act, and then a denial for a client that has never asked before.
fn kill(server: &ServerProcess, doomed: &(&[Bytes], String)) -> Result<Duration> {
    let (chain, session) = doomed;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let key = server.operator_key()?;
    let work = async {
        let sent = Instant::now();
        loop {
            let tried = async {
                let channel = Channel::from_shared(server.admin.clone())?.connect().await?;
                let info = FleetServiceClient::new(channel.clone()).info(wire::InfoRequest {}).await?.into_inner();
                RevocationServiceClient::new(channel).revoke(signed(&key, &info.history_id, session.clone())?).await?;
                anyhow::Ok(())
            };
            // An operator tries again.
            match tried.await {
                Ok(()) => break,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        let mut client = DecisionServiceClient::connect(server.decisions.clone()).await?;
        while client.check(request_by_chain(chain)).await?.into_inner().reason != "REVOKED_SESSION" {}
        anyhow::Ok(sent.elapsed())
    };
    runtime
        .block_on(async { tokio::time::timeout(KILL_PATIENCE, work).await })
        .context("the kill did not come through in 10 s")?
}

/// Requests `/livez` on new connections until `over` is set; returns the slowest answer.
fn probes(http: &str, over: &AtomicBool) -> Result<Duration> {
    let address = http.trim_start_matches("http://");
    let mut slowest = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        let mut socket = TcpStream::connect_timeout(&address.parse()?, PROBE_PATIENCE).context("no probe can connect")?;
        socket.set_read_timeout(Some(PROBE_PATIENCE))?;
        write!(socket, "GET /livez HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).context("a probe was not answered in 1 s")?;
        anyhow::ensure!(
            answer.starts_with("HTTP/1.1 200"),
            "a probe was answered `{}`",
            answer.lines().next().unwrap_or_default()
        );
        slowest = slowest.max(began.elapsed());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(slowest)
}
