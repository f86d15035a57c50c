//! A verified chain: the facts that signatures, claims and the agent registry prove together.
//!
//! Only [`super::verify()`] and [`super::verify_with_known`] construct a [`VerifiedChain`], so the value itself is the proof. It can be cached,
//! but its facts can expire: [`VerifiedChain::check_times`] checks the times again, and [`super::verify_with_known`] checks trust again. This
//! module does not know revocations.

use std::sync::Arc;

use super::jws::encode_base64url;
use super::{Rejection, THUMBPRINT_URN_PREFIX, VerificationOptions, description};
use crate::model::constraint::abbreviate;
use crate::model::heap_size::{arc_bytes, arc_slice_bytes, vec_bytes};
use crate::model::ids::{AgentId, ApplicationId, IssuerUri, SessionId, TaskId, Thumbprint};
use crate::model::json::{JsonObject, Value};
use crate::model::jwk::PublicKey;
use crate::model::reason::Reason;
use crate::model::request::{DelegationSubject, TokenScope};
use crate::model::time::ClockReading;

/// One token of a verified chain.
#[derive(Clone, Debug)]
pub struct VerifiedToken {
    /// The token's `jti`.
    pub jti: Arc<str>,
    /// The public key of the token's holder.
    pub holder: PublicKey,
    /// The agent that holds the token; `None` only with [`super::RegistryMode::Off`].
    pub agent: Option<AgentId>,
    /// `iat` in seconds since the Unix epoch, as the signer of the token claims it.
    pub iat_s: i64,
    /// `exp` in seconds since the Unix epoch.
    pub exp_s: i64,
    pub(super) nbf_s: Option<i64>,
    pub(super) audience: Option<Arc<str>>,
    pub(super) depth: u64,
    pub(super) depth_max: u64,
    pub(super) signer: Thumbprint,
    pub(super) signing_input_sha256: [u8; 32],
    pub(super) signature: [u8; 64],
}

impl VerifiedToken {
    /// SHA-256 of the token's signing input.
    pub fn signing_input_sha256(&self) -> &[u8; 32] {
        &self.signing_input_sha256
    }

    /// Base64url of [`VerifiedToken::signing_input_sha256`]. A child's `par_hash` and a revocation of the hop name the token by it.
    pub fn hop_hash(&self) -> String {
        encode_base64url(self.signing_input_sha256)
    }

    /// The start of validity, before any clock skew is added: the later of `iat` and `nbf`.
    pub(super) fn valid_from_s(&self) -> i64 {
        self.nbf_s.map_or(self.iat_s, |nbf_s| nbf_s.max(self.iat_s))
    }
}

/// A chain whose tokens are signed link by link from a trusted issuer. Each link only narrows its parent, and each agent has its own key.
///
/// INVARIANT: only [`super::verify()`] and [`super::verify_with_known`] construct this type; the fields are private for that reason.
#[derive(Clone, Debug)]
pub struct VerifiedChain {
    pub(super) issuer: IssuerUri,
    pub(super) issuer_kid: Option<Arc<str>>,
    pub(super) identities: RootIdentities,
    pub(super) subject: ChainSubject,
    /// Never empty.
    pub(super) tokens: Vec<VerifiedToken>,
    pub(super) expires_at_s: i64,
    pub(super) valid_from_s: i64,
}

/// The identities that the root names. Each of them is present if identities are required.
#[derive(Clone, Debug, Default)]
pub(super) struct RootIdentities {
    pub(super) user: Option<Arc<str>>,
    pub(super) application: Option<ApplicationId>,
    pub(super) session: Option<SessionId>,
    pub(super) task: Option<TaskId>,
}

/// The subject of the chain with its scopes, or only the granted scopes.
#[derive(Clone, Debug)]
pub(super) enum ChainSubject {
    /// Identities and registration were required, so the subject is proved.
    Verified(Arc<DelegationSubject>),
    /// Neither was required.
    Anonymous(Vec<TokenScope>),
}

impl VerifiedChain {
    /// The identities and scopes of the chain; `None` only with [`super::RegistryMode::Off`].
    pub fn subject(&self) -> Option<&Arc<DelegationSubject>> {
        match &self.subject {
            ChainSubject::Verified(subject) => Some(subject),
            ChainSubject::Anonymous(_) => None,
        }
    }

    /// The scope of each token, root to leaf.
    pub fn scopes(&self) -> &[TokenScope] {
        match &self.subject {
            ChainSubject::Verified(subject) => &subject.scopes,
            ChainSubject::Anonymous(scopes) => scopes,
        }
    }

    /// `iss` of a token: the issuer's URI at the root, and the thumbprint URN of the parent's holder at a hop.
    pub fn token_issuer(&self, hop: usize) -> String {
        match self.tokens.get(hop) {
            Some(level) if hop > 0 => format!("{THUMBPRINT_URN_PREFIX}{}", level.signer),
            _ => self.issuer.to_string(),
        }
    }

    /// The issuer of the root.
    pub fn issuer(&self) -> &IssuerUri {
        &self.issuer
    }

    /// Thumbprint of the issuer's key that signed the root.
    pub fn issuer_key_thumbprint(&self) -> &str {
        self.tokens.first().map_or("", |root| root.signer.as_str())
    }

    /// The `kid` that the issuer's document gives to that key.
    pub fn issuer_kid(&self) -> Option<&str> {
        self.issuer_kid.as_deref()
    }

    /// `aud` of the root.
    pub fn audience(&self) -> Option<&str> {
        self.tokens.first().and_then(|root| root.audience.as_deref())
    }

    /// `iat` of the root. Watermarks are compared with it.
    pub fn root_iat_s(&self) -> i64 {
        self.tokens.first().map_or(i64::MIN, |root| root.iat_s)
    }

    /// The earliest `exp` of all tokens, in seconds since the Unix epoch. From then on the chain is void.
    pub fn expires_at_s(&self) -> i64 {
        self.expires_at_s
    }

    /// Bytes on the heap that belong to this value. Keys and ids of the registry are not counted.
    pub fn heap_bytes(&self) -> usize {
        let of_level = |level: &VerifiedToken| {
            let audience = level.audience.as_ref().map_or(0, |audience| arc_slice_bytes(&**audience));
            arc_slice_bytes(&*level.jti) + arc_slice_bytes(level.holder.thumbprint().as_str()) + audience
        };
        let subject_bytes = match &self.subject {
            ChainSubject::Verified(subject) => arc_bytes::<DelegationSubject>() + subject.heap_bytes(),
            ChainSubject::Anonymous(scopes) => {
                vec_bytes(scopes) + scopes.iter().map(|scope| scope.heap_bytes(None)).sum::<usize>()
            }
        };
        let kid = self.issuer_kid.as_ref().map_or(0, |kid| arc_slice_bytes(&**kid));
        vec_bytes(&self.tokens) + self.tokens.iter().map(of_level).sum::<usize>() + subject_bytes + kid
    }

    /// The tokens, root to leaf; never empty.
    pub fn tokens(&self) -> &[VerifiedToken] {
        &self.tokens
    }

    /// The last token. Its holder makes the call.
    pub fn leaf(&self) -> Option<&VerifiedToken> {
        self.tokens.last()
    }

    /// Checks that the chain is meant for `audience`, the audience that the caller claims and may claim.
    ///
    /// # Errors
    /// [`Reason::AudienceMismatch`] if the root names no audience although it must, or if a token names another audience.
    pub fn check_audience(&self, audience: Option<&str>, options: &VerificationOptions) -> Result<(), Rejection> {
        let refused = |hop: usize, message: String| Err(Rejection::new(Reason::AudienceMismatch, message).at_hop(hop));
        if options.require_chain_audience && self.audience().is_none() {
            return refused(0, "the root has no `aud`".to_owned());
        }
        for (hop, level) in self.tokens.iter().enumerate() {
            match (level.audience.as_deref(), audience) {
                (Some(named), Some(claimed)) if named != claimed => {
                    return refused(hop, format!("`aud` is `{}`, not `{}`", abbreviate(named), abbreviate(claimed)));
                }
                (Some(named), None) => {
                    return refused(hop, format!("`aud` is `{}` and nobody here claims it", abbreviate(named)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Checks the times of the chain at `now`, with the same result as [`super::verify()`].
    ///
    /// # Errors
    /// [`Reason::TokenNotYetValid`] or [`Reason::TokenExpired`].
    pub fn check_times(&self, now: ClockReading, options: &VerificationOptions) -> Result<(), Rejection> {
        if now.unix_s() < self.expires_at_s && self.valid_from_s <= now.unix_s().saturating_add(options.iat_skew_s) {
            return Ok(());
        }
        self.tokens.iter().enumerate().try_for_each(|(hop, level)| {
            check_times(level.iat_s, level.nbf_s, level.exp_s, now, options).map_err(|refused| refused.at_hop(hop))
        })
    }

    /// Checks that every token grants the call, from the root to the leaf.
    ///
    /// # Errors
    /// [`Reason::ToolNotGranted`] or [`Reason::ArgumentRefused`], with the first token that refuses.
    pub fn check_call(&self, tool: &str, arguments: &JsonObject) -> Result<(), Rejection> {
        if !arguments.iter().all(|(_, value)| Value::is_comparable(value)) {
            return Err(Rejection::new(
                Reason::ArgumentRefused,
                "a number in the arguments is beyond ±(2^53-1), or has more digits than a double keeps, and cannot be compared",
            ));
        }
        for (hop, scope) in self.scopes().iter().enumerate() {
            let Some(map) = scope.tools.get(tool) else {
                return Err(
                    Rejection::new(Reason::ToolNotGranted, format!("tool `{}` is not granted", abbreviate(tool))).at_hop(hop)
                );
            };
            map.check_arguments(arguments).map_err(|message| Rejection::new(Reason::ArgumentRefused, message).at_hop(hop))?;
        }
        Ok(())
    }

    /// Describes the chain as text: the user, each agent, their scopes, and how long they are valid.
    pub fn describe(&self) -> String {
        description::write_description(&description::ChainDescription {
            issuer: Some(self.issuer.as_str()),
            user: self.identities.user.as_deref(),
            application: self.identities.application.as_ref().map(ApplicationId::as_str),
            session: self.identities.session.as_ref().map(SessionId::as_str),
            task: self.identities.task.as_ref().map(TaskId::as_str),
            levels: self
                .tokens
                .iter()
                .zip(self.scopes())
                .map(|(level, scope)| description::TokenDescription {
                    agent: level.agent.as_ref().map(AgentId::as_str),
                    scope: Some(scope),
                    exp_s: Some(level.exp_s),
                })
                .collect(),
        })
    }
}

/// Checks the times of one token against the clock.
pub(super) fn check_times(
    iat_s: i64,
    nbf_s: Option<i64>,
    exp_s: i64,
    now: ClockReading,
    options: &VerificationOptions,
) -> Result<(), Rejection> {
    for (name, from_s) in [("iat", Some(iat_s)), ("nbf", nbf_s)] {
        if let Some(from_s) = from_s.filter(|from_s| *from_s > now.unix_s().saturating_add(options.iat_skew_s)) {
            let message = format!("`{name}` {from_s} is more than {} s ahead of {}", options.iat_skew_s, now.unix_s());
            return Err(Rejection::new(Reason::TokenNotYetValid, message));
        }
    }
    if now.unix_s() >= exp_s {
        return Err(Rejection::new(Reason::TokenExpired, format!("`exp` {exp_s} has passed: it is {}", now.unix_s())));
    }
    Ok(())
}
