//! What a cache returns, and what it never returns.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use super::*;
use crate::model::rows::{RevocationKind, RevocationTarget, StoreWrite};
use crate::model::time::SystemClock;
use crate::store::sqlite::SqliteStore;
use crate::store::{CommitRequest, Store as _};

struct ReplicaCacheFixture {
    folder: tempfile::TempDir,
    store: SqliteStore,
}

impl ReplicaCacheFixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("store.db"), Arc::new(SystemClock)).unwrap();
        Self { folder, store }
    }

    async fn commit(&self, writes: Vec<StoreWrite>) {
        self.store.commit(CommitRequest { writes, ..CommitRequest::default() }).await.unwrap();
    }

    /// Revokes a session, suspends an agent and adds a document.
    async fn step(&self, name: &str) {
        let key = DocumentKey { kind: "agent".into(), id: name.into() };
        let row = DocumentRow { key, json: "{}".into(), path: "p.yaml".into(), line: 3, origin: DocumentOrigin::Folder };
        let revoke = |target, meaning| StoreWrite::Revoke { target, kind: meaning, reason: "why".into() };
        let dead = revoke(RevocationTarget::Session(name.into()), RevocationKind::Dead);
        self.commit(vec![
            StoreWrite::PutDocument(row),
            dead,
            revoke(RevocationTarget::Agent(name.into()), RevocationKind::Suspend),
        ])
        .await;
    }

    fn cache(&self) -> ReplicaCache {
        ReplicaCache::open(self.folder.path()).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join(CACHE_FILE)
    }

    fn aside(&self) -> bool {
        self.folder.path().join("cache.db.broken").exists()
    }
}

fn sorted(state: StoreState) -> StoreState {
    let mut state = state;
    state.revocations.sort_by(|one, other| one.target.cmp(&other.target));
    state
}

#[tokio::test]
async fn what_was_kept_is_what_the_store_holds() {
    let bench = ReplicaCacheFixture::new();
    let mut cache = bench.cache();
    assert_eq!((cache.load_state().unwrap(), cache.position().unwrap()), (None, None));
    assert_eq!(std::fs::metadata(bench.file()).unwrap().permissions().mode() & 0o777, 0o600);
    bench.step("a").await;
    let changes = bench.store.changes(0).await.unwrap();
    assert!(!cache.apply_commits(&changes.history, &changes.commits).unwrap(), "nothing to follow yet");
    cache.replace_state(&bench.store.load().await.unwrap()).unwrap();
    // Commit by commit: documents put and removed, targets revoked and reinstated; commits applied twice or from the beginning.
    bench.step("b").await;
    let (kind, id) = ("agent".into(), "a".into());
    let lift = StoreWrite::Reinstate { target: RevocationTarget::Agent("b".into()), reason: "again".into() };
    bench.commit(vec![StoreWrite::RemoveDocument(DocumentKey { kind, id }), lift]).await;
    for after in [1, 0, 2, 3] {
        let changes = bench.store.changes(after).await.unwrap();
        assert!(cache.apply_commits(&changes.history, &changes.commits).unwrap());
        assert_eq!(sorted(cache.load_state().unwrap().unwrap()), sorted(bench.store.load().await.unwrap()));
    }
    // Another process reads what this one stored.
    drop(cache);
    let state = bench.store.load().await.unwrap();
    assert_eq!(bench.cache().position().unwrap(), Some((state.revision.clone(), state.hash)));
    assert_eq!(sorted(bench.cache().load_state().unwrap().unwrap()), sorted(state));
    assert!(!bench.aside());
}

#[tokio::test]
async fn commits_that_do_not_follow_are_not_kept() {
    let bench = ReplicaCacheFixture::new();
    bench.step("a").await;
    let before = bench.store.load().await.unwrap();
    let mut cache = bench.cache();
    cache.replace_state(&before).unwrap();
    for name in ["b", "c", "d"] {
        bench.step(name).await;
    }
    let changes = bench.store.changes(1).await.unwrap();
    let mut check = |history: &HistoryId, commits: &[CommitRow]| {
        assert!(!cache.apply_commits(history, commits).unwrap());
        assert_eq!(sorted(cache.load_state().unwrap().unwrap()), sorted(before.clone()), "all or nothing");
    };
    check(&HistoryId::new("other"), &changes.commits);
    check(&changes.history, &changes.commits[1..]);
    check(&changes.history, &[changes.commits[0].clone(), changes.commits[2].clone()]);
    let forked = CommitRow { previous_hash: [7; 32], ..changes.commits[0].clone() };
    check(&changes.history, &[forked]);
}

/// The attack: a file that lost a revocation, or holds rows of another file, must not pass for what was followed.
#[tokio::test]
async fn a_file_that_does_not_hold_together_is_set_aside() {
    let check = async |what: &str, harm: &dyn Fn(&Path)| {
        let bench = ReplicaCacheFixture::new();
        bench.step("a").await;
        let state = bench.store.load().await.unwrap();
        let mut cache = bench.cache();
        cache.replace_state(&state).unwrap();
        drop(cache);
        harm(&bench.file());
        let mut cache = bench.cache();
        assert_eq!(cache.load_state().unwrap(), None, "{what}");
        assert!(bench.aside(), "{what}");
        // The cache is filled again.
        cache.replace_state(&state).unwrap();
        assert!(cache.load_state().unwrap().is_some(), "{what}");
    };
    let sql = |sql: &'static str| move |path: &Path| Connection::open(path).unwrap().execute_batch(sql).unwrap();
    check("a kill is missing", &sql("DELETE FROM revocations WHERE dead = 1")).await;
    check("a kill was lifted", &sql("UPDATE revocations SET suspended = 0")).await;
    check("a document was changed", &sql("UPDATE documents SET json = '[]'")).await;
    check("another digest", &sql("UPDATE place SET digest = replace(digest, substr(digest, 1, 1), 'x')")).await;
    check("a target that is none", &sql("UPDATE revocations SET target = 'x' WHERE dead = 1")).await;
    check("another version", &sql("PRAGMA user_version = 2")).await;
    check("another program", &sql("PRAGMA application_id = 7")).await;
    check("a missing table", &sql("DROP TABLE revocations")).await;
    check("no database", &|path| std::fs::write(path, "not a database at all".repeat(100)).unwrap()).await;
    check("cut short", &|path| {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    })
    .await;
}
