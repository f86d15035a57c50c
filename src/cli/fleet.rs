//! `portcullis fleet status`, and the table of `--wait fleet`: the replicas of the store, and the revision of each.
//!
//! Look next at `pap/fleet.rs`, which waits for the replicas.

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::client::AdminClient;
use super::output::Output;
use super::{AdminArgs, Failure};
use crate::api::r#gen as wire;

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
pub(super) enum Wait {
    /// Until no replica answers by the state before the write
    Fleet,
}

pub(super) async fn run(command: FleetCommand, output: &Output) -> Result<(), Failure> {
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
            state(replica),
            number(&replica.revision),
            number(&replica.acked_revision),
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
pub(super) async fn wait(
    client: &mut AdminClient,
    wait: Option<Wait>,
    revision: &str,
    committed_at_unix_ms: i64,
) -> Option<Result<wire::WaitForFleetResponse, Failure>> {
    wait?;
    let message = wire::WaitForFleetRequest { revision: revision.to_owned(), committed_at_unix_ms };
    Some(client.wait_for_fleet(message).await)
}

/// Prints how a wait ended. `verb` says what the replicas do now.
pub(super) fn print(waited: &wire::WaitForFleetResponse, verb: &str, output: &Output) {
    let rows = waited.replicas.iter().map(|answer| {
        let replica = answer.replica.clone().unwrap_or_default();
        let after = answer.acknowledged_after_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string());
        let (applied, acked) = (number(&replica.revision), number(&replica.acked_revision));
        vec![replica.id.clone(), replica.address.clone(), applied, acked, after, answer.outcome.clone(), state(&replica)]
    });
    output.table(&["REPLICA", "ADDRESS", "REVISION", "ACKED", "MS", "OUTCOME", "STATE"], rows.collect());
    let of = |outcome: &str| waited.replicas.iter().filter(|answer| answer.outcome == outcome).count();
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

/// The outcome of a wait, for a script.
pub(super) fn waited_json(waited: &wire::WaitForFleetResponse) -> Value {
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

fn state(replica: &wire::Replica) -> String {
    if replica.draining { format!("{}, draining", replica.state) } else { replica.state.clone() }
}

/// The number of a revision. The history is the same for all replicas.
fn number(revision: &str) -> String {
    revision.rsplit('.').next().filter(|number| !number.is_empty()).unwrap_or("-").to_owned()
}
