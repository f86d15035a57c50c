//! Builds snapshots from the store's rows: from a full state, or from the last snapshot and the changes of later commits.
//!
//! Revocations and policy are independent. A revocation has a fixed form that cannot fail, so it is applied whatever else a commit holds. A
//! policy that cannot be built leaves the last good policy in force, and the snapshot says so ([`Snapshot::policy_number`]).

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::Snapshot;
use super::trust_builder::{build_trust_table, register_agent_keys};
use crate::model::ids::AgentId;
use crate::model::mutant::{Mutant, is_active};
use crate::model::parallel::map_chunks_in_order;
use crate::model::revision::{Revision, StateDigest};
use crate::model::rows::{DocumentKey, DocumentRow, RevocationRow, RowChange};
use crate::policy::compile::CompiledPolicy;
use crate::policy::document::{Document, DocumentBody, documents_with_shadows_enforced};
use crate::revocation::RevocationIndex;
use crate::token::trust::TrustTable;

/// The kinds of documents that can change one by one: agents in force and agents in shadow mode.
const AGENT_KIND: &str = "agent";
const SHADOW_AGENT_KIND: &str = "agent.shadow";

/// Number of agent documents that one thread reads at a time; this takes milliseconds.
const AGENTS_PER_CHUNK: NonZero<usize> = NonZero::new(1024).unwrap();

/// Number of revocations in a full state above which they get a thread of their own.
const PARALLEL_REVOCATIONS_MIN: usize = 50_000;

type PolicyTables = (Arc<CompiledPolicy>, Arc<TrustTable>);

/// Why a snapshot could not be built. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A stored document cannot be read, or the documents contradict each other.
    #[error("the policy of revision {revision} cannot be built: {message}")]
    Policy {
        /// Number of the revision.
        revision: u64,
        /// The first error found.
        message: String,
    },
    /// A change arrived before the first full state.
    #[error("a change came before the first full state")]
    NoFullState,
}

/// The content of a store at one revision.
#[derive(Clone, Debug)]
pub struct FullState {
    /// History and number.
    pub revision: Revision,
    /// The digest of all rows.
    pub digest: StateDigest,
    /// How far in the future an `iat` may lie.
    pub iat_skew_s: i64,
    /// The freshness bound.
    pub freshness_bound_ms: u64,
    /// Every document.
    pub documents: Vec<DocumentRow>,
    /// Every revocation.
    pub revocations: Vec<RevocationRow>,
}

/// The single writer of snapshots and of the revocation index.
///
/// Documents of agents in force are not kept. There may be a million of them, and the compiled policy holds all of their content.
#[derive(Debug)]
pub struct SnapshotBuilder {
    revocations: Arc<RevocationIndex>,
    /// All documents except those of agents in force.
    documents: BTreeMap<DocumentKey, Document>,
    /// Agents that changed since the policy in force was built; `None` for a removed agent.
    pending_agents: BTreeMap<AgentId, Option<Document>>,
    unreadable: BTreeMap<DocumentKey, String>,
    current: Option<Arc<Snapshot>>,
    policy_error: Option<String>,
    /// The numbers of the snapshots from which on some lifted entry is invisible. The entry is kept only for older snapshots.
    lifted_at: BTreeSet<u64>,
}

impl SnapshotBuilder {
    /// A builder over an empty index.
    pub fn new(revocations: Arc<RevocationIndex>) -> Self {
        Self {
            revocations,
            documents: BTreeMap::new(),
            pending_agents: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            current: None,
            policy_error: None,
            lifted_at: BTreeSet::new(),
        }
    }

    /// Frees the revocations that only snapshots older than `oldest_snapshot` see. No such snapshot may be in use any more.
    pub fn prune_lifted(&mut self, oldest_snapshot: u64) {
        let later = self.lifted_at.split_off(&oldest_snapshot.saturating_add(1));
        if !std::mem::replace(&mut self.lifted_at, later).is_empty() {
            self.revocations.prune_lifted(oldest_snapshot);
        }
    }

    /// Why the newest policy could not be built; `None` if the newest policy is in force.
    pub fn policy_error(&self) -> Option<&str> {
        self.policy_error.as_deref()
    }

    /// Builds a snapshot from a full state.
    ///
    /// # Errors
    /// If the policy cannot be built and there is no earlier policy to keep. Revocations are applied in any case.
    pub fn replace_all(&mut self, state: FullState) -> Result<Arc<Snapshot>, Error> {
        let number = state.revision.number;
        self.lifted_at.insert(number);
        self.documents.clear();
        self.unreadable.clear();
        self.pending_agents.clear();
        let (fleet, rest): (Vec<&DocumentRow>, _) = state.documents.iter().partition(|row| row.key.kind == AGENT_KIND);
        rest.into_iter().for_each(|row| self.put_document(row));
        let (index, revocations) = (self.revocations.clone(), state.revocations);
        let is_large = revocations.len() > PARALLEL_REVOCATIONS_MIN;
        let revoke = move || {
            if !is_active(Mutant::LoadWithoutRevocations) {
                index.replace_all(&revocations, number);
            }
        };
        // In both cases all revocations are applied before the snapshot is published.
        let built = if is_large {
            run_in_parallel(revoke, || self.build_all(number, &fleet))
        } else {
            revoke();
            self.build_all(number, &fleet)
        };
        self.policy_error = None;
        let (policy, trust, policy_number) = match (built, &self.current) {
            (Ok((policy, trust)), _) => (policy, trust, state.revision.number),
            (Err(error), None) => return Err(error),
            (Err(error), Some(last)) => {
                self.policy_error = Some(error.to_string());
                let (policy, trust, number) = (last.policy.clone(), last.trust.clone(), last.policy_number);
                // The agents of the last policy that no longer exist are removed once the policy can be built.
                self.pending_agents = policy.agents().map(|id| (id.clone(), None)).collect();
                fleet.into_iter().for_each(|row| self.put_document(row));
                (policy, trust, number)
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

    /// Builds the next snapshot from the last one, given all changes of the commits in between, in order.
    ///
    /// If the new policy cannot be built, the last good policy stays in force ([`Snapshot::policy_number`]).
    ///
    /// # Errors
    /// If there is no last snapshot.
    pub fn apply_changes<'a>(
        &mut self,
        number: u64,
        digest: StateDigest,
        changes: impl Iterator<Item = &'a RowChange> + Clone,
    ) -> Result<Arc<Snapshot>, Error> {
        // Revocations come first, so that nothing that may fail precedes them.
        let skip = is_active(Mutant::PolicyOnly) || is_active(Mutant::RevocationsWaitForPolicy) && self.policy_error.is_some();
        for change in changes.clone() {
            match change {
                RowChange::Revocation(_) if skip => {}
                RowChange::Revocation(row) => self.revocations.apply(row),
                RowChange::RevocationRemoved(_) if is_active(Mutant::RemoveLast) => {}
                RowChange::RevocationRemoved(target) => {
                    self.revocations.remove(target, number);
                    self.lifted_at.insert(number);
                }
                RowChange::Document(_) | RowChange::DocumentRemoved(_) => {}
            }
        }
        for change in changes.clone().filter(|_| is_active(Mutant::RemoveLast)) {
            if let RowChange::RevocationRemoved(target) = change {
                self.revocations.remove(target, number);
            }
        }
        let last = self.current.clone().ok_or(Error::NoFullState)?;
        let was_behind = last.policy_number < last.revision.number;
        let mut touched = BTreeSet::new();
        for change in changes {
            match change {
                RowChange::Document(row) => {
                    self.put_document(row);
                    touched.insert(row.key.clone());
                }
                RowChange::DocumentRemoved(key) => {
                    self.remove_document(key);
                    touched.insert(key.clone());
                }
                RowChange::Revocation(_) | RowChange::RevocationRemoved(_) => {}
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
            let base_stands = !was_behind && touched.iter().all(|key| key.kind == AGENT_KIND);
            match self.build_incremental(number, &last, base_stands) {
                Ok((policy, trust)) => {
                    (next.policy, next.trust) = (policy, trust);
                    self.pending_agents.clear();
                    self.policy_error = None;
                }
                Err(error) => {
                    self.policy_error = Some(error.to_string());
                    next.policy_number = if is_active(Mutant::ClaimPolicy) { number } else { last.policy_number };
                }
            }
        }
        let next = Arc::new(next);
        self.current = Some(next.clone());
        Ok(next)
    }

    fn put_document(&mut self, row: &DocumentRow) {
        match Document::from_row(row) {
            Ok(document) => {
                self.unreadable.remove(&row.key);
                if row.key.kind == AGENT_KIND {
                    self.pending_agents.insert(AgentId::from(row.key.id.as_str()), Some(document));
                } else {
                    self.documents.insert(row.key.clone(), document);
                }
            }
            Err(error) => {
                self.unreadable.insert(row.key.clone(), error.to_string());
            }
        }
    }

    fn remove_document(&mut self, key: &DocumentKey) {
        self.unreadable.remove(key);
        if key.kind == AGENT_KIND {
            self.pending_agents.insert(AgentId::from(key.id.as_str()), None);
        } else {
            self.documents.remove(key);
        }
    }

    /// Builds all tables from the documents: first the base, then each agent.
    fn build_all(&mut self, revision: u64, fleet: &[&DocumentRow]) -> Result<PolicyTables, Error> {
        self.check_all_readable(revision)?;
        let base = enforced_documents(&self.documents);
        let mut policy = CompiledPolicy::compile_base(&base).map_err(|diagnostics| policy_error_of(revision, &diagnostics))?;
        let mut trust = build_trust_table(base).map_err(|message| Error::Policy { revision, message })?;
        let read = |rows: &[&DocumentRow]| -> Vec<_> { rows.iter().map(|row| Document::from_row(row)).collect() };
        map_chunks_in_order(fleet, AGENTS_PER_CHUNK, read, |documents| {
            documents.into_iter().try_for_each(|document| {
                let document = document.map_err(|error| Error::Policy { revision, message: error.to_string() })?;
                policy.add_agent(&document).map_err(|diagnostic| policy_error_of(revision, &[diagnostic]))?;
                register_agent(&mut trust, &document, revision)
            })
        })?;
        let policy = policy.into_validated().map_err(|diagnostics| policy_error_of(revision, &diagnostics))?;
        let would_be = self.build_shadow_policy(&policy, revision)?;
        Ok((Arc::new(policy.with_shadow_policy(would_be)), Arc::new(trust)))
    }

    /// Builds the changes on top of the last policy.
    ///
    /// If the base is unchanged, the cost depends on the changed agents alone. Otherwise it depends on the number of different permission
    /// sets. It never depends on the documents of unchanged agents.
    fn build_incremental(&self, revision: u64, last: &Snapshot, base_stands: bool) -> Result<PolicyTables, Error> {
        self.check_all_readable(revision)?;
        let failed = |diagnostics: Vec<_>| policy_error_of(revision, &diagnostics);
        let put: Vec<Document> = self.pending_agents.values().flatten().cloned().collect();
        let removed: Vec<AgentId> =
            self.pending_agents.iter().filter(|(_, document)| document.is_none()).map(|(id, _)| id.clone()).collect();
        let mut trust = if base_stands {
            TrustTable::clone(&last.trust)
        } else {
            let message = |message| Error::Policy { revision, message };
            build_trust_table(enforced_documents(&self.documents)).map_err(message)?.with_agents_of(&last.trust)
        };
        self.pending_agents.keys().for_each(|id| trust.remove_agent(id.as_str()));
        put.iter().try_for_each(|document| register_agent(&mut trust, document, revision))?;

        let policy = if base_stands {
            last.policy.with_agents(&put, &removed).map_err(failed)?
        } else {
            // An agent that changes together with the base may name something that only the new base has. So it is removed first and added
            // last.
            let changed: Vec<AgentId> = self.pending_agents.keys().cloned().collect();
            let rest = last.policy.with_agents(&[], &changed).map_err(failed)?;
            rest.with_base(&enforced_documents(&self.documents))
                .and_then(|policy| policy.with_agents(&put, &[]))
                .map_err(failed)?
        };
        let would_be = match last.policy.shadow_policy().filter(|_| base_stands) {
            Some(before) => {
                let in_shadow = |id: &AgentId| self.documents.contains_key(&document_key(SHADOW_AGENT_KIND, id.as_str()));
                let put: Vec<Document> =
                    put.into_iter().filter(|document| !in_shadow(&document.key.id.as_str().into())).collect();
                let removed: Vec<AgentId> = removed.into_iter().filter(|id| !in_shadow(id)).collect();
                Some(before.with_agents(&put, &removed).map_err(failed)?)
            }
            None => self.build_shadow_policy(&policy, revision)?,
        };
        Ok((Arc::new(policy.with_shadow_policy(would_be)), Arc::new(trust)))
    }

    /// Builds the policy in which every document in shadow mode replaces the one in force.
    fn build_shadow_policy(&self, policy: &CompiledPolicy, revision: u64) -> Result<Option<CompiledPolicy>, Error> {
        let shadows: Vec<&Document> = self.documents.values().filter(|document| document.is_shadow()).collect();
        if shadows.is_empty() {
            return Ok(None);
        }
        let (agents, _): (Vec<&Document>, Vec<&Document>) =
            shadows.iter().copied().partition(|document| document.key.kind == SHADOW_AGENT_KIND);
        let base: Vec<&Document> = documents_with_shadows_enforced(self.documents.values())
            .unwrap_or_default()
            .into_iter()
            .filter(|document| document.key.kind != SHADOW_AGENT_KIND)
            .collect();
        let agents: Vec<Document> = agents.into_iter().cloned().collect();
        let built = policy.with_base(&base).and_then(|policy| policy.with_agents(&agents, &[]));
        built.map(Some).map_err(|diagnostics| policy_error_of(revision, &diagnostics))
    }

    fn check_all_readable(&self, revision: u64) -> Result<(), Error> {
        match self.unreadable.iter().next() {
            Some((key, problem)) => {
                Err(Error::Policy { revision, message: format!("document `{} {}`: {problem}", key.kind, key.id) })
            }
            None => Ok(()),
        }
    }
}

/// Runs `work` on its own thread while this thread runs `own`. If no thread can be started, `work` runs first.
fn run_in_parallel<R>(work: impl FnOnce() + Send, own: impl FnOnce() -> R) -> R {
    let work = Mutex::new(Some(work));
    let run = || {
        let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            work();
        }
    };
    thread::scope(|scope| {
        if thread::Builder::new().name("revocations".to_owned()).spawn_scoped(scope, run).is_err() {
            run();
        }
        own()
    })
}

fn enforced_documents(documents: &BTreeMap<DocumentKey, Document>) -> Vec<&Document> {
    documents.values().filter(|document| !document.is_shadow()).collect()
}

fn document_key(kind: &str, id: &str) -> DocumentKey {
    DocumentKey { kind: kind.to_owned(), id: id.to_owned() }
}

fn register_agent(trust: &mut TrustTable, document: &Document, revision: u64) -> Result<(), Error> {
    match &document.body {
        DocumentBody::Agent(agent) => register_agent_keys(trust, agent).map_err(|message| Error::Policy { revision, message }),
        _ => Ok(()),
    }
}

fn policy_error_of(revision: u64, diagnostics: &[crate::policy::Diagnostic]) -> Error {
    let first = diagnostics.iter().find(|diagnostic| diagnostic.is_error());
    Error::Policy { revision, message: first.map(ToString::to_string).unwrap_or_default() }
}
