//! Compiled policy: all names are resolved and equal parts are shared, so that an unconditional permit costs one lookup and one
//! bit.
//!
//! Tools are numbered, patterns become sets of bits, and equal permission sets are stored once. [`CompiledPolicy::resolve`]
//! computes the permissions of a verified chain once, and the result is kept beside the chain. A compiled policy never changes.
//! [`CompiledPolicy::with_agents`] creates a new one for a change of some agents; it shares all other parts. This module uses no
//! clock, no I/O and no tokens. Look next at `compile/evaluate.rs` for the evaluation, then at `compile/permission_set.rs`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::ids::{AgentId, ApplicationId, GroupId};
use crate::model::limits::DELEGATION_DEPTH_MAX;
use crate::model::sharded_map::ShardedMap;

use super::bit_set::BitSet;
use super::condition::Condition;
use super::diagnostic::{Diagnostic, Severity};
use super::document::{
    AgentSpec, Document, DocumentBody, GuardrailSpec, NameSelection, OperatorSpec, PermissionLists,
    documents_with_shadows_enforced, enforced_documents,
};
use super::tools::{PatternCache, ToolTable};
use super::validate::{self, NameLookup};

mod compare;
mod evaluate;
mod interner;
mod permission_set;
mod remedy;
mod resolve;

pub use super::document::{ProofClass, ToolRisk};
pub use super::tools::Tool;
pub use evaluate::{LayerAnswer, PolicyReach, PolicyVerdict};
pub use remedy::{LayerRemedy, PermitRequirement};
pub use resolve::ResolvedSubject;

use interner::Interner;
use permission_set::{PermissionSet, canonical_text};

/// A policy that can decide calls.
pub struct CompiledPolicy {
    /// Distinguishes this policy from every other one in the process. A [`ResolvedSubject`] is valid only for the policy that created
    /// it.
    serial: u64,
    base: Arc<PolicyBase>,
    agents: ShardedMap<AgentId, Arc<CompiledAgent>>,
    permission_sets: Interner<PermissionSet>,
    delegation_rules: Interner<DelegationRules>,
    /// The policy with all shadow documents enforced; `None` if there are no shadow documents.
    shadow_policy: Option<Arc<CompiledPolicy>>,
}

/// The limits that an agent's document sets for the chains of this agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionLimits {
    /// The longest lifetime of a root that names this agent first, in seconds. `None`: the limit of its issuer applies.
    pub lifetime_max_s: Option<i64>,
    /// The number of hops that may follow the agent.
    pub hops_max: u64,
}

/// All parts of a policy except the agents.
#[derive(Debug, Default)]
struct PolicyBase {
    tools: ToolTable,
    groups: HashMap<Arc<str>, Arc<PermissionSet>>,
    applications: HashMap<Arc<str>, Arc<PermissionSet>>,
    permission_sets: HashMap<Arc<str>, PermissionLists>,
    issuers: HashSet<Arc<str>>,
    operator_groups: HashSet<GroupId>,
    operators: HashMap<Arc<str>, OperatorSpec>,
    /// Sorted by id, so that the reported guardrail does not depend on the order of documents.
    guardrails: Vec<CompiledGuardrail>,
}

/// A condition that forbids calls of some tools.
#[derive(Debug)]
struct CompiledGuardrail {
    id: Arc<str>,
    tools: BitSet,
    forbid_when: Condition,
}

/// An agent. Agents with equal parts share them.
#[derive(Debug)]
struct CompiledAgent {
    rules: Arc<DelegationRules>,
    permissions: Arc<PermissionSet>,
}

/// The applications, users and agents that an agent serves and delegates to, with its limits.
#[derive(Debug, PartialEq, Eq)]
struct DelegationRules {
    applications: NameSelection<ApplicationId>,
    acts_for: NameSelection<GroupId>,
    delegates_to: Vec<AgentId>,
    limits: SessionLimits,
}

impl CompiledPolicy {
    /// Validates documents and compiles them.
    ///
    /// # Errors
    /// All diagnostics of [`validate::check_documents`], warnings included, if one of them is an error.
    pub fn compile(documents: &[Document]) -> Result<Self, Vec<Diagnostic>> {
        let tools = ToolTable::new(documents);
        let mut patterns = PatternCache::default();
        let diagnostics = validate::check_documents(documents, &tools, &mut patterns);
        if diagnostics.iter().any(Diagnostic::is_error) {
            return Err(diagnostics);
        }
        let would_be = documents_with_shadows_enforced(documents);
        let mut compiled = Self::build(&enforced_documents(documents), tools, &mut patterns);
        if let Some(documents) = would_be {
            let tools = ToolTable::new(documents.iter().copied());
            compiled.shadow_policy = Some(Arc::new(Self::build(&documents, tools, &mut patterns)));
        }
        Ok(compiled)
    }

    /// Compiles documents that were validated. Permission sets, groups and applications come before the agents.
    fn build(documents: &[&Document], tools: ToolTable, patterns: &mut PatternCache) -> Self {
        let mut compiled = Self {
            serial: next_serial(),
            base: Arc::default(),
            agents: ShardedMap::default(),
            permission_sets: Interner::default(),
            delegation_rules: Interner::default(),
            shadow_policy: None,
        };
        let mut base = PolicyBase { tools, ..PolicyBase::default() };
        for document in documents {
            let id = || Arc::from(document.key.id.as_str());
            match &document.body {
                DocumentBody::PermissionSet(permissions) => {
                    base.permission_sets.insert(id(), permissions.clone());
                }
                DocumentBody::Issuer(_) => {
                    base.issuers.insert(id());
                }
                DocumentBody::Operator(operator) => {
                    base.operator_groups.extend(operator.groups.iter().cloned());
                    base.operators.insert(id(), operator.clone());
                }
                DocumentBody::Guardrail(guardrail) => {
                    base.guardrails.push(CompiledGuardrail::new(id(), guardrail, &base.tools, patterns))
                }
                _ => {}
            }
        }
        base.guardrails.sort_by(|a, b| a.id.cmp(&b.id));
        for document in documents {
            let id = || Arc::from(document.key.id.as_str());
            match &document.body {
                DocumentBody::Group(permissions) => {
                    let set = compiled
                        .permission_sets
                        .intern(canonical_text(permissions), || base.build_permission_set(permissions, patterns));
                    base.groups.insert(id(), set);
                }
                DocumentBody::Application(permissions) => {
                    let set = compiled
                        .permission_sets
                        .intern(canonical_text(permissions), || base.build_permission_set(permissions, patterns));
                    base.applications.insert(id(), set);
                }
                _ => {}
            }
        }
        compiled.base = Arc::new(base);
        for document in documents {
            if let DocumentBody::Agent(agent) = &document.body {
                compiled.put_agent(agent, patterns);
            }
        }
        compiled
    }

    /// Compiles documents without agents; [`CompiledPolicy::add_agent`] adds agents later. No document may be in shadow.
    ///
    /// # Errors
    /// As for [`CompiledPolicy::compile`].
    pub fn compile_base(documents: &[&Document]) -> Result<Self, Vec<Diagnostic>> {
        let tools = ToolTable::new(documents.iter().copied());
        let mut patterns = PatternCache::default();
        let diagnostics = validate::check_non_agent_documents(documents, &tools, &mut patterns);
        if diagnostics.iter().any(Diagnostic::is_error) {
            Err(diagnostics)
        } else {
            Ok(Self::build(documents, tools, &mut patterns))
        }
    }

    /// The same agents with other base documents. Each distinct permission set is resolved once, so the cost does not grow with
    /// the number of agents.
    ///
    /// # Errors
    /// As for [`CompiledPolicy::compile`], and if an agent names something that the new base lacks.
    pub fn with_base(&self, documents: &[&Document]) -> Result<Self, Vec<Diagnostic>> {
        let mut next = Self::compile_base(documents)?;
        let mut patterns = PatternCache::default();
        let mut made: HashMap<*const PermissionSet, Arc<PermissionSet>> = HashMap::new();
        let base = next.base.clone();
        for (id, agent) in self.agents.iter() {
            let permissions = made.entry(Arc::as_ptr(&agent.permissions)).or_insert_with(|| {
                let source = &agent.permissions.source;
                next.permission_sets.intern(canonical_text(source), || base.build_permission_set(source, &mut patterns))
            });
            let (profile, permissions) = (agent.rules.clone(), permissions.clone());
            next.agents.insert(id.clone(), Arc::new(CompiledAgent { rules: profile, permissions }));
        }
        next.delegation_rules = self.delegation_rules.clone();
        next.into_validated()
    }

    /// Adds an agent, for a fleet that is read one agent at a time. [`CompiledPolicy::into_validated`] later checks the names in
    /// it.
    ///
    /// # Errors
    /// If the document is not an agent.
    pub fn add_agent(&mut self, document: &Document) -> Result<(), Diagnostic> {
        let DocumentBody::Agent(agent) = &document.body else {
            return Err(document.field_diagnostic(Severity::Error, "id", 0, "only agents can be added one by one".to_owned()));
        };
        self.put_agent(agent, &mut PatternCache::default());
        Ok(())
    }

    /// Returns the policy if every name in every agent exists.
    ///
    /// # Errors
    /// The diagnostics. Agents with equal parts are reported once.
    pub fn into_validated(self) -> Result<Self, Vec<Diagnostic>> {
        let mut seen: HashSet<(*const DelegationRules, *const PermissionSet)> = HashSet::new();
        let (mut patterns, mut out) = (PatternCache::default(), Vec::new());
        for (id, agent) in self.agents.iter() {
            if seen.insert((Arc::as_ptr(&agent.rules), Arc::as_ptr(&agent.permissions))) {
                validate::check_document(&self.agent_document(id, agent), &self, &mut patterns, &mut out);
            }
        }
        if out.iter().any(Diagnostic::is_error) { Err(out) } else { Ok(self) }
    }

    /// A document with the same content as an agent, except for its keys and its owner. Validation needs it.
    ///
    /// `delegates_to` leaves out agents that were removed, because nothing can be delegated to them. A policy that was valid when
    /// they were removed must also be valid when it is read again.
    fn agent_document(&self, id: &AgentId, agent: &CompiledAgent) -> Document {
        let DelegationRules { applications, acts_for, delegates_to, limits } = &*agent.rules;
        let spec = AgentSpec {
            id: id.clone(),
            owner: None,
            keys: Vec::new(),
            applications: applications.clone(),
            acts_for: acts_for.clone(),
            delegates_to: delegates_to.iter().filter(|id| self.agents.get(id.as_str()).is_some()).cloned().collect(),
            session_lifetime_max_s: limits.lifetime_max_s,
            session_hops_max: Some(limits.hops_max),
            permissions: agent.permissions.source.clone(),
        };
        Document::new(DocumentBody::Agent(spec), id.as_str())
    }

    /// The policy with all documents in `mode: shadow` enforced, each in place of the document of the same kind and id.
    pub fn shadow_policy(&self) -> Option<&Arc<CompiledPolicy>> {
        self.shadow_policy.as_ref()
    }

    /// The same policy with another shadow policy beside it.
    pub fn with_shadow_policy(mut self, would_be: Option<CompiledPolicy>) -> Self {
        self.shadow_policy = would_be.map(Arc::new);
        self
    }

    /// The same policy with some agents added or replaced and some removed. The cost depends on these agents only.
    ///
    /// Shadow documents count as if they were enforced, because the caller uses them to build the shadow policy.
    ///
    /// `delegates_to` may name an agent that does not exist or is removed; nothing can be delegated to it.
    ///
    /// # Errors
    /// All diagnostics of the given documents, warnings included, if one of them is an error. The documents must be agents and
    /// must name only what exists. The key registry, not this method, refuses a key that another agent holds.
    pub fn with_agents(&self, put: &[Document], removed: &[AgentId]) -> Result<Self, Vec<Diagnostic>> {
        let mut next = Self {
            serial: next_serial(),
            base: self.base.clone(),
            agents: self.agents.clone(),
            permission_sets: self.permission_sets.clone(),
            delegation_rules: self.delegation_rules.clone(),
            shadow_policy: None,
        };
        let mut patterns = PatternCache::default();
        let mut out = Vec::new();
        let put_ids = put.iter().map(|document| document.key.id.as_str());
        for id in removed.iter().map(AgentId::as_str).chain(put_ids) {
            next.agents.remove(id);
        }
        next.permission_sets.enable_sweeping();
        next.delegation_rules.enable_sweeping();
        for document in put {
            match &document.body {
                DocumentBody::Agent(agent) => {
                    if next.agents.get(agent.id.as_str()).is_some() {
                        out.push(document.field_diagnostic(
                            Severity::Error,
                            "id",
                            0,
                            format!("agent `{}` is put twice", agent.id),
                        ));
                    }
                    next.put_agent(agent, &mut patterns);
                }
                _ => out.push(document.field_diagnostic(
                    Severity::Error,
                    "id",
                    0,
                    "only agents can be changed one by one".to_owned(),
                )),
            }
        }
        for document in put {
            let mut document = document.clone();
            if let DocumentBody::Agent(agent) = &mut document.body {
                // As for unchanged agents: names of removed agents are ignored, because nothing can be delegated to them.
                agent.delegates_to.retain(|id| next.agents.get(id.as_str()).is_some());
            }
            validate::check_document(&document, &next, &mut patterns, &mut out);
        }
        if out.iter().any(Diagnostic::is_error) { Err(out) } else { Ok(next) }
    }

    /// A registered tool.
    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.base.tools.tool(self.base.tools.number(name)?)
    }

    /// The document of an operator.
    pub fn operator(&self, id: &str) -> Option<&OperatorSpec> {
        self.base.operators.get(id)
    }

    /// Every registered tool, by name.
    pub fn tools(&self) -> impl ExactSizeIterator<Item = &Tool> {
        self.base.tools.iter()
    }

    /// The limits that an agent's document sets for its chains; `None` for an agent without a document.
    pub fn agent_limits(&self, agent: &AgentId) -> Option<SessionLimits> {
        self.agents.get(agent.as_str()).map(|agent| agent.rules.limits)
    }

    /// The ids of all agents, unsorted.
    pub fn agents(&self) -> impl Iterator<Item = &AgentId> {
        self.agents.keys()
    }

    /// Whether a document in force defines a name. The kinds are `agent`, `application`, `group`, `issuer`, `permission_set` and
    /// `tool`; the tools of servers count too.
    pub fn has_name(&self, kind: &str, id: &str) -> bool {
        if kind == "tool" { self.tool(id).is_some() } else { self.has_document(kind, id) }
    }

    /// The names of a kind, as for [`CompiledPolicy::names_of`], at most `names_max`.
    pub fn names_of(&self, kind: &str, names_max: usize) -> Vec<String> {
        match kind {
            "tool" => self.tools().map(|tool| tool.name.to_string()).take(names_max).collect(),
            // Taking `names_max` ids avoids listing a fleet of a million agents.
            "agent" => self.agents().map(ToString::to_string).take(names_max).collect(),
            _ => self.ids_of_kind(kind).into_iter().map(str::to_owned).take(names_max).collect(),
        }
    }

    /// The number of agents.
    pub fn agent_count(&self) -> usize {
        self.agents.len()
    }

    /// The number of distinct permission sets.
    pub fn permission_set_count(&self) -> usize {
        self.permission_sets.live_count()
    }

    /// Adds or replaces an agent. Its permission set and its rules are shared with equal agents.
    fn put_agent(&mut self, spec: &AgentSpec, patterns: &mut PatternCache) {
        let base = &self.base;
        let permissions = self
            .permission_sets
            .intern(canonical_text(&spec.permissions), || base.build_permission_set(&spec.permissions, patterns));
        let profile = DelegationRules {
            applications: sorted_names(&spec.applications),
            acts_for: sorted_names(&spec.acts_for),
            delegates_to: {
                let mut agents = spec.delegates_to.clone();
                agents.sort();
                agents.dedup();
                agents
            },
            limits: SessionLimits {
                lifetime_max_s: spec.session_lifetime_max_s,
                hops_max: spec.session_hops_max.unwrap_or(DELEGATION_DEPTH_MAX),
            },
        };
        let profile = self.delegation_rules.intern(format!("{profile:?}").into(), || profile);
        self.agents.insert(spec.id.clone(), Arc::new(CompiledAgent { rules: profile, permissions }));
    }
}

impl PolicyBase {
    fn build_permission_set(&self, permissions: &PermissionLists, patterns: &mut PatternCache) -> PermissionSet {
        PermissionSet::new(permissions, &self.permission_sets, &self.tools, patterns)
    }
}

impl CompiledGuardrail {
    fn new(id: Arc<str>, spec: &GuardrailSpec, tools: &ToolTable, patterns: &mut PatternCache) -> Self {
        let mut guarded = BitSet::empty(tools.len());
        spec.tools.iter().for_each(|pattern| patterns.resolve(pattern, tools).add_to(&mut guarded));
        Self { id, tools: guarded, forbid_when: spec.forbid_when.clone() }
    }
}

impl NameLookup for CompiledPolicy {
    fn tools(&self) -> &ToolTable {
        &self.base.tools
    }

    fn has_document(&self, kind: &str, id: &str) -> bool {
        match kind {
            "agent" => self.agents.get(id).is_some(),
            "group" => self.base.groups.contains_key(id),
            "application" => self.base.applications.contains_key(id),
            "permission_set" => self.base.permission_sets.contains_key(id),
            "issuer" => self.base.issuers.contains(id),
            _ => false,
        }
    }

    fn ids_of_kind(&self, kind: &str) -> Vec<&str> {
        match kind {
            "agent" => self.agents.keys().map(AgentId::as_str).collect(),
            "group" => self.base.groups.keys().map(|id| &**id).collect(),
            "application" => self.base.applications.keys().map(|id| &**id).collect(),
            "permission_set" => self.base.permission_sets.keys().map(|id| &**id).collect(),
            "issuer" => self.base.issuers.iter().map(|id| &**id).collect(),
            _ => Vec::new(),
        }
    }

    fn group_has_operators(&self, group: &str) -> bool {
        self.base.operator_groups.contains(group)
    }
}

impl std::fmt::Debug for CompiledPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled")
            .field("tools", &self.base.tools.len())
            .field("agents", &self.agents.len())
            .finish_non_exhaustive()
    }
}

fn next_serial() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The names sorted and without duplicates, so that equal selections compare equal.
fn sorted_names<T: Ord + Clone>(names: &NameSelection<T>) -> NameSelection<T> {
    match names {
        NameSelection::All => NameSelection::All,
        NameSelection::Listed(names) => {
            let mut names = names.clone();
            names.sort();
            names.dedup();
            NameSelection::Listed(names)
        }
    }
}
