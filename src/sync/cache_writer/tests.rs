//! Tests the cache on a disk that runs full: it stops writing, does not load the store, and recovers by itself.

use std::io;
use std::time::Instant;

use super::*;
use crate::model::disk::DiskSpace;
use crate::model::limits::DISK_CRITICAL_BYTES;
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationKind, RevocationTarget, StoreWrite};
use crate::model::time::SystemClock;
use crate::store::CommitRequest;
use crate::store::sqlite::SqliteStore;
use crate::testing::store::FaultyStore;

/// Limit of every wait in these tests. No result depends on it.
const PATIENCE: Duration = Duration::from_secs(30);

/// A large disk whose free space the test sets.
struct TestDisk(AtomicU64);

impl DiskSpaceSource for TestDisk {
    fn read(&self) -> io::Result<DiskSpace> {
        Ok(DiskSpace { free_bytes: self.0.load(Ordering::SeqCst), total_bytes: 1 << 40 })
    }
}

struct CacheFixture {
    folder: tempfile::TempDir,
    store: Arc<FaultyStore>,
    disk: Arc<TestDisk>,
    cache_writer: Arc<CacheWriter>,
    _stop: watch::Sender<bool>,
}

impl CacheFixture {
    fn new(free_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let inner = SqliteStore::open(&folder.path().join("store.db"), Arc::new(SystemClock)).unwrap();
        let (store, disk) = (Arc::new(FaultyStore::new(Arc::new(inner))), Arc::new(TestDisk(AtomicU64::new(free_bytes))));
        let cache_writer = CacheWriter::with_free_space(folder.path(), disk.clone());
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(cache_writer.clone().run(store.clone(), stopped));
        Self { folder, store, disk, cache_writer, _stop: stop }
    }

    async fn commit(&self, write: StoreWrite) {
        self.store.commit(CommitRequest { writes: vec![write], ..CommitRequest::default() }).await.unwrap();
    }

    async fn revoke_session(&self, session: &str) {
        let target = RevocationTarget::Session(session.to_owned());
        self.commit(StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: String::new() }).await;
    }

    async fn newest(&self) -> HistoryPosition {
        let state = self.store.changes(0).await.unwrap();
        let revision = Revision { history: state.history, number: state.head };
        HistoryPosition { revision, hash: state.head_hash }
    }

    /// Queues the commits after a number, as the follower does after it has published them.
    async fn publish_after(&self, number: u64) {
        let commits = self.store.changes(number).await.unwrap().commits;
        self.cache_writer.enqueue_commits(self.newest().await, commits);
    }

    /// Waits until the cache holds the newest state of the store.
    async fn wait_until_current(&self) {
        let (until, newest) = (Instant::now() + PATIENCE, self.newest().await.revision);
        while self.cache_writer.read_state().await.unwrap().map(|state| state.revision) != Some(newest.clone()) {
            assert!(Instant::now() < until, "the cache does not catch up");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// A position on disk is not ahead of the cache: after a crash, what lies between could not be merged into an adopted store.
#[tokio::test(start_paused = true)]
async fn a_position_is_saved_after_the_commits_that_lead_to_it() {
    type PositionNumbers = Vec<(u64, Option<u64>)>;
    /// Remembers the number of each position, and that of the cache at the same time.
    struct Seen(Arc<CacheWriter>, Arc<Mutex<PositionNumbers>>);

    #[async_trait]
    impl PositionStore for Seen {
        async fn save(&self, place: &HistoryPosition) -> Result<(), io::Error> {
            let cached = self.0.with_cache(|cache| cache.position()).await.unwrap();
            self.1.lock().unwrap().push((place.revision.number, cached.map(|(revision, _)| revision.number)));
            Ok(())
        }
    }

    let bench = CacheFixture::new(u64::MAX / 2);
    let seen = Arc::<Mutex<Vec<_>>>::default();
    let keep = CacheFirstPositionStore::new(bench.cache_writer.clone(), Seen(bench.cache_writer.clone(), seen.clone()));
    bench.revoke_session("s0").await;
    bench.cache_writer.enqueue_state(bench.newest().await);
    bench.wait_until_current().await;
    for (number, session) in [(1, "s1"), (2, "s2")] {
        bench.revoke_session(session).await;
        bench.publish_after(number).await;
        keep.save(&bench.newest().await).await.unwrap();
    }
    assert_eq!(*seen.lock().unwrap(), [(2, Some(2)), (3, Some(3))]);
}

#[tokio::test(start_paused = true)]
async fn a_disk_without_room_is_left_alone_and_so_is_the_store() {
    let (bench, began) = (CacheFixture::new(DISK_CRITICAL_BYTES - 1), tokio::time::Instant::now());
    bench.revoke_session("s0").await;
    bench.cache_writer.enqueue_state(bench.newest().await);
    tokio::time::sleep(Duration::from_secs(600)).await;
    for number in 1..=20 {
        bench.revoke_session(&format!("s{number}")).await;
        bench.publish_after(number).await;
        tokio::time::sleep(Duration::from_secs(30)).await;
    }
    assert_eq!(bench.store.load_count(), 0, "the store is not read for a cache that cannot be written");
    // The first ten attempts double their pauses; then there is one in five minutes.
    let (attempts, took_s) = (bench.cache_writer.failures(), began.elapsed().as_secs());
    assert!(bench.cache_writer.is_paused() && (2..=11 + took_s / 300).contains(&attempts), "{attempts} attempts in {took_s} s");
    assert!(!bench.folder.path().join("cache.db").exists(), "not a byte is taken");
    assert_eq!(bench.cache_writer.lock_queue().pending_rows, 0, "nothing piles up meanwhile");

    bench.disk.0.store(2 * DISK_CRITICAL_BYTES, Ordering::SeqCst);
    bench.wait_until_current().await;
    assert_eq!(bench.store.load_count(), 1);
    bench.revoke_session("later").await;
    bench.publish_after(21).await;
    bench.wait_until_current().await;
    assert!(!bench.cache_writer.is_paused());
    assert_eq!(bench.store.load_count(), 1, "what came later is written as it comes");

    // The disk is full once more. The missed commits come from the log.
    bench.disk.0.store(0, Ordering::SeqCst);
    bench.revoke_session("last").await;
    bench.publish_after(22).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(bench.cache_writer.is_paused());
    bench.disk.0.store(2 * DISK_CRITICAL_BYTES, Ordering::SeqCst);
    bench.wait_until_current().await;
    assert_eq!(bench.store.load_count(), 1, "a little is read from the log, not everything from the store");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_fit_is_read_once() {
    const DOCUMENT_BYTES: usize = 300_000;
    // More than the reserve, but less than the state needs.
    let bench = CacheFixture::new(DISK_CRITICAL_BYTES + DOCUMENT_BYTES as u64);
    let key = DocumentKey { kind: "group".to_owned(), id: "g".to_owned() };
    let json = format!(r#"{{"id":"g","kind":"group","x":"{}"}}"#, "x".repeat(DOCUMENT_BYTES));
    bench
        .commit(StoreWrite::PutDocument(DocumentRow { key, json, path: String::new(), line: 0, origin: DocumentOrigin::Api }))
        .await;
    bench.cache_writer.enqueue_state(bench.newest().await);
    let until = Instant::now() + PATIENCE;
    while !bench.cache_writer.is_paused() {
        assert!(Instant::now() < until, "it fits");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(bench.store.load_count(), 1);
    // Enough space to try again, but not for the whole state.
    let least = DISK_CRITICAL_BYTES * 11 / 10 + 1;
    bench.disk.0.store(least + DOCUMENT_BYTES as u64, Ordering::SeqCst);
    let attempts = bench.cache_writer.failures();
    while bench.cache_writer.failures() < attempts + 5 {
        assert!(Instant::now() < until, "it is not tried again");
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    assert_eq!(bench.store.load_count(), 1, "it is not read again before there is room for it");
    bench.disk.0.store(least + STATE_COPIES * 2 * DOCUMENT_BYTES as u64, Ordering::SeqCst);
    bench.wait_until_current().await;
    assert_eq!(bench.store.load_count(), 2);
}
