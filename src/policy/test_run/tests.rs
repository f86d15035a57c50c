//! Tests of test runs: passed and failed calls, reasons, and entries that no test reached.

use super::*;
use crate::policy::source::{SourceFile, parse_files};

const POLICY: &str = "\
kind: issuer
id: https://i
keys: {jwks: {keys: [{kty: OKP, crv: Ed25519, x: 11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo}]}}
audiences: [https://gw]
groups: [g]
applications: [p]
---
{kind: group, id: g, allow: ['*']}
---
{kind: group, id: h, allow: ['*']}
---
{kind: application, id: p, allow: ['*']}
---
{kind: tool, id: pay/prepare, risk: write}
---
{kind: tool, id: pay/execute}
---
{kind: tool, id: pay/read, risk: read, schema_sha256: 0101010101010101010101010101010101010101010101010101010101010101}
---
{kind: permission_set, id: used, allow: [pay/read]}
---
{kind: permission_set, id: unused, allow: [pay/read]}
---
{kind: operator, id: o, keys: [{kty: OKP, crv: Ed25519, x: PUAXw-hDiVqStwqnTRt-vJyYLM8uxJaMwM1V8Sr0Zgw}], roles: [approve], groups: [leads]}
---
kind: agent
id: spiffe://t/a
applications: [p]
acts_for: [g]
include: [used]
allow:
  - pay/execute: {prepared: pay/prepare}
approve:
  - pay/prepare: {args: {amount: {max: 5}}, by: [leads]}
deny:
  - pay/prepare: {args: {amount: {min: 4}}}
---
kind: guardrail
id: hours
tools: [pay/read]
forbid_when: 'context.time.hour_utc < 7 || (context.env has freeze && context.env.freeze)'
---
";

fn run_with(test: &str) -> TestReport {
    let text = format!("{POLICY}kind: test\n{test}");
    let parsed = parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: text.into_bytes() }]);
    assert_eq!(parsed.diagnostics, [], "{test}");
    let policy = CompiledPolicy::compile(&parsed.documents).unwrap();
    run_tests(&parsed.documents, &policy)
}

/// Runs one expectation for the common subject.
fn check(expectation: &str, expected: Result<(), &str>) {
    let subject = "agent: spiffe://t/a\nuser: {issuer: https://i, sub: ana, groups: [g]}\napplication: p\n";
    let report = run_with(&format!("{subject}expect: [{expectation}]\n"));
    match (report.failures.as_slice(), expected) {
        ([], Ok(())) => assert_eq!((report.passed, report.tests), (1, 1)),
        ([failure], Err(got)) => assert_eq!(failure.actual.to_string(), got, "{failure}"),
        (failures, expected) => panic!("{expectation}: {expected:?} {failures:?}"),
    }
}

#[test]
fn what_is_wanted_is_compared_as_far_as_it_is_said() {
    check("{tool: pay/prepare, args: {amount: 3}, want: NEEDS_APPROVAL}", Ok(()));
    check("{tool: pay/prepare, args: {amount: 3}, want: NEEDS_APPROVAL, reason: APPROVAL_REQUIRED, layer: agent}", Ok(()));
    check("{tool: pay/prepare, args: {amount: 3}, want: PERMIT}", Err("NEEDS_APPROVAL APPROVAL_REQUIRED (layer agent)"));
    check("{tool: pay/prepare, args: {amount: 4}, want: DENY}", Ok(()));
    check("{tool: pay/prepare, args: {amount: 4}, want: DENY, reason: USER_DENIES}", Err("DENY AGENT_DENIES (layer agent)"));
    check("{tool: pay/prepare, args: {amount: 4}, want: DENY, layer: hop}", Err("DENY AGENT_DENIES (layer agent)"));
    check("{tool: no/tool, want: DENY, reason: TOOL_UNKNOWN}", Ok(()));
}

#[test]
fn what_must_be_prepared_is_denied_unless_it_is_said_to_be() {
    check("{tool: pay/execute, want: DENY, reason: APPROVAL_REQUIRED, layer: agent}", Ok(()));
    check("{tool: pay/execute, want: PERMIT}", Err("DENY APPROVAL_REQUIRED (layer agent)"));
    check("{tool: pay/execute, want: PERMIT, prepared: true}", Ok(()));
}

#[test]
fn conditions_see_the_time_and_the_environment_of_the_test() {
    check("{tool: pay/read, want: PERMIT}", Ok(()));
    check("{tool: pay/read, want: DENY, reason: GUARDRAIL_DENIES, at: 2026-01-07T03:00:00Z}", Ok(()));
    check("{tool: pay/read, want: DENY, layer: guardrail, env: {freeze: true}}", Ok(()));
    let at_night =
        "agent: spiffe://t/a\nat: 2026-01-07T03:00:00Z\nuser: {issuer: https://i, sub: ana, groups: [g]}\napplication: p\n";
    let report = run_with(&format!(
        "{at_night}expect: [{{tool: pay/read, want: DENY}}, {{tool: pay/read, want: PERMIT, at: 2026-01-07T08:00:00Z}}]\n"
    ));
    assert_eq!((report.passed, report.failures), (2, vec![]));
    assert_eq!(jiff::Timestamp::from_second(DEFAULT_TIME_UNIX_S).unwrap().to_string(), "2026-01-07T12:00:00Z");
}

#[test]
fn a_scope_is_what_each_token_grants() {
    let subject = "agent: spiffe://t/a\nuser: {issuer: https://i, sub: ana, groups: [g]}\napplication: p\n";
    let report = run_with(&format!(
        "{subject}scope: {{pay/read: {{}}}}\nexpect:\n  - {{tool: pay/read, want: PERMIT}}\n  - {{tool: pay/prepare, args: {{amount: 1}}, want: DENY, reason: TOOL_NOT_GRANTED}}\n"
    ));
    assert_eq!((report.passed, report.failures), (2, vec![]));
}

#[test]
fn a_chain_that_no_issuer_could_start_fails_its_test() {
    let of = |group: &str, application: &str, expectation: &str| {
        run_with(&format!(
            "agent: spiffe://t/a\nuser: {{issuer: https://i, sub: ana, groups: [{group}]}}\napplication: {application}\nexpect: [{expectation}]\n"
        ))
    };
    let denied = "{tool: pay/read, want: DENY}";
    for (group, application, says) in [("h", "p", "group `h`"), ("g", "q", "application `q`")] {
        let report = of(group, application, denied);
        let [failure] = report.failures.as_slice() else { panic!("{report:?}") };
        assert!(failure.problem.as_deref().unwrap().contains(says), "{failure}");
        assert!(failure.to_string().contains("DENY ISSUER_NOT_ENTITLED (layer identity)"), "{failure}");
        let meant = of(group, application, "{tool: pay/read, want: DENY, reason: ISSUER_NOT_ENTITLED}");
        assert_eq!((meant.passed, meant.failures), (1, vec![]));
    }
    // A group that no document names is left out of the chain, as in verification.
    let report = of("nobodys", "p", denied);
    assert_eq!((report.passed, report.failures), (1, vec![]));
    assert!(report.notes.iter().any(|note| note.contains("`nobodys`")), "{:?}", report.notes);
}

#[test]
fn a_failure_says_where_and_by_what() {
    let subject = "agent: spiffe://t/a\nuser: {issuer: https://i, sub: ana, groups: [g]}\napplication: p\n";
    let report = run_with(&format!("{subject}expect:\n  - {{tool: pay/prepare, args: {{amount: 4}}, want: PERMIT}}\n"));
    let told = report.failures[0].to_string();
    let line = POLICY.lines().position(|line| line.contains("min: 4")).unwrap() + 1;
    for part in [
        &format!("p.yaml:{}:5: spiffe://t/a calls pay/prepare {{\"amount\":4}}", POLICY.lines().count() + 6),
        "wanted  PERMIT",
        "got     DENY AGENT_DENIES (layer agent) at spiffe://t/a",
        "`deny: {\"pay/prepare\":",
        &format!("(p.yaml:{line}:5)"),
    ] {
        assert!(told.contains(part), "{part:?} in {told}");
    }
}

#[test]
fn entries_that_no_test_reached_are_listed() {
    let subject = "agent: spiffe://t/a\nuser: {issuer: https://i, sub: ana, groups: [g]}\napplication: p\n";
    let unreached = |expect: &str| {
        let coverage = run_with(&format!("{subject}expect: [{expect}]\n")).coverage;
        assert_eq!(coverage.entries, 8, "unused sets and shadows do not count");
        (coverage.percent(), coverage.unreached.iter().map(|place| format!("{} {}", place.list, place.id)).collect::<Vec<_>>())
    };
    // The group, the application and the set have one entry each. A denial in one layer does not hide the entries of the others.
    let (percent, places) = unreached("{tool: pay/read, want: PERMIT}");
    let of_agent = ["allow spiffe://t/a", "approve spiffe://t/a", "deny spiffe://t/a"];
    assert_eq!(
        (percent, places),
        (37, [&["allow h"][..], &of_agent, &["forbid_when hours"]].concat().into_iter().map(String::from).collect())
    );
    let all = "{tool: pay/read, want: DENY, env: {freeze: true}}, {tool: pay/prepare, args: {amount: 4}, want: DENY}, \
               {tool: pay/prepare, args: {amount: 1}, want: NEEDS_APPROVAL}, {tool: pay/execute, want: DENY}";
    assert_eq!(unreached(all), (87, vec!["allow h".to_owned()]));
}
