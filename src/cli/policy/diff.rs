//! `portcullis policy diff`: the changes that a folder would make to a running server, a store, or another folder.

use std::path::{Path, PathBuf};

use anstyle::{AnsiColor, Style};
use clap::Args;
use serde_json::json;

use super::super::client::AdminClient;
use super::super::output::{CommandOutput, paint};
use super::super::{AdminArgs, CommandFailure, diagnostic_text, progress};
use super::{change_json, change_rows, diagnostic_from_wire, read_wire_files, wire_diagnostic_json};
use crate::api::r#gen as wire;
use crate::policy::diff;
use crate::policy::document::Document;
use crate::policy::excerpt::SourceLines;
use crate::policy::source::{parse_files, read_folder};
use crate::policy::{CompiledPolicy, Diagnostic};

/// Most pairs that are listed; a server lists as many.
const PAIRS_LISTED_MAX: usize = crate::pap::PAIRS_LISTED_MAX;

const HELP: &str = "\
A pair of agent and tool is listed where what calls can get may change, whoever the agent acts for and wherever it runs:
  +  wider      some call may get a better answer, none is known to get a worse one
  ~  changed    both, or not known to be one of them: read it as wider until you know
  -  narrower   no call gets a better answer
BEFORE and AFTER say the best that a call can get; with `?` arguments, conditions or who it acts for decide.

With OTHER no server is asked: what would change if DIR took the place of OTHER.

Examples:
  portcullis policy diff policies                        against the policy in force
  portcullis policy diff new old --exit-code             in CI: exits 1 if anything is or may be wider";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(in crate::cli) struct PolicyDiffArgs {
    /// The folder, or one file
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Compare with this folder instead of the policy in force; no server needed
    #[arg(value_name = "OTHER", conflicts_with = "store")]
    other: Option<PathBuf>,
    /// Exit 1 if anything is wider or may be
    #[arg(long)]
    exit_code: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn run(arguments: PolicyDiffArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let progress_bar = progress::start_spinner("comparing");
    let answer = match &arguments.other {
        Some(other) => diff_folders(other, &arguments.dir),
        None => diff_against_server(&arguments).await,
    };
    progress_bar.finish_and_clear();
    let answer = answer?;
    let widens = answer.pairs.iter().any(|pair| pair.direction != "narrower");
    print_diff(answer, output);
    if arguments.exit_code && widens { Err(CommandFailure::exit_code_only(CommandFailure::FAILED)) } else { Ok(()) }
}

async fn diff_against_server(arguments: &PolicyDiffArgs) -> Result<wire::DiffPolicyResponse, CommandFailure> {
    let files = read_wire_files(&arguments.dir)?;
    AdminClient::open(&arguments.admin).await?.diff(wire::DiffPolicyRequest { files }).await
}

/// Compares two folders without a server.
fn diff_folders(before: &Path, after: &Path) -> Result<wire::DiffPolicyResponse, CommandFailure> {
    let ((old, before), (new, after)) = (compile_folder(before)?, compile_folder(after)?);
    let pairs = diff::compare_access(&before, &after, PAIRS_LISTED_MAX);
    let changes = diff::compare_documents(&old, &new).into_iter();
    let warning = |diagnostic: Diagnostic| wire::Diagnostic {
        severity: diagnostic.severity.as_str().to_owned(),
        message: diagnostic.message,
        ..Default::default()
    };
    Ok(wire::DiffPolicyResponse {
        revision: String::new(),
        documents: changes
            .map(|change| wire::DocumentChange { change: change.change.to_owned(), kind: change.key.kind, id: change.key.id })
            .collect(),
        pairs_total: pairs.total,
        pairs: pairs
            .listed
            .iter()
            .map(|pair| wire::PairChange {
                agent: pair.agent.to_string(),
                tool: pair.tool.to_string(),
                before: pair.before.to_string(),
                after: pair.after.to_string(),
                direction: pair.direction.as_str().to_owned(),
            })
            .collect(),
        warnings: diff::other_change_warnings(&old, &new).into_iter().map(warning).collect(),
    })
}

fn compile_folder(folder: &Path) -> Result<(Vec<Document>, CompiledPolicy), CommandFailure> {
    let parsed = parse_files(&read_folder(folder).map_err(CommandFailure::misuse)?);
    let refused = |diagnostics: &[Diagnostic]| {
        let lines: Vec<String> = diagnostics.iter().filter(|found| found.is_error()).map(ToString::to_string).collect();
        CommandFailure::failed(format!("the policy in `{}` has errors:\n{}", folder.display(), lines.join("\n")))
    };
    if parsed.has_errors() {
        return Err(refused(&parsed.diagnostics));
    }
    let compiled = CompiledPolicy::compile(&parsed.documents).map_err(|diagnostics| refused(&diagnostics))?;
    Ok((parsed.documents, compiled))
}

fn print_diff(answer: wire::DiffPolicyResponse, output: &CommandOutput) {
    let pairs = answer.pairs.iter().map(|pair| {
        json!({
            "agent": pair.agent,
            "tool": pair.tool,
            "before": pair.before,
            "after": pair.after,
            "direction": pair.direction,
        })
    });
    output.json(&json!({
        "revision": Some(&answer.revision).filter(|revision| !revision.is_empty()),
        "documents": answer.documents.iter().map(change_json).collect::<Vec<_>>(),
        "pairs": pairs.collect::<Vec<_>>(),
        "pairs_total": answer.pairs_total,
        "warnings": answer.warnings.iter().map(wire_diagnostic_json).collect::<Vec<_>>(),
    }));
    let warnings: Vec<Diagnostic> = answer.warnings.iter().map(diagnostic_from_wire).collect();
    output.note(&diagnostic_text::render(&warnings, &SourceLines::new(std::iter::empty())));
    let against = match answer.revision.as_str() {
        "" => String::new(),
        revision => format!(" against revision {revision}"),
    };
    if answer.documents.is_empty() {
        output.line(&format!("nothing changes{against}"));
        return;
    }
    output.table(&["CHANGE", "KIND", "ID"], change_rows(answer.documents));
    output.line("");
    if answer.pairs.is_empty() {
        output.line(&format!("no agent can reach more or less{against}"));
        return;
    }
    let count = |direction: &str| answer.pairs.iter().filter(|pair| pair.direction == direction).count();
    let (wider, changed, narrower) = (count("wider"), count("changed"), count("narrower"));
    let rows = answer.pairs.iter().map(|pair| {
        let styled = |text: &str| paint_direction(text, &pair.direction);
        let mark = match pair.direction.as_str() {
            "wider" => "+",
            "narrower" => "-",
            _ => "~",
        };
        vec![
            styled(mark),
            pair.agent.clone(),
            pair.tool.clone(),
            pair.before.clone(),
            pair.after.clone(),
            styled(&pair.direction),
        ]
    });
    output.table(&["", "AGENT", "TOOL", "BEFORE", "AFTER", "DIRECTION"], rows.collect());
    let listed = answer.pairs.len() as u64;
    if listed < answer.pairs_total {
        output.line(&format!("… and {} more pairs", answer.pairs_total - listed));
    }
    output.line(&format!("{wider} wider, {changed} changed, {narrower} narrower{against}"));
}

/// Widening changes are red, because a reader must not miss them.
fn paint_direction(text: &str, direction: &str) -> String {
    let color = match direction {
        "wider" => AnsiColor::Red,
        "narrower" => AnsiColor::Green,
        _ => AnsiColor::Yellow,
    };
    paint(text, Style::new().fg_color(Some(color.into())).bold())
}
