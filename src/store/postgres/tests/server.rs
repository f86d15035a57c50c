//! The server: its required settings, its crashes, stops and replacements, and the meaning of its warnings.

use tokio::sync::watch;

use super::*;
use crate::model::time::Clock as _;
use crate::revocation::RevocationIndex;
use crate::snapshot::{Freshness, SnapshotCell};
use crate::sync::{CellPublisher, FleetMember, FollowerLoop, status::FollowerHandle};

#[tokio::test]
async fn claims_that_do_not_hold_are_refused() {
    use Durability::{Asynchronous, Single, Synchronous};
    let server = PostgresServer::start(&[]);
    let url = server.database();
    drop(open(&url).await.unwrap());
    let check = async |setting: &str, claimed: Durability, expected: Option<&str>| {
        server.change_setting(setting);
        let name = setting.split(' ').next().unwrap();
        let value = setting.rsplit(' ').next().unwrap().trim_matches('\'');
        until("the server does not read its settings", || async { server.sql(&url, &format!("SHOW {name}")) == value }).await;
        let opened = open_as(&url, claimed).await;
        match expected {
            None => drop(opened.unwrap()),
            Some(part) => {
                let error = opened.err().unwrap();
                assert!(
                    matches!(&error, Error::Misconfigured(why) if why.contains(part) && why.contains(name)),
                    "{setting}: {error:?}"
                );
            }
        }
    };
    for claimed in [Single, Synchronous, Asynchronous] {
        check("full_page_writes = off", claimed, Some("set it to `on`")).await;
        server.change_setting("full_page_writes = on");
        check("fsync = off", claimed, Some("set it to `on`")).await;
        server.change_setting("fsync = on");
        check("synchronous_commit = off", claimed, Some("set it to `on`")).await;
        server.change_setting("synchronous_commit = on");
    }
    check("synchronous_standby_names = ''", Single, None).await;
    check("synchronous_standby_names = ''", Asynchronous, None).await;
    check("synchronous_standby_names = ''", Synchronous, Some("name a standby")).await;
    for level in ["local", "remote_write"] {
        check(&format!("synchronous_commit = {level}"), Single, None).await;
        server.change_setting("synchronous_standby_names = 'other'");
        check(&format!("synchronous_commit = {level}"), Synchronous, Some("`on` or `remote_apply`")).await;
        server.change_setting("synchronous_standby_names = ''");
    }
    server.change_setting("synchronous_commit = on");
    // A change under an open store is noticed before anything is acknowledged or proved.
    let store = open(&url).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    server.change_setting("fsync = off");
    until("the change is not noticed", || async { matches!(store.commit(kill("t")).await, Err(Error::Misconfigured(_))) }).await;
    assert!(matches!(store.poll_changes(&beat("a", 0)).await, Err(Error::Misconfigured(_))));
    assert!(matches!(store.spend_proof([1; 32], i64::MAX).await, Err(Error::Misconfigured(_))));
}

/// A primary was replaced but still runs, and the standbys are removed from its settings. Every connection to it still works, and
/// every answer is rejected as misconfigured. The store then tries the other host of its URL, and follows the new primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_primary_is_left_for_the_next_host() {
    let old = PostgresServer::start(&[]);
    let database = old.database();
    let name = database.split('?').next().unwrap().rsplit('/').next().unwrap();
    // The new primary needs a standby too, which streams from it before and after the promotion.
    let new = PostgresServer::standby("b", old.port());
    let third = PostgresServer::standby("c", new.port());
    new.change_setting("synchronous_standby_names = 'c'");
    third.change_setting("synchronous_standby_names = ''");
    old.change_setting("synchronous_standby_names = 'b'");
    let followed =
        |server: &PostgresServer| server.sql("postgres", "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'");
    until("no standby follows", || async { followed(&old) == "1" }).await;
    let both = format!("postgres://{}@127.0.0.1:{},127.0.0.1:{}/{name}", old.superuser(), old.port(), new.port());
    let store = open_as(&both, Durability::Synchronous).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    store.poll_changes(&beat("a", 0)).await.unwrap();
    let before = verify_change_log(&store).await;

    // One call for each connection of the store: writing, polling, reading, loading.
    let asked = async |store: &PostgresStore, id: &str| {
        let (wrote, polled) = (store.commit(kill(id)).await.err(), store.poll_changes(&beat("a", 0)).await.err());
        [wrote, polled, store.revision().await.err(), store.load().await.err()]
    };
    let refused = |error: &Option<Error>| matches!(error, Some(Error::Misconfigured(_)));
    old.change_setting("synchronous_standby_names = ''");
    until("the change is not noticed", || async { asked(&store, "refused").await.iter().all(refused) }).await;
    new.promote();
    until("no standby follows the new primary", || async { followed(&new) == "1" }).await;
    let answers = || async { asked(&store, "acknowledged").await.iter().all(Option::is_none) };
    until("the store holds on to the primary that was replaced", answers).await;

    let state = verify_change_log(&store).await;
    assert_eq!(state.revision.history, before.revision.history);
    let count = |server: &PostgresServer| {
        server.sql(name, "SELECT count(*) FROM portcullis.revocations WHERE target LIKE '%acknowledged%'")
    };
    assert_eq!((count(&old), count(&new)), ("0".to_owned(), "1".to_owned()));
    assert_eq!(old.sql("postgres", "SELECT pg_is_in_recovery()"), "f", "it was never stopped");
}

/// A server that waits for a standby which does not exist: no poll proves anything and no commit is acknowledged. This holds
/// while the server waits and also when somebody cancels the wait, which the server reports as a success with a warning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_warned_of_proves_nothing() {
    let server = PostgresServer::start(&[]);
    let url = server.database();
    let store = open(&url).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    store.poll_changes(&beat("a", 0)).await.unwrap();
    server.change_setting("synchronous_standby_names = 'nobody'");
    until("the server does not wait for a standby", || async { store.poll_changes(&beat("a", 0)).await.is_err() }).await;
    let commit = store.commit(kill("t"));
    let cancel = async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query = 'COMMIT'";
        until("no commit waits", || async { server.sql("postgres", waiting) != "0" }).await;
        let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        server.sql("postgres", cancel);
    };
    let (commit, ()) = tokio::join!(commit, cancel);
    let warned = |error: &Error| error.to_string().contains("canceling wait for synchronous replication");
    assert!(matches!(&commit, Err(error @ Error::OutcomeUnknown(_)) if warned(error)), "{commit:?}");
    assert_eq!(store.load().await.unwrap().revocations.len(), 1, "on this server it is written");

    // Every wait is cancelled at once, so that polls return in time.
    let cancelling = "DO $$ BEGIN LOOP
            PERFORM pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep';
            PERFORM pg_stat_clear_snapshot(), pg_sleep(0.005);
        END LOOP; END $$";
    let canceller = {
        let (server, done) = (&server, watch::Sender::new(false));
        let mut ended = done.subscribe();
        std::thread::scope(|scope| {
            scope.spawn(|| server.try_sql("postgres", cancelling));
            let polls = async {
                let mut warnings = 0;
                while warnings < 3 {
                    let answer = store.poll_changes(&beat("a", 0)).await;
                    warnings += usize::from(answer.as_ref().is_err_and(warned));
                    assert!(answer.is_err(), "a poll whose commit was warned of was taken for proof");
                }
                done.send_replace(true);
            };
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(polls));
            server.sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'DO%'");
        });
        *ended.borrow_and_update()
    };
    assert!(canceller);
    server.change_setting("synchronous_standby_names = ''");
    until("it does not recover", || async { store.poll_changes(&beat("a", 0)).await.is_ok() }).await;
    verify_change_log(&store).await;
}

/// Connections are cut all the time. Every acknowledged commit is in the log, and no refused one is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_cut_connections() {
    let url = shared().database();
    let store = Arc::new(open(&url).await.unwrap());
    let stop = watch::Sender::new(false);
    let cutter = {
        let (url, stop) = (url.clone(), stop.subscribe());
        tokio::task::spawn_blocking(move || {
            let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND application_name = 'portcullis'";
            let mut cuts = 0;
            while !*stop.borrow() {
                cuts += shared().sql(&url, cut).lines().count();
            }
            cuts
        })
    };
    let (mut done, mut refused, mut unknown) = (Vec::new(), Vec::new(), 0);
    while done.len() < 100 || refused.len() + unknown < 5 {
        let id = format!("t{}-{}-{unknown}", done.len(), refused.len());
        match store.commit(kill(&id)).await {
            Ok(committed) => done.push((committed.revision.number, id)),
            Err(Error::OutcomeUnknown(_)) => unknown += 1,
            Err(Error::Unavailable(_)) => refused.push(id),
            Err(error) => panic!("{error:?}"),
        }
    }
    stop.send_replace(true);
    assert!(cutter.await.unwrap() > 0);
    until("it does not recover", || async { store.commit(kill("last")).await.is_ok() }).await;
    let state = verify_change_log(&*store).await;
    let found = |id: &str| state.revocations.iter().find(|row| row.target == RevocationTarget::Token(id.into()));
    for (number, id) in &done {
        assert_eq!(found(id).map(|row| row.revision), Some(*number), "{id} was acknowledged");
    }
    for id in &refused {
        assert!(found(id).is_none(), "{id} was refused");
    }
}

/// A follower as the program runs it.
struct ServerReplica {
    cell: Arc<SnapshotCell>,
    status: FollowerHandle,
    _stop: watch::Sender<bool>,
}

impl ServerReplica {
    async fn start(url: &str) -> Self {
        let store: Arc<dyn Store> = Arc::new(open(url).await.unwrap());
        let member = FleetMember::new(store, registration(&uuid::Uuid::new_v4().to_string()));
        let cell = Arc::new(SnapshotCell::default());
        let publisher = CellPublisher::new(cell.clone(), Arc::new(RevocationIndex::new()));
        let settings = crate::sync::Settings { poll_interval_ms: 100, poll_timeout_ms: 65_000, ..Default::default() };
        let (follow, status) = FollowerLoop::new(member, publisher, Arc::new(SystemClock), settings, None);
        let (_stop, stopped) = watch::channel(false);
        tokio::spawn(follow.run(stopped));
        assert!(status.wait_until_ready().await);
        Self { cell, status, _stop }
    }

    fn freshness(&self) -> Freshness {
        self.cell.load().unwrap().freshness(SystemClock.now())
    }

    async fn reaches(&self, freshness: Freshness) {
        let problem = || self.status.problem();
        until(&format!("never {freshness:?}: {:?}", problem()), || async { self.freshness() == freshness }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_follows_a_server_that_crashes_and_comes_back() {
    let server = PostgresServer::start(&[]);
    let url = server.database();
    let writer = open(&url).await.unwrap();
    let replica = ServerReplica::start(&url).await;
    for round in 0..3 {
        let number = writer.commit(kill(&format!("before{round}"))).await.unwrap().revision.number;
        until("not applied", || async { replica.status.applied_number() >= number }).await;
        server.crash_and_restart();
        until("no commit after a crash", || async { writer.commit(kill(&format!("after{round}"))).await.is_ok() }).await;
        let number = writer.revision().await.unwrap().number;
        until("not applied after a crash", || async { replica.status.applied_number() >= number }).await;
        replica.reaches(Freshness::Fresh).await;
    }
    verify_change_log(&writer).await;
    // The server is gone for good: the replica closes, and nothing is acknowledged.
    server.crash();
    assert!(matches!(writer.commit(kill("gone")).await, Err(Error::Unavailable(_) | Error::OutcomeUnknown(_))));
    replica.reaches(Freshness::Closed).await;
    server.restart();
    replica.reaches(Freshness::Fresh).await;
}

/// A server that neither answers nor closes its connections: polls end by their deadline, and the replica becomes stale, then
/// closed. It is fresh again once the server continues.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_a_frozen_server_closes() {
    let server = PostgresServer::start(&[]);
    let url = server.database();
    let store = open(&url).await.unwrap();
    store.register_replica(&registration("other")).await.unwrap();
    store.poll_changes(&beat("other", 0)).await.unwrap();
    let replica = ServerReplica::start(&url).await;
    replica.reaches(Freshness::Fresh).await;
    server.freeze(true);
    let late = store.poll_changes(&beat("other", 0)).await.unwrap_err();
    assert!(matches!(late, Error::Unavailable(_) | Error::OutcomeUnknown(_)), "{late:?}");
    replica.reaches(Freshness::Stale).await;
    assert!(replica.status.counts().poll_failures > 0, "a poll waits without end");
    replica.reaches(Freshness::Closed).await;
    let began = std::time::Instant::now();
    server.freeze(false);
    replica.reaches(Freshness::Fresh).await;
    println!("fresh again {} ms after the server went on", began.elapsed().as_millis());
    until("no commit after a freeze", || async { store.commit(kill("t")).await.is_ok() }).await;
    let number = store.revision().await.unwrap().number;
    until("not applied after a freeze", || async { replica.status.applied_number() >= number }).await;
}
