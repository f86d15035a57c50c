//! Approves or refuses a pending call, as a recorded act of an operator.
//!
//! The store decides whether a call can still be answered, and which layers an answer serves. This file decides whether an
//! operator may give the answer: never the user of the call or an agent of its chain. Look next at `store::approval_rules`.

use std::time::Duration;

use super::{AdministrationPoint, AuthorizedAct, Error};
use crate::model::approval::{ApprovalFilter, ApprovalPage, ApprovalRow};
use crate::model::ids::{Thumbprint, UserId};
use crate::model::limits::{ACT_REASON_BYTES_MAX, APPROVALS_LISTED_MAX};
use crate::model::rows::StoreWrite;
use crate::policy::diagnostic::nearest_name;
use crate::policy::document::{Document, DocumentBody, OperatorSpec};
use crate::store::{self, CommitOutcome};

/// The time limit of the search for a similar digest.
const HINT_TIMEOUT: Duration = Duration::from_millis(500);

/// An operator's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApprovalAnswer {
    /// The call may be made once.
    Approve,
    /// The call may not be made.
    Refuse,
}

impl ApprovalAnswer {
    fn as_str(self) -> &'static str {
        match self {
            ApprovalAnswer::Approve => "approve",
            ApprovalAnswer::Refuse => "refuse",
        }
    }
}

/// The result of an answer.
#[derive(Clone, Debug)]
pub struct AnswerOutcome {
    /// The revision of the act, durable.
    pub committed: CommitOutcome,
    /// The approval after the answer.
    pub row: ApprovalRow,
    /// The time of the store's clock.
    pub unix_ms: i64,
}

impl AdministrationPoint {
    /// The pending approvals, or with `all` every approval that is still stored, the oldest first.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn list_approvals(&self, by: &AuthorizedAct, all: bool, limit: usize) -> Result<ApprovalPage, Error> {
        let filter = if all { ApprovalFilter::All } else { ApprovalFilter::Waiting };
        let listed = self.store.approvals(filter, limit.min(APPROVALS_LISTED_MAX)).await?;
        self.record_act(by, None, "read")?;
        Ok(listed)
    }

    /// Approves a call or refuses it. An approval counts for every layer that names a group of the operator. The act is durable
    /// when this returns.
    ///
    /// # Errors
    /// - [`Error::InvalidArgument`] for a malformed digest or reason.
    /// - [`Error::PermissionDenied`] if this operator may not answer this call.
    /// - [`store::Error::Rejected`] if the call can no longer be answered.
    /// - Any other error of the store.
    pub async fn answer_approval(
        &self,
        by: &AuthorizedAct,
        answer: ApprovalAnswer,
        digest: &str,
        reason: &str,
    ) -> Result<AnswerOutcome, Error> {
        let allowed = self.check_may_answer(by, digest, reason).await;
        let (operator, key, row, documents_number) = self.or_record_refusal(by, allowed)?;
        let (id, groups) = (operator.id.to_string(), operator.groups.iter().map(ToString::to_string).collect());
        let digest = digest.to_owned();
        let description = format!("{} {digest} {}: {reason}", answer.as_str(), row.call.tool);
        let write = match answer {
            ApprovalAnswer::Approve => StoreWrite::Approve { digest: digest.clone(), operator: id, key, groups },
            ApprovalAnswer::Refuse => StoreWrite::Refuse { digest: digest.clone(), operator: id, groups },
        };
        // The operator's document was read a moment ago. The commit fails if documents have changed since.
        let committed = self.commit(by, vec![write], Some(documents_number), &description).await?;
        // The approval may have been used meanwhile, but its row still exists because the act wrote it. The answer is committed,
        // so a failing read must not turn it into an error.
        let (row, unix_ms) = match self.store.approvals(ApprovalFilter::Digest(digest), 1).await {
            Ok(mut now) => (now.rows.pop().unwrap_or(row), now.read_at_unix_ms),
            Err(_) => (row, committed.unix_ms),
        };
        Ok(AnswerOutcome { committed, row, unix_ms })
    }

    /// Returns the operator, the signing key, the pending call, and the revision of the documents that were read.
    async fn check_may_answer(
        &self,
        by: &AuthorizedAct,
        digest: &str,
        reason: &str,
    ) -> Result<(OperatorSpec, String, ApprovalRow, u64), Error> {
        let invalid = |field, message: String| Err(Error::InvalidArgument { field, message });
        if reason.len() > ACT_REASON_BYTES_MAX {
            return invalid("reason", format!("{} bytes: at most {ACT_REASON_BYTES_MAX}", reason.len()));
        }
        if digest.len() != 64 || !digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return invalid("digest", "64 characters of lowercase hex are expected, as the answer gave them".to_owned());
        }
        let ([id], [key]) = (by.operators(), by.keys()) else {
            return invalid("authorization", "an answer is one operator's: sign with one key".to_owned());
        };
        let listed = self.store.documents(Some("operator")).await?;
        let documents_number = listed.revision.number;
        let operators = listed.documents.iter().filter_map(|stored| Document::from_row(&stored.row).ok());
        let operator = operators.into_iter().find_map(|document| match document.body {
            DocumentBody::Operator(operator) if operator.id.as_str() == id => Some(operator),
            _ => None,
        });
        let denied = |message: String| Err(Error::PermissionDenied(message));
        let Some(operator) = operator else {
            return denied(format!("operator `{id}` is not one any more"));
        };
        if operator.users.is_empty() {
            return denied(format!(
                "operator `{id}` has no `users`, so their own calls cannot be told from others': list them in the operator's document"
            ));
        }
        if let Some(agent) = self.agent_with_key(key).await? {
            return denied(format!("the key that signed is also one of agent `{agent}`: an operator needs a key of its own"));
        }
        let Some(row) = self.store.approvals(ApprovalFilter::Digest(digest.to_owned()), 1).await?.rows.pop() else {
            let short_digest = digest.get(..12).unwrap_or(digest);
            let hint = self.digest_hint(digest).await;
            let message = format!(
                "call `{short_digest}` is not one that waits: it was never asked, or it was forgotten after its time{hint}"
            );
            return Err(Error::Store(store::Error::Rejected(message)));
        };
        let user = UserId::new(row.call.issuer.as_str(), row.call.subject.as_str());
        if operator.users.contains(&user) {
            return denied(format!("operator `{id}` is the user whom the call is made for: somebody else must answer"));
        }
        let asked = |group: &String| operator.groups.iter().any(|own| own.as_str() == group);
        if !row.layers.iter().any(|layer| layer.by.iter().any(asked)) {
            let mut groups: Vec<&str> = row.layers.iter().flat_map(|layer| layer.by.iter().map(String::as_str)).collect();
            groups.sort_unstable();
            groups.dedup();
            return denied(format!("operator `{id}` is in none of the groups that may answer this call: {}", groups.join(", ")));
        }
        Ok((operator, key.to_string(), row, documents_number))
    }

    /// A hint with the most similar pending digest.
    async fn digest_hint(&self, digest: &str) -> String {
        let listed = self.store.approvals(ApprovalFilter::Waiting, APPROVALS_LISTED_MAX);
        let Ok(Ok(listed)) = tokio::time::timeout(HINT_TIMEOUT, listed).await else { return String::new() };
        let near = nearest_name(digest, listed.rows.iter().map(|row| row.call.digest.as_str()));
        near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default()
    }

    /// The registered agent that holds a key; `None` if no agent does.
    async fn agent_with_key(&self, key: &Thumbprint) -> Result<Option<String>, Error> {
        let agents = self.store.documents(Some("agent")).await?.documents;
        // There may be many agents. Only documents that contain the key are parsed.
        let named = agents.iter().filter(|stored| stored.row.json.contains(key.as_str()));
        let holds = |stored: &&store::StoredDocument| match Document::from_row(&stored.row).map(|document| document.body) {
            Ok(DocumentBody::Agent(agent)) => agent.keys.contains(key),
            _ => true,
        };
        Ok(named.into_iter().find(holds).map(|stored| stored.row.key.id.clone()))
    }
}
