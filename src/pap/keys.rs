//! Handles the keys that a change lists: a dead key must not be listed again, and a rotated-out key becomes dead.
//!
//! A dead key is a revocation row like any other. It reaches every replica, and it survives restarts, prunes and rollbacks.
//! Replicas also merge it into an adopted store. Look next at [`crate::policy::keys`], which compares documents.

use std::collections::{BTreeSet, HashMap};

use super::apply::{Plan, administers};
use super::{Admin, Error};
use crate::model::records::{DocumentKey, Meaning, Target, Write};
use crate::policy::diff::weakened;
use crate::policy::keys::{ListedKey, RotatedKey, keys_of, newly_listed, rotated_out};
use crate::policy::{Diagnostic, Document};

/// The maximum number of keys in one lookup.
const LOOKED_UP_MAX: usize = 10_000;

impl Admin {
    /// Refuses dead keys in documents that newly list them.
    ///
    /// A document that already listed a key may keep it after its revocation. The key stays dead anyway, and a server that starts
    /// with `--policies` must not fail because of a revocation.
    ///
    /// # Errors
    /// [`Error::Policy`] with one diagnostic for each key, or if the store cannot be read.
    pub(super) async fn no_dead_keys(&self, listed: &[ListedKey]) -> Result<(), Error> {
        let mut diagnostics = Vec::new();
        for some in listed.chunks(LOOKED_UP_MAX) {
            let targets: Vec<Target> = some.iter().map(|key| Target::Key(key.thumbprint.to_string())).collect();
            let rows = self.store.revocations_of(&targets).await?;
            let dead: HashMap<&Target, &str> =
                rows.iter().filter(|row| row.dead).map(|row| (&row.target, row.reason.as_str())).collect();
            let found = some.iter().zip(&targets).filter_map(|(key, target)| Some(key.is_dead(dead.get(target)?)));
            diagnostics.extend(found);
        }
        if diagnostics.is_empty() { Ok(()) } else { Err(Error::Policy(diagnostics)) }
    }
}

impl Plan {
    /// The keys that the change newly lists. This parses the previous documents, so it must not run on the runtime of the kill
    /// switch.
    pub(super) fn newly_listed(&self, documents: &[Document]) -> Vec<ListedKey> {
        let changed: BTreeSet<&DocumentKey> = self.changes.iter().map(|change| &change.key).collect();
        newly_listed(documents.iter().filter(|document| changed.contains(&document.key)), &self.replaced())
    }

    /// Adds the consequences of the change, given all documents in force after it. Rotated-out keys become dead, and a change of
    /// operators must leave an administrator with a valid key. Returns further warnings.
    pub(super) fn complete(&mut self, after: &[Document]) -> Vec<Diagnostic> {
        let replaced = self.replaced();
        let rotated = rotated_out(&replaced, after);
        self.weakens = !weakened(&replaced, after).is_empty();
        self.writes.extend(rotated.iter().map(|key| Write::Revoke {
            target: Target::Key(key.thumbprint.to_string()),
            meaning: Meaning::Dead,
            reason: key.reason(),
        }));
        if self.changes.iter().any(|change| change.key.kind == "operator") {
            let administrators = after.iter().filter(|document| administers(document));
            self.one_must_sign = administrators.flat_map(keys_of).map(ToString::to_string).collect();
        }
        rotated.iter().map(RotatedKey::dies).collect()
    }

    /// The previous versions of changed and removed documents.
    fn replaced(&self) -> Vec<Document> {
        self.replaced.iter().filter_map(|row| Document::from_row(row).ok()).collect()
    }
}
