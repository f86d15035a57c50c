//! Writes the stored form of a document: a JSON value that `read.rs` reads back. Fields with their default value are left out.
//!
//! Constraints are written in their long form, and keys in place of the name of a key file. Look next at `read.rs`, which must
//! read everything that this file writes.

use crate::model::json::{JsonNumber, Value};
use crate::model::jwk::NamedKey;

use super::entry::{ListKind, entry_to_json};
use super::stored_json::{JsonMembers, format_duration, object_value, put, put_list, string_array, string_value};
use super::{AgentSpec, Document, DocumentBody, IssuerSpec, NameSelection, OperatorSpec, PermissionLists, ToolSpec};

/// The document as JSON, with `kind` and `id`.
pub(super) fn document_to_json(document: &Document) -> Value {
    let mut members: JsonMembers = Vec::new();
    put(&mut members, "kind", string_value(document.body.kind()));
    put(&mut members, "id", string_value(&document.key.id));
    if document.is_shadow() {
        put(&mut members, "mode", string_value("shadow"));
    }
    if document.two_person {
        put(&mut members, "two_person", Value::Bool(true));
    }
    match &document.body {
        DocumentBody::Issuer(issuer) => put_issuer(&mut members, issuer),
        DocumentBody::Application(permissions) | DocumentBody::Group(permissions) | DocumentBody::PermissionSet(permissions) => {
            put_permissions(&mut members, permissions);
        }
        DocumentBody::Tool(tool) => put_tool(&mut members, tool),
        DocumentBody::Server(server) => {
            let tools = server.tools.iter().map(|(name, spec)| {
                let mut members = Vec::new();
                put_tool(&mut members, spec);
                (name.to_string(), object_value(members))
            });
            put(&mut members, "tools", object_value(tools.collect()));
        }
        DocumentBody::Agent(agent) => put_agent(&mut members, agent),
        DocumentBody::Operator(operator) => put_operator(&mut members, operator),
        DocumentBody::Guardrail(guardrail) => {
            put_list(&mut members, "tools", guardrail.tools.iter().map(|tool| &**tool));
            put(&mut members, "forbid_when", string_value(guardrail.forbid_when.text()));
        }
        // Tests are never stored.
        DocumentBody::Test(_) => {}
    }
    object_value(members)
}

fn put_issuer(members: &mut JsonMembers, issuer: &IssuerSpec) {
    let keys = issuer.keys.iter().map(issuer_key_to_json).collect();
    put(members, "keys", object_value(vec![("jwks".to_owned(), object_value(vec![("keys".to_owned(), Value::Array(keys))]))]));
    put_list(members, "audiences", issuer.audiences.iter().map(|audience| &**audience));
    put_names(members, "groups", &issuer.groups, |group| group.as_str());
    put_list(members, "typ", issuer.typ.iter().map(|typ| typ.as_str()));
    put(members, "lifetime_max", duration_value(issuer.lifetime_max_s));
    put(members, "hop_lifetime_max", duration_value(issuer.hop_lifetime_max_s));
    put_names(members, "applications", &issuer.applications, |application| application.as_str());
}

fn issuer_key_to_json(key: &NamedKey) -> Value {
    let mut members = jwk_members(key.key.to_jwk().as_bytes());
    if let Some(kid) = &key.kid {
        put(&mut members, "kid", string_value(kid));
    }
    object_value(members)
}

/// The members of a JWK that a key wrote itself.
fn jwk_members(jwk: &[u8]) -> JsonMembers {
    let jwk = crate::model::json::parse_object(jwk).unwrap_or_default();
    jwk.iter().map(|(name, value)| (name.to_owned(), value.clone())).collect()
}

fn put_tool(members: &mut JsonMembers, tool: &ToolSpec) {
    put(members, "risk", string_value(tool.risk.as_str()));
    if let Some(proof) = tool.proof {
        put(members, "proof", string_value(proof.as_str()));
    }
    if let Some(sha256) = tool.schema_sha256 {
        put(members, "schema_sha256", Value::String(sha256.iter().map(|byte| format!("{byte:02x}")).collect()));
    }
}

fn put_agent(members: &mut JsonMembers, agent: &AgentSpec) {
    if let Some(owner) = &agent.owner {
        put(members, "owner", string_value(owner));
    }
    put_list(members, "keys", agent.keys.iter().map(|key| key.as_str()));
    put_names(members, "applications", &agent.applications, |application| application.as_str());
    put_names(members, "acts_for", &agent.acts_for, |group| group.as_str());
    put_list(members, "delegates_to", agent.delegates_to.iter().map(|agent| agent.as_str()));
    let mut session = Vec::new();
    if let Some(lifetime_max_s) = agent.session_lifetime_max_s {
        put(&mut session, "lifetime_max", duration_value(lifetime_max_s));
    }
    if let Some(hops_max) = agent.session_hops_max {
        put(&mut session, "hops_max", Value::Number(JsonNumber::from(i64::try_from(hops_max).unwrap_or(i64::MAX))));
    }
    if !session.is_empty() {
        put(members, "session", object_value(session));
    }
    put_permissions(members, &agent.permissions);
}

fn put_operator(members: &mut JsonMembers, operator: &OperatorSpec) {
    let keys = operator.keys.iter().map(|key| object_value(jwk_members(key.to_jwk().as_bytes())));
    put(members, "keys", Value::Array(keys.collect()));
    put(members, "roles", string_array(operator.roles.iter().map(|role| role.as_str())));
    put_list(members, "groups", operator.groups.iter().map(|group| group.as_str()));
    let users = operator.users.iter().map(|user| {
        object_value(vec![
            ("issuer".to_owned(), string_value(user.issuer.as_str())),
            ("sub".to_owned(), string_value(&user.subject)),
        ])
    });
    if !operator.users.is_empty() {
        put(members, "users", Value::Array(users.collect()));
    }
}

fn put_permissions(members: &mut JsonMembers, permissions: &PermissionLists) {
    for list in ListKind::ALL {
        let entries = permissions.entries(list);
        if !entries.is_empty() {
            put(members, list.as_str(), Value::Array(entries.iter().map(entry_to_json).collect()));
        }
    }
    put_list(members, "include", permissions.include.iter().map(|set| &**set));
}

fn put_names<T>(members: &mut JsonMembers, name: &str, names: &NameSelection<T>, as_text: fn(&T) -> &str) {
    match names {
        NameSelection::All => put(members, name, string_array(["*"])),
        NameSelection::Listed(names) => put_list(members, name, names.iter().map(as_text)),
    }
}

fn duration_value(seconds: i64) -> Value {
    Value::String(format_duration(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)))
}
