//! `portcullis policy`: checks a folder without a server, or puts it in force.

mod test;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::AdminClient;
use super::output::Output;
use super::{AdminArgs, Failure};
use crate::api::r#gen as wire;
use crate::policy::diagnostic::Diagnostic;
use crate::policy::source::{SourceFile, parse, read_folder};
use crate::policy::validate;

/// Check a policy folder, or put it in force
#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Say what is wrong with a folder, with file, line and column; no server needed
    Check(CheckArgs),
    /// Run the folder's `kind: test` documents; no server needed
    Test(test::TestArgs),
    /// Make a folder the whole policy, in one commit, or change nothing
    Apply(ApplyArgs),
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The folder, or one file
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct ApplyArgs {
    /// The folder, or one file
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Show what would change and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn run(command: PolicyCommand, output: &Output) -> Result<(), Failure> {
    match command {
        PolicyCommand::Check(arguments) => check(&arguments.dir, output),
        PolicyCommand::Test(arguments) => test::run(&arguments, output),
        PolicyCommand::Apply(arguments) => apply(arguments, output).await,
    }
}

/// Reads a folder as the wire carries it.
pub(super) fn wire_files(dir: &Path) -> Result<Vec<wire::PolicyFile>, Failure> {
    let files = read_folder(dir).map_err(Failure::misuse)?;
    Ok(files.into_iter().map(|file| wire::PolicyFile { path: file.path, content: file.content.into() }).collect())
}

fn check(dir: &Path, output: &Output) -> Result<(), Failure> {
    let files: Vec<SourceFile> = read_folder(dir).map_err(Failure::misuse)?;
    let parsed = parse(&files);
    let mut diagnostics = parsed.diagnostics;
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(validate::check(&parsed.documents));
    }
    let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
    let warnings = diagnostics.len() - errors;
    output.json(&json!({
        "documents": parsed.documents.len(),
        "errors": errors,
        "warnings": warnings,
        "diagnostics": diagnostics.iter().map(diagnostic_json).collect::<Vec<_>>(),
    }));
    for diagnostic in &diagnostics {
        output.line(&diagnostic.to_string());
    }
    output.line(&format!("{} documents, {errors} errors, {warnings} warnings", parsed.documents.len()));
    if errors > 0 { Err(Failure::silent(Failure::FAILED)) } else { Ok(()) }
}

async fn apply(arguments: ApplyArgs, output: &Output) -> Result<(), Failure> {
    let files = wire_files(&arguments.dir)?;
    let mut client = AdminClient::open(&arguments.admin).await?;
    let answer = client.apply(wire::ApplyPolicyRequest { files, dry_run: arguments.dry_run }).await?;
    let changes: Vec<Value> =
        answer.changes.iter().map(|change| json!({ "change": change.change, "kind": change.kind, "id": change.id })).collect();
    let warnings: Vec<Value> = answer.warnings.iter().map(wire_diagnostic_json).collect();
    output.json(&json!({
        "revision": answer.revision,
        "dry_run": arguments.dry_run,
        "changes": changes,
        "warnings": warnings,
    }));
    for warning in &answer.warnings {
        output.warning(&wire_diagnostic_text(warning));
    }
    let rows = answer.changes.into_iter().map(|change| vec![change.change, change.kind, change.id]).collect::<Vec<_>>();
    if rows.is_empty() {
        output.line("nothing changes");
    } else {
        output.table(&["CHANGE", "KIND", "ID"], rows);
    }
    let done = if arguments.dry_run { "would be applied on top of revision" } else { "in force at revision" };
    output.line(&format!("{done} {}", answer.revision));
    Ok(())
}

/// A diagnostic in one line, without its severity.
fn wire_diagnostic_text(diagnostic: &wire::Diagnostic) -> String {
    match diagnostic.line {
        0 => diagnostic.message.clone(),
        line => format!("{}:{line}:{}: {}", diagnostic.path, diagnostic.column, diagnostic.message),
    }
}

fn wire_diagnostic_json(diagnostic: &wire::Diagnostic) -> Value {
    json!({
        "severity": diagnostic.severity,
        "path": diagnostic.path,
        "line": diagnostic.line,
        "column": diagnostic.column,
        "message": diagnostic.message,
        "help": Some(&diagnostic.help).filter(|help| !help.is_empty()),
    })
}

fn diagnostic_json(diagnostic: &Diagnostic) -> Value {
    json!({
        "severity": diagnostic.severity.as_str(),
        "path": diagnostic.path,
        "line": diagnostic.line,
        "column": diagnostic.column,
        "message": diagnostic.message,
        "help": diagnostic.help,
    })
}
