//! Builds snapshots from the store's rows: the whole at once, or what a commit changed on top of the last.
//!
//! Two lanes: a revocation has a form that cannot fail and is applied whatever else a commit holds; policy that cannot be
//! built leaves the last good one in place, and the snapshot says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Snapshot;
use super::trust::{put_agent, trust_of};
use crate::model::ids::AgentId;
use crate::model::records::{Change, DocumentKey, DocumentRow, RevocationRow};
use crate::model::revision::{Revision, StateDigest};
use crate::policy::compile::Compiled;
use crate::policy::document::{Body, Document, SHADOW_KINDS, SHADOW_SUFFIX};
use crate::revocation::Index;
use crate::token::trust::Trust;

/// Kinds of the documents that can change one by one.
const AGENT: &str = "agent";
const AGENT_IN_SHADOW: &str = "agent.shadow";

type Tables = (Arc<Compiled>, Arc<Trust>);

/// Why policy could not be built. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A stored document cannot be read or the documents do not fit together.
    #[error("the policy of revision {revision} cannot be built: {message}")]
    Policy {
        /// Number of the revision.
        revision: u64,
        /// What is wrong.
        message: String,
    },
    /// A change came before the first full state.
    #[error("a change came before the first full state")]
    NothingYet,
}

/// What a store holds at one revision.
#[derive(Clone, Debug)]
pub struct FullState {
    /// History and number.
    pub revision: Revision,
    /// The digest of all rows.
    pub digest: StateDigest,
    /// How far ahead an `iat` may be.
    pub iat_skew_s: i64,
    /// The freshness bound.
    pub freshness_bound_ms: u64,
    /// Every document.
    pub documents: Vec<DocumentRow>,
    /// Every revocation.
    pub revocations: Vec<RevocationRow>,
}

/// The single writer of snapshots and of the revocation index.
#[derive(Debug)]
pub struct Builder {
    revocations: Arc<Index>,
    documents: BTreeMap<DocumentKey, Document>,
    unread: BTreeMap<DocumentKey, String>,
    current: Option<Arc<Snapshot>>,
    problem: Option<String>,
}

impl Builder {
    /// A builder over an empty index.
    pub fn new(revocations: Arc<Index>) -> Self {
        Self { revocations, documents: BTreeMap::new(), unread: BTreeMap::new(), current: None, problem: None }
    }

    /// Why the newest policy could not be built; `None` while it is the one that decides.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Builds a snapshot of a full state.
    ///
    /// # Errors
    /// If the policy cannot be built and there is no earlier one to keep. Revocations are applied all the same.
    pub fn replace(&mut self, state: FullState) -> Result<Arc<Snapshot>, Error> {
        self.revocations.replace(&state.revocations, state.revision.number);
        self.documents.clear();
        self.unread.clear();
        for row in &state.documents {
            self.put(row);
        }
        let built = self.build(state.revision.number);
        self.problem = None;
        let (policy, trust, policy_number) = match (built, &self.current) {
            (Ok((policy, trust)), _) => (policy, trust, state.revision.number),
            (Err(error), None) => return Err(error),
            (Err(error), Some(last)) => {
                self.problem = Some(error.to_string());
                (last.policy.clone(), last.trust.clone(), last.policy_number)
            }
        };
        let snapshot = Arc::new(Snapshot {
            revision: state.revision,
            policy_number,
            digest: state.digest,
            digest_hex: state.digest.to_hex(),
            iat_skew_s: state.iat_skew_s,
            freshness_bound_ms: state.freshness_bound_ms,
            policy,
            trust,
            revocations: self.revocations.clone(),
        });
        self.current = Some(snapshot.clone());
        Ok(snapshot)
    }

    /// Builds the snapshot that follows the last one by some commits, given all their changes in order.
    ///
    /// Where the commit's policy cannot be built, the last good one stays, as [`Snapshot::policy_number`] tells.
    ///
    /// # Errors
    /// If there is no last one.
    pub fn apply<'a>(
        &mut self,
        number: u64,
        digest: StateDigest,
        changes: impl Iterator<Item = &'a Change> + Clone,
    ) -> Result<Arc<Snapshot>, Error> {
        // Revocations first: nothing that may fail stands before them.
        for change in changes.clone() {
            if let Change::Revocation(row) = change {
                self.revocations.apply(row);
            }
        }
        let last = self.current.clone().ok_or(Error::NothingYet)?;
        let was_behind = last.policy_number < last.revision.number;
        let mut touched = BTreeSet::new();
        for change in changes {
            match change {
                Change::Document(row) => {
                    self.put(row);
                    touched.insert(row.key.clone());
                }
                Change::DocumentRemoved(key) => {
                    self.documents.remove(key);
                    self.unread.remove(key);
                    touched.insert(key.clone());
                }
                Change::Revocation(_) => {}
            }
        }
        let mut next = Snapshot {
            revision: Revision { history: last.revision.history.clone(), number },
            policy_number: number,
            digest,
            digest_hex: digest.to_hex(),
            iat_skew_s: last.iat_skew_s,
            freshness_bound_ms: last.freshness_bound_ms,
            policy: last.policy.clone(),
            trust: last.trust.clone(),
            revocations: self.revocations.clone(),
        };
        if was_behind || !touched.is_empty() {
            let agents_only = !was_behind && touched.iter().all(|key| key.kind == AGENT || key.kind == AGENT_IN_SHADOW);
            let built = if agents_only { self.rebuild_agents(number, &last, &touched) } else { self.build(number) };
            match built {
                Ok((policy, trust)) => {
                    (next.policy, next.trust) = (policy, trust);
                    self.problem = None;
                }
                Err(error) => {
                    self.problem = Some(error.to_string());
                    next.policy_number = last.policy_number;
                }
            }
        }
        let next = Arc::new(next);
        self.current = Some(next.clone());
        Ok(next)
    }

    fn put(&mut self, row: &DocumentRow) {
        match Document::from_row(row) {
            Ok(document) => {
                self.unread.remove(&row.key);
                self.documents.insert(row.key.clone(), document);
            }
            Err(error) => {
                self.unread.insert(row.key.clone(), error.to_string());
            }
        }
    }

    fn build(&self, revision: u64) -> Result<Tables, Error> {
        self.check_all_read(revision)?;
        let documents: Vec<Document> = self.documents.values().cloned().collect();
        let policy = Compiled::compile(&documents).map_err(|diagnostics| unbuildable(revision, &diagnostics))?;
        let trust = trust_of(&documents).map_err(|message| Error::Policy { revision, message })?;
        Ok((Arc::new(policy), Arc::new(trust)))
    }

    /// Where only agents changed, the change costs what those agents cost, not the fleet.
    fn rebuild_agents(&self, revision: u64, last: &Snapshot, touched: &BTreeSet<DocumentKey>) -> Result<Tables, Error> {
        self.check_all_read(revision)?;
        let in_force = touched.iter().filter(|key| key.kind == AGENT).map(|key| (key, self.documents.get(key)));
        let (put, removed) = split(in_force);
        let failed = |diagnostics: Vec<_>| unbuildable(revision, &diagnostics);
        let mut policy = last.policy.with_agents(&put, &removed).map_err(failed)?;
        if self.has_shadows() {
            // Where nothing was in shadow before, what would be is what is.
            let before = last.policy.would_be().unwrap_or(&last.policy);
            let (put, removed) = split(touched.iter().map(|key| (key, self.agent_that_would_be(&key.id))));
            policy = policy.with_would_be(Some(before.with_agents(&put, &removed).map_err(failed)?));
        }
        let mut trust = Trust::clone(&last.trust);
        for key in touched.iter().filter(|key| key.kind == AGENT) {
            trust.remove_agent(&key.id);
        }
        for document in &put {
            if let Body::Agent(agent) = &document.body {
                put_agent(&mut trust, agent).map_err(|message| Error::Policy { revision, message })?;
            }
        }
        Ok((Arc::new(policy), Arc::new(trust)))
    }

    /// Whether some document is in shadow; does not look at a fleet's agents one by one.
    fn has_shadows(&self) -> bool {
        SHADOW_KINDS.iter().any(|kind| {
            let kind = format!("{kind}{SHADOW_SUFFIX}");
            let first = DocumentKey { kind: kind.clone(), id: String::new() };
            self.documents.range(first..).next().is_some_and(|(key, _)| key.kind == kind)
        })
    }

    /// The agent's document in shadow, or else the one in force.
    fn agent_that_would_be(&self, id: &str) -> Option<&Document> {
        let key = |kind: &str| DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
        self.documents.get(&key(AGENT_IN_SHADOW)).or_else(|| self.documents.get(&key(AGENT)))
    }

    fn check_all_read(&self, revision: u64) -> Result<(), Error> {
        match self.unread.iter().next() {
            Some((key, problem)) => {
                Err(Error::Policy { revision, message: format!("document `{} {}`: {problem}", key.kind, key.id) })
            }
            None => Ok(()),
        }
    }
}

/// Documents that are there, each once, and the ids of those that are gone.
fn split<'a>(agents: impl Iterator<Item = (&'a DocumentKey, Option<&'a Document>)>) -> (Vec<Document>, Vec<AgentId>) {
    let by_id: BTreeMap<&str, Option<&Document>> = agents.map(|(key, document)| (key.id.as_str(), document)).collect();
    let put = by_id.values().copied().flatten().cloned().collect();
    let removed = by_id.iter().filter(|(_, document)| document.is_none()).map(|(id, _)| AgentId::from(*id)).collect();
    (put, removed)
}

fn unbuildable(revision: u64, diagnostics: &[crate::policy::Diagnostic]) -> Error {
    let first = diagnostics.iter().find(|diagnostic| diagnostic.is_error());
    Error::Policy { revision, message: first.map(ToString::to_string).unwrap_or_default() }
}
