//! Runs `kind: test` documents: each expected call is evaluated by the compiled policy, and what came out is compared.
//!
//! Pure. A test says what a verified chain would say, so what no chain could say is a failure: an issuer that may not vouch for
//! a group or an application. Look next at [`case`](super::document) for what a test says, and at `pap/apply.rs`, which runs
//! tests before anything is written.

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

/// The time that conditions see where a test names none: 2026-01-07T12:00:00Z, a Wednesday at noon.
pub const DEFAULT_AT_UNIX_S: i64 = 1_767_787_200;

/// What running all tests of a policy showed.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Documents of `kind: test`.
    pub tests: usize,
    /// Expected calls that came to what was wanted.
    pub passed: usize,
    /// Those that did not, in the order of the files.
    pub failures: Vec<Failure>,
    /// Which entries the tests reached.
    pub coverage: Coverage,
    /// What is worth knowing and fails nothing.
    pub notes: Vec<String>,
}

/// One expected call that came to something else.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The test's file.
    pub path: String,
    /// Where the expectation stands.
    pub line: u32,
    /// Where the expectation stands.
    pub column: u32,
    /// The chain, root to leaf.
    pub agents: Vec<AgentId>,
    /// `server/tool`.
    pub tool: Arc<str>,
    /// The arguments as canonical JSON.
    pub arguments: String,
    /// What was wanted.
    pub wanted: Outcome,
    /// What it came to.
    pub got: Outcome,
    /// Which agent or token decided, root 0.
    pub hop: Option<usize>,
    /// What decided, where a document did.
    pub decided_by: Option<Place>,
    /// Why no chain could be as the test says.
    pub problem: Option<String>,
}

/// An effect with its reason and layer; of what is wanted only what the test says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The effect.
    pub effect: Effect,
    /// Why.
    pub reason: Option<Reason>,
    /// The layer that decided.
    pub layer: Option<Layer>,
}

/// A document or an entry of one, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The document's kind.
    pub kind: String,
    /// The document's id.
    pub id: String,
    /// The list that the entry stands in, `forbid_when` of a guardrail; empty where the whole document is meant.
    pub list: &'static str,
    /// The entry as it was written; empty where the whole document is meant.
    pub entry: String,
    /// The file; empty for what has none.
    pub path: String,
    /// 1-based.
    pub line: u32,
    /// 1-based.
    pub column: u32,
}

/// Which entries of the documents in force some expected call reached: the entry decided in its layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// All entries.
    pub entries: usize,
    /// Those that no test reached, in the order of the files.
    pub unreached: Vec<Place>,
}

impl Coverage {
    /// Reached entries of a hundred, rounded down; 100 where there are none.
    pub fn percent(&self) -> usize {
        let reached = self.entries.saturating_sub(self.unreached.len());
        (reached * 100).checked_div(self.entries).unwrap_or(100)
    }
}

/// Runs every test among the documents. `policy` is what they compiled to.
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

/// Groups that some document knows; a chain carries no other.
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

/// Why the issuer cannot have signed such a root.
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

fn judge(
    document: &Document,
    test: &TestSpec,
    expectation: &Expectation,
    (policy, subject): (&Compiled, &mut Subject),
    documents: &[Document],
    reached: &mut HashSet<EntryKey>,
) -> Option<Box<Failure>> {
    if test.scope.is_none() {
        // The tokens are not what is tested: each grants the tool that is called.
        let free = Scope { tools: [(expectation.tool.clone(), ArgumentMap::unconstrained())].into() };
        subject.scopes.fill(free);
    }
    let call = Call {
        tool: &expectation.tool,
        // A pinned schema is not what is tested either.
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

/// What an unprepared call is answered: an entry with `prepared:` denies until an approval of what it names is there.
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

/// A call of a chain that could not be.
fn refused(document: &Document, test: &TestSpec, expectation: &Expectation, problem: &str) -> Option<Box<Failure>> {
    let got = Outcome { effect: Effect::Deny, reason: Some(Reason::IssuerNotEntitled), layer: Some(Layer::Identity) };
    let wanted = wanted(expectation);
    // Denied for this very reason is what a test may want; denied for whatever reason is not what it meant.
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

/// Names an entry among all: two lists of a document may hold the same text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EntryKey {
    kind: String,
    id: String,
    list: Option<&'static str>,
    text: String,
}

impl EntryKey {
    /// The entry that decided in a layer; `None` where no entry did.
    fn of(answer: &LayerAnswer) -> Option<Self> {
        let matched = answer.matched.as_ref().filter(|matched| !matched.entry.is_empty())?;
        if is_refusal(answer.reason) {
            return None;
        }
        let list = list_of(matched, answer.effect, answer.reason);
        Some(Self { kind: matched.kind.to_owned(), id: matched.id.to_string(), list, text: matched.entry.to_string() })
    }
}

/// Whether a key of an agent's document decided, and no entry.
fn is_refusal(reason: Reason) -> bool {
    matches!(reason, Reason::ApplicationNotServed | Reason::UserNotServed | Reason::DelegationNotAllowed)
}

/// The list of an entry that decided so; a condition that failed may stand in each.
fn list_of(matched: &EntryRef, effect: Effect, reason: Reason) -> Option<&'static str> {
    match (matched.kind, effect, reason) {
        ("guardrail", ..) => Some(FORBID_WHEN),
        (_, _, Reason::ConditionError) => None,
        // Of an entry that was not prepared for, the list is not to be told from the effect.
        (_, Effect::Deny, Reason::ApprovalRequired) => None,
        (_, Effect::Deny, _) => Some(List::Deny.as_str()),
        (_, Effect::NeedsApproval, _) => Some(List::Approve.as_str()),
        (_, Effect::Permit, _) => Some(List::Allow.as_str()),
    }
}

const FORBID_WHEN: &str = "forbid_when";

/// Where what decided stands.
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

/// Every entry of a document with its place.
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

/// The entries in force, and which of them nothing reached.
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

/// Permission sets that some document in force includes, directly or through others.
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
    /// Whether what came out is what was wanted, as far as that was said.
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

/// Some lines: what was called, what was wanted, what came out, and what decided.
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
