//! `portcullis policy test`: runs the tests of a folder without a server, as `apply` does before it writes.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::super::output::Output;
use super::super::{Failure, findings, progress};
use super::diagnostic_json;
use crate::policy::Compiled;
use crate::policy::diagnostic::Diagnostic;
use crate::policy::excerpt::{Sources, printable};
use crate::policy::source::{parse, read_folder};
use crate::policy::testrun::{self, Outcome, Place, Report};

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
pub(in crate::cli) struct TestArgs {
    /// The folder, or one file
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Fail if the tests reach a smaller percentage of the entries
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    coverage_min: Option<u8>,
}

pub(super) fn run(arguments: &TestArgs, output: &Output) -> Result<(), Failure> {
    let files = read_folder(&arguments.dir).map_err(Failure::misuse)?;
    let bar = progress::waiting("running the tests");
    let parsed = parse(&files);
    let tested = if parsed.has_errors() {
        Err(parsed.diagnostics)
    } else {
        Compiled::compile(&parsed.documents).map(|policy| testrun::run(&parsed.documents, &policy))
    };
    bar.finish_and_clear();
    match tested {
        Ok(report) => show(&report, arguments.coverage_min, output),
        Err(diagnostics) => Err(refuse(&diagnostics, &Sources::of(&files), output)),
    }
}

/// A folder with errors is not tested.
fn refuse(diagnostics: &[Diagnostic], sources: &Sources<'_>, output: &Output) -> Failure {
    let said = diagnostics.iter().map(|diagnostic| diagnostic_json(diagnostic, sources));
    output.json(&json!({ "diagnostics": said.collect::<Vec<_>>() }));
    output.text(&findings::render(diagnostics, sources));
    output.line("the policy has errors: no test was run");
    Failure::silent(Failure::FAILED)
}

fn show(report: &Report, coverage_min: Option<u8>, output: &Output) -> Result<(), Failure> {
    let percent = report.coverage.percent();
    let covered = coverage_min.is_none_or(|min| percent >= usize::from(min));
    output.json(&report_json(report, covered));
    for failure in &report.failures {
        output.line(&lines(&failure.to_string()));
    }
    for note in &report.notes {
        output.aside(&format!("warning: {}\n", printable(note)));
    }
    if report.tests == 0 {
        output.aside("warning: the folder has no tests: say in `kind: test` documents what must be permitted and what not\n");
    }
    let unreached = &report.coverage.unreached;
    if !unreached.is_empty() {
        output.line(&format!("not reached by any test: {} of {} entries", unreached.len(), report.coverage.entries));
        for place in unreached.iter().take(UNREACHED_SHOWN_MAX) {
            let at = format!("{}:{}", place.path, place.line);
            output.line(&printable(&format!("  {at}  {} {}: {}: {}", place.kind, place.id, place.list, place.entry)));
        }
        if unreached.len() > UNREACHED_SHOWN_MAX {
            output.line(&format!("  … and {} more (--json lists all)", unreached.len() - UNREACHED_SHOWN_MAX));
        }
    }
    output.line(&format!("{} passed, {} failed; {percent} % of entries reached", report.passed, report.failures.len()));
    if !covered {
        output.line(&format!("coverage is below --coverage-min {}", coverage_min.unwrap_or_default()));
    }
    if report.failures.is_empty() && covered { Ok(()) } else { Err(Failure::silent(Failure::FAILED)) }
}

/// Text of several lines, without characters that a terminal would obey.
fn lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

fn report_json(report: &Report, covered: bool) -> Value {
    let failures = report.failures.iter().map(|failure| {
        json!({
            "path": failure.path,
            "line": failure.line,
            "column": failure.column,
            "agents": failure.agents.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "tool": &*failure.tool,
            "arguments": serde_json::from_str::<Value>(&failure.arguments).unwrap_or_default(),
            "wanted": outcome_json(&failure.wanted),
            "got": outcome_json(&failure.got),
            "hop": failure.hop,
            "decided_by": failure.decided_by.as_ref().map(place_json),
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
            "unreached": report.coverage.unreached.iter().map(place_json).collect::<Vec<_>>(),
        },
    })
}

fn outcome_json(outcome: &Outcome) -> Value {
    json!({
        "effect": outcome.effect.as_str(),
        "reason": outcome.reason.map(|reason| reason.as_str()),
        "layer": outcome.layer.map(|layer| layer.as_str()),
    })
}

fn place_json(place: &Place) -> Value {
    json!({
        "kind": place.kind,
        "id": place.id,
        "list": place.list,
        "entry": place.entry,
        "path": place.path,
        "line": place.line,
        "column": place.column,
    })
}
