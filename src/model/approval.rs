//! Approvals as a store keeps them: the call, the layers that require an approval, the operators who approved, and the two uses.
//!
//! An approval belongs to exactly one call and is named by the digest of that call. Rows hold plain text and numbers.
//! `store::approval_rules` defines for every store how each step changes a row; `pap` decides which operator may take the step.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::decision::ApprovalNeed;
use super::limits::{
    APPROVALS_WAITING_MAX, APPROVALS_WAITING_OF_AGENT_MAX, APPROVALS_WAITING_OF_USER_MAX, APPROVALS_WAITING_TOTAL_MAX,
};
use super::reason::DecisionLayer;
use super::revision::Revision;

/// The call that needs approval, as it is shown to the approver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalCall {
    /// Hex SHA-256 of all other members. It names the approval.
    pub digest: String,
    /// The user's issuer.
    pub issuer: String,
    /// The user's subject.
    pub subject: String,
    /// The client id.
    pub application: String,
    /// SPIFFE IDs from root to leaf; never empty.
    pub agents: Vec<String>,
    /// `sid`
    pub session: String,
    /// `txn`
    pub task: String,
    /// `server/tool`
    pub tool: String,
    /// The arguments as canonical JSON (RFC 8785), at most
    /// [`APPROVAL_ARGUMENTS_BYTES_MAX`](super::limits::APPROVAL_ARGUMENTS_BYTES_MAX).
    pub arguments_json: String,
}

/// The approval that one layer requires, and the operator who gave it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalLayer {
    /// The layer that requires the approval.
    pub layer: DecisionLayer,
    /// Index of the agent in the chain, root 0; `None` for a layer that exists only once.
    pub hop: Option<usize>,
    /// Groups whose operators may approve.
    pub by: Vec<String>,
    /// Time from the request for approval to its use.
    pub expires_in_ms: u64,
    /// Time of the request, by the store's clock.
    pub asked_at_unix_ms: i64,
    /// Time at which the layer's approval expires.
    pub expires_at_unix_ms: i64,
    /// The operator who approved; `None` while the layer waits.
    pub approved_by: Option<String>,
    /// Thumbprint of the key that signed the approval. If that key is revoked, the layer waits again. Rows of older versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_key: Option<String>,
}

impl ApprovalLayer {
    /// Whether the layer still requires the same approval: the same layer, approvers and expiry. If policy has changed the requirement, the
    /// old approval does not count.
    pub fn matches_need(&self, need: &ApprovalNeed) -> bool {
        let same_by = self.by.iter().map(String::as_str).eq(need.approver_groups.iter().map(super::ids::GroupId::as_str));
        (self.layer, self.hop, self.expires_in_ms) == (need.layer, need.hop, need.expires_in_ms) && same_by
    }
}

/// One of the two uses of an approval.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalUse {
    /// The decision that used the approval.
    pub decision_id: String,
    /// Time of the use, by the store's clock.
    pub unix_ms: i64,
    /// Identifies one request of one gateway, so that a gateway that lost the answer can repeat the request. `None` if the request had no
    /// id.
    pub fingerprint: Option<String>,
    /// Whether a repeated request has received this decision again. After that, the use can no longer be undone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given_again: bool,
}

/// An approval, from the first request until it is deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalRow {
    /// The call that needs approval.
    pub call: ApprovalCall,
    /// One entry for each layer that requires an approval; never empty.
    pub layers: Vec<ApprovalLayer>,
    /// Time of the first request, by the store's clock.
    pub asked_at_unix_ms: i64,
    /// The operator who refused.
    pub refused_by: Option<String>,
    /// The use for the approved call itself.
    pub used: Option<ApprovalUse>,
    /// The use by a call that names this one under `prepared`.
    pub used_prepared: Option<ApprovalUse>,
}

impl ApprovalRow {
    /// Time at which the approval expires: the earliest expiry of its layers.
    pub fn expires_at_unix_ms(&self) -> i64 {
        self.layers.iter().map(|layer| layer.expires_at_unix_ms).min().unwrap_or(i64::MIN)
    }

    /// Whether every layer has its approval.
    pub fn is_approved(&self) -> bool {
        !self.layers.is_empty() && self.layers.iter().all(|layer| layer.approved_by.is_some())
    }

    /// The state at a time.
    pub fn state(&self, unix_ms: i64) -> ApprovalState {
        if self.refused_by.is_some() {
            ApprovalState::Refused
        } else if self.used.is_some() {
            ApprovalState::Used
        } else if unix_ms >= self.expires_at_unix_ms() {
            ApprovalState::Expired
        } else if self.is_approved() {
            ApprovalState::Approved
        } else {
            ApprovalState::Waiting
        }
    }
}

/// The state of an approval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApprovalState {
    /// At least one layer has no approval yet.
    Waiting,
    /// Every layer has an approval; the call may be made once.
    Approved,
    /// An operator refused the call.
    Refused,
    /// The approved call was made.
    Used,
    /// The approval expired before it was refused or used.
    Expired,
}

impl ApprovalState {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ApprovalState::Waiting => "waiting",
            ApprovalState::Approved => "approved",
            ApprovalState::Refused => "refused",
            ApprovalState::Used => "used",
            ApprovalState::Expired => "expired",
        }
    }
}

/// A proof of possession that may be used only once across the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProofUse {
    /// The key that identifies the proof.
    pub key: [u8; 32],
    /// Time until which the proof must be remembered.
    pub expires_at_unix_s: i64,
}

/// A check that the operator of an approval may still approve. A store does not interpret documents, so its caller supplies this check.
#[derive(Clone)]
pub struct ApproverCheck(Arc<ApproverPredicate>);

/// Whether the approval of a layer counts.
type ApproverPredicate = dyn Fn(&ApprovalCall, &ApprovalLayer) -> bool + Send + Sync;

impl ApproverCheck {
    /// Counts the approvals for which the function returns true.
    pub fn new(may_approve: impl Fn(&ApprovalCall, &ApprovalLayer) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(may_approve))
    }

    /// Whether the layer has an approval and that approval counts.
    pub fn counts_as_approved(&self, call: &ApprovalCall, layer: &ApprovalLayer) -> bool {
        layer.approved_by.is_some() && (self.0)(call, layer)
    }
}

impl Default for ApproverCheck {
    /// Counts every approval.
    fn default() -> Self {
        Self::new(|_, _| true)
    }
}

impl fmt::Debug for ApproverCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Approvers")
    }
}

impl PartialEq for ApproverCheck {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A request for the approval of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct ApprovalSubmission {
    /// The call.
    pub call: ApprovalCall,
    /// One entry for each layer that requires an approval; not empty.
    pub needs: Vec<ApprovalNeed>,
    /// The proof of the call, if the store must record its use.
    pub proof: Option<ProofUse>,
    /// The check whether an approval still counts.
    pub approvers: ApproverCheck,
}

/// The result of a request for approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApprovalSubmissionOutcome {
    /// The store has this row: created now or earlier.
    Stored(Box<ApprovalRow>),
    /// A quota of waiting calls is used up. Nothing was stored, and the proof was not used.
    OverQuota(ApprovalQuota),
    /// The proof was used before. Nothing was stored.
    Replayed,
}

/// The quota of waiting calls that is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApprovalQuota {
    /// The calls of the user by the leaf agent.
    UserAndAgent,
    /// The calls of the leaf agent.
    Agent,
    /// The calls of the user.
    User,
    /// All calls in the store.
    Store,
}

/// Numbers of calls that already wait for an approval, counted for a new call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitingApprovalCounts {
    /// Calls of the same user and leaf agent.
    pub of_user_and_agent: u64,
    /// Calls of the same leaf agent.
    pub of_agent: u64,
    /// Calls of the same user.
    pub of_user: u64,
    /// All calls.
    pub total: u64,
}

impl WaitingApprovalCounts {
    /// Returns the narrowest quota that is used up; `None` if one more call may wait.
    pub fn exceeded_quota(&self) -> Option<ApprovalQuota> {
        let shares = [
            (self.of_user_and_agent, APPROVALS_WAITING_MAX, ApprovalQuota::UserAndAgent),
            (self.of_agent, APPROVALS_WAITING_OF_AGENT_MAX, ApprovalQuota::Agent),
            (self.of_user, APPROVALS_WAITING_OF_USER_MAX, ApprovalQuota::User),
            (self.total, APPROVALS_WAITING_TOTAL_MAX, ApprovalQuota::Store),
        ];
        shares.into_iter().find_map(|(count, max, share)| (count >= max).then_some(share))
    }
}

/// A request to use approvals. The store uses all of them once, or none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ApprovalUseRequest {
    /// The approval of the call itself, if a layer requires one.
    pub own: Option<OwnApprovalUse>,
    /// The calls that must have been approved earlier (`prepared:`).
    pub prepared: Vec<PreparationApprovalUse>,
    /// The decision that uses them.
    pub decision_id: String,
    /// See [`ApprovalUse::fingerprint`].
    pub fingerprint: Option<String>,
    /// The proof of the call, if the store must record its use. The store does so in the same transaction, and only if all approvals are
    /// used.
    pub proof: Option<ProofUse>,
    /// The revision that the caller decided by. If the store is at another revision, nothing is used. `None` accepts any revision.
    pub expected_revision: Option<Revision>,
    /// Uses nothing, and only looks for the decision of an earlier identical request.
    pub lookup_only: bool,
    /// The check whether an approval still counts.
    pub approvers: ApproverCheck,
}

/// The use of another call's approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparationApprovalUse {
    /// The digest of the prepared call.
    pub digest: String,
    /// The approvals that its layers require now. Each must have been given in this form.
    pub needs: Vec<ApprovalNeed>,
}

impl ApprovalUseRequest {
    /// The digests of all approvals in the request, without duplicates.
    pub fn digests(&self) -> std::collections::BTreeSet<&str> {
        self.own.iter().map(|own| own.digest.as_str()).chain(self.prepared.iter().map(|one| one.digest.as_str())).collect()
    }
}

/// The use of the call's own approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnApprovalUse {
    /// The call's digest.
    pub digest: String,
    /// The approvals that the layers require now. Each must have been given in this form.
    pub needs: Vec<ApprovalNeed>,
}

/// The result of a request to use approvals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApprovalUseOutcome {
    /// All approvals are now used by this decision.
    Used,
    /// An identical request used them a moment ago. The caller returns that decision again, and the use is final from now on.
    Repeated {
        /// The earlier decision.
        decision_id: String,
    },
    /// The proof was used before, or the earlier decision that was looked for does not exist. Nothing was used.
    Replayed,
    /// The store is not at the revision that the caller decided by. Nothing was used.
    RevisionMismatch {
        /// The store's revision.
        head: Revision,
    },
    /// An approval cannot be used. Nothing was used.
    Unusable {
        /// The approval at fault: an index into [`ApprovalUseRequest::prepared`], or `None` for the call's own.
        prepared: Option<usize>,
        /// The cause.
        cause: UnusableCause,
    },
}

/// The cause why an approval cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnusableCause {
    /// The approval does not exist.
    Missing,
    /// A layer has no approval, or its requirement has changed since the approval.
    Waiting,
    /// The approval has expired.
    Expired,
    /// This use was made before.
    Used,
    /// An operator refused it.
    Refused,
}

/// A selection of approvals to list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApprovalFilter {
    /// The approvals that wait.
    Waiting,
    /// All approvals that are not deleted yet.
    All,
    /// The approval with this digest.
    Digest(String),
}

/// A page of approvals, ordered by the time of the first request, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalPage {
    /// At most as many rows as the caller requested.
    pub rows: Vec<ApprovalRow>,
    /// The number of all matching approvals.
    pub total: u64,
    /// The store's clock at the time of reading. The state of each row is computed for it.
    pub read_at_unix_ms: i64,
}
