//! Records as a JSON parser reads them, and the barrier over outputs that fail.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::model::decision::{Effect, Evidence, Obligation, PolicyEntryRef};
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::revision::HistoryId;
use crate::model::time::{ManualClock, SystemClock};
use crate::model::write_barrier::WriteBarrier as _;

use super::disk_monitor::DiskMonitor;
use super::query::{RecordFilter, read_file, read_folder};
use super::recorder::{AuditOutput, AuditRecorder};
use super::*;

const DIGEST: [u8; 32] = [7; 32];
const DIGEST_TEXT: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";

fn verified(id: &str) -> PrincipalFacts<'_> {
    PrincipalFacts { id, evidence: Evidence::Verified }
}

fn bare<'a>(history: &'a HistoryId, chain: &'a ChainFragment) -> DecisionRecord<'a> {
    DecisionRecord {
        time_unix_ns: 1_700_000_000_000_000_001,
        method: "Check",
        decision_id: "d1",
        request_id: "",
        trace_id: None,
        effect: Effect::Deny,
        reason: Reason::TokenMalformed,
        deciding_layer: Some(DecisionLayer::Identity),
        hop: None,
        matched: None,
        would_be: None,
        chain,
        proved: true,
        agent: None,
        tool: None,
        arguments_sha256: None,
        proof_jti: None,
        approval_digest: None,
        obligations: &[],
        gateway: "127.0.0.1:1",
        history,
        revision: 42,
        snapshot_digest: "ab",
        snapshot_age_ms: 3,
        latency_ns: 900,
    }
}

/// Parses the line that `write` appends.
fn parsed(write: impl FnOnce(&mut Vec<u8>)) -> Value {
    let mut line = Vec::new();
    write(&mut line);
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "one line");
    assert_eq!(line.last(), Some(&b'\n'));
    serde_json::from_slice(&line).unwrap()
}

#[test]
fn a_decision_says_everything_that_is_known() {
    let history = HistoryId::new("h");
    let level = TokenFacts {
        jti: "j1",
        hop_hash: &DIGEST,
        holder_thumbprint: "t1",
        issuer: "https://i",
        expires_at_unix_s: 1_700_000_300,
    };
    let chain = ChainFragment::new(&ChainFacts {
        user: Some(verified("[\"https://i\",\"ada\"]")),
        application: Some(PrincipalFacts { id: "crm", evidence: Evidence::Attested }),
        agents: &[verified("spiffe://a/1"), verified("spiffe://a/2")],
        session: Some(verified("s1")),
        task: Some(verified("x1")),
        tokens: &[level, TokenFacts { jti: "j2", ..level }],
    });
    let matched = PolicyEntryRef { kind: "group", id: "sales".into(), entry: "deny crm/*".into() };
    let obligation = Obligation { kind: "redact".into(), parameters_json: "{\"fields\":[\"a\"]}".into() };
    let record = DecisionRecord {
        request_id: "r1",
        trace_id: Some([0xab; 16]),
        effect: Effect::NeedsApproval,
        reason: Reason::ApprovalRequired,
        deciding_layer: Some(DecisionLayer::User),
        hop: Some(1),
        matched: Some(&matched),
        would_be: None,
        tool: Some(verified("crm/read")),
        arguments_sha256: Some(&DIGEST),
        proof_jti: Some("p1"),
        approval_digest: Some("a1"),
        obligations: &[obligation.clone(), obligation],
        ..bare(&history, &chain)
    };
    let identity = |id: &str| json!({"id": id, "evidence": "VERIFIED"});
    let level = |jti: &str| {
        json!({"jti": jti, "hop_hash": DIGEST_TEXT, "holder_thumbprint": "t1", "issuer": "https://i",
            "expires_at_unix_ms": 1_700_000_300_000_i64})
    };
    let obligation = json!({"kind": "redact", "parameters_json": "{\"fields\":[\"a\"]}"});
    assert_eq!(
        parsed(|out| record.write_line("n1", out)),
        json!({
            "kind": "decision", "time_unix_ns": 1_700_000_000_000_000_001_i64, "node": "n1", "method": "Check",
            "decision_id": "d1", "request_id": "r1", "trace_id": "ab".repeat(16), "effect": "NEEDS_APPROVAL",
            "reason": "APPROVAL_REQUIRED", "deciding_layer": "user", "hop": 1,
            "matched": {"kind": "group", "id": "sales", "entry": "deny crm/*"},
            "principals": {
                "tool": identity("crm/read"), "user": identity("[\"https://i\",\"ada\"]"),
                "application": {"id": "crm", "evidence": "ATTESTED"},
                "agents": [identity("spiffe://a/1"), identity("spiffe://a/2")],
                "session": identity("s1"), "task": identity("x1"),
            },
            "chain": [level("j1"), level("j2")],
            "arguments_sha256": DIGEST_TEXT, "proof_jti": "p1", "approval_digest": "a1",
            "obligations": [obligation.clone(), obligation],
            "gateway": "127.0.0.1:1", "revision": "h.42", "snapshot_digest": "ab", "snapshot_age_ms": 3, "latency_ns": 900,
        })
    );
}

#[test]
fn what_is_not_known_is_absent() {
    let (history, chain) = (HistoryId::new("h"), ChainFragment::default());
    let mut expected = json!({
        "kind": "decision", "time_unix_ns": 1_700_000_000_000_000_001_i64, "node": "n1", "method": "Check",
        "decision_id": "d1", "effect": "DENY", "reason": "TOKEN_MALFORMED", "deciding_layer": "identity", "principals": {},
        "gateway": "127.0.0.1:1", "revision": "h.42", "snapshot_digest": "ab", "snapshot_age_ms": 3, "latency_ns": 900,
    });
    assert_eq!(parsed(|out| bare(&history, &chain).write_line("n1", out)), expected);

    // Three records: a tool without a chain, a chain without a tool, and a permit.
    expected["principals"] = json!({"tool": {"id": "t", "evidence": "VERIFIED"}});
    let record = DecisionRecord { tool: Some(verified("t")), ..bare(&history, &chain) };
    assert_eq!(parsed(|out| record.write_line("n1", out)), expected);
    expected["principals"] = json!({"agents": [{"id": "a", "evidence": "VERIFIED"}]});
    let chain = ChainFragment::new(&ChainFacts { agents: &[verified("a")], ..ChainFacts::default() });
    assert_eq!(parsed(|out| bare(&history, &chain).write_line("n1", out)), expected);
    expected.as_object_mut().unwrap().remove("deciding_layer");
    expected["effect"] = json!("PERMIT");
    expected["reason"] = json!("OK");
    let record = DecisionRecord { effect: Effect::Permit, reason: Reason::Ok, deciding_layer: None, ..bare(&history, &chain) };
    assert_eq!(parsed(|out| record.write_line("n1", out)), expected);
}

#[test]
fn an_act_shows_its_signatures_only_when_it_was_done() {
    let (operators, signatures) = (["ada".to_owned(), "bob".to_owned()], ["s1".to_owned(), "s2".to_owned()]);
    let act = ActRecord {
        time_unix_ns: 5,
        method: "/portcullis.v1.RevocationService/Revoke",
        operators: &operators,
        signatures: &signatures,
        outcome: ActOutcome::Accepted,
        code: "OK",
        reason: "stolen",
        revision: Some("h.43"),
        committed: true,
        peer: "127.0.0.1:2",
    };
    let mut expected = json!({
        "kind": "act", "time_unix_ns": 5, "node": "n1", "method": "/portcullis.v1.RevocationService/Revoke",
        "operator": "ada", "operators": ["ada", "bob"], "effect": "ACCEPTED", "reason": "stolen",
        "signatures": ["s1", "s2"], "revision": "h.43", "peer": "127.0.0.1:2",
    });
    assert_eq!(parsed(|out| act.write_line("n1", out)), expected);
    let refused = ActRecord { operators: &[], outcome: ActOutcome::Refused, code: "REJECTED", revision: None, ..act };
    for (member, value) in [("operator", Value::Null), ("operators", json!([])), ("effect", json!("REFUSED"))] {
        expected[member] = value;
    }
    expected["signatures"] = json!([]);
    expected["revision"] = Value::Null;
    assert_eq!(parsed(|out| refused.write_line("n1", out)), expected);
}

#[test]
fn hostile_text_stays_inside_its_member() {
    let history = HistoryId::new("h\"\n");
    for hostile in ["\",\"effect\":\"PERMIT", "\n{\"kind\":\"act\"}\n", "\u{0}\u{7f}\r\t\\", "𝕏\u{2028}\u{feff}", "\\"] {
        let chain = ChainFragment::new(&ChainFacts { agents: &[verified(hostile)], ..ChainFacts::default() });
        let matched = PolicyEntryRef { kind: "group", id: hostile.into(), entry: hostile.into() };
        let record = DecisionRecord {
            decision_id: hostile,
            request_id: hostile,
            gateway: hostile,
            tool: Some(verified(hostile)),
            proof_jti: Some(hostile),
            matched: Some(&matched),
            would_be: None,
            ..bare(&history, &chain)
        };
        let value = parsed(|out| record.write_line(hostile, out));
        for path in ["/node", "/decision_id", "/request_id", "/gateway", "/principals/tool/id", "/proof_jti", "/matched/entry"] {
            assert_eq!(value.pointer(path), Some(&json!(hostile)), "{path}");
        }
        assert_eq!(value.pointer("/principals/agents/0/id"), Some(&json!(hostile)));
        assert_eq!((&value["effect"], &value["revision"]), (&json!("DENY"), &json!("h\"\n.42")));
    }
}

/// An output that takes at most a few bytes at once, and fails on request.
#[derive(Clone, Default)]
struct FaultyDisk(Arc<Mutex<FaultyDiskState>>);

#[derive(Default)]
struct FaultyDiskState {
    content: Vec<u8>,
    room_bytes: usize,
    chunk_bytes: usize,
    writes: usize,
    sync_fails: bool,
    cut_fails: bool,
}

impl AuditOutput for FaultyDisk {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut disk = self.0.lock().unwrap();
        disk.writes += 1;
        let count = bytes.len().min(disk.chunk_bytes).min(disk.room_bytes);
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        disk.room_bytes -= count;
        disk.content.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn sync(&self) -> io::Result<()> {
        if self.0.lock().unwrap().sync_fails { Err(io::Error::other("sync")) } else { Ok(()) }
    }

    fn truncate_by(&self, bytes_count: usize) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.cut_fails {
            return Err(io::Error::other("cut"));
        }
        let length = disk.content.len() - bytes_count;
        disk.content.truncate(length);
        disk.room_bytes += bytes_count;
        Ok(())
    }
}

fn recorder_on(output: Box<dyn AuditOutput>) -> AuditRecorder {
    AuditRecorder::new("n1", Arc::new(SystemClock), Arc::new(DiskMonitor::unlimited()), 64 * 1024, output)
}

fn on_disk(room_bytes: usize, chunk_bytes: usize) -> (AuditRecorder, FaultyDisk) {
    let disk = FaultyDisk::default();
    *disk.0.lock().unwrap() = FaultyDiskState { room_bytes, chunk_bytes, ..FaultyDiskState::default() };
    (recorder_on(Box::new(disk.clone())), disk)
}

fn record(recorder: &AuditRecorder, decision_id: &str) -> Result<(), AuditUnavailable> {
    let chain = ChainFragment::new(&ChainFacts { agents: &[verified("a")], ..ChainFacts::default() });
    let history = HistoryId::new("h");
    recorder.record(&DecisionRecord { decision_id, ..bare(&history, &chain) })
}

fn ids(disk: &FaultyDisk) -> Vec<String> {
    let disk = disk.0.lock().unwrap();
    let lines = disk.content.split_inclusive(|byte| *byte == b'\n');
    lines.map(|line| serde_json::from_slice::<Value>(line).unwrap()["decision_id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_barrier_writes_all_records_at_once() {
    let (recorder, disk) = on_disk(usize::MAX, usize::MAX);
    recorder.flush_before_write().unwrap();
    assert_eq!(disk.0.lock().unwrap().writes, 0, "nothing to write");
    for id in ["1", "2", "3"] {
        record(&recorder, id).unwrap();
    }
    assert!(disk.0.lock().unwrap().content.is_empty() && recorder.pending_bytes() > 0);
    recorder.flush_before_write().unwrap();
    assert_eq!((ids(&disk), disk.0.lock().unwrap().writes), (vec!["1".into(), "2".into(), "3".into()], 1));
    assert_eq!((recorder.pending_bytes(), recorder.records(), recorder.failure_count()), (0, 3, 0));
}

#[test]
fn partial_writes_and_a_full_disk_lose_nothing() {
    let (recorder, disk) = on_disk(100, 7);
    record(&recorder, "1").unwrap();
    record(&recorder, "2").unwrap();
    let error = recorder.flush_before_write().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(record(&recorder, "3"), Err(AuditUnavailable::Unwritable));
    assert_eq!((recorder.failure_count(), recorder.is_healthy()), (1, false));
    // A connection that opened after the failure may carry denials: no record was taken since.
    recorder.flush_before_write().unwrap();
    recorder.flush_tick();
    assert_eq!(recorder.failure_count(), 1, "an attempt that fails again is the same failure");

    disk.0.lock().unwrap().room_bytes = usize::MAX;
    recorder.flush_tick();
    assert!(recorder.is_healthy());
    record(&recorder, "4").unwrap();
    recorder.flush_before_write().unwrap();
    assert_eq!(ids(&disk), ["1", "2", "4"]);
}

/// A process that ends while its disk is full leaves whole lines, because a JSON reader stops at a part of a line.
#[test]
fn a_full_disk_leaves_whole_lines() {
    let (probe, probed) = on_disk(usize::MAX, usize::MAX);
    record(&probe, "1").unwrap();
    probe.flush_before_write().unwrap();
    let line_bytes = probed.0.lock().unwrap().content.len();
    for (room_bytes, whole) in [(line_bytes / 2, 0), (line_bytes + 1, 1), (2 * line_bytes, 2)] {
        for cut_fails in [false, true] {
            let (recorder, disk) = on_disk(room_bytes, 7);
            disk.0.lock().unwrap().cut_fails = cut_fails;
            for id in ["1", "2", "3"] {
                record(&recorder, id).unwrap();
            }
            recorder.flush_before_write().unwrap_err();
            assert!(recorder.finish().is_err());
            let length = disk.0.lock().unwrap().content.len();
            assert_eq!(length, if cut_fails { room_bytes } else { whole * line_bytes }, "{room_bytes}");
            disk.0.lock().unwrap().room_bytes = usize::MAX;
            recorder.flush_tick();
            assert_eq!(ids(&disk), ["1", "2", "3"], "{room_bytes}");
        }
    }
}

/// A device of the system.
struct Device(File);

impl AuditOutput for Device {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        (&self.0).write(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate_by(&self, _bytes_count: usize) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}

#[test]
fn a_full_device_denies() {
    let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
    let recorder = recorder_on(Box::new(Device(full)));
    record(&recorder, "1").unwrap();
    assert_eq!(recorder.flush_before_write().unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(record(&recorder, "2"), Err(AuditUnavailable::Unwritable));
    let act = ActRecord {
        time_unix_ns: 0,
        method: "m",
        operators: &["ada".to_owned()],
        signatures: &[],
        outcome: ActOutcome::Refused,
        code: "REJECTED",
        reason: "",
        revision: None,
        committed: false,
        peer: "",
    };
    assert_eq!(recorder.record_act(&act), Err(AuditUnavailable::Unwritable));
    assert!(recorder.finish().is_err());
}

#[test]
fn a_full_buffer_takes_no_part_of_a_record() {
    let (recorder, disk) = on_disk(usize::MAX, usize::MAX);
    let taken = (0..).take_while(|id| record(&recorder, &id.to_string()).is_ok()).count();
    assert_eq!(record(&recorder, "late"), Err(AuditUnavailable::BufferFull));
    assert!(taken > 100 && recorder.pending_bytes() <= 64 * 1024);
    recorder.flush_before_write().unwrap();
    assert_eq!(ids(&disk).len(), taken);
    record(&recorder, "late").unwrap();
}

#[test]
fn the_timer_leaves_busy_recorders_to_their_sockets() {
    let (recorder, disk) = on_disk(usize::MAX, usize::MAX);
    record(&recorder, "1").unwrap();
    recorder.flush_before_write().unwrap();
    record(&recorder, "2").unwrap();
    recorder.flush_tick();
    assert_eq!(ids(&disk), ["1"], "a socket wrote since the last visit");
    recorder.flush_tick();
    assert_eq!(ids(&disk), ["1", "2"], "no socket came");
}

#[test]
fn a_failed_sync_denies_until_one_succeeds() {
    let (recorder, disk) = on_disk(usize::MAX, usize::MAX);
    record(&recorder, "1").unwrap();
    recorder.flush_before_write().unwrap();
    disk.0.lock().unwrap().sync_fails = true;
    recorder.flush_tick();
    assert_eq!(record(&recorder, "2"), Err(AuditUnavailable::Unwritable));
    disk.0.lock().unwrap().sync_fails = false;
    recorder.flush_tick();
    record(&recorder, "3").unwrap();
}

#[test]
fn files_are_private_separate_and_finished() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("audit");
    let clock = Arc::new(ManualClock::at_unix_s(1_700_000_000));
    let first = AuditLog::open(&directory, "node/../1", clock.clone()).unwrap();
    let second = AuditLog::open(&directory, "node/../1", clock.clone()).unwrap();
    for (log, id) in [(&first, "1"), (&second, "2")] {
        record(&log.open_recorder("runtime-0").unwrap(), id).unwrap();
        log.open_recorder("unused").unwrap();
        assert_eq!(log.status().records, 1);
        log.shutdown().unwrap();
        assert!(log.status().healthy && log.status().pending_bytes == 0);
    }
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    let paths: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(paths.len(), 2, "{paths:?}");
    assert!(paths.iter().all(|path| mode(path) == 0o600));
    let read: Vec<_> = read_folder(&directory).unwrap().map(|record| record.unwrap()["decision_id"].clone()).collect();
    assert_eq!(read.len(), 2);
    assert!(read.contains(&json!("1")) && read.contains(&json!("2")));
}

#[test]
fn what_no_socket_flushes_the_thread_does() {
    let directory = tempfile::tempdir().unwrap();
    let log = AuditLog::open(directory.path(), "n1", Arc::new(SystemClock)).unwrap();
    let recorder = log.open_recorder("r").unwrap();
    record(&recorder, "1").unwrap();
    while recorder.pending_bytes() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(read_folder(directory.path()).unwrap().filter(Result::is_ok).count(), 1);
}

/// A log whose thread does nothing, because the test calls `flush_tick`, with one recorder. The folder is `audit` in `parent`.
fn log_without_timer(parent: &Path) -> (Arc<AuditLog>, Arc<AuditRecorder>, PathBuf) {
    let directory = parent.join("audit");
    let settings = Settings { sync_interval_ms: 3_600_000, ..Settings::default() };
    let space = Box::new(crate::model::disk::PathDiskSpace(directory.clone()));
    let log = AuditLog::open_with(&directory, "n1", Arc::new(SystemClock), settings, space).unwrap();
    let recorder = log.open_recorder("r").unwrap();
    (log, recorder, directory)
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// The kind of each line of a folder, and the id of each decision.
fn kinds_and_ids(directory: &Path) -> Vec<(String, Option<String>)> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let lines = read_folder(directory).unwrap().map(Result::unwrap);
    lines.map(|line| (text(&line["kind"]).unwrap_or_default(), text(&line["decision_id"]))).collect()
}

fn tick_until(recorder: &AuditRecorder, reached: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !reached() {
        assert!(Instant::now() < until, "{recorder:?}");
        recorder.flush_tick();
        std::thread::yield_now();
    }
}

fn committed_act<'a>(operators: &'a [String], signatures: &'a [String]) -> ActRecord<'a> {
    ActRecord {
        time_unix_ns: 0,
        method: "m",
        operators,
        signatures,
        outcome: ActOutcome::Accepted,
        code: "OK",
        reason: "stolen",
        revision: Some("h.2"),
        committed: true,
        peer: "",
    }
}

/// A file that is gone takes writes that nobody finds. Whatever happened to it, a failure is counted, nothing is recorded in it any
/// more, and a new file begins with a line that says so.
#[test]
fn a_file_that_is_gone_is_a_failure_and_a_new_file_follows() {
    let check = |name: &str, harm: fn(&Path, &Path)| {
        let parent = tempfile::tempdir().unwrap();
        let (log, recorder, directory) = log_without_timer(parent.path());
        record(&recorder, "1").unwrap();
        recorder.flush_before_write().unwrap();
        let file = files_in(&directory).remove(0);
        harm(&file, parent.path());
        // The act is not in the log, and its answer says so.
        let (operators, signatures) = (["ada".to_owned()], ["s1".to_owned()]);
        assert_eq!(recorder.record_act(&committed_act(&operators, &signatures)), Err(AuditUnavailable::Unwritable), "{name}");
        assert_eq!(record(&recorder, "2"), Err(AuditUnavailable::Unwritable), "{name}");
        assert_eq!((recorder.failure_count(), recorder.is_healthy(), log.status().healthy), (1, false, false), "{name}");
        assert!(log.denial_cause().unwrap().contains("cannot be written"), "{name}");

        recorder.flush_tick();
        assert!(recorder.is_healthy() && log.denial_cause().is_none(), "{name}");
        record(&recorder, "3").unwrap();
        recorder.flush_before_write().unwrap();
        let has_gap = |path: &PathBuf| std::fs::read_to_string(path).unwrap().contains("\"gap\"");
        let new = files_in(&directory).into_iter().find(has_gap).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&new)), (0o700, 0o600), "{name}");
        let lines: Vec<Value> = read_file(&new).unwrap().map(Result::unwrap).collect();
        let kinds: Vec<&Value> = lines.iter().map(|line| &line["kind"]).collect();
        assert_eq!(kinds, ["gap", "act", "decision"], "{name}");
        assert!(lines[0]["reason"].as_str().unwrap().contains(file.to_str().unwrap()), "{name}: {lines:?}");
        assert_eq!(recorder.failure_count(), 1, "{name}");
        log.shutdown().unwrap();
    };
    check("moved", |file, parent| std::fs::rename(file, parent.join("moved.jsonl")).unwrap());
    check("removed", |file, _| std::fs::remove_file(file).unwrap());
    check("removed with its folder", |file, _| std::fs::remove_dir_all(file.parent().unwrap()).unwrap());
    check("replaced", |file, parent| {
        std::fs::copy(file, parent.join("copy.jsonl")).unwrap();
        std::fs::rename(parent.join("copy.jsonl"), file).unwrap();
    });
    check("emptied", |file, _| OpenOptions::new().write(true).open(file).unwrap().set_len(0).unwrap());
    check("cut", |file, _| {
        let length = std::fs::metadata(file).unwrap().len();
        OpenOptions::new().write(true).open(file).unwrap().set_len(length - 1).unwrap();
    });
}

/// Nobody calls, and the timer notices all the same. While no new file can be made, everything is denied.
#[test]
fn the_timer_notices_that_a_file_is_gone_and_tries_again() {
    let parent = tempfile::tempdir().unwrap();
    let (log, recorder, directory) = log_without_timer(parent.path());
    record(&recorder, "1").unwrap();
    recorder.flush_before_write().unwrap();
    std::fs::rename(&directory, parent.path().join("moved")).unwrap();
    std::fs::write(&directory, "a file stands where the folder was").unwrap();
    tick_until(&recorder, || !recorder.is_healthy());
    recorder.flush_tick();
    assert_eq!((recorder.failure_count(), recorder.is_healthy()), (1, false));
    assert_eq!(record(&recorder, "2"), Err(AuditUnavailable::Unwritable));
    std::fs::remove_file(&directory).unwrap();
    tick_until(&recorder, || recorder.is_healthy());
    assert_eq!(kinds_and_ids(&directory), [("gap".to_owned(), None)]);
    assert_eq!(kinds_and_ids(&parent.path().join("moved")), [("decision".to_owned(), Some("1".to_owned()))]);
    assert_eq!(recorder.failure_count(), 1);
    log.shutdown().unwrap();
}

/// A loss that nobody noticed before the end is an error of the end.
#[test]
fn a_file_that_is_gone_at_the_end_is_an_error() {
    let parent = tempfile::tempdir().unwrap();
    let (log, recorder, directory) = log_without_timer(parent.path());
    log.open_recorder("unused").unwrap();
    record(&recorder, "1").unwrap();
    recorder.flush_before_write().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(log.shutdown().unwrap_err().to_string().contains("was removed"));
    assert_eq!(recorder.failure_count(), 1);
}

/// A rotation loses nothing and denies nothing, and the former file is complete and free for whoever moves it.
#[test]
fn a_rotation_continues_in_a_new_file() {
    let parent = tempfile::tempdir().unwrap();
    let (log, recorder, directory) = log_without_timer(parent.path());
    log.reopen_files();
    recorder.flush_tick();
    assert_eq!(files_in(&directory).len(), 1, "an empty file stays");
    record(&recorder, "1").unwrap();
    recorder.flush_before_write().unwrap();
    let former = files_in(&directory).remove(0);
    for _ in 0..2 {
        log.reopen_files();
        recorder.flush_tick();
        assert_eq!(files_in(&directory).len(), 2);
    }
    File::open(&former).unwrap().try_lock().unwrap();
    let moved = parent.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    std::fs::rename(&former, moved.join("former.jsonl")).unwrap();
    record(&recorder, "2").unwrap();
    recorder.flush_before_write().unwrap();
    let decision = |id: &str| [("decision".to_owned(), Some(id.to_owned()))];
    assert_eq!(kinds_and_ids(&moved), decision("1"));
    assert_eq!(kinds_and_ids(&directory), decision("2"));
    log.reopen_files();
    recorder.flush_tick();
    log.shutdown().unwrap();
    log.shutdown().unwrap();
    assert_eq!(files_in(&directory).len(), 1, "an empty file is removed");
    assert_eq!(recorder.failure_count(), 0);
}

#[test]
fn an_unusable_folder_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let message = AuditLog::open(&file, "n1", Arc::new(SystemClock)).unwrap_err().to_string();
    assert!(message.contains(&file.display().to_string()) && !message.contains('\n'), "{message}");
}

#[test]
fn damaged_lines_are_errors_and_do_not_hide_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.jsonl");
    std::fs::write(&path, "{\"a\":1}\nnot json\n[]\n{\"a\":2}\n{\"a\":").unwrap();
    std::fs::write(directory.path().join("b.txt"), "not a log\n").unwrap();
    let lines: Vec<_> = read_file(&path)
        .unwrap()
        .map(|line| match line {
            Ok(value) => value["a"].to_string(),
            Err(Error::InvalidLine { line, .. }) => format!("bad {line}"),
            Err(Error::UnfinishedLine { line, .. }) => format!("unfinished {line}"),
            Err(error) => panic!("{error}"),
        })
        .collect();
    assert_eq!(lines, ["1", "bad 2", "bad 3", "2", "unfinished 5"]);
    assert_eq!(read_folder(directory.path()).unwrap().count(), 5);
}

#[test]
fn filters_follow_paths() {
    let record = json!({"time_unix_ns": 10, "reason": "OK", "hop": 1, "principals": {"agents": [{"id": "a"}, {"id": "b"}]}});
    let check = |filter: RecordFilter, expected| assert_eq!(filter.matches(&record), expected, "{filter:?}");
    let member = |path: &str, text: &str| RecordFilter { members: vec![(path.into(), text.into())], ..RecordFilter::default() };
    check(RecordFilter::default(), true);
    for (path, text, expected) in [
        ("reason", "OK", true),
        ("reason", "STALE", false),
        ("hop", "1", true),
        ("principals.agents.id", "b", true),
        ("principals.agents.id", "c", false),
        ("principals.agents", "b", false),
        ("principals", "", false),
        ("reason.x", "OK", false),
        ("missing", "", false),
    ] {
        check(member(path, text), expected);
    }
    let times = |from_unix_ns, to_unix_ns| RecordFilter { from_unix_ns, to_unix_ns, ..RecordFilter::default() };
    for (from, to, expected) in [(Some(10), None, true), (Some(11), None, false), (None, Some(10), false), (None, Some(11), true)]
    {
        check(times(from, to), expected);
    }
}
