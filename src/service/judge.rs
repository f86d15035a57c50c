//! Judges one call by one view, in the order of verification: credential, audience, arguments, proof, decision. Does not await.
//!
//! A judgement spends no proof and uses no approval. `service/settle.rs` does that afterwards. Look next at `pdp.rs`, which decides.

use std::sync::Arc;

use bytes::Bytes;

use super::Service;
use super::chains::{KnownChain, fragment};
use super::proofs::Showing;
use super::request::{ApprovalRequest, Caller, CheckRequest, Credential, Identities};
use crate::model::decision::{Decision, Effect};
use crate::model::json::{self, Object};
use crate::model::limits::ARGUMENTS_BYTES_MAX;
use crate::model::reason::{Layer, Reason};
use crate::model::request::Call;
use crate::model::time::Now;
use crate::pdp::{self, Prepared};
use crate::snapshot::{Snapshot, View};
use crate::token::{self, Options, ProofOf, Rejection, SignedProof, VerifiedProof};

/// The judgement of a call, with the facts that its audit record needs.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) decision: Decision,
    /// A message for the caller, if the standard message of the reason says too little.
    pub(super) message: Option<String>,
    pub(super) chain: Option<Arc<KnownChain>>,
    pub(super) arguments: Option<Object>,
    /// The `jti` of the call's proof, if the proof verified.
    pub(super) proof_jti: Option<String>,
    /// The call's proof, if it may be used only once.
    pub(super) single_use_proof: Option<VerifiedProof>,
    /// Whether the call's proof was presented before; `None` if the call has no proof that the holder of the chain signed.
    pub(super) showing: Option<Showing>,
    /// Whether the answer repeats an earlier answer to the same request.
    pub(super) repeats: bool,
    pub(super) destructive: bool,
    /// Whether the handle in the request was issued for a proof of possession.
    pub(super) proved: bool,
    /// Whether the chain cache held the chain; `None` if no chain was looked up.
    pub(super) cached: Option<bool>,
    /// The decision id in the store, if the call used an approval.
    pub(super) decision_id: Option<String>,
    /// The stored approval request, if the call asks for an approval.
    pub(super) approval: Option<ApprovalRequest>,
    /// The digest of the approval that was requested or used, for the audit record.
    pub(super) approval_digest: Option<String>,
    /// The generation of the revocation index, read before the judgement began.
    pub(super) generation: u64,
}

impl Judged {
    pub(super) fn denied(decision: Decision) -> Self {
        Self {
            decision,
            message: None,
            chain: None,
            arguments: None,
            proof_jti: None,
            single_use_proof: None,
            showing: None,
            repeats: false,
            destructive: true,
            proved: false,
            cached: None,
            decision_id: None,
            approval: None,
            approval_digest: None,
            generation: 0,
        }
    }

    /// Whether the call must ask for an approval or use one.
    pub(super) fn wants_approval(&self) -> bool {
        self.decision.effect == Effect::NeedsApproval || !self.decision.prepared.is_empty()
    }

    /// Whether the call must use a ledger of the store: to spend its proof, or to ask for or use an approval.
    pub(super) fn needs_the_store(&self) -> bool {
        self.wants_approval() || self.destructive && self.single_use_proof.is_some()
    }

    /// Whether a new handle for this call counts as proved; `None` if the call gets no handle.
    ///
    /// INVARIANT: a handle is proved only by a proof that this very call spent and that no earlier call presented. So a person
    /// who overhears a proof cannot get a proved handle with it.
    pub(super) fn proves_handle(&self) -> Option<bool> {
        match self.showing {
            _ if self.repeats => None,
            None => Some(false),
            Some(Showing::First) => Some(true),
            Some(Showing::Again | Showing::Unknown) => None,
        }
    }

    fn refused(mut self, rejection: Rejection, number: u64) -> Self {
        self.decision = Decision::deny(rejection.reason, number).at_hop(rejection.hop);
        self.message = Some(rejection.message);
        self
    }
}

/// A verified credential, and how it was found.
pub(super) struct Credited {
    pub(super) chain: Arc<KnownChain>,
    pub(super) proved: bool,
    cached: bool,
}

/// Converts a request to the call that `pdp` decides.
pub(super) fn call<'a>(request: &'a CheckRequest, arguments: &'a Object, now: Now) -> Call<'a> {
    Call {
        tool: &request.tool,
        tool_schema_sha256: request.tool_schema_sha256,
        arguments,
        environment: request.environment.as_ref(),
        unix_s: now.unix_s(),
    }
}

impl Service {
    /// Judges a call. A permit that it returns has not spent its proof yet.
    pub(super) fn judge(&self, request: &CheckRequest, caller: &Caller, view: &View, now: Now) -> Judged {
        let snapshot = &*view.snapshot;
        let number = snapshot.revision().number;
        let mut judged = Judged::denied(Decision::deny(Reason::TokenMalformed, number));
        judged.generation = snapshot.revocations().generation();
        let options = self.options(snapshot);
        let credited = match self.credit(&request.credential, caller, snapshot, &options, now) {
            Ok(credited) => credited,
            Err(rejection) => return judged.refused(rejection, number),
        };
        judged.cached = Some(credited.cached);
        judged.proved = credited.proved;
        let signed = self.show(request.proof.as_deref(), &credited.chain.prepared, &options, now);
        judged.showing = signed.as_ref().and_then(|signed| signed.as_ref().ok()?.1);
        let signed = signed.map(|signed| signed.map(|(signed, _)| signed));
        let judged = self.judge_credited(judged, (&credited.chain, signed), request, caller, view, now);
        // Cache the chain only if the caller proved possession or the call is not denied, because the holder of a chain can
        // easily make many more.
        if !credited.cached && (judged.proof_jti.is_some() || judged.decision.effect != Effect::Deny) {
            self.chains.keep(credited.chain);
        }
        judged
    }

    /// Judges a call again by a view that may be newer. The credential was verified before.
    pub(super) fn judge_again(&self, before: &Judged, request: &CheckRequest, caller: &Caller, view: &View, now: Now) -> Judged {
        let snapshot = &*view.snapshot;
        let number = snapshot.revision().number;
        let mut judged = Judged::denied(Decision::deny(Reason::TokenMalformed, number));
        judged.generation = snapshot.revocations().generation();
        (judged.cached, judged.proved) = (before.cached, before.proved);
        // The proof was presented once, however often the call is judged.
        (judged.showing, judged.repeats) = (before.showing, before.repeats);
        // A judgement that is no denial has a chain.
        let Some(known) = &before.chain else { return judged };
        let options = self.options(snapshot);
        match self.current(known, snapshot, &options, now) {
            Ok(chain) => {
                let read = |proof: &Bytes| token::read_proof(chain.prepared.chain(), proof, &options);
                let signed = request.proof.as_ref().map(read);
                self.judge_credited(judged, (&chain, signed), request, caller, view, now)
            }
            Err(rejection) => {
                judged.chain = Some(known.clone());
                judged.refused(rejection, number)
            }
        }
    }

    /// Judges the steps after the credential: audience, arguments, proof, decision.
    fn judge_credited(
        &self,
        mut judged: Judged,
        (known, signed): (&Arc<KnownChain>, Option<Result<SignedProof<'_>, Rejection>>),
        request: &CheckRequest,
        caller: &Caller,
        view: &View,
        now: Now,
    ) -> Judged {
        let snapshot = &*view.snapshot;
        let (number, options) = (snapshot.revision().number, self.options(snapshot));
        judged.chain = Some(known.clone());
        let chain = &known.prepared;
        let audience = match self.audience(request.audience.as_deref(), caller, snapshot) {
            Ok(audience) => audience,
            Err(rejection) => return judged.refused(rejection, number),
        };
        if let Err(rejection) = chain.chain().check_audience(audience.as_deref(), &options) {
            return judged.refused(rejection, number);
        }
        let arguments = match arguments(&request.arguments_json) {
            Ok(arguments) => arguments,
            Err(message) => {
                judged.decision = Decision::deny(Reason::ArgumentRefused, number).by(Layer::Tool);
                judged.message = Some(message);
                return judged;
            }
        };
        let arguments = judged.arguments.insert(arguments);

        let tool = snapshot.tool(&request.tool);
        judged.destructive = tool.is_none_or(|tool| tool.is_destructive());
        let per_call = tool.is_none_or(|tool| tool.needs_proof_per_call());
        let per_handle = tool.is_some_and(|tool| tool.needs_proof_per_handle());
        let expected = ProofOf { tool: &request.tool, arguments, audience: audience.as_deref() };
        match signed.map(|signed| signed.and_then(|signed| signed.check(&expected, &options, now))) {
            Some(Ok(proof)) => {
                judged.proof_jti = Some(proof.jti().to_owned());
                let counts_once = per_call || (request.want_handle && self.may_prove_handle(&proof, judged.showing));
                judged.single_use_proof = counts_once.then_some(proof);
            }
            Some(Err(rejection)) => return judged.refused(rejection, number),
            None if per_call || (per_handle && !judged.proved) => {
                judged.decision = Decision::deny(Reason::ProofMissing, number);
                return judged;
            }
            None => {}
        }
        judged.decision = pdp::decide(chain, &call(request, arguments, now), snapshot, now);
        judged
    }

    /// Reads the call's proof and records that it was presented, whatever the decision will be.
    pub(super) fn show<'a>(
        &self,
        proof: Option<&[u8]>,
        prepared: &'a Prepared,
        options: &Options,
        now: Now,
    ) -> Option<Result<(SignedProof<'a>, Option<Showing>), Rejection>> {
        let signed = token::read_proof(prepared.chain(), proof?, options);
        Some(signed.map(|signed| {
            let showing = signed.replay_key(options, now).map(|key| {
                let holder = self.proofs.holder(prepared.subject());
                self.proofs.show(&key, holder, now)
            });
            (signed, showing)
        }))
    }

    /// Whether a proof that came with `want_handle` is spent like the proof of a writing call. The handle may serve many calls,
    /// so such a proof must count once.
    ///
    /// A proof that was presented before but not used makes no handle and is not spent. A proof that was used before is refused.
    pub(super) fn may_prove_handle(&self, proof: &VerifiedProof, showing: Option<Showing>) -> bool {
        showing == Some(Showing::First) || self.proofs.was_used(&proof.replay_key())
    }

    /// Verifies the credential of a request, or finds the chain that was verified before.
    pub(super) fn credit(
        &self,
        credential: &Credential,
        caller: &Caller,
        snapshot: &Snapshot,
        options: &Options,
        now: Now,
    ) -> Result<Credited, Rejection> {
        match credential {
            Credential::Handle(handle) => {
                let Some(held) = self.handles.find(handle, caller.connection_id, now) else {
                    return Err(rejection(Reason::HandleUnknown));
                };
                let proved = held.proved;
                let chain = self.current(&held.chain, snapshot, options, now)?;
                if !Arc::ptr_eq(&chain, &held.chain) {
                    self.handles.replace(*handle, held, chain.clone());
                }
                Ok(Credited { chain, proved, cached: true })
            }
            Credential::Chain(tokens) => match self.chains.find(tokens) {
                Some(known) => {
                    let chain = self.current(&known, snapshot, options, now)?;
                    if !Arc::ptr_eq(&chain, &known) {
                        self.chains.keep(chain.clone());
                    }
                    Ok(Credited { chain, proved: false, cached: true })
                }
                None => Ok(Credited { chain: verified(tokens, None, snapshot, options, now)?, proved: false, cached: false }),
            },
        }
    }

    /// Brings a cached chain up to this snapshot. Prepares it again if policy changed, and verifies it again if trust changed.
    fn current(
        &self,
        known: &Arc<KnownChain>,
        snapshot: &Snapshot,
        options: &Options,
        now: Now,
    ) -> Result<Arc<KnownChain>, Rejection> {
        if known.prepared.fits(snapshot) {
            known.prepared.chain().check_times(now, options)?;
            return Ok(known.clone());
        }
        if !known.prepared.is_trusted_by(snapshot) {
            return verified(&known.tokens, Some(known), snapshot, options, now);
        }
        let prepared =
            Prepared::new(known.prepared.chain().clone(), snapshot).ok_or_else(|| rejection(Reason::IdentityMissing))?;
        prepared.chain().check_times(now, options)?;
        let (tokens, identities, fragment) = (known.tokens.clone(), known.identities.clone(), known.fragment.clone());
        Ok(Arc::new(KnownChain::new(tokens, prepared, identities, fragment)))
    }

    /// The options of the token verifier for this snapshot.
    pub(super) fn options(&self, snapshot: &Snapshot) -> Options {
        Options {
            require_chain_audience: self.settings.require_chain_audience,
            require_proof_audience: self.settings.require_proof_audience,
            iat_skew_s: snapshot.iat_skew_s(),
            ..Options::default()
        }
    }

    /// Resolves the audience of a call. The right to claim it comes from the settings and the connection, never from the request.
    pub(super) fn audience(
        &self,
        claimed: Option<&str>,
        caller: &Caller,
        snapshot: &Snapshot,
    ) -> Result<Option<String>, Rejection> {
        let refused = |message: String| Rejection { reason: Reason::AudienceMismatch, hop: None, message };
        let configured = &self.settings.audiences;
        if let Some(claimed) = claimed {
            let entitled = if configured.is_empty() {
                caller.is_loopback && snapshot.trust().issuers().any(|issuer| issuer.audiences.contains(claimed))
            } else {
                configured.iter().any(|audience| audience == claimed)
            };
            if entitled {
                return Ok(Some(claimed.to_owned()));
            }
            return Err(refused("this caller may not claim that audience".to_owned()));
        }
        let mut own: Vec<&str> = if configured.is_empty() && caller.is_loopback {
            snapshot.trust().issuers().flat_map(|issuer| issuer.audiences.iter().map(String::as_str)).collect()
        } else {
            configured.iter().map(String::as_str).collect()
        };
        own.sort_unstable();
        own.dedup();
        match own[..] {
            [only] => Ok(Some(only.to_owned())),
            [] if !self.settings.require_chain_audience => Ok(None),
            _ => Err(refused(format!("the request names no audience and this caller may claim {}: name one", own.len()))),
        }
    }
}

fn rejection(reason: Reason) -> Rejection {
    Rejection { reason, hop: None, message: reason.message().to_owned() }
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
fn verified(
    tokens: &[Bytes],
    known: Option<&KnownChain>,
    snapshot: &Snapshot,
    options: &Options,
    now: Now,
) -> Result<Arc<KnownChain>, Rejection> {
    let chain = Arc::new(match known {
        Some(known) => token::verify_with(known.prepared.chain(), tokens, snapshot.trust(), options, now)?,
        None => token::verify(tokens, snapshot.trust(), options, now)?,
    });
    let prepared = Prepared::new(chain.clone(), snapshot).ok_or_else(|| rejection(Reason::IdentityMissing))?;
    let identities = Arc::new(Identities::of(prepared.subject()));
    let fragment = fragment(&prepared, &identities);
    // Copy the tokens: they may be slices of a larger message, which the cache must not keep in memory.
    let tokens = tokens.iter().map(|token| Bytes::copy_from_slice(token)).collect();
    Ok(Arc::new(KnownChain::new(tokens, prepared, identities, fragment)))
}

/// Parses the arguments of a call. An error is the agent's fault, so the call is denied.
pub(super) fn arguments(json: &[u8]) -> Result<Object, String> {
    if json.is_empty() {
        return Ok(Object::default());
    }
    if json.len() > ARGUMENTS_BYTES_MAX {
        return Err(format!("the arguments are {} bytes: at most {ARGUMENTS_BYTES_MAX}", json.len()));
    }
    let arguments = json::parse_object(json).map_err(|error| format!("the arguments are refused: {error}"))?;
    if arguments.iter().all(|(_, value)| value.is_comparable()) {
        Ok(arguments)
    } else {
        Err("the arguments hold a number beyond ±(2^53-1), which cannot be compared: send it as a string".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_one_comparable_object() {
        assert!(arguments(b"").unwrap().is_empty());
        assert!(arguments(br#"{"a":[1,{"b":2}]}"#).is_ok());
        let large = format!("{{\"a\":\"{}\"}}", "x".repeat(ARGUMENTS_BYTES_MAX));
        for bad in ["[]", "null", "{", "{\"a\":1,\"a\":2}", "{\"a\":9007199254740993}", "{\"a\":[1e300]}", "{} {}", &large] {
            assert!(arguments(bad.as_bytes()).is_err(), "{}", bad.get(..40).unwrap_or(bad));
        }
    }
}
