//! `portcullis serve`: runs the policy decision point until it is told to stop. It merges the settings file, the environment and
//! flags.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::{CommandFailure, output::CommandOutput};
use crate::app;
use crate::config::{Settings, StoreUrl};
use crate::store::postgres::Durability;

/// Run the policy decision point; with nothing configured: SQLite in ./portcullis-data, loopback ports 7700 to 7702
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// A YAML file of settings; the environment and flags win over it
    #[arg(long, value_name = "FILE", env = "PORTCULLIS_CONFIG")]
    config: Option<PathBuf>,
    /// The store: `sqlite:PATH`, `postgres://…`, or `env:VARIABLE` [default: sqlite:DATA/store.db]
    #[arg(long, value_name = "URL", env = "PORTCULLIS_STORE", hide_env_values = true)]
    store: Option<StoreUrl>,
    /// Create the SQLite store that `--store` names, or the folder that `--data` names, if it does not exist; the default is always created
    #[arg(long)]
    create: bool,
    /// With PostgreSQL, how its server is set up: `single`, `synchronous` or `asynchronous`
    #[arg(long, value_name = "WHICH", env = "PORTCULLIS_STORE_DURABILITY")]
    store_durability: Option<Durability>,
    /// A policy folder to put in force at start
    #[arg(long, value_name = "DIR", env = "PORTCULLIS_POLICIES")]
    policies: Option<PathBuf>,
    /// Keys, audit records, the default store [default: portcullis-data]
    #[arg(long, value_name = "DIR", env = "PORTCULLIS_DATA")]
    data: Option<PathBuf>,
    /// A second file for the replica's position, on another disk or machine: a start fails on an older store that was restored
    /// together with the data folder
    #[arg(long, value_name = "FILE", env = "PORTCULLIS_PLACE")]
    place: Option<PathBuf>,
    /// Decisions, gRPC [default: 127.0.0.1:7700]; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", env = "PORTCULLIS_LISTEN")]
    listen: Option<SocketAddr>,
    /// Health and metrics, HTTP [default: 127.0.0.1:7701]
    #[arg(long, value_name = "HOST:PORT", env = "PORTCULLIS_HTTP_LISTEN")]
    http_listen: Option<SocketAddr>,
    /// Administration, gRPC [default: 127.0.0.1:7702]
    #[arg(long, value_name = "HOST:PORT", env = "PORTCULLIS_ADMIN_LISTEN")]
    admin_listen: Option<SocketAddr>,
    /// An audience that callers may claim; may be repeated [default: a loopback caller any audience of an issuer document]
    #[arg(long, value_name = "URI", env = "PORTCULLIS_AUDIENCE", value_delimiter = ' ')]
    audience: Vec<String>,
    /// The name of this replica in records
    #[arg(long, value_name = "NAME", env = "PORTCULLIS_NODE")]
    node: Option<String>,
    /// Where traces and metrics go (OTLP over gRPC); off unless given
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// What is logged, as in `info,portcullis=debug` [default: info]
    #[arg(long, value_name = "FILTER", env = "PORTCULLIS_LOG")]
    log: Option<String>,
    /// Logs as JSON lines
    #[arg(long)]
    log_json: bool,
    /// Also serve the call that does nothing, the baseline of load tests
    #[arg(long, hide = true)]
    noop: bool,
}

pub(super) fn run(arguments: ServeArgs) -> Result<(), CommandFailure> {
    let settings = settings(arguments)?;
    app::serve(settings, |ready| CommandOutput::new(false).raw(ready)).map_err(CommandFailure::from)
}

fn settings(arguments: ServeArgs) -> Result<Settings, CommandFailure> {
    let mut settings = match &arguments.config {
        Some(path) => Settings::from_file(path).map_err(CommandFailure::bad_configuration)?,
        None => Settings::default(),
    };
    settings.store = arguments.store.or(settings.store);
    settings.create = arguments.create;
    settings.store_durability = arguments.store_durability.or(settings.store_durability);
    settings.policies = arguments.policies.or(settings.policies);
    settings.place = arguments.place.or(settings.place);
    settings.data = arguments.data.unwrap_or(settings.data);
    settings.listen = arguments.listen.unwrap_or(settings.listen);
    settings.http_listen = arguments.http_listen.unwrap_or(settings.http_listen);
    settings.admin_listen = arguments.admin_listen.unwrap_or(settings.admin_listen);
    settings.node = arguments.node.unwrap_or(settings.node);
    settings.otlp_endpoint = arguments.otlp_endpoint.filter(|url| !url.is_empty()).or(settings.otlp_endpoint);
    settings.log = arguments.log.unwrap_or(settings.log);
    settings.log_json |= arguments.log_json;
    settings.noop = arguments.noop;
    if !arguments.audience.is_empty() {
        settings.audiences = arguments.audience;
    }
    Ok(settings)
}
