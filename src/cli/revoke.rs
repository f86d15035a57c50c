//! `portcullis revoke`, `reinstate` and `revocations`: the kill switch.

use std::time::Instant;

use clap::{Args, Subcommand};
use serde_json::json;

use super::client::AdminClient;
use super::fleet::{self, Wait};
use super::output::Output;
use super::{AdminArgs, Failure};
use crate::api::r#gen as wire;

/// Pull the kill switch; returns when the write is durable
#[derive(Debug, Args)]
pub(super) struct RevokeArgs {
    #[command(subcommand)]
    target: TargetArgs,
    /// Why, for the record
    #[arg(long, value_name = "TEXT", default_value = "", global = true)]
    reason: String,
    /// Deny until reinstated (the default where the target can be reinstated)
    #[arg(long, global = true, conflicts_with = "watermark")]
    suspend: bool,
    /// Void every root issued before now, for good; fresh credentials pass
    #[arg(long, global = true)]
    watermark: bool,
    /// Return only once no replica answers from before it any more, and say how long each took
    #[arg(long, value_name = "WHOM", global = true)]
    wait: Option<Wait>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Lift a suspension; everything is reinstated by two operators, in one call or within 15 minutes
#[derive(Debug, Args)]
pub(super) struct ReinstateArgs {
    #[command(subcommand)]
    target: TargetArgs,
    /// Why, for the record
    #[arg(long, value_name = "TEXT", default_value = "", global = true)]
    reason: String,
    /// Return only once no replica answers from before it any more, and say how long each took
    #[arg(long, value_name = "WHOM", global = true)]
    wait: Option<Wait>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// List what is revoked, newest first
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// At most so many, up to 1000
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Subcommand)]
enum TargetArgs {
    /// An agent, by SPIFFE ID, with every chain it is in
    Agent {
        /// spiffe://TRUST-DOMAIN/PATH
        id: String,
    },
    /// A session, by `sid`
    Session {
        /// The session
        sid: String,
    },
    /// A task, by `txn`
    Task {
        /// The task
        txn: String,
    },
    /// What a user delegated to an agent; the user's other agents go on
    Delegation {
        /// The user's issuer
        iss: String,
        /// The user's subject
        sub: String,
        /// The agent's SPIFFE ID
        agent: String,
    },
    /// An application, by client id
    Application {
        /// The client id
        id: String,
    },
    /// A user's every delegation; the account is not touched
    User {
        /// The user's issuer
        iss: String,
        /// The user's subject
        sub: String,
    },
    /// A key, an agent's or an issuer's, by thumbprint
    Key {
        /// RFC 7638 thumbprint
        thumbprint: String,
    },
    /// An issuer's key, by its `kid`
    IssuerKey {
        /// The issuer
        issuer: String,
        /// The key's name
        kid: String,
    },
    /// A tool, for everybody
    Tool {
        /// server/tool
        tool: String,
    },
    /// A hop and every chain below it, by the hash that `token inspect` prints
    Hop {
        /// base64url SHA-256
        hash: String,
    },
    /// A token and every chain below it, by `jti`
    Token {
        /// The token's jti
        jti: String,
    },
    /// Everything
    All,
}

impl From<TargetArgs> for wire::RevocationTarget {
    fn from(target: TargetArgs) -> Self {
        let (kind, key) = match target {
            TargetArgs::Agent { id } => ("agent", vec![id]),
            TargetArgs::Session { sid } => ("session", vec![sid]),
            TargetArgs::Task { txn } => ("task", vec![txn]),
            TargetArgs::Delegation { iss, sub, agent } => ("delegation", vec![iss, sub, agent]),
            TargetArgs::Application { id } => ("application", vec![id]),
            TargetArgs::User { iss, sub } => ("user", vec![iss, sub]),
            TargetArgs::Key { thumbprint } => ("key", vec![thumbprint]),
            TargetArgs::IssuerKey { issuer, kid } => ("issuer-key", vec![issuer, kid]),
            TargetArgs::Tool { tool } => ("tool", vec![tool]),
            TargetArgs::Hop { hash } => ("hop", vec![hash]),
            TargetArgs::Token { jti } => ("token", vec![jti]),
            TargetArgs::All => ("all", vec![]),
        };
        Self { kind: kind.to_owned(), key }
    }
}

pub(super) async fn revoke(arguments: RevokeArgs, output: &Output) -> Result<(), Failure> {
    let meaning = match (arguments.suspend, arguments.watermark) {
        (true, _) => wire::RevocationMeaning::Suspend,
        (_, true) => wire::RevocationMeaning::Watermark,
        _ => wire::RevocationMeaning::Unspecified,
    };
    let mut client = AdminClient::open(&arguments.admin).await?;
    let began = Instant::now();
    let request =
        wire::RevokeRequest { target: Some(arguments.target.into()), meaning: meaning.into(), reason: arguments.reason };
    let answer = client.revoke(request).await?;
    let took_ms = began.elapsed().as_millis() as u64;
    let target = answer.target.unwrap_or_default();
    output.line(&format!("revoked {}: durable in {took_ms} ms", named(&target)));
    let done = Done { verb: "deny", target, revision: answer.revision, committed_at_unix_ms: answer.committed_at_unix_ms };
    done.end(&mut client, arguments.wait, output).await
}

pub(super) async fn reinstate(arguments: ReinstateArgs, output: &Output) -> Result<(), Failure> {
    let mut client = AdminClient::open(&arguments.admin).await?;
    let target: wire::RevocationTarget = arguments.target.into();
    let request = wire::ReinstateRequest { target: Some(target.clone()), reason: arguments.reason };
    let answer = client.reinstate(request).await?;
    let waits_until = answer.waits_for_second_until_unix_ms;
    if waits_until > 0 {
        output.json(&json!({
            "revision": answer.revision,
            "target": { "kind": target.kind, "key": target.key },
            "committed_at_unix_ms": answer.committed_at_unix_ms,
            "waits_for_second_until_unix_ms": waits_until,
        }));
        output.line(&format!("nothing is reinstated yet: waits for a second operator until {}", clock_time(waits_until)));
        output.line(&format!("revision {}", answer.revision));
        // A script that goes on with 0 would take it for done.
        return Err(Failure::silent(Failure::NEEDS_APPROVAL));
    }
    output.line(&format!("reinstated {}", named(&target)));
    let done = Done { verb: "know", target, revision: answer.revision, committed_at_unix_ms: answer.committed_at_unix_ms };
    done.end(&mut client, arguments.wait, output).await
}

/// What was written, and what is left to say of it.
struct Done {
    verb: &'static str,
    target: wire::RevocationTarget,
    revision: String,
    committed_at_unix_ms: i64,
}

impl Done {
    /// Says the revision, waits for the fleet where that was asked for, and says how that ended. What was written stays written,
    /// whatever becomes of the wait.
    async fn end(self, client: &mut AdminClient, wait: Option<Wait>, output: &Output) -> Result<(), Failure> {
        let Self { verb, target, revision, committed_at_unix_ms } = self;
        output.line(&format!("revision {revision}"));
        let mut said = json!({
            "revision": revision,
            "target": { "kind": target.kind, "key": target.key },
            "committed_at_unix_ms": committed_at_unix_ms,
        });
        let waited = fleet::wait(client, wait, &revision, committed_at_unix_ms).await.transpose();
        if let (Ok(Some(waited)), Some(said)) = (&waited, said.as_object_mut()) {
            said.insert("fleet".to_owned(), fleet::waited_json(waited));
        }
        output.json(&said);
        if let Some(waited) = waited.map_err(Failure::after_a_write)? {
            fleet::print(&waited, verb, output);
        }
        Ok(())
    }
}

/// A time of day as people read it, in UTC.
fn clock_time(unix_ms: i64) -> String {
    let minutes = unix_ms.div_euclid(60_000).rem_euclid(24 * 60);
    format!("{:02}:{:02} UTC", minutes / 60, minutes % 60)
}

pub(super) async fn list(arguments: ListArgs, output: &Output) -> Result<(), Failure> {
    let mut client = AdminClient::open(&arguments.admin).await?;
    let answer = client.revocations(wire::ListRevocationsRequest { limit: arguments.limit }).await?;
    let state = |revocation: &wire::Revocation| {
        let mut state = Vec::new();
        if revocation.dead {
            state.push("dead".to_owned());
        }
        if revocation.suspended {
            state.push("suspended".to_owned());
        }
        if revocation.watermark_unix_s > 0 {
            state.push(format!("roots until {} void", revocation.watermark_unix_s));
        }
        if state.is_empty() { "reinstated".to_owned() } else { state.join(", ") }
    };
    let entries = answer.revocations.iter().map(|revocation| {
        let target = revocation.target.clone().unwrap_or_default();
        json!({
            "target": { "kind": target.kind, "key": target.key },
            "dead": revocation.dead,
            "suspended": revocation.suspended,
            "watermark_unix_s": (revocation.watermark_unix_s > 0).then_some(revocation.watermark_unix_s),
            "reason": revocation.reason,
            "revision": revocation.revision,
        })
    });
    output.json(&json!({ "revocations": entries.collect::<Vec<_>>(), "total": answer.total }));
    let rows = answer.revocations.iter().map(|revocation| {
        let target = revocation.target.clone().unwrap_or_default();
        let number = revocation.revision.rsplit('.').next().unwrap_or_default().to_owned();
        vec![number, target.kind, target.key.join(" "), state(revocation), revocation.reason.clone()]
    });
    output.table(&["REVISION", "KIND", "KEY", "STATE", "REASON"], rows.collect());
    output.line(&format!("{} of {}", answer.revocations.len(), answer.total));
    Ok(())
}

/// A target in words, as on the command line.
fn named(target: &wire::RevocationTarget) -> String {
    [std::slice::from_ref(&target.kind), &target.key].concat().join(" ")
}
