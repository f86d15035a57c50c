//! Approvals as a store keeps them: the call that asks, what each layer asks for and who gave it, the two uses.
//!
//! An approval belongs to exactly one call, named by the digest of that call. Rows are plain text and numbers; what a step does to
//! a row is said by `store::approvals`, in one place for every store, and who may take it by `pap`.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::decision::ApprovalNeed;
use super::limits::{
    APPROVALS_WAITING_MAX, APPROVALS_WAITING_OF_AGENT_MAX, APPROVALS_WAITING_OF_USER_MAX, APPROVALS_WAITING_TOTAL_MAX,
};
use super::reason::Layer;
use super::revision::Revision;

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
    /// Whether its decision was given again to who lost the answer: then nobody can give the use back any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given_again: bool,
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

/// A proof of possession that is spent once across the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProofUse {
    /// The key that the proof is known by.
    pub key: [u8; 32],
    /// How long it must be remembered.
    pub expires_at_unix_s: i64,
}

/// Who may still have approved: asked of every approval before it counts. A store knows no operators; whoever asks it does.
#[derive(Clone)]
pub struct Approvers(Arc<MayApprove>);

/// Whether the approval of a layer of a call counts.
type MayApprove = dyn Fn(&ApprovalCall, &ApprovalLayer) -> bool + Send + Sync;

impl Approvers {
    /// Counts the approvals that a function says yes to.
    pub fn new(may_approve: impl Fn(&ApprovalCall, &ApprovalLayer) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(may_approve))
    }

    /// Whether a layer has its approval, and that counts.
    pub fn approved(&self, call: &ApprovalCall, layer: &ApprovalLayer) -> bool {
        layer.approved_by.is_some() && (self.0)(call, layer)
    }
}

impl Default for Approvers {
    /// Counts every approval.
    fn default() -> Self {
        Self::new(|_, _| true)
    }
}

impl fmt::Debug for Approvers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Approvers")
    }
}

impl PartialEq for Approvers {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A call that asks for approval.
#[derive(Clone, Debug, PartialEq)]
pub struct AskApproval {
    /// The call.
    pub call: ApprovalCall,
    /// One for each layer that asks; not empty.
    pub needs: Vec<ApprovalNeed>,
    /// The proof that comes with the call, where that is spent in the store.
    pub proof: Option<ProofUse>,
    /// Whose approvals still count.
    pub approvers: Approvers,
}

/// What became of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskOutcome {
    /// The request stands in the store like this: made now, or before.
    Stands(Box<ApprovalRow>),
    /// As many calls wait as may: nothing was stored, and the proof was not spent.
    OverQuota(WaitingShare),
    /// The proof was spent before: nothing was stored.
    Replayed,
}

/// Of what so many calls wait for an approval that no more may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitingShare {
    /// The user's calls by the leaf agent.
    UserAndAgent,
    /// The leaf agent's calls.
    Agent,
    /// The user's calls.
    User,
    /// All.
    Store,
}

/// How many calls wait for an approval beside a new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Of its user and leaf agent.
    pub of_both: u64,
    /// Of its leaf agent.
    pub of_agent: u64,
    /// Of its user.
    pub of_user: u64,
    /// In all.
    pub total: u64,
}

impl Waiting {
    /// What is used up, the narrowest first; `None` where one more may wait.
    pub fn used_up(&self) -> Option<WaitingShare> {
        let shares = [
            (self.of_both, APPROVALS_WAITING_MAX, WaitingShare::UserAndAgent),
            (self.of_agent, APPROVALS_WAITING_OF_AGENT_MAX, WaitingShare::Agent),
            (self.of_user, APPROVALS_WAITING_OF_USER_MAX, WaitingShare::User),
            (self.total, APPROVALS_WAITING_TOTAL_MAX, WaitingShare::Store),
        ];
        shares.into_iter().find_map(|(count, max, share)| (count >= max).then_some(share))
    }
}

/// A call that would use what was approved: all of it, once, or nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UseApprovals {
    /// The call's own approval, where a layer asks for one.
    pub own: Option<OwnUse>,
    /// The calls that must have been approved before (`prepared:`).
    pub prepared: Vec<PreparedUse>,
    /// The decision that uses them.
    pub decision_id: String,
    /// See [`ApprovalUse::fingerprint`].
    pub fingerprint: Option<String>,
    /// The proof that comes with the call, where that is spent in the store: in the same transaction, and only where all is used.
    pub proof: Option<ProofUse>,
    /// The revision that the caller decided by: nothing is used where the store is at another one. `None`: at any.
    pub seen: Option<Revision>,
    /// Uses nothing: only the decision of the very same request, a moment ago, is looked for.
    pub only_again: bool,
    /// Whose approvals still count.
    pub approvers: Approvers,
}

/// The use of another call's approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedUse {
    /// The digest of the call that was prepared.
    pub digest: String,
    /// What the layers ask for now of that call; each must have been approved as it asks.
    pub needs: Vec<ApprovalNeed>,
}

impl UseApprovals {
    /// The digest of every approval that is used, each once.
    pub fn digests(&self) -> std::collections::BTreeSet<&str> {
        self.own.iter().map(|own| own.digest.as_str()).chain(self.prepared.iter().map(|one| one.digest.as_str())).collect()
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
    /// This very request used them a moment ago: its decision is to be given again, and the use is final from now on.
    Repeated {
        /// The decision of then.
        decision_id: String,
    },
    /// The proof was spent before, or a decision was looked for and is not there: nothing was used.
    Replayed,
    /// The store is at another revision than the caller has seen: nothing was used.
    Unseen {
        /// Where the store is.
        head: Revision,
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
