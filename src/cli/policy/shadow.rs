//! `portcullis policy shadow-report`: the calls that documents in `mode: shadow` would decide otherwise.

use clap::Args;
use serde_json::json;

use super::super::client::AdminClient;
use super::super::output::{CommandOutput, paint_effect};
use super::super::{AdminArgs, CommandFailure};
use crate::api::r#gen as wire;

const HELP: &str = "\
A document with `mode: shadow` is evaluated beside the policy in force and decides nothing. This lists the calls that it would
have decided otherwise, counted by the server asked since it started; each has a line in the audit log with `would_be`.
Put a document in force (`mode: enforce`) once the flips listed here are those that you want.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(in crate::cli) struct ShadowReportArgs {
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn run(arguments: ShadowReportArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    if arguments.admin.store.is_some() {
        return Err(CommandFailure::misuse("--store: a server counts, not the store: ask one with --target"));
    }
    let answer = AdminClient::open(&arguments.admin).await?.shadow_report().await?;
    let flips = answer.flips.iter().map(|flip| {
        json!({
            "agent": flip.agent,
            "tool": flip.tool,
            "effect": flip.effect,
            "would_be_effect": flip.would_be_effect,
            "would_be_reason": flip.would_be_reason,
            "count": flip.count,
            "last_decision_id": flip.last_decision_id,
        })
    });
    output.json(&json!({
        "flips": flips.collect::<Vec<_>>(),
        "since_unix_ms": answer.since_unix_ms,
        "decisions": answer.decisions,
        "flips_uncounted": answer.flips_uncounted,
    }));
    if answer.flips.is_empty() {
        output.line("no call would have been decided otherwise");
    } else {
        let rows = answer.flips.iter().map(row);
        output.table(&["COUNT", "AGENT", "TOOL", "EFFECT", "WOULD BE", "REASON", "LAST DECISION"], rows.collect());
    }
    let since =
        jiff::Timestamp::from_millisecond(answer.since_unix_ms).map_or_else(|_| String::new(), |at| format!(" since {at}"));
    output.line(&format!("{} decisions were also evaluated with the documents in shadow{since}", answer.decisions));
    if answer.flips_uncounted > 0 {
        output.line(&format!("{} more flips found no room in the table", answer.flips_uncounted));
    }
    Ok(())
}

fn row(flip: &wire::ShadowFlip) -> Vec<String> {
    vec![
        flip.count.to_string(),
        flip.agent.clone(),
        flip.tool.clone(),
        paint_effect(&flip.effect),
        paint_effect(&flip.would_be_effect),
        flip.would_be_reason.clone(),
        flip.last_decision_id.clone(),
    ]
}
