//! The decision: an effect with its reason. A denial is a decision, never an error.
//!
//! Look next at [`super::reason`] for the reasons, and at `pdp.rs`, which makes decisions.

use std::sync::Arc;

use super::ids::GroupId;
use super::reason::{DecisionLayer, Reason};

/// What the gateway must do with the call. The effects are ordered: the decision is the least effect of all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// Refuse the call.
    Deny,
    /// Hold the call until an operator has approved exactly this call.
    NeedsApproval,
    /// Let the call through.
    Permit,
}

impl Effect {
    /// The name in JSON and in audit records.
    pub fn as_str(self) -> &'static str {
        match self {
            Effect::Deny => "DENY",
            Effect::NeedsApproval => "NEEDS_APPROVAL",
            Effect::Permit => "PERMIT",
        }
    }
}

/// How an identity was established. An identity that was not established is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// A signature or a registry proves it.
    Verified,
    /// An authenticated gateway asserts it.
    Attested,
}

impl Evidence {
    /// The name in JSON and in audit records.
    pub fn as_str(self) -> &'static str {
        match self {
            Evidence::Verified => "VERIFIED",
            Evidence::Attested => "ATTESTED",
        }
    }
}

/// The policy entry that decided. Administrators and the audit log see it; a gateway never does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyEntryRef {
    /// The kind of the document.
    pub kind: &'static str,
    /// The id of the document.
    pub id: Arc<str>,
    /// The text of the entry in the document. It is empty if no entry matched, so that the document as a whole decided.
    pub entry: Arc<str>,
}

/// The approval that one layer requires before it permits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalNeed {
    /// The layer that requires the approval.
    pub layer: DecisionLayer,
    /// Index of the agent in the chain, root 0; `None` for a layer that exists only once.
    pub hop: Option<usize>,
    /// Groups whose operators may approve.
    pub approver_groups: Vec<GroupId>,
    /// Time from the request for approval to its use.
    pub expires_in_ms: u64,
}

/// The prepared call that an entry with `prepared_needs:` requires before it permits.
///
/// There must be an unused approval of a call to another tool with the same arguments, user, application, agents, session and task.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PreparationNeed {
    /// The layer that requires it.
    pub layer: DecisionLayer,
    /// Index of the agent in the chain, root 0; `None` for a layer that exists only once.
    pub hop: Option<usize>,
    /// `server/tool` of the call that must have been approved.
    pub tool: Arc<str>,
}

/// The decision that would result if the documents in `mode: shadow` were in force. It is recorded and never enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowDecision {
    /// The effect.
    pub effect: Effect,
    /// The reason.
    pub reason: Reason,
    /// The first layer with this effect; `None` on a permit.
    pub layer: Option<DecisionLayer>,
    /// The entry that would have decided.
    pub matched: Option<Arc<PolicyEntryRef>>,
}

/// A duty of the gateway that comes with a permit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obligation {
    /// The kind of duty.
    pub kind: Arc<str>,
    /// One JSON object.
    pub parameters_json: Arc<str>,
}

/// One decision. Unfinished evaluation must never permit, so every decision starts as a denial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Permit, deny or needs approval.
    pub effect: Effect,
    /// The reason.
    pub reason: Reason,
    /// The layer with the least effect; `None` on a permit.
    pub layer: Option<DecisionLayer>,
    /// Index of the token or agent at fault, root 0.
    pub hop: Option<usize>,
    /// The entry that decided.
    pub matched: Option<Arc<PolicyEntryRef>>,
    /// The required approvals if the effect is [`Effect::NeedsApproval`], one for each layer that requires one.
    pub approvals: Vec<ApprovalNeed>,
    /// The prepared calls that must exist before the call may proceed. `service`, which has access to the store, checks them once.
    pub prepared_needs: Vec<PreparationNeed>,
    /// The decision of shadow policy; `None` if there is none or if policy was not evaluated.
    pub shadow_decision: Option<Box<ShadowDecision>>,
    /// Duties that come with a permit.
    pub obligations: Vec<Obligation>,
    /// Number of the revision that decided: that of the snapshot, or that of a later revocation that took effect at once.
    pub revision: u64,
}

impl Decision {
    /// A denial by the layer of the reason.
    pub fn deny(reason: Reason, revision: u64) -> Self {
        Self {
            effect: Effect::Deny,
            reason,
            layer: reason.layer(),
            hop: None,
            matched: None,
            approvals: Vec::new(),
            prepared_needs: Vec::new(),
            shadow_decision: None,
            obligations: Vec::new(),
            revision,
        }
    }

    /// A permit.
    pub fn permit(revision: u64) -> Self {
        Self { effect: Effect::Permit, layer: None, ..Self::deny(Reason::Ok, revision) }
    }

    /// Sets the token or agent at fault.
    pub fn with_hop(mut self, hop: Option<usize>) -> Self {
        self.hop = hop;
        self
    }

    /// Sets the layer.
    pub fn with_layer(mut self, layer: DecisionLayer) -> Self {
        self.layer = Some(layer);
        self
    }
}
