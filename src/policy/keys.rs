//! The keys that documents list: which ones a change lists anew, and which ones it rotates out.
//!
//! A key that was rotated out is dead, and a dead one cannot be listed again: that is asked of the store, which knows what is revoked
//! (`pap/keys.rs`). Here only documents are compared. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::model::ids::Thumbprint;
use crate::model::records::DocumentKey;

use super::diagnostic::{Diagnostic, Position, Severity};
use super::document::{Body, Document};

/// A key that a document lists and that the document of before, if there was one, did not.
#[derive(Clone, Debug)]
pub struct ListedKey {
    /// The key.
    pub thumbprint: Thumbprint,
    of: DocumentKey,
    path: String,
    at: Position,
}

/// A key that the document of before listed and that no document lists any more.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RotatedKey {
    /// The key.
    pub thumbprint: Thumbprint,
    /// The document that listed it.
    pub of: DocumentKey,
}

/// The keys of a document: an agent's, an operator's or an issuer's; none of a document in shadow.
pub fn keys_of(document: &Document) -> Vec<&Thumbprint> {
    match &document.body {
        _ if document.is_shadow() => Vec::new(),
        Body::Agent(agent) => agent.keys.iter().collect(),
        Body::Operator(operator) => operator.keys.iter().map(|key| key.thumbprint()).collect(),
        Body::Issuer(issuer) => issuer.keys.iter().map(|named| named.key.thumbprint()).collect(),
        _ => Vec::new(),
    }
}

/// The keys that documents list anew. `before` holds the documents that they take the place of.
pub fn newly_listed<'a>(documents: impl IntoIterator<Item = &'a Document>, before: &[Document]) -> Vec<ListedKey> {
    let before: BTreeMap<&DocumentKey, HashSet<&Thumbprint>> =
        before.iter().map(|document| (&document.key, keys_of(document).into_iter().collect())).collect();
    let mut listed = Vec::new();
    for document in documents {
        let known = before.get(&document.key);
        let keys = keys_of(document).into_iter().enumerate();
        let new = keys.filter(|(_, key)| !known.is_some_and(|known| known.contains(key)));
        listed.extend(new.map(|(index, thumbprint)| ListedKey {
            thumbprint: thumbprint.clone(),
            of: document.key.clone(),
            path: document.path.clone(),
            at: document.position("keys", index),
        }));
    }
    listed
}

/// The keys that are rotated out: an operator's, whose document no longer lists it or is gone; an agent's, whose document no longer lists
/// it. `before` holds the documents that changed or are gone, `after` all that are in force then.
///
/// An agent whose whole document goes keeps its keys: taking a folder for another one must not kill every key of a fleet for good, and
/// an earlier policy can be put in force again.
pub fn rotated_out<'a>(before: &'a [Document], after: impl IntoIterator<Item = &'a Document>) -> Vec<RotatedKey> {
    let (mut listed, mut agents) = (HashSet::new(), HashSet::new());
    for document in after {
        listed.extend(keys_of(document));
        if matches!(document.body, Body::Agent(_)) {
            agents.insert(&document.key);
        }
    }
    let mut rotated = BTreeSet::new();
    for document in before {
        let counts = match &document.body {
            Body::Operator(_) => true,
            Body::Agent(_) => agents.contains(&document.key),
            _ => false,
        };
        let keys = keys_of(document).into_iter().filter(|key| counts && !listed.contains(key));
        rotated.extend(keys.map(|key| RotatedKey { thumbprint: key.clone(), of: document.key.clone() }));
    }
    rotated.into_iter().collect()
}

impl ListedKey {
    /// That the key is dead, where the document lists it.
    pub fn is_dead(&self, why: &str) -> Diagnostic {
        let Self { thumbprint, of, path, at } = self;
        let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
        let message =
            format!("key `{thumbprint}` of {} `{}` is dead for good: it was revoked or rotated out{why}", of.kind, of.id);
        let help = Some("make a new key: `portcullis token keygen`".to_owned());
        Diagnostic::new(Severity::Error, path, *at, message).with_help(help)
    }
}

impl RotatedKey {
    /// That the key dies with the change.
    pub fn dies(&self) -> Diagnostic {
        let message =
            format!("key `{}` of {} `{}` is rotated out: it is dead for good", self.thumbprint, self.of.kind, self.of.id);
        Diagnostic::of_folder(Severity::Warning, message)
    }

    /// Why its row says that it is dead.
    pub fn reason(&self) -> String {
        const REASON_ID_BYTES_MAX: usize = 512;
        let end = self.of.id.floor_char_boundary(REASON_ID_BYTES_MAX);
        format!("rotated out of {} {}", self.of.kind, self.of.id.get(..end).unwrap_or_default())
    }
}
