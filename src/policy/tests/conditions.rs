//! Tests of conditions, guardrails, preparation and shadow documents in an evaluation, case by case with both evaluators.

use crate::model::json::parse_object;
use crate::model::request::ToolCall;
use crate::testing::reference;

use super::super::compile::CompiledPolicy;
use super::{documents, subject};

const BASE: &str = "
{kind: server, id: pay, tools: {prepare: {risk: write}, execute: {}, refund: {risk: write}, read: {risk: read}}}
---
{kind: group, id: g, allow: ['*']}
---
{kind: application, id: p, allow: ['*']}
---
";

const ALL: &str = r#"{"pay/prepare":{},"pay/execute":{},"pay/refund":{},"pay/read":{}}"#;

/// A time on a Monday.
fn at(hour: i64, minute: i64) -> i64 {
    const MONDAY_S: i64 = 1_764_547_200;
    MONDAY_S + hour * 3600 + minute * 60
}

/// The agent of the policy is `spiffe://t/a`. `expected` is `EFFECT REASON LAYER [prepared…]`, and after ` / ` the answer of the
/// shadow policy.
fn check(policy: &str, tool: &str, arguments: &str, environment: Option<&str>, unix_s: i64, expected: &str) {
    let documents = documents(&format!("{BASE}{policy}"));
    let compiled = CompiledPolicy::compile(&documents).unwrap_or_else(|error| panic!("{policy}: {error:?}"));
    let subject = subject(&["g"], "p", &["a"], &[ALL]);
    let arguments = parse_object(arguments.as_bytes()).unwrap();
    let environment = environment.map(|text| parse_object(text.as_bytes()).unwrap());
    let call = ToolCall { environment: environment.as_ref(), unix_s, ..ToolCall::new(tool, &arguments) };
    let one = |compiled: &CompiledPolicy, documents: &[_]| {
        let verdict = compiled.evaluate(&compiled.resolve(&subject), &subject, &call);
        let answer = reference::decide(documents, &subject, &call);
        let told = (verdict.effect, verdict.reason, verdict.layer, verdict.matched.as_deref(), &verdict.prepared);
        assert_eq!(told, (answer.effect, answer.reason, answer.layer, answer.matched.as_ref(), &answer.prepared), "{policy}");
        let mut text = format!("{} {}", verdict.effect.as_str(), verdict.reason);
        text += &verdict.layer.map(|layer| format!(" {layer}")).unwrap_or_default();
        text += &verdict.prepared.iter().map(|need| format!(" [{}]", need.tool)).collect::<String>();
        text
    };
    let mut text = one(&compiled, &documents);
    if let Some(would_be) = compiled.shadow_policy() {
        text = format!("{text} / {}", one(would_be, &reference::enforce_shadows(&documents)));
    }
    assert_eq!(text, expected, "{policy} {tool}");
}

fn agent(entries: &str) -> String {
    format!("{{kind: agent, id: spiffe://t/a, applications: [p], acts_for: [g], {entries}}}")
}

#[test]
fn an_allow_with_a_condition() {
    let policy = agent("allow: [pay/refund: {args: {amount: {max: 500}}, when: 'context.time.hour_utc < 18'}]");
    let check = |arguments, hour, expected| check(&policy, "pay/refund", arguments, None, at(hour, 0), expected);
    check(r#"{"amount":500}"#, 17, "PERMIT OK");
    check(r#"{"amount":500}"#, 18, "DENY AGENT_DENIES agent");
    check(r#"{"amount":501}"#, 17, "DENY AGENT_DENIES agent");
}

#[test]
fn a_condition_that_fails_denies_whatever_else_is_allowed() {
    let policy = agent("allow: [pay/*, pay/refund: {when: 'context.args.amount < 9'}]");
    check(&policy, "pay/refund", r#"{"amount":1}"#, None, 0, "PERMIT OK");
    check(&policy, "pay/refund", r#"{"amount":10}"#, None, 0, "PERMIT OK");
    check(&policy, "pay/refund", "{}", None, 0, "DENY CONDITION_ERROR agent");
    check(&policy, "pay/refund", r#"{"amount":"1"}"#, None, 0, "DENY CONDITION_ERROR agent");
    check(&policy, "pay/read", "{}", None, 0, "PERMIT OK");
    // Conditions are not evaluated if the arguments do not match.
    let policy = agent("allow: [pay/*, pay/refund: {args: {amount: {max: 5}}, when: 'context.args.amount < 9'}]");
    check(&policy, "pay/refund", "{}", None, 0, "PERMIT OK");
}

#[test]
fn a_deny_with_a_condition() {
    let policy = agent("allow: ['*'], deny: [pay/*: {when: 'context.time.weekday_utc > 5 || context.env has unsafe'}]");
    check(&policy, "pay/read", "{}", None, at(9, 0), "PERMIT OK");
    check(&policy, "pay/read", "{}", None, at(9, 0) + 5 * 86_400, "DENY AGENT_DENIES agent");
    check(&policy, "pay/read", "{}", Some(r#"{"unsafe":1}"#), at(9, 0), "DENY AGENT_DENIES agent");
    let policy = agent("allow: ['*'], deny: [pay/*: {when: 'context.env.safe'}]");
    check(&policy, "pay/read", "{}", None, 0, "DENY CONDITION_ERROR agent");
    check(&policy, "pay/read", "{}", Some(r#"{"safe":false}"#), 0, "PERMIT OK");
}

#[test]
fn the_gateways_word_counts_where_the_entry_says_so() {
    let policy = agent("allow: [pay/read: {when: 'context.env.network == \"corp\"', evidence: attested}]");
    check(&policy, "pay/read", "{}", Some(r#"{"network":"corp"}"#), 0, "PERMIT OK");
    check(&policy, "pay/read", "{}", Some(r#"{"network":"café"}"#), 0, "DENY AGENT_DENIES agent");
    check(&policy, "pay/read", "{}", None, 0, "DENY CONDITION_ERROR agent");
}

#[test]
fn a_guardrail_takes_away_from_everybody() {
    let rail = |condition: &str| {
        let agent = agent("allow: ['*'], approve: [pay/refund: {by: [x], expires_in: 1m}]");
        format!("{agent}\n---\n{{kind: guardrail, id: r, tools: [pay/*], forbid_when: '{condition}'}}")
    };
    let hours = rail("context.time.hour_utc < 7 || context.time.hour_utc > 18");
    check(&hours, "pay/read", "{}", None, at(7, 0), "PERMIT OK");
    check(&hours, "pay/read", "{}", None, at(6, 59), "DENY GUARDRAIL_DENIES guardrail");
    check(&hours, "pay/refund", "{}", None, at(18, 59), "NEEDS_APPROVAL APPROVAL_REQUIRED agent");
    check(&hours, "pay/refund", "{}", None, at(19, 0), "DENY GUARDRAIL_DENIES guardrail");
    check(&rail("context.args.amount > 5"), "pay/read", "{}", None, 0, "DENY CONDITION_ERROR guardrail");
    check(&rail("false"), "pay/read", "{}", None, 0, "PERMIT OK");
    // A guardrail never permits: without an entry elsewhere, the call is still denied.
    let silent = "{kind: agent, id: spiffe://t/a, applications: [p], acts_for: [g]}\n---\n\
                  {kind: guardrail, id: r, tools: ['*'], forbid_when: 'false'}";
    check(silent, "pay/read", "{}", None, 0, "DENY AGENT_DENIES agent");
}

#[test]
fn what_must_be_prepared() {
    let prepared = "allow: [pay/prepare, pay/execute: {prepared: pay/prepare}]";
    check(&agent(prepared), "pay/execute", "{}", None, 0, "PERMIT OK [pay/prepare]");
    check(&agent(prepared), "pay/prepare", "{}", None, 0, "PERMIT OK");
    // A call that another entry permits without conditions needs no preparation.
    let free = "allow: [pay/execute: {prepared: pay/prepare}, pay/*: {args: {amount: {max: 5}}}]";
    check(&agent(free), "pay/execute", r#"{"amount":5}"#, None, 0, "PERMIT OK");
    check(&agent(free), "pay/execute", r#"{"amount":6}"#, None, 0, "PERMIT OK [pay/prepare]");
    let both = "allow: ['*'], approve: [pay/execute: {by: [x], expires_in: 1m, prepared: pay/prepare}]";
    check(&agent(both), "pay/execute", "{}", None, 0, "NEEDS_APPROVAL APPROVAL_REQUIRED agent [pay/prepare]");
    let denied = format!("{}, deny: [pay/execute]", prepared);
    check(&agent(&denied), "pay/execute", "{}", None, 0, "DENY AGENT_DENIES agent");
}

#[test]
fn shadows_are_evaluated_beside() {
    let with = |shadow: &str| format!("{}\n---\n{shadow}", agent("allow: [pay/*]"));
    let narrower = with("{kind: agent, id: spiffe://t/a, mode: shadow, applications: [p], acts_for: [g], allow: [pay/read]}");
    check(&narrower, "pay/read", "{}", None, 0, "PERMIT OK / PERMIT OK");
    check(&narrower, "pay/refund", "{}", None, 0, "PERMIT OK / DENY AGENT_DENIES agent");
    let rail = with("{kind: guardrail, id: r, mode: shadow, tools: [pay/*], forbid_when: 'context.time.hour_utc > 18'}");
    check(&rail, "pay/read", "{}", None, at(19, 0), "PERMIT OK / DENY GUARDRAIL_DENIES guardrail");
    let wider = "{kind: agent, id: spiffe://t/a, applications: [p], acts_for: [g]}\n---\n\
                 {kind: agent, id: spiffe://t/a, mode: shadow, applications: [p], acts_for: [g], allow: ['*']}";
    check(wider, "pay/read", "{}", None, 0, "DENY AGENT_DENIES agent / PERMIT OK");
    // An agent that exists only in shadow is unknown.
    let only = "{kind: agent, id: spiffe://t/a, mode: shadow, applications: [p], acts_for: [g], allow: ['*']}";
    check(only, "pay/read", "{}", None, 0, "DENY AGENT_UNKNOWN identity / PERMIT OK");
    let set = "{kind: agent, id: spiffe://t/a, applications: [p], acts_for: [g], include: [s]}\n---\n\
               {kind: permission_set, id: s, allow: [pay/read]}\n---\n{kind: permission_set, id: s, mode: shadow, allow: [pay/refund]}";
    check(set, "pay/read", "{}", None, 0, "PERMIT OK / DENY AGENT_DENIES agent");
    check(set, "pay/refund", "{}", None, 0, "DENY AGENT_DENIES agent / PERMIT OK");
}

/// A call with many conditions and large arguments has a bounded cost. The cost is counted, does not depend on the order, and
/// denies if it is too high.
#[test]
fn too_many_conditions_about_too_much_deny() {
    let entries = |numbers: &mut dyn Iterator<Item = u32>| -> String {
        let entry = |n| format!("pay/refund: {{when: 'context.args.note like \"*secret-{n}*\"'}}");
        numbers.map(entry).collect::<Vec<_>>().join(", ")
    };
    let rails: String = (0..20)
        .map(|n| {
            let condition = format!("context.args.note like \"*secret-{n}*\"");
            format!("\n---\n{{kind: guardrail, id: r{n}, tools: ['*'], forbid_when: '{condition}'}}")
        })
        .collect();
    let policies = [&mut (0..60_u32) as &mut dyn Iterator<Item = u32>, &mut (0..60_u32).rev()]
        .map(|numbers| agent(&format!("allow: ['*'], deny: [{}]", entries(numbers))) + &rails);
    for (bytes, expected) in [(1_000, "PERMIT OK"), (20_000, "PERMIT OK"), (40_000, "DENY CONDITION_ERROR")] {
        for policy in &policies {
            let compiled = CompiledPolicy::compile(&documents(&format!("{BASE}{policy}"))).unwrap();
            let subject = subject(&["g"], "p", &["a"], &[ALL]);
            let arguments = parse_object(format!("{{\"note\":\"{}\"}}", "x".repeat(bytes)).as_bytes()).unwrap();
            let verdict = compiled.evaluate(&compiled.resolve(&subject), &subject, &ToolCall::new("pay/refund", &arguments));
            assert_eq!(format!("{} {}", verdict.effect.as_str(), verdict.reason), expected, "{bytes}");
        }
    }
}

/// The search for approvers evaluates conditions a second time. It must find all of them although the first evaluation used most
/// of the budget.
#[test]
fn no_approver_is_left_out_for_want_of_work() {
    let entry = |by: &str, minutes: u32| {
        let whens: Vec<String> = (0..10).map(|n| format!("context.args.note like \"x{n}*\"")).collect();
        let when = format!("!({})", whens.join(" && "));
        format!("pay/refund: {{by: [{by}], expires_in: {minutes}m, when: '{when}'}}")
    };
    let policy = agent(&format!("approve: [{}, {}, {}]", entry("leads", 9), entry("owners", 7), entry("risk", 8)));
    let compiled = CompiledPolicy::compile(&documents(&format!("{BASE}{policy}"))).unwrap();
    let subject = subject(&["g"], "p", &["a"], &[ALL]);
    let mut seen = Vec::new();
    for bytes in [100, 30_000, 40_000, 49_000, 80_000, 160_000] {
        let arguments = parse_object(format!("{{\"note\":\"{}\"}}", "x".repeat(bytes)).as_bytes()).unwrap();
        let verdict = compiled.evaluate(&compiled.resolve(&subject), &subject, &ToolCall::new("pay/refund", &arguments));
        let needs: Vec<_> = verdict.approvals.iter().map(|need| (need.approver_groups.len(), need.expires_in_ms)).collect();
        match verdict.reason {
            crate::model::reason::Reason::ConditionError => assert_eq!(needs, []),
            _ => assert_eq!(needs, [(3, 7 * 60_000)], "{bytes}"),
        }
        seen.push(verdict.reason);
    }
    assert!(seen.first() != seen.last(), "some fit and some do not: {seen:?}");
}
