//! Builds the trust table from the policy documents: issuers with their keys, agents with their keys, and the known groups.
//!
//! `token::trust` defines the table and `token::verify` reads it. This module checks no signature.

use crate::policy::document::{AgentSpec, Body, Document, IssuerSpec, Names};
use crate::token::trust::{Issuer, Listed, Trust};

/// Builds the trust table of a set of documents.
///
/// # Errors
/// One line if two documents contradict each other. The linter refuses such documents before they are stored.
pub fn trust_of<'a>(documents: impl IntoIterator<Item = &'a Document>) -> Result<Trust, String> {
    let mut trust = Trust::new();
    let mut groups = Vec::new();
    // INVARIANT: a document in shadow mode establishes no trust.
    for document in documents.into_iter().filter(|document| !document.is_shadow()) {
        match &document.body {
            Body::Issuer(issuer) => {
                groups.extend(named(&issuer.groups));
                trust.put_issuer(issuer_of(issuer)).map_err(|error| error.to_string())?;
            }
            Body::Agent(agent) => {
                groups.extend(named(&agent.acts_for));
                put_agent(&mut trust, agent)?;
            }
            Body::Group(_) => groups.push(document.key.id.as_str().into()),
            _ => {}
        }
    }
    trust.set_groups(groups);
    Ok(trust)
}

/// Registers an agent with its keys and replaces its earlier keys.
pub(super) fn put_agent(trust: &mut Trust, agent: &AgentSpec) -> Result<(), String> {
    trust.put_agent(agent.id.clone(), agent.keys.iter().cloned()).map_err(|error| error.to_string())
}

fn issuer_of(spec: &IssuerSpec) -> Issuer {
    Issuer {
        audiences: spec.audiences.iter().map(ToString::to_string).collect(),
        groups: listed(&spec.groups),
        applications: listed(&spec.applications),
        typ: spec.typ.iter().map(|typ| typ.as_str().to_owned()).collect(),
        lifetime_max_s: spec.lifetime_max_s,
        hop_lifetime_max_s: spec.hop_lifetime_max_s,
        ..Issuer::new(spec.id.clone(), spec.keys.clone())
    }
}

fn named<T: Clone>(names: &Names<T>) -> Vec<T> {
    match names {
        Names::All => Vec::new(),
        Names::Some(names) => names.clone(),
    }
}

fn listed<T: Ord + Clone>(names: &Names<T>) -> Listed<T> {
    match names {
        Names::All => Listed::All,
        Names::Some(names) => Listed::Only(names.iter().cloned().collect()),
    }
}
