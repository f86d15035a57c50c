//! What becomes of a call that takes two operators: it waits for the second, or is the second and is carried out.
//!
//! Pure over the row of what waits; a store reads it, calls this and writes what comes out in the transaction of the act, so of two
//! calls that come at once one is the first and the other the second. Who administers is asked in `pap`.

use super::Error;
use super::rules::{at_most, filled};
use crate::model::limits::{ACT_REASON_BYTES_MAX, ID_BYTES_MAX, SECOND_OPERATOR_MS};
use crate::model::mutant::{Mutant, active};
use crate::model::records::{PendingRow, Target};

/// The name under which a store keeps the first half of reinstating a target; short, however long the target's names are.
///
/// # Errors
/// [`Error::Rejected`] for a target that cannot be written.
pub fn name(target: &Target) -> Result<String, Error> {
    if *target == Target::All {
        return Ok("reinstate all".to_owned());
    }
    let text = serde_json::to_string(target)
        .map_err(|error| Error::Rejected(format!("the target `{target}` cannot be stored: {error}")))?;
    let hash = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    Ok(format!("reinstate {} {}", target.kind(), hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
}

/// Operators who administer.
const ADMINISTRATORS_MAX: usize = 65_536;

/// What a call is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Half {
    /// The first: this row waits for another operator.
    First(PendingRow),
    /// The second: the act is done, and nothing waits any more.
    Second,
}

/// Which half a call is, given what waits. A row whose key was revoked since must not be given: it does not count.
///
/// # Errors
/// [`Error::Rejected`] where the operator is the one who asked, or does not administer.
pub fn half(
    pending: Option<&PendingRow>,
    (operator, key): (&str, &str),
    administrators: &[String],
    unix_ms: i64,
) -> Result<Half, Error> {
    let administers = |id: &str| administrators.iter().any(|administrator| administrator == id);
    if !administers(operator) {
        return Err(Error::Rejected(format!("operator `{operator}` does not administer")));
    }
    if active(Mutant::OneOperator) {
        return Ok(Half::Second);
    }
    // A row that waits longer than any can was written by a clock that has fallen since: it does not count.
    let waits = |row: &&PendingRow| (1..=SECOND_OPERATOR_MS).contains(&row.expires_at_unix_ms.saturating_sub(unix_ms));
    match pending.filter(waits).filter(|row| administers(&row.operator)) {
        Some(row) if row.operator == operator && !active(Mutant::SameOperator) => {
            let left_s = row.expires_at_unix_ms.saturating_sub(unix_ms).div_euclid(1000);
            Err(Error::Rejected(format!(
                "operator `{operator}` asked for this already: for {left_s} s more it waits for another operator, who must call too"
            )))
        }
        Some(_) => Ok(Half::Second),
        None => Ok(Half::First(PendingRow {
            operator: operator.to_owned(),
            key: key.to_owned(),
            expires_at_unix_ms: unix_ms.saturating_add(SECOND_OPERATOR_MS),
        })),
    }
}

/// Checks what can be said of such a write without the store's rows; answers how many bytes it brings.
pub(super) fn check(reason: &str, operator: &str, key: &str, administrators: &[String]) -> Result<usize, Error> {
    at_most("bytes in a reason", reason.len(), ACT_REASON_BYTES_MAX)?;
    at_most("bytes in a key's thumbprint", key.len(), ID_BYTES_MAX)?;
    filled("the operator", operator)?;
    at_most("bytes in an operator's id", operator.len(), ID_BYTES_MAX)?;
    at_most("operators who administer", administrators.len(), ADMINISTRATORS_MAX)?;
    administrators.iter().try_for_each(|id| at_most("bytes in an operator's id", id.len(), ID_BYTES_MAX))?;
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
            let pending = pending.map(|(operator, left_ms)| PendingRow {
                operator: operator.into(),
                key: "k".into(),
                expires_at_unix_ms: NOW + left_ms,
            });
            let found = half(pending.as_ref(), (operator, "k"), &administrators, NOW);
            assert_eq!(found.map(|half| half == Half::Second).map_err(|_| ()), expected, "{pending:?} {operator}");
        };
        check(None, "a", Ok(false));
        check(Some(("a", SECOND_OPERATOR_MS)), "b", Ok(true));
        check(Some(("a", 1)), "b", Ok(true));
        check(Some(("a", 0)), "b", Ok(false));
        check(Some(("a", -1)), "a", Ok(false));
        check(Some(("a", 1)), "a", Err(()));
        // Of a clock that was ahead; of one who administers no more; by one who does not.
        check(Some(("a", SECOND_OPERATOR_MS + 1)), "b", Ok(false));
        check(Some(("gone", 1)), "b", Ok(false));
        check(Some(("a", 1)), "gone", Err(()));
    }
}
