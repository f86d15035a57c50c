//! The cost of each stage of a decision, in this process: the warm decision, cold verification, proof, revocation, compiling.
//!
//! Warm-ups and samples are short, so that the whole run takes under three minutes. It shows factors, not percents; compare only
//! figures of one run. Look next at the README.

#[path = "../load-tests/fixture.rs"]
#[allow(dead_code, reason = "the load test uses the rest")]
mod fixture;

use std::future::Future;
use std::hint::black_box;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use criterion::{BatchSize, Criterion};
use fixture::{ARGUMENTS, AUDIENCE, CompanyFixture, PROVED_TOOL, TOOL};
use portcullis::audit;
use portcullis::model::approval::{ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest};
use portcullis::model::decision::Effect;
use portcullis::model::json::{JsonObject, parse_object};
use portcullis::model::request::ToolCall;
use portcullis::model::revision::{HistoryId, Revision, StateDigest};
use portcullis::model::rows::{DocumentOrigin, RevocationRow, RevocationTarget};
use portcullis::model::time::{Clock, ClockReading, SystemClock};
use portcullis::pdp::{self, PreparedChain};
use portcullis::policy::compile::CompiledPolicy;
use portcullis::policy::document::Document;
use portcullis::policy::source::{SourceFile, parse_files};
use portcullis::revocation::{RevocationIndex, TargetRef};
use portcullis::service::request::Caller;
use portcullis::service::{
    self, AgentCredential, ApprovalLedger, DecisionRequest, LedgerError, PdpService, ProofLedger, RevisionCatchUp, RuntimeService,
};
use portcullis::snapshot::{FreshnessProof, FullState, Snapshot, SnapshotBuilder, SnapshotCell, SnapshotView};
use portcullis::telemetry::{self, Telemetry};
use portcullis::token::{self, ProofCall, VerificationOptions, VerifiedChain, issue};

/// Entries of the large revocation index.
const REVOCATIONS: usize = 1_000_000;

fn main() -> Result<()> {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(20)
        .configure_from_args();
    let company = CompanyFixture::new()?;
    let empty = snapshot(&company, &[])?;
    decision(&mut criterion, &company, &empty, "0")?;
    runtime_service(&mut criterion, &company, &empty)?;
    cold(&mut criterion, &company, &empty)?;
    let rows: Vec<RevocationRow> = (0..REVOCATIONS).map(revoked).collect();
    let full = snapshot(&company, &rows)?;
    decision(&mut criterion, &company, &full, "1M")?;
    revocation(&mut criterion, &empty, "0");
    revocation(&mut criterion, &full, "1M");
    compile(&mut criterion, &company)?;
    criterion.final_summary();
    Ok(())
}

/// `pdp` alone, with a prepared chain. The index has not changed since the last call, as usual.
fn decision(criterion: &mut Criterion, company: &CompanyFixture, snapshot: &Arc<Snapshot>, revocations: &str) -> Result<()> {
    for tokens in [1, 2, 5] {
        let now = SystemClock.now();
        let chain = Arc::new(verified(company, snapshot, tokens, now)?);
        let prepared = PreparedChain::new(chain, snapshot).context("the chain has no identities")?;
        let arguments = arguments()?;
        let call = ToolCall::new(TOOL, &arguments);
        let decided = pdp::decide(&prepared, &call, snapshot, now);
        if decided.effect != Effect::Permit {
            bail!("no permit but {decided:?}");
        }
        let name = format!("pdp::decide, {tokens} tokens, {revocations} revocations");
        criterion.bench_function(&name, |bencher| bencher.iter(|| pdp::decide(black_box(&prepared), &call, snapshot, now)));
    }
    Ok(())
}

/// Every step between a message and its answer except the transport: cache, arguments, decision, audit record, metrics.
fn runtime_service(criterion: &mut Criterion, company: &CompanyFixture, snapshot: &Arc<Snapshot>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let log = audit::AuditLog::open(folder.path(), "bench", clock.clone())?;
    let telemetry = Telemetry::start(&telemetry::Settings::default())?;
    let cell = Arc::new(SnapshotCell::default());
    cell.publish(SnapshotView { snapshot: snapshot.clone(), proof: FreshnessProof::SentAt(clock.now()) });
    let (ledger, approvals, catch_up) = (Arc::new(NoLedgers), Arc::new(NoLedgers), Arc::new(NoLedgers));
    let (metrics, spans) = (telemetry.metrics(), telemetry.spans());
    let spawn: service::TaskSpawner = Arc::new(drop);
    let parts = service::ServiceParts {
        snapshot_cell: cell.clone(),
        ledger,
        approvals,
        catch_up,
        metrics,
        spans,
        clock: clock.clone(),
        spawn,
    };
    let service = Arc::new(PdpService::new(parts, service::Settings::default()));
    service.mark_ready();
    let recorder = log.open_recorder("bench")?;
    let runtime_service = service.runtime_service(recorder.clone());
    let caller = Caller { connection_id: 1, address: "127.0.0.1:1".into(), is_loopback: true };
    let now = clock.now();
    for tokens in [2, 5] {
        let by_chain = request(AgentCredential::Chain(company.chain(0, tokens, now)?), true);
        let Some(handle) = permitted(&runtime_service, &by_chain, &caller)? else { bail!("no handle") };
        let by_chain = DecisionRequest { want_handle: false, ..by_chain };
        let by_handle = request(AgentCredential::Handle(handle), false);
        for (name, request) in [("chain", &by_chain), ("handle", &by_handle)] {
            criterion.bench_function(&format!("Lane::check, by {name}, {tokens} tokens, cached"), |bencher| {
                // The work of a socket's write and of the follower, outside the measured time.
                bencher.iter_custom(|iterations| {
                    let mut elapsed = Duration::ZERO;
                    let mut left = iterations;
                    while left > 0 {
                        let turn = left.min(512);
                        cell.renew_proof(FreshnessProof::SentAt(clock.now()));
                        let since = Instant::now();
                        for _ in 0..turn {
                            let _ = black_box(ready(runtime_service.check(black_box(request), &caller)));
                        }
                        elapsed += since.elapsed();
                        left -= turn;
                        // A failure shows as a denial below.
                        let _ = recorder.flush();
                    }
                    elapsed
                });
            });
            cell.renew_proof(FreshnessProof::SentAt(clock.now()));
            permitted(&runtime_service, request, &caller)?;
        }
    }
    log.shutdown()?;
    Ok(())
}

/// A chain that is not cached, compared with as many plain signatures; then a proof.
fn cold(criterion: &mut Criterion, company: &CompanyFixture, snapshot: &Arc<Snapshot>) -> Result<()> {
    let now = SystemClock.now();
    let options = VerificationOptions::default();
    let chain = company.chain(0, 1, now)?;
    let key = company.leaf_key(1)?;
    let message = chain.first().context("no root")?.slice(..600);
    let signature = key.sign(&message);
    let public = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, *key.public_key().as_bytes());
    criterion.bench_function("one Ed25519 verification, 600 bytes", |bencher| {
        bencher.iter(|| public.verify(black_box(&message), &signature));
    });
    for tokens in [1, 2, 3, 5] {
        let chain = company.chain(0, tokens, now)?;
        criterion.bench_function(&format!("token::verify, cold, {tokens} tokens"), |bencher| {
            bencher.iter(|| token::verify(black_box(&chain), snapshot.trust(), &options, now));
        });
    }
    let chain = company.chain(0, 2, now)?;
    let verified = verified(company, snapshot, 2, now)?;
    let arguments = arguments()?;
    let expected = ProofCall { tool: PROVED_TOOL, arguments: &arguments, audience: Some(AUDIENCE) };
    let proof = issue::sign_proof(company.leaf_key(2)?, &chain, &expected, None, now)?;
    token::verify_proof(&verified_again(&chain, snapshot, now)?, proof.as_bytes(), &expected, &options, now)?;
    criterion.bench_function("token::verify_proof", |bencher| {
        bencher.iter(|| token::verify_proof(black_box(&verified), proof.as_bytes(), &expected, &options, now).is_ok());
    });
    criterion.bench_function("Prepared::new, 2 tokens", |bencher| {
        let verified = Arc::new(verified.clone());
        bencher.iter(|| PreparedChain::new(black_box(verified.clone()), snapshot));
    });
    Ok(())
}

/// One look-up of a target that is not revoked, and of one that is.
fn revocation(criterion: &mut Criterion, snapshot: &Arc<Snapshot>, entries: &str) {
    let index = snapshot.revocations();
    let number = snapshot.revision().number;
    let absent = index.key(TargetRef::Session("alive"));
    criterion.bench_function(&format!("revocation, miss, {entries} entries"), |bencher| {
        bencher.iter(|| index.find_hit(black_box(absent), 0, number));
    });
    if !index.is_empty() {
        let present = index.key(TargetRef::Session("dead-4711"));
        criterion.bench_function(&format!("revocation, hit, {entries} entries"), |bencher| {
            bencher.iter(|| index.find_hit(black_box(present), 0, number));
        });
    }
}

/// Compiling the whole policy, and applying a change of one agent.
fn compile(criterion: &mut Criterion, company: &CompanyFixture) -> Result<()> {
    let mut group = criterion.benchmark_group("policy");
    group.sample_size(10);
    for (name, agents) in [("1k", 1_000), ("100k", 100_000)] {
        let documents = documents(company, agents)?;
        group.bench_function(format!("compile, {name} agents"), |bencher| {
            bencher.iter_batched(|| (), |()| CompiledPolicy::compile(black_box(&documents)).is_ok(), BatchSize::PerIteration);
        });
        let Ok(compiled) = CompiledPolicy::compile(&documents) else { bail!("the policy does not compile") };
        let changed: Vec<Document> = documents.into_iter().rev().take(1).collect();
        group.bench_function(format!("one agent changed of {name}"), |bencher| {
            bencher.iter(|| compiled.with_agents(black_box(&changed), &[]).is_ok());
        });
    }
    group.finish();
    Ok(())
}

fn documents(company: &CompanyFixture, more: usize) -> Result<Vec<Document>> {
    let files = [SourceFile { path: "company.yaml".to_owned(), content: company.policy(more)?.into_bytes() }];
    let parsed = parse_files(&files);
    match parsed.diagnostics.iter().find(|diagnostic| diagnostic.is_error()) {
        Some(error) => bail!("{error}"),
        None => Ok(parsed.documents),
    }
}

fn snapshot(company: &CompanyFixture, revocations: &[RevocationRow]) -> Result<Arc<Snapshot>> {
    let state = FullState {
        revision: Revision { history: HistoryId::new("00000000-0000-7000-8000-000000000000"), number: 12 },
        digest: StateDigest::default(),
        iat_skew_s: 30,
        freshness_bound_ms: 5_000,
        documents: documents(company, 0)?.iter().map(|document| document.to_row(DocumentOrigin::Folder)).collect(),
        revocations: revocations.to_vec(),
    };
    Ok(SnapshotBuilder::new(Arc::new(RevocationIndex::new())).replace_all(state)?)
}

fn revoked(number: usize) -> RevocationRow {
    RevocationRow {
        target: RevocationTarget::Session(format!("dead-{number}")),
        dead: true,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 3,
    }
}

fn verified(company: &CompanyFixture, snapshot: &Snapshot, tokens: usize, now: ClockReading) -> Result<VerifiedChain> {
    verified_again(&company.chain(0, tokens, now)?, snapshot, now)
}

fn verified_again(chain: &[Bytes], snapshot: &Snapshot, now: ClockReading) -> Result<VerifiedChain> {
    Ok(token::verify(chain, snapshot.trust(), &VerificationOptions::default(), now)?)
}

fn arguments() -> Result<JsonObject> {
    Ok(parse_object(ARGUMENTS.as_bytes())?)
}

fn request(credential: AgentCredential, want_handle: bool) -> DecisionRequest {
    DecisionRequest {
        request_id: "r-00000000".to_owned(),
        arguments_json: Bytes::from_static(ARGUMENTS.as_bytes()),
        audience: Some(AUDIENCE.to_owned()),
        want_handle,
        ..DecisionRequest::new(credential, TOOL)
    }
}

/// Checks once and fails unless the answer is a permit, so that nothing else is measured. Returns the handle if one was requested.
fn permitted(runtime_service: &RuntimeService, request: &DecisionRequest, caller: &Caller) -> Result<Option<[u8; 16]>> {
    let answer = ready(runtime_service.check(request, caller)).context("a warm call waited")??;
    if answer.decision.effect != Effect::Permit {
        bail!("no permit but {:?}: {}", answer.decision, answer.message);
    }
    Ok(answer.handle)
}

/// The output of a future that never waits.
fn ready<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut TaskContext::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// Replaces the store's ledgers, which no call here needs.
struct NoLedgers;

#[async_trait::async_trait]
impl ProofLedger for NoLedgers {
    async fn spend(&self, _key: [u8; 32], _expires_at_unix_s: i64) -> Result<bool, LedgerError> {
        Err(LedgerError::Busy("there is no store".to_owned()))
    }
}

#[async_trait::async_trait]
impl ApprovalLedger for NoLedgers {
    async fn ask_approval(&self, _request: ApprovalSubmission) -> Result<ApprovalSubmissionOutcome, LedgerError> {
        Err(LedgerError::Busy("there is no store".to_owned()))
    }

    async fn use_approvals(&self, _request: ApprovalUseRequest) -> Result<ApprovalUseOutcome, LedgerError> {
        Err(LedgerError::Busy("there is no store".to_owned()))
    }

    async fn give_back_approvals(&self, _request: ApprovalUseRequest) -> Result<bool, LedgerError> {
        Ok(false)
    }
}

#[async_trait::async_trait]
impl RevisionCatchUp for NoLedgers {
    async fn catch_up_to(&self, _revision: &Revision) -> bool {
        false
    }
}
