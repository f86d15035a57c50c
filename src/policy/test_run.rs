//! Runs `kind: test` documents: evaluates each expected call with the compiled policy and compares the answers.
//!
//! This file is pure. A test stands for a verified chain. If no issuer could vouch for the group or application of a test, its
//! calls fail. Look next at `document/test_case.rs` for the contents of a test, and at `pap/apply.rs`, which runs the tests
//! before it writes.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use crate::model::constraint::{ConstraintMap, abbreviate};
use crate::model::decision::{Effect, PolicyEntryRef};
use crate::model::ids::{AgentId, SessionId, TaskId};
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::{DelegationSubject, TokenScope, ToolCall};

use super::compile::LayerAnswer;
use super::diagnostic::SourcePosition;
use super::document::{Document, DocumentBody, ExpectedCall, IssuerSpec, ListKind, NameSelection, PermissionLists, TestSpec};
use super::{CompiledPolicy, PolicyVerdict};

/// The time that conditions see if a test names none: 2026-01-07T12:00:00Z, a Wednesday at noon.
pub const DEFAULT_TIME_UNIX_S: i64 = 1_767_787_200;

/// The result of running all tests of a policy.
#[derive(Clone, Debug, PartialEq)]
pub struct TestReport {
    /// The number of `kind: test` documents.
    pub tests: usize,
    /// The number of calls with the expected answer.
    pub passed: usize,
    /// The calls with another answer, in the order of the files.
    pub failures: Vec<TestFailure>,
    /// The entries that the tests reached.
    pub coverage: EntryCoverage,
    /// Remarks that fail no test.
    pub notes: Vec<String>,
}

/// One call with an answer that was not expected.
#[derive(Clone, Debug, PartialEq)]
pub struct TestFailure {
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
    pub expected: TestOutcome,
    /// The actual answer.
    pub actual: TestOutcome,
    /// The index of the deciding agent or token; the root is 0.
    pub hop: Option<usize>,
    /// The document or entry that decided; `None` if none did.
    pub decided_by: Option<EntryLocation>,
    /// The reason why no chain can match the test.
    pub problem: Option<String>,
}

/// An effect with its reason and its layer. In an expected outcome, only the stated parts are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestOutcome {
    /// The effect.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Option<Reason>,
    /// The layer that decided.
    pub layer: Option<DecisionLayer>,
}

/// A document or one of its entries, with its position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryLocation {
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
pub struct EntryCoverage {
    /// The number of all entries.
    pub entries: usize,
    /// The entries that no test reached, in the order of the files.
    pub unreached: Vec<EntryLocation>,
}

impl EntryCoverage {
    /// The percentage of reached entries, rounded down; 100 if there are no entries.
    pub fn percent(&self) -> usize {
        let reached = self.entries.saturating_sub(self.unreached.len());
        (reached * 100).checked_div(self.entries).unwrap_or(100)
    }
}

/// Runs every test among the documents. `policy` must be compiled from the same documents.
pub fn run_tests(documents: &[Document], policy: &CompiledPolicy) -> TestReport {
    let issuers: HashMap<&str, &IssuerSpec> = documents
        .iter()
        .filter_map(|document| match &document.body {
            DocumentBody::Issuer(issuer) => Some((issuer.id.as_str(), issuer)),
            _ => None,
        })
        .collect();
    let known = known_groups(documents);
    let mut report =
        TestReport { tests: 0, passed: 0, failures: Vec::new(), coverage: EntryCoverage::default(), notes: Vec::new() };
    let mut reached: HashSet<PermissionEntryId> = HashSet::new();
    for document in documents {
        let DocumentBody::Test(test) = &document.body else { continue };
        report.tests += 1;
        let problem = issuers.get(test.user.issuer.as_str()).and_then(|issuer| entitlement_problem(issuer, test, &known));
        let mut subject = build_subject(test);
        for group in subject.groups.iter().filter(|group| !known.contains(group.as_str())) {
            let message = format!("no document knows the group `{}`, so no chain carries it", abbreviate(group.as_str()));
            report.notes.push(format!("{}:{}: {message}", document.path, document.line));
        }
        subject.groups.retain(|group| known.contains(group.as_str()));
        for expectation in &test.expect {
            let failure = match &problem {
                Some(problem) => check_refused_call(document, test, expectation, problem),
                None => run_expected_call(document, test, expectation, (policy, &mut subject), documents, &mut reached),
            };
            match failure {
                Some(failure) => report.failures.push(*failure),
                None => report.passed += 1,
            }
        }
    }
    report.coverage = measure_coverage(documents, &reached);
    report
}

/// The groups that some document names. A chain carries no other groups.
fn known_groups(documents: &[Document]) -> HashSet<&str> {
    let mut known = HashSet::new();
    for document in documents.iter().filter(|document| !document.is_shadow()) {
        match &document.body {
            DocumentBody::Issuer(IssuerSpec { groups: NameSelection::Listed(groups), .. }) => {
                known.extend(groups.iter().map(|group| group.as_str()))
            }
            DocumentBody::Agent(agent) => {
                if let NameSelection::Listed(groups) = &agent.acts_for {
                    known.extend(groups.iter().map(|group| group.as_str()));
                }
            }
            DocumentBody::Group(_) => {
                known.insert(document.key.id.as_str());
            }
            _ => {}
        }
    }
    known
}

/// The reason why the issuer cannot have signed the root that a test assumes; `None` if it can.
fn entitlement_problem(issuer: &IssuerSpec, test: &TestSpec, known: &HashSet<&str>) -> Option<String> {
    let group = test.groups.iter().find(|group| known.contains(group.as_str()) && !issuer.groups.contains(group));
    if let Some(group) = group {
        return Some(format!(
            "issuer `{}` may not say that a user is in group `{}`: add it to the issuer's `groups`, or test another user",
            issuer.id,
            abbreviate(group.as_str())
        ));
    }
    (!issuer.applications.contains(&test.application)).then(|| {
        format!(
            "issuer `{}` may not speak for application `{}`: add it to the issuer's `applications`, or test another one",
            issuer.id,
            abbreviate(test.application.as_str())
        )
    })
}

fn build_subject(test: &TestSpec) -> DelegationSubject {
    let scope = test.scope.clone().unwrap_or_default();
    DelegationSubject {
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
fn run_expected_call(
    document: &Document,
    test: &TestSpec,
    expectation: &ExpectedCall,
    (policy, subject): (&CompiledPolicy, &mut DelegationSubject),
    documents: &[Document],
    reached: &mut HashSet<PermissionEntryId>,
) -> Option<Box<TestFailure>> {
    if test.scope.is_none() {
        // The test does not check tokens, so each token grants the tool that is called.
        let free = TokenScope { tools: [(expectation.tool.clone(), ConstraintMap::unconstrained())].into() };
        subject.scopes.fill(free);
    }
    let call = ToolCall {
        tool: &expectation.tool,
        // The test does not check pinned schemas either.
        tool_schema_sha256: policy.tool(&expectation.tool).and_then(|tool| tool.schema_sha256),
        arguments: &expectation.arguments,
        environment: expectation.environment.as_ref().or(test.environment.as_ref()),
        unix_s: expectation.at_unix_s.or(test.at_unix_s).unwrap_or(DEFAULT_TIME_UNIX_S),
    };
    let resolved = policy.resolve(subject);
    let answers = policy.explain(&resolved, subject, &call);
    reached.extend(answers.iter().filter_map(PermissionEntryId::of));
    let verdict = apply_missing_preparation(policy.evaluate(&resolved, subject, &call), expectation.assume_prepared, &answers);
    let got = TestOutcome { effect: verdict.effect, reason: Some(verdict.reason), layer: verdict.layer };
    let wanted = expected_outcome(expectation);
    if wanted.matches(&got) {
        return None;
    }
    let decided_by = verdict.matched.as_deref().map(|matched| locate_entry(documents, matched, verdict.effect, verdict.reason));
    Some(Box::new(TestFailure { hop: verdict.hop, decided_by, ..build_failure(document, test, expectation, wanted, got) }))
}

/// The answer to an unprepared call: an entry with `prepared:` denies until the approval that it names exists.
fn apply_missing_preparation(verdict: PolicyVerdict, prepared: bool, answers: &[LayerAnswer]) -> PolicyVerdict {
    match verdict.prepared.first() {
        Some(need) if !prepared => {
            let requiring_answer = answers.iter().find(|answer| answer.prepared.contains(need));
            let matched = requiring_answer.and_then(|answer| answer.matched.clone()).map(Arc::new);
            let (layer, hop) = (Some(need.layer), need.hop);
            PolicyVerdict { effect: Effect::Deny, reason: Reason::ApprovalRequired, layer, hop, matched, ..verdict }
        }
        _ => verdict,
    }
}

/// Compares an expectation with the denial of an impossible chain.
fn check_refused_call(
    document: &Document,
    test: &TestSpec,
    expectation: &ExpectedCall,
    problem: &str,
) -> Option<Box<TestFailure>> {
    let got = TestOutcome { effect: Effect::Deny, reason: Some(Reason::IssuerNotEntitled), layer: Some(DecisionLayer::Identity) };
    let wanted = expected_outcome(expectation);
    // A test may expect exactly this denial. A test that expects a denial for any reason did not mean this one.
    if wanted.reason == got.reason && wanted.matches(&got) {
        return None;
    }
    Some(Box::new(TestFailure { problem: Some(problem.to_owned()), ..build_failure(document, test, expectation, wanted, got) }))
}

fn build_failure(
    document: &Document,
    test: &TestSpec,
    expectation: &ExpectedCall,
    wanted: TestOutcome,
    got: TestOutcome,
) -> TestFailure {
    let mut arguments = String::new();
    expectation.arguments.write_jcs(&mut arguments);
    TestFailure {
        path: document.path.clone(),
        line: expectation.line,
        column: expectation.column,
        agents: test.agents.clone(),
        tool: expectation.tool.clone(),
        arguments,
        expected: wanted,
        actual: got,
        hop: None,
        decided_by: None,
        problem: None,
    }
}

fn expected_outcome(expectation: &ExpectedCall) -> TestOutcome {
    TestOutcome { effect: expectation.effect, reason: expectation.reason, layer: expectation.layer }
}

/// Identifies an entry. Two lists of one document may contain the same text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct PermissionEntryId {
    kind: String,
    id: String,
    list: Option<&'static str>,
    text: String,
}

impl PermissionEntryId {
    /// The entry that decided in a layer; `None` if no entry did.
    fn of(answer: &LayerAnswer) -> Option<Self> {
        let matched = answer.matched.as_ref().filter(|matched| !matched.entry.is_empty())?;
        if is_agent_refusal(answer.reason) {
            return None;
        }
        let list = deciding_list(matched, answer.effect, answer.reason);
        Some(Self { kind: matched.kind.to_owned(), id: matched.id.to_string(), list, text: matched.entry.to_string() })
    }
}

/// Whether a field of an agent's document decided, and not an entry.
fn is_agent_refusal(reason: Reason) -> bool {
    matches!(reason, Reason::ApplicationNotServed | Reason::UserNotServed | Reason::DelegationNotAllowed)
}

/// The list of the entry that gave an effect; `None` if the effect does not determine it. A failed condition may be in any list.
fn deciding_list(matched: &PolicyEntryRef, effect: Effect, reason: Reason) -> Option<&'static str> {
    match (matched.kind, effect, reason) {
        ("guardrail", ..) => Some(FORBID_WHEN),
        (_, _, Reason::ConditionError) => None,
        // An unprepared call is denied by an `allow` or an `approve` entry, and the effect does not show which.
        (_, Effect::Deny, Reason::ApprovalRequired) => None,
        (_, Effect::Deny, _) => Some(ListKind::Deny.as_str()),
        (_, Effect::NeedsApproval, _) => Some(ListKind::Approve.as_str()),
        (_, Effect::Permit, _) => Some(ListKind::Allow.as_str()),
    }
}

const FORBID_WHEN: &str = "forbid_when";

/// The location of the entry or document that decided.
fn locate_entry(documents: &[Document], matched: &PolicyEntryRef, effect: Effect, reason: Reason) -> EntryLocation {
    let list = deciding_list(matched, effect, reason);
    let document = documents.iter().find(|document| document.key.kind == matched.kind && document.key.id == *matched.id);
    let of_entry = document.filter(|_| !matched.entry.is_empty()).and_then(|document| {
        let locations = list_entries(document);
        locations.into_iter().find(|location| location.entry == *matched.entry && list.is_none_or(|list| location.list == list))
    });
    if let Some(location) = of_entry {
        return location;
    }
    let field = if is_agent_refusal(reason) { refusal_field(reason) } else { "" };
    let at = document.map_or(SourcePosition::START, |document| document.field_position(field, 0));
    EntryLocation {
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
fn list_entries(document: &Document) -> Vec<EntryLocation> {
    let found = |list: &'static str, index: usize, text: &str| {
        let at = document.field_position(list, index);
        EntryLocation {
            kind: document.body.kind().to_owned(),
            id: document.key.id.clone(),
            list,
            entry: text.to_owned(),
            path: document.path.clone(),
            line: at.line,
            column: at.column,
        }
    };
    if let DocumentBody::Guardrail(guardrail) = &document.body {
        return vec![found(FORBID_WHEN, 0, guardrail.forbid_when.text())];
    }
    let Some(permissions) = document.permissions() else { return Vec::new() };
    let of = |list: ListKind| permissions.entries(list).iter().enumerate().map(move |(index, entry)| (list, index, entry));
    ListKind::ALL.into_iter().flat_map(of).map(|(list, index, entry)| found(list.as_str(), index, entry.text())).collect()
}

/// The enforced entries, and those that no call reached.
fn measure_coverage(documents: &[Document], reached: &HashSet<PermissionEntryId>) -> EntryCoverage {
    let in_use = included_sets(documents);
    let counts = |document: &&Document| match &document.body {
        _ if document.is_shadow() => false,
        DocumentBody::PermissionSet(_) => in_use.contains(document.key.id.as_str()),
        DocumentBody::Agent(_) | DocumentBody::Group(_) | DocumentBody::Application(_) | DocumentBody::Guardrail(_) => true,
        _ => false,
    };
    let mut coverage = EntryCoverage::default();
    for location in documents.iter().filter(counts).flat_map(list_entries) {
        coverage.entries += 1;
        let key =
            |list| PermissionEntryId { kind: location.kind.clone(), id: location.id.clone(), list, text: location.entry.clone() };
        if !reached.contains(&key(Some(location.list))) && !reached.contains(&key(None)) {
            coverage.unreached.push(location);
        }
    }
    coverage.unreached.sort_by(|a, b| (&a.path, a.line, a.column).cmp(&(&b.path, b.line, b.column)));
    coverage
}

/// The permission sets that some enforced document includes, directly or through others.
fn included_sets(documents: &[Document]) -> HashSet<&str> {
    let sets: HashMap<&str, &PermissionLists> = documents
        .iter()
        .filter(|document| !document.is_shadow())
        .filter_map(|document| match &document.body {
            DocumentBody::PermissionSet(permissions) => Some((document.key.id.as_str(), permissions)),
            _ => None,
        })
        .collect();
    let owners =
        documents.iter().filter(|document| !document.is_shadow() && !matches!(document.body, DocumentBody::PermissionSet(_)));
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

impl TestOutcome {
    /// Whether an answer matches this expected one, as far as it is stated.
    fn matches(&self, got: &TestOutcome) -> bool {
        self.effect == got.effect
            && (self.reason.is_none() || self.reason == got.reason)
            && (self.layer.is_none() || self.layer == got.layer)
    }
}

impl fmt::Display for TestOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.effect.as_str())?;
        if let Some(reason) = self.reason {
            write!(f, " {reason}")?;
        }
        self.layer.map_or(Ok(()), |layer| write!(f, " (layer {layer})"))
    }
}

impl fmt::Display for EntryLocation {
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
impl fmt::Display for TestFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let agents: Vec<&str> = self.agents.iter().map(AgentId::as_str).collect();
        write!(f, "{}:{}:{}: {} calls {} {}", self.path, self.line, self.column, agents.join(" > "), self.tool, self.arguments)?;
        write!(f, "\n  wanted  {}\n  got     {}", self.expected, self.actual)?;
        if let Some(agent) = self.hop.and_then(|hop| self.agents.get(hop)) {
            write!(f, " at {agent}")?;
        }
        match (&self.problem, &self.decided_by) {
            (Some(problem), _) => write!(f, "\n  because {problem}"),
            (None, Some(location)) => write!(f, "\n  by      {location}"),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
