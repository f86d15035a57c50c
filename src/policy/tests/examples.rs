//! Tests of the example policies: they have no mistakes, their own tests pass, and the four agents have the access that their
//! description states.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::model::constraint::ConstraintMap;
use crate::model::ids::{SessionId, TaskId};
use crate::model::json::parse_object;
use crate::model::request::{DelegationSubject, TokenScope, ToolCall};
use crate::testing::reference;

use super::super::compile::CompiledPolicy;
use super::super::document::{Document, DocumentBody, ExpectedCall, TestSpec};
use super::super::source::{SourceFile, parse_files, read_folder};
use super::super::validate;
use super::subject;

/// The folders of `examples/policies`.
pub(super) const FOLDERS: &[&str] = &["coding-agents", "customer-support", "four-agents", "research-team"];

/// The files of an example.
pub(super) fn folder(name: &str) -> Vec<SourceFile> {
    read_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/policies").join(name)).unwrap()
}

/// The documents of an example. `policy check` reports nothing for them.
fn documents(name: &str) -> Vec<Document> {
    let parsed = parse_files(&folder(name));
    assert_eq!(parsed.diagnostics, [], "{name}");
    assert_eq!(validate::check_policy(&parsed.documents), [], "{name}");
    parsed.documents
}

#[test]
fn every_example_is_here() {
    let folders = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/policies")).unwrap();
    let mut names: Vec<String> = folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, FOLDERS);
}

#[test]
fn every_example_does_what_its_tests_say() {
    for name in FOLDERS {
        let documents = documents(name);
        let compiled = CompiledPolicy::compile(&documents).unwrap();
        let mut told: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
        for document in &documents {
            if let DocumentBody::Test(test) = &document.body {
                for expectation in &test.expect {
                    expect(&compiled, &documents, test, expectation, &format!("{name}, {}", document.key.id));
                    let leaf = test.agents.last().unwrap().to_string();
                    told.entry(leaf).or_default().insert(expectation.effect.as_str());
                }
            }
        }
        for document in &documents {
            if let DocumentBody::Agent(agent) = &document.body {
                let wants = told.get(agent.id.as_str()).cloned().unwrap_or_default();
                assert!(wants.contains("PERMIT") && wants.contains("DENY"), "{name}: {} is shown with {wants:?}", agent.id);
            }
        }
    }
}

/// Evaluates a call of a test with both evaluators.
fn expect(compiled: &CompiledPolicy, documents: &[Document], test: &TestSpec, expectation: &ExpectedCall, place: &str) {
    let everything = TokenScope { tools: [(expectation.tool.clone(), ConstraintMap::unconstrained())].into() };
    let scope = test.scope.clone().unwrap_or(everything);
    let subject = DelegationSubject {
        user: test.user.clone(),
        groups: test.groups.clone(),
        application: test.application.clone(),
        agents: test.agents.clone(),
        scopes: vec![scope; test.agents.len()],
        session: SessionId::from("s"),
        task: TaskId::from("t"),
    };
    let call = ToolCall {
        environment: expectation.environment.as_ref().or(test.environment.as_ref()),
        unix_s: expectation.at_unix_s.or(test.at_unix_s).unwrap_or(0),
        ..ToolCall::new(&expectation.tool, &expectation.arguments)
    };
    let verdict = compiled.evaluate(&compiled.resolve(&subject), &subject, &call);
    let place = format!("{place}, line {}", expectation.line);
    assert_eq!(verdict.effect, expectation.effect, "{place}: {verdict:?}");
    assert!(expectation.reason.is_none_or(|reason| reason == verdict.reason), "{place}: {verdict:?}");
    assert!(expectation.layer.is_none_or(|layer| Some(layer) == verdict.layer), "{place}: {verdict:?}");
    assert_eq!(verdict.prepared.is_empty(), !expectation.assume_prepared, "{place}: {verdict:?}");
    assert_eq!(reference::decide(documents, &subject, &call).reason, verdict.reason, "{place}");
}

#[test]
fn the_four_agents_may_what_the_mission_says() {
    let documents = documents("four-agents");
    let compiled = CompiledPolicy::compile(&documents).unwrap();
    let scope: String = compiled.tools().map(|tool| format!(r#","{}":{{}}"#, tool.name)).collect();
    let scope = format!("{{{}}}", scope.trim_start_matches(','));
    let check = |group: &str, application: &str, agents: &[&str], tool: &str, arguments: &str, expected: &str| {
        let mut subject = subject(&[group], application, &[], &vec![scope.as_str(); agents.len()]);
        subject.agents = agents.iter().map(|name| format!("spiffe://acme.example/agent/{name}").as_str().into()).collect();
        let arguments = parse_object(arguments.as_bytes()).unwrap();
        // A Wednesday, 9:30.
        let call = ToolCall { unix_s: 1_795_599_000, ..ToolCall::new(tool, &arguments) };
        let verdict = compiled.evaluate(&compiled.resolve(&subject), &subject, &call);
        assert_eq!(verdict.reason.as_str(), expected, "{agents:?} {tool} {arguments:?}");
        assert_eq!(reference::decide(&documents, &subject, &call).reason, verdict.reason);
    };
    let sales = |tool: &str, arguments: &str, expected: &str| {
        check("sales", "crm-portal", &["sales-assistant"], tool, arguments, expected)
    };
    sales("crm/leads.read", "{}", "OK");
    sales("proposals/draft.create", r#"{"discount":15,"text":"…"}"#, "OK");
    sales("proposals/draft.create", r#"{"discount":16}"#, "AGENT_DENIES");
    sales("proposals/draft.create", "{}", "AGENT_DENIES");
    sales("crm/leads.update", "{}", "AGENT_DENIES");
    sales("hr/self.read", "{}", "AGENT_DENIES");
    sales("hr/records.read", "{}", "USER_DENIES");
    let writer = |tool: &str, arguments: &str, expected: &str| {
        check("sales", "crm-portal", &["sales-assistant", "proposal-writer"], tool, arguments, expected);
    };
    writer("proposals/draft.create", r#"{"discount":10}"#, "OK");
    writer("proposals/draft.create", r#"{"discount":11}"#, "AGENT_DENIES");
    writer("crm/leads.read", "{}", "AGENT_DENIES");
    check("sales", "crm-portal", &["proposal-writer", "sales-assistant"], "crm/notes.read", "{}", "CHAIN_TOO_DEEP");
    check("sales", "crm-portal", &["sales-assistant", "support"], "crm/notes.read", "{}", "DELEGATION_NOT_ALLOWED");
    let support =
        |tool: &str, arguments: &str, expected: &str| check("support", "helpdesk", &["support"], tool, arguments, expected);
    support("tickets/customer.read", "{}", "OK");
    support("tickets/reply", "{}", "AGENT_DENIES");
    support("payments/refund", r#"{"amount":500}"#, "APPROVAL_REQUIRED");
    support("payments/refund", r#"{"amount":500.01}"#, "AGENT_DENIES");
    support("payments/refund", r#"{"amount":-1}"#, "AGENT_DENIES");
    check("sales", "helpdesk", &["support"], "tickets/customer.read", "{}", "USER_DENIES");
    check("support", "crm-portal", &["support"], "tickets/customer.read", "{}", "APPLICATION_DENIES");
    let devops = |tool: &str, expected: &str| check("devops", "ops-console", &["devops"], tool, "{}", expected);
    devops("incidents/open", "OK");
    devops("diagnostics/trace", "OK");
    devops("incidents/close", "AGENT_DENIES");
    devops("deploy/rollout", "APPROVAL_REQUIRED");
    let finance = |tool: &str, arguments: &str, expected: &str| check("ap", "erp", &["finance"], tool, arguments, expected);
    finance("payments/prepare", r#"{"amount":90,"currency":"EUR"}"#, "OK");
    finance("payments/prepare", r#"{"amount":90,"currency":"XAU"}"#, "AGENT_DENIES");
    finance("payments/execute", r#"{"id":7}"#, "AGENT_DENIES");
    finance("payroll/read", "{}", "AGENT_DENIES");
    let deputy =
        |application: &str, tool: &str, expected: &str| check("ap", application, &["scheduling-assistant"], tool, "{}", expected);
    deputy("calendar", "calendar/events.create", "OK");
    deputy("calendar", "payroll/read", "APPLICATION_DENIES");
    deputy("erp", "payroll/read", "AGENT_DENIES");
    deputy("erp", "payments/execute", "AGENT_DENIES");
    deputy("crm-portal", "calendar/events.create", "APPLICATION_DENIES");
}
