//! Tests every rule of the checker against a small history that breaks it, and against the same history without the break.

use super::*;
use crate::model::revision::HistoryId;

const SECOND_NS: i64 = 1_000_000_000;

fn revision(number: u64) -> Revision {
    Revision { history: HistoryId::new("first"), number }
}

fn commit(number: u64, parent: Option<usize>, at_s: i64, permitted: bool) -> CommitFacts {
    CommitFacts {
        parent,
        revisions: vec![revision(number)],
        created_ns: at_s * SECOND_NS,
        binds_ns: Some(at_s * SECOND_NS),
        lost_ns: None,
        revoked: vec![!permitted],
        allowed: vec![true],
        builds: true,
        all: vec![],
        unix_ms: at_s * 1_000,
    }
}

/// An answer that a fresh replica sends within the second of the request.
fn answer(commit: usize, number: u64, effect: Effect, at_s: i64, valid_for_ms: u64) -> ObservedAnswer {
    let sent_ns = at_s * SECOND_NS;
    ObservedAnswer {
        replica: 0,
        incarnation: 1,
        pair: 0,
        destructive: false,
        at_least: None,
        effect,
        unavailable: false,
        revision: revision(number),
        commit: Some(commit),
        policy: Some(commit),
        sent_ns,
        answered_ns: sent_ns + SECOND_NS / 20,
        received_ns: sent_ns + SECOND_NS / 10,
        usable_until_ns: sent_ns + i64::try_from(valid_for_ms).unwrap() * 1_000_000,
        age_ms: 5_000 - valid_for_ms,
        valid_for_ms,
    }
}

fn published(commit: usize, number: u64, incarnation: u32) -> RecordedStep {
    let step = ReplicaStep::Published { revision: revision(number), commit: Some(commit), policy: Some(commit) };
    RecordedStep { replica: 0, incarnation, at_ns: 0, step }
}

/// A wait for commit 1 that begins when that commit is made.
fn waited(returned: Option<(i64, bool)>) -> FleetWait {
    FleetWait { commit: 1, began_ns: 10 * SECOND_NS, returned }
}

/// A correct history: commit 1 permits, commit 2 revokes in second 10, commit 3 permits again in second 30.
fn history() -> RunHistory {
    RunHistory {
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
        waits: vec![waited(Some((15 * SECOND_NS, true)))],
        end_ns: 60 * SECOND_NS,
        ended: vec![ReplicaEndState { replica: 0, quarantined: false, current: true }],
        may_quarantine: false,
        quiet_ns: 40 * SECOND_NS,
        newest: 2,
    }
}

#[test]
fn a_good_history_passes() {
    assert_eq!(check(&history()), Ok(()));
    assert_eq!(check(&RunHistory::default()), Ok(()));
}

#[test]
fn each_broken_promise_is_seen() {
    let check = |what: &str, expected: Option<Promise>, break_it: &dyn Fn(&mut RunHistory)| {
        let mut history = history();
        break_it(&mut history);
        assert_eq!(super::check(&history).err().map(|violation| violation.promise), expected, "{what}");
    };
    let answers = |answer: ObservedAnswer| move |history: &mut RunHistory| history.answers.push(answer.clone());

    let late = answer(0, 1, Effect::Permit, 12, 3_500);
    check("usable half a second past the bound", Some(Promise::Bound), &answers(late.clone()));
    check("it was denied", None, &answers(ObservedAnswer { effect: Effect::Deny, ..late.clone() }));
    check(
        "it came when it was of no use any more",
        None,
        &answers(ObservedAnswer { received_ns: 16 * SECOND_NS, ..late.clone() }),
    );
    check(
        "an approval is worth as much",
        Some(Promise::Bound),
        &answers(ObservedAnswer { effect: Effect::NeedsApproval, ..late.clone() }),
    );
    let unacknowledged = |history: &mut RunHistory| {
        history.answers.push(late.clone());
        history.commits[1].binds_ns = None;
    };
    check("nobody was told of the commit", None, &unacknowledged);
    let lost = |history: &mut RunHistory| {
        history.answers.push(late.clone());
        history.commits[1].lost_ns = Some(11 * SECOND_NS);
        history.commits[2].parent = Some(0);
        history.steps.remove(1);
    };
    check("the store lost the commit before", None, &lost);
    let reinstated = |history: &mut RunHistory| {
        history.answers.push(late.clone());
        history.commits[2].created_ns = 13 * SECOND_NS;
    };
    check("it was let in again before", None, &reinstated);

    check("its own revision denies", Some(Promise::Revision), &answers(answer(1, 2, Effect::Permit, 12, 2_000)));
    check(
        "no commit is like it",
        Some(Promise::Digest),
        &answers(ObservedAnswer { commit: None, ..answer(0, 1, Effect::Permit, 1, 5_000) }),
    );

    let asked =
        |commit: usize, number: u64| ObservedAnswer { at_least: Some(1), ..answer(commit, number, Effect::Deny, 12, 5_000) };
    check("answered from before", Some(Promise::AtLeast), &answers(asked(0, 1)));
    check("answered from it", None, &answers(asked(1, 2)));
    check("refused", None, &answers(ObservedAnswer { unavailable: true, ..asked(0, 1) }));

    check("a number fell", Some(Promise::Forward), &|history| history.steps.push(published(1, 2, 2)));
    let forked = |history: &mut RunHistory| {
        history.commits.push(commit(4, Some(0), 35, true));
        history.steps.push(published(3, 4, 3));
    };
    check("higher, of another past", Some(Promise::Forward), &forked);
    let other_history = |history: &mut RunHistory| {
        let other = Revision { history: HistoryId::new("second"), number: 3 };
        history.commits[2].revisions.push(other.clone());
        history.steps.push(RecordedStep {
            step: ReplicaStep::Published { revision: other, commit: Some(2), policy: Some(2) },
            ..published(2, 3, 3)
        });
    };
    check("the same commit in another history", Some(Promise::Forward), &other_history);
    let unlike = |history: &mut RunHistory| {
        let step = ReplicaStep::Published { revision: revision(3), commit: None, policy: None };
        history.steps.push(RecordedStep { step, ..published(2, 3, 2) });
    };
    check("a snapshot like no commit", Some(Promise::Digest), &unlike);
    check("a snapshot of another number", Some(Promise::Digest), &|history| history.steps.push(published(2, 4, 2)));

    let permit = answer(0, 1, Effect::Permit, 1, 5_000);
    check("closed", Some(Promise::States), &answers(ObservedAnswer { age_ms: 5_000, valid_for_ms: 0, ..permit.clone() }));
    check(
        "stale and destructive",
        Some(Promise::States),
        &answers(ObservedAnswer { destructive: true, age_ms: 1_000, valid_for_ms: 4_000, ..permit.clone() }),
    );
    check("valid past the bound", Some(Promise::States), &answers(ObservedAnswer { age_ms: 500, ..permit.clone() }));
    let quarantined = |history: &mut RunHistory| {
        history.steps.push(RecordedStep { at_ns: SECOND_NS, step: ReplicaStep::Quarantined, ..published(0, 1, 1) });
        history.may_quarantine = true;
    };
    check("permits in quarantine", Some(Promise::States), &quarantined);

    let ended = |quarantined, current| {
        move |history: &mut RunHistory| history.ended[0] = ReplicaEndState { replica: 0, quarantined, current }
    };
    check("left behind", Some(Promise::Recovery), &ended(false, false));
    check("quarantined by its own store", Some(Promise::Recovery), &ended(true, false));
    check("still denied long after", Some(Promise::Recovery), &answers(answer(2, 3, Effect::Deny, 45, 5_000)));
    let still_permitted = |history: &mut RunHistory| {
        history.commits[2].revoked = vec![true];
        history.waits.clear();
        history.answers = vec![answer(0, 1, Effect::Permit, 45, 5_000)];
        history.commits[1].binds_ns = None;
        history.commits[2].binds_ns = None;
    };
    check("still permitted long after", Some(Promise::Recovery), &still_permitted);
}

#[test]
fn each_broken_promise_of_fleet_and_policy_is_seen() {
    let check = |what: &str, expected: Option<Promise>, break_it: &dyn Fn(&mut RunHistory)| {
        let mut history = history();
        break_it(&mut history);
        assert_eq!(super::check(&history).err().map(|violation| violation.promise), expected, "{what}");
    };
    let waits = |waited: FleetWait| move |history: &mut RunHistory| history.waits.push(waited.clone());
    check("late", Some(Promise::Fleet), &waits(waited(Some((16 * SECOND_NS, true)))));
    check("late with nothing to say", Some(Promise::Fleet), &waits(waited(Some((16 * SECOND_NS, false)))));
    check("never", Some(Promise::Fleet), &waits(waited(None)));
    check("the end came first", None, &|history| {
        history.waits.push(waited(None));
        history.end_ns = 14 * SECOND_NS;
    });
    // The answer left its handler in second 12.05 and is valid for two more seconds.
    let said = |ms: i64, said: bool| waits(waited(Some((12 * SECOND_NS + ms * 1_000_000, said))));
    check("permitted afterwards", Some(Promise::Fleet), &said(20, true));
    check("on its way", None, &said(45, true));
    check("nothing was said", None, &said(20, false));
    let of_no_use = |history: &mut RunHistory| {
        said(20, true)(history);
        history.answers[1].received_ns = 16 * SECOND_NS;
    };
    check("of no use when it came", None, &of_no_use);
    let asked_after = |history: &mut RunHistory| {
        said(-20, true)(history);
        history.answers[1].received_ns = 16 * SECOND_NS;
    };
    check("asked for afterwards", Some(Promise::Fleet), &asked_after);
    let let_in = |history: &mut RunHistory| {
        said(20, true)(history);
        history.commits[2].created_ns = 12 * SECOND_NS;
    };
    check("it was let in again before", None, &let_in);

    let unbuildable = |policy: usize| {
        move |history: &mut RunHistory| {
            (history.commits[2].builds, history.commits[2].allowed) = (false, vec![false]);
            history.steps[2] = published(2, 3, 1);
            let ReplicaStep::Published { policy: of, .. } = &mut history.steps[2].step else { panic!("a publication") };
            *of = Some(policy);
            history.answers[3].policy = Some(policy);
        }
    };
    check("the last good policy", None, &unbuildable(1));
    check("one before it", Some(Promise::LastGood), &unbuildable(0));
    check("what cannot be built", Some(Promise::LastGood), &unbuildable(2));
    let old_policy = |history: &mut RunHistory| {
        let ReplicaStep::Published { policy, .. } = &mut history.steps[1].step else { panic!("a publication") };
        *policy = Some(0);
    };
    check("an older policy than the newest that can be built", Some(Promise::LastGood), &old_policy);
    check("policy denies", Some(Promise::Revision), &|history| history.commits[2].allowed = vec![false]);
    let behind = |history: &mut RunHistory| {
        unbuildable(1)(history);
        history.answers[3].at_least = Some(2);
    };
    check("policy is not as far as was asked", Some(Promise::AtLeast), &behind);

    let kept = |commit: usize, incarnation: u32| RecordedStep { step: ReplicaStep::Kept(commit), ..published(0, 1, incarnation) };
    let fell = |keeps: Option<usize>| {
        move |history: &mut RunHistory| {
            history.may_quarantine = true;
            history.steps.extend(keeps.map(|commit| kept(commit, 2)));
            history.steps.push(published(1, 2, 3));
        }
    };
    check("a restart behind what was written down", Some(Promise::Forward), &fell(Some(2)));
    check("a restart at what was written down", None, &fell(Some(1)));
    let often = |times: usize| {
        move |history: &mut RunHistory| {
            fell(None)(history);
            let at_last = (0..times).map(|_| published(2, 3, 2));
            history.steps.splice(2..2, at_last);
        }
    };
    check("it had hardly got there", None, &often(KEPT_AFTER_STEPS - 2));
    check("it must have written that down", Some(Promise::Forward), &often(KEPT_AFTER_STEPS));
    check("in one life", Some(Promise::Forward), &|history| {
        history.may_quarantine = true;
        history.steps.push(published(1, 2, 2));
    });

    let all = |acts: [(usize, RevokeAllChange); 2], at_ms: i64| {
        move |history: &mut RunHistory| {
            acts.iter().for_each(|(commit, act)| history.commits[*commit].all.push(act.clone()));
            history.commits[2].unix_ms = at_ms;
        }
    };
    let (asked, lifted) = (|name: &str| RevokeAllChange::Asked(name.into()), |name: &str| RevokeAllChange::Lifted(name.into()));
    check("two operators", None, &all([(1, asked("a")), (2, lifted("b"))], 30_000));
    check("one twice", Some(Promise::TwoOperators), &all([(1, asked("a")), (2, lifted("a"))], 30_000));
    check("too late", Some(Promise::TwoOperators), &all([(1, asked("a")), (2, lifted("b"))], 10_000 + TWO_PERSON_WINDOW_MS));
    check("alone", Some(Promise::TwoOperators), &all([(1, RevokeAllChange::Shut), (2, lifted("b"))], 30_000));
    check("shut again since", Some(Promise::TwoOperators), &|history| {
        all([(0, asked("a")), (2, lifted("b"))], 30_000)(history);
        history.commits[1].all.push(RevokeAllChange::Shut);
    });
}
