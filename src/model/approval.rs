//! Approvals as a store keeps them: the call that asks, what each layer asks for and who gave it, the two uses.
//!
//! An approval belongs to exactly one call, named by the digest of that call. Rows are plain text and numbers; what a step does to
//! a row is said by `store::approvals`, in one place for every store, and who may take it by `pap`.

use serde::{Deserialize, Serialize};

use super::decision::ApprovalNeed;
use super::reason::Layer;

/// The call that is to be approved, as the approver is shown it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalCall {
    /// Hex SHA-256 of all the other members; it names the approval.
    pub digest: String,
    /// The user's issuer.
    pub issuer: String,
    /// The user's subject.
    pub subject: String,
    /// The client id.
    pub application: String,
    /// SPIFFE IDs, root to leaf; never empty.
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

/// What one layer asks for, and who gave it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalLayer {
    /// The layer that asks.
    pub layer: Layer,
    /// Which agent of the chain, root 0; `None` where the layer has only one.
    pub hop: Option<usize>,
    /// Groups of operators who may approve.
    pub by: Vec<String>,
    /// From asking to use.
    pub expires_in_ms: u64,
    /// When the layer asked, by the store's clock.
    pub asked_at_unix_ms: i64,
    /// When its approval is good no longer.
    pub expires_at_unix_ms: i64,
    /// The operator who approved; `None` while it waits.
    pub approved_by: Option<String>,
    /// Thumbprint of the key that the operator signed with: once it is revoked, the layer waits again. An older version wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_key: Option<String>,
}

impl ApprovalLayer {
    /// Whether this is what a layer asks for now: the same layer, approvers and time. What policy asks differently now was not
    /// approved.
    pub fn is_of(&self, need: &ApprovalNeed) -> bool {
        let same_by = self.by.iter().map(String::as_str).eq(need.by.iter().map(super::ids::GroupId::as_str));
        (self.layer, self.hop, self.expires_in_ms) == (need.layer, need.hop, need.expires_in_ms) && same_by
    }
}

/// One of the two uses of an approval, once it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalUse {
    /// The decision that used it.
    pub decision_id: String,
    /// When, by the store's clock.
    pub unix_ms: i64,
    /// Names the very request of the very gateway, so that one that lost the answer gets it again; `None` where the request had
    /// no id.
    pub fingerprint: Option<String>,
}

/// An approval, from the first asking until it is forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalRow {
    /// The call.
    pub call: ApprovalCall,
    /// One for each layer that asked; never empty.
    pub layers: Vec<ApprovalLayer>,
    /// When the call asked first, by the store's clock.
    pub asked_at_unix_ms: i64,
    /// The operator who refused.
    pub refused_by: Option<String>,
    /// The use for the approved call itself.
    pub used: Option<ApprovalUse>,
    /// The use for one call that demands this one as `prepared`.
    pub used_prepared: Option<ApprovalUse>,
}

impl ApprovalRow {
    /// When the approval is good no longer: the first expiry of its layers.
    pub fn expires_at_unix_ms(&self) -> i64 {
        self.layers.iter().map(|layer| layer.expires_at_unix_ms).min().unwrap_or(i64::MIN)
    }

    /// Whether every layer that asked has its approval.
    pub fn is_approved(&self) -> bool {
        !self.layers.is_empty() && self.layers.iter().all(|layer| layer.approved_by.is_some())
    }

    /// Where it stands at a time.
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

/// Where an approval stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApprovalState {
    /// Some layer has no approval yet.
    Waiting,
    /// Every layer has one; the call may be made once.
    Approved,
    /// An operator said no.
    Refused,
    /// The approved call was made.
    Used,
    /// Neither refused nor used in time.
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

/// A call that asks for approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AskApproval {
    /// The call.
    pub call: ApprovalCall,
    /// One for each layer that asks; not empty.
    pub needs: Vec<ApprovalNeed>,
}

/// What became of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskOutcome {
    /// The request stands in the store like this: made now, or before.
    Stands(Box<ApprovalRow>),
    /// As many calls of the leaf agent wait as may: nothing was stored.
    OverQuota,
}

/// A call that would use what was approved: all of it, once, or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UseApprovals {
    /// The call's own approval, where a layer asks for one.
    pub own: Option<OwnUse>,
    /// Digests of the calls that must have been approved before (`prepared:`).
    pub prepared: Vec<String>,
    /// The decision that uses them.
    pub decision_id: String,
    /// See [`ApprovalUse::fingerprint`].
    pub fingerprint: Option<String>,
}

impl UseApprovals {
    /// The digest of every approval that is used, each once.
    pub fn digests(&self) -> std::collections::BTreeSet<&str> {
        self.own.iter().map(|own| own.digest.as_str()).chain(self.prepared.iter().map(String::as_str)).collect()
    }
}

/// The use of a call's own approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnUse {
    /// The call's digest.
    pub digest: String,
    /// What the layers ask for now; each must have been approved as it asks.
    pub needs: Vec<ApprovalNeed>,
}

/// What became of a use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UseOutcome {
    /// All were used, now, by this decision.
    Used,
    /// This very request used them a moment ago: its decision is to be given again.
    Repeated {
        /// The decision of then.
        decision_id: String,
    },
    /// Nothing was used.
    Lacking {
        /// Which: an index into [`UseApprovals::prepared`], or `None` for the call's own.
        prepared: Option<usize>,
        /// Why.
        lack: Lack,
    },
}

/// Why an approval cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// There is none.
    Missing,
    /// A layer that asks has no approval, or not as it asks now.
    Waiting,
    /// Its time is over.
    Expired,
    /// That use was made.
    Used,
    /// An operator refused it.
    Refused,
}

/// Which approvals to list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApprovalFilter {
    /// Those that wait.
    Waiting,
    /// All that are not forgotten yet.
    All,
    /// The one with this digest.
    Digest(String),
}

/// Approvals in the order of asking, the oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approvals {
    /// At most as many as were asked for.
    pub rows: Vec<ApprovalRow>,
    /// How many match in all.
    pub total: u64,
    /// The store's clock when it looked; states are told by it.
    pub unix_ms: i64,
}
