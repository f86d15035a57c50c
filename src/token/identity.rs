//! The identities of a chain: the user, application, session and task of the root, and the agent of each token.
//!
//! An issuer may only vouch for the names in its document. An agent is identified by the registration of its holder key. The requirements
//! that [`RegistryMode::Off`] lifts are lifted in this file only.

use std::sync::Arc;

use super::chain::{ChainSubject, RootIdentities, VerifiedToken};
use super::claims;
use super::trust::{TrustTable, TrustedIssuer};
use super::{RegistryMode, Rejection, VerificationOptions};
use crate::model::constraint::abbreviate;
use crate::model::ids::{AgentId, ApplicationId, GroupId, IssuerUri, SessionId, TaskId, UserId};
use crate::model::json::JsonObject;
use crate::model::jwk::PublicKey;
use crate::model::reason::Reason;
use crate::model::request::{DelegationSubject, TokenScope};

/// Reads the identities of a root, and those of its groups that the issuer may vouch for.
pub(super) fn read_root_identities(
    claims: &JsonObject,
    issuer: &TrustedIssuer,
    trust: &TrustTable,
    options: &VerificationOptions,
) -> Result<(RootIdentities, Vec<GroupId>), Rejection> {
    let read = |name: &str| {
        let text = claims::optional_text(claims, name)?;
        if options.registry == RegistryMode::Required && text.is_none() { Err(missing_identity(name)) } else { Ok(text) }
    };
    let user = read("sub")?;
    if read("sub_profile")?.is_some_and(|profile| profile != "user") {
        return Err(Rejection::new(Reason::IdentityMissing, "`sub_profile` is not `user`: the root must name a user"));
    }
    let application = read("client_id")?;
    let session = read("sid")?;
    let task = read("txn")?;
    claims::optional_text(claims, "acr")?;
    if let Some(application) = application.filter(|id| !issuer.applications.allows(id)) {
        let message = format!("the issuer may not speak for application `{}`", abbreviate(application));
        return Err(Rejection::new(Reason::IssuerNotEntitled, message));
    }
    let groups = entitled_groups(&claims::read_groups(claims)?, issuer, trust)?;
    let identities = RootIdentities {
        user: user.map(Arc::from),
        application: application.map(ApplicationId::from),
        session: session.map(SessionId::from),
        task: task.map(TaskId::from),
    };
    Ok((identities, groups))
}

/// Returns the agent of a token: the agent that the holder key is registered for.
pub(super) fn resolve_agent(
    claims: &JsonObject,
    holder: &PublicKey,
    trust: &TrustTable,
    options: &VerificationOptions,
) -> Result<Option<AgentId>, Rejection> {
    let named = claims::read_actor(claims)?;
    if options.registry == RegistryMode::Off {
        return Ok(named.map(AgentId::from));
    }
    let named = named.ok_or_else(|| missing_identity("act.sub"))?;
    match trust.agent_for_key(holder.thumbprint().as_str()) {
        Some(agent) if agent.as_str() == named => Ok(Some(agent.clone())),
        None if !trust.knows_agent(named) => {
            let message = format!("neither agent `{}` nor its key is registered", abbreviate(named));
            Err(Rejection::new(Reason::AgentUnknown, message))
        }
        _ => {
            let message = format!("key `{}` is not registered for agent `{}`", holder.thumbprint(), abbreviate(named));
            Err(Rejection::new(Reason::AgentKeyUnknown, message))
        }
    }
}

/// Builds the subject if identities were required; all of them are present then.
pub(super) fn build_chain_subject(
    options: &VerificationOptions,
    issuer: &IssuerUri,
    identities: &RootIdentities,
    mut groups: Vec<GroupId>,
    levels: &[VerifiedToken],
    mut scopes: Vec<TokenScope>,
) -> Result<ChainSubject, Rejection> {
    // A cached chain keeps these vectors.
    groups.shrink_to_fit();
    scopes.shrink_to_fit();
    if options.registry == RegistryMode::Off {
        return Ok(ChainSubject::Anonymous(scopes));
    }
    let agents: Option<Vec<AgentId>> = levels.iter().map(|level| level.agent.clone()).collect();
    let RootIdentities { user: Some(user), application: Some(application), session: Some(session), task: Some(task) } =
        identities.clone()
    else {
        return Err(missing_identity("an identity of the root"));
    };
    Ok(ChainSubject::Verified(Arc::new(DelegationSubject {
        user: UserId::new(issuer.clone(), user),
        groups,
        application,
        agents: agents.ok_or_else(|| missing_identity("act.sub"))?,
        scopes,
        session,
        task,
    })))
}

/// Returns the claimed groups that some document names, each once. Fails if the issuer may not vouch for one of them.
fn entitled_groups(claimed: &[&str], issuer: &TrustedIssuer, trust: &TrustTable) -> Result<Vec<GroupId>, Rejection> {
    let mut groups: Vec<GroupId> = Vec::new();
    for group in claimed.iter().filter(|group| trust.knows_group(group)) {
        if !issuer.groups.allows(group) {
            let message = format!("the issuer may not say that a user is in group `{}`", abbreviate(group));
            return Err(Rejection::new(Reason::IssuerNotEntitled, message));
        }
        if !groups.iter().any(|kept| kept.as_str() == *group) {
            groups.push(GroupId::from(*group));
        }
    }
    Ok(groups)
}

fn missing_identity(name: &str) -> Rejection {
    Rejection::new(Reason::IdentityMissing, format!("`{name}` is missing or empty"))
}
