//! `portcullis explain`: why a call is decided as it is, layer by layer, and the smallest change that would lift a denial.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::call_failure::call_failure;
use super::check::{CallArgs, effect_name, exit_by_effect, principals_json};
use super::client::{AdminClient, connect};
use super::output::{CommandOutput, paint_effect};
use super::{AdminArgs, CommandFailure};
use crate::api::r#gen as wire;
use crate::api::r#gen::check_request::Credential;
use crate::api::r#gen::decision_service_client::DecisionServiceClient;
use crate::policy::excerpt::printable;

const HELP: &str = "\
Nothing is decided: no proof is spent, no approval asked for or used. The call is recorded in the audit log as `Explain`.

Without --documents it asks what a gateway may ask: reasons and layers, nothing that a document says; what would have to change it is
told only with a proof of the call, from the presentation or by --key. With --documents it asks administration, signed by an operator with the role administer or audit: the document, its place and the entry of each layer.

Examples:
  portcullis explain --presentation p.json --tool payments/refund --args '{\"amount\":700}'
  portcullis explain --documents --presentation p.json --tool payments/refund --args '{\"amount\":700}'

Exit codes as `check`: 0 permit, 3 denied, 4 needs approval";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    call: CallArgs,
    /// Ask administration, and show documents with file, line and entry
    #[arg(long)]
    documents: bool,
    /// The listener of a running server [default: http://127.0.0.1:7700, with --documents http://127.0.0.1:7702]
    #[arg(long, value_name = "URL")]
    target: Option<String>,
    /// The data folder, where the local operator's key lies
    #[arg(long, value_name = "DIR", env = "PORTCULLIS_DATA", default_value = "portcullis-data")]
    data: PathBuf,
    /// The operator's private key, a JWK file [default: DATA/local.jwk]
    #[arg(long, value_name = "FILE", env = "PORTCULLIS_OPERATOR_KEY")]
    operator_key: Vec<PathBuf>,
}

pub(super) async fn run(arguments: ExplainArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let request = arguments.call.into_request()?;
    let proved = matches!(&request.credential, Some(Credential::Presentation(presentation)) if !presentation.aat_pop.is_empty());
    let answer = if arguments.documents {
        let url = arguments.target.unwrap_or_else(|| "http://127.0.0.1:7702".to_owned());
        let admin =
            AdminArgs { url, store: None, store_durability: None, data: arguments.data, operator_key: arguments.operator_key };
        AdminClient::open(&admin).await?.explain(request).await?
    } else {
        let target = arguments.target.unwrap_or_else(|| "http://127.0.0.1:7700".to_owned());
        let mut client = DecisionServiceClient::new(connect(&target).await?);
        client.explain(request).await.map_err(|status| call_failure(&status, &target))?.into_inner()
    };
    print(&answer, arguments.documents, output);
    if !proved && !arguments.documents {
        output.line("without a proof of the call the server tells what `check` would answer and no more: --key makes a proof");
    }
    exit_by_effect(answer.effect())
}

fn print(answer: &wire::ExplainResponse, with_documents: bool, output: &CommandOutput) {
    output.json(&answer_json(answer, with_documents));
    if !answer.chain.is_empty() {
        output.line(&printable(&answer.chain));
        output.line("");
    }
    let layer = if answer.deciding_layer.is_empty() { String::new() } else { format!("  (layer {})", answer.deciding_layer) };
    let message = printable(&answer.message);
    output.line(&format!("{}  {}{layer}  {message}", paint_effect(effect_name(answer.effect())), answer.reason));
    output.line("");
    let rows = answer.layers.iter().map(|layer| {
        let hop = if layer.hop < 0 { String::new() } else { layer.hop.to_string() };
        let mut row = vec![
            layer.layer.clone(),
            hop,
            printable(&layer.subject),
            paint_effect(effect_name(layer.effect())),
            layer.reason.clone(),
        ];
        if with_documents {
            row.extend([document_text(layer), printable(&layer.entry)]);
        }
        row
    });
    let headers = ["LAYER", "HOP", "WHO", "EFFECT", "REASON", "DOCUMENT", "ENTRY"];
    let (few, _) = headers.split_at(5);
    output.table(if with_documents { &headers } else { few }, rows.collect());
    if answer.no_change_can {
        output.line("");
        output.line("no change of policy or credential can turn this: what is revoked here is revoked for good");
    }
    if !answer.changes.is_empty() {
        output.line("");
        output.line(if answer.changes.len() == 1 {
            "what would have to change:"
        } else {
            "what would have to change, all of it:"
        });
        for change in &answer.changes {
            output.line(&format!("  {}: {}", change.layer, printable(&change.what)));
        }
    }
    output.line("");
    output.line(&format!("explained  {}  revision {}  age {} ms", answer.decision_id, answer.revision, answer.snapshot_age_ms));
}

/// The document of a layer, with its file and line.
fn document_text(layer: &wire::LayerAnswer) -> String {
    if layer.document_kind.is_empty() {
        return String::new();
    }
    let location = if layer.path.is_empty() { String::new() } else { format!(" ({}:{})", layer.path, layer.line) };
    printable(&format!("{} {}{location}", layer.document_kind, layer.document_id))
}

fn answer_json(answer: &wire::ExplainResponse, with_documents: bool) -> serde_json::Value {
    let layers = answer.layers.iter().map(|layer| {
        let mut value = json!({
            "layer": layer.layer,
            "hop": (layer.hop >= 0).then_some(layer.hop),
            "effect": effect_name(layer.effect()),
            "reason": layer.reason,
            "subject": layer.subject,
            "approvers": layer.approvers,
        });
        if let (true, Some(value)) = (with_documents, value.as_object_mut()) {
            value.insert("document_kind".to_owned(), json!(layer.document_kind));
            value.insert("document_id".to_owned(), json!(layer.document_id));
            value.insert("path".to_owned(), json!(layer.path));
            value.insert("line".to_owned(), json!(layer.line));
            value.insert("entry".to_owned(), json!(layer.entry));
        }
        value
    });
    let changes = answer.changes.iter().map(|change| json!({ "layer": change.layer, "what": change.what }));
    json!({
        "request_id": answer.request_id,
        "effect": effect_name(answer.effect()),
        "reason": answer.reason,
        "deciding_layer": answer.deciding_layer,
        "message": answer.message,
        "chain": answer.chain,
        "layers": layers.collect::<Vec<_>>(),
        "changes": changes.collect::<Vec<_>>(),
        "no_change_can": answer.no_change_can,
        "principals": answer.principals.as_ref().map(principals_json),
        "decision_id": answer.decision_id,
        "revision": answer.revision,
        "snapshot_age_ms": answer.snapshot_age_ms,
    })
}
