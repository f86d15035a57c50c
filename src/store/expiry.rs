//! The expiry of revocations: when a commit may delete the row of a revocation, because the revocation can no longer match
//! anything.
//!
//! A root lives at most [`ROOT_LIFETIME_S_HARD_MAX`](crate::model::limits::ROOT_LIFETIME_S_HARD_MAX) after its `iat`, whatever an
//! issuer's document says now or later. Therefore a longer lifetime in a later document does not revive a root that a deleted row
//! had revoked.
//!
//! Some rows never expire. An issuer may reuse `sid` and `txn` (a refreshed session keeps its `sid`), and a key may be registered
//! again; a deleted row would let them pass again. So the rows of sessions, tasks and keys stay for good, and so does every
//! suspension.
//!
//! Pure code: no engine and no clock.

use super::Error;
use crate::model::limits::REVOCATION_RETENTION_S;
use crate::model::mutant::{Mutant, is_active};
use crate::model::rows::{RevocationRow, RevocationTarget};

/// Rows that one commit may delete.
pub const PRUNED_ROWS_MAX: usize = 4096;

/// Computes when a row may be deleted if it is written at `at_unix_s`, which is the store's clock plus the accepted skew of
/// `iat`. `None` means never.
pub fn expires_at(row: &RevocationRow, at_unix_s: i64) -> Option<i64> {
    if row.suspended {
        return None;
    }
    if row.dead && !matches!(row.target, RevocationTarget::Token(_) | RevocationTarget::Hop(_)) {
        return None;
    }
    // INVARIANT: no root issued at or before `at_unix_s`, or the watermark, is valid by then.
    Some(row.watermark_unix_s.unwrap_or(at_unix_s).max(at_unix_s).saturating_add(REVOCATION_RETENTION_S))
}

/// Whether a row may be deleted at `unix_s`. The rules are evaluated again before the deletion, because the stored expiry alone
/// is not trusted.
pub fn has_expired(row: &RevocationRow, unix_s: i64) -> bool {
    if is_active(Mutant::PruneEarly) {
        return true;
    }
    let at_least = row.watermark_unix_s.unwrap_or(i64::MIN);
    row.expires_at_unix_s.is_some_and(|expiry| expiry < unix_s) && expires_at(row, at_least).is_some_and(|expiry| expiry < unix_s)
}

/// The error of a commit that finds no row to delete.
pub fn nothing_expired_error() -> Error {
    Error::Rejected("no revocation has expired: there is nothing to prune".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_time_makes_moot_lapses() {
        let row = |target: RevocationTarget| RevocationRow {
            target,
            dead: false,
            suspended: false,
            watermark_unix_s: None,
            expires_at_unix_s: None,
            reason: String::new(),
            revision: 1,
        };
        let check = |row: RevocationRow, expected: Option<i64>| assert_eq!(expires_at(&row, 1000), expected, "{row:?}");
        let kept = REVOCATION_RETENTION_S;
        check(RevocationRow { dead: true, ..row(RevocationTarget::Token("t".into())) }, Some(1000 + kept));
        check(RevocationRow { dead: true, ..row(RevocationTarget::Hop("h".into())) }, Some(1000 + kept));
        // An issuer may issue again for the same session, and a key may be registered again.
        check(RevocationRow { dead: true, ..row(RevocationTarget::Session("s".into())) }, None);
        check(RevocationRow { dead: true, ..row(RevocationTarget::Task("t".into())) }, None);
        check(RevocationRow { dead: true, ..row(RevocationTarget::Key("k".into())) }, None);
        let agent = row(RevocationTarget::Agent("a".into()));
        check(RevocationRow { suspended: true, ..agent.clone() }, None);
        check(RevocationRow { suspended: true, watermark_unix_s: Some(5), ..agent.clone() }, None);
        check(RevocationRow { watermark_unix_s: Some(5), ..agent.clone() }, Some(1000 + kept));
        check(RevocationRow { watermark_unix_s: Some(2000), ..agent.clone() }, Some(2000 + kept));
        check(agent.clone(), Some(1000 + kept));
        check(RevocationRow { suspended: true, ..row(RevocationTarget::All) }, None);
        // A forged expiry does not let a row go that must stay.
        let forged = |row: RevocationRow| RevocationRow { expires_at_unix_s: Some(1), ..row };
        assert!(!has_expired(&forged(RevocationRow { suspended: true, ..agent.clone() }), i64::MAX));
        assert!(!has_expired(&forged(RevocationRow { dead: true, ..row(RevocationTarget::Session("s".into())) }), i64::MAX));
        assert!(!has_expired(&forged(RevocationRow { watermark_unix_s: Some(2000), ..agent.clone() }), 2000 + kept));
        assert!(has_expired(&forged(RevocationRow { watermark_unix_s: Some(2000), ..agent }), 2001 + kept));
    }
}
