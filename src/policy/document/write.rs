//! Writes the stored form of a document: a JSON value that `read.rs` reads back. Fields with their default value are left out.
//!
//! Constraints are written in their long form, and keys in place of the name of a key file. Look next at `read.rs`, which must
//! read everything that this file writes.

use crate::model::constraint::{ArgumentMap, Bound, Constraint};
use crate::model::json::{Number, Object, Value};
use crate::model::jwk::NamedKey;

use super::entry::{List, duration_text};
use super::{AgentSpec, Body, Document, Entry, IssuerSpec, Names, OperatorSpec, Permissions, ToolSpec};

/// The members of a JSON object, in the order of writing.
type Members = Vec<(String, Value)>;

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

/// An entry as JSON: its pattern, or a mapping if it has further parts.
pub(super) fn entry_value(entry: &Entry) -> Value {
    if !entry.says_more() {
        return text(&entry.pattern);
    }
    let mut members = Vec::new();
    if !entry.arguments.named.is_empty() {
        put(&mut members, "args", arguments_value(&entry.arguments));
    }
    if !entry.arguments.open {
        put(&mut members, "only", Value::Bool(true));
    }
    if let Some(when) = &entry.when {
        put(&mut members, "when", text(when.text()));
    }
    if let Some(prepared) = &entry.prepared {
        put(&mut members, "prepared", text(prepared));
    }
    if entry.attested {
        put(&mut members, "evidence", text("attested"));
    }
    if let Some(approval) = &entry.approval {
        put(&mut members, "by", texts(approval.by.iter().map(|group| group.as_str())));
        put(&mut members, "expires_in", Value::String(duration_text(approval.expires_in_ms)));
    }
    object(vec![(entry.pattern.to_string(), object(members))])
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

fn arguments_value(arguments: &ArgumentMap) -> Value {
    let named = arguments.named.iter().map(|(name, argument)| {
        let mut members = constraint_members(&argument.constraint);
        if argument.optional {
            put(&mut members, "optional", Value::Bool(true));
        }
        (name.to_string(), object(members))
    });
    object(named.collect())
}

/// The long form of a constraint.
fn constraint_members(constraint: &Constraint) -> Members {
    let list = |values: &Vec<Value>| Value::Array(values.clone());
    let clauses =
        |clauses: &Vec<Constraint>| Value::Array(clauses.iter().map(|clause| object(constraint_members(clause))).collect());
    let (kind, member) = match constraint {
        Constraint::Exact(value) => ("exact", Some(("value", value.clone()))),
        Constraint::Range(range) => {
            let mut members = Vec::new();
            put(&mut members, "constraint_type", text("range"));
            put_bound(&mut members, "min", "min_inclusive", range.min);
            put_bound(&mut members, "max", "max_inclusive", range.max);
            return members;
        }
        Constraint::OneOf(values) => ("one_of", Some(("values", list(values)))),
        Constraint::NotOneOf(values) => ("not_one_of", Some(("excluded", list(values)))),
        Constraint::Contains(values) => ("contains", Some(("required", list(values)))),
        Constraint::Subset(values) => ("subset", Some(("allowed", list(values)))),
        Constraint::All(all) => ("all", Some(("constraints", clauses(all)))),
        Constraint::Any(any) => ("any", Some(("constraints", clauses(any)))),
        Constraint::Wildcard => ("wildcard", None),
    };
    let mut members = Vec::new();
    put(&mut members, "constraint_type", text(kind));
    if let Some((name, value)) = member {
        put(&mut members, name, value);
    }
    members
}

fn put_bound(members: &mut Members, name: &str, inclusive_name: &str, bound: Option<Bound>) {
    if let Some(bound) = bound {
        put(members, name, Value::Number(bound.at));
        if !bound.inclusive {
            put(members, inclusive_name, Value::Bool(false));
        }
    }
}

fn put_names<T>(members: &mut Members, name: &str, names: &Names<T>, as_text: fn(&T) -> &str) {
    match names {
        Names::All => put(members, name, texts(["*"])),
        Names::Some(names) => put_list(members, name, names.iter().map(as_text)),
    }
}

/// Adds a list unless it is empty.
fn put_list<'a>(members: &mut Members, name: &str, items: impl Iterator<Item = &'a str>) {
    let mut items = items.peekable();
    if items.peek().is_some() {
        put(members, name, texts(items));
    }
}

fn put(members: &mut Members, name: &str, value: Value) {
    members.push((name.to_owned(), value));
}

fn seconds(seconds: i64) -> Value {
    Value::String(duration_text(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)))
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn texts<'a>(items: impl IntoIterator<Item = &'a str>) -> Value {
    Value::Array(items.into_iter().map(text).collect())
}

fn object(members: Members) -> Value {
    Value::Object(Object::from_members(members))
}
