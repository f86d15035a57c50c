//! `portcullis demo`: shows the whole program in seconds to a first-time user.
//!
//! It uses a real server on free loopback ports, real chains, real gRPC calls and a real revocation. Every answer is compared with
//! the expected one. Look next at `demo/script.rs`, which lists the calls.

mod company;
mod kill;
mod script;

use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tonic::transport::Channel;

use super::call_failure::call_failure;
use super::client::connect;
use super::output::{self, CommandOutput, paint};
use super::{CommandFailure, check};
use crate::api::r#gen as wire;
use crate::api::r#gen::check_request::Credential;
use crate::api::r#gen::decision_service_client::DecisionServiceClient;
use crate::app::App;
use crate::config::Settings;
use crate::model::json::parse_object;
use crate::token::{ProofCall, issue};
use company::{AUDIENCE, DemoChain, DemoCompany, TempFolder, now};
use script::DemoStep;

/// Show it all in seconds; exits 1 if any answer is not the expected one
#[derive(Debug, Args)]
pub(super) struct DemoArgs {}

/// One call that was made, with its answer.
struct DemoCall {
    agent: &'static str,
    story: &'static str,
    call: String,
    answer: wire::CheckResponse,
    expected: (&'static str, &'static str),
    latency: Duration,
}

impl DemoCall {
    fn is_expected(&self) -> bool {
        (check::effect_name(self.answer.effect()), self.answer.reason.as_str()) == self.expected
    }
}

pub(super) fn run(_arguments: DemoArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let scratch = TempFolder::new()?;
    let policies = scratch.path().join("policies");
    let company = DemoCompany::create(&policies)?;
    let free = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let settings = Settings {
        data: scratch.path().join("data"),
        create: true,
        policies: Some(policies),
        listen: free,
        http_listen: free,
        admin_listen: free,
        logs: false,
        ..Settings::default()
    };
    let app = App::start(settings).map_err(CommandFailure::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CommandFailure::failed(format!("the runtime could not be started: {error}")))?;
    let run_result = runtime.block_on(run_calls(&company, &app, scratch.path(), output));
    // The server would wait for the clients' connections, which end with their runtime.
    drop(runtime);
    let stopped = app.stop().map_err(CommandFailure::from);
    run_result.and(stopped)
}

async fn run_calls(
    company: &DemoCompany,
    app: &App,
    data: &std::path::Path,
    output: &CommandOutput,
) -> Result<(), CommandFailure> {
    let target = format!("http://{}", app.addresses().decisions);
    output.line(&paint("portcullis demo", output::bold()));
    output.line(&format!(
        "a server on {} with SQLite in a temporary folder; keys, chains and proofs are real, calls go over gRPC",
        app.addresses().decisions
    ));
    output.line("");
    let client = DecisionServiceClient::new(connect(&target).await?);
    wait_past_ready_second().await;

    let steps = script::steps(company)?;
    let progress = progress_bar(steps.len(), output);
    let mut asked = Vec::new();
    for step in steps {
        asked.push(send_call(&client, step, &target).await?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    print(&asked, output);
    let kill = kill::run(company, app, &data.join("data"), output).await?;

    let wrong = asked.iter().filter(|asked| !asked.is_expected()).count();
    output.json(&json!({
        "calls": asked.iter().map(call_json).collect::<Vec<_>>(),
        "kill": kill.to_json(),
        "as_expected": wrong == 0 && kill.is_expected(),
    }));
    if wrong > 0 || !kill.is_expected() {
        return Err(CommandFailure::failed(format!(
            "{wrong} answer(s) are not the expected ones, or the kill did not hold: see above"
        )));
    }
    output.line("");
    output.line(&format!("every answer is the expected one ({} calls)", asked.len()));
    output.line("next: portcullis serve --policies examples/policies/four-agents");
    Ok(())
}

/// Waits for the second after the one in which the replica became ready. Earlier proofs are refused, because the replica does not
/// know which of them were used.
async fn wait_past_ready_second() {
    let rest_ns = 1_000_000_000 - now().unix_ns.rem_euclid(1_000_000_000);
    tokio::time::sleep(Duration::from_nanos(rest_ns.unsigned_abs() + 1_000_000)).await;
}

async fn send_call(
    client: &DecisionServiceClient<Channel>,
    step: DemoStep<'_>,
    target: &str,
) -> Result<DemoCall, CommandFailure> {
    let proof = match &step.proof {
        script::StepProof::Fresh => prove(&step.chain, step.tool, step.arguments)?,
        script::StepProof::ForArguments(arguments) => prove(&step.chain, step.tool, arguments)?,
        script::StepProof::Reused(proof) => proof.clone(),
        script::StepProof::None => String::new(),
    };
    let request = wire::CheckRequest {
        request_id: format!("demo: {}", step.story),
        credential: Some(Credential::Presentation(wire::Presentation {
            aat_chain: step.chain.tokens.clone(),
            aat_pop: proof.into(),
        })),
        tool: step.tool.to_owned(),
        arguments_json: step.arguments.to_owned().into(),
        audience: AUDIENCE.to_owned(),
        ..Default::default()
    };
    let began = Instant::now();
    let answer = client.clone().check(request).await.map_err(|status| call_failure(&status, target))?.into_inner();
    Ok(DemoCall {
        agent: step.agent,
        story: step.story,
        call: format!("{} {}", step.tool, step.arguments),
        answer,
        expected: step.expected,
        latency: began.elapsed(),
    })
}

/// A proof by the chain's holder for one call.
fn prove(chain: &DemoChain<'_>, tool: &str, arguments: &str) -> Result<String, CommandFailure> {
    let arguments = parse_object(arguments.as_bytes()).map_err(CommandFailure::failed)?;
    let call = ProofCall { tool, arguments: &arguments, audience: Some(AUDIENCE) };
    issue::sign_proof(chain.holder, &chain.tokens, &call, None, now()).map_err(CommandFailure::failed)
}

fn print(asked: &[DemoCall], output: &CommandOutput) {
    let row = |asked: &DemoCall| {
        let effect = check::effect_name(asked.answer.effect());
        let layer = if asked.answer.deciding_layer.is_empty() { "-" } else { &asked.answer.deciding_layer };
        vec![
            asked.agent.to_owned(),
            asked.story.to_owned(),
            asked.call.clone(),
            output::paint_effect(effect),
            asked.answer.reason.clone(),
            layer.to_owned(),
            format!("{} µs", asked.latency.as_micros()),
            if asked.is_expected() { String::new() } else { format!("expected {} {}", asked.expected.0, asked.expected.1) },
        ]
    };
    output.table(&["AGENT", "WHAT HAPPENS", "CALL", "EFFECT", "REASON", "LAYER", "LATENCY", ""], asked.iter().map(row).collect());
}

fn call_json(asked: &DemoCall) -> Value {
    json!({
        "agent": asked.agent,
        "story": asked.story,
        "call": asked.call,
        "effect": check::effect_name(asked.answer.effect()),
        "reason": asked.answer.reason,
        "deciding_layer": asked.answer.deciding_layer,
        "latency_us": asked.latency.as_micros() as u64,
        "decision_id": asked.answer.decision_id,
        "as_expected": asked.is_expected(),
    })
}

fn progress_bar(calls: usize, output: &CommandOutput) -> ProgressBar {
    if output.is_json() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} calls").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(calls as u64).with_style(style)
}
