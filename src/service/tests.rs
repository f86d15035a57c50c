//! Tests of events while a decision awaits the store: a destructive call spends its proof there, or a call asks for or uses an approval.

mod approvals;
mod listing;
mod replay;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::*;
use crate::app::wiring::StoreApprovalLedger;
use crate::audit::AuditLog;
use crate::model::approval::{ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest};
use crate::model::json::{JsonObject, parse_object};
use crate::model::limits::LEDGER_USES_IN_FLIGHT_MAX;
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationRow, RevocationTarget, RowChange};
use crate::model::time::ManualClock;
use crate::policy::source::{SourceFile, parse_files};
use crate::revocation::RevocationIndex;
use crate::snapshot::{FreshnessProof, FullState, SnapshotBuilder};
use crate::store::Store;
use crate::store::sqlite::SqliteStore;
use crate::token::{PrivateKey, ProofCall, issue};

const START_UNIX_S: i64 = 1_700_000_000;
const TOOL: &str = "t/drop";
const AUDIENCE: &str = "https://gateway";

/// A hook that runs while the store is asked.
type WaitHook = Mutex<Option<Box<dyn FnOnce() + Send>>>;

/// A ledger that spends every key and runs a hook meanwhile.
#[derive(Default)]
struct HookedProofLedger {
    meanwhile: WaitHook,
    fails: Mutex<Option<LedgerError>>,
}

#[async_trait]
impl ProofLedger for HookedProofLedger {
    async fn spend(&self, _key: [u8; 32], _expires_at_unix_s: i64) -> Result<bool, LedgerError> {
        // A store takes a while, and other calls run meanwhile.
        tokio::task::yield_now().await;
        if let Some(happen) = self.meanwhile.lock().unwrap().take() {
            happen();
        }
        self.fails.lock().unwrap().clone().map_or(Ok(true), Err)
    }
}

/// Approvals in a real store, with a hook before and after a use.
struct HookedApprovalLedger {
    store: StoreApprovalLedger,
    before: WaitHook,
    meanwhile: WaitHook,
    fails: Mutex<Option<LedgerError>>,
    /// A use waits until this is true.
    open: watch::Sender<bool>,
}

impl HookedApprovalLedger {
    fn works(&self) -> Result<(), LedgerError> {
        self.fails.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

#[async_trait]
impl ApprovalLedger for HookedApprovalLedger {
    async fn ask_approval(&self, request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, LedgerError> {
        self.works()?;
        self.store.ask_approval(request).await
    }

    async fn use_approvals(&self, request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, LedgerError> {
        self.works()?;
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
        if let Some(happen) = self.before.lock().unwrap().take() {
            happen();
        }
        let outcome = self.store.use_approvals(request).await;
        if outcome == Ok(ApprovalUseOutcome::Used)
            && let Some(happen) = self.meanwhile.lock().unwrap().take()
        {
            happen();
        }
        outcome
    }

    async fn give_back_approvals(&self, request: ApprovalUseRequest) -> Result<bool, LedgerError> {
        self.store.give_back_approvals(request).await
    }
}

/// Follows the store's revision numbers. The test supplies the changes of later commits.
struct TestCatchUp {
    cell: Arc<SnapshotCell>,
    builder: Arc<Mutex<SnapshotBuilder>>,
    changes: Mutex<Vec<RowChange>>,
    stuck: AtomicBool,
    /// The number of requests to catch up.
    asked: AtomicUsize,
}

#[async_trait]
impl RevisionCatchUp for TestCatchUp {
    async fn catch_up_to(&self, revision: &Revision) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.stuck.load(Ordering::SeqCst) {
            return false;
        }
        let view = self.cell.load().unwrap();
        if view.snapshot.revision().number < revision.number {
            let changes = std::mem::take(&mut *self.changes.lock().unwrap());
            let snapshot =
                self.builder.lock().unwrap().apply_changes(revision.number, StateDigest::default(), changes.iter()).unwrap();
            self.cell.publish(SnapshotView { snapshot, ..view });
        }
        true
    }
}

struct ServiceFixture {
    clock: Arc<ManualClock>,
    cell: Arc<SnapshotCell>,
    builder: Arc<Mutex<SnapshotBuilder>>,
    ledger: Arc<HookedProofLedger>,
    approvals: Arc<HookedApprovalLedger>,
    catch_up: Arc<TestCatchUp>,
    store: Arc<dyn Store>,
    service: RuntimeService,
    log: Arc<AuditLog>,
    documents: Vec<DocumentRow>,
    issuer: PrivateKey,
    agent: PrivateKey,
    tokens: Vec<Bytes>,
    folder: tempfile::TempDir,
}

/// The current revision of a store.
fn revision_of(store: Arc<dyn Store>) -> Revision {
    let read = move || tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(store.revision()).unwrap();
    std::thread::spawn(read).join().unwrap()
}

fn world() -> ServiceFixture {
    let clock = Arc::new(ManualClock::at_unix_s(START_UNIX_S));
    let (issuer, agent) = (PrivateKey::from_seed([1; 32]).unwrap(), PrivateKey::from_seed([2; 32]).unwrap());
    let policy = format!(
        "{{kind: issuer, id: 'https://i', keys: {{jwks: {{keys: [{}]}}}}, audiences: ['{AUDIENCE}'], groups: [g], applications: [p]}}\n---\n\
         {{kind: application, id: p, allow: ['*']}}\n---\n{{kind: group, id: g, allow: ['*']}}\n---\n\
         {{kind: tool, id: {TOOL}, risk: destructive}}\n---\n\
         {{kind: server, id: pay, tools: {{refund: {{risk: write}}, burn: {{risk: destructive}}, tip: {{risk: read, proof: none}}}}}}\n---\n\
         {{kind: operator, id: olga, keys: [{}], roles: [approve], groups: [leads], users: [{{issuer: 'https://i', sub: olga}}]}}\n---\n\
         {{kind: agent, id: 'spiffe://a/b', keys: [{}], applications: [p], acts_for: [g], allow: [t/*], \
           approve: [{{pay/*: {{by: [leads], expires_in: 5m}}}}]}}\n---\n\
         {{kind: agent, id: 'spiffe://a/other', keys: [{}], applications: [p], acts_for: [g], allow: [t/*]}}\n",
        issuer.public_key().to_jwk(),
        PrivateKey::from_seed([3; 32]).unwrap().public_key().to_jwk(),
        agent.public_key().thumbprint(),
        PrivateKey::from_seed([4; 32]).unwrap().public_key().thumbprint(),
    );
    let documents = parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: policy.into_bytes() }]);
    assert_eq!(documents.diagnostics, []);
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open(&folder.path().join("store.db"), clock.clone()).unwrap());
    let mut builder = SnapshotBuilder::new(Arc::new(RevocationIndex::new()));
    let rows: Vec<DocumentRow> = documents.documents.iter().map(|document| document.to_row(DocumentOrigin::Folder)).collect();
    let state = FullState {
        revision: revision_of(store.clone()),
        digest: StateDigest::default(),
        iat_skew_s: 30,
        freshness_bound_ms: 5_000,
        documents: rows.clone(),
        revocations: vec![],
    };
    let cell = Arc::new(SnapshotCell::default());
    let ledger = Arc::new(HookedProofLedger::default());
    let store: Arc<dyn Store> = store;
    let (before, meanwhile, fails) = (WaitHook::default(), WaitHook::default(), Mutex::default());
    let desk = HookedApprovalLedger {
        store: StoreApprovalLedger(store.clone()),
        before,
        meanwhile,
        fails,
        open: watch::Sender::new(true),
    };
    let desk = Arc::new(desk);
    clock.advance_ms(2_000);
    cell.publish(SnapshotView { snapshot: builder.replace_all(state).unwrap(), proof: FreshnessProof::SentAt(clock.now()) });
    let builder = Arc::new(Mutex::new(builder));
    let (changes, stuck) = (Mutex::default(), AtomicBool::new(false));
    let follows =
        Arc::new(TestCatchUp { cell: cell.clone(), builder: builder.clone(), changes, stuck, asked: AtomicUsize::new(0) });
    let parts = ServiceParts {
        snapshot_cell: cell.clone(),
        ledger: ledger.clone(),
        approvals: desk.clone(),
        catch_up: follows.clone(),
        metrics: Metrics::unexported(),
        spans: SpanRecorder::disabled(),
        clock: clock.clone(),
        spawn: Arc::new(|work| drop(tokio::spawn(work))),
    };
    let service = Arc::new(PdpService::new(parts, Settings::default()));
    service.ready_at.get_or_init(|| ClockReading { unix_ns: START_UNIX_S * 1_000_000_000, boot_ns: 0 });
    let root = root(&issuer, &agent, "spiffe://a/b", "u", clock.now());
    let log = AuditLog::open(&folder.path().join("audit"), "n", clock.clone()).unwrap();
    let runtime_service = service.runtime_service(log.open_recorder("lane").unwrap());
    ServiceFixture {
        clock,
        cell,
        builder,
        ledger,
        approvals: desk,
        catch_up: follows,
        store,
        service: runtime_service,
        log,
        documents: rows,
        issuer,
        agent,
        tokens: vec![root],
        folder,
    }
}

/// A root that lets an agent call every tool for a user.
fn root(issuer: &PrivateKey, agent: &PrivateKey, agent_id: &str, user: &str, now: ClockReading) -> Bytes {
    let claims = format!(
        r#"{{"iss":"https://i","aud":"{AUDIENCE}","sub":"{user}","sub_profile":"user","groups":["g"],"client_id":"p","sid":"s","txn":"x",
        "act":{{"iss":"https://i","sub":"{agent_id}"}},"exp":{},"cnf":{{"jwk":{}}},"del_max_depth":0,
        "authorization_details":[{{"type":"attenuating_agent_token","tools":{{"{TOOL}":{{}},"pay/refund":{{}},"pay/burn":{{}},"pay/tip":{{}}}}}}]}}"#,
        START_UNIX_S + 600,
        agent.public_key().to_jwk(),
    );
    issue::issue_root(issuer, &claims, now).unwrap().into()
}

/// A proof of one call by the holder of a chain.
fn proof(key: &PrivateKey, tokens: &[Bytes], tool: &str, arguments: &JsonObject, now: ClockReading) -> Bytes {
    let call = ProofCall { tool, arguments, audience: Some(AUDIENCE) };
    issue::sign_proof(key, tokens, &call, None, now).unwrap().into()
}

impl ServiceFixture {
    /// A root for another agent or user.
    fn root(&self, agent: &PrivateKey, agent_id: &str, user: &str) -> Bytes {
        root(&self.issuer, agent, agent_id, user, self.clock.now())
    }

    /// A call with a proof of its own.
    fn call(&self, tool: &str, arguments: &str, request_id: &str) -> DecisionRequest {
        let parsed = parse_object(arguments.as_bytes()).unwrap();
        DecisionRequest {
            request_id: request_id.to_owned(),
            proof: Some(proof(&self.agent, &self.tokens, tool, &parsed, self.clock.now())),
            arguments_json: arguments.to_owned().into(),
            audience: Some(AUDIENCE.to_owned()),
            ..DecisionRequest::new(AgentCredential::Chain(self.tokens.clone()), tool)
        }
    }
}

/// A destructive call with a proof.
fn asked(world: &ServiceFixture) -> DecisionRequest {
    world.call(TOOL, "{}", "")
}

fn caller() -> Caller {
    Caller { connection_id: 1, address: "test".into(), is_loopback: true }
}

fn session_killed() -> RevocationRow {
    RevocationRow {
        target: RevocationTarget::Session("s".to_owned()),
        dead: true,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 2,
    }
}

/// Checks the answer to a destructive call if `meanwhile` runs while its proof is spent.
async fn check(world: &ServiceFixture, meanwhile: impl FnOnce() + Send + 'static, expected: (Effect, Reason)) {
    *world.ledger.meanwhile.lock().unwrap() = Some(Box::new(meanwhile));
    let answer = world.service.check(&asked(world), &caller()).await.unwrap();
    assert_eq!((answer.decision.effect, answer.decision.reason), expected, "{}", answer.message);
    assert!(world.ledger.meanwhile.lock().unwrap().is_none(), "the proof was spent in the store");
}

/// A stolen chain, an overheard proof and a killed chain show no possession, so they keep no place on a full listener.
#[tokio::test]
async fn only_a_new_proof_on_a_chain_in_force_shows_possession() {
    let world = world();
    let shows = async |request: &DecisionRequest, reason| {
        let answer = world.service.check(request, &caller()).await.unwrap();
        assert_eq!(answer.decision.reason, reason, "{}", answer.message);
        answer.shows_possession
    };
    let proved = asked(&world);
    assert!(!shows(&DecisionRequest { proof: None, ..asked(&world) }, Reason::ProofMissing).await);
    assert!(shows(&proved, Reason::Ok).await);
    assert!(!shows(&proved, Reason::ProofReplayed).await);
    let other = DecisionRequest { tool: "crm/other".to_owned(), ..asked(&world) };
    assert!(!world.service.check(&other, &caller()).await.unwrap().shows_possession, "it was signed for another call");
    let row = session_killed();
    drop(world.builder.lock().unwrap().apply_changes(2, StateDigest::default(), [RowChange::Revocation(row)].iter()).unwrap());
    assert!(!shows(&asked(&world), Reason::RevokedSession).await);
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
    // The follower has applied the revocation and not published its snapshot yet. It denies all the same.
    let revoke = move || {
        drop(builder.lock().unwrap().apply_changes(2, StateDigest::default(), [RowChange::Revocation(row)].iter()).unwrap())
    };
    check(&world, revoke, (Effect::Deny, Reason::RevokedSession)).await;
}

/// A pending answer is confirmed before it is sent. So a replica that has acknowledged a revocation holds no earlier permit.
#[tokio::test]
async fn an_answer_that_was_held_is_confirmed() {
    let held = async |happen: &dyn Fn(&ServiceFixture), expected: (Effect, Reason)| {
        let world = world();
        let (request, caller) = (asked(&world), caller());
        let (answer, held) = world.service.check_pending(&request, &caller).await.unwrap();
        assert_eq!(answer.decision.reason, Reason::Ok, "{}", answer.message);
        let id = answer.decision_id.clone();
        happen(&world);
        let given = world.service.confirm_answer(&request, &caller, answer, held);
        assert_eq!((given.decision.effect, given.decision.reason), expected);
        assert_eq!(given.decision_id == id, expected.0 == Effect::Permit, "another decision has another id");
    };
    let apply = |world: &ServiceFixture, row: RevocationRow| {
        let mut builder = world.builder.lock().unwrap();
        drop(builder.apply_changes(2, StateDigest::default(), [RowChange::Revocation(row)].iter()).unwrap());
    };
    held(&|_| {}, (Effect::Permit, Reason::Ok)).await;
    held(&|world| apply(world, session_killed()), (Effect::Deny, Reason::RevokedSession)).await;
    let other = RevocationRow { target: RevocationTarget::Session("other".to_owned()), ..session_killed() };
    held(&|world| apply(world, other.clone()), (Effect::Permit, Reason::Ok)).await;
    held(&|world| world.clock.advance_ms(1_500), (Effect::Deny, Reason::Stale)).await;
}

#[tokio::test]
async fn the_view_grows_old() {
    let world = world();
    let clock = world.clock.clone();
    check(&world, move || clock.advance_ms(1_500), (Effect::Deny, Reason::Stale)).await;
}

/// After a wait the newest view decides, by its proof of freshness as well as by its snapshot.
#[tokio::test]
async fn the_newest_view_decides_after_a_wait() {
    let world = world();
    let (clock, cell) = (world.clock.clone(), world.cell.clone());
    let renewed = move || {
        clock.advance_ms(1_500);
        cell.renew_proof(FreshnessProof::SentAt(clock.now()));
    };
    check(&world, renewed, (Effect::Permit, Reason::Ok)).await;

    let world = self::world();
    let (builder, cell) = (world.builder.clone(), world.cell.clone());
    let published = move || {
        let proof = cell.load().unwrap().proof;
        let key = DocumentKey { kind: "tool".into(), id: TOOL.into() };
        let removed = [RowChange::DocumentRemoved(key)];
        let snapshot = builder.lock().unwrap().apply_changes(1, StateDigest::default(), removed.iter()).unwrap();
        cell.publish(SnapshotView { snapshot, proof });
    };
    check(&world, published, (Effect::Deny, Reason::ToolUnknown)).await;
}

#[tokio::test]
async fn a_caller_sees_what_it_has_seen_after_a_wait_too() {
    let world = world();
    let seen = world.cell.load().unwrap().snapshot.revision().clone();
    let (builder, cell, documents) = (world.builder.clone(), world.cell.clone(), world.documents.clone());
    // A restored store was adopted meanwhile, so the newest view has another history.
    let adopted = move || {
        let view = cell.load().unwrap();
        let state = FullState {
            revision: Revision { history: HistoryId::new("other"), number: 9 },
            digest: StateDigest::default(),
            iat_skew_s: 30,
            freshness_bound_ms: 5_000,
            documents,
            revocations: vec![],
        };
        let snapshot = builder.lock().unwrap().replace_all(state).unwrap();
        cell.publish(SnapshotView { snapshot, ..view });
    };
    *world.ledger.meanwhile.lock().unwrap() = Some(Box::new(adopted));
    let request = DecisionRequest { at_least: Some(seen), ..asked(&world) };
    let answer = world.service.check(&request, &caller()).await.unwrap();
    assert_eq!((answer.decision.effect, answer.decision.reason), (Effect::Deny, Reason::RevisionUnavailable));
}

/// One agent's flood gets `LEDGER_BUSY`. The calls of its other users and of other agents go through.
#[tokio::test]
async fn a_flood_of_one_agent_leaves_the_ledger_to_others() {
    let world = world();
    let destructive = |tokens: Vec<Bytes>, key: &PrivateKey| DecisionRequest {
        proof: Some(proof(key, &tokens, TOOL, &JsonObject::default(), world.clock.now())),
        credential: AgentCredential::Chain(tokens),
        ..asked(&world)
    };
    let other = PrivateKey::from_seed([4; 32]).unwrap();
    let others = [
        destructive(vec![world.root(&world.agent, "spiffe://a/b", "another user")], &world.agent),
        destructive(vec![world.root(&other, "spiffe://a/other", "u")], &other),
    ];
    // Uses of approvals wait until the store is open.
    world.approvals.open.send_replace(false);
    let flood: Vec<DecisionRequest> =
        (0..LEDGER_USES_IN_FLIGHT_MAX).map(|number| world.call("pay/refund", &format!("{{\"amount\":{number}}}"), "")).collect();
    let caller = caller();
    let mut waiting: Vec<_> = flood.iter().map(|request| Box::pin(world.service.check(request, &caller))).collect();
    let mut refused = Vec::new();
    for check in &mut waiting {
        if let std::task::Poll::Ready(answer) = futures_util::poll!(check.as_mut()) {
            let answer = answer.unwrap();
            assert!(answer.message.contains("this agent has too many calls"), "{}", answer.message);
            refused.push(answer.decision.reason);
        }
    }
    assert!(!refused.is_empty() && refused.len() < flood.len(), "{} of {LEDGER_USES_IN_FLIGHT_MAX} are refused", refused.len());
    assert!(refused.iter().all(|reason| *reason == Reason::LedgerBusy), "{refused:?}");
    for request in &others {
        let answer = world.service.check(request, &caller).await.unwrap();
        assert_eq!(answer.decision.reason, Reason::Ok, "{}", answer.message);
    }
    drop(waiting);
    world.approvals.open.send_replace(true);
    world.service.ledger_quota.wait_until_idle().await;
}

/// A write that the store does not take in time uses nothing. If its outcome is not known, the answer says so.
#[tokio::test]
async fn a_busy_store_uses_nothing() {
    let world = world();
    let request = asked(&world);
    let check = async |expected: (Effect, Reason)| {
        let answer = world.service.check(&request, &caller()).await.unwrap();
        assert_eq!((answer.decision.effect, answer.decision.reason), expected, "{}", answer.message);
        answer.message
    };
    *world.ledger.fails.lock().unwrap() = Some(LedgerError::Busy("away".to_owned()));
    let message = check((Effect::Deny, Reason::LedgerBusy)).await;
    assert!(message.contains("nothing was used"), "{message}");
    *world.ledger.fails.lock().unwrap() = None;
    let permits: Vec<_> = std::iter::from_fn(|| world.service.ledger_quota.try_reserve()).collect();
    let message = check((Effect::Deny, Reason::LedgerBusy)).await;
    assert!(message.contains("too many calls wait") && message.contains("nothing was used"), "{message}");
    drop(permits);
    // The same proof is still valid.
    check((Effect::Permit, Reason::Ok)).await;
    check((Effect::Deny, Reason::ProofReplayed)).await;

    let request = asked(&world);
    *world.ledger.fails.lock().unwrap() = Some(LedgerError::OutcomeUnknown("gone".to_owned()));
    let answer = world.service.check(&request, &caller()).await.unwrap();
    assert_eq!(answer.decision.reason, Reason::LedgerUnknown);
    *world.ledger.fails.lock().unwrap() = None;
    let answer = world.service.check(&request, &caller()).await.unwrap();
    assert_eq!(answer.decision.reason, Reason::ProofReplayed, "it may have been spent");
}

#[tokio::test]
async fn the_chain_ends() {
    let world = world();
    let clock = world.clock.clone();
    check(&world, move || clock.advance_ms(600_000), (Effect::Deny, Reason::TokenExpired)).await;
}

/// Only a caller with a valid credential may wait for a later revision. Any other caller gets the answer at once and causes no poll.
#[tokio::test]
async fn only_a_credential_waits_for_a_revision() {
    let world = world();
    let stranger = PrivateKey::from_seed([9; 32]).unwrap();
    let root = |key: &PrivateKey, issuer: &str, agent: &str, exp_s: i64| {
        let claims = format!(
            r#"{{"iss":"{issuer}","aud":"{AUDIENCE}","sub":"u","sub_profile":"user","groups":["g"],"client_id":"p","sid":"s","txn":"x",
            "act":{{"sub":"{agent}"}},"exp":{exp_s},"cnf":{{"jwk":{}}},"del_max_depth":0,
            "authorization_details":[{{"type":"attenuating_agent_token","tools":{{}}}}]}}"#,
            stranger.public_key().to_jwk(),
        );
        AgentCredential::Chain(vec![issue::issue_root(key, &claims, world.clock.now()).unwrap().into()])
    };
    let (registered, new, soon) = ("spiffe://a/b", "spiffe://a/new", START_UNIX_S + 600);
    let cases = [
        ("garbage", AgentCredential::Chain(vec!["x".into()]), 0),
        ("no such handle", AgentCredential::Handle([1; 16]), 0),
        ("an issuer that nobody trusts", root(&stranger, "https://elsewhere", registered, soon), 0),
        ("forged", root(&stranger, "https://i", registered, soon), 0),
        ("a chain that stands", AgentCredential::Chain(world.tokens.clone()), 1),
        ("an agent that may be registered by then", root(&world.issuer, "https://i", new, soon), 1),
        ("a key that may be", root(&world.issuer, "https://i", registered, soon), 1),
    ];
    world.catch_up.stuck.store(true, Ordering::SeqCst);
    let here = world.cell.load().unwrap().snapshot.revision().clone();
    for (name, credential, asked_to) in cases {
        for number in [here.number, here.number + 1] {
            let at_least = Revision { history: here.history.clone(), number };
            let request = DecisionRequest { credential: credential.clone(), at_least: Some(at_least), ..asked(&world) };
            let before = world.catch_up.asked.load(Ordering::SeqCst);
            let answer = world.service.check(&request, &caller()).await.unwrap();
            let told = world.service.explain(&request, &caller()).await.unwrap();
            let times = world.catch_up.asked.load(Ordering::SeqCst) - before;
            if number > here.number {
                assert_eq!(
                    (answer.decision.reason, told.reason),
                    (Reason::RevisionUnavailable, Reason::RevisionUnavailable),
                    "{name}"
                );
                assert_eq!(times, 2 * asked_to, "{name}");
            } else {
                assert_ne!(answer.decision.reason, Reason::RevisionUnavailable, "{name}");
                assert_eq!(times, 0, "{name}: what is there is waited for by nobody");
            }
        }
    }
}
