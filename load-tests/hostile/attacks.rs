//! The attacks: each does one thing as fast as it may, on loopback only, until it is told to stop.
//!
//! They speak HTTP/2 by hand where a well-behaved client could not do the attack. Their connections, streams and time are bounded.

use std::io::Read as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::{Builder, SendRequest};
use portcullis::api::r#gen as wire;
use portcullis::model::time::{Clock as _, SystemClock};
use portcullis::token::PrivateKey;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use wire::decision_service_client::DecisionServiceClient;
use wire::revocation_service_client::RevocationServiceClient;

use super::super::calls::{request_by_chain, signed};
use super::super::fixture::{CompanyFixture, session};

/// The first argument that makes the driver an attacker.
pub(crate) const AS_ATTACKER: &str = "attacker";

/// Longest run of an attacker.
const LIFE: Duration = Duration::from_secs(60);
/// A message just below the largest that the server accepts.
const MESSAGE_BYTES: usize = 4 * 1024 * 1024 - 64;
/// Pause after a connection that was cut or refused.
const PAUSE: Duration = Duration::from_millis(20);
/// First number of the chains that the server has not seen.
const STRANGERS: usize = 1_000_000;

type AttackFuture = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// One attack.
#[derive(Clone, Copy)]
pub(crate) struct Attack {
    pub(crate) name: &'static str,
    /// The unit of its count, for the report.
    counts: &'static str,
    /// How many copies run at the same time.
    copies: usize,
    run: fn(AttackTarget) -> AttackFuture,
}

/// The addresses of the server, and the count of the attack.
#[derive(Clone)]
struct AttackTarget {
    decisions: String,
    admin: String,
    copy: usize,
    count: Arc<AtomicU64>,
}

impl AttackTarget {
    fn add(&self, count: usize) {
        self.count.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Every attack, in the order of the report.
pub(crate) fn table() -> Vec<Attack> {
    fn row(name: &'static str, counts: &'static str, copies: usize, run: fn(AttackTarget) -> AttackFuture) -> Attack {
        Attack { name, counts, copies, run }
    }
    vec![
        row("nothing", "", 1, |_| Box::pin(std::future::pending())),
        row("unfinished batches of 4 MiB", "bytes sent", 8, |target| {
            let address = target.decisions.clone();
            Box::pin(unfinished(target, address, "/portcullis.v1.DecisionService/CheckBatch"))
        }),
        row("unfinished unsigned acts of 4 MiB", "bytes sent", 8, |target| {
            let address = target.admin.clone();
            Box::pin(unfinished(target, address, "/portcullis.v1.PolicyService/Apply"))
        }),
        row("batches of 2 million empty calls", "batches answered", 8, |target| Box::pin(empty_batches(target))),
        row("idle connections, administration", "connections opened", 300, |target| {
            let address = target.admin.clone();
            Box::pin(idle(target, address))
        }),
        row("idle connections, decisions", "connections opened", 900, |target| {
            let address = target.decisions.clone();
            Box::pin(idle(target, address))
        }),
        row("open unsigned calls, administration", "calls opened", 280, |target| Box::pin(open_unsigned(target))),
        row("forged acts", "calls answered", 16, |target| Box::pin(forged_acts(target))),
        row("a stolen chain on every place", "connections opened", 900, |target| Box::pin(stolen_chain(target))),
        row("frames without a call", "frames sent", 8, |target| Box::pin(frames(target))),
        row("`Watch` on every place", "watches opened", 64, |target| Box::pin(watch(target))),
        row("garbage tokens", "calls answered", 16, |target| Box::pin(garbage(target))),
        row("chains never seen before", "calls answered", 8, |target| Box::pin(strangers(target))),
        row("streams reset at once", "streams reset", 4, |target| Box::pin(resets(target))),
        row("streams that are never read", "calls sent", 8, |target| Box::pin(never_read(target))),
    ]
}

/// Runs as the attacker: `attacker NAME DECISIONS ADMIN`.
pub(crate) fn attack() -> Result<()> {
    let mut words = std::env::args().skip(2);
    let (name, decisions, admin) =
        (words.next().context("no attack")?, words.next().context("no address")?, words.next().context("no address")?);
    let attack = table().into_iter().find(|attack| attack.name == name).context("no such attack")?;
    let target = AttackTarget { decisions, admin, copy: 0, count: Arc::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // The attack ends with its standard input, or with the process that holds it.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = stop.send(());
    });
    runtime.block_on(async {
        let mut copies = JoinSet::new();
        for copy in 0..attack.copies {
            let target = AttackTarget { copy, ..target.clone() };
            copies.spawn(async move {
                // A copy that is cut off connects again.
                loop {
                    let _ = (attack.run)(target.clone()).await;
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        let _ = tokio::time::timeout(LIFE, stopped).await;
    });
    let count = target.count.load(Ordering::Relaxed);
    let said = if attack.counts.is_empty() { String::new() } else { format!("{count} {}", attack.counts) };
    super::super::say_out(&said)
}

/// An HTTP/2 connection that reads nothing but what HTTP/2 itself requires.
async fn connect(address: &str) -> Result<SendRequest<Bytes>> {
    let socket = TcpStream::connect(address.trim_start_matches("http://")).await?;
    let (sender, connection) = Builder::new().initial_window_size(1 << 20).handshake::<_, Bytes>(socket).await?;
    tokio::spawn(connection);
    Ok(sender)
}

fn post(address: &str, path: &str) -> Result<http::Request<()>> {
    Ok(http::Request::post(format!("{address}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?)
}

/// A message with its gRPC frame header of five bytes, and any part of its body.
fn framed(length: usize, body: &[u8]) -> Result<Bytes> {
    let mut bytes = BytesMut::with_capacity(5 + body.len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length)?);
    bytes.put_slice(body);
    Ok(bytes.freeze())
}

/// Sends messages almost to their end, on as many streams as the server accepts, and never finishes them.
async fn unfinished(target: AttackTarget, address: String, path: &'static str) -> Result<()> {
    const STREAMS: usize = 100;
    let sender = connect(&address).await?;
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let (mut sender, target, request) = (sender.clone().ready().await?, target.clone(), post(&address, path)?);
        streams.spawn(async move {
            let (answer, mut body) = sender.send_request(request, false)?;
            body.send_data(framed(MESSAGE_BYTES, &[])?, false)?;
            let mut left = MESSAGE_BYTES - 1;
            while left > 0 {
                body.reserve_capacity(left.min(64 * 1024));
                let granted = std::future::poll_fn(|cx| body.poll_capacity(cx)).await.context("the stream is closed")??;
                let size = granted.min(left);
                body.send_data(Bytes::from(vec![0; size]), false)?;
                target.add(size);
                left -= size;
            }
            // Holds the streams until the server answers.
            let _ = answer.await;
            anyhow::Ok(())
        });
    }
    while let Some(ended) = streams.join_next().await {
        ended??;
    }
    Ok(())
}

/// The most expensive 4 MiB: a batch of two million empty calls.
async fn empty_batches(target: AttackTarget) -> Result<()> {
    let message = Bytes::from([0x0a, 0x00].repeat(MESSAGE_BYTES / 2));
    let sender = connect(&target.decisions).await?;
    loop {
        let mut sender = sender.clone().ready().await?;
        let (answer, mut body) =
            sender.send_request(post(&target.decisions, "/portcullis.v1.DecisionService/CheckBatch")?, false)?;
        body.send_data(framed(message.len(), &message)?, true)?;
        answer.await?;
        target.add(1);
    }
}

async fn idle(target: AttackTarget, address: String) -> Result<()> {
    let socket = TcpStream::connect(address.trim_start_matches("http://")).await?;
    let (_sender, connection) = Builder::new().handshake::<_, Bytes>(socket).await?;
    target.add(1);
    Ok(connection.await?)
}

/// Opens as many calls as the server accepts on a connection, without a signature and without an end.
async fn open_unsigned(target: AttackTarget) -> Result<()> {
    const STREAMS: usize = 40;
    let sender = connect(&target.admin).await?;
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let (sender, target) = (sender.clone(), target.clone());
        streams.spawn(async move {
            let request = post(&target.admin, "/portcullis.v1.RevocationService/Revoke")?;
            let (answer, _body) = sender.ready().await?.send_request(request, false)?;
            target.add(1);
            let _ = answer.await;
            anyhow::Ok(())
        });
    }
    while let Some(ended) = streams.join_next().await {
        ended??;
    }
    Ok(())
}

/// Sends whole acts, each signed by another key that no operator has.
async fn forged_acts(target: AttackTarget) -> Result<()> {
    let mut client = RevocationServiceClient::connect(target.admin.clone()).await?;
    let info = wire::fleet_service_client::FleetServiceClient::connect(target.admin.clone())
        .await?
        .info(wire::InfoRequest::default())
        .await?
        .into_inner();
    let mut number = target.copy as u64;
    loop {
        number += 1_000;
        let mut seed = [0xf0; 32];
        seed.iter_mut().zip(number.to_be_bytes()).for_each(|(to, byte)| *to = byte);
        let act = signed(&PrivateKey::from_seed(seed)?, &info.history_id, session(STRANGERS))?;
        if client.revoke(act).await.is_ok() {
            bail!("a forged act was accepted");
        }
        target.add(1);
    }
}

/// Takes a place with the chain of somebody else, without its key, and stays.
async fn stolen_chain(target: AttackTarget) -> Result<()> {
    let company = CompanyFixture::new()?;
    let chain = company.chain(STRANGERS, 2, SystemClock.now())?;
    let mut client = DecisionServiceClient::connect(target.decisions.clone()).await?;
    target.add(1);
    loop {
        client.check(request_by_chain(&chain)).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Sends pings and settings, and nothing else.
async fn frames(target: AttackTarget) -> Result<()> {
    use tokio::io::AsyncWriteExt as _;
    const FRAMES: usize = 1_000;
    let mut socket = TcpStream::connect(target.decisions.trim_start_matches("http://")).await?;
    socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
    let pings = b"\0\0\x08\x06\0\0\0\0\0portculli".get(..17).context("a ping")?.repeat(FRAMES);
    loop {
        socket.write_all(&pings).await?;
        target.add(FRAMES);
    }
}

async fn watch(target: AttackTarget) -> Result<()> {
    let mut client = RevocationServiceClient::connect(target.decisions.clone()).await?;
    let mut entries = client.watch(wire::WatchRevocationsRequest::default()).await?.into_inner();
    target.add(1);
    while entries.message().await?.is_some() {}
    bail!("the watch ended")
}

/// Tokens of the largest size that look valid but are not.
async fn garbage(target: AttackTarget) -> Result<()> {
    let mut client = DecisionServiceClient::connect(target.decisions.clone()).await?;
    let mut number = target.copy;
    loop {
        number += 1000;
        let token = format!("eyJhbGciOiJFZDI1NTE5IiwidHlwIjoiYWF0K2p3dCJ9.{number:08}{}.AAAA", "QUFB".repeat(1900));
        let request = wire::CheckRequest { request_id: "x".repeat(120), ..request_by_chain(&[Bytes::from(token)]) };
        client.check(request).await?;
        target.add(1);
    }
}

/// Valid chains, each with another user and session, so that the server verifies each.
async fn strangers(target: AttackTarget) -> Result<()> {
    let company = CompanyFixture::new()?;
    let mut client = DecisionServiceClient::connect(target.decisions.clone()).await?;
    let mut number = STRANGERS * (target.copy + 1);
    loop {
        number += 1;
        let chain = company.chain(number, 2, SystemClock.now())?;
        client.check(request_by_chain(&chain)).await?;
        target.add(1);
    }
}

/// Rapid reset (CVE-2023-44487).
async fn resets(target: AttackTarget) -> Result<()> {
    let sender = connect(&target.decisions).await?;
    let path = "/portcullis.v1.DecisionService/Check";
    loop {
        let mut sender = sender.clone().ready().await?;
        let (_answer, mut body) = sender.send_request(post(&target.decisions, path)?, false)?;
        body.send_reset(h2::Reason::CANCEL);
        target.add(1);
        tokio::task::yield_now().await;
    }
}

/// Calls on a stream, whose answers are never read.
async fn never_read(target: AttackTarget) -> Result<()> {
    const STREAMS: usize = 50;
    let company = CompanyFixture::new()?;
    let chain = company.chain(STRANGERS, 2, SystemClock.now())?;
    let call = prost::Message::encode_to_vec(&request_by_chain(&chain));
    let sender = connect(&target.decisions).await?;
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let sender = sender.clone().ready().await?;
        streams.spawn(feed(sender, target.clone(), framed(call.len(), &call)?));
    }
    while let Some(ended) = streams.join_next().await {
        ended??;
    }
    Ok(())
}

/// Repeats the call on one stream as long as the server grants window, and reads no answer.
async fn feed(mut sender: SendRequest<Bytes>, target: AttackTarget, call: Bytes) -> Result<()> {
    let request = post(&target.decisions, "/portcullis.v1.DecisionService/CheckStream")?;
    let (answer, mut body) = sender.send_request(request, false)?;
    let _answer = answer.await?;
    loop {
        body.reserve_capacity(call.len());
        std::future::poll_fn(|cx| body.poll_capacity(cx)).await.context("the stream is closed")??;
        body.send_data(call.clone(), false)?;
        target.add(1);
    }
}
