//! Compares a policy folder with the stored policy, without writing anything.
//!
//! The call is recorded as a read. Look next at `policy/diff.rs`, which compares the policies.

use super::apply::{plan_changes, read_and_check, run_blocking};
use super::{AdministrationPoint, AuthorizedAct, Error, index_by_key};
use crate::model::revision::Revision;
use crate::model::rows::DocumentRow;
use crate::policy::diff::{self, AgentToolChanges, DocumentChange};
use crate::policy::document::Document;
use crate::policy::source::SourceFile;
use crate::policy::{CompiledPolicy, Diagnostic};

/// The maximum number of listed pairs of agent and tool.
pub const PAIRS_LISTED_MAX: usize = 10_000;

/// The difference between a folder and the stored policy.
#[derive(Clone, Debug)]
pub struct DiffOutcome {
    /// The revision that the folder was compared with.
    pub revision: Revision,
    /// The changed documents: removals first, then by kind and id.
    pub documents: Vec<DocumentChange>,
    /// The changed pairs of agent and tool, widening ones first, at most [`PAIRS_LISTED_MAX`].
    pub pairs: AgentToolChanges,
    /// The warnings of `check`, and warnings about changes that no pair shows.
    pub warnings: Vec<Diagnostic>,
}

impl AdministrationPoint {
    /// Returns the changes that [`AdministrationPoint::apply`] would make: documents, and the access of each agent to each tool.
    ///
    /// # Errors
    /// [`Error::InvalidPolicy`] with all diagnostics if the folder has an error, or if the store fails.
    pub async fn diff(&self, by: &AuthorizedAct, files: Vec<SourceFile>) -> Result<DiffOutcome, Error> {
        // One call at a time and outside this runtime, as for a check.
        let _one = self.apply_lock.lock().await;
        let existing = self.operators_by_command().await?;
        let read = run_blocking(move || read_and_check(&files, &existing)).await?.map_err(Error::InvalidPolicy);
        let (documents, warnings) = self.or_record_refusal(by, read)?;
        let stored = self.store.documents(None).await?;
        let (revision, before) = (stored.revision, stored.documents);
        let planned = move || {
            let old: Vec<Document> = before.iter().filter_map(|stored| Document::from_row(&stored.row).ok()).collect();
            let plan = plan_changes(&documents, index_by_key(before));
            let listed = plan.newly_listed_keys(&documents);
            (old, documents, plan, listed)
        };
        let (old, documents, mut plan, listed) = run_blocking(planned).await?;
        let alive = self.check_no_dead_keys(&listed).await;
        self.or_record_refusal(by, alive)?;
        let compared = run_blocking(move || {
            let new = with_kept_documents(documents, &plan.kept);
            let rotated = plan.add_consequences(&new);
            let (pairs, other_warnings) = compare_policies(&old, new)?;
            Ok::<_, Error>((plan.changes, pairs, other_warnings.into_iter().chain(rotated).collect::<Vec<_>>()))
        });
        let (documents, pairs, other_warnings) = self.or_record_refusal(by, compared.await?)?;
        self.record_act(by, None, "compare a policy folder")?;
        Ok(DiffOutcome { revision, documents, pairs, warnings: warnings.into_iter().chain(other_warnings).collect() })
    }
}

fn with_kept_documents(mut documents: Vec<Document>, kept: &[DocumentRow]) -> Vec<Document> {
    documents.extend(kept.iter().filter_map(|row| Document::from_row(row).ok()));
    documents
}

fn compare_policies(old: &[Document], new: Vec<Document>) -> Result<(AgentToolChanges, Vec<Diagnostic>), Error> {
    let stored = |_| Error::Store(crate::store::Error::Corrupt("the stored policy does not compile: apply one".to_owned()));
    let before = CompiledPolicy::compile(old).map_err(stored)?;
    let after = CompiledPolicy::compile(&new).map_err(Error::InvalidPolicy)?;
    Ok((diff::compare_access(&before, &after, PAIRS_LISTED_MAX), diff::other_change_warnings(old, &new)))
}
