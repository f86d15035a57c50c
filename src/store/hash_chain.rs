//! The hash chain of the change log and the digest of the rows. Stores compute both when they write, and followers verify them.
//!
//! Every store must compute the same values, so this file depends on no database engine. Changing one byte of an encoding makes
//! every existing store look corrupt; such a change needs a new schema version. Look next at [`super::write_rules`].

use std::convert::Infallible;
use std::num::NonZero;

use ring::digest::{Context, SHA256};

use super::{CommitRow, Error, StoreState, StoredDocument};
use crate::model::parallel::map_chunks_in_order;
use crate::model::revision::StateDigest;
use crate::model::rows::{DocumentOrigin, DocumentRow, RevocationRow, RowChange};

/// The hash that precedes the first row of the change log.
pub const GENESIS: [u8; 32] = [0; 32];

/// Rows of a full state that one core hashes as one chunk: some milliseconds of work.
const ROWS_PER_CHUNK: NonZero<usize> = NonZero::new(16_384).unwrap();

/// Encodes the changes of a commit as the log stores and hashes them: JSON, in order.
///
/// # Errors
/// [`Error::Corrupt`] if they cannot be encoded. No value of these types causes it.
pub fn encode_changes(changes: &[RowChange]) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(changes).map_err(|error| Error::Corrupt(format!("changes cannot be encoded: {error}")))
}

/// Computes SHA-256(previous hash ‖ number as u64 big endian ‖ encoded changes).
pub fn commit_hash(previous_hash: &[u8; 32], number: u64, changes_as_stored: &[u8]) -> [u8; 32] {
    let mut hash = FieldHasher::new();
    hash.update_raw(previous_hash);
    hash.update_raw(&number.to_be_bytes());
    hash.update_raw(changes_as_stored);
    hash.finish()
}

impl CommitRow {
    /// Checks that the row follows the row with this number and hash, and that its own hash is the hash of its changes.
    ///
    /// # Errors
    /// [`Error::Corrupt`], naming the revision and the mismatch.
    pub fn verify_after(&self, number: u64, hash: &[u8; 32]) -> Result<(), Error> {
        if number.checked_add(1) != Some(self.number) {
            return Err(Error::Corrupt(format!(
                "revision {} of the change log stands where one after {number} belongs",
                self.number
            )));
        }
        if self.previous_hash != *hash {
            return Err(Error::Corrupt(format!("revision {} of the change log does not follow revision {number}", self.number)));
        }
        if self.hash != commit_hash(hash, self.number, &encode_changes(&self.changes)?) {
            return Err(Error::Corrupt(format!("revision {} of the change log has not the hash of its changes", self.number)));
        }
        Ok(())
    }
}

/// Computes the hash of a document that was last written by `revision`.
pub fn document_sha256(row: &DocumentRow, revision: u64) -> [u8; 32] {
    let mut hash = FieldHasher::new();
    hash.update_field(b"document");
    hash.update_field(row.key.kind.as_bytes());
    hash.update_field(row.key.id.as_bytes());
    hash.update_field(row.json.as_bytes());
    hash.update_field(row.path.as_bytes());
    hash.update_field(&row.line.to_be_bytes());
    hash.update_field(match row.origin {
        DocumentOrigin::Folder => b"folder",
        DocumentOrigin::Api => b"api",
    });
    hash.update_field(&revision.to_be_bytes());
    hash.finish()
}

/// Computes the hash of a revocation.
pub fn revocation_sha256(row: &RevocationRow) -> [u8; 32] {
    let mut hash = FieldHasher::new();
    hash.update_field(b"revocation");
    hash.update_field(row.target.kind().as_bytes());
    for part in row.target.key_parts() {
        hash.update_field(part.as_bytes());
    }
    hash.update_field(&[u8::from(row.dead), u8::from(row.suspended)]);
    for second in [row.watermark_unix_s, row.expires_at_unix_s] {
        hash.update_field(second.map(i64::to_be_bytes).as_ref().map_or(&[], |bytes| bytes.as_slice()));
    }
    hash.update_field(row.reason.as_bytes());
    hash.update_field(&row.revision.to_be_bytes());
    hash.finish()
}

/// Computes the digest of a full state from scratch, on all cores. A commit updates the stored digest incrementally instead.
pub fn state_digest(documents: &[StoredDocument], revocations: &[RevocationRow]) -> StateDigest {
    let mut digest = rows_digest(documents, |document| document_sha256(&document.row, document.revision));
    digest.add_all(rows_digest(revocations, revocation_sha256));
    digest
}

impl StoreState {
    /// Whether the stored digest is the digest of the rows. Costs one hash per row, on all cores.
    pub fn digest_matches(&self) -> bool {
        state_digest(&self.documents, &self.revocations) == self.digest
    }
}

/// The digest of the rows, computed in parallel chunks.
fn rows_digest<T: Sync>(rows: &[T], row_sha256: impl Fn(&T) -> [u8; 32] + Sync) -> StateDigest {
    let of_piece = |piece: &[T]| {
        let mut digest = StateDigest::default();
        piece.iter().for_each(|row| digest.add(&row_sha256(row)));
        digest
    };
    let mut digest = StateDigest::default();
    let Ok(()) = map_chunks_in_order(rows, ROWS_PER_CHUNK, of_piece, |piece| {
        digest.add_all(piece);
        Ok::<(), Infallible>(())
    });
    digest
}

/// SHA-256 over length-prefixed fields, so that two different rows never encode to the same bytes.
struct FieldHasher(Context);

impl FieldHasher {
    fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    fn update_raw(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn update_field(&mut self, bytes: &[u8]) {
        self.update_raw(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
        self.update_raw(bytes);
    }

    fn finish(self) -> [u8; 32] {
        let mut sha256 = [0; 32];
        for (to, from) in sha256.iter_mut().zip(self.0.finish().as_ref()) {
            *to = *from;
        }
        sha256
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::rows::{DocumentKey, RevocationTarget};

    fn document() -> DocumentRow {
        let key = DocumentKey { kind: "agent".into(), id: "a".into() };
        DocumentRow { key, json: "{}".into(), path: String::new(), line: 0, origin: DocumentOrigin::Api }
    }

    fn revocation() -> RevocationRow {
        RevocationRow {
            target: RevocationTarget::User { issuer: "i".into(), subject: "s".into() },
            dead: false,
            suspended: true,
            watermark_unix_s: None,
            expires_at_unix_s: None,
            reason: "r".into(),
            revision: 7,
        }
    }

    #[test]
    fn every_field_of_a_document_counts() {
        let plain = document_sha256(&document(), 1);
        let check = |change: fn(&mut DocumentRow)| {
            let mut row = document();
            change(&mut row);
            assert_ne!(document_sha256(&row, 1), plain, "{row:?}");
        };
        check(|row| row.key.kind = "agen".into());
        check(|row| (row.key.kind, row.key.id) = ("agenta".into(), String::new()));
        check(|row| row.json = "[]".into());
        check(|row| row.path = "p".into());
        check(|row| row.line = 1);
        check(|row| row.origin = DocumentOrigin::Folder);
        assert_ne!(document_sha256(&document(), 2), plain);
    }

    #[test]
    fn every_field_of_a_revocation_counts() {
        let plain = revocation_sha256(&revocation());
        let check = |change: fn(&mut RevocationRow)| {
            let mut row = revocation();
            change(&mut row);
            assert_ne!(revocation_sha256(&row), plain, "{row:?}");
        };
        check(|row| row.target = RevocationTarget::User { issuer: "is".into(), subject: String::new() });
        check(|row| row.target = RevocationTarget::Agent("i".into()));
        check(|row| row.dead = true);
        check(|row| row.suspended = false);
        check(|row| row.watermark_unix_s = Some(0));
        check(|row| row.expires_at_unix_s = Some(0));
        check(|row| row.reason = String::new());
        check(|row| row.revision = 8);
    }

    #[test]
    fn a_row_follows_its_predecessor_or_is_corrupt() {
        let changes = vec![RowChange::Revocation(revocation())];
        let hash = commit_hash(&[3; 32], 7, &encode_changes(&changes).unwrap());
        let row = CommitRow { number: 7, previous_hash: [3; 32], hash, digest: StateDigest::default(), unix_ms: 0, changes };
        assert_eq!(row.verify_after(6, &[3; 32]), Ok(()));
        let check = |row: &CommitRow, number, hash| assert!(matches!(row.verify_after(number, &hash), Err(Error::Corrupt(_))));
        check(&row, 5, [3; 32]);
        check(&row, u64::MAX, [3; 32]);
        check(&row, 6, [4; 32]);
        check(&CommitRow { changes: vec![], ..row.clone() }, 6, [3; 32]);
        check(&CommitRow { hash: [0; 32], ..row }, 6, [3; 32]);
    }
}
