//! How much one client can hold, and for how long: unfinished messages, waiting calls, unread replies, idle connections.

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::*;
use crate::api::wires::decision_limits;

const CHECK: &str = "/grpc.health.v1.Health/Check";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// The limits of production, with a short time to arrive.
fn short_arrival_limits(path: &str) -> MessageLimits {
    MessageLimits { arrival: Duration::from_millis(100), ..decision_limits(path) }
}

async fn connect_h2(address: SocketAddr, window: u32) -> SendRequest<Bytes> {
    let socket = TcpStream::connect(address).await.unwrap();
    let (requests, connection) = h2::client::Builder::new().initial_window_size(window).handshake(socket).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    requests
}

async fn open(requests: &SendRequest<Bytes>, path: &str) -> (ResponseFuture, h2::SendStream<Bytes>) {
    let request =
        ::http::Request::post(format!("http://x{path}")).header("content-type", "application/grpc").header("te", "trailers");
    requests.clone().ready().await.unwrap().send_request(request.body(()).unwrap(), false).unwrap()
}

/// The status of a call that is refused before it has an answer.
async fn refused(response: ResponseFuture) -> (Code, String) {
    let response = tokio::time::timeout(Duration::from_secs(30), response).await.expect("never answered").unwrap();
    let status = Status::from_header_map(response.headers()).unwrap();
    (status.code(), status.get_details_error_info().map(|info| info.reason).unwrap_or_default())
}

fn refusals(reader: &ListenerStatsReader, cause: &str) -> u64 {
    stats(reader, ListenerRole::Decisions).refusals_total.iter().find(|(name, _)| *name == cause).unwrap().1
}

fn open_connections(reader: &ListenerStatsReader, role: ListenerRole) -> usize {
    stats(reader, role).open_connections.iter().sum()
}

#[tokio::test]
async fn a_message_has_its_time() {
    let bench = serve_fixture_with(any_port(), short_arrival_limits).await;
    let reader = bench.server.stats();
    let requests = connect_h2(bench.addresses.decisions, 65_535).await;
    let too_slow = (Code::DeadlineExceeded, "MESSAGE_INCOMPLETE".to_owned());
    for sent in [&b""[..], b"\0", b"\0\0\0\0\x03", b"\0\0\0\0\x03\x0a\x01"] {
        let (response, mut sending) = open(&requests, CHECK).await;
        sending.send_data(sent.into(), false).unwrap();
        assert_eq!(refused(response).await, too_slow, "{sent:?}");
    }
    // The whole message has arrived, but the request does not end.
    let (response, mut sending) = open(&requests, CHECK).await;
    sending.send_data(b"\0\0\0\0\0"[..].into(), false).unwrap();
    assert_eq!(refused(response).await, too_slow);
    assert_eq!(refusals(&reader, "too_slow"), 5);
    assert_eq!(ask(&mut client(bench.addresses.decisions).await, "").await.unwrap(), 1);
}

#[tokio::test]
async fn a_stream_has_time_between_messages_and_none_within() {
    use tokio_stream::StreamExt as _;
    let tracked = connection_registry::tests::tracked();
    let limits = short_arrival_limits(REFLECTION);
    assert!(limits.is_stream);
    let (sender, parts) = mpsc::channel::<&[u8]>(8);
    let parts = tokio_stream::wrappers::ReceiverStream::new(parts);
    let body =
        http_body_util::StreamBody::new(parts.map(|part| Ok::<_, Status>(http_body::Frame::data(Bytes::from_static(part)))));
    let mut intake = request_body::RequestBody::new(body, limits, tracked);
    let mut next =
        async || http_body_util::BodyExt::frame(&mut intake).await.map(|frame| frame.map(|frame| frame.into_data().unwrap()));
    sender.send(b"\0\0\0\0\x02\x0a").await.unwrap();
    sender.send(b"\0\0\0\0\0\0\0\0").await.unwrap();
    assert_eq!(next().await.unwrap().unwrap(), &b"\0\0\0\0\x02\x0a\0\0\0\0\0\0"[..], "two messages, the third has begun");
    sender.send(b"\0\0\0").await.unwrap();
    assert_eq!(next().await.unwrap().unwrap(), &b"\0\0\0\0\0"[..]);
    let waited = tokio::time::timeout(Duration::from_millis(300), next()).await;
    assert!(waited.is_err(), "between messages a caller may take its time");
    sender.send(b"\0").await.unwrap();
    let status = next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(next().await.is_none());
}

#[tokio::test]
async fn calls_that_wait_share_a_budget_and_each_connection_has_its_own() {
    // Nobody here has proved anything, so half of the shared budget is for others.
    let limited = Settings { waiting_bytes_max: 128 * 1024, connection_waiting_bytes_max: 96 * 1024, ..any_port() };
    let bench = serve_fixture(limited).await;
    let reader = bench.server.stats();
    let mut connections = Vec::new();
    // Each connection waits with 16 calls. The first two connections reach the limit of one connection. The third gets the rest of
    // the shared budget, the last one little more than its own share.
    for (served, cause) in [(11, "connection_budget"), (11, "connection_budget"), (9, "listener_budget"), (8, "listener_budget")]
    {
        let grpc = client(bench.addresses.decisions).await;
        let before = refusals(&reader, cause);
        let calls: Vec<_> = (0..16)
            .map(|_| {
                let mut grpc = grpc.clone();
                tokio::spawn(async move { ask(&mut grpc, "hold").await })
            })
            .collect();
        wait_until("the others are refused", async || refusals(&reader, cause) == before + 16 - served).await;
        let ended = async || calls.iter().filter(|call| call.is_finished()).count() as u64;
        wait_until("they are told", async || ended().await == 16 - served).await;
        connections.push((grpc, calls));
    }
    assert!(stats(&reader, ListenerRole::Decisions).waiting_bytes <= 64 * 1024);
    bench.probe.release.add_permits(100);
    for (_, calls) in connections {
        for call in calls {
            if let Err(status) = call.await.unwrap() {
                assert_eq!(status.code(), Code::ResourceExhausted);
                assert_eq!(status.get_details_error_info().unwrap().reason, "LIMIT_EXCEEDED");
            }
        }
    }
    wait_until("all is given back", async || stats(&reader, ListenerRole::Decisions).waiting_bytes == 0).await;
}

#[tokio::test]
async fn one_connection_too_many_costs_an_idle_one() {
    let bench = serve_fixture(Settings { connections_max: 2, control_connections_max: 1, ..any_port() }).await;
    let reader = bench.server.stats();
    for (role, address, most) in [
        (ListenerRole::Decisions, bench.addresses.decisions, 2),
        (ListenerRole::Admin, bench.addresses.admin, 1),
        (ListenerRole::Http, bench.addresses.http, 1),
    ] {
        let mut kept = Vec::new();
        for count in 1..=most + 1 {
            kept.push(send(address, if role == ListenerRole::Http { b"" } else { PREFACE }).await);
            wait_until("accepted", async || stats(&reader, role).accepted_total == count).await;
        }
        // Bytes sent earlier may still arrive; then the socket ends.
        read_to_end(kept.remove(0)).await;
        assert_eq!((cuts(&reader, role, "displaced"), stats(&reader, role).refused_total), (1, 0), "{role:?}");
        wait_until("the others stay", async || open_connections(&reader, role) as u64 == most).await;
    }
    assert_eq!(ask(&mut client(bench.addresses.decisions).await, "").await.unwrap(), 1);
    assert_eq!(ask(&mut client(bench.addresses.admin).await, "").await.unwrap(), 1);
    assert!(http(bench.addresses.http, "GET /livez HTTP/1.1").await.ends_with("alive\n"));
}

#[tokio::test]
async fn who_has_proved_something_stays_and_nobody_keeps_all_places() {
    let bench = serve_fixture(Settings { connections_max: 2, decision_runtimes: 1, ..any_port() }).await;
    let reader = bench.server.stats();
    let mut calls = Vec::new();
    for _ in 0..2 {
        let mut grpc = client(bench.addresses.decisions).await;
        assert_eq!(ask(&mut grpc, "prove").await.unwrap(), 1);
        calls.push(tokio::spawn(async move { ask(&mut grpc, "hold").await }));
        bench.probe.entered.acquire().await.unwrap().forget();
    }
    // Both are busy and have proved something. One of them yields; after it, only strangers do.
    let first = send(bench.addresses.decisions, PREFACE).await;
    wait_until("one yields", async || cuts(&reader, ListenerRole::Decisions, "displaced") == 1).await;
    let second = send(bench.addresses.decisions, PREFACE).await;
    read_to_end(first).await;
    assert_eq!(
        (stats(&reader, ListenerRole::Decisions).refused_total, cuts(&reader, ListenerRole::Decisions, "displaced")),
        (0, 2)
    );
    drop(second);
    bench.probe.release.add_permits(2);
    let mut answered = 0;
    for call in calls {
        answered += u32::from(call.await.unwrap().is_ok());
    }
    assert_eq!(answered, 1);
}

#[tokio::test]
async fn idle_connections_are_closed_and_busy_ones_are_not() {
    let bench = serve_fixture(Settings { idle_timeout_ms: 500, ..any_port() }).await;
    let reader = bench.server.stats();
    let mut busy = client(bench.addresses.decisions).await;
    let held = tokio::spawn(async move { ask(&mut busy, "hold").await });
    bench.probe.entered.acquire().await.unwrap().forget();
    let mut idle = client(bench.addresses.decisions).await;
    assert_eq!(ask(&mut idle, "").await.unwrap(), 1);
    let kept = send(bench.addresses.http, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await;
    wait_until("the idle one is closed", async || cuts(&reader, ListenerRole::Decisions, "idle") >= 1).await;
    assert!(read_to_end(kept).await.ends_with(b"alive\n"));
    wait_until("one is left", async || open_connections(&reader, ListenerRole::Decisions) == 1).await;
    assert_eq!(ask(&mut idle, "").await.unwrap(), 1, "its client connects again by itself");
    assert!(!held.is_finished());
    bench.probe.release.add_permits(1);
    assert_eq!(held.await.unwrap().unwrap(), 1);
}

#[tokio::test]
async fn who_signs_nothing_is_cut_from_administration() {
    let bench = serve_fixture(Settings { unsigned_timeout_ms: 3000, ..any_port() }).await;
    let reader = bench.server.stats();
    let mut signed = client(bench.addresses.admin).await;
    let mut unsigned = client(bench.addresses.admin).await;
    assert_eq!(ask(&mut signed, "prove").await.unwrap(), 1);
    let act = {
        let mut signed = signed.clone();
        tokio::spawn(async move { ask(&mut signed, "hold").await })
    };
    let watched = unsigned.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    bench.probe.entered.acquire().await.unwrap().forget();
    wait_until("the unsigned one is cut", async || cuts(&reader, ListenerRole::Admin, "unsigned") == 1).await;
    let mut watched = watched;
    watched.message().await.unwrap_err();
    wait_until("it is gone", async || open_connections(&reader, ListenerRole::Admin) == 1).await;
    bench.probe.release.add_permits(1);
    assert_eq!(act.await.unwrap().unwrap(), 1, "an act is not cut off");
}

#[tokio::test]
async fn who_takes_no_reply_is_cut() {
    let bench = serve_fixture(Settings { write_stall_timeout_ms: 200, ..any_port() }).await;
    let reader = bench.server.stats();
    // With a window of zero, no byte of an answer may be sent.
    let requests = connect_h2(bench.addresses.decisions, 0).await;
    let (response, mut sending) = open(&requests, CHECK).await;
    sending.send_data(b"\0\0\0\0\0"[..].into(), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    assert!(body.data().await.unwrap().is_err(), "cut");
    assert_eq!(cuts(&reader, ListenerRole::Decisions, "stalled"), 1);
    assert_eq!(ask(&mut client(bench.addresses.decisions).await, "").await.unwrap(), 1);
}

#[tokio::test]
async fn a_body_over_http_has_its_time() {
    let bench = serve_fixture(Settings { http_request_timeout_ms: 100, ..any_port() }).await;
    let slow = send(bench.addresses.http, b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nx").await;
    assert!(http(bench.addresses.http, "GET /livez HTTP/1.1").await.ends_with("alive\n"));
    assert!(read_to_end(slow).await.starts_with(b"HTTP/1.1 408 "));
}

/// A reply that the peer does not take is charged by its size, and a stream of reflection by what it may hold.
#[tokio::test]
async fn replies_that_nobody_takes_are_charged() {
    let bench = serve_fixture(any_port()).await;
    let reader = bench.server.stats();
    // With a window of zero, no byte of an answer may be sent.
    let requests = connect_h2(bench.addresses.decisions, 0).await;
    let mut held = Vec::new();
    for _ in 0..8 {
        let (response, mut sending) = open(&requests, "/large").await;
        sending.send_data(Bytes::new(), true).unwrap();
        held.push(response.await.unwrap());
    }
    // Eight replies of a MiB do not fit into the 8 MiB of a connection, because each call is charged in addition.
    let refused = held.iter().filter(|response| response.headers().contains_key("grpc-status")).count();
    assert_eq!((refused, refusals(&reader, "connection_budget")), (1, 1));
    assert!(stats(&reader, ListenerRole::Decisions).waiting_bytes > 6 * LARGE_BYTES);
    drop((held, requests));
    wait_until("all is given back", async || stats(&reader, ListenerRole::Decisions).waiting_bytes == 0).await;
    // A peer that takes its replies gets as many as it asks for, and is charged nothing in the end.
    let requests = connect_h2(bench.addresses.decisions, 65_535).await;
    for _ in 0..20 {
        let (response, mut sending) = open(&requests, "/large").await;
        sending.send_data(Bytes::new(), true).unwrap();
        let (mut body, mut taken) = (response.await.unwrap().into_body(), 0);
        while let Some(part) = body.data().await {
            let part = part.unwrap();
            taken += part.len();
            body.flow_control().release_capacity(part.len()).unwrap();
        }
        assert_eq!(taken, LARGE_BYTES);
    }
    wait_until("all was taken", async || stats(&reader, ListenerRole::Decisions).waiting_bytes == 0).await;
}

/// A waiting call is charged for its headers by their count and bytes, and a call with too many of them is refused.
#[tokio::test]
async fn headers_are_counted_and_charged() {
    let limited = Settings { waiting_bytes_max: 0, connection_waiting_bytes_max: 64 * 1024, ..any_port() };
    let bench = serve_fixture(limited).await;
    let reader = bench.server.stats();
    let requests = connect_h2(bench.addresses.decisions, 65_535).await;
    let call = async |headers: usize, value: &str| {
        let mut request = ::http::Request::post(format!("http://x{CHECK}")).header("content-type", "application/grpc");
        for header in 1..headers {
            request = request.header(format!("x{header}"), value);
        }
        let request = request.body(()).unwrap();
        requests.clone().ready().await.unwrap().send_request(request, false).unwrap()
    };
    let (response, _sending) = call(65, "").await;
    assert_eq!(refused(response).await, (Code::ResourceExhausted, "LIMIT_EXCEEDED".to_owned()));
    assert_eq!(refusals(&reader, "too_large"), 1);
    // Of 64 KiB, a call without a message takes 8 KiB, 12 KiB more for its many headers, or 8 KiB more for long ones.
    for (headers, value, fit) in [(10, "", 8), (64, "", 3), (12, &*"v".repeat(800), 4)] {
        let mut waiting = Vec::new();
        for _ in 0..fit {
            waiting.push(call(headers, value).await);
        }
        let before = refusals(&reader, "connection_budget") + refusals(&reader, "listener_budget");
        let (response, _sending) = call(headers, value).await;
        assert_eq!(refused(response).await, (Code::ResourceExhausted, "LIMIT_EXCEEDED".to_owned()), "{headers}");
        assert_eq!(refusals(&reader, "connection_budget") + refusals(&reader, "listener_budget"), before + 1);
        drop(waiting);
        let mut grpc = client(bench.addresses.decisions).await;
        assert_eq!(ask(&mut grpc, "").await.unwrap(), 1);
    }
}

/// A connection has few streams that wait for nothing and need no credential. They leave its calls and the shared budget alone.
#[tokio::test]
async fn idle_streams_are_few() {
    let bench = serve_fixture(any_port()).await;
    let reader = bench.server.stats();
    let requests = connect_h2(bench.addresses.admin, 65_535).await;
    let mut open_streams = Vec::new();
    for _ in 0..8 {
        let (response, mut sending) = open(&requests, "/grpc.health.v1.Health/Watch").await;
        sending.send_data(b"\0\0\0\0\0"[..].into(), true).unwrap();
        open_streams.push(response.await.unwrap());
    }
    let (response, mut sending) = open(&requests, "/grpc.health.v1.Health/Watch").await;
    sending.send_data(b"\0\0\0\0\0"[..].into(), true).unwrap();
    assert_eq!(refused(response).await, (Code::ResourceExhausted, "LIMIT_EXCEEDED".to_owned()));
    let of_admin = stats(&reader, ListenerRole::Admin);
    assert_eq!(of_admin.refusals_total.iter().find(|(name, _)| *name == "idle_streams").unwrap().1, 1);
    assert_eq!(of_admin.waiting_bytes, 0, "they fit into the connection's own share");
    open_streams.pop();
    wait_until("a place is free again", async || {
        let (response, mut sending) = open(&requests, "/grpc.health.v1.Health/Watch").await;
        sending.send_data(b"\0\0\0\0\0"[..].into(), true).unwrap();
        !response.await.unwrap().headers().contains_key("grpc-status")
    })
    .await;
}

/// HTTP/2 or the meter of frames bounds these floods: the connection ends, and others are served.
#[tokio::test]
async fn floods_of_frames_end_their_connection() {
    let bench = serve_fixture(Settings { decision_runtimes: 1, ..any_port() }).await;
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    };
    let settings = frame(4, 0, 0, &[]);
    // POST, http, the path and an authority; the call waits for its message.
    let head = b"\x83\x86\x44\x1c/grpc.health.v1.Health/Check\x41\x01x";
    let resets = (0..20_000u32).flat_map(|call| {
        let stream = 2 * call + 1;
        [frame(1, 4, stream, head), frame(3, 0, stream, &8u32.to_be_bytes())].concat()
    });
    let continuations = frame(1, 0, 1, head).into_iter().chain(frame(9, 0, 1, &[]).repeat(20_000));
    let empty = frame(1, 4, 1, head).into_iter().chain(frame(0, 0, 1, &[]).repeat(20_000));
    for (name, flood) in [
        ("rapid reset", resets.collect::<Vec<u8>>()),
        ("continuations", continuations.collect()),
        ("empty data", empty.collect()),
    ] {
        let mut socket = send(bench.addresses.decisions, PREFACE).await;
        // The server may end the connection while the test is still writing.
        let _ = socket.write_all(&[settings.clone(), flood].concat()).await;
        read_to_end(socket).await;
        assert_eq!(ask(&mut client(bench.addresses.decisions).await, "").await.unwrap(), 1, "{name}");
    }
    // Frames that carry no call.
    let reader = bench.server.stats();
    for (address, role) in [(bench.addresses.decisions, ListenerRole::Decisions), (bench.addresses.admin, ListenerRole::Admin)] {
        for (name, flood) in [
            ("ping", frame(6, 0, 0, &[0; 8])),
            ("settings", settings.clone()),
            ("priority", frame(2, 0, 3, &[0, 0, 0, 0, 1])),
            ("window update", frame(8, 0, 0, &[0, 0, 0, 1])),
            ("unknown", frame(77, 0, 0, &[])),
        ] {
            let before = cuts(&reader, role, "frames");
            let mut socket = send(address, &[PREFACE, &settings].concat()).await;
            let _ = socket.write_all(&flood.repeat(5_000)).await;
            read_to_end(socket).await;
            assert_eq!(cuts(&reader, role, "frames"), before + 1, "{name}");
            assert_eq!(ask(&mut client(address).await, "").await.unwrap(), 1, "{name}");
        }
    }
}

#[tokio::test]
async fn a_connection_has_few_calls_at_the_administration() {
    let bench = serve_fixture(any_port()).await;
    for (address, expected) in [(bench.addresses.decisions, 256), (bench.addresses.admin, 16)] {
        let mut socket = send(address, PREFACE).await;
        let mut head = [0; 9];
        socket.read_exact(&mut head).await.unwrap();
        assert_eq!(head[3], 4, "the first frame holds the settings");
        let mut settings = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        socket.read_exact(&mut settings).await.unwrap();
        let streams = settings.chunks_exact(6).find(|setting| setting[..2] == [0, 3]).expect("a maximum of streams");
        assert_eq!(u32::from_be_bytes(streams[2..].try_into().unwrap()), expected);
    }
}
