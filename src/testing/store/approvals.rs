//! The part of the suite for approvals: one row for each call and one use for each row, even in a race.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a suite fails by panicking")]

use std::future::Future;
use std::sync::Arc;

use super::operator_keys::revoke_key;
use super::{START_UNIX_S, act, kill, request, verify_change_log, write};
use crate::model::approval::{
    ApprovalCall, ApprovalFilter, ApprovalQuota, ApprovalRow, ApprovalState, ApprovalSubmission, ApprovalSubmissionOutcome,
    ApprovalUseOutcome, ApprovalUseRequest, ApproverCheck, OwnApprovalUse, PreparationApprovalUse, ProofUse, UnusableCause,
};
use crate::model::decision::ApprovalNeed;
use crate::model::limits::{
    APPROVAL_ARGUMENTS_BYTES_MAX, APPROVAL_REPLAY_WINDOW_MS, APPROVAL_RETENTION_MS, APPROVALS_WAITING_MAX,
};
use crate::model::reason::DecisionLayer;
use crate::model::revision::Revision;
use crate::model::rows::StoreWrite;
use crate::model::time::ManualClock;
use crate::store::{CommitRequest, Error, Store};

const START_UNIX_MS: i64 = START_UNIX_S * 1000;
/// The expiry of [`need`], from asking to use.
const EXPIRES_IN_MS: i64 = 600_000;

/// Runs every case on a new store.
pub(super) async fn conformance<F: Future<Output = (Arc<dyn Store>, Arc<ManualClock>)>>(new: &impl Fn() -> F) {
    let (store, clock) = new().await;
    asking_again_changes_nothing(&*store, &clock).await;
    an_answer_is_a_revision_without_changes(&*new().await.0).await;
    a_refused_answer_writes_nothing(&*new().await.0).await;
    every_layer_needs_its_approval(&*new().await.0).await;
    let (store, clock) = new().await;
    an_approval_is_used_once(&*store, &clock).await;
    let (store, clock) = new().await;
    what_expired_is_asked_anew(&*store, &clock).await;
    prepared_is_a_use_of_its_own(&*new().await.0).await;
    all_is_used_or_nothing(&*new().await.0).await;
    let (store, clock) = new().await;
    an_agent_has_a_quota(&*store, &clock).await;
    let (store, clock) = new().await;
    lists_are_in_the_order_of_asking(&*store, &clock).await;
    let (store, clock) = new().await;
    rows_are_forgotten(&*store, &clock).await;
    what_has_no_bound_is_refused(&*new().await.0).await;
    nobody_uses_up_the_queue_of_others(&*new().await.0).await;
    only_who_may_still_approve_counts(&*new().await.0).await;
    a_proof_is_spent_with_what_it_uses(&*new().await.0).await;
    what_was_used_is_given_back(&*new().await.0).await;
    one_racer_uses_it(new().await.0).await;
    one_racer_asks_first(new().await.0).await;
    an_answer_races_a_use(new).await;
    an_approval_dies_with_its_key(&*new().await.0).await;
}

async fn asking_again_changes_nothing(store: &dyn Store, clock: &ManualClock) {
    let first = asked(store, "1").await;
    assert_eq!((first.asked_at_unix_ms, first.expires_at_unix_ms()), (START_UNIX_MS, START_UNIX_MS + EXPIRES_IN_MS));
    assert_eq!((first.call.clone(), first.layers.len()), (call("1"), 1));
    clock.advance_ms(5_000);
    assert_eq!(asked(store, "1").await, first, "asking again prolongs nothing");
    assert_eq!(store.revision().await.unwrap().number, 0, "asking is no revision");
    let other = asked(store, "2").await;
    assert_eq!(other.asked_at_unix_ms, START_UNIX_MS + 5_000);
    // Another layer asks too. Its time begins now; the time of the first layer does not begin again.
    let both = ApprovalSubmission {
        call: call("1"),
        needs: vec![need(DecisionLayer::User, None, "g"), own_need()],
        proof: None,
        approvers: ApproverCheck::default(),
    };
    let ApprovalSubmissionOutcome::Stored(row) = store.ask_approval(both).await.unwrap() else { panic!() };
    assert_eq!((row.layers.len(), row.expires_at_unix_ms()), (2, first.expires_at_unix_ms()));
    assert_eq!(row.layers[0], first.layers[0]);
    assert_eq!(row.layers[1].expires_at_unix_ms, START_UNIX_MS + 5_000 + EXPIRES_IN_MS);
    verify_change_log(store).await;
}

async fn an_answer_is_a_revision_without_changes(store: &dyn Store) {
    write(store, vec![kill("t")]).await.unwrap();
    asked(store, "1").await;
    asked(store, "2").await;
    let before = verify_change_log(store).await;
    for (write, digest, expected) in [
        (approve("1", "olga", "leads"), "1", ApprovalState::Approved),
        (refuse("2", "olga", "leads"), "2", ApprovalState::Refused),
    ] {
        let signed = CommitRequest { act: Some(act(&[digest], 60)), ..request(vec![write]) };
        let number = store.revision().await.unwrap().number + 1;
        let done = store.commit(signed.clone()).await.unwrap();
        assert_eq!((done.revision.number, done.changes), (number, vec![]));
        assert_eq!(store.changes(number - 1).await.unwrap().commits[0].changes, []);
        assert_eq!(row(store, digest).await.state(START_UNIX_MS), expected);
        assert_eq!(store.commit(signed).await, Err(Error::ActReplayed { jti: digest.into() }));
    }
    let after = verify_change_log(store).await;
    assert_eq!((after.digest, after.revocations), (before.digest, before.revocations), "no snapshot holds an approval");
    assert_eq!(row(store, "1").await.layers[0].approved_by.as_deref(), Some("olga"));
    assert_eq!(row(store, "2").await.refused_by.as_deref(), Some("olga"));
    assert_eq!(store.policy_history(10).await.unwrap(), []);
}

async fn a_refused_answer_writes_nothing(store: &dyn Store) {
    asked(store, "1").await;
    asked(store, "2").await;
    let before = (verify_change_log(store).await, row(store, "1").await, row(store, "2").await);
    for bad in [approve("3", "olga", "leads"), approve("2", "olga", "others"), refuse("2", "olga", "others"), kill("")] {
        let writes = vec![approve("1", "olga", "leads"), bad.clone()];
        let refused = store.commit(CommitRequest { act: Some(act(&["j"], 60)), ..request(writes) }).await;
        assert!(matches!(refused, Err(Error::Rejected(_))), "{bad:?}: {refused:?}");
        assert_eq!((verify_change_log(store).await, row(store, "1").await, row(store, "2").await), before);
    }
    let good = CommitRequest { act: Some(act(&["j"], 60)), ..request(vec![approve("1", "olga", "leads")]) };
    store.commit(good).await.unwrap();
    for again in [approve("1", "olga", "leads"), approve("1", "otto", "leads")] {
        let refused = write(store, vec![again]).await;
        assert!(matches!(refused, Err(Error::Rejected(_))), "{refused:?}");
    }
    write(store, vec![refuse("1", "otto", "leads")]).await.unwrap();
    assert_eq!(
        use_own(store, "1", "d", None).await,
        lacking(UnusableCause::Refused),
        "what was approved can be refused until it is used"
    );
}

async fn every_layer_needs_its_approval(store: &dyn Store) {
    let needs = vec![need(DecisionLayer::User, None, "payers"), own_need()];
    store
        .ask_approval(ApprovalSubmission {
            call: call("1"),
            needs: needs.clone(),
            proof: None,
            approvers: ApproverCheck::default(),
        })
        .await
        .unwrap();
    let use_it = async || store.use_approvals(uses("1", needs.clone(), "d", None)).await.unwrap();
    assert_eq!(use_it().await, lacking(UnusableCause::Waiting));
    write(store, vec![approve("1", "olga", "leads")]).await.unwrap();
    assert_eq!(row(store, "1").await.state(START_UNIX_MS), ApprovalState::Waiting);
    assert_eq!(use_it().await, lacking(UnusableCause::Waiting));
    write(store, vec![approve("1", "pia", "payers")]).await.unwrap();
    // A layer that asks now but did not ask then has no approval.
    let check = async |need: ApprovalNeed| {
        let outcome = store.use_approvals(uses("1", vec![need], "d", None)).await.unwrap();
        assert_eq!(outcome, lacking(UnusableCause::Waiting));
    };
    check(need(DecisionLayer::Application, None, "leads")).await;
    check(need(DecisionLayer::Agent, Some(1), "leads")).await;
    check(need(DecisionLayer::Agent, Some(0), "bosses")).await;
    check(ApprovalNeed { expires_in_ms: 1_000, ..own_need() }).await;
    assert_eq!(use_it().await, ApprovalUseOutcome::Used);
    assert_eq!(use_it().await, lacking(UnusableCause::Used));
}

async fn an_approval_is_used_once(store: &dyn Store, clock: &ManualClock) {
    assert_eq!(use_own(store, "1", "d1", None).await, lacking(UnusableCause::Missing));
    asked(store, "1").await;
    assert_eq!(use_own(store, "1", "d1", None).await, lacking(UnusableCause::Waiting));
    write(store, vec![approve("1", "olga", "leads")]).await.unwrap();
    assert_eq!(use_own(store, "1", "d1", Some("f")).await, ApprovalUseOutcome::Used);
    assert_eq!(row(store, "1").await.state(START_UNIX_MS), ApprovalState::Used);
    // The same request gets its answer again for a while; no other request does.
    let again = ApprovalUseOutcome::Repeated { decision_id: "d1".into() };
    assert_eq!(use_own(store, "1", "d2", Some("f")).await, again);
    for other in [None, Some("g")] {
        assert_eq!(use_own(store, "1", "d3", other).await, lacking(UnusableCause::Used));
    }
    clock.advance_ms(APPROVAL_REPLAY_WINDOW_MS - 1);
    assert_eq!(use_own(store, "1", "d2", Some("f")).await, again);
    clock.advance_ms(1);
    assert_eq!(use_own(store, "1", "d2", Some("f")).await, lacking(UnusableCause::Used));
    // Neither asking again nor an operator revives it before its time is over.
    assert!(asked(store, "1").await.used.is_some());
    for late in [approve("1", "olga", "leads"), refuse("1", "olga", "leads")] {
        let refused = write(store, vec![late]).await;
        assert!(matches!(refused, Err(Error::Rejected(_))), "{refused:?}");
    }
    clock.advance_ms(EXPIRES_IN_MS - APPROVAL_REPLAY_WINDOW_MS - 1);
    assert_eq!(use_own(store, "1", "d2", None).await, lacking(UnusableCause::Used));
    clock.advance_ms(1);
    assert_eq!(use_own(store, "1", "d2", None).await, lacking(UnusableCause::Expired));
    let anew = asked(store, "1").await;
    assert_eq!((anew.state(START_UNIX_MS), anew.asked_at_unix_ms), (ApprovalState::Waiting, START_UNIX_MS + EXPIRES_IN_MS));
    assert_eq!(use_own(store, "1", "d2", Some("f")).await, lacking(UnusableCause::Waiting));
}

async fn what_expired_is_asked_anew(store: &dyn Store, clock: &ManualClock) {
    asked(store, "1").await;
    asked(store, "2").await;
    clock.advance_ms(EXPIRES_IN_MS - 1);
    write(store, vec![approve("1", "olga", "leads")]).await.unwrap();
    clock.advance_ms(1);
    assert_eq!(use_own(store, "1", "d", None).await, lacking(UnusableCause::Expired), "the time runs from asking to use");
    for late in [approve("2", "olga", "leads"), refuse("2", "olga", "leads")] {
        let refused = write(store, vec![late]).await;
        assert!(matches!(refused, Err(Error::Rejected(_))), "{refused:?}");
    }
    for digest in ["1", "2"] {
        let anew = asked(store, digest).await;
        assert_eq!((anew.asked_at_unix_ms, anew.is_approved()), (START_UNIX_MS + EXPIRES_IN_MS, false));
        assert_eq!(use_own(store, digest, "d", None).await, lacking(UnusableCause::Waiting));
    }
}

async fn prepared_is_a_use_of_its_own(store: &dyn Store) {
    let use_prepared = async |fingerprint: Option<&str>| {
        let (prepared, fingerprint) = (vec![prepared("1")], fingerprint.map(str::to_owned));
        let request = ApprovalUseRequest { prepared, decision_id: "e".into(), fingerprint, ..ApprovalUseRequest::default() };
        store.use_approvals(request).await.unwrap()
    };
    let lacking = |lack| ApprovalUseOutcome::Unusable { prepared: Some(0), cause: lack };
    assert_eq!(use_prepared(None).await, lacking(UnusableCause::Missing));
    asked(store, "1").await;
    assert_eq!(use_prepared(None).await, lacking(UnusableCause::Waiting));
    write(store, vec![approve("1", "olga", "leads")]).await.unwrap();
    assert_eq!(use_own(store, "1", "d", None).await, ApprovalUseOutcome::Used);
    assert_eq!(use_prepared(Some("f")).await, ApprovalUseOutcome::Used, "the call itself is the other use");
    assert_eq!(use_prepared(Some("f")).await, ApprovalUseOutcome::Repeated { decision_id: "e".into() });
    assert_eq!(use_prepared(None).await, lacking(UnusableCause::Used));
    asked(store, "2").await;
    write(store, vec![refuse("2", "olga", "leads")]).await.unwrap();
    let request = ApprovalUseRequest { prepared: vec![prepared("2")], decision_id: "e".into(), ..ApprovalUseRequest::default() };
    assert_eq!(store.use_approvals(request).await.unwrap(), lacking(UnusableCause::Refused));
}

async fn all_is_used_or_nothing(store: &dyn Store) {
    for name in ["1", "2", "3"] {
        asked(store, name).await;
    }
    write(store, vec![approve("1", "olga", "leads"), approve("2", "olga", "leads")]).await.unwrap();
    let use_all = async |prepared: &[&str]| {
        let prepared = prepared.iter().map(|name| self::prepared(name)).collect();
        store.use_approvals(ApprovalUseRequest { prepared, ..uses("1", vec![own_need()], "d", None) }).await.unwrap()
    };
    assert_eq!(use_all(&["2", "3"]).await, ApprovalUseOutcome::Unusable { prepared: Some(1), cause: UnusableCause::Waiting });
    assert!(row(store, "1").await.used.is_none() && row(store, "2").await.used_prepared.is_none());
    // One approval can serve both purposes; then both of its uses are recorded.
    assert_eq!(use_all(&["2", "1", "2"]).await, ApprovalUseOutcome::Used);
    let first = row(store, "1").await;
    assert!(first.used.is_some() && first.used_prepared.is_some() && row(store, "2").await.used_prepared.is_some());
    assert_eq!(use_all(&[]).await, lacking(UnusableCause::Used));
}

async fn an_agent_has_a_quota(store: &dyn Store, clock: &ManualClock) {
    for number in 0..APPROVALS_WAITING_MAX {
        asked(store, &format!("{number}")).await;
    }
    let over =
        ApprovalSubmission { call: call("over"), needs: vec![own_need()], proof: None, approvers: ApproverCheck::default() };
    assert_eq!(store.ask_approval(over.clone()).await, Ok(ApprovalSubmissionOutcome::OverQuota(ApprovalQuota::UserAndAgent)));
    assert_eq!(store.approvals(ApprovalFilter::Waiting, 1).await.unwrap().total, APPROVALS_WAITING_MAX, "nothing was stored");
    asked(store, "7").await;
    let mut other = over.clone();
    (other.call.agents, other.call.digest) = (vec!["spiffe://t/leaf".into(), "spiffe://t/other".into()], digest("other"));
    assert!(matches!(store.ask_approval(other).await, Ok(ApprovalSubmissionOutcome::Stored(_))), "each leaf agent has its own");
    write(store, vec![approve("7", "olga", "leads")]).await.unwrap();
    assert!(
        matches!(store.ask_approval(over.clone()).await, Ok(ApprovalSubmissionOutcome::Stored(_))),
        "what is approved waits no longer"
    );
    let mut more = over;
    more.call.digest = digest("more");
    assert_eq!(store.ask_approval(more.clone()).await, Ok(ApprovalSubmissionOutcome::OverQuota(ApprovalQuota::UserAndAgent)));
    clock.advance_ms(EXPIRES_IN_MS);
    assert!(matches!(store.ask_approval(more).await, Ok(ApprovalSubmissionOutcome::Stored(_))), "nor does what expired");
}

async fn lists_are_in_the_order_of_asking(store: &dyn Store, clock: &ManualClock) {
    for name in ["b", "a", "c", "d"] {
        asked(store, name).await;
        clock.advance_ms(1_000);
    }
    write(store, vec![approve("a", "olga", "leads"), refuse("d", "olga", "leads")]).await.unwrap();
    let check = async |filter: ApprovalFilter, limit: usize, expected: &[&str], total: u64| {
        let list = store.approvals(filter, limit).await.unwrap();
        let digests: Vec<String> = list.rows.into_iter().map(|row| row.call.digest).collect();
        assert_eq!((digests, list.total), (expected.iter().map(|name| digest(name)).collect(), total));
    };
    check(ApprovalFilter::Waiting, 10, &["b", "c"], 2).await;
    check(ApprovalFilter::Waiting, 1, &["b"], 2).await;
    check(ApprovalFilter::All, usize::MAX, &["b", "a", "c", "d"], 4).await;
    check(ApprovalFilter::Digest(digest("a")), 1, &["a"], 1).await;
    check(ApprovalFilter::Digest(digest("e")), 1, &[], 0).await;
    assert_eq!(store.approvals(ApprovalFilter::All, 1).await.unwrap().read_at_unix_ms, START_UNIX_MS + 4_000);
    clock.advance_ms(EXPIRES_IN_MS - 4_000);
    check(ApprovalFilter::Waiting, 10, &["c"], 1).await;
}

async fn rows_are_forgotten(store: &dyn Store, clock: &ManualClock) {
    for number in 0..80 {
        asked(store, &format!("{number}")).await;
    }
    write(store, vec![approve("0", "olga", "leads"), refuse("1", "olga", "leads")]).await.unwrap();
    assert_eq!(use_own(store, "0", "d", None).await, ApprovalUseOutcome::Used);
    clock.advance_ms(EXPIRES_IN_MS);
    for name in ["x", "y", "z"] {
        asked(store, name).await;
    }
    let left = store.approvals(ApprovalFilter::All, 100).await.unwrap();
    let touched = [digest("0"), digest("1")];
    assert!(touched.iter().all(|digest| left.rows.iter().any(|row| row.call.digest == *digest)), "kept a while longer");
    assert_eq!(left.total, 5, "every asking forgets more than it adds");
    clock.advance_ms(APPROVAL_RETENTION_MS);
    asked(store, "last").await;
    assert_eq!(store.approvals(ApprovalFilter::All, 100).await.unwrap().total, 1);
}

async fn what_has_no_bound_is_refused(store: &dyn Store) {
    let check = async |change: fn(&mut ApprovalSubmission), good: bool| {
        let mut request =
            ApprovalSubmission { call: call("1"), needs: vec![own_need()], proof: None, approvers: ApproverCheck::default() };
        change(&mut request);
        let outcome = store.ask_approval(request).await;
        assert_eq!(outcome.is_ok(), good, "{outcome:?}");
        assert!(good || matches!(outcome, Err(Error::Rejected(_))));
    };
    check(|_| {}, true).await;
    check(|ask| ask.call.arguments_json = "x".repeat(APPROVAL_ARGUMENTS_BYTES_MAX), true).await;
    check(|ask| ask.call.arguments_json = "x".repeat(APPROVAL_ARGUMENTS_BYTES_MAX + 1), false).await;
    check(|ask| ask.call.digest = "short".into(), false).await;
    check(|ask| ask.call.digest = digest("1").to_uppercase(), false).await;
    check(|ask| ask.call.agents.clear(), false).await;
    check(|ask| ask.needs.clear(), false).await;
    check(|ask| ask.needs = vec![own_need(); 33], false).await;
    check(|ask| ask.call.subject = "x".repeat(9_000), false).await;
    let nothing = ApprovalUseRequest { decision_id: "d".into(), ..ApprovalUseRequest::default() };
    for bad in [
        nothing.clone(),
        ApprovalUseRequest {
            prepared: vec![PreparationApprovalUse { digest: "short".into(), needs: vec![] }],
            ..nothing.clone()
        },
    ] {
        let outcome = store.use_approvals(bad).await;
        assert!(matches!(outcome, Err(Error::Rejected(_))), "{outcome:?}");
    }
    let many = ApprovalUseRequest { prepared: vec![prepared("1"); 33], ..nothing };
    assert!(matches!(store.use_approvals(many).await, Err(Error::Rejected(_))));
    let long = write(store, vec![approve("1", &"x".repeat(9_000), "leads")]).await;
    assert!(matches!(long, Err(Error::Rejected(_))), "{long:?}");
}

/// A user, an agent, and a pair of both each have a share of the queue, and the queue has an end.
async fn nobody_uses_up_the_queue_of_others(store: &dyn Store) {
    let ask = async |user: u64, agent: u64, number: u64| {
        let name = format!("{user}.{agent}.{number}");
        let mut call = call(&name);
        (call.subject, call.agents) = (format!("user-{user}"), vec!["spiffe://t/root".into(), format!("spiffe://t/{agent}")]);
        let request = ApprovalSubmission { call, needs: vec![own_need()], proof: None, approvers: ApproverCheck::default() };
        match store.ask_approval(request).await.unwrap() {
            ApprovalSubmissionOutcome::Stored(_) => None,
            ApprovalSubmissionOutcome::OverQuota(share) => Some(share),
            ApprovalSubmissionOutcome::Replayed => panic!("there is no proof"),
        }
    };
    let fill = async |user: u64, agent: u64| {
        for number in 0..APPROVALS_WAITING_MAX {
            assert_eq!(ask(user, agent, number).await, None);
        }
    };
    fill(0, 0).await;
    assert_eq!(ask(0, 0, 100).await, Some(ApprovalQuota::UserAndAgent));
    // The user with another agent, and the agent for another user, can still ask.
    assert_eq!((ask(0, 1, 0).await, ask(1, 0, 0).await), (None, None));
    for agent in 2..=10 {
        if agent < 10 {
            fill(0, agent).await;
        }
    }
    // The queue holds 100 of the first agent, 1 of the second and 800 of eight more, so 99 are left to the user.
    for number in 0..99 {
        assert_eq!(ask(0, 10, number).await, None);
    }
    assert_eq!(ask(0, 11, 0).await, Some(ApprovalQuota::User));
    assert_eq!(ask(2, 11, 0).await, None, "another user is not held up");
}

/// An approval by an operator who may no longer approve does not count, and another operator can approve.
async fn only_who_may_still_approve_counts(store: &dyn Store) {
    let without = |gone: &'static str| ApproverCheck::new(move |_, layer| layer.approved_by.as_deref() != Some(gone));
    asked(store, "1").await;
    write(store, vec![approve("1", "olga", "leads")]).await.unwrap();
    let use_it = async |approvers: ApproverCheck, only_again: bool| {
        let request = ApprovalUseRequest { approvers, lookup_only: only_again, ..uses("1", vec![own_need()], "d", Some("f")) };
        store.use_approvals(request).await.unwrap()
    };
    assert_eq!(use_it(without("olga"), false).await, lacking(UnusableCause::Waiting));
    let prepared = ApprovalUseRequest {
        prepared: vec![prepared("1")],
        decision_id: "e".into(),
        approvers: without("olga"),
        ..ApprovalUseRequest::default()
    };
    let outcome = store.use_approvals(prepared).await.unwrap();
    assert_eq!(outcome, ApprovalUseOutcome::Unusable { prepared: Some(0), cause: UnusableCause::Waiting });
    let again = ApprovalSubmission { call: call("1"), needs: vec![own_need()], proof: None, approvers: without("olga") };
    let ApprovalSubmissionOutcome::Stored(row) = store.ask_approval(again).await.unwrap() else { panic!("it stands") };
    assert_eq!(row.layers[0].approved_by, None, "it waits again");
    write(store, vec![approve("1", "otto", "leads")]).await.unwrap();
    assert_eq!(use_it(without("olga"), false).await, ApprovalUseOutcome::Used);
    assert_eq!(use_it(without("otto"), true).await, ApprovalUseOutcome::Replayed, "nor is its answer given again");
}

fn proof(byte: u8) -> Option<ProofUse> {
    Some(ProofUse { key: [byte; 32], expires_at_unix_s: START_UNIX_S + 60 })
}

/// The proof and the approval are used together or not at all.
async fn a_proof_is_spent_with_what_it_uses(store: &dyn Store) {
    let asks = async |name: &str, proof| {
        store
            .ask_approval(ApprovalSubmission {
                call: call(name),
                needs: vec![own_need()],
                proof,
                approvers: ApproverCheck::default(),
            })
            .await
            .unwrap()
    };
    let uses_it = async |name: &str, proof| {
        store.use_approvals(ApprovalUseRequest { proof, ..uses(name, vec![own_need()], "d", Some("f")) }).await.unwrap()
    };
    let is_spent = async |byte: u8| !store.spend_proof([byte; 32], START_UNIX_S + 60).await.unwrap();
    // A use that lacks something spends nothing; asking does.
    assert_eq!(uses_it("1", proof(1)).await, lacking(UnusableCause::Missing));
    assert!(matches!(asks("1", proof(1)).await, ApprovalSubmissionOutcome::Stored(_)));
    assert_eq!(asks("2", proof(1)).await, ApprovalSubmissionOutcome::Replayed);
    assert_eq!(store.approvals(ApprovalFilter::All, 10).await.unwrap().total, 1, "nothing was stored");
    write(store, vec![approve("1", "olga", "leads")]).await.unwrap();
    assert_eq!(uses_it("1", proof(1)).await, ApprovalUseOutcome::Replayed);
    assert!(row(store, "1").await.used.is_none());
    // A caller that has not seen the newest commit spends nothing either.
    let head = store.revision().await.unwrap();
    let behind = Revision { number: head.number - 1, ..head.clone() };
    let unseen =
        ApprovalUseRequest { proof: proof(2), expected_revision: Some(behind), ..uses("1", vec![own_need()], "d", Some("f")) };
    assert_eq!(store.use_approvals(unseen.clone()).await, Ok(ApprovalUseOutcome::RevisionMismatch { head: head.clone() }));
    let seen = ApprovalUseRequest { expected_revision: Some(head), ..unseen };
    assert_eq!(store.use_approvals(seen.clone()).await, Ok(ApprovalUseOutcome::Used));
    assert!(is_spent(2).await);
    // The same request gets its answer again, although its proof is spent.
    assert_eq!(store.use_approvals(seen).await, Ok(ApprovalUseOutcome::Repeated { decision_id: "d".into() }));
    let other = ApprovalUseRequest { proof: proof(3), ..uses("1", vec![own_need()], "e", None) };
    assert_eq!(store.use_approvals(other).await, Ok(lacking(UnusableCause::Used)));
    assert!(!is_spent(3).await);
}

async fn what_was_used_is_given_back(store: &dyn Store) {
    for name in ["1", "2"] {
        asked(store, name).await;
    }
    write(store, vec![approve("1", "olga", "leads"), approve("2", "olga", "leads")]).await.unwrap();
    let request = ApprovalUseRequest { prepared: vec![prepared("2")], ..uses("1", vec![own_need()], "d", Some("f")) };
    assert_eq!(store.give_back_approvals(request.clone()).await, Ok(false), "nothing was used");
    let before = (row(store, "1").await, row(store, "2").await);
    assert_eq!(store.use_approvals(request.clone()).await, Ok(ApprovalUseOutcome::Used));
    let other = ApprovalUseRequest { decision_id: "e".into(), ..request.clone() };
    assert_eq!(store.give_back_approvals(other.clone()).await, Ok(false), "not theirs");
    assert_eq!(store.give_back_approvals(request.clone()).await, Ok(true));
    assert_eq!((row(store, "1").await, row(store, "2").await), before);
    assert_eq!(store.use_approvals(other.clone()).await, Ok(ApprovalUseOutcome::Used), "it is used by another decision");
    assert_eq!(store.give_back_approvals(request).await, Ok(false));
    let again = ApprovalUseRequest { lookup_only: true, ..other.clone() };
    assert_eq!(store.use_approvals(again).await, Ok(ApprovalUseOutcome::Repeated { decision_id: "e".into() }));
    assert_eq!(store.give_back_approvals(other).await, Ok(false), "its decision was given again");
}

async fn one_racer_uses_it(store: Arc<dyn Store>) {
    for round in 0..20 {
        let name = format!("{round}");
        asked(&*store, &name).await;
        write(&*store, vec![approve(&name, "olga", "leads")]).await.unwrap();
        let racers: Vec<_> = (0..8)
            .map(|racer| {
                let (store, name) = (Arc::clone(&store), name.clone());
                tokio::spawn(async move { use_own(&*store, &name, &format!("d{racer}"), Some(&format!("f{racer}"))).await })
            })
            .collect();
        let mut won = 0;
        for racer in racers {
            match racer.await.unwrap() {
                ApprovalUseOutcome::Used => won += 1,
                outcome => assert_eq!(outcome, lacking(UnusableCause::Used)),
            }
        }
        assert_eq!(won, 1);
    }
}

async fn one_racer_asks_first(store: Arc<dyn Store>) {
    let racers: Vec<_> = (0..32)
        .map(|racer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { asked(&*store, &format!("{}", racer % 4)).await })
        })
        .collect();
    for racer in racers {
        racer.await.unwrap();
    }
    assert_eq!(store.approvals(ApprovalFilter::All, 100).await.unwrap().total, 4, "one row for each call");
}

/// An approval waits again once the approving key is revoked, for another operator or another key.
async fn an_approval_dies_with_its_key(store: &dyn Store) {
    asked(store, "1").await;
    write(store, vec![approve("1", "olga", "leads")]).await.unwrap();
    assert!(row(store, "1").await.is_approved());
    write(store, vec![revoke_key("key of olga")]).await.unwrap();
    assert!(!row(store, "1").await.is_approved(), "it is shown as it counts");
    assert_eq!(use_own(store, "1", "d", None).await, lacking(UnusableCause::Waiting));
    // Asking again puts the call back among those that wait.
    assert!(!asked(store, "1").await.is_approved());
    assert_eq!(store.approvals(ApprovalFilter::Waiting, 10).await.unwrap().total, 1);
    write(store, vec![approve("1", "otto", "leads")]).await.unwrap();
    assert_eq!(row(store, "1").await.layers[0].approved_by.as_deref(), Some("otto"));
    assert_eq!(use_own(store, "1", "d", Some("f")).await, ApprovalUseOutcome::Used);
    // A used approval stays used, and is not returned if the approving key was revoked since.
    assert_eq!(use_own(store, "1", "d", Some("f")).await, ApprovalUseOutcome::Repeated { decision_id: "d".into() });
    write(store, vec![revoke_key("key of otto")]).await.unwrap();
    assert_eq!(use_own(store, "1", "d", Some("f")).await, lacking(UnusableCause::Used));
}

/// An acknowledged refusal is never followed by a use, nor a use by a refusal.
async fn an_answer_races_a_use<F: Future<Output = (Arc<dyn Store>, Arc<ManualClock>)>>(new: &impl Fn() -> F) {
    let (store, _) = new().await;
    for round in 0..20 {
        let name = format!("{round}");
        asked(&*store, &name).await;
        write(&*store, vec![approve(&name, "olga", "leads")]).await.unwrap();
        let (no, used) = tokio::join!(write(&*store, vec![refuse(&name, "otto", "leads")]), use_own(&*store, &name, "d", None));
        match used {
            ApprovalUseOutcome::Used => assert!(matches!(no, Err(Error::Rejected(_))), "{no:?}"),
            outcome => assert_eq!((outcome, no.is_ok()), (lacking(UnusableCause::Refused), true)),
        }
    }
}

async fn asked(store: &dyn Store, name: &str) -> ApprovalRow {
    match store
        .ask_approval(ApprovalSubmission {
            call: call(name),
            needs: vec![own_need()],
            proof: None,
            approvers: ApproverCheck::default(),
        })
        .await
        .unwrap()
    {
        ApprovalSubmissionOutcome::Stored(row) => *row,
        outcome => panic!("{outcome:?}"),
    }
}

async fn row(store: &dyn Store, name: &str) -> ApprovalRow {
    store.approvals(ApprovalFilter::Digest(digest(name)), 1).await.unwrap().rows.pop().unwrap()
}

async fn use_own(store: &dyn Store, name: &str, decision_id: &str, fingerprint: Option<&str>) -> ApprovalUseOutcome {
    store.use_approvals(uses(name, vec![own_need()], decision_id, fingerprint)).await.unwrap()
}

fn uses(name: &str, needs: Vec<ApprovalNeed>, decision_id: &str, fingerprint: Option<&str>) -> ApprovalUseRequest {
    ApprovalUseRequest {
        own: Some(OwnApprovalUse { digest: digest(name), needs }),
        decision_id: decision_id.into(),
        fingerprint: fingerprint.map(str::to_owned),
        ..ApprovalUseRequest::default()
    }
}

fn lacking(lack: UnusableCause) -> ApprovalUseOutcome {
    ApprovalUseOutcome::Unusable { prepared: None, cause: lack }
}

fn own_need() -> ApprovalNeed {
    need(DecisionLayer::Agent, Some(0), "leads")
}

fn need(layer: DecisionLayer, hop: Option<usize>, by: &str) -> ApprovalNeed {
    ApprovalNeed { layer, hop, approver_groups: vec![by.into()], expires_in_ms: EXPIRES_IN_MS as u64 }
}

fn approve(name: &str, operator: &str, group: &str) -> StoreWrite {
    let groups = vec!["x".into(), group.into()];
    StoreWrite::Approve { digest: digest(name), operator: operator.into(), key: format!("key of {operator}"), groups }
}

fn refuse(name: &str, operator: &str, group: &str) -> StoreWrite {
    StoreWrite::Refuse { digest: digest(name), operator: operator.into(), groups: vec![group.into()] }
}

fn call(name: &str) -> ApprovalCall {
    ApprovalCall {
        digest: digest(name),
        issuer: "https://i".into(),
        subject: "ana".into(),
        application: "p".into(),
        agents: vec!["spiffe://t/root".into(), "spiffe://t/leaf".into()],
        session: "s".into(),
        task: "t".into(),
        tool: "pay/refund".into(),
        arguments_json: format!("{{\"name\":\"{name}\"}}"),
    }
}

fn prepared(name: &str) -> PreparationApprovalUse {
    PreparationApprovalUse { digest: digest(name), needs: vec![] }
}

/// A digest for a name.
fn digest(name: &str) -> String {
    let hex: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex:a>64}")
}
