//! Keys of operators inside the transaction of an act: one that is revoked signs nothing, and somebody must be left who can sign.
//!
//! Pure over what a store found of those keys; a store asks in the transaction that writes the act, so that a replica which has not heard
//! of a revocation yet lets no revoked key act. Who holds which key, and what they may do, is asked in `pap`. Look next at
//! [`CommitRequest::one_must_sign`].

use super::rules::{at_most, filled, plain};
use super::{CommitRequest, Error};
use crate::model::limits::ID_BYTES_MAX;
use crate::model::records::{RevocationRow, Target};

/// Keys of signers, and of those of whom one must be left.
const KEYS_MAX: usize = 65_536;

/// The keys that a request depends on, each once: those that signed it, and those of which one must be left.
pub fn keys(request: &CommitRequest) -> std::collections::BTreeSet<&str> {
    let signed = request.act.iter().flat_map(|act| &act.keys);
    signed.chain(&request.one_must_sign).map(String::as_str).collect()
}

/// What a revocation of a key is named by.
pub fn target(key: &str) -> Target {
    Target::Key(key.to_owned())
}

/// Whether a key with this row signs nothing any more.
pub fn is_revoked(row: Option<&RevocationRow>) -> bool {
    row.is_some_and(|row| row.dead)
}

/// Refuses an act that a revoked key signed; asked before anything is written.
///
/// # Errors
/// [`Error::SignerRevoked`], naming the key.
pub fn check_signed(request: &CommitRequest, is_revoked: impl Fn(&str) -> bool) -> Result<(), Error> {
    let mut signed = request.act.iter().flat_map(|act| &act.keys);
    match signed.find(|key| is_revoked(key)) {
        Some(key) => Err(Error::SignerRevoked { thumbprint: key.clone() }),
        None => Ok(()),
    }
}

/// Refuses what would leave nobody who can sign; asked after everything is written.
///
/// # Errors
/// [`Error::NobodyLeft`].
pub fn check_left(request: &CommitRequest, is_revoked: impl Fn(&str) -> bool) -> Result<(), Error> {
    let keys = &request.one_must_sign;
    if keys.is_empty() || keys.iter().any(|key| !is_revoked(key)) { Ok(()) } else { Err(Error::NobodyLeft) }
}

/// Checks what can be said without the store's rows.
pub(super) fn check_request(request: &CommitRequest) -> Result<(), Error> {
    at_most("keys of which one must be left", request.one_must_sign.len(), KEYS_MAX)?;
    keys(request).into_iter().try_for_each(|key| {
        filled("a key's thumbprint", key)?;
        plain("a key's thumbprint", key)?;
        at_most("bytes in a key's thumbprint", key.len(), ID_BYTES_MAX)
    })?;
    let signed = request.act.as_ref().map_or(0, |act| act.keys.len());
    at_most("keys of one act", signed, super::rules::SIGNATURES_MAX)
}
