//! The naive reference evaluator: the policy algebra in its simplest form, without regard to speed.
//!
//! It evaluates documents as they were written, for one call at a time. It shares nothing with the compiled evaluator but the
//! vocabulary and `Constraint::{holds, speaks_of}`; in particular it matches tools and combines layers on its own. Every case of
//! the compiled evaluator is decided here too, and both must agree. Look next at `policy/compile/evaluate.rs`.

use crate::model::constraint::ConstraintMap;
use crate::model::decision::{ApprovalNeed, Effect, PolicyEntryRef, PreparationNeed};
use crate::model::ids::GroupId;
use crate::model::json::JsonObject;
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::{DelegationSubject, ToolCall};
use crate::policy::document::{
    AgentSpec, Document, DocumentBody, GuardrailSpec, NameSelection, PermissionEntry, PermissionLists, ToolSpec,
};

mod conditions;

/// The decision of the reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReferenceDecision {
    /// The least effect of all layers.
    pub effect: Effect,
    /// The reason.
    pub reason: Reason,
    /// The first layer with that effect; `None` on a permit.
    pub layer: Option<DecisionLayer>,
    /// The index of the agent or token at fault.
    pub hop: Option<usize>,
    /// The entry that decided.
    pub matched: Option<PolicyEntryRef>,
    /// The approval that each asking layer needs, if no layer denies.
    pub approvals: Vec<ApprovalNeed>,
    /// The preparations that each layer needs, if no layer denies.
    pub prepared: Vec<PreparationNeed>,
}

/// Decides a call. The documents must be valid.
pub fn decide(documents: &[Document], subject: &DelegationSubject, call: &ToolCall<'_>) -> ReferenceDecision {
    if let Some(answer) = identity_failure(documents, subject) {
        return answer;
    }
    let answers = layers(documents, subject, call);
    if let Some(denial) = answers.iter().find(|answer| answer.effect == Effect::Deny) {
        return ReferenceDecision { approvals: Vec::new(), prepared: Vec::new(), ..denial.clone() };
    }
    let approvals = answers.iter().flat_map(|answer| answer.approvals.clone()).collect();
    let prepared = answers.iter().flat_map(|answer| answer.prepared.clone()).collect();
    let first = answers.iter().find(|answer| answer.effect == Effect::NeedsApproval);
    ReferenceDecision { approvals, prepared, ..first.cloned().unwrap_or_else(permit) }
}

/// Puts the documents in shadow in force: each replaces the document of the same kind and id.
pub fn enforce_shadows(documents: &[Document]) -> Vec<Document> {
    let mut all: Vec<Document> = documents.iter().filter(|document| !document.is_shadow()).cloned().collect();
    for shadow in documents.iter().filter(|document| document.is_shadow()) {
        let lit = Document::new(shadow.body.clone(), &shadow.key.id);
        match all.iter_mut().find(|document| document.key == lit.key) {
            Some(document) => *document = lit,
            None => all.push(lit),
        }
    }
    all
}

fn layers(documents: &[Document], subject: &DelegationSubject, call: &ToolCall<'_>) -> Vec<ReferenceDecision> {
    let mut answers = vec![tool_layer(documents, call)];
    let groups: Vec<&Document> = documents
        .iter()
        .filter(|document| document.key.kind == "group")
        .filter(|document| subject.groups.iter().any(|group| group.as_str() == document.key.id))
        .collect();
    answers.push(least_over_agents(subject, &|seen| {
        entries_layer(documents, &groups, DecisionLayer::User, None, Reason::UserDenies, seen, call)
    }));
    answers.push(match find_document(documents, "application", subject.application.as_str()) {
        None => deny(Reason::ApplicationUnknown, DecisionLayer::Application, None),
        Some(application) => least_over_agents(subject, &|seen| {
            entries_layer(documents, &[application], DecisionLayer::Application, None, Reason::ApplicationDenies, seen, call)
        }),
    });
    for (hop, id) in subject.agents.iter().enumerate() {
        if let Some((document, agent)) = find_agent(documents, id.as_str()) {
            answers.push(agent_layer(documents, document, agent, hop, subject, call));
        }
    }
    for (hop, scope) in subject.scopes.iter().enumerate() {
        answers.push(match scope.tools.iter().find(|(name, _)| &***name == call.tool) {
            None => deny(Reason::ToolNotGranted, DecisionLayer::Hop, Some(hop)),
            Some((_, arguments)) if arguments_satisfy(arguments, call.arguments) => permit(),
            Some(_) => deny(Reason::ArgumentRefused, DecisionLayer::Hop, Some(hop)),
        });
    }
    answers.push(guardrail_layer(documents, subject, call));
    answers
}

/// The subject as it was when the chain ended at agent `hop`. Conditions do not see later agents.
fn subject_at_hop(subject: &DelegationSubject, hop: usize) -> DelegationSubject {
    let mut seen = subject.clone();
    seen.agents.truncate(hop + 1);
    seen
}

/// The least answer of a layer over all agents of the chain, with the approvals and preparations that any of them needs.
fn least_over_agents(subject: &DelegationSubject, ask: &dyn Fn(&DelegationSubject) -> ReferenceDecision) -> ReferenceDecision {
    let answers: Vec<ReferenceDecision> = (0..subject.agents.len()).map(|hop| ask(&subject_at_hop(subject, hop))).collect();
    let least = answers.iter().map(|answer| answer.effect).min().unwrap_or(Effect::Deny);
    let first = answers.iter().find(|answer| answer.effect == least).cloned().unwrap_or_else(permit);
    let mut prepared: Vec<PreparationNeed> = answers.iter().flat_map(|answer| answer.prepared.clone()).collect();
    prepared.sort();
    prepared.dedup();
    let needs: Vec<ApprovalNeed> = answers.iter().flat_map(|answer| answer.approvals.clone()).collect();
    let approvals = needs.first().map(|need| {
        let mut by: Vec<GroupId> = needs.iter().flat_map(|need| need.approver_groups.clone()).collect();
        by.sort();
        by.dedup();
        let expires_in_ms = needs.iter().map(|need| need.expires_in_ms).min().unwrap_or(0);
        ApprovalNeed { approver_groups: by, expires_in_ms, ..need.clone() }
    });
    ReferenceDecision { prepared, approvals: approvals.into_iter().collect(), ..first }
}

/// Evaluates the guardrails of the tool, by id. One whose condition cannot be evaluated denies before one whose condition holds.
fn guardrail_layer(documents: &[Document], subject: &DelegationSubject, call: &ToolCall<'_>) -> ReferenceDecision {
    let mut guardrails: Vec<(&str, &GuardrailSpec)> = Vec::new();
    for document in documents.iter().filter(|document| document.key.kind == "guardrail") {
        if let DocumentBody::Guardrail(guardrail) = &document.body {
            guardrails.push((&document.key.id, guardrail));
        }
    }
    guardrails.sort_by_key(|(id, _)| *id);
    guardrails.retain(|(_, guardrail)| guardrail.tools.iter().any(|pattern| pattern_matches(pattern, call.tool)));
    for (wanted, reason) in [(None, Reason::ConditionError), (Some(true), Reason::GuardrailDenies)] {
        for (id, guardrail) in &guardrails {
            let holds = |hop| conditions::holds(guardrail.forbid_when.text(), documents, &subject_at_hop(subject, hop), call);
            if (0..subject.agents.len()).any(|hop| holds(hop) == wanted) {
                let entry = guardrail.forbid_when.text().into();
                let matched = Some(PolicyEntryRef { kind: "guardrail", id: (*id).into(), entry });
                return ReferenceDecision { matched, ..deny(reason, DecisionLayer::Guardrail, None) };
            }
        }
    }
    permit()
}

/// Denies a chain without an agent or a scope, with an unknown agent, or with more hops than an agent allows after it.
fn identity_failure(documents: &[Document], subject: &DelegationSubject) -> Option<ReferenceDecision> {
    if subject.agents.is_empty() || subject.scopes.is_empty() {
        return Some(deny(Reason::IdentityMissing, DecisionLayer::Identity, None));
    }
    for (hop, id) in subject.agents.iter().enumerate() {
        let Some((_, agent)) = find_agent(documents, id.as_str()) else {
            return Some(deny(Reason::AgentUnknown, DecisionLayer::Identity, Some(hop)));
        };
        let hops_max = usize::try_from(agent.session_hops_max.unwrap_or(8)).unwrap_or(8);
        let following = subject.agents.len() - hop - 1;
        if following > hops_max {
            return Some(deny(Reason::ChainTooDeep, DecisionLayer::Identity, Some(hop + hops_max + 1)));
        }
    }
    None
}

fn tool_layer(documents: &[Document], call: &ToolCall<'_>) -> ReferenceDecision {
    let Some((document, tool)) = find_tool(documents, call.tool) else {
        return deny(Reason::ToolUnknown, DecisionLayer::Tool, None);
    };
    match tool.schema_sha256 {
        Some(pinned) if call.tool_schema_sha256 != Some(pinned) => {
            let matched =
                Some(PolicyEntryRef { kind: document.body.kind(), id: document.key.id.as_str().into(), entry: "".into() });
            ReferenceDecision { matched, ..deny(Reason::ToolChanged, DecisionLayer::Tool, None) }
        }
        _ => permit(),
    }
}

fn agent_layer(
    documents: &[Document],
    document: &Document,
    agent: &AgentSpec,
    hop: usize,
    subject: &DelegationSubject,
    call: &ToolCall<'_>,
) -> ReferenceDecision {
    let serves_user = match &agent.acts_for {
        NameSelection::All => true,
        NameSelection::Listed(groups) => groups.iter().any(|group| subject.groups.contains(group)),
    };
    let delegates = match subject.agents.get(hop + 1) {
        None => true,
        Some(next) => agent.delegates_to.contains(next),
    };
    let refused = |reason, key: &str| {
        let matched = Some(PolicyEntryRef { kind: "agent", id: document.key.id.as_str().into(), entry: key.into() });
        ReferenceDecision { matched, ..deny(reason, DecisionLayer::Agent, Some(hop)) }
    };
    if !agent.applications.contains(&subject.application) {
        refused(Reason::ApplicationNotServed, "applications")
    } else if !serves_user {
        refused(Reason::UserNotServed, "acts_for")
    } else if !delegates {
        refused(Reason::DelegationNotAllowed, "delegates_to")
    } else {
        let seen = subject_at_hop(subject, hop);
        entries_layer(documents, &[document], DecisionLayer::Agent, Some(hop), Reason::AgentDenies, &seen, call)
    }
}

/// An entry of a document, with the list and the owner through which it was found.
struct FoundEntry<'a> {
    list: &'static str,
    owner: &'a str,
    set: Option<&'a str>,
    kind: &'static str,
    entry: &'a PermissionEntry,
}

impl FoundEntry<'_> {
    fn entry_ref(&self) -> PolicyEntryRef {
        PolicyEntryRef {
            kind: if self.set.is_some() { "permission_set" } else { self.kind },
            id: self.set.unwrap_or(self.owner).into(),
            entry: self.entry.text().clone(),
        }
    }
}

/// Combines the entries of all owners: deny beats approve, approve beats allow, and no match denies.
fn entries_layer(
    documents: &[Document],
    owners: &[&Document],
    layer: DecisionLayer,
    hop: Option<usize>,
    denial: Reason,
    subject: &DelegationSubject,
    call: &ToolCall<'_>,
) -> ReferenceDecision {
    let mut found: Vec<FoundEntry<'_>> = Vec::new();
    for owner in owners {
        if let Some(permissions) = owner.permissions() {
            collect_entries(permissions, owner, None, &mut found);
            for set in included_sets(documents, permissions, &mut Vec::new()) {
                collect_entries(set.permissions().unwrap_or(permissions), owner, Some(&set.key.id), &mut found);
            }
        }
    }
    found.retain(|found| {
        pattern_matches(&found.entry.pattern, call.tool) && list_applies(found.list, found.entry, call.arguments)
    });
    // The choice among several matching entries must not depend on the order in which they were written.
    let rank = |list: &str| ["deny", "approve", "allow"].iter().position(|name| *name == list);
    found.sort_by_key(|found| (found.entry.prepared.is_some(), found.owner, found.set, found.entry.text().clone()));
    let condition = |found: &FoundEntry<'_>| match &found.entry.when {
        None => Some(true),
        Some(when) => conditions::holds(when.text(), documents, subject, call),
    };
    let mut failed: Vec<&FoundEntry<'_>> = found.iter().filter(|found| condition(found).is_none()).collect();
    failed.sort_by_key(|found| (found.owner, rank(found.list)));
    if let Some(first) = failed.first() {
        return ReferenceDecision { matched: Some(first.entry_ref()), ..deny(Reason::ConditionError, layer, hop) };
    }
    found.retain(|found| condition(found) == Some(true));
    for (list, effect) in [("deny", Effect::Deny), ("approve", Effect::NeedsApproval), ("allow", Effect::Permit)] {
        let Some(first) = found.iter().find(|found| found.list == list) else {
            continue;
        };
        let matched = Some(first.entry_ref());
        let needed = first.entry.prepared.iter().map(|tool| PreparationNeed { layer, hop, tool: tool.clone() });
        let prepared: Vec<PreparationNeed> = needed.collect();
        return match effect {
            Effect::Permit => ReferenceDecision { prepared, ..permit() },
            Effect::Deny => ReferenceDecision { matched, ..deny(denial, layer, hop) },
            Effect::NeedsApproval => {
                let approvals = vec![approval_need(&found, layer, hop)];
                ReferenceDecision {
                    effect,
                    reason: Reason::ApprovalRequired,
                    layer: Some(layer),
                    hop,
                    matched,
                    approvals,
                    prepared,
                }
            }
        };
    }
    let matched = match owners {
        [only] => Some(PolicyEntryRef { kind: only.body.kind(), id: only.key.id.as_str().into(), entry: "".into() }),
        _ => None,
    };
    ReferenceDecision { matched, ..deny(denial, layer, hop) }
}

fn approval_need(found: &[FoundEntry<'_>], layer: DecisionLayer, hop: Option<usize>) -> ApprovalNeed {
    let approvals: Vec<_> =
        found.iter().filter(|found| found.list == "approve").filter_map(|found| found.entry.approval.as_ref()).collect();
    let mut by: Vec<GroupId> = approvals.iter().flat_map(|approval| approval.by.clone()).collect();
    by.sort();
    by.dedup();
    ApprovalNeed {
        layer,
        hop,
        approver_groups: by,
        expires_in_ms: approvals.iter().map(|approval| approval.expires_in_ms).min().unwrap_or(0),
    }
}

fn collect_entries<'a>(
    permissions: &'a PermissionLists,
    owner: &'a Document,
    set: Option<&'a str>,
    found: &mut Vec<FoundEntry<'a>>,
) {
    for (list, entries) in [("deny", &permissions.deny), ("approve", &permissions.approve), ("allow", &permissions.allow)] {
        for entry in entries {
            found.push(FoundEntry { list, owner: &owner.key.id, set, kind: owner.body.kind(), entry });
        }
    }
}

/// Every permission set that is included, directly or through other sets.
fn included_sets<'a>(documents: &'a [Document], permissions: &PermissionLists, seen: &mut Vec<String>) -> Vec<&'a Document> {
    let mut sets = Vec::new();
    for id in &permissions.include {
        if seen.iter().any(|seen| **seen == **id) {
            continue;
        }
        seen.push(id.to_string());
        if let Some(set) = find_document(documents, "permission_set", id) {
            sets.push(set);
            if let Some(permissions) = set.permissions() {
                sets.extend(included_sets(documents, permissions, seen));
            }
        }
    }
    sets
}

fn list_applies(list: &str, entry: &PermissionEntry, arguments: &JsonObject) -> bool {
    if list != "deny" {
        return arguments_satisfy(&entry.arguments, arguments);
    }
    for (name, argument) in entry.arguments.named.iter() {
        if let Some(value) = arguments.member(name)
            && argument.constraint.applies_to_type_of(value)
            && !argument.constraint.matches(value)
        {
            return false;
        }
    }
    true
}

fn arguments_satisfy(map: &ConstraintMap, arguments: &JsonObject) -> bool {
    for (name, argument) in map.named.iter() {
        match arguments.member(name) {
            None if !argument.optional => return false,
            Some(value) if !argument.constraint.matches(value) => return false,
            _ => {}
        }
    }
    map.allows_unnamed || arguments.iter().all(|(name, _)| map.named.contains_key(name))
}

/// A lone `*` matches every tool. Within a pattern it matches any run of characters except a slash.
fn pattern_matches(pattern: &str, tool: &str) -> bool {
    fn from(pattern: &[char], tool: &[char]) -> bool {
        match (pattern, tool) {
            ([], []) => true,
            (['*', rest @ ..], _) if from(rest, tool) => true,
            (['*', ..], [next, left @ ..]) => *next != '/' && from(pattern, left),
            ([expected, rest @ ..], [next, left @ ..]) => expected == next && from(rest, left),
            _ => false,
        }
    }
    let chars = |text: &str| text.chars().collect::<Vec<_>>();
    pattern == "*" || from(&chars(pattern), &chars(tool))
}

fn find_document<'a>(documents: &'a [Document], kind: &str, id: &str) -> Option<&'a Document> {
    documents.iter().find(|document| document.key.kind == kind && document.key.id == id)
}

fn find_agent<'a>(documents: &'a [Document], id: &str) -> Option<(&'a Document, &'a AgentSpec)> {
    let document = find_document(documents, "agent", id)?;
    if let DocumentBody::Agent(agent) = &document.body { Some((document, agent)) } else { None }
}

fn find_tool<'a>(documents: &'a [Document], name: &str) -> Option<(&'a Document, ToolSpec)> {
    for document in documents {
        match &document.body {
            DocumentBody::Tool(tool) if document.key.id == name => return Some((document, *tool)),
            DocumentBody::Server(server) => {
                let tool = server.tools.iter().find(|(tool, _)| format!("{}/{tool}", server.id) == name);
                if let Some((_, tool)) = tool {
                    return Some((document, *tool));
                }
            }
            _ => {}
        }
    }
    None
}

fn permit() -> ReferenceDecision {
    ReferenceDecision {
        effect: Effect::Permit,
        reason: Reason::Ok,
        layer: None,
        hop: None,
        matched: None,
        approvals: Vec::new(),
        prepared: Vec::new(),
    }
}

fn deny(reason: Reason, layer: DecisionLayer, hop: Option<usize>) -> ReferenceDecision {
    ReferenceDecision {
        effect: Effect::Deny,
        reason,
        layer: Some(layer),
        hop,
        matched: None,
        approvals: Vec::new(),
        prepared: Vec::new(),
    }
}
