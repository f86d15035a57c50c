//! Converts an explanation to the wire. Gateways get it without documents, administration with them. Look next at
//! `service/explain.rs`, which makes it.

use super::r#gen as wire;
use super::wire_values::{effect_to_wire, principals_to_wire};
use crate::model::decision::PolicyEntryRef;
use crate::model::rows::DocumentKey;
use crate::service::{DocumentLocations, Explanation, LayerExplanation};

/// Converts an explanation. With `places` the answer also names documents, their file and line, and their entries.
pub(super) fn explanation_to_wire(
    request_id: String,
    tool: &str,
    told: &Explanation,
    places: Option<&DocumentLocations>,
) -> wire::ExplainResponse {
    let changes = told.remedy_steps(places).into_iter();
    wire::ExplainResponse {
        request_id,
        effect: effect_to_wire(told.effect).into(),
        reason: told.reason.as_str().to_owned(),
        deciding_layer: told.layer.map(|layer| layer.as_str().to_owned()).unwrap_or_default(),
        message: told.message.clone(),
        chain: told.chain.clone(),
        layers: told.layers(places).map(|layer| layer_answer_to_wire(layer, places)).collect(),
        changes: changes.map(|change| wire::Change { layer: change.layer.as_str().to_owned(), what: change.text }).collect(),
        no_change_can: told.has_no_remedy(places),
        principals: Some(principals_to_wire(tool, told.identities.as_deref(), told.tool_is_registered)),
        revision: told.revision.to_string(),
        snapshot_age_ms: told.snapshot_age_ms,
        decision_id: told.decision_id.clone(),
    }
}

fn layer_answer_to_wire(layer: LayerExplanation, places: Option<&DocumentLocations>) -> wire::LayerAnswer {
    let answer = wire::LayerAnswer {
        layer: layer.layer.as_str().to_owned(),
        hop: layer.hop.and_then(|hop| i32::try_from(hop).ok()).unwrap_or(-1),
        effect: effect_to_wire(layer.effect).into(),
        reason: layer.reason.as_str().to_owned(),
        subject: layer.subject,
        approvers: layer.approvers.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    match (layer.matched, places) {
        (Some(PolicyEntryRef { kind, id, entry }), Some(places)) => {
            let key = DocumentKey { kind: kind.to_owned(), id: id.to_string() };
            let (path, line) = places.get(&key).cloned().unwrap_or_default();
            wire::LayerAnswer { document_kind: key.kind, document_id: key.id, path, line, entry: entry.to_string(), ..answer }
        }
        _ => answer,
    }
}
