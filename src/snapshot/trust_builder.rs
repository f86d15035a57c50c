//! Builds the trust table from the policy documents: issuers with their keys, agents with their keys, and the known groups.
//!
//! `token::trust` defines the table and `token::verify` reads it. This module checks no signature.

use crate::policy::document::{AgentSpec, Document, DocumentBody, IssuerSpec, NameSelection};
use crate::token::trust::{AllowList, TrustTable, TrustedIssuer};

/// Builds the trust table of a set of documents.
///
/// # Errors
/// One line if two documents contradict each other. The linter refuses such documents before they are stored.
pub fn build_trust_table<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Result<TrustTable, String> {
    let mut trust = TrustTable::new();
    let mut groups = Vec::new();
    // INVARIANT: a document in shadow mode establishes no trust.
    for document in documents.into_iter().filter(|document| !document.is_shadow()) {
        match &document.body {
            DocumentBody::Issuer(issuer) => {
                groups.extend(explicit_names(&issuer.groups));
                trust.put_issuer(trusted_issuer(issuer)).map_err(|error| error.to_string())?;
            }
            DocumentBody::Agent(agent) => {
                groups.extend(explicit_names(&agent.acts_for));
                register_agent_keys(&mut trust, agent)?;
            }
            DocumentBody::Group(_) => groups.push(document.key.id.as_str().into()),
            _ => {}
        }
    }
    trust.set_groups(groups);
    Ok(trust)
}

/// Registers an agent with its keys and replaces its earlier keys.
pub(super) fn register_agent_keys(trust: &mut TrustTable, agent: &AgentSpec) -> Result<(), String> {
    trust.put_agent(agent.id.clone(), agent.keys.iter().cloned()).map_err(|error| error.to_string())
}

fn trusted_issuer(spec: &IssuerSpec) -> TrustedIssuer {
    TrustedIssuer {
        audiences: spec.audiences.iter().map(ToString::to_string).collect(),
        groups: allow_list(&spec.groups),
        applications: allow_list(&spec.applications),
        typ: spec.typ.iter().map(|typ| typ.as_str().to_owned()).collect(),
        lifetime_max_s: spec.lifetime_max_s,
        hop_lifetime_max_s: spec.hop_lifetime_max_s,
        ..TrustedIssuer::new(spec.id.clone(), spec.keys.clone())
    }
}

fn explicit_names<T: Clone>(names: &NameSelection<T>) -> Vec<T> {
    match names {
        NameSelection::All => Vec::new(),
        NameSelection::Listed(names) => names.clone(),
    }
}

fn allow_list<T: Ord + Clone>(names: &NameSelection<T>) -> AllowList<T> {
    match names {
        NameSelection::All => AllowList::All,
        NameSelection::Listed(names) => AllowList::Only(names.iter().cloned().collect()),
    }
}
