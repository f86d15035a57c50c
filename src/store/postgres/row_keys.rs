//! The keys under which documents and revocations are stored in their tables.
//!
//! A key is a hash, because names may be longer than an index permits.

use ring::digest::{SHA256, digest};

use crate::model::rows::{DocumentKey, RevocationTarget};
use crate::store::Error;

/// Encodes a target, and returns it with the key of its row. The key is a hash, because names may be longer than an index
/// permits.
pub(super) fn encode_target(target: &RevocationTarget) -> Result<(Vec<u8>, String), Error> {
    let name = serde_json::to_string(target)
        .map_err(|error| Error::Rejected(format!("the target `{target}` cannot be stored: {error}")))?;
    Ok((digest(&SHA256, name.as_bytes()).as_ref().to_vec(), name))
}

/// The key of a document's row. Neither part of its name contains a NUL.
pub(super) fn document_key(key: &DocumentKey) -> Vec<u8> {
    digest(&SHA256, format!("{}\0{}", key.kind, key.id).as_bytes()).as_ref().to_vec()
}
