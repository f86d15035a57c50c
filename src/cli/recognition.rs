//! The server's look-up of a revoked name, reported so that an unknown name is not overlooked.

use serde_json::{Value, json};

use super::output::Output;
use super::visible_text::visible;
use super::{Failure, shell};
use crate::api::r#gen as wire;

/// The server's answer about a name. A server of an earlier version sends none.
pub(super) struct Recognition(Option<wire::NameRecognition>);

impl From<Option<wire::NameRecognition>> for Recognition {
    fn from(said: Option<wire::NameRecognition>) -> Self {
        Self(said)
    }
}

impl Recognition {
    /// Whether no identity that was looked up has the name.
    pub(super) fn is_unknown(&self) -> bool {
        self.standing() == wire::NameStanding::Unknown
    }

    /// The JSON for a script. `known` is `null` if the name was not looked up.
    pub(super) fn json(&self) -> Value {
        let known = match self.standing() {
            wire::NameStanding::Known => Some(true),
            wire::NameStanding::Unknown => Some(false),
            wire::NameStanding::NotLooked | wire::NameStanding::Unspecified => None,
        };
        let said = self.0.clone().unwrap_or_default();
        let nearest = said.nearest.map(|nearest| json!({ "kind": nearest.kind, "key": nearest.key }));
        json!({ "known": known, "nearest": nearest, "note": said.note })
    }

    /// Prints the answer for people. An unknown name, or one that could not be looked up, is a warning on standard error.
    pub(super) fn say(&self, output: &Output) {
        let Some(said) = &self.0 else { return };
        let note = visible(&said.note);
        match self.standing() {
            wire::NameStanding::Unknown => {
                let mut message = format!("the revocation is written, but NOTHING BEARS THAT NAME: {note}");
                if let Some(nearest) = &said.nearest {
                    let words = ["portcullis", "revoke", &nearest.kind].into_iter().chain(nearest.key.iter().map(String::as_str));
                    message.push_str(&format!("\n  did you mean:  {}", shell::line(words)));
                }
                output.warning(&message);
            }
            wire::NameStanding::NotLooked => output.warning(&format!("nobody can say whether anything bears that name: {note}")),
            wire::NameStanding::Known if !note.is_empty() => output.line(&note),
            wire::NameStanding::Known | wire::NameStanding::Unspecified => {}
        }
    }

    /// The exit code of a command that did what it was asked to do.
    pub(super) fn end(&self, unknown_ok: bool) -> Result<(), Failure> {
        if self.is_unknown() && !unknown_ok { Err(Failure::silent(Failure::UNKNOWN_NAME)) } else { Ok(()) }
    }

    fn standing(&self) -> wire::NameStanding {
        self.0.as_ref().map_or(wire::NameStanding::Unspecified, wire::NameRecognition::standing)
    }
}
