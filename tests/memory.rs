//! The reported weight of a cached chain is its real size: the service's figure is compared with the allocator's, for several chain
//! shapes.
//!
//! This is a program of its own, because the counting allocator counts everything in the process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

use std::alloc::System;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use portcullis::audit::AuditLog;
use portcullis::model::approval::{ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest};
use portcullis::model::decision::Effect;
use portcullis::model::revision::{HistoryId, Revision, StateDigest};
use portcullis::model::rows::DocumentOrigin;
use portcullis::model::time::{Clock, ManualClock};
use portcullis::policy::source::{SourceFile, parse_files};
use portcullis::revocation::RevocationIndex;
use portcullis::service::request::{AgentCredential, Caller, DecisionRequest};
use portcullis::service::{ApprovalLedger, LedgerError, PdpService, ProofLedger, RevisionCatchUp, ServiceParts, Settings};
use portcullis::snapshot::{FreshnessProof, FullState, SnapshotBuilder, SnapshotCell, SnapshotView};
use portcullis::telemetry::{Metrics, SpanRecorder};
use portcullis::token::{PrivateKey, issue};
use serde_json::{Map, Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const START_UNIX_S: i64 = 1_700_000_000;
const AUDIENCE: &str = "https://gateway.test.example";
const TOOL: &str = "crm/look";
const AGENTS: u8 = 9;
/// Chains of each shape: enough to make other memory negligible.
const CHAINS: usize = 300;

/// Ledgers for calls that need no store.
struct NoLedgers;

#[async_trait]
impl ProofLedger for NoLedgers {
    async fn spend(&self, _key: [u8; 32], _expires_at_unix_s: i64) -> Result<bool, LedgerError> {
        Err(LedgerError::Busy("no store".to_owned()))
    }
}

#[async_trait]
impl ApprovalLedger for NoLedgers {
    async fn ask_approval(&self, _request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, LedgerError> {
        Err(LedgerError::Busy("no store".to_owned()))
    }

    async fn use_approvals(&self, _request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, LedgerError> {
        Err(LedgerError::Busy("no store".to_owned()))
    }

    async fn give_back_approvals(&self, _request: ApprovalUseRequest) -> Result<bool, LedgerError> {
        Err(LedgerError::Busy("no store".to_owned()))
    }
}

#[async_trait]
impl RevisionCatchUp for NoLedgers {
    async fn catch_up_to(&self, _revision: &Revision) -> bool {
        false
    }
}

/// The shape of a chain.
struct ChainShape {
    name: &'static str,
    tokens: u8,
    /// Tools besides the one that is called.
    tools: usize,
    /// The constraints of each of these tools.
    constraints: fn(usize) -> Value,
    id_bytes: usize,
    groups: usize,
}

const SHAPES: &[ChainShape] = &[
    ChainShape { name: "a root", tokens: 1, tools: 0, constraints: |_| json!({}), id_bytes: 8, groups: 1 },
    ChainShape { name: "two tokens, ten free tools", tokens: 2, tools: 10, constraints: |_| json!({}), id_bytes: 36, groups: 1 },
    ChainShape { name: "three tokens, limits on amounts", tokens: 3, tools: 12, constraints: amounts, id_bytes: 36, groups: 3 },
    ChainShape { name: "two tokens, long lists", tokens: 2, tools: 6, constraints: lists, id_bytes: 36, groups: 1 },
    ChainShape { name: "nine tokens", tokens: 9, tools: 4, constraints: amounts, id_bytes: 36, groups: 1 },
    ChainShape { name: "long ids", tokens: 2, tools: 2, constraints: |_| json!({}), id_bytes: 700, groups: 20 },
    ChainShape { name: "nested constraints", tokens: 1, tools: 8, constraints: nested, id_bytes: 36, groups: 1 },
];

fn amounts(tool: usize) -> Value {
    json!({ "amount": { "constraint_type": "range", "min": 0, "max": 100 + tool }, "currency": { "constraint_type": "exact", "value": "EUR" } })
}

fn lists(tool: usize) -> Value {
    let values: Vec<String> = (0..12).map(|n| format!("region-{tool}-{n}")).collect();
    json!({ "region": { "constraint_type": "one_of", "values": values } })
}

fn nested(tool: usize) -> Value {
    let exact = |value: usize| json!({ "constraint_type": "exact", "value": value });
    let any = json!({ "constraint_type": "any", "constraints": [exact(tool), exact(tool + 1)] });
    json!({ "n": { "constraint_type": "all", "constraints": [any, { "constraint_type": "wildcard" }], "optional": true } })
}

fn key(seed: u8) -> PrivateKey {
    PrivateKey::from_seed([seed; 32]).unwrap()
}

fn jwk(seed: u8) -> Value {
    serde_json::from_str(&key(seed).public_key().to_jwk()).unwrap()
}

fn agent(number: u8) -> String {
    format!("spiffe://test.example/agent/worker-{number}")
}

fn policy() -> String {
    let groups: Vec<String> = (0..20).map(|n| format!("group-{n}")).collect();
    let mut documents = vec![
        json!({ "kind": "issuer", "id": "https://login.test.example", "keys": { "jwks": { "keys": [jwk(1)] } },
                "audiences": [AUDIENCE], "groups": groups, "applications": ["*"] }),
        json!({ "kind": "server", "id": "crm", "tools": { "look": { "risk": "read", "proof": "none" } } }),
        json!({ "kind": "application", "id": "portal", "allow": ["*"] }),
    ];
    documents.extend(groups.iter().map(|group| json!({ "kind": "group", "id": group, "allow": ["*"] })));
    let agents: Vec<String> = (0..AGENTS).map(agent).collect();
    for (number, id) in (0..AGENTS).zip(&agents) {
        let thumbprint = key(10 + number).public_key().thumbprint().to_string();
        documents.push(json!({ "kind": "agent", "id": id, "keys": [thumbprint], "applications": ["*"], "acts_for": ["*"],
                               "delegates_to": agents, "allow": ["*"], "session": { "hops_max": 8 } }));
    }
    documents.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n")
}

fn chain(shape: &ChainShape, number: usize, clock: &ManualClock) -> Vec<Bytes> {
    let id = |name: &str| format!("{name}-{number:0width$}", width = shape.id_bytes.saturating_sub(name.len() + 1));
    let mut tools: Map<String, Value> =
        (0..shape.tools).map(|tool| (format!("crm/tool-{tool}"), (shape.constraints)(tool))).collect();
    tools.insert(TOOL.to_owned(), json!({}));
    let details = json!([{ "type": "attenuating_agent_token", "tools": tools }]);
    let mut chain: Vec<Bytes> = Vec::new();
    for level in 0..shape.tokens {
        let mut claims = json!({
            "act": { "sub": agent(level) }, "exp": START_UNIX_S + 3000, "cnf": { "jwk": jwk(10 + level) }, "del_max_depth": 8,
            "authorization_details": details,
        });
        let token = if level == 0 {
            let groups: Vec<String> = (0..shape.groups).map(|n| format!("group-{n}")).collect();
            for (name, value) in [
                ("iss", json!("https://login.test.example")),
                ("aud", json!(AUDIENCE)),
                ("sub", json!(id("user"))),
                ("sub_profile", json!("user")),
                ("groups", json!(groups)),
                ("client_id", json!("portal")),
                ("sid", json!(id("session"))),
                ("txn", json!(id("task"))),
            ] {
                claims[name] = value;
            }
            issue::issue_root(&key(1), &claims.to_string(), clock.now())
        } else {
            issue::issue_hop(&key(9 + level), &chain, &claims.to_string(), clock.now())
        };
        chain.push(token.unwrap().into());
    }
    chain
}

#[test]
fn a_chain_weighs_what_it_takes() {
    let clock = Arc::new(ManualClock::at_unix_s(START_UNIX_S));
    let folder = tempfile::tempdir().unwrap();
    let parsed = parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: policy().into_bytes() }]);
    assert_eq!(parsed.diagnostics, []);
    let state = FullState {
        revision: Revision { history: HistoryId::new("h"), number: 1 },
        digest: StateDigest::default(),
        iat_skew_s: 30,
        freshness_bound_ms: 5_000,
        documents: parsed.documents.iter().map(|document| document.to_row(DocumentOrigin::Folder)).collect(),
        revocations: vec![],
    };
    let cell = Arc::new(SnapshotCell::default());
    let parts = ServiceParts {
        snapshot_cell: cell.clone(),
        ledger: Arc::new(NoLedgers),
        approvals: Arc::new(NoLedgers),
        catch_up: Arc::new(NoLedgers),
        metrics: Metrics::unexported(),
        spans: SpanRecorder::disabled(),
        clock: clock.clone(),
        spawn: Arc::new(drop),
    };
    let service = Arc::new(PdpService::new(parts, Settings::default()));
    service.mark_ready();
    let snapshot = SnapshotBuilder::new(Arc::new(RevocationIndex::new())).replace_all(state).unwrap();
    cell.publish(SnapshotView { snapshot, proof: FreshnessProof::SentAt(clock.now()) });
    let log = AuditLog::open(&folder.path().join("audit"), "n", clock.clone()).unwrap();
    let recorder = log.open_recorder("lane").unwrap();
    let runtime_service = service.runtime_service(recorder.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let caller = Caller { connection_id: 1, address: "test".into(), is_loopback: true };
    let keep = |tokens: Vec<Bytes>| {
        let request =
            DecisionRequest { audience: Some(AUDIENCE.to_owned()), ..DecisionRequest::new(AgentCredential::Chain(tokens), TOOL) };
        let answer = runtime.block_on(runtime_service.check(&request, &caller)).unwrap();
        assert_eq!(answer.decision.effect, Effect::Permit, "{}", answer.message);
        recorder.flush().unwrap();
    };
    // Memory that is allocated once is allocated before the measurement.
    (0..CHAINS).for_each(|number| keep(chain(&SHAPES[2], 1_000_000 + number, &clock)));
    let mut wrong = Vec::new();
    for shape in SHAPES {
        let chains: Vec<Vec<Bytes>> = (0..CHAINS).map(|number| chain(shape, number, &clock)).collect();
        // A token that is cloned for the first time allocates a counter, which does not belong to the cache.
        chains.iter().for_each(|tokens| drop(tokens.clone()));
        let own_bytes: usize = chains.iter().flatten().map(Bytes::len).sum::<usize>() / CHAINS;
        // The first call updates the counts of the cache.
        let weight_before = service.cached_chain_bytes();
        let kept_before = service.cached_chain_count();
        let region = Region::new(ALLOCATOR);
        for tokens in &chains {
            keep(tokens.clone());
        }
        let weight = (service.cached_chain_bytes() - weight_before) as f64 / CHAINS as f64;
        let change = region.change();
        assert_eq!(service.cached_chain_count() - kept_before, CHAINS as u64, "{}", shape.name);
        let truth = (change.bytes_allocated as f64 - change.bytes_deallocated as f64) / CHAINS as f64;
        let line = format!("{}: tokens {own_bytes}, takes {truth:.0}, weighs {weight:.0} bytes", shape.name);
        println!("{line}");
        if (weight - truth).abs() > truth / 10.0 {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "more than a tenth off:\n{}", wrong.join("\n"));
}
