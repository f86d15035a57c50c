//! The checks that the rules of several kinds of requests share: names, texts and counts within their limits.
//!
//! Look next at `write_rules.rs`, which checks whole requests.

use super::Error;
use crate::model::limits::{ACT_REASON_BYTES_MAX, ID_BYTES_MAX};
use crate::model::rows::RevocationTarget;

/// Rejects more than `max` of something.
pub(super) fn check_at_most(what: &str, count: usize, max: usize) -> Result<(), Error> {
    if count > max { Err(Error::Rejected(format!("{count} {what}: at most {max} are taken"))) } else { Ok(()) }
}

/// Rejects an empty name.
pub(super) fn check_not_empty(what: &str, text: &str) -> Result<(), Error> {
    if text.is_empty() { Err(Error::Rejected(format!("{what} is empty: name it"))) } else { Ok(()) }
}

/// Rejects a NUL character, which not every engine can store in a text.
pub(super) fn check_no_nul(what: &str, text: &str) -> Result<(), Error> {
    if text.contains('\0') { Err(Error::Rejected(format!("{what} holds a NUL character: leave it out"))) } else { Ok(()) }
}

/// Checks the target and the reason of a write. Returns their size in bytes.
pub(super) fn check_target(target: &RevocationTarget, reason: &str) -> Result<usize, Error> {
    check_at_most("bytes in a reason", reason.len(), ACT_REASON_BYTES_MAX)?;
    check_no_nul("a reason", reason)?;
    let mut bytes = reason.len();
    for part in target.key_parts() {
        check_not_empty("a revocation's target", part)?;
        check_at_most("bytes in a revocation's target", part.len(), ID_BYTES_MAX)?;
        bytes = bytes.saturating_add(part.len());
    }
    Ok(bytes)
}
