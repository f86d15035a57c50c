//! The delegation chain: token format, verification, proof of possession, trust, and issuing of tokens.
//!
//! This module reads untrusted bytes. It returns either a [`Rejection`], which says what is wrong, or a [`VerifiedChain`], which only this
//! module can construct. Formats follow draft-niyikiza-oauth-attenuating-agent-tokens-02 (JWS, Ed25519).
//!
//! It makes no decision and has no policy, no revocation, no memory of used proofs, no cache, no clock and no I/O. Reading order:
//! [`verify()`] with the checks in their order, [`trust`], [`verify_proof`], then [`issue`] and [`operator_act`].

pub mod issue;
pub mod operator_act;
pub mod trust;

mod chain;
mod claims;
mod description;
mod identity;
mod jws;
mod presentation;
mod private_key;
mod proof;
mod unverified;
mod verify;

#[cfg(test)]
mod tests;

use std::fmt;

use crate::model::limits;
use crate::model::reason::Reason;

pub use chain::{VerifiedChain, VerifiedToken};
pub use presentation::{PRESENTATION_BYTES_MAX, Presentation};
pub use private_key::{PrivateKey, PrivateKeyError};
pub use proof::{ProofCall, SignedProof, VerifiedProof, read_proof, verify_proof};
pub use unverified::{UnverifiedChain, UnverifiedToken};
pub use verify::{verify, verify_with_known};

/// `typ` of each token of a chain.
pub const TOKEN_TYPE: &str = "aat+jwt";
/// `typ` of a proof of possession.
pub const PROOF_TYPE: &str = "aat-pop+jwt";
/// The only accepted algorithm, by its fully specified name (RFC 9864). The polymorphic `EdDSA` is refused.
pub const ALGORITHM: &str = "Ed25519";
/// Prefix of the thumbprint in a hop's `iss` (RFC 9278).
pub const THUMBPRINT_URN_PREFIX: &str = "urn:ietf:params:oauth:jwk-thumbprint:sha-256:";

/// The reason why a credential is refused. A rejection leads to a denial and is not an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The stable reason code.
    pub reason: Reason,
    /// Index of the token at fault, root 0; `None` if no single token is at fault.
    pub hop: Option<usize>,
    /// One line: the fault, its location, and the remedy.
    pub message: String,
}

impl Rejection {
    /// A rejection for which no single token is at fault.
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, hop: None, message: message.into() }
    }

    /// Sets the token at fault.
    pub(crate) fn at_hop(mut self, hop: usize) -> Self {
        self.hop = Some(hop);
        self
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.hop {
            Some(hop) => write!(f, "{}: token {hop}: {}", self.reason, self.message),
            None => write!(f, "{}: {}", self.reason, self.message),
        }
    }
}

impl std::error::Error for Rejection {}

/// Whether agents must be registered with their keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RegistryMode {
    /// Each token's `act.sub` must be the agent that the holder key is registered for, and the root must carry all identities.
    #[default]
    Required,
    /// Neither of the two is required; every other rule still applies. For conformance runs: such a chain has no subject and cannot be
    /// decided.
    Off,
}

/// The requirements of a verifier. The defaults are the strictest ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerificationOptions {
    /// Whether agents must be registered.
    pub registry: RegistryMode,
    /// Whether the root must carry `aud`.
    pub require_chain_audience: bool,
    /// Whether a proof must carry `aat_aud`.
    pub require_proof_audience: bool,
    /// The `nonce` that a proof must carry; `None` if none is required.
    pub nonce: Option<String>,
    /// How far in the future an `iat` may lie, by our clock.
    pub iat_skew_s: i64,
    /// How far a proof's `iat` may differ from our clock, in both directions.
    pub proof_window_s: i64,
    /// Maximum size of one token.
    pub token_bytes_max: usize,
    /// Maximum size of all tokens of a chain together.
    pub chain_bytes_max: usize,
    /// Maximum size of a proof.
    pub proof_bytes_max: usize,
    /// Maximum `del_depth` and `del_max_depth`. A chain has at most one token more.
    pub delegation_depth_max: u64,
}

impl Default for VerificationOptions {
    fn default() -> Self {
        Self {
            registry: RegistryMode::Required,
            require_chain_audience: true,
            require_proof_audience: true,
            nonce: None,
            iat_skew_s: limits::IAT_SKEW_S,
            proof_window_s: limits::PROOF_WINDOW_S,
            token_bytes_max: limits::TOKEN_BYTES_MAX,
            chain_bytes_max: limits::CHAIN_BYTES_MAX,
            proof_bytes_max: limits::PROOF_BYTES_MAX,
            delegation_depth_max: limits::DELEGATION_DEPTH_MAX,
        }
    }
}
