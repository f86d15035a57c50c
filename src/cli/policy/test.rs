//! `portcullis policy test`: runs the tests of a folder without a server, as `apply` does before it writes.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::super::output::CommandOutput;
use super::super::{CommandFailure, diagnostic_text, progress};
use super::diagnostic_json;
use crate::policy::CompiledPolicy;
use crate::policy::diagnostic::Diagnostic;
use crate::policy::excerpt::{SourceLines, printable};
use crate::policy::source::{parse_files, read_folder};
use crate::policy::test_run::{self, EntryLocation, TestOutcome, TestReport};

/// Most unreached entries that are listed; `--json` lists all.
const UNREACHED_SHOWN_MAX: usize = 50;

const HELP: &str = "\
A test says what calls of one agent, for one user, in one application, must come to:

  kind: test
  agent: spiffe://acme.example/agent/finance     # or `agents: [root, …, leaf]`
  user: {issuer: https://login.acme.example, sub: ana, groups: [ap]}
  application: erp
  expect:
    - {tool: payments/prepare, args: {amount: 90}, want: PERMIT}
    - {tool: payments/execute, args: {id: 7}, want: DENY, reason: AGENT_DENIES}

Also: `scope` (what each token grants; else whatever is called), `at` and `env` (what conditions see; `at` is
2026-01-07T12:00:00Z unless said), `layer`, and `prepared: true` (what `prepared:` entries demand is there).
Coverage counts the entries of agents, groups, applications, permission sets in use and guardrails that decided in their layer.

Exits 0 if all pass and coverage suffices, 1 if not.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(in crate::cli) struct PolicyTestArgs {
    /// The folder, or one file
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Fail if the tests reach a smaller percentage of the entries
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    coverage_min: Option<u8>,
}

pub(super) fn run(arguments: &PolicyTestArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let files = read_folder(&arguments.dir).map_err(CommandFailure::misuse)?;
    let progress_bar = progress::start_spinner("running the tests");
    let parsed = parse_files(&files);
    let tested = if parsed.has_errors() {
        Err(parsed.diagnostics)
    } else {
        CompiledPolicy::compile(&parsed.documents).map(|policy| test_run::run_tests(&parsed.documents, &policy))
    };
    progress_bar.finish_and_clear();
    match tested {
        Ok(report) => print_report(&report, arguments.coverage_min, output),
        Err(diagnostics) => Err(print_errors(&diagnostics, &SourceLines::from_files(&files), output)),
    }
}

/// A folder with errors is not tested.
fn print_errors(diagnostics: &[Diagnostic], sources: &SourceLines<'_>, output: &CommandOutput) -> CommandFailure {
    let diagnostics_json = diagnostics.iter().map(|diagnostic| diagnostic_json(diagnostic, sources));
    output.json(&json!({ "diagnostics": diagnostics_json.collect::<Vec<_>>() }));
    output.text(&diagnostic_text::render(diagnostics, sources));
    output.line("the policy has errors: no test was run");
    CommandFailure::exit_code_only(CommandFailure::FAILED)
}

fn print_report(report: &TestReport, coverage_min: Option<u8>, output: &CommandOutput) -> Result<(), CommandFailure> {
    let percent = report.coverage.percent();
    let covered = coverage_min.is_none_or(|min| percent >= usize::from(min));
    output.json(&report_json(report, covered));
    for failure in &report.failures {
        output.line(&printable_lines(&failure.to_string()));
    }
    for note in &report.notes {
        output.note(&format!("warning: {}\n", printable(note)));
    }
    if report.tests == 0 {
        output.note("warning: the folder has no tests: say in `kind: test` documents what must be permitted and what not\n");
    }
    let unreached = &report.coverage.unreached;
    if !unreached.is_empty() {
        output.line(&format!("not reached by any test: {} of {} entries", unreached.len(), report.coverage.entries));
        for location in unreached.iter().take(UNREACHED_SHOWN_MAX) {
            let at = format!("{}:{}", location.path, location.line);
            output.line(&printable(&format!("  {at}  {} {}: {}: {}", location.kind, location.id, location.list, location.entry)));
        }
        if unreached.len() > UNREACHED_SHOWN_MAX {
            output.line(&format!("  … and {} more (--json lists all)", unreached.len() - UNREACHED_SHOWN_MAX));
        }
    }
    output.line(&format!("{} passed, {} failed; {percent} % of entries reached", report.passed, report.failures.len()));
    if !covered {
        output.line(&format!("coverage is below --coverage-min {}", coverage_min.unwrap_or_default()));
    }
    if report.failures.is_empty() && covered { Ok(()) } else { Err(CommandFailure::exit_code_only(CommandFailure::FAILED)) }
}

/// Text of several lines, without characters that a terminal would obey.
fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

fn report_json(report: &TestReport, covered: bool) -> Value {
    let failures = report.failures.iter().map(|failure| {
        json!({
            "path": failure.path,
            "line": failure.line,
            "column": failure.column,
            "agents": failure.agents.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "tool": &*failure.tool,
            "arguments": serde_json::from_str::<Value>(&failure.arguments).unwrap_or_default(),
            "wanted": outcome_json(&failure.expected),
            "got": outcome_json(&failure.actual),
            "hop": failure.hop,
            "decided_by": failure.decided_by.as_ref().map(entry_json),
            "problem": failure.problem,
        })
    });
    json!({
        "tests": report.tests,
        "passed": report.passed,
        "failed": report.failures.len(),
        "failures": failures.collect::<Vec<_>>(),
        "notes": report.notes,
        "coverage": {
            "entries": report.coverage.entries,
            "percent": report.coverage.percent(),
            "sufficient": covered,
            "unreached": report.coverage.unreached.iter().map(entry_json).collect::<Vec<_>>(),
        },
    })
}

fn outcome_json(outcome: &TestOutcome) -> Value {
    json!({
        "effect": outcome.effect.as_str(),
        "reason": outcome.reason.map(|reason| reason.as_str()),
        "layer": outcome.layer.map(|layer| layer.as_str()),
    })
}

fn entry_json(location: &EntryLocation) -> Value {
    json!({
        "kind": location.kind,
        "id": location.id,
        "list": location.list,
        "entry": location.entry,
        "path": location.path,
        "line": location.line,
        "column": location.column,
    })
}
