//! Backups while others write, names that are taken, and inconsistent stores.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

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

fn open_store(path: &Path) -> SqliteStore {
    SqliteStore::open(path, Arc::new(SystemClock)).unwrap()
}

fn backed_up(store: &Path, to: &Path) -> Result<BackupSummary, BackupError> {
    back_up(store, to, false, &BackupProgress::default())
}

/// Names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_one_whole_view_while_others_write() {
    let folder = tempfile::tempdir().unwrap();
    let (path, to) = (folder.path().join("store.db"), folder.path().join("backups"));
    std::fs::create_dir(&to).unwrap();
    let store = Arc::new(open_store(&path));
    for number in 0..50 {
        store.commit(kill(&format!("t{number}"))).await.unwrap();
    }
    let writing = tokio::spawn({
        let store = store.clone();
        async move {
            for number in 0..200 {
                store.commit(kill(&format!("w{number}"))).await.unwrap();
            }
        }
    });
    let progress = BackupProgress::default();
    let name = to.join("b' \u{fc}.db");
    let made = tokio::task::block_in_place(|| back_up(&path, &name, false, &progress)).unwrap();
    writing.await.unwrap();
    assert!((50..=250).contains(&made.revision.number), "{made:?}");
    assert_eq!((made.rows, made.commits), (made.revision.number, made.revision.number));
    assert_eq!(made.bytes, name.metadata().unwrap().len());
    assert_eq!(name.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(names(&to), ["b' \u{fc}.db"], "nothing is left beside it");
    let (done, total) = progress.verified();
    assert!(done == total && total == 2 * made.revision.number, "{progress:?}");

    // The copy is the store at that time.
    let copy = open_store(&name);
    let state = verify_change_log(&copy).await;
    assert_eq!(state.revision, made.revision);
    let log = |changes: crate::store::ChangeLogPage| changes.commits.into_iter().take(50).collect::<Vec<_>>();
    assert_eq!(log(copy.changes(0).await.unwrap()), log(store.changes(0).await.unwrap()));
    assert_eq!(verify_change_log(&*store).await.revision.number, 250, "and the store goes on");
    assert_eq!(store.commit(kill("after")).await.unwrap().revision.number, 251);
}

#[tokio::test]
async fn a_name_that_is_taken_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = open_store(&path);
    store.commit(kill("t")).await.unwrap();
    let check = |to: &Path, says: &str| {
        for may_overwrite in [false, true] {
            match back_up(&path, to, may_overwrite, &BackupProgress::default()) {
                Err(BackupError::InvalidName(message)) => assert!(message.contains(says), "{message}"),
                other => panic!("{}: {other:?}", to.display()),
            }
        }
    };
    check(&path, "is the store itself");
    std::os::unix::fs::symlink(&path, folder.path().join("link.db")).unwrap();
    check(&folder.path().join("link.db"), "is the store itself");
    check(folder.path(), "no plain file");
    check(Path::new("/"), "names no file");
    let other = open_store(&folder.path().join("other.db"));
    check(&folder.path().join("other.db"), "store in use");
    drop(other);

    for part in ["store.db-wal", "new.db-wal", "new.db-shm", "new.db-journal"] {
        check(&folder.path().join(part), "the name of a part of a store");
        assert_eq!(folder.path().join(part).exists(), part == "store.db-wal", "{part}");
    }

    let to = folder.path().join("backup.db");
    assert_eq!(backed_up(&path, &to).unwrap().revision.number, 1);
    let before = std::fs::read(&to).unwrap();
    assert!(matches!(backed_up(&path, &to), Err(BackupError::InvalidName(message)) if message.contains("--overwrite")));
    assert_eq!(std::fs::read(&to).unwrap(), before);
    store.commit(kill("u")).await.unwrap();
    let made = back_up(&path, &to, true, &BackupProgress::default()).unwrap();
    assert_eq!(made.revision.number, 2);
    assert_eq!(to.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(backed_up(&path, &folder.path().join("no/such/b.db")), Err(BackupError::CopyFailed(_))));
}

/// `--overwrite` replaces an older backup, and nothing else that lies under a mistyped name.
#[tokio::test]
async fn only_a_backup_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = open_store(&path);
    store.commit(kill("t")).await.unwrap();
    let to = folder.path().join("to");
    let check = |content: &[u8], is_backup: bool| {
        std::fs::write(&to, content).unwrap();
        match back_up(&path, &to, true, &BackupProgress::default()) {
            Ok(_) => assert!(is_backup),
            Err(BackupError::InvalidName(message)) => {
                assert!(!is_backup && message.contains("is no backup of a store"), "{message}");
                assert_eq!(std::fs::read(&to).unwrap(), content);
            }
            Err(other) => panic!("{other:?}"),
        }
    };
    check(b"", false);
    check(b"kind: group", false);
    check(&[0; 4096], false);
    let file = folder.path().join("backup.db");
    backed_up(&path, &file).unwrap();
    check(&std::fs::read(&file).unwrap(), true);
    // The same file once it was opened as a store, and was closed again.
    open_store(&file).close().await.unwrap();
    check(&std::fs::read(&file).unwrap(), false);
    let another = folder.path().join("another.db");
    Connection::open(&another).unwrap().execute_batch("CREATE TABLE people (name TEXT)").unwrap();
    check(&std::fs::read(&another).unwrap(), false);
}

/// SQLite would copy the log of the store before into a backup that was put in its place.
#[tokio::test]
async fn a_backup_beside_the_log_of_another_store_is_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (path, backup) = (folder.path().join("store.db"), folder.path().join("backup.db"));
    let store = open_store(&path);
    store.commit(kill("t")).await.unwrap();
    backed_up(&path, &backup).unwrap();
    for number in 0..50 {
        store.commit(kill(&format!("t{number}"))).await.unwrap();
    }
    let log = std::fs::read(folder.path().join("store.db-wal")).unwrap();
    store.close().await.unwrap();
    drop(store);
    // A crash leaves the log, and only the database is put back.
    std::fs::copy(&backup, &path).unwrap();
    std::fs::write(folder.path().join("store.db-wal"), log).unwrap();
    let opened = SqliteStore::open(&path, Arc::new(SystemClock));
    assert!(matches!(&opened, Err(Error::NotAStore(message)) if message.contains("store.db-wal")), "{:?}", opened.err());
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&backup).unwrap());
    std::fs::remove_file(folder.path().join("store.db-wal")).unwrap();
    assert_eq!(verify_change_log(&open_store(&path)).await.revision.number, 1);
}

/// A copy of a store that was in use has a log of its own, so only the damage shows that the log beside it is another.
#[tokio::test]
async fn a_damaged_store_with_a_log_says_what_may_have_happened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = open_store(&path);
    store.commit(kill("t")).await.unwrap();
    let log = std::fs::read(folder.path().join("store.db-wal")).unwrap();
    store.close().await.unwrap();
    drop(store);
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("UPDATE head SET hash = zeroblob(32); PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    connection.close().unwrap();
    let says = |expected: bool| {
        let opened = SqliteStore::open(&path, Arc::new(SystemClock)).err();
        match &opened {
            Some(Error::Corrupt(message)) => assert_eq!(message.contains("put the copy back again"), expected, "{message}"),
            _ => panic!("{opened:?}"),
        }
    };
    says(false);
    // SQLite takes no frame of a log whose checksums do not fit, and goes on with the database alone.
    let torn: Vec<u8> = log.iter().map(|byte| byte ^ 1).collect();
    std::fs::write(folder.path().join("store.db-wal"), torn).unwrap();
    says(true);
}

#[tokio::test]
async fn what_does_not_hold_together_is_not_backed_up() {
    let check = async |sql: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = open_store(&path);
        for number in 0..5 {
            store.commit(kill(&format!("t{number}"))).await.unwrap();
        }
        store.close().await.unwrap();
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        let to = folder.path().join("to");
        std::fs::create_dir(&to).unwrap();
        let made = backed_up(&path, &to.join("b.db"));
        assert!(matches!(made, Err(BackupError::CopyFailed(_) | BackupError::Store(Error::Corrupt(_)))), "{sql}: {made:?}");
        assert_eq!(names(&to), [""; 0], "{sql}");
    };
    check("DELETE FROM revocations WHERE revision = 2").await;
    check("UPDATE revocations SET reason = 'another' WHERE revision = 2").await;
    check("DELETE FROM log WHERE number = 3").await;
    check("DELETE FROM log WHERE number = 1").await;
    check("UPDATE log SET changes = CAST('[]' AS BLOB) WHERE number = 4").await;
    check("UPDATE log SET unix_ms = 1, previous_hash = zeroblob(32) WHERE number = 4").await;
    check("UPDATE head SET number = 6").await;
    check("UPDATE head SET hash = zeroblob(32)").await;
}

#[test]
fn what_is_no_store_is_not_backed_up() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to.db");
    let made = backed_up(&folder.path().join("nothing.db"), &to);
    assert!(matches!(made, Err(BackupError::Store(Error::Missing(_)))), "{made:?}");
    std::fs::write(folder.path().join("empty.db"), "").unwrap();
    let made = backed_up(&folder.path().join("empty.db"), &to);
    assert!(matches!(made, Err(BackupError::Store(Error::Missing(_)))), "{made:?}");
    assert_eq!(names(folder.path()), ["empty.db"]);
}
