//! The failure of a call to a server that refused it or gave no answer, with its exit code.
//!
//! Look next at `outcome.rs`, which says how an act ended, and at `reach.rs`, which explains why no server answers.

use tonic::{Code, Status};

use super::Failure;

/// The failure, with its exit code, for a call that was refused or not answered.
pub(super) fn refused(status: &Status, target: &str) -> Failure {
    match status.code() {
        Code::Unavailable if status.message().contains("tcp connect") => nobody_at(target),
        Code::Unavailable | Code::DeadlineExceeded => Failure::unavailable(status.message()),
        // A refused policy is no misuse of the command.
        Code::InvalidArgument if !status.message().starts_with("the policy") => Failure::misuse(status.message()),
        Code::Unimplemented => {
            Failure::misuse(format!("the listener at {target} does not serve this call: is it the right port?"))
        }
        _ => Failure::failed(status.message()),
    }
}

/// The failure for an address at which no server listens.
pub(super) fn nobody_at(target: &str) -> Failure {
    Failure::unavailable(format!("nobody answers at {target}: start `portcullis serve`, or name another --target"))
}
