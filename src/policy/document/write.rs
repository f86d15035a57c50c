//! Writes the stored form of a document: a JSON value that `read.rs` reads back. Fields with their default value are left out.
//!
//! Constraints are written in their long form, and keys in place of the name of a key file. Look next at `read.rs`, which must
//! read everything that this file writes.

use crate::model::json::{Number, Value};
use crate::model::jwk::NamedKey;

use super::entry::{List, entry_value};
use super::stored_json::{Members, duration_text, object, put, put_list, text, texts};
use super::{AgentSpec, Body, Document, IssuerSpec, Names, OperatorSpec, Permissions, ToolSpec};

/// The document as JSON, with `kind` and `id`.
pub(super) fn value(document: &Document) -> Value {
    let mut members: Members = Vec::new();
    put(&mut members, "kind", text(document.body.kind()));
    put(&mut members, "id", text(&document.key.id));
    if document.is_shadow() {
        put(&mut members, "mode", text("shadow"));
    }
    if document.two_person {
        put(&mut members, "two_person", Value::Bool(true));
    }
    match &document.body {
        Body::Issuer(issuer) => put_issuer(&mut members, issuer),
        Body::Application(permissions) | Body::Group(permissions) | Body::PermissionSet(permissions) => {
            put_permissions(&mut members, permissions);
        }
        Body::Tool(tool) => put_tool(&mut members, tool),
        Body::Server(server) => {
            let tools = server.tools.iter().map(|(name, spec)| {
                let mut members = Vec::new();
                put_tool(&mut members, spec);
                (name.to_string(), object(members))
            });
            put(&mut members, "tools", object(tools.collect()));
        }
        Body::Agent(agent) => put_agent(&mut members, agent),
        Body::Operator(operator) => put_operator(&mut members, operator),
        Body::Guardrail(guardrail) => {
            put_list(&mut members, "tools", guardrail.tools.iter().map(|tool| &**tool));
            put(&mut members, "forbid_when", text(guardrail.forbid_when.text()));
        }
        // Tests are never stored.
        Body::Test(_) => {}
    }
    object(members)
}

fn put_issuer(members: &mut Members, issuer: &IssuerSpec) {
    let keys = issuer.keys.iter().map(issuer_key).collect();
    put(members, "keys", object(vec![("jwks".to_owned(), object(vec![("keys".to_owned(), Value::Array(keys))]))]));
    put_list(members, "audiences", issuer.audiences.iter().map(|audience| &**audience));
    put_names(members, "groups", &issuer.groups, |group| group.as_str());
    put_list(members, "typ", issuer.typ.iter().map(|typ| typ.as_str()));
    put(members, "lifetime_max", seconds(issuer.lifetime_max_s));
    put(members, "hop_lifetime_max", seconds(issuer.hop_lifetime_max_s));
    put_names(members, "applications", &issuer.applications, |application| application.as_str());
}

fn issuer_key(key: &NamedKey) -> Value {
    let mut members = jwk_members(key.key.to_jwk().as_bytes());
    if let Some(kid) = &key.kid {
        put(&mut members, "kid", text(kid));
    }
    object(members)
}

/// The members of a JWK that a key wrote itself.
fn jwk_members(jwk: &[u8]) -> Members {
    let jwk = crate::model::json::parse_object(jwk).unwrap_or_default();
    jwk.iter().map(|(name, value)| (name.to_owned(), value.clone())).collect()
}

fn put_tool(members: &mut Members, tool: &ToolSpec) {
    put(members, "risk", text(tool.risk.as_str()));
    if let Some(proof) = tool.proof {
        put(members, "proof", text(proof.as_str()));
    }
    if let Some(sha256) = tool.schema_sha256 {
        put(members, "schema_sha256", Value::String(sha256.iter().map(|byte| format!("{byte:02x}")).collect()));
    }
}

fn put_agent(members: &mut Members, agent: &AgentSpec) {
    if let Some(owner) = &agent.owner {
        put(members, "owner", text(owner));
    }
    put_list(members, "keys", agent.keys.iter().map(|key| key.as_str()));
    put_names(members, "applications", &agent.applications, |application| application.as_str());
    put_names(members, "acts_for", &agent.acts_for, |group| group.as_str());
    put_list(members, "delegates_to", agent.delegates_to.iter().map(|agent| agent.as_str()));
    let mut session = Vec::new();
    if let Some(lifetime_max_s) = agent.session_lifetime_max_s {
        put(&mut session, "lifetime_max", seconds(lifetime_max_s));
    }
    if let Some(hops_max) = agent.session_hops_max {
        put(&mut session, "hops_max", Value::Number(Number::from(i64::try_from(hops_max).unwrap_or(i64::MAX))));
    }
    if !session.is_empty() {
        put(members, "session", object(session));
    }
    put_permissions(members, &agent.permissions);
}

fn put_operator(members: &mut Members, operator: &OperatorSpec) {
    let keys = operator.keys.iter().map(|key| object(jwk_members(key.to_jwk().as_bytes())));
    put(members, "keys", Value::Array(keys.collect()));
    put(members, "roles", texts(operator.roles.iter().map(|role| role.as_str())));
    put_list(members, "groups", operator.groups.iter().map(|group| group.as_str()));
    let users = operator
        .users
        .iter()
        .map(|user| object(vec![("issuer".to_owned(), text(user.issuer.as_str())), ("sub".to_owned(), text(&user.subject))]));
    if !operator.users.is_empty() {
        put(members, "users", Value::Array(users.collect()));
    }
}

fn put_permissions(members: &mut Members, permissions: &Permissions) {
    for list in List::ALL {
        let entries = permissions.list(list);
        if !entries.is_empty() {
            put(members, list.as_str(), Value::Array(entries.iter().map(entry_value).collect()));
        }
    }
    put_list(members, "include", permissions.include.iter().map(|set| &**set));
}

fn put_names<T>(members: &mut Members, name: &str, names: &Names<T>, as_text: fn(&T) -> &str) {
    match names {
        Names::All => put(members, name, texts(["*"])),
        Names::Some(names) => put_list(members, name, names.iter().map(as_text)),
    }
}

fn seconds(seconds: i64) -> Value {
    Value::String(duration_text(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)))
}
