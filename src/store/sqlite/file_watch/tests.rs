//! Which changes to the files of an open store are detected, and which are no change of the store.

use std::sync::Arc;
use std::time::Instant;

use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::model::rows::{RevocationKind, RevocationTarget, StoreWrite};
use crate::model::time::SystemClock;
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
