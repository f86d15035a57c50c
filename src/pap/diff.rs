//! What a policy folder would change, said and not done.

use super::apply::{aside, plan, read};
use super::{Admin, Authorized, Error, keyed};
use crate::model::records::DocumentRow;
use crate::model::revision::Revision;
use crate::policy::diff::{self, DocumentChange, Pairs};
use crate::policy::document::Document;
use crate::policy::source::SourceFile;
use crate::policy::{Compiled, Diagnostic};

/// Pairs of agent and tool that are listed.
pub const PAIRS_LISTED_MAX: usize = 10_000;

/// What would change.
#[derive(Clone, Debug)]
pub struct DiffOutcome {
    /// The revision that was compared with.
    pub revision: Revision,
    /// By kind and id, removals first.
    pub documents: Vec<DocumentChange>,
    /// Pairs of agent and tool, widening ones first, at most [`PAIRS_LISTED_MAX`].
    pub pairs: Pairs,
    /// What `check` warns of, and what no pair shows.
    pub warnings: Vec<Diagnostic>,
}

impl Admin {
    /// What [`Admin::apply`] would change: documents, and for each agent and tool what can be reached.
    ///
    /// # Errors
    /// [`Error::Policy`] with every diagnostic if the folder has an error; as the store fails.
    pub async fn diff(&self, by: &Authorized, files: Vec<SourceFile>) -> Result<DiffOutcome, Error> {
        // One at a time and off this runtime, as checking is.
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
