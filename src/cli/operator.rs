//! `portcullis operator`: the operators who may administer, respond, approve and audit, besides those of the policy folder.
//!
//! Look next at `pap/operators.rs`, which makes the changes.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::act_outcome::ActAnswer;
use super::client::AdminClient;
use super::output::CommandOutput;
use super::{AdminArgs, CommandFailure, act_outcome, client, input, shell_quote, token};
use crate::api::r#gen as wire;
use crate::app;
use crate::config;
use crate::model::json::{Value as Json, parse_object};
use crate::model::jwk::PublicKey;
use crate::pap::NewOperator;
use crate::policy::document::OperatorRole;

const ADD_HELP: &str = "\
Roles: respond (revoke), administer (reinstate, policy, operators), approve (answer calls that wait), audit (read).
Once two or more operators administer, a change of operators takes two of them: --operator-key twice.

Examples:
  portcullis operator add ada@acme.example --out ada.jwk --role administer --role respond
  portcullis operator add bo@acme.example --jwk bo.public.jwk --role approve --group finance --user https://login.acme.example bo

Nobody is left who can sign? Whoever may write the store itself adds an operator without a signature; the records say so. Operators
whose keys are revoked still count, so where two had to sign, add two in this way:
  portcullis operator add ada --out ada.jwk --role administer --role respond --store sqlite:DATA/store.db --data DATA --break-glass

Docs: OPERATIONS, operators";

/// List, add and retire operators, besides those of the policy folder
#[derive(Debug, Subcommand)]
pub(super) enum OperatorCommand {
    /// Add an operator, with a new key or with the public key that they provide
    #[command(after_help = ADD_HELP)]
    Add(OperatorAddArgs),
    /// List operators and their keys, including retired operators and revoked keys
    List {
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Retire an operator who was added by command, or the first one, `local`; their keys are dead for good
    Retire {
        /// The operator
        #[arg(value_name = "ID")]
        id: String,
        /// Why, for the record
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        #[command(flatten)]
        admin: AdminArgs,
    },
}

#[derive(Debug, Args)]
pub(super) struct OperatorAddArgs {
    /// The operator's name, as records show it
    #[arg(value_name = "ID")]
    id: String,
    /// Make a key: the private one goes into this file (mode 0600), which must not exist
    #[arg(long, value_name = "FILE", required_unless_present = "jwk", conflicts_with = "jwk")]
    out: Option<PathBuf>,
    /// The operator's public key, a JWK file; repeated for several
    #[arg(long, value_name = "FILE")]
    jwk: Vec<String>,
    /// What they may do; repeated for several
    #[arg(long, value_name = "ROLE", required = true, value_parser = role_parser())]
    role: Vec<String>,
    /// A group of operators, as `by` of an approval names it; repeated for several
    #[arg(long, value_name = "GROUP")]
    group: Vec<String>,
    /// A user account of the operator, so that they never approve their own calls; repeated for several
    #[arg(long, num_args = 2, value_names = ["ISS", "SUB"])]
    user: Vec<String>,
    /// Why, for the record
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Add the operator without a signature, by the right to write `--store`; the records say so
    #[arg(long, requires = "store")]
    break_glass: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

fn role_parser() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(OperatorRole::ALL.iter().map(|role| role.as_str()))
}

pub(super) async fn run(command: OperatorCommand, output: &CommandOutput) -> Result<(), CommandFailure> {
    match command {
        OperatorCommand::Add(arguments) => add(arguments, output).await,
        OperatorCommand::List { admin } => list(&admin, output).await,
        OperatorCommand::Retire { id, reason, admin } => {
            let mut client = AdminClient::open_for_act(&admin).await?;
            let request = wire::RetireOperatorRequest { id, reason };
            let ActAnswer { message: answer, is_recorded } = client.retire_operator(request).await?;
            let operator = answer.operator.unwrap_or_default();
            output.line(&format!("retired operator {}", operator.id));
            for key in &operator.keys {
                output.line(&format!("key {} is dead for good", key.thumbprint));
            }
            let revision = answer.revision;
            print_change(&OperatorChange { revision, unix_ms: answer.committed_at_unix_ms, operator, is_recorded }, output);
            Ok(())
        }
    }
}

async fn add(arguments: OperatorAddArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let OperatorAddArgs { id, out, jwk, role, group, user, reason, break_glass, admin } = arguments;
    // Clap accepts this flag beside `--target`, which excludes `--store`.
    if break_glass && admin.store.is_none() {
        return Err(CommandFailure::misuse("--break-glass needs --store: it is done at the store itself, and no server does it"));
    }
    let is_approver_without_user = user.is_empty() && role.iter().any(|role| role == OperatorRole::Approve.as_str());
    if break_glass && !admin.operator_key.is_empty() {
        CommandOutput::new(false).warning("--break-glass is signed by nobody: the key of --operator-key is not used");
    }
    let keys = match &out {
        // The key is written before the server learns of it, because an operator without a key is useless.
        Some(path) => vec![token::create_key_file(path)?.to_jwk().into_bytes()],
        None => jwk.iter().map(|argument| read_public_key(argument)).collect::<Result<_, _>>()?,
    };
    let users = user.chunks_exact(2).filter_map(|pair| match pair {
        [issuer, sub] => Some((issuer.clone(), sub.clone())),
        _ => None,
    });
    let new = NewOperator { id, keys, roles: role, groups: group, users: users.collect() };
    // A key that no operator has is of no use, and a second attempt could not write to its file. An operator may have the key if
    // nobody knows whether the act was done.
    let kept = |failure: CommandFailure| match &out {
        Some(path) if act_outcome::is_not_done(&failure) && std::fs::remove_file(path).is_ok() => failure,
        Some(path) => CommandFailure {
            message: format!("{}; the key that was made stays in `{}`", failure.message, path.display()),
            ..failure
        },
        None => failure,
    };
    let changed = match (break_glass, &admin.store) {
        (true, Some(url)) => add_by_break_glass(url, &admin, &new, &reason).await.map_err(kept)?,
        _ => add_signed(&admin, &new, reason).await.map_err(kept)?,
    };
    output.line(&format!("added operator {}: {}", changed.operator.id, changed.operator.roles.join(", ")));
    for key in &changed.operator.keys {
        output.line(&format!("key {}", key.thumbprint));
    }
    if let Some(path) = &out {
        output.line(&format!("the private key is in {}: hand it over, and keep no copy", path.display()));
    }
    if is_approver_without_user {
        CommandOutput::new(false).warning(
            "an operator who approves needs a user account, so that they never approve their own calls: without --user they can approve \
             nothing; retire this operator and add them again with --user ISS SUB",
        );
    }
    if break_glass {
        output.line("nobody signed this: it stands in the policy's history and in the audit log of this data folder");
    }
    print_change(&changed, output);
    Ok(())
}

/// An operator that was added or retired.
struct OperatorChange {
    revision: String,
    unix_ms: i64,
    operator: wire::Operator,
    /// Whether the act stands in the audit log.
    is_recorded: bool,
}

async fn add_signed(admin: &AdminArgs, new: &NewOperator, reason: String) -> Result<OperatorChange, CommandFailure> {
    let mut client = AdminClient::open_for_act(admin).await.map_err(act_outcome::not_done)?;
    let request = wire::AddOperatorRequest {
        id: new.id.clone(),
        keys_jwk: new.keys.iter().map(|key| key.clone().into()).collect(),
        roles: new.roles.clone(),
        groups: new.groups.clone(),
        users: new.users.iter().map(|(issuer, sub)| wire::OperatorUser { issuer: issuer.clone(), sub: sub.clone() }).collect(),
        reason,
    };
    let ActAnswer { message: answer, is_recorded } = client.add_operator(request).await?;
    let operator = answer.operator.unwrap_or_default();
    Ok(OperatorChange { revision: answer.revision, unix_ms: answer.committed_at_unix_ms, operator, is_recorded })
}

/// Adds an operator without a signature, on the store itself.
async fn add_by_break_glass(
    url: &config::StoreUrl,
    admin: &AdminArgs,
    new: &NewOperator,
    reason: &str,
) -> Result<OperatorChange, CommandFailure> {
    let store = config::StoreLocation::new(url, admin.store_durability).map_err(CommandFailure::bad_configuration)?;
    let opened = app::InProcessAdmin::open(&store, &admin.data).await;
    let local = opened.map_err(|error| act_outcome::not_done(CommandFailure::from(error)))?;
    let done = local.break_glass(new, reason).await;
    let done = done.map_err(|error| act_outcome::not_done(CommandFailure::failed(error)))?;
    client::warn_of_followers(&local.followers().await);
    if !done.is_recorded {
        CommandOutput::new(false)
            .warning("it was done, and the store keeps it; but the audit folder of --data cannot be written: make room there");
    }
    let hint = local.break_glass_hint().await;
    if !hint.is_empty() {
        CommandOutput::new(false).warning(&format!("{} is added{hint}", new.id));
    }
    let operator = wire::Operator {
        id: new.id.clone(),
        roles: new.roles.clone(),
        groups: new.groups.clone(),
        users: new.users.iter().map(|(issuer, sub)| wire::OperatorUser { issuer: issuer.clone(), sub: sub.clone() }).collect(),
        keys: done
            .operator
            .keys
            .iter()
            .map(|key| wire::OperatorKey { thumbprint: key.thumbprint().to_string(), ..Default::default() })
            .collect(),
        state: "active".to_owned(),
        revision: done.revision.to_string(),
        ..Default::default()
    };
    Ok(OperatorChange { revision: done.revision.to_string(), unix_ms: done.unix_ms, operator, is_recorded: done.is_recorded })
}

fn print_change(changed: &OperatorChange, output: &CommandOutput) {
    output.line(&format!("revision {}", changed.revision));
    output.json(&json!({
        "revision": changed.revision,
        "committed_at_unix_ms": changed.unix_ms,
        "operator": operator_json(&changed.operator),
        "recorded": changed.is_recorded,
    }));
}

async fn list(admin: &AdminArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let mut client = AdminClient::open(admin).await?;
    let answer = client.operators().await?;
    output.json(&json!({ "operators": answer.operators.iter().map(operator_json).collect::<Vec<_>>() }));
    let rows = answer.operators.iter().map(|operator| {
        let key =
            |key: &wire::OperatorKey| if key.revoked { format!("{} (revoked)", key.thumbprint) } else { key.thumbprint.clone() };
        let keys = operator.keys.iter().map(key).collect::<Vec<_>>().join(" ");
        let from = match (operator.state.as_str(), operator.line) {
            ("retired", _) => format!("until revision {}", revision_number(&operator.revision)),
            (_, 0) => "command".to_owned(),
            (_, line) => format!("{}:{line}", operator.path),
        };
        let users = operator
            .users
            .iter()
            .map(|user| shell_quote::quote_command([user.issuer.as_str(), user.sub.as_str()]))
            .collect::<Vec<_>>();
        vec![
            operator.id.clone(),
            operator.state.clone(),
            operator.roles.join(","),
            operator.groups.join(","),
            users.join(", "),
            from,
            keys,
        ]
    });
    output.table(&["ID", "STATE", "ROLES", "GROUPS", "USERS", "FROM", "KEYS"], rows.collect());
    Ok(())
}

fn revision_number(revision: &str) -> &str {
    revision.rsplit('.').next().unwrap_or_default()
}

fn operator_json(operator: &wire::Operator) -> Value {
    json!({
        "id": operator.id,
        "state": operator.state,
        "roles": operator.roles,
        "groups": operator.groups,
        "users": operator.users.iter().map(|user| json!([user.issuer, user.sub])).collect::<Vec<_>>(),
        "keys": operator.keys.iter().map(|key| json!({
            "thumbprint": key.thumbprint,
            "revoked": key.revoked,
            "reason": Some(&key.reason).filter(|_| key.revoked),
        })).collect::<Vec<_>>(),
        "path": Some(&operator.path).filter(|path| !path.is_empty()),
        "line": Some(operator.line).filter(|line| *line > 0),
        "revision": operator.revision,
    })
}

/// Reads a public key from a file: a JWK, or the output of `token keygen`, which holds one as `jwk`. A private key is refused,
/// because nobody should hand one in.
fn read_public_key(argument: &str) -> Result<Vec<u8>, CommandFailure> {
    public_jwk(&input::read_file_or_json("--jwk", argument)?, argument)
}

fn public_jwk(text: &[u8], argument: &str) -> Result<Vec<u8>, CommandFailure> {
    let key = parse_object(text).map_err(|error| error.to_string());
    let key = key.and_then(|object| {
        let jwk = object.member("jwk").and_then(Json::as_object).unwrap_or(&object);
        PublicKey::from_jwk(jwk).map_err(|error| error.to_string())
    });
    match key {
        Ok(key) => Ok(key.to_jwk().into_bytes()),
        Err(error) => Err(CommandFailure::misuse(format!("--jwk: `{argument}` is not a public JWK: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keygen_prints_is_a_public_key() {
        let key = crate::token::PrivateKey::generate().unwrap();
        let jwk = key.public_key().to_jwk();
        let private = key.to_jwk();
        let printed = format!(r#"{{"jwk":{jwk},"thumbprint":"{}"}}"#, key.public_key().thumbprint());
        assert_eq!(public_jwk(jwk.as_bytes(), "k").unwrap(), jwk.as_bytes());
        assert_eq!(public_jwk(printed.as_bytes(), "k").unwrap(), jwk.as_bytes());
        for refused in [private.as_bytes(), format!(r#"{{"jwk":{}}}"#, &*private).as_bytes(), b"{}", b"{\"jwk\":7}"] {
            let failure = public_jwk(refused, "k").unwrap_err();
            assert!(
                failure.code == CommandFailure::MISUSE && failure.message.contains("is not a public JWK"),
                "{}",
                failure.message
            );
        }
    }
}
