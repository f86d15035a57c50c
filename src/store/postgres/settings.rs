//! The settings of a PostgreSQL store: its URL, and the durability that its operator claims. Both are parsed before anything is
//! opened.
//!
//! A URL may contain a password. No error repeats a part of the URL, and only [`Settings::redacted_url`] may be shown. Look next
//! at `super::connection`.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

/// Limit of the hosts in one URL.
const HOSTS_MAX: usize = 8;
const URL_BYTES_MAX: usize = 4096;
/// The interval of keepalive probes, and the number of probes without an answer after which the connection counts as broken.
const KEEPALIVE: Duration = Duration::from_secs(1);
const KEEPALIVES: u32 = 3;

/// The fate of an acknowledged write when a server is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// One server: an acknowledged write is on its disk. If the disk is lost, the history is lost.
    Single,
    /// An acknowledged write is also on a standby's disk: a failover to that standby loses nothing.
    Synchronous,
    /// Standbys follow later: a failover may lose acknowledged writes, revocations among them.
    Asynchronous,
}

impl Durability {
    /// The name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Synchronous => "synchronous",
            Self::Asynchronous => "asynchronous",
        }
    }
}

impl FromStr for Durability {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Single, Self::Synchronous, Self::Asynchronous]
            .into_iter()
            .find(|one| one.as_str() == name)
            .ok_or_else(|| format!("`{name}` is not `single`, `synchronous` or `asynchronous`"))
    }
}

/// How the connection to the server is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Without TLS: for a socket file or a loopback address.
    Disabled,
    /// TLS; the server's certificate must come from an authority in the file.
    VerifyCa(PathBuf),
    /// TLS; the certificate must also be valid for the host in the URL.
    VerifyFull(PathBuf),
}

/// The settings with which a store is opened.
#[derive(Clone)]
pub struct Settings {
    /// One configuration per host, in the order of the URL.
    pub(super) hosts: Vec<Config>,
    pub(super) tls: TlsMode,
    pub(super) notify: bool,
    pub(super) durability: Durability,
    redacted_url: String,
}

/// The parameters that a URL may have, for error messages.
const KNOWN_PARAMETERS: &str = "`host`, `port`, `sslmode`, `sslrootcert`, `notify`, `application_name`";

impl Settings {
    /// Parses `postgres://USER[:PASSWORD]@HOST[:PORT][,HOST…]/DATABASE[?KEY=VALUE&…]`.
    ///
    /// | key | value |
    /// |---|---|
    /// | `sslmode` | `disable`, `require` or `verify-full`; see below |
    /// | `sslrootcert` | a file of PEM certificates; required by `require` and `verify-full` |
    /// | `notify` | `on`, the default; `off` behind a pooler that shares connections between transactions |
    /// | `host`, `port` | the folder of a socket file, and its port |
    /// | `application_name` | the name of this program in the server's views |
    ///
    /// `sslmode=disable` is the default on a socket or loopback address, and is refused elsewhere. `require` uses TLS and demands
    /// a certificate from an authority in `sslrootcert`. `verify-full` also demands that the certificate is valid for the host in
    /// the URL.
    ///
    /// # Errors
    /// One line that says what is wrong. It contains no part of the URL, which may be a password.
    pub fn parse(url: &str, durability: Durability) -> Result<Self, String> {
        if url.len() > URL_BYTES_MAX {
            return Err(format!("the store's URL has {} bytes: at most {URL_BYTES_MAX}", url.len()));
        }
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://")).ok_or("not a PostgreSQL URL")?;
        let (location, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = location.split_once('/').unwrap_or((location, ""));
        // INVARIANT: the shown URL holds no password. An unencoded `@` or `/` in a password would move a part of the password
        // into the host or the database, so such a URL is rejected.
        if authority.matches('@').count() > 1 || database.contains(['@', '/']) {
            return Err(
                "the store's URL has an `@` or `/` too many: write `%40` and `%2F` where they belong to a name or password"
                    .into(),
            );
        }
        let mut options = UrlOptions::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            options.set(pair)?;
        }
        let unreadable =
            |_| "the store's URL cannot be read: postgres://USER:PASSWORD@HOST:PORT/DATABASE, with `%XX` for special characters";
        let mut config: Config = format!("postgres://{location}").parse().map_err(unreadable)?;
        config.application_name(options.application_name.as_deref().unwrap_or("portcullis"));
        if let Some(folder) = &options.host {
            config.host(folder);
        }
        let hosts = config_per_host(&config, options.port)?;
        let tls = options.tls(&hosts)?;
        let redacted_url = redacted_url(&hosts);
        let mut settings = Self { hosts, tls, notify: options.notify, durability, redacted_url };
        let several = settings.hosts.len() > 1;
        for host in &mut settings.hosts {
            host.ssl_mode(if settings.tls == TlsMode::Disabled { SslMode::Disable } else { SslMode::Require });
            if several {
                host.target_session_attrs(TargetSessionAttrs::ReadWrite);
            }
        }
        Ok(settings)
    }

    /// The URL without its password and options.
    pub fn redacted_url(&self) -> &str {
        &self.redacted_url
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("redacted_url", &self.redacted_url)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}

/// The parameters of a URL.
#[derive(Default)]
struct UrlOptions {
    host: Option<String>,
    port: Option<u16>,
    sslmode: Option<String>,
    sslrootcert: Option<PathBuf>,
    application_name: Option<String>,
    notify_off: bool,
    notify: bool,
}

impl UrlOptions {
    /// Sets one parameter from `KEY=VALUE`.
    fn set(&mut self, pair: &str) -> Result<(), String> {
        let unknown = || format!("a parameter of the store's URL is unknown: {KNOWN_PARAMETERS} are known");
        let (key, value) = pair.split_once('=').ok_or_else(unknown)?;
        let value = percent_decode(value)?;
        match key {
            "host" if value.starts_with('/') => self.host = Some(value),
            "host" => return Err("`host` in the store's URL is not the folder of a socket: put a name before the `/`".into()),
            "port" => self.port = Some(value.parse().map_err(|_| "`port` in the store's URL is not a port")?),
            "sslmode" => self.sslmode = Some(value),
            "sslrootcert" => self.sslrootcert = Some(PathBuf::from(value)),
            "application_name" => self.application_name = Some(value),
            "notify" => {
                (self.notify, self.notify_off) = match value.as_str() {
                    "on" => (true, false),
                    "off" => (false, true),
                    _ => return Err("`notify` in the store's URL is not `on` or `off`".into()),
                }
            }
            _ => return Err(unknown()),
        }
        Ok(())
    }

    /// Decides how the connection is protected.
    fn tls(&mut self, hosts: &[Config]) -> Result<TlsMode, String> {
        self.notify = !self.notify_off;
        let near = hosts.iter().flat_map(Config::get_hosts).all(is_local);
        let authority = || {
            let missing = "`sslrootcert=FILE` must name the authority of the server's certificate, for without it anybody could answer as the server";
            self.sslrootcert.clone().ok_or(missing)
        };
        match self.sslmode.as_deref() {
            None | Some("disable") if near => Ok(TlsMode::Disabled),
            None | Some("disable") => {
                Err("the store's server is not on this machine, and the way to it is not encrypted: add `sslmode=verify-full&sslrootcert=FILE` to its URL".into())
            }
            Some("require") => Ok(TlsMode::VerifyCa(authority()?)),
            Some("verify-full") => Ok(TlsMode::VerifyFull(authority()?)),
            Some(_) => Err("`sslmode` in the store's URL is not `disable`, `require` or `verify-full`".into()),
        }
    }
}

/// Whether the host is a socket file or an address that never leaves the machine. A host name other than `localhost` is not,
/// because name resolution decides where it leads.
fn is_local(host: &Host) -> bool {
    match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => name == "localhost" || name.parse().is_ok_and(|address: IpAddr| address.is_loopback()),
    }
}

/// Makes one configuration per host, so that a host that hangs does not keep the next host from being tried.
fn config_per_host(config: &Config, port: Option<u16>) -> Result<Vec<Config>, String> {
    let (hosts, ports) = (config.get_hosts(), config.get_ports());
    if hosts.is_empty() || config.get_user().is_none() || config.get_dbname().is_none() {
        return Err("the store's URL must name user, host and database: postgres://USER@HOST/DATABASE".into());
    }
    if hosts.len() > HOSTS_MAX {
        return Err(format!("the store's URL names {} hosts: at most {HOSTS_MAX}", hosts.len()));
    }
    let mut each = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let mut one = Config::new();
        match host {
            Host::Tcp(name) => one.host(name),
            Host::Unix(folder) => one.host_path(folder),
        };
        one.port(port.or(ports.get(index).copied()).or(ports.first().copied()).unwrap_or(5432));
        config.get_user().map(|user| one.user(user));
        config.get_password().map(|password| one.password(password));
        config.get_dbname().map(|name| one.dbname(name));
        config.get_application_name().map(|name| one.application_name(name));
        // A connection that only listens notices a broken network only through keepalive probes.
        one.keepalives_idle(KEEPALIVE).keepalives_interval(KEEPALIVE).keepalives_retries(KEEPALIVES);
        one.tcp_user_timeout(KEEPALIVE * (KEEPALIVES + 1));
        each.push(one);
    }
    Ok(each)
}

/// The URL without its password and parameters.
fn redacted_url(hosts: &[Config]) -> String {
    let location = |config: &Config| {
        let port = config.get_ports().first().copied().unwrap_or(5432);
        config.get_hosts().first().map_or_else(String::new, |host| match host {
            Host::Tcp(name) if name.contains(':') => format!("[{name}]:{port}"),
            Host::Tcp(name) => format!("{name}:{port}"),
            Host::Unix(folder) => format!("{}:{port}", folder.display()),
        })
    };
    let locations: Vec<String> = hosts.iter().map(location).collect();
    let database = hosts.first().and_then(Config::get_dbname).unwrap_or_default();
    format!("postgres://{}/{database}", locations.join(","))
}

/// Decodes `%XX` in a value.
fn percent_decode(value: &str) -> Result<String, String> {
    let wrong = || "a value in the store's URL holds a `%` that is no `%XX`".to_owned();
    let mut bytes = Vec::new();
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16)).ok_or_else(wrong);
        bytes.push(if byte == b'%' { u8::try_from(digit()? * 16 + digit()?).map_err(|_| wrong())? } else { byte });
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANARY: &str = "s3cr3t-canary";

    /// Expects the shown URL, the protection, and whether notifications are on; or a part of the error.
    fn check(url: &str, expected: Result<(&str, TlsMode, bool), &str>) {
        let url = url.replace("PW", CANARY);
        let read = Settings::parse(&url, Durability::Single);
        let said = format!("{read:?}");
        assert!(!said.contains(CANARY), "{said}");
        match (read, expected) {
            (Ok(read), Ok((store_url, tls, notify))) => {
                assert_eq!((read.redacted_url(), &read.tls, read.notify), (store_url, &tls, notify), "{url}");
            }
            (Err(error), Err(part)) => assert!(error.contains(part) && !error.contains('\n'), "{url}: {error}"),
            (read, _) => panic!("{url}: {read:?}"),
        }
    }

    #[test]
    fn urls() {
        let full = || TlsMode::VerifyFull("/ca.pem".into());
        check("postgres://u:PW@127.0.0.1/d", Ok(("postgres://127.0.0.1:5432/d", TlsMode::Disabled, true)));
        check("postgresql://u:PW@localhost:6432/d?notify=off", Ok(("postgres://localhost:6432/d", TlsMode::Disabled, false)));
        check("postgres://u:PW@[::1]:1/d", Ok(("postgres://[::1]:1/d", TlsMode::Disabled, true)));
        check("postgres://u:PW@/d?host=/run/postgresql", Ok(("postgres:///run/postgresql:5432/d", TlsMode::Disabled, true)));
        check("postgres://u:PW@%2Frun%2Fpg/d?port=7", Ok(("postgres:///run/pg:7/d", TlsMode::Disabled, true)));
        let tls = "sslmode=verify-full&sslrootcert=/ca.pem";
        check(&format!("postgres://u:PW@db/d?{tls}"), Ok(("postgres://db:5432/d", full(), true)));
        check(&format!("postgres://u:PW@a:1,b:2/d?{tls}&notify=on"), Ok(("postgres://a:1,b:2/d", full(), true)));
        check(
            "postgres://u:PW@db/d?sslmode=require&sslrootcert=%2Fca.pem",
            Ok(("postgres://db:5432/d", TlsMode::VerifyCa("/ca.pem".into()), true)),
        );
    }

    #[test]
    fn urls_that_are_refused() {
        // Connections that are not encrypted, or that may lead to the wrong server.
        check("postgres://u:PW@db/d", Err("not on this machine"));
        check("postgres://u:PW@10.0.0.1/d?sslmode=disable", Err("not on this machine"));
        check("postgres://u:PW@127.0.0.1,db/d", Err("not on this machine"));
        check("postgres://u:PW@db/d?sslmode=verify-full", Err("`sslrootcert=FILE` must name"));
        check("postgres://u:PW@db/d?sslmode=prefer", Err("`sslmode`"));
        check("postgres://u:PW@db/d?sslmode=allow", Err("`sslmode`"));
        // Passwords that are not encoded: no part of them may be shown.
        check("postgres://u:a@PW@db/d", Err("`@`"));
        check("postgres://u:1/PW@db/d", Err("`@`"));
        check("postgres://u:1?PW@127.0.0.1/d", Err("unknown"));
        check("postgres://u:1#PW@127.0.0.1/d/PW", Err("`/`"));
        check("postgres://u:x/PW", Err("cannot be read"));
        check("postgres://127.0.0.1/d?password=PW", Err("unknown"));
        check("postgres://u@127.0.0.1/d?PW", Err("unknown"));
        check("postgres://u@127.0.0.1/d?PW=1", Err("unknown"));
        check("postgres://u@127.0.0.1/d?host=PW", Err("`host`"));
        check("postgres://u@127.0.0.1/d?port=PW", Err("`port`"));
        check("postgres://u@127.0.0.1/d?notify=PW", Err("`notify`"));
        check("postgres://u@127.0.0.1/d?notify=%zzPW", Err("`%XX`"));
        // Incomplete or too long.
        check("mysql://u:PW@127.0.0.1/d", Err("not a PostgreSQL URL"));
        check("postgres://127.0.0.1/d", Err("must name user"));
        check("postgres://u:PW@127.0.0.1/", Err("must name user"));
        check("postgres://u:PW@127.0.0.1", Err("must name user"));
        check(&format!("postgres://u:PW@127.0.0.1{}/d", ",127.0.0.1".repeat(8)), Err("9 hosts"));
        check(&format!("postgres://u:{}@127.0.0.1/d", "x".repeat(4096)), Err("at most 4096"));
    }
}
