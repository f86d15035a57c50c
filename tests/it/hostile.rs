//! Attacks on the server as a whole: memory, connections, slots, descriptors. Each attack uses raw HTTP/2 or plain sockets. During
//! it a well-behaved caller, a revocation and a probe must succeed.

use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::RevocationMeaning::Dead;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use prost::Message as _;
use rustix::process::{Pid, Resource, Rlimit};
use tokio::net::TcpStream;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{PATIENCE, ServerProcess, TestChain, TestWorld, authorization, channel, request};

const CHECK: &str = "/portcullis.v1.DecisionService/Check";
const BATCH: &str = "/portcullis.v1.DecisionService/CheckBatch";
const APPLY: &str = "/portcullis.v1.PolicyService/Apply";
const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";
const MIB: usize = 1024 * 1024;

/// A connection that can send any frames at any time.
struct RawConnection {
    requests: SendRequest<Bytes>,
}

impl RawConnection {
    async fn connect(address: &str) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        let (requests, connection) = h2::client::handshake(socket).await.unwrap();
        // The task ends when the server cuts the connection, which some tests cause.
        tokio::spawn(async move { drop(connection.await) });
        Self { requests }
    }

    /// Sends the headers; the caller sends the body.
    async fn open(&self, path: &str, authorization: Option<&str>) -> (ResponseFuture, SendStream<Bytes>) {
        let mut request = http::Request::post(format!("http://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let mut ready = self.requests.clone().ready().await.unwrap();
        ready.send_request(request.body(()).unwrap(), false).unwrap()
    }

    /// Makes a whole call; returns its code and its message.
    async fn call(&self, path: &str, body: Bytes) -> (Code, String) {
        let (response, mut sending) = self.open(path, None).await;
        sending.send_data(body, true).unwrap();
        status(response).await
    }
}

/// The frame header of a message of this length.
fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(bytes).unwrap().to_be_bytes());
    frame
}

fn framed(message: &[u8]) -> Bytes {
    [frame(message.len()).as_slice(), message].concat().into()
}

/// The first `bytes` bytes of a valid message of `of` bytes: one unknown field that never ends.
fn beginning(bytes: usize, of: usize) -> Bytes {
    let mut message = frame(of);
    message.push(15 << 3 | 2);
    let mut length = of - 5;
    // Four bytes of seven bits each hold any length that occurs here.
    for more in [0x80, 0x80, 0x80, 0] {
        message.push(u8::try_from(length & 0x7f).unwrap() | more);
        length >>= 7;
    }
    message.resize(bytes, b'x');
    message.into()
}

async fn status(response: ResponseFuture) -> (Code, String) {
    let answered = tokio::time::timeout(PATIENCE, async {
        let (head, mut body): (_, RecvStream) = response.await.unwrap().into_parts();
        if head.headers.contains_key("grpc-status") {
            return head.headers;
        }
        while let Some(part) = body.data().await {
            let part = part.unwrap();
            body.flow_control().release_capacity(part.len()).unwrap();
        }
        body.trailers().await.unwrap().unwrap()
    });
    let headers = answered.await.expect("it is never answered");
    let status = tonic::Status::from_header_map(&headers).unwrap();
    let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    assert!(status.code() == Code::Ok || !reason.is_empty(), "{status:?}");
    (status.code(), format!("{reason}: {}", status.message()))
}

/// A figure of `/proc/PID/status`, in bytes.
fn memory(server: &ServerProcess, figure: &str) -> usize {
    let text = std::fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

fn call(chain: &TestChain) -> wire::CheckRequest {
    request(chain, Bytes::new(), "crm/look", "{}")
}

/// On new connections, a good caller is permitted, a probe is answered, and a revocation takes effect.
async fn all_is_well(world: &TestWorld, server: &ServerProcess, session: &str) {
    let chain = world.session("alpha", session);
    let mut client = server.connect().await;
    let ask = async |client: &mut wire::decision_service_client::DecisionServiceClient<_>| {
        client.check(call(&chain)).await.unwrap().into_inner().reason
    };
    assert_eq!(ask(&mut client).await, "OK", "{session}");
    assert_eq!(server.get("/livez").0, 200, "{session}");
    server.operator().await.revoke("session", &[session], Dead).await;
    let killed = async {
        while ask(&mut client).await != "REVOKED_SESSION" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, killed).await.unwrap_or_else(|_| panic!("the kill has no effect: {session}"));
}

/// Unfinished messages hold little memory, and not for long. All other callers are served in the meantime.
#[tokio::test]
async fn unfinished_messages_hold_little_and_not_for_long() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    all_is_well(&world, &server, "before").await;
    let before = memory(&server, "VmRSS");
    let mut answers = Vec::new();
    let mut attackers = Vec::new();
    for _ in 0..8 {
        let attacker = RawConnection::connect(&server.decisions).await;
        for _ in 0..48 {
            let (response, mut sending) = attacker.open(BATCH, None).await;
            sending.send_data(beginning(MIB, 4 * MIB), false).unwrap();
            answers.push(tokio::spawn(async move {
                let status = status(response).await;
                drop(sending);
                status
            }));
        }
        attackers.push(attacker);
    }
    all_is_well(&world, &server, "meanwhile").await;
    let mut codes = [0; 17];
    for answer in answers {
        let (code, said) = answer.await.unwrap();
        assert!(said.starts_with("MESSAGE_INCOMPLETE: message") || said.starts_with("LIMIT_EXCEEDED: "), "{said}");
        codes[code as usize] += 1;
    }
    assert!(codes[Code::DeadlineExceeded as usize] > 0 && codes[Code::ResourceExhausted as usize] > 0, "{codes:?}");
    let grown = memory(&server, "VmHWM").saturating_sub(before);
    println!("unfinished messages of 384 MiB offered: resident grew by {} MiB", grown / MIB);
    // Eight budgets of 8 MiB, in buffers that grow by doubling, and eight windows.
    assert!(grown < 192 * MIB, "{grown}");
    drop(attackers);
    let slow = "portcullis_server_calls_refused_total{listener=\"decisions\",cause=\"too_slow\"}";
    assert!(server.metric(slow) > 0.0);
    all_is_well(&world, &server, "after").await;
    assert_eq!(server.metric("portcullis_server_waiting_bytes"), 0.0);
}

/// A message that would decode to far more bytes is counted before it is decoded. Every method has a limit of its own.
#[tokio::test]
async fn counts_and_lengths_are_checked_before_decoding() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    all_is_well(&world, &server, "before").await;
    let before = memory(&server, "VmRSS");
    let attacker = RawConnection::connect(&server.decisions).await;
    let check = async |path, message: Vec<u8>, expected: &str| {
        let (code, said) = attacker.call(path, framed(&message)).await;
        assert_eq!((code, said.as_str()), (Code::ResourceExhausted, expected));
    };
    let calls = [0x0a, 0].repeat(2 * MIB - 8);
    check(BATCH, calls, "LIMIT_EXCEEDED: requests: 129 is over the limit of 128").await;
    let tools = [0x1a, 0].repeat(100_000);
    check("/portcullis.v1.DecisionService/ListTools", tools, "LIMIT_EXCEEDED: tools: 10001 is over the limit of 10000").await;
    let tokens = [[0x12, 4].as_slice(), &[0x0a, 0].repeat(2)].concat().repeat(30_000);
    check(CHECK, tokens, "LIMIT_EXCEEDED: presentation.aat_chain: 73 is over the limit of 72").await;
    let grown = memory(&server, "VmHWM").saturating_sub(before);
    println!("a batch of two million calls: resident grew by {} MiB", grown / MIB);
    assert!(grown < 64 * MIB, "{grown}");
    // One byte over the limit is refused, before that byte was sent.
    for (path, limit) in [
        (CHECK, 256 * 1024),
        ("/portcullis.v1.DecisionService/Explain", 256 * 1024),
        ("/portcullis.v1.DecisionService/ListTools", 256 * 1024),
        ("/portcullis.v1.DecisionService/CheckStream", 256 * 1024),
        (BATCH, 4 * MIB),
        ("/portcullis.v1.RevocationService/Watch", 8 * 1024),
        ("/grpc.health.v1.Health/Check", 8 * 1024),
    ] {
        let (response, mut sending) = attacker.open(path, None).await;
        sending.send_data(frame(limit + 1).into(), false).unwrap();
        let expected = format!("LIMIT_EXCEEDED: message: {} is over the limit of {limit}", limit + 1);
        assert_eq!(status(response).await, (Code::ResourceExhausted, expected), "{path}");
    }
    let twice = [framed(&[]), framed(&[])].concat();
    let cut_short = beginning(100, 1000);
    for (body, expected) in [(twice.into(), "one uncompressed message"), (cut_short, "the request ends before it does")] {
        let (code, said) = attacker.call(CHECK, body).await;
        assert!(code == Code::InvalidArgument && said.contains(expected), "{said}");
    }
    all_is_well(&world, &server, "after").await;
}

/// The administration's listener reads no message of a caller who did not sign the call.
#[tokio::test]
async fn an_act_is_read_once_its_signature_is_verified() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let attacker = RawConnection::connect(&server.admin).await;
    let message = wire::ApplyPolicyRequest::default();
    let good = operator.authorization(APPLY, &message);
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let first = if signature.starts_with('A') { 'B' } else { 'A' };
    let forged = format!("{signed}.{first}{}", &signature[1..]);
    let other_method = operator.authorization("/portcullis.v1.PolicyService/Check", &message);
    let other_store = authorization(&operator.key, "another", APPLY, &message);
    let spent = operator.authorization("/portcullis.v1.PolicyService/History", &wire::PolicyHistoryRequest::default());
    let mut client = wire::policy_service_client::PolicyServiceClient::new(operator.channel.clone());
    client.history(crate::harness::signed(wire::PolicyHistoryRequest::default(), std::slice::from_ref(&spent))).await.unwrap();
    for (path, authorization, expected) in [
        (APPLY, None, "not signed"),
        (APPLY, Some(forged.as_str()), "does not verify"),
        (APPLY, Some(other_method.as_str()), "`htm`"),
        (APPLY, Some(other_store.as_str()), "`aud`"),
        ("/portcullis.v1.PolicyService/History", Some(spent.as_str()), "used before"),
        ("/portcullis.v1.PolicyService/Unheard", Some(good.as_str()), "no role allows the method"),
    ] {
        // No byte of the message is sent.
        let (response, sending) = attacker.open(path, authorization).await;
        let (code, said) = status(response).await;
        assert!(matches!(code, Code::Unauthenticated | Code::PermissionDenied) && said.contains(expected), "{code:?} {said}");
        drop(sending);
    }
    // The message of a signer is read, and compared with the signature.
    let (response, mut sending) = attacker.open(APPLY, Some(&good)).await;
    sending.send_data(framed(&wire::ApplyPolicyRequest { dry_run: true, ..message }.encode_to_vec()), true).unwrap();
    let (code, said) = status(response).await;
    assert!(code == Code::Unauthenticated && said.contains("`hth`"), "{said}");
}

/// Idle connections, and those that only watch the health, shut nobody out of any listener, even with few descriptors.
#[tokio::test]
async fn idle_connections_shut_nobody_out() {
    let world = TestWorld::new();
    let flags = {
        let mut command = crate::harness::binary();
        command.arg("--policies").arg(world.policies());
        command
    };
    let server = ServerProcess::start_within(&world, &flags, "ulimit -n 400");
    assert!(server.log().contains("this process may open 400 files"), "{}", server.log());
    let mut idle = Vec::new();
    for (address, count) in [(&server.admin, 80), (&server.http, 80), (&server.decisions, 250)] {
        for _ in 0..count {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
    }
    all_is_well(&world, &server, "silent").await;
    let mut busy = Vec::new();
    for (address, count) in [(&server.admin, 40), (&server.decisions, 200)] {
        for _ in 0..count {
            let attacker = RawConnection::connect(address).await;
            let (response, mut sending) = attacker.open(HEALTH_WATCH, None).await;
            sending.send_data(framed(&[]), true).unwrap();
            busy.push((attacker, response));
        }
    }
    all_is_well(&world, &server, "watching").await;
    let displaced = |listener| format!("portcullis_server_connections_cut_total{{listener=\"{listener}\",cause=\"displaced\"}}");
    for listener in ["admin", "http", "decisions"] {
        assert!(server.metric(&displaced(listener)) > 0.0, "{listener}");
    }
    drop((idle, busy));
}

/// A stolen chain keeps no place on the listener, not even with a stream beside it. Neither does a killed one. Who proved to hold a
/// chain stays.
#[tokio::test]
async fn a_stolen_chain_shuts_nobody_out() {
    let world = TestWorld::new();
    let flags = {
        let mut command = crate::harness::binary();
        command.arg("--policies").arg(world.policies());
        command
    };
    let server = ServerProcess::start_within(&world, &flags, "ulimit -n 400");
    server.operator().await.revoke("session", &["killed"], Dead).await;
    let own = world.session("alpha", "own");
    let mut gateway = server.connect().await;
    let asked = wire::CheckRequest { want_handle: true, ..world.call(&own, "crm/look", "{}") };
    let handle = gateway.check(asked).await.unwrap().into_inner().handle;
    assert!(!handle.is_empty());
    let mut attackers = Vec::new();
    for session in ["stolen", "killed"] {
        let stolen = framed(&call(&world.session("alpha", session)).encode_to_vec());
        for _ in 0..200 {
            let attacker = RawConnection::connect(&server.decisions).await;
            let (response, mut sending) = attacker.open("/portcullis.v1.RevocationService/Watch", None).await;
            sending.send_data(framed(&[]), true).unwrap();
            let (code, said) = attacker.call(CHECK, stolen.clone()).await;
            assert_eq!(code, Code::Ok, "{said}");
            attackers.push((attacker, response));
        }
    }
    all_is_well(&world, &server, "beside").await;
    let displaced = "portcullis_server_connections_cut_total{listener=\"decisions\",cause=\"displaced\"}";
    assert!(server.metric(displaced) > 0.0);
    // A handle is good on its connection only.
    let again = wire::CheckRequest {
        credential: Some(wire::check_request::Credential::Handle(handle)),
        ..request(&own, Bytes::new(), "crm/look", "{}")
    };
    assert_eq!(gateway.check(again).await.unwrap().into_inner().reason, "OK", "its connection was not cut");
    drop(attackers);
}

/// The calls of a batch share what they have in common, and are charged for what they make.
#[tokio::test]
async fn a_batch_is_charged_for_what_its_calls_make() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    all_is_well(&world, &server, "before").await;
    let before = memory(&server, "VmRSS");
    let small = wire::CheckRequest { tool: "x".to_owned(), ..request(&world.session("alpha", "s"), Bytes::new(), "x", "") };
    let small =
        wire::CheckRequest { credential: Some(wire::check_request::Credential::Presentation(Default::default())), ..small };
    let batch = framed(&wire::CheckBatchRequest { requests: vec![small; 128] }.encode_to_vec());
    let (mut attackers, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let attacker = RawConnection::connect(&server.decisions).await;
        for _ in 0..200 {
            let request = http::Request::post(format!("http://x{BATCH}"))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("tracestate", "a".repeat(15_000))
                .body(())
                .unwrap();
            let (response, mut sending) = attacker.requests.clone().ready().await.unwrap().send_request(request, false).unwrap();
            sending.send_data(batch.clone(), true).unwrap();
            answers.push(tokio::spawn(status(response)));
        }
        attackers.push(attacker);
    }
    for answer in answers {
        let (code, said) = answer.await.unwrap();
        assert!(code == Code::Ok || said.starts_with("LIMIT_EXCEEDED: "), "{said}");
    }
    let grown = memory(&server, "VmHWM").saturating_sub(before);
    println!("600 batches with a long `tracestate`: resident grew by {} MiB", grown / MIB);
    assert!(grown < 128 * MIB, "{grown}");
    drop(attackers);
    all_is_well(&world, &server, "after").await;
}

/// Streams that nobody signed take neither the places nor the memory of those who sign.
#[tokio::test]
async fn unsigned_streams_leave_administration_its_memory() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let mut attackers = Vec::new();
    for _ in 0..60 {
        let attacker = RawConnection::connect(&server.admin).await;
        for _ in 0..250 {
            let (response, mut sending) = attacker.open(HEALTH_WATCH, None).await;
            sending.send_data(framed(&[]), true).unwrap();
            attackers.push((attacker.requests.clone(), response));
        }
    }
    // More than a connection's own share.
    let content = world.policy() + &"# nothing\n".repeat(30_000);
    let file = wire::PolicyFile { path: "policy.yaml".to_owned(), content: content.into_bytes().into() };
    let message = wire::ApplyPolicyRequest { files: vec![file], dry_run: true };
    let authorization = operator.authorization(APPLY, &message);
    let mut client = wire::policy_service_client::PolicyServiceClient::new(channel(&server.admin).await);
    client.apply(crate::harness::signed(message, &[authorization])).await.unwrap();
    drop(attackers);
}

/// Watchers of revocations leave a slot to every other connection.
#[tokio::test]
async fn every_connection_can_watch_revocations() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let message = framed(&wire::WatchRevocationsRequest::default().encode_to_vec());
    let mut greedy = Vec::new();
    for _ in 0..4 {
        let attacker = RawConnection::connect(&server.decisions).await;
        let mut answers = Vec::new();
        for _ in 0..250 {
            let (response, mut sending) = attacker.open("/portcullis.v1.RevocationService/Watch", None).await;
            sending.send_data(message.clone(), true).unwrap();
            answers.push(response.await.unwrap());
        }
        let refused = answers.iter().filter(|answer| answer.headers().contains_key("grpc-status")).count();
        assert_eq!(refused, 242, "a connection gets eight places");
        greedy.push((attacker, answers));
    }
    let mut others = Vec::new();
    for _ in 0..30 {
        let mut client = RevocationServiceClient::new(channel(&server.decisions).await);
        let mut stream = client.watch(wire::WatchRevocationsRequest::default()).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
        others.push((client, stream));
    }
    all_is_well(&world, &server, "watched").await;
}

/// A limit on the size of files denies calls, as a full disk does, and ends no process.
#[tokio::test]
async fn a_limit_on_files_denies_and_kills_nobody() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    all_is_well(&world, &server, "before").await;
    let chain = world.session("alpha", "s");
    let limit = |current| {
        let pid = Pid::from_raw(i32::try_from(server.id()).unwrap());
        rustix::process::prlimit(pid, Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
    };
    limit(Some(16));
    let until = async |expected: &str| {
        let reached = async {
            loop {
                let mut client = server.connect().await;
                // A connection whose record was lost is cut.
                match client.check(call(&chain)).await {
                    Ok(answer) if answer.get_ref().reason == expected => return,
                    Ok(answer) => assert_ne!(answer.get_ref().reason, "OK", "permitted without a record"),
                    Err(_) => {}
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("never {expected}: {}", server.log()));
    };
    until("AUDIT_UNAVAILABLE").await;
    assert_eq!(server.get("/livez").0, 200);
    limit(None);
    until("OK").await;
}
