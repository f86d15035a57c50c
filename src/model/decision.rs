//! The answer: an effect with its reason, never an error.

use std::sync::Arc;

use super::ids::GroupId;
use super::reason::{Layer, Reason};

/// What the gateway must do with the call. The order is the algebra's: the decision is the least of all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// Refuse it.
    Deny,
    /// Hold it until an operator approved exactly this call.
    NeedsApproval,
    /// Let it through.
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

/// How an identity was established; what was not is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// By a signature or a registry.
    Verified,
    /// Said by an authenticated gateway.
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

/// The policy entry that decided, for administrators and the audit log; a gateway never sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryRef {
    /// The document's kind.
    pub kind: &'static str,
    /// The document's id.
    pub id: Arc<str>,
    /// The entry as the document wrote it; empty where the document as a whole decided (it said nothing).
    pub entry: Arc<str>,
}

/// What one layer asks for before it permits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalNeed {
    /// The layer that asks.
    pub layer: Layer,
    /// Which agent of the chain, root 0; `None` where the layer has only one.
    pub hop: Option<usize>,
    /// Groups of operators who may approve.
    pub by: Vec<GroupId>,
    /// From request to use.
    pub expires_in_ms: u64,
}

/// What an entry with `prepared:` demands before it permits: an unused approval of another tool's call with equal arguments, user,
/// application, agents, session and task.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PreparedNeed {
    /// The layer that demands it.
    pub layer: Layer,
    /// Which agent of the chain, root 0; `None` where the layer has only one.
    pub hop: Option<usize>,
    /// `server/tool` of the call that must have been approved.
    pub tool: Arc<str>,
}

/// What would have been decided were the documents in `mode: shadow` in force. Recorded, never enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WouldBe {
    /// The effect.
    pub effect: Effect,
    /// Why.
    pub reason: Reason,
    /// The first layer that gave it; `None` on a permit.
    pub layer: Option<Layer>,
    /// The entry that would have decided.
    pub matched: Option<Arc<EntryRef>>,
}

/// Something the gateway must do if it lets the call through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obligation {
    /// What kind of duty.
    pub kind: Arc<str>,
    /// One JSON object.
    pub parameters_json: Arc<str>,
}

/// One decision. The default is what an unfinished evaluation must be: a denial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Permit, deny or needs approval.
    pub effect: Effect,
    /// Why.
    pub reason: Reason,
    /// The layer that gave the least answer; `None` on a permit.
    pub layer: Option<Layer>,
    /// Index of the token or agent at fault, root 0.
    pub hop: Option<usize>,
    /// The entry that decided.
    pub matched: Option<Arc<EntryRef>>,
    /// What is asked for where the effect is [`Effect::NeedsApproval`]: one for each layer that asks.
    pub approvals: Vec<ApprovalNeed>,
    /// What must have been prepared before the call may go on: asked for once, by `service`, which holds the port to the store.
    pub prepared: Vec<PreparedNeed>,
    /// What shadow policy would have said; `None` where there is none, and where policy was not asked.
    pub would_be: Option<Box<WouldBe>>,
    /// Duties that come with a permit.
    pub obligations: Vec<Obligation>,
    /// Number of the revision that decided: the snapshot's, or a later revocation's that took effect at once.
    pub revision: u64,
}

impl Decision {
    /// A denial by the layer that the reason belongs to.
    pub fn deny(reason: Reason, revision: u64) -> Self {
        Self {
            effect: Effect::Deny,
            reason,
            layer: reason.layer(),
            hop: None,
            matched: None,
            approvals: Vec::new(),
            prepared: Vec::new(),
            would_be: None,
            obligations: Vec::new(),
            revision,
        }
    }

    /// A permit.
    pub fn permit(revision: u64) -> Self {
        Self { effect: Effect::Permit, layer: None, ..Self::deny(Reason::Ok, revision) }
    }

    /// The same decision with the token or agent at fault.
    pub fn at_hop(mut self, hop: Option<usize>) -> Self {
        self.hop = hop;
        self
    }

    /// The same decision by another layer.
    pub fn by(mut self, layer: Layer) -> Self {
        self.layer = Some(layer);
        self
    }
}
