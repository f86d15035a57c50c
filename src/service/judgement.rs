//! Judges one call by one view, in the order of verification: credential, audience, arguments, proof, decision. Does not await.
//!
//! A judgement spends no proof and uses no approval. `service/ledger_task.rs` does that afterwards. Look next at `pdp.rs`, which decides.

use std::sync::Arc;

use bytes::Bytes;

use super::PdpService;
use super::chain_cache::{CachedChain, audit_fragment};
use super::replay_cache::ProofPresentation;
use super::request::{AgentCredential, ApprovalRequest, Caller, ChainIdentities, DecisionRequest};
use crate::model::decision::{Decision, Effect};
use crate::model::json::{self, JsonObject};
use crate::model::limits::ARGUMENTS_BYTES_MAX;
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::ToolCall;
use crate::model::time::ClockReading;
use crate::pdp::{self, PreparedChain};
use crate::snapshot::{Snapshot, SnapshotView};
use crate::token::{self, ProofCall, Rejection, SignedProof, VerificationOptions, VerifiedProof};

/// The judgement of a call, with the facts that its audit record needs.
#[derive(Debug)]
pub(super) struct Judgement {
    pub(super) decision: Decision,
    /// A message for the caller, if the standard message of the reason says too little.
    pub(super) message: Option<String>,
    pub(super) chain: Option<Arc<CachedChain>>,
    pub(super) arguments: Option<JsonObject>,
    /// The `jti` of the call's proof, if the proof verified.
    pub(super) proof_jti: Option<String>,
    /// The call's proof, if it may be used only once.
    pub(super) single_use_proof: Option<VerifiedProof>,
    /// Whether the call's proof was presented before; `None` if the call has no proof that the holder of the chain signed.
    pub(super) proof_presentation: Option<ProofPresentation>,
    /// Whether the answer repeats an earlier answer to the same request.
    pub(super) is_repeat: bool,
    pub(super) is_destructive: bool,
    /// Whether the handle in the request was issued for a proof of possession.
    pub(super) handle_is_proved: bool,
    /// Whether the chain cache held the chain; `None` if no chain was looked up.
    pub(super) cache_hit: Option<bool>,
    /// The decision id in the store, if the call used an approval.
    pub(super) decision_id: Option<String>,
    /// The stored approval request, if the call asks for an approval.
    pub(super) approval: Option<ApprovalRequest>,
    /// The digest of the approval that was requested or used, for the audit record.
    pub(super) approval_digest: Option<String>,
    /// The generation of the revocation index, read before the judgement began.
    pub(super) revocation_generation: u64,
}

impl Judgement {
    pub(super) fn from_denial(decision: Decision) -> Self {
        Self {
            decision,
            message: None,
            chain: None,
            arguments: None,
            proof_jti: None,
            single_use_proof: None,
            proof_presentation: None,
            is_repeat: false,
            is_destructive: true,
            handle_is_proved: false,
            cache_hit: None,
            decision_id: None,
            approval: None,
            approval_digest: None,
            revocation_generation: 0,
        }
    }

    /// Whether the call must ask for an approval or use one.
    pub(super) fn needs_approval(&self) -> bool {
        self.decision.effect == Effect::NeedsApproval || !self.decision.prepared_needs.is_empty()
    }

    /// Whether the call must use a ledger of the store: to spend its proof, or to ask for or use an approval.
    pub(super) fn needs_ledger(&self) -> bool {
        self.needs_approval() || self.is_destructive && self.single_use_proof.is_some()
    }

    /// Whether a new handle for this call counts as proved; `None` if the call gets no handle.
    ///
    /// INVARIANT: a handle is proved only by a proof that this very call spent and that no earlier call presented. So a person
    /// who overhears a proof cannot get a proved handle with it.
    pub(super) fn proves_new_handle(&self) -> Option<bool> {
        match self.proof_presentation {
            _ if self.is_repeat => None,
            None => Some(false),
            Some(ProofPresentation::First) => Some(true),
            Some(ProofPresentation::Repeated | ProofPresentation::Unknown) => None,
        }
    }

    /// Whether the caller proved that it holds a chain in force: by a proved handle, or by a proof of this call that no call presented
    /// before. The holder of a revoked chain proves nothing any more.
    pub(super) fn proves_possession(&self) -> bool {
        let by_proof = self.proof_jti.is_some()
            && self.proof_presentation == Some(ProofPresentation::First)
            && self.decision.reason != Reason::ProofReplayed;
        (self.handle_is_proved || by_proof) && !revokes_chain(&self.decision)
    }

    /// Whether the call used a chain in force that its caller proved to hold. A denied call counts as no such use, whatever its reason.
    pub(super) fn uses_chain_in_force(&self) -> bool {
        self.proves_possession() && self.decision.effect != Effect::Deny
    }

    fn with_rejection(mut self, rejection: Rejection, number: u64) -> Self {
        self.decision = Decision::deny(rejection.reason, number).with_hop(rejection.hop);
        self.message = Some(rejection.message);
        self
    }
}

/// A verified credential, and how it was found.
pub(super) struct VerifiedCredential {
    pub(super) chain: Arc<CachedChain>,
    pub(super) proved: bool,
    cache_hit: bool,
}

/// Converts a request to the call that `pdp` decides.
pub(super) fn pdp_call<'a>(request: &'a DecisionRequest, arguments: &'a JsonObject, now: ClockReading) -> ToolCall<'a> {
    ToolCall {
        tool: &request.tool,
        tool_schema_sha256: request.tool_schema_sha256,
        arguments,
        environment: request.environment.as_ref(),
        unix_s: now.unix_s(),
    }
}

impl PdpService {
    /// Judges a call. A permit that it returns has not spent its proof yet.
    pub(super) fn judge_call(
        &self,
        request: &DecisionRequest,
        caller: &Caller,
        view: &SnapshotView,
        now: ClockReading,
    ) -> Judgement {
        let snapshot = &*view.snapshot;
        let number = snapshot.revision().number;
        let mut judgement = Judgement::from_denial(Decision::deny(Reason::TokenMalformed, number));
        judgement.revocation_generation = snapshot.revocations().generation();
        let options = self.verifier_options(snapshot);
        let verified = match self.verify_credential(&request.credential, caller, snapshot, &options, now) {
            Ok(verified) => verified,
            Err(rejection) => return judgement.with_rejection(rejection, number),
        };
        judgement.cache_hit = Some(verified.cache_hit);
        judgement.handle_is_proved = verified.proved;
        let signed_proof = self.present_proof(request.proof.as_deref(), &verified.chain.prepared, &options, now);
        judgement.proof_presentation = signed_proof.as_ref().and_then(|read| read.as_ref().ok()?.1);
        let signed_proof = signed_proof.map(|read| read.map(|(proof, _)| proof));
        let judgement = self.judge_verified(judgement, (&verified.chain, signed_proof), request, caller, view, now);
        // Cache the chain only if the caller proved possession or the call is not denied, because the holder of a chain can
        // easily make many more.
        if !verified.cache_hit && (judgement.proof_jti.is_some() || judgement.decision.effect != Effect::Deny) {
            self.chain_cache.insert(verified.chain);
        }
        judgement
    }

    /// Judges a call again by a view that may be newer. The credential was verified before.
    pub(super) fn rejudge(
        &self,
        previous: &Judgement,
        request: &DecisionRequest,
        caller: &Caller,
        view: &SnapshotView,
        now: ClockReading,
    ) -> Judgement {
        let snapshot = &*view.snapshot;
        let number = snapshot.revision().number;
        let mut judgement = Judgement::from_denial(Decision::deny(Reason::TokenMalformed, number));
        judgement.revocation_generation = snapshot.revocations().generation();
        (judgement.cache_hit, judgement.handle_is_proved) = (previous.cache_hit, previous.handle_is_proved);
        // The proof was presented once, however often the call is judged.
        (judgement.proof_presentation, judgement.is_repeat) = (previous.proof_presentation, previous.is_repeat);
        // A judgement that is no denial has a chain.
        let Some(cached_chain) = &previous.chain else { return judgement };
        let options = self.verifier_options(snapshot);
        match self.refresh_chain(cached_chain, snapshot, &options, now) {
            Ok(chain) => {
                let read_proof = |proof: &Bytes| token::read_proof(chain.prepared.chain(), proof, &options);
                let signed_proof = request.proof.as_ref().map(read_proof);
                self.judge_verified(judgement, (&chain, signed_proof), request, caller, view, now)
            }
            Err(rejection) => {
                judgement.chain = Some(cached_chain.clone());
                judgement.with_rejection(rejection, number)
            }
        }
    }

    /// Judges the steps after the credential: audience, arguments, proof, decision.
    fn judge_verified(
        &self,
        mut judgement: Judgement,
        (cached_chain, signed_proof): (&Arc<CachedChain>, Option<Result<SignedProof<'_>, Rejection>>),
        request: &DecisionRequest,
        caller: &Caller,
        view: &SnapshotView,
        now: ClockReading,
    ) -> Judgement {
        let snapshot = &*view.snapshot;
        let (number, options) = (snapshot.revision().number, self.verifier_options(snapshot));
        judgement.chain = Some(cached_chain.clone());
        let chain = &cached_chain.prepared;
        let audience = match self.resolve_audience(request.audience.as_deref(), caller, snapshot) {
            Ok(audience) => audience,
            Err(rejection) => return judgement.with_rejection(rejection, number),
        };
        if let Err(rejection) = chain.chain().check_audience(audience.as_deref(), &options) {
            return judgement.with_rejection(rejection, number);
        }
        let arguments = match parse_arguments(&request.arguments_json) {
            Ok(arguments) => arguments,
            Err(message) => {
                judgement.decision = Decision::deny(Reason::ArgumentRefused, number).with_layer(DecisionLayer::Tool);
                judgement.message = Some(message);
                return judgement;
            }
        };
        let arguments = judgement.arguments.insert(arguments);

        let tool = snapshot.tool(&request.tool);
        judgement.is_destructive = tool.is_none_or(|tool| tool.is_destructive());
        let per_call = tool.is_none_or(|tool| tool.needs_proof_per_call());
        let per_handle = tool.is_some_and(|tool| tool.needs_proof_per_handle());
        let proof_call = ProofCall { tool: &request.tool, arguments, audience: audience.as_deref() };
        match signed_proof.map(|read| read.and_then(|proof| proof.verify_call(&proof_call, &options, now))) {
            Some(Ok(proof)) => {
                judgement.proof_jti = Some(proof.jti().to_owned());
                let is_single_use =
                    per_call || (request.want_handle && self.may_prove_handle(&proof, judgement.proof_presentation));
                judgement.single_use_proof = is_single_use.then_some(proof);
            }
            Some(Err(rejection)) => return judgement.with_rejection(rejection, number),
            None if per_call || (per_handle && !judgement.handle_is_proved) => {
                judgement.decision = Decision::deny(Reason::ProofMissing, number);
                return judgement;
            }
            None => {}
        }
        judgement.decision = pdp::decide(chain, &pdp_call(request, arguments, now), snapshot, now);
        judgement
    }

    /// Records that a proof was presented by a call that is refused before it is judged. Does nothing if the chain does not verify.
    pub(super) fn record_unjudged_proof(
        &self,
        credential: &AgentCredential,
        proof: Option<&[u8]>,
        caller: &Caller,
        view: &SnapshotView,
        now: ClockReading,
    ) {
        let options = self.verifier_options(&view.snapshot);
        if proof.is_some()
            && let Ok(verified) = self.verify_credential(credential, caller, &view.snapshot, &options, now)
        {
            // A proof that the holder did not sign proves no handle anyway.
            let _ = self.present_proof(proof, &verified.chain.prepared, &options, now);
        }
    }

    /// Reads the call's proof and records that it was presented, whatever the decision will be.
    pub(super) fn present_proof<'a>(
        &self,
        proof: Option<&[u8]>,
        prepared: &'a PreparedChain,
        options: &VerificationOptions,
        now: ClockReading,
    ) -> Option<Result<(SignedProof<'a>, Option<ProofPresentation>), Rejection>> {
        let signed = token::read_proof(prepared.chain(), proof?, options);
        Some(signed.map(|signed| {
            let presentation = signed.replay_key(options, now).map(|key| {
                let holder = self.replay_cache.proof_holder(prepared.subject());
                self.replay_cache.present(&key, holder, now)
            });
            (signed, presentation)
        }))
    }

    /// Whether a proof that came with `want_handle` must be spent, as the proof of a call that needs its own proof is. The handle
    /// may serve many calls, so its proof must count only once.
    ///
    /// A proof that was presented before but not used makes no handle and is not spent. A proof that was used before is refused.
    pub(super) fn may_prove_handle(&self, proof: &VerifiedProof, presentation: Option<ProofPresentation>) -> bool {
        presentation == Some(ProofPresentation::First) || self.replay_cache.was_used(&proof.replay_key())
    }

    /// Verifies the credential of a request, or finds the chain that was verified before.
    pub(super) fn verify_credential(
        &self,
        credential: &AgentCredential,
        caller: &Caller,
        snapshot: &Snapshot,
        options: &VerificationOptions,
        now: ClockReading,
    ) -> Result<VerifiedCredential, Rejection> {
        match credential {
            AgentCredential::Handle(handle) => {
                let Some(entry) = self.handle_cache.find(handle, caller.connection_id, now) else {
                    return Err(rejection_for(Reason::HandleUnknown));
                };
                let proved = entry.proved;
                let chain = self.refresh_chain(&entry.chain, snapshot, options, now)?;
                if !Arc::ptr_eq(&chain, &entry.chain) {
                    self.handle_cache.replace_chain(*handle, entry, chain.clone());
                }
                Ok(VerifiedCredential { chain, proved, cache_hit: true })
            }
            AgentCredential::Chain(tokens) => match self.chain_cache.find(tokens) {
                Some(cached_chain) => {
                    let chain = self.refresh_chain(&cached_chain, snapshot, options, now)?;
                    if !Arc::ptr_eq(&chain, &cached_chain) {
                        self.chain_cache.insert(chain.clone());
                    }
                    Ok(VerifiedCredential { chain, proved: false, cache_hit: true })
                }
                None => Ok(VerifiedCredential {
                    chain: verify_chain(tokens, None, snapshot, options, now)?,
                    proved: false,
                    cache_hit: false,
                }),
            },
        }
    }

    /// Brings a cached chain up to this snapshot. Prepares it again if policy changed, and verifies it again if trust changed.
    pub(super) fn refresh_chain(
        &self,
        cached_chain: &Arc<CachedChain>,
        snapshot: &Snapshot,
        options: &VerificationOptions,
        now: ClockReading,
    ) -> Result<Arc<CachedChain>, Rejection> {
        if cached_chain.prepared.matches_snapshot(snapshot) {
            cached_chain.prepared.chain().check_times(now, options)?;
            return Ok(cached_chain.clone());
        }
        if !cached_chain.prepared.matches_trust(snapshot) {
            return verify_chain(&cached_chain.tokens, Some(cached_chain), snapshot, options, now);
        }
        let prepared = PreparedChain::new(cached_chain.prepared.chain().clone(), snapshot)
            .ok_or_else(|| rejection_for(Reason::IdentityMissing))?;
        prepared.chain().check_times(now, options)?;
        let (tokens, identities, fragment) =
            (cached_chain.tokens.clone(), cached_chain.identities.clone(), cached_chain.fragment.clone());
        Ok(Arc::new(CachedChain::new(tokens, prepared, identities, fragment)))
    }

    /// The options of the token verifier for this snapshot.
    pub(super) fn verifier_options(&self, snapshot: &Snapshot) -> VerificationOptions {
        VerificationOptions {
            require_chain_audience: self.settings.require_chain_audience,
            require_proof_audience: self.settings.require_proof_audience,
            iat_skew_s: snapshot.iat_skew_s(),
            ..VerificationOptions::default()
        }
    }

    /// Resolves the audience of a call. The right to claim it comes from the settings and the connection, never from the request.
    pub(super) fn resolve_audience(
        &self,
        claimed: Option<&str>,
        caller: &Caller,
        snapshot: &Snapshot,
    ) -> Result<Option<String>, Rejection> {
        let audience_mismatch = |message: String| Rejection { reason: Reason::AudienceMismatch, hop: None, message };
        let configured = &self.settings.audiences;
        if let Some(claimed) = claimed {
            let may_claim = if configured.is_empty() {
                caller.is_loopback && snapshot.trust().issuers().any(|issuer| issuer.audiences.contains(claimed))
            } else {
                configured.iter().any(|audience| audience == claimed)
            };
            if may_claim {
                return Ok(Some(claimed.to_owned()));
            }
            return Err(audience_mismatch("this caller may not claim that audience".to_owned()));
        }
        let mut claimable_audiences: Vec<&str> = if configured.is_empty() && caller.is_loopback {
            snapshot.trust().issuers().flat_map(|issuer| issuer.audiences.iter().map(String::as_str)).collect()
        } else {
            configured.iter().map(String::as_str).collect()
        };
        claimable_audiences.sort_unstable();
        claimable_audiences.dedup();
        match claimable_audiences[..] {
            [only] => Ok(Some(only.to_owned())),
            [] if !self.settings.require_chain_audience => Ok(None),
            _ => Err(audience_mismatch(format!(
                "the request names no audience and this caller may claim {}: name one",
                claimable_audiences.len()
            ))),
        }
    }
}

fn rejection_for(reason: Reason) -> Rejection {
    Rejection { reason, hop: None, message: reason.message().to_owned() }
}

/// Whether a decision says that the chain is revoked, and not only the tool.
pub(super) fn revokes_chain(decision: &Decision) -> bool {
    decision.layer == Some(DecisionLayer::Revocation) && decision.reason != Reason::ToolSuspended
}

/// Whether a newer policy may accept a chain that is refused now. A trusted issuer signed its root, so the sender is known, and
/// documents hold the missing part. For example, a new agent may ask for the revision that registered it.
pub(super) fn newer_policy_may_accept(rejection: &Rejection) -> bool {
    // INVARIANT: `token` refuses for these reasons only after it has verified the root's signature.
    matches!(
        rejection.reason,
        Reason::AgentUnknown
            | Reason::AgentKeyUnknown
            | Reason::IssuerNotEntitled
            | Reason::TokenLifetime
            | Reason::AudienceMismatch
    )
}

/// Verifies a chain. For a cached chain it reuses only the signature checks, and only for the same bytes and keys.
fn verify_chain(
    tokens: &[Bytes],
    cached_chain: Option<&CachedChain>,
    snapshot: &Snapshot,
    options: &VerificationOptions,
    now: ClockReading,
) -> Result<Arc<CachedChain>, Rejection> {
    let chain = Arc::new(match cached_chain {
        Some(cached_chain) => token::verify_with_known(cached_chain.prepared.chain(), tokens, snapshot.trust(), options, now)?,
        None => token::verify(tokens, snapshot.trust(), options, now)?,
    });
    let prepared = PreparedChain::new(chain.clone(), snapshot).ok_or_else(|| rejection_for(Reason::IdentityMissing))?;
    let identities = Arc::new(ChainIdentities::of_subject(prepared.subject()));
    let fragment = audit_fragment(&prepared, &identities);
    // Copy the tokens: they may be slices of a larger message, which the cache must not keep in memory.
    let tokens = tokens.iter().map(|token| Bytes::copy_from_slice(token)).collect();
    Ok(Arc::new(CachedChain::new(tokens, prepared, identities, fragment)))
}

/// Parses the arguments of a call. An error is the agent's fault, so the call is denied.
pub(super) fn parse_arguments(json: &[u8]) -> Result<JsonObject, String> {
    if json.is_empty() {
        return Ok(JsonObject::default());
    }
    if json.len() > ARGUMENTS_BYTES_MAX {
        return Err(format!("the arguments are {} bytes: at most {ARGUMENTS_BYTES_MAX}", json.len()));
    }
    let arguments = json::parse_object(json).map_err(|error| format!("the arguments are refused: {error}"))?;
    if arguments.iter().all(|(_, value)| value.is_comparable()) {
        Ok(arguments)
    } else {
        let message = "the arguments hold a number beyond ±(2^53-1), or with more digits than a double keeps, which cannot be compared: \
                       send it as a string";
        Err(message.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_one_comparable_object() {
        assert!(parse_arguments(b"").unwrap().is_empty());
        assert!(parse_arguments(br#"{"a":[1,{"b":2}]}"#).is_ok());
        let large = format!("{{\"a\":\"{}\"}}", "x".repeat(ARGUMENTS_BYTES_MAX));
        for bad in [
            "[]",
            "null",
            "{",
            "{\"a\":1,\"a\":2}",
            "{\"a\":9007199254740993}",
            "{\"a\":[1e300]}",
            "{\"a\":15.0000000000000001}",
            "{} {}",
            &large,
        ] {
            assert!(parse_arguments(bad.as_bytes()).is_err(), "{}", bad.get(..40).unwrap_or(bad));
        }
    }
}
