//! What happens around a decision while it awaits: a destructive call spends its proof in the store, a call is asked for or uses an
//! approval there, and the world moves on.

mod approvals;
mod replay;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::request::TraceHeaders;
use super::*;
use crate::app::bind::StoreApprovals;
use crate::audit::Log;
use crate::model::approval::{AskApproval, AskOutcome, UseApprovals, UseOutcome};
use crate::model::json::Object;
use crate::model::records::{Change, Origin, RevocationRow, Target};
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::time::ManualClock;
use crate::policy::source::{SourceFile, parse};
use crate::revocation::Index;
use crate::snapshot::{Builder, FullState, Proof};
use crate::store::Store;
use crate::store::sqlite::SqliteStore;
use crate::token::{PrivateKey, ProofOf, issue};

const START_UNIX_S: i64 = 1_700_000_000;
const TOOL: &str = "t/drop";
const AUDIENCE: &str = "https://gateway";

/// Spends every key, and lets something happen while it does.
struct Ledger(Mutex<Option<Box<dyn FnOnce() + Send>>>);

#[async_trait]
impl ProofLedger for Ledger {
    async fn spend(&self, _key: [u8; 32], _expires_at_unix_s: i64) -> Result<bool, String> {
        // A store takes a while, in which others come.
        tokio::task::yield_now().await;
        if let Some(happen) = self.0.lock().unwrap().take() {
            happen();
        }
        Ok(true)
    }
}

/// Approvals in a real store, where something may happen while one is used.
struct Desk {
    store: StoreApprovals,
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    fails: AtomicBool,
}

impl Desk {
    fn works(&self) -> Result<(), String> {
        if self.fails.load(Ordering::SeqCst) { Err("the store is away".to_owned()) } else { Ok(()) }
    }
}

#[async_trait]
impl ApprovalLedger for Desk {
    async fn ask(&self, request: AskApproval) -> Result<AskOutcome, String> {
        self.works()?;
        self.store.ask(request).await
    }

    async fn use_once(&self, request: UseApprovals) -> Result<UseOutcome, String> {
        self.works()?;
        let outcome = self.store.use_once(request).await;
        if let Some(happen) = self.meanwhile.lock().unwrap().take() {
            happen();
        }
        outcome
    }

    async fn repeated(&self, request: &UseApprovals) -> Result<Option<String>, String> {
        self.works()?;
        self.store.repeated(request).await
    }
}

struct Never;

#[async_trait]
impl CatchUp for Never {
    async fn reach(&self, _revision: &Revision) -> bool {
        false
    }
}

struct World {
    clock: Arc<ManualClock>,
    cell: Arc<SnapshotCell>,
    builder: Arc<Mutex<Builder>>,
    ledger: Arc<Ledger>,
    desk: Arc<Desk>,
    store: Arc<dyn Store>,
    lane: Lane,
    agent: PrivateKey,
    tokens: Vec<Bytes>,
    _folder: tempfile::TempDir,
}

fn world() -> World {
    let clock = Arc::new(ManualClock::at_unix_s(START_UNIX_S));
    let (issuer, agent) = (PrivateKey::from_seed([1; 32]).unwrap(), PrivateKey::from_seed([2; 32]).unwrap());
    let policy = format!(
        "{{kind: issuer, id: 'https://i', keys: {{jwks: {{keys: [{}]}}}}, audiences: ['{AUDIENCE}'], groups: [g], applications: [p]}}\n---\n\
         {{kind: application, id: p, allow: ['*']}}\n---\n{{kind: group, id: g, allow: ['*']}}\n---\n\
         {{kind: tool, id: {TOOL}, risk: destructive}}\n---\n\
         {{kind: server, id: pay, tools: {{refund: {{risk: write}}, burn: {{risk: destructive}}, tip: {{risk: read, proof: none}}}}}}\n---\n\
         {{kind: operator, id: olga, keys: [{}], roles: [approve], groups: [leads]}}\n---\n\
         {{kind: agent, id: 'spiffe://a/b', keys: [{}], applications: [p], acts_for: [g], allow: [t/*], \
           approve: [{{pay/*: {{by: [leads], expires_in: 5m}}}}]}}\n",
        issuer.public_key().to_jwk(),
        PrivateKey::from_seed([3; 32]).unwrap().public_key().to_jwk(),
        agent.public_key().thumbprint(),
    );
    let documents = parse(&[SourceFile { path: "p.yaml".to_owned(), content: policy.into_bytes() }]);
    assert_eq!(documents.diagnostics, []);
    let mut builder = Builder::new(Arc::new(Index::new()));
    let state = FullState {
        revision: Revision { history: HistoryId::new("h"), number: 1 },
        digest: StateDigest::default(),
        iat_skew_s: 30,
        freshness_bound_ms: 5_000,
        documents: documents.documents.iter().map(|document| document.to_row(Origin::Folder)).collect(),
        revocations: vec![],
    };
    let cell = Arc::new(SnapshotCell::default());
    let ledger = Arc::new(Ledger(Mutex::new(None)));
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&folder.path().join("store.db"), clock.clone()).unwrap());
    let desk =
        Arc::new(Desk { store: StoreApprovals(store.clone()), meanwhile: Mutex::new(None), fails: AtomicBool::new(false) });
    let parts = Parts {
        cell: cell.clone(),
        ledger: ledger.clone(),
        approvals: desk.clone(),
        catch_up: Arc::new(Never),
        metrics: Metrics::unexported(),
        spans: Spans::off(),
        clock: clock.clone(),
    };
    let service = Arc::new(Service::new(parts, Settings::default()));
    service.mark_ready();
    clock.advance_ms(2_000);
    cell.publish(View { snapshot: builder.replace(state).unwrap(), proof: Proof::SentAt(clock.now()) });
    let claims = format!(
        r#"{{"iss":"https://i","aud":"{AUDIENCE}","sub":"u","sub_profile":"user","groups":["g"],"client_id":"p","sid":"s","txn":"x",
        "act":{{"iss":"https://i","sub":"spiffe://a/b"}},"exp":{},"cnf":{{"jwk":{}}},"del_max_depth":0,
        "authorization_details":[{{"type":"attenuating_agent_token","tools":{{"{TOOL}":{{}},"pay/refund":{{}},"pay/burn":{{}},"pay/tip":{{}}}}}}]}}"#,
        START_UNIX_S + 600,
        agent.public_key().to_jwk(),
    );
    let root = issue::issue_root(&issuer, &claims, clock.now()).unwrap();
    let log = Log::open(&folder.path().join("audit"), "n", clock.clone()).unwrap();
    let lane = service.lane(log.recorder("lane").unwrap());
    let builder = Arc::new(Mutex::new(builder));
    World { clock, cell, builder, ledger, desk, store, lane, agent, tokens: vec![root.into()], _folder: folder }
}

/// A destructive call with a proof.
fn asked(world: &World) -> CheckRequest {
    let arguments = Object::default();
    let call = ProofOf { tool: TOOL, arguments: &arguments, audience: Some(AUDIENCE) };
    let proof = issue::prove(&world.agent, &world.tokens, &call, None, world.clock.now()).unwrap();
    CheckRequest {
        request_id: String::new(),
        credential: Credential::Chain(world.tokens.clone()),
        proof: Some(proof.into()),
        tool: TOOL.to_owned(),
        tool_schema_sha256: None,
        arguments_json: Bytes::new(),
        environment: None,
        audience: Some(AUDIENCE.to_owned()),
        at_least: None,
        want_handle: false,
        trace: TraceHeaders::default(),
    }
}

fn caller() -> Caller {
    Caller { connection_id: 1, address: "test".into(), is_loopback: true }
}

fn session_killed() -> RevocationRow {
    RevocationRow {
        target: Target::Session("s".to_owned()),
        dead: true,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 2,
    }
}

/// What a destructive call gets if something happens while its proof is spent.
async fn check(world: &World, meanwhile: impl FnOnce() + Send + 'static, expected: (Effect, Reason)) {
    *world.ledger.0.lock().unwrap() = Some(Box::new(meanwhile));
    let answer = world.lane.check(&asked(world), &caller()).await.unwrap();
    assert_eq!((answer.decision.effect, answer.decision.reason), expected, "{}", answer.message);
    assert!(world.ledger.0.lock().unwrap().is_none(), "the proof was spent in the store");
}

#[tokio::test]
async fn nothing_happens() {
    let world = world();
    check(&world, || {}, (Effect::Permit, Reason::Ok)).await;
}

#[tokio::test]
async fn a_revocation_comes() {
    let world = world();
    let builder = world.builder.clone();
    let row = session_killed();
    // The follower has applied it and has not published its snapshot yet: it bites all the same.
    let revoke =
        move || drop(builder.lock().unwrap().apply(2, StateDigest::default(), [Change::Revocation(row)].iter()).unwrap());
    check(&world, revoke, (Effect::Deny, Reason::RevokedSession)).await;
}

/// An answer that waits for the rest of its batch is looked at again before it is given: a replica that has acknowledged a kill
/// holds no permit from before it.
#[tokio::test]
async fn an_answer_that_was_held_is_confirmed() {
    let held = async |happen: &dyn Fn(&World), expected: (Effect, Reason)| {
        let world = world();
        let (request, caller) = (asked(&world), caller());
        let (answer, held) = world.lane.check_held(&request, &caller).await.unwrap();
        assert_eq!(answer.decision.reason, Reason::Ok, "{}", answer.message);
        let id = answer.decision_id.clone();
        happen(&world);
        let given = world.lane.confirm(&request, &caller, answer, held);
        assert_eq!((given.decision.effect, given.decision.reason), expected);
        assert_eq!(given.decision_id == id, expected.0 == Effect::Permit, "another decision has another id");
    };
    let apply = |world: &World, row: RevocationRow| {
        let mut builder = world.builder.lock().unwrap();
        drop(builder.apply(2, StateDigest::default(), [Change::Revocation(row)].iter()).unwrap());
    };
    held(&|_| {}, (Effect::Permit, Reason::Ok)).await;
    held(&|world| apply(world, session_killed()), (Effect::Deny, Reason::RevokedSession)).await;
    let other = RevocationRow { target: Target::Session("other".to_owned()), ..session_killed() };
    held(&|world| apply(world, other.clone()), (Effect::Permit, Reason::Ok)).await;
    held(&|world| world.clock.advance_ms(1_500), (Effect::Deny, Reason::Stale)).await;
}

#[tokio::test]
async fn the_view_grows_old() {
    let world = world();
    let (clock, cell) = (world.clock.clone(), world.cell.clone());
    // A newer proof stands beside the newer view; it is not the one that was decided by.
    let pass = move || {
        clock.advance_ms(1_500);
        cell.renew(Proof::SentAt(clock.now()));
    };
    check(&world, pass, (Effect::Deny, Reason::Stale)).await;
}

#[tokio::test]
async fn the_chain_ends() {
    let world = world();
    let clock = world.clock.clone();
    check(&world, move || clock.advance_ms(600_000), (Effect::Deny, Reason::TokenExpired)).await;
}
