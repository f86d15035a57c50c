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
