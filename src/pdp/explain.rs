//! Explains a decision: the answer of every layer, and the remedy for each layer that denies.
//!
//! [`explain`] runs the same checks as [`decide`](super::decide), but continues after the first denial. It is pure, like `decide`. Look
//! next at `service/explain.rs`, which adds the checks that precede the PDP and writes the explanation as text.

use super::Prepared;
use crate::model::decision::Effect;
use crate::model::reason::{Layer, Reason};
use crate::model::request::Call;
use crate::model::time::Now;
pub use crate::policy::compile::{LayerAnswer, Mend, Need};
use crate::policy::condition::Work;
use crate::revocation::{HitMeaning, TargetRef};
use crate::snapshot::Snapshot;
use crate::token::Options;

/// The answer of one layer, and the remedy if the layer denies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The layer's answer.
    pub answer: LayerAnswer,
    /// The remedy; `None` if the layer does not deny.
    pub turn: Option<Turn>,
}

/// The change that would turn a denial into a permit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Present another credential, proof or audience; the reason says which.
    Credential,
    /// Change the policy or the call.
    Policy(Mend),
    /// Reinstate the suspended target.
    Reinstate,
    /// Present a chain whose root was issued after the watermark.
    LaterChain,
    /// Obtain the required approval of a prepared call. Whether it exists already is not checked here.
    Prepare,
    /// Wait until this replica is fresh, or ask another replica.
    Wait,
    /// Nothing helps: the target is revoked for good.
    Never,
}

impl Finding {
    /// A denial outside of the policy layers.
    pub fn denial(layer: Layer, hop: Option<usize>, reason: Reason, turn: Turn) -> Self {
        let answer =
            LayerAnswer { layer, hop, effect: Effect::Deny, reason, matched: None, approval: None, prepared: Vec::new() };
        Self { answer, turn: Some(turn) }
    }

    /// A layer that permits.
    pub fn permit(layer: Layer) -> Self {
        let answer = LayerAnswer {
            layer,
            hop: None,
            effect: Effect::Permit,
            reason: Reason::Ok,
            matched: None,
            approval: None,
            prepared: Vec::new(),
        };
        Self { answer, turn: None }
    }
}

/// Returns every layer's answer to a call. Of answers with the same effect, a decision reports the first. `prepared` must fit the snapshot.
pub fn explain(prepared: &Prepared, call: &Call<'_>, snapshot: &Snapshot, now: Now) -> Vec<Finding> {
    let identity = |reason, hop| Finding::denial(Layer::Identity, hop, reason, Turn::Credential);
    let mut findings = Vec::new();
    let options = Options { iat_skew_s: snapshot.iat_skew_s(), ..Options::default() };
    if let Err(rejection) = prepared.chain.check_times(now, &options) {
        findings.push(identity(rejection.reason, rejection.hop));
    }
    findings.extend(revocations(prepared, call.tool, snapshot));
    if let Some(hop) = prepared.session_too_long {
        findings.push(identity(Reason::TokenLifetime, Some(hop)));
    }
    let (policy, permissions, subject) = (snapshot.policy(), &prepared.permissions, &prepared.subject);
    let work = Work::default();
    for answer in policy.explain(permissions, subject, call) {
        findings.push(match answer.effect {
            // Only the store knows whether the required call was prepared, and an explanation does not read the store.
            Effect::Permit | Effect::NeedsApproval if !answer.prepared.is_empty() => {
                let answer = LayerAnswer { effect: Effect::Deny, reason: Reason::ApprovalRequired, ..answer };
                Finding { answer, turn: Some(Turn::Prepare) }
            }
            Effect::Permit | Effect::NeedsApproval => Finding { answer, turn: None },
            Effect::Deny => {
                let turn = policy.mend(permissions, subject, call, &answer, &work).map_or(Turn::Credential, Turn::Policy);
                Finding { answer, turn: Some(turn) }
            }
        });
    }
    findings
}

/// Returns every revocation that applies to the chain or the tool; a single permit if there is none.
fn revocations(prepared: &Prepared, tool: &str, snapshot: &Snapshot) -> Vec<Finding> {
    let index = snapshot.revocations();
    let (number, root_iat_s) = (snapshot.revision().number, prepared.chain.root_iat_s());
    let turn = |meaning| match meaning {
        HitMeaning::Dead => Turn::Never,
        HitMeaning::Suspended => Turn::Reinstate,
        HitMeaning::Watermark => Turn::LaterChain,
    };
    let mut findings: Vec<Finding> = Vec::new();
    for watched in &prepared.watched {
        if let Some(hit) = index.hit(watched.key, root_iat_s, number) {
            let reason = if hit.meaning == HitMeaning::Watermark { watched.watermark } else { watched.suspended };
            let finding = Finding::denial(Layer::Revocation, watched.hop(), reason, turn(hit.meaning));
            // A token is watched by its id and by its hash, so one revocation can be found twice.
            if !findings.contains(&finding) {
                findings.push(finding);
            }
        }
    }
    if let Some(hit) = index.hit(index.key(TargetRef::Tool(tool)), root_iat_s, number) {
        findings.push(Finding::denial(Layer::Revocation, None, Reason::ToolSuspended, turn(hit.meaning)));
    }
    if findings.is_empty() { vec![Finding::permit(Layer::Revocation)] } else { findings }
}
