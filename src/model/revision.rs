//! Revisions: a history, a number in that history, and the digest of the store's rows at that number.
//!
//! A store numbers its commits and updates the digest; `sync` compares both with its own. Look next at `store.rs`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Identifies one history of a store: a UUID as text. A restored store that is adopted begins a new history.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HistoryId(Arc<str>);

impl HistoryId {
    /// Wraps an id that a store has made.
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HistoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A revision token, written `HISTORY.NUMBER`. Numbers are consecutive from 1; 0 is the empty store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision {
    /// The history it belongs to.
    pub history: HistoryId,
    /// Its number in that history.
    pub number: u64,
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.history, self.number)
    }
}

impl FromStr for Revision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "is not a revision token: expected `HISTORY.NUMBER` as an answer or a write printed it".to_owned();
        let (history, number) = text.rsplit_once('.').ok_or_else(expected)?;
        let plain = number.bytes().all(|byte| byte.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
        if history.is_empty() || history.len() > 64 || !plain {
            return Err(expected());
        }
        Ok(Self { history: HistoryId::new(history), number: number.parse().map_err(|_| expected())? })
    }
}

/// An additive hash over the logical rows of a store: the wrapping sum of each row's SHA-256, in four words.
///
/// Each commit updates it incrementally. It detects replicas that differ. It does not protect against an attacker who can write rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateDigest([u64; 4]);

impl StateDigest {
    /// Adds a row by its SHA-256.
    pub fn add(&mut self, row_sha256: &[u8; 32]) {
        self.combine(row_sha256, u64::wrapping_add);
    }

    /// Removes a row by its SHA-256.
    pub fn remove(&mut self, row_sha256: &[u8; 32]) {
        self.combine(row_sha256, u64::wrapping_sub);
    }

    /// Adds all the rows of another digest.
    pub fn add_all(&mut self, other: Self) {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word = word.wrapping_add(more);
        }
    }

    /// The digest as 64 hexadecimal digits.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|word| format!("{word:016x}")).collect()
    }

    /// Reads the output of [`StateDigest::to_hex`].
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut words = [0; 4];
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (word, digits) in words.iter_mut().zip(text.as_bytes().chunks_exact(16)) {
            *word = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Self(words))
    }

    fn combine(&mut self, row_sha256: &[u8; 32], operation: fn(u64, u64) -> u64) {
        for (word, bytes) in self.0.iter_mut().zip(row_sha256.as_chunks::<8>().0) {
            *word = operation(*word, u64::from_le_bytes(*bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revision_tokens() {
        let token = "0190a0b0-1111-7000-8000-000000000001.42";
        let revision: Revision = token.parse().unwrap();
        assert_eq!((revision.number, revision.to_string().as_str()), (42, token));
        for bad in ["", ".", "x", "x.", ".4", "x.-1", "x.+1", "x.1.", "x.01", "x.99999999999999999999999"] {
            assert!(bad.parse::<Revision>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_digest_forgets_the_order_and_undoes() {
        let (a, b) = ([1; 32], [0xff; 32]);
        let mut left = StateDigest::default();
        left.add(&a);
        left.add(&b);
        let mut right = StateDigest::default();
        right.add(&b);
        right.add(&a);
        assert_eq!(left, right);
        assert_eq!(StateDigest::from_hex(&left.to_hex()), Some(left));
        left.remove(&a);
        left.remove(&b);
        assert_eq!(left, StateDigest::default());
        assert_eq!(StateDigest::from_hex("xyz"), None);
    }
}
