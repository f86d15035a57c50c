//! The claims of one token: typed facts about this token alone, read from parsed JSON.
//!
//! [`super::verify`] checks the tokens against each other, against the clock and against the agent registry.

use std::sync::Arc;

use super::jws::malformed_token;
use super::{Rejection, TOKEN_TYPE};
use crate::model::constraint::{ConstraintMap, Error as ConstraintError, abbreviate};
use crate::model::ids::contains_control_character;
use crate::model::json::{JsonObject, Value};
use crate::model::jwk::PublicKey;
use crate::model::limits::ID_BYTES_MAX;
use crate::model::reason::Reason;
use crate::model::request::TokenScope;

/// Claims that only a root may carry. They describe the user, the application and the session.
pub(super) const ROOT_ONLY_CLAIMS: &[&str] =
    &["sub", "sub_iss", "sub_profile", "client_id", "sid", "txn", "acr", "auth_time", "groups", "status"];

/// `type` of the single entry of `authorization_details` (RFC 9396).
const DETAILS_TYPE: &str = "attenuating_agent_token";

/// The claims that every token has.
#[derive(Debug)]
pub(super) struct TokenClaims {
    pub(super) jti: Arc<str>,
    pub(super) issuer: Arc<str>,
    pub(super) iat_s: i64,
    /// `nbf`; the token is not valid before it.
    pub(super) nbf_s: Option<i64>,
    pub(super) exp_s: i64,
    pub(super) holder: PublicKey,
    pub(super) depth: u64,
    pub(super) depth_max: u64,
    pub(super) scope: TokenScope,
}

impl TokenClaims {
    /// Reads the required claims.
    pub(super) fn read(claims: &JsonObject) -> Result<Self, Rejection> {
        let jti = required_text(claims, "jti")?;
        let issuer = required_text(claims, "iss")?;
        let iat_s = required_integer(claims, "iat")?;
        let exp_s = required_integer(claims, "exp")?;
        if exp_s <= iat_s {
            return Err(malformed_token("`exp` is not after `iat`"));
        }
        let holder = holder(claims)?;
        Ok(Self {
            jti: jti.into(),
            issuer: issuer.into(),
            iat_s,
            nbf_s: read_not_before(claims)?,
            exp_s,
            holder,
            depth: required_depth(claims, "del_depth")?,
            depth_max: required_depth(claims, "del_max_depth")?,
            scope: read_scope(claims)?,
        })
    }
}

/// The public key of the token's holder.
pub(super) fn holder(claims: &JsonObject) -> Result<PublicKey, Rejection> {
    let jwk = claims.member("cnf").and_then(Value::as_object).and_then(|cnf| cnf.member("jwk")).and_then(Value::as_object);
    PublicKey::from_jwk(jwk.ok_or_else(|| malformed_token("`cnf.jwk`, the holder's public key, is missing"))?)
        .map_err(|error| malformed_token(format!("`cnf.jwk`: {error}")))
}

/// Refuses dates that are not written as integers, because two readers may read a fraction or an exponent as two different times.
pub(super) fn check_dates(claims: &JsonObject) -> Result<(), Rejection> {
    match ["iat", "exp", "nbf", "auth_time"].iter().find(|name| claims.member(name).is_some_and(|date| date.as_i64().is_none())) {
        Some(name) => Err(malformed_token(format!("`{name}` is not an integer number of seconds"))),
        None => Ok(()),
    }
}

/// Reads a claim that must be a string if it is present. An empty string counts as absent.
pub(super) fn optional_text<'a>(claims: &'a JsonObject, name: &str) -> Result<Option<&'a str>, Rejection> {
    match claims.member(name) {
        None => Ok(None),
        Some(Value::String(text)) if text.len() > ID_BYTES_MAX => {
            Err(Rejection::new(Reason::TokenTooLarge, format!("`{name}` is longer than {ID_BYTES_MAX} bytes")))
        }
        Some(Value::String(text)) => check_printable(name, text).map(|text| Some(text).filter(|text| !text.is_empty())),
        Some(_) => Err(malformed_token(format!("`{name}` is not a string"))),
    }
}

/// Refuses control characters in a name.
pub(super) fn check_printable<'a>(name: &str, text: &'a str) -> Result<&'a str, Rejection> {
    if contains_control_character(text) {
        return Err(malformed_token(format!("`{name}` holds a control character: `{}`", abbreviate(text))));
    }
    Ok(text)
}

/// Reads the agent that the token is handed to: `act.sub`. A nested `act` is refused.
pub(super) fn read_actor(claims: &JsonObject) -> Result<Option<&str>, Rejection> {
    let Some(act) = claims.member("act") else { return Ok(None) };
    let act = act.as_object().ok_or_else(|| malformed_token("`act` is not an object"))?;
    if act.member("act").is_some() {
        return Err(Rejection::new(Reason::IdentityInHop, "`act` holds another `act`: each token names one agent, its holder"));
    }
    optional_text(act, "sub")
}

/// Reads the groups that the root claims for its user, unchanged.
pub(super) fn read_groups<'a>(claims: &'a JsonObject) -> Result<Vec<&'a str>, Rejection> {
    let fault = || malformed_token("`groups` is not a list of strings");
    let Some(groups) = claims.member("groups") else { return Ok(Vec::new()) };
    let group = |group: &'a Value| check_printable("groups", group.as_str().ok_or_else(fault)?);
    groups.as_array().ok_or_else(fault)?.iter().map(group).collect()
}

/// Reads `nbf` if the token has it.
pub(super) fn read_not_before(claims: &JsonObject) -> Result<Option<i64>, Rejection> {
    claims.member("nbf").map(|_| required_integer(claims, "nbf")).transpose()
}

fn required_text<'a>(claims: &'a JsonObject, name: &str) -> Result<&'a str, Rejection> {
    optional_text(claims, name)?.ok_or_else(|| malformed_token(format!("`{name}` is missing or empty")))
}

fn required_integer(claims: &JsonObject, name: &str) -> Result<i64, Rejection> {
    claims.member(name).and_then(Value::as_i64).ok_or_else(|| malformed_token(format!("`{name}` is missing or not an integer")))
}

fn required_depth(claims: &JsonObject, name: &str) -> Result<u64, Rejection> {
    u64::try_from(required_integer(claims, name)?).map_err(|_| malformed_token(format!("`{name}` is negative")))
}

fn read_scope(claims: &JsonObject) -> Result<TokenScope, Rejection> {
    let entry = match claims.member("authorization_details").and_then(Value::as_array) {
        Some([entry]) => entry.as_object(),
        _ => None,
    };
    let entry = entry.filter(|entry| entry.member("type").and_then(Value::as_str) == Some(DETAILS_TYPE));
    let entry = entry.ok_or_else(|| {
        malformed_token(format!("`authorization_details` of an `{TOKEN_TYPE}` must be one entry of type `{DETAILS_TYPE}`"))
    })?;
    let tools = entry.member("tools").and_then(Value::as_object);
    let tools = tools.ok_or_else(|| malformed_token("`authorization_details` has no `tools`, an object"))?;
    let mut granted = Vec::with_capacity(tools.len());
    for (tool, constraints) in tools.iter() {
        let map = ConstraintMap::parse(constraints).map_err(|error| {
            let nested = matches!(error, ConstraintError::TooNested);
            let reason = if nested { Reason::TokenTooLarge } else { Reason::TokenMalformed };
            Rejection::new(reason, format!("tool `{}`: {error}", abbreviate(tool)))
        })?;
        granted.push((check_printable("tools", tool)?.into(), map));
    }
    Ok(TokenScope { tools: granted.into_iter().collect() })
}
