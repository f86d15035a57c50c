//! Tests over real sockets: services per listener, the write barrier, the drain, and the effect of one client on others.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::*;
use crate::model::connection::PeerInfo;

mod hostile;

/// A barrier that a test can break, and that counts.
#[derive(Default)]
struct BreakableBarrier {
    is_broken: AtomicBool,
    passed: AtomicU64,
}

impl WriteBarrier for BreakableBarrier {
    fn flush_before_write(&self) -> io::Result<()> {
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is full"));
        }
        self.passed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Answers each call with its thread and peer, as an error's message. `hold` waits until the test releases it.
struct CallGate {
    entered: Semaphore,
    release: Semaphore,
}

#[derive(Clone)]
struct GatedHealthService(Arc<CallGate>);

#[tonic::async_trait]
impl Health for GatedHealthService {
    type WatchStream = tokio_stream::Pending<Result<HealthCheckResponse, Status>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let peer = request.extensions().get::<PeerInfo>().cloned().unwrap();
        match request.get_ref().service.as_str() {
            "where" => {
                let thread = std::thread::current().name().unwrap_or_default().to_owned();
                Err(Status::aborted(format!("{thread} {} {} {}", peer.connection_id, peer.address, peer.is_loopback)))
            }
            // Acts as if an operator had signed the call.
            "prove" => {
                peer.verified_signature.set();
                Ok(Response::new(HealthCheckResponse { status: 1 }))
            }
            "hold" => {
                self.0.entered.add_permits(1);
                let _ = self.0.release.acquire().await;
                Ok(Response::new(HealthCheckResponse { status: 1 }))
            }
            _ => Ok(Response::new(HealthCheckResponse { status: 1 })),
        }
    }

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(tokio_stream::pending()))
    }
}

/// A running server, with the controls of its services.
struct ServerFixture {
    server: Server,
    addresses: ListenerAddresses,
    probe: Arc<CallGate>,
    barrier: Arc<BreakableBarrier>,
    ready: Arc<Mutex<Result<&'static str, String>>>,
}

fn any_port() -> Settings {
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    Settings { decisions_address: address, http_address: address, admin_address: address, ..Settings::default() }
}

async fn serve_fixture(settings: Settings) -> ServerFixture {
    serve_fixture_with(settings, crate::api::wires::decision_limits).await
}

async fn serve_fixture_with(settings: Settings, limits: fn(&str) -> MessageLimits) -> ServerFixture {
    let probe = Arc::new(CallGate { entered: Semaphore::new(0), release: Semaphore::new(0) });
    let barrier = Arc::new(BreakableBarrier::default());
    let ready = Arc::new(Mutex::new(Ok("fresh")));
    let listeners = BoundListeners::bind(settings).unwrap();
    let grpc = {
        let (probe, barrier) = (Arc::clone(&probe), Arc::clone(&barrier));
        move |_| GrpcServices {
            routes: Routes::from(
                Routes::new(HealthServer::new(GatedHealthService(Arc::clone(&probe))))
                    .into_axum_router()
                    .route("/large", axum::routing::post(|| async { vec![0_u8; LARGE_BYTES] })),
            ),
            barrier: Arc::clone(&barrier) as Arc<dyn WriteBarrier>,
            limits,
        }
    };
    let http = {
        let (ready, barrier) = (Arc::clone(&ready), Arc::clone(&barrier));
        move |_| HttpServices {
            ready: Arc::new(move || ready.lock().unwrap().clone()),
            metrics: Arc::new(|| "x".repeat(METRICS_BYTES)),
            routes: axum::Router::new()
                .route("/never", axum::routing::get(std::future::pending::<&'static str>))
                .route(
                    "/peer",
                    axum::routing::get(
                        |axum::Extension(peer): axum::Extension<PeerInfo>| async move { peer.address.to_string() },
                    ),
                )
                .route("/echo", axum::routing::post(|body: axum::body::Bytes| async move { body })),
            barrier,
        }
    };
    let factories =
        ServiceFactories { decisions: Arc::new(grpc.clone()), finish: no_finish(), admin: Box::new(grpc), http: Box::new(http) };
    let server = listeners.serve(factories).await.unwrap();
    ServerFixture { addresses: server.addresses(), server, probe, barrier, ready }
}

/// Finish futures for runtimes whose calls leave nothing to finish.
fn no_finish() -> Arc<dyn Fn(usize) -> RuntimeShutdownFuture + Send + Sync> {
    Arc::new(|_| Box::pin(std::future::ready(())))
}

/// More than the socket buffers of both sides hold.
const METRICS_BYTES: usize = 32 * 1024 * 1024;
/// The size of the answer of `/large`.
const LARGE_BYTES: usize = 1024 * 1024;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

async fn client(address: SocketAddr) -> HealthClient<Channel> {
    HealthClient::new(Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap())
}

async fn ask(client: &mut HealthClient<Channel>, service: &str) -> Result<i32, Status> {
    let request = HealthCheckRequest { service: service.to_owned() };
    client.check(request).await.map(|response| response.into_inner().status)
}

/// Thread, connection id, address and loopback flag of a call.
async fn peer_of_call(client: &mut HealthClient<Channel>) -> Vec<String> {
    let status = ask(client, "where").await.unwrap_err();
    status.message().split(' ').map(str::to_owned).collect()
}

async fn send(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    socket
}

/// Reads all bytes until the peer closes; a reset counts as an end too.
async fn read_to_end(mut socket: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(30), socket.read_to_end(&mut bytes));
    let _ = read.await.expect("the peer never closes");
    bytes
}

async fn http(address: SocketAddr, request: &str) -> String {
    let bytes = read_to_end(send(address, format!("{request}\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await).await;
    String::from_utf8(bytes).unwrap()
}

async fn wait_until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let waited = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waited).await.unwrap_or_else(|_| panic!("never: {what}"));
}

fn stats(reader: &ListenerStatsReader, role: ListenerRole) -> ListenerStats {
    reader.read().into_iter().find(|stats| stats.role == role).unwrap()
}

fn cuts(reader: &ListenerStatsReader, role: ListenerRole, cause: &str) -> u64 {
    stats(reader, role).cuts_total.iter().find(|(name, _)| *name == cause).unwrap().1
}

#[test]
fn what_cannot_be_bound_is_refused_in_words() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let check = |change: &dyn Fn(&mut Settings), expected: &str| {
        let mut settings = any_port();
        change(&mut settings);
        assert_eq!(BoundListeners::bind(settings).unwrap_err().to_string(), expected);
    };
    let in_use = |flag| format!("`{flag} {taken}` is in use: stop what listens there, or choose another address or port 0");
    check(&|settings| settings.decisions_address = taken, &in_use("--listen"));
    check(&|settings| settings.http_address = taken, &in_use("--http-listen"));
    check(&|settings| settings.admin_address = taken, &in_use("--admin-listen"));
    for open in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7700", "[::ffff:192.0.2.1]:0"] {
        let why = "is not a loopback address: TLS is not available in this version, use 127.0.0.1 or [::1]";
        check(&|settings| settings.admin_address = open.parse().unwrap(), &format!("`--admin-listen {open}` {why}"));
    }
    check(&|settings| settings.decision_runtimes = 0, "server setting `decision_runtimes` is 0: it must be from 1 to 64");
    check(
        &|settings| settings.window_bytes = u32::MAX,
        "server setting `window_bytes` is 4294967295: it must be from 65535 to 67108864",
    );
    check(&|settings| settings.header_bytes_max = 1, "server setting `header_bytes_max` is 1: it must be from 8192 to 1048576");
    drop(holder);
    Settings::default().validate().unwrap();
}

#[tokio::test]
async fn sockets_are_spread_evenly_and_stay_so() {
    let bench = serve_fixture(any_port()).await;
    let mut clients = Vec::new();
    let mut by_thread = BTreeMap::new();
    for _ in 0..8 {
        let mut client = client(bench.addresses.decisions).await;
        let place = peer_of_call(&mut client).await;
        by_thread.entry(place[0].clone()).or_insert_with(Vec::new).push(place[1].clone());
        clients.push((place[0].clone(), client));
    }
    let counts: Vec<_> = by_thread.iter().map(|(thread, ids)| (thread.as_str(), ids.len())).collect();
    assert_eq!(counts, [("pdp-decide-0", 4), ("pdp-decide-1", 4)]);
    // When all clients of one thread have left, the next connections fill the gap.
    clients.retain(|(thread, _)| thread == "pdp-decide-1");
    let reader = bench.server.stats();
    wait_until("four connections closed", async || stats(&reader, ListenerRole::Decisions).open_connections == [0, 4]).await;
    for _ in 0..4 {
        let mut client = client(bench.addresses.decisions).await;
        let thread = peer_of_call(&mut client).await[0].clone();
        assert_eq!(thread, "pdp-decide-0");
        clients.push((thread, client));
    }
    assert_eq!(stats(&reader, ListenerRole::Decisions).accepted_total, 12);
    let mut admin = client(bench.addresses.admin).await;
    assert_eq!(peer_of_call(&mut admin).await[0], "pdp-admin");
}

#[tokio::test]
async fn handlers_see_their_peer() {
    let bench = serve_fixture(any_port()).await;
    let (mut one, mut other) = (client(bench.addresses.decisions).await, client(bench.addresses.decisions).await);
    let (first, again, another) = (peer_of_call(&mut one).await, peer_of_call(&mut one).await, peer_of_call(&mut other).await);
    assert_eq!(first, again);
    assert_ne!(first[1], another[1], "connections have ids of their own");
    assert_ne!(first[2], another[2]);
    assert!(first[2].starts_with("127.0.0.1:"), "{first:?}");
    assert_eq!(first[3], "true");
    let socket = send(bench.addresses.http, b"GET /peer HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    let address = socket.local_addr().unwrap().to_string();
    let answer = String::from_utf8(read_to_end(socket).await).unwrap();
    assert!(answer.ends_with(&format!("\r\n\r\n{address}")), "{answer}");
}

#[test]
fn loopback_is_told_from_the_rest() {
    let check = |address: &str, expected| {
        let peer = acceptor::peer_info(7, address.parse().unwrap(), Arc::default());
        assert_eq!((peer.connection_id, &*peer.address, peer.is_loopback), (7, address, expected));
    };
    check("127.0.0.1:1", true);
    check("[::1]:1", true);
    check("[::ffff:127.0.0.1]:1", true);
    check("192.0.2.1:1", false);
    check("[2001:db8::1]:1", false);
}

#[tokio::test]
async fn a_broken_barrier_lets_no_byte_out() {
    let bench = serve_fixture(any_port()).await;
    let reader = bench.server.stats();
    let mut grpc = client(bench.addresses.decisions).await;
    assert_eq!(ask(&mut grpc, "").await.unwrap(), 1);
    let mut kept = send(bench.addresses.http, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut answer = Vec::new();
    while !answer.ends_with(b"alive\n") {
        assert_ne!(kept.read_buf(&mut answer).await.unwrap(), 0);
    }
    assert!(bench.barrier.passed.load(Ordering::SeqCst) >= 2, "each answer passed the barrier");

    bench.barrier.is_broken.store(true, Ordering::SeqCst);
    kept.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert_eq!(read_to_end(kept).await, b"", "http");
    let check = async |role, address, bytes: &[u8]| {
        let before = cuts(&reader, role, "barrier");
        assert_eq!(read_to_end(send(address, bytes).await).await, b"", "{role:?}");
        wait_until("the cut is counted", async || cuts(&reader, role, "barrier") > before).await;
    };
    check(ListenerRole::Decisions, bench.addresses.decisions, PREFACE).await;
    check(ListenerRole::Admin, bench.addresses.admin, PREFACE).await;
    check(ListenerRole::Http, bench.addresses.http, b"nonsense\r\n\r\n").await;
    ask(&mut grpc, "").await.unwrap_err();

    bench.barrier.is_broken.store(false, Ordering::SeqCst);
    assert_eq!(ask(&mut client(bench.addresses.decisions).await, "").await.unwrap(), 1, "new connections are served again");
}

#[tokio::test]
async fn a_drain_lets_calls_in_flight_end() {
    let ServerFixture { server, addresses, probe, .. } =
        serve_fixture(Settings { drain_timeout_ms: 3_600_000, ..any_port() }).await;
    let mut grpc = client(addresses.decisions).await;
    let call = tokio::spawn(async move { ask(&mut grpc, "hold").await });
    probe.entered.acquire().await.unwrap().forget();
    assert!(http(addresses.http, "GET /readyz HTTP/1.1").await.starts_with("HTTP/1.1 200"));
    let drain = tokio::spawn(server.drain());
    let mut answer = String::new();
    wait_until("not ready", async || {
        answer = http(addresses.http, "GET /readyz HTTP/1.1").await;
        answer.starts_with("HTTP/1.1 503")
    })
    .await;
    assert!(answer.ends_with("not ready: draining\n"), "{answer}");
    for address in [addresses.decisions, addresses.admin] {
        wait_until("nothing new is accepted", async || TcpStream::connect(address).await.is_err()).await;
    }
    assert!(!drain.is_finished(), "a call is in flight");
    probe.release.add_permits(1);
    assert_eq!(call.await.unwrap().unwrap(), 1);
    assert_eq!(drain.await.unwrap(), DrainOutcome { connections_cut: 0, unfinished_threads: Vec::new() });
    TcpStream::connect(addresses.http).await.unwrap_err();
}

#[tokio::test]
async fn a_drain_has_an_end() {
    let ServerFixture { server, addresses, probe, .. } = serve_fixture(Settings { drain_timeout_ms: 20, ..any_port() }).await;
    let mut grpc = client(addresses.decisions).await;
    let call = tokio::spawn(async move { ask(&mut grpc, "hold").await });
    probe.entered.acquire().await.unwrap().forget();
    assert_eq!(server.drain().await, DrainOutcome { connections_cut: 1, unfinished_threads: Vec::new() });
    call.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_dropped_server_stops() {
    let ServerFixture { server, addresses, probe, .. } = serve_fixture(any_port()).await;
    let mut grpc = client(addresses.decisions).await;
    let call = tokio::spawn(async move { ask(&mut grpc, "hold").await });
    probe.entered.acquire().await.unwrap().forget();
    drop(server);
    call.await.unwrap().unwrap_err();
    for address in [addresses.decisions, addresses.http, addresses.admin] {
        wait_until("closed", async || TcpStream::connect(address).await.is_err()).await;
    }
}

#[tokio::test]
async fn a_silent_client_holds_nobody_up_and_is_cut() {
    let bench = serve_fixture(Settings { decision_runtimes: 1, handshake_timeout_ms: 100, ..any_port() }).await;
    let silent = [
        send(bench.addresses.decisions, b"").await,
        send(bench.addresses.decisions, &PREFACE[..10]).await,
        send(bench.addresses.admin, b"").await,
        send(bench.addresses.http, b"").await,
        send(bench.addresses.http, b"GET /livez HTTP/1.1\r\n").await,
    ];
    let mut grpc = client(bench.addresses.decisions).await;
    assert_eq!(ask(&mut grpc, "").await.unwrap(), 1);
    assert!(http(bench.addresses.http, "GET /livez HTTP/1.1").await.ends_with("\r\n\r\nalive\n"));
    for socket in silent {
        // The socket ends only if the server closes it.
        read_to_end(socket).await;
    }
    assert_eq!(ask(&mut grpc, "").await.unwrap(), 1, "who finished the handshake stays");
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_nobody_up_and_is_cut() {
    let bench = serve_fixture(Settings { write_stall_timeout_ms: 100, ..any_port() }).await;
    let slow = send(bench.addresses.http, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(http(bench.addresses.http, "GET /livez HTTP/1.1").await.ends_with("\r\n\r\nalive\n"));
    let reader = bench.server.stats();
    wait_until("the slow client is cut", async || stats(&reader, ListenerRole::Http).open_connections == [0]).await;
    let read = read_to_end(slow).await.len();
    assert!(read < METRICS_BYTES, "{read}");
}

#[tokio::test]
async fn http_answers_probes_and_keeps_its_limits() {
    let bench = serve_fixture(Settings { http_request_timeout_ms: 100, http_body_bytes_max: 1000, ..any_port() }).await;
    let check = async |request: &str, status: &str, ending: &str| {
        let answer = http(bench.addresses.http, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        assert!(answer.ends_with(ending), "{request}: {answer}");
    };
    check("GET /livez HTTP/1.1", "200", "\r\n\r\nalive\n").await;
    check("GET /readyz HTTP/1.1", "200", "\r\n\r\nready: fresh\n").await;
    *bench.ready.lock().unwrap() = Err("the store has not been read yet".to_owned());
    check("GET /readyz HTTP/1.1", "503", "\r\n\r\nnot ready: the store has not been read yet\n").await;
    check("GET /livez HTTP/1.1", "200", "\r\n\r\nalive\n").await;
    check("GET /elsewhere HTTP/1.1", "404", "\r\n\r\nnot found: try /livez, /readyz or /metrics\n").await;
    check("POST /livez HTTP/1.1", "405", "method not allowed: use GET\n").await;
    check("GET /never HTTP/1.1", "408", "\r\n\r\nrequest took too long\n").await;
    check(&format!("GET /livez HTTP/1.1\r\nlong: {}", "x".repeat(20_000)), "431", "").await;
    check(&format!("GET /livez HTTP/1.1{}", "\r\na: b".repeat(100)), "431", "").await;
    let post = |length: usize| {
        format!("POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{}", "x".repeat(length))
    };
    let body =
        async |length| String::from_utf8(read_to_end(send(bench.addresses.http, post(length).as_bytes()).await).await).unwrap();
    assert!(body(1000).await.starts_with("HTTP/1.1 200 "));
    assert!(body(1001).await.starts_with("HTTP/1.1 413 "));
    let metrics = http(bench.addresses.http, "GET /metrics HTTP/1.1").await;
    assert!(metrics.contains("\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"));
    assert!(metrics.len() > METRICS_BYTES);
}

#[tokio::test]
async fn headers_too_long_are_refused_over_http2() {
    let bench = serve_fixture(Settings { header_bytes_max: 64 * 1024, ..any_port() }).await;
    let mut grpc = client(bench.addresses.decisions).await;
    let check = async |grpc: &mut HealthClient<Channel>, bytes: usize, expected: bool| {
        let mut request = Request::new(HealthCheckRequest::default());
        request.metadata_mut().insert("x-long", "x".repeat(bytes).parse().unwrap());
        assert_eq!(grpc.check(request).await.is_ok(), expected, "{bytes}");
    };
    check(&mut grpc, 40_000, true).await;
    check(&mut grpc, 80_000, false).await;
}

#[tokio::test]
async fn a_factory_that_fails_is_an_error() {
    let factories = ServiceFactories {
        decisions: Arc::new(|_| panic!("no services today")),
        finish: no_finish(),
        admin: Box::new(|_| GrpcServices {
            routes: Routes::default(),
            barrier: Arc::new(NoWriteBarrier),
            limits: crate::api::admin_methods::admin_limits,
        }),
        http: Box::new(|_| panic!("none here either")),
    };
    let error = BoundListeners::bind(any_port()).unwrap().serve(factories).await.err().unwrap();
    assert_eq!(error.to_string(), "thread `pdp-decide-0` ended before it served: see the log");
}
