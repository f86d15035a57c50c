//! `portcullis revoke`, `reinstate` and `revocations`: the kill switch.
//!
//! Look next at `name_lookup.rs`, which reports unknown names, and at `fleet.rs`, which waits for the replicas.

use std::time::Instant;

use clap::{Args, Subcommand};
use serde_json::json;

use super::act_outcome::ActAnswer;
use super::client::AdminClient;
use super::fleet::{self, WaitTarget};
use super::name_lookup::NameLookupAnswer;
use super::output::CommandOutput;
use super::store::date_time;
use super::visible_text::escape_for_terminal;
use super::{AdminArgs, CommandFailure, progress, shell_quote};
use crate::api::r#gen as wire;
use crate::app::StoreFollowers;
use crate::model::time::{Clock as _, SystemClock};

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
    /// Exit with 0 instead of 2 if nothing that is known has the name
    #[arg(long, global = true)]
    unknown_ok: bool,
    /// Wait until every replica applies it or only denies, and show how long each took
    #[arg(long, value_name = "WHOM", global = true)]
    wait: Option<WaitTarget>,
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
    /// Wait until every replica applies it or only denies, and show how long each took
    #[arg(long, value_name = "WHOM", global = true)]
    wait: Option<WaitTarget>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// List what is revoked, newest first
#[derive(Debug, Args)]
pub(super) struct RevocationListArgs {
    /// At most so many, up to 1000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    #[command(flatten)]
    admin: AdminArgs,
}

/// The target, by name. A name may begin with `-`, as one thumbprint, hash or random id in 64 does.
#[derive(Debug, Subcommand)]
enum TargetArgs {
    /// An agent, by SPIFFE ID, with every chain it is in
    Agent {
        /// spiffe://TRUST-DOMAIN/PATH
        #[arg(allow_hyphen_values = true)]
        id: String,
    },
    /// A session, by `sid`
    Session {
        /// The session
        #[arg(allow_hyphen_values = true)]
        sid: String,
    },
    /// A task, by `txn`
    Task {
        /// The task
        #[arg(allow_hyphen_values = true)]
        txn: String,
    },
    /// What a user delegated to an agent; the user's other agents go on
    Delegation {
        /// The user's issuer
        #[arg(allow_hyphen_values = true)]
        iss: String,
        /// The user's subject
        #[arg(allow_hyphen_values = true)]
        sub: String,
        /// The agent's SPIFFE ID
        #[arg(allow_hyphen_values = true)]
        agent: String,
    },
    /// An application, by client id
    Application {
        /// The client id
        #[arg(allow_hyphen_values = true)]
        id: String,
    },
    /// Every delegation of a user; the account is not touched
    User {
        /// The user's issuer
        #[arg(allow_hyphen_values = true)]
        iss: String,
        /// The user's subject
        #[arg(allow_hyphen_values = true)]
        sub: String,
    },
    /// A key of an agent, an issuer or an operator, by thumbprint
    Key {
        /// RFC 7638 thumbprint
        #[arg(allow_hyphen_values = true)]
        thumbprint: String,
    },
    /// An issuer's key, by its `kid`
    IssuerKey {
        /// The issuer
        #[arg(allow_hyphen_values = true)]
        issuer: String,
        /// The key's name
        #[arg(allow_hyphen_values = true)]
        kid: String,
    },
    /// A tool, for all callers
    Tool {
        /// server/tool
        #[arg(allow_hyphen_values = true)]
        tool: String,
    },
    /// A hop and every chain that contains it, by the hash that `token inspect` prints
    Hop {
        /// base64url SHA-256
        #[arg(allow_hyphen_values = true)]
        hash: String,
    },
    /// A token and every chain that contains it, by `jti`
    Token {
        /// The token's jti
        #[arg(allow_hyphen_values = true)]
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

pub(super) async fn revoke(arguments: RevokeArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let meaning = match (arguments.suspend, arguments.watermark) {
        (true, _) => wire::RevocationMeaning::Suspend,
        (_, true) => wire::RevocationMeaning::Watermark,
        _ => wire::RevocationMeaning::Unspecified,
    };
    let admin = arguments.admin;
    let mut client = AdminClient::open_for_act(&admin).await?;
    let began = Instant::now();
    let typed: wire::RevocationTarget = arguments.target.into();
    let request = wire::RevokeRequest { target: Some(typed.clone()), meaning: meaning.into(), reason: arguments.reason };
    let ActAnswer { message: answer, is_recorded } = client.revoke(request).await?;
    let took_ms = began.elapsed().as_millis() as u64;
    let target = answer.target.unwrap_or_default();
    output.line(&format!("revoked {}: durable in {took_ms} ms", target_text(&target)));
    let name = NameLookupAnswer::from(answer.name);
    name.print(&typed, output);
    if answer.watermark_unix_s > 0 {
        output.line(&format!("every root issued until {} is void", date_time(answer.watermark_unix_s)));
    }
    let verb = if name.is_unknown() { "would deny it, and nothing bears that name" } else { "deny" };
    let (revision, committed_at_unix_ms) = (answer.revision, answer.committed_at_unix_ms);
    let usable = PermitWindow { bound_ms: answer.freshness_bound_ms, since: Instant::now() };
    let end = name.exit_result(arguments.unknown_ok);
    let watermark_unix_s = Some(answer.watermark_unix_s).filter(|unix_s| *unix_s > 0);
    let (name, usable) = (Some(name), Some(usable));
    let done =
        CommittedAct { verb, target, revision, committed_at_unix_ms, is_recorded, name, permit_window: usable, watermark_unix_s };
    done.finish(&mut client, arguments.wait, output).await?;
    end
}

pub(super) async fn reinstate(arguments: ReinstateArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let admin = arguments.admin;
    let mut client = AdminClient::open_for_act(&admin).await?;
    let target: wire::RevocationTarget = arguments.target.into();
    let request = wire::ReinstateRequest { target: Some(target.clone()), reason: arguments.reason };
    let ActAnswer { message: answer, is_recorded } = client.reinstate(request).await?;
    let waits_until = answer.waits_for_second_until_unix_ms;
    if waits_until > 0 {
        output.json(&json!({
            "revision": answer.revision,
            "target": { "kind": target.kind, "key": target.key },
            "committed_at_unix_ms": answer.committed_at_unix_ms,
            "recorded": is_recorded,
            "waits_for_second_until_unix_ms": waits_until,
        }));
        output.line(&format!("nothing is reinstated yet: waits for a second operator until {}", clock_time(waits_until)));
        output.line(&format!("revision {}", answer.revision));
        // With exit code 0 a script would take the reinstatement for done.
        return Err(CommandFailure::exit_code_only(CommandFailure::NEEDS_APPROVAL));
    }
    output.line(&format!("reinstated {}", target_text(&target)));
    let (revision, committed_at_unix_ms) = (answer.revision, answer.committed_at_unix_ms);
    let (verb, name, usable, watermark_unix_s) = ("know", None, None, None);
    let done =
        CommittedAct { verb, target, revision, committed_at_unix_ms, is_recorded, name, permit_window: usable, watermark_unix_s };
    done.finish(&mut client, arguments.wait, output).await
}

/// A committed act, with the facts that are still to be printed.
struct CommittedAct {
    verb: &'static str,
    target: wire::RevocationTarget,
    revision: String,
    committed_at_unix_ms: i64,
    /// Whether it stands in the audit log.
    is_recorded: bool,
    /// The look-up of the target's name, if there was one.
    name: Option<NameLookupAnswer>,
    /// How long earlier permits stay usable, if the act revokes something.
    permit_window: Option<PermitWindow>,
    /// Roots issued at or before this time are void, if the act set a watermark.
    watermark_unix_s: Option<i64>,
}

/// How long permits from before a commit stay usable: the freshness bound, counted from before the commit's answer arrived.
struct PermitWindow {
    /// The freshness bound; 0 if the server did not send it.
    bound_ms: u64,
    since: Instant,
}

impl PermitWindow {
    /// The remaining milliseconds, and the end by this machine's clock; `None` if the server did not send the bound.
    fn remaining(&self) -> Option<(u64, i64)> {
        let elapsed_ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let left_ms = self.bound_ms.saturating_sub(elapsed_ms);
        let until_unix_ms = SystemClock.now().unix_ms().saturating_add(i64::try_from(left_ms).unwrap_or(i64::MAX));
        (self.bound_ms > 0).then_some((left_ms, until_unix_ms))
    }

    /// Prints when the permits end, as the last line. `of` says by whom they were given.
    fn print(&self, of: &str, output: &CommandOutput) {
        match self.remaining() {
            None => {}
            Some((0, _)) => output.line(&format!("permits that were given before it{of} are void by now")),
            Some((left_ms, until_unix_ms)) => output.line(&format!(
                "permits that were given before it{of} may still be used for {} s, until {}",
                left_ms.div_ceil(1000),
                // Rounded up, because the permits must have ended when the printed second has.
                date_time(until_unix_ms.saturating_add(999).div_euclid(1000))
            )),
        }
    }
}

impl CommittedAct {
    /// Prints the revision, waits for the fleet if requested, and prints how the wait ended. The write stands, whatever the wait
    /// returns.
    async fn finish(
        self,
        client: &mut AdminClient,
        wait: Option<WaitTarget>,
        output: &CommandOutput,
    ) -> Result<(), CommandFailure> {
        let Self { verb, target, revision, committed_at_unix_ms, is_recorded, name, permit_window: usable, watermark_unix_s } =
            self;
        output.line(&format!("revision {revision}"));
        let followers = client.followers().cloned();
        if let Some(followers) = &followers {
            output.line(&fleet::describe_followers(followers));
        }
        let mut result_json = json!({
            "revision": revision,
            "target": { "kind": target.kind, "key": target.key },
            "committed_at_unix_ms": committed_at_unix_ms,
            "recorded": is_recorded,
        });
        if let (Some(name), Some(result_json)) = (&name, result_json.as_object_mut()) {
            result_json.insert("name".to_owned(), name.json());
        }
        if let (Some(watermark_unix_s), Some(result_json)) = (watermark_unix_s, result_json.as_object_mut()) {
            result_json.insert("watermark_unix_s".to_owned(), watermark_unix_s.into());
        }
        if let (Some(followers), Some(result_json)) = (&followers, result_json.as_object_mut()) {
            result_json.insert("store".to_owned(), fleet::followers_json(followers));
        }
        if let (Some((_, until_unix_ms)), Some(result_json)) =
            (usable.as_ref().and_then(PermitWindow::remaining), result_json.as_object_mut())
        {
            result_json.insert("permits_usable_until_unix_ms".to_owned(), until_unix_ms.into());
        }
        let progress = wait.map(|_| progress::start_spinner("waiting until no replica answers from before it"));
        let waited = fleet::wait_for_fleet(client, wait, &revision, committed_at_unix_ms).await.transpose();
        if let Some(progress) = progress {
            progress.finish_and_clear();
        }
        if let (Ok(Some(waited)), Some(result_json)) = (&waited, result_json.as_object_mut()) {
            result_json.insert("fleet".to_owned(), fleet::wait_outcome_json(waited));
        }
        output.json(&result_json);
        let waited = waited.map_err(CommandFailure::after_write)?;
        if let Some(waited) = &waited {
            fleet::print_wait_outcome(waited, verb, output);
        }
        // An unknown name had no permits before.
        if let Some(usable) = usable.filter(|_| !name.is_some_and(|name| name.is_unknown())) {
            let is_followed = followers.as_ref().is_none_or(StoreFollowers::is_followed);
            usable.print(if is_followed { "" } else { " by servers that follow this store" }, output);
        }
        match (waited, followers) {
            (Some(waited), Some(followers)) => fleet::check_wait_outcome(&waited, &followers),
            _ => Ok(()),
        }
    }
}

/// A time of day in UTC, for people.
fn clock_time(unix_ms: i64) -> String {
    let minutes = unix_ms.div_euclid(60_000).rem_euclid(24 * 60);
    format!("{:02}:{:02} UTC", minutes / 60, minutes % 60)
}

pub(super) async fn list(arguments: RevocationListArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let mut client = AdminClient::open(&arguments.admin).await?;
    let answer = client.revocations(wire::ListRevocationsRequest { limit: arguments.limit }).await?;
    let entries = answer.revocations.iter().map(|revocation| {
        let target = revocation.target.clone().unwrap_or_default();
        json!({
            "target": { "kind": target.kind, "key": target.key },
            "dead": revocation.dead,
            "suspended": revocation.suspended,
            "watermark_unix_s": (revocation.watermark_unix_s > 0).then_some(revocation.watermark_unix_s),
            "reason": revocation.reason,
            "revision": revocation.revision,
            "committed_at_unix_ms": (revocation.committed_at_unix_ms > 0).then_some(revocation.committed_at_unix_ms),
            "operators": revocation.operators,
        })
    });
    output.json(&json!({ "revocations": entries.collect::<Vec<_>>(), "total": answer.total }));
    output.table(
        &["WHEN", "WHO", "KIND", "KEY", "STATE", "REASON", "REVISION"],
        answer.revocations.iter().map(revocation_row).collect(),
    );
    let (shown, total) = (answer.revocations.len(), answer.total);
    let more = match arguments.limit {
        _ if shown as u64 >= total => "",
        LISTED_MAX.. => ", the newest; a list holds no more",
        _ => ", the newest; --limit 1000 shows as many as a list holds",
    };
    output.line(&format!("{shown} of {total}{more}"));
    Ok(())
}

/// Most entries in one list.
const LISTED_MAX: u32 = 1000;

/// A row of the table: time, operators, target, state, reason.
fn revocation_row(revocation: &wire::Revocation) -> Vec<String> {
    let target = revocation.target.clone().unwrap_or_default();
    let mut state = Vec::new();
    if revocation.dead {
        state.push("dead".to_owned());
    }
    if revocation.suspended {
        state.push("suspended".to_owned());
    }
    if revocation.watermark_unix_s > 0 {
        state.push(format!("roots until {} void", date_time(revocation.watermark_unix_s)));
    }
    let when = match revocation.committed_at_unix_ms {
        0 => "-".to_owned(),
        unix_ms => date_time(unix_ms.div_euclid(1000)),
    };
    let who =
        if revocation.operators.is_empty() { "-".to_owned() } else { escape_for_terminal(&revocation.operators.join(", ")) };
    let state = if state.is_empty() { "reinstated".to_owned() } else { state.join(", ") };
    let number = revocation.revision.rsplit('.').next().unwrap_or_default().to_owned();
    vec![
        when,
        who,
        target.kind,
        shell_quote::quote_command(target.key.iter().map(String::as_str)),
        state,
        escape_for_terminal(&revocation.reason),
        number,
    ]
}

/// A target as text, as on the command line.
fn target_text(target: &wire::RevocationTarget) -> String {
    shell_quote::quote_command([&target.kind].into_iter().chain(&target.key).map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name with a blank at its end must not look like the name without it, nor two parts like one.
    #[test]
    fn names_are_shown_as_they_are_typed() {
        let check = |key: &[&str], expected: &str| {
            let key: Vec<String> = key.iter().map(|part| (*part).to_owned()).collect();
            let target = wire::RevocationTarget { kind: "user".to_owned(), key };
            assert_eq!(target_text(&target), format!("user {expected}").trim_end());
            let shown = revocation_row(&wire::Revocation { target: Some(target), ..Default::default() });
            assert_eq!(shown[3], expected);
        };
        check(&[], "");
        check(&["https://i", "ana"], "https://i ana");
        check(&["https://i", "ana "], "https://i 'ana '");
        check(&["https://i ana", "x"], "'https://i ana' x");
        check(&["https://i", "an\u{e4}"], "https://i 'an\u{e4}'");
        check(&["https://i", "a\u{1b}b"], r"https://i 'a\u{1b}b'");
    }
}
