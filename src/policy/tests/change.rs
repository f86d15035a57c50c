//! Tests of changes to some agents: the answers equal those of a new compilation, and unchanged parts stay shared.

use crate::model::json::parse_object;
use crate::model::request::ToolCall;

use super::super::compile::CompiledPolicy;
use super::{documents, subject};

const BASE: &str = "
{kind: server, id: crm, tools: {read: {risk: read}, write: {risk: write}}}
---
{kind: group, id: sales, allow: ['*']}
---
{kind: application, id: portal, allow: ['*']}
---
{kind: permission_set, id: reads, allow: [crm/read]}
";

const KEY: &str = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k";

fn agent(name: &str, more: &str) -> String {
    format!("\n---\n{{kind: agent, id: spiffe://t/{name}, applications: [portal], acts_for: [sales], {more}}}\n")
}

fn agent_documents(agents: &[(&str, &str)]) -> Vec<super::Document> {
    let text: String = agents.iter().map(|(name, more)| agent(name, more)).collect();
    documents(&text)
}

#[test]
fn equal_permissions_are_stored_once() {
    let mut text = BASE.to_owned();
    for n in 0..500 {
        let more = ["allow: [crm/read, crm/write]", "allow: [crm/write, crm/read]", "include: [reads], deny: [crm/write]"][n % 3];
        text += &agent(&n.to_string(), more);
    }
    let compiled = CompiledPolicy::compile(&documents(&text)).unwrap();
    assert_eq!(compiled.agent_count(), 500);
    // The sets of the group and of the application are equal, and so are those of two agents.
    assert_eq!(compiled.permission_set_count(), 3);
}

#[test]
fn a_change_answers_as_a_new_policy_would() {
    let before = [("a", "allow: [crm/read]"), ("b", "allow: [crm/write], delegates_to: [spiffe://t/a]")];
    let mut all = documents(BASE);
    all.extend(agent_documents(&before));
    let old = CompiledPolicy::compile(&all).unwrap();
    let put =
        agent_documents(&[("a", "include: [reads], allow: [crm/write], delegates_to: [spiffe://t/c]"), ("c", "allow: ['*']")]);
    let new = old.with_agents(&put, &["spiffe://t/b".into()]).unwrap();
    let scope = r#"{"crm/read":{},"crm/write":{}}"#;
    let arguments = parse_object(b"{}").unwrap();
    let check = |compiled: &CompiledPolicy, agents: &[&str], tool: &str, expected: &str| {
        let subject = subject(&["sales"], "portal", agents, &vec![scope; agents.len()]);
        let call = ToolCall::new(tool, &arguments);
        let verdict = compiled.evaluate(&compiled.resolve(&subject), &subject, &call);
        assert_eq!(verdict.reason.as_str(), expected, "{agents:?} {tool}");
    };
    check(&old, &["a"], "crm/write", "AGENT_DENIES");
    check(&old, &["b", "a"], "crm/read", "AGENT_DENIES");
    check(&old, &["c"], "crm/read", "AGENT_UNKNOWN");
    check(&new, &["a"], "crm/write", "OK");
    check(&new, &["a", "c"], "crm/read", "OK");
    check(&new, &["b"], "crm/write", "AGENT_UNKNOWN");
    assert_eq!((old.agent_count(), new.agent_count()), (2, 2));
    drop(old);
    let newer = new.with_agents(&agent_documents(&[("a", "allow: ['*']")]), &["spiffe://t/ghost".into()]).unwrap();
    check(&newer, &["a"], "crm/read", "OK");
    drop(new);
    // The sets of the agents, the group and the application are all equal now.
    assert_eq!(newer.permission_set_count(), 1);
}

#[test]
fn a_change_that_is_refused() {
    let mut all = documents(BASE);
    all.extend(agent_documents(&[("a", &format!("keys: [{KEY}]"))]));
    let old = CompiledPolicy::compile(&all).unwrap();
    let check = |text: &str, expected: &[&str]| {
        let said = old
            .with_agents(&documents(text), &[])
            .map(|_| ())
            .map_err(|said| said.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(
            said,
            if expected.is_empty() { Ok(()) } else { Err(expected.iter().map(|line| (*line).to_owned()).collect()) },
            "{text}"
        );
    };
    check(&format!("{{kind: agent, id: spiffe://t/a, keys: [{KEY}]}}"), &[]);
    check(
        "{kind: agent, id: spiffe://t/b, acts_for: [salse]}",
        &["p.yaml:1:44: error: unknown group `salse` (did you mean `sales`?)"],
    );
    check(
        "{kind: agent, id: spiffe://t/b, allow: [crm/raed]}",
        &["p.yaml:1:41: error: unknown tool `crm/raed` (did you mean `crm/read`?)"],
    );
    check("{kind: group, id: g}", &["p.yaml:1:19: error: only agents can be changed one by one"]);
    check(
        "{kind: agent, id: spiffe://t/b}\n---\n{kind: agent, id: spiffe://t/b}",
        &["p.yaml:3:19: error: agent `spiffe://t/b` is put twice"],
    );
}
