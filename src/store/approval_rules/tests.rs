//! The rules for one approval row by themselves. `testing::store` tests how a store applies them.

use super::*;
use crate::model::reason::DecisionLayer;

const MINUTE_MS: i64 = 60_000;

fn need(hop: usize, by: &[&str], minutes: u64) -> ApprovalNeed {
    let by = by.iter().map(|group| (*group).into()).collect();
    ApprovalNeed { layer: DecisionLayer::Agent, hop: Some(hop), approver_groups: by, expires_in_ms: minutes * MINUTE_MS as u64 }
}

fn request(needs: &[ApprovalNeed]) -> ApprovalSubmission {
    let call = ApprovalCall {
        digest: "d".repeat(64),
        issuer: "i".into(),
        subject: "s".into(),
        application: "p".into(),
        agents: vec!["spiffe://a/b".into()],
        session: "s".into(),
        task: "t".into(),
        tool: "pay/refund".into(),
        arguments_json: "{}".into(),
    };
    ApprovalSubmission { call, needs: needs.to_vec(), proof: None, approvers: ApproverCheck::default() }
}

fn asked(current: Option<ApprovalRow>, needs: &[ApprovalNeed], unix_ms: i64) -> (ApprovalRow, bool) {
    match ask_approval(current, &request(needs), unix_ms) {
        AskTransition::Unchanged(row) => (row, false),
        AskTransition::Put { row, is_new } => (row, is_new),
    }
}

fn groups(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn yes(row: &ApprovalRow, operator: &str, names: &[&str], unix_ms: i64) -> Result<ApprovalRow, Error> {
    approve_row(Some(row.clone()), &row.call.digest, (operator, "k"), &groups(names), unix_ms)
}

fn no(row: &ApprovalRow, operator: &str, names: &[&str], unix_ms: i64) -> Result<ApprovalRow, Error> {
    refuse_row(Some(row.clone()), &row.call.digest, operator, &groups(names), unix_ms)
}

#[test]
fn one_act_approves_every_layer_of_its_groups() {
    let needs = [need(0, &["leads", "bosses"], 10), need(1, &["payers"], 10), need(2, &["leads"], 10)];
    let (row, _) = asked(None, &needs, 0);
    let check = |row: &ApprovalRow, expected: [Option<&str>; 3]| {
        assert_eq!(row.layers.iter().map(|layer| layer.approved_by.as_deref()).collect::<Vec<_>>(), expected);
    };
    let first = yes(&row, "olga", &["leads"], 1).unwrap();
    check(&first, [Some("olga"), None, Some("olga")]);
    assert!(!first.is_approved() && is_waiting(&first));
    let refused = yes(&first, "otto", &["bosses", "leads"], 2).unwrap_err().to_string();
    assert!(refused.contains("`otto`") && refused.contains("payers"), "{refused}");
    let both = yes(&first, "pia", &["payers", "leads"], 2).unwrap();
    check(&both, [Some("olga"), Some("pia"), Some("olga")]);
    assert!(both.is_approved() && !is_waiting(&both));
    let again = yes(&both, "olga", &["leads"], 3).unwrap_err().to_string();
    assert!(again.contains("approved already") && again.contains("`olga`, `pia`"), "{again}");
    check(&yes(&row, "eva", &["payers", "bosses", "leads"], 1).unwrap(), [Some("eva"); 3]);
}

#[test]
fn only_what_is_open_can_be_answered() {
    let (row, _) = asked(None, &[need(0, &["leads"], 10)], 0);
    let check = |row: Option<ApprovalRow>, unix_ms: i64, says: &str| {
        let (digest, leads) = ("d".repeat(64), groups(&["leads"]));
        for answer in [
            approve_row(row.clone(), &digest, ("olga", "k"), &leads, unix_ms),
            refuse_row(row.clone(), &digest, "olga", &leads, unix_ms),
        ] {
            let refused = answer.unwrap_err().to_string();
            assert!(refused.contains(says) && refused.contains("`dddddddddddd`"), "{refused}");
        }
    };
    check(None, 0, "never asked");
    check(Some(row.clone()), 10 * MINUTE_MS, "expired");
    check(Some(no(&row, "otto", &["leads"], 1).unwrap()), 2, "refused by `otto`");
    let mut used = yes(&row, "olga", &["leads"], 1).unwrap();
    used.used = Some(ApprovalUse { decision_id: "x".into(), unix_ms: 2, fingerprint: None, given_again: false });
    check(Some(used), 3, "used already");
    assert!(no(&row, "eve", &["others"], 1).unwrap_err().to_string().contains("may answer"));
    assert!(no(&yes(&row, "olga", &["leads"], 1).unwrap(), "otto", &["leads"], 2).is_ok(), "until it is used");
}

#[test]
fn what_is_asked_otherwise_was_not_approved() {
    let (row, is_new) = asked(None, &[need(0, &["leads"], 10)], 0);
    assert!(is_new);
    let approved = yes(&row, "olga", &["leads"], 1).unwrap();
    let check = |needs: &[ApprovalNeed], still_approved: bool, expires_at_unix_ms: i64| {
        let (after, _) = asked(Some(approved.clone()), needs, MINUTE_MS);
        assert_eq!((after.is_approved(), after.expires_at_unix_ms()), (still_approved, expires_at_unix_ms), "{needs:?}");
        assert_eq!(holds(&after, needs), still_approved);
    };
    check(&[need(0, &["leads"], 10)], true, 10 * MINUTE_MS);
    check(&[need(0, &["bosses"], 10)], false, 11 * MINUTE_MS);
    check(&[need(0, &["leads", "bosses"], 10)], false, 11 * MINUTE_MS);
    check(&[need(0, &["leads"], 5)], false, 6 * MINUTE_MS);
    check(&[need(0, &["leads"], 10), need(1, &["leads"], 30)], false, 10 * MINUTE_MS);
    assert!(!holds(&approved, &[]), "what nobody asks for is not met");
}

fn head(number: u64) -> Revision {
    Revision { history: crate::model::revision::HistoryId::new("h"), number }
}

/// The decision that used approvals can give them back, until the decision was given again.
#[test]
fn a_use_is_given_back_once_and_never_after_its_answer_was_given_again() {
    let needs = [need(0, &["leads"], 10)];
    let (row, _) = asked(None, &needs, 0);
    let row = yes(&row, "olga", &["leads"], 1).unwrap();
    let mut rows: BTreeMap<String, ApprovalRow> = [(row.call.digest.clone(), row.clone())].into();
    let own = crate::model::approval::OwnApprovalUse { digest: row.call.digest.clone(), needs: needs.to_vec() };
    let first = ApprovalUseRequest {
        own: Some(own),
        decision_id: "x".into(),
        fingerprint: Some("f".into()),
        expected_revision: Some(head(3)),
        ..ApprovalUseRequest::default()
    };
    let at = |number: u64, proof_is_new: bool| (head(number), proof_is_new);
    let uses =
        |request: &ApprovalUseRequest, (head, proof_is_new): (Revision, bool), rows: &mut BTreeMap<String, ApprovalRow>| {
            use_approvals(rows, request, UseContext { head: &head, proof_is_new, unix_ms: 2 })
        };
    // A caller who has not seen the newest commit uses nothing, and neither does a caller who shows a proof again.
    for number in [2, 4] {
        assert_eq!(uses(&first, at(number, true), &mut rows), ApprovalUseOutcome::RevisionMismatch { head: head(number) });
    }
    assert_eq!(uses(&first, at(3, false), &mut rows), ApprovalUseOutcome::Replayed);
    let look = ApprovalUseRequest { lookup_only: true, expected_revision: None, ..first.clone() };
    assert_eq!(uses(&look, at(9, true), &mut rows), ApprovalUseOutcome::Replayed);
    assert_eq!(rows[&row.call.digest], row, "nothing was used");

    assert_eq!(uses(&first, at(3, true), &mut rows), ApprovalUseOutcome::Used);
    let other = ApprovalUseRequest { decision_id: "y".into(), ..first.clone() };
    assert!(!give_back_approvals(&mut rows, &other), "another decision's use");
    assert!(give_back_approvals(&mut rows, &first) && !give_back_approvals(&mut rows, &first));
    assert_eq!(rows[&row.call.digest], row);

    assert_eq!(uses(&first, at(3, true), &mut rows), ApprovalUseOutcome::Used);
    assert_eq!(uses(&look, at(9, true), &mut rows), ApprovalUseOutcome::Repeated { decision_id: "x".into() });
    assert!(!give_back_approvals(&mut rows, &first), "somebody may have been permitted by it");
}

#[test]
fn a_use_needs_its_approval_as_it_is_asked_now() {
    let needs = [need(0, &["leads"], 10)];
    let (row, _) = asked(None, &needs, 0);
    let check = |row: Option<ApprovalRow>, needs: &[ApprovalNeed], unix_ms: i64, expected: Result<(), UnusableCause>| {
        let mut rows: BTreeMap<String, ApprovalRow> = row.into_iter().map(|row| (row.call.digest.clone(), row)).collect();
        let own = crate::model::approval::OwnApprovalUse { digest: "d".repeat(64), needs: needs.to_vec() };
        let request = ApprovalUseRequest { own: Some(own), decision_id: "x".into(), ..ApprovalUseRequest::default() };
        let before = rows.clone();
        let outcome = use_approvals(&mut rows, &request, UseContext { head: &head(1), proof_is_new: true, unix_ms });
        let expected_outcome = expected
            .map_or_else(|lack| ApprovalUseOutcome::Unusable { prepared: None, cause: lack }, |()| ApprovalUseOutcome::Used);
        assert_eq!(outcome, expected_outcome);
        assert_eq!(rows == before, expected.is_err());
    };
    let approved = yes(&row, "olga", &["leads"], 1).unwrap();
    check(None, &needs, 1, Err(UnusableCause::Missing));
    check(Some(row.clone()), &needs, 1, Err(UnusableCause::Waiting));
    check(Some(approved.clone()), &needs, 10 * MINUTE_MS - 1, Ok(()));
    check(Some(approved.clone()), &needs, 10 * MINUTE_MS, Err(UnusableCause::Expired));
    check(Some(approved.clone()), &[need(0, &["bosses"], 10)], 1, Err(UnusableCause::Waiting));
    check(Some(approved.clone()), &[need(0, &["leads"], 1)], 1, Err(UnusableCause::Waiting));
    check(Some(approved.clone()), &[], 1, Err(UnusableCause::Waiting));
    check(Some(no(&approved, "otto", &["leads"], 2).unwrap()), &needs, 3, Err(UnusableCause::Refused));
}

#[test]
fn the_same_request_is_known_by_all_of_its_uses() {
    let needs = [need(0, &["leads"], 10)];
    let made = |decision_id: &str, fingerprint: &str| {
        let fingerprint = Some(fingerprint.to_owned());
        Some(ApprovalUse { decision_id: decision_id.into(), unix_ms: 1_000, fingerprint, given_again: false })
    };
    let row = |digest: char, used: Option<ApprovalUse>, used_prepared: Option<ApprovalUse>| {
        let (row, _) = asked(None, &needs, 0);
        let mut row = yes(&row, "olga", &["leads"], 1).unwrap();
        row.call.digest = digest.to_string().repeat(64);
        ApprovalRow { used, used_prepared, ..row }
    };
    let check = |own: Option<ApprovalUse>, prepared: Option<ApprovalUse>, fingerprint: &str, unix_ms: i64, expected: bool| {
        let rows: BTreeMap<_, _> =
            [row('a', own, None), row('b', None, prepared)].map(|row| (row.call.digest.clone(), row)).into();
        let own = crate::model::approval::OwnApprovalUse { digest: "a".repeat(64), needs: needs.to_vec() };
        let fingerprint = Some(fingerprint.to_owned()).filter(|text| !text.is_empty());
        let prepared = vec![PreparationApprovalUse { digest: "b".repeat(64), needs: vec![] }];
        let decision_id = "y".to_owned();
        let request = ApprovalUseRequest { own: Some(own), prepared, decision_id, fingerprint, ..ApprovalUseRequest::default() };
        assert_eq!(repeated_decision(&rows, &request, unix_ms), expected.then(|| "x".to_owned()));
    };
    check(made("x", "f"), made("x", "f"), "f", 2_000, true);
    check(made("x", "f"), made("x", "f"), "f", 1_000 + APPROVAL_REPLAY_WINDOW_MS - 1, true);
    check(made("x", "f"), made("x", "f"), "f", 1_000 + APPROVAL_REPLAY_WINDOW_MS, false);
    check(made("x", "f"), made("x", "f"), "f", 999, false);
    check(made("x", "f"), made("x", "f"), "g", 2_000, false);
    check(made("x", "f"), made("x", "f"), "", 2_000, false);
    check(made("x", "f"), made("z", "f"), "f", 2_000, false);
    check(made("x", "f"), made("x", "g"), "f", 2_000, false);
    check(made("x", "f"), None, "f", 2_000, false);
    check(None, made("x", "f"), "f", 2_000, false);
}

/// Like [`meets_needs`], with every operator allowed to approve.
fn holds(row: &ApprovalRow, needs: &[ApprovalNeed]) -> bool {
    meets_needs(row, needs, &ApproverCheck::default())
}
