//! Which changes to the files of an open store are detected, and which are no change of the store.

use std::sync::Arc;
use std::time::Instant;

use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::model::limits::REVOCATION_RETENTION_S;
use crate::model::rows::{ActRow, RevocationKind, RevocationTarget, StoreWrite};
use crate::model::time::{ManualClock, SystemClock};
use crate::store::sqlite::SqliteStore;
use crate::store::{CommitRequest, Store};
use crate::testing::store::verify_change_log;

fn kill(id: &str) -> CommitRequest {
    let target = RevocationTarget::Token(id.into());
    CommitRequest {
        writes: vec![StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: String::new() }],
        ..Default::default()
    }
}

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, Arc::new(SystemClock)).unwrap()
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Writes to the file as another program does. The store then reads the whole file to find out whether it is still the same.
fn sql(path: &Path, sql: &str) {
    Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

/// A store whose file holds a revocation, an older copy of the file beside it, and another store.
struct FilesFixture {
    folder: TempDir,
    store: SqliteStore,
}

impl FilesFixture {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join("files");
        let path = files.join("store.db");
        let store = open(&path);
        store.commit(kill("first")).await.unwrap();
        drop(store);
        std::fs::copy(&path, folder.path().join("older.db")).unwrap();
        let other = open(&folder.path().join("other.db"));
        other.commit(kill("another")).await.unwrap();
        drop(other);
        let store = open(&path);
        for number in 0..200 {
            store.commit(kill(&format!("later-{number}"))).await.unwrap();
        }
        // Runs a checkpoint as the program does, but now.
        store.load_worker.run_checkpoint().await.unwrap();
        store.commit(kill("newest")).await.unwrap();
        assert_eq!(store.changes(0).await.unwrap().head, 202);
        Self { folder, store }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("files/store.db")
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        beside(&self.path(), suffix)
    }
}

#[tokio::test]
async fn files_that_are_not_those_that_were_opened_acknowledge_nothing() {
    type TamperStep = fn(&FilesFixture);
    let check = async |what: &str, act: TamperStep| {
        for reads_first in [false, true] {
            let files = FilesFixture::new().await;
            act(&files);
            let store = &files.store;
            let replaced = |error: Option<Error>| {
                let message = match &error {
                    Some(Error::Replaced(message)) => message,
                    other => panic!("{what}: {other:?}"),
                };
                assert!(message.contains("store.db") && message.contains("put the right files back"), "{what}: {message}");
                assert!(!message.contains('\n'), "{what}: {message}");
            };
            if reads_first {
                replaced(store.changes(202).await.err());
            }
            replaced(store.commit(kill("lost")).await.err());
            replaced(store.spend_proof([1; 32], i64::MAX).await.err());
            replaced(store.changes(202).await.err());
            replaced(store.revision().await.err());
            replaced(store.load().await.err());
        }
    };
    check("rm of -wal", |files| std::fs::remove_file(files.beside("-wal")).unwrap()).await;
    check("rm of -shm", |files| std::fs::remove_file(files.beside("-shm")).unwrap()).await;
    check("rm of -wal and -shm", |files| {
        for suffix in ["-wal", "-shm"] {
            std::fs::remove_file(files.beside(suffix)).unwrap();
        }
    })
    .await;
    check("rm of the database", |files| std::fs::remove_file(files.path()).unwrap()).await;
    check("mv of the database", |files| std::fs::rename(files.path(), files.beside(".moved")).unwrap()).await;
    check("another -wal", |files| {
        std::fs::copy(files.beside("-wal"), files.beside("-wal.copy")).unwrap();
        std::fs::rename(files.beside("-wal.copy"), files.beside("-wal")).unwrap();
    })
    .await;
    check("an older file written over it", |files| {
        std::fs::copy(files.folder.path().join("older.db"), files.path()).unwrap();
    })
    .await;
    check("another store written over it", |files| {
        std::fs::copy(files.folder.path().join("other.db"), files.path()).unwrap();
    })
    .await;
    check("another store in its place", |files| {
        std::fs::rename(files.folder.path().join("other.db"), files.path()).unwrap();
    })
    .await;
    check("truncated to nothing", |files| drop(std::fs::File::create(files.path()).unwrap())).await;
    check("cut in half", |files| {
        let file = std::fs::OpenOptions::new().write(true).open(files.path()).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2 / 4096 * 4096).unwrap();
    })
    .await;
    check("-wal truncated to nothing", |files| drop(std::fs::File::create(files.beside("-wal")).unwrap())).await;
    check("text written over it", |files| std::fs::write(files.path(), "no database ".repeat(10_000)).unwrap()).await;
    check("the folder moved away", |files| {
        std::fs::rename(files.path().parent().unwrap(), files.folder.path().join("gone")).unwrap();
    })
    .await;
    check("the folder moved, and another in its place", |files| {
        let folder = files.path().parent().unwrap().to_owned();
        std::fs::rename(&folder, files.folder.path().join("gone")).unwrap();
        std::fs::create_dir(&folder).unwrap();
        std::fs::copy(files.folder.path().join("older.db"), files.path()).unwrap();
    })
    .await;
    check("restored as rsync does: a new file renamed over it", |files| {
        std::fs::copy(files.folder.path().join("older.db"), files.path().with_file_name(".store.db.Xa01")).unwrap();
        std::fs::rename(files.path().with_file_name(".store.db.Xa01"), files.path()).unwrap();
    })
    .await;
}

#[tokio::test]
async fn what_is_no_change_of_the_store_is_none() {
    let files = FilesFixture::new().await;
    let (store, path) = (&files.store, files.path());
    let before = verify_change_log(store).await;
    let mut number = before.revision.number;
    let mut check = async |what: &str| {
        number += 1;
        assert_eq!(store.changes(number - 1).await.unwrap().head, number - 1, "{what}");
        assert_eq!(store.commit(kill(&format!("t{number}"))).await.unwrap().revision.number, number, "{what}");
        assert_eq!(store.changes(number - 1).await.unwrap().commits.len(), 1, "{what}");
        assert_eq!(verify_change_log(&open(&path)).await, verify_change_log(store).await, "{what}");
    };
    check("nothing").await;
    store.load_worker.run_checkpoint().await.unwrap();
    check("a checkpoint of its own").await;
    for mode in ["PASSIVE", "FULL", "RESTART", "TRUNCATE"] {
        let checkpoint = format!("PRAGMA wal_checkpoint({mode})");
        Connection::open(&path).unwrap().query_row(&checkpoint, (), |_| Ok(())).unwrap();
        check(mode).await;
    }
    sql(&path, "VACUUM");
    check("a vacuum by another program").await;
    let touched = std::fs::File::options().write(true).open(&path).unwrap();
    touched.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    // Not closed here, because closing would release this process's locks on the file.
    std::mem::forget(touched);
    check("another time of change").await;
    std::fs::hard_link(&path, beside(&path, ".link")).unwrap();
    check("another name").await;
    std::fs::copy(&path, beside(&path, ".copy")).unwrap();
    check("a copy was made").await;
    for round in 0..20 {
        for turn in 0..20 {
            store.commit(kill(&format!("r{round}-{turn}"))).await.unwrap();
        }
        let other = open(&path);
        other.commit(kill(&format!("o{round}"))).await.unwrap();
        other.load_worker.run_checkpoint().await.unwrap();
        drop(other);
        assert!(store.changes(u64::MAX >> 1).await.is_ok());
        store.load_worker.run_checkpoint().await.unwrap();
    }
    assert_eq!(verify_change_log(&open(&path)).await, verify_change_log(store).await);
}

/// A store of five revisions that makes no checkpoint by itself, because its clock stands still.
async fn store_of_five(path: &Path) -> SqliteStore {
    let store = SqliteStore::open(path, Arc::new(ManualClock::at_unix_s(1_800_000_000))).unwrap();
    for number in 1..=5 {
        store.commit(kill(&format!("t{number}"))).await.unwrap();
    }
    store
}

/// Asserts that the store was found to be another one, and what was seen.
fn assert_replaced(error: Option<Error>, seen: &str) {
    match &error {
        Some(Error::Replaced(message)) => {
            assert!(message.contains(seen) && message.contains("store.db"), "{seen}: {message}");
            assert!(message.contains("put the right files back") && !message.contains('\n'), "{message}");
        }
        other => panic!("{seen}: {other:?}"),
    }
}

/// Asserts that the store is never used again.
async fn assert_quarantined(store: &SqliteStore, seen: &str, is_read_first: bool) {
    if is_read_first {
        assert_replaced(store.changes(5).await.err(), seen);
    }
    assert_replaced(store.commit(kill("lost")).await.err(), seen);
    assert_replaced(store.spend_proof([1; 32], i64::MAX).await.err(), seen);
    assert_replaced(store.changes(5).await.err(), seen);
    assert_replaced(store.revision().await.err(), seen);
    assert_replaced(store.load().await.err(), seen);
}

const SET_BACK: &str = "DELETE FROM log WHERE number > 3;
    UPDATE head SET number = 3, hash = (SELECT hash FROM log WHERE number = 3)";

/// Whatever made the head fall: nothing is written after it, and the store stays refused when the head is back.
#[tokio::test]
async fn a_head_that_falls_or_forks_acknowledges_nothing() {
    let check = async |change: &str, seen: &str| {
        for is_read_first in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store.db");
            let store = store_of_five(&path).await;
            sql(&path, "CREATE TABLE kept AS SELECT number, hash FROM head");
            sql(&path, change);
            assert_quarantined(&store, seen, is_read_first).await;
            let found = "SELECT (SELECT count(*) FROM spent) + (SELECT count(*) FROM revocations WHERE target LIKE '%lost%')";
            let written: i64 = Connection::open(&path).unwrap().query_row(found, (), |row| row.get(0)).unwrap();
            assert_eq!(written, 0, "{change}");
            sql(&path, "UPDATE head SET (number, hash) = (SELECT number, hash FROM kept)");
            assert_quarantined(&store, seen, is_read_first).await;
        }
    };
    check(SET_BACK, "fell from revision 5 to 3").await;
    check("UPDATE head SET hash = zeroblob(32)", "another revision 5").await;
    check("UPDATE log SET hash = zeroblob(32) WHERE number = 5; UPDATE head SET number = 6", "another revision 5").await;
}

/// Another process did not see the fall and went on from the older head, so the number is high enough again.
#[tokio::test]
async fn a_head_that_rose_on_another_branch_acknowledges_nothing() {
    for is_read_first in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = store_of_five(&path).await;
        sql(&path, SET_BACK);
        let other = open(&path);
        for number in 4..=6 {
            assert_eq!(other.commit(kill(&format!("other-{number}"))).await.unwrap().revision.number, number);
        }
        assert_quarantined(&store, "another revision 5", is_read_first).await;
    }
}

/// An older copy of `-shm` hides the newest part of the log. A commit after it would overwrite that part.
#[tokio::test]
async fn an_older_shm_loses_no_acknowledged_commit() {
    use std::os::unix::fs::FileExt as _;
    for is_read_first in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = SqliteStore::open(&path, Arc::new(ManualClock::at_unix_s(1_800_000_000))).unwrap();
        for number in 1..=3 {
            store.commit(kill(&format!("t{number}"))).await.unwrap();
        }
        let older = std::fs::read(beside(&path, "-shm")).unwrap();
        for number in 4..=5 {
            store.commit(kill(&format!("t{number}"))).await.unwrap();
        }
        // Written in place, because the process would end if the mapped file became shorter for a moment.
        let memory = std::fs::File::options().write(true).open(beside(&path, "-shm")).unwrap();
        memory.write_all_at(&older, 0).unwrap();
        assert_quarantined(&store, "fell from revision 5 to 3", is_read_first).await;
        drop(store);
        drop(memory);
        let again = open(&path);
        assert_eq!(again.changes(0).await.unwrap().commits.len(), 5, "all that was acknowledged is there");
        assert_eq!(verify_change_log(&again).await.revision.number, 5);
        assert_eq!(again.commit(kill("t6")).await.unwrap().revision.number, 6);
    }
}

/// Commits of another process, an adoption, a prune and a log that was cut all leave the head higher.
#[tokio::test]
async fn a_head_that_rises_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let clock = Arc::new(ManualClock::at_unix_s(1_800_000_000));
    let store = SqliteStore::open(&path, clock.clone()).unwrap();
    let other = SqliteStore::open(&path, clock.clone()).unwrap();
    let commit = async |store: &SqliteStore, request: CommitRequest| store.commit(request).await.unwrap().revision;
    assert_eq!(commit(&store, kill("t1")).await.number, 1);
    assert_eq!(commit(&other, kill("t2")).await.number, 2);
    assert_eq!(store.changes(1).await.unwrap().commits.len(), 1);
    assert_eq!(commit(&other, kill("t3")).await.number, 3);
    let before = commit(&store, kill("t4")).await;
    let act = ActRow {
        operators: vec!["alice".into()],
        keys: vec!["key of alice".into()],
        method: "/portcullis.v1.Admin/Adopt".into(),
        signatures: vec!["e30.e30.c2ln".into()],
        jtis: vec![("j".to_owned(), 1_800_000_060)],
        reason: "restored".into(),
    };
    let writes = vec![StoreWrite::Adopt { reason: "restored".into() }];
    let adopted = commit(&other, CommitRequest { writes, act: Some(act), ..CommitRequest::default() }).await;
    assert_eq!(adopted.number, 5);
    assert_ne!(adopted.history, before.history);
    assert_eq!(store.revision().await.unwrap(), adopted);
    assert_eq!(store.load().await.unwrap().revision, adopted);
    assert_eq!(commit(&store, kill("t6")).await.number, 6);
    clock.advance_ms((REVOCATION_RETENTION_S + 3_600) * 1_000);
    let writes = vec![StoreWrite::Prune { before_unix_s: i64::MAX, rows_max: 100 }];
    assert_eq!(commit(&other, CommitRequest { writes, ..CommitRequest::default() }).await.number, 7);
    assert_eq!(store.changes(6).await.unwrap().commits.len(), 1);
    assert_eq!(verify_change_log(&store).await.revision.number, 7);
    // The log no longer holds the newest revision that `store` knows.
    assert_eq!(commit(&other, kill("t8")).await.number, 8);
    sql(&path, "UPDATE head SET floor = 8; DELETE FROM log WHERE number < 8");
    assert_eq!(commit(&store, kill("t9")).await.number, 9);
    assert_eq!(commit(&other, kill("t10")).await.number, 10);
}

/// Little is missing from the file after a crash, and from a copy of the file alone: each commit reaches the file soon.
#[tokio::test]
async fn what_was_committed_is_soon_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = open(&path);
    let until = Instant::now() + Duration::from_secs(30);
    let in_the_file = |id: &str| {
        let copy = folder.path().join("copy.db");
        std::fs::copy(&path, &copy).unwrap();
        let found = Connection::open(&copy).unwrap().query_row("SELECT count(*) FROM log", (), |row| row.get::<_, i64>(0));
        let _ = std::fs::remove_file(&copy);
        assert!(Instant::now() < until, "{id} is not in the file");
        found.unwrap()
    };
    assert_eq!(in_the_file("nothing"), 0, "even a new one is whole");
    store.commit(kill("t")).await.unwrap();
    while in_the_file("t") == 0 {
        // A running server writes heartbeats all the time.
        store.spend_proof(rand(), i64::MAX).await.unwrap();
        tokio::task::yield_now().await;
    }
}

fn rand() -> [u8; 32] {
    let mut key = [0; 32];
    key[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    key
}

/// Two checkpoints at once, a log that is truncated when it restarts, and a load without a pause: none of them looks like a
/// replaced file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_without_a_pause_is_no_change_of_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = Arc::new(open(&path));
    let reason = "r".repeat(1_000);
    let commits = |turn: usize| {
        let (store, reason) = (store.clone(), reason.clone());
        async move {
            for number in 0..40 {
                let revoke = |row| StoreWrite::Revoke {
                    target: RevocationTarget::Token(format!("{turn}-{number}-{row}")),
                    kind: RevocationKind::Dead,
                    reason: reason.clone(),
                };
                let request = CommitRequest { writes: (0..500).map(revoke).collect(), ..CommitRequest::default() };
                store.commit(request).await.unwrap();
            }
        }
    };
    let writers = [tokio::spawn(commits(0)), tokio::spawn(commits(1))];
    while !writers.iter().all(tokio::task::JoinHandle::is_finished) {
        store.load_worker.run_checkpoint().await.unwrap();
        store.poll_worker.run_checkpoint().await.unwrap();
        store.changes(u64::MAX >> 1).await.unwrap();
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(verify_change_log(&*store).await.revision.number, 80);
    assert!(store.files.log_bytes() > 0);
}
