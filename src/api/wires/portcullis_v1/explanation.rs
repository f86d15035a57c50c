//! Converts an explanation to the wire. Gateways get it without documents, administration with them. Look next at
//! `service/explain.rs`, which makes it.

use crate::api::r#gen as wire;
use crate::api::wire_values::{effect_to_wire, principals_to_wire};
use crate::model::decision::PolicyEntryRef;
use crate::model::rows::DocumentKey;
use crate::service::{DocumentLocations, Explanation, LayerExplanation};

/// Converts an explanation. With `locations` the answer also names documents, their file and line, and their entries.
pub(in crate::api) fn explanation_to_wire(
    request_id: String,
    tool: &str,
    explanation: &Explanation,
    locations: Option<&DocumentLocations>,
) -> wire::ExplainResponse {
    let changes = explanation.remedy_steps(locations).into_iter();
    wire::ExplainResponse {
        request_id,
        effect: effect_to_wire(explanation.effect).into(),
        reason: explanation.reason.as_str().to_owned(),
        deciding_layer: explanation.layer.map(|layer| layer.as_str().to_owned()).unwrap_or_default(),
        message: explanation.message.clone(),
        chain: explanation.chain.clone(),
        layers: explanation.layers(locations).map(|layer| layer_answer_to_wire(layer, locations)).collect(),
        changes: changes.map(|change| wire::Change { layer: change.layer.as_str().to_owned(), what: change.text }).collect(),
        no_change_can: explanation.has_no_remedy(locations),
        principals: Some(principals_to_wire(tool, explanation.identities.as_deref(), explanation.tool_is_registered)),
        revision: explanation.revision.to_string(),
        snapshot_age_ms: explanation.snapshot_age_ms,
        decision_id: explanation.decision_id.clone(),
    }
}

fn layer_answer_to_wire(layer: LayerExplanation, locations: Option<&DocumentLocations>) -> wire::LayerAnswer {
    let answer = wire::LayerAnswer {
        layer: layer.layer.as_str().to_owned(),
        hop: layer.hop.and_then(|hop| i32::try_from(hop).ok()).unwrap_or(-1),
        effect: effect_to_wire(layer.effect).into(),
        reason: layer.reason.as_str().to_owned(),
        subject: layer.subject,
        approvers: layer.approvers.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    match (layer.matched, locations) {
        (Some(PolicyEntryRef { kind, id, entry }), Some(locations)) => {
            let key = DocumentKey { kind: kind.to_owned(), id: id.to_string() };
            let (path, line) = locations.get(&key).cloned().unwrap_or_default();
            wire::LayerAnswer { document_kind: key.kind, document_id: key.id, path, line, entry: entry.to_string(), ..answer }
        }
        _ => answer,
    }
}
