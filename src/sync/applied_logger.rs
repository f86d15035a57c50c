//! Logs each revocation and each change of policy once decisions of this replica use it.
//!
//! A task of its own reads the feed of applied revisions and asks the store for the operators. So applying a commit never waits for a
//! log line. It must not log an operator's free text, because that text may hold anything. Look next at
//! `status/revocation_feed.rs`, its input.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use super::status::revocation_feed::{AppliedRevision, FeedPage};
use super::status::{FollowerHandle, ProgressReceiver};
use crate::model::revision::Revision;
use crate::model::rows::{RevocationRow, RowChange};
use crate::store::{PolicyCommit, Store};

/// Limit of the revisions that one read takes from the feed.
const REVISIONS_TAKEN_MAX: usize = 64;
/// Limit of the entries of one revision that are logged one by one.
const ENTRIES_LOGGED_MAX: usize = 20;
/// Limit of the policy revisions that are logged one by one.
const POLICIES_LOGGED_MAX: usize = 20;

/// Logs until `shutdown` turns true or its sender is dropped.
pub async fn log_applied_changes(status: FollowerHandle, store: Arc<dyn Store>, mut shutdown: watch::Receiver<bool>) {
    let announcing = async {
        let mut changes: ProgressReceiver = status.subscribe();
        let mut announcer = AppliedChangeLogger {
            last_logged_policy: status.policy_number(),
            last_logged_revision: status.revocation_feed().newest(),
            status: status.clone(),
            store,
        };
        loop {
            announcer.log_new_changes().await;
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = shutdown.wait_for(|stop| *stop) => {}
        () = announcing => {}
    }
}

/// The task that logs applied changes.
struct AppliedChangeLogger {
    status: FollowerHandle,
    store: Arc<dyn Store>,
    /// The last revision whose revocations were logged.
    last_logged_revision: Option<Revision>,
    /// The last revision whose policy was logged.
    last_logged_policy: u64,
}

impl AppliedChangeLogger {
    async fn log_new_changes(&mut self) {
        let Some(newest) = self.status.revocation_feed().newest() else { return };
        let Some(read) = self.last_logged_revision.clone().filter(|read| read.history == newest.history) else {
            tracing::info!(revision = %newest, "all revocations and the policy of this revision are in effect");
            (self.last_logged_policy, self.last_logged_revision) = (self.status.policy_number(), Some(newest));
            return;
        };
        match self.status.revocation_feed().read_after(read.number, REVISIONS_TAKEN_MAX) {
            FeedPage::Lagged(newest) => {
                tracing::info!(revision = %newest, "more was revoked than is told one by one: all of it is in effect");
                self.last_logged_revision = Some(newest);
            }
            FeedPage::Revisions(applied) => {
                let by = self.read_operators(&applied).await;
                applied.iter().for_each(|one| Self::log_revocations(one, by.get(&one.revision.number)));
                let last = applied.last().map(|one| one.revision.clone());
                let is_more = applied.len() == REVISIONS_TAKEN_MAX;
                self.last_logged_revision = last.or(Some(read));
                if is_more {
                    return Box::pin(self.log_new_changes()).await;
                }
            }
        }
        let policy = self.status.policy_number();
        if policy > self.last_logged_policy {
            self.log_policy_changes(self.last_logged_policy, policy).await;
            self.last_logged_policy = policy;
        }
    }

    /// The operators of the revisions that revoke something, by number, as far as the store reports them.
    async fn read_operators(&self, applied: &[Arc<AppliedRevision>]) -> BTreeMap<u64, Vec<String>> {
        let entries: usize = applied.iter().map(|one| one.entries.len()).sum();
        if entries == 0 {
            return BTreeMap::new();
        }
        // The store lists the newest changes first, so later changes push few of these out of the list.
        match self.store.revocations(entries.saturating_mul(2)).await {
            Ok(listed) => listed.commits.into_iter().map(|(number, commit)| (number, commit.operators)).collect(),
            Err(_) => BTreeMap::new(),
        }
    }

    /// Logs the entries of a revision. It omits the operators if the store does not report them.
    fn log_revocations(applied: &AppliedRevision, by: Option<&Vec<String>>) {
        let revision = applied.revision.to_string();
        if applied.entries_omitted {
            tracing::info!(revision, "more was revoked than is told one by one: all of it is in effect");
        }
        for row in applied.entries.iter().take(ENTRIES_LOGGED_MAX) {
            // Escaped like a Rust string, because a name may hold anything, even a line break.
            let target = row.target.to_string();
            tracing::info!(
                revision,
                ?target,
                now = revocation_state(row),
                by = by.map(tracing::field::debug),
                "a revocation is in effect"
            );
        }
        let more = applied.entries.len().saturating_sub(ENTRIES_LOGGED_MAX);
        if more > 0 {
            tracing::info!(revision, more, "more of the same revision is in effect");
        }
    }

    async fn log_policy_changes(&self, before: u64, policy: u64) {
        let history = self.last_logged_revision.as_ref().map(|read| read.history.clone());
        let Some(history) = history else { return };
        let mut commits = match self.store.policy_history(POLICIES_LOGGED_MAX).await {
            Ok(commits) => commits,
            Err(error) => {
                tracing::info!(policy, %error, "the policy of this revision is in force; the store cannot say who changed it");
                return;
            }
        };
        commits.retain(|commit| commit.number > before && commit.number <= policy);
        commits.sort_by_key(|commit| commit.number);
        for PolicyCommit { number, act, changes, .. } in commits {
            let (by, method) = act.map(|act| (act.operators, act.method)).unwrap_or_default();
            let removed = changes.iter().filter(|change| matches!(change, RowChange::DocumentRemoved(_))).count();
            let put = changes.iter().filter(|change| matches!(change, RowChange::Document(_))).count();
            let revision = Revision { history: history.clone(), number };
            tracing::info!(%revision, ?by, method, put, removed, "a change of policy is in force");
        }
    }
}

/// Describes the current state of a target in the log.
fn revocation_state(row: &RevocationRow) -> &'static str {
    match (row.dead, row.suspended, row.watermark_unix_s) {
        (true, ..) => "dead",
        (false, true, None) => "suspended",
        (false, true, Some(_)) => "suspended, older roots void",
        (false, false, Some(_)) => "older roots void",
        (false, false, None) => "reinstated",
    }
}
