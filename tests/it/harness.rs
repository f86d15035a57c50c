//! The harness of the integration tests: the real binary as a server and as a command, a policy with its own keys, chains, and
//! clients.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::check_request::Credential;
use portcullis::api::r#gen::decision_service_client::DecisionServiceClient;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use portcullis::model::json::parse_object;
use portcullis::model::time::{Clock as _, ClockReading, SystemClock};
use portcullis::token::operator_act::{self, AdminCall};
use portcullis::token::{PrivateKey, ProofCall, issue};
use prost::Message;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Request;
use tonic::transport::Channel;

pub(crate) const ISSUER: &str = "https://login.test.example";
pub(crate) const AUDIENCE: &str = "https://gateway.test.example";
/// Every registered tool. A root grants all of them by default.
pub(crate) const TOOLS: &[&str] =
    &["crm/read", "crm/look", "crm/write", "crm/wipe", "pay/refund", "pay/large", "lab/probe", "lab/limited", "gone/tool"];
/// Longest time for any step before a test gives up. It measures nothing.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

const POLICY: &str = r#"
kind: issuer
id: https://login.test.example
keys: {jwks: {keys: [ISSUER_KEY]}}
audiences: [https://gateway.test.example]
groups: [staff, readers, guests]
applications: ["*"]
---
{kind: application, id: portal, allow: ["*"]}
---
{kind: application, id: narrow, allow: [crm/read]}
---
{kind: application, id: kiosk, allow: ["*"]}
---
{kind: group, id: staff, allow: ["*"]}
---
{kind: group, id: readers, allow: [crm/read]}
---
{kind: group, id: guests, allow: ["*"]}
---
{kind: group, id: visitors, allow: ["*"]}
---
kind: server
id: crm
tools: {read: {risk: read}, look: {risk: read, proof: none}, write: {risk: write}, wipe: {risk: destructive}}
---
kind: server
id: pay
tools: {refund: {risk: read}, large: {risk: read}}
---
kind: tool
id: lab/probe
risk: read
schema_sha256: 0101010101010101010101010101010101010101010101010101010101010101
---
kind: tool
id: lab/limited
risk: read
---
kind: agent
id: spiffe://test.example/agent/alpha
keys: [ALPHA_KEY]
applications: [portal, narrow]
acts_for: [staff, readers]
delegates_to: [spiffe://test.example/agent/beta]
allow: [crm/*, lab/probe, {lab/limited: {args: {n: {max: 10}}}}]
approve: [{pay/refund: {args: {amount: {max: 500}}, by: [leads], expires_in: 10m}}]
deny: [pay/large]
---
kind: agent
id: spiffe://test.example/agent/beta
keys: [BETA_KEY]
applications: [portal]
acts_for: [staff]
allow: [crm/*]
---
kind: agent
id: spiffe://test.example/agent/gamma
keys: [GAMMA_KEY]
applications: [portal]
acts_for: [staff]
allow: [crm/*]
"#;

/// A policy folder with fresh keys, and all of these keys.
pub(crate) struct TestWorld {
    pub(crate) folder: TempDir,
    issuer: PrivateKey,
    agents: BTreeMap<&'static str, PrivateKey>,
}

/// A chain, and the name of the agent that holds its leaf.
#[derive(Clone)]
pub(crate) struct TestChain {
    pub(crate) tokens: Vec<Bytes>,
    pub(crate) holder: &'static str,
}

impl TestWorld {
    pub(crate) fn new() -> Self {
        let names = ["alpha", "beta", "gamma", "stranger"];
        let agents: BTreeMap<_, _> = names.into_iter().map(|name| (name, PrivateKey::generate().unwrap())).collect();
        let world = Self { folder: tempfile::tempdir().unwrap(), issuer: PrivateKey::generate().unwrap(), agents };
        std::fs::create_dir(world.policies()).unwrap();
        world.write_policy(&world.policy());
        world
    }

    pub(crate) fn policy(&self) -> String {
        let mut issuer = jwk(&self.issuer);
        issuer["kid"] = json!("main");
        let thumbprint = |name: &str| self.agents[name].public_key().thumbprint().to_string();
        POLICY
            .replace("ISSUER_KEY", &issuer.to_string())
            .replace("ALPHA_KEY", &thumbprint("alpha"))
            .replace("BETA_KEY", &thumbprint("beta"))
            .replace("GAMMA_KEY", &thumbprint("gamma"))
    }

    pub(crate) fn write_policy(&self, text: &str) {
        std::fs::write(self.policies().join("policy.yaml"), text).unwrap();
    }

    pub(crate) fn policies(&self) -> PathBuf {
        self.folder.path().join("policies")
    }

    /// The data folder of the server that [`ServerProcess::start`] starts.
    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(crate) fn key(&self, name: &str) -> &PrivateKey {
        if name == "issuer" { &self.issuer } else { &self.agents[name] }
    }

    /// A file with a private key, for the command line.
    pub(crate) fn key_file(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{name}.jwk"));
        std::fs::write(&path, self.key(name).to_jwk().as_bytes()).unwrap();
        path
    }

    /// The claims of an agent's root that grants everything.
    pub(crate) fn root_claims(&self, agent: &str) -> Value {
        let tools: serde_json::Map<String, Value> = TOOLS.iter().map(|tool| ((*tool).to_owned(), json!({}))).collect();
        json!({
            "iss": ISSUER, "aud": AUDIENCE, "sub": "ana", "sub_profile": "user", "groups": ["staff"],
            "client_id": "portal", "act": { "iss": ISSUER, "sub": agent_id(agent) }, "sid": "s-1", "txn": "t-1",
            "exp": now(0).unix_s() + 3600, "cnf": { "jwk": jwk(self.key(agent)) }, "del_max_depth": 4,
            "authorization_details": [{ "type": "attenuating_agent_token", "tools": tools }],
        })
    }

    pub(crate) fn hop_claims(&self, agent: &str, tools: &[&str]) -> Value {
        let tools: serde_json::Map<String, Value> = tools.iter().map(|tool| ((*tool).to_owned(), json!({}))).collect();
        json!({
            "act": { "iss": ISSUER, "sub": agent_id(agent) }, "exp": now(0).unix_s() + 1800,
            "cnf": { "jwk": jwk(self.key(agent)) }, "del_max_depth": 4,
            "authorization_details": [{ "type": "attenuating_agent_token", "tools": tools }],
        })
    }

    /// A root for an agent, with changed claims.
    pub(crate) fn root(&self, agent: &'static str, change: impl FnOnce(&mut Value)) -> TestChain {
        let mut claims = self.root_claims(agent);
        change(&mut claims);
        let jws = issue::issue_root(&self.issuer, &claims.to_string(), now(0)).unwrap();
        TestChain { tokens: vec![jws.into()], holder: agent }
    }

    /// A root for one session.
    pub(crate) fn session(&self, agent: &'static str, session: &str) -> TestChain {
        self.root(agent, |claims| claims["sid"] = json!(session))
    }

    pub(crate) fn hop(
        &self,
        parent: &TestChain,
        agent: &'static str,
        tools: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> TestChain {
        let mut claims = self.hop_claims(agent, tools);
        change(&mut claims);
        let jws = issue::issue_hop(self.key(parent.holder), &parent.tokens, &claims.to_string(), now(0)).unwrap();
        TestChain { tokens: parent.tokens.iter().cloned().chain([jws.into()]).collect(), holder: agent }
    }

    /// A proof for a call, dated slightly ahead of the clock, so that it is never from before the server was ready.
    pub(crate) fn proof(&self, chain: &TestChain, tool: &str, args: &str) -> Bytes {
        self.proof_at(chain, tool, args, 3)
    }

    pub(crate) fn proof_at(&self, chain: &TestChain, tool: &str, args: &str, ahead_s: i64) -> Bytes {
        let arguments = parse_object(args.as_bytes()).unwrap();
        let call = ProofCall { tool, arguments: &arguments, audience: Some(AUDIENCE) };
        issue::sign_proof(self.key(chain.holder), &chain.tokens, &call, None, now(ahead_s)).unwrap().into()
    }

    /// A call with a fresh proof.
    pub(crate) fn call(&self, chain: &TestChain, tool: &str, args: &str) -> wire::CheckRequest {
        let aat_pop = if chain.tokens.len() > 9 { Bytes::new() } else { self.proof(chain, tool, args) };
        request(chain, aat_pop, tool, args)
    }
}

/// A call as a gateway sends it.
pub(crate) fn request(chain: &TestChain, aat_pop: Bytes, tool: &str, args: &str) -> wire::CheckRequest {
    wire::CheckRequest {
        credential: Some(Credential::Presentation(wire::Presentation { aat_chain: chain.tokens.clone(), aat_pop })),
        tool: tool.to_owned(),
        arguments_json: Bytes::copy_from_slice(args.as_bytes()),
        ..Default::default()
    }
}

pub(crate) fn agent_id(name: &str) -> String {
    format!("spiffe://test.example/agent/{name}")
}

pub(crate) fn now(ahead_s: i64) -> ClockReading {
    let now = SystemClock.now();
    ClockReading { unix_ns: now.unix_ns + ahead_s * 1_000_000_000, ..now }
}

pub(crate) fn jwk(key: &PrivateKey) -> Value {
    serde_json::from_str(&key.public_key().to_jwk()).unwrap()
}

/// The binary, without the environment of the test run.
pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    let ours = std::env::vars_os().map(|(name, _)| name);
    for name in
        ours.filter(|name| name.to_string_lossy().starts_with("PORTCULLIS_") || name.to_string_lossy().starts_with("OTEL_"))
    {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// The result of a command.
#[derive(Debug)]
pub(crate) struct CommandResult {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl CommandResult {
    /// The one JSON document of its output.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(self.stdout.trim()).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Panics unless the command ended with this code.
    pub(crate) fn ended(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }
}

/// Runs a command to its end.
pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> CommandResult {
    run_with(binary().args(arguments), "")
}

pub(crate) fn run_with(command: &mut Command, input: &str) -> CommandResult {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that does not read its input causes no error here.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    CommandResult {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A server process, killed on drop.
pub(crate) struct ServerProcess {
    child: Child,
    pub(crate) decisions: String,
    pub(crate) http: String,
    pub(crate) admin: String,
    pub(crate) data: PathBuf,
    log: PathBuf,
}

impl ServerProcess {
    /// Starts a server on free ports with the world's policy and data folder, and waits until it is ready.
    pub(crate) fn start(world: &TestWorld) -> Self {
        Self::start_with(world, binary().arg("--policies").arg(world.policies()))
    }

    /// Starts a server with the arguments of `flags`; `serve`, ports and data folder are added.
    pub(crate) fn start_with(world: &TestWorld, flags: &Command) -> Self {
        Self::start_at(world, flags, &world.data())
    }

    /// As [`ServerProcess::start_with`], with its own data folder. It is another replica if the flags name the first one's store.
    pub(crate) fn start_at(world: &TestWorld, flags: &Command, data: &Path) -> Self {
        Self::try_start_at(world, flags, data).unwrap_or_else(|code| {
            panic!("it ended with {code:?}: {}", std::fs::read_to_string(world.folder.path().join("stderr.log")).unwrap())
        })
    }

    /// As [`ServerProcess::start_at`], but returns the exit code of a server that does not start.
    pub(crate) fn try_start_at(world: &TestWorld, flags: &Command, data: &Path) -> Result<Self, Option<i32>> {
        Self::try_start_by(world, binary(), flags, data)
    }

    /// As [`ServerProcess::start_with`], in a shell that first runs `limits`, such as `ulimit -n 400`.
    pub(crate) fn start_within(world: &TestWorld, flags: &Command, limits: &str) -> Self {
        let mut shell = Command::new("sh");
        let program = binary();
        shell.args(["-c", &format!("{limits} && exec \"$0\" \"$@\"")]).arg(program.get_program());
        for (name, _) in program.get_envs() {
            shell.env_remove(name);
        }
        Self::try_start_by(world, shell, flags, &world.data()).unwrap_or_else(|code| panic!("it ended with {code:?}"))
    }

    /// As [`ServerProcess::start`], with standard error in a pipe, for a test that reads it or does not. It has no [`ServerProcess::log`].
    pub(crate) fn start_piped(world: &TestWorld, flags: &Command) -> (Self, std::process::ChildStderr) {
        let mut server = Self::try_start_with(world, binary(), flags, &world.data(), Stdio::piped()).unwrap();
        let errors = server.child.stderr.take().unwrap();
        (server, errors)
    }

    fn try_start_by(world: &TestWorld, command: Command, flags: &Command, data: &Path) -> Result<Self, Option<i32>> {
        let errors = std::fs::OpenOptions::new().create(true).append(true).open(Self::log_of(world)).unwrap();
        Self::try_start_with(world, command, flags, data, errors.into())
    }

    fn log_of(world: &TestWorld) -> PathBuf {
        world.folder.path().join("stderr.log")
    }

    fn try_start_with(
        world: &TestWorld,
        mut command: Command,
        flags: &Command,
        data: &Path,
        errors: Stdio,
    ) -> Result<Self, Option<i32>> {
        command.arg("serve").args(flags.get_args());
        for (name, value) in flags.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        // A data folder that is named and is not there is made with `--create` only.
        if !flags.get_args().any(|flag| flag == "--create") {
            std::fs::create_dir_all(data).unwrap();
        }
        let log = Self::log_of(world);
        let listeners = ["--listen", "--http-listen", "--admin-listen"];
        command.args(listeners.iter().flat_map(|flag| [*flag, "127.0.0.1:0"])).arg("--data").arg(data);
        let mut child = command.stdout(Stdio::piped()).stderr(errors).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            return Err(child.wait().unwrap().code());
        }
        let address = |name: &str| {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_else(|| panic!("no `{name}` in {line:?}: {}", std::fs::read_to_string(&log).unwrap())).to_owned()
        };
        assert!(line.starts_with("ready "), "{line}");
        let (decisions, http, admin) = (address("decisions"), address("http"), address("admin"));
        Ok(Self { child, decisions, http, admin, data: data.to_owned(), log })
    }

    pub(crate) async fn connect(&self) -> DecisionServiceClient<Channel> {
        DecisionServiceClient::new(channel(&self.decisions).await)
    }

    /// A client of administration that signs as the first operator.
    pub(crate) async fn operator(&self) -> OperatorClient {
        let key = PrivateKey::from_jwk(&std::fs::read(self.data.join("local.jwk")).unwrap()).unwrap();
        let channel = channel(&self.admin).await;
        let info = wire::fleet_service_client::FleetServiceClient::new(channel.clone()).info(wire::InfoRequest {}).await;
        OperatorClient { channel, history: info.unwrap().into_inner().history_id, key }
    }

    pub(crate) fn decisions_url(&self) -> String {
        format!("http://{}", self.decisions)
    }

    pub(crate) fn admin_url(&self) -> String {
        format!("http://{}", self.admin)
    }

    /// The status code and the body of an HTTP response.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (code, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    /// The value of a series of `/metrics`: a metric without labels, or with exactly these.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let (_, page) = self.get("/metrics");
        let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in {page}")).parse().unwrap()
    }

    /// The log so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM and does not wait.
    pub(crate) fn terminate(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, signal).unwrap();
        if signal != rustix::process::Signal::STOP {
            return;
        }
        // A stopped process may still answer until its last thread has stopped; each stops when it is next scheduled.
        let until = Instant::now() + PATIENCE;
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            // The format is `PID (NAME) STATE …`. A name may contain any character, including a bracket.
            stat.is_empty() || stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        while !std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().all(stopped) {
            assert!(Instant::now() < until, "the server does not stop");
            std::thread::yield_now();
        }
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the server did not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The lines of the audit log, all files in order.
    pub(crate) fn audit(&self) -> Vec<Value> {
        audit_lines(&self.data)
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The complete lines of every audit file. A line that a kill truncated is left out.
pub(crate) fn audit_lines(data: &Path) -> Vec<Value> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(data.join("audit")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    files.sort();
    let mut lines = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).unwrap();
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.extend(whole.map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"))));
    }
    lines
}

/// Connects to a listener.
pub(crate) async fn channel(address: &str) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

/// An operator's client for administration over raw gRPC.
#[derive(Debug)]
pub(crate) struct OperatorClient {
    pub(crate) channel: Channel,
    pub(crate) history: String,
    pub(crate) key: PrivateKey,
}

impl OperatorClient {
    /// The `authorization` header for a call.
    pub(crate) fn authorization<M: Message>(&self, method: &str, message: &M) -> String {
        authorization(&self.key, &self.history, method, message)
    }

    /// Revokes a target; returns the revision.
    pub(crate) async fn revoke(&self, kind: &str, key: &[&str], meaning: wire::RevocationMeaning) -> String {
        let message = wire::RevokeRequest { target: Some(target(kind, key)), meaning: meaning.into(), reason: "test".to_owned() };
        let by = self.authorization("/portcullis.v1.RevocationService/Revoke", &message);
        let mut client = RevocationServiceClient::new(self.channel.clone());
        client.revoke(signed(message, &[by])).await.unwrap().into_inner().revision
    }

    pub(crate) async fn reinstate(&self, kind: &str, key: &[&str]) -> String {
        let message = wire::ReinstateRequest { target: Some(target(kind, key)), reason: "test".to_owned() };
        let by = self.authorization("/portcullis.v1.RevocationService/Reinstate", &message);
        let mut client = RevocationServiceClient::new(self.channel.clone());
        client.reinstate(signed(message, &[by])).await.unwrap().into_inner().revision
    }
}

pub(crate) fn authorization<M: Message>(key: &PrivateKey, history: &str, method: &str, message: &M) -> String {
    let bytes = message.encode_to_vec();
    format!("Operator {}", operator_act::sign_act(key, &AdminCall { audience: history, method, message: &bytes }, now(0)))
}

pub(crate) fn target(kind: &str, key: &[&str]) -> wire::RevocationTarget {
    wire::RevocationTarget { kind: kind.to_owned(), key: key.iter().map(|part| (*part).to_owned()).collect() }
}

/// A call with these `authorization` headers.
pub(crate) fn signed<M>(message: M, authorizations: &[String]) -> Request<M> {
    let mut request = Request::new(message);
    for authorization in authorizations {
        request.metadata_mut().append("authorization", authorization.parse().unwrap());
    }
    request
}
