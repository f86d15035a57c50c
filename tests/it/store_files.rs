//! Changes to the files of a SQLite store while a server runs on it: by hand, by a backup tool or by a script.
//!
//! Every case changes the files of a running server, then revokes through that server and through another process with `--store`.
//! Every acknowledged revocation must be found at the path, and the server must permit no revoked session, before its next start
//! and after it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::harness::{CommandResult, PATIENCE, ServerProcess, TestChain, TestWorld, binary, request, run_with};

/// A server with the files of its store, an older copy and another store.
struct StoreFilesFixture {
    world: TestWorld,
    server: ServerProcess,
}

impl StoreFilesFixture {
    async fn new(is_copied_to_the_file: bool) -> Self {
        let world = TestWorld::new();
        // The other store has files of its own, which this process does not open.
        let mut other =
            ServerProcess::start_at(&world, binary().arg("--policies").arg(world.policies()), &world.folder.path().join("b"));
        other.terminate();
        assert!(other.wait().success());
        let mut server = ServerProcess::start(&world);
        assert_eq!(reason(&server, &world.session("alpha", "old")).await, "OK");
        server.terminate();
        assert!(server.wait().success());
        let rig_data = world.data();
        std::fs::copy(rig_data.join("store.db"), world.folder.path().join("older.db")).unwrap();
        std::fs::copy(rig_data.join("local.jwk"), world.folder.path().join("operator.jwk")).unwrap();
        let server = ServerProcess::start_with(&world, &binary());
        let rig = Self { world, server };
        for session in ["old", "old-2", "old-3"] {
            rig.revoke(session).ended(0);
        }
        let until = Instant::now() + PATIENCE;
        while is_copied_to_the_file && !holds(&rig.copy_of_the_file(), "old-3") {
            assert!(Instant::now() < until, "the file never holds what was committed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        rig
    }

    fn path(&self) -> PathBuf {
        self.world.data().join("store.db")
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        self.world.data().join(format!("store.db{suffix}"))
    }

    fn older(&self) -> PathBuf {
        self.world.folder.path().join("older.db")
    }

    /// A copy of the database file alone.
    fn copy_of_the_file(&self) -> PathBuf {
        let copy = self.world.folder.path().join("copy.db");
        std::fs::copy(self.path(), &copy).unwrap();
        copy
    }

    /// Revokes through the server.
    fn revoke(&self, session: &str) -> CommandResult {
        let mut command = binary();
        command.args(["--json", "revoke", "session", session, "--unknown-ok", "--target"]).arg(self.server.admin_url());
        run_with(command.arg("--operator-key").arg(self.key()), "")
    }

    /// A copy of the key, because the data folder may be another one by then.
    fn key(&self) -> PathBuf {
        self.world.folder.path().join("operator.jwk")
    }

    /// Revokes with a process that opens the store itself.
    fn revoke_directly(&self, session: &str) -> CommandResult {
        let store = format!("sqlite:{}", self.path().display());
        let mut command = binary();
        command
            .args(["--json", "revoke", "session", session, "--unknown-ok", "--store", &store, "--operator-key"])
            .arg(self.key());
        let data = self.world.folder.path().join("elsewhere");
        std::fs::create_dir_all(&data).unwrap();
        run_with(command.arg("--data").arg(data), "")
    }
}

/// Overwrites the file in place, as `cp` does.
fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap();
}

async fn reason(server: &ServerProcess, chain: &TestChain) -> String {
    let asked = request(chain, Bytes::new(), "crm/look", "{}");
    server.connect().await.check(asked).await.unwrap().into_inner().reason
}

/// Whether a program that opens the path finds the session revoked.
fn holds(path: &Path, session: &str) -> bool {
    let count = |path: &Path| {
        let connection = rusqlite::Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let sql = "SELECT count(*) FROM revocations WHERE target LIKE ?1 AND dead = 1";
        connection.query_row(sql, [format!("%\"{session}\"%")], |row| row.get::<_, i64>(0))
    };
    count(path).is_ok_and(|count| count == 1)
}

async fn check(is_copied_to_the_file: bool, act: impl FnOnce(&StoreFilesFixture)) {
    check_or_followed(is_copied_to_the_file, act, false).await;
}

/// `may_follow`: the remaining files may hold all data. Then the server may keep following them, correctly.
async fn check_or_followed(is_copied_to_the_file: bool, act: impl FnOnce(&StoreFilesFixture), may_follow: bool) {
    let rig = StoreFilesFixture::new(is_copied_to_the_file).await;
    let chains = ["live", "by-server", "by-store", "old"].map(|session| rig.world.session("alpha", session));
    let [live, by_server, by_store, old] = &chains;
    assert_eq!(reason(&rig.server, live).await, "OK");
    act(&rig);

    // At once, before a poll can have detected the change.
    let through = rig.revoke("by-server");
    if through.code == 0 {
        assert!(holds(&rig.path(), "by-server"), "acknowledged into nothing: {through:?}");
    } else {
        assert!(through.stderr.contains("store.db"), "it says what happened: {through:?}");
    }
    let directly = rig.revoke_directly("by-store");
    if directly.code == 0 {
        assert!(holds(&rig.path(), "by-store"), "acknowledged into nothing: {directly:?}");
    }

    let until = Instant::now() + PATIENCE;
    let is_followed = loop {
        if rig.server.get("/readyz").1.contains("quarantined") {
            break false;
        }
        if may_follow && reason(&rig.server, by_store).await == "REVOKED_SESSION" {
            break true;
        }
        assert!(Instant::now() < until, "{:?} {}", rig.server.get("/readyz"), rig.server.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    if is_followed {
        assert_eq!((through.code, directly.code), (0, 0), "{through:?} {directly:?}");
        assert_eq!(reason(&rig.server, live).await, "OK");
        assert_eq!(reason(&rig.server, by_server).await, "REVOKED_SESSION");
    } else {
        assert_eq!(rig.server.get("/readyz").0, 503);
        for chain in &chains {
            assert_ne!(reason(&rig.server, chain).await, "OK", "everything is denied");
        }
        // The state stays: nothing is acknowledged any more.
        let again = rig.revoke("by-server-again");
        assert_ne!(again.code, 0, "{again:?}");
        assert!(again.stderr.contains("put the right files back"), "{again:?}");
    }
    assert_ne!(reason(&rig.server, old).await, "OK");

    let StoreFilesFixture { world, mut server } = rig;
    server.terminate();
    let ended = server.wait();
    // With the folder, its audit files went. The server continues in new ones, unless it notices only at its end: then it says so.
    let is_audit_lost = server.log().contains("the audit log ended badly");
    assert_eq!(ended.code(), Some(i32::from(is_audit_lost)), "{}", server.log());
    assert!(!is_audit_lost || world.folder.path().join("moved").exists(), "{}", server.log());
    // The end of the server has not undone the writes of others.
    if directly.code == 0 {
        assert!(holds(&world.data().join("store.db"), "by-store"), "undone by the end of the server");
    }
    // If the files hold at least the recorded position, the next start continues with the writes of others; otherwise it is
    // refused.
    let is_known = world.data().join("place.json").exists();
    match ServerProcess::try_start_at(&world, &binary(), &world.data()) {
        Ok(server) => {
            // If the whole folder is another one, with its position file, the start is a new beginning, because nothing can show
            // the change.
            if is_known {
                assert_eq!(reason(&server, old).await, "REVOKED_SESSION");
            }
            for (ran, chain) in [(&through, by_server), (&directly, by_store)] {
                assert!(ran.code != 0 || reason(&server, chain).await == "REVOKED_SESSION", "{ran:?}");
            }
        }
        Err(code) => assert!(!is_followed && matches!(code, Some(78 | 1)), "{code:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_removed() {
    check(true, |rig| std::fs::remove_file(rig.beside("-wal")).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shared_memory_is_removed() {
    check(true, |rig| std::fs::remove_file(rig.beside("-shm")).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_are_removed() {
    let act = |rig: &StoreFilesFixture| {
        std::fs::remove_file(rig.beside("-wal")).unwrap();
        std::fs::remove_file(rig.beside("-shm")).unwrap();
    };
    check(true, act).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_removed() {
    check(false, |rig| std::fs::remove_file(rig.path()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_moved_away() {
    check(true, |rig| std::fs::rename(rig.path(), rig.beside(".moved")).unwrap()).await;
}

/// The log may still hold all that the older file lacks. Together they are complete until a checkpoint and a heartbeat have run.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_file_is_copied_over_and_the_log_is_left() {
    let act = |rig: &StoreFilesFixture| copy(&rig.older(), &rig.path());
    check_or_followed(false, act, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_file_is_copied_over_and_the_log_removed() {
    let act = |rig: &StoreFilesFixture| {
        std::fs::copy(rig.older(), rig.path()).unwrap();
        std::fs::remove_file(rig.beside("-wal")).unwrap();
    };
    check(true, act).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_file_is_copied_over_with_a_log_begun_anew() {
    let act = |rig: &StoreFilesFixture| {
        // Another program copies the log into the file; then the older file replaces it.
        let connection = rusqlite::Connection::open(rig.path()).unwrap();
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", (), |_| Ok(())).unwrap();
        drop(connection);
        std::fs::copy(rig.older(), rig.path()).unwrap();
    };
    check(true, act).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_store_is_copied_over() {
    let act = |rig: &StoreFilesFixture| copy(&rig.world.folder.path().join("b/store.db"), &rig.path());
    check(true, act).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_store_is_renamed_over() {
    let act = |rig: &StoreFilesFixture| std::fs::rename(rig.world.folder.path().join("b/store.db"), rig.path()).unwrap();
    check(true, act).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_truncated() {
    check(true, |rig| drop(std::fs::File::create(rig.path()).unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_folder_is_moved_and_replaced() {
    let act = |rig: &StoreFilesFixture| {
        std::fs::rename(rig.world.data(), rig.world.folder.path().join("moved")).unwrap();
        std::fs::create_dir(rig.world.data()).unwrap();
        std::fs::copy(rig.older(), rig.path()).unwrap();
    };
    check(true, act).await;
}

/// Restores as rsync does: a new file takes the name.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_file_is_renamed_over() {
    let act = |rig: &StoreFilesFixture| {
        std::fs::copy(rig.older(), rig.beside(".Xa01")).unwrap();
        std::fs::rename(rig.beside(".Xa01"), rig.path()).unwrap();
    };
    check(true, act).await;
}
