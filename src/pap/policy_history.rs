//! The history of policy, and the rollback to an earlier policy.
//!
//! A rollback is a new revision like any other; it never rewrites the history. Look next at `pap/apply.rs`, whose plan it shares.

use super::apply::{ChangePlan, check_administrator_left, needs_two_operators, plan_row_changes, run_blocking};
use super::{AdministrationPoint, ApplyOutcome, AuthorizedAct, Error, index_by_key};
use crate::model::revision::Revision;
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RowChange};
use crate::policy::document::Document;
use crate::policy::{CompiledPolicy, Diagnostic};

/// The number of listed revisions if the caller names none.
pub const HISTORY_LISTED_DEFAULT: usize = 20;

/// A revision that changed policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRevision {
    /// `HISTORY.NUMBER`.
    pub revision: Revision,
    /// The time of the commit, by the store's clock.
    pub unix_ms: i64,
    /// The operators of the act. Empty if the program itself acted, as for the first operator.
    pub operators: Vec<String>,
    /// Full gRPC method path. Empty if the program itself acted.
    pub method: String,
    /// A description of the act, with the reason that the operators gave.
    pub account: String,
    /// Documents that were added or changed.
    pub put: Vec<DocumentKey>,
    /// Documents that were removed.
    pub removed: Vec<DocumentKey>,
}

impl AdministrationPoint {
    /// The revisions that changed policy, newest first, at most `limit`.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn policy_history(&self, by: &AuthorizedAct, limit: usize) -> Result<Vec<PolicyRevision>, Error> {
        let history = self.store.revision().await?.history;
        let commits = self.store.policy_history(limit).await?;
        self.record_act(by, None, "read")?;
        let revisions = commits.into_iter().map(|commit| {
            let (mut put, mut removed) = (Vec::new(), Vec::new());
            for change in commit.changes {
                match change {
                    RowChange::Document(row) => put.push(row.key),
                    RowChange::DocumentRemoved(key) => removed.push(key),
                    _ => {}
                }
            }
            let (operators, method, account) = commit.act.map(|act| (act.operators, act.method, act.reason)).unwrap_or_default();
            let revision = Revision { history: history.clone(), number: commit.number };
            PolicyRevision { revision, unix_ms: commit.unix_ms, operators, method, account, put, removed }
        });
        Ok(revisions.collect())
    }

    /// Enforces the folder's documents of an earlier revision again, as a new revision.
    ///
    /// Documents made through the API stay as they are now, whatever they were at that revision. No tests run, because tests are
    /// not stored.
    ///
    /// # Errors
    /// - [`Error::InvalidArgument`] for a revision of another history, or one that does not exist or that the log no longer reaches.
    /// - [`Error::InvalidPolicy`] if the earlier policy does not compile with today's API documents, or lists a key that is dead now.
    /// - The other errors of [`AdministrationPoint::apply`].
    pub async fn rollback(&self, by: &AuthorizedAct, revision: &str, dry_run: bool) -> Result<ApplyOutcome, Error> {
        let _one = self.apply_lock.lock().await;
        let stored = self.store.documents(None).await?;
        let now = stored.revision;
        let number = self.or_record_refusal(by, parse_revision_number(revision, &now))?;
        let then = self.store.documents_at(number).await;
        let then = self.or_record_refusal(by, then.map_err(Error::from))?;
        let left = index_by_key(stored.documents);
        let two_needed = needs_two_operators(left.values());
        // A document that the API holds today stays as it is. A document that the API held at that revision comes back only if a
        // folder has taken it over since.
        let comes_back = |row: &DocumentRow| match left.get(&row.key) {
            Some(today) => today.row.origin == DocumentOrigin::Folder,
            None => row.origin == DocumentOrigin::Folder,
        };
        let then: Vec<DocumentRow> = then.documents.into_iter().map(|stored| stored.row).filter(comes_back).collect();
        let plan = plan_row_changes(then.iter().cloned(), left);
        let planned = move || {
            let documents = read_rows(&then)?;
            let listed = plan.newly_listed_keys(&documents);
            Ok::<_, Error>((documents, plan, listed))
        };
        let planned = run_blocking(planned).await?;
        let (documents, plan, listed) = self.or_record_refusal(by, planned)?;
        let alive = self.check_no_dead_keys(&listed).await;
        self.or_record_refusal(by, alive)?;
        let fits = run_blocking(move || complete_rollback(documents, plan)).await?;
        let (plan, warnings) = self.or_record_refusal(by, fits)?;
        let description = format!("roll policy back to revision {number}");
        if dry_run {
            self.record_act(by, None, &format!("{description}: dry run"))?;
            return Ok(ApplyOutcome { revision: now, changes: plan.changes, warnings });
        }
        let signed = self.check_two_signed(by, two_needed, &plan).await;
        self.or_record_refusal(by, signed)?;
        if plan.writes.is_empty() {
            self.record_act(by, None, &format!("{description}: no change"))?;
            return Ok(ApplyOutcome { revision: now, changes: plan.changes, warnings });
        }
        let ChangePlan { changes, writes, keep_one_unrevoked, .. } = plan;
        let description = format!("{description}: {} document(s) change", changes.len());
        let committed = self.commit_retaining_signer(by, keep_one_unrevoked, writes, Some(now.number), &description).await?;
        Ok(ApplyOutcome { revision: committed.revision, changes, warnings })
    }
}

/// Reads `HISTORY.NUMBER` of this history, or the number alone.
fn parse_revision_number(text: &str, now: &Revision) -> Result<u64, Error> {
    let invalid = |message: String| Error::InvalidArgument { field: "revision", message };
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

/// Completes a rollback. The earlier documents and the kept ones together must compile and have an administrator.
fn complete_rollback(mut documents: Vec<Document>, mut plan: ChangePlan) -> Result<(ChangePlan, Vec<Diagnostic>), Error> {
    documents.extend(read_rows(&plan.kept)?);
    CompiledPolicy::compile(&documents).map_err(Error::InvalidPolicy)?;
    check_administrator_left(&documents)?;
    let warnings = plan.add_consequences(&documents);
    Ok((plan, warnings))
}

fn read_rows(rows: &[DocumentRow]) -> Result<Vec<Document>, Error> {
    let unreadable = |error: crate::policy::Error| Error::InvalidArgument { field: "revision", message: error.to_string() };
    rows.iter().map(|row| Document::from_row(row).map_err(unreadable)).collect()
}
