//! Applies a policy folder: the folder becomes the whole policy in one commit, or nothing changes.
//!
//! Documents made through the API stay. Slow work runs outside the runtime of the kill switch, because a large folder must not
//! delay a revocation. Look next at `policy/source.rs`, which reads the folder, and at `pap/dead_keys.rs`, which handles the keys of a
//! change.

use std::collections::BTreeMap;

use super::administrators::is_administrator;
use super::{AdministrationPoint, AuthorizedAct, Error, index_by_key};
use crate::model::revision::Revision;
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, StoreWrite};
use crate::policy::CompiledPolicy;
use crate::policy::Diagnostic;
use crate::policy::diff::DocumentChange;
use crate::policy::document::{Document, DocumentBody};
use crate::policy::source::{SourceFile, parse_files};
use crate::policy::{Severity, test_run, validate};
use crate::store::StoredDocument;

/// The result of an apply or of a dry run.
#[derive(Clone, Debug)]
pub struct ApplyOutcome {
    /// The revision that holds the policy now.
    pub revision: Revision,
    /// The changes, by kind and id.
    pub changes: Vec<DocumentChange>,
    /// The warnings of `check`.
    pub warnings: Vec<Diagnostic>,
}

/// The kinds that decide who may administer and which issuers are trusted. A change of such a document needs two operators once
/// two exist.
const TWO_PERSON_KINDS: &[&str] = &["operator", "issuer"];

impl AdministrationPoint {
    /// Returns the diagnostics that [`AdministrationPoint::apply`] would report.
    ///
    /// # Errors
    /// If the act cannot be recorded.
    pub async fn check_policy(&self, by: &AuthorizedAct, files: Vec<SourceFile>) -> Result<Vec<Diagnostic>, Error> {
        self.record_act(by, None, "check a policy folder")?;
        // One call at a time, outside this runtime: a large folder must not delay a revocation.
        let _one = self.apply_lock.lock().await;
        let existing = self.operators_by_command().await?;
        Ok(match run_blocking(move || read_and_check(&files, &existing)).await? {
            Ok((_, warnings)) => warnings,
            Err(diagnostics) => diagnostics,
        })
    }

    /// The operators that stay beside a folder, because a command or the program itself created them.
    pub(super) async fn operators_by_command(&self) -> Result<Vec<Document>, Error> {
        let stored = self.store.documents(Some("operator")).await?.documents;
        let by_command = stored.iter().filter(|stored| stored.row.origin == DocumentOrigin::Api);
        Ok(by_command.filter_map(|stored| Document::from_row(&stored.row).ok()).collect())
    }

    /// Replaces the whole policy with these files. Documents made through the API stay unchanged.
    ///
    /// # Errors
    /// - [`Error::InvalidPolicy`] with all diagnostics if one of them is an error.
    /// - [`Error::TestsFailed`] if a test of the folder fails.
    /// - [`Error::PermissionDenied`] if a second operator must sign.
    /// - [`Error::Store`] if the store fails, or if another caller changed the policy meanwhile.
    pub async fn apply(&self, by: &AuthorizedAct, files: Vec<SourceFile>, dry_run: bool) -> Result<ApplyOutcome, Error> {
        // One call at a time, outside the runtime of the kill switch. A concurrent apply on another server ends as a conflict.
        let _one = self.apply_lock.lock().await;
        let existing = self.operators_by_command().await?;
        let read = run_blocking(move || read_and_check(&files, &existing)).await?.map_err(Error::InvalidPolicy);
        let (documents, mut warnings) = self.or_record_refusal(by, read)?;
        let stored = self.store.documents(None).await?;
        let revision = stored.revision;
        let left = index_by_key(stored.documents);
        let two_needed = needs_two_operators(left.values());
        let planned = move || {
            let plan = plan_changes(&documents, left);
            let listed = plan.newly_listed_keys(&documents);
            (documents, plan, listed)
        };
        let (documents, plan, listed) = run_blocking(planned).await?;
        let alive = self.check_no_dead_keys(&listed).await;
        self.or_record_refusal(by, alive)?;
        let fits = run_blocking(move || complete_plan(documents, plan)).await?;
        let (plan, further_warnings) = self.or_record_refusal(by, fits)?;
        warnings.extend(further_warnings);
        if dry_run {
            self.record_act(by, None, "apply a policy folder: dry run")?;
            return Ok(ApplyOutcome { revision, changes: plan.changes, warnings });
        }
        let signed = self.check_two_signed(by, two_needed, &plan).await;
        self.or_record_refusal(by, signed)?;
        if plan.writes.is_empty() {
            self.record_act(by, None, "apply a policy folder: no change")?;
            return Ok(ApplyOutcome { revision, changes: plan.changes, warnings });
        }
        let ChangePlan { changes, writes, keep_one_unrevoked, .. } = plan;
        let description = format!("apply a policy folder: {} document(s) change", changes.len());
        let committed = self.commit_retaining_signer(by, keep_one_unrevoked, writes, Some(revision.number), &description).await?;
        Ok(ApplyOutcome { revision: committed.revision, changes, warnings })
    }
}

/// The difference between a folder and the store.
#[derive(Default)]
pub(super) struct ChangePlan {
    /// Removals first, then by kind and id.
    pub(super) changes: Vec<DocumentChange>,
    pub(super) writes: Vec<StoreWrite>,
    /// Documents that were made through the API and stay.
    pub(super) kept: Vec<DocumentRow>,
    /// The previous versions of changed and removed documents.
    pub(super) replaced: Vec<DocumentRow>,
    /// The keys of all administrators after the change, if it changes operators. At least one of these keys must not be revoked.
    pub(super) keep_one_unrevoked: Vec<String>,
    /// Whether some document loses `two_person`.
    pub(super) weakens: bool,
}

/// Plans the writes that make the stored documents equal to the folder's.
pub(super) fn plan_changes(documents: &[Document], left: BTreeMap<DocumentKey, StoredDocument>) -> ChangePlan {
    let rows = documents.iter().filter(|document| !matches!(document.body, DocumentBody::Test(_)));
    plan_row_changes(rows.map(|document| document.to_row(DocumentOrigin::Folder)), left)
}

/// As [`plan_changes`], for rows. All rows count as documents of the folder.
pub(super) fn plan_row_changes(
    rows: impl Iterator<Item = DocumentRow>,
    mut left: BTreeMap<DocumentKey, StoredDocument>,
) -> ChangePlan {
    let mut plan = ChangePlan::default();
    for row in rows {
        let before = left.remove(&row.key);
        let change = match &before {
            None => "added",
            Some(before) if (&before.row.json, &before.row.origin) != (&row.json, &row.origin) => "changed",
            Some(_) => continue,
        };
        plan.replaced.extend(before.map(|before| before.row));
        plan.changes.push(DocumentChange { change, key: row.key.clone() });
        plan.writes.push(StoreWrite::PutDocument(row));
    }
    for (key, stored) in left {
        if stored.row.origin == DocumentOrigin::Api {
            plan.kept.push(stored.row);
            continue;
        }
        plan.replaced.push(stored.row);
        plan.changes.push(DocumentChange { change: "removed", key: key.clone() });
        plan.writes.push(StoreWrite::RemoveDocument(key));
    }
    plan.changes.sort_by(|a, b| (a.change != "removed", &a.key).cmp(&(b.change != "removed", &b.key)));
    plan
}

/// Whether a change of operators or issuers needs the signatures of two operators. It does if at least two operators have the
/// role `administer`.
pub(super) fn needs_two_operators<'a>(stored: impl Iterator<Item = &'a StoredDocument>) -> bool {
    // An operator who may not administer cannot sign as the second one. Counting approvers too would lock everybody out.
    stored.filter_map(|stored| Document::from_row(&stored.row).ok()).filter(is_administrator).count() >= 2
}

impl AdministrationPoint {
    /// Checks that enough operators signed for these changes.
    pub(super) async fn check_two_signed(&self, by: &AuthorizedAct, two_needed: bool, plan: &ChangePlan) -> Result<(), Error> {
        let trust_changes = plan.changes.iter().any(|change| TWO_PERSON_KINDS.contains(&change.key.kind.as_str()));
        if !two_needed || by.operators().len() >= 2 || !(trust_changes || plan.weakens) {
            return Ok(());
        }
        let what =
            if trust_changes { "operators or issuers change" } else { "a document with `two_person` would no longer have it" };
        let hint = self.administrator_shortage_hint().await;
        let message =
            format!("{what} and two or more operators administer: a second one must sign too (`--operator-key` twice){hint}");
        Err(Error::PermissionDenied(message))
    }
}

/// Runs slow work on a blocking thread, outside the runtime of the kill switch.
pub(super) async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Error::Store(crate::store::Error::Unavailable("the policy could not be read: see the log".to_owned())))
}

/// Reads and checks a folder that comes into force beside other documents. Returns the documents with warnings, or all diagnostics
/// if one of them is an error.
pub(super) fn read_and_check(
    files: &[SourceFile],
    existing: &[Document],
) -> Result<(Vec<Document>, Vec<Diagnostic>), Vec<Diagnostic>> {
    let parsed = parse_files(files);
    let mut diagnostics = parsed.diagnostics;
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(validate::check_policy_with_existing(&parsed.documents, existing));
    }
    if diagnostics.iter().any(Diagnostic::is_error) { Err(diagnostics) } else { Ok((parsed.documents, diagnostics)) }
}

/// Completes a plan. The folder and the kept documents together must compile, have an administrator, and pass the folder's tests.
/// Returns the plan and further warnings.
fn complete_plan(mut documents: Vec<Document>, mut plan: ChangePlan) -> Result<(ChangePlan, Vec<Diagnostic>), Error> {
    documents.extend(plan.kept.iter().filter_map(|row| Document::from_row(row).ok()));
    let policy = CompiledPolicy::compile(&documents).map_err(Error::InvalidPolicy)?;
    check_administrator_left(&documents)?;
    let report = test_run::run_tests(&documents, &policy);
    if !report.failures.is_empty() {
        let failures = report.failures.iter().map(ToString::to_string).collect();
        return Err(Error::TestsFailed { failures, passed: report.passed });
    }
    let message = "the folder has no tests: say in `kind: test` documents what must be permitted and what must not";
    let mut warnings = plan.add_consequences(&documents);
    warnings.extend((report.tests == 0).then(|| Diagnostic::for_folder(Severity::Warning, message)));
    Ok((plan, warnings))
}

/// Checks that some administrator remains who can undo the change.
pub(super) fn check_administrator_left(documents: &[Document]) -> Result<(), Error> {
    if documents.iter().any(is_administrator) {
        return Ok(());
    }
    let message = "no operator with the role `administer` would be left: keep one".to_owned();
    Err(Error::InvalidArgument { field: "files", message })
}
