//! Resolves the permissions of a verified chain under one policy, once for each chain.
//!
//! INVARIANT: the bit of a tool in `permitted` is set only if every layer permits the tool for all arguments. So this one bit
//! decides a call. This file knows nothing of a call. Look next at `evaluate.rs`.

use std::sync::Arc;

use crate::model::constraint::ConstraintMap;
use crate::model::ids::AgentId;
use crate::model::reason::Reason;
use crate::model::request::{DelegationSubject, TokenScope};

use super::super::bit_set::BitSet;
use super::super::document::NameSelection;
use super::permission_set::PermissionSet;
use super::{CompiledAgent, CompiledPolicy};

/// The permissions of one subject under one compiled policy. They are kept with the chain and are valid only for that policy.
#[derive(Debug)]
pub struct ResolvedSubject {
    pub(super) serial: u64,
    /// The failure that denies every call before any layer is evaluated.
    pub(super) failure: Option<ChainFailure>,
    /// The tools that every layer permits for all arguments.
    pub(super) permitted_tools: BitSet,
    /// The user's groups that have a document, sorted by id.
    pub(super) groups: Box<[(Arc<str>, Arc<PermissionSet>)]>,
    /// The ceiling of the application; `None` if the application has no document.
    pub(super) application: Option<Arc<PermissionSet>>,
    /// The agents, root to leaf.
    pub(super) agents: Box<[ResolvedAgent]>,
}

/// An agent of the chain.
#[derive(Debug)]
pub(super) struct ResolvedAgent {
    pub(super) permissions: Arc<PermissionSet>,
    /// The reason why the agent permits nothing in this chain, and the field of its document that causes it.
    pub(super) refusal: Option<(Reason, &'static str)>,
}

/// A failure that makes a chain unusable under this policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChainFailure {
    pub(super) reason: Reason,
    pub(super) hop: Option<usize>,
}

impl CompiledPolicy {
    /// Resolves the permissions of a subject, once for each chain and compiled policy.
    pub fn resolve(&self, subject: &DelegationSubject) -> ResolvedSubject {
        let size = self.base.tools.len();
        let empty = |failure| ResolvedSubject {
            serial: self.serial,
            failure: Some(failure),
            permitted_tools: BitSet::empty(size),
            groups: Box::default(),
            application: None,
            agents: Box::default(),
        };
        if subject.agents.is_empty() || subject.scopes.is_empty() {
            return empty(ChainFailure { reason: Reason::IdentityMissing, hop: None });
        }
        let agents = match self.known_agents(subject) {
            Ok(agents) => agents,
            Err(failure) => return empty(failure),
        };
        let mut groups: Vec<(Arc<str>, Arc<PermissionSet>)> = subject
            .groups
            .iter()
            .filter_map(|group| self.base.groups.get_key_value(group.as_str()))
            .map(|(id, set)| (id.clone(), set.clone()))
            .collect();
        groups.sort_by(|a, b| a.0.cmp(&b.0));
        groups.dedup_by(|a, b| a.0 == b.0);
        let application = self.base.applications.get(subject.application.as_str()).cloned();
        let agents: Box<[ResolvedAgent]> = agents
            .into_iter()
            .enumerate()
            .map(|(index, agent)| ResolvedAgent {
                permissions: agent.permissions.clone(),
                refusal: agent_refusal(agent, subject, subject.agents.get(index + 1)),
            })
            .collect();
        let permitted = self.permitted_tools(subject, &groups, application.as_deref(), &agents);
        ResolvedSubject {
            serial: self.serial,
            failure: None,
            permitted_tools: permitted,
            groups: groups.into(),
            application,
            agents,
        }
    }

    /// The agents of the chain. Each must be registered, and no agent may be followed by more hops than it allows.
    fn known_agents(&self, subject: &DelegationSubject) -> Result<Vec<&CompiledAgent>, ChainFailure> {
        let count = subject.agents.len();
        let mut agents = Vec::with_capacity(count);
        for (index, id) in subject.agents.iter().enumerate() {
            let Some(agent) = self.agents.get(id.as_str()) else {
                return Err(ChainFailure { reason: Reason::AgentUnknown, hop: Some(index) });
            };
            let last = usize::try_from(agent.rules.limits.hops_max).map_or(usize::MAX, |hops_max| index.saturating_add(hops_max));
            if count - 1 > last {
                // The failing hop is the first one beyond the limit.
                return Err(ChainFailure { reason: Reason::ChainTooDeep, hop: Some(last + 1) });
            }
            agents.push(&**agent);
        }
        Ok(agents)
    }

    /// The tools that every layer permits for all arguments. A guardrail removes its tools, because only a call can evaluate it.
    fn permitted_tools(
        &self,
        subject: &DelegationSubject,
        groups: &[(Arc<str>, Arc<PermissionSet>)],
        application: Option<&PermissionSet>,
        agents: &[ResolvedAgent],
    ) -> BitSet {
        let size = self.base.tools.len();
        let mut permitted = BitSet::full(size);
        let mut narrow = |layer: &mut dyn Iterator<Item = &PermissionSet>| {
            let (mut allowed, mut taken) = (BitSet::empty(size), BitSet::empty(size));
            for set in layer {
                allowed.union_with(&set.allowed);
                taken.union_with(&set.restricted);
            }
            allowed.subtract(&taken);
            permitted.intersect_with(&allowed);
        };
        narrow(&mut groups.iter().map(|(_, set)| &**set));
        narrow(&mut application.into_iter());
        for agent in agents {
            narrow(&mut agent.refusal.is_none().then_some(&*agent.permissions).into_iter());
        }
        for scope in &subject.scopes {
            permitted.intersect_with(&self.unconstrained_tools(scope));
        }
        for guardrail in &self.base.guardrails {
            permitted.subtract(&guardrail.tools);
        }
        permitted
    }

    /// The tools that a token grants for all arguments.
    fn unconstrained_tools(&self, scope: &TokenScope) -> BitSet {
        let mut free = BitSet::empty(self.base.tools.len());
        for (name, _) in scope.tools.iter().filter(|(_, arguments)| is_unconstrained(arguments)) {
            if let Some(number) = self.base.tools.number(name) {
                free.insert(number);
            }
        }
        free
    }
}

impl ResolvedSubject {
    /// The size on the heap in bytes, without the parts that belong to the policy.
    pub fn heap_bytes(&self) -> usize {
        self.permitted_tools.heap_bytes() + size_of_val(&*self.groups) + size_of_val(&*self.agents)
    }
}

/// The reason why an agent serves no one in this chain. The application is checked first, then the user, then the next agent.
fn agent_refusal(agent: &CompiledAgent, subject: &DelegationSubject, next: Option<&AgentId>) -> Option<(Reason, &'static str)> {
    let profile = &agent.rules;
    let serves_user = match &profile.acts_for {
        NameSelection::All => true,
        NameSelection::Listed(groups) => subject.groups.iter().any(|group| groups.binary_search(group).is_ok()),
    };
    if !profile.applications.contains(&subject.application) {
        Some((Reason::ApplicationNotServed, "applications"))
    } else if !serves_user {
        Some((Reason::UserNotServed, "acts_for"))
    } else if next.is_some_and(|next| profile.delegates_to.binary_search(next).is_err()) {
        Some((Reason::DelegationNotAllowed, "delegates_to"))
    } else {
        None
    }
}

/// Whether a token grants a tool for all arguments.
pub(super) fn is_unconstrained(arguments: &ConstraintMap) -> bool {
    arguments.allows_unnamed && arguments.named.is_empty()
}
