//! The rules of writes: how a write changes the row of its target, and the limits of a request. They are the same for every
//! store.
//!
//! Pure functions over rows: no engine and no clock. Look next at `sqlite/write.rs`, which calls them inside a transaction.

use super::request_checks::{check_at_most, check_no_nul, check_not_empty, check_target};
use super::{CommitRequest, Error, Settings, approval_rules, expiry, lineage, signers, two_person};
use crate::model::limits::{
    ACT_REASON_BYTES_MAX, ACT_SUMMARY_BYTES_MAX, ID_BYTES_MAX, OPERATOR_JWS_BYTES_MAX, POLICY_FILE_BYTES_MAX,
};
use crate::model::rows::{ActRow, DocumentKey, DocumentRow, RevocationKind, RevocationRow, RevocationTarget, StoreWrite};

/// Writes in one commit; also the limit of its expectations.
pub const WRITES_MAX: usize = 65_536;
/// Bytes of all texts of one commit's writes.
pub const COMMIT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Bytes of the path of a document's file.
pub const PATH_BYTES_MAX: usize = 4096;
/// Bytes of an act's method.
pub const METHOD_BYTES_MAX: usize = 256;
/// Operators of one act; also the limit of its signatures and of its `jti`s.
pub const SIGNATURES_MAX: usize = 8;
/// Commits in one answer of `changes`.
pub const CHANGES_COMMITS_MAX: usize = 4096;
/// Stored bytes after which an answer of `changes` ends. It holds at least one commit.
pub const CHANGES_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Commits in one answer of `history`.
pub const HISTORY_LISTED_MAX: usize = 1000;
/// Rows in one answer of `revocations`.
pub const REVOCATIONS_LISTED_MAX: usize = 100_000;

/// Allocates an empty list for `count` rows, up to a limit, because the count was read from the store and is not trusted. Without
/// it, a list of millions of rows would be copied each time that it grows, and the copies would dominate the cost.
pub(super) fn rows_with_capacity<T>(count: u64) -> Vec<T> {
    const ROWS_MAX: usize = 1 << 24;
    let mut rows = Vec::new();
    // If the reservation fails, the list grows as it is filled.
    let _ = rows.try_reserve_exact(usize::try_from(count).unwrap_or(ROWS_MAX).min(ROWS_MAX));
    rows
}

/// Checks a request without reading the store.
///
/// # Errors
/// [`Error::Rejected`], naming the part that is empty, too long, too numerous or meaningless.
pub fn check_request(request: &CommitRequest) -> Result<(), Error> {
    if request.writes.is_empty() && request.act.is_none() {
        return Err(Error::Rejected("the commit holds neither a write nor an act: leave it out".to_owned()));
    }
    check_at_most("writes in one commit", request.writes.len(), WRITES_MAX)?;
    check_at_most("expectations in one commit", request.expected.len(), WRITES_MAX)?;
    request.expected.iter().try_for_each(|(key, _)| check_key(key))?;
    let alone = |write: &&StoreWrite| matches!(write, StoreWrite::Prune { .. } | StoreWrite::Adopt { .. } | StoreWrite::Merge(_));
    if request.writes.len() > 1 && request.writes.iter().any(|write| alone(&write)) {
        let message = "a prune, an adoption or a merge is the only write of its commit: commit the others apart";
        return Err(Error::Rejected(message.to_owned()));
    }
    if request.act.is_none() && request.writes.iter().any(|write| matches!(write, StoreWrite::Adopt { .. })) {
        return Err(Error::Rejected("an adoption is an operator's act: sign it".to_owned()));
    }
    let mut bytes = 0usize;
    for write in &request.writes {
        bytes = bytes.saturating_add(check_write(write)?);
    }
    check_at_most("bytes in one commit", bytes, COMMIT_BYTES_MAX)?;
    signers::check_request(request)?;
    request.act.as_ref().map_or(Ok(()), check_act)
}

/// Checks the settings of a new store: a skew of 0 to 300 seconds, a bound of 1 to 60 seconds.
///
/// # Errors
/// [`Error::Rejected`], naming the setting.
pub fn check_settings(settings: Settings) -> Result<(), Error> {
    let Settings { iat_skew_s, freshness_bound_ms } = settings;
    if !(0..=300).contains(&iat_skew_s) {
        return Err(Error::Rejected(format!("the skew of `iat` is {iat_skew_s} s: 0 to 300 are taken")));
    }
    if !(1_000..=60_000).contains(&freshness_bound_ms) {
        return Err(Error::Rejected(format!("the freshness bound is {freshness_bound_ms} ms: 1000 to 60000 are taken")));
    }
    Ok(())
}

/// Computes the row of a target after a revocation; returns the current row if nothing changes. [`super::expiry`] determines when
/// the row may be deleted.
///
/// A target that can be reinstated is suspended or gets a watermark; every other target becomes dead. `watermark_unix_s` is the
/// store's clock plus the accepted skew. It is used for [`RevocationKind::Watermark`], and for the expiry of the row.
///
/// # Errors
/// [`Error::Rejected`] if targets of this type cannot be revoked with this `kind`.
pub fn revoke_row(
    current: Option<RevocationRow>,
    target: &RevocationTarget,
    kind: RevocationKind,
    reason: &str,
    number: u64,
    watermark_unix_s: i64,
) -> Result<RevocationRow, Error> {
    check_revocation_kind(target, kind)?;
    Ok(strengthen_row(current, target, kind, reason, number, watermark_unix_s))
}

/// Computes the row of [`RevocationTarget::All`] after an adoption: every root issued until then is void. `watermark_unix_s` as in
/// [`revoke_row`].
pub fn void_roots_row(current: Option<RevocationRow>, reason: &str, number: u64, watermark_unix_s: i64) -> RevocationRow {
    strengthen_row(current, &RevocationTarget::All, RevocationKind::Watermark, reason, number, watermark_unix_s)
}

fn strengthen_row(
    current: Option<RevocationRow>,
    target: &RevocationTarget,
    kind: RevocationKind,
    reason: &str,
    number: u64,
    watermark_unix_s: i64,
) -> RevocationRow {
    let before = current.unwrap_or_else(|| RevocationRow {
        target: target.clone(),
        dead: false,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 0,
    });
    let mut after = before.clone();
    match kind {
        RevocationKind::Dead => after.dead = true,
        RevocationKind::Suspend => after.suspended = true,
        // INVARIANT: a watermark never falls, whatever the clock does.
        RevocationKind::Watermark => after.watermark_unix_s = before.watermark_unix_s.max(Some(watermark_unix_s)),
    }
    let stands = after == before && before.revision > 0;
    after.expires_at_unix_s = match (stands, before.expires_at_unix_s, expiry::expires_at(&after, watermark_unix_s)) {
        // A row without an expiry, as older stores hold it, does not get one.
        (true, None, _) => None,
        // INVARIANT: revoking again counts from now: a token that was issued in the meantime must not outlive the row.
        (true, Some(before), Some(again)) => Some(before.max(again)),
        (_, _, again) => again,
    };
    if after == before { before } else { RevocationRow { reason: reason.to_owned(), revision: number, ..after } }
}

/// Computes the row of a target after its suspension is lifted. A watermark stays. `watermark_unix_s` as in [`revoke_row`].
///
/// # Errors
/// [`Error::Rejected`] if the target is dead, or is not suspended.
pub fn reinstate_row(
    current: Option<RevocationRow>,
    target: &RevocationTarget,
    reason: &str,
    number: u64,
    watermark_unix_s: i64,
) -> Result<RevocationRow, Error> {
    match current {
        Some(row) if row.dead => Err(Error::Rejected(format!("`{target}` is dead for good: issue new credentials instead"))),
        Some(row) if row.suspended => {
            let after = RevocationRow { suspended: false, reason: reason.to_owned(), revision: number, ..row };
            Ok(RevocationRow { expires_at_unix_s: expiry::expires_at(&after, watermark_unix_s), ..after })
        }
        Some(row) if row.watermark_unix_s.is_some() => Err(Error::Rejected(format!(
            "`{target}` is not suspended and a watermark cannot be undone: credentials issued after it are accepted"
        ))),
        _ if !target.can_suspend() => {
            Err(Error::Rejected(format!("`{target}` cannot be reinstated: a {} is never suspended, it only dies", target.kind())))
        }
        _ => Err(Error::Rejected(format!("`{target}` is not suspended: there is nothing to reinstate"))),
    }
}

fn check_revocation_kind(target: &RevocationTarget, kind: RevocationKind) -> Result<(), Error> {
    let (possible, wanted) = match kind {
        RevocationKind::Suspend => (target.can_suspend(), "be suspended"),
        RevocationKind::Watermark => (target.can_watermark(), "have a watermark"),
        RevocationKind::Dead => (!target.can_suspend(), "be dead for good"),
    };
    if possible {
        return Ok(());
    }
    let instead = match (target.can_suspend(), target.can_watermark()) {
        (true, true) => "suspend it or give it a watermark",
        (true, false) => "suspend it",
        (false, _) => "declare it dead",
    };
    Err(Error::Rejected(format!("`{target}` cannot {wanted}: {instead}")))
}

/// Checks one write. Returns its size in bytes.
fn check_write(write: &StoreWrite) -> Result<usize, Error> {
    match write {
        StoreWrite::PutDocument(DocumentRow { key, json, path, line: _, origin: _ }) => {
            check_key(key)?;
            check_no_nul("a document", json)?;
            check_no_nul("a document's path", path)?;
            check_at_most("bytes in a document", json.len(), POLICY_FILE_BYTES_MAX)?;
            check_at_most("bytes in a document's path", path.len(), PATH_BYTES_MAX)?;
            Ok(json.len().saturating_add(path.len()).saturating_add(key.id.len()))
        }
        StoreWrite::RemoveDocument(key) => {
            check_key(key)?;
            Ok(key.id.len())
        }
        StoreWrite::Revoke { target, kind, reason } => {
            check_revocation_kind(target, *kind)?;
            check_target(target, reason)
        }
        StoreWrite::Reinstate { target, reason } => check_target(target, reason),
        StoreWrite::ReinstateByTwo { target, reason, operator, key, administrators } => {
            let bytes = check_target(target, reason)?;
            Ok(bytes.saturating_add(two_person::check_write(reason, operator, key, administrators)?))
        }
        StoreWrite::Prune { rows_max, .. } => {
            check_at_most("revocations taken away by one commit", *rows_max, expiry::PRUNED_ROWS_MAX)?;
            Ok(0)
        }
        StoreWrite::Adopt { reason } => {
            check_at_most("bytes in a reason", reason.len(), ACT_REASON_BYTES_MAX)?;
            check_no_nul("a reason", reason)?;
            Ok(reason.len())
        }
        StoreWrite::Merge(merge) => lineage::check_merge(merge),
        StoreWrite::Approve { digest, operator, key, groups } => {
            approval_rules::check_operator_answer(digest, operator, key, groups)
        }
        StoreWrite::Refuse { digest, operator, groups } => approval_rules::check_operator_answer(digest, operator, "", groups),
    }
}

fn check_key(key: &DocumentKey) -> Result<(), Error> {
    check_not_empty("a document's kind", &key.kind)?;
    check_not_empty("a document's id", &key.id)?;
    check_no_nul("a document's kind", &key.kind)?;
    check_no_nul("a document's id", &key.id)?;
    check_at_most("bytes in a document's kind", key.kind.len(), ID_BYTES_MAX)?;
    check_at_most("bytes in a document's id", key.id.len(), ID_BYTES_MAX)
}

fn check_act(act: &ActRow) -> Result<(), Error> {
    check_at_most("operators of one act", act.operators.len(), SIGNATURES_MAX)?;
    check_at_most("keys of one act", act.keys.len(), SIGNATURES_MAX)?;
    check_at_most("signatures of one act", act.signatures.len(), SIGNATURES_MAX)?;
    check_at_most("`jti`s of one act", act.jtis.len(), SIGNATURES_MAX)?;
    check_at_most("bytes in an act's method", act.method.len(), METHOD_BYTES_MAX)?;
    check_at_most("bytes in the account of an act", act.reason.len(), ACT_SUMMARY_BYTES_MAX)?;
    act.operators.iter().try_for_each(|id| check_at_most("bytes in an operator's id", id.len(), ID_BYTES_MAX))?;
    act.signatures.iter().try_for_each(|jws| check_at_most("bytes in a signature", jws.len(), OPERATOR_JWS_BYTES_MAX))?;
    for (jti, _) in &act.jtis {
        check_not_empty("a `jti`", jti)?;
        check_no_nul("a `jti`", jti)?;
        check_at_most("bytes in a `jti`", jti.len(), ID_BYTES_MAX)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: [fn(String) -> RevocationTarget; 9] = [
        RevocationTarget::Agent,
        RevocationTarget::Application,
        RevocationTarget::Tool,
        RevocationTarget::Session,
        RevocationTarget::Task,
        RevocationTarget::Key,
        RevocationTarget::Hop,
        RevocationTarget::Token,
        |issuer| RevocationTarget::User { issuer, subject: "s".into() },
    ];

    #[test]
    fn each_target_takes_only_its_meanings() {
        let check = |target: &RevocationTarget, expected: [bool; 3]| {
            for (kind, expected) in
                [RevocationKind::Suspend, RevocationKind::Watermark, RevocationKind::Dead].into_iter().zip(expected)
            {
                assert_eq!(revoke_row(None, target, kind, "r", 1, 50).is_ok(), expected, "{target} {kind:?}");
            }
        };
        for make in TARGETS {
            let target = make("x".into());
            check(
                &target,
                match target.kind() {
                    "agent" | "application" | "user" => [true, true, false],
                    "tool" => [true, false, false],
                    _ => [false, false, true],
                },
            );
        }
        check(&RevocationTarget::All, [true, false, false]);
        check(&RevocationTarget::Delegation { issuer: "i".into(), subject: "s".into(), agent: "a".into() }, [true, true, false]);
    }

    #[test]
    fn a_row_keeps_what_is_for_good() {
        let agent = RevocationTarget::Agent("a".into());
        let marked = revoke_row(None, &agent, RevocationKind::Watermark, "one", 1, 50).unwrap();
        assert_eq!((marked.watermark_unix_s, marked.revision, marked.suspended), (Some(50), 1, false));
        assert_eq!(
            revoke_row(Some(marked.clone()), &agent, RevocationKind::Watermark, "two", 2, 40),
            Ok(marked.clone()),
            "never falls"
        );
        assert!(reinstate_row(Some(marked.clone()), &agent, "r", 3, 50).is_err(), "a watermark is not undone");
        let suspended = revoke_row(Some(marked), &agent, RevocationKind::Suspend, "three", 3, 0).unwrap();
        assert_eq!((suspended.watermark_unix_s, suspended.suspended, suspended.reason.as_str()), (Some(50), true, "three"));
        let back = reinstate_row(Some(suspended), &agent, "four", 4, 50).unwrap();
        assert_eq!((back.watermark_unix_s, back.suspended, back.revision), (Some(50), false, 4));
        assert!(reinstate_row(Some(back), &agent, "five", 5, 50).is_err());
        let token = RevocationTarget::Token("t".into());
        let dead = revoke_row(None, &token, RevocationKind::Dead, "r", 1, 0).unwrap();
        assert!(dead.dead);
        let again = revoke_row(Some(dead.clone()), &token, RevocationKind::Dead, "again", 2, 100).unwrap();
        assert_eq!(again.expires_at_unix_s.unwrap() - dead.expires_at_unix_s.unwrap(), 100, "dead from now on");
        assert_eq!(revoke_row(Some(again.clone()), &token, RevocationKind::Dead, "r", 3, 0), Ok(again), "never earlier");
        let kept = RevocationRow { expires_at_unix_s: None, ..dead.clone() };
        assert_eq!(revoke_row(Some(kept.clone()), &token, RevocationKind::Dead, "r", 3, 100), Ok(kept), "never to go");
        assert!(reinstate_row(Some(dead), &token, "r", 2, 50).is_err());
        assert!(reinstate_row(None, &token, "r", 2, 50).is_err());
    }

    #[test]
    fn requests_have_limits() {
        let check = |writes: Vec<StoreWrite>, expected: bool| {
            let request = CommitRequest { writes, ..CommitRequest::default() };
            assert_eq!(check_request(&request).is_ok(), expected);
        };
        let revoke = |id: usize, reason: usize| {
            let (target, reason) = (RevocationTarget::Token("t".repeat(id)), "r".repeat(reason));
            StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason }
        };
        check(vec![], false);
        check(vec![revoke(1, 0)], true);
        check(vec![revoke(ID_BYTES_MAX, ACT_REASON_BYTES_MAX)], true);
        check(vec![revoke(0, 0)], false);
        check(vec![revoke(ID_BYTES_MAX + 1, 0)], false);
        check(vec![revoke(1, ACT_REASON_BYTES_MAX + 1)], false);
        check(vec![revoke(1, 0); WRITES_MAX], true);
        check(vec![revoke(1, 0); WRITES_MAX + 1], false);
        check(vec![revoke(ID_BYTES_MAX, ACT_REASON_BYTES_MAX); 30_000], false);
        let act = |jti: &str| ActRow {
            operators: vec!["o".into()],
            keys: vec!["k".into()],
            method: "m".into(),
            signatures: vec!["s".into()],
            jtis: vec![(jti.to_owned(), 1)],
            reason: String::new(),
        };
        let check = |act: ActRow, expected: bool| {
            assert_eq!(check_request(&CommitRequest { act: Some(act), ..CommitRequest::default() }).is_ok(), expected);
        };
        check(act("j"), true);
        check(act(""), false);
        check(ActRow { signatures: vec!["s".repeat(OPERATOR_JWS_BYTES_MAX + 1)], ..act("j") }, false);
        check(ActRow { operators: vec!["o".into(); SIGNATURES_MAX + 1], ..act("j") }, false);
        check(ActRow { keys: vec!["k".into(); SIGNATURES_MAX + 1], ..act("j") }, false);
        check(ActRow { keys: vec!["k".repeat(ID_BYTES_MAX + 1)], ..act("j") }, false);
        check(ActRow { jtis: vec![("j".into(), 1); SIGNATURES_MAX + 1], ..act("j") }, false);
    }
}
