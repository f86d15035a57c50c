//! Tests of what can fail only in PostgreSQL or on the connection to it. `testing::store` tests what every store must do.

mod fleet;
mod server;
mod stalled_clients;
mod transport;

use std::sync::Arc;

use super::*;
use crate::model::rows::{ActRow, DocumentKey, DocumentOrigin, DocumentRow, RevocationKind, RevocationTarget, StoreWrite};
use crate::model::time::{ManualClock, SystemClock};
use crate::store::sqlite::SqliteStore;
use crate::testing::postgres::{PostgresServer, shared};
use crate::testing::store::{START_UNIX_S, conformance, verify_change_log};

async fn open(url: &str) -> Result<PostgresStore, Error> {
    open_as(url, Durability::Single).await
}

async fn open_as(url: &str, durability: Durability) -> Result<PostgresStore, Error> {
    PostgresStore::open(Settings::parse(url, durability).unwrap()).await
}

fn kill(id: &str) -> CommitRequest {
    let target = RevocationTarget::Token(id.into());
    CommitRequest {
        writes: vec![StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: String::new() }],
        ..Default::default()
    }
}

fn beat(store: &str, applied_number: u64) -> ReplicaHeartbeat {
    ReplicaHeartbeat { incarnation: store.into(), applied_number, acked_number: 0, state: crate::store::ReplicaState::Serving }
}

fn registration(incarnation: &str) -> ReplicaRegistration {
    ReplicaRegistration { incarnation: incarnation.into(), address: String::new(), version: String::new(), started_unix_ms: 0 }
}

/// Polls until the condition holds.
async fn until<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let asking = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), asking).await.is_ok(), "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passes_the_suite() {
    conformance(async |clock: Arc<ManualClock>| {
        let settings = Settings::parse(&shared().database(), Durability::Single).unwrap();
        Arc::new(PostgresStore::open_with(settings, crate::store::Settings::default(), Some(clock)).await.unwrap())
            as Arc<dyn Store>
    })
    .await;
}

/// The same requests make the same log, byte for byte, whatever the engine.
#[tokio::test]
async fn hashes_and_digests_are_those_of_sqlite() {
    let clock = Arc::new(ManualClock::at_unix_s(START_UNIX_S));
    let folder = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(&folder.path().join("store.db"), clock.clone()).unwrap();
    let settings = Settings::parse(&shared().database(), Durability::Single).unwrap();
    let postgres = PostgresStore::open_with(settings, crate::store::Settings::default(), Some(clock.clone())).await.unwrap();
    let put = |kind: &str, id: &str, json: &str| {
        let key = DocumentKey { kind: kind.into(), id: id.into() };
        StoreWrite::PutDocument(DocumentRow {
            key,
            json: json.into(),
            path: "p/ü.yaml".into(),
            line: u32::MAX,
            origin: DocumentOrigin::Folder,
        })
    };
    let remove = |kind: &str, id: &str| StoreWrite::RemoveDocument(DocumentKey { kind: kind.into(), id: id.into() });
    let revoke = |target: RevocationTarget, kind| StoreWrite::Revoke { target, kind, reason: "\u{1f480} \"'\\".into() };
    let agent = || RevocationTarget::Agent("spiffe://a/ä\0".into());
    let user = || RevocationTarget::User { issuer: "i".into(), subject: "s".into() };
    let act = |jti: &str, expires_at_unix_s| {
        let (operators, signatures) = (vec!["o".into()], vec!["e30.e30.c2ln".into()]);
        ActRow {
            operators,
            keys: vec![],
            method: "/m".into(),
            signatures,
            jtis: vec![(jti.into(), expires_at_unix_s)],
            reason: "r".into(),
        }
    };
    let request = |writes: Vec<StoreWrite>| CommitRequest { writes, ..Default::default() };
    let acted = |jti: &str, expires_at_unix_s| CommitRequest { act: Some(act(jti, expires_at_unix_s)), ..Default::default() };
    let requests = [
        request(vec![put("agent", "z", "{}"), put("agent", "Z", "[]"), put("tool", "z", "{\"a\":1}")]),
        request(vec![
            put("agent", "z", "[]"),
            remove("agent", "Z"),
            put("agent", "Z", "1"),
            remove("tool", "z"),
            put("agent", "é", "0"),
        ]),
        request(vec![
            revoke(agent(), RevocationKind::Suspend),
            revoke(agent(), RevocationKind::Watermark),
            revoke(user(), RevocationKind::Watermark),
        ]),
        request(vec![StoreWrite::Reinstate { target: agent(), reason: "back".into() }, revoke(agent(), RevocationKind::Suspend)]),
        request(vec![revoke(user(), RevocationKind::Watermark)]),
        request(vec![revoke(user(), RevocationKind::Watermark), remove("agent", "none")]),
        acted("j1", START_UNIX_S + 10),
        acted("j1", START_UNIX_S + 10),
        acted("j2", START_UNIX_S + 9_999),
        acted("j1", START_UNIX_S + 10),
    ];
    for request in requests {
        clock.step_wall_ms(4_321);
        let said = |answer: Result<CommitOutcome, Error>| answer.map(|done| (done.revision.number, done.unix_ms, done.changes));
        assert_eq!(said(sqlite.commit(request.clone()).await), said(postgres.commit(request).await));
    }
    let (one, other) = (sqlite.changes(0).await.unwrap(), postgres.changes(0).await.unwrap());
    assert_eq!((one.head, one.head_hash, &one.commits), (other.head, other.head_hash, &other.commits));
    assert!(one.head >= 7);
    let (one, other) = (verify_change_log(&sqlite).await, verify_change_log(&postgres).await);
    assert_eq!((one.digest, one.documents, one.hash), (other.digest, other.documents, other.hash));
}

#[tokio::test]
async fn what_was_committed_is_there_when_opened_again() {
    let url = shared().database();
    let of_store = crate::store::Settings { iat_skew_s: 5, freshness_bound_ms: 2_000 };
    let settings = || Settings::parse(&url, Durability::Single).unwrap();
    let store = PostgresStore::open_with(settings(), of_store, None).await.unwrap();
    let committed = store.commit(kill("t")).await.unwrap();
    let ours = crate::model::time::Clock::now(&SystemClock).unix_ms();
    assert!((committed.unix_ms - ours).abs() < 60_000, "dated by the server's clock");
    let before = verify_change_log(&store).await;
    assert_eq!(before.settings, of_store);
    drop(store);
    assert_eq!(verify_change_log(&open(&url).await.unwrap()).await, before, "an existing store keeps its settings");
    let bad = crate::store::Settings { iat_skew_s: 5, freshness_bound_ms: 500 };
    assert!(matches!(PostgresStore::open_with(settings(), bad, None).await, Err(Error::Rejected(_))));
}

#[tokio::test]
async fn other_databases_are_refused_and_left_alone() {
    let check = async |sql: &str, expected: fn(&Error) -> bool| {
        let url = shared().database();
        if sql.contains("portcullis.version SET") {
            drop(open(&url).await.unwrap());
        }
        shared().sql(&url, sql);
        let all = "SELECT table_schema, table_name, column_name FROM information_schema.columns WHERE table_schema LIKE 'p%' ORDER BY 1, 2, 3";
        let before = shared().sql(&url, all);
        let error = open(&url).await.err().unwrap();
        assert!(expected(&error), "{sql}: {error:?}");
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(shared().sql(&url, all), before);
    };
    let not_ours = |error: &Error| matches!(error, Error::NotAStore(_));
    check("CREATE SCHEMA portcullis; CREATE TABLE portcullis.people (name text)", not_ours).await;
    check("CREATE SCHEMA portcullis; CREATE TABLE portcullis.version (id int4)", not_ours).await;
    check("CREATE SCHEMA portcullis; CREATE VIEW portcullis.version AS SELECT 'portcullis' AS program, 1 AS version", not_ours)
        .await;
    let table = "CREATE SCHEMA portcullis; CREATE TABLE portcullis.version AS SELECT 1 AS id";
    check(&format!("{table}, 'other' AS program, 1 AS version"), not_ours).await;
    check("UPDATE portcullis.version SET version = 99", |error| matches!(error, Error::NewerVersion(_))).await;
    check("UPDATE portcullis.version SET version = 0", |error| matches!(error, Error::Corrupt(_))).await;
    // The schema was created for the store and is empty, which is enough; other schemas do not matter.
    let url = shared().database();
    shared().sql(&url, "CREATE SCHEMA portcullis; CREATE TABLE public.head (x int); CREATE TABLE public.version (x int)");
    verify_change_log(&open(&url).await.unwrap()).await;
    // A function of the same name in another schema is not called.
    shared().sql(
        &url,
        "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT timestamptz ''epoch''';
         ALTER DATABASE CURRENT_NAME SET search_path = public, pg_catalog"
            .replace("CURRENT_NAME", url.split('?').next().unwrap().rsplit('/').next().unwrap())
            .as_str(),
    );
    assert!(open(&url).await.unwrap().commit(kill("t")).await.unwrap().unix_ms > 1_000_000_000_000);
}

#[tokio::test]
async fn a_database_of_another_encoding_is_refused() {
    shared().sql("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'");
    let error = open(&shared().url("latin")).await.err().unwrap();
    assert!(matches!(&error, Error::Misconfigured(why) if why.contains("ENCODING 'UTF8'")), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_may_make_the_tables_at_once() {
    let url = shared().database();
    let stores = futures_util::future::join_all((0..8).map(|_| open(&url))).await;
    let mut histories = std::collections::HashSet::new();
    for store in stores {
        histories.insert(store.unwrap().revision().await.unwrap().history);
    }
    assert_eq!(histories.len(), 1);
}

#[tokio::test]
async fn damage_is_reported() {
    let check = async |sql: &str, in_state: bool, in_log: bool| {
        let url = shared().database();
        let store = open(&url).await.unwrap();
        for number in 1..=5 {
            store.commit(kill(&format!("t{number}"))).await.unwrap();
        }
        verify_change_log(&store).await;
        shared().sql(&url, sql);
        let corrupt = |error: Option<Error>| matches!(error, Some(Error::Corrupt(_) | Error::Replaced(_)));
        let in_state_seen = match store.load().await {
            Ok(state) => !state.digest_matches(),
            Err(error) => corrupt(Some(error)),
        };
        assert_eq!(in_state_seen, in_state, "{sql}");
        assert_eq!(corrupt(store.changes(2).await.err()), in_log, "{sql}");
    };
    check("DELETE FROM portcullis.revocations WHERE revision = 2", true, false).await;
    check("UPDATE portcullis.revocations SET dead = false WHERE revision = 2", true, false).await;
    check("UPDATE portcullis.revocations SET target = '{}' WHERE revision = 2", true, false).await;
    check("UPDATE portcullis.head SET digest = 'x'", true, true).await;
    check("UPDATE portcullis.head SET number = 6", true, true).await;
    check("UPDATE portcullis.head SET number = -1", true, true).await;
    check("DELETE FROM portcullis.head", true, true).await;
    check("DELETE FROM portcullis.log WHERE number = 2", false, true).await;
    check("DELETE FROM portcullis.log WHERE number = 4", false, true).await;
    check("DELETE FROM portcullis.log WHERE number = 5", true, true).await;
    check("UPDATE portcullis.log SET changes = '[]' WHERE number = 4", false, true).await;
    check("UPDATE portcullis.log SET changes = '[' WHERE number = 4", false, true).await;
    check("UPDATE portcullis.log SET hash = 'abc' WHERE number = 3", false, true).await;
    check("UPDATE portcullis.log SET previous_hash = decode(repeat('00', 32), 'hex') WHERE number = 4", false, true).await;
    check("ALTER TABLE portcullis.log ALTER number TYPE text", true, true).await;
    check("DROP TABLE portcullis.log", true, true).await;
    check("DROP SCHEMA portcullis CASCADE", true, true).await;
    check("UPDATE portcullis.meta SET history = 'other'", true, true).await;
}

#[tokio::test]
async fn a_log_that_was_cut_says_where_it_begins() {
    let url = shared().database();
    let store = open(&url).await.unwrap();
    for number in 1..=3 {
        store.commit(kill(&format!("t{number}"))).await.unwrap();
    }
    shared().sql(&url, "UPDATE portcullis.head SET floor = 2; DELETE FROM portcullis.log WHERE number < 2");
    assert_eq!(store.changes(1).await, Err(Error::BelowFloor { floor: 2 }));
    assert_eq!(store.changes(2).await.unwrap().commits.len(), 1);
}

/// A database that replaced the opened one gets no write.
#[tokio::test]
async fn a_replaced_database_is_noticed() {
    let url = shared().database();
    let store = open(&url).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    shared().sql(&url, "UPDATE portcullis.meta SET history = 'other'");
    let replaced = |error: Option<Error>| assert!(matches!(error, Some(Error::Replaced(_))), "{error:?}");
    replaced(store.commit(kill("u")).await.err());
    replaced(store.spend_proof([1; 32], i64::MAX).await.err());
    replaced(store.poll_changes(&beat("a", 0)).await.err());
    replaced(store.load_for_replica(&beat("a", 0)).await.err());
    replaced(store.revision().await.err());
    assert_eq!(open(&url).await.unwrap().revision().await.unwrap().number, 0);
}

#[tokio::test]
async fn who_stops_waiting_undoes_nothing() {
    let url = shared().database();
    let store = open(&url).await.unwrap();
    {
        let mut commit = std::pin::pin!(store.commit(kill("t")));
        let asked = std::future::poll_fn(|context| std::task::Poll::Ready(commit.as_mut().poll(context))).await;
        assert!(asked.is_pending());
    }
    drop(store);
    assert_eq!(verify_change_log(&open(&url).await.unwrap()).await.revocations.len(), 1);
}

#[test]
fn one_store_serves_several_runtimes_and_outlives_them() {
    let url = shared().database();
    let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
    // These runtimes have neither a reactor nor a timer.
    let store = runtime().block_on(open(&url)).unwrap();
    std::thread::scope(|scope| {
        for racer in 0..4 {
            let store = &store;
            scope.spawn(move || runtime().block_on(store.commit(kill(&format!("t{racer}")))).unwrap());
        }
    });
    assert_eq!(runtime().block_on(verify_change_log(&store)).revision.number, 4);
}
