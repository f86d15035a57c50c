//! Verifies a chain. The order of the checks is documented, because it determines which reason is reported. Read this file first in
//! `token`.
//!
//! The checks, in order:
//!
//! 1. size limits, one strict parse of every token, duplicate ids;
//! 2. for each token from the root on: header, signature, claims and times, link to its parent, attenuation, identities, registry;
//! 3. the audience.
//!
//! The first failure is returned.
//!
//! The functions read no clock and keep no state: `now` is an argument, and the result is a value.

use std::sync::Arc;

use bytes::Bytes;

use super::chain::{RootIdentities, VerifiedChain, VerifiedToken, check_times};
use super::claims::{self, ROOT_ONLY_CLAIMS, TokenClaims};
use super::identity;
use super::jws::{Jws, malformed_token};
use super::trust::{TrustTable, TrustedIssuer};
use super::{Rejection, THUMBPRINT_URN_PREFIX, TOKEN_TYPE, VerificationOptions};
use crate::model::constraint::abbreviate;
use crate::model::ids::{GroupId, Thumbprint};
use crate::model::json::{JsonObject, Value};
use crate::model::jwk::{NamedKey, PublicKey};
use crate::model::limits::{ID_BYTES_MAX, ROOT_LIFETIME_S_HARD_MAX};
use crate::model::reason::Reason;
use crate::model::request::TokenScope;
use crate::model::time::ClockReading;

/// Verifies a chain of compact JWS tokens, root first. It costs about one Ed25519 verification per token.
///
/// The audience is checked against the issuer's document. [`VerifiedChain::check_audience`] checks it against the caller.
///
/// # Errors
/// The first rule that the chain breaks, with the token at fault.
pub fn verify(
    chain: &[Bytes],
    trust: &TrustTable,
    options: &VerificationOptions,
    now: ClockReading,
) -> Result<VerifiedChain, Rejection> {
    verify_chain(chain, None, trust, options, now)
}

/// Verifies like [`verify()`], but skips the signatures that `known` proves. Every other rule is checked again.
///
/// Use it for a chain that extends a verified one, and for the same chain after trust has changed. It is sound for any `known`: a signature
/// counts as known only for the same bytes and the same key.
///
/// # Errors
/// As [`verify()`].
pub fn verify_with_known(
    known: &VerifiedChain,
    chain: &[Bytes],
    trust: &TrustTable,
    options: &VerificationOptions,
    now: ClockReading,
) -> Result<VerifiedChain, Rejection> {
    verify_chain(chain, Some(known), trust, options, now)
}

fn verify_chain(
    chain: &[Bytes],
    known: Option<&VerifiedChain>,
    trust: &TrustTable,
    options: &VerificationOptions,
    now: ClockReading,
) -> Result<VerifiedChain, Rejection> {
    check_sizes(chain, options)?;
    let tokens = parse(chain)?;
    check_duplicates(&tokens)?;
    let mut tokens = tokens.into_iter().enumerate();
    let (_, root) = tokens.next().ok_or_else(empty_chain)?;
    let mut verifier = ChainVerifier::verify_root(&root, known, trust, options, now).map_err(|refused| refused.at_hop(0))?;
    for (hop, token) in tokens {
        verifier.verify_hop(&token, known.and_then(|known| known.tokens.get(hop))).map_err(|refused| refused.at_hop(hop))?;
    }
    verifier.finish()
}

fn empty_chain() -> Rejection {
    malformed_token("the chain is empty: send the root's JWS at least")
}

fn check_sizes(chain: &[Bytes], options: &VerificationOptions) -> Result<(), Rejection> {
    let tokens_max = usize::try_from(options.delegation_depth_max).unwrap_or(usize::MAX).saturating_add(1);
    if chain.is_empty() {
        return Err(empty_chain());
    }
    if chain.len() > tokens_max {
        let message = format!("{} tokens: a chain has at most {tokens_max}", chain.len());
        return Err(Rejection::new(Reason::ChainTooDeep, message).at_hop(tokens_max));
    }
    let mut sum = 0_usize;
    for (hop, token) in chain.iter().enumerate() {
        sum = sum.saturating_add(token.len());
        if token.len() > options.token_bytes_max {
            let message = format!("{} bytes: a token has at most {}", token.len(), options.token_bytes_max);
            return Err(Rejection::new(Reason::TokenTooLarge, message).at_hop(hop));
        }
        if sum > options.chain_bytes_max {
            let message = format!("the tokens up to this one have {sum} bytes: a chain has at most {}", options.chain_bytes_max);
            return Err(Rejection::new(Reason::TokenTooLarge, message).at_hop(hop));
        }
    }
    Ok(())
}

fn parse(chain: &[Bytes]) -> Result<Vec<Jws<'_>>, Rejection> {
    let read = |token| {
        let token = Jws::parse(token)?;
        claims::check_dates(&token.claims)?;
        Ok(token)
    };
    chain.iter().enumerate().map(|(hop, token)| read(token).map_err(|refused: Rejection| refused.at_hop(hop))).collect()
}

fn check_duplicates(tokens: &[Jws<'_>]) -> Result<(), Rejection> {
    let mut seen: Vec<&str> = Vec::with_capacity(tokens.len());
    for (hop, token) in tokens.iter().enumerate() {
        let Some(jti) = token.claims.member("jti").and_then(Value::as_str) else { continue };
        if seen.contains(&jti) {
            let message = format!("`jti` `{}` stands twice in the chain", abbreviate(jti));
            return Err(Rejection::new(Reason::ChainReplayedToken, message).at_hop(hop));
        }
        seen.push(jti);
    }
    Ok(())
}

/// The part of the chain that is verified so far, from the root down.
struct ChainVerifier<'a> {
    trust: &'a TrustTable,
    options: &'a VerificationOptions,
    now: ClockReading,
    issuer: &'a TrustedIssuer,
    issuer_kid: Option<Arc<str>>,
    identities: RootIdentities,
    groups: Vec<GroupId>,
    tokens: Vec<VerifiedToken>,
    scopes: Vec<TokenScope>,
    /// Index of the token whose `aud` is not a string. It is reported at the end, because the audience is checked last.
    audience_fault: Option<usize>,
}

impl<'a> ChainVerifier<'a> {
    /// Verifies the root: a trusted issuer must have signed it.
    fn verify_root(
        root: &Jws<'_>,
        known: Option<&VerifiedChain>,
        trust: &'a TrustTable,
        options: &'a VerificationOptions,
        now: ClockReading,
    ) -> Result<Self, Rejection> {
        let named = claims::optional_text(&root.claims, "iss")?;
        let issuer = named.and_then(|iss| trust.issuer(iss));
        // INVARIANT: an issuer's list of types can only exclude types. No list makes this format accept another type.
        root.check_header(|typ| {
            typ == TOKEN_TYPE && issuer.is_none_or(|issuer| issuer.typ.iter().any(|allowed| allowed == typ))
        })?;
        let named = named.ok_or_else(|| malformed_token("`iss` is missing or empty"))?;
        let issuer = issuer.ok_or_else(|| {
            Rejection::new(Reason::IssuerUnknown, format!("issuer `{}` is not trusted here", abbreviate(named)))
        })?;
        let key = find_root_key(root, issuer, known.and_then(|known| known.tokens.first()))?;
        let mut verifier = Self {
            trust,
            options,
            now,
            issuer,
            issuer_kid: key.kid.as_deref().map(Arc::from),
            identities: RootIdentities::default(),
            groups: Vec::new(),
            tokens: Vec::new(),
            scopes: Vec::new(),
            audience_fault: None,
        };
        let claims = TokenClaims::read(&root.claims)?;
        // INVARIANT: no root lives longer than revocations are retained, whatever its issuer may allow.
        verifier.check_lifetime(&claims, issuer.lifetime_max_s.min(ROOT_LIFETIME_S_HARD_MAX))?;
        if root.claims.member("par_hash").is_some() {
            return Err(Rejection::new(Reason::ChainBroken, "a root has no parent, and this one has `par_hash`"));
        }
        if claims.depth != 0 {
            return Err(Rejection::new(Reason::ChainBroken, format!("`del_depth` of a root is 0, not {}", claims.depth)));
        }
        verifier.check_depth(&claims)?;
        (verifier.identities, verifier.groups) = identity::read_root_identities(&root.claims, issuer, trust, options)?;
        verifier.push_token(root, claims, key.key.thumbprint().clone())?;
        Ok(verifier)
    }

    /// Verifies a hop: the holder of the previous token must have signed it.
    fn verify_hop(&mut self, hop: &Jws<'_>, known: Option<&VerifiedToken>) -> Result<(), Rejection> {
        hop.check_header(|typ| typ == TOKEN_TYPE)?;
        let (Some(parent), Some(parent_scope)) = (self.tokens.last(), self.scopes.last()) else { return Err(empty_chain()) };
        if !is_signed(hop, &parent.holder, known) {
            return Err(Rejection::new(Reason::TokenSignature, "the signature is not of the key that holds the parent"));
        }
        let claims = TokenClaims::read(&hop.claims)?;
        self.check_lifetime(&claims, self.issuer.hop_lifetime_max_s)?;
        check_link(&hop.claims, &claims, parent)?;
        self.check_depth(&claims)?;
        check_attenuation(&claims, parent, parent_scope)?;
        if let Some(name) = ROOT_ONLY_CLAIMS.iter().find(|name| hop.claims.member(name).is_some()) {
            return Err(Rejection::new(Reason::IdentityInHop, format!("a hop carries `{name}`, which only the root may")));
        }
        let signer = parent.holder.thumbprint().clone();
        self.push_token(hop, claims, signer)
    }

    /// Checks the audience against the issuer's document and returns the verified chain.
    fn finish(self) -> Result<VerifiedChain, Rejection> {
        let refused = |hop: usize, message: String| Err(Rejection::new(Reason::AudienceMismatch, message).at_hop(hop));
        if let Some(hop) = self.audience_fault {
            return refused(hop, "`aud` is not one string".to_owned());
        }
        match self.tokens.first().and_then(|root| root.audience.as_deref()) {
            Some(audience) if !self.issuer.audiences.contains(audience) => {
                return refused(0, format!("`aud` `{}` is not one that this issuer's roots may carry", abbreviate(audience)));
            }
            None if self.options.require_chain_audience => return refused(0, "the root has no `aud`".to_owned()),
            _ => {}
        }
        let mut levels = self.tokens;
        levels.shrink_to_fit();
        Ok(VerifiedChain {
            issuer: self.issuer.id.clone(),
            issuer_kid: self.issuer_kid,
            subject: identity::build_chain_subject(
                self.options,
                &self.issuer.id,
                &self.identities,
                self.groups,
                &levels,
                self.scopes,
            )?,
            identities: self.identities,
            expires_at_s: levels.iter().map(|level| level.exp_s).min().unwrap_or(i64::MIN),
            valid_from_s: levels.iter().map(VerifiedToken::valid_from_s).max().unwrap_or(i64::MAX),
            tokens: levels,
        })
    }

    /// Checks the times and the lifetime.
    fn check_lifetime(&self, claims: &TokenClaims, lifetime_s_max: i64) -> Result<(), Rejection> {
        check_times(claims.iat_s, claims.nbf_s, claims.exp_s, self.now, self.options)?;
        let lifetime_s = claims.exp_s.saturating_sub(claims.iat_s);
        if lifetime_s > lifetime_s_max {
            let message = format!("it lives {lifetime_s} s from `iat` to `exp`: at most {lifetime_s_max} s here");
            return Err(Rejection::new(Reason::TokenLifetime, message));
        }
        Ok(())
    }

    fn check_depth(&self, claims: &TokenClaims) -> Result<(), Rejection> {
        let too_deep = |message: String| Err(Rejection::new(Reason::ChainTooDeep, message));
        let limit = self.options.delegation_depth_max;
        // If a hop raises `del_max_depth`, the attenuation check reports it. Until then the parent's value applies.
        let allowed = match self.tokens.last() {
            Some(parent) => parent.depth_max.min(claims.depth_max),
            None if claims.depth_max > limit => {
                return too_deep(format!("`del_max_depth` {} is over the limit {limit}", claims.depth_max));
            }
            None => claims.depth_max,
        };
        if claims.depth > allowed {
            return too_deep(format!("`del_depth` {} is over `del_max_depth` {allowed}", claims.depth));
        }
        Ok(())
    }

    fn push_token(&mut self, token: &Jws<'_>, claims: TokenClaims, signer: Thumbprint) -> Result<(), Rejection> {
        let agent = identity::resolve_agent(&token.claims, &claims.holder, self.trust, self.options)?;
        let audience = match token.claims.member("aud") {
            None => None,
            Some(Value::String(audience)) if (1..=ID_BYTES_MAX).contains(&audience.len()) => {
                Some(claims::check_printable("aud", audience)?.into())
            }
            Some(_) => {
                self.audience_fault.get_or_insert(self.tokens.len());
                None
            }
        };
        let signing_input_sha256 = token.signing_input_sha256();
        self.tokens.push(VerifiedToken {
            jti: claims.jti,
            holder: claims.holder,
            agent,
            iat_s: claims.iat_s,
            nbf_s: claims.nbf_s,
            exp_s: claims.exp_s,
            audience,
            depth: claims.depth,
            depth_max: claims.depth_max,
            signer,
            signing_input_sha256,
            signature: signature_bytes(token)?,
        });
        let mut scope = claims.scope;
        if let Some(parent) = self.scopes.last() {
            scope.share_names(parent);
        }
        self.scopes.push(scope);
        Ok(())
    }
}

/// Finds the issuer's key that signed the root. With a `kid`, only the keys of that `kid` are tried; without one, all keys are.
fn find_root_key<'a>(
    root: &Jws<'_>,
    issuer: &'a TrustedIssuer,
    known: Option<&VerifiedToken>,
) -> Result<&'a NamedKey, Rejection> {
    let kid = root.header.member("kid");
    let selected = |key: &&NamedKey| kid.is_none_or(|kid| kid.as_str().is_some_and(|kid| key.kid.as_deref() == Some(kid)));
    let mut candidates = issuer.keys.iter().filter(selected).peekable();
    if let (None, Some(kid)) = (candidates.peek(), kid) {
        let message = format!("the issuer has no key with `kid` `{}`", abbreviate(kid.as_str().unwrap_or("not a string")));
        return Err(Rejection::new(Reason::TokenSignature, message));
    }
    let signed = candidates.find(|key| is_signed(root, &key.key, known));
    signed.ok_or_else(|| Rejection::new(Reason::TokenSignature, "the signature is not of a key of the issuer"))
}

/// Whether `key` signed the token. The signature is verified, unless it is known for the same bytes and the same key.
fn is_signed(token: &Jws<'_>, key: &PublicKey, known: Option<&VerifiedToken>) -> bool {
    let is_known = |level: &VerifiedToken| {
        level.signer == *key.thumbprint()
            && level.signature.as_slice() == token.signature
            && level.signing_input_sha256 == token.signing_input_sha256()
    };
    known.is_some_and(is_known) || token.is_signed_by(key)
}

fn signature_bytes(token: &Jws<'_>) -> Result<[u8; 64], Rejection> {
    let fault = |_| Rejection::new(Reason::TokenSignature, "the signature is not 64 bytes");
    token.signature.as_slice().try_into().map_err(fault)
}

/// Checks the link between a hop and its parent.
fn check_link(raw: &JsonObject, hop: &TokenClaims, parent: &VerifiedToken) -> Result<(), Rejection> {
    let broken = |message: String| Err(Rejection::new(Reason::ChainBroken, message));
    if hop.issuer.strip_prefix(THUMBPRINT_URN_PREFIX) != Some(parent.holder.thumbprint().as_str()) {
        return broken(format!("`iss` is not the thumbprint URN of the parent's key `{}`", parent.holder.thumbprint()));
    }
    if raw.member("par_hash").and_then(Value::as_str) != Some(parent.hop_hash().as_str()) {
        return broken("`par_hash` is not the hash of the parent's signing input".to_owned());
    }
    if Some(hop.depth) != parent.depth.checked_add(1) {
        return broken(format!("`del_depth` is {} under a parent of {}", hop.depth, parent.depth));
    }
    if hop.iat_s < parent.iat_s {
        return broken(format!("`iat` {} is before the parent's {}", hop.iat_s, parent.iat_s));
    }
    if hop.holder == parent.holder {
        return broken("`cnf` is the parent's own key: a hop hands to another".to_owned());
    }
    Ok(())
}

/// Checks that a hop grants no more than its parent.
fn check_attenuation(hop: &TokenClaims, parent: &VerifiedToken, parent_scope: &TokenScope) -> Result<(), Rejection> {
    let widened = |message: String| Err(Rejection::new(Reason::ChainWidened, message));
    if hop.depth_max > parent.depth_max {
        return widened(format!("`del_max_depth` {} is over the parent's {}", hop.depth_max, parent.depth_max));
    }
    if hop.exp_s > parent.exp_s {
        return widened(format!("`exp` {} is after the parent's {}", hop.exp_s, parent.exp_s));
    }
    for (tool, map) in hop.scope.tools.iter() {
        let Some(wider) = parent_scope.tools.get(tool) else { return widened(format!("tool `{}` is added", abbreviate(tool))) };
        if let Err(message) = map.check_attenuation(wider) {
            return widened(format!("tool `{}`: {message}", abbreviate(tool)));
        }
    }
    Ok(())
}
