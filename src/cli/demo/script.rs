//! The calls of the demo, each with its expected answer.

use serde_json::json;

use super::super::CommandFailure;
use super::company::{DemoChain, DemoCompany, RootContent, new_key, now};
use super::prove;

/// The proof that is sent with a call.
pub(super) enum StepProof {
    /// Made for this very call.
    Fresh,
    /// Made for other arguments.
    ForArguments(&'static str),
    /// A proof that was used before.
    Reused(String),
    /// No proof, because only the holder of the agent's key can make one.
    None,
}

/// One call, with its expected answer.
pub(super) struct DemoStep<'a> {
    pub(super) agent: &'static str,
    pub(super) story: &'static str,
    pub(super) chain: DemoChain<'a>,
    pub(super) tool: &'static str,
    pub(super) arguments: &'static str,
    pub(super) proof: StepProof,
    pub(super) expected: (&'static str, &'static str),
}

const PERMIT: (&str, &str) = ("PERMIT", "OK");
const APPROVAL: (&str, &str) = ("NEEDS_APPROVAL", "APPROVAL_REQUIRED");
const AGENT_DENIES: (&str, &str) = ("DENY", "AGENT_DENIES");

/// The calls of the demo, in order.
pub(super) fn steps(company: &DemoCompany) -> Result<Vec<DemoStep<'_>>, CommandFailure> {
    let mut steps = four_agents(company)?;
    steps.extend(confused_deputy(company)?);
    steps.extend(sub_agent(company)?);
    steps.extend(attacks(company)?);
    Ok(steps)
}

fn step<'a>(
    chain: &DemoChain<'a>,
    agent: &'static str,
    story: &'static str,
    (tool, arguments): (&'static str, &'static str),
    expected: (&'static str, &'static str),
) -> DemoStep<'a> {
    DemoStep { agent, story, chain: chain.clone(), tool, arguments, proof: StepProof::Fresh, expected }
}

fn sales<'a>(company: &'a DemoCompany) -> Result<DemoChain<'a>, CommandFailure> {
    let tools = ["crm/leads.read", "crm/notes.read", "proposals/draft.create", "hr/self.read"];
    let root = RootContent {
        user: "sam",
        group: "sales",
        application: "crm-portal",
        agent: "sales-assistant",
        session: "s-sales",
        tools: &tools,
    };
    company.root(&root, now())
}

fn four_agents(company: &DemoCompany) -> Result<Vec<DemoStep<'_>>, CommandFailure> {
    let root = |user, group, application, agent, session, tools| {
        company.root(&RootContent { user, group, application, agent, session, tools }, now())
    };
    let sales = sales(company)?;
    let support = root("sue", "support", "helpdesk", "support", "s-support", &["tickets/customer.read", "payments/refund"])?;
    let devops_tools = &["incidents/open", "diagnostics/logs.read", "deploy/rollout"];
    let devops = root("dev", "devops", "ops-console", "devops", "s-devops", devops_tools)?;
    let finance = root("ana", "ap", "erp", "finance", "s-finance", &["payments/prepare", "payments/execute"])?;
    let sales_agent = "sales-assistant";
    Ok(vec![
        step(&sales, sales_agent, "reads the CRM", ("crm/leads.read", r#"{"id":7}"#), PERMIT),
        step(&sales, sales_agent, "drafts a proposal", ("proposals/draft.create", r#"{"discount":10}"#), PERMIT),
        step(&sales, sales_agent, "too large a discount", ("proposals/draft.create", r#"{"discount":40}"#), AGENT_DENIES),
        step(&sales, sales_agent, "HR, though its user may", ("hr/self.read", "{}"), AGENT_DENIES),
        step(&support, "support", "reads a ticket", ("tickets/customer.read", r#"{"id":3}"#), PERMIT),
        step(&support, "support", "a refund", ("payments/refund", r#"{"amount":120}"#), APPROVAL),
        step(&support, "support", "too large a refund", ("payments/refund", r#"{"amount":900}"#), AGENT_DENIES),
        step(&devops, "devops", "opens an incident", ("incidents/open", r#"{"title":"disk full"}"#), PERMIT),
        step(&devops, "devops", "gathers diagnostics", ("diagnostics/logs.read", r#"{"host":"db1"}"#), PERMIT),
        step(&devops, "devops", "changes production", ("deploy/rollout", r#"{"service":"api"}"#), APPROVAL),
        step(&finance, "finance", "prepares a payment", ("payments/prepare", r#"{"amount":90,"currency":"EUR"}"#), PERMIT),
        step(&finance, "finance", "executes it", ("payments/execute", r#"{"id":7}"#), AGENT_DENIES),
    ])
}

/// The analyst may read payroll and pay. An agent that acts for the analyst may do neither.
fn confused_deputy(company: &DemoCompany) -> Result<Vec<DemoStep<'_>>, CommandFailure> {
    let root = |application, session, tools| {
        company.root(&RootContent { user: "ana", group: "ap", application, agent: "scheduling-assistant", session, tools }, now())
    };
    let calendar = root("calendar", "s-calendar", &["calendar/events.read"])?;
    let deputy = root("erp", "s-deputy", &["payroll/read", "payments/execute"])?;
    let agent = "scheduling-assistant";
    Ok(vec![
        step(&calendar, agent, "reads the analyst's calendar", ("calendar/events.read", "{}"), PERMIT),
        step(&deputy, agent, "poisoned invite: read payroll", ("payroll/read", r#"{"month":"2026-10"}"#), AGENT_DENIES),
        step(&deputy, agent, "poisoned invite: pay", ("payments/execute", r#"{"id":7}"#), AGENT_DENIES),
    ])
}

fn sub_agent(company: &DemoCompany) -> Result<Vec<DemoStep<'_>>, CommandFailure> {
    let sales = sales(company)?;
    let at_most_5 = json!({ "proposals/draft.create": { "discount": { "constraint_type": "range", "max": 5 } } });
    let narrowed = company.hop(&sales, "proposal-writer", &at_most_5, now())?;
    let mut widening = at_most_5;
    if let Some(tools) = widening.as_object_mut() {
        tools.insert("payments/execute".to_owned(), json!({}));
    }
    let widened = company.hop(&sales, "proposal-writer", &widening, now())?;
    let agent = "proposal-writer";
    let draft = "proposals/draft.create";
    Ok(vec![
        step(&narrowed, agent, "a part handed on", (draft, r#"{"discount":5}"#), PERMIT),
        step(&narrowed, agent, "beyond that part", (draft, r#"{"discount":8}"#), ("DENY", "ARGUMENT_REFUSED")),
        step(&narrowed, agent, "what only its parent may", ("crm/leads.read", r#"{"id":7}"#), AGENT_DENIES),
        step(&widened, agent, "a hop that adds a tool", ("payments/execute", r#"{"id":7}"#), ("DENY", "CHAIN_WIDENED")),
    ])
}

fn attacks(company: &DemoCompany) -> Result<Vec<DemoStep<'_>>, CommandFailure> {
    let sales = sales(company)?;
    let forger = new_key()?;
    let tools = ["payments/execute"];
    let root = RootContent { user: "ana", group: "ap", application: "erp", agent: "finance", session: "s-forged", tools: &tools };
    let forged = company.root_signed_by(&forger, &root, now())?;
    let (draft, small) = ("proposals/draft.create", r#"{"discount":1}"#);
    let used = prove(&sales, draft, small)?;
    let mut first = step(&sales, "sales-assistant", "a proof, used once", (draft, small), PERMIT);
    first.proof = StepProof::Reused(used.clone());
    let mut again = step(&sales, "attacker", "the same proof again", (draft, small), ("DENY", "PROOF_REPLAYED"));
    again.proof = StepProof::Reused(used);
    let mut other =
        step(&sales, "attacker", "a proof for other arguments", (draft, r#"{"discount":15}"#), ("DENY", "PROOF_INVALID"));
    other.proof = StepProof::ForArguments(small);
    let mut stolen = step(&sales, "attacker", "a stolen chain without its key", (draft, small), ("DENY", "PROOF_MISSING"));
    stolen.proof = StepProof::None;
    let forged = step(&forged, "attacker", "a forged chain", ("payments/execute", r#"{"id":7}"#), ("DENY", "TOKEN_SIGNATURE"));
    Ok(vec![first, again, other, stolen, forged])
}
