//! Runs `kind: test` documents: evaluates each expected call with the compiled policy and compares the answers.
//!
//! This file is pure. A test stands for a verified chain. If no issuer could vouch for the group or application of a test, its
//! calls fail. Look next at [`case`](super::document) for the contents of a test, and at `pap/apply.rs`, which runs the tests
//! before it writes.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use crate::model::constraint::{ArgumentMap, abridged};
use crate::model::decision::{Effect, EntryRef};
use crate::model::ids::{AgentId, SessionId, TaskId};
use crate::model::reason::{Layer, Reason};
use crate::model::request::{Call, Scope, Subject};

use super::compile::LayerAnswer;
use super::diagnostic::Position;
use super::document::{Body, Document, Expectation, IssuerSpec, List, Names, Permissions, TestSpec};
use super::{Compiled, Verdict};

/// The time that conditions see if a test names none: 2026-01-07T12:00:00Z, a Wednesday at noon.
pub const DEFAULT_AT_UNIX_S: i64 = 1_767_787_200;

/// The result of running all tests of a policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The number of `kind: test` documents.
    pub tests: usize,
    /// The number of calls with the expected answer.
    pub passed: usize,
    /// The calls with another answer, in the order of the files.
    pub failures: Vec<Failure>,
    /// The entries that the tests reached.
    pub coverage: Coverage,
    /// Remarks that fail no test.
    pub notes: Vec<String>,
}

/// One call with an answer that was not expected.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The file of the test.
    pub path: String,
    /// The line of the expectation, 1-based.
    pub line: u32,
    /// The column of the expectation, 1-based.
    pub column: u32,
    /// The chain, root to leaf.
    pub agents: Vec<AgentId>,
    /// `server/tool`.
    pub tool: Arc<str>,
    /// The arguments as canonical JSON.
    pub arguments: String,
    /// The expected answer.
    pub wanted: Outcome,
    /// The actual answer.
    pub got: Outcome,
    /// The index of the deciding agent or token; the root is 0.
    pub hop: Option<usize>,
    /// The document or entry that decided; `None` if none did.
    pub decided_by: Option<Place>,
    /// The reason why no chain can match the test.
    pub problem: Option<String>,
}

/// An effect with its reason and its layer. In an expected outcome, only the stated parts are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The effect.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Option<Reason>,
    /// The layer that decided.
    pub layer: Option<Layer>,
}

/// A document or one of its entries, with its position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The document's kind.
    pub kind: String,
    /// The document's id.
    pub id: String,
    /// The list of the entry; `forbid_when` for a guardrail. Empty for a document as a whole.
    pub list: &'static str,
    /// The entry as written. Empty for a document as a whole.
    pub entry: String,
    /// The file. Empty if there is none.
    pub path: String,
    /// The line, 1-based.
    pub line: u32,
    /// The column, 1-based.
    pub column: u32,
}

/// The entries of enforced documents that some call reached. An entry is reached if it decides in its layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// The number of all entries.
    pub entries: usize,
    /// The entries that no test reached, in the order of the files.
    pub unreached: Vec<Place>,
}

impl Coverage {
    /// The percentage of reached entries, rounded down; 100 if there are no entries.
    pub fn percent(&self) -> usize {
        let reached = self.entries.saturating_sub(self.unreached.len());
        (reached * 100).checked_div(self.entries).unwrap_or(100)
    }
}

/// Runs every test among the documents. `policy` must be compiled from the same documents.
pub fn run(documents: &[Document], policy: &Compiled) -> Report {
    let issuers: HashMap<&str, &IssuerSpec> = documents
        .iter()
        .filter_map(|document| match &document.body {
            Body::Issuer(issuer) => Some((issuer.id.as_str(), issuer)),
            _ => None,
        })
        .collect();
    let known = known_groups(documents);
    let mut report = Report { tests: 0, passed: 0, failures: Vec::new(), coverage: Coverage::default(), notes: Vec::new() };
    let mut reached: HashSet<EntryKey> = HashSet::new();
    for document in documents {
        let Body::Test(test) = &document.body else { continue };
        report.tests += 1;
        let problem = issuers.get(test.user.issuer.as_str()).and_then(|issuer| not_entitled(issuer, test, &known));
        let mut subject = subject_of(test);
        for group in subject.groups.iter().filter(|group| !known.contains(group.as_str())) {
            let message = format!("no document knows the group `{}`, so no chain carries it", abridged(group.as_str()));
            report.notes.push(format!("{}:{}: {message}", document.path, document.line));
        }
        subject.groups.retain(|group| known.contains(group.as_str()));
        for expectation in &test.expect {
            let failure = match &problem {
                Some(problem) => refused(document, test, expectation, problem),
                None => judge(document, test, expectation, (policy, &mut subject), documents, &mut reached),
            };
            match failure {
                Some(failure) => report.failures.push(*failure),
                None => report.passed += 1,
            }
        }
    }
    report.coverage = coverage(documents, &reached);
    report
}

/// The groups that some document names. A chain carries no other groups.
fn known_groups(documents: &[Document]) -> HashSet<&str> {
    let mut known = HashSet::new();
    for document in documents.iter().filter(|document| !document.is_shadow()) {
        match &document.body {
            Body::Issuer(IssuerSpec { groups: Names::Some(groups), .. }) => {
                known.extend(groups.iter().map(|group| group.as_str()))
            }
            Body::Agent(agent) => {
                if let Names::Some(groups) = &agent.acts_for {
                    known.extend(groups.iter().map(|group| group.as_str()));
                }
            }
            Body::Group(_) => {
                known.insert(document.key.id.as_str());
            }
            _ => {}
        }
    }
    known
}

/// The reason why the issuer cannot have signed the root that a test assumes; `None` if it can.
fn not_entitled(issuer: &IssuerSpec, test: &TestSpec, known: &HashSet<&str>) -> Option<String> {
    let group = test.groups.iter().find(|group| known.contains(group.as_str()) && !issuer.groups.contains(group));
    if let Some(group) = group {
        return Some(format!(
            "issuer `{}` may not say that a user is in group `{}`: add it to the issuer's `groups`, or test another user",
            issuer.id,
            abridged(group.as_str())
        ));
    }
    (!issuer.applications.contains(&test.application)).then(|| {
        format!(
            "issuer `{}` may not speak for application `{}`: add it to the issuer's `applications`, or test another one",
            issuer.id,
            abridged(test.application.as_str())
        )
    })
}

fn subject_of(test: &TestSpec) -> Subject {
    let scope = test.scope.clone().unwrap_or_default();
    Subject {
        user: test.user.clone(),
        groups: test.groups.clone(),
        application: test.application.clone(),
        agents: test.agents.clone(),
        scopes: vec![scope; test.agents.len()],
        session: SessionId::from("test"),
        task: TaskId::from("test"),
    }
}

/// Evaluates an expected call. Returns a failure if the answer is another one, and adds the reached entries to `reached`.
fn judge(
    document: &Document,
    test: &TestSpec,
    expectation: &Expectation,
    (policy, subject): (&Compiled, &mut Subject),
    documents: &[Document],
    reached: &mut HashSet<EntryKey>,
) -> Option<Box<Failure>> {
    if test.scope.is_none() {
        // The test does not check tokens, so each token grants the tool that is called.
        let free = Scope { tools: [(expectation.tool.clone(), ArgumentMap::unconstrained())].into() };
        subject.scopes.fill(free);
    }
    let call = Call {
        tool: &expectation.tool,
        // The test does not check pinned schemas either.
        tool_schema_sha256: policy.tool(&expectation.tool).and_then(|tool| tool.schema_sha256),
        arguments: &expectation.arguments,
        environment: expectation.environment.as_ref().or(test.environment.as_ref()),
        unix_s: expectation.at_unix_s.or(test.at_unix_s).unwrap_or(DEFAULT_AT_UNIX_S),
    };
    let resolved = policy.resolve(subject);
    let answers = policy.explain(&resolved, subject, &call);
    reached.extend(answers.iter().filter_map(EntryKey::of));
    let verdict = as_answered(policy.evaluate(&resolved, subject, &call), expectation.prepared, &answers);
    let got = Outcome { effect: verdict.effect, reason: Some(verdict.reason), layer: verdict.layer };
    let wanted = wanted(expectation);
    if wanted.fits(&got) {
        return None;
    }
    let decided_by = verdict.matched.as_deref().map(|matched| place(documents, matched, verdict.effect, verdict.reason));
    Some(Box::new(Failure { hop: verdict.hop, decided_by, ..failure(document, test, expectation, wanted, got) }))
}

/// The answer to an unprepared call: an entry with `prepared:` denies until the approval that it names exists.
fn as_answered(verdict: Verdict, prepared: bool, answers: &[LayerAnswer]) -> Verdict {
    match verdict.prepared.first() {
        Some(need) if !prepared => {
            let demanding = answers.iter().find(|answer| answer.prepared.contains(need));
            let matched = demanding.and_then(|answer| answer.matched.clone()).map(Arc::new);
            let (layer, hop) = (Some(need.layer), need.hop);
            Verdict { effect: Effect::Deny, reason: Reason::ApprovalRequired, layer, hop, matched, ..verdict }
        }
        _ => verdict,
    }
}

/// Compares an expectation with the denial of an impossible chain.
fn refused(document: &Document, test: &TestSpec, expectation: &Expectation, problem: &str) -> Option<Box<Failure>> {
    let got = Outcome { effect: Effect::Deny, reason: Some(Reason::IssuerNotEntitled), layer: Some(Layer::Identity) };
    let wanted = wanted(expectation);
    // A test may expect exactly this denial. A test that expects a denial for any reason did not mean this one.
    if wanted.reason == got.reason && wanted.fits(&got) {
        return None;
    }
    Some(Box::new(Failure { problem: Some(problem.to_owned()), ..failure(document, test, expectation, wanted, got) }))
}

fn failure(document: &Document, test: &TestSpec, expectation: &Expectation, wanted: Outcome, got: Outcome) -> Failure {
    let mut arguments = String::new();
    expectation.arguments.write_jcs(&mut arguments);
    Failure {
        path: document.path.clone(),
        line: expectation.line,
        column: expectation.column,
        agents: test.agents.clone(),
        tool: expectation.tool.clone(),
        arguments,
        wanted,
        got,
        hop: None,
        decided_by: None,
        problem: None,
    }
}

fn wanted(expectation: &Expectation) -> Outcome {
    Outcome { effect: expectation.want, reason: expectation.reason, layer: expectation.layer }
}

/// Identifies an entry. Two lists of one document may contain the same text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EntryKey {
    kind: String,
    id: String,
    list: Option<&'static str>,
    text: String,
}

impl EntryKey {
    /// The entry that decided in a layer; `None` if no entry did.
    fn of(answer: &LayerAnswer) -> Option<Self> {
        let matched = answer.matched.as_ref().filter(|matched| !matched.entry.is_empty())?;
        if is_refusal(answer.reason) {
            return None;
        }
        let list = list_of(matched, answer.effect, answer.reason);
        Some(Self { kind: matched.kind.to_owned(), id: matched.id.to_string(), list, text: matched.entry.to_string() })
    }
}

/// Whether a field of an agent's document decided, and not an entry.
fn is_refusal(reason: Reason) -> bool {
    matches!(reason, Reason::ApplicationNotServed | Reason::UserNotServed | Reason::DelegationNotAllowed)
}

/// The list of the entry that gave an effect; `None` if the effect does not determine it. A failed condition may be in any list.
fn list_of(matched: &EntryRef, effect: Effect, reason: Reason) -> Option<&'static str> {
    match (matched.kind, effect, reason) {
        ("guardrail", ..) => Some(FORBID_WHEN),
        (_, _, Reason::ConditionError) => None,
        // An unprepared call is denied by an `allow` or an `approve` entry, and the effect does not show which.
        (_, Effect::Deny, Reason::ApprovalRequired) => None,
        (_, Effect::Deny, _) => Some(List::Deny.as_str()),
        (_, Effect::NeedsApproval, _) => Some(List::Approve.as_str()),
        (_, Effect::Permit, _) => Some(List::Allow.as_str()),
    }
}

const FORBID_WHEN: &str = "forbid_when";

/// The location of the entry or document that decided.
fn place(documents: &[Document], matched: &EntryRef, effect: Effect, reason: Reason) -> Place {
    let list = list_of(matched, effect, reason);
    let document = documents.iter().find(|document| document.key.kind == matched.kind && document.key.id == *matched.id);
    let of_entry = document.filter(|_| !matched.entry.is_empty()).and_then(|document| {
        let places = entries(document);
        places.into_iter().find(|place| place.entry == *matched.entry && list.is_none_or(|list| place.list == list))
    });
    if let Some(place) = of_entry {
        return place;
    }
    let field = if is_refusal(reason) { refusal_field(reason) } else { "" };
    let at = document.map_or(Position::START, |document| document.position(field, 0));
    Place {
        kind: matched.kind.to_owned(),
        id: matched.id.to_string(),
        list: field,
        entry: String::new(),
        path: document.map(|document| document.path.clone()).unwrap_or_default(),
        line: at.line,
        column: at.column,
    }
}

fn refusal_field(reason: Reason) -> &'static str {
    match reason {
        Reason::ApplicationNotServed => "applications",
        Reason::UserNotServed => "acts_for",
        _ => "delegates_to",
    }
}

/// All entries of a document with their locations.
fn entries(document: &Document) -> Vec<Place> {
    let found = |list: &'static str, index: usize, text: &str| {
        let at = document.position(list, index);
        Place {
            kind: document.body.kind().to_owned(),
            id: document.key.id.clone(),
            list,
            entry: text.to_owned(),
            path: document.path.clone(),
            line: at.line,
            column: at.column,
        }
    };
    if let Body::Guardrail(guardrail) = &document.body {
        return vec![found(FORBID_WHEN, 0, guardrail.forbid_when.text())];
    }
    let Some(permissions) = document.permissions() else { return Vec::new() };
    let of = |list: List| permissions.list(list).iter().enumerate().map(move |(index, entry)| (list, index, entry));
    List::ALL.into_iter().flat_map(of).map(|(list, index, entry)| found(list.as_str(), index, entry.text())).collect()
}

/// The enforced entries, and those that no call reached.
fn coverage(documents: &[Document], reached: &HashSet<EntryKey>) -> Coverage {
    let in_use = included(documents);
    let counts = |document: &&Document| match &document.body {
        _ if document.is_shadow() => false,
        Body::PermissionSet(_) => in_use.contains(document.key.id.as_str()),
        Body::Agent(_) | Body::Group(_) | Body::Application(_) | Body::Guardrail(_) => true,
        _ => false,
    };
    let mut coverage = Coverage::default();
    for place in documents.iter().filter(counts).flat_map(entries) {
        coverage.entries += 1;
        let key = |list| EntryKey { kind: place.kind.clone(), id: place.id.clone(), list, text: place.entry.clone() };
        if !reached.contains(&key(Some(place.list))) && !reached.contains(&key(None)) {
            coverage.unreached.push(place);
        }
    }
    coverage.unreached.sort_by(|a, b| (&a.path, a.line, a.column).cmp(&(&b.path, b.line, b.column)));
    coverage
}

/// The permission sets that some enforced document includes, directly or through others.
fn included(documents: &[Document]) -> HashSet<&str> {
    let sets: HashMap<&str, &Permissions> = documents
        .iter()
        .filter(|document| !document.is_shadow())
        .filter_map(|document| match &document.body {
            Body::PermissionSet(permissions) => Some((document.key.id.as_str(), permissions)),
            _ => None,
        })
        .collect();
    let owners = documents.iter().filter(|document| !document.is_shadow() && !matches!(document.body, Body::PermissionSet(_)));
    let mut pending: Vec<&str> =
        owners.filter_map(Document::permissions).flat_map(|permissions| permissions.include.iter().map(|id| &**id)).collect();
    let mut found = HashSet::new();
    while let Some(id) = pending.pop() {
        if found.insert(id) {
            pending.extend(sets.get(id).into_iter().flat_map(|set| set.include.iter().map(|id| &**id)));
        }
    }
    found
}

impl Outcome {
    /// Whether an answer matches this expected one, as far as it is stated.
    fn fits(&self, got: &Outcome) -> bool {
        self.effect == got.effect
            && (self.reason.is_none() || self.reason == got.reason)
            && (self.layer.is_none() || self.layer == got.layer)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.effect.as_str())?;
        if let Some(reason) = self.reason {
            write!(f, " {reason}")?;
        }
        self.layer.map_or(Ok(()), |layer| write!(f, " (layer {layer})"))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.list, self.entry.as_str()) {
            ("", "") => write!(f, "{} `{}`, which has no entry for this call", self.kind, self.id)?,
            (list, "") => write!(f, "`{list}` of {} `{}`", self.kind, self.id)?,
            (list, entry) => write!(f, "`{list}: {entry}` of {} `{}`", self.kind, self.id)?,
        }
        if self.path.is_empty() { f.write_str(" (stored)") } else { write!(f, " ({}:{}:{})", self.path, self.line, self.column) }
    }
}

/// Several lines: the call, the expected answer, the actual answer, and the deciding entry.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let agents: Vec<&str> = self.agents.iter().map(AgentId::as_str).collect();
        write!(f, "{}:{}:{}: {} calls {} {}", self.path, self.line, self.column, agents.join(" > "), self.tool, self.arguments)?;
        write!(f, "\n  wanted  {}\n  got     {}", self.wanted, self.got)?;
        if let Some(agent) = self.hop.and_then(|hop| self.agents.get(hop)) {
            write!(f, " at {agent}")?;
        }
        match (&self.problem, &self.decided_by) {
            (Some(problem), _) => write!(f, "\n  because {problem}"),
            (None, Some(place)) => write!(f, "\n  by      {place}"),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
