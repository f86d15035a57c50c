//! Reads one document from a node: the fields of each kind, and their limits.
//!
//! YAML files and stored rows pass through the same reader, so both use one language. The reader reports every error, not only
//! the first. It does not look up the names of other documents. Look next at `entry.rs`, then at `validate.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::constraint::abbreviate;
use crate::model::ids::{AgentId, ApplicationId, GroupId, IssuerUri, OperatorId, Thumbprint, UserId, spiffe_id_error};
use crate::model::json::{self, Value};
use crate::model::jwk::{NamedKey, PublicKey};
use crate::model::limits::{
    DELEGATION_DEPTH_MAX, HOP_LIFETIME_S_DEFAULT, KEYS_MAX, ROOT_LIFETIME_S_DEFAULT, TOOL_NAME_BYTES_MAX,
};
use crate::model::rows::DocumentKey;

use super::super::diagnostic::{Diagnostic, suggest_name};
use super::super::node::{NodeKind, ScalarNode, ScalarValue, SourceNode};
use super::entry::{pattern_error, read_condition, read_permissions};
use super::field_reader::{DocumentReader, MappingFields};
use super::test_case::read_test;
use super::{
    AGENT_KEYS_MAX, AgentSpec, Document, DocumentBody, GuardrailSpec, IssuerSpec, NameSelection, OperatorRole, OperatorSpec,
    ProofClass, SHADOW_KINDS, ServerSpec, TWO_PERSON_KINDS, TokenType, ToolRisk, ToolSpec,
};

/// Every kind of document.
pub(in crate::policy) const DOCUMENT_KINDS: &[&str] =
    &["issuer", "application", "group", "tool", "server", "agent", "permission_set", "operator", "guardrail", "test"];

/// The files that `keys: {file: …}` may name, by their path relative to the policy folder.
#[derive(Debug, Default)]
pub(in crate::policy) struct KeyFiles<'a>(BTreeMap<&'a str, &'a [u8]>);

impl<'a> KeyFiles<'a> {
    /// No key files. A stored document holds its keys itself.
    pub(in crate::policy) fn empty() -> Self {
        Self::default()
    }

    /// The given files, as path and content.
    pub(in crate::policy) fn new(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        Self(files.into_iter().collect())
    }
}

/// Reads a document and adds its errors to `out`. `None` if the errors leave no usable document.
pub(in crate::policy) fn read_document(
    node: &SourceNode,
    path: &str,
    files: &KeyFiles<'_>,
    out: &mut Vec<Diagnostic>,
) -> Option<Document> {
    let mut reader = DocumentReader::new(path, out);
    let mut fields = MappingFields::new(node, "a document", &mut reader)?;
    let kind_node = fields.require("kind", &mut reader)?;
    let kind = reader.read_text(kind_node, "`kind`")?.to_owned();
    if !DOCUMENT_KINDS.contains(&kind.as_str()) {
        let help = suggest_name(&kind, DOCUMENT_KINDS.iter().copied());
        reader.report_error_with_help(kind_node.at, format!("unknown kind `{}`", abbreviate(&kind)), help);
        return None;
    }
    let is_test = kind == "test";
    let id_node = if is_test { fields.take("id") } else { fields.require("id", &mut reader) };
    let id = id_node.and_then(|node| reader.read_text(node, "`id`")).map(str::to_owned);
    // A test needs no id, because its position identifies it.
    let id = id.or_else(|| is_test.then(|| format!("{path}:{}", node.at.line)));
    if let Some(node) = id_node {
        reader.positions.insert("id", 0, node.at);
    }
    let body = read_body(&kind, id.as_deref().unwrap_or_default(), &mut fields, files, &mut reader);
    let shadow = read_shadow_mode(&kind, &mut fields, &mut reader);
    let two_person = read_two_person(&kind, &mut fields, &mut reader);
    fields.reject_unknown_fields(&mut reader);
    let id = id?;
    if let Some(problem) = id_error(&kind, &id) {
        let at = id_node.map_or(node.at, |node| node.at);
        reader.report_error(at, format!("id `{}` {problem}", abbreviate(&id)));
    }
    let positions = reader.positions;
    let (key, line) = (DocumentKey { kind, id }, node.at.line);
    let document = Document { key, body: body?, two_person, path: path.to_owned(), line, positions };
    Some(if shadow { document.into_shadow() } else { document })
}

/// Reads `mode` and returns whether it is `shadow`, which only [`SHADOW_KINDS`] allow.
fn read_shadow_mode(kind: &str, fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> bool {
    let Some(node) = fields.take("mode") else {
        return false;
    };
    let mode = reader.read_choice(node, "mode", &["enforce", "shadow"], |mode| mode);
    let shadow = mode == Some("shadow");
    if shadow && !SHADOW_KINDS.contains(&kind) {
        let kinds = SHADOW_KINDS.join(", ");
        reader.report_error(node.at, format!("a document of kind `{kind}` cannot be in shadow: only {kinds}"));
    }
    shadow
}

/// Reads `two_person`, which only [`TWO_PERSON_KINDS`] allow.
fn read_two_person(kind: &str, fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> bool {
    let Some(node) = fields.take("two_person") else {
        return false;
    };
    if !TWO_PERSON_KINDS.contains(&kind) {
        let kinds = TWO_PERSON_KINDS.join(", ");
        let message = format!("`two_person` has no meaning in a document of kind `{kind}`: only {kinds} can be reinstated");
        reader.report_error(node.at, message);
    }
    reader.read_bool(node, "`two_person`").unwrap_or(true)
}

/// The key file that an issuer's document names, as its author wrote the name.
pub(in crate::policy) fn key_file_reference(document: &SourceNode) -> Option<&str> {
    document.member("keys")?.member("file")?.as_str()
}

/// Resolves a name that is relative to the file `path`. The result is relative to the policy folder.
pub(in crate::policy) fn resolve_relative_path(path: &str, name: &str) -> Result<String, &'static str> {
    if name.starts_with('/') || name.contains('\\') || name.split('/').any(|part| part.is_empty() || part == "..") {
        return Err("must be relative to the document's file and stay inside the policy folder");
    }
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let parts = folder.split('/').chain(name.split('/')).filter(|part| !part.is_empty() && *part != ".");
    Ok(parts.collect::<Vec<_>>().join("/"))
}

fn read_body(
    kind: &str,
    id: &str,
    fields: &mut MappingFields<'_>,
    files: &KeyFiles<'_>,
    reader: &mut DocumentReader<'_>,
) -> Option<DocumentBody> {
    Some(match kind {
        "issuer" => DocumentBody::Issuer(read_issuer(id, fields, files, reader)),
        "application" => DocumentBody::Application(read_permissions(fields, reader)),
        "group" => DocumentBody::Group(read_permissions(fields, reader)),
        "permission_set" => DocumentBody::PermissionSet(read_permissions(fields, reader)),
        "tool" => DocumentBody::Tool(read_tool(fields, reader)),
        "server" => DocumentBody::Server(read_server(id, fields, reader)),
        "agent" => DocumentBody::Agent(read_agent(id, fields, reader)),
        "operator" => DocumentBody::Operator(read_operator(id, fields, reader)),
        "guardrail" => DocumentBody::Guardrail(read_guardrail(fields, reader)?),
        "test" => DocumentBody::Test(Box::new(read_test(fields, reader)?)),
        _ => return None,
    })
}

/// Returns the mistake in the id of a document; `None` if there is none.
fn id_error(kind: &str, id: &str) -> Option<&'static str> {
    match kind {
        "agent" => spiffe_id_error(id),
        "tool" => tool_name_error(id),
        "server" if id.contains('/') => Some("has a slash: the first slash of a tool's name ends the server's"),
        "server" => tool_name_error(&format!("{id}/x")),
        _ if id == "*" => Some("means every one where it is named: choose another"),
        _ => None,
    }
}

/// Returns the mistake in the name of a tool; `None` if there is none. A name is `server/tool`, visible ASCII without `*`.
pub fn tool_name_error(name: &str) -> Option<&'static str> {
    if name.len() > TOOL_NAME_BYTES_MAX {
        return Some("is longer than 256 bytes");
    }
    if !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'*') {
        return Some("has a `*`, a space or a character outside visible ASCII");
    }
    match name.split_once('/') {
        Some(("portcullis", _)) => Some("belongs to `portcullis`, the server whose tools are calls to this program itself"),
        Some((server, tool)) if !server.is_empty() && !tool.is_empty() => None,
        _ => Some("is not `server/tool`"),
    }
}

fn read_issuer(id: &str, fields: &mut MappingFields<'_>, files: &KeyFiles<'_>, reader: &mut DocumentReader<'_>) -> IssuerSpec {
    let keys = fields.require("keys", reader).map(|node| read_issuer_keys(node, files, reader)).unwrap_or_default();
    let audiences = fields.take("audiences").map(|node| reader.read_strings(node, "audiences")).unwrap_or_default();
    let groups = read_names(fields, "groups", reader, |name| GroupId::from(name));
    let applications = read_names(fields, "applications", reader, |name| ApplicationId::from(name));
    let typ = match fields.take("typ") {
        None => vec![TokenType::Attenuating],
        Some(node) => {
            let types = reader.read_choices(node, "typ", TokenType::ALL, TokenType::as_str);
            if matches!(&node.kind, NodeKind::Sequence(items) if items.is_empty()) {
                reader.report_error(node.at, "`typ` must name a type, or be left out for `aat+jwt`");
            }
            types
        }
    };
    let mut lifetime = |name: &'static str, default: i64| {
        fields.take(name).and_then(|node| reader.read_duration_s(node, &format!("`{name}`"))).unwrap_or(default)
    };
    IssuerSpec {
        id: IssuerUri::from(id),
        lifetime_max_s: lifetime("lifetime_max", ROOT_LIFETIME_S_DEFAULT),
        hop_lifetime_max_s: lifetime("hop_lifetime_max", HOP_LIFETIME_S_DEFAULT),
        keys,
        audiences: audiences.into_iter().map(Arc::from).collect(),
        groups,
        typ,
        applications,
    }
}

/// Reads `{file: PATH}` or `{jwks: {keys: [JWK…]}}`.
fn read_issuer_keys(node: &SourceNode, files: &KeyFiles<'_>, reader: &mut DocumentReader<'_>) -> Vec<NamedKey> {
    let Some(mut fields) = MappingFields::new(node, "`keys`", reader) else {
        return Vec::new();
    };
    let (file, jwks) = (fields.take("file"), fields.take("jwks"));
    fields.reject_unknown_fields(reader);
    let loaded;
    let set = match (file, jwks) {
        (Some(file), None) => {
            let Some(set) = load_jwks(file, files, reader) else {
                return Vec::new();
            };
            loaded = set;
            &loaded
        }
        (None, Some(jwks)) => jwks,
        _ => {
            reader.report_error(node.at, "`keys` must hold either `file` or `jwks`");
            return Vec::new();
        }
    };
    let Some(NodeKind::Sequence(items)) = set.member("keys").map(|keys| &keys.kind) else {
        reader.report_error(set.at, "a JWK Set must be a mapping with `keys`, a list");
        return Vec::new();
    };
    let keys = read_jwks(items, set, reader, NamedKey::from_jwk);
    for (index, key) in keys.iter().enumerate() {
        let same_kid = |other: &NamedKey| other.kid.is_some() && other.kid == key.kid;
        if keys.iter().skip(index + 1).any(|other| same_kid(other) || other.key == key.key) {
            reader.report_error(
                set.at,
                format!("a key stands twice: `{}`", key.kid.as_deref().map_or_else(|| key.key.to_jwk(), abbreviate)),
            );
        }
    }
    keys
}

/// Parses the key file that an issuer's document names.
fn load_jwks(file: &SourceNode, files: &KeyFiles<'_>, reader: &mut DocumentReader<'_>) -> Option<SourceNode> {
    let name = reader.read_text(file, "`file`")?;
    let path = match resolve_relative_path(reader.path, name) {
        Ok(path) => path,
        Err(problem) => {
            reader.report_error(file.at, format!("`{}` {problem}", abbreviate(name)));
            return None;
        }
    };
    let Some(content) = files.0.get(path.as_str()) else {
        reader.report_error(file.at, format!("there is no file `{}` in the policy folder", abbreviate(&path)));
        return None;
    };
    match json::parse(content) {
        Ok(value) => Some(SourceNode::from_json(&value, file.at)),
        Err(error) => {
            reader.report_error(file.at, format!("`{}` is not JSON: {}", abbreviate(&path), abbreviate(&error.to_string())));
            None
        }
    }
}

/// Reads public keys as JWKs, 1 to [`KEYS_MAX`] of them.
fn read_jwks<T>(
    items: &[SourceNode],
    list: &SourceNode,
    reader: &mut DocumentReader<'_>,
    key: fn(&json::JsonObject) -> Result<T, crate::model::jwk::Error>,
) -> Vec<T> {
    if items.is_empty() || items.len() > KEYS_MAX {
        reader.report_error(list.at, format!("there must be 1 to {KEYS_MAX} keys, found {}", items.len()));
    }
    let mut keys = Vec::new();
    for item in items.iter().take(KEYS_MAX) {
        let Value::Object(jwk) = item.to_json() else {
            reader.report_wrong_type(item, "a key must be a JWK, a mapping");
            continue;
        };
        match key(&jwk) {
            Ok(key) => keys.push(key),
            Err(problem) => reader.report_error(item.at, problem.to_string()),
        }
    }
    keys
}

fn read_tool(fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> ToolSpec {
    ToolSpec {
        risk: fields
            .take("risk")
            .and_then(|node| reader.read_choice(node, "risk", ToolRisk::ALL, ToolRisk::as_str))
            .unwrap_or(ToolRisk::Destructive),
        proof: fields.take("proof").and_then(|node| reader.read_choice(node, "proof", ProofClass::ALL, ProofClass::as_str)),
        schema_sha256: fields.take("schema_sha256").and_then(|node| read_sha256(node, reader)),
    }
}

/// Reads 64 hexadecimal digits. They may all be decimal digits, so the reader takes the text even of a number.
fn read_sha256(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Option<[u8; 32]> {
    let digits = match &node.kind {
        NodeKind::Scalar(ScalarNode { text, .. }) if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) => {
            text.as_bytes()
        }
        _ => {
            reader.report_error(node.at, "`schema_sha256` must be 64 hexadecimal digits");
            return None;
        }
    };
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok())?;
    }
    Some(bytes)
}

fn read_server(id: &str, fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> ServerSpec {
    let mut tools = BTreeMap::new();
    let mut places = BTreeMap::new();
    match fields.require("tools", reader).map(|node| (node, node.as_mapping())) {
        Some((_, Some(members))) => {
            for member in members {
                let name = member.name.as_str();
                if let Some(problem) = tool_name_error(&format!("{id}/{name}")).filter(|_| !id.contains('/')) {
                    reader.report_error(member.at, format!("tool `{}` {problem}", abbreviate(name)));
                } else if let Some(mut fields) =
                    MappingFields::new(&member.value, &format!("tool `{}`", abbreviate(name)), reader)
                {
                    let tool = read_tool(&mut fields, reader);
                    fields.reject_unknown_fields(reader);
                    tools.insert(Arc::from(name), tool);
                    places.insert(name, member.at);
                }
            }
        }
        Some((node, None)) => {
            reader.report_wrong_type(node, "`tools` must be a mapping of tool names: `leads.read: {risk: read}`")
        }
        None => {}
    }
    // Both maps are sorted by name, and validation numbers the tools in the same order.
    for (index, at) in places.into_values().enumerate() {
        reader.positions.insert("tools", index, at);
    }
    ServerSpec { id: id.into(), tools }
}

fn read_agent(id: &str, fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> AgentSpec {
    let owner = fields.take("owner").and_then(|node| reader.read_text(node, "`owner`")).map(Arc::from);
    let keys = fields.take("keys").map(|node| read_thumbprints(node, reader)).unwrap_or_default();
    let applications = read_names(fields, "applications", reader, |name| ApplicationId::from(name));
    let acts_for = read_names(fields, "acts_for", reader, |name| GroupId::from(name));
    let delegates_to = fields.take("delegates_to").map(|node| (node, reader.read_strings(node, "delegates_to")));
    if let Some((node, _)) = delegates_to.as_ref().filter(|(_, agents)| agents.iter().any(|agent| agent == "*")) {
        reader.report_error(node.at, "`delegates_to` must name each agent: there is no `*`");
    }
    let (mut session_lifetime_max_s, mut session_hops_max) = (None, None);
    if let Some(mut session) = fields.take("session").and_then(|node| MappingFields::new(node, "`session`", reader)) {
        session_lifetime_max_s = session.take("lifetime_max").and_then(|node| reader.read_duration_s(node, "`lifetime_max`"));
        session_hops_max = session.take("hops_max").and_then(|node| reader.read_number(node, "`hops_max`", DELEGATION_DEPTH_MAX));
        session.reject_unknown_fields(reader);
    }
    AgentSpec {
        id: AgentId::from(id),
        owner,
        keys,
        applications,
        acts_for,
        delegates_to: delegates_to
            .map(|(_, agents)| agents)
            .unwrap_or_default()
            .iter()
            .map(|id| AgentId::from(id.as_str()))
            .collect(),
        session_lifetime_max_s,
        session_hops_max,
        permissions: read_permissions(fields, reader),
    }
}

fn read_guardrail(fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> Option<GuardrailSpec> {
    let tools = fields.require("tools", reader).map(|node| (node, reader.read_strings(node, "tools")));
    if let Some((node, tools)) = &tools {
        if tools.is_empty() {
            reader.report_error(node.at, "`tools` must name what the guardrail guards, `*` for every tool");
        }
        for (index, tool) in tools.iter().enumerate() {
            if let Some(problem) = pattern_error(tool) {
                let at = reader.positions.0.get(&("tools", index)).copied().unwrap_or(node.at);
                reader.report_error(at, format!("tool pattern `{}` {problem}", abbreviate(tool)));
            }
        }
    }
    let forbid_when = fields.require("forbid_when", reader).and_then(|node| {
        reader.positions.insert("forbid_when", 0, node.at);
        read_condition(node, "`forbid_when`", reader)
    });
    let tools = tools.map(|(_, tools)| tools.into_iter().map(Arc::from).collect()).unwrap_or_default();
    Some(GuardrailSpec { tools, forbid_when: forbid_when? })
}

fn read_thumbprints(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Vec<Thumbprint> {
    let texts = reader.read_strings(node, "keys");
    if texts.len() > AGENT_KEYS_MAX {
        reader.report_error(node.at, format!("an agent has at most {AGENT_KEYS_MAX} keys, found {}", texts.len()));
    }
    for (index, text) in texts.iter().enumerate() {
        if !is_thumbprint(text) {
            let at = reader.positions.0.get(&("keys", index)).copied().unwrap_or(node.at);
            let message = format!("`{}` is not a key thumbprint: 43 characters of base64url (RFC 7638)", abbreviate(text));
            reader.report_error(at, message);
        }
    }
    texts.into_iter().map(Thumbprint::new).collect()
}

/// Whether a text is the canonical unpadded base64url of 32 bytes. Its last character encodes only four bits.
fn is_thumbprint(text: &str) -> bool {
    let in_alphabet = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    text.len() == 43 && text.bytes().all(in_alphabet) && text.ends_with(|last| "AEIMQUYcgkosw048".contains(last))
}

fn read_operator(id: &str, fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> OperatorSpec {
    let keys = match fields.require("keys", reader) {
        Some(node) => match &node.kind {
            NodeKind::Sequence(items) => {
                items.iter().enumerate().for_each(|(index, item)| reader.positions.insert("keys", index, item.at));
                read_jwks(items, node, reader, PublicKey::from_jwk)
            }
            _ => {
                reader.report_wrong_type(node, "`keys` must be a list of public JWKs");
                Vec::new()
            }
        },
        None => Vec::new(),
    };
    let roles = fields
        .require("roles", reader)
        .map(|node| reader.read_choices(node, "roles", OperatorRole::ALL, OperatorRole::as_str))
        .unwrap_or_default();
    let groups = fields.take("groups").map(|node| reader.read_strings(node, "groups")).unwrap_or_default();
    let users = fields.take("users").map(|node| read_users(node, reader)).unwrap_or_default();
    OperatorSpec {
        id: OperatorId::from(id),
        keys,
        roles,
        groups: groups.iter().map(|group| GroupId::from(group.as_str())).collect(),
        users,
    }
}

fn read_users(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Vec<UserId> {
    let NodeKind::Sequence(items) = &node.kind else {
        reader.report_wrong_type(node, "`users` must be a list of `{issuer: …, sub: …}`");
        return Vec::new();
    };
    let mut users = Vec::new();
    for item in items {
        let Some(mut fields) = MappingFields::new(item, "a user", reader) else {
            continue;
        };
        let issuer = fields.require("issuer", reader).and_then(|node| reader.read_text(node, "`issuer`"));
        let subject = fields.require("sub", reader).and_then(|node| reader.read_text(node, "`sub`"));
        fields.reject_unknown_fields(reader);
        if let (Some(issuer), Some(subject)) = (issuer, subject) {
            reader.positions.insert("users", users.len(), item.at);
            users.push(UserId::new(issuer, subject));
        }
    }
    users
}

/// Reads a list of names, or `["*"]` for all.
fn read_names<T>(
    fields: &mut MappingFields<'_>,
    field: &'static str,
    reader: &mut DocumentReader<'_>,
    name: fn(&str) -> T,
) -> NameSelection<T> {
    let Some(node) = fields.take(field) else {
        return NameSelection::default();
    };
    if let NodeKind::Scalar(ScalarNode { text, value: ScalarValue::String }) = &node.kind
        && text == "*"
    {
        return NameSelection::All;
    }
    let texts = reader.read_strings(node, field);
    match texts.iter().any(|text| text == "*") {
        true if texts.len() == 1 => NameSelection::All,
        true => {
            reader.report_error(node.at, format!("`*` in `{field}` means all, so nothing else may stand beside it"));
            NameSelection::default()
        }
        false => NameSelection::Listed(texts.iter().map(|text| name(text)).collect()),
    }
}
