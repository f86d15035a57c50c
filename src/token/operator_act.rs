//! Signed acts of operators: one short-lived signature for one administrative call.
//!
//! The signature binds the operator's key to the store's history, the method and the exact message. This module does not know the
//! operators. The caller looks up the key named by [`UnverifiedAct::thumbprint`], checks that the operator's roles allow the method, and
//! stores the `jti` as used.

use std::sync::Arc;

use super::issue::{jws_header, new_jti, sign_jws};
use super::jws::{Jws, encode_base64url, sha256};
use super::private_key::PrivateKey;
use super::{Rejection, THUMBPRINT_URN_PREFIX, claims};
use crate::model::ids::Thumbprint;
use crate::model::json::{JsonObject, Value};
use crate::model::jwk::PublicKey;
use crate::model::limits::{IAT_SKEW_S, OPERATOR_JWS_BYTES_MAX, OPERATOR_JWS_LIFETIME_S_MAX};
use crate::model::reason::Reason;
use crate::model::time::ClockReading;

/// `typ` of an operator's signature.
pub const OPERATOR_TYPE: &str = "operator+jwt";

/// Maximum size of a `jti`, because it becomes a row of the store.
const JTI_BYTES_MAX: usize = 128;

/// Why a signature does not authorize the call. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The signature is not a compact JWS with the required claims.
    #[error("the operator's signature is malformed: {0}")]
    Malformed(String),
    /// The signature is larger than [`OPERATOR_JWS_BYTES_MAX`].
    #[error("the operator's signature has more than {OPERATOR_JWS_BYTES_MAX} bytes")]
    TooLarge,
    /// The algorithm is not `Ed25519`.
    #[error("the operator's signature: {0}")]
    Algorithm(String),
    /// The type is not `operator+jwt`.
    #[error("the operator's signature: {0}")]
    Type(String),
    /// The signature names another key than the one that it is verified with.
    #[error("`iss` of the operator's signature is not the thumbprint URN of this key")]
    Key,
    /// The signature does not verify.
    #[error("the operator's signature does not verify")]
    Signature,
    /// The signature is for another store.
    #[error("`aud` of the operator's signature is not this store's history id")]
    Audience,
    /// The signature is for another method.
    #[error("`htm` of the operator's signature is not this method")]
    Method,
    /// The signature is for another message.
    #[error("`hth` of the operator's signature is not the hash of this message")]
    Message,
    /// `iat` lies too far in the future.
    #[error("the operator's signature is not valid yet: compare the clocks")]
    NotYetValid,
    /// `exp` has passed.
    #[error("the operator's signature has expired: sign again")]
    Expired,
    /// The time from `iat` to `exp` is too long.
    #[error("the operator's signature lives more than {OPERATOR_JWS_LIFETIME_S_MAX} s")]
    Lifetime,
}

/// The administrative call that a signature must be for.
#[derive(Clone, Copy, Debug)]
pub struct AdminCall<'a> {
    /// The id of the store's history.
    pub audience: &'a str,
    /// Full gRPC method path, `/portcullis.v1.PolicyService/Apply`.
    pub method: &'a str,
    /// The bytes of the request message, as sent and as received.
    pub message: &'a [u8],
}

/// Signs a call. The signature is valid for [`OPERATOR_JWS_LIFETIME_S_MAX`] seconds.
pub fn sign_act(key: &PrivateKey, act: &AdminCall<'_>, now: ClockReading) -> String {
    let text = |text: &str| Value::String(text.to_owned());
    let claims = JsonObject::from_members([
        ("iss".to_owned(), Value::String(super::issue::thumbprint_urn(key.public_key()))),
        ("aud".to_owned(), text(act.audience)),
        ("iat".to_owned(), Value::Number(now.unix_s().into())),
        ("exp".to_owned(), Value::Number(now.unix_s().saturating_add(OPERATOR_JWS_LIFETIME_S_MAX).into())),
        ("jti".to_owned(), Value::String(new_jti(now))),
        ("htm".to_owned(), text(act.method)),
        ("hth".to_owned(), Value::String(encode_base64url(sha256(act.message)))),
    ]);
    sign_jws(key, &jws_header(OPERATOR_TYPE), Value::Object(claims).to_jcs().as_bytes())
}

/// A signature as received. Only its form is checked.
#[derive(Debug)]
pub struct UnverifiedAct<'a> {
    jws: Jws<'a>,
    thumbprint: Thumbprint,
    jti: Arc<str>,
    iat_s: i64,
    exp_s: i64,
}

/// A signature that is valid for a key, a call and a time. Only [`UnverifiedAct`] constructs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedAct {
    jti: Arc<str>,
    exp_s: i64,
    thumbprint: Thumbprint,
}

impl<'a> UnverifiedAct<'a> {
    /// Reads a compact JWS.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Malformed`], [`Error::Algorithm`] or [`Error::Type`].
    pub fn parse(jws: &'a [u8]) -> Result<Self, Error> {
        if jws.len() > OPERATOR_JWS_BYTES_MAX {
            return Err(Error::TooLarge);
        }
        let jws = Jws::parse(jws).map_err(act_error)?;
        claims::check_dates(&jws.claims).map_err(act_error)?;
        jws.check_header(|typ| typ == OPERATOR_TYPE).map_err(act_error)?;
        let missing = |name: &str| Error::Malformed(format!("`{name}` is missing or empty"));
        let text = |name: &str| claims::optional_text(&jws.claims, name).map_err(act_error)?.ok_or_else(|| missing(name));
        let date = |name: &str| jws.claims.member(name).and_then(Value::as_i64).ok_or_else(|| missing(name));
        let thumbprint = text("iss")?.strip_prefix(THUMBPRINT_URN_PREFIX);
        let thumbprint = thumbprint.ok_or_else(|| Error::Malformed("`iss` is not a thumbprint URN".to_owned()))?.into();
        let jti = text("jti")?;
        if jti.len() > JTI_BYTES_MAX {
            return Err(Error::Malformed(format!("`jti` is longer than {JTI_BYTES_MAX} bytes")));
        }
        let (jti, iat_s, exp_s) = (jti.into(), date("iat")?, date("exp")?);
        if exp_s <= iat_s {
            return Err(Error::Malformed("`exp` is not after `iat`".to_owned()));
        }
        Ok(Self { jws, thumbprint, jti, iat_s, exp_s })
    }

    /// Thumbprint of the key that the signature names. The caller looks up the operator by it. It is not verified yet.
    pub fn thumbprint(&self) -> &Thumbprint {
        &self.thumbprint
    }

    /// Verifies that `key` made this signature for the call `expected`, and that the signature is valid at `now`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn verify(&self, key: &PublicKey, expected: &AdminCall<'_>, now: ClockReading) -> Result<VerifiedAct, Error> {
        let verified = self.verify_without_message(key, expected.audience, expected.method, now)?;
        if self.text("hth") != Some(&encode_base64url(sha256(expected.message))) {
            return Err(Error::Message);
        }
        Ok(verified)
    }

    /// Verifies everything except the hash of the message. Use it before the message has arrived.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn verify_without_message(
        &self,
        key: &PublicKey,
        audience: &str,
        method: &str,
        now: ClockReading,
    ) -> Result<VerifiedAct, Error> {
        if self.thumbprint != *key.thumbprint() {
            return Err(Error::Key);
        }
        if !self.jws.is_signed_by(key) {
            return Err(Error::Signature);
        }
        if self.iat_s > now.unix_s().saturating_add(IAT_SKEW_S) {
            return Err(Error::NotYetValid);
        }
        if now.unix_s() >= self.exp_s {
            return Err(Error::Expired);
        }
        if self.exp_s.saturating_sub(self.iat_s) > OPERATOR_JWS_LIFETIME_S_MAX {
            return Err(Error::Lifetime);
        }
        if self.text("aud") != Some(audience) {
            return Err(Error::Audience);
        }
        if self.text("htm") != Some(method) {
            return Err(Error::Method);
        }
        Ok(VerifiedAct { jti: Arc::clone(&self.jti), exp_s: self.exp_s, thumbprint: self.thumbprint.clone() })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.jws.claims.member(name).and_then(Value::as_str)
    }
}

impl VerifiedAct {
    /// The `jti`. The store keeps it as used, together with the act.
    pub fn jti(&self) -> &str {
        &self.jti
    }

    /// `exp` in seconds since the Unix epoch. The `jti` must be remembered until then.
    pub fn exp_s(&self) -> i64 {
        self.exp_s
    }

    /// Thumbprint of the key that signed.
    pub fn thumbprint(&self) -> &Thumbprint {
        &self.thumbprint
    }
}

fn act_error(refused: Rejection) -> Error {
    match refused.reason {
        Reason::TokenAlg => Error::Algorithm(refused.message),
        Reason::TokenType => Error::Type(refused.message),
        _ => Error::Malformed(refused.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: ClockReading = ClockReading { unix_ns: 1_704_067_200_000_000_000, boot_ns: 0 };
    const CALL: AdminCall<'static> =
        AdminCall { audience: "h1", method: "/portcullis.v1.PolicyService/Apply", message: b"\x0a\x01x" };

    fn key(seed: u8) -> PrivateKey {
        PrivateKey::from_seed([seed; 32]).unwrap()
    }

    fn later(seconds: i64) -> ClockReading {
        ClockReading { unix_ns: NOW.unix_ns + seconds * 1_000_000_000, boot_ns: 0 }
    }

    fn check(jws: &str, key: &PublicKey, call: &AdminCall<'_>, now: ClockReading, expected: Result<(), Error>) {
        let verified = UnverifiedAct::parse(jws.as_bytes()).and_then(|act| act.verify(key, call, now));
        match (verified, expected) {
            (Ok(act), Ok(())) => assert_eq!(act.thumbprint(), key.thumbprint()),
            (Err(error), Err(expected)) => {
                assert_eq!(std::mem::discriminant(&error), std::mem::discriminant(&expected), "{error}: {jws}");
            }
            (verified, expected) => panic!("{verified:?}, not {expected:?}: {jws}"),
        }
    }

    #[test]
    fn a_signature_is_for_one_call_for_a_minute() {
        let jws = sign_act(&key(1), &CALL, NOW);
        let (own, foreign) = (key(1), key(2));
        let own = own.public_key();
        for (key, call, now, expected) in [
            (own, CALL, NOW, Ok(())),
            (own, CALL, later(59), Ok(())),
            (own, CALL, later(-30), Ok(())),
            (own, CALL, later(60), Err(Error::Expired)),
            (own, CALL, later(-31), Err(Error::NotYetValid)),
            (foreign.public_key(), CALL, NOW, Err(Error::Key)),
            (own, AdminCall { audience: "h2", ..CALL }, NOW, Err(Error::Audience)),
            (own, AdminCall { method: "/portcullis.v1.PolicyService/Get", ..CALL }, NOW, Err(Error::Method)),
            (own, AdminCall { message: b"\x0a\x01y", ..CALL }, NOW, Err(Error::Message)),
        ] {
            check(&jws, key, &call, now, expected);
        }
        assert_ne!(jws, sign_act(&key(1), &CALL, NOW), "each signature has a `jti` of its own");
    }

    #[test]
    fn refused() {
        let urn = super::super::issue::thumbprint_urn(key(1).public_key());
        let hth = encode_base64url(sha256(CALL.message));
        let iat = NOW.unix_s();
        let claims = format!(
            r#"{{"iss":"{urn}","aud":"h1","iat":{iat},"exp":{},"jti":"j","htm":"{}","hth":"{hth}"}}"#,
            iat + 60,
            CALL.method
        );
        let good = jws_header(OPERATOR_TYPE);
        let malformed = || Err(Error::Malformed(String::new()));
        for (header, claims, expected) in [
            (good.clone(), claims.clone(), Ok(())),
            (good.replace("Ed25519", "EdDSA"), claims.clone(), Err(Error::Algorithm(String::new()))),
            (good.replace("operator", "aat"), claims.clone(), Err(Error::Type(String::new()))),
            (good.replace('}', r#","crit":[]}"#), claims.clone(), malformed()),
            (good.replace('}', r#","jwk":{}}"#), claims.clone(), malformed()),
            (good.clone(), claims.replace(&format!("{}", iat + 60), &format!("{}", iat + 61)), Err(Error::Lifetime)),
            (good.clone(), claims.replace(&format!("{}", iat + 60), "9223372036854775807"), Err(Error::Lifetime)),
            (good.clone(), claims.replace(&format!("{}", iat + 60), &iat.to_string()), malformed()),
            (good.clone(), claims.replace(&format!("{iat},"), &format!("{iat}.0,")), malformed()),
            (good.clone(), claims.replace("\"jti\":\"j\"", "\"jti\":\"\""), malformed()),
            (good.clone(), claims.replace("\"j\"", &format!("\"{}\"", "j".repeat(128))), Ok(())),
            (good.clone(), claims.replace("\"j\"", &format!("\"{}\"", "j".repeat(129))), malformed()),
            (good.clone(), claims.replace("urn:", "url:"), malformed()),
            (good.clone(), claims.replace("\"aud\":\"h1\"", "\"aud\":[\"h1\"]"), Err(Error::Audience)),
            (
                good.clone(),
                claims.replace("{\"iss\"", &format!("{{\"pad\":\"{}\",\"iss\"", "x".repeat(4096))),
                Err(Error::TooLarge),
            ),
        ] {
            check(&sign_jws(&key(1), &header, claims.as_bytes()), key(1).public_key(), &CALL, NOW, expected);
        }
        check(&sign_jws(&key(2), &good, claims.as_bytes()), key(1).public_key(), &CALL, NOW, Err(Error::Signature));
        // The longest that is read. Base64url has no text of 4n + 1 characters, so the header takes a space more.
        let spaced = good.replacen(':', ": ", 1);
        let padded = |pad: usize| {
            let claims = claims.replace("{\"iss\"", &format!("{{\"pad\":\"{}\",\"iss\"", "x".repeat(pad)));
            sign_jws(&key(1), &spaced, claims.as_bytes())
        };
        let room = (OPERATOR_JWS_BYTES_MAX - padded(0).len()) / 4 * 3;
        let longest = (room..).map(padded).find(|jws| jws.len() >= OPERATOR_JWS_BYTES_MAX).unwrap();
        assert_eq!(longest.len(), OPERATOR_JWS_BYTES_MAX);
        check(&longest, key(1).public_key(), &CALL, NOW, Ok(()));
    }
}
