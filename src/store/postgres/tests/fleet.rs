//! Several replicas on one database: they see each other's commits, and they compete for proofs and approvals.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_see_each_others_commits() {
    let url = shared().database();
    let (one, other) = (Arc::new(open(&url).await.unwrap()), Arc::new(open(&url).await.unwrap()));
    let mut wake = other.subscribe_commits();
    // A notification wakes the other replica. Its listener may have started after the first commit.
    until("no notification woke the other replica", || async {
        one.commit(kill("t0")).await.unwrap();
        wake.has_changed().unwrap()
    })
    .await;
    let number = one.revision().await.unwrap().number;
    assert!(*wake.borrow_and_update() <= number);
    assert_eq!(other.changes(0).await.unwrap().head, number);
    let racers: Vec<_> = [&one, &other]
        .into_iter()
        .enumerate()
        .flat_map(|(side, store)| (0..20).map(move |turn| (Arc::clone(store), format!("t{side}-{turn}"))))
        .map(|(store, id)| tokio::spawn(async move { store.commit(kill(&id)).await.unwrap().revision.number }))
        .collect();
    let mut numbers = std::collections::BTreeSet::new();
    for racer in racers {
        numbers.insert(racer.await.unwrap());
    }
    assert_eq!(numbers, (number + 1..=number + 40).collect());
    assert_eq!(verify_change_log(&*one).await, verify_change_log(&*other).await);
}

/// Without notifications nobody is woken, but the polls miss nothing.
#[tokio::test]
async fn polls_suffice_where_nobody_notifies() {
    let url = format!("{}&notify=off", shared().database());
    let (one, other) = (open(&url).await.unwrap(), open(&url).await.unwrap());
    other.register_replica(&registration("other")).await.unwrap();
    let wake = other.subscribe_commits();
    let number = one.commit(kill("t")).await.unwrap().revision.number;
    let changes = other.poll_changes(&beat("other", 0)).await.unwrap();
    assert_eq!((changes.head, changes.commits.len()), (number, 1));
    assert!(!wake.has_changed().unwrap());
    let listeners = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'";
    assert_eq!(shared().sql(&url, listeners), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_spent_once_among_replicas() {
    let url = shared().database();
    let clock = Arc::new(ManualClock::at_unix_s(START_UNIX_S));
    let open = async || {
        let settings = Settings::parse(&url, Durability::Single).unwrap();
        let clock: Arc<dyn Clock> = clock.clone();
        Arc::new(PostgresStore::open_with(settings, crate::store::Settings::default(), Some(clock)).await.unwrap())
    };
    let stores = [open().await, open().await, open().await];
    for round in 0..20u8 {
        let racers = stores.iter().map(|store| {
            let store = store.clone();
            tokio::spawn(async move { store.spend_proof([round; 32], START_UNIX_S + 60).await.unwrap() })
        });
        let won: Vec<bool> = futures_util::future::join_all(racers).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(won.iter().filter(|won| **won).count(), 1, "{round}: {won:?}");
    }
    // One replica forgets the expired keys while others try to spend them again.
    clock.step_wall_ms(3_600_000);
    let forgetting = stores[0].spend_proof([200; 32], START_UNIX_S + 4_000);
    let again = (0..20u8).map(|round| stores[usize::from(round) % 2 + 1].spend_proof([round; 32], START_UNIX_S + 60));
    let (forgot, again) = tokio::join!(forgetting, futures_util::future::join_all(again));
    assert_eq!(forgot, Ok(true));
    assert!(again.iter().all(|spent| *spent == Ok(false)), "{again:?}");
    let kept = shared().sql(&url, "SELECT count(*) FROM portcullis.spent");
    assert_eq!(kept, "1");
}

/// A key whose removal is not committed yet cannot be inserted before the removal commits, and then it counts as used.
#[tokio::test]
async fn a_key_that_is_just_being_forgotten_stays_spent() {
    let url = shared().database();
    let store = open(&url).await.unwrap();
    let expires = START_UNIX_S + 60;
    assert_eq!(store.spend_proof([1; 32], expires).await, Ok(true));
    let forget = format!(
        "BEGIN; DELETE FROM portcullis.spent; UPDATE portcullis.spent_forgotten SET unix_s = {expires}; SELECT pg_sleep(0.5); COMMIT"
    );
    let (forgetting, spent) = tokio::join!(
        tokio::task::spawn_blocking({
            let url = url.clone();
            move || shared().sql(&url, &forget)
        }),
        async {
            until("nobody forgets", || async {
                shared().sql(
                    &url,
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()",
                ) == "1"
            })
            .await;
            store.spend_proof([1; 32], expires).await
        }
    );
    forgetting.unwrap();
    assert_eq!(spent, Ok(false));
}

#[tokio::test]
async fn who_waits_too_long_is_told() {
    let url = shared().database();
    let store = open(&url).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    store.poll_changes(&beat("a", 0)).await.unwrap();
    // Another session holds the heads and the row of this replica until it is told to let go.
    let hold = "BEGIN; SELECT 1 FROM portcullis.head, portcullis.replicas FOR UPDATE; SELECT pg_sleep(60); COMMIT";
    let holding = tokio::task::spawn_blocking({
        let url = url.clone();
        move || shared().try_sql(&url, hold)
    });
    let holder = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
    until("nobody holds", || async { shared().sql(&url, holder) == "1" }).await;
    let heartbeat = beat("a", 0);
    let (poll, commit) = tokio::join!(store.poll_changes(&heartbeat), store.commit(kill("t")));
    for refused in [poll.err(), commit.err()] {
        assert!(matches!(&refused, Some(Error::Unavailable(_))), "{refused:?}");
    }
    assert_eq!(store.load().await.unwrap().revision.number, 0, "readers do not wait for writers");
    let free =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
    shared().sql(&url, free);
    holding.await.unwrap();
    store.poll_changes(&beat("a", 0)).await.unwrap();
    assert_eq!(store.commit(kill("t")).await.unwrap().revision.number, 1);
}

/// A role that may use the tables but not create any is enough once they exist. Without rights, the error says what to do.
#[tokio::test]
async fn a_role_needs_no_more_than_the_tables() {
    let url = shared().database();
    shared().sql(&url, "CREATE ROLE modest LOGIN PASSWORD 's3cr3t-canary'");
    let modest = url.replacen(shared().superuser(), "modest:s3cr3t-canary", 1);
    let refused = open(&modest).await.err().unwrap();
    assert!(matches!(&refused, Error::Unavailable(why) if why.contains("GRANT") && !why.contains("s3cr3t")), "{refused:?}");
    drop(open(&url).await.unwrap());
    let refused = open(&modest).await.err().unwrap();
    assert!(matches!(&refused, Error::Unavailable(why) if why.contains("GRANT")), "{refused:?}");
    // The grants that docs/OPERATIONS.md lists.
    shared().sql(
        &url,
        "GRANT USAGE ON SCHEMA portcullis TO modest;
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA portcullis TO modest;
         REVOKE UPDATE, DELETE ON portcullis.log, portcullis.acts FROM modest",
    );
    let store = open(&modest).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    let act = ActRow {
        operators: vec![],
        keys: vec![],
        method: "/m".into(),
        signatures: vec![],
        jtis: vec![("j".into(), 1)],
        reason: String::new(),
    };
    store.commit(CommitRequest { act: Some(act), ..kill("t") }).await.unwrap();
    store.spend_proof([1; 32], 1).await.unwrap();
    store.poll_changes(&beat("a", 0)).await.unwrap();
    store.replicas().await.unwrap();
    verify_change_log(&store).await;
}
