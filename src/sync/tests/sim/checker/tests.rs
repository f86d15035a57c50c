//! Every rule of the checker against a small history that breaks it, and against the same history without the break.

use super::*;
use crate::model::revision::HistoryId;

const SECOND_NS: i64 = 1_000_000_000;

fn revision(number: u64) -> Revision {
    Revision { history: HistoryId::new("first"), number }
}

fn commit(number: u64, parent: Option<usize>, at_s: i64, permitted: bool) -> Commit {
    Commit {
        parent,
        revisions: vec![revision(number)],
        created_ns: at_s * SECOND_NS,
        binds_ns: Some(at_s * SECOND_NS),
        lost_ns: None,
        permitted: vec![permitted],
    }
}

/// An answer that was sent and received in the same second, by a fresh replica.
fn answer(commit: usize, number: u64, effect: Effect, at_s: i64, valid_for_ms: u64) -> Answer {
    let sent_ns = at_s * SECOND_NS;
    Answer {
        replica: 0,
        incarnation: 1,
        pair: 0,
        destructive: false,
        at_least: None,
        effect,
        unavailable: false,
        revision: revision(number),
        commit: Some(commit),
        sent_ns,
        received_ns: sent_ns + SECOND_NS / 10,
        usable_until_ns: sent_ns + i64::try_from(valid_for_ms).unwrap() * 1_000_000,
        age_ms: 5_000 - valid_for_ms,
        valid_for_ms,
    }
}

fn published(commit: usize, number: u64, incarnation: u32) -> Stepped {
    let step = Step::Published { revision: revision(number), commit: Some(commit) };
    Stepped { replica: 0, incarnation, at_ns: 0, step }
}

/// Permitted at 1, revoked by 2 in second 10, permitted again by 3 in second 30; all well.
fn history() -> History {
    History {
        bound_ns: 5 * SECOND_NS,
        slack_ns: 10_000_000,
        commits: vec![commit(1, None, 0, true), commit(2, Some(0), 10, false), commit(3, Some(1), 30, true)],
        answers: vec![
            answer(0, 1, Effect::Permit, 9, 5_000),
            answer(0, 1, Effect::Permit, 12, 3_000),
            answer(1, 2, Effect::Deny, 12, 5_000),
            answer(2, 3, Effect::Permit, 31, 5_000),
        ],
        steps: vec![published(0, 1, 1), published(1, 2, 1), published(2, 3, 2)],
        ended: vec![Ended { replica: 0, quarantined: false, current: true }],
        may_quarantine: false,
        quiet_ns: 40 * SECOND_NS,
        newest: 2,
    }
}

#[test]
fn a_good_history_passes() {
    assert_eq!(check(&history()), Ok(()));
    assert_eq!(check(&History::default()), Ok(()));
}

#[test]
fn each_broken_promise_is_seen() {
    let check = |what: &str, expected: Option<Promise>, break_it: &dyn Fn(&mut History)| {
        let mut history = history();
        break_it(&mut history);
        assert_eq!(super::check(&history).err().map(|violation| violation.promise), expected, "{what}");
    };
    let answers = |answer: Answer| move |history: &mut History| history.answers.push(answer.clone());

    let late = answer(0, 1, Effect::Permit, 12, 3_500);
    check("usable half a second past the bound", Some(Promise::Bound), &answers(late.clone()));
    check("it was denied", None, &answers(Answer { effect: Effect::Deny, ..late.clone() }));
    check("it came when it was of no use any more", None, &answers(Answer { received_ns: 16 * SECOND_NS, ..late.clone() }));
    check(
        "an approval is worth as much",
        Some(Promise::Bound),
        &answers(Answer { effect: Effect::NeedsApproval, ..late.clone() }),
    );
    let unacknowledged = |history: &mut History| {
        history.answers.push(late.clone());
        history.commits[1].binds_ns = None;
    };
    check("nobody was told of the commit", None, &unacknowledged);
    let lost = |history: &mut History| {
        history.answers.push(late.clone());
        history.commits[1].lost_ns = Some(11 * SECOND_NS);
        history.commits[2].parent = Some(0);
        history.steps.remove(1);
    };
    check("the store lost the commit before", None, &lost);
    let reinstated = |history: &mut History| {
        history.answers.push(late.clone());
        history.commits[2].created_ns = 13 * SECOND_NS;
    };
    check("it was let in again before", None, &reinstated);

    check("its own revision denies", Some(Promise::Revision), &answers(answer(1, 2, Effect::Permit, 12, 2_000)));
    check(
        "no commit is like it",
        Some(Promise::Digest),
        &answers(Answer { commit: None, ..answer(0, 1, Effect::Permit, 1, 5_000) }),
    );

    let asked = |commit: usize, number: u64| Answer { at_least: Some(1), ..answer(commit, number, Effect::Deny, 12, 5_000) };
    check("answered from before", Some(Promise::AtLeast), &answers(asked(0, 1)));
    check("answered from it", None, &answers(asked(1, 2)));
    check("refused", None, &answers(Answer { unavailable: true, ..asked(0, 1) }));

    check("a number fell", Some(Promise::Forward), &|history| history.steps.push(published(1, 2, 2)));
    let forked = |history: &mut History| {
        history.commits.push(commit(4, Some(0), 35, true));
        history.steps.push(published(3, 4, 3));
    };
    check("higher, of another past", Some(Promise::Forward), &forked);
    let other_history = |history: &mut History| {
        let other = Revision { history: HistoryId::new("second"), number: 3 };
        history.commits[2].revisions.push(other.clone());
        history.steps.push(Stepped { step: Step::Published { revision: other, commit: Some(2) }, ..published(2, 3, 3) });
    };
    check("the same commit in another history", Some(Promise::Forward), &other_history);
    let unlike = |history: &mut History| {
        let step = Step::Published { revision: revision(3), commit: None };
        history.steps.push(Stepped { step, ..published(2, 3, 2) });
    };
    check("a snapshot like no commit", Some(Promise::Digest), &unlike);
    check("a snapshot of another number", Some(Promise::Digest), &|history| history.steps.push(published(2, 4, 2)));

    let permit = answer(0, 1, Effect::Permit, 1, 5_000);
    check("closed", Some(Promise::States), &answers(Answer { age_ms: 5_000, valid_for_ms: 0, ..permit.clone() }));
    check(
        "stale and destructive",
        Some(Promise::States),
        &answers(Answer { destructive: true, age_ms: 1_000, valid_for_ms: 4_000, ..permit.clone() }),
    );
    check("valid past the bound", Some(Promise::States), &answers(Answer { age_ms: 500, ..permit.clone() }));
    let quarantined = |history: &mut History| {
        history.steps.push(Stepped { at_ns: SECOND_NS, step: Step::Quarantined, ..published(0, 1, 1) });
        history.may_quarantine = true;
    };
    check("permits in quarantine", Some(Promise::States), &quarantined);

    let ended = |quarantined, current| move |history: &mut History| history.ended[0] = Ended { replica: 0, quarantined, current };
    check("left behind", Some(Promise::Recovery), &ended(false, false));
    check("quarantined by its own store", Some(Promise::Recovery), &ended(true, false));
    check("still denied long after", Some(Promise::Recovery), &answers(answer(2, 3, Effect::Deny, 45, 5_000)));
    let still_permitted = |history: &mut History| {
        history.commits[2].permitted = vec![false];
        history.answers = vec![answer(0, 1, Effect::Permit, 45, 5_000)];
        history.commits[1].binds_ns = None;
        history.commits[2].binds_ns = None;
    };
    check("still permitted long after", Some(Promise::Recovery), &still_permitted);
}
