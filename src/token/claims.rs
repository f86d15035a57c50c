//! The claims of one token: typed facts about this token alone, read from parsed JSON.
//!
//! [`super::verify`] checks the relation between tokens, and the relation to the clock and to the registry.

use std::sync::Arc;

use super::jws::malformed;
use super::{Rejection, TOKEN_TYPE};
use crate::model::constraint::{ArgumentMap, Error as ConstraintError, abridged};
use crate::model::ids::holds_control_character;
use crate::model::json::{Object, Value};
use crate::model::jwk::PublicKey;
use crate::model::limits::ID_BYTES_MAX;
use crate::model::reason::Reason;
use crate::model::request::Scope;

/// Claims that only a root may carry. They describe the user, the application and the session.
pub(super) const ROOT_ONLY: &[&str] =
    &["sub", "sub_iss", "sub_profile", "client_id", "sid", "txn", "acr", "auth_time", "groups", "status"];

/// `type` of the single entry of `authorization_details` (RFC 9396).
const DETAILS_TYPE: &str = "attenuating_agent_token";

/// The claims that every token has.
#[derive(Debug)]
pub(super) struct Claims {
    pub(super) jti: Arc<str>,
    pub(super) issuer: Arc<str>,
    pub(super) iat_s: i64,
    /// `nbf`; the token is not valid before it.
    pub(super) nbf_s: Option<i64>,
    pub(super) exp_s: i64,
    pub(super) holder: PublicKey,
    pub(super) depth: u64,
    pub(super) depth_max: u64,
    pub(super) scope: Scope,
}

impl Claims {
    /// Reads the required claims.
    pub(super) fn read(claims: &Object) -> Result<Self, Rejection> {
        let jti = required_text(claims, "jti")?;
        let issuer = required_text(claims, "iss")?;
        let iat_s = required_integer(claims, "iat")?;
        let exp_s = required_integer(claims, "exp")?;
        if exp_s <= iat_s {
            return Err(malformed("`exp` is not after `iat`"));
        }
        let jwk = claims.member("cnf").and_then(Value::as_object).and_then(|cnf| cnf.member("jwk")).and_then(Value::as_object);
        let holder = PublicKey::from_jwk(jwk.ok_or_else(|| malformed("`cnf.jwk`, the holder's public key, is missing"))?)
            .map_err(|error| malformed(format!("`cnf.jwk`: {error}")))?;
        Ok(Self {
            jti: jti.into(),
            issuer: issuer.into(),
            iat_s,
            nbf_s: not_before(claims)?,
            exp_s,
            holder,
            depth: required_depth(claims, "del_depth")?,
            depth_max: required_depth(claims, "del_max_depth")?,
            scope: scope(claims)?,
        })
    }
}

/// Refuses dates that are not written as integers, because two readers may read a fraction or an exponent as two different times.
pub(super) fn check_dates(claims: &Object) -> Result<(), Rejection> {
    match ["iat", "exp", "nbf", "auth_time"].iter().find(|name| claims.member(name).is_some_and(|date| date.as_i64().is_none())) {
        Some(name) => Err(malformed(format!("`{name}` is not an integer number of seconds"))),
        None => Ok(()),
    }
}

/// Reads a claim that must be a string if it is present. An empty string counts as absent.
pub(super) fn optional_text<'a>(claims: &'a Object, name: &str) -> Result<Option<&'a str>, Rejection> {
    match claims.member(name) {
        None => Ok(None),
        Some(Value::String(text)) if text.len() > ID_BYTES_MAX => {
            Err(Rejection::new(Reason::TokenTooLarge, format!("`{name}` is longer than {ID_BYTES_MAX} bytes")))
        }
        Some(Value::String(text)) => checked(name, text).map(|text| Some(text).filter(|text| !text.is_empty())),
        Some(_) => Err(malformed(format!("`{name}` is not a string"))),
    }
}

/// Refuses control characters in a name.
pub(super) fn checked<'a>(name: &str, text: &'a str) -> Result<&'a str, Rejection> {
    if holds_control_character(text) {
        return Err(malformed(format!("`{name}` holds a control character: `{}`", abridged(text))));
    }
    Ok(text)
}

/// Reads the agent that the token is handed to: `act.sub`. A nested `act` is refused.
pub(super) fn actor(claims: &Object) -> Result<Option<&str>, Rejection> {
    let Some(act) = claims.member("act") else { return Ok(None) };
    let act = act.as_object().ok_or_else(|| malformed("`act` is not an object"))?;
    if act.member("act").is_some() {
        return Err(Rejection::new(Reason::IdentityInHop, "`act` holds another `act`: each token names one agent, its holder"));
    }
    optional_text(act, "sub")
}

/// Reads the groups that the root claims for its user, unchanged.
pub(super) fn groups<'a>(claims: &'a Object) -> Result<Vec<&'a str>, Rejection> {
    let fault = || malformed("`groups` is not a list of strings");
    let Some(groups) = claims.member("groups") else { return Ok(Vec::new()) };
    let group = |group: &'a Value| checked("groups", group.as_str().ok_or_else(fault)?);
    groups.as_array().ok_or_else(fault)?.iter().map(group).collect()
}

/// Reads `nbf` if the token has it.
pub(super) fn not_before(claims: &Object) -> Result<Option<i64>, Rejection> {
    claims.member("nbf").map(|_| required_integer(claims, "nbf")).transpose()
}

fn required_text<'a>(claims: &'a Object, name: &str) -> Result<&'a str, Rejection> {
    optional_text(claims, name)?.ok_or_else(|| malformed(format!("`{name}` is missing or empty")))
}

fn required_integer(claims: &Object, name: &str) -> Result<i64, Rejection> {
    claims.member(name).and_then(Value::as_i64).ok_or_else(|| malformed(format!("`{name}` is missing or not an integer")))
}

fn required_depth(claims: &Object, name: &str) -> Result<u64, Rejection> {
    u64::try_from(required_integer(claims, name)?).map_err(|_| malformed(format!("`{name}` is negative")))
}

fn scope(claims: &Object) -> Result<Scope, Rejection> {
    let entry = match claims.member("authorization_details").and_then(Value::as_array) {
        Some([entry]) => entry.as_object(),
        _ => None,
    };
    let entry = entry.filter(|entry| entry.member("type").and_then(Value::as_str) == Some(DETAILS_TYPE));
    let entry = entry.ok_or_else(|| {
        malformed(format!("`authorization_details` of an `{TOKEN_TYPE}` must be one entry of type `{DETAILS_TYPE}`"))
    })?;
    let tools = entry.member("tools").and_then(Value::as_object);
    let tools = tools.ok_or_else(|| malformed("`authorization_details` has no `tools`, an object"))?;
    let mut granted = Vec::with_capacity(tools.len());
    for (tool, constraints) in tools.iter() {
        let map = ArgumentMap::parse(constraints).map_err(|error| {
            let nested = matches!(error, ConstraintError::TooNested);
            let reason = if nested { Reason::TokenTooLarge } else { Reason::TokenMalformed };
            Rejection::new(reason, format!("tool `{}`: {error}", abridged(tool)))
        })?;
        granted.push((checked("tools", tool)?.into(), map));
    }
    Ok(Scope { tools: granted.into_iter().collect() })
}
