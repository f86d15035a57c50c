//! Tests of what can fail only in a SQLite file. `testing::store` tests what every store must do.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationKind, RevocationTarget, StoreWrite};
use crate::model::time::{ManualClock, SystemClock};
use crate::testing::store::{conformance, verify_change_log};

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data/store.db");
    (folder, path)
}

fn open(path: &Path) -> Result<SqliteStore, Error> {
    SqliteStore::open(path, Arc::new(SystemClock))
}

fn kill(id: &str) -> CommitRequest {
    let target = RevocationTarget::Token(id.into());
    CommitRequest {
        writes: vec![StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: String::new() }],
        ..Default::default()
    }
}

/// Changes the file as another program would.
fn tamper(path: &Path, sql: &str) {
    Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passes_the_suite() {
    let folder = tempfile::tempdir().unwrap();
    let stores = std::sync::atomic::AtomicUsize::new(0);
    conformance(async |clock: Arc<ManualClock>| {
        let name = format!("{}.db", stores.fetch_add(1, std::sync::atomic::Ordering::SeqCst));
        Arc::new(SqliteStore::open(&folder.path().join(name), clock).unwrap()) as Arc<dyn Store>
    })
    .await;
}

#[tokio::test]
async fn what_was_committed_is_there_when_opened_again() {
    let (_folder, path) = folder();
    let settings = Settings { iat_skew_s: 5, freshness_bound_ms: 2_000 };
    let store = SqliteStore::open_with(&path, Arc::new(SystemClock), settings).unwrap();
    store.commit(kill("t")).await.unwrap();
    let before = verify_change_log(&store).await;
    assert_eq!(before.settings, settings);
    drop(store);
    assert!(!path.with_extension("db-wal").exists(), "the last to leave closes the log");
    assert_eq!(verify_change_log(&open(&path).unwrap()).await, before, "an existing store keeps its settings");
    let bad = Settings { iat_skew_s: 5, freshness_bound_ms: 500 };
    assert!(matches!(SqliteStore::open_with(&path, Arc::new(SystemClock), bad), Err(Error::Rejected(_))));
}

#[test]
fn only_the_owner_can_read_a_new_store() {
    let (_folder, path) = folder();
    let _store = open(&path).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    assert_eq!(mode(&path.with_extension("db-wal")), 0o600);
}

#[test]
fn other_files_are_refused_and_left_alone() {
    let check = |make: fn(&Path), expected: fn(&Error) -> bool| {
        let (_folder, path) = folder();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        make(&path);
        let before = std::fs::read(&path).ok();
        let error = open(&path).err().unwrap();
        assert!(expected(&error), "{error:?}");
        let message = error.to_string();
        assert!(message.contains("store.db") && !message.contains('\n'), "{message}");
        assert_eq!(std::fs::read(&path).ok(), before);
    };
    check(
        |path| std::fs::write(path, "not a database at all, but long enough to hold a header".repeat(50)).unwrap(),
        |error| matches!(error, Error::NotAStore(_)),
    );
    check(|path| tamper(path, "CREATE TABLE people (name TEXT)"), |error| matches!(error, Error::NotAStore(_)));
    check(|path| tamper(path, "PRAGMA application_id = 77"), |error| matches!(error, Error::NotAStore(_)));
    check(
        |path| {
            drop(open(path).unwrap());
            tamper(path, "PRAGMA user_version = 99");
        },
        |error| matches!(error, Error::NewerVersion(_)),
    );
    check(|path| std::fs::create_dir(path).unwrap(), |error| matches!(error, Error::NotAStore(_)));
    check(|path| drop(std::fs::File::create(path).unwrap()), |error| matches!(error, Error::Missing(_)));
    check(|path| tamper(path, "PRAGMA journal_mode = WAL"), |error| matches!(error, Error::Missing(_)));
}

/// The tables as the first version created them.
const VERSION_1: &str = "
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1), history TEXT NOT NULL, made_unix_ms INTEGER NOT NULL,
    iat_skew_s INTEGER NOT NULL, freshness_bound_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE head (
    id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL, hash BLOB NOT NULL, digest TEXT NOT NULL,
    floor INTEGER NOT NULL, revocations INTEGER NOT NULL, documents_number INTEGER NOT NULL, jtis_forgotten_unix_s INTEGER, spent_forgotten_unix_s INTEGER
) STRICT;
CREATE TABLE documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, json TEXT NOT NULL, path TEXT NOT NULL, line INTEGER NOT NULL,
    origin TEXT NOT NULL CHECK (origin IN ('folder', 'api')), revision INTEGER NOT NULL, PRIMARY KEY (kind, id)
) STRICT;
CREATE TABLE revocations (
    target TEXT PRIMARY KEY, dead INTEGER NOT NULL, suspended INTEGER NOT NULL, watermark_unix_s INTEGER,
    expires_at_unix_s INTEGER, reason TEXT NOT NULL, revision INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX revocations_by_revision ON revocations (revision);
CREATE TABLE log (
    number INTEGER PRIMARY KEY, previous_hash BLOB NOT NULL, hash BLOB NOT NULL, digest TEXT NOT NULL,
    unix_ms INTEGER NOT NULL, changes BLOB NOT NULL
) STRICT;
CREATE TABLE acts (number INTEGER PRIMARY KEY, unix_ms INTEGER NOT NULL, act TEXT NOT NULL) STRICT;
CREATE TABLE act_jtis (jti TEXT PRIMARY KEY, expires_at_unix_s INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX act_jtis_by_expiry ON act_jtis (expires_at_unix_s);
CREATE TABLE spent (key BLOB PRIMARY KEY, expires_at_unix_s INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX spent_by_expiry ON spent (expires_at_unix_s);
PRAGMA application_id = 0x5074636c;
PRAGMA user_version = 1;
";

/// Creates a file of the first version with the rows of a present store, copied table by table.
fn made_by_version_1(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    tamper(to, VERSION_1);
    let copy = |table: &str, columns: &str| format!("INSERT INTO main.{table} SELECT {columns} FROM new.{table};");
    let mut sql = format!("ATTACH '{}' AS new;", from.display());
    for table in ["meta", "head", "documents", "revocations", "acts", "act_jtis", "spent"] {
        sql.push_str(&copy(table, "*"));
    }
    sql.push_str(&copy("log", "number, previous_hash, hash, digest, unix_ms, changes"));
    tamper(to, &sql);
}

fn put(id: &str) -> CommitRequest {
    let key = DocumentKey { kind: "agent".into(), id: id.into() };
    let row = DocumentRow { key, json: "{}".into(), path: String::new(), line: 0, origin: DocumentOrigin::Api };
    CommitRequest { writes: vec![StoreWrite::PutDocument(row)], ..Default::default() }
}

#[tokio::test]
async fn a_store_of_the_first_version_is_brought_up() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    for number in 0..10 {
        store.commit(kill(&format!("t{number} \"document"))).await.unwrap();
        if number % 4 == 0 {
            store.commit(put(&format!("a{number}"))).await.unwrap();
        }
    }
    assert!(store.spend_proof([1; 32], i64::MAX).await.unwrap());
    let (before, history) = (verify_change_log(&store).await, store.policy_history(100).await.unwrap());
    assert_eq!(history.len(), 3);
    drop(store);
    let old = path.with_file_name("old.db");
    made_by_version_1(&path, &old);
    // Several processes may upgrade it at once.
    let openers: Vec<_> = (0..4)
        .map(|_| {
            let old = old.clone();
            std::thread::spawn(move || open(&old).unwrap())
        })
        .collect();
    let stores: Vec<_> = openers.into_iter().map(|opener| opener.join().unwrap()).collect();
    let store = &stores[0];
    assert_eq!((verify_change_log(store).await, store.policy_history(100).await.unwrap()), (before.clone(), history));
    assert!(!store.spend_proof([1; 32], i64::MAX).await.unwrap(), "what was spent stays spent");
    let revision = before.revision.number;
    assert_eq!(store.documents_at(revision).await.unwrap().documents, before.documents);
    assert_eq!(store.commit(put("new")).await.unwrap().revision.number, revision + 1);
    assert_eq!(store.policy_history(1).await.unwrap()[0].number, revision + 1);
    let version: i64 = Connection::open(&old).unwrap().pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(version, schema::SCHEMA_VERSION);
}

#[tokio::test]
async fn a_damaged_store_of_the_first_version_is_left_as_it_was() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    store.commit(put("a")).await.unwrap();
    drop(store);
    let old = path.with_file_name("old.db");
    made_by_version_1(&path, &old);
    tamper(&old, "UPDATE log SET changes = CAST('[{\"document\"' AS BLOB)");
    assert!(matches!(open(&old), Err(Error::Corrupt(_))));
    let version: i64 = Connection::open(&old).unwrap().pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(version, 1);
}

#[tokio::test]
async fn a_history_that_was_cut_is_not_made_up() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    for id in ["a", "b", "c"] {
        store.commit(put(id)).await.unwrap();
    }
    tamper(&path, "UPDATE log SET changes = CAST('[]' AS BLOB) WHERE number = 2");
    assert!(matches!(store.policy_history(10).await, Err(Error::Corrupt(_))));
    assert!(matches!(store.documents_at(3).await, Err(Error::Corrupt(_))));
    tamper(&path, "UPDATE head SET floor = 2; DELETE FROM log WHERE number < 3");
    assert_eq!(store.policy_history(10).await.unwrap().len(), 1);
    assert_eq!(store.documents_at(3).await, Err(Error::BelowFloor { floor: 2 }));
}

#[tokio::test]
async fn a_replaced_file_is_noticed() {
    let check = async |replace: fn(&Path)| {
        let (_folder, path) = folder();
        let store = open(&path).unwrap();
        store.commit(kill("t")).await.unwrap();
        replace(&path);
        let replaced = |error: Option<Error>| assert!(matches!(error, Some(Error::Replaced(_))), "{error:?}");
        replaced(store.changes(1).await.err());
        replaced(store.revision().await.err());
        replaced(store.load().await.err());
        replaced(store.commit(kill("u")).await.err());
        replaced(store.spend_proof([1; 32], i64::MAX).await.err());
    };
    check(|path| std::fs::remove_file(path).unwrap()).await;
    check(|path| {
        std::fs::copy(path, path.with_extension("copy")).unwrap();
        std::fs::rename(path.with_extension("copy"), path).unwrap();
    })
    .await;
}

#[tokio::test]
async fn damage_is_reported() {
    let check = async |sql: &str, in_state: bool, in_log: bool| {
        let (_folder, path) = folder();
        let store = open(&path).unwrap();
        for number in 1..=5 {
            store.commit(kill(&format!("t{number}"))).await.unwrap();
        }
        verify_change_log(&store).await;
        tamper(&path, sql);
        let corrupt = |error: Option<Error>| matches!(error, Some(Error::Corrupt(_)));
        let in_state_seen = match store.load().await {
            Ok(state) => !state.digest_matches(),
            Err(error) => corrupt(Some(error)),
        };
        assert_eq!(in_state_seen, in_state, "{sql}");
        assert_eq!(corrupt(store.changes(2).await.err()), in_log, "{sql}");
    };
    check("DELETE FROM revocations WHERE revision = 2", true, false).await;
    check("UPDATE revocations SET dead = 0 WHERE revision = 2", true, false).await;
    check("UPDATE revocations SET target = '{}' WHERE revision = 2", true, false).await;
    check("UPDATE head SET digest = 'x'", true, true).await;
    check("UPDATE head SET number = 6", true, true).await;
    check("DELETE FROM head", true, true).await;
    check("DELETE FROM log WHERE number = 2", false, true).await;
    check("DELETE FROM log WHERE number = 3", false, true).await;
    check("DELETE FROM log WHERE number = 4", false, true).await;
    check("DELETE FROM log WHERE number = 5", true, true).await;
    check("UPDATE log SET changes = CAST('[]' AS BLOB) WHERE number = 4", false, true).await;
    check("UPDATE log SET changes = CAST('[' AS BLOB) WHERE number = 4", false, true).await;
    check("UPDATE log SET hash = zeroblob(32) WHERE number = 3", false, true).await;
    check("UPDATE log SET hash = zeroblob(3) WHERE number = 3", false, true).await;
    check("UPDATE log SET previous_hash = zeroblob(32) WHERE number = 4", false, true).await;
    check("DROP TABLE log", true, true).await;
}

#[tokio::test]
async fn a_log_that_was_cut_says_where_it_begins() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    for number in 1..=3 {
        store.commit(kill(&format!("t{number}"))).await.unwrap();
    }
    tamper(&path, "UPDATE head SET floor = 2; DELETE FROM log WHERE number < 2");
    assert_eq!(store.changes(1).await, Err(Error::BelowFloor { floor: 2 }));
    assert_eq!(store.changes(2).await.unwrap().commits.len(), 1);
}

#[tokio::test]
async fn two_stores_on_one_file_see_each_other() {
    let (_folder, path) = folder();
    let (server, command) = (Arc::new(open(&path).unwrap()), Arc::new(open(&path).unwrap()));
    assert_eq!(command.commit(kill("t0")).await.unwrap().revision.number, 1);
    assert_eq!(server.changes(0).await.unwrap().commits.len(), 1);
    let racers: Vec<_> = [&server, &command]
        .into_iter()
        .enumerate()
        .flat_map(|(side, store)| (0..20).map(move |turn| (Arc::clone(store), format!("t{side}-{turn}"))))
        .map(|(store, id)| tokio::spawn(async move { store.commit(kill(&id)).await.unwrap().revision.number }))
        .collect();
    let mut numbers = std::collections::BTreeSet::new();
    for racer in racers {
        numbers.insert(racer.await.unwrap());
    }
    assert_eq!(numbers, (2..=41).collect());
    assert_eq!(verify_change_log(&*server).await, verify_change_log(&*command).await);
    assert!(server.spend_proof([1; 32], i64::MAX).await.unwrap());
    assert!(!command.spend_proof([1; 32], i64::MAX).await.unwrap());
}

#[test]
fn many_may_make_the_file_at_once() {
    let (_folder, path) = folder();
    let openers: Vec<_> = (0..8)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || open(&path).unwrap())
        })
        .collect();
    let stores: Vec<_> = openers.into_iter().map(|opener| opener.join().unwrap()).collect();
    let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
    let histories: std::collections::HashSet<_> =
        stores.iter().map(|store| runtime().block_on(store.revision()).unwrap().history).collect();
    assert_eq!(histories.len(), 1);
}

#[test]
fn one_store_serves_several_runtimes() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
    std::thread::scope(|scope| {
        for racer in 0..4 {
            let store = &store;
            scope.spawn(move || runtime().block_on(store.commit(kill(&format!("t{racer}")))).unwrap());
        }
    });
    assert_eq!(runtime().block_on(verify_change_log(&store)).revision.number, 4);
}

#[tokio::test]
async fn who_stops_waiting_undoes_nothing() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    {
        let mut commit = std::pin::pin!(store.commit(kill("t")));
        let asked = std::future::poll_fn(|context| std::task::Poll::Ready(commit.as_mut().poll(context))).await;
        assert!(asked.is_pending());
    }
    drop(store);
    assert_eq!(verify_change_log(&open(&path).unwrap()).await.revocations.len(), 1);
}

#[tokio::test]
async fn a_writer_that_waits_too_long_is_told() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let busy = store.commit(kill("t")).await;
    assert!(matches!(&busy, Err(Error::Unavailable(message)) if message.contains("busy")), "{busy:?}");
    assert_eq!(store.changes(0).await.unwrap().head, 0, "readers do not wait for writers");
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(store.commit(kill("t")).await.unwrap().revision.number, 1);
}

#[tokio::test]
async fn a_full_disk_takes_nothing_half() {
    let (_folder, path) = folder();
    let store = open(&path).unwrap();
    store.commit(kill("t")).await.unwrap();
    let before = verify_change_log(&store).await;
    tamper(&path, "CREATE TRIGGER full BEFORE INSERT ON log BEGIN SELECT raise(ROLLBACK, 'as a full disk does'); END");
    let (one, two) = tokio::join!(store.commit(kill("u")), store.spend_proof([1; 32], i64::MAX));
    assert!(one.is_err(), "{one:?}");
    tamper(&path, "DROP TRIGGER full");
    assert_eq!(verify_change_log(&store).await, before);
    assert_eq!(store.spend_proof([1; 32], i64::MAX).await.unwrap(), two != Ok(true), "spent only if it was said so");
    assert_eq!(store.commit(kill("u")).await.unwrap().revision.number, 2);
}
