//! `portcullis store backup` copies a store while it is in use. `portcullis store adopt` adopts a restored store, and shows which
//! replicas follow it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::AdminClient;
use super::outcome::ActAnswer;
use super::output::Output;
use super::{AdminArgs, Failure, progress};
use crate::api::r#gen as wire;
use crate::app;
use crate::config::{self, StoreUrl};
use crate::store::postgres::Durability;
use crate::store::sqlite::{Backup, BackupError, Progress, back_up};

const ADOPT_HELP: &str = "\
A backup does not know what was revoked after it was made, and no replica follows a store that is older than what it followed.
Adopting says that this is the store from now on:
  1. every root issued until now is void, whatever the backup says: issue new ones after the time that is printed;
  2. each replica brings what it knows to be revoked and the store lacks, then follows; one on PostgreSQL does so while it runs, within
     seconds, one on SQLite when it is started;
  3. what was reinstated since the backup may come back as revoked: reinstate it again. Approvals must be asked for anew, and policy
     that was applied since must be applied again.

Examples:
  portcullis store adopt --store sqlite:DATA/store.db --data DATA --reason \"restored the backup of Monday\"
  portcullis store adopt --store env:PORTCULLIS_STORE --reason \"INC-4712\" --wait 60

Docs: OPERATIONS, back up and restore";

#[derive(Debug, Subcommand)]
pub(super) enum StoreCommand {
    /// Adopt a restored store: void all roots, and let replicas merge the revocations that they know
    #[command(after_help = ADOPT_HELP)]
    Adopt(AdoptArgs),
    /// Copy a SQLite store to a file, while servers and commands use it, and verify the copy
    #[command(after_help = BACKUP_HELP)]
    Backup(BackupArgs),
}

const BACKUP_HELP: &str = "\
The copy is one view of the store in one file, mode 0600. It gets its name only once it is verified: its pages, the digest of its rows,
and its whole change log. A backup does not know what is revoked after it is made: OPERATIONS, back up and restore, says how it is put
back. For PostgreSQL use pg_dump, or the server's own base backups and log.

Examples:
  portcullis store backup /backup/portcullis-monday.db
  portcullis store backup --data /var/lib/portcullis --overwrite /backup/portcullis.db

Exit codes: 0 verified and durable, 1 not made, 64 the name is taken or the store is in PostgreSQL, 69 the store is busy,
78 there is no store";

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// The file to make
    file: PathBuf,
    /// Replace an older backup
    #[arg(long)]
    overwrite: bool,
    /// The store: `sqlite:PATH` [default: sqlite:DATA/store.db]
    #[arg(long, value_name = "URL")]
    store: Option<StoreUrl>,
    /// The data folder, where the default store lies
    #[arg(long, value_name = "DIR", env = "PORTCULLIS_DATA", default_value = "portcullis-data")]
    data: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct AdoptArgs {
    /// The restored store: `sqlite:PATH`, `postgres://…`, or `env:VARIABLE`, where a URL with a password belongs
    #[arg(long, value_name = "URL", required = true)]
    store: StoreUrl,
    /// With PostgreSQL, how its server is set up: `single`, `synchronous` or `asynchronous`
    #[arg(long, value_name = "WHICH", env = "PORTCULLIS_STORE_DURABILITY")]
    store_durability: Option<Durability>,
    /// The data folder, where the local operator's key lies
    #[arg(long, value_name = "DIR", env = "PORTCULLIS_DATA", default_value = "portcullis-data")]
    data: PathBuf,
    /// The private key of an operator who administers, a JWK file [default: DATA/local.jwk]
    #[arg(long, value_name = "FILE", env = "PORTCULLIS_OPERATOR_KEY")]
    operator_key: Vec<PathBuf>,
    /// Why, for the record
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Wait until every registered replica follows, for at most so many seconds, and show how much each merged
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    wait: Option<u64>,
}

pub(super) async fn run(command: StoreCommand, output: &Output) -> Result<(), Failure> {
    match command {
        StoreCommand::Adopt(arguments) => adopt(arguments, output).await,
        StoreCommand::Backup(arguments) => backup(arguments, output).await,
    }
}

async fn backup(arguments: BackupArgs, output: &Output) -> Result<(), Failure> {
    let BackupArgs { file, overwrite, store, data } = arguments;
    let url = store.unwrap_or_else(|| StoreUrl::from(format!("sqlite:{}", data.join("store.db").display())));
    if url.is_postgres() {
        return Err(Failure::misuse(
            "`store backup` copies a SQLite store; for one in PostgreSQL use `pg_dump --schema=portcullis`, or the server's own base \
             backups and log (docs/OPERATIONS.md, PostgreSQL, Backup)",
        ));
    }
    let config::Store::Sqlite(path) = config::Store::new(&url, None).map_err(Failure::bad_configuration)? else {
        return Err(Failure::misuse("`store backup` copies a SQLite store"));
    };
    let began = Instant::now();
    let made = watched(&path, &file, overwrite).await.map_err(|error| match error {
        BackupError::Name(message) => Failure::misuse(message),
        BackupError::Copy(message) => Failure::failed(message),
        BackupError::Store(error) => Failure::from(app::Error::Store(error)),
    })?;
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let Backup { revision, rows, commits, bytes } = made;
    output.line(&format!("backed up to {}: {bytes} bytes, verified and durable in {took_ms} ms", file.display()));
    output.line(&format!("revision {revision}"));
    output.line(&format!("{rows} documents and revocations, {commits} revisions of the change log"));
    output.json(&json!({
        "file": file.display().to_string(),
        "revision": revision.to_string(),
        "rows": rows,
        "commits": commits,
        "bytes": bytes,
        "took_ms": took_ms,
    }));
    Ok(())
}

/// Backs up on a blocking thread, and shows the progress.
async fn watched(store: &Path, file: &Path, overwrite: bool) -> Result<Backup, BackupError> {
    const LOOK: Duration = Duration::from_millis(100);
    let seen = Arc::new(Progress::default());
    let (store, file, made) = (store.to_owned(), file.to_owned(), seen.clone());
    let mut making = tokio::task::spawn_blocking(move || back_up(&store, &file, overwrite, &made));
    let bar = progress::steps();
    let result = loop {
        tokio::select! {
            result = &mut making => break result,
            () = tokio::time::sleep(LOOK) => match (seen.copied(), seen.verified()) {
                ((done, total), (0, _)) => progress::show(&bar, "copying, bytes", done, total),
                (_, (done, total)) => progress::show(&bar, "verifying, rows", done, total),
            },
        }
    };
    bar.finish_and_clear();
    result.unwrap_or_else(|error| Err(BackupError::Copy(format!("the backup was broken off: {error}"))))
}

async fn adopt(arguments: AdoptArgs, output: &Output) -> Result<(), Failure> {
    let AdoptArgs { store, store_durability, data, operator_key, reason, wait } = arguments;
    let admin = AdminArgs { url: String::new(), store: Some(store), store_durability, data, operator_key };
    let mut client = AdminClient::open_for_act(&admin).await?;
    let ActAnswer { message: adopted, is_recorded } = client.adopt(wire::AdoptRequest { reason }).await?;
    output.line(&format!("adopted: the store was at {}, and goes on as another history", adopted.adopted_from));
    output.line(&format!("revision {}", adopted.revision));
    output.line(&format!("every root issued until {} is void", date_time(adopted.watermark_unix_s)));
    let mut said = json!({
        "revision": adopted.revision,
        "adopted_from": adopted.adopted_from,
        "committed_at_unix_ms": adopted.committed_at_unix_ms,
        "watermark_unix_s": adopted.watermark_unix_s,
        "recorded": is_recorded,
    });
    let Some(seconds) = wait else {
        output.json(&said);
        return Ok(());
    };
    let message = wire::WaitForAdoptionRequest { revision: adopted.revision, wait_ms: seconds.saturating_mul(1000) };
    let waited = client.wait_for_adoption(message).await.map_err(Failure::after_a_write);
    if let (Ok(waited), Some(said)) = (&waited, said.as_object_mut()) {
        said.insert("fleet".to_owned(), waited_json(waited));
    }
    output.json(&said);
    let waited = waited?;
    print(&waited, output);
    match waited.replicas.iter().filter(|one| !one.follows && !is_gone(one)).count() {
        0 => Ok(()),
        left => Err(Failure::failed(format!(
            "adopted, but {left} replica(s) did not follow within {seconds} s: see `fleet status` and their /readyz; one on SQLite must \
             be restarted"
        ))),
    }
}

fn is_gone(one: &wire::AdoptingReplica) -> bool {
    one.replica.as_ref().is_some_and(|replica| replica.state == "gone")
}

fn print(waited: &wire::WaitForAdoptionResponse, output: &Output) {
    let rows = waited.replicas.iter().map(|one| {
        let replica = one.replica.clone().unwrap_or_default();
        let merged = one.merged.map_or_else(|| "-".to_owned(), |count| count.to_string());
        let follows = if one.follows { "yes" } else { "no" };
        vec![replica.id, replica.address, replica.state, merged, follows.to_owned()]
    });
    output.table(&["REPLICA", "ADDRESS", "STATE", "MERGED", "FOLLOWS"], rows.collect());
    let registered = waited.replicas.iter().filter(|one| !is_gone(one)).count();
    let follow = waited.replicas.iter().filter(|one| one.follows).count();
    let merged: u64 = waited.replicas.iter().filter_map(|one| one.merged).sum();
    output.line(&format!("{follow} of {registered} replicas follow, {merged} revocations were merged"));
}

fn waited_json(waited: &wire::WaitForAdoptionResponse) -> Value {
    let replicas = waited.replicas.iter().map(|one| {
        let replica = one.replica.clone().unwrap_or_default();
        json!({
            "id": replica.id,
            "address": replica.address,
            "state": replica.state,
            "merged": one.merged,
            "follows": one.follows,
        })
    });
    json!({ "replicas": replicas.collect::<Vec<_>>(), "complete": waited.complete, "waited_ms": waited.waited_ms })
}

/// A time in UTC, for people.
pub(super) fn date_time(unix_s: i64) -> String {
    let (days, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    // Converts days to year, month and day, after Howard Hinnant's `civil_from_days`.
    let shifted = days.saturating_add(719_468);
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_people_read_them() {
        let check = |unix_s: i64, expected: &str| assert_eq!(date_time(unix_s), expected);
        check(0, "1970-01-01 00:00:00 UTC");
        check(951_782_399, "2000-02-28 23:59:59 UTC");
        check(951_782_400, "2000-02-29 00:00:00 UTC");
        check(1_750_000_000, "2025-06-15 15:06:40 UTC");
        check(4_107_542_400, "2100-03-01 00:00:00 UTC");
    }
}
