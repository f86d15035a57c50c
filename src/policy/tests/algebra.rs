//! Tests of the evaluation, case by case: the answer of each layer, and the reported entry.

use crate::model::json::parse_object;
use crate::model::reason::Reason;
use crate::model::request::{DelegationSubject, ToolCall};
use crate::testing::reference;

use super::super::compile::{CompiledPolicy, ProofClass, SessionLimits, ToolRisk};
use super::super::document::Document;
use super::{documents, subject};

const POLICY: &str = "
kind: server
id: crm
tools: {read: {risk: read}, write: {risk: write}, refund: {risk: write}, deep/er: {risk: read}, wipe: {}}
---
{kind: tool, id: pinned/tool, risk: read, proof: none, schema_sha256: 0000000000000000000000000000000000000000000000000000000000000001}
---
{kind: group, id: sales, allow: [crm/*, pinned/tool], approve: [{crm/wipe: {by: [leads], expires_in: 5m}}]}
---
{kind: group, id: juniors, allow: ['*'], deny: [crm/write: {args: {amount: {min: 100}}}]}
---
{kind: group, id: silent}
---
{kind: application, id: portal, allow: ['*']}
---
{kind: application, id: narrow, allow: [crm/read]}
---
kind: permission_set
id: refunds
approve: [crm/refund: {args: {amount: {max: 500}}, by: [support-leads], expires_in: 10m}]
include: [reads]
---
{kind: permission_set, id: reads, allow: [crm/read]}
---
kind: agent
id: spiffe://t/a
applications: [portal, narrow]
acts_for: [sales, juniors]
delegates_to: [spiffe://t/b]
session: {lifetime_max: 2h, hops_max: 1}
allow: [crm/read, crm/write, pinned/tool, crm/wipe: {args: {id: 7}, only: true}]
approve: [crm/refund: {args: {amount: {max: 900}}, by: [a-leads], expires_in: 20m}]
---
{kind: agent, id: spiffe://t/b, applications: ['*'], acts_for: ['*'], include: [refunds], delegates_to: [spiffe://t/a, spiffe://t/b]}
---
{kind: agent, id: spiffe://t/elsewhere, applications: [narrow], acts_for: [silent], allow: ['*']}
";

const ALL: &str =
    r#"{"crm/read":{},"crm/write":{},"crm/refund":{},"crm/wipe":{},"crm/deep/er":{},"pinned/tool":{},"no/tool":{}}"#;

/// Checks `EFFECT REASON LAYER HOP MATCHED APPROVERS`. Both evaluators must give it.
fn check(policy: &(Vec<Document>, CompiledPolicy), subject: &DelegationSubject, tool: &str, arguments: &str, expected: &str) {
    let arguments = parse_object(arguments.as_bytes()).unwrap();
    let call = ToolCall::new(tool, &arguments);
    let resolved = policy.1.resolve(subject);
    let verdict = policy.1.evaluate(&resolved, subject, &call);
    let mut text = format!("{} {}", verdict.effect.as_str(), verdict.reason);
    text += &verdict.layer.map(|layer| format!(" {layer}")).unwrap_or_default();
    text += &verdict.hop.map(|hop| format!(" {hop}")).unwrap_or_default();
    if let Some(matched) = &verdict.matched {
        text += &format!(" {}:{}:{}", matched.kind, matched.id.rsplit('/').next().unwrap(), matched.entry);
    }
    for need in &verdict.approvals {
        text += &format!(" [{} {:?} {}]", need.layer, need.approver_groups, need.expires_in_ms);
    }
    assert_eq!(text, expected, "{tool} {arguments:?}");
    let reference = reference::decide(&policy.0, subject, &call);
    assert_eq!(
        (reference.effect, reference.reason, reference.layer, reference.hop),
        (verdict.effect, verdict.reason, verdict.layer, verdict.hop)
    );
    assert_eq!(reference.matched.as_ref(), verdict.matched.as_deref());
    assert_eq!(reference.approvals, verdict.approvals);
}

fn policy() -> (Vec<Document>, CompiledPolicy) {
    let documents = documents(POLICY);
    let compiled = CompiledPolicy::compile(&documents).unwrap();
    (documents, compiled)
}

#[test]
fn each_layer_denies_with_its_reason() {
    let policy = policy();
    let sales = subject(&["sales"], "portal", &["a"], &[ALL]);
    check(&policy, &sales, "crm/read", "{}", "PERMIT OK");
    check(&policy, &sales, "no/tool", "{}", "DENY TOOL_UNKNOWN tool");
    check(&policy, &sales, "pinned/tool", "{}", "DENY TOOL_CHANGED tool tool:tool:");
    check(&policy, &sales, "crm/deep/er", "{}", "DENY USER_DENIES user group:sales:");
    let application = |application| subject(&["sales"], application, &["a"], &[ALL]);
    check(&policy, &application("narrow"), "crm/write", "{}", "DENY APPLICATION_DENIES application application:narrow:");
    check(&policy, &application("unheard-of"), "crm/read", "{}", "DENY APPLICATION_UNKNOWN application");
    check(&policy, &application("unheard-of"), "no/tool", "{}", "DENY TOOL_UNKNOWN tool");
    let groups = |groups: &[&str]| subject(groups, "portal", &["a"], &[ALL]);
    check(&policy, &groups(&[]), "crm/read", "{}", "DENY USER_DENIES user");
    check(&policy, &groups(&["silent"]), "crm/read", "{}", "DENY USER_DENIES user group:silent:");
    check(&policy, &groups(&["silent", "unheard-of"]), "crm/read", "{}", "DENY USER_DENIES user group:silent:");
    let agents = |agents: &[&str]| subject(&["sales"], "portal", agents, &[ALL]);
    check(&policy, &agents(&["elsewhere"]), "crm/read", "{}", "DENY APPLICATION_NOT_SERVED agent 0 agent:elsewhere:applications");
    check(&policy, &agents(&["b"]), "crm/write", "{}", "DENY AGENT_DENIES agent 0 agent:b:");
    let narrow = subject(&["sales"], "narrow", &["elsewhere"], &[ALL]);
    check(&policy, &narrow, "crm/read", "{}", "DENY USER_NOT_SERVED agent 0 agent:elsewhere:acts_for");
    check(&policy, &subject(&["sales"], "portal", &["a"], &["{}"]), "crm/read", "{}", "DENY TOOL_NOT_GRANTED hop 0");
}

#[test]
fn a_chain_is_as_strong_as_its_weakest_part() {
    let policy = policy();
    let chain = |agents: &[&str], scopes: &[&str]| subject(&["sales"], "portal", agents, scopes);
    check(&policy, &chain(&["a", "b"], &[ALL, ALL]), "crm/read", "{}", "PERMIT OK");
    check(&policy, &chain(&["a", "b"], &[ALL, ALL]), "crm/write", "{}", "DENY AGENT_DENIES agent 1 agent:b:");
    check(&policy, &chain(&["a", "b"], &[ALL, "{}"]), "crm/read", "{}", "DENY TOOL_NOT_GRANTED hop 1");
    check(
        &policy,
        &chain(&["a", "elsewhere"], &[ALL, ALL]),
        "crm/read",
        "{}",
        "DENY DELEGATION_NOT_ALLOWED agent 0 agent:a:delegates_to",
    );
    check(&policy, &chain(&["a", "b", "b"], &[ALL, ALL, ALL]), "crm/read", "{}", "DENY CHAIN_TOO_DEEP identity 2");
    check(&policy, &chain(&["b", "a", "b", "b"], &[ALL; 4]), "no/tool", "{}", "DENY CHAIN_TOO_DEEP identity 3");
    check(&policy, &chain(&["b", "ghost"], &[ALL, ALL]), "crm/read", "{}", "DENY AGENT_UNKNOWN identity 1");
    check(&policy, &chain(&[], &[ALL]), "crm/read", "{}", "DENY IDENTITY_MISSING identity");
    check(&policy, &chain(&["a"], &[]), "crm/read", "{}", "DENY IDENTITY_MISSING identity");
    let closed = r#"{"crm/read":{"id":{"constraint_type":"range","max":5}}}"#;
    check(&policy, &chain(&["a"], &[closed]), "crm/read", r#"{"id":5}"#, "PERMIT OK");
    check(&policy, &chain(&["a"], &[closed]), "crm/read", r#"{"id":6}"#, "DENY ARGUMENT_REFUSED hop 0");
    check(&policy, &chain(&["a"], &[closed]), "crm/read", r#"{"id":1,"x":1}"#, "DENY ARGUMENT_REFUSED hop 0");
}

#[test]
fn arguments_decide_conditional_entries() {
    let policy = policy();
    let junior = subject(&["sales", "juniors"], "portal", &["a"], &[ALL]);
    let denied = r#"DENY USER_DENIES user group:juniors:{"crm/write":{"args":{"amount":{"constraint_type":"range","min":100}}}}"#;
    check(&policy, &junior, "crm/write", r#"{"amount":99.5}"#, "PERMIT OK");
    check(&policy, &junior, "crm/write", r#"{"amount":100}"#, denied);
    check(&policy, &junior, "crm/write", r#"{}"#, denied);
    check(&policy, &junior, "crm/write", r#"{"amount":"1"}"#, denied);
    let sales = subject(&["juniors"], "portal", &["a"], &[ALL]);
    check(&policy, &sales, "crm/wipe", r#"{"id":7}"#, "PERMIT OK");
    check(&policy, &sales, "crm/wipe", r#"{"id":7.0}"#, "PERMIT OK");
    for arguments in [r#"{"id":8}"#, "{}", r#"{"id":7,"force":true}"#, r#"{"id":"7"}"#] {
        check(&policy, &sales, "crm/wipe", arguments, "DENY AGENT_DENIES agent 0 agent:a:");
    }
}

#[test]
fn approvals_are_listed_layer_by_layer() {
    let policy = policy();
    let refund = |max: u32, groups: &str, expires: &str| {
        format!(
            r#"{{"crm/refund":{{"args":{{"amount":{{"constraint_type":"range","max":{max}}}}},"by":["{groups}"],"expires_in":"{expires}"}}}}"#
        )
    };
    let chain = subject(&["juniors"], "portal", &["a", "b"], &[ALL, ALL]);
    check(
        &policy,
        &chain,
        "crm/refund",
        r#"{"amount":10}"#,
        &format!(
            r#"NEEDS_APPROVAL APPROVAL_REQUIRED agent 0 agent:a:{} [agent ["a-leads"] 1200000] [agent ["support-leads"] 600000]"#,
            refund(900, "a-leads", "20m")
        ),
    );
    check(&policy, &chain, "crm/refund", r#"{"amount":501}"#, "DENY AGENT_DENIES agent 1 agent:b:");
    let alone = subject(&["juniors"], "portal", &["b"], &[ALL]);
    check(
        &policy,
        &alone,
        "crm/refund",
        r#"{"amount":10}"#,
        &format!(
            r#"NEEDS_APPROVAL APPROVAL_REQUIRED agent 0 permission_set:refunds:{} [agent ["support-leads"] 600000]"#,
            refund(500, "support-leads", "10m")
        ),
    );
    check(&policy, &alone, "crm/refund", "{}", "DENY AGENT_DENIES agent 0 agent:b:");
    check(
        &policy,
        &subject(&["sales", "juniors"], "portal", &["a"], &[ALL]),
        "crm/wipe",
        r#"{"id":7}"#,
        r#"NEEDS_APPROVAL APPROVAL_REQUIRED user group:sales:{"crm/wipe":{"by":["leads"],"expires_in":"5m"}} [user ["leads"] 300000]"#,
    );
}

#[test]
fn tools_limits_and_schemas() {
    let (_, compiled) = policy();
    let tool = |name| compiled.tool(name).map(|tool| (tool.risk, tool.proof)).unwrap();
    assert_eq!(tool("crm/read"), (ToolRisk::Read, ProofClass::PerHandle));
    assert_eq!(tool("crm/write"), (ToolRisk::Write, ProofClass::PerCall));
    assert_eq!(tool("crm/wipe"), (ToolRisk::Destructive, ProofClass::PerCall));
    assert_eq!(tool("pinned/tool"), (ToolRisk::Read, ProofClass::None));
    assert!(compiled.tool("crm").is_none());
    assert_eq!(compiled.tools().map(|tool| tool.name.as_str()).collect::<Vec<_>>()[..2], ["crm/deep/er", "crm/read"]);
    assert_eq!(compiled.agent_limits(&"spiffe://t/a".into()), Some(SessionLimits { lifetime_max_s: Some(7200), hops_max: 1 }));
    assert_eq!(compiled.agent_limits(&"spiffe://t/b".into()), Some(SessionLimits { lifetime_max_s: None, hops_max: 8 }));
    assert_eq!(compiled.agent_limits(&"spiffe://t/c".into()), None);
    let subject = subject(&["sales"], "portal", &["a"], &[ALL]);
    let resolved = compiled.resolve(&subject);
    let arguments = parse_object(b"{}").unwrap();
    for (last, reason) in [(1, Reason::Ok), (2, Reason::ToolChanged)] {
        let mut schema = [0; 32];
        schema[31] = last;
        let call = ToolCall { tool_schema_sha256: Some(schema), ..ToolCall::new("pinned/tool", &arguments) };
        assert_eq!(compiled.evaluate(&resolved, &subject, &call).reason, reason);
    }
}

#[test]
fn reach_says_what_arguments_can_change() {
    let (_, compiled) = policy();
    let check = |subject: &DelegationSubject, tool: &str, expected: &str| {
        let resolved = compiled.resolve(subject);
        let reach = compiled.tool_reach(&resolved, subject, tool);
        let layer = reach.layer.map_or("-", |layer| layer.as_str());
        assert_eq!(
            format!("{} {} {layer} {}", reach.effect.as_str(), reach.reason, reach.depends_on_arguments),
            expected,
            "{tool}"
        );
    };
    let junior = subject(&["juniors"], "portal", &["a"], &[ALL]);
    check(&junior, "crm/read", "PERMIT OK - false");
    check(&junior, "crm/write", "PERMIT OK - true");
    check(&junior, "crm/wipe", "PERMIT OK - true");
    check(&junior, "crm/refund", "NEEDS_APPROVAL APPROVAL_REQUIRED agent true");
    check(&junior, "crm/deep/er", "DENY AGENT_DENIES agent false");
    check(&junior, "no/tool", "DENY TOOL_UNKNOWN tool false");
    check(&subject(&["sales"], "portal", &["a"], &[ALL]), "crm/wipe", "NEEDS_APPROVAL APPROVAL_REQUIRED user true");
    check(&subject(&["sales"], "portal", &["ghost"], &[ALL]), "crm/read", "DENY AGENT_UNKNOWN identity false");
    check(&subject(&["sales"], "portal", &["a"], &["{}"]), "crm/read", "DENY TOOL_NOT_GRANTED hop false");
    check(&subject(&["sales"], "nowhere", &["a"], &[ALL]), "crm/read", "DENY APPLICATION_UNKNOWN application false");
}

#[test]
fn an_explanation_has_every_layer() {
    let (_, compiled) = policy();
    let subject = subject(&["juniors"], "narrow", &["a", "b"], &[ALL, "{}"]);
    let arguments = parse_object(b"{}").unwrap();
    let explain = |tool| {
        let answers = compiled.explain(&compiled.resolve(&subject), &subject, &ToolCall::new(tool, &arguments));
        answers
            .iter()
            .map(|answer| {
                format!("{}{} {}", answer.layer, answer.hop.map_or(String::new(), |hop| hop.to_string()), answer.reason)
            })
            .collect::<Vec<_>>()
    };
    let expected = [
        "tool OK",
        "user OK",
        "application APPLICATION_DENIES",
        "agent0 OK",
        "agent1 AGENT_DENIES",
        "hop0 OK",
        "hop1 TOOL_NOT_GRANTED",
        "guardrail OK",
    ];
    assert_eq!(explain("pinned/tool")[1..], expected[1..]);
    assert_eq!(explain("pinned/tool")[0], "tool TOOL_CHANGED");
    let mut plain = expected.map(str::to_owned);
    plain[1] = "user USER_DENIES".to_owned();
    assert_eq!(explain("crm/write"), plain, "a deny of the user's layer fires without arguments");
    assert_eq!(explain("no/tool"), ["tool TOOL_UNKNOWN"]);
}

#[test]
fn what_another_policy_resolved_is_resolved_anew() {
    let (_, old) = policy();
    let new = CompiledPolicy::compile(&documents("{kind: tool, id: a/first}")).unwrap();
    let subject = subject(&["sales"], "portal", &["a"], &[ALL]);
    let resolved = old.resolve(&subject);
    let arguments = parse_object(b"{}").unwrap();
    let call = ToolCall::new("a/first", &arguments);
    assert_eq!(new.evaluate(&resolved, &subject, &call).reason, Reason::AgentUnknown);
    assert_eq!(new.tool_reach(&resolved, &subject, "a/first").reason, Reason::AgentUnknown);
}
