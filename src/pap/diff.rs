//! Compares a policy folder with the stored policy, without writing anything.
//!
//! The call is recorded as a read. Look next at `policy/diff.rs`, which compares the policies.

use super::apply::{aside, plan, read};
use super::{Admin, Authorized, Error, keyed};
use crate::model::records::DocumentRow;
use crate::model::revision::Revision;
use crate::policy::diff::{self, DocumentChange, Pairs};
use crate::policy::document::Document;
use crate::policy::source::SourceFile;
use crate::policy::{Compiled, Diagnostic};

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
    pub pairs: Pairs,
    /// The warnings of `check`, and warnings about changes that no pair shows.
    pub warnings: Vec<Diagnostic>,
}

impl Admin {
    /// Returns the changes that [`Admin::apply`] would make: documents, and the access of each agent to each tool.
    ///
    /// # Errors
    /// [`Error::Policy`] with all diagnostics if the folder has an error, or if the store fails.
    pub async fn diff(&self, by: &Authorized, files: Vec<SourceFile>) -> Result<DiffOutcome, Error> {
        // One call at a time and outside this runtime, as for a check.
        let _one = self.applying.lock().await;
        let read = aside(move || read(&files)).await?.map_err(Error::Policy);
        let (documents, warnings) = self.or_record_refused(by, read)?;
        let stored = self.store.documents(None).await?;
        let (revision, before) = (stored.revision, stored.documents);
        let planned = move || {
            let old: Vec<Document> = before.iter().filter_map(|stored| Document::from_row(&stored.row).ok()).collect();
            let plan = plan(&documents, keyed(before));
            let listed = plan.newly_listed(&documents);
            (old, documents, plan, listed)
        };
        let (old, documents, mut plan, listed) = aside(planned).await?;
        let alive = self.no_dead_keys(&listed).await;
        self.or_record_refused(by, alive)?;
        let compared = aside(move || {
            let new = with_kept(documents, &plan.kept);
            let rotated = plan.complete(&new);
            let (pairs, beside) = compare(&old, new)?;
            Ok::<_, Error>((plan.changes, pairs, beside.into_iter().chain(rotated).collect::<Vec<_>>()))
        });
        let (documents, pairs, beside) = self.or_record_refused(by, compared.await?)?;
        self.record(by, None, "compare a policy folder")?;
        Ok(DiffOutcome { revision, documents, pairs, warnings: warnings.into_iter().chain(beside).collect() })
    }
}

fn with_kept(mut documents: Vec<Document>, kept: &[DocumentRow]) -> Vec<Document> {
    documents.extend(kept.iter().filter_map(|row| Document::from_row(row).ok()));
    documents
}

fn compare(old: &[Document], new: Vec<Document>) -> Result<(Pairs, Vec<Diagnostic>), Error> {
    let stored = |_| Error::Store(crate::store::Error::Corrupt("the stored policy does not compile: apply one".to_owned()));
    let before = Compiled::compile(old).map_err(stored)?;
    let after = Compiled::compile(&new).map_err(Error::Policy)?;
    Ok((diff::pairs(&before, &after, PAIRS_LISTED_MAX), diff::beside_pairs(old, &new)))
}
