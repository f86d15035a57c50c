//! Portcullis: the policy decision point for AI agents.
//!
//! A gateway asks it once per tool call: may *this agent*, acting for *this user*, inside *this application*, in *this session*,
//! call *this tool* with *these arguments*, now? It answers from memory, believes nothing that is merely asserted, and records
//! every decision before it leaves.
//!
//! # The two flows
//!
//! ```text
//! request:  gateway ─▶ api ─▶ service ─▶ token (verify, cached) ─▶ pdp [ revoked? ▸ narrow ▸ decide ] ─▶ Decision
//!                                └─────▶ audit, telemetry
//! control:  command line ─▶ api ─▶ pap ─▶ store ─▶ sync ─▶ snapshot ─▶ (read by service)
//! ```
//!
//! Data goes one way; the flows meet in the snapshot alone. A request never reads the store, save to spend the proof of a
//! destructive call ([`service::ProofLedger`]).
//!
//! # Reading order
//!
//! 1. [`pdp`]: the decision, pure.
//! 2. [`service`]: what surrounds it; the only door to it.
//! 3. [`token`]: how a chain is verified. [`policy`]: what it may. [`revocation`]: what kills it.
//! 4. [`snapshot`], [`sync`], [`store`]: how a replica comes to what it decides by. [`pap`]: how that is changed.
//! 5. [`audit`], [`telemetry`], [`api`], [`server`]: what is kept, what is seen, how it is reached.
//! 6. [`app`]: how all of it is bound. [`cli`] and [`config`]: how it is told what to do.
//!
//! [`model`] is the vocabulary of all of them. Who may import whom is in `docs/ARCHITECTURE.md`, and a test holds it.

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
