//! `portcullis tools`: lists the tools that a chain may call, as a gateway does to filter its `tools/list`.

use clap::Args;
use serde_json::json;

use super::call_failure::call_failure;
use super::check::effect_name;
use super::client::connect;
use super::output::{CommandOutput, paint_effect};
use super::{CommandFailure, input};
use crate::api::r#gen as wire;
use crate::api::r#gen::decision_service_client::DecisionServiceClient;
use crate::api::r#gen::list_tools_request::Credential;
use crate::policy::excerpt::printable;
use crate::service::request::LIST_TOOLS;

const HELP: &str = "\
With a proof of possession the whole policy answers. Without one the server tells the names in the chain's own scope and nothing of
policy. --key makes the proof; one in the presentation is sent if it is of the tool `portcullis/list_tools`, with the arguments {}.

Examples:
  portcullis tools --presentation p.json --key agent.jwk
  portcullis token prove --key agent.jwk --chain chain.json --tool portcullis/list_tools --audience https://gateway.example";

/// List the tools that a chain may call, and where arguments decide
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct ToolsArgs {
    /// The chain: a file (presentation JSON, or one JWS a line), `-`, or the JSON itself
    #[arg(long, value_name = "FILE")]
    presentation: String,
    /// The leaf's private key, a JWK file: makes a proof, with which the whole policy answers
    #[arg(long, value_name = "FILE")]
    key: Option<String>,
    /// Only this tool; may be repeated
    #[arg(long, value_name = "TOOL")]
    tool: Vec<String>,
    /// The audience to claim; optional if there is only one
    #[arg(long, value_name = "URI", default_value = "")]
    audience: String,
    /// Show the tools that are denied too
    #[arg(long)]
    all: bool,
    /// The decisions listener of a running server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7700")]
    target: String,
}

pub(super) async fn run(arguments: ToolsArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let (aat_chain, aat_pop) = input::read_presentation(&arguments.presentation)?;
    let aat_pop = match &arguments.key {
        Some(key) => input::make_proof(key, &aat_chain, LIST_TOOLS, b"{}", &arguments.audience)?,
        // A proof of another call does not prove a listing, and the server would refuse it.
        None if input::tool_of_proof(&aat_pop).as_deref() == Some(LIST_TOOLS) => aat_pop,
        None => Default::default(),
    };
    let request = wire::ListToolsRequest {
        credential: Some(Credential::Presentation(wire::Presentation { aat_chain, aat_pop })),
        tools: arguments.tool,
        audience: arguments.audience,
        ..Default::default()
    };
    let mut client = DecisionServiceClient::new(connect(&arguments.target).await?);
    let answer = client.list_tools(request).await.map_err(|status| call_failure(&status, &arguments.target))?.into_inner();
    let tools = answer.tools.iter().map(|tool| {
        let (effect, reason) = effect_and_reason(tool, answer.names_only).unzip();
        json!({ "tool": tool.tool, "effect": effect, "reason": reason, "maybe": tool.maybe })
    });
    output.json(&json!({
        "tools": tools.collect::<Vec<_>>(),
        "decision_id": answer.decision_id,
        "revision": answer.revision,
        "snapshot_age_ms": answer.snapshot_age_ms,
        "valid_for_ms": answer.valid_for_ms,
        "reason": answer.reason,
        "message": answer.message,
        "names_only": answer.names_only,
    }));
    let denied = |tool: &&wire::ToolDecision| tool.effect() != wire::Effect::Deny;
    let shown: Vec<_> = answer.tools.iter().filter(|tool| arguments.all || denied(tool)).collect();
    let rows = shown.iter().map(|tool| {
        let maybe = if tool.maybe && !answer.names_only { "arguments decide" } else { "" };
        match effect_and_reason(tool, answer.names_only) {
            Some((name, reason)) => vec![tool.tool.clone(), paint_effect(name), reason.to_owned(), maybe.to_owned()],
            None => vec![tool.tool.clone(), "-".to_owned(), "-".to_owned(), String::new()],
        }
    });
    output.table(&["TOOL", "EFFECT", "REASON", ""], rows.collect());
    if answer.reason != "OK" {
        output.line(&format!("no tool may be called: {}  {}", answer.reason, printable(&answer.message)));
    }
    if answer.names_only {
        output.line(
            "these are the names in the chain's scope; policy may deny each of them: --key makes a proof, with which policy answers",
        );
    }
    let hidden = answer.tools.len() - shown.len();
    if hidden > 0 {
        output.line(&format!("{hidden} more denied (--all shows them)"));
    }
    Ok(())
}

/// The effect and reason of a tool. `None` if the server only says that the chain's scope names the tool, because policy was not
/// asked then.
fn effect_and_reason(tool: &wire::ToolDecision, names_only: bool) -> Option<(&'static str, &str)> {
    let is_name = names_only && tool.effect() != wire::Effect::Deny;
    (!is_name).then(|| (effect_name(tool.effect()), tool.reason.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_the_scope_is_no_permit() {
        let check = |effect: wire::Effect, names_only: bool, expected: Option<(&str, &str)>| {
            let tool = wire::ToolDecision { tool: "a/b".to_owned(), effect: effect.into(), reason: "R".to_owned(), maybe: true };
            assert_eq!(effect_and_reason(&tool, names_only), expected);
        };
        check(wire::Effect::Permit, true, None);
        check(wire::Effect::Deny, true, Some(("DENY", "R")));
        check(wire::Effect::Permit, false, Some(("PERMIT", "R")));
        check(wire::Effect::NeedsApproval, false, Some(("NEEDS_APPROVAL", "R")));
    }
}
