//! The example policy: nothing is wrong with it, and the four agents may do what the mission says they may.

use std::path::Path;

use crate::model::json::parse_object;
use crate::model::request::Call;
use crate::testing::reference;

use super::super::compile::Compiled;
use super::super::document::Document;
use super::super::source::{parse, read_folder};
use super::super::validate;
use super::subject;

fn four_agents() -> Vec<Document> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/policies/four-agents");
    let parsed = parse(&read_folder(&folder).unwrap());
    assert_eq!(parsed.diagnostics, []);
    assert_eq!(validate::check(&parsed.documents), []);
    parsed.documents
}

#[test]
fn the_four_agents_may_what_the_mission_says() {
    let documents = four_agents();
    let compiled = Compiled::compile(&documents).unwrap();
    let scope: String = compiled.tools().map(|tool| format!(r#","{}":{{}}"#, tool.name)).collect();
    let scope = format!("{{{}}}", scope.trim_start_matches(','));
    let check = |group: &str, application: &str, agents: &[&str], tool: &str, arguments: &str, expected: &str| {
        let mut subject = subject(&[group], application, &[], &vec![scope.as_str(); agents.len()]);
        subject.agents = agents.iter().map(|name| format!("spiffe://acme.example/agent/{name}").as_str().into()).collect();
        let arguments = parse_object(arguments.as_bytes()).unwrap();
        let call = Call::new(tool, &arguments);
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
