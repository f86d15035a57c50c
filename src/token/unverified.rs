//! A chain that is parsed but not verified. It is for `token inspect` only; nothing may be decided by it.

use bytes::Bytes;

use super::claims::{TokenClaims, holder, read_actor};
use super::jws::{Jws, encode_base64url};
use super::{Rejection, description};
use crate::model::json::{JsonObject, Value};
use crate::model::request::TokenScope;

/// A chain whose claims are not verified. Its sender may have written anything.
#[derive(Debug)]
pub struct UnverifiedChain {
    tokens: Vec<UnverifiedToken>,
}

/// One token as received.
#[derive(Debug)]
pub struct UnverifiedToken {
    header: JsonObject,
    claims: JsonObject,
    hop_hash: String,
}

impl UnverifiedChain {
    /// Parses the tokens, root first. The caller limits the size.
    ///
    /// # Errors
    /// [`crate::model::reason::Reason::TokenMalformed`] for the first token that is not a compact JWS of two JSON objects.
    pub fn parse(chain: &[Bytes]) -> Result<Self, Rejection> {
        let read = |(hop, token): (usize, &Bytes)| {
            let token = Jws::parse(token).map_err(|refused| refused.at_hop(hop))?;
            let hop_hash = encode_base64url(token.signing_input_sha256());
            Ok(UnverifiedToken { header: token.header, claims: token.claims, hop_hash })
        };
        Ok(Self { tokens: chain.iter().enumerate().map(read).collect::<Result<_, Rejection>>()? })
    }

    /// The tokens, root first.
    pub fn tokens(&self) -> &[UnverifiedToken] {
        &self.tokens
    }

    /// Describes the chain as text, as far as its claims can be read.
    pub fn describe(&self) -> String {
        let root = self.tokens.first();
        let text = |name| root.and_then(|root| root.claims.member(name)).and_then(Value::as_str);
        let scopes: Vec<Option<TokenScope>> =
            self.tokens.iter().map(|token| TokenClaims::read(&token.claims).ok().map(|claims| claims.scope)).collect();
        description::write_description(&description::ChainDescription {
            issuer: text("iss"),
            user: text("sub"),
            application: text("client_id"),
            session: text("sid"),
            task: text("txn"),
            levels: self
                .tokens
                .iter()
                .zip(&scopes)
                .map(|(token, scope)| description::TokenDescription {
                    agent: read_actor(&token.claims).ok().flatten(),
                    scope: scope.as_ref(),
                    exp_s: token.claims.member("exp").and_then(Value::as_i64),
                })
                .collect(),
        })
    }
}

impl UnverifiedToken {
    /// The JWS header.
    pub fn header(&self) -> &JsonObject {
        &self.header
    }

    /// The claims.
    pub fn claims(&self) -> &JsonObject {
        &self.claims
    }

    /// Base64url SHA-256 of the signing input. A child's `par_hash` and a revocation of the hop name the token by it.
    pub fn hop_hash(&self) -> &str {
        &self.hop_hash
    }

    /// The thumbprint of the holder's key, by which `revoke key` names it; `None` if the token holds no readable key.
    pub fn holder_thumbprint(&self) -> Option<String> {
        holder(&self.claims).ok().map(|key| key.thumbprint().to_string())
    }
}
