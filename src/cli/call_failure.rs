//! The failure of a call to a server that refused it or gave no answer, with its exit code.
//!
//! Look next at `act_outcome.rs`, which says how an act ended, and at `server_unreachable.rs`, which explains why no server
//! answers.

use tonic::{Code, Status};

use super::CommandFailure;

/// The failure, with its exit code, for a call that was refused or not answered.
pub(super) fn call_failure(status: &Status, target: &str) -> CommandFailure {
    match status.code() {
        Code::Unavailable if status.message().contains("tcp connect") => no_server_failure(target),
        Code::Unavailable | Code::DeadlineExceeded => CommandFailure::unavailable(status.message()),
        // A refused policy is no misuse of the command.
        Code::InvalidArgument if !status.message().starts_with("the policy") => CommandFailure::misuse(status.message()),
        Code::Unimplemented => {
            CommandFailure::misuse(format!("the listener at {target} does not serve this call: is it the right port?"))
        }
        _ => CommandFailure::failed(status.message()),
    }
}

/// The failure for an address at which no server listens.
pub(super) fn no_server_failure(target: &str) -> CommandFailure {
    CommandFailure::unavailable(format!("nobody answers at {target}: start `portcullis serve`, or name another --target"))
}
