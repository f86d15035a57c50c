//! `portcullis approvals`, `approve` and `refuse`: the questions that calls put to a person, and the answers.
//!
//! Agents, or whoever manipulated them, wrote the text that is shown here. Characters that could disguise that text are escaped
//! before they reach the terminal. Look next at `visible_text.rs`.

use clap::Args;
use serde_json::{Value, json};

use super::act_outcome::ActAnswer;
use super::client::AdminClient;
use super::output::CommandOutput;
use super::visible_text::escape_for_terminal;
use super::{AdminArgs, CommandFailure};
use crate::api::r#gen as wire;
use crate::model::limits::APPROVALS_LISTED_MAX;
use crate::model::time::{Clock as _, SystemClock};
use crate::policy::diagnostic::nearest_name;

/// Characters of a digest in a list.
const DIGEST_SHOWN: usize = 12;
/// Shortest prefix of a digest that names one call.
const DIGEST_PREFIX_MIN: usize = 8;
/// Characters of a whole digest.
const DIGEST_LENGTH: usize = 64;
/// Most characters of arguments in a list.
const ARGUMENTS_SHOWN: usize = 72;

/// Answer one call that waits
#[derive(Debug, Args)]
pub(super) struct ApprovalAnswerArgs {
    /// The call's digest, or at least 8 of its first digits
    #[arg(allow_hyphen_values = true)]
    digest: String,
    /// Why, for the record
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    admin: AdminArgs,
}

/// List what waits, the oldest first
#[derive(Debug, Args)]
pub(super) struct ApprovalListArgs {
    /// Show this call alone, in full: its digest, or at least 8 of its first digits
    #[arg(allow_hyphen_values = true)]
    digest: Option<String>,
    /// Also list calls that were approved, refused or used, and are still kept
    #[arg(long)]
    all: bool,
    /// At most so many, up to 1000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn approve(arguments: ApprovalAnswerArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let mut client = AdminClient::open_for_act(&arguments.admin).await?;
    let digest = resolve_digest(&mut client, &arguments.digest).await?;
    let ActAnswer { message, is_recorded } = client.approve(wire::ApproveRequest { digest, reason: arguments.reason }).await?;
    print_approval_answer("approved", message.revision, &message.approval.unwrap_or_default(), is_recorded, output);
    Ok(())
}

pub(super) async fn refuse(arguments: ApprovalAnswerArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let mut client = AdminClient::open_for_act(&arguments.admin).await?;
    let digest = resolve_digest(&mut client, &arguments.digest).await?;
    let ActAnswer { message, is_recorded } = client.refuse(wire::RefuseRequest { digest, reason: arguments.reason }).await?;
    print_approval_answer("refused", message.revision, &message.approval.unwrap_or_default(), is_recorded, output);
    Ok(())
}

pub(super) async fn list(arguments: ApprovalListArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let mut client = AdminClient::open(&arguments.admin).await?;
    if let Some(prefix) = &arguments.digest {
        let item = find_approval(&mut client, prefix).await?;
        output.json(&approval_json(&item));
        print_approval(&item, output);
        return Ok(());
    }
    let listed = client.approvals(wire::ListApprovalsRequest { all: arguments.all, limit: arguments.limit }).await?;
    output.json(&json!({
        "approvals": listed.approvals.iter().map(approval_json).collect::<Vec<_>>(),
        "total": listed.total,
    }));
    let now_unix_ms = SystemClock.now().unix_ms();
    let rows = listed.approvals.iter().map(|item| approval_row(item, now_unix_ms)).collect();
    output.table(&["DIGEST", "STATE", "LEFT", "USER", "AGENTS", "TOOL", "ARGUMENTS", "ASKED BY"], rows);
    output.line(&format!("{} of {}", listed.approvals.len(), listed.total));
    Ok(())
}

/// Finds the whole digest for a prefix.
async fn resolve_digest(client: &mut AdminClient, digest: &str) -> Result<String, CommandFailure> {
    check_digest_prefix(digest)?;
    if digest.len() == DIGEST_LENGTH {
        return Ok(digest.to_owned());
    }
    Ok(find_approval(client, digest).await?.digest)
}

async fn find_approval(client: &mut AdminClient, prefix: &str) -> Result<wire::ApprovalItem, CommandFailure> {
    check_digest_prefix(prefix)?;
    let limit = u32::try_from(APPROVALS_LISTED_MAX).unwrap_or(u32::MAX);
    let listed = client.approvals(wire::ListApprovalsRequest { all: true, limit }).await?;
    let unlisted = listed.total > listed.approvals.len() as u64;
    let begins: Vec<&str> = listed.approvals.iter().filter_map(|item| item.digest.get(..prefix.len())).collect();
    let near = nearest_name(prefix, begins).map(str::to_owned);
    let mut named = listed.approvals.into_iter().filter(|item| item.digest.starts_with(prefix));
    match (named.next(), named.next()) {
        (Some(item), None) if !unlisted || prefix.len() == DIGEST_LENGTH => Ok(item),
        (Some(_), Some(_)) => {
            Err(CommandFailure::misuse(format!("several calls begin with `{prefix}`: give more of the digest")))
        }
        (_, _) if unlisted => Err(CommandFailure::misuse(format!(
            "there are more approvals than a list holds, so `{prefix}` may stand for several: give the whole digest"
        ))),
        _ => {
            let near = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
            Err(CommandFailure::failed(format!("no call that waits or was answered lately begins with `{prefix}`{near}")))
        }
    }
}

fn check_digest_prefix(digest: &str) -> Result<(), CommandFailure> {
    let hex = digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if hex && (DIGEST_PREFIX_MIN..=DIGEST_LENGTH).contains(&digest.len()) {
        return Ok(());
    }
    Err(CommandFailure::misuse(format!(
        "`{}` is no digest: {DIGEST_PREFIX_MIN} to {DIGEST_LENGTH} characters of lowercase hex, as `portcullis approvals` shows it",
        escape_for_terminal(digest)
    )))
}

fn print_approval_answer(what: &str, revision: String, item: &wire::ApprovalItem, is_recorded: bool, output: &CommandOutput) {
    output.json(&json!({ "revision": revision, "approval": approval_json(item), "recorded": is_recorded }));
    output.line(&format!("{what} {}", item.digest));
    print_approval(item, output);
    let waits: Vec<String> = item.layers.iter().filter(|layer| layer.approved_by.is_empty()).map(layer_text).collect();
    if what == "approved" && !waits.is_empty() {
        output.line(&format!("it still waits for: {}", waits.join("; ")));
    }
    output.line(&format!("revision {revision}"));
}

/// Prints one call in full: the facts that an approver should read before approving.
fn print_approval(item: &wire::ApprovalItem, output: &CommandOutput) {
    if output.is_json() {
        return;
    }
    let line = |name: &str, text: &str| output.line(&format!("{name:<12}{text}"));
    line("digest", &item.digest);
    line("state", &format!("{}, {}", item.state, time_left(item, SystemClock.now().unix_ms())));
    line("user", &escape_for_terminal(&item.user));
    line("application", &escape_for_terminal(&item.application));
    for agent in &item.agents {
        line("agent", &escape_for_terminal(agent));
    }
    line("session", &escape_for_terminal(&item.session));
    line("task", &escape_for_terminal(&item.task));
    line("tool", &escape_for_terminal(&item.tool));
    line("arguments", &escape_for_terminal(&String::from_utf8_lossy(&item.arguments_json)));
    for layer in &item.layers {
        line("asked by", &layer_text(layer));
    }
}

fn approval_row(item: &wire::ApprovalItem, now_unix_ms: i64) -> Vec<String> {
    let layers: Vec<String> = item.layers.iter().map(layer_text).collect();
    let agents: Vec<&str> = item.agents.iter().map(|agent| agent.strip_prefix("spiffe://").unwrap_or(agent)).collect();
    vec![
        item.digest.chars().take(DIGEST_SHOWN).collect(),
        item.state.clone(),
        time_left(item, now_unix_ms),
        escape_for_terminal(&item.user),
        escape_for_terminal(&agents.join(" > ")),
        escape_for_terminal(&item.tool),
        abridge(&escape_for_terminal(&String::from_utf8_lossy(&item.arguments_json))),
        layers.join("; "),
    ]
}

/// A layer as text: the layer that asks, the groups that may approve, and the operator who did.
fn layer_text(layer: &wire::ApprovalLayer) -> String {
    let hop = if layer.hop < 0 { String::new() } else { format!(" {}", layer.hop) };
    let given = if layer.approved_by.is_empty() {
        String::new()
    } else {
        format!(" (given by {})", escape_for_terminal(&layer.approved_by))
    };
    format!("{}{hop} by {}{given}", layer.layer, escape_for_terminal(&layer.by.join(", ")))
}

fn time_left(item: &wire::ApprovalItem, now_unix_ms: i64) -> String {
    let left_s = item.expires_at_unix_ms.saturating_sub(now_unix_ms).max(0) / 1000;
    match left_s {
        0 => "no time left".to_owned(),
        1..120 => format!("{left_s} s left"),
        120..7200 => format!("{} min left", left_s / 60),
        _ => format!("{} h left", left_s / 3600),
    }
}

fn approval_json(item: &wire::ApprovalItem) -> Value {
    let layers = item.layers.iter().map(|layer| {
        json!({
            "layer": layer.layer,
            "hop": layer.hop,
            "by": layer.by,
            "approved_by": layer.approved_by,
            "expires_at_unix_ms": layer.expires_at_unix_ms,
        })
    });
    // The arguments are JSON by construction. If they were not, they are shown as text rather than left out.
    let text = String::from_utf8_lossy(&item.arguments_json);
    json!({
        "digest": item.digest,
        "state": item.state,
        "user": item.user,
        "application": item.application,
        "agents": item.agents,
        "session": item.session,
        "task": item.task,
        "tool": item.tool,
        "arguments": serde_json::from_str::<Value>(&text).unwrap_or_else(|_| Value::String(text.to_string())),
        "layers": layers.collect::<Vec<_>>(),
        "asked_at_unix_ms": item.asked_at_unix_ms,
        "expires_at_unix_ms": item.expires_at_unix_ms,
    })
}

fn abridge(text: &str) -> String {
    let mut characters = text.chars();
    let mut begin: String = characters.by_ref().take(ARGUMENTS_SHOWN).collect();
    if characters.next().is_some() {
        begin.push('…');
    }
    begin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_arguments_are_cut_in_lists() {
        assert_eq!(abridge("short"), "short");
        assert_eq!(abridge(&"é".repeat(ARGUMENTS_SHOWN)), "é".repeat(ARGUMENTS_SHOWN));
        assert_eq!(abridge(&"é".repeat(ARGUMENTS_SHOWN + 1)), format!("{}…", "é".repeat(ARGUMENTS_SHOWN)));
    }

    #[test]
    fn a_digest_is_named_by_eight_digits_or_more() {
        let check = |digest: &str, expected: bool| assert_eq!(check_digest_prefix(digest).is_ok(), expected, "{digest}");
        check("01234567", true);
        check(&"a".repeat(64), true);
        check("0123456", false);
        check(&"a".repeat(65), false);
        check("0123456G", false);
        check("0123456A", false);
    }
}
