//! A client that stops in the middle of its work blocks no revocation: while a policy is applied, while uses wait, and in a
//! foreign transaction.

use super::*;
use crate::testing::proxy::{ProxyRoute, RouteMode};

/// A revocation may wait for the server to end the transaction of a silent client: 2 s, and this machine may be busy.
const SOON: Duration = Duration::from_secs(20);
/// Far ahead of any clock.
const LATER_UNIX_S: i64 = 5_000_000_000;
/// A text in the middle of a long document.
const MIDDLE: &str = "the-middle-of-a-document";

/// A store on a database, and a second store on the same database through a connection that can be broken.
async fn near_and_far() -> (String, PostgresStore, PostgresStore, ProxyRoute) {
    let server = shared();
    let database = server.database();
    let name = database.split('?').next().unwrap().rsplit('/').next().unwrap();
    let route = ProxyRoute::listen(0, ([127, 0, 0, 1], server.port()).into()).await.unwrap();
    let near = open(&database).await.unwrap();
    let query = "application_name=far";
    let far = open(&format!("postgres://{}@{}/{name}?{query}", server.superuser(), route.address())).await.unwrap();
    (database, near, far, route)
}

/// A signed act, far from expiring.
fn act(jti: &str) -> ActRow {
    ActRow {
        operators: vec!["alice".into()],
        keys: vec![],
        method: "/m".into(),
        signatures: vec!["e30.e30.c2ln".into()],
        jtis: vec![(jti.to_owned(), LATER_UNIX_S)],
        reason: "why".into(),
    }
}

/// A policy of two long documents, as an operator applies it.
fn policy(jti: &str) -> CommitRequest {
    let put = |id: &str| {
        let key = DocumentKey { kind: "agent".into(), id: id.into() };
        let json = format!("\"{}{MIDDLE}{}\"", "x".repeat(700_000), "y".repeat(700_000));
        StoreWrite::PutDocument(DocumentRow { key, json, path: "p.yaml".into(), line: 1, origin: DocumentOrigin::Api })
    };
    CommitRequest { writes: vec![put("a"), put("b")], act: Some(act(jti)), ..Default::default() }
}

/// Waits until a transaction of the far store is idle.
async fn stands_still(database: &str) {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'far'
        AND state <> 'idle' AND xact_start < clock_timestamp() - interval '300 ms'";
    until("nothing stands still", || async { shared().sql(database, sql) != "0" }).await;
}

async fn stops_at(words: &str) {
    let (database, near, far, route) = near_and_far().await;
    let far = Arc::new(far);
    far.commit(policy("first")).await.unwrap();
    route.set_mode(RouteMode::BlackHoleAt(words.to_owned()));
    let applying = tokio::spawn({
        let far = far.clone();
        async move { far.commit(policy("second")).await }
    });
    stands_still(&database).await;
    let killed = tokio::time::timeout(SOON, near.commit(kill("t"))).await;
    killed.unwrap_or_else(|_| panic!("held up at `{words}`")).unwrap_or_else(|error| panic!("held up at `{words}`: {error}"));
    let applied = applying.await.unwrap();
    assert!(applied.is_err(), "nobody said `{words}`");
    route.set_mode(RouteMode::Pass);
    until("the way is not found again", || async { far.revision().await.is_ok() }).await;
    assert_eq!(verify_change_log(&near).await.revision.number, verify_change_log(&*far).await.revision.number);
    assert_eq!(shared().sql(&database, "SELECT count(*) FROM portcullis.staged"), "0", "nothing is left of what was put down");
}

/// Stops a replica that applies a policy at every point at which it may stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_apply_that_stops_holds_up_no_kill() {
    let points = [
        "INSERT INTO portcullis.staged",
        MIDDLE,
        "FOR UPDATE",
        "SELECT jti FROM portcullis.act_jtis",
        "INSERT INTO portcullis.act_jtis",
        "INSERT INTO portcullis.acts",
        "DELETE FROM portcullis.documents USING",
        "INSERT INTO portcullis.documents",
        "INSERT INTO portcullis.log",
        "DELETE FROM portcullis.staged",
        "UPDATE portcullis.head",
        "pg_notify",
        "COMMIT",
    ];
    futures_util::future::join_all(points.map(stops_at)).await;
}

/// Uses that hang block no revocation of the same replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_uses_holds_up_no_kill() {
    let (database, near, far, route) = near_and_far().await;
    let far = Arc::new(far);
    assert_eq!(far.spend_proof([0; 32], LATER_UNIX_S).await, Ok(true));
    route.set_mode(RouteMode::BlackHoleAt("INSERT INTO portcullis.spent".to_owned()));
    let uses: Vec<_> = (1..=300_u16)
        .map(|number| {
            let (far, mut key) = (far.clone(), [0; 32]);
            key[..2].copy_from_slice(&number.to_be_bytes());
            tokio::spawn(async move { far.spend_proof(key, LATER_UNIX_S).await })
        })
        .collect();
    stands_still(&database).await;
    // Long before any of them is dropped.
    for number in 0..10 {
        far.commit(kill(&format!("t{number}"))).await.unwrap();
    }
    let answered = futures_util::future::join_all(uses).await;
    for answer in &answered {
        // None was committed, and for none is the outcome unknown.
        assert!(matches!(answer.as_ref().unwrap(), Err(Error::Unavailable(_))), "{answer:?}");
    }
    route.set_mode(RouteMode::Pass);
    assert_eq!(shared().sql(&database, "SELECT count(*) FROM portcullis.spent"), "1");
    assert_eq!(verify_change_log(&near).await.revision.number, 10);
    until("no use after the flood", || async { far.spend_proof([1; 32], LATER_UNIX_S).await == Ok(true) }).await;
}

/// A revocation that cannot be written names the session that blocks it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_holds_a_kill_up_is_named() {
    let (database, near, _far, _route) = near_and_far().await;
    let held = database.clone();
    let holder = std::thread::spawn(move || {
        let sql = "BEGIN; SET application_name = 'stranger'; SELECT number FROM portcullis.head FOR UPDATE; SELECT pg_sleep(9); ROLLBACK";
        shared().try_sql(&held, sql);
    });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'stranger'
        AND query LIKE '%pg_sleep%'";
    until("nobody holds it", || async { shared().sql(&database, waits) != "0" }).await;
    let refused = near.commit(kill("t")).await.unwrap_err();
    let said = refused.to_string();
    assert!(matches!(refused, Error::Unavailable(_)) && said.contains("`stranger`") && said.contains("process "), "{said}");
    holder.join().unwrap();
    near.commit(kill("t")).await.unwrap();
}
