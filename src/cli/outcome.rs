//! The outcome of an act, which is reported first: done, not done or not known, and whether the act is in the audit log.
//!
//! A server gives its answer as a reason in the status. A status without a reason comes from the transport: the request may have
//! arrived while the answer was lost. Look next at `api/status.rs`, which writes the reasons, and at `api/signed.rs`, which marks
//! acts that were done but are not in the audit log.

use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use super::Failure;
use super::call_failure::refused;
use crate::api::{UNRECORDED, UNRECORDED_VALUE};

/// The outcome of an act without a good answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing was done.
    Refused,
    /// The store broke off, so the act may or may not have been done.
    Unknown,
    /// No answer came, so the act may or may not have been done.
    Unanswered,
}

/// The outcome that a status implies for its act.
pub(super) fn of(status: &Status) -> Outcome {
    let reason = status.get_error_details().error_info().map(|info| info.reason.clone());
    match reason.as_deref() {
        Some("COMMIT_UNKNOWN") => Outcome::Unknown,
        Some(_) => Outcome::Refused,
        // No service took the call.
        None if status.code() == Code::Unimplemented || status.message().contains("tcp connect") => Outcome::Refused,
        None => Outcome::Unanswered,
    }
}

impl Outcome {
    /// The failure that states the outcome before the reason.
    pub(super) fn failure(self, why: Failure) -> Failure {
        match self {
            // A refused policy states the outcome itself, and its diagnostics follow.
            Outcome::Refused if why.message.starts_with("the policy") => why,
            Outcome::Refused => Failure { message: format!("not done: {}", why.message), ..why },
            Outcome::Unknown => Failure::unavailable(format!("it is not known whether it was done: {}; {LOOK}", why.message)),
            Outcome::Unanswered => {
                Failure::unavailable(format!("no answer came, so it is not known whether it was done: {}; {LOOK}", why.message))
            }
        }
    }
}

const LOOK: &str = "look with `portcullis revocations`, `approvals --all` or `policy history`, and repeat what is not there; \
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
pub(super) fn told<M>(answer: Result<Response<M>, Status>, target: &str) -> Result<ActAnswer<M>, Failure> {
    match answer {
        Ok(response) => {
            let is_recorded = response.metadata().get(UNRECORDED).is_none_or(|value| value != UNRECORDED_VALUE);
            Ok(ActAnswer { message: response.into_inner(), is_recorded })
        }
        Err(status) => Err(of(&status).failure(refused(&status, target))),
    }
}

/// The warning for an act that was done but is not in the audit log. The act itself did not fail.
pub(super) fn unrecorded(target: &str, is_local: bool) -> String {
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
