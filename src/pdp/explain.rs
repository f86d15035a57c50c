//! Explains a decision: the answer of every layer, and the remedy for each layer that denies.
//!
//! [`explain`] runs the same checks as [`decide`](super::decide), but continues after the first denial. It is pure, like `decide`. Look
//! next at `service/explain.rs`, which adds the checks that precede the PDP and writes the explanation as text.

use super::PreparedChain;
use crate::model::decision::Effect;
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::ToolCall;
use crate::model::time::ClockReading;
pub use crate::policy::compile::{LayerAnswer, LayerRemedy, PermitRequirement};
use crate::policy::condition::WorkBudget;
use crate::revocation::{RevocationEffect, TargetRef};
use crate::snapshot::Snapshot;
use crate::token::VerificationOptions;

/// The answer of one layer, and the remedy if the layer denies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerFinding {
    /// The layer's answer.
    pub answer: LayerAnswer,
    /// The remedy; `None` if the layer does not deny.
    pub remedy: Option<FindingRemedy>,
}

/// The change that would turn a denial into a permit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FindingRemedy {
    /// Present another credential, proof or audience; the reason says which.
    Credential,
    /// Change the policy or the call.
    Policy(LayerRemedy),
    /// Reinstate the suspended target.
    Reinstate,
    /// Present a chain whose root was issued after the watermark.
    NewerChain,
    /// Obtain the required approval of a prepared call. Whether it exists already is not checked here.
    Prepare,
    /// Wait until this replica is fresh, or ask another replica.
    Wait,
    /// Nothing helps: the target is revoked for good.
    Irrevocable,
}

impl LayerFinding {
    /// A denial outside of the policy layers.
    pub fn denial(layer: DecisionLayer, hop: Option<usize>, reason: Reason, turn: FindingRemedy) -> Self {
        let answer =
            LayerAnswer { layer, hop, effect: Effect::Deny, reason, matched: None, approval: None, prepared: Vec::new() };
        Self { answer, remedy: Some(turn) }
    }

    /// A layer that permits.
    pub fn permit(layer: DecisionLayer) -> Self {
        let answer = LayerAnswer {
            layer,
            hop: None,
            effect: Effect::Permit,
            reason: Reason::Ok,
            matched: None,
            approval: None,
            prepared: Vec::new(),
        };
        Self { answer, remedy: None }
    }
}

/// Returns every layer's answer to a call. Of answers with the same effect, a decision reports the first. `prepared` must fit the snapshot.
pub fn explain(prepared: &PreparedChain, call: &ToolCall<'_>, snapshot: &Snapshot, now: ClockReading) -> Vec<LayerFinding> {
    let identity = |reason, hop| LayerFinding::denial(DecisionLayer::Identity, hop, reason, FindingRemedy::Credential);
    let mut findings = Vec::new();
    let options = VerificationOptions { iat_skew_s: snapshot.iat_skew_s(), ..VerificationOptions::default() };
    if let Err(rejection) = prepared.chain.check_times(now, &options) {
        findings.push(identity(rejection.reason, rejection.hop));
    }
    findings.extend(find_revocations(prepared, call.tool, snapshot));
    if let Some(hop) = prepared.session_too_long_hop {
        findings.push(identity(Reason::TokenLifetime, Some(hop)));
    }
    let (policy, permissions, subject) = (snapshot.policy(), &prepared.permissions, &prepared.subject);
    let work = WorkBudget::default();
    for answer in policy.explain(permissions, subject, call) {
        findings.push(match answer.effect {
            // Only the store knows whether the required call was prepared, and an explanation does not read the store.
            Effect::Permit | Effect::NeedsApproval if !answer.prepared.is_empty() => {
                let answer = LayerAnswer { effect: Effect::Deny, reason: Reason::ApprovalRequired, ..answer };
                LayerFinding { answer, remedy: Some(FindingRemedy::Prepare) }
            }
            Effect::Permit | Effect::NeedsApproval => LayerFinding { answer, remedy: None },
            Effect::Deny => {
                let turn = policy
                    .find_remedy(permissions, subject, call, &answer, &work)
                    .map_or(FindingRemedy::Credential, FindingRemedy::Policy);
                LayerFinding { answer, remedy: Some(turn) }
            }
        });
    }
    findings
}

/// Returns every revocation that applies to the chain or the tool; a single permit if there is none.
fn find_revocations(prepared: &PreparedChain, tool: &str, snapshot: &Snapshot) -> Vec<LayerFinding> {
    let index = snapshot.revocations();
    let (number, root_iat_s) = (snapshot.revision().number, prepared.chain.root_iat_s());
    let turn = |meaning| match meaning {
        RevocationEffect::Dead => FindingRemedy::Irrevocable,
        RevocationEffect::Suspended => FindingRemedy::Reinstate,
        RevocationEffect::Watermark => FindingRemedy::NewerChain,
    };
    let mut findings: Vec<LayerFinding> = Vec::new();
    for watched in &prepared.revocation_targets {
        if let Some(hit) = index.find_hit(watched.key, root_iat_s, number) {
            let reason =
                if hit.effect == RevocationEffect::Watermark { watched.watermark_reason } else { watched.suspended_reason };
            let finding = LayerFinding::denial(DecisionLayer::Revocation, watched.hop(), reason, turn(hit.effect));
            // A token is watched by its id and by its hash, so one revocation can be found twice.
            if !findings.contains(&finding) {
                findings.push(finding);
            }
        }
    }
    if let Some(hit) = index.find_hit(index.key(TargetRef::Tool(tool)), root_iat_s, number) {
        findings.push(LayerFinding::denial(DecisionLayer::Revocation, None, Reason::ToolSuspended, turn(hit.effect)));
    }
    if findings.is_empty() { vec![LayerFinding::permit(DecisionLayer::Revocation)] } else { findings }
}
