//! Portcullis: the policy decision point for AI agents.

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
