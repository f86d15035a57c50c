//! Issues tokens: roots, hops and proofs, for the command line, for tests and for load generators.
//!
//! Given claims are signed unchanged, byte for byte, even if verification will refuse them. Only missing claims are added. So this module
//! also makes the invalid tokens that tests need. It must not be used to decide anything.

use bytes::Bytes;
use uuid::{NoContext, Timestamp, Uuid};

use super::jws::{Jws, encode_base64url, sha256};
use super::private_key::PrivateKey;
use super::proof::ProofCall;
use super::{ALGORITHM, PROOF_TYPE, THUMBPRINT_URN_PREFIX, TOKEN_TYPE};
use crate::model::json::{self, JsonObject, Value, write_string};
use crate::model::jwk::PublicKey;
use crate::model::time::ClockReading;

/// Why a token could not be issued. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The claims are not one JSON object.
    #[error("the claims are not one JSON object without duplicate members: {0}")]
    Claims(String),
    /// A root has no `iss`, and the issuer cannot be inferred.
    #[error("the claims have no `iss`: give the issuer's URI")]
    NoIssuer,
    /// The parent chain is empty or cannot be read.
    #[error("the parent chain cannot be read: {0}")]
    Parent(String),
}

/// Signs a root. `claims` is JSON text; missing `jti`, `iat` and `del_depth` are added.
///
/// # Errors
/// [`Error::Claims`] or [`Error::NoIssuer`].
pub fn issue_root(key: &PrivateKey, claims: &str, now: ClockReading) -> Result<String, Error> {
    let given = parse_claims(claims)?;
    if given.member("iss").is_none() {
        return Err(Error::NoIssuer);
    }
    let payload = fill_missing_claims(
        claims,
        &given,
        [("jti", json_string(&new_jti(now))), ("iat", now.unix_s().to_string()), ("del_depth", "0".to_owned())],
    )?;
    Ok(sign_jws(key, &jws_header(TOKEN_TYPE), payload.as_bytes()))
}

/// Signs a hop below `parent_chain`, which starts with the root. `claims` is JSON text; missing `iss`, `jti`, `iat`, `par_hash` and
/// `del_depth` are added.
///
/// # Errors
/// [`Error::Claims`] or [`Error::Parent`].
pub fn issue_hop(key: &PrivateKey, parent_chain: &[Bytes], claims: &str, now: ClockReading) -> Result<String, Error> {
    let given = parse_claims(claims)?;
    let parent = parse_leaf(parent_chain)?;
    let depth = match (given.member("del_depth"), parent.claims.member("del_depth").and_then(Value::as_i64)) {
        (Some(_), _) => String::new(),
        (None, Some(depth)) => depth.saturating_add(1).to_string(),
        (None, None) => return Err(Error::Parent("it has no `del_depth`: give the hop's own".to_owned())),
    };
    let filled = [
        ("iss", json_string(&thumbprint_urn(key.public_key()))),
        ("jti", json_string(&new_jti(now))),
        ("iat", now.unix_s().to_string()),
        ("par_hash", json_string(&encode_base64url(parent.signing_input_sha256()))),
        ("del_depth", depth),
    ];
    let payload = fill_missing_claims(claims, &given, filled)?;
    Ok(sign_jws(key, &jws_header(TOKEN_TYPE), payload.as_bytes()))
}

/// Signs a proof of possession for the leaf of `chain` and one call. The payload is canonical JSON (RFC 8785).
///
/// # Errors
/// [`Error::Parent`] if the leaf cannot be read or has no `jti`.
pub fn sign_proof(
    key: &PrivateKey,
    chain: &[Bytes],
    call: &ProofCall<'_>,
    nonce: Option<&str>,
    now: ClockReading,
) -> Result<String, Error> {
    let leaf = parse_leaf(chain)?;
    let leaf_jti =
        leaf.claims.member("jti").and_then(Value::as_str).ok_or_else(|| Error::Parent("it has no `jti`".to_owned()))?;
    let string = |text: &str| Value::String(text.to_owned());
    let mut members = vec![
        ("jti".to_owned(), Value::String(new_jti(now))),
        ("iat".to_owned(), Value::Number(now.unix_s().into())),
        ("aat_id".to_owned(), string(leaf_jti)),
        ("aat_hash".to_owned(), Value::String(encode_base64url(leaf.signing_input_sha256()))),
        ("aat_tool".to_owned(), string(call.tool)),
        ("hta".to_owned(), Value::Object(call.arguments.clone())),
    ];
    members.extend(call.audience.map(|audience| ("aat_aud".to_owned(), string(audience))));
    members.extend(nonce.map(|nonce| ("nonce".to_owned(), string(nonce))));
    let payload = Value::Object(JsonObject::from_members(members)).to_jcs();
    Ok(sign_jws(key, &jws_header(PROOF_TYPE), payload.as_bytes()))
}

/// Signs `header_json` and `payload` unchanged, as a compact JWS.
pub fn sign_jws(key: &PrivateKey, header_json: &str, payload: &[u8]) -> String {
    let mut jws = format!("{}.{}", encode_base64url(header_json), encode_base64url(payload));
    let signature = encode_base64url(key.sign(jws.as_bytes()));
    jws.push('.');
    jws.push_str(&signature);
    jws
}

/// The canonical JWS header of a token of type `typ`.
pub fn jws_header(typ: &str) -> String {
    format!(r#"{{"alg":"{ALGORITHM}","typ":{}}}"#, json_string(typ))
}

/// The `iss` of a hop that `key` signs: the thumbprint as a URN (RFC 9278).
pub fn thumbprint_urn(key: &PublicKey) -> String {
    format!("{THUMBPRINT_URN_PREFIX}{}", key.thumbprint())
}

/// The value of a child's `par_hash` and of a proof's `aat_hash`: base64url SHA-256 of the token's signing input.
pub fn token_hash(jws: &str) -> String {
    encode_base64url(sha256(jws.rsplit_once('.').map_or(jws, |(signing_input, _)| signing_input).as_bytes()))
}

/// A new token id: UUID version 7 with the time `now`.
pub(super) fn new_jti(now: ClockReading) -> String {
    let seconds = u64::try_from(now.unix_s()).unwrap_or(0);
    let nanoseconds = u32::try_from(now.unix_ns.rem_euclid(1_000_000_000)).unwrap_or(0);
    Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, nanoseconds)).to_string()
}

fn parse_claims(claims: &str) -> Result<JsonObject, Error> {
    json::parse_object(claims.as_bytes()).map_err(|error| Error::Claims(error.to_string()))
}

fn parse_leaf(chain: &[Bytes]) -> Result<Jws<'_>, Error> {
    let leaf = chain.last().ok_or_else(|| Error::Parent("it is empty".to_owned()))?;
    Jws::parse(leaf).map_err(|refused| Error::Parent(refused.message))
}

/// Inserts the missing members before the given ones. The given text stays unchanged.
fn fill_missing_claims<const N: usize>(claims: &str, given: &JsonObject, filled: [(&str, String); N]) -> Result<String, Error> {
    let rest = claims.trim_start().strip_prefix('{').ok_or_else(|| Error::Claims("it does not begin with `{`".to_owned()))?;
    let mut payload = String::with_capacity(claims.len() + 256);
    payload.push('{');
    for (name, value) in filled.iter().filter(|(name, _)| given.member(name).is_none()) {
        payload.push_str(&format!("{}:{value},", json_string(name)));
    }
    if given.is_empty() {
        payload.pop();
        payload.push('}');
    } else {
        payload.push_str(rest);
    }
    Ok(payload)
}

fn json_string(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    write_string(text, &mut json);
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: ClockReading = ClockReading { unix_ns: 1_704_067_200_000_000_000, boot_ns: 0 };

    fn key(seed: u8) -> PrivateKey {
        PrivateKey::from_seed([seed; 32]).unwrap()
    }

    fn payload(jws: &str) -> JsonObject {
        Jws::parse(jws.as_bytes()).unwrap().claims
    }

    #[test]
    fn what_is_missing_is_filled_in_and_what_is_given_is_left() {
        let root = issue_root(&key(1), r#" {"iss":"https://i", "exp":1.50e3 ,"a":9007199254740993} "#, NOW).unwrap();
        let claims = payload(&root);
        assert_eq!(claims.member("iat").and_then(Value::as_i64), Some(1_704_067_200));
        assert_eq!(claims.member("del_depth").and_then(Value::as_i64), Some(0));
        assert!(claims.member("jti").and_then(Value::as_str).is_some_and(|jti| jti.starts_with("018cc251-f400-7")));
        let raw = Jws::parse(root.as_bytes()).unwrap();
        let raw = String::from_utf8(base64_payload(raw.signing_input)).unwrap();
        assert!(raw.ends_with(r#""iss":"https://i", "exp":1.50e3 ,"a":9007199254740993} "#), "{raw}");

        let chain = [Bytes::from(root.clone())];
        let hop = payload(&issue_hop(&key(2), &chain, "{}", NOW).unwrap());
        assert_eq!(hop.member("iss").and_then(Value::as_str), Some(thumbprint_urn(key(2).public_key()).as_str()));
        assert_eq!(hop.member("par_hash").and_then(Value::as_str), Some(token_hash(&root).as_str()));
        assert_eq!(hop.member("del_depth").and_then(Value::as_i64), Some(1));
        let given =
            payload(&issue_hop(&key(2), &chain, r#"{"iss":1,"jti":2,"iat":"x","par_hash":null,"del_depth":7.0}"#, NOW).unwrap());
        assert_eq!(given.len(), 5);
        assert!(given.member("par_hash").is_some_and(|hash| *hash == Value::Null));
    }

    #[test]
    fn what_cannot_be_made() {
        let no_depth = Bytes::from(sign_jws(&key(1), "{}", b"{}"));
        for (made, expected) in [
            (issue_root(&key(1), "{}", NOW), Error::NoIssuer),
            (issue_hop(&key(1), &[], "{}", NOW), Error::Parent("it is empty".to_owned())),
            (issue_hop(&key(1), &[no_depth], "{}", NOW), Error::Parent("it has no `del_depth`: give the hop's own".to_owned())),
        ] {
            assert_eq!(made, Err(expected));
        }
        assert!(matches!(issue_root(&key(1), "[]", NOW), Err(Error::Claims(_))));
    }

    fn base64_payload(signing_input: &[u8]) -> Vec<u8> {
        use base64::Engine as _;
        let payload = signing_input.rsplit(|byte| *byte == b'.').next().unwrap();
        base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap()
    }
}
