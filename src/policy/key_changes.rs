//! Compares the keys that documents list: the keys that a change adds, and the keys that it rotates out.
//!
//! A rotated-out key is dead, and a dead key cannot be listed again. `pap/dead_keys.rs` checks that, because only the store knows the
//! revocations. This file is pure and compares documents only.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::model::ids::Thumbprint;
use crate::model::rows::DocumentKey;

use super::diagnostic::{Diagnostic, Severity, SourcePosition};
use super::document::{Document, DocumentBody};

/// A key that a document lists and that its previous version, if any, did not list.
#[derive(Clone, Debug)]
pub struct ListedKey {
    /// The key.
    pub thumbprint: Thumbprint,
    document: DocumentKey,
    path: String,
    at: SourcePosition,
}

/// A key that a previous document listed and that no document lists any more.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RotatedKey {
    /// The key.
    pub thumbprint: Thumbprint,
    /// The document that listed it.
    pub document: DocumentKey,
}

/// The keys that a document lists: those of an agent, an operator or an issuer. A shadow document lists none.
pub fn document_keys(document: &Document) -> Vec<&Thumbprint> {
    match &document.body {
        _ if document.is_shadow() => Vec::new(),
        DocumentBody::Agent(agent) => agent.keys.iter().collect(),
        DocumentBody::Operator(operator) => operator.keys.iter().map(|key| key.thumbprint()).collect(),
        DocumentBody::Issuer(issuer) => issuer.keys.iter().map(|named| named.key.thumbprint()).collect(),
        _ => Vec::new(),
    }
}

/// The keys that documents newly list. `before` holds the previous versions of these documents.
pub fn newly_listed_keys<'a>(documents: impl IntoIterator<Item = &'a Document>, before: &[Document]) -> Vec<ListedKey> {
    let before: BTreeMap<&DocumentKey, HashSet<&Thumbprint>> =
        before.iter().map(|document| (&document.key, document_keys(document).into_iter().collect())).collect();
    let mut listed = Vec::new();
    for document in documents {
        let known = before.get(&document.key);
        let keys = document_keys(document).into_iter().enumerate();
        let new = keys.filter(|(_, key)| !known.is_some_and(|known| known.contains(key)));
        listed.extend(new.map(|(index, thumbprint)| ListedKey {
            thumbprint: thumbprint.clone(),
            document: document.key.clone(),
            path: document.path.clone(),
            at: document.field_position("keys", index),
        }));
    }
    listed
}

/// The keys that a change rotates out. An operator's key is rotated out when the operator's document no longer lists it or is
/// removed. An agent's key is rotated out only when the agent's document no longer lists it. `before` holds the changed and
/// removed documents, `after` all documents in force after the change.
///
/// The keys of an agent stay alive when its whole document is removed. Otherwise, applying the wrong folder would kill every key
/// of a fleet for good. Even a rollback could not bring the agents back.
pub fn rotated_keys<'a>(before: &'a [Document], after: impl IntoIterator<Item = &'a Document>) -> Vec<RotatedKey> {
    let (mut listed, mut agents) = (HashSet::new(), HashSet::new());
    for document in after {
        listed.extend(document_keys(document));
        if matches!(document.body, DocumentBody::Agent(_)) {
            agents.insert(&document.key);
        }
    }
    let mut rotated = BTreeSet::new();
    for document in before {
        let counts = match &document.body {
            DocumentBody::Operator(_) => true,
            DocumentBody::Agent(_) => agents.contains(&document.key),
            _ => false,
        };
        let keys = document_keys(document).into_iter().filter(|key| counts && !listed.contains(key));
        rotated.extend(keys.map(|key| RotatedKey { thumbprint: key.clone(), document: document.key.clone() }));
    }
    rotated.into_iter().collect()
}

impl ListedKey {
    /// The error for a document that newly lists this dead key. `why` is the reason of the revocation, if any.
    pub fn dead_key_diagnostic(&self, why: &str) -> Diagnostic {
        let Self { thumbprint, document: of, path, at } = self;
        let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
        let message =
            format!("key `{thumbprint}` of {} `{}` is dead for good: it was revoked or rotated out{why}", of.kind, of.id);
        let help = Some("make a new key: `portcullis token keygen`".to_owned());
        Diagnostic::new(Severity::Error, path, *at, message).with_help(help)
    }
}

impl RotatedKey {
    /// The warning that the change makes this key dead.
    pub fn rotation_diagnostic(&self) -> Diagnostic {
        let message = format!(
            "key `{}` of {} `{}` is rotated out: it is dead for good",
            self.thumbprint, self.document.kind, self.document.id
        );
        Diagnostic::for_folder(Severity::Warning, message)
    }

    /// The reason for the revocation of this key.
    pub fn revocation_reason(&self) -> String {
        const REASON_ID_BYTES_MAX: usize = 512;
        let end = self.document.id.floor_char_boundary(REASON_ID_BYTES_MAX);
        format!("rotated out of {} {}", self.document.kind, self.document.id.get(..end).unwrap_or_default())
    }
}
