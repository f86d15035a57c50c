//! The two-person rule: an act that needs two operators waits for the second operator, or is carried out if this call is the
//! second.
//!
//! Pure code over the pending row. A store reads the row, calls this code and writes the result in the transaction of the act.
//! Therefore, of two simultaneous calls one is the first and the other is the second. `pap` determines who administers.

use super::Error;
use super::request_checks::{check_at_most, check_not_empty};
use crate::model::limits::{ACT_REASON_BYTES_MAX, ID_BYTES_MAX, TWO_PERSON_WINDOW_MS};
use crate::model::mutant::{Mutant, is_active};
use crate::model::rows::{PendingTwoPersonRow, RevocationTarget};

/// The key under which a store keeps the first half of reinstating a target. It is short, however long the names in the target
/// are.
///
/// # Errors
/// [`Error::Rejected`] for a target that cannot be encoded.
pub fn pending_act_key(target: &RevocationTarget) -> Result<String, Error> {
    if *target == RevocationTarget::All {
        return Ok("reinstate all".to_owned());
    }
    let text = serde_json::to_string(target)
        .map_err(|error| Error::Rejected(format!("the target `{target}` cannot be stored: {error}")))?;
    let hash = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    Ok(format!("reinstate {} {}", target.kind(), hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
}

/// Limit of the operators who administer.
const ADMINISTRATORS_MAX: usize = 65_536;

/// The part that a call plays in an act that needs two operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TwoPersonStep {
    /// The call is the first: this row waits for another operator.
    AwaitSecond(PendingTwoPersonRow),
    /// The call is the second: the act is carried out, and the pending row is removed.
    Proceed,
}

/// Determines which half a call is, given the pending row. The caller must not pass a row whose key was revoked in the meantime,
/// because that row does not count.
///
/// # Errors
/// [`Error::Rejected`] if the operator is the one who asked first, or does not administer.
pub fn next_step(
    pending: Option<&PendingTwoPersonRow>,
    (operator, key): (&str, &str),
    administrators: &[String],
    unix_ms: i64,
) -> Result<TwoPersonStep, Error> {
    let administers = |id: &str| administrators.iter().any(|administrator| administrator == id);
    if !administers(operator) {
        return Err(Error::Rejected(format!("operator `{operator}` does not administer")));
    }
    if is_active(Mutant::OneOperator) {
        return Ok(TwoPersonStep::Proceed);
    }
    // A row that waits longer than the maximum was written by a clock that was set back since. It does not count.
    let waits = |row: &&PendingTwoPersonRow| (1..=TWO_PERSON_WINDOW_MS).contains(&row.expires_at_unix_ms.saturating_sub(unix_ms));
    match pending.filter(waits).filter(|row| administers(&row.operator)) {
        Some(row) if row.operator == operator && !is_active(Mutant::SameOperator) => {
            let left_s = row.expires_at_unix_ms.saturating_sub(unix_ms).div_euclid(1000);
            Err(Error::Rejected(format!(
                "operator `{operator}` asked for this already: for {left_s} s more it waits for another operator, who must call too"
            )))
        }
        Some(_) => Ok(TwoPersonStep::Proceed),
        None => Ok(TwoPersonStep::AwaitSecond(PendingTwoPersonRow {
            operator: operator.to_owned(),
            key: key.to_owned(),
            expires_at_unix_ms: unix_ms.saturating_add(TWO_PERSON_WINDOW_MS),
        })),
    }
}

/// Checks the parts of such a write that need no stored row. Returns the size of the write in bytes.
pub(super) fn check_write(reason: &str, operator: &str, key: &str, administrators: &[String]) -> Result<usize, Error> {
    check_at_most("bytes in a reason", reason.len(), ACT_REASON_BYTES_MAX)?;
    check_at_most("bytes in a key's thumbprint", key.len(), ID_BYTES_MAX)?;
    check_not_empty("the operator", operator)?;
    check_at_most("bytes in an operator's id", operator.len(), ID_BYTES_MAX)?;
    check_at_most("operators who administer", administrators.len(), ADMINISTRATORS_MAX)?;
    administrators.iter().try_for_each(|id| check_at_most("bytes in an operator's id", id.len(), ID_BYTES_MAX))?;
    Ok(administrators.iter().map(String::len).sum::<usize>().saturating_add(reason.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_different_operators_in_time() {
        const NOW: i64 = 1_000_000_000;
        let administrators = ["a".to_owned(), "b".to_owned()];
        let check = |pending: Option<(&str, i64)>, operator: &str, expected: Result<bool, ()>| {
            let pending = pending.map(|(operator, left_ms)| PendingTwoPersonRow {
                operator: operator.into(),
                key: "k".into(),
                expires_at_unix_ms: NOW + left_ms,
            });
            let found = next_step(pending.as_ref(), (operator, "k"), &administrators, NOW);
            assert_eq!(found.map(|half| half == TwoPersonStep::Proceed).map_err(|_| ()), expected, "{pending:?} {operator}");
        };
        check(None, "a", Ok(false));
        check(Some(("a", TWO_PERSON_WINDOW_MS)), "b", Ok(true));
        check(Some(("a", 1)), "b", Ok(true));
        check(Some(("a", 0)), "b", Ok(false));
        check(Some(("a", -1)), "a", Ok(false));
        check(Some(("a", 1)), "a", Err(()));
        // The pending row was dated by a clock that was ahead; its operator no longer administers; the caller does not
        // administer.
        check(Some(("a", TWO_PERSON_WINDOW_MS + 1)), "b", Ok(false));
        check(Some(("gone", 1)), "b", Ok(false));
        check(Some(("a", 1)), "gone", Err(()));
    }
}
