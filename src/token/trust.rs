//! The trust table: the issuers of roots, and the registry that binds agents to their holder keys.
//!
//! The snapshot builder makes the table from documents, and [`super::verify()`] reads it. A clone costs a few reference counts, and
//! changing one agent copies a thousandth of the registry. So a snapshot with a million agents can follow a single change quickly.
//! Suspensions are not part of the table; `revocation` has them.

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use crate::model::ids::{AgentId, ApplicationId, GroupId, IssuerUri, Thumbprint};
use crate::model::jwk::NamedKey;
use crate::model::limits::{HOP_LIFETIME_S_DEFAULT, KEYS_MAX, ROOT_LIFETIME_S_DEFAULT};
use crate::model::sharded_map::ShardedMap;

/// Why an issuer or agent cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An issuer has no key, or more than [`KEYS_MAX`].
    #[error("issuer `{issuer}` has {count} keys: give it 1 to {KEYS_MAX}")]
    KeyCount {
        /// The issuer.
        issuer: IssuerUri,
        /// The number of its keys.
        count: usize,
    },
    /// A lifetime is not positive.
    #[error("issuer `{0}` has a lifetime that is not positive")]
    Lifetime(IssuerUri),
    /// Two agents have the same holder key.
    #[error("key `{key}` is registered for agent `{holder}`: give agent `{agent}` a key of its own")]
    KeyTaken {
        /// The key.
        key: Thumbprint,
        /// The agent that has the key.
        holder: AgentId,
        /// The agent that cannot get it.
        agent: AgentId,
    },
}

/// A list of ids in a document, or all ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowList<T: Ord> {
    /// `["*"]`
    All,
    /// Only these ids.
    Only(BTreeSet<T>),
}

impl<T: Ord> Default for AllowList<T> {
    fn default() -> Self {
        Self::Only(BTreeSet::new())
    }
}

impl<T: Ord + Borrow<str>> AllowList<T> {
    /// Whether the list contains `id` or allows all ids.
    pub fn allows(&self, id: &str) -> bool {
        match self {
            AllowList::All => true,
            AllowList::Only(ids) => ids.contains(id),
        }
    }
}

/// An issuer of root tokens, with the names that it may vouch for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedIssuer {
    /// `iss` of its roots.
    pub id: IssuerUri,
    /// Its keys, 1 to [`KEYS_MAX`].
    pub keys: Vec<NamedKey>,
    /// The audiences that its roots may carry.
    pub audiences: BTreeSet<String>,
    /// The groups that it may assign to a user.
    pub groups: AllowList<GroupId>,
    /// The applications that it may name.
    pub applications: AllowList<ApplicationId>,
    /// The `typ` values that its tokens may have.
    pub typ: Vec<String>,
    /// Maximum lifetime of a root, in seconds.
    pub lifetime_max_s: i64,
    /// Maximum lifetime of a hop under a root of this issuer, in seconds.
    pub hop_lifetime_max_s: i64,
}

impl TrustedIssuer {
    /// An issuer with the defaults of its document: no audience, group or application; `aat+jwt` only; lifetimes of 8 h and 1 h.
    pub fn new(id: IssuerUri, keys: Vec<NamedKey>) -> Self {
        Self {
            id,
            keys,
            audiences: BTreeSet::new(),
            groups: AllowList::default(),
            applications: AllowList::default(),
            typ: vec![super::TOKEN_TYPE.to_owned()],
            lifetime_max_s: ROOT_LIFETIME_S_DEFAULT,
            hop_lifetime_max_s: HOP_LIFETIME_S_DEFAULT,
        }
    }
}

/// All trust that verification reads, at one point in time. Cloning and sharing it is cheap.
#[derive(Clone, Debug, Default)]
pub struct TrustTable {
    issuers: Arc<HashMap<IssuerUri, Arc<TrustedIssuer>>>,
    groups: Arc<HashSet<GroupId>>,
    agents: ShardedMap<AgentId, Arc<[Thumbprint]>>,
    keys: ShardedMap<Thumbprint, AgentId>,
}

impl TrustTable {
    /// A table that trusts nobody.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an issuer, or replaces it.
    ///
    /// # Errors
    /// [`Error::KeyCount`] or [`Error::Lifetime`].
    pub fn put_issuer(&mut self, issuer: TrustedIssuer) -> Result<(), Error> {
        if !(1..=KEYS_MAX).contains(&issuer.keys.len()) {
            return Err(Error::KeyCount { issuer: issuer.id, count: issuer.keys.len() });
        }
        if issuer.lifetime_max_s <= 0 || issuer.hop_lifetime_max_s <= 0 {
            return Err(Error::Lifetime(issuer.id));
        }
        Arc::make_mut(&mut self.issuers).insert(issuer.id.clone(), Arc::new(issuer));
        Ok(())
    }

    /// Removes an issuer.
    pub fn remove_issuer(&mut self, issuer: &str) {
        Arc::make_mut(&mut self.issuers).remove(issuer);
    }

    /// Registers an agent with its holder keys, or replaces its keys. An agent may be registered without a key.
    ///
    /// # Errors
    /// [`Error::KeyTaken`] if another agent has one of the keys; nothing changes then. To move a key, first change the agent that gives it
    /// up.
    pub fn put_agent(&mut self, agent: AgentId, keys: impl IntoIterator<Item = Thumbprint>) -> Result<(), Error> {
        let keys: Arc<[Thumbprint]> = keys.into_iter().collect();
        for key in keys.iter() {
            if let Some(holder) = self.keys.get(key.as_str()).filter(|holder| **holder != agent) {
                return Err(Error::KeyTaken { key: key.clone(), holder: holder.clone(), agent });
            }
        }
        self.remove_agent(agent.as_str());
        for key in keys.iter() {
            self.keys.insert(key.clone(), agent.clone());
        }
        self.agents.insert(agent, keys);
        Ok(())
    }

    /// Removes an agent and its keys.
    pub fn remove_agent(&mut self, agent: &str) {
        if let Some(keys) = self.agents.remove(agent) {
            for key in keys.iter() {
                self.keys.remove(key.as_str());
            }
        }
    }

    /// Returns the issuers and groups of this table with the agents and keys of another.
    pub fn with_agents_of(mut self, other: &TrustTable) -> Self {
        (self.agents, self.keys) = (other.agents.clone(), other.keys.clone());
        self
    }

    /// Sets the groups that any document names.
    pub fn set_groups(&mut self, groups: impl IntoIterator<Item = GroupId>) {
        self.groups = Arc::new(groups.into_iter().collect());
    }

    /// The issuer with this URI.
    pub fn issuer(&self, uri: &str) -> Option<&TrustedIssuer> {
        self.issuers.get(uri).map(Arc::as_ref)
    }

    /// All issuers, in no particular order.
    pub fn issuers(&self) -> impl Iterator<Item = &TrustedIssuer> {
        self.issuers.values().map(Arc::as_ref)
    }

    /// The agent that a holder key is registered for.
    pub fn agent_for_key(&self, key: &str) -> Option<&AgentId> {
        self.keys.get(key)
    }

    /// Whether an agent is registered, with or without keys.
    pub fn knows_agent(&self, agent: &str) -> bool {
        self.agents.get(agent).is_some()
    }

    /// Whether a document names this group.
    pub fn knows_group(&self, group: &str) -> bool {
        self.groups.contains(group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trust(agents: &[(&str, &[&str])]) -> TrustTable {
        let mut trust = TrustTable::new();
        for (agent, keys) in agents {
            trust.put_agent((*agent).into(), keys.iter().map(|key| (*key).into())).unwrap();
        }
        trust
    }

    #[test]
    fn an_agent_has_the_keys_it_was_given_last() {
        let mut trust = trust(&[("a", &["k1", "k2"]), ("b", &["k3"]), ("c", &[])]);
        let before = trust.clone();
        trust.put_agent("a".into(), ["k2".into(), "k4".into()]).unwrap();
        trust.remove_agent("b");
        for (key, then, now) in
            [("k1", Some("a"), None), ("k2", Some("a"), Some("a")), ("k3", Some("b"), None), ("k4", None, Some("a"))]
        {
            assert_eq!(before.agent_for_key(key).map(AgentId::as_str), then, "{key} before");
            assert_eq!(trust.agent_for_key(key).map(AgentId::as_str), now, "{key} now");
        }
        assert!(before.knows_agent("b") && !trust.knows_agent("b") && trust.knows_agent("c"));
    }

    #[test]
    fn a_key_has_one_agent() {
        let mut trust = trust(&[("a", &["k1"]), ("b", &["k2"])]);
        assert!(matches!(trust.put_agent("b".into(), ["k3".into(), "k1".into()]), Err(Error::KeyTaken { .. })));
        assert_eq!((trust.agent_for_key("k2"), trust.agent_for_key("k3")), (Some(&"b".into()), None), "nothing was changed");
        trust.remove_agent("a");
        assert_eq!(trust.put_agent("b".into(), ["k1".into()]), Ok(()));
    }

    #[test]
    fn issuers_have_a_few_keys_and_a_life() {
        let key = || NamedKey { key: super::super::PrivateKey::from_seed([1; 32]).unwrap().public_key().clone(), kid: None };
        for (keys, lifetime_max_s, good) in [(0, 60, false), (1, 60, true), (8, 60, true), (9, 60, false), (1, 0, false)] {
            let issuer = TrustedIssuer { lifetime_max_s, ..TrustedIssuer::new("https://i".into(), vec![key(); keys]) };
            assert_eq!(TrustTable::new().put_issuer(issuer).is_ok(), good, "{keys} keys, {lifetime_max_s} s");
        }
    }
}
