//! The faults: one table of faults, and one function that runs any of them.
//!
//! During each fault, clients check sessions at every replica. One session is revoked in the store right before the fault, others
//! during it, by every route that still reaches the store. The fault continues for longer than the bound after the last revocation.
//! Then it ends, another session is revoked, and every answer is judged.
//!
//! The same rules hold for all faults. No call is permitted that began after acknowledgement and bound; no permit is usable beyond
//! them; no permit follows a denial as revoked; and the fleet recovers by itself. The time of recovery is a figure of the driver,
//! and no assertion of a test.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::checker::FaultVerdict;
use super::rig::{FaultPlan, FaultRig, ProgramPaths, STANDBYS, SYNCHRONOUS, StoreKind};
use crate::postgres;
use crate::proxy::{RouteMode, TrafficDirection};

/// Interval at which waiting commits are released.
const LET_GO_INTERVAL: Duration = Duration::from_millis(50);

/// The part that is stopped or killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultTarget {
    /// The last replica.
    Replica,
    /// The database server; for a file, its writer.
    Store,
    Proxy,
}

/// The replicas whose route to the store is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultReach {
    /// The last replica.
    One,
    All,
}

/// A fault, from its begin to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum InjectedFault {
    /// SIGSTOP, then SIGCONT. A file has no process, so its write lock is held instead by a writer that does not continue.
    Stop(FaultTarget),
    /// `kill -9`, then a new start on the same data and ports.
    Kill(FaultTarget),
    /// This mode of the proxy, then `pass`.
    Route(RouteMode, FaultReach),
    /// The primary loses its standbys, and one of them is promoted. All replicas but the last move there. The old primary still
    /// runs for the last replica, and its waiting commits are released. Then that replica moves to the new primary too.
    Failover(PrimaryRelease),
}

/// How the old primary is made to report success for a commit that no standby has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrimaryRelease {
    /// The waiting backends are cancelled repeatedly: success with a warning.
    Cancelled,
    /// The standbys are removed from its settings: success without a warning.
    Unnamed,
}

#[derive(Clone, Debug)]
pub(crate) struct FaultScenario {
    pub(crate) name: &'static str,
    pub(crate) fault: InjectedFault,
    pub(crate) kind: StoreKind,
    /// Whether the tests run the scenario too.
    pub(crate) decisive: bool,
}

/// Every scenario.
pub(crate) fn table() -> Vec<FaultScenario> {
    use {FaultReach::*, FaultTarget::*, InjectedFault::*, StoreKind::*};
    let row = |name, fault, kind| FaultScenario { name, fault, kind, decisive: false };
    let decisive = |name, fault, kind| FaultScenario { name, fault, kind, decisive: true };
    let hole = RouteMode::BlackHole;
    let at = |words: &str| RouteMode::BlackHoleAt(words.to_owned());
    vec![
        row("one replica is stopped", Stop(Replica), Notified),
        decisive("one replica is killed", Kill(Replica), Notified),
        decisive("PostgreSQL is stopped", Stop(Store), Polled),
        decisive("PostgreSQL is killed", Kill(Store), Polled),
        row("the proxy is stopped", Stop(Proxy), Notified),
        row("the proxy is killed", Kill(Proxy), Notified),
        row("20 ms later each way, one replica", Route(RouteMode::Delay(20), One), Notified),
        row("20 ms later each way, all", Route(RouteMode::Delay(20), All), Notified),
        row("200 ms later each way, one replica", Route(RouteMode::Delay(200), One), Notified),
        row("200 ms later each way, all", Route(RouteMode::Delay(200), All), Notified),
        row("cut, one replica", Route(RouteMode::Cut, One), Notified),
        row("cut, all", Route(RouteMode::Cut, All), Notified),
        row("half-closed towards the store, one replica", Route(RouteMode::HalfClose(TrafficDirection::Up), One), Notified),
        row("half-closed towards the store, all", Route(RouteMode::HalfClose(TrafficDirection::Up), All), Notified),
        row("half-closed towards the replica, one", Route(RouteMode::HalfClose(TrafficDirection::Down), One), Notified),
        row("half-closed towards the replica, all", Route(RouteMode::HalfClose(TrafficDirection::Down), All), Notified),
        row("black hole both ways, one replica", Route(hole(TrafficDirection::Both), One), Notified),
        row("black hole both ways, all", Route(hole(TrafficDirection::Both), All), Notified),
        row("questions vanish, one replica", Route(hole(TrafficDirection::Up), One), Notified),
        row("questions vanish, all", Route(hole(TrafficDirection::Up), All), Notified),
        decisive("answers vanish, one replica", Route(hole(TrafficDirection::Down), One), Notified),
        row("answers vanish, all", Route(hole(TrafficDirection::Down), All), Notified),
        row("black hole at the reading of the log, one replica", Route(at("portcullis.log"), One), Notified),
        row("black hole at the reading of the log, all", Route(at("portcullis.log"), All), Notified),
        row("black hole at every COMMIT, all", Route(at("COMMIT"), All), Notified),
        decisive(
            "failover, the old primary lives, what waits there is cancelled",
            Failover(PrimaryRelease::Cancelled),
            Replicated,
        ),
        decisive("failover, the old primary lives, its standbys are unnamed", Failover(PrimaryRelease::Unnamed), Replicated),
        row("one replica is stopped", Stop(Replica), Sqlite),
        row("one replica is killed", Kill(Replica), Sqlite),
        row("a writer stops and holds the file", Stop(Store), Sqlite),
    ]
}

impl StoreKind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            StoreKind::Notified => "PostgreSQL",
            StoreKind::Polled => "PostgreSQL, no NOTIFY",
            StoreKind::Replicated => "PostgreSQL and two standbys",
            StoreKind::Sqlite => "one SQLite file",
        }
    }
}

/// Runs one scenario; returns the judgement of its clients' answers.
///
/// # Errors
/// If the fleet does not recover in time, a revocation is refused that should not be or acknowledged that must not be, or a process
/// does not start. Wrong permits are no error here: the verdict reports them.
pub(crate) fn run(programs: &ProgramPaths, plan: FaultPlan, scenario: &FaultScenario) -> Result<FaultVerdict> {
    let mut rig = FaultRig::start(programs, plan, scenario.kind)?;
    let all: Vec<usize> = (0..plan.replicas).collect();
    let last = plan.replicas.saturating_sub(1);
    rig.kill_at(0).context("before the fault")?;
    rig.kill_in_store().context("before the fault")?;
    begin(&mut rig, &scenario.fault, &all, last)?;
    if let InjectedFault::Failover(how) = scenario.fault {
        fail_over(&mut rig, last, how)?;
    } else {
        kill_meanwhile(&mut rig, &scenario.fault)?;
    }
    let over = rig.last_kill().unwrap_or_else(Instant::now) + plan.bound + plan.margin;
    while Instant::now() < over {
        if let InjectedFault::Failover(how) = scenario.fault {
            let_go(rig.server(0)?, how);
        }
        std::thread::sleep(LET_GO_INTERVAL);
    }
    let undone = undo(&mut rig, &scenario.fault, &all, last)?;
    let fresh_again = rig.until_fresh(&all, undone)?;
    rig.kill_at(0).context("once the fault is over")?;
    rig.until_known()?;
    Ok(FaultVerdict { fresh_again, ..rig.judge() })
}

/// The replicas that a fault of routes affects.
fn hit(reach: FaultReach, all: &[usize], last: usize) -> Vec<usize> {
    if reach == FaultReach::One { vec![last] } else { all.to_vec() }
}

fn begin(rig: &mut FaultRig, fault: &InjectedFault, all: &[usize], last: usize) -> Result<()> {
    match fault {
        InjectedFault::Stop(FaultTarget::Replica) => rig.replica(last)?.signal(Signal::STOP)?,
        InjectedFault::Kill(FaultTarget::Replica) => rig.replica(last)?.kill()?,
        InjectedFault::Stop(FaultTarget::Store) if rig.servers.is_empty() => rig.hold_file()?,
        InjectedFault::Stop(FaultTarget::Store) => rig.server(0)?.freeze(true),
        InjectedFault::Kill(FaultTarget::Store) => rig.server(0)?.kill(),
        InjectedFault::Stop(FaultTarget::Proxy) => signal_proxy(rig, Signal::STOP)?,
        InjectedFault::Kill(FaultTarget::Proxy) => rig.proxy()?.kill(),
        InjectedFault::Route(mode, reach) => rig.set(&hit(*reach, all, last), mode)?,
        // The route between the primary and its standbys.
        InjectedFault::Failover(_) => rig.proxy()?.set_mode(0, &RouteMode::BlackHole(TrafficDirection::Both)),
    }
    Ok(())
}

/// Ends the fault; returns when it ended.
fn undo(rig: &mut FaultRig, fault: &InjectedFault, all: &[usize], last: usize) -> Result<Instant> {
    let now = Instant::now();
    match fault {
        InjectedFault::Stop(FaultTarget::Replica) => rig.replica(last)?.signal(Signal::CONT)?,
        InjectedFault::Kill(FaultTarget::Replica) => rig.replica(last)?.start(None)?,
        InjectedFault::Stop(FaultTarget::Store) if rig.servers.is_empty() => rig.release_file(),
        InjectedFault::Stop(FaultTarget::Store) => rig.server(0)?.freeze(false),
        InjectedFault::Kill(FaultTarget::Store) => rig.server(0)?.restart(),
        InjectedFault::Stop(FaultTarget::Proxy) => signal_proxy(rig, Signal::CONT)?,
        InjectedFault::Kill(FaultTarget::Proxy) => rig.proxy()?.restart(),
        InjectedFault::Route(_, reach) => rig.set(&hit(*reach, all, last), &RouteMode::Pass)?,
        InjectedFault::Failover(_) => rig.point(last, promoted(rig)?)?,
    }
    // The time of a replica counts from its start; the time of a store or a route counts from its return.
    Ok(if *fault == InjectedFault::Kill(FaultTarget::Replica) { now } else { Instant::now() })
}

fn signal_proxy(rig: &mut FaultRig, signal: Signal) -> Result<()> {
    let pid = i32::try_from(rig.proxy()?.id()).ok().and_then(Pid::from_raw);
    let Some(pid) = pid else { bail!("the proxy is killed") };
    Ok(kill_process(pid, signal)?)
}

/// Revokes sessions during the fault where that is possible: in the store past the proxy, and at a replica that still reaches it.
fn kill_meanwhile(rig: &mut FaultRig, fault: &InjectedFault) -> Result<()> {
    if matches!(fault, InjectedFault::Stop(FaultTarget::Store) | InjectedFault::Kill(FaultTarget::Store)) {
        return Ok(());
    }
    rig.kill_in_store()?;
    // Revokes again later in the fault, when bytes that were on their way at its begin are gone.
    std::thread::sleep(Duration::from_millis(500));
    rig.kill_in_store()?;
    let reaches = matches!(
        fault,
        InjectedFault::Stop(FaultTarget::Replica)
            | InjectedFault::Kill(FaultTarget::Replica)
            | InjectedFault::Route(_, FaultReach::One)
    );
    if reaches { rig.kill_at(0) } else { Ok(()) }
}

/// Promotes the standby that received more, lets the other one follow it, and moves all replicas but the last there.
fn fail_over(rig: &mut FaultRig, last: usize, how: PrimaryRelease) -> Result<()> {
    let (one, other) = (1, 2);
    // Bytes left in their sockets could let the follower get ahead of the promoted standby.
    for standby in [one, other] {
        rig.until_detached(standby)?;
    }
    let further = if rig.server(other)?.received_log_bytes() > rig.server(one)?.received_log_bytes() { other } else { one };
    let follows = one + other - further;
    let name = STANDBYS.get(follows - 1).copied().unwrap_or_default();
    rig.server(further)?.change_setting(&format!("synchronous_standby_names = '{SYNCHRONOUS}'"));
    rig.server(follows)?.follow(name, rig.server(further)?.port());
    rig.server(further)?.promote();
    rig.until_followed(further, 1)?;
    for replica in 0..last {
        rig.point(replica, further)?;
    }
    rig.reopen(further)?;
    rig.kill_in_store().context("at the server that was promoted")?;
    let there: Vec<usize> = (0..last).collect();
    rig.until_fresh(&there, Instant::now())?;
    rig.kill_at(0).context("at a replica that goes to the server that was promoted")?;
    // An act at the old primary must not be acknowledged, whether its commit is released or not, because no other server will ever
    // have it.
    let servers = std::mem::take(&mut rig.servers);
    let refused = std::thread::scope(|scope| {
        let (go_on, stopped) = sync_channel::<()>(1);
        let old = servers.first();
        scope.spawn(move || {
            while stopped.recv_timeout(LET_GO_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                old.into_iter().for_each(|old| let_go(old, how));
            }
        });
        let refused = rig.kill_refused(last);
        drop(go_on);
        refused
    });
    rig.servers = servers;
    refused.map(drop)
}

/// The standby that was promoted.
fn promoted(rig: &FaultRig) -> Result<usize> {
    for number in 1..rig.servers.len() {
        if rig.server(number)?.sql("postgres", "SELECT pg_is_in_recovery()") == "f" {
            return Ok(number);
        }
    }
    bail!("no standby was promoted")
}

/// Makes every commit that waits for a standby succeed.
fn let_go(server: &postgres::PostgresServer, how: PrimaryRelease) {
    const CANCEL: &str = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    match how {
        // A backend that has ended needs no cancel.
        PrimaryRelease::Cancelled => drop(server.try_sql("postgres", CANCEL)),
        PrimaryRelease::Unnamed => server.change_setting("synchronous_standby_names = ''"),
    }
}
