//! Applying a policy folder: the folder is the whole policy, in one commit, or nothing changes.

use super::{Admin, Authorized, Error, keyed};
use crate::model::records::{DocumentKey, DocumentRow, Origin, Write};
use crate::model::revision::Revision;
use crate::policy::Compiled;
use crate::policy::Diagnostic;
use crate::policy::document::{Body, Document, Role};
use crate::policy::source::{SourceFile, parse};
use crate::policy::validate;

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

/// How one document changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentChange {
    /// `added`, `changed` or `removed`.
    pub change: &'static str,
    /// Its name.
    pub key: DocumentKey,
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
    /// [`Error::Policy`] with every diagnostic if there is one error; [`Error::PermissionDenied`] where a second operator is
    /// needed; as the store fails, or if somebody changed the policy meanwhile.
    pub async fn apply(&self, by: &Authorized, files: Vec<SourceFile>, dry_run: bool) -> Result<ApplyOutcome, Error> {
        // One at a time, off the runtime that serves the kill switch; what another server applies meanwhile is a conflict.
        let _one = self.applying.lock().await;
        let read = aside(move || read(&files)).await?.map_err(Error::Policy);
        let (documents, warnings) = self.or_record_refused(by, read)?;
        let stored = self.store.documents(None).await?;
        let revision = stored.revision;
        let mut left = keyed(stored.documents);
        // Who may not administer cannot be the second one either: counting approvers would lock everybody out.
        let administrators = left.values().filter_map(|stored| Document::from_row(&stored.row).ok()).filter(administers).count();

        let (mut changes, mut writes) = (Vec::new(), Vec::new());
        for document in documents.iter().filter(|document| !matches!(document.body, Body::Test(_))) {
            let row = document.to_row(Origin::Folder);
            let before = left.remove(&row.key);
            let change = match &before {
                None => "added",
                Some(before) if (&before.row.json, &before.row.origin) != (&row.json, &row.origin) => "changed",
                Some(_) => continue,
            };
            changes.push(DocumentChange { change, key: row.key.clone() });
            writes.push(Write::PutDocument(row));
        }
        let mut kept = Vec::new();
        for (key, stored) in left {
            if stored.row.origin == Origin::Api {
                kept.push(stored.row);
                continue;
            }
            changes.push(DocumentChange { change: "removed", key: key.clone() });
            writes.push(Write::RemoveDocument(key));
        }
        let fits = aside(move || whole(documents, &kept)).await?;
        let fits = fits.map_err(Error::Policy).and_then(|all| still_administered(&all));
        self.or_record_refused(by, fits)?;
        changes.sort_by(|a, b| (a.change != "removed", &a.key).cmp(&(b.change != "removed", &b.key)));

        if dry_run {
            self.record(by, None, "apply a policy folder: dry run")?;
            return Ok(ApplyOutcome { revision, changes, warnings });
        }
        let trust_changes = changes.iter().any(|change| TWO_PERSON_KINDS.contains(&change.key.kind.as_str()));
        if trust_changes && administrators >= 2 && by.operators().len() < 2 {
            let message = "operators or issuers change and two or more operators administer: a second one must sign too \
                           (`--operator-key` twice)";
            return self.or_record_refused(by, Err(Error::PermissionDenied(message.to_owned())));
        }
        if writes.is_empty() {
            self.record(by, None, "apply a policy folder: no change")?;
            return Ok(ApplyOutcome { revision, changes, warnings });
        }
        let account = format!("apply a policy folder: {} document(s) change", changes.len());
        let committed = self.commit(by, writes, Some(revision.number), &account).await?;
        Ok(ApplyOutcome { revision: committed.revision, changes, warnings })
    }
}

/// Runs what takes long on another thread than the one that serves the kill switch.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Error::Store(crate::store::Error::Unavailable("the policy could not be read: see the log".to_owned())))
}

/// Reads and checks a folder: documents and warnings, or every diagnostic if there is one error.
fn read(files: &[SourceFile]) -> Result<(Vec<Document>, Vec<Diagnostic>), Vec<Diagnostic>> {
    let parsed = parse(files);
    let mut diagnostics = parsed.diagnostics;
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(validate::check(&parsed.documents));
    }
    if diagnostics.iter().any(Diagnostic::is_error) { Err(diagnostics) } else { Ok((parsed.documents, diagnostics)) }
}

/// The folder together with what stays of the store; it must still be a policy.
fn whole(mut documents: Vec<Document>, kept: &[DocumentRow]) -> Result<Vec<Document>, Vec<Diagnostic>> {
    documents.extend(kept.iter().filter_map(|row| Document::from_row(row).ok()));
    Compiled::compile(&documents)?;
    Ok(documents)
}

pub(super) fn administers(document: &Document) -> bool {
    matches!(&document.body, Body::Operator(operator) if operator.roles.contains(&Role::Administer))
}

/// Somebody must be left who can undo the change.
fn still_administered(documents: &[Document]) -> Result<(), Error> {
    if documents.iter().any(administers) {
        return Ok(());
    }
    let message = "no operator with the role `administer` would be left: keep one in the folder".to_owned();
    Err(Error::Invalid { field: "files", message })
}
