//! `portcullis policy`: checks a folder without a server, or puts it in force. The subcommands are in `cli/policy`.

mod diff;
mod history;
mod shadow;
mod test;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::act_outcome::ActAnswer;
use super::client::AdminClient;
use super::output::CommandOutput;
use super::{AdminArgs, CommandFailure, diagnostic_text};
use crate::api::r#gen as wire;
use crate::policy::SCHEMA;
use crate::policy::diagnostic::{Diagnostic, Severity, SourcePosition};
use crate::policy::excerpt::SourceLines;
use crate::policy::source::{SourceFile, parse_files, read_folder};
use crate::policy::validate;

const SCHEMA_HELP: &str = "\
An editor with the YAML language server completes and checks policy files that begin with this line:
  # yaml-language-server: $schema=policy.schema.json
after `portcullis policy schema > policy.schema.json`";

/// Check a policy folder, or put it in force
#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Check a folder and show each problem with file, line and column; no server needed
    Check(PolicyCheckArgs),
    /// Run the folder's `kind: test` documents; no server needed
    Test(test::PolicyTestArgs),
    /// Show the changes of a folder to documents and to the reach of agents, widening first
    Diff(diff::PolicyDiffArgs),
    /// Print the JSON Schema of a policy document, for editors
    #[command(after_help = SCHEMA_HELP)]
    Schema,
    /// Replace the whole policy by a folder, in one commit, or change nothing
    Apply(PolicyApplyArgs),
    /// List the revisions that changed policy, newest first
    History(history::PolicyHistoryArgs),
    /// Put the policy of an earlier revision in force again, as a new revision
    Rollback(history::PolicyRollbackArgs),
    /// Show where documents in `mode: shadow` would decide otherwise
    ShadowReport(shadow::ShadowReportArgs),
}

#[derive(Debug, Args)]
pub(super) struct PolicyCheckArgs {
    /// The folder, or one file
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct PolicyApplyArgs {
    /// The folder, or one file
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Show what would change and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) async fn run(command: PolicyCommand, output: &CommandOutput) -> Result<(), CommandFailure> {
    match command {
        PolicyCommand::Check(arguments) => check(&arguments.dir, output),
        PolicyCommand::Test(arguments) => test::run(&arguments, output),
        PolicyCommand::Diff(arguments) => diff::run(arguments, output).await,
        PolicyCommand::Schema => {
            output.raw(SCHEMA.trim_end());
            Ok(())
        }
        PolicyCommand::Apply(arguments) => apply(arguments, output).await,
        PolicyCommand::History(arguments) => history::list(arguments, output).await,
        PolicyCommand::Rollback(arguments) => history::rollback(arguments, output).await,
        PolicyCommand::ShadowReport(arguments) => shadow::run(arguments, output).await,
    }
}

/// Reads a folder into wire messages.
pub(super) fn read_wire_files(dir: &Path) -> Result<Vec<wire::PolicyFile>, CommandFailure> {
    let files = read_folder(dir).map_err(CommandFailure::misuse)?;
    Ok(files.into_iter().map(|file| wire::PolicyFile { path: file.path, content: file.content.into() }).collect())
}

fn check(dir: &Path, output: &CommandOutput) -> Result<(), CommandFailure> {
    let files: Vec<SourceFile> = read_folder(dir).map_err(CommandFailure::misuse)?;
    let sources = SourceLines::from_files(&files);
    let (documents, diagnostics) = check_documents(&files);
    let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
    let warnings = diagnostics.len() - errors;
    output.json(&json!({
        "documents": documents,
        "errors": errors,
        "warnings": warnings,
        "diagnostics": diagnostics.iter().map(|diagnostic| diagnostic_json(diagnostic, &sources)).collect::<Vec<_>>(),
    }));
    output.text(&diagnostic_text::render(&diagnostics, &sources));
    output.line(&format!("{documents} documents, {errors} errors, {warnings} warnings"));
    if errors > 0 { Err(CommandFailure::exit_code_only(CommandFailure::FAILED)) } else { Ok(()) }
}

/// Counts the documents of a folder and collects all of their diagnostics.
fn check_documents(files: &[SourceFile]) -> (usize, Vec<Diagnostic>) {
    let parsed = parse_files(files);
    let mut diagnostics = parsed.diagnostics;
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(validate::check_policy(&parsed.documents));
    }
    (parsed.documents.len(), diagnostics)
}

async fn apply(arguments: PolicyApplyArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let files = read_wire_files(&arguments.dir)?;
    let mut client = AdminClient::open_for_act(&arguments.admin).await?;
    let request = wire::ApplyPolicyRequest { files: files.clone(), dry_run: arguments.dry_run };
    let answer = client.apply(request).await.map_err(|failure| with_source_lines(failure, &files, output))?;
    let warnings: Vec<Diagnostic> = answer.message.warnings.iter().map(diagnostic_from_wire).collect();
    output.note(&diagnostic_text::render(
        &warnings,
        &SourceLines::new(files.iter().map(|file| (file.path.as_str(), &*file.content))),
    ));
    print_applied(answer, arguments.dry_run, output);
    Ok(())
}

/// Prints the changes that were applied, or would be.
fn print_applied(answer: ActAnswer<wire::ApplyPolicyResponse>, dry_run: bool, output: &CommandOutput) {
    let ActAnswer { message: answer, is_recorded } = answer;
    output.json(&json!({
        "revision": answer.revision,
        "dry_run": dry_run,
        "recorded": is_recorded,
        "changes": answer.changes.iter().map(change_json).collect::<Vec<_>>(),
        "warnings": answer.warnings.iter().map(wire_diagnostic_json).collect::<Vec<_>>(),
    }));
    if answer.changes.is_empty() {
        output.line("nothing changes");
    } else {
        output.table(&["CHANGE", "KIND", "ID"], change_rows(answer.changes));
    }
    let done = if dry_run { "would be applied on top of revision" } else { "in force at revision" };
    output.line(&format!("{done} {}", answer.revision));
}

fn change_json(change: &wire::DocumentChange) -> Value {
    json!({ "change": change.change, "kind": change.kind, "id": change.id })
}

fn change_rows(changes: Vec<wire::DocumentChange>) -> Vec<Vec<String>> {
    changes.into_iter().map(|change| vec![change.change, change.kind, change.id]).collect()
}

/// Adds the source lines to a refusal of the policy, because the files are on this machine.
fn with_source_lines(failure: CommandFailure, files: &[wire::PolicyFile], output: &CommandOutput) -> CommandFailure {
    let Some((first_line, _)) = failure.message.split_once('\n').filter(|(line, _)| line.starts_with("the policy has errors"))
    else {
        return failure;
    };
    let files: Vec<SourceFile> =
        files.iter().map(|file| SourceFile { path: file.path.clone(), content: file.content.to_vec() }).collect();
    let errors: Vec<Diagnostic> = check_documents(&files).1.into_iter().filter(Diagnostic::is_error).collect();
    // A server of another version may object to something that this version accepts. Then its own message is kept.
    if output.is_json() || errors.is_empty() {
        return failure;
    }
    CommandFailure::failed(format!(
        "{first_line}\n{}",
        diagnostic_text::render(&errors, &SourceLines::from_files(&files)).trim_end()
    ))
}

fn diagnostic_from_wire(diagnostic: &wire::Diagnostic) -> Diagnostic {
    let severity = if diagnostic.severity == Severity::Error.as_str() { Severity::Error } else { Severity::Warning };
    let at = SourcePosition { line: diagnostic.line, column: diagnostic.column };
    let help = Some(diagnostic.help.clone()).filter(|help| !help.is_empty());
    Diagnostic::new(severity, &diagnostic.path, at, diagnostic.message.clone()).with_help(help)
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

fn diagnostic_json(diagnostic: &Diagnostic, sources: &SourceLines<'_>) -> Value {
    let excerpt = sources.excerpt(&diagnostic.path, diagnostic.line, diagnostic.column);
    json!({
        "severity": diagnostic.severity.as_str(),
        "path": diagnostic.path,
        "line": diagnostic.line,
        "column": diagnostic.column,
        "end_column": excerpt.map(|excerpt| excerpt.end_column),
        "message": diagnostic.message,
        "help": diagnostic.help,
    })
}
