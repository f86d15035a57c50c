//! Portcullis: the policy decision point for AI agents.
//!
//! A gateway asks one question for each tool call: may *this agent*, acting for *this user*, inside *this application*, in *this
//! session*, call *this tool* with *these arguments*, now? Portcullis answers from memory. It trusts no claim that is merely
//! asserted, and it records every decision before the answer leaves.
//!
//! # The two flows
//!
//! ```text
//! request:  gateway ─▶ api ─▶ service ─▶ token (verify, cached) ─▶ pdp [ revoked? ▸ narrow ▸ decide ] ─▶ Decision
//!                                └─────▶ audit, telemetry
//! control:  command line ─▶ api ─▶ pap ─▶ store ─▶ sync ─▶ snapshot ─▶ (read by service)
//! ```
//!
//! Data flows one way, and the two flows meet only in the snapshot. A request never reads the store. It writes there only to spend
//! the proof of a destructive call ([`service::ProofLedger`]) and to request or use an approval ([`service::ApprovalLedger`]).
//!
//! # Reading order
//!
//! 1. [`pdp`]: the decision, a pure function.
//! 2. [`service`]: verification, records and metrics around the decision; the only caller of `pdp`.
//! 3. [`token`]: verifies a chain. [`policy`]: what a chain may do. [`revocation`]: what revokes it.
//! 4. [`snapshot`], [`sync`], [`store`]: how a replica gets the state that decides. [`pap`]: how that state is changed.
//! 5. [`audit`], [`telemetry`], [`api`], [`server`]: records, metrics, the wire, the listeners.
//! 6. [`app`]: connects all of these. [`cli`] and [`config`]: commands and settings.
//!
//! # One decision
//!
//! This example makes one decision without a server. A policy says what the parts may do, an issuer signs who delegates what to whom,
//! and [`pdp::decide`] combines both. A server does the same for each call, with the snapshot that [`sync`] keeps current.
//!
//! ```
//! use std::sync::Arc;
//!
//! use portcullis::model::decision::Effect;
//! use portcullis::model::json::parse_object;
//! use portcullis::model::request::ToolCall;
//! use portcullis::model::revision::{HistoryId, Revision, StateDigest};
//! use portcullis::model::rows::DocumentOrigin;
//! use portcullis::model::time::{Clock, SystemClock};
//! use portcullis::pdp::{PreparedChain, decide};
//! use portcullis::policy::source::{SourceFile, parse_files};
//! use portcullis::revocation::RevocationIndex;
//! use portcullis::snapshot::{FullState, SnapshotBuilder};
//! use portcullis::token::{PrivateKey, VerificationOptions, issue, verify};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The issuer's key signs roots. The agent's key is the one that the root names.
//! let (issuer, agent) = (PrivateKey::from_seed([1; 32])?, PrivateKey::from_seed([2; 32])?);
//!
//! // Policy: whom to trust, what exists, and what each part may do at most.
//! let policy = format!(
//!     r#"
//! kind: issuer
//! id: https://login.example
//! keys: {{jwks: {{keys: [{}]}}}}
//! audiences: [https://gateway.example]
//! groups: [sales]
//! applications: [portal]
//! ---
//! {{kind: server, id: crm, tools: {{leads.read: {{risk: read}}, leads.delete: {{risk: destructive}}}}}}
//! ---
//! {{kind: application, id: portal, allow: ["crm/*"]}}
//! ---
//! {{kind: group, id: sales, allow: ["crm/*"]}}
//! ---
//! {{kind: agent, id: "spiffe://example/assistant", owner: team, applications: [portal], acts_for: [sales], keys: [{}], allow: [crm/leads.read]}}
//! "#,
//!     issuer.public_key().to_jwk(),
//!     agent.public_key().thumbprint().as_str(),
//! );
//! let parsed = parse_files(&[SourceFile { path: "policy.yaml".into(), content: policy.into_bytes() }]);
//! assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
//!
//! // A snapshot: the policy, the trust and the revocations of one revision. A server follows a store to get it.
//! let snapshot = SnapshotBuilder::new(Arc::new(RevocationIndex::new())).replace_all(FullState {
//!     revision: Revision { history: HistoryId::new("00000000-0000-7000-8000-000000000000"), number: 1 },
//!     digest: StateDigest::default(),
//!     iat_skew_s: 30,
//!     freshness_bound_ms: 5_000,
//!     documents: parsed.documents.iter().map(|document| document.to_row(DocumentOrigin::Folder)).collect(),
//!     revocations: Vec::new(),
//! })?;
//!
//! // Ana, in the portal, lets the assistant read leads and delete them.
//! let now = SystemClock.now();
//! let claims = format!(
//!     r#"{{"iss": "https://login.example", "sub": "ana", "sub_profile": "user", "groups": ["sales"],
//!         "aud": "https://gateway.example", "client_id": "portal", "sid": "session-1", "txn": "task-1", "exp": {},
//!         "del_max_depth": 3, "act": {{"iss": "https://login.example", "sub": "spiffe://example/assistant"}},
//!         "cnf": {{"jwk": {}}}, "authorization_details": [
//!             {{"type": "attenuating_agent_token", "tools": {{"crm/leads.read": {{}}, "crm/leads.delete": {{}}}}}}]}}"#,
//!     now.unix_s() + 600,
//!     agent.public_key().to_jwk(),
//! );
//! let root = issue::issue_root(&issuer, &claims, now)?;
//!
//! // The gateway presents the chain. Only a verified chain can be prepared and decided.
//! let chain = verify(&[root.into()], snapshot.trust(), &VerificationOptions::default(), now)?;
//! let prepared = PreparedChain::new(Arc::new(chain), &snapshot).ok_or("the chain names nobody")?;
//! let arguments = parse_object(br#"{"id": 7}"#)?;
//! let ask = |tool| decide(&prepared, &ToolCall::new(tool, &arguments), &snapshot, now);
//!
//! assert_eq!(ask("crm/leads.read").effect, Effect::Permit);
//! // User, application and chain allow it. The agent's own document does not.
//! let denied = ask("crm/leads.delete");
//! assert_eq!((denied.effect, denied.reason.as_str()), (Effect::Deny, "AGENT_DENIES"));
//! # Ok(())
//! # }
//! ```
//!
//! [`model`] holds the types that all of them share. `docs/ARCHITECTURE.md` says which module may import which; a test enforces it.

pub mod api;
pub mod app;
pub mod audit;
pub mod cli;
pub mod config;
pub mod model;
pub mod pap;
pub mod pdp;
pub mod policy;
pub mod revocation;
pub mod server;
pub mod service;
pub mod snapshot;
pub mod store;
pub mod sync;
pub mod telemetry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod token;
