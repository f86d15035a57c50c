//! Tests of a call that needs an approval: it asks once, uses the approval once, and gets no more than the layers asked for.

use super::*;
use crate::model::approval::{ApprovalFilter, ApprovalRow, ApprovalState, OwnApprovalUse};
use crate::model::decision::{ApprovalNeed, PreparationNeed};
use crate::model::limits::APPROVALS_WAITING_MAX;
use crate::model::reason::DecisionLayer;
use crate::model::rows::StoreWrite;
use crate::service::ledger_call::LedgerCall;
use crate::store::CommitRequest;

const REFUND: &str = "pay/refund";
const ARGUMENTS: &str = r#"{"amount":100}"#;
const NEEDS: (Effect, Reason) = (Effect::NeedsApproval, Reason::ApprovalRequired);
const PERMIT: (Effect, Reason) = (Effect::Permit, Reason::Ok);

/// The key of the operator who approves.
fn olga_key() -> String {
    PrivateKey::from_seed([3; 32]).unwrap().public_key().thumbprint().to_string()
}

fn denied(reason: Reason) -> (Effect, Reason) {
    (Effect::Deny, reason)
}

impl ServiceFixture {
    async fn asks(&self, request: &DecisionRequest, expected: (Effect, Reason)) -> CheckAnswer {
        self.asks_from("10.0.0.1:4000", request, expected).await
    }

    async fn asks_from(&self, address: &str, request: &DecisionRequest, expected: (Effect, Reason)) -> CheckAnswer {
        self.cell.renew_proof(FreshnessProof::SentAt(self.clock.now()));
        let caller = Caller { connection_id: 1, address: address.into(), is_loopback: true };
        let answer = self.service.check(request, &caller).await.unwrap();
        assert_eq!((answer.decision.effect, answer.decision.reason), expected, "{}", answer.message);
        assert_eq!(answer.approval.is_some(), expected == NEEDS);
        answer
    }

    /// Sends a refund call with a proof of its own and checks the answer.
    async fn refund(&self, request_id: &str, expected: (Effect, Reason)) -> CheckAnswer {
        self.asks(&self.call(REFUND, ARGUMENTS, request_id), expected).await
    }

    /// Asks for a call and approves it.
    async fn approved(&self, tool: &str) -> String {
        let digest = self.asks(&self.call(tool, ARGUMENTS, ""), NEEDS).await.approval.unwrap().digest;
        self.write(StoreWrite::Approve {
            digest: digest.clone(),
            operator: "olga".into(),
            key: olga_key(),
            groups: vec!["leads".into()],
        })
        .await;
        digest
    }

    async fn write(&self, write: StoreWrite) {
        self.store.commit(CommitRequest { writes: vec![write], ..CommitRequest::default() }).await.unwrap();
    }

    async fn rows(&self) -> Vec<ApprovalRow> {
        self.store.approvals(ApprovalFilter::All, 1000).await.unwrap().rows
    }

    async fn state(&self) -> ApprovalState {
        self.rows().await[0].state(self.clock.now().unix_ms())
    }
}

#[tokio::test]
async fn a_call_asks_and_is_permitted_once() {
    let world = world();
    let asked = world.refund("r", NEEDS).await;
    let approval = asked.approval.unwrap();
    assert_eq!((approval.approvers, asked.decision.layer), (vec!["leads".into()], Some(DecisionLayer::Agent)));
    let rows = world.rows().await;
    let call = &rows[0].call;
    assert_eq!((call.digest.as_str(), call.tool.as_str(), call.arguments_json.as_str()), (&*approval.digest, REFUND, ARGUMENTS));
    assert_eq!((call.issuer.as_str(), call.subject.as_str(), call.application.as_str()), ("https://i", "u", "p"));
    assert_eq!((call.agents.as_slice(), call.session.as_str(), call.task.as_str()), (&["spiffe://a/b".to_owned()][..], "s", "x"));
    world.clock.advance_ms(60_000);
    assert_eq!(world.refund("r", NEEDS).await.approval.unwrap().expires_at_unix_ms, approval.expires_at_unix_ms);
    assert_eq!(world.approved(REFUND).await, approval.digest);
    assert_eq!(world.rows().await.len(), 1);
    let permitted = world.refund("r", PERMIT).await;
    assert_eq!((permitted.decision.layer, permitted.decision.approvals.len()), (None, 0));
    let used = world.refund("r", denied(Reason::ApprovalUsed)).await;
    assert_eq!((used.decision.layer, used.decision.hop), (Some(DecisionLayer::Agent), Some(0)));
    // Other arguments make another call.
    world.asks(&world.call(REFUND, r#"{"amount":101}"#, "r"), NEEDS).await;
    world.clock.advance_ms(239_999);
    world.refund("r", denied(Reason::ApprovalUsed)).await;
    world.clock.advance_ms(1);
    let anew = world.refund("r", NEEDS).await.approval.unwrap();
    assert_eq!((anew.digest, anew.expires_at_unix_ms), (approval.digest, approval.expires_at_unix_ms + 300_000));
    world.approved(REFUND).await;
    world.refund("r", PERMIT).await;
}

#[tokio::test]
async fn an_approval_is_good_until_its_time_is_over() {
    for (passed_ms, expected) in [(299_999, PERMIT), (300_000, NEEDS)] {
        let world = world();
        world.approved(REFUND).await;
        world.clock.advance_ms(passed_ms);
        world.refund("r", expected).await;
    }
}

#[tokio::test]
async fn a_refusal_denies_until_its_time_is_over() {
    let world = world();
    let digest = world.approved(REFUND).await;
    world.write(StoreWrite::Refuse { digest, operator: "otto".into(), groups: vec!["leads".into()] }).await;
    let refused = world.refund("r", denied(Reason::ApprovalRefused)).await;
    assert_eq!(refused.decision.layer, Some(DecisionLayer::Agent));
    world.clock.advance_ms(300_000);
    world.refund("r", NEEDS).await;
}

#[tokio::test]
async fn a_lost_answer_is_given_again() {
    for tool in [REFUND, "pay/burn", "pay/tip"] {
        let world = world();
        world.approved(tool).await;
        let mut request = world.call(tool, ARGUMENTS, "r-1");
        if tool == "pay/tip" {
            request.proof = None;
        }
        let first = world.asks(&request, PERMIT).await;
        // The gateway returns on another connection.
        let again = world.asks_from("10.0.0.1:4001", &request, PERMIT).await;
        assert_eq!(again.decision_id, first.decision_id, "{tool}");
        // A repeat needs the same request id, the same gateway and the same proof.
        let replayed = if tool == "pay/tip" { Reason::ApprovalUsed } else { Reason::ProofReplayed };
        for id in ["r-2", ""] {
            world.asks(&DecisionRequest { request_id: id.to_owned(), ..request.clone() }, denied(replayed)).await;
        }
        world.asks_from("10.0.0.2:4000", &request, denied(replayed)).await;
        world.asks(&world.call(tool, ARGUMENTS, "r-1"), denied(Reason::ApprovalUsed)).await;
        world.clock.advance_ms(29_999);
        assert_eq!(world.asks(&request, PERMIT).await.decision_id, first.decision_id, "{tool}");
        world.clock.advance_ms(1);
        world.asks(&request, denied(replayed)).await;
    }
}

/// An earlier answer is repeated only if the call would still get it.
#[tokio::test]
async fn a_lost_answer_is_denied_once_the_call_is() {
    let world = world();
    world.approved(REFUND).await;
    let request = world.call(REFUND, ARGUMENTS, "r");
    let first = world.asks(&request, PERMIT).await;
    revoke_session(&world);
    let again = world.asks(&request, denied(Reason::RevokedSession)).await;
    assert_ne!(again.decision_id, first.decision_id);
}

#[tokio::test]
async fn a_replayed_proof_uses_no_approval() {
    let world = world();
    let request = world.call(REFUND, ARGUMENTS, "r");
    let digest = world.asks(&request, NEEDS).await.approval.unwrap().digest;
    world.write(StoreWrite::Approve { digest, operator: "olga".into(), key: olga_key(), groups: vec!["leads".into()] }).await;
    world.asks(&request, denied(Reason::ProofReplayed)).await;
    assert_eq!(world.state().await, ApprovalState::Approved);
    world.refund("r", PERMIT).await;
}

#[tokio::test]
async fn what_happens_while_an_approval_is_used_counts() {
    let check = async |meanwhile: fn(&ServiceFixture) -> Box<dyn FnOnce() + Send>, expected: Reason| {
        let world = world();
        world.approved(REFUND).await;
        *world.approvals.meanwhile.lock().unwrap() = Some(meanwhile(&world));
        world.refund("r", denied(expected)).await;
        assert!(world.rows().await[0].used.is_none(), "it was given back");
    };
    check(
        |world| {
            let builder = world.builder.clone();
            Box::new(move || revoke(&builder))
        },
        Reason::RevokedSession,
    )
    .await;
    check(
        |world| {
            let clock = world.clock.clone();
            Box::new(move || clock.advance_ms(600_000))
        },
        Reason::TokenExpired,
    )
    .await;
    check(
        |world| {
            let clock = world.clock.clone();
            Box::new(move || clock.advance_ms(5_000))
        },
        Reason::Stale,
    )
    .await;
}

/// A change that the store has and this replica lacks, such as a revocation, is applied before an approval is used.
#[tokio::test]
async fn an_approval_is_used_only_by_who_has_seen_all() {
    let world = world();
    world.approved(REFUND).await;
    world.catch_up.changes.lock().unwrap().push(RowChange::Revocation(session_killed()));
    world.refund("r", denied(Reason::RevokedSession)).await;
    assert_eq!(world.state().await, ApprovalState::Approved);

    let world = self::world();
    world.approved(REFUND).await;
    world.catch_up.stuck.store(true, Ordering::SeqCst);
    let request = world.call(REFUND, ARGUMENTS, "r");
    let answer = world.asks(&request, denied(Reason::LedgerBusy)).await;
    assert!(answer.message.contains("nothing was used"), "{}", answer.message);
    assert_eq!(world.state().await, ApprovalState::Approved);
    world.catch_up.stuck.store(false, Ordering::SeqCst);
    world.asks(&request, PERMIT).await;
}

/// A caller that disconnects during a use does not stop it: the approval is used and the decision is recorded.
#[tokio::test]
async fn a_use_runs_to_its_record_whoever_hangs_up() {
    let world = world();
    let digest = world.approved(REFUND).await;
    let request = world.call(REFUND, ARGUMENTS, "r");
    world.approvals.open.send_replace(false);
    {
        let caller = Caller { connection_id: 1, address: "10.0.0.1:4000".into(), is_loopback: true };
        let mut check = std::pin::pin!(world.service.check(&request, &caller));
        assert!(futures_util::poll!(check.as_mut()).is_pending());
        tokio::task::yield_now().await;
        // The future is dropped here, as when a connection is reset.
    }
    world.approvals.open.send_replace(true);
    world.service.wait_for_ledger_tasks().await;
    assert_eq!(world.state().await, ApprovalState::Used);
    world.log.shutdown().unwrap();
    let lines: Vec<serde_json::Value> = std::fs::read_dir(world.folder.path().join("audit"))
        .unwrap()
        .flat_map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap().lines().map(str::to_owned).collect::<Vec<_>>())
        .map(|line| serde_json::from_str(&line).unwrap())
        .filter(|line: &serde_json::Value| line["approval_digest"] == digest.as_str() && line["effect"] == "PERMIT")
        .collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(world.rows().await[0].used.as_ref().unwrap().decision_id, lines[0]["decision_id"]);
}

/// A pending answer that is denied in the end gives back its approval.
#[tokio::test]
async fn a_held_answer_that_is_denied_gives_back() {
    let world = world();
    world.approved(REFUND).await;
    world.cell.renew_proof(FreshnessProof::SentAt(world.clock.now()));
    let (request, caller) = (world.call(REFUND, ARGUMENTS, "r"), caller());
    let (answer, held) = world.service.check_pending(&request, &caller).await.unwrap();
    assert_eq!(answer.decision.effect, Effect::Permit, "{}", answer.message);
    revoke_session(&world);
    let given = world.service.confirm_answer(&request, &caller, answer, held);
    assert_eq!(given.decision.reason, Reason::RevokedSession);
    world.service.wait_for_ledger_tasks().await;
    assert_eq!(world.state().await, ApprovalState::Approved);
}

/// An approval whose answer was repeated stays used, because a caller may have received the permit.
#[tokio::test]
async fn what_was_given_again_is_not_given_back() {
    let world = world();
    world.approved(REFUND).await;
    let (builder, desk) = (world.builder.clone(), world.approvals.clone());
    let again = ApprovalUseRequest { lookup_only: true, ..ApprovalUseRequest::default() };
    let row = world.rows().await.remove(0);
    let request = world.call(REFUND, ARGUMENTS, "r");
    let caller = Caller { connection_id: 1, address: "10.0.0.1:4000".into(), is_loopback: true };
    let fingerprint = super::super::approval::request_fingerprint(caller.gateway_host(), &request, &world.tokens);
    let needs = vec![ApprovalNeed {
        layer: DecisionLayer::Agent,
        hop: Some(0),
        approver_groups: vec!["leads".into()],
        expires_in_ms: 300_000,
    }];
    let again = ApprovalUseRequest { own: Some(OwnApprovalUse { digest: row.call.digest, needs }), fingerprint, ..again };
    let handle = tokio::runtime::Handle::current();
    *world.approvals.meanwhile.lock().unwrap() = Some(Box::new(move || {
        let repeated = std::thread::spawn(move || handle.block_on(desk.store.use_approvals(again)).unwrap()).join().unwrap();
        assert!(matches!(repeated, ApprovalUseOutcome::Repeated { .. }), "{repeated:?}");
        revoke(&builder);
    }));
    world.asks(&request, denied(Reason::RevokedSession)).await;
    assert_eq!(world.state().await, ApprovalState::Used);
}

/// An approval that was signed with a key revoked since then no longer counts.
#[tokio::test]
async fn an_approver_whose_key_is_revoked_has_approved_nothing() {
    let world = world();
    world.approved(REFUND).await;
    let row = RevocationRow { target: RevocationTarget::Key(olga_key()), ..session_killed() };
    drop(world.builder.lock().unwrap().apply_changes(2, StateDigest::default(), [RowChange::Revocation(row)].iter()).unwrap());
    let asked = world.refund("r", NEEDS).await.approval.unwrap();
    assert_eq!(asked.approvers, vec!["leads".into()]);
    assert_eq!(world.state().await, ApprovalState::Waiting);
}

#[tokio::test]
async fn what_is_denied_uses_nothing() {
    let world = world();
    world.approved(REFUND).await;
    let request = world.call(REFUND, ARGUMENTS, "r");
    let caller = Caller { connection_id: 1, address: "test".into(), is_loopback: true };
    world.cell.renew_proof(FreshnessProof::SentAt(world.clock.now()));
    world.clock.advance_ms(5_000);
    let stale = world.service.check(&request, &caller).await.unwrap();
    assert_eq!(stale.decision.reason, Reason::Stale);
    assert_eq!(world.state().await, ApprovalState::Approved);
    // The proof is not spent either.
    world.asks(&request, PERMIT).await;
}

#[tokio::test]
async fn a_revocation_after_the_approval_denies() {
    let world = world();
    world.approved(REFUND).await;
    revoke_session(&world);
    world.refund("r", denied(Reason::RevokedSession)).await;
    assert_eq!(world.state().await, ApprovalState::Approved, "and uses nothing");
}

#[tokio::test]
async fn what_the_store_does_not_keep_is_denied() {
    let world = world();
    let fails = |error: Option<LedgerError>| *world.approvals.fails.lock().unwrap() = error;
    fails(Some(LedgerError::Busy("the store is away".to_owned())));
    let request = world.call(REFUND, ARGUMENTS, "r");
    let answer = world.asks(&request, denied(Reason::LedgerBusy)).await;
    assert!(answer.message.contains("store") && answer.approval.is_none(), "{}", answer.message);
    fails(None);
    assert!(world.rows().await.is_empty());
    // Nothing was used, so the same request can ask now.
    world.asks(&request, NEEDS).await;
    world.approved(REFUND).await;
    fails(Some(LedgerError::OutcomeUnknown("the store went away".to_owned())));
    world.refund("r", denied(Reason::LedgerUnknown)).await;
    fails(None);
    world.refund("r", PERMIT).await;
}

#[tokio::test]
async fn what_cannot_be_shown_cannot_be_approved() {
    let world = world();
    let sized = |bytes: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(bytes - 8));
    let answer = world.asks(&world.call(REFUND, &sized(16 * 1024 + 1), "r"), denied(Reason::ApprovalRequired)).await;
    assert!(answer.message.contains("16385 bytes") && answer.message.contains("approver"), "{}", answer.message);
    assert_eq!(answer.decision.layer, Some(DecisionLayer::Agent));
    assert!(world.rows().await.is_empty());
    // The canonical form counts.
    world.asks(&world.call(REFUND, &sized(16 * 1024), "r"), NEEDS).await;
    let spaced = sized(16 * 1024 - 1).replacen(':', ":   ", 1);
    world.asks(&world.call(REFUND, &spaced, "r"), NEEDS).await;
}

#[tokio::test]
async fn an_agent_asks_for_so_many_at_once() {
    let world = world();
    for number in 0..APPROVALS_WAITING_MAX {
        world.asks(&world.call(REFUND, &format!("{{\"n\":{number}}}"), ""), NEEDS).await;
    }
    let answer = world.refund("r", denied(Reason::ApprovalRequired)).await;
    assert!(answer.message.contains("100 calls of this user by this agent"), "{}", answer.message);
    world.asks(&world.call(REFUND, "{\"n\":7}", ""), NEEDS).await;
}

/// Tests `prepared:` with decisions that the test makes itself.
#[tokio::test]
async fn a_prepared_call_uses_the_other_approval() {
    let need = |tool: &str| PreparationNeed { layer: DecisionLayer::Agent, hop: Some(0), tool: tool.into() };
    let settled = async |world: &ServiceFixture, needs: Vec<PreparationNeed>, arguments: &str, request_id: &str| {
        world.cell.renew_proof(FreshnessProof::SentAt(world.clock.now()));
        let request = world.call(TOOL, arguments, request_id);
        let caller = Caller { connection_id: 1, address: "test".into(), is_loopback: true };
        let service = &world.service.service;
        let mut view = service.current_view().unwrap();
        // No approval is used before the newest commit is applied.
        service.parts.catch_up.catch_up_to(&world.store.revision().await.unwrap()).await;
        view = service.current_view().unwrap_or(view);
        let mut judgement = service.judge_call(&request, &caller, &view, world.clock.now());
        assert_eq!(judgement.decision.effect, Effect::Permit);
        judgement.decision.prepared_needs = needs;
        let mut call = LedgerCall { service, request: &request, caller: &caller, view, judgement };
        call.use_ledgers().await;
        call.judgement
    };
    let check = async |world: &ServiceFixture, arguments: &str, reason: Reason, says: &str| {
        let judgement = settled(world, vec![need(REFUND)], arguments, "").await;
        assert_eq!((judgement.decision.effect, judgement.decision.reason), denied(reason));
        assert_eq!((judgement.decision.layer, judgement.decision.hop), (Some(DecisionLayer::Agent), Some(0)));
        let message = judgement.message.unwrap();
        assert!(message.contains("`pay/refund`") && message.contains(says), "{message}");
    };
    let world = world();
    check(&world, ARGUMENTS, Reason::ApprovalRequired, "not asked").await;
    world.refund("", NEEDS).await;
    check(&world, ARGUMENTS, Reason::ApprovalRequired, "waits").await;
    world.approved(REFUND).await;
    check(&world, r#"{"amount":101}"#, Reason::ApprovalRequired, "not asked").await;
    // The preparing call uses one approval, and the prepared call uses the other.
    world.refund("", PERMIT).await;
    let permitted = settled(&world, vec![need(REFUND), need(REFUND)], ARGUMENTS, "r").await;
    assert_eq!((permitted.decision.effect, permitted.decision.prepared_needs.len()), (Effect::Permit, 0));
    let digest = world.rows().await[0].call.digest.clone();
    assert_eq!(permitted.approval_digest, Some(digest.clone()), "the record names what was used");
    check(&world, ARGUMENTS, Reason::ApprovalUsed, "used for another call").await;

    let world = self::world();
    let digest = world.approved(REFUND).await;
    world.write(StoreWrite::Refuse { digest, operator: "otto".into(), groups: vec!["leads".into()] }).await;
    check(&world, ARGUMENTS, Reason::ApprovalRefused, "refused").await;

    let world = self::world();
    world.approved(REFUND).await;
    // Both approvals must exist, or none is used.
    let judgement = settled(&world, vec![need(REFUND), need("pay/burn")], ARGUMENTS, "").await;
    assert_eq!((judgement.decision.effect, judgement.decision.reason), denied(Reason::ApprovalRequired));
    assert!(judgement.message.unwrap().contains("`pay/burn`"));
    assert!(world.rows().await[0].used_prepared.is_none());
    world.clock.advance_ms(300_000);
    check(&world, ARGUMENTS, Reason::ApprovalExpired, "too long ago").await;
}

#[test]
fn a_later_decision_may_ask_for_nothing_more() {
    let need =
        |by: &str| ApprovalNeed { layer: DecisionLayer::Agent, hop: Some(0), approver_groups: vec![by.into()], expires_in_ms: 1 };
    let covers = |approvals: Vec<ApprovalNeed>, prepared: Vec<&str>| {
        let prepared =
            prepared.into_iter().map(|tool| PreparationNeed { layer: DecisionLayer::Agent, hop: None, tool: tool.into() });
        let again = Decision { approvals, prepared_needs: prepared.collect(), ..Decision::permit(1) };
        super::super::approval::covers_needs(&[need("a"), need("b")], &[], &again)
    };
    assert!(covers(vec![], vec![]) && covers(vec![need("b")], vec![]) && covers(vec![need("b"), need("a")], vec![]));
    assert!(!covers(vec![need("c")], vec![]) && !covers(vec![need("a"), need("c")], vec![]) && !covers(vec![], vec!["t/x"]));
}

fn revoke_session(world: &ServiceFixture) {
    revoke(&world.builder);
}

fn revoke(builder: &Mutex<SnapshotBuilder>) {
    let change = [RowChange::Revocation(session_killed())];
    drop(builder.lock().unwrap().apply_changes(2, StateDigest::default(), change.iter()).unwrap());
}
