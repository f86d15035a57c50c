//! The tables of a PostgreSQL store, which the program creates and upgrades itself.
//!
//! All tables are in the schema `portcullis`. Replicas that start at once take turns through a lock that ends with its
//! transaction, so a pooler between them does not matter. Nothing is changed before the schema is known to be empty or this
//! program's. Look next at `super::read`.

use tokio_postgres::types::Type;

use super::connection::{PostgresConnection, QueryError};
use crate::model::revision::StateDigest;
use crate::store::hash_chain::GENESIS;
use crate::store::{Error, Settings};

/// The schema version of this program.
pub(super) const SCHEMA_VERSION: i64 = 5;
/// The content of the version row. It distinguishes this table from another program's table of the same name.
const PROGRAM_NAME: &str = "portcullis";
/// The advisory lock for creating or upgrading tables: `Ptcl`, as in the header of a SQLite store.
const SCHEMA_LOCK: i64 = 0x5074_636c;

/// Step N upgrades the tables from version N to N + 1. A step never changes once it is released.
const MIGRATIONS: [&str; SCHEMA_VERSION as usize] = ["
CREATE TABLE portcullis.version (id int4 PRIMARY KEY CHECK (id = 1), program text NOT NULL, version int8 NOT NULL);
CREATE TABLE portcullis.meta (
    id int4 PRIMARY KEY CHECK (id = 1), history text NOT NULL, made_unix_ms int8 NOT NULL,
    iat_skew_s int8 NOT NULL, freshness_bound_ms int8 NOT NULL
);
CREATE TABLE portcullis.head (
    id int4 PRIMARY KEY CHECK (id = 1), number int8 NOT NULL, hash bytea NOT NULL, digest text NOT NULL, floor int8 NOT NULL,
    revocations int8 NOT NULL, documents_number int8 NOT NULL, jtis_forgotten_unix_s int8
) WITH (fillfactor = 20);
CREATE TABLE portcullis.documents (
    key bytea PRIMARY KEY, kind text COLLATE \"C\" NOT NULL, id text COLLATE \"C\" NOT NULL, json text NOT NULL, path text NOT NULL,
    line int8 NOT NULL, origin text NOT NULL CHECK (origin IN ('folder', 'api')), revision int8 NOT NULL
);
CREATE TABLE portcullis.revocations (
    key bytea PRIMARY KEY, target text COLLATE \"C\" NOT NULL, dead bool NOT NULL, suspended bool NOT NULL, watermark_unix_s int8,
    expires_at_unix_s int8, reason text NOT NULL, revision int8 NOT NULL
);
CREATE INDEX revocations_by_revision ON portcullis.revocations (revision);
CREATE TABLE portcullis.log (
    number int8 PRIMARY KEY, previous_hash bytea NOT NULL, hash bytea NOT NULL, digest text NOT NULL, unix_ms int8 NOT NULL,
    changes bytea NOT NULL, of_documents bool NOT NULL
);
CREATE INDEX log_of_documents ON portcullis.log (number) WHERE of_documents;
CREATE TABLE portcullis.acts (number int8 PRIMARY KEY, unix_ms int8 NOT NULL, act text NOT NULL);
CREATE TABLE portcullis.act_jtis (jti text COLLATE \"C\" PRIMARY KEY, expires_at_unix_s int8 NOT NULL);
CREATE INDEX act_jtis_by_expiry ON portcullis.act_jtis (expires_at_unix_s);
CREATE TABLE portcullis.spent (key bytea PRIMARY KEY, expires_at_unix_s int8 NOT NULL);
CREATE INDEX spent_by_expiry ON portcullis.spent (expires_at_unix_s);
CREATE TABLE portcullis.spent_forgotten (id int4 PRIMARY KEY CHECK (id = 1), unix_s int8) WITH (fillfactor = 20);
CREATE TABLE portcullis.approvals (
    digest text COLLATE \"C\" PRIMARY KEY, leaf bytea NOT NULL, waiting bool NOT NULL, asked_unix_ms int8 NOT NULL,
    expires_unix_ms int8 NOT NULL, forget_unix_ms int8 NOT NULL, approval text NOT NULL
);
CREATE INDEX approvals_by_asking ON portcullis.approvals (asked_unix_ms, digest);
CREATE INDEX approvals_by_forgetting ON portcullis.approvals (forget_unix_ms);
CREATE INDEX approvals_waiting ON portcullis.approvals (leaf, expires_unix_ms) WHERE waiting;
CREATE TABLE portcullis.replicas (
    incarnation text COLLATE \"C\" PRIMARY KEY, address text NOT NULL, version text NOT NULL, started_unix_ms int8 NOT NULL,
    applied_number int8 NOT NULL, acked_number int8 NOT NULL, state text NOT NULL, seen_unix_ms int8 NOT NULL
) WITH (fillfactor = 20);
", "
ALTER TABLE portcullis.replicas ADD COLUMN acked_unix_ms int8 NOT NULL DEFAULT 0;
CREATE TABLE portcullis.pending_acts (
    act text COLLATE \"C\" PRIMARY KEY, operator text COLLATE \"C\" NOT NULL, expires_unix_ms int8 NOT NULL
);
CREATE INDEX revocations_by_expiry ON portcullis.revocations (expires_at_unix_s) WHERE expires_at_unix_s IS NOT NULL;
", "
CREATE TABLE portcullis.adoptions (
    number int8 PRIMARY KEY, history text NOT NULL, from_history text NOT NULL, from_hash bytea NOT NULL, unix_ms int8 NOT NULL
);
CREATE TABLE portcullis.merges (
    history text COLLATE \"C\" NOT NULL, incarnation text COLLATE \"C\" NOT NULL, address text NOT NULL, rows int8 NOT NULL,
    unix_ms int8 NOT NULL, PRIMARY KEY (history, incarnation)
);
", "
ALTER TABLE portcullis.pending_acts ADD COLUMN key text COLLATE \"C\" NOT NULL DEFAULT '';
", "
CREATE UNLOGGED TABLE portcullis.staged (
    stage text COLLATE \"C\" NOT NULL, key bytea, kind text, id text, json text, path text, line int8, origin text, changes bytea
);
CREATE INDEX staged_by_stage ON portcullis.staged (stage);
ALTER TABLE portcullis.approvals ADD COLUMN asker bytea NOT NULL DEFAULT ''::bytea;
"];

/// Upgrades the tables of a store that was followed before. Never creates a store, because an empty database is either being
/// restored or is the wrong one.
pub(super) async fn upgrade_existing(connection: &PostgresConnection, store_url: &str) -> Result<(), QueryError> {
    match read_schema_version(connection, store_url).await? {
        0 => Err(Error::Unavailable(format!("there is no store in `{store_url}` yet, and one was followed: restore it")).into()),
        SCHEMA_VERSION => Ok(()),
        _ => create_or_upgrade(connection, Settings::default(), None, store_url).await,
    }
}

/// Creates or upgrades the tables. Must run in a transaction of its own.
pub(super) async fn create_or_upgrade(
    connection: &PostgresConnection,
    settings: Settings,
    unix_ms: Option<i64>,
    store_url: &str,
) -> Result<(), QueryError> {
    if read_schema_version(connection, store_url).await? == SCHEMA_VERSION {
        return Ok(());
    }
    connection.execute("SELECT pg_advisory_xact_lock($1)", &[(&SCHEMA_LOCK, Type::INT8)]).await?;
    // Another replica may have done it in the meantime.
    let found = read_schema_version(connection, store_url).await?;
    if found == 0 && connection.query_row("SELECT 1 FROM pg_namespace WHERE nspname = 'portcullis'", &[]).await?.is_none() {
        connection.run_sql("CREATE SCHEMA portcullis").await?;
    }
    for step in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or_default()) {
        connection.run_sql(step).await?;
    }
    if found > 0 {
        connection.execute("UPDATE portcullis.version SET version = $1", &[(&SCHEMA_VERSION, Type::INT8)]).await?;
        return Ok(());
    }
    let unix_ms = match unix_ms {
        Some(unix_ms) => unix_ms,
        None => server_unix_ms(connection).await?,
    };
    let (history, bound) = (uuid::Uuid::now_v7().to_string(), super::read::to_i64(settings.freshness_bound_ms)?);
    connection
        .execute(
            "INSERT INTO portcullis.version (id, program, version) VALUES (1, $1, $2)",
            &[(&PROGRAM_NAME, Type::TEXT), (&SCHEMA_VERSION, Type::INT8)],
        )
        .await?;
    connection
        .execute(
            "INSERT INTO portcullis.meta (id, history, made_unix_ms, iat_skew_s, freshness_bound_ms) VALUES (1, $1, $2, $3, $4)",
            &[(&history, Type::TEXT), (&unix_ms, Type::INT8), (&settings.iat_skew_s, Type::INT8), (&bound, Type::INT8)],
        )
        .await?;
    connection.execute(
        "INSERT INTO portcullis.head (id, number, hash, digest, floor, revocations, documents_number) VALUES (1, 0, $1, $2, 0, 0, 0)",
        &[(&GENESIS.as_slice(), Type::BYTEA), (&StateDigest::default().to_hex(), Type::TEXT)],
    )
    .await?;
    connection.run_sql("INSERT INTO portcullis.spent_forgotten (id) VALUES (1)").await
}

/// Reads the server's clock.
async fn server_unix_ms(connection: &PostgresConnection) -> Result<i64, QueryError> {
    let row = connection.query_row("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8", &[]).await?;
    row.ok_or_else(|| Error::Corrupt("the server has no clock".to_owned()))?.try_get(0).map_err(QueryError::Sql)
}

/// Returns the version of the tables, 0 if there are none. Fails if they belong to another program or to a newer version.
async fn read_schema_version(connection: &PostgresConnection, store_url: &str) -> Result<i64, QueryError> {
    const COUNT: &str = "SELECT count(*), count(*) FILTER (WHERE c.relname = 'version' AND c.relkind = 'r')
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'portcullis'";
    let row = connection.query_row(COUNT, &[]).await?.ok_or_else(|| Error::Corrupt("the catalogue cannot be read".to_owned()))?;
    let (relations, marks): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    if relations == 0 {
        return Ok(0);
    }
    let ours = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'portcullis.version'::regclass AND attname IN ('program', 'version') \
        AND NOT attisdropped";
    let not_ours = || {
        let why = format!(
            "the schema `portcullis` in `{store_url}` holds tables of another program: name another database for the store"
        );
        QueryError::from(Error::NotAStore(why))
    };
    let shaped: i64 = match marks {
        1 => connection.query_row(ours, &[]).await?.map_or(Ok(0), |row| row.try_get(0))?,
        _ => 0,
    };
    if shaped != 2 {
        return Err(not_ours());
    }
    let row = connection
        .query_row("SELECT program::text, version::text FROM portcullis.version LIMIT 1", &[])
        .await?
        .ok_or_else(not_ours)?;
    let (program, version): (Option<String>, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
    if program.as_deref() != Some(PROGRAM_NAME) {
        return Err(not_ours());
    }
    match version.and_then(|version| version.parse().ok()) {
        Some(known @ 1..=SCHEMA_VERSION) => Ok(known),
        Some(newer) if newer > SCHEMA_VERSION => Err(Error::NewerVersion(format!(
            "the store `{store_url}` has schema {newer} and this program knows {SCHEMA_VERSION}: use the version that made it, or a newer one"
        ))
        .into()),
        _ => Err(Error::Corrupt(format!("the store `{store_url}` has a schema that no version has written")).into()),
    }
}
