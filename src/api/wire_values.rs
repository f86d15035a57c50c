//! Converts values of the model that several answers hold to the wire: effects, evidence and principals.
//!
//! Look next at `wires/portcullis_v1.rs`, which puts them into answers.

use super::r#gen as wire;
use crate::model::decision::{Effect, Evidence};
use crate::service::request::ChainIdentities;

/// The principals of a call on the wire, with the evidence of each.
pub(super) fn principals_to_wire(tool: &str, identities: Option<&ChainIdentities>, tool_is_registered: bool) -> wire::Principals {
    let principal =
        |id: &str, evidence: Evidence| wire::Principal { id: id.to_owned(), evidence: evidence_to_wire(evidence).into() };
    let verified = |id: &str| principal(id, Evidence::Verified);
    let subject = identities.map(|identities| &identities.subject);
    let tool_evidence = if tool_is_registered { Evidence::Verified } else { Evidence::Attested };
    wire::Principals {
        user: identities.map(|identities| verified(&identities.user)),
        application: subject.map(|subject| verified(subject.application.as_str())),
        agents: subject.map(|subject| subject.agents.iter().map(|id| verified(id.as_str())).collect()).unwrap_or_default(),
        tool: Some(principal(tool, tool_evidence)),
        session: subject.map(|subject| verified(subject.session.as_str())),
        task: subject.map(|subject| verified(subject.task.as_str())),
    }
}

fn evidence_to_wire(evidence: Evidence) -> wire::Evidence {
    match evidence {
        Evidence::Verified => wire::Evidence::Verified,
        Evidence::Attested => wire::Evidence::Attested,
    }
}

pub(super) fn effect_to_wire(effect: Effect) -> wire::Effect {
    match effect {
        Effect::Permit => wire::Effect::Permit,
        Effect::Deny => wire::Effect::Deny,
        Effect::NeedsApproval => wire::Effect::NeedsApproval,
    }
}
