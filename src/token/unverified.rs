//! A chain that was only read: for `token inspect`, and for nothing that decides.

use bytes::Bytes;

use super::claims::{Claims, actor};
use super::jws::{Jws, encode};
use super::{Rejection, sentence};
use crate::model::json::{Object, Value};
use crate::model::request::Scope;

/// A chain of which nothing is proved: whoever sent it wrote it.
#[derive(Debug)]
pub struct UnverifiedChain {
    tokens: Vec<UnverifiedToken>,
}

/// One token as it was written.
#[derive(Debug)]
pub struct UnverifiedToken {
    header: Object,
    claims: Object,
    hop_hash: String,
}

impl UnverifiedChain {
    /// Takes the tokens apart, root first. The caller limits the size.
    ///
    /// # Errors
    /// [`crate::model::reason::Reason::TokenMalformed`] for the first token that is not a compact JWS of two JSON objects.
    pub fn parse(chain: &[Bytes]) -> Result<Self, Rejection> {
        let read = |(hop, token): (usize, &Bytes)| {
            let token = Jws::parse(token).map_err(|refused| refused.at(hop))?;
            let hop_hash = encode(token.signing_input_sha256());
            Ok(UnverifiedToken { header: token.header, claims: token.claims, hop_hash })
        };
        Ok(Self { tokens: chain.iter().enumerate().map(read).collect::<Result<_, Rejection>>()? })
    }

    /// The tokens, root first.
    pub fn tokens(&self) -> &[UnverifiedToken] {
        &self.tokens
    }

    /// What the chain says in words, as far as it says it.
    pub fn sentence(&self) -> String {
        let root = self.tokens.first();
        let text = |name| root.and_then(|root| root.claims.member(name)).and_then(Value::as_str);
        let scopes: Vec<Option<Scope>> =
            self.tokens.iter().map(|token| Claims::read(&token.claims).ok().map(|claims| claims.scope)).collect();
        sentence::write(&sentence::Story {
            issuer: text("iss"),
            user: text("sub"),
            application: text("client_id"),
            session: text("sid"),
            task: text("txn"),
            levels: self
                .tokens
                .iter()
                .zip(&scopes)
                .map(|(token, scope)| sentence::Part {
                    agent: actor(&token.claims).ok().flatten(),
                    scope: scope.as_ref(),
                    exp_s: token.claims.member("exp").and_then(Value::as_i64),
                })
                .collect(),
        })
    }
}

impl UnverifiedToken {
    /// The header.
    pub fn header(&self) -> &Object {
        &self.header
    }

    /// The claims.
    pub fn claims(&self) -> &Object {
        &self.claims
    }

    /// Base64url SHA-256 of the signing input: what a child's `par_hash` and a revocation name it by.
    pub fn hop_hash(&self) -> &str {
        &self.hop_hash
    }
}
