//! `portcullis fleet status`, and the table of `--wait fleet`: the replicas of the store, and the revision of each.
//!
//! Look next at `pap/fleet.rs`, which waits for the replicas.

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::client::AdminClient;
use super::output::CommandOutput;
use super::visible_text::escape_for_terminal;
use super::{AdminArgs, CommandFailure};
use crate::api::r#gen as wire;
use crate::app::StoreFollowers;

#[derive(Debug, Subcommand)]
pub(super) enum FleetCommand {
    /// List the replicas: state, revision, acknowledged revision, age of the last heartbeat
    Status {
        #[command(flatten)]
        admin: AdminArgs,
    },
}

/// The target of a wait, once a write is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum WaitTarget {
    /// Until no replica answers by the state before the write
    Fleet,
}

pub(super) async fn run(command: FleetCommand, output: &CommandOutput) -> Result<(), CommandFailure> {
    let FleetCommand::Status { admin } = command;
    let mut client = AdminClient::open(&admin).await?;
    let answer = client.replicas().await?;
    let replicas: Vec<Value> = answer.replicas.iter().map(replica_json).collect();
    output.json(&json!({
        "revision": answer.revision,
        "freshness_bound_ms": answer.freshness_bound_ms,
        "replicas": replicas,
    }));
    let rows = answer.replicas.iter().map(|replica| {
        vec![
            replica.id.clone(),
            replica.address.clone(),
            state_text(replica),
            revision_number(&replica.revision),
            revision_number(&replica.acked_revision),
            replica.age_ms.to_string(),
            replica.last_kill_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string()),
            replica.version.clone(),
        ]
    });
    output.table(&["REPLICA", "ADDRESS", "STATE", "REVISION", "ACKED", "AGE MS", "KILL MS", "VERSION"], rows.collect());
    output.line(&format!("{} replicas, the store is at revision {}", answer.replicas.len(), answer.revision));
    Ok(())
}

/// Waits for the fleet after a write, if that was requested.
pub(super) async fn wait_for_fleet(
    client: &mut AdminClient,
    wait: Option<WaitTarget>,
    revision: &str,
    committed_at_unix_ms: i64,
) -> Option<Result<wire::WaitForFleetResponse, CommandFailure>> {
    wait?;
    let message = wire::WaitForFleetRequest { revision: revision.to_owned(), committed_at_unix_ms };
    Some(client.wait_for_fleet(message).await)
}

/// Prints how a wait ended. `verb` says what the replicas do now.
pub(super) fn print_wait_outcome(waited: &wire::WaitForFleetResponse, verb: &str, output: &CommandOutput) {
    let rows = waited.replicas.iter().map(|answer| {
        let replica = answer.replica.clone().unwrap_or_default();
        let after = answer.acknowledged_after_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string());
        let (applied, acked) = (revision_number(&replica.revision), revision_number(&replica.acked_revision));
        vec![replica.id.clone(), replica.address.clone(), applied, acked, after, answer.outcome.clone(), state_text(&replica)]
    });
    output.table(&["REPLICA", "ADDRESS", "REVISION", "ACKED", "MS", "OUTCOME", "STATE"], rows.collect());
    let of = |outcome: &str| waited.replicas.iter().filter(|answer| answer.outcome == outcome).count();
    if heard_replica_count(waited) == 0 {
        let count = waited.replicas.len();
        return output.line(&format!("0 of {count} replicas were heard; one of this store that is not heard only denies by now"));
    }
    let slowest = waited.replicas.iter().filter_map(|answer| answer.acknowledged_after_ms).max();
    let mut line = format!("{0} of {0} replicas {verb}", waited.replicas.len());
    if let Some(ms) = slowest {
        line.push_str(&format!(", slowest {ms} ms"));
    }
    for (outcome, says) in
        [("ran_out", "was not heard in time and only denies"), ("quarantined", "is quarantined and only denies")]
    {
        match of(outcome) {
            0 => {}
            count => line.push_str(&format!("; {count} of them {says} until it has caught up")),
        }
    }
    output.line(&line);
}

/// The replicas that were heard during a wait. All others can only deny, if they follow the store.
fn heard_replica_count(waited: &wire::WaitForFleetResponse) -> usize {
    // A replica that ended in quarantine keeps that state for as long as its row stands.
    let is_recent = |replica: &wire::Replica| replica.age_ms < waited.freshness_bound_ms;
    let is_heard = |answer: &&wire::ReplicaAnswer| match answer.outcome.as_str() {
        "acknowledged" => true,
        "quarantined" => answer.replica.as_ref().is_some_and(is_recent),
        _ => false,
    };
    waited.replicas.iter().filter(is_heard).count()
}

/// Fails if a wait on a store that this command opened heard no replica, or if that store is not the one that a replica followed.
/// In both cases the answers of the intended server are unknown.
pub(super) fn check_wait_outcome(waited: &wire::WaitForFleetResponse, followers: &StoreFollowers) -> Result<(), CommandFailure> {
    let why = match &followers.contradiction {
        Some(_) => "it is not the store that a replica followed",
        None if heard_replica_count(waited) == 0 => "no server was heard to follow it",
        None => return Ok(()),
    };
    Err(CommandFailure::failed(format!(
        "written to the store `{}`, but {why}: nobody can say what the server answers",
        followers.store
    )))
}

/// The store that was opened, and the replicas that were heard to follow it.
pub(super) fn describe_followers(followers: &StoreFollowers) -> String {
    let heard = match followers.heard.as_slice() {
        [] => "nobody was heard to follow it".to_owned(),
        heard => format!("followed by {}", escape_for_terminal(&heard.join(", "))),
    };
    format!("store {}: {heard}", followers.store)
}

/// The same for a script.
pub(super) fn followers_json(followers: &StoreFollowers) -> Value {
    json!({ "url": followers.store, "heard": followers.heard, "contradiction": followers.contradiction })
}

/// The outcome of a wait, for a script.
pub(super) fn wait_outcome_json(waited: &wire::WaitForFleetResponse) -> Value {
    let replicas = waited.replicas.iter().map(|answer| {
        json!({
            "replica": replica_json(&answer.replica.clone().unwrap_or_default()),
            "outcome": answer.outcome,
            "acknowledged_after_ms": answer.acknowledged_after_ms,
        })
    });
    json!({
        "replicas": replicas.collect::<Vec<_>>(),
        "freshness_bound_ms": waited.freshness_bound_ms,
        "waited_ms": waited.waited_ms,
    })
}

fn replica_json(replica: &wire::Replica) -> Value {
    json!({
        "id": replica.id,
        "address": replica.address,
        "state": replica.state,
        "revision": replica.revision,
        "acked_revision": replica.acked_revision,
        "age_ms": replica.age_ms,
        "last_kill_ms": replica.last_kill_ms,
        "version": replica.version,
        "started_at_unix_ms": replica.started_at_unix_ms,
        "draining": replica.draining,
    })
}

fn state_text(replica: &wire::Replica) -> String {
    if replica.draining { format!("{}, draining", replica.state) } else { replica.state.clone() }
}

/// The number of a revision. The history is the same for all replicas.
fn revision_number(revision: &str) -> String {
    revision.rsplit('.').next().filter(|number| !number.is_empty()).unwrap_or("-").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_in_which_nobody_was_heard_proves_nothing() {
        let check = |outcomes: &[(&str, u64)], contradiction: Option<&str>, expected: Option<&str>| {
            let answer = |(outcome, age_ms): &(&str, u64)| wire::ReplicaAnswer {
                replica: Some(wire::Replica { age_ms: *age_ms, ..Default::default() }),
                outcome: (*outcome).to_owned(),
                ..Default::default()
            };
            let replicas = outcomes.iter().map(answer).collect();
            let waited = wire::WaitForFleetResponse { replicas, freshness_bound_ms: 5_000, ..Default::default() };
            let followers = StoreFollowers { contradiction: contradiction.map(str::to_owned), ..StoreFollowers::default() };
            match (check_wait_outcome(&waited, &followers), expected) {
                (Ok(()), None) => {}
                (Err(failure), Some(part)) => {
                    assert_eq!(failure.code, CommandFailure::FAILED);
                    assert!(failure.message.contains(part), "{}", failure.message);
                }
                (ended, _) => panic!("{outcomes:?}: {ended:?}"),
            }
        };
        check(&[], None, Some("no server was heard"));
        check(&[("ran_out", 9_000)], None, Some("no server was heard"));
        check(&[("ran_out", 9_000), ("acknowledged", 0)], None, None);
        check(&[("quarantined", 4_999)], None, None);
        check(&[("quarantined", 5_000)], None, Some("no server was heard"));
        check(&[("acknowledged", 0)], Some("the store is at revision `h.1`"), Some("not the store that a replica followed"));
    }
}
