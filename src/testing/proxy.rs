//! A TCP proxy with the faults of a network: delays, cuts, half-closed and half-open connections, lost bytes.
//!
//! It runs on a thread or as a process of its own, which a test can stop and kill. A connection that has lost a byte never carries
//! one again in that direction, even after the fault ends: TCP never skips bytes, so a receiver waits for the lost byte for ever.
//! This file stands alone, so that the integration tests and the load driver can include it by its path. Look next at
//! `load-tests/faults/scenario.rs`, the table of faults.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a harness of tests fails by panicking")]
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "not everyone who takes it in uses all of it, and some take it in privately"
)]

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

/// Most bytes that wait in one direction of a connection. At this number the proxy stops reading from the sender.
const WAITING_BYTES_MAX: usize = 1024 * 1024;
const CHUNK_BYTES: usize = 16 * 1024;
/// The prefix of every answer of the process. It may stand anywhere on a line, because a test's output may come before it.
const ANSWER: &str = "@proxy ";

/// One or both directions of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficDirection {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
    /// Both directions.
    Both,
}

impl TrafficDirection {
    fn covers(self, other: TrafficDirection) -> bool {
        self == TrafficDirection::Both || self == other
    }
}

/// The fault of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteMode {
    /// Forwards all bytes.
    Pass,
    /// Forwards all bytes, each direction delayed by this many milliseconds.
    Delay(u64),
    /// Resets every existing connection, even if another mode follows at once, and every new one as it arrives.
    Cut,
    /// Ends one direction of every existing connection, even if another mode follows at once, and of new ones. The other direction
    /// goes on.
    HalfClose(TrafficDirection),
    /// Discards bytes. Connections stay open, and new ones are accepted.
    BlackHole(TrafficDirection),
    /// Forwards all bytes until a client sends this text. From then on its connection is a black hole in both directions.
    BlackHoleAt(String),
}

impl fmt::Display for TrafficDirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrafficDirection::Up => "up",
            TrafficDirection::Down => "down",
            TrafficDirection::Both => "both",
        })
    }
}

impl fmt::Display for RouteMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouteMode::Pass => f.write_str("pass"),
            RouteMode::Delay(ms) => write!(f, "delay {ms}"),
            RouteMode::Cut => f.write_str("cut"),
            RouteMode::HalfClose(way) => write!(f, "half-close {way}"),
            RouteMode::BlackHole(way) => write!(f, "black-hole {way}"),
            RouteMode::BlackHoleAt(words) => write!(f, "black-hole-at {words}"),
        }
    }
}

impl FromStr for TrafficDirection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [TrafficDirection::Up, TrafficDirection::Down, TrafficDirection::Both]
            .into_iter()
            .find(|way| way.to_string() == text)
            .ok_or_else(|| format!("no way: `{text}`"))
    }
}

impl FromStr for RouteMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once(' ').unwrap_or((text, ""));
        Ok(match name {
            "pass" => RouteMode::Pass,
            "delay" => RouteMode::Delay(rest.parse().map_err(|_| format!("no delay: `{text}`"))?),
            "cut" => RouteMode::Cut,
            "half-close" => RouteMode::HalfClose(rest.parse()?),
            "black-hole" => RouteMode::BlackHole(rest.parse()?),
            "black-hole-at" if !rest.is_empty() => RouteMode::BlackHoleAt(rest.to_owned()),
            _ => return Err(format!("no mode: `{text}`")),
        })
    }
}

/// The setting of a route.
#[derive(Clone, Debug)]
struct RouteSetting {
    mode: RouteMode,
    upstream: SocketAddr,
    mode_counts: ModeCounts,
}

/// Counts how often the route was told to cut or half-close its connections. A connection compares these counts with those at its
/// start, because a watch channel keeps only the newest mode, so a connection may never see a mode that was replaced at once.
#[derive(Clone, Copy, Debug, Default)]
struct ModeCounts {
    cuts: u64,
    ups_ended: u64,
    downs_ended: u64,
}

impl ModeCounts {
    fn count(&mut self, mode: &RouteMode) {
        self.cuts += u64::from(*mode == RouteMode::Cut);
        for (way, ended) in [(TrafficDirection::Up, &mut self.ups_ended), (TrafficDirection::Down, &mut self.downs_ended)] {
            *ended += u64::from(matches!(mode, RouteMode::HalfClose(which) if which.covers(way)));
        }
    }

    fn ended(&self, way: TrafficDirection) -> u64 {
        if way == TrafficDirection::Up { self.ups_ended } else { self.downs_ended }
    }
}

/// A route in this process. Its listener and its connections end when it is dropped.
pub struct ProxyRoute {
    address: SocketAddr,
    setting: watch::Sender<RouteSetting>,
}

impl ProxyRoute {
    /// Listens on a loopback port, 0 for any free one, on the current runtime.
    ///
    /// # Errors
    /// If the port cannot be bound.
    pub async fn listen(port: u16, upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        let address = listener.local_addr()?;
        let (setting, settings) =
            watch::channel(RouteSetting { mode: RouteMode::Pass, upstream, mode_counts: ModeCounts::default() });
        tokio::spawn(accept_connections(listener, settings));
        Ok(Self { address, setting })
    }

    /// The address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets the mode of existing and new connections.
    pub fn set_mode(&self, mode: RouteMode) {
        self.setting.send_modify(|setting| {
            setting.mode_counts.count(&mode);
            setting.mode = mode;
        });
    }

    /// Sets the server for new connections. Existing connections keep theirs.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        self.setting.send_modify(|setting| setting.upstream = upstream);
    }
}

async fn accept_connections(listener: TcpListener, mut settings: watch::Receiver<RouteSetting>) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((near, _)) => drop(tokio::spawn(relay_connection(near, settings.clone()))),
                // The process may be out of file descriptors, which soon ends.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            gone = wait_until_route_ends(&mut settings) => return gone,
        }
    }
}

/// Returns when the route ends.
async fn wait_until_route_ends(settings: &mut watch::Receiver<RouteSetting>) {
    while settings.changed().await.is_ok() {}
}

/// Relays both directions of one connection, until it ends or is cut.
async fn relay_connection(near: TcpStream, settings: watch::Receiver<RouteSetting>) {
    let near = Arc::new(near);
    let mut cut = settings.clone();
    let RouteSetting { upstream, mode_counts: done, .. } = settings.borrow().clone();
    let both = async {
        let Ok(far) = TcpStream::connect(upstream).await else { return reset(&near) };
        for stream in [&*near, &far] {
            // Without this option the proxy would add delays of its own.
            let _ = stream.set_nodelay(true);
        }
        let far = Arc::new(far);
        // Set by the direction that sees the text that makes both directions a black hole.
        let fallen = watch::Sender::new(false);
        let one = |way, from: &Arc<TcpStream>, to: &Arc<TcpStream>| {
            let (from, to, settings, fallen) = (from.clone(), to.clone(), settings.clone(), fallen.clone());
            DirectionRelay {
                direction: way,
                from,
                to,
                settings,
                ended: done.ended(way),
                black_hole: fallen,
                has_lost_bytes: false,
            }
            .run()
        };
        if tokio::try_join!(one(TrafficDirection::Up, &near, &far), one(TrafficDirection::Down, &far, &near)).is_err() {
            reset(&near);
            reset(&far);
        }
    };
    tokio::select! {
        _ = cut.wait_for(|setting| setting.mode == RouteMode::Cut || setting.mode_counts.cuts != done.cuts) => reset(&near),
        () = both => {}
    }
}

/// Makes the close of a stream a reset, which no peer takes for a normal end.
fn reset(stream: &TcpStream) {
    // A stream that is already closed needs no reset.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Relays one direction of a connection.
struct DirectionRelay {
    direction: TrafficDirection,
    from: Arc<TcpStream>,
    to: Arc<TcpStream>,
    settings: watch::Receiver<RouteSetting>,
    /// How often this direction of the route had been ended when the connection began.
    ended: u64,
    black_hole: watch::Sender<bool>,
    /// Whether bytes were lost. Then no byte may follow them.
    has_lost_bytes: bool,
}

impl DirectionRelay {
    async fn run(mut self) -> io::Result<()> {
        let (mut waiting, mut bytes, mut ended) = (VecDeque::<(Instant, Vec<u8>)>::new(), 0, false);
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut fallen = self.black_hole.subscribe();
        self.settings.mark_changed();
        loop {
            if ended && waiting.is_empty() {
                if !self.swallows() {
                    return shut_down_write(&self.to);
                }
                // An end is discarded as well, so the other side keeps waiting.
                std::future::pending::<()>().await;
            }
            let due = waiting.front().map(|(due, _)| *due);
            tokio::select! {
                biased;
                changed = self.settings.changed() => {
                    changed.map_err(io::Error::other)?;
                    if self.half_closed() && !self.has_lost_bytes {
                        self.has_lost_bytes = true;
                        shut_down_write(&self.to)?;
                    }
                }
                _ = fallen.changed() => self.has_lost_bytes = true,
                () = sleep_until(due) => {
                    let Some((_, chunk)) = waiting.pop_front() else { continue };
                    bytes -= chunk.len();
                    if !self.swallows() {
                        write_all(&self.to, &chunk).await?;
                    }
                }
                read = read(&self.from, &mut chunk), if !ended && bytes < WAITING_BYTES_MAX => {
                    let length = match read {
                        Ok(length) => length,
                        // A sender into a black hole never learns that the receiver is gone.
                        Err(_) if self.swallows() => 0,
                        Err(error) => return Err(error),
                    };
                    ended = length == 0;
                    let said = chunk.get(..length).unwrap_or_default();
                    self.watch_for_words(said);
                    if ended || self.swallows() {
                        continue;
                    }
                    let delay = match self.settings.borrow().mode {
                        RouteMode::Delay(ms) => Duration::from_millis(ms),
                        _ => Duration::ZERO,
                    };
                    bytes += length;
                    waiting.push_back((Instant::now() + delay, said.to_vec()));
                }
            }
        }
    }

    /// Whether this direction was ended, or is ended as soon as a connection arrives.
    fn half_closed(&mut self) -> bool {
        let setting = self.settings.borrow_and_update();
        matches!(setting.mode, RouteMode::HalfClose(way) if way.covers(self.direction))
            || setting.mode_counts.ended(self.direction) != self.ended
    }

    /// Whether a byte is lost now. Then all later bytes are lost too.
    fn swallows(&mut self) -> bool {
        let covered = matches!(self.settings.borrow().mode, RouteMode::BlackHole(way) if way.covers(self.direction));
        self.has_lost_bytes |= covered || *self.black_hole.borrow();
        self.has_lost_bytes
    }

    fn watch_for_words(&self, said: &[u8]) {
        if let RouteMode::BlackHoleAt(words) = &self.settings.borrow().mode
            && self.direction == TrafficDirection::Up
            && said.windows(words.len()).any(|window| window == words.as_bytes())
        {
            self.black_hole.send_replace(true);
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

async fn read(from: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
    loop {
        from.readable().await?;
        match from.try_read(into) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn shut_down_write(to: &TcpStream) -> io::Result<()> {
    match SockRef::from(to).shutdown(Shutdown::Write) {
        // The stream is closed already.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        outcome => outcome,
    }
}

/// Runs the proxy process: it reads one command a line from standard input, and ends when the input ends.
///
/// The answer to `route PORT UPSTREAM` is the address of the new route. The answer to `mode NUMBER MODE` and `point NUMBER
/// UPSTREAM` is `done`.
///
/// # Errors
/// If no runtime can be made. A wrong command is no error: its answer names the problem.
pub fn serve() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (lines_out, mut lines) = mpsc::channel::<String>(16);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if lines_out.blocking_send(line).is_err() {
                return;
            }
        }
    });
    runtime.block_on(async {
        let mut routes = Vec::new();
        while let Some(line) = lines.recv().await {
            let answer = run_command(&line, &mut routes).await.unwrap_or_else(|problem| format!("problem {problem}"));
            // `println` is not used, because a test harness would capture it.
            writeln!(io::stdout(), "{ANSWER}{answer}")?;
            io::stdout().flush()?;
        }
        Ok(())
    })
}

async fn run_command(line: &str, routes: &mut Vec<ProxyRoute>) -> Result<String, String> {
    let mut words = line.splitn(3, ' ');
    let mut word = || words.next().ok_or_else(|| format!("`{line}` lacks a word"));
    let (command, first, second) = (word()?, word()?, word()?);
    let address = || second.parse::<SocketAddr>().map_err(|error| format!("`{second}`: {error}"));
    let number = || first.parse::<u16>().map_err(|error| format!("`{first}`: {error}"));
    if command == "route" {
        let route = ProxyRoute::listen(number()?, address()?).await.map_err(|error| error.to_string())?;
        let answer = route.address().to_string();
        routes.push(route);
        return Ok(answer);
    }
    let route = routes.get(usize::from(number()?)).ok_or_else(|| format!("no route {first}"))?;
    match command {
        "mode" => route.set_mode(second.parse()?),
        "point" => route.set_upstream(address()?),
        _ => return Err(format!("no command: `{line}`")),
    }
    Ok("done".to_owned())
}

/// A proxy in a process of its own. It is killed on drop, and ends when this process ends.
pub struct ProxyProcess {
    command: Box<dyn Fn() -> Command + Send>,
    running: Option<(Child, ChildStdin, BufReader<ChildStdout>)>,
    routes: Vec<(SocketAddr, SocketAddr)>,
}

impl ProxyProcess {
    /// Starts the program that `command` returns; that program calls [`serve`].
    pub fn start(command: impl Fn() -> Command + Send + 'static) -> Self {
        let mut process = Self { command: Box::new(command), running: None, routes: Vec::new() };
        process.run();
        process
    }

    fn run(&mut self) {
        let mut command = (self.command)();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the proxy does not start");
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        self.running = Some((child, stdin, stdout));
    }

    /// Adds a route to a server; returns its number and its address.
    pub fn route(&mut self, upstream: SocketAddr) -> (usize, SocketAddr) {
        let address = self.ask(&format!("route 0 {upstream}")).parse().expect("no address");
        self.routes.push((address, upstream));
        (self.routes.len() - 1, address)
    }

    /// Sets the mode, as [`ProxyRoute::set_mode`].
    pub fn set_mode(&mut self, route: usize, mode: &RouteMode) {
        self.ask(&format!("mode {route} {mode}"));
    }

    /// Sets the server, as [`ProxyRoute::set_upstream`].
    pub fn set_upstream(&mut self, route: usize, upstream: SocketAddr) {
        self.ask(&format!("point {route} {upstream}"));
        self.routes.get_mut(route).expect("no such route").1 = upstream;
    }

    /// The process id; 0 while the process is killed.
    pub fn id(&self) -> u32 {
        self.running.as_ref().map_or(0, |(child, ..)| child.id())
    }

    /// Sends SIGKILL. Its ports become free, and its connections are reset.
    pub fn kill(&mut self) {
        if let Some((mut child, ..)) = self.running.take() {
            // A process that ended by itself needs no signal.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts the process again, with the routes on their old ports, all forwarding.
    pub fn restart(&mut self) {
        self.kill();
        self.run();
        for (address, upstream) in self.routes.clone() {
            let again = self.ask(&format!("route {} {upstream}", address.port()));
            assert_eq!(again, address.to_string(), "the port was taken meanwhile");
        }
    }

    fn ask(&mut self, line: &str) -> String {
        let (_, stdin, stdout) = self.running.as_mut().expect("the proxy is killed");
        writeln!(stdin, "{line}").expect("the proxy is gone");
        loop {
            let mut said = String::new();
            assert!(stdout.read_line(&mut said).expect("the proxy is gone") > 0, "the proxy ended at `{line}`");
            if let Some((_, answer)) = said.split_once(ANSWER) {
                assert!(!answer.starts_with("problem"), "{line}: {answer}");
                return answer.trim().to_owned();
            }
        }
    }
}

impl Drop for ProxyProcess {
    fn drop(&mut self) {
        self.kill();
    }
}
