//! The integration tests, in one binary: the imports of the layers, the answers on the wire, and the program's behavior from
//! outside.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::print_stdout, clippy::print_stderr, missing_docs)]

mod aat;
mod admin;
mod adoption;
mod agentdojo;
mod approvals;
mod audit_files;
#[path = "../../load-tests/calls.rs"]
mod calls;
mod cli;
mod codegen;
mod crash;
mod decisions;
mod external_suites;
mod fault_cases;
#[path = "../../load-tests/faults/mod.rs"]
mod faults;
#[path = "../../load-tests/fixture.rs"]
#[allow(dead_code, reason = "benches use the rest")]
mod fixture;
mod fleet;
mod fleet_kill;
mod flood;
mod harness;
mod hostile;
mod ledger;
mod operators;
mod policy_tools;
#[path = "../../src/testing/postgres.rs"]
mod postgres;
mod process;
#[path = "../../src/testing/proxy.rs"]
mod proxy;
mod recognition;
mod replicas;
mod store_copies;
mod store_files;
mod tidy;
mod token_vectors;
mod unreachable;
