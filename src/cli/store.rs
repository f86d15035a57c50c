//! `portcullis store backup` copies a store while it is in use. `portcullis store adopt` adopts a restored store, and shows which
//! replicas follow it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::act_outcome::ActAnswer;
use super::client::AdminClient;
use super::output::CommandOutput;
use super::{AdminArgs, CommandFailure, progress};
use crate::api::r#gen as wire;
use crate::app;
use crate::config::{self, StoreUrl};
use crate::model::revision::Revision;
use crate::store::postgres::Durability;
use crate::store::sqlite::{BackupError, BackupProgress, BackupSummary, CACHE_FILE, ReplicaCache, back_up};
use crate::sync::PositionFile;

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
    Adopt(StoreAdoptArgs),
    /// Copy a SQLite store to a file, while servers and commands use it, and verify the copy
    #[command(after_help = BACKUP_HELP)]
    Backup(StoreBackupArgs),
}

const BACKUP_HELP: &str = "\
The copy is one view of the store in one file, mode 0600. It gets its name only once it is verified: its pages, the digest of its rows,
and its whole change log. A backup does not know what is revoked after it is made: OPERATIONS, back up and restore, says how it is put
back. For PostgreSQL use pg_dump, or the server's own base backups and log.

Examples:
  portcullis store backup /backup/portcullis-monday.db
  portcullis store backup --data /var/lib/portcullis --overwrite /backup/portcullis.db

Exit codes: 0 verified and durable, 1 not made, 64 the name is taken or the store is in PostgreSQL, 69 the store is busy,
78 there is no store, or it does not hold together";

#[derive(Debug, Args)]
pub(super) struct StoreBackupArgs {
    /// The file to make
    file: PathBuf,
    /// Replace an older backup; any other file is left alone
    #[arg(long)]
    overwrite: bool,
    /// The store: `sqlite:PATH` [default: sqlite:DATA/store.db]
    #[arg(long, value_name = "URL", env = "PORTCULLIS_STORE", hide_env_values = true)]
    store: Option<StoreUrl>,
    /// The data folder, where the default store lies
    #[arg(long, value_name = "DIR", env = "PORTCULLIS_DATA", default_value = "portcullis-data")]
    data: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct StoreAdoptArgs {
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

pub(super) async fn run(command: StoreCommand, output: &CommandOutput) -> Result<(), CommandFailure> {
    match command {
        StoreCommand::Adopt(arguments) => adopt(arguments, output).await,
        StoreCommand::Backup(arguments) => backup(arguments, output).await,
    }
}

async fn backup(arguments: StoreBackupArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let StoreBackupArgs { file, overwrite, store, data } = arguments;
    let url = store.unwrap_or_else(|| StoreUrl::from(format!("sqlite:{}", data.join("store.db").display())));
    if url.is_postgres() {
        return Err(CommandFailure::misuse(
            "`store backup` copies a SQLite store; for one in PostgreSQL use `pg_dump --schema=portcullis`, or the server's own base \
             backups and log (docs/OPERATIONS.md, PostgreSQL, Backup)",
        ));
    }
    let config::StoreLocation::Sqlite(path) =
        config::StoreLocation::new(&url, None).map_err(CommandFailure::bad_configuration)?
    else {
        return Err(CommandFailure::misuse("`store backup` copies a SQLite store"));
    };
    let store = config::StoreLocation::Sqlite(path.clone()).absolute();
    let began = Instant::now();
    let made = back_up_with_progress(&path, &file, overwrite).await.map_err(|error| match error {
        BackupError::InvalidName(message) => CommandFailure::misuse(message),
        BackupError::CopyFailed(message) => CommandFailure::failed(message),
        BackupError::Store(error) => CommandFailure::from(app::Error::Store(error)),
    })?;
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let BackupSummary { revision, rows, commits, bytes } = made;
    output.line(&format!("backed up to {}: {bytes} bytes, verified and durable in {took_ms} ms", file.display()));
    output.line(&format!("store {store}"));
    output.line(&format!("revision {revision}"));
    output.line(&format!("{rows} documents and revocations, {commits} revisions of the change log"));
    output.json(&json!({
        "store": store,
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
async fn back_up_with_progress(store: &Path, file: &Path, overwrite: bool) -> Result<BackupSummary, BackupError> {
    const LOOK: Duration = Duration::from_millis(100);
    let seen = Arc::new(BackupProgress::default());
    let (store, file, made) = (store.to_owned(), file.to_owned(), seen.clone());
    let mut making = tokio::task::spawn_blocking(move || back_up(&store, &file, overwrite, &made));
    let progress_bar = progress::new_step_bar();
    let result = loop {
        tokio::select! {
            result = &mut making => break result,
            () = tokio::time::sleep(LOOK) => match (seen.copied(), seen.verified()) {
                ((done, total), (0, _)) => progress::show_step(&progress_bar, "copying, bytes", done, total),
                (_, (done, total)) => progress::show_step(&progress_bar, "verifying, rows", done, total),
            },
        }
    };
    progress_bar.finish_and_clear();
    result.unwrap_or_else(|error| Err(BackupError::CopyFailed(format!("the backup was broken off: {error}"))))
}

async fn adopt(arguments: StoreAdoptArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let StoreAdoptArgs { store, store_durability, data, operator_key, reason, wait } = arguments;
    let admin = AdminArgs { url: String::new(), store: Some(store), store_durability, data, operator_key };
    let mut client = AdminClient::open(&admin).await?;
    let ActAnswer { message: adopted, is_recorded } = client.adopt(wire::AdoptRequest { reason }).await?;
    output.line(&format!("adopted: the store was at {}, and goes on as another history", adopted.adopted_from));
    output.line(&format!("revision {}", adopted.revision));
    output.line(&format!("every root issued until {} is void", date_time(adopted.watermark_unix_s)));
    let mut result_json = json!({
        "revision": adopted.revision,
        "adopted_from": adopted.adopted_from,
        "committed_at_unix_ms": adopted.committed_at_unix_ms,
        "watermark_unix_s": adopted.watermark_unix_s,
        "recorded": is_recorded,
    });
    if let Some(behind) = CacheBehind::find(&admin.data, &adopted.adopted_from) {
        CommandOutput::new(false).warning(&behind.message(&admin.data));
        if let Some(result_json) = result_json.as_object_mut() {
            result_json.insert("not_merged".to_owned(), behind.json());
        }
    }
    let Some(seconds) = wait else {
        output.json(&result_json);
        return Ok(());
    };
    let message = wire::WaitForAdoptionRequest { revision: adopted.revision, wait_ms: seconds.saturating_mul(1000) };
    let waited = client.wait_for_adoption(message).await.map_err(CommandFailure::after_write);
    if let (Ok(waited), Some(result_json)) = (&waited, result_json.as_object_mut()) {
        result_json.insert("fleet".to_owned(), adoption_wait_json(waited));
    }
    output.json(&result_json);
    let waited = waited?;
    print_adoption_wait(&waited, output);
    match waited.replicas.iter().filter(|one| !one.follows && !is_gone(one)).count() {
        0 => Ok(()),
        left => Err(CommandFailure::failed(format!(
            "adopted, but {left} replica(s) did not follow within {seconds} s: see `fleet status` and their /readyz; one on SQLite must \
             be restarted"
        ))),
    }
}

/// The revisions that the replica of a data folder followed, and that its cache does not hold. What was revoked by them cannot be
/// merged into an adopted store.
#[derive(Debug, PartialEq, Eq)]
struct CacheBehind {
    followed: Revision,
    /// `None` if the cache holds nothing of that history.
    cached: Option<u64>,
}

impl CacheBehind {
    /// Compares the position in a data folder with the cache there; `None` if nothing is known to be missing. `from` is the last
    /// revision that the adopted store had.
    fn find(data: &Path, from: &str) -> Option<Self> {
        let followed = PositionFile::in_data_folder(data).read().ok()??.revision;
        let from: Revision = from.parse().ok()?;
        if followed.history != from.history || followed.number <= from.number {
            return None;
        }
        // Opening the cache would make a new one where there is none.
        let cached = match data.join(CACHE_FILE).is_file() {
            true => ReplicaCache::open(data).ok()?.position().ok()?.map(|(revision, _)| revision),
            false => None,
        };
        let cached = cached.filter(|cached| cached.history == followed.history).map(|cached| cached.number);
        cached.is_none_or(|cached| cached < followed.number).then_some(Self { followed, cached })
    }

    fn message(&self, data: &Path) -> String {
        let holds = self.cached.map_or_else(|| "no revision".to_owned(), |cached| format!("revisions up to {cached} only"));
        format!(
            "the replica of this data folder followed its store up to revision {}, and its cache holds {holds}: it cannot merge what was \
             revoked after that. Unless another replica does, revoke it again; the audit log shows it:\n  jq -cR 'fromjson? | \
             select(.kind==\"act\" and .effect==\"ACCEPTED\" and (.method|endswith(\"/Revoke\"))) | [.time_unix_ns,.revision,.reason]' \
             {}/audit/*.jsonl",
            self.followed,
            data.display()
        )
    }

    fn json(&self) -> Value {
        json!({ "followed": self.followed.to_string(), "cached_number": self.cached })
    }
}

fn is_gone(one: &wire::AdoptingReplica) -> bool {
    one.replica.as_ref().is_some_and(|replica| replica.state == "gone")
}

fn print_adoption_wait(waited: &wire::WaitForAdoptionResponse, output: &CommandOutput) {
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

fn adoption_wait_json(waited: &wire::WaitForAdoptionResponse) -> Value {
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
    fn a_cache_that_stayed_behind_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let place = |history: &str, number: u64| {
            let text = format!(r#"{{"history":"{history}","number":{number},"hash":"{}"}}"#, "0".repeat(64));
            std::fs::write(folder.path().join("place.json"), text).unwrap();
        };
        let find = |from: &str| CacheBehind::find(folder.path(), from);
        assert_eq!(find("h.3"), None, "nothing was followed");
        place("h", 7);
        let behind = CacheBehind { followed: "h.7".parse().unwrap(), cached: None };
        assert_eq!(find("h.3"), Some(behind), "there is no cache");
        assert!(!folder.path().join(CACHE_FILE).exists());
        drop(ReplicaCache::open(folder.path()).unwrap());
        assert!(find("h.3").unwrap().message(folder.path()).contains("/audit/*.jsonl"), "the cache is empty");
        assert_eq!(find("h.7"), None, "the store holds all that was followed");
        assert_eq!(find("other.3"), None, "another store");
    }

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
