//! `portcullis check`: asks a running server for one decision, as a gateway does.
//!
//! Look next at `cli/explain.rs`, which asks for the reasons.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Args;
use serde_json::{Value, json};

use super::call_failure::call_failure;
use super::client::connect;
use super::output::{CommandOutput, paint_effect};
use super::{CommandFailure, input};
use crate::api::r#gen as wire;
use crate::api::r#gen::check_request::Credential;
use crate::api::r#gen::decision_service_client::DecisionServiceClient;

/// Ask for one decision; exits 0 on a permit, 3 on a denial, 4 where an approval is needed
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    call: CallArgs,
    /// The decisions listener of a running server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7700")]
    target: String,
}

/// A call as a gateway would send it.
#[derive(Debug, Args)]
pub(super) struct CallArgs {
    /// The chain and its proof: a file (presentation JSON, or one JWS a line), `-`, or the JSON itself
    #[arg(long, value_name = "FILE")]
    presentation: String,
    /// The leaf's private key, a JWK file: makes a new proof for this call, in place of the presentation's
    #[arg(long, value_name = "FILE")]
    key: Option<String>,
    /// The tool, `server/tool`
    #[arg(long, value_name = "TOOL")]
    tool: String,
    /// The call's arguments, one JSON object; `-` is standard input, `@F` a file
    #[arg(long, value_name = "JSON", default_value = "{}")]
    args: String,
    /// The audience to claim; optional if there is only one
    #[arg(long, value_name = "URI", default_value = "")]
    audience: String,
    /// Hex SHA-256 of the tool's schema as the gateway sees it
    #[arg(long, value_name = "HEX")]
    tool_schema_sha256: Option<String>,
    /// Environment for conditions, one JSON object
    #[arg(long, value_name = "JSON")]
    context: Option<String>,
    /// The oldest revision that may answer, as a write printed it
    #[arg(long, value_name = "REVISION", default_value = "")]
    at_least: String,
    /// Your name for the request; it stands in the audit record
    #[arg(long, value_name = "ID", default_value = "", allow_hyphen_values = true)]
    request_id: String,
}

impl CallArgs {
    /// Builds the request message.
    pub(super) fn into_request(self) -> Result<wire::CheckRequest, CommandFailure> {
        let (aat_chain, aat_pop) = input::read_presentation(&self.presentation)?;
        let arguments_json = input::read_json("--args", &self.args)?;
        let aat_pop = match &self.key {
            Some(key) => input::make_proof(key, &aat_chain, &self.tool, &arguments_json, &self.audience)?,
            None => aat_pop,
        };
        let tool_schema_sha256 = match &self.tool_schema_sha256 {
            Some(hex) => parse_sha256_hex(hex)
                .ok_or_else(|| CommandFailure::misuse("--tool-schema-sha256: 64 hexadecimal digits are expected"))?,
            None => Vec::new(),
        };
        let context = self.context.as_deref().map(|context| input::read_json("--context", context)).transpose()?;
        Ok(wire::CheckRequest {
            request_id: self.request_id,
            credential: Some(Credential::Presentation(wire::Presentation { aat_chain, aat_pop })),
            tool: self.tool,
            tool_schema_sha256: tool_schema_sha256.into(),
            arguments_json: arguments_json.into(),
            context_json: context.unwrap_or_default().into(),
            audience: self.audience,
            at_least: self.at_least,
            ..Default::default()
        })
    }
}

pub(super) async fn run(arguments: CheckArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let request = arguments.call.into_request()?;
    let mut client = DecisionServiceClient::new(connect(&arguments.target).await?);
    let answer = client.check(request).await.map_err(|status| call_failure(&status, &arguments.target))?.into_inner();
    print(&answer, output);
    exit_by_effect(answer.effect())
}

/// The exit code for an effect.
pub(super) fn exit_by_effect(effect: wire::Effect) -> Result<(), CommandFailure> {
    match effect {
        wire::Effect::Permit => Ok(()),
        wire::Effect::NeedsApproval => Err(CommandFailure::exit_code_only(CommandFailure::NEEDS_APPROVAL)),
        _ => Err(CommandFailure::exit_code_only(CommandFailure::DENIED)),
    }
}

/// The name of an effect without its prefix. An unknown effect counts as a denial.
pub(super) fn effect_name(effect: wire::Effect) -> &'static str {
    match effect {
        wire::Effect::Permit => "PERMIT",
        wire::Effect::NeedsApproval => "NEEDS_APPROVAL",
        wire::Effect::Deny | wire::Effect::Unspecified => "DENY",
    }
}

fn print(answer: &wire::CheckResponse, output: &CommandOutput) {
    output.json(&answer_json(answer));
    if output.is_json() {
        return;
    }
    let layer = if answer.deciding_layer.is_empty() { String::new() } else { format!("  (layer {})", answer.deciding_layer) };
    output.line(&format!("{}  {}{layer}  {}", paint_effect(effect_name(answer.effect())), answer.reason, answer.message));
    let principals = answer.principals.clone().unwrap_or_default();
    let shown = |principal: &Option<wire::Principal>| match principal {
        Some(principal) => vec![principal.id.clone(), evidence_name(principal).to_owned()],
        None => vec!["-".to_owned(), "not established".to_owned()],
    };
    let mut rows = vec![];
    let mut row = |name: &str, principal: &Option<wire::Principal>| rows.push([vec![name.to_owned()], shown(principal)].concat());
    row("user", &principals.user);
    row("application", &principals.application);
    for agent in principals.agents {
        row("agent", &Some(agent));
    }
    row("tool", &principals.tool);
    row("session", &principals.session);
    row("task", &principals.task);
    output.table(&["WHO", "ID", "EVIDENCE"], rows);
    if let Some(approval) = &answer.approval {
        output.line(&format!("approval   {}  by {}", approval.digest, approval.approvers.join(", ")));
    }
    output.line(&format!(
        "decision   {}  revision {}  age {} ms  valid for {} ms",
        answer.decision_id, answer.revision, answer.snapshot_age_ms, answer.valid_for_ms
    ));
}

fn answer_json(answer: &wire::CheckResponse) -> Value {
    let obligations = answer.obligations.iter().map(
        |obligation| json!({ "kind": obligation.kind, "parameters_json": URL_SAFE_NO_PAD.encode(&obligation.parameters_json) }),
    );
    let approval = answer.approval.as_ref().map(|approval| {
        json!({
            "digest": approval.digest,
            "approvers": approval.approvers,
            "expires_at_unix_ms": approval.expires_at_unix_ms,
        })
    });
    json!({
        "request_id": answer.request_id,
        "effect": effect_name(answer.effect()),
        "reason": answer.reason,
        "message": answer.message,
        "decision_id": answer.decision_id,
        "principals": answer.principals.as_ref().map(principals_json),
        "deciding_layer": answer.deciding_layer,
        "revision": answer.revision,
        "snapshot_age_ms": answer.snapshot_age_ms,
        "valid_for_ms": answer.valid_for_ms,
        "obligations": obligations.collect::<Vec<_>>(),
        "approval": approval,
    })
}

pub(super) fn principals_json(principals: &wire::Principals) -> Value {
    let principal = |principal: &wire::Principal| json!({ "id": principal.id, "evidence": evidence_name(principal) });
    json!({
        "user": principals.user.as_ref().map(principal),
        "application": principals.application.as_ref().map(principal),
        "agents": principals.agents.iter().map(principal).collect::<Vec<_>>(),
        "tool": principals.tool.as_ref().map(principal),
        "session": principals.session.as_ref().map(principal),
        "task": principals.task.as_ref().map(principal),
    })
}

fn evidence_name(principal: &wire::Principal) -> &'static str {
    match principal.evidence() {
        wire::Evidence::Verified => "VERIFIED",
        wire::Evidence::Attested => "ATTESTED",
        wire::Evidence::Unspecified => "",
    }
}

fn parse_sha256_hex(hex: &str) -> Option<Vec<u8>> {
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    hex.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
