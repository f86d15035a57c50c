//! Remedies: the smallest change of a layer's documents that turns its denial into a permit.
//!
//! Remedies serve explanations, never decisions. They reveal policy, so the service must not show them to gateways. Look next at
//! `evaluate.rs`, whose answers they explain.

use crate::model::decision::EntryRef;
use crate::model::reason::{Layer, Reason};
use crate::model::request::{Call, Subject};

use super::super::condition::{Facts, Failed, Work};
use super::super::document::List;
use super::Compiled;
use super::evaluate::LayerAnswer;
use super::resolve::Resolved;
use super::set::{PermissionSet, SetEntry};

/// A change that turns the denial of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mend {
    /// Register the tool or the application, which has no document.
    Register,
    /// Use the schema that the registry pins.
    Schema,
    /// Extend a list in the agent's document: `applications`, `acts_for` or `delegates_to`.
    Serve,
    /// Grant the tool in the token (`None`), or call it with arguments that the token grants (their description).
    Grant(Option<String>),
    /// Change the guardrails that forbid the call or fail on it.
    Guardrails(Vec<EntryRef>),
    /// Change entries of the layer's documents.
    Entries {
        /// The documents of the layer, by kind and id. Empty if no group of the user has a document.
        owners: Vec<(&'static str, String)>,
        /// The entries to remove because they deny or their condition fails, each with its list.
        remove: Vec<(&'static str, EntryRef)>,
        /// The further change that is needed after that.
        need: Need,
    },
}

/// The change that a layer of entries needs once no entry denies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// None, because an entry already permits.
    Nothing,
    /// Other arguments, for which the entry would permit. The text describes them.
    Arguments(EntryRef, String),
    /// A condition that must hold, so that the entry would permit.
    Condition(EntryRef, String),
    /// A new entry, because none matches the tool.
    Allow,
}

impl Compiled {
    /// The smallest change that turns a denying answer of [`Compiled::explain`]; `None` if the chain itself decides.
    ///
    /// All answers to one call share the budget `work`. A condition beyond the budget counts as failed.
    pub fn mend(
        &self,
        resolved: &Resolved,
        subject: &Subject,
        call: &Call<'_>,
        answer: &LayerAnswer,
        work: &Work,
    ) -> Option<Mend> {
        let tool = || self.base.tools.number(call.tool).and_then(|number| Some((number, self.base.tools.tool(number)?)));
        Some(match (answer.layer, answer.reason) {
            (Layer::Identity, _) => return None,
            (Layer::Tool, Reason::ToolChanged) => Mend::Schema,
            (Layer::Tool, _) | (_, Reason::ApplicationUnknown) => Mend::Register,
            (_, Reason::ApplicationNotServed | Reason::UserNotServed | Reason::DelegationNotAllowed) => Mend::Serve,
            (Layer::Hop, _) => {
                let scope = answer.hop.and_then(|hop| subject.scopes.get(hop))?;
                Mend::Grant(scope.tools.get(call.tool).and_then(|map| map.lacks(call.arguments)))
            }
            (layer, _) => {
                let (number, tool) = tool()?;
                // A layer of the whole chain is evaluated for each agent. The remedy shows the evaluation for the last one.
                let agents_seen = answer.hop.map_or(subject.agents.len(), |hop| hop + 1);
                let facts = Facts { subject, call, risk: tool.risk.as_str(), agents_seen, work };
                if layer == Layer::Guardrail {
                    return Some(Mend::Guardrails(self.forbidding(number, &facts)));
                }
                self.entries_mend(self.owners(resolved, subject, answer), number, &facts)
            }
        })
    }

    /// The guardrails of a tool that forbid the call, or fail, for any agent of the chain.
    fn forbidding(&self, tool: u32, facts: &Facts<'_>) -> Vec<EntryRef> {
        let of_tool = self.base.guardrails.iter().filter(|guardrail| guardrail.tools.contains(tool));
        let against = of_tool.filter(|guardrail| {
            (1..=facts.subject.agents.len())
                .any(|agents_seen| guardrail.forbid_when.holds(&Facts { agents_seen, ..*facts }) != Ok(false))
        });
        against
            .map(|guardrail| EntryRef { kind: "guardrail", id: guardrail.id.clone(), entry: guardrail.forbid_when.text().into() })
            .collect()
    }

    /// The documents that answer for a layer.
    fn owners<'a>(
        &'a self,
        resolved: &'a Resolved,
        subject: &'a Subject,
        answer: &LayerAnswer,
    ) -> Vec<(&'static str, String, &'a PermissionSet)> {
        match (answer.layer, answer.hop) {
            (Layer::User, _) => resolved.groups.iter().map(|(id, set)| ("group", id.to_string(), &**set)).collect(),
            (Layer::Application, _) => {
                let application = resolved.application.iter();
                application.map(|set| ("application", subject.application.to_string(), &**set)).collect()
            }
            (Layer::Agent, Some(hop)) => match (subject.agents.get(hop), resolved.agents.get(hop)) {
                (Some(id), Some(agent)) => vec![("agent", id.to_string(), &*agent.permissions)],
                _ => Vec::new(),
            },
            _ => Vec::new(),
        }
    }

    /// The remedy for a layer of permission sets: the entries to remove, and the first entry that other arguments or another fact
    /// would satisfy.
    fn entries_mend(&self, owners: Vec<(&'static str, String, &PermissionSet)>, tool: u32, facts: &Facts<'_>) -> Mend {
        let (mut remove, mut permits) = (Vec::new(), false);
        let (mut by_arguments, mut by_condition) = (None, None);
        for (kind, id, set) in &owners {
            let mut entries: Vec<(u32, &SetEntry)> = set.speaking_of(tool).collect();
            // Entries are sorted by precedence, so that the result does not depend on the order of documents.
            entries.sort_by_key(|(place, _)| *place);
            for (_, entry) in entries {
                let named = || match &entry.origin {
                    Some(set) => EntryRef { kind: "permission_set", id: set.clone(), entry: entry.text.clone() },
                    None => EntryRef { kind, id: id.as_str().into(), entry: entry.text.clone() },
                };
                match (entry.applies(facts), entry.list) {
                    (Err(Failed), list) => remove.push((list.as_str(), named())),
                    (Ok(true), List::Deny) => remove.push(("deny", named())),
                    (Ok(true), _) => permits = true,
                    (Ok(false), List::Deny) => {}
                    (Ok(false), _) => match (entry.lacks(facts.call.arguments), entry.condition()) {
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
            (true, ..) => Need::Nothing,
            (_, Some((entry, lacks)), _) => Need::Arguments(entry, lacks),
            (_, None, Some((entry, condition))) => Need::Condition(entry, condition),
            (_, None, None) => Need::Allow,
        };
        Mend::Entries { owners: owners.into_iter().map(|(kind, id, _)| (kind, id)).collect(), remove, need }
    }
}
