//! The history of policy, and the way back: an earlier policy put in force again is a new revision like any other.

use super::apply::{Plan, aside, needs_two, plan_rows, still_administered, two_signed};
use super::{Admin, ApplyOutcome, Authorized, Error, keyed};
use crate::model::records::{Change, DocumentKey, DocumentRow, Origin};
use crate::model::revision::Revision;
use crate::policy::document::Document;
use crate::policy::{Compiled, Diagnostic};

/// Revisions listed where the caller names no number.
pub const HISTORY_LISTED_DEFAULT: usize = 20;

/// A revision that changed policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRevision {
    /// `HISTORY.NUMBER`.
    pub revision: Revision,
    /// By the store's clock.
    pub unix_ms: i64,
    /// Who did it; empty where the program did (the first operator).
    pub operators: Vec<String>,
    /// Full gRPC method path; empty where the program did.
    pub method: String,
    /// What was done, and the operators' words.
    pub account: String,
    /// Documents that were added or changed.
    pub put: Vec<DocumentKey>,
    /// Documents that were removed.
    pub removed: Vec<DocumentKey>,
}

impl Admin {
    /// The revisions that changed policy, newest first, at most `limit`.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn policy_history(&self, by: &Authorized, limit: usize) -> Result<Vec<PolicyRevision>, Error> {
        let history = self.store.revision().await?.history;
        let commits = self.store.history(limit).await?;
        self.record(by, None, "read")?;
        let revisions = commits.into_iter().map(|commit| {
            let (mut put, mut removed) = (Vec::new(), Vec::new());
            for change in commit.changes {
                match change {
                    Change::Document(row) => put.push(row.key),
                    Change::DocumentRemoved(key) => removed.push(key),
                    _ => {}
                }
            }
            let (operators, method, account) = commit.act.map(|act| (act.operators, act.method, act.reason)).unwrap_or_default();
            let revision = Revision { history: history.clone(), number: commit.number };
            PolicyRevision { revision, unix_ms: commit.unix_ms, operators, method, account, put, removed }
        });
        Ok(revisions.collect())
    }

    /// Puts the folder's documents of an earlier revision in force again, as a new revision.
    ///
    /// Documents that were made through the API are left as they are now, those of then and those of today. Tests are not
    /// stored, so none run.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a revision of another history, one that is not there or reached by the log no more;
    /// [`Error::Policy`] if the policy of then and what the API made since do not fit together, or if it lists a key that is dead by
    /// now; otherwise as [`Admin::apply`].
    pub async fn rollback(&self, by: &Authorized, revision: &str, dry_run: bool) -> Result<ApplyOutcome, Error> {
        let _one = self.applying.lock().await;
        let stored = self.store.documents(None).await?;
        let now = stored.revision;
        let number = self.or_record_refused(by, number_of(revision, &now))?;
        let then = self.store.documents_at(number).await;
        let then = self.or_record_refused(by, then.map_err(Error::from))?;
        let left = keyed(stored.documents);
        let two_needed = needs_two(left.values());
        // What is the API's today stays as it is; what was the API's then comes back only where a folder took it over since.
        let comes_back = |row: &DocumentRow| match left.get(&row.key) {
            Some(today) => today.row.origin == Origin::Folder,
            None => row.origin == Origin::Folder,
        };
        let then: Vec<DocumentRow> = then.documents.into_iter().map(|stored| stored.row).filter(comes_back).collect();
        let plan = plan_rows(then.iter().cloned(), left);
        let planned = move || {
            let documents = read_rows(&then)?;
            let listed = plan.newly_listed(&documents);
            Ok::<_, Error>((documents, plan, listed))
        };
        let planned = aside(planned).await?;
        let (documents, plan, listed) = self.or_record_refused(by, planned)?;
        let alive = self.no_dead_keys(&listed).await;
        self.or_record_refused(by, alive)?;
        let fits = aside(move || whole(documents, plan)).await?;
        let (plan, warnings) = self.or_record_refused(by, fits)?;
        let account = format!("roll policy back to revision {number}");
        if dry_run {
            self.record(by, None, &format!("{account}: dry run"))?;
            return Ok(ApplyOutcome { revision: now, changes: plan.changes, warnings });
        }
        self.or_record_refused(by, two_signed(by, two_needed, &plan))?;
        if plan.writes.is_empty() {
            self.record(by, None, &format!("{account}: no change"))?;
            return Ok(ApplyOutcome { revision: now, changes: plan.changes, warnings });
        }
        let Plan { changes, writes, one_must_sign, .. } = plan;
        let account = format!("{account}: {} document(s) change", changes.len());
        let committed = self.commit_leaving(by, one_must_sign, writes, Some(now.number), &account).await?;
        Ok(ApplyOutcome { revision: committed.revision, changes, warnings })
    }
}

/// `HISTORY.NUMBER` of this history, or the number alone.
fn number_of(text: &str, now: &Revision) -> Result<u64, Error> {
    let invalid = |message: String| Error::Invalid { field: "revision", message };
    if let Ok(number) = text.parse::<u64>() {
        return Ok(number);
    }
    let revision: Revision =
        text.parse().map_err(|error| invalid(format!("{error}; `portcullis policy history` lists the revisions")))?;
    if revision.history != now.history {
        return Err(invalid(format!("it is of another store; this one's history is `{}`", now.history)));
    }
    Ok(revision.number)
}

/// The documents of then together with what stays: they must still be a policy that somebody administers.
fn whole(mut documents: Vec<Document>, mut plan: Plan) -> Result<(Plan, Vec<Diagnostic>), Error> {
    documents.extend(read_rows(&plan.kept)?);
    Compiled::compile(&documents).map_err(Error::Policy)?;
    still_administered(&documents)?;
    let said = plan.complete(&documents);
    Ok((plan, said))
}

fn read_rows(rows: &[DocumentRow]) -> Result<Vec<Document>, Error> {
    let unreadable = |error: crate::policy::Error| Error::Invalid { field: "revision", message: error.to_string() };
    rows.iter().map(|row| Document::from_row(row).map_err(unreadable)).collect()
}
