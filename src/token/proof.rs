//! Proof of possession: a signature of the leaf's holder over one call.
//!
//! This module checks that a proof fits a chain and a call. It does not know whether the proof was used before: the caller must remember
//! [`VerifiedProof::replay_key`] for the length of the proof window. Every fault of a proof has a reason that begins with `PROOF_`.

use std::sync::Arc;

use super::chain::{VerifiedChain, VerifiedToken};
use super::claims::{check_dates, optional_text, read_not_before};
use super::jws::{Jws, sha256};
use super::{PROOF_TYPE, Rejection, VerificationOptions};
use crate::model::constraint::abbreviate;
use crate::model::json::{JsonObject, Value};
use crate::model::reason::Reason;
use crate::model::time::ClockReading;

/// The call that a proof must cover.
#[derive(Clone, Copy, Debug)]
pub struct ProofCall<'a> {
    /// `server/tool`.
    pub tool: &'a str,
    /// The call's arguments. They are compared in canonical form.
    pub arguments: &'a JsonObject,
    /// The audience that the caller claims and may claim.
    pub audience: Option<&'a str>,
}

/// A proof that fits its chain and call. Only [`verify_proof`] and [`SignedProof::verify_call`] construct it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedProof {
    jti: Arc<str>,
    iat_s: i64,
    replay_key: [u8; 32],
}

impl VerifiedProof {
    /// The proof's `jti`.
    pub fn jti(&self) -> &str {
        &self.jti
    }

    /// `iat` in seconds since the Unix epoch.
    pub fn iat_s(&self) -> i64 {
        self.iat_s
    }

    /// Identifies the proof: SHA-256 over the hash of the leaf and the proof's `jti`. Two proofs with the same key are the same proof.
    pub fn replay_key(&self) -> [u8; 32] {
        self.replay_key
    }
}

/// A proof whose signature by the leaf's holder is verified, but not its call and its time. Only [`read_proof`] constructs it.
///
/// Anyone who has seen the bytes of a proof can present them again. So a replay table must remember this proof even if its call is denied.
#[derive(Debug)]
pub struct SignedProof<'a> {
    leaf: &'a VerifiedToken,
    claims: JsonObject,
}

/// Reads a proof and verifies its signature, at the cost of about one Ed25519 verification. An empty proof counts as missing.
///
/// # Errors
/// [`Reason::ProofMissing`], or [`Reason::ProofInvalid`] if the leaf's holder did not sign it as a proof.
pub fn read_proof<'a>(
    chain: &'a VerifiedChain,
    proof: &[u8],
    options: &VerificationOptions,
) -> Result<SignedProof<'a>, Rejection> {
    if proof.is_empty() {
        return Err(Rejection::new(Reason::ProofMissing, "the call needs a proof of possession and has none"));
    }
    if proof.len() > options.proof_bytes_max {
        return Err(invalid_proof(format!("{} bytes: a proof has at most {}", proof.len(), options.proof_bytes_max)));
    }
    let leaf = chain.leaf().ok_or_else(|| invalid_proof("the chain has no leaf"))?;
    let proof = Jws::parse(proof).map_err(proof_rejection)?;
    check_dates(&proof.claims).map_err(proof_rejection)?;
    proof.check_header(|typ| typ == PROOF_TYPE).map_err(proof_rejection)?;
    if !proof.is_signed_by(&leaf.holder) {
        return Err(invalid_proof("the signature is not of the key that holds the leaf"));
    }
    Ok(SignedProof { leaf, claims: proof.claims })
}

impl SignedProof<'_> {
    /// Returns the [`VerifiedProof::replay_key`] under which to remember the proof; `None` if the proof is outside its window.
    ///
    /// An expired proof can never be used again, so it need not be remembered. A proof that is dated further ahead than the window cannot
    /// be remembered for long enough.
    pub fn replay_key(&self, options: &VerificationOptions, now: ClockReading) -> Option<[u8; 32]> {
        self.check_window(options, now).ok()?;
        self.jti().ok().map(|jti| replay_key(self.leaf, jti))
    }

    /// Verifies that the proof covers this call and is valid at `now`.
    ///
    /// # Errors
    /// [`Reason::ProofStale`] if `now` is outside the window or before `nbf`; [`Reason::ProofInvalid`] for every other fault.
    pub fn verify_call(
        &self,
        expected: &ProofCall<'_>,
        options: &VerificationOptions,
        now: ClockReading,
    ) -> Result<VerifiedProof, Rejection> {
        check_call(&self.claims, self.leaf, expected, options)?;
        let iat_s = self.check_window(options, now)?;
        if let Some(nbf_s) = read_not_before(&self.claims).map_err(proof_rejection)?
            && nbf_s > now.unix_s().saturating_add(options.iat_skew_s)
        {
            let message = format!("`nbf` {nbf_s} is more than {} s ahead of {}", options.iat_skew_s, now.unix_s());
            return Err(Rejection::new(Reason::ProofStale, message));
        }
        let nonce = self.claims.member("nonce").and_then(Value::as_str);
        if options.nonce.is_some() && options.nonce.as_deref() != nonce {
            return Err(invalid_proof("`nonce` is not the one that was asked for"));
        }
        let jti = self.jti()?;
        Ok(VerifiedProof { jti: jti.into(), iat_s, replay_key: replay_key(self.leaf, jti) })
    }

    /// Returns `iat` if it lies within the window.
    fn check_window(&self, options: &VerificationOptions, now: ClockReading) -> Result<i64, Rejection> {
        let iat_s = self.claims.member("iat").and_then(Value::as_i64).ok_or_else(|| invalid_proof("`iat` is missing"))?;
        if iat_s.abs_diff(now.unix_s()) > options.proof_window_s.max(0).unsigned_abs() {
            let message = format!("`iat` {iat_s} is more than {} s from {}", options.proof_window_s, now.unix_s());
            return Err(Rejection::new(Reason::ProofStale, message));
        }
        Ok(iat_s)
    }

    fn jti(&self) -> Result<&str, Rejection> {
        optional_text(&self.claims, "jti").map_err(proof_rejection)?.ok_or_else(|| invalid_proof("`jti` is missing or empty"))
    }
}

/// Verifies a proof of possession: [`read_proof`], then [`SignedProof::verify_call`].
///
/// # Errors
/// The errors of both functions.
pub fn verify_proof(
    chain: &VerifiedChain,
    proof: &[u8],
    expected: &ProofCall<'_>,
    options: &VerificationOptions,
    now: ClockReading,
) -> Result<VerifiedProof, Rejection> {
    read_proof(chain, proof, options)?.verify_call(expected, options, now)
}

fn replay_key(leaf: &VerifiedToken, jti: &str) -> [u8; 32] {
    sha256(&[leaf.signing_input_sha256.as_slice(), jti.as_bytes()].concat())
}

/// Checks that the proof names this leaf, this audience and this call.
fn check_call(
    claims: &JsonObject,
    leaf: &VerifiedToken,
    expected: &ProofCall<'_>,
    options: &VerificationOptions,
) -> Result<(), Rejection> {
    let text = |name| claims.member(name).and_then(Value::as_str);
    if text("aat_id") != Some(&*leaf.jti) || text("aat_hash") != Some(leaf.hop_hash().as_str()) {
        return Err(invalid_proof("`aat_id` and `aat_hash` are not those of the chain's leaf"));
    }
    match (claims.member("aat_aud"), expected.audience) {
        (None, _) if options.require_proof_audience => return Err(invalid_proof("`aat_aud` is missing")),
        (None, _) => {}
        (Some(named), Some(claimed)) if named.as_str() == Some(claimed) => {}
        (Some(_), Some(claimed)) => return Err(invalid_proof(format!("`aat_aud` is not `{}`", abbreviate(claimed)))),
        (Some(_), None) => return Err(invalid_proof("the proof names an audience and nobody here claims it")),
    }
    if text("aat_tool") != Some(expected.tool) {
        return Err(invalid_proof(format!("`aat_tool` is not `{}`", abbreviate(expected.tool))));
    }
    match claims.member("hta") {
        Some(hta @ Value::Object(signed))
            if hta.is_comparable() && canonical_json(signed) == canonical_json(expected.arguments) =>
        {
            Ok(())
        }
        _ => Err(invalid_proof("`hta` is not the call's arguments")),
    }
}

/// Each object is sorted once. Comparing member by member would take quadratic time, and arguments may have thousands of members.
fn canonical_json(object: &JsonObject) -> String {
    let mut text = String::new();
    object.write_jcs(&mut text);
    text
}

fn invalid_proof(message: impl Into<String>) -> Rejection {
    Rejection::new(Reason::ProofInvalid, message)
}

fn proof_rejection(refused: Rejection) -> Rejection {
    invalid_proof(refused.message)
}
