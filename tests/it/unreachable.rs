//! The kill switch at a server that does not answer: in every state of the server, the command says in time what to run instead.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{CommandResult, PATIENCE, ServerProcess, TestWorld, agent_id, audit_lines, binary, run_with};

/// The behavior of a listener on each connection.
type ConnectionHandler = fn(TcpStream);

/// A listener that is not a portcullis server. Its threads end with the process.
fn listening(manner: ConnectionHandler) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || manner(stream));
        }
    });
    format!("http://{address}")
}

/// Accepts all bytes and sends none.
fn silent(mut stream: TcpStream) {
    let mut bytes = [0; 1024];
    while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
}

/// The answer of a TLS server to a client that does not speak TLS: an alert, `unexpected_message`.
fn tls(mut stream: TcpStream) {
    let _ = stream.read(&mut [0; 64]);
    let _ = stream.write_all(&[0x15, 3, 3, 0, 2, 2, 10]);
}

fn http1(mut stream: TcpStream) {
    let _ = stream.read(&mut [0; 64]);
    let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
}

/// A server with no free connection.
fn full(stream: TcpStream) {
    drop(stream);
}

fn revoke(data: &Path, target: &str) -> CommandResult {
    let mut command = binary();
    command.args(["revoke", "agent", &agent_id("alpha"), "--reason", "leaked key", "--wait", "fleet"]);
    command.arg("--data").arg(data).args(["--target", target]);
    let began = Instant::now();
    let ran = run_with(&mut command, "");
    // This limit measures no speed. A command that waits for an answer that never comes would take half a minute.
    assert!(began.elapsed() < Duration::from_secs(20), "{ran:?}");
    ran
}

/// Runs the command of a message in a shell, unchanged.
fn run_as_told(stderr: &str) -> CommandResult {
    let line = stderr.lines().find_map(|line| line.strip_prefix("  portcullis ")).unwrap_or_else(|| panic!("{stderr}"));
    assert!(line.contains("--reason 'leaked key'") && !line.contains("--target"), "{line}");
    let folder = Path::new(env!("CARGO_BIN_EXE_portcullis")).parent().unwrap();
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", &format!("portcullis {line}")]).env("PATH", folder).stdin(Stdio::null());
    shell.env_remove("PORTCULLIS_STORE").env_remove("PORTCULLIS_DATA").env_remove("PORTCULLIS_OPERATOR_KEY");
    run_with(&mut shell, "")
}

#[test]
fn a_server_that_does_not_answer_is_told_of_with_the_line_that_works() {
    let world = TestWorld::new();
    let mut server = ServerProcess::start(&world);
    server.terminate();
    assert!(server.wait().success());
    let held = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    held.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let closed = format!("http://{}", held.local_addr().unwrap().as_socket().unwrap());
    let data = world.data();
    let states: Vec<(&str, String, &str)> = vec![
        ("closed", closed, "nobody answers"),
        ("silent", listening(silent), "took the connection and says nothing"),
        ("TLS", listening(tls), "does not answer as a portcullis server does"),
        ("HTTP/1", listening(http1), "does not answer as a portcullis server does"),
        // Whether the end comes before or after the greeting is a race.
        ("full", listening(full), "nswer"),
    ];
    std::thread::scope(|scope| {
        for (state, target, says) in &states {
            let data = &data;
            scope.spawn(move || {
                let ran = revoke(data, target).ended(69);
                assert!(ran.stderr.contains(says) && ran.stderr.contains(target.as_str()), "{state}: {ran:?}");
                assert!(ran.stderr.contains("without the server, if this is the store that it follows:"), "{state}: {ran:?}");
            });
        }
    });
    let told = revoke(&data, &states[0].1).ended(69);
    // The server has ended, so nobody can say that it follows this store.
    let done = run_as_told(&told.stderr).ended(1);
    assert!(done.stdout.contains("revoked agent") && done.stdout.contains("permits that were given before it"), "{done:?}");
    assert!(done.stderr.contains("no server was heard to follow it") && !done.stdout.contains("replicas deny"), "{done:?}");
    // A folder without a store cannot give the command, so the message says where to run it.
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::copy(data.join("local.jwk"), elsewhere.path().join("local.jwk")).unwrap();
    let told = revoke(elsewhere.path(), &states[0].1).ended(69);
    assert!(told.stderr.contains("holds no store") && told.stderr.contains("env:VARIABLE"), "{told:?}");
}

#[test]
fn a_server_that_is_stopped_is_told_of() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    server.signal(rustix::process::Signal::STOP);
    let ran = revoke(&world.data(), &server.admin_url()).ended(69);
    assert!(ran.stderr.contains("says nothing") && ran.stderr.contains("--store sqlite:"), "{ran:?}");
    server.signal(rustix::process::Signal::CONT);
    let ran = revoke(&world.data(), &server.admin_url()).ended(0);
    assert!(ran.stdout.contains("1 of 1 replicas deny"), "{ran:?}");
}

/// Another process holds the lock on the file. The server says within its own bound that the outcome is not known; the act goes on,
/// and leaves its record when it is done.
#[test]
fn a_store_that_hangs_is_told_of_and_the_act_leaves_its_record() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let holder = rusqlite::Connection::open(world.data().join("store.db")).unwrap();
    holder.busy_timeout(PATIENCE).unwrap();
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();
    let ran = revoke(&world.data(), &server.admin_url());
    let ran = ran.ended(69);
    assert!(ran.stderr.contains("not known whether it was done") && ran.stderr.contains("--store sqlite:"), "{ran:?}");
    holder.execute_batch("ROLLBACK").unwrap();
    let until = Instant::now() + PATIENCE;
    let ended = |line: &serde_json::Value| {
        line["kind"] == "act" && line["method"].as_str().is_some_and(|method| method.ends_with("/Revoke"))
    };
    while !audit_lines(&world.data()).iter().any(ended) {
        assert!(Instant::now() < until, "the act left no record");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(revoke(&world.data(), &server.admin_url()).ended(0).stdout.contains("replicas deny"));
}

/// An act on a copy of the store reaches no server. The act is done, and the answer does not look like a kill.
#[test]
fn a_kill_in_a_store_that_no_server_follows_is_told() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let data = world.data();
    let (store, copy) = (data.join("store.db"), world.folder.path().join("copy.db"));
    let admin = |arguments: &[&str], store: &Path| {
        let mut command = binary();
        command.args(arguments).arg("--store").arg(format!("sqlite:{}", store.display()));
        run_with(command.arg("--data").arg(&data), "")
    };
    let kill = ["revoke", "agent", &agent_id("alpha"), "--reason", "leaked key", "--wait", "fleet"];
    let json = [&["--json"][..], &kill].concat();
    run_with(binary().args(["store", "backup"]).arg(&copy).arg("--data").arg(&data), "").ended(0);
    // The server follows the store of its data folder.
    let done = admin(&kill, &store).ended(0);
    assert!(done.stdout.contains("1 of 1 replicas deny") && done.stdout.contains("followed by local 127.0.0.1:"), "{done:?}");
    assert!(done.stderr.is_empty(), "{done:?}");
    let said = admin(&json, &store).ended(0).json();
    assert_eq!(said["store"]["url"], serde_json::json!(format!("sqlite:{}", store.display())));
    assert_eq!(said["store"]["heard"].as_array().unwrap().len(), 1, "{said}");

    // The position that the replica recorded is ahead of the copy.
    let until = Instant::now() + PATIENCE;
    let number = said["revision"].as_str().unwrap().rsplit('.').next().unwrap().to_owned();
    let recorded = || std::fs::read_to_string(data.join("place.json")).unwrap_or_default();
    while !recorded().contains(&format!("\"number\":{number},")) {
        assert!(Instant::now() < until, "{}", recorded());
        std::thread::sleep(Duration::from_millis(5));
    }
    let done = admin(&kill, &copy).ended(1);
    assert!(done.stdout.contains("revoked agent") && !done.stdout.contains("replicas deny"), "{done:?}");
    for says in ["copy.db` is not the one that a replica followed", "place.json", "nobody can say what the server answers"] {
        assert!(done.stderr.contains(says), "{says}: {done:?}");
    }
    // So do other acts, which wait for nobody.
    let lifted = admin(&["reinstate", "agent", &agent_id("alpha")], &copy).ended(0);
    assert!(lifted.stderr.contains("is not the one that a replica followed"), "{lifted:?}");
    let applied = admin(&["policy", "apply", world.policies().to_str().unwrap()], &copy).ended(0);
    assert!(applied.stderr.contains("is not the one that a replica followed"), "{applied:?}");
    drop(server);
}
