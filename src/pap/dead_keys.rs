//! Handles the keys that a change lists: a dead key must not be listed again, and a rotated-out key becomes dead.
//!
//! A dead key is a revocation row like any other. It reaches every replica, and it survives restarts, prunes and rollbacks.
//! Replicas also merge it into an adopted store. Look next at [`crate::policy::listed_keys`], which compares documents.

use std::collections::{BTreeSet, HashMap};

use super::administrators::is_administrator;
use super::apply::ChangePlan;
use super::{AdministrationPoint, Error};
use crate::model::limits::KEYS_PER_LOOKUP_MAX;
use crate::model::rows::{DocumentKey, RevocationKind, RevocationTarget, StoreWrite};
use crate::policy::diff::weakened_documents;
use crate::policy::key_changes::{ListedKey, RotatedKey, document_keys, newly_listed_keys, rotated_keys};
use crate::policy::{Diagnostic, Document};

impl AdministrationPoint {
    /// Refuses dead keys in documents that newly list them.
    ///
    /// A document that already listed a key may keep it after its revocation. The key stays dead anyway, and a server that starts
    /// with `--policies` must not fail because of a revocation.
    ///
    /// # Errors
    /// [`Error::InvalidPolicy`] with one diagnostic for each key, or if the store cannot be read.
    pub(super) async fn check_no_dead_keys(&self, listed: &[ListedKey]) -> Result<(), Error> {
        let mut diagnostics = Vec::new();
        for some in listed.chunks(KEYS_PER_LOOKUP_MAX) {
            let targets: Vec<RevocationTarget> =
                some.iter().map(|key| RevocationTarget::Key(key.thumbprint.to_string())).collect();
            let rows = self.store.revocations_of(&targets).await?;
            let dead: HashMap<&RevocationTarget, &str> =
                rows.iter().filter(|row| row.dead).map(|row| (&row.target, row.reason.as_str())).collect();
            let found = some.iter().zip(&targets).filter_map(|(key, target)| Some(key.dead_key_diagnostic(dead.get(target)?)));
            diagnostics.extend(found);
        }
        if diagnostics.is_empty() { Ok(()) } else { Err(Error::InvalidPolicy(diagnostics)) }
    }
}

impl ChangePlan {
    /// The keys that the change newly lists. This parses the previous documents, so it must not run on the runtime of the kill
    /// switch.
    pub(super) fn newly_listed_keys(&self, documents: &[Document]) -> Vec<ListedKey> {
        let changed: BTreeSet<&DocumentKey> = self.changes.iter().map(|change| &change.key).collect();
        newly_listed_keys(documents.iter().filter(|document| changed.contains(&document.key)), &self.replaced_documents())
    }

    /// Adds the consequences of the change, given all documents in force after it. Rotated-out keys become dead, and a change of
    /// operators must leave an administrator with a valid key. Returns further warnings.
    pub(super) fn add_consequences(&mut self, after: &[Document]) -> Vec<Diagnostic> {
        let replaced = self.replaced_documents();
        let rotated = rotated_keys(&replaced, after);
        self.weakens = !weakened_documents(&replaced, after).is_empty();
        self.writes.extend(rotated.iter().map(|key| StoreWrite::Revoke {
            target: RevocationTarget::Key(key.thumbprint.to_string()),
            kind: RevocationKind::Dead,
            reason: key.revocation_reason(),
        }));
        if self.changes.iter().any(|change| change.key.kind == "operator") {
            let administrators = after.iter().filter(|document| is_administrator(document));
            self.keep_one_unrevoked = administrators.flat_map(document_keys).map(ToString::to_string).collect();
        }
        rotated.iter().map(RotatedKey::rotation_diagnostic).collect()
    }

    /// The previous versions of changed and removed documents.
    fn replaced_documents(&self) -> Vec<Document> {
        self.replaced.iter().filter_map(|row| Document::from_row(row).ok()).collect()
    }
}
