//! The company that load tests and benches use: its policy, its keys, and delegation chains of any length.
//!
//! It resembles the example policy, with agents in a row that each delegate to the next. Its keys come from fixed seeds, so nothing
//! here is secret and every run asks the same.

use anyhow::{Context as _, Result};
use bytes::Bytes;
use portcullis::model::time::ClockReading;
use portcullis::token::{PrivateKey, issue};
use serde_json::{Map, Value, json};

pub(crate) const AUDIENCE: &str = "https://gateway.acme.example";
/// A tool that needs no proof, so that a call measures the chain alone.
pub(crate) const TOOL: &str = "crm/leads.read";
/// A tool that needs a proof for each call.
pub(crate) const PROVED_TOOL: &str = "crm/leads.update";
pub(crate) const ARGUMENTS: &str = r#"{"lead":"L-10023","fields":["name","stage","owner"]}"#;
/// The longest chain that [`CompanyFixture::chain`] makes.
pub(crate) const TOKENS_MAX: usize = 5;

const ISSUER: &str = "https://login.acme.example";
/// The lifetime of a chain.
pub(crate) const LIFE_S: i64 = 3000;

/// The keys of the issuer and of the agents, root to leaf.
pub(crate) struct CompanyFixture {
    issuer: PrivateKey,
    holders: Vec<PrivateKey>,
}

impl CompanyFixture {
    pub(crate) fn new() -> Result<Self> {
        let key = |seed: u8| PrivateKey::from_seed([seed; 32]);
        let holders = (0..TOKENS_MAX).map(|hop| key(u8::try_from(hop + 2).unwrap_or(u8::MAX))).collect::<Result<_, _>>()?;
        Ok(Self { issuer: key(1)?, holders })
    }

    /// The key that signs proofs for a chain of this many tokens.
    pub(crate) fn leaf_key(&self, tokens: usize) -> Result<&PrivateKey> {
        self.holders.get(tokens.saturating_sub(1)).context("the chain is longer than there are agents")
    }

    /// A chain; each number has a session, a user and a task of its own.
    pub(crate) fn chain(&self, number: usize, tokens: usize, now: ClockReading) -> Result<Vec<Bytes>> {
        let exp = now.unix_s() + LIFE_S;
        let mut chain = Vec::new();
        for (hop, holder) in self.holders.iter().take(tokens).enumerate() {
            let mut claims = json!({
                "exp": exp, "del_max_depth": 8, "act": {"iss": ISSUER, "sub": agent_id(hop)}, "cnf": {"jwk": jwk(holder)?},
                "authorization_details": [{"type": "attenuating_agent_token", "tools": scope()}],
            });
            if hop == 0 {
                let identities = json!({
                    "iss": ISSUER, "sub": format!("user-{number}"), "sub_profile": "user", "groups": ["sales"], "aud": AUDIENCE,
                    "client_id": "crm-portal", "sid": session(number), "txn": format!("task-{number}"),
                });
                merge(&mut claims, identities);
                chain.push(issue::issue_root(&self.issuer, &claims.to_string(), now)?.into());
            } else {
                let parent = self.leaf_key(hop)?;
                chain.push(issue::issue_hop(parent, &chain, &claims.to_string(), now)?.into());
            }
        }
        Ok(chain)
    }

    /// The policy as YAML documents, with `more` agents that are never used.
    pub(crate) fn policy(&self, more: usize) -> Result<String> {
        let texts: Vec<String> = self.documents(more)?.iter().map(Value::to_string).collect();
        Ok(texts.join("\n---\n"))
    }

    /// The policy as values, whose text is canonical.
    pub(crate) fn documents(&self, more: usize) -> Result<Vec<Value>> {
        let agents = self.holders.iter().enumerate().map(|(hop, key)| {
            let next = (hop + 1 < self.holders.len()).then(|| agent_id(hop + 1));
            agent(&agent_id(hop), key.public_key().thumbprint().as_str(), next)
        });
        let mut documents = vec![
            json!({"kind": "issuer", "id": ISSUER, "keys": {"jwks": {"keys": [jwk(&self.issuer)?]}}, "audiences": [AUDIENCE],
                   "groups": ["sales"], "applications": ["crm-portal"]}),
            json!({"kind": "application", "id": "crm-portal", "allow": ["crm/*", "proposals/*", "hr/*"]}),
            json!({"kind": "group", "id": "sales", "allow": ["crm/*", "proposals/*", "hr/self.read"]}),
            json!({"kind": "server", "id": "crm", "tools": {
                "leads.read": {"risk": "read", "proof": "none"}, "notes.read": {"risk": "read"}, "leads.update": {"risk": "write"}}}),
            json!({"kind": "server", "id": "proposals", "tools": {
                "draft.create": {"risk": "write"}, "draft.send": {"risk": "destructive"}}}),
            json!({"kind": "server", "id": "hr", "tools": {
                "self.read": {"risk": "read"}, "records.read": {"risk": "read"}, "records.update": {"risk": "destructive"}}}),
        ];
        documents.extend(agents);
        documents.extend((0..more).map(|number| agent(&format!("spiffe://acme.example/fleet/{number}"), "", None)));
        Ok(documents)
    }
}

/// The session of a chain.
pub(crate) fn session(number: usize) -> String {
    format!("session-{number}")
}

pub(crate) fn agent_id(hop: usize) -> String {
    format!("spiffe://acme.example/agent/sales-{hop}")
}

fn agent(id: &str, key: &str, delegates_to: Option<String>) -> Value {
    let mut document = json!({
        "kind": "agent", "id": id, "owner": "platform-team", "applications": ["crm-portal"], "acts_for": ["sales"],
        "allow": ["crm/*", {"proposals/draft.create": {"args": {"discount": {"max": 15}}}}], "deny": ["hr/*"],
    });
    if !key.is_empty() {
        merge(&mut document, json!({"keys": [key]}));
    }
    if let Some(next) = delegates_to {
        merge(&mut document, json!({"delegates_to": [next]}));
    }
    document
}

fn scope() -> Value {
    json!({
        TOOL: {}, PROVED_TOOL: {}, "crm/notes.read": {},
        "proposals/draft.create": {"discount": {"constraint_type": "range", "min": 0, "max": 10}, "*": {"constraint_type": "wildcard"}},
    })
}

fn jwk(key: &PrivateKey) -> Result<Value> {
    Ok(serde_json::from_str(&key.public_key().to_jwk())?)
}

pub(crate) fn merge(into: &mut Value, more: Value) {
    if let (Some(into), Value::Object(more)) = (into.as_object_mut(), more) {
        into.extend::<Map<String, Value>>(more);
    }
}
