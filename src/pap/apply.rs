//! Applying a policy folder: the folder is the whole policy, in one commit, or nothing changes.

use std::collections::BTreeMap;

use super::{Admin, Authorized, Error, keyed};
use crate::model::records::{DocumentKey, DocumentRow, Origin, Write};
use crate::model::revision::Revision;
use crate::policy::Compiled;
use crate::policy::Diagnostic;
use crate::policy::diff::DocumentChange;
use crate::policy::document::{Body, Document, Role};
use crate::policy::source::{SourceFile, parse};
use crate::policy::{Severity, testrun, validate};
use crate::store::StoredDocument;

/// What applying did, or would do.
#[derive(Clone, Debug)]
pub struct ApplyOutcome {
    /// The revision that holds the policy now.
    pub revision: Revision,
    /// By kind and id.
    pub changes: Vec<DocumentChange>,
    /// What `check` warns of.
    pub warnings: Vec<Diagnostic>,
}

/// Documents that decide who may administer and whom we believe: changing them takes two operators once there are two.
const TWO_PERSON_KINDS: &[&str] = &["operator", "issuer"];

impl Admin {
    /// Says what [`Admin::apply`] would object to.
    ///
    /// # Errors
    /// If the act cannot be recorded.
    pub async fn check_policy(&self, by: &Authorized, files: Vec<SourceFile>) -> Result<Vec<Diagnostic>, Error> {
        self.record(by, None, "check a policy folder")?;
        // One at a time and off this runtime: a large folder must not hold up a kill.
        let _one = self.applying.lock().await;
        Ok(match aside(move || read(&files)).await? {
            Ok((_, warnings)) => warnings,
            Err(diagnostics) => diagnostics,
        })
    }

    /// Replaces the whole policy by these files; documents that were made through the API are left alone.
    ///
    /// # Errors
    /// [`Error::Policy`] with every diagnostic if there is one error; [`Error::Tests`] if a test of the folder fails;
    /// [`Error::PermissionDenied`] where a second operator is
    /// needed; as the store fails, or if somebody changed the policy meanwhile.
    pub async fn apply(&self, by: &Authorized, files: Vec<SourceFile>, dry_run: bool) -> Result<ApplyOutcome, Error> {
        // One at a time, off the runtime that serves the kill switch; what another server applies meanwhile is a conflict.
        let _one = self.applying.lock().await;
        let read = aside(move || read(&files)).await?.map_err(Error::Policy);
        let (documents, mut warnings) = self.or_record_refused(by, read)?;
        let stored = self.store.documents(None).await?;
        let revision = stored.revision;
        let left = keyed(stored.documents);
        let two_needed = needs_two(left.values());
        let planned = move || {
            let plan = plan(&documents, left);
            let listed = plan.newly_listed(&documents);
            (documents, plan, listed)
        };
        let (documents, plan, listed) = aside(planned).await?;
        let alive = self.no_dead_keys(&listed).await;
        self.or_record_refused(by, alive)?;
        let fits = aside(move || whole(documents, plan)).await?;
        let (plan, said) = self.or_record_refused(by, fits)?;
        warnings.extend(said);
        if dry_run {
            self.record(by, None, "apply a policy folder: dry run")?;
            return Ok(ApplyOutcome { revision, changes: plan.changes, warnings });
        }
        self.or_record_refused(by, two_signed(by, two_needed, &plan))?;
        if plan.writes.is_empty() {
            self.record(by, None, "apply a policy folder: no change")?;
            return Ok(ApplyOutcome { revision, changes: plan.changes, warnings });
        }
        let Plan { changes, writes, one_must_sign, .. } = plan;
        let account = format!("apply a policy folder: {} document(s) change", changes.len());
        let committed = self.commit_leaving(by, one_must_sign, writes, Some(revision.number), &account).await?;
        Ok(ApplyOutcome { revision: committed.revision, changes, warnings })
    }
}

/// What a folder changes of what is stored.
#[derive(Default)]
pub(super) struct Plan {
    /// Removals first, then by kind and id.
    pub(super) changes: Vec<DocumentChange>,
    pub(super) writes: Vec<Write>,
    /// Documents that were made through the API and stay.
    pub(super) kept: Vec<DocumentRow>,
    /// Documents of before that are changed or gone.
    pub(super) replaced: Vec<DocumentRow>,
    /// Keys of those who administer afterwards, where the change is one of operators: one of them must not be revoked.
    pub(super) one_must_sign: Vec<String>,
    /// A document that two people are needed for no longer asks for them.
    pub(super) weakens: bool,
}

/// What would have to be written so that the folder's documents are those that are stored.
pub(super) fn plan(documents: &[Document], left: BTreeMap<DocumentKey, StoredDocument>) -> Plan {
    let rows = documents.iter().filter(|document| !matches!(document.body, Body::Test(_)));
    plan_rows(rows.map(|document| document.to_row(Origin::Folder)), left)
}

/// The same of rows, all of which count as a folder's.
pub(super) fn plan_rows(rows: impl Iterator<Item = DocumentRow>, mut left: BTreeMap<DocumentKey, StoredDocument>) -> Plan {
    let mut plan = Plan::default();
    for row in rows {
        let before = left.remove(&row.key);
        let change = match &before {
            None => "added",
            Some(before) if (&before.row.json, &before.row.origin) != (&row.json, &row.origin) => "changed",
            Some(_) => continue,
        };
        plan.replaced.extend(before.map(|before| before.row));
        plan.changes.push(DocumentChange { change, key: row.key.clone() });
        plan.writes.push(Write::PutDocument(row));
    }
    for (key, stored) in left {
        if stored.row.origin == Origin::Api {
            plan.kept.push(stored.row);
            continue;
        }
        plan.replaced.push(stored.row);
        plan.changes.push(DocumentChange { change: "removed", key: key.clone() });
        plan.writes.push(Write::RemoveDocument(key));
    }
    plan.changes.sort_by(|a, b| (a.change != "removed", &a.key).cmp(&(b.change != "removed", &b.key)));
    plan
}

/// Whether a change of operators or issuers needs two people: whether two or more administer now.
pub(super) fn needs_two<'a>(stored: impl Iterator<Item = &'a StoredDocument>) -> bool {
    // Who may not administer cannot be the second one either: counting approvers would lock everybody out.
    stored.filter_map(|stored| Document::from_row(&stored.row).ok()).filter(administers).count() >= 2
}

/// Whether enough operators signed for these changes.
pub(super) fn two_signed(by: &Authorized, two_needed: bool, plan: &Plan) -> Result<(), Error> {
    let trust_changes = plan.changes.iter().any(|change| TWO_PERSON_KINDS.contains(&change.key.kind.as_str()));
    if !two_needed || by.operators().len() >= 2 || !(trust_changes || plan.weakens) {
        return Ok(());
    }
    let what = if trust_changes { "operators or issuers change" } else { "a document with `two_person` would no longer have it" };
    let message = format!("{what} and two or more operators administer: a second one must sign too (`--operator-key` twice)");
    Err(Error::PermissionDenied(message))
}

/// Runs what takes long on another thread than the one that serves the kill switch.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Error::Store(crate::store::Error::Unavailable("the policy could not be read: see the log".to_owned())))
}

/// Reads and checks a folder: documents and warnings, or every diagnostic if there is one error.
pub(super) fn read(files: &[SourceFile]) -> Result<(Vec<Document>, Vec<Diagnostic>), Vec<Diagnostic>> {
    let parsed = parse(files);
    let mut diagnostics = parsed.diagnostics;
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(validate::check(&parsed.documents));
    }
    if diagnostics.iter().any(Diagnostic::is_error) { Err(diagnostics) } else { Ok((parsed.documents, diagnostics)) }
}

/// The folder together with what stays of the store: it must still be a policy that somebody administers, and pass its own tests.
/// What is worth a warning is returned, with the plan and what it does besides.
fn whole(mut documents: Vec<Document>, mut plan: Plan) -> Result<(Plan, Vec<Diagnostic>), Error> {
    documents.extend(plan.kept.iter().filter_map(|row| Document::from_row(row).ok()));
    let policy = Compiled::compile(&documents).map_err(Error::Policy)?;
    still_administered(&documents)?;
    let report = testrun::run(&documents, &policy);
    if !report.failures.is_empty() {
        let failures = report.failures.iter().map(ToString::to_string).collect();
        return Err(Error::Tests { failures, passed: report.passed });
    }
    let message = "the folder has no tests: say in `kind: test` documents what must be permitted and what must not";
    let mut said = plan.complete(&documents);
    said.extend((report.tests == 0).then(|| Diagnostic::of_folder(Severity::Warning, message)));
    Ok((plan, said))
}

pub(super) fn administers(document: &Document) -> bool {
    matches!(&document.body, Body::Operator(operator) if operator.roles.contains(&Role::Administer))
}

/// Somebody must be left who can undo the change.
pub(super) fn still_administered(documents: &[Document]) -> Result<(), Error> {
    if documents.iter().any(administers) {
        return Ok(());
    }
    let message = "no operator with the role `administer` would be left: keep one".to_owned();
    Err(Error::Invalid { field: "files", message })
}
