//! The revocation in the demo: one agent is revoked while calls are made, and another agent of the same user goes on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tonic::transport::Channel;

use super::super::CommandFailure;
use super::super::call_failure::call_failure;
use super::super::client::{AdminClient, connect, read_operator_key};
use super::super::output::{CommandOutput, bold, paint};
use super::company::{AUDIENCE, DemoChain, DemoCompany, RootContent, agent_id, now};
use super::prove;
use crate::api::r#gen as wire;
use crate::api::r#gen::check_request::Credential;
use crate::api::r#gen::decision_service_client::DecisionServiceClient;
use crate::app::App;

/// How long calls are made before the revocation, and after its acknowledgement.
const FLOW_DURATION: Duration = Duration::from_millis(300);
/// Longest wait for the calls to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The measured effect of the revocation.
pub(super) struct KillReport {
    permits_before: usize,
    first_denial: Option<Duration>,
    reason: String,
    permits_after_denial: usize,
    others_permitted: usize,
    others_denied: usize,
}

/// The answers to one agent's calls, each with the time of its arrival.
struct CallFlow {
    answers: Vec<(Instant, wire::Effect, String)>,
}

impl KillReport {
    pub(super) fn is_expected(&self) -> bool {
        self.first_denial.is_some()
            && self.permits_before > 0
            && self.permits_after_denial == 0
            && self.reason == "AGENT_SUSPENDED"
            && self.others_permitted > 0
            && self.others_denied == 0
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "permits_before": self.permits_before,
            "acknowledged_to_first_denial_ms": self.first_denial.map(|took| took.as_secs_f64() * 1000.0),
            "reason": self.reason,
            "permits_after_first_denial": self.permits_after_denial,
            "other_agent_permits": self.others_permitted,
            "other_agent_denials": self.others_denied,
        })
    }
}

pub(super) async fn run(
    company: &DemoCompany,
    app: &App,
    data: &Path,
    output: &CommandOutput,
) -> Result<KillReport, CommandFailure> {
    output.line("");
    output.line(&paint("the kill switch", bold()));
    let target = format!("http://{}", app.addresses().decisions);
    let root = |application, agent, session, tools| {
        company.root(&RootContent { user: "ana", group: "ap", application, agent, session, tools }, now())
    };
    let revoked_flow = root("erp", "finance", "s-doomed", &["invoices/read"])?;
    let other = root("calendar", "scheduling-assistant", "s-other", &["calendar/events.read"])?;
    let over = Arc::new(AtomicBool::new(false));
    let revoked_flow = start_calls(&target, &revoked_flow, "invoices/read", over.clone()).await?;
    let other = start_calls(&target, &other, "calendar/events.read", over.clone()).await?;

    let admin = format!("http://{}", app.addresses().admin);
    let key = read_operator_key(&data.join("local.jwk"))?;
    let mut client = AdminClient::over_channel(connect(&admin).await?, admin, vec![key], None).await?;
    tokio::time::sleep(FLOW_DURATION).await;
    let request = wire::RevokeRequest {
        target: Some(wire::RevocationTarget { kind: "agent".to_owned(), key: vec![agent_id("finance")] }),
        reason: "demo: the agent's key leaked".to_owned(),
        ..Default::default()
    };
    let revoked = client.revoke(request).await?.message;
    let acknowledged = Instant::now();
    tokio::time::sleep(FLOW_DURATION).await;
    over.store(true, Ordering::Release);
    let ended = |flow: tokio::task::JoinHandle<Result<CallFlow, CommandFailure>>| async move {
        let ended = tokio::time::timeout(END_TIMEOUT, flow).await;
        ended.map_err(|_| CommandFailure::failed("the calls did not end"))?.map_err(CommandFailure::failed)?
    };
    let kill = build_kill_report(&ended(revoked_flow).await?, &ended(other).await?, acknowledged);
    print(&kill, &revoked.revision, output);
    Ok(kill)
}

/// Calls by handle in a loop, in a task and on a connection of its own, until `over` is set.
async fn start_calls(
    target: &str,
    chain: &DemoChain<'_>,
    tool: &'static str,
    over: Arc<AtomicBool>,
) -> Result<tokio::task::JoinHandle<Result<CallFlow, CommandFailure>>, CommandFailure> {
    let mut client = DecisionServiceClient::new(connect(target).await?);
    let first = wire::CheckRequest {
        credential: Some(Credential::Presentation(wire::Presentation {
            aat_chain: chain.tokens.clone(),
            aat_pop: prove(chain, tool, "{}")?.into(),
        })),
        tool: tool.to_owned(),
        audience: AUDIENCE.to_owned(),
        want_handle: true,
        ..Default::default()
    };
    let first = client.check(first).await.map_err(|status| call_failure(&status, target))?.into_inner();
    if first.handle.is_empty() {
        return Err(CommandFailure::failed(format!("no handle was given: {} {}", first.reason, first.message)));
    }
    let (handle, target) = (first.handle, target.to_owned());
    Ok(tokio::spawn(async move {
        let mut flow = CallFlow { answers: Vec::new() };
        while !over.load(Ordering::Acquire) {
            let answer = call(&mut client, handle.clone(), tool, &target).await?;
            flow.answers.push((Instant::now(), answer.effect(), answer.reason));
        }
        Ok(flow)
    }))
}

async fn call(
    client: &mut DecisionServiceClient<Channel>,
    handle: bytes::Bytes,
    tool: &str,
    target: &str,
) -> Result<wire::CheckResponse, CommandFailure> {
    let request = wire::CheckRequest {
        credential: Some(Credential::Handle(handle)),
        tool: tool.to_owned(),
        audience: AUDIENCE.to_owned(),
        ..Default::default()
    };
    Ok(client.check(request).await.map_err(|status| call_failure(&status, target))?.into_inner())
}

fn build_kill_report(revoked_flow: &CallFlow, other: &CallFlow, acknowledged: Instant) -> KillReport {
    let is_permit = |effect: &wire::Effect| *effect == wire::Effect::Permit;
    let first = revoked_flow.answers.iter().position(|(_, effect, _)| !is_permit(effect));
    let (before, after) = revoked_flow.answers.split_at(first.unwrap_or(revoked_flow.answers.len()));
    let permitted = other.answers.iter().filter(|(_, effect, _)| is_permit(effect)).count();
    KillReport {
        permits_before: before.len(),
        // A denial may arrive before the acknowledgement, which is correct; it counts as zero time.
        first_denial: after.first().map(|(at, _, _)| at.saturating_duration_since(acknowledged)),
        reason: after.first().map(|(_, _, reason)| reason.clone()).unwrap_or_default(),
        permits_after_denial: after.iter().filter(|(_, effect, _)| is_permit(effect)).count(),
        others_permitted: permitted,
        others_denied: other.answers.len() - permitted,
    }
}

fn print(kill: &KillReport, revision: &str, output: &CommandOutput) {
    output.line(&format!(
        "the finance agent called without pause ({} permits), then: portcullis revoke agent {}",
        kill.permits_before,
        agent_id("finance")
    ));
    match kill.first_denial {
        Some(took) => output.line(&format!(
            "first denial {:.1} ms after the acknowledged revocation ({}, revision {}); permits after it: {}",
            took.as_secs_f64() * 1000.0,
            kill.reason,
            revision.rsplit('.').next().unwrap_or_default(),
            kill.permits_after_denial
        )),
        None => output.line("no denial came"),
    }
    output.line(&format!(
        "the same user's scheduling assistant went on: {} permits, {} denials",
        kill.others_permitted, kill.others_denied
    ));
}
