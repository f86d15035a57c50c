//! The server under test: the release binary as a child process, on free ports, with its own data folder.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use portcullis::token::PrivateKey;
use tempfile::TempDir;

pub(crate) struct ServerProcess {
    child: Child,
    folder: TempDir,
    pub(crate) decisions: String,
    pub(crate) http: String,
    pub(crate) admin: String,
}

impl ServerProcess {
    /// Starts the server and waits for its ready line.
    pub(crate) fn start(binary: &Path, policy: &str) -> Result<Self> {
        Self::start_with(binary, Some(policy), &[])
    }

    /// Starts the server with more environment variables. Without a policy it uses the one in its store.
    pub(crate) fn start_with(binary: &Path, policy: Option<&str>, environment: &[(&str, &str)]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let policies = folder.path().join("policies");
        let free = "127.0.0.1:0";
        let mut command = Command::new(binary);
        if let Some(policy) = policy {
            std::fs::create_dir(&policies)?;
            std::fs::write(policies.join("company.yaml"), policy)?;
            command.arg("serve").arg("--policies").arg(&policies);
        } else {
            command.arg("serve");
        }
        let child = command
            .envs(environment.iter().copied())
            .args(["--noop", "--log", "warn", "--listen", free, "--http-listen", free, "--admin-listen", free])
            .arg("--data")
            .arg(folder.path().join("data"))
            .arg("--create")
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("`{}` cannot be started: build it with `cargo build --release`", binary.display()))?;
        let mut server = Self { child, folder, decisions: String::new(), http: String::new(), admin: String::new() };
        let mut line = String::new();
        BufReader::new(server.child.stdout.take().context("no standard output")?).read_line(&mut line)?;
        let address = |name: &str| {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            found.map(|address| format!("http://{address}")).with_context(|| format!("the server did not become ready: `{line}`"))
        };
        server.decisions = address("decisions=")?;
        server.http = address("http=")?;
        server.admin = address("admin=")?;
        Ok(server)
    }

    /// Nanoseconds of CPU that its threads have used, from the scheduler's accounting (ticks of 10 ms would be too coarse).
    pub(crate) fn cpu_ns(&self) -> Result<u64> {
        let mut sum_ns = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let path = task?.path().join("schedstat");
            // A thread may end between the listing and the reading.
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            sum_ns += text.split_whitespace().next().context("an empty schedstat")?.parse::<u64>()?;
        }
        Ok(sum_ns)
    }

    /// The resident memory, in KiB.
    pub(crate) fn resident_kib(&self) -> Result<u64> {
        self.status_kib("VmRSS")
    }

    /// A figure of `/proc/PID/status`, in KiB.
    pub(crate) fn status_kib(&self, name: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.context("no such figure")?.trim().trim_end_matches("kB").trim().parse()?)
    }

    /// The bytes of its audit files.
    pub(crate) fn audit_bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for entry in std::fs::read_dir(self.folder.path().join("data/audit"))? {
            sum += entry?.metadata()?.len();
        }
        Ok(sum)
    }

    /// The key of the operator that the server created for itself.
    pub(crate) fn operator_key(&self) -> Result<PrivateKey> {
        Ok(PrivateKey::from_jwk(&std::fs::read(self.folder.path().join("data/local.jwk"))?)?)
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let asked = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .is_some_and(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok());
        if !asked {
            // Nothing else is left to try.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
