//! Warns about agents, applications, groups and permission sets that no delegation can reach.
//!
//! Every agent of a chain must serve the user and the application that the root's issuer named. So an agent that no issuer can
//! reach cannot be reached through another agent either. This file only warns; it never refuses a policy. Look next at
//! `ceilings.rs`.

use std::collections::{HashMap, HashSet};

use crate::model::constraint::abbreviate;

use super::super::bit_set::BitSet;
use super::super::diagnostic::{Diagnostic, Severity};
use super::super::document::{AgentSpec, Document, DocumentBody, IssuerSpec, NameSelection};

/// Warns about documents that can never have an effect.
pub(super) fn lint_reachability(documents: &[&Document], out: &mut Vec<Diagnostic>) {
    let issuers: Vec<(&Document, &IssuerSpec)> = documents
        .iter()
        .copied()
        .filter_map(|document| if let DocumentBody::Issuer(issuer) = &document.body { Some((document, issuer)) } else { None })
        .collect();
    let mut warn = |document: &Document, message: String, help: &str| {
        let help = Some(help.to_owned()).filter(|help| !help.is_empty());
        out.push(document.field_diagnostic(Severity::Warning, "id", 0, message).with_help(help));
    };
    let speaking = IssuerReach::new(documents, "application", &issuers, |issuer| &issuer.applications, |id| id.as_str());
    let issuer_reach = IssuerReach::new(documents, "group", &issuers, |issuer| &issuer.groups, |id| id.as_str());
    if issuers.is_empty() {
        if let Some(first) = documents.first() {
            warn(first, "there is no issuer, so no delegation can begin and nothing is ever permitted".to_owned(), "");
        }
    } else {
        lint_issuers(&issuers, &speaking, &issuer_reach, documents, &mut warn);
    }
    for document in documents.iter().copied() {
        if let DocumentBody::Agent(agent) = &document.body {
            lint_agent(document, agent, &speaking, &issuer_reach, !issuers.is_empty(), &mut warn);
        }
    }
}

/// Warns about permission sets that no agent, group or application includes, directly or through others. Includes by shadow
/// documents count.
pub(super) fn lint_unused_sets(documents: &[Document], out: &mut Vec<Diagnostic>) {
    for set in unused_sets(documents) {
        let message = format!("nothing includes permission set `{}`", abbreviate(&set.key.id));
        out.push(set.field_diagnostic(Severity::Warning, "id", 0, message));
    }
}

/// The issuers, as numbers, that may name each application or each group.
struct IssuerReach<'a> {
    by_id: HashMap<&'a str, BitSet>,
    all: BitSet,
    none: BitSet,
}

impl<'a> IssuerReach<'a> {
    fn new<T: 'a>(
        documents: &[&'a Document],
        kind: &str,
        issuers: &[(&'a Document, &'a IssuerSpec)],
        names: fn(&IssuerSpec) -> &NameSelection<T>,
        as_text: fn(&T) -> &str,
    ) -> Self {
        let ids = documents.iter().copied().filter(|document| document.key.kind == kind).map(|document| document.key.id.as_str());
        let mut by_id: HashMap<&str, BitSet> = ids.map(|id| (id, BitSet::empty(issuers.len()))).collect();
        for ((_, issuer), number) in issuers.iter().zip(0..) {
            match names(issuer) {
                NameSelection::All => by_id.values_mut().for_each(|issuers| issuers.insert(number)),
                NameSelection::Listed(names) => names.iter().for_each(|name| {
                    if let Some(issuers) = by_id.get_mut(as_text(name)) {
                        issuers.insert(number);
                    }
                }),
            }
        }
        let mut all = BitSet::empty(issuers.len());
        by_id.values().for_each(|issuers| all.union_with(issuers));
        Self { none: BitSet::empty(issuers.len()), by_id, all }
    }

    /// The issuers that may name any of the selected names.
    fn issuers_of_any<T>(&self, names: &NameSelection<T>, as_text: fn(&T) -> &str) -> BitSet {
        let NameSelection::Listed(names) = names else {
            return self.all.clone();
        };
        let mut any = self.none.clone();
        for name in names {
            if let Some(issuers) = self.by_id.get(as_text(name)) {
                any.union_with(issuers);
            }
        }
        any
    }
}

fn names_nothing<T>(names: &NameSelection<T>) -> bool {
    matches!(names, NameSelection::Listed(names) if names.is_empty())
}

/// Warns about issuers that name nothing, and about applications and groups that no issuer names.
fn lint_issuers(
    issuers: &[(&Document, &IssuerSpec)],
    speaking: &IssuerReach<'_>,
    issuer_reach: &IssuerReach<'_>,
    documents: &[&Document],
    warn: &mut impl FnMut(&Document, String, &str),
) {
    for (document, issuer) in issuers {
        let id = abbreviate(&document.key.id);
        if names_nothing(&issuer.applications) {
            let message = format!("issuer `{id}` speaks for no application, so no delegation of it is of use");
            warn(document, message, "name them in `applications`");
        }
        if names_nothing(&issuer.groups) {
            let message = format!("issuer `{id}` vouches for no group, so its users may do nothing");
            warn(document, message, "name them in `groups`");
        }
    }
    for document in documents.iter().copied() {
        let id = document.key.id.as_str();
        let nobody = |names: &IssuerReach<'_>| names.by_id.get(id).is_some_and(BitSet::is_empty);
        match &document.body {
            DocumentBody::Application(_) if nobody(speaking) => {
                let message = format!("no issuer speaks for application `{}`", abbreviate(id));
                warn(document, message, "name it in `applications` of an issuer");
            }
            DocumentBody::Group(_) if nobody(issuer_reach) => {
                let message = format!("no issuer may say that a user is in group `{}`", abbreviate(id));
                warn(document, message, "name it in `groups` of an issuer");
            }
            _ => {}
        }
    }
}

/// Warns if no chain can reach an agent. The first warning is the one to fix first.
fn lint_agent(
    document: &Document,
    agent: &AgentSpec,
    speaking: &IssuerReach<'_>,
    issuer_reach: &IssuerReach<'_>,
    has_issuer: bool,
    warn: &mut impl FnMut(&Document, String, &str),
) {
    let id = abbreviate(&document.key.id);
    let mut unreachable = |cause: String, help: &str| warn(document, format!("agent `{id}` cannot be reached: {cause}"), help);
    if agent.keys.is_empty() {
        let help = "list in `keys` the thumbprint that `portcullis token keygen` prints";
        unreachable("it has no `keys`, so it can hold no delegation".to_owned(), help);
    }
    let by_application = speaking.issuers_of_any(&agent.applications, |id| id.as_str());
    let by_group = issuer_reach.issuers_of_any(&agent.acts_for, |id| id.as_str());
    if names_nothing(&agent.applications) {
        unreachable("it runs inside no application".to_owned(), "name one in `applications`");
    } else if has_issuer && by_application.is_empty() {
        let which = describe_names(&agent.applications, |id| id.as_str());
        unreachable(format!("no issuer speaks for {} of its `applications`", which), "");
    }
    if names_nothing(&agent.acts_for) {
        unreachable("it acts for nobody".to_owned(), "name a group in `acts_for`, or `*` for every user");
    } else if has_issuer && by_group.is_empty() {
        let which = describe_names(&agent.acts_for, |id| id.as_str());
        unreachable(format!("no issuer may say that a user is in {} of its `acts_for`", which), "");
    }
    if !by_application.is_empty() && !by_group.is_empty() && !by_application.intersects(&by_group) {
        let cause = "the issuers that speak for its `applications` are not those that vouch for the groups of its `acts_for`";
        unreachable(cause.to_owned(), "");
    }
    let permissions = &agent.permissions;
    if permissions.allow.is_empty() && permissions.approve.is_empty() && permissions.include.is_empty() {
        let message = format!("agent `{id}` allows nothing, so nothing is permitted in any chain that it is part of");
        warn(document, message, "");
    }
}

fn describe_names<T>(names: &NameSelection<T>, as_text: fn(&T) -> &str) -> String {
    match names {
        NameSelection::Listed(names) => match names.as_slice() {
            [one] => format!("`{}`", abbreviate(as_text(one))),
            _ => "any".to_owned(),
        },
        NameSelection::All => "any".to_owned(),
    }
}

/// The permission sets that no other document includes, directly or through others.
fn unused_sets(documents: &[Document]) -> Vec<&Document> {
    let is_set = |document: &Document| matches!(document.body, DocumentBody::PermissionSet(_));
    let mut sets: HashMap<&str, Vec<&Document>> = HashMap::new();
    for set in documents.iter().filter(|document| is_set(document)) {
        sets.entry(set.key.id.as_str()).or_default().push(set);
    }
    let mut used: HashSet<&str> = HashSet::new();
    let mut pending: Vec<&str> = documents.iter().filter(|document| !is_set(document)).flat_map(included_sets).collect();
    while let Some(id) = pending.pop() {
        if used.insert(id) {
            // An enforced set and a shadow set may have the same id.
            pending.extend(sets.get(id).into_iter().flatten().flat_map(|set| included_sets(set)));
        }
    }
    documents.iter().filter(|document| is_set(document) && !used.contains(document.key.id.as_str())).collect()
}

fn included_sets(document: &Document) -> impl Iterator<Item = &str> {
    document.permissions().into_iter().flat_map(|permissions| permissions.include.iter().map(|id| &**id))
}
