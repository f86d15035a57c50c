//! The guarantees of every record format, tested through [`AuditSink`] alone. A flood of callers who proved nothing costs a bounded number
//! of bytes and loses no count. It takes no space from permits, acts or the store. Neither does a flood of refused acts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use serde_json::Value;

use super::super::recorder::{AuditOutput, AuditRecorder};
use super::super::{ActOutcome, ChainFacts, ChainFragment, DiskMonitor, PrincipalFacts};
use super::*;
use crate::model::decision::{Effect, Evidence};
use crate::model::disk::{DiskSpace, DiskSpaceLevel, DiskSpaceSource};
use crate::model::limits::{
    UNVERIFIED_ACT_SUMMARY_BYTES_MAX, UNVERIFIED_BYTES_BURST, UNVERIFIED_BYTES_PER_S, UNVERIFIED_RECORDS_BURST,
    UNVERIFIED_RECORDS_PER_S, UNVERIFIED_TEXT_BYTES_MAX,
};
use crate::model::reason::Reason;
use crate::model::revision::HistoryId;
use crate::model::time::{Clock as _, ManualClock};

/// Far more than any test writes.
const LARGE_BYTES: u64 = 1 << 40;
/// Longer than any merged line.
const MERGED_LINE_BYTES_MAX: usize = 1_024;

/// A disk of limited size, which the store and the audit log may share.
#[derive(Clone)]
struct SimulatedDisk(Arc<SimulatedDiskState>);

struct SimulatedDiskState {
    total_bytes: u64,
    free_bytes: AtomicU64,
    fails: AtomicBool,
    content: Mutex<Vec<u8>>,
}

impl SimulatedDisk {
    fn new(total_bytes: u64) -> Self {
        let (free_bytes, fails, content) = (AtomicU64::new(total_bytes), AtomicBool::new(false), Mutex::default());
        Self(Arc::new(SimulatedDiskState { total_bytes, free_bytes, fails, content }))
    }

    /// Takes space, as another writer does.
    fn take(&self, bytes: u64) -> io::Result<()> {
        let taken = self.0.free_bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |free| free.checked_sub(bytes));
        taken.map(drop).map_err(|_| io::Error::from(io::ErrorKind::StorageFull))
    }

    fn free_bytes(&self) -> u64 {
        self.0.free_bytes.load(Ordering::SeqCst)
    }

    fn set_free(&self, bytes: u64) {
        self.0.free_bytes.store(bytes, Ordering::SeqCst);
    }
}

impl DiskSpaceSource for SimulatedDisk {
    fn read(&self) -> io::Result<DiskSpace> {
        Ok(DiskSpace { free_bytes: self.free_bytes(), total_bytes: self.0.total_bytes })
    }
}

impl AuditOutput for SimulatedDisk {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.fails.load(Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.take(bytes.len() as u64)?;
        self.0.content.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate_by(&self, bytes_count: usize) -> io::Result<()> {
        let mut content = self.0.content.lock().unwrap();
        let length = content.len() - bytes_count;
        content.truncate(length);
        Ok(())
    }
}

struct SinkFixture {
    clock: Arc<ManualClock>,
    disk: SimulatedDisk,
    disk_monitor: Arc<DiskMonitor>,
    sink: Box<dyn AuditSink>,
    /// Number of decisions so far; the source of record ids.
    decided: u64,
}

impl SinkFixture {
    fn new(total_bytes: u64) -> Self {
        let clock = Arc::new(ManualClock::at_unix_s(1_700_000_000));
        let disk = SimulatedDisk::new(total_bytes);
        let disk_monitor = Arc::new(DiskMonitor::new(std::path::Path::new("/audit"), Box::new(disk.clone())));
        let sink =
            Box::new(AuditRecorder::new("n1", clock.clone(), disk_monitor.clone(), 4 * 1024 * 1024, Box::new(disk.clone())));
        Self { clock, disk, disk_monitor, sink, decided: 0 }
    }

    fn decide(&mut self, effect: Effect, reason: Reason, chain: &ChainFragment, method: &'static str, gateway: &str) -> String {
        let id = format!("d{}", self.decided);
        self.try_decide(effect, reason, chain, method, gateway).unwrap();
        id
    }

    fn try_decide(
        &mut self,
        effect: Effect,
        reason: Reason,
        chain: &ChainFragment,
        method: &'static str,
        gateway: &str,
    ) -> Result<(), AuditUnavailable> {
        self.try_decide_as(true, effect, reason, chain, method, gateway)
    }

    /// Records a decision. Without `proved`, the caller of a verified chain did not prove that it holds the chain.
    fn try_decide_as(
        &mut self,
        proved: bool,
        effect: Effect,
        reason: Reason,
        chain: &ChainFragment,
        method: &'static str,
        gateway: &str,
    ) -> Result<(), AuditUnavailable> {
        let (id, history) = (format!("d{}", self.decided), HistoryId::new("h"));
        self.decided += 1;
        let is_verified = format!("{chain:?}") != format!("{:?}", ChainFragment::default());
        self.sink.record(&DecisionRecord {
            proved: proved && is_verified,
            agent: is_verified.then_some("spiffe://a/leaf"),
            time_unix_ns: self.clock.now().unix_ns,
            method,
            decision_id: &id,
            request_id: "r",
            trace_id: None,
            effect,
            reason,
            deciding_layer: reason.layer(),
            hop: None,
            matched: None,
            would_be: None,
            chain,
            tool: Some(PrincipalFacts { id: "crm/read", evidence: Evidence::Attested }),
            arguments_sha256: None,
            proof_jti: None,
            approval_digest: None,
            obligations: &[],
            gateway,
            history: &history,
            revision: 42,
            snapshot_digest: "ab",
            snapshot_age_ms: 3,
            latency_ns: 900,
        })
    }

    /// A denial of an unverified caller.
    fn stranger(&mut self, reason: Reason, gateway: &str) -> String {
        self.decide(Effect::Deny, reason, &ChainFragment::default(), "Check", gateway)
    }

    fn permit(&mut self) -> String {
        self.decide(Effect::Permit, Reason::Ok, &verified(), "Check", "127.0.0.1:1")
    }

    fn act(&self, outcome: ActOutcome, operators: &[String], peer: &str) -> Result<(), AuditUnavailable> {
        self.act_or_read(outcome, outcome == ActOutcome::Accepted, operators, peer)
    }

    fn act_or_read(
        &self,
        outcome: ActOutcome,
        committed: bool,
        operators: &[String],
        peer: &str,
    ) -> Result<(), AuditUnavailable> {
        self.sink.record_act(&ActRecord {
            committed,
            time_unix_ns: self.clock.now().unix_ns,
            method: "/portcullis.v1.RevocationService/Revoke",
            operators,
            signatures: &[],
            outcome,
            code: if outcome == ActOutcome::Accepted { "OK" } else { "UNAUTHENTICATED" },
            reason: "because",
            revision: committed.then_some("h.43"),
            peer,
        })
    }

    fn advance(&self, ms: i64) {
        self.clock.advance_ms(ms);
        self.disk_monitor.refresh();
        self.sink.flush_tick();
        self.sink.flush_tick();
    }

    fn bytes(&self) -> usize {
        self.disk.0.content.lock().unwrap().len()
    }

    fn lines(&self) -> Vec<Value> {
        let content = self.disk.0.content.lock().unwrap();
        content.split_inclusive(|byte| *byte == b'\n').map(|line| serde_json::from_slice(line).unwrap()).collect()
    }
}

fn verified() -> ChainFragment {
    ChainFragment::new(&ChainFacts {
        agents: &[PrincipalFacts { id: "a", evidence: Evidence::Verified }],
        ..ChainFacts::default()
    })
}

/// The number of denials that the lines of unverified callers stand for, by their content.
fn counted(lines: &[Value]) -> BTreeMap<(String, String, String), u64> {
    let mut counts = BTreeMap::new();
    for line in lines {
        let text = |member: &str| line[member].as_str().unwrap().to_owned();
        let (of, count) = match line["kind"].as_str().unwrap() {
            "merged" if line.get("operator").is_some() || line.get("agent").is_some() => continue,
            "merged" => (text("of"), line["count"].as_u64().unwrap()),
            "decision" if line["effect"] == "DENY" && line["principals"].get("agents").is_none() => ("decision".to_owned(), 1),
            "act" if line["effect"] == "REFUSED" && line["operator"].is_null() => ("act".to_owned(), 1),
            _ => continue,
        };
        let reason = if of == "act" { "UNAUTHENTICATED".to_owned() } else { text("reason") };
        let method = if of == "act" { String::new() } else { text("method") };
        *counts.entry((of, method, reason)).or_default() += count;
    }
    counts
}

fn merged(lines: &[Value]) -> Vec<&Value> {
    lines.iter().filter(|line| line["kind"] == "merged").collect()
}

#[test]
fn every_reason_is_counted_by_itself_and_exactly() {
    const EACH: u64 = 300;
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let mut expected = BTreeMap::new();
    for _ in 0..EACH {
        for (method, reason) in ["Check", "ListTools", "Explain"]
            .into_iter()
            .flat_map(|method| Reason::ALL.iter().filter(|reason| **reason != Reason::Ok).map(move |reason| (method, *reason)))
        {
            bench.decide(Effect::Deny, reason, &ChainFragment::default(), method, "127.0.0.1:4711");
            *expected.entry(("decision".to_owned(), method.to_owned(), reason.as_str().to_owned())).or_default() += 1;
        }
        bench.act(ActOutcome::Refused, &[], "127.0.0.1:4712").unwrap();
        *expected.entry(("act".to_owned(), String::new(), "UNAUTHENTICATED".to_owned())).or_default() += 1;
    }
    bench.advance(1_000);
    let lines = bench.lines();
    assert_eq!(counted(&lines), expected);
    let singles = lines.len() - merged(&lines).len();
    assert_eq!(singles as u64, UNVERIFIED_RECORDS_BURST, "one caller's rate is for all that it is denied");
    assert!(merged(&lines).len() <= expected.len(), "a line a second for each reason");
    assert!(merged(&lines).iter().all(|line| line["prefix"] == "127.0.0.0/24" && line["node"] == "n1"), "{lines:?}");
}

#[test]
fn a_merged_line_says_who_why_how_many_and_when() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let began = bench.clock.now().unix_ns;
    let all: Vec<String> = (0..UNVERIFIED_RECORDS_BURST + 3)
        .map(|_| {
            bench.clock.advance_ms(1);
            bench.stranger(Reason::TokenSignature, "192.0.2.77:50000")
        })
        .collect();
    let time = |index: usize| began + (index as i64 + 1) * 1_000_000;
    bench.advance(1_000);
    let lines = bench.lines();
    let [line] = merged(&lines)[..] else { panic!("{lines:?}") };
    // The rate gives one unit back within those 100 ms.
    let first = all.len() - line["count"].as_u64().unwrap() as usize;
    assert_eq!(
        *line,
        serde_json::json!({
            "kind": "merged", "time_unix_ns": time(all.len() - 1), "node": "n1", "of": "decision", "method": "Check",
            "effect": "DENY", "reason": "TOKEN_SIGNATURE", "prefix": "192.0.2.0/24", "count": all.len() - first,
            "first_unix_ns": time(first), "last_unix_ns": time(all.len() - 1), "first_decision_id": all[first],
            "last_decision_id": all.last(),
        })
    );
}

#[test]
fn one_callers_flood_hides_no_other_caller() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let flood: Vec<String> = (0..1_000).map(|port| bench.stranger(Reason::TokenMalformed, &format!("10.0.0.9:{port}"))).collect();
    for (caller, neighbour) in
        [("10.0.1.9:1", "10.0.1.200:2"), ("[2001:db8::1]:1", "[2001:db8::ffff:2]:9"), ("gateway.example", "gateway.example")]
    {
        let seen = bench.stranger(Reason::IssuerUnknown, caller);
        bench.sink.flush().unwrap();
        assert!(bench.lines().iter().any(|line| line["decision_id"] == seen.as_str()), "{caller}");
        // A network has one rate, whatever address in it is used.
        (0..UNVERIFIED_RECORDS_BURST).for_each(|_| drop(bench.stranger(Reason::IssuerUnknown, caller)));
        let over = bench.stranger(Reason::IssuerUnknown, neighbour);
        bench.sink.flush().unwrap();
        assert!(!bench.lines().iter().any(|line| line["decision_id"] == over.as_str()), "{neighbour}");
    }
    bench.advance(1_000);
    let lines = bench.lines();
    let prefixes: Vec<&Value> = merged(&lines).iter().map(|line| line.get("prefix").unwrap_or(&line["gateway"])).collect();
    assert_eq!(prefixes, ["10.0.0.0/24", "10.0.1.0/24", "2001:db8::/64", "gateway.example"], "{lines:?}");
    assert_eq!(counted(&lines).values().sum::<u64>(), flood.len() as u64 + 3 * (UNVERIFIED_RECORDS_BURST + 2));
}

#[test]
fn a_flood_from_everywhere_keeps_to_its_budget() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let mut sent = 0;
    for second in 0..30_u64 {
        for network in 0..3_000_u64 {
            let address = format!("[2001:db8:{:x}:{:x}::1]:9", second, network);
            bench.stranger(if network % 2 == 0 { Reason::TokenMalformed } else { Reason::TokenSignature }, &address);
            sent += 1;
        }
        bench.advance(1_000);
        // The merged line for all callers exists once per method and reason.
        let bound = UNVERIFIED_BYTES_BURST + (second + 1) * (UNVERIFIED_BYTES_PER_S + 3 * MERGED_LINE_BYTES_MAX as u64);
        assert!(bench.bytes() as u64 <= bound, "{} of {bound} bytes after {second} s", bench.bytes());
    }
    assert_eq!(counted(&bench.lines()).values().sum::<u64>(), sent);
}

#[test]
fn a_line_ends_with_its_second_and_the_next_begins() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let flood =
        |bench: &mut SinkFixture, count: u64| (0..count).for_each(|_| drop(bench.stranger(Reason::TokenExpired, "10.0.0.9:1")));
    flood(&mut bench, UNVERIFIED_RECORDS_BURST);
    for second in 1..=3_u64 {
        flood(&mut bench, 1_000);
        bench.advance(999);
        assert_eq!(merged(&bench.lines()).len() as u64, second - 1, "a second is not over");
        bench.advance(1);
        let lines = bench.lines();
        let last = *merged(&lines).last().unwrap();
        let given_back = if second == 1 { 0 } else { UNVERIFIED_RECORDS_PER_S };
        assert_eq!(last["count"], 1_000 - given_back, "{last}");
    }
    // If the wall clock is set back, the steady clock still ends the second.
    flood(&mut bench, 1_000);
    bench.clock.step_wall_ms(-3_600_000);
    bench.advance(1_000);
    assert_eq!(merged(&bench.lines()).len(), 4);
    assert_eq!(counted(&bench.lines()).values().sum::<u64>(), UNVERIFIED_RECORDS_BURST + 4_000);
}

#[test]
fn who_proved_possession_is_never_merged() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let (mut expected, operator) = (Vec::new(), ["ada".to_owned()]);
    for _ in 0..500 {
        (0..20).for_each(|_| drop(bench.stranger(Reason::TokenSignature, "10.0.0.9:1")));
        expected.push(bench.permit());
        expected.push(bench.decide(Effect::Deny, Reason::AgentDenies, &verified(), "Check", "10.0.0.9:1"));
        expected.push(bench.decide(Effect::NeedsApproval, Reason::ApprovalRequired, &verified(), "Check", "10.0.0.9:1"));
        bench.act(ActOutcome::Refused, &operator, "10.0.0.9:1").unwrap();
        bench.act(ActOutcome::Unknown, &[], "10.0.0.9:1").unwrap();
        bench.act(ActOutcome::Accepted, &operator, "10.0.0.9:1").unwrap();
        bench.act(ActOutcome::Refused, &[], "10.0.0.9:1").unwrap();
        bench.advance(7);
    }
    bench.sink.finish().unwrap();
    let lines = bench.lines();
    let is_verified = |line: &&Value| line["kind"] == "decision" && line["principals"].get("agents").is_some();
    let found: Vec<&str> = lines.iter().filter(is_verified).map(|line| line["decision_id"].as_str().unwrap()).collect();
    assert_eq!(found, expected, "each once, in order");
    let acts = |effect: &str| lines.iter().filter(|line| line["effect"] == effect && line["kind"] == "act").count();
    assert_eq!((acts("ACCEPTED"), acts("UNKNOWN")), (500, 500));
    assert_eq!(refusals_of("ada", &lines), 500);
    let counts = counted(&lines);
    assert_eq!(counts.values().copied().collect::<Vec<_>>(), [500, 10_000], "{counts:?}");
}

/// The refused acts of an operator that lines stand for.
fn refusals_of(operator: &str, lines: &[Value]) -> u64 {
    let refusals = lines.iter().filter(|line| line["effect"] == "REFUSED" && line["operator"] == operator);
    refusals.map(|line| line["count"].as_u64().unwrap_or(1)).sum()
}

/// A chain is not secret. So whoever sends a chain without a proof is a stranger, for the disk and for everybody else's rate.
#[test]
fn an_overheard_chain_costs_few_bytes_and_no_count() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let calls = [
        (Effect::Deny, Reason::ProofMissing, "Check"),
        (Effect::Deny, Reason::RevokedSession, "Check"),
        (Effect::Permit, Reason::Ok, "ListTools"),
        (Effect::NeedsApproval, Reason::ApprovalRequired, "Explain"),
    ];
    for _ in 0..5_000 {
        for (effect, reason, method) in calls {
            bench.try_decide_as(false, effect, reason, &verified(), method, "10.0.0.9:1").unwrap();
        }
    }
    // The same effects of a call are permits, so they are recorded one by one.
    for effect in [Effect::Permit, Effect::NeedsApproval] {
        bench.try_decide_as(false, effect, Reason::Ok, &verified(), "Check", "10.0.0.9:1").unwrap();
    }
    let proved = bench.decide(Effect::Deny, Reason::AgentDenies, &verified(), "Check", "10.0.0.9:1");
    let stranger = bench.stranger(Reason::TokenMalformed, "10.0.0.9:1");
    bench.advance(1_000);
    let lines = bench.lines();
    assert!(bench.bytes() as u64 <= UNVERIFIED_BYTES_BURST, "{} bytes", bench.bytes());
    for (effect, reason, method) in calls {
        let is_one =
            |line: &&Value| line["method"] == method && line["reason"] == reason.as_str() && line["effect"] == effect.as_str();
        let count: u64 = lines.iter().filter(is_one).map(|line| line["count"].as_u64().unwrap_or(1)).sum();
        assert_eq!(count, 5_000, "{method} {}", reason.as_str());
    }
    assert!(merged(&lines).iter().all(|line| line["agent"] == "spiffe://a/leaf" && line.get("prefix").is_none()), "{lines:?}");
    let singles = lines.iter().filter(|line| line["kind"] == "decision").count() as u64;
    assert_eq!(singles, UNVERIFIED_RECORDS_BURST + 4, "the flood of one agent's chain takes nobody else's rate");
    assert!([proved, stranger].iter().all(|id| lines.iter().any(|line| line["decision_id"] == id.as_str())));
}

/// A revoked key, a used act and a role that does not fit are verified signatures that anybody may send again and again.
#[test]
fn refused_acts_leave_room_for_acts_that_are_done() {
    const MIB: u64 = 1024 * 1024;
    let mut bench = SinkFixture::new(2 * MIB);
    let (ada, bo) = (["ada".to_owned()], ["bo".to_owned()]);
    for _ in 0..2_000 {
        (0..10).for_each(|_| bench.act(ActOutcome::Refused, &ada, "10.0.0.9:1").unwrap());
        (0..10).for_each(|_| drop(bench.stranger(Reason::TokenSignature, "10.0.0.9:1")));
        bench.advance(10);
    }
    bench.act(ActOutcome::Refused, &bo, "10.0.0.9:1").unwrap();
    bench.advance(1_000);
    let lines = bench.lines();
    assert_eq!((refusals_of("ada", &lines), refusals_of("bo", &lines)), (20_000, 1));
    let bo_s = lines.iter().find(|line| line["operator"] == "bo").unwrap();
    assert_eq!(bo_s["kind"], "act", "one operator's flood hides no other operator: {bo_s}");
    assert!(bench.disk.free_bytes() > MIB, "{} bytes are free", bench.disk.free_bytes());

    // What is kept is for acts that were done: refusals are counted, and reads and waits are refused.
    bench.disk.set_free(2 * MIB / 40);
    bench.advance(1);
    assert_eq!(bench.disk_monitor.space_level(), DiskSpaceLevel::Exhausted);
    let used = bench.bytes();
    (0..5_000).for_each(|_| bench.act(ActOutcome::Refused, &ada, "10.0.0.9:1").unwrap());
    assert_eq!(bench.act_or_read(ActOutcome::Accepted, false, &ada, "10.0.0.9:1"), Err(AuditUnavailable::DiskFull));
    bench.advance(2_000);
    assert_eq!(bench.bytes(), used, "nothing is written but acts that were done");
    bench.act(ActOutcome::Accepted, &bo, "127.0.0.1:1").unwrap();
    bench.act(ActOutcome::Unknown, &bo, "127.0.0.1:1").unwrap();
    bench.disk.set_free(2 * MIB);
    bench.advance(1_000);
    bench.sink.finish().unwrap();
    assert_eq!(refusals_of("ada", &bench.lines()), 25_000);
}

/// The text that is recorded of an unverified caller is bounded, whatever the caller sends.
#[test]
fn a_strangers_text_is_cut() {
    let bench = SinkFixture::new(LARGE_BYTES);
    let (history, long) = (HistoryId::new("h"), "\u{1}ä".repeat(10_000));
    let record = |chain: &ChainFragment, id: &str| {
        let record = DecisionRecord {
            time_unix_ns: 1,
            method: "Check",
            decision_id: id,
            request_id: &long,
            trace_id: None,
            effect: Effect::Deny,
            reason: Reason::TokenMalformed,
            deciding_layer: None,
            hop: None,
            matched: None,
            would_be: None,
            chain,
            proved: id == "verified",
            agent: None,
            tool: Some(PrincipalFacts { id: &long, evidence: Evidence::Attested }),
            arguments_sha256: None,
            proof_jti: None,
            approval_digest: None,
            obligations: &[],
            gateway: "10.0.0.9:1",
            history: &history,
            revision: 42,
            snapshot_digest: "ab",
            snapshot_age_ms: 3,
            latency_ns: 900,
        };
        bench.sink.record(&record).unwrap();
    };
    record(&ChainFragment::default(), "of nobody");
    record(&verified(), "verified");
    let act = ActRecord {
        time_unix_ns: 1,
        method: &long,
        operators: &[],
        signatures: &[],
        outcome: ActOutcome::Refused,
        code: "UNAUTHENTICATED",
        reason: &long,
        revision: None,
        committed: false,
        peer: "10.0.0.9:1",
    };
    bench.sink.record_act(&act).unwrap();
    bench.sink.flush().unwrap();
    let lines = bench.lines();
    let [stranger, verified, act] = &lines[..] else { panic!("{lines:?}") };
    let cut = |value: &Value, bytes_max: usize| {
        let text = value.as_str().unwrap();
        assert!(text.len() <= bytes_max + "…".len() && text.ends_with('…') && long.starts_with(text.trim_end_matches('…')));
    };
    cut(&stranger["request_id"], UNVERIFIED_TEXT_BYTES_MAX);
    cut(&stranger["principals"]["tool"]["id"], UNVERIFIED_TEXT_BYTES_MAX);
    cut(&act["method"], UNVERIFIED_TEXT_BYTES_MAX);
    cut(&act["reason"], UNVERIFIED_ACT_SUMMARY_BYTES_MAX);
    assert_eq!(verified["request_id"], long.as_str(), "what a verified caller sent is whole");
}

/// On a disk that the store shares, unverified callers give way first, and the rest is left for permits, acts and the store.
#[test]
fn strangers_leave_room_for_permits_acts_and_the_store() {
    const MIB: u64 = 1024 * 1024;
    let mut bench = SinkFixture::new(2 * MIB);
    let operator = ["ada".to_owned()];
    let mut sent = 0;
    // One hour of denials, from everywhere.
    for tick in 0..7_200_u64 {
        for network in 0..40_u64 {
            bench.stranger(Reason::TokenSignature, &format!("[2001:db8:{tick:x}:{network:x}::1]:9"));
            sent += 1;
        }
        bench.advance(500);
    }
    assert_eq!(bench.disk_monitor.space_level(), DiskSpaceLevel::Critical, "{} bytes are free", bench.disk.free_bytes());
    let used = bench.bytes();
    (0..1_000).for_each(|_| drop(bench.stranger(Reason::TokenSignature, "10.0.0.9:1")));
    bench.advance(2_000);
    assert_eq!(bench.bytes(), used, "nothing more is written for strangers");
    assert!(used as u64 <= 2 * MIB * 9 / 10 + UNVERIFIED_BYTES_BURST, "{used}");

    let permits: Vec<String> = (0..100).map(|_| bench.permit()).collect();
    bench.act(ActOutcome::Accepted, &operator, "127.0.0.1:1").unwrap();
    bench.disk.take(64 * 1024).expect("the store writes its kill");
    let lines = bench.lines();
    assert!(permits.iter().all(|id| lines.iter().any(|line| line["decision_id"] == id.as_str())));
    assert_eq!(lines.last().unwrap()["effect"], "ACCEPTED");

    // Other writers fill the space that permits may still use. Then nothing is permitted, but acts and the store go on.
    bench.disk.set_free(2 * MIB / 40);
    bench.advance(1);
    assert_eq!(bench.disk_monitor.space_level(), DiskSpaceLevel::Exhausted);
    let refused = bench.try_decide(Effect::Permit, Reason::Ok, &verified(), "Check", "127.0.0.1:1");
    assert_eq!(refused, Err(AuditUnavailable::DiskFull));
    bench.act(ActOutcome::Accepted, &operator, "127.0.0.1:1").unwrap();
    bench.disk.take(32 * 1024).expect("the store writes its kill");

    // With free space again, the counts are written and none is missing.
    bench.disk.set_free(2 * MIB);
    bench.advance(1_000);
    assert_eq!((bench.disk_monitor.space_level(), bench.permit()), (DiskSpaceLevel::Ample, format!("d{}", bench.decided - 1)));
    bench.sink.finish().unwrap();
    assert_eq!(counted(&bench.lines()).values().sum::<u64>(), sent + 1_000);
}

#[test]
fn what_cannot_be_written_stays_counted() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    bench.permit();
    bench.disk.0.fails.store(true, Ordering::SeqCst);
    bench.sink.flush().unwrap_err();
    assert_eq!(bench.try_decide(Effect::Permit, Reason::Ok, &verified(), "Check", "a"), Err(AuditUnavailable::Unwritable));
    (0..5_000).for_each(|_| drop(bench.stranger(Reason::TokenSignature, "10.0.0.9:1")));
    bench.act(ActOutcome::Refused, &[], "10.0.0.9:1").unwrap();
    assert_eq!(bench.act(ActOutcome::Accepted, &["ada".to_owned()], "a"), Err(AuditUnavailable::Unwritable), "kept, and said");
    assert_eq!(bench.act(ActOutcome::Refused, &["ada".to_owned()], "a"), Err(AuditUnavailable::Unwritable), "not kept");
    (0..10).for_each(|_| bench.advance(1_000));
    assert_eq!(bench.bytes(), 0);
    bench.disk.0.fails.store(false, Ordering::SeqCst);
    bench.advance(1_000);
    bench.advance(1_000);
    let lines = bench.lines();
    assert_eq!(counted(&lines).values().sum::<u64>(), 5_001, "{lines:?}");
    assert_eq!(lines.iter().filter(|line| line["effect"] == "ACCEPTED").count(), 1, "what was done is recorded late");
    assert!(!lines.iter().any(|line| line["operator"] == "ada" && line["effect"] == "REFUSED"));
}

/// A process that ends at any moment has written all counts that are older than a second plus one run of the timer.
#[test]
fn a_crash_costs_the_last_second_of_counts() {
    let mut bench = SinkFixture::new(LARGE_BYTES);
    let mut sent_before = Vec::new();
    for tick in 0..500_u64 {
        (0..50).for_each(|_| drop(bench.stranger(Reason::TokenSignature, "10.0.0.9:1")));
        sent_before.push(bench.decided);
        bench.advance(20);
        if let Some(old) = tick.checked_sub(52) {
            let written: u64 = counted(&bench.lines()).values().sum();
            assert!(written >= sent_before[old as usize], "tick {tick}: {written}");
        }
    }
}

/// A step that a property test applies to a sink.
#[derive(Clone, Debug)]
enum SinkStep {
    Stranger { network: u8, reason: usize, count: u64 },
    Nobody { network: u8, count: u64 },
    Permit,
    Advance { ms: i64 },
    Room { of_a_thousand: u64 },
    Fails(bool),
    SetClock { ms: i64 },
}

fn step() -> impl Strategy<Value = SinkStep> {
    prop_oneof![
        6 => (any::<u8>(), 0..Reason::ALL.len(), 1..400_u64)
            .prop_map(|(network, reason, count)| SinkStep::Stranger { network, reason, count }),
        2 => (any::<u8>(), 1..200_u64).prop_map(|(network, count)| SinkStep::Nobody { network, count }),
        3 => Just(SinkStep::Permit),
        6 => (0..2_500_i64).prop_map(|ms| SinkStep::Advance { ms }),
        2 => (0..1_000_u64).prop_map(|of_a_thousand| SinkStep::Room { of_a_thousand }),
        1 => any::<bool>().prop_map(SinkStep::Fails),
        1 => (-5_000..5_000_i64).prop_map(|ms| SinkStep::SetClock { ms }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// After any steps, the counts of all lines add up to the denials, and each record of a verified caller exists exactly once.
    #[test]
    fn no_denial_is_lost_and_none_counted_twice(steps in proptest::collection::vec(step(), 1..60)) {
        let mut bench = SinkFixture::new(LARGE_BYTES);
        let (mut expected, mut permits) = (BTreeMap::<(String, String, String), u64>::new(), Vec::new());
        for step in steps {
            match step {
                SinkStep::Stranger { network, reason, count } => {
                    let reason = Reason::ALL[reason];
                    for _ in 0..count {
                        bench.stranger(reason, &format!("10.0.{network}.1:1"));
                    }
                    *expected.entry(("decision".to_owned(), "Check".to_owned(), reason.as_str().to_owned())).or_default() += count;
                }
                SinkStep::Nobody { network, count } => {
                    for _ in 0..count {
                        bench.act(ActOutcome::Refused, &[], &format!("10.0.{network}.1:1")).unwrap();
                    }
                    *expected.entry(("act".to_owned(), String::new(), "UNAUTHENTICATED".to_owned())).or_default() += count;
                }
                SinkStep::Permit => {
                    let id = format!("d{}", bench.decided);
                    if bench.try_decide(Effect::Permit, Reason::Ok, &verified(), "Check", "a").is_ok() {
                        permits.push(id);
                    }
                }
                SinkStep::Advance { ms } => bench.advance(ms),
                SinkStep::Room { of_a_thousand } => bench.disk.set_free(LARGE_BYTES / 1_000_000 * of_a_thousand),
                SinkStep::Fails(fails) => bench.disk.0.fails.store(fails, Ordering::SeqCst),
                SinkStep::SetClock { ms } => bench.clock.step_wall_ms(ms),
            }
        }
        bench.disk.set_free(LARGE_BYTES);
        bench.disk.0.fails.store(false, Ordering::SeqCst);
        bench.advance(1_000);
        bench.sink.finish().unwrap();
        let lines = bench.lines();
        prop_assert_eq!(counted(&lines), expected);
        let found: Vec<&str> = lines.iter().filter(|line| line["effect"] == "PERMIT").map(|line| line["decision_id"].as_str().unwrap()).collect();
        prop_assert_eq!(found, permits);
    }
}
