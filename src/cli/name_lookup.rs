//! The server's look-up of a revoked name, reported so that an unknown name is not overlooked.

use serde_json::{Value, json};

use super::output::CommandOutput;
use super::visible_text::escape_for_terminal;
use super::{CommandFailure, shell_quote};
use crate::api::r#gen as wire;

/// The server's answer about a name. A server of an earlier version sends none.
pub(super) struct NameLookupAnswer(Option<wire::NameRecognition>);

impl From<Option<wire::NameRecognition>> for NameLookupAnswer {
    fn from(response: Option<wire::NameRecognition>) -> Self {
        Self(response)
    }
}

impl NameLookupAnswer {
    /// Whether no identity that was looked up has the name.
    pub(super) fn is_unknown(&self) -> bool {
        self.status() == wire::NameStanding::Unknown
    }

    /// The JSON for a script. `known` is `null` if the name was not looked up.
    pub(super) fn json(&self) -> Value {
        let known = match self.status() {
            wire::NameStanding::Known => Some(true),
            wire::NameStanding::Unknown => Some(false),
            wire::NameStanding::NotLooked | wire::NameStanding::Unspecified => None,
        };
        let response = self.0.clone().unwrap_or_default();
        let nearest = response.nearest.map(|nearest| json!({ "kind": nearest.kind, "key": nearest.key }));
        json!({ "known": known, "nearest": nearest, "note": response.note })
    }

    /// Prints the answer for people. An unknown name, or one that could not be looked up, is a warning on standard error.
    pub(super) fn print(&self, typed: &wire::RevocationTarget, output: &CommandOutput) {
        let Some(response) = &self.0 else { return };
        let note = escape_for_terminal(&response.note);
        match self.status() {
            wire::NameStanding::Unknown => {
                let mut message = format!("the revocation is written, but NOTHING HAS THAT NAME: {note}");
                if let Some(nearest) = &response.nearest {
                    let words: Vec<String> =
                        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
                    message.push_str(&format!("\n  did you mean:  {}", corrected_command(&words, typed, nearest)));
                    if differs_by_blanks(typed, nearest) {
                        message.push_str("\n  (it differs from what was typed by blanks alone)");
                    }
                }
                output.warning(&message);
            }
            wire::NameStanding::NotLooked => output.warning(&format!("it is unknown whether anything has that name: {note}")),
            wire::NameStanding::Known if !note.is_empty() => output.line(&note),
            wire::NameStanding::Known | wire::NameStanding::Unspecified => {}
        }
    }

    /// The exit code of a command that did what it was asked to do.
    pub(super) fn exit_result(&self, unknown_ok: bool) -> Result<(), CommandFailure> {
        if self.is_unknown() && !unknown_ok { Err(CommandFailure::exit_code_only(CommandFailure::UNKNOWN_NAME)) } else { Ok(()) }
    }

    fn status(&self) -> wire::NameStanding {
        self.0.as_ref().map_or(wire::NameStanding::Unspecified, wire::NameRecognition::standing)
    }
}

/// Options of `revoke` that take a value, which is no part of the target.
const OPTIONS_WITH_VALUE: &[&str] =
    &["--reason", "--wait", "--target", "--store", "--store-durability", "--data", "--operator-key"];

/// The typed command with its target replaced by `meant`. Its options stay, because the corrected command must do the same.
fn corrected_command(words: &[String], typed: &wire::RevocationTarget, meant: &wire::RevocationTarget) -> String {
    let mut positions = Vec::new();
    let mut index = 0;
    while let Some(word) = words.get(index) {
        let is_option = word.starts_with("--") && !typed.key.contains(word);
        if !is_option {
            positions.push(index);
        }
        index += if is_option && OPTIONS_WITH_VALUE.contains(&word.as_str()) { 2 } else { 1 };
    }
    let given: Vec<&str> = positions.iter().filter_map(|at| words.get(*at)).map(String::as_str).collect();
    let expected: Vec<&str> = ["revoke", &typed.kind].into_iter().chain(typed.key.iter().map(String::as_str)).collect();
    let new = [&meant.kind].into_iter().chain(&meant.key).map(String::as_str);
    let (Some(kind_at), true) = (positions.get(1), given == expected) else {
        return shell_quote::quote_command(["portcullis", "revoke"].into_iter().chain(new));
    };
    let kept = |at: usize| !positions.iter().skip(1).any(|position| *position == at);
    let rest = |from: usize, to: usize| {
        let all = words.iter().enumerate().skip(from).take(to.saturating_sub(from));
        all.filter(|(at, _)| kept(*at)).map(|(_, word)| word.as_str()).collect::<Vec<_>>()
    };
    shell_quote::quote_command(["portcullis"].into_iter().chain(rest(0, *kind_at)).chain(new).chain(rest(*kind_at, words.len())))
}

fn differs_by_blanks(typed: &wire::RevocationTarget, meant: &wire::RevocationTarget) -> bool {
    let without_blanks = |target: &wire::RevocationTarget| {
        target.key.iter().map(|part| part.split_whitespace().collect::<String>()).collect::<Vec<_>>()
    };
    typed.kind == meant.kind && without_blanks(typed) == without_blanks(meant)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(words: &[&str]) -> wire::RevocationTarget {
        let mut words = words.iter().map(|word| (*word).to_owned());
        wire::RevocationTarget { kind: words.next().unwrap(), key: words.collect() }
    }

    #[test]
    fn a_corrected_command_keeps_its_options() {
        let check = |line: &[&str], typed: &[&str], meant: &[&str], expected: &str| {
            let words: Vec<String> = line.iter().map(|word| (*word).to_owned()).collect();
            assert_eq!(corrected_command(&words, &target(typed), &target(meant)), format!("portcullis {expected}"));
        };
        check(
            &["revoke", "session", "s-1 ", "--reason", "leaked key", "--wait", "fleet"],
            &["session", "s-1 "],
            &["session", "s-1"],
            "revoke session s-1 --reason 'leaked key' --wait fleet",
        );
        check(
            &["--json", "revoke", "--reason", "session", "session", "--data=d", "-x", "--unknown-ok"],
            &["session", "-x"],
            &["task", "-x"],
            "--json revoke --reason session task -x --data=d --unknown-ok",
        );
        check(
            &["revoke", "user", "ana", "https://i", "--operator-key", "k", "--target", "127.0.0.1:1"],
            &["user", "ana", "https://i"],
            &["user", "https://i", "ana"],
            "revoke user https://i ana --operator-key k --target 127.0.0.1:1",
        );
        check(&["revoke", "session", "--", "--data"], &["session", "--data"], &["session", "d"], "revoke session d --");
        // What cannot be read keeps the target alone.
        check(&["revoke", "session", "x", "y"], &["session", "x"], &["session", "z"], "revoke session z");
    }

    #[test]
    fn blanks_are_told() {
        let check = |typed: &[&str], meant: &[&str], expected: bool| {
            assert_eq!(differs_by_blanks(&target(typed), &target(meant)), expected, "{typed:?}");
        };
        check(&["session", "s-1 "], &["session", "s-1"], true);
        check(&["user", "https://i", "a b"], &["user", "https://i", "ab"], true);
        check(&["session", "s-1"], &["session", "s-2"], false);
        check(&["session", "s-1 "], &["task", "s-1"], false);
    }
}
