//! Warns about delegations that can never work, that exceed the allowed hops, or that only the depth limit ends.
//!
//! Such delegations are legal, because every hop is checked again when it is used. They are only rarely intended. The search is
//! bounded, so that its cost does not explode in a fleet where all agents delegate to each other.

use std::collections::{HashMap, HashSet};

use crate::model::constraint::abbreviate;
use crate::model::limits::DELEGATION_DEPTH_MAX;

use super::super::diagnostic::{Diagnostic, Severity};
use super::super::document::{AgentSpec, Document, DocumentBody, NameSelection};
use super::ceilings::ReachByAgent;
use super::cycles;

/// The maximum number of delegations that the search for distant agents follows. Beyond it, a large fleet gets no further
/// warnings.
const STEPS_MAX: usize = 1_000_000;

/// The maximum number of agents of a cycle that a warning names.
const NAMED_MAX: usize = 8;

/// An agent that delegates or is delegated to.
struct DelegatingAgent<'a> {
    document: &'a Document,
    agent: &'a AgentSpec,
    /// The index of its document.
    document_index: usize,
    /// The indexes of the agents that it delegates to, in the order of `delegates_to`.
    targets: Vec<Option<usize>>,
}

/// Warns about delegations without the intended effect.
pub(super) fn lint_delegations(documents: &[&Document], reaches: &ReachByAgent, out: &mut Vec<Diagnostic>) {
    let links = delegating_agents(documents);
    for link in &links {
        for (index, target) in link.targets.iter().enumerate() {
            if let Some(problem) =
                target.and_then(|target| links.get(target)).and_then(|target| useless_delegation(link, target, reaches))
            {
                out.push(link.document.field_diagnostic(Severity::Warning, "delegates_to", index, problem));
            }
        }
    }
    let mut steps = 0;
    for start in 0..links.len() {
        if steps < STEPS_MAX {
            out.extend(find_too_distant_agent(&links, start, &mut steps));
        }
    }
    out.extend(find_unbounded_cycles(&links));
}

/// The agents that name others in `delegates_to`, and the named agents.
fn delegating_agents<'a>(documents: &[&'a Document]) -> Vec<DelegatingAgent<'a>> {
    let agents = || {
        documents.iter().copied().enumerate().filter_map(|(index, document)| match &document.body {
            DocumentBody::Agent(agent) => Some((index, document, agent)),
            _ => None,
        })
    };
    let named: HashSet<&str> = agents().flat_map(|(_, _, agent)| agent.delegates_to.iter().map(|id| id.as_str())).collect();
    let linked = agents().filter(|(_, _, agent)| !agent.delegates_to.is_empty() || named.contains(agent.id.as_str()));
    let mut links: Vec<DelegatingAgent<'_>> = linked
        .map(|(index, document, agent)| DelegatingAgent { document, agent, document_index: index, targets: Vec::new() })
        .collect();
    let numbers: HashMap<&str, usize> = links.iter().enumerate().map(|(number, link)| (link.agent.id.as_str(), number)).collect();
    let targets =
        |link: &DelegatingAgent<'_>| link.agent.delegates_to.iter().map(|id| numbers.get(id.as_str()).copied()).collect();
    let all: Vec<Vec<Option<usize>>> = links.iter().map(targets).collect();
    links.iter_mut().zip(all).for_each(|(link, targets)| link.targets = targets);
    links
}

/// The reason why one agent's delegation to another can never permit a call; `None` if it can.
fn useless_delegation(from: &DelegatingAgent<'_>, to: &DelegatingAgent<'_>, reaches: &ReachByAgent) -> Option<String> {
    let id = abbreviate(to.agent.id.as_str());
    if let (NameSelection::Listed(ours), NameSelection::Listed(theirs)) = (&from.agent.applications, &to.agent.applications)
        && !(ours.is_empty() || theirs.is_empty())
        && !ours.iter().any(|application| theirs.contains(application))
    {
        return Some(format!("handing on to `{id}` never works: the two have no application in common"));
    }
    let (ours, theirs) = (reaches.get(&from.document_index)?, reaches.get(&to.document_index)?);
    let nothing = !ours.is_empty() && !theirs.is_empty() && !ours.intersects(theirs);
    nothing.then(|| format!("handing on to `{id}` permits nothing: there is no tool that both allow"))
}

/// A warning for the nearest agent that is farther away than the allowed number of hops.
fn find_too_distant_agent(links: &[DelegatingAgent<'_>], start: usize, steps: &mut usize) -> Option<Diagnostic> {
    let first = links.get(start)?;
    let hops_max = first.agent.session_hops_max.unwrap_or(DELEGATION_DEPTH_MAX);
    if hops_max == 0 {
        return None;
    }
    let mut seen: HashSet<usize> = HashSet::from([start]);
    // Each agent with the index in `delegates_to` of the first step towards it.
    let mut level: Vec<(usize, usize)> = vec![(start, 0)];
    for hops in 1..=hops_max + 1 {
        let mut next = Vec::new();
        for (node, by) in level {
            let Some(link) = links.get(node).filter(|link| link.agent.session_hops_max != Some(0)) else {
                continue;
            };
            for (index, target) in link.targets.iter().enumerate() {
                *steps += 1;
                if let Some(target) = target.filter(|target| seen.insert(*target)) {
                    next.push((target, if node == start { index } else { by }));
                }
            }
            if *steps >= STEPS_MAX {
                return None;
            }
        }
        if hops > hops_max {
            let (target, by) =
                next.iter().filter_map(|(target, by)| Some((links.get(*target)?, *by))).min_by_key(|(_, by)| *by)?;
            let (id, through) = (abbreviate(target.agent.id.as_str()), abbreviate(first.agent.id.as_str()));
            let limit = if first.agent.session_hops_max.is_some() { "`hops_max`" } else { "the depth limit" };
            let message =
                format!("`{id}` can never be reached through `{through}`: it is {hops} hops away, and {limit} allows {hops_max}");
            return Some(first.document.field_diagnostic(Severity::Warning, "delegates_to", by, message));
        }
        level = next;
    }
    None
}

/// Cycles of delegations in which no agent limits the number of hops.
fn find_unbounded_cycles(links: &[DelegatingAgent<'_>]) -> Vec<Diagnostic> {
    let is_bounded = |number: usize| links.get(number).is_none_or(|link| link.agent.session_hops_max.is_some());
    let edges = links.iter().enumerate().map(|(number, link)| {
        let follow = |target: &Option<usize>| target.filter(|target| !is_bounded(number) && !is_bounded(*target));
        link.targets.iter().map(follow).collect()
    });
    let edges: Vec<Vec<Option<usize>>> = edges.collect();
    let warning = |cycle: cycles::GraphCycle| {
        let id = |link: &DelegatingAgent<'_>| format!("`{}`", abbreviate(link.agent.id.as_str()));
        let named: Vec<String> = cycle.first_nodes(NAMED_MAX + 1).filter_map(|number| links.get(number)).map(id).collect();
        let message = format!(
            "agents hand on in a circle that only the depth limit of {DELEGATION_DEPTH_MAX} hops ends: {}",
            named.join(" to ")
        );
        let help = "say with `session: {hops_max: …}` of one of them how many hops are meant".to_owned();
        let finding = links.get(cycle.closing_node)?.document.field_diagnostic(
            Severity::Warning,
            "delegates_to",
            cycle.closing_edge,
            message,
        );
        Some(finding.with_help(Some(help)))
    };
    cycles::find_cycles(&edges).into_iter().filter_map(warning).collect()
}
