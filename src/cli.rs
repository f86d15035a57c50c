//! The command line: one file for each command. A failed command says the problem and the remedy, and exits with a documented code.
//!
//! Exit codes of every command: 0 ok, 1 failed, 2 done but nothing known has the name, 3 denied, 4 needs approval, 64 misuse,
//! 69 unavailable, 78 bad configuration. Look next at [`run`], then at `cli/client.rs` for the signed calls.

mod act_outcome;
mod approvals;
mod call_failure;
mod check;
mod client;
mod demo;
mod diagnostic_text;
mod explain;
mod fleet;
mod input;
mod name_lookup;
mod operator;
mod output;
mod policy;
mod progress;
mod revoke;
mod serve;
mod server_unreachable;
mod shell_quote;
mod store;
mod token;
mod tools;
mod visible_text;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use output::CommandOutput;

use crate::app;
use crate::config::StoreUrl;
use crate::store::postgres::Durability;

/// How a command ended, unless it simply succeeded.
#[derive(Debug)]
pub struct CommandFailure {
    code: u8,
    message: String,
}

impl CommandFailure {
    const FAILED: u8 = 1;
    const UNKNOWN_NAME: u8 = 2;
    const DENIED: u8 = 3;
    const NEEDS_APPROVAL: u8 = 4;
    const MISUSE: u8 = 64;
    const UNAVAILABLE: u8 = 69;
    const BAD_CONFIGURATION: u8 = 78;

    fn failed(message: impl ToString) -> Self {
        Self { code: Self::FAILED, message: message.to_string() }
    }

    fn misuse(message: impl ToString) -> Self {
        Self { code: Self::MISUSE, message: message.to_string() }
    }

    fn unavailable(message: impl ToString) -> Self {
        Self { code: Self::UNAVAILABLE, message: message.to_string() }
    }

    fn bad_configuration(message: impl ToString) -> Self {
        Self { code: Self::BAD_CONFIGURATION, message: message.to_string() }
    }

    /// The beginning of the message of a failure before anything was sent.
    const BEFORE_AN_ACT: &'static str = "nothing was done: ";

    /// A failure before anything was sent, so nothing was done.
    fn nothing_done(self) -> Self {
        Self { message: format!("{}{}", Self::BEFORE_AN_ACT, self.message), ..self }
    }

    /// A failure after the write: the write is done, but the wait for the fleet failed.
    fn after_write(self) -> Self {
        let message = format!("written, but it cannot be said that every replica knows it: {}", self.message);
        Self { code: Self::FAILED, message }
    }

    /// A failure whose answer was already printed; only the exit code is left to return.
    fn exit_code_only(code: u8) -> Self {
        Self { code, message: String::new() }
    }
}

impl From<app::Error> for CommandFailure {
    fn from(error: app::Error) -> Self {
        match error {
            app::Error::Configuration(message) => Self::bad_configuration(message),
            app::Error::Store(crate::store::Error::Unavailable(message)) => Self::unavailable(message),
            app::Error::Store(
                crate::store::Error::Missing(message)
                | crate::store::Error::NotAStore(message)
                | crate::store::Error::NewerVersion(message)
                | crate::store::Error::Corrupt(message)
                | crate::store::Error::Misconfigured(message),
            ) => Self::bad_configuration(message),
            other => Self::failed(other),
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  portcullis demo                                       watch it decide, and kill an agent
  portcullis serve --policies examples/policies/four-agents
  portcullis token keygen --out agent.jwk
  portcullis check --presentation p.json --tool crm/leads.read --args '{\"id\":7}'
  portcullis revoke agent spiffe://acme.example/agent/sales-assistant --reason \"leaked key\"
  portcullis revoke all --wait fleet                    … and return once every replica denies; then: portcullis fleet status
  portcullis approvals                                  what waits for a person; then: portcullis approve DIGEST

Exit codes: 0 ok, 1 failed, 2 done, but of a name that nothing bears, 3 denied, 4 needs approval, 64 misuse, 69 unavailable,
78 bad configuration";

/// The policy decision point for AI agents: verified delegation, microsecond decisions, a kill switch that is proved to work.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, after_help = EXAMPLES, propagate_version = true)]
struct Cli {
    /// Print one JSON document instead of text, for scripts
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Show it all in seconds: a server, the four agents, real calls over gRPC, a forged chain, a kill
    Demo(demo::DemoArgs),
    /// Run the policy decision point
    Serve(Box<serve::ServeArgs>),
    /// Ask for one decision
    Check(Box<check::CheckArgs>),
    /// Explain a decision, layer by layer, with the changes that would lift a denial
    Explain(Box<explain::ExplainArgs>),
    /// List the tools that a chain may call
    Tools(tools::ToolsArgs),
    /// Make and read keys, delegation tokens and proofs
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Check a policy folder, or put it in force
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// List, add and retire operators, besides those of the policy folder
    #[command(subcommand)]
    Operator(operator::OperatorCommand),
    /// Pull the kill switch: for an agent, a session, a token, a key, … or everything
    Revoke(revoke::RevokeArgs),
    /// Lift a suspension; what is dead stays dead
    Reinstate(revoke::ReinstateArgs),
    /// List what is revoked
    Revocations(revoke::RevocationListArgs),
    /// List the replicas of the store
    #[command(subcommand)]
    Fleet(fleet::FleetCommand),
    /// Back up a store, or adopt a restored one
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Approve one call that waits, once
    Approve(approvals::ApprovalAnswerArgs),
    /// Refuse a call that waits, or that is approved and not used yet
    Refuse(approvals::ApprovalAnswerArgs),
    /// List the calls that wait for an approval, or show one in full
    Approvals(approvals::ApprovalListArgs),
}

/// How an administrative command reaches the store and who signs it.
#[derive(Debug, Args)]
struct AdminArgs {
    /// The administration listener of a running server
    #[arg(long = "target", value_name = "URL", default_value = "http://127.0.0.1:7702", conflicts_with = "store", global = true)]
    url: String,
    /// Open the store itself, for when no server runs: `sqlite:PATH`, `postgres://…`, or `env:VARIABLE`, where a URL with a password
    /// belongs
    #[arg(long, value_name = "URL", global = true)]
    store: Option<StoreUrl>,
    /// With PostgreSQL, how its server is set up: `single`, `synchronous` or `asynchronous`
    #[arg(long, value_name = "WHICH", env = "PORTCULLIS_STORE_DURABILITY", global = true)]
    store_durability: Option<Durability>,
    /// The data folder, where the local operator's key lies
    #[arg(long, value_name = "DIR", env = "PORTCULLIS_DATA", default_value = "portcullis-data", global = true)]
    data: PathBuf,
    /// The operator's private key, a JWK file; twice for an act that needs two people [default: DATA/local.jwk]
    #[arg(long, value_name = "FILE", env = "PORTCULLIS_OPERATOR_KEY", global = true)]
    operator_key: Vec<PathBuf>,
}

/// Runs the command line and returns its exit code.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let asked = matches!(error.kind(), clap::error::ErrorKind::DisplayHelp | clap::error::ErrorKind::DisplayVersion);
            // Printing fails only if nobody reads the output. The exit code still tells the result.
            let _ = error.print();
            return if asked { ExitCode::SUCCESS } else { ExitCode::from(CommandFailure::MISUSE) };
        }
    };
    let output = CommandOutput::new(cli.json);
    match dispatch(cli.command, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                output.error(&failure.message);
            }
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(command: CliCommand, output: &CommandOutput) -> Result<(), CommandFailure> {
    match command {
        CliCommand::Serve(arguments) => return serve::run(*arguments),
        CliCommand::Demo(arguments) => return demo::run(arguments, output),
        CliCommand::Token(command) => return token::run(command, output),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CommandFailure::failed(format!("the runtime could not be started: {error}")))?;
    runtime.block_on(async {
        match command {
            CliCommand::Check(arguments) => check::run(*arguments, output).await,
            CliCommand::Explain(arguments) => explain::run(*arguments, output).await,
            CliCommand::Tools(arguments) => tools::run(arguments, output).await,
            CliCommand::Policy(command) => policy::run(command, output).await,
            CliCommand::Operator(command) => operator::run(command, output).await,
            CliCommand::Revoke(arguments) => revoke::revoke(arguments, output).await,
            CliCommand::Reinstate(arguments) => revoke::reinstate(arguments, output).await,
            CliCommand::Revocations(arguments) => revoke::list(arguments, output).await,
            CliCommand::Fleet(command) => fleet::run(command, output).await,
            CliCommand::Store(command) => store::run(command, output).await,
            CliCommand::Approve(arguments) => approvals::approve(arguments, output).await,
            CliCommand::Refuse(arguments) => approvals::refuse(arguments, output).await,
            CliCommand::Approvals(arguments) => approvals::list(arguments, output).await,
            CliCommand::Serve(_) | CliCommand::Demo(_) | CliCommand::Token(_) => Ok(()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Error as StoreError;

    /// The exit code says whether a start is worth repeating (69) or the configuration is wrong (78).
    #[test]
    fn a_start_that_fails_has_the_code_of_its_cause() {
        let check = |error: app::Error, code: u8, says: &str| {
            let failure = CommandFailure::from(error);
            assert_eq!((failure.code, failure.message.as_str()), (code, says));
        };
        check(StoreError::Unavailable("the store is busy".to_owned()).into(), 69, "the store is busy");
        check(StoreError::Missing("there is no store".to_owned()).into(), 78, "there is no store");
        check(StoreError::Corrupt("it does not hold together".to_owned()).into(), 78, "it does not hold together");
        check(app::Error::Configuration("`runtimes` is 0".to_owned()), 78, "`runtimes` is 0");
        check(app::Error::NoSnapshot("slow".to_owned()), 1, "the store gave no full snapshot in time: slow");
    }
}
