//! The company of the demo: the example policy with fresh keys, and the chains that its agents present.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::cli::CommandFailure;
use crate::model::jwk::NamedKey;
use crate::model::rows::DocumentOrigin;
use crate::model::time::{Clock as _, ClockReading, SystemClock};
use crate::policy::document::{Document, DocumentBody};
use crate::policy::source::{SourceFile, parse_files};
use crate::token::{PrivateKey, issue};

/// The four agents of the examples, with their users and tools. The keys are inserted here.
const POLICY: &[(&str, &str)] = &[
    ("agents.yaml", include_str!("../../../examples/policies/four-agents/agents.yaml")),
    ("identities.yaml", include_str!("../../../examples/policies/four-agents/identities.yaml")),
    ("tools.yaml", include_str!("../../../examples/policies/four-agents/tools.yaml")),
];

pub(super) const ISSUER: &str = "https://login.acme.example";
pub(super) const AUDIENCE: &str = "https://gateway.acme.example";

/// A temporary folder, removed on drop.
pub(super) struct TempFolder(PathBuf);

impl TempFolder {
    pub(super) fn new() -> Result<Self, CommandFailure> {
        let path = std::env::temp_dir().join(format!("portcullis-demo-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&path).map_err(|error| {
            CommandFailure::failed(format!("a temporary folder `{}` cannot be made: {error}", path.display()))
        })?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        // If the removal fails, the folder stays in the system's temporary folder; nothing trusts the keys in it any more.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The keys of the issuer and of every agent in the demo.
pub(super) struct DemoCompany {
    issuer: PrivateKey,
    agents: HashMap<String, PrivateKey>,
}

/// A chain, and the key that holds its leaf.
#[derive(Clone)]
pub(super) struct DemoChain<'a> {
    pub(super) tokens: Vec<Bytes>,
    pub(super) holder: &'a PrivateKey,
}

/// The content of a root: the user, the application, the agent and the tools.
pub(super) struct RootContent<'a> {
    pub(super) user: &'a str,
    pub(super) group: &'a str,
    pub(super) application: &'a str,
    pub(super) agent: &'a str,
    pub(super) session: &'a str,
    pub(super) tools: &'a [&'a str],
}

impl DemoCompany {
    /// Creates the keys and writes a policy that trusts them into a folder.
    pub(super) fn create(folder: &Path) -> Result<Self, CommandFailure> {
        let files: Vec<SourceFile> = POLICY
            .iter()
            .map(|(path, text)| SourceFile { path: (*path).to_owned(), content: text.as_bytes().to_vec() })
            .collect();
        let mut company = Self { issuer: new_key()?, agents: HashMap::new() };
        let mut text = String::new();
        for mut document in parse_files(&files).documents {
            company.put_keys(&mut document)?;
            text.push_str(&document.to_row(DocumentOrigin::Folder).json);
            text.push_str("\n---\n");
        }
        std::fs::create_dir(folder)
            .and_then(|()| std::fs::write(folder.join("policy.yaml"), text))
            .map_err(|error| CommandFailure::failed(format!("the demo's policy cannot be written: {error}")))?;
        Ok(company)
    }

    fn put_keys(&mut self, document: &mut Document) -> Result<(), CommandFailure> {
        match &mut document.body {
            DocumentBody::Issuer(issuer) => {
                issuer.keys = vec![NamedKey { key: self.issuer.public_key().clone(), kid: Some("demo".to_owned()) }];
            }
            DocumentBody::Agent(agent) => {
                let key = new_key()?;
                agent.keys = vec![key.public_key().thumbprint().clone()];
                self.agents.insert(agent.id.to_string(), key);
            }
            _ => {}
        }
        Ok(())
    }

    /// The key of an agent, by the last part of its name.
    pub(super) fn agent(&self, name: &str) -> Result<&PrivateKey, CommandFailure> {
        let key = self.agents.get(&agent_id(name));
        key.ok_or_else(|| CommandFailure::failed(format!("the example policy has no agent `{name}`")))
    }

    /// A root that the trusted issuer signed.
    pub(super) fn root(&self, root: &RootContent<'_>, now: ClockReading) -> Result<DemoChain<'_>, CommandFailure> {
        self.root_signed_by(&self.issuer, root, now)
    }

    /// A root that names the trusted issuer, signed with any key.
    pub(super) fn root_signed_by(
        &self,
        signer: &PrivateKey,
        root: &RootContent<'_>,
        now: ClockReading,
    ) -> Result<DemoChain<'_>, CommandFailure> {
        let holder = self.agent(root.agent)?;
        let tools: serde_json::Map<String, Value> = root.tools.iter().map(|tool| ((*tool).to_owned(), json!({}))).collect();
        let claims = json!({
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": root.user,
            "sub_profile": "user",
            "groups": [root.group],
            "client_id": root.application,
            "act": { "iss": ISSUER, "sub": agent_id(root.agent) },
            "sid": root.session,
            "txn": format!("task-of-{}", root.session),
            "exp": now.unix_s() + 3600,
            "cnf": { "jwk": jwk(holder)? },
            "del_max_depth": 2,
            "authorization_details": [{ "type": "attenuating_agent_token", "tools": tools }],
        });
        let jws = issue::issue_root(signer, &claims.to_string(), now).map_err(CommandFailure::failed)?;
        Ok(DemoChain { tokens: vec![jws.into()], holder })
    }

    /// A hop that narrows a chain for another agent.
    pub(super) fn hop(
        &self,
        parent: &DemoChain<'_>,
        agent: &str,
        tools: &Value,
        now: ClockReading,
    ) -> Result<DemoChain<'_>, CommandFailure> {
        let holder = self.agent(agent)?;
        let claims = json!({
            "act": { "iss": ISSUER, "sub": agent_id(agent) },
            "exp": now.unix_s() + 1800,
            "cnf": { "jwk": jwk(holder)? },
            "del_max_depth": 2,
            "authorization_details": [{ "type": "attenuating_agent_token", "tools": tools }],
        });
        let jws = issue::issue_hop(parent.holder, &parent.tokens, &claims.to_string(), now).map_err(CommandFailure::failed)?;
        let tokens = parent.tokens.iter().cloned().chain([jws.into()]).collect();
        Ok(DemoChain { tokens, holder })
    }
}

/// An agent's SPIFFE ID.
pub(super) fn agent_id(name: &str) -> String {
    format!("spiffe://acme.example/agent/{name}")
}

/// A new key pair.
pub(super) fn new_key() -> Result<PrivateKey, CommandFailure> {
    PrivateKey::generate().map_err(CommandFailure::failed)
}

/// The current time, as a gateway reads it.
pub(super) fn now() -> ClockReading {
    SystemClock.now()
}

fn jwk(key: &PrivateKey) -> Result<Value, CommandFailure> {
    serde_json::from_str(&key.public_key().to_jwk()).map_err(CommandFailure::failed)
}
