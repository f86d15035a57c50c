//! The load clients: one thread each with its connections, requests prepared beforehand, and three ways to send them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use hdrhistogram::Histogram;
use portcullis::api::r#gen as wire;
use portcullis::model::limits::HANDLE_LIFETIME_MS;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use wire::check_request::Credential;
use wire::decision_service_client::DecisionServiceClient;
use wire::noop_service_client::NoopServiceClient;

use super::calls::request_by_chain;
use super::zipf::ZipfDistribution;

/// The kind of a call: its method, and whether it sends the chain or a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallKind {
    CheckByHandle,
    NoopByHandle,
    CheckByChain,
    NoopByChain,
}

/// The results of a turn.
#[derive(Debug)]
pub(crate) struct CallTally {
    pub(crate) permits: u64,
    /// Calls with any other result: a gRPC status or another effect.
    pub(crate) failures: u64,
    pub(crate) latency_ns: Histogram<u64>,
}

impl CallTally {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { permits: 0, failures: 0, latency_ns: histogram()? })
    }

    pub(crate) fn add(&mut self, other: &CallTally) -> Result<()> {
        self.permits += other.permits;
        self.failures += other.failures;
        self.latency_ns.add(&other.latency_ns)?;
        Ok(())
    }

    fn count(&mut self, permitted: bool, since: Instant) {
        if permitted {
            self.permits += 1;
        } else {
            self.failures += 1;
        }
        self.latency_ns.saturating_record(u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}

/// A histogram of nanoseconds up to one minute. Larger values count as one minute.
pub(crate) fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

/// Longest time of sending before handles may have to be renewed. A longer turn is measured in parts.
const PART_MAX: Duration = Duration::from_secs(30);
/// Calls in flight while handles are requested.
const RENEWALS_IN_FLIGHT: usize = 32;

/// Splits a turn into parts, each short enough for handles that were renewed right before it.
pub(crate) fn parts(turn: Duration) -> impl Iterator<Item = Duration> {
    let whole = u64::try_from(turn.as_nanos() / PART_MAX.as_nanos()).unwrap_or(u64::MAX);
    let rest = turn.saturating_sub(PART_MAX.saturating_mul(u32::try_from(whole).unwrap_or(u32::MAX)));
    (0..whole).map(|_| PART_MAX).chain((!rest.is_zero()).then_some(rest))
}

/// A client: the runtime of one thread, and its connections.
pub(crate) struct LoadClient {
    runtime: Runtime,
    connections: Vec<Arc<LoadConnection>>,
    /// When the oldest handle was requested.
    renewed_at: Instant,
}

/// One connection, with a request by chain and one by handle for each chain.
struct LoadConnection {
    check: DecisionServiceClient<Channel>,
    noop: NoopServiceClient<Channel>,
    by_chain: Vec<wire::CheckRequest>,
    by_handle: Vec<wire::CheckRequest>,
}

impl LoadClient {
    /// Connects, and checks every chain once, so that all chains are verified and each has its handle.
    pub(crate) fn open(target: &str, chains: &[Vec<Bytes>], connections: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let renewed_at = Instant::now();
        let connections = runtime.block_on(async {
            let mut open = Vec::new();
            for _ in 0..connections {
                open.push(Arc::new(LoadConnection::open(target, chains).await?));
            }
            anyhow::Ok(open)
        })?;
        Ok(Self { runtime, connections, renewed_at })
    }

    /// Requests new handles if the current ones could expire within a part that begins now. This is not measured.
    pub(crate) fn renew(&mut self, part: Duration) -> Result<()> {
        // The server counts from the moment it made a handle, which is later than the moment of the request.
        let lifetime = Duration::from_millis(HANDLE_LIFETIME_MS.unsigned_abs());
        if self.renewed_at.elapsed() + part + part / 2 < lifetime {
            return Ok(());
        }
        self.renewed_at = Instant::now();
        for connection in &mut self.connections {
            let connection = Arc::get_mut(connection).context("a call is left over from the last turn")?;
            connection.by_handle = self.runtime.block_on(handles(&connection.check, &connection.by_chain))?;
        }
        Ok(())
    }

    /// Open loop: sends at intended times, whatever the answers do. Latency counts from the intended time.
    pub(crate) fn open_loop(&self, kind: CallKind, rate: u64, length: Duration, zipf: &ZipfDistribution) -> Result<CallTally> {
        let count = rate.saturating_mul(length.as_millis().try_into()?) / 1000;
        let (sender, mut receiver) = mpsc::channel(65_536);
        let mut draw = zipf.drawer(count);
        let start = Instant::now() + Duration::from_millis(5);
        // The pacing uses a thread of its own, because tokio's timers have a grain of 1 ms.
        let pacer = std::thread::spawn(move || {
            for number in 0..count {
                let due = start + Duration::from_nanos(number.saturating_mul(1_000_000_000) / rate.max(1));
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                if sender.blocking_send((due, number, draw.next())).is_err() {
                    break;
                }
            }
        });
        let tally = Arc::new(Mutex::new(CallTally::new()?));
        self.runtime.block_on(async {
            let mut tasks = JoinSet::new();
            while let Some((due, number, token)) = receiver.recv().await {
                let Some(connection) = self.connection(number) else { continue };
                let tally = tally.clone();
                tasks.spawn(async move {
                    let permitted = connection.call(kind, token).await;
                    tally.lock().unwrap_or_else(PoisonError::into_inner).count(permitted, due);
                });
                while tasks.try_join_next().is_some() {}
            }
            while tasks.join_next().await.is_some() {}
        });
        if pacer.join().is_err() {
            bail!("the pacer died");
        }
        Ok(Arc::into_inner(tally).context("a task is left")?.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Closed loop: keeps this many calls in flight.
    pub(crate) fn closed_loop(
        &self,
        kind: CallKind,
        in_flight: u64,
        length: Duration,
        zipf: &ZipfDistribution,
    ) -> Result<CallTally> {
        self.runtime.block_on(async {
            let end = Instant::now() + length;
            let mut tasks = JoinSet::new();
            for number in 0..in_flight {
                let connection = self.connection(number).context("no connection")?;
                let mut draw = zipf.drawer(number);
                let mut tally = CallTally::new()?;
                tasks.spawn(async move {
                    loop {
                        let since = Instant::now();
                        if since >= end {
                            return tally;
                        }
                        let permitted = connection.call(kind, draw.next()).await;
                        tally.count(permitted, since);
                    }
                });
            }
            let mut sum = CallTally::new()?;
            while let Some(tally) = tasks.join_next().await {
                sum.add(&tally?)?;
            }
            Ok(sum)
        })
    }

    /// Keeps this many messages in flight on one stream for each connection.
    pub(crate) fn stream(
        &self,
        kind: CallKind,
        in_flight: usize,
        length: Duration,
        zipf: &ZipfDistribution,
    ) -> Result<CallTally> {
        self.runtime.block_on(async {
            let mut sum = CallTally::new()?;
            let runs = self.connections.iter().map(|connection| connection.stream(kind, in_flight, length, zipf));
            for tally in futures_util::future::join_all(runs).await {
                sum.add(&tally?)?;
            }
            Ok(sum)
        })
    }

    fn connection(&self, number: u64) -> Option<Arc<LoadConnection>> {
        let index = usize::try_from(number).unwrap_or(0) % self.connections.len().max(1);
        self.connections.get(index).cloned()
    }
}

/// Checks every chain once; returns the requests by the handles that came back, in the same order.
async fn handles(check: &DecisionServiceClient<Channel>, by_chain: &[wire::CheckRequest]) -> Result<Vec<wire::CheckRequest>> {
    let asked = by_chain.iter().map(|request| {
        let mut check = check.clone();
        async move {
            let answer = check.check(wire::CheckRequest { want_handle: true, ..request.clone() }).await?.into_inner();
            if answer.effect() != wire::Effect::Permit || answer.handle.is_empty() {
                bail!("no permit with a handle but {:?} {}", answer.effect(), answer.reason);
            }
            Ok(wire::CheckRequest { credential: Some(Credential::Handle(answer.handle)), ..request.clone() })
        }
    });
    futures_util::stream::iter(asked).buffered(RENEWALS_IN_FLIGHT).try_collect().await
}

impl LoadConnection {
    async fn open(target: &str, chains: &[Vec<Bytes>]) -> Result<Self> {
        let channel = Channel::from_shared(target.to_owned())?.connect().await?;
        let check = DecisionServiceClient::new(channel.clone());
        let by_chain: Vec<_> = chains.iter().map(|chain| request_by_chain(chain)).collect();
        let by_handle = handles(&check, &by_chain).await?;
        Ok(Self { check, noop: NoopServiceClient::new(channel), by_chain, by_handle })
    }

    fn request(&self, kind: CallKind, token: usize) -> Option<wire::CheckRequest> {
        match kind {
            CallKind::CheckByHandle | CallKind::NoopByHandle => self.by_handle.get(token).cloned(),
            CallKind::CheckByChain | CallKind::NoopByChain => self.by_chain.get(token).cloned(),
        }
    }

    /// Whether the call was answered with a permit.
    async fn call(&self, kind: CallKind, token: usize) -> bool {
        let Some(request) = self.request(kind, token) else { return false };
        let answer = match kind {
            CallKind::CheckByHandle | CallKind::CheckByChain => self.check.clone().check(request).await,
            CallKind::NoopByHandle | CallKind::NoopByChain => self.noop.clone().noop(request).await,
        };
        answer.is_ok_and(|answer| answer.into_inner().effect() == wire::Effect::Permit)
    }

    async fn stream(&self, kind: CallKind, in_flight: usize, length: Duration, zipf: &ZipfDistribution) -> Result<CallTally> {
        let (sender, receiver) = mpsc::channel(in_flight);
        let mut draw = zipf.drawer(7);
        let mut sent = VecDeque::new();
        for _ in 0..in_flight {
            sent.push_back(Instant::now());
            sender.send(self.request(kind, draw.next()).context("no such token")?).await?;
        }
        let mut sender = Some(sender);
        let requests = ReceiverStream::new(receiver);
        let answers = match kind {
            CallKind::CheckByHandle | CallKind::CheckByChain => self.check.clone().check_stream(requests).await?,
            CallKind::NoopByHandle | CallKind::NoopByChain => self.noop.clone().noop_stream(requests).await?,
        };
        let mut answers = answers.into_inner();
        let end = Instant::now() + length;
        let mut tally = CallTally::new()?;
        while let Some(answer) = answers.next().await {
            let since = sent.pop_front().context("an answer too many")?;
            tally.count(answer?.effect() == wire::Effect::Permit, since);
            let now = Instant::now();
            if now >= end {
                sender = None;
            }
            if let Some(sender) = &sender {
                sent.push_back(now);
                sender.send(self.request(kind, draw.next()).context("no such token")?).await?;
            }
        }
        Ok(tally)
    }
}
