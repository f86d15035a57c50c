//! Remedies: the smallest change of a layer's documents that turns its denial into a permit.
//!
//! Remedies serve explanations, never decisions. They reveal policy, so the service must not show them to gateways. Look next at
//! `evaluate.rs`, whose answers they explain.

use crate::model::decision::PolicyEntryRef;
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::{DelegationSubject, ToolCall};

use super::super::condition::{CallFacts, ConditionError, WorkBudget};
use super::super::document::ListKind;
use super::CompiledPolicy;
use super::evaluate::LayerAnswer;
use super::permission_set::{CompiledEntry, PermissionSet};
use super::resolve::ResolvedSubject;

/// A change that turns the denial of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerRemedy {
    /// Register the tool or the application, which has no document.
    RegisterDocument,
    /// Use the schema that the registry pins.
    MatchSchema,
    /// Extend a list in the agent's document: `applications`, `acts_for` or `delegates_to`.
    ExtendAgentList,
    /// Grant the tool in the token (`None`), or call it with arguments that the token grants (their description).
    ExtendGrant(Option<String>),
    /// Change the guardrails that forbid the call or fail on it.
    ChangeGuardrails(Vec<PolicyEntryRef>),
    /// Change entries of the layer's documents.
    ChangeEntries {
        /// The documents of the layer, by kind and id. Empty if no group of the user has a document.
        owners: Vec<(&'static str, String)>,
        /// The entries to remove because they deny or their condition fails, each with its list.
        remove: Vec<(&'static str, PolicyEntryRef)>,
        /// The further change that is needed after that.
        requirement: PermitRequirement,
    },
}

/// The change that a layer of entries needs once no entry denies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PermitRequirement {
    /// None, because an entry already permits.
    Nothing,
    /// Other arguments, for which the entry would permit. The text describes them.
    Arguments(PolicyEntryRef, String),
    /// A condition that must hold, so that the entry would permit.
    Condition(PolicyEntryRef, String),
    /// A new entry, because none matches the tool.
    Allow,
}

impl CompiledPolicy {
    /// The smallest change that turns a denying answer of [`CompiledPolicy::explain`]; `None` if the chain itself decides.
    ///
    /// All answers to one call share the budget `work`. A condition beyond the budget counts as failed.
    pub fn find_remedy(
        &self,
        resolved: &ResolvedSubject,
        subject: &DelegationSubject,
        call: &ToolCall<'_>,
        answer: &LayerAnswer,
        work: &WorkBudget,
    ) -> Option<LayerRemedy> {
        let tool = || self.base.tools.number(call.tool).and_then(|number| Some((number, self.base.tools.tool(number)?)));
        Some(match (answer.layer, answer.reason) {
            (DecisionLayer::Identity, _) => return None,
            (DecisionLayer::Tool, Reason::ToolChanged) => LayerRemedy::MatchSchema,
            (DecisionLayer::Tool, _) | (_, Reason::ApplicationUnknown) => LayerRemedy::RegisterDocument,
            (_, Reason::ApplicationNotServed | Reason::UserNotServed | Reason::DelegationNotAllowed) => {
                LayerRemedy::ExtendAgentList
            }
            (DecisionLayer::Hop, _) => {
                let scope = answer.hop.and_then(|hop| subject.scopes.get(hop))?;
                LayerRemedy::ExtendGrant(scope.tools.get(call.tool).and_then(|map| map.describe_violations(call.arguments)))
            }
            (layer, _) => {
                let (number, tool) = tool()?;
                // A layer of the whole chain is evaluated for each agent. The remedy shows the evaluation for the last one.
                let agents_seen = answer.hop.map_or(subject.agents.len(), |hop| hop + 1);
                let facts = CallFacts { subject, call, risk: tool.risk.as_str(), visible_agent_count: agents_seen, work };
                if layer == DecisionLayer::Guardrail {
                    return Some(LayerRemedy::ChangeGuardrails(self.forbidding_guardrails(number, &facts)));
                }
                self.find_entries_remedy(self.layer_owners(resolved, subject, answer), number, &facts)
            }
        })
    }

    /// The guardrails of a tool that forbid the call, or fail, for any agent of the chain.
    fn forbidding_guardrails(&self, tool: u32, facts: &CallFacts<'_>) -> Vec<PolicyEntryRef> {
        let of_tool = self.base.guardrails.iter().filter(|guardrail| guardrail.tools.contains(tool));
        let against = of_tool.filter(|guardrail| {
            (1..=facts.subject.agents.len()).any(|agents_seen| {
                guardrail.forbid_when.holds(&CallFacts { visible_agent_count: agents_seen, ..*facts }) != Ok(false)
            })
        });
        against
            .map(|guardrail| PolicyEntryRef {
                kind: "guardrail",
                id: guardrail.id.clone(),
                entry: guardrail.forbid_when.text().into(),
            })
            .collect()
    }

    /// The documents that answer for a layer.
    fn layer_owners<'a>(
        &'a self,
        resolved: &'a ResolvedSubject,
        subject: &'a DelegationSubject,
        answer: &LayerAnswer,
    ) -> Vec<(&'static str, String, &'a PermissionSet)> {
        match (answer.layer, answer.hop) {
            (DecisionLayer::User, _) => resolved.groups.iter().map(|(id, set)| ("group", id.to_string(), &**set)).collect(),
            (DecisionLayer::Application, _) => {
                let application = resolved.application.iter();
                application.map(|set| ("application", subject.application.to_string(), &**set)).collect()
            }
            (DecisionLayer::Agent, Some(hop)) => match (subject.agents.get(hop), resolved.agents.get(hop)) {
                (Some(id), Some(agent)) => vec![("agent", id.to_string(), &*agent.permissions)],
                _ => Vec::new(),
            },
            _ => Vec::new(),
        }
    }

    /// The remedy for a layer of permission sets: the entries to remove, and the first entry that other arguments or another fact
    /// would satisfy.
    fn find_entries_remedy(
        &self,
        owners: Vec<(&'static str, String, &PermissionSet)>,
        tool: u32,
        facts: &CallFacts<'_>,
    ) -> LayerRemedy {
        let (mut remove, mut permits) = (Vec::new(), false);
        let (mut by_arguments, mut by_condition) = (None, None);
        for (kind, id, set) in &owners {
            let mut entries: Vec<(u32, &CompiledEntry)> = set.entries_for_tool(tool).collect();
            // Entries are sorted by precedence, so that the result does not depend on the order of documents.
            entries.sort_by_key(|(place, _)| *place);
            for (_, entry) in entries {
                let named = || match &entry.included_from {
                    Some(set) => PolicyEntryRef { kind: "permission_set", id: set.clone(), entry: entry.text.clone() },
                    None => PolicyEntryRef { kind, id: id.as_str().into(), entry: entry.text.clone() },
                };
                match (entry.applies(facts), entry.list) {
                    (Err(ConditionError), list) => remove.push((list.as_str(), named())),
                    (Ok(true), ListKind::Deny) => remove.push(("deny", named())),
                    (Ok(true), _) => permits = true,
                    (Ok(false), ListKind::Deny) => {}
                    (Ok(false), _) => match (entry.describe_argument_mismatch(facts.call.arguments), entry.condition()) {
                        (Some(lacks), _) if by_arguments.is_none() => by_arguments = Some((named(), lacks)),
                        (None, Some(condition)) if by_condition.is_none() => {
                            by_condition = Some((named(), condition.text().to_owned()));
                        }
                        _ => {}
                    },
                }
            }
        }
        let need = match (permits, by_arguments, by_condition) {
            (true, ..) => PermitRequirement::Nothing,
            (_, Some((entry, lacks)), _) => PermitRequirement::Arguments(entry, lacks),
            (_, None, Some((entry, condition))) => PermitRequirement::Condition(entry, condition),
            (_, None, None) => PermitRequirement::Allow,
        };
        LayerRemedy::ChangeEntries {
            owners: owners.into_iter().map(|(kind, id, _)| (kind, id)).collect(),
            remove,
            requirement: need,
        }
    }
}
