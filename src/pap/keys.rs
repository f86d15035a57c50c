//! Keys that documents list, against what the store knows to be dead: a dead key is not listed again, and one that is rotated out dies.
//!
//! Both are rows of the kill switch: they reach every replica, outlive restarts, prunes and rollbacks, and come into an adopted store with
//! what replicas merge. Look next at [`crate::policy::keys`], which compares documents.

use std::collections::{BTreeSet, HashMap};

use super::apply::{Plan, administers};
use super::{Admin, Error};
use crate::model::records::{DocumentKey, Meaning, Target, Write};
use crate::policy::diff::weakened;
use crate::policy::keys::{ListedKey, RotatedKey, keys_of, newly_listed, rotated_out};
use crate::policy::{Diagnostic, Document};

/// Keys that are looked up at once.
const LOOKED_UP_MAX: usize = 10_000;

impl Admin {
    /// Refuses keys that are dead, where documents list them anew.
    ///
    /// A document that goes on listing a key which was revoked is let pass: the key stays dead all the same, and a server that is started
    /// with `--policies` must not stay down because of a kill.
    ///
    /// # Errors
    /// [`Error::Policy`] with one diagnostic a key, or if the store cannot be read.
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
    /// The keys that the change lists anew. Reads the documents of before: not for the runtime that serves the kill switch.
    pub(super) fn newly_listed(&self, documents: &[Document]) -> Vec<ListedKey> {
        let changed: BTreeSet<&DocumentKey> = self.changes.iter().map(|change| &change.key).collect();
        newly_listed(documents.iter().filter(|document| changed.contains(&document.key)), &self.replaced())
    }

    /// Adds what the change does besides, given all documents that are in force then: what it rotates out is dead, and whoever changes
    /// operators leaves one who can undo it. What is worth saying of that is returned.
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

    /// The documents of before that are changed or gone.
    fn replaced(&self) -> Vec<Document> {
        self.replaced.iter().filter_map(|row| Document::from_row(row).ok()).collect()
    }
}
