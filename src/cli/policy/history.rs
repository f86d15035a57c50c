//! `portcullis policy history` and `rollback`: the revisions that changed policy, and the return to one of them.

use clap::Args;
use serde_json::{Value, json};

use super::super::client::AdminClient;
use super::super::output::CommandOutput;
use super::super::{AdminArgs, CommandFailure, progress};
use super::print_applied;
use crate::api::r#gen as wire;

/// Most documents that the table names for one revision; `--json` names all.
const NAMED_MAX: usize = 3;

#[derive(Debug, Args)]
pub(in crate::cli) struct PolicyHistoryArgs {
    /// At most so many, up to 1000
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    #[command(flatten)]
    admin: AdminArgs,
}

const ROLLBACK_HELP: &str = "\
The folder's documents come back as they stood at that revision; agents and operators made through the API stay as they are now.
It is a new revision: nothing is erased, and it can be rolled back too. No tests run, for tests are not stored.
A rollback that changes operators or issuers needs two operators once two administer.

Examples:
  portcullis policy history
  portcullis policy rollback 12 --dry-run
  portcullis policy rollback 12";

#[derive(Debug, Args)]
#[command(after_help = ROLLBACK_HELP)]
pub(in crate::cli) struct PolicyRollbackArgs {
    /// `HISTORY.NUMBER` as `policy history` prints it, or the number alone
    #[arg(value_name = "REVISION")]
    revision: String,
    /// Show what would change and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn list(arguments: PolicyHistoryArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let mut client = AdminClient::open(&arguments.admin).await?;
    let answer = client.history(wire::PolicyHistoryRequest { limit: arguments.limit }).await?;
    let document = |id: &wire::DocumentId| json!({ "kind": id.kind, "id": id.id });
    let revisions = answer.revisions.iter().map(|revision| {
        json!({
            "revision": revision.revision,
            "committed_at_unix_ms": revision.committed_at_unix_ms,
            "operators": revision.operators,
            "method": revision.method,
            "account": revision.account,
            "put": revision.put.iter().map(document).collect::<Vec<Value>>(),
            "removed": revision.removed.iter().map(document).collect::<Vec<Value>>(),
        })
    });
    output.json(&json!({ "revisions": revisions.collect::<Vec<_>>() }));
    let rows = answer.revisions.iter().map(|revision| {
        let number = revision.revision.rsplit('.').next().unwrap_or_default().to_owned();
        let at = jiff::Timestamp::from_millisecond(revision.committed_at_unix_ms);
        let at =
            at.map_or_else(|_| revision.committed_at_unix_ms.to_string(), |at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string());
        let by = if revision.operators.is_empty() { "(the program)".to_owned() } else { revision.operators.join(", ") };
        vec![number, at, by, documents_text(revision), revision.account.clone()]
    });
    output.table(&["REVISION", "AT", "BY", "DOCUMENTS", "ACCOUNT"], rows.collect());
    Ok(())
}

/// The documents of a revision, as far as they fit on a line.
fn documents_text(revision: &wire::PolicyRevision) -> String {
    let named = |sign: &'static str, ids: &[wire::DocumentId]| {
        ids.iter().map(move |id| format!("{sign}{} {}", id.kind, id.id)).collect::<Vec<_>>()
    };
    let all = [named("-", &revision.removed), named("", &revision.put)].concat();
    let more = all.len().saturating_sub(NAMED_MAX);
    let shown: Vec<String> = all.into_iter().take(NAMED_MAX).collect();
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

pub(super) async fn rollback(arguments: PolicyRollbackArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let mut client = AdminClient::open_for_act(&arguments.admin).await?;
    let progress_bar = progress::start_spinner("rolling back");
    let request = wire::RollbackPolicyRequest { revision: arguments.revision, dry_run: arguments.dry_run };
    let answer = client.rollback(request).await;
    progress_bar.finish_and_clear();
    print_applied(answer?, arguments.dry_run, output);
    Ok(())
}
