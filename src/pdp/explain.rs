//! Why a call is decided as it is: what every layer answers, and what would have to change for each that denies.
//!
//! Asks the same questions as [`decide`](super::decide), and goes on after the first denial. Pure as that is. Look next at
//! `service/explain.rs`, which adds what comes before and says it in words.

use super::Prepared;
use crate::model::decision::Effect;
use crate::model::reason::{Layer, Reason};
use crate::model::request::Call;
use crate::model::time::Now;
use crate::policy::compile::LayerAnswer;
pub use crate::policy::compile::{Mend, Need};
use crate::policy::condition::Work;
use crate::revocation::{HitMeaning, TargetRef};
use crate::snapshot::Snapshot;
use crate::token::Options;

/// One layer's answer, and what would turn it if it denies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The answer.
    pub answer: LayerAnswer,
    /// `None` where it does not deny.
    pub turn: Option<Turn>,
}

/// What would turn a denial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Another credential, proof or audience; the reason says which.
    Credential,
    /// Policy, or what the call asks.
    Policy(Mend),
    /// A suspension must be lifted.
    Reinstate,
    /// A chain that begins after the watermark.
    LaterChain,
    /// What must be prepared is not known to be.
    Prepare,
    /// Freshness comes by itself, or another replica has it.
    Wait,
    /// Nothing: what is revoked is dead for good.
    Never,
}

impl Finding {
    /// A denial by something that is no layer of policy.
    pub fn denial(layer: Layer, hop: Option<usize>, reason: Reason, turn: Turn) -> Self {
        let answer =
            LayerAnswer { layer, hop, effect: Effect::Deny, reason, matched: None, approval: None, prepared: Vec::new() };
        Self { answer, turn: Some(turn) }
    }

    /// A layer without objections.
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

/// Every layer's answer to a call, in the order in which one of equals is reported. `Prepared` must fit the snapshot.
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
            // Whether it was prepared only the store knows, and an explanation does not ask it.
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

/// Everything revoked that the chain or the tool meets; one permit if there is nothing.
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
            // A token is known by its id and by its hash: it is revoked once.
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
