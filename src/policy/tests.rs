//! Tests of policy as a whole: diagnostics, evaluation case by case, and comparison with the naive reference.

use std::sync::Arc;

use crate::model::constraint::ConstraintMap;
use crate::model::ids::{AgentId, ApplicationId, GroupId, SessionId, TaskId, UserId};
use crate::model::json::parse;
use crate::model::request::{DelegationSubject, TokenScope};

use super::diagnostic::Diagnostic;
use super::document::Document;
use super::source::{self, SourceFile};
use super::tools::{PatternCache, ToolTable};
use super::validate;

mod algebra;
mod change;
mod conditions;
mod diagnostics;
mod diff;
mod examples;
mod folder;
mod keys;
mod lint;
mod properties;
mod schema;
mod stored;

/// The public key of RFC 8037, appendix A.
const KEY_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

/// A policy folder with a single file.
fn file(text: &str) -> Vec<SourceFile> {
    vec![SourceFile { path: "p.yaml".to_owned(), content: text.as_bytes().to_vec() }]
}

/// The diagnostics of the reader and of single documents. Warnings about unreachable documents are left to `lint`.
fn diagnostics(files: &[SourceFile]) -> Vec<String> {
    diagnostic_texts(files, |documents| {
        validate::check_documents(documents, &ToolTable::new(documents), &mut PatternCache::default())
    })
}

/// All diagnostics of `policy check`.
fn linted(files: &[SourceFile]) -> Vec<String> {
    diagnostic_texts(files, validate::check_policy)
}

fn diagnostic_texts(files: &[SourceFile], together: fn(&[Document]) -> Vec<Diagnostic>) -> Vec<String> {
    let parsed = source::parse_files(files);
    let together = if parsed.has_errors() { Vec::new() } else { together(&parsed.documents) };
    parsed.diagnostics.iter().chain(&together).map(ToString::to_string).collect()
}

/// The documents of a text without mistakes.
fn documents(text: &str) -> Vec<Document> {
    let parsed = source::parse_files(&file(text));
    assert_eq!(parsed.diagnostics, [], "{text}");
    parsed.documents
}

/// A subject: groups, application, agents (`spiffe://t/NAME`), and a scope for each token as JSON.
fn subject(groups: &[&str], application: &str, agents: &[&str], scopes: &[&str]) -> DelegationSubject {
    DelegationSubject {
        user: UserId::new("https://i", "ana"),
        groups: groups.iter().map(|group| GroupId::from(*group)).collect(),
        application: ApplicationId::from(application),
        agents: agents.iter().map(|agent| AgentId::new(format!("spiffe://t/{agent}"))).collect(),
        scopes: scopes.iter().map(|scope| scope_of(scope)).collect(),
        session: SessionId::from("s"),
        task: TaskId::from("t"),
    }
}

fn scope_of(text: &str) -> TokenScope {
    let value = parse(text.as_bytes()).unwrap();
    let tools = value.as_object().unwrap().iter().map(|(tool, map)| (Arc::from(tool), ConstraintMap::parse(map).unwrap()));
    TokenScope { tools: tools.collect() }
}
