//! The rules of approvals: how asking, approving, refusing and using change the row of an approval. They are the same for every
//! store.
//!
//! ```text
//! ask ─▶ waiting ─approve─▶ approved ─use─▶ used          after the expiry: as if it had never been asked
//!           └──────refuse──────┴─▶ refused
//! ```
//!
//! Pure functions over rows: no engine and no clock. A store reads the row, calls one of these functions and writes the result,
//! in one transaction that no other transaction interleaves with. That makes each use a compare-and-set. `pap` determines who may
//! approve. Look next at `sqlite/approvals.rs`, which calls these functions.

use std::collections::{BTreeMap, HashSet};

use super::Error;
use super::request_checks::{check_at_most, check_not_empty};
use crate::model::approval::{
    ApprovalCall, ApprovalLayer, ApprovalRow, ApprovalState, ApprovalSubmission, ApprovalUse, ApprovalUseOutcome,
    ApprovalUseRequest, ApproverCheck, PreparationApprovalUse, UnusableCause,
};
use crate::model::decision::ApprovalNeed;
use crate::model::limits::{
    APPROVAL_ARGUMENTS_BYTES_MAX, APPROVAL_LAYERS_MAX, APPROVAL_REPLAY_WINDOW_MS, APPROVAL_RETENTION_MS, APPROVALS_PREPARED_MAX,
    CHAIN_TOKENS_MAX, ID_BYTES_MAX, TOOL_NAME_BYTES_MAX,
};
use crate::model::revision::Revision;

/// Characters of a digest: hexadecimal SHA-256.
const DIGEST_CHARACTERS: usize = 64;
/// Limit of the groups that one layer names, and of the groups of an operator.
const GROUPS_MAX: usize = 65_536;

/// Checks a request for an approval without reading the store.
///
/// # Errors
/// [`Error::Rejected`], naming the part that is empty, too long or too numerous.
pub fn check_ask(request: &ApprovalSubmission) -> Result<(), Error> {
    let ApprovalCall { digest, issuer, subject, application, agents, session, task, tool, arguments_json } = &request.call;
    check_digest(digest)?;
    check_at_most("bytes in the arguments of an approval", arguments_json.len(), APPROVAL_ARGUMENTS_BYTES_MAX)?;
    check_at_most("bytes in the tool of an approval", tool.len(), TOOL_NAME_BYTES_MAX)?;
    check_at_most("agents of an approval", agents.len(), CHAIN_TOKENS_MAX)?;
    check_at_most("layers that ask for an approval", request.needs.len(), APPROVAL_LAYERS_MAX)?;
    request.needs.iter().try_for_each(|need| check_at_most("groups that approve", need.approver_groups.len(), GROUPS_MAX))?;
    // A token has at most 8 KiB, so no identity is longer.
    let texts = [issuer, subject, application, session, task].into_iter().chain(agents);
    texts.into_iter().try_for_each(|text| check_at_most("bytes in an identity of an approval", text.len(), 4 * ID_BYTES_MAX))?;
    if agents.is_empty() || request.needs.is_empty() {
        return Err(Error::Rejected("an approval without an agent, or that no layer asks for: name them".to_owned()));
    }
    Ok(())
}

/// Checks a use without reading the store.
///
/// # Errors
/// [`Error::Rejected`], naming the part that is malformed, too long or too numerous.
pub fn check_use(request: &ApprovalUseRequest) -> Result<(), Error> {
    request.digests().into_iter().try_for_each(check_digest)?;
    let layers =
        |one: &PreparationApprovalUse| check_at_most("layers that ask for an approval", one.needs.len(), APPROVAL_LAYERS_MAX);
    request.prepared.iter().try_for_each(layers)?;
    check_at_most("prepared calls of one use", request.prepared.len(), APPROVALS_PREPARED_MAX)?;
    check_at_most("bytes in a decision id", request.decision_id.len(), ID_BYTES_MAX)?;
    if let Some(own) = &request.own {
        check_at_most("layers that ask for an approval", own.needs.len(), APPROVAL_LAYERS_MAX)?;
    }
    let fingerprint = request.fingerprint.as_deref().unwrap_or_default();
    check_at_most("bytes in the fingerprint of a request", fingerprint.len(), ID_BYTES_MAX)?;
    match request.digests().is_empty() {
        true => Err(Error::Rejected("a use of no approval: leave it out".to_owned())),
        false => Ok(()),
    }
}

/// Checks the parts of an operator's answer that need no stored row. Returns the size of the answer in bytes.
pub(super) fn check_operator_answer(digest: &str, operator: &str, key: &str, groups: &[String]) -> Result<usize, Error> {
    check_digest(digest)?;
    check_not_empty("the operator who answers", operator)?;
    check_at_most("bytes in an operator's id", operator.len(), ID_BYTES_MAX)?;
    check_at_most("bytes in a key's thumbprint", key.len(), ID_BYTES_MAX)?;
    check_at_most("groups of an operator", groups.len(), GROUPS_MAX)?;
    groups.iter().try_for_each(|group| check_at_most("bytes in a group", group.len(), ID_BYTES_MAX))?;
    Ok(digest.len().saturating_add(operator.len()).saturating_add(groups.iter().map(String::len).sum()))
}

fn check_digest(digest: &str) -> Result<(), Error> {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if digest.len() == DIGEST_CHARACTERS && digest.bytes().all(hex) {
        return Ok(());
    }
    Err(Error::Rejected(format!("a digest is {DIGEST_CHARACTERS} characters of lowercase hex, as the answer gave it")))
}

/// The effect of asking on the row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskTransition {
    /// The row stays as it is.
    Unchanged(ApprovalRow),
    /// The row is written.
    Put {
        /// The row.
        row: ApprovalRow,
        /// Whether one more call waits than before, so that the agent's quota must be checked first.
        is_new: bool,
    },
}

/// Computes the row after a call asked. Asking again does not prolong a row that is still valid; an expired row is replaced.
///
/// A layer that did not ask before, or that asks for something else now, is added without an approval. A layer that no longer
/// asks stays as it is.
pub fn ask_approval(current: Option<ApprovalRow>, request: &ApprovalSubmission, unix_ms: i64) -> AskTransition {
    let layer = |need: &ApprovalNeed| ApprovalLayer {
        layer: need.layer,
        hop: need.hop,
        by: need.approver_groups.iter().map(ToString::to_string).collect(),
        expires_in_ms: need.expires_in_ms,
        asked_at_unix_ms: unix_ms,
        expires_at_unix_ms: unix_ms.saturating_add(i64::try_from(need.expires_in_ms).unwrap_or(i64::MAX)),
        approved_by: None,
        approved_key: None,
    };
    let Some(row) = current.filter(|row| unix_ms < row.expires_at_unix_ms()) else {
        let row = ApprovalRow {
            call: request.call.clone(),
            layers: request.needs.iter().map(layer).collect(),
            asked_at_unix_ms: unix_ms,
            refused_by: None,
            used: None,
            used_prepared: None,
        };
        return AskTransition::Put { row, is_new: true };
    };
    if row.refused_by.is_some() || row.used.is_some() {
        return AskTransition::Unchanged(row);
    }
    let was_waiting = is_waiting(&row);
    let mut after = row.clone();
    // An approval by an operator who may no longer approve is void, so that another operator can approve.
    for layer in after.layers.iter_mut().filter(|layer| !request.approvers.counts_as_approved(&row.call, layer)) {
        (layer.approved_by, layer.approved_key) = (None, None);
    }
    for need in &request.needs {
        match after.layers.iter_mut().find(|stored| (stored.layer, stored.hop) == (need.layer, need.hop)) {
            Some(stored) if stored.matches_need(need) => {}
            Some(stored) => *stored = layer(need),
            None => after.layers.push(layer(need)),
        }
    }
    if after == row { AskTransition::Unchanged(row) } else { AskTransition::Put { row: after, is_new: !was_waiting } }
}

/// Thumbprints of the keys that approved layers of a row.
pub fn approver_keys(row: &ApprovalRow) -> impl Iterator<Item = &str> {
    row.layers.iter().filter_map(|layer| layer.approved_key.as_deref())
}

/// Withdraws the approvals that were given with a revoked key; those layers wait again. Returns whether there were any.
pub fn withdraw_revoked(row: &mut ApprovalRow, is_revoked: impl Fn(&str) -> bool) -> bool {
    let mut taken = false;
    for layer in &mut row.layers {
        if layer.approved_key.take_if(|key| is_revoked(key)).is_some() {
            layer.approved_by = None;
            taken = true;
        }
    }
    taken
}

/// Approves every waiting layer whose `by` names a group of the operator. `key` is the key with which the operator signed.
///
/// # Errors
/// [`Error::Rejected`] if there is nothing that this operator can approve, with the reason.
pub fn approve_row(
    current: Option<ApprovalRow>,
    digest: &str,
    (operator, key): (&str, &str),
    groups: &[String],
    unix_ms: i64,
) -> Result<ApprovalRow, Error> {
    let mut row = answerable_row(current, digest, unix_ms)?;
    let groups: HashSet<&str> = groups.iter().map(String::as_str).collect();
    let mut given = 0usize;
    for layer in row.layers.iter_mut().filter(|layer| layer.approved_by.is_none()) {
        if layer.by.iter().any(|group| groups.contains(group.as_str())) {
            layer.approved_by = Some(operator.to_owned());
            layer.approved_key = Some(key.to_owned());
            given = given.saturating_add(1);
        }
    }
    let short_digest = short_digest(digest);
    match given {
        0 if row.is_approved() => Err(Error::Rejected(format!(
            "call `{short_digest}` is approved already, by {}: it can be made now",
            approver_ids(&row).join(", ")
        ))),
        0 => Err(Error::Rejected(format!(
            "operator `{operator}` is in none of the groups that call `{short_digest}` waits for: {}",
            waiting_groups(&row).join(", ")
        ))),
        _ => Ok(row),
    }
}

/// Refuses the whole call, whether it is approved or not.
///
/// # Errors
/// [`Error::Rejected`] if there is nothing that this operator can refuse, with the reason.
pub fn refuse_row(
    current: Option<ApprovalRow>,
    digest: &str,
    operator: &str,
    groups: &[String],
    unix_ms: i64,
) -> Result<ApprovalRow, Error> {
    let mut row = answerable_row(current, digest, unix_ms)?;
    if !row.layers.iter().any(|layer| layer.by.iter().any(|group| groups.contains(group))) {
        let message = format!("operator `{operator}` is in none of the groups that may answer call `{}`", short_digest(digest));
        return Err(Error::Rejected(message));
    }
    row.refused_by = Some(operator.to_owned());
    Ok(row)
}

/// The state of the store at the time of a use.
#[derive(Clone, Copy, Debug)]
pub struct UseContext<'a> {
    /// The newest revision of the store.
    pub head: &'a Revision,
    /// Whether the proof of the call was not spent before; `true` if the call has none.
    pub proof_is_new: bool,
    /// The present time, by the store's clock.
    pub unix_ms: i64,
}

/// Uses all approvals that a call needs, or none.
///
/// `rows` holds the existing rows of [`ApprovalUseRequest::digests`]. If [`outcome_changes_rows`] is true for the outcome, the rows have
/// changed and must be written. The proof is spent only if the outcome is [`ApprovalUseOutcome::Used`].
pub fn use_approvals(
    rows: &mut BTreeMap<String, ApprovalRow>,
    request: &ApprovalUseRequest,
    moment: UseContext<'_>,
) -> ApprovalUseOutcome {
    let UseContext { head, proof_is_new, unix_ms } = moment;
    // INVARIANT: the caller of a use has seen every act that was committed before, revocations among them.
    if request.expected_revision.as_ref().is_some_and(|seen| seen != head) {
        return ApprovalUseOutcome::RevisionMismatch { head: head.clone() };
    }
    if let Some(decision_id) = repeated_decision(rows, request, unix_ms) {
        // INVARIANT: a decision that may have been given twice stays used for good.
        for made in recorded_uses(rows, request) {
            made.given_again = true;
        }
        return ApprovalUseOutcome::Repeated { decision_id };
    }
    if request.lookup_only || !proof_is_new {
        return ApprovalUseOutcome::Replayed;
    }
    if let Some(own) = &request.own
        && let Err(cause) = check_usable(
            rows.get(&own.digest),
            unix_ms,
            |row| row.used.is_some(),
            |row| meets_needs(row, &own.needs, &request.approvers),
        )
    {
        return ApprovalUseOutcome::Unusable { prepared: None, cause };
    }
    for (index, prepared) in request.prepared.iter().enumerate() {
        let row = rows.get(&prepared.digest);
        let is_approved = |row: &ApprovalRow| was_prepared(row, &prepared.needs, &request.approvers);
        if let Err(cause) = check_usable(row, unix_ms, |row| row.used_prepared.is_some(), is_approved) {
            return ApprovalUseOutcome::Unusable { prepared: Some(index), cause };
        }
    }
    // INVARIANT: no row is marked before every check has passed.
    let (decision_id, fingerprint) = (request.decision_id.clone(), request.fingerprint.clone());
    let made = ApprovalUse { decision_id, unix_ms, fingerprint, given_again: false };
    if let Some(row) = request.own.as_ref().and_then(|own| rows.get_mut(&own.digest)) {
        row.used = Some(made.clone());
    }
    for prepared in &request.prepared {
        if let Some(row) = rows.get_mut(&prepared.digest) {
            row.used_prepared = Some(made.clone());
        }
    }
    ApprovalUseOutcome::Used
}

/// Whether a use with this outcome changed the rows that it names.
pub fn outcome_changes_rows(outcome: &ApprovalUseOutcome) -> bool {
    matches!(outcome, ApprovalUseOutcome::Used | ApprovalUseOutcome::Repeated { .. })
}

/// Gives back the approvals that a decision used, if that decision was not answered after all.
///
/// It gives back all of them, or none if the decision was given again in the meantime. Returns whether they were given back; the
/// rows have then changed and must be written.
pub fn give_back_approvals(rows: &mut BTreeMap<String, ApprovalRow>, request: &ApprovalUseRequest) -> bool {
    let mine = |made: &Option<ApprovalUse>| {
        made.as_ref().is_some_and(|made| made.decision_id == request.decision_id && !made.given_again)
    };
    let own = request.own.iter().all(|own| rows.get(&own.digest).is_some_and(|row| mine(&row.used)));
    let prepared = request.prepared.iter().all(|one| rows.get(&one.digest).is_some_and(|row| mine(&row.used_prepared)));
    if !own || !prepared {
        return false;
    }
    if let Some(row) = request.own.as_ref().and_then(|own| rows.get_mut(&own.digest)) {
        row.used = None;
    }
    for prepared in &request.prepared {
        if let Some(row) = rows.get_mut(&prepared.digest) {
            row.used_prepared = None;
        }
    }
    true
}

/// The uses that are recorded on the rows which the request names.
fn recorded_uses<'a>(
    rows: &'a mut BTreeMap<String, ApprovalRow>,
    request: &'a ApprovalUseRequest,
) -> impl Iterator<Item = &'a mut ApprovalUse> {
    rows.iter_mut().flat_map(move |(digest, row)| {
        let own = request.own.as_ref().is_some_and(|own| own.digest == *digest);
        let prepared = request.prepared.iter().any(|one| one.digest == *digest);
        let ApprovalRow { used, used_prepared, .. } = row;
        used.iter_mut().filter(move |_| own).chain(used_prepared.iter_mut().filter(move |_| prepared))
    })
}

/// The decision that this same request received when it used the same approvals a moment ago, if it did.
///
/// The approvals must still fit the needs of the layers as they ask now.
fn repeated_decision(rows: &BTreeMap<String, ApprovalRow>, request: &ApprovalUseRequest, unix_ms: i64) -> Option<String> {
    request.fingerprint.as_ref()?;
    let own = request.own.iter().map(|own| {
        let row = rows.get(&own.digest)?;
        row.used.as_ref().filter(|_| row.refused_by.is_none() && meets_needs(row, &own.needs, &request.approvers))
    });
    let prepared = request.prepared.iter().map(|one| rows.get(&one.digest)?.used_prepared.as_ref());
    let uses: Option<Vec<&ApprovalUse>> = own.chain(prepared).collect();
    let uses = uses?;
    let first = uses.first()?;
    let recent = |made: &ApprovalUse| (0..APPROVAL_REPLAY_WINDOW_MS).contains(&unix_ms.saturating_sub(made.unix_ms));
    let same =
        |made: &&ApprovalUse| made.fingerprint == request.fingerprint && made.decision_id == first.decision_id && recent(made);
    uses.iter().all(same).then(|| first.decision_id.clone())
}

/// Whether an approval waits for an operator; the expiry is not considered. The quota counts these rows, and lists show them.
pub fn is_waiting(row: &ApprovalRow) -> bool {
    row.refused_by.is_none() && row.used.is_none() && !row.is_approved()
}

/// When a row may be forgotten: at its expiry, or later if an operator answered it. An agent alone cannot make a row last longer.
pub fn kept_until_unix_ms(row: &ApprovalRow) -> i64 {
    let touched = row.refused_by.is_some() || row.layers.iter().any(|layer| layer.approved_by.is_some());
    row.expires_at_unix_ms().saturating_add(if touched { APPROVAL_RETENTION_MS } else { 0 })
}

/// Checks that a row exists, is not expired, refused or used, and is approved.
fn check_usable(
    row: Option<&ApprovalRow>,
    unix_ms: i64,
    is_used: impl Fn(&ApprovalRow) -> bool,
    is_approved: impl Fn(&ApprovalRow) -> bool,
) -> Result<(), UnusableCause> {
    let row = row.ok_or(UnusableCause::Missing)?;
    if unix_ms >= row.expires_at_unix_ms() {
        return Err(UnusableCause::Expired);
    }
    match () {
        () if row.refused_by.is_some() => Err(UnusableCause::Refused),
        () if is_used(row) => Err(UnusableCause::Used),
        () if !is_approved(row) => Err(UnusableCause::Waiting),
        () => Ok(()),
    }
}

/// Whether every layer that asks now has an approval that was given for exactly what it asks now.
fn meets_needs(row: &ApprovalRow, needs: &[ApprovalNeed], approvers: &ApproverCheck) -> bool {
    let has = |need: &ApprovalNeed| {
        row.layers.iter().any(|layer| layer.matches_need(need) && approvers.counts_as_approved(&row.call, layer))
    };
    !needs.is_empty() && needs.iter().all(has)
}

/// Whether a call was prepared: every layer was approved by operators who may still approve. If layers still ask, the approvals
/// must also fit what they ask now.
fn was_prepared(row: &ApprovalRow, needs: &[ApprovalNeed], approvers: &ApproverCheck) -> bool {
    let whole = !row.layers.is_empty() && row.layers.iter().all(|layer| approvers.counts_as_approved(&row.call, layer));
    whole && (needs.is_empty() || meets_needs(row, needs, approvers))
}

/// Returns the row if an operator can still answer it.
fn answerable_row(current: Option<ApprovalRow>, digest: &str, unix_ms: i64) -> Result<ApprovalRow, Error> {
    let short_digest = short_digest(digest);
    let gone = |why: &str| Err(Error::Rejected(format!("call `{short_digest}` {why}")));
    let Some(row) = current else {
        return gone("is not one that waits: it was never asked, or it was forgotten after its time");
    };
    match row.state(unix_ms) {
        ApprovalState::Waiting | ApprovalState::Approved => Ok(row),
        ApprovalState::Expired => gone("has expired: it must be asked anew"),
        ApprovalState::Used => gone("was approved and used already: it can be asked anew once its time is over"),
        ApprovalState::Refused => {
            let by = row.refused_by.unwrap_or_default();
            gone(&format!("was refused by `{by}`: it can be asked anew once its time is over"))
        }
    }
}

/// The ids of the operators who approved layers of a row.
fn approver_ids(row: &ApprovalRow) -> Vec<String> {
    let mut ids: Vec<String> =
        row.layers.iter().filter_map(|layer| layer.approved_by.as_ref()).map(|id| format!("`{id}`")).collect();
    ids.sort();
    ids.dedup();
    ids
}

/// The groups for whose approval a row waits, at most 16.
fn waiting_groups(row: &ApprovalRow) -> Vec<&str> {
    let waiting = row.layers.iter().filter(|layer| layer.approved_by.is_none());
    let mut groups: Vec<&str> = waiting.flat_map(|layer| layer.by.iter().map(String::as_str)).collect();
    groups.sort_unstable();
    groups.dedup();
    groups.truncate(16);
    groups
}

/// The beginning of a digest, as lists show it.
fn short_digest(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

#[cfg(test)]
mod tests;
