//! Compact JWS (RFC 7515), read strictly: three parts of unpadded base64url, with one JSON object each as header and payload.
//!
//! [`Jws::parse`] trusts nothing. [`Jws::check_header`] compares the header with the requirements of the caller; the header never selects
//! them. The signature covers the exact bytes that were received. Chains, proofs and signed acts are all read here.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{ALGORITHM, Rejection};
use crate::model::constraint::abbreviate;
use crate::model::json::{self, JsonObject, Value};
use crate::model::jwk::PublicKey;
use crate::model::reason::Reason;

/// Header parameters that contain or reference a key. The key that verifies a token never comes from that token.
const KEY_PARAMETERS: &[&str] = &["jwk", "jku", "x5u", "x5c"];

/// A JWS as received, not verified.
pub(super) struct Jws<'a> {
    pub(super) header: JsonObject,
    pub(super) claims: JsonObject,
    /// The signed bytes: header, dot, payload.
    pub(super) signing_input: &'a [u8],
    pub(super) signature: Vec<u8>,
}

impl<'a> Jws<'a> {
    /// Splits the three parts and reads header and payload. The caller limits the size.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Rejection> {
        if bytes.trim_ascii_start().starts_with(b"{") {
            return Err(malformed_token("JSON serialization is not accepted: use compact JWS"));
        }
        let (signing_input, signature) = split_last(bytes).ok_or_else(not_compact)?;
        let (header, payload) = split_last(signing_input).ok_or_else(not_compact)?;
        if header.contains(&b'.') {
            return Err(not_compact());
        }
        Ok(Self {
            header: decode_object(header, "header")?,
            claims: decode_object(payload, "payload")?,
            signing_input,
            signature: decode_base64url(signature, "signature")?,
        })
    }

    /// Checks `alg`, `typ` and `crit`, and refuses keys in the header. The caller checks `kid`.
    pub(super) fn check_header(&self, typ_allowed: impl Fn(&str) -> bool) -> Result<(), Rejection> {
        let found = |name| match self.header.member(name) {
            None => format!("`{name}` in the header is missing"),
            Some(value) => format!("`{name}` in the header is `{}`", abbreviate(value.as_str().unwrap_or("not a string"))),
        };
        let text = |name| self.header.member(name).and_then(Value::as_str);
        if text("alg") != Some(ALGORITHM) {
            return Err(Rejection::new(Reason::TokenAlg, format!("{}: it must be `{ALGORITHM}`", found("alg"))));
        }
        if !text("typ").is_some_and(typ_allowed) {
            return Err(Rejection::new(Reason::TokenType, format!("{}: that type is not accepted here", found("typ"))));
        }
        if self.header.member("crit").is_some() {
            return Err(malformed_token("the header has `crit`: no extension is understood here"));
        }
        match KEY_PARAMETERS.iter().find(|name| self.header.member(name).is_some()) {
            Some(name) => {
                Err(malformed_token(format!("the header has `{name}`: keys come from configuration and the registry only")))
            }
            None => Ok(()),
        }
    }

    /// Whether `key` made the signature.
    pub(super) fn is_signed_by(&self, key: &PublicKey) -> bool {
        key.verifies_signature(self.signing_input, &self.signature)
    }

    /// SHA-256 of the signing input. A hop's `par_hash` and a proof's `aat_hash` contain it.
    pub(super) fn signing_input_sha256(&self) -> [u8; 32] {
        sha256(self.signing_input)
    }
}

/// Prints no content, because a token is a credential.
impl fmt::Debug for Jws<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jws").finish_non_exhaustive()
    }
}

/// Computes SHA-256.
pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().try_into().unwrap_or([0; 32])
}

/// Encodes as unpadded base64url (RFC 7515, section 2).
pub(super) fn encode_base64url(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A [`Reason::TokenMalformed`] rejection without a token index.
pub(super) fn malformed_token(message: impl Into<String>) -> Rejection {
    Rejection::new(Reason::TokenMalformed, message)
}

fn not_compact() -> Rejection {
    malformed_token("not a compact JWS: it must be three parts with two dots")
}

fn split_last(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let dot = bytes.iter().rposition(|byte| *byte == b'.')?;
    Some((bytes.get(..dot)?, bytes.get(dot.checked_add(1)?..)?))
}

fn decode_base64url(part: &[u8], name: &str) -> Result<Vec<u8>, Rejection> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| malformed_token(format!("the {name} is not unpadded base64url")))
}

fn decode_object(part: &[u8], name: &str) -> Result<JsonObject, Rejection> {
    json::parse_object(&decode_base64url(part, name)?).map_err(|error| {
        let reason = if error.is_too_nested() { Reason::TokenTooLarge } else { Reason::TokenMalformed };
        Rejection::new(reason, format!("the {name}: {}", sanitize_message(&error.to_string())))
    })
}

/// Puts a parser's message on one line and cuts it after 200 characters.
fn sanitize_message(message: &str) -> String {
    message.chars().take(200).map(|character| if character.is_control() { ' ' } else { character }).collect()
}
