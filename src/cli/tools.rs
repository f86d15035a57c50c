//! `portcullis tools`: which tools a chain may call, as a gateway asks to filter its `tools/list`.

use clap::Args;
use serde_json::json;

use super::check::effect_name;
use super::client::{connect, refused};
use super::output::{Output, effect};
use super::{Failure, input};
use crate::api::r#gen as wire;
use crate::api::r#gen::decision_service_client::DecisionServiceClient;
use crate::api::r#gen::list_tools_request::Credential;

/// List the tools that a chain may call, and where arguments decide
#[derive(Debug, Args)]
pub(super) struct ToolsArgs {
    /// The chain: a file (presentation JSON, or one JWS a line), `-`, or the JSON itself
    #[arg(long, value_name = "FILE")]
    presentation: String,
    /// Only this tool; may be repeated
    #[arg(long, value_name = "TOOL")]
    tool: Vec<String>,
    /// The audience to claim; may be left out where there is only one
    #[arg(long, value_name = "URI", default_value = "")]
    audience: String,
    /// Show the tools that are denied too
    #[arg(long)]
    all: bool,
    /// The decisions listener of a running server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7700")]
    target: String,
}

pub(super) async fn run(arguments: ToolsArgs, output: &Output) -> Result<(), Failure> {
    let (aat_chain, aat_pop) = input::presentation(&arguments.presentation)?;
    let request = wire::ListToolsRequest {
        credential: Some(Credential::Presentation(wire::Presentation { aat_chain, aat_pop })),
        tools: arguments.tool,
        audience: arguments.audience,
        ..Default::default()
    };
    let mut client = DecisionServiceClient::new(connect(&arguments.target).await?);
    let answer = client.list_tools(request).await.map_err(|status| refused(&status, &arguments.target))?.into_inner();
    let tools = answer.tools.iter().map(|tool| {
        json!({ "tool": tool.tool, "effect": effect_name(tool.effect()), "reason": tool.reason, "maybe": tool.maybe })
    });
    output.json(&json!({
        "tools": tools.collect::<Vec<_>>(),
        "decision_id": answer.decision_id,
        "revision": answer.revision,
        "snapshot_age_ms": answer.snapshot_age_ms,
        "valid_for_ms": answer.valid_for_ms,
    }));
    let denied = |tool: &&wire::ToolDecision| tool.effect() != wire::Effect::Deny;
    let shown: Vec<_> = answer.tools.iter().filter(|tool| arguments.all || denied(tool)).collect();
    let rows = shown.iter().map(|tool| {
        let maybe = if tool.maybe { "arguments decide" } else { "" };
        vec![tool.tool.clone(), effect(effect_name(tool.effect())), tool.reason.clone(), maybe.to_owned()]
    });
    output.table(&["TOOL", "EFFECT", "REASON", ""], rows.collect());
    let hidden = answer.tools.len() - shown.len();
    if hidden > 0 {
        output.line(&format!("{hidden} more denied (--all shows them)"));
    }
    Ok(())
}
