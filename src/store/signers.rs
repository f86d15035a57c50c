//! The signing keys of an act, checked in the act's own transaction: a revoked key signs nothing, and one key that can sign must
//! remain.
//!
//! Pure code over the rows that a store found for those keys. A store checks in the transaction that writes the act, so that a
//! replica that has not yet heard of a revocation lets no revoked key act. `pap` determines who holds a key and what the holder
//! may do. Look next at [`CommitRequest::keep_one_unrevoked`].

use super::request_checks::{check_at_most, check_no_nul, check_not_empty};
use super::{CommitRequest, Error};
use crate::model::limits::ID_BYTES_MAX;
use crate::model::rows::{RevocationRow, RevocationTarget};

/// Limit of the keys that signed, and of the keys of which one must remain.
const KEYS_MAX: usize = 65_536;

/// The keys that a request depends on, each once: the keys that signed it, and the keys of which one must remain.
pub fn required_keys(request: &CommitRequest) -> std::collections::BTreeSet<&str> {
    let signed = request.act.iter().flat_map(|act| &act.keys);
    signed.chain(&request.keep_one_unrevoked).map(String::as_str).collect()
}

/// The target under which a revocation names a key.
pub fn key_target(key: &str) -> RevocationTarget {
    RevocationTarget::Key(key.to_owned())
}

/// Whether a key with this row is revoked for good, so that it signs nothing.
pub fn is_key_revoked(row: Option<&RevocationRow>) -> bool {
    row.is_some_and(|row| row.dead)
}

/// Rejects an act that a revoked key signed. Called before anything is written.
///
/// # Errors
/// [`Error::SignerRevoked`], naming the key.
pub fn check_signers(request: &CommitRequest, is_revoked: impl Fn(&str) -> bool) -> Result<(), Error> {
    let mut signed = request.act.iter().flat_map(|act| &act.keys);
    match signed.find(|key| is_revoked(key)) {
        Some(key) => Err(Error::SignerRevoked { thumbprint: key.clone() }),
        None => Ok(()),
    }
}

/// Rejects a request after which no key could sign. Called after everything is written.
///
/// # Errors
/// [`Error::NoSignerLeft`].
pub fn check_signer_left(request: &CommitRequest, is_revoked: impl Fn(&str) -> bool) -> Result<(), Error> {
    let keys = &request.keep_one_unrevoked;
    if keys.is_empty() || keys.iter().any(|key| !is_revoked(key)) { Ok(()) } else { Err(Error::NoSignerLeft) }
}

/// Checks the keys of a request without reading the store.
pub(super) fn check_request(request: &CommitRequest) -> Result<(), Error> {
    check_at_most("keys of which one must be left", request.keep_one_unrevoked.len(), KEYS_MAX)?;
    required_keys(request).into_iter().try_for_each(|key| {
        check_not_empty("a key's thumbprint", key)?;
        check_no_nul("a key's thumbprint", key)?;
        check_at_most("bytes in a key's thumbprint", key.len(), ID_BYTES_MAX)
    })
}
