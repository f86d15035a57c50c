//! Faults of the routes between replicas and their store, and of either end: the decisive cases of `load-tests/faults`, and the
//! proxy.
//!
//! No result depends on how long a step takes, except for the freshness bound, which is a promise.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::faults::rig::{FaultPlan, ProgramPaths};
use crate::faults::scenario::{run, table};
use crate::harness::PATIENCE;
use crate::proxy::{ProxyProcess, ProxyRoute, RouteMode, TrafficDirection, serve};

/// The variable that makes this test program the proxy.
const AS_PROXY: &str = "PORTCULLIS_TEST_AS_PROXY";

/// The shortest bound that several processes on a busy machine can keep.
const BOUND: Duration = Duration::from_secs(2);

/// Runs this test program with one test of its own, the one below, which acts as the proxy.
fn as_proxy() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "fault_cases::a_proxy_as_a_process", "--nocapture"]).env(AS_PROXY, "1");
    command
}

/// A server that echoes each line, and says `end` when its input ends.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut bytes = [0; 1024];
                while let Ok(length @ 1..) = stream.read(&mut bytes) {
                    stream.write_all(&bytes[..length]).unwrap();
                }
                let _ = stream.write_all(b"end");
            });
        }
    });
    address
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends text; returns the answer of at most as many bytes. `Err` means a reset or an end.
fn said(stream: &mut TcpStream, words: &str) -> Result<String, String> {
    stream.write_all(words.as_bytes()).map_err(|error| error.to_string())?;
    let mut bytes = vec![0; words.len()];
    stream.read_exact(&mut bytes).map_err(|error| error.to_string())?;
    Ok(String::from_utf8(bytes).unwrap())
}

/// Whether nothing arrives for a while. An end counts as an arrival.
fn silent(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let got = stream.read(&mut [0; 16]);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    got.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

/// The behavior of an existing and of a new connection in each mode, and after the mode ends.
#[test]
fn a_proxy_as_a_process() {
    if std::env::var_os(AS_PROXY).is_some() {
        serve().unwrap();
        return;
    }
    let upstream = echo();
    let mut proxy = ProxyProcess::start(as_proxy);
    let (route, address) = proxy.route(upstream);
    let (_, other) = proxy.route(upstream);
    let mut untouched = connect(other);

    let mut old = connect(address);
    assert_eq!(said(&mut old, "one").unwrap(), "one");
    proxy.set_mode(route, &RouteMode::Delay(50));
    let began = Instant::now();
    assert_eq!(said(&mut old, "two").unwrap(), "two");
    assert!(began.elapsed() >= Duration::from_millis(100), "each way");
    proxy.set_mode(route, &RouteMode::Pass);

    // Lost bytes do not come back, and no byte follows them.
    for way in [TrafficDirection::Up, TrafficDirection::Down, TrafficDirection::Both] {
        let mut idle = connect(address);
        assert_eq!(said(&mut idle, "one").unwrap(), "one");
        proxy.set_mode(route, &RouteMode::BlackHole(way));
        let mut new = connect(address);
        for stream in [&mut old, &mut new] {
            stream.write_all(b"lost").unwrap();
            assert!(silent(stream), "{way}");
        }
        proxy.set_mode(route, &RouteMode::Pass);
        for stream in [&mut old, &mut new] {
            stream.write_all(b"late").unwrap();
            assert!(silent(stream), "{way}: what follows lost bytes is lost");
        }
        assert_eq!(said(&mut idle, "two").unwrap(), "two", "{way}: who said nothing lost nothing");
        old = connect(address);
        assert_eq!(said(&mut old, "one").unwrap(), "one", "{way}");
    }
    proxy.set_mode(route, &RouteMode::BlackHoleAt("COMMIT".to_owned()));
    assert_eq!(said(&mut old, "BEGIN").unwrap(), "BEGIN");
    old.write_all(b"; COMMIT").unwrap();
    assert!(silent(&mut old), "it fell at the words");
    proxy.set_mode(route, &RouteMode::Pass);

    // The server sees the end and can still answer; then the same for the client.
    let mut old = connect(address);
    assert_eq!(said(&mut old, "one").unwrap(), "one");
    proxy.set_mode(route, &RouteMode::HalfClose(TrafficDirection::Up));
    let mut heard = String::new();
    old.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "end");
    proxy.set_mode(route, &RouteMode::Pass);
    let mut old = connect(address);
    assert_eq!(said(&mut old, "one").unwrap(), "one");
    proxy.set_mode(route, &RouteMode::HalfClose(TrafficDirection::Down));
    assert_eq!(old.read(&mut [0; 16]).unwrap(), 0, "an end that is not the server's");
    old.write_all(b"still taken").unwrap();
    proxy.set_mode(route, &RouteMode::Pass);

    let mut old = connect(address);
    assert_eq!(said(&mut old, "one").unwrap(), "one");
    proxy.set_mode(route, &RouteMode::Cut);
    assert!(said(&mut old, "two").is_err());
    assert!(TcpStream::connect(address).map_or(true, |mut new| said(&mut new, "one").is_err()));
    assert_eq!(said(&mut untouched, "another route").unwrap(), "another route");

    // The proxy is killed, and comes back on the same ports in mode `pass`.
    proxy.kill();
    assert!(TcpStream::connect(address).is_err());
    assert!(said(&mut untouched, "x").is_err());
    proxy.restart();
    assert_eq!(said(&mut connect(address), "one").unwrap(), "one");
    let elsewhere = echo();
    proxy.set_upstream(route, elsewhere);
    assert_eq!(said(&mut connect(address), "one").unwrap(), "one");
}

/// A mode that acts once on every connection reaches each of them, even if the next mode follows before any of them runs.
#[tokio::test]
async fn a_mode_that_is_followed_at_once_still_hits_every_connection() {
    let upstream = echo();
    for mode in [
        RouteMode::Cut,
        RouteMode::HalfClose(TrafficDirection::Up),
        RouteMode::HalfClose(TrafficDirection::Down),
        RouteMode::HalfClose(TrafficDirection::Both),
    ] {
        let route = ProxyRoute::listen(0, upstream).await.unwrap();
        let talk = async {
            let mut old = tokio::net::TcpStream::connect(route.address()).await.unwrap();
            assert_eq!(exchange(&mut old).await.unwrap(), "one");
            // The runtime has one thread, so no connection runs between the two modes.
            route.set_mode(mode.clone());
            route.set_mode(RouteMode::Pass);
            let mut rest = Vec::new();
            let end = old.read_to_end(&mut rest).await;
            match mode {
                RouteMode::Cut => assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset),
                RouteMode::HalfClose(TrafficDirection::Up) => assert_eq!(rest, b"end"),
                _ => assert_eq!((end.unwrap(), rest.as_slice()), (0, b"".as_slice())),
            }
            let mut new = tokio::net::TcpStream::connect(route.address()).await.unwrap();
            assert_eq!(exchange(&mut new).await.unwrap(), "one", "after {mode}");
        };
        tokio::time::timeout(PATIENCE, talk).await.unwrap_or_else(|_| panic!("{mode} had no effect"));
    }
}

async fn exchange(stream: &mut tokio::net::TcpStream) -> std::io::Result<String> {
    stream.write_all(b"one").await?;
    let mut bytes = [0; 3];
    stream.read_exact(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[test]
fn modes_are_read_as_they_are_written() {
    let ways = [TrafficDirection::Up, TrafficDirection::Down, TrafficDirection::Both];
    let mut modes = vec![RouteMode::Pass, RouteMode::Delay(7), RouteMode::Cut, RouteMode::BlackHoleAt("a b".to_owned())];
    modes.extend(ways.map(RouteMode::HalfClose));
    modes.extend(ways.map(RouteMode::BlackHole));
    for mode in modes {
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    for wrong in ["", "delay", "delay x", "half-close", "black-hole sideways", "black-hole-at"] {
        assert!(wrong.parse::<RouteMode>().is_err(), "{wrong}");
    }
}

/// All scenarios run at the same time, because they mostly wait.
#[test]
fn nothing_killed_is_permitted_whatever_breaks() {
    let programs = ProgramPaths { server: env!("CARGO_BIN_EXE_portcullis").into(), proxy: as_proxy };
    let plan = FaultPlan { replicas: 2, rate: 200, bound: BOUND, margin: Duration::from_millis(500), patience: 3 * PATIENCE };
    let programs = &programs;
    std::thread::scope(|scope| {
        let runs: Vec<_> = table()
            .into_iter()
            .filter(|scenario| scenario.decisive)
            .map(|scenario| (scenario.name, scope.spawn(move || run(programs, plan, &scenario))))
            .collect();
        assert_eq!(runs.len(), 6);
        for (name, run) in runs {
            let verdict = run.join().unwrap().unwrap_or_else(|error| panic!("{name}: {error:#}"));
            println!("{name}: {verdict:?}");
            assert!(verdict.is_kept(), "{name}: {verdict:?}");
            assert!(verdict.kills >= 3 && verdict.permits > 0, "{name}: {verdict:?}");
        }
    });
}
