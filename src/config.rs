//! The settings of `serve`: from a file, then the environment, then flags. A later source overrides an earlier one; an unknown key
//! is an error.
//!
//! Look next at `cli/serve.rs`, which reads the flags, and at `app.rs`, which uses the settings.

mod limits;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::model::duration;
use crate::policy::yaml::{ConfigEntry, parse_config};
use crate::server;
use crate::store::postgres::{self, Durability};

/// The default data folder of the command line, the server and the demo.
pub const DATA_DIR_DEFAULT: &str = "portcullis-data";

/// All settings of `serve`.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `sqlite:PATH`, `postgres://…` or `env:VARIABLE`; `None` means `sqlite:DATA/store.db`.
    pub store: Option<StoreUrl>,
    /// Whether to create a named store, or a named data folder with a store, that does not exist. The default store is always created.
    pub create: bool,
    /// How PostgreSQL is configured to keep acknowledged writes. It is required with PostgreSQL.
    pub store_durability: Option<Durability>,
    /// Folder of keys, audit records and the default store.
    pub data: PathBuf,
    /// A second file for the replica's position, outside of anything that is restored together with the data folder.
    pub place: Option<PathBuf>,
    /// A policy folder to apply at the start.
    pub policies: Option<PathBuf>,
    /// Address of the decisions listener.
    pub listen: SocketAddr,
    /// Address for health and metrics.
    pub http_listen: SocketAddr,
    /// Address of the administration listener.
    pub admin_listen: SocketAddr,
    /// The audiences that callers may claim. If empty, a loopback caller may claim any audience of an issuer document.
    pub audiences: Vec<String>,
    /// Whether a root must carry `aud`.
    pub require_chain_audience: bool,
    /// Whether a proof must carry `aat_aud`.
    pub require_proof_audience: bool,
    /// Serving runtimes, one thread each.
    pub runtimes: usize,
    /// The name of this replica in records.
    pub node: String,
    /// Longest time for in-flight calls to end at shutdown.
    pub drain_timeout_ms: u64,
    /// The settings of the listeners, of which the section `limits` sets some. Addresses and the drain have keys of their own.
    pub limits: server::Settings,
    /// Where OTLP is sent; `None` means nowhere.
    pub otlp_endpoint: Option<String>,
    /// The share of permits that is traced, 0 to 1. A caller's decision to trace is always honored.
    pub trace_ratio: f64,
    /// The log filter, as in `info,portcullis=debug`.
    pub log: String,
    /// Whether logs are JSON lines.
    pub log_json: bool,
    /// Whether this process sets up logs at all.
    pub logs: bool,
    /// Whether to serve the call that does nothing, the baseline of load tests.
    pub noop: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            store: None,
            create: false,
            store_durability: None,
            data: PathBuf::from(DATA_DIR_DEFAULT),
            place: None,
            policies: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 7700)),
            http_listen: SocketAddr::from(([127, 0, 0, 1], 7701)),
            admin_listen: SocketAddr::from(([127, 0, 0, 1], 7702)),
            audiences: Vec::new(),
            require_chain_audience: true,
            require_proof_audience: true,
            runtimes: 2,
            node: "local".to_owned(),
            drain_timeout_ms: 10_000,
            limits: server::Settings::default(),
            otlp_endpoint: None,
            trace_ratio: 0.01,
            log: "info".to_owned(),
            log_json: false,
            logs: true,
            noop: false,
        }
    }
}

/// Why settings cannot be used: one line for each problem, with file, line and column if there is a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

const CONFIG_KEYS: &[&str] = &[
    "store",
    "store_durability",
    "data",
    "place",
    "policies",
    "listen",
    "http_listen",
    "admin_listen",
    "audience",
    "require_chain_audience",
    "require_proof_audience",
    "runtimes",
    "node",
    "drain_timeout",
    "otlp_endpoint",
    "trace_ratio",
    "log",
    "log_json",
];

/// Most serving runtimes.
const RUNTIMES_MAX: usize = 64;
/// Largest settings file, in bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

impl Settings {
    /// Reads a YAML file on top of the defaults.
    ///
    /// # Errors
    /// Every problem of the file, one line each.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let display_path = path.display().to_string();
        let cannot = |error: &dyn std::fmt::Display| Error(format!("{display_path}: cannot be read: {error}"));
        let size = std::fs::metadata(path).map_err(|error| cannot(&error))?.len();
        if size > FILE_BYTES_MAX {
            return Err(Error(format!("{display_path}: {size} bytes: at most {FILE_BYTES_MAX}")));
        }
        Self::from_yaml(&std::fs::read(path).map_err(|error| cannot(&error))?, &display_path)
    }

    fn from_yaml(content: &[u8], path: &str) -> Result<Self, Error> {
        let members = parse_config(content, path, &[CONFIG_KEYS, limits::KEYS].concat())
            .map_err(|diagnostics| Error(diagnostics.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))?;
        let mut settings = Self::default();
        let mut wrong = Vec::new();
        for member in &members {
            if let Err(problem) = settings.set_entry(member) {
                wrong.push(format!("{path}:{}:{}: error: {problem}", member.at.line, member.at.column));
            }
        }
        if wrong.is_empty() { Ok(settings) } else { Err(Error(wrong.join("\n"))) }
    }

    fn set_entry(&mut self, member: &ConfigEntry) -> Result<(), String> {
        let name = member.name.as_str();
        if name == "audience" {
            self.audiences.clone_from(&member.values);
            return Ok(());
        }
        let [value] = member.values.as_slice() else { return Err(format!("`{name}` takes one value")) };
        if member.is_list {
            return Err(format!("`{name}` takes one value, not a list"));
        }
        match name {
            "store" => self.store = Some(StoreUrl::from(value.clone())),
            "store_durability" => {
                self.store_durability = Some(value.parse().map_err(|error| format!("`store_durability`: {error}"))?);
            }
            "data" => self.data = PathBuf::from(value),
            "place" => self.place = Some(PathBuf::from(value)),
            "policies" => self.policies = Some(PathBuf::from(value)),
            "listen" => self.listen = parse_address(name, value)?,
            "http_listen" => self.http_listen = parse_address(name, value)?,
            "admin_listen" => self.admin_listen = parse_address(name, value)?,
            "require_chain_audience" => self.require_chain_audience = parse_bool(name, value)?,
            "require_proof_audience" => self.require_proof_audience = parse_bool(name, value)?,
            "runtimes" => self.runtimes = parse_runtimes(value)?,
            "node" => self.node.clone_from(value),
            "drain_timeout" => self.drain_timeout_ms = duration::parse_ms(value)?,
            "otlp_endpoint" => self.otlp_endpoint = Some(value.clone()),
            "trace_ratio" => self.trace_ratio = parse_ratio(value)?,
            "log" => self.log.clone_from(value),
            "log_json" => self.log_json = parse_bool(name, value)?,
            _ => limits::set_limit(&mut self.limits, name, value)?,
        }
        Ok(())
    }

    /// Whether a missing store is created. A named store, and the store of a named data folder that does not exist, is not, because
    /// the name may be mistyped.
    pub fn may_create_store(&self) -> bool {
        let is_named = |data: &Path| data != Path::new(DATA_DIR_DEFAULT);
        self.create || self.store_data_dir().is_some_and(|data| !is_named(data) || data.is_dir())
    }

    /// The data folder, if it contains the store; `None` if a URL names a store elsewhere.
    pub fn store_data_dir(&self) -> Option<&Path> {
        self.store.is_none().then_some(self.data.as_path())
    }

    /// The store, and how it is opened.
    ///
    /// # Errors
    /// See [`StoreLocation::new`].
    pub fn store(&self) -> Result<StoreLocation, Error> {
        match &self.store {
            Some(url) => StoreLocation::new(url, self.store_durability),
            None => {
                StoreLocation::new(&StoreUrl(format!("sqlite:{}", self.data.join("store.db").display())), self.store_durability)
            }
        }
    }
}

/// The URL of a store. It may hold a password, so it is never shown; [`StoreLocation`] shows the safe part of it.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreUrl(String);

impl From<String> for StoreUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl StoreUrl {
    /// Whether it names a PostgreSQL database, also behind `env:`. The rest of the URL may still be wrong.
    pub fn is_postgres(&self) -> bool {
        let held = self.0.strip_prefix("env:").and_then(|name| std::env::var(name).ok());
        let url = held.as_deref().unwrap_or(&self.0);
        url.starts_with("postgres://") || url.starts_with("postgresql://")
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreUrl(_)")
    }
}

/// Where a store is, and how it is opened.
#[derive(Clone, Debug)]
pub enum StoreLocation {
    /// A file.
    Sqlite(PathBuf),
    /// A database.
    Postgres(Box<postgres::Settings>),
}

impl StoreLocation {
    /// Reads `sqlite:PATH`, `postgres://…`, or `env:VARIABLE`, which names an environment variable with one of these.
    ///
    /// # Errors
    /// One line, without any part of a URL that might be a password.
    pub fn new(url: &StoreUrl, durability: Option<Durability>) -> Result<Self, Error> {
        let held;
        let url = match url.0.strip_prefix("env:") {
            Some(name) => {
                let unset =
                    |_| Error(format!("the store is to be in the environment variable `{name}`, which is not set: set it"));
                held = std::env::var(name).map_err(unset)?;
                held.as_str()
            }
            None => url.0.as_str(),
        };
        if let Some(path) = url.strip_prefix("sqlite:").filter(|path| !path.is_empty()) {
            if durability.is_some_and(|claimed| claimed != Durability::Single) {
                return Err(Error("`store_durability` of a SQLite store is `single`: leave it out".to_owned()));
            }
            return Ok(Self::Sqlite(PathBuf::from(path.strip_prefix("//").unwrap_or(path))));
        }
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(Error(
                "the store is neither `sqlite:PATH` nor `postgres://USER@HOST/DATABASE`: name one of these".to_owned(),
            ));
        }
        let missing = || {
            Error(
                "`store_durability` (`--store-durability`) is needed with PostgreSQL: `single`, `synchronous` or `asynchronous`, whichever \
                 the server is set up for; docs/OPERATIONS.md says what each means"
                    .to_owned(),
            )
        };
        let settings = postgres::Settings::parse(url, durability.ok_or_else(missing)?).map_err(Error)?;
        Ok(Self::Postgres(Box::new(settings)))
    }
}

impl StoreLocation {
    /// The URL with an absolute path and without a password.
    pub fn absolute(&self) -> String {
        match self {
            Self::Sqlite(path) => Self::Sqlite(std::path::absolute(path).unwrap_or_else(|_| path.clone())).to_string(),
            Self::Postgres(_) => self.to_string(),
        }
    }
}

impl fmt::Display for StoreLocation {
    /// The URL without a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(settings) => f.write_str(settings.redacted_url()),
        }
    }
}

fn parse_address(name: &str, value: &str) -> Result<SocketAddr, String> {
    value.parse().map_err(|_| format!("`{name}`: `{value}` is not HOST:PORT such as 127.0.0.1:7700"))
}

fn parse_bool(name: &str, value: &str) -> Result<bool, String> {
    value.parse().map_err(|_| format!("`{name}`: `{value}` is not true or false"))
}

fn parse_runtimes(value: &str) -> Result<usize, String> {
    let number = value.parse().ok().filter(|number| (1..=RUNTIMES_MAX).contains(number));
    number.ok_or_else(|| format!("`runtimes`: `{value}` is not a number from 1 to {RUNTIMES_MAX}"))
}

fn parse_ratio(value: &str) -> Result<f64, String> {
    let number = value.parse().ok().filter(|number| (0.0..=1.0).contains(number));
    number.ok_or_else(|| format!("`trace_ratio`: `{value}` is not a number from 0 to 1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str, expected: Result<Settings, &str>) {
        let read = Settings::from_yaml(yaml.as_bytes(), "p.yaml").map_err(|error| error.to_string());
        assert_eq!(read, expected.map_err(str::to_owned), "{yaml}");
    }

    #[test]
    fn files_of_settings() {
        check("", Ok(Settings::default()));
        check(
            "listen: 127.0.0.1:0\naudience: [https://a, https://b]\ndrain_timeout: 3s\nruntimes: 1\n",
            Ok(Settings {
                listen: SocketAddr::from(([127, 0, 0, 1], 0)),
                audiences: vec!["https://a".to_owned(), "https://b".to_owned()],
                drain_timeout_ms: 3000,
                runtimes: 1,
                ..Settings::default()
            }),
        );
        check("node: a\nlissten: x\n", Err("p.yaml:2:1: error: unknown key `lissten`: did you mean `listen`?"));
        check("listen: nowhere", Err("p.yaml:1:1: error: `listen`: `nowhere` is not HOST:PORT such as 127.0.0.1:7700"));
        check("runtimes: 0", Err("p.yaml:1:1: error: `runtimes`: `0` is not a number from 1 to 64"));
        check(
            "store_durability: eventual",
            Err("p.yaml:1:1: error: `store_durability`: `eventual` is not `single`, `synchronous` or `asynchronous`"),
        );
        check(
            "limits:\n  connections_max: 64\n  idle_timeout: 90s\n",
            Ok(Settings {
                limits: server::Settings { connections_max: 64, idle_timeout_ms: 90_000, ..server::Settings::default() },
                ..Settings::default()
            }),
        );
        check(
            "limits:\n  connections_max: 0\n",
            Err("p.yaml:2:3: error: `limits.connections_max`: `0` is not from 1 to 1000000"),
        );
        check(
            "limits: {conections_max: 1}",
            Err("p.yaml:1:10: error: unknown key `limits.conections_max`: did you mean `connections_max`?"),
        );
        check("limits.connections_max: 1", Err("p.yaml:1:1: error: unknown key `limits.connections_max`"));
        check("connections_max: 1", Err("p.yaml:1:1: error: unknown key `connections_max`"));
        check("limits: 4096", Err("p.yaml:1:1: error: `limits` must be a mapping of settings"));
        check("runtimes: [1, 2]", Err("p.yaml:1:1: error: `runtimes` takes one value"));
        check("trace_ratio: 2", Err("p.yaml:1:1: error: `trace_ratio`: `2` is not a number from 0 to 1"));
        check("listen: {a: 1}", Err("p.yaml:1:1: error: `listen` must be a value or a list of values"));
    }

    /// A mistyped folder must not begin an empty store, in which nothing is revoked.
    #[test]
    fn a_store_is_made_where_no_name_can_be_mistyped() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        let check = |data: &Path, store: Option<&str>, create: bool, expected: bool| {
            let store = store.map(|url| StoreUrl::from(url.to_owned()));
            let settings = Settings { data: data.to_owned(), store, create, ..Settings::default() };
            assert_eq!(settings.may_create_store(), expected, "{data:?} {create}");
        };
        check(Path::new(DATA_DIR_DEFAULT), None, false, true);
        check(folder.path(), None, false, true);
        check(&missing, None, false, false);
        check(&missing, None, true, true);
        check(folder.path(), Some("sqlite:s.db"), false, false);
        check(folder.path(), Some("sqlite:s.db"), true, true);
    }

    #[test]
    fn stores() {
        const CANARY: &str = "s3cr3t-canary";
        assert_eq!(Settings::default().store().unwrap().to_string(), "sqlite:portcullis-data/store.db");
        let check = |url: &str, durability: Option<Durability>, expected: Result<&str, &str>| {
            let settings = Settings { store: Some(url.to_owned().into()), store_durability: durability, ..Settings::default() };
            let store = settings.store();
            let said = format!("{settings:?} {store:?}");
            assert!(!said.contains(CANARY), "{said}");
            match (store, expected) {
                (Ok(store), Ok(shown)) => assert_eq!(store.to_string(), shown),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (store, _) => panic!("{url}: {store:?}"),
            }
        };
        check("sqlite:/tmp/x.db", None, Ok("sqlite:/tmp/x.db"));
        check("sqlite:///tmp/x.db", Some(Durability::Single), Ok("sqlite:/tmp/x.db"));
        check("sqlite:/tmp/x.db", Some(Durability::Synchronous), Err("leave it out"));
        for bad in ["sqlite:", "", "/tmp/x.db", "mysql://u:s3cr3t-canary@h/d", "postgre://u:s3cr3t-canary@h/d"] {
            check(bad, None, Err("neither `sqlite:PATH` nor `postgres:"));
        }
        let url = "postgres://u:s3cr3t-canary@127.0.0.1/d";
        check(url, Some(Durability::Asynchronous), Ok("postgres://127.0.0.1:5432/d"));
        check(url, None, Err("`store_durability` (`--store-durability`) is needed"));
        check("postgres://u:s3cr3t-canary@h/d", Some(Durability::Single), Err("not encrypted"));
        check("env:PORTCULLIS_NO_SUCH_VARIABLE", None, Err("which is not set"));
        check("env:PATH", None, Err("neither"));
    }
}
