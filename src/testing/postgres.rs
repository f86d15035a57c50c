//! A real PostgreSQL server for tests: one for each test process, in a temporary folder. It ends with the process, however that
//! ends.
//!
//! It needs the server's programs (Debian: `postgresql`, `postgresql-15`) but no running server. A test fails without the programs,
//! and says so. This file stands alone, so that the integration tests can include it by its path. Look next at
//! `store/postgres/tests.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a harness of tests fails by panicking")]
#![allow(dead_code, unreachable_pub, reason = "not everyone who takes it in uses all of it, and some take it in privately")]

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};

/// Longest time for a server to start or stop.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The superuser of every server made here.
const SUPERUSER: &str = "boss";
const PROGRAMS: [&str; 6] = ["initdb", "postgres", "pg_ctl", "psql", "pg_isready", "pg_basebackup"];
/// The Debian package with all of these programs.
const POSTGRESQL: &str = "postgresql";
const MISSING: &str = "this test needs the programs of a PostgreSQL server (initdb, postgres, pg_basebackup) and found none: install Debian's package \
    `postgresql` (or `postgresql-15`), as ./test.sh does; nothing needs to run";

/// Stops the server and removes its folder once standard input closes. That happens when the test process ends, for any reason.
const WATCHED: &str = r#"
folder=$1; shift
"$@" >"$folder/server.log" 2>&1 &
server=$!
echo "$server" >"$folder/server.pid"
cat >/dev/null
# One that was started again is another process.
for one in "$server" $(head -n 1 "$folder/data/postmaster.pid" 2>/dev/null); do
  kill -CONT "$one" 2>/dev/null
  kill -QUIT "$one" 2>/dev/null
done
wait "$server"
rm -rf "$folder"
"#;

/// A PostgreSQL server in a folder of its own.
pub struct PostgresServer {
    folder: PathBuf,
    port: u16,
    bin: PathBuf,
    watch: Child,
    databases: AtomicU64,
}

/// The server that the tests of this process share. A test that breaks its server starts one of its own.
pub fn shared() -> &'static PostgresServer {
    static SERVER: OnceLock<PostgresServer> = OnceLock::new();
    SERVER.get_or_init(|| PostgresServer::start(&[]))
}

impl PostgresServer {
    /// Creates a server with settings such as `synchronous_standby_names=x`, and starts it.
    pub fn start(settings: &[&str]) -> Self {
        Self::start_on(settings, |bin, data| {
            let mut command = command_as_server_user(&bin.join("initdb"));
            command.args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--no-locale", "--username", SUPERUSER, "--pgdata"]);
            output_of(command.arg(data).current_dir("/"), POSTGRESQL)
        })
    }

    /// Starts a server on a copy of a stopped server's data.
    pub fn start_copy(of: &PostgresServer, settings: &[&str]) -> Self {
        let from = of.folder.join("data/.");
        Self::start_on(settings, |_, data| {
            let copied =
                output_of(command_as_server_user(Path::new("cp")).arg("-a").arg(from).arg(data).current_dir("/"), "coreutils");
            let _ = std::fs::remove_file(data.join("postmaster.pid"));
            copied
        })
    }

    /// Starts a standby with this name. It streams from the server on a port of the loopback address.
    pub fn standby(name: &str, port: u16) -> Self {
        // The standby retries soon after its primary ends the stream, as a promoted primary does. The default is five seconds.
        Self::start_on(&["wal_retrieve_retry_interval=100ms"], |bin, data| {
            let mut command = command_as_server_user(&bin.join("pg_basebackup"));
            command.args(["--no-sync", "--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf", "--no-password"]);
            command.arg("--dbname").arg(format!("host=127.0.0.1 port={port} user={SUPERUSER} application_name={name}"));
            output_of(command.arg("--pgdata").arg(data).current_dir("/"), POSTGRESQL)
        })
    }

    /// Promotes a standby, and waits until it accepts writes.
    pub fn promote(&self) {
        self.control(&["promote", "-w"]);
    }

    /// Makes a standby stream from the server on a port of the loopback address.
    pub fn follow(&self, name: &str, port: u16) {
        self.change_setting(&format!("primary_conninfo = 'host=127.0.0.1 port={port} user={SUPERUSER} application_name={name}'"));
    }

    /// The bytes of its primary's log that a standby has written.
    pub fn received_log_bytes(&self) -> u64 {
        self.sql("postgres", "SELECT (pg_last_wal_receive_lsn() - '0/0'::pg_lsn)::int8").parse().unwrap()
    }

    fn start_on(settings: &[&str], make: impl FnOnce(&Path, &Path) -> Output) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let bin = binary_folder();
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        // The path is short, because the path of a socket has at most 107 bytes.
        let folder = PathBuf::from(format!("/tmp/pg-test-{}-{number}", std::process::id()));
        // The folder may be left from an earlier process with this number that was killed together with its watching shell.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        let data = folder.join("data");
        std::fs::create_dir(&data).unwrap();
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
        change_owner(&data);
        change_owner(&folder);
        let made = make(&bin, &data);
        assert!(made.status.success(), "no data folder was made: {}", String::from_utf8_lossy(&made.stderr));
        let mut attempt = 0;
        loop {
            attempt += 1;
            let port = free_port();
            let mut settings: Vec<String> = settings.iter().map(|one| (*one).to_owned()).collect();
            settings.extend(["listen_addresses=127.0.0.1".to_owned(), "max_connections=200".to_owned()]);
            settings.extend([format!("port={port}"), format!("unix_socket_directories={}", folder.display())]);
            let watch = start_watched(&folder, &bin, &data, &settings);
            let server = Self { folder: folder.clone(), port, bin: bin.clone(), watch, databases: AtomicU64::new(0) };
            if server.wait_until_ready() {
                return server;
            }
            // Another program took the port in the meantime.
            let log = std::fs::read_to_string(folder.join("server.log")).unwrap_or_default();
            assert!(attempt < 5 && log.contains("could not bind"), "the server did not start: {log}");
            let mut server = std::mem::ManuallyDrop::new(server);
            server.watch.kill().unwrap();
            server.watch.wait().unwrap();
        }
    }

    /// Creates a database; returns its URL, which names the socket's folder.
    pub fn database(&self) -> String {
        let name = format!("d{}", self.databases.fetch_add(1, Ordering::SeqCst));
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        self.url(&name)
    }

    /// The URL of a database, for the superuser.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{SUPERUSER}@/{database}?host={}&port={}", self.folder.display(), self.port)
    }

    /// The port on the loopback address.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder with the socket, the log and the data.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The name of the superuser.
    pub fn superuser(&self) -> &'static str {
        SUPERUSER
    }

    /// Runs SQL as the superuser on a database or its URL; returns the unaligned output.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let output = self.try_sql(database, sql);
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Runs SQL as [`PostgresServer::sql`] does, and returns the exit status too.
    pub fn try_sql(&self, database: &str, sql: &str) -> Output {
        let database = database.split('?').next().unwrap().rsplit('/').next().unwrap();
        let mut command = self.psql();
        command.args(["-v", "ON_ERROR_STOP=1", "-d", database, "-p", &self.port.to_string(), "-h"]).arg(&self.folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut psql = spawn(&mut command, POSTGRESQL);
        let asked = psql.stdin.take().unwrap().write_all(sql.as_bytes());
        // A `psql` that finds no server ends without reading. Its output says so.
        assert!(asked.is_ok() || asked.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe), "`psql` cannot be asked");
        psql.wait_with_output().unwrap()
    }

    /// The server's own `psql` for the superuser, without a configuration file and without decoration of the output.
    pub fn psql(&self) -> Command {
        let mut command = Command::new(self.bin.join("psql"));
        command.args(["-XAtq", "-U", SUPERUSER]).env("PGCONNECT_TIMEOUT", "20");
        command
    }

    /// Changes a setting and makes the server reload it.
    pub fn change_setting(&self, setting: &str) {
        // Each statement has a transaction of its own, as the command requires.
        self.sql("postgres", &format!("ALTER SYSTEM SET {setting};\nSELECT pg_reload_conf();"));
    }

    /// Stops the server as a loss of power does, then starts it on the data that reached its disk.
    pub fn crash_and_restart(&self) {
        self.crash();
        self.restart();
    }

    /// Stops the server as a loss of power does.
    pub fn crash(&self) {
        self.control(&["stop", "-m", "immediate", "-w"]);
    }

    /// Sends SIGKILL to every process of the server; returns once none is left.
    pub fn kill(&self) {
        let pids = self.pids();
        assert!(!pids.is_empty(), "the server is stopped");
        signal(&pids, Signal::KILL);
        let until = Instant::now() + START_TIMEOUT;
        // A dead process that its parent has not reaped yet holds no resource.
        let lives = |pid: &Pid| process_stat(*pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'));
        while pids.iter().any(lives) {
            assert!(Instant::now() < until, "a killed server lives");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn control(&self, arguments: &[&str]) {
        let data = self.folder.join("data");
        let mut command = command_as_server_user(&self.bin.join("pg_ctl"));
        let done = output_of(command.args(arguments).arg("-D").arg(data).current_dir("/"), POSTGRESQL);
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Starts a stopped server.
    pub fn restart(&self) {
        let options = std::fs::read_to_string(self.folder.join("data/postmaster.opts")).unwrap();
        let options = options.split_once(' ').map(|(_, options)| options.trim().replace('"', "")).unwrap();
        let mut command = command_as_server_user(&self.bin.join("pg_ctl"));
        command.args(["start", "-w", "-l"]).arg(self.folder.join("data/restarted.log"));
        command.arg("-o").arg(options).arg("-D").arg(self.folder.join("data")).current_dir("/");
        // The server keeps inherited file descriptors open, so reading a pipe would never end.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let done = spawn(&mut command, POSTGRESQL).wait().unwrap();
        assert!(done.success(), "{}", std::fs::read_to_string(self.folder.join("data/restarted.log")).unwrap_or_default());
    }

    /// Suspends every process of the server, or resumes them.
    pub fn freeze(&self, frozen: bool) {
        let pids = self.pids();
        assert!(!pids.is_empty(), "the server is stopped");
        signal(&pids, if frozen { Signal::STOP } else { Signal::CONT });
    }

    /// The server's processes, the postmaster first; none while the server is stopped.
    fn pids(&self) -> Vec<Pid> {
        let Some(main) = self.pid() else { return Vec::new() };
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let all = all.filter_map(|entry| entry.file_name().to_str().and_then(pid_of));
        let children = all.filter(|pid| process_stat(*pid).is_some_and(|(_, parent)| parent == main.as_raw_nonzero().get()));
        std::iter::once(main).chain(children).collect()
    }

    fn pid(&self) -> Option<Pid> {
        let file = std::fs::read_to_string(self.folder.join("data/postmaster.pid")).ok()?;
        pid_of(file.lines().next()?)
    }

    fn wait_until_ready(&self) -> bool {
        let until = Instant::now() + START_TIMEOUT;
        while Instant::now() < until {
            let mut command = Command::new(self.bin.join("pg_isready"));
            let ready = output_of(command.args(["-q", "-p", &self.port.to_string(), "-h"]).arg(&self.folder), POSTGRESQL);
            if ready.status.success() {
                return true;
            }
            let log = std::fs::read_to_string(self.folder.join("server.log")).unwrap_or_default();
            if log.contains("FATAL") && !log.contains("starting up") {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for PostgresServer {
    // INVARIANT: nothing here panics. A failing test drops its servers while it unwinds, and a second panic would end the process
    // and all other tests.
    fn drop(&mut self) {
        // A server that was stopped for good has no process. One that was started again is not a child of this process.
        let pids = self.pids();
        signal(&pids, Signal::CONT);
        signal(pids.get(..1).unwrap_or_default(), Signal::QUIT);
        drop(self.watch.stdin.take());
        let _ = self.watch.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn pid_of(text: &str) -> Option<Pid> {
    text.parse().ok().and_then(Pid::from_raw)
}

/// Sends a signal to each process; a process that has ended is skipped.
fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        let _ = kill_process(*pid, signal);
    }
}

/// The state of a process and the id of its parent, if the process exists.
fn process_stat(pid: Pid) -> Option<(char, i32)> {
    // The format is `PID (NAME) STATE PARENT …`. A name may contain any character, including a bracket.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let mut fields = stat.rsplit(") ").next()?.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Runs a program and returns its output. If the program cannot be started, the panic names it and its package.
///
/// # Panics
/// If the program cannot be started.
pub fn output_of(command: &mut Command, package: &str) -> Output {
    let output = command.output();
    output.unwrap_or_else(|error| panic!("this test needs `{}` ({error}): {}", shown(command), install(package)))
}

/// Starts a program that keeps running, with the same panic as [`output_of`].
///
/// # Panics
/// If the program cannot be started.
pub fn spawn(command: &mut Command, package: &str) -> Child {
    let child = command.spawn();
    child.unwrap_or_else(|error| panic!("this test needs `{}` ({error}): {}", shown(command), install(package)))
}

fn shown(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn install(package: &str) -> String {
    format!("install Debian's package `{package}`, as ./test.sh does")
}

fn start_watched(folder: &Path, bin: &Path, data: &Path, settings: &[String]) -> Child {
    let mut command = command_as_server_user(Path::new("/bin/sh"));
    command.arg("-c").arg(WATCHED).arg("sh").arg(folder).arg(bin.join("postgres")).arg("-D").arg(data);
    for setting in settings {
        command.arg("-c").arg(setting);
    }
    // The shell has a process group of its own. An interrupt from the terminal ends the tests, and their end closes its input.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    // For root `setpriv` is started, otherwise the shell.
    spawn(command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()), "util-linux")
}

/// The folder of the server's programs.
fn binary_folder() -> PathBuf {
    let has_all = |folder: &PathBuf| PROGRAMS.iter().all(|name| folder.join(name).is_file());
    let mut folders = Vec::new();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    let mut versions: Vec<PathBuf> =
        std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path().join("bin")).collect();
    versions.sort();
    folders.extend(versions.into_iter().rev());
    folders.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    folders.into_iter().find(has_all).expect(MISSING)
}

/// The user that runs the server if the tests run as root, because the server refuses root.
fn server_user() -> &'static str {
    let known = |name: &str| output_of(Command::new("id").arg(name), "coreutils").status.success();
    if known("postgres") { "postgres" } else { "nobody" }
}

/// A command as a user that the server accepts.
fn command_as_server_user(program: &Path) -> Command {
    if !geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", server_user(), "--regid"]).arg(server_group()).args(["--clear-groups", "--"]).arg(program);
    command
}

fn server_group() -> String {
    let output = output_of(Command::new("id").args(["-gn", server_user()]), "coreutils");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn change_owner(folder: &Path) {
    if geteuid().is_root() {
        let done = output_of(Command::new("chown").arg(server_user()).arg(folder), "coreutils");
        assert!(done.status.success(), "{done:?}");
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
