//! Keys of the revocation index: 128-bit hashes of revocation targets.
//!
//! Every process uses random hash keys, so that nobody can construct collisions. Making a key allocates nothing, and a key is kept beside a
//! verified chain. It has no meaning in another index. Keys are neither stored nor sent. Look next at [`super::RevocationIndex`].

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::model::rows::RevocationTarget;

/// A revocation target with borrowed parts. See [`RevocationTarget`] for the meaning of each variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetRef<'a> {
    /// Everything.
    All,
    /// An agent, by SPIFFE ID.
    Agent(&'a str),
    /// A session, by `sid`.
    Session(&'a str),
    /// A task, by `txn`.
    Task(&'a str),
    /// The delegation from a user to an agent.
    Delegation {
        /// The user's issuer.
        issuer: &'a str,
        /// The user's subject.
        subject: &'a str,
        /// The agent's SPIFFE ID.
        agent: &'a str,
    },
    /// An application, by client id.
    Application(&'a str),
    /// A user.
    User {
        /// The user's issuer.
        issuer: &'a str,
        /// The user's subject.
        subject: &'a str,
    },
    /// A key, by thumbprint.
    Key(&'a str),
    /// A tool, `server/tool`.
    Tool(&'a str),
    /// A hop, by base64url(SHA-256) of its signing input.
    Hop(&'a str),
    /// A token, by `jti`.
    Token(&'a str),
}

impl<'a> From<&'a RevocationTarget> for TargetRef<'a> {
    fn from(target: &'a RevocationTarget) -> Self {
        match target {
            RevocationTarget::All => TargetRef::All,
            RevocationTarget::Agent(id) => TargetRef::Agent(id),
            RevocationTarget::Session(id) => TargetRef::Session(id),
            RevocationTarget::Task(id) => TargetRef::Task(id),
            RevocationTarget::Delegation { issuer, subject, agent } => TargetRef::Delegation { issuer, subject, agent },
            RevocationTarget::Application(id) => TargetRef::Application(id),
            RevocationTarget::User { issuer, subject } => TargetRef::User { issuer, subject },
            RevocationTarget::Key(id) => TargetRef::Key(id),
            RevocationTarget::Tool(id) => TargetRef::Tool(id),
            RevocationTarget::Hop(id) => TargetRef::Hop(id),
            RevocationTarget::Token(id) => TargetRef::Token(id),
        }
    }
}

impl<'a> TargetRef<'a> {
    /// Returns a tag that is unique for the kind, and the parts; absent parts are empty.
    fn tag_and_parts(self) -> (u8, [&'a str; 3]) {
        match self {
            TargetRef::All => (0, ["", "", ""]),
            TargetRef::Agent(id) => (1, [id, "", ""]),
            TargetRef::Session(id) => (2, [id, "", ""]),
            TargetRef::Task(id) => (3, [id, "", ""]),
            TargetRef::Delegation { issuer, subject, agent } => (4, [issuer, subject, agent]),
            TargetRef::Application(id) => (5, [id, "", ""]),
            TargetRef::User { issuer, subject } => (6, [issuer, subject, ""]),
            TargetRef::Key(id) => (7, [id, "", ""]),
            TargetRef::Tool(id) => (8, [id, "", ""]),
            TargetRef::Hop(id) => (9, [id, "", ""]),
            TargetRef::Token(id) => (10, [id, "", ""]),
        }
    }
}

/// A revocation target, hashed for one index; 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RevocationKey {
    // Two words instead of a `u128`: its alignment would make every entry of the exact set 8 bytes larger.
    pub(super) low: u64,
    pub(super) high: u64,
}

impl std::hash::Hash for RevocationKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.low);
    }
}

/// Makes keys with two SipHash functions, each with its own random hash key.
pub(super) struct KeyHasher(RandomState, RandomState);

impl KeyHasher {
    /// Draws fresh random hash keys.
    pub(super) fn new() -> Self {
        Self(RandomState::new(), RandomState::new())
    }

    /// Hashes a target.
    pub(super) fn key(&self, target: TargetRef<'_>) -> RevocationKey {
        let (tag, parts) = target.tag_and_parts();
        RevocationKey { low: hash_half(&self.0, tag, parts), high: hash_half(&self.1, tag, parts) }
    }
}

fn hash_half(keys: &RandomState, tag: u8, parts: [&str; 3]) -> u64 {
    let mut hasher = keys.build_hasher();
    hasher.write_u8(tag);
    for part in parts {
        // The length precedes the bytes, so that two different targets never hash the same input.
        hasher.write_usize(part.len());
        hasher.write(part.as_bytes());
    }
    hasher.finish()
}

/// A hasher that returns the bits of a key unchanged, because they are a keyed hash already.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct IdentityHasher(u64);

impl Hasher for IdentityHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }
}

impl BuildHasher for IdentityHasher {
    type Hasher = IdentityHasher;

    fn build_hasher(&self) -> IdentityHasher {
        IdentityHasher(0)
    }
}
