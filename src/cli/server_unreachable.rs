//! Reports a server that does not answer: the symptom, and the command that does the same on the store itself.
//!
//! A responder at night must never wait for a command that says nothing. In every state of the server the command reports in time,
//! with the command to run instead. Look next at `client.rs`.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::call_failure::{call_failure, no_server_failure};
use super::{AdminArgs, CommandFailure, shell_quote};
use crate::store::sqlite::NO_SPACE;

/// Longest wait for a server to identify itself, including the connection.
pub(super) const GREETING_TIMEOUT: Duration = Duration::from_millis(3_500);
/// Longest time for a command that revokes to report the outcome, or that the outcome is not known.
pub(super) const ACT_TIMEOUT: Duration = Duration::from_millis(4_700);

/// The failure for a server that accepts the connection but does not identify itself.
pub(super) fn silent_server_failure(target: &str) -> CommandFailure {
    CommandFailure::unavailable(format!(
        "the server at {target} took the connection and says nothing ({} s): it is stopped, hung or overloaded; nothing was asked of it",
        GREETING_TIMEOUT.as_secs_f32()
    ))
}

/// The failure for a server that refused to identify itself.
pub(super) fn greeting_failure(status: &Status, target: &str) -> CommandFailure {
    let is_ours = status.get_error_details().error_info().is_some_and(|info| info.domain == "portcullis");
    if is_ours || status.code() == Code::Unimplemented {
        return call_failure(status, target);
    }
    if status.message().contains("tcp connect") {
        return no_server_failure(target);
    }
    unexpected_peer_failure(status.message(), target)
}

/// The failure for a connection that was not made.
pub(super) fn connect_failure(error: &tonic::transport::Error, target: &str) -> CommandFailure {
    // The crate keeps the cause private. Only its text tells a refused connection from one that was closed.
    let cause = format!("{error:?}");
    if cause.contains("hyper::Error") { unexpected_peer_failure(&error.to_string(), target) } else { no_server_failure(target) }
}

fn unexpected_peer_failure(message: &str, target: &str) -> CommandFailure {
    CommandFailure::unavailable(format!(
        "what listens at {target} does not answer as a portcullis server does ({message}): it has no connection left, expects TLS, or \
         is something else; nothing was asked of it"
    ))
}

impl CommandFailure {
    /// Adds the same command on the store itself, if no server answers.
    pub(super) fn with_store_command_hint(self, line: Option<&str>) -> Self {
        // On the store itself, the command would find the same full disk.
        match line.filter(|_| self.code == Self::UNAVAILABLE && !self.message.contains(NO_SPACE)) {
            Some(line) => Self { message: format!("{}\n{line}", self.message), ..self },
            None => self,
        }
    }
}

/// The hint with the command to run on the store itself, for the command that is running now; `None` if that command opened the
/// store already.
pub(super) fn store_command_hint_for(admin: &AdminArgs) -> Option<String> {
    let is_named = std::env::var_os("PORTCULLIS_STORE").is_some();
    admin.store.is_none().then(|| store_command_hint(std::env::args_os().skip(1), &admin.data, is_named))
}

/// The command to run without a server. `is_named` says that the environment names the store.
fn store_command_hint(arguments: impl IntoIterator<Item = OsString>, data: &Path, is_named: bool) -> String {
    let file = data.join("store.db");
    // `serve` takes the store that the environment names before the one in the data folder.
    let store = match std::path::absolute(&file) {
        _ if is_named => "env:PORTCULLIS_STORE".to_owned(),
        Ok(path) if path.is_file() => format!("sqlite:{}", path.display()),
        _ => {
            return format!(
                "without the server: run it on the server's machine with --store sqlite:DATA/store.db --data DATA, or with --store \
                 env:VARIABLE where the store is PostgreSQL (the data folder `{}` here holds no store)",
                data.display()
            );
        }
    };
    let (mut words, mut skips) = (vec!["portcullis".to_owned()], false);
    for argument in arguments {
        let word = argument.to_string_lossy().into_owned();
        if std::mem::take(&mut skips) || word.starts_with("--target=") {
            continue;
        }
        match word.as_str() {
            "--target" => skips = true,
            _ => words.push(word),
        }
    }
    words.extend(["--store".to_owned(), store]);
    format!(
        "without the server, if this is the store that it follows:\n  {}",
        shell_quote::quote_command(words.iter().map(String::as_str))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_under_the_store_has_no_way_around() {
        let check = |message: &str, expected: &str| {
            assert_eq!(CommandFailure::unavailable(message).with_store_command_hint(Some("LINE")).message, expected);
        };
        check("nobody answers", "nobody answers\nLINE");
        let full = format!("not done: {NO_SPACE} `/s.db`, so nothing was written: make room");
        check(&full, &full);
    }

    #[test]
    fn the_line_is_the_command_on_the_store() {
        let folder = tempfile::tempdir().unwrap();
        let line = |words: &[&str], is_named: bool| store_command_hint(words.iter().map(OsString::from), folder.path(), is_named);
        let kill =
            ["revoke", "agent", "spiffe://a/b", "--reason", "leaked key", "--target", "http://127.0.0.1:1", "--wait", "fleet"];
        assert!(line(&kill, false).contains("holds no store"), "{}", line(&kill, false));
        let begins = "without the server, if this is the store that it follows:\n  portcullis revoke ";
        let expected = format!("{begins}agent spiffe://a/b --reason 'leaked key' --wait fleet --store ");
        assert_eq!(line(&kill, true), format!("{expected}env:PORTCULLIS_STORE"));
        std::fs::write(folder.path().join("store.db"), "").unwrap();
        let store = format!("sqlite:{}", folder.path().join("store.db").display());
        assert_eq!(line(&kill, false), format!("{expected}{store}"));
        assert_eq!(line(&kill, true), format!("{expected}env:PORTCULLIS_STORE"));
        let attached = line(&["--target=http://x", "revoke", "all"], false);
        assert_eq!(attached, format!("{begins}all --store {store}"));
    }
}
