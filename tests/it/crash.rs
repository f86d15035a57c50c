//! Acknowledged commits survive: a process that writes is killed at random moments, a few hundred times, and no commit is lost.
//!
//! A kill ends the process, not the machine. The test shows that a commit is handed to the disk before it is acknowledged, in
//! order, and that a file left in any state opens again. It does not show that the disk keeps the data.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use portcullis::model::rows::{RevocationKind, RevocationTarget, RowChange, StoreWrite};
use portcullis::model::time::SystemClock;
use portcullis::store::hash_chain::{GENESIS, state_digest};
use portcullis::store::sqlite::SqliteStore;
use portcullis::store::{CommitRequest, Store};

const KILLS: u64 = 300;
/// Most acknowledgements before a kill.
const ACKNOWLEDGED_MAX: u64 = 8;
/// Longest additional wait, so that the kill falls anywhere within a write.
const DELAY_US_MAX: u64 = 4_000;
/// Longest wait before any acknowledgement. A first start and a new process take longer.
const START_US_MAX: u64 = 60_000;
/// Commits in flight at the same time.
const WRITERS: usize = 3;
/// The variable that names the file for the child. Without it the child does nothing.
const PATH_VARIABLE: &str = "PORTCULLIS_TEST_CRASH_STORE";
const ID_VARIABLE: &str = "PORTCULLIS_TEST_CRASH_ROUND";

#[tokio::test]
async fn what_was_acknowledged_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let seed = RandomState::new().build_hasher().finish() | 1;
    println!("seed {seed}");
    let mut random = RandomNumbers(seed);
    let mut acknowledged = BTreeMap::new();
    let mut verified = (0, GENESIS);
    for round in 0..KILLS {
        let new = write_and_kill(&path, round, &mut random);
        let store = SqliteStore::open(&path, Arc::new(SystemClock)).unwrap();
        let found = verify_log(&store, &mut verified).await;
        for (number, id) in &new {
            assert_eq!(found.get(number), Some(id), "round {round}: revision {number} was acknowledged");
        }
        acknowledged.extend(new);
    }
    assert!(acknowledged.len() as u64 > KILLS, "the writers got to write: {}", acknowledged.len());
    let store = SqliteStore::open(&path, Arc::new(SystemClock)).unwrap();
    let state = store.load().await.unwrap();
    assert_eq!(state.digest, state_digest(&state.documents, &state.revocations));
    let mut whole = (0, GENESIS);
    let found = verify_log(&store, &mut whole).await;
    assert_eq!((whole, whole), ((state.revision.number, state.hash), verified));
    assert_eq!(found.len(), state.revocations.len());
    for row in &state.revocations {
        let RevocationTarget::Token(id) = &row.target else { panic!("{}", row.target) };
        assert!(row.dead && found.get(&row.revision) == Some(id));
    }
    assert!(acknowledged.iter().all(|(number, id)| found.get(number) == Some(id)));
}

/// The process that is killed: it commits without end, and reports each commit.
#[tokio::test]
async fn writer_child() {
    let (Ok(path), Ok(round)) = (std::env::var(PATH_VARIABLE), std::env::var(ID_VARIABLE)) else { return };
    let store = Arc::new(SqliteStore::open(Path::new(&path), Arc::new(SystemClock)).unwrap());
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (store, round) = (Arc::clone(&store), round.clone());
            tokio::spawn(async move {
                for turn in 0..10_000 {
                    let id = format!("{round}-{writer}-{turn}");
                    let target = RevocationTarget::Token(id.clone());
                    let write = StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: "leaked".into() };
                    let request = CommitRequest { writes: vec![write], ..CommitRequest::default() };
                    let number = store.commit(request).await.unwrap().revision.number;
                    // `println!` is not used, because the harness would capture it. The write fails once nobody reads, which ends
                    // the process.
                    let mut out = std::io::stdout().lock();
                    out.write_all(format!("\nack {number} {id}\n").as_bytes()).unwrap();
                    out.flush().unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

/// Starts a writer and kills it; returns the commits that it had acknowledged.
fn write_and_kill(path: &Path, round: u64, random: &mut RandomNumbers) -> BTreeMap<u64, String> {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::writer_child", "--nocapture", "--test-threads=1"])
        .env(PATH_VARIABLE, path)
        .env(ID_VARIABLE, round.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut child = ChildGuard(child);
    let mut lines = BufReader::new(child.0.stdout.take().unwrap());
    let mut acknowledged = BTreeMap::new();
    let wanted = random.below(ACKNOWLEDGED_MAX);
    while (acknowledged.len() as u64) < wanted {
        assert!(read_one(&mut lines, &mut acknowledged), "round {round}: the writer ended by itself");
    }
    std::thread::sleep(Duration::from_micros(random.below(if wanted == 0 { START_US_MAX } else { DELAY_US_MAX })));
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    while read_one(&mut lines, &mut acknowledged) {}
    acknowledged
}

/// Reads one line; `false` at the end, and for a line that the kill truncated.
fn read_one(lines: &mut impl BufRead, acknowledged: &mut BTreeMap<u64, String>) -> bool {
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    if !line.ends_with('\n') {
        return false;
    }
    if let Some((number, id)) = line.trim_end().strip_prefix("ack ").and_then(|rest| rest.split_once(' ')) {
        assert_eq!(acknowledged.insert(number.parse().unwrap(), id.to_owned()), None);
    }
    true
}

/// Follows the change log from its verified position to its end, with dense numbers and chained hashes. Returns the
/// session that each revision revoked.
async fn verify_log(store: &SqliteStore, verified: &mut (u64, [u8; 32])) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    loop {
        let changes = store.changes(verified.0).await.unwrap();
        assert!(changes.head >= verified.0, "the store fell back from {} to {}", verified.0, changes.head);
        if changes.commits.is_empty() {
            assert_eq!(changes.head, verified.0);
            return found;
        }
        for commit in changes.commits {
            commit.verify_after(verified.0, &verified.1).unwrap();
            *verified = (commit.number, commit.hash);
            let [RowChange::Revocation(row)] = commit.changes.as_slice() else { panic!("{:?}", commit.changes) };
            let RevocationTarget::Token(id) = &row.target else { panic!("{}", row.target) };
            found.insert(commit.number, id.clone());
        }
    }
}

/// A child process that is killed on drop, however the test ends.
struct ChildGuard(Child);

impl Drop for ChildGuard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// xorshift64, repeatable from the printed seed.
struct RandomNumbers(u64);

impl RandomNumbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
