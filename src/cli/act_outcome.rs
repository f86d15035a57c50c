//! The outcome of an act, which is reported first: done, not done or not known, and whether the act is in the audit log.
//!
//! A server gives its answer as a reason in the status. A status without a reason comes from the transport: the request may have
//! arrived while the answer was lost. Look next at `api/status.rs`, which writes the reasons, and at `api/signature_layer.rs`, which marks
//! acts that were done but are not in the audit log.

use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use super::CommandFailure;
use super::call_failure::call_failure;
use super::visible_text::escape_for_terminal;
use crate::api::{UNRECORDED_HEADER, UNRECORDED_VALUE};
use crate::app::StoreFollowers;

/// The outcome of an act without a good answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ActFailure {
    /// Nothing was done.
    Refused,
    /// The store failed during the commit, so the act may or may not have been done.
    Unknown,
    /// No answer came, so the act may or may not have been done.
    Unanswered,
}

/// The outcome that a status implies for its act.
pub(super) fn failure_from_status(status: &Status) -> ActFailure {
    let reason = status.get_error_details().error_info().map(|info| info.reason.clone());
    match reason.as_deref() {
        Some("COMMIT_UNKNOWN") => ActFailure::Unknown,
        Some(_) => ActFailure::Refused,
        // No service took the call.
        None if status.code() == Code::Unimplemented || status.message().contains("tcp connect") => ActFailure::Refused,
        None => ActFailure::Unanswered,
    }
}

impl ActFailure {
    /// The failure that states the outcome before the reason.
    pub(super) fn into_failure(self, why: CommandFailure) -> CommandFailure {
        match self {
            // A refused policy states the outcome itself, and its diagnostics follow.
            ActFailure::Refused if why.message.starts_with("the policy") => why,
            ActFailure::Refused => not_done(why),
            ActFailure::Unknown => {
                CommandFailure::unavailable(format!("it is not known whether it was done: {}; {LOOK_UP_HINT}", why.message))
            }
            ActFailure::Unanswered => CommandFailure::unavailable(format!(
                "no answer came, so it is not known whether it was done: {}; {LOOK_UP_HINT}",
                why.message
            )),
        }
    }
}

/// The beginning of the message of a failure that certainly changed nothing.
const NOT_DONE: &str = "not done: ";

/// The failure of an act that was not done.
pub(super) fn not_done(why: CommandFailure) -> CommandFailure {
    if is_not_done(&why) { why } else { CommandFailure { message: format!("{NOT_DONE}{}", why.message), ..why } }
}

/// Whether the failure says that the act was not done.
pub(super) fn is_not_done(failure: &CommandFailure) -> bool {
    failure.message.starts_with(NOT_DONE) || failure.message.starts_with(CommandFailure::BEFORE_AN_ACT)
}

const LOOK_UP_HINT: &str = "look with `portcullis revocations`, `approvals --all` or `policy history`, and repeat what is not there; \
                    revoking twice does no harm";

/// The answer to an act that was done.
#[derive(Debug)]
pub(super) struct ActAnswer<M> {
    /// What the server, or the store itself, answered.
    pub(super) message: M,
    /// Whether the act stands in the audit log: `recorded` in the JSON of every act.
    pub(super) is_recorded: bool,
}

/// The answer to an act, or the failure that says what became of it.
pub(super) fn act_result<M>(answer: Result<Response<M>, Status>, target: &str) -> Result<ActAnswer<M>, CommandFailure> {
    match answer {
        Ok(response) => {
            let is_recorded = response.metadata().get(UNRECORDED_HEADER).is_none_or(|value| value != UNRECORDED_VALUE);
            Ok(ActAnswer { message: response.into_inner(), is_recorded })
        }
        Err(status) => Err(failure_from_status(&status).into_failure(call_failure(&status, target))),
    }
}

/// The warning for an act on a store that no server may follow; `None` if a replica follows it.
pub(super) fn unfollowed_store_warning(followers: &StoreFollowers) -> Option<String> {
    let store = &followers.store;
    if let Some(contradiction) = &followers.contradiction {
        return Some(format!("the store `{store}` is not the one that a replica followed: {contradiction}"));
    }
    if let Some(unread) = &followers.unread {
        return Some(format!("it cannot be said whether a server follows the store `{store}`: {unread}"));
    }
    if !followers.heard.is_empty() {
        return None;
    }
    let last = match &followers.last_heard {
        None => "none is registered".to_owned(),
        Some((address, age_ms)) => format!("the last one, `{}`, {} s ago", escape_for_terminal(address), age_ms / 1000),
    };
    Some(format!(
        "no server was heard to follow the store `{store}` within {} s ({last}): a server that follows another store does not know of \
         this act; make sure that this is the store of the server that is meant",
        followers.bound_ms.div_ceil(1000)
    ))
}

/// The warning for an act that was done but is not in the audit log. The act itself did not fail.
pub(super) fn unrecorded_warning(target: &str, is_local: bool) -> String {
    if is_local {
        return "it was done, and the store keeps the signed act; but the audit folder of the data folder (--data) cannot be written, so \
                no line of it is there: make room on that disk, and note the act for who reads the audit log"
            .to_owned();
    }
    format!(
        "it was done, and the store keeps the signed act; but the server at {target} cannot write its audit log: make room on the disk of \
         its data folder, and it writes the line by itself unless it ends before"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_act_on_a_store_that_nobody_follows_is_doubted() {
        let heard = StoreFollowers {
            store: "sqlite:/d/store.db".to_owned(),
            bound_ms: 5_500,
            heard: vec!["local 127.0.0.1:7700".to_owned()],
            ..StoreFollowers::default()
        };
        let check = |followers: &StoreFollowers, expected: Option<&str>| match (unfollowed_store_warning(followers), expected) {
            (None, None) => {}
            (Some(warning), Some(part)) => assert!(warning.contains(part) && warning.contains("sqlite:/d/store.db"), "{warning}"),
            (warning, _) => panic!("{followers:?}: {warning:?}"),
        };
        check(&heard, None);
        let silent = StoreFollowers { heard: Vec::new(), ..heard.clone() };
        check(&silent, Some("within 6 s (none is registered)"));
        let last = Some(("local 127.0.0.1:7700".to_owned(), 90_500));
        check(&StoreFollowers { last_heard: last, ..silent.clone() }, Some("`local 127.0.0.1:7700`, 90 s ago"));
        check(&StoreFollowers { unread: Some("busy".to_owned()), ..silent }, Some("cannot be said"));
        let contradiction = Some("the store is at revision `h.1`".to_owned());
        check(&StoreFollowers { contradiction, ..heard }, Some("is not the one that a replica followed: the store is at"));
    }
}
